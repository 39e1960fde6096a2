//! What processes have used, as the kernel counts it.

use std::{
    collections::HashMap,
    fs,
    ops::Sub,
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, Instant},
};

/// The CPU time of some processes, thread by thread, in nanoseconds.
#[derive(Clone, Debug, Default)]
pub struct CpuTimes(HashMap<u32, u64>);

impl CpuTimes {
    /// What these processes have used until now.
    ///
    /// The kernel brings a thread's time up to date when the thread stops running, and at each of
    /// its ticks.
    pub fn of(pids: &[u32]) -> Self {
        let threads = pids.iter().flat_map(|pid| numbers(&format!("/proc/{pid}/task")));
        let times = threads.filter_map(|thread| {
            let said = fs::read_to_string(format!("/proc/{thread}/schedstat")).ok()?;
            Some((thread, said.split(' ').next()?.parse().ok()?))
        });
        Self(times.collect())
    }
}

/// What was used since; threads that have ended meanwhile do not count.
impl Sub for &CpuTimes {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        let used = self.0.iter().map(|(thread, time)| {
            time.saturating_sub(earlier.0.get(thread).copied().unwrap_or_default())
        });
        Duration::from_nanos(used.sum())
    }
}

/// A process and all that it has started.
pub fn family(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(parent) = all.get(next).copied() {
        for thread in numbers(&format!("/proc/{parent}/task")) {
            let children = fs::read_to_string(format!("/proc/{parent}/task/{thread}/children"));
            let children = children.unwrap_or_default();
            all.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        next += 1;
    }
    all
}

/// How many bytes the disk that a file is on was given to write, by whomever; `None` if it is on
/// none.
///
/// What the kernel counts for each process is whole pieces of its cache, which are up to half a
/// megabyte where a database has changed a page.
pub fn written(file: &Path) -> Option<u64> {
    let device = fs::metadata(file).ok()?.dev();
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff_ff00);
    let said = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    Some(said.split_whitespace().nth(6)?.parse::<u64>().ok()? * SECTOR)
}

/// What disks count in, in bytes.
const SECTOR: u64 = 512;

/// What a process has in memory, in bytes.
pub fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kilobytes.unwrap_or_default() * 1024
}

/// What some processes use while something goes on.
#[derive(Debug)]
pub struct Meter {
    pids: Vec<u32>,
    cpu: CpuTimes,
    since: Instant,
}

impl Meter {
    /// Begins.
    pub fn start(pids: Vec<u32>) -> Self {
        let cpu = CpuTimes::of(&pids);
        Self { pids, cpu, since: Instant::now() }
    }

    /// The CPU time that was used since, and the time that has passed.
    pub fn stop(&self) -> (Duration, Duration) {
        let passed = self.since.elapsed();
        (&CpuTimes::of(&self.pids) - &self.cpu, passed)
    }
}

fn numbers(directory: &str) -> Vec<u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}
