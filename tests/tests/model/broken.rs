//! The model bites: each of these stores breaks one rule, and random schedules find it.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use idem_runtime::{
    Key, Record, State, Token,
    store::{
        Checkpoint, Claim, Claimed, Clock, Completion, Issue, MemoryStore, Renewal, Store,
        StoreError, Written,
    },
};

use crate::schedule::Schedule;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    /// Whoever completes a running record may.
    TokensIgnored,
    /// A record that is given up is removed.
    ReleaseForgets,
    /// A lease never ends.
    LeaseNeverOver,
    /// A lease is over at once.
    LeaseAlwaysOver,
    /// The recorded answer is another one.
    AnswerDamaged,
    /// A renewal says that it was done, and was not.
    RenewalForgotten,
}

#[derive(Debug)]
struct Broken {
    store: MemoryStore,
    flaw: Flaw,
}

type Asked<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

impl Store for Broken {
    fn claim<'a>(&'a self, claim: &'a Claim) -> Asked<'a, Claimed> {
        Box::pin(async move {
            let record = self.store.read(&claim.key).await?;
            let running = record.filter(|record| record.state == State::Running);
            match (self.flaw, running) {
                (Flaw::LeaseNeverOver, Some(mut record)) if record.token != claim.token => {
                    record.lease_left = record.lease_left.max(claim.lease);
                    Ok(Claimed::Found(record))
                }
                (Flaw::LeaseAlwaysOver, Some(record)) if record.token != claim.token => {
                    self.store.release(&claim.key, &record.token).await?;
                    self.store.claim(claim).await
                }
                _ => self.store.claim(claim).await,
            }
        })
    }

    fn complete<'a>(&'a self, completion: &'a Completion) -> Asked<'a, Written> {
        Box::pin(async move {
            let mut completion = completion.clone();
            if self.flaw == Flaw::TokensIgnored
                && let Some(record) = self.store.read(&completion.key).await?
            {
                completion.token = record.token;
            }
            if self.flaw == Flaw::AnswerDamaged {
                let response = idem_runtime::RecordedResponse::decode(&completion.payload);
                let mut body = response.expect("a response").body.to_vec();
                body.reverse();
                completion.payload = idem_runtime::RecordedResponse::encode(200, &[], &body);
            }
            self.store.complete(&completion).await
        })
    }

    fn release<'a>(&'a self, key: &'a Key, token: &'a Token) -> Asked<'a, Written> {
        match self.flaw {
            Flaw::ReleaseForgets => self.store.forget(key, token),
            _ => self.store.release(key, token),
        }
    }

    fn renew<'a>(&'a self, claims: &'a [Renewal]) -> Asked<'a, Vec<bool>> {
        match self.flaw {
            Flaw::RenewalForgotten => Box::pin(async move { Ok(vec![true; claims.len()]) }),
            _ => self.store.renew(claims),
        }
    }

    fn issue<'a>(&'a self, issue: &'a Issue) -> Asked<'a, Written> {
        self.store.issue(issue)
    }

    fn checkpoint<'a>(&'a self, checkpoint: &'a Checkpoint) -> Asked<'a, Written> {
        self.store.checkpoint(checkpoint)
    }

    fn forget<'a>(&'a self, key: &'a Key, token: &'a Token) -> Asked<'a, Written> {
        self.store.forget(key, token)
    }

    fn read<'a>(&'a self, key: &'a Key) -> Asked<'a, Option<Record>> {
        self.store.read(key)
    }

    fn sweep(&self, limit: usize) -> Asked<'_, usize> {
        self.store.sweep(limit)
    }
}

#[test]
fn each_broken_rule_is_found() {
    for flaw in [
        Flaw::TokensIgnored,
        Flaw::ReleaseForgets,
        Flaw::LeaseNeverOver,
        Flaw::LeaseAlwaysOver,
        Flaw::AnswerDamaged,
        Flaw::RenewalForgotten,
    ] {
        // Seeds of their own, so that this does not fail by chance.
        let found = (0..1_000).find_map(|seed| {
            let clock = Clock::manual();
            let store = MemoryStore::builder().clock(clock.clone()).build();
            let store = Arc::new(Broken { store, flaw });
            Some((seed, crate::run(&Schedule::random(seed), store, clock).err()?))
        });
        let (seed, violation) = found.unwrap_or_else(|| panic!("{flaw:?} was not found"));
        println!("{flaw:?} was found by seed {seed}: {violation}");
    }
}
