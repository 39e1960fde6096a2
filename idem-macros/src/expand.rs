//! The handler as axum and the engine see it; the plain function, in [`plain`].
//!
//! ```text
//! async fn create(State(db): State<Db>, Json(new): Json<New>) -> Result<Made, Problem> { … }
//! ```
//! keeps its name, generics and earlier arguments. Its last argument becomes
//! an extractor of the engine's and its body a block that the engine runs:
//! ```text
//! async fn create(__a0: State<Db>, __idem: Idem<Json<New>, …>) -> Guarded<Result<Made, Problem>> {
//!     let __policy = …;
//!     run(__idem, __policy, move |__last| boxed(async move {
//!         let (State(db), Json(new)) = (__a0, __last);
//!         { … }
//!     })).await
//! }
//! ```
//! Everything generated is small: what follows `boxed` is not generic, so a
//! hundred handlers do not compile the engine a hundred times.
//!
//! Names of ours have the span of the macro's definition, which keeps them
//! apart from the user's even when a handler comes out of a `macro_rules!`;
//! to make rustc underline a word of the user's, such a span is only moved
//! there ([`at`]).

mod plain;
mod policy;

use proc_macro2::{Delimiter, Group, Ident, Span, TokenStream, TokenTree};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::visit::{self, Visit};
use syn::visit_mut::{self, VisitMut};
use syn::{Attribute, Expr, GenericParam, Generics, Index, Pat, PatIdent, Type, WherePredicate};

use crate::check::{
    Argument, Caller, Checked, CheckedHandler, Engine, Part, Policy, Returns, Scope,
};

/// Our name resolution, at the user's place.
fn at(tokens: impl ToTokens) -> Span {
    let first = tokens.into_token_stream().into_iter().next();
    let mixed = Span::mixed_site();
    first.map_or(mixed, |token| mixed.located_at(token.span()))
}

fn at_end(tokens: impl ToTokens) -> Span {
    let last = tokens.into_token_stream().into_iter().last();
    let mixed = Span::mixed_site();
    last.map_or(mixed, |token| mixed.located_at(token.span()))
}

/// The item with the macros below ours moved before it, so that each of them
/// sees the handler that its author wrote. `None` if there are none.
///
/// Happens once: what stands there the second time, behind the `@`, has either
/// run or was no macro.
pub(crate) fn after_other_macros(checked: &Checked, args: &TokenStream) -> Option<TokenStream> {
    let handler = &checked.handler;
    let (first, below): (Vec<&Attribute>, Vec<&Attribute>) =
        handler.attributes.iter().partition(|attribute| handler.runs_first(attribute));
    if first.is_empty() || checked.others_have_run {
        return None;
    }
    let private = private(checked, Span::mixed_site());
    let undecorated = &handler.undecorated;
    Some(quote! {
        #(#first)*
        #[#private::idempotent(@ #args)]
        #(#below)*
        #undecorated
    })
}

