//! The operation, as the handler sees it: its id, its attempt, keys derived from it, its steps.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::Extensions;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::{Mutex, Notify, OwnedMutexGuard};
use uuid::Uuid;

use crate::{
    engine::Shared,
    key::{Key, OperationId, Token},
    record::{FORMAT, Progress},
    store::{Checkpoint, StoreError, StoreErrorKind, Written},
};

/// What idem knows of the request that a handler is working on; take it as an argument.
///
/// The id is stored with the claim before the handler starts, and stays the same through crash,
/// release and takeover. In a handler that is not protected (no `#[idempotent]`, an optional key
/// that is absent, a mode or an outage that lets it run) each request is an operation of its own.
///
/// Where a [layer](crate::Idempotency::layer) protects the request, it is the layer's operation,
/// unless the handler has a claim of its own: then it is the handler's.
///
/// It is filled when the claim is granted: ask it in the handler's body. Before that, in an
/// extractor or a layer, it answers as for a handler that is not protected, with an id that is
/// nobody else's.
#[derive(Clone, Default)]
pub struct Operation {
    known: Arc<Known>,
    /// Whether its owner has handed the request on: whoever serves it now may claim for itself.
    handed_on: bool,
}

/// What is known of an operation, shared by the request's extensions, its handler and the engine.
#[derive(Default)]
struct Known {
    /// The operation of whoever claimed first and handed the request on.
    outer: Option<Arc<Known>>,
    /// The attempt whose claim was granted: it counts from then on.
    granted: OnceLock<Arc<Attempt>>,
    /// What was made up for whoever asked without a claim, or before it.
    unprotected: OnceLock<Arc<Attempt>>,
}

impl Operation {
    /// The identity of the operation, the same for all its attempts.
    pub fn id(&self) -> OperationId {
        self.get().id
    }

    /// Which attempt this is, the first being 1. From 2 on, an earlier one ended without saying
    /// whether its effect happened.
    pub fn attempt(&self) -> u32 {
        self.get().number
    }

    /// A key for a downstream call that is the same in every attempt.
    ///
    /// The name says which call it is, where a handler makes several. The derivation is a version 5
    /// UUID (RFC 9562 §5.5) with the operation's id as namespace, so that it can be recomputed
    /// anywhere.
    ///
    /// ```
    /// use idem_runtime::Operation;
    ///
    /// let operation = Operation::default();
    /// assert_eq!(operation.derive("psp"), operation.derive("psp"));
    /// assert_ne!(operation.derive("psp"), operation.derive("ledger"));
    /// ```
    pub fn derive(&self, name: &str) -> DerivedKey {
        DerivedKey(Uuid::new_v5(&self.id().as_uuid(), name.as_bytes()))
    }

    /// Whether another attempt has taken over: this one's answer will not be sent.
    pub fn is_lease_lost(&self) -> bool {
        self.get().is_lost()
    }

    /// Waits until another attempt has taken over; for ever if none does.
    pub async fn lease_lost(&self) {
        let attempt = Arc::clone(self.get());
        loop {
            let changed = attempt.changed.notified();
            if attempt.is_lost() {
                return;
            }
            changed.await;
        }
    }

