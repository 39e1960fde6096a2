use super::{mistakes, tokens};
use crate::derive;

const HANDLER: &str = "async fn f(Json(body): Json<B>) -> u8 { 1 }";

/// One mistake in the options: what is underlined, and what it says.
#[track_caller]
fn assert_option(args: &str, underlined: &str, message: &str) {
    assert_one(args, HANDLER, underlined, message);
}

/// One mistake in the handler.
#[track_caller]
fn assert_handler(item: &str, underlined: &str, message: &str) {
    assert_one("anchor = KEY", item, underlined, message);
}

#[track_caller]
fn assert_one(args: &str, item: &str, underlined: &str, message: &str) {
    let found = mistakes(args, item);
    let [(at, said)] = &found[..] else {
        panic!("expected one mistake in `{args}` on `{item}`: {found:#?}");
    };
    assert_eq!(at, underlined, "{said}");
    assert!(said.contains(message), "{args}\n  says: {said}\n  expected: {message}");
}

#[test]
fn options_are_known_and_given_once() {
    assert_option(
        "anchor = KEY, tll = \"24h\"",
        "tll",
        "unknown option `tll`; did you mean `ttl`?\nknown options: `anchor`, `ttl`,",
    );
    assert_option("anchor = KEY, zzzzz", "zzzzz", "unknown option `zzzzz`\nknown options: ");
    assert_option("anchor = KEY, Mode = off", "Mode", "did you mean `mode`?");
    assert_option("ttl = TTL, anchor = KEY, ttl = \"1h\"", "ttl", "option `ttl` given twice");
    assert_option("optional, anchor = KEY, optional", "optional", "option `optional` given twice");
    assert_option("anchor = KEY ttl = TTL", "ttl", "expected `,` between options");
    assert_option("anchor = KEY; ttl = TTL", ";", "expected `,` between options");
    assert_option("anchor = KEY,, ttl = TTL", ",", "expected the name of an option");
    assert_option("anchor = KEY, optional = true", "optional", "write just `optional`");
    assert_option("anchor = KEY, issued = true", "issued", "write just `issued`");
    assert_option("anchor = KEY, issued(NONCE)", "issued", "write just `issued`");
    assert_option("anchor = KEY, issued, issued", "issued", "option `issued` given twice");
    assert_option("anchor = KEY, isued", "isued", "did you mean `issued`?");
    assert_option("anchor = KEY, replays = a", "replays", "did you mean `replay`?");
    assert_option("anchor = KEY, amit = a", "amit", "did you mean `admit`?");
    assert_option("anchor = KEY, ttl", "ttl", "`ttl` needs a value, as in `ttl = \"24h\"`");
    assert_option(
        "anchor = , ttl = TTL",
        "anchor",
        "`anchor` needs a value, as in `anchor = header(\"Idempotency-Key\")`",
    );
    assert_option("anchor = KEY, crate = \"foo\"", "\"foo\"", "expected identifier");
}

#[test]
fn a_transactional_handler_has_neither_lease_nor_unknown_outcome() {
    for (said, word, why) in [
        ("on_unknown = rerun", "on_unknown", "leaves no unknown outcome"),
        ("on_unknown = refuse", "on_unknown", "leaves no unknown outcome"),
        ("on_unknown = recover = ask", "on_unknown", "leaves no unknown outcome"),
        ("lease = \"30s\"", "lease", "has no lease"),
        ("store_outage = open", "store_outage", "can do nothing while its database is away"),
        ("mode = off", "mode", "no record to commit with"),
    ] {
        assert_option(&format!("anchor = KEY, transaction, {said}"), word, why);
        assert_option(&format!("{said}, transaction, anchor = KEY"), word, why);
    }
    for said in [
        "in_flight = wait(\"5s\")",
        "store_outage = closed",
        "mode = observe",
        "issued, space = \"a\"",
    ] {
        assert!(mistakes(&format!("anchor = KEY, transaction, {said}"), HANDLER).is_empty());
    }
    for value in [" = true", "(postgres)"] {
        let said = format!("anchor = KEY, transaction{value}");
        assert_option(&said, "transaction", "write just `transaction`");
    }
}

