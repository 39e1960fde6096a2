//! Waiting for the answer of a request that is running.
//!
//! All waiters on one key share a *room*. One task a room looks at the record: at once when the
//! owner in this process has ended, soon when one in another process says so, and now and then in
//! any case. However many wait, they cost the store one look at a time, and neither a thread nor a
//! connection.

mod elsewhere;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout, timeout_at},
};

use self::elsewhere::Elsewhere;
use crate::{
    engine::Shared,
    key::Key,
    record::{Record, State},
    store::{Signal, StoreError},
};

/// How soon an owner in another process is asked after, and how rarely at last.
const FIRST_LOOK: Duration = Duration::from_millis(20);
const LAST_LOOKS: Duration = Duration::from_secs(1);

/// What the waiters are told.
#[derive(Clone, Debug)]
pub(crate) enum News {
    /// It is still running.
    Running,
    /// It has ended: with this record, or without one.
    Ended(Option<Arc<Record>>),
    /// Nobody looks any more, since the runtime that did is gone: enter again.
    Abandoned,
    /// The server is shutting down.
    ShuttingDown,
}

/// The rooms of an engine.
#[derive(Debug, Default)]
pub(crate) struct Waits {
    rooms: Mutex<Rooms>,
    elsewhere: Elsewhere,
}

#[derive(Debug, Default)]
struct Rooms {
    open: HashMap<Key, Weak<Room>>,
    closed: bool,
}

#[derive(Debug)]
struct Room {
    news: watch::Sender<News>,
    /// The owner has ended here.
    ended: Notify,
}

/// A waiter's place; the last one to leave closes the room.
#[derive(Debug)]
pub(crate) struct Place {
    news: watch::Receiver<News>,
    /// The room is open as long as somebody has it.
    _room: Arc<Room>,
}

impl Waits {
    /// Takes a place among those who wait for a key. Must be called on a tokio runtime.
    pub(crate) fn enter(&self, shared: &Arc<Shared>, key: Key, in_transaction: bool) -> Place {
        let mut rooms = self.lock();
        let (room, is_new) = match rooms.open.get(&key).and_then(Weak::upgrade) {
            Some(room) => (room, false),
            None => {
                let news = if rooms.closed { News::ShuttingDown } else { News::Running };
                let room = Room { news: watch::Sender::new(news), ended: Notify::new() };
                let room = Arc::new(room);
                rooms.open.insert(key, Arc::downgrade(&room));
                (room, true)
            }
        };
        drop(rooms);
        if is_new {
            shared.listen();
            let (engine, room) = (Arc::downgrade(shared), Arc::downgrade(&room));
            tokio::spawn(Lookout { engine, room, key, in_transaction }.look());
        }
        Place { news: room.news.subscribe(), _room: room }
    }

    /// Says that the owner of a key has ended.
    pub(crate) fn ended(&self, key: &Key) {
        if let Some(room) = self.lock().open.get(key).and_then(Weak::upgrade) {
            room.ended.notify_one();
        }
    }

    /// Wakes all waiters, now and later.
    pub(crate) fn close(&self) {
        let mut rooms = self.lock();
        rooms.closed = true;
        for room in rooms.open.values().filter_map(Weak::upgrade) {
            room.news.send_replace(News::ShuttingDown);
        }
    }

    /// Takes a room out of the list: whoever comes now is to look for himself.
    fn remove(&self, key: &Key, room: &Weak<Room>) {
        let mut rooms = self.lock();
        if rooms.open.get(key).is_some_and(|known| known.ptr_eq(room)) {
            rooms.open.remove(key);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Rooms> {
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Waits for news until an instant; without news it is still running.
    pub(crate) async fn wait_until(mut self, bound: Instant) -> News {
        let ended = self.news.wait_for(|news| !matches!(news, News::Running));
        match timeout_at(bound, ended).await {
            Ok(Ok(news)) => news.clone(),
            // The room cannot close before its waiters leave.
            Ok(Err(_)) | Err(_) => News::Running,
        }
    }
}

/// The duty to look at a key's record, on the runtime of whoever came first. However it ends, those
/// who still wait are told.
struct Lookout {
    engine: Weak<Shared>,
    room: Weak<Room>,
    key: Key,
    /// Whether the owner's claim may be in a transaction, where its record cannot be seen.
    in_transaction: bool,
}

impl Drop for Lookout {
    fn drop(&mut self) {
        if let Some(shared) = self.engine.upgrade() {
            shared.waits.remove(&self.key, &self.room);
        }
        if let Some(room) = self.room.upgrade() {
            room.tell(News::Abandoned);
        }
    }
}

impl Lookout {
    /// Looks until there are news, nobody waits any more, or the engine is gone.
    async fn look(self) {
        let mut pauses = ExponentialBuilder::default()
            .with_min_delay(FIRST_LOOK)
            .with_max_delay(LAST_LOOKS)
            .with_jitter()
            .without_max_times()
            .build();
        let mut told = false;
        while let Some(room) = self.room.upgrade() {
            let pause = pauses.next().unwrap_or(LAST_LOOKS);
            let _ = timeout(pause, room.ended.notified()).await;
            let Some(shared) = self.engine.upgrade() else { return };
            // A store that does not answer now may do so at the next look.
            let Ok((is_running, record)) = self.at_record(&shared).await else { continue };
            if !is_running {
                shared.waits.remove(&self.key, &self.room);
                room.tell(News::Ended(record.map(Arc::new)));
                return;
            }
            // What is over at the first look costs no message, nor does an owner in this process.
            if !told && shared.store.wake().is_some() && !shared.holds(&self.key) {
                told = true;
                shared.signal(Signal::Awaited(self.key));
            }
        }
    }
}

impl Lookout {
    /// Whether the key is running, and its record.
    async fn at_record(&self, shared: &Shared) -> Result<(bool, Option<Record>), StoreError> {
        // Before the record: a transaction that ends in between has committed it.
        let is_held = match shared.store.transact() {
            Some(transact) if self.in_transaction => {
                shared.ask(transact.is_held(&self.key)).await?
            }
            _ => false,
        };
        let record = shared.ask(shared.store.read(&self.key)).await?;
        let leased =
            |record: &Record| record.state == State::Running && !record.lease_left.is_zero();
        Ok((is_held || record.as_ref().is_some_and(leased), record))
    }
}

impl Room {
    /// Tells the waiters, unless they were told before.
    fn tell(&self, what: News) {
        self.news.send_if_modified(|news| {
            let first = matches!(news, News::Running);
            if first {
                *news = what;
            }
            first
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Idempotency, Scope, store::MemoryStore};

    /// Their places must not outlive whoever looks for them.
    #[test]
    fn a_runtime_that_ends_leaves_no_waiters_of_others_behind() {
        let runtime =
            || tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let engine = Idempotency::builder(MemoryStore::new()).scope(Scope::global()).build();
        let (shared, key) = (&engine.shared, Key::from_bytes([7; 32]));
        let first = runtime();
        let place = first.block_on(async { shared.waits.enter(shared, key, false) });
        drop(first);
        runtime().block_on(async {
            let bound = Instant::now() + Duration::from_secs(60);
            assert!(matches!(place.wait_until(bound).await, News::Abandoned));
            let again = shared.waits.enter(shared, key, false);
            assert!(matches!(again.wait_until(bound).await, News::Ended(None)));
        });
    }
}
