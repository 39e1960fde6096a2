//! The life of a request, from its last extractor to its answer.

use std::{
    any::Any,
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use axum::{
    body::Body,
    extract::{FromRequestParts, MatchedPath, OriginalUri, RawPathParams, Request},
    response::Response,
};
use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, request::Parts};
use tokio::time::Instant;
use tracing::Instrument;

use super::{
    answer::{Refused, after_a_refusal, refuse, say, unprotected},
    body::{Bound, Buffered, buffer, whole},
    unclaimed::Unclaimed,
};
use crate::{
    anchor::{AnchorError, AnchorRequest, Arguments, KeyRules},
    builder::REPLAYED,
    decision::OnUnknown,
    detach::FinishAnyway,
    engine::{
        Admission, Call, Comparable, Compared, End, Ended, Run, Shared, later,
        transaction::{Slot, WrongTransaction},
    },
    fingerprint::{Subject, is_of_function, scheme_needs_body, under_scheme},
    hooks::{Denied, Fate, Recovery, ReplayShape, RequestContext, Settle},
    key::{Endpoint, OperationId, Space, Values},
    observer::{Event, Outcome},
    operation::{Attempt, Operation},
    policy::{InFlight, Mode, Resolved},
    record::{Answer, RecordedResponse, Ttl},
    refusal::{Refusal, RefusalKind},
};

/// Until when a request may wait for the answer of a running one, in its extensions: the bound of
/// whoever was asked first.
#[derive(Clone, Copy)]
struct WaitUntil(Instant);

/// What a handler came to.
pub(crate) enum Ran {
    Answered(Response),
    /// An extractor turned the request away; the handler did not start.
    Rejected(Response),
}

/// Runs the handler on a request that is whole again: head, and the body that was buffered.
pub(crate) type Runner = Box<dyn FnOnce(Box<Arrived>) -> BoxFuture<'static, Ran> + Send>;

/// A router's state, of whatever type.
pub(crate) type AnyState = Arc<dyn Any + Send + Sync>;

/// Serves a request whose handler takes it whole.
pub(crate) async fn serve(
    arrived: Box<Arrived>,
    policy: Arc<Resolved>,
    runner: Runner,
) -> Response {
    let conducting = match Exchange::open(arrived, policy).await {
        Opened::Keyed(exchange) => exchange.conduct(Arguments::new(), runner),
        Opened::Unkeyed(unkeyed) => Conducting::Unkeyed(unkeyed.conduct(runner).boxed()),
    };
    conducting.answered().await
}

/// A request, and whom it has reached. It stays where it is until its handler gets it.
pub(crate) struct Arrived {
    shared: Arc<Shared>,
    head: Parts,
    body: Content,
    state: AnyState,
}

