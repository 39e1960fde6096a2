//! The load: connections that are kept open, requests that are made beforehand but for their key,
//! answers that are checked. It must be cheaper than the cheapest server.

use std::{
    io::{Error, Result},
    sync::Arc,
    time::{Duration, Instant},
};

use bench::{
    keys,
    order::{OTHER_REQUEST, REQUEST},
};
use memchr::memmem;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};

/// The characters of a key, which looks like a UUID.
const KEY: usize = 36;
const BLANK_KEY: &str = "00000000-0000-0000-0000-000000000000";

fn write_key(key: &[u8; 32], into: &mut [u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let places = (0..KEY).filter(|at| ![8, 13, 18, 23].contains(at));
    let nibbles = key.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    for (place, nibble) in places.zip(nibbles) {
        into[place] = DIGITS[usize::from(nibble)];
    }
}

/// A request without its key.
#[derive(Clone)]
struct Template {
    bytes: Vec<u8>,
    key: usize,
    /// Where the session's cookie is.
    session: Option<usize>,
}

impl Template {
    fn new(path: &str, body: &str, session: Option<&str>) -> Self {
        let cookie = session.map_or_else(String::new, |it| format!("cookie: session={it}\r\n"));
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\nx-api-key: tenant-1\r\n\
             idempotency-key: {BLANK_KEY}\r\n{cookie}content-type: application/json\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        let place = |what: &str| head.find(what);
        Self {
            key: place(BLANK_KEY).unwrap_or_default(),
            session: session.and_then(place),
            bytes: (head.clone() + body).into_bytes(),
        }
    }
}

/// What is asked in a burst.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Under a key of its own each time.
    Fresh,
    /// What was asked before.
    Again,
    /// Something else under a key that was used before.
    Other,
    /// What is being done at the moment, under one key.
    Held,
}

/// What must be answered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Of the body, where it is known.
    pub(crate) length: Option<usize>,
}

/// One connection that is kept open.
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    number: usize,
}

impl Connection {
    async fn open(port: u16, number: usize) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: vec![0; 4096], number })
    }

    /// Sends a request and reads its answer; the buffer begins with it then, and ends with what was
    /// left of others.
    async fn exchange(&mut self, request: &[u8]) -> Result<Answer> {
        self.stream.write_all(request).await?;
        let mut filled = 0;
        loop {
            let read = self.stream.read(&mut self.buffer[filled..]).await?;
            if read == 0 {
                return Err(Error::other("the connection was closed, or the answer is too long"));
            }
            filled += read;
            let answer = &self.buffer[..filled];
            let Some(head) = memmem::find(answer, b"\r\n\r\n") else { continue };
            let length = memmem::find(&answer[..head], b"content-length: ");
            let length = length.map(|at| number(&answer[at + 16..head]));
            let length = length.ok_or_else(|| Error::other("an answer without its length"))?;
            if filled < head + 4 + length {
                continue;
            }
            if filled > head + 4 + length || !answer.starts_with(b"HTTP/1.1 ") {
                return Err(Error::other("an answer that is none"));
            }
            return Ok(Answer { status: number(&answer[9..]) as u16, length: Some(length) });
        }
    }

    /// Asks until the time is over, and at least so many times.
    async fn drive(mut self, mut plan: Plan) -> Result<Driven> {
        let mut latencies = Vec::with_capacity(1024);
        let mut asked = 0;
        let mut sent = Instant::now();
        loop {
            plan.fill(self.number, asked);
            let answer = self.exchange(&plan.template.bytes).await?;
            if answer.status != plan.expected.status
                || plan.expected.length.is_some_and(|length| answer.length != Some(length))
            {
                let said = String::from_utf8_lossy(&self.buffer).into_owned();
                let said = said.trim_end_matches('\0');
                return Err(Error::other(format!("a wrong answer: {said}")));
            }
            asked += 1;
            let now = Instant::now();
            latencies.push(now - sent);
            sent = now;
            if now > plan.until && asked >= plan.at_least {
                return Ok(Driven { connection: self, latencies, asked });
            }
        }
    }
}

fn number(text: &[u8]) -> usize {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |number, digit| 10 * number + usize::from(digit - b'0'))
}

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

