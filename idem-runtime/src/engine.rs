//! The engine: claims before a run, and what becomes of its answer after it.
//!
//! It knows no web framework and no driver: it is asked with a [`Call`] and answers with an
//! [`Admission`]; its stores are behind the [`Store`] trait.

pub(crate) mod deadline;
pub(crate) mod transaction;

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{BoxFuture, Either},
};
use http::HeaderName;
use tokio::{
    runtime::Handle,
    time::{Instant, timeout},
};
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use self::{deadline::within, transaction::InTransaction};
#[cfg(feature = "cache")]
use crate::store::Replays;
use crate::{
    anchor::Scope,
    builder::Limits,
    decision::{Asked, Decision, OnUnknown, decide},
    key::{Digester, Key, OperationId, ScopeDigest, Token},
    leases::Leases,
    observer::{Event, Observer, Outcome},
    operation::{Attempt, Journal},
    policy::{Mode, Options, Policies, Policy, Resolved, StoreOutage},
    record::{Answer, FORMAT, Fingerprint, Flags, Progress, Record, State, Ttl},
    refusal::{Refusal, RefusalKind, Refusals},
    store::{
        Checkpoint, Claim, Claimed, Completion, Issue, Store, StoreError, StoreErrorKind, Written,
    },
    waits::{News, Waits},
};

/// The engine: one for an application, in its router's state.
///
/// Cloning it is cheap and gives another handle to the same engine.
///
/// ```
/// use idem_runtime::{Idempotency, Scope, store::MemoryStore};
///
/// let idem = Idempotency::builder(MemoryStore::new())
///     .scope(Scope::header("X-API-Key"))
///     .build();
/// # let _ = idem;
/// ```
///
/// Without a scope there is no engine: keys that are shared between tenants would leak one's
/// answers to the other.
///
/// ```compile_fail,E0599
/// # use idem_runtime::{Idempotency, store::MemoryStore};
/// let idem = Idempotency::builder(MemoryStore::new()).build();
/// ```
#[derive(Clone)]
pub struct Idempotency {
    pub(crate) shared: Arc<Shared>,
}

impl fmt::Debug for Idempotency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idempotency").field("store", &self.shared.store).finish_non_exhaustive()
    }
}

pub(crate) struct Shared {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) digester: Digester,
    pub(crate) options: Options,
    pub(crate) scope: Scope,
    pub(crate) policies: Policies,
    pub(crate) limits: Limits,
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) refusals: Arc<dyn Refusals>,
    pub(crate) documentation: Option<Arc<str>>,
    /// The names of headers that are not recorded.
    pub(crate) left_out: Box<[Box<str>]>,
    /// The header that names the operation, if there is to be one.
    pub(crate) operation_header: Option<HeaderName>,
    pub(crate) carry: Option<Carry>,
    /// Completed records that the store was asked for a moment ago.
    #[cfg(feature = "cache")]
    pub(crate) replays: Option<Replays>,
    pub(crate) leases: Leases,
    pub(crate) waits: Waits,
    /// Handlers and unfinished records that go on although nobody waits for them.
    pub(crate) background: TaskTracker,
    /// Claims that nobody knows to be granted, being taken back.
    pub(crate) taken_back: TaskTracker,
    pub(crate) warned_of_outer_headers: AtomicBool,
}

/// Wraps a handler's future when it starts; see [`Builder::carry`].
pub(crate) type Carry = Arc<dyn Fn(BoxFuture<'static, ()>) -> BoxFuture<'static, ()> + Send + Sync>;

impl Idempotency {
    /// The store.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.shared.store
    }

    /// How many handlers and unfinished records go on although nobody waits for them.
    pub fn detached(&self) -> usize {
        self.shared.background.len()
    }

    /// Says that the server is shutting down: who waits for the answer of a running request is
    /// refused with 503 at once, and so is who would begin to. Call it when the signal comes, since
    /// a graceful shutdown waits for the waiting too.
    pub fn shut_down(&self) {
        self.shared.waits.close();
    }

    /// Waits until everything that goes on in the background has finished, at most this long; says
    /// whether it has. Call it after the server has stopped and before the runtime ends.
    ///
    /// Nothing is cancelled: what is not finished in time ends with the runtime, as in a crash, and
    /// its key is free again after the lease.
    pub async fn drain(&self, at_most: Duration) -> bool {
        // What goes on may leave a record behind it, which is counted before its task ends.
        let all = async {
            self.shared.background.wait().await;
            self.shared.taken_back.wait().await;
        };
        timeout(at_most, all).await.is_ok()
    }
}

