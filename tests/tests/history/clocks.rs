//! Application hosts whose clocks are five seconds apart.
//!
//! A store on a server goes by the server's clock, whoever asks: neither the store nor the engine
//! reads the machine's, which is why the clocks of two applications cannot matter. That is looked up
//! in their sources, since a test cannot set the clock of the machine it runs on. SQLite goes by the
//! machine's clock; here two stores on one file go by clocks that differ.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use idem_runtime::{
    FORMAT, Fingerprint, Flags, Key, OnUnknown, OperationId, Record, ScopeDigest, State, Token,
    Ttl,
    store::{Claim, Claimed, Clock, Completion, ManualClock, Renewal, SqliteStore, Store, Written},
};
use tempfile::TempDir;

const APART: Duration = Duration::from_secs(5);
const TTL: Duration = Duration::from_secs(60);

/// The code lines of a source file or of all files in a directory that name the machine's clock.
fn lines_with_a_clock(place: &Path) -> Vec<String> {
    if place.is_dir() {
        let entries = fs::read_dir(place).expect("a directory").map(|entry| entry.expect("it"));
        return entries.flat_map(|entry| lines_with_a_clock(&entry.path())).collect();
    }
    let source = fs::read_to_string(place).expect("a source file");
    let clocks = ["SystemTime", "UNIX_EPOCH", "chrono", "Clock::system"];
    let reads = |line: &&str| {
        !line.trim_start().starts_with("//") && clocks.iter().any(|clock| line.contains(clock))
    };
    source.lines().filter(reads).map(|line| format!("{}: {line}", place.display())).collect()
}

#[test]
fn what_shares_a_server_reads_no_clock_of_the_machine() {
    let sources = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../idem-runtime/src"));
    let files = ["engine.rs", "leases.rs", "waits.rs", "operation.rs", "record.rs", "decision.rs"];
    let stores = ["postgres", "mysql", "redis"];
    let stores = stores.iter().flat_map(|name| [format!("{name}.rs"), (*name).to_owned()]);
    let stores = stores.map(|name| format!("store/{name}"));
    for file in files.map(str::to_owned).into_iter().chain(stores) {
        assert_eq!(lines_with_a_clock(&sources.join(file)), Vec::<String>::new());
    }
    let named = lines_with_a_clock(&sources.join("store/clock.rs"));
    assert!(named.iter().any(|line| line.contains("SystemTime::now")), "it is found: {named:?}");
}

/// Two hosts that share a file, the second of which is ahead.
struct Hosts {
    behind: SqliteStore,
    ahead: SqliteStore,
    clocks: [ManualClock; 2],
    _directory: TempDir,
}

impl Hosts {
    async fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let clocks = [Clock::manual(), Clock::manual()];
        clocks[1].advance(APART);
        let file = directory.path().join("idem.db");
        let open = async |clock: &ManualClock| {
            let store = SqliteStore::open(&file).await.expect("a database");
            store.with_clock(clock.clone())
        };
        let (behind, ahead) = (open(&clocks[0]).await, open(&clocks[1]).await);
        Self { behind, ahead, clocks, _directory: directory }
    }

    fn pass(&self, seconds: f64) {
        self.clocks.iter().for_each(|clock| clock.advance(Duration::from_secs_f64(seconds)));
    }
}

fn claim(key: Key, lease: u64) -> Claim {
    Claim {
        key,
        scope: ScopeDigest::from_bytes([1; 32]),
        operation: "POST /pay".into(),
        operation_id: OperationId::random(),
        fingerprint: Fingerprint::NONE,
        token: Token::random(),
        lease: Duration::from_secs(lease),
        ttl: Ttl::For(TTL),
        issued_only: false,
        on_unknown: OnUnknown::Rerun,
        format: FORMAT,
    }
}

fn completion(claim: &Claim, payload: &'static [u8]) -> Completion {
    let (key, token, ttl) = (claim.key, claim.token, claim.ttl);
    Completion { key, token, ttl, flags: Flags::NONE, payload: payload.into(), format: FORMAT }
}

fn renewal(claim: &Claim) -> Renewal {
    Renewal { key: claim.key, token: claim.token, lease: claim.lease }
}

