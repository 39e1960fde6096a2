//! The stores that an example can be run on, by what is said on the command line:
//!
//! ```text
//! memory                                        sqlite:PATH
//! postgres://user:password@host:5432/database   mysql://user:password@host:3306/database
//! redis://user:password@host:6379/0             redis-cluster://user:password@host:7000,host:7001
//! ```
//!
//! Those of the last two lines need the feature `servers`: their drivers are 25 crates more to
//! compile, which whoever only wants to see an example can do without.

use std::{ffi::OsStr, fmt, path::PathBuf, str::FromStr, sync::Arc};

use clap::{
    Arg, Command,
    builder::{TypedValueParser, ValueParserFactory},
    error::ErrorKind,
};
use idem_runtime::store::{MemoryStore, SqliteStore, Store};
use reqwest::Url;

use crate::Result;

/// A store that can be asked for on the command line.
///
/// What it prints as names no user and no password.
#[derive(Clone, PartialEq, Eq)]
pub enum StoreChoice {
    /// In this process, forgotten when it ends.
    Memory,
    /// In an SQLite database, which is created if it does not exist.
    Sqlite(PathBuf),
    /// In a database of a PostgreSQL server.
    Postgres(Url),
    /// In a database of a MySQL or MariaDB server.
    MySql(Url),
    /// In a Redis or Valkey server.
    Redis(Url),
    /// In a Redis Cluster, of which some nodes are named.
    RedisCluster(Vec<Url>),
}

impl StoreChoice {
    /// Opens it, and creates the tables if there are none.
    ///
    /// # Errors
    ///
    /// When the database cannot be opened or the server cannot be used.
    pub async fn open(&self) -> Result<Arc<dyn Store>> {
        Ok(match self {
            Self::Memory => Arc::new(MemoryStore::new()),
            Self::Sqlite(path) => Arc::new(SqliteStore::open(path).await?),
            server => server.connect(true).await?,
        })
    }

    /// Opens one that a server has made: whoever mistypes its name must not be shown an empty one.
    ///
    /// # Errors
    ///
    /// When there is none, or it cannot be opened.
    pub async fn open_existing(&self) -> Result<Arc<dyn Store>> {
        match self {
            Self::Memory => Err("records in memory are seen by their own process only".into()),
            Self::Sqlite(path) if !path.is_file() => {
                Err(format!("{self}: there is no such database").into())
            }
            Self::Sqlite(_) => self.open().await,
            server => server.connect(false).await,
        }
    }

    #[cfg(feature = "servers")]
    async fn connect(&self, creates: bool) -> Result<Arc<dyn Store>> {
        use idem_runtime::store::{MySqlStore, PostgresStore, RedisStore};

        Ok(match self {
            Self::Postgres(url) => {
                let store = PostgresStore::connect(url.as_str()).await?;
                if creates {
                    store.create_schema().await?;
                }
                Arc::new(store)
            }
            Self::MySql(url) => {
                let store = MySqlStore::connect(url.as_str()).await?;
                if creates {
                    store.create_schema().await?;
                }
                Arc::new(store)
            }
            Self::Redis(url) => Arc::new(RedisStore::connect(url.as_str()).await?),
            Self::RedisCluster(nodes) => {
                Arc::new(RedisStore::cluster(nodes.iter().map(Url::as_str)).await?)
            }
            Self::Memory | Self::Sqlite(_) => return Err(format!("{self} is no server").into()),
        })
    }

    #[cfg(not(feature = "servers"))]
    async fn connect(&self, _creates: bool) -> Result<Arc<dyn Store>> {
        Err(NoStore::WithoutServers.into())
    }
}

/// Why a text names no store. It does not repeat the text, which may have a password in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoStore {
    /// It begins like none.
    #[error(
        "expected `memory`, `sqlite:PATH`, `postgres://…`, `mysql://…`, `redis://…` or \
         `redis-cluster://HOST:PORT,HOST:PORT…`"
    )]
    Unknown,
    /// It begins like a server's, and is no URL.
    #[error("it is no URL: {0}")]
    NotAUrl(String),
    /// It is a server's, and the program knows none.
    #[error(
        "this program was built without the stores of servers: say `cargo run -p examples \
         --features servers`"
    )]
    WithoutServers,
}

impl FromStr for StoreChoice {
    type Err = NoStore;

