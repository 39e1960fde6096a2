//! How a store comes to its servers, and whether they will do.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use redis::{
    Client, ConnectionInfo, ErrorKind, FromRedisValue as _, InfoDict, IntoConnectionInfo,
    RedisResult, ServerErrorKind, Value,
    aio::{ConnectionManager, ConnectionManagerConfig},
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
    io::tcp::{TcpSettings, socket2::TcpKeepalive},
};

use tokio::sync::mpsc;

use super::{
    Firsts, NOTES_WAITING, RedisStore, Replicas, Shared,
    connection::{Cause, Connection, Node, command, failure},
    write_notes,
};
use crate::store::StoreError;

/// What a server takes in one piece unless its `proto-max-bulk-len` says otherwise.
const LARGEST_VALUE: usize = 512 << 20;
/// After how long a connection on which nobody says anything is probed.
const PROBED_AFTER: Duration = Duration::from_secs(10);

/// How a [`RedisStore`] is made.
#[must_use = "a builder makes nothing until it connects"]
pub struct RedisStoreBuilder {
    prefix: String,
    timeout: Duration,
    replicas: Option<Replicas>,
    allow_eviction: bool,
    notes: bool,
    listeners: Vec<Client>,
}

/// The clients know passwords.
impl fmt::Debug for RedisStoreBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStoreBuilder")
            .field("prefix", &self.prefix)
            .field("timeout", &self.timeout)
            .field("replicas", &self.replicas)
            .field("allow_eviction", &self.allow_eviction)
            .field("notes", &self.notes)
            .finish_non_exhaustive()
    }
}

impl Default for RedisStoreBuilder {
    fn default() -> Self {
        Self {
            prefix: "idem:".to_owned(),
            timeout: Duration::from_secs(1),
            replicas: None,
            allow_eviction: false,
            notes: true,
            listeners: Vec::new(),
        }
    }
}

impl RedisStoreBuilder {
    /// What all keys begin with, as does the channel for messages; `idem:` by default.
    ///
    /// Applications that share servers take different ones. Braces would send all records to one
    /// node of a cluster.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// For how long a server may be silent before a call is given up or, in a cluster, tried once
    /// more, where a call as a whole may take twice as long. One second by default.
    pub fn timeout(mut self, time: Duration) -> Self {
        self.timeout = time;
        self
    }

    /// Waits until this many replicas have acknowledged a claim, an issued key, a checkpoint or an
    /// answer (`WAIT`), and at most for this long.
    ///
    /// It costs each of these calls a round trip between master and replica, and a second
    /// connection, on which they wait for each other; a claim that only finds a record waits too.
    /// When fewer have acknowledged it in time, the call fails as
    /// [`TimedOut`](crate::store::StoreErrorKind::TimedOut). The record is then as if it had succeeded, on the
    /// master and on those replicas that have it, and may be lost if the master dies now: a claim
    /// is not used, and is taken over when its lease ends or granted again to who asks under its
    /// token; an answer is recorded again, which waits again, until it is acknowledged. Releasing
    /// and forgetting do not wait: if they are lost, the key is free when its lease ends.
    pub fn replicas(mut self, count: u32, within: Duration) -> Self {
        self.replicas = (count > 0).then_some(Replicas { count, within });
        self
    }

    /// Accepts servers that may drop records when their memory is full, or that do not say whether
    /// they do.
    ///
    /// An operation whose record is dropped runs again at the next retry.
    pub fn allow_eviction(mut self) -> Self {
        self.allow_eviction = true;
        self
    }

    /// Leaves out the notes of where an operation's record is, which cost a write and 200 bytes for
    /// each operation. To find one by its id then takes a search through all records.
    pub fn without_notes(mut self) -> Self {
        self.notes = false;
        self
    }

    /// Also hears messages of other processes, through a connection of its own that this client
    /// makes; of a cluster any node will do.
    ///
    /// For stores over a connection of the application's: [`connect`](Self::connect) and
    /// [`cluster`](Self::cluster) know where to listen. Without it, who waits for an owner in
    /// another process looks at the record now and then.
    pub fn listen_at(mut self, client: Client) -> Self {
        self.listeners.push(client);
        self
    }