/// A tracker that can be waited for at any time; work is still let in.
pub(crate) fn closed() -> TaskTracker {
    let tracker = TaskTracker::new();
    tracker.close();
    tracker
}

/// A request, or the call of a plain function, as the engine sees it: what it asks of the store,
/// under a token of its own, and by which policy.
pub(crate) struct Call {
    pub(crate) claim: Box<Claim>,
    pub(crate) policy: Arc<Resolved>,
}

impl Call {
    pub(crate) fn new(
        (key, scope): (Key, ScopeDigest),
        operation: Arc<str>,
        fingerprint: Fingerprint,
        policy: Arc<Resolved>,
    ) -> Self {
        let claim = Claim {
            key,
            scope,
            operation,
            operation_id: OperationId::random(),
            fingerprint,
            token: Token::random(),
            lease: policy.lease,
            ttl: policy.ttl,
            issued_only: policy.issued,
            // To find out what happened is a run as well, and only one at a time may do it.
            on_unknown: match policy.on_unknown {
                OnUnknown::Recover => OnUnknown::Rerun,
                on_unknown => on_unknown,
            },
            format: FORMAT,
        };
        Self { claim: Box::new(claim), policy }
    }
}

/// A request that can be compared with the record of another deploy.
pub(crate) trait Comparable: Send {
    /// What it is under the scheme of a record. It may have to read the body first, which the
    /// handler's own scheme did not need.
    fn under_scheme<'a>(&'a mut self, scheme: &'a str) -> BoxFuture<'a, Compared>;
}

/// What a request is under another scheme than its handler's.
pub(crate) enum Compared {
    /// It has this fingerprint.
    Fingerprint(Fingerprint),
    /// It is not one that could have been recorded under that scheme.
    Other,
    /// It cannot be said.
    Unable(RefusalKind),
}

/// What the engine says to a request.
pub(crate) enum Admission {
    Run(Run),
    Replay {
        answer: Answer,
        operation_id: OperationId,
    },
    /// With what the store failed with, where that is the reason.
    Refuse(Refusal, Option<StoreError>),
    /// The same request is running, and its answer may be waited for.
    Wait(Call),
    /// The store could not be asked, and the policy says to run all the same.
    Unprotected,
}

/// Decides about a record that stands in the way of a claim, on the request's fingerprint under the
/// record's own scheme, which is returned where it is not the claim's.
async fn judge(
    claim: &Claim,
    record: &Record,
    request: &mut dyn Comparable,
) -> Result<(Decision, Option<Fingerprint>), RefusalKind> {
    let mut theirs = None;
    let same = match record.fingerprint.scheme == claim.fingerprint.scheme {
        true => record.fingerprint.digest == claim.fingerprint.digest,
        false => match request.under_scheme(&record.fingerprint.scheme).await {
            Compared::Fingerprint(fingerprint) => {
                let same = fingerprint == record.fingerprint;
                theirs = Some(fingerprint);
                same
            }
            Compared::Other => false,
            Compared::Unable(kind) => return Err(kind),
        },
    };
    let asked = Asked { same, issued_only: claim.issued_only, on_unknown: claim.on_unknown };
    Ok((decide(record.seen(), asked), theirs))
}

impl Shared {
    /// What a handler's policy comes to in this engine.
    pub(crate) fn resolved(&self, policy: &'static Policy) -> Arc<Resolved> {
        self.policies.resolved(policy, &self.options, self.scope)
    }

