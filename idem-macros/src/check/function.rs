//! Plain functions: which they are, and what the engine asks of them.

use proc_macro2::{Ident, TokenStream, TokenTree};
use quote::ToTokens;
use syn::visit::{self, Visit};
use syn::{
    Expr, ExprPath, FnArg, GenericParam, Lifetime, ParenthesizedGenericArguments, Receiver, Result,
    Safety, Signature, Type, TypeFnPtr, TypeReference,
};

use super::signature::{self, Argument, Checked, Returns};
use super::value::{self, error};
use crate::args::{Args, Said, Term};
use crate::errors::Errors;
use crate::handler::{self, Handler};

/// What an attribute says of a plain function beside its policy.
pub(crate) struct Function {
    pub(crate) receiver: Option<Receiver>,
    pub(crate) engine: Engine,
    /// The name under which the body finds its operation.
    pub(crate) operation: Option<Ident>,
    pub(crate) nothing_happened: Option<ExprPath>,
    /// What the fingerprint covers.
    pub(crate) compared: Vec<Expr>,
}

/// Where the engine is.
pub(crate) enum Engine {
    /// The argument of this number.
    Argument(usize),
    Expression(Box<Expr>),
}

/// Whether it is a function that is called by other code than axum.
///
/// Extractors are never references. A reference may be a slip in a handler all the same, and where
/// the anchor reads a request it is: unless it is called as the engine is, whoever wrote it is told
/// what holds for handlers. Either way it does not compile, so a name decides no more than which
/// mistake is named.
pub(super) fn is_one(args: &Args, handler: &Handler) -> bool {
    if says_engine(args) {
        return true;
    }
    let of_arguments = args.anchor.as_ref().is_some_and(|said| only_arguments(&said.value));
    handler.signature.inputs.iter().any(|input| match input {
        FnArg::Typed(argument) => {
            reference(&argument.ty).is_some_and(|referred| of_arguments || is_engine(referred))
        }
        FnArg::Receiver(_) => false,
    })
}

fn says_engine(args: &Args) -> bool {
    matches!(&args.engine, Some(Said { value: Term::Arguments(..), .. }))
}

fn only_arguments(anchor: &Term) -> bool {
    match anchor {
        Term::Arguments(..) => true,
        Term::Tuple(_, terms) => !terms.is_empty() && terms.iter().all(only_arguments),
        _ => false,
    }
}

/// What a type that is a reference refers to.
pub(crate) fn reference(ty: &Type) -> Option<&TypeReference> {
    match ty {
        Type::Reference(reference) => Some(reference),
        Type::Group(group) => reference(&group.elem),
        Type::Paren(paren) => reference(&paren.elem),
        _ => None,
    }
}

fn is_engine(reference: &TypeReference) -> bool {
    handler::hint(&reference.elem).is_some_and(|name| name == "Idempotency")
}

/// Takes what only functions say out of the options, and refuses what only handlers can.
pub(super) fn check(
    args: &mut Args,
    handler: Handler,
    errors: &mut Errors,
) -> Option<(Checked, Function)> {
    refuse_what_reads_requests(args, errors);
    methods_name_a_space(args, &handler, errors);
    let says_engine = says_engine(args);
    let expression = args.engine.take().map(|said| errors.keep(engine(&said)));
    let operation = super::read(args.operation.take(), errors, operation);
    let nothing_happened = super::read(args.nothing_happened.take(), errors, |key, term| {
        value::function(key, term, "fn(&E) -> bool")
    });
    let compared = args.fingerprint.take().map(|said| compared(&said.value, errors));

    let (checked, receiver, argument) = signature(handler, says_engine, errors);
    let engine = match expression {
        Some(expression) => Engine::Expression(Box::new(expression?)),
        None => Engine::Argument(argument?),
    };
    let compared = compared.unwrap_or_default();
    Some((checked, Function { receiver, engine, operation, nothing_happened, compared }))
}