async fn in_time<T>(until: Instant, answer: impl Future<Output = T>) -> Result<T> {
    let answer = tokio::time::timeout_at(until.into(), answer).await;
    answer.map_err(|_| Error::other("a request is not answered"))
}

/// What one connection does in a burst.
struct Plan {
    template: Template,
    ask: Ask,
    /// The burst whose keys are used.
    burst: u32,
    /// How many keys this connection has used before.
    used: u32,
    sessions: Arc<[String]>,
    expected: Answer,
    until: Instant,
    at_least: u32,
}

impl Plan {
    fn fill(&mut self, connection: usize, asked: u32) {
        let number = match self.ask {
            Ask::Fresh => asked,
            Ask::Again | Ask::Other => asked % self.used,
            Ask::Held => 0,
        };
        let connection = if self.ask == Ask::Held { 0 } else { connection };
        let key = self.template.key;
        let named = keys::key(self.burst, connection, number);
        write_key(&named, &mut self.template.bytes[key..key + KEY]);
        if let Some(at) = self.template.session {
            // Each key belongs to one session.
            let session = &self.sessions[(connection + number as usize * 7) % self.sessions.len()];
            self.template.bytes[at..at + session.len()].copy_from_slice(session.as_bytes());
        }
    }
}

struct Driven {
    connection: Connection,
    latencies: Vec<Duration>,
    asked: u32,
}

/// What a burst has come to.
pub(crate) struct Burst {
    pub(crate) answers: u64,
    /// Until the last of them.
    pub(crate) time: Duration,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
}

/// How many keys are repeated.
const REPEATED: u32 = 256;

/// Of these, by each of so many connections.
fn repeated(connections: usize) -> u32 {
    (REPEATED / connections as u32).max(1)
}

/// All connections to one server.
pub(crate) struct Load {
    port: u16,
    connections: Vec<Connection>,
    control: Connection,
    sessions: Arc<[String]>,
    /// The last burst of fresh keys, and how many of them each connection has used.
    last: (u32, Vec<u32>),
    next: u32,
}

/// How many sessions keys are spread over, where they belong to sessions.
const SESSIONS: usize = 400;

impl Load {
    pub(crate) async fn new(port: u16, connections: usize, sessions: bool) -> Result<Self> {
        let mut load = Self {
            port,
            connections: Vec::new(),
            control: Connection::open(port, 0).await?,
            sessions: [].into(),
            last: (0, Vec::new()),
            next: 1,
        };
        for number in 0..connections {
            load.connections.push(Connection::open(port, number).await?);
        }
        if sessions {
            let mut all = Vec::new();
            for _ in 0..SESSIONS {
                all.push(load.begin_session().await?);
            }
            load.sessions = all.into();
        }
        Ok(load)
    }

    async fn begin_session(&mut self) -> Result<String> {
        let request = b"POST /session HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n";
        self.control.exchange(request).await?;
        let end = memmem::find(&self.control.buffer, b"\r\n\r\n").unwrap_or_default();
        let head = String::from_utf8_lossy(&self.control.buffer[..end]);
        let cookie = head.split("set-cookie: session=").nth(1);
        let cookie = cookie.and_then(|rest| rest.split([';', '\r']).next());
        Ok(cookie.ok_or_else(|| Error::other("no session"))?.to_owned())
    }

