//! The end of containers: layer, volumes of their own, directory.

use kiln_snapshotter::Snapshotter;

use crate::config::MountKind;
use crate::monitor::Tools;
use crate::{Config, Container, Containers, Error, Volumes};

/// Removes a container that does not run: its layer first, so that one that was removed half-way can
/// be removed again. With `volumes`, those that were made for it go as well.
///
/// # Errors
/// [`Error::WrongState`] when it runs.
pub fn remove(
    containers: &Containers,
    snapshots: &dyn Snapshotter,
    container: &Container,
    volumes: bool,
) -> Result<(), Error> {
    let _lock = container.lock()?;
    let Some(_monitor) = container.try_monitor()? else {
        let name =
            container.config().map_or_else(|_| container.id().short().to_owned(), |config| config.name);
        return Err(Error::WrongState { name, problem: "is running: stop it first, or use --force" });
    };
    let config = container.config().ok();
    take_apart(containers, snapshots, container, config.as_ref().filter(|_| volumes))
}

fn take_apart(
    containers: &Containers,
    snapshots: &dyn Snapshotter,
    container: &Container,
    config: Option<&Config>,
) -> Result<(), Error> {
    match snapshots.remove_active(&container.id().key()) {
        Ok(()) | Err(kiln_snapshotter::Error::NoActive(_)) => {}
        Err(error) => return Err(error.into()),
    }
    containers.remove(container)?;
    let all = Volumes::open(containers.root());
    for mount in config.iter().flat_map(|config| &config.mounts) {
        if let MountKind::Volume { name, anonymous: true, .. } = &mount.kind {
            match all.remove(name, containers) {
                Ok(()) | Err(Error::NoVolume { .. } | Error::VolumeInUse { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Removes the containers that should have gone with their end, but whose monitor was killed.
pub fn sweep(containers: &Containers, snapshots: &dyn Snapshotter) {
    for container in containers.left_behind() {
        // A monitor that is about to do it has the lock.
        let _ = remove(containers, snapshots, &container, true);
    }
}

/// The end of a container that goes with its process, by its monitor, which has the lock.
pub(crate) fn remove_ended(tools: &Tools, container: &Container, config: &Config) {
    // What stays is listed, and can be removed by hand.
    let _ = take_apart(&tools.containers, &*tools.snapshots, container, Some(config));
}
