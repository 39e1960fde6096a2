//! From what was said to what is meant.
//!
//! Every rule is here or below, and only here can a [`Checked`] be made, so
//! expansion has nothing left to refuse. Rules that do not depend on each
//! other are all tried: one compilation reports every mistake.

mod function;
mod json;
mod parts;
mod replay;
mod signature;
mod value;

use proc_macro2::{Ident, Span};
use syn::{Error, Expr, ExprPath, Lit, LitStr, Path, Result, Type};

use crate::args::{Args, Said, Term};
use crate::errors::Errors;
use crate::handler::Handler;

use parts::{Asked, Parts};

pub(crate) use function::{Engine as FunctionEngine, Function, reference as function_reference};
pub(crate) use replay::Replay;
pub(crate) use signature::{Argument, Checked as CheckedHandler, Returns};
pub(crate) use value::{Format, InFlight, OnUnknown, Text, Time};

/// A handler or a plain function, and what to do about it, without contradictions.
pub(crate) struct Checked {
    pub(crate) handler: CheckedHandler,
    pub(crate) policy: Policy,
    pub(crate) caller: Caller,
    pub(crate) krate: Option<Path>,
    /// This is the second time, after the attribute macros below ours.
    pub(crate) others_have_run: bool,
}

/// Who calls it, and what is said of that.
pub(crate) enum Caller {
    Axum { engine: Engine, state: Option<Type> },
    Code(Function),
}

/// What the runtime's `Policy` is told; `None` where nothing was said.
pub(crate) struct Policy {
    /// Never empty.
    pub(crate) anchor: Vec<Part>,
    pub(crate) ttl: Option<Ttl>,
    pub(crate) scope: Option<Scope>,
    pub(crate) space: Option<Text>,
    pub(crate) format: Option<Format>,
    pub(crate) optional: bool,
    pub(crate) fingerprint: Option<Fingerprint>,
    pub(crate) record: Option<Variant>,
    pub(crate) in_flight: Option<InFlight>,
    pub(crate) on_unknown: Option<OnUnknown>,
    /// A function, as are those of `on_unknown` and `replay`.
    pub(crate) admit: Option<ExprPath>,
    pub(crate) lease: Option<Time>,
    pub(crate) replay: Option<Replay>,
    pub(crate) issued: bool,
    /// The word that says it.
    pub(crate) transaction: Option<Ident>,
    pub(crate) refusals: Option<ExprPath>,
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
    let others_have_run = args.others_have_run;
    let krate = args.krate.take().map(|said| said.value);
    let handler = match handler {
        Some(handler) if function::is_one(&args, &handler) => {
            let checked = function::check(&mut args, handler, errors);
            let policy = policy(args, Asked::Arguments, &mut Vec::new(), errors);
            let (handler, function) = checked?;
            let caller = Caller::Code(function);
            return Some(Checked { handler, policy: policy?, caller, krate, others_have_run });
        }
        handler => handler.map(|handler| signature::check(handler, errors)),
    };
    refuse_what_is_said_of_functions(&args, errors);
    let state = args.state.take();
    let engine = engine(args.engine.take(), state.as_ref(), errors);

    let mut fields = Vec::new();
    let policy = policy(args, Asked::Request, &mut fields, errors);
    if let Some(handler) = &handler {
        for word in fields {
            handler.has_fields(word, errors);
        }
    }
    let caller = Caller::Axum { engine, state: state.map(|said| said.value) };
    Some(Checked { handler: handler?, policy: policy?, caller, krate, others_have_run })
}

