impl<T, U: foo::bar::AnchorValue> foo::bar::AnchorValue for Id<T, U>
where
    U: Copy,
{
    fn write(&self, __values: &mut foo::bar::Values) {
        foo::bar::AnchorValue::write(&self.0, __values);
        foo::bar::AnchorValue::write(&self.1, __values);
        foo::bar::AnchorValue::write(&self.2, __values);
    }
}
