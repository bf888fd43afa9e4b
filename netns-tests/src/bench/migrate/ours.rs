//! The gateway's two runs: a first move, then a move back after an hour's worth of writes.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use gateway::api::types::Progressing;

use super::cell::Run;
use super::client::{self, Watched};
use super::report::Measured;
use crate::agent::client::ask;
use crate::agent::control::AgentStatus;
use crate::scenario::monitor::{Monitor, connect_later};
use crate::scenario::programs::Programs;
use crate::scenario::scene::{Scene, VM};

/// What an hour writes: so many runs of so many blocks of 4 KiB, 40 MiB in all.
const HOUR: &str = "/write?runs=2000&blocks=5";

/// Plays both; the second only if the first ended.
pub async fn race(run: &Run, limit: Duration, name: String, programs: &Programs) -> Result<Vec<Measured>> {
    let scene = Scene::build(run.scene(name), programs).await?;
    let played = play(&scene, limit).await;
    let logs = (scene.a.log_tail(), scene.b.log_tail());
    let left = scene.close();
    let measured = played.with_context(|| format!("site a:\n{}\nsite b:\n{}", logs.0, logs.1))?;
    if !left.is_empty() {
        bail!("This was left: {left:?}");
    }
    Ok(measured)
}

async fn play(scene: &Scene, limit: Duration) -> Result<Vec<Measured>> {
    scene.start_guest().await?;
    let first = one_move(scene, ["a", "b"], scene.home()?, limit).await?;
    if first.did_not_finish {
        return Ok(vec![first]);
    }
    let there = scene.care_of("b")?;
    let client = &scene.world.client;
    let written: AgentStatus = client.run(|| ask(there, HOUR, Duration::from_secs(300)))??;
    if !written.errors.is_empty() {
        bail!("The guest cannot write: {:?}", written.errors);
    }
    let back = one_move(scene, ["b", "a"], there, limit).await?;
    Ok(vec![first, back])
}

async fn one_move(scene: &Scene, way: [&str; 2], address: IpAddr, limit: Duration) -> Result<Measured> {
    let source = Monitor::connect(&scene.gateway(way[0])?.observer(VM), Duration::from_secs(5))?;
    let target = connect_later(scene.gateway(way[1])?.observer(VM), limit);
    let client = client::start(scene.options.rate_mbit, address, &scene.world).await?;
    let watched = Watched::begin(&scene.world)?;
    let begun = Instant::now();
    let id = scene.begin_move_between(way[0], way[1]).await?;
    let view = match scene.wait_move_from(way[0], &id, limit).await {
        Ok(view) => view,
        // Slower than the race allows is a result; whatever else is wrong shows in the next question.
        Err(_) if begun.elapsed() >= limit => {
            drop(scene.gateway(way[0])?.client().status().await?);
            return Ok(watched.end()?.unfinished());
        }
        Err(error) => return Err(error),
    };
    let total = begun.elapsed();
    if view.progressing != Progressing::Moved {
        bail!("The machine stayed: {}", view.reason.unwrap_or_default());
    }
    let seen = watched.end()?;
    let target = target.join().map_err(|_| anyhow::anyhow!("The monitor broke"))??;
    let downtime = client::downtime_ms(&source.events(), &target.events());
    let traffic = client::finish(client).await?;
    Ok(seen.finished(total, downtime, &traffic))
}
