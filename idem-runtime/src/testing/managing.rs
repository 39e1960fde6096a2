//! Laws 29 to 33: finding, listing and removing records.

use std::sync::Arc;

use futures_util::future::join_all;

use super::{
    Ask, LEASE, SLACK, StoreFixture, TTL, VALID, any_claim, any_issue, assert_done, assert_gone,
    assert_newer, assert_same, checkpoint_of, claim_on, completion_of,
};
use crate::{
    key::{Key, OperationId, ScopeDigest},
    record::{FORMAT, Flags, Record, State, Ttl},
    store::{Claim, Completion, Issue, Kind, Listing, Manage, Page, Purge, Purged, Store},
};

const ZERO: std::time::Duration = std::time::Duration::ZERO;
/// How many calls a listing or a purge may take before it is taken to have no end.
const CALLS: usize = 1_000;

/// What a law asks of a store that can be searched, where an error breaks the law.
trait AskManager {
    fn manager(&self) -> &dyn Manage;
    async fn found(&self, operation_id: OperationId, reason: &str) -> Record;
    async fn not_found(&self, operation_id: OperationId, reason: &str);
    async fn page(&self, listing: &Listing) -> Page;
    async fn purged(&self, purge: Purge) -> Purged;
    /// The records of all pages of a listing.
    async fn listed(&self, kind: Kind, scope: Option<ScopeDigest>, limit: usize) -> Vec<Record>;
    /// Purges a scope, so many records a call, and says what all calls together removed, and what
    /// the last one left.
    async fn purged_scope(&self, scope: ScopeDigest, limit: usize) -> Purged;
}

impl AskManager for Arc<dyn Store> {
    fn manager(&self) -> &dyn Manage {
        self.manage().unwrap_or_else(|| panic!("the store must be one that can be searched"))
    }

    async fn found(&self, operation_id: OperationId, reason: &str) -> Record {
        match self.manager().find(&operation_id).await {
            Ok(Some(record)) => record,
            answer => panic!("the operation must be found: {reason}; got {answer:?}"),
        }
    }

    async fn not_found(&self, operation_id: OperationId, reason: &str) {
        match self.manager().find(&operation_id).await {
            Ok(None) => {}
            answer => panic!("the operation must not be found: {reason}; got {answer:?}"),
        }
    }

    async fn page(&self, listing: &Listing) -> Page {
        match self.manager().list(listing).await {
            Ok(page) => page,
            Err(error) => panic!("listing failed: {error:?}"),
        }
    }

    async fn purged(&self, purge: Purge) -> Purged {
        match self.manager().purge(&purge).await {
            Ok(purged) => purged,
            Err(error) => panic!("purging failed: {error:?}"),
        }
    }

    async fn listed(&self, kind: Kind, scope: Option<ScopeDigest>, limit: usize) -> Vec<Record> {
        let mut records = Vec::new();
        let mut after = None;
        for _ in 0..CALLS {
            let page = self.page(&Listing { kind, scope, after, limit }).await;
            assert!(page.records.len() <= limit, "a page of {limit} has {}", page.records.len());
            records.extend(page.records);
            match page.next {
                None => return records,
                next => after = next,
            }
        }
        panic!("a listing must end; this one goes on after {CALLS} pages");
    }

    async fn purged_scope(&self, scope: ScopeDigest, limit: usize) -> Purged {
        let mut removed = 0;
        for _ in 0..CALLS {
            let purged = self.purged(Purge::Scope { scope, limit }).await;
            assert!(purged.removed <= limit, "{} were removed at {limit} a call", purged.removed);
            removed += purged.removed;
            if purged.removed == 0 {
                return Purged { removed, running: purged.running };
            }
        }
        panic!("a purge must end; this one goes on after {CALLS} calls");
    }
}

/// One record in each state that a record can be in.
struct EachState {
    running: Claim,
    lapsed: Claim,
    released: Claim,
    completed: Claim,
    tombstone: Claim,
    issued: Issue,
}

