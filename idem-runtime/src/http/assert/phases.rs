//! What is done to an application, and what is expected of it.

use std::{sync::Arc, time::Duration};

use axum::{body::Body, extract::Request};
use futures_util::{
    FutureExt,
    future::{BoxFuture, join_all, poll_fn},
};
use http::header;
use http_body_util::BodyExt;
use tokio::{
    sync::Barrier,
    time::{Instant, sleep},
};

use super::{
    Check, Other, Phase, Promise,
    answer::{Answer, Got, PATIENCE},
    broken::Report,
};

/// How many duplicates are sent at once.
const DUPLICATES: usize = 50;
/// After how many polls at most a client hangs up.
const MOST_POLLS: usize = 200;
/// How often a request in flight is asked after.
const PAUSE: Duration = Duration::from_millis(5);
/// How long an effect may be late that nobody waits for.
const SETTLING: Duration = Duration::from_millis(50);

impl Check {
    async fn ask(&self, request: Request) -> Got {
        self.app.clone().ask(request).await
    }

    fn count(&self) -> usize {
        self.effects.as_ref().map_or(0, |count| count())
    }

    /// Tells if there were other effects since than one request has, or than none.
    fn expect_effects(&self, report: &mut Report, phase: Phase, since: usize, unit: usize) {
        let effects = self.count().abs_diff(since);
        if effects != unit {
            report.broken(phase, Promise::OneEffect, happened(effects, unit));
        }
    }

    /// The first request with a new key, and its answer if it is one to go on from.
    async fn first(&self, report: &mut Report, phase: Phase) -> Option<(String, Answer)> {
        let key = (self.keys)().await;
        let got = self.ask((self.request)(&key)).await;
        let Some(answer) = got.success() else {
            report.broken(phase, Promise::Success, got.to_string());
            return None;
        };
        if answer.is_marked() {
            let seen = format!("{answer} as a replay; is the key where it belongs?");
            report.broken(phase, Promise::NewKeysRun, seen);
            return None;
        }
        Some((key, answer.clone()))
    }

    /// Asks once more, which must get the recorded answer.
    async fn again(&self, report: &mut Report, phase: Phase, request: Request, first: &Answer) {
        let got = self.ask(request).await;
        self.compare(report, phase, &got, first);
    }

    fn compare(&self, report: &mut Report, phase: Phase, got: &Got, first: &Answer) {
        for (promise, seen) in got.differences(first, &self.except) {
            // A replay with a shape of its own is another answer than the first, on purpose.
            if !(self.shaped && promise == Promise::OneAnswer && got.success().is_some()) {
                report.broken(phase, promise, seen);
            }
        }
    }

    /// Says how many effects one request has.
    pub(super) async fn retry(&self, report: &mut Report) -> Option<usize> {
        let since = self.count();
        let (key, first) = self.first(report, Phase::Retry).await?;
        let unit = self.count().abs_diff(since);
        if self.effects.is_some() && unit == 0 {
            let seen = format!("{first}, and no effect was counted");
            report.broken(Phase::Retry, Promise::NewKeysRun, seen);
            return None;
        }
        let got = self.ask((self.request)(&key)).await;
        self.compare(report, Phase::Retry, &got, &first);
        let compared = match got.success() {
            Some(replay) if self.shaped => replay,
            _ => &first,
        };
        let third = self.ask((self.request)(&key)).await;
        for (promise, seen) in third.differences(compared, &self.except) {
            report.broken(Phase::Retry, promise, seen);
        }
        self.expect_effects(report, Phase::Retry, since, unit);
        Some(unit)
    }

