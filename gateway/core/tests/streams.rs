//! Migration streams that real QEMUs wrote, recorded by `cargo lab record-stream` into `streams/qemu-VERSION-MACHINE.zst`: they
//! are understood to their end, and come out of the way over the WAN bit for bit.
//!
//! Whether a QEMU takes what comes out is not asked here, and neither is how fast it is: `gateway/tests/memory` does.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::LazyLock;

use bytes::Bytes;
use longhaul_core::memory::{Item, PAGE_BYTES, StreamParser, StreamPhase};
use longhaul_core::wan::{
    Decoded, DiskPlaces, EncoderConfig, GivenPlaces, Remembered, StreamDecoder, StreamEncoder,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// A recording: what is in its name, and what QEMU wrote.
struct Recording {
    version: String,
    machine: String,
    bytes: Vec<u8>,
}

static RECORDINGS: LazyLock<Vec<Recording>> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/streams");
    let files = std::fs::read_dir(folder).expect("there are recordings");
    let mut paths: Vec<_> = files.map(|file| file.expect("a recording").path()).collect();
    paths.sort();
    let read = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name in ASCII");
        let named = name.strip_prefix("qemu-").and_then(|name| name.strip_suffix(".zst")?.split_once('-'));
        let (version, machine) = named.unwrap_or_else(|| panic!("{name} is not qemu-VERSION-MACHINE.zst"));
        let bytes = zstd::decode_all(&std::fs::read(path).expect("a recording")[..]).expect("a zstd frame");
        Recording { version: version.to_owned(), machine: machine.to_owned(), bytes }
    };
    paths.iter().map(|path| read(path)).collect()
});

/// What a gateway reads at once.
const READ_BYTES: usize = 128 << 10;
const MAX_CHUNK: usize = (1 << 20) - 1024;
/// No page, few enough that most are forgotten, and more than a recording has.
const SHADOWS: [u32; 3] = [0, 64, 1 << 13];
/// Records of the disk that names pages before it can be read.
const AFTER_RECORDS: u64 = 9;

#[test]
fn each_recording_says_whose_it_is_and_one_is_of_the_oldest_qemu_that_is_supported() {
    for Recording { version, machine, bytes } in &*RECORDINGS {
        println!("QEMU {version}, {machine}: {} bytes", bytes.len());
        assert!(
            version.split('.').count() == 3 && version.split('.').all(|part| part.parse::<u32>().is_ok())
        );
        assert!(machine.starts_with("pc-"), "{machine}");
        let said = bytes.windows(machine.len()).take(64).any(|said| said == machine.as_bytes());
        assert!(said, "the stream of {machine} names another machine");
    }
    assert!(RECORDINGS.iter().any(|recording| recording.version.starts_with("7.2.")));
}