impl Arrived {
    pub(crate) fn new(shared: Arc<Shared>, request: Request, state: AnyState) -> Box<Self> {
        let (head, body) = request.into_parts();
        Box::new(Self { shared, head, body: Content::Untouched(body), state })
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(crate) fn state(&self) -> AnyState {
        Arc::clone(&self.state)
    }

    /// The request, whole again.
    pub(crate) fn into_request(self) -> Request {
        Request::from_parts(self.head, self.body.into_body())
    }

    /// Reads the body, unless it was read before.
    async fn buffer(&mut self) -> Result<(), Bound> {
        let body = match std::mem::replace(&mut self.body, Content::Taken) {
            Content::Untouched(body) => body,
            other => {
                self.body = other;
                return Ok(());
            }
        };
        // How long a client may take for its request is for the server to say.
        match buffer(body, self.shared.limits.request_body, Duration::MAX).await {
            Buffered::Whole(bytes, trailers) => {
                self.body = Content::Buffered(bytes, trailers);
                Ok(())
            }
            Buffered::Beyond(body, bound) => {
                self.body = Content::Untouched(body);
                Err(bound)
            }
        }
    }

    /// The body as far as it was read.
    fn read(&self) -> Option<&Bytes> {
        match &self.body {
            Content::Buffered(bytes, _) => Some(bytes),
            Content::Untouched(_) | Content::Taken => None,
        }
    }

    fn slot(&mut self) -> Slot {
        self.head.extensions.get_or_insert_default::<Slot>().clone()
    }
}

/// A request, and the policy that it is under.
pub(crate) struct UnderPolicy {
    arrived: Box<Arrived>,
    policy: Arc<Resolved>,
}

/// A request whose head was read, and its body where that is needed.
pub(crate) struct Exchange {
    request: UnderPolicy,
    parameters: Vec<(String, String)>,
    endpoint: Endpoint,
    /// What the key is made of, once it was taken from the head.
    values: Option<Values>,
}

enum Content {
    /// All of it, and its trailers.
    Buffered(Bytes, Option<Box<HeaderMap>>),
    /// Nothing needed it.
    Untouched(Body),
    /// Nothing needed it, and the handler's own extractor has it.
    Taken,
}

impl Content {
    /// What is left of it for the handler.
    fn into_body(self) -> Body {
        match self {
            Self::Buffered(bytes, trailers) => whole(bytes, trailers),
            Self::Untouched(body) => body,
            Self::Taken => Body::empty(),
        }
    }
}

/// What a request turned out to be.
pub(crate) enum Opened {
    /// It is to be protected.
    Keyed(Exchange),
    /// It is not.
    Unkeyed(Unkeyed),
}

/// What becomes of a request without a usable key.
pub(crate) enum Unkeyed {
    /// It runs as plain axum.
    Plain(Box<Arrived>, Option<Box<Unclaimed>>),
    /// It runs although idem would refuse it, since idem only observes.
    Observed(UnderPolicy),
    /// It runs without protection, since its key is optional and not there.
    Unprotected(UnderPolicy),
    /// It is answered already.
    Refused(Box<Response>),
}

impl Exchange {
    /// Reads a request as far as its key needs.
    pub(crate) async fn open(mut arrived: Box<Arrived>, policy: Arc<Resolved>) -> Opened {
        if policy.mode == Mode::Off {
            let extensions = &mut arrived.head.extensions;
            let unclaimed = Unclaimed::of(&arrived.shared, &policy, extensions);
            return Opened::Unkeyed(Unkeyed::Plain(arrived, unclaimed));
        }
        mark!("request.received");
        let (parameters, readable) = parameters(&mut arrived.head).await;
        let endpoint = endpoint(&arrived.head, &parameters, &policy);
        mark!("request.head.read");
        let request = UnderPolicy { arrived, policy };
        let mut exchange = Self { request, parameters, endpoint, values: None };
        if !readable {
            let refusal = Refusal::new(RefusalKind::KeyMalformed)
                .with_detail("A parameter in the path is not UTF-8.");
            return Opened::Unkeyed(exchange.refused(refusal));
        }
        // A key in the head that is missing or malformed is found before a body is waited for.
        let anchor = &exchange.request.policy.anchor;
        if !anchor.needs_body() && !anchor.needs_arguments() {
            match exchange.read_values(&mut std::iter::empty()) {
                Ok(values) => exchange.values = Some(values),
                Err(error) => return Opened::Unkeyed(exchange.without_key(&error)),
            }
        }
        let UnderPolicy { arrived, policy } = &mut exchange.request;
        let needs_body = policy.anchor.needs_body()
            || policy.scope.needs_body()
            || policy.fingerprint.needs_body();
        if needs_body && let Err(bound) = arrived.buffer().await {
            let kind = match bound {
                Bound::Size => RefusalKind::BodyTooLarge,
                Bound::Broken | Bound::Time => RefusalKind::BodyMalformed,
            };
            return Opened::Unkeyed(exchange.refused(Refusal::new(kind)));
        }
        mark!("request.read");
        Opened::Keyed(exchange)
    }

    /// What an extractor of the handler gets that is run before the claim: everything that it
    /// reads is still there.
    pub(crate) fn for_extractor(&mut self) -> Box<Arrived> {
        let arrived = &mut self.request.arrived;
        let inner = Operation::of(&mut arrived.head.extensions).inner();
        arrived.slot();
        let body = match &mut arrived.body {
            Content::Buffered(bytes, trailers) => {
                Content::Buffered(bytes.clone(), trailers.clone())
            }
            body => std::mem::replace(body, Content::Taken),
        };
        let mut head = arrived.head.clone();
        head.extensions.insert(inner);
        Box::new(Arrived {
            shared: Arc::clone(&arrived.shared),
            head,
            body,
            state: arrived.state(),
        })
    }

    fn anchor_request(&self) -> AnchorRequest<'_> {
        let body = self.request.arrived.read().map_or(&b""[..], AsRef::as_ref);
        AnchorRequest {
            head: &self.request.arrived.head,
            parameters: &self.parameters,
            body,
            names: &self.request.policy.headers,
        }
    }

    fn read_values(
        &self,
        arguments: &mut dyn Iterator<Item = Values>,
    ) -> Result<Values, AnchorError> {
        let mut values = Values::new();
        let rules =
            KeyRules { format: None, longest: self.request.arrived.shared.limits.key_length };
        self.request.policy.anchor.collect(
            &self.anchor_request(),
            arguments,
            rules,
            &mut values,
        )?;
        Ok(values)
    }

    /// A request without a usable key runs as plain axum where that is allowed.
    fn without_key(self, error: &AnchorError) -> Unkeyed {
        if self.request.policy.optional && matches!(error, AnchorError::Missing { .. }) {
            self.tell(Outcome::Unprotected, None);
            return Unkeyed::Unprotected(self.request);
        }
        self.refused(Refusal::of_key(error))
    }

