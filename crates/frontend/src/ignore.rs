//! `.dockerignore`: which paths of a context do not exist for the build.
//!
//! The rules are moby's patternmatcher's: patterns are anchored at the context's root, the last
//! match wins, `!` takes back, and what matches a directory matches everything below it.

/// Why a rule is no rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IgnoreError {
    /// Line, counted from 1.
    pub line: usize,
    /// What is wrong.
    pub message: String,
}

/// The rules of an ignore file.
#[derive(Debug, Clone, Default)]
pub struct Patterns {
    lines: Vec<String>,
    rules: Vec<Rule>,
}

#[derive(Debug, Clone)]
struct Rule {
    line: usize,
    negated: bool,
    components: Vec<String>,
}

impl Patterns {
    /// Reads an ignore file.
    ///
    /// # Errors
    /// The first line that is no rule.
    pub fn parse(text: &str) -> Result<Self, IgnoreError> {
        let lines: Vec<String> = text.trim_start_matches('\u{feff}').lines().map(str::to_owned).collect();
        Self::from_lines(&lines)
    }

    /// Reads lines of an ignore file.
    ///
    /// # Errors
    /// The first line that is no rule.
    pub fn from_lines(lines: &[String]) -> Result<Self, IgnoreError> {
        let mut rules = Vec::new();
        for (number, line) in lines.iter().enumerate() {
            let pattern = line.trim();
            if pattern.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = |message: &str| IgnoreError { line: number + 1, message: message.to_owned() };
            let (negated, pattern) = match pattern.strip_prefix('!') {
                Some(rest) => (true, rest.trim()),
                None => (false, pattern),
            };
            if negated && pattern.is_empty() {
                return Err(wrong("a lone `!` excludes nothing"));
            }
            let components = clean(pattern);
            for component in &components {
                if glob(component.as_bytes(), b"").is_none() {
                    return Err(wrong(&format!("{pattern:?} is not a valid pattern")));
                }
            }
            // `.` and `/` name the root itself: nothing to ignore.
            if !components.is_empty() {
                rules.push(Rule { line: number + 1, negated, components });
            }
        }
        Ok(Self { lines: lines.to_vec(), rules })
    }

    /// The lines as they were read.
    pub fn lines(&self) -> &[String] {
        &self.lines
    }

    /// Whether `path` (relative, `/` between components) does not exist for the build.
    pub fn is_ignored(&self, path: &str) -> bool {
        self.deciding(path).is_some_and(|rule| !rule.negated)
    }

    /// The line of the rule that decided over `path`.
    pub fn deciding_line(&self, path: &str) -> Option<usize> {
        self.deciding(path).map(|rule| rule.line)
    }

    fn deciding(&self, path: &str) -> Option<&Rule> {
        if self.rules.is_empty() {
            return None;
        }
        let components: Vec<&str> = path.split('/').filter(|component| !component.is_empty()).collect();
        self.rules.iter().rev().find(|rule| matches_path_or_parent(&rule.components, &components))
    }

    /// Whether something below the ignored directory `dir` may have been taken back by a `!` rule;
    /// if not, a walk can leave the directory out.
    pub fn may_contain_included(&self, dir: &str) -> bool {
        let components: Vec<&str> = dir.split('/').filter(|component| !component.is_empty()).collect();
        self.rules
            .iter()
            .filter(|rule| rule.negated)
            .any(|rule| may_match_below(&rule.components, &components))
    }
}

/// Go's `filepath.Clean` on a pattern, as components.
fn clean(pattern: &str) -> Vec<String> {
    let mut components: Vec<String> = Vec::new();
    for component in pattern.split('/') {
        match component {
            "" | "." => {}
            ".." => {
                components.pop();
            }
            component => components.push(component.to_owned()),
        }
    }
    components
}

/// Whether the pattern matches the path or a directory above it, `**` standing for any number of
/// components.
///
/// Row by row instead of by recursion: time is the product of both lengths, whatever the pattern.
fn matches_path_or_parent(pattern: &[String], path: &[&str]) -> bool {
    let mut row = first_row(pattern);
    path.iter().any(|component| {
        row = next_row(pattern, &row, component);
        row[pattern.len()]
    })
}

/// Which prefixes of the pattern match the whole path.
fn reach(pattern: &[String], path: &[&str]) -> Vec<bool> {
    path.iter().fold(first_row(pattern), |row, component| next_row(pattern, &row, component))
}

fn first_row(pattern: &[String]) -> Vec<bool> {
    let mut row = vec![false; pattern.len() + 1];
    row[0] = true;
    skip_any_depth(pattern, &mut row);
    row
}

/// `**` may stand for nothing.
fn skip_any_depth(pattern: &[String], row: &mut [bool]) {
    for at in 0..pattern.len() {
        if row[at] && pattern[at] == "**" {
            row[at + 1] = true;
        }
    }
}

fn next_row(pattern: &[String], row: &[bool], component: &str) -> Vec<bool> {
    let mut next = vec![false; pattern.len() + 1];
    for (at, element) in pattern.iter().enumerate().filter(|(at, _)| row[*at]) {
        // `**file` matches at any depth: its text, and anything in front.
        next[at] |= element.starts_with("**");
        if element != "**" && glob(element.as_bytes(), component.as_bytes()) == Some(true) {
            next[at + 1] = true;
        }
    }
    skip_any_depth(pattern, &mut next);
    next
}

