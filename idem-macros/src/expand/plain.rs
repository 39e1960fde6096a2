//! The plain function as its callers and the engine see it.
//!
//! ```text
//! async fn deliver(idem: &Idempotency, event: Uuid, body: Body) -> Result<Delivered, Failed> { … }
//! ```
//! keeps its signature. Its body becomes a block that the engine runs:
//! ```text
//! async fn deliver(idem: &Idempotency, event: Uuid, body: Body) -> Result<Delivered, Failed> {
//!     let __function = …;
//!     let __call = …;
//!     call(__call, never, move |__engine, __operation| boxed(async move {
//!         let idem = &__engine;
//!         let (event, body) = …;
//!         { … }
//!     })).await
//! }
//! ```

use proc_macro2::{Ident, Span, TokenStream};
use quote::{ToTokens, format_ident, quote_spanned};
use syn::ext::IdentExt;
use syn::{Expr, Pat, PatIdent};

use super::{
    Argument, argument_expressions, at, borrowed, by_reference, constant, inference,
    outlive_the_request, policy, private, used,
};
use crate::check::{Checked, Function, FunctionEngine, function_reference};

/// Signature and body. `p` is the runtime's module.
pub(super) fn function(
    checked: &Checked,
    function: &Function,
    p: &TokenStream,
) -> (TokenStream, TokenStream) {
    let here = Span::mixed_site();
    let plain = Plain { checked, function, private: p, names: names(&checked.handler.arguments) };
    let description = plain.description();
    let call = plain.call();
    let run = plain.run();
    let body = quote_spanned! {here=>
        let __function: &'static #p::Function = #description;
        #call
        #run
    };
    (plain.signature(), body)
}

struct Plain<'a> {
    checked: &'a Checked,
    function: &'a Function,
    private: &'a TokenStream,
    /// What the arguments are called in the signature.
    names: Vec<Ident>,
}

/// An argument that is a name keeps it, for whoever reads the documentation of the function.
fn names(arguments: &[Argument]) -> Vec<Ident> {
    let name = |(index, argument): (usize, &Argument)| match &argument.pattern {
        Pat::Ident(PatIdent { by_ref: None, subpat: None, ident, .. }) => ident.clone(),
        _ => format_ident!("__a{index}", span = Span::mixed_site()),
    };
    arguments.iter().enumerate().map(name).collect()
}