impl EachState {
    /// Makes them, the lease of [`lapsed`](Self::lapsed) over and all others young.
    async fn make(fixture: &dyn StoreFixture, scope: ScopeDigest) -> Self {
        let store = fixture.store();
        let [running, lapsed, released, completed, tombstone] =
            std::array::from_fn(|_| Claim { scope, ..any_claim() });
        store.granted(&lapsed, "its key is fresh").await;
        fixture.advance(LEASE).await;
        for claim in [&running, &released, &completed, &tombstone] {
            store.granted(claim, "its key is fresh").await;
        }
        let mark = checkpoint_of(&running, b"so far");
        assert_done(&store.checkpoint(&mark).await, "it holds the claim");
        let given_up = store.release(&released.key, &released.token).await;
        assert_done(&given_up, "it holds the claim");
        let answer = completion_of(&completed, b"answer");
        assert_done(&store.complete(&answer).await, "it holds the claim");
        let fact = Completion { flags: Flags::TOMBSTONE, ..completion_of(&tombstone, b"fact") };
        assert_done(&store.complete(&fact).await, "it holds the claim");
        let issued = Issue { scope, ..any_issue() };
        assert_done(&store.issue(&issued).await, "its key is fresh");
        Self { running, lapsed, released, completed, tombstone, issued }
    }

    fn claims(&self) -> [&Claim; 5] {
        [&self.running, &self.lapsed, &self.released, &self.completed, &self.tombstone]
    }

    /// Of each record its key and its operation id, in the order in which they were made.
    fn all(&self) -> [(Key, OperationId); 6] {
        let Self { running, lapsed, released, completed, tombstone, issued } = self;
        let [lapsed, running, released, completed, tombstone] =
            [lapsed, running, released, completed, tombstone]
                .map(|claim| (claim.key, claim.operation_id));
        [lapsed, running, released, completed, tombstone, (issued.key, issued.operation_id)]
    }
}

/// A scope that nothing else uses.
fn any_scope() -> ScopeDigest {
    ScopeDigest::from_bytes(rand::random())
}

fn keys(records: &[Record]) -> Vec<Key> {
    records.iter().map(|record| record.key).collect()
}

fn sorted(mut keys: Vec<Key>) -> Vec<Key> {
    keys.sort_unstable();
    keys
}

/// Law 29: an operation is found by its id whatever its state, for as long as its record is kept,
/// and by the id that the record has now.
pub async fn an_operation_is_found_by_its_id(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    second.not_found(OperationId::random(), "nothing has this id").await;
    let records = EachState::make(fixture, any_scope()).await;
    for (key, operation_id) in records.all() {
        let reason = format!("it is kept: {operation_id}");
        let read = store.kept(&key, &reason).await;
        let found = second.found(operation_id, &reason).await;
        assert_same(&read, &found, ZERO, "found is what is read");
    }

    // A takeover goes on with the operation, and what starts afresh is another one.
    let next = claim_on(records.lapsed.key);
    let taken = store.granted(&next, "the lease is over").await;
    assert_eq!(taken.operation_id, records.lapsed.operation_id);
    second.not_found(next.operation_id, "its claim goes on with another operation").await;
    let found = second.found(records.lapsed.operation_id, "it runs again").await;
    assert_same(&taken, &found, ZERO, "found is what it has become");
    let user = Claim { issued_only: true, ..claim_on(records.issued.key) };
    store.granted(&user, "it is issued").await;
    second.not_found(records.issued.operation_id, "the key's first user replaced it").await;
    second.found(user.operation_id, "the key's first user brought it").await;
    let running = &records.running;
    assert_done(&store.forget(&running.key, &running.token).await, "it holds the claim");
    second.not_found(running.operation_id, "nothing of it is left").await;

    fixture.advance(TTL + SLACK).await;
    for claim in records.claims() {
        second.not_found(claim.operation_id, "its record is over").await;
    }

    let newer = Claim { format: FORMAT + 1, ..any_claim() };
    store.granted(&newer, "its key is fresh").await;
    assert_newer(&second.manager().find(&newer.operation_id).await, "the record's format is newer");
}

