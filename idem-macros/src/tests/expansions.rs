use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};
use quote::quote;

use super::{expand, pretty, tokens};
use crate::args::OPTIONS;
use crate::{derive, guarded};

/// Compares with the file of that name; `UPDATE_EXPANSIONS=1` writes it.
#[track_caller]
fn assert_expands(name: &str, expansion: TokenStream) {
    let path = format!("{}/src/tests/expansions/{name}.rs", env!("CARGO_MANIFEST_DIR"));
    let actual = pretty(expansion);
    if std::env::var_os("UPDATE_EXPANSIONS").is_some() {
        std::fs::write(&path, &actual).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(actual, expected, "{path} differs");
}

const EVERYTHING: &str = r#"
    anchor = (header("Idempotency-Key"), (path("id"), keys::NONCE)),
    ttl = "1h 30m",
    scope = (header("X-Tenant"), query("shop")),
    space = "payments",
    optional,
    fingerprint = (exclude("sent_at", "/a.b"), header("X-Version")),
    record = final,
    in_flight = wait("5s"),
    on_unknown = recover = bank::was_it_paid,
    admit = within_quota,
    lease = LEASE,
    replay(status = 200, merge = { replayed: true, event_id: null }),
    refusals = problems::REFUSALS,
    mode = observe,
    store_outage = open,
    engine = state,
    state = App<Pg, Redis>,
    crate = foo::bar,
"#;

const ORDINARY: &str = "
    /// Moves money.
    #[must_use]
    pub async fn transfer(State(db): State<Db>, Json(mut body): Json<Transfer>) -> Result<Json<Receipt>, Problem> {
        let policy = db.move_money(&mut body).await?;
        Ok(Json(policy))
    }
";

#[test]
fn an_ordinary_handler() {
    let args = r#"anchor = header("Idempotency-Key"), ttl = "24h""#;
    assert_expands("ordinary", expand(args, ORDINARY));
}

#[test]
fn a_transactional_handler() {
    let args = r#"anchor = header("Idempotency-Key"), transaction"#;
    let item = "async fn pay(mut tx: Tx<Pg>, body: String) -> Result<String, Problem> { Ok(body) }";
    assert_expands("transactional", expand(args, item));
}

#[test]
fn a_handler_that_says_everything() {
    assert_expands("everything", expand(EVERYTHING, ORDINARY));
}

#[test]
fn a_handler_that_takes_issued_keys() {
    let args = "anchor = NONCE, in_flight = wait(PATIENCE), on_unknown = refuse, replay = shapes::brief, issued";
    let item = "async fn f() {}";
    assert_expands("issued", expand(args, item));
}

#[test]
fn a_handler_without_arguments_or_return_type() {
    let item = "async fn ping() { pong().await; }";
    let args = r#"anchor = query("id"), ttl = forever, engine = extension"#;
    assert_expands("no_arguments", expand(args, item));
}

#[test]
fn expressions_over_the_arguments() {
    let args = "anchor = arg(body.nonce, (id, 1)), scope = (arg(user.tenant), header(\"X\"))";
    let item = "async fn f(user: User, #[allow(unused_mut)] Path(mut id): Path<u64>, _: Permit, Json(ref body): Json<B>) -> u64 { 1 }";
    assert_expands("arguments", expand(args, item));
}

#[test]
fn a_generic_handler_that_returns_impl_trait() {
    let args =
        "anchor = T::ANCHOR, format = hex(32), fingerprint = body_field(\"a\"), scope = global";
    let item = "async fn f<T: Op, U, const N: usize>(State(s): State<T>, b: Wrap<U>) -> Result<impl IntoResponse, E> where U: Clone { #![allow(dead_code)] x }";
    assert_expands("generic", expand(args, item));
}

#[test]
fn other_macros_see_the_handler_as_it_was_written() {
    let args = r#"anchor = header("x"), crate = foo"#;
    let item = "#[doc = \"d\"] #[utoipa::path(post)] #[allow(dead_code)] #[debug_handler(state = S)] async fn f(b: Json<B>) -> u8 { 1 }";
    assert_expands("other_macros_below", expand(args, item));
}

#[test]
fn debug_handler_stays_below_where_it_would_count_no_arguments() {
    let args = r#"anchor = header("x")"#;
    let first = expand(args, "#[debug_handler] #[instrument] async fn f() {}");
    assert_expands("debug_handler_below", first);
    let second = expand(args, "#[debug_handler] async fn f() {}").to_string();
    assert!(second.contains("Guarded"), "{second}");
    assert!(second.contains("debug_handler"), "{second}");
}

const PLAIN: &str = "
    /// Delivers an event.
    pub(crate) async fn deliver(idem: &Idempotency, event: Uuid, (url, mut body): (Url, Body)) -> Result<Delivered, Failed> {
        body.send(url).await
    }
";

#[test]
fn a_plain_function() {
    assert_expands("plain", expand(r#"anchor = arg(event), ttl = "7d""#, PLAIN));
}

const PLAIN_EVERYTHING: &str = r#"
    anchor = (arg(event), arg(job.phase as u8)),
    ttl = forever,
    scope = arg(job.tenant),
    space = Self::SPACE,
    fingerprint = arg(job.amount, &job.to),
    in_flight = wait("5s"),
    on_unknown = refuse,
    lease = LEASE,
    mode = observe,
    store_outage = open,
    engine = arg(self.idem),
    operation = op,
    nothing_happened = Failed::is_refusal,
    crate = foo::bar,
"#;

#[test]
fn a_plain_function_that_says_everything() {
    let item = "async fn run<T>(self: Arc<Self>, #[allow(unused_mut)] mut job: Job<T>, _: Permit, r#type: &'static str) -> Result<u64, Failed> where T: Clone { op.id(); Ok(1) }";
    assert_expands("plain_everything", expand(PLAIN_EVERYTHING, item));
}

#[test]
fn other_macros_see_the_plain_function_as_it_was_written() {
    let item = format!("#[instrument] {PLAIN}");
    let first = expand("anchor = arg(event)", &item).to_string();
    assert!(first.contains("idempotent (@ anchor"), "{first}");
    assert!(first.contains("body . send (url) . await"), "{first}");
    assert!(!first.contains("FunctionCall"), "{first}");
}

#[test]
fn every_option_of_a_plain_function_is_known() {
    for said in [
        "ttl = TTL",
        r#"lease = "30s""#,
        "scope = global",
        "scope = arg(event)",
        "scope = (arg(event), arg(1))",
        r#"space = "s""#,
        "format = uuid",
        "fingerprint = none",
        "fingerprint = arg(body, url)",
        "in_flight = wait(a::PATIENCE)",
        "on_unknown = rerun",
        "mode = off",
        "store_outage = open",
        "operation = op",
        "nothing_happened = <F as Failure>::is_refusal",
        "crate = ::a::b",
    ] {
        let args = format!("anchor = arg(event), {said}");
        assert_eq!(super::mistakes(&args, PLAIN), [], "{said}");
    }
    for item in [
        "async fn f(event: u8, idem: &Idempotency, s: &'static str) -> R { x }",
        "async fn f(event: u8, idem: &idem::Idempotency) -> R { x }",
        "async fn f(event: u8, idem: &Ours, f: fn(&str) -> &str) -> R { x }",
        "async fn f(idem: &'static Idempotency, event: impl Clone + Send + 'static) -> R { x }",
    ] {
        assert_eq!(super::mistakes("anchor = arg(event)", item), [], "{item}");
    }
    for item in [
        "async fn f(self: Arc<Self>, event: u8) -> R { x }",
        "async fn f(self, event: u8) -> R { x }",
        "async fn f(ctx: Ctx, event: u8) -> R { x }",
    ] {
        let args = r#"anchor = arg(event), space = "s", engine = arg(ctx.idem())"#;
        assert_eq!(super::mistakes(args, item), [], "{item}");
    }
}

#[test]
fn an_unknown_attribute_that_is_no_macro_is_moved_once() {
    let args = r#"anchor = header("x")"#;
    let first = expand(args, "#[tool::note] async fn f() {}").to_string();
    assert!(first.contains("idempotent (@ anchor"), "{first}");
    let second = expand(&format!("@ {args}"), "#[tool::note] async fn f() {}").to_string();
    assert!(second.contains("Guarded"), "{second}");
    assert!(second.contains("# [tool :: note]"), "{second}");
}

/// The text that reaches `ReplayShape::merge`.
fn merged(members: &str) -> String {
    let args = format!("anchor = KEY, replay(merge = {{ {members} }})");
    let expansion = expand(&args, "async fn f() {}");
    assert!(!expansion.to_string().contains("compile_error"), "{members}: {expansion}");
    let is_merge = |token: &TokenTree| matches!(token, TokenTree::Ident(word) if word == "merge");
    let mut rest = flat(expansion).into_iter().skip_while(|token| !is_merge(token));
    let text = rest.nth(1).expect("an argument of `merge`");
    syn::parse2::<syn::LitStr>(text.into()).expect("a string literal").value()
}

fn flat(tokens: TokenStream) -> Vec<TokenTree> {
    let inside = |token| match token {
        TokenTree::Group(group) => flat(group.stream()),
        token => vec![token],
    };
    tokens.into_iter().flat_map(inside).collect()
}

#[test]
fn members_to_merge_become_json_text() {
    for (members, text) in [
        ("replayed: true", r#"{"replayed":true}"#),
        ("a: false, \"b c\": null,", r#"{"a":false,"b c":null}"#),
        ("type: 1, r#type2: 2, r#\"q\"#: 3", r#"{"type":1,"type2":2,"q":3}"#),
        (r#"note: "x", raw: r"\d""#, r#"{"note":"x","raw":"\\d"}"#),
        (
            r#"s: "\"\\\n\t\r\u{1}\u{7f}é\u{1f600}""#,
            "{\"s\":\"\\\"\\\\\\n\\t\\r\\u0001\u{7f}é😀\"}",
        ),
        ("n: 0, m: -1, hex: 0xff, thousand: 1_000", r#"{"n":0,"m":-1,"hex":255,"thousand":1000}"#),
        (
            "n: 18446744073709551615, m: -9223372036854775808",
            r#"{"n":18446744073709551615,"m":-9223372036854775808}"#,
        ),
        ("n: -1.5, m: 1e3, k: 2.5E-7", r#"{"n":-1.5,"m":1e3,"k":2.5e-7}"#),
        ("n: 1., m: 007.5, k: -00.25, l: 0.0", r#"{"n":1.0,"m":7.5,"k":-0.25,"l":0.0}"#),
        ("a: [1, \"2\", [null,], {}], b: []", r#"{"a":[1,"2",[null],{}],"b":[]}"#),
        ("a: { a: { a: [1, 2] } }, b: { a: 1 }", r#"{"a":{"a":{"a":[1,2]}},"b":{"a":1}}"#),
    ] {
        assert_eq!(merged(members), text, "{members}");
    }
}

/// `$value:literal` and `$value:expr` arrive in groups without delimiters.
#[test]
fn members_to_merge_can_come_out_of_another_macro() {
    let value = |tokens: TokenStream| Group::new(Delimiter::None, tokens);
    let (one, minus, text) = (value(quote!(1)), value(quote!(-2.5)), value(quote!("x")));
    let status = value(quote!(201));
    let args =
        quote!(anchor = KEY, replay(status = #status, merge = { a: #one, b: #minus, c: [#text] }));
    let expansion = guarded(&args, &tokens("async fn f() {}")).to_string();
    assert!(expansion.contains(r#"{\"a\":1,\"b\":-2.5,\"c\":[\"x\"]}"#), "{expansion}");
}

#[test]
fn functions_of_the_users_may_depend_on_its_generics() {
    let args = "anchor = KEY, admit = T::admit, on_unknown = recover = <Self as Bank>::ask";
    let expansion = pretty(expand(args, "async fn f<T: Quota>(body: String) {}"));
    assert!(expansion.contains("&const {"), "{expansion}");
}

#[test]
fn derived_values_write_every_field_in_order() {
    let item = "#[anchor(crate = foo::bar)] struct Id<T, U>(u64, PhantomData<T>, U) where U: Copy;";
    assert_expands("derive_tuple", derive::anchor_value(tokens(item)));
    let item = "pub(crate) struct Pair { r#type: Kind, id: Uuid }";
    assert_expands("derive_named", derive::anchor_value(tokens(item)));
}

#[test]
fn another_crate_path_replaces_ours_everywhere() {
    for args in [
        EVERYTHING,
        "crate = foo::bar, anchor = arg(a), scope = arg(c), format = FORMAT, ttl = TTL, engine = extension",
        r#"crate = foo::bar, anchor = body_field("/a/b"), fingerprint = (json, header("a")), scope = global, space = SPACE"#,
        r#"crate = foo::bar, anchor = path("id"), fingerprint = none, format = text(1..=9), state = S"#,
        "crate = foo::bar, anchor = KEY, issued, on_unknown = refuse, in_flight = reject, replay = f",
    ] {
        for item in [
            ORDINARY,
            "async fn f(b: Json<B>) {}",
            "#[instrument] async fn f<T>(b: Json<T>) -> impl X {}",
        ] {
            let expansion = expand(args, item).to_string();
            assert!(!expansion.contains("idem_runtime"), "{expansion}");
            assert!(!expansion.contains("compile_error"), "{expansion}");
        }
    }
    for args in [PLAIN_EVERYTHING, "crate = foo::bar, anchor = arg(event)"] {
        let args = args.replace("self.idem", "event");
        let item = PLAIN.replace("idem: &", "idem: &'static ");
        let item =
            if args.contains("engine") { item.replace("idem: &'static ", "i: ") } else { item };
        let expansion = expand(&args, &item).to_string();
        assert!(!expansion.contains("idem_runtime"), "{expansion}");
        assert!(!expansion.contains("compile_error"), "{expansion}");
    }
    let derived = derive::anchor_value(tokens("#[anchor(crate = foo)] struct A<T>(T);"));
    assert!(!derived.to_string().contains("idem_runtime"), "{derived}");
}

#[test]
fn without_a_crate_path_ours_is_absolute() {
    let expansion = expand(r#"anchor = header("x")"#, ORDINARY).to_string();
    let named = expansion.matches("idem_runtime").count();
    assert_ne!(named, 0);
    assert_eq!(named, expansion.matches(":: idem_runtime :: __private").count());
}

#[test]
fn names_of_the_users_are_only_names() {
    let args = r#"anchor = arg(__args, Some), ttl = POLICY, scope = arg(r#type), admit = __request, on_unknown = recover = boxed::Ok, replay = Err"#;
    let item = "async fn run(__args: A, __policy: B, (__last, Some): (C, D), Json(r#type): Json<E>) -> Result { __idem(__policy) }";
    let expansion = pretty(expand(args, item));
    assert!(!expansion.contains("compile_error"), "{expansion}");
    assert!(expansion.contains("::core::result::Result::Ok"), "{expansion}");
    assert!(!expansion.contains(" Ok("), "{expansion}");
    assert!(expansion.contains("recovered(boxed::Ok(__request))"), "{expansion}");
    assert!(expansion.contains("admitted(__request(__request))"), "{expansion}");
}

#[test]
fn every_option_is_known() {
    for said in [
        r#"anchor = header("x")"#,
        r#"anchor = body_field("a.b")"#,
        r#"anchor = body_field("/a~0/~1")"#,
        r#"anchor = path("id")"#,
        r#"anchor = query("q")"#,
        "anchor = arg(b.id)",
        "anchor = KEY",
        "anchor = keys::key",
        "anchor = <K as Key>::KEY",
        r#"anchor = (KEY, header("x"),)"#,
    ] {
        assert_eq!(super::mistakes(said, "async fn f(b: Json<B>) {}"), [], "{said}");
    }
    for said in [
        r#"ttl = "24h""#,
        r#"ttl = "90 days""#,
        r#"ttl = "1500ms""#,
        "ttl = forever",
        "ttl = TTL",
        r#"lease = "30s""#,
        "lease = a::LEASE",
        "scope = global",
        r#"scope = header("x")"#,
        r#"scope = path("t")"#,
        r#"scope = query("t")"#,
        r#"scope = body_field("t")"#,
        "scope = arg(user.id)",
        "scope = TENANT",
        r#"scope = (TENANT, header("x"))"#,
        r#"space = "s""#,
        "space = SPACE",
        "format = uuid",
        "format = hex(32)",
        "format = text(1..=64)",
        "format = ISO",
        "optional",
        "fingerprint = request",
        "fingerprint = json",
        "fingerprint = none",
        r#"fingerprint = body_field("a", "b")"#,
        r#"fingerprint = exclude("a")"#,
        "fingerprint = FP",
        r#"fingerprint = (json, header("a"), header("b"))"#,
        "record = success",
        "record = final",
        "record = all",
        "in_flight = reject",
        r#"in_flight = wait("5s")"#,
        "in_flight = wait(a::PATIENCE)",
        "on_unknown = rerun",
        "on_unknown = refuse",
        "on_unknown = recover = ask",
        "on_unknown = recover = bank::ask::<B>",
        "admit = within_quota",
        "admit = <Q as Quota>::admit",
        "replay(status = 200)",
        "replay(merge = { a: 1 },)",
        "replay(merge = { a: 1 }, status = 599)",
        "replay(status = 204)",
        "replay = brief",
        "replay = shapes::Brief::of",
        r#"issued, space = "s""#,
        "issued, space = SPACE",
        "mode = enforce",
        "mode = observe",
        "mode = off",
        "store_outage = closed",
        "store_outage = open",
        "refusals = problems",
        "engine = state",
        "engine = extension",
        "state = App<A, B>",
        "crate = ::a::b",
        "crate = crate::a",
    ] {
        let args = format!("anchor = header(\"Idempotency-Key\"), {said}");
        assert_eq!(super::mistakes(&args, "async fn f(b: Json<B>) {}"), [], "{said}");
    }
}

#[test]
fn the_example_of_each_option_is_right() {
    for (option, example) in OPTIONS {
        assert!(example.starts_with(option), "{example}");
        if ["operation", "nothing_happened"].contains(&option) {
            let args = format!("anchor = arg(event), {example}");
            assert_eq!(super::mistakes(&args, PLAIN), [], "{example}");
            continue;
        }
        let args = if option == "anchor" { example } else { &format!("anchor = KEY, {example}") };
        assert_eq!(super::mistakes(args, "async fn f(b: Json<B>) {}"), [], "{example}");
    }
}

#[test]
fn a_body_that_is_being_typed_is_none_of_our_business() {
    let item = "async fn f(Json(b): Json<B>) { b. ; let = ; if { match }";
    let item = format!("{item} }}");
    assert_eq!(super::mistakes("anchor = KEY", &item), []);
    let expansion = expand("anchor = KEY", &item).to_string();
    assert!(expansion.contains("b . ; let = ; if { match }"), "{expansion}");
}

#[test]
fn a_mistake_gives_the_item_back_as_it_was() {
    for item in [
        "#[utoipa::path] pub async fn f(self, x: &str) { a b c }",
        "fn f();",
        "struct S { x: u8 }",
        "pub async fn f(x: ) {}",
    ] {
        let expansion = expand("anchor = heder(\"x\")", item).to_string();
        let errors = expansion
            .strip_prefix(&tokens(item).to_string())
            .unwrap_or_else(|| panic!("the item changed: {expansion}"));
        assert!(errors.trim().starts_with(":: core :: compile_error !"), "{errors}");
    }
}