    /// One call of the store, bounded in time.
    pub(crate) fn ask<T>(
        &self,
        call: impl Future<Output = Result<T, StoreError>> + Unpin,
    ) -> impl Future<Output = Result<T, StoreError>> {
        self.ask_for(self.limits.store_timeout, call)
    }

    /// One call of the store, bounded by a time of its own. A store that panics is as good as one
    /// that cannot be reached: its call may have been made or not.
    pub(crate) fn ask_for<T>(
        &self,
        at_most: Duration,
        call: impl Future<Output = Result<T, StoreError>> + Unpin,
    ) -> impl Future<Output = Result<T, StoreError>> {
        let failed = |kind| Err(StoreError::new("idem", kind));
        within(at_most, AssertUnwindSafe(call).catch_unwind()).map(move |answered| match answered {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => failed(StoreErrorKind::Unreachable),
            Err(_) => failed(StoreErrorKind::TimedOut),
        })
    }

    /// Whether a header is not recorded.
    pub(crate) fn leaves_out(&self, name: &str) -> bool {
        self.left_out.iter().any(|left_out| **left_out == *name)
    }

    pub(crate) fn tell(
        &self,
        operation: &str,
        attempt: Option<&Attempt>,
        outcome: Outcome,
        error: Option<&StoreError>,
    ) {
        self.observe(&Event {
            outcome,
            operation,
            operation_id: attempt.map(|attempt| attempt.id),
            attempt: attempt.map(|attempt| attempt.number),
            error,
            enforced: true,
        });
    }

    /// Tells the observer. One that panics must not take a record, or all leases, along.
    pub(crate) fn observe(&self, event: &Event<'_>) {
        if catch_unwind(AssertUnwindSafe(|| self.observer.observe(event))).is_err() {
            tracing::error!("the observer panicked");
        }
    }

    /// Lets work go on although nobody waits for it.
    pub(crate) fn go_on(&self, runtime: &Handle, work: impl Future<Output = ()> + Send + 'static) {
        self.background.spawn_on(work, runtime);
    }

    pub(crate) fn render(&self, policy: &Resolved, refusal: Refusal) -> http::Response<Bytes> {
        let refusal = refusal.documented_at(self.documentation.as_ref());
        match policy.refusals {
            Some(refusals) => refusals.render(&refusal),
            None => self.refusals.render(&refusal),
        }
    }

    /// Claims the key for a request, or says what stands in its way.
    pub(crate) async fn admit(
        self: &Arc<Self>,
        mut call: Call,
        request: &mut dyn Comparable,
    ) -> Admission {
        if self.background.len() >= self.limits.detached {
            return self.refuse(&call, Refusal::new(RefusalKind::Busy), None);
        }
        if let Some((decision, record)) = self.at_hand(&call.claim) {
            return self.answer(&call, decision, &record);
        }
        // A record under another scheme may be claimable with the fingerprint of that scheme, and
        // may have changed when it is asked for again. Each turn is one atomic claim; a key that
        // changes this often is in flight.
        let mut late = false;
        for _ in 0..4 {
            let asked_at = Instant::now();
            let record = match self.claim_since(asked_at, &call.claim).await {
                // Whether the lease is still alive when its answer comes this late, only the store
                // can say: under the same token it is the same claim.
                Ok(Claimed::Granted(_)) if asked_at.elapsed() >= call.claim.lease / 2 => {
                    late = true;
                    continue;
                }
                Ok(Claimed::Granted(record)) => return self.granted(call, &record, asked_at),
                Ok(Claimed::Found(record)) => record,
                Ok(Claimed::Unknown) => {
                    return self.refuse(&call, Refusal::new(RefusalKind::UnknownKey), None);
                }
                Err(error) => return self.outage(&call, error),
            };
            let (decision, ours) = match judge(&call.claim, &record, request).await {
                Ok(judged) => judged,
                Err(kind) => return self.refuse_about(&call, kind, &record),
            };
            match decision {
                Decision::Run => call.claim.fingerprint = ours.unwrap_or(call.claim.fingerprint),
                Decision::InFlight if call.policy.waits() => return Admission::Wait(call),
                decision => return self.answer(&call, decision, &record),
            }
        }
        if late {
            let too_late = StoreError::new("idem", StoreErrorKind::TimedOut);
            return self.outage(&call, too_late);
        }
        self.refuse(&call, Refusal::new(RefusalKind::InFlight), None)
    }