/// Whether something below `dir` may match the pattern.
fn may_match_below(pattern: &[String], dir: &[&str]) -> bool {
    reach(pattern, dir).iter().any(|&reached| reached)
}

/// Go's `filepath.Match` within one path component: `*`, `?`, `[a-z]`, `[^a-z]`, `\\x`; `None` for
/// a malformed pattern. Time is the product of both lengths, whatever the pattern.
pub fn glob(pattern: &[u8], name: &[u8]) -> Option<bool> {
    let elements = elements(pattern)?;
    // Row by row, like above.
    let mut row = vec![false; elements.len() + 1];
    row[0] = true;
    let skip = |row: &mut Vec<bool>| {
        for at in 0..elements.len() {
            if row[at] && matches!(elements[at], Element::Star) {
                row[at + 1] = true;
            }
        }
    };
    skip(&mut row);
    for &byte in name {
        let mut next = vec![false; elements.len() + 1];
        for at in (0..elements.len()).filter(|&at| row[at]) {
            match &elements[at] {
                Element::Star => next[at] = true,
                Element::Any => next[at + 1] = true,
                Element::Byte(literal) => next[at + 1] |= *literal == byte,
                Element::Class { negated, ranges } => {
                    let hit = ranges.iter().any(|(low, high)| (*low..=*high).contains(&byte));
                    next[at + 1] |= hit != *negated;
                }
            }
        }
        skip(&mut next);
        row = next;
    }
    Some(row[elements.len()])
}

enum Element {
    Star,
    Any,
    Byte(u8),
    Class { negated: bool, ranges: Vec<(u8, u8)> },
}

fn elements(pattern: &[u8]) -> Option<Vec<Element>> {
    let mut bytes = pattern.iter().copied().peekable();
    let mut elements = Vec::new();
    while let Some(byte) = bytes.next() {
        elements.push(match byte {
            b'*' => Element::Star,
            b'?' => Element::Any,
            b'\\' => Element::Byte(bytes.next()?),
            b'[' => {
                let negated = bytes.next_if_eq(&b'^').is_some();
                let mut ranges = Vec::new();
                // An empty class is malformed: the first `]` would be a literal without an escape.
                while ranges.is_empty() || bytes.next_if_eq(&b']').is_none() {
                    let low = bound(&mut bytes)?;
                    let high = if bytes.next_if_eq(&b'-').is_some() { bound(&mut bytes)? } else { low };
                    ranges.push((low, high));
                }
                Element::Class { negated, ranges }
            }
            literal => Element::Byte(literal),
        });
    }
    Some(elements)
}

/// One end of a range; `]` and `-` need an escape there.
fn bound(bytes: &mut impl Iterator<Item = u8>) -> Option<u8> {
    match bytes.next()? {
        b'\\' => bytes.next(),
        b']' | b'-' => None,
        byte => Some(byte),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ignored(rules: &str, path: &str) -> bool {
        Patterns::parse(rules).unwrap().is_ignored(path)
    }

    #[test]
    fn rules_match_as_in_docker() {
        for (rules, path, expected) in [
            ("*.log", "a.log", true),
            ("*.log", "d/a.log", false),
            ("**/*.log", "d/e/a.log", true),
            ("**/*.log", "a.log", true),
            ("**file", "d/myfile", true),
            ("d", "d/e/f", true),
            ("/d/", "d/e", true),
            ("d/*", "d/e/f", true),
            ("d/*", "d", false),
            ("d\n!d/keep", "d/keep", false),
            ("d\n!d/keep", "d/other", true),
            ("!d/keep\nd", "d/keep", true),
            ("*\n!README.md", "README.md", false),
            ("# comment\n#x", "#x", false),
            ("a?c", "abc", true),
            ("[a-c].txt", "b.txt", true),
            ("[^a-c].txt", "b.txt", false),
            ("./x/../y", "y", true),
            (".", "anything", false),
        ] {
            assert_eq!(ignored(rules, path), expected, "{rules:?} {path}");
        }
    }

    #[test]
    fn malformed_rules_name_their_line() {
        assert_eq!(Patterns::parse("ok\n!").unwrap_err().line, 2);
        assert_eq!(Patterns::parse("[a").unwrap_err().line, 1);
        assert_eq!(Patterns::parse("a\n\nb\\").unwrap_err().line, 3);
    }

    #[test]
    fn directories_are_entered_only_for_what_may_be_taken_back() {
        let rules = Patterns::parse("target\nnode_modules\n!target/keep/me").unwrap();
        assert!(rules.may_contain_included("target"));
        assert!(rules.may_contain_included("target/keep"));
        assert!(!rules.may_contain_included("node_modules"));
        assert_eq!(rules.deciding_line("node_modules/x"), Some(2));
    }

    #[test]
    fn hostile_patterns_take_linear_time() {
        let pattern = "**/".repeat(500) + "x";
        let path = "a/".repeat(500) + "y";
        assert!(!ignored(&pattern, &path));
    }
}
