//! The lanes to a database, and the calls that travel together while all of them are taken.
//!
//! A claim or a completion goes at once, in its caller's own task and as a statement of its own,
//! while a lane is free. When none is, it waits; whoever gives a lane back has a task of its own
//! carry all that waits in one statement, and again, until nothing waits. So a call alone costs
//! nothing more than its statement, and under load a statement, its round trip and its flush to the
//! disk are shared by as many calls as have come meanwhile.
//!
//! Who waits waits for an answer only. One that goes away takes nobody else's call along, and one
//! whose answer does not come, since the statement has failed for another's sake or the task ended
//! with its runtime, makes its call by itself.

use std::{
    collections::{HashSet, VecDeque},
    fmt,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::oneshot,
    time::{Instant, timeout},
};

use super::{Claim, Claimed, Completion, StoreError, StoreErrorKind, Written};
use crate::key::Key;

/// How many lanes there are until it is known how long a statement takes.
const AT_FIRST: usize = 4;
/// Never fewer: while one statement is flushed to the disk, the next one is on its way.
const FEWEST: usize = 2;
/// There is a lane for each time that this goes into what a statement takes which is alone. For about
/// so long it keeps a processor of the server's busy; the rest of its time it waits, for the disk or
/// on the way, and as many others can be under way meanwhile. More than that only take the calls
/// from each other that could have travelled together.
const STATEMENT: Duration = Duration::from_micros(75);
/// How many calls a statement carries at the most, and how many bytes: whoever comes first waits for
/// all of them.
const MOST_CALLS: usize = 512;
const MOST_BYTES: usize = 4 << 20;
/// How many claims may wait. What comes on top would wait for longer than anybody does.
const MOST_WAITING: usize = 4_096;

/// A store whose calls can be made one by one and many at once.
pub(super) trait Carrier: Clone + Send + Sync + 'static {
    /// The name of the store in errors.
    const NAME: &str;

    fn lanes(&self) -> &Lanes;

    /// How long a call may take.
    fn patience(&self) -> Duration;

    fn claim_one(&self, claim: &Claim) -> impl Future<Output = Result<Claimed, StoreError>> + Send;

    fn complete_one(
        &self,
        completion: &Completion,
    ) -> impl Future<Output = Result<Written, StoreError>> + Send;

    /// Makes claims on different keys, which are in order; `None` for those that are to be made one
    /// by one.
    fn claim_all(
        &self,
        claims: &[Claim],
    ) -> impl Future<Output = Result<Vec<Option<Claimed>>, StoreError>> + Send;

    /// The same for completions.
    fn complete_all(
        &self,
        completions: &[Completion],
    ) -> impl Future<Output = Result<Vec<Option<Written>>, StoreError>> + Send;
}

/// A call that can travel with others of its kind.
pub(super) trait Passenger: Clone + fmt::Debug + Send + Sync + Sized + 'static {
    type Answer: Send + 'static;

    /// Whether it may be refused when too many wait. What has happened is recorded whatever waits;
    /// there are no more completions than claims were granted.
    const IS_REFUSED: bool;

    fn key(&self) -> &Key;

    fn bytes(&self) -> usize;

    fn queue(waiting: &mut Waiting) -> &mut VecDeque<Ticket<Self>>;

    /// Whether an answer says that something was written, and so flushed to the disk.
    fn has_written(answer: &Self::Answer) -> bool;

    fn alone(
        &self,
        carrier: &impl Carrier,
    ) -> impl Future<Output = Result<Self::Answer, StoreError>> + Send;

    fn together(
        calls: &[Self],
        carrier: &impl Carrier,
    ) -> impl Future<Output = Result<Vec<Option<Self::Answer>>, StoreError>> + Send;
}

impl Passenger for Claim {
    type Answer = Claimed;

    const IS_REFUSED: bool = true;

    fn key(&self) -> &Key {
        &self.key
    }

    fn bytes(&self) -> usize {
        self.operation.len() + self.fingerprint.scheme.len()
    }

    fn queue(waiting: &mut Waiting) -> &mut VecDeque<Ticket<Self>> {
        &mut waiting.claims
    }

    fn has_written(claimed: &Claimed) -> bool {
        matches!(claimed, Claimed::Granted(_))
    }

    async fn alone(&self, carrier: &impl Carrier) -> Result<Claimed, StoreError> {
        carrier.claim_one(self).await
    }

    async fn together(
        calls: &[Self],
        carrier: &impl Carrier,
    ) -> Result<Vec<Option<Claimed>>, StoreError> {
        carrier.claim_all(calls).await
    }
}

impl Passenger for Completion {
    type Answer = Written;

    const IS_REFUSED: bool = false;

    fn key(&self) -> &Key {
        &self.key
    }

    fn bytes(&self) -> usize {
        self.payload.len()
    }

    fn queue(waiting: &mut Waiting) -> &mut VecDeque<Ticket<Self>> {
        &mut waiting.completions
    }

    fn has_written(written: &Written) -> bool {
        matches!(written, Written::Done)
    }

    async fn alone(&self, carrier: &impl Carrier) -> Result<Written, StoreError> {
        carrier.complete_one(self).await
    }

