//! JSON literals, as they can be written among Rust's tokens.
//!
//! ```text
//! { replayed: true, "event-id": null, amounts: [1, -2.5], }
//! ```
//! A name that is a word needs no quotes, and a comma may stand at the end.
//! Every mistake is reported, and what it spoils is missing from the text.

use std::fmt::Write as _;

use proc_macro2::{Group, Ident, TokenStream, TokenTree};
use quote::ToTokens;
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream, Parser};
use syn::{Error, Lit, LitStr, Result, Token, token};

use super::value::error;
use crate::args::did_you_mean;
use crate::errors::Errors;

/// The JSON text of an object.
pub(super) fn object(braces: &Group, errors: &mut Errors) -> String {
    let mut json = Json { text: String::new(), errors };
    json.object(braces.stream());
    json.text
}

struct Json<'a> {
    text: String,
    errors: &'a mut Errors,
}

/// A member before its value is read.
struct Member {
    name: String,
    /// Where the name stands.
    at: TokenTree,
    value: TokenStream,
}

enum Value {
    Null,
    Literal(Lit),
    Array(TokenStream),
    Object(TokenStream),
}

impl Json<'_> {
    fn object(&mut self, members: TokenStream) {
        let mut names = Vec::new();
        self.between('{', '}', members, |json, member| {
            let member = Member::parse.parse2(member);
            let Some(Member { name, at, value }) = json.errors.keep(member) else {
                return;
            };
            json.string(&name);
            json.text.push(':');
            json.value(&value);
            if names.contains(&name) {
                json.errors.at(at, format!("member `{name}` given twice: leave out one of them"));
            }
            names.push(name);
        });
    }

    /// The items of a list, and what encloses them.
    fn between(
        &mut self,
        open: char,
        close: char,
        list: TokenStream,
        mut item: impl FnMut(&mut Self, TokenStream),
    ) {
        self.text.push(open);
        let read = |input: ParseStream<'_>| {
            let mut first = true;
            while !input.is_empty() {
                let mut tokens = TokenStream::new();
                while !input.is_empty() && !input.peek(Token![,]) {
                    tokens.extend([input.parse::<TokenTree>()?]);
                }
                if tokens.is_empty() {
                    return Err(input.error("nothing stands before this comma"));
                }
                if !first {
                    self.text.push(',');
                }
                first = false;
                item(self, tokens);
                input.parse::<Option<Token![,]>>()?;
            }
            Ok(())
        };
        if let Err(error) = read.parse2(list) {
            self.errors.push(error);
        }
        self.text.push(close);
    }

    fn value(&mut self, tokens: &TokenStream) {
        match syn::parse2(tokens.clone()) {
            Ok(Value::Null) => self.text.push_str("null"),
            Ok(Value::Array(list)) => {
                self.between('[', ']', list, |json, value| json.value(&value));
            }
            Ok(Value::Object(members)) => self.object(members),
            Ok(Value::Literal(Lit::Bool(literal))) => {
                self.text.push_str(if literal.value { "true" } else { "false" });
            }
            Ok(Value::Literal(Lit::Str(text))) => self.string(&text.value()),
            Ok(Value::Literal(Lit::Int(literal))) => {
                self.number(integer(tokens, literal.base10_digits(), literal.suffix()));
            }
            Ok(Value::Literal(Lit::Float(literal))) => {
                self.number(float(tokens, literal.base10_digits(), literal.suffix()));
            }
            Ok(Value::Literal(_)) | Err(_) => self.errors.push(not_json(tokens)),
        }
    }

    fn number(&mut self, number: Result<String>) {
        self.text.extend(self.errors.keep(number));
    }

    fn string(&mut self, value: &str) {
        self.text.push('"');
        for c in value.chars() {
            match c {
                '"' | '\\' => self.text.extend(['\\', c]),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                ..' ' => {
                    // Writing to a string cannot fail.
                    let _ = write!(self.text, "\\u{:04x}", u32::from(c));
                }
                _ => self.text.push(c),
            }
        }
        self.text.push('"');
    }
}

impl Parse for Member {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let at = input.fork().parse()?;
        let name = if input.peek(LitStr) {
            input.parse::<LitStr>()?.value()
        } else if input.peek(Ident::peek_any) {
            input.call(Ident::parse_any)?.unraw().to_string()
        } else {
            return error(at, "a member begins with its name, as in `replayed: true`");
        };
        if !input.peek(Token![:]) {
            return error(
                at,
                format!(
                    "`{name}` is followed by `:` and its value, as in `{name}: true`; a name of other characters stands in quotes"
                ),
            );
        }
        input.parse::<Token![:]>()?;
        if input.is_empty() {
            return error(at, format!("`{name}:` needs a value, as in `{name}: true`"));
        }
        let value = input.parse()?;
        Ok(Self { name, at, value })
    }
}

impl Parse for Value {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        if input.peek(Lit) {
            return input.parse().map(Self::Literal);
        }
        if input.peek(token::Bracket) {
            return input.parse().map(|list: Group| Self::Array(list.stream()));
        }
        if input.peek(token::Brace) {
            return input.parse().map(|members: Group| Self::Object(members.stream()));
        }
        match input.parse::<Ident>()? {
            word if word == "null" => Ok(Self::Null),
            word => error(word, "not a JSON literal"),
        }
    }
}

fn not_json(tokens: &TokenStream) -> Error {
    let hint = did_you_mean(&tokens.to_string(), &["true", "false", "null"]);
    let message =
        format!("only JSON literals stand here: for computed members write `replay = path`{hint}");
    Error::new_spanned(tokens, message)
}

fn integer(at: &TokenStream, digits: &str, suffix: &str) -> Result<String> {
    no_suffix(at, digits, suffix)?;
    if digits.parse::<i64>().is_err() && digits.parse::<u64>().is_err() {
        return too_large(at);
    }
    Ok(digits.to_owned())
}

fn float(at: &TokenStream, digits: &str, suffix: &str) -> Result<String> {
    no_suffix(at, digits, suffix)?;
    if !digits.parse().is_ok_and(f64::is_finite) {
        return too_large(at);
    }
    // Rust has `007.5` and `1.`, and JSON neither.
    let (sign, digits) = match digits.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", digits),
    };
    let digits = digits.trim_start_matches('0');
    let before = if digits.starts_with(|c: char| c.is_ascii_digit()) { "" } else { "0" };
    let after = if digits.ends_with('.') { "0" } else { "" };
    Ok(format!("{sign}{before}{digits}{after}"))
}

fn no_suffix(at: &TokenStream, digits: &str, suffix: &str) -> Result<()> {
    if suffix.is_empty() {
        return Ok(());
    }
    error(at, format!("a JSON number has no type: write `{digits}`"))
}

fn too_large<T>(at: impl ToTokens) -> Result<T> {
    error(at, "a number that few readers of JSON can hold: write it as a string")
}
