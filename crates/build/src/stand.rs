//! A layer's tar becomes a snapshot that stands on another one.
//!
//! Where snapshots hold changes alone, a tar is unpacked on nothing first, so that layers unpack side
//! by side. What it leaves to the layers below is settled when these are known: [`stand_on`].

use std::io::Read;
use std::os::fd::AsFd;

use kiln_layer::{Applied, ApplyOptions, Inherited, Reading, Whiteouts, inherit};
use kiln_oci::SnapshotId;
use kiln_snapshotter::{LayerForm, OpenOptions};

use crate::engine::Active;
use crate::{BuildCancel, BuildError, Engine};

/// An empty place for a layer that is going to stand on `parent`.
pub(crate) fn prepare_layer(engine: &Engine, parent: Option<&SnapshotId>) -> Result<Active, BuildError> {
    engine.prepare(match engine.snapshots.form() {
        LayerForm::Changes => None,
        LayerForm::Tree => parent,
    })
}

/// Unpacks a layer's plain tar into a place made by [`prepare_layer`].
///
/// # Errors
/// [`BuildError::Apply`], [`BuildError::Snapshots`].
pub(crate) fn unpack_layer(
    engine: &Engine,
    active: &Active,
    plain: impl Read + Send,
    reading: Reading,
    cancel: &BuildCancel,
) -> Result<Applied, BuildError> {
    let root = engine.snapshots.open_layer(active.key())?;
    let whiteouts = match engine.snapshots.form() {
        LayerForm::Changes => Whiteouts::Overlay,
        LayerForm::Tree => Whiteouts::Remove,
    };
    let options =
        ApplyOptions { whiteouts, keep_owner: true, limits: engine.limits, reading, cancel: cancel.flag() };
    Ok(kiln_layer::apply(plain, root.as_fd(), &options)?)
}

/// Lets an unpacked layer stand on `parent`. Directories that its tar only implied become as they are
/// there. Where there is a link instead, the tar, which `again` gives once more, is unpacked on the
/// merged tree, so that everything lands behind the link.
///
/// Costs a mount and some calls a directory when there are implied ones; O(1) otherwise.
///
/// # Errors
/// Those of [`unpack_layer`] and of `again`; [`BuildError::WrongDiffId`] when that is another tar now.
pub(crate) fn stand_on<'a>(
    engine: &Engine,
    active: Active,
    applied: &Applied,
    parent: Option<&SnapshotId>,
    again: impl FnOnce() -> Result<Box<dyn Read + Send + 'a>, BuildError>,
    cancel: &BuildCancel,
) -> Result<Active, BuildError> {
    let Some(parent) = parent.filter(|_| engine.snapshots.form() == LayerForm::Changes) else {
        return Ok(active);
    };
    let view = match applied.implied.as_slice() {
        [] => None,
        _ => match engine.snapshots.open_view(parent) {
            // Nobody can look at it either.
            Err(kiln_snapshotter::Error::TooDeep { .. }) => None,
            view => Some(view?),
        },
    };
    if let Some(view) = view {
        let upper = engine.snapshots.open_layer(active.key())?;
        if inherit(view.as_fd(), upper.as_fd(), &applied.implied)? == Inherited::Link {
            drop((view, upper, active));
            return unpack_on(engine, parent, again()?, applied, cancel);
        }
    }
    active.set_parent(parent, !applied.has_root)?;
    Ok(active)
}

/// Unpacks a layer on the merged tree of `parent`.
fn unpack_on(
    engine: &Engine,
    parent: &SnapshotId,
    plain: impl Read + Send,
    before: &Applied,
    cancel: &BuildCancel,
) -> Result<Active, BuildError> {
    let active = engine.prepare(Some(parent))?;
    let root = engine.snapshots.open_active(active.key(), &OpenOptions::default())?;
    let options = ApplyOptions {
        whiteouts: Whiteouts::Remove,
        keep_owner: true,
        limits: engine.limits,
        reading: Reading::Ahead,
        cancel: cancel.flag(),
    };
    let applied = kiln_layer::apply(plain, root.as_fd(), &options)?;
    if applied.diff_id != before.diff_id {
        return Err(BuildError::WrongDiffId { expected: before.diff_id, actual: applied.diff_id });
    }
    Ok(active)
}
