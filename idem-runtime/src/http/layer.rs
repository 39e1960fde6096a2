//! `idem.layer(POLICY)`: one policy for all writes of a router.

use std::{
    fmt, mem,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use axum::{
    BoxError,
    body::Body,
    extract::{MatchedPath, OriginalUri, Request},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use http::{HeaderValue, StatusCode, request::Parts};
use tower_layer::Layer;
use tower_service::Service;

use super::{
    answer::Handled,
    serve::{AnyState, Arrived, Ran, Runner, endpoint, serve},
};
use crate::{
    anchor::AnchorRequest,
    builder::IGNORED,
    engine::{Idempotency, Shared},
    hooks::Settle,
    observer::{Event, Outcome},
    policy::{Mode, Policy, Resolved},
};

impl Idempotency {
    /// Protects all writes of a router, or of any service, by one policy.
    ///
    /// A write is a request whose method is not safe (RFC 9110 §9.2.1): `POST`, `PUT`, `PATCH`,
    /// `DELETE` and whatever else is not `GET`, `HEAD`, `OPTIONS` or `TRACE`. Reads are left alone,
    /// and so is what is [excepted](IdempotencyLayer::except).
    ///
    /// ```
    /// use axum::{Router, http::StatusCode, routing::{get, post}};
    /// use idem_runtime::{Anchor, Idempotency, Policy, Scope, store::MemoryStore};
    ///
    /// const WRITES: Policy = Policy::new(Anchor::header("Idempotency-Key"));
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let idem = Idempotency::builder(MemoryStore::new()).scope(Scope::header("X-API-Key")).build();
    /// let app: Router = Router::new()
    ///     .route("/payments", post(|| async { (StatusCode::CREATED, "paid") }))
    ///     .route("/payments/{id}", get(|| async { "a payment" }))
    ///     .route("/login", post(|| async { "welcome" }))
    ///     .route_layer(idem.layer(WRITES).except(["/login"]));
    /// # use axum::{body::Body, http::Request};
    /// # use tower::ServiceExt;
    /// # let request = |method: &str, path: &str| {
    /// #     Request::builder()
    /// #         .method(method)
    /// #         .uri(path)
    /// #         .header("x-api-key", "tenant-1")
    /// #         .header("idempotency-key", "k-1")
    /// #         .body(Body::empty())
    /// # };
    /// let first = app.clone().oneshot(request("POST", "/payments")?).await?;
    /// assert_eq!(first.status(), StatusCode::CREATED);
    /// let retry = app.clone().oneshot(request("POST", "/payments")?).await?;
    /// assert_eq!(retry.headers()["idempotent-replayed"], "true");
    ///
    /// // A client that sends its key everywhere is told where it does nothing.
    /// let read = app.oneshot(request("GET", "/payments/1")?).await?;
    /// assert_eq!(read.headers()["idempotent-ignored"], "true");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Where it belongs
    ///
    /// Authentication goes outside of it, that nobody sees a replay who may not; so do compression,
    /// CORS and request ids, which differ from one retry to the next. With
    /// [`Router::route_layer`](axum::Router::route_layer), a path that no route has is answered as
    /// ever; with [`Router::layer`](axum::Router::layer), it needs a key like any other. Around a
    /// whole router there is no matched route yet: an operation is then the method and the path, and
    /// anchors in the path find nothing.
    ///
    /// A replay runs nothing of what is inside, extractors included, and `admit` and `recover`
    /// functions of the policy see no router state.
    ///
    /// # Keys that are not used
    ///
    /// A key in a header or in the query that is sent to a read, or to an excepted route, has no
    /// effect, and that is said: by the header [`IGNORED`](crate::IGNORED), and as
    /// [`Outcome::Ignored`](crate::Outcome::Ignored) to the observer and in
    /// [`Handled`](crate::Handled). What may be a key in a path or a body is not looked for.
    ///
    /// # Together with a handler's own policy
    ///
    /// Both hold: the layer claims first, each has a record of its own, and the handler's replay is
    /// to the layer an answer like any other. What the handler says by [`Settle`](crate::Settle)
    /// holds for both. What the handler's policy refuses, the layer does not record: it releases its
    /// claim if the handler may have run, and forgets it otherwise. (It reads that in the response's
    /// extensions: a layer in between that builds a new response must take them over.) If both wait
    /// for running requests, they wait no longer than the layer would.
    ///
    /// The layer's keys are apart from the handlers', so a layer can be put over annotated handlers,
    /// or a handler behind a layer annotated, in a running service. In place of each other they find
    /// none of the other's records: keep both for as long as records live. Only where both name the
    /// same space and find the same key is there one claim and one record, the layer's; what the
    /// handler says of unknown outcomes holds then, too. A transactional handler is refused there,
    /// with 500 `transaction_failed`, since its effects would be committed before that record: give
    /// it a space of its own, and its record is committed with them.
    ///
    /// # Panics
    ///
    /// When the policy takes its anchor or scope from a handler's arguments, which a layer does not
    /// see, or is transactional: the transaction belongs to the handler that has the `Tx`.
    #[track_caller]
    pub fn layer(&self, policy: impl Into<Policy>) -> IdempotencyLayer {
        let policy = policy.into().resolve(&self.shared.options, self.shared.scope);
        assert!(
            !policy.anchor.needs_arguments() && !policy.scope.needs_arguments(),
            "layer: a layer does not see a handler's arguments: take anchor and scope from the request"
        );
        assert!(!policy.transaction, "layer: `transaction` is for the handler that takes the `Tx`");
        let rules = Rules {
            shared: Arc::clone(&self.shared),
            policy: Arc::new(Resolved { is_layer: true, ..policy }),
            excepted: Vec::new(),
            no_state: Arc::new(()),
        };
        IdempotencyLayer { rules: Arc::new(rules) }
    }
}

/// Protects all writes of a router; [`Idempotency::layer`] makes one.
#[derive(Clone, Debug)]
#[must_use = "a layer does nothing until a router has it"]
pub struct IdempotencyLayer {
    rules: Arc<Rules>,
}

impl IdempotencyLayer {
    /// Leaves these routes alone, whatever the method.
    ///
    /// A route is written as axum has it, with the prefixes of nests: `/api/orders/{id}`. A request
    /// that no route matched is compared by its path, as it was sent. A handler with a policy of its
    /// own keeps it.
    ///
    /// # Panics
    ///
    /// When a route does not begin with a slash: it would never match.
    #[track_caller]
    pub fn except(mut self, routes: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let rules = Arc::make_mut(&mut self.rules);
        for route in routes {
            let route = route.into();
            assert!(
                route.starts_with('/'),
                "except: a route begins with a slash, {route:?} does not"
            );
            rules.excepted.push(Excepted::Route(route));
        }
        self
    }

    /// Leaves requests alone of which this function says so: by method and route, say, or by what a
    /// layer further out left in the extensions.
    ///
    /// ```
    /// use axum::extract::MatchedPath;
    /// use http::Method;
    /// # use idem_runtime::{Anchor, Idempotency, Scope, store::MemoryStore};
    ///
    /// # let idem = Idempotency::builder(MemoryStore::new()).scope(Scope::global()).build();
    /// let layer = idem.layer(Anchor::header("Idempotency-Key")).except_when(|head| {
    ///     let route = head.extensions.get::<MatchedPath>().map(MatchedPath::as_str);
    ///     head.method == Method::PUT && route == Some("/files/{name}")
    /// });
    /// # let _ = layer;
    /// ```
    pub fn except_when(mut self, is: impl Fn(&Parts) -> bool + Send + Sync + 'static) -> Self {
        Arc::make_mut(&mut self.rules).excepted.push(Excepted::When(Arc::new(is)));
        self
    }
}

/// What holds for every request.
#[derive(Clone)]
struct Rules {
    shared: Arc<Shared>,
    policy: Arc<Resolved>,
    excepted: Vec<Excepted>,
    /// The router's, of which a layer knows nothing.
    no_state: AnyState,
}

/// What the layer leaves alone.
#[derive(Clone)]
enum Excepted {
    Route(String),
    When(Arc<dyn Fn(&Parts) -> bool + Send + Sync>),
}

impl fmt::Debug for Excepted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Route(route) => route.fmt(f),
            Self::When(_) => f.write_str("when(…)"),
        }
    }
}

impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rules")
            .field("anchor", &self.policy.anchor)
            .field("excepted", &self.excepted)
            .finish_non_exhaustive()
    }
}

impl Rules {
    fn leaves_alone(&self, head: &Parts) -> bool {
        head.method.is_safe() || self.excepted.iter().any(|excepted| excepted.covers(head))
    }

    /// What a request is called whose key is not used, if it has one. Its body is not looked at.
    fn unused_key(&self, head: &Parts) -> Option<Arc<str>> {
        let request =
            AnchorRequest { head, parameters: &[], body: b"", names: &self.policy.headers };
        let was_sent = self.policy.anchor.was_sent(&request);
        was_sent.then(|| Arc::clone(endpoint(head, &[], &self.policy).text()))
    }

    /// Says that a key was ignored, unless the handler used it.
    fn say_ignored(&self, operation: &str, response: &mut Response) {
        if response.extensions().get::<Handled>().is_some() {
            return;
        }
        let enforced = self.policy.mode == Mode::Enforce;
        let handled = Handled { outcome: Outcome::Ignored, operation_id: None };
        self.shared.observe(&Event {
            outcome: handled.outcome,
            operation,
            operation_id: handled.operation_id,
            attempt: None,
            error: None,
            enforced,
        });
        response.extensions_mut().insert(handled);
        if enforced {
            response.headers_mut().insert(IGNORED, HeaderValue::from_static("true"));
        }
    }
}

