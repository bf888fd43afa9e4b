//! The name of a machine that left: moved, known to every name server of its zone, its TTL as it was.
//!
//! ```text
//!  Pending: swap at the primary --> ask every name server --> Moved: wait a TTL --> restore the TTL --> Settled
//!              ^      |                ^      |
//!              '------' not answered   '------' one is behind
//! ```
//!
//! What is asked for after the swap is not in the journal: a gateway that restarts swaps again, which changes nothing, and
//! asks again. Which server counts is decided in [`longhaul_core::migration::spread`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use longhaul_core::ids::VmName;
use longhaul_core::migration::spread::{Lagging, Spread};
use tokio::sync::watch;
use tokio::time::Instant;

use super::task::{AGAIN_AT_MOST, AnchorTask, show, standing};
use crate::api::types::AnchorView;
use crate::config::DnsConfig;
use crate::dns::{NameMove, Names, NamesError};
use crate::journal::unix_ms;
use crate::migration::anchor::NameState;
use crate::migration::chain;

/// Between the first two looks at the name servers: one that is notified has it within this.
const FIRST_LOOKS: Duration = Duration::from_millis(200);

impl AnchorTask {
    pub(super) async fn move_name(&mut self) {
        if !matches!(self.anchor.names, NameState::Waiting | NameState::Pending) {
            return;
        }
        let Some((name, names)) = self.name() else { return };
        self.anchor.names = NameState::Pending;
        self.write();
        let mut wait = Duration::from_millis(200);
        while let Err(error) = self.try_to_move(&names, &name).await {
            let text = chain(&error);
            tracing::warn!(vm = %self.anchor.vm, name, error = text, "name could not be moved yet; new clients still come through the tunnel");
            self.show(|view| view.names_error = Some(text));
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(AGAIN_AT_MOST);
        }
        self.show(|view| {
            view.names = "moved".into();
            view.names_error = None;
            view.names_moved_ms = Some(unix_ms());
        });
        tracing::info!(vm = %self.anchor.vm, name, "name moved");
    }

    async fn try_to_move(&mut self, names: &Names, name: &str) -> Result<(), NamesError> {
        if self.anchor.ttl_s == 0 {
            // A name that has moved does not say any more what its TTL was.
            self.anchor.ttl_s = names.ttl_s(name).await?;
            self.write();
        }
        let addresses = self.anchor.replacements();
        let wanted = NameMove {
            name,
            addresses: &addresses,
            ttl_s: names.move_ttl_s(),
            epoch: self.anchor.epoch,
            owner: &self.anchor.peer,
        };
        let listed = names.swap(&wanted).await?;
        self.anchor.note_listed(&listed);
        Ok(())
    }

    /// A secondary that has not heard of the move gives the old addresses: the wait for old answers begins with the last.
    pub(super) async fn wait_for_servers(&mut self) {
        if self.anchor.names != NameState::Pending {
            return;
        }
        let Some((name, names)) = self.name() else { return };
        let Some(config) = self.edges.config.dns.clone() else { return };
        let poll = Duration::from_secs(config.secondary_poll_s);
        let mut servers = Servers::new(names, name, &config);
        let mut wait = FIRST_LOOKS.min(poll);
        while !self.look_at(&mut servers).await {
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(poll);
        }
        let at_unix_ms = unix_ms();
        self.anchor.names = NameState::Moved { at_unix_ms };
        self.write();
        self.show(|view| {
            (view.names_error, view.names_behind) = (None, Vec::new());
            view.names_moved_ms = Some(at_unix_ms);
        });
    }

    /// One look; `true` if nobody is waited for any more.
    async fn look_at(&mut self, servers: &mut Servers) -> bool {
        let (vm, name) = (self.anchor.vm.clone(), servers.name.clone());
        let looked = servers.look().await.map_err(|error| chain(&error));
        let behind = match looked {
            Ok(Lagging { behind, left_out }) if behind.is_empty() => {
                if !left_out.is_empty() {
                    tracing::warn!(%vm, name, servers = left_out.join(", "), "name servers that do not answer are not waited for any more; one that comes back with old answers sends clients to the old address");
                }
                return true;
            }
            Ok(lagging) => {
                self.show(|view| (view.names_error, view.names_behind) = (None, lagging.behind.clone()));
                lagging.behind
            }
            Err(error) => {
                self.show(|view| view.names_error = Some(error.clone()));
                vec![error]
            }
        };
        if servers.is_worth_a_warning() {
            tracing::warn!(%vm, name, servers = behind.join(", "), "name servers do not have the moved name; clients that ask them still come through the tunnel, which stays");
        }
        // The operator's limit ends the tunnel whatever a server still says.
        let (_, may_end) = standing(&self.edges.tunnel.status().borrow(), &self.keys());
        if may_end && !self.anchor.ended {
            tracing::warn!(%vm, name, servers = behind.join(", "), "the tunnel has reached its limit; name servers that do not have the moved name are not waited for");
        }
        may_end && !self.anchor.ended
    }

