//! Values that are judged by themselves: names, field paths, durations, words.

use syn::{Error, ExprPath, Ident, Lit, LitInt, LitStr, RangeLimits, Result};

use crate::args::{Call, Term, closest, did_you_mean, listed};

/// A length of time, exact to the millisecond or left to a constant.
pub(crate) enum Time {
    Millis(u64),
    Constant(ExprPath),
}

/// Text, or a constant that holds it.
pub(crate) enum Text {
    Literal(LitStr),
    Constant(ExprPath),
}

/// What becomes of a duplicate while the original runs.
pub(crate) enum InFlight {
    Reject,
    Wait(Time),
}

/// What becomes of an operation whose outcome nobody knows.
pub(crate) enum OnUnknown {
    Rerun,
    Refuse,
    Recover(ExprPath),
}

pub(crate) enum Format {
    Uuid,
    /// So many bytes.
    Hex(u16),
    Text {
        min: u16,
        max: u16,
    },
    Constant(ExprPath),
}

/// Longer is for ever, and adding it to a date may overflow somewhere.
const CENTURY: u64 = 100 * 366 * 24 * 60 * 60 * 1000;

pub(crate) fn error<T>(at: impl quote::ToTokens, message: impl std::fmt::Display) -> Result<T> {
    Err(Error::new_spanned(at, message))
}

/// The constant that a term names, if it can be one: a path, or a word that is
/// not all in lower case.
pub(crate) fn constant(term: &Term) -> Option<ExprPath> {
    match term {
        Term::Path(path) => Some(path.clone()),
        Term::Word(word) if word.to_string().contains(char::is_uppercase) => Some(path_of(word)),
        _ => None,
    }
}

/// Any path, in whatever case: for options that take nothing else.
pub(crate) fn any_path(key: &Ident, term: &Term) -> Result<ExprPath> {
    path(term).map_or_else(|| error(term, format!("`{key}` takes the path of a value")), Ok)
}

/// The path of a function. Whether it is one is for rustc to say, at the path.
pub(crate) fn function(key: &Ident, term: &Term, signature: &str) -> Result<ExprPath> {
    let otherwise = || match term {
        Term::Closure(_) => error(
            term,
            format!("`{key}` takes no closure: declare it as `{signature}`, and write its path"),
        ),
        _ => error(term, format!("`{key}` takes the path of a function: `{signature}`")),
    };
    path(term).map_or_else(otherwise, Ok)
}

fn path(term: &Term) -> Option<ExprPath> {
    match term {
        Term::Path(path) => Some(path.clone()),
        Term::Word(word) => Some(path_of(word)),
        _ => None,
    }
}

fn path_of(word: &Ident) -> ExprPath {
    ExprPath { attrs: Vec::new(), qself: None, path: word.clone().into() }
}

/// One of the option's words.
pub(crate) fn word<T: Copy>(key: &Ident, term: &Term, words: &[(&str, T)]) -> Result<T> {
    let names: Vec<&str> = words.iter().map(|(name, _)| *name).collect();
    let found = match term {
        Term::Word(word) => words.iter().find(|(name, _)| word == name),
        _ => None,
    };
    match found {
        Some((_, value)) => Ok(*value),
        None => Err(not_one_of(key, term, &names, &listed(&names, "or"))),
    }
}

fn not_one_of(key: &Ident, term: &Term, names: &[&str], expected: &str) -> Error {
    match term {
        Term::Word(word) | Term::Call(Call { word, .. }) | Term::Named(word, _)
            if !names.iter().any(|name| word == name) =>
        {
            let hint = did_you_mean(&word.to_string(), names);
            let message = format!("`{key} = {word}` is not known: expected {expected}{hint}");
            Error::new_spanned(word, message)
        }
        Term::Literal(Lit::Str(text)) if names.contains(&&*text.value()) => {
            Error::new_spanned(text, format!("write `{}` without quotes", text.value()))
        }
        _ => Error::new_spanned(term, format!("`{key}` takes one word: {expected}")),
    }
}

