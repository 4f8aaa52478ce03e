//! Base trees: made once from the distribution's own packages, kept outside the repository.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::mirror::Mirror;
use crate::packages;
use crate::step::{self, Failure};

/// Prefix of what is still being made; anything with it is garbage unless the lock is held.
const UNFINISHED: &str = ".unfinished-";

/// The two base trees, as tar files.
pub(crate) struct Bases {
    /// Where both are.
    pub(crate) dir: PathBuf,
    /// `debootstrap --variant=minbase bookworm`.
    pub(crate) debian: PathBuf,
    /// busybox-static with its applets as links.
    pub(crate) busybox: PathBuf,
}

/// The task `bases`: makes them and says where they are.
pub(crate) fn run() -> Result<(), Failure> {
    step::heading("Packages", "what the base trees are made with");
    packages::ensure(&[packages::DEMO])?;
    let bases = ensure()?;
    println!("\nexport KILN_TEST_BASES={}", bases.dir.display());
    Ok(())
}

/// Makes the trees that are missing. Takes a minute or two the first time, nothing after that.
///
/// # Errors
/// Whatever debootstrap or tar report; what they left is removed by the next call.
pub(crate) fn ensure() -> Result<Bases, Failure> {
    step::heading("Base trees", "made from the distribution's packages; no registry is asked");
    let dir = match std::env::var_os("KILN_BASES") {
        Some(dir) => PathBuf::from(dir),
        None => step::cache_home().join("kiln-bases"),
    };
    fs::create_dir_all(&dir).map_err(Failure::io("create", &dir))?;
    let dir = fs::canonicalize(&dir).map_err(Failure::io("resolve", &dir))?;
    let _lock = lock(&dir)?;
    let debian = ensure_one(&dir, "debian-bookworm", debian_tree)?;
    let busybox = ensure_one(&dir, "busybox", busybox_tree)?;
    Ok(Bases { dir, debian, busybox })
}

/// Has `make` fill the directory `name` beside the base trees, unless it is there, and returns its path.
/// Others whose names differ in the number at the end only are removed.
///
/// # Errors
/// Whatever `make` reports; what it left is removed by the next call.
pub(crate) fn ensure_dir(
    bases: &Bases,
    name: &str,
    make: impl FnOnce(&Path) -> Result<(), Failure>,
) -> Result<PathBuf, Failure> {
    let done = bases.dir.join(name);
    let _lock = lock(&bases.dir)?;
    if done.exists() {
        step::note(&format!("{} is there", done.display()));
        return Ok(done);
    }
    step::note(&format!("making {}", done.display()));
    let kind = name.trim_end_matches(|c: char| c.is_ascii_digit());
    for entry in fs::read_dir(&bases.dir).map_err(Failure::io("list", &bases.dir))? {
        let path = entry.map_err(Failure::io("list", &bases.dir))?.path();
        if path.file_name().is_some_and(|other| other.to_string_lossy().starts_with(kind)) {
            fs::remove_dir_all(&path).map_err(Failure::io("remove", &path))?;
        }
    }
    let unfinished = bases.dir.join(format!("{UNFINISHED}{name}"));
    fs::create_dir(&unfinished).map_err(Failure::io("create", &unfinished))?;
    make(&unfinished)?;
    fs::rename(&unfinished, &done).map_err(Failure::io("rename", &unfinished))?;
    Ok(done)
}

/// Keeps others from making anything there as long as the file is held, and removes what was left unfinished.
fn lock(dir: &Path) -> Result<File, Failure> {
    let path = dir.join("lock");
    let lock = File::create(&path).map_err(Failure::io("create", &path))?;
    lock.lock().map_err(Failure::io("lock", &path))?;
    sweep(dir)?;
    Ok(lock)
}

fn ensure_one(dir: &Path, name: &str, make: fn(&Path) -> Result<(), Failure>) -> Result<PathBuf, Failure> {
    let done = dir.join(format!("{name}.tar"));
    if done.exists() {
        step::note(&format!("{} is there", done.display()));
        return Ok(done);
    }
    step::note(&format!("making {}", done.display()));
    let tree = dir.join(format!("{UNFINISHED}{name}"));
    let tar = dir.join(format!("{UNFINISHED}{name}.tar"));
    fs::create_dir(&tree).map_err(Failure::io("create", &tree))?;
    make(&tree)?;
    let mut pack = Command::new("tar");
    pack.args(["--numeric-owner", "--xattrs", "--sort=name", "-C"]).arg(&tree).arg("-cf").arg(&tar).arg(".");
    step::read(&mut pack)?;
    fs::rename(&tar, &done).map_err(Failure::io("rename", &tar))?;
    sweep(dir)?;
    Ok(done)
}

