//! Plain functions: the life of a call, from its arguments to its value.
//!
//! It is a handler's life without HTTP: the same claim, the same lease, the same record. The
//! arguments take the place of the request, a serde value that of the response.

mod error;

use std::{
    panic::{AssertUnwindSafe, resume_unwind},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use serde::{Serialize, de::DeserializeOwned};

pub use self::error::CallError;
use crate::{
    anchor::{AnchorRequest, AnchorValue, Arguments, KeyRules},
    detach::FinishAnyway,
    engine::{Admission, Call, Comparable, Compared, End, Ended, Idempotency, Run, Shared},
    fingerprint::{CallSubject, Incomparable},
    json::{JsonError, canonical_digest},
    key::{OperationId, Space, Values},
    observer::{Event, Outcome},
    operation::{Attempt, Operation},
    policy::{InFlight, Mode, Policy, Resolved},
    record::{Answer, RecordedValue},
    refusal::RefusalKind,
};

/// A plain function, as its attribute describes it.
#[derive(Debug)]
pub struct Function {
    /// Module and name.
    path: &'static str,
    /// The name alone.
    name: &'static str,
    policy: Policy,
}

impl Function {
    /// The description.
    pub const fn new(path: &'static str, name: &'static str, policy: Policy) -> Self {
        Self { path, name, policy }
    }
}

/// What generated code took from the arguments of a call.
#[derive(Debug)]
pub struct FunctionCall {
    engine: Idempotency,
    function: &'static Function,
    arguments: Arguments,
    /// What the fingerprint covers, or the first reason why it cannot.
    compared: Result<Vec<(&'static str, [u8; 32])>, JsonError>,
}

impl FunctionCall {
    /// A call of which nothing is known yet.
    pub fn new(engine: &Idempotency, function: &'static Function) -> Self {
        let (engine, arguments) = (engine.clone(), Arguments::new());
        Self { engine, function, arguments, compared: Ok(Vec::new()) }
    }

    /// The next value of the anchor, and then of the scope.
    pub fn push<V: AnchorValue + ?Sized>(&mut self, value: &V) {
        self.arguments.push(value);
    }

    /// Something that the fingerprint covers, by its expression.
    pub fn compare<V: Serialize + ?Sized>(&mut self, argument: &'static str, value: &V) {
        self.compare_json(argument, serde_json::to_vec(value));
    }

    fn compare_json(&mut self, argument: &'static str, json: serde_json::Result<Vec<u8>>) {
        let Ok(compared) = &mut self.compared else { return };
        let digest = json.map_err(JsonError::Syntax).and_then(|json| canonical_digest(&json, &[]));
        match digest {
            Ok(digest) => compared.push((argument, digest)),
            Err(error) => self.compared = Err(error),
        }
    }
}

/// What can be the engine of a plain function.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an idempotency engine",
    label = "not an `Idempotency`",
    note = "a function that takes a reference is a plain function: the first one is its engine, `&Idempotency`, unless `engine = arg(..)` says where that is",
    note = "the extractors of an axum handler are owned: leave out the `&`"
)]
pub trait FunctionEngine {
    /// The engine.
    fn engine(&self) -> &Idempotency;
}

impl FunctionEngine for Idempotency {
    fn engine(&self) -> &Idempotency {
        self
    }
}

#[diagnostic::do_not_recommend]
impl<E: FunctionEngine + ?Sized> FunctionEngine for &E {
    fn engine(&self) -> &Idempotency {
        E::engine(self)
    }
}

/// What a plain function returns.
#[diagnostic::on_unimplemented(
    message = "an idempotent function returns a `Result`, which `{Self}` is not",
    label = "expected `Result<T, E>`",
    note = "the call itself can fail, as where another one is in flight: `E` is whatever implements `From<CallError>`"
)]
pub trait FunctionResult {
    /// What is recorded.
    type Value;
    /// What a call that has no value comes to.
    type Error;

    /// As what it is.
    fn into_result(self) -> Result<Self::Value, Self::Error>;

    /// From what it is.
    fn from_result(result: Result<Self::Value, Self::Error>) -> Self;
}

impl<T, E> FunctionResult for Result<T, E> {
    type Value = T;
    type Error = E;

    fn into_result(self) -> Self {
        self
    }

    fn from_result(result: Self) -> Self {
        result
    }
}

