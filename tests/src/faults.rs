//! Stores that fail on purpose, places at which to hold something up, clients that hang up.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures_util::future::BoxFuture;
use idem_runtime::{
    Key, Record, Token,
    store::{
        Checkpoint, Claim, Claimed, Clock, Completion, Issue, Manage, ManualClock, MemoryStore,
        Renewal, SqliteStore, Store, StoreError, StoreErrorKind, Written,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

/// Beyond this a test has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until something holds.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(timeout(PATIENCE, waiting).await.is_ok(), "in vain: {what}");
}

/// A place at which whoever comes by waits until it is opened.
#[derive(Clone, Debug)]
pub struct Gate(Arc<watch::Sender<(usize, bool)>>);

impl Default for Gate {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new((0, false))))
    }
}

impl Gate {
    /// Comes by, and waits.
    pub async fn pass(&self) {
        self.0.send_modify(|(arrived, _)| *arrived += 1);
        let _ = self.0.subscribe().wait_for(|(_, open)| *open).await;
    }

    /// Waits until somebody waits.
    pub async fn reached(&self) {
        self.reached_by(1).await;
    }

    /// Waits until so many wait, or have waited.
    pub async fn reached_by(&self, count: usize) {
        let mut state = self.0.subscribe();
        let reached = state.wait_for(|(arrived, _)| *arrived >= count);
        let reached = timeout(PATIENCE, reached).await;
        assert!(matches!(reached, Ok(Ok(_))), "nobody came");
    }

    /// Lets all pass, now and later.
    pub fn open(&self) {
        self.0.send_modify(|(_, open)| *open = true);
    }
}

/// The calls of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// [`Store::claim`].
    Claim,
    /// [`Store::complete`].
    Complete,
    /// [`Store::issue`].
    Issue,
    /// [`Store::checkpoint`].
    Checkpoint,
    /// [`Store::release`].
    Release,
    /// [`Store::forget`].
    Forget,
    /// [`Store::renew`].
    Renew,
    /// [`Store::read`].
    Read,
    /// [`Store::sweep`].
    Sweep,
}

/// What becomes of a call.
#[derive(Clone, Debug)]
pub enum Fault {
    /// It is not made, and fails.
    Fail(StoreErrorKind),
    /// It is made, and its answer is lost.
    LoseAnswer,
    /// It is not made, and never answers.
    Hang,
    /// It panics.
    Panic,
    /// It is made, and there is an await before it and one after it.
    Yield,
    /// It waits before it is made.
    Before(Gate),
    /// It is made, and its answer waits.
    After(Gate),
}

/// Steers a [`Faulty`] store.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<HashMap<Call, Plan>>>);

#[derive(Debug, Default)]
struct Plan {
    calls: usize,
    answers: usize,
    next: VecDeque<Fault>,
    always: Option<Fault>,
}

impl Faults {
    /// Fails the next call of a kind; said again, the one after it.
    pub fn once(&self, call: Call, fault: Fault) {
        self.plans().entry(call).or_default().next.push_back(fault);
    }

    /// Fails all calls of a kind, until they are [mended](Self::mend).
    pub fn always(&self, call: Call, fault: Fault) {
        self.plans().entry(call).or_default().always = Some(fault);
    }

    /// Holds the next call of a kind up before it is made.
    pub fn hold_before(&self, call: Call) -> Gate {
        let gate = Gate::default();
        self.once(call, Fault::Before(gate.clone()));
        gate
    }

    /// Holds the answer to the next call of a kind up.
    pub fn hold_after(&self, call: Call) -> Gate {
        let gate = Gate::default();
        self.once(call, Fault::After(gate.clone()));
        gate
    }

    /// Lets calls of a kind succeed again.
    pub fn mend(&self, call: Call) {
        let mut plans = self.plans();
        let plan = plans.entry(call).or_default();
        plan.always = None;
        plan.next.clear();
    }

    /// Fails every call of every kind but sweeps: the store is gone.
    pub fn cut_off(&self) {
        for call in CUT_OFF {
            self.always(call, Fault::Fail(StoreErrorKind::Unreachable));
        }
    }

    /// The store is back.
    pub fn restore(&self) {
        CUT_OFF.into_iter().for_each(|call| self.mend(call));
    }

    /// How many calls of a kind there were.
    pub fn calls(&self, call: Call) -> usize {
        self.plans().get(&call).map_or(0, |plan| plan.calls)
    }

    /// How many calls of a kind have ended, whichever way.
    pub fn answers(&self, call: Call) -> usize {
        self.plans().get(&call).map_or(0, |plan| plan.answers)
    }

