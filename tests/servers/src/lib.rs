//! Real servers for tests and measurements, from the packages of the system, which
//! `tests/install-servers` installs; and proxies that stand before them.
//!
//! Each server runs in a directory of its own, on a free port of loopback, and dies with the
//! process that started it, even if that is killed. The tests of one binary share one server, or
//! start their own to stop, pause and kill it.

#![expect(clippy::expect_used, reason = "what cannot be set up fails whoever needs it")]

pub mod lost_commits;
pub mod mariadb;
pub mod postgres;
pub mod proxy;
pub mod redis;

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

/// How long a server may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server's process, and the shell that watches over it; see `guard.sh`.
#[derive(Debug)]
pub struct Process {
    name: &'static str,
    directory: PathBuf,
    guard: Mutex<Guard>,
}

#[derive(Debug)]
struct Guard {
    child: Child,
    /// The guard's standard input, while this process lives; nobody else has it open.
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    server: u32,
}

/// A signal that ends a server in its own way.
#[derive(Clone, Copy, Debug)]
pub enum Goodbye {
    /// `SIGINT`.
    Interrupt,
    /// `SIGTERM`.
    Terminate,
}

impl Process {
    /// Starts a server.
    ///
    /// `account` is who runs it when the tests are run by root, which most servers refuse to be
    /// run by. `command` is given the server's directory, which exists and belongs to the account;
    /// it must stay one process, so a script ends in `exec`.
    pub fn start<const N: usize>(
        name: &'static str,
        account: &str,
        command: impl FnOnce(&Path) -> [OsString; N],
    ) -> Self {
        let directory = tempfile::Builder::new().prefix(&format!("idem-{name}-")).tempdir();
        // From here on it is the guard's, which is still there when this process no longer is.
        let directory = directory.expect("a directory").keep();
        let mut words: Vec<OsString> = Vec::new();
        if fs::metadata("/proc/self").expect("a process").uid() == 0 {
            let owned = Command::new("chown").arg(account).arg(&directory).status();
            assert!(owned.is_ok_and(|status| status.success()), "no account {account}");
            // It replaces itself by the command, unlike `su` and `runuser`.
            words.push("setpriv".into());
            words.extend(["--reuid", "--regid"].map(|id| format!("{id}={account}").into()));
            words.push("--init-groups".into());
        }
        words.extend(command(&directory));
        let mut guard = Command::new("sh");
        guard.args(["-c", include_str!("guard.sh"), "guard"]);
        guard.arg(&directory).args(words);
        guard.stdin(Stdio::piped()).stdout(Stdio::piped());
        // Out of reach of whoever interrupts the tests from the keyboard.
        let mut child = guard.process_group(0).spawn().expect("a shell");
        let orders = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().expect("its output"));
        let guard = Mutex::new(Guard { child, orders, answers, server: 0 });
        let process = Self { name, directory, guard };
        process.start_again();
        process
    }

    /// Starts the server once more, in the same directory and by the same command.
    pub fn start_again(&self) {
        self.order("start");
    }

    /// The server's directory. It goes away with the server.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The server's process id.
    pub fn pid(&self) -> u32 {
        self.guard.lock().expect("a guard").server
    }

    /// Kills the server and all its processes (`SIGKILL`).
    pub fn kill(&self) {
        self.order("KILL");
        self.wait_until_ended();
    }

    /// Stops time for the server and all its processes (`SIGSTOP`): connections stay open, and
    /// nobody answers.
    pub fn pause(&self) {
        self.order("STOP");
    }

    /// Lets time go on.
    pub fn resume(&self) {
        self.order("CONT");
    }

    /// Has the server end in its own way, and waits until it has.
    pub fn stop(&self, goodbye: Goodbye) {
        self.order(match goodbye {
            Goodbye::Interrupt => "INT",
            Goodbye::Terminate => "TERM",
        });
        self.wait_until_ended();
    }

    /// Waits until the server says that it is ready; `false` if it ended instead.
    pub fn wait_until(&self, mut ready: impl FnMut() -> bool) -> bool {
        let start = Instant::now();
        while !ready() {
            if !self.is_running() {
                return false;
            }
            assert!(start.elapsed() < PATIENCE, "{} does not start: {}", self.name, self.log());
            thread::sleep(Duration::from_millis(10));
        }
        true
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        let log = fs::read(self.directory.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    fn wait_until_ended(&self) {
        let start = Instant::now();
        while self.is_running() {
            assert!(start.elapsed() < PATIENCE, "{} does not stop: {}", self.name, self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn is_running(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()));
        status.is_ok_and(|status| !status.contains("\nState:\tZ"))
    }

    fn order(&self, order: &str) {
        let mut guard = self.guard.lock().expect("a guard");
        let orders = guard.orders.as_mut().expect("a guard that listens");
        writeln!(orders, "{order}").expect("a guard that listens");
        let mut server = String::new();
        guard.answers.read_line(&mut server).expect("a guard that answers");
        guard.server = server.trim().parse().expect("a process id");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(guard) = self.guard.get_mut() {
            drop(guard.orders.take());
            let _ = guard.child.wait();
        }
    }
}

/// A port of loopback that nobody uses.
///
/// Never one that the system may give to an outgoing connection: a client that tries to reach a
/// server which is down would sooner or later be connected to itself.
pub fn free_port() -> u16 {
    let mut ports = std::iter::repeat_with(|| 10_000 + rand::random::<u16>() % 20_000);
    let free = ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    free.expect("a free port")
}

/// A program of a server, in the given directories or on the `PATH`. A test that needs it fails
/// without it, and says what helps.
pub fn program(name: &str, directories: &[PathBuf]) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path: Vec<_> = std::env::split_paths(&path).collect();
    let candidates = directories.iter().chain(&on_path).map(|directory| directory.join(name));
    candidates.into_iter().find(|program| program.is_file()).unwrap_or_else(|| {
        panic!(
            "this test needs the program `{name}`, which is not installed: run \
             `tests/install-servers`"
        )
    })
}

/// The words of a command.
fn words<const N: usize>(words: [&dyn AsRef<OsStr>; N]) -> [OsString; N] {
    words.map(|word| word.as_ref().to_owned())
}