/// A value that can be recorded and read back.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be recorded and replayed",
    label = "this is the value of the function",
    note = "the value of an idempotent function is recorded as JSON: `#[derive(Serialize, Deserialize)]`, and leave out what is not owned, not `'static` or not `Send`"
)]
pub trait FunctionValue: Serialize + DeserializeOwned + Send + 'static {}

#[diagnostic::do_not_recommend]
impl<T: Serialize + DeserializeOwned + Send + 'static> FunctionValue for T {}

/// An error that can say why a call has no value.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot say why a call did not run",
    label = "this is the error of the function",
    note = "a call can be refused, as where another one is in flight: implement `From<CallError>` for `{Self}`, which must be `Send` and `'static`"
)]
pub trait FunctionError: From<CallError> + Send + 'static {}

#[diagnostic::do_not_recommend]
impl<E: From<CallError> + Send + 'static> FunctionError for E {}

/// Runs the body of a plain function under a claim, or says why not, or gives the recorded value.
///
/// `nothing_happened` says of an error whether the function had no effect.
pub fn call<R, F>(
    call: FunctionCall,
    nothing_happened: fn(&R::Error) -> bool,
    body: F,
) -> BoxFuture<'static, R>
where
    R: FunctionResult<Value: FunctionValue, Error: FunctionError> + 'static,
    F: FnOnce(Idempotency, Operation) -> BoxFuture<'static, R> + Send + 'static,
{
    let returned = Arc::new(Mutex::new(None));
    let (ran, read) = (Arc::clone(&returned), Arc::clone(&returned));
    let work = Work {
        run: Box::new(move |engine, operation| {
            async move {
                let result = body(engine, operation).await.into_result();
                let came = match &result {
                    Ok(value) => Came::Value(serde_json::to_vec(value)),
                    Err(error) if nothing_happened(error) => Came::Nothing,
                    Err(_) => Came::Unknown,
                };
                put(&ran, result);
                came
            }
            .boxed()
        }),
        read: Box::new(move |json| {
            put(&read, Ok(serde_json::from_slice(json)?));
            Ok(())
        }),
    };
    let conducted = conduct(call, work);
    async move {
        let conducted = conducted.await;
        let result = returned.lock().unwrap_or_else(PoisonError::into_inner).take();
        R::from_result(match (conducted, result) {
            (Ok(()), Some(result)) => result,
            (Err(error), _) => Err(error.into()),
            // Whatever ends well has put one there.
            (Ok(()), None) => Err(CallError::new(RefusalKind::HandlerPanicked).into()),
        })
    }
    .boxed()
}

fn put<R>(place: &Mutex<Option<R>>, result: R) {
    *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
}

/// A function's body and the place for its result, without their types: what follows is compiled
/// once, and not for each function.
struct Work {
    /// Runs the body and leaves its result.
    run: Box<dyn FnOnce(Idempotency, Operation) -> BoxFuture<'static, Came> + Send>,
    read: Read,
}

/// Leaves a value as the result that is read from its JSON.
type Read = Box<dyn Fn(&[u8]) -> serde_json::Result<()> + Send>;

/// What a body came to, as its record will have it.
enum Came {
    /// This value.
    Value(serde_json::Result<Vec<u8>>),
    /// An error before any effect.
    Nothing,
    /// An error, which does not say what happened.
    Unknown,
}

impl Came {
    fn end(self, shared: &Shared, attempt: &Attempt, function: &Function) -> End {
        match self {
            Self::Value(Ok(json)) if json.len() <= shared.limits.response_body => {
                End::Complete(RecordedValue::encode(&json), None)
            }
            Self::Value(kept) => {
                if let Err(error) = kept {
                    let (error, function) = (&error as &dyn std::error::Error, function.path);
                    tracing::error!(error, function, "a value cannot be written as JSON");
                }
                End::Tombstone(RecordedValue::encode(b""), None)
            }
            // What its steps did has happened.
            Self::Nothing if attempt.has_steps() => End::Release,
            Self::Nothing => End::Forget,
            Self::Unknown => End::Release,
        }
    }
}

/// A call whose policy is known.
struct Calling {
    shared: Arc<Shared>,
    engine: Idempotency,
    function: &'static Function,
    policy: Arc<Resolved>,
    operation: Arc<str>,
    work: Work,
}

/// What became of a call whose key was claimed, or was to be.
enum Conducted {
    Ended(Result<(), CallError>),
    Waits(Box<Waiting>),
}

/// A call that waits for the value of the one that it repeats.
struct Waiting {
    calling: Box<Calling>,
    subject: Subject,
    call: Call,
}