#[test]
fn a_recording_is_understood_to_its_end_in_parts_of_any_size() {
    for Recording { version, machine, bytes } in &*RECORDINGS {
        for size in [1, 613, READ_BYTES] {
            let (mut parser, mut rest) = (StreamParser::new(), &bytes[..]);
            for part in bytes.chunks(size) {
                parser.handle_bytes(part);
                while let Some(item) = parser.poll_item() {
                    rest = rest.strip_prefix(&item.bytes()[..]).expect("the stream, in its order");
                }
            }
            let counters = parser.counters();
            assert!(rest.is_empty(), "QEMU {version}, {machine}: {} bytes are held back", rest.len());
            assert_eq!(parser.phase(), StreamPhase::DeviceState, "QEMU {version}, {machine}: {counters:?}");
            assert!(counters.pages > 400 && counters.zero_pages > 3000, "{counters:?}");
            assert!(counters.rounds >= 5 && counters.device_state_bytes > 10_000, "{counters:?}");
            println!("QEMU {version}, {machine}, in parts of {size} bytes: {counters:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_is_decoded_of_a_recording_is_what_was_recorded(
        parts in vec((500usize..200_000, any::<bool>()), 1..20),
        max_chunk in prop::sample::select(vec![EncoderConfig::MIN_CHUNK, MAX_CHUNK]),
    ) {
        for recording in &*RECORDINGS {
            for shadow_pages in SHADOWS {
                let config = EncoderConfig { shadow_pages, ..EncoderConfig::for_chunks_of(max_chunk) };
                let from_disk = Way::new(config, [None, None]).travel(&recording.bytes, &parts, true);
                prop_assert!(from_disk.encoder.counters().disk_pages > 50);
                let way = Way::new(config, [None, None]).travel(&recording.bytes, &parts, false);
                let counters = way.encoder.counters();
                prop_assert_eq!(counters.disk_pages, 0);
                prop_assert_eq!(counters.known_pages > 300, shadow_pages == SHADOWS[2], "{:?}", counters);
            }
        }
    }
}

#[test]
fn a_recording_that_is_sent_on_what_is_remembered_of_it_costs_less_than_a_twentieth() {
    for Recording { version, machine, bytes } in &*RECORDINGS {
        let config = EncoderConfig { shadow_pages: SHADOWS[2], ..EncoderConfig::for_chunks_of(MAX_CHUNK) };
        let parts = [(READ_BYTES, false)];
        let there = Way::new(config, [None, None]).travel(bytes, &parts, false);
        let first = there.wire_bytes;
        let (left, arrived) = (there.encoder.into_remembered(), there.decoder.into_remembered());
        assert!(left == arrived);
        // The way back: who decoded encodes.
        let back = Way::new(config, [Some(arrived), Some(left)]).travel(bytes, &parts, false);
        let counters = back.encoder.counters();
        println!(
            "QEMU {version}, {machine}: {} bytes cost {first} first and {} again, of which {} are device state",
            bytes.len(),
            back.wire_bytes,
            counters.wire_device_bytes
        );
        assert!(back.wire_bytes * 20 < first, "{} of {first} bytes: {counters:?}", back.wire_bytes);
    }
}

/// Both ends of a stream's way.
struct Way {
    encoder: StreamEncoder,
    decoder: StreamDecoder,
    /// What the disk holds, by its part, if pages are named by it.
    disk: BTreeMap<u32, Bytes>,
    wire_bytes: usize,
    made_bytes: usize,
    proven: bool,
}

impl Way {
    /// With what each end remembers of an earlier stream.
    fn new(config: EncoderConfig, [ours, theirs]: [Option<Remembered>; 2]) -> Self {
        let encoder = StreamEncoder::based_on(config, ours).expect("zstd starts");
        let decoder = StreamDecoder::new(config.shadow_pages).expect("zstd starts").with_base(theirs);
        Self { encoder, decoder, disk: BTreeMap::new(), wire_bytes: 0, made_bytes: 0, proven: false }
    }

    /// Sends a stream in parts of these lengths, over and over; behind some all that is gathered leaves. With `on_disk`, a
    /// disk holds every third of its pages.
    fn travel(mut self, stream: &[u8], parts: &[(usize, bool)], on_disk: bool) -> Self {
        if on_disk {
            let given = GivenPlaces { places: self.fill_disk(stream), after_records: AFTER_RECORDS };
            self.encoder = self.encoder.with_disks(vec![given]);
        }
        let (mut rest, mut parts) = (stream, parts.iter().cycle());
        while let Some((len, flush)) = parts.next().filter(|_| !rest.is_empty()) {
            let (part, later) = rest.split_at(rest.len().min(*len));
            rest = later;
            self.encoder.handle_bytes(part);
            if *flush {
                self.encoder.handle_flush();
            }
            self.carry(stream);
        }
        self.encoder.handle_end();
        self.carry(stream);
        assert!(self.proven && self.made_bytes == stream.len());
        self
    }

    /// What is to be sent arrives, and is what was sent.
    fn carry(&mut self, stream: &[u8]) {
        while let Some(chunk) = self.encoder.poll_chunk() {
            self.wire_bytes += chunk.len();
            self.decoder.handle_chunk(chunk);
            while let Some(decoded) = self.decoder.poll_decoded().expect("our own chunks decode") {
                match decoded {
                    Decoded::Bytes(bytes) => {
                        let is_same = stream[self.made_bytes..].starts_with(&bytes);
                        assert!(is_same, "another stream comes out, from byte {} on", self.made_bytes);
                        self.made_bytes += bytes.len();
                    }
                    Decoded::Disks(records) => assert_eq!(records, [AFTER_RECORDS]),
                    Decoded::Wanted(places) => {
                        let found = places.iter().map(|place| self.disk[&place.part].clone());
                        self.decoder.handle_found(found.collect());
                    }
                    Decoded::End(_) => self.proven = true,
                }
            }
        }
    }

    fn fill_disk(&mut self, stream: &[u8]) -> DiskPlaces {
        let mut parser = StreamParser::new();
        parser.handle_bytes(stream);
        let pages = std::iter::from_fn(|| parser.poll_item()).filter_map(|item| match item {
            Item::Page { record, .. } => Some(record.slice(record.len() - PAGE_BYTES..)),
            Item::Framing(_) | Item::ZeroPage { .. } | Item::DeviceState(_) | Item::Opaque(_) => None,
        });
        self.disk = (0..).zip(pages.step_by(3)).collect();
        let mut places = DiskPlaces::with_room(self.disk.len());
        for (part, page) in &self.disk {
            places.note(u64::from(*part) * PAGE_BYTES as u64, page);
        }
        places
    }
}
