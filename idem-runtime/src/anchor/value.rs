//! Types whose values may enter a key.

use std::{borrow::Cow, sync::Arc};

use uuid::Uuid;

use crate::key::Values;

/// A type whose values may enter a key by `anchor = arg(…)` or `scope = arg(…)`.
///
/// Values enter as their text, one part for each. Implement it for newtypes of ids with
/// `#[derive(AnchorValue)]`. Floating-point numbers are left out on purpose: their text is not
/// stable.
///
/// ```
/// use idem_runtime::{AnchorValue, Values};
///
/// #[derive(AnchorValue)]
/// struct InvoiceId(u64);
///
/// let mut values = Values::new();
/// InvoiceId(7).write(&mut values);
/// assert_eq!(values, Values::from_iter(["7"]));
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be used as an idempotency anchor",
    label = "this anchor has type `{Self}`",
    note = "anchors are strings, characters, integers, booleans, UUIDs, tuples of these, or types with `#[derive(AnchorValue)]`"
)]
pub trait AnchorValue {
    /// Adds the parts of this value.
    fn write(&self, values: &mut Values);
}

/// The values that generated code took from the arguments of a handler or a function, in the order
/// in which the policy's anchor and then its scope ask for them.
#[derive(Debug, Default)]
pub struct Arguments(pub(crate) Vec<Values>);

impl Arguments {
    /// None yet.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// The next one.
    pub fn push<V: AnchorValue + ?Sized>(&mut self, value: &V) {
        let mut values = Values::new();
        value.write(&mut values);
        self.0.push(values);
    }
}

macro_rules! by_display {
    ($($type:ty),*) => {$(
        impl AnchorValue for $type {
            fn write(&self, values: &mut Values) {
                values.push(self.to_string());
            }
        }
    )*};
}

by_display!(u8, u16, u32, u64, u128, usize, i8, i16, i32, i64, i128, isize, bool, char, Uuid);

impl AnchorValue for str {
    fn write(&self, values: &mut Values) {
        values.push(self);
    }
}

impl AnchorValue for String {
    fn write(&self, values: &mut Values) {
        values.push(self);
    }
}

macro_rules! by_reference {
    ($($pointer:ty),*) => {$(
        #[diagnostic::do_not_recommend]
        impl<T: AnchorValue + ?Sized> AnchorValue for $pointer {
            fn write(&self, values: &mut Values) {
                T::write(self, values);
            }
        }
    )*};
}

by_reference!(&T, Box<T>, Arc<T>, std::rc::Rc<T>);

/// A list is its values.
impl AnchorValue for Values {
    fn write(&self, values: &mut Values) {
        values.extend(self);
    }
}

/// No value at all: the scope of a key that is [global](crate::Scope::global).
impl AnchorValue for () {
    fn write(&self, _: &mut Values) {}
}

/// A mark in a type has no value.
impl<T: ?Sized> AnchorValue for std::marker::PhantomData<T> {
    fn write(&self, _: &mut Values) {}
}

impl<T: AnchorValue + ToOwned + ?Sized> AnchorValue for Cow<'_, T> {
    fn write(&self, values: &mut Values) {
        T::write(self, values);
    }
}

macro_rules! by_members {
    ($($name:ident),*) => {
        #[diagnostic::do_not_recommend]
        impl<$($name: AnchorValue),*> AnchorValue for ($($name,)*) {
            #[allow(non_snake_case, reason = "the type parameters name their members")]
            fn write(&self, values: &mut Values) {
                let ($($name,)*) = self;
                $($name.write(values);)*
            }
        }
    };
}

by_members!(A, B);
by_members!(A, B, C);
by_members!(A, B, C, D);
by_members!(A, B, C, D, E);
by_members!(A, B, C, D, E, F);
