//! The first line is a path, the others are rules of an ignore file: the matcher and the naive one
//! agree, and a walk that leaves out what it may leave out finds the same files.
#![no_main]

use kiln_frontend::ignore::{Patterns, glob_path};
use libfuzzer_sys::fuzz_target;

#[path = "../../crates/frontend/src/ignore/naive.rs"]
mod naive;

// The naive matcher takes exponential time.
const MOST_STARS: usize = 8;
const LONGEST_PATH: usize = 32;

fuzz_target!(|text: &str| {
    let (path, rules) = text.split_once('\n').unwrap_or((text, ""));
    let parsed = Patterns::parse(rules);
    let is_name = |name: &str| !name.is_empty() && name != "." && name != "..";
    if path.len() > LONGEST_PATH || path.contains('\r') || !path.split('/').all(is_name) {
        return;
    }
    let lines: Vec<&str> = rules.strip_prefix('\u{feff}').unwrap_or(rules).lines().collect();
    if lines.iter().any(|line| line.matches('*').count() > MOST_STARS) {
        return;
    }
    let ignored = naive::is_ignored(&lines, path);
    assert_eq!(parsed.as_ref().ok().map(|rules| rules.is_ignored(path)), ignored);

    let Ok(rules) = parsed else { return };
    for (end, _) in path.match_indices('/') {
        let left_out = !rules.may_contain_included(&path[..end]);
        assert!(!left_out || ignored == Some(true), "{path:?} is not reached");
    }
    for line in lines {
        let is_clean = line.split('/').all(is_name);
        let pattern: Vec<char> = line.chars().collect();
        let whole = naive::is_well_formed(&pattern).then(|| naive::whole_path(&pattern, path));
        assert!(!is_clean || glob_path(line.as_bytes(), path.as_bytes()) == whole, "{line:?} as one glob");
    }
});
