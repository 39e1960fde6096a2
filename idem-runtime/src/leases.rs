//! The keepers of leases: one task for each runtime that the engine is used on renews all claims
//! that are due there, in one store call.
//!
//! A keeper lives on the runtime of the handlers that it serves: it ends with them and not before,
//! and a runtime that nobody drives any more holds up nobody else's renewals.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use hashbrown::HashTable;

use tokio::{
    runtime::{self, Handle},
    sync::Notify,
    time::Instant,
};

use crate::{
    engine::{Shared, later},
    key::{Key, Token},
    observer::Outcome,
    operation::Attempt,
    store::{Claim, Renewal, StoreError, StoreErrorKind},
};

/// A lease is renewed when a third of it has passed: two renewals may fail before it is over.
const RENEWALS_PER_LEASE: u32 = 3;
/// What will be due within this part of its lease is renewed with what is due now, so that claims
/// that began at different moments come to share their rounds.
const EARLY: u32 = 6;
/// How long after a failed renewal the next one is tried, at the most.
const RETRY: Duration = Duration::from_secs(1);
/// How many records one sweep removes at the most, so that it never holds the store for long.
const SWEEP_BATCH: usize = 1_000;

/// All claims that the engine's handlers hold.
#[derive(Debug, Default)]
pub(crate) struct Leases(Mutex<Registry>);

#[derive(Debug, Default)]
struct Registry {
    /// By the hash of their tokens.
    held: HashTable<Held>,
    /// A handful at the most: one for each runtime.
    keepers: Vec<Keeper>,
    /// When some keeper sweeps next.
    sweep: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    renewal: Renewal,
    due: Instant,
    runtime: runtime::Id,
    operation: Arc<str>,
    attempt: Arc<Attempt>,
}

#[derive(Debug)]
struct Keeper {
    runtime: runtime::Id,
    /// When it looks again; unknown until it has looked for the first time.
    wakes: Option<Instant>,
    /// Wakes it when a claim is due before.
    sooner: Arc<Notify>,
}

/// The hash of a token: it is random, and any eight bytes of it are as good as a hash can be.
fn hash(token: &Token) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *token.as_bytes();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

impl Registry {
    fn held(&mut self, token: &Token) -> Option<&mut Held> {
        self.held.find_mut(hash(token), |held| held.renewal.token == *token)
    }

    fn remove(&mut self, token: &Token) -> Option<Held> {
        let place = self.held.find_entry(hash(token), |held| held.renewal.token == *token);
        place.ok().map(|place| place.remove().0)
    }

    fn keeper(&mut self, runtime: runtime::Id) -> Option<&mut Keeper> {
        self.keepers.iter_mut().find(|keeper| keeper.runtime == runtime)
    }
}

impl Leases {
    /// Keeps a claim alive until it is let go. Its lease began at `since` or later. Must be called
    /// on a tokio runtime.
    ///
    /// A true answer means that the keeper was started or woken. It then waits for the caller's own
    /// worker thread, since tokio lets no other thread take what was woken last: the caller must
    /// yield before it runs code that may block the thread.
    #[must_use]
    pub(crate) fn hold(
        &self,
        shared: &Arc<Shared>,
        claim: &Claim,
        since: Instant,
        attempt: &Arc<Attempt>,
    ) -> bool {
        let here = Handle::current();
        let renewal = Renewal { key: claim.key, token: claim.token, lease: claim.lease };
        let due = later(since, renewal.lease / RENEWALS_PER_LEASE);
        let held = Held {
            renewal,
            due,
            runtime: here.id(),
            operation: Arc::clone(&claim.operation),
            attempt: Arc::clone(attempt),
        };
        let mut registry = self.lock();
        registry.held.insert_unique(hash(&renewal.token), held, |held| hash(&held.renewal.token));
        if let Some(keeper) = registry.keeper(here.id()) {
            let sooner = keeper.wakes.is_some_and(|wakes| due < wakes);
            if sooner {
                keeper.wakes = Some(due);
                keeper.sooner.notify_one();
            }
            return sooner;
        }
        let sooner = Arc::default();
        let keeper = Keeper { runtime: here.id(), wakes: None, sooner: Arc::clone(&sooner) };
        registry.keepers.push(keeper);
        // A runtime that is shutting down drops the task at once, and its duty takes the lock.
        drop(registry);
        let duty = Duty { engine: Arc::downgrade(shared), runtime: here.id(), sooner };
        here.spawn(duty.keep());
        true
    }

    /// Lets a claim go: its lease ends by itself, unless the claim was ended before.
    pub(crate) fn let_go(&self, token: &Token) {
        self.lock().remove(token);
    }

