//! What comes out for what goes in, without a compiler.

mod expansions;
mod mistakes;

use proc_macro2::TokenStream;

use crate::errors::Errors;
use crate::{args, check, guarded, handler};

fn tokens(source: &str) -> TokenStream {
    source.parse().expect("the test's source is made of tokens")
}

fn expand(args: &str, item: &str) -> TokenStream {
    guarded(&tokens(args), &tokens(item))
}

fn pretty(tokens: TokenStream) -> String {
    let file = syn::parse2(tokens).expect("an expansion is a list of items");
    prettyplease::unparse(&file)
}

/// Every mistake as the text that it underlines and its message.
fn mistakes(args: &str, item: &str) -> Vec<(String, String)> {
    let mut errors = Errors::default();
    let said = args::parse(tokens(args), &mut errors);
    let handler = handler::parse(tokens(item), &mut errors);
    check::check(said, handler, &mut errors);
    let shown = |error: syn::Error| {
        let underlined = error.span().source_text().unwrap_or_default();
        (underlined, error.to_string())
    };
    errors.into_vec().into_iter().map(shown).collect()
}
