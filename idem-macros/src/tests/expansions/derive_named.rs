impl ::idem_runtime::AnchorValue for Pair {
    fn write(&self, __values: &mut ::idem_runtime::Values) {
        <Kind as ::idem_runtime::AnchorValue>::write(&self.r#type, __values);
        <Uuid as ::idem_runtime::AnchorValue>::write(&self.id, __values);
    }
}