    /// The record that answers a claim, without a call of the store, and how it does.
    #[cfg(feature = "cache")]
    fn at_hand(&self, claim: &Claim) -> Option<(Decision, Record)> {
        self.replays.as_ref()?.find(claim)
    }

    /// Nothing is at hand without the feature.
    #[cfg(not(feature = "cache"))]
    const fn at_hand(&self, _: &Claim) -> Option<(Decision, Record)> {
        None
    }

    /// Waits for the answer to a request that is running, which this one repeats.
    pub(crate) async fn wait(
        self: &Arc<Self>,
        call: &Call,
        bound: Duration,
        request: &mut dyn Comparable,
    ) -> Admission {
        let bound = later(Instant::now(), bound);
        let (key, in_transaction) = (call.claim.key, call.policy.transaction);
        let news = loop {
            match self.waits.enter(self, key, in_transaction).wait_until(bound).await {
                // On a runtime that is ending, the next one would be so at once: let it end.
                News::Abandoned if Instant::now() < bound => tokio::task::yield_now().await,
                news => break news,
            }
        };
        match news {
            News::Ended(Some(record)) => match judge(&call.claim, &record, request).await {
                // Nobody who waited runs: a thousand of them would be a thousand attempts.
                Ok((Decision::Run, _)) => self.refuse_about(call, RefusalKind::InFlight, &record),
                Ok((decision, _)) => self.answer(call, decision, &record),
                Err(kind) => self.refuse_about(call, kind, &record),
            },
            News::ShuttingDown => self.refuse(call, Refusal::new(RefusalKind::ShuttingDown), None),
            News::Ended(None) | News::Running | News::Abandoned => {
                self.refuse(call, Refusal::new(RefusalKind::InFlight), None)
            }
        }
    }

    /// What a decision about a record that stands in the way comes to.
    fn answer(&self, call: &Call, decision: Decision, record: &Record) -> Admission {
        let kind = match decision {
            Decision::Replay => return self.replay(call, record),
            Decision::NotReplayable => RefusalKind::NotReplayable,
            // A claim that could be granted was not: the record changes faster than it is asked for.
            Decision::InFlight | Decision::Run => RefusalKind::InFlight,
            Decision::Mismatch => RefusalKind::Mismatch,
            Decision::UnknownOutcome | Decision::Recover => RefusalKind::UnknownOutcome,
            Decision::UnknownKey => RefusalKind::UnknownKey,
            Decision::ExpiredKey => RefusalKind::ExpiredKey,
        };
        self.refuse_about(call, kind, record)
    }

    fn refuse_about(&self, call: &Call, kind: RefusalKind, record: &Record) -> Admission {
        self.refuse(call, Refusal::new(kind).about(record.operation_id), None)
    }

    /// Records what an attempt has come to so far.
    pub(crate) async fn checkpoint(&self, checkpoint: &Checkpoint) -> Result<Written, StoreError> {
        let give_up = later(Instant::now(), self.limits.record_wait);
        mark!("leased.checkpoint.before");
        let sent = || mark!("leased.checkpoint.sent" => self.store.checkpoint(checkpoint));
        let written = self.persist(give_up, sent).await;
        mark!("leased.checkpoint.answered");
        written
    }

    /// Hands a key out.
    pub(crate) async fn issue(&self, issue: &Issue) -> Result<Written, StoreError> {
        let give_up = later(Instant::now(), self.limits.record_wait);
        mark!("issue.before");
        let written =
            self.persist(give_up, || mark!("issue.sent" => self.store.issue(issue))).await;
        mark!("issue.answered");
        written
    }

    /// Asks for a claim, and once more if the answer may have been lost: the token makes both one.
    pub(crate) async fn claim(&self, claim: &Claim) -> Result<Claimed, StoreError> {
        self.claim_since(Instant::now(), claim).await
    }

