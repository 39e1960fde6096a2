//! The real thing: processes, each an engine on a runtime of its own, over one store, by a clock
//! that a schedule moves; and a list of everything that happened, in its order.

use std::{
    collections::HashMap,
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{FromRef, State},
    http::{Request, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use futures_util::future::BoxFuture;
use idem_runtime::{
    Anchor, Idempotency, IdempotentExt, InFlight, Key, OnUnknown, Operation, OperationId, Policy,
    Record, Recording, Recovered, Scope, Settle, Token,
    store::{
        Checkpoint, Claim, Claimed, Completion, Issue, ManualClock, Renewal, Store, StoreError,
        Written,
    },
};
use tests::faults::{Call, Faults, Faulty};
use tokio::{runtime::Runtime, sync::Semaphore, task::JoinHandle};
use tower::ServiceExt;

use crate::schedule::{Asking, Behaviour, Records, Recover, Rules, Unknown};

pub(crate) const LEASE: u64 = 6;
pub(crate) const TTL: u64 = 30;
pub(crate) const REMEMBERED: u64 = 10;
pub(crate) const WAIT: u64 = 3;
const LARGEST: usize = 200;

/// How a claim was to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndKind {
    Complete,
    Tombstone,
    Release,
    Forget,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Got {
    Done,
    Fenced,
    Gone,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) replayed: bool,
    pub(crate) made: Option<String>,
    pub(crate) body: String,
}

impl Answer {
    /// The code of a refusal.
    pub(crate) fn code(&self) -> Option<String> {
        let problem: serde_json::Value = serde_json::from_str(&self.body).ok()?;
        Some(problem.get("code")?.as_str()?.to_owned())
    }
}

/// Something that happened.
#[derive(Clone, Debug)]
pub(crate) enum Happened {
    Granted {
        key: Key,
        token: Token,
        attempt: u32,
        id: OperationId,
    },
    Renewed {
        token: Token,
        held: bool,
    },
    Ended {
        token: Token,
        kind: EndKind,
        got: Got,
    },
    /// The owner has the store's answer to that.
    Heard {
        token: Token,
    },
    RecoverAsked {
        request: usize,
        attempt: u32,
        id: OperationId,
    },
    Started {
        request: usize,
        attempt: u32,
        id: OperationId,
    },
    Effect {
        request: usize,
    },
    Finished {
        request: usize,
    },
    Answered {
        request: usize,
        answer: Answer,
    },
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<Happened>>>);

impl Log {
    fn push(&self, happened: Happened) {
        self.0.lock().expect("no panic under this lock").push(happened);
    }

    pub(crate) fn take(&self) -> Vec<Happened> {
        std::mem::take(&mut self.0.lock().expect("no panic under this lock"))
    }
}

/// Tells what a store was asked and has done, below the faults.
#[derive(Debug)]
struct Told {
    store: Arc<dyn Store>,
    log: Log,
    running: Arc<AtomicUsize>,
}

struct InCall(Arc<AtomicUsize>);

impl Drop for InCall {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Told {
    fn begin(&self) -> InCall {
        self.running.fetch_add(1, Ordering::SeqCst);
        InCall(Arc::clone(&self.running))
    }

    fn ended(&self, token: Token, kind: EndKind, written: &Result<Written, StoreError>) {
        let got = match written {
            Ok(Written::Done) => Got::Done,
            Ok(Written::Fenced(_)) => Got::Fenced,
            Ok(Written::Gone) => Got::Gone,
            Err(_) => return,
        };
        self.log.push(Happened::Ended { token, kind, got });
    }
}

type Asked<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

impl Store for Told {
    fn claim<'a>(&'a self, claim: &'a Claim) -> Asked<'a, Claimed> {
        Box::pin(async move {
            let _call = self.begin();
            let claimed = self.store.claim(claim).await;
            if let Ok(Claimed::Granted(record)) = &claimed {
                let (key, token) = (claim.key, claim.token);
                let (attempt, id) = (record.attempt, record.operation_id);
                self.log.push(Happened::Granted { key, token, attempt, id });
            }
            claimed
        })
    }

    fn complete<'a>(&'a self, completion: &'a Completion) -> Asked<'a, Written> {
        Box::pin(async move {
            let _call = self.begin();
            let written = self.store.complete(completion).await;
            let kind = match completion.flags.contains(idem_runtime::Flags::TOMBSTONE) {
                true => EndKind::Tombstone,
                false => EndKind::Complete,
            };
            self.ended(completion.token, kind, &written);
            written
        })
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> Asked<'a, Written> {
        Box::pin(async move {
            let _call = self.begin();
            self.store.issue(issue).await
        })
    }

    fn checkpoint<'a>(&'a self, checkpoint: &'a Checkpoint) -> Asked<'a, Written> {
        self.store.checkpoint(checkpoint)
    }

    fn release<'a>(&'a self, key: &'a Key, token: &'a Token) -> Asked<'a, Written> {
        Box::pin(async move {
            let _call = self.begin();
            let written = self.store.release(key, token).await;
            self.ended(*token, EndKind::Release, &written);
            written
        })
    }

    fn forget<'a>(&'a self, key: &'a Key, token: &'a Token) -> Asked<'a, Written> {
        Box::pin(async move {
            let _call = self.begin();
            let written = self.store.forget(key, token).await;
            self.ended(*token, EndKind::Forget, &written);
            written
        })
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> Asked<'a, Vec<bool>> {
        Box::pin(async move {
            let _call = self.begin();
            let renewed = self.store.renew(claims).await;
            for (claim, held) in claims.iter().zip(renewed.iter().flatten()) {
                self.log.push(Happened::Renewed { token: claim.token, held: *held });
            }
            renewed
        })
    }

    fn read<'a>(&'a self, key: &'a Key) -> Asked<'a, Option<Record>> {
        Box::pin(async move {
            let _call = self.begin();
            self.store.read(key).await
        })
    }

    fn sweep(&self, limit: usize) -> Asked<'_, usize> {
        Box::pin(async move {
            let _call = self.begin();
            self.store.sweep(limit).await
        })
    }
}