    /// Takes a step of the work once, however often the work is tried: its result is recorded under
    /// the claim, and a later attempt gets it without taking the step again.
    ///
    /// The name says which step it is; in a loop, it includes the turn's number. Who asks for a step
    /// while it is being taken waits for its result: a step must not ask for itself. A step that fails
    /// is not recorded. An owner that lost its claim cannot record one. In a handler without
    /// protection the step is taken each time.
    ///
    /// Once a step was taken, or was dropped half-way, an answer that is not recorded (a 4xx, say) no
    /// longer frees the key: the outcome is unknown, and unless `on_unknown` says otherwise a retry
    /// goes on under the same operation id. In the first attempt, to free it all the same, answer with [`Settle::forgotten`](crate::Settle::forgotten).
    ///
    /// Between a step's effect and its record the process may die: give the step a
    /// [derived](Self::derive) key of its own, and a repetition does nothing.
    ///
    /// ```
    /// # use idem_runtime::Operation;
    /// # async fn charge(_: &str) -> Result<String, std::io::Error> { Ok("ch_1".into()) }
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let operation = Operation::default();
    /// let key = operation.derive("charge").to_string();
    /// let charge: String = operation.step("charge", charge(&key)).await?;
    /// # assert_eq!(charge, "ch_1");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`StepError::Failed`] with the step's own error, and otherwise when its result could not be
    /// recorded or read back. After [`StepError::Store`] the step was taken and its result is not
    /// recorded.
    pub async fn step<T, E>(
        &self,
        name: &str,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, StepError<E>>
    where
        T: Serialize + DeserializeOwned,
    {
        let attempt = Arc::clone(self.get());
        let journal = match &attempt.keeps {
            Keeps::Journal(journal) => journal,
            Keeps::Nothing => return work.await.map_err(StepError::Failed),
            Keeps::Transaction { .. } => return Err(StepError::InTransaction),
        };
        // Of two that are taken at once under one name, the later one gets the result.
        let _turn = journal.turn(name).await;
        if let Some(recorded) = journal.result(name).await {
            return serde_json::from_slice(&recorded)
                .map_err(|source| StepError::TypeChanged { name: name.to_owned(), source });
        }
        if attempt.is_lost() {
            return Err(StepError::LeaseLost);
        }
        let begun = Begun(journal);
        let result = match work.await {
            Ok(result) => result,
            Err(error) => {
                begun.failed();
                return Err(StepError::Failed(error));
            }
        };
        drop(begun);
        let bytes = serde_json::to_vec(&result).map_err(StepError::NotSerializable)?;
        match journal.record(name, Bytes::from(bytes)).await {
            Ok(Written::Done) => Ok(result),
            Ok(Written::Fenced(_) | Written::Gone) => {
                attempt.lose();
                Err(StepError::LeaseLost)
            }
            Err(error) => Err(StepError::Store(error)),
        }
    }

    /// What was bound to the key when it was issued.
    pub(crate) fn issued(&self) -> Option<Bytes> {
        match &self.get().keeps {
            Keeps::Journal(journal) => journal.issued.clone(),
            Keeps::Transaction { issued } => issued.clone(),
            Keeps::Nothing => None,
        }
    }

    fn get(&self) -> &Arc<Attempt> {
        self.known.get()
    }

    /// The operation of a request, for its next claim, which the request's extensions have from now
    /// on.
    pub(crate) fn of(extensions: &mut Extensions) -> Self {
        let operation = match Self::known(extensions) {
            Ok(known) => return known.clone(),
            Err(outer) => Self::within(Known { outer, ..Known::default() }),
        };
        extensions.insert(operation.clone());
        operation
    }

    /// The operation of a request whose claim was granted. What is behind gets the request with an
    /// operation under which it may claim for itself: a layer's handler, or a service that a handler
    /// calls.
    pub(crate) fn granted(extensions: &mut Extensions, attempt: &Arc<Attempt>) -> Self {
        let operation = match Self::known(extensions) {
            Ok(known) => {
                known.grant(attempt);
                known.clone()
            }
            Err(outer) => {
                let granted = OnceLock::from(Arc::clone(attempt));
                Self::within(Known { outer, granted, unprotected: OnceLock::new() })
            }
        };
        extensions.insert(operation.inner());
        operation
    }

    /// The operation that waits for a request's next claim, or whose it is within. One that was
    /// granted before belongs to an earlier claim of the same request, which somebody sent again: it
    /// stays as it is.
    fn known(extensions: &Extensions) -> Result<&Self, Option<Arc<Known>>> {
        match extensions.get::<Self>() {
            None => Err(None),
            Some(Self { known, handed_on: true }) => Err(Some(Arc::clone(known))),
            Some(Self { known, .. }) if known.granted.get().is_some() => Err(known.outer.clone()),
            Some(known) => Ok(known),
        }
    }

    fn within(known: Known) -> Self {
        Self { known: Arc::new(known), handed_on: false }
    }

    /// What is handed on to whoever serves the request: this operation, until a claim of its own is
    /// granted.
    pub(crate) fn inner(&self) -> Self {
        Self { known: Arc::clone(&self.known), handed_on: true }
    }

    /// The attempt of whoever handed the request on and holds this very key: it protects what runs
    /// now.
    pub(crate) fn claimed_further_out(
        &self,
        engine: &Arc<Shared>,
        key: &Key,
    ) -> Option<Arc<Attempt>> {
        let mut outer = match self.handed_on {
            true => Some(&self.known),
            false => self.known.outer.as_ref(),
        };
        while let Some(known) = outer {
            if let Some(attempt) = known.granted.get().filter(|attempt| attempt.holds(engine, key))
            {
                return Some(Arc::clone(attempt));
            }
            outer = known.outer.as_ref();
        }
        None
    }

    /// Says which attempt the handler works on.
    pub(crate) fn grant(&self, attempt: &Arc<Attempt>) {
        if self.known.unprotected.get().is_some() {
            tracing::warn!("somebody asked for the operation before its claim was granted");
        }
        if self.known.granted.set(Arc::clone(attempt)).is_err() {
            tracing::error!("two claims were granted to one request");
        }
    }
}

impl Known {
    fn get(&self) -> &Arc<Attempt> {
        let made_up = || Attempt::new(OperationId::random(), 1, None);
        match (self.granted.get(), &self.outer) {
            (Some(granted), _) => granted,
            (None, Some(outer)) => outer.get(),
            (None, None) => self.unprotected.get_or_init(made_up),
        }
    }