#[test]
fn anchors_come_from_somewhere() {
    let missing = &mistakes("", HANDLER)[0].1;
    assert_eq!(
        missing,
        "missing `anchor = ...`: say what identifies the operation, as in `anchor = header(\"Idempotency-Key\")`"
    );
    assert_option(
        "anchor = heder(\"x\")",
        "heder",
        "unknown anchor `heder(..)`: expected `header(..)`",
    );
    assert_option("anchor = heder(\"x\")", "heder", "did you mean `header`?");
    assert_option("anchor = flow_id", "flow_id", "unknown anchor `flow_id`");
    assert_option("anchor = header", "header", "`header` needs parentheses");
    assert_option(
        "anchor = header()",
        "header()",
        "takes one string literal, as in `header(\"Idempotency-Key\")`",
    );
    assert_option(
        "anchor = header(\"a\", \"b\")",
        "header(\"a\", \"b\")",
        "takes one string literal",
    );
    assert_option("anchor = \"Idempotency-Key\"", "\"Idempotency-Key\"", "as in `anchor = header(");
    assert_option("anchor = global", "global", "unknown anchor `global`");
    assert_option("anchor = ()", "()", "`anchor` needs at least one part");
    assert_option("anchor = arg()", "arg", "`arg(..)` takes expressions");
    assert_option(
        "anchor = (header(\"a\"), (header(\"A\"), KEY))",
        "header(\"A\")",
        "the same part twice",
    );
    assert_option("anchor = arg(body.id, body.id)", "body.id", "the same part twice");
}

#[test]
fn scopes_come_from_somewhere() {
    assert_option("anchor = KEY, scope = globl", "globl", "did you mean `global`?");
    assert_option(
        "anchor = KEY, scope = \"global\"",
        "\"global\"",
        "write `global` without quotes",
    );
    assert_option("anchor = KEY, scope = (global, TENANT)", "global", "nothing narrows it");
    assert_option("anchor = KEY, scope = global(1)", "global(1)", "`global` takes no parentheses");
    assert_option("anchor = KEY, scope = tenant", "tenant", "unknown scope `tenant`");
}

#[test]
fn names_can_occur_in_a_request() {
    assert_option(
        "anchor = header(\"Idem potency\")",
        "\"Idem potency\"",
        "`Idem potency` is not a valid header name: ' ' is not allowed; did you mean `Idem-potency`?",
    );
    assert_option("anchor = header(\"Key:\")", "\"Key:\"", "did you mean `Key`?");
    assert_option("anchor = header(\"ü\")", "\"ü\"", "'ü' is not allowed");
    assert_option("anchor = header(\"\")", "\"\"", "cannot be empty");
    assert_option("anchor = path(\"/pay/{id}\")", "\"/pay/{id}\"", "did you mean `id`?");
    assert_option("anchor = path(\"\")", "\"\"", "has a name");
    assert_option("anchor = query(\"\")", "\"\"", "has a name");
    assert_option("anchor = body_field(\"\")", "\"\"", "an empty path names no field");
    assert_option("anchor = body_field(\"a..b\")", "\"a..b\"", "empty name between dots");
    assert_option("anchor = body_field(\"/a~2\")", "\"/a~2\"", "not a JSON Pointer");
    assert_option("anchor = body_field(\"/a~\")", "\"/a~\"", "not a JSON Pointer");
    assert_option("anchor = KEY, space = \"\"", "\"\"", "a space needs a name");
    assert_option("anchor = KEY, space = payments", "payments", "`space = \"payments\"`");
}

#[test]
fn durations_have_units_and_end() {
    let ttl = |value: &str, message: &str| {
        assert_option(&format!("anchor = KEY, ttl = {value}"), value, message);
    };
    ttl(
        "\"24 horas\"",
        "unknown duration unit `horas` in `24 horas`: expected `ms`, `s`, `m`, `h` or `d`; did you mean `\"24h\"`?",
    );
    ttl("\"24 foo\"", "expected `ms`, `s`, `m`, `h` or `d`");
    ttl("\"24\"", "duration `24` has no unit: write `\"24s\"`, `\"24m\"`, `\"24h\"` or `\"24d\"`");
    ttl("24", "`ttl` takes a string literal, as in `ttl = \"24h\"`");
    ttl(
        "\"0s\"",
        "`ttl` must be greater than zero: a record that expires at once protects nothing",
    );
    ttl("\"\"", "an empty duration");
    ttl("\"-1h\"", "is not a duration");
    ttl("\"h\"", "is not a duration");
    ttl("\"1M\"", "a month has no fixed length");
    ttl("\"1 year\"", "a year has no fixed length");
    ttl("\"5us\"", "finer than a millisecond");
    ttl("\"40000d\"", "longer than a hundred years");
    ttl("\"99999999999999999999h\"", "too long");
    ttl("\"forever\"", "write `forever` without quotes");
    ttl("day", "takes a string literal");
    assert_option("anchor = KEY, lease = \"0ms\"", "\"0ms\"", "`lease` must be greater than zero");
    assert_option("anchor = KEY, lease = forever", "forever", "as in `lease = \"30s\"`");
}

