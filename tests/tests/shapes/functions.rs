//! Where functions are written, and the parameters that they have.

use std::marker::PhantomData;

use axum::{
    Extension, Json, Router, extract::State, http::HeaderMap, response::IntoResponse, routing,
};
use idem_runtime::{Idempotency, idempotent};
use serde::{Deserialize, Serialize};

use crate::support::{answers_and_replays, at, idem, post, under, with};

trait Database: Send + Sync {
    fn name() -> &'static str;
}

struct Pg;

impl Database for Pg {
    fn name() -> &'static str {
        "postgres"
    }
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn generic<D: Database>(body: String) -> String {
    format!("{} {body}", D::name())
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn bounded_in_a_clause<D, T>(Json(body): Json<T>) -> Result<Json<T>, String>
where
    D: Database,
    T: Serialize + for<'de> Deserialize<'de> + Send,
{
    if D::name().is_empty() {
        return Err("no database".to_owned());
    }
    Ok(Json(body))
}

#[idempotent(anchor = arg(body))]
async fn constant<const TIMES: usize>(body: String) -> String {
    body.repeat(TIMES)
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn extension_of_a_parameter<T>(Extension(greeting): Extension<T>, body: String) -> String
where
    T: Clone + ToString + Send + Sync,
{
    greeting.to_string() + &body
}

#[tokio::test]
async fn functions_are_generic() {
    let app = at("/", routing::post(generic::<Pg>));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "postgres a");
    let app = at("/", routing::post(bounded_in_a_clause::<Pg, u64>));
    assert_eq!(answers_and_replays(&app, post("/", "7")).await.text(), "7");
    let app = at("/", routing::post(constant::<3>));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "aaa");
    let app = at("/", routing::post(extension_of_a_parameter::<u64>).layer(Extension(7_u64)));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "7a");
}

struct Payments;

impl Payments {
    const PREFIX: &'static str = "paid ";

    #[idempotent(anchor = header("Idempotency-Key"))]
    async fn create(body: String) -> String {
        Self::PREFIX.to_owned() + &body
    }

    #[idempotent(anchor = header("Idempotency-Key"), space = Self::PREFIX)]
    async fn in_its_own_space(body: String) -> Receipt<Self> {
        Receipt(body, PhantomData)
    }
}

struct Receipt<T>(String, PhantomData<T>);

impl<T> IntoResponse for Receipt<T> {
    fn into_response(self) -> axum::response::Response {
        self.0.into_response()
    }
}

struct Over<D>(PhantomData<D>);

impl<D: Database + 'static> Over<D> {
    #[idempotent(anchor = header("Idempotency-Key"))]
    async fn create(body: String) -> String {
        format!("{} {}", D::name(), Self::mark(body))
    }

    fn mark(body: String) -> String {
        body + "!"
    }
}

#[tokio::test]
async fn functions_belong_to_types() {
    let app = at("/", routing::post(Payments::create));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "paid a");
    let app = at("/", routing::post(Payments::in_its_own_space));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "a");
    let app = at("/", routing::post(Over::<Pg>::create));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "postgres a!");
}

mod elsewhere {
    use idem_runtime::idempotent;

    pub(crate) mod deeper {
        /// Documented, public, and found through two re-exports.
        #[super::idempotent(anchor = header("Idempotency-Key"))]
        #[must_use = "it is a future"]
        #[inline]
        pub(crate) async fn create(body: String) -> String {
            body
        }

        #[idem_runtime::idempotent(anchor = header("Idempotency-Key"))]
        pub(in crate::functions) async fn update(body: String) -> String {
            body
        }
    }

    pub(crate) use deeper::create;
    pub(crate) use deeper::create as renamed;
}

use elsewhere::{create, renamed};

#[tokio::test]
async fn functions_are_used_from_other_modules() {
    for handler in
        [routing::post(create), routing::post(renamed), routing::post(elsewhere::deeper::update)]
    {
        answers_and_replays(&at("/", handler), post("/", "a")).await;
    }
}

#[tokio::test]
async fn functions_stand_inside_functions() {
    #[idempotent(anchor = header("Idempotency-Key"))]
    async fn local(body: String) -> String {
        body
    }
    answers_and_replays(&at("/", routing::post(local)), post("/", "a")).await;
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn r#type(r#match: String) -> String {
    r#match
}

#[idempotent(anchor = arg(r#in.r#fn))]
async fn r#loop(Json(r#in): Json<Raw>) -> String {
    r#in.r#fn
}

#[derive(Deserialize)]
struct Raw {
    r#fn: String,
}

