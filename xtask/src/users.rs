//! The suites of the real binary once more, by users without privileges: one with a range of ids in
//! `/etc/subuid` and `/etc/subgid`, one with his own id only.
//!
//! The tests are those that root runs, test and kiln alike in the user's name. [`left_out`] says which
//! are not run, and why; [`place`] is where the user is at home.

mod left_out;
mod place;

use std::path::Path;

use self::left_out::{LEFT_OUT, LeftOut};
use self::place::Place;
use crate::step::{self, Failure};
use crate::{bases, packages};

/// Which ids a user can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ids {
    /// Those of a range.
    Range,
    /// His own only.
    Single,
}

impl Ids {
    const BOTH: [Ids; 2] = [Ids::Range, Ids::Single];

    /// As it is typed, and as the tests read it in `KILN_TEST_AS`.
    fn name(self) -> &'static str {
        match self {
            Ids::Range => "range",
            Ids::Single => "single",
        }
    }

    fn spoken(self) -> &'static str {
        match self {
            Ids::Range => "a user with a range of ids",
            Ids::Single => "a user with one id",
        }
    }
}

/// The test program that drives kiln, as nextest calls it.
const SUITE: &str = "kiln::cli";

/// The task: `users [range|single] [--left-out] [PART_OF_A_NAME...]`.
pub(crate) fn run(words: &[String]) -> Result<(), Failure> {
    let (mut whose, mut left_out, mut only) = (Ids::BOTH.to_vec(), false, Vec::new());
    for word in words {
        match Ids::BOTH.into_iter().find(|ids| ids.name() == word) {
            Some(ids) => whose = vec![ids],
            None if word == "--left-out" => left_out = true,
            None if word.starts_with('-') => return Err(Failure::Usage { word: word.clone() }),
            None => only.push(word.clone()),
        }
    }
    packages::ensure(&[packages::DEMO, packages::TEST])?;
    let bases = bases::ensure()?;
    for ids in whose {
        step::heading(&format!("Tests by {}", ids.spoken()), "");
        if left_out { would_pass(ids, &bases.dir)? } else { suites(ids, &bases.dir, &only)? }
    }
    Ok(())
}

/// Both users' turns of `cargo xtask test`: what to say, and what to do.
pub(crate) fn turns() -> [(String, Ids); 2] {
    Ids::BOTH.map(|ids| (format!("Tests by {}", ids.spoken()), ids))
}

/// Runs the suites as one of the users and says what is left out; with words in `only`, no more than the
/// tests that have one of them in their names.
pub(crate) fn suites(ids: Ids, bases: &Path, only: &[String]) -> Result<(), Failure> {
    if !packages::is_root() {
        step::warn("NOT RUN: only root can become another user");
        return Ok(());
    }
    let place = Place::make(ids, bases)?;
    let names = names(&place)?;
    let left_out = checked(ids, &names)?;
    let many = |entry: &LeftOut| names.iter().filter(|name| entry.fits(name)).count();
    let count: usize = left_out.iter().map(|entry| many(entry)).sum();
    step::note(&format!("{} of {} tests; left out for this user:", names.len() - count, names.len()));
    for entry in &left_out {
        step::note(&format!("  {} ({}): {}", entry.tests, many(entry), entry.why));
    }
    let mut command = run_by(&place);
    command.args(["-E", &format!("binary_id({SUITE}) and not test(/{}/)", pattern(&left_out))]);
    command.arg("--").args(only);
    let outcome = step::show(&mut command);
    // What is still running is told although a test has failed: it may be the reason.
    place.leave()?;
    outcome.map(drop)
}

/// Runs those that are left out one by one; an entry is wrong when its test would pass.
fn would_pass(ids: Ids, bases: &Path) -> Result<(), Failure> {
    let place = Place::make(ids, bases)?;
    let names = names(&place)?;
    let expected_to_fail = |entry: &&LeftOut| !entry.is_group() && !entry.would_pass();
    let single: Vec<&LeftOut> = checked(ids, &names)?.into_iter().filter(expected_to_fail).collect();
    let mut command = run_by(&place);
    command.args([
        "--no-fail-fast",
        "--status-level",
        "pass",
        "--failure-output",
        "never",
        "--color",
        "never",
    ]);
    command.args(["-E", &format!("binary_id({SUITE}) and test(/{}/)", pattern(&single))]);
    // That they fail is what is expected.
    let said = match step::show_and_keep(&mut command) {
        Ok((_, said)) => said,
        Err(Failure::Exited { stderr, .. }) => stderr,
        Err(failure) => return Err(failure),
    };
    place.leave()?;
    let passed = said.lines().filter_map(passed).map(str::to_owned).collect::<Vec<_>>();
    if passed.is_empty() { Ok(()) } else { Err(Failure::LeftOut { tests: passed, problem: "would pass" }) }
}

