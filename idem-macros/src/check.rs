//! From what was said to what is meant.
//!
//! Every rule is here or below, and only here can a [`Checked`] be made, so
//! expansion has nothing left to refuse. Rules that do not depend on each
//! other are all tried: one compilation reports every mistake.

mod parts;
mod signature;
mod value;

use proc_macro2::{Ident, Span};
use syn::{Error, Expr, ExprPath, Lit, LitStr, Path, Result, Type};

use crate::args::{self, Args, Call, Said, Term};
use crate::errors::Errors;
use crate::handler::Handler;

use parts::Parts;

pub(crate) use signature::{Checked as CheckedHandler, Extractor, Returns};
pub(crate) use value::{Format, Text, Time};

/// A handler and what to do about it, without contradictions.
pub(crate) struct Checked {
    pub(crate) handler: CheckedHandler,
    pub(crate) policy: Policy,
    pub(crate) engine: Engine,
    pub(crate) state: Option<Type>,
    pub(crate) krate: Option<Path>,
    /// This is the second time, after the attribute macros below ours.
    pub(crate) others_have_run: bool,
}

/// What the runtime's `Policy` is told; `None` where nothing was said.
pub(crate) struct Policy {
    /// Never empty.
    pub(crate) anchor: Vec<Part>,
    pub(crate) scope: Option<Scope>,
    pub(crate) ttl: Option<Ttl>,
    pub(crate) lease: Option<Time>,
    pub(crate) space: Option<Text>,
    pub(crate) format: Option<Format>,
    pub(crate) optional: bool,
    pub(crate) fingerprint: Option<Fingerprint>,
    pub(crate) refusals: Option<ExprPath>,
    pub(crate) record: Option<Variant>,
    pub(crate) in_flight: Option<Variant>,
    pub(crate) on_unknown: Option<Variant>,
    pub(crate) mode: Option<Variant>,
    pub(crate) store_outage: Option<Variant>,
}

/// The name of a unit variant of the option's enum in the runtime.
pub(crate) type Variant = &'static str;

/// One of the values that make a key or a scope.
pub(crate) enum Part {
    Header(LitStr),
    BodyField(LitStr),
    Path(LitStr),
    Query(LitStr),
    Argument(Expr),
    Constant(ExprPath),
}

pub(crate) enum Scope {
    Global,
    /// Never empty.
    Parts(Vec<Part>),
}

pub(crate) enum Ttl {
    Forever,
    For(Time),
}

pub(crate) struct Fingerprint {
    pub(crate) scheme: Scheme,
    /// In lower case, as requests have them.
    pub(crate) headers: Vec<LitStr>,
}

