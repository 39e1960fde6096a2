//! Broken promises, in words.

use std::{error::Error, fmt};

/// What a handler that is safe to retry promises, as far as a test can see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Promise {
    /// The first request with a key is answered with success. Where it is not, nothing else can be
    /// said.
    Success,
    /// The first request with a key runs: it has the effect, and its answer is no replay.
    NewKeysRun,
    /// The effect happens once a key.
    OneEffect,
    /// Every later request gets the recorded answer.
    OneAnswer,
    /// A replay says that it is one.
    MarkedReplays,
    /// Another request under the same key is refused, and has no effect.
    NoWrongAnswer,
    /// A key does not stay in flight when nobody works on it any more.
    NoWedge,
    /// A request without a key is refused, and has no effect.
    NoKeyNoRun,
    /// The key of another tenant or principal is another key.
    OwnKeys,
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Success => "the first request must succeed",
            Self::NewKeysRun => "the first request with a new key must run",
            Self::OneEffect => "the effect must happen once",
            Self::OneAnswer => "every later request must get the recorded answer",
            Self::MarkedReplays => "a replay must say `Idempotent-Replayed: true`",
            Self::NoWrongAnswer => "a key that was used must be refused",
            Self::NoWedge => "a key must not stay in flight",
            Self::NoKeyNoRun => "a request must be refused",
            Self::OwnKeys => "the same key must be another key",
        })
    }
}

/// What was done to the handler when it broke a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// A request, and the same again.
    Retry,
    /// A request, and another one with its key.
    OtherRequest,
    /// Fifty times the same request at once.
    Duplicates,
    /// A request whose client hangs up, and the same again.
    HangUp,
    /// A request without a key.
    WithoutKey,
    /// A request, and the same from another tenant or principal.
    OtherScope,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Retry => "on a retry",
            Self::OtherRequest => "on another request",
            Self::Duplicates => "on fifty duplicates at once",
            Self::HangUp => "when the client hangs up",
            Self::WithoutKey => "without a key",
            Self::OtherScope => "in another scope",
        })
    }
}

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BrokenPromise {
    /// When.
    pub phase: Phase,
    /// Which.
    pub promise: Promise,
    /// What was seen instead, in words. They are for people and change between releases.
    pub seen: String,
}

impl fmt::Display for BrokenPromise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}: {}", self.phase, self.promise, self.seen)
    }
}

/// All promises that were broken, in the order in which that was seen; at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokenPromises(Vec<BrokenPromise>);

impl BrokenPromises {
    /// Each of them.
    pub fn iter(&self) -> std::slice::Iter<'_, BrokenPromise> {
        self.0.iter()
    }

    /// Whether this promise was broken in this phase.
    pub fn contains(&self, phase: Phase, promise: Promise) -> bool {
        self.iter().any(|broken| (broken.phase, broken.promise) == (phase, promise))
    }
}

impl<'a> IntoIterator for &'a BrokenPromises {
    type Item = &'a BrokenPromise;
    type IntoIter = std::slice::Iter<'a, BrokenPromise>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for BrokenPromises {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the handler is not safe to retry:")?;
        self.iter().try_for_each(|broken| write!(f, "\n- {broken}"))
    }
}

impl Error for BrokenPromises {}

/// What was seen so far.
#[derive(Default)]
pub(super) struct Report(Vec<BrokenPromise>);

impl Report {
    /// A promise was broken. Told once a phase: the first time says enough.
    pub(super) fn broken(&mut self, phase: Phase, promise: Promise, seen: impl Into<String>) {
        if !self.0.iter().any(|broken| (broken.phase, broken.promise) == (phase, promise)) {
            self.0.push(BrokenPromise { phase, promise, seen: seen.into() });
        }
    }

    pub(super) fn finish(self) -> Result<(), BrokenPromises> {
        if self.0.is_empty() { Ok(()) } else { Err(BrokenPromises(self.0)) }
    }
}
