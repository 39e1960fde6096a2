//! What axum and the engine ask of a handler's signature.

use proc_macro2::{Ident, TokenStream, TokenTree};
use quote::ToTokens;
use syn::visit::{self, Visit};
use syn::{
    Attribute, FnArg, GenericParam, Lifetime, ParenthesizedGenericArguments, Pat, PatType,
    ReturnType, Safety, Signature, Type, TypeFnPtr, TypeImplTrait, TypeReference, Visibility,
};

use crate::errors::Errors;
use crate::handler::{self, Handler, Kind};

/// A function that the engine can wrap, and axum or other code call.
pub(crate) struct Checked {
    pub(crate) attributes: Vec<Attribute>,
    pub(crate) visibility: Visibility,
    /// Without its arguments and its return type.
    pub(crate) signature: Signature,
    pub(crate) arguments: Vec<Argument>,
    pub(crate) returns: Returns,
    pub(crate) body: TokenTree,
    pub(crate) undecorated: TokenStream,
}

/// One argument, of a handler an extractor.
pub(crate) struct Argument {
    /// Lint levels; nothing else may stand on an argument.
    pub(crate) attributes: Vec<Attribute>,
    pub(crate) pattern: Pat,
    pub(crate) ty: Type,
}

pub(crate) enum Returns {
    Named(Type),
    /// Says `impl Trait` somewhere, so it cannot be written a second time.
    Opaque(Type),
}

const NO_LIFETIMES: &str = "handlers cannot have lifetime parameters: they may finish after the request is gone, so what they take is owned or `'static`";

/// axum implements `Handler` for functions of up to so many arguments.
const MOST_ARGUMENTS: usize = 16;

const TAKES_THE_BODY: [&str; 8] =
    ["Body", "Bytes", "Form", "Json", "Multipart", "RawForm", "Request", "String"];

const LEAVES_THE_BODY: [&str; 14] = [
    "ConnectInfo",
    "Extension",
    "HeaderMap",
    "Host",
    "MatchedPath",
    "Method",
    "OriginalUri",
    "Path",
    "Query",
    "RawQuery",
    "State",
    "TypedHeader",
    "Uri",
    "Version",
];

pub(crate) fn check(handler: Handler, errors: &mut Errors) -> Checked {
    let Handler { attributes, visibility, mut signature, body, undecorated } = handler;

    once(&attributes, errors);
    qualifiers(&signature, errors);
    for parameter in &signature.generics.params {
        if let GenericParam::Lifetime(lifetime) = parameter {
            errors.at(lifetime, NO_LIFETIMES);
        }
    }

    let inputs = std::mem::take(&mut signature.inputs);
    if let Some(seventeenth) = inputs.iter().nth(MOST_ARGUMENTS) {
        errors.at(seventeenth, format!("axum handlers take at most {MOST_ARGUMENTS} extractors: gather some of them in a struct with `#[derive(FromRequestParts)]`"));
    }
    let count = inputs.len();
    let mut arguments = Vec::with_capacity(count);
    for (index, input) in inputs.into_iter().enumerate() {
        match input {
            FnArg::Receiver(receiver) => errors.at(
                receiver.self_token,
                "`#[idempotent]` handlers cannot take `self`: axum calls them with extractors only; take `State<_>` instead, or say where the engine of a plain function is, as in `engine = arg(self.idem)`",
            ),
            FnArg::Typed(argument) => {
                arguments.push(extractor(argument, index + 1 == count, errors));
            }
        }
    }
    let returns = returns(&mut signature);
    Checked { attributes, visibility, signature, arguments, returns, body, undecorated }
}

pub(super) fn once(attributes: &[Attribute], errors: &mut Errors) {
    for attribute in attributes {
        if handler::kind(attribute.path()) == Kind::Idempotent {
            errors.at(
                attribute,
                "`#[idempotent]` given twice: a function has one policy, leave out one of them",
            );
        }
    }
}

/// Takes the return type out of the signature.
pub(super) fn returns(signature: &mut Signature) -> Returns {
    match std::mem::replace(&mut signature.output, ReturnType::Default) {
        // Where it would stand.
        ReturnType::Default => {
            Returns::Named(syn::parse_quote_spanned!(signature.paren_token.span.close()=> ()))
        }
        ReturnType::Type(_, ty) if says_impl(&ty) => Returns::Opaque(*ty),
        ReturnType::Type(_, ty) => Returns::Named(*ty),
    }
}

fn qualifiers(signature: &Signature, errors: &mut Errors) {
    if signature.asyncness.is_none() {
        errors.at(signature.fn_token, "`#[idempotent]` handlers must be `async fn`");
    }
    if let Safety::Unsafe(word) = &signature.safety {
        errors
            .at(word, "axum cannot call an `unsafe fn`: keep the unsafe block inside the handler");
    }
    if let Some(abi) = &signature.abi {
        errors.at(abi, "axum calls handlers by Rust's own ABI: leave out `extern`");
    }
}

