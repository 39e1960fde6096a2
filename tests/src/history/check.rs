//! Whether a history is one that idem allows.
//!
//! Only what must have happened counts against a store. A call takes effect at some moment between
//! its beginning and its end, and one that failed or was not answered may have been made or not; so
//! whatever is found here is a fault, however the calls met. What it cannot see is what no call
//! told.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    time::Duration,
};

use bytes::Bytes;
use idem_runtime::{Key, OperationId, RecordedResponse, State, Token, Ttl};

use super::{Answer, Call, Event, Said, Sight, What, effect_of};

/// How exactly a lease's end is taken: stores go by whole milliseconds and by clocks of their own.
const SLACK: Duration = Duration::from_millis(20);

/// What is allowed in a history beside what always is.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Whether at most one effect is allowed under a key, as where unknown outcomes are refused.
    pub once: fn(&str) -> bool,
    /// Whether a renewal that was answered holds, as it does unless a replica takes over that had
    /// not received it.
    pub renewals_hold: bool,
}

/// What is wrong with a history, in words.
#[derive(Clone, Debug)]
pub struct Violations(Vec<String>);

impl Violations {
    /// Whether one of them says this.
    pub fn say(&self, what: &str) -> bool {
        self.0.iter().any(|violation| violation.contains(what))
    }
}

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} violations", self.0.len())?;
        self.0.iter().take(8).try_for_each(|violation| write!(f, "\n  {violation}"))
    }
}

/// What a history that is allowed consists of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Summary {
    /// Requests of clients.
    pub requests: usize,
    /// Those that were answered with a success.
    pub successes: usize,
    /// Those of them that were replays.
    pub replays: usize,
    /// Effects of handlers.
    pub effects: usize,
    /// Handlers that began and died with their process.
    pub died: usize,
    /// Claims that were granted to who was not the first, after a release or a lease's end.
    pub takeovers: usize,
    /// Ends of claims that came after another one had taken over, or for nobody.
    pub fenced: usize,
    /// Calls of the store.
    pub calls: usize,
    /// Those that failed.
    pub failed: usize,
    /// Those that nobody waited for any more.
    pub unanswered: usize,
}

/// Checks a history, and says what it consists of.
///
/// # Errors
///
/// With all that is wrong with it.
pub fn check(events: &[Event], rules: Rules) -> Result<Summary, Violations> {
    let mut records: HashMap<Key, Calls> = HashMap::new();
    let mut keys: BTreeMap<&str, Outside> = BTreeMap::new();
    let mut summary = Summary::default();
    for event in events {
        match &event.what {
            What::Asked { key, token, call, said } => {
                let asked = Asked {
                    begun: event.begun,
                    ended: event.ended.filter(|_| said.is_some()),
                    token: *token,
                    call,
                    said: said.as_ref(),
                };
                summary.count(&asked);
                records.entry(*key).or_default().0.push(asked);
            }
            What::Ran { key, operation, attempt, effects } => {
                summary.effects += effects.len();
                summary.died += usize::from(event.ended.is_none());
                let (operation, attempt) = (*operation, *attempt);
                let ran = Ran { begun: event.begun, operation, attempt, effects };
                keys.entry(key).or_default().runs.push(ran);
            }
            What::Requested { key, answer } => {
                summary.requests += 1;
                let Some((answer, ended)) = answer.as_ref().zip(event.ended) else { continue };
                if (200..300).contains(&answer.status) {
                    summary.successes += 1;
                    summary.replays += usize::from(answer.replayed);
                    keys.entry(key).or_default().answers.push((ended, answer));
                }
            }
        }
    }
    let mut found = Vec::new();
    let mut by_operation = HashMap::new();
    for (key, calls) in &records {
        calls.check(*key, rules, &mut found);
        by_operation.extend(calls.granted().map(|granted| (granted.sight.operation, *key)));
        let later = calls.granted().filter(|granted| granted.sight.attempt > 1);
        summary.takeovers += later.map(|granted| granted.token).collect::<HashSet<_>>().len();
    }
    let whose: HashMap<u64, &str> = keys
        .iter()
        .flat_map(|(key, outside)| outside.effects().map(|(number, _)| (number, *key)))
        .collect();
    for (key, outside) in &keys {
        outside.check(key, rules, &records, &by_operation, &whose, &mut found);
    }
    match found.is_empty() {
        true => Ok(summary),
        false => Err(Violations(found)),
    }
}

impl Summary {
    fn count(&mut self, asked: &Asked<'_>) {
        self.calls += 1;
        match (asked.call, asked.said) {
            (_, None) => self.unanswered += 1,
            (_, Some(Said::Failed(_))) => self.failed += 1,
            (Call::Complete(..) | Call::Release | Call::Forget, Some(said)) => {
                self.fenced += usize::from(!matches!(said, Said::Done));
            }
            _ => {}
        }
    }
}

