//! The hickory server as its authors ship it, with a journal and a key file: what works with it, and what does not.

mod support;

use std::sync::Arc;
use std::time::Duration;

use dnsupdater::{Error, Outcome, TsigFault, TtlOutcome, Updater, UpdaterConfig};
use hickory_server::Server;
use hickory_server::proto::rr::Name;
use hickory_server::proto::rr::rdata::tsig::TsigAlgorithm;
use hickory_server::store::sqlite::{SqliteConfig, SqliteZoneHandler, TsigKeyConfig};
use hickory_server::zone_handler::{AxfrPolicy, Catalog, ZoneType};
use support::*;
use tempfile::TempDir;
use tokio::net::{TcpListener, UdpSocket};

struct Stock {
    updater: Updater,
    config: UpdaterConfig,
    _server: Server<Catalog>,
    _directory: TempDir,
}

async fn stock() -> Stock {
    let directory = tempfile::tempdir().expect("a directory");
    std::fs::write(directory.path().join("zone"), ZONE).expect("writable");
    // The file holds the raw secret, not base64.
    std::fs::write(directory.path().join("key"), b"the secret of site a, 32 bytes!!").expect("writable");
    let zone_config = SqliteConfig {
        zone_path: "zone".into(),
        journal_path: "journal".into(),
        allow_update: true,
        tsig_keys: vec![TsigKeyConfig {
            name: "site-a".to_owned(),
            key_file: "key".into(),
            algorithm: TsigAlgorithm::HmacSha256,
            fudge: 300,
        }],
    };
    let origin = Name::from_ascii("vm.example.").expect("a name");
    let root = Some(directory.path());
    let handler: SqliteZoneHandler = SqliteZoneHandler::try_from_config(
        origin.clone(),
        ZoneType::Primary,
        AxfrPolicy::Deny,
        false,
        root,
        &zone_config,
        None,
    )
    .await
    .expect("a valid zone");
    let mut catalog = Catalog::new();
    catalog.upsert(origin.into(), vec![Arc::new(handler)]);
    let tcp = TcpListener::bind(loopback(0)).await.expect("the loopback has ports");
    let udp = UdpSocket::bind(tcp.local_addr().expect("bound")).await.expect("free for UDP too");
    let mut config = config(vec![tcp.local_addr().expect("bound")], site_a());
    config.signed_reads = false;
    let mut server = Server::new(catalog);
    server.register_socket(udp);
    server.register_listener(tcp, Duration::from_secs(5), 16);
    let updater = Updater::new(config.clone()).expect("valid");
    Stock { updater, config, _server: server, _directory: directory }
}

#[tokio::test]
async fn it_takes_swaps_and_time_to_live_changes_when_reads_may_be_unsigned() {
    let stock = stock().await;
    let updater = &stock.updater;
    let before = essence(&updater.preflight(&app(), &ips(&[AWAY])).await.expect("ready").records);
    assert_eq!(
        essence(&updater.read(&app()).await.expect("readable")),
        before,
        "the preflight left no trace"
    );
    let lowered = updater.lower_ttl(&app(), 30).await.expect("answered");
    assert_eq!(lowered, TtlOutcome::Changed { from_s: 300, to_s: 30 });
    let swap = first_swap();
    assert_eq!(updater.swap(&swap).await.expect("answered"), Outcome::Won);
    assert!(matches!(updater.swap(&first_swap()).await.expect("answered"), Outcome::Lost { .. }));
    assert_eq!(updater.undo(&swap).await.expect("answered"), Outcome::Won);
    assert!(updater.read(&app()).await.expect("readable").has(&ips(&[HOME])));
}

#[tokio::test]
async fn its_unsigned_answers_to_queries_are_refused_by_default() {
    let stock = stock().await;
    let strict = Updater::new(UpdaterConfig { signed_reads: true, ..stock.config.clone() }).expect("valid");
    let error = strict.read(&app()).await.expect_err("unsigned");
    assert!(matches!(error, Error::Protocol { reason: "it is not signed", .. }), "{error:?}");
}

#[tokio::test]
async fn it_names_the_keys_fault() {
    let stock = stock().await;
    let hash = site_a().algorithm();
    let wrong = key("site-a", hash, b"not the secret of site a at all!");
    for (key, fault) in [(wrong, TsigFault::BadSig), (site_b(), TsigFault::BadKey)] {
        let updater = Updater::new(UpdaterConfig { key, ..stock.config.clone() }).expect("valid");
        let error = updater.preflight(&app(), &[]).await.expect_err("refused");
        assert!(matches!(error, Error::KeyOrPolicy { tsig: Some(found), .. } if found == fault), "{error:?}");
    }
}