    async fn together(
        calls: &[Self],
        carrier: &impl Carrier,
    ) -> Result<Vec<Option<Written>>, StoreError> {
        carrier.complete_all(calls).await
    }
}

/// The lanes of a store. All handles to it share them.
#[derive(Debug)]
pub(super) struct Lanes {
    /// As many as the pool has connections, unless there are to be fewer.
    most: u32,
    waiting: Mutex<Waiting>,
    statements: AtomicU64,
    calls: AtomicU64,
}

/// What is under way and what waits.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    taken: usize,
    claims: VecDeque<Ticket<Claim>>,
    completions: VecDeque<Ticket<Completion>>,
    arrived: u64,
    /// What a statement that writes takes at the least, as far as it is known.
    least: Option<Duration>,
}

/// A call that waits for a lane.
#[derive(Debug)]
pub(super) struct Ticket<P: Passenger> {
    number: u64,
    call: P,
    /// Nothing is answered where the call is to be made alone.
    reply: oneshot::Sender<Result<Option<P::Answer>, StoreError>>,
}

/// Calls that travel together.
enum Bundle {
    Claims(Vec<Ticket<Claim>>),
    Completions(Vec<Ticket<Completion>>),
}

/// How many statements have carried several calls, and how many calls these were, since the store
/// was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bundled {
    /// Statements that carried several calls.
    pub statements: u64,
    /// The calls that they carried.
    pub calls: u64,
}

/// Makes a call: at once if a lane is free, else together with others.
pub(super) async fn carry<C: Carrier, P: Passenger>(
    carrier: &C,
    call: &P,
) -> Result<P::Answer, StoreError> {
    let answer = match carrier.lanes().enter(carrier, call)? {
        Entry::Free(lane) => {
            let since = Instant::now();
            let answer = call.alone(carrier).await;
            if answer.as_ref().is_ok_and(P::has_written) {
                carrier.lanes().took(since.elapsed());
            }
            drop(lane);
            return answer;
        }
        Entry::Waits(answer) => answer,
    };
    match timeout(carrier.patience(), answer).await {
        Ok(Ok(Ok(Some(answer)))) => Ok(answer),
        Ok(Ok(Err(error))) => Err(error),
        Ok(Ok(Ok(None)) | Err(_)) => call.alone(carrier).await,
        Err(elapsed) => Err(StoreError::caused_by(C::NAME, StoreErrorKind::TimedOut, elapsed)),
    }
}

enum Entry<C: Carrier, P: Passenger> {
    Free(Lane<C>),
    Waits(oneshot::Receiver<Result<Option<P::Answer>, StoreError>>),
}

impl Lanes {
    pub(super) fn new(most: u32) -> Self {
        Self {
            most: most.max(1),
            waiting: Mutex::default(),
            statements: AtomicU64::new(0),
            calls: AtomicU64::new(0),
        }
    }

    pub(super) const fn most(&self) -> u32 {
        self.most
    }

    pub(super) fn bundled(&self) -> Bundled {
        Bundled {
            statements: self.statements.load(Ordering::Relaxed),
            calls: self.calls.load(Ordering::Relaxed),
        }
    }

    fn enter<C: Carrier, P: Passenger>(
        &self,
        carrier: &C,
        call: &P,
    ) -> Result<Entry<C, P>, StoreError> {
        let runtime = Handle::try_current()
            .map_err(|none| StoreError::caused_by(C::NAME, StoreErrorKind::Unreachable, none))?;
        let mut waiting = self.lock();
        let free = waiting.taken < self.allowed(&waiting);
        if free && waiting.is_empty() {
            waiting.taken += 1;
            drop(waiting);
            return Ok(Entry::Free(Lane { carrier: carrier.clone(), runtime }));
        }
        if P::IS_REFUSED && P::queue(&mut waiting).len() >= MOST_WAITING {
            P::queue(&mut waiting).retain(|ticket| !ticket.reply.is_closed());
            if P::queue(&mut waiting).len() >= MOST_WAITING {
                let cause = "more claims wait for a connection than can be made in time";
                return Err(StoreError::caused_by(C::NAME, StoreErrorKind::Overloaded, cause));
            }
        }
        let (reply, answer) = oneshot::channel();
        let number = waiting.arrived;
        waiting.arrived += 1;
        P::queue(&mut waiting).push_back(Ticket { number, call: call.clone(), reply });
        if free {
            waiting.taken += 1;
            drop(waiting);
            drop(Lane { carrier: carrier.clone(), runtime });
        }
        Ok(Entry::Waits(answer))
    }

    /// How many lanes there are at the moment.
    fn allowed(&self, waiting: &Waiting) -> usize {
        let worth = match waiting.least {
            None => AT_FIRST,
            Some(least) => {
                let worth = least.as_micros() / STATEMENT.as_micros();
                usize::try_from(worth).unwrap_or(usize::MAX).max(FEWEST)
            }
        };
        worth.min(self.most as usize)
    }

