//! Drives an example from outside: the real program, a real client.

#![allow(dead_code, unused_imports, reason = "each example's tests use what they need")]

mod curl;
pub(crate) mod proxy;

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use reqwest::{Client, Method, RequestBuilder};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;

pub(crate) use curl::Shell;

/// For how long a program may be silent.
const SILENCE: Duration = Duration::from_secs(30);

/// A running example on a free port. It is killed when it is dropped, also by a failing test.
pub(crate) struct Server {
    pub(crate) url: String,
    pub(crate) client: Client,
    child: Child,
    lines: Receiver<String>,
    /// Where its database is, if it has one of its own.
    directory: Option<TempDir>,
}

/// The example over each of its stores, one after the other.
pub(crate) fn over_each_store(program: &'static str) -> impl Iterator<Item = Server> {
    over_each_store_with(program, &[])
}

/// The same, with more switches.
pub(crate) fn over_each_store_with(
    program: &'static str,
    switches: &'static [&'static str],
) -> impl Iterator<Item = Server> {
    [false, true].into_iter().map(move |durable| {
        let directory = durable.then(|| TempDir::new().expect("a directory"));
        let store = match &directory {
            Some(directory) => sqlite(directory.path()),
            None => "memory".to_owned(),
        };
        let mut server = Server::start(program, &[&["--store", &store], switches].concat());
        server.directory = directory;
        server
    })
}

/// The switch's value for a database in a directory.
pub(crate) fn sqlite(directory: &Path) -> String {
    format!("sqlite:{}", directory.join("records.db").display())
}

impl Server {
    /// Starts a program and waits until it listens.
    pub(crate) fn start(program: &str, switches: &[&str]) -> Self {
        Self::start_on(0, program, switches)
    }

    /// The same on a port that others know.
    pub(crate) fn start_on(port: u16, program: &str, switches: &[&str]) -> Self {
        let mut child = Command::new(program)
            .args(["--port", &port.to_string()])
            .args(switches)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let (send, lines) = channel();
        std::thread::spawn(move || {
            // It reads to the end even if nobody listens, so that the program can always print.
            for line in stdout.lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        let client = Client::builder().no_proxy().build().expect("a client");
        let url = String::new();
        let mut server = Self { url, client, child, lines, directory: None };
        let line = server.line_with("http://");
        let url = line.split_whitespace().find_map(|word| word.strip_prefix("http://"));
        server.url = format!("http://{}", url.expect("an address").trim_end_matches(','));
        server
    }

    /// Waits for a line of its output.
    pub(crate) fn line_with(&self, text: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(SILENCE);
            let line = line.unwrap_or_else(|_| panic!("it never printed {text:?}"));
            if line.contains(text) {
                return line;
            }
        }
    }

    /// A line of its output, if it has printed it since the last one that was asked for.
    pub(crate) fn printed(&self, text: &str) -> Option<String> {
        self.lines.try_iter().find(|line| line.contains(text))
    }

    /// Kills it as a crash does.
    pub(crate) fn crash(mut self) -> Option<TempDir> {
        self.directory.take()
    }

    /// Asks it to stop, and says whether it ended well.
    #[cfg(unix)]
    pub(crate) fn terminate(mut self) -> bool {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill").success());
        self.child.wait().expect("its end").success()
    }

    pub(crate) fn get(&self, path: &str) -> RequestBuilder {
        self.request(Method::GET, path)
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> RequestBuilder {
        self.request(Method::POST, path).json(body)
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    /// Tells the downstream how to behave.
    pub(crate) async fn behave(&self, behaviour: Value) {
        let told = send(self.post("/_downstream", &behaviour)).await;
        assert_eq!(told.status, 200, "{}", told.text());
    }

    /// How often something really happened.
    pub(crate) async fn effects(&self, name: &str) -> u64 {
        send(self.get("/_effects")).await.json()[name].as_u64().unwrap_or_default()
    }

    /// Sends a request and returns once the downstream is at work on it; aborting the task hangs
    /// up.
    pub(crate) async fn begin(&self, request: RequestBuilder) -> JoinHandle<Answer> {
        let calls = self.calls().await;
        let task = tokio::spawn(send(request));
        self.until(async || self.calls().await > calls).await;
        task
    }

    /// How many calls of the downstream have begun.
    pub(crate) async fn calls(&self) -> u64 {
        send(self.get("/_downstream")).await.json()["calls"].as_u64().expect("a number")
    }

    /// Waits until something is so.
    pub(crate) async fn until(&self, is_so: impl AsyncFn() -> bool) {
        for _ in 0..1_000 {
            if is_so().await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it did not come to be within ten seconds");
    }

    /// Sends a request again and again for as long as it is in flight, as a good client does.
    pub(crate) async fn patiently(&self, request: &RequestBuilder) -> Answer {
        for _ in 0..200 {
            let answer = send(request.try_clone().expect("a plain body")).await;
            if ![409, 429].contains(&answer.status) || answer.headers.get("retry-after").is_none() {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("it stays in flight");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a request to a server that must answer.
pub(crate) async fn send(request: RequestBuilder) -> Answer {
    let response = request.send().await.expect("an answer");
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    Answer { status, headers, body: response.bytes().await.expect("a whole body").to_vec() }
}

/// Sends a request `n` times at once.
pub(crate) async fn send_at_once(request: &RequestBuilder, n: usize) -> Vec<Answer> {
    let copies = || request.try_clone().expect("a plain body");
    all((0..n).map(|_| copies())).await
}

/// Sends requests at once.
pub(crate) async fn all(requests: impl IntoIterator<Item = RequestBuilder>) -> Vec<Answer> {
    let tasks: Vec<_> = requests.into_iter().map(|request| tokio::spawn(send(request))).collect();
    let mut answers = Vec::new();
    for task in tasks {
        answers.push(task.await.expect("an answer"));
    }
    answers
}

/// A whole response.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }

    /// The error's code, where an error is `{"error": {"code", "message"}}`.
    pub(crate) fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }

    pub(crate) fn is_replay(&self) -> bool {
        self.headers.get("idempotent-replayed").is_some_and(|value| value == "true")
    }

    /// It is a replay of that answer: status, body, content type.
    #[track_caller]
    pub(crate) fn replays(&self, original: &Self) {
        assert!(self.is_replay(), "not a replay: {} {}", self.status, self.text());
        assert_eq!(self.status, original.status);
        assert_eq!(self.body, original.body);
        assert_eq!(self.headers.get("content-type"), original.headers.get("content-type"));
    }

    /// It ran: created, and not replayed.
    #[track_caller]
    pub(crate) fn is_created(&self) {
        assert_eq!(self.status, 201, "{}", self.text());
        assert!(!self.is_replay());
    }

    #[track_caller]
    pub(crate) fn is_error(&self, status: u16, code: &str) {
        assert_eq!((self.status, &*self.code()), (status, code), "{}", self.text());
        assert!(self.json()["error"]["message"].is_string());
    }
}

/// The downstream's next calls fail.
pub(crate) fn failing(calls: u32, status: u16) -> Value {
    json!({ "fail": calls, "status": status })
}

/// The downstream's next call does what it should, and its answer is lost.
pub(crate) fn answer_lost() -> Value {
    json!({ "fail": 1, "status": 504, "after_effect": true })
}

/// The downstream takes long enough for a busy machine to send a few requests meanwhile.
pub(crate) fn slow() -> Value {
    json!({ "latency_ms": 1_000 })
}
