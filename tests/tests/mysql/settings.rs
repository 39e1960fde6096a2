//! Settings of the server and of the application's connections.

use sqlx::Executor as _;

use super::*;

/// A store over connections on which the application says something first.
fn with_settings(database: &Database, settings: &'static str) -> MySqlStore {
    let pool = MySqlPoolOptions::new().after_connect(move |connection, _| {
        Box::pin(async move { connection.execute(settings).await.map(drop) })
    });
    MySqlStore::new(pool.connect_lazy_with(database.options()))
}

#[tokio::test]
async fn no_setting_of_a_connection_changes_what_is_kept() {
    let fixture = Fixture::start().await;
    for settings in [
        "SET SESSION sql_mode = ''",
        "SET SESSION sql_mode = 'ANSI,NO_BACKSLASH_ESCAPES,PAD_CHAR_TO_FULL_LENGTH'",
        "SET SESSION sql_mode = 'SIMULTANEOUS_ASSIGNMENT,NO_UNSIGNED_SUBTRACTION'",
        "SET NAMES latin1",
        "SET NAMES utf8mb3",
        "SET SESSION time_zone = '+13:00'",
        "SET SESSION time_zone = '-11:45'",
        "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
        "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    ] {
        let other = with_settings(&fixture.database, settings);
        for (store, reader) in [(&other, &fixture.store), (&fixture.store, &other)] {
            let claim = Claim {
                operation: Arc::from("POST /größe/{}\n\"'; --\\\u{1F980}"),
                fingerprint: Fingerprint {
                    scheme: "é\u{1F980} ".repeat(50).into(),
                    digest: [0; 32],
                },
                ..any_claim()
            };
            granted(store, &claim).await;
            assert_eq!(store.renew(&[renewal(&claim)]).await.expect("an answer"), [true]);
            let payload: Vec<u8> = (0..=255).cycle().take(100_000).collect();
            let answer = Completion { flags: Flags::TOMBSTONE, ..completion(&claim, payload) };
            assert_done(&store.complete(&answer).await);
            let record = kept(reader, &claim.key).await;
            assert_eq!(record.operation, claim.operation, "{settings}");
            assert_eq!(record.fingerprint, claim.fingerprint, "{settings}");
            assert_eq!(record.flags, answer.flags, "{settings}");
            assert!(record.payload == answer.payload, "{settings}");
            let Ttl::For(left) = record.kept_left else { panic!("it has an end ({settings})") };
            assert!(left <= HOUR && left > HOUR - PATIENCE, "{left:?} are left ({settings})");
        }
    }
}

#[tokio::test]
async fn connections_that_would_break_the_laws_are_refused() {
    let fixture = Fixture::start().await;
    for settings in
        ["SET SESSION autocommit = 0", "SET SESSION TRANSACTION ISOLATION LEVEL READ UNCOMMITTED"]
    {
        let store = with_settings(&fixture.database, settings);
        assert_fails(store.claim(&any_claim()).await, StoreErrorKind::Refused);
        assert_fails(store.check().await, StoreErrorKind::Refused);
    }
}

#[tokio::test]
async fn a_server_that_commits_nothing_by_itself_is_told_to() {
    let server =
        MariaDb::start_own_with("--autocommit=0 --sql-mode= --transaction-isolation=SERIALIZABLE");
    let database = server.database().await;
    let store = MySqlStore::connect(database.url()).await.expect("a store");
    store.create_schema().await.expect("tables");
    let claim = any_claim();
    granted(&store, &claim).await;
    let other = MySqlStore::connect(database.url()).await.expect("a store");
    assert_eq!(kept(&other, &claim.key).await.token, claim.token);
}

#[tokio::test]
async fn a_record_that_fits_into_no_packet_is_too_large() {
    let server = MariaDb::start_own_with("--max-allowed-packet=1M");
    let fixture = Fixture::on(&server).await;
    let store = &fixture.store;
    let claim = any_claim();
    granted(store, &claim).await;
    for size in [1 << 20, 5 << 20, 40 << 20] {
        let answer = store.complete(&completion(&claim, vec![7; size])).await;
        assert_fails(answer, StoreErrorKind::TooLarge);
    }
    let answer = completion(&claim, vec![7; (1 << 20) - 4096]);
    assert_done(&store.complete(&answer).await);
    assert_eq!(kept(store, &claim.key).await.payload, answer.payload);
}

#[tokio::test]
async fn a_full_table_takes_no_claims_and_keeps_what_it_has() {
    let server = MariaDb::start_own_with(
        "--innodb-data-file-path=ibdata1:12M:autoextend:max:14M --innodb-file-per-table=0",
    );
    let fixture = Fixture::on(&server).await;
    let store = fixture.store.clone().with_timeout(PATIENCE);
    let first = any_claim();
    granted(&store, &first).await;
    let full = loop {
        let claim = any_claim();
        granted(&store, &claim).await;
        if let Err(error) = store.complete(&completion(&claim, vec![7; 500_000])).await {
            break error;
        }
    };
    assert_eq!(full.kind(), StoreErrorKind::Full, "{full:?}");
    assert_eq!(kept(&store, &first.key).await.token, first.token);
}
