//! Generated code in places that are hard on it.

use axum::routing;

use crate::support::{answers_and_replays, at, post, with};

/// Whatever the expansion names, it names absolutely.
mod hostile_names {
    #![allow(dead_code, non_camel_case_types, non_snake_case, reason = "hostile on purpose")]

    use ::std::string::{String, ToString};

    pub(super) struct Result;
    pub(super) struct Option;
    pub(super) struct Box;
    pub(super) struct Future;
    pub(super) struct Policy;
    pub(super) struct Anchor;
    pub(super) struct Idem;
    pub(super) struct Guarded;
    pub(super) struct Fallback;
    pub(super) trait Send {}
    pub(super) trait IntoResponse {}
    pub(super) fn Ok() {}
    pub(super) fn Err() {}
    pub(super) fn Some() {}
    pub(super) fn None() {}
    pub(super) fn run() {}
    pub(super) fn boxed() {}
    pub(super) mod core {}
    pub(super) mod std {}
    pub(super) mod axum {}
    pub(super) mod idem_runtime {}
    pub(super) const __IDEM_POLICY: u8 = 0;
    pub(super) const __POLICY: u8 = 0;

    /// Methods that every type has, under the names of ours.
    pub(super) trait Everything: Sized {
        fn check() {}
        fn run(self) {}
        fn push<T>(self, _: T) {}
        fn write<T>(self, _: T) {}
        fn boxed(self) {}
        fn ttl<T>(self, _: T) {}
        fn scope<T>(self, _: T) {}
        fn into_response(self) {}
    }
    impl<T> Everything for T {}

    #[::idem_runtime::idempotent(anchor = header("Idempotency-Key"), state = ::idem_runtime::Idempotency)]
    pub(super) async fn by_header(
        __a0: ::axum::extract::State<::idem_runtime::Idempotency>,
        __last: String,
    ) -> ::std::result::Result<String, ::axum::http::StatusCode> {
        drop(__a0);
        if __last.is_empty() {
            return ::std::result::Result::Err(::axum::http::StatusCode::BAD_REQUEST);
        }
        ::std::result::Result::Ok(__last)
    }

    #[::idem_runtime::idempotent(
        anchor = arg(__args, __idem),
        scope = arg(__policy.as_str()),
        ttl = "1h",
        fingerprint = (none, header("X-Version")),
    )]
    pub(super) async fn by_argument(
        ::axum::extract::Path((__args, __idem)): ::axum::extract::Path<(u64, u64)>,
        __policy: ::axum::http::Method,
        __call: String,
    ) -> String {
        let __arguments = __call;
        [__args.to_string(), __idem.to_string(), __arguments].concat()
    }

    impl ::idem_runtime::AnchorValue for Key {
        fn write(&self, values: &mut ::idem_runtime::Values) {
            values.push(&self.0);
        }
    }

    pub(super) struct Key(String);

    #[derive(::idem_runtime::AnchorValue)]
    pub(super) struct Derived {
        __values: Key,
        values: &'static str,
        core: u64,
    }

    #[::idem_runtime::idempotent(anchor = arg(Derived { __values: Key(__values.to_string()), values: "v", core: 7 }))]
    pub(super) async fn by_derived(__values: String) -> String {
        __values
    }
}

#[tokio::test]
async fn hostile_names_do_not_reach_generated_code() {
    answers_and_replays(&at("/", routing::post(hostile_names::by_header)), post("/", "a")).await;
    let app = at("/{a}/{b}", routing::post(hostile_names::by_argument));
    let request = with(post("/1/2", "x"), "x-version", "1");
    assert_eq!(answers_and_replays(&app, request).await.text(), "12x");
    let app = at("/", routing::post(hostile_names::by_derived));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "a");
}

/// Nothing that we generate is anything that the user's lints complain of.
mod denied_lints {
    #![deny(
        warnings,
        clippy::all,
        clippy::pedantic,
        clippy::nursery,
        clippy::dbg_macro,
        clippy::expect_used,
        clippy::panic,
        clippy::todo,
        clippy::unreachable,
        clippy::unwrap_used,
        clippy::allow_attributes_without_reason,
        elided_lifetimes_in_paths,
        missing_docs,
        single_use_lifetimes,
        trivial_casts,
        trivial_numeric_casts,
        unreachable_pub,
        unused,
        unused_import_braces,
        unused_lifetimes,
        unused_qualifications,
        unused_results,
        variant_size_differences
    )]

    use axum::{
        Json,
        extract::{Path, State},
        http::{HeaderMap, StatusCode},
        response::IntoResponse,
    };
    use idem_runtime::{AnchorValue, Idempotency, idempotent};
    use serde::Deserialize;

    #[derive(AnchorValue, Deserialize)]
    pub(super) struct Payment {
        id: u64,
        note: String,
    }

    #[idempotent(anchor = header("Idempotency-Key"))]
    pub(super) async fn nothing() {}

    #[idempotent(anchor = header("Idempotency-Key"), state = Idempotency, ttl = "1h")]
    pub(super) async fn result(
        State(_engine): State<Idempotency>,
        headers: HeaderMap,
        mut body: String,
    ) -> Result<String, StatusCode> {
        if headers.is_empty() {
            return Err(StatusCode::BAD_REQUEST);
        }
        body.push('!');
        Ok(body)
    }

    #[idempotent(anchor = arg(payment, tenant), scope = arg(tenant))]
    pub(super) async fn keyed(
        Path(tenant): Path<u64>,
        Json(payment): Json<Payment>,
    ) -> impl IntoResponse {
        format!("{tenant} {} {}", payment.id, payment.note)
    }

    #[idempotent(anchor = arg(body))]
    pub(super) async fn generic<T: Default + ToString, const N: usize>(body: String) -> String {
        body.repeat(N) + &T::default().to_string()
    }
}

#[tokio::test]
async fn generated_code_passes_all_lints() {
    answers_and_replays(&at("/", routing::post(denied_lints::nothing)), post("/", "")).await;
    let app = at("/", routing::post(denied_lints::result));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "a!");
    let app = at("/{tenant}", routing::post(denied_lints::keyed));
    let body = r#"{"id":7,"note":"rent"}"#;
    assert_eq!(answers_and_replays(&app, post("/1", body)).await.text(), "1 7 rent");
    let app = at("/", routing::post(denied_lints::generic::<u64, 2>));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "aa0");
}
