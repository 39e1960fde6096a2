//! The life of a request, from its last extractor to its answer.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{FromRequestParts, MatchedPath, OriginalUri, RawPathParams, Request},
    response::Response,
};
use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, request::Parts};
use tokio::sync::oneshot;

use super::body::{Bound, Buffered, buffer, whole};
use crate::{
    anchor::{Anchor, AnchorError, AnchorRequest, KeyRules},
    detach::FinishAnyway,
    engine::{Admission, Call, Comparable, Compared, End, Ended, Run, Shared},
    fingerprint::{Subject, scheme_needs_body, under_scheme},
    key::{Endpoint, OperationId, Space, Values},
    observer::{Event, Outcome},
    operation::Operation,
    policy::{Mode, Policy, Resolved},
    record::RecordedResponse,
    refusal::{Refusal, RefusalKind},
};

/// The header on every replay; its value is `true`.
pub const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// What became of a request, in its response's extensions: for layers that log, meter or limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Handled {
    /// What became of it.
    pub outcome: Outcome,
    /// Which operation it was, where that is known.
    pub operation_id: Option<OperationId>,
}

/// What a handler came to.
pub(crate) enum Ran {
    Answered(Response),
    /// An extractor turned the request away; the handler did not start.
    Rejected(Response),
}

/// Runs the handler. The request is whole again: head, and the body that was buffered.
pub(crate) type Runner = Box<dyn FnOnce(Request) -> BoxFuture<'static, Ran> + Send>;

/// The values that generated code took from the handler's arguments, in the order in which the
/// policy's anchor and then its scope ask for them.
#[derive(Debug, Default)]
pub struct Arguments(Vec<Values>);

impl Arguments {
    /// None yet.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// The next one.
    pub fn push<V: crate::AnchorValue + ?Sized>(&mut self, value: &V) {
        let mut values = Values::new();
        value.write(&mut values);
        self.0.push(values);
    }
}

/// Serves a request whose handler takes it whole.
pub(crate) fn serve(
    shared: Arc<Shared>,
    policy: &Policy,
    request: Request,
    runner: Runner,
) -> BoxFuture<'static, Response> {
    let policy = policy.resolve(&shared.options, shared.scope);
    async move {
        match Exchange::open(shared, policy, request).await {
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
    Plain(Box<Request>),
    /// It runs without protection, since its key is optional and not there.
    Unprotected(Box<Request>),
    /// It is answered already.
    Refused(Box<Response>),
}

impl Exchange {
    /// Reads a request as far as its key needs.
    pub(crate) async fn open(shared: Arc<Shared>, policy: Resolved, request: Request) -> Opened {
        if policy.mode == Mode::Off {
            return Opened::Unkeyed(Unkeyed::Plain(Box::new(request)));
        }
        let (mut head, body) = request.into_parts();
        let (parameters, readable) = parameters(&mut head).await;
        let endpoint = endpoint(&head, &parameters, &policy.anchor);
        let body = Content::Untouched(body);
        let mut exchange = Self { shared, policy, head, body, parameters, endpoint };
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
        // The handler and the engine share one cell, whoever asks for it first.
        let operation = self.operation();
        let body = match &self.body {
            Content::Buffered(bytes, trailers) => whole(bytes.clone(), trailers.clone()),
            Content::Untouched(_) | Content::Taken => {
                std::mem::replace(&mut self.body, Content::Taken).into_body()
            }
        };
        self.head.extensions.insert(operation);
        Request::from_parts(self.head.clone(), body)
    }

    fn operation(&self) -> Operation {
        self.head.extensions.get::<Operation>().cloned().unwrap_or_default()
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
            return Unkeyed::Unprotected(Box::new(self.into_request()));
        }
        self.refused(Refusal::of_key(error))
    }

    /// A refusal before any look-up; where idem only observes, the request runs all the same.
    fn refused(self, refusal: Refusal) -> Unkeyed {
        self.tell(Outcome::Refused(refusal.kind()), None);
        match self.policy.mode {
            Mode::Observe => Unkeyed::Plain(Box::new(self.into_request())),
            Mode::Enforce | Mode::Off => Unkeyed::Refused(Box::new(self.render(refusal))),
        }
    }

    fn render(&self, refusal: Refusal) -> Response {
        let (outcome, operation_id) = (Outcome::Refused(refusal.kind()), refusal.operation_id());
        let mut response = self.shared.render(&self.policy, refusal).map(Body::from);
        response.extensions_mut().insert(Handled { outcome, operation_id });
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
        let (shared, operation) = (Arc::clone(&self.shared), Arc::clone(&call.operation));
        FinishAnyway::new(shared, operation, self.claim(call, runner).boxed()).await
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

    async fn claim(mut self: Box<Self>, call: Call, runner: Runner) -> Response {
        let shared = Arc::clone(&self.shared);
        let admission = shared.admit(&call, &mut *self).await;
        let enforced = self.policy.mode == Mode::Enforce;
        match admission {
            Admission::Run(run) => self.run(run, runner).await,
            Admission::Replay { response, operation_id } => {
                self.tell(Outcome::Replayed, Some(operation_id));
                match enforced {
                    true => self.replay(response, operation_id),
                    false => plain(self.into_request(), runner).await,
                }
            }
            Admission::Refuse(refusal) if enforced => self.render(refusal),
            Admission::Refuse(_) => plain(self.into_request(), runner).await,
            Admission::Unprotected => unprotected(self.into_request(), runner).await,
        }
    }

    async fn run(self: Box<Self>, run: Run, runner: Runner) -> Response {
        let Self { shared, policy, mut head, body, .. } = *self;
        let operation = head.extensions.get_or_insert_default::<Operation>();
        operation.grant(&run.attempt);
        let operation_id = run.attempt.id;
        let request = Request::from_parts(head, body.into_body());
        // Everything of the application's is in here, up to the last piece of its response's body.
        let work = async {
            match carried(&shared, async move { runner(request).await }.boxed()).await? {
                Ran::Answered(response) => Some(weigh(&shared, &policy, response).await),
                Ran::Rejected(response) => Some((response, End::Forget)),
            }
        };
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
        let refused = |kind, id| {
            let refusal = Refusal::new(kind).about(id);
            shared.render(&policy, refusal).map(Body::from)
        };
        let response =
            response.unwrap_or_else(|| refused(RefusalKind::HandlerPanicked, operation_id));
        let lost = |id| refused(RefusalKind::LeaseLost, id);
        let (mut response, operation_id) = match ended {
            _ if policy.mode != Mode::Enforce => (response, operation_id),
            Ended::Own | Ended::Unrecorded => (response, operation_id),
            Ended::Theirs(theirs, id) => match replayed(theirs) {
                Some(response) => (response, id),
                None => (lost(id), id),
            },
            Ended::Lost => (lost(operation_id), operation_id),
        };
        response.extensions_mut().insert(Handled { outcome, operation_id: Some(operation_id) });
        response
    }

    fn replay(&self, recorded: RecordedResponse, operation_id: OperationId) -> Response {
        match replayed(recorded) {
            Some(mut response) => {
                let operation_id = Some(operation_id);
                response
                    .extensions_mut()
                    .insert(Handled { outcome: Outcome::Replayed, operation_id });
                response
            }
            None => self.render(Refusal::new(RefusalKind::RecordUnreadable).about(operation_id)),
        }
    }
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
            Self::Plain(request) => plain(*request, runner).await,
            Self::Unprotected(request) => unprotected(*request, runner).await,
            Self::Refused(response) => *response,
        }
    }
}

