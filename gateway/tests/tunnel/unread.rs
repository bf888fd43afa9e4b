//! What a machine's tap holds before its QEMU reads it.

use gateway::tunnel::wait_until_read;

use super::*;

/// Waits in the namespace until the tap is read, as far as that goes.
fn busy(lab: &Lab, tap: &str) -> Vec<String> {
    let taps = vec![tap.to_owned()];
    let look = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(wait_until_read(&taps)).unwrap()
    };
    lab.within("gb", look).join().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_tap_holds_is_waited_for_while_it_is_read_and_not_for_ever() {
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
    let took = |tap: &str| {
        let began = Instant::now();
        assert_eq!(busy(&lab, tap), [""; 0]);
        began.elapsed()
    };
    // The kernel speaks up, too, on a device that is new.
    let read_all = |tap: &tun::Device| {
        let mut frame = [0; 2048];
        while tap.recv_timeout(&mut frame, Duration::from_millis(5)).is_ok() {}
        took(&port) < Duration::from_millis(8)
    };
    assert!((0..20).any(|_| read_all(&tap)), "all is read");
    took("no-such-tap");
    for _ in 0..100 {
        sender.send(b"unread").unwrap();
    }
    assert!(took(&port) >= Duration::from_millis(8), "nobody reads");

    // Somebody reads, more slowly than is waited for: one frame in 2 ms.
    // A reader that its host does not let run for a while counts as done.
    let mut tap = Some(tap);
    let seen_reading = (0..20).any(|_| {
        for _ in 0..100 {
            sender.send(b"unread").unwrap();
        }
        let plugged = tap.take().unwrap();
        let read = std::thread::spawn(move || {
            for _ in 0..100 {
                frame_with(&plugged, b"unread");
                std::thread::sleep(Duration::from_millis(2));
            }
            plugged
        });
        let busy = busy(&lab, &port);
        tap = Some(read.join().unwrap());
        busy == [port.as_str()]
    });
    assert!(seen_reading);
    let tap = tap.unwrap();
    assert!((0..20).any(|_| read_all(&tap)), "all is read");
    site.tunnel.clone().stop().await.unwrap();
    drop(tap);
    lab.script("ip -n ${P}gb link del lh-web1-net0");
}
