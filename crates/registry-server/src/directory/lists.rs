//! Lists: tags of a repository, and repositories.

use std::fs;
use std::path::Path;

use super::{Directory, DirectoryError, names};
use crate::route::Name;

/// More than so many are given out page by page.
const MOST: usize = 10_000;

/// Part of a sorted list.
pub(crate) struct Page {
    pub(crate) entries: Vec<String>,
    /// Whether there is something behind it.
    pub(crate) more: bool,
}

impl Page {
    /// At most `count` of those behind `last`.
    pub(crate) fn of(sorted: impl Iterator<Item = String>, count: Option<usize>, last: Option<&str>) -> Self {
        let count = count.unwrap_or(MOST).min(MOST);
        let mut rest = sorted.filter(|entry| last.is_none_or(|last| entry.as_str() > last));
        let entries: Vec<String> = rest.by_ref().take(count).collect();
        let more = count > 0 && rest.next().is_some();
        Self { entries, more }
    }
}

impl Directory {
    /// A repository's tags; `None`: there is no such repository.
    pub(crate) fn tags(
        &self,
        name: &Name,
        count: Option<usize>,
        last: Option<&str>,
    ) -> Result<Option<Page>, DirectoryError> {
        if !is_repository(&self.repository(name)) {
            return Ok(None);
        }
        let tags = names(&self.repository(name).join("_tags"))?;
        Ok(Some(Page::of(tags.into_iter(), count, last)))
    }

    /// The repositories with something in them that `may` be seen.
    pub(crate) fn catalog(
        &self,
        count: Option<usize>,
        last: Option<&str>,
        may: impl Fn(&Name) -> bool,
    ) -> Result<Page, DirectoryError> {
        let all = self.repositories()?.into_iter();
        let seen = all.filter(|name| may(name) && is_repository(&self.repository(name)));
        Ok(Page::of(seen.map(|name| name.as_str().to_owned()), count, last))
    }

    /// All directories that are one, sorted by their names, those without anything in them, too.
    pub(crate) fn repositories(&self) -> Result<Vec<Name>, DirectoryError> {
        let mut found = Vec::new();
        let mut open = vec![String::new()];
        while let Some(above) = open.pop() {
            for entry in names(&self.root.join("repositories").join(&above))? {
                if entry.starts_with('_') {
                    continue;
                }
                let path = if above.is_empty() { entry } else { format!("{above}/{entry}") };
                let Ok(name) = path.parse::<Name>() else { continue };
                found.push(name);
                open.push(path);
            }
        }
        found.sort();
        Ok(found)
    }
}

/// Whether there is a manifest in it.
fn is_repository(path: &Path) -> bool {
    fs::read_dir(path.join("_manifests")).is_ok_and(|mut entries| entries.next().is_some())
}
