//! What is tried: snapshots on the store's file system, and containers on them.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use kiln_executor::{Cancel, ExecError, Executor, Ids, Linux, Network, ProcessSpec, Resources, Stdio};
use kiln_oci::{ActiveKey, SnapshotId};
use kiln_snapshotter::{Backend, OpenOptions};

use super::host;
use super::{Rung, State};

/// Removed with this value.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Tries everything at the place of the store at `root`, which is not touched.
pub(super) fn rungs(root: &Path) -> Vec<Rung> {
    let place = match place_near(root) {
        Ok(place) => place,
        Err(reason) => {
            let rung = Rung::new("store", State::Blocked, reason);
            return vec![rung.help("kiln --root DIR doctor, with a directory of yours on a disk")];
        }
    };
    let mut rungs = vec![Rung::ok("store", root.display().to_string())];
    let overlay = mounted(&place.0, Backend::Overlay);
    let fuse = mounted(&place.0, Backend::FuseOverlayfs);
    let works = (overlay.is_ok(), fuse.is_ok());
    rungs.push(match &overlay {
        Ok(_) => Rung::ok("overlayfs", "mounts here"),
        Err(reason) => Rung::new("overlayfs", State::Limited, reason.clone())
            .help("kiln --root DIR, with DIR on ext4, xfs or btrfs"),
    });
    rungs.push(match &fuse {
        Ok(_) if works.0 => Rung::new("fuse-overlayfs", State::Unused, "mounts here; overlayfs is better"),
        Ok(_) => Rung::ok("fuse-overlayfs", "mounts here"),
        Err(reason) if works.0 => Rung::new("fuse-overlayfs", State::Unused, reason.clone()),
        Err(reason) => {
            let help = match host::fuse_opens() {
                true => "sudo apt-get install fuse-overlayfs",
                false => "sudo modprobe fuse && sudo chmod 666 /dev/fuse",
            };
            Rung::new("fuse-overlayfs", State::Limited, reason.clone()).help(help)
        }
    });
    rungs.push(match works {
        (false, false) => Rung::new("copying", State::Limited, "each snapshot is a whole copy"),
        _ => Rung::new("copying", State::Unused, "works everywhere, slowly"),
    });
    let backend = match works {
        (true, _) => Backend::Overlay,
        (false, true) => Backend::FuseOverlayfs,
        (false, false) => Backend::Copy,
    };
    rungs.extend(containers(&place.0, backend));
    rungs
}

/// A new directory on the file system that the store is on, or will be.
fn place_near(root: &Path) -> Result<Place, String> {
    let near = root.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    let place = near.join(format!(".kiln-doctor-{}", std::process::id()));
    match fs::create_dir(&place) {
        Ok(()) => Ok(Place(place)),
        Err(error) => Err(format!("{} cannot be written to ({error})", near.display())),
    }
}

/// An error and its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// A snapshot on another one, opened to be written to.
fn mounted(place: &Path, backend: Backend) -> Result<OwnedFd, String> {
    let name = |text: &str| text.parse::<ActiveKey>().map_err(|error| error.to_string());
    let id = "below".parse::<SnapshotId>().map_err(|error| error.to_string())?;
    let open = || {
        let snapshots = kiln_snapshotter::open(&place.join(backend.to_string()), backend)?;
        Ok::<_, kiln_snapshotter::Error>(snapshots)
    };
    let snapshots = open().map_err(|error| chain(&error))?;
    let (below, above) = (name("doctor-1")?, name("doctor-2")?);
    let tree = || {
        snapshots.prepare(&below, None)?;
        snapshots.commit(&below, &id)?;
        snapshots.prepare(&above, Some(&id))?;
        snapshots.open_active(&above, &OpenOptions::default())
    };
    tree().map_err(|error| chain(&error))
}

/// A new directory in one that is removed with all that is in it.
fn tempdir_in(place: &Path) -> Result<PathBuf, String> {
    let taken = fs::read_dir(place).map_err(|error| error.to_string())?.count();
    let own = place.join(format!("trial-{taken}"));
    fs::create_dir(&own).map_err(|error| format!("{}: {error}", own.display()))?;
    Ok(own)
}

/// Starts containers as far as they go without a program.
fn containers(place: &Path, backend: Backend) -> Vec<Rung> {
    let linux = match Linux::open(&place.join("state")) {
        Ok(linux) => linux,
        Err(error) => return vec![Rung::new("sandbox", State::Blocked, chain(&error))],
    };
    let start = |network: Network, resources: Option<Resources>| -> Result<(), String> {
        // A mount goes with the container that it was the root of.
        let own = tempdir_in(place)?;
        let root = mounted(&own, backend).map_err(|reason| format!("no snapshot opens: {reason}"))?;
        let spec = ProcessSpec {
            args: vec!["/kiln-doctor-has-no-program".to_owned()],
            network,
            resources,
            ..ProcessSpec::default()
        };
        let cancel = Cancel::new().map_err(|error| chain(&error))?;
        let mut silent = |_, _: &[u8]| {};
        match linux.run(root.into(), &spec, Stdio::Captured(&mut silent), &cancel) {
            // All was there but the program.
            Ok(_) | Err(ExecError::NotFound { .. }) => Ok(()),
            Err(error) => Err(chain(&error)),
        }
    };
    let mut rungs = Vec::new();
    match start(Network::None, None) {
        Ok(()) => rungs.push(Rung::ok("sandbox", "a container starts")),
        Err(reason) => {
            let rung = Rung::new("sandbox", State::Blocked, reason);
            rungs.push(rung.help("run kiln outside of the container or sandbox around it"));
            return rungs;
        }
    }
    if kiln_executor::ids() == Ids::Host {
        rungs.push(match start(Network::Default, None) {
            Ok(()) => Rung::ok("network", "bridge and address translation"),
            Err(reason) => Rung::new("network", State::Limited, reason).help("kiln build --network host"),
        });
    }
    let limits = Resources { pids: Some(100), memory_bytes: Some(64 << 20), ..Resources::default() };
    rungs.push(match start(Network::None, Some(limits)) {
        Ok(()) => Rung::ok("limits", "control groups take memory and number of processes"),
        Err(reason) => Rung::new("limits", State::Limited, reason)
            .help("systemd-run --user --scope --property=Delegate=yes kiln …"),
    });
    rungs
}
