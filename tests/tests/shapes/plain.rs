//! Plain functions: the shapes that people write for consumers and jobs.

use std::{marker::PhantomData, rc::Rc, sync::Arc};

use idem_runtime::{
    AnchorValue, CallError, Idempotency, Operation, RefusalKind, Scope, idempotent,
    store::MemoryStore,
};
use serde::{Deserialize, Serialize};
use tests::server::Effects;

fn engine() -> Idempotency {
    Idempotency::builder(MemoryStore::new()).scope(Scope::global()).build()
}

#[derive(Debug)]
enum Failed {
    NotDone,
    Call(CallError),
}

impl From<CallError> for Failed {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Delivered {
    number: usize,
}

#[derive(AnchorValue, Clone, Copy)]
struct EventId(u64);

/// Documented, with `mut` and `_` arguments, one taken apart, and the engine in the middle.
#[idempotent(anchor = arg(event, phase), ttl = "7d")]
#[allow(clippy::ptr_arg, reason = "an attribute that is not ours")]
async fn deliver(
    mut effects: Effects,
    event: EventId,
    idem: &Idempotency,
    phase: &'static str,
    (_, number): (Rc2, usize),
    _: String,
) -> Result<Delivered, Failed> {
    effects.happen();
    effects = effects.clone();
    assert_eq!(idem.detached(), 0);
    if number == 0 {
        return Err(Failed::NotDone);
    }
    Ok(Delivered { number: effects.count() })
}

/// `Rc` is not `Send`, but a mark of it is.
type Rc2 = PhantomData<fn() -> Rc<u8>>;

#[tokio::test]
async fn the_signature_is_what_it_was() {
    let (idem, effects) = (engine(), Effects::default());
    for _ in 0..3 {
        let call =
            deliver(effects.clone(), EventId(7), &idem, "sent", (PhantomData, 1), String::new());
        assert_eq!(call.await.unwrap(), Delivered { number: 1 });
    }
    let other =
        deliver(effects.clone(), EventId(7), &idem, "read", (PhantomData, 1), String::new());
    assert_eq!(other.await.unwrap(), Delivered { number: 2 });
    let failed =
        deliver(effects.clone(), EventId(8), &idem, "read", (PhantomData, 0), String::new());
    match failed.await {
        Err(Failed::NotDone) => {}
        Err(Failed::Call(error)) => panic!("{error}"),
        Ok(delivered) => panic!("{delivered:?}"),
    }
}

#[derive(Clone)]
struct Consumer {
    idem: Idempotency,
    effects: Effects,
}

impl Consumer {
    const SPACE: &'static str = "consumer";

    #[idempotent(anchor = arg(event), engine = arg(self.idem), space = Self::SPACE)]
    async fn take(self: Arc<Self>, event: u64) -> Result<usize, CallError> {
        Ok(self.effects.happen() + usize::try_from(event).unwrap_or_default())
    }

    #[idempotent(anchor = arg(event), engine = arg(self.idem), space = "by value")]
    async fn by_value(mut self, event: u64) -> Result<usize, CallError> {
        self.effects = self.effects.clone();
        Ok(self.effects.happen())
    }

    /// The body says nothing of `self`, which lives as long as it does.
    #[idempotent(anchor = arg(1), engine = arg(self.engine()), space = "unsaid")]
    async fn unsaid(self: Box<Self>) -> Result<(), CallError> {
        Ok(())
    }

    fn engine(&self) -> &Idempotency {
        &self.idem
    }

    #[idempotent(anchor = arg(name), space = "associated")]
    async fn associated(idem: &Idempotency, name: String) -> Result<String, CallError> {
        Self::mark(idem, name).await
    }