#[test]
fn formats_have_lengths() {
    let format = |value: &str, underlined: &str, message: &str| {
        assert_option(&format!("anchor = KEY, format = {value}"), underlined, message);
    };
    format("uid", "uid", "did you mean `uuid`?");
    format("uuid()", "uuid()", "takes no parentheses");
    format("hex", "hex", "number of bytes, each of them two digits");
    format("hex(0)", "0", "at least 1");
    format("hex(99999)", "99999", "from 1 to 65535");
    format("text(5..=2)", "2", "at least 5 and at most 2");
    format("text(0..=9)", "0", "an empty key is never allowed");
    format("text(1..9)", "..", "write `1..=9`");
    format("text(9)", "text(9)", "as in `text(1..=64)`");
    format("\"uuid\"", "\"uuid\"", "expected `uuid`");
}

#[test]
fn words_are_one_of_a_few() {
    assert_option(
        "anchor = KEY, record = sucess",
        "sucess",
        "expected `success`, `final` or `all`; did you mean `success`?",
    );
    assert_option("anchor = KEY, mode = \"off\"", "\"off\"", "write `off` without quotes");
    assert_option("anchor = KEY, mode = 1", "1", "`mode` takes one word");
    assert_option("anchor = KEY, store_outage = opn", "opn", "did you mean `open`?");
    assert_option("anchor = KEY, engine = extensions", "extensions", "did you mean `extension`?");
    assert_option("anchor = KEY, refusals = \"x\"", "\"x\"", "the path of a value");
}

#[test]
fn duplicates_are_refused_or_wait_for_a_time() {
    let in_flight = |value: &str, underlined: &str, message: &str| {
        assert_option(&format!("anchor = KEY, in_flight = {value}"), underlined, message);
    };
    in_flight("rejct", "rejct", "expected `reject` or `wait(\"5s\")`; did you mean `reject`?");
    in_flight("wiat(\"5s\")", "wiat", "did you mean `wait`?");
    in_flight("\"reject\"", "\"reject\"", "write `reject` without quotes");
    in_flight("reject()", "reject()", "takes one word: `reject` or");
    in_flight("wait", "wait", "`wait` needs parentheses that say how long, as in `wait(\"5s\")`");
    in_flight("wait = \"5s\"", "wait = \"5s\"", "stands in parentheses");
    in_flight("wait()", "wait()", "`wait(..)` takes one duration, as in `wait(\"5s\")`");
    in_flight("wait(5)", "wait(5)", "takes one duration");
    in_flight("wait(forever)", "wait(forever)", "takes one duration");
    in_flight("wait(\"1s\", \"2s\")", "wait(\"1s\", \"2s\")", "takes one duration");
    in_flight(
        "wait(\"0s\")",
        "\"0s\"",
        "`wait` must be greater than zero: write `in_flight = reject`",
    );
    in_flight("wait(\"5\")", "\"5\"", "duration `5` has no unit");
}

#[test]
fn unknown_outcomes_have_a_rule_or_a_function() {
    let on_unknown = |value: &str, underlined: &str, message: &str| {
        assert_option(
            &format!("anchor = KEY, on_unknown = {value}, mode = off"),
            underlined,
            message,
        );
    };
    on_unknown("retry", "retry", "expected `rerun`, `refuse` or `recover = path`");
    on_unknown("refse", "refse", "did you mean `refuse`?");
    on_unknown("\"refuse\"", "\"refuse\"", "write `refuse` without quotes");
    on_unknown(
        "recover",
        "recover",
        "write `on_unknown = recover = path`, the path of an `async fn(RequestContext) -> Recovered`",
    );
    on_unknown("recover =", "recover", "`recover =` needs a value");
    on_unknown(
        "recover(bank::ask)",
        "recover(bank::ask)",
        "write `on_unknown = recover = path`, without parentheses",
    );
    on_unknown("recovr = ask", "recovr", "did you mean `recover`?");
    on_unknown("rerun = a", "rerun = a", "takes one word: `rerun`,");
    on_unknown(
        "recover = \"ask\"",
        "\"ask\"",
        "`recover` takes the path of a function: `async fn(",
    );
    on_unknown("recover = ask()", "ask()", "`recover` takes the path of a function");
    on_unknown(
        "recover = async |request, more| ask(request)",
        "async |request, more| ask(request)",
        "`recover` takes no closure: declare it as `async fn(RequestContext) -> Recovered`",
    );
}

