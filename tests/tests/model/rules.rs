//! The protocol once more, small: what a store's record is, what a request gets of it, and what
//! may become of it. It is told everything that happened and says what should not have.

use std::collections::HashMap;

use idem_runtime::{Key, OperationId, Token};

use crate::{
    schedule::{Asking, Behaviour, ClaimFault, KEYS, Records, Recover, Rules, Unknown},
    world::{Answer, EndKind, Got, Happened, LEASE, REMEMBERED, TTL, WAIT, made, recovered},
};

/// What should not have happened.
pub(crate) type Violation = String;

macro_rules! must {
    ($holds:expr, $($said:tt)*) => {
        if !$holds {
            return Err(format!($($said)*));
        }
    };
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Issued,
    Running { lease_end: u64 },
    Released,
    Completed(Answer),
    Tombstone,
}

#[derive(Clone, Debug)]
struct Record {
    state: State,
    token: Option<Token>,
    id: Option<OperationId>,
    attempt: u32,
    body: usize,
    valid_until: u64,
    kept_until: u64,
}

/// What a request is to get.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Expected {
    /// As this attempt, of this operation if it is not a new one.
    Run(u32, Option<OperationId>),
    Replay(Answer),
    Refusal(&'static str),
    /// To wait for the answer of the running one.
    Wait,
}

/// A granted claim.
#[derive(Debug)]
struct Run {
    key: usize,
    request: usize,
    id: OperationId,
    attempt: u32,
    recover_asked: bool,
    started: bool,
    effects: u32,
    /// How it ended, and its own answer.
    end: Option<(EndKind, Answer)>,
    /// What the store last said of that, as the answer that is to be given.
    told: Option<Answer>,
    /// The same, once the owner has heard it: what is lost on the way, nobody can go by.
    heard: Option<Answer>,
    finished_at: u64,
}

#[derive(Debug)]
struct Sent {
    asking: Asking,
    at: u64,
    expected: Expected,
    /// For one that waits: what the table said before things went on.
    before: Option<Expected>,
    run: Option<Token>,
    answered: bool,
    hung_up: bool,
    dead: bool,
}

#[derive(Debug)]
pub(crate) struct Model {
    rules: Rules,
    /// The store's time.
    now: u64,
    /// The processes' time, which stands still while they are suspended.
    lived: u64,
    /// For how long everything is as it should be: nobody was suspended, the store answers.
    calm_since: u64,
    records: [Option<Record>; KEYS],
    digests: HashMap<Key, usize>,
    runs: HashMap<Token, Run>,
    sent: Vec<Sent>,
    pub(crate) failing: bool,
}

fn refusal(code: &'static str) -> Expected {
    Expected::Refusal(code)
}

