//! Variables: lists in which the last one of a name counts.

/// Names with values, in the order in which they were set last.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scope {
    entries: Vec<(String, String)>,
}

impl Scope {
    /// From `NAME=value` entries of an image config.
    pub(crate) fn of(env: &[String]) -> Self {
        let mut scope = Self::default();
        for entry in env {
            let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
            scope.set(name, value);
        }
        scope
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.entries.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// A variable that is set again moves to the end, as in BuildKit.
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.entries.retain(|(known, _)| known != name);
        self.entries.push((name.to_owned(), value.to_owned()));
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|(name, _)| name.as_str())
    }

    pub(crate) fn entries(&self) -> &[(String, String)] {
        &self.entries
    }
}

/// Sets a variable of an image config in place, or adds it at the end.
pub(crate) fn set_env(env: &mut Vec<String>, name: &str, value: &str) {
    let entry = format!("{name}={value}");
    match env.iter_mut().find(|old| old.split_once('=').is_some_and(|(known, _)| known == name)) {
        Some(old) => *old = entry,
        None => env.push(entry),
    }
}