/// Tells which ends of claims an engine has its answers to, above the faults.
#[derive(Clone, Debug)]
struct Hearing {
    store: Faulty,
    log: Log,
}

impl Hearing {
    async fn ended(
        &self,
        token: Token,
        ending: impl Future<Output = Result<Written, StoreError>>,
    ) -> Result<Written, StoreError> {
        let written = ending.await;
        if written.is_ok() {
            self.log.push(Happened::Heard { token });
        }
        written
    }
}

impl Store for Hearing {
    fn claim<'a>(&'a self, claim: &'a Claim) -> Asked<'a, Claimed> {
        self.store.claim(claim)
    }

    fn complete<'a>(&'a self, completion: &'a Completion) -> Asked<'a, Written> {
        Box::pin(self.ended(completion.token, self.store.complete(completion)))
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> Asked<'a, Written> {
        self.store.issue(issue)
    }

    fn checkpoint<'a>(&'a self, checkpoint: &'a Checkpoint) -> Asked<'a, Written> {
        self.store.checkpoint(checkpoint)
    }

    fn release<'a>(&'a self, key: &'a Key, token: &'a Token) -> Asked<'a, Written> {
        Box::pin(self.ended(*token, self.store.release(key, token)))
    }

    fn forget<'a>(&'a self, key: &'a Key, token: &'a Token) -> Asked<'a, Written> {
        Box::pin(self.ended(*token, self.store.forget(key, token)))
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> Asked<'a, Vec<bool>> {
        self.store.renew(claims)
    }

    fn read<'a>(&'a self, key: &'a Key) -> Asked<'a, Option<Record>> {
        self.store.read(key)
    }

    fn sweep(&self, limit: usize) -> Asked<'_, usize> {
        self.store.sweep(limit)
    }
}

/// What the handlers of a process know.
#[derive(Clone, Debug)]
struct App {
    engine: Idempotency,
    log: Log,
    gates: Arc<Mutex<HashMap<usize, Arc<Semaphore>>>>,
}

impl FromRef<App> for Idempotency {
    fn from_ref(app: &App) -> Self {
        app.engine.clone()
    }
}

/// What a request wants of its handler, beside its body.
#[derive(Clone, Copy, Debug)]
struct Wish {
    request: usize,
    behaviour: Behaviour,
    recover: Recover,
    gated: bool,
}

