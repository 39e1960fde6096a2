//! Bodies: buffered up to a bound, and still whole for whoever reads on beyond it.

use std::{
    error::Error as _,
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{Error, body::Body};
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::{BodyExt, LengthLimitError};

use crate::engine::deadline::{Deadline, TooLate};

/// A body after it was read up to a bound.
pub(super) enum Buffered {
    /// All of it, and its trailers if it ends in some.
    Whole(Bytes, Option<Box<HeaderMap>>),
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
pub(super) fn buffer(
    mut body: Body,
    limit: usize,
    time: Duration,
) -> impl Future<Output = Buffered> {
    let (mut read, mut deadline) = (Joined::default(), Deadline::after(time));
    async move {
        if body.size_hint().lower() > limit as u64 {
            return Buffered::Beyond(body, Bound::Size);
        }
        let (next, bound) = loop {
            let frame = poll_fn(|context| deadline.poll(&mut body.frame(), context));
            let data = match frame.await {
                Err(TooLate) => break (None, Bound::Time),
                Ok(None) => return Buffered::Whole(read.finish(), None),
                Ok(Some(Err(error))) => {
                    let bound =
                        if is_beyond_a_layers_limit(&error) { Bound::Size } else { Bound::Broken };
                    break (Some(Err(error)), bound);
                }
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => data,
                    Err(frame) => {
                        let trailers = frame.into_trailers().ok().map(Box::new);
                        return Buffered::Whole(read.finish(), trailers);
                    }
                },
            };
            if data.len() > limit - read.len() {
                break (Some(Ok(Frame::data(data))), Bound::Size);
            }
            read.push(data);
            if body.is_end_stream() {
                return Buffered::Whole(read.finish(), None);
            }
        };
        Buffered::Beyond(Body::new(Resumed { read: read.finish(), next, rest: body }), bound)
    }
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
pub(super) fn whole(bytes: Bytes, trailers: Option<Box<HeaderMap>>) -> Body {
    match trailers {
        None => Body::from(bytes),
        Some(trailers) => {
            let next = Some(Ok(Frame::trailers(*trailers)));
            Body::new(Resumed { read: bytes, next, rest: Body::empty() })
        }
    }
}

/// Pieces put together: one is not copied, and however small many are, they take no more than
/// their bytes.
#[derive(Default)]
struct Joined {
    only: Bytes,
    all: Vec<u8>,
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
        if self.all.is_empty() { self.only } else { Bytes::from(self.all) }
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
