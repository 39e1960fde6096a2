//! Bodies: buffered up to a bound, and still whole for whoever reads on beyond it.

use std::{
    error::Error as _,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{Error, body::Body};
use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::{BodyExt, LengthLimitError};
use tokio::time::{Instant, timeout_at};

/// A body after it was read up to a bound.
pub(super) enum Buffered {
    /// All of it, and its trailers if it ends in some.
    Whole(Bytes, Option<HeaderMap>),
    /// It is larger, slower, or broke off. This is all of it, from its first byte on.
    Beyond(Body, Bound),
}

/// Why a body could not be buffered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Bound {
    Size,
    Time,
    /// It broke off.
    Broken,
}

/// Reads a body up to a size and for a time.
pub(super) async fn buffer(mut body: Body, limit: usize, time: Duration) -> Buffered {
    if body.size_hint().lower() > limit as u64 {
        return Buffered::Beyond(body, Bound::Size);
    }
    let now = Instant::now();
    // A time beyond the clock's reach is no bound.
    let deadline = now.checked_add(time).unwrap_or_else(|| now + Duration::from_secs(1 << 32));
    let mut read = Joined::default();
    let (next, bound) = loop {
        let data = match timeout_at(deadline, body.frame()).await {
            Err(_) => break (None, Bound::Time),
            Ok(None) => return Buffered::Whole(read.finish(), None),
            Ok(Some(Err(error))) => {
                let bound =
                    if is_beyond_a_layers_limit(&error) { Bound::Size } else { Bound::Broken };
                break (Some(Err(error)), bound);
            }
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => data,
                Err(frame) => return Buffered::Whole(read.finish(), frame.into_trailers().ok()),
            },
        };
        if data.len() > limit - read.len() {
            break (Some(Ok(Frame::data(data))), Bound::Size);
        }
        read.push(data);
    };
    Buffered::Beyond(Body::new(Resumed { read: read.finish(), next, rest: body }), bound)
}

/// Whether it was a layer's own limit that the body broke off at.
fn is_beyond_a_layers_limit(error: &Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        if error.is::<LengthLimitError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// A body that was buffered whole, to be read again.
pub(super) fn whole(bytes: Bytes, trailers: Option<HeaderMap>) -> Body {
    match trailers {
        None => Body::from(bytes),
        Some(trailers) => {
            let next = Some(Ok(Frame::trailers(trailers)));
            Body::new(Resumed { read: bytes, next, rest: Body::empty() })
        }
    }
}

/// Pieces put together: one is not copied, and however small many are, they take no more than
/// their bytes.
#[derive(Default)]
struct Joined {
    only: Bytes,
    all: BytesMut,
}

impl Joined {
    fn len(&self) -> usize {
        self.only.len() + self.all.len()
    }

    fn push(&mut self, data: Bytes) {
        if self.len() == 0 {
            self.only = data;
            return;
        }
        self.all.extend_from_slice(&std::mem::take(&mut self.only));
        self.all.extend_from_slice(&data);
    }

    fn finish(self) -> Bytes {
        if self.all.is_empty() { self.only } else { self.all.freeze() }
    }
}

/// A body of which the beginning was already read.
struct Resumed {
    /// The beginning.
    read: Bytes,
    /// What came after it and did not fit.
    next: Option<Result<Frame<Bytes>, Error>>,
    rest: Body,
}

impl http_body::Body for Resumed {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if !self.read.is_empty() {
            let read = std::mem::take(&mut self.read);
            return Poll::Ready(Some(Ok(Frame::data(read))));
        }
        match self.next.take() {
            Some(next) => Poll::Ready(Some(next)),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_empty() && self.next.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let next = match &self.next {
            None => 0,
            Some(Ok(frame)) if frame.is_data() => frame.data_ref().map_or(0, Bytes::len),
            // A length that was announced would leave no room for trailers.
            Some(_) => return SizeHint::new(),
        };
        let (known, rest) = ((self.read.len() + next) as u64, self.rest.size_hint());
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(known));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(known));
        }
        hint
    }
}