async fn handler(
    State(app): State<App>,
    axum::Extension(wish): axum::Extension<Wish>,
    operation: Operation,
) -> Response {
    let (request, attempt, id) = (wish.request, operation.attempt(), operation.id());
    app.log.push(Happened::Started { request, attempt, id });
    if request % 2 == 0 {
        app.log.push(Happened::Effect { request });
    }
    if wish.gated {
        let gate = Arc::new(Semaphore::new(0));
        app.gates.lock().expect("a lock").insert(request, Arc::clone(&gate));
        gate.acquire().await.expect("an open gate").forget();
    }
    if request % 2 == 1 {
        app.log.push(Happened::Effect { request });
    }
    tokio::task::yield_now().await;
    app.log.push(Happened::Finished { request });
    let body = made(request, attempt);
    let mut response = match wish.behaviour {
        Behaviour::Status(status) => {
            (StatusCode::from_u16(status).expect("a status"), body).into_response()
        }
        Behaviour::Large => (body + &"x".repeat(LARGEST)).into_response(),
        // The hook that prints panics is not asked.
        Behaviour::Panic => std::panic::resume_unwind(Box::new("as the schedule says")),
        Behaviour::Recorded => (StatusCode::CONFLICT, Settle::recorded(), body).into_response(),
        Behaviour::Forgotten => (Settle::forgotten(), body).into_response(),
        Behaviour::Uncertain => (Settle::uncertain(), body).into_response(),
        Behaviour::Tombstone => (Settle::tombstone(), body).into_response(),
    };
    response.headers_mut().insert("x-made", request.to_string().parse().expect("a value"));
    response
}

/// The body that the handler of a request makes.
pub(crate) fn made(request: usize, attempt: u32) -> String {
    format!("request {request} as attempt {attempt}")
}

/// The body that `recover` makes for a request.
pub(crate) fn recovered(request: usize) -> String {
    format!("recovered by request {request}")
}

fn policy(rules: Rules) -> (Anchor, Policy) {
    let anchor = Anchor::header("idempotency-key").space("model").ttl(Duration::from_secs(TTL));
    let mut policy =
        Policy::new(anchor).lease(Duration::from_secs(LEASE)).record(match rules.records {
            Records::Success => Recording::Success,
            Records::Final => Recording::Final,
            Records::All => Recording::All,
        });
    policy = match rules.unknown {
        Unknown::Rerun => policy.on_unknown(OnUnknown::Rerun),
        Unknown::Refuse => policy.on_unknown(OnUnknown::Refuse),
        Unknown::Recover => policy.recover(|context| {
            Box::pin(async move {
                let app: App = context.state::<App>().expect("the state").clone();
                let wish = *context.extensions().get::<Wish>().expect("a wish");
                let (request, operation) = (wish.request, context.operation());
                let (attempt, id) = (operation.attempt(), operation.id());
                app.log.push(Happened::RecoverAsked { request, attempt, id });
                match wish.recover {
                    Recover::Answered => Recovered::answered(recovered(request)),
                    Recover::Never => Recovered::never_happened(),
                    Recover::Unknown => Recovered::unknown(),
                }
            })
        }),
    };
    if rules.issued {
        policy = policy.issued();
    }
    if rules.waits {
        policy = policy.in_flight(InFlight::Wait(Duration::from_secs(WAIT)));
    }
    (anchor, policy)
}

struct Process {
    runtime: Runtime,
    app: App,
    router: Router,
    clients: HashMap<usize, JoinHandle<()>>,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process").finish_non_exhaustive()
    }
}

/// All processes and their store.
#[derive(Debug)]
pub(crate) struct World {
    rules: Rules,
    clock: ManualClock,
    store: Hearing,
    pub(crate) faults: Faults,
    pub(crate) log: Log,
    running: Arc<AtomicUsize>,
    processes: Vec<Process>,
}

impl World {
    pub(crate) fn new(rules: Rules, store: Arc<dyn Store>, clock: ManualClock) -> Self {
        let (log, running) = (Log::default(), Arc::default());
        let told = Told { store, log: log.clone(), running: Arc::clone(&running) };
        let (store, faults) = Faulty::over(told);
        let store = Hearing { store, log: log.clone() };
        let mut world = Self { rules, clock, store, faults, log, running, processes: Vec::new() };
        world.processes = vec![world.process(), world.process()];
        world
    }

