//! Two processes that share a store, clients that retry until they have an answer, and what happens
//! meanwhile.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::{FromRef, State},
    http::{HeaderMap, Request, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use futures_util::{StreamExt, future::BoxFuture, stream};
use http_body_util::BodyExt;
use idem_runtime::{
    Anchor, Idempotency, IdempotentExt, InFlight, OnUnknown, Operation, Policy, Scope, store::Store,
};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tests::{
    history::{
        Answer, History, Recorded, Trouble, What,
        check::{Rules, Summary, Violations, check},
    },
    server::Server,
};
use tokio::{
    runtime::{Handle, Runtime},
    time::{sleep, timeout},
};
use tower::ServiceExt;

/// After this long a client has been left alone.
const PATIENCE: Duration = Duration::from_secs(60);
/// So often a handler does something else than it should, for one key.
const TRIALS: usize = 3;

/// Makes a store as a process of its own does: with connections of its own to the same records.
pub(crate) type Open = Arc<dyn Fn() -> BoxFuture<'static, Arc<dyn Store>> + Send + Sync>;

/// How a run is made.
#[derive(Clone)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// How many requests there are to be at least.
    pub(crate) requests: usize,
    pub(crate) lease: Duration,
    /// Whether calls of the store get lost on their way.
    pub(crate) troubled: bool,
    /// Whether the processes are reached over sockets.
    pub(crate) over_http: bool,
    /// How many keys are in use at once.
    pub(crate) keys_at_once: usize,
}

impl Plan {
    /// A short run over sockets, with nothing but the clients and handlers going wrong.
    pub(crate) fn new(seed: u64, requests: usize) -> Self {
        let lease = Duration::from_millis(400);
        Self { seed, requests, lease, troubled: false, over_http: true, keys_at_once: 16 }
    }
}

/// What an application's state is.
#[derive(Clone)]
struct App {
    engine: Idempotency,
    history: History,
    process: usize,
    seed: u64,
    lease: Duration,
    /// How often a handler ran for a key, in all processes.
    trials: Trials,
}

type Trials = Arc<Mutex<HashMap<String, usize>>>;

impl FromRef<App> for Idempotency {
    fn from_ref(app: &App) -> Self {
        app.engine.clone()
    }
}

/// A process of the application: its engine and its connections are on a runtime of its own, with
/// which they die.
struct Process {
    number: usize,
    runtime: Handle,
    /// Until it dies.
    life: Mutex<Option<Runtime>>,
    engine: Idempotency,
    router: Router,
    server: Option<Server>,
}

impl Process {
    async fn start(
        number: usize,
        open: &Open,
        history: &History,
        trials: &Trials,
        plan: &Plan,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let handle = runtime.handle().clone();
        let store = runtime.spawn(open()).await.expect("a store");
        let mut store = Recorded::over(store, history, number);
        if plan.troubled {
            store = store.with(Trouble::new(plan.seed ^ number as u64));
        }
        let engine = Idempotency::builder(store)
            .scope(Scope::header("X-API-Key"))
            .store_timeout(Duration::from_secs(2))
            // An answer that goes out before its record may not be the one that is recorded.
            .record_wait(PATIENCE)
            .sweep_interval(Duration::from_millis(200))
            .build();
        let app = App {
            engine: engine.clone(),
            history: history.clone(),
            process: number,
            seed: plan.seed,
            lease: plan.lease,
            trials: Arc::clone(trials),
        };
        let router = router(app);
        let server = match plan.over_http {
            true => {
                let served = Server::start(router.clone());
                Some(runtime.spawn(served).await.expect("a server"))
            }
            false => None,
        };
        let (life, runtime) = (Mutex::new(Some(runtime)), handle);
        Self { number, runtime, life, engine, router, server }
    }

    /// Ends all that goes on at whichever awaits it stands.
    fn die(&self) {
        if let Some(runtime) = self.life.lock().expect("no panic under this lock").take() {
            runtime.shutdown_background();
        }
    }

