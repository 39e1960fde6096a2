//! A slower disk: this program starts itself once more, with a library preloaded that makes each
//! flush take longer. The servers that it starts inherit that, and SQLite is in the program itself.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt as _,
    process::{Command, ExitCode},
    time::Duration,
};

use crate::subjects::Result;

/// Set in the program that was started so.
const MARK: &str = "BENCH_FLUSHES_ARE_SLOW";

pub(crate) fn is_slow() -> bool {
    env::var_os(MARK).is_some()
}

/// Starts this program again with the same options, and waits for its end.
pub(crate) fn run_again(delay: Duration) -> Result<ExitCode> {
    let directory = tempfile::Builder::new().prefix("idem-bench-").tempdir()?;
    // The servers run under accounts of their own.
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    let (source, library) = (directory.path().join("flush.c"), directory.path().join("flush.so"));
    fs::write(&source, include_str!("slow_flush.c"))?;
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-O2"])
        .arg(format!("-DDELAY={}", delay.as_micros()))
        .arg("-o")
        .args([&library, &source])
        .arg("-ldl")
        .status()?;
    if !compiled.success() {
        return Err("cc does not compile the library that slows flushes".into());
    }
    fs::set_permissions(&library, fs::Permissions::from_mode(0o755))?;
    let ended = Command::new(env::current_exe()?)
        .args(env::args_os().skip(1))
        .env("LD_PRELOAD", &library)
        .env(MARK, "1")
        .status()?;
    Ok(if ended.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