    async fn claim_since(&self, since: Instant, claim: &Claim) -> Result<Claimed, StoreError> {
        let mut is_first = true;
        loop {
            mark!("leased.claim.before");
            let sent = mark!("leased.claim.sent" => self.store.claim(claim));
            let answer = self.ask(sent).await;
            mark!("leased.claim.answered");
            let may_be_lost = answer.as_ref().is_err_and(|error| error.kind().is_transient());
            if !(is_first && may_be_lost && since.elapsed() < self.limits.store_timeout) {
                return answer;
            }
            is_first = false;
        }
    }

    /// Holds a claim that was granted.
    fn granted(self: &Arc<Self>, call: Call, record: &Record, since: Instant) -> Admission {
        let mut progress = match Progress::decode(&record.payload) {
            Ok(progress) => progress,
            Err(corrupt) => {
                self.take_back(&call.claim);
                let error = StoreError::caused_by("idem", StoreErrorKind::Corrupt, corrupt);
                let refusal = Refusal::new(RefusalKind::RecordUnreadable);
                return self.refuse(&call, refusal.about(record.operation_id), Some(error));
            }
        };
        // The steps of an operation that was forgotten are not this one's.
        if progress.steps_of != Some(record.operation_id) {
            progress.steps.clear();
            progress.steps_of = Some(record.operation_id);
        }
        let Call { claim, policy } = call;
        let journal = Journal::new(Arc::downgrade(self), claim.key, claim.token, progress);
        let attempt = Attempt::new(record.operation_id, record.attempt, Some(journal));
        let must_yield = self.leases.hold(self, &claim, since, &attempt);
        // Who waits for it elsewhere must be heard.
        if policy.waits() {
            self.listen();
        }
        let operation = Arc::clone(&claim.operation);
        let held = Held { shared: Arc::clone(self), claim };
        let hold = Hold::Lease(Leased { held, attempt: Arc::clone(&attempt) });
        let enforced = policy.mode == Mode::Enforce;
        Admission::Run(Run { hold, operation, enforced, attempt, must_yield })
    }

    fn replay(&self, call: &Call, record: &Record) -> Admission {
        match Answer::decode(&record.payload) {
            Ok(answer) => Admission::Replay { answer, operation_id: record.operation_id },
            Err(corrupt) => {
                let error = StoreError::caused_by("idem", StoreErrorKind::Corrupt, corrupt);
                let refusal = Refusal::new(RefusalKind::RecordUnreadable);
                self.refuse(call, refusal.about(record.operation_id), Some(error))
            }
        }
    }

    fn refuse(&self, call: &Call, refusal: Refusal, error: Option<StoreError>) -> Admission {
        self.observe(&Event {
            outcome: Outcome::Refused(refusal.kind()),
            operation: &call.claim.operation,
            operation_id: refusal.operation_id(),
            attempt: None,
            error: error.as_ref(),
            enforced: call.policy.mode == Mode::Enforce,
        });
        Admission::Refuse(refusal, error)
    }

    /// The claim failed: it is taken back in the background, and the request refused.
    fn outage(self: &Arc<Self>, call: &Call, error: StoreError) -> Admission {
        if error.kind().is_transient() {
            self.take_back(&call.claim);
        }
        let kind = refusal_of(&error);
        // A store that answers is not out: a record that cannot be read may be a completed one, and
        // a store that is full is full until somebody acts. To run everything without protection
        // meanwhile is what idem exists to prevent.
        let open =
            call.policy.store_outage == StoreOutage::Open && kind == RefusalKind::StoreUnavailable;
        if open {
            self.tell(&call.claim.operation, None, Outcome::Unprotected, Some(&error));
            return Admission::Unprotected;
        }
        self.refuse(call, Refusal::new(kind), Some(error))
    }

