//! The history of a run: every call of a store and its answer, every run of a handler, every answer
//! to a client, each from its beginning to its end.
//!
//! Events are [recorded](Recorded) where they happen and [checked](check::check) afterwards. What
//! has not ended is as telling as what has: a call that nobody waits for any more may have been
//! made.

pub mod check;

use std::{
    collections::HashSet,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use idem_runtime::{
    Key, Operation, OperationId, Record, State, Token, Ttl,
    store::{
        Checkpoint, Claim, Claimed, Completion, Issue, Manage, Renewal, Store, StoreError,
        StoreErrorKind, Transact, Wake, Written,
    },
};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::time::sleep;

/// What happened in one run, in all its processes. A clone is the same history.
#[derive(Clone, Debug)]
pub struct History(Arc<Events>);

#[derive(Debug)]
struct Events {
    start: Instant,
    events: Mutex<Vec<Event>>,
    effects: AtomicU64,
}

/// Something that began, and has ended or not. Instants count from the history's beginning, by one
/// clock that never goes back.
#[derive(Clone, Debug)]
pub struct Event {
    /// In which process.
    pub process: usize,
    /// When it began.
    pub begun: Duration,
    /// When it ended; never, where its process died or nobody waited for it any more.
    pub ended: Option<Duration>,
    /// What it was.
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum What {
    /// A store was asked about a key.
    Asked {
        /// The key.
        key: Key,
        /// Under which token; reading needs none.
        token: Option<Token>,
        /// What it was asked.
        call: Call,
        /// Its answer.
        said: Option<Said>,
    },
    /// A handler ran.
    Ran {
        /// The key as the client sent it.
        key: String,
        /// What the handler was told.
        operation: OperationId,
        /// What the handler was told.
        attempt: u32,
        /// Its effects, each with a number of its own and the moment of it.
        effects: Vec<(u64, Duration)>,
    },
    /// A client sent a request.
    Requested {
        /// The key as the client sent it.
        key: String,
        /// What it was answered.
        answer: Option<Answer>,
    },
}

/// A call of a store.
#[derive(Clone, Debug)]
pub enum Call {
    /// [`Store::claim`], for so long.
    Claim(Duration),
    /// [`Store::complete`], with a payload that is kept for so long.
    Complete(bytes::Bytes, Ttl),
    /// [`Store::release`].
    Release,
    /// [`Store::forget`].
    Forget,
    /// [`Store::renew`], for so long; of many at once, one event each.
    Renew(Duration),
    /// [`Store::read`].
    Read,
}

/// What a store answered.
#[derive(Clone, Debug)]
pub enum Said {
    /// The claim is granted.
    Granted(Sight),
    /// This record is there: it stands in the way of the call, or was read.
    Found(Sight),
    /// There is no record.
    Nothing,
    /// It is written, or renewed.
    Done,
    /// It is not renewed.
    NotHeld,
    /// It could not say.
    Failed(StoreErrorKind),
}

/// What was seen of a record.
#[derive(Clone, Debug)]
pub struct Sight {
    /// Of which operation.
    pub operation: OperationId,
    /// By whom it was claimed last.
    pub token: Token,
    /// What had become of it.
    pub state: State,
    /// How many claims on it had been granted.
    pub attempt: u32,
    /// What was left of its lease.
    pub lease_left: Duration,
    /// What it carried.
    pub payload: bytes::Bytes,
}

impl From<&Record> for Sight {
    fn from(record: &Record) -> Self {
        Self {
            operation: record.operation_id,
            token: record.token,
            state: record.state,
            attempt: record.attempt,
            lease_left: record.lease_left,
            payload: record.payload.clone(),
        }
    }
}

/// What a client got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Whether it was said to be a replay.
    pub replayed: bool,
    /// The body.
    pub body: bytes::Bytes,
}

impl Default for History {
    fn default() -> Self {
        let (events, effects) = (Mutex::default(), AtomicU64::new(0));
        Self(Arc::new(Events { start: Instant::now(), events, effects }))
    }
}

impl History {
    /// All that has happened so far, in the order in which it began.
    pub fn events(&self) -> Vec<Event> {
        self.lock().clone()
    }

    /// How many events there are.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// Whether nothing has happened.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What handlers and clients had to do with a key, and what the store was asked about it.
    pub fn about(&self, key: &str) -> Vec<Event> {
        let events = self.lock();
        let ours: HashSet<_> = events
            .iter()
            .filter_map(|event| match &event.what {
                What::Ran { key: ran, operation, .. } if ran == key => Some(*operation),
                _ => None,
            })
            .collect();
        let records: HashSet<_> = events
            .iter()
            .filter_map(|event| match &event.what {
                What::Asked {
                    key, said: Some(Said::Granted(sight) | Said::Found(sight)), ..
                } => ours.contains(&sight.operation).then_some(*key),
                _ => None,
            })
            .collect();
        let is_ours = |event: &&Event| match &event.what {
            What::Asked { key, .. } => records.contains(key),
            What::Ran { key: of, .. } | What::Requested { key: of, .. } => of == key,
        };
        events.iter().filter(is_ours).cloned().collect()
    }

    /// A handler begins to run.
    pub fn ran(&self, process: usize, key: &str, operation: &Operation) -> Open {
        let (attempt, effects) = (operation.attempt(), Vec::new());
        let (key, operation) = (key.to_owned(), operation.id());
        self.begin(process, What::Ran { key, operation, attempt, effects })
    }

    /// A client sends a request.
    pub fn requested(&self, process: usize, key: &str) -> Open {
        self.begin(process, What::Requested { key: key.to_owned(), answer: None })
    }

    fn begin(&self, process: usize, what: What) -> Open {
        let mut events = self.lock();
        let begun = self.now();
        events.push(Event { process, begun, ended: None, what });
        Open { history: self.clone(), place: events.len() - 1 }
    }

    fn now(&self) -> Duration {
        self.0.start.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        self.0.events.lock().expect("no panic under this lock")
    }
}

/// An event that has begun. It ends when it is told so; dropped before, it never does.
#[derive(Debug)]
pub struct Open {
    history: History,
    place: usize,
}

impl Open {
    /// The effect of a handler happens; says what the handler is to answer, which names the effect.
    pub fn effect(&self) -> String {
        let number = self.history.0.effects.fetch_add(1, Ordering::SeqCst);
        let now = self.history.now();
        self.change(|event| match &mut event.what {
            What::Ran { key, attempt, effects, .. } => {
                effects.push((number, now));
                format!("effect {number}: attempt {attempt} of {key}")
            }
            _ => panic!("only handlers have effects"),
        })
    }

    /// A handler ends, whatever it answers.
    pub fn end(self) {
        self.change(|_| {});
        self.ended();
    }

    /// A client gets its answer.
    pub fn answered(self, got: Answer) {
        self.change(|event| match &mut event.what {
            What::Requested { answer, .. } => *answer = Some(got),
            _ => panic!("only clients get answers"),
        });
        self.ended();
    }

    /// A store answers.
    fn said(self, answer: Said) {
        self.change(|event| match &mut event.what {
            What::Asked { said, .. } => *said = Some(answer),
            _ => panic!("only stores are asked"),
        });
        self.ended();
    }

    fn ended(&self) {
        let now = self.history.now();
        self.change(|event| event.ended = Some(now));
    }

    fn change<T>(&self, change: impl FnOnce(&mut Event) -> T) -> T {
        change(&mut self.history.lock()[self.place])
    }
}

/// The number of the effect that an answer names.
pub fn effect_of(body: &[u8]) -> Option<u64> {
    let body = std::str::from_utf8(body).ok()?;
    body.strip_prefix("effect ")?.split(':').next()?.parse().ok()
}

/// A store as one process sees it, all of whose calls become history. A clone is the same store.
///
/// Issuing keys, checkpoints and what operators do are passed on and not recorded.
#[derive(Clone)]
pub struct Recorded {
    store: Arc<dyn Store>,
    history: History,
    process: usize,
    trouble: Option<Trouble>,
}

impl fmt::Debug for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

/// What befalls the calls of a [`Recorded`] store on their way: they get lost before the store has
/// them or after it has answered, or are late.
#[derive(Clone, Debug)]
pub struct Trouble(Arc<Mutex<SmallRng>>);

impl Trouble {
    /// By chance, which a seed decides.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(SmallRng::seed_from_u64(seed))))
    }

    fn next(&self, call: &Call) -> Option<Mishap> {
        let mut rng = self.0.lock().expect("no panic under this lock");
        let often = match call {
            // Two in a row must fail for a lease to end under its owner.
            Call::Renew(_) => 2,
            _ => 12,
        };
        if !rng.random_ratio(1, often) {
            return None;
        }
        let late = Duration::from_micros(rng.random_range(0..3_000));
        Some(match rng.random_range(0..4) {
            0 => Mishap::NeverArrives,
            1 => Mishap::AnswerLost,
            2 => Mishap::Late(late),
            _ => Mishap::AnswerLate(late),
        })
    }
}

