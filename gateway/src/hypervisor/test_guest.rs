//! A guest for tests whose monitor is a function, and which writes down what it is asked for. There is no QEMU, and so
//! no process.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, duplex};
use tokio::sync::watch;

use super::guest::{Guest, VolumeNode};
use super::qmp::{QmpClient, QmpConfig};

impl Guest {
    /// Machine web1 with its disk, whose monitor answers each command as `answer` says. The commands that came so far are
    /// returned, too.
    pub(crate) async fn answered_by(answer: fn(&str) -> Value) -> (Self, watch::Receiver<Vec<String>>) {
        let (near, far) = duplex(64 << 10);
        let (note, asked) = watch::channel(Vec::new());
        tokio::spawn(monitor(far, answer, note));
        let (reader, writer) = tokio::io::split(near);
        let qmp = QmpClient::over(reader, writer, "test".to_owned(), QmpConfig::default()).await.unwrap();
        let root = VolumeNode { node: "root".to_owned(), device: None, size_bytes: 1 << 20 };
        let volumes = BTreeMap::from([("root".parse().unwrap(), root)]);
        (Self { name: "web1".parse().unwrap(), qmp, volumes, home: None }, asked)
    }
}

async fn monitor(far: DuplexStream, answer: fn(&str) -> Value, note: watch::Sender<Vec<String>>) {
    let mut far = BufReader::new(far);
    far.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n").await.unwrap();
    let mut line = String::new();
    while far.read_line(&mut line).await.is_ok_and(|length| length > 0) {
        let asked: Value = serde_json::from_str(&line).unwrap();
        line.clear();
        let command = asked["execute"].as_str().unwrap_or_default().to_owned();
        let answer = json!({ "return": answer(&command), "id": asked["id"] });
        note.send_modify(|commands| commands.push(command));
        if far.write_all(format!("{answer}\r\n").as_bytes()).await.is_err() {
            return;
        }
    }
}