/// Law 30: a listing holds exactly the records of its kind and scope that are still kept, from the
/// oldest to the youngest, page by page, each once, and without their payloads.
pub async fn a_listing_goes_from_the_oldest_to_the_youngest(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    assert!(second.listed(Kind::Any, None, 10).await.is_empty(), "nothing was made yet");
    // Many of one age, so that a page ends among them, and some that are older or younger.
    let mut expected = Vec::new();
    for count in [1, 12, 3] {
        let claims: Vec<_> = (0..count).map(|_| any_claim()).collect();
        join_all(claims.iter().map(|claim| store.granted(claim, "its key is fresh"))).await;
        let mark = checkpoint_of(&claims[0], b"somebody's data");
        assert_done(&store.checkpoint(&mark).await, "it holds the claim");
        expected.push(sorted(claims.iter().map(|claim| claim.key).collect()));
        fixture.advance(SLACK).await;
    }
    for limit in [1, 2, 5, 15, 16, 17, usize::MAX] {
        let records = second.listed(Kind::Any, None, limit).await;
        let mut rest = &keys(&records)[..];
        for (age, expected) in expected.iter().enumerate() {
            let (same_age, younger) = rest.split_at(expected.len().min(rest.len()));
            let reason = format!("each record once, by age ({age}), in pages of {limit}");
            assert_eq!(sorted(same_age.to_vec()), *expected, "{reason}");
            rest = younger;
        }
        assert!(rest.is_empty(), "each record once, in pages of {limit}; got more: {rest:?}");
        for record in &records {
            assert!(record.payload.is_empty(), "a listing holds no payload: {record:?}");
        }
        for pair in records.windows(2) {
            assert!(pair[0].age + SLACK > pair[1].age, "the oldest first: {pair:?}");
        }
    }
    let again = keys(&second.listed(Kind::Any, None, usize::MAX).await);
    let pages = keys(&store.listed(Kind::Any, None, 3).await);
    assert_eq!(again, pages, "records of one age are listed in one order");

    // Each kind, of one scope and of all.
    let (scope, other) = (any_scope(), any_scope());
    fixture.advance(LEASE).await;
    let records = EachState::make(fixture, scope).await;
    let theirs = EachState::make(fixture, other).await;
    for (records, scope) in [(&records, scope), (&theirs, other)] {
        let all: Vec<_> = records.all().into_iter().map(|(key, _)| key).collect();
        let of = |kind| second.listed(kind, Some(scope), 2);
        assert_eq!(sorted(keys(&of(Kind::Any).await)), sorted(all), "all of a scope");
        let read = store.kept(&records.tombstone.key, "it is completed").await;
        let tombstones = of(Kind::Tombstones).await;
        assert_eq!(keys(&tombstones), [records.tombstone.key], "the tombstones of a scope");
        let listed = &tombstones[0];
        let untold = Record { payload: bytes::Bytes::new(), ..read };
        assert_same(&untold, listed, ZERO, "what is listed is the record");
    }
    // The first scope's running one has lapsed since.
    let unsettled = second.listed(Kind::Unsettled, Some(scope), 2).await;
    let lapsed = [records.running.key, records.lapsed.key, records.released.key];
    assert_eq!(sorted(keys(&unsettled)), sorted(lapsed.to_vec()), "released, or their lease over");
    assert_eq!(keys(&unsettled)[0], records.lapsed.key, "the oldest first");
    assert!(second.listed(Kind::Running, Some(scope), 2).await.is_empty(), "no lease is alive");
    let running = second.listed(Kind::Running, None, 2).await;
    assert_eq!(keys(&running), [theirs.running.key], "of everybody, those whose lease is alive");
    assert_eq!(running[0].state, State::Running);

    let newer = Claim { scope: any_scope(), format: FORMAT + 1, ..any_claim() };
    store.granted(&newer, "its key is fresh").await;
    let records = second.listed(Kind::Running, Some(newer.scope), 2).await;
    assert_eq!(keys(&records), [newer.key], "a record of a newer format is listed");
    assert_eq!(records[0].format, FORMAT + 1);

    fixture.advance(TTL + SLACK).await;
    let kept = second.listed(Kind::Any, Some(other), 2).await;
    assert_eq!(keys(&kept), [theirs.issued.key], "what is over is not listed, swept or not");
}

/// Law 31: a purged key was never used. Nothing is left of it; the next claim is attempt 1 under
/// its own operation id.
pub async fn a_purged_key_was_never_used(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let nothing = second.purged(Purge::Key(any_claim().key)).await;
    assert_eq!(nothing, Purged::default(), "there is nothing to remove");
    let records = EachState::make(fixture, any_scope()).await;
    // Its lease ends, too.
    fixture.advance(LEASE).await;
    for (key, operation_id) in records.all() {
        let purged = second.purged(Purge::Key(key)).await;
        assert_eq!(purged, Purged { removed: 1, running: 0 }, "a purge is for every state");
        store.none(&key, "it was purged").await;
        store.not_found(operation_id, "it was purged").await;
        let again = second.purged(Purge::Key(key)).await;
        assert_eq!(again, Purged::default(), "there is nothing left to remove");
    }
    for claim in records.claims() {
        let late = store.complete(&completion_of(claim, b"late")).await;
        assert_gone(&late, "its record was purged");
    }
    let user = Claim { issued_only: true, ..claim_on(records.issued.key) };
    store.unknown(&user, "an issued key that was purged was never issued").await;
    for (key, _) in records.all() {
        let next = claim_on(key);
        let record = second.granted(&next, "its record was purged").await;
        assert_eq!(record.attempt, 1, "the attempts are counted afresh");
        assert_eq!(record.operation_id, next.operation_id, "it is another operation");
        assert_eq!(record.flags, Flags::NONE, "nothing of the purged record is left");
        assert!(record.payload.is_empty(), "nothing of the purged record is left: {record:?}");
        assert!(record.age <= SLACK, "the record is a new one: {record:?}");
    }

    let newer = Claim { format: FORMAT + 1, ..any_claim() };
    store.granted(&newer, "its key is fresh").await;
    fixture.advance(LEASE).await;
    let purged = second.purged(Purge::Key(newer.key)).await;
    assert_eq!(purged.removed, 1, "a purge is for every format");
    store.granted(&claim_on(newer.key), "its record was purged").await;
}