    fn process(&self) -> Process {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        let engine = Idempotency::builder(self.store.clone())
            .scope(Scope::header("x-tenant"))
            .response_body_limit(LARGEST)
            .remember_expired(Duration::from_secs(REMEMBERED))
            .observer(|_: &idem_runtime::Event<'_>| {})
            .build();
        let app = App { engine, log: self.log.clone(), gates: Arc::default() };
        let (_, policy) = policy(self.rules);
        let router =
            Router::new().route("/", post(handler.idempotent(policy))).with_state(app.clone());
        Process { runtime, app, router, clients: HashMap::new() }
    }

    /// Drops a process with everything that runs in it.
    pub(crate) fn crash(&mut self, process: usize) {
        let new = self.process();
        drop(std::mem::replace(&mut self.processes[process], new));
    }

    /// Lets everything go on until nothing moves. The runtimes are never idle, so that their
    /// clocks, which stand still, do not jump to the next timer.
    pub(crate) fn settle(&self) {
        loop {
            for process in &self.processes {
                process.runtime.block_on(async {
                    for _ in 0..12 {
                        tokio::task::yield_now().await;
                    }
                });
            }
            if self.running.load(Ordering::SeqCst) == 0 {
                return;
            }
            // A database has threads of its own.
            std::thread::yield_now();
        }
    }

    pub(crate) fn send(&mut self, request: usize, asking: Asking) {
        let wish = Wish {
            request,
            behaviour: asking.behaviour,
            recover: asking.recover,
            gated: asking.gated,
        };
        let (tenant, key) = tenant_and_key(asking.key);
        let sent = Request::post("/")
            .header("x-tenant", tenant)
            .header("idempotency-key", key)
            .extension(wish)
            .body(Body::from(asking.body.to_string()))
            .expect("a request");
        let process = &mut self.processes[asking.process];
        let (router, log) = (process.router.clone(), process.app.log.clone());
        let mut polls = asking.hang_up.unwrap_or(usize::MAX);
        let client = process.runtime.spawn(async move {
            let mut answering: Pin<Box<dyn Future<Output = Response> + Send>> =
                Box::pin(async move { router.oneshot(sent).await.expect("infallible") });
            let response = poll_fn(|cx| {
                if polls == 0 {
                    return Poll::Ready(None);
                }
                polls -= 1;
                answering.as_mut().poll(cx).map(Some)
            })
            .await;
            drop(answering);
            let Some(response) = response else { return };
            let (head, body) = response.into_parts();
            let body = axum::body::to_bytes(body, usize::MAX).await.expect("a body");
            let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
            let answer = Answer {
                status: head.status.as_u16(),
                replayed: text("idempotent-replayed") == Some("true"),
                made: text("x-made").map(str::to_owned),
                body: String::from_utf8_lossy(&body).into_owned(),
            };
            log.push(Happened::Answered { request, answer });
        });
        process.clients.insert(request, client);
    }

    /// The client of a request leaves.
    pub(crate) fn hang_up(&mut self, process: usize, request: usize) {
        if let Some(client) = self.processes[process].clients.remove(&request) {
            client.abort();
        }
    }

    /// Lets a handler on.
    pub(crate) fn open(&self, process: usize, request: usize) {
        let gates = self.processes[process].app.gates.lock().expect("a lock");
        if let Some(gate) = gates.get(&request) {
            gate.add_permits(1);
        }
    }

    /// Whether the key was handed out, now or before.
    pub(crate) fn issue(&self, key: usize) -> bool {
        let process = &self.processes[0];
        let (anchor, _) = policy(self.rules);
        let (tenant, name) = tenant_and_key(key);
        let engine = process.app.engine.clone();
        let issuing = process
            .runtime
            .spawn(async move { engine.issue(&anchor, tenant, name, key).await.is_ok() });
        self.settle();
        process.runtime.block_on(issuing).unwrap_or(false)
    }

    /// A second passes for everybody.
    pub(crate) fn second(&self) {
        self.clock.advance(Duration::from_secs(1));
        for process in &self.processes {
            process.runtime.block_on(tokio::time::advance(Duration::from_secs(1)));
        }
    }

    /// Time passes in which no process does anything.
    pub(crate) fn suspend(&self, seconds: u64) {
        self.clock.advance(Duration::from_secs(seconds));
    }

    pub(crate) fn detached(&self) -> usize {
        self.processes.iter().map(|process| process.app.engine.detached()).sum()
    }

    pub(crate) fn lose_claims(&self, fault: crate::schedule::ClaimFault) {
        use crate::schedule::ClaimFault;
        use idem_runtime::store::StoreErrorKind::Unreachable;
        use tests::faults::Fault;
        let (times, fault) = match fault {
            ClaimFault::None => return,
            ClaimFault::Refused => (2, Fault::Fail(Unreachable)),
            ClaimFault::AckLost => (1, Fault::LoseAnswer),
            ClaimFault::AcksLost => (2, Fault::LoseAnswer),
        };
        (0..times).for_each(|_| self.faults.once(Call::Claim, fault.clone()));
    }
}

fn tenant_and_key(key: usize) -> (&'static str, &'static str) {
    (["a", "b"][key / 2], ["first", "second"][key % 2])
}
