//! The clock that an embedded store goes by, and arithmetic on its instants that cannot overflow.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use crate::record::Ttl;

/// An instant of a store's clock, in milliseconds since the clock's own beginning.
pub(super) type Millis = i64;

/// The end of what lasts for ever. No clock ever shows it.
pub(super) const NEVER: Millis = i64::MAX;

/// What time an embedded store goes by.
///
/// A clone is the same clock.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    System,
    Monotonic(Instant),
    Manual(ManualClock),
}

impl Clock {
    /// The machine's wall clock: for records that outlive the process or are shared with others.
    ///
    /// When it is set forward, leases and records end early by as much, and a request whose owner
    /// is still at work may be run a second time; when it is set back, they last longer. Machines
    /// whose time is slewed (by NTP or its like) instead of being set are not concerned.
    ///
    /// Where two processes go by clocks that differ, a lease is over earlier by the difference for
    /// the one that is ahead. It still holds if it is longer than one and a half times the
    /// difference, since an engine renews it when a third has passed. With a shorter one, two
    /// handlers may be at work under one key; even then one answer is recorded, and the other
    /// handler's caller gets that one or is told that the lease was lost.
    pub const fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that starts now and never jumps: for records that die with the process.
    ///
    /// On most systems it stands still while the machine is suspended.
    pub fn monotonic() -> Self {
        Self(Source::Monotonic(Instant::now()))
    }

    /// A clock that moves only when it is told to, for tests.
    pub fn manual() -> ManualClock {
        ManualClock::default()
    }

    /// The present instant: never negative, and always before [`NEVER`].
    pub(super) fn now(&self) -> Millis {
        let since = match &self.0 {
            Source::System => SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                // A clock before 1970 has not been set yet; time then stands still until it is.
                .unwrap_or_default(),
            Source::Monotonic(start) => start.elapsed(),
            Source::Manual(clock) => return clock.0.load(Ordering::SeqCst),
        };
        millis(since.as_secs(), since.subsec_millis()).map_or(NEVER - 1, |now| now.min(NEVER - 1))
    }
}

/// A clock that stands still until it is advanced.
///
/// A clone is the same clock: one goes into the store, the other stays with the test.
///
/// ```
/// use std::time::Duration;
/// use idem_runtime::store::{Clock, MemoryStore};
///
/// let clock = Clock::manual();
/// let store = MemoryStore::builder().clock(clock.clone()).build();
/// clock.advance(Duration::from_secs(60)); // to the store, a minute has passed
/// # drop(store);
/// ```
#[derive(Clone, Debug, Default)]
pub struct ManualClock(Arc<AtomicI64>);

impl ManualClock {
    /// Moves the clock forward by so many whole milliseconds, at most to the end of time.
    pub fn advance(&self, by: Duration) {
        let by = Millis::try_from(by.as_millis()).unwrap_or(NEVER);
        let moved = |now: Millis| Some(now.saturating_add(by).min(NEVER - 1));
        // The closure always answers, so the update cannot fail.
        let _ = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, moved);
    }
}

impl From<ManualClock> for Clock {
    fn from(clock: ManualClock) -> Self {
        Self(Source::Manual(clock))
    }
}

/// The instant this long after another. A part of a millisecond counts as a whole one, so that
/// nothing ends before it was promised to; what lies beyond all clocks is [`NEVER`].
pub(super) fn after(now: Millis, span: Duration) -> Millis {
    let whole = millis(span.as_secs(), span.subsec_nanos().div_ceil(1_000_000));
    whole.map_or(NEVER, |millis| now.saturating_add(millis))
}

/// Seconds and milliseconds as one number, if it is one. (A whole span in nanoseconds takes a
/// division of 128 bits.)
fn millis(seconds: u64, millis: u32) -> Option<Millis> {
    Millis::try_from(seconds).ok()?.checked_mul(1_000)?.checked_add(millis.into())
}

/// The instant at which what starts now and lasts this long is over.
pub(super) fn end_of(now: Millis, ttl: Ttl) -> Millis {
    match ttl {
        Ttl::For(span) => after(now, span),
        Ttl::Forever => NEVER,
    }
}

/// How much time is left until an instant; zero when it has come.
pub(super) fn until(now: Millis, end: Millis) -> Duration {
    Duration::from_millis(u64::try_from(end.saturating_sub(now)).unwrap_or(0))
}

/// How much is left of something that ends at an instant or never.
pub(super) fn left(now: Millis, end: Millis) -> Ttl {
    if end == NEVER { Ttl::Forever } else { Ttl::For(until(now, end)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_span_overflows_and_none_ends_early() {
        assert_eq!(after(5, Duration::ZERO), 5);
        assert_eq!(after(5, Duration::from_millis(7)), 12);
        assert_eq!(after(5, Duration::from_nanos(1)), 6);
        assert_eq!(after(5, Duration::MAX), NEVER);
        assert_eq!(after(NEVER - 1, Duration::from_millis(1)), NEVER);
        assert_eq!(after(NEVER - 1, Duration::from_secs(1)), NEVER);
        assert_eq!(end_of(5, Ttl::Forever), NEVER);
        assert_eq!(end_of(5, Ttl::For(Duration::MAX)), NEVER);
    }

    #[test]
    fn what_is_left_is_never_negative() {
        assert_eq!(until(5, 5), Duration::ZERO);
        assert_eq!(until(6, 5), Duration::ZERO);
        assert_eq!(until(NEVER - 1, 0), Duration::ZERO);
        assert_eq!(until(2, 5), Duration::from_millis(3));
        assert_eq!(left(NEVER - 1, NEVER), Ttl::Forever);
        assert_eq!(left(9, 5), Ttl::For(Duration::ZERO));
    }

    #[test]
    fn a_manual_clock_stops_before_never() {
        let manual = Clock::manual();
        let clock = Clock::from(manual.clone());
        assert_eq!(clock.now(), 0);
        manual.advance(Duration::from_millis(3));
        assert_eq!(clock.now(), 3);
        manual.advance(Duration::MAX);
        manual.advance(Duration::MAX);
        assert_eq!(clock.now(), NEVER - 1);
    }

    #[test]
    fn the_other_clocks_run_forward() {
        for clock in [Clock::system(), Clock::monotonic()] {
            let before = clock.now();
            assert!(before >= 0);
            assert!(clock.now() >= before);
        }
    }
}
