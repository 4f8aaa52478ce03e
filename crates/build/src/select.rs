//! Which files a `COPY` means: patterns against a tree, with everything below what they match.

mod find;

use std::cmp::Ordering;
use std::collections::HashSet;
use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

use kiln_frontend::ignore::Patterns;
use kiln_layer::{
    Entry, EntryKind, LookedAt, ScanError, ScanOptions, StatCache, TopDir, Visit, scan, tree_digest,
    walk_order,
};
use kiln_llb as llb;
use kiln_oci::Digest;
use rustix::io::Errno;

use self::find::{Found, find, is_dir, missing};
use crate::OpError;
use crate::context_files::lock;

/// A tree to select from.
pub(crate) struct Place<'a> {
    pub(crate) root: BorrowedFd<'a>,
    /// Rules of `.dockerignore`; `None` for snapshots.
    pub(crate) ignore: Option<&'a Patterns>,
    pub(crate) digests: Option<&'a dyn StatCache>,
    pub(crate) cancel: &'a AtomicBool,
}

/// What the sources of one `COPY` matched.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    /// When the scan began; `None`: what was scanned does not change.
    pub(crate) looked_at: Option<LookedAt>,
    /// Whether a matched directory is meant itself, and not only what is in it: it is mounted.
    pub(crate) whole: bool,
    pub(crate) matches: Vec<Match>,
    /// What no build takes out of a context: sockets, FIFOs and overlayfs's whiteouts.
    pub(crate) skipped: Vec<Vec<u8>>,
}

/// One matched file or directory.
#[derive(Debug)]
pub(crate) struct Match {
    /// Path as it matched: its last component names a copied file.
    pub(crate) named: Vec<u8>,
    /// Path behind symbolic links; entries stand at and below it.
    pub(crate) path: Vec<u8>,
    pub(crate) entries: Vec<Entry>,
    /// Directories that `--exclude` or `--parents` pass by on the way to what they take.
    pub(crate) passed: HashSet<Vec<u8>>,
}

impl Match {
    /// A directory is copied by its contents, a file under its name.
    pub(crate) fn is_dir(&self) -> bool {
        matches!(self.entries.first().map(|entry| &entry.kind), Some(EntryKind::Dir))
    }

    pub(crate) fn file_name(&self) -> &[u8] {
        last(&self.named)
    }
}

impl Selection {
    /// Digest of what was selected: content, modes, links, xattrs, file names; no times.
    pub(crate) fn digest(&self, ignore_owner: bool) -> Digest {
        let mut text = String::new();
        let top = if self.whole { TopDir::Itself } else { TopDir::Contents };
        for found in &self.matches {
            // The length in front keeps names with odd characters from meeting the next field.
            let name = if found.is_dir() { &b""[..] } else { found.file_name() };
            text.push_str(&format!("{} {name:?} ", name.len()));
            text.push_str(&tree_digest(&found.entries, &found.path, ignore_owner, top).to_string());
            text.push('\n');
        }
        Digest::of(text.as_bytes())
    }
}

/// Finds the sources of `copy` in `place` and scans what they match, hashing file content.
///
/// A pattern without a match is tolerated only when another source matches (as BuildKit does). What changes
/// in a context while it is read is read again.
///
/// # Errors
/// [`kiln_layer::ScanError::ChangedWhileReading`] when it never rests.
pub(crate) fn select(place: &Place<'_>, copy: &llb::Copy) -> Result<Selection, OpError> {
    let mut attempts = if place.ignore.is_some() { ATTEMPTS } else { 1 };
    loop {
        attempts -= 1;
        match select_once(place, copy) {
            Err(OpError::Scan(ScanError::Host { path, source, .. }))
                if place.ignore.is_some() && is_other_now(&source) =>
            {
                if attempts == 0 {
                    return Err(ScanError::ChangedWhileReading { path }.into());
                }
            }
            selected => return selected,
        }
    }
}

/// How often a context is read whose files come and go meanwhile.
const ATTEMPTS: usize = 5;

