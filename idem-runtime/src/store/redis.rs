//! Records in Redis, Valkey or Redis Cluster.
//!
//! One key is one record ([`record`]). A first claim is a plain `SET … NX GET`; everything else that
//! changes a record is one call of a script ([`script`]), decided where the record is and by the
//! server's clock. A claim that meets a record calls the script too, behind the `SET`: it may be a
//! claim made before, or on a lease that is over. Only where it meets an answer there is nothing to
//! decide, and a plain command says how much of its time is left.

mod builder;
mod connection;
mod manage;
mod record;
mod script;
mod wake;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use redis::{Client, Cmd, FromRedisValue as _, IntoConnectionInfo};
use tokio::sync::mpsc::{Receiver, Sender};

pub use self::builder::RedisStoreBuilder;
use self::{
    connection::{Cause, Connection, Node, command, failure, unexpected, within},
    record::{IDENTITY, completed, decode, first, is_replay, millis, replay, ttl_millis, what},
    script::{Answer, Outcome, Step},
};
use super::{
    Checkpoint, Claim, Claimed, Completion, Issue, Manage, Renewal, Store, StoreError,
    StoreErrorKind, Wake, Written, row::Row,
};
use crate::{
    decision::OnUnknown,
    key::{Key, OperationId, Token},
    record::{FORMAT, Fingerprint, Record, Ttl},
};

/// The name of this store in errors.
const NAME: &str = "redis";
/// For how long an operation can be found by its id beyond the time that its record is kept for
/// when it is claimed: completing prolongs that by as long as the handler runs.
const HANDLERS_RUN: Duration = Duration::from_secs(3600);

/// How many notes are sent together: the server answers nobody else meanwhile.
const NOTES_AT_ONCE: usize = 64;
/// How many notes wait to be sent before some are left out.
const NOTES_WAITING: usize = 4_096;
const NOT_NOTED: &str = "an operation cannot be found by its id without a search";

/// A store in Redis (7.0 or newer), Valkey or Redis Cluster: for many processes, and for many
/// records.
///
/// All processes go by the servers' clocks. A record is one key, `idem:` and 64 hexadecimal digits;
/// Redis removes it when its time is over. It takes about 400 bytes of the server's memory beside
/// the response, and 200 more by which an operation is found by its id.
///
/// # What can be lost
///
/// Redis keeps everything in memory, answers before a replica has heard of it, and writes to its
/// disk as it is told. A record that is lost is an operation that runs again at the next retry, so
/// this store is as good as the servers' settings:
///
/// - **A server that is killed or loses power** comes back with what is on its disk. Without
///   `appendonly yes` that is the last snapshot, minutes old or none. With it, `appendfsync always`
///   loses nothing that was answered; `everysec` loses up to about two seconds, and also when only
///   the process is killed, since it puts writes off while it flushes.
/// - **A failover** (Sentinel, Redis Cluster, a managed service) promotes a replica, which may not
///   have received the last writes, usually those of some milliseconds and, behind a slow network,
///   more. A master that is cut off goes on answering for some time (`cluster-node-timeout`), and
///   what it has granted meanwhile is gone when it returns; `min-replicas-to-write 1` bounds that.
///   [`replicas`](RedisStoreBuilder::replicas) narrows this further at the price of a round trip,
///   and does not close it: a replica without the record can still be the one that is promoted.
/// - **A server that is out of memory** refuses new claims ([`Full`](StoreErrorKind::Full)) and
///   still takes what belongs to claims that it granted, if its `maxmemory-policy` is `noeviction`.
///   Any other drops records that are still needed, so it is refused at the start, unless
///   [`allow_eviction`](RedisStoreBuilder::allow_eviction) says that this is known.
///
/// Where none of that may happen, keep the records in a database that flushes what it commits.
/// Wherever the records are, derived keys let whoever is called downstream notice a repetition.
///
/// # Clocks
///
/// In a cluster each master has a clock. After a failover the promoted replica's is the one that
/// counts: leases and records end earlier or later by as much as the two differ. Keep the servers'
/// time synchronised, by slewing it.
///
/// # Permissions
///
/// A user of idem's own needs the keys and channels of its prefix and these commands:
/// `~idem:* &idem:* +eval +evalsha +time +pexpiretime +pttl +get +getrange +set +del +scan
/// +publish +subscribe +ping +info`, in a cluster `+cluster +exists`, and `+wait` for
/// [`replicas`](RedisStoreBuilder::replicas).
///
/// # TLS
///
/// The client speaks TLS when the application turns it on: add `redis` with
/// `tokio-rustls-comp` (and `tls-rustls-webpki-roots`), or with `tokio-native-tls-comp`, to its own
/// dependencies, and write `rediss://`. Without such a feature, connecting to a `rediss://` URL is
/// refused.
///
/// A clone is another handle to the same records.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use idem_runtime::store::RedisStore;
///
/// let store = RedisStore::connect("redis://127.0.0.1/").await?;
/// let store = RedisStore::cluster(["redis://10.0.0.1/", "redis://10.0.0.2/"]).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct RedisStore(Arc<Shared>);

