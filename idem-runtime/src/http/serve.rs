//! The life of a request, from its last extractor to its answer.

use std::{any::Any, panic::AssertUnwindSafe, sync::Arc, time::Duration};

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
    anchor::{Anchor, AnchorError, AnchorRequest, Arguments, KeyRules},
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
    policy::{InFlight, Mode, Policy, Resolved},
    record::{Answer, RecordedResponse, Ttl},
    refusal::{Refusal, RefusalKind},
    store::Claim,
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

/// Runs the handler. The request is whole again: head, and the body that was buffered.
pub(crate) type Runner = Box<dyn FnOnce(Request) -> BoxFuture<'static, Ran> + Send>;

/// A router's state, of whatever type.
pub(crate) type AnyState = Arc<dyn Any + Send + Sync>;

/// Serves a request whose handler takes it whole.
pub(crate) fn serve(
    shared: Arc<Shared>,
    policy: &Policy,
    request: Request,
    state: AnyState,
    runner: Runner,
) -> BoxFuture<'static, Response> {
    let policy = policy.resolve(&shared.options, shared.scope);
    serve_under(shared, policy, request, state, runner)
}

/// Serves a request under a policy in which everything is said.
pub(super) fn serve_under(
    shared: Arc<Shared>,
    policy: Resolved,
    request: Request,
    state: AnyState,
    runner: Runner,
) -> BoxFuture<'static, Response> {
    async move {
        match Exchange::open(shared, policy, request, state).await {
            Opened::Keyed(exchange) => exchange.conduct(Arguments::new(), runner).await,
            Opened::Unkeyed(unkeyed) => unkeyed.conduct(runner).await,
        }
    }
    .boxed()
}

/// A request whose head was read, and its body where that is needed.
pub(crate) struct Exchange {
    shared: Arc<Shared>,
    policy: Resolved,
    head: Parts,
    body: Content,
    parameters: Vec<(String, String)>,
    endpoint: Endpoint,
    state: AnyState,
}

enum Content {
    /// All of it, and its trailers.
    Buffered(Bytes, Option<HeaderMap>),
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
    Keyed(Box<Exchange>),
    /// It is not.
    Unkeyed(Unkeyed),
}

/// What becomes of a request without a usable key.
pub(crate) enum Unkeyed {
    /// It runs as plain axum.
    Plain(Box<Request>, Option<Box<Unclaimed>>),
    /// It runs although idem would refuse it, since idem only observes.
    Observed(Box<Exchange>),
    /// It runs without protection, since its key is optional and not there.
    Unprotected(Box<Exchange>),
    /// It is answered already.
    Refused(Box<Response>),
}

impl Exchange {
    /// Reads a request as far as its key needs.
    pub(crate) async fn open(
        shared: Arc<Shared>,
        policy: Resolved,
        request: Request,
        state: AnyState,
    ) -> Opened {
        if policy.mode == Mode::Off {
            let mut request = Box::new(request);
            let unclaimed = Unclaimed::of(&shared, &policy, request.extensions_mut());
            return Opened::Unkeyed(Unkeyed::Plain(request, unclaimed));
        }
        mark!("request.received");
        let (mut head, body) = request.into_parts();
        let (parameters, readable) = parameters(&mut head).await;
        let endpoint = endpoint(&head, &parameters, &policy.anchor);
        mark!("request.head.read");
        let body = Content::Untouched(body);
        let mut exchange = Self { shared, policy, head, body, parameters, endpoint, state };
        if !readable {
            let refusal = Refusal::new(RefusalKind::KeyMalformed)
                .with_detail("A parameter in the path is not UTF-8.");
            return Opened::Unkeyed(exchange.refused(refusal));
        }
        // A key in the head that is missing or malformed is found before a body is waited for.
        let in_head = !policy.anchor.needs_body() && !policy.anchor.needs_arguments();
        if in_head && let Err(error) = exchange.values(&mut std::iter::empty()) {
            return Opened::Unkeyed(exchange.without_key(&error));
        }
        let needs_body = policy.anchor.needs_body()
            || policy.scope.needs_body()
            || policy.fingerprint.needs_body();
        if needs_body && let Err(bound) = exchange.buffer().await {
            let kind = match bound {
                Bound::Size => RefusalKind::BodyTooLarge,
                Bound::Broken | Bound::Time => RefusalKind::BodyMalformed,
            };
            return Opened::Unkeyed(exchange.refused(Refusal::new(kind)));
        }
        mark!("request.read");
        Opened::Keyed(Box::new(exchange))
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

    /// Whether an extractor of the handler can be run before the claim: everything that it reads
    /// is still there.
    pub(crate) fn request_for_extractor(&mut self) -> Request {
        let inner = Operation::of(&mut self.head.extensions).inner();
        self.slot();
        let body = match &self.body {
            Content::Buffered(bytes, trailers) => whole(bytes.clone(), trailers.clone()),
            Content::Untouched(_) | Content::Taken => {
                std::mem::replace(&mut self.body, Content::Taken).into_body()
            }
        };
        let mut head = self.head.clone();
        head.extensions.insert(inner);
        Request::from_parts(head, body)
    }

    fn slot(&mut self) -> Slot {
        self.head.extensions.get_or_insert_default::<Slot>().clone()
    }

    fn anchor_request(&self) -> AnchorRequest<'_> {
        let body = match &self.body {
            Content::Buffered(bytes, _) => bytes.as_ref(),
            Content::Untouched(_) | Content::Taken => b"",
        };
        AnchorRequest { head: &self.head, parameters: &self.parameters, body }
    }

