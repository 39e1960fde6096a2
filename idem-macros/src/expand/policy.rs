//! The constant expression that builds a handler's policy.

use proc_macro2::{Delimiter, Group, Literal, Span, TokenStream};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::{ExprPath, Ident};

use super::{at, private};
use crate::check::{
    Checked, Fingerprint, Format, InFlight, OnUnknown, Part, Replay, Scheme, Scope, Text, Time, Ttl,
};

/// `Policy::new(…)` with one call for each thing said, in the order of the
/// documentation. `p` is the runtime's module.
pub(crate) fn tokens(checked: &Checked, p: &TokenStream) -> TokenStream {
    let here = Span::mixed_site();
    let policy = &checked.policy;
    let anchor = joined(&policy.anchor, "Anchor", p);
    let ttl = policy.ttl.as_ref().map(|ttl| match ttl {
        Ttl::Forever => quote_spanned!(here=> .forever()),
        Ttl::For(time) => duration("ttl", time),
    });
    let scope = policy.scope.as_ref().map(|scope| self::scope(scope, p));
    let space = policy.space.as_ref().map(|space| match space {
        Text::Literal(name) => quote_spanned!(here=> .space(#name)),
        Text::Constant(path) => quote_spanned!(here=> .space(#path)),
    });
    let format = policy.format.as_ref().map(|format| self::format(format, p));
    let optional = policy.optional.then(|| quote_spanned!(here=> .optional()));
    let fingerprint =
        policy.fingerprint.as_ref().map(|fingerprint| self::fingerprint(fingerprint, p));
    let record = policy.record.map(|variant| choice("record", "Recording", variant, p));
    let in_flight = policy.in_flight.as_ref().map(|in_flight| self::in_flight(in_flight, p));
    let on_unknown = policy.on_unknown.as_ref().map(|on_unknown| match on_unknown {
        OnUnknown::Rerun => choice("on_unknown", "OnUnknown", "Rerun", p),
        OnUnknown::Refuse => choice("on_unknown", "OnUnknown", "Refuse", p),
        OnUnknown::Recover(path) => asks("recover", "recovered", path, checked),
    });
    let admit = policy.admit.as_ref().map(|path| asks("admit", "admitted", path, checked));
    let lease = policy.lease.as_ref().map(|lease| duration("lease", lease));
    let replay = policy.replay.as_ref().map(|replay| self::replay(replay, p));
    let issued = policy.issued.then(|| quote_spanned!(here=> .issued()));
    let transaction = policy.transaction.as_ref().map(|_| quote_spanned!(here=> .transaction()));
    let refusals = policy.refusals.as_ref().map(|path| quote_spanned!(here=> .refusals(&#path)));
    let mode = policy.mode.map(|variant| choice("mode", "Mode", variant, p));
    let store_outage =
        policy.store_outage.map(|variant| choice("store_outage", "StoreOutage", variant, p));
    quote_spanned! {here=>
        #p::Policy::new(#anchor)
            #ttl #scope #space #format #optional #fingerprint #record #in_flight #on_unknown
            #admit #lease #replay #issued #transaction #refusals #mode #store_outage
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

fn choice(method: &str, of: &str, variant: &str, p: &TokenStream) -> TokenStream {
    let [method, of, variant] = [method, of, variant].map(name);
    quote_spanned!(Span::mixed_site()=> .#method(#p::#of::#variant))
}

fn in_flight(in_flight: &InFlight, p: &TokenStream) -> TokenStream {
    match in_flight {
        InFlight::Reject => choice("in_flight", "InFlight", "Reject", p),
        InFlight::Wait(time) => {
            let time = span_of_time(time);
            quote_spanned!(Span::mixed_site()=> .in_flight(#p::InFlight::Wait(#time)))
        }
    }
}

/// `.admit(|__request| boxed(admitted(path(__request))))`: the closure is a
/// plain function pointer, whatever future the user's function returns.
///
/// All of it stands at the function's name: what rustc may complain of there
/// (what it takes, what it returns, that its future is not `Send`), it does so
/// once, since it drops what it has already said of the same place.
fn asks(method: &str, adapter: &str, path: &ExprPath, checked: &Checked) -> TokenStream {
    let name = path.path.segments.last().map(|segment| &segment.ident);
    let there = at(name);
    let p = private(checked, there);
    let [method, adapter] = [method, adapter].map(|name| Ident::new(name, there));
    let request = Ident::new("__request", there);
    let called = in_parentheses(&request, there);
    let adapted = in_parentheses(quote!(#path #called), there);
    let boxed = in_parentheses(quote_spanned!(there=> #p::#adapter #adapted), there);
    quote_spanned!(there=> .#method(|#request| #p::boxed #boxed))
}

fn in_parentheses(tokens: impl ToTokens, place: Span) -> Group {
    let mut group = Group::new(Delimiter::Parenthesis, tokens.into_token_stream());
    group.set_span(place);
    group
}

fn replay(replay: &Replay, p: &TokenStream) -> TokenStream {
    let here = Span::mixed_site();
    let changes = match replay {
        Replay::Shape { status, merge } => {
            let status = status.map(|status| {
                let status = number(status.into());
                quote_spanned!(here=> .status(#p::status(#status)))
            });
            let merge = merge.as_ref().map(|object| {
                let object = Literal::string(object);
                quote_spanned!(here=> .merge(#object))
            });
            quote!(#status #merge)
        }
        Replay::Function(path) => quote_spanned!(at(path)=> .with(#path)),
    };
    quote_spanned!(here=> .replay(#p::ReplayShape::new() #changes))
}

/// Located at the constant, where rustc says that its value will not do.
fn span_of_time(time: &Time) -> TokenStream {
    match time {
        Time::Millis(millis) => {
            let millis = number(*millis);
            quote_spanned!(Span::mixed_site()=> ::core::time::Duration::from_millis(#millis))
        }
        Time::Constant(path) => constant(path),
    }
}

fn duration(method: &str, time: &Time) -> TokenStream {
    let here = Span::mixed_site();
    match time {
        Time::Millis(_) => {
            let (method, time) = (name(method), span_of_time(time));
            quote_spanned!(here=> .#method(#time))
        }
        Time::Constant(path) => {
            let place = at(path);
            let method = Ident::new(method, place);
            quote_spanned!(place=> .#method(#path))
        }
    }
}

fn constant(path: &ExprPath) -> TokenStream {
    quote_spanned!(Span::mixed_site()=> #path)
}

/// Without a suffix: the runtime decides how wide its integers are.
fn number(value: u64) -> Literal {
    Literal::u64_unsuffixed(value)
}

fn name(name: &str) -> Ident {
    format_ident!("{name}", span = Span::mixed_site())
}