    /// Sends a request, which the client may give up. Of what was answered, the whole or nothing.
    async fn send(&self, key: &str, patience: Duration) -> Option<Answer> {
        let path = format!("/{}", key.split('-').next().unwrap_or_default());
        let answering = async {
            match &self.server {
                Some(server) => {
                    let response = server.post(&path, key, "{}").send().await.ok()?;
                    let (status, headers) = (response.status(), response.headers().clone());
                    Some(answer(status.as_u16(), &headers, response.bytes().await.ok()?))
                }
                None => {
                    let request = Request::post(path)
                        .header("x-api-key", "a")
                        .header("idempotency-key", key)
                        .body(Body::from("{}"))
                        .expect("a request");
                    let router = self.router.clone();
                    let answering = async move {
                        let response = router.oneshot(request).await.ok()?;
                        let (head, body) = response.into_parts();
                        let body = body.collect().await.ok()?.to_bytes();
                        Some(answer(head.status.as_u16(), &head.headers, body))
                    };
                    // Given up in the process, as a server does it for a client that hangs up.
                    let served = timeout(patience, answering);
                    self.runtime.spawn(served).await.ok()?.ok()?
                }
            }
        };
        timeout(patience, answering).await.ok()?
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.die();
    }
}

fn answer(status: u16, headers: &HeaderMap, body: Bytes) -> Answer {
    Answer { status, replayed: headers.contains_key("idempotent-replayed"), body }
}

/// `/pay`, in `/well` without anything that goes wrong in the handler, the same for clients that wait for the owner's answer, and the same where unknown
/// outcomes are refused. A key begins with the name of its route.
fn router(app: App) -> Router {
    let policy = || Policy::new(Anchor::header("Idempotency-Key")).lease(app.lease);
    let wait = InFlight::Wait(Duration::from_millis(200));
    Router::new()
        .route("/pay", post(pay.idempotent(policy())))
        .route("/await", post(pay.idempotent(policy().in_flight(wait))))
        .route("/well", post(pay_well.idempotent(policy())))
        .route("/once", post(pay.idempotent(policy().on_unknown(OnUnknown::Refuse))))
        .with_state(app)
}

/// Has its effect and says so, unless the seed says otherwise for this run of this key.
async fn pay(State(app): State<App>, operation: Operation, headers: HeaderMap) -> Response {
    let key = headers["idempotency-key"].to_str().expect("a key in ASCII");
    let ran = app.history.ran(app.process, key, &operation);
    let trial = {
        let mut trials = app.trials.lock().expect("no panic under this lock");
        let trial = trials.entry(key.to_owned()).or_default();
        *trial += 1;
        *trial
    };
    let of_key = key.bytes().fold(app.seed, |hash, byte| {
        hash.wrapping_mul(0x0100_0000_01b3).wrapping_add(u64::from(byte))
    });
    let mut rng = SmallRng::seed_from_u64(of_key.wrapping_add(trial as u64));
    let roll = if trial > TRIALS { 0 } else { rng.random_range(0..100) };
    let pause = Duration::from_micros(rng.random_range(0..2_000));
    sleep(pause).await;
    let response = match roll {
        0..80 => {
            let did = ran.effect();
            sleep(pause).await;
            (StatusCode::CREATED, did).into_response()
        }
        80..86 => (StatusCode::PAYMENT_REQUIRED, "declined").into_response(),
        86..89 => (StatusCode::INTERNAL_SERVER_ERROR, "nothing happened").into_response(),
        89..93 => {
            ran.effect();
            (StatusCode::INTERNAL_SERVER_ERROR, "who knows").into_response()
        }
        // Without the message that a panic prints.
        93..95 => {
            ran.effect();
            std::panic::resume_unwind(Box::new("on purpose"))
        }
        // Long enough for a lease to end, if its renewals are lost.
        95..98 => {
            sleep(app.lease * 2).await;
            (StatusCode::CREATED, ran.effect()).into_response()
        }
        _ => {
            let did = ran.effect();
            sleep(app.lease * 2).await;
            (StatusCode::CREATED, did).into_response()
        }
    };
    ran.end();
    response
}

/// Has its effect and says so.
async fn pay_well(State(app): State<App>, operation: Operation, headers: HeaderMap) -> Response {
    let key = headers["idempotency-key"].to_str().expect("a key in ASCII");
    let ran = app.history.ran(app.process, key, &operation);
    let did = ran.effect();
    ran.end();
    (StatusCode::CREATED, did).into_response()
}

