//! Writes down what a program does to a directory.
//!
//! Looks at the directory itself when a call has returned: what a file holds then is what was
//! written. Programs that the watched one starts are not seen; what they made is taken in when it is
//! moved to where it is looked at.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use libc::c_long;
use nix::unistd::Pid;

use crate::disk::Disk;
use crate::faults::{SystemCall, Watch, file_of};

/// A watcher of one directory.
pub struct Recorder {
    root: PathBuf,
    /// Paths, relative to the root, that are not looked at.
    skips: fn(&Path) -> bool,
    disk: Disk,
    pending: HashMap<Pid, Act>,
    trouble: Option<String>,
}

/// A call under way, with paths as they were when it began.
enum Act {
    Open,
    Data(u64),
    Attributes(PathBuf),
    Rename { from: PathBuf, to: PathBuf },
    Link { from: PathBuf, to: PathBuf },
    Make(PathBuf),
    Remove(PathBuf),
    Sync(PathBuf, u64),
    SyncAll(PathBuf),
}

impl Recorder {
    /// Starts with the directory at `root` as it is, all of it synced. What `skips` says of a path
    /// relative to it must be what it says of all paths below.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn new(root: &Path, skips: fn(&Path) -> bool) -> io::Result<Self> {
        let root = fs::canonicalize(root)?;
        let disk = Disk::of(&root)?;
        Ok(Self { root, skips, disk, pending: HashMap::new(), trouble: None })
    }

    /// What was written down.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// What was written down, and what went wrong with that, if anything.
    ///
    /// # Errors
    /// The first thing that could not be looked at.
    pub fn finish(self) -> Result<Disk, String> {
        self.trouble.map_or(Ok(self.disk), Err)
    }

    /// Relative to the root; `None`: it is none of our business.
    fn relative<'p>(&self, path: &'p Path) -> Option<&'p Path> {
        path.strip_prefix(&self.root).ok().filter(|path| !(self.skips)(path))
    }

    fn act(&self, thread: Pid, call: &SystemCall) -> Option<Act> {
        let [a, b, c, d, ..] = call.args;
        let at = |dir: u64, path: u64| resolve(thread, Some(dir), path);
        let here = |path: u64| resolve(thread, None, path);
        let file = |fd: u64| file_of(thread, fd);
        Some(match call.number {
            libc::SYS_open if b & CREATING != 0 => Act::Open,
            libc::SYS_openat if c & CREATING != 0 => Act::Open,
            libc::SYS_openat2 if word(thread, c)? & CREATING != 0 => Act::Open,
            libc::SYS_write
            | libc::SYS_pwrite64
            | libc::SYS_writev
            | libc::SYS_pwritev2
            | libc::SYS_ftruncate
            | libc::SYS_fallocate
            | libc::SYS_sendfile => Act::Data(a),
            libc::SYS_copy_file_range => Act::Data(c),
            libc::SYS_ioctl if b == FICLONE => Act::Data(a),
            libc::SYS_fchmod | libc::SYS_fchown => Act::Attributes(file(a)?),
            libc::SYS_chmod => Act::Attributes(here(a)?),
            libc::SYS_fchmodat | libc::SYS_fchownat => Act::Attributes(at(a, b)?),
            libc::SYS_rename => Act::Rename { from: here(a)?, to: here(b)? },
            libc::SYS_renameat | libc::SYS_renameat2 => Act::Rename { from: at(a, b)?, to: at(c, d)? },
            libc::SYS_link => Act::Link { from: here(a)?, to: here(b)? },
            libc::SYS_linkat => Act::Link { from: at(a, b)?, to: at(c, d)? },
            libc::SYS_symlink => Act::Make(here(b)?),
            libc::SYS_symlinkat => Act::Make(at(b, c)?),
            libc::SYS_mkdir => Act::Make(here(a)?),
            libc::SYS_mkdirat | libc::SYS_mknodat => Act::Make(at(a, b)?),
            libc::SYS_unlink | libc::SYS_rmdir => Act::Remove(here(a)?),
            libc::SYS_unlinkat => Act::Remove(at(a, b)?),
            libc::SYS_fsync | libc::SYS_fdatasync => Act::Sync(file(a)?, a),
            libc::SYS_syncfs => Act::SyncAll(file(a)?),
            _ => return None,
        })
    }

    fn happened(&mut self, thread: Pid, act: Act, result: i64) -> io::Result<()> {
        match act {
            Act::Open => {
                let fd = result.cast_unsigned();
                let Some(path) = file_of(thread, fd) else { return Ok(()) };
                let Some(relative) = self.relative(&path) else { return Ok(()) };
                if !self.disk.contains(relative) && path.exists() {
                    self.disk.adopt(relative, &path)?;
                }
                self.data(thread, fd)
            }
            Act::Data(fd) => self.data(thread, fd),
            Act::Attributes(path) => match self.relative(&path) {
                Some(relative) => self.disk.observe_attributes(relative, &path),
                None => Ok(()),
            },
            Act::Rename { from, to } => {
                let (known, target) = (self.relative(&from), self.relative(&to));
                match (known, target) {
                    (Some(known), Some(target)) if self.disk.rename(known, target) => Ok(()),
                    (_, Some(target)) => self.disk.adopt(target, &to).map(drop),
                    (Some(known), None) => {
                        self.disk.remove(known);
                        Ok(())
                    }
                    (None, None) => Ok(()),
                }
            }
            Act::Link { from, to } => match (self.relative(&from), self.relative(&to)) {
                (Some(known), Some(target)) if self.disk.link(known, target) => Ok(()),
                (_, Some(target)) => self.disk.adopt(target, &to).map(drop),
                (_, None) => Ok(()),
            },
            Act::Make(path) => match self.relative(&path) {
                Some(relative) => self.disk.adopt(relative, &path).map(drop),
                None => Ok(()),
            },
            Act::Remove(path) => {
                if let Some(relative) = self.relative(&path) {
                    self.disk.remove(relative);
                }
                Ok(())
            }
            Act::Sync(path, fd) => {
                match self.relative(&path) {
                    Some(relative) if relative.as_os_str().is_empty() || self.disk.contains(relative) => {
                        let relative = relative.to_owned();
                        self.disk.sync(&relative);
                    }
                    _ => {
                        let file = fs::metadata(fd_path(thread, fd))?;
                        self.disk.sync_nameless(&file);
                    }
                }
                Ok(())
            }
            Act::SyncAll(path) => {
                if path.starts_with(&self.root) {
                    self.disk.sync_all();
                }
                Ok(())
            }
        }
    }

    fn data(&mut self, thread: Pid, fd: u64) -> io::Result<()> {
        let open = fd_path(thread, fd);
        let Ok(path) = fs::read_link(&open) else { return Ok(()) };
        if let Some(relative) = self.relative(&path)
            && self.disk.contains(relative)
        {
            let content = fs::read(&open)?;
            let relative = relative.to_owned();
            self.disk.observe(&relative, content);
        }
        Ok(())
    }
}

