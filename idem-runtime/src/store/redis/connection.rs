//! The way to the servers: connections, time-outs, and what an error means.

use std::{
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures_util::{FutureExt as _, future::join_all};
use redis::{
    Cmd, ErrorKind, FromRedisValue as _, InfoDict, Pipeline, RedisError, RedisResult,
    ServerErrorKind, Value,
    aio::{ConnectionLike as _, ConnectionManager},
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
    cluster_routing::{
        MultipleNodeRoutingInfo, Route, RoutingInfo, SingleNodeRoutingInfo, SlotAddr,
    },
};
use tokio::runtime::Handle;

use super::{NAME, script::Step};
use crate::store::{StoreError, StoreErrorKind};

/// How often the servers are looked up because one of them is silent or no longer a master: in a
/// cluster with a silent node, other calls wait for that for as long as its time-out.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// A connection that many calls share and that restores itself.
#[derive(Clone)]
pub(super) struct Connection {
    way: Way,
    /// Where the client's tasks run, those of a connection that is made anew too: whoever notices
    /// that it must be may call from a runtime that soon ends.
    runtime: Handle,
    /// When the servers were last looked up because one of them was silent or no longer a master.
    /// Whoever does it holds the lock.
    looked: Arc<tokio::sync::Mutex<Option<Instant>>>,
}

#[derive(Clone)]
enum Way {
    Single(ConnectionManager),
    Cluster(Cluster),
}

/// A connection to a cluster.
#[derive(Clone)]
struct Cluster {
    current: Arc<Mutex<ClusterConnection>>,
    /// What makes another one, and how long that may take; nothing does where the connection is
    /// the application's.
    client: Option<(Arc<ClusterClient>, Duration)>,
}

impl Cluster {
    fn get(&self) -> ClusterConnection {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the connection for all that share it. The old one is closed when the last call that
    /// was sent on it has ended.
    async fn connect_again(&self) -> Result<(), StoreError> {
        let Some((client, time)) = &self.client else { return Ok(()) };
        let connection = within(*time, client.get_async_connection()).await?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = connection;
        Ok(())
    }
}

/// A server that holds records.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Node {
    Single,
    /// A master of a cluster.
    Of {
        host: Arc<str>,
        port: u16,
    },
}

impl Node {
    /// How people know it.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Single => "the server".to_owned(),
            Self::Of { host, port } => format!("{host}:{port}"),
        }
    }

    /// Reads what the client calls it: a host and a port, the host of an IPv6 address in brackets.
    fn named(name: &str) -> Option<Self> {
        let (host, port) = name.rsplit_once(':')?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        Some(Self::Of { host: host.into(), port: port.parse().ok()? })
    }
}

impl Connection {
    fn new(way: Way) -> Self {
        Self { way, runtime: Handle::current(), looked: Arc::default() }
    }

    pub(super) fn single(connection: ConnectionManager) -> Self {
        Self::new(Way::Single(connection))
    }

    /// Connects to a cluster, in this time, and again whenever it must be.
    pub(super) async fn cluster(client: ClusterClient, time: Duration) -> Result<Self, StoreError> {
        let connection = within(time, client.get_async_connection()).await?;
        let current = Arc::new(Mutex::new(connection));
        Ok(Self::new(Way::Cluster(Cluster { current, client: Some((Arc::new(client), time)) })))
    }

    pub(super) fn over_cluster(connection: ClusterConnection) -> Self {
        let current = Arc::new(Mutex::new(connection));
        Self::new(Way::Cluster(Cluster { current, client: None }))
    }

    /// Sends a command to where it belongs.
    pub(super) async fn send(&self, command: &Cmd) -> RedisResult<Value> {
        match &self.way {
            Way::Single(connection) => {
                connection.clone().send_packed_command(command).await?.extract_error()
            }
            Way::Cluster(cluster) => {
                cluster.get().req_packed_command(command).await?.extract_error()
            }
        }
    }

    /// Sends commands whose answers are of no interest; the first error is told.
    pub(super) async fn send_all(&self, commands: impl Iterator<Item = Cmd>) -> RedisResult<()> {
        let answers = match &self.way {
            Way::Single(connection) => {
                let mut all = Pipeline::new();
                for command in commands {
                    all.add_command(command);
                }
                connection.clone().send_packed_commands(&all, 0, all.len()).await?
            }
            Way::Cluster(_) => {
                let sent = commands.map(async |command| self.send(&command).await);
                join_all(sent).await.into_iter().collect::<RedisResult<_>>()?
            }
        };
        answers.into_iter().try_for_each(|answer| answer.extract_error().map(drop))
    }

    /// Has a step done to the record of this name, and the server taught it if it must be.
    pub(super) async fn run(&self, step: &Step<'_>, name: &[u8]) -> RedisResult<Value> {
        match self.send(&step.call(name)).await {
            Err(error) if is_unknown_script(&error) => {
                Box::pin(async { self.send(&step.teach(name)).await }).await
            }
            answer => answer,
        }
    }