/// Options that have no meaning without a request, or have another name here.
fn refuse_what_reads_requests(args: &mut Args, errors: &mut Errors) {
    let mut refuse = |key: Option<Ident>, why: &str| {
        if let Some(key) = key {
            errors.at(&key, why);
        }
    };
    refuse(
        args.optional.take().map(|said| said.key),
        "the key of a plain function is in its arguments, which are always there: leave `optional` out",
    );
    refuse(
        args.record.take().map(|said| said.key),
        "`record` chooses by status: of a plain function an `Ok` is recorded, and an `Err` is not; to record an error for good, return it as a value, in `Ok(Err(..))`",
    );
    refuse(
        args.admit.take().map(|said| said.key),
        "`admit` asks about a request, which a plain function has not: ask in its body, and say by `nothing_happened` that an error of this kind came before any effect",
    );
    refuse(
        args.replay.take().map(|said| said.key),
        "`replay` shapes a response: the caller of a plain function can do with its value what it likes",
    );
    refuse(
        args.issued.take().map(|said| said.key),
        "`issued` is for keys that clients bring back: a plain function takes its key from its arguments",
    );
    refuse(
        args.transaction.take().map(|said| said.key),
        "`transaction` is for handlers, which take a `Tx`: of a plain function an attempt that died is an unknown outcome",
    );
    refuse(
        args.refusals.take().map(|said| said.key),
        "`refusals` shapes responses: a plain function says it by its error, which implements `From<CallError>`",
    );
    refuse(
        args.state.take().map(|said| said.key),
        "`state` is a router's: the engine of a plain function is its first reference, or `engine = arg(..)` says where it is",
    );
}

/// `module_path!()` knows no types: without a space, two methods of one name would share their keys.
fn methods_name_a_space(args: &Args, handler: &Handler, errors: &mut Errors) {
    let signature = &handler.signature;
    let is_method =
        signature.receiver().is_some() || says_self(&signature.inputs) || says_self(&handler.body);
    if is_method && !args.mentions("space") {
        let name = &signature.ident;
        let message = format!(
            "a method needs `space = \"...\"`: keys are unique within module and name, and another type may have a `{name}` too"
        );
        errors.at(name, message);
    }
}

fn says_self(tokens: impl ToTokens) -> bool {
    fn says(tokens: TokenStream) -> bool {
        tokens.into_iter().any(|token| match token {
            TokenTree::Ident(word) => word == "Self",
            TokenTree::Group(group) => says(group.stream()),
            TokenTree::Punct(_) | TokenTree::Literal(_) => false,
        })
    }
    says(tokens.into_token_stream())
}

fn engine(said: &Said<Term>) -> Result<Expr> {
    match &said.value {
        Term::Arguments(_, expressions) if expressions.len() == 1 => Ok(expressions[0].clone()),
        Term::Arguments(word, _) => {
            error(word, "one engine is needed, as in `engine = arg(self.idem)`")
        }
        _ => error(
            &said.key,
            "the engine of a plain function is its first reference, or where `engine = arg(..)` says: `state` and `extension` are a router's",
        ),
    }
}

fn operation(key: &Ident, term: &Term) -> Result<Ident> {
    match term {
        Term::Word(word) => Ok(word.clone()),
        _ => error(term, format!("`{key}` takes a name for the body to use, as in `{key} = op`")),
    }
}

fn compared(term: &Term, errors: &mut Errors) -> Vec<Expr> {
    match term {
        Term::Word(word) if word == "none" => Vec::new(),
        Term::Arguments(word, expressions) if expressions.is_empty() => {
            errors.at(
                word,
                "`arg(..)` takes expressions over the function's arguments, as in `arg(amount)`",
            );
            Vec::new()
        }
        Term::Arguments(_, expressions) => {
            let text = |expression: &Expr| expression.to_token_stream().to_string();
            for (index, expression) in expressions.iter().enumerate() {
                if expressions[..index].iter().any(|other| text(other) == text(expression)) {
                    errors.at(expression, "the same argument twice");
                }
            }
            expressions.clone()
        }
        _ => {
            errors.at(
                term,
                "a plain function has no request to compare: `fingerprint` takes `arg(..)`, the arguments that make two calls the same, or `none`",
            );
            Vec::new()
        }
    }
}

