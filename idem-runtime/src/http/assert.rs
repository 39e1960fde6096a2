//! Whether a handler is safe to retry, found out from outside.

mod answer;
mod broken;
mod phases;

use std::fmt;

use axum::extract::Request;
use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use http::HeaderName;
use tower_service::Service;
use uuid::Uuid;

pub use self::broken::{BrokenPromise, BrokenPromises, Phase, Promise};
use self::{answer::App, broken::Report};

/// Asserts that a handler is safe to retry: [`Check`] with nothing said but the request.
///
/// `request` makes a request with the key that it is given; all else is the same each time.
///
/// ```
/// use axum::{Router, body::Body, http::Request, routing::post};
/// use idem_runtime::{
///     Anchor, Idempotency, IdempotentExt, Policy, Scope, store::MemoryStore,
///     testing::assert_idempotent,
/// };
///
/// const POLICY: Policy = Policy::new(Anchor::header("Idempotency-Key"));
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let idem = Idempotency::builder(MemoryStore::new()).scope(Scope::header("X-API-Key")).build();
/// let pay = || async { "paid" };
/// let app = Router::new().route("/pay", post(pay.idempotent(POLICY))).with_state(idem);
///
/// assert_idempotent(app, |key| {
///     Request::post("/pay")
///         .header("X-API-Key", "test")
///         .header("Idempotency-Key", key)
///         .body(Body::from(r#"{"amount": 7}"#))
///         .unwrap()
/// })
/// .await;
/// # }
/// ```
///
/// # Panics
///
/// When a promise is broken; the message says which, and what was seen.
pub async fn assert_idempotent<S, B>(
    app: S,
    request: impl Fn(&str) -> Request + Send + Sync + 'static,
) where
    S: Service<Request, Response = http::Response<B>> + Clone + Send + Sync + 'static,
    S::Future: Send,
    S::Error: Into<axum::BoxError>,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<axum::BoxError>,
{
    Check::new(app, request).assert().await;
}

type MakeRequest = Box<dyn Fn(&str) -> Request + Send + Sync>;
type MakeKey = Box<dyn Fn() -> BoxFuture<'static, String> + Send + Sync>;

/// Finds out whether a handler is safe to retry: sends it the same request again, another one with
/// the same key, fifty at once, and hangs up after each number of polls.
///
/// Each phase has keys of its own, so the store may be shared and need not be empty. It takes real
/// time where the handler does. Duplicates first take turns at each await, and then run on all threads
/// of the runtime: a race between two awaits needs `#[tokio::test(flavor = "multi_thread")]` to be
/// seen.
///
/// Without a counter of [effects](Self::effects) only answers are compared: a handler whose second
/// run answers the same as the first cannot be told from one that runs once. Count the effect.
///
/// ```
/// # use std::sync::{Arc, atomic::{AtomicUsize, Ordering}};
/// # use axum::{Router, body::Body, http::Request, routing::post};
/// use idem_runtime::testing::{Check, Phase, Promise};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// // A handler without any protection.
/// let payments = Arc::new(AtomicUsize::new(0));
/// let counted = Arc::clone(&payments);
/// let pay = move || async move {
///     payments.fetch_add(1, Ordering::SeqCst);
///     "paid"
/// };
/// let app = Router::new().route("/pay", post(pay));
///
/// let broken = Check::new(app, |key| {
///     Request::post("/pay").header("Idempotency-Key", key).body(Body::empty()).unwrap()
/// })
/// .effects(move || counted.load(Ordering::SeqCst))
/// .run()
/// .await
/// .unwrap_err();
/// assert!(broken.contains(Phase::Retry, Promise::OneEffect));
/// assert!(broken.to_string().contains(
///     "on fifty duplicates at once, the effect must happen once: it happened 50 times",
/// ));
/// # }
/// ```
#[must_use = "nothing is asked before `run` or `assert`"]
pub struct Check {
    app: App,
    request: MakeRequest,
    keys: MakeKey,
    effects: Option<Box<dyn Fn() -> usize + Send + Sync>>,
    other: Other,
    without_key: Option<Box<dyn Fn() -> Request + Send + Sync>>,
    other_scope: Option<MakeRequest>,
    shaped: bool,
    except: Vec<HeaderName>,
}

