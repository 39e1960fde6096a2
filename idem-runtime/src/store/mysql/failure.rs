//! What a call met, by numbers and never by texts.

use std::error::Error as StdError;

use sqlx::mysql::MySqlDatabaseError;

use super::NAME;
use crate::store::{StoreError, StoreErrorKind};

/// Why a call has failed.
#[derive(Debug)]
pub(super) struct Failure {
    kind: StoreErrorKind,
    remedy: Remedy,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// What may help at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// Nothing.
    None,
    /// To try again: the server undid the statement because others were in its way.
    Again,
    /// To try again on another connection: this one is broken, and nobody knows whether the
    /// statement was carried out.
    Elsewhere,
}

impl Failure {
    /// A failure that says in words what a person has to mend.
    pub(super) fn told(kind: StoreErrorKind, what: impl Into<String>) -> Self {
        Self { kind, remedy: Remedy::None, source: Some(what.into().into()) }
    }

    pub(super) const fn remedy(&self) -> Remedy {
        self.remedy
    }

    pub(super) fn into_error(self) -> StoreError {
        match self.source {
            Some(source) => StoreError::caused_by(NAME, self.kind, source),
            None => StoreError::new(NAME, self.kind),
        }
    }
}

impl From<StoreErrorKind> for Failure {
    fn from(kind: StoreErrorKind) -> Self {
        Self { kind, remedy: Remedy::None, source: None }
    }
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        let (kind, remedy) = judge(&error);
        Self { kind, remedy, source: Some(error.into()) }
    }
}

fn judge(error: &sqlx::Error) -> (StoreErrorKind, Remedy) {
    match error {
        sqlx::Error::Database(error) => match error.try_downcast_ref::<MySqlDatabaseError>() {
            Some(error) => judge_number(error.number(), error.code()),
            None => (StoreErrorKind::Refused, Remedy::None),
        },
        sqlx::Error::PoolTimedOut => (StoreErrorKind::TimedOut, Remedy::None),
        sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => {
            (StoreErrorKind::Unreachable, Remedy::None)
        }
        // A conversation that makes no sense is over, like one that broke off.
        sqlx::Error::Io(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::InvalidSavePointStatement
        | sqlx::Error::BeginFailed => (StoreErrorKind::Unreachable, Remedy::Elsewhere),
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::RowNotFound => {
            (StoreErrorKind::Corrupt, Remedy::None)
        }
        _ => (StoreErrorKind::Refused, Remedy::None),
    }
}

/// By the error's number and the class of its SQLSTATE:
/// [MySQL's](https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html) and
/// [MariaDB's](https://mariadb.com/kb/en/mariadb-error-codes/).
fn judge_number(number: u16, state: Option<&str>) -> (StoreErrorKind, Remedy) {
    use StoreErrorKind::{Corrupt, Full, Refused, TimedOut, TooLarge, Unreachable};
    match number {
        // A deadlock, a lock that was waited for too long, a lock table that is full, a row that
        // changed under a transaction's eyes, a table that did.
        1213 | 1205 | 1206 | 1020 | 1412 | 1615 => (TimedOut, Remedy::Again),
        // A statement that ran for longer than the server allows.
        1969 | 3024 => (TimedOut, Remedy::None),
        // Too large for the server's `max_allowed_packet`, after which it hangs up.
        1153 => (TooLarge, Remedy::None),
        // Too large for a function's result, for a row, for a string, for a column.
        1301 | 1118 | 1162 | 1406 => (TooLarge, Remedy::None),
        // The disk, the table.
        1021 | 1114 => (Full, Remedy::None),
        // An index or a table that is damaged.
        1034 | 1194 | 1195 | 1712 | 1877 => (Corrupt, Remedy::None),
        // Too many connections, to the server and by one account.
        1040 | 1203 | 1226 => (Unreachable, Remedy::None),
        // Out of memory.
        1037 | 1038 | 1041 => (Unreachable, Remedy::None),
        // The connection or its statement was killed; the server is going down; it hung up since
        // the connection was idle; behind a proxy it is another server, which knows no statement of
        // ours; it has become a replica, which takes no writes.
        1317 | 1927 | 3169 | 1053 | 4031 | 1243 | 1290 | 1792 | 1836 => {
            (Unreachable, Remedy::Elsewhere)
        }
        _ if state.is_some_and(|state| state.starts_with("08")) => (Unreachable, Remedy::Elsewhere),
        _ => (Refused, Remedy::None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_told_by_number_and_class() {
        for (number, state, expected) in [
            (1213, "40001", (StoreErrorKind::TimedOut, Remedy::Again)),
            (1205, "HY000", (StoreErrorKind::TimedOut, Remedy::Again)),
            // Of a class that otherwise says that the connection is gone.
            (1153, "08S01", (StoreErrorKind::TooLarge, Remedy::None)),
            (1040, "08004", (StoreErrorKind::Unreachable, Remedy::None)),
            (1158, "08S01", (StoreErrorKind::Unreachable, Remedy::Elsewhere)),
            (1047, "08S01", (StoreErrorKind::Unreachable, Remedy::Elsewhere)),
            (1114, "HY000", (StoreErrorKind::Full, Remedy::None)),
            (1146, "42S02", (StoreErrorKind::Refused, Remedy::None)),
            (1045, "28000", (StoreErrorKind::Refused, Remedy::None)),
        ] {
            assert_eq!(judge_number(number, Some(state)), expected, "{number}");
        }
        assert_eq!(judge_number(9999, None), (StoreErrorKind::Refused, Remedy::None));
    }
}
