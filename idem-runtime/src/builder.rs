//! Building an engine: what holds for every handler that does not say otherwise.

use std::{
    fmt,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http::HeaderName;

#[cfg(feature = "cache")]
use crate::store::{Cached, ReplayCache};
use crate::{
    anchor::Scope,
    engine::{Carry, Idempotency, Shared, closed},
    key::Digester,
    leases::Leases,
    observer::{Observer, Tracing},
    policy::{Options, Policies},
    record::RecordedResponse,
    refusal::{ProblemDocuments, Refusals},
    seal::Seal,
    store::{Redact, Sealed, Store, Veil},
    waits::Waits,
};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) request_body: usize,
    pub(crate) response_body: usize,
    pub(crate) response_time: Duration,
    pub(crate) key_length: usize,
    pub(crate) store_timeout: Duration,
    pub(crate) record_wait: Duration,
    pub(crate) detached: usize,
    pub(crate) sweep_interval: Duration,
    pub(crate) remember_expired: Duration,
}

impl Limits {
    const DEFAULT: Self = Self {
        request_body: 2 * 1024 * 1024,
        response_body: 1024 * 1024,
        response_time: Duration::from_secs(10),
        key_length: 255,
        store_timeout: Duration::from_secs(5),
        record_wait: Duration::from_secs(2),
        detached: 1_024,
        sweep_interval: Duration::from_secs(60),
        remember_expired: Duration::from_secs(24 * 60 * 60),
    };
}

/// A builder whose scope was not said yet: it cannot build.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Unscoped;

/// A builder whose scope was said.
#[derive(Clone, Copy, Debug)]
pub struct Scoped(Scope);

/// Builds an engine; [`Idempotency::builder`] starts one.
///
/// What is said here holds for every handler that does not say otherwise.
#[must_use = "an engine is made by `build`"]
pub struct Builder<S> {
    store: Arc<dyn Store>,
    scope: S,
    pub(crate) options: Options,
    digester: Digester,
    seal: Option<Arc<dyn Seal>>,
    redact: Option<Redact>,
    limits: Limits,
    observer: Arc<dyn Observer>,
    refusals: Arc<dyn Refusals>,
    documentation: Option<Arc<str>>,
    left_out: Vec<HeaderName>,
    operation_header: Option<HeaderName>,
    carry: Option<Carry>,
    #[cfg(feature = "cache")]
    replay_cache: Option<ReplayCache>,
}

impl<S: fmt::Debug> fmt::Debug for Builder<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Builder")
            .field("store", &self.store)
            .field("scope", &self.scope)
            .finish_non_exhaustive()
    }
}

/// The header on every replay; its value is `true`.
pub const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// The header on the answer to a request whose key nobody used; its value is `true`. See
/// [`Idempotency::layer`].
pub const IGNORED: HeaderName = HeaderName::from_static("idempotent-ignored");

/// The header that names the operation which a request belongs to, unless
/// [`operation_header`](Builder::operation_header) says otherwise; its value is an
/// [`OperationId`](crate::OperationId).
pub const OPERATION: HeaderName = HeaderName::from_static("idempotent-operation");

/// What is never recorded unless asked for: what speaks of one connection, of one moment, or to
/// one caller.
pub(crate) const LEFT_OUT: [HeaderName; 15] = [
    http::header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    http::header::PROXY_AUTHENTICATE,
    http::header::PROXY_AUTHORIZATION,
    http::header::TE,
    http::header::TRAILER,
    http::header::TRANSFER_ENCODING,
    http::header::UPGRADE,
    http::header::DATE,
    http::header::AGE,
    http::header::SET_COOKIE,
    http::header::WWW_AUTHENTICATE,
    HeaderName::from_static("authentication-info"),
    HeaderName::from_static("server-timing"),
];