pub(crate) fn in_flight(key: &Ident, term: &Term) -> Result<InFlight> {
    const EXPECTED: &str = "`reject` or `wait(\"5s\")`";
    match term {
        Term::Word(word) if word == "reject" => Ok(InFlight::Reject),
        Term::Word(word) if word == "wait" => {
            error(word, "`wait` needs parentheses that say how long, as in `wait(\"5s\")`")
        }
        Term::Call(call) if call.word == "wait" => wait(call).map(InFlight::Wait),
        Term::Named(word, _) if word == "wait" => {
            error(term, "the bound stands in parentheses, as in `wait(\"5s\")`")
        }
        _ => Err(not_one_of(key, term, &["reject", "wait"], EXPECTED)),
    }
}

fn wait(call: &Call) -> Result<Time> {
    const ZERO: &str = "write `in_flight = reject`, and a duplicate is told when to try again";
    match &call.inside[..] {
        [term] if constant(term).is_some() || matches!(term, Term::Literal(Lit::Str(_))) => {
            time(&call.word, term, "5s", ZERO)
        }
        _ => error(call, "`wait(..)` takes one duration, as in `wait(\"5s\")`"),
    }
}

pub(crate) fn on_unknown(key: &Ident, term: &Term) -> Result<OnUnknown> {
    const EXPECTED: &str = "`rerun`, `refuse` or `recover = path`";
    const SIGNATURE: &str = "async fn(RequestContext) -> Recovered";
    match term {
        Term::Word(word) if word == "rerun" => Ok(OnUnknown::Rerun),
        Term::Word(word) if word == "refuse" => Ok(OnUnknown::Refuse),
        Term::Named(word, path) if word == "recover" => {
            function(word, path, SIGNATURE).map(OnUnknown::Recover)
        }
        Term::Word(word) if word == "recover" => error(
            word,
            format!(
                "`recover` needs a function that finds out: write `on_unknown = recover = path`, the path of an `{SIGNATURE}`"
            ),
        ),
        Term::Call(call) if call.word == "recover" => {
            error(call, "write `on_unknown = recover = path`, without parentheses")
        }
        _ => Err(not_one_of(key, term, &["rerun", "refuse", "recover"], EXPECTED)),
    }
}

/// The one string between the parentheses.
pub(crate) fn one_string<'a>(call: &'a Call, example: &str) -> Result<&'a LitStr> {
    match &call.inside[..] {
        [Term::Literal(Lit::Str(text))] => Ok(text),
        _ => {
            let word = &call.word;
            error(
                call,
                format!("`{word}(..)` takes one string literal, as in `{word}({example:?})`"),
            )
        }
    }
}

pub(crate) fn strings(call: &Call) -> Result<Vec<LitStr>> {
    let word = &call.word;
    if call.inside.is_empty() {
        return error(call, format!("`{word}(..)` names no field"));
    }
    call.inside
        .iter()
        .map(|term| match term {
            Term::Literal(Lit::Str(text)) => Ok(text.clone()),
            _ => error(
                term,
                format!("`{word}(..)` takes string literals, as in `{word}(\"a\", \"b\")`"),
            ),
        })
        .collect()
}

/// A header name, by RFC 9110.
pub(crate) fn header_name(text: &LitStr) -> Result<()> {
    let name = text.value();
    let allowed = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    let Some(wrong) = name.chars().find(|c| !allowed(*c)) else {
        return if name.is_empty() { error(text, "a header name cannot be empty") } else { Ok(()) };
    };
    let better: String = name
        .trim()
        .trim_end_matches(':')
        .chars()
        .map(|c| if allowed(c) { c } else { '-' })
        .collect();
    let hint = if better.contains(char::is_alphanumeric) {
        format!("; did you mean `{better}`?")
    } else {
        String::new()
    };
    error(text, format!("`{name}` is not a valid header name: {wrong:?} is not allowed{hint}"))
}