/// The hidden module of the runtime, absolutely; as if it stood at the given
/// place, unless the user wrote where it is: rustc then complains of that once.
fn private(checked: &Checked, place: Span) -> TokenStream {
    match &checked.krate {
        Some(path) => quote_spanned!(place=> #path::__private),
        None => quote_spanned!(place=> ::idem_runtime::__private),
    }
}

pub(crate) fn function(checked: &Checked) -> TokenStream {
    let here = Span::mixed_site();
    let p = &private(checked, here);
    let (signature, body) = match &checked.caller {
        Caller::Axum { engine, state } => {
            handler(&Wrapped::of(checked, *engine, p), state.as_ref())
        }
        Caller::Code(function) => plain::function(checked, function, p),
    };

    // With the braces of the user's: rustc takes a function for generated that ends elsewhere, and
    // no longer says, among others, that nobody uses it.
    let mut block = Group::new(Delimiter::Brace, body);
    block.set_span(checked.handler.body.span());

    let CheckedHandler { attributes, visibility, .. } = &checked.handler;
    quote_spanned! {here=>
        #(#attributes)*
        #visibility #signature #block
    }
}

/// Signature and body.
fn handler(handler: &Wrapped<'_>, state: Option<&Type>) -> (TokenStream, TokenStream) {
    let policy = handler.policy();
    let checks = state.map(|state| handler.state_checks(state));
    let (streams, transaction) = (handler.streaming_probe(), handler.transaction_probe());
    let run = handler.run();
    let body = quote_spanned!(Span::mixed_site()=> #policy #checks #streams #transaction #run);
    (handler.signature(), body)
}

/// One handler with the names that its expansion repeats.
struct Wrapped<'a> {
    checked: &'a Checked,
    handler: &'a CheckedHandler,
    engine: Engine,
    private: &'a TokenStream,
    /// `__a0`, `__a1`, … for all arguments but the last.
    names: Vec<Ident>,
    last_type: Type,
    returns: &'a Type,
}

impl<'a> Wrapped<'a> {
    fn of(checked: &'a Checked, engine: Engine, private: &'a TokenStream) -> Self {
        let handler = &checked.handler;
        let names = (0..handler.earlier().len())
            .map(|index| format_ident!("__a{index}", span = Span::mixed_site()))
            .collect();
        let last_type = match handler.last() {
            Some(last) => last.ty.clone(),
            None => syn::parse_quote!(()),
        };
        let returns = handler.returns.ty();
        Self { checked, handler, engine, private, names, last_type, returns }
    }

    fn signature(&self) -> TokenStream {
        let here = Span::mixed_site();
        let Self { private: p, names, last_type, returns, .. } = self;
        let types = self.handler.earlier().iter().map(|extractor| &extractor.ty);
        let source = match self.engine {
            Engine::State => quote_spanned!(here=> #p::EngineInRouterState),
            Engine::Extension => quote_spanned!(here=> #p::EngineInExtension),
        };

        let mut signature = self.handler.signature.clone();
        outlive_the_request(&mut signature.generics);
        // Located at the types that they stand for: what rustc says of the new ones is then said
        // of those that the user wrote.
        let (last, answer) = (at(last_type), at(returns));
        let (at_last, at_answer) = (private(self.checked, last), private(self.checked, answer));
        let last_type = quote_spanned!(last=> #at_last::Idem<#last_type, #source>);
        let returns = quote_spanned!(answer=> #at_answer::Guarded<#returns>);
        signature.inputs = syn::parse_quote_spanned! {here=>
            #(#names: #types,)*
            __idem: #last_type
        };
        signature.output = syn::parse_quote_spanned!(here=> -> #returns);
        signature.into_token_stream()
    }

    fn policy(&self) -> TokenStream {
        let (here, p) = (Span::mixed_site(), self.private);
        let policy = constant(self.handler, &quote!(#p::Policy), &policy::tokens(self.checked, p));
        quote_spanned!(here=> let __policy: &'static #p::Policy = #policy;)
    }

    /// With `state = …`, rustc can say at the definition what it otherwise
    /// only says where the handler is routed.
    fn state_checks(&self, state: &Type) -> TokenStream {
        let p = self.private;
        let engine = quote_spanned!(at(state)=> #p::check_engine::<#state>(););
        let arguments = self.handler.earlier().iter().map(
            |Argument { ty, .. }| quote_spanned!(at(ty)=> #p::check_argument::<#ty, #state>();),
        );
        let last = self.handler.last().map(|Argument { ty, .. }| {
            quote_spanned!(at(ty)=> #p::check_last_argument::<#ty, #state, _>();)
        });
        quote_spanned! {Span::mixed_site()=>
            if false {
                #engine
                #(#arguments)*
                #last
            }
        }
    }

    /// An answer that streams is refused by its type, through aliases.
    fn streaming_probe(&self) -> Option<TokenStream> {
        let Returns::Named(returns) = &self.handler.returns else {
            return None;
        };
        let p = self.private;
        let there = at(returns);
        let at_type = private(self.checked, there);
        let check =
            quote_spanned!(there=> #at_type::probe::Of::<#returns>::idem_answer_is_complete(););
        Some(quote_spanned! {Span::mixed_site()=>
            {
                // Unused where the answer streams and is refused.
                #[allow(unused_imports)]
                use #p::probe::Fallback as _;
                #check
            }
        })
    }

    /// A `Tx` among the arguments goes with the word `transaction`; told by the types, through
    /// aliases.
    fn transaction_probe(&self) -> Option<TokenStream> {
        let (here, p) = (Span::mixed_site(), self.private);
        let arguments = &self.handler.arguments;
        let count = |Argument { ty, .. }: &Argument| quote_spanned!(at(ty)=> #p::transaction::Of::<#ty>::COUNT);
        let checks: Vec<TokenStream> = match &self.checked.policy.transaction {
            Some(word) => {
                let counts = arguments.iter().map(count);
                vec![quote_spanned!(at(word)=> #p::transaction::one(0 #(+ #counts)*))]
            }
            None => {
                let counts = arguments.iter().map(|argument| (at(&argument.ty), count(argument)));
                counts
                    .map(|(there, count)| quote_spanned!(there=> #p::transaction::none(#count)))
                    .collect()
            }
        };
        if checks.is_empty() {
            return None;
        }
        let types = arguments.iter().map(|Argument { ty, .. }| ty);
        let is_generic = depends_on_parameters(self.handler, &quote!(#(#types)*));
        let checks = checks.iter().map(|check| match is_generic {
            true => quote_spanned!(here=> const { #check };),
            false => quote_spanned!(here=> const _: () = #check;),
        });
        Some(quote_spanned! {here=>
            {
                // Unused where each argument is a `Tx`.
                #[allow(unused_imports)]
                use #p::transaction::Fallback as _;
                #(#checks)*
            }
        })
    }

    fn run(&self) -> TokenStream {
        let here = Span::mixed_site();
        let Self { private: p, last_type, .. } = self;
        let body = self.body();
        // Located at the name, where rustc says why a future is not `Send`.
        let name = at(&self.handler.signature.ident);
        let at_name = private(self.checked, name);
        let body = quote_spanned!(name=> #at_name::boxed(async move { #body }));
        // Located at the type, where rustc says that it is no response.
        let returns = at(self.returns);
        let at_returns = private(self.checked, returns);
        let expressions = argument_expressions(&self.checked.policy);
        if expressions.is_empty() {
            let passed = quote_spanned!(here=> __idem, __policy, move |__last: #last_type| #body);
            return quote_spanned!(returns=> #at_returns::run(#passed).await);
        }
        let arguments = self.arguments(&expressions);
        let passed =
            quote_spanned!(here=> __call, __arguments, __last, move |__last: #last_type| #body);
        let run = quote_spanned!(returns=> #at_returns::run_parsed(#passed).await);
        quote_spanned! {here=>
            let (__call, __last) = match #p::parse(__idem, __policy).await {
                ::core::result::Result::Ok(__parsed) => __parsed,
                ::core::result::Result::Err(__answer) => return __answer,
            };
            #arguments
            #run
        }
    }

    /// The values of all `arg(..)`, read before the next await: nothing stays
    /// borrowed across it, so extractors need not be `Sync`.
    ///
    /// The expressions stand in a closure, so that rustc refuses `.await` and
    /// `?` in them as it does in any other.
    fn arguments(&self, expressions: &[&Expr]) -> TokenStream {
        let here = Span::mixed_site();
        let p = self.private;
        let last = Ident::new("__last", here);
        let patterns =
            self.handler.arguments.iter().map(|extractor| by_reference(&extractor.pattern));
        let values = self.names.iter().chain([&last]);
        let pushes = expressions.iter().map(|expression| {
            let borrowed = borrowed(expression);
            quote_spanned!(at(expression)=> __arguments.push(#borrowed);)
        });
        quote_spanned! {here=>
            let mut __arguments = #p::Arguments::new();
            {
                #[allow(unused_variables)]
                let __collect = |__arguments: &mut #p::Arguments| {
                    #(let #patterns = &#values;)*
                    #(#pushes)*
                };
                __collect(&mut __arguments);
            }
        }
    }

    /// What the engine runs: the arguments taken apart, then the user's block.
    ///
    /// All arguments move in: what a `_` stands for, such as a permit, lives as
    /// long as the body. The block stays a block, so that items may begin it.
    fn body(&self) -> TokenStream {
        let here = Span::mixed_site();
        let Self { names, handler, .. } = self;
        let inference = inference(&handler.returns);
        let arguments = handler.last().map(|_| {
            let bindings = self.handler.arguments.iter().enumerate().filter_map(binding);
            let used = used(&handler.arguments, &argument_expressions(&self.checked.policy));
            quote_spanned! {here=>
                let __args = (#(#names,)* __last,);
                #(#bindings)*
                #(let _ = &#used;)*
            }
        });
        let block = &handler.body;
        quote_spanned! {here=>
            #inference
            #arguments
            #[allow(unused_braces)]
            #block
        }
    }
}

impl Returns {
    fn ty(&self) -> &Type {
        let (Self::Named(ty) | Self::Opaque(ty)) = self;
        ty
    }
}

/// A reference to a constant. An item's is evaluated by `cargo check`, an inline one only by a build;
/// but only the latter may depend on the type parameters.
fn constant(handler: &CheckedHandler, ty: &TokenStream, value: &TokenStream) -> TokenStream {
    let here = Span::mixed_site();
    if depends_on_parameters(handler, value) {
        return quote_spanned!(here=> &const { #value });
    }
    // Named in a block of its own: an item of ours would shadow the user's.
    quote_spanned! {here=>
        {
            const __IDEM_POLICY: #ty = #value;
            &__IDEM_POLICY
        }
    }
}

/// Whether an item, which sees no type parameters, cannot say this.
fn depends_on_parameters(handler: &CheckedHandler, tokens: &TokenStream) -> bool {
    let parameters = &handler.signature.generics.params;
    mentions(tokens, "Self")
        || parameters.iter().filter_map(name_of).any(|name| mentions(tokens, &name))
}

/// `&(expression)`, from the first to the last token of the expression, which rustc joins where it
/// says that the value will not do.
fn borrowed(expression: &Expr) -> TokenStream {
    let mut group = Group::new(Delimiter::Parenthesis, expression.to_token_stream());
    group.set_span(at_end(expression));
    quote_spanned!(at(expression)=> & #group)
}

/// Tells rustc the type of the block before it meets the first `?`.
fn inference(returns: &Returns) -> Option<TokenStream> {
    let Returns::Named(returns) = returns else {
        return None;
    };
    // Located at the type, where rustc says what it inferred.
    Some(quote_spanned! {at(returns)=>
        #[allow(
            unreachable_code,
            clippy::diverging_sub_expression,
            clippy::empty_loop,
            clippy::let_unit_value,
            clippy::let_with_type_underscore,
            clippy::needless_return,
        )]
        if false {
            let __never: #returns = loop {};
            return __never;
        }
    })
}

/// The anchor's expressions, then the scope's: the runtime counts on it.
fn argument_expressions(policy: &Policy) -> Vec<&Expr> {
    let scope = match &policy.scope {
        Some(Scope::Parts(parts)) => &parts[..],
        Some(Scope::Global) | None => &[],
    };
    policy
        .anchor
        .iter()
        .chain(scope)
        .filter_map(|part| match part {
            Part::Argument(expression) => Some(expression),
            _ => None,
        })
        .collect()
}

/// Bindings that an `arg(..)` reads are used, even if the body forgets them.
fn used(arguments: &[Argument], expressions: &[&Expr]) -> Vec<Ident> {
    let expressions = quote!(#(#expressions)*);
    let mut bindings = Bindings(Vec::new());
    for argument in arguments {
        bindings.visit_pat(&argument.pattern);
    }
    let mut bindings = bindings.0;
    bindings.retain(|name| mentions(&expressions, &name.to_string()));
    bindings
}

/// The body may finish after the request is gone.
fn outlive_the_request(generics: &mut Generics) {
    let here = Span::mixed_site();
    let mut predicates: Vec<WherePredicate> = Vec::new();
    for parameter in generics.type_params_mut() {
        // Bounds in both places would be a complaint of clippy's.
        if parameter.bounds.is_empty() {
            let name = &parameter.ident;
            predicates.push(syn::parse_quote_spanned!(here=> #name: 'static));
        } else {
            parameter.bounds.push(syn::parse_quote_spanned!(here=> 'static));
        }
    }
    if !predicates.is_empty() {
        let clause = generics.make_where_clause();
        clause.predicates.extend(predicates);
    }
}

/// One `let` for each argument, so that rustc can point at its pattern.
fn binding((index, extractor): (usize, &Argument)) -> Option<TokenStream> {
    let Argument { attributes, pattern, .. } = extractor;
    // It would bind nothing, and several lints ask for a reason.
    if matches!(pattern, Pat::Wild(_)) {
        return None;
    }
    let field = Index::from(index);
    Some(quote_spanned! {Span::mixed_site()=>
        #(#attributes)*
        let #pattern = __args.#field;
    })
}

fn name_of(parameter: &GenericParam) -> Option<String> {
    match parameter {
        GenericParam::Type(parameter) => Some(parameter.ident.to_string()),
        GenericParam::Const(parameter) => Some(parameter.ident.to_string()),
        GenericParam::Lifetime(_) => None,
    }
}

fn mentions(tokens: &TokenStream, name: &str) -> bool {
    tokens.clone().into_iter().any(|token| match token {
        TokenTree::Ident(ident) => ident == name,
        TokenTree::Group(group) => mentions(&group.stream(), name),
        TokenTree::Punct(_) | TokenTree::Literal(_) => false,
    })
}

/// The pattern for a reference to what it was written for: `mut` and `ref`
/// are refused there.
fn by_reference(pattern: &Pat) -> Pat {
    struct Strip;
    impl VisitMut for Strip {
        fn visit_pat_ident_mut(&mut self, pattern: &mut PatIdent) {
            pattern.by_ref = None;
            pattern.mutability = None;
            visit_mut::visit_pat_ident_mut(self, pattern);
        }
    }
    let mut pattern = pattern.clone();
    Strip.visit_pat_mut(&mut pattern);
    pattern
}

struct Bindings(Vec<Ident>);

impl Visit<'_> for Bindings {
    fn visit_pat_ident(&mut self, pattern: &PatIdent) {
        self.0.push(pattern.ident.clone());
        visit::visit_pat_ident(self, pattern);
    }
}
