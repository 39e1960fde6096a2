//! Three processes behind one store, of which each is killed where it is told to die and replaced by
//! another, and clients that ask until they have an answer.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use reqwest::Client;
use tests::ledger::Effect;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStdout, Command},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::judge::Promise;

/// Long enough that a machine with much to do loses none of a living process.
const LEASE: Duration = Duration::from_secs(3);
/// Beyond this a request is not answered, or a mark not reached.
const PATIENCE: Duration = Duration::from_secs(60);
const PROCESSES: usize = 3;
/// At once. Many, since whoever is struck by a kill waits for the end of a lease.
const CLIENTS: usize = 100;

/// What has happened.
#[derive(Debug)]
pub(crate) struct Run {
    /// By key.
    pub(crate) stories: BTreeMap<String, Story>,
    /// Which process was killed at which mark.
    pub(crate) kills: HashMap<u32, String>,
    pub(crate) effects: Vec<Effect>,
}

/// What the clients of one key have seen.
#[derive(Debug, Default)]
pub(crate) struct Story {
    /// What they asked for.
    pub(crate) way: String,
    /// The answers that they would not ask for again.
    pub(crate) answers: Vec<Answer>,
    /// The processes that did not live to answer.
    pub(crate) broken: HashSet<u32>,
    pub(crate) out_of_time: bool,
    /// Whether somebody who asked when all was over got more than a replay.
    pub(crate) runs_at_the_end: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
    pub(crate) is_replay: bool,
}

impl Answer {
    /// The code of a refusal.
    pub(crate) fn code(&self) -> Option<&str> {
        self.body.split_once("\"code\":\"").and_then(|(_, rest)| rest.split('"').next())
    }

    /// Whether a client comes back after it.
    fn is_passing(&self) -> bool {
        match self.status {
            503 => true,
            409 | 500 => self.code() != Some("unknown_outcome"),
            _ => false,
        }
    }
}

/// A process that listens.
#[derive(Clone, Debug)]
struct Serving {
    number: u32,
    address: String,
}

/// Where the next process is to die.
#[derive(Debug)]
struct Death {
    mark: String,
    hit: usize,
}

/// The processes and their clients.
#[derive(Debug)]
pub(crate) struct Fleet {
    url: String,
    promise: Promise,
    flaw: Option<String>,
    seed: u64,
    client: Client,
    deaths: Mutex<Vec<Death>>,
    /// Processes that are still to die.
    dying: AtomicUsize,
    started: AtomicU32,
    serving: [Mutex<Option<Serving>>; PROCESSES],
    kills: Mutex<HashMap<u32, String>>,
    stories: Mutex<BTreeMap<String, Story>>,
}

impl Fleet {
    pub(crate) fn new(
        url: &str,
        promise: Promise,
        flaw: Option<&str>,
        marks: &[String],
        times: u64,
        seed: u64,
    ) -> Arc<Self> {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut deaths = Vec::new();
        for mark in (0..times).flat_map(|_| marks) {
            // Those that few requests come to need not be waited for twice.
            let most = if mark.contains("renew") { 1 } else { 3 };
            deaths.push(Death { mark: mark.clone(), hit: rng.random_range(1..=most) });
        }
        deaths.shuffle(&mut rng);
        // They take longest, so they come first.
        deaths.sort_by_key(|death| death.mark.contains("renew"));
        // Connections are not kept: one that broke has carried one request.
        let client = Client::builder().no_proxy().pool_max_idle_per_host(0);
        Arc::new(Self {
            url: url.to_owned(),
            promise,
            flaw: flaw.map(str::to_owned),
            seed,
            client: client.build().expect("a client"),
            dying: AtomicUsize::new(deaths.len()),
            deaths: Mutex::new(deaths),
            started: AtomicU32::new(1),
            serving: Default::default(),
            kills: Mutex::default(),
            stories: Mutex::default(),
        })
    }

    /// Which process was killed at which mark.
    pub(crate) fn kills(&self) -> HashMap<u32, String> {
        self.kills.lock().expect("a lock").clone()
    }

