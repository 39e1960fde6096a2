//! The checker bites: each of these stores breaks one promise now and then, and its run is reported
//! in words.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use idem_runtime::{
    Flags, Key, Record, RecordedResponse, State, Token,
    store::{
        Checkpoint, Claim, Claimed, Completion, Issue, MemoryStore, Renewal, Store, StoreError,
        StoreErrorKind, Written,
    },
};

use crate::{
    in_memory,
    load::{Plan, Site, seed},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    /// Whoever claims a running record is told that it holds the claim.
    TwoHolders,
    /// Whoever completes a running record may.
    TokenIgnored,
    /// A completed record is not there.
    AnswerLost,
    /// A completed record comes back with another answer.
    AnswerChanged,
    /// A completion is answered and not written.
    AnswerNotWritten,
    /// A running record is taken from its owner.
    LeaseEndedEarly,
    /// A renewal is answered and not made.
    RenewalForgotten,
    /// A fresh key is answered from the record of another one.
    AnswerOfAnother,
    /// An unfinished record is not there.
    UnfinishedLost,
}

/// Every so many calls that could go wrong do.
const EVERY: usize = 10;

#[derive(Debug)]
struct Broken {
    store: MemoryStore,
    flaw: Flaw,
    calls: AtomicUsize,
    /// The last completed answer.
    last: Mutex<Option<Bytes>>,
}

type Asked<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

impl Broken {
    fn new(flaw: Flaw) -> Self {
        let (store, calls, last) = (MemoryStore::new(), AtomicUsize::new(0), Mutex::new(None));
        Self { store, flaw, calls, last }
    }

    /// Whether it is this flaw's turn.
    fn strikes(&self, flaw: Flaw) -> bool {
        self.flaw == flaw && self.calls.fetch_add(1, Ordering::SeqCst) % EVERY == EVERY - 1
    }

    async fn claim_badly(&self, claim: &Claim) -> Result<Claimed, StoreError> {
        let record = self.store.read(&claim.key).await?;
        match record {
            Some(record) if record.state == State::Running && record.token != claim.token => {
                if self.strikes(Flaw::TwoHolders) {
                    return Ok(Claimed::Granted(Record { token: claim.token, ..record }));
                }
                if self.strikes(Flaw::LeaseEndedEarly) {
                    self.store.release(&claim.key, &record.token).await?;
                }
                if self.strikes(Flaw::UnfinishedLost) {
                    self.store.forget(&claim.key, &record.token).await?;
                }
                self.store.claim(claim).await
            }
            Some(record) if record.state == State::Completed => {
                if self.strikes(Flaw::AnswerLost) {
                    let (operation_id, token) = (claim.operation_id, claim.token);
                    let (state, attempt) = (State::Running, 1);
                    let fresh = Record { operation_id, token, state, attempt, ..record };
                    return Ok(Claimed::Granted(Record { payload: Bytes::new(), ..fresh }));
                }
                if self.strikes(Flaw::AnswerChanged) {
                    let answer = RecordedResponse::decode(&record.payload).expect("an answer");
                    let payload = RecordedResponse::encode(200, &[], &answer.body);
                    return Ok(Claimed::Found(Record { payload, ..record }));
                }
                self.store.claim(claim).await
            }
            None => {
                let last = self.last.lock().expect("a lock").clone();
                let granted = self.store.claim(claim).await?;
                match (granted, last) {
                    (Claimed::Granted(record), Some(payload))
                        if self.strikes(Flaw::AnswerOfAnother) =>
                    {
                        self.store.forget(&claim.key, &claim.token).await?;
                        let state = State::Completed;
                        Ok(Claimed::Found(Record { state, payload, ..record }))
                    }
                    (granted, _) => Ok(granted),
                }
            }
            _ => self.store.claim(claim).await,
        }
    }

