//! What `#[idempotent]` adds to the time that handlers take to compile, and what the crate and each of
//! its features add to a build from nothing.
//!
//! Two packages of a hundred handlers each are written into a temporary directory, alike but for the
//! attribute, and compiled in turn, each time anew and with their dependencies at hand. What is
//! compared is the CPU time of the compiler, which another program on the machine disturbs less than
//! the clock's.

use std::{
    error::Error,
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use bench::{
    machine::package,
    report::{
        At, Goal, Report,
        figure::{CPU_SECONDS, SECONDS},
    },
    statistics::Bound,
};

const HANDLERS: u64 = 100;
/// The ways to compile, each with what to tell cargo.
const PROFILES: [(&str, &[&str]); 3] =
    [("check", &["check"]), ("debug", &["build"]), ("release", &["build", "--release"])];
const FEATURES: [&str; 6] = ["", "seal", "sqlite", "postgres", "mysql", "redis"];

type Failure = Box<dyn Error>;

/// What was asked for on the command line.
struct Options {
    rounds: usize,
    profiles: Vec<String>,
    clean: bool,
}

impl Options {
    fn read() -> Result<Self, Failure> {
        let mut options = Self {
            rounds: 20,
            profiles: PROFILES.map(|(name, _)| name.to_owned()).to_vec(),
            clean: false,
        };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
            match word.as_str() {
                "--rounds" => options.rounds = value()?.parse()?,
                "--only" => options.profiles = value()?.split(',').map(str::to_owned).collect(),
                "--clean" => options.clean = true,
                _ => {
                    return Err(
                        format!("{word}? --rounds N, --only check,debug,release, --clean").into()
                    );
                }
            }
        }
        Ok(options)
    }
}

/// A hundred handlers in a package, or none.
fn write_package(
    directory: &Path,
    name: &str,
    handlers: u64,
    attribute: &str,
) -> Result<(), Failure> {
    let place = directory.join(name);
    fs::create_dir_all(place.join("src"))?;
    let runtime = package().join("../idem-runtime").canonicalize()?;
    let manifest = format!(
        r#"[package]
name = "{name}"
version = "0.0.0"
edition = "2024"

[dependencies]
axum = {{ version = "0.8.9", default-features = false, features = ["http1", "json", "macros", "tokio"] }}
idem-runtime = {{ path = {runtime:?} }}
serde = {{ version = "1", features = ["derive"] }}
tokio = {{ version = "1", features = ["macros", "net", "rt-multi-thread"] }}
"#
    );
    fs::write(place.join("Cargo.toml"), manifest)?;
    let mut source = String::from(
        r#"use axum::{Json, Router, extract::{FromRef, State}, http::StatusCode, routing::post};
use idem_runtime::{Idempotency, Scope, idempotent, store::MemoryStore};
use serde::{Deserialize, Serialize};

#[derive(Clone, FromRef)]
struct App {
    idem: Idempotency,
    rate: u64,
}

#[derive(Deserialize)]
struct Payment {
    to: String,
    amount: u64,
}

#[derive(Serialize)]
struct Receipt {
    id: String,
    amount: u64,
}

/// Where the attribute is not used, it is known all the same.
#[idempotent(anchor = header("Idempotency-Key"))]
async fn one(_body: String) {}
"#,
    );
    for number in 0..handlers {
        source.push_str(&format!(
            r#"
{attribute}
async fn pay_{number}(
    State(app): State<App>,
    Json(payment): Json<Payment>,
) -> Result<(StatusCode, Json<Receipt>), StatusCode> {{
    if payment.amount == {number} {{
        return Err(StatusCode::BAD_REQUEST);
    }}
    tokio::task::yield_now().await;
    let id = format!("{{}}-{number}", payment.to);
    Ok((StatusCode::CREATED, Json(Receipt {{ id, amount: payment.amount * app.rate }})))
}}
"#
        ));
    }
    source.push_str(
        "\n#[tokio::main]\nasync fn main() {\n    let idem = Idempotency::builder(MemoryStore::new())\
         .scope(Scope::global()).build();\n    let app = App { idem, rate: 2 };\n    let router = \
         Router::new()\n        .route(\"/one\", post(one))\n",
    );
    for number in 0..handlers {
        source.push_str(&format!("        .route(\"/pay/{number}\", post(pay_{number}))\n"));
    }
    source.push_str(
        "        .with_state(app);\n    let listener = \
         tokio::net::TcpListener::bind(\"127.0.0.1:0\").await.unwrap();\n    \
         axum::serve(listener, router).await.unwrap();\n}\n",
    );
    fs::write(place.join("src/main.rs"), source)?;
    Ok(())
}

