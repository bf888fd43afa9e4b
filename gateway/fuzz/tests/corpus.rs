//! Every file of the corpus goes through its target, and the seeds are what today's encoders write.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use longhaul_core::disk::BLOCK;
use longhaul_core::wan::DecodeError;
use longhaul_fuzz::{TARGETS, Target, kept, map, wan};

fn folder(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name)
}

fn files(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(folder(target)).expect("each target has a folder in the corpus");
    let read = |path: PathBuf| (path.clone(), std::fs::read(path).expect("a file of the corpus"));
    entries.map(|entry| read(entry.expect("a file of the corpus").path())).collect()
}

/// What was found by fuzzing and mended stays in the corpus.
#[test]
fn every_target_takes_every_file_of_its_corpus() {
    for target in TARGETS {
        for (path, bytes) in files(target) {
            println!("{}", path.display());
            (target.run)(&bytes);
        }
    }
}

/// `LONGHAUL_FUZZ_WRITE=1` writes them anew after a change of an encoder.
#[test]
fn the_seeds_of_the_corpus_are_what_the_encoders_write() {
    for target in TARGETS {
        for (name, bytes) in (target.seeds)() {
            let path = folder(target).join(name);
            assert!(bytes.len() <= target.max_bytes, "{} is longer than is tried", path.display());
            if std::env::var_os("LONGHAUL_FUZZ_WRITE").is_some() {
                std::fs::create_dir_all(folder(target)).expect("the corpus can be written");
                std::fs::write(&path, &bytes).expect("the corpus can be written");
            }
            let known = std::fs::read(&path).unwrap_or_default();
            assert!(known == bytes, "{} is not what the encoder writes", path.display());
        }
    }
}

#[test]
fn the_corpus_stays_small() {
    let files: Vec<_> = TARGETS.iter().flat_map(files).collect();
    let bytes: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    assert!(files.len() <= 100 && bytes <= 256 << 10, "{} files, {bytes} bytes", files.len());
}

/// A seed that fails early proves nothing.
#[test]
fn each_row_among_the_seeds_of_the_journal_can_be_read() {
    for (name, bytes) in longhaul_fuzz::journal::seeds() {
        assert!(longhaul_fuzz::journal::reads(&bytes), "{name}");
    }
}

#[test]
fn each_seed_of_what_crosses_the_wan_reaches_what_it_is_for() {
    let seeds: BTreeMap<_, _> = wan::seeds().into_iter().collect();
    let seen = |name: &str| wan::play(&seeds[name]);
    let whole = seen("whole");
    assert!(whole.proven && whole.made_bytes > 2 * 4096 && whole.wanted_pages == 0, "{whole:?}");
    let unproven = seen("unproven");
    assert!(!unproven.proven && unproven.made_bytes == whole.made_bytes);
    assert!(matches!(unproven.error, Some(DecodeError::NotProven { .. })), "{unproven:?}");
    let on_disk = seen("on_disk");
    assert!(on_disk.proven && on_disk.wanted_pages == 1, "{on_disk:?}");
    let based = seen("based");
    assert!(based.proven && based.made_bytes == whole.made_bytes, "{based:?}");
    let copied = seen("copied");
    assert!(copied.error.is_none() && copied.made_bytes == 8 + 1 + 6 + 4096, "{copied:?}");
    for name in ["based", "copied"] {
        let mut unbased = seeds[name].clone();
        unbased[0] = 0;
        let seen = wan::play(&unbased);
        assert!(
            matches!(seen.error, Some(DecodeError::OtherBase)) && seen.made_bytes == 0,
            "{name}: {seen:?}"
        );
    }
}

/// An input that was altered comes further than to its first proof: to the end, where nothing but the proof was altered.
#[test]
fn a_batch_with_a_wrong_proof_is_given_the_right_one() {
    let seeds: BTreeMap<_, _> = wan::seeds().into_iter().collect();
    let mut altered = seeds["whole"].clone();
    // Behind the choice, the chunk's length, the frame of what is remembered, and most of the batch's header.
    altered[1 + 2 + 38 + 14] ^= 1;
    let seen = wan::play(&altered);
    assert!(seen.proven && seen.error.is_none(), "{seen:?}");
}

/// A decoder once took no chunk behind an error that had left something of its chunk.
#[test]
fn a_chunk_behind_an_error_is_among_the_files_of_the_corpus() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/wan/after-an-error");
    let seen = wan::play(&std::fs::read(path).expect("a file of the corpus"));
    assert!(matches!(seen.error, Some(DecodeError::Truncated)) && seen.late_chunks > 0, "{seen:?}");
}

#[test]
fn each_seed_of_a_disks_map_reaches_what_it_is_for() {
    let seeds: BTreeMap<_, _> = map::seeds().into_iter().collect();
    let seen = |name: &str| map::play(&seeds[name]);
    for (name, same_bytes, zero_bytes) in [
        ("whole", BLOCK + 15 * 4096 + 5000, BLOCK),
        ("beside", BLOCK, 0),
        ("incomplete", BLOCK, BLOCK),
        ("new", 0, 0),
    ] {
        let seen = seen(name);
        let told = (seen.refused, seen.same_bytes, seen.zero_bytes);
        assert_eq!(told, (false, same_bytes, zero_bytes), "{name}: {seen:?}");
    }
}

#[test]
fn each_seed_of_kept_memory_reaches_what_it_is_for() {
    let seeds: BTreeMap<_, _> = kept::seeds().into_iter().collect();
    let read = |name: &str| kept::read(&seeds[name]);
    assert_eq!(read("whole").expect("it is whole").pages().count(), 2);
    for (name, why) in [
        ("too-many", ErrorKind::FileTooLarge),
        ("cut", ErrorKind::UnexpectedEof),
        ("damaged", ErrorKind::InvalidData),
        ("another", ErrorKind::InvalidData),
    ] {
        assert_eq!(read(name).err().map(|error| error.kind()), Some(why), "{name}");
    }
}

#[test]
fn each_target_has_a_binary_of_its_name() {
    for target in TARGETS {
        let binary =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz_targets").join(format!("{}.rs", target.name));
        assert!(binary.exists(), "{}", binary.display());
    }
}
