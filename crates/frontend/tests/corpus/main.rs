//! The Dockerfile corpus: `testdata/dockerfile/<case>/{Dockerfile,case,expected}`.
//!
//! `case` is a judgement written from the language's specification before anything ran: accepted
//! or rejected, where, with what in the message or in the build. `expected` is all of the output,
//! for whoever changes something: `UPDATE_EXPECT=1` rewrites it where the judgement holds.

mod case;
mod render;
mod rows;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use kiln_frontend::ignore::Patterns;
use kiln_frontend::{Diagnostic, EpochTime, Lowered, Lowering, Severity, Span, decode, lower, parse};

use crate::case::{Case, Shows, Verdict};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/dockerfile")
}

/// Folder and case, sorted by name.
fn cases() -> Vec<(PathBuf, Case)> {
    let mut folders: Vec<PathBuf> = fs::read_dir(folder())
        .expect("the corpus is there")
        .map(|entry| entry.expect("a folder can be read").path())
        .filter(|path| path.is_dir())
        .collect();
    folders.sort();
    folders
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(path.join("case"))
                .unwrap_or_else(|error| panic!("{}/case: {error}", path.display()));
            let case = Case::parse(&text).unwrap_or_else(|error| panic!("{}/case: {error}", path.display()));
            (path, case)
        })
        .collect()
}

/// What became of a Dockerfile.
struct Outcome {
    ast: String,
    lowered: Option<Box<Lowered>>,
    /// Errors first, each with the line and column where it begins.
    diagnostics: Vec<(Diagnostic, usize, usize)>,
    /// The text that the diagnostics' spans speak of.
    text: String,
}

impl Outcome {
    fn of(case: &Case, bytes: &[u8]) -> Self {
        let lossy = String::from_utf8_lossy(bytes).into_owned();
        // As a build does: what the ignore file says is checked before the Dockerfile is lowered.
        let ignore = match Patterns::from_lines(&case.ignore) {
            Ok(ignore) => ignore,
            Err(error) => {
                let (span, message) = (Span { start: 0, end: 0 }, error.message);
                let error = Diagnostic { severity: Severity::Error, span, message, hint: None, rule: None };
                return Self::failed(bytes, vec![error], String::new(), lossy);
            }
        };
        let text = match decode(bytes) {
            Ok(text) => text,
            Err(error) => return Self::failed(bytes, vec![error], String::new(), lossy),
        };
        let (ast, mut diagnostics) = parse(text);
        let dump = ast.to_string();
        if diagnostics.iter().any(Diagnostic::is_error) {
            return Self::failed(text.as_bytes(), diagnostics, dump, text.to_owned());
        }
        let mut images = BTreeMap::new();
        let mut options = case.options.clone();
        options.ignore = ignore;
        for _ in 0..20 {
            match lower(&ast, &options, &images) {
                Ok(Lowering::Done(lowered)) => {
                    diagnostics.extend(lowered.warnings.iter().cloned());
                    let outcome = Self::failed(text.as_bytes(), diagnostics, dump, text.to_owned());
                    return Self { lowered: Some(lowered), ..outcome };
                }
                Ok(Lowering::NeedsTime(_)) => {
                    options.epoch = EpochTime::At(case.time.expect("a case with a named time says which"));
                }
                Ok(Lowering::Needs(needs)) => {
                    for need in needs {
                        let reference = &need.image.reference;
                        let image = case.images.get(reference).cloned();
                        let image =
                            image.unwrap_or_else(|| case::base_image(reference, serde_json::json!({})));
                        images.insert(need.image, image);
                    }
                }
                Err(errors) => {
                    diagnostics.extend(errors);
                    return Self::failed(text.as_bytes(), diagnostics, dump, text.to_owned());
                }
            }
        }
        panic!("after twenty rounds images are still asked for")
    }