    /// What is known without making anything up.
    fn attempt(&self) -> Option<&Arc<Attempt>> {
        let outer = || self.outer.as_ref()?.attempt();
        self.granted.get().or_else(outer).or(self.unprotected.get())
    }
}

impl fmt::Debug for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Operation");
        if let Some(attempt) = self.known.attempt() {
            shown.field("id", &attempt.id).field("attempt", &attempt.number);
        }
        shown.finish()
    }
}

/// One granted claim, as its handler and the keeper of leases share it.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub(crate) id: OperationId,
    pub(crate) number: u32,
    lost: AtomicBool,
    changed: Notify,
    /// Whether its end is being written: that a claim is over then says nothing of who ended it.
    ending: AtomicBool,
    keeps: Keeps,
}

/// What is kept of an attempt before it ends.
#[derive(Debug)]
enum Keeps {
    /// Nothing is claimed.
    Nothing,
    /// Steps, under the claim.
    Journal(Journal),
    /// Nothing before the commit. What was issued with the key is known.
    Transaction { issued: Option<Bytes> },
}

impl Attempt {
    pub(crate) fn new(id: OperationId, number: u32, journal: Option<Journal>) -> Arc<Self> {
        Self::keeping(id, number, journal.map_or(Keeps::Nothing, Keeps::Journal))
    }

    /// An attempt whose record is committed with its effects.
    pub(crate) fn in_transaction(id: OperationId, number: u32, issued: Option<Bytes>) -> Arc<Self> {
        Self::keeping(id, number, Keeps::Transaction { issued })
    }

    fn keeping(id: OperationId, number: u32, keeps: Keeps) -> Arc<Self> {
        Arc::new(Self {
            id,
            number,
            lost: AtomicBool::new(false),
            changed: Notify::new(),
            ending: AtomicBool::new(false),
            keeps,
        })
    }

    pub(crate) fn begin_to_end(&self) {
        self.ending.store(true, Ordering::Release);
    }

    /// Whether part of the work was done: that an answer says nothing happened is then not true of
    /// all of it.
    pub(crate) fn has_steps(&self) -> bool {
        match &self.keeps {
            Keeps::Journal(journal) => journal.has_steps.load(Ordering::Acquire),
            Keeps::Nothing | Keeps::Transaction { .. } => false,
        }
    }

    /// Whether this is the claim of a key, and still is.
    fn holds(&self, engine: &Arc<Shared>, key: &Key) -> bool {
        let of_key = |journal: &Journal| {
            journal.key == *key && std::ptr::eq(journal.engine.as_ptr(), Arc::as_ptr(engine))
        };
        let Keeps::Journal(journal) = &self.keeps else { return false };
        of_key(journal) && !self.is_lost() && !self.is_ending()
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }
}

