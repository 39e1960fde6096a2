//! Two processes on one SQLite file, of which one is killed (`SIGKILL`).

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use reqwest::Client;
use tempfile::TempDir;

const LEASE: Duration = Duration::from_millis(1_200);

/// What processes share.
struct Machine {
    directory: TempDir,
    client: Client,
    sealed: bool,
}

impl Machine {
    fn new() -> Self {
        let client = Client::builder().no_proxy().build().expect("a client");
        Self { directory: tempfile::tempdir().expect("a directory"), client, sealed: false }
    }

    /// Everything that is on the disk of its database: the file, its log, its index.
    fn dump(&self) -> Vec<u8> {
        let files = fs::read_dir(self.directory.path()).expect("a directory").map(|file| {
            let file = file.expect("a file").path();
            let name = file.file_name().expect("a name").to_string_lossy().into_owned();
            let bytes = fs::read(&file);
            if name.starts_with("idem.db") { bytes.expect("its bytes") } else { Vec::new() }
        });
        files.flatten().collect()
    }

    fn effects_file(&self) -> PathBuf {
        self.directory.path().join("effects")
    }

    fn start(&self) -> Till {
        let mut child = Command::new(env!("CARGO_BIN_EXE_till"))
            .arg(self.directory.path().join("idem.db"))
            .arg(self.effects_file())
            .arg(LEASE.as_millis().to_string())
            .args(self.sealed.then_some("sealed"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let said = BufReader::new(child.stdout.take().expect("its output"));
        let mut till = Till { child, said, client: self.client.clone(), address: String::new() };
        till.address = till.listen();
        till
    }

    /// Operation id, attempt and body of each effect.
    fn effects(&self) -> Vec<(String, u32, String)> {
        let file = fs::read_to_string(self.effects_file()).unwrap_or_default();
        let parsed = file.lines().map(|line| {
            let mut words = line.splitn(3, ' ');
            let mut word = || words.next().expect("three words").to_owned();
            (word(), word().parse().expect("an attempt"), word())
        });
        parsed.collect()
    }
}

/// A process; it is killed when it is dropped.
struct Till {
    child: Child,
    said: BufReader<ChildStdout>,
    client: Client,
    address: String,
}

/// A whole answer; `None` if the process did not live to give it.
type Answer = Option<(u16, String, bool)>;

impl Till {
    /// The next line that it prints.
    fn listen(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }

    fn kill(&mut self) {
        self.child.kill().expect("a living process");
        self.child.wait().expect("its end");
    }

    fn pay(&self, key: &str, body: &str) -> impl Future<Output = Answer> + Send + use<> {
        self.pay_at("/pay", key, body)
    }

    fn pay_at(
        &self,
        route: &str,
        key: &str,
        body: &str,
    ) -> impl Future<Output = Answer> + Send + use<> {
        let request = self.client.post(format!("http://{}{route}", self.address));
        let request = request
            .header("x-api-key", "a")
            .header("idempotency-key", key.to_owned())
            .header("content-type", "text/plain")
            .body(body.to_owned());
        async move {
            let response = request.send().await.ok()?;
            let status = response.status().as_u16();
            let replayed = response.headers().contains_key("idempotent-replayed");
            Some((status, response.text().await.ok()?, replayed))
        }
    }
}

impl Drop for Till {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_in_flight(answer: &Answer) -> bool {
    matches!(answer, Some((409, text, _)) if text.contains("\"in_flight\""))
}

/// Kills a process while its handler stands where `body` says, and has another one asked until it
/// answers; says what it answered, and what it answers the next time.
async fn killed_in_the_handler(machine: &Machine, route: &str, body: &str) -> [Answer; 2] {
    let (mut first, second) = (machine.start(), machine.start());
    let calling = tokio::spawn(first.pay_at(route, "k", body));
    assert_eq!(first.listen(), "stopped");
    // Long enough for the claim to have been renewed: it is the owner's as long as it lives.
    let start = Instant::now();
    while start.elapsed() < LEASE * 3 / 2 {
        assert!(is_in_flight(&second.pay_at(route, "k", body).await));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    first.kill();
    let killed = Instant::now();
    assert_eq!(calling.await.expect("no panic"), None);
    let answer = loop {
        let answer = second.pay_at(route, "k", body).await;
        if !is_in_flight(&answer) {
            break answer;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    // It was last renewed at most a third of a lease before.
    let waited = killed.elapsed();
    assert!(waited > LEASE / 2, "run after {waited:?}, within the lease");
    assert!(waited < LEASE + Duration::from_secs(3), "free only after {waited:?}");
    [answer, second.pay_at(route, "k", body).await]
}

/// The first of two answers, of which the second is its replay.
fn replayed([answer, replay]: [Answer; 2]) -> (u16, String, bool) {
    let (answer, replay) = (answer.expect("an answer"), replay.expect("an answer"));
    assert_eq!((&replay.1, replay.2), (&answer.1, true));
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_killed_before_the_effect_is_replaced_after_its_lease_and_the_effect_happens_once()
 {
    let machine = Machine::new();
    let killed = killed_in_the_handler(&machine, "/pay", "stop before").await;
    let (status, text, is_replay) = replayed(killed);
    assert_eq!((status, is_replay), (201, false));
    let effects = machine.effects();
    assert_eq!(effects.len(), 1);
    assert_eq!(text, format!("attempt 2 of {}", effects[0].0));
}

/// What idem cannot prevent: it hands the handler the same operation id, so that whatever the
/// effect is made with can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_killed_between_effect_and_record_is_rerun_as_the_same_operation() {
    let machine = Machine::new();
    let killed = killed_in_the_handler(&machine, "/pay", "stop after").await;
    let (status, text, is_replay) = replayed(killed);
    assert_eq!((status, is_replay), (201, false));
    let effects = machine.effects();
    assert_eq!(effects.iter().map(|(_, attempt, _)| *attempt).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(effects[0].0, effects[1].0, "one operation");
    assert_eq!(text, format!("attempt 2 of {}", effects[0].0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_refuse_a_killed_process_leaves_an_unknown_outcome_and_no_second_effect() {
    for (body, effects) in [("stop before", 0), ("stop after", 1)] {
        let machine = Machine::new();
        for answer in killed_in_the_handler(&machine, "/pay-or-refuse", body).await {
            let (status, text, is_replay) = answer.expect("an answer");
            assert_eq!((status, is_replay), (409, false), "{body}: {text}");
            assert!(text.contains("\"unknown_outcome\""), "{body}: {text}");
        }
        assert_eq!(machine.effects().len(), effects, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_recover_a_killed_process_leaves_exactly_one_effect() {
    let machine = Machine::new();
    let killed = killed_in_the_handler(&machine, "/pay-or-recover", "stop before").await;
    let (_, text, is_replay) = replayed(killed);
    let effects = machine.effects();
    assert_eq!((effects.len(), is_replay), (1, false));
    assert_eq!(text, format!("attempt 2 of {}", effects[0].0), "it never happened, so it ran");

    let machine = Machine::new();
    let killed = killed_in_the_handler(&machine, "/pay-or-recover", "stop after").await;
    let (status, text, is_replay) = replayed(killed);
    let effects = machine.effects();
    assert_eq!((effects.len(), status, is_replay), (1, 201, true));
    assert_eq!(text, format!("recovered {}", effects[0].0), "it happened, and this was its answer");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_is_taken_once_by_a_process_that_is_killed_and_its_successor_sealed_or_not() {
    for sealed in [false, true] {
        let machine = Machine { sealed, ..Machine::new() };
        let killed = killed_in_the_handler(&machine, "/pay-in-steps", "stop after").await;
        let answer = replayed(killed);
        assert_eq!(answer, (201, "receipt of attempt 1".to_owned(), false), "sealed: {sealed}");
        assert_eq!(machine.effects().len(), 1, "sealed: {sealed}");
        let dump = machine.dump();
        let holds = |text: &[u8]| dump.windows(text.len()).any(|window| window == text);
        assert!(holds(b"POST /pay-in-steps"), "the dump is not all there");
        assert_eq!(holds(b"receipt of attempt"), !sealed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_killed_after_the_record_is_replayed_under_every_policy() {
    for route in ["/pay", "/pay-or-refuse", "/pay-or-recover"] {
        let machine = Machine::new();
        let (mut first, second) = (machine.start(), machine.start());
        let answer = first.pay_at(route, "k", "go on").await.expect("an answer");
        first.kill();
        let replay = second.pay_at(route, "k", "go on").await.expect("an answer");
        assert_eq!(replay, (answer.0, answer.1, true), "{route}");
        assert_eq!(machine.effects().len(), 1, "{route}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_got_an_answer_gets_it_again_from_another_process_after_a_kill() {
    let machine = Machine::new();
    let second = machine.start();
    let mut answered = 0;
    // Killed while many requests are in all their stages.
    for round in 0..6 {
        let mut first = machine.start();
        let keys: Vec<_> = (0..40).map(|key| format!("{round}-{key}")).collect();
        let calls: Vec<_> = keys.iter().map(|key| tokio::spawn(first.pay(key, key))).collect();
        tokio::time::sleep(Duration::from_millis(3 + round * 6)).await;
        first.kill();
        for (key, call) in keys.iter().zip(calls) {
            let Some((201, text, false)) = call.await.expect("no panic") else { continue };
            answered += 1;
            let replay = second.pay(key, key).await.expect("an answer");
            assert_eq!(replay, (201, text, true), "{key}");
        }
        // The others run once more at the most, as the same operation.
        tokio::time::sleep(LEASE / 6).await;
    }
    assert!(answered > 0, "it never lived long enough to answer");
    tokio::time::sleep(LEASE).await;
    for round in 0..6 {
        for key in 0..40 {
            let key = format!("{round}-{key}");
            assert_eq!(second.pay(&key, &key).await.expect("an answer").0, 201, "{key}");
        }
    }
    let mut operations: HashMap<String, Vec<(String, u32)>> = HashMap::new();
    for (id, attempt, key) in machine.effects() {
        operations.entry(key).or_default().push((id, attempt));
    }
    assert_eq!(operations.len(), 240);
    for (key, effects) in operations {
        let ids: HashSet<_> = effects.iter().map(|(id, _)| id).collect();
        assert_eq!(ids.len(), 1, "{key}: {effects:?}");
        assert!(effects.len() <= 2, "{key}: {effects:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_processes_that_are_asked_at_once_have_one_effect_a_key() {
    const KEYS: usize = 40;
    let machine = Machine::new();
    let tills = [machine.start(), machine.start()];
    let mut calls = Vec::new();
    for call in 0..KEYS * 8 {
        let key = format!("k{}", call / 8);
        calls.push((key.clone(), tokio::spawn(tills[call % 2].pay(&key, &key))));
    }
    let mut answers: HashMap<String, HashSet<String>> = HashMap::new();
    for (key, call) in calls {
        let answer = call.await.expect("no panic");
        if !is_in_flight(&answer) {
            let (status, text, _) = answer.expect("an answer");
            assert_eq!(status, 201, "{key}: {text}");
            answers.entry(key).or_default().insert(text);
        }
    }
    assert_eq!(answers.len(), KEYS);
    assert!(answers.values().all(|texts| texts.len() == 1), "{answers:?}");
    let effects = machine.effects();
    assert_eq!(effects.len(), KEYS);
    assert!(effects.iter().all(|(_, attempt, _)| *attempt == 1));
}
