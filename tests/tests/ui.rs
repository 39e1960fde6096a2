//! What does not compile, and what rustc says then: see `ui/README.md`.

#[test]
fn every_mistake_is_explained_at_the_word_that_makes_it() {
    trybuild::TestCases::new().compile_fail("ui/*.rs");
}