/// What an attempt records before it ends.
#[derive(Debug)]
pub(crate) struct Journal {
    engine: Weak<Shared>,
    key: Key,
    token: Token,
    issued: Option<Bytes>,
    steps_of: Option<OperationId>,
    /// Whether a step of this operation was taken, or may have been, in this attempt or before;
    /// recorded or not.
    has_steps: AtomicBool,
    /// Once there are any: most attempts take none.
    steps: OnceLock<Box<Steps>>,
}

#[derive(Debug)]
struct Steps {
    /// Held while a step is being recorded: a record holds all steps, so they are written in turn.
    progress: Mutex<Progress>,
    /// One lock for each step that was asked for, held while it is being taken.
    turns: std::sync::Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

impl Steps {
    fn after(progress: Progress) -> Box<Self> {
        Box::new(Self { progress: Mutex::new(progress), turns: Default::default() })
    }
}

impl Journal {
    /// The journal of a claim, with what earlier attempts wrote into it.
    pub(crate) fn new(engine: Weak<Shared>, key: Key, token: Token, progress: Progress) -> Self {
        let (issued, steps_of) = (progress.issued.clone(), progress.steps_of);
        let has_steps = !progress.steps.is_empty();
        let steps = match has_steps {
            true => OnceLock::from(Steps::after(progress)),
            false => OnceLock::new(),
        };
        let has_steps = AtomicBool::new(has_steps);
        Self { engine, key, token, issued, steps_of, has_steps, steps }
    }

    fn steps(&self) -> &Steps {
        let none_yet = || {
            let (issued, steps_of) = (self.issued.clone(), self.steps_of);
            Steps::after(Progress { issued, steps_of, steps: Vec::new() })
        };
        self.steps.get_or_init(none_yet)
    }

    async fn turn(&self, name: &str) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.steps().turns.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(turns.entry(name.to_owned()).or_default())
        };
        turn.lock_owned().await
    }

    async fn result(&self, name: &str) -> Option<Bytes> {
        let progress = self.steps().progress.lock().await;
        progress.steps.iter().find(|(known, _)| known == name).map(|(_, result)| result.clone())
    }

    async fn record(&self, name: &str, result: Bytes) -> Result<Written, StoreError> {
        let Some(engine) = self.engine.upgrade() else {
            return Err(StoreError::new("idem", StoreErrorKind::Unreachable));
        };
        let mut progress = self.steps().progress.lock().await;
        progress.steps.push((name.to_owned(), result));
        let (key, token, payload) = (self.key, self.token, progress.encode());
        let checkpoint = Checkpoint { key, token, payload, format: FORMAT };
        let written = engine.checkpoint(&checkpoint).await;
        match &written {
            Ok(Written::Done) => {}
            // It was taken: within this attempt it is not taken again, and the next step that is
            // recorded records it too.
            Err(error) if error.kind() != StoreErrorKind::TooLarge => {}
            Ok(Written::Fenced(_) | Written::Gone) | Err(_) => drop(progress.steps.pop()),
        }
        written
    }
}

/// A step that was begun. Unless it failed, it was taken or may have been: also one that was dropped
/// half-way, by a time-out say, or whose result cannot be recorded.
struct Begun<'a>(&'a Journal);

impl Begun<'_> {
    /// It failed, which is for the handler's answer to say.
    fn failed(self) {
        std::mem::forget(self);
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.0.has_steps.store(true, Ordering::Release);
    }
}

