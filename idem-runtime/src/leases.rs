//! The keeper of leases: one task an engine renews all claims that are due, in one store call.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::{sync::Notify, task::JoinHandle, time::Instant};

use crate::{
    engine::Shared,
    key::{Key, Token},
    observer::Outcome,
    operation::Attempt,
    store::Renewal,
};

/// A lease is renewed when a third of it has passed: two renewals may fail before it is over.
const RENEWALS_PER_LEASE: u32 = 3;
/// How long after a failed renewal the next one is tried, at the most.
const RETRY: Duration = Duration::from_secs(1);
/// How many records one sweep removes at the most, so that it never holds the store for long.
const SWEEP_BATCH: usize = 1_000;

/// All claims that the engine's handlers hold.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    registry: Mutex<Registry>,
    /// Wakes the keeper when a claim is due before it would look again.
    sooner: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Registry {
    held: HashMap<Token, Held>,
    keeper: Option<JoinHandle<()>>,
    /// When the keeper looks again.
    wakes: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    renewal: Renewal,
    due: Instant,
    operation: Arc<str>,
    attempt: Arc<Attempt>,
}

impl Leases {
    /// Keeps a claim alive until it is dropped from here. Must be called on a tokio runtime.
    pub(crate) fn hold(
        &self,
        shared: &Arc<Shared>,
        key: Key,
        token: Token,
        lease: Duration,
        operation: &Arc<str>,
        attempt: &Arc<Attempt>,
    ) {
        let due = Instant::now() + lease / RENEWALS_PER_LEASE;
        let held = Held {
            renewal: Renewal { key, token, lease },
            due,
            operation: Arc::clone(operation),
            attempt: Arc::clone(attempt),
        };
        let mut registry = self.lock();
        registry.held.insert(token, held);
        // The runtime that the keeper ran on may have ended before the engine did.
        if registry.keeper.as_ref().is_none_or(JoinHandle::is_finished) {
            registry.wakes = None;
            let keeper = keep(Arc::downgrade(shared), Arc::clone(&self.sooner));
            registry.keeper = Some(tokio::spawn(keeper));
        } else if registry.wakes.is_some_and(|wakes| due < wakes) {
            registry.wakes = Some(due);
            self.sooner.notify_one();
        }
    }

    /// Lets a claim go: its lease ends by itself, unless the claim was ended before.
    pub(crate) fn let_go(&self, token: &Token) {
        self.lock().held.remove(token);
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The claims that are due.
    fn due(&self, now: Instant) -> Vec<Renewal> {
        let registry = self.lock();
        registry.held.values().filter(|held| held.due <= now).map(|held| held.renewal).collect()
    }

    /// Says when the keeper looks again: at the next renewal, or after `idle`.
    fn plan(&self, idle: Duration) -> Instant {
        let mut registry = self.lock();
        let latest = Instant::now() + idle;
        let wakes = registry.held.values().map(|held| held.due).min().unwrap_or(latest).min(latest);
        registry.wakes = Some(wakes);
        wakes
    }

    /// Takes the store's answers in; returns those who lost their claim.
    fn renewed(&self, renewals: &[Renewal], held: &[bool]) -> Vec<(Arc<str>, Arc<Attempt>)> {
        let now = Instant::now();
        let mut lost = Vec::new();
        let mut registry = self.lock();
        for (renewal, held) in renewals.iter().zip(held) {
            if *held {
                if let Some(entry) = registry.held.get_mut(&renewal.token) {
                    entry.due = now + renewal.lease / RENEWALS_PER_LEASE;
                }
            } else if let Some(entry) = registry.held.remove(&renewal.token) {
                lost.push((entry.operation, entry.attempt));
            }
        }
        lost
    }

    fn postpone(&self, renewals: &[Renewal]) {
        let now = Instant::now();
        let mut registry = self.lock();
        for renewal in renewals {
            if let Some(entry) = registry.held.get_mut(&renewal.token) {
                entry.due = now + (renewal.lease / 10).min(RETRY);
            }
        }
    }
}

/// Renews what is due and sweeps now and then, until the engine is gone.
async fn keep(engine: Weak<Shared>, sooner: Arc<Notify>) {
    let mut sweep_at: Option<Instant> = None;
    loop {
        let Some(shared) = engine.upgrade() else { return };
        let now = Instant::now();
        let renewals = shared.leases.due(now);
        if !renewals.is_empty() {
            renew(&shared, &renewals).await;
        }
        if sweep_at.is_none_or(|at| at <= now) {
            if sweep_at.is_some() {
                sweep(&shared).await;
            }
            sweep_at = Some(Instant::now() + shared.limits.sweep_interval);
        }
        let wakes = shared.leases.plan(shared.limits.sweep_interval);
        drop(shared);
        tokio::select! {
            () = tokio::time::sleep_until(wakes) => {}
            () = sooner.notified() => {}
        }
    }
}

async fn renew(shared: &Shared, renewals: &[Renewal]) {
    match shared.ask(shared.store.renew(renewals)).await {
        Ok(held) => {
            for (operation, attempt) in shared.leases.renewed(renewals, &held) {
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
