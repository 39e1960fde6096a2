//! What a million records take in memory, what claims and replays take among them, and for how long
//! expiry holds anybody up. See README.md.

use std::{
    collections::{BTreeMap, HashMap},
    env,
    error::Error,
    hash::{BuildHasher, RandomState},
    ops::Range,
    pin::Pin,
    process::{Command, ExitCode},
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bench::{
    keys,
    processes::resident,
    report::{
        At, Goal, Report,
        figure::{BYTES, LONGEST, NANOSECONDS},
    },
    statistics::Bound,
};
use bytes::Bytes;
use idem_runtime::{
    FORMAT, Fingerprint, Flags, Key, OnUnknown, OperationId, RecordedResponse, ScopeDigest, Token,
    Ttl,
    store::{Claim, Claimed, Clock, Completion, ManualClock, MemoryStore, Store, Written},
};
use rustix::time::{ClockId, clock_gettime};

type Failure = Box<dyn Error>;
type Result<T> = std::result::Result<T, Failure>;

/// How long a record is kept; of every second one, twice as long.
const TTL: Duration = Duration::from_secs(3600);
/// How many records the engine's keeper sweeps in one call.
const SWEEP: usize = 1_000;

const OPERATION: &str = "POST /orders";
const SCHEME: &str = "request/1";

fn answer() -> Bytes {
    let headers: [(&[u8], &[u8]); 2] =
        [(b"content-type", b"application/json"), (b"content-length", b"300")];
    RecordedResponse::encode(201, &headers, &[b'x'; 300])
}

/// What a record is in bytes: its fields as they are in any store, one after the other.
fn encoded() -> usize {
    let (key, scope, fingerprint, operation_id, token) = (32, 32, 32, 16, 16);
    let (times, attempt, format, flags, state) = (4 * 8, 4, 2, 2, 1);
    let fixed = key + scope + fingerprint + operation_id + token;
    let small = times + attempt + format + flags + state;
    fixed + small + OPERATION.len() + SCHEME.len() + answer().len()
}

/// A place where answers are kept by their keys. Calls are prepared before they are timed.
trait Subject: Sync {
    /// Claims keys and records an answer to each. Of every second one the record is kept longer.
    fn first(&self, keys: &[[u8; 32]], answer: &Bytes) -> Duration;

    /// Asks for keys whose answers are there.
    fn replay(&self, keys: &[[u8; 32]], answer: &Bytes) -> Duration;

    /// How many bytes it says that it takes.
    fn counted(&self) -> Option<usize> {
        None
    }
}

/// How many calls are prepared at a time.
const BATCH: u32 = 500;

struct Idem {
    store: MemoryStore,
    clock: ManualClock,
    operation: Arc<str>,
}

impl Idem {
    fn new(records: usize) -> Self {
        let clock = Clock::manual();
        let builder = MemoryStore::builder().max_records(2 * records).max_bytes(usize::MAX);
        Self { store: builder.clock(clock.clone()).build(), clock, operation: OPERATION.into() }
    }

    fn claim(&self, key: [u8; 32], ttl: Duration) -> Claim {
        Claim {
            key: Key::from_bytes(key),
            scope: ScopeDigest::from_bytes([1; 32]),
            operation: Arc::clone(&self.operation),
            operation_id: OperationId::random(),
            fingerprint: Fingerprint { scheme: SCHEME.into(), digest: [2; 32] },
            token: Token::random(),
            lease: Duration::from_secs(30),
            ttl: Ttl::For(ttl),
            issued_only: false,
            on_unknown: OnUnknown::Rerun,
            format: FORMAT,
        }
    }
}

impl Subject for Idem {
    fn first(&self, keys: &[[u8; 32]], answer: &Bytes) -> Duration {
        let ttls = [TTL, 2 * TTL].into_iter().cycle();
        let claims: Vec<_> =
            keys.iter().zip(ttls).map(|(key, ttl)| self.claim(*key, ttl)).collect();
        let completion = |claim: &Claim| Completion {
            key: claim.key,
            token: claim.token,
            ttl: claim.ttl,
            flags: Flags::NONE,
            // The engine has a buffer of its own for each.
            payload: Bytes::copy_from_slice(answer),
            format: FORMAT,
        };
        let completions: Vec<_> = claims.iter().map(completion).collect();
        timed(|| {
            for (claim, completion) in claims.iter().zip(&completions) {
                let claimed = now(self.store.claim(claim));
                assert!(matches!(claimed, Ok(Claimed::Granted(_))), "{claimed:?}");
                // The answer comes later than the claim, so that its end moves.
                self.clock.advance(Duration::from_millis(1));
                assert!(matches!(now(self.store.complete(completion)), Ok(Written::Done)));
            }
        })
    }

    fn replay(&self, keys: &[[u8; 32]], answer: &Bytes) -> Duration {
        let claims: Vec<_> = keys.iter().map(|key| self.claim(*key, TTL)).collect();
        timed(|| {
            for claim in &claims {
                match now(self.store.claim(claim)) {
                    Ok(Claimed::Found(record)) => assert_eq!(record.payload.len(), answer.len()),
                    claimed => panic!("{claimed:?}"),
                }
            }
        })
    }

    fn counted(&self) -> Option<usize> {
        let shown = format!("{:?}", self.store);
        let (_, bytes) = shown.split_once("bytes: ")?;
        bytes.split(',').next()?.parse().ok()
    }
}

/// What one would write: maps behind locks, without tokens, leases, bounds and expiry.
struct ByHand(Vec<Mutex<HashMap<[u8; 32], Held>>>, RandomState);

struct Held {
    fingerprint: [u8; 32],
    answer: Option<Bytes>,
}

impl ByHand {
    fn new() -> Self {
        Self((0..64).map(|_| Mutex::default()).collect(), RandomState::new())
    }

    fn with<T>(&self, key: &[u8; 32], act: impl FnOnce(&mut HashMap<[u8; 32], Held>) -> T) -> T {
        let shard = &self.0[self.1.hash_one(key) as usize % self.0.len()];
        act(&mut shard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Subject for ByHand {
    fn first(&self, keys: &[[u8; 32]], answer: &Bytes) -> Duration {
        let answers: Vec<_> = keys.iter().map(|_| Bytes::copy_from_slice(answer)).collect();
        timed(|| {
            for (key, answer) in keys.iter().zip(answers) {
                let held = Held { fingerprint: [2; 32], answer: None };
                assert!(self.with(key, |map| map.insert(*key, held)).is_none());
                let before = self.with(key, |map| map.get_mut(key)?.answer.replace(answer));
                assert!(before.is_none());
            }
        })
    }

    fn replay(&self, keys: &[[u8; 32]], answer: &Bytes) -> Duration {
        timed(|| {
            for key in keys {
                let found = self.with(key, |map| {
                    let held = map.get(key)?;
                    held.answer.clone().filter(|_| held.fingerprint == [2; 32])
                });
                assert_eq!(found.map(|found| found.len()), Some(answer.len()));
            }
        })
    }
}

/// A store in memory answers at once.
fn now<T>(mut future: BoxFuture<'_, T>) -> T {
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => answer,
        Poll::Pending => panic!("it waits"),
    }
}

type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The CPU time of this thread.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

/// The CPU time that something takes this thread.
fn timed(act: impl FnOnce()) -> Duration {
    let since = cpu();
    act();
    cpu() - since
}

/// Does something so often in each of some threads, in batches; how many nanoseconds once takes one
/// of them.
fn each(threads: u32, times: u32, act: impl Fn(u32, Range<u32>) -> Duration + Sync) -> f64 {
    let act = &act;
    let used: Duration = std::thread::scope(|scope| {
        let batches = || (0..times).step_by(BATCH as usize);
        let threads = (0..threads).map(|thread| {
            let batch = move |from| act(thread, from..times.min(from + BATCH));
            scope.spawn(move || batches().map(batch).sum::<Duration>())
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).sum()
    });
    used.as_nanos() as f64 / f64::from(threads) / f64::from(times)
}

/// By what was done, and the figure's name.
type Figures = Vec<(String, String, f64)>;

fn figure(phase: &str, name: &str, figure: f64) -> (String, String, f64) {
    (phase.to_owned(), name.to_owned(), figure)
}

const FILLING: &str = "filling";
const FIRST: &str = "claim and completion";
const REPLAY: &str = "replay";
const EXPIRY: &str = "claim and completion while records expire";
const SWEEPING: &str = "sweep, a record";
const IDLE: &str = "sweep of nothing";

/// The keys of one thread in a burst.
fn keys_of(burst: u32, thread: u32, numbers: impl Iterator<Item = u32>) -> Vec<[u8; 32]> {
    numbers.map(|number| keys::key(burst, thread as usize, number)).collect()
}

/// Fills a subject and asks it, in a process of its own.
fn fill(subject: &dyn Subject, records: u32, threads: u32) -> Figures {
    let (answer, share) = (answer(), records / threads);
    let first = |burst| {
        let answer = &answer;
        move |thread, numbers| subject.first(&keys_of(burst, thread, numbers), answer)
    };
    let process = std::process::id();
    let before = resident(process);
    let filling = each(threads, share, first(0));
    let bytes = (resident(process) - before) as f64 / f64::from(records);
    let times = (share / 10).max(2_000);
    let claims = each(threads, times, first(1));
    let replays = each(threads, times, |thread, numbers: Range<u32>| {
        // In another order than they came in.
        let known = |number| (u64::from(number) * 7_919 % u64::from(share)) as u32;
        subject.replay(&keys_of(0, thread, numbers.map(known)), &answer)
    });
    vec![
        figure(FILLING, NANOSECONDS, filling),
        figure(FILLING, BYTES, bytes),
        figure(FIRST, NANOSECONDS, claims),
        figure(REPLAY, NANOSECONDS, replays),
    ]
}

/// Lets all records of a store expire: every second one while claims arrive, the others while it is
/// swept.
fn expire(idem: &Idem, records: u32) -> Result<Figures> {
    let answer = answer();
    each(1, records, |_, numbers| idem.first(&keys_of(0, 0, numbers), &answer));
    let before = idem.counted().ok_or("it does not say what it takes")?;
    idem.clock.advance(TTL + Duration::from_secs(u64::from(records)));
    let claims =
        (0..records / 4).map(|number| idem.first(&keys_of(1, 0, number..number + 1), &answer));
    let longest_claim = claims.max().unwrap_or_default();
    if idem.counted().is_none_or(|now| now >= before) {
        return Err("claims make no room".into());
    }

    idem.clock.advance(3 * TTL);
    let (mut longest, mut used, mut swept) = (Duration::ZERO, Duration::ZERO, 0);
    loop {
        let mut sweep = idem.store.sweep(SWEEP);
        // What holds others up is one turn of it.
        let removed = loop {
            let mut turn = Poll::Pending;
            let took = timed(|| {
                turn = sweep.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            });
            (longest, used) = (longest.max(took), used + took);
            if let Poll::Ready(removed) = turn {
                break removed?;
            }
        };
        swept += removed;
        if removed < SWEEP {
            break;
        }
    }
    if idem.counted() != Some(0) {
        return Err("not all have expired".into());
    }
    let idle = timed(|| {
        (0..100).for_each(|_| assert_eq!(now(idem.store.sweep(SWEEP)).ok(), Some(0)));
    });
    Ok(vec![
        figure(EXPIRY, LONGEST, micros(longest_claim)),
        figure(SWEEPING, NANOSECONDS, used.as_nanos() as f64 / swept as f64),
        figure(SWEEPING, LONGEST, micros(longest)),
        figure(IDLE, NANOSECONDS, idle.as_nanos() as f64 / 100.0),
    ])
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}

/// What is measured in one process: whose, among how many records, by how many threads.
const MEASURED: [(&str, u32, u32); 7] = [
    (MEMORY, 10_000, 1),
    (BY_HAND, 10_000, 1),
    (MEMORY, MILLION, 1),
    (BY_HAND, MILLION, 1),
    (MEMORY, MILLION, 2),
    (BY_HAND, MILLION, 2),
    (EXPIRING, MILLION, 1),
];

const MEMORY: &str = "memory";
const BY_HAND: &str = "memory by hand";
/// The memory store, when its records end.
const EXPIRING: &str = "memory, expiring";
/// What the record is, wherever it is.
const FIELDS: &str = "the record's fields";
const MILLION: u32 = 1_000_000;

fn measure(what: &str, records: u32, threads: u32) -> Result<Figures> {
    let idem = || Idem::new(records as usize);
    match what {
        MEMORY => Ok(fill(&idem(), records, threads)),
        BY_HAND => Ok(fill(&ByHand::new(), records, threads)),
        EXPIRING => expire(&idem(), records),
        _ => Err("there is no such measurement".into()),
    }
}

fn at(what: &str, phase: &str, records: u32, threads: u32) -> At {
    At { records: Some(records.into()), ..At::new(what, phase, threads.into()) }
}

/// Measures everything so often, and says what was found.
fn report(rounds: usize) -> Result<()> {
    let title = "The memory store alone: bytes, claims, replays and expiry";
    let mut report = Report::new("memory", title, "bench/run memory");
    let mut order = MEASURED;
    let fields = at(FIELDS, FILLING, MILLION, 1);
    for _ in 0..rounds {
        for (what, records, threads) in order {
            let run = Command::new(env::current_exe()?)
                .args(["one", what, &records.to_string(), &threads.to_string()])
                .output()?;
            if !run.status.success() {
                return Err(String::from_utf8_lossy(&run.stderr).into_owned().into());
            }
            let mut found: BTreeMap<String, Vec<(&str, f64)>> = BTreeMap::new();
            for (phase, name, figure) in serde_json::from_slice::<Figures>(&run.stdout)? {
                let names = [NANOSECONDS, LONGEST, BYTES];
                let name = names.into_iter().find(|known| *known == name).ok_or(name)?;
                found.entry(phase).or_default().push((name, figure));
            }
            for (phase, figures) in found {
                report.add(&at(what, &phase, records, threads), figures);
            }
        }
        report.add(&fields, [(BYTES, encoded() as f64)]);
        order.reverse();
    }
    for (records, threads) in [(10_000, 1), (MILLION, 1), (MILLION, 2)] {
        for phase in [FILLING, FIRST, REPLAY] {
            let [idem, by_hand] = [MEMORY, BY_HAND].map(|what| at(what, phase, records, threads));
            report.compare(&idem, NANOSECONDS, &by_hand);
        }
    }
    let goal = |what: &str, of: At, figure, reference, at_most| Goal {
        what: what.to_owned(),
        of,
        figure,
        reference,
        bound: Bound::AtMost(at_most),
    };
    let at_a_million = |what, phase| at(what, phase, MILLION, 1);
    let filled = at_a_million(MEMORY, FILLING);
    report.judge(goal(
        "memory store, bytes ÷ the record's fields",
        filled,
        BYTES,
        Some(fields),
        1.25,
    ));
    let claims = at_a_million(MEMORY, FIRST);
    report.judge(goal("memory store, claim and completion, ns", claims, NANOSECONDS, None, 300.0));
    for (what, phase) in [("claims", EXPIRY), ("sweeps", SWEEPING)] {
        let what = format!("memory store, longest pause from expiry in {what}, µs");
        report.judge(goal(&what, at_a_million(EXPIRING, phase), LONGEST, None, 500.0));
    }
    println!("{}", report.tables());
    for file in report.write(&[])? {
        println!("{}", file.display());
    }
    Ok(())
}

fn main() -> ExitCode {
    let words: Vec<_> = env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["one", what, records, threads] => one(what, records, threads),
        [] => report(20),
        ["--rounds", rounds] => rounds.parse().map_err(Failure::from).and_then(report),
        _ => Err("only --rounds can be said".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn one(what: &str, records: &str, threads: &str) -> Result<()> {
    let figures = measure(what, records.parse()?, threads.parse()?)?;
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}