/// Also says which argument is the engine, if one is.
fn signature(
    handler: Handler,
    says_engine: bool,
    errors: &mut Errors,
) -> (Checked, Option<Receiver>, Option<usize>) {
    let Handler { attributes, visibility, mut signature, body, undecorated } = handler;
    signature::once(&attributes, errors);
    qualifiers(&signature, errors);
    for parameter in &signature.generics.params {
        if let GenericParam::Lifetime(lifetime) = parameter {
            errors.at(lifetime, BORROWED);
        }
    }
    let (mut receiver, mut found) = (None, None);
    let mut arguments = Vec::new();
    for input in std::mem::take(&mut signature.inputs) {
        let argument = match input {
            FnArg::Receiver(it) => {
                if it.to_token_stream().into_iter().any(|token| token.to_string() == "&") {
                    errors.at(&it, format!("{BORROWED}: take `self: Arc<Self>`, and say where the engine is, as in `engine = arg(self.idem)`"));
                }
                receiver = Some(it);
                continue;
            }
            FnArg::Typed(argument) => Argument::of(argument, errors),
        };
        match reference(&argument.ty) {
            Some(reference) if found.is_none() && !says_engine => {
                found = Some(arguments.len());
                if let Some(word) = &reference.mutability {
                    errors.at(word, "the engine is shared: take `&Idempotency`");
                }
            }
            Some(reference) if is_engine(reference) && says_engine => {
                errors.at(
                    reference,
                    "where the engine is, is said twice: leave out this argument, or `engine = arg(..)`",
                );
            }
            _ => Owned { errors }.visit_type(&argument.ty),
        }
        arguments.push(argument);
    }
    let returns = signature::returns(&mut signature);
    if let Returns::Opaque(ty) = &returns {
        errors.at(ty, "a value of a type without a name cannot be recorded: say which it is");
    }
    let checked =
        Checked { attributes, visibility, signature, arguments, returns, body, undecorated };
    (checked, receiver, found)
}

fn qualifiers(signature: &Signature, errors: &mut Errors) {
    if signature.asyncness.is_none() {
        errors.at(signature.fn_token, "`#[idempotent]` functions must be `async fn`");
    }
    if let Safety::Unsafe(word) = &signature.safety {
        errors.at(
            word,
            "a call that is replayed runs nothing: keep the unsafe block inside the function",
        );
    }
    if let Some(abi) = &signature.abi {
        errors.at(abi, "an `async fn` is called by Rust's own ABI: leave out `extern`");
    }
}

const BORROWED: &str = "a plain function may finish after its caller has gone (a time-out or a `select!` drops it), so it borrows nothing but the engine";

/// Reports what keeps an argument from being owned.
struct Owned<'a> {
    errors: &'a mut Errors,
}

impl Visit<'_> for Owned<'_> {
    fn visit_type_reference(&mut self, ty: &TypeReference) {
        if ty.lifetime.as_ref().is_some_and(|lifetime| lifetime.ident == "static") {
            return visit::visit_type_reference(self, ty);
        }
        self.errors.at(ty, format!("{BORROWED}: take `String` for `&str`, `Arc<T>` for `&T`"));
    }

    fn visit_lifetime(&mut self, lifetime: &Lifetime) {
        if lifetime.ident == "_" {
            self.errors.at(lifetime, BORROWED);
        }
    }

    // References in these belong to whoever calls the function, not to it.
    fn visit_type_fn_ptr(&mut self, _: &TypeFnPtr) {}
    fn visit_parenthesized_generic_arguments(&mut self, _: &ParenthesizedGenericArguments) {}
}
