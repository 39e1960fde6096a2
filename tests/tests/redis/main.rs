//! The Redis store on real servers, alone and as a cluster: its laws, and what it does when a
//! server goes wrong.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod connecting;
mod failures;
mod messages;
mod model;
mod records;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use idem_runtime::{
    FORMAT, Fingerprint, Flags, Key, OnUnknown, OperationId, ScopeDigest, Token, Ttl,
    store::{Claim, Completion, RedisStore, RedisStoreBuilder, Store},
    testing::StoreFixture,
};
use redis::{Client, Cmd, Commands as _};
use tests::servers::redis::{Cluster, Redis};

const LEASE: Duration = Duration::from_secs(30);
const TTL: Duration = Duration::from_secs(3600);
/// Beyond this a test has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// Two handles to records of their own, on servers that other fixtures use too.
struct Fixture {
    store: RedisStore,
    second: RedisStore,
    prefix: String,
    masters: Vec<String>,
}

/// Brings all instants of a record forward, but for those that never come. Redis's own expiry
/// stays, so that what is over is still there to be judged, refused and swept. Where a record has
/// spans, which count from its expiry, that is brought forward too, or if it would then be near the
/// spans become instants.
const SHIFT: &str = "
    local value = redis.call('GET', KEYS[1])
    local function shift(at, by)
        local instant = struct.unpack('>I8', value, at)
        if instant < 9007199254740991 then
            instant = math.max(instant - by, 0)
            value = value:sub(1, at - 1) .. struct.pack('>I8', instant) .. value:sub(at + 8)
        end
    end
    local state = value:byte(3)
    local expiry, now = redis.call('PEXPIRETIME', KEYS[1]), redis.call('TIME')
    local is_brought_forward = state >= 4 and expiry - ARGV[1] > now[1] * 1000 + 60000
    if state >= 4 and not is_brought_forward then
        local since = expiry - struct.unpack('>I8', value, 26)
        local created = since - struct.unpack('>I8', value, 34)
        value = value:sub(1, 2) .. string.char(state - 4) .. value:sub(4, 33)
            .. struct.pack('>I8', created) .. value:sub(42)
        for at = 10, 26, 8 do shift(at, -since) end
    end
    if value:byte(3) < 4 then
        for at = 10, 34, 8 do shift(at, ARGV[1]) end
    end
    redis.call('SET', KEYS[1], value, 'KEEPTTL')
    if is_brought_forward then redis.call('PEXPIREAT', KEYS[1], expiry - ARGV[1]) end";

fn own() -> (RedisStoreBuilder, String) {
    let prefix = format!("test-{:016x}:", rand::random::<u64>());
    (RedisStore::builder().prefix(&prefix), prefix)
}

impl Fixture {
    async fn single() -> Self {
        let url = Redis::shared().url();
        let (builder, prefix) = own();
        let store = builder.connect(url).await.expect("a connection");
        let builder = RedisStore::builder().prefix(&prefix);
        let second = builder.connect(url).await.expect("a connection");
        Self { store, second, prefix, masters: vec![url.to_owned()] }
    }

    async fn cluster() -> Self {
        let cluster = Cluster::shared();
        let (builder, prefix) = own();
        let store = builder.cluster(cluster.urls()).await.expect("a connection");
        let builder = RedisStore::builder().prefix(&prefix);
        // Of one node the others are found.
        let second = builder.cluster(cluster.urls().into_iter().take(1)).await;
        let second = second.expect("a connection");
        Self { store, second, prefix, masters: cluster.masters() }
    }

    fn shift(&self, by: Duration) -> redis::RedisResult<()> {
        for master in &self.masters {
            let mut connection = Client::open(master.as_str())?.get_connection()?;
            let pattern = format!("{}{}", self.prefix, "?".repeat(64));
            let keys: Vec<Vec<u8>> = connection.scan_match(pattern)?.collect::<Result<_, _>>()?;
            for key in keys {
                let mut shift = Cmd::new();
                shift.arg("EVAL").arg(SHIFT).arg(1).arg(key).arg(by.as_millis().to_string());
                shift.exec(&mut connection)?;
            }
        }
        Ok(())
    }
}

impl StoreFixture for Fixture {
    fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.store.clone())
    }

    fn second(&self) -> Arc<dyn Store> {
        Arc::new(self.second.clone())
    }

    fn advance(&self, by: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async move { self.shift(by).expect("records that can be brought forward") })
    }
}

mod single {
    use super::Fixture;

    idem_runtime::store_laws!(Fixture::single().await);
    idem_runtime::manage_laws!(Fixture::single().await);
}

mod cluster {
    use super::Fixture;

    idem_runtime::store_laws!(Fixture::cluster().await);
    idem_runtime::manage_laws!(Fixture::cluster().await);
}

fn claim_on(key: Key) -> Claim {
    Claim {
        key,
        scope: ScopeDigest::from_bytes([1; 32]),
        operation: Arc::from("POST /payments"),
        operation_id: OperationId::random(),
        fingerprint: Fingerprint { scheme: "test/1".into(), digest: [2; 32] },
        token: Token::random(),
        lease: LEASE,
        ttl: Ttl::For(TTL),
        issued_only: false,
        on_unknown: OnUnknown::Rerun,
        format: FORMAT,
    }
}

fn any_claim() -> Claim {
    claim_on(Key::from_bytes(rand::random()))
}

fn answer_of(claim: &Claim, payload: &'static [u8]) -> Completion {
    Completion {
        key: claim.key,
        token: claim.token,
        ttl: claim.ttl,
        flags: Flags::NONE,
        payload: payload.into(),
        format: FORMAT,
    }
}

/// The name of a record's key.
fn name(prefix: &str, key: &Key) -> String {
    let digits = key.as_bytes().iter().map(|byte| format!("{byte:02x}"));
    std::iter::once(prefix.to_owned()).chain(digits).collect()
}

/// Asks until there is an answer.
async fn until_answered<T, E: std::fmt::Debug>(mut ask: impl AsyncFnMut() -> Result<T, E>) -> T {
    let start = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) if start.elapsed() > PATIENCE => panic!("no answer in time: {error:?}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}