    async fn mark(_: &Idempotency, name: String) -> Result<String, CallError> {
        Ok(name + "!")
    }
}

#[tokio::test]
async fn functions_belong_to_types() {
    let consumer = Arc::new(Consumer { idem: engine(), effects: Effects::default() });
    assert_eq!(Arc::clone(&consumer).take(10).await.unwrap(), 11);
    assert_eq!(Arc::clone(&consumer).take(10).await.unwrap(), 11);
    assert_eq!(Consumer::clone(&consumer).by_value(10).await.unwrap(), 2);
    assert_eq!(Consumer::clone(&consumer).by_value(10).await.unwrap(), 2);
    Box::new(Consumer::clone(&consumer)).unsaid().await.unwrap();
    for _ in 0..2 {
        let name = Consumer::associated(&consumer.idem, "a".to_owned()).await;
        assert_eq!(name.unwrap(), "a!");
    }
    assert_eq!(consumer.effects.count(), 2);
}

trait Job {
    async fn run(idem: &Idempotency, id: u32) -> Result<u32, CallError>;
}

struct Nightly;

impl Job for Nightly {
    #[idempotent(anchor = arg(id), space = "nightly")]
    async fn run(idem: &Idempotency, id: u32) -> Result<u32, CallError> {
        tokio::task::yield_now().await;
        Ok(id)
    }
}

trait Named: Send {
    const NAME: &'static str;
}

impl Named for Nightly {
    const NAME: &'static str = "nightly";
}

#[idempotent(anchor = arg(id), scope = arg(T::NAME), engine = arg(context.0))]
async fn generic<T, const N: usize>(
    context: (Idempotency, PhantomData<T>),
    id: impl AnchorValue + Send + 'static,
) -> Result<Vec<String>, Box<dyn std::error::Error + Send + Sync>>
where
    T: Named,
{
    let mut names = Vec::new();
    names.resize(N, T::NAME.to_owned());
    Ok(names)
}

#[tokio::test]
async fn functions_are_generic_and_implement_traits() {
    let idem = engine();
    assert_eq!(Nightly::run(&idem, 7).await.unwrap(), 7);
    let names = generic::<Nightly, 2>((idem.clone(), PhantomData), 7_u8).await;
    assert_eq!(names.unwrap(), ["nightly", "nightly"]);
}

type Answer<T> = Result<T, CallError>;

#[tracing::instrument(skip(idem))]
#[idempotent(anchor = arg(id), operation = op)]
#[tracing::instrument(skip_all, fields(id))]
#[must_use = "it is a future"]
async fn instrumented(idem: &Idempotency, id: u32) -> Answer<(u32, bool)> {
    struct Local(u32);
    let local = Local(op.attempt());
    let inner = nested(idem, id).await?;
    Ok((local.0, op.derive("a").to_string() != inner))
}

#[idempotent(anchor = arg(r#type), operation = r#op)]
async fn nested(idem: &Idempotency, r#type: u32) -> Answer<String> {
    Ok(op.derive("a").to_string())
}

#[tokio::test]
async fn one_function_calls_another_as_an_operation_of_its_own() {
    assert_eq!(instrumented(&engine(), 7).await.unwrap(), (1, true));
}

/// Unless it is boxed, an `async fn` cannot call itself: so it is here.
fn countdown_boxed(
    idem: Idempotency,
    from: u32,
) -> futures_util::future::BoxFuture<'static, Answer<u32>> {
    Box::pin(async move { countdown(&idem, from).await })
}

#[idempotent(anchor = arg(from))]
async fn countdown(idem: &Idempotency, from: u32) -> Answer<u32> {
    match from {
        0 => Ok(0),
        _ => Ok(1 + countdown_boxed(idem.clone(), from - 1).await?),
    }
}

#[tokio::test]
async fn a_function_calls_itself_under_another_key() {
    let idem = engine();
    assert_eq!(countdown(&idem, 3).await.unwrap(), 3);
    assert_eq!(countdown(&idem, 2).await.unwrap(), 2);
}

macro_rules! consumers {
    ($($name:ident: $id:ident, $anchor:expr;)*) => {$(
        #[idempotent(anchor = arg($anchor), fingerprint = arg($id), operation = operation)]
        async fn $name(idem: &Idempotency, $id: u64) -> Answer<u32> {
            let __args = $id;
            Ok(operation.attempt() + u32::try_from(__args).unwrap_or_default())
        }
    )*};
}

consumers! {
    first: id, id % 2;
    second: __args, __args % 2;
}

#[tokio::test]
async fn functions_come_out_of_macros() {
    let idem = engine();
    assert_eq!(first(&idem, 2).await.unwrap(), 3);
    assert_eq!(second(&idem, 2).await.unwrap(), 3);
    let error = first(&idem, 4).await.unwrap_err();
    assert_eq!(error.kind(), RefusalKind::Mismatch);
}

/// Nothing of the engine's says `Operation` here; the option does.
#[idempotent(anchor = arg(1), operation = operation)]
async fn typed(_: &Idempotency) -> Answer<u32> {
    let operation: Operation = operation;
    Ok(operation.attempt())
}

#[tokio::test]
async fn the_operation_is_bound_by_the_name_that_was_said() {
    assert_eq!(typed(&engine()).await.unwrap(), 1);
}

#[tokio::test]
async fn what_runs_is_sent_to_another_thread() {
    let idem = engine();
    let call = tokio::spawn(async move { typed(&idem).await });
    assert_eq!(call.await.unwrap().unwrap(), 1);
}
