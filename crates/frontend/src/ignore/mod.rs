//! `.dockerignore`: which paths of a context do not exist for the build; and the globs of COPY.
//!
//! The rules are moby's patternmatcher's: patterns are anchored at the context's root, the last
//! match wins, `!` takes back, and what matches a directory matches everything below it. `**`
//! stands for any number of directories (see [`PathGlob`]); within a name the rules are those of
//! Go's `filepath.Match` (see [`glob`]).
//!
//! Where patternmatcher hands pattern text to a regular expression unescaped, so that `[*]`, `\d`
//! or `^` mean something else there than its documentation says, this follows the documentation.

mod pattern;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fmt;

pub use pattern::{PathGlob, glob, glob_path};
use pattern::{Units, units_of_path};

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
    /// Empty where nobody said: then it is called as it usually is.
    file: String,
    lines: Vec<String>,
    rules: Vec<Rule>,
}

/// Where a rule stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RulePlace {
    /// The ignore file, as its user would call it.
    pub file: String,
    /// From 1.
    pub line: usize,
}

impl fmt::Display for RulePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {} of {}", self.line, self.file)
    }
}

#[derive(Debug, Clone)]
struct Rule {
    line: usize,
    negated: bool,
    glob: PathGlob,
}

impl Patterns {
    /// Reads an ignore file. Time and memory are proportional to its length.
    ///
    /// # Errors
    /// The first line that is no rule.
    pub fn parse(text: &str) -> Result<Self, IgnoreError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        Self::from_lines(&lines)
    }

    /// Reads lines of an ignore file: comments, blanks and a leading `/` are allowed.
    ///
    /// # Errors
    /// The first line that is no rule.
    pub fn from_lines(lines: &[String]) -> Result<Self, IgnoreError> {
        let patterns = lines.iter().map(|line| pattern_of_line(line));
        Self::compile(patterns, lines)
    }

    /// Takes patterns that did not come from a file, such as those of `COPY --exclude`: `#` is an
    /// ordinary character, and an absolute pattern matches nothing.
    ///
    /// # Errors
    /// The first pattern that is no rule, by its place in the list.
    pub fn from_patterns(patterns: &[String]) -> Result<Self, IgnoreError> {
        Self::compile(patterns.iter().map(|pattern| Cow::from(pattern.as_str())), patterns)
    }

    fn compile<'a>(
        patterns: impl Iterator<Item = Cow<'a, str>>,
        lines: &[String],
    ) -> Result<Self, IgnoreError> {
        let mut rules = Vec::new();
        for (number, written) in patterns.enumerate() {
            let line = number + 1;
            let wrong = |message: String| IgnoreError { line, message };
            let written = written.trim();
            if written.is_empty() {
                continue;
            }
            let cleaned = clean(written);
            let (negated, cleaned) = match cleaned.strip_prefix('!') {
                Some("") => return Err(wrong("illegal exclusion pattern: a lone `!`".to_owned())),
                Some(rest) => (true, rest),
                None => (false, cleaned.as_str()),
            };
            let Some(glob) = PathGlob::compile(cleaned.as_bytes()) else {
                return Err(wrong(format!("{written:?} is not a valid pattern")));
            };
            rules.push(Rule { line, negated, glob });
        }
        Ok(Self { file: String::new(), lines: lines.to_vec(), rules })
    }

    /// The same rules with the name of their file, for messages.
    #[must_use]
    pub fn named(self, file: String) -> Self {
        Self { file, ..self }
    }

    /// Whether there is no rule at all, so that nothing is ignored.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The lines as they were read.
    pub fn lines(&self) -> &[String] {
        &self.lines
    }

    /// Whether `path` (relative, `/` between components) does not exist for the build. The root
    /// itself always exists.
    ///
    /// Costs at most the length of the path times the length of all rules together.
    pub fn is_ignored(&self, path: &str) -> bool {
        !self.is_empty()
            && self.deciding(&units_of_path(path.as_bytes())).is_some_and(|at| !self.rules[at].negated)
    }

    /// The rule that decided over `path`; `None` when no rule matches it.
    pub fn deciding_rule(&self, path: &str) -> Option<RulePlace> {
        let at = self.deciding(&units_of_path(path.as_bytes()))?;
        let file = if self.file.is_empty() { ".dockerignore" } else { &self.file };
        Some(RulePlace { file: file.to_owned(), line: self.rules[at].line })
    }

    /// Whether something below the directory `dir` may exist for the build: `dir` is not ignored,
    /// or a later `!` rule may take something back. If not, a walk can leave it out.
    pub fn may_contain_included(&self, dir: &str) -> bool {
        let mut text = units_of_path(dir.as_bytes());
        let Some(deciding) = self.deciding(&text) else { return true };
        if self.rules[deciding].negated {
            return true;
        }
        // What decided over the directory matches everything below it too: only later rules count.
        text.push(u32::from('/'));
        let mut later = self.rules[deciding + 1..].iter().filter(|rule| rule.negated);
        later.any(|rule| rule.glob.may_continue(&text))
    }

    fn deciding(&self, path: &Units) -> Option<usize> {
        if path.is_empty() {
            return None;
        }
        let mut scratch = Vec::new();
        self.rules.iter().rposition(|rule| rule.glob.matches_path_or_parent(path, &mut scratch))
    }
}

// What the reader of ignore files does to a line before the matcher sees it. Cleaning comes before
// the matcher looks for its `!`, so `./!a` takes back `a`, as it does for Docker.
fn pattern_of_line(line: &str) -> Cow<'_, str> {
    let trimmed = line.trim();
    if line.starts_with('#') || trimmed.is_empty() {
        return Cow::from("");
    }
    let (mark, rest) = match trimmed.strip_prefix('!') {
        Some(rest) => ("!", rest.trim()),
        None => ("", trimmed),
    };
    if rest.is_empty() {
        return Cow::from(mark);
    }
    let cleaned = clean(rest);
    let anchored = if cleaned.len() > 1 { cleaned.strip_prefix('/') } else { None };
    Cow::from(format!("{mark}{}", anchored.unwrap_or(&cleaned)))
}

fn clean(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let rooted = path.starts_with('/');
    for component in path.split('/') {
        match component {
            "" | "." => {}
            ".." if kept.last().is_some_and(|last| *last != "..") => {
                kept.pop();
            }
            ".." if rooted => {}
            component => kept.push(component),
        }
    }
    match (rooted, kept.is_empty()) {
        (true, _) => format!("/{}", kept.join("/")),
        (false, true) => ".".to_owned(),
        (false, false) => kept.join("/"),
    }
}
