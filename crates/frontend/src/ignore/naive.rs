//! The rules of `.dockerignore` as one would write them down first: recursive, and slow on purpose.
//! The property test and the fuzz target hold the real matcher against it.

/// Whether `path` is ignored; `None` when some line is no rule.
pub(crate) fn is_ignored(lines: &[&str], path: &str) -> Option<bool> {
    let mut rules = Vec::new();
    for line in lines.iter().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        let rule = rule(line.trim());
        let (negated, pattern) = match rule.strip_prefix('!') {
            Some("") => return None,
            Some(pattern) => (true, pattern.to_owned()),
            None => (false, rule),
        };
        let pattern: Vec<char> = pattern.chars().collect();
        if !is_well_formed(&pattern) {
            return None;
        }
        rules.push((negated, pattern));
    }
    let mut ignored = false;
    for (negated, pattern) in rules {
        let places = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
        let hit = places.into_iter().any(|end| whole_path(&pattern, &path[..end]));
        if hit && !path.is_empty() {
            ignored = !negated;
        }
    }
    Some(ignored)
}

/// Whether the whole path matches the clean pattern, parents left out.
pub(crate) fn whole_path(pattern: &[char], path: &str) -> bool {
    let path: Vec<char> = path.chars().collect();
    // `**text` is the one place where the stars may end within a name.
    if let ['*', '*', suffix @ ..] = pattern
        && !suffix.iter().any(|c| "*?[]\\".contains(*c))
        && suffix.first() != Some(&'/')
    {
        return path.ends_with(suffix);
    }
    matches(pattern, &path)
}

/// Whether the pattern is one that Go's `filepath.Match` and its `regexp` take.
pub(crate) fn is_well_formed(pattern: &[char]) -> bool {
    match pattern {
        [] => true,
        ['\\'] => false,
        ['\\', _, rest @ ..] => is_well_formed(rest),
        ['[', rest @ ..] => class(rest).is_some_and(|(ranges, _, rest)| {
            ranges.iter().all(|(low, high)| low <= high) && is_well_formed(rest)
        }),
        [_, rest @ ..] => is_well_formed(rest),
    }
}

fn matches(pattern: &[char], path: &[char]) -> bool {
    match (pattern, path) {
        (['*', '*'] | ['*', '*', '/'], _) => true,
        (['*', '*', '/', rest @ ..] | ['*', '*', rest @ ..], _) => {
            let behind = path.iter().enumerate().filter(|(_, c)| **c == '/').map(|(at, _)| at + 1);
            [0].into_iter().chain(behind).any(|start| matches(rest, &path[start..]))
        }
        (['*', rest @ ..], _) => {
            matches(rest, path) || (!path.is_empty() && path[0] != '/' && matches(pattern, &path[1..]))
        }
        ([], _) | (_, []) => pattern.is_empty() && path.is_empty(),
        (['?', rest @ ..], [c, more @ ..]) => *c != '/' && matches(rest, more),
        (['[', rest @ ..], [c, more @ ..]) => class(rest).is_some_and(|(ranges, negated, rest)| {
            ranges.iter().any(|(low, high)| low <= c && c <= high) != negated && matches(rest, more)
        }),
        (['\\', wanted, rest @ ..] | [wanted, rest @ ..], [c, more @ ..]) => {
            wanted == c && matches(rest, more)
        }
    }
}

type Class<'a> = (Vec<(char, char)>, bool, &'a [char]);

/// Ranges of the class, whether it is negated, and what stands behind it.
fn class(text: &[char]) -> Option<Class<'_>> {
    let (negated, mut text) = match text {
        ['^', rest @ ..] => (true, rest),
        _ => (false, text),
    };
    let mut ranges = Vec::new();
    loop {
        if let ([']', rest @ ..], false) = (text, ranges.is_empty()) {
            return Some((ranges, negated, rest));
        }
        let (low, rest) = bound(text)?;
        let (high, rest) = if let ['-', rest @ ..] = rest { bound(rest)? } else { (low, rest) };
        ranges.push((low, high));
        text = rest;
    }
}

fn bound(text: &[char]) -> Option<(char, &[char])> {
    match text {
        [] | ['\\'] | ['-' | ']', ..] => None,
        ['\\', c, rest @ ..] | [c, rest @ ..] => Some((*c, rest)),
    }
}

/// A trimmed line as the matcher gets it: cleaned as a path, its `!` still in front.
fn rule(line: &str) -> String {
    let (mark, rest) = if let Some(rest) = line.strip_prefix('!') { ("!", rest.trim()) } else { ("", line) };
    if rest.is_empty() {
        return mark.to_owned();
    }
    let cleaned = clean(rest);
    let anchored = if cleaned == "/" { &cleaned } else { cleaned.trim_start_matches('/') };
    clean(format!("{mark}{anchored}").trim())
}

/// Removes one `//`, `/./` or `x/..` after the other until there is none.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    while let Some(at) = parts.windows(2).position(|pair| pair[0] != ".." && pair[1] == "..") {
        parts.drain(at..at + 2);
    }
    if path.starts_with('/') {
        let first = parts.iter().position(|part| *part != "..").unwrap_or(parts.len());
        format!("/{}", parts[first..].join("/"))
    } else if parts.is_empty() {
        ".".to_owned()
    } else {
        parts.join("/")
    }
}
