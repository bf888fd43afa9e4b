//! QEMU's monitor: lines of any bytes in place of a greeting, answers and events.
//!
//! A command is answered or fails, and does not wait longer than for the end of the connection.

use gateway::hypervisor::{QmpClient, QmpConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::nbd_client::on_runtime;

/// Sends `data` as everything a monitor says, then closes.
pub fn run(data: &[u8]) {
    on_runtime(async {
        let (ours, theirs) = tokio::io::duplex(4096);
        let (reader, writer) = tokio::io::split(ours);
        let (mut heard, mut says) = tokio::io::split(theirs);
        let say = async move {
            // The client may close before all is said.
            let _ = says.write_all(data).await;
            let _ = says.shutdown().await;
        };
        let hear = async move {
            let mut everything = Vec::new();
            let _ = heard.read_to_end(&mut everything).await;
        };
        let ask = async move {
            let config = QmpConfig { max_message_bytes: 4096, ..QmpConfig::default() };
            let Ok(client) = QmpClient::over(reader, writer, "fuzz".to_owned(), config).await else { return };
            let mut events = client.events();
            let arguments = || serde_json::Value::Null;
            let (status, migration) = tokio::join!(
                client.execute("query-status", arguments()),
                client.execute("query-migrate", arguments())
            );
            drop((status, migration));
            while events.next().await.is_ok() {}
        };
        tokio::join!(say, hear, ask);
    });
}

/// A session with answers, an event and an error; one with out-of-band commands.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let greeting = |capabilities: &str| {
        format!(
            "{{\"QMP\": {{\"version\": {{\"qemu\": {{\"major\": 7}}}}, \"capabilities\": [{capabilities}]}}}}\r\n"
        )
    };
    let event =
        "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"STOP\", \"data\": {}}\r\n";
    let plain = [
        greeting("").as_str(),
        "{\"return\": {}, \"id\": 0}\r\n",
        event,
        "{\"return\": {\"status\": \"running\"}, \"id\": 1}\r\n",
        "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}, \"id\": 2}\r\n",
    ]
    .concat();
    let oob =
        [greeting("\"oob\"").as_str(), "{\"return\": {}, \"id\": 0}\r\n", "{\"id\": 1, \"return\": []}\n"]
            .concat();
    vec![("plain", plain.into_bytes()), ("oob", oob.into_bytes())]
}
