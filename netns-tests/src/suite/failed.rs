//! What the tests that failed had said, out of the output of `cargo test -- --show-output`: repeated at the very end of a
//! long run, where it is looked for. It judges nothing; whether a run was well is its exit code.

/// Lines of one test that are kept: the last ones, where its panic is.
const KEPT_LINES: usize = 24;

/// Collects, a line at a time.
#[derive(Debug, Default)]
pub struct Failed {
    tests: Vec<Vec<String>>,
    within: Within,
    between_frames: bool,
}

/// The part of a test program's output that is being read.
///
/// `Elsewhere --"failures:"--> Failures --"---- NAME stdout ----"--> Test --"failures:" or "test result:"--> Elsewhere`
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Within {
    #[default]
    Elsewhere,
    Failures,
    Test,
}

impl Failed {
    /// The next line of the output.
    pub fn read(&mut self, line: &str) {
        match (self.within, line) {
            (Within::Elsewhere, "failures:") => self.within = Within::Failures,
            (Within::Elsewhere, _) => {}
            (Within::Failures | Within::Test, line) if line.starts_with("---- ") => {
                self.within = Within::Test;
                self.between_frames = false;
                self.tests.push(vec![line.to_owned()]);
            }
            (Within::Failures, line) if line.starts_with("test result:") => self.within = Within::Elsewhere,
            // The names alone, once more.
            (Within::Failures, _) => {}
            (Within::Test, "failures:") => self.within = Within::Failures,
            (Within::Test, line) => self.keep(line),
        }
    }

    /// All of them, in the order in which they ended.
    pub fn lines(&self) -> impl Iterator<Item = &str> {
        self.tests.iter().flatten().map(String::as_str)
    }

    fn keep(&mut self, line: &str) {
        self.between_frames |= line == "stack backtrace:";
        // Of a backtrace, the places in this project say which of several equal assertions it was.
        let foreign_frame = self.between_frames && !line.trim_start().starts_with("at ./");
        let Some(test) = self.tests.last_mut() else { return };
        if line.is_empty() || foreign_frame {
            return;
        }
        test.push(line.to_owned());
        if test.len() > KEPT_LINES + 1 {
            test.remove(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(output: &str) -> Vec<String> {
        let mut failed = Failed::default();
        output.lines().for_each(|line| failed.read(line));
        failed.lines().map(str::to_owned).collect()
    }

    const OUTPUT: &str = "
running 3 tests
test good ... ok
test bad ... FAILED

successes:

---- good stdout ----
thread 'good' panicked at tests/x.rs:1:1:
as it should

successes:
    good

failures:

---- bad stdout ----
said before

thread 'bad' (12) panicked at tests/x.rs:7:5:
QUIC goes on: not within 20s
stack backtrace:
   0: __rustc::rust_begin_unwind
             at /rustc/5980/library/std/src/panicking.rs:689:5
   2: {async_block#0}
             at ./tests/x.rs:7:5

---- worse stdout ----
no more

failures:
    bad
    worse

test result: FAILED. 1 passed; 2 failed
said later
";

    #[test]
    fn a_failed_tests_words_and_its_own_frames_are_kept_and_no_other_tests() {
        assert_eq!(
            read(OUTPUT),
            [
                "---- bad stdout ----",
                "said before",
                "thread 'bad' (12) panicked at tests/x.rs:7:5:",
                "QUIC goes on: not within 20s",
                "             at ./tests/x.rs:7:5",
                "---- worse stdout ----",
                "no more",
            ]
        );
        assert_eq!(read(&OUTPUT.repeat(2)).len(), 14, "the programs that run after it");
    }

    #[test]
    fn of_much_that_it_said_the_end_is_kept() {
        let said: String = (0..100).map(|line| format!("line {line}\n")).collect();
        let kept = read(&format!("failures:\n---- bad stdout ----\n{said}"));
        assert_eq!((kept.len(), kept[0].as_str()), (KEPT_LINES + 1, "---- bad stdout ----"));
        assert_eq!((kept[1].as_str(), kept[KEPT_LINES].as_str()), ("line 76", "line 99"));
    }
}