/// Law 32: a purge leaves the running. A record whose lease is alive stays, and is counted.
pub async fn a_purge_leaves_the_running(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let scope = any_scope();
    let [first, other] = std::array::from_fn(|_| Claim { scope, ..any_claim() });
    for claim in [&first, &other] {
        let before = store.granted(claim, "its key is fresh").await;
        let purged = second.purged(Purge::Key(claim.key)).await;
        assert_eq!(purged, Purged { removed: 0, running: 1 }, "its lease is alive");
        let after = store.kept(&claim.key, "its lease is alive").await;
        assert_same(&before, &after, ZERO, "a purge changes nothing of what runs");
    }
    let purged = second.purged(Purge::Scope { scope, limit: 10 }).await;
    assert_eq!(purged, Purged { removed: 0, running: 2 }, "their leases are alive");
    let done = store.complete(&completion_of(&first, b"answer")).await;
    assert_done(&done, "it still holds the claim");
    let purged = second.purged_scope(scope, 10).await;
    assert_eq!(purged, Purged { removed: 1, running: 1 }, "one of them has ended");
    store.none(&first.key, "it was purged").await;
    fixture.advance(LEASE).await;
    let purged = second.purged_scope(scope, 10).await;
    assert_eq!(purged, Purged { removed: 1, running: 0 }, "the other one's lease is over");
    store.none(&other.key, "it was purged").await;
}

/// Law 33: a purge ends at its scope. It removes all records of the scope, at most as many as it
/// was told in one call, and no other's.
pub async fn a_purge_ends_at_its_scope(fixture: &dyn StoreFixture) {
    let (store, second) = (fixture.store(), fixture.second());
    let scope = any_scope();
    let mut bytes = *scope.as_bytes();
    bytes[31] ^= 1;
    let neighbour = ScopeDigest::from_bytes(bytes);
    let theirs = EachState::make(fixture, neighbour).await;
    let ours = EachState::make(fixture, scope).await;
    let more: Vec<_> = (0..7).map(|_| Claim { scope, ..any_claim() }).collect();
    for claim in &more {
        store.granted(claim, "its key is fresh").await;
        let done = store.complete(&completion_of(claim, b"answer")).await;
        assert_done(&done, "it holds the claim");
    }

    let nobody = second.purged_scope(any_scope(), 10).await;
    assert_eq!(nobody, Purged::default(), "this scope has no records");
    let none = second.purged(Purge::Scope { scope, limit: 0 }).await;
    assert_eq!(none.removed, 0, "no more than it was told");
    let purged = second.purged(Purge::Scope { scope, limit: 2 }).await;
    assert_eq!(purged.removed, 2, "as many as it was told, since there are more");
    let purged = second.purged_scope(scope, 4).await;
    assert_eq!(purged, Purged { removed: 5 + more.len() - 2, running: 1 }, "all that do not run");
    let left = second.listed(Kind::Any, Some(scope), 10).await;
    assert_eq!(keys(&left), [ours.running.key], "all that do not run are gone");
    for claim in &more {
        store.none(&claim.key, "its scope was purged").await;
    }
    for (key, _) in theirs.all() {
        store.kept(&key, "it is in another scope").await;
    }

    // A record counts to the scope that it has now.
    let issued = Issue { scope, valid_for: Ttl::For(VALID), ..any_issue() };
    assert_done(&store.issue(&issued).await, "its key is fresh");
    let user = Claim { scope: neighbour, ..claim_on(issued.key) };
    store.granted(&user, "it is issued").await;
    assert_done(&store.release(&user.key, &user.token).await, "it holds the claim");
    assert_eq!(second.purged_scope(scope, 4).await.removed, 0, "its user has another scope");
    store.kept(&issued.key, "its user has another scope").await;
}