#[test]
fn admission_is_a_function() {
    let admit = |value: &str, message: &str| {
        assert_option(&format!("anchor = KEY, admit = {value}"), value, message);
    };
    admit(
        "\"quota\"",
        "`admit` takes the path of a function: `async fn(RequestContext) -> Result<(), impl IntoResponse>`",
    );
    admit("quota(5)", "takes the path of a function");
    admit("{ quota }", "takes the path of a function");
    admit("|r| quota(r)", "`admit` takes no closure: declare it as `async fn(RequestContext)");
    assert_option("anchor = KEY, admit", "admit", "as in `admit = within_quota`");
}

#[test]
fn replays_change_something_that_can_be_changed() {
    let replay = |value: &str, underlined: &str, message: &str| {
        assert_option(&format!("anchor = KEY, replay{value}"), underlined, message);
    };
    const EXPECTED: &str = "expected `status = 200`, `merge = { replayed: true }`, or both";
    replay("", "replay", "`replay` needs a value, as in `replay(status = 200)`");
    replay("()", "replay", &format!("`replay()` changes nothing: {EXPECTED}"));
    replay("(status = 200), replay = brief", "replay", "option `replay` given twice");
    replay(" = brief, replay(status = 200)", "replay", "option `replay` given twice");
    replay("(stats = 200)", "stats", &format!("no `stats`: {EXPECTED}; did you mean `status`?"));
    replay("(headers)", "headers", "has no `headers`");
    replay("(shapes::brief)", "shapes::brief", "for anything else write `replay = path`");
    replay("(200)", "200", EXPECTED);
    replay("(status = 200, status = 201)", "status", "given twice: leave out one of them");
    replay("(status)", "status", "`status` needs a value, as in `status = 200`");
    replay("(status = )", "status", "`status =` needs a value");
    replay("(merge { a: 1 })", "{", "expected `,`");
    replay("(merge({ a: 1 }))", "merge", "as in `merge = { replayed: true }`");
    replay(
        " = (status = 200)",
        "(status = 200)",
        "write `replay(status = 200, merge = { replayed: true })`, without `=`",
    );
    replay(" = { a: 1 }", "{ a: 1 }", "without `=`");
    replay(" = |response| response", "|response| response", "`replay` takes no closure");
    replay(" = 200", "200", "`fn(Response<Bytes>) -> Response<Bytes>`");

    replay("(status = 99)", "99", "a status is from 200 to 599");
    replay("(status = 600)", "600", "a status is from 200 to 599");
    replay("(status = 99999)", "99999", "a status is from 200 to 599");
    replay("(status = 103)", "103", "a 103 response only announces another");
    replay("(status = \"200\")", "\"200\"", "`status` takes a number");
    replay("(status = -200)", "-200", "a status is from 200 to 599");
    replay("(status = StatusCode::OK)", "StatusCode::OK", "`status` takes a number");
    for status in ["204", "205", "304"] {
        replay(
            &format!("(merge = {{ a: 1 }}, status = {status})"),
            status,
            &format!("a {status} response has no body to merge members into"),
        );
    }
}

