//! The name of a key: what a request with it would say, for whoever looks it up.

use std::{borrow::Cow, sync::Arc};

use http::Method;

use super::{Endpoint, Key, Route, Space, Values, parameter_names};
use crate::{
    anchor::{Anchor, AnchorError, AnchorValue, Format},
    engine::Shared,
};

/// A key by its name: what a request with it would say, so that its record can be looked up by
/// [`LookUp::key`](crate::LookUp::key) and [`Admin::find`](crate::Admin::find).
///
/// An anchor that names a space is enough:
///
/// ```
/// use idem_runtime::{Anchor, Format, KeyName};
///
/// const FLOW_ID: Anchor =
///     Anchor::body_field("flowId").format(Format::Uuid).space("enrolment");
///
/// let name = KeyName::of(&FLOW_ID, "7b1a9c6e-58a4-4d2c-9d9b-0c6f5d1f0e2a");
/// # drop(name);
/// ```
///
/// Otherwise each operation is a space of its own, and the name says which one it was:
///
/// ```
/// # use idem_runtime::{Anchor, KeyName};
/// use http::Method;
///
/// const KEY: Anchor = Anchor::header("Idempotency-Key");
///
/// // POST /payments/7/refunds with `Idempotency-Key: order-1`
/// let name =
///     KeyName::of(&KEY, "order-1").operation(&Method::POST, "/payments/{id}/refunds", ["7"]);
/// # drop(name);
/// ```
#[derive(Clone, Debug)]
pub struct KeyName {
    anchor: Anchor,
    values: Values,
    space: Option<Cow<'static, str>>,
    operation: Option<Operation>,
    is_layers: bool,
    function: Option<Cow<'static, str>>,
}

/// A method and a route with the values of its parameters.
#[derive(Clone)]
struct Operation {
    method: Method,
    route: String,
    parameters: Vec<String>,
}

/// Values of parameters may be keys: only their number is shown.
impl std::fmt::Debug for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} ({} redacted)", self.method, self.route, self.parameters.len())
    }
}

impl KeyName {
    /// The key that an anchor takes from a request with this value; of a composite anchor, the
    /// values in their order. They are checked and brought into one spelling as a request's are.
    ///
    /// What a handler says beside its anchor must be said here, too: its
    /// [`space`](Self::space), its `format` as `&ANCHOR.format(…)`.
    pub fn of(anchor: &Anchor, value: &(impl AnchorValue + ?Sized)) -> Self {
        let mut values = Values::new();
        value.write(&mut values);
        Self {
            anchor: *anchor,
            values,
            space: None,
            operation: None,
            is_layers: false,
            function: None,
        }
    }

    /// The key that `anchor = arg(…)` takes from these arguments.
    pub fn of_arguments(arguments: &(impl AnchorValue + ?Sized)) -> Self {
        Self::of(&Anchor::argument(), arguments)
    }

    /// Checks each value and brings it into one canonical form, as `format = …` does for a handler
    /// whose anchor does not say it.
    ///
    /// # Panics
    ///
    /// When it is [`Format::Hex`] of no bytes.
    #[must_use]
    #[track_caller]
    pub fn format(mut self, format: Format) -> Self {
        self.anchor = self.anchor.format(format);
        self
    }

    /// The space of the handlers that take it, where their anchor does not name it.
    #[must_use]
    pub fn space(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.space = Some(name.into());
        self
    }

    /// The operation that it was sent to: method, the route as the router matched it (with the
    /// prefixes of nested routers), and the *decoded* values of the route's parameters. The names
    /// of the parameters make no difference, unless the anchor is one of them.
    ///
    /// Where there is a space, an operation is no part of the key, and this says nothing. A request
    /// that no route matched, as around a whole router, has no such name: find its record by its
    /// operation id.
    #[must_use]
    pub fn operation<P: Into<String>>(
        mut self,
        method: &Method,
        route: impl Into<String>,
        parameters: impl IntoIterator<Item = P>,
    ) -> Self {
        let parameters = parameters.into_iter().map(Into::into).collect();
        self.operation =
            Some(Operation { method: method.clone(), route: route.into(), parameters });
        self
    }

