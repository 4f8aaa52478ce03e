//! `cargo xtask`: the tasks of this repository, one subcommand each.
//!
//! Read [`step`] first (how a step is shown and run), then [`demo`] and [`check`].
//!
//! # Invariants
//! - Nothing here names a package mirror: [`mirror`] reads the machine's own at run time.
//! - What takes long is cached outside the repository and appears under its final name only when
//!   it is complete ([`bases`]).
//! - `std` and `serde_json` only, so that the first `cargo xtask` starts within seconds.

#![forbid(unsafe_code)]

mod bases;
mod bench;
mod binary;
mod check;
mod demo;
mod fuzz;
mod mirror;
mod packages;
mod peers;
mod progress;
mod s3;
mod step;
mod users;
mod vm;

use std::process::ExitCode;

use step::Failure;

/// One subcommand: its name, its line in `help`, and what it does.
struct Task {
    name: &'static str,
    what: &'static str,
    run: fn() -> Result<(), Failure>,
}

const TASKS: &[Task] = &[
    Task { name: "demo", what: "build, run and rebuild a real application image", run: demo::run },
    Task { name: "test", what: "everything that CI checks", run: check::run },
    Task {
        name: "release",
        what: "build the binary to be installed: one static file",
        run: || binary::release().map(|path| println!("{}", path.display())),
    },
    Task {
        name: "bench",
        what: "measure: bench [cache|containers|images|registry|vertices]",
        run: bench::run,
    },
    Task {
        name: "fuzz",
        what: "fuzz every parser of foreign bytes: fuzz [TARGET] [--seconds N]",
        run: || fuzz::run(&[]),
    },
    Task {
        name: "vm",
        what: "the tests on a kernel with cgroup v2 and systemd; vm --power N",
        run: || vm::run(&[]),
    },
    Task {
        name: "users",
        what: "tests by users without privileges: users [range|single] [NAME...]",
        run: || users::run(&[]),
    },
    Task { name: "bases", what: "make the base trees that tests and the demo start from", run: bases::run },
    Task { name: "help", what: "this list", run: help },
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let result = match args.as_slice() {
        [] => help(),
        [name, rest @ ..] if name == "fuzz" => fuzz::run(rest),
        [name, rest @ ..] if name == "vm" => vm::run(rest),
        [name, rest @ ..] if name == "users" => users::run(rest),
        [name, what] if name == "bench" && what == "images" => bench::run_images(),
        [name, what] if name == "bench" && what == "cache" => bench::run_cache(),
        [name, what] if name == "bench" && what == "containers" => bench::run_containers(),
        [name, what] if name == "bench" && what == "registry" => bench::run_registry(),
        [name, what] if name == "bench" && what == "vertices" => bench::run_vertices(),
        [name] => dispatch(name.trim_start_matches('-')),
        [_, extra, ..] => Err(Failure::Usage { word: extra.clone() }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            step::complain(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}

fn dispatch(name: &str) -> Result<(), Failure> {
    let task = TASKS.iter().find(|task| task.name == name);
    (task.ok_or_else(|| Failure::Usage { word: name.to_owned() })?.run)()
}

fn help() -> Result<(), Failure> {
    println!("cargo xtask TASK\n");
    for task in TASKS {
        println!("  {:6} {}", task.name, task.what);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_has_one_name_and_one_line() {
        for (i, task) in TASKS.iter().enumerate() {
            assert!(!task.what.contains('\n') && task.what.len() < 70, "{}", task.name);
            assert!(TASKS[..i].iter().all(|other| other.name != task.name), "{} twice", task.name);
        }
    }

    #[test]
    fn an_unknown_task_is_a_usage_error() {
        assert!(matches!(dispatch("dmeo"), Err(Failure::Usage { word }) if word == "dmeo"));
    }
}
