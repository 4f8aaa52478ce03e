//! Parts of a context that steps mount: scanned once a build, copied at most once.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_layer::CopyRequest;
use kiln_llb as llb;

use crate::context::Context;
use crate::engine::Active;
use crate::select::{Place, Selection, select};
use crate::{Engine, OpError};

/// Where a copied file stands; a directory's contents stand at the root of the copy.
pub(crate) const FILE: &str = "file";

/// The parts of contexts that one build mounted so far.
#[derive(Default)]
pub(crate) struct ContextFiles {
    parts: Mutex<HashMap<(usize, String), Arc<Part>>>,
}

/// One path of a context.
pub(crate) struct Part {
    /// Also keeps the address that the part is found by.
    context: Arc<Context>,
    source: String,
    selection: Mutex<Option<Arc<Selection>>>,
    copy: Mutex<Option<Arc<Active>>>,
}

impl ContextFiles {
    /// The part at `source`, a plain path; nothing is read yet.
    pub(crate) fn part(&self, context: &Arc<Context>, source: &str) -> Arc<Part> {
        let key = (Arc::as_ptr(context).addr(), source.to_owned());
        let part = || Part {
            context: context.clone(),
            source: source.to_owned(),
            selection: Mutex::default(),
            copy: Mutex::default(),
        };
        lock(&self.parts).entry(key).or_insert_with(|| Arc::new(part())).clone()
    }
}

impl Part {
    /// What the ignore rules leave of it.
    pub(crate) fn selection(&self, cancel: &AtomicBool) -> Result<Arc<Selection>, OpError> {
        let mut known = lock(&self.selection);
        if let Some(selection) = &*known {
            return Ok(selection.clone());
        }
        let context = &self.context;
        let (root, ignore) = (context.root(), Some(context.ignore()));
        let place = Place { root, ignore, digests: Some(context.digests()), cancel };
        let selection = Arc::new(select_path(&place, &self.source)?);
        *known = Some(selection.clone());
        Ok(selection)
    }

    /// A copy of what was selected, root's, at the root of a snapshot nobody commits; a file as
    /// [`FILE`].
    ///
    /// The context's own directory would cost nothing to mount, and be wrong in four ways: ignored
    /// files would show, files would belong to whoever runs kiln, sockets and FIFOs of the host
    /// would answer, and what changes during the build would not be what the cache key says. A copy
    /// shares its blocks with the original where the file system can.
    pub(crate) fn copy(&self, engine: &Engine, cancel: &AtomicBool) -> Result<Arc<Active>, OpError> {
        let mut known = lock(&self.copy);
        if let Some(copy) = &*known {
            return Ok(copy.clone());
        }
        let selection = self.selection(cancel)?;
        let active = engine.prepare(None)?;
        let to = engine.snapshots.open_layer(active.key())?;
        let from = Files { root: self.context.root(), owner: Some((0, 0)) };
        copy_selection(&selection, &from, to.as_fd(), cancel)?;
        let copy = Arc::new(active);
        *known = Some(copy.clone());
        Ok(copy)
    }
}

/// Locks what cannot be left half-done.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole values are put in: a panic elsewhere leaves nothing half-done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Selects what is at one plain path, behind links too.
///
/// # Errors
/// [`OpError::NoSource`] and the others of a copy.
pub(crate) fn select_path(place: &Place<'_>, source: &str) -> Result<Selection, OpError> {
    let mut pattern = String::with_capacity(source.len());
    for character in source.chars() {
        // A class of one character stands for that character.
        match character {
            '*' | '?' | '[' => pattern.extend(['[', character, ']']),
            '\\' => pattern.push_str("[\\\\]"),
            other => pattern.push(other),
        }
    }
    let copy = llb::Copy {
        from: llb::InputIndex(0),
        sources: vec![pattern],
        destination: "/".to_owned(),
        destination_is_dir: false,
        owner: llb::Owner::Keep,
        mode: None,
        parents: false,
        exclude: Vec::new(),
        unpack: llb::Unpack::Never,
    };
    let selected = select(place, &copy).map(|selection| Selection { whole: true, ..selection });
    selected.map_err(|error| match error {
        OpError::NoSource { place, ignored_by, similar, .. } => {
            OpError::NoSource { path: source.to_owned(), place, ignored_by, similar }
        }
        other => other,
    })
}

/// Where selected files are copied from.
pub(crate) struct Files<'a> {
    pub(crate) root: BorrowedFd<'a>,
    /// Owner of the copies; `None` keeps those of the files.
    pub(crate) owner: Option<(u32, u32)>,
}

/// Copies a directory's contents to the root of `to`, with its own mode and times; a file to
/// [`FILE`].
pub(crate) fn copy_selection(
    selection: &Selection,
    from: &Files<'_>,
    to: BorrowedFd<'_>,
    cancel: &AtomicBool,
) -> Result<(), OpError> {
    for found in &selection.matches {
        kiln_layer::copy(&CopyRequest {
            looked_at: selection.looked_at,
            passed: Some(&found.passed),
            strip: &found.path,
            destination: if found.is_dir() { b"" } else { FILE.as_bytes() },
            owner: from.owner,
            ..CopyRequest::tree(from.root, &found.entries, to, cancel)
        })?;
    }
    Ok(())
}