    /// A refusal before any look-up; where idem only observes, the request runs all the same.
    fn refused(self, refusal: Refusal) -> Unkeyed {
        self.tell(Outcome::Refused(refusal.kind()), None);
        match self.request.policy.mode {
            Mode::Observe => Unkeyed::Observed(self.request),
            Mode::Enforce | Mode::Off => Unkeyed::Refused(Box::new(self.request.render(refusal))),
        }
    }

    fn tell(&self, outcome: Outcome, operation_id: Option<OperationId>) {
        self.request.arrived.shared.observe(&Event {
            outcome,
            operation: self.endpoint.text(),
            operation_id,
            attempt: None,
            error: None,
            enforced: self.request.policy.mode == Mode::Enforce,
        });
    }

    /// Takes key, scope and fingerprint, to claim, run and record.
    pub(crate) fn conduct(mut self, arguments: Arguments, runner: Runner) -> Conducting {
        match self.call(arguments) {
            Ok(call) => {
                mark!("request.keyed");
                let shared = Arc::clone(&self.request.arrived.shared);
                let operation = Arc::clone(&call.claim.operation);
                let claimed = self.claim(call, runner);
                Conducting::Claiming(FinishAnyway::new(shared, operation, claimed))
            }
            Err(unusable) => {
                let unkeyed = match unusable {
                    Unusable::Key(error) => self.without_key(&error),
                    Unusable::Other(refusal) => self.refused(refusal),
                };
                Conducting::Unkeyed(unkeyed.conduct(runner).boxed())
            }
        }
    }

    fn call(&mut self, arguments: Arguments) -> Result<Call, Unusable> {
        let mut arguments = arguments.0.into_iter();
        let values = match self.values.take() {
            Some(values) => values,
            None => self.read_values(&mut arguments).map_err(Unusable::Key)?,
        };
        let mut scope = Values::new();
        self.request
            .policy
            .scope
            .collect(&self.anchor_request(), &mut arguments, &mut scope)
            .map_err(|error| Unusable::Other(Refusal::of_scope(&error)))?;
        let digester = &self.request.arrived.shared.digester;
        let mut buffer = Vec::with_capacity(256);
        let scheme = &self.request.policy.fingerprint;
        let fingerprint =
            scheme.fingerprint(digester, &mut buffer, &self.subject()).map_err(|error| {
                let refusal = Refusal::new(RefusalKind::BodyMalformed);
                Unusable::Other(refusal.with_detail(format!("{error}.")))
            })?;
        let space = match self.request.policy.space {
            Some(name) => Space::Named(name),
            None if self.request.policy.is_layer => Space::Layer(&self.endpoint),
            None => Space::Operation(&self.endpoint),
        };
        let key = digester.key_and_scope(&mut buffer, space, &scope, &values);
        let operation = Arc::clone(self.endpoint.text());
        Ok(Call::new(key, operation, fingerprint, Arc::clone(&self.request.policy)))
    }

