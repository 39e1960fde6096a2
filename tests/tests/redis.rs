//! The Redis store on real servers, alone and as a cluster: its laws, and what it does when a
//! server goes wrong.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{
    StreamExt as _,
    future::{BoxFuture, join_all},
};
use idem_runtime::{
    FORMAT, Fingerprint, Flags, Key, OnUnknown, OperationId, Record, ScopeDigest, State, Token,
    Ttl,
    store::{
        Checkpoint, Claim, Claimed, Clock, Completion, Issue, MemoryStore, RedisStore,
        RedisStoreBuilder, Renewal, Signal, Store, StoreError, StoreErrorKind, Written,
    },
    testing::StoreFixture,
};
use rand::{RngExt as _, SeedableRng as _};
use redis::{Client, Cmd, Commands as _, cluster::ClusterClient};
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
/// stays, so that what is over is still there to be judged, refused and swept.
const SHIFT: &str = "
    local value = redis.call('GET', KEYS[1])
    for at = 10, 34, 8 do
        local instant = struct.unpack('>I8', value, at)
        if instant < 9007199254740991 then
            instant = math.max(instant - ARGV[1], 0)
            value = value:sub(1, at - 1) .. struct.pack('>I8', instant) .. value:sub(at + 8)
        end
    end
    redis.call('SET', KEYS[1], value, 'KEEPTTL')";

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

/// What the server says is left of a key's time.
fn expiry(connection: &mut redis::Connection, name: &str) -> i64 {
    Cmd::new().arg("PTTL").arg(name).query(connection).expect("an answer")
}

#[tokio::test]
async fn redis_removes_what_is_over_by_itself() {
    let server = Redis::shared();
    let (builder, prefix) = own();
    let store = builder.connect(server.url()).await.expect("a connection");
    let mut connection = Client::open(server.url()).expect("a URL").get_connection().expect("it");
    let mut is_near = |claim: &Claim, expected: Duration, after: &str| {
        let left = expiry(&mut connection, &name(&prefix, &claim.key));
        let left = Duration::from_millis(left.try_into().expect("an expiry"));
        let slack = Duration::from_secs(10);
        assert!(left <= expected && left + slack > expected, "{after}: {left:?}");
    };

    let claim = any_claim();
    store.claim(&claim).await.expect("an answer");
    is_near(&claim, TTL, "a claim");
    let long = Renewal { key: claim.key, token: claim.token, lease: 2 * TTL };
    assert_eq!(store.renew(&[long]).await.expect("an answer"), [true]);
    is_near(&claim, 2 * TTL, "a lease that is longer than the time to live");
    let answer = Completion { ttl: Ttl::For(TTL / 2), ..answer_of(&claim, b"answer") };
    assert_eq!(store.complete(&answer).await.expect("an answer"), Written::Done);
    is_near(&claim, TTL / 2, "an answer");

    let brief = any_claim();
    store.claim(&brief).await.expect("an answer");
    let answer = Completion { ttl: Ttl::For(Duration::from_millis(50)), ..answer_of(&brief, b"") };
    assert_eq!(store.complete(&answer).await.expect("an answer"), Written::Done);
    let endless = Claim { ttl: Ttl::Forever, ..any_claim() };
    store.claim(&endless).await.expect("an answer");
    let left = expiry(&mut connection, &name(&prefix, &endless.key));
    assert_eq!(left, -1, "what is for ever does not expire");
    let answer = Completion { ttl: Ttl::For(TTL), ..answer_of(&endless, b"") };
    assert_eq!(store.complete(&answer).await.expect("an answer"), Written::Done);
    assert!(expiry(&mut connection, &name(&prefix, &endless.key)) > 0, "an answer has an end");

    tokio::time::sleep(Duration::from_millis(60)).await;
    let left = expiry(&mut connection, &name(&prefix, &brief.key));
    assert_eq!(left, -2, "what is over is no longer there");
    assert!(
        matches!(store.claim(&brief).await, Ok(Claimed::Granted(record)) if record.attempt == 1)
    );
}

