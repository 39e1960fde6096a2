//! Redis, alone and as a cluster.

use std::{
    ops::RangeInclusive,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use redis::{Client, FromRedisValue, RedisResult};

use crate::{Goodbye, PATIENCE, Process, free_port, program, words};

/// Names a server to use instead of one that the tests start.
const URL: &str = "IDEM_TEST_REDIS_URL";
/// Names nodes of a cluster to use instead of one that the tests start, with commas in between.
const CLUSTER_URL: &str = "IDEM_TEST_REDIS_CLUSTER_URL";

/// Becomes the server. What it has answered is with the system before the answer goes out, so that
/// it survives the server's own death; with `everysec` it would not, since the server then puts a
/// write off while it flushes the one before. Flushes protect when the machine crashes.
const RUN: &str = r#"
server=$1 port=$2 directory=$3
shift 3
exec "$server" --port "$port" --bind 127.0.0.1 --dir "$directory" --daemonize no --save '' \
    --appendonly yes --appendfsync no $*
"#;

/// Of each three masters with a replica each.
const MASTERS: usize = 3;
const SLOTS: u32 = 16_384;

/// A Redis server.
#[derive(Debug)]
pub struct Redis {
    url: String,
    /// Unless the server is somebody else's.
    process: Option<Process>,
}

impl Redis {
    /// The server that all tests of this binary share; each takes keys of its own.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Redis> = OnceLock::new();
        SHARED.get_or_init(|| match std::env::var(URL) {
            Ok(url) => Self { url, process: None },
            Err(_) => Self::start_own(),
        })
    }

    /// A server of the test's own, to stop, pause and kill.
    pub fn start_own() -> Self {
        Self::start_own_with("")
    }

    /// A server of the test's own with settings of its own, as in `--maxmemory 20mb`.
    pub fn start_own_with(settings: &str) -> Self {
        let server = program("redis-server", &["/usr/bin".into()]);
        // A port that was free may be taken before the server has it.
        for _ in 0..3 {
            let port = free_port().to_string();
            let process = Process::start("redis", "redis", |directory| {
                words([&"sh", &"-c", &RUN, &"redis", &server, &port, &directory, &settings])
            });
            let url = format!("redis://127.0.0.1:{port}/");
            let redis = Self { url, process: Some(process) };
            if redis.is_ready() {
                return redis;
            }
            eprintln!("Redis ended as it started: {}", redis.process().log());
        }
        panic!("Redis does not start");
    }

    /// Where it listens.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Asks it something.
    pub fn ask<T: FromRedisValue>(&self, command: &[&str]) -> RedisResult<T> {
        let client = Client::open(self.url.as_str())?;
        let mut connection = client.get_connection_with_timeout(Duration::from_secs(2))?;
        connection.set_read_timeout(Some(Duration::from_secs(5)))?;
        let (name, arguments) = command.split_first().expect("a command");
        redis::cmd(name).arg(arguments).query(&mut connection)
    }

    /// The server's process id.
    pub fn pid(&self) -> u32 {
        self.process().pid()
    }

    /// Kills the server (`SIGKILL`).
    pub fn kill(&self) {
        self.process().kill();
    }

    /// Stops time for the server (`SIGSTOP`): connections stay open, and nobody answers.
    pub fn pause(&self) {
        self.process().pause();
    }

    /// Lets time go on.
    pub fn resume(&self) {
        self.process().resume();
    }

    /// Shuts the server down.
    pub fn stop(&self) {
        self.process().stop(Goodbye::Terminate);
    }

    /// Starts the server again after [`stop`](Self::stop) or [`kill`](Self::kill), with the same
    /// data and at the same address.
    pub fn restart(&self) {
        self.process().start_again();
        assert!(self.is_ready(), "Redis does not start again: {}", self.process().log());
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        self.process().log()
    }

    fn process(&self) -> &Process {
        self.process.as_ref().expect("a server of the tests' own")
    }

    fn is_ready(&self) -> bool {
        // Until it has read its files it answers with an error.
        self.process().wait_until(|| self.ask::<String>(&["PING"]).is_ok())
    }
}

/// A Redis Cluster: three masters, and a replica of each.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Redis>,
}

