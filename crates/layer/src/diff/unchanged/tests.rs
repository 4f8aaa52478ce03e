//! Needs root: overlayfs is mounted.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

use super::*;

fn open(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

fn overlay(lower: &Path, upper: &Path, work: &Path) -> OwnedFd {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for (name, dir) in [("lowerdir", lower), ("upperdir", upper), ("workdir", work)] {
        fsconfig_set_string(context.as_fd(), name, dir.to_str().unwrap()).unwrap();
    }
    fsconfig_create(context.as_fd()).unwrap();
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap()
}

#[test]
fn only_what_is_as_it_was_goes() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED ALOUD: needs root");
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let dir = |name: &str| -> PathBuf {
        fs::create_dir(temp.path().join(name)).unwrap();
        temp.path().join(name)
    };
    let (lower, upper, work) = (dir("lower"), dir("upper"), dir("work"));
    fs::create_dir_all(lower.join("d/e")).unwrap();
    for name in ["same", "mode", "owner", "time", "content", "d/e/deep", "attribute", "gone", "moved"] {
        fs::write(lower.join(name), "text").unwrap();
    }
    symlink("same", lower.join("link")).unwrap();
    fs::write(lower.join("two"), "text").unwrap();
    fs::hard_link(lower.join("two"), lower.join("names")).unwrap();

    let merged = overlay(&lower, &upper, &work);
    let at = |name: &str| {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", std::os::fd::AsRawFd::as_raw_fd(&merged)))
    };
    let all = ["same", "mode", "owner", "time", "content", "d/e/deep", "attribute", "link", "two", "moved"];
    for name in all {
        // Changes nothing, and yet overlayfs copies it up.
        lchown(at(name), Some(0), Some(0)).unwrap();
    }
    fs::set_permissions(at("mode"), fs::Permissions::from_mode(0o600)).unwrap();
    lchown(at("owner"), Some(1), None).unwrap();
    File::open(at("time")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    let before = fs::metadata(at("content")).unwrap().modified().unwrap();
    fs::write(at("content"), "TEXT").unwrap();
    // Nobody sees it but by reading.
    File::open(at("content")).unwrap().set_modified(before).unwrap();
    rustix::fs::setxattr(at("attribute"), "user.a", b"1", rustix::fs::XattrFlags::empty()).unwrap();
    fs::remove_file(at("gone")).unwrap();
    fs::rename(at("moved"), at("elsewhere")).unwrap();
    fs::create_dir(at("new")).unwrap();
    fs::write(at("new/file"), "text").unwrap();
    fs::write(at("d/new"), "text").unwrap();
    let expected =
        Command::new("ls").args(["-lR", "--full-time"]).current_dir(at("")).output().unwrap().stdout;
    drop(merged);

    let never = AtomicBool::new(false);
    let time = fs::metadata(upper.join("d/e")).unwrap().mtime_nsec();
    let copied = copied_up(open(&upper).as_fd(), &never).unwrap();
    let dropped = drop_unchanged(open(&upper).as_fd(), open(&lower).as_fd(), &copied, &never).unwrap();
    assert_eq!(dropped, 3, "same, link and d/e/deep of {copied:?}");
    assert!(!upper.join("same").exists() && upper.join("link").symlink_metadata().is_err());
    assert!(!upper.join("d/e/deep").exists() && upper.join("d/e").exists());
    assert_eq!(fs::metadata(upper.join("d/e")).unwrap().mtime_nsec(), time);

    let again = temp.path().join("again");
    fs::create_dir(&again).unwrap();
    let merged = overlay(&lower, &upper, &again);
    let path = format!("/proc/self/fd/{}/", std::os::fd::AsRawFd::as_raw_fd(&merged));
    let found = Command::new("ls").args(["-lR", "--full-time"]).current_dir(path).output().unwrap().stdout;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    assert_eq!(text(found), text(expected));
}
