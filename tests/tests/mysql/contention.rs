//! Many at once.

use futures_util::future::join_all;
use sqlx::Row as _;
use tokio::{task::JoinSet, time::timeout};

use super::{connections::waiting, *};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sixty_four_claimants_fight_over_a_few_keys_and_none_meets_a_deadlock() {
    let fixture = Fixture::start().await;
    let keys: Arc<[Key]> = (0..8).map(|_| any_claim().key).collect();
    let mut claimants = JoinSet::new();
    for claimant in 0..64 {
        let keys = Arc::clone(&keys);
        let store = if claimant % 2 == 0 { &fixture.store } else { &fixture.second };
        let store = store.clone().with_timeout(PATIENCE);
        claimants.spawn(async move {
            let mut granted = 0;
            for round in 0..30 {
                // One key at a time and all keys in turn, so that all are met by many.
                let claim = claim_on(keys[round % keys.len()]);
                match store.claim(&claim).await.expect("an answer") {
                    Claimed::Granted(record) => assert_eq!(record.token, claim.token),
                    Claimed::Found(record) => {
                        assert_ne!(record.token, claim.token);
                        continue;
                    }
                    Claimed::Unknown => panic!("nobody asked for an issued key"),
                }
                granted += 1;
                assert_eq!(store.renew(&[renewal(&claim)]).await.expect("an answer"), [true]);
                let ended = match round % 3 {
                    0 => store.release(&claim.key, &claim.token).await,
                    // Those that wait for the row's end find none, and all want to make it.
                    _ => store.forget(&claim.key, &claim.token).await,
                };
                assert_done(&ended);
            }
            granted
        });
    }
    let granted: u32 = claimants.join_all().await.into_iter().sum();
    assert!(granted > 64, "{granted} claims were granted");
}

/// Both wait for the row's end in a way that lets neither go on afterwards.
#[tokio::test]
async fn of_two_claims_in_a_deadlock_one_is_granted_and_none_fails() {
    let fixture = Fixture::start().await;
    let store = fixture.store.clone().with_timeout(PATIENCE);
    let gone = any_claim();
    granted(&store, &gone).await;
    let mut removing = fixture.pool.begin().await.expect("a transaction");
    sqlx::query("DELETE FROM idem_records WHERE record_key = ?")
        .bind(&gone.key.as_bytes()[..])
        .execute(&mut *removing)
        .await
        .expect("a row");
    let before = deadlocks(&fixture.pool).await;
    let claims = [claim_on(gone.key), claim_on(gone.key)];
    let claiming = join_all(claims.iter().map(|claim| store.claim(claim)));
    let remove = async {
        waiting(&fixture.pool, 2).await;
        removing.commit().await.expect("an end");
    };
    let (answers, ()) = tokio::join!(claiming, remove);
    let granted = answers.iter().filter(|answer| matches!(answer, Ok(Claimed::Granted(_))));
    let refused = answers.iter().filter(|answer| matches!(answer, Ok(Claimed::Found(_))));
    assert_eq!((granted.count(), refused.count()), (1, 1), "{answers:?}");
    if let (Some(before), Some(after)) = (before, deadlocks(&fixture.pool).await) {
        assert!(after > before, "the test has not made a deadlock");
    }
}

