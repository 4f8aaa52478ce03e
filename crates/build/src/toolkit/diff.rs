//! `kiln diff`: what the files of two images differ in.

use std::rc::Rc;

use kiln_content::ImageRecord;
use kiln_layer::Entry;

use super::ToolkitError;
use super::compare::{Aspect, Comparer};
use super::layers::chain;
use super::tree::{Dirs, Stack, by_component};
use crate::{BuildCancel, Engine};

/// A path that is not the same in two images.
#[derive(Debug, Clone)]
pub struct Difference {
    /// Without a leading slash.
    pub path: Vec<u8>,
    /// How it differs.
    pub kind: Kind,
}

/// How a path differs. Entries have an empty path.
#[derive(Debug, Clone)]
pub enum Kind {
    /// Only the second image has it.
    Added(Rc<Entry>),
    /// Only the first image has it.
    Deleted(Rc<Entry>),
    /// Both have it.
    Changed {
        /// In the first image.
        before: Rc<Entry>,
        /// In the second.
        after: Rc<Entry>,
        /// What is not the same; at least one.
        aspects: Vec<Aspect>,
    },
}

/// What must be done to the files of `one` to get those of `other`; sorted by path, a directory before
/// what is in it. Times, numbers of links and the root directory itself do not count.
///
/// Layers that both images have are read once and never compared. Of the others, files of one size
/// are read until they differ.
///
/// # Errors
/// [`ToolkitError`].
pub fn diff(
    engine: &Engine,
    one: &ImageRecord,
    other: &ImageRecord,
    cancel: &BuildCancel,
) -> Result<Vec<Difference>, ToolkitError> {
    let (first, second) = (chain(engine, one)?, chain(engine, other)?);
    let common = first.iter().zip(&second).take_while(|(a, b)| a == b).count();
    let base = Stack::read(engine, &first[..common], cancel)?;
    let copy = Stack { layers: base.layers.clone(), tree: base.tree.clone() };
    let one = base.with(engine, &first[common..], cancel)?;
    let other = copy.with(engine, &second[common..], cancel)?;
    differences(engine, &one, &other, false, cancel)
}

/// What two stacks differ in; `times`: in a modification time alone, too (no aspect tells of it).
pub(crate) fn differences(
    engine: &Engine,
    one: &Stack,
    other: &Stack,
    times: bool,
    cancel: &BuildCancel,
) -> Result<Vec<Difference>, ToolkitError> {
    let mut comparer = Comparer::new(Dirs::new(engine), cancel);
    let mut found = Vec::new();
    for (path, before) in one.tree.iter() {
        let Some(after) = other.tree.get(path) else {
            found.push(Difference { path: path.to_vec(), kind: Kind::Deleted(before.entry.clone()) });
            continue;
        };
        let aspects = comparer.compare(path, (one, before), (other, after))?;
        if !aspects.is_empty() || (times && before.entry.mtime != after.entry.mtime) {
            let (before, after) = (before.entry.clone(), after.entry.clone());
            found.push(Difference { path: path.to_vec(), kind: Kind::Changed { before, after, aspects } });
        }
    }
    for (path, after) in other.tree.iter() {
        if one.tree.get(path).is_none() {
            found.push(Difference { path: path.to_vec(), kind: Kind::Added(after.entry.clone()) });
        }
    }
    found.sort_by(|a, b| by_component(&a.path, &b.path));
    Ok(found)
}