fn refuse_what_is_said_of_functions(args: &Args, errors: &mut Errors) {
    if let Some(operation) = &args.operation {
        errors.at(
            &operation.key,
            "`operation` is for plain functions: a handler takes an argument of type `Operation`",
        );
    }
    if let Some(nothing_happened) = &args.nothing_happened {
        errors.at(
            &nothing_happened.key,
            "`nothing_happened` is for plain functions: a handler says it by a 4xx, or by `Settle::forgotten()`",
        );
    }
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
fn policy(
    args: Args,
    asked: Asked,
    fields: &mut Vec<Ident>,
    errors: &mut Errors,
) -> Option<Policy> {
    if !args.mentions("anchor") {
        let example = match asked {
            Asked::Request => "anchor = header(\"Idempotency-Key\")",
            Asked::Arguments => "anchor = arg(event_id)",
        };
        let message =
            format!("missing `anchor = ...`: say what identifies the operation, as in `{example}`");
        errors.push(Error::new(Span::call_site(), message));
    }
    let mut parts = Parts { asked, fields, errors };
    let anchor = args.anchor.as_ref().map(|said| parts.anchor(&said.value)).unwrap_or_default();
    let scope = args.scope.as_ref().map(|said| parts.scope(&said.value));
    let fingerprint = args.fingerprint.as_ref().and_then(|said| parts.fingerprint(&said.value));
    contradictions(&anchor, &args, asked, errors);
    if args.transaction.is_some() {
        what_transactions_do_not_have(&args, errors);
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
    let in_flight = read(args.in_flight, errors, value::in_flight);
    let on_unknown = read(args.on_unknown, errors, |key, term| {
        match value::on_unknown(key, term)? {
            OnUnknown::Recover(_) if asked == Asked::Arguments => value::error(
                term,
                "`recover` asks about a request: from the second attempt on (`operation.attempt()`), ask in the function's body",
            ),
            on_unknown => Ok(on_unknown),
        }
    });
    let admit = read(args.admit, errors, |key, term| {
        value::function(key, term, "async fn(RequestContext) -> Result<(), impl IntoResponse>")
    });
    let replay = args.replay.and_then(|said| replay::replay(&said, errors));
    let mode = read(args.mode, errors, |key, term| {
        value::word(key, term, &[("enforce", "Enforce"), ("observe", "Observe"), ("off", "Off")])
    });
    let store_outage = read(args.store_outage, errors, |key, term| {
        value::word(key, term, &[("closed", "Closed"), ("open", "Open")])
    });

    if anchor.is_empty() {
        return None;
    }
    Some(Policy {
        anchor,
        ttl,
        scope,
        space,
        format,
        optional: args.optional.is_some(),
        fingerprint,
        record,
        in_flight,
        on_unknown,
        admit,
        lease,
        replay,
        issued: args.issued.is_some(),
        transaction: args.transaction.map(|said| said.key),
        refusals,
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

/// What options say of each other. The anchor is empty if it could not be read.
fn contradictions(anchor: &[Part], args: &Args, asked: Asked, errors: &mut Errors) {
    if let Some(format) = args.format.as_ref().filter(|_| anchor.len() > 1) {
        let message = match asked {
            Asked::Request => {
                "`format` describes one value, and this anchor has several: declare the parts that have a format as constants, as in `const NONCE: Anchor = Anchor::body_field(\"nonce\").format(Format::Uuid)`, and name them in the tuple"
            }
            Asked::Arguments => {
                "`format` describes one value, and this anchor has several: take types that have one form only, such as `Uuid`, or check the others in the function's body"
            }
        };
        errors.at(&format.key, message);
    }
    let always_there = |part: &Part| matches!(part, Part::Argument(_));
    if let Some(optional) =
        args.optional.as_ref().filter(|_| !anchor.is_empty() && anchor.iter().all(always_there))
    {
        errors.at(
            &optional.key,
            "`optional` is for keys that a request may lack, and the arguments of `arg(..)` are always there: leave it out",
        );
    }
    if let Some(issued) = &args.issued {
        issued_keys(&issued.key, anchor, args, errors);
    }
}

/// The record of a transactional handler appears with its effects or not at all.
fn what_transactions_do_not_have(args: &Args, errors: &mut Errors) {
    if let Some(on_unknown) = &args.on_unknown {
        errors.at(
            &on_unknown.key,
            "a transactional handler leaves no unknown outcome: what was not committed did not happen. Leave out `on_unknown`, or `transaction`",
        );
    }
    if let Some(lease) = &args.lease {
        errors.at(
            &lease.key,
            "a transactional handler has no lease: the end of its connection ends its claim. Leave out `lease`, or `transaction`",
        );
    }
    if let Some(Said { key, value: Term::Word(word) }) = &args.store_outage
        && word == "open"
    {
        errors.at(
            key,
            "a transactional handler can do nothing while its database is away: leave out `store_outage = open`, or `transaction`",
        );
    }
    if let Some(Said { key, value: Term::Word(word) }) = &args.mode
        && word == "off"
    {
        errors.at(
            key,
            "a handler that is never claimed for has no record to commit with: leave out `mode = off`, or `transaction`",
        );
    }
}

/// A key that the server handed out has its validity, and its space, from
/// there.
fn issued_keys(issued: &Ident, anchor: &[Part], args: &Args, errors: &mut Errors) {
    if let Some(optional) = &args.optional {
        errors.at(
            &optional.key,
            "a handler that takes only issued keys cannot run without one: leave out `optional`, or `issued`",
        );
    }
    if let Some(ttl) = &args.ttl {
        errors.at(
            &ttl.key,
            "an issued key is valid from when it was issued: say `ttl` there, on the constant that is the anchor of both handlers, as in `const NONCE: Anchor = Anchor::header(\"X-Nonce\").ttl(TEN_MINUTES)`",
        );
    }
    // A constant may name the space itself, but not one of several, of which only the format is
    // heard; and an anchor that could not be read may have been one.
    let may_have_one = matches!(anchor, [] | [Part::Constant(_)]);
    if !may_have_one && !args.mentions("space") {
        errors.at(
            issued,
            "keys are issued by another handler: both name one space, as in `space = \"enrolment\"`",
        );
    }
}