fn conduct(given: FunctionCall, work: Work) -> BoxFuture<'static, Result<(), CallError>> {
    let FunctionCall { engine, function, arguments, compared } = given;
    let shared = Arc::clone(&engine.shared);
    let policy = shared.resolved(&function.policy);
    let operation = Arc::from(format!("fn {}", function.path));
    let calling = Box::new(Calling { shared, engine, function, policy, operation, work });
    async move {
        if calling.policy.mode == Mode::Off {
            return calling.run_unclaimed().await;
        }
        let (call, subject) = match calling.prepare(arguments, compared) {
            Ok(prepared) => prepared,
            Err(error) => {
                calling.tell(Outcome::Refused(error.kind()), None);
                return match calling.policy.mode {
                    Mode::Observe => calling.run_unclaimed().await,
                    Mode::Enforce | Mode::Off => Err(error),
                };
            }
        };
        let (shared, operation) = (Arc::clone(&calling.shared), Arc::clone(&calling.operation));
        let claimed = calling.claim(call, subject).boxed();
        match FinishAnyway::new(shared, operation, claimed).await {
            Conducted::Ended(ended) => ended,
            // Who waits has claimed nothing: a caller that goes away is gone at once.
            Conducted::Waits(waiting) => waiting.wait().await,
        }
    }
    .boxed()
}

