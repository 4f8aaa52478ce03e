//! A machine that can be restarted, as far as programs can tell.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Gives the calling thread, and what it starts, mounts of its own and another boot id.
#[derive(Debug)]
pub struct Machine {
    boot: PathBuf,
    boots: u32,
}

impl Machine {
    /// Begins a first boot. `scratch` is a directory for a file or two. Needs root; what the thread
    /// mounts from then on goes with it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn start(scratch: &Path) -> io::Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        let boot = scratch.join("boot_id");
        let mut machine = Self { boot, boots: 0 };
        machine.restart()?;
        mount(Some(&machine.boot), "/proc/sys/kernel/random/boot_id", none, MsFlags::MS_BIND, none)?;
        Ok(machine)
    }

    /// Begins another boot. Programs of the old one must have ended.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn restart(&mut self) -> io::Result<()> {
        self.boots += 1;
        fs::write(&self.boot, format!("00000000-0000-4000-8000-{:012x}\n", self.boots))
    }

    /// Puts a file system in memory at `place`, which has to be there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn mount_memory(&self, place: &Path) -> io::Result<()> {
        Ok(mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), Some("size=2g"))?)
    }
}
