//! Connections that break, wait and go away.

use std::{
    pin::pin,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    task::Poll,
    time::Instant,
};

use futures_util::FutureExt as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Notify,
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

/// Its statement is still on its way when the caller goes, and arrives after the next call's.
#[tokio::test]
async fn what_nobody_waits_for_any_longer_replaces_nothing_later() {
    let fixture = Fixture::start().await;
    let proxy = Proxy::start(fixture.database.options().get_port()).await;
    let pool = proxy.pool(&fixture.database);
    let slow = MySqlStore::new(pool.clone());
    let claim = any_claim();
    granted(&slow, &claim).await;
    assert_done(&slow.checkpoint(&checkpoint(&claim, "first")).await);
    let connection: i64 = sqlx::query_scalar("SELECT CAST(CONNECTION_ID() AS SIGNED)")
        .fetch_one(&pool)
        .await
        .expect("an id");

    settled(&pool).await;
    // The statement that reads goes through, and the one that writes does not.
    proxy.faults.passing.store(1, Ordering::SeqCst);
    let (old, new) = (checkpoint(&claim, "old"), checkpoint(&claim, "new"));
    {
        let mut overtaken = pin!(slow.checkpoint(&old).fuse());
        futures_util::select_biased! {
            answer = overtaken => panic!("it cannot be done; got {answer:?}"),
            () = pin!(proxy.faults.stopped.notified().fuse()) => {}
        }
    }
    assert_done(&fixture.store.checkpoint(&new).await);
    proxy.faults.go_on.notify_one();
    let start = Instant::now();
    let alive = "SELECT COUNT(*) FROM information_schema.processlist WHERE id = ?";
    while 0 < sqlx::query_scalar::<_, i64>(alive)
        .bind(connection)
        .fetch_one(&fixture.pool)
        .await
        .expect("a count")
    {
        assert!(start.elapsed() < PATIENCE, "the connection of who went away is still open");
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(kept(&fixture.store, &claim.key).await.payload, "new");
}

/// Whichever step of its conversation with the server it has come to.
#[tokio::test]
async fn a_caller_that_goes_away_leaves_no_answer_to_the_next_one() {
    let fixture = Fixture::start().await;
    let [claim, other] = [any_claim(), any_claim()];
    granted(&fixture.store, &claim).await;
    assert_done(&fixture.store.complete(&completion(&claim, vec![7; 1000])).await);
    granted(&fixture.store, &other).await;
    let proxy = Proxy::start(fixture.database.options().get_port()).await;
    for steps in 0.. {
        // Of a new connection, which has prepared nothing yet.
        let pool = proxy.pool(&fixture.database);
        let store = MySqlStore::new(pool.clone());
        store.check().await.expect("a store that can work");
        settled(&pool).await;
        proxy.faults.crumbs.store(true, Ordering::SeqCst);
        let gone = {
            let again = claim_on(claim.key);
            let mut replaying = pin!(store.claim(&again));
            let mut pending = 0;
            let step = std::future::poll_fn(|context| match replaying.as_mut().poll(context) {
                Poll::Pending if pending < steps => {
                    pending += 1;
                    Poll::Pending
                }
                poll => Poll::Ready(poll.is_pending()),
            });
            step.await
        };
        proxy.faults.crumbs.store(false, Ordering::SeqCst);
        let record = kept(&store, &other.key).await;
        assert_eq!((record.key, record.token), (other.key, other.token), "after {steps} steps");
        let replayed = store.claim(&claim_on(claim.key)).await;
        assert!(
            matches!(&replayed, Ok(Claimed::Found(record)) if record.payload.len() == 1000),
            "after {steps} steps: {replayed:?}",
        );
        if !gone {
            assert!(steps > 5, "it was answered after {steps} steps");
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stands_still_dies_and_comes_back_is_used_again() {
    let server = MariaDb::start_own();
    let fixture = Fixture::on(&server).await;
    let store = fixture.store.clone().with_timeout(PATIENCE);
    let hasty = fixture.store.clone().with_timeout(Duration::from_millis(500));
    let claim = any_claim();
    granted(&store, &claim).await;

    server.pause();
    let start = Instant::now();
    for _ in 0..3 {
        assert_fails(hasty.claim(&any_claim()).await, StoreErrorKind::TimedOut);
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    server.resume();
    assert_done(&store.complete(&completion(&claim, "answer")).await);

    server.kill();
    for _ in 0..3 {
        let error = hasty.read(&claim.key).await.expect_err("a failure");
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

/// Stands between a store and its server.
struct Proxy {
    port: u16,
    faults: Arc<Faults>,
}

/// What a proxy does to its connections.
struct Faults {
    /// How many more answers are to be lost, each with its connection.
    losing: AtomicUsize,
    /// Whether answers come in small pieces.
    crumbs: AtomicBool,
    /// How many more packets of clients pass before one is stopped.
    passing: AtomicUsize,
    /// One has been stopped.
    stopped: Notify,
    /// It may go on, whether or not its client is still there.
    go_on: Notify,
}

impl Proxy {
    async fn start(server: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let faults = Arc::new(Faults {
            losing: AtomicUsize::new(0),
            crumbs: AtomicBool::new(false),
            passing: AtomicUsize::new(usize::MAX),
            stopped: Notify::new(),
            go_on: Notify::new(),
        });
        let shared = Arc::clone(&faults);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let faults = Arc::clone(&shared);
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else {
                        return;
                    };
                    let (from_client, to_client) = client.into_split();
                    let (from_server, to_server) = server.into_split();
                    // Whichever ends first takes the other one along.
                    let _: std::io::Result<()> = tokio::select! {
                        ended = faults.ask(from_client, to_server) => ended,
                        ended = faults.answer(from_server, to_client) => ended,
                    };
                });
            }
        });
        Self { port, faults }
    }

    /// One connection, through the proxy.
    fn pool(&self, database: &Database) -> MySqlPool {
        MySqlPoolOptions::new()
            .max_connections(1)
            .test_before_acquire(false)
            .connect_lazy_with(database.options().port(self.port))
    }
}

impl Faults {
    async fn ask(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> std::io::Result<()> {
        let mut buffer = vec![0; 65536];
        loop {
            let read = from.read(&mut buffer).await?;
            if read == 0 {
                return Ok(());
            }
            if self.passing.fetch_sub(1, Ordering::SeqCst) == 0 {
                self.passing.store(usize::MAX, Ordering::SeqCst);
                self.stopped.notify_one();
                self.go_on.notified().await;
            }
            to.write_all(&buffer[..read]).await?;
        }
    }

    async fn answer(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> std::io::Result<()> {
        let mut buffer = vec![0; 65536];
        loop {
            let read = from.read(&mut buffer).await?;
            let less = |losing: usize| losing.checked_sub(1);
            let lose = self.losing.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok();
            if read == 0 || lose {
                return Ok(());
            }
            if self.crumbs.load(Ordering::SeqCst) {
                for crumb in buffer[..read].chunks(128) {
                    to.write_all(crumb).await?;
                    sleep(Duration::from_millis(1)).await;
                }
            } else {
                to.write_all(&buffer[..read]).await?;
            }
        }
    }
}

/// Waits until a pool's connection has nothing left to be answered.
async fn settled(pool: &MySqlPool) {
    while pool.num_idle() == 0 {
        sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn an_answer_that_is_lost_makes_nobody_its_own_duplicate() {
    let fixture = Fixture::start().await;
    let proxy = Proxy::start(fixture.database.options().get_port()).await;
    let pool = proxy.pool(&fixture.database);
    let store = MySqlStore::new(pool.clone()).with_timeout(PATIENCE);
    let lose_one = || async {
        settled(&pool).await;
        proxy.faults.losing.store(1, Ordering::SeqCst);
    };
    let carried_out = || {
        assert_eq!(proxy.faults.losing.load(Ordering::SeqCst), 0, "an answer was lost");
    };
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
