//! What a measurement found: the figures of each round, what they say of the goals, and how both
//! are shown.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    machine::{Machine, results},
    plot::{Panel, Series, svg},
    statistics::{Bound, Quartiles, Verdict, counted, ratios, short},
};

/// The names of figures. Each is one number a round.
pub mod figure {
    /// Operations a second.
    pub const THROUGHPUT: &str = "per second";
    /// The median of the latencies, in microseconds.
    pub const P50: &str = "p50 µs";
    /// Their 99th percentile, in microseconds.
    pub const P99: &str = "p99 µs";
    /// CPU time an operation of the process that is measured, in microseconds.
    pub const CPU: &str = "CPU µs";
    /// CPU time an operation of the database server, in microseconds.
    pub const DATABASE_CPU: &str = "database CPU µs";
    /// Both.
    pub const BOTH_CPU: &str = "CPU µs on both sides";
    /// The share of one core that generating the load has used.
    pub const LOAD: &str = "load";
    /// Instructions an operation, without those of SHA-256.
    pub const INSTRUCTIONS: &str = "instructions";
    /// Instructions an operation of SHA-256, where that is counted apart.
    pub const DIGEST: &str = "of SHA-256, in software";
    /// Of the instructions, those that let a handler survive a client that hangs up.
    pub const PROTECTION: &str = "of surviving a hang-up";
    /// CPU time an operation, in nanoseconds.
    pub const NANOSECONDS: &str = "CPU ns";
    /// The longest turn, in microseconds of CPU time.
    pub const LONGEST: &str = "longest, CPU µs";
    /// Bytes a record in memory.
    pub const BYTES: &str = "bytes in memory";
    /// What something took by the clock, in seconds.
    pub const SECONDS: &str = "seconds";
    /// CPU time that it took, in seconds.
    pub const CPU_SECONDS: &str = "CPU seconds";
    /// Bytes an operation of the database's log.
    pub const LOG_BYTES: &str = "bytes of log";
    /// Bytes an operation that the disk was given to write.
    pub const DISK_BYTES: &str = "bytes to disk";
}

/// What figures are of.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct At {
    /// Who did it.
    pub contender: String,
    /// What was done.
    pub phase: String,
    /// How many at once.
    pub callers: u64,
    /// How many records there were before, where that was varied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub records: Option<u64>,
}

impl At {
    /// Figures of a contender.
    pub fn new(contender: &str, phase: &str, callers: u64) -> Self {
        Self { contender: contender.to_owned(), phase: phase.to_owned(), callers, records: None }
    }
}

/// The figures of all rounds.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Cell {
    /// What they are of.
    #[serde(flatten)]
    pub at: At,
    /// By name, one a round.
    pub figures: BTreeMap<String, Vec<f64>>,
}

/// One figure divided by another, round by round.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Ratio {
    /// Of what.
    #[serde(flatten)]
    pub at: At,
    /// Which figure.
    pub figure: String,
    /// By what.
    pub reference: At,
    /// The quartiles of the ratios.
    pub ratio: Quartiles,
}

/// What was hoped for.
#[derive(Clone, Debug)]
pub struct Goal {
    /// In words.
    pub what: String,
    /// Whose figure.
    pub of: At,
    /// Which figure.
    pub figure: &'static str,
    /// By what it is divided, if it is.
    pub reference: Option<At>,
    /// What it should be.
    pub bound: Bound,
}

/// A goal, and what became of it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Judged {
    /// In words.
    pub what: String,
    /// What was hoped for.
    pub bound: Bound,
    /// What it is.
    pub measured: Quartiles,
    /// Of how many rounds.
    pub rounds: usize,
    /// Whether it is what was hoped for.
    pub verdict: Verdict,
}

/// What a measurement found.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Report {
    /// The name of the question, which is the file's.
    pub question: String,
    /// In words.
    pub title: String,
    /// What was typed.
    pub command: String,
    /// On what.
    pub machine: Machine,
    /// How: what the servers say of their versions and durability, and how the load was.
    pub settings: BTreeMap<String, String>,
    /// What became of the goals.
    pub goals: Vec<Judged>,
    /// How contenders compare.
    pub ratios: Vec<Ratio>,
    /// All figures.
    pub cells: Vec<Cell>,
}