#[test]
fn members_to_merge_are_json_literals() {
    let merge = |members: &str, underlined: &str, message: &str| {
        let args = format!("anchor = KEY, replay(status = 200, merge = {{ {members} }})");
        assert_option(&args, underlined, message);
    };
    const LITERALS: &str =
        "only JSON literals stand here: for computed members write `replay = path`";
    merge("a: x", "x", LITERALS);
    merge("a: response.id, b: 1", "response.id", LITERALS);
    merge("a: 1 + 2", "1 + 2", LITERALS);
    merge("a: [1, id(7, 8)]", "id(7, 8)", LITERALS);
    merge("a: { b: { c: None } }", "None", LITERALS);
    merge("a: 'x'", "'x'", LITERALS);
    merge("a: b\"x\"", "b\"x\"", LITERALS);
    merge("a: -\"x\"", "-\"x\"", LITERALS);
    merge("a: (1)", "(1)", LITERALS);
    merge("a: True", "True", "did you mean `true`?");
    merge("a: nil", "nil", "did you mean `null`?");
    merge("a: 1u8", "1u8", "a JSON number has no type: write `1`");
    merge("a: -1.5f32", "-1.5f32", "a JSON number has no type: write `-1.5`");
    merge("a: 1e999", "1e999", "write it as a string");
    merge("a: 18446744073709551616", "18446744073709551616", "write it as a string");
    merge("a: 1, \"a\": 2", "\"a\"", "member `a` given twice: leave out one of them");
    merge("b: [{ a: 1, r#a: 2 }]", "r#a", "member `a` given twice");
    merge("a = 1", "a", "`a` is followed by `:` and its value, as in `a: true`");
    merge("event-id: 1", "event", "a name of other characters stands in quotes");
    merge("a", "a", "`a` is followed by `:`");
    merge("a: , b: 1", "a", "`a:` needs a value");
    merge("1: 2", "1", "a member begins with its name");
    merge("a: 1,, b: 2", ",", "nothing stands before this comma");
    merge("", "{  }", "an empty object merges nothing: leave out `merge`");

    let merge = |value: &str, message: &str| {
        assert_option(&format!("anchor = KEY, replay(merge = {value})"), value, message);
    };
    const OBJECT: &str = "`merge` takes a JSON object, as in `merge = { replayed: true }`";
    merge("r#\"{\"a\":1}\"#", OBJECT);
    merge("MEMBERS", OBJECT);
    merge("true", OBJECT);
}

#[test]
fn fingerprints_have_a_scheme() {
    let fingerprint = |value: &str, underlined: &str, message: &str| {
        assert_option(&format!("anchor = KEY, fingerprint = {value}"), underlined, message);
    };
    fingerprint("jsn", "jsn", "did you mean `json`?");
    fingerprint("header(\"a\")", "header", "headers are added to a scheme");
    fingerprint("()", "()", "needs a scheme");
    fingerprint("(json, body_field(\"a\"))", "body_field(\"a\")", "after the scheme come headers");
    fingerprint("(json, header(\"A\"), header(\"a\"))", "header(\"a\")", "the same header twice");
    fingerprint("body_field", "body_field", "needs parentheses");
    fingerprint("exclude()", "exclude()", "names no field");
    fingerprint("exclude(\"a\", \"a\")", "\"a\"", "the same field twice");
    fingerprint("exclude(a)", "a", "takes string literals");
    fingerprint("none()", "none()", "takes no parentheses");
    fingerprint("\"json\"", "\"json\"", "write `json` without quotes");
}

#[test]
fn options_do_not_contradict_each_other() {
    assert_option(
        "anchor = (KEY, header(\"a\")), format = uuid",
        "format",
        "this anchor has several",
    );
    assert_option(
        "anchor = arg(body.a, body.b), format = uuid",
        "format",
        "this anchor has several",
    );
    assert_eq!(mistakes("anchor = arg(body.a), format = uuid", HANDLER), []);
    assert_option("optional, anchor = arg(body.a)", "optional", "are always there");
    assert_eq!(mistakes("optional, anchor = (arg(body.a), KEY)", HANDLER), []);
    assert_option(
        "anchor = KEY, engine = extension, state = App",
        "state",
        "leave out one of them",
    );
}

#[test]
fn issued_keys_come_from_another_handler() {
    const SPACE: &str =
        "keys are issued by another handler: both name one space, as in `space = \"enrolment\"`";
    assert_option("anchor = header(\"a\"), issued", "issued", SPACE);
    assert_option("issued, anchor = arg(body.nonce)", "issued", SPACE);
    // What the parts of a tuple say beside their format is not heard.
    assert_option("anchor = (KEY, header(\"a\")), issued", "issued", SPACE);
    assert_option("anchor = KEY, issued, optional", "optional", "cannot run without one");
    let ttl = "an issued key is valid from when it was issued: say `ttl` there";
    assert_option("anchor = KEY, issued, ttl = \"10m\"", "ttl", ttl);
    assert_option("anchor = header(\"a\"), space = \"s\", issued, ttl = forever", "ttl", ttl);

    assert_eq!(mistakes("anchor = KEY, issued", HANDLER), []);
    assert_eq!(mistakes("anchor = keys::nonce, issued", HANDLER), []);
    assert_eq!(mistakes("anchor = (KEY, query(\"a\")), space = \"s\", issued", HANDLER), []);
    // A mistake elsewhere is not a second one here.
    assert_option("anchor = heder(\"a\"), issued", "heder", "unknown anchor");
    assert_option("anchor = header(\"a\"), space = , issued", "space", "`space` needs a value");
    assert_option("anchor = header(\"a\"), space = \"\", issued", "\"\"", "needs a name");
}

