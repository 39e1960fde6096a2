//! Prints what the measurements found, in Markdown, from the files that they wrote.

use std::{fs, io, path::PathBuf};

use bench::{machine::results, report::Report};

fn main() -> io::Result<()> {
    let entries = fs::read_dir(results())?;
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    paths.sort();
    let reports: Vec<Report> =
        paths.iter().map(|path| Report::read(path)).collect::<io::Result<_>>()?;
    println!("| what | goal | median [quartiles] | |\n|---|---|---|---|");
    for report in &reports {
        print!("{}", report.markdown());
    }
    println!();
    for Report { question, command, machine, .. } in &reports {
        println!(
            " - `{question}`: `{command}`, commit {}, {} UTC, on {} cores of an {}, {} GiB",
            machine.commit, machine.date, machine.cores, machine.cpu, machine.memory
        );
    }
    Ok(())
}
