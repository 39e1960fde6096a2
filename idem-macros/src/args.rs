//! The options of `#[idempotent(…)]` as they were written.
//!
//! Only the grammar is judged here: options are separated by commas, known,
//! and given once. What their values mean is for [`check`](crate::check) to
//! say. After a mistake, reading resumes at the next comma.

use proc_macro2::{Group, Ident, TokenStream, TokenTree};
use quote::ToTokens;
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream, Parser};
use syn::punctuated::Punctuated;
use syn::{
    Error, Expr, ExprClosure, ExprPath, Lit, LitInt, Path, RangeLimits, Result, Token, Type, token,
};

use crate::errors::Errors;

/// What the user said, each word with its place.
#[derive(Default)]
pub(crate) struct Args {
    pub(crate) anchor: Option<Said<Term>>,
    pub(crate) ttl: Option<Said<Term>>,
    pub(crate) scope: Option<Said<Term>>,
    pub(crate) space: Option<Said<Term>>,
    pub(crate) format: Option<Said<Term>>,
    pub(crate) optional: Option<Said<()>>,
    pub(crate) fingerprint: Option<Said<Term>>,
    pub(crate) record: Option<Said<Term>>,
    pub(crate) in_flight: Option<Said<Term>>,
    pub(crate) on_unknown: Option<Said<Term>>,
    pub(crate) admit: Option<Said<Term>>,
    pub(crate) lease: Option<Said<Term>>,
    pub(crate) replay: Option<Said<Replay>>,
    pub(crate) issued: Option<Said<()>>,
    pub(crate) transaction: Option<Said<()>>,
    pub(crate) refusals: Option<Said<Term>>,
    pub(crate) mode: Option<Said<Term>>,
    pub(crate) store_outage: Option<Said<Term>>,
    pub(crate) engine: Option<Said<Term>>,
    pub(crate) state: Option<Said<Type>>,
    pub(crate) operation: Option<Said<Term>>,
    pub(crate) nothing_happened: Option<Said<Term>>,
    pub(crate) krate: Option<Said<Path>>,
    /// The options that were said, though perhaps not readably: they are not missing.
    mentioned: Vec<Ident>,
    /// The options follow an `@`, which only expansion writes.
    pub(crate) others_have_run: bool,
}

/// A value together with the word that introduced it.
pub(crate) struct Said<T> {
    pub(crate) key: Ident,
    pub(crate) value: T,
}

/// The shapes that a value can have.
pub(crate) enum Term {
    /// `"24h"`
    Literal(Lit),
    /// `1..=64`
    Range(Range),
    /// `global`, `TEN_MINUTES`
    Word(Ident),
    /// `keys::FLOW_ID`
    Path(ExprPath),
    /// `header("Idempotency-Key")`
    Call(Call),
    /// `arg(body.nonce, id)`
    Arguments(Ident, Vec<Expr>),
    /// `(header("a"), query("b"))`
    Tuple(token::Paren, Vec<Term>),
    /// `recover = bank::ask`, where a value is a pair itself
    Named(Ident, Box<Term>),
    /// `{ replayed: true }`, not read yet
    Braces(Group),
    /// `|request| …`, which no option takes
    Closure(TokenStream),
}

/// What can stand behind `replay`.
pub(crate) enum Replay {
    /// `replay(status = 200)`
    Members(Vec<Term>),
    /// `replay = shorter`
    Function(Term),
}

pub(crate) struct Range {
    pub(crate) start: LitInt,
    pub(crate) limits: RangeLimits,
    pub(crate) end: LitInt,
}

pub(crate) struct Call {
    pub(crate) word: Ident,
    pub(crate) paren: token::Paren,
    pub(crate) inside: Vec<Term>,
}