#[test]
fn fields_need_a_body() {
    let message = "`body_field(..)` needs a handler that takes the body: its last argument is not a body extractor (`Json<_>`, `Form<_>`, ...)";
    let field = "anchor = body_field(\"a\")";
    assert_one(field, "async fn f(State(s): State<S>) {}", "body_field", message);
    assert_one(field, "async fn f(p: axum::extract::Path<S>) {}", "body_field", message);
    assert_one(field, "async fn f() {}", "body_field", "this one takes no arguments");
    assert_one(
        "anchor = KEY, fingerprint = exclude(\"a\")",
        "async fn f(h: HeaderMap) {}",
        "exclude",
        "`exclude(..)` needs",
    );
    assert_one(
        "anchor = KEY, scope = body_field(\"a\")",
        "async fn f(h: Method) {}",
        "body_field",
        message,
    );
    assert_one(
        field,
        "async fn f(m: Multipart) {}",
        "body_field",
        "multipart fields cannot be an anchor",
    );
    assert_eq!(mistakes(field, "async fn f(b: ValidJson<T>) {}"), []);
}

#[test]
fn handlers_are_what_axum_calls() {
    assert_handler("fn f(b: Json<B>) {}", "fn", "`#[idempotent]` handlers must be `async fn`");
    assert_handler("async fn f(self, b: Json<B>) {}", "self", "cannot take `self`");
    assert_handler("async fn f(&mut self) {}", "self", "take `State<_>` instead");
    assert_handler("async unsafe fn f(b: Json<B>) {}", "unsafe", "`unsafe fn`");
    assert_handler("async extern \"C\" fn f(b: Json<B>) {}", "extern \"C\"", "leave out `extern`");
    assert_handler(
        "async fn f<'a>(b: Json<B>) {}",
        "'a",
        "handlers cannot have lifetime parameters",
    );
    assert_handler(
        "async fn f(b: Json<B<'_>>) {}",
        "'_",
        "handlers cannot have lifetime parameters",
    );
    assert_handler(
        "async fn f(b: &str) {}",
        "&str",
        "handlers take owned extractors, not references",
    );
    assert_handler(
        "async fn f(b: Json<&B>) {}",
        "&B",
        "handlers take owned extractors, not references",
    );
    assert_handler(
        "async fn f(b: impl FromRequest<S>) {}",
        "impl FromRequest<S>",
        "`impl Trait` arguments are not supported: name the extractor's type",
    );
    assert_handler(
        "async fn f(b: Json<B>, s: State<S>) {}",
        "Json<B>",
        "`Json` consumes the request body and must be the last argument",
    );
    assert_handler(
        "async fn f(w: ws::WebSocketUpgrade) {}",
        "ws::WebSocketUpgrade",
        "a WebSocket upgrade cannot be recorded and replayed",
    );
    assert_handler("async fn f(#[serde] b: Json<B>) {}", "#[serde]", "only lint levels");
    assert_handler(
        "#[idem::idempotent(x)] async fn f(b: Json<B>) {}",
        "#[idem::idempotent(x)]",
        "given twice",
    );
    let many: String = (0..17).map(|n| format!("a{n}: A{n},")).collect();
    assert_handler(
        &format!("async fn f({many}) {{}}"),
        "a16: A16",
        "axum handlers take at most 16 extractors",
    );
    assert_handler(
        "struct S;",
        "struct",
        "`#[idempotent]` goes on an axum handler (`async fn`): expected `fn`",
    );
    assert_handler("pub(crate) const X: u8 = 1;", "const", "expected `fn`");
    assert_handler("impl S { async fn f() {} }", "impl", "expected `fn`");
    for item in [
        "async fn f(f: Extension<fn(&str) -> &str>, s: Json<&'static str>) {}",
        "async fn f<const N: usize>(#[expect(unused)] b: Json<[u8; N]>) {}",
    ] {
        assert_eq!(mistakes("anchor = KEY", item), [], "{item}");
    }
}

const FUNCTION: &str = "async fn f(idem: &Idempotency, event: u64) -> Result<u8, E> { Ok(1) }";