    fn from_str(text: &str) -> Result<Self, NoStore> {
        match text.split_once(':') {
            None if text == "memory" => return Ok(Self::Memory),
            Some(("sqlite", path)) if !path.is_empty() => return Ok(Self::Sqlite(path.into())),
            _ => {}
        }
        let (scheme, rest) = text.split_once("://").ok_or(NoStore::Unknown)?;
        let server = match scheme {
            "postgres" | "postgresql" => Self::Postgres(url(text)?),
            "mysql" | "mariadb" => Self::MySql(url(text)?),
            "redis" | "rediss" => Self::Redis(url(text)?),
            "redis-cluster" => {
                let (account, nodes) = match rest.rsplit_once('@') {
                    Some((account, nodes)) => (format!("{account}@"), nodes),
                    None => (String::new(), rest),
                };
                let nodes = nodes.split(',').map(|node| url(&format!("redis://{account}{node}")));
                Self::RedisCluster(nodes.collect::<Result<_, _>>()?)
            }
            _ => return Err(NoStore::Unknown),
        };
        if cfg!(feature = "servers") { Ok(server) } else { Err(NoStore::WithoutServers) }
    }
}

fn url(text: &str) -> Result<Url, NoStore> {
    let url = Url::parse(text).map_err(|error| NoStore::NotAUrl(error.to_string()))?;
    match url.host_str() {
        Some(host) if !host.is_empty() => Ok(url),
        _ => Err(NoStore::NotAUrl("it names no host".to_owned())),
    }
}

impl fmt::Display for StoreChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => f.write_str("memory"),
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Postgres(url) | Self::MySql(url) | Self::Redis(url) => {
                write!(f, "{}://{}{}", url.scheme(), address(url), url.path())
            }
            Self::RedisCluster(nodes) => {
                let nodes: Vec<_> = nodes.iter().map(address).collect();
                write!(f, "redis-cluster://{}", nodes.join(","))
            }
        }
    }
}

/// What a URL says of where, and nothing of who; a password can be in its query, too.
fn address(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

impl fmt::Debug for StoreChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreChoice({self})")
    }
}

/// Reads it from the command line. Clap's own way would repeat what it cannot read.
#[derive(Clone, Debug)]
pub struct StoreParser;

impl ValueParserFactory for StoreChoice {
    type Parser = StoreParser;

    fn value_parser() -> StoreParser {
        StoreParser
    }
}

impl TypedValueParser for StoreParser {
    type Value = StoreChoice;

    fn parse_ref(
        &self,
        command: &Command,
        _: Option<&Arg>,
        value: &OsStr,
    ) -> Result<StoreChoice, clap::Error> {
        let choice = value.to_str().ok_or(NoStore::Unknown).and_then(str::parse);
        choice.map_err(|error| {
            let message = format!("invalid value for '--store <STORE>': {error}\n");
            clap::Error::raw(ErrorKind::ValueValidation, message).with_cmd(command)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_asked_for_by_name() {
        assert_eq!("memory".parse(), Ok(StoreChoice::Memory));
        assert_eq!("sqlite:/a:b.db".parse(), Ok(StoreChoice::Sqlite("/a:b.db".into())));
        for wrong in ["", "sqlite", "sqlite:", "memory:", "postgres:x", "oracle://host/db"] {
            assert_eq!(StoreChoice::from_str(wrong), Err(NoStore::Unknown), "{wrong}");
        }
    }

    #[test]
    fn a_server_is_asked_for_by_its_url_and_its_password_is_not_told() {
        for (text, shown) in [
            ("postgres://app:s3cret@db:5433/shop?password=s3cret", "postgres://db:5433/shop"),
            ("mysql://app:s3cret@127.0.0.1/shop", "mysql://127.0.0.1/shop"),
            ("redis://:s3cret@[::1]:6380/3", "redis://[::1]:6380/3"),
            ("redis-cluster://app:s3c@ret@a:7000,b:7001", "redis-cluster://a:7000,b:7001"),
        ] {
            let choice = StoreChoice::from_str(text);
            if !cfg!(feature = "servers") {
                assert_eq!(choice, Err(NoStore::WithoutServers));
                continue;
            }
            let choice = choice.unwrap();
            assert_eq!(choice.to_string(), shown);
            assert!(!format!("{choice:?}").contains("s3c"), "{choice:?}");
        }
    }

    #[test]
    fn every_node_of_a_cluster_has_the_account() {
        let nodes = StoreChoice::from_str("redis-cluster://app:pass@a:7000,b:7001");
        let expected = ["redis://app:pass@a:7000", "redis://app:pass@b:7001"];
        let expected = expected.map(|node| Url::parse(node).unwrap());
        match nodes {
            Ok(choice) => assert_eq!(choice, StoreChoice::RedisCluster(expected.into())),
            Err(error) => assert_eq!(error, NoStore::WithoutServers),
        }
    }

    #[test]
    fn what_is_wrong_with_a_url_is_said_without_it() {
        for wrong in [
            "postgres://app:s3cret@db:port/shop",
            "mysql://",
            "redis://:s3cret@host:99999",
            "redis-cluster://:s3cret@a:7000,",
        ] {
            let error = StoreChoice::from_str(wrong).unwrap_err();
            assert!(matches!(error, NoStore::NotAUrl(_)), "{wrong}: {error}");
            assert!(!error.to_string().contains("s3cret"), "{error}");
        }
    }
}
