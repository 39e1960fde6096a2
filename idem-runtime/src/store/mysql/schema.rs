//! The tables, and what the store needs of the server besides.

use sqlx::{MySqlConnection, Row as _};

use super::{MySqlStore, SCHEMA_VERSION, calls::Call, failure::Failure};
use crate::store::StoreErrorKind;

/// Creates the tables.
pub(super) struct CreateSchema;

impl Call for CreateSchema {
    const CHECKED: bool = false;

    type Answer = ();

    async fn run(&self, connection: &mut MySqlConnection) -> Result<(), Failure> {
        // No transaction holds the definition of tables together: whoever is first makes them all,
        // and whoever dies on the way leaves the rest to the next one.
        let lock = "SELECT GET_LOCK(LEFT(CONCAT('idem_schema.', DATABASE()), 64), 4)";
        let locked: Option<i64> = sqlx::query_scalar(lock).fetch_one(&mut *connection).await?;
        match locked {
            Some(1) => {}
            Some(_) => {
                let what = "another process has been creating the tables for too long";
                return Err(Failure::told(StoreErrorKind::TimedOut, what));
            }
            None => {
                let what = "the connections have no database (the URL names none)";
                return Err(Failure::told(StoreErrorKind::Refused, what));
            }
        }
        let created = create(connection).await;
        let unlock = "DO RELEASE_LOCK(LEFT(CONCAT('idem_schema.', DATABASE()), 64))";
        // A connection that is lost gives the lock up by itself.
        let unlocked = sqlx::query(unlock).execute(connection).await;
        created?;
        unlocked?;
        Ok(())
    }
}

async fn create(connection: &mut MySqlConnection) -> Result<(), Failure> {
    let exists: i64 = sqlx::query_scalar(
        "SELECT COUNT(*) FROM information_schema.tables
         WHERE table_schema = DATABASE() AND table_name = 'idem_schema'",
    )
    .fetch_one(&mut *connection)
    .await?;
    // Without a version, somebody died before the last statement.
    if exists > 0
        && let Some(version) = version(connection).await?
    {
        return check_version(version);
    }
    sqlx::raw_sql(MySqlStore::SCHEMA).execute(connection).await?;
    Ok(())
}

/// Finds out whether the store can work.
pub(super) struct Check;

impl Call for Check {
    const CHECKED: bool = false;

    type Answer = ();

    async fn run(&self, connection: &mut MySqlConnection) -> Result<(), Failure> {
        // The isolation level has one name in MySQL and another in MariaDB.
        let variables = sqlx::raw_sql(
            "SHOW SESSION VARIABLES WHERE Variable_name IN (
                 'version', 'autocommit', 'sql_safe_updates',
                 'transaction_isolation', 'tx_isolation')",
        )
        .fetch_all(&mut *connection)
        .await?;
        for variable in variables {
            check_variable(variable.try_get(0)?, variable.try_get(1)?)?;
        }
        match version(connection).await? {
            Some(version) => check_version(version),
            None => Err(Failure::told(
                StoreErrorKind::Refused,
                "its tables were not created to the end; creating them again mends it",
            )),
        }
    }
}

fn check_variable(name: &str, value: &str) -> Result<(), Failure> {
    let what = match name {
        "version" if is_too_old(value) => {
            format!("the server's version is {value}; it must be MySQL 8.0, MariaDB 10.6, or newer")
        }
        "autocommit" if value == "OFF" => {
            "the connections do not commit by themselves (autocommit = 0)".to_owned()
        }
        "sql_safe_updates" if value == "ON" => {
            "the connections make no statements on many rows (sql_safe_updates = 1)".to_owned()
        }
        // An answer that a transaction has recorded and not committed may never be.
        "transaction_isolation" | "tx_isolation" if value == "READ-UNCOMMITTED" => {
            "the connections read what is not committed (READ UNCOMMITTED)".to_owned()
        }
        _ => return Ok(()),
    };
    Err(Failure::told(StoreErrorKind::Refused, what))
}

/// Whether the server is one without `SKIP LOCKED` and `JSON_TABLE`. MariaDB says its name behind
/// its version, and some put `5.5.5-` in front of it, for clients that know no other.
fn is_too_old(version: &str) -> bool {
    let oldest = if version.contains("MariaDB") { (10, 6) } else { (8, 0) };
    let version = version.strip_prefix("5.5.5-").unwrap_or(version);
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) < oldest,
        // It is for the statements to find out.
        _ => false,
    }
}

/// The tables' version.
async fn version(connection: &mut MySqlConnection) -> Result<Option<u32>, Failure> {
    let version = "SELECT version FROM idem_schema WHERE id = 1";
    Ok(sqlx::query_scalar(version).fetch_optional(connection).await?)
}

fn check_version(version: u32) -> Result<(), Failure> {
    let kind = match version {
        SCHEMA_VERSION => return Ok(()),
        ..SCHEMA_VERSION => StoreErrorKind::Corrupt,
        _ => StoreErrorKind::Newer,
    };
    let what = format!("its tables are of version {version}, and not {SCHEMA_VERSION}");
    Err(Failure::told(kind, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_apart() {
        for version in [
            "8.0.36",
            "8.4.3",
            "9.1.0-commercial",
            "10.6.0-MariaDB",
            "10.11.14-MariaDB-0+deb12u2-log",
            "5.5.5-10.11.2-MariaDB",
            "11.4.1-MariaDB",
            "8.0.mysql_aurora.3.05.2",
            "unknown",
        ] {
            assert!(!is_too_old(version), "{version}");
        }
        for version in
            ["5.7.44-log", "5.5.5", "10.5.23-MariaDB", "5.5.5-10.4.7-MariaDB", "10.0.1-MariaDB"]
        {
            assert!(is_too_old(version), "{version}");
        }
    }
}
