//! The macros of idem. Use them through `idem_runtime`, which re-exports them
//! with their documentation; the code that they generate calls it.
//!
//! ```text
//! args ──┐
//!        ├─ check ── expand        a type between each; `expand` cannot fail
//! handler┘
//! ```

mod args;
mod check;
mod derive;
mod errors;
mod expand;
mod handler;
#[cfg(test)]
mod tests;

use proc_macro2::TokenStream;
use quote::quote;

use errors::Errors;

/// Makes an axum handler, or a plain function, safe to retry. See `idem_runtime::idempotent`.
#[proc_macro_attribute]
pub fn idempotent(
    args: proc_macro::TokenStream,
    item: proc_macro::TokenStream,
) -> proc_macro::TokenStream {
    guarded(&args.into(), &item.into()).into()
}

/// Lets an id be used in `arg(..)`. See `idem_runtime::AnchorValue`.
#[proc_macro_derive(AnchorValue, attributes(anchor))]
pub fn anchor_value(item: proc_macro::TokenStream) -> proc_macro::TokenStream {
    derive::anchor_value(item.into()).into()
}

fn guarded(args: &TokenStream, item: &TokenStream) -> TokenStream {
    let mut errors = Errors::default();
    let said = args::parse(args.clone(), &mut errors);
    let handler = handler::parse(item.clone(), &mut errors);
    match check::check(said, handler, &mut errors) {
        Some(checked) if errors.is_empty() => {
            expand::after_other_macros(&checked, args).unwrap_or_else(|| expand::function(&checked))
        }
        // Routers elsewhere name the function: without it, one mistake here
        // would be an error in each of them.
        _ => {
            let errors = errors.into_tokens();
            quote!(#item #errors)
        }
    }
}