    pub(super) async fn other_request_with_its_key(&self, report: &mut Report, unit: usize) {
        let (phase, since) = (Phase::OtherRequest, self.count());
        let Some((key, first)) = self.first(report, phase).await else { return };
        let other = match &self.other {
            Other::Given(request) => request(&key),
            Other::Changed | Other::Same => match changed((self.request)(&key)).await {
                Ok(request) => request,
                Err(error) => {
                    report.broken(phase, Promise::Success, format!("no body to change: {error}"));
                    return;
                }
            },
        };
        let got = self.ask(other).await;
        match self.other {
            Other::Same => self.compare(report, phase, &got, &first),
            Other::Given(_) | Other::Changed if !got.is_refused() => {
                let seen = match got.success() {
                    Some(answer) if answer.is_like(&first, &self.except) => {
                        format!("{got}, the first one's answer")
                    }
                    _ => got.to_string(),
                };
                report.broken(phase, Promise::NoWrongAnswer, seen);
            }
            Other::Given(_) | Other::Changed => {}
        }
        self.again(report, phase, (self.request)(&key), &first).await;
        self.expect_effects(report, phase, since, unit);
    }

    pub(super) async fn duplicates(&self, report: &mut Report, unit: usize) {
        // In one task they take turns at each await, so that a gap between two awaits is always
        // found; in many they really are at work at once, where the runtime has the threads.
        for at_once in [false, true] {
            self.duplicates_of_one(report, unit, at_once).await;
        }
    }

    async fn duplicates_of_one(&self, report: &mut Report, unit: usize, at_once: bool) {
        let (phase, since, key) = (Phase::Duplicates, self.count(), (self.keys)().await);
        let start = Arc::new(Barrier::new(DUPLICATES));
        let asking = (0..DUPLICATES).map(|_| {
            let (app, request) = (self.app.clone(), (self.request)(&key));
            let start = Arc::clone(&start);
            async move {
                start.wait().await;
                app.ask(request).await
            }
        });
        let got: Vec<_> = match at_once {
            true => join_all(asking.map(tokio::spawn)).await.into_iter().flatten().collect(),
            false => join_all(asking).await,
        };
        self.expect_effects(report, phase, since, unit);
        let mut answers = Vec::new();
        for one in &got {
            match one.success() {
                Some(answer) => answers.push(answer),
                None if one.is_in_flight() => {}
                None => report.broken(phase, Promise::OneAnswer, one.to_string()),
            }
        }
        // Of those who succeeded one has run, and the others were told what it said.
        let (replays, runs): (Vec<_>, Vec<_>) =
            answers.into_iter().partition(|answer| answer.is_marked());
        if runs.len() > 1 {
            let seen = format!("{} of {DUPLICATES} answers do not say so", runs.len());
            report.broken(phase, Promise::MarkedReplays, seen);
        }
        let compared = if self.shaped { [&runs[..], &[]] } else { [&runs[..], &replays[..]] };
        let mut compared = compared.concat().into_iter();
        let first = compared.next().cloned();
        if let Some(first) = &first
            && let Some(other) = compared.find(|other| !other.is_like(first, &self.except))
        {
            report.broken(phase, Promise::OneAnswer, format!("{other} beside {first}"));
        }
        match self.settled(&key).await {
            Ok(settled) => {
                if let Some(first) = first {
                    self.compare(report, phase, &settled, &first);
                }
            }
            Err(seen) => report.broken(phase, Promise::NoWedge, seen),
        }
        self.expect_effects(report, phase, since, unit);
    }

    /// Asks until nothing is in flight any more.
    ///
    /// # Errors
    ///
    /// What it was at last, in words.
    async fn settled(&self, key: &str) -> Result<Got, String> {
        let start = Instant::now();
        loop {
            let got = self.ask((self.request)(key)).await;
            if !got.is_in_flight() {
                return Ok(got);
            }
            if start.elapsed() > PATIENCE {
                return Err(format!("{got} for {PATIENCE:?}"));
            }
            sleep(PAUSE).await;
        }
    }

