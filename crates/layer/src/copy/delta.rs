//! What a copy has to make where an earlier one by the same instruction stands below it already
//! (`docs/adr/0028`).
//!
//! What a directory shows that stands in front of another one is: all that is in it, and what it has no like
//! of. So a copy is what the earlier copy made with the entries in front that are not the same, if each
//! path of the earlier copy is a path of this one, and no directory becomes something else or the other way
//! round. The directories on the way to what is made are made, too: as the whole copy makes them.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, FileType};

use super::identity::made_of;
use super::over::open_below;
use super::{Copier, CopyError, Identity, Part, host};
use crate::diff::{Follower, What};
use crate::index::{Entry, EntryKind};
use crate::node::{self, Named};
use crate::path;

/// What an earlier copy made: this, the directory that it went into, those on the way there, and nothing else.
pub struct Whole<'a> {
    /// The directory of its layer, which nobody changes.
    pub dir: BorrowedFd<'a>,
    /// Digests of its entries, as far as there are any.
    pub known: &'a [[u8; 32]],
    /// How many entries it made: [`made`].
    pub entries: u64,
}

/// How many entries a copy of these parts makes, the destination and directories on the way left out; `None`:
/// one part may make again what another one made, so nobody can count.
pub fn made(parts: &[(Part<'_>, Vec<Identity>)]) -> Option<u64> {
    let mut total = 0;
    let mut names = HashSet::new();
    for (part, identities) in parts {
        for (entry, _) in part.entries.iter().zip(identities).filter(|(_, one)| one.is_made()) {
            total += 1;
            // They all go to one directory: what has no name in common there has no path in common.
            let below = part.below(entry);
            let name = if below.is_empty() { path::split(&part.destination).1 } else { below };
            if !name.contains(&b'/') && !names.insert(name) {
                return None;
            }
        }
    }
    Some(total)
}

/// The entries of each part that have to be copied in front of `earlier`, for the two to be what a copy of all
/// is; `None`: it cannot be so, or these would be more than `most`.
///
/// Both copies are of one instruction, on the same files below; of each entry the directory that it is in is
/// another one, up to the destination, as scans find them. Costs a few system calls for an entry that changed.
pub fn changed(
    earlier: &Whole<'_>,
    parts: &[(Part<'_>, Vec<Identity>)],
    most: usize,
) -> Option<Vec<Vec<Entry>>> {
    made(parts)?;
    let now: Vec<[u8; 32]> =
        parts.iter().flat_map(|(_, all)| all.iter().filter_map(Identity::known)).collect();
    let same = Same::of(earlier.known, &now);
    let mut nth_known = 0;
    let mut place = Looking { dir: earlier.dir, open: None };
    // How many entries of the earlier copy are entries of this one.
    let (mut found, mut total) = (0, 0);
    let mut kept = Vec::with_capacity(parts.len());
    for (part, identities) in parts {
        let mut of_part: Vec<Entry> = Vec::new();
        // The directories above an entry that have not changed themselves.
        let mut above: Vec<&Entry> = Vec::new();
        for (entry, identity) in part.entries.iter().zip(identities) {
            above.retain(|dir| path::is_below(&entry.path, &dir.path));
            let is_same = match identity {
                Identity::Nothing => continue,
                Identity::Known(digest) => {
                    nth_known += 1;
                    same.has(nth_known - 1, digest)
                }
                Identity::Unknown | Identity::Top => false,
            };
            if is_same {
                found += 1;
                if entry.kind == EntryKind::Dir {
                    above.push(entry);
                }
                continue;
            }
            if *identity != Identity::Top {
                found += u64::from(place.has(part, entry)?);
            }
            total += above.len() + 1;
            if total > most {
                return None;
            }
            of_part.extend(above.drain(..).cloned());
            of_part.push(entry.clone());
        }
        kept.push(of_part);
    }
    (found == earlier.entries).then_some(kept)
}

/// Tells `follower` of all that a part of a copy makes, where only `made` was made in front of an earlier copy,
/// and everything is as it will be. It follows the two together.
pub fn tell_whole(follower: &Follower, part: &Part<'_>, made: &[Entry]) {
    let mut made = made.iter().peekable();
    for entry in part.entries {
        let is_made = made.next_if(|made| made.path == entry.path).is_some();
        let path = part.destination_of(entry);
        let what = match &entry.kind {
            EntryKind::Socket => continue,
            // The root is in no layer.
            EntryKind::Dir if path.is_empty() => continue,
            EntryKind::Dir => What::Dir(None),
            EntryKind::File { nlink: 2.., .. } => return follower.give_up(),
            EntryKind::File { content, .. } if is_made => What::File(*content),
            EntryKind::File { .. } => What::Kept(made_of(entry, &path, part.owner, part.mode).into()),
            _ => What::Other,
        };
        follower.made(path, what);
    }
}

/// Which digests of one list are in another. Most are, at the same distance from one of the ends.
struct Same<'a> {
    /// So many at the beginning.
    first: usize,
    /// All from here on.
    last: usize,
    between: HashSet<&'a [u8; 32]>,
}

impl<'a> Same<'a> {
    fn of(earlier: &'a [[u8; 32]], now: &[[u8; 32]]) -> Self {
        let first = earlier.iter().zip(now).take_while(|(one, other)| one == other).count();
        let (earlier, rest) = (&earlier[first..], &now[first..]);
        let behind = earlier.iter().rev().zip(rest.iter().rev());
        let behind = behind.take_while(|(one, other)| one == other).count();
        let between = earlier[..earlier.len() - behind].iter().collect();
        Self { first, last: now.len() - behind, between }
    }

    fn has(&self, nth: usize, digest: &[u8; 32]) -> bool {
        nth < self.first || nth >= self.last || self.between.contains(digest)
    }
}

/// Looks up what an earlier copy has.
struct Looking<'a> {
    dir: BorrowedFd<'a>,
    /// The directory that was looked into last; `None` in it: there is none.
    open: Option<(Vec<u8>, Option<OwnedFd>)>,
}

impl Looking<'_> {
    /// Whether the earlier copy has something where an entry goes; `None`: one of the two is a directory and
    /// the other is none, or it cannot be told.
    fn has(&mut self, part: &Part<'_>, entry: &Entry) -> Option<bool> {
        let path = part.destination_of(entry);
        let (above, name) = path::split(&path);
        if self.open.as_ref().is_none_or(|(known, _)| known != above) {
            self.open = Some((above.to_vec(), open_below(self.dir, above).ok()?));
        }
        let Some((_, Some(dir))) = &self.open else { return Some(false) };
        let Some(stat) = node::stat(dir.as_fd(), name).ok()? else { return Some(false) };
        let was_dir = node::kind(&stat) == FileType::Directory;
        (was_dir == (entry.kind == EntryKind::Dir)).then_some(true)
    }
}

impl Copier<'_> {
    /// Gives the directories whose time is that of the copy the time that they have in the layer of the earlier
    /// one.
    pub(super) fn take_times(&self) -> Result<(), CopyError> {
        let Some(earlier) = self.request.times_of else { return Ok(()) };
        let mut path = self.request.destination;
        while !path.is_empty() {
            path = path::split(path).0;
            take_time(self.request.to, earlier, path)?;
        }
        self.untimed.iter().try_for_each(|path| take_time(self.request.to, earlier, path))
    }
}

fn take_time(to: BorrowedFd<'_>, from: BorrowedFd<'_>, path: &[u8]) -> Result<(), CopyError> {
    // Nothing was made there, or only now.
    let (Some(made), Some(like)) = (open_below(to, path)?, open_below(from, path)?) else { return Ok(()) };
    let stat = fs::fstat(like).named("fstat").map_err(host(path))?;
    node::set_mtime(made.as_fd(), b".", crate::index::mtime(&stat)).map_err(host(path))
}
