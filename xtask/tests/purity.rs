//! What a crate may not reach for: the frontend is text in, data out.

use std::fs;
use std::path::{Path, PathBuf};

/// Crates without files, clock, network, processes, threads or environment.
const PURE: [&str; 2] = ["frontend", "llb"];

/// What pure crates may depend on: each of these keeps to memory, too.
const PURE_DEPENDENCIES: [&str; 6] = ["kiln-oci", "kiln-llb", "nom", "serde_json", "sha2", "thiserror"];

/// Modules of `std` that reach outside the process or start something in it.
const IMPURE_MODULES: [&str; 6] = ["env", "fs", "net", "process", "thread", "time"];

/// What is in such a module and yet only data.
const DATA: [&str; 4] = ["net::IpAddr", "net::Ipv4Addr", "net::Ipv6Addr", "time::Duration"];

/// Macros that print.
const PRINTING: [&str; 5] = ["print!", "println!", "eprint!", "eprintln!", "dbg!"];

#[test]
fn pure_crates_reach_for_nothing_outside() {
    for name in PURE {
        let crate_root = root().join("crates").join(name);
        let mut files = Vec::new();
        sources(&crate_root.join("src"), &mut files);
        assert!(files.len() > 2, "{name} has more files than {}", files.len());
        for file in files {
            let text = fs::read_to_string(&file).expect("sources are readable");
            let found = impurities(&text);
            assert!(found.is_empty(), "{}: {}", file.display(), found.join("\n"));
        }
    }
}

#[test]
fn pure_crates_depend_only_on_pure_ones() {
    for name in PURE {
        let manifest = root().join("crates").join(name).join("Cargo.toml");
        let text = fs::read_to_string(manifest).expect("a crate has a manifest");
        for dependency in dependencies(&text) {
            assert!(PURE_DEPENDENCIES.contains(&dependency), "{name} may not depend on {dependency}");
        }
    }
}

#[test]
fn impurities_are_found_however_they_are_written() {
    let check = |text: &str, count: usize| assert_eq!(impurities(text).len(), count, "{text}");
    check("let text = std::fs::read(path);", 1);
    check("use std::{collections::BTreeMap, fs};", 1);
    check("use std::{\n    time::SystemTime,\n    fs::File,\n};", 2);
    check("use std::time::{Duration, Instant};", 1);
    check("use std::net;", 1);
    check("use std as platform;", 1);
    check("use std::*;", 1);
    check("println!(\"{x}\");", 1);
    check("address.parse::<std::net::IpAddr>()", 0);
    check("use std::time::Duration;", 0);
    check("use std::{fmt, sync::Arc};", 0);
    check("//! As `std::fs::read` does.\nfn f() {} // std::fs", 0);
    assert_eq!(dependencies("[dependencies]\na.workspace = true\nb = \"1\"\n\n[lints]\nc = 1\n"), ["a", "b"]);
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the repository").to_owned()
}

/// Every `.rs` file below but those of tests, which may read what they compare with.
fn sources(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("sources are readable") {
        let path = entry.expect("sources are readable").path();
        if path.file_stem().is_some_and(|stem| stem == "tests") {
            continue;
        }
        if path.is_dir() {
            sources(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// Names of the normal dependencies in a manifest.
fn dependencies(manifest: &str) -> Vec<&str> {
    let lines = manifest.lines().skip_while(|line| line.trim() != "[dependencies]").skip(1);
    let lines = lines.take_while(|line| !line.starts_with('['));
    lines.filter_map(|line| line.split(['.', '=', ' ']).next()).filter(|name| !name.is_empty()).collect()
}

/// What of `std` the text reaches for that is not only data, and what it prints with.
fn impurities(text: &str) -> Vec<String> {
    let code: String = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .flat_map(|line| [line, "\n"])
        .collect();
    let mut found: Vec<String> =
        PRINTING.iter().filter(|name| has_word(&code, name)).map(|&name| name.to_owned()).collect();
    for (at, _) in code.match_indices("std") {
        let alone = !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        if alone && let Some(rest) = code[at + 3..].strip_prefix("::") {
            let mut paths = Vec::new();
            expand(rest, "", &mut paths);
            found.extend(paths.into_iter().filter(|path| is_impure(path)));
        } else if alone && code[at + 3..].starts_with(" as ") {
            found.push("std as".to_owned());
        }
    }
    found
}

fn is_impure(path: &str) -> bool {
    let module = path.split("::").next().unwrap_or_default();
    module == "*" || (IMPURE_MODULES.contains(&module) && !DATA.contains(&path))
}

/// The paths of at most two names that a path or a tree of `use` spells; what is behind them.
fn expand<'t>(text: &'t str, prefix: &str, paths: &mut Vec<String>) -> &'t str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = rest.trim_start();
            match rest.chars().next() {
                Some('}') => return &rest[1..],
                Some(',') => rest = &rest[1..],
                Some(_) => rest = expand(rest, prefix, paths),
                None => return rest,
            }
        }
    }
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '*')).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    if name.is_empty() {
        // Nothing that belongs to a path: step over it.
        return rest.get(rest.chars().next().map_or(0, char::len_utf8)..).unwrap_or_default();
    }
    let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}::{name}") };
    if prefix.is_empty()
        && let Some(rest) = rest.strip_prefix("::")
    {
        return expand(rest, &path, paths);
    }
    paths.push(path);
    // Deeper names do not change what the first two say.
    let mut rest = rest;
    while let Some(deeper) = rest.strip_prefix("::") {
        rest = expand(deeper, "", &mut Vec::new());
    }
    rest
}

fn has_word(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
}