    /// Has a step done to the record of this name, and then sends a command that concerns whatever
    /// was sent on the same connection before.
    pub(super) async fn run_and(
        &self,
        step: &Step<'_>,
        name: &[u8],
        then: &Cmd,
    ) -> RedisResult<[Value; 2]> {
        match self.send_both(name, step.call(name), then).await {
            Err(error) if is_unknown_script(&error) => {
                self.send_both(name, step.teach(name), then).await
            }
            answers => answers,
        }
    }

    async fn send_both(&self, name: &[u8], first: Cmd, then: &Cmd) -> RedisResult<[Value; 2]> {
        let mut both = Pipeline::with_capacity(2);
        both.add_command(first).add_command(then.clone());
        let answers = match &self.way {
            Way::Single(connection) => connection.clone().send_packed_commands(&both, 0, 2).await?,
            Way::Cluster(cluster) => {
                let route = Route::with_key(name, SlotAddr::Master);
                let node = SingleNodeRoutingInfo::SpecificNode(route);
                cluster.get().route_pipeline(both, 0, 2, node).await?
            }
        };
        let answers = answers.into_iter().map(Value::extract_error);
        let answers: Vec<_> = answers.collect::<RedisResult<_>>()?;
        answers.try_into().map_err(|_| unexpected())
    }

    /// Sees to it that a server which is silent or no longer a master is not asked for ever, where
    /// an error about the record of this name says that there is one: one look-up at a time,
    /// however many calls meet it.
    pub(super) fn notice(&self, error: &StoreError, name: &[u8], time: Duration) {
        let is_to_look = match self.way {
            Way::Single(_) => is_read_only(error),
            Way::Cluster(_) => error.kind() == StoreErrorKind::TimedOut,
        };
        if !is_to_look {
            return;
        }
        let Ok(mut looked) = Arc::clone(&self.looked).try_lock_owned() else { return };
        if looked.is_some_and(|when| when.elapsed() < LOOK_INTERVAL) {
            return;
        }
        *looked = Some(Instant::now());
        let (connection, name) = (self.clone(), name.to_owned());
        self.runtime.spawn(async move {
            // The next call that meets this sees to it again.
            drop(connection.look_again(&name, time).await);
            drop(looked);
        });
    }

    /// Has the client look up again where the servers are, and wait no longer than this for one.
    ///
    /// Of a cluster it does so when a node says that a key is not its own, or is gone; one that is
    /// there and silent, whose replica was promoted meanwhile, it would ask for ever. So some other
    /// node is asked for a key that is hardly its own. A single server's address is looked up at
    /// each new connection; one that became a replica without closing those that it had is asked to
    /// close ours.
    ///
    /// If no answer comes from the cluster then either, the client itself may be stuck. All calls
    /// are one task in redis 1.8, and tokio interrupts a task that does much at once. That can be
    /// when a call has just got the client's lock; if another one learns at the same time that its
    /// slot has moved, the client goes on with nothing but looking up the slots, and waits for that
    /// lock for ever. Some forty calls under way at a failover are enough. A new connection knows
    /// nothing of it.
    async fn look_again(&self, key: &[u8], time: Duration) -> Result<(), StoreError> {
        let Way::Cluster(cluster) = &self.way else {
            return within(time, self.send(&command("QUIT"))).await.map(drop);
        };
        let mut exists = command("EXISTS");
        exists.arg(key);
        let route = RoutingInfo::SingleNode(SingleNodeRoutingInfo::Random);
        match within(time, cluster.get().route_command(exists, route)).await {
            Err(error) if error.kind() == StoreErrorKind::TimedOut => cluster.connect_again().await,
            answer => answer.map(drop),
        }
    }

    /// Sends a command to one server.
    pub(super) async fn send_to(&self, node: &Node, command: Cmd) -> RedisResult<Value> {
        match (&self.way, node) {
            (Way::Cluster(cluster), Node::Of { host, port }) => {
                let node = SingleNodeRoutingInfo::ByAddress { host: (**host).into(), port: *port };
                let route = RoutingInfo::SingleNode(node);
                cluster.get().route_command(command, route).await?.extract_error()
            }
            _ => self.send(&command).await,
        }
    }

    /// Sends a command to every server that holds records; each answers for itself.
    pub(super) async fn send_to_all(
        &self,
        time: Duration,
        command: Cmd,
    ) -> Result<Vec<(Node, RedisResult<Value>)>, StoreError> {
        let (answers, masters) = within(time, self.send_to_masters(command)).await?;
        // The client leaves out those that it has no connection to.
        if answers.len() < masters {
            return Err(Cause::MastersMissing { known: answers.len(), all: masters }.error());
        }
        Ok(answers)
    }