    fn subject(&self) -> Subject<'_> {
        let request = self.anchor_request();
        Subject {
            endpoint: self.request.policy.space.map(|_| &self.endpoint),
            query: request.head.uri.query().unwrap_or_default(),
            headers: &request.head.headers,
            body: request.body,
        }
    }

    // Each request has one of these on the heap: what is rare in it stands in a box of its own, and
    // what is common is moved as little as may be.
    fn claim(mut self, call: Call, runner: Runner) -> BoxFuture<'static, Conducted> {
        async move {
            let known = self.request.arrived.head.extensions.get::<Operation>();
            let outer = known.and_then(|known| {
                known.claimed_further_out(&self.request.arrived.shared, &call.claim.key)
            });
            mark!("request.claiming");
            let until = self.may_wait_until();
            let shared = Arc::clone(&self.request.arrived.shared);
            let enforced = self.request.policy.mode == Mode::Enforce;
            let run = {
                let admission = match (outer, self.request.policy.transaction) {
                    // One key has one record: the claim that this request has already protects this run,
                    // too.
                    (Some(outer), false) => {
                        return Conducted::Answered(self.run_within(&outer, runner).boxed().await);
                    }
                    // But that record is written after the commit, and a crash in between would be a
                    // rerun.
                    (Some(_), true) => shared.wrong(&call, WrongTransaction::ClaimedFurtherOut),
                    (None, true) => {
                        let slot = self.request.arrived.slot();
                        shared.begin(call, &slot, &mut self).boxed().await
                    }
                    (None, false) => shared.admit(call, &mut self).await,
                };
                match admission {
                    Admission::Run(run) => run,
                    Admission::Wait(call) => {
                        return Conducted::Waits(Box::new(Waiting { exchange: self, call, until }));
                    }
                    Admission::Refuse(refusal, _) if enforced => {
                        return Conducted::Answered(self.request.render(refusal));
                    }
                    Admission::Replay { answer, operation_id } => {
                        self.tell(Outcome::Replayed, Some(operation_id));
                        return Conducted::Answered(match enforced {
                            true => self.request.replay(answer, operation_id),
                            false => self.request.run_unclaimed(runner).boxed().await,
                        });
                    }
                    Admission::Refuse(..) => {
                        return Conducted::Answered(
                            self.request.run_unclaimed(runner).boxed().await,
                        );
                    }
                    Admission::Unprotected => {
                        let response = self.request.run_unclaimed(runner).boxed().await;
                        return Conducted::Answered(unprotected(response));
                    }
                }
            };
            run.give_way().await;
            Conducted::Answered(self.request.run(run, runner).await)
        }
        .boxed()
    }

    /// Until when this request may wait, here or further in, if it may wait here.
    fn may_wait_until(&mut self) -> Option<Instant> {
        let InFlight::Wait(bound) = self.request.policy.in_flight else { return None };
        if !self.request.policy.waits() {
            return None;
        }
        let head = &mut self.request.arrived.head;
        let bound = preferred_wait(&head.headers).map_or(bound, |wait| wait.min(bound));
        let own = later(Instant::now(), bound);
        let outer = head.extensions.get().map(|WaitUntil(outer)| *outer);
        let until = outer.map_or(own, |outer| outer.min(own));
        head.extensions.insert(WaitUntil(until));
        Some(until)
    }

    /// Runs the handler under the claim of whoever handed the request on. What the handler says of
    /// unknown outcomes holds all the same.
    async fn run_within(mut self, outer: &Attempt, runner: Runner) -> Response {
        let operation = Operation::of(&mut self.request.arrived.head.extensions);
        let is_refused = self.request.policy.on_unknown == OnUnknown::Refuse
            && self.request.policy.mode == Mode::Enforce
            && outer.number > 1;
        match self.request.recovered(outer, &operation).await {
            Some(Recovery::Answered(response)) => {
                let mut response = response.map(Body::new);
                response.extensions_mut().insert(Settle::recorded());
                response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
                response
            }
            None if !is_refused => self.request.run_unclaimed(runner).await,
            Some(Recovery::NeverHappened) => self.request.run_unclaimed(runner).await,
            Some(Recovery::Unknown) | None => {
                let kind = RefusalKind::UnknownOutcome;
                self.tell(Outcome::Refused(kind), Some(outer.id));
                self.request.render(Refusal::new(kind).about(outer.id))
            }
        }
    }
}

impl UnderPolicy {
    /// Asks the application whether a request that would run may, and otherwise for its answer.
    async fn ask_to_admit(&mut self, operation: &Operation) -> Result<(), Response> {
        let Some(admit) = self.policy.admit else { return Ok(()) };
        let context = self.context(operation);
        admit(context).await.map_err(|Denied(response)| response.map(Body::new))
    }

    /// What `admit` and `recover` functions see.
    fn context(&self, operation: &Operation) -> RequestContext {
        let body = self.arrived.read().cloned().unwrap_or_default();
        let (operation, head) = (operation.clone(), self.arrived.head.clone());
        RequestContext { operation, head, body, state: self.arrived.state() }
    }

    /// The request of a handler that runs without a claim, if the application admits it: its limits
    /// hold for every run, or a request without a key would pass them by.
    pub(crate) async fn admitted(
        mut self,
    ) -> Result<(Box<Arrived>, Option<Box<Unclaimed>>), Response> {
        let operation = Operation::of(&mut self.arrived.head.extensions);
        self.ask_to_admit(&operation).await?;
        let Self { mut arrived, policy } = self;
        let unclaimed = Unclaimed::of(&arrived.shared, &policy, &mut arrived.head.extensions);
        Ok((arrived, unclaimed))
    }

    async fn run_unclaimed(self, runner: Runner) -> Response {
        match self.admitted().await {
            Ok((arrived, unclaimed)) => plain(arrived, unclaimed, runner).await,
            Err(denied) => denied,
        }
    }