/// `a.b` or, where a name has a dot or is empty, the JSON Pointer `/a.b`.
pub(crate) fn field_path(text: &LitStr) -> Result<()> {
    let path = text.value();
    if path.is_empty() {
        return error(text, "an empty path names no field: write one, as in `message.nonce`");
    }
    if let Some(pointer) = path.strip_prefix('/') {
        let mut escapes = pointer.split('~').skip(1);
        return match escapes.find(|rest| !rest.starts_with(['0', '1'])) {
            None => Ok(()),
            Some(_) => error(
                text,
                format!(
                    "`{path}` is not a JSON Pointer: after `~` stands `0` (for `~`) or `1` (for `/`)"
                ),
            ),
        };
    }
    if path.split('.').any(str::is_empty) {
        let message = format!(
            "`{path}` has an empty name between dots; a name that itself has a dot is written as a JSON Pointer, as in `/a.b`"
        );
        return error(text, message);
    }
    Ok(())
}

/// The name of a route's parameter, without the route's punctuation.
pub(crate) fn parameter_name(text: &LitStr) -> Result<()> {
    let name = text.value();
    if name.is_empty() {
        return error(text, "a path parameter has a name");
    }
    if name.contains(['{', '}', '/', ':', '*']) {
        let last = name.rsplit('/').next().unwrap_or_default();
        let better = last.trim_matches(['{', '}', ':', '*']);
        let message =
            format!("`{name}` is not the name of a path parameter; did you mean `{better}`?");
        return error(text, message);
    }
    Ok(())
}

pub(crate) fn query_name(text: &LitStr) -> Result<()> {
    if text.value().is_empty() {
        return error(text, "a query parameter has a name");
    }
    Ok(())
}

pub(crate) fn space(key: &Ident, term: &Term) -> Result<Text> {
    if let Some(path) = constant(term) {
        return Ok(Text::Constant(path));
    }
    match term {
        Term::Literal(Lit::Str(text)) if text.value().is_empty() => {
            error(text, "a space needs a name: handlers that say the same name share their keys")
        }
        Term::Literal(Lit::Str(text)) => Ok(Text::Literal(text.clone())),
        Term::Word(word) => error(word, format!("write the name in quotes: `{key} = \"{word}\"`")),
        _ => error(term, format!("`{key}` takes a string literal, as in `{key} = \"payments\"`")),
    }
}

pub(crate) fn format(term: &Term) -> Result<Format> {
    const EXPECTED: &str = "expected `uuid`, `hex(32)`, `text(1..=64)` or the path of a constant";
    const NAMES: [&str; 3] = ["uuid", "hex", "text"];
    if let Some(path) = constant(term) {
        return Ok(Format::Constant(path));
    }
    let (name, call) = match term {
        Term::Word(word) => (word, None),
        Term::Call(call) => (&call.word, Some(call)),
        _ => return error(term, EXPECTED),
    };
    match (&*name.to_string(), call) {
        ("uuid", None) => Ok(Format::Uuid),
        ("hex", Some(call)) => hex(call),
        ("text", Some(call)) => text(call),
        ("uuid", Some(_)) => error(term, "`uuid` takes no parentheses"),
        ("hex", None) => error(term, HEX),
        ("text", None) => error(term, "`text` takes the allowed lengths, as in `text(1..=64)`"),
        (wrong, _) => {
            let hint = did_you_mean(wrong, &NAMES);
            error(term, format!("unknown format `{wrong}`: {EXPECTED}{hint}"))
        }
    }
}

const HEX: &str =
    "`hex` takes the number of bytes, each of them two digits: `hex(32)` is 64 digits";

fn hex(call: &Call) -> Result<Format> {
    let [Term::Literal(Lit::Int(bytes))] = &call.inside[..] else {
        return error(call, HEX);
    };
    match length(bytes)? {
        0 => error(bytes, "a key of no bytes is no key: `hex(..)` takes at least 1"),
        bytes => Ok(Format::Hex(bytes)),
    }
}