    fn failed(bytes: &[u8], mut diagnostics: Vec<Diagnostic>, ast: String, text: String) -> Self {
        diagnostics.sort_by_key(|diagnostic| !diagnostic.is_error());
        let placed = |diagnostic: Diagnostic| {
            let before = &bytes[..diagnostic.span.start.min(bytes.len())];
            let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
            let line_start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
            let column = String::from_utf8_lossy(&before[line_start..]).chars().count() + 1;
            (diagnostic, line, column)
        };
        Self { ast, lowered: None, diagnostics: diagnostics.into_iter().map(placed).collect(), text }
    }

    /// Everything that `expected` holds.
    fn rendered(&self, shows: Shows) -> String {
        let diagnostics = |errors: bool| -> String {
            let wanted = self.diagnostics.iter().filter(|(found, ..)| found.is_error() == errors);
            wanted.map(|(found, ..)| found.render("Dockerfile", &self.text)).collect()
        };
        match shows {
            Shows::Ast => self.ast.clone(),
            Shows::Error => diagnostics(true),
            Shows::Warnings => diagnostics(false),
            Shows::Dag => {
                let mut out = self.lowered.as_deref().map(render::lowered).unwrap_or_default();
                for (warning, line, _) in self.diagnostics.iter().filter(|(found, ..)| !found.is_error()) {
                    let rule = warning.rule.map_or("other", |rule| rule.name());
                    out.push_str(&format!("warning {rule} line {line}\n"));
                }
                out
            }
        }
    }
}

/// All that speaks against `outcome`, empty when nothing does.
fn judge(case: &Case, outcome: &Outcome, rendered: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    let errors: Vec<_> = outcome.diagnostics.iter().filter(|(found, ..)| found.is_error()).collect();
    let all = || {
        let rendered: String = errors.iter().map(|(f, ..)| f.render("Dockerfile", &outcome.text)).collect();
        rendered
    };
    match &case.verdict {
        Verdict::Accepts if !errors.is_empty() => wrong.push(format!("was rejected:\n{}", all())),
        Verdict::Accepts => {}
        Verdict::Rejects(_) if errors.is_empty() => wrong.push("was accepted".to_owned()),
        Verdict::Rejects(parts) => {
            let says = |found: &Diagnostic| {
                let text = format!("{} {}", found.message, found.hint.as_deref().unwrap_or_default());
                parts.iter().all(|part| text.to_lowercase().contains(&part.to_lowercase()))
            };
            let stands = |line, column| {
                case.at.is_none_or(|(wanted, at)| wanted == line && at.is_none_or(|at| at == column))
            };
            if !errors.iter().any(|(found, line, column)| says(found) && stands(*line, *column)) {
                wrong.push(format!("no error says {parts:?} at {:?}, but:\n{}", case.at, all()));
            }
        }
    }
    let warned = |name: &str, at: Option<(usize, Option<usize>)>| {
        outcome.diagnostics.iter().any(|(found, line, _)| {
            let same = found.rule.is_some_and(|rule| rule.name() == name || name == "all");
            same && !found.is_error() && at.is_none_or(|(wanted, _)| wanted == *line)
        })
    };
    for name in case.warns.iter().filter(|name| !warned(name, case.at)) {
        wrong.push(format!(
            "{name} does not fire (at {:?}), but:\n{}",
            case.at,
            outcome.rendered(Shows::Warnings)
        ));
    }
    for name in case.quiet.iter().filter(|name| warned(name, None)) {
        wrong.push(format!("{name} fires:\n{}", outcome.rendered(Shows::Warnings)));
    }
    for part in case.contains.iter().filter(|part| !rendered.contains(part.as_str())) {
        wrong.push(format!("{part:?} is missing in\n{rendered}"));
    }
    for part in case.lacks.iter().filter(|part| rendered.contains(part.as_str())) {
        wrong.push(format!("{part:?} should not stand in\n{rendered}"));
    }
    if !case.ignored.is_empty() || !case.kept.is_empty() {
        // Rules that cannot be read were an error above.
        let patterns = Patterns::from_lines(&case.ignore).ok();
        let ignored = |path: &str| patterns.as_ref().is_some_and(|patterns| patterns.is_ignored(path));
        for path in case.ignored.iter().filter(|path| !ignored(path)) {
            wrong.push(format!("{path:?} is not ignored"));
        }
        for path in case.kept.iter().filter(|path| ignored(path)) {
            wrong.push(format!("{path:?} is ignored"));
        }
    }
    wrong
}