#[test]
fn a_plain_function_has_no_request() {
    let option = |said: &str, underlined: &str, message: &str| {
        assert_one(&format!("anchor = arg(event), {said}"), FUNCTION, underlined, message);
    };
    let anchor = |value: &str, underlined: &str, message: &str| {
        assert_one(&format!("anchor = {value}"), FUNCTION, underlined, message);
    };
    let missing = &mistakes("", FUNCTION)[0].1;
    assert!(missing.ends_with("as in `anchor = arg(event_id)`"), "{missing}");
    for word in ["header", "body_field", "path", "query"] {
        anchor(
            &format!("(arg(event), {word}(\"a\"))"),
            word,
            &format!("`{word}(..)` reads a request, and a plain function has none"),
        );
        option(&format!("scope = {word}(\"a\")"), word, "as in `scope = arg(tenant)`");
    }
    anchor("KEY", "KEY", "a constant says what to read in a request");
    anchor("keys::KEY", "keys::KEY", "write `anchor = arg(event_id)`");
    option("scope = TENANT", "TENANT", "write `scope = arg(tenant)`");
    anchor("heder(\"x\")", "heder", "unknown anchor `heder(..)`: expected `arg(..)`");
    anchor("arg()", "arg", "`arg(..)` takes expressions");
    option("scope = globl", "globl", "did you mean `global`?");
    option("scope = tenant", "tenant", "expected `global` or `arg(..)`");
    for (said, key) in [
        ("optional", "optional"),
        ("record = all", "record"),
        ("admit = f", "admit"),
        ("replay = f", "replay"),
        ("replay(status = 200)", "replay"),
        ("issued", "issued"),
        ("refusals = R", "refusals"),
        ("state = S", "state"),
        ("engine = extension", "engine"),
        ("engine = stat", "engine"),
    ] {
        option(said, key, "plain function");
    }
    option("on_unknown = recover = f", "recover = f", "`recover` asks about a request");
    option("on_unknown = rerunn", "rerunn", "did you mean `rerun`?");
    for value in ["json", "request", "body_field(\"a\")", "(none, header(\"a\"))", "FP"] {
        option(&format!("fingerprint = {value}"), value, "has no request to compare");
    }
    option("fingerprint = arg()", "arg", "`arg(..)` takes expressions");
    option("fingerprint = arg(event, event)", "event", "the same argument twice");
    option("operation = \"op\"", "\"op\"", "as in `operation = op`");
    option("operation = a::op", "a::op", "as in `operation = op`");
    option("nothing_happened = |e| true", "|e| true", "`nothing_happened` takes no closure");
    option("nothing_happened = \"f\"", "\"f\"", "takes the path of a function: `fn(&E) -> bool`");
    assert_one(
        "anchor = arg(event, 1), format = uuid",
        FUNCTION,
        "format",
        "check the others in the function's body",
    );
    option("operation = a, operation = b", "operation", "option `operation` given twice");
    option("transaction", "transaction", "is for handlers, which take a `Tx`");
}

#[test]
fn a_plain_function_borrows_nothing_but_its_engine() {
    let args = "anchor = arg(event)";
    let function = |item: &str, underlined: &str, message: &str| {
        assert_one(args, item, underlined, message);
    };
    function("async fn f(i: &I, event: &str) -> R {}", "&str", "may finish after its caller");
    function("async fn f(i: &I, event: Vec<&str>) -> R {}", "&str", "take `String` for `&str`");
    function("async fn f(i: &I, event: Cow<'_, str>) -> R {}", "'_", "may finish after its caller");
    function("async fn f<'a>(i: &'a I, event: u8) -> R {}", "'a", "may finish after its caller");
    function("async fn f(i: &mut I, event: u8) -> R {}", "mut", "take `&Idempotency`");
    function("fn f(i: &I, event: u8) -> R {}", "fn", "functions must be `async fn`");
    function("async unsafe fn f(i: &I, event: u8) -> R {}", "unsafe", "inside the function");
    function("async extern \"C\" fn f(i: &I, event: u8) -> R {}", "extern \"C\"", "leave out");
    function("async fn f(i: &I, #[x] event: u8) -> R {}", "#[x]", "only lint levels");
    function("async fn f(i: &I, event: u8) -> impl Any {}", "impl Any", "say which it is");
    function("#[idempotent(x)] async fn f(i: &I, event: u8) -> R {}", "#[idempotent(x)]", "twice");
    for body in ["Self::g()", "a(|| <Self as B>::c())"] {
        let item = format!("async fn f(i: &I, event: u8) -> R {{ {body} }}");
        function(&item, "f", "a method needs `space = \"...\"`");
    }

    let args = "anchor = arg(event), space = S, engine = arg(self.idem)";
    let method = |item: &str, underlined: &str, message: &str| {
        assert_one(args, item, underlined, message);
    };
    method("async fn f(&self, event: u8) -> R {}", "&self", "take `self: Arc<Self>`");
    method("async fn f(&mut self, event: u8) -> R {}", "&mut self", "take `self: Arc<Self>`");
    method("async fn f(self: &Arc<Self>, event: u8) -> R {}", "self: &Arc<Self>", "take `self:");
    method("async fn f(self, i: &Idempotency) -> R {}", "&Idempotency", "is said twice");
    method("async fn f(self, text: &str) -> R {}", "&str", "may finish after its caller");
    assert_one(
        "anchor = arg(a), engine = arg(a, b)",
        "async fn f(a: A, b: B) -> R {}",
        "arg",
        "one engine is needed",
    );
    assert_one(
        "anchor = arg(a), engine = arg(self.idem)",
        "async fn f(self, a: A) -> R {}",
        "f",
        "another type may have a `f` too",
    );
}

