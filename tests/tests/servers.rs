//! The servers of the tests: each does what it is told and leaves nothing behind.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use sqlx::{Connection as _, PgConnection};
use tests::servers::postgres::{Database, Postgres};
use tokio::time::timeout;

/// Beyond this a test has failed.
const PATIENCE: Duration = Duration::from_secs(20);

async fn ask(database: &Database) -> Result<i32, sqlx::Error> {
    let mut connection = PgConnection::connect_with(&database.options()).await?;
    sqlx::query_scalar("SELECT count(*)::int FROM t").fetch_one(&mut connection).await
}

#[tokio::test]
async fn postgres_is_stopped_killed_restarted_and_paused() {
    let server = Postgres::start_own();
    let database = server.database().await;
    let mut connection = PgConnection::connect(database.url()).await.expect("a connection");
    sqlx::raw_sql("CREATE TABLE t (n int)").execute(&mut connection).await.expect("a table");
    assert_eq!(ask(&database).await.expect("an answer"), 0);

    let first = server.pid();
    server.kill();
    assert!(matches!(ask(&database).await, Err(sqlx::Error::Io(_))), "nobody listens");
    connection.ping().await.expect_err("the connection died with the server");
    server.restart();
    assert_ne!(server.pid(), first);
    assert_eq!(ask(&database).await.expect("an answer"), 0, "what was committed is there");

    server.stop();
    assert!(matches!(ask(&database).await, Err(sqlx::Error::Io(_))), "nobody listens");
    server.restart();

    let mut connection = PgConnection::connect(database.url()).await.expect("a connection");
    server.pause();
    {
        let answer = timeout(Duration::from_millis(300), connection.ping()).await;
        answer.expect_err("an open connection is not answered");
        let answer = timeout(Duration::from_millis(300), ask(&database)).await;
        answer.expect_err("nor is a new one");
    }
    server.resume();
    let answer = timeout(PATIENCE, ask(&database)).await;
    assert_eq!(answer.expect("an answer in time").expect("an answer"), 0);
}

#[tokio::test]
async fn tests_share_a_server_and_no_database() {
    let [one, other] = [Postgres::shared(), Postgres::shared()];
    assert!(std::ptr::eq(one, other));
    let (one, other) = (one.database().await, other.database().await);
    let mut connection = PgConnection::connect(one.url()).await.expect("a connection");
    sqlx::raw_sql("CREATE TABLE t (n int)").execute(&mut connection).await.expect("a table");
    assert_eq!(ask(&one).await.expect("an answer"), 0);
    ask(&other).await.expect_err("the table is in another database");
}

/// The other half of the next test, in a process of its own.
#[test]
#[ignore = "it never ends"]
fn holds_servers() {
    let postgres = Postgres::start_own();
    let directory = postgres.directory().display();
    println!("\nholding {} {directory}", postgres.pid());
    loop {
        std::thread::park();
    }
}

#[test]
fn servers_die_with_a_process_that_is_killed() {
    let test = std::env::current_exe().expect("this program");
    let mut holder = Command::new(test)
        .args(["--ignored", "--exact", "holds_servers", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("a process");
    let said = BufReader::new(holder.stdout.take().expect("its output")).lines();
    let mut said = said.map(|line| line.expect("a line"));
    let line = said.find_map(|line| line.strip_prefix("holding ").map(str::to_owned));
    let line = line.expect("a server");
    let (pid, directory) = line.split_once(' ').expect("two words");
    assert!(Path::new(directory).is_dir());
    assert!(Path::new("/proc").join(pid).is_dir());

    holder.kill().expect("a living process");
    holder.wait().expect("its end");
    let start = Instant::now();
    while Path::new("/proc").join(pid).exists() || Path::new(directory).exists() {
        assert!(start.elapsed() < PATIENCE, "the server {pid} in {directory} is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
}