#[derive(Clone, Copy, Debug)]
enum Mishap {
    NeverArrives,
    AnswerLost,
    Late(Duration),
    AnswerLate(Duration),
}

impl Recorded {
    /// Listens to a store on behalf of a process.
    pub fn over(store: Arc<dyn Store>, history: &History, process: usize) -> Self {
        Self { store, history: history.clone(), process, trouble: None }
    }

    /// The same, with trouble on the way. What is recorded is what the store itself answered.
    #[must_use]
    pub fn with(self, trouble: Trouble) -> Self {
        Self { trouble: Some(trouble), ..self }
    }

    /// Makes a call, which is recorded as one about each of these keys.
    async fn ask<T>(
        &self,
        about: Vec<(Key, Option<Token>, Call)>,
        making: BoxFuture<'_, Result<T, StoreError>>,
        said: impl Fn(&T, usize) -> Said,
    ) -> Result<T, StoreError> {
        let first = about.first().map(|(_, _, call)| call);
        let mishap = first.and_then(|call| self.trouble.as_ref()?.next(call));
        match mishap {
            Some(Mishap::NeverArrives) => {
                return Err(StoreError::new("troubled", StoreErrorKind::Unreachable));
            }
            Some(Mishap::Late(time)) => sleep(time).await,
            _ => {}
        }
        let begin = |(key, token, call)| {
            let asked = What::Asked { key, token, call, said: None };
            self.history.begin(self.process, asked)
        };
        let open: Vec<_> = about.into_iter().map(begin).collect();
        let answer = making.await;
        for (number, open) in open.into_iter().enumerate() {
            open.said(match &answer {
                Ok(answer) => said(answer, number),
                Err(error) => Said::Failed(error.kind()),
            });
        }
        match mishap {
            Some(Mishap::AnswerLost) => Err(StoreError::new("troubled", StoreErrorKind::TimedOut)),
            Some(Mishap::AnswerLate(time)) => {
                sleep(time).await;
                answer
            }
            _ => answer,
        }
    }