#[test]
fn what_is_a_plain_function_is_told_by_its_signature() {
    let handlers = "handlers take owned extractors, not references";
    assert_handler("async fn f(event: &str) {}", "&str", handlers);
    assert_one("anchor = header(\"a\")", "async fn f(b: &str) {}", "&str", handlers);
    assert_one("anchor = arg(event)", "async fn f(event: Json<&str>) {}", "&str", handlers);
    // A reference that is called as the engine is: the anchor is what is wrong.
    assert_one("anchor = KEY", FUNCTION, "KEY", "a plain function has none");
    assert_option(
        "anchor = KEY, operation = op",
        "operation",
        "a handler takes an argument of type `Operation`",
    );
    assert_option("anchor = KEY, nothing_happened = f", "nothing_happened", "by a 4xx");
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let args = "anchor = heder(\"x\"), tll = 1, ttl = \"24\", ttl = \"1h\", record = sucess lease = \"0s\", \
                transaction, format = hex(0), scope = (header(\"a b\"), path(\"\")), state = , engine = stat";
    let item = "fn f(self, #[x] Json(b): Json<B>, x: &str) {}";
    let places: Vec<String> = mistakes(args, item).into_iter().map(|(at, _)| at).collect();
    let expected = [
        "tll", "ttl", "lease", "state", "fn", "self", "#[x]", "Json<B>", "&str", "stat", "heder",
        "\"a b\"", "\"\"", "lease", "\"0s\"", "\"24\"", "0", "sucess",
    ];
    assert_eq!(places, expected);

    let args = "anchor = header(\"a\"), issued, optional, ttl = TTL, in_flight = wait(\"0s\"), on_unknown = recover, \
                admit = 1, replay(status = 99, merge = { a: x, a: [y, { b: 1u8 }], c }, other = 1)";
    let places: Vec<String> = mistakes(args, HANDLER).into_iter().map(|(at, _)| at).collect();
    let expected = [
        "optional", "ttl", "issued", "\"0s\"", "recover", "1", "other", "99", "x", "y", "1u8", "a",
        "c",
    ];
    assert_eq!(places, expected);
}

#[test]
fn all_mistakes_in_a_plain_function_are_reported_at_once() {
    let args = "anchor = (arg(a), header(\"x\")), scope = TENANT, ttl = \"0s\", issued, tll = 1, record = all, \
                fingerprint = json, operation = 1, engine = arg(self.idem), on_unknown = recover = f";
    let item = "fn f(&self, a: &str) -> impl X {}";
    let places: Vec<String> = mistakes(args, item).into_iter().map(|(at, _)| at).collect();
    let expected = [
        "tll",
        "record",
        "issued",
        "f",
        "1",
        "json",
        "fn",
        "&self",
        "&str",
        "impl X",
        "header",
        "TENANT",
        "\"0s\"",
        "recover = f",
    ];
    assert_eq!(places, expected);
}

#[test]
fn values_are_derived_for_structs_with_fields() {
    for (item, message) in [
        ("struct S;", "cannot tell two keys apart"),
        ("struct S {}", "cannot tell two keys apart"),
        ("enum E { A }", "derived for structs only"),
        ("union U { a: u8 }", "derived for structs only"),
        ("#[anchor(krate = x)] struct S(u8);", "expected `crate = "),
        ("#[anchor(crate = x, crate = y)] struct S(u8);", "option `crate` given twice"),
    ] {
        let derived = derive::anchor_value(tokens(item)).to_string();
        assert!(derived.contains("compile_error"), "{item}: {derived}");
        assert!(derived.contains(message), "{item}: {derived}");
    }
}