    fn values(&self, arguments: &mut dyn Iterator<Item = Values>) -> Result<Values, AnchorError> {
        let mut values = Values::new();
        let rules = KeyRules { format: None, longest: self.shared.limits.key_length };
        self.policy.anchor.collect(&self.anchor_request(), arguments, rules, &mut values)?;
        Ok(values)
    }

    /// A request without a usable key runs as plain axum where that is allowed.
    fn without_key(self, error: &AnchorError) -> Unkeyed {
        if self.policy.optional && matches!(error, AnchorError::Missing { .. }) {
            self.tell(Outcome::Unprotected, None);
            return Unkeyed::Unprotected(Box::new(self));
        }
        self.refused(Refusal::of_key(error))
    }

    /// Asks the application whether a request that would run may, and otherwise for its answer.
    async fn ask_to_admit(&mut self, operation: &Operation) -> Result<(), Response> {
        let Some(admit) = self.policy.admit else { return Ok(()) };
        let context = self.context(operation);
        admit(context).await.map_err(|Denied(response)| response.map(Body::new))
    }

    /// A refusal before any look-up; where idem only observes, the request runs all the same.
    fn refused(self, refusal: Refusal) -> Unkeyed {
        self.tell(Outcome::Refused(refusal.kind()), None);
        match self.policy.mode {
            Mode::Observe => Unkeyed::Observed(Box::new(self)),
            Mode::Enforce | Mode::Off => Unkeyed::Refused(Box::new(self.render(refusal))),
        }
    }

    fn render(&self, refusal: Refusal) -> Response {
        mark!("refusal.before");
        let (outcome, operation_id) = (Outcome::Refused(refusal.kind()), refusal.operation_id());
        let mut response = refuse(&self.shared, &self.policy, refusal);
        say(&self.shared, &self.policy, &mut response, outcome, operation_id);
        response
    }

    fn into_request(self) -> Request {
        Request::from_parts(self.head, self.body.into_body())
    }

    fn tell(&self, outcome: Outcome, operation_id: Option<OperationId>) {
        self.shared.observe(&Event {
            outcome,
            operation: self.endpoint.text(),
            operation_id,
            attempt: None,
            error: None,
            enforced: self.policy.mode == Mode::Enforce,
        });
    }

    /// Takes key, scope and fingerprint, then claims, runs and records.
    pub(crate) async fn conduct(self: Box<Self>, arguments: Arguments, runner: Runner) -> Response {
        let call = match self.call(arguments) {
            Ok(call) => call,
            Err(unusable) => {
                let unkeyed = match unusable {
                    Unusable::Key(error) => self.without_key(&error),
                    Unusable::Other(refusal) => self.refused(refusal),
                };
                return unkeyed.conduct(runner).await;
            }
        };
        mark!("request.keyed");
        let (shared, operation) = (Arc::clone(&self.shared), Arc::clone(&call.operation));
        let claimed = self.claim(call, runner).boxed();
        match FinishAnyway::new(shared, operation, claimed).await {
            Conducted::Answered(response) => {
                mark!("request.answered");
                *response
            }
            // Who waits has claimed nothing: a client that hangs up is gone at once.
            Conducted::Waits(waiting) => waiting.wait().await,
        }
    }

