//! Work that finishes although nobody waits for it.
//!
//! A server drops a request's future when its client hangs up, at whichever await it stands. From
//! the claim to the record that must not cancel anything: the future is then moved to a task of its
//! own and goes on there. Until then it runs inline, which costs next to nothing.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::{runtime::Handle, sync::oneshot};
use tracing::{Instrument, Span};

use crate::{engine::Shared, observer::Outcome};

/// A future that outlives being dropped.
pub(crate) struct FinishAnyway<T: Send + 'static> {
    work: Option<BoxFuture<'static, T>>,
    /// What the work goes on with, known once it was started.
    started: Option<(Handle, Span)>,
    shared: Arc<Shared>,
    operation: Arc<str>,
}

impl<T: Send + 'static> FinishAnyway<T> {
    pub(crate) fn new(
        shared: Arc<Shared>,
        operation: Arc<str>,
        work: BoxFuture<'static, T>,
    ) -> Self {
        Self { work: Some(work), started: None, shared, operation }
    }
}

impl<T: Send + 'static> Future for FinishAnyway<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let this = &mut *self;
        // Taken out while it is polled: work that panics is over, and cannot go on elsewhere.
        let Some(mut work) = this.work.take() else { return Poll::Pending };
        let answer = work.poll_unpin(cx);
        if answer.is_pending() {
            this.work = Some(work);
            // Taken now and not when the future is dropped: that may happen outside the runtime and
            // outside the request's span. Before it has waited once it cannot be dropped half-way.
            if this.started.is_none() {
                this.started = Handle::try_current().ok().map(|runtime| (runtime, Span::current()));
            }
        }
        answer
    }
}

impl Shared {
    /// What a handler or a function comes to, in whatever the application wraps it in; `None` if that
    /// threw it away.
    pub(crate) async fn carried<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> BoxFuture<'static, T> + Send + 'static,
    ) -> Option<T> {
        let Some(carry) = &self.carry else { return Some(work().await) };
        let (send, receive) = oneshot::channel();
        let wrapped = carry(
            async move {
                let _ = send.send(work().await);
            }
            .boxed(),
        );
        wrapped.await;
        receive.await.ok()
    }
}

impl<T: Send + 'static> Drop for FinishAnyway<T> {
    fn drop(&mut self) {
        let (Some(work), Some((runtime, span))) = (self.work.take(), self.started.take()) else {
            return;
        };
        self.shared.tell(&self.operation, None, Outcome::Detached, None);
        // On a runtime that is shutting down the task is dropped at once, as in a crash.
        self.shared.go_on(&runtime, work.map(drop).instrument(span));
    }
}
