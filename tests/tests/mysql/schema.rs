//! The tables.

use futures_util::future::join_all;
use idem_runtime::store::{Kind, Listing, Manage as _, Purge, Purged};
use sqlx::{ConnectOptions as _, Row as _};

use super::*;

/// A store over a database that has no tables yet.
async fn bare() -> (MySqlStore, MySqlPool, Database) {
    let database = MariaDb::shared().database().await;
    let pool = MySqlPoolOptions::new().connect_lazy_with(database.options());
    (MySqlStore::new(pool.clone()), pool, database)
}

async fn tables(pool: &MySqlPool) -> Vec<String> {
    let tables = "SELECT CAST(table_name AS CHAR) FROM information_schema.tables
        WHERE table_schema = DATABASE()";
    let mut tables: Vec<_> = sqlx::query_scalar(tables).fetch_all(pool).await.expect("names");
    tables.sort_unstable();
    tables
}

#[tokio::test]
async fn without_its_tables_every_call_is_refused_until_they_are_there() {
    let (store, pool, _database) = bare().await;
    assert_fails(store.check().await, StoreErrorKind::Refused);
    assert_fails(store.claim(&any_claim()).await, StoreErrorKind::Refused);
    assert_fails(store.sweep(1).await, StoreErrorKind::Refused);
    run(&pool, MySqlStore::SCHEMA).await;
    store.check().await.expect("a store that can work");
    granted(&store, &any_claim()).await;
}

