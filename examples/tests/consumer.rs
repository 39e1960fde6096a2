//! The consumer is killed in the middle of its job, and its message comes back.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};

use tempfile::TempDir;

/// For how long a program may be silent.
const SILENCE: Duration = Duration::from_secs(30);

/// What consumers share.
struct Machine {
    directory: TempDir,
}

impl Machine {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a directory") }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_consumer"));
        command.arg("--directory").arg(self.directory.path());
        command
    }

    fn put(&self, order: &str, amount: u64) {
        let mut put = self.command();
        put.args(["put", "--order", order, "--amount", &amount.to_string()]);
        assert!(put.status().expect("a process").success());
    }

    fn start(&self, switches: &[&str]) -> Consumer {
        let mut child = self
            .command()
            .args(["run", "--visibility-ms", "300", "--lease-ms", "1000"])
            .args(switches)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let stdout = BufReader::new(child.stdout.take().expect("its output"));
        let (send, lines) = channel();
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        Consumer { child, lines }
    }

    /// All that a consumer says until the queue is empty.
    fn run_until_empty(&self) -> Vec<String> {
        let mut consumer = self.start(&["--until-empty"]);
        let said = consumer.lines.iter().collect();
        assert!(consumer.child.wait().expect("its end").success());
        said
    }

    /// How often something really happened.
    fn effects(&self, effect: &str) -> usize {
        let ledger = fs::read_to_string(self.directory.path().join("ledger")).expect("a ledger");
        ledger.lines().filter(|line| line.contains(&format!("\"effect\":\"{effect}\""))).count()
    }

    /// How many messages are left, by what has become of them.
    fn messages(&self, extension: &str) -> usize {
        let files = fs::read_dir(self.directory.path().join("queue")).expect("a queue");
        let mut paths = files.map(|file| file.expect("a file").path());
        let of_it =
            paths.by_ref().filter(|path| path.extension().is_some_and(|is| is == extension));
        of_it.count()
    }
}

/// A process; it is killed when it is dropped.
struct Consumer {
    child: Child,
    lines: Receiver<String>,
}

impl Consumer {
    /// Waits for a line.
    fn says(&self, what: &str) {
        while self.lines.recv_timeout(SILENCE).expect("a line that was waited for") != what {}
    }

    /// `SIGKILL`.
    fn kill(mut self) {
        self.child.kill().expect("a living process");
        self.child.wait().expect("its end");
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Kills a consumer at a place; says how often the one after it charged and wrote by itself, and in
/// which attempt it was paid.
fn killed_at(place: &str) -> (usize, usize, String) {
    let machine = Machine::new();
    machine.put("o-1", 100);
    let first = machine.start(&["--stall", place]);
    first.says("stalled");
    first.kill();
    assert_eq!(machine.messages("json"), 1, "{place}: it was not acknowledged");
    let said = machine.run_until_empty();
    let count = |start| said.iter().filter(|line| line.starts_with(start)).count();
    let paid: Vec<_> = said.iter().filter(|line| line.starts_with("paid")).collect();
    assert_eq!(paid.len(), 1, "{place}: {said:?}");
    assert_eq!((machine.effects("charges"), machine.effects("mails")), (1, 1), "{place}: {said:?}");
    assert_eq!(machine.messages("json"), 0, "{place}");
    let attempt = paid[0].rsplit(' ').next().unwrap_or_default().to_owned();
    (count("charging"), count("writing"), attempt)
}

#[test]
fn killed_before_the_effect_the_next_one_does_it_all() {
    assert_eq!(killed_at("before-effect"), (1, 1, "2".to_owned()));
}

/// It asks the bank again, under the same key: there is one charge all the same.
#[test]
fn killed_between_the_effect_and_its_record_the_next_one_asks_again_under_the_same_key() {
    assert_eq!(killed_at("after-effect"), (1, 1, "2".to_owned()));
}

#[test]
fn killed_between_two_steps_the_next_one_takes_the_second() {
    assert_eq!(killed_at("between-steps"), (0, 1, "2".to_owned()));
}

#[test]
fn killed_before_it_acknowledged_the_next_one_finds_it_done() {
    assert_eq!(killed_at("after-record"), (0, 0, "1".to_owned()));
}

#[test]
fn a_message_that_was_sent_twice_happens_once_and_another_one_is_put_aside() {
    let machine = Machine::new();
    for amount in [100, 100, 100, 999] {
        machine.put("o-1", amount);
        thread::sleep(Duration::from_millis(2));
    }
    let said = machine.run_until_empty();
    assert_eq!(said.iter().filter(|line| line.starts_with("paid o-1")).count(), 3, "{said:?}");
    assert_eq!(machine.effects("charges"), 1);
    assert_eq!((machine.messages("json"), machine.messages("aside")), (0, 1), "{said:?}");
}

/// Its time to be hidden is shorter than the job: it comes back while the job goes on.
#[test]
fn a_message_that_comes_back_too_early_waits_for_the_job_that_is_running() {
    let machine = Machine::new();
    machine.put("o-1", 100);
    let first = machine.start(&["--stall", "between-steps"]);
    first.says("stalled");
    let second = machine.start(&["--until-empty"]);
    second.says("later o-1: the same call is running");
    second.says("later o-1: the same call is running");
    assert_eq!((machine.effects("charges"), machine.effects("mails")), (1, 0));
    first.kill();
    let said: Vec<_> = second.lines.iter().collect();
    assert!(said.iter().any(|line| line.ends_with("in attempt 2")), "{said:?}");
    assert_eq!((machine.effects("charges"), machine.effects("mails")), (1, 1));
}