    async fn complete_badly(&self, completion: &Completion) -> Result<Written, StoreError> {
        let mut completion = completion.clone();
        if self.strikes(Flaw::AnswerNotWritten) {
            return Ok(Written::Done);
        }
        if self.flaw == Flaw::TokenIgnored
            && let Some(record) = self.store.read(&completion.key).await?
        {
            completion.token = record.token;
        }
        if !completion.flags.contains(Flags::TOMBSTONE) {
            *self.last.lock().expect("a lock") = Some(completion.payload.clone());
        }
        self.store.complete(&completion).await
    }
}

impl Store for Broken {
    fn claim<'a>(&'a self, claim: &'a Claim) -> Asked<'a, Claimed> {
        Box::pin(self.claim_badly(claim))
    }

    fn complete<'a>(&'a self, completion: &'a Completion) -> Asked<'a, Written> {
        Box::pin(self.complete_badly(completion))
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> Asked<'a, Vec<bool>> {
        match self.flaw {
            Flaw::RenewalForgotten => Box::pin(async move { Ok(vec![true; claims.len()]) }),
            // Owners are to be late, which is no flaw.
            Flaw::TokenIgnored => {
                Box::pin(async { Err(StoreError::new("broken", StoreErrorKind::Unreachable)) })
            }
            _ => self.store.renew(claims),
        }
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> Asked<'a, Written> {
        self.store.issue(issue)
    }

    fn checkpoint<'a>(&'a self, checkpoint: &'a Checkpoint) -> Asked<'a, Written> {
        self.store.checkpoint(checkpoint)
    }

    fn release<'a>(&'a self, key: &'a Key, token: &'a Token) -> Asked<'a, Written> {
        self.store.release(key, token)
    }

    fn forget<'a>(&'a self, key: &'a Key, token: &'a Token) -> Asked<'a, Written> {
        self.store.forget(key, token)
    }

    fn read<'a>(&'a self, key: &'a Key) -> Asked<'a, Option<Record>> {
        self.store.read(key)
    }

    fn sweep(&self, limit: usize) -> Asked<'_, usize> {
        self.store.sweep(limit)
    }
}

/// Runs over a store with this flaw, which must be reported in these words.
async fn is_reported(flaw: Flaw, words: &[&str]) {
    let seed = seed();
    let lease = Duration::from_millis(250);
    let plan = Plan { over_http: false, troubled: true, lease, ..Plan::new(seed, 1_500) };
    let site = Site::start(plan, in_memory(Broken::new(flaw))).await;
    site.serve(async {}).await;
    let found = match site.judge(true).await {
        Ok(summary) => panic!("IDEM_SEED={seed}: {flaw:?} was not found: {summary:?}"),
        Err(found) => found,
    };
    println!("{flaw:?}: {found}");
    for words in words {
        assert!(found.say(words), "IDEM_SEED={seed}: {flaw:?} was reported otherwise: {found}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_holders_are_reported() {
    is_reported(Flaw::TwoHolders, &["two holders at once", "one claim ran twice"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_that_ignores_the_token_is_reported() {
    is_reported(Flaw::TokenIgnored, &["a completion ignored its token"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_answer_is_reported() {
    is_reported(Flaw::AnswerLost, &["a recorded answer was lost", "a record was lost"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_was_never_written_is_reported() {
    let words = ["a recorded answer was lost", "two answers were recorded", "two answers to one"];
    is_reported(Flaw::AnswerNotWritten, &words).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_answer_is_reported() {
    let words = ["a recorded answer was changed", "an answer that nobody recorded"];
    is_reported(Flaw::AnswerChanged, &words).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_ends_early_is_reported() {
    is_reported(Flaw::LeaseEndedEarly, &["a lease ended early"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forgotten_renewal_is_reported() {
    is_reported(Flaw::RenewalForgotten, &["a lease ended early"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_of_another_key_is_reported() {
    let words = ["an answer of another key", "a replay that nobody had recorded"];
    is_reported(Flaw::AnswerOfAnother, &words).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_record_is_reported() {
    let words = ["a record was lost", "two holders at once"];
    is_reported(Flaw::UnfinishedLost, &words).await;
}