    fn plans(&self) -> MutexGuard<'_, HashMap<Call, Plan>> {
        self.0.lock().expect("no panic under this lock")
    }

    async fn meet<T>(
        &self,
        call: Call,
        make: BoxFuture<'_, Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let fault = {
            let mut plans = self.plans();
            let plan = plans.entry(call).or_default();
            plan.calls += 1;
            plan.next.pop_front().or_else(|| plan.always.clone())
        };
        let error = |kind| Err(StoreError::new("faulty", kind));
        let answer = match fault {
            None => make.await,
            Some(Fault::Fail(kind)) => error(kind),
            Some(Fault::LoseAnswer) => match make.await {
                Ok(_) => error(StoreErrorKind::TimedOut),
                failed => failed,
            },
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Panic) => panic!("the store panics"),
            Some(Fault::Yield) => {
                tokio::task::yield_now().await;
                let answer = make.await;
                tokio::task::yield_now().await;
                answer
            }
            Some(Fault::Before(gate)) => {
                gate.pass().await;
                make.await
            }
            Some(Fault::After(gate)) => {
                let answer = make.await;
                gate.pass().await;
                answer
            }
        };
        self.plans().entry(call).or_default().answers += 1;
        answer
    }
}

const CUT_OFF: [Call; 6] =
    [Call::Claim, Call::Complete, Call::Release, Call::Forget, Call::Renew, Call::Read];

/// A store that does what its [`Faults`] say, over a sound one. A clone is the same store.
#[derive(Clone, Debug)]
pub struct Faulty {
    inner: Arc<dyn Store>,
    faults: Faults,
}

impl Faulty {
    /// Over a store of the test's own.
    pub fn over(store: impl Store) -> (Self, Faults) {
        let faults = Faults::default();
        (Self { inner: Arc::new(store), faults: faults.clone() }, faults)
    }
}

impl Store for Faulty {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        Box::pin(self.faults.meet(Call::Claim, self.inner.claim(claim)))
    }

    fn complete<'a>(
        &'a self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.faults.meet(Call::Complete, self.inner.complete(completion)))
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.faults.meet(Call::Issue, self.inner.issue(issue)))
    }

    fn checkpoint<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.faults.meet(Call::Checkpoint, self.inner.checkpoint(checkpoint)))
    }

    fn release<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.faults.meet(Call::Release, self.inner.release(key, token)))
    }

    fn forget<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(self.faults.meet(Call::Forget, self.inner.forget(key, token)))
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        Box::pin(self.faults.meet(Call::Renew, self.inner.renew(claims)))
    }

    fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(self.faults.meet(Call::Read, self.inner.read(key)))
    }

    fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(self.faults.meet(Call::Sweep, self.inner.sweep(limit)))
    }

    /// What is searched is found: only what requests ask suffers.
    fn manage(&self) -> Option<&dyn Manage> {
        self.inner.manage()
    }
}

/// A sound store whose time a test moves, from which any number of faulty ones are made: each
/// stands for a process that shares it.
#[derive(Clone, Debug)]
pub struct Ground {
    store: Arc<dyn Store>,
    /// The store's time; it stands still unless a test moves it.
    pub clock: ManualClock,
}

impl Ground {
    /// In memory.
    pub async fn memory() -> Self {
        let clock = Clock::manual();
        Self { store: Arc::new(MemoryStore::builder().clock(clock.clone()).build()), clock }
    }

    /// In an SQLite database in memory.
    pub async fn sqlite() -> Self {
        let clock = Clock::manual();
        let store = SqliteStore::in_memory().await.expect("a database");
        Self { store: Arc::new(store.with_clock(clock.clone())), clock }
    }

    /// In memory, by real time.
    pub async fn memory_in_real_time() -> Self {
        Self { store: Arc::new(MemoryStore::new()), clock: Clock::manual() }
    }

    /// In an SQLite database in memory, by real time.
    pub async fn sqlite_in_real_time() -> Self {
        let store = SqliteStore::in_memory().await.expect("a database");
        Self { store: Arc::new(store), clock: Clock::manual() }
    }

    /// The store as a process of its own sees it, and what it suffers from.
    pub fn faulty(&self) -> (Faulty, Faults) {
        let faults = Faults::default();
        (Faulty { inner: Arc::clone(&self.store), faults: faults.clone() }, faults)
    }
}