    /// Takes back a claim that may have been granted and under which nothing ran, so that the next
    /// request need not wait for the lease to end.
    pub(crate) fn take_back(self: &Arc<Self>, claim: &Claim) {
        // In a long outage these would pile up; the leases' ends do the same.
        if self.taken_back.len() >= self.limits.detached {
            return;
        }
        let (shared, key, token) = (Arc::clone(self), claim.key, claim.token);
        let give_up = later(Instant::now(), claim.lease);
        let work = async move {
            let record = shared.persist(give_up, || shared.store.read(&key)).await;
            let granted = |record: &Record| record.token == token && record.state == State::Running;
            let Ok(Some(record)) = record.map(|record| record.filter(granted)) else { return };
            // What an earlier attempt left behind must stay.
            let _ = match record.attempt {
                1 => shared.persist(give_up, || shared.store.forget(&key, &token)).await,
                _ => shared.persist(give_up, || shared.store.release(&key, &token)).await,
            };
        };
        self.taken_back.spawn_on(work.in_current_span(), &Handle::current());
    }

    /// Calls the store until it has answered or the time is over.
    async fn persist<'a, T>(
        &self,
        give_up: Instant,
        attempt: impl Fn() -> BoxFuture<'a, Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let pauses = || {
            ExponentialBuilder::default()
                .with_min_delay(Duration::from_millis(25))
                .with_max_delay(Duration::from_secs(10))
                .with_jitter()
                .without_max_times()
                .build()
        };
        let mut left = None;
        loop {
            let error = match self.ask(attempt()).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            // Trying the same again cannot make it smaller.
            if error.kind() == StoreErrorKind::TooLarge {
                return Err(error);
            }
            match left.get_or_insert_with(pauses).next() {
                Some(pause) if Instant::now() + pause < give_up => tokio::time::sleep(pause).await,
                _ => return Err(error),
            }
        }
    }
}

/// What a store's failure means for a request.
const fn refusal_of(error: &StoreError) -> RefusalKind {
    match error.kind() {
        StoreErrorKind::Full | StoreErrorKind::TooLarge => RefusalKind::StoreFull,
        StoreErrorKind::Newer | StoreErrorKind::Corrupt => RefusalKind::RecordUnreadable,
        StoreErrorKind::Overloaded => RefusalKind::Busy,
        StoreErrorKind::Unreachable | StoreErrorKind::TimedOut | StoreErrorKind::Refused => {
            RefusalKind::StoreUnavailable
        }
    }
}

/// A held claim: letting it go leaves its lease to end by itself.
struct Held {
    shared: Arc<Shared>,
    claim: Box<Claim>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shared.leases.let_go(&self.claim.token);
        self.shared.let_go(&self.claim.key);
    }
}

/// The right to run, and the duty to say what came of it.
///
/// Dropped without an end, as in a crash, it leaves an unknown outcome once its lease is over, and
/// in a transaction nothing.
pub(crate) struct Run {
    hold: Hold,
    operation: Arc<str>,
    enforced: bool,
    pub(crate) attempt: Arc<Attempt>,
    must_yield: bool,
}

/// What guards a claim while it is run.
enum Hold {
    Lease(Leased),
    Transaction(Box<InTransaction>),
}

/// A claim under a lease.
struct Leased {
    held: Held,
    attempt: Arc<Attempt>,
}

/// What came of a run.
pub(crate) enum End {
    /// This is its answer, kept for this time if it is not the policy's.
    Complete(Bytes, Option<Ttl>),
    /// It was done, and its answer cannot be kept; the payload says no more than that.
    Tombstone(Bytes, Option<Ttl>),
    /// Nobody knows whether its effect happened.
    Release,
    /// Nothing happened.
    Forget,
}

/// What the owner may answer.
pub(crate) enum Ended {
    /// Its own response.
    Own,
    /// What another attempt recorded.
    Theirs(Answer, OperationId),
    /// That another attempt took over.
    Lost,
    /// Its own response, although its record is gone: nobody else has an answer, and to send the
    /// client away would have it repeat what was done.
    Unrecorded,
    /// That the transaction was rolled back, whatever the handler says.
    TransactionFailed,
    /// That nobody knows yet whether the transaction was committed.
    CommitUnknown,
}