    /// The TTL of a name that has moved, if it is still what it was lowered to.
    pub(super) fn lowered_ttl(&self) -> Option<LoweredTtl> {
        let NameState::Moved { at_unix_ms } = self.anchor.names else { return None };
        let (name, names) = self.name()?;
        let before_s = if self.anchor.ttl_s == 0 { names.move_ttl_s() } else { self.anchor.ttl_s };
        let (vm, views) = (self.anchor.vm.clone(), self.views.clone());
        Some(LoweredTtl { vm, views, name, names, before_s, at_unix_ms })
    }

    /// The TTL is what it was.
    pub(super) fn settled(&mut self, lowered: &LoweredTtl) {
        self.anchor.names = NameState::Settled { at_unix_ms: lowered.at_unix_ms };
        self.write();
        self.show(|view| (view.names, view.names_error) = ("settled".into(), None));
    }

    fn name(&self) -> Option<(String, Arc<Names>)> {
        Some((self.anchor.name.clone()?, self.edges.names.clone()?))
    }
}

/// A TTL that is to be what it was before the move. Nobody's connection needs it.
pub(super) struct LoweredTtl {
    vm: VmName,
    views: watch::Sender<BTreeMap<VmName, AnchorView>>,
    name: String,
    names: Arc<Names>,
    before_s: u32,
    at_unix_ms: u64,
}

impl LoweredTtl {
    /// Resolvers may believe an old answer for as long as its TTL; then the TTL can be what it was. False if that has failed.
    pub(super) async fn restore_in_time(&self) -> bool {
        let believed = Duration::from_secs(self.names.move_ttl_s().into());
        let passed = Duration::from_millis(unix_ms().saturating_sub(self.at_unix_ms));
        tokio::time::sleep(believed.saturating_sub(passed)).await;
        self.restore().await
    }

    /// Tries again until it is what it was.
    pub(super) async fn restore_late(&self) {
        let mut wait = Duration::from_secs(1);
        loop {
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(AGAIN_AT_MOST);
            if self.restore().await {
                return;
            }
        }
    }

    async fn restore(&self) -> bool {
        let Err(error) = self.names.set_ttl(&self.name, self.before_s).await else { return true };
        let (vm, name, text) = (&self.vm, &self.name, chain(&error));
        tracing::warn!(%vm, name, error = text, "TTL could not be restored yet");
        show(&self.views, vm, |view| view.names_error = Some(format!("its TTL is not restored yet: {text}")));
        false
    }
}

/// The name servers of a name that has moved at the primary.
struct Servers {
    names: Arc<Names>,
    name: String,
    spread: Spread,
    /// The primary's serial number at the first look.
    serial: Option<u32>,
    began: Instant,
    warn_after: Duration,
    warned: bool,
}

impl Servers {
    fn new(names: Arc<Names>, name: String, config: &DnsConfig) -> Self {
        Self {
            names,
            name,
            spread: Spread::new(Duration::from_secs(config.secondary_silent_s)),
            serial: None,
            began: Instant::now(),
            warn_after: Duration::from_secs(config.secondary_warn_s),
            warned: false,
        }
    }

    async fn look(&mut self) -> Result<Lagging, NamesError> {
        let look = self.names.spread(&self.name, self.serial).await?;
        self.serial = Some(look.serial);
        Ok(self.spread.handle_answers(self.began.elapsed(), &look.answers))
    }

    /// Once, and not at once.
    fn is_worth_a_warning(&mut self) -> bool {
        let is_late = self.began.elapsed() >= self.warn_after;
        is_late && !std::mem::replace(&mut self.warned, true)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, SocketAddr};

    use dnsupdater::test_server::{Grant, TestServer, TestZone};
    use dnsupdater::{Algorithm, Key, UpdaterConfig};
    use longhaul_core::ids::{Epoch, SiteName};

    use super::*;

    const NAME: &str = "web1.vm.example";
    const HOME: &str = "198.51.100.10";
    const AWAY: &str = "203.0.113.10";
    const ZONE: &str = "$TTL 300\n@ IN SOA ns1 admin 1 3600 600 86400 5\nns1 IN A 127.0.0.1\nstale IN A 127.0.0.2\n\
                        dead IN A 127.0.0.3\nweb1 5 IN A 198.51.100.10\nweb2 5 IN A 198.51.100.11\nweb3 5 IN A 198.51.100.12\n\
                        web3 5 IN AAAA 2001:db8::12\nweb4 5 IN AAAA 2001:db8::14\n";

    fn key() -> Key {
        Key::new("site-a".parse().unwrap(), Algorithm::HmacSha256, vec![7; 32]).unwrap()
    }

    async fn server(at: SocketAddr, servers: &[&str]) -> TestServer {
        let listed: String = servers.iter().map(|host| format!("@ IN NS {host}\n")).collect();
        let zone = TestZone { origin: "vm.example".parse().unwrap(), text: format!("{ZONE}{listed}") };
        TestServer::start(at, &[zone], &[Grant::everything(key())]).await.unwrap()
    }

