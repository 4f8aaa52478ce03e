//! Paths inside a root that somebody hostile may have made: resolved once, to descriptors.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps, fstat, mkdirat, openat, openat2,
    readlinkat, statat, unlinkat, utimensat,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Opens `path` as the container would see it; links lead nowhere but inside.
pub(super) fn open_inside(root: BorrowedFd<'_>, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    loop {
        // EAGAIN: a rename raced with the walk; the kernel asks to try again.
        match openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
}

/// Links followed before giving up, as many as the kernel follows (path_resolution(7)).
const MAX_LINKS: u32 = 40;

/// Opens the directory at `path`, making what is missing with mode 0755, root's. A link to nothing
/// gets what it points to made, inside.
pub(super) fn make_dirs(root: BorrowedFd<'_>, path: &str, created: &mut Created) -> Result<OwnedFd, Errno> {
    make_dirs_at(root, path, created, MAX_LINKS)
}

fn make_dirs_at(
    root: BorrowedFd<'_>,
    path: &str,
    created: &mut Created,
    links: u32,
) -> Result<OwnedFd, Errno> {
    let mut so_far = String::from("/");
    for component in path.split('/').filter(|component| !component.is_empty()) {
        if component == ".." {
            return Err(Errno::INVAL);
        }
        let parent = open_inside(root, &so_far, OFlags::PATH | OFlags::DIRECTORY)?;
        let above = so_far.clone();
        if so_far != "/" {
            so_far.push('/');
        }
        so_far.push_str(component);
        match open_inside(root, &so_far, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(_) => {}
            Err(Errno::NOENT) => match points_to(&parent, &above, component)? {
                Some(target) => {
                    make_dirs_at(root, &target, created, links.checked_sub(1).ok_or(Errno::LOOP)?)?;
                }
                None => {
                    let before = fstat(&parent)?;
                    mkdirat(&parent, component, Mode::from_raw_mode(0o755))?;
                    created.note(&so_far, &parent, component, &before)?;
                }
            },
            Err(errno) => return Err(errno),
        }
    }
    open_inside(root, &so_far, OFlags::PATH | OFlags::DIRECTORY)
}

/// Opens the file at `path` as a mount target, making an empty one when it is missing.
pub(super) fn make_file(root: BorrowedFd<'_>, path: &str, created: &mut Created) -> Result<OwnedFd, Errno> {
    make_file_at(root, path, created, MAX_LINKS)
}

fn make_file_at(
    root: BorrowedFd<'_>,
    path: &str,
    created: &mut Created,
    links: u32,
) -> Result<OwnedFd, Errno> {
    match open_inside(root, path, OFlags::PATH) {
        Err(Errno::NOENT) => {}
        other => return other,
    }
    let (above, name) = path.rsplit_once('/').ok_or(Errno::INVAL)?;
    let parent = make_dirs_at(root, above, created, links)?;
    // Minimal images leave `/etc/resolv.conf` as a link into `/run` that only systemd fills.
    if let Some(target) = points_to(&parent, above, name)? {
        return make_file_at(root, &target, created, links.checked_sub(1).ok_or(Errno::LOOP)?);
    }
    let before = fstat(&parent)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
    drop(openat(&parent, name, flags, Mode::from_raw_mode(0o644))?);
    created.note(path, &parent, name, &before)?;
    openat(&parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// The absolute path that the link `name` in the directory `above` points to, `..` taken out;
/// `None` when there is no link.
fn points_to(parent: &OwnedFd, above: &str, name: &str) -> Result<Option<String>, Errno> {
    let target = match readlinkat(parent, name, Vec::new()) {
        Ok(target) => target,
        Err(Errno::NOENT | Errno::INVAL) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    let target = target.to_str().map_err(|_| Errno::ILSEQ)?;
    let mut components: Vec<&str> = match target.starts_with('/') {
        true => Vec::new(),
        false => above.split('/').filter(|component| !component.is_empty()).collect(),
    };
    for component in target.split('/') {
        match component {
            "" | "." => {}
            ".." => drop(components.pop()),
            name => components.push(name),
        }
    }
    Ok(Some(format!("/{}", components.join("/"))))
}

/// Mount targets that had to be made in the container's own tree; they are taken out again, so
/// that they do not end up in a layer.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Created(Vec<Stub>);

#[derive(Serialize, Deserialize)]
struct Stub {
    path: String,
    device: u64,
    inode: u64,
    /// The parent's times before: seconds and nanoseconds of mtime.
    parent_mtime: (i64, i64),
}

impl Created {
    fn note(
        &mut self,
        path: &str,
        parent: &OwnedFd,
        name: &str,
        before: &rustix::fs::Stat,
    ) -> Result<(), Errno> {
        let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let parent_mtime = (before.st_mtime, before.st_mtime_nsec.cast_signed());
        self.0.push(Stub { path: path.to_owned(), device: stat.st_dev, inode: stat.st_ino, parent_mtime });
        Ok(())
    }

    /// Hands the list to the helper outside.
    pub(super) fn write(&self, to: OwnedFd) {
        if !self.0.is_empty()
            && let Ok(bytes) = serde_json::to_vec(self)
        {
            let _ = File::from(to).write_all(&bytes);
        }
    }

    /// The list process 1 wrote; none when it died before.
    pub(super) fn read(from: OwnedFd) -> Self {
        let mut bytes = Vec::new();
        let read = File::from(from).take(1 << 20).read_to_end(&mut bytes);
        read.ok().and_then(|_| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
    }

    /// Removes what is still the same and still empty. The caller knows that no process of the
    /// container lives.
    pub(super) fn remove(&self, root: BorrowedFd<'_>) {
        for stub in self.0.iter().rev() {
            let Some((parent, name)) = stub.path.rsplit_once('/') else { continue };
            let parent = if parent.is_empty() { "/" } else { parent };
            let Ok(parent) = open_inside(root, parent, OFlags::RDONLY | OFlags::DIRECTORY) else { continue };
            let Ok(stat) = statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let flags = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => AtFlags::REMOVEDIR,
                FileType::RegularFile if stat.st_size == 0 => AtFlags::empty(),
                _ => continue,
            };
            if (stat.st_dev, stat.st_ino) == (stub.device, stub.inode)
                && unlinkat(&parent, name, flags).is_ok()
            {
                let (tv_sec, tv_nsec) = stub.parent_mtime;
                let times = Timestamps {
                    last_access: Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
                    last_modification: Timespec { tv_sec, tv_nsec },
                };
                let _ = utimensat(&parent, ".", &times, AtFlags::empty());
            }
        }
    }
}

/// Reads a small regular file inside; `None` when there is none. Never blocks on a FIFO and never
/// reads more than `max_bytes`.
pub(super) fn read_small(root: impl AsFd, path: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, Errno> {
    let file = match open_inside(root.as_fd(), path, OFlags::RDONLY | OFlags::NONBLOCK) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        other => other?,
    };
    let stat = fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    let mut bytes = Vec::new();
    let read = File::from(file).take(max_bytes + 1).read_to_end(&mut bytes);
    read.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    if bytes.len() as u64 > max_bytes { Err(Errno::FBIG) } else { Ok(Some(bytes)) }
}
