//! Places at which a test stops the process (feature `marks`): idem's own, and no part of what it
//! promises. Without the feature they compile to nothing.
//!
//! A name says where it can be reached: only in a [transaction](crate::Policy::transaction) if
//! `transaction` is a part of it, and if `leased` is, only without; with `recover`, only where an
//! unknown outcome is asked about; with `together`, only by calls that travel with others; and one that
//! begins with the name of a store, only on that store.

#[cfg(feature = "marks")]
use std::{fmt, sync::OnceLock};

#[cfg(feature = "marks")]
use futures_util::{FutureExt, future::BoxFuture};

/// Says that the process has come to a place, or that it has made a call and waits for the answer.
#[cfg(feature = "marks")]
macro_rules! mark {
    ($name:literal) => {
        $crate::marks::reached($name)
    };
    ($name:literal => $call:expr) => {
        $crate::marks::under_way($name, $call)
    };
}

#[cfg(not(feature = "marks"))]
macro_rules! mark {
    ($name:literal) => {};
    ($name:literal => $call:expr) => {
        $call
    };
}

#[cfg(feature = "marks")]
static LISTENER: OnceLock<Listener> = OnceLock::new();

#[cfg(feature = "marks")]
struct Listener(Box<dyn Fn(&'static str) + Send + Sync>);

#[cfg(feature = "marks")]
impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").finish_non_exhaustive()
    }
}

/// Has every mark call this function, on the thread that came to it and before it goes on; only the
/// first function counts.
#[cfg(feature = "marks")]
pub fn listen(listener: impl Fn(&'static str) + Send + Sync + 'static) {
    let _ = LISTENER.set(Listener(Box::new(listener)));
}

/// Comes to a mark.
#[cfg(feature = "marks")]
pub fn reached(name: &'static str) {
    if let Some(Listener(listener)) = LISTENER.get() {
        listener(name);
    }
}

/// Makes a call, and comes to the mark when the driver has had the time to send it.
#[cfg(feature = "marks")]
pub(crate) fn under_way<'a, T: Send + 'a>(
    name: &'static str,
    mut call: BoxFuture<'a, T>,
) -> BoxFuture<'a, T> {
    // Where nobody listens, a call takes no turn more than without marks.
    if LISTENER.get().is_none() {
        return call;
    }
    async move {
        let answer = futures_util::poll!(&mut call);
        tokio::task::yield_now().await;
        reached(name);
        match answer {
            std::task::Poll::Ready(answer) => answer,
            std::task::Poll::Pending => call.await,
        }
    }
    .boxed()
}