    fn call(&self, arguments: Arguments) -> Result<Call, Unusable> {
        let mut arguments = arguments.0.into_iter();
        let values = self.values(&mut arguments).map_err(Unusable::Key)?;
        let mut scope = Values::new();
        self.policy
            .scope
            .collect(&self.anchor_request(), &mut arguments, &mut scope)
            .map_err(|error| Unusable::Other(Refusal::of_scope(&error)))?;
        let digester = &self.shared.digester;
        let fingerprint =
            self.policy.fingerprint.fingerprint(digester, &self.subject()).map_err(|error| {
                let refusal = Refusal::new(RefusalKind::BodyMalformed);
                Unusable::Other(refusal.with_detail(format!("{error}.")))
            })?;
        let space = match self.policy.space {
            Some(name) => Space::Named(name),
            None if self.policy.is_layer => Space::Layer(&self.endpoint),
            None => Space::Operation(&self.endpoint),
        };
        Ok(Call {
            key: digester.key(space, &scope, &values),
            scope: digester.scope(&scope),
            operation: Arc::from(self.endpoint.text()),
            fingerprint,
            policy: self.policy,
        })
    }

    fn subject(&self) -> Subject<'_> {
        let request = self.anchor_request();
        Subject {
            endpoint: self.policy.space.map(|_| &self.endpoint),
            query: self.head.uri.query().unwrap_or_default(),
            headers: &self.head.headers,
            body: request.body,
        }
    }

    async fn claim(mut self: Box<Self>, call: Call, runner: Runner) -> Conducted {
        let shared = Arc::clone(&self.shared);
        let known = self.head.extensions.get::<Operation>();
        let outer = known.and_then(|known| known.claimed_further_out(&shared, &call.key));
        mark!("request.claiming");
        let until = self.may_wait_until();
        let admission = match (outer, self.policy.transaction) {
            // One key has one record: the claim that this request has already protects this run, too.
            (Some(outer), false) => {
                return Conducted::Answered(Box::new(self.run_within(&outer, runner).await));
            }
            // But that record is written after the commit, and a crash in between would be a rerun.
            (Some(_), true) => shared.wrong(&call, WrongTransaction::ClaimedFurtherOut),
            (None, true) => {
                let slot = self.slot();
                shared.begin(&call, &slot, &mut *self).await
            }
            (None, false) => shared.admit(&call, &mut *self).await,
        };
        let enforced = self.policy.mode == Mode::Enforce;
        let response = match admission {
            Admission::Run(run) => self.run(run, runner).await,
            Admission::Replay { answer, operation_id } => {
                self.tell(Outcome::Replayed, Some(operation_id));
                match enforced {
                    true => self.replay(answer, operation_id),
                    false => self.run_unclaimed(runner).await,
                }
            }
            Admission::Wait(claim) => {
                return Conducted::Waits(Box::new(Waiting { exchange: self, call, claim, until }));
            }
            Admission::Refuse(refusal, _) if enforced => self.render(refusal),
            Admission::Refuse(..) => self.run_unclaimed(runner).await,
            Admission::Unprotected => unprotected(self.run_unclaimed(runner).await),
        };
        Conducted::Answered(Box::new(response))
    }

    /// Until when this request may wait, here or further in, if it may wait here.
    fn may_wait_until(&mut self) -> Option<Instant> {
        let InFlight::Wait(bound) = self.policy.in_flight else { return None };
        if !self.policy.waits() {
            return None;
        }
        let bound = preferred_wait(&self.head.headers).map_or(bound, |wait| wait.min(bound));
        let own = later(Instant::now(), bound);
        let outer = self.head.extensions.get().map(|WaitUntil(outer)| *outer);
        let until = outer.map_or(own, |outer| outer.min(own));
        self.head.extensions.insert(WaitUntil(until));
        Some(until)
    }

    /// What `admit` and `recover` functions see.
    fn context(&self, operation: &Operation) -> RequestContext {
        let body = match &self.body {
            Content::Buffered(bytes, _) => bytes.clone(),
            Content::Untouched(_) | Content::Taken => Bytes::new(),
        };
        let (operation, head) = (operation.clone(), self.head.clone());
        RequestContext { operation, head, body, state: Arc::clone(&self.state) }
    }

    /// The request of a handler that runs without a claim, if the application admits it: its limits
    /// hold for every run, or a request without a key would pass them by.
    pub(crate) async fn admitted(
        mut self: Box<Self>,
    ) -> Result<(Request, Option<Box<Unclaimed>>), Response> {
        let operation = Operation::of(&mut self.head.extensions);
        self.ask_to_admit(&operation).await?;
        let unclaimed = Unclaimed::of(&self.shared, &self.policy, &mut self.head.extensions);
        Ok((self.into_request(), unclaimed))
    }

    async fn run_unclaimed(self: Box<Self>, runner: Runner) -> Response {
        match self.admitted().await {
            Ok((request, unclaimed)) => plain(request, unclaimed, runner).await,
            Err(denied) => denied,
        }
    }

    /// Runs the handler under the claim of whoever handed the request on. What the handler says of
    /// unknown outcomes holds all the same.
    async fn run_within(mut self: Box<Self>, outer: &Attempt, runner: Runner) -> Response {
        let operation = Operation::of(&mut self.head.extensions);
        let is_refused = self.policy.on_unknown == OnUnknown::Refuse
            && self.policy.mode == Mode::Enforce
            && outer.number > 1;
        match self.recovered(outer, &operation).await {
            Some(Recovery::Answered(response)) => {
                let mut response = response.map(Body::new);
                response.extensions_mut().insert(Settle::recorded());
                response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
                response
            }
            None if !is_refused => self.run_unclaimed(runner).await,
            Some(Recovery::NeverHappened) => self.run_unclaimed(runner).await,
            Some(Recovery::Unknown) | None => {
                let kind = RefusalKind::UnknownOutcome;
                self.tell(Outcome::Refused(kind), Some(outer.id));
                self.render(Refusal::new(kind).about(outer.id))
            }
        }
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

    /// Asks the application what an earlier attempt came to, and whether this one may run; then
    /// runs it. Everything of the application's is in here, up to the last piece of its response's
    /// body; `None` if it threw the work away.
    async fn work(
        mut self: Box<Self>,
        run: &Run,
        operation: Operation,
        runner: Runner,
    ) -> Option<(Response, End)> {
        match self.recovered(&run.attempt, &operation).await {
            Some(Recovery::Answered(response)) => {
                let (response, settle) = (response.map(Body::new), Settle::recorded());
                let (mut response, end) = weigh(&self.shared, &self.policy, response, settle).await;
                response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
                return Some((response, end));
            }
            Some(Recovery::Unknown) => {
                let refusal = Refusal::new(RefusalKind::UnknownOutcome).about(run.attempt.id);
                return Some((self.render(refusal), End::Release));
            }
            Some(Recovery::NeverHappened) | None => {}
        }
        match AssertUnwindSafe(self.ask_to_admit(&operation)).catch_unwind().await {
            Ok(Ok(())) => {}
            Ok(Err(denied)) => return Some((denied, End::Forget)),
            // The handler did not start: nothing is unknown.
            Err(_) if self.policy.mode == Mode::Enforce => {
                let refusal = Refusal::new(RefusalKind::HandlerPanicked).about(run.attempt.id);
                return Some((self.render(refusal), End::Forget));
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
        let Self { shared, policy, mut head, body, .. } = *self;
        // What is behind may claim for itself: a layer's handler, or a service that a handler calls.
        head.extensions.insert(operation.inner());
        let request = Request::from_parts(head, body.into_body());
        mark!("handler.starting");
        match shared.carried(async move { runner(request).await }.boxed()).await? {
            Ran::Answered(response) => {
                mark!("handler.returned");
                let refused = response.extensions().get().map(|Refused(kind)| *kind);
                // What a handler says of its answer holds for whoever claimed further out, too.
                let said = response.extensions().get::<Settle>().copied();
                let settle = match refused {
                    // Before a handler asked whoever refused it, it may have done something. What a
                    // layer hands on has been done by nobody.
                    Some(_) if !policy.is_layer && response.status().is_server_error() => {
                        Settle::uncertain()
                    }
                    Some(kind) => after_a_refusal(kind),
                    None => said.unwrap_or(Settle::BY_POLICY),
                };
                if settle.keeps_effects {
                    run.keep_effects();
                }
                let (response, end) = weigh(&shared, &policy, response, settle).await;
                mark!("response.weighed");
                let by_handler = refused.is_none() && settle.fate == Fate::Forget;
                Some(match end {
                    End::Forget if !by_handler && run.attempt.has_steps() => {
                        (response, End::Release)
                    }
                    end => (response, end),
                })
            }
            Ran::Rejected(response) => Some((response, End::Forget)),
        }
    }

    async fn run(mut self: Box<Self>, run: Run, runner: Runner) -> Response {
        mark!("run.starting");
        let (shared, policy) = (Arc::clone(&self.shared), self.policy);
        let operation = Operation::of(&mut self.head.extensions);
        operation.grant(&run.attempt);
        let operation_id = run.attempt.id;
        // On the level that services run with: what a handler logs in production is to lead to its
        // record. Without a subscriber it costs a comparison.
        let span = tracing::info_span!(
            "idempotent",
            operation = self.endpoint.text(),
            %operation_id,
            attempt = run.attempt.number,
        );
        let work = self.work(&run, operation, runner).instrument(span);
        let (response, end) = match AssertUnwindSafe(work).catch_unwind().await {
            Ok(Some((response, end))) => (Some(response), end),
            // Where idem only observes, a panic is the server's own affair.
            Err(panic) if policy.mode == Mode::Observe => {
                let _ = run.end(End::Release).await;
                std::panic::resume_unwind(panic);
            }
            Ok(None) | Err(_) => (None, End::Release),
        };
        let (ended, outcome) = run.end(end).await;
        let refused = |kind, id| refuse(&shared, &policy, Refusal::new(kind).about(id));
        let response =
            response.unwrap_or_else(|| refused(RefusalKind::HandlerPanicked, operation_id));
        let lost = |id| refused(RefusalKind::LeaseLost, id);
        let (mut response, operation_id) = match ended {
            // What the handler says is not true, or may not be.
            Ended::TransactionFailed => {
                (refused(RefusalKind::TransactionFailed, operation_id), operation_id)
            }
            Ended::CommitUnknown => {
                (refused(RefusalKind::CommitUnknown, operation_id), operation_id)
            }
            _ if policy.mode != Mode::Enforce => (response, operation_id),
            Ended::Own | Ended::Unrecorded => (response, operation_id),
            Ended::Theirs(theirs, id) => match replayed(theirs, policy.replay) {
                Some(response) => (response, id),
                None => (lost(id), id),
            },
            Ended::Lost => (lost(operation_id), operation_id),
        };
        say(&shared, &policy, &mut response, outcome, Some(operation_id));
        mark!("response.ready");
        response
    }

    fn replay(&self, recorded: Answer, operation_id: OperationId) -> Response {
        mark!("replay.before");
        match replayed(recorded, self.policy.replay) {
            Some(mut response) => {
                let (outcome, id) = (Outcome::Replayed, Some(operation_id));
                say(&self.shared, &self.policy, &mut response, outcome, id);
                response
            }
            None => self.render(Refusal::new(RefusalKind::RecordUnreadable).about(operation_id)),
        }
    }
}

/// What became of a request whose key was claimed, or was to be.
enum Conducted {
    Answered(Box<Response>),
    Waits(Box<Waiting>),
}

/// A request that waits for the answer of the one that it repeats.
struct Waiting {
    exchange: Box<Exchange>,
    call: Call,
    claim: Box<Claim>,
    until: Option<Instant>,
}

impl Waiting {
    async fn wait(self) -> Response {
        let Self { mut exchange, call, claim, until } = self;
        let shared = Arc::clone(&exchange.shared);
        let left = |until: Instant| until.saturating_duration_since(Instant::now());
        let bound = until.map_or(Duration::ZERO, left);
        match shared.wait(&call, &claim, bound, &mut *exchange).await {
            Admission::Replay { answer, operation_id } => {
                exchange.tell(Outcome::Replayed, Some(operation_id));
                exchange.replay(answer, operation_id)
            }
            Admission::Refuse(refusal, _) => exchange.render(refusal),
            // Nobody who waited runs.
            Admission::Run(_) | Admission::Wait(_) | Admission::Unprotected => {
                exchange.render(Refusal::new(RefusalKind::InFlight))
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
                match self.buffer().await {
                    Ok(()) if matches!(self.body, Content::Taken) => {
                        return Compared::Unable(RefusalKind::RecordUnreadable);
                    }
                    Ok(()) => {}
                    // None that is as large was ever recorded under a scheme that covers it.
                    Err(Bound::Size) => return Compared::Other,
                    Err(_) => return Compared::Unable(RefusalKind::BodyMalformed),
                }
            }
            match under_scheme(scheme, &self.shared.digester, &self.subject()) {
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
            Self::Plain(request, unclaimed) => plain(*request, unclaimed, runner).await,
            Self::Observed(exchange) => exchange.run_unclaimed(runner).await,
            Self::Unprotected(exchange) => unprotected(exchange.run_unclaimed(runner).await),
            Self::Refused(response) => *response,
        }
    }
}

/// Runs a handler as plain axum does.
async fn plain(request: Request, unclaimed: Option<Box<Unclaimed>>, runner: Runner) -> Response {
    let work = async move {
        match runner(request).await {
            Ran::Answered(response) | Ran::Rejected(response) => response,
        }
    };
    match unclaimed {
        Some(unclaimed) => unclaimed.run(work).await,
        None => work.await,
    }
}

/// Says what an answer means for its record.
async fn weigh(
    shared: &Shared,
    policy: &Resolved,
    response: Response,
    settle: Settle,
) -> (Response, End) {
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
    match fate {
        Fate::Release => return (response, End::Release),
        Fate::Forget => return (response, End::Forget),
        Fate::Tombstone => return (response, tombstone(status, settle.ttl)),
        Fate::Record | Fate::ByPolicy => {}
    }
    let (head, body) = response.into_parts();
    let limits = &shared.limits;
    match buffer(body, limits.response_body, limits.response_time).await {
        Buffered::Whole(bytes, None) => {
            warn_of_outer_headers(shared, &head.headers);
            let nominated = nominated(&head.headers);
            let kept = head.headers.iter().filter(|(name, _)| {
                !shared.left_out.contains(name)
                    && !nominated.iter().any(|other| name.as_str() == other)
            });
            let headers: Vec<_> =
                kept.map(|(k, v)| (k.as_str().as_bytes(), v.as_bytes())).collect();
            let payload = RecordedResponse::encode(status.as_u16(), &headers, &bytes);
            (Response::from_parts(head, Body::from(bytes)), End::Complete(payload, settle.ttl))
        }
        // The fact is recorded before the first byte leaves; the rest is streamed.
        Buffered::Whole(bytes, trailers) => {
            (Response::from_parts(head, whole(bytes, trailers)), tombstone(status, settle.ttl))
        }
        Buffered::Beyond(body, _) => {
            (Response::from_parts(head, body), tombstone(status, settle.ttl))
        }
    }
}

/// The headers that are the connection's because it says so (RFC 9110 §7.6.1).
fn nominated(headers: &HeaderMap) -> Vec<String> {
    let lines = headers.get_all(header::CONNECTION).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(|name| name.trim().to_ascii_lowercase()).collect()
}

fn tombstone(status: StatusCode, ttl: Option<Ttl>) -> End {
    End::Tombstone(RecordedResponse::encode(status.as_u16(), &[], b""), ttl)
}

/// What only layers set belongs outside of idem: a replay under another origin, encoding or
/// request id would be wrong.
fn warn_of_outer_headers(shared: &Shared, headers: &HeaderMap) {
    let outer = [
        header::CONTENT_ENCODING,
        header::ACCESS_CONTROL_ALLOW_ORIGIN,
        HeaderName::from_static("x-request-id"),
    ];
    let found = outer.iter().find(|name| headers.contains_key(*name));
    let told = &shared.warned_of_outer_headers;
    if let Some(name) = found
        && !told.swap(true, std::sync::atomic::Ordering::Relaxed)
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
    headers.reserve(recorded.headers.len() + 1);
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

pub(super) fn endpoint(head: &Parts, parameters: &[(String, String)], anchor: &Anchor) -> Endpoint {
    let method = head.method.as_str();
    match head.extensions.get::<MatchedPath>() {
        Some(route) => {
            let spelt: Vec<_> =
                parameters.iter().map(|(name, value)| anchor.spelling(name, value)).collect();
            Endpoint::matched(method, route.as_str(), spelt.iter().map(AsRef::as_ref))
        }
        None => {
            let original = head.extensions.get::<OriginalUri>();
            let path = original.map_or(&head.uri, |OriginalUri(uri)| uri).path();
            Endpoint::unmatched(method, path)
        }
    }
}