/// One call.
struct Asked<'a> {
    begun: Duration,
    ended: Option<Duration>,
    token: Option<Token>,
    call: &'a Call,
    said: Option<&'a Said>,
}

/// A claim that was granted.
struct Granted<'a> {
    begun: Duration,
    ended: Duration,
    token: Token,
    sight: &'a Sight,
}

/// An answer that is known to be recorded.
struct Known<'a> {
    /// Since when.
    since: Duration,
    /// Until when at least.
    until: Duration,
    payload: &'a Bytes,
}

/// All calls about one record, in the order in which they began.
#[derive(Default)]
struct Calls<'a>(Vec<Asked<'a>>);

impl<'a> Calls<'a> {
    fn granted(&self) -> impl Iterator<Item = Granted<'a>> {
        self.0.iter().filter_map(|asked| match (asked.call, asked.said?) {
            (Call::Claim(_), Said::Granted(sight)) => Some(Granted {
                begun: asked.begun,
                ended: asked.ended?,
                token: asked.token?,
                sight,
            }),
            _ => None,
        })
    }

    /// What was seen of the record, and when.
    fn sights(&self) -> impl Iterator<Item = (&Asked<'a>, &'a Sight)> {
        self.0.iter().filter_map(|asked| match asked.said? {
            Said::Found(sight) => Some((asked, sight)),
            _ => None,
        })
    }

    fn check(&self, key: Key, rules: Rules, found: &mut Vec<String>) {
        let mut report = |said: Option<String>| found.extend(said.map(|s| format!("{key:?}: {s}")));
        report(self.two_holders(rules));
        report(self.unfinished_lost());
        report(self.token_ignored());
        report(self.two_answers());
        report(self.answer_of_nobody());
        if let Some(known) = self.known() {
            report(self.answer_kept(&known));
        }
    }

    /// The moments in which a token holds the claim for certain: from an answer that said so until
    /// the lease's end or until its owner began to end it.
    fn holds(&self, token: Token, rules: Rules) -> Vec<(Duration, Duration)> {
        let ours = || self.0.iter().filter(|asked| asked.token == Some(token));
        let ends = ours().filter(|asked| is_end(asked.call)).map(|asked| asked.begun).min();
        let held = ours().filter_map(|asked| {
            let lease = match (asked.call, asked.said?) {
                (Call::Claim(lease), Said::Granted(_)) => lease,
                (Call::Renew(lease), Said::Done) if rules.renewals_hold => lease,
                _ => return None,
            };
            let until = (asked.begun + *lease).saturating_sub(SLACK);
            Some((asked.ended?, ends.map_or(until, |end| until.min(end))))
        });
        held.filter(|(from, until)| from < until).collect()
    }

    fn two_holders(&self, rules: Rules) -> Option<String> {
        let granted: Vec<_> = self.granted().collect();
        for one in &granted {
            // Most keys are claimed once.
            if granted.iter().all(|other| other.token == one.token) {
                return None;
            }
            let holds = self.holds(one.token, rules);
            for other in granted.iter().filter(|other| other.token != one.token) {
                let of_one = one.sight.operation == other.sight.operation;
                if of_one && one.sight.attempt == other.sight.attempt {
                    return Some(format!(
                        "two holders at once: attempt {} was granted to {:?} and to {:?}",
                        one.sight.attempt, one.token, other.token
                    ));
                }
                let within =
                    holds.iter().find(|(from, until)| *from < other.begun && other.ended < *until);
                if let Some((from, until)) = within {
                    let what = match of_one {
                        true => "a lease ended early",
                        false => "two holders at once",
                    };
                    return Some(format!(
                        "{what}: {:?} held attempt {} from {from:?} until {until:?} at least, and \
                         {:?} was granted attempt {} between {:?} and {:?}",
                        one.token,
                        one.sight.attempt,
                        other.token,
                        other.sight.attempt,
                        other.begun,
                        other.ended
                    ));
                }
            }
        }
        None
    }

    /// A record that is not completed only goes away by being forgotten.
    fn unfinished_lost(&self) -> Option<String> {
        let first = self.granted().min_by_key(|granted| granted.ended)?;
        let forgotten = self.0.iter().find(|asked| matches!(asked.call, Call::Forget));
        let lost = self.0.iter().find(|asked| {
            let gone = match asked.said {
                Some(Said::Nothing) => true,
                Some(Said::Granted(sight) | Said::Found(sight)) => {
                    sight.operation != first.sight.operation
                }
                _ => false,
            };
            let forgotten = forgotten.is_some_and(|forget| Some(forget.begun) < asked.ended);
            gone && first.ended < asked.begun && !forgotten
        })?;
        Some(format!(
            "a record was lost: operation {} was claimed at {:?} and never forgotten, and {:?} at \
             {:?} met {:?}",
            first.sight.operation, first.ended, lost.call, lost.begun, lost.said
        ))
    }

    /// A completion is only written for who holds the claim.
    fn token_ignored(&self) -> Option<String> {
        for asked in &self.0 {
            let (Call::Complete(..), Some(Said::Done)) = (asked.call, asked.said) else { continue };
            let Some(last) = self.granted().filter(|one| Some(one.token) == asked.token).last()
            else {
                return Some(format!(
                    "a completion ignored its token: {:?} was never granted the claim",
                    asked.token
                ));
            };
            let taken = self.granted().find(|other| {
                other.token != last.token && last.ended < other.begun && other.ended < asked.begun
            });
            if let Some(other) = taken {
                return Some(format!(
                    "a completion ignored its token: {:?} completed at {:?}, after {:?} had been \
                     granted attempt {} at {:?}",
                    last.token, asked.begun, other.token, other.sight.attempt, other.ended
                ));
            }
        }
        None
    }

    fn completed(&self) -> impl Iterator<Item = (&Asked<'a>, &'a Bytes, Ttl)> {
        self.0.iter().filter_map(|asked| match (asked.call, asked.said?) {
            (Call::Complete(payload, ttl), Said::Done) => Some((asked, payload, *ttl)),
            _ => None,
        })
    }

    fn two_answers(&self) -> Option<String> {
        let (first, ..) = self.completed().next()?;
        let (second, ..) = self.completed().find(|(other, ..)| other.token != first.token)?;
        Some(format!(
            "two answers were recorded: by {:?} at {:?} and by {:?} at {:?}",
            first.token, first.ended, second.token, second.ended
        ))
    }

    /// What a record carries was asked to be recorded.
    fn answer_of_nobody(&self) -> Option<String> {
        let (asked, sight) = self.sights().find(|(asked, sight)| {
            sight.state == State::Completed
                && !self.0.iter().any(|other| match other.call {
                    Call::Complete(payload, _) => {
                        *payload == sight.payload && Some(other.begun) < asked.ended
                    }
                    _ => false,
                })
        })?;
        Some(format!(
            "an answer that nobody recorded under this key: {:?} at {:?} met {}",
            asked.call,
            asked.begun,
            shown(&sight.payload)
        ))
    }

    /// The first answer that is known to be recorded.
    fn known(&self) -> Option<Known<'a>> {
        let written = self.completed().filter_map(|(asked, payload, ttl)| {
            Some(Known { since: asked.ended?, until: until(asked.begun, ttl), payload })
        });
        let seen = self.sights().filter_map(|(asked, sight)| {
            let payload = (sight.state == State::Completed).then_some(&sight.payload)?;
            // Who recorded it may have died before it was told.
            let writing = self.0.iter().find_map(|other| match other.call {
                Call::Complete(written, ttl) if written == payload => {
                    Some(until(other.begun, *ttl))
                }
                _ => None,
            });
            Some(Known { since: asked.ended?, until: writing?, payload })
        });
        written.chain(seen).min_by_key(|known| known.since)
    }

    /// A recorded answer stays, and stays the same.
    fn answer_kept(&self, known: &Known<'_>) -> Option<String> {
        let later = |asked: &&Asked<'_>| {
            known.since < asked.begun && asked.ended.is_some_and(|ended| ended < known.until)
        };
        for asked in self.0.iter().filter(later) {
            let what = match (asked.call, asked.said?) {
                (_, Said::Found(sight)) if sight.state != State::Completed => "was lost",
                (_, Said::Found(sight)) if sight.payload != *known.payload => "was changed",
                (_, Said::Granted(_)) => "was lost: the key was granted again",
                (Call::Release | Call::Forget, Said::Done) => "was given up",
                (Call::Renew(_), _) => continue,
                (_, Said::Nothing) => "was lost",
                _ => continue,
            };
            return Some(format!(
                "a recorded answer {what}: it was {} at {:?}, and {:?} at {:?} met {:?}",
                shown(known.payload),
                known.since,
                asked.call,
                asked.begun,
                asked.said
            ));
        }
        None
    }
}