/// Every option with an example, in the order of the documentation.
pub(crate) const OPTIONS: [(&str, &str); 23] = [
    ("anchor", r#"anchor = header("Idempotency-Key")"#),
    ("ttl", r#"ttl = "24h""#),
    ("scope", r#"scope = header("X-Tenant")"#),
    ("space", r#"space = "payments""#),
    ("format", "format = uuid"),
    ("optional", "optional"),
    ("fingerprint", "fingerprint = json"),
    ("record", "record = success"),
    ("in_flight", "in_flight = reject"),
    ("on_unknown", "on_unknown = rerun"),
    ("admit", "admit = within_quota"),
    ("lease", r#"lease = "30s""#),
    ("replay", "replay(status = 200)"),
    ("issued", "issued"),
    ("transaction", "transaction"),
    ("refusals", "refusals = PROBLEMS"),
    ("mode", "mode = observe"),
    ("store_outage", "store_outage = closed"),
    ("engine", "engine = extension"),
    ("state", "state = AppState"),
    ("operation", "operation = op"),
    ("nothing_happened", "nothing_happened = MyError::is_refusal"),
    ("crate", "crate = my_framework::idem"),
];

pub(crate) fn parse(tokens: TokenStream, errors: &mut Errors) -> Args {
    let mut args = Args::default();
    let read = |input: ParseStream<'_>| -> Result<()> {
        args.others_have_run = input.parse::<Option<Token![@]>>()?.is_some();
        while !input.is_empty() {
            if let Err(error) = args.option(input) {
                errors.push(error);
                skip_to_comma(input)?;
            }
            separator(input, errors)?;
        }
        Ok(())
    };
    if let Err(error) = read.parse2(tokens) {
        errors.push(error);
    }
    args
}

impl Args {
    fn option(&mut self, input: ParseStream<'_>) -> Result<()> {
        if !input.peek(Ident::peek_any) {
            return Err(input.error("expected the name of an option"));
        }
        let key = input.call(Ident::parse_any)?;
        self.mentioned.push(key.clone());
        let slot = match &*key.to_string() {
            "anchor" => &mut self.anchor,
            "ttl" => &mut self.ttl,
            "scope" => &mut self.scope,
            "space" => &mut self.space,
            "format" => &mut self.format,
            "optional" => return flag(&mut self.optional, key, input),
            "fingerprint" => &mut self.fingerprint,
            "record" => &mut self.record,
            "in_flight" => &mut self.in_flight,
            "on_unknown" => &mut self.on_unknown,
            "admit" => &mut self.admit,
            "lease" => &mut self.lease,
            "replay" => return replay(&mut self.replay, key, input),
            "issued" => return flag(&mut self.issued, key, input),
            "transaction" => return flag(&mut self.transaction, key, input),
            "refusals" => &mut self.refusals,
            "mode" => &mut self.mode,
            "store_outage" => &mut self.store_outage,
            "engine" => &mut self.engine,
            "state" => return fill(&mut self.state, key, input, Type::parse),
            "operation" => &mut self.operation,
            "nothing_happened" => &mut self.nothing_happened,
            "crate" => return fill(&mut self.krate, key, input, Path::parse_mod_style),
            _ => return Err(unknown(&key)),
        };
        fill(slot, key, input, Term::parse)
    }

    pub(crate) fn mentions(&self, option: &str) -> bool {
        self.mentioned.iter().any(|word| word == option)
    }
}

/// Reads `= value` into a slot that must still be empty.
fn fill<T>(
    slot: &mut Option<Said<T>>,
    key: Ident,
    input: ParseStream<'_>,
    value: impl FnOnce(ParseStream<'_>) -> Result<T>,
) -> Result<()> {
    if slot.is_some() {
        return Err(twice(&key));
    }
    if input.peek(Token![=]) {
        input.parse::<Token![=]>()?;
    } else {
        return Err(no_value(&key));
    }
    if input.is_empty() || input.peek(Token![,]) {
        return Err(no_value(&key));
    }
    let value = value(input)?;
    *slot = Some(Said { key, value });
    Ok(())
}

fn replay(slot: &mut Option<Said<Replay>>, key: Ident, input: ParseStream<'_>) -> Result<()> {
    if !input.peek(token::Paren) {
        return fill(slot, key, input, |input| input.parse().map(Replay::Function));
    }
    if slot.is_some() {
        return Err(twice(&key));
    }
    let content;
    syn::parenthesized!(content in input);
    let value = Replay::Members(all(&content)?);
    *slot = Some(Said { key, value });
    Ok(())
}

fn flag(slot: &mut Option<Said<()>>, key: Ident, input: ParseStream<'_>) -> Result<()> {
    if slot.is_some() {
        return Err(twice(&key));
    }
    if input.peek(Token![=]) || input.peek(token::Paren) {
        let message = format!("`{key}` takes no value: write just `{key}`, or leave it out");
        return Err(Error::new_spanned(&key, message));
    }
    *slot = Some(Said { key, value: () });
    Ok(())
}

/// Wants a comma, and forgives its absence before what looks like an option.
fn separator(input: ParseStream<'_>, errors: &mut Errors) -> Result<()> {
    if input.is_empty() {
        return Ok(());
    }
    if !input.peek(Token![,]) {
        errors.push(input.error("expected `,` between options"));
        let next = input.fork().call(Ident::parse_any).ok();
        if next.is_some_and(|next| OPTIONS.iter().any(|(name, _)| next == name)) {
            return Ok(());
        }
        skip_to_comma(input)?;
    }
    input.parse::<Option<Token![,]>>().map(drop)
}

fn skip_to_comma(input: ParseStream<'_>) -> Result<()> {
    while !input.is_empty() && !input.peek(Token![,]) {
        input.parse::<TokenTree>()?;
    }
    Ok(())
}

pub(crate) fn twice(key: &Ident) -> Error {
    Error::new_spanned(key, format!("option `{key}` given twice: leave out one of them"))
}

fn no_value(key: &Ident) -> Error {
    let example = OPTIONS.iter().find(|(name, _)| key == name).map_or("", |(_, example)| example);
    Error::new_spanned(key, format!("`{key}` needs a value, as in `{example}`"))
}

fn unknown(key: &Ident) -> Error {
    let names: Vec<&str> = OPTIONS.iter().map(|(name, _)| *name).collect();
    let hint = did_you_mean(&key.to_string(), &names);
    let known = listed(&names, "and");
    let message = format!("unknown option `{key}`{hint}\nknown options: {known}");
    Error::new_spanned(key, message)
}

/// ``; did you mean `ttl`?``, if one of the words is close.
pub(crate) fn did_you_mean(wrong: &str, words: &[&str]) -> String {
    closest(wrong, words).map_or_else(String::new, |word| format!("; did you mean `{word}`?"))
}

pub(crate) fn closest<'a>(wrong: &str, words: &[&'a str]) -> Option<&'a str> {
    let wrong = wrong.to_lowercase();
    words
        .iter()
        .map(|word| (strsim::damerau_levenshtein(&wrong, word), *word))
        // One typing error for each three letters, and never another word.
        .filter(|(distance, word)| *distance <= word.len().div_ceil(3).min(3))
        .min()
        .map(|(_, word)| word)
}

/// `` `a`, `b` and `c` ``
pub(crate) fn listed(words: &[&str], conjunction: &str) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => {
            format!("{} {conjunction} {last}", rest.join(", "))
        }
        _ => quoted.concat(),
    }
}

