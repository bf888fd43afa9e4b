//! Runs the system's own tools (`ip`, `nft`, `tc`, `apt-get`) and hands back what they printed. No shell, no retries;
//! long-lived processes are started through [`crate::netns::Namespace::spawn`] instead.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// Where administration tools live even when `PATH` of an ordinary user leaves them out.
const ADMIN_FOLDERS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// Runs `program` and returns its standard output. Fails with its standard error when it exits non-zero.
pub fn run(program: &str, arguments: &[&str]) -> Result<String> {
    finish(&mut command(program, arguments), program, arguments)
}

/// Like [`run`], with `input` on the standard input.
pub fn run_with_input(program: &str, arguments: &[&str], input: &str) -> Result<String> {
    let mut child = command(program, arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("Cannot start {program}"))?;
    let mut stdin = child.stdin.take().with_context(|| format!("{program} has no standard input"))?;
    let written = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output().with_context(|| format!("Cannot wait for {program}"))?;
    let text = accept(output, program, arguments).with_context(|| format!("Input was:\n{input}"))?;
    written.with_context(|| format!("{program} did not read its input"))?;
    Ok(text)
}

/// Runs a prepared command to its end; `program` and `arguments` only name it in the error.
pub fn finish(command: &mut Command, program: &str, arguments: &[&str]) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("Cannot start {program}"))?;
    accept(output, program, arguments)
}

/// The full path of a program, looked up in `PATH` and in the folders for administration tools.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(ADMIN_FOLDERS.iter().map(PathBuf::from));
    folders.map(|folder| folder.join(name)).find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

fn command(program: &str, arguments: &[&str]) -> Command {
    let path = find_program(program).unwrap_or_else(|| PathBuf::from(program));
    let mut command = Command::new(path);
    command.args(arguments).env("LC_ALL", "C");
    command
}

fn accept(output: Output, program: &str, arguments: &[&str]) -> Result<String> {
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("`{program} {}` failed ({}): {}", arguments.join(" "), output.status, complaint.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_comes_back_and_failure_carries_the_complaint() {
        assert_eq!(run("echo", &["one"]).unwrap(), "one\n");
        assert_eq!(run_with_input("cat", &[], "two").unwrap(), "two");
        let error = run("ls", &["/no/such/folder"]).unwrap_err().to_string();
        assert!(error.contains("/no/such/folder"), "{error}");
        assert!(run("no-such-program-at-all", &[]).is_err());
    }

    #[test]
    fn programs_are_found_by_name_only_when_executable() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-at-all").is_none());
    }
}