    /// Goes on until a process has died at each mark, and says what the clients have seen.
    pub(crate) async fn run(self: &Arc<Self>) -> BTreeMap<String, Story> {
        let slots: Vec<_> = (0..PROCESSES)
            .map(|slot| {
                let fleet = Arc::clone(self);
                tokio::spawn(async move { fleet.keep_up(slot).await })
            })
            .collect();
        let (mut rng, mut clients) = (StdRng::seed_from_u64(self.seed), JoinSet::new());
        let mut count = 0;
        while self.dying.load(Ordering::Relaxed) > 0 {
            count += 1;
            let (fleet, rng_of_client) = (Arc::clone(self), StdRng::seed_from_u64(rng.random()));
            clients.spawn(async move { fleet.pay(rng_of_client, count).await });
            sleep(Duration::from_millis(rng.random_range(10..40))).await;
            while clients.len() > CLIENTS {
                clients.join_next().await.expect("a client").expect("no panic");
            }
        }
        // With the panics of those that had one.
        clients.join_all().await;
        self.ask_everybody().await;
        // Their processes end with them.
        slots.iter().for_each(tokio::task::JoinHandle::abort);
        std::mem::take(&mut *self.stories.lock().expect("a lock"))
    }

    /// Has a process serve at one of the places, and replaces it when it dies.
    async fn keep_up(&self, slot: usize) {
        loop {
            let death = self.deaths.lock().expect("a lock").pop();
            let number = self.started.fetch_add(1, Ordering::Relaxed);
            let mut child = self.start(number, death.as_ref());
            let mut said = BufReader::new(child.stdout.take().expect("its output"));
            let heard = timeout(PATIENCE, self.listen(slot, number, &mut said)).await;
            let Some(death) = death else {
                // It lives to the end.
                std::future::pending::<()>().await;
                return;
            };
            match heard {
                Ok(true) => {
                    child.kill().await.expect("a living process");
                    self.serving[slot].lock().expect("a lock").take();
                    self.kills.lock().expect("a lock").insert(number, death.mark);
                }
                Ok(false) => panic!("process {number} ended before it came to {}", death.mark),
                Err(_) => eprintln!("process {number} never came to {}", death.mark),
            }
            self.dying.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn start(&self, number: u32, death: Option<&Death>) -> Child {
        let (mark, hit) = death.map_or(("", 0), |death| (&death.mark, death.hit));
        Command::new(env!("CARGO_BIN_EXE_teller"))
            .args([&self.url, self.promise.name()])
            .args([LEASE.as_millis().to_string(), number.to_string()])
            .args([mark, &hit.to_string()])
            .args(&self.flaw)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("a process")
    }

    /// Hears a process out; whether it stands still where it is to die.
    async fn listen(&self, slot: usize, number: u32, said: &mut BufReader<ChildStdout>) -> bool {
        let mut lines = said.lines();
        while let Some(line) = lines.next_line().await.expect("a line") {
            if let Some(address) = line.strip_prefix("listens at ") {
                let address = address.to_owned();
                *self.serving[slot].lock().expect("a lock") = Some(Serving { number, address });
            } else if line.starts_with("dies at ") {
                return true;
            }
        }
        false
    }

    /// A client has one payment made, and now and then asks twice.
    async fn pay(&self, mut rng: StdRng, number: u32) {
        let way = self.way(&mut rng);
        let key = format!("{}-{number}-{:08x}", self.promise.name(), self.seed as u32);
        if way == "voucher" {
            self.ask_until_answered(&mut rng, &key, way, "/vouchers").await;
        }
        let path = path(way);
        // A flaw is to be found in little time.
        if self.flaw.is_some() || rng.random_ratio(1, 4) {
            let mut other = StdRng::seed_from_u64(rng.random());
            tokio::join!(
                self.ask_until_answered(&mut rng, &key, way, path),
                self.ask_until_answered(&mut other, &key, way, path),
            );
        } else {
            self.ask_until_answered(&mut rng, &key, way, path).await;
        }
        if rng.random_ratio(1, 2) {
            self.ask_until_answered(&mut rng, &key, way, path).await;
        }
    }

    fn way(&self, rng: &mut StdRng) -> &'static str {
        let leased = self.promise != Promise::Transaction;
        match rng.random_range(0..20) {
            0 if leased => "slow",
            1..=3 if leased => "stepwise",
            4..=6 => "voucher",
            7..=8 => "failing",
            9..=10 => "declined",
            11..=12 => "refused",
            _ => "plain",
        }
    }

    /// Asks anybody, until there is an answer.
    async fn ask_until_answered(&self, rng: &mut StdRng, key: &str, way: &str, path: &str) {
        self.stories.lock().expect("a lock").entry(key.to_owned()).or_default().way =
            way.to_owned();
        let start = Instant::now();
        loop {
            let serving = self.serving[rng.random_range(0..PROCESSES)].lock();
            let serving = serving.expect("a lock").clone();
            if let Some(serving) = serving {
                let answer = self.ask(&serving, key, way, path).await;
                let mut stories = self.stories.lock().expect("a lock");
                let story = stories.entry(key.to_owned()).or_default();
                match answer {
                    Ok(answer) if answer.is_passing() => {}
                    Ok(answer) if path == "/vouchers" => {
                        assert_eq!(answer.status, 204, "{answer:?}");
                        return;
                    }
                    Ok(answer) => {
                        story.answers.push(answer);
                        return;
                    }
                    Err(error) if error.is_connect() => {}
                    Err(_) => {
                        story.broken.insert(serving.number);
                    }
                }
                if start.elapsed() > PATIENCE {
                    story.out_of_time = true;
                    return;
                }
            }
            sleep(Duration::from_millis(rng.random_range(40..120))).await;
        }
    }

    async fn ask(
        &self,
        serving: &Serving,
        key: &str,
        way: &str,
        path: &str,
    ) -> Result<Answer, reqwest::Error> {
        let body = if path == "/vouchers" { key.to_owned() } else { format!("{way} {key}") };
        let request = self.client.post(format!("http://{}{path}", serving.address));
        let response = request.header("idempotency-key", key).body(body).send().await?;
        let status = response.status().as_u16();
        let is_replay = response.headers().contains_key("idempotent-replayed");
        Ok(Answer { status, body: response.text().await?, is_replay })
    }

    /// When nobody dies any more, every process gives the same answers.
    async fn ask_everybody(&self) {
        let keys: Vec<_> = {
            let stories = self.stories.lock().expect("a lock");
            let recorded = stories.iter().filter(|(_, story)| story.way != "declined");
            recorded.map(|(key, story)| (key.clone(), story.way.clone())).collect()
        };
        join_all(self.serving.iter().map(async |slot| {
            let start = Instant::now();
            let serving = loop {
                if let Some(serving) = slot.lock().expect("a lock").clone() {
                    break serving;
                }
                assert!(start.elapsed() < PATIENCE, "a process does not start");
                sleep(Duration::from_millis(10)).await;
            };
            for (key, way) in &keys {
                // In a transaction, two who are to be answered from one record at the same moment
                // are in each other's way.
                let answer = loop {
                    let answer = self.ask(&serving, key, way, path(way)).await;
                    let answer = answer.expect("an answer");
                    if !answer.is_passing() {
                        break answer;
                    }
                    assert!(start.elapsed() < PATIENCE, "{key} is not answered: {answer:?}");
                    sleep(Duration::from_millis(10)).await;
                };
                let mut stories = self.stories.lock().expect("a lock");
                let story = stories.get_mut(key).expect("a story");
                let settled = answer.is_replay || answer.code() == Some("unknown_outcome");
                story.runs_at_the_end |= !settled;
                story.answers.push(answer);
            }
        }))
        .await;
    }
}

/// Where such orders go.
fn path(way: &str) -> &'static str {
    if way == "voucher" { "/redemptions" } else { "/payments" }
}