impl Idempotency {
    /// Starts building an engine over a store.
    pub fn builder(store: impl Store) -> Builder<Unscoped> {
        Builder {
            store: Arc::new(store),
            scope: Unscoped,
            options: Options::NONE,
            digester: Digester::Plain,
            seal: None,
            redact: None,
            limits: Limits::DEFAULT,
            observer: Arc::new(Tracing),
            refusals: Arc::new(ProblemDocuments),
            documentation: None,
            left_out: LEFT_OUT.to_vec(),
            operation_header: Some(OPERATION),
            carry: None,
            #[cfg(feature = "cache")]
            replay_cache: Some(ReplayCache::new()),
        }
    }
}

impl Builder<Unscoped> {
    /// Whose keys are, where a handler does not say.
    pub fn scope(self, scope: Scope) -> Builder<Scoped> {
        Builder {
            store: self.store,
            scope: Scoped(scope),
            options: self.options,
            digester: self.digester,
            seal: self.seal,
            redact: self.redact,
            limits: self.limits,
            observer: self.observer,
            refusals: self.refusals,
            documentation: self.documentation,
            left_out: self.left_out,
            operation_header: self.operation_header,
            carry: self.carry,
            #[cfg(feature = "cache")]
            replay_cache: self.replay_cache,
        }
    }
}

impl Builder<Scoped> {
    /// The engine.
    pub fn build(self) -> Idempotency {
        let mut left_out = self.left_out;
        left_out.extend([REPLAYED, IGNORED].into_iter().chain(self.operation_header.clone()));
        let (store, veil) = (self.store, Veil { seal: self.seal, redact: self.redact });
        // Behind the seal: what is kept is sealed as the store has it.
        #[cfg(feature = "cache")]
        let (store, replays) = Cached::over(store, self.replay_cache, &veil);
        let store = match veil {
            Veil { seal: None, redact: None } => store,
            veil => Arc::new(Sealed { store, veil }),
        };
        Idempotency {
            shared: Arc::new(Shared {
                store,
                digester: self.digester,
                options: self.options,
                scope: self.scope.0,
                policies: Policies::default(),
                limits: self.limits,
                observer: self.observer,
                refusals: self.refusals,
                documentation: self.documentation,
                left_out: left_out.iter().map(|name| name.as_str().into()).collect(),
                operation_header: self.operation_header,
                carry: self.carry,
                #[cfg(feature = "cache")]
                replays,
                leases: Leases::default(),
                waits: Waits::default(),
                background: closed(),
                taken_back: closed(),
                warned_of_outer_headers: AtomicBool::new(false),
            }),
        }
    }
}

impl<S> Builder<S> {
    /// Makes all digests HMACs under this secret: whoever reads the store cannot try out keys. All
    /// processes that share the store need the same one; with another, earlier keys are not found.
    ///
    /// # Panics
    ///
    /// When it is empty, as what is read from an unset variable is: everybody knows that one.
    #[track_caller]
    pub fn secret(mut self, secret: impl AsRef<[u8]>) -> Self {
        let secret = secret.as_ref();
        assert!(!secret.is_empty(), "secret: an empty one keeps nothing secret");
        self.digester = Digester::keyed(secret);
        self
    }

    /// Seals what is stored: answers, what is bound to issued keys, the results of steps. Default:
    /// they are stored as they are. All processes that share the store need the same seal. See
    /// [`Seal`] for what stays readable, and say a [secret](Self::secret) as well.
    ///
    /// On a store that has records already, unsealed ones are refused as unreadable, until their
    /// time is over or unless the seal accepts them.
    pub fn seal(mut self, seal: impl Seal) -> Self {
        self.seal = Some(Arc::new(seal));
        self
    }