async fn granted(store: &SqliteStore, claim: &Claim) -> Record {
    match store.claim(claim).await.expect("an answer") {
        Claimed::Granted(record) => record,
        claimed => panic!("it is not granted: {claimed:?}"),
    }
}

async fn in_flight(store: &SqliteStore, claim: &Claim) -> Duration {
    match store.claim(claim).await.expect("an answer") {
        Claimed::Found(record) if record.state == State::Running => record.lease_left,
        claimed => panic!("it is not in flight: {claimed:?}"),
    }
}

/// An engine renews a lease when a third of it has passed: two thirds, less the difference, are
/// what is left at that moment to who is ahead.
#[tokio::test]
async fn in_sqlite_a_lease_that_is_long_enough_and_renewed_holds_on_both_hosts() {
    let (hosts, key) = (Hosts::start().await, Key::from_bytes([7; 32]));
    let owner = claim(key, 9);
    granted(&hosts.behind, &owner).await;
    for _ in 0..10 {
        hosts.pass(3.0);
        let left = in_flight(&hosts.ahead, &claim(key, 9)).await;
        assert_eq!(left, Duration::from_secs(1), "six seconds, less five");
        assert_eq!(in_flight(&hosts.behind, &claim(key, 9)).await, Duration::from_secs(6));
        assert_eq!(hosts.behind.renew(&[renewal(&owner)]).await.expect("an answer"), [true]);
    }
    let written = hosts.behind.complete(&completion(&owner, b"answer")).await;
    assert_eq!(written.expect("an answer"), Written::Done);
}

/// Two handlers may then be at work at once, and still one answer is recorded.
#[tokio::test]
async fn in_sqlite_a_lease_shorter_than_the_difference_is_over_at_once_on_the_host_ahead() {
    let (hosts, key) = (Hosts::start().await, Key::from_bytes([7; 32]));
    let [owner, other] = [4, 4].map(|lease| claim(key, lease));
    granted(&hosts.behind, &owner).await;
    assert_eq!(granted(&hosts.ahead, &other).await.attempt, 2);
    assert_eq!(hosts.behind.renew(&[renewal(&owner)]).await.expect("an answer"), [false]);
    let late = hosts.behind.complete(&completion(&owner, b"of the first")).await;
    assert!(matches!(late.expect("an answer"), Written::Fenced(record) if record.attempt == 2));
    let written = hosts.ahead.complete(&completion(&other, b"of the second")).await;
    assert_eq!(written.expect("an answer"), Written::Done);
    for store in [&hosts.behind, &hosts.ahead] {
        let record = store.read(&key).await.expect("an answer").expect("a record");
        assert_eq!(record.payload, &b"of the second"[..]);
    }
}

/// What the host ahead has claimed, the one behind leaves alone for longer.
#[tokio::test]
async fn in_sqlite_a_crash_of_the_host_ahead_is_noticed_later_by_the_difference() {
    let (hosts, key) = (Hosts::start().await, Key::from_bytes([7; 32]));
    granted(&hosts.ahead, &claim(key, 9)).await;
    hosts.pass(13.0);
    assert_eq!(in_flight(&hosts.behind, &claim(key, 9)).await, Duration::from_secs(1));
    hosts.pass(1.0);
    assert_eq!(granted(&hosts.behind, &claim(key, 9)).await.attempt, 2);
}

#[tokio::test]
async fn in_sqlite_an_answer_is_kept_for_as_much_less_or_more() {
    let (hosts, key) = (Hosts::start().await, Key::from_bytes([7; 32]));
    let owner = claim(key, 30);
    granted(&hosts.behind, &owner).await;
    let written = hosts.behind.complete(&completion(&owner, b"answer")).await;
    assert_eq!(written.expect("an answer"), Written::Done);
    let is_there = async |store: &SqliteStore| store.read(&key).await.expect("an answer").is_some();
    hosts.pass((TTL - APART).as_secs_f64() - 0.001);
    assert!(is_there(&hosts.ahead).await);
    hosts.pass(0.001);
    assert!(!is_there(&hosts.ahead).await, "five seconds early");
    assert!(is_there(&hosts.behind).await);
    hosts.pass(APART.as_secs_f64());
    assert!(!is_there(&hosts.behind).await);
}