    /// What all masters that can be reached answer, and how many there are.
    async fn send_to_masters(
        &self,
        to_each: Cmd,
    ) -> RedisResult<(Vec<(Node, RedisResult<Value>)>, usize)> {
        let Way::Cluster(cluster) = &self.way else {
            return Ok((vec![(Node::Single, self.send(&to_each).await)], 1));
        };
        let route = RoutingInfo::MultiNode((MultipleNodeRoutingInfo::AllMasters, None));
        let answer = cluster.get().route_command(to_each, route).await?;
        let answers = answer.into_map_iter().map_err(|_| unexpected())?;
        let answers = answers.map(|(name, answer)| {
            let name: String = redis::from_redis_value(name)?;
            Ok((Node::named(&name).ok_or_else(unexpected)?, answer.extract_error()))
        });
        let answers = answers.collect::<RedisResult<_>>()?;
        let mut info = command("CLUSTER");
        info.arg("INFO");
        let route = RoutingInfo::SingleNode(SingleNodeRoutingInfo::Random);
        let info = cluster.get().route_command(info, route).await?.extract_error()?;
        let masters = InfoDict::from_redis_value(info)?.get("cluster_size");
        Ok((answers, masters.ok_or_else(unexpected)?))
    }

    /// Whether all servers are one.
    pub(super) const fn is_single(&self) -> bool {
        matches!(self.way, Way::Single(_))
    }
}

/// A command without arguments yet.
pub(super) fn command(name: &str) -> Cmd {
    let mut command = Cmd::new();
    command.arg(name);
    command
}

fn is_unknown_script(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
}

/// Whether the server answered that it is a replica.
fn is_read_only(error: &StoreError) -> bool {
    let error = std::error::Error::source(error).and_then(|source| source.downcast_ref());
    error.is_some_and(|error: &RedisError| {
        error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly)
    })
}

pub(super) fn unexpected() -> RedisError {
    (ErrorKind::UnexpectedReturnType, "an answer of another form").into()
}

/// Waits for an answer, but not for longer than this.
pub(super) fn within<T>(
    time: Duration,
    answer: impl Future<Output = RedisResult<T>>,
) -> impl Future<Output = Result<T, StoreError>> {
    tokio::time::timeout(time, answer).map(|answer| match answer {
        Ok(answer) => answer.map_err(failure),
        Err(late) => Err(StoreError::caused_by(NAME, StoreErrorKind::TimedOut, late)),
    })
}

pub(super) fn failure(error: RedisError) -> StoreError {
    StoreError::caused_by(NAME, kind_of(&error), error)
}

/// By the client's kinds and by the code at the beginning of a server's error,
/// <https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors>.
fn kind_of(error: &RedisError) -> StoreErrorKind {
    match error.kind() {
        ErrorKind::Io if error.is_timeout() => StoreErrorKind::TimedOut,
        ErrorKind::Io | ErrorKind::Parse | ErrorKind::ClusterConnectionNotFound => {
            StoreErrorKind::Unreachable
        }
        // A server that starts, fails over or is being moved; the client has followed and waited
        // for as long as it does. Scripts that vanish at each call are a server that restarts.
        ErrorKind::Server(
            ServerErrorKind::BusyLoading
            | ServerErrorKind::NoScript
            | ServerErrorKind::Moved
            | ServerErrorKind::Ask
            | ServerErrorKind::TryAgain
            | ServerErrorKind::ClusterDown
            | ServerErrorKind::MasterDown
            | ServerErrorKind::ReadOnly,
        ) => StoreErrorKind::Unreachable,
        ErrorKind::Extension => match error.code() {
            Some("OOM") => StoreErrorKind::Full,
            // A script of somebody else's takes all of the server's time.
            Some("BUSY") => StoreErrorKind::TimedOut,
            // Fewer replicas than `min-replicas-to-write`.
            Some("NOREPLICAS") => StoreErrorKind::Unreachable,
            // The key holds something else than a record.
            Some("WRONGTYPE") => StoreErrorKind::Corrupt,
            _ => StoreErrorKind::Refused,
        },
        _ => StoreErrorKind::Refused,
    }
}

/// Why the servers will not do, or what they did not do.
#[derive(Debug, thiserror::Error)]
pub(super) enum Cause {
    #[error(
        "maxmemory-policy of {node} is `{policy}`, by which it drops records that are still \
         needed: set `noeviction`, or accept it by `allow_eviction`"
    )]
    Evicts { node: String, policy: String },
    #[error(
        "{node} does not say its maxmemory-policy: permit `INFO`, or make sure that it is \
         `noeviction` and say `allow_eviction`"
    )]
    PolicyUnknown { node: String },
    #[error("{node} is Redis {version}; 7.0 is the oldest that will do")]
    TooOld { node: String, version: String },
    #[error("the server is a node of a cluster: connect to it by `RedisStore::cluster`")]
    OfACluster,
    #[error("{acknowledged} of {wanted} replicas acknowledged it in time")]
    Unacknowledged { acknowledged: u32, wanted: u32 },
    #[error("{known} of {all} masters are connected")]
    MastersMissing { known: usize, all: usize },
    #[error("it takes {bytes} bytes, and the servers take {most}")]
    TooLarge { bytes: usize, most: usize },
}

impl Cause {
    pub(super) fn error(self) -> StoreError {
        let kind = match self {
            Self::Unacknowledged { .. } => StoreErrorKind::TimedOut,
            Self::MastersMissing { .. } => StoreErrorKind::Unreachable,
            Self::TooLarge { .. } => StoreErrorKind::TooLarge,
            _ => StoreErrorKind::Refused,
        };
        StoreError::caused_by(NAME, kind, self)
    }
}
