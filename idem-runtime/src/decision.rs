//! The decision: what a request gets, from what the store holds for its key.
//!
//! It is a pure function. A store takes it inside its atomic claim (or says the same in its own
//! language); the engine takes it again on the record that a refused claim brought back.

/// What the store holds for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Seen {
    /// No record, or one that is no longer kept.
    Nothing,
    /// A key that the server handed out and nobody used.
    Issued {
        /// Whether it may still be used.
        valid: bool,
    },
    /// An attempt gave up without saying whether its effect happened.
    Released {
        /// Whether it may still be used.
        valid: bool,
    },
    /// An attempt runs, or died.
    Running {
        /// Whether its lease is alive.
        leased: bool,
        /// Whether it may still be used.
        valid: bool,
    },
    /// The answer is recorded.
    Completed {
        /// Whether it may still be used.
        valid: bool,
        /// Whether only the fact was recorded and not the response.
        tombstone: bool,
    },
}

/// What becomes of a request whose last attempt ended without saying whether its effect happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum OnUnknown {
    /// Run it again, under the same operation id.
    #[default]
    Rerun,
    /// Refuse it until somebody settles what happened.
    Refuse,
    /// Ask the application what happened.
    Recover,
}

/// What a request asks of the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Asked {
    /// Whether its fingerprint is the record's.
    pub same: bool,
    /// Whether only a key that the server handed out will do.
    pub issued_only: bool,
    /// What an unknown outcome leads to.
    pub on_unknown: OnUnknown,
}

/// What a request gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Decision {
    /// The claim, and with it the right to run.
    Run,
    /// The recorded answer.
    Replay,
    /// A refusal: it was done, but its answer was not kept.
    NotReplayable,
    /// A refusal: it is running.
    InFlight,
    /// A refusal: another request used this key.
    Mismatch,
    /// A refusal: nobody knows what became of it.
    UnknownOutcome,
    /// The application is asked what became of it.
    Recover,
    /// A refusal: the server never handed this key out.
    UnknownKey,
    /// A refusal: the time in which this key could be used is over.
    ExpiredKey,
}

/// Decides.
///
/// A key whose validity is over is refused before anything else is looked at; a mismatch wins over
/// in flight and over an unknown outcome. A run that began in time may finish after it.
pub fn decide(seen: Seen, asked: Asked) -> Decision {
    match seen {
        Seen::Nothing if asked.issued_only => Decision::UnknownKey,
        Seen::Nothing => Decision::Run,
        Seen::Issued { valid: false }
        | Seen::Released { valid: false }
        | Seen::Running { leased: false, valid: false }
        | Seen::Completed { valid: false, .. } => Decision::ExpiredKey,
        Seen::Issued { valid: true } => Decision::Run,
        _ if !asked.same => Decision::Mismatch,
        Seen::Running { leased: true, .. } => Decision::InFlight,
        Seen::Completed { tombstone: false, .. } => Decision::Replay,
        Seen::Completed { tombstone: true, .. } => Decision::NotReplayable,
        Seen::Released { .. } | Seen::Running { leased: false, .. } => match asked.on_unknown {
            OnUnknown::Rerun => Decision::Run,
            OnUnknown::Refuse => Decision::UnknownOutcome,
            OnUnknown::Recover => Decision::Recover,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::{Decision::*, *};

    /// One row of the table: what is seen, and the decision for the same and for another
    /// fingerprint under each policy for unknown outcomes.
    type Row = (Seen, [Decision; 3], Decision);

    const POLICIES: [OnUnknown; 3] = [OnUnknown::Rerun, OnUnknown::Refuse, OnUnknown::Recover];

    const UNKNOWN: [Decision; 3] = [Run, UnknownOutcome, Recover];

    const TABLE: [Row; 12] = [
        (Seen::Issued { valid: true }, [Run; 3], Run),
        (Seen::Issued { valid: false }, [ExpiredKey; 3], ExpiredKey),
        (Seen::Released { valid: true }, UNKNOWN, Mismatch),
        (Seen::Released { valid: false }, [ExpiredKey; 3], ExpiredKey),
        (Seen::Running { leased: true, valid: true }, [InFlight; 3], Mismatch),
        (Seen::Running { leased: true, valid: false }, [InFlight; 3], Mismatch),
        (Seen::Running { leased: false, valid: true }, UNKNOWN, Mismatch),
        (Seen::Running { leased: false, valid: false }, [ExpiredKey; 3], ExpiredKey),
        (Seen::Completed { valid: true, tombstone: false }, [Replay; 3], Mismatch),
        (Seen::Completed { valid: true, tombstone: true }, [NotReplayable; 3], Mismatch),
        (Seen::Completed { valid: false, tombstone: false }, [ExpiredKey; 3], ExpiredKey),
        (Seen::Completed { valid: false, tombstone: true }, [ExpiredKey; 3], ExpiredKey),
    ];

    #[test]
    fn the_whole_table() {
        for (seen, same, other) in TABLE {
            for issued_only in [false, true] {
                for (on_unknown, expected) in POLICIES.into_iter().zip(same) {
                    let asked = Asked { same: true, issued_only, on_unknown };
                    assert_eq!(decide(seen, asked), expected, "{seen:?} {asked:?}");
                    let asked = Asked { same: false, ..asked };
                    assert_eq!(decide(seen, asked), other, "{seen:?} {asked:?}");
                }
            }
        }
    }

    #[test]
    fn a_key_that_nobody_has_seen_runs_unless_the_server_must_have_issued_it() {
        for on_unknown in POLICIES {
            for same in [true, false] {
                let free = Asked { same, issued_only: false, on_unknown };
                assert_eq!(decide(Seen::Nothing, free), Run);
                let issued_only = Asked { issued_only: true, ..free };
                assert_eq!(decide(Seen::Nothing, issued_only), UnknownKey);
            }
        }
    }
}
