//! The laws catch what they are for: each fault breaks the law that forbids it.

use std::sync::Mutex;

use super::*;
use crate::store::{
    Clock, Kind, Listing, Manage, ManualClock, MemoryStore, Page, Place, Purge, Purged, Renewal,
};

/// What a broken store does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    LooksThenActs,
    CountsTheSameTokenTwice,
    RefusalExtendsTheLease,
    IgnoresTheScheme,
    NeverTakesOver,
    TruncatesKeys,
    LosesTheFlags,
    CompletesTwice,
    LateOwnersLose,
    IgnoresTheTokenOnComplete,
    ReleaseForgets,
    ForgetReleases,
    ReleasesWhatIsNot,
    RenewsAnything,
    CountsFromTheClaim,
    KeepsForTheLeaseOnly,
    ExpiresAtTheSweep,
    ForEverIsAYear,
    SweepsWithoutLimit,
    ReadsWhatIsNewer,
    MakesUnknownKeys,
    LosesWhatWasIssued,
    IssuesTwice,
    UsingExtendsTheValidity,
    KeepsForTheValidityOnly,
    TakeoverLosesTheCheckpoint,
    CheckpointRenewsTheLease,
    IgnoresTheTokenOnCheckpoint,
    FindsOnlyWhatRuns,
    FindsBySomeOldId,
    ListsTheYoungestFirst,
    ListsPayloads,
    ListsAPlaceTwice,
    ListsEverybody,
    TakesALapsedLeaseForRunning,
    PurgeReleases,
    PurgesTheRunning,
    PurgesEverybody,
    PurgesWithoutLimit,
    PurgesTheCompletedOnly,
}

/// A memory store with a fault.
#[derive(Debug)]
struct Broken {
    fault: Fault,
    inner: MemoryStore,
    clock: ManualClock,
    /// Time that has passed without the store's noticing.
    unnoticed: Mutex<Duration>,
    /// Operation ids that were proposed, and the keys that they were proposed for.
    proposed: Mutex<Vec<(OperationId, Key)>>,
}

impl Broken {
    /// The token that the record has, whoever asks.
    async fn token_of(&self, key: &Key, token: Token) -> Token {
        let record = self.inner.read(key).await.ok().flatten();
        record.map_or(token, |record| record.token)
    }

    async fn broken_claim(&self, claim: &Claim) -> Result<Claimed, StoreError> {
        let mut claim = claim.clone();
        self.proposed.lock().unwrap().push((claim.operation_id, claim.key));
        match self.fault {
            Fault::LooksThenActs => {
                let seen = self.inner.read(&claim.key).await?;
                tokio::task::yield_now().await;
                let answer = self.inner.claim(&claim).await?;
                return Ok(match (seen, answer) {
                    (None, Claimed::Found(record)) => {
                        Claimed::Granted(Record { token: claim.token, ..record })
                    }
                    (_, answer) => answer,
                });
            }
            Fault::CountsTheSameTokenTwice => {
                if let Claimed::Granted(record) = self.inner.claim(&claim).await? {
                    let attempt = record.attempt + u32::from(!record.age.is_zero());
                    return Ok(Claimed::Granted(Record { attempt, ..record }));
                }
            }
            Fault::RefusalExtendsTheLease => {
                let token = self.token_of(&claim.key, claim.token).await;
                let renewal = Renewal { key: claim.key, token, lease: LEASE };
                self.inner.renew(&[renewal]).await?;
            }
            Fault::IgnoresTheScheme => claim.fingerprint.scheme = "law/1".into(),
            Fault::NeverTakesOver => {
                if let Some(record) = self.inner.read(&claim.key).await?
                    && record.token != claim.token
                {
                    return Ok(Claimed::Found(record));
                }
            }
            Fault::TruncatesKeys => {
                let mut digest = *claim.key.as_bytes();
                digest[31] = 0;
                claim.key = Key::from_bytes(digest);
            }
            Fault::KeepsForTheLeaseOnly => claim.ttl = Ttl::For(claim.lease),
            Fault::ForEverIsAYear if claim.ttl == Ttl::Forever => {
                claim.ttl = Ttl::For(Duration::from_secs(365 * 24 * 3600));
            }
            Fault::ReadsWhatIsNewer => claim.format = FORMAT,
            Fault::MakesUnknownKeys => claim.issued_only = false,
            Fault::LosesWhatWasIssued | Fault::TakeoverLosesTheCheckpoint => {
                let lost = if self.fault == Fault::LosesWhatWasIssued { 1 } else { 2 };
                return Ok(match self.inner.claim(&claim).await? {
                    Claimed::Granted(record) if record.attempt >= lost => {
                        Claimed::Granted(Record { payload: Bytes::new(), ..record })
                    }
                    answer => answer,
                });
            }
            Fault::UsingExtendsTheValidity => {
                return Ok(match self.inner.claim(&claim).await? {
                    Claimed::Granted(record) => Claimed::Granted(Record {
                        valid_left: record.valid_left.max(claim.ttl),
                        ..record
                    }),
                    answer => answer,
                });
            }
            _ => {}
        }
        self.inner.claim(&claim).await
    }
}

