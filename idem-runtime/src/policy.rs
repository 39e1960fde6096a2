//! Policies: what an application says of a handler, an anchor or the whole engine.
//!
//! What a handler does not say comes from its anchor, then from the engine, then from the defaults.

use std::{fmt, sync::Arc, time::Duration};

use http::HeaderName;

use crate::{
    anchor::{Anchor, Format, Scope},
    builder::{Builder, Scoped, Unscoped},
    decision::OnUnknown,
    fingerprint::FingerprintScheme,
    hooks::{AdmitFn, RecoverFn, ReplayShape},
    key::Routes,
    known::Known,
    record::Ttl,
    refusal::Refusals,
};

/// How a handler is idempotent: its anchor and whatever it says beside it.
///
/// `#[idempotent(…)]` makes one from its options; for handlers without the macro it is written out
/// and given to [`idempotent`](crate::IdempotentExt::idempotent).
///
/// ```
/// use std::time::Duration;
/// use idem_runtime::{Anchor, Policy, Recording};
///
/// const PAYMENTS: Policy = Policy::new(Anchor::header("Idempotency-Key"))
///     .ttl(Duration::from_secs(60 * 60))
///     .record(Recording::Final);
/// ```
#[derive(Clone, Copy, Debug)]
#[must_use = "a policy does nothing until a handler has it"]
pub struct Policy {
    pub(crate) anchor: Anchor,
    pub(crate) options: Options,
}

impl Policy {
    /// The policy that says no more than its anchor does.
    pub const fn new(anchor: Anchor) -> Self {
        Self { anchor, options: Options::NONE }
    }

    /// Checks each value of the anchor and brings it into one canonical form.
    ///
    /// # Panics
    ///
    /// In a constant: does not compile when it is [`Format::Hex`] of no bytes.
    #[track_caller]
    pub const fn format(mut self, format: Format) -> Self {
        self.anchor = self.anchor.format(format);
        self
    }
}

impl From<Anchor> for Policy {
    fn from(anchor: Anchor) -> Self {
        Self::new(anchor)
    }
}

/// Everything that may be said in more than one place; `None` is "not said here".
#[derive(Clone, Copy)]
pub(crate) struct Options {
    pub(crate) ttl: Option<Ttl>,
    pub(crate) scope: Option<Scope>,
    pub(crate) space: Option<&'static str>,
    pub(crate) optional: Option<bool>,
    pub(crate) fingerprint: Option<FingerprintScheme>,
    pub(crate) record: Option<Recording>,
    pub(crate) in_flight: Option<InFlight>,
    pub(crate) on_unknown: Option<OnUnknown>,
    pub(crate) lease: Option<Duration>,
    pub(crate) refusals: Option<&'static dyn Refusals>,
    pub(crate) mode: Option<Mode>,
    pub(crate) store_outage: Option<StoreOutage>,
    pub(crate) issued: Option<bool>,
    pub(crate) recover: Option<RecoverFn>,
    pub(crate) admit: Option<AdmitFn>,
    pub(crate) replay: Option<ReplayShape>,
    pub(crate) transaction: Option<bool>,
}

impl Options {
    pub(crate) const NONE: Self = Self {
        ttl: None,
        scope: None,
        space: None,
        optional: None,
        fingerprint: None,
        record: None,
        in_flight: None,
        on_unknown: None,
        lease: None,
        refusals: None,
        mode: None,
        store_outage: None,
        issued: None,
        recover: None,
        admit: None,
        replay: None,
        transaction: None,
    };

