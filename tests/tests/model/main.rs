//! Random schedules of requests, duplicates, hang-ups, crashes, failures of the store and time,
//! checked against a small model of the protocol; and recovery and steps under a crash at every
//! await.
//!
//! A failing schedule is made smaller and printed with its seed: `IDEM_SEED=17 cargo test -p tests
//! --test model` runs that one alone, `IDEM_SCHEDULES=100000` so many.

#![allow(clippy::expect_used, reason = "a test that cannot go on has failed")]

mod broken;
mod crash_points;
mod rules;
mod schedule;
mod world;

use std::{sync::Arc, time::Instant};

use idem_runtime::store::{Clock, ManualClock, MemoryStore, SqliteStore, Store};
use tests::faults::{Call, Fault};

use crate::{
    rules::{Model, Violation},
    schedule::{Action, Asking, ClaimFault, Schedule},
    world::World,
};

/// Runs a schedule on a store.
pub(crate) fn run(
    schedule: &Schedule,
    store: Arc<dyn Store>,
    clock: ManualClock,
) -> Result<(), Violation> {
    let mut world = World::new(schedule.rules, store, clock);
    let mut model = Model::new(schedule.rules);
    let mut outage = false;
    for (number, action) in schedule.actions.iter().enumerate() {
        act(*action, &mut world, &mut model, &mut outage)
            .map_err(|violation| format!("at action {number}: {violation}"))?;
    }
    // Everything comes to its end.
    let mut finish = vec![Action::Mend];
    finish.extend([Action::Open(0); 20]);
    finish.push(Action::Pass(13));
    for action in finish {
        act(action, &mut world, &mut model, &mut outage)
            .map_err(|violation| format!("at the end: {violation}"))?;
    }
    model.at_the_end()?;
    if world.detached() > 0 {
        return Err("something goes on for ever".to_owned());
    }
    Ok(())
}

/// Lets everything go on, and asks the model about it.
fn settle(world: &World, model: &mut Model) -> Result<(), Violation> {
    model.go_on();
    world.settle();
    world.log.take().into_iter().try_for_each(|happened| model.happened(happened))
}

fn act(
    action: Action,
    world: &mut World,
    model: &mut Model,
    outage: &mut bool,
) -> Result<(), Violation> {
    match action {
        Action::Request(asking) => request(asking, world, model, *outage)?,
        Action::Open(which) => {
            let held_up = model.held_up();
            if !held_up.is_empty() {
                let (process, request) = held_up[which % held_up.len()];
                world.open(process, request);
            }
        }
        Action::Crash(process) => {
            world.crash(process);
            model.crashed(process);
        }
        Action::Pass(seconds) => {
            for _ in 0..seconds {
                world.second();
                model.second();
                settle(world, model)?;
                model.at_rest()?;
            }
        }
        Action::Suspend(seconds) => {
            world.suspend(seconds);
            model.suspended(seconds);
        }
        Action::Outage => {
            world.faults.cut_off();
            *outage = true;
            model.failing = true;
        }
        Action::EndsFail => {
            for call in [Call::Complete, Call::Release, Call::Forget] {
                let unreachable = idem_runtime::store::StoreErrorKind::Unreachable;
                world.faults.always(call, Fault::Fail(unreachable));
            }
        }
        Action::CompletionAckLost => world.faults.once(Call::Complete, Fault::LoseAnswer),
        Action::Mend => {
            world.faults.restore();
            *outage = false;
            model.failing = false;
            model.disturbed();
        }
        Action::Issue(key) => {
            if model.takes_issued() && world.issue(key) {
                model.issued(key);
            }
        }
    }
    settle(world, model)?;
    model.at_rest()
}

fn request(
    mut asking: Asking,
    world: &mut World,
    model: &mut Model,
    outage: bool,
) -> Result<(), Violation> {
    if outage {
        asking.fault = ClaimFault::None;
    }
    let request = model.send(asking);
    if outage {
        model.unreachable(request);
    }
    world.lose_claims(asking.fault);
    if asking.hang_up.is_some() {
        model.hung_up(request);
    }
    world.send(request, asking);
    settle(world, model)?;
    if !outage {
        world.faults.mend(Call::Claim);
    }
    if asking.hang_up.is_some() {
        world.hang_up(asking.process, request);
    }
    Ok(())
}

/// Leaves actions out as long as it still fails.
fn shrink(mut schedule: Schedule, fails: impl Fn(&Schedule) -> Option<Violation>) -> Schedule {
    let mut index = 0;
    while index < schedule.actions.len() {
        let mut smaller = schedule.clone();
        smaller.actions.remove(index);
        if fails(&smaller).is_some() {
            schedule = smaller;
            index = 0;
        } else {
            index += 1;
        }
    }
    schedule
}

pub(crate) fn on_memory(schedule: &Schedule) -> Result<(), Violation> {
    let clock = Clock::manual();
    let store = MemoryStore::builder().clock(clock.clone()).build();
    run(schedule, Arc::new(store), clock)
}

fn on_sqlite(schedule: &Schedule) -> Result<(), Violation> {
    let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string())?;
    let clock = Clock::manual();
    let store = runtime.block_on(SqliteStore::in_memory()).map_err(|error| error.to_string())?;
    run(schedule, Arc::new(store.with_clock(clock.clone())), clock)
}

/// The seeds to run: what the environment says, or others each time.
fn seeds(count: u64) -> std::ops::Range<u64> {
    let said = |name| std::env::var(name).ok().and_then(|said| said.parse().ok());
    let count = said("IDEM_SCHEDULES").unwrap_or(count);
    match said("IDEM_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            let first = u64::from(rand::random::<u32>());
            first..first + count
        }
    }
}

fn check(name: &str, count: u64, run: fn(&Schedule) -> Result<(), Violation>) {
    let (seeds, since) = (seeds(count), Instant::now());
    println!("{name}: seeds {seeds:?}");
    for seed in seeds.clone() {
        let schedule = Schedule::random(seed);
        if let Err(violation) = run(&schedule) {
            let small = shrink(schedule.clone(), |schedule| run(schedule).err());
            let smallest = run(&small).err();
            panic!(
                "IDEM_SEED={seed} on {name}: {violation}\n{schedule}\nmade smaller: \
                 {smallest:?}\n{small}"
            );
        }
    }
    let ran = seeds.end - seeds.start;
    println!("{name}: {ran} schedules in {:?}", since.elapsed());
}

#[test]
fn random_schedules_in_memory_follow_the_model() {
    check("memory", 6_000, on_memory);
}

#[test]
fn more_random_schedules_in_memory_follow_the_model() {
    check("memory", 6_000, on_memory);
}

#[test]
fn random_schedules_in_sqlite_follow_the_model() {
    check("sqlite", 150, on_sqlite);
}
