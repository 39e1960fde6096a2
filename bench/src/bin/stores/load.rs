//! Callers that ask one subject at once, each the next thing when the one before is done.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bench::keys::key;
use tokio::task::JoinSet;

use crate::subjects::{Result, Subject};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Fresh keys, to the end.
    First,
    /// Keys that are done.
    Replay,
    /// One key that is claimed.
    Refuse,
}

pub(crate) struct Burst {
    pub(crate) done: u64,
    /// Until the last of them was.
    pub(crate) time: Duration,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
}

pub(crate) struct Load {
    pub(crate) subject: Arc<dyn Subject>,
    /// The last burst of fresh keys, and how many of them each caller has used.
    last: (u32, Vec<u32>),
    next: u32,
}

impl Load {
    /// `first` is the number of the first burst: keys of different numbers are different.
    pub(crate) fn new(subject: Arc<dyn Subject>, first: u32) -> Self {
        Self { subject, last: (0, Vec::new()), next: first }
    }

    /// Claims the key of the next burst of [`Ask::Refuse`].
    pub(crate) async fn hold(&mut self) -> Result<()> {
        match self.subject.hold(key(self.next, 0, 0)).await? {
            true => Ok(()),
            false => Err("a fresh key is not granted".into()),
        }
    }

    /// Asks until the time is over, and each caller at least once.
    pub(crate) async fn burst(
        &mut self,
        ask: Ask,
        callers: usize,
        time: Duration,
    ) -> Result<Burst> {
        let mut asking = JoinSet::new();
        let start = Instant::now();
        let until = start + time;
        let burst = if ask == Ask::Replay { self.last.0 } else { self.next };
        for caller in 0..callers {
            let used = self.last.1.get(caller).copied().unwrap_or_default();
            let subject = Arc::clone(&self.subject);
            asking.spawn(async move {
                let mut latencies = Vec::with_capacity(1024);
                let mut asked = 0;
                let mut since = Instant::now();
                loop {
                    let done = match ask {
                        Ask::First => subject.first(key(burst, caller, asked)).await,
                        Ask::Replay => subject.replay(key(burst, caller, asked % used)).await,
                        Ask::Refuse => subject.refuse(key(burst, 0, 0)).await,
                    };
                    if !done? {
                        return Err(format!("{ask:?}: a wrong answer").into());
                    }
                    asked += 1;
                    let now = Instant::now();
                    latencies.push(now - since);
                    since = now;
                    if now > until {
                        return Result::Ok((caller, asked, latencies));
                    }
                }
            });
        }
        let mut used = vec![0; callers];
        let mut latencies = Vec::new();
        while let Some(asked) = asking.join_next().await {
            let (caller, asked, its) = asked??;
            used[caller] = asked;
            latencies.extend(its);
        }
        let time = start.elapsed();
        match ask {
            Ask::First => {
                self.last = (self.next, used);
                self.next += 1;
            }
            Ask::Refuse => self.next += 1,
            Ask::Replay => {}
        }
        latencies.sort_unstable();
        let at = |share: f64| latencies[(share * latencies.len() as f64) as usize];
        Ok(Burst { done: latencies.len() as u64, time, p50: at(0.5), p99: at(0.99) })
    }
}