    /// Takes out of each answer what must not be stored, before it is sealed. Whoever caused the
    /// effect gets the whole answer; every replay is of what was stored, without it, and so is a
    /// retry whose first answer was lost on the way. The values of plain functions are stored whole.
    ///
    /// A redaction that panics leaves a tombstone: that it was done is recorded, and no answer. A
    /// `Content-Length` that became wrong is left out.
    ///
    /// ```
    /// # use idem_runtime::{Idempotency, Scope, store::MemoryStore};
    /// let idem = Idempotency::builder(MemoryStore::new())
    ///     .scope(Scope::header("X-API-Key"))
    ///     .redact(|answer| answer.headers.retain(|(name, _)| name != "x-session-token"))
    ///     .build();
    /// # let _ = idem;
    /// ```
    pub fn redact(
        mut self,
        redact: impl Fn(&mut RecordedResponse) + Send + Sync + 'static,
    ) -> Self {
        self.redact = Some(Arc::new(redact));
        self
    }

    /// The shape of refusals. Default: problem documents (RFC 9457).
    pub fn refusals(mut self, refusals: impl Refusals + 'static) -> Self {
        self.refusals = Arc::new(refusals);
        self
    }

    /// Where clients read how this API is idempotent: the `type` of problem documents, and a
    /// `Link`.
    pub fn documentation(mut self, url: impl Into<Arc<str>>) -> Self {
        self.documentation = Some(url.into());
        self
    }

    /// Who hears what became of each request. Default: `tracing`.
    pub fn observer(mut self, observer: impl Observer) -> Self {
        self.observer = Arc::new(observer);
        self
    }

    /// Leaves more headers out of recorded answers than the default list: what is hop-by-hop
    /// (`Connection` and what it names, `Keep-Alive`, `Proxy-*`, `TE`, `Trailer`,
    /// `Transfer-Encoding`, `Upgrade`), `Date`, `Age`, `Set-Cookie`, `WWW-Authenticate`,
    /// `Authentication-Info` and `Server-Timing`.
    pub fn leave_out(mut self, headers: impl IntoIterator<Item = HeaderName>) -> Self {
        self.left_out.extend(headers);
        self
    }

    /// The header in which every answer to a protected request, be it the handler's own, a replay or
    /// a refusal, names its operation, so that a support ticket leads to the record; `None` leaves
    /// it out. Default: [`OPERATION`]. It is part of no record. Where several policies protect one
    /// request, it names the operation of the outermost.
    ///
    /// ```
    /// use http::HeaderName;
    /// # use idem_runtime::{Idempotency, Scope, store::MemoryStore};
    ///
    /// let idem = Idempotency::builder(MemoryStore::new())
    ///     .scope(Scope::header("X-API-Key"))
    ///     .operation_header(HeaderName::from_static("x-payment-operation"))
    ///     .build();
    /// # let _ = idem;
    /// ```
    pub fn operation_header(mut self, name: impl Into<Option<HeaderName>>) -> Self {
        self.operation_header = name.into();
        self
    }

    /// Records a header although it is on the default list. Think twice about `Set-Cookie`.
    pub fn keep(mut self, header: &HeaderName) -> Self {
        self.left_out.retain(|name| name != header);
        self
    }

    /// The largest request body in bytes that is buffered; a larger one is refused with 413.
    /// Default: 2 MiB.
    pub fn request_body_limit(mut self, bytes: usize) -> Self {
        self.limits.request_body = bytes;
        self
    }

    /// The largest response body in bytes that is recorded; of a larger one only the fact is.
    /// Default: 1 MiB.
    pub fn response_body_limit(mut self, bytes: usize) -> Self {
        self.limits.response_body = bytes;
        self
    }

    /// How long a response body may take to be complete; of a slower one only the fact is recorded,
    /// and the rest is streamed. Default: 10 seconds.
    pub fn response_time_limit(mut self, time: Duration) -> Self {
        self.limits.response_time = time;
        self
    }

    /// The longest key in characters, where no format says otherwise. Default: 255.
    pub fn key_length(mut self, characters: usize) -> Self {
        self.limits.key_length = characters.max(1);
        self
    }

    /// How long a single call of the store may take. Default: 5 seconds.
    pub fn store_timeout(mut self, time: Duration) -> Self {
        self.limits.store_timeout = time;
        self
    }

