//! A server that exchanges records with whoever connects, and keeps from which addresses they came.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use netns_tests::agent::exchange::serve_records;
use netns_tests::netns::Namespace;
use tokio::task::JoinHandle;

/// The server at work.
pub struct Elsewhere {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<IpAddr>>>,
    task: JoinHandle<()>,
}

impl Elsewhere {
    /// Serves in `namespace`, to be called inside a runtime.
    pub fn serve(namespace: &Namespace, address: SocketAddr) -> Self {
        let listener = namespace.tcp_listener_async(address).unwrap();
        let seen = Arc::<Mutex<Vec<IpAddr>>>::default();
        let came = seen.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, from)) = listener.accept().await {
                came.lock().unwrap().push(from.ip());
                tokio::spawn(serve_records(stream));
            }
        });
        Self { address, seen, task }
    }

    /// Who connected, in that order.
    pub fn seen(&self) -> Vec<IpAddr> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        self.task.abort();
    }
}