fn debian_tree(tree: &Path) -> Result<(), Failure> {
    if !packages::is_root() {
        return Err(Failure::Packages {
            missing: vec!["debian-bookworm"],
            reason: "only root can run debootstrap",
        });
    }
    let mirror = Mirror::of_this_machine();
    let mut debootstrap = Command::new(packages::find_program("debootstrap").unwrap_or("debootstrap".into()));
    debootstrap.args(["--variant=minbase", "bookworm"]).arg(tree).arg(&mirror.uri);
    step::note(&format!("$ {}", step::typed(&debootstrap)));
    step::read(&mut debootstrap)?;

    empty(&tree.join("var/lib/apt/lists"))?;
    empty(&tree.join("var/cache/apt"))?;
    empty(&tree.join("var/log"))?;
    // debootstrap copies these from this machine; they are nobody else's business.
    for path in ["etc/hostname", "etc/resolv.conf"] {
        let path = tree.join(path);
        fs::write(&path, "").map_err(Failure::io("write", &path))?;
    }
    mirror.configure(tree)
}

fn busybox_tree(tree: &Path) -> Result<(), Failure> {
    let busybox = packages::find_program("busybox").unwrap_or("/bin/busybox".into());
    for (dir, mode) in [("", 0o755), ("bin", 0o755), ("etc", 0o755), ("root", 0o700), ("tmp", 0o1777)] {
        let path = tree.join(dir);
        fs::create_dir_all(&path).map_err(Failure::io("create", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(Failure::io("chmod", &path))?;
    }
    let program = tree.join("bin/busybox");
    fs::copy(&busybox, &program).map_err(Failure::io("copy busybox to", &program))?;
    let applets = step::read(Command::new(&program).arg("--list"))?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        let link = tree.join("bin").join(applet);
        symlink("busybox", &link).map_err(Failure::io("link", &link))?;
    }
    for (path, text) in [("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"), ("etc/group", "root:x:0:\n")] {
        let path = tree.join(path);
        fs::write(&path, text).map_err(Failure::io("write", &path))?;
    }
    Ok(())
}

// Directories stay, files go: apt expects `archives/partial` and the like.
fn empty(dir: &Path) -> Result<(), Failure> {
    for entry in fs::read_dir(dir).map_err(Failure::io("list", dir))? {
        let path = entry.map_err(Failure::io("list", dir))?.path();
        if path.is_dir() && !path.is_symlink() {
            empty(&path)?;
        } else {
            fs::remove_file(&path).map_err(Failure::io("remove", &path))?;
        }
    }
    Ok(())
}

// Called with the lock held: whatever is unfinished then was left by an interrupted run.
fn sweep(dir: &Path) -> Result<(), Failure> {
    for entry in fs::read_dir(dir).map_err(Failure::io("list", dir))? {
        let path = entry.map_err(Failure::io("list", dir))?.path();
        if !is_unfinished(path.file_name()) {
            continue;
        }
        // debootstrap mounts /proc in its tree; nothing may be removed through that.
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for mounted in mounts_below(&mountinfo, &path) {
            step::read(Command::new("umount").arg("-l").arg(mounted))?;
        }
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(Failure::io("remove", &path))?;
    }
    Ok(())
}

fn is_unfinished(name: Option<&OsStr>) -> bool {
    name.is_some_and(|name| name.to_string_lossy().starts_with(UNFINISHED))
}

// Innermost first, which is the order to unmount in.
fn mounts_below(mountinfo: &str, dir: &Path) -> Vec<PathBuf> {
    let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut below: Vec<PathBuf> = points.filter(|point| point.starts_with(dir)).collect();
    below.reverse();
    below
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_an_interrupted_debootstrap_are_found_innermost_first() {
        let mountinfo = "20 1 8:1 / / rw - ext4 /dev/sda rw\n\
                         30 20 0:5 / /c/.unfinished-debian/proc rw - proc proc rw\n\
                         31 30 0:6 / /c/.unfinished-debian/proc/sys rw - proc proc rw\n\
                         32 20 0:7 / /c/.unfinished-debian2 rw - tmpfs tmpfs rw\n";
        let found = mounts_below(mountinfo, Path::new("/c/.unfinished-debian"));
        assert_eq!(
            found,
            [Path::new("/c/.unfinished-debian/proc/sys"), Path::new("/c/.unfinished-debian/proc")]
        );
    }

    #[test]
    fn sweeping_removes_what_is_unfinished_and_nothing_else() {
        let dir = std::env::temp_dir().join(format!("xtask-sweep-{}", std::process::id()));
        fs::create_dir_all(dir.join(".unfinished-debian/usr/bin")).expect("temp dir is writable");
        fs::write(dir.join(".unfinished-debian.tar"), "half").expect("temp dir is writable");
        fs::write(dir.join("busybox.tar"), "whole").expect("temp dir is writable");
        sweep(&dir).expect("nothing is mounted there");
        let left: Vec<_> =
            fs::read_dir(&dir).expect("still there").flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, ["busybox.tar"]);
        fs::remove_dir_all(&dir).expect("ours");
    }
}
