//! Both embedded stores, by a clock that the test advances, and a list of what was asked of them.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, handler::Handler, routing::post};
use idem_runtime::{
    Builder, Idempotency, IdempotentExt, Policy, Record, Scoped,
    store::{
        Checkpoint, Claim, Claimed, Clock, Completion, Issue, Manage, ManualClock, MemoryStore,
        Renewal, SqliteStore, Store, StoreError, Written,
    },
};
use tempfile::TempDir;

use crate::server::{Effects, Remember, Server, engine};

/// Makes two tests of each promise, one for each embedded store: an `async fn(Bench)`.
#[macro_export]
macro_rules! on_both_stores {
    ($($promise:ident),* $(,)?) => {
        mod in_memory {
            $(#[tokio::test]
            async fn $promise() {
                super::$promise($crate::stores::Bench::in_memory()).await;
            })*
        }

        mod in_sqlite {
            $(#[tokio::test]
            async fn $promise() {
                super::$promise($crate::stores::Bench::in_sqlite().await).await;
            })*
        }
    };
}

/// What future a store answers with.
type Answer<'a, T> = std::pin::Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// A store that remembers the claims that it was asked for. A clone is the same store.
#[derive(Clone, Debug)]
pub struct TestStore {
    store: Arc<dyn Store>,
    searchable: bool,
    remote: bool,
    claims: Arc<Mutex<Vec<Claim>>>,
}

impl TestStore {
    /// Listens to a store.
    pub fn new(store: impl Store) -> Self {
        Self { store: Arc::new(store), searchable: true, remote: false, claims: Arc::default() }
    }

    /// The same store, as one that only finds records by their keys.
    pub fn unsearchable(&self) -> Self {
        Self { searchable: false, ..self.clone() }
    }

    /// The same store, as one that is asked over a network.
    pub fn remote(&self) -> Self {
        Self { remote: true, ..self.clone() }
    }

    /// All claims so far.
    pub fn claims(&self) -> Vec<Claim> {
        self.claims.lock().expect("a lock").clone()
    }

    /// The last claim.
    pub fn last_claim(&self) -> Claim {
        self.claims().pop().expect("a claim")
    }

    /// The record of the last claim's key.
    pub async fn last_record(&self) -> Option<Record> {
        self.read(&self.last_claim().key).await.expect("a readable record")
    }
}

impl Store for TestStore {
    fn claim<'a>(&'a self, claim: &'a Claim) -> Answer<'a, Claimed> {
        self.claims.lock().expect("a lock").push(claim.clone());
        self.store.claim(claim)
    }

    fn complete<'a>(&'a self, completion: &'a Completion) -> Answer<'a, Written> {
        self.store.complete(completion)
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> Answer<'a, Written> {
        self.store.issue(issue)
    }

    fn checkpoint<'a>(&'a self, checkpoint: &'a Checkpoint) -> Answer<'a, Written> {
        self.store.checkpoint(checkpoint)
    }

    fn release<'a>(
        &'a self,
        key: &'a idem_runtime::Key,
        token: &'a idem_runtime::Token,
    ) -> Answer<'a, Written> {
        self.store.release(key, token)
    }

    fn forget<'a>(
        &'a self,
        key: &'a idem_runtime::Key,
        token: &'a idem_runtime::Token,
    ) -> Answer<'a, Written> {
        self.store.forget(key, token)
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> Answer<'a, Vec<bool>> {
        self.store.renew(claims)
    }

    fn read<'a>(&'a self, key: &'a idem_runtime::Key) -> Answer<'a, Option<Record>> {
        self.store.read(key)
    }

    fn sweep(&self, limit: usize) -> Answer<'_, usize> {
        self.store.sweep(limit)
    }

    fn is_remote(&self) -> bool {
        self.remote || self.store.is_remote()
    }

    fn manage(&self) -> Option<&dyn Manage> {
        self.store.manage().filter(|_| self.searchable)
    }
}

/// What a promise is tested with: a store, its clock, a counter of effects, and an observer.
#[derive(Clone, Debug)]
pub struct Bench {
    /// The store.
    pub store: TestStore,
    /// What time it is for the store.
    pub clock: ManualClock,
    /// What the handlers did.
    pub effects: Effects,
    /// What the engines told.
    pub told: Remember,
    directory: Option<Arc<TempDir>>,
}

impl Bench {
    /// With an empty store in memory.
    pub fn in_memory() -> Self {
        let clock = Clock::manual();
        let store = MemoryStore::builder().clock(clock.clone()).build();
        Self::over(TestStore::new(store), clock, None)
    }

    /// With an empty database file.
    pub async fn in_sqlite() -> Self {
        let clock = Clock::manual();
        let directory = tempfile::tempdir().expect("a directory");
        let store = SqliteStore::open(directory.path().join("idem.db")).await.expect("a database");
        let store = TestStore::new(store.with_clock(clock.clone()));
        Self::over(store, clock, Some(Arc::new(directory)))
    }

    fn over(store: TestStore, clock: ManualClock, directory: Option<Arc<TempDir>>) -> Self {
        Self { store, clock, effects: Effects::default(), told: Remember::default(), directory }
    }

    /// The same store, with nothing counted and nothing told yet.
    pub fn anew(&self) -> Self {
        Self { effects: Effects::default(), told: Remember::default(), ..self.clone() }
    }

    /// The same store, as one that is asked over a network.
    pub fn remote(&self) -> Self {
        Self { store: self.store.remote(), ..self.clone() }
    }

    /// Where the database file is, if there is one.
    pub fn file(&self) -> Option<PathBuf> {
        self.directory.as_ref().map(|directory| directory.path().join("idem.db"))
    }

    /// An engine over the store; the scope is the API key.
    pub fn engine(&self) -> Builder<Scoped> {
        engine(self.store.clone()).observer(self.told.observer())
    }

    /// Serves one handler at `POST /`.
    pub async fn serve<H, T>(&self, policy: impl Into<Policy>, handler: H) -> Server
    where
        H: Handler<T, Idempotency>,
        T: 'static,
    {
        self.serve_with(self.engine(), policy, handler).await
    }

    /// Serves one handler at `POST /`, under an engine of the test's own.
    pub async fn serve_with<H, T>(
        &self,
        engine: Builder<Scoped>,
        policy: impl Into<Policy>,
        handler: H,
    ) -> Server
    where
        H: Handler<T, Idempotency>,
        T: 'static,
    {
        let route = post(handler.idempotent(policy));
        Server::start(Router::new().route("/", route).with_state(engine.build())).await
    }

    /// A handler with an effect, which it numbers in its answer.
    pub fn numbered(
        &self,
    ) -> impl Fn() -> std::future::Ready<String> + Clone + Send + Sync + use<> {
        let effects = self.effects.clone();
        move || std::future::ready(format!("effect {}", effects.happen()))
    }

    /// Lets time pass for the store.
    pub fn pass(&self, time: Duration) {
        self.clock.advance(time);
    }
}