struct Shared {
    connection: Connection,
    /// Where calls wait for replicas, and whom they wait for. While one waits, nothing that comes
    /// after it on the same connection is answered, so these have one of their own.
    acknowledged: Option<(Connection, Replicas)>,
    /// The servers at any of which messages can be heard.
    listeners: Vec<Client>,
    prefix: String,
    /// For how long a call as a whole may take.
    patience: Duration,
    /// The way to who notes where an operation's record is, unless nobody does.
    notes: Option<Sender<Cmd>>,
    firsts: Firsts,
    /// The largest record that the servers take.
    max_bytes: usize,
    /// Where the last sweep ended on each server.
    swept: Mutex<HashMap<Node, u64>>,
}

/// The records of first claims, as they were written and when, until the claims end: whoever knows
/// them can say what is to become of them. A store without them asks the servers.
#[derive(Default)]
struct Firsts(Mutex<HashMap<Token, First>>);

struct First {
    since: Instant,
    record: Vec<u8>,
}

impl Firsts {
    /// Of how many they are at the most. That is for claims which never end.
    const MOST: usize = 16_384;

    fn put(&self, token: Token, record: Vec<u8>) {
        let mut firsts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if firsts.len() >= Self::MOST {
            firsts.clear();
        }
        firsts.insert(token, First { since: Instant::now(), record });
    }

    fn take(&self, token: &Token) -> Option<First> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(token)
    }
}

#[derive(Clone, Copy, Debug)]
struct Replicas {
    count: u32,
    within: Duration,
}

impl RedisStore {
    /// Connects to a server, as in `redis://user:password@host:6379/0`, where the last part is the
    /// number of the database.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached ([`Unreachable`](StoreErrorKind::Unreachable),
    /// [`TimedOut`](StoreErrorKind::TimedOut)), and [`Refused`](StoreErrorKind::Refused) when the
    /// URL or the password is wrong, or the server is older than 7.0, a node of a cluster, or set
    /// to drop records when its memory is full.
    pub async fn connect(server: impl IntoConnectionInfo) -> Result<Self, StoreError> {
        Self::builder().connect(server).await
    }

    /// Connects to a cluster, of which some nodes are named; the others are found.
    ///
    /// # Errors
    ///
    /// As for [`connect`](Self::connect).
    pub async fn cluster<T: IntoConnectionInfo>(
        nodes: impl IntoIterator<Item = T>,
    ) -> Result<Self, StoreError> {
        Self::builder().cluster(nodes).await
    }

    /// A builder with everything at its default.
    pub fn builder() -> RedisStoreBuilder {
        RedisStoreBuilder::default()
    }
}

/// The connections know passwords.
impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStore")
            .field("cluster", &!self.0.connection.is_single())
            .field("prefix", &self.0.prefix)
            .field("replicas", &self.0.acknowledged.as_ref().map(|(_, replicas)| replicas))
            .finish_non_exhaustive()
    }
}