#[tokio::test]
async fn names_can_be_raw_identifiers() {
    answers_and_replays(&at("/", routing::post(r#type)), post("/", "a")).await;
    let app = at("/", routing::post(r#loop));
    assert_eq!(answers_and_replays(&app, post("/", r#"{"fn":"a"}"#)).await.text(), "a");
}

#[idempotent(anchor = header("Idempotency-Key"))]
async fn transfer(body: String) -> String {
    let transfer = body;
    let create = |transfer: String| transfer + "!";
    create(transfer)
}

#[tokio::test]
async fn a_local_variable_can_be_called_like_the_handler() {
    let transfer = at("/", routing::post(transfer));
    assert_eq!(answers_and_replays(&transfer, post("/", "a")).await.text(), "a!");
}

macro_rules! creates {
    ($name:ident, $body:ident: $type:ty => $answer:expr) => {
        #[idempotent(anchor = header("Idempotency-Key"))]
        async fn $name(Json($body): Json<$type>) -> String {
            $answer
        }
    };
    ($name:ident by $($anchor:tt).+ of $type:ty) => {
        #[idempotent(anchor = arg(body.$($anchor).+), ttl = "1h")]
        async fn $name(State(engine): State<Idempotency>, Json(body): Json<$type>) -> String {
            let args = format!("{}", body.$($anchor).+);
            drop(engine);
            args
        }
    };
    ($name:ident anchored $anchor:expr) => {
        #[idempotent(anchor = arg($anchor))]
        async fn $name(body: String) -> String {
            body
        }
    };
    ($vis:vis fn $name:ident($($pattern:pat => $type:ty),*) $block:block) => {
        #[idempotent(anchor = header("Idempotency-Key"))]
        $vis async fn $name($($pattern: $type),*) -> String $block
    };
}

#[derive(Deserialize)]
struct Message {
    inner: Inner,
}

#[derive(Deserialize)]
struct Inner {
    nonce: String,
}

creates!(by_template, payment: u64 => payment.to_string());
creates!(by_anchor by inner.nonce of Message);
creates!(by_constant anchored "always");
creates!(pub(crate) fn by_block(State(engine) => State<Idempotency>, body => String) {
    drop(engine);
    body
});

#[tokio::test]
async fn functions_come_out_of_declarative_macros() {
    let app = at("/", routing::post(by_template));
    assert_eq!(answers_and_replays(&app, post("/", "7")).await.text(), "7");
    let app = at("/", routing::post(by_anchor));
    let body = r#"{"inner":{"nonce":"n-1"}}"#;
    assert_eq!(answers_and_replays(&app, post("/", body)).await.text(), "n-1");
    let app = at("/", routing::post(by_constant));
    answers_and_replays(&app, under("k-1", post("/", "a"))).await;
    let app = at("/", routing::post(by_block));
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "a");
}

pub(crate) use idem_runtime as reexported;

pub(crate) mod declared {
    use std::time::Duration;

    use idem_runtime::Anchor;

    pub(crate) const BY_HEADER: Anchor = Anchor::header("Idempotency-Key");
    pub(crate) const HOUR: Duration = Duration::from_secs(3600);
}

/// Every option out of a fragment of the kind that fits it.
macro_rules! configured {
    (
        $name:ident: $header:literal, $ttl:literal, $lease:path, $space:expr, $recorded:ident,
        $state:ty, $scope:expr, $body:expr
    ) => {
        #[idempotent(
            anchor = ($crate::functions::declared::BY_HEADER, header($header)),
            ttl = $ttl,
            lease = $lease,
            space = $space,
            record = $recorded,
            scope = arg($scope),
            state = $state,
            crate = $crate::functions::reexported,
        )]
        #[tracing::instrument(skip_all)]
        async fn $name(headers: HeaderMap, body: String) -> String {
            tracing::trace!(headers = headers.len());
            drop(headers);
            body + $body
        }
    };
    ($name:ident by $anchor:path) => {
        configured!($name by expression $anchor);
    };
    ($name:ident by expression $anchor:expr) => {
        #[idempotent(anchor = $anchor)]
        async fn $name(body: String) -> String {
            body
        }
    };
}

configured!(
    by_fragments: "X-Order", "1h", declared::HOUR, "orders", final, Idempotency, "everybody", "!"
);
configured!(by_path by declared::BY_HEADER);
configured!(by_expression by expression declared::BY_HEADER);

#[tokio::test]
async fn options_come_out_of_declarative_macros() {
    let app = at("/", routing::post(by_fragments));
    let request = with(post("/", "a"), "x-order", "7");
    assert_eq!(answers_and_replays(&app, request).await.text(), "a!");
    answers_and_replays(&at("/", routing::post(by_path)), post("/", "a")).await;
    answers_and_replays(&at("/", routing::post(by_expression)), post("/", "a")).await;
}

/// A resource whose handlers a trait makes possible: the associated function is the handler.
trait Resource: Send + Sync + 'static {
    const NAME: &'static str;

    fn routes() -> Router<Idempotency>
    where
        Self: Sized,
    {
        #[idempotent(anchor = header("Idempotency-Key"))]
        async fn create<R: Resource>(body: String) -> String {
            format!("{} {body}", R::NAME)
        }
        Router::new().route("/", routing::post(create::<Self>))
    }
}

struct Invoice;

impl Resource for Invoice {
    const NAME: &'static str = "invoice";
}

#[tokio::test]
async fn a_trait_makes_handlers_for_its_types() {
    let app = Invoice::routes().with_state(idem());
    assert_eq!(answers_and_replays(&app, post("/", "a")).await.text(), "invoice a");
}
