//! Every file of the corpus goes through its target, and the seeds are what today's encoders write.

use std::path::{Path, PathBuf};

use longhaul_fuzz::{TARGETS, Target};

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
fn each_target_has_a_binary_of_its_name() {
    for target in TARGETS {
        let binary =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz_targets").join(format!("{}.rs", target.name));
        assert!(binary.exists(), "{}", binary.display());
    }
}