/// Two processes that share a store, and their clients.
pub(crate) struct Site {
    plan: Plan,
    open: Open,
    history: History,
    trials: Trials,
    processes: [RwLock<Arc<Process>>; 2],
    numbers: AtomicUsize,
    requests: AtomicUsize,
}

impl Site {
    pub(crate) async fn start(plan: Plan, open: Open) -> Arc<Self> {
        println!("IDEM_SEED={}", plan.seed);
        let (history, trials) = (History::default(), Trials::default());
        let process = async |number| {
            let process = Process::start(number, &open, &history, &trials, &plan).await;
            RwLock::new(Arc::new(process))
        };
        let processes = [process(0).await, process(1).await];
        let (numbers, requests) = (AtomicUsize::new(2), AtomicUsize::new(0));
        Arc::new(Self { plan, open, history, trials, processes, numbers, requests })
    }

    fn process(&self, place: usize) -> Arc<Process> {
        Arc::clone(&self.processes[place].read().expect("a process"))
    }

    /// Ends a process, and starts another one in its place.
    pub(crate) async fn crash(&self, place: usize) {
        let number = self.numbers.fetch_add(1, Ordering::SeqCst);
        let (open, history, trials) = (&self.open, &self.history, &self.trials);
        let next = Process::start(number, open, history, trials, &self.plan).await;
        let next = Arc::new(next);
        let mut process = self.processes[place].write().expect("a process");
        let last = std::mem::replace(&mut *process, next);
        drop(process);
        last.die();
    }

    /// How many requests there were.
    pub(crate) fn sent(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    /// Sends a request of a client and waits for it as long as the client does.
    async fn request(&self, place: usize, key: &str, patience: Duration) -> Option<Answer> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let process = self.process(place);
        let requested = self.history.requested(process.number, key);
        let answer = process.send(key, patience).await?;
        requested.answered(answer.clone());
        Some(answer)
    }