impl Model {
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            now: 0,
            lived: 0,
            calm_since: 0,
            records: [const { None }; KEYS],
            digests: HashMap::new(),
            runs: HashMap::new(),
            sent: Vec::new(),
            failing: false,
        }
    }

    fn record(&self, key: usize) -> Option<&Record> {
        self.records[key].as_ref().filter(|record| record.kept_until > self.now)
    }

    /// The table.
    fn decide(&self, key: usize, body: usize) -> Expected {
        let Some(record) = self.record(key) else {
            return match self.rules.issued {
                true => refusal("unknown_key"),
                false => Expected::Run(1, None),
            };
        };
        let alive = matches!(record.state, State::Running { lease_end } if lease_end > self.now);
        if record.valid_until <= self.now && !alive {
            return refusal("expired_key");
        }
        match &record.state {
            State::Issued => Expected::Run(1, None),
            _ if record.body != body => refusal("mismatch"),
            State::Running { .. } if alive && self.rules.waits => Expected::Wait,
            State::Running { .. } if alive => refusal("in_flight"),
            State::Completed(answer) => Expected::Replay(answer.clone()),
            State::Tombstone => refusal("not_replayable"),
            State::Running { .. } | State::Released => match self.rules.unknown {
                Unknown::Refuse => refusal("unknown_outcome"),
                Unknown::Rerun | Unknown::Recover => Expected::Run(record.attempt + 1, record.id),
            },
        }
    }

    /// What becomes of an answer.
    fn fate(&self, behaviour: Behaviour, attempt: u32) -> EndKind {
        let recorded = |status: u16| match self.rules.records {
            Records::Success => status < 400,
            Records::Final => status < 500 && ![401, 403, 408, 425, 429].contains(&status),
            Records::All => true,
        };
        let kind = match behaviour {
            Behaviour::Status(status) if recorded(status) => EndKind::Complete,
            Behaviour::Status(408 | 500..) | Behaviour::Panic | Behaviour::Uncertain => {
                EndKind::Release
            }
            Behaviour::Status(_) | Behaviour::Forgotten => EndKind::Forget,
            Behaviour::Large | Behaviour::Tombstone => EndKind::Tombstone,
            Behaviour::Recorded => EndKind::Complete,
        };
        if kind == EndKind::Forget && attempt > 1 { EndKind::Release } else { kind }
    }

    pub(crate) const fn takes_issued(&self) -> bool {
        self.rules.issued
    }

    /// Something is in the way of renewals.
    pub(crate) fn disturbed(&mut self) {
        self.calm_since = self.now;
    }

    pub(crate) fn suspended(&mut self, seconds: u64) {
        self.now += seconds;
        self.disturbed();
    }

    pub(crate) fn second(&mut self) {
        self.now += 1;
        self.lived += 1;
        if self.failing {
            self.disturbed();
        }
    }

    pub(crate) fn issued(&mut self, key: usize) {
        if self.record(key).is_none() {
            let valid_until = self.now + TTL;
            self.records[key] = Some(Record {
                state: State::Issued,
                token: None,
                id: None,
                attempt: 0,
                body: 0,
                valid_until,
                kept_until: valid_until + REMEMBERED,
            });
        }
    }

    /// A request is about to be sent; its number.
    pub(crate) fn send(&mut self, asking: Asking) -> usize {
        let expected = self.decide(asking.key, asking.body);
        self.sent.push(Sent {
            asking,
            at: self.lived,
            expected,
            before: None,
            run: None,
            answered: false,
            hung_up: false,
            dead: false,
        });
        self.sent.len() - 1
    }

    pub(crate) fn hung_up(&mut self, request: usize) {
        self.sent[request].hung_up = true;
    }

    pub(crate) fn crashed(&mut self, process: usize) {
        for sent in &mut self.sent {
            sent.dead |= sent.asking.process == process;
        }
    }

    /// The requests whose handlers wait in their middle.
    pub(crate) fn held_up(&self) -> Vec<(usize, usize)> {
        let mut held: Vec<_> = self
            .runs
            .values()
            .filter(|run| run.started && run.end.is_none() && !self.sent[run.request].dead)
            .map(|run| (self.sent[run.request].asking.process, run.request))
            .collect();
        held.sort_by_key(|(_, request)| *request);
        held
    }

    pub(crate) fn happened(&mut self, happened: Happened) -> Result<(), Violation> {
        match happened {
            Happened::Granted { key, token, attempt, id } => self.granted(key, token, attempt, id),
            Happened::Renewed { token, held } => {
                let run = self.run(&token)?;
                let key = run.key;
                must!(self.holds(&token) == held, "a renewal said {held} wrongly");
                if held {
                    self.extend(key);
                }
                Ok(())
            }
            Happened::Ended { token, kind, got } => self.ended(token, kind, got),
            Happened::Heard { token } => {
                if let Some(run) = self.runs.get_mut(&token) {
                    run.heard = run.told.clone();
                }
                Ok(())
            }
            Happened::RecoverAsked { request, attempt, id } => {
                let recovers = self.rules.unknown == Unknown::Recover;
                let asking = self.sent[request].asking;
                let release = self.refusal_of(409);
                let now = self.lived;
                let run = self.run_of(request, attempt, id)?;
                must!(recovers && attempt > 1 && !run.recover_asked, "recover was asked in vain");
                run.recover_asked = true;
                run.finished_at = now;
                run.end = match asking.recover {
                    Recover::Answered => {
                        let body = recovered(request);
                        let answer = Answer { status: 200, replayed: true, made: None, body };
                        Some((EndKind::Complete, answer))
                    }
                    Recover::Unknown => Some((EndKind::Release, release)),
                    Recover::Never => None,
                };
                Ok(())
            }
            Happened::Started { request, attempt, id } => {
                let recovers = self.rules.unknown == Unknown::Recover;
                let run = self.run_of(request, attempt, id)?;
                must!(!run.started, "request {request} ran twice under one claim");
                must!(run.end.is_none(), "request {request} ran although it had happened");
                must!(run.recover_asked == (recovers && attempt > 1), "recover was not asked");
                run.started = true;
                Ok(())
            }
            Happened::Effect { request } => {
                let token = self.sent[request].run.ok_or("an effect without a claim")?;
                let holds = self.holds(&token);
                let run = self.runs.get_mut(&token).ok_or("no such run")?;
                run.effects += 1;
                must!(run.effects == 1, "request {request} had two effects");
                let taken_over = run.attempt < self.attempt_of(token);
                must!(holds || taken_over || self.was_late(token), "an effect after its end");
                Ok(())
            }
            Happened::Finished { request } => {
                let token = self.sent[request].run.ok_or("an end without a claim")?;
                let (asking, now) = (self.sent[request].asking, self.lived);
                let attempt = self.run(&token)?.attempt;
                let kind = self.fate(asking.behaviour, attempt);
                let status = match asking.behaviour {
                    Behaviour::Status(status) => status,
                    Behaviour::Panic => 500,
                    Behaviour::Recorded => 409,
                    _ => 200,
                };
                let body = made(request, attempt);
                let made = Some(request.to_string());
                let run = self.runs.get_mut(&token).ok_or("no such run")?;
                run.end = Some((kind, Answer { status, replayed: false, made, body }));
                run.finished_at = now;
                Ok(())
            }
            Happened::Answered { request, answer } => self.answered(request, &answer),
        }
    }

    fn refusal_of(&self, status: u16) -> Answer {
        let body = String::from(r#"{"code":"unknown_outcome"}"#);
        Answer { status, replayed: false, made: None, body }
    }

    fn run(&self, token: &Token) -> Result<&Run, Violation> {
        self.runs.get(token).ok_or_else(|| "a token that was never granted".to_owned())
    }

    fn run_of(
        &mut self,
        request: usize,
        attempt: u32,
        id: OperationId,
    ) -> Result<&mut Run, Violation> {
        let sent = &self.sent[request];
        must!(!sent.dead, "request {request} runs after the crash of its process");
        let run = sent.run.and_then(|token| self.runs.get_mut(&token));
        let run = run.ok_or_else(|| format!("request {request} runs without a claim"))?;
        must!(
            (run.attempt, run.id) == (attempt, id),
            "request {request} runs as attempt {attempt}"
        );
        Ok(run)
    }

    /// Whether the key's claim is held under a token, its lease over or not.
    fn holds(&self, token: &Token) -> bool {
        let Some(run) = self.runs.get(token) else { return false };
        self.record(run.key).is_some_and(|record| {
            record.token == Some(*token) && matches!(record.state, State::Running { .. })
        })
    }

    fn attempt_of(&self, token: Token) -> u32 {
        self.runs.get(&token).and_then(|run| self.record(run.key)).map_or(0, |r| r.attempt)
    }

    /// Whether its record's time was over before it was done.
    fn was_late(&self, token: Token) -> bool {
        let record = self.runs.get(&token).and_then(|run| self.record(run.key));
        record.is_none_or(|record| record.token != Some(token))
    }

    fn extend(&mut self, key: usize) {
        let (now, issued) = (self.now, self.rules.issued);
        let Some(record) = &mut self.records[key] else { return };
        let State::Running { lease_end } = &mut record.state else { return };
        *lease_end = (*lease_end).max(now + LEASE);
        record.kept_until = record.kept_until.max(*lease_end);
        if !issued {
            record.valid_until = record.valid_until.max(*lease_end);
        }
    }

    fn granted(
        &mut self,
        digest: Key,
        token: Token,
        attempt: u32,
        id: OperationId,
    ) -> Result<(), Violation> {
        let (now, issued) = (self.now, self.rules.issued);
        let lived = self.lived;
        let request = self.sent.len().wrapping_sub(1);
        let sent = self.sent.last_mut().ok_or("a claim without a request")?;
        let (key, body) = (sent.asking.key, sent.asking.body);
        let known = *self.digests.entry(digest).or_insert(key);
        must!(known == key, "keys {known} and {key} are one in the store");
        if sent.run != Some(token) {
            must!(sent.run.is_none(), "request {request} was granted two claims");
            let Expected::Run(number, of) = &sent.expected else {
                return Err(format!(
                    "request {request} claimed and should get {:?}",
                    sent.expected
                ));
            };
            must!(*number == attempt, "request {request} is attempt {attempt} and not {number}");
            must!(of.is_none_or(|of| of == id), "the operation id of key {key} changed");
            let others = self.runs.values().any(|run| run.id == id);
            must!(of.is_some() || !others, "an operation id is used again");
            sent.run = Some(token);
            let run = Run {
                key,
                request,
                id,
                attempt,
                recover_asked: false,
                started: false,
                effects: 0,
                end: None,
                told: None,
                heard: None,
                finished_at: lived,
            };
            self.runs.insert(token, run);
        }
        let record = self.records[key].take().filter(|_| issued);
        let (valid_until, kept_until) =
            record.map_or((now + TTL, now + TTL), |record| (record.valid_until, record.kept_until));
        self.records[key] = Some(Record {
            state: State::Running { lease_end: 0 },
            token: Some(token),
            id: Some(id),
            attempt,
            body,
            valid_until,
            kept_until,
        });
        self.extend(key);
        Ok(())
    }

    fn ended(&mut self, token: Token, kind: EndKind, got: Got) -> Result<(), Violation> {
        let (now, issued) = (self.now, self.rules.issued);
        let run = self.run(&token)?;
        let (key, request, attempt, end) = (run.key, run.request, run.attempt, run.end.clone());
        let asking = self.sent[request].asking;
        must!(!self.sent[request].dead, "request {request} ends after its process crashed");
        let own = match end {
            Some((planned, own)) => {
                must!(planned == kind, "request {request} ended by {kind:?} and not {planned:?}");
                own
            }
            // A claim of which nobody knows, taken back.
            None => {
                must!(asking.fault == ClaimFault::AcksLost, "{kind:?} while the handler runs");
                let planned = if attempt == 1 { EndKind::Forget } else { EndKind::Release };
                must!(planned == kind, "a claim was taken back by {kind:?}");
                self.refusal_of(503)
            }
        };
        let record = self.record(key);
        let expected = match record {
            None => Got::Gone,
            Some(record) if record.token != Some(token) => Got::Fenced,
            Some(record) => match (&record.state, kind) {
                (State::Running { .. }, _)
                | (State::Completed(_), EndKind::Complete | EndKind::Tombstone)
                | (State::Tombstone, EndKind::Complete | EndKind::Tombstone)
                | (State::Released, EndKind::Release)
                | (State::Issued, EndKind::Forget) => Got::Done,
                _ => Got::Fenced,
            },
        };
        must!(
            got == expected,
            "request {request}: {kind:?} was {got:?} and should be {expected:?}"
        );
        let theirs = match record.map(|record| (&record.state, record.body)) {
            Some((State::Completed(answer), body)) if body == asking.body => {
                Answer { replayed: true, ..answer.clone() }
            }
            _ => Answer { body: String::from(r#"{"code":"lease_lost"}"#), ..self.refusal_of(409) },
        };
        let answer = if got == Got::Fenced { theirs } else { own.clone() };
        if self.holds(&token) {
            let record = self.records[key].as_mut().ok_or("no record")?;
            match kind {
                EndKind::Complete => record.state = State::Completed(own),
                EndKind::Tombstone => record.state = State::Tombstone,
                EndKind::Release => record.state = State::Released,
                EndKind::Forget => record.state = State::Issued,
            }
            let completed = matches!(kind, EndKind::Complete | EndKind::Tombstone);
            if completed && !issued {
                (record.valid_until, record.kept_until) = (now + TTL, now + TTL);
            }
            if kind == EndKind::Forget && !issued {
                self.records[key] = None;
            }
        }
        if let Some(run) = self.runs.get_mut(&token) {
            run.told = Some(answer);
        }
        Ok(())
    }

    fn answered(&mut self, request: usize, answer: &Answer) -> Result<(), Violation> {
        let sent = &self.sent[request];
        must!(!sent.answered && !sent.dead, "request {request} was answered in vain");
        let asking = sent.asking;
        let lost = matches!(asking.fault, ClaimFault::Refused | ClaimFault::AcksLost);
        let expected = match (&sent.expected, sent.run) {
            _ if self.failing_at(request) || lost => refusal("store_unavailable"),
            (Expected::Run(..), None) => return Err(format!("request {request} did not claim")),
            (Expected::Run(..), Some(token)) => {
                return self.own_answer(request, token, answer);
            }
            (Expected::Wait, _) => self.waited(sent, answer)?,
            (expected, _) => expected.clone(),
        };
        match &expected {
            Expected::Replay(recorded) => {
                let recorded = Answer { replayed: true, ..recorded.clone() };
                must!(*answer == recorded, "request {request}: {answer:?} is not {recorded:?}");
            }
            Expected::Refusal(code) => {
                let said = answer.code();
                must!(
                    said.as_deref() == Some(*code) && !answer.replayed,
                    "request {request}: {answer:?} and not {code}"
                );
            }
            other => return Err(format!("request {request}: {answer:?} and not {other:?}")),
        }
        self.sent[request].answered = true;
        Ok(())
    }

    /// What a request may get that has waited: what the table says now or said a moment ago. It
    /// never runs.
    fn waited(&self, sent: &Sent, answer: &Answer) -> Result<Expected, Violation> {
        let now = self.decide(sent.asking.key, sent.asking.body);
        let late = self.lived >= sent.at + WAIT;
        let in_flight = refusal("in_flight");
        let before = sent.before.clone().unwrap_or(Expected::Wait);
        if late && answer.code().as_deref() == Some("in_flight") {
            return Ok(in_flight);
        }
        let of = |table| match table {
            // Where nothing is left, a retry finds out why.
            Expected::Run(..) | Expected::Refusal("unknown_key") => Some(in_flight.clone()),
            Expected::Wait => None,
            table => Some(table),
        };
        let refused = |may: &Expected| matches!(may, Expected::Refusal(code) if answer.code().as_deref() == Some(code));
        match (of(now), of(before)) {
            (_, Some(before)) if refused(&before) => Ok(before),
            (Some(now), _) => Ok(now),
            (None, Some(before)) => Ok(before),
            (None, None) => Err("a request did not wait".to_owned()),
        }
    }

    /// Things are about to go on.
    pub(crate) fn go_on(&mut self) {
        for request in 0..self.sent.len() {
            let sent = &self.sent[request];
            if sent.expected == Expected::Wait && !sent.answered {
                let before = self.decide(sent.asking.key, sent.asking.body);
                self.sent[request].before = Some(before);
            }
        }
    }

    fn failing_at(&self, request: usize) -> bool {
        matches!(self.sent[request].expected, Expected::Refusal("store_unavailable"))
    }

    /// While the store cannot be reached, all are refused.
    pub(crate) fn unreachable(&mut self, request: usize) {
        self.sent[request].expected = refusal("store_unavailable");
    }

    fn own_answer(
        &mut self,
        request: usize,
        token: Token,
        answer: &Answer,
    ) -> Result<(), Violation> {
        let run = self.run(&token)?;
        let (_, own) = run.end.clone().ok_or("an answer before the handler had one")?;
        // Without its record it goes out only after a time.
        let unrecorded = run.heard.is_none();
        must!(
            !unrecorded || self.lived >= run.finished_at + 2,
            "request {request} was answered before its record"
        );
        let expected = run.heard.clone().unwrap_or(own);
        let asking = self.sent[request].asking;
        let code = expected.code();
        let panicked = asking.behaviour == Behaviour::Panic && expected.status == 500;
        let same = if panicked && !expected.replayed {
            answer.code().as_deref() == Some("handler_panicked")
        } else if code.is_some() {
            (answer.code(), answer.status) == (code, expected.status)
        } else if asking.behaviour == Behaviour::Large && !expected.replayed {
            answer.body.starts_with(&expected.body) && answer.status == expected.status
        } else {
            *answer == expected
        };
        must!(same, "request {request}: {answer:?} is not {expected:?}");
        self.sent[request].answered = true;
        Ok(())
    }

    /// What must hold whenever nothing moves.
    pub(crate) fn at_rest(&self) -> Result<(), Violation> {
        for (request, sent) in self.sent.iter().enumerate() {
            if sent.answered || sent.hung_up || sent.dead {
                continue;
            }
            let may_wait = match sent.run.and_then(|token| self.runs.get(&token)) {
                // Its end may have been written and the acknowledgement be lost.
                Some(run) => run.started || run.recover_asked,
                None => sent.expected == Expected::Wait && self.lived <= sent.at + WAIT,
            };
            must!(may_wait, "request {request} got no answer");
        }
        for run in self.runs.values() {
            // Renewed when a third of it has passed: by now, if nothing is in the way.
            let steady = self.now > self.calm_since + LEASE / 3 && !self.failing;
            let token = self.sent[run.request].run;
            let Some(token) = token.filter(|token| steady && self.holds(token)) else { continue };
            if run.end.is_none() && run.started && !self.sent[run.request].dead {
                must!(self.leased(&token), "the lease of request {} ended", run.request);
            }
        }
        Ok(())
    }

    fn leased(&self, token: &Token) -> bool {
        let record = self.runs.get(token).and_then(|run| self.record(run.key));
        record.is_some_and(
            |record| matches!(record.state, State::Running { lease_end } if lease_end > self.now),
        )
    }

    /// What must hold when all handlers have ended and there was time for everything.
    pub(crate) fn at_the_end(&self) -> Result<(), Violation> {
        for (request, sent) in self.sent.iter().enumerate() {
            let gone = sent.answered || sent.hung_up || sent.dead;
            must!(gone, "request {request} was never answered");
        }
        for (token, run) in &self.runs {
            let alive = self.holds(token) && !self.sent[run.request].dead;
            let young = self.lived < run.finished_at + TTL / 2;
            let leaves_an_answer =
                matches!(run.end, Some((EndKind::Complete | EndKind::Tombstone, _)));
            must!(!(alive && young && leaves_an_answer), "request {} unrecorded", run.request);
        }
        Ok(())
    }
}