pub(crate) enum Scheme {
    Request,
    Json,
    None,
    Fields(Vec<LitStr>),
    Exclude(Vec<LitStr>),
    Constant(ExprPath),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Engine {
    State,
    Extension,
}

/// Nothing comes back that has a mistake in what the expansion needs; mistakes
/// that leave it well-formed are only on the list.
pub(crate) fn check(
    mut args: Args,
    handler: Option<Handler>,
    errors: &mut Errors,
) -> Option<Checked> {
    let handler = handler.map(|handler| signature::check(handler, errors));
    let others_have_run = args.others_have_run;
    let state = args.state.take();
    let krate = args.krate.take().map(|said| said.value);
    let engine = engine(args.engine.take(), state.as_ref(), errors);

    let mut fields = Vec::new();
    let policy = policy(args, &mut fields, errors);
    if let Some(handler) = &handler {
        for word in fields {
            handler.has_fields(word, errors);
        }
    }
    Some(Checked {
        handler: handler?,
        policy: policy?,
        engine,
        state: state.map(|said| said.value),
        krate,
        others_have_run,
    })
}

fn engine(said: Option<Said<Term>>, state: Option<&Said<Type>>, errors: &mut Errors) -> Engine {
    let words = [("state", Engine::State), ("extension", Engine::Extension)];
    let engine = read(said, errors, |key, term| value::word(key, term, &words));
    if let (Some(Engine::Extension), Some(state)) = (engine, state) {
        errors.at(
            &state.key,
            "`state` proves that the router's state has an engine, and `engine = extension` takes it from elsewhere: leave out one of them",
        );
    }
    engine.unwrap_or(Engine::State)
}

/// Also lists the words by which fields of the body are named.
fn policy(args: Args, fields: &mut Vec<Ident>, errors: &mut Errors) -> Option<Policy> {
    if !args.anchor_mentioned {
        errors.push(Error::new(
            Span::call_site(),
            "missing `anchor = ...`: say what identifies the operation, as in `anchor = header(\"Idempotency-Key\")`",
        ));
    }
    let mut parts = Parts { fields, errors };
    let anchor = args.anchor.map(|said| parts.anchor(&said.value));
    let scope = args.scope.map(|said| parts.scope(&said.value));
    let fingerprint = args.fingerprint.and_then(|said| parts.fingerprint(&said.value));
    if let Some(anchor) = &anchor {
        contradictions(anchor, args.format.as_ref(), args.optional.as_ref(), errors);
    }

    let lease = read(args.lease, errors, |key, term| {
        value::time(key, term, "30s", "a lease that ends at once lets every retry run")
    });
    let ttl = read(args.ttl, errors, ttl);
    let space = read(args.space, errors, value::space);
    let format = read(args.format, errors, |_, term| value::format(term));
    let refusals = read(args.refusals, errors, value::any_path);
    let record = read(args.record, errors, |key, term| {
        value::word(key, term, &[("success", "Success"), ("final", "Final"), ("all", "All")])
    });
    let in_flight = read(args.in_flight, errors, |key, term| {
        supported(term, &["wait"], "write `reject`, and a duplicate is told when to try again")?;
        value::word(key, term, &[("reject", "Reject")])
    });
    let on_unknown = read(args.on_unknown, errors, |key, term| {
        supported(
            term,
            &["refuse", "recover"],
            "write `rerun`, and derive downstream keys from `Operation`",
        )?;
        value::word(key, term, &[("rerun", "Rerun")])
    });
    let mode = read(args.mode, errors, |key, term| {
        value::word(key, term, &[("enforce", "Enforce"), ("observe", "Observe"), ("off", "Off")])
    });
    let store_outage = read(args.store_outage, errors, |key, term| {
        value::word(key, term, &[("closed", "Closed"), ("open", "Open")])
    });

    Some(Policy {
        anchor: anchor.filter(|parts| !parts.is_empty())?,
        scope,
        ttl,
        lease,
        space,
        format,
        optional: args.optional.is_some(),
        fingerprint,
        refusals,
        record,
        in_flight,
        on_unknown,
        mode,
        store_outage,
    })
}

/// What an option means, if it was said and makes sense.
fn read<T>(
    said: Option<Said<Term>>,
    errors: &mut Errors,
    meaning: impl FnOnce(&Ident, &Term) -> Result<T>,
) -> Option<T> {
    let Said { key, value } = said?;
    errors.keep(meaning(&key, &value))
}

fn ttl(key: &Ident, term: &Term) -> Result<Ttl> {
    match term {
        Term::Word(word) if word == "forever" => Ok(Ttl::Forever),
        Term::Literal(Lit::Str(text)) if text.value() == "forever" => {
            value::error(text, "write `forever` without quotes")
        }
        _ => value::time(key, term, "24h", "a record that expires at once protects nothing")
            .map(Ttl::For),
    }
}

fn supported(term: &Term, not_yet: &[&str], instead: &str) -> Result<()> {
    match term {
        Term::Word(word) | Term::Call(Call { word, .. })
            if not_yet.iter().any(|other| word == other) =>
        {
            Err(args::not_yet(word, instead))
        }
        _ => Ok(()),
    }
}

fn contradictions(
    anchor: &[Part],
    format: Option<&Said<Term>>,
    optional: Option<&Said<()>>,
    errors: &mut Errors,
) {
    if let Some(format) = format.filter(|_| anchor.len() > 1) {
        errors.at(
            &format.key,
            "`format` describes one value, and this anchor has several: declare the parts that have a format as constants, as in `const NONCE: Anchor = Anchor::body_field(\"nonce\").format(Format::Uuid)`, and name them in the tuple",
        );
    }
    let always_there = |part: &Part| matches!(part, Part::Argument(_));
    if let Some(optional) =
        optional.filter(|_| !anchor.is_empty() && anchor.iter().all(always_there))
    {
        errors.at(
            &optional.key,
            "`optional` is for keys that a request may lack, and the arguments of `arg(..)` are always there: leave it out",
        );
    }
}
