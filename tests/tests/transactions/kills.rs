//! Processes that are killed (`SIGKILL`) in a transactional handler.

use std::{
    io::{BufRead, BufReader},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use reqwest::{Client, Response};

use crate::bank::{Base, PATIENCE};

struct Vault {
    child: Child,
    said: BufReader<ChildStdout>,
    address: String,
}

impl Vault {
    fn start(url: &str, stops_after_the_commit: bool) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vault"))
            .arg(url)
            .args(stops_after_the_commit.then_some("after the commit"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let said = BufReader::new(child.stdout.take().expect("its output"));
        let mut vault = Self { child, said, address: String::new() };
        vault.address = vault.listen();
        vault
    }

    fn listen(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).expect("a line");
        line.trim().to_owned()
    }

    fn kill(&mut self) {
        self.child.kill().expect("a living process");
        self.child.wait().expect("its end");
    }

    /// Asks for a deposit; the body says where it stops.
    fn ask(
        &self,
        key: &str,
        body: &str,
    ) -> impl Future<Output = Result<Response, reqwest::Error>> + Send + use<> {
        let client = Client::builder().no_proxy().build().expect("a client");
        let request = client.post(format!("http://{}/", self.address));
        request.header("Idempotency-Key", key).body(body.to_owned()).send()
    }

    async fn deposit(&self, key: &str, body: &str) -> (u16, bool, String) {
        let answer = self.ask(key, body).await.expect("an answer");
        let replayed = answer.headers().contains_key("idempotent-replayed");
        (answer.status().as_u16(), replayed, answer.text().await.expect("a body"))
    }
}

impl Drop for Vault {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub async fn exactly_one_effect_through_a_kill_at_any_point<B: Base>() {
    let base = B::open(5).await;
    let table = "CREATE TABLE deposits (what VARCHAR(100) NOT NULL)";
    B::execute(&mut *base.connection().await, table.into()).await.expect("a table");
    for (done, place) in [
        (0, "before the effect"),
        (0, "after the effect"),
        (0, "before the commit"),
        (1, "after the commit"),
    ] {
        B::execute(&mut *base.connection().await, "DELETE FROM deposits".into())
            .await
            .expect("an empty table");
        let mut killed = Vault::start(&base.url(), place == "after the commit");
        let request = tokio::spawn(killed.ask(place, place));
        killed = tokio::task::spawn_blocking(move || {
            assert_eq!(killed.listen(), "stopped");
            killed
        })
        .await
        .expect("a stop");
        let other = Vault::start(&base.url(), false);
        if done == 0 && B::SEVERAL_WRITERS {
            let (status, _, body) = other.deposit(place, place).await;
            assert_eq!(status, 409, "{place}: {body}");
        }
        killed.kill();
        assert!(request.await.expect("its end").is_err(), "{place}: nobody was answered");
        let count = "SELECT count(*) FROM deposits".to_owned();
        let effects = B::number(&mut *base.connection().await, count.clone()).await;
        assert_eq!(effects.expect("a count"), done, "{place}");
        if done == 1 {
            let answer = other.deposit(place, place).await;
            assert_eq!(answer, (201, true, place.to_owned()));
        }
        // Where it would stop again, another body under the same key runs if, and only if, nothing
        // has come of the first one.
        let start = Instant::now();
        loop {
            let (status, replayed, body) = other.deposit(place, "go on").await;
            if status == 409 {
                // The server has not noticed yet that the connection is gone.
                assert!(start.elapsed() < PATIENCE, "{place}: {body}");
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
            match done {
                0 => assert_eq!((status, replayed), (201, false), "{place}: {body}"),
                _ => assert_eq!(status, 422, "{place}: {body}"),
            }
            break;
        }
        let effects = B::number(&mut *base.connection().await, count).await;
        assert_eq!(effects.expect("a count"), 1, "{place}");
    }
}