/// Where another request with the same key comes from.
enum Other {
    /// From the first one, by a change of its body.
    Changed,
    Given(MakeRequest),
    /// There is none: a changed body leaves it the same request.
    Same,
}

impl fmt::Debug for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Check").finish_non_exhaustive()
    }
}

impl Check {
    /// A check of an application, by a request that it should answer with success. `request` makes
    /// it, with the key that it is given and the same each time.
    pub fn new<S, B>(app: S, request: impl Fn(&str) -> Request + Send + Sync + 'static) -> Self
    where
        S: Service<Request, Response = http::Response<B>> + Clone + Send + Sync + 'static,
        S::Future: Send,
        S::Error: Into<axum::BoxError>,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<axum::BoxError>,
    {
        Self {
            app: App::new(app),
            request: Box::new(request),
            keys: Box::new(|| async { Uuid::new_v4().to_string() }.boxed()),
            effects: None,
            other: Other::Changed,
            without_key: None,
            other_scope: None,
            shaped: false,
            except: Vec::new(),
        }
    }

    /// Counts the effects so far: payments made, rows written, calls of a fake provider. One
    /// request may count as any number, the same each time, and must have had them when its answer
    /// is there. Nobody else may have effects meanwhile.
    pub fn effects(mut self, count: impl Fn() -> usize + Send + Sync + 'static) -> Self {
        self.effects = Some(Box::new(count));
        self
    }

    /// Where keys come from, if a random UUID in text is none: another format, or a key that the
    /// server must hand out first. Each must be a new one.
    pub fn keys<F>(mut self, new_key: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = String> + Send + 'static,
    {
        self.keys = Box::new(move || new_key().boxed());
        self
    }

    /// Another request, which is to be refused under a key that was used. Say it where the
    /// fingerprint covers a part of the body only. Default: the body with something added, a member
    /// where it is a JSON object.
    pub fn other_request(
        mut self,
        request: impl Fn(&str) -> Request + Send + Sync + 'static,
    ) -> Self {
        self.other = Other::Given(Box::new(request));
        self
    }

    /// Says that a request with the same key is the same one, whatever its body, as under
    /// `fingerprint = none`: it gets the recorded answer.
    pub fn any_body_is_the_same(mut self) -> Self {
        self.other = Other::Same;
        self
    }

    /// A request without a key, which is to be refused. Without it that is not checked, since a key
    /// may be optional.
    pub fn without_key(mut self, request: impl Fn() -> Request + Send + Sync + 'static) -> Self {
        self.without_key = Some(Box::new(request));
        self
    }

    /// The same request with the same key from another tenant or principal, for whom it is the
    /// first. Without it that is not checked.
    pub fn other_scope(
        mut self,
        request: impl Fn(&str) -> Request + Send + Sync + 'static,
    ) -> Self {
        self.other_scope = Some(Box::new(request));
        self
    }

    /// Says that replays have a shape of their own, as under `replay(…)`: they are compared among
    /// each other and not with the first answer.
    pub fn shaped_replays(mut self) -> Self {
        self.shaped = true;
        self
    }

    /// Leaves a header out of the comparison that is another one on each answer: one that a layer
    /// around the handler sets. What is never recorded by default (`Date`, `Set-Cookie`, …) is left
    /// out already.
    pub fn except_header(mut self, name: HeaderName) -> Self {
        self.except.push(name);
        self
    }

    /// Asks, and panics if a promise is broken.
    ///
    /// # Panics
    ///
    /// When a promise is broken; the message says which, and what was seen.
    pub async fn assert(&self) {
        if let Err(broken) = self.run().await {
            panic!("{broken}");
        }
    }

    /// Asks, and says what was broken. Must be called on a tokio runtime.
    ///
    /// # Errors
    ///
    /// All promises that were broken.
    pub async fn run(&self) -> Result<(), BrokenPromises> {
        let mut report = Report::default();
        // Of an application that cannot be asked, or a counter that does not count, nothing more
        // can be said.
        if let Some(unit) = self.retry(&mut report).await {
            self.other_request_with_its_key(&mut report, unit).await;
            self.duplicates(&mut report, unit).await;
            self.hang_up(&mut report, unit).await;
            self.request_without_key(&mut report).await;
            self.request_in_other_scope(&mut report, unit).await;
        }
        report.finish()
    }
}