    /// Runs the handler under its claim, and says what came of it.
    fn run(mut self, run: Run, runner: Runner) -> impl Future<Output = Response> {
        mark!("run.starting");
        let (shared, policy) = (Arc::clone(&self.arrived.shared), Arc::clone(&self.policy));
        let operation = Operation::granted(&mut self.arrived.head.extensions, &run.attempt);
        let operation_id = run.attempt.id;
        // On the level that services run with: what a handler logs in production is to lead to its
        // record. Without a subscriber it costs a comparison.
        let span = tracing::info_span!(
            "idempotent",
            operation = run.operation(),
            %operation_id,
            attempt = run.attempt.number,
        );
        async move {
            let work = AssertUnwindSafe(self.work(&run, &operation, runner).instrument(span));
            let (response, end, panicked) = match work.catch_unwind().await {
                Ok(Some((response, end))) => (Some(response), end, None),
                Ok(None) => (None, End::Release, None),
                Err(panic) => (None, End::Release, Some(panic)),
            };
            let (ended, outcome) = run.end(end).await;
            // Where idem only observes, a panic is the server's own affair.
            if let Some(panic) = panicked
                && policy.mode == Mode::Observe
            {
                std::panic::resume_unwind(panic);
            }
            let (mut response, operation_id) =
                owners(&shared, &policy, ended, response, operation_id);
            say(&shared, &policy, &mut response, outcome, Some(operation_id));
            mark!("response.ready");
            response
        }
    }

    /// Asks the application what an earlier attempt came to, and whether this one may run; then
    /// runs it. Everything of the application's is in here, up to the last piece of its response's
    /// body; `None` if it threw the work away.
    async fn work(
        mut self,
        run: &Run,
        operation: &Operation,
        runner: Runner,
    ) -> Option<(Response, End)> {
        let asks = self.policy.recover.is_some() || self.policy.admit.is_some();
        if asks && let Some(answered) = self.ask_before(run, operation).boxed().await {
            return Some(answered);
        }
        let Self { arrived, policy } = self;
        let shared = Arc::clone(&arrived.shared);
        mark!("handler.starting");
        let mut response = match shared.carried(|| runner(arrived)).await? {
            Ran::Answered(response) => response,
            Ran::Rejected(response) => return Some((response, End::Forget)),
        };
        mark!("handler.returned");
        let refused = response.extensions().get().map(|Refused(kind)| *kind);
        // What a handler says of its answer holds for whoever claimed further out, too.
        let said = response.extensions().get::<Settle>().copied();
        let settle = match refused {
            // Before a handler asked whoever refused it, it may have done something. What a layer
            // hands on has been done by nobody.
            Some(_) if !policy.is_layer && response.status().is_server_error() => {
                Settle::uncertain()
            }
            Some(kind) => after_a_refusal(kind),
            None => said.unwrap_or(Settle::BY_POLICY),
        };
        if settle.keeps_effects {
            run.keep_effects();
        }
        let end = weigh(&shared, &policy, &mut response, settle).await;
        mark!("response.weighed");
        let by_handler = refused.is_none() && settle.fate == Fate::Forget;
        Some(match end {
            End::Forget if !by_handler && run.attempt.has_steps() => (response, End::Release),
            end => (response, end),
        })
    }

    /// What the application says that an earlier attempt came to, if it is to be asked.
    async fn recovered(&mut self, attempt: &Attempt, operation: &Operation) -> Option<Recovery> {
        let is_asked = self.policy.on_unknown == OnUnknown::Recover
            && self.policy.mode == Mode::Enforce
            && attempt.number > 1;
        let recover = self.policy.recover.filter(|_| is_asked)?;
        mark!("recover.before");
        let recovered = recover(self.context(operation)).await.0;
        mark!("recover.answered");
        Some(recovered)
    }

