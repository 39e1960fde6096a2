//! Servers that are full, paused, killed and replaced.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use idem_runtime::{
    FORMAT, State,
    store::{
        Checkpoint, Claim, Claimed, Completion, RedisStore, Renewal, Store, StoreErrorKind, Written,
    },
};
use redis::{Client, Cmd};
use tests::servers::redis::{Cluster, Redis};
use tokio::task::spawn_blocking;

use super::{LEASE, PATIENCE, answer_of, any_claim, claim_on, name, own, until_answered};

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
    assert!(matches!(replayed, Claimed::Found(record) if record.payload == b"done"[..]));

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

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn connections_killed_in_mid_claim_make_nobody_its_own_duplicate() {
    let server = Redis::start_own();
    let store = RedisStore::connect(server.url()).await.expect("a connection");
    let has_met = Arc::new(AtomicBool::new(false));
    let killer = std::thread::spawn({
        let client = Client::open(server.url()).expect("a URL");
        let has_met = Arc::clone(&has_met);
        move || {
            let mut connection = client.get_connection().expect("a connection");
            let mut killed = 0;
            // On a busy machine hardly any claim is under way when its turn comes.
            for n in 0..1_500 {
                if n >= 100 && has_met.load(Ordering::Relaxed) {
                    break;
                }
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
            has_met.fetch_or(retried > 0, Ordering::Relaxed);
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
    let nobody = servers::free_port().to_string();
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
    assert!(matches!(found, Claimed::Found(record) if record.payload == b"answer"[..]));
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

/// Two hundred calls that are under way when their key moves are more than redis 1.8's cluster
/// client gets through in one turn of its task, and after that it answers nobody: see `look_again`.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_failover_under_many_callers_silences_nobody() {
    let cluster = Arc::new(spawn_blocking(Cluster::start_own).await.expect("a cluster"));
    let builder = RedisStore::builder().timeout(Duration::from_millis(500));
    let store = builder.cluster(cluster.urls()).await.expect("a connection");
    let claim = any_claim();
    assert!(matches!(store.claim(&claim).await, Ok(Claimed::Granted(_))));
    let name = name("idem:", &claim.key);
    for round in 0..2 {
        let moved = spawn_blocking({
            let (cluster, name) = (Arc::clone(&cluster), name.clone());
            move || {
                let old = cluster.master_of(&name);
                cluster.fail_over(old);
                cluster.wait_until_promoted(&name, old);
                Instant::now()
            }
        });
        let found = join_all((0..200).map(async |_| {
            while !moved.is_finished() {
                drop(store.read(&claim.key).await);
            }
            until_answered(async || store.read(&claim.key).await).await
        }));
        let found = found.await;
        let promoted = moved.await.expect("a promotion");
        println!("round {round}: all answered {:?} after the promotion", promoted.elapsed());
        for record in found {
            assert_eq!(record.expect("a record").token, claim.token);
        }
    }
}