    /// Connects to a server: see [`RedisStore::connect`].
    ///
    /// # Errors
    ///
    /// As for [`RedisStore::connect`].
    pub async fn connect(
        mut self,
        server: impl IntoConnectionInfo,
    ) -> Result<RedisStore, StoreError> {
        let server = server.into_connection_info().map_err(failure)?;
        let server = server.set_tcp_settings(self.tcp_settings());
        let client = Client::open(server).map_err(failure)?;
        self.listeners.push(client.clone());
        let connection = self.manager(&client).await?;
        let acknowledged = match self.replicas {
            Some(replicas) => Some((self.manager(&client).await?, replicas)),
            None => None,
        };
        self.finish(connection, acknowledged).await
    }

    /// Connects to a cluster: see [`RedisStore::cluster`].
    ///
    /// # Errors
    ///
    /// As for [`RedisStore::connect`].
    pub async fn cluster<T: IntoConnectionInfo>(
        mut self,
        nodes: impl IntoIterator<Item = T>,
    ) -> Result<RedisStore, StoreError> {
        let nodes = nodes
            .into_iter()
            .map(|node| Ok(node.into_connection_info()?.set_tcp_settings(self.tcp_settings())));
        let nodes: Vec<_> = nodes.collect::<RedisResult<_>>().map_err(failure)?;
        for node in &nodes {
            self.listeners.push(Client::open(node.clone()).map_err(failure)?);
        }
        let connection = self.cluster_connection(&nodes, self.timeout).await?;
        let acknowledged = match self.replicas {
            Some(replicas) => {
                let timeout = self.timeout.saturating_add(replicas.within);
                Some((self.cluster_connection(&nodes, timeout).await?, replicas))
            }
            None => None,
        };
        self.finish(connection, acknowledged).await
    }

    /// Keeps the records through a connection of the application's to a server, which restores
    /// itself when it is lost.
    ///
    /// It is shared: what the application does on it that takes long keeps idem's calls waiting,
    /// and so do calls that wait for [`replicas`](Self::replicas), the application's. Its own
    /// time-outs hold where they are shorter.
    ///
    /// # Errors
    ///
    /// As for [`RedisStore::connect`].
    pub async fn over(self, connection: ConnectionManager) -> Result<RedisStore, StoreError> {
        self.over_connection(Connection::single(connection)).await
    }

    /// Keeps the records through a connection of the application's to a cluster: see
    /// [`over`](Self::over).
    ///
    /// It must not read from replicas. Nor can idem make it anew, as it does with one of its own
    /// ([`cluster`](Self::cluster)) when the client is stuck: with redis 1.8, a failover while some
    /// forty calls are under way can have that effect, and then every call times out from there on.
    ///
    /// # Errors
    ///
    /// As for [`RedisStore::connect`].
    pub async fn over_cluster(
        self,
        connection: ClusterConnection,
    ) -> Result<RedisStore, StoreError> {
        self.over_connection(Connection::over_cluster(connection)).await
    }

    async fn over_connection(self, connection: Connection) -> Result<RedisStore, StoreError> {
        let acknowledged = self.replicas.map(|replicas| (connection.clone(), replicas));
        self.finish(connection, acknowledged).await
    }

    /// A host that has vanished, so that nothing is acknowledged any more, is noticed before the
    /// system's own quarter of an hour is over, and on a connection that only listens too. Nagle's
    /// algorithm stays on, as the client has it: what is sent while something else is on its way
    /// goes together, which costs it a part of a round trip and both sides much less.
    fn tcp_settings(&self) -> TcpSettings {
        let keepalive = TcpKeepalive::new().with_time(PROBED_AFTER);
        let settings = TcpSettings::default().set_keepalive(keepalive);
        #[cfg(target_os = "linux")]
        let settings = settings.set_user_timeout(self.timeout.saturating_mul(2));
        settings
    }