#[tokio::test]
async fn a_losing_claim_writes_nothing() {
    let server = Redis::start_own();
    let store = RedisStore::connect(server.url()).await.expect("a connection");
    let claim = any_claim();
    store.claim(&claim).await.expect("an answer");
    let wrote = || {
        let info: String = server.ask(&["INFO", "replication"]).expect("an answer");
        let offset = info.lines().find_map(|line| line.strip_prefix("master_repl_offset:"));
        let changes: String = server.ask(&["INFO", "persistence"]).expect("an answer");
        let size = changes.lines().find_map(|line| line.strip_prefix("aof_current_size:"));
        (offset.map(str::to_owned), size.expect("a size").to_owned())
    };
    // The note by which the operation is found is written behind the claim's back.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let before = wrote();
    for _ in 0..100 {
        let other = store.claim(&claim_on(claim.key)).await.expect("an answer");
        assert!(matches!(other, Claimed::Found(record) if record.token == claim.token));
    }
    let stale = Completion { token: Token::random(), ..answer_of(&claim, b"stale") };
    assert!(matches!(store.complete(&stale).await, Ok(Written::Fenced(_))));
    assert_eq!(wrote(), before);
}

#[tokio::test]
async fn a_server_that_has_forgotten_the_script_is_taught_again() {
    for cluster in [false, true] {
        let (builder, _) = own();
        let (store, nodes) = if cluster {
            let cluster = Cluster::shared();
            let store = builder.cluster(cluster.urls()).await;
            (store, cluster.masters())
        } else {
            let server = Redis::shared();
            (builder.connect(server.url()).await, vec![server.url().to_owned()])
        };
        let store = store.expect("a connection");
        for _ in 0..5 {
            for node in &nodes {
                let mut connection = Client::open(node.as_str()).expect("a URL");
                Cmd::new().arg("SCRIPT").arg("FLUSH").exec(&mut connection).expect("an answer");
            }
            let claims: Vec<_> = (0..20).map(|_| any_claim()).collect();
            let granted = join_all(claims.iter().map(|claim| store.claim(claim))).await;
            assert!(granted.iter().all(|granted| matches!(granted, Ok(Claimed::Granted(_)))));
            let answers: Vec<_> = claims.iter().map(|claim| answer_of(claim, b"answer")).collect();
            let done = join_all(answers.iter().map(|answer| store.complete(answer))).await;
            assert!(done.iter().all(|done| matches!(done, Ok(Written::Done))), "{done:?}");
        }
    }
}

#[tokio::test]
async fn servers_that_drop_records_are_refused_unless_that_is_known() {
    let server = Redis::start_own_with("--maxmemory-policy allkeys-lru");
    let refused = RedisStore::connect(server.url()).await.expect_err("it drops records");
    assert_eq!(refused.kind(), StoreErrorKind::Refused);
    let reason = std::error::Error::source(&refused).expect("a reason").to_string();
    assert!(reason.contains("`allkeys-lru`") && reason.contains("`allow_eviction`"), "{reason}");
    let known = RedisStore::builder().allow_eviction().connect(server.url()).await;
    known.expect("it is known");

    // Who may not ask cannot tell.
    let rules =
        ["ACL", "SETUSER", "idem", "on", ">secret", "~*", "&*", "+@all", "-info", "-config"];
    server.ask::<()>(&rules).expect("a user");
    let url = server.url().replace("redis://", "redis://idem:secret@");
    let refused = RedisStore::connect(url.as_str()).await.expect_err("it does not say");
    assert_eq!(refused.kind(), StoreErrorKind::Refused);
    let reason = std::error::Error::source(&refused).expect("a reason").to_string();
    assert!(reason.contains("`INFO`") && reason.contains("`allow_eviction`"), "{reason}");
    let known = RedisStore::builder().allow_eviction().connect(url.as_str()).await;
    let store = known.expect("it is known");
    assert!(matches!(store.claim(&any_claim()).await, Ok(Claimed::Granted(_))));

    let url = server.url().replace("redis://", "redis://idem:wrong@");
    let refused = RedisStore::connect(url.as_str()).await.expect_err("a wrong password");
    assert_eq!(refused.kind(), StoreErrorKind::Refused);

    let node = Cluster::shared().urls().remove(0);
    let refused = RedisStore::connect(node.as_str()).await.expect_err("it is one of several");
    assert_eq!(refused.kind(), StoreErrorKind::Refused);
    let reason = std::error::Error::source(&refused).expect("a reason").to_string();
    assert!(reason.contains("RedisStore::cluster"), "{reason}");
}

