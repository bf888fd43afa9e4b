//! What a machine's tap holds before its QEMU reads it.

use gateway::tunnel::wait_until_read;

use super::*;

/// Waits in the namespace until the tap is read, as far as that goes.
fn left(lab: &Lab, tap: &str) -> Vec<(String, u32)> {
    let taps = vec![tap.to_owned()];
    let look = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(wait_until_read(&taps)).unwrap()
    };
    lab.within("gb", look).join().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_tap_holds_is_waited_for_until_it_is_read_and_not_for_ever() {
    let lab = lab_or_skip!();
    let site = lab.start_site("gb", TunnelConfig::default());
    let port = site.tunnel.create_tap(key(), 0, None).await.unwrap();
    let name = port.clone();
    let tap = lab.within("gb", move || plug_into(&name)).join().unwrap();
    lab.script(&format!(
        "ip -n ${{P}}gb addr add 192.0.2.1/24 dev {port}; \
         ip -n ${{P}}gb neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev {port}; \
         for i in $(seq 500); do x gb ip -o link show {port} | grep -q 'state UP' && exit; sleep 0.01; done; exit 1"
    ));
    let sender = lab.within("gb", || udp_to("192.0.2.2:9".parse().unwrap())).join().unwrap();
    sender.send(b"the first").unwrap();
    frame_with(&tap, b"the first");
    assert_eq!(left(&lab, &port), [], "all is read");
    for _ in 0..3 {
        sender.send(b"unread").unwrap();
    }
    let began = Instant::now();
    assert!(left(&lab, &port).iter().any(|(tap, packets)| *tap == port && *packets >= 3));
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(left(&lab, "no-such-tap"), [], "what is not there holds nothing");
    sender.send(b"the last").unwrap();
    frame_with(&tap, b"the last");
    assert_eq!(left(&lab, &port), [], "all is read");
    site.tunnel.clone().stop().await.unwrap();
    drop(tap);
    lab.script("ip -n ${P}gb link del lh-web1-net0");
}