    async fn write(
        &self,
        key: &Key,
        token: &Token,
        call: Call,
        making: BoxFuture<'_, Result<Written, StoreError>>,
    ) -> Result<Written, StoreError> {
        let about = vec![(*key, Some(*token), call)];
        self.ask(about, making, |written, _| match written {
            Written::Done => Said::Done,
            Written::Fenced(record) => Said::Found(record.into()),
            Written::Gone => Said::Nothing,
        })
        .await
    }
}

impl Store for Recorded {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        let about = vec![(claim.key, Some(claim.token), Call::Claim(claim.lease))];
        Box::pin(self.ask(about, self.store.claim(claim), |claimed, _| match claimed {
            Claimed::Granted(record) => Said::Granted(record.into()),
            Claimed::Found(record) => Said::Found(record.into()),
            Claimed::Unknown => Said::Nothing,
        }))
    }

    fn complete<'a>(
        &'a self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        let call = Call::Complete(completion.payload.clone(), completion.ttl);
        let making = self.store.complete(completion);
        Box::pin(self.write(&completion.key, &completion.token, call, making))
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>> {
        self.store.issue(issue)
    }

    fn checkpoint<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        self.store.checkpoint(checkpoint)
    }

    fn release<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.write(key, token, Call::Release, self.store.release(key, token)))
    }

    fn forget<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.write(key, token, Call::Forget, self.store.forget(key, token)))
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        let about = claims.iter().map(|claim| (claim.key, Some(claim.token), claim.lease));
        let about = about.map(|(key, token, lease)| (key, token, Call::Renew(lease))).collect();
        Box::pin(self.ask(about, self.store.renew(claims), |held, number| match held.get(number) {
            Some(true) => Said::Done,
            _ => Said::NotHeld,
        }))
    }

    fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        let about = vec![(*key, None, Call::Read)];
        Box::pin(self.ask(about, self.store.read(key), |record, _| match record {
            Some(record) => Said::Found(record.into()),
            None => Said::Nothing,
        }))
    }

    fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        self.store.sweep(limit)
    }

    /// Whatever store it is, engines keep at hand what it says, which must not make a difference.
    fn is_remote(&self) -> bool {
        true
    }

    fn manage(&self) -> Option<&dyn Manage> {
        self.store.manage()
    }

    fn wake(&self) -> Option<&dyn Wake> {
        self.store.wake()
    }

    fn transact(&self) -> Option<&dyn Transact> {
        self.store.transact()
    }
}
