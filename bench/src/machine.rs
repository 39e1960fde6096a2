//! What was measured, and on what.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde::{Deserialize, Serialize};

/// The machine that a measurement ran on, and the source that it measured.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Machine {
    /// Its processor, as that calls itself.
    pub cpu: String,
    /// How many of these it has.
    pub cores: usize,
    /// In GiB.
    pub memory: u64,
    /// The kernel's release.
    pub kernel: String,
    /// The kind of file system that temporary files, and so the databases, are on.
    pub file_system: String,
    /// The compiler.
    pub rustc: String,
    /// The source's commit, with a `+` where it was changed since.
    pub commit: String,
    /// When it was measured, in UTC.
    pub date: String,
}

impl Machine {
    /// This one, now.
    pub fn here() -> Self {
        let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let memory = memory.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease");
        Self {
            cpu: cpu.map_or_else(unknown, |(_, name)| name.to_owned()),
            cores: cpus.lines().filter(|line| line.starts_with("processor")).count(),
            memory: memory.unwrap_or_default().div_ceil(1 << 20),
            kernel: kernel.map_or_else(|_| unknown(), |kernel| kernel.trim().to_owned()),
            file_system: file_system(&std::env::temp_dir()),
            rustc: output("rustc", &["--version"]),
            commit: commit(),
            date: output("date", &["-u", "+%Y-%m-%d %H:%M"]),
        }
    }

    /// Whether files survive the machine's end where the databases keep theirs.
    pub fn has_a_disk(&self) -> bool {
        self.file_system != "tmpfs"
    }
}

/// Where this package is.
pub fn package() -> PathBuf {
    // Said by cargo; a program that is started without it was built where it is.
    let said = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    said.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into())
}

/// Where the figures are.
pub fn results() -> PathBuf {
    package().join("results")
}

fn unknown() -> String {
    "unknown".to_owned()
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(package()).output();
    let said = output.ok().filter(|output| output.status.success());
    said.map_or_else(unknown, |said| String::from_utf8_lossy(&said.stdout).trim().to_owned())
}

fn commit() -> String {
    let commit = output("git", &["rev-parse", "--short", "HEAD"]);
    // What was measured before, and words, are not what is measured.
    let paths = ["..", ":!results", ":(exclude,top)*.md"];
    let changed = output("git", &[&["status", "--porcelain", "--"], &paths[..]].concat());
    if changed.is_empty() { commit } else { commit + "+" }
}

/// The kind of the file system that a directory is on.
fn file_system(directory: &Path) -> String {
    let directory = fs::canonicalize(directory).unwrap_or_else(|_| directory.to_owned());
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        Some((words.next()?, words.next()?))
    });
    // Of several that are mounted at one place, the last one is seen.
    let kinds: BTreeMap<_, _> = mounts.filter(|(place, _)| directory.starts_with(place)).collect();
    let kind = kinds.into_iter().max_by_key(|(place, _)| place.len());
    kind.map_or_else(unknown, |(_, kind)| kind.to_owned())
}