#[tokio::test]
async fn a_full_server_takes_no_new_claims_and_still_takes_answers() {
    let server = Redis::start_own_with("--maxmemory 8mb --maxmemory-policy noeviction");
    let store = RedisStore::connect(server.url()).await.expect("a connection");
    let [held, given_up, done] = [any_claim(), any_claim(), any_claim()];
    for claim in [&held, &given_up, &done] {
        assert!(matches!(store.claim(claim).await, Ok(Claimed::Granted(_))));
    }
    assert_eq!(store.complete(&answer_of(&done, b"done")).await.expect("room"), Written::Done);
    let filler = "x".repeat(100_000);
    let filled =
        (0..1_000).find(|n| server.ask::<()>(&["SET", &format!("filler-{n}"), &filler]).is_err());
    filled.expect("a bound");
    // What is left is less than that.
    let full = async {
        loop {
            if let Err(full) = store.claim(&any_claim()).await {
                return full;
            }
        }
    };
    let full = tokio::time::timeout(PATIENCE, full).await.expect("a bound");
    assert_eq!(full.kind(), StoreErrorKind::Full);
    let replayed = store.claim(&claim_on(done.key)).await.expect("an answer that takes no room");
    assert!(matches!(replayed, Claimed::Found(record) if record.payload == &b"done"[..]));

    let renewal = Renewal { key: held.key, token: held.token, lease: LEASE };
    assert_eq!(store.renew(&[renewal]).await.expect("a lease"), [true]);
    let mark = Checkpoint {
        key: held.key,
        token: held.token,
        payload: vec![b'm'; 10_000].into(),
        format: FORMAT,
    };
    assert_eq!(store.checkpoint(&mark).await.expect("a checkpoint"), Written::Done);
    let answer = Completion { payload: vec![b'a'; 10_000].into(), ..answer_of(&held, b"") };
    assert_eq!(store.complete(&answer).await.expect("an answer"), Written::Done);
    let released = store.release(&given_up.key, &given_up.token).await;
    assert_eq!(released.expect("an answer"), Written::Done);
}

#[tokio::test]
async fn what_is_no_record_is_refused_and_kept() {
    let server = Redis::shared();
    let (builder, prefix) = own();
    let store = builder.connect(server.url()).await.expect("a connection");
    let mut connection = Client::open(server.url()).expect("a URL").get_connection().expect("it");
    let sound = any_claim();
    store.claim(&sound).await.expect("an answer");
    let record: Vec<u8> = connection.get(name(&prefix, &sound.key)).expect("a record");
    let damage = |at: usize, byte: u8| {
        let mut record = record.clone();
        record[at] = byte;
        record
    };
    let damaged = [
        (vec![], StoreErrorKind::Corrupt),
        (b"\0\x01".to_vec(), StoreErrorKind::Corrupt),
        (record[..152].to_vec(), StoreErrorKind::Corrupt),
        (damage(1, 0), StoreErrorKind::Corrupt),
        (damage(2, 4), StoreErrorKind::Corrupt),
        (damage(145, 1), StoreErrorKind::Corrupt),
        (damage(17, 1), StoreErrorKind::Corrupt),
        (damage(0, 1), StoreErrorKind::Newer),
        (b"\xff\xff whatever comes".to_vec(), StoreErrorKind::Newer),
    ];
    for (bytes, kind) in damaged {
        let claim = any_claim();
        let name = name(&prefix, &claim.key);
        let _: () = connection.set(&name, &bytes).expect("an answer");
        let kinds = [
            store.claim(&claim).await.expect_err("no record").kind(),
            store.read(&claim.key).await.expect_err("no record").kind(),
            store.complete(&answer_of(&claim, b"")).await.expect_err("no record").kind(),
            store.forget(&claim.key, &claim.token).await.expect_err("no record").kind(),
        ];
        assert_eq!(kinds, [kind; 4], "{bytes:?}");
        let kept: Vec<u8> = connection.get(&name).expect("an answer");
        assert_eq!(kept, bytes, "what cannot be read is not touched");
    }
    let claim = any_claim();
    let _: () = connection.lpush(name(&prefix, &claim.key), "a list").expect("an answer");
    let refused = store.claim(&claim).await.expect_err("a list is no record");
    assert_eq!(refused.kind(), StoreErrorKind::Corrupt);
}

