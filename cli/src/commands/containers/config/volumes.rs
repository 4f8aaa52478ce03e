//! What is mounted: flags and the image's volumes.

use kiln_containers::{MountKind, MountPoint, Volumes};
use kiln_oci::image::RunConfig;

use super::super::mounts;
use crate::args::RunArgs;
use crate::errors::Failure;

pub(super) fn all_mounts(args: &RunArgs, settings: &RunConfig) -> Result<Vec<MountPoint>, Failure> {
    let mut found: Vec<MountPoint> = Vec::new();
    for text in &args.volume {
        found.push(mounts::of_volume_flag(text)?);
    }
    for text in &args.life.mount {
        found.push(mounts::of_mount_flag(text)?);
    }
    for text in &args.confinement.tmpfs {
        found.push(mounts::of_tmpfs_flag(text)?);
    }
    for target in settings.volumes.keys() {
        // What the user mounts there takes its place.
        if found.iter().all(|mount| mount.target.trim_end_matches('/') != target.trim_end_matches('/')) {
            let target = mounts::target(target)
                .map_err(|reason| Failure::usage(format!("the image's VOLUME {target:?}: {reason}")))?;
            found.push(mounts::anonymous(target, false, true)?);
        }
    }
    for (at, mount) in found.iter().enumerate() {
        let same =
            |other: &MountPoint| other.target.trim_end_matches('/') == mount.target.trim_end_matches('/');
        if found[..at].iter().any(same) {
            return Err(Failure::usage(format!("{:?} is mounted on twice", mount.target)));
        }
    }
    Ok(found)
}

/// The name of a volume that was given none.
pub(in crate::commands::containers) fn volume_name() -> Result<String, Failure> {
    Volumes::random_name().map_err(|error| Failure::store(error.to_string()))
}

/// Whether a mount is a volume.
pub(in crate::commands::containers) fn volume_of(mount: &MountPoint) -> Option<(&str, bool)> {
    match &mount.kind {
        MountKind::Volume { name, anonymous, .. } => Some((name, *anonymous)),
        _ => None,
    }
}