    /// What is said here, and `other` where nothing is.
    fn or(self, other: Self) -> Self {
        Self {
            ttl: self.ttl.or(other.ttl),
            scope: self.scope.or(other.scope),
            space: self.space.or(other.space),
            optional: self.optional.or(other.optional),
            fingerprint: self.fingerprint.or(other.fingerprint),
            record: self.record.or(other.record),
            in_flight: self.in_flight.or(other.in_flight),
            on_unknown: self.on_unknown.or(other.on_unknown),
            lease: self.lease.or(other.lease),
            refusals: self.refusals.or(other.refusals),
            mode: self.mode.or(other.mode),
            store_outage: self.store_outage.or(other.store_outage),
            issued: self.issued.or(other.issued),
            recover: self.recover.or(other.recover),
            admit: self.admit.or(other.admit),
            replay: self.replay.or(other.replay),
            transaction: self.transaction.or(other.transaction),
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("ttl", &self.ttl)
            .field("scope", &self.scope)
            .field("space", &self.space)
            .field("fingerprint", &self.fingerprint)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

/// The words that handlers and engines share, each with one meaning.
macro_rules! shared_options {
    ($($type:ty: $($constness:ident)?;)*) => {$(
        impl $type {
            /// How long a recorded answer is replayed, counted from when it was recorded. A replay
            /// does not extend it. Default: 24 hours.
            ///
            /// # Panics
            ///
            /// When it is zero: a record that expires at once protects nothing. In a constant, that
            /// does not compile.
            #[track_caller]
            pub $($constness)? fn ttl(mut self, ttl: Duration) -> Self {
                assert!(!ttl.is_zero(), "ttl: a record that expires at once protects nothing");
                self.options.ttl = Some(Ttl::For(ttl));
                self
            }

            /// A recorded answer is replayed for ever.
            pub $($constness)? fn forever(mut self) -> Self {
                self.options.ttl = Some(Ttl::Forever);
                self
            }

            /// Within what a key is unique: handlers that name the same space share their keys.
            /// Default: each operation is a space of its own.
            ///
            /// # Panics
            ///
            /// When the name is empty. In a constant, that does not compile.
            #[track_caller]
            pub $($constness)? fn space(mut self, name: &'static str) -> Self {
                assert!(!name.is_empty(), "space: the name is empty");
                self.options.space = Some(name);
                self
            }

            /// Without a key the handler runs as plain axum. Default: such a request is refused.
            pub $($constness)? fn optional(mut self) -> Self {
                self.options.optional = Some(true);
                self
            }

            /// What makes two requests the same. Default: query string and body, byte for byte.
            /// Clients that build a multipart body anew for each attempt choose a new boundary each
            /// time: for those, say which headers count, or [`FingerprintScheme::none`].
            pub $($constness)? fn fingerprint(mut self, scheme: FingerprintScheme) -> Self {
                self.options.fingerprint = Some(scheme);
                self
            }

            /// Which answers are recorded. Default: successes.
            pub $($constness)? fn record(mut self, recording: Recording) -> Self {
                self.options.record = Some(recording);
                self
            }

            /// What becomes of a duplicate of a running request. Default: it is refused at once.
            ///
            /// # Panics
            ///
            /// When it is to wait for no time: say [`InFlight::Reject`]. In a constant, that does
            /// not compile.
            pub $($constness)? fn in_flight(mut self, in_flight: InFlight) -> Self {
                if let InFlight::Wait(bound) = in_flight {
                    assert!(!bound.is_zero(), "in_flight: to wait for no time is to reject");
                }
                self.options.in_flight = Some(in_flight);
                self
            }

            /// For how long a claim holds without being renewed: after a crash, the key is free
            /// again after this time. Running handlers renew it, so it bounds no handler. Default:
            /// 30 seconds; at least 100 milliseconds, so that a renewal can arrive in time.
            ///
            /// # Panics
            ///
            /// When it is zero: every claim would be lost at once. In a constant, that does not
            /// compile.
            #[track_caller]
            pub $($constness)? fn lease(mut self, lease: Duration) -> Self {
                assert!(!lease.is_zero(), "lease: a claim without a lease would be lost at once");
                self.options.lease = Some(lease);
                self
            }

            /// Whether refusals and replays are carried out or only observed. Default: carried out.
            pub $($constness)? fn mode(mut self, mode: Mode) -> Self {
                self.options.mode = Some(mode);
                self
            }

            /// What becomes of a request while the store cannot be asked. Default: it is refused and
            /// does not run.
            pub $($constness)? fn store_outage(mut self, outage: StoreOutage) -> Self {
                self.options.store_outage = Some(outage);
                self
            }
        }
    )*};
}

shared_options! {
    Policy: const;
    Builder<Unscoped>: ;
    Builder<Scoped>: ;
}

impl Policy {
    /// Whose the key is. Default: the engine's scope.
    pub const fn scope(mut self, scope: Scope) -> Self {
        self.options.scope = Some(scope);
        self
    }

    /// Gives refusals another shape. Default: the engine's.
    pub const fn refusals(mut self, refusals: &'static dyn Refusals) -> Self {
        self.options.refusals = Some(refusals);
        self
    }

    /// What becomes of a request whose last attempt ended without saying whether its effect
    /// happened. Default: it runs again.
    ///
    /// ```compile_fail,E0080
    /// use idem_runtime::{Anchor, OnUnknown, Policy};
    ///
    /// // Whom to ask is not said.
    /// const PAYMENTS: Policy =
    ///     Policy::new(Anchor::header("Idempotency-Key")).on_unknown(OnUnknown::Recover);
    /// ```
    ///
    /// # Panics
    ///
    /// When it is [`OnUnknown::Recover`] and no function was named: say [`recover`](Self::recover).
    /// In a constant, that does not compile.
    #[track_caller]
    pub const fn on_unknown(mut self, on_unknown: OnUnknown) -> Self {
        assert!(
            !matches!(on_unknown, OnUnknown::Recover) || self.options.recover.is_some(),
            "on_unknown: to recover, say by which function: `recover(…)`"
        );
        self.options.on_unknown = Some(on_unknown);
        self
    }

    /// Asks this function what became of a request whose last attempt ended without saying; see
    /// [`Recovered`](crate::Recovered).
    pub const fn recover(mut self, recover: RecoverFn) -> Self {
        self.options.on_unknown = Some(OnUnknown::Recover);
        self.options.recover = Some(recover);
        self
    }

    /// Asks this function whether a request that would run may: for quotas and rate limits, which
    /// replays and refusals do not touch. It is asked too where the handler runs without protection,
    /// be it that an optional key is absent or that an outage lets it run. A denied request has not
    /// happened.
    pub const fn admit(mut self, admit: AdmitFn) -> Self {
        self.options.admit = Some(admit);
        self
    }

    /// Sends replays in another shape than they were recorded in.
    pub const fn replay(mut self, shape: ReplayShape) -> Self {
        self.options.replay = Some(shape);
        self
    }

    /// Takes only keys that the server handed out by [`issue`](crate::Idempotency::issue).
    pub const fn issued(mut self) -> Self {
        self.options.issued = Some(true);
        self
    }

    /// Commits what the handler does through its `Tx` argument together with the record: exactly once,
    /// through a crash at any point.
    pub const fn transaction(mut self) -> Self {
        self.options.transaction = Some(true);
        self
    }

    /// This policy over an engine's, over the defaults.
    pub(crate) fn resolve(&self, engine: &Options, engine_scope: Scope) -> Resolved {
        let said = self.options.or(self.anchor.options).or(*engine);
        let scope = said.scope.unwrap_or(engine_scope);
        let mut names = Vec::new();
        self.anchor.headers(&mut names);
        scope.headers(&mut names);
        let parsed = |name: &'static str| Some((name, name.parse().ok()?));
        Resolved {
            anchor: self.anchor,
            ttl: said.ttl.unwrap_or(DEFAULT_TTL),
            scope,
            space: said.space,
            optional: said.optional.unwrap_or(false),
            fingerprint: said.fingerprint.unwrap_or(FingerprintScheme::request()),
            record: said.record.unwrap_or_default(),
            in_flight: said.in_flight.unwrap_or_default(),
            on_unknown: said.on_unknown.unwrap_or_default(),
            recover: said.recover,
            admit: said.admit,
            replay: said.replay,
            issued: said.issued.unwrap_or(false),
            transaction: said.transaction.unwrap_or(false),
            lease: said.lease.unwrap_or(DEFAULT_LEASE).max(SHORTEST_LEASE),
            refusals: said.refusals,
            mode: said.mode.unwrap_or_default(),
            store_outage: said.store_outage.unwrap_or_default(),
            is_layer: false,
            routes: Routes::default(),
            headers: names.into_iter().filter_map(parsed).collect(),
        }
    }
}

pub(crate) const DEFAULT_TTL: Ttl = Ttl::For(Duration::from_secs(24 * 60 * 60));
pub(crate) const DEFAULT_LEASE: Duration = Duration::from_secs(30);
/// Below this a renewal could not arrive in time.
const SHORTEST_LEASE: Duration = Duration::from_millis(100);

/// A policy in which everything is said.
pub(crate) struct Resolved {
    pub(crate) anchor: Anchor,
    pub(crate) ttl: Ttl,
    pub(crate) scope: Scope,
    pub(crate) space: Option<&'static str>,
    pub(crate) optional: bool,
    pub(crate) fingerprint: FingerprintScheme,
    pub(crate) record: Recording,
    pub(crate) in_flight: InFlight,
    pub(crate) on_unknown: OnUnknown,
    pub(crate) recover: Option<RecoverFn>,
    pub(crate) admit: Option<AdmitFn>,
    pub(crate) replay: Option<ReplayShape>,
    pub(crate) issued: bool,
    pub(crate) transaction: bool,
    pub(crate) lease: Duration,
    pub(crate) refusals: Option<&'static dyn Refusals>,
    pub(crate) mode: Mode,
    pub(crate) store_outage: StoreOutage,
    /// Whether it is a layer's and not a handler's.
    pub(crate) is_layer: bool,
    /// The routes that its requests came by.
    pub(crate) routes: Routes,
    /// The headers that its anchor and its scope read, as they are written there and parsed.
    pub(crate) headers: Box<[(&'static str, HeaderName)]>,
}

impl Resolved {
    /// Whether a duplicate of a running request may wait for its answer.
    pub(crate) fn waits(&self) -> bool {
        matches!(self.in_flight, InFlight::Wait(_)) && self.mode == Mode::Enforce
    }
}

/// What the policies of an engine's handlers come to. Each is resolved at its first request, and
/// known by its address from then on: there are no more than the program has written down.
#[derive(Default)]
pub(crate) struct Policies([Known<(&'static Policy, Arc<Resolved>)>; 32]);

impl Policies {
    /// What a policy comes to.
    pub(crate) fn resolved(
        &self,
        policy: &'static Policy,
        engine: &Options,
        engine_scope: Scope,
    ) -> Arc<Resolved> {
        let address = std::ptr::from_ref(policy).addr();
        let list = &self.0[address / align_of::<Policy>() % self.0.len()];
        let is_it = |(known, _): &(&'static Policy, _)| std::ptr::eq(*known, policy);
        let resolve = || Arc::new(policy.resolve(engine, engine_scope));
        match list.find(usize::MAX, is_it, || (policy, resolve())) {
            Some((_, (_, resolved))) => Arc::clone(resolved),
            None => resolve(),
        }
    }
}

/// Which answers are recorded and replayed.
///
/// What is not recorded is either *nothing happened* (a 4xx: the key is free again and the next
/// request with it starts afresh) or an *unknown outcome* (a 5xx, a 408, a panic: the claim is
/// released, and a retry runs under the same operation id).
///
/// A 4xx of a later attempt says nothing of what an earlier one did: it releases the claim too, so
/// that only the same request may be tried again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recording {
    /// 2xx and 3xx.
    #[default]
    Success,
    /// Everything but 401, 403, 408, 425, 429 and 5xx, which say that trying again may help.
    Final,
    /// Everything (but 1xx, which answers nothing).
    All,
}

impl Recording {
    pub(crate) fn covers(self, status: u16) -> bool {
        match self {
            Self::Success => (200..400).contains(&status),
            Self::Final => !matches!(status, ..200 | 401 | 403 | 408 | 425 | 429 | 500..),
            Self::All => status >= 200,
        }
    }
}

/// What becomes of a duplicate while the original runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum InFlight {
    /// It is refused at once, with `Retry-After`.
    #[default]
    Reject,
    /// It waits for the original's answer, at most this long, and is refused then. A client may ask
    /// for less by `Prefer: wait=N` (RFC 7240, in seconds). A duplicate that waits never runs: if
    /// the original ends without an answer, it is refused and its retry runs.
    Wait(Duration),
}

/// How much of idem is in force, for introducing it into a running service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// Everything.
    #[default]
    Enforce,
    /// Keys are claimed and answers recorded, but nothing is refused or replayed: the handler
    /// always runs, and the observer hears what would have happened.
    Observe,
    /// Nothing: the handler runs as plain axum and the store is not asked.
    Off,
}

/// What becomes of a request while the store cannot be asked: it cannot be reached, does not answer
/// in time, or refuses the call.
///
/// A store that answers is no outage: when it is full, or has a record that cannot be read, the
/// request is refused whatever is said here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreOutage {
    /// It is refused: nothing runs without protection.
    #[default]
    Closed,
    /// It runs without protection: its retry, or a duplicate, may run it again.
    Open,
}