    pub(super) async fn hang_up(&self, report: &mut Report, unit: usize) {
        let (phase, since) = (Phase::HangUp, self.count());
        let mut keys = 0;
        for polls in 0..=MOST_POLLS {
            let (before, key) = (self.count(), (self.keys)().await);
            keys += 1;
            let whole = polled(self.app.call((self.request)(&key)), polls).await;
            let when = match polls {
                0 => "before the first poll".to_owned(),
                1 => "after the first poll".to_owned(),
                _ => format!("after {polls} polls"),
            };
            let got = match self.settled(&key).await {
                Ok(got) => got,
                // A key that is wedged once is wedged each time, and each time is long.
                Err(seen) => {
                    report.broken(phase, Promise::NoWedge, format!("{when}, {seen}"));
                    return;
                }
            };
            match got.success() {
                Some(answer) => {
                    let again = self.ask((self.request)(&key)).await;
                    // Where the answer is that of a first run, its replay may have another shape.
                    let shaped = self.shaped && !answer.is_marked() && again.success().is_some();
                    for (promise, seen) in again.differences(answer, &self.except) {
                        if !(shaped && promise == Promise::OneAnswer) {
                            report.broken(phase, promise, format!("{when}, {seen}"));
                        }
                    }
                }
                None => report.broken(phase, Promise::OneAnswer, format!("{when}, {got}")),
            }
            let effects = self.count().abs_diff(before);
            if effects != unit {
                let seen = format!("{when}, {}", happened(effects, unit));
                report.broken(phase, Promise::OneEffect, seen);
            }
            if whole {
                break;
            }
        }
        // Work that goes on unseen has its effect late.
        sleep(SETTLING).await;
        self.expect_effects(report, phase, since, unit * keys);
    }

    pub(super) async fn request_without_key(&self, report: &mut Report) {
        let Some(request) = &self.without_key else { return };
        let since = self.count();
        let got = self.ask(request()).await;
        let effects = self.count().abs_diff(since);
        if !got.is_refused() || effects > 0 {
            report.broken(Phase::WithoutKey, Promise::NoKeyNoRun, got.to_string());
        }
    }

    pub(super) async fn request_in_other_scope(&self, report: &mut Report, unit: usize) {
        let Some(request) = &self.other_scope else { return };
        let (phase, since) = (Phase::OtherScope, self.count());
        let Some((key, first)) = self.first(report, phase).await else { return };
        let theirs = self.ask(request(&key)).await;
        if theirs.success().is_none_or(Answer::is_marked) {
            report.broken(phase, Promise::OwnKeys, theirs.to_string());
        } else {
            self.expect_effects(report, phase, since, 2 * unit);
        }
        self.again(report, phase, (self.request)(&key), &first).await;
    }
}

/// How often something happened that should have been counted `unit` times.
fn happened(effects: usize, unit: usize) -> String {
    match effects {
        0 => "it did not happen".to_owned(),
        _ if unit == 1 => format!("it happened {effects} times"),
        _ => format!("it was counted {effects} times instead of {unit}"),
    }
}

/// Polls a request so many times and drops it, as a server does whose client hung up; says whether
/// it was done by then.
async fn polled<T>(mut request: BoxFuture<'static, T>, polls: usize) -> bool {
    let mut polled = 0;
    let done = poll_fn(|cx| {
        if polled == polls {
            return std::task::Poll::Ready(None);
        }
        polled += 1;
        request.poll_unpin(cx).map(Some)
    });
    done.await.is_some()
}

/// The same request with another body: one that is JSON where the first one is.
async fn changed(request: Request) -> Result<Request, axum::Error> {
    let (mut head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let body = match serde_json::from_slice(&body) {
        Ok(serde_json::Value::Object(mut members)) => {
            members.insert("another".to_owned(), "request".into());
            serde_json::Value::Object(members).to_string()
        }
        Ok(value) => serde_json::json!([value, "another request"]).to_string(),
        Err(_) => String::from_utf8_lossy(&body).into_owned() + "another=request",
    };
    head.headers.remove(header::CONTENT_LENGTH);
    Ok(Request::from_parts(head, Body::from(body)))
}