    /// Whether a claim on this key is held here.
    pub(crate) fn holds(&self, key: &Key) -> bool {
        self.lock().held.iter().any(|held| held.renewal.key == *key)
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The claims of a runtime that are to be renewed: none before one of them is due.
    fn due(&self, runtime: runtime::Id, now: Instant) -> Vec<Renewal> {
        let registry = self.lock();
        let ours = || registry.held.iter().filter(|held| held.runtime == runtime);
        if !ours().any(|held| held.due <= now) {
            return Vec::new();
        }
        ours()
            .filter(|held| held.due <= later(now, held.renewal.lease / EARLY))
            .map(|held| held.renewal)
            .collect()
    }

    /// Says when a runtime's keeper looks again: at the next renewal, or after `idle`.
    fn plan(&self, runtime: runtime::Id, idle: Duration) -> Instant {
        let mut registry = self.lock();
        let latest = later(Instant::now(), idle);
        let ours = registry.held.iter().filter(|held| held.runtime == runtime);
        let wakes = ours.map(|held| held.due).min().unwrap_or(latest).min(latest);
        if let Some(keeper) = registry.keeper(runtime) {
            keeper.wakes = Some(wakes);
        }
        wakes
    }

    /// Takes in what the store answered to renewals that were asked for at `since`; returns those
    /// who lost their claim.
    fn renewed(
        &self,
        renewals: &[Renewal],
        held: &[bool],
        since: Instant,
    ) -> Vec<(Arc<str>, Arc<Attempt>)> {
        let mut lost = Vec::new();
        let mut registry = self.lock();
        for (renewal, held) in renewals.iter().zip(held) {
            if *held {
                if let Some(entry) = registry.held(&renewal.token) {
                    entry.due = later(since, renewal.lease / RENEWALS_PER_LEASE);
                }
            } else if let Some(entry) = registry.remove(&renewal.token)
                && !entry.attempt.is_ending()
            {
                lost.push((entry.operation, entry.attempt));
            }
        }
        lost
    }

    fn postpone(&self, renewals: &[Renewal]) {
        let now = Instant::now();
        let mut registry = self.lock();
        for renewal in renewals {
            if let Some(entry) = registry.held(&renewal.token) {
                entry.due = later(now, (renewal.lease / 10).min(RETRY));
            }
        }
    }

    /// Whether it is time to sweep. Of several keepers, one is told so.
    fn sweeps_now(&self, interval: Duration) -> bool {
        let mut registry = self.lock();
        let now = Instant::now();
        let is_time = registry.sweep.is_none_or(|sweep| sweep <= now);
        if is_time {
            registry.sweep = Some(later(now, interval));
        }
        is_time
    }
}

/// The duty to keep a runtime's claims alive, which is handed back however the keeper ends.
struct Duty {
    engine: Weak<Shared>,
    runtime: runtime::Id,
    sooner: Arc<Notify>,
}

impl Drop for Duty {
    fn drop(&mut self) {
        if let Some(shared) = self.engine.upgrade() {
            shared.leases.lock().keepers.retain(|keeper| keeper.runtime != self.runtime);
        }
    }
}

impl Duty {
    /// Renews and sweeps until the engine is gone. A sweep takes as long as it takes; renewals must
    /// not wait for it.
    async fn keep(self) {
        tokio::select! {
            () = self.renew() => {}
            () = self.sweep() => {}
        }
    }

    async fn renew(&self) {
        loop {
            let Some(shared) = self.engine.upgrade() else { return };
            let renewals = shared.leases.due(self.runtime, Instant::now());
            if !renewals.is_empty() {
                renew(&shared, &renewals).await;
            }
            let wakes = shared.leases.plan(self.runtime, shared.limits.sweep_interval);
            drop(shared);
            tokio::select! {
                () = tokio::time::sleep_until(wakes) => {}
                () = self.sooner.notified() => {}
            }
        }
    }

    async fn sweep(&self) {
        loop {
            let Some(shared) = self.engine.upgrade() else { return };
            let interval = shared.limits.sweep_interval;
            drop(shared);
            tokio::time::sleep(interval).await;
            let Some(shared) = self.engine.upgrade() else { return };
            if shared.leases.sweeps_now(interval) {
                sweep(&shared).await;
            }
        }
    }
}

/// Renews claims in one call. A store that does not answer is asked again while there is time: the
/// shortest of the leases says how long one call may take.
async fn renew(shared: &Shared, renewals: &[Renewal]) {
    let since = Instant::now();
    let shortest = renewals.iter().map(|renewal| renewal.lease).min().unwrap_or_default();
    let at_most = shared.limits.store_timeout.min(shortest / RENEWALS_PER_LEASE);
    mark!("leased.renew.before");
    let sent = mark!("leased.renew.sent" => shared.store.renew(renewals));
    let answer = match shared.ask_for(at_most, sent).await {
        Ok(held) if held.len() != renewals.len() => {
            Err(StoreError::new("idem", StoreErrorKind::Refused))
        }
        answer => answer,
    };
    mark!("leased.renew.answered");
    match answer {
        Ok(held) => {
            for (operation, attempt) in shared.leases.renewed(renewals, &held, since) {
                attempt.lose();
                shared.tell(&operation, Some(&attempt), Outcome::LeaseLost, None);
            }
        }
        Err(error) => {
            shared.leases.postpone(renewals);
            shared.tell("leases", None, Outcome::RenewalFailed, Some(&error));
        }
    }
}

/// Frees the space of what is over, in batches, as long as there is more.
async fn sweep(shared: &Shared) {
    loop {
        match shared.ask(shared.store.sweep(SWEEP_BATCH)).await {
            Ok(removed) if removed == SWEEP_BATCH => tokio::task::yield_now().await,
            Ok(_) => return,
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "sweeping failed");
                return;
            }
        }
    }
}