/// Runs each test, a function of a [`Ground`], on both embedded stores, on a runtime with several
/// threads; `also on one thread`, on a current-thread runtime too; `in real time`, by a clock that
/// runs.
#[macro_export]
macro_rules! with_faults_on_both_stores {
    ($($test:ident),* $(,)?) => {
        mod memory {
            $crate::with_faults_on_both_stores!(@ (flavor = "multi_thread", worker_threads = 2) memory $($test)*);
        }
        mod sqlite {
            $crate::with_faults_on_both_stores!(@ (flavor = "multi_thread", worker_threads = 2) sqlite $($test)*);
        }
    };
    (in real time: $($test:ident),* $(,)?) => {
        mod memory_in_real_time {
            $crate::with_faults_on_both_stores!(
                @ (flavor = "multi_thread", worker_threads = 2) memory_in_real_time $($test)*);
        }
        mod sqlite_in_real_time {
            $crate::with_faults_on_both_stores!(
                @ (flavor = "multi_thread", worker_threads = 2) sqlite_in_real_time $($test)*);
        }
    };
    (also on one thread: $($test:ident),* $(,)?) => {
        $crate::with_faults_on_both_stores!($($test),*);
        mod memory_on_one_thread {
            $crate::with_faults_on_both_stores!(@ () memory $($test)*);
        }
        mod sqlite_on_one_thread {
            $crate::with_faults_on_both_stores!(@ () sqlite $($test)*);
        }
    };
    (@ $runtime:tt $ground:ident $($test:ident)*) => {
        $($crate::with_faults_on_both_stores!(@@ $runtime $ground $test);)*
    };
    (@@ ($($runtime:tt)*) $ground:ident $test:ident) => {
        #[tokio::test($($runtime)*)]
        async fn $test() {
            super::$test($crate::faults::Ground::$ground().await).await;
        }
    };
}

/// How a client goes away.
#[derive(Clone, Copy, Debug)]
pub enum HangUp {
    /// It closes its HTTP/1.1 connection.
    Http1Close,
    /// It resets its HTTP/1.1 connection.
    Http1Reset,
    /// It cancels its HTTP/2 stream.
    Http2Cancel,
}

impl HangUp {
    /// All ways.
    pub const ALL: [Self; 3] = [Self::Http1Close, Self::Http1Reset, Self::Http2Cancel];

    /// Sends a POST of tenant `a` and waits for no answer.
    pub async fn post(self, address: SocketAddr, path: &str, key: &str, body: &str) -> Caller {
        let connection = match self {
            Self::Http1Close | Self::Http1Reset => {
                let mut stream = TcpStream::connect(address).await.expect("a connection");
                let request = http1_request(path, key, body.len()) + body;
                stream.write_all(request.as_bytes()).await.expect("a sent request");
                Connection::Http1(stream)
            }
            Self::Http2Cancel => {
                let client = reqwest::Client::builder().no_proxy().http2_prior_knowledge().build();
                let client = client.expect("a client");
                let request = client
                    .post(format!("http://{address}{path}"))
                    .header("x-api-key", "a")
                    .header("content-type", "application/json")
                    .header("idempotency-key", key)
                    .body(body.to_owned());
                let task = tokio::spawn(async move { drop(request.send().await) });
                Connection::Http2(client, task)
            }
        };
        Caller { how: self, connection }
    }
}

/// The head of a POST of tenant `a` over HTTP/1.1.
pub fn http1_request(path: &str, key: &str, length: usize) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nx-api-key: a\r\nidempotency-key: {key}\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    )
}

/// A client that has sent its request.
#[derive(Debug)]
pub struct Caller {
    how: HangUp,
    connection: Connection,
}

enum Connection {
    Http1(TcpStream),
    /// The client stays until its caller is dropped, so that only the stream ends.
    Http2(reqwest::Client, JoinHandle<()>),
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http1(_) => "Http1",
            Self::Http2(..) => "Http2",
        })
    }
}

impl Caller {
    /// Goes away. What is returned must be kept until the server has noticed.
    #[must_use]
    pub fn hang_up(self) -> impl Send {
        match self.connection {
            Connection::Http1(stream) => {
                if matches!(self.how, HangUp::Http1Reset) {
                    stream.set_zero_linger().expect("a socket option");
                }
                None
            }
            Connection::Http2(client, task) => {
                task.abort();
                Some(client)
            }
        }
    }
}

/// Reads whatever a connection still says, to its end.
pub async fn read_to_end(mut stream: TcpStream) -> String {
    let mut said = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut said)).await;
    String::from_utf8_lossy(&said).into_owned()
}
