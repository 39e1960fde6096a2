use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize},
};

use bytes::Bytes;
use futures_util::{FutureExt, future::join_all, poll};
use tokio::sync::{Notify, Semaphore};

use super::*;
use crate::{
    decision::OnUnknown,
    key::{OperationId, ScopeDigest, Token},
    record::{FORMAT, Fingerprint, Flags, Record, Ttl},
};

/// A server that answers when it is told to, and remembers what it was sent.
#[derive(Clone)]
struct Server(Arc<Behaviour>);

struct Behaviour {
    lanes: Lanes,
    /// How many statements may be answered.
    answers: Semaphore,
    sent: Mutex<Vec<Sent>>,
    arrived: Notify,
    /// What becomes of statements that carry several calls.
    fails_together: Option<StoreErrorKind>,
    panics_together: AtomicBool,
    /// Keys whose calls are left to be made alone.
    left: Mutex<Vec<Key>>,
}

/// A statement: whether it claims, and which keys.
type Sent = (bool, Vec<u8>);

impl Server {
    fn with(lanes: u32, fails_together: Option<StoreErrorKind>) -> Self {
        Self(Arc::new(Behaviour {
            lanes: Lanes::new(lanes),
            answers: Semaphore::new(0),
            sent: Mutex::default(),
            arrived: Notify::new(),
            fails_together,
            panics_together: AtomicBool::new(false),
            left: Mutex::default(),
        }))
    }

    fn new(lanes: u32) -> Self {
        Self::with(lanes, None)
    }

    fn answer(&self, statements: usize) {
        self.0.answers.add_permits(statements);
    }

    fn sent(&self) -> Vec<Sent> {
        self.0.sent.lock().unwrap().clone()
    }

    async fn until_sent(&self, statements: usize) {
        while self.sent().len() < statements {
            self.0.arrived.notified().await;
        }
    }

    async fn carry<P: Passenger>(&self, claims: bool, calls: &[P]) {
        let keys = calls.iter().map(|call| call.key().as_bytes()[0]).collect();
        self.0.sent.lock().unwrap().push((claims, keys));
        self.0.arrived.notify_waiters();
        // No server answers before it was asked.
        tokio::task::yield_now().await;
        self.0.answers.acquire().await.unwrap().forget();
    }

    fn fate(&self, calls: usize) -> Result<(), StoreError> {
        assert!(!(calls > 1 && self.0.panics_together.load(Ordering::Relaxed)), "as it was told");
        match self.0.fails_together {
            Some(kind) if calls > 1 => Err(StoreError::new("server", kind)),
            _ => Ok(()),
        }
    }

    fn is_left(&self, key: &Key) -> bool {
        self.0.left.lock().unwrap().contains(key)
    }
}

impl Carrier for Server {
    const NAME: &str = "server";

    fn lanes(&self) -> &Lanes {
        &self.0.lanes
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(10)
    }

    async fn claim_one(&self, claim: &Claim) -> Result<Claimed, StoreError> {
        self.carry(true, std::slice::from_ref(claim)).await;
        Ok(Claimed::Granted(record(claim)))
    }

    async fn complete_one(&self, completion: &Completion) -> Result<Written, StoreError> {
        self.carry(false, std::slice::from_ref(completion)).await;
        Ok(Written::Done)
    }

    async fn claim_all(&self, claims: &[Claim]) -> Result<Vec<Option<Claimed>>, StoreError> {
        self.carry(true, claims).await;
        self.fate(claims.len())?;
        let answer =
            |claim: &Claim| (!self.is_left(&claim.key)).then(|| Claimed::Granted(record(claim)));
        Ok(claims.iter().map(answer).collect())
    }

    async fn complete_all(
        &self,
        completions: &[Completion],
    ) -> Result<Vec<Option<Written>>, StoreError> {
        self.carry(false, completions).await;
        self.fate(completions.len())?;
        Ok(completions.iter().map(|_| Some(Written::Done)).collect())
    }
}

fn key(number: u8) -> Key {
    Key::from_bytes([number; 32])
}

fn claim(number: u8) -> Claim {
    Claim {
        key: key(number),
        scope: ScopeDigest::from_bytes([2; 32]),
        operation: Arc::from("POST /"),
        operation_id: OperationId::random(),
        fingerprint: Fingerprint { scheme: "test".into(), digest: [3; 32] },
        token: Token::random(),
        lease: Duration::from_secs(30),
        ttl: Ttl::Forever,
        issued_only: false,
        on_unknown: OnUnknown::Rerun,
        format: FORMAT,
    }
}

fn completion(number: u8) -> Completion {
    Completion {
        key: key(number),
        token: Token::random(),
        ttl: Ttl::Forever,
        flags: Flags::NONE,
        payload: Bytes::from_static(b"answer"),
        format: FORMAT,
    }
}

/// By which an answer is known to be that of its own claim.
fn record(claim: &Claim) -> Record {
    crate::store::row::Row::fresh(claim, 0).record(0)
}