impl Report {
    /// An empty one. `command` is what answers the question, without the options that it was
    /// given now.
    pub fn new(question: &str, title: &str, command: &str) -> Self {
        let options = std::env::args().skip(1).map(|option| format!(" {option}"));
        Self {
            question: question.to_owned(),
            title: title.to_owned(),
            command: command.to_owned() + &options.collect::<String>(),
            machine: Machine::here(),
            settings: BTreeMap::new(),
            goals: Vec::new(),
            ratios: Vec::new(),
            cells: Vec::new(),
        }
    }

    /// Adds the figures of a round.
    pub fn add(&mut self, at: &At, figures: impl IntoIterator<Item = (&'static str, f64)>) {
        let index = self.cells.iter().position(|cell| cell.at == *at).unwrap_or_else(|| {
            self.cells.push(Cell { at: at.clone(), figures: BTreeMap::new() });
            self.cells.len() - 1
        });
        for (name, figure) in figures {
            // More digits than a measurement has are only in the way.
            let scale = 10f64.powi(4 - figure.abs().max(1e-9).log10().floor() as i32);
            let rounded = (figure * scale).round() / scale;
            self.cells[index].figures.entry(name.to_owned()).or_default().push(rounded);
        }
    }

    /// The figures of all rounds until now, by name.
    pub fn figures(&self, at: &At, figure: &str) -> Option<&[f64]> {
        let cell = self.cells.iter().find(|cell| cell.at == *at)?;
        cell.figures.get(figure).map(Vec::as_slice)
    }

    /// Compares one with another, if both were measured.
    pub fn compare(&mut self, at: &At, figure: &str, reference: &At) {
        let figures = self.figures(at, figure).zip(self.figures(reference, figure));
        let ratio = figures.and_then(|(of, by)| Quartiles::of(&ratios(of, by)));
        self.ratios.extend(ratio.map(|ratio| Ratio {
            at: at.clone(),
            figure: figure.to_owned(),
            reference: reference.clone(),
            ratio,
        }));
    }

    /// Says what became of a goal, if it was measured.
    pub fn judge(&mut self, goal: Goal) {
        let Some(figures) = self.figures(&goal.of, goal.figure) else { return };
        let figures = match &goal.reference {
            None => figures.to_vec(),
            Some(reference) => {
                let Some(references) = self.figures(reference, goal.figure) else { return };
                ratios(figures, references)
            }
        };
        let Some(measured) = Quartiles::of(&figures) else { return };
        self.goals.push(Judged {
            what: goal.what,
            bound: goal.bound,
            measured,
            rounds: figures.len(),
            verdict: goal.bound.judge(&measured),
        });
    }

    /// All figures, for a terminal.
    pub fn tables(&self) -> String {
        let mut text = format!("\n{}\n", self.title);
        let Machine { cpu, cores, memory, kernel, file_system, rustc, commit, date } =
            &self.machine;
        let _ = writeln!(
            text,
            "{cpu}, {cores} cores, {memory} GiB, Linux {kernel}, {file_system}; {rustc}; commit \
             {commit}, {date} UTC"
        );
        for (what, setting) in &self.settings {
            let _ = writeln!(text, "{what}: {setting}");
        }
        let mut groups: Vec<(&str, u64)> = Vec::new();
        for Cell { at, .. } in &self.cells {
            if !groups.contains(&(&at.phase, at.callers)) {
                groups.push((&at.phase, at.callers));
            }
        }
        groups.sort_by_key(|(_, callers)| *callers);
        groups.sort_by_key(|(phase, _)| self.cells.iter().position(|it| it.at.phase == *phase));
        for (phase, callers) in groups {
            let cells =
                || self.cells.iter().filter(|it| it.at.phase == phase && it.at.callers == callers);
            let rows: Vec<_> = cells().map(|cell| self.row(cell)).collect();
            let mut columns: Vec<&String> = Vec::new();
            for (column, _) in rows.iter().flatten() {
                if !columns.contains(&column) {
                    columns.push(column);
                }
            }
            let _ = writeln!(text, "\n{phase}, {callers} at once");
            let table: Vec<Vec<&str>> = std::iter::once(columns.iter().map(|it| &***it).collect())
                .chain(rows.iter().map(|row| {
                    let of = |column: &&String| row.iter().find(|(name, _)| name == *column);
                    columns.iter().map(|it| of(it).map_or("", |(_, cell)| cell)).collect()
                }))
                .collect();
            text += &aligned(&table);
        }
        text + &self.goals_table()
    }

    fn row(&self, cell: &Cell) -> Vec<(String, String)> {
        let records = cell.at.records.map(|records| (String::from("records"), counted(records)));
        let name = (String::new(), cell.at.contender.clone());
        let order = [
            figure::THROUGHPUT,
            figure::P50,
            figure::P99,
            figure::CPU,
            figure::DATABASE_CPU,
            figure::INSTRUCTIONS,
            figure::PROTECTION,
            figure::DIGEST,
            figure::NANOSECONDS,
            figure::LONGEST,
            figure::BYTES,
            figure::CPU_SECONDS,
            figure::SECONDS,
            figure::LOG_BYTES,
            figure::DISK_BYTES,
            figure::LOAD,
        ];
        let figures = order.into_iter().filter_map(|name| {
            let quartiles = Quartiles::of(cell.figures.get(name)?)?;
            let shown = match name {
                figure::THROUGHPUT | figure::CPU | figure::NANOSECONDS | figure::LONGEST => {
                    quartiles.to_string()
                }
                _ => short(quartiles.median),
            };
            Some((name.to_owned(), shown))
        });
        let ratios = self.ratios.iter().filter(|ratio| ratio.at == cell.at);
        let ratios = ratios.map(|Ratio { figure, reference, ratio, .. }| {
            // One column for all of them.
            let by_hand = format!("{} by hand", cell.at.contender);
            let name =
                if reference.contender == by_hand { "by hand" } else { &reference.contender };
            let mut heading = format!("{figure} ÷ {name}");
            if reference.phase != cell.at.phase {
                let _ = write!(heading, ", {}", reference.phase);
            }
            if reference.records != cell.at.records {
                heading =
                    format!("{figure} ÷ at {}", counted(reference.records.unwrap_or_default()));
            }
            (heading, ratio.to_string())
        });
        [name].into_iter().chain(records).chain(figures).chain(ratios).collect()
    }

    fn goals_table(&self) -> String {
        if self.goals.is_empty() {
            return String::new();
        }
        let rows: Vec<[String; 4]> = self
            .goals
            .iter()
            .map(|it| {
                let (bound, measured) = (it.bound.to_string(), it.measured.to_string());
                [it.what.clone(), bound, measured, it.verdict.to_string()]
            })
            .collect();
        let heading = vec!["goal", "", "median [quartiles]", ""];
        let rows = rows.iter().map(|row| row.iter().map(String::as_str).collect());
        let table: Vec<Vec<&str>> = std::iter::once(heading).chain(rows).collect();
        format!("\n{}", aligned(&table))
    }

    /// What became of the goals, as rows of a table in Markdown.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for Judged { what, bound, measured, verdict, .. } in &self.goals {
            let verdict = match verdict {
                Verdict::Reached => "reached",
                Verdict::Missed => "**missed**",
                Verdict::Undecided => "undecided",
            };
            let _ = writeln!(text, "| {what} | {bound} | {measured} | {verdict} |");
        }
        text
    }

    /// A panel of its plot: of some ratios, one of each contender in each group.
    pub fn panel(&self, title: &str, axis: &str, of: impl Fn(&Ratio) -> bool) -> Panel {
        let ratios: Vec<_> = self.ratios.iter().filter(|it| of(it)).collect();
        let group = |at: &At| at.records.unwrap_or(at.callers);
        let mut groups: Vec<u64> = ratios.iter().map(|it| group(&it.at)).collect();
        groups.sort_unstable();
        groups.dedup();
        let mut names: Vec<&str> = Vec::new();
        for ratio in &ratios {
            if !names.contains(&&*ratio.at.contender) {
                names.push(&ratio.at.contender);
            }
        }
        let series = names.into_iter().map(|name| Series {
            name: name.to_owned(),
            points: groups
                .iter()
                .map(|wanted| {
                    let mut of_it = ratios.iter().filter(|it| it.at.contender == name);
                    of_it.find(|it| group(&it.at) == *wanted).map(|it| it.ratio)
                })
                .collect(),
        });
        let series = series.collect();
        let groups = groups.into_iter().map(counted).collect();
        Panel { title: title.to_owned(), axis: axis.to_owned(), groups, series }
    }

    /// Writes it, and its plot, where the results are; says where.
    ///
    /// # Errors
    ///
    /// When a file cannot be written.
    pub fn write(&self, panels: &[Panel]) -> io::Result<Vec<PathBuf>> {
        let directory = results();
        fs::create_dir_all(&directory)?;
        let path = |extension| directory.join(&self.question).with_extension(extension);
        let mut written = vec![path("json")];
        fs::write(&written[0], self.json()?)?;
        if panels.iter().any(|panel| !panel.groups.is_empty()) {
            let Machine { cpu, cores, commit, date, .. } = &self.machine;
            let note = format!("{cpu}, {cores} cores; commit {commit}, {date} UTC");
            written.push(path("svg"));
            fs::write(&written[1], svg(&self.title, &note, panels))?;
        }
        Ok(written)
    }

    /// One line a cell, so that it can be read and compared.
    fn json(&self) -> io::Result<String> {
        let mut text = String::from("{\n");
        let mut parts = Vec::new();
        let serde_json::Value::Object(fields) = serde_json::to_value(self)? else {
            return Err(io::Error::other("a report is an object"));
        };
        for name in ["question", "title", "command", "machine", "settings"] {
            parts.push(format!("{name:?}: {}", serde_json::to_string_pretty(&fields[name])?));
        }
        for name in ["goals", "ratios", "cells"] {
            let items = fields[name].as_array().into_iter().flatten();
            let lines: Vec<_> = items.map(|item| format!("  {item}")).collect();
            parts.push(format!("{name:?}: [\n{}\n]", lines.join(",\n")));
        }
        text += &parts.join(",\n");
        Ok(text + "\n}\n")
    }

    /// Reads one.
    ///
    /// # Errors
    ///
    /// When it cannot be read or is none.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }
}