impl Store for Broken {
    fn claim<'a>(&'a self, claim: &'a Claim) -> BoxFuture<'a, Result<Claimed, StoreError>> {
        Box::pin(self.broken_claim(claim))
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            let mut issue = issue.clone();
            if self.fault == Fault::KeepsForTheValidityOnly {
                issue.kept_for = issue.valid_for;
            }
            match self.inner.issue(&issue).await? {
                Written::Fenced(_) if self.fault == Fault::IssuesTwice => Ok(Written::Done),
                answer => Ok(answer),
            }
        })
    }

    fn checkpoint<'a>(
        &'a self,
        checkpoint: &'a Checkpoint,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            let mut checkpoint = checkpoint.clone();
            let Checkpoint { key, token, .. } = checkpoint;
            match self.fault {
                Fault::IgnoresTheTokenOnCheckpoint => {
                    checkpoint.token = self.token_of(&key, token).await;
                }
                Fault::CheckpointRenewsTheLease => {
                    self.inner.renew(&[Renewal { key, token, lease: LEASE }]).await?;
                }
                _ => {}
            }
            self.inner.checkpoint(&checkpoint).await
        })
    }

    fn complete<'a>(
        &'a self,
        completion: &'a Completion,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            let mut completion = completion.clone();
            match self.fault {
                Fault::LosesTheFlags => completion.flags = Flags::NONE,
                Fault::IgnoresTheTokenOnComplete => {
                    completion.token = self.token_of(&completion.key, completion.token).await;
                }
                Fault::CompletesTwice => {
                    if let Some(record) = self.inner.read(&completion.key).await?
                        && record.state == crate::record::State::Completed
                    {
                        return Ok(Written::Fenced(record));
                    }
                }
                Fault::CountsFromTheClaim => {
                    if let (Ttl::For(span), Some(record)) =
                        (completion.ttl, self.inner.read(&completion.key).await?)
                    {
                        completion.ttl = Ttl::For(span.saturating_sub(record.age));
                    }
                }
                Fault::LateOwnersLose => {
                    if let Some(record) = self.inner.read(&completion.key).await?
                        && record.lease_left.is_zero()
                    {
                        return Ok(Written::Fenced(record));
                    }
                }
                _ => {}
            }
            self.inner.complete(&completion).await
        })
    }

    fn release<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            match (self.fault, self.inner.read(key).await?) {
                (Fault::ReleaseForgets, _) => self.inner.forget(key, token).await,
                (Fault::ReleasesWhatIsNot, None) => Ok(Written::Done),
                _ => self.inner.release(key, token).await,
            }
        })
    }

    fn forget<'a>(
        &'a self,
        key: &'a Key,
        token: &'a Token,
    ) -> BoxFuture<'a, Result<Written, StoreError>> {
        Box::pin(async move {
            match self.fault {
                Fault::ForgetReleases => self.inner.release(key, token).await,
                _ => self.inner.forget(key, token).await,
            }
        })
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> BoxFuture<'a, Result<Vec<bool>, StoreError>> {
        Box::pin(async move {
            let mut held = self.inner.renew(claims).await?;
            if self.fault == Fault::RenewsAnything {
                held.fill(true);
            }
            Ok(held)
        })
    }

    fn read<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        self.inner.read(key)
    }

    fn sweep(&self, limit: usize) -> BoxFuture<'_, Result<usize, StoreError>> {
        Box::pin(async move {
            self.clock.advance(std::mem::take(&mut *self.unnoticed.lock().unwrap()));
            let limit = if self.fault == Fault::SweepsWithoutLimit { usize::MAX } else { limit };
            self.inner.sweep(limit).await
        })
    }

    fn manage(&self) -> Option<&dyn Manage> {
        Some(self)
    }
}