fn text(call: &Call) -> Result<Format> {
    let [Term::Range(range)] = &call.inside[..] else {
        return error(call, "`text(..)` takes the allowed lengths, as in `text(1..=64)`");
    };
    let (start, end) = (&range.start, &range.end);
    if let RangeLimits::HalfOpen(dots) = &range.limits {
        return error(dots, format!("both ends are included: write `{start}..={end}`"));
    }
    let (min, max) = (length(start)?, length(end)?);
    if min == 0 {
        return error(start, "an empty key is never allowed: the shortest length is at least 1");
    }
    if min > max {
        return error(end, format!("no key is at least {min} and at most {max} characters long"));
    }
    Ok(Format::Text { min, max })
}

fn length(literal: &LitInt) -> Result<u16> {
    literal
        .base10_parse()
        .or_else(|_| error(literal, format!("a length is a number from 1 to {}", u16::MAX)))
}

/// A positive duration. `zero` says why none at all makes no sense here.
pub(crate) fn time(key: &Ident, term: &Term, example: &str, zero: &str) -> Result<Time> {
    if let Some(path) = constant(term) {
        return Ok(Time::Constant(path));
    }
    let Term::Literal(Lit::Str(literal)) = term else {
        return error(
            term,
            format!("`{key}` takes a string literal, as in `{key} = \"{example}\"`"),
        );
    };
    match millis(&literal.value(), example) {
        Err(message) => error(literal, message),
        Ok(0) => error(literal, format!("`{key}` must be greater than zero: {zero}")),
        Ok(millis) if millis > CENTURY => {
            error(literal, format!("`{key}` is longer than a hundred years"))
        }
        Ok(millis) => Ok(Time::Millis(millis)),
    }
}

const UNITS: &str = "expected `ms`, `s`, `m`, `h` or `d`";

/// Reads what `humantime` reads, but for units of no fixed length and for what
/// is finer than a store can tell.
fn millis(text: &str, example: &str) -> std::result::Result<u64, String> {
    use humantime::DurationError;

    if let Some(unit) = text.split(|c: char| !c.is_alphabetic()).find(|unit| calendar(unit)) {
        return Err(format!(
            "a {} has no fixed length: write `{text}` in days, as in `\"30d\"`",
            if unit.starts_with(['m', 'M']) { "month" } else { "year" },
        ));
    }
    let duration = humantime::parse_duration(text).map_err(|error| match error {
        DurationError::Empty => format!("an empty duration: write one as in `\"{example}\"`"),
        DurationError::UnknownUnit { unit, value, .. } if unit.is_empty() => format!(
            "duration `{text}` has no unit: write `\"{value}s\"`, `\"{value}m\"`, `\"{value}h\"` or `\"{value}d\"`"
        ),
        DurationError::UnknownUnit { unit, value, .. } => {
            let hint = unit_like(&unit)
                .map_or_else(String::new, |unit| format!("; did you mean `\"{value}{unit}\"`?"));
            format!("unknown duration unit `{unit}` in `{text}`: {UNITS}{hint}")
        }
        DurationError::NumberOverflow => format!("`{text}` is too long, or too precise, for a duration"),
        _ => format!("`{text}` is not a duration: write a number and a unit, as in `\"{example}\"`"),
    })?;
    if duration.subsec_nanos() % 1_000_000 != 0 {
        return Err(format!("`{text}` is finer than a millisecond: {UNITS}"));
    }
    u64::try_from(duration.as_millis()).map_err(|_| format!("`{text}` is too long for a duration"))
}

/// `M` is humantime's month, one slip of the shift key from a minute.
fn calendar(unit: &str) -> bool {
    ["M", "month", "months", "y", "yr", "yrs", "year", "years"].contains(&unit)
}

fn unit_like(unit: &str) -> Option<&'static str> {
    const WORDS: [&str; 5] = ["millis", "seconds", "minutes", "hours", "days"];
    match closest(unit, &WORDS) {
        Some("millis") => Some("ms"),
        Some("seconds") => Some("s"),
        Some("minutes") => Some("m"),
        Some("hours") => Some("h"),
        Some("days") => Some("d"),
        _ => ["s", "m", "h", "d"].into_iter().find(|short| unit.to_lowercase().starts_with(short)),
    }
}