impl Argument {
    pub(super) fn of(argument: PatType, errors: &mut Errors) -> Self {
        let PatType { attrs: attributes, pat, ty, .. } = argument;
        for attribute in attributes.iter().filter(|attribute| !handler::sets_lint_level(attribute))
        {
            errors.at(
                attribute,
                "attributes on an argument get lost when it is wrapped: only lint levels, such as `#[allow(..)]`, may stand here",
            );
        }
        Self { attributes, pattern: *pat, ty: *ty }
    }
}

fn extractor(argument: PatType, is_last: bool, errors: &mut Errors) -> Argument {
    let argument = Argument::of(argument, errors);
    let ty = &argument.ty;
    TypeOfArgument { errors }.visit_type(ty);

    if let Some(name) = handler::hint(ty) {
        if name == "WebSocketUpgrade" {
            errors.at(
                ty,
                "a WebSocket upgrade cannot be recorded and replayed: leave out `#[idempotent]`",
            );
        } else if !is_last && one_of(&TAKES_THE_BODY, name) {
            errors.at(
                ty,
                format!("`{name}` consumes the request body and must be the last argument"),
            );
        }
    }
    argument
}

/// Reports what keeps a type from being named, owned and `'static`.
struct TypeOfArgument<'a> {
    errors: &'a mut Errors,
}

impl Visit<'_> for TypeOfArgument<'_> {
    fn visit_type_impl_trait(&mut self, ty: &TypeImplTrait) {
        self.errors.at(ty, "`impl Trait` arguments are not supported: name the extractor's type");
    }

    fn visit_type_reference(&mut self, ty: &TypeReference) {
        if ty.lifetime.as_ref().is_some_and(|lifetime| lifetime.ident == "static") {
            return visit::visit_type_reference(self, ty);
        }
        self.errors.at(ty, "handlers take owned extractors, not references: leave out the `&`, and take `String` for `&str`");
    }

    fn visit_lifetime(&mut self, lifetime: &Lifetime) {
        if lifetime.ident == "_" {
            self.errors.at(lifetime, NO_LIFETIMES);
        }
    }

    // References in these belong to whoever calls the function, not to it.
    fn visit_type_fn_ptr(&mut self, _: &TypeFnPtr) {}
    fn visit_parenthesized_generic_arguments(&mut self, _: &ParenthesizedGenericArguments) {}
}

fn says_impl(ty: &Type) -> bool {
    struct SaysImpl(bool);
    impl Visit<'_> for SaysImpl {
        fn visit_type_impl_trait(&mut self, _: &TypeImplTrait) {
            self.0 = true;
        }
    }
    let mut found = SaysImpl(false);
    found.visit_type(ty);
    found.0
}

fn one_of(names: &[&str], ident: &Ident) -> bool {
    names.iter().any(|name| ident == name)
}

impl Checked {
    pub(crate) fn last(&self) -> Option<&Argument> {
        self.arguments.last()
    }

    /// All arguments but the last.
    pub(crate) fn earlier(&self) -> &[Argument] {
        self.arguments.split_last().map_or(&[], |(_, earlier)| earlier)
    }

    /// Complains if a field of the body is named and there is no body.
    ///
    /// A hint by well-known names: an extractor that is not known passes, and
    /// what it does is seen at run time.
    pub(crate) fn has_fields(&self, word: impl ToTokens, errors: &mut Errors) {
        let shown = word.to_token_stream().to_string();
        let needs = format!("`{shown}(..)` needs a handler that takes the body");
        let Some(last) = self.last() else {
            errors.at(word, format!("{needs}: this one takes no arguments"));
            return;
        };
        let Some(name) = handler::hint(&last.ty) else {
            return;
        };
        if one_of(&LEAVES_THE_BODY, name) {
            errors.at(
                word,
                format!(
                    "{needs}: its last argument is not a body extractor (`Json<_>`, `Form<_>`, ...)"
                ),
            );
        } else if name == "Multipart" {
            errors.at(
                word,
                "multipart fields cannot be an anchor, a scope or a fingerprint: use a header instead",
            );
        }
    }

    /// Whether another attribute macro waits below ours and must run first.
    pub(crate) fn runs_first(&self, attribute: &Attribute) -> bool {
        match handler::kind(attribute.path()) {
            Kind::Macro => true,
            // Without arguments it would find a call with one too few.
            Kind::DebugHandler => self.last().is_some(),
            Kind::Inert | Kind::Idempotent => false,
        }
    }
}