/// A table whose columns stand under each other.
fn aligned(table: &[Vec<&str>]) -> String {
    let columns = table.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        let cells = table.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in table {
        let mut line = String::new();
        for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let _ = match index {
                0 => write!(line, "{cell:<width$}"),
                _ => write!(line, "  {cell:>width$}"),
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::new("test", "A test", "test");
        let [bare, memory] = ["bare", "memory"].map(|name| At::new(name, "first", 64));
        for round in [1.0, 2.0, 4.0] {
            report.add(&bare, [(figure::THROUGHPUT, 1000.0 * round)]);
            report.add(&memory, [(figure::THROUGHPUT, 900.0 * round)]);
        }
        report.compare(&memory, figure::THROUGHPUT, &bare);
        report.judge(Goal {
            what: "memory".to_owned(),
            of: memory,
            figure: figure::THROUGHPUT,
            reference: Some(bare),
            bound: Bound::AtLeast(0.95),
        });
        report
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let report = report();
        assert_eq!(report.ratios[0].ratio, Quartiles { q1: 0.9, median: 0.9, q3: 0.9 });
        assert_eq!(report.goals[0].verdict, Verdict::Missed);
        assert_eq!(report.markdown(), "| memory | ≥ 0.95 | 0.90 [0.90–0.90] | **missed** |\n");
        assert!(report.tables().contains("1,800 [1,350–2,700]"), "{}", report.tables());
    }

    #[test]
    fn what_was_not_measured_is_not_judged() {
        let mut report = report();
        report.judge(Goal {
            what: "missing".to_owned(),
            of: At::new("redis", "first", 64),
            figure: figure::THROUGHPUT,
            reference: None,
            bound: Bound::AtLeast(1.0),
        });
        assert_eq!(report.goals.len(), 1);
    }

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let report = report();
        let read: Report = serde_json::from_str(&report.json().unwrap()).unwrap();
        assert_eq!(read.json().unwrap(), report.json().unwrap());
    }
}
