//! Connections that break, wait and go away.

use std::{
    pin::pin,
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use futures_util::FutureExt as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

use super::*;

/// Waits until so many connections to the test's database stand still in a statement, and names
/// them.
pub(super) async fn waiting(pool: &MySqlPool, count: usize) -> Vec<i64> {
    let start = Instant::now();
    let mut before = Vec::new();
    loop {
        let busy: Vec<i64> = sqlx::query_scalar(
            "SELECT CAST(id AS SIGNED) FROM information_schema.processlist
             WHERE db = DATABASE() AND command = 'Execute' AND id <> CONNECTION_ID()",
        )
        .fetch_all(pool)
        .await
        .expect("a list");
        let waiting: Vec<_> = busy.iter().copied().filter(|id| before.contains(id)).collect();
        if waiting.len() >= count {
            return waiting;
        }
        assert!(start.elapsed() < PATIENCE, "{waiting:?} wait");
        before = busy;
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_killed_in_mid_call_fails_no_call() {
    let fixture = Fixture::start().await;
    let store = fixture.store.clone().with_timeout(PATIENCE);
    let [fresh, lapsed, running, marked] = [any_claim(), any_claim(), any_claim(), any_claim()];
    let lapsed = Claim { lease: Duration::ZERO, ..lapsed };
    for claim in [&lapsed, &running, &marked] {
        granted(&store, claim).await;
    }
    let takeover = claim_on(lapsed.key);
    let (answer, mark) = (completion(&running, "answer"), checkpoint(&marked, "so far"));
    for key in [fresh.key, lapsed.key, running.key, marked.key] {
        let held = lock(&fixture.pool, &key).await;
        let ask = async {
            if key == fresh.key {
                assert_eq!(granted(&store, &fresh).await.attempt, 1);
            } else if key == lapsed.key {
                assert_eq!(granted(&store, &takeover).await.attempt, 2);
            } else if key == running.key {
                assert_done(&store.complete(&answer).await);
            } else {
                assert_done(&store.checkpoint(&mark).await);
            }
        };
        let kill = async {
            for connection in waiting(&fixture.pool, 1).await {
                run(&fixture.pool, format!("KILL CONNECTION {connection}")).await;
            }
            // It waits again, on another connection.
            waiting(&fixture.pool, 1).await;
            held.rollback().await.expect("an end");
        };
        tokio::join!(ask, kill);
    }
    assert_eq!(kept(&store, &fresh.key).await.token, fresh.token);
    assert_eq!(kept(&store, &lapsed.key).await.token, takeover.token);
    assert_eq!(kept(&store, &running.key).await.payload, "answer");
    assert_eq!(kept(&store, &marked.key).await.payload, "so far");
}

#[tokio::test]
async fn idle_connections_that_the_server_closed_fail_no_call() {
    let fixture = Fixture::start().await;
    let store = &fixture.store;
    let claims: Vec<_> = (0..16).map(|_| any_claim()).collect();
    futures_util::future::join_all(claims.iter().map(|claim| granted(store, claim))).await;
    let idle: Vec<i64> = sqlx::query_scalar(
        "SELECT CAST(id AS SIGNED) FROM information_schema.processlist
         WHERE db = DATABASE() AND id <> CONNECTION_ID() AND command = 'Sleep'",
    )
    .fetch_all(&fixture.pool)
    .await
    .expect("a list");
    assert!(idle.len() > 4, "{idle:?}");
    for connection in idle {
        // Those of the test's own pool are among them.
        let kill = sqlx::AssertSqlSafe(format!("KILL CONNECTION {connection}"));
        let _ = sqlx::raw_sql(kill).execute(&fixture.pool).await;
    }
    for claim in &claims {
        assert_done(&store.complete(&completion(claim, "answer")).await);
    }
}

#[tokio::test]
async fn a_pool_without_a_free_connection_is_waited_for_within_a_bound() {
    let fixture = Fixture::start().await;
    let pool =
        MySqlPoolOptions::new().max_connections(1).connect_lazy_with(fixture.database.options());
    let store = MySqlStore::new(pool.clone()).with_timeout(Duration::from_millis(300));
    granted(&store, &any_claim()).await;
    let held = pool.acquire().await.expect("a connection");
    let start = Instant::now();
    assert_fails(store.claim(&any_claim()).await, StoreErrorKind::TimedOut);
    assert!(start.elapsed() < Duration::from_secs(2));
    drop(held);
    granted(&store, &any_claim()).await;
}

#[tokio::test]
async fn a_lock_that_is_held_for_too_long_fails_the_call_and_no_later_one() {
    let fixture = Fixture::start().await;
    let store = fixture.store.clone().with_timeout(Duration::from_millis(300));
    let claim = any_claim();
    granted(&store, &claim).await;
    let held = lock(&fixture.pool, &claim.key).await;
    let answer = completion(&claim, "answer");
    assert_fails(store.complete(&answer).await, StoreErrorKind::TimedOut);
    assert_eq!(kept(&store, &claim.key).await.payload, "");
    granted(&store, &any_claim()).await;
    held.rollback().await.expect("an end");
    assert_done(&store.complete(&answer).await);
    assert_eq!(kept(&store, &claim.key).await.payload, "answer");
}

/// The statement is still waiting at the server when its caller goes, and is carried out later.
#[tokio::test]
async fn what_nobody_waits_for_any_longer_replaces_nothing_later() {
    let fixture = Fixture::start().await;
    let store = &fixture.store;
    let claim = any_claim();
    granted(store, &claim).await;
    let held = lock(&fixture.pool, &claim.key).await;
    let (old, new) = (checkpoint(&claim, "old"), checkpoint(&claim, "new"));
    {
        let mut overtaken = pin!(store.checkpoint(&old).fuse());
        futures_util::select_biased! {
            answer = overtaken => panic!("the row is locked; got {answer:?}"),
            _ = pin!(waiting(&fixture.pool, 1).fuse()) => {}
        }
    }
    let newer = async { assert_done(&store.checkpoint(&new).await) };
    let unlock = async {
        waiting(&fixture.pool, 2).await;
        held.rollback().await.expect("an end");
    };
    tokio::join!(newer, unlock);
    assert_eq!(kept(store, &claim.key).await.payload, "new");
    // Whatever still comes on the connection of the first one is nobody's answer.
    for _ in 0..20 {
        let claim = any_claim();
        assert_eq!(granted(store, &claim).await.key, claim.key);
        assert_eq!(kept(store, &claim.key).await.key, claim.key);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stands_still_dies_and_comes_back_is_used_again() {
    let server = MariaDb::start_own();
    let fixture = Fixture::on(&server).await;
    let store = fixture.store.clone().with_timeout(Duration::from_millis(500));
    let claim = any_claim();
    granted(&store, &claim).await;

    server.pause();
    let start = Instant::now();
    for _ in 0..3 {
        assert_fails(store.claim(&any_claim()).await, StoreErrorKind::TimedOut);
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    server.resume();
    assert_done(&store.complete(&completion(&claim, "answer")).await);

    server.kill();
    for _ in 0..3 {
        let error = store.read(&claim.key).await.expect_err("a failure");
        assert!(error.kind().is_transient(), "{error:?}");
    }
    server.restart();
    assert_eq!(kept(&store, &claim.key).await.payload, "answer");
    granted(&store, &any_claim()).await;

    // Connections that were idle when the server went.
    server.stop();
    server.restart();
    granted(&store, &any_claim()).await;
}

/// Stands between a store and its server, and breaks connections when the server answers.
struct Proxy {
    port: u16,
    /// How many more answers are to be lost, each with its connection.
    lost: Arc<AtomicUsize>,
}

impl Proxy {
    async fn start(server: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let lost = Arc::new(AtomicUsize::new(0));
        let losing = Arc::clone(&lost);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(Self::carry(client, server, Arc::clone(&losing)));
            }
        });
        Self { port, lost }
    }

    async fn carry(client: TcpStream, server: u16, lost: Arc<AtomicUsize>) {
        let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let there = async { tokio::io::copy(&mut from_client, &mut to_server).await.map(drop) };
        let back = async {
            let mut buffer = vec![0; 65536];
            loop {
                let read = from_server.read(&mut buffer).await?;
                let less = |lost: usize| lost.checked_sub(1);
                let lose = lost.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok();
                if read == 0 || lose {
                    return Ok(());
                }
                to_client.write_all(&buffer[..read]).await?;
            }
        };
        // Whichever ends first takes the other one along.
        let _: std::io::Result<()> =
            tokio::select! { ended = there => ended, ended = back => ended };
    }
}

#[tokio::test]
async fn an_answer_that_is_lost_makes_nobody_its_own_duplicate() {
    let fixture = Fixture::start().await;
    let options = fixture.database.options();
    let proxy = Proxy::start(options.get_port()).await;
    let pool = MySqlPoolOptions::new()
        .max_connections(1)
        .test_before_acquire(false)
        .connect_lazy_with(options.port(proxy.port));
    let store = MySqlStore::new(pool.clone()).with_timeout(PATIENCE);
    let lose_one = || async {
        // The connection is back in its pool, and has nothing left to be answered.
        while pool.num_idle() == 0 {
            sleep(Duration::from_millis(1)).await;
        }
        proxy.lost.store(1, Ordering::SeqCst);
    };
    let carried_out = || assert_eq!(proxy.lost.load(Ordering::SeqCst), 0, "an answer was lost");
    // What it prepares, it prepares twice: on the connection that breaks, and on the next one.
    for _ in 0..2 {
        let [claim, forgotten] = [any_claim(), any_claim()];
        let issue = issue_on(any_claim().key);
        granted(&store, &any_claim()).await;
        lose_one().await;
        let record = granted(&store, &claim).await;
        carried_out();
        assert_eq!((record.attempt, record.operation_id), (1, claim.operation_id));
        lose_one().await;
        assert_eq!(store.renew(&[renewal(&claim)]).await.expect("an answer"), [true]);
        carried_out();
        lose_one().await;
        assert_done(&store.checkpoint(&checkpoint(&claim, "so far")).await);
        carried_out();
        lose_one().await;
        assert_done(&store.release(&claim.key, &claim.token).await);
        carried_out();
        let next = claim_on(claim.key);
        lose_one().await;
        let record = granted(&store, &next).await;
        carried_out();
        assert_eq!((record.attempt, &record.payload[..]), (2, &b"so far"[..]));
        lose_one().await;
        assert_done(&store.complete(&completion(&next, "answer")).await);
        carried_out();
        assert_eq!(kept(&store, &claim.key).await.payload, "answer");
        lose_one().await;
        assert_done(&store.issue(&issue).await);
        carried_out();
        granted(&store, &forgotten).await;
        lose_one().await;
        let answer = store.forget(&forgotten.key, &forgotten.token).await;
        assert!(matches!(answer, Ok(Written::Done | Written::Gone)), "{answer:?}");
        carried_out();
        assert!(store.read(&forgotten.key).await.expect("an answer").is_none());
    }
}

#[tokio::test]
async fn nothing_waits_for_a_server_that_is_not_there() {
    let store = MySqlStore::new(
        MySqlPoolOptions::new().connect_lazy("mysql://root@127.0.0.1:9/none").expect("a URL"),
    );
    let store = store.with_timeout(Duration::from_millis(300));
    let answer = timeout(Duration::from_secs(3), store.claim(&any_claim())).await;
    let error = answer.expect("an answer in time").expect_err("a failure");
    assert!(error.kind().is_transient(), "{error:?}");
}