/// CPU seconds of all processes that this one has started and waited for, as the system counts them:
/// in hundredths.
fn cpu_of_children() -> Result<f64, Failure> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let after_name = stat.rsplit_once(") ").ok_or("no name in /proc/self/stat")?.1;
    let ticks = |field: usize| -> Result<f64, Failure> {
        let field = after_name.split(' ').nth(field).ok_or("a short /proc/self/stat")?;
        Ok(field.parse()?)
    };
    Ok((ticks(13)? + ticks(14)?) / 100.0)
}

/// Runs cargo, and says what it took.
fn cargo(directory: &Path, words: &[&str]) -> Result<[(&'static str, f64); 2], Failure> {
    let (cpu, since) = (cpu_of_children()?, Instant::now());
    let mut command = Command::new("cargo");
    command.args(words).arg("--quiet").current_dir(directory);
    // Each time anew: what was compiled of it before says nothing of what it takes.
    command.env("CARGO_INCREMENTAL", "0");
    command.env_remove("CARGO_TARGET_DIR");
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        return Err(format!("cargo {words:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok([(CPU_SECONDS, cpu_of_children()? - cpu), (SECONDS, since.elapsed().as_secs_f64())])
}

fn main() -> Result<(), Failure> {
    let options = Options::read()?;
    let title = "Compiling a hundred handlers, and the crate";
    let mut report = Report::new("compile", title, "bench/run compile");
    let directory = tempfile::tempdir()?;
    let directory = directory.path();
    let members = [
        ("plain", ""),
        ("annotated", "#[idempotent(anchor = header(\"Idempotency-Key\"), ttl = \"24h\")]"),
    ];
    for (name, attribute) in members {
        write_package(directory, name, HANDLERS, attribute)?;
    }
    fs::write(
        directory.join("Cargo.toml"),
        "[workspace]\nresolver = \"3\"\nmembers = [\"plain\", \"annotated\"]\n",
    )?;
    // The versions that the benchmark itself is built with, as far as they occur.
    fs::copy(package().join("Cargo.lock"), directory.join("Cargo.lock"))?;
    for (profile, words) in PROFILES {
        if !options.profiles.iter().any(|wanted| wanted == profile) {
            continue;
        }
        eprintln!("{profile}: the dependencies");
        cargo(directory, &[words, &["--workspace"]].concat())?;
        for round in 0..options.rounds {
            let mut order = ["plain", "annotated"];
            if round % 2 == 1 {
                order.reverse();
            }
            for name in order {
                let source = directory.join(name).join("src/main.rs");
                let text = fs::read_to_string(&source)?;
                fs::write(&source, text)?;
                let took = cargo(directory, &[words, &["-p", name]].concat())?;
                report.add(&At::new(name, profile, HANDLERS), took);
            }
            eprintln!("{profile}: round {} of {}", round + 1, options.rounds);
        }
        let (of, by) =
            (At::new("annotated", profile, HANDLERS), At::new("plain", profile, HANDLERS));
        report.compare(&of, CPU_SECONDS, &by);
        report.compare(&of, SECONDS, &by);
        report.judge(Goal {
            what: format!("{HANDLERS} annotated handlers against plain axum, {profile}"),
            of,
            figure: CPU_SECONDS,
            reference: Some(by),
            bound: Bound::AtMost(if profile == "release" { 1.7 } else { 1.6 }),
        });
    }
    if options.clean {
        clean_builds(directory, &mut report)?;
    }
    println!("{}", report.tables());
    let panels: Vec<_> = PROFILES
        .iter()
        .map(|(profile, _)| {
            report.panel(profile, "handlers", |ratio| {
                ratio.at.phase == *profile && ratio.figure == CPU_SECONDS
            })
        })
        .collect();
    for file in report.write(&panels)? {
        println!("{}", file.display());
    }
    Ok(())
}

/// What it takes to build the crate from nothing, with each of its features alone.
fn clean_builds(directory: &Path, report: &mut Report) -> Result<(), Failure> {
    let manifest = package().join("../Cargo.toml").canonicalize()?;
    let manifest = manifest.to_str().ok_or("a path that is no text")?;
    for feature in FEATURES {
        let target = directory.join("clean");
        let target_directory = target.to_str().ok_or("a path that is no text")?;
        let features: &[&str] = if feature.is_empty() { &[] } else { &["--features", feature] };
        let words = ["build", "--release", "--locked", "-p", "idem-runtime", "--manifest-path"];
        let words = [&words[..], &[manifest, "--target-dir", target_directory], features].concat();
        let took = cargo(directory, &words)?;
        let name = if feature.is_empty() { "without features" } else { feature };
        report.add(&At::new(name, "clean build", 1), took);
        fs::remove_dir_all(target)?;
        eprintln!("clean build: {name}");
    }
    Ok(())
}