/// Judges one case and compares its golden output; what is wrong.
fn check(path: &Path, case: &Case) -> Vec<String> {
    let bytes = fs::read(path.join("Dockerfile")).expect("a case has a Dockerfile");
    let outcome = Outcome::of(case, &bytes);
    let rendered = outcome.rendered(case.shows);
    let mut wrong = judge(case, &outcome, &rendered);
    let golden = path.join("expected");
    if std::env::var_os("UPDATE_EXPECT").is_some() && wrong.is_empty() {
        fs::write(&golden, &rendered).expect("expected can be written");
    }
    match fs::read_to_string(&golden) {
        Ok(expected) if expected == rendered => {}
        Ok(expected) => wrong.push(difference(&expected, &rendered)),
        Err(error) => wrong.push(format!("expected: {error} (UPDATE_EXPECT=1 makes it)")),
    }
    wrong
}

/// The lines between the common beginning and the common end.
fn difference(expected: &str, got: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (expected.lines().collect(), got.lines().collect());
    let head = old.iter().zip(&new).take_while(|(a, b)| a == b).count();
    let rest = old[head..].iter().rev().zip(new[head..].iter().rev());
    let tail = rest.take_while(|(a, b)| a == b).count();
    let mut out = format!("differs from `expected` at line {}:\n", head + 1);
    out.extend(old[head..old.len() - tail].iter().map(|line| format!("-{line}\n")));
    out.extend(new[head..new.len() - tail].iter().map(|line| format!("+{line}\n")));
    out
}

#[test]
fn every_case_is_as_its_judgement_says() {
    let mut failures = String::new();
    let (mut failed, mut count) = (0, 0);
    for (path, case) in cases() {
        count += 1;
        let wrong = catch_unwind(AssertUnwindSafe(|| check(&path, &case)))
            .unwrap_or_else(|_| vec!["panicked".to_owned()]);
        if !wrong.is_empty() {
            failed += 1;
            let name = path.file_name().expect("a case's folder has a name").to_string_lossy();
            failures.push_str(&format!("--- {name} ({})\n{}\n", case.rows.join("; "), wrong.join("\n")));
        }
    }
    assert!(failures.is_empty(), "{failed} of {count} cases are wrong\n{failures}");
}

#[test]
fn every_row_is_named() {
    let mut named: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (path, case) in cases() {
        for row in case.rows {
            named.entry(row).or_default().insert(path.display().to_string());
        }
    }
    let elsewhere = fs::read_to_string(folder().join("ELSEWHERE")).expect("ELSEWHERE is there");
    for line in elsewhere.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (row, test) =
            line.split_once(": ").unwrap_or_else(|| panic!("ELSEWHERE: {line:?} names no test"));
        let (file, name) =
            test.split_once("::").unwrap_or_else(|| panic!("ELSEWHERE: {test:?} is no test's name"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(file);
        let source = fs::read_to_string(source).unwrap_or_else(|error| panic!("ELSEWHERE: {file}: {error}"));
        assert!(source.contains(&format!("#[test]\nfn {name}(")), "ELSEWHERE: {file} has no test {name}");
        named.entry(row.to_owned()).or_default().insert(test.to_owned());
    }
    let rows = rows::all();
    let missing: Vec<&String> = rows.iter().filter(|row| !named.contains_key(*row)).collect();
    assert!(missing.is_empty(), "no case and no line of ELSEWHERE names {missing:?}");
    let unknown: Vec<_> = named.iter().filter(|(row, _)| !rows.contains(*row)).collect();
    assert!(unknown.is_empty(), "these are no rows: {unknown:?}");
}