    /// How long a reply waits for its record; after that it goes out, and recording goes on in the
    /// background. Default: 2 seconds.
    pub fn record_wait(mut self, time: Duration) -> Self {
        self.limits.record_wait = time;
        self
    }

    /// How many handlers whose clients hung up may be running, and answers waiting to be recorded,
    /// before new requests are refused with 503 `busy`, replays included. Default: 1,024.
    pub fn detached_limit(mut self, at_most: usize) -> Self {
        self.limits.detached = at_most;
        self
    }

    /// How often records that are over are removed. It only frees space. Default: each minute.
    pub fn sweep_interval(mut self, interval: Duration) -> Self {
        self.limits.sweep_interval = interval.max(Duration::from_millis(10));
        self
    }

    /// For how long an issued key is known after its validity, so that it is refused as expired and
    /// not as unknown, and cannot be issued again. Default: 24 hours.
    pub fn remember_expired(mut self, time: Duration) -> Self {
        self.limits.remember_expired = time;
        self
    }

    /// How completed records of a [remote](Store::is_remote) store (PostgreSQL, MySQL, MariaDB,
    /// Redis) are kept at hand in this process, so that a repetition is answered without a call of
    /// the store; `None` keeps none. Default: [`ReplayCache::new`], at most 32 MiB and at most ten
    /// seconds old. Over other stores it does nothing.
    ///
    /// What is kept was read from the store: a record from its first replay on, checked against the
    /// request's fingerprint, and sealed if it is sealed there. It is replayed for no longer than
    /// the record is valid, and for no longer than [`max_age`](ReplayCache::max_age) without asking
    /// the store again. Nothing that is running or that ended without an answer is ever kept;
    /// claims, mismatches, waiting, look-ups and operators always go to the store, and so nothing
    /// ever runs because of what is kept here.
    ///
    /// A completed record does not change, but it can go away before its time: by a
    /// [purge](crate::Admin::purge) or because the store has lost it. A purge through this engine
    /// that was answered takes effect at once. **After a purge through another engine, as in an
    /// operators' tool, this one may go on for up to `max_age` to answer repetitions of the purged
    /// request with its old answer, where they would run again**; other requests with the key are
    /// not concerned. A purge whose call failed or was given up may have been made by the store
    /// later, and counts as one through another engine. Time in which the machine is suspended does
    /// not count.
    ///
    /// ```
    /// # use idem_runtime::{Idempotency, Scope, store::MemoryStore};
    /// # let store = MemoryStore::new();
    /// let idem = Idempotency::builder(store)
    ///     .scope(Scope::header("X-API-Key"))
    ///     .replay_cache(None)
    ///     .build();
    /// # let _ = idem;
    /// ```
    #[cfg(feature = "cache")]
    pub fn replay_cache(mut self, cache: impl Into<Option<ReplayCache>>) -> Self {
        self.replay_cache = cache.into();
        self
    }

    /// Wraps the future of each handler, in the request's own task, when it starts. A handler whose
    /// client hangs up goes on in another task: what it reads from task-locals must be carried
    /// along.
    ///
    /// ```
    /// # use idem_runtime::{Idempotency, Scope, store::MemoryStore};
    /// tokio::task_local! { static REQUEST_ID: u64; }
    ///
    /// let idem = Idempotency::builder(MemoryStore::new())
    ///     .scope(Scope::header("X-API-Key"))
    ///     .carry(|handler| match REQUEST_ID.try_with(|id| *id) {
    ///         Ok(id) => Box::pin(REQUEST_ID.scope(id, handler)),
    ///         Err(_) => handler,
    ///     })
    ///     .build();
    /// # let _ = idem;
    /// ```
    pub fn carry(
        mut self,
        wrap: impl Fn(BoxFuture<'static, ()>) -> BoxFuture<'static, ()> + Send + Sync + 'static,
    ) -> Self {
        self.carry = Some(Arc::new(wrap));
        self
    }
}
