//! Who is compared: idem's stores, and what one would write by hand on the same databases.

use std::{error::Error, sync::Arc, time::Duration};

use bench::{
    databases::{Kind, mariadb_pool, postgres_pool},
    order::{Order, REQUEST},
};
use futures_util::future::BoxFuture;
use idem_runtime::{
    Fingerprint, Flags, Key, OnUnknown, OperationId, RecordedResponse, ScopeDigest, State, Token,
    Ttl,
    store::{
        Claim, Claimed, Completion, MemoryStore, MySqlStore, PostgresStore, RedisStore,
        SqliteStore, Store, Written,
    },
};

use crate::by_hand;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What is done to keys. Each says whether it came to what it should.
pub(crate) trait Subject: Send + Sync {
    /// Claims a fresh key and records its answer.
    fn first(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>>;

    /// Claims a key whose answer is recorded, and gets that.
    fn replay(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>>;

    /// Claims a fresh key, and no more.
    fn hold(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>>;

    /// Claims a key that is claimed, and is told so.
    fn refuse(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>>;
}

/// A subject, once it can be asked.
type Made = BoxFuture<'static, Result<Arc<dyn Subject>>>;

pub(crate) struct Contender {
    pub(crate) name: &'static str,
    /// What it is compared with.
    pub(crate) by_hand: Option<&'static str>,
    /// What it needs.
    pub(crate) database: Option<Kind>,
    /// Makes it, over an empty database of this URL or files in this directory.
    pub(crate) make: fn(String) -> Made,
}

const STORE: Contender = Contender {
    name: "memory",
    by_hand: None,
    database: None,
    make: |place| idem("memory", place),
};

pub(crate) const CONTENDERS: &[Contender] = &[
    STORE,
    Contender { name: "sqlite by hand", make: |place| Box::pin(by_hand::sqlite(place)), ..STORE },
    Contender {
        name: "sqlite",
        by_hand: Some("sqlite by hand"),
        make: |place| idem("sqlite", place),
        ..STORE
    },
    Contender {
        name: "redis by hand",
        database: Some(Kind::Redis),
        make: |place| Box::pin(by_hand::redis(place)),
        ..STORE
    },
    Contender {
        name: "redis",
        by_hand: Some("redis by hand"),
        database: Some(Kind::Redis),
        make: |place| idem("redis", place),
    },
    Contender {
        name: "mariadb by hand",
        database: Some(Kind::MariaDb),
        make: |place| Box::pin(by_hand::mariadb(place)),
        ..STORE
    },
    Contender {
        name: "mariadb",
        by_hand: Some("mariadb by hand"),
        database: Some(Kind::MariaDb),
        make: |place| idem("mariadb", place),
    },
    Contender {
        name: "postgres by hand",
        database: Some(Kind::Postgres),
        make: |place| Box::pin(by_hand::postgres(place)),
        ..STORE
    },
    Contender {
        name: "postgres",
        by_hand: Some("postgres by hand"),
        database: Some(Kind::Postgres),
        make: |place| idem("postgres", place),
    },
];

/// For how long records are kept, and claims held.
pub(crate) const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const LEASE: Duration = Duration::from_secs(30);

/// A response of the handlers that are measured over HTTP.
pub(crate) fn response() -> Vec<u8> {
    let order: serde_json::Result<Order> = serde_json::from_str(REQUEST);
    let receipt = order.and_then(|order| serde_json::to_vec(&order.take(1)));
    receipt.unwrap_or_default()
}

/// A store of idem's, by name.
pub(crate) async fn open(name: &str, place: &str) -> Result<Arc<dyn Store>> {
    Ok(match name {
        "memory" => {
            let memory = MemoryStore::builder().max_records(usize::MAX).max_bytes(usize::MAX);
            Arc::new(memory.build())
        }
        "sqlite" => Arc::new(SqliteStore::open(format!("{place}/records.db")).await?),
        "redis" => Arc::new(RedisStore::connect(place).await?),
        "mariadb" => {
            let store = MySqlStore::new(mariadb_pool(place));
            store.create_schema().await?;
            Arc::new(store)
        }
        "postgres" => {
            let store = PostgresStore::new(postgres_pool(place));
            store.create_schema().await?;
            Arc::new(store)
        }
        other => return Err(format!("no store {other}").into()),
    })
}

fn idem(name: &'static str, place: String) -> Made {
    Box::pin(async move {
        let subject: Arc<dyn Subject> = Arc::new(Idem::new(open(name, &place).await?, DAY));
        Ok(subject)
    })
}

/// A store of idem's, asked as the engine asks it.
pub(crate) struct Idem {
    pub(crate) store: Arc<dyn Store>,
    ttl: Ttl,
    operation: Arc<str>,
    payload: axum::body::Bytes,
}

impl Idem {
    pub(crate) fn new(store: Arc<dyn Store>, ttl: Duration) -> Self {
        let headers: [(&[u8], &[u8]); 1] = [(b"content-type", b"application/json")];
        let payload = RecordedResponse::encode(201, &headers, &response());
        Self { store, ttl: Ttl::For(ttl), operation: "POST /orders".into(), payload }
    }

    fn claim(&self, key: [u8; 32]) -> Claim {
        Claim {
            key: Key::from_bytes(key),
            scope: ScopeDigest::from_bytes([4; 32]),
            operation: Arc::clone(&self.operation),
            operation_id: OperationId::random(),
            fingerprint: Fingerprint { scheme: "request/1".into(), digest: key },
            token: Token::random(),
            lease: LEASE,
            ttl: self.ttl,
            issued_only: false,
            on_unknown: OnUnknown::Rerun,
            format: 1,
        }
    }
}

impl Subject for Idem {
    fn first(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            let claim = self.claim(key);
            let claimed = self.store.claim(&claim).await?;
            let completion = Completion {
                key: claim.key,
                token: claim.token,
                ttl: claim.ttl,
                flags: Flags::default(),
                payload: self.payload.clone(),
                format: claim.format,
            };
            let written = self.store.complete(&completion).await?;
            Ok(matches!(claimed, Claimed::Granted(_)) && matches!(written, Written::Done))
        })
    }

    fn replay(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            let Claimed::Found(record) = self.store.claim(&self.claim(key)).await? else {
                return Ok(false);
            };
            Ok(record.state == State::Completed && record.payload == self.payload)
        })
    }

    fn hold(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            let claimed = self.store.claim(&self.claim(key)).await?;
            Ok(matches!(claimed, Claimed::Granted(_)))
        })
    }

    fn refuse(&self, key: [u8; 32]) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async move {
            let claimed = self.store.claim(&self.claim(key)).await?;
            Ok(matches!(claimed, Claimed::Found(record) if record.state == State::Running))
        })
    }
}