impl Broken {
    async fn broken_list(&self, listing: &Listing) -> Result<Page, StoreError> {
        let mut listing = *listing;
        match self.fault {
            Fault::ListsEverybody => listing.scope = None,
            Fault::TakesALapsedLeaseForRunning if listing.kind == Kind::Running => {
                listing.kind = Kind::Unsettled;
            }
            _ => {}
        }
        let mut page = self.inner.list(&listing).await?;
        match self.fault {
            Fault::ListsTheYoungestFirst => page.records.reverse(),
            Fault::ListsPayloads => {
                for record in &mut page.records {
                    if let Ok(Some(whole)) = self.inner.read(&record.key).await {
                        *record = whole;
                    }
                }
            }
            // As one that pages by time alone, and looks at its bound again.
            Fault::ListsAPlaceTwice => {
                let none = Key::from_bytes([0; 32]);
                page.next = page.next.map(|next| match next.created {
                    created if listing.limit > 12 => Place { created, key: none },
                    _ => next,
                });
            }
            _ => {}
        }
        Ok(page)
    }

    async fn broken_purge(&self, purge: &Purge) -> Result<Purged, StoreError> {
        let mut purge = *purge;
        match (self.fault, &mut purge) {
            (Fault::PurgeReleases, Purge::Key(key)) => {
                let running = self.inner.read(key).await?;
                let leased = running.is_some_and(|record| !record.lease_left.is_zero());
                let token = self.token_of(key, Token::random()).await;
                if !leased && let Written::Done = self.inner.release(key, &token).await? {
                    return Ok(Purged { removed: 1, running: 0 });
                }
            }
            (Fault::PurgesTheRunning, Purge::Key(key)) => {
                let token = self.token_of(key, Token::random()).await;
                if let Written::Done = self.inner.forget(key, &token).await? {
                    return Ok(Purged { removed: 1, running: 0 });
                }
            }
            (Fault::PurgesTheCompletedOnly, Purge::Key(key)) => {
                let record = self.inner.read(key).await.ok().flatten();
                if record.is_none_or(|record| record.state != crate::record::State::Completed) {
                    return Ok(Purged::default());
                }
            }
            (Fault::PurgesEverybody, Purge::Scope { limit, .. }) => {
                let (kind, scope, after) = (Kind::Any, None, None);
                let listing = Listing { kind, scope, after, limit: *limit };
                for record in self.inner.list(&listing).await?.records {
                    self.inner.purge(&Purge::Key(record.key)).await?;
                }
            }
            (Fault::PurgesWithoutLimit, Purge::Scope { limit, .. }) => *limit = usize::MAX,
            _ => {}
        }
        self.inner.purge(&purge).await
    }
}