/// A number that is higher for a later checkpoint: one that its caller gave up may still be on its
/// way, on a connection that the next one does not share.
fn next_checkpoint() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Shared {
    /// The name of a record's key.
    fn name(&self, key: &Key) -> Vec<u8> {
        self.hex("", key.as_bytes())
    }

    /// The name of the key that says where an operation's record is.
    fn operation_name(&self, id: &OperationId) -> Vec<u8> {
        self.hex("op:", id.as_bytes())
    }

    fn hex(&self, kind: &str, bytes: &[u8]) -> Vec<u8> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let start = self.prefix.len() + kind.len();
        let mut name = Vec::with_capacity(start + 2 * bytes.len());
        name.extend_from_slice(self.prefix.as_bytes());
        name.extend_from_slice(kind.as_bytes());
        name.resize(start + 2 * bytes.len(), 0);
        for (pair, byte) in name[start..].chunks_exact_mut(2).zip(bytes) {
            pair[0] = DIGITS[usize::from(byte >> 4)];
            pair[1] = DIGITS[usize::from(byte & 15)];
        }
        name
    }

    /// Has one step done to a record.
    async fn step(&self, key: &Key, step: Step<'_>) -> Result<Answer, StoreError> {
        let name = self.name(key);
        mark!("redis.step.before");
        let answer = within(self.patience, self.connection.run(&step, &name)).await;
        mark!("redis.step.answered");
        let answer =
            answer.inspect_err(|error| self.connection.notice(error, &name, self.patience))?;
        Answer::read(answer).map_err(failure)
    }

    /// Has one step done to a record, and waits for the replicas if it is to.
    async fn step_acknowledged(&self, key: &Key, step: Step<'_>) -> Result<Answer, StoreError> {
        match &self.acknowledged {
            Some((connection, replicas)) => {
                Box::pin(self.step_on_replicas(key, step, connection, *replicas)).await
            }
            None => self.step(key, step).await,
        }
    }

    async fn step_on_replicas(
        &self,
        key: &Key,
        step: Step<'_>,
        connection: &Connection,
        replicas: Replicas,
    ) -> Result<Answer, StoreError> {
        let name = self.name(key);
        let mut wait = command("WAIT");
        // Zero would be for ever.
        wait.arg(replicas.count).arg(millis(replicas.within).max(1));
        let patience = self.patience.saturating_add(replicas.within);
        let answers = within(patience, connection.run_and(&step, &name, &wait)).await;
        let [answer, acknowledged] =
            answers.inspect_err(|error| connection.notice(error, &name, patience))?;
        let answer = Answer::read(answer).map_err(failure)?;
        let acknowledged =
            u32::from_redis_value(acknowledged).map_err(|error| failure(error.into()))?;
        if answer.outcome == Outcome::Done && acknowledged < replicas.count {
            return Err(Cause::Unacknowledged { acknowledged, wanted: replicas.count }.error());
        }
        Ok(answer)
    }

    /// Whether the servers take a record as large as a step makes it.
    fn check_size(&self, step: &Step<'_>) -> Result<(), StoreError> {
        let bytes = record::FIXED.saturating_add(step.size());
        if bytes > self.max_bytes.min(u32::MAX as usize) {
            return Err(Cause::TooLarge { bytes, most: self.max_bytes }.error());
        }
        Ok(())
    }

    /// The record that came with an answer.
    fn record(key: &Key, answer: Answer) -> Result<Record, StoreError> {
        let Some((record, Some(now))) = answer.record else { return Err(failure(unexpected())) };
        let row = decode(*key, &record).map_err(|kind| StoreError::new(NAME, kind))?;
        Ok(row.record(now))
    }

    /// Makes the record of a first claim, unless what is asked or what is there takes the script.
    async fn first_claim(&self, claim: &Claim) -> Result<Option<Claimed>, StoreError> {
        let Some((record, kept)) = first(claim).filter(|_| !claim.issued_only) else {
            return Ok(None);
        };
        let step = Step::First { record: &record, kept };
        self.check_size(&step)?;
        match self.step_acknowledged(&claim.key, step).await {
            Ok(Answer { outcome: Outcome::Done, .. }) => {
                let granted = Row::fresh(claim, 0).record(0);
                self.note(&claim.key, &claim.operation_id, granted.kept_left);
                self.firsts.put(claim.token, record);
                Ok(Some(Claimed::Granted(granted)))
            }
            Ok(Answer { record: Some((met, _)), .. }) if is_replay(&met) => {
                Box::pin(self.replayed(claim, &met)).await
            }
            Ok(_) => Ok(None),
            // The server did not look whether there is a record, which can be had all the same.
            Err(error) if error.kind() == StoreErrorKind::Full => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Answers a claim from the completed record that it has met, of which nothing but the time
    /// that is left is missing. Its end and a purge are all that can follow a completion; who claims
    /// the key again within this round trip makes no more than that time wrong.
    async fn replayed(&self, claim: &Claim, met: &Bytes) -> Result<Option<Claimed>, StoreError> {
        let name = self.name(&claim.key);
        let mut left = command("PTTL");
        left.arg(&name);
        let left = within(self.patience, self.connection.send(&left)).await;
        let left = left.inspect_err(|error| self.connection.notice(error, &name, self.patience))?;
        let left = i64::from_redis_value(left).map_err(|error| failure(error.into()))?;
        Ok(replay(claim.key, met, left, claim.format).map(Claimed::Found))
    }

    async fn any_claim(&self, claim: &Claim) -> Result<Claimed, StoreError> {
        let what = what(&claim.operation_id, &claim.scope, &claim.fingerprint, &claim.operation);
        let reruns = claim.on_unknown == OnUnknown::Rerun;
        let arguments = [
            claim.token.as_bytes().into(),
            what.as_slice().into(),
            millis(claim.lease).into(),
            ttl_millis(claim.ttl).into(),
            claim.issued_only.into(),
            reruns.into(),
        ];
        let step = Step::new("claim", claim.format, arguments);
        self.check_size(&step)?;
        let answer = self.step_acknowledged(&claim.key, step).await?;
        match readable(answer.outcome)? {
            Outcome::Done => {
                let record = Self::record(&claim.key, answer)?;
                if record.attempt == 1 {
                    self.note(&claim.key, &record.operation_id, record.kept_left);
                }
                Ok(Claimed::Granted(record))
            }
            Outcome::Refused => Self::record(&claim.key, answer).map(Claimed::Found),
            _ => Ok(Claimed::Unknown),
        }
    }

    async fn any_completion(&self, completion: &Completion) -> Result<Written, StoreError> {
        let arguments = [
            completion.token.as_bytes().into(),
            completion.payload.as_ref().into(),
            ttl_millis(completion.ttl).into(),
            u64::from(completion.flags.bits()).into(),
        ];
        let step = Step::new("complete", completion.format, arguments);
        self.check_size(&step)?;
        self.written(&completion.key, step, true).await
    }

    async fn read(&self, key: &Key) -> Result<Option<Record>, StoreError> {
        let step = Step::new("read", FORMAT, []);
        let answer = self.step(key, step).await?;
        match readable(answer.outcome)? {
            Outcome::Done => Self::record(key, answer).map(Some),
            _ => Ok(None),
        }
    }

    /// Ends a claim or writes under it.
    async fn written(
        &self,
        key: &Key,
        step: Step<'_>,
        acknowledged: bool,
    ) -> Result<Written, StoreError> {
        let answer = if acknowledged {
            self.step_acknowledged(key, step).await?
        } else {
            self.step(key, step).await?
        };
        match readable(answer.outcome)? {
            Outcome::Done => Ok(Written::Done),
            Outcome::Refused => Self::record(key, answer).map(Written::Fenced),
            _ => Ok(Written::Gone),
        }
    }

    /// Notes where the record of an operation is, without keeping its claimant waiting: where the
    /// note is missing, a look-up searches all records.
    fn note(&self, key: &Key, operation_id: &OperationId, kept: Ttl) {
        let Some(notes) = &self.notes else { return };
        let mut note = Cmd::with_capacity(5, 3 + self.prefix.len() + 3 + 32 + 32 + 2 + 20);
        note.arg("SET").arg(self.operation_name(operation_id)).arg(key.as_bytes());
        if let Ttl::For(kept) = kept {
            note.arg("PX").arg(millis(kept.saturating_add(HANDLERS_RUN)));
        }
        if notes.try_send(note).is_err() {
            tracing::warn!("{NOT_NOTED}: too many wait to be");
        }
    }
}

/// Writes notes as they come, together what has come meanwhile.
async fn write_notes(connection: Connection, patience: Duration, mut notes: Receiver<Cmd>) {
    let mut some = Vec::with_capacity(NOTES_AT_ONCE);
    while notes.recv_many(&mut some, NOTES_AT_ONCE).await > 0 {
        mark!("redis.note.before");
        let noted = within(patience, connection.send_all(some.drain(..))).await;
        mark!("redis.note.answered");
        if let Err(error) = noted {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "{NOT_NOTED}");
        }
    }
}