/// Why a step has no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StepError<E> {
    /// The step failed; it is not recorded.
    #[error("the step failed")]
    Failed(#[source] E),
    /// Another attempt has taken over. Stop: it goes on with the work.
    #[error("another attempt of this operation has taken over")]
    LeaseLost,
    /// The step was taken and its result could not be recorded: a later attempt takes it again,
    /// unless the next step that is recorded records it too.
    #[error("the step's result could not be recorded")]
    Store(#[source] StoreError),
    /// The handler is transactional: nothing is recorded before the commit, and a step that was taken
    /// would be taken again after a rollback. Write it in the transaction, or call downstream under
    /// a [derived](Operation::derive) key.
    #[error("a transactional handler has no steps")]
    InTransaction,
    /// The step was taken and its result cannot be written as JSON.
    #[error("the step's result cannot be written as JSON")]
    NotSerializable(#[source] serde_json::Error),
    /// An earlier release recorded this step with a result of another type. Give a step whose type
    /// changes another name.
    #[error("step `{name}` was recorded with a result of another type")]
    TypeChanged {
        /// The step.
        name: String,
        /// Why the recorded result is not one of this type.
        source: serde_json::Error,
    },
}

/// A key for a downstream call; prints as a UUID.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DerivedKey(Uuid);

impl DerivedKey {
    /// As a UUID.
    pub const fn as_uuid(&self) -> Uuid {
        self.0
    }

    /// The same 16 bytes as 22 characters of URL-safe base64, for services with short keys.
    pub fn short(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.0.as_bytes())
    }
}

impl fmt::Display for DerivedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for DerivedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DerivedKey({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The derivation cannot change: a rerun after an upgrade must send the same key.
    #[test]
    fn derived_keys_are_what_they_were() {
        let operation = Operation::default();
        operation.grant(&Attempt::new(OperationId::from_bytes([7; 16]), 2, None));
        let key = operation.derive("psp");
        assert_eq!(key.to_string(), "abc07c76-d767-5510-a4c0-d18621aba31b");
        assert_eq!(key.short(), "q8B8dtdnVRCkwNGGIaujGw");
        assert_eq!(operation.attempt(), 2);
    }

    /// Otherwise each attempt would call its provider under another key.
    #[test]
    fn what_was_asked_too_early_does_not_count_once_the_claim_is_granted() {
        let operation = Operation::default();
        let early = operation.id();
        operation.grant(&Attempt::new(OperationId::from_bytes([7; 16]), 2, None));
        assert_ne!(operation.id(), early);
        assert_eq!(operation.id(), OperationId::from_bytes([7; 16]));
        assert_eq!(operation.attempt(), 2);
    }

    #[test]
    fn what_is_handed_on_is_the_outer_operation_until_it_has_a_claim_of_its_own() {
        let (outer, inner_id) = (Operation::default(), OperationId::from_bytes([8; 16]));
        let mut extensions = Extensions::new();
        extensions.insert(outer.inner());
        let inner = Operation::of(&mut extensions);
        outer.grant(&Attempt::new(OperationId::from_bytes([7; 16]), 2, None));
        assert_eq!((inner.id(), inner.attempt()), (outer.id(), 2));
        assert_eq!(inner.derive("psp"), outer.derive("psp"));
        inner.grant(&Attempt::new(inner_id, 1, None));
        assert_eq!((inner.id(), inner.attempt()), (inner_id, 1));
        assert_eq!(outer.id(), OperationId::from_bytes([7; 16]));
    }

    /// As a layer that tries again does.
    #[test]
    fn a_request_that_is_sent_twice_has_an_operation_each_time() {
        let outer = Operation::default();
        outer.grant(&Attempt::new(OperationId::from_bytes([7; 16]), 1, None));
        let mut extensions = Extensions::new();
        extensions.insert(outer.inner());
        let first = Operation::of(&mut extensions);
        first.grant(&Attempt::new(OperationId::from_bytes([8; 16]), 1, None));
        let again = Operation::of(&mut extensions);
        assert_eq!(again.id(), outer.id());
        again.grant(&Attempt::new(OperationId::from_bytes([8; 16]), 2, None));
        assert_eq!((first.attempt(), again.attempt()), (1, 2));
        assert_eq!(Operation::of(&mut Extensions::new()).attempt(), 1);
    }

    #[tokio::test]
    async fn a_lost_lease_wakes_who_watches_for_it() {
        let operation = Operation::default();
        let attempt = Attempt::new(OperationId::random(), 1, None);
        operation.grant(&attempt);
        assert!(!operation.is_lease_lost());
        let watch = tokio::spawn({
            let operation = operation.clone();
            async move { operation.lease_lost().await }
        });
        tokio::task::yield_now().await;
        attempt.lose();
        watch.await.unwrap();
        operation.lease_lost().await;
    }
}