impl Parse for Term {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        if input.peek(Lit) {
            return literal(input);
        }
        if input.peek(token::Paren) {
            let content;
            let paren = syn::parenthesized!(content in input);
            return Ok(Self::Tuple(paren, all(&content)?));
        }
        if input.peek(token::Brace) {
            return input.parse().map(Self::Braces);
        }
        if closure_follows(input) {
            return Ok(Self::Closure(input.parse::<ExprClosure>()?.into_token_stream()));
        }
        if input.peek(Token![<]) || input.peek(Token![::]) || input.peek2(Token![::]) {
            return input.parse().map(Self::Path);
        }
        if !input.peek(Ident::peek_any) {
            return Err(input.error("expected a literal, a word, or a path"));
        }
        // `final` and `crate` are keywords elsewhere and ordinary words here.
        let word = input.call(Ident::parse_any)?;
        if input.peek(Token![=]) {
            return named(word, input);
        }
        if !input.peek(token::Paren) {
            return Ok(Self::Word(word));
        }
        let content;
        let paren = syn::parenthesized!(content in input);
        if word == "arg" {
            return Ok(Self::Arguments(word, all(&content)?));
        }
        let inside = all(&content)?;
        Ok(Self::Call(Call { word, paren, inside }))
    }
}

fn closure_follows(input: ParseStream<'_>) -> bool {
    let bar = input.peek(Token![|]) || input.peek(Token![||]);
    bar || input.peek(Token![move]) || input.peek(Token![async])
}

fn named(word: Ident, input: ParseStream<'_>) -> Result<Term> {
    input.parse::<Token![=]>()?;
    if input.is_empty() || input.peek(Token![,]) {
        return Err(Error::new_spanned(&word, format!("`{word} =` needs a value")));
    }
    let value = input.parse()?;
    Ok(Term::Named(word, Box::new(value)))
}

fn literal(input: ParseStream<'_>) -> Result<Term> {
    let literal = input.parse()?;
    let Lit::Int(start) = &literal else {
        return Ok(Term::Literal(literal));
    };
    if !input.peek(Token![..]) {
        return Ok(Term::Literal(literal));
    }
    Ok(Term::Range(Range { start: start.clone(), limits: input.parse()?, end: input.parse()? }))
}

/// A comma-separated list that fills its parentheses.
fn all<T: Parse>(content: ParseStream<'_>) -> Result<Vec<T>> {
    match Punctuated::<T, Token![,]>::parse_terminated(content) {
        Ok(list) => Ok(list.into_iter().collect()),
        Err(error) => {
            // What is left unread would be reported a second time, by `syn`.
            content.parse::<TokenStream>()?;
            Err(error)
        }
    }
}

/// For pointing at a term; expansion never prints one.
impl ToTokens for Term {
    fn to_tokens(&self, tokens: &mut TokenStream) {
        match self {
            Self::Literal(literal) => literal.to_tokens(tokens),
            Self::Range(range) => {
                range.start.to_tokens(tokens);
                range.limits.to_tokens(tokens);
                range.end.to_tokens(tokens);
            }
            Self::Word(word) => word.to_tokens(tokens),
            Self::Path(path) => path.to_tokens(tokens),
            Self::Call(call) => call.to_tokens(tokens),
            Self::Arguments(word, expressions) => {
                word.to_tokens(tokens);
                tokens.extend(expressions.iter().map(ToTokens::to_token_stream));
            }
            Self::Tuple(paren, terms) => paren.surround(tokens, |tokens| {
                tokens.extend(terms.iter().map(ToTokens::to_token_stream));
            }),
            Self::Named(word, value) => {
                word.to_tokens(tokens);
                value.to_tokens(tokens);
            }
            Self::Braces(braces) => braces.to_tokens(tokens),
            Self::Closure(closure) => closure.to_tokens(tokens),
        }
    }
}

impl ToTokens for Call {
    fn to_tokens(&self, tokens: &mut TokenStream) {
        self.word.to_tokens(tokens);
        self.paren.surround(tokens, |tokens| {
            tokens.extend(self.inside.iter().map(ToTokens::to_token_stream));
        });
    }
}