    /// Learns what a statement took. What it took beside others says only what it may take less.
    fn took(&self, time: Duration) {
        let mut waiting = self.lock();
        let was_alone = waiting.taken == 1;
        waiting.least = Some(match waiting.least {
            Some(least) if time > least && was_alone => least + (time - least) / 16,
            Some(least) => least.min(time),
            None => time,
        });
    }

    /// What is to travel next, in the order in which it came; a lane that finds nothing is free.
    fn next_bundle(&self) -> Option<Bundle> {
        let mut waiting = self.lock();
        let first = |number: Option<u64>| number.unwrap_or(u64::MAX);
        let claim = first(waiting.claims.front().map(|ticket| ticket.number));
        let completion = first(waiting.completions.front().map(|ticket| ticket.number));
        if waiting.is_empty() {
            waiting.taken -= 1;
            return None;
        }
        Some(match claim < completion {
            true => Bundle::Claims(board(&mut waiting.claims)),
            false => Bundle::Completions(board(&mut waiting.completions)),
        })
    }

    /// No code that runs under the lock can panic in the middle of a change.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.claims.is_empty() && self.completions.is_empty()
    }
}

/// Takes out of a queue what can travel together: no two calls on one key. What nobody waits for any
/// more is left out, as a statement is that its caller has not sent yet.
fn board<P: Passenger>(queue: &mut VecDeque<Ticket<P>>) -> Vec<Ticket<P>> {
    let mut on_board = Vec::with_capacity(queue.len().min(MOST_CALLS));
    let mut left = VecDeque::new();
    let (mut keys, mut bytes) = (HashSet::new(), 0);
    while on_board.len() < MOST_CALLS
        && let Some(ticket) = queue.pop_front()
    {
        if ticket.reply.is_closed() {
            continue;
        }
        let more = bytes + ticket.call.bytes();
        if !on_board.is_empty() && more > MOST_BYTES {
            queue.push_front(ticket);
            break;
        }
        if keys.insert(*ticket.call.key()) {
            bytes = more;
            on_board.push(ticket);
        } else {
            left.push_back(ticket);
        }
    }
    left.append(queue);
    *queue = left;
    on_board
}

/// A lane that is taken. To drop it gives it back, or hands it on to what waits.
struct Lane<C: Carrier> {
    carrier: C,
    runtime: Handle,
}

impl<C: Carrier> Drop for Lane<C> {
    fn drop(&mut self) {
        let mut waiting = self.carrier.lanes().lock();
        if waiting.is_empty() {
            waiting.taken -= 1;
            return;
        }
        drop(waiting);
        // Made before the task: a runtime that is shutting down drops the task without running it.
        let duty = Duty { carrier: self.carrier.clone(), done: false };
        self.runtime.spawn(serve(duty));
    }
}

/// A task's duty to carry all that waits, which it hands back however it ends.
struct Duty<C: Carrier> {
    carrier: C,
    /// Whether it ended because nothing waited.
    done: bool,
}

impl<C: Carrier> Drop for Duty<C> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut waiting = self.carrier.lanes().lock();
        waiting.taken -= 1;
        // Who waits is told so, and sees to itself: the next call may be a long time away.
        let (claims, completions) =
            (std::mem::take(&mut waiting.claims), std::mem::take(&mut waiting.completions));
        drop(waiting);
        drop((claims, completions));
    }
}

async fn serve<C: Carrier>(mut duty: Duty<C>) {
    while let Some(bundle) = duty.carrier.lanes().next_bundle() {
        match bundle {
            Bundle::Claims(tickets) => travel(&duty.carrier, tickets).await,
            Bundle::Completions(tickets) => travel(&duty.carrier, tickets).await,
        }
    }
    duty.done = true;
}

/// Makes calls in one statement and answers them.
async fn travel<C: Carrier, P: Passenger>(carrier: &C, mut tickets: Vec<Ticket<P>>) {
    if tickets.len() < 2 {
        for ticket in tickets {
            let answer = ticket.call.alone(carrier).await.map(Some);
            drop(ticket.reply.send(answer));
        }
        return;
    }
    // In one order everywhere, so that no two statements wait for each other's rows.
    tickets.sort_unstable_by_key(|ticket| *ticket.call.key().as_bytes());
    let (calls, replies): (Vec<_>, Vec<_>) =
        tickets.into_iter().map(|Ticket { call, reply, .. }| (call, reply)).unzip();
    let lanes = carrier.lanes();
    lanes.statements.fetch_add(1, Ordering::Relaxed);
    lanes.calls.fetch_add(calls.len() as u64, Ordering::Relaxed);
    match P::together(&calls, carrier).await {
        Ok(answers) => {
            for (reply, answer) in replies.into_iter().zip(answers) {
                drop(reply.send(Ok(answer)));
            }
        }
        // A server that cannot be asked is not asked by all of them at once.
        Err(error) if error.kind().is_transient() => {
            for reply in replies {
                drop(reply.send(Err(error.clone())));
            }
        }
        // It may be one of them that is the reason: each finds out for itself.
        Err(error) => {
            tracing::debug!(%error, calls = calls.len(), "calls that travelled together go alone");
        }
    }
}

#[cfg(test)]
mod tests;