impl Manage for Broken {
    fn find<'a>(
        &'a self,
        operation_id: &'a OperationId,
    ) -> BoxFuture<'a, Result<Option<Record>, StoreError>> {
        Box::pin(async move {
            let found = self.inner.find(operation_id).await?;
            match self.fault {
                Fault::FindsOnlyWhatRuns => {
                    Ok(found.filter(|record| record.state == crate::record::State::Running))
                }
                Fault::FindsBySomeOldId if found.is_none() => {
                    let proposed = self.proposed.lock().unwrap().clone();
                    match proposed.iter().find(|(id, _)| id == operation_id) {
                        Some((_, key)) => self.inner.read(key).await,
                        None => Ok(None),
                    }
                }
                _ => Ok(found),
            }
        })
    }

    fn list<'a>(&'a self, listing: &'a Listing) -> BoxFuture<'a, Result<Page, StoreError>> {
        Box::pin(self.broken_list(listing))
    }

    fn purge<'a>(&'a self, purge: &'a Purge) -> BoxFuture<'a, Result<Purged, StoreError>> {
        Box::pin(self.broken_purge(purge))
    }
}

struct Fixture(Arc<Broken>);

impl Fixture {
    fn new(fault: Fault) -> Self {
        let clock = Clock::manual();
        let inner = MemoryStore::builder().clock(clock.clone()).build();
        let (unnoticed, proposed) = (Mutex::default(), Mutex::default());
        Self(Arc::new(Broken { fault, inner, clock, unnoticed, proposed }))
    }
}

impl StoreFixture for Fixture {
    fn store(&self) -> Arc<dyn Store> {
        self.0.clone()
    }

    fn second(&self) -> Arc<dyn Store> {
        self.0.clone()
    }

    fn advance(&self, by: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            if self.0.fault == Fault::ExpiresAtTheSweep {
                *self.0.unnoticed.lock().unwrap() += by;
            } else {
                self.0.clock.advance(by);
            }
        })
    }
}

/// Whether a law holds for a store with this fault.
macro_rules! holds {
    ($law:ident, $fault:expr) => {
        tokio::spawn(async move { $law(&Fixture::new($fault)).await }).await.is_ok()
    };
}

macro_rules! each_fault_breaks_its_law {
    ($($fault:ident breaks $law:ident)+) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
        async fn each_fault_breaks_its_law() {
            $(
                assert!(holds!($law, Fault::None), "a sound store breaks {}", stringify!($law));
                assert!(
                    !holds!($law, Fault::$fault),
                    "{} does not notice {:?}", stringify!($law), Fault::$fault,
                );
            )+
        }
    };
}