impl Cluster {
    /// The cluster that all tests of this binary share; each takes keys of its own.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Cluster> = OnceLock::new();
        SHARED.get_or_init(|| match std::env::var(CLUSTER_URL) {
            Ok(urls) => {
                let nodes = urls.split(',').map(|url| Redis { url: url.to_owned(), process: None });
                Self { nodes: nodes.collect() }
            }
            Err(_) => Self::start_own(),
        })
    }

    /// A cluster of the test's own, to pause and kill nodes of.
    pub fn start_own() -> Self {
        let nodes: Vec<_> = (0..2 * MASTERS)
            .map(|_| {
                Redis::start_own_with(&format!(
                    "--cluster-enabled yes --cluster-node-timeout 2000 --cluster-port {} \
                     --cluster-replica-validity-factor 0 --repl-diskless-sync-delay 0",
                    free_port(),
                ))
            })
            .collect();
        let cluster = Self { nodes };
        cluster.join();
        cluster
    }

    fn join(&self) {
        let share = SLOTS.div_ceil(MASTERS as u32);
        let ids: Vec<String> =
            self.nodes.iter().map(|node| ask(node, &["CLUSTER", "MYID"])).collect();
        let (masters, replicas) = self.nodes.split_at(MASTERS);
        for (first, master) in (0..SLOTS).step_by(share as usize).zip(masters) {
            let last = (first + share).min(SLOTS) - 1;
            let slots = [&first.to_string(), &last.to_string()];
            ask::<()>(master, &["CLUSTER", "ADDSLOTSRANGE", slots[0], slots[1]]);
        }
        for node in &self.nodes[1..] {
            let bus: Vec<String> = ask(node, &["CONFIG", "GET", "cluster-port"]);
            let port = node.port().to_string();
            ask::<()>(&self.nodes[0], &["CLUSTER", "MEET", "127.0.0.1", &port, &bus[1]]);
        }
        self.wait_until("all nodes know each other", || {
            self.nodes.iter().all(|node| {
                let known: RedisResult<String> = node.ask(&["CLUSTER", "NODES"]);
                known.is_ok_and(|known| {
                    known.lines().count() == self.nodes.len() && !known.contains("handshake")
                })
            })
        });
        for (replica, master) in replicas.iter().zip(&ids) {
            ask::<()>(replica, &["CLUSTER", "REPLICATE", master]);
        }
        self.wait_until("all replicas follow and the cluster serves", || {
            let follow = replicas.iter().all(|replica| {
                let state: RedisResult<String> = replica.ask(&["INFO", "replication"]);
                state.is_ok_and(|state| state.contains("master_link_status:up"))
            });
            follow && self.nodes.iter().all(Redis::serves_a_cluster)
        });
    }

    /// Where its nodes listen.
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(|node| node.url.clone()).collect()
    }

    /// Its nodes.
    pub fn nodes(&self) -> &[Redis] {
        &self.nodes
    }

    /// Where its present masters listen.
    pub fn masters(&self) -> Vec<String> {
        let masters = masters(&self.any::<String>(&["CLUSTER", "NODES"]));
        masters.into_iter().map(|master| master.url).collect()
    }

    /// The node that is the present master of a key.
    pub fn master_of(&self, key: &str) -> &Redis {
        self.living_master_of(key).expect("a master of each slot")
    }

    /// Has a replica of this master take over from it as soon as it has all that the master has,
    /// without asking anybody.
    pub fn fail_over(&self, master: &Redis) {
        let follows = format!("master_port:{}\r\nmaster_link_status:up", master.port());
        self.wait_until("a replica takes over", || {
            self.nodes.iter().any(|node| {
                let state: RedisResult<String> = node.ask(&["INFO", "replication"]);
                state.is_ok_and(|state| state.contains(&follows))
                    && node.ask::<()>(&["CLUSTER", "FAILOVER", "TAKEOVER"]).is_ok()
            })
        });
    }

    fn living_master_of(&self, key: &str) -> Option<&Redis> {
        let slot: u32 = self.any(&["CLUSTER", "KEYSLOT", key]);
        let masters = masters(&self.any::<String>(&["CLUSTER", "NODES"]));
        let master = masters.iter().find(|master| master.slots.iter().any(|of| of.contains(&slot)));
        self.nodes.iter().find(|node| master.is_some_and(|master| node.url == master.url))
    }

    /// Waits until somebody else is the master of a key, and all living nodes know it.
    pub fn wait_until_promoted(&self, key: &str, old: &Redis) {
        self.wait_until("a replica is promoted", || {
            self.living_master_of(key).is_some_and(|master| master.url != old.url)
                && self.nodes.iter().filter(|node| node.url != old.url).all(|node| {
                    let nodes: RedisResult<String> = node.ask(&["CLUSTER", "NODES"]);
                    node.serves_a_cluster()
                        && nodes.is_ok_and(|nodes| {
                            masters(&nodes).iter().all(|master| master.url != old.url)
                        })
                })
        });
    }

    /// Asks whichever node answers.
    fn any<T: FromRedisValue>(&self, command: &[&str]) -> T {
        let answer = self.nodes.iter().find_map(|node| node.ask(command).ok());
        answer.expect("a node that answers")
    }

    fn wait_until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < PATIENCE, "not in time: {what}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

struct Master {
    url: String,
    slots: Vec<RangeInclusive<u32>>,
}

/// Reads the masters that hold slots and live from what a node says of its cluster.
fn masters(nodes: &str) -> Vec<Master> {
    let masters = nodes.lines().filter_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let [_, address, flags, _, _, _, _, _, slots @ ..] = &words[..] else { return None };
        let (address, _) = address.split_once('@')?;
        let lives = flags.contains("master") && !flags.contains("fail");
        let slots = slots.iter().filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some(first.parse().ok()?..=last.parse().ok()?)
        });
        let master = Master { url: format!("redis://{address}/"), slots: slots.collect() };
        (lives && !master.slots.is_empty()).then_some(master)
    });
    masters.collect()
}

impl Redis {
    fn port(&self) -> u16 {
        let port = self.url.trim_end_matches('/').rsplit(':').next();
        port.and_then(|port| port.parse().ok()).expect("a URL with a port")
    }

    fn serves_a_cluster(&self) -> bool {
        let state: RedisResult<String> = self.ask(&["CLUSTER", "INFO"]);
        state.is_ok_and(|state| state.contains("cluster_state:ok"))
    }
}

fn ask<T: FromRedisValue>(node: &Redis, command: &[&str]) -> T {
    node.ask(command).unwrap_or_else(|error| panic!("{command:?}: {error}"))
}
