//! What does not compile, and what rustc says then: see `ui/README.md`.

use std::{collections::BTreeMap, ffi::OsStr, fs, io, path::Path};

#[test]
fn every_mistake_is_explained_at_the_word_that_makes_it() {
    trybuild::TestCases::new().compile_fail("ui/*.rs");
}

/// The text of each case and of what rustc says of it, by its name.
fn cases() -> io::Result<BTreeMap<String, [String; 2]>> {
    let mut cases = BTreeMap::<String, [String; 2]>::new();
    for entry in fs::read_dir("ui")? {
        let path = entry?.path();
        let side = match path.extension().and_then(OsStr::to_str) {
            Some("rs") => 0,
            Some("stderr") => 1,
            _ => continue,
        };
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        cases.entry(name).or_default()[side] = fs::read_to_string(Path::new(&path))?;
    }
    Ok(cases)
}

#[test]
fn a_mistake_never_makes_the_handler_disappear() {
    for (name, [_, said]) in cases().unwrap() {
        assert!(!said.contains("cannot find function"), "{name}: {said}");
    }
}

#[test]
fn no_case_depends_on_whether_the_sources_of_the_standard_library_are_installed() {
    for (name, [_, said]) in cases().unwrap() {
        assert!(!said.contains("$RUST"), "{name}: {said}");
    }
}

#[test]
fn every_case_says_which_rule_it_breaks_and_what_rustc_says() {
    for (name, [case, said]) in cases().unwrap() {
        assert!(case.contains("// "), "{name}.rs has no comment");
        assert!(said.contains("error"), "{name}.stderr is missing");
        assert!(case.contains("fn main"), "{name}.stderr has no case");
    }
}
