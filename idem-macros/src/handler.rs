//! The function under the attribute, read as far as its signature.
//!
//! The body stays one opaque run of tokens: whoever is typing inside a handler
//! gets rustc's error about what they type and none of ours.

use proc_macro2::{Delimiter, Group, Ident, TokenStream, TokenTree};
use syn::ext::IdentExt;
use syn::parse::{ParseStream, Parser};
use syn::{AttrStyle, Attribute, Path, Result, Signature, Token, Visibility};

use crate::errors::Errors;

pub(crate) struct Handler {
    pub(crate) attributes: Vec<Attribute>,
    pub(crate) visibility: Visibility,
    pub(crate) signature: Signature,
    /// A block.
    pub(crate) body: TokenTree,
    /// Everything after the attributes, as it came.
    pub(crate) undecorated: TokenStream,
}

pub(crate) fn parse(item: TokenStream, errors: &mut Errors) -> Option<Handler> {
    errors.keep(read.parse2(item))
}

fn read(input: ParseStream<'_>) -> Result<Handler> {
    let mut attributes = input.call(Attribute::parse_outer)?;
    let undecorated = input.fork().parse()?;
    let visibility = input.parse()?;
    if !function_follows(input) {
        return refuse(
            input,
            "`#[idempotent]` goes on an axum handler (`async fn`): expected `fn`",
        );
    }
    let signature = input.parse()?;
    if input.peek(Token![;]) {
        return refuse(
            input,
            "a declaration has no body to protect: `#[idempotent]` goes on the function that has one",
        );
    }

    let block = input.fork().parse()?;
    let content;
    let braces = syn::braced!(content in input);
    // The body moves into a block in which inner attributes may not stand.
    let inner = content.call(Attribute::parse_inner)?;
    let untouched = inner.is_empty();
    attributes.extend(inner.into_iter().map(outer));
    let rest = content.parse()?;

    let body = match block {
        // Only the compiler's own group knows where each of its braces is, and
        // a syntax error reported twice is shown once if the places agree.
        TokenTree::Group(block) if untouched && block.delimiter() == Delimiter::Brace => block,
        _ => {
            let mut block = Group::new(Delimiter::Brace, rest);
            block.set_span(braces.span.join());
            block
        }
    };
    Ok(Handler { attributes, visibility, signature, body: body.into(), undecorated })
}

/// What is left unread would be reported a second time, by `syn`.
fn refuse(input: ParseStream<'_>, message: &str) -> Result<Handler> {
    let error = input.error(message);
    input.parse::<TokenStream>()?;
    Err(error)
}

fn outer(inner: Attribute) -> Attribute {
    Attribute { style: AttrStyle::Outer, ..inner }
}

fn function_follows(input: ParseStream<'_>) -> bool {
    let ahead = input.fork();
    while !ahead.peek(Token![fn]) {
        let qualifier = ahead.call(Ident::parse_any).is_ok_and(|word| {
            ["const", "async", "safe", "unsafe", "extern"].iter().any(|qualifier| word == qualifier)
        });
        let abi = ahead.parse::<Option<syn::LitStr>>();
        if !qualifier || abi.is_err() {
            return false;
        }
    }
    true
}

/// What an attribute on a handler does to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Read by the compiler or a tool where it stands.
    Inert,
    /// A macro that wants to see the handler as its author wrote it.
    Macro,
    /// `#[debug_handler]`, which refuses what it does not find callable.
    DebugHandler,
    /// Our own, a second time.
    Idempotent,
}

/// Attributes that rustc knows and that rewrite nothing. Whatever is not
/// listed may be a macro, and is treated as one.
const INERT: [&str; 24] = [
    "allow",
    "automatically_derived",
    "cfg",
    "cfg_attr",
    "cold",
    "coverage",
    "deny",
    "deprecated",
    "doc",
    "expect",
    "export_name",
    "forbid",
    "inline",
    "instruction_set",
    "link_section",
    "must_use",
    "no_mangle",
    "no_sanitize",
    "optimize",
    "stable",
    "target_feature",
    "track_caller",
    "unstable",
    "warn",
];

const TOOLS: [&str; 5] = ["clippy", "diagnostic", "miri", "rust_analyzer", "rustfmt"];

pub(crate) fn kind(path: &Path) -> Kind {
    let (Some(first), Some(last)) = (path.segments.first(), path.segments.last()) else {
        return Kind::Macro;
    };
    let one_of = |names: &[&str], ident: &Ident| names.iter().any(|name| ident == name);
    let inert = match path.segments.len() {
        1 => one_of(&INERT, &first.ident),
        _ => one_of(&TOOLS, &first.ident),
    };
    if inert {
        Kind::Inert
    } else if last.ident == "debug_handler" {
        Kind::DebugHandler
    } else if last.ident == "idempotent" {
        Kind::Idempotent
    } else {
        Kind::Macro
    }
}

/// Only lint levels mean on a `let` what they mean on a parameter.
pub(crate) fn sets_lint_level(attribute: &Attribute) -> bool {
    ["allow", "deny", "expect", "forbid", "warn"]
        .iter()
        .any(|level| attribute.path().is_ident(level))
}

/// The last name of a path-like type: a hint for better errors.
pub(crate) fn hint(ty: &syn::Type) -> Option<&Ident> {
    match ty {
        syn::Type::Path(path) => path.path.segments.last().map(|last| &last.ident),
        syn::Type::Group(group) => hint(&group.elem),
        syn::Type::Paren(paren) => hint(&paren.elem),
        _ => None,
    }
}