const CREATING: u64 = (libc::O_CREAT | libc::O_TRUNC) as u64;
const FICLONE: u64 = 0x4004_9409;

impl Watch for Recorder {
    fn wants(&self, number: c_long) -> bool {
        WATCHED.contains(&number)
    }

    fn enters(&mut self, thread: Pid, call: &SystemCall) {
        self.pending.remove(&thread);
        if let Some(act) = self.act(thread, call) {
            self.pending.insert(thread, act);
        }
    }

    fn leaves(&mut self, thread: Pid, call: &SystemCall, result: i64) {
        let Some(act) = self.pending.remove(&thread) else { return };
        if result < 0 {
            return;
        }
        if let Err(error) = self.happened(thread, act, result) {
            let call = call.number;
            self.trouble.get_or_insert_with(|| format!("system call {call}: {error}"));
        }
    }
}

const WATCHED: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_write,
    libc::SYS_pwrite64,
    libc::SYS_writev,
    libc::SYS_pwritev2,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_sendfile,
    libc::SYS_copy_file_range,
    libc::SYS_ioctl,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_chmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_symlink,
    libc::SYS_symlinkat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_unlink,
    libc::SYS_rmdir,
    libc::SYS_unlinkat,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
];

fn fd_path(thread: Pid, fd: u64) -> PathBuf {
    format!("/proc/{thread}/fd/{}", fd as u32).into()
}

/// A path in the program's memory, absolute and without dots. A link is followed on the way to the last
/// name, not there: temporary directories may be reached by one.
fn resolve(thread: Pid, dir: Option<u64>, path: u64) -> Option<PathBuf> {
    let path = text(thread, path)?;
    let at_cwd = |dir: u64| dir as u32 as i32 == libc::AT_FDCWD;
    let base = match dir {
        Some(dir) if !at_cwd(dir) => fd_path(thread, dir),
        _ => format!("/proc/{thread}/cwd").into(),
    };
    let whole = if path.is_absolute() { path } else { fs::read_link(base).ok()?.join(path) };
    let mut clean = PathBuf::new();
    for component in whole.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => drop(clean.pop()),
            other => clean.push(other),
        }
    }
    let parent = clean.parent().and_then(|parent| fs::canonicalize(parent).ok());
    match (parent, clean.file_name()) {
        (Some(parent), Some(name)) => Some(parent.join(name)),
        _ => Some(clean),
    }
}

fn memory(thread: Pid) -> Option<File> {
    File::open(format!("/proc/{thread}/mem")).ok()
}

fn text(thread: Pid, at: u64) -> Option<PathBuf> {
    let memory = memory(thread)?;
    let mut bytes = Vec::new();
    while bytes.len() < libc::PATH_MAX as usize {
        // Never across the end of a page: the next one may not be there.
        let start = at + bytes.len() as u64;
        let mut part = vec![0; (64 - start % 64) as usize];
        memory.read_exact_at(&mut part, start).ok()?;
        if let Some(end) = part.iter().position(|byte| *byte == 0) {
            bytes.extend_from_slice(&part[..end]);
            let name: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(&bytes);
            return Some(name.into());
        }
        bytes.extend_from_slice(&part);
    }
    None
}

fn word(thread: Pid, at: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    memory(thread)?.read_exact_at(&mut bytes, at).ok()?;
    Some(u64::from_ne_bytes(bytes))
}
