impl<T, U: foo::bar::AnchorValue> foo::bar::AnchorValue for Id<T, U>
where
    U: Copy,
{
    fn write(&self, __values: &mut foo::bar::Values) {
        <u64 as foo::bar::AnchorValue>::write(&self.0, __values);
        <PhantomData<T> as foo::bar::AnchorValue>::write(&self.1, __values);
        <U as foo::bar::AnchorValue>::write(&self.2, __values);
    }
}