fn is_granted(claim: &Claim, answer: &Result<Claimed, StoreError>) -> bool {
    matches!(answer, Ok(Claimed::Granted(record)) if record.token == claim.token)
}

/// Claims on keys, each answered as its own.
async fn all_granted(server: &Server, numbers: &[u8]) {
    let claims: Vec<_> = numbers.iter().map(|number| claim(*number)).collect();
    let answers = join_all(claims.iter().map(|claim| carry(server, claim))).await;
    assert!(claims.iter().zip(&answers).all(|(claim, answer)| is_granted(claim, answer)));
}

#[tokio::test]
async fn a_call_goes_at_once_while_a_lane_is_free() {
    let server = Server::new(3);
    server.answer(3);
    all_granted(&server, &[3, 2, 1]).await;
    assert_eq!(server.sent(), [(true, vec![3]), (true, vec![2]), (true, vec![1])]);
    assert_eq!(server.0.lanes.bundled(), Bundled::default());
}

#[tokio::test]
async fn what_comes_while_all_lanes_are_taken_travels_together_in_order_of_keys() {
    let server = Server::new(1);
    server.answer(2);
    all_granted(&server, &[5, 9, 7, 8]).await;
    assert_eq!(server.sent(), [(true, vec![5]), (true, vec![7, 8, 9])]);
    assert_eq!(server.0.lanes.bundled(), Bundled { statements: 1, calls: 3 });
    server.answer(1);
    all_granted(&server, &[1]).await;
    assert_eq!(server.sent().len(), 3, "the lane is free again");
}

#[tokio::test]
async fn no_statement_carries_a_key_twice() {
    let server = Server::new(1);
    server.answer(10);
    all_granted(&server, &[5, 7, 7, 8, 7]).await;
    assert_eq!(server.sent()[1..], [(true, vec![7, 8]), (true, vec![7]), (true, vec![7])]);
}

#[tokio::test]
async fn who_comes_first_goes_first_whether_to_claim_or_to_complete() {
    let server = Server::new(1);
    let first = claim(1);
    let mut first = Box::pin(carry(&server, &first));
    assert!(poll!(&mut first).is_pending());
    let (claims, completions) = ([claim(2), claim(3)], [completion(4), completion(5)]);
    let mut waiting = vec![
        carry(&server, &completions[0]).map(drop).boxed(),
        carry(&server, &claims[0]).map(drop).boxed(),
        carry(&server, &completions[1]).map(drop).boxed(),
        carry(&server, &claims[1]).map(drop).boxed(),
    ];
    for call in &mut waiting {
        assert!(poll!(call).is_pending());
    }
    server.answer(3);
    assert!(first.await.is_ok());
    join_all(waiting).await;
    assert_eq!(server.sent(), [(true, vec![1]), (false, vec![4, 5]), (true, vec![2, 3])]);
}

#[tokio::test]
async fn a_call_that_fails_its_neighbours_leaves_each_to_itself() {
    for kind in [StoreErrorKind::TooLarge, StoreErrorKind::Refused, StoreErrorKind::Corrupt] {
        let server = Server::with(1, Some(kind));
        server.answer(10);
        all_granted(&server, &[1, 2, 3, 4]).await;
        let sent = server.sent();
        assert_eq!(sent[1], (true, vec![2, 3, 4]));
        assert_eq!(sent.len(), 5, "{sent:?}");
    }
}

#[tokio::test]
async fn a_server_that_cannot_be_asked_is_not_asked_by_all_of_them_at_once() {
    for kind in [StoreErrorKind::Unreachable, StoreErrorKind::TimedOut] {
        let server = Server::with(1, Some(kind));
        server.answer(10);
        let claims = [claim(1), claim(2), claim(3)];
        let answers = join_all(claims.iter().map(|claim| carry(&server, claim))).await;
        assert!(is_granted(&claims[0], &answers[0]));
        for answer in &answers[1..] {
            assert_eq!(answer.as_ref().unwrap_err().kind(), kind);
        }
        assert_eq!(server.sent().len(), 2);
    }
}

#[tokio::test]
async fn a_call_that_is_left_out_is_made_alone() {
    let server = Server::new(1);
    server.0.left.lock().unwrap().push(key(3));
    server.answer(10);
    all_granted(&server, &[1, 2, 3, 4]).await;
    assert_eq!(server.sent()[1..], [(true, vec![2, 3, 4]), (true, vec![3])]);
}

#[tokio::test]
async fn who_goes_away_takes_nobody_else_along() {
    let server = Server::new(1);
    let claims: Vec<_> = (1..=5).map(claim).collect();
    let mut calls: Vec<_> = claims.iter().map(|claim| Box::pin(carry(&server, claim))).collect();
    for call in &mut calls {
        assert!(poll!(call).is_pending());
    }
    // The one that has the lane, one that waits for it, and, below, one that is under way.
    drop(calls.remove(0));
    drop(calls.remove(0));
    server.until_sent(2).await;
    assert_eq!(server.sent()[1], (true, vec![3, 4, 5]));
    drop(calls.remove(1));
    server.answer(1);
    let answers = join_all(calls).await;
    assert!(is_granted(&claims[2], &answers[0]) && is_granted(&claims[4], &answers[1]));
}

