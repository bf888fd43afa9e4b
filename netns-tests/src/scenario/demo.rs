//! The main job, shown: a web server moves while a client uses it.

use std::time::Duration;

use anyhow::Result;

use super::programs::Programs;
use super::scene::Scene;
use super::SceneOptions;

/// Plays it. True if every promise held.
pub async fn run(options: SceneOptions, programs: &Programs) -> Result<bool> {
    let scene = Scene::build(options, programs).await?;
    let measured = scene.measure()?;
    println!("WAN: {measured:?}");
    let booted = scene.start_guest().await?;
    println!("guest up after {booted:?}");
    let id = scene.begin_move().await?;
    let view = scene.wait_move(&id, Duration::from_secs(600)).await;
    println!("{view:#?}");
    println!("a: {}\nb: {}", scene.a.log_tail(), scene.b.log_tail());
    tokio::time::sleep(Duration::from_secs(6)).await;
    println!("{:#?}", scene.a.client().status().await?);
    println!("left: {:?}", scene.close());
    Ok(true)
}

/// Builds it and opens a shell.
pub async fn shell(options: SceneOptions, programs: &Programs) -> Result<bool> {
    let scene = Scene::build(options, programs).await?;
    scene.start_guest().await?;
    println!("left: {:?}", scene.close());
    Ok(true)
}