/// Whether the kernel says that a file is not what it was a moment before: gone, a directory no more, a
/// link now, or a link no more.
fn is_other_now(error: &std::io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::INVAL | Errno::NXIO))
}

fn select_once(place: &Place<'_>, copy: &llb::Copy) -> Result<Selection, OpError> {
    let exclude = rules(&copy.exclude, "")?;
    let looked_at = place.ignore.map(|_| LookedAt::now());
    let mut selection = Selection { looked_at, ..Selection::default() };
    let (mut any, mut empty) = (false, None);
    for source in &copy.sources {
        let found = match copy.parents {
            true => select_parents(place, source, &exclude, &mut selection)?,
            false => select_source(place, source, &exclude, &mut selection)?,
        };
        match found {
            Outcome::Something => any = true,
            Outcome::Nothing { ignored } if has_meta(source.as_bytes()) => {
                empty.get_or_insert((source, ignored));
            }
            Outcome::Nothing { ignored } => return Err(missing(place, source, ignored)),
        }
    }
    match empty {
        Some((source, ignored)) if !any => Err(missing(place, source, ignored)),
        _ => Ok(selection),
    }
}

/// Whether a source names anything.
enum Outcome {
    Something,
    Nothing {
        /// A path that it would have named but for `.dockerignore`.
        ignored: Option<Vec<u8>>,
    },
}

fn select_source(
    place: &Place<'_>,
    source: &str,
    exclude: &Patterns,
    selection: &mut Selection,
) -> Result<Outcome, OpError> {
    let Found { paths, wildcard, mut ignored } = find(place, source)?;
    let mut any = false;
    for (named, path) in paths {
        // `--exclude` speaks of what is below a directory source, relative to it, and of files by
        // their own name. BuildKit lets whatever a source or its wildcard names itself through (its
        // issue 5489), against its own reference: `COPY --exclude=*.txt hom* /x/`.
        let by_name = wildcard || !is_dir(place.root, &path)?;
        if by_name && exclude.is_ignored(&String::from_utf8_lossy(last(&named))) {
            any = true;
            continue;
        }
        if let Some(found) = scan_match(place, named, path, None, exclude, &mut ignored)? {
            any = true;
            selection.push(found, place.ignore.is_some());
        }
    }
    Ok(if any { Outcome::Something } else { Outcome::Nothing { ignored } })
}

/// With `--parents` a source is a directory, the pivot, and a pattern for what is taken below it.
fn select_parents(
    place: &Place<'_>,
    source: &str,
    exclude: &Patterns,
    selection: &mut Selection,
) -> Result<Outcome, OpError> {
    let (pivot, pattern) = source.split_once("/./").unwrap_or(("", source));
    // Everything is out but what the pattern takes back; no pattern takes everything.
    let everything = pattern.split('/').all(|component| matches!(component, "" | "."));
    let include = if everything { None } else { Some(rules(&[pattern.to_owned()], "!")?) };
    let Found { paths, mut ignored, .. } = find(place, pivot)?;
    let mut any = false;
    for (named, path) in paths {
        match scan_match(place, named, path, include.as_ref(), exclude, &mut ignored)? {
            // The pivot itself is always there.
            Some(found) if found.entries.len() > 1 || everything => {
                any = true;
                selection.push(found, place.ignore.is_some());
            }
            _ => {}
        }
    }
    if !any && ignored.is_none() && !has_meta(source.as_bytes()) {
        // Told by name what a walk that looks only at directories did not come by.
        ignored = find(place, &source.replace("/./", "/"))?.ignored;
    }
    Ok(if any { Outcome::Something } else { Outcome::Nothing { ignored } })
}

