//! What is written, and what is refused: single calls on servers that are well.

use std::time::Duration;

use futures_util::future::join_all;
use idem_runtime::{
    FORMAT, OperationId, Token, Ttl,
    store::{
        Checkpoint, Claim, Claimed, Completion, Kind, Listing, Purge, RedisStore, Renewal, Store,
        StoreErrorKind, Written,
    },
};
use redis::{Client, Cmd, Commands as _};
use tests::servers::redis::{Cluster, Redis};

use super::{TTL, answer_of, any_claim, claim_on, name, own};

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
    let at_once = any_claim();
    store.claim(&at_once).await.expect("an answer");
    let answer = Completion { ttl: Ttl::For(Duration::ZERO), ..answer_of(&at_once, b"") };
    assert_eq!(store.complete(&answer).await.expect("an answer"), Written::Done);
    assert_eq!(store.read(&at_once.key).await.expect("an answer"), None);
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

/// The usual way of a request, which is to cost the server no more than it must.
#[tokio::test]
async fn a_first_claim_and_a_replay_call_no_script_and_a_completion_a_short_one() {
    let server = Redis::start_own();
    let store = RedisStore::connect(server.url()).await.expect("a connection");
    let calls = |command: &str| {
        let all: String = server.ask(&["INFO", "commandstats"]).expect("an answer");
        let of = format!("cmdstat_{command}:calls=");
        let calls = all.lines().find_map(|line| line.strip_prefix(&of)?.split(',').next());
        calls.map_or(0, |calls| calls.parse::<u32>().expect("a number"))
    };
    let claim = any_claim();
    let granted = store.claim(&claim).await;
    assert!(matches!(granted, Ok(Claimed::Granted(record)) if record.attempt == 1));
    assert_eq!([calls("evalsha"), calls("eval")], [0, 0]);
    let answer = answer_of(&claim, b"answer");
    assert_eq!(store.complete(&answer).await.expect("an answer"), Written::Done);
    // The server has not known the script before.
    assert_eq!([calls("evalsha"), calls("eval"), calls("getrange")], [1, 1, 1]);
    assert_eq!([calls("time"), calls("get")], [0, 0]);
    let replayed = store.claim(&claim_on(claim.key)).await;
    assert!(matches!(replayed, Ok(Claimed::Found(record)) if record.payload == answer.payload));
    assert_eq!([calls("evalsha"), calls("eval"), calls("pttl")], [1, 1, 1]);

    // What is no longer as its first claim made it.
    let renewed = any_claim();
    store.claim(&renewed).await.expect("an answer");
    let renewal = Renewal { key: renewed.key, token: renewed.token, lease: 2 * TTL };
    assert_eq!(store.renew(&[renewal]).await.expect("an answer"), [true]);
    let answer = answer_of(&renewed, b"answer");
    let times = calls("time");
    assert_eq!(store.complete(&answer).await.expect("an answer"), Written::Done);
    assert_eq!(calls("time"), times + 1, "all of the script");
    let replayed = store.claim(&claim_on(renewed.key)).await;
    assert!(matches!(replayed, Ok(Claimed::Found(record)) if record.payload == answer.payload));
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
async fn what_is_no_record_is_refused_and_kept() {
    let server = Redis::shared();
    let (builder, prefix) = own();
    let store = builder.connect(server.url()).await.expect("a connection");
    let mut connection = Client::open(server.url()).expect("a URL").get_connection().expect("it");
    let sound = any_claim();
    store.claim(&sound).await.expect("an answer");
    let mut get =
        |claim: &Claim| -> Vec<u8> { connection.get(name(&prefix, &claim.key)).expect("a record") };
    // What is as its first claim made it has spans; whatever a script has written, instants.
    let spans = get(&sound);
    let renewal = Renewal { key: sound.key, token: sound.token, lease: TTL };
    assert_eq!(store.renew(&[renewal]).await.expect("an answer"), [true]);
    let instants = get(&sound);
    assert_eq!((spans[2], instants[2]), (5, 1), "running");
    let damage = |record: &[u8], at: usize, byte: u8| {
        let mut record = record.to_owned();
        record[at] = byte;
        record
    };
    let damaged = [
        (vec![], StoreErrorKind::Corrupt),
        (b"\0\x01".to_vec(), StoreErrorKind::Corrupt),
        (instants[..152].to_vec(), StoreErrorKind::Corrupt),
        (spans[..152].to_vec(), StoreErrorKind::Corrupt),
        (damage(&instants, 1, 0), StoreErrorKind::Corrupt),
        (damage(&instants, 2, 8), StoreErrorKind::Corrupt),
        (damage(&instants, 145, 1), StoreErrorKind::Corrupt),
        (damage(&spans, 145, 1), StoreErrorKind::Corrupt),
        (damage(&instants, 17, 1), StoreErrorKind::Corrupt),
        (damage(&spans, 17, 1), StoreErrorKind::Corrupt),
        (damage(&instants, 0, 1), StoreErrorKind::Newer),
        (damage(&spans, 0, 1), StoreErrorKind::Newer),
        (b"\xff\xff whatever comes".to_vec(), StoreErrorKind::Newer),
    ];
    for (bytes, kind) in damaged {
        let claim = any_claim();
        let name = name(&prefix, &claim.key);
        let _: () = connection.pset_ex(&name, &bytes, 3_600_000).expect("an answer");
        let kinds = [
            store.claim(&claim).await.expect_err("no record").kind(),
            store.read(&claim.key).await.expect_err("no record").kind(),
            store.complete(&answer_of(&claim, b"")).await.expect_err("no record").kind(),
            store.forget(&claim.key, &claim.token).await.expect_err("no record").kind(),
        ];
        assert_eq!(kinds, [kind; 4], "{bytes:?}");
        let kept: Vec<u8> = connection.get(&name).expect("an answer");
        assert_eq!(kept, bytes, "what cannot be read is not touched");
        if kind == StoreErrorKind::Corrupt {
            let purge = Purge::Key(claim.key);
            let purged = store.manage().expect("a search").purge(&purge).await;
            assert_eq!(purged.expect("an answer").removed, 1, "{bytes:?}");
            let _: () = connection.pset_ex(&name, &bytes, 3_600_000).expect("an answer");
        }
    }
    let timeless = any_claim();
    let _: () = connection.set(name(&prefix, &timeless.key), &spans).expect("an answer");
    let refused = store.claim(&timeless).await.expect_err("spans that count from no instant");
    assert_eq!(refused.kind(), StoreErrorKind::Corrupt);
    let claim = any_claim();
    let _: () = connection.lpush(name(&prefix, &claim.key), "a list").expect("an answer");
    let refused = store.claim(&claim).await.expect_err("a list is no record");
    assert_eq!(refused.kind(), StoreErrorKind::Corrupt);

    let all = Listing { kind: Kind::Any, scope: None, after: None, limit: 100 };
    let listed = store.manage().expect("a search").list(&all).await.expect("what can be read");
    assert!(listed.records.iter().any(|record| record.key == sound.key), "{listed:?}");
    assert_eq!(store.sweep(usize::MAX).await.expect("what can be read"), 0);
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

#[tokio::test]
async fn an_operation_without_a_note_is_found_by_a_search() {
    for is_cluster in [false, true] {
        let (builder, prefix) = own();
        let builder = builder.without_notes();
        let (store, masters) = if is_cluster {
            let cluster = Cluster::shared();
            (builder.cluster(cluster.urls()).await, cluster.masters())
        } else {
            let url = Redis::shared().url();
            (builder.connect(url).await, vec![url.to_owned()])
        };
        let store = store.expect("a connection");
        // More than a server looks at in one go.
        let claims: Vec<_> = (0..2_000).map(|_| any_claim()).collect();
        let granted = join_all(claims.iter().map(|claim| store.claim(claim))).await;
        assert!(granted.iter().all(|granted| matches!(granted, Ok(Claimed::Granted(_)))));
        let mut keys = 0;
        for master in masters {
            let mut connection = Client::open(master).expect("a URL").get_connection().expect("it");
            let names: Vec<String> = connection.keys(format!("{prefix}*")).expect("an answer");
            keys += names.len();
        }
        assert_eq!(keys, claims.len(), "no notes");
        let manage = store.manage().expect("a search");
        for claim in [&claims[0], &claims[999], &claims[1_999]] {
            let found = manage.find(&claim.operation_id).await.expect("an answer");
            assert_eq!(found.expect("a record").key, claim.key);
        }
        assert!(manage.find(&OperationId::random()).await.expect("an answer").is_none());
    }
}