    async fn ask(&mut self, path: &str) -> Result<u64> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
        let answer = self.control.exchange(request.as_bytes()).await?;
        let head = memmem::find(&self.control.buffer, b"\r\n\r\n").unwrap_or_default();
        match answer.status {
            200 => {
                let length = answer.length.unwrap_or_default();
                Ok(number(&self.control.buffer[head + 4..][..length]) as u64)
            }
            status => Err(Error::other(format!("{path} answers {status}"))),
        }
    }

    /// How often a handler was executed.
    pub(crate) async fn executed(&mut self) -> Result<u64> {
        self.ask("/executed").await
    }

    /// Starts a request that goes on until [`release`](Self::release), under the key of the next
    /// burst of [`Ask::Held`].
    pub(crate) async fn hold(&mut self) -> Result<Holding> {
        let mut connection = Connection::open(self.port, 0).await?;
        let mut plan = self.plan(Ask::Held, Answer { status: 201, length: None }, Instant::now());
        plan.fill(0, 0);
        let mut holding = tokio::spawn(async move {
            let answer = connection.exchange(&plan.template.bytes).await?;
            let said = String::from_utf8_lossy(&connection.buffer);
            Ok((answer, said.trim_end_matches('\0').to_owned()))
        });
        while self.ask("/held").await? == 0 {
            if holding.is_finished() {
                let (_, said) = (&mut holding).await??;
                return Err(Error::other(format!("what should go on has ended: {said}")));
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(Holding(holding))
    }

    pub(crate) async fn release(&mut self, holding: Holding) -> Result<()> {
        self.ask("/release").await?;
        self.next += 1;
        match in_time(Instant::now() + PATIENCE, holding.0).await???.0.status {
            201 => Ok(()),
            status => Err(Error::other(format!("the held request was answered with {status}"))),
        }
    }

    fn plan(&self, ask: Ask, expected: Answer, until: Instant) -> Plan {
        let path = if ask == Ask::Held { "/held" } else { "/orders" };
        let body = if ask == Ask::Other { OTHER_REQUEST } else { REQUEST };
        let session = self.sessions.first().map(String::as_str);
        let burst = match ask {
            Ask::Fresh | Ask::Held => self.next,
            Ask::Again | Ask::Other => self.last.0,
        };
        let template = Template::new(path, body, session);
        let sessions = Arc::clone(&self.sessions);
        Plan { template, ask, burst, used: 0, sessions, expected, until, at_least: 1 }
    }

    /// Asks over this many connections at once, for this long.
    pub(crate) async fn burst(
        &mut self,
        ask: Ask,
        connections: usize,
        time: Duration,
        expected: Answer,
    ) -> Result<Burst> {
        self.ask_all(ask, connections, time, expected, 1).await
    }

    /// Repeats each request that will be repeated once, so that whoever keeps answers at hand has
    /// them.
    pub(crate) async fn rehearse(&mut self, connections: usize, expected: Answer) -> Result<()> {
        let repeated = repeated(connections);
        self.ask_all(Ask::Again, connections, Duration::ZERO, expected, repeated).await?;
        Ok(())
    }

    async fn ask_all(
        &mut self,
        ask: Ask,
        connections: usize,
        time: Duration,
        expected: Answer,
        at_least: u32,
    ) -> Result<Burst> {
        let mut driving = JoinSet::new();
        let idle = self.connections.split_off(connections);
        let start = Instant::now();
        let until = start + time;
        for connection in std::mem::take(&mut self.connections) {
            let mut plan = self.plan(ask, expected, until);
            let used = self.last.1.get(connection.number).copied().unwrap_or_default();
            plan.used = used.min(repeated(connections));
            plan.at_least = at_least.min(plan.used).max(1);
            driving.spawn(connection.drive(plan));
        }
        let mut used = vec![0; connections];
        let mut latencies = Vec::new();
        let give_up = until + PATIENCE;
        while !driving.is_empty() {
            let Ok(driven) = in_time(give_up, driving.join_next()).await else {
                let (held, left) = (self.ask("/held").await?, driving.len());
                let error = format!("{left} requests are not answered; {held} handlers go on");
                return Err(Error::other(error));
            };
            let Some(driven) = driven else { break };
            let driven = driven??;
            used[driven.connection.number] = driven.asked;
            latencies.extend(driven.latencies);
            self.connections.push(driven.connection);
        }
        self.connections.sort_by_key(|connection| connection.number);
        self.connections.extend(idle);
        let time = start.elapsed();
        if ask == Ask::Fresh {
            self.last = (self.next, used);
            self.next += 1;
        }
        latencies.sort_unstable();
        let at = |share: f64| latencies[(share * latencies.len() as f64) as usize];
        Ok(Burst { answers: latencies.len() as u64, time, p50: at(0.5), p99: at(0.99) })
    }
}

/// A request that goes on.
pub(crate) struct Holding(tokio::task::JoinHandle<Result<(Answer, String)>>);