    /// The key under which a [layer](crate::Idempotency::layer) claimed the operation, and not the
    /// handler behind it.
    ///
    /// ```
    /// use axum::{Router, routing::post};
    /// use http::Method;
    /// use idem_runtime::{Anchor, Idempotency, KeyName, Scope, store::MemoryStore};
    ///
    /// const KEY: Anchor = Anchor::header("Idempotency-Key");
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let idem = Idempotency::builder(MemoryStore::new()).scope(Scope::global()).build();
    /// let app: Router = Router::new()
    ///     .route("/payments", post(|| async { "paid" }))
    ///     .route_layer(idem.layer(KEY));
    /// # use tower::ServiceExt;
    /// # let request = http::Request::post("/payments").header("idempotency-key", "order-1");
    /// # app.oneshot(request.body(axum::body::Body::empty())?).await?;
    /// let name = KeyName::of(&KEY, "order-1").operation(&Method::POST, "/payments", [""; 0]);
    /// assert!(idem.look_up(&()).key(&name.of_layer()).await?.is_some());
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub const fn of_layer(mut self) -> Self {
        self.is_layers = true;
        self
    }

    /// The plain function that it was given to, by its path: `my_crate::jobs::deliver`. It is that of
    /// the module and the function's name, also of a method or of a function within another.
    ///
    /// A function that names a space is found by that [space](Self::space) instead; one that the
    /// engine names is none of its.
    ///
    /// ```
    /// use idem_runtime::{CallError, Idempotency, KeyName, Scope, idempotent, store::MemoryStore};
    ///
    /// #[idempotent(anchor = arg(event))]
    /// async fn deliver(idem: &Idempotency, event: u64) -> Result<(), CallError> {
    ///     Ok(())
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let idem = Idempotency::builder(MemoryStore::new()).scope(Scope::global()).build();
    /// deliver(&idem, 7).await?;
    /// let name = KeyName::of_arguments(&7_u64).function(concat!(module_path!(), "::deliver"));
    /// assert!(idem.look_up(&()).key(&name).await?.is_some());
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn function(mut self, path: impl Into<Cow<'static, str>>) -> Self {
        self.function = Some(path.into());
        self
    }
}

impl Shared {
    /// The key of this name in a scope.
    pub(crate) fn named(&self, name: &KeyName, scope: &Values) -> Result<Key, KeyNameError> {
        let values = name.anchor.checked(&name.values, self.limits.key_length)?;
        // The engine's space is for the requests of an API.
        let engines = self.options.space.filter(|_| name.function.is_none());
        let said = name.anchor.options.space.or(engines);
        if let Some(space) = name.space.as_deref().or(said) {
            return Ok(self.digester.key(Space::Named(space), scope, &values));
        }
        if let Some(path) = &name.function {
            return Ok(self.digester.key(Space::Function(path), scope, &values));
        }
        let operation = name.operation.as_ref().ok_or(KeyNameError::NoSpace)?;
        let Operation { method, route, parameters } = operation;
        let names = parameter_names(route);
        if names.len() != parameters.len() {
            let (expected, given) = (names.len(), parameters.len());
            return Err(KeyNameError::Parameters { route: route.clone(), expected, given });
        }
        let spelt: Vec<_> = names
            .iter()
            .zip(parameters)
            .map(|(parameter, value)| name.anchor.spelling(parameter, value))
            .collect();
        let spelt = spelt.iter().map(AsRef::as_ref);
        let route = Arc::new(Route::new(method.as_str(), Some(route)));
        let endpoint = Endpoint::matched(route, spelt);
        let space = match name.is_layers {
            true => Space::Layer(&endpoint),
            false => Space::Operation(&endpoint),
        };
        Ok(self.digester.key(space, scope, &values))
    }
}

/// Why a name is not that of a key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyNameError {
    /// Neither the anchor nor the engine names a space, and no operation or function was said. Add
    /// [`operation`](KeyName::operation), [`function`](KeyName::function) or
    /// [`space`](KeyName::space) to the name.
    #[error("the key's name has neither a space nor an operation nor a function")]
    NoSpace,
    /// The route has more or fewer parameters.
    #[error("the route {route} has {expected} parameters, and {given} values were given")]
    Parameters {
        /// The route.
        route: String,
        /// How many parameters it has.
        expected: usize,
        /// How many values were given.
        given: usize,
    },
    /// The value cannot be a key of this anchor.
    #[error("the value cannot be a key of this anchor")]
    Value(#[from] AnchorError),
}