impl Run {
    /// Says what came of it. Returns when it is written, or when waiting for that has been long
    /// enough: writing then goes on in the background, and the claim is held meanwhile.
    pub(crate) fn end(self, end: End) -> impl Future<Output = (Ended, Outcome)> {
        let Self { hold, operation, enforced, attempt, .. } = self;
        attempt.begin_to_end();
        mark!("run.ending");
        let (shared, ending) = match hold {
            Hold::Lease(leased) => {
                let shared = Arc::clone(&leased.held.shared);
                (shared, Either::Left(leased.end(end, Arc::clone(&operation))))
            }
            Hold::Transaction(transaction) => {
                let shared = Arc::clone(transaction.shared());
                (shared, Either::Right(transaction.end(end, enforced).boxed()))
            }
        };
        ending.map(move |(ended, outcome, error)| {
            // Where idem only observes, the owner's own response is sent all the same.
            let outcome = match &ended {
                Ended::Theirs(..) | Ended::Lost if !enforced => Outcome::LeaseLost,
                _ => outcome,
            };
            shared.tell(&operation, Some(&attempt), outcome, error.as_ref());
            mark!("run.ended");
            (ended, outcome)
        })
    }

    /// Method and route, or the function's path.
    pub(crate) fn operation(&self) -> &str {
        &self.operation
    }

    /// Lets others have their turn, where they need it, before the handler starts.
    pub(crate) async fn give_way(&self) {
        if self.must_yield {
            tokio::task::yield_now().await;
        }
        if let Hold::Lease(_) = self.hold {
            mark!("leased.held");
        }
    }

    /// What the handler did in its transaction stays although its answer is an error.
    pub(crate) fn keep_effects(&self) {
        if let Hold::Transaction(transaction) = &self.hold {
            transaction.keep_effects();
        }
    }
}

/// What came of an end: what may be answered, what is told, and the store's failure.
type Came = (Ended, Outcome, Option<StoreError>);

impl Leased {
    fn end(self, end: End, operation: Arc<str>) -> impl Future<Output = Came> {
        let shared = Arc::clone(&self.held.shared);
        let attempt = Arc::clone(&self.attempt);
        // That nothing happened now says nothing of what an earlier attempt did: its operation id
        // must be there for the next one.
        let end = match end {
            End::Forget if attempt.number > 1 => End::Release,
            end => end,
        };
        let outcome = end.outcome();
        let mut writing = self.write(end).boxed();
        async move {
            match within(shared.limits.record_wait, &mut writing).await {
                Ok(Ok(ended @ Ended::Theirs(..))) => (ended, Outcome::Replayed, None),
                Ok(Ok(Ended::Lost)) => {
                    (Ended::Lost, Outcome::Refused(RefusalKind::LeaseLost), None)
                }
                Ok(Ok(Ended::Unrecorded)) => (Ended::Unrecorded, Outcome::RecordLost, None),
                Ok(Ok(ended)) => (ended, outcome, None),
                Ok(Err(error)) => (Ended::Unrecorded, Outcome::RecordLost, Some(error)),
                Err(_) => {
                    shared.write_later(writing, operation, attempt);
                    (Ended::Own, Outcome::RecordDelayed, None)
                }
            }
        }
    }

