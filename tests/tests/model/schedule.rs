//! What may happen, and random lists of it.

use std::fmt;

use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

/// How many keys there are: two of each of two tenants.
pub(crate) const KEYS: usize = 4;

/// What a handler comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// It answers with this status.
    Status(u16),
    /// A success whose body is too large to be recorded.
    Large,
    Panic,
    /// It says itself what becomes of its answer, a 200 or 409.
    Recorded,
    Forgotten,
    Uncertain,
    Tombstone,
}

/// What `recover` says when it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Recover {
    Answered,
    Never,
    Unknown,
}

/// What the store does to the claim of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClaimFault {
    None,
    /// It cannot be reached, nor when it is asked again.
    Refused,
    /// The claim is made and its answer lost; asked again, it answers.
    AckLost,
    /// Both answers are lost.
    AcksLost,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Asking {
    pub(crate) process: usize,
    pub(crate) key: usize,
    /// Which of two bodies.
    pub(crate) body: usize,
    pub(crate) behaviour: Behaviour,
    /// Whether the handler waits in its middle until it is let on.
    pub(crate) gated: bool,
    pub(crate) fault: ClaimFault,
    pub(crate) recover: Recover,
    /// The client hangs up after so many polls, and at the latest when nothing moves.
    pub(crate) hang_up: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    Request(Asking),
    /// One of the handlers that wait is let on.
    Open(usize),
    /// A process dies, and another one starts in its place.
    Crash(usize),
    /// So many seconds pass, for the processes as for the store.
    Pass(u64),
    /// The processes were suspended for so many seconds.
    Suspend(u64),
    /// The store cannot be reached.
    Outage,
    /// The store takes no ends of claims.
    EndsFail,
    /// The next answer to a completion is lost.
    CompletionAckLost,
    Mend,
    /// The server hands a key out, if keys are handed out.
    Issue(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Records {
    Success,
    Final,
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unknown {
    Rerun,
    Refuse,
    Recover,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) records: Records,
    pub(crate) unknown: Unknown,
    pub(crate) issued: bool,
    pub(crate) waits: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    pub(crate) rules: Rules,
    pub(crate) actions: Vec<Action>,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}", self.rules)?;
        let mut actions = self.actions.iter().enumerate();
        actions.try_for_each(|(number, action)| writeln!(f, "{number:3} {action:?}"))
    }
}

fn one_of<T: Copy>(rng: &mut impl Rng, choices: &[T]) -> T {
    choices[rng.random_range(0..choices.len())]
}

impl Schedule {
    pub(crate) fn random(seed: u64) -> Self {
        let rng = &mut StdRng::seed_from_u64(seed);
        let rules = Rules {
            records: one_of(rng, &[Records::Success, Records::Final, Records::All]),
            unknown: one_of(rng, &[Unknown::Rerun, Unknown::Refuse, Unknown::Recover]),
            issued: rng.random_ratio(1, 4),
            waits: rng.random_ratio(1, 3),
        };
        // Few keys make many meetings.
        let keys = rng.random_range(1..=KEYS);
        let mut actions = Vec::new();
        if rules.issued {
            actions.extend((0..keys).map(Action::Issue));
        }
        let length = rng.random_range(4..16);
        actions.extend((0..length).map(|_| Action::random(rng, keys)));
        Self { rules, actions }
    }
}

impl Action {
    fn random(rng: &mut impl Rng, keys: usize) -> Self {
        match rng.random_range(0..100) {
            0..55 => Self::Request(Asking::random(rng, keys)),
            55..68 => Self::Open(rng.random_range(0..4)),
            68..75 => Self::Crash(rng.random_range(0..2)),
            75..84 => Self::Pass(one_of(rng, &[1, 2, 4, 7, 13, 32])),
            84..89 => Self::Suspend(one_of(rng, &[1, 3, 5, 6, 7, 29, 31])),
            89..91 => Self::Outage,
            91..93 => Self::EndsFail,
            93..95 => Self::CompletionAckLost,
            95..98 => Self::Mend,
            _ => Self::Issue(rng.random_range(0..keys)),
        }
    }
}

impl Asking {
    fn random(rng: &mut impl Rng, keys: usize) -> Self {
        use Behaviour::*;
        let behaviour = match rng.random_range(0..20) {
            0..8 => Status(one_of(rng, &[200, 201, 202, 302])),
            8..11 => Status(one_of(rng, &[400, 401, 403, 404, 409, 422, 425, 429])),
            11..14 => Status(one_of(rng, &[500, 503, 408])),
            14 => Large,
            15 => Panic,
            16 => Recorded,
            17 => Forgotten,
            18 => Uncertain,
            _ => Tombstone,
        };
        let fault = match rng.random_range(0..20) {
            0 => ClaimFault::Refused,
            1 => ClaimFault::AckLost,
            2 => ClaimFault::AcksLost,
            _ => ClaimFault::None,
        };
        Self {
            process: rng.random_range(0..2),
            key: rng.random_range(0..keys),
            body: usize::from(rng.random_ratio(1, 6)),
            behaviour,
            gated: rng.random_ratio(2, 5),
            fault,
            recover: one_of(rng, &[Recover::Answered, Recover::Never, Recover::Unknown]),
            hang_up: rng.random_ratio(1, 8).then(|| rng.random_range(0..6)),
        }
    }
}
