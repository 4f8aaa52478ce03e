//! A copy whose layer is there: an earlier one made the same, on another base or by other words
//! (`docs/adr/0038-copies-on-another-base.md`).

use std::collections::HashSet;
use std::fmt::Write;
use std::os::fd::{AsFd, BorrowedFd};

use kiln_content::CacheRecord;
use kiln_layer::{EntryKind, Identity, Part, found_below, marking};
use kiln_llb as llb;
use kiln_oci::{Digest, SnapshotId};
use kiln_solver::Scope;

use super::earlier::has_room_for_delta;
use super::{BuildOp, note};
use crate::engine::{Active, now_unix};
use crate::tree::Tree;
use crate::{Engine, OpError};

/// Digest of what a plain copy finds in the tree that it stands on, as far as its layer depends on that; `None`:
/// nobody can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Below([u8; 32]);

impl Below {
    /// Of the tree of `base`; `None` of that: of no files.
    pub(super) fn of(
        engine: &Engine,
        base: Option<&SnapshotId>,
        parts: &[(Part<'_>, Vec<Identity>)],
    ) -> Option<Self> {
        let Some(base) = base else { return Some(Self([0; 32])) };
        let view = engine.snapshots.open_view(base).ok()?;
        Self::seen(view.as_fd(), parts)
    }

    /// Of a tree.
    pub(super) fn seen(view: BorrowedFd<'_>, parts: &[(Part<'_>, Vec<Identity>)]) -> Option<Self> {
        found_below(view, parts.iter().map(|(part, _)| part)).ok().flatten().map(Self)
    }
}

/// Names the layer that a plain copy makes, in the store's index: what goes where, and what it finds there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LayerKey(Digest);

impl LayerKey {
    /// For what was planned, with these bits for directories on the way; `None`: nobody can tell what it makes.
    pub(super) fn of(
        below: Option<Below>,
        parent_mode: u32,
        parts: &[(Part<'_>, Vec<Identity>)],
    ) -> Option<Self> {
        let Below(below) = below?;
        let owner = parts.first()?.0.owner;
        let mut files = HashSet::new();
        let mut text = format!("copied layer 1 {} {parent_mode:o} {owner:?} {below:02x?}\n", marking());
        for (part, _) in parts {
            // Two files in one place may be an error, or not: the instruction says.
            let is_dir = part.entries.first().is_some_and(|first| first.kind == EntryKind::Dir);
            if !is_dir && !files.insert(&part.destination) {
                return None;
            }
            let _ = writeln!(text, "{:02x?}", part.digest()?);
        }
        Some(Self(Digest::of(text.as_bytes())))
    }

    /// The layer, if it is there and may stand on `base`; it stays.
    fn find(&self, engine: &Engine, base: Option<&SnapshotId>) -> Option<SnapshotId> {
        let found = engine.store.cache_get(&self.0).ok()??.snapshot;
        let snapshots = &engine.snapshots;
        let is_usable = snapshots.contains(&found)
            && (snapshots.needs(&found).ok()?.full.is_none() || has_room_for_delta(engine, base)?);
        is_usable.then_some(found)
    }

    /// Remembers that `layer` is it. The newest one stays longest.
    pub(super) fn save(&self, engine: &Engine, layer: &SnapshotId, title: &str) -> Result<(), OpError> {
        let (description, created_unix) = (title.to_owned(), now_unix());
        let record = CacheRecord { canonical: self.0, snapshot: layer.clone(), created_unix, description };
        Ok(engine.store.cache_put(&[self.0], &record, true).map_err(crate::BuildError::from)?)
    }
}

impl BuildOp {
    /// The layer of an earlier copy that made what this one would; `None`: there is none, or somebody wants it made.
    pub(super) fn earlier_layer(&self, key: &LayerKey, base: Option<&SnapshotId>) -> Option<SnapshotId> {
        if self.refresh { None } else { key.find(&self.shared.engine, base) }
    }

    /// Puts it on `base`, which `active` was prepared on and nothing was written to. No file is copied or hashed.
    pub(super) fn keep_layer(
        &self,
        key: &LayerKey,
        layer: &SnapshotId,
        base: Option<&SnapshotId>,
        active: Active,
        scope: &Scope<'_>,
    ) -> Result<Tree, OpError> {
        let engine = &self.shared.engine;
        note(scope, "an earlier build made the same layer: no file is copied");
        if let Some(why) = &self.shared.why {
            why.note_kept(self.vertex);
        }
        if engine.snapshots.needs(layer).map_err(crate::BuildError::from)?.parent.as_ref() == base {
            return Ok(Tree::Snapshot(layer.clone()));
        }
        let id = active.commit_layer(layer)?;
        self.shared.layers.start_as(&id, layer);
        key.save(engine, &id, &self.title)?;
        Ok(Tree::Snapshot(id))
    }
}

/// Whether `op` copies: what it makes may be what another text of it made.
pub(super) fn is_copy(op: &llb::Op) -> bool {
    let llb::Op::File(file) = op else { return false };
    file.actions.iter().any(|action| matches!(action, llb::FileAction::Copy(_)))
}