    /// A client of the first process alone, which retries until it has a success.
    #[cfg(feature = "servers")]
    pub(crate) async fn succeed(&self, key: &str) {
        let since = Instant::now();
        while !self.request(0, key, PATIENCE).await.as_ref().is_some_and(is_final) {
            assert!(since.elapsed() < PATIENCE, "{key} is not answered");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// How many effects there were under a key.
    #[cfg(feature = "servers")]
    pub(crate) fn effects(&self, of: &str) -> usize {
        let events = self.history.events();
        let effects = events.iter().map(|event| match &event.what {
            What::Ran { key, effects, .. } if key == of => effects.len(),
            _ => 0,
        });
        effects.sum()
    }

    /// A client that retries until it has a success, or until it is told that nobody knows.
    async fn client(&self, key: &str, mut rng: SmallRng) {
        let since = Instant::now();
        loop {
            let patience = match rng.random_ratio(1, 10) {
                true => Duration::from_micros(rng.random_range(0..4_000)),
                false => PATIENCE,
            };
            let place = rng.random_range(0..2);
            let answer = self.request(place, key, patience).await;
            if answer.as_ref().is_some_and(is_final) {
                return;
            }
            assert!(
                since.elapsed() < PATIENCE,
                "IDEM_SEED={}: {key} is not answered: {answer:?}; {:?}",
                self.plan.seed,
                self.history.about(key).iter().rev().take(30).collect::<Vec<_>>()
            );
            // A shared seed must not keep clients in step for ever.
            sleep(Duration::from_millis(rng.random_range(1..30))).await;
        }
    }

    /// All clients of a key.
    async fn clients(&self, number: u64) {
        let mut rng = SmallRng::seed_from_u64(self.plan.seed.wrapping_mul(31) ^ number);
        let route = ["pay", "pay", "await", "once"][rng.random_range(0..4)];
        let key = format!("{route}-{number}");
        let clients = (0..rng.random_range(1..=5)).map(|_| {
            let (mut rng, key) = (SmallRng::seed_from_u64(rng.random()), &key);
            async move {
                // Some come when it is all over.
                let late = rng.random_ratio(1, 3);
                sleep(Duration::from_millis(if late { 30 } else { rng.random_range(0..2) })).await;
                self.client(key, rng).await;
            }
        });
        futures_util::future::join_all(clients).await;
    }

    /// Sends requests until there were enough, and as long as something goes on meanwhile.
    pub(crate) async fn serve(self: &Arc<Self>, meanwhile: impl Future<Output = ()>) {
        let over = AtomicBool::new(false);
        let clients = async {
            let enough = || self.sent() >= self.plan.requests && over.load(Ordering::SeqCst);
            stream::iter(0_u64..)
                .take_while(|_| std::future::ready(!enough()))
                .map(|number| {
                    let site = Arc::clone(self);
                    tokio::spawn(async move { site.clients(number).await })
                })
                .buffer_unordered(self.plan.keys_at_once)
                .for_each(async |ended| ended.expect("clients that are answered"))
                .await;
        };
        let meanwhile = async {
            meanwhile.await;
            over.store(true, Ordering::SeqCst);
        };
        tokio::join!(clients, meanwhile);
    }

    /// Waits for what goes on, asks for everything once more, and checks the history.
    pub(crate) async fn judge(&self, renewals_hold: bool) -> Result<Summary, Violations> {
        for place in 0..2 {
            assert!(self.process(place).engine.drain(PATIENCE).await, "work that never ends");
        }
        let (mut keys, mut records) = (Vec::new(), Vec::new());
        for event in self.history.events() {
            match event.what {
                What::Requested { key, .. } => keys.push(key),
                What::Asked { key, .. } => records.push(key),
                What::Ran { .. } => {}
            }
        }
        keys.sort_unstable();
        keys.dedup();
        records.sort_unstable_by_key(|key| *key.as_bytes());
        records.dedup();
        let since = Instant::now();
        stream::iter(keys.iter().enumerate())
            .for_each_concurrent(8, async |(number, key)| {
                loop {
                    let answer = self.request(number % 2, key, PATIENCE).await;
                    if answer.as_ref().is_some_and(is_final) {
                        return;
                    }
                    assert!(since.elapsed() < PATIENCE, "{key} is not answered: {answer:?}");
                    sleep(Duration::from_millis(10)).await;
                }
            })
            .await;
        let auditor = (self.open)().await;
        let auditor = Recorded::over(auditor, &self.history, usize::MAX);
        stream::iter(&records)
            .for_each_concurrent(8, async |key| {
                while let Err(error) = auditor.read(key).await {
                    assert!(since.elapsed() < PATIENCE, "{key:?} cannot be read: {error:?}");
                    sleep(Duration::from_millis(10)).await;
                }
            })
            .await;
        let rules = Rules { once: |key| key.starts_with("once-"), renewals_hold };
        let summary = check(&self.history.events(), rules)?;
        println!("IDEM_SEED={}: {} keys, {summary:?}", self.plan.seed, keys.len());
        Ok(summary)
    }

    /// Asserts that the history is allowed.
    pub(crate) async fn assert_allowed(&self, renewals_hold: bool) -> Summary {
        let judged = self.judge(renewals_hold).await;
        judged.unwrap_or_else(|found| panic!("IDEM_SEED={}: {found}", self.plan.seed))
    }
}

/// Whether a client stops asking.
fn is_final(answer: &Answer) -> bool {
    let unknown = br#""unknown_outcome""#;
    let is_unknown = || answer.body.windows(unknown.len()).any(|window| window == unknown);
    answer.status == 201 || answer.status == 409 && is_unknown()
}

/// A number that the environment may say.
fn said<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok().and_then(|said| said.parse().ok())
}

/// The seed of a run: what `IDEM_SEED` says, or another one each time.
pub(crate) fn seed() -> u64 {
    said("IDEM_SEED").unwrap_or_else(|| u64::from(rand::random::<u32>()))
}

/// How many requests a run makes, unless `IDEM_HISTORY_REQUESTS` says otherwise.
pub(crate) fn requests(unless_said: usize) -> usize {
    said("IDEM_HISTORY_REQUESTS").unwrap_or(unless_said)
}

/// A pause by chance.
pub(crate) fn pause(rng: &mut SmallRng, milliseconds: Range<u64>) -> tokio::time::Sleep {
    sleep(Duration::from_millis(rng.random_range(milliseconds)))
}