fn is_end(call: &Call) -> bool {
    matches!(call, Call::Complete(..) | Call::Release | Call::Forget)
}

fn until(begun: Duration, ttl: Ttl) -> Duration {
    match ttl {
        Ttl::For(ttl) => begun.saturating_add(ttl),
        Ttl::Forever => Duration::MAX,
    }
}

fn shown(payload: &Bytes) -> String {
    match RecordedResponse::decode(payload) {
        Ok(response) => {
            format!("{} {:?}", response.status, String::from_utf8_lossy(&response.body))
        }
        Err(error) => error.to_string(),
    }
}

/// A handler's run.
struct Ran<'a> {
    begun: Duration,
    operation: OperationId,
    attempt: u32,
    effects: &'a [(u64, Duration)],
}

/// What was seen of a key outside of the store: by handlers and by clients.
#[derive(Default)]
struct Outside<'a> {
    runs: Vec<Ran<'a>>,
    /// The successful ones, and when they came.
    answers: Vec<(Duration, &'a Answer)>,
}

impl Outside<'_> {
    fn effects(&self) -> impl Iterator<Item = (u64, Duration)> {
        self.runs.iter().flat_map(|ran| ran.effects).copied()
    }

    fn check(
        &self,
        key: &str,
        rules: Rules,
        records: &HashMap<Key, Calls<'_>>,
        by_operation: &HashMap<OperationId, Key>,
        whose: &HashMap<u64, &str>,
        found: &mut Vec<String>,
    ) {
        let mut report = |said: Option<String>| found.extend(said.map(|s| format!("{key}: {s}")));
        let digests: HashSet<_> =
            self.runs.iter().filter_map(|ran| by_operation.get(&ran.operation)).collect();
        if digests.len() > 1 {
            report(Some(format!("one key is several in the store: {digests:?}")));
        }
        let calls = digests.iter().next().and_then(|digest| records.get(digest));
        report(self.run_without_claim(calls));
        report(self.too_many_effects((rules.once)(key)));
        report(self.several_answers());
        report(self.answer_without_effect(key, whose));
        report(self.answer_without_record(calls));
    }

    /// Each run has a claim of its own.
    fn run_without_claim(&self, calls: Option<&Calls<'_>>) -> Option<String> {
        let mut seen = HashSet::new();
        for ran in &self.runs {
            if !seen.insert((ran.operation, ran.attempt)) {
                return Some(format!(
                    "one claim ran twice: attempt {} of operation {}",
                    ran.attempt, ran.operation
                ));
            }
            let claimed = calls.into_iter().flat_map(Calls::granted).any(|granted| {
                (granted.sight.operation, granted.sight.attempt) == (ran.operation, ran.attempt)
                    && granted.ended <= ran.begun
            });
            if !claimed {
                return Some(format!(
                    "a handler ran without a claim: attempt {} of operation {} at {:?}",
                    ran.attempt, ran.operation, ran.begun
                ));
            }
        }
        None
    }

    fn too_many_effects(&self, once: bool) -> Option<String> {
        let count = self.effects().count();
        let allowed = if once { 1 } else { self.runs.len() };
        (count > allowed).then(|| format!("{count} effects where {allowed} are allowed"))
    }

    fn several_answers(&self) -> Option<String> {
        let (first, of) = self.answers.first()?;
        let (second, other) = self
            .answers
            .iter()
            .find(|(_, other)| (other.status, &other.body) != (of.status, &of.body))?;
        Some(format!(
            "two answers to one key: {of:?} came at {first:?}, and {other:?} at {second:?}"
        ))
    }

    /// Each answer is of an effect of this key that had happened by then.
    fn answer_without_effect(&self, key: &str, whose: &HashMap<u64, &str>) -> Option<String> {
        self.answers.iter().find_map(|(came, answer)| {
            let named = effect_of(&answer.body);
            let happened = self.effects().any(|(number, at)| Some(number) == named && at <= *came);
            if happened {
                return None;
            }
            Some(match named.and_then(|named| whose.get(&named)) {
                Some(other) if *other != key => {
                    format!("an answer of another key, {other}: {answer:?}")
                }
                _ => format!("an answer without an effect: {answer:?}"),
            })
        })
    }

    /// Each answer was recorded before it came, and recorded as it came.
    fn answer_without_record(&self, calls: Option<&Calls<'_>>) -> Option<String> {
        let recorded = |came: Duration, answer: &Answer| {
            let calls = || calls.into_iter().flat_map(|calls| &calls.0);
            calls().filter(|asked| asked.ended.is_some_and(|ended| ended <= came)).any(|asked| {
                let payload = match (asked.call, asked.said) {
                    (Call::Complete(payload, _), Some(Said::Done)) => payload,
                    (_, Some(Said::Found(sight))) if sight.state == State::Completed => {
                        &sight.payload
                    }
                    _ => return false,
                };
                RecordedResponse::decode(payload).is_ok_and(|recorded| {
                    recorded.status == answer.status && recorded.body == answer.body
                })
            })
        };
        let (came, answer) = self.answers.iter().find(|(came, answer)| !recorded(*came, answer))?;
        let what = if answer.replayed { "a replay" } else { "an answer" };
        Some(format!("{what} that nobody had recorded: {answer:?} came at {came:?}"))
    }
}
