//! What must hold for each key, however often its processes were killed.

use std::collections::{BTreeSet, HashSet};

use tests::ledger::Effect;

use crate::fleet::{Answer, Run, Story};

/// What a process promises of unknown outcomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Promise {
    /// The handler runs again: one more effect for each kill between an effect and its record, and
    /// all of them with one derived key.
    Rerun,
    /// At most one effect, and none without a record or an answer that says that nobody knows.
    Refuse,
    /// One effect.
    Recover,
    /// One effect, and it is the one that was answered for.
    Transaction,
}

impl Promise {
    /// The word for it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Rerun => "rerun",
            Self::Refuse => "refuse",
            Self::Recover => "recover",
            Self::Transaction => "transaction",
        }
    }
}

/// How often something was done that had been done before.
pub(crate) fn extra_effects(run: &Run) -> usize {
    let keys: HashSet<_> = run.effects.iter().map(|effect| &effect.key).collect();
    run.effects.len() - keys.len()
}

/// All that is wrong.
pub(crate) fn complaints(promise: Promise, run: &Run) -> Vec<String> {
    let stories = run.stories.iter().filter_map(|(key, story)| {
        let effects: Vec<_> = run.effects.iter().filter(|effect| effect.key == *key).collect();
        let wrong = judge(promise, run, story, &effects).err()?;
        Some(format!("{key} ({}): {wrong}: {story:?}, {effects:?}", story.way))
    });
    let unasked = run.effects.iter().filter(|effect| !run.stories.contains_key(&effect.key));
    stories.chain(unasked.map(|effect| format!("nobody asked for {effect}"))).collect()
}

fn judge(
    promise: Promise,
    run: &Run,
    story: &Story,
    effects: &[&Effect],
) -> Result<(), &'static str> {
    let told = |wrong: bool, what| if wrong { Err(what) } else { Ok(()) };
    told(story.out_of_time, "it was not answered in time, although each lease has ended")?;
    told(story.answers.is_empty(), "it was not answered")?;
    let is_unknown = |answer: &Answer| answer.code() == Some("unknown_outcome");
    if story.way == "declined" {
        told(!effects.is_empty(), "declined, and done")?;
        let expected = |answer: &Answer| {
            answer.status == 402 || promise == Promise::Refuse && is_unknown(answer)
        };
        return told(!story.answers.iter().all(expected), "an unexpected answer");
    }

    let same = |answer: &Answer| match is_unknown(answer) {
        true => (409, String::new()),
        false => (answer.status, answer.body.clone()),
    };
    let answers: BTreeSet<_> = story.answers.iter().map(same).collect();
    told(answers.len() > 1, "it has several answers")?;
    told(story.runs_at_the_end, "what was answered was not recorded")?;
    let operations: HashSet<_> = effects.iter().map(|effect| &effect.operation).collect();
    let derived: HashSet<_> = effects.iter().map(|effect| &effect.derived).collect();
    told(operations.len() > 1 || derived.len() > 1, "whoever is downstream sees several")?;
    let processes: HashSet<_> = effects.iter().map(|effect| effect.process).collect();
    told(processes.len() < effects.len(), "one process has done it twice")?;

    let answer = &story.answers[0];
    if is_unknown(answer) {
        told(promise != Promise::Refuse, "an unknown outcome")?;
        return told(effects.len() > 1, "done more than once");
    }
    if story.way == "refused" {
        told(answer.status != 402, "an unexpected answer")?;
        return told(!effects.is_empty(), "refused, and done");
    }
    told(answer.status != 201, "an unexpected answer")?;
    let by = answer.body.rsplit(' ').next().and_then(|number| number.parse().ok());
    let by: u32 = by.ok_or("an answer of nobody's")?;
    told(effects.is_empty(), "answered, and never done")?;
    if promise == Promise::Rerun {
        let by_others = || effects.iter().filter(|effect| effect.process != by);
        // Who takes the steps of another over does none of them again.
        let again = story.way != "stepwise" && by_others().count() == effects.len();
        told(again, "answered by somebody who has not done it")?;
        let killed = |effect: &&&Effect| {
            run.kills.contains_key(&effect.process) && story.broken.contains(&effect.process)
        };
        return told(
            !by_others().all(|effect| killed(&effect)),
            "done again, and nobody was killed",
        );
    }
    told(effects.len() > 1, "done more than once")?;
    told(effects[0].process != by, "answered by somebody who has not done it")
}