/// The name of a test that a line of nextest says has passed.
fn passed(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace();
    (words.next() == Some("PASS")).then(|| words.next_back()).flatten()
}

const TEST_PROGRAM: [&str; 4] = ["--package", "kiln", "--test", "cli"];

fn run_by(place: &Place) -> std::process::Command {
    let mut command = step::nextest_run();
    command.args(TEST_PROGRAM);
    place.tell(&mut command);
    command
}

fn list_by(place: &Place) -> std::process::Command {
    let mut command = step::cargo();
    command.args(["nextest", "list"]).args(TEST_PROGRAM);
    place.tell(&mut command);
    command
}

/// Every test there is, as the user sees them.
fn names(place: &Place) -> Result<Vec<String>, Failure> {
    let mut command = list_by(place);
    command.args(["--message-format", "json"]);
    let unexpected = |expected| Failure::Output { line: step::typed(&list_by(place)), expected };
    let json: serde_json::Value =
        serde_json::from_str(&step::read(&mut command)?).map_err(|_| unexpected("JSON"))?;
    let cases = json["rust-suites"][SUITE]["testcases"].as_object().ok_or_else(|| unexpected("the suite"))?;
    Ok(cases.keys().cloned().collect())
}

/// What is left out for this user.
///
/// # Errors
/// [`Failure::LeftOut`] for an entry that stands for no test, or for none that another does not stand
/// for already.
fn checked(ids: Ids, names: &[String]) -> Result<Vec<&'static LeftOut>, Failure> {
    let mine: Vec<&LeftOut> = LEFT_OUT.iter().filter(|entry| entry.holds_for(ids)).collect();
    let problem =
        |entry: &LeftOut, problem| Failure::LeftOut { tests: vec![entry.tests.to_owned()], problem };
    for (at, entry) in mine.iter().enumerate() {
        let fitting: Vec<&String> = names.iter().filter(|name| entry.fits(name)).collect();
        if fitting.is_empty() {
            return Err(problem(entry, "is the name of no test"));
        }
        let others = mine.iter().enumerate().filter(|(other, _)| *other != at).map(|(_, other)| other);
        if fitting.iter().any(|name| others.clone().any(|other| other.fits(name))) {
            return Err(problem(entry, "is left out twice"));
        }
    }
    Ok(mine)
}

/// A regular expression for all of these; for none, one that nothing fits.
fn pattern(entries: &[&LeftOut]) -> String {
    let all: Vec<String> = entries.iter().map(|entry| entry.pattern()).collect();
    if all.is_empty() { "^$".to_owned() } else { format!("^({})", all.join("|")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_has_a_reason_of_one_line() {
        for entry in LEFT_OUT {
            assert!(!entry.why.is_empty() && !entry.why.contains('\n'), "{}", entry.tests);
            assert!(entry.tests.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_:".contains(&byte)));
        }
    }

    #[test]
    fn an_entry_for_no_test_is_found() {
        let mut names: Vec<String> = LEFT_OUT
            .iter()
            .map(|entry| entry.tests.to_owned() + if entry.is_group() { "test" } else { "" })
            .collect();
        for ids in Ids::BOTH {
            assert!(checked(ids, &names).is_ok_and(|found| !found.is_empty()));
        }
        names.remove(0);
        let Err(Failure::LeftOut { tests, problem }) = checked(Ids::Single, &names) else {
            panic!("it was not missed")
        };
        assert_eq!((tests, problem), (vec![LEFT_OUT[0].tests.to_owned()], "is the name of no test"));
    }

    #[test]
    fn tests_that_pass_are_found_in_what_nextest_says() {
        assert_eq!(passed("        PASS [   0.012s] ( 1/19) kiln::cli build::one"), Some("build::one"));
        assert_eq!(passed("        FAIL [   0.012s] ( 2/19) kiln::cli build::two"), None);
        assert_eq!(passed("     Summary [  20.1s] 19 tests run: 1 passed"), None);
        assert_eq!(passed(""), None);
    }
}