impl Calling {
    /// Takes key, scope and fingerprint.
    fn prepare(
        &self,
        arguments: Arguments,
        compared: Result<Vec<(&'static str, [u8; 32])>, JsonError>,
    ) -> Result<(Call, Subject), CallError> {
        let options = &self.function.policy.options;
        if options.scope.is_none() && !self.shared.scope.is_global() {
            return Err(CallError::scope_unsaid());
        }
        // There is no request to read, and only arguments are asked for.
        let (head, ()) = http::Request::new(()).into_parts();
        let request = AnchorRequest { head: &head, parameters: &[], body: b"", names: &[] };
        let mut arguments = arguments.0.into_iter();
        let rules = KeyRules { format: None, longest: self.shared.limits.key_length };
        let (mut values, mut scope) = (Values::new(), Values::new());
        let anchor = &self.policy.anchor;
        anchor
            .collect(&request, &mut arguments, rules, &mut values)
            .map_err(|error| CallError::new(RefusalKind::KeyMalformed).caused_by(error))?;
        self.policy
            .scope
            .collect(&request, &mut arguments, &mut scope)
            .map_err(|error| CallError::new(RefusalKind::ScopeMissing).caused_by(error))?;
        let compared = compared
            .map_err(|error| CallError::new(RefusalKind::BodyMalformed).caused_by(error))?;

        // An engine's space is for the requests of an API: there, two functions that are called with
        // one value would refuse each other.
        let (space, name) = match options.space {
            Some(space) => (Space::Named(space), Some(self.function.name)),
            None => (Space::Function(self.function.path), None),
        };
        let subject = CallSubject { name, arguments: compared };
        let digester = &self.shared.digester;
        let call = Call::new(
            digester.key_and_scope(&mut Vec::new(), space, &scope, &values),
            Arc::clone(&self.operation),
            subject.fingerprint(digester),
            Arc::clone(&self.policy),
        );
        Ok((call, Subject { shared: Arc::clone(&self.shared), call: subject }))
    }

    async fn claim(self: Box<Self>, call: Call, mut subject: Subject) -> Conducted {
        let shared = Arc::clone(&self.shared);
        let enforced = self.policy.mode == Mode::Enforce;
        Conducted::Ended(match shared.admit(call, &mut subject).await {
            Admission::Run(run) => self.run(run).await,
            Admission::Replay { answer, operation_id } if enforced => {
                self.replay(answer, operation_id)
            }
            Admission::Replay { operation_id, .. } => {
                self.tell(Outcome::Replayed, Some(operation_id));
                self.run_unclaimed().await
            }
            Admission::Wait(call) => {
                return Conducted::Waits(Box::new(Waiting { calling: self, subject, call }));
            }
            Admission::Refuse(refusal, error) if enforced => Err(CallError::of(&refusal, error)),
            Admission::Refuse(..) | Admission::Unprotected => self.run_unclaimed().await,
        })
    }

    async fn run(self: Box<Self>, run: Run) -> Result<(), CallError> {
        run.give_way().await;
        let Self { shared, engine, function, policy, work: Work { run: body, read }, .. } = *self;
        let operation = Operation::default();
        operation.grant(&run.attempt);
        let operation_id = run.attempt.id;
        let carried = {
            let shared = Arc::clone(&shared);
            async move { shared.carried(|| body(engine, operation)).await }
        };
        let (came, end) = match AssertUnwindSafe(carried).catch_unwind().await {
            Ok(Some(came)) => (Ok(()), came.end(&shared, &run.attempt, function)),
            // Where idem only observes, a panic is the caller's own affair.
            Err(panic) if policy.mode == Mode::Observe => {
                let _ = run.end(End::Release).await;
                resume_unwind(panic);
            }
            Ok(None) | Err(_) => (
                Err(CallError::new(RefusalKind::HandlerPanicked).about(operation_id)),
                End::Release,
            ),
        };
        let (ended, _) = run.end(end).await;
        let lost = |id| Err(CallError::new(RefusalKind::LeaseLost).about(id));
        match ended {
            _ if policy.mode != Mode::Enforce => came,
            Ended::Own | Ended::Unrecorded => came,
            Ended::Theirs(Answer::Value(value), id) => read(&value.json).or_else(|_| lost(id)),
            Ended::Theirs(Answer::Response(_), id) => lost(id),
            Ended::Lost => lost(operation_id),
            // The claims of functions are under a lease.
            Ended::TransactionFailed | Ended::CommitUnknown => lost(operation_id),
        }
    }

    async fn run_unclaimed(self: Box<Self>) -> Result<(), CallError> {
        let Self { engine, work, .. } = *self;
        (work.run)(engine, Operation::default()).await;
        Ok(())
    }

    fn replay(&self, answer: Answer, id: OperationId) -> Result<(), CallError> {
        let read = self.work.read(answer);
        let outcome = match read {
            Ok(()) => Outcome::Replayed,
            Err(_) => Outcome::Refused(RefusalKind::RecordUnreadable),
        };
        self.tell(outcome, Some(id));
        read.map_err(|source| {
            CallError::new(RefusalKind::RecordUnreadable).about(id).caused_by(source)
        })
    }

    fn tell(&self, outcome: Outcome, operation_id: Option<OperationId>) {
        self.shared.observe(&Event {
            outcome,
            operation: &self.operation,
            operation_id,
            attempt: None,
            error: None,
            enforced: self.policy.mode == Mode::Enforce,
        });
    }
}

impl Work {
    /// Leaves a recorded value as the result.
    fn read(&self, answer: Answer) -> Result<(), Unreadable> {
        match answer {
            Answer::Value(value) => (self.read)(&value.json).map_err(Unreadable::Type),
            Answer::Response(_) => Err(Unreadable::Response),
        }
    }
}

/// Why a recorded answer is no value of the function.
#[derive(Debug, thiserror::Error)]
enum Unreadable {
    #[error("the function's value was recorded with another type")]
    Type(#[source] serde_json::Error),
    #[error("the record is that of a handler")]
    Response,
}

impl Waiting {
    async fn wait(mut self: Box<Self>) -> Result<(), CallError> {
        let bound = match self.calling.policy.in_flight {
            InFlight::Wait(bound) => bound,
            InFlight::Reject => Duration::ZERO,
        };
        let shared = Arc::clone(&self.calling.shared);
        match shared.wait(&self.call, bound, &mut self.subject).await {
            Admission::Replay { answer, operation_id } => self.calling.replay(answer, operation_id),
            Admission::Refuse(refusal, error) => Err(CallError::of(&refusal, error)),
            // Nobody who waited runs.
            Admission::Run(_) | Admission::Wait(_) | Admission::Unprotected => {
                Err(CallError::new(RefusalKind::InFlight))
            }
        }
    }
}

/// A call that can be compared with records of other deploys.
struct Subject {
    shared: Arc<Shared>,
    call: CallSubject,
}

impl Comparable for Subject {
    fn under_scheme<'a>(&'a mut self, scheme: &'a str) -> BoxFuture<'a, Compared> {
        let compared = match self.call.under_scheme(scheme, &self.shared.digester) {
            Ok(fingerprint) => Compared::Fingerprint(fingerprint),
            Err(Incomparable::Other) => Compared::Other,
            Err(Incomparable::Unknown) => Compared::Unable(RefusalKind::RecordUnreadable),
        };
        std::future::ready(compared).boxed()
    }
}
