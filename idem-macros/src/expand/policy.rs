//! The constant expression that builds a handler's policy.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote_spanned};
use syn::{ExprPath, Ident};

use crate::check::{Fingerprint, Format, Part, Policy, Scheme, Scope, Text, Time, Ttl, Variant};

/// `Policy::new(…)` with one call for each thing said, in the order of the
/// documentation. `p` is the runtime's module.
pub(crate) fn tokens(policy: &Policy, p: &TokenStream) -> TokenStream {
    let here = Span::mixed_site();
    let anchor = joined(&policy.anchor, "Anchor", p);
    let scope = policy.scope.as_ref().map(|scope| self::scope(scope, p));
    let ttl = policy.ttl.as_ref().map(|ttl| match ttl {
        Ttl::Forever => quote_spanned!(here=> .forever()),
        Ttl::For(time) => duration("ttl", time),
    });
    let space = policy.space.as_ref().map(|space| match space {
        Text::Literal(name) => quote_spanned!(here=> .space(#name)),
        Text::Constant(path) => quote_spanned!(here=> .space(#path)),
    });
    let format = policy.format.as_ref().map(|format| self::format(format, p));
    let optional = policy.optional.then(|| quote_spanned!(here=> .optional()));
    let fingerprint =
        policy.fingerprint.as_ref().map(|fingerprint| self::fingerprint(fingerprint, p));
    let lease = policy.lease.as_ref().map(|lease| duration("lease", lease));
    let refusals = policy.refusals.as_ref().map(|path| quote_spanned!(here=> .refusals(&#path)));
    let choices = [
        ("record", "Recording", policy.record),
        ("in_flight", "InFlight", policy.in_flight),
        ("on_unknown", "OnUnknown", policy.on_unknown),
        ("mode", "Mode", policy.mode),
        ("store_outage", "StoreOutage", policy.store_outage),
    ]
    .map(|(method, of, variant)| choice(method, of, variant, p));
    quote_spanned! {here=>
        #p::Policy::new(#anchor)
            #ttl #scope #space #format #optional #fingerprint
            #(#choices)* #lease #refusals
    }
}

/// One part as it is, several as a list of parts.
fn joined(parts: &[Part], of: &str, p: &TokenStream) -> TokenStream {
    let here = Span::mixed_site();
    let of = name(of);
    let tokens: Vec<TokenStream> = parts.iter().map(|part| self::part(part, &of, p)).collect();
    match &tokens[..] {
        [one] => one.clone(),
        several => quote_spanned!(here=> #p::#of::all(&[#(#several),*])),
    }
}

fn part(part: &Part, of: &Ident, p: &TokenStream) -> TokenStream {
    let here = Span::mixed_site();
    match part {
        Part::Header(name) => quote_spanned!(here=> #p::#of::header(#name)),
        Part::BodyField(path) => quote_spanned!(here=> #p::#of::body_field(#path)),
        Part::Path(name) => quote_spanned!(here=> #p::#of::path(#name)),
        Part::Query(name) => quote_spanned!(here=> #p::#of::query(#name)),
        Part::Argument(_) => quote_spanned!(here=> #p::#of::argument()),
        Part::Constant(path) => constant(path),
    }
}

fn scope(scope: &Scope, p: &TokenStream) -> TokenStream {
    let here = Span::mixed_site();
    let scope = match scope {
        Scope::Global => quote_spanned!(here=> #p::Scope::global()),
        Scope::Parts(parts) => joined(parts, "Scope", p),
    };
    quote_spanned!(here=> .scope(#scope))
}

fn format(format: &Format, p: &TokenStream) -> TokenStream {
    let here = Span::mixed_site();
    let format = match format {
        Format::Uuid => quote_spanned!(here=> #p::Format::Uuid),
        Format::Hex(bytes) => {
            let bytes = number((*bytes).into());
            quote_spanned!(here=> #p::Format::Hex(#bytes))
        }
        Format::Text { min, max } => {
            let (min, max) = (number((*min).into()), number((*max).into()));
            quote_spanned!(here=> #p::Format::text(#min ..= #max))
        }
        Format::Constant(path) => constant(path),
    };
    quote_spanned!(here=> .format(#format))
}

fn fingerprint(fingerprint: &Fingerprint, p: &TokenStream) -> TokenStream {
    let here = Span::mixed_site();
    let scheme = match &fingerprint.scheme {
        Scheme::Request => quote_spanned!(here=> #p::FingerprintScheme::request()),
        Scheme::Json => quote_spanned!(here=> #p::FingerprintScheme::json()),
        Scheme::None => quote_spanned!(here=> #p::FingerprintScheme::none()),
        Scheme::Fields(paths) => {
            quote_spanned!(here=> #p::FingerprintScheme::body_fields(&[#(#paths),*]))
        }
        Scheme::Exclude(paths) => {
            quote_spanned!(here=> #p::FingerprintScheme::exclude(&[#(#paths),*]))
        }
        Scheme::Constant(path) => constant(path),
    };
    let headers = &fingerprint.headers;
    if headers.is_empty() {
        return quote_spanned!(here=> .fingerprint(#scheme));
    }
    quote_spanned!(here=> .fingerprint(#scheme.headers(&[#(#headers),*])))
}

fn choice(
    method: &str,
    of: &str,
    variant: Option<Variant>,
    p: &TokenStream,
) -> Option<TokenStream> {
    let [method, of, variant] = [method, of, variant?].map(name);
    Some(quote_spanned!(Span::mixed_site()=> .#method(#p::#of::#variant)))
}

/// Located at the constant, where rustc says that its value will not do.
fn duration(method: &str, time: &Time) -> TokenStream {
    let here = Span::mixed_site();
    match time {
        Time::Millis(millis) => {
            let (method, millis) = (name(method), number(*millis));
            quote_spanned!(here=> .#method(::core::time::Duration::from_millis(#millis)))
        }
        Time::Constant(path) => {
            let place = super::at(path);
            let method = Ident::new(method, place);
            quote_spanned!(place=> .#method(#path))
        }
    }
}

fn constant(path: &ExprPath) -> TokenStream {
    quote_spanned!(Span::mixed_site()=> #path)
}

/// Without a suffix: the runtime decides how wide its integers are.
fn number(value: u64) -> proc_macro2::Literal {
    proc_macro2::Literal::u64_unsuffixed(value)
}

fn name(name: &str) -> Ident {
    format_ident!("{name}", span = Span::mixed_site())
}