each_fault_breaks_its_law! {
    TruncatesKeys breaks first_claim_wins
    LooksThenActs breaks one_of_many_racing_claims_wins
    CountsTheSameTokenTwice breaks claiming_twice_with_one_token_is_one_claim
    RefusalExtendsTheLease breaks a_refused_claim_changes_nothing
    IgnoresTheScheme breaks a_claim_follows_the_decision
    NeverTakesOver breaks a_lapsed_lease_is_taken_over
    TruncatesKeys breaks keys_differ_by_every_bit
    LosesTheFlags breaks a_completed_record_keeps_every_byte
    CompletesTwice breaks completing_happens_once
    LateOwnersLose breaks a_late_owner_completes_if_nobody_claimed_since
    IgnoresTheTokenOnComplete breaks a_fenced_owner_changes_nothing
    ReleaseForgets breaks a_released_record_keeps_what_it_must
    ForgetReleases breaks a_forgotten_key_starts_afresh
    ReleasesWhatIsNot breaks a_claim_that_never_was_is_gone
    RenewsAnything breaks renewing_extends_only_what_is_held
    CountsFromTheClaim breaks time_to_live_counts_from_completion
    KeepsForTheLeaseOnly breaks an_unfinished_record_is_kept_for_its_time_to_live
    ExpiresAtTheSweep breaks expired_records_are_gone_before_any_sweep
    ForEverIsAYear breaks for_ever_has_no_end
    SweepsWithoutLimit breaks sweeping_leaves_the_living
    ReadsWhatIsNewer breaks a_newer_record_is_refused_and_kept
    MakesUnknownKeys breaks only_issued_keys_are_granted_to_who_asks_for_them
    LosesWhatWasIssued breaks only_issued_keys_are_granted_to_who_asks_for_them
    IssuesTwice breaks issuing_happens_once
    UsingExtendsTheValidity breaks an_issued_key_keeps_its_validity
    KeepsForTheValidityOnly breaks an_issued_key_keeps_its_validity
    ForgetReleases breaks a_forgotten_issued_key_is_issued_again
    ReleaseForgets breaks a_released_issued_key_stays_with_its_request
    TakeoverLosesTheCheckpoint breaks a_checkpoint_survives_the_attempt
    CheckpointRenewsTheLease breaks a_checkpoint_survives_the_attempt
    IgnoresTheTokenOnCheckpoint breaks a_fenced_owner_checkpoints_nothing
    FindsOnlyWhatRuns breaks an_operation_is_found_by_its_id
    FindsBySomeOldId breaks an_operation_is_found_by_its_id
    ListsTheYoungestFirst breaks a_listing_goes_from_the_oldest_to_the_youngest
    ListsPayloads breaks a_listing_goes_from_the_oldest_to_the_youngest
    ListsAPlaceTwice breaks a_listing_goes_from_the_oldest_to_the_youngest
    ListsEverybody breaks a_listing_goes_from_the_oldest_to_the_youngest
    TakesALapsedLeaseForRunning breaks a_listing_goes_from_the_oldest_to_the_youngest
    PurgeReleases breaks a_purged_key_was_never_used
    PurgesTheCompletedOnly breaks a_purged_key_was_never_used
    PurgesTheRunning breaks a_purge_leaves_the_running
    PurgesEverybody breaks a_purge_ends_at_its_scope
    PurgesWithoutLimit breaks a_purge_ends_at_its_scope
}

/// The traits' documentation, the macros and the functions name the same laws.
#[test]
fn every_law_is_documented_and_listed() {
    let documented: Vec<_> = [include_str!("../store/mod.rs"), include_str!("../store/manage.rs")]
        .into_iter()
        .flat_map(str::lines)
        .filter_map(|line| line.strip_prefix("/// ")?.split_once(". `")?.1.split('`').next())
        .collect();
    let source = include_str!("../testing.rs");
    let lists = source.split("@each $fixture;").skip(1).map(|list| list.split('}').next().unwrap());
    let listed: Vec<_> = lists.flat_map(str::split_whitespace).collect();
    assert_eq!(documented, listed);

    let sources = [
        include_str!("claiming.rs"),
        include_str!("ending.rs"),
        include_str!("time.rs"),
        include_str!("issuing.rs"),
        include_str!("checkpoints.rs"),
        include_str!("managing.rs"),
    ];
    let mut laws = Vec::new();
    for line in sources.iter().flat_map(|source| source.lines()) {
        if let Some(law) = line.strip_prefix("pub async fn ") {
            laws.push(law.split('(').next().unwrap());
        }
    }
    for (index, law) in listed.iter().enumerate() {
        assert!(laws.contains(law), "{law} has no test");
        let numbered = format!("/// Law {}: ", index + 1);
        let source = sources.iter().find(|source| source.contains(&format!("fn {law}("))).unwrap();
        let before = source.split(&format!("fn {law}(")).next().unwrap();
        let last = before.lines().rfind(|line| line.starts_with("/// Law ")).unwrap();
        assert!(last.starts_with(&numbered), "{law} is law {}, not {last}", index + 1);
    }
    assert_eq!(laws.len(), listed.len(), "a law is not in the list");
}