#[tokio::test]
async fn creating_the_tables_again_changes_nothing() {
    let (store, pool, _database) = bare().await;
    run(&pool, "CREATE TABLE _sqlx_migrations (version BIGINT PRIMARY KEY)").await;
    store.create_schema().await.expect("tables");
    let claim = any_claim();
    granted(&store, &claim).await;
    store.create_schema().await.expect("tables");
    run(&pool, MySqlStore::SCHEMA).await;
    assert_eq!(kept(&store, &claim.key).await.token, claim.token);
    assert_eq!(tables(&pool).await, ["_sqlx_migrations", "idem_records", "idem_schema"]);
    let migrations: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM _sqlx_migrations")
        .fetch_one(&pool)
        .await
        .expect("a count");
    assert_eq!(migrations, 0, "the application's migrations are its own");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_can_create_the_tables_at_once() {
    let database = MariaDb::shared().database().await;
    let stores = (0..16).map(|_| async {
        let store = MySqlStore::connect(database.url()).await?;
        store.create_schema().await?;
        store.claim(&any_claim()).await
    });
    for answer in join_all(stores).await {
        assert!(matches!(answer, Ok(Claimed::Granted(_))), "{answer:?}");
    }
}

#[tokio::test]
async fn tables_of_another_release_are_refused_and_left_alone() {
    let (store, pool, _database) = bare().await;
    store.create_schema().await.expect("tables");
    run(&pool, "UPDATE idem_schema SET version = 2; DROP TABLE idem_records").await;
    let store = MySqlStore::new(pool.clone());
    assert_fails(store.claim(&any_claim()).await, StoreErrorKind::Newer);
    assert_fails(store.create_schema().await, StoreErrorKind::Newer);
    assert_eq!(tables(&pool).await, ["idem_schema"], "nothing was created");
    let error = store.check().await.expect_err("a failure");
    let source = std::error::Error::source(&error).expect("a source").to_string();
    assert_eq!(source, "its tables are of version 2, and not 1");
}

#[tokio::test]
async fn tables_that_somebody_left_unfinished_are_finished() {
    let (store, pool, _database) = bare().await;
    run(&pool, "CREATE TABLE idem_schema (id TINYINT UNSIGNED PRIMARY KEY, version INT UNSIGNED)")
        .await;
    assert_fails(store.claim(&any_claim()).await, StoreErrorKind::Refused);
    store.create_schema().await.expect("tables");
    granted(&store, &any_claim()).await;
}

#[tokio::test]
async fn what_the_account_may_not_do_is_refused() {
    let (store, pool, database) = bare().await;
    store.create_schema().await.expect("tables");
    let account = format!("idem_{:08x}", rand::random::<u32>());
    run(
        &pool,
        format!(
            "CREATE USER {account} IDENTIFIED BY 'secret';
             GRANT SELECT ON {}.* TO {account}",
            database.options().get_database().expect("a name"),
        ),
    )
    .await;
    let options = database.options().username(&account).password("secret");
    let reader = MySqlStore::new(MySqlPoolOptions::new().connect_lazy_with(options.clone()));
    assert!(reader.read(&any_claim().key).await.expect("an answer").is_none());
    assert_fails(reader.claim(&any_claim()).await, StoreErrorKind::Refused);
    let options = options.password("wrong");
    let nobody = MySqlStore::new(MySqlPoolOptions::new().connect_lazy_with(options));
    assert_fails(nobody.claim(&any_claim()).await, StoreErrorKind::Refused);
    assert_fails(MySqlStore::connect("no url").await, StoreErrorKind::Refused);
    let server = database.options().to_url_lossy().join("/").expect("a URL");
    let nowhere = MySqlStore::connect(server.as_str()).await.expect("a store");
    assert_fails(nowhere.create_schema().await, StoreErrorKind::Refused);
    assert_fails(nowhere.claim(&any_claim()).await, StoreErrorKind::Refused);
    run(&pool, format!("DROP USER {account}")).await;
}

#[tokio::test]
async fn rows_are_found_by_the_indices_that_are_made_for_it() {
    let fixture = Fixture::start().await;
    for _ in 0..50 {
        granted(&fixture.store, &any_claim()).await;
    }
    for (condition, index) in [
        ("operation_id = x'00112233445566778899aabbccddeeff'", "idem_records_operation_id"),
        ("kept_until <= 0 ORDER BY kept_until LIMIT 9", "idem_records_kept_until"),
    ] {
        let explain = format!("EXPLAIN SELECT payload FROM idem_records WHERE {condition}");
        let explain = sqlx::AssertSqlSafe(explain);
        let plan = sqlx::query(explain).fetch_one(&fixture.pool).await.expect("a plan");
        assert_eq!(plan.get::<String, _>("key"), index);
    }
}

#[tokio::test]
async fn a_damaged_row_is_refused_kept_and_left_out_of_a_listing() {
    let fixture = Fixture::start().await;
    let store = &fixture.store;
    let claims: Vec<_> = (0..4).map(|_| any_claim()).collect();
    for claim in &claims {
        granted(store, claim).await;
    }
    let damages = ["state = 9", "format = 0", "valid_until = kept_until + 1"];
    for (claim, damage) in claims.iter().zip(damages) {
        let damage = format!("UPDATE idem_records SET {damage} WHERE record_key = ?");
        let damage = sqlx::query(sqlx::AssertSqlSafe(damage)).bind(&claim.key.as_bytes()[..]);
        damage.execute(&fixture.pool).await.expect("damage");
    }
    for claim in &claims[..3] {
        assert_fails(store.claim(&claim_on(claim.key)).await, StoreErrorKind::Corrupt);
        assert_fails(store.read(&claim.key).await, StoreErrorKind::Corrupt);
        assert_fails(store.issue(&issue_on(claim.key)).await, StoreErrorKind::Corrupt);
        assert_fails(store.checkpoint(&checkpoint(claim, "")).await, StoreErrorKind::Corrupt);
        assert_fails(store.release(&claim.key, &claim.token).await, StoreErrorKind::Corrupt);
        assert_fails(store.forget(&claim.key, &claim.token).await, StoreErrorKind::Corrupt);
        assert_fails(store.find(&claim.operation_id).await, StoreErrorKind::Corrupt);
    }
    for claim in &claims[..2] {
        let answer = store.complete(&completion(claim, "answer")).await;
        assert_fails(answer, StoreErrorKind::Corrupt);
    }
    let listing = Listing { kind: Kind::Any, scope: None, after: None, limit: 9 };
    let listed = store.list(&listing).await.expect("a page").records;
    assert_eq!(listed.iter().map(|record| record.key).collect::<Vec<_>>(), [claims[3].key]);

    fixture.advance(HOUR * 2).await;
    assert_eq!(store.sweep(usize::MAX).await.expect("an answer"), 1, "what is sound is swept");
    for claim in &claims[..3] {
        let purged = store.purge(&Purge::Key(claim.key)).await.expect("an answer");
        assert_eq!(purged, Purged { removed: 1, running: 0 });
    }
}