impl Plain<'_> {
    fn signature(&self) -> TokenStream {
        let here = Span::mixed_site();
        let handler = &self.checked.handler;
        let mut signature = handler.signature.clone();
        outlive_the_request(&mut signature.generics);
        let receiver = self.function.receiver.iter();
        let types = handler.arguments.iter().map(|argument| &argument.ty);
        let names = &self.names;
        signature.inputs = syn::parse_quote_spanned!(here=> #(#receiver,)* #(#names: #types),*);
        let returns = handler.returns.ty();
        signature.output = syn::parse_quote_spanned!(here=> -> #returns);
        signature.into_token_stream()
    }

    fn description(&self) -> TokenStream {
        let (here, p) = (Span::mixed_site(), self.private);
        let handler = &self.checked.handler;
        let policy = policy::tokens(self.checked, p);
        let name = handler.signature.ident.unraw().to_string();
        let value = quote_spanned! {here=>
            #p::Function::new(
                ::core::concat!(::core::module_path!(), "::", #name),
                #name,
                #policy,
            )
        };
        constant(handler, &quote_spanned!(here=> #p::Function), &value)
    }

    /// Engine, anchor, scope and fingerprint, read from the arguments.
    ///
    /// The expressions stand in a closure, so that rustc refuses `.await` and `?` in them as it
    /// does in any other.
    fn call(&self) -> TokenStream {
        let (here, p) = (Span::mixed_site(), self.private);
        let patterns = self.owned().map(|(argument, name)| {
            let pattern = by_reference(&argument.pattern);
            quote_spanned!(here=> let #pattern = &#name;)
        });
        let engine = self.engine();
        let pushes = argument_expressions(&self.checked.policy).into_iter().map(|expression| {
            let borrowed = borrowed(expression);
            quote_spanned!(at(expression)=> __call.push(#borrowed);)
        });
        let compares = self.function.compared.iter().map(|expression| {
            let borrowed = borrowed(expression);
            let text = text(expression);
            quote_spanned!(at(expression)=> __call.compare(#text, #borrowed);)
        });
        quote_spanned! {here=>
            let __call = {
                #[allow(unused_variables)]
                let __collect = || {
                    #(#patterns)*
                    let mut __call = #p::FunctionCall::new(#engine, __function);
                    #(#pushes)*
                    #(#compares)*
                    __call
                };
                __collect()
            };
        }
    }

    fn engine(&self) -> TokenStream {
        match &self.function.engine {
            FunctionEngine::Expression(expression) => {
                let there = at(expression);
                let p = private(self.checked, there);
                let borrowed = borrowed(expression);
                quote_spanned!(there=> #p::engine(#borrowed))
            }
            FunctionEngine::Argument(index) => {
                let (argument, name) =
                    (&self.checked.handler.arguments[*index], &self.names[*index]);
                let referred = function_reference(&argument.ty).map(|reference| &reference.elem);
                let there = at(referred);
                let p = private(self.checked, there);
                quote_spanned!(there=> #p::engine::<#referred>(#name))
            }
        }
    }

    fn run(&self) -> TokenStream {
        let here = Span::mixed_site();
        let body = self.body();
        // Located at the name, where rustc says why a future is not `Send`.
        let name = at(&self.checked.handler.signature.ident);
        let at_name = private(self.checked, name);
        let body = quote_spanned!(name=> #at_name::boxed(async move { #body }));
        // Said of the type, where rustc says that it cannot be recorded.
        let returns = self.checked.handler.returns.ty();
        let there = at(returns);
        let at_returns = private(self.checked, there);
        let nothing_happened = match &self.function.nothing_happened {
            Some(path) => path.to_token_stream(),
            None => quote_spanned!(there=> #at_returns::never),
        };
        let passed =
            quote_spanned!(here=> __call, #nothing_happened, move |__engine, __operation| #body);
        quote_spanned!(there=> #at_returns::call::<#returns, _>(#passed).await)
    }

    /// What the engine runs: the arguments taken apart, then the user's block.
    fn body(&self) -> TokenStream {
        let (here, p) = (Span::mixed_site(), self.private);
        let handler = &self.checked.handler;
        let inference = inference(&handler.returns);
        // It moves in, whether or not the body says it.
        let receiver = self.function.receiver.as_ref().map(|receiver| {
            let word = &receiver.self_token;
            quote_spanned!(here=> let _ = &#word;)
        });
        let engine = match self.function.engine {
            FunctionEngine::Argument(index) => {
                let Argument { attributes, pattern, .. } = &handler.arguments[index];
                Some(quote_spanned! {here=>
                    #(#attributes)*
                    #[allow(unused_variables)]
                    let #pattern = &__engine;
                })
            }
            FunctionEngine::Expression(_) => None,
        };
        let operation = self
            .function
            .operation
            .as_ref()
            .map(|name| quote_spanned!(here=> let #name: #p::Operation = __operation;));
        let names: Vec<_> = self.owned().map(|(_, name)| name).collect();
        let bindings = self.owned().map(|(argument, _)| argument).enumerate();
        let bindings = bindings.filter_map(super::binding);
        let used = used(&handler.arguments, &self.expressions());
        let block = &handler.body;
        quote_spanned! {here=>
            #inference
            #receiver
            let __args = (#(#names,)*);
            #engine
            #operation
            #(#bindings)*
            #(let _ = &#used;)*
            #[allow(unused_braces)]
            #block
        }
    }

    /// All arguments but the engine, with their names.
    fn owned(&self) -> impl Iterator<Item = (&Argument, &Ident)> {
        let engine = match self.function.engine {
            FunctionEngine::Argument(index) => Some(index),
            FunctionEngine::Expression(_) => None,
        };
        let all = self.checked.handler.arguments.iter().zip(&self.names).enumerate();
        all.filter(move |(index, _)| Some(*index) != engine).map(|(_, argument)| argument)
    }

    /// Everything in the attribute that reads arguments.
    fn expressions(&self) -> Vec<&Expr> {
        let mut all = argument_expressions(&self.checked.policy);
        all.extend(&self.function.compared);
        if let FunctionEngine::Expression(expression) = &self.function.engine {
            all.push(expression);
        }
        all
    }
}

/// An expression by which its value is known in a fingerprint's scheme: as it is written, whatever
/// the compiler prints between its tokens.
fn text(expression: &Expr) -> String {
    expression.to_token_stream().to_string().split_whitespace().collect()
}