#[tokio::test]
async fn a_checkpoint_that_comes_late_does_not_replace_a_later_one() {
    let server = Redis::shared();
    let (builder, prefix) = own();
    let store = builder.connect(server.url()).await.expect("a connection");
    let claim = any_claim();
    store.claim(&claim).await.expect("an answer");
    let checkpoint = |payload: &'static [u8]| Checkpoint {
        key: claim.key,
        token: claim.token,
        payload: payload.into(),
        format: FORMAT,
    };
    let [early, later] = [checkpoint(b"early"), checkpoint(b"later")];
    // Called in this order, and arriving in the other one.
    let overtaken = store.checkpoint(&early);
    assert_eq!(store.checkpoint(&later).await.expect("an answer"), Written::Done);
    assert_eq!(overtaken.await.expect("an answer"), Written::Done);
    let record = store.read(&claim.key).await.expect("an answer").expect("a record");
    assert_eq!(record.payload, later.payload);
    assert!(!prefix.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn connections_killed_in_mid_claim_make_nobody_its_own_duplicate() {
    let server = Redis::start_own();
    let store = RedisStore::connect(server.url()).await.expect("a connection");
    let killer = std::thread::spawn({
        let client = Client::open(server.url()).expect("a URL");
        move || {
            let mut connection = client.get_connection().expect("a connection");
            let mut killed = 0;
            for _ in 0..100 {
                let kill = ["KILL", "TYPE", "normal", "SKIPME", "yes"];
                killed +=
                    Cmd::new().arg("CLIENT").arg(&kill).query::<u32>(&mut connection).expect("it");
                std::thread::sleep(Duration::from_millis(20));
            }
            killed
        }
    });
    let mut retried = 0;
    while !killer.is_finished() {
        let claims: Vec<_> = (0..50).map(|_| any_claim()).collect();
        for (asked, record) in join_all(claims.iter().map(async |claim| {
            let mut asked = 0;
            let claimed = until_answered(async || {
                asked += 1;
                store.claim(claim).await
            });
            match claimed.await {
                Claimed::Granted(record) => (asked, record),
                claimed => panic!("nobody else has claimed this key: {claimed:?}"),
            }
        }))
        .await
        {
            assert_eq!(record.attempt, 1, "one claim is one attempt");
            retried += asked - 1;
        }
        let answers: Vec<_> = claims.iter().map(|claim| answer_of(claim, b"answer")).collect();
        join_all(answers.iter().map(async |answer| {
            let done = until_answered(async || store.complete(answer).await).await;
            assert_eq!(done, Written::Done);
        }))
        .await;
    }
    let killed = killer.join().expect("a killer");
    assert!(killed > 10 && retried > 0, "{killed} connections killed, {retried} claims retried");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_is_paused_killed_and_restarted_is_used_again() {
    let server = Redis::start_own();
    let builder = RedisStore::builder().timeout(Duration::from_millis(200));
    let store = builder.connect(server.url()).await.expect("a connection");
    let claim = any_claim();
    assert!(matches!(store.claim(&claim).await, Ok(Claimed::Granted(_))));

    server.pause();
    let start = Instant::now();
    let late = store.claim(&any_claim()).await.expect_err("nobody answers");
    assert_eq!(late.kind(), StoreErrorKind::TimedOut);
    assert!(start.elapsed() < Duration::from_secs(3), "a call is bounded: {:?}", start.elapsed());
    server.resume();
    let record = until_answered(async || store.read(&claim.key).await).await;
    assert_eq!(record.expect("a record").token, claim.token);

    let answer = answer_of(&claim, b"answer");
    assert_eq!(store.complete(&answer).await.expect("an answer"), Written::Done);
    server.kill();
    let start = Instant::now();
    let unreached = store.claim(&any_claim()).await.expect_err("nobody listens");
    assert!(unreached.kind().is_transient(), "{unreached:?}");
    assert!(start.elapsed() < Duration::from_secs(3), "a call is bounded: {:?}", start.elapsed());
    server.restart();
    let replayed = until_answered(async || store.claim(&claim_on(claim.key)).await).await;
    assert!(matches!(replayed, Claimed::Found(record) if record.payload == answer.payload));
    assert!(matches!(store.claim(&any_claim()).await, Ok(Claimed::Granted(_))));
}

#[tokio::test]
async fn a_master_that_became_a_replica_is_looked_up_again() {
    let server = Redis::start_own();
    let store = RedisStore::connect(server.url()).await.expect("a connection");
    let connections = || {
        let info: String = server.ask(&["INFO", "stats"]).expect("an answer");
        let count = info.lines().find_map(|line| line.strip_prefix("total_connections_received:"));
        count.and_then(|count| count.parse::<u32>().ok()).expect("a number")
    };
    let nobody = tests::servers::free_port().to_string();
    server.ask::<()>(&["REPLICAOF", "127.0.0.1", &nobody]).expect("an answer");
    let before = connections();
    let refused = store.claim(&any_claim()).await.expect_err("replicas take no writes");
    assert_eq!(refused.kind(), StoreErrorKind::Unreachable);
    // Each question makes a connection of its own.
    let mut asked = 0;
    until_answered(async || {
        asked += 1;
        // Who asks again finds the connection closed, and the client makes another one.
        drop(store.claim(&any_claim()).await);
        if connections() > before + asked { Ok(()) } else { Err("no other connection") }
    })
    .await;
    server.ask::<()>(&["REPLICAOF", "NO", "ONE"]).expect("an answer");
    let claimed = until_answered(async || store.claim(&any_claim()).await).await;
    assert!(matches!(claimed, Claimed::Granted(_)));
}

#[tokio::test]
async fn a_user_of_its_own_needs_few_permissions() {
    let permitted = "~idem:* &idem:* +eval +evalsha +time +get +set +del +scan +publish +subscribe \
                     +ping +info";
    let (single, cluster) = (Redis::start_own(), Cluster::shared());
    for nodes in [std::slice::from_ref(&single), cluster.nodes()] {
        let is_cluster = nodes.len() > 1;
        let more = if is_cluster { " +cluster +exists +wait" } else { "" };
        let rules: Vec<_> = permitted.split_whitespace().chain(more.split_whitespace()).collect();
        for node in nodes {
            let user = ["ACL", "SETUSER", "idem", "reset", "on", ">secret"];
            node.ask::<()>(&[&user[..], &rules].concat()).expect("a user");
        }
        let urls = nodes.iter().map(|node| node.url().replace("//", "//idem:secret@"));
        let urls: Vec<_> = urls.collect();
        let store = if is_cluster {
            RedisStore::builder().replicas(1, PATIENCE).cluster(urls).await
        } else {
            RedisStore::connect(urls[0].as_str()).await
        };
        let store = store.expect("a connection");
        let claim = any_claim();
        assert!(matches!(store.claim(&claim).await, Ok(Claimed::Granted(_))));
        assert_eq!(store.complete(&answer_of(&claim, b"")).await.expect("it"), Written::Done);
        let manage = store.manage().expect("a search");
        let found = until_answered(async || manage.find(&claim.operation_id).await).await;
        assert_eq!(found.expect("a record").key, claim.key);
        assert!(manage.find(&OperationId::random()).await.expect("a search").is_none());
        store.sweep(10).await.expect("a sweep");
        let wake = store.wake().expect("messages");
        let mut heard = wake.listen().await.expect("a channel");
        wake.tell(Signal::Ended(claim.key)).await.expect("an answer");
        let message = tokio::time::timeout(PATIENCE, heard.next()).await;
        assert_eq!(message.expect("a message in time"), Some(Signal::Ended(claim.key)));
    }
}

#[tokio::test]
async fn a_server_that_is_not_there_is_said_to_be() {
    let start = Instant::now();
    let url = format!("redis://127.0.0.1:{}/", tests::servers::free_port());
    let unreached = RedisStore::connect(url.as_str()).await.expect_err("nobody listens");
    assert_eq!(unreached.kind(), StoreErrorKind::Unreachable);
    let unreached = RedisStore::cluster([url.as_str()]).await.expect_err("nobody listens");
    assert_eq!(unreached.kind(), StoreErrorKind::Unreachable);
    assert!(start.elapsed() < PATIENCE);
    let refused = RedisStore::connect("http://127.0.0.1/").await.expect_err("no URL of Redis");
    assert_eq!(refused.kind(), StoreErrorKind::Refused);
}

#[tokio::test]
async fn messages_reach_every_process() {
    let single = Redis::shared().url();
    let cluster = Cluster::shared().urls();
    for is_cluster in [false, true] {
        let (_, prefix) = own();
        let connect = async || {
            let builder = RedisStore::builder().prefix(&prefix);
            let store = match is_cluster {
                false => builder.connect(single).await,
                // Each handle listens at another node.
                true => {
                    let mut urls = cluster.clone();
                    urls.rotate_left(rand::random_range(0..cluster.len()));
                    builder.cluster(urls).await
                }
            };
            store.expect("a connection")
        };
        let (here, there, stranger) = (connect().await, connect().await, own().0);
        let stranger = stranger.listen_at(Client::open(single).expect("a URL"));
        let stranger = match is_cluster {
            false => stranger.connect(single).await,
            true => stranger.cluster(cluster.clone()).await,
        };
        let stranger = stranger.expect("a connection");
        let wake = |store: &RedisStore| store.wake().is_some();
        assert!(wake(&here) && wake(&stranger));
        let mut heard = Vec::new();
        for store in [&here, &there] {
            heard.push(store.wake().expect("messages").listen().await.expect("a channel"));
        }
        let mut elsewhere = stranger.wake().expect("messages").listen().await.expect("a channel");
        let key = Key::from_bytes(rand::random());
        for signal in [Signal::Awaited(key), Signal::Ended(key)] {
            there.wake().expect("messages").tell(signal).await.expect("an answer");
            for heard in &mut heard {
                let message = tokio::time::timeout(PATIENCE, heard.next()).await;
                assert_eq!(message.expect("a message in time"), Some(signal));
            }
        }
        let other = tokio::time::timeout(Duration::from_millis(100), elsewhere.next()).await;
        assert!(other.is_err(), "another prefix is another channel");
    }
}

#[tokio::test]
async fn a_listener_hears_of_a_lost_connection() {
    let server = Redis::start_own();
    let store = RedisStore::connect(server.url()).await.expect("a connection");
    let mut heard = store.wake().expect("messages").listen().await.expect("a channel");
    server.kill();
    let end = tokio::time::timeout(PATIENCE, heard.next()).await;
    assert_eq!(end.expect("an end in time"), None);
    assert!(store.wake().expect("messages").listen().await.is_err());
    server.restart();
    until_answered(async || store.wake().expect("messages").listen().await.map(drop)).await;
}

#[tokio::test]
async fn connections_of_the_application_will_do() {
    let server = Redis::shared();
    let client = Client::open(server.url()).expect("a URL");
    let manager = client.get_connection_manager().await.expect("a connection");
    let (builder, prefix) = own();
    let store = builder.over(manager.clone()).await.expect("a server that will do");
    assert!(store.wake().is_none(), "nobody said where to listen");
    let claim = any_claim();
    assert!(matches!(store.claim(&claim).await, Ok(Claimed::Granted(_))));
    let builder = RedisStore::builder().prefix(&prefix).listen_at(client);
    let store = builder.over(manager).await.expect("a server that will do");
    assert!(store.wake().is_some());
    assert!(matches!(store.claim(&claim_on(claim.key)).await, Ok(Claimed::Found(_))));

    let client = ClusterClient::new(Cluster::shared().urls()).expect("URLs");
    let connection = client.get_async_connection().await.expect("a connection");
    let store = own().0.over_cluster(connection).await.expect("a cluster that will do");
    let claims: Vec<_> = (0..50).map(|_| any_claim()).collect();
    let granted = join_all(claims.iter().map(|claim| store.claim(claim))).await;
    assert!(granted.iter().all(|granted| matches!(granted, Ok(Claimed::Granted(_)))));
}

#[tokio::test]
async fn databases_are_separate() {
    let server = Redis::shared();
    let claim = any_claim();
    for database in [0, 3] {
        let url = format!("{}{database}", server.url());
        let store = RedisStore::connect(url.as_str()).await.expect("a connection");
        assert!(matches!(store.claim(&claim).await, Ok(Claimed::Granted(_))), "{database}");
    }
}

#[tokio::test]
async fn a_record_that_is_too_large_is_refused_before_it_is_sent() {
    let server = Redis::start_own_with("--proto-max-bulk-len 1mb");
    let store = RedisStore::connect(server.url()).await.expect("a connection");
    let claim = any_claim();
    store.claim(&claim).await.expect("an answer");
    let answer = Completion { payload: vec![0; 1 << 20].into(), ..answer_of(&claim, b"") };
    let refused = store.complete(&answer).await.expect_err("more than the server takes");
    assert_eq!(refused.kind(), StoreErrorKind::TooLarge);
    let answer = Completion { payload: vec![0; (1 << 20) - 1_000].into(), ..answer };
    assert_eq!(store.complete(&answer).await.expect("an answer"), Written::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_waits_for_replicas_learns_when_they_are_missing() {
    let alone = Redis::shared();
    let (builder, prefix) = own();
    let store = builder.replicas(1, Duration::from_millis(50)).connect(alone.url()).await;
    let store = store.expect("a connection");
    let plain = RedisStore::builder().prefix(&prefix).connect(alone.url()).await;
    let plain = plain.expect("a connection");
    let claim = any_claim();
    let missing = store.claim(&claim).await.expect_err("there are no replicas");
    assert_eq!(missing.kind(), StoreErrorKind::TimedOut);
    let reason = std::error::Error::source(&missing).expect("a reason").to_string();
    assert_eq!(reason, "0 of 1 replicas acknowledged it in time");
    let record = plain.read(&claim.key).await.expect("an answer").expect("a record");
    assert_eq!(
        (record.state, record.token),
        (State::Running, claim.token),
        "it stands all the same"
    );
    let missing = store.complete(&answer_of(&claim, b"answer")).await.expect_err("no replicas");
    assert_eq!(missing.kind(), StoreErrorKind::TimedOut);
    let missing = store.complete(&answer_of(&claim, b"answer")).await.expect_err("still none");
    assert_eq!(missing.kind(), StoreErrorKind::TimedOut, "the same again waits again");
    let found = store.claim(&claim_on(claim.key)).await.expect("nothing that replicas must have");
    assert!(matches!(found, Claimed::Found(record) if record.payload == &b"answer"[..]));
    let given_up = any_claim();
    plain.claim(&given_up).await.expect("an answer");
    let released = store.release(&given_up.key, &given_up.token).await;
    assert_eq!(released.expect("releasing does not wait"), Written::Done);

    let (builder, _) = own();
    let store = builder.replicas(1, PATIENCE).cluster(Cluster::shared().urls()).await;
    let store = store.expect("a connection");
    let claims: Vec<_> = (0..30).map(|_| any_claim()).collect();
    let granted = join_all(claims.iter().map(|claim| store.claim(claim))).await;
    assert!(
        granted.iter().all(|granted| matches!(granted, Ok(Claimed::Granted(_)))),
        "{granted:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_promoted_replica_goes_on_with_what_it_acknowledged() {
    for kill in [true, false] {
        let cluster = Cluster::start_own();
        let builder = RedisStore::builder().timeout(Duration::from_millis(500));
        let store = builder.replicas(1, PATIENCE).cluster(cluster.urls()).await;
        let store = store.expect("a connection");
        let [completed, running] = [any_claim(), any_claim()];
        let running = Claim { lease: Duration::from_millis(100), ..running };
        for claim in [&completed, &running] {
            assert!(matches!(store.claim(claim).await, Ok(Claimed::Granted(_))));
        }
        let answer = answer_of(&completed, b"answer");
        assert_eq!(store.complete(&answer).await.expect("an answer"), Written::Done);

        let name = name("idem:", &completed.key);
        let old = cluster.master_of(&name);
        if kill {
            old.kill()
        } else {
            old.pause()
        }
        cluster.wait_until_promoted(&name, old);
        let start = Instant::now();
        let found = until_answered(async || store.read(&completed.key).await).await;
        println!("killed: {kill}; answered {:?} after the promotion", start.elapsed());
        let found = found.expect("the replica has acknowledged it");
        assert_eq!((found.state, &found.payload), (State::Completed, &answer.payload));
        // The master of these is another one or the one that was promoted.
        let next = claim_on(running.key);
        // The promoted node has no replica left, so that only the master's answer can be had.
        let plain = RedisStore::cluster(cluster.urls()).await.expect("a connection");
        let taken = until_answered(async || plain.claim(&next).await).await;
        assert!(matches!(taken, Claimed::Granted(record) if record.attempt == 2));
        let fresh: Vec<_> = (0..30).map(|_| any_claim()).collect();
        join_all(fresh.iter().map(async |claim| {
            let claimed = until_answered(async || plain.claim(claim).await).await;
            assert!(matches!(claimed, Claimed::Granted(record) if record.attempt == 1));
        }))
        .await;
        if !kill {
            old.resume();
        }
    }
}

/// What a store answered, as text: the records in it without their times, and the times beside it.
fn told<T: std::fmt::Debug>(answer: &T, record: Option<&Record>) -> (String, Option<[Ttl; 4]>) {
    match record {
        None => (format!("{answer:?}"), None),
        Some(record) => {
            let zero = Duration::ZERO;
            let (valid_left, kept_left) = (Ttl::Forever, Ttl::Forever);
            let untimed =
                Record { lease_left: zero, age: zero, valid_left, kept_left, ..record.clone() };
            let times = [
                Ttl::For(record.lease_left),
                record.valid_left,
                record.kept_left,
                Ttl::For(record.age),
            ];
            (format!("{answer:?} {untimed:?} {:?}", record.payload), Some(times))
        }
    }
}

/// Does one thing to a store that is drawn from all that can be done, and says what it answered.
async fn do_anything(store: &dyn Store, draw: &[u8; 8], number: u64) -> (String, Option<[Ttl; 4]>) {
    let pick = |index: usize, count: u8| usize::from(draw[index] % count);
    let key = Key::from_bytes([draw[1] % 2; 32]);
    let token = Token::from_bytes([draw[2] % 3; 16]);
    let spans = [45, 105, 3_615, 14_415].map(Duration::from_secs);
    let ttls = [Ttl::For(spans[0]), Ttl::For(spans[2]), Ttl::Forever];
    let payload = bytes::Bytes::from(number.to_string());
    let format = FORMAT + u16::from(draw[7] % 10 == 0);
    let operation_id = OperationId::from_bytes(u128::from(number).to_be_bytes());
    match pick(0, 9) {
        0..=2 => {
            let schemes = ["test/1", "test/11", "other/1"];
            let claim = Claim {
                operation: Arc::from(format!("operation {number}")),
                operation_id,
                fingerprint: Fingerprint { scheme: schemes[pick(3, 3)].into(), digest: [0; 32] },
                token,
                lease: spans[pick(4, 4).min(pick(5, 4))],
                ttl: ttls[pick(5, 3)],
                issued_only: draw[6] % 4 == 0,
                on_unknown: [OnUnknown::Rerun, OnUnknown::Rerun, OnUnknown::Refuse][pick(6, 3)],
                format,
                ..claim_on(key)
            };
            let answer = store.claim(&claim).await;
            let kind = match &answer {
                Ok(Claimed::Granted(record)) => return told(&"granted", Some(record)),
                Ok(Claimed::Found(record)) => return told(&"found", Some(record)),
                Ok(Claimed::Unknown) => "unknown".to_owned(),
                Err(error) => error.kind().to_string(),
            };
            told(&kind, None)
        }
        3 => {
            let issue = Issue {
                key,
                scope: ScopeDigest::from_bytes([1; 32]),
                operation: Arc::from("issuing"),
                operation_id,
                token,
                valid_for: ttls[pick(4, 3)],
                kept_for: ttls[pick(5, 3)],
                payload,
                format,
            };
            written(store.issue(&issue).await)
        }
        4 => written(store.checkpoint(&Checkpoint { key, token, payload, format }).await),
        5 => {
            let flags = [Flags::NONE, Flags::TOMBSTONE][pick(4, 2)];
            let ttl = ttls[pick(5, 3)];
            written(store.complete(&Completion { key, token, ttl, flags, payload, format }).await)
        }
        6 => written(store.release(&key, &token).await),
        7 => written(store.forget(&key, &token).await),
        _ => {
            let lease = spans[pick(4, 3)];
            let renewal = Renewal { key, token, lease };
            told(&store.renew(&[renewal]).await.map_err(|error| error.kind()), None)
        }
    }
}

fn written(answer: Result<Written, StoreError>) -> (String, Option<[Ttl; 4]>) {
    match answer {
        Ok(Written::Fenced(record)) => told(&"fenced", Some(&record)),
        answer => told(&answer.map_err(|error| error.kind()), None),
    }
}

/// The script says in its own language what the embedded stores say by one piece of code: here both
/// are asked the same, at random, and must answer the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_script_does_what_the_other_stores_do() {
    const RUNS: usize = 60;
    const STEPS: u64 = 60;
    let seed: u64 = std::env::var("IDEM_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(rand::random);
    println!("IDEM_TEST_SEED={seed}");
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let mut outcomes = std::collections::BTreeMap::new();
    for run in 0..RUNS {
        let fixture = Fixture::single().await;
        let clock = Clock::manual();
        let memory = MemoryStore::builder().clock(clock.clone()).build();
        let mut history = Vec::new();
        for step in 0..STEPS {
            // Times in the test are odd multiples of 15 seconds, and what passes is a multiple of
            // 30: nothing is ever just over.
            if random.random_range(0..4) == 0 {
                let passed = Duration::from_secs([30, 60, 1_800][random.random_range(0..3)]);
                history.push(format!("{passed:?} pass"));
                clock.advance(passed);
                fixture.advance(passed).await;
            }
            let draw: [u8; 8] = random.random();
            let (expected, expected_times) = do_anything(&memory, &draw, step).await;
            let (actual, actual_times) = do_anything(&fixture.store, &draw, step).await;
            history.push(format!("{draw:?}: {expected}"));
            let history = || history.join("\n");
            assert_eq!(actual, expected, "run {run}:\n{}", history());
            let pairs =
                actual_times.into_iter().flatten().zip(expected_times.into_iter().flatten());
            for (actual, expected) in pairs {
                let is_near = match (actual, expected) {
                    (Ttl::For(actual), Ttl::For(expected)) => {
                        actual.abs_diff(expected) < Duration::from_secs(10)
                    }
                    (actual, expected) => actual == expected,
                };
                assert!(is_near, "run {run}: {actual:?}, not {expected:?}\n{}", history());
            }
            let kind = expected.split_whitespace().next().unwrap_or_default().to_owned();
            *outcomes.entry(kind).or_insert(0) += 1;
        }
    }
    println!("{outcomes:?}");
    assert!(outcomes.len() > 6, "a test that reaches everything: {outcomes:?}");
}