    /// Asks the application, before its handler starts, where it wants to be asked; what it says
    /// may be the answer already.
    async fn ask_before(&mut self, run: &Run, operation: &Operation) -> Option<(Response, End)> {
        match self.recovered(&run.attempt, operation).await {
            Some(Recovery::Answered(response)) => {
                let (mut response, settle) = (response.map(Body::new), Settle::recorded());
                let shared = &self.arrived.shared;
                let end = weigh(shared, &self.policy, &mut response, settle).await;
                response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
                return Some((response, end));
            }
            Some(Recovery::Unknown) => {
                let refusal = Refusal::new(RefusalKind::UnknownOutcome).about(run.attempt.id);
                return Some((self.render(refusal), End::Release));
            }
            Some(Recovery::NeverHappened) | None => {}
        }
        match AssertUnwindSafe(self.ask_to_admit(operation)).catch_unwind().await {
            Ok(Ok(())) => None,
            Ok(Err(denied)) => Some((denied, End::Forget)),
            // The handler did not start: nothing is unknown.
            Err(_) if self.policy.mode == Mode::Enforce => {
                let refusal = Refusal::new(RefusalKind::HandlerPanicked).about(run.attempt.id);
                Some((self.render(refusal), End::Forget))
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    fn render(&self, refusal: Refusal) -> Response {
        mark!("refusal.before");
        let (outcome, operation_id) = (Outcome::Refused(refusal.kind()), refusal.operation_id());
        let shared = &self.arrived.shared;
        let mut response = refuse(shared, &self.policy, refusal);
        say(shared, &self.policy, &mut response, outcome, operation_id);
        response
    }

    fn replay(&self, recorded: Answer, operation_id: OperationId) -> Response {
        mark!("replay.before");
        match replayed(recorded, self.policy.replay) {
            Some(mut response) => {
                let (outcome, id) = (Outcome::Replayed, Some(operation_id));
                say(&self.arrived.shared, &self.policy, &mut response, outcome, id);
                response
            }
            None => self.render(Refusal::new(RefusalKind::RecordUnreadable).about(operation_id)),
        }
    }
}

/// What an owner answers after its end, and which operation that is of: its own response, unless
/// there is none or it may not be sent.
fn owners(
    shared: &Shared,
    policy: &Resolved,
    ended: Ended,
    response: Option<Response>,
    operation_id: OperationId,
) -> (Response, OperationId) {
    let refused = |kind, id| refuse(shared, policy, Refusal::new(kind).about(id));
    let own = || response.unwrap_or_else(|| refused(RefusalKind::HandlerPanicked, operation_id));
    let lost = |id| refused(RefusalKind::LeaseLost, id);
    match ended {
        // What the handler says is not true, or may not be.
        Ended::TransactionFailed => {
            (refused(RefusalKind::TransactionFailed, operation_id), operation_id)
        }
        Ended::CommitUnknown => (refused(RefusalKind::CommitUnknown, operation_id), operation_id),
        _ if policy.mode != Mode::Enforce => (own(), operation_id),
        Ended::Own | Ended::Unrecorded => (own(), operation_id),
        Ended::Theirs(theirs, id) => match replayed(theirs, policy.replay) {
            Some(response) => (response, id),
            None => (lost(id), id),
        },
        Ended::Lost => (lost(operation_id), operation_id),
    }
}

/// What became of a request whose key was claimed, or was to be.
pub(crate) enum Conducted {
    Answered(Response),
    Waits(Box<Waiting>),
}

/// A request that waits for the answer of the one that it repeats.
pub(crate) struct Waiting {
    exchange: Exchange,
    call: Call,
    until: Option<Instant>,
}

/// How a request is being answered.
pub(crate) enum Conducting {
    /// Without a claim.
    Unkeyed(BoxFuture<'static, Response>),
    /// By a claim and what comes of it.
    Claiming(FinishAnyway<Conducted>),
}

impl Conducting {
    pub(crate) async fn answered(self) -> Response {
        let conducted = match self {
            Self::Unkeyed(answered) => return answered.await,
            Self::Claiming(claiming) => claiming.await,
        };
        match conducted {
            Conducted::Answered(response) => {
                mark!("request.answered");
                response
            }
            // Who waits has claimed nothing: a client that hangs up is gone at once.
            Conducted::Waits(waiting) => waiting.wait().boxed().await,
        }
    }
}

impl Waiting {
    async fn wait(self) -> Response {
        let Self { mut exchange, call, until } = self;
        let shared = Arc::clone(&exchange.request.arrived.shared);
        let left = |until: Instant| until.saturating_duration_since(Instant::now());
        let bound = until.map_or(Duration::ZERO, left);
        match shared.wait(&call, bound, &mut exchange).await {
            Admission::Replay { answer, operation_id } => {
                exchange.tell(Outcome::Replayed, Some(operation_id));
                exchange.request.replay(answer, operation_id)
            }
            Admission::Refuse(refusal, _) => exchange.request.render(refusal),
            // Nobody who waited runs.
            Admission::Run(_) | Admission::Wait(_) | Admission::Unprotected => {
                exchange.request.render(Refusal::new(RefusalKind::InFlight))
            }
        }
    }
}

/// How long the client would wait (RFC 7240 §4.3). Preferences are hints: one that cannot be read
/// is none.
fn preferred_wait(headers: &HeaderMap) -> Option<Duration> {
    headers.get_all("prefer").iter().find_map(|line| {
        // Names of preferences are not case-sensitive; those of dictionaries are in lower case.
        let line = line.to_str().ok()?.to_ascii_lowercase();
        let preferences: sfv::Dictionary = sfv::Parser::new(&line).parse().ok()?;
        let wait = preferences.into_iter().find(|(name, _)| name.as_str() == "wait")?;
        let sfv::ListEntry::Item(sfv::Item { bare_item: sfv::BareItem::Integer(seconds), .. }) =
            wait.1
        else {
            return None;
        };
        u64::try_from(i64::from(seconds)).ok().map(Duration::from_secs)
    })
}

impl Comparable for Exchange {
    fn under_scheme<'a>(&'a mut self, scheme: &'a str) -> BoxFuture<'a, Compared> {
        async move {
            if scheme_needs_body(scheme) {
                match self.request.arrived.buffer().await {
                    Ok(()) if matches!(self.request.arrived.body, Content::Taken) => {
                        return Compared::Unable(RefusalKind::RecordUnreadable);
                    }
                    Ok(()) => {}
                    // None that is as large was ever recorded under a scheme that covers it.
                    Err(Bound::Size) => return Compared::Other,
                    Err(_) => return Compared::Unable(RefusalKind::BodyMalformed),
                }
            }
            match under_scheme(scheme, &self.request.arrived.shared.digester, &self.subject()) {
                Some(Ok(fingerprint)) => Compared::Fingerprint(fingerprint),
                Some(Err(_)) => Compared::Other,
                None if is_of_function(scheme) => Compared::Other,
                None => Compared::Unable(RefusalKind::RecordUnreadable),
            }
        }
        .boxed()
    }
}

/// Why a request cannot be protected.
enum Unusable {
    Key(AnchorError),
    Other(Refusal),
}

impl Unkeyed {
    async fn conduct(self, runner: Runner) -> Response {
        match self {
            Self::Plain(arrived, unclaimed) => plain(arrived, unclaimed, runner).await,
            Self::Observed(request) => request.run_unclaimed(runner).await,
            Self::Unprotected(request) => unprotected(request.run_unclaimed(runner).await),
            Self::Refused(response) => *response,
        }
    }
}

/// Runs a handler as plain axum does.
async fn plain(
    arrived: Box<Arrived>,
    unclaimed: Option<Box<Unclaimed>>,
    runner: Runner,
) -> Response {
    let work = async move {
        match runner(arrived).await {
            Ran::Answered(response) | Ran::Rejected(response) => response,
        }
    };
    match unclaimed {
        Some(unclaimed) => unclaimed.run(work).await,
        None => work.await,
    }
}

/// Says what an answer means for its record. Its body is there afterwards as before.
fn weigh<'a>(
    shared: &'a Shared,
    policy: &Resolved,
    response: &'a mut Response,
    settle: Settle,
) -> impl Future<Output = End> + use<'a> {
    let status = response.status();
    let uncertain = status.is_server_error()
        || status == StatusCode::REQUEST_TIMEOUT
        || status.is_informational();
    let fate = match settle.fate {
        Fate::ByPolicy if policy.record.covers(status.as_u16()) => Fate::Record,
        Fate::ByPolicy if uncertain => Fate::Release,
        Fate::ByPolicy => Fate::Forget,
        fate => fate,
    };
    let ttl = settle.ttl;
    async move {
        match fate {
            Fate::Release => return End::Release,
            Fate::Forget => return End::Forget,
            Fate::Tombstone => return tombstone(status, ttl),
            Fate::Record | Fate::ByPolicy => {}
        }
        let body = std::mem::take(response.body_mut());
        let limits = &shared.limits;
        match buffer(body, limits.response_body, limits.response_time).await {
            Buffered::Whole(bytes, None) => {
                let end = End::Complete(recorded(shared, response, &bytes), ttl);
                *response.body_mut() = Body::from(bytes);
                end
            }
            // The fact is recorded before the first byte leaves; the rest is streamed.
            Buffered::Whole(bytes, trailers) => {
                *response.body_mut() = whole(bytes, trailers);
                tombstone(status, ttl)
            }
            Buffered::Beyond(body, _) => {
                *response.body_mut() = body;
                tombstone(status, ttl)
            }
        }
    }
}

/// An answer as it is recorded.
fn recorded(shared: &Shared, response: &Response, body: &[u8]) -> Bytes {
    let headers = response.headers();
    warn_of_outer_headers(shared, headers);
    let nominated = nominated(headers);
    let lines = || headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
    let kept = lines()
        .filter(|(name, _)| {
            !shared.leaves_out(name) && !nominated.iter().any(|other| name == other)
        })
        .map(|(name, value)| (name.as_bytes(), value));
    // Rarely is one left out, and a little room too much does no harm.
    let size =
        lines().map(|(name, value)| RecordedResponse::line_size(name.as_bytes(), value)).sum();
    RecordedResponse::encode_lines(response.status().as_u16(), size, kept, body)
}

/// The headers that are the connection's because it says so (RFC 9110 §7.6.1).
fn nominated(headers: &HeaderMap) -> Vec<String> {
    let lines = headers.iter().filter(|(name, _)| **name == header::CONNECTION);
    let lines = lines.filter_map(|(_, line)| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(|name| name.trim().to_ascii_lowercase()).collect()
}

fn tombstone(status: StatusCode, ttl: Option<Ttl>) -> End {
    End::Tombstone(RecordedResponse::encode(status.as_u16(), &[], b""), ttl)
}

/// What only layers set belongs outside of idem: a replay under another origin, encoding or
/// request id would be wrong.
fn warn_of_outer_headers(shared: &Shared, headers: &HeaderMap) {
    const OUTER: [HeaderName; 3] = [
        header::CONTENT_ENCODING,
        header::ACCESS_CONTROL_ALLOW_ORIGIN,
        HeaderName::from_static("x-request-id"),
    ];
    let told = &shared.warned_of_outer_headers;
    if told.load(Ordering::Relaxed) {
        return;
    }
    if let Some(name) = headers.keys().find(|name| OUTER.contains(name))
        && !told.swap(true, Ordering::Relaxed)
    {
        tracing::warn!(
            header = name.as_str(),
            "a recorded answer has a header that a layer usually sets: put compression, CORS and \
             request-id layers outside of the idempotent handler, or leave the header out",
        );
    }
}

/// A recorded answer as a response, in the shape that the policy gives to replays; `None` if it
/// cannot be one.
pub(super) fn replayed(recorded: Answer, shape: Option<ReplayShape>) -> Option<Response> {
    let Answer::Response(recorded) = recorded else { return None };
    let mut response = http::Response::new(recorded.body);
    *response.status_mut() = StatusCode::from_u16(recorded.status).ok()?;
    let headers = response.headers_mut();
    // With room for what is said beside it.
    *headers = HeaderMap::with_capacity(recorded.headers.len() + 2);
    for (name, value) in recorded.headers {
        let name = HeaderName::from_bytes(&name).ok()?;
        headers.append(name, HeaderValue::from_maybe_shared(value).ok()?);
    }
    headers.insert(REPLAYED, HeaderValue::from_static("true"));
    let response = match shape {
        Some(shape) => shape.apply(response)?,
        None => response,
    };
    Some(response.map(Body::from))
}

/// The decoded parameters of the matched route, and whether all of them are UTF-8.
async fn parameters(head: &mut Parts) -> (Vec<(String, String)>, bool) {
    use axum::extract::rejection::RawPathParamsRejection::InvalidUtf8InPathParam;
    match RawPathParams::from_request_parts(head, &()).await {
        Ok(parameters) => {
            let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
            (parameters.iter().map(owned).collect(), true)
        }
        Err(InvalidUtf8InPathParam(_)) => (Vec::new(), false),
        Err(_) => (Vec::new(), true),
    }
}

/// The operation that a request asks for, as a policy has it.
pub(super) fn endpoint(
    head: &Parts,
    parameters: &[(String, String)],
    policy: &Resolved,
) -> Endpoint {
    let method = head.method.as_str();
    match head.extensions.get::<MatchedPath>() {
        Some(route) => {
            let spelt: Vec<_> = parameters
                .iter()
                .map(|(name, value)| policy.anchor.spelling(name, value))
                .collect();
            let route = policy.routes.get(method, Some(route.as_str()));
            Endpoint::matched(route, spelt.iter().map(AsRef::as_ref))
        }
        None => {
            let original = head.extensions.get::<OriginalUri>();
            let path = original.map_or(&head.uri, |OriginalUri(uri)| uri).path();
            Endpoint::unmatched(policy.routes.get(method, None), path)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Anchor, Idempotency, Policy, Scope, store::MemoryStore};

    /// Beyond 1,032 bytes glibc keeps no block at hand for the thread that asks: one such block a
    /// request, and its allocator does more than all of the engine.
    #[test]
    fn what_a_request_has_on_the_heap_is_small() {
        const POLICY: Policy = Policy::new(Anchor::header("Idempotency-Key"));
        let engine = Idempotency::builder(MemoryStore::new()).scope(Scope::global()).build();
        let policy = engine.shared.resolved(&POLICY);
        let arrived = || {
            let request = http::Request::post("/").header("Idempotency-Key", "k");
            let request = request.body(Body::empty()).unwrap();
            Arrived::new(Arc::clone(&engine.shared), request, Arc::new(()))
        };
        let runner: fn() -> Runner = || Box::new(|_| std::future::pending().boxed());

        assert!(size_of_val(&*arrived()) <= 512);
        // A part of the handler's own future, which is on the heap as well.
        assert!(size_of_val(&serve(arrived(), Arc::clone(&policy), runner())) <= 512);
        let opened = Exchange::open(arrived(), Arc::clone(&policy)).now_or_never();
        let Some(Opened::Keyed(mut exchange)) = opened else { panic!("it has a key") };
        let Ok(call) = exchange.call(Arguments::new()) else { panic!("it has a key") };
        assert!(size_of_val(&*call.claim) <= 512);
        assert!(size_of_val(&*exchange.claim(call, runner())) <= 1_032);
    }
}