/// How many deadlocks the server has met, if it counts them, as MariaDB does.
async fn deadlocks(pool: &MySqlPool) -> Option<u64> {
    let count = sqlx::raw_sql("SHOW GLOBAL STATUS LIKE 'Innodb_deadlocks'");
    let row = count.fetch_optional(pool).await.expect("a counter");
    row.map(|row| row.get::<String, _>(1).parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn claims_on_many_keys_do_not_stand_in_each_others_way() {
    let fixture = Fixture::start().await;
    let mut claimants = JoinSet::new();
    for claimant in 0..64 {
        let store = if claimant % 2 == 0 { &fixture.store } else { &fixture.second };
        let store = store.clone().with_timeout(PATIENCE);
        claimants.spawn(async move {
            for _ in 0..20 {
                let claim = any_claim();
                granted(&store, &claim).await;
                assert_done(&store.complete(&completion(&claim, "answer")).await);
                let replayed = store.claim(&claim_on(claim.key)).await.expect("an answer");
                assert!(matches!(replayed, Claimed::Found(record) if record.payload == "answer"));
            }
        });
    }
    claimants.join_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_sweepers_share_the_work_while_claims_arrive() {
    let fixture = Fixture::start().await;
    let store = fixture.store.clone().with_timeout(PATIENCE);
    let over: Vec<_> = (0..1200).map(|_| any_claim()).collect();
    for over in over.chunks(64) {
        join_all(over.iter().map(|claim| granted(&store, claim))).await;
    }
    fixture.advance(HOUR).await;
    let anew: Vec<_> = over.iter().take(300).map(|claim| claim_on(claim.key)).collect();
    let (here, there, records) = tokio::join!(
        fixture.store.sweep(usize::MAX),
        fixture.second.sweep(usize::MAX),
        join_all(anew.iter().map(|claim| granted(&store, claim))),
    );
    let removed = here.expect("an answer") + there.expect("an answer");
    assert!((900..=1200).contains(&removed), "{removed} were removed");
    for (claim, record) in anew.iter().zip(records) {
        assert_eq!(record.attempt, 1, "the one before was over");
        assert_eq!(kept(&store, &claim.key).await.token, claim.token);
    }
    assert_eq!(store.sweep(usize::MAX).await.expect("an answer"), 0);
}

#[tokio::test]
async fn a_row_that_a_transaction_holds_stops_nobody_elses_claim() {
    let fixture = Fixture::start().await;
    let store = &fixture.store;
    let [held, other, over] = [any_claim(), any_claim(), any_claim()];
    granted(store, &over).await;
    fixture.advance(HOUR).await;
    granted(store, &held).await;
    granted(store, &other).await;
    let transaction = lock(&fixture.pool, &held.key).await;
    let also = lock(&fixture.pool, &over.key).await;
    timeout(Duration::from_secs(2), async {
        assert_eq!(store.renew(&[renewal(&other)]).await.expect("an answer"), [true]);
        granted(store, &any_claim()).await;
        assert_done(&store.complete(&completion(&other, "answer")).await);
        assert_eq!(kept(store, &held.key).await.token, held.token, "reading waits for nobody");
        assert_eq!(store.sweep(usize::MAX).await.expect("an answer"), 0, "it is skipped");
    })
    .await
    .expect("answers in time");
    also.rollback().await.expect("an end");
    assert_eq!(store.sweep(usize::MAX).await.expect("an answer"), 1);
    transaction.rollback().await.expect("an end");
}

#[tokio::test]
async fn a_losing_claim_writes_nothing() {
    let server = MariaDb::start_own_with("--log-bin --server-id=1 --binlog-format=ROW");
    let fixture = Fixture::on(&server).await;
    let store = &fixture.store;
    let [running, completed, released] = [any_claim(), any_claim(), any_claim()];
    for claim in [&running, &completed, &released] {
        granted(store, claim).await;
    }
    assert_done(&store.complete(&completion(&completed, "answer")).await);
    assert_done(&store.release(&released.key, &released.token).await);
    // What it prepares once.
    assert!(matches!(store.claim(&claim_on(running.key)).await, Ok(Claimed::Found(_))));

    let before = written(&fixture.pool).await;
    for claim in [&running, &completed, &released] {
        for _ in 0..10 {
            let strict = Claim { on_unknown: OnUnknown::Refuse, ..claim_on(claim.key) };
            let answer = store.claim(&strict).await;
            assert!(matches!(answer, Ok(Claimed::Found(_))), "{answer:?}");
            let stranger = Claim { token: Token::random(), ..claim.clone() };
            let answer = store.complete(&completion(&stranger, "stale")).await;
            assert!(matches!(answer, Ok(Written::Fenced(_))), "{answer:?}");
        }
    }
    let unknown = Claim { issued_only: true, ..any_claim() };
    assert_eq!(store.claim(&unknown).await.expect("an answer"), Claimed::Unknown);
    assert_eq!(written(&fixture.pool).await, before);

    granted(store, &any_claim()).await;
    assert_ne!(written(&fixture.pool).await, before, "a claim that is granted is written");
}

/// How much the server has written so far: rows, and bytes of its log of changes.
async fn written(pool: &MySqlPool) -> Vec<(String, String)> {
    let mut connection = pool.acquire().await.expect("a connection");
    let counters = "SHOW GLOBAL STATUS WHERE Variable_name IN (
        'Innodb_rows_inserted', 'Innodb_rows_updated', 'Innodb_rows_deleted')";
    let rows = sqlx::raw_sql(counters).fetch_all(&mut *connection).await.expect("counters");
    let mut written: Vec<(String, String)> =
        rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let log = sqlx::raw_sql("SHOW MASTER STATUS").fetch_one(&mut *connection).await.expect("a log");
    written.push(("log".to_owned(), log.get::<u64, _>(1).to_string()));
    written
}

#[tokio::test]
async fn a_claim_and_a_completion_are_one_statement_each() {
    let fixture = Fixture::start().await;
    // One connection, which has prepared what it needs.
    let pool = MySqlPoolOptions::new()
        .max_connections(1)
        .test_before_acquire(false)
        .connect_lazy_with(fixture.database.options());
    let store = MySqlStore::new(pool.clone());
    let first = any_claim();
    granted(&store, &first).await;
    assert_done(&store.complete(&completion(&first, "answer")).await);
    let before = executed(&pool).await;
    for _ in 0..10 {
        let claim = any_claim();
        granted(&store, &claim).await;
        assert_done(&store.complete(&completion(&claim, "answer")).await);
    }
    assert_eq!(executed(&pool).await - before, 20);
    let before = executed(&pool).await;
    for _ in 0..10 {
        let replayed = store.claim(&claim_on(first.key)).await;
        assert!(matches!(replayed, Ok(Claimed::Found(_))), "{replayed:?}");
    }
    assert_eq!(executed(&pool).await - before, 20, "one that fails, and one that reads");
}

/// How many prepared statements this connection has executed.
async fn executed(pool: &MySqlPool) -> u64 {
    let count = sqlx::raw_sql("SHOW SESSION STATUS LIKE 'Com_stmt_execute'");
    let row = count.fetch_one(pool).await.expect("a counter");
    row.get::<String, _>(1).parse().expect("a number")
}