/// Runs a handler that is not protected though it could be, and says so.
async fn unprotected(request: Request, runner: Runner) -> Response {
    let mut response = plain(request, runner).await;
    let handled = Handled { outcome: Outcome::Unprotected, operation_id: None };
    response.extensions_mut().insert(handled);
    response
}

/// Runs a handler as plain axum does.
async fn plain(request: Request, runner: Runner) -> Response {
    match runner(request).await {
        Ran::Answered(response) | Ran::Rejected(response) => response,
    }
}

/// The handler's future in whatever the application wraps it in; `None` if that threw it away.
fn carried(shared: &Shared, work: BoxFuture<'static, Ran>) -> BoxFuture<'static, Option<Ran>> {
    let Some(carry) = &shared.carry else { return work.map(Some).boxed() };
    let (send, receive) = oneshot::channel();
    let wrapped = carry(
        async move {
            let _ = send.send(work.await);
        }
        .boxed(),
    );
    async move {
        wrapped.await;
        receive.await.ok()
    }
    .boxed()
}

/// Says what an answer means for its record.
async fn weigh(shared: &Shared, policy: &Resolved, response: Response) -> (Response, End) {
    let status = response.status();
    if !policy.record.covers(status.as_u16()) {
        let uncertain = status.is_server_error()
            || status == StatusCode::REQUEST_TIMEOUT
            || status.is_informational();
        return (response, if uncertain { End::Release } else { End::Forget });
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
            (Response::from_parts(head, Body::from(bytes)), End::Complete(payload))
        }
        // The fact is recorded before the first byte leaves; the rest is streamed.
        Buffered::Whole(bytes, trailers) => {
            (Response::from_parts(head, whole(bytes, trailers)), tombstone(status))
        }
        Buffered::Beyond(body, _) => (Response::from_parts(head, body), tombstone(status)),
    }
}

/// The headers that are the connection's because it says so (RFC 9110 §7.6.1).
fn nominated(headers: &HeaderMap) -> Vec<String> {
    let lines = headers.get_all(header::CONNECTION).iter().filter_map(|line| line.to_str().ok());
    lines.flat_map(|line| line.split(',')).map(|name| name.trim().to_ascii_lowercase()).collect()
}

fn tombstone(status: StatusCode) -> End {
    End::Tombstone(RecordedResponse::encode(status.as_u16(), &[], b""))
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

/// A recorded answer as a response; `None` if it cannot be one.
fn replayed(recorded: RecordedResponse) -> Option<Response> {
    let mut response = Response::new(Body::from(recorded.body));
    *response.status_mut() = StatusCode::from_u16(recorded.status).ok()?;
    let headers = response.headers_mut();
    headers.reserve(recorded.headers.len() + 1);
    for (name, value) in recorded.headers {
        let name = HeaderName::from_bytes(&name).ok()?;
        headers.append(name, HeaderValue::from_maybe_shared(value).ok()?);
    }
    headers.insert(REPLAYED, HeaderValue::from_static("true"));
    Some(response)
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

fn endpoint(head: &Parts, parameters: &[(String, String)], anchor: &Anchor) -> Endpoint {
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
