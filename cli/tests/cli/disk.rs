//! A file system in a file.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use rustix::fs::{statvfs, syncfs};
use rustix::mount::{UnmountFlags, unmount};

use crate::harness::{Store, text};

/// Mounted; gone with this value.
pub(crate) struct Disk {
    /// Holds the file that the file system is in.
    _store: Store,
    place: PathBuf,
}

impl Disk {
    /// One of 512 MiB that the program `make` makes; `Err`: why there is none.
    pub(crate) fn new(make: &str, flags: &[&str]) -> Result<Self, String> {
        let store = Store::empty();
        let (image, place) = (store.beside("image"), store.beside("disk"));
        fs::create_dir(&place).expect("ours to write");
        let file = fs::File::create(&image).expect("ours to write");
        file.set_len(512 << 20).expect("a sparse file takes no room");
        let run = |program: &str, args: &[&str]| {
            let output =
                Command::new(program).args(args).output().map_err(|error| format!("{program}: {error}"))?;
            let said = String::from_utf8_lossy(&output.stderr);
            if output.status.success() { Ok(()) } else { Err(format!("{program}: {said}")) }
        };
        run(make, &[flags, &[text(&image)][..]].concat())?;
        run("mount", &["-o", "loop", text(&image), text(&place)])?;
        Ok(Self { _store: store, place })
    }

    /// A place on it.
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.place.join(name)
    }

    /// Runs kiln on a store on it, and expects 0.
    #[track_caller]
    pub(crate) fn kiln(&self, args: &[&str]) {
        let mut kiln = Command::new(env!("CARGO_BIN_EXE_kiln"));
        let output = kiln.args(args).env("KILN_ROOT", self.at("store")).output().expect("kiln starts");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// How many MiB `work` takes on the disk.
    pub(crate) fn taken(&self, work: impl FnOnce()) -> u64 {
        let used = || {
            syncfs(fs::File::open(&self.place).expect("it is mounted")).expect("the disk works");
            let stat = statvfs(&self.place).expect("it is mounted");
            (stat.f_blocks - stat.f_bfree) * stat.f_frsize
        };
        let before = used();
        work();
        used().saturating_sub(before) >> 20
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = unmount(&self.place, UnmountFlags::DETACH);
    }
}