/// An outcome, unless it is that the record cannot be read.
const fn readable(outcome: Outcome) -> Result<Outcome, StoreError> {
    match outcome {
        Outcome::Newer => Err(StoreError::new(NAME, StoreErrorKind::Newer)),
        Outcome::Corrupt => Err(StoreError::new(NAME, StoreErrorKind::Corrupt)),
        outcome => Ok(outcome),
    }
}

impl Store for RedisStore {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        Box::pin(async move {
            match self.0.first_claim(claim).await? {
                Some(claimed) => Ok(claimed),
                None => Box::pin(self.0.any_claim(claim)).await,
            }
        })
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            let what =
                what(&issue.operation_id, &issue.scope, &Fingerprint::NONE, &issue.operation);
            let arguments = [
                issue.token.as_bytes().into(),
                what.as_slice().into(),
                ttl_millis(issue.valid_for).into(),
                ttl_millis(issue.kept_for).into(),
                issue.payload.as_ref().into(),
            ];
            let step = Step::new("issue", issue.format, arguments);
            self.0.check_size(&step)?;
            let written = self.0.written(&issue.key, step, true).await?;
            if written == Written::Done {
                let kept = issue.kept_for.max(issue.valid_for);
                self.0.note(&issue.key, &issue.operation_id, kept);
            }
            Ok(written)
        })
    }

    fn checkpoint<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        // The order of the calls, whatever becomes of their futures.
        let number = next_checkpoint();
        Box::pin(async move {
            let arguments = [
                checkpoint.token.as_bytes().into(),
                checkpoint.payload.as_ref().into(),
                number.into(),
            ];
            let step = Step::new("checkpoint", checkpoint.format, arguments);
            self.0.check_size(&step)?;
            self.0.written(&checkpoint.key, step, true).await
        })
    }

    fn complete<'a>(
        &'a self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            if let Some(first) = self.0.firsts.take(&completion.token)
                && let Some((record, kept)) =
                    completed(&first.record, first.since.elapsed(), completion)
            {
                let step = Step::complete(&first.record[..IDENTITY], &record, kept);
                self.0.check_size(&step)?;
                return self.0.written(&completion.key, step, true).await;
            }
            Box::pin(self.0.any_completion(completion)).await
        })
    }

    fn release<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            drop(self.0.firsts.take(token));
            let step = Step::new("release", FORMAT, [token.as_bytes().into()]);
            self.0.written(key, step, false).await
        })
    }

    fn forget<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            drop(self.0.firsts.take(token));
            let step = Step::new("forget", FORMAT, [token.as_bytes().into()]);
            self.0.written(key, step, false).await
        })
    }

    /// All at once: the client sends what is ready together, to each node what concerns it.
    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        Box::pin(async move {
            let renewals = claims.iter().map(async |renewal| {
                let arguments = [renewal.token.as_bytes().into(), millis(renewal.lease).into()];
                let step = Step::new("renew", FORMAT, arguments);
                let answer = self.0.step(&renewal.key, step).await?;
                // A record that this release cannot read is not one that it holds.
                Ok(answer.outcome == Outcome::Done)
            });
            // Where one node does not answer, the leases on the others are renewed all the same.
            join_all(renewals).await.into_iter().collect()
        })
    }

    fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(self.0.read(key))
    }

    /// Redis removes what is over by itself, at once where somebody asks for it and otherwise
    /// sooner or later. A sweep hastens that a little: it looks at a thousand keys of each server,
    /// or at as many as it may remove if that is more, from where the last one ended.
    fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(self.0.sweep(limit))
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn manage(&self) -> Option<&dyn Manage> {
        Some(self)
    }

    fn wake(&self) -> Option<&dyn Wake> {
        if self.0.listeners.is_empty() { None } else { Some(self) }
    }
}