    fn names(at: SocketAddr) -> Arc<Names> {
        let config = UpdaterConfig::new(vec![at], "vm.example".parse().unwrap(), key());
        let config =
            UpdaterConfig { ns_port: at.port(), retries: 0, timeout: Duration::from_secs(2), ..config };
        Arc::new(Names::at(config, 5))
    }

    fn servers(names: &Arc<Names>, secondary_silent_s: u64) -> Servers {
        let config = DnsConfig {
            servers: Vec::new(),
            zone: "vm.example.".into(),
            key_file: "/none".into(),
            move_ttl_s: 5,
            timeout_ms: 2000,
            secondary_poll_s: 1,
            secondary_warn_s: 0,
            secondary_silent_s,
        };
        Servers::new(names.clone(), NAME.into(), &config)
    }

    async fn swap(names: &Names, name: &str, from: &str, to: &str) {
        let moved: [(IpAddr, IpAddr); 1] = [(from.parse().unwrap(), to.parse().unwrap())];
        let owner: SiteName = "b".parse().unwrap();
        let wanted = NameMove { name, addresses: &moved, ttl_s: 5, epoch: Epoch(2), owner: &owner };
        names.swap(&wanted).await.unwrap();
    }

    #[tokio::test]
    async fn an_address_without_a_stand_in_stays_in_the_name_beside_those_that_move_and_is_there_on_the_return()
     {
        let primary = server(SocketAddr::from(([127, 0, 0, 1], 0)), &["ns1"]).await;
        let there = names(primary.address());
        let owner: SiteName = "b".parse().unwrap();
        let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
        let (v4, v6, away) = (ip("198.51.100.12"), ip("2001:db8::12"), ip("203.0.113.12"));
        let only_v6 = ip("2001:db8::14");
        let ours = [v4, v6, away, only_v6];
        let moves = async |name, addresses: &[(IpAddr, IpAddr)], epoch| {
            let wanted = NameMove { name, addresses, ttl_s: 5, epoch: Epoch(epoch), owner: &owner };
            there.swap(&wanted).await.unwrap();
            let mut now = there.check(name, &ours, Epoch(9)).await.unwrap().addresses;
            now.sort();
            now
        };
        let dual = "web3.vm.example";
        for _ in 0..2 {
            assert_eq!(
                moves(dual, &[(v4, away), (v6, v6)], 2).await,
                [away, v6],
                "and again changes nothing"
            );
        }
        assert_eq!(moves(dual, &[(away, v4)], 3).await, [v4, v6]);
        for _ in 0..2 {
            assert_eq!(moves("web4.vm.example", &[(v4, away), (only_v6, only_v6)], 2).await, [only_v6]);
        }
    }

    #[tokio::test]
    async fn a_secondary_that_has_not_heard_is_waited_for_until_it_has_and_others_may_change_meanwhile() {
        let primary = server(SocketAddr::from(([127, 0, 0, 1], 0)), &["ns1", "stale"]).await;
        let port = primary.address().port();
        let stale = server(SocketAddr::from(([127, 0, 0, 2], port)), &[]).await;
        let (there, late) = (names(primary.address()), names(stale.address()));
        swap(&there, NAME, HOME, AWAY).await;
        let mut servers = servers(&there, 900);
        for _ in 0..2 {
            let lagging = servers.look().await.unwrap();
            assert_eq!(lagging.behind, [format!("stale.vm.example. (127.0.0.2:{port})")]);
        }
        // The zone goes on, and the secondary stays one change behind it.
        swap(&there, "web2.vm.example", "198.51.100.11", "203.0.113.11").await;
        swap(&late, NAME, HOME, AWAY).await;
        assert_eq!(servers.look().await.unwrap(), Lagging::default());
    }

    #[tokio::test]
    async fn a_dead_server_is_waited_for_as_long_as_is_configured_and_then_named() {
        let primary =
            server(SocketAddr::from(([127, 0, 0, 1], 0)), &["ns1", "dead", "nowhere.invalid."]).await;
        let there = names(primary.address());
        swap(&there, NAME, HOME, AWAY).await;
        let waiting = servers(&there, 900).look().await.unwrap();
        assert_eq!((waiting.behind.len(), waiting.left_out.len()), (2, 0), "{waiting:?}");
        let over = servers(&there, 0).look().await.unwrap();
        assert_eq!((over.behind.len(), over.left_out.len()), (0, 2), "{over:?}");
        assert!(over.left_out[0].starts_with("dead.vm.example."), "{over:?}");
    }

    #[tokio::test]
    async fn where_only_the_primary_is_known_it_alone_counts_and_no_answer_of_it_is_no_look() {
        let primary = server(SocketAddr::from(([127, 0, 0, 1], 0)), &["nowhere.invalid."]).await;
        let there = names(primary.address());
        swap(&there, NAME, HOME, AWAY).await;
        let mut servers = servers(&there, 900);
        assert_eq!(servers.look().await.unwrap(), Lagging::default());
        primary.shutdown().await;
        assert!(servers.look().await.is_err());
        assert!(servers.is_worth_a_warning() && !servers.is_worth_a_warning(), "once");
    }
}
