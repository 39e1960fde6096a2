//! `#[derive(AnchorValue)]`: the fields of a struct, in their order.

use proc_macro2::{Span, TokenStream};
use quote::quote_spanned;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{
    Attribute, Data, DeriveInput, Error, Field, Fields, Generics, Ident, Index, Member, Path,
    Result, TypePath,
};

pub(crate) fn anchor_value(item: TokenStream) -> TokenStream {
    syn::parse2(item)
        .and_then(|input| implementation(&input))
        .unwrap_or_else(Error::into_compile_error)
}

fn implementation(input: &DeriveInput) -> Result<TokenStream> {
    let krate = krate(&input.attrs)?;
    let fields = fields(input)?;

    let mut generics = input.generics.clone();
    bound(&mut generics, fields, &krate);
    let (parameters, arguments, conditions) = generics.split_for_impl();

    let name = &input.ident;
    let here = Span::mixed_site();
    let writes = fields.iter().enumerate().map(|(index, field)| {
        let member = member(index, field);
        let ty = &field.ty;
        let at = here.located_at(ty.span());
        quote_spanned!(at=> <#ty as #krate::AnchorValue>::write(&self.#member, __values);)
    });
    Ok(quote_spanned! {here=>
        impl #parameters #krate::AnchorValue for #name #arguments #conditions {
            fn write(&self, __values: &mut #krate::Values) {
                #(#writes)*
            }
        }
    })
}

fn krate(attributes: &[Attribute]) -> Result<Path> {
    let mut krate = None;
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("anchor")) {
        attribute.parse_nested_meta(|meta| {
            if !meta.path.is_ident("crate") {
                return Err(meta.error("expected `crate = path::to::idem_runtime`"));
            }
            if krate.is_some() {
                return Err(meta.error("option `crate` given twice"));
            }
            krate = Some(meta.value()?.call(Path::parse_mod_style)?);
            Ok(())
        })?;
    }
    let default = || syn::parse_quote_spanned!(Span::mixed_site()=> ::idem_runtime);
    Ok(krate.unwrap_or_else(default))
}

fn fields(input: &DeriveInput) -> Result<&Fields> {
    let (at, reason) = match &input.data {
        Data::Struct(data) if !data.fields.is_empty() => return Ok(&data.fields),
        Data::Struct(_) => (
            input.ident.span(),
            "a struct without fields is the same in every request: it cannot tell two keys apart",
        ),
        Data::Enum(data) => (
            data.enum_token.span,
            "`AnchorValue` is derived for structs only: what tells the variants of an enum apart is its author's decision, so implement the trait by hand",
        ),
        Data::Union(data) => (
            data.union_token.span,
            "`AnchorValue` is derived for structs only: which field of a union holds cannot be known",
        ),
    };
    Err(Error::new(at, reason))
}

fn member(index: usize, field: &Field) -> Member {
    match &field.ident {
        Some(name) => Member::Named(name.clone()),
        None => Member::Unnamed(Index::from(index)),
    }
}

/// Bounds the type parameters that a field holds, and leaves alone those that
/// only mark the type, as in `Id<T>(u64, PhantomData<T>)`.
fn bound(generics: &mut Generics, fields: &Fields, krate: &Path) {
    let mut held = Held(Vec::new());
    for field in fields {
        held.visit_type(&field.ty);
    }
    for parameter in generics.type_params_mut() {
        if held.0.contains(&parameter.ident) {
            parameter.bounds.push(syn::parse_quote!(#krate::AnchorValue));
        }
    }
}

/// The first words of all paths but those inside a `PhantomData`.
struct Held(Vec<Ident>);

impl Visit<'_> for Held {
    fn visit_type_path(&mut self, ty: &TypePath) {
        if ty.path.segments.last().is_some_and(|last| last.ident == "PhantomData") {
            return;
        }
        self.0.extend(ty.path.segments.first().map(|first| first.ident.clone()));
        visit::visit_type_path(self, ty);
    }
}