    async fn write(self, end: End) -> Result<Ended, StoreError> {
        let Held { shared, claim } = &self.held;
        let Claim { key, token, .. } = &**claim;
        let leaves_an_answer = matches!(end, End::Complete(..) | End::Tombstone(..));
        // A claim that is to be given up is not renewed: if the store does not hear of it, the end of
        // the lease says the same.
        if !leaves_an_answer {
            shared.leases.let_go(token);
        }
        let at_most = match (&end, claim.ttl) {
            (End::Release, _) => claim.lease,
            (_, Ttl::For(ttl)) => ttl,
            (_, Ttl::Forever) => FOR_EVER,
        };
        let time_is_over = later(Instant::now(), at_most);
        let mut call = match end {
            End::Complete(payload, ttl) => {
                mark!("leased.complete.before");
                LastCall::Complete(self.completion(Flags::NONE, payload, ttl))
            }
            End::Tombstone(payload, ttl) => {
                LastCall::Complete(self.completion(Flags::TOMBSTONE, payload, ttl))
            }
            End::Release => {
                mark!("leased.release.before");
                LastCall::Release
            }
            End::Forget => {
                mark!("leased.forget.before");
                LastCall::Forget
            }
        };
        let written = loop {
            let sent = || match &call {
                LastCall::Complete(completion) => {
                    mark!("leased.complete.sent" => shared.store.complete(completion))
                }
                LastCall::Release => {
                    mark!("leased.release.sent" => shared.store.release(key, token))
                }
                LastCall::Forget => {
                    mark!("leased.forget.sent" => shared.store.forget(key, token))
                }
            };
            let written = shared.persist(time_is_over, sent).await;
            // What cannot be kept whole is kept as the fact.
            match (&written, &mut call) {
                (Err(error), LastCall::Complete(whole))
                    if error.kind() == StoreErrorKind::TooLarge
                        && !whole.flags.contains(Flags::TOMBSTONE) =>
                {
                    whole.flags = whole.flags.with(Flags::TOMBSTONE);
                    whole.payload = Answer::tombstone_of(&whole.payload);
                }
                _ => break written?,
            }
        };
        mark!("leased.end.answered");
        shared.waits.ended(key);
        Ok(match written {
            Written::Done => Ended::Own,
            Written::Gone if leaves_an_answer => Ended::Unrecorded,
            Written::Gone => Ended::Own,
            Written::Fenced(record) => {
                self.attempt.lose();
                theirs(&record, &claim.fingerprint)
            }
        })
    }

    fn completion(&self, flags: Flags, payload: Bytes, ttl: Option<Ttl>) -> Completion {
        let Claim { key, token, ttl: by_policy, .. } = *self.held.claim;
        let ttl = ttl.unwrap_or(by_policy);
        Completion { key, token, ttl, flags, payload, format: FORMAT }
    }
}

/// How a claim's end is told to the store.
enum LastCall {
    Complete(Completion),
    Release,
    Forget,
}

/// The answer of whoever took the claim over, if it answered the same request and is there.
fn theirs(record: &Record, fingerprint: &Fingerprint) -> Ended {
    let answered = record.state == State::Completed
        && record.fingerprint == *fingerprint
        && !record.flags.contains(Flags::TOMBSTONE);
    match Answer::decode(&record.payload) {
        Ok(answer) if answered => Ended::Theirs(answer, record.operation_id),
        _ => Ended::Lost,
    }
}

/// Longer than any process runs.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

/// An instant so much later, for durations up to "never".
pub(crate) fn later(instant: Instant, by: Duration) -> Instant {
    instant.checked_add(by.min(FOR_EVER)).unwrap_or(instant)
}

impl End {
    const fn outcome(&self) -> Outcome {
        match self {
            Self::Complete(..) => Outcome::Recorded,
            Self::Tombstone(..) => Outcome::Tombstoned,
            Self::Release => Outcome::Released,
            Self::Forget => Outcome::Forgotten,
        }
    }
}

impl Shared {
    /// Goes on writing the end of a claim that nobody waits for any more.
    fn write_later(
        self: &Arc<Self>,
        writing: BoxFuture<'static, Result<Ended, StoreError>>,
        operation: Arc<str>,
        attempt: Arc<Attempt>,
    ) {
        let shared = Arc::clone(self);
        let work = async move {
            let (outcome, error) = match writing.await {
                Ok(Ended::Theirs(..) | Ended::Lost) => (Outcome::LeaseLost, None),
                Ok(Ended::Unrecorded) => (Outcome::RecordLost, None),
                Ok(_) => (Outcome::RecordCaughtUp, None),
                Err(error) => (Outcome::RecordLost, Some(error)),
            };
            shared.tell(&operation, Some(&attempt), outcome, error.as_ref());
        };
        self.go_on(&Handle::current(), work.in_current_span());
    }
}
