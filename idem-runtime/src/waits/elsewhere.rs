//! Waiting across processes: messages that hasten the next look, where the store carries them.

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use futures_util::StreamExt;
use tokio::{runtime::Handle, time::timeout};

use crate::{engine::Shared, key::Key, store::Signal};

/// How soon a lost connection is made again, and how rarely at last.
const FIRST_TRY: Duration = Duration::from_millis(100);
const LAST_TRIES: Duration = Duration::from_secs(10);
/// How long a connection is kept for an engine that is gone.
const IDLE: Duration = Duration::from_secs(30);

/// What an engine knows of other processes.
#[derive(Debug, Default)]
pub(crate) struct Elsewhere {
    /// Whether somebody listens for this engine.
    listens: AtomicBool,
    keys: Mutex<Keys>,
}

#[derive(Debug, Default)]
struct Keys {
    /// Held here and awaited there.
    awaited: HashSet<Key>,
    /// Held here by transactions, which have no lease.
    in_transactions: HashSet<Key>,
}

impl Elsewhere {
    fn change<T>(&self, change: impl FnOnce(&mut Keys) -> T) -> T {
        change(&mut self.keys.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Shared {
    /// Sees to it that messages of other processes are heard, from the first request on whose
    /// duplicates may wait. Must be called on a tokio runtime.
    pub(crate) fn listen(self: &Arc<Self>) {
        let elsewhere = &self.waits.elsewhere;
        if self.store.wake().is_none() || elsewhere.listens.swap(true, Ordering::AcqRel) {
            return;
        }
        let ear = Ear(Arc::downgrade(self));
        Handle::current().spawn(ear.listen());
    }

    /// Tells other processes; whether it arrives or not, they look by themselves.
    pub(crate) fn signal(self: &Arc<Self>, signal: Signal) {
        // A claim may be let go by a thread, or at a moment, that has no runtime.
        let Ok(runtime) = Handle::try_current() else { return };
        let shared = Arc::clone(self);
        runtime.spawn(async move {
            let Some(wake) = shared.store.wake() else { return };
            if let Err(error) = shared.ask(wake.tell(signal)).await {
                let error = &error as &dyn std::error::Error;
                tracing::debug!(error, "other processes could not be told");
            }
        });
    }

    /// A claim of this process is over, however it ended.
    pub(crate) fn let_go(self: &Arc<Self>, key: &Key) {
        let was_awaited = |keys: &mut Keys| !keys.awaited.is_empty() && keys.awaited.remove(key);
        if self.waits.elsewhere.change(was_awaited) {
            self.signal(Signal::Ended(*key));
        }
    }

    /// A transaction of this process holds a key.
    pub(crate) fn hold_in_transaction(&self, key: Key) {
        self.waits.elsewhere.change(|keys| keys.in_transactions.insert(key));
    }

    /// It is over, however it ended.
    pub(crate) fn let_go_of_transaction(self: &Arc<Self>, key: &Key) {
        self.waits.elsewhere.change(|keys| keys.in_transactions.remove(key));
        self.let_go(key);
    }

    /// Whether a transaction of this process holds it.
    pub(crate) fn holds_in_transaction(&self, key: &Key) -> bool {
        self.waits.elsewhere.change(|keys| keys.in_transactions.contains(key))
    }

    /// Whether a claim on this key is held here.
    pub(crate) fn holds(&self, key: &Key) -> bool {
        self.leases.holds(key) || self.holds_in_transaction(key)
    }

    fn heard(&self, signal: Signal) {
        match signal {
            Signal::Ended(key) => self.waits.ended(&key),
            // Whoever does not hold it has nothing to tell, and whoever asked looks by himself.
            Signal::Awaited(key) => self.waits.elsewhere.change(|keys| {
                if keys.in_transactions.contains(&key) || self.leases.holds(&key) {
                    keys.awaited.insert(key);
                }
            }),
        }
    }
}

/// The duty to listen, on the runtime of whoever came first.
struct Ear(Weak<Shared>);

impl Drop for Ear {
    fn drop(&mut self) {
        if let Some(shared) = self.0.upgrade() {
            shared.waits.elsewhere.listens.store(false, Ordering::Release);
        }
    }
}

impl Ear {
    /// Listens until the engine is gone, through lost connections.
    async fn listen(self) {
        let pauses = ExponentialBuilder::default()
            .with_min_delay(FIRST_TRY)
            .with_max_delay(LAST_TRIES)
            .with_jitter()
            .without_max_times();
        let mut left = pauses.build();
        loop {
            let listening = {
                let Some(shared) = self.0.upgrade() else { return };
                let Some(wake) = shared.store.wake() else { return };
                shared.ask(wake.listen()).await
            };
            match listening {
                Ok(mut signals) => {
                    left = pauses.build();
                    loop {
                        // Where nobody tells anything, it is seen now and then that nobody listens.
                        let next = timeout(IDLE, signals.next()).await;
                        let Some(shared) = self.0.upgrade() else { return };
                        match next {
                            Ok(Some(signal)) => shared.heard(signal),
                            Ok(None) => break,
                            Err(_) => {}
                        }
                    }
                }
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::debug!(error, "other processes are not heard");
                }
            }
            tokio::time::sleep(left.next().unwrap_or(LAST_TRIES)).await;
        }
    }
}