impl Excepted {
    fn covers(&self, head: &Parts) -> bool {
        match self {
            Self::Route(route) => match head.extensions.get::<MatchedPath>() {
                Some(matched) => matched.as_str() == route,
                None => {
                    let original = head.extensions.get::<OriginalUri>();
                    original.map_or(&head.uri, |OriginalUri(uri)| uri).path() == route
                }
            },
            Self::When(is) => is(head),
        }
    }
}

impl<S> Layer<S> for IdempotencyLayer {
    type Service = IdempotencyService<S>;

    fn layer(&self, inner: S) -> IdempotencyService<S> {
        IdempotencyService { rules: Arc::clone(&self.rules), inner }
    }
}

/// A service that a [layer](Idempotency::layer) protects.
#[derive(Clone, Debug)]
pub struct IdempotencyService<S> {
    rules: Arc<Rules>,
    inner: S,
}

impl<S, B> Service<Request<B>> for IdempotencyService<S>
where
    S: Service<Request> + Clone + Send + 'static,
    S::Response: IntoResponse,
    S::Error: Send + 'static,
    S::Future: Send,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // The one that said it was ready is called; its clone must say so first.
        let clone = self.inner.clone();
        let mut inner = mem::replace(&mut self.inner, clone);
        let (head, body) = request.into_parts();
        let rules = Arc::clone(&self.rules);
        let is_off = rules.policy.mode == Mode::Off;
        if is_off || rules.leaves_alone(&head) {
            let unused = if is_off { None } else { rules.unused_key(&head) };
            let request = Request::from_parts(head, Body::new(body));
            return async move {
                let mut response = inner.call(request).await?.into_response();
                if let Some(operation) = unused {
                    rules.say_ignored(&operation, &mut response);
                }
                Ok(response)
            }
            .boxed();
        }
        let request = Request::from_parts(head, Body::new(body));
        let runner: Runner = Box::new(move |arrived| {
            async move {
                Ran::Answered(match inner.call(arrived.into_request()).await {
                    Ok(response) => response.into_response(),
                    Err(error) => Failed::response(error),
                })
            }
            .boxed()
        });
        let (shared, no_state) = (Arc::clone(&rules.shared), Arc::clone(&rules.no_state));
        let arrived = Arrived::new(shared, request, no_state);
        serve(arrived, Arc::clone(&rules.policy), runner).map(Failed::result).boxed()
    }
}

/// The error with which the inner service failed, on its way out in a response's extensions: to the
/// engine, an unknown outcome.
struct Failed<E>(Arc<Mutex<Option<E>>>);

impl<E> Clone for Failed<E> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<E: Send + 'static> Failed<E> {
    fn response(error: E) -> Response {
        let mut response = StatusCode::INTERNAL_SERVER_ERROR.into_response();
        let extensions = response.extensions_mut();
        extensions.insert(Settle::uncertain());
        extensions.insert(Self(Arc::new(Mutex::new(Some(error)))));
        response
    }

    /// The error, unless another attempt's answer took its place.
    fn result(mut response: Response) -> Result<Response, E> {
        let failed = response.extensions_mut().remove::<Self>();
        let error = failed
            .and_then(|Self(error)| error.lock().unwrap_or_else(PoisonError::into_inner).take());
        error.map_or(Ok(response), Err)
    }
}