    async fn manager(&self, client: &Client) -> Result<Connection, StoreError> {
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(self.timeout))
            // Each call has one of its own.
            .set_response_timeout(None)
            .set_max_delay(self.timeout)
            .set_number_of_retries(3);
        let connected = ConnectionManager::new_with_config(client.clone(), config).await;
        connected.map(Connection::single).map_err(failure)
    }

    async fn cluster_connection(
        &self,
        nodes: &[ConnectionInfo],
        timeout: Duration,
    ) -> Result<Connection, StoreError> {
        let client = ClusterClient::builder(nodes.to_vec())
            .connection_timeout(self.timeout)
            .response_timeout(timeout)
            .overall_response_timeout(None)
            .tcp_settings(self.tcp_settings())
            .build()
            .map_err(failure)?;
        // A silent node is waited for twice: among those that are named, and among those found.
        let time = self.timeout.saturating_add(timeout).saturating_mul(2);
        Connection::cluster(client, time).await
    }

    async fn finish(
        self,
        connection: Connection,
        acknowledged: Option<(Connection, Replicas)>,
    ) -> Result<RedisStore, StoreError> {
        let time = self.timeout.saturating_mul(2);
        self.check(connection.send_to_all(time, command("INFO")).await?, &connection)?;
        let mut limits = command("CONFIG");
        limits.arg("GET").arg("proto-max-bulk-len");
        let limits = connection.send_to_all(time, limits).await?;
        // Managed services do not show it, nor let it be changed.
        let limits = limits.into_iter().filter_map(|(_, limit)| {
            let limit: HashMap<String, usize> = redis::from_redis_value(limit.ok()?).ok()?;
            limit.into_values().next()
        });
        let patience = if connection.is_single() { self.timeout } else { time };
        let notes = self.notes.then(|| {
            let (notes, waiting) = mpsc::channel(NOTES_WAITING);
            tokio::spawn(write_notes(connection.clone(), patience, waiting));
            notes
        });
        Ok(RedisStore(Arc::new(Shared {
            connection,
            acknowledged,
            listeners: self.listeners,
            prefix: self.prefix,
            patience,
            notes,
            firsts: Firsts::default(),
            max_bytes: limits.min().unwrap_or(LARGEST_VALUE),
            swept: Mutex::default(),
        })))
    }

    /// Whether these servers will do, by what they say of themselves.
    fn check(
        &self,
        servers: Vec<(Node, RedisResult<Value>)>,
        connection: &Connection,
    ) -> Result<(), StoreError> {
        for (node, info) in servers {
            let info = match info.and_then(|info| Ok(InfoDict::from_redis_value(info)?)) {
                Ok(info) => info,
                Err(error) if is_forbidden(&error) => {
                    if self.allow_eviction {
                        continue;
                    }
                    return Err(Cause::PolicyUnknown { node: node.name() }.error());
                }
                Err(error) => return Err(failure(error)),
            };
            let version: String = info.get("redis_version").unwrap_or_default();
            let major = version.split('.').next().and_then(|major| major.parse().ok());
            if major.is_some_and(|major: u32| major < 7) {
                return Err(Cause::TooOld { node: node.name(), version }.error());
            }
            if connection.is_single() && info.get("cluster_enabled") == Some(1) {
                return Err(Cause::OfACluster.error());
            }
            match info.get::<String>("maxmemory_policy") {
                _ if self.allow_eviction => {}
                Some(policy) if policy == "noeviction" => {}
                Some(policy) => return Err(Cause::Evicts { node: node.name(), policy }.error()),
                None => return Err(Cause::PolicyUnknown { node: node.name() }.error()),
            }
        }
        Ok(())
    }
}

fn is_forbidden(error: &redis::RedisError) -> bool {
    // A managed service that does not know a command calls it a general error.
    let known = [ServerErrorKind::NoPerm, ServerErrorKind::ResponseError];
    known.into_iter().any(|kind| error.kind() == ErrorKind::Server(kind))
}
