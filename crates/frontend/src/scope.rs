//! Variables: ordered lists in which each name stands once.

use std::collections::HashMap;

/// Names with values, in order.
#[derive(Debug, Clone)]
pub(crate) struct Scope<V> {
    /// `None`: it was set again and stands further behind.
    entries: Vec<Option<(String, V)>>,
    index: HashMap<String, usize>,
}

impl<V> Default for Scope<V> {
    fn default() -> Self {
        Self { entries: Vec::new(), index: HashMap::new() }
    }
}

impl<V> Scope<V> {
    pub(crate) fn get(&self, name: &str) -> Option<&V> {
        let at = *self.index.get(name)?;
        self.entries[at].as_ref().map(|(_, value)| value)
    }

    pub(crate) fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Sets a variable; one that was set before moves to the end, as BuildKit orders a step's
    /// environment.
    pub(crate) fn set(&mut self, name: &str, value: V) {
        if let Some(at) = self.index.insert(name.to_owned(), self.entries.len()) {
            self.entries[at] = None;
        }
        self.entries.push(Some((name.to_owned(), value)));
    }

    /// Sets a variable; one that was set before keeps its place, as in an image config.
    pub(crate) fn replace(&mut self, name: &str, value: V) {
        match self.index.get(name) {
            Some(&at) => self.entries[at] = Some((name.to_owned(), value)),
            None => self.set(name, value),
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &V)> {
        self.entries.iter().flatten().map(|(name, value)| (name.as_str(), value))
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.iter().map(|(name, _)| name)
    }
}

impl Scope<String> {
    /// From `NAME=value` entries of an image config.
    pub(crate) fn of(env: &[String]) -> Self {
        let mut scope = Self::default();
        for entry in env {
            let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
            scope.replace(name, value.to_owned());
        }
        scope
    }

    /// As `NAME=value` entries.
    pub(crate) fn to_entries(&self) -> Vec<String> {
        self.iter().map(|(name, value)| format!("{name}={value}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_move_or_stay_when_they_are_set_again() {
        let mut scope = Scope::of(&["A=1".to_owned(), "B=2".to_owned()]);
        scope.replace("A", "3".to_owned());
        assert_eq!(scope.to_entries(), ["A=3", "B=2"]);
        scope.set("A", "4".to_owned());
        assert_eq!(scope.to_entries(), ["B=2", "A=4"]);
        assert_eq!(scope.get("A").map(String::as_str), Some("4"));
    }
}
