//! Which backend keeps the snapshots.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rustix::fs::statfs;

use crate::places::form_of;
use crate::{Copying, Error, LayerForm, Overlay, Snapshotter};

/// A backend, as users name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// The first of the others that works here and goes with the snapshots there are.
    #[default]
    Auto,
    /// overlayfs of the kernel.
    Overlay,
    /// The program fuse-overlayfs; its snapshots are overlayfs's too.
    FuseOverlayfs,
    /// A complete tree for each snapshot.
    Copy,
}

const NAMES: [(&str, Backend); 4] = [
    ("auto", Backend::Auto),
    ("overlay", Backend::Overlay),
    ("fuse-overlayfs", Backend::FuseOverlayfs),
    ("copy", Backend::Copy),
];

impl FromStr for Backend {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = NAMES.iter().find(|(known, _)| *known == name);
        let names = NAMES.map(|(name, _)| name).join(", ");
        found.map(|(_, backend)| *backend).ok_or_else(|| format!("{name:?} is none of {names}"))
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(_, backend)| backend == self).map_or("auto", |(name, _)| name);
        f.write_str(name)
    }
}

/// Opens the snapshots below `root`, which is made if it is not there; its parent must be.
///
/// What [`Backend::Auto`] chooses costs two calls: overlayfs is not tried, but known not to work on top
/// of some file systems.
///
/// # Errors
/// [`Error::OtherForm`] when the backend does not keep snapshots as those that are there;
/// [`Error::Fuse`] without the program.
pub fn open(root: &Path, backend: Backend) -> Result<Arc<dyn Snapshotter>, Error> {
    Ok(match backend {
        Backend::Overlay => Arc::new(Overlay::open(root)?),
        Backend::Copy => Arc::new(Copying::open(root)?),
        Backend::FuseOverlayfs => match fuse_overlayfs() {
            Some(program) => Arc::new(Overlay::open_fuse(root, &program)?),
            None => {
                return Err(Error::Fuse { reason: "it is not installed, or there is no /dev/fuse".into() });
            }
        },
        Backend::Auto => match (form_of(root)?, can_mount(root), fuse_overlayfs()) {
            (Some(LayerForm::Tree), ..) => Arc::new(Copying::open(root)?),
            (_, true, _) => Arc::new(Overlay::open(root)?),
            (_, false, Some(program)) => Arc::new(Overlay::open_fuse(root, &program)?),
            // Mounting them will fail, and say why.
            (Some(LayerForm::Changes), false, None) => Arc::new(Overlay::open(root)?),
            (None, false, None) => Arc::new(Copying::open(root)?),
        },
    })
}

/// File systems that overlayfs takes no upperdir from: overlayfs itself, NFS, SMB, FUSE, 9P, FAT.
const UNFIT: [u64; 8] =
    [0x794c_7630, 0x6969, 0xff53_4d42, 0xfe53_4d42, 0x6573_5546, 0x0102_1997, 0x4d44, 0x2011_bab0];

fn can_mount(root: &Path) -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let may = !kiln_layer::uses_user_attributes() || is_users(&release);
    may && can_hold_upperdirs(root)
}

/// Whether this kernel lets users mount overlayfs: since Linux 5.11.
fn is_users(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (5, 11)
}

fn can_hold_upperdirs(root: &Path) -> bool {
    let there = root.ancestors().find_map(|path| statfs(path).ok());
    there.is_none_or(|found| !UNFIT.contains(&(found.f_type.cast_unsigned() & 0xffff_ffff)))
}

fn fuse_overlayfs() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let program = std::env::split_paths(&path).map(|dir| dir.join("fuse-overlayfs")).find(|p| p.is_file())?;
    Path::new("/dev/fuse").exists().then_some(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_are_named_as_they_are_shown() {
        for (name, backend) in NAMES {
            assert_eq!((name.parse(), backend.to_string()), (Ok(backend), name.to_owned()));
        }
        assert!("btrfs".parse::<Backend>().unwrap_err().contains("auto, overlay"));
    }

    #[test]
    fn a_store_stays_with_the_form_that_it_has() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("trees");
        assert_eq!(open(&root, Backend::Copy).unwrap().form(), LayerForm::Tree);
        assert_eq!(open(&root, Backend::Auto).unwrap().form(), LayerForm::Tree);
        assert!(matches!(open(&root, Backend::Overlay), Err(Error::OtherForm { .. })));
        let root = temp.path().join("changes");
        assert_eq!(open(&root, Backend::Overlay).unwrap().form(), LayerForm::Changes);
        assert!(matches!(open(&root, Backend::Copy), Err(Error::OtherForm { .. })));
        std::fs::write(root.join("form"), "2 blobs\n").unwrap();
        assert!(matches!(open(&root, Backend::Auto), Err(Error::Damaged { .. })));
        // Made before there was that file.
        std::fs::remove_file(root.join("form")).unwrap();
        assert!(matches!(open(&root, Backend::Copy), Err(Error::OtherForm { .. })));
    }

    #[test]
    fn users_mount_overlayfs_on_newer_kernels_only() {
        for (release, may) in
            [("5.10.0-28-amd64", false), ("4.19.1", false), ("5.11.0", true), ("6.1.0-rc1", true)]
        {
            assert_eq!(is_users(release), may, "{release}");
        }
    }

    #[test]
    fn proc_holds_no_upperdirs_by_nature_but_disks_do() {
        let temp = tempfile::tempdir().unwrap();
        assert!(can_hold_upperdirs(&temp.path().join("not/there/yet")));
    }
}