#[tokio::test]
async fn claims_that_nobody_would_wait_for_are_refused_and_completions_never() {
    let server = Server::new(1);
    let waiting: Vec<_> = (0..=MOST_WAITING).map(|_| claim(1)).collect();
    let mut calls: Vec<_> = waiting.iter().map(|claim| Box::pin(carry(&server, claim))).collect();
    for call in &mut calls {
        assert!(poll!(call).is_pending());
    }
    let (one_more, answer) = (claim(2), completion(3));
    let refused = carry(&server, &one_more).now_or_never().unwrap();
    assert_eq!(refused.unwrap_err().kind(), StoreErrorKind::Overloaded);
    assert!(carry(&server, &answer).now_or_never().is_none(), "it waits");
    // Whoever has gone away makes room.
    drop(calls.pop());
    assert!(carry(&server, &one_more).now_or_never().is_none(), "it waits");
}

#[tokio::test]
async fn a_statement_that_panics_leaves_each_call_to_itself() {
    let server = Server::new(1);
    server.0.panics_together.store(true, Ordering::Relaxed);
    server.answer(10);
    all_granted(&server, &[1, 2, 3]).await;
    server.0.panics_together.store(false, Ordering::Relaxed);
    all_granted(&server, &[4, 5, 6]).await;
    assert_eq!(server.sent().last(), Some(&(true, vec![5, 6])), "the lane was given back");
}

#[test]
fn who_waits_for_a_runtime_that_ends_goes_by_itself() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let server = Server::new(1);
    let (theirs, ours) = (runtime(), runtime());
    let (first, second) = (claim(1), claim(2));
    let (holder, waiter) = (server.clone(), server.clone());
    // It has the lane, and its runtime does not go on.
    theirs.block_on(async {
        tokio::spawn(async move { carry(&holder, &first).await });
        tokio::task::yield_now().await;
    });
    ours.block_on(async {
        let mut waits = Box::pin(carry(&waiter, &second));
        assert!(poll!(&mut waits).is_pending());
        theirs.shutdown_background();
        server.answer(1);
        assert!(is_granted(&second, &waits.await));
    });
    assert_eq!(server.sent(), [(true, vec![1]), (true, vec![2])]);
}

#[tokio::test]
async fn a_large_answer_travels_with_few() {
    let server = Server::new(1);
    let half = Bytes::from(vec![0; MOST_BYTES / 2]);
    let large = |number| Completion { payload: half.clone(), ..completion(number) };
    let answers = [completion(1), large(2), large(3), large(4)];
    server.answer(3);
    let written = join_all(answers.iter().map(|answer| carry(&server, answer))).await;
    assert!(written.iter().all(|written| matches!(written, Ok(Written::Done))));
    assert_eq!(server.sent()[1..], [(false, vec![2, 3]), (false, vec![4])]);
}

#[tokio::test]
async fn there_are_as_many_lanes_as_a_statement_is_worth() {
    let lanes = Lanes::new(16);
    let allowed = || lanes.allowed(&lanes.lock());
    assert_eq!(allowed(), AT_FIRST);
    lanes.lock().taken = 1;
    lanes.took(Duration::from_micros(225));
    assert_eq!(allowed(), 3);
    lanes.took(Duration::from_micros(40));
    assert_eq!(allowed(), FEWEST);
    // Beside others a statement takes longer, which says nothing.
    lanes.lock().taken = 2;
    lanes.took(Duration::from_millis(5));
    assert_eq!(allowed(), FEWEST);
    // A disk that has become slow is noticed when a statement is alone.
    lanes.lock().taken = 1;
    for _ in 0..100 {
        lanes.took(Duration::from_micros(1_250));
    }
    assert_eq!(allowed(), 16, "no more than the pool has connections");
}

/// Whatever comes and goes, every call that is waited for is answered as its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_calls_at_once_are_all_answered() {
    let server = Server::new(3);
    server.answer(100_000);
    let answered = Arc::new(AtomicUsize::new(0));
    let calls = (0..1_000_u32).map(|number| {
        let (server, answered) = (server.clone(), Arc::clone(&answered));
        tokio::spawn(async move {
            for turn in 0..20_u32 {
                let claim = claim((number.wrapping_mul(31).wrapping_add(turn) % 251) as u8);
                if (number + turn) % 7 == 0 {
                    // Its caller goes away at some moment.
                    let _ = timeout(Duration::from_micros(50), carry(&server, &claim)).await;
                } else {
                    assert!(is_granted(&claim, &carry(&server, &claim).await));
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
    });
    for call in join_all(calls).await {
        call.unwrap();
    }
    // Who carried the last of them has yet to see that nothing waits.
    let is_idle = || {
        let waiting = server.0.lanes.lock();
        waiting.is_empty() && waiting.taken == 0
    };
    let idle = async {
        while !is_idle() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(10), idle).await.unwrap();
    assert!(answered.load(Ordering::Relaxed) > 16_000);
    assert!(server.0.lanes.bundled().calls > 1_000);
}