/// Scans what is at `path`. Of a directory only what `include` takes back and `exclude` leaves.
///
/// `None`: `.dockerignore` leaves nothing. `ignored` becomes the first wanted path it left out.
fn scan_match(
    place: &Place<'_>,
    named: Vec<u8>,
    path: Vec<u8>,
    include: Option<&Patterns>,
    exclude: &Patterns,
    ignored: &mut Option<Vec<u8>>,
) -> Result<Option<Match>, OpError> {
    let passed = Mutex::new(HashSet::new());
    let known = ignored.take();
    let left_out = Mutex::new(None);
    let filter = |at: &[u8], is_dir: bool| -> Visit {
        let mut visit = Visit::Take;
        let below = at.strip_prefix(path.as_slice()).unwrap_or(at);
        let below = below.strip_prefix(b"/").unwrap_or(below);
        let below = String::from_utf8_lossy(below);
        if let Some(ignore) = place.ignore.filter(|ignore| !ignore.is_empty()) {
            let text = String::from_utf8_lossy(at);
            if ignore.is_ignored(&text) {
                if !is_dir || !ignore.may_contain_included(&text) {
                    if below.is_empty() || include.is_some_and(|include| !include.is_ignored(&below)) {
                        keep_first(&mut lock(&left_out), at);
                    }
                    return Visit::Skip;
                }
                visit = Visit::Descend;
            }
        }
        if below.is_empty() {
            return visit;
        }
        let exclude = (!exclude.is_empty()).then_some(exclude);
        for rules in include.into_iter().chain(exclude) {
            if rules.is_ignored(&below) {
                if !is_dir || !rules.may_contain_included(&below) {
                    return Visit::Skip;
                }
                lock(&passed).insert(at.to_vec());
                visit = Visit::Descend;
            }
        }
        visit
    };
    let options =
        ScanOptions { hash: true, filter: Some(&filter), stat_cache: place.digests, cancel: place.cancel };
    let entries = scan(place.root, &path, &options)?;
    *ignored = known.or(left_out.into_inner().unwrap_or_else(PoisonError::into_inner));
    if entries.is_empty() {
        // Whatever the rules take back below it is not there.
        ignored.get_or_insert(path);
        return Ok(None);
    }
    let passed = passed.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(Some(Match { named, path, entries, passed }))
}

/// Makes `first` the path that a walk comes to first: several threads look, in no order.
fn keep_first(first: &mut Option<Vec<u8>>, at: &[u8]) {
    if first.as_ref().is_none_or(|first| walk_order(at, first) == Ordering::Less) {
        *first = Some(at.to_vec());
    }
}

impl Selection {
    /// Takes `found`, without what is not copied.
    fn push(&mut self, mut found: Match, from_context: bool) {
        if from_context {
            for entry in &mut found.entries {
                // What layers keep of a context (containerd's archives have nothing else either).
                entry.xattrs.retain(|name, _| name == b"security.capability");
            }
        }
        let skipped = &mut self.skipped;
        found.entries.retain(|entry| match entry.kind {
            EntryKind::Socket | EntryKind::Fifo | EntryKind::Char { major: 0, minor: 0 } if from_context => {
                skipped.push(entry.path.clone());
                false
            }
            EntryKind::Socket => false,
            _ => true,
        });
        if !found.entries.is_empty() {
            self.matches.push(found);
        }
    }
}

/// Patterns as rules of an ignore file; with `prefix` `!`, what they match is all that is left.
fn rules(patterns: &[String], prefix: &str) -> Result<Patterns, OpError> {
    let all = (prefix == "!").then(|| "**".to_owned());
    let lines = patterns.iter().map(|pattern| match pattern.as_bytes() {
        // No comment here.
        [b'#', ..] if prefix.is_empty() => format!("./{pattern}"),
        _ => format!("{prefix}{pattern}"),
    });
    let lines: Vec<String> = all.into_iter().chain(lines).collect();
    Patterns::from_lines(&lines).map_err(|error| OpError::Pattern {
        pattern: lines.get(error.line.saturating_sub(1)).cloned().unwrap_or_default(),
    })
}

fn last(path: &[u8]) -> &[u8] {
    path.rsplit(|&b| b == b'/').next().unwrap_or_default()
}

pub(crate) fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() { name.to_vec() } else { [path, b"/", name].concat() }
}

/// Whether a pattern has more than plain text; what a backslash stands before is plain.
fn has_meta(pattern: &[u8]) -> bool {
    let mut bytes = pattern.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'*' | b'?' | b'[' => return true,
            b'\\' => drop(bytes.next()),
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests;
