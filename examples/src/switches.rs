//! The switches that all examples take.

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use clap::Args;
use idem_runtime::store::{MemoryStore, SqliteStore, Store, StoreError};

use crate::Result;

/// The switches that all examples take.
#[derive(Args, Clone, Debug)]
pub struct Switches {
    /// The port on 127.0.0.1; 0 takes any that is free [default: 3000 for quickstart, 3001 for
    /// nora, 3002 for pirate, 3003 for portfolio, 3004 for skadi, 3005 for leash]
    #[arg(long)]
    pub port: Option<u16>,
    /// Where idem keeps its records: `memory`, or `sqlite:PATH` [default: sqlite:quickstart.db for
    /// quickstart, memory for the others]
    #[arg(long, value_name = "STORE")]
    pub store: Option<StoreChoice>,
    /// Divides the documented times by so much, so that their ends can be watched
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub time_scale: u32,
}

impl Switches {
    /// A documented time, as it is to be in this run.
    pub fn scaled(&self, documented: Duration) -> Duration {
        (documented / self.time_scale).max(Duration::from_millis(1))
    }
}

/// A store that can be asked for on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreChoice {
    /// In this process, forgotten when it ends.
    Memory,
    /// In an SQLite database, which is created if it does not exist.
    Sqlite(PathBuf),
}

impl StoreChoice {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// When the database cannot be opened.
    pub async fn open(&self) -> Result<Arc<dyn Store>, StoreError> {
        Ok(match self {
            Self::Memory => Arc::new(MemoryStore::new()),
            Self::Sqlite(path) => Arc::new(SqliteStore::open(path).await?),
        })
    }

    /// Opens one that a server has made: whoever mistypes its name must not be shown an empty one.
    ///
    /// # Errors
    ///
    /// When there is none, or it cannot be opened.
    pub async fn open_existing(&self) -> Result<Arc<dyn Store>> {
        match self {
            Self::Memory => {
                return Err("records in memory are seen by their own process only".into());
            }
            Self::Sqlite(path) if !path.is_file() => {
                return Err(format!("{self}: there is no such database").into());
            }
            Self::Sqlite(_) => {}
        }
        Ok(self.open().await?)
    }
}

impl FromStr for StoreChoice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "memory" => Ok(Self::Memory),
            Some(("sqlite", path)) if !path.is_empty() => Ok(Self::Sqlite(path.into())),
            _ => Err("expected `memory` or `sqlite:PATH`"),
        }
    }
}

impl fmt::Display for StoreChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory"),
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_asked_for_by_name() {
        assert_eq!("memory".parse(), Ok(StoreChoice::Memory));
        assert_eq!("sqlite:/a:b.db".parse(), Ok(StoreChoice::Sqlite("/a:b.db".into())));
        for wrong in ["", "sqlite", "sqlite:", "memory:", "postgres:x"] {
            assert!(StoreChoice::from_str(wrong).is_err(), "{wrong}");
        }
    }
}
