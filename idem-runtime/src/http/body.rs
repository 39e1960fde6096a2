//! Bodies: buffered up to a bound, and still whole for whoever reads on beyond it.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{Error, body::Body};
use bytes::{Bytes, BytesMut};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::time::{Instant, timeout_at};

/// A body after it was read up to a bound.
pub(super) enum Buffered {
    Whole(Bytes),
    /// It is larger, slower, or more than bytes. This is all of it, from its first byte on.
    Beyond(Body, Bound),
}

/// Why a body could not be buffered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Bound {
    Size,
    Time,
    /// It broke off.
    Broken,
    /// It ends in trailers.
    Trailers,
}

/// Reads a body up to a size and for a time.
pub(super) async fn buffer(mut body: Body, limit: usize, time: Duration) -> Buffered {
    if body.size_hint().lower() > limit as u64 {
        return Buffered::Beyond(body, Bound::Size);
    }
    let now = Instant::now();
    // A time beyond the clock's reach is no bound.
    let deadline = now.checked_add(time).unwrap_or_else(|| now + Duration::from_secs(1 << 32));
    let mut read: VecDeque<Result<Frame<Bytes>, Error>> = VecDeque::new();
    let mut size = 0;
    let bound = loop {
        let frame = match timeout_at(deadline, body.frame()).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return Buffered::Whole(joined(read, size)),
            Err(_) => break Bound::Time,
        };
        let bound = match frame.as_ref().map(Frame::data_ref) {
            Ok(Some(data)) => {
                size += data.len();
                (size > limit).then_some(Bound::Size)
            }
            Ok(None) => Some(Bound::Trailers),
            Err(_) => Some(Bound::Broken),
        };
        read.push_back(frame);
        if let Some(bound) = bound {
            break bound;
        }
    };
    Buffered::Beyond(Body::new(Resumed { read, rest: body }), bound)
}

fn joined(mut read: VecDeque<Result<Frame<Bytes>, Error>>, size: usize) -> Bytes {
    if read.len() == 1
        && let Some(Ok(Ok(only))) = read.pop_front().map(|frame| frame.map(Frame::into_data))
    {
        return only;
    }
    let mut whole = BytesMut::with_capacity(size);
    for data in read.into_iter().flatten().filter_map(|frame| frame.into_data().ok()) {
        whole.extend_from_slice(&data);
    }
    whole.freeze()
}

/// A body of which the beginning was already read.
struct Resumed {
    read: VecDeque<Result<Frame<Bytes>, Error>>,
    rest: Body,
}

impl http_body::Body for Resumed {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match self.read.pop_front() {
            Some(frame) => Poll::Ready(Some(frame)),
            None => Pin::new(&mut self.rest).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_empty() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let read: u64 = self
            .read
            .iter()
            .flatten()
            .filter_map(Frame::data_ref)
            .map(|data| data.len() as u64)
            .sum();
        let rest = self.rest.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(read));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(read));
        }
        hint
    }
}
