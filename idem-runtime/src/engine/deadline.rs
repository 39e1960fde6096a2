//! Bounds in time that cost nothing while nobody waits.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    task::unconstrained,
    time::{Sleep, sleep},
};

/// How long something may be waited for, once or several times in all. The time begins when it is
/// first waited for: what is ready at once, as a store in memory or a body that is there, needs
/// neither a clock nor a timer.
#[derive(Debug)]
pub(crate) struct Deadline {
    at_most: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

/// What was waited for did not come in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooLate;

impl Deadline {
    pub(crate) const fn after(at_most: Duration) -> Self {
        Self { at_most, timer: None }
    }

    /// Polls a future, and the timer if that is not ready.
    pub(crate) fn poll<F: Future + Unpin>(
        &mut self,
        future: &mut F,
        context: &mut Context<'_>,
    ) -> Poll<Result<F::Output, TooLate>> {
        if let Poll::Ready(answer) = future.poll_unpin(context) {
            return Poll::Ready(Ok(answer));
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(self.at_most)));
        // A future that always has more to do uses the task's budget up: time passes all the same.
        unconstrained(timer).poll_unpin(context).map(|()| Err(TooLate))
    }
}

/// A future that is waited for no longer than a time.
#[derive(Debug)]
#[must_use]
pub(crate) struct Within<F> {
    future: F,
    deadline: Deadline,
}

/// Waits for a future no longer than this.
pub(crate) const fn within<F: Future + Unpin>(at_most: Duration, future: F) -> Within<F> {
    Within { future, deadline: Deadline::after(at_most) }
}

impl<F: Future + Unpin> Future for Within<F> {
    type Output = Result<F::Output, TooLate>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { future, deadline } = &mut *self;
        deadline.poll(future, context)
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, poll_fn, ready};

    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    #[test]
    fn what_is_ready_needs_no_runtime() {
        let answer = within(Duration::ZERO, ready(7)).now_or_never();
        assert_eq!(answer, Some(Ok(7)));
    }

    #[tokio::test]
    async fn what_does_not_come_is_given_up() {
        assert_eq!(within(SOON, pending::<()>()).await, Err(TooLate));
        let later = Box::pin(async { sleep(SOON).await });
        assert_eq!(within(100 * SOON, later).await, Ok(()));
    }

    #[tokio::test]
    async fn what_never_rests_is_given_up_too() {
        let restless = poll_fn(|context| {
            while let Poll::Ready(turn) = tokio::task::coop::poll_proceed(context) {
                turn.made_progress();
            }
            context.waker().wake_by_ref();
            Poll::<()>::Pending
        });
        assert_eq!(within(SOON, restless).await, Err(TooLate));
    }

    #[tokio::test]
    async fn several_share_one_time() {
        let mut deadline = Deadline::after(2 * SOON);
        let mut rounds = 0;
        while poll_fn(|context| deadline.poll(&mut Box::pin(sleep(SOON)), context)).await.is_ok() {
            rounds += 1;
        }
        assert!(rounds <= 2, "{rounds}");
    }
}
