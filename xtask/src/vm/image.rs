//! The machine's disk: Debian with systemd and a kernel of its own, made once and kept beside the bases.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bases::{self, Bases};
use crate::packages;
use crate::step::{self, Failure};

/// To be raised whenever what is made here changes: machines of older numbers are made anew.
const VERSION: u32 = 1;

/// What the machine has beside a minimal Debian.
const PACKAGES: &[&str] = &[
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "zstd",
    "systemd-sysv",
    "udev",
    "dbus",
    "dbus-user-session",
    "libpam-systemd",
    "kmod",
    "procps",
    "iproute2",
    "iptables",
    "nftables",
    "uidmap",
    "slirp4netns",
    "passt",
    "fuse-overlayfs",
    "crun",
    "runc",
    "busybox-static",
    "e2fsprogs",
    "btrfs-progs",
    "libarchive-tools",
    "tmux",
    "xz-utils",
    "bzip2",
];

/// Room on the machine's disk. The file is sparse.
const DISK: &str = "10G";

/// The service that does what the payload asks for, as the last thing of the boot.
const SERVICE: &str = "[Unit]\n\
    Description=What this machine was started for\n\
    After=basic.target systemd-user-sessions.service user@1000.service\n\
    Wants=user@1000.service\n\
    \n\
    [Service]\n\
    Type=oneshot\n\
    Environment=HOME=/root USER=root\n\
    ExecStart=/bin/sh /payload/job\n\
    ExecStopPost=/bin/sh -c 'sync; poweroff -ff'\n\
    TimeoutStartSec=infinity\n";

/// A machine that can be started.
pub(super) struct Image {
    /// A raw ext4 disk, never written to.
    pub(super) disk: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
}

/// Makes the machine if it is not there. Takes two to four minutes the first time.
///
/// # Errors
/// Whatever tar, apt or mke2fs report; what they left is removed by the next call.
pub(super) fn ensure(bases: &Bases) -> Result<Image, Failure> {
    let dir = bases::ensure_dir(bases, &format!("machine-{VERSION}"), |dir| make(dir, bases))?;
    Ok(Image { disk: dir.join("disk.raw"), kernel: dir.join("vmlinuz"), initrd: dir.join("initrd.img") })
}

fn make(dir: &Path, bases: &Bases) -> Result<(), Failure> {
    if !packages::is_root() {
        return Err(Failure::Packages { missing: vec!["machine"], reason: "only root can make the machine" });
    }
    let tree = dir.join("tree");
    fs::create_dir(&tree).map_err(Failure::io("create", &tree))?;
    step::read(Command::new("tar").arg("-C").arg(&tree).args(["--numeric-owner", "-xf"]).arg(&bases.debian))?;
    install(&tree)?;
    configure(&tree)?;
    for (name, file) in [("vmlinuz", "vmlinuz"), ("initrd.img", "initrd.img")] {
        let (from, to) = (tree.join(file), dir.join(name));
        fs::copy(&from, &to).map_err(Failure::io("copy", &from))?;
    }
    file_system(&tree, &dir.join("disk.raw"), DISK)?;
    fs::remove_dir_all(&tree).map_err(Failure::io("remove", &tree))
}

/// An ext4 file system with what is in `tree`; nothing is mounted for it.
pub(super) fn file_system(tree: &Path, disk: &Path, size: &str) -> Result<(), Failure> {
    let mke2fs = packages::find_program("mke2fs").unwrap_or("mke2fs".into());
    let mut command = Command::new(mke2fs);
    command.args(["-q", "-F", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=1,nodiscard", "-d"]);
    step::read(command.arg(tree).arg(disk).arg(size)).map(drop)
}

// In namespaces of its own: what a package's script starts or mounts goes with them.
fn install(tree: &Path) -> Result<(), Failure> {
    // Names are resolved as this machine does it, as long as packages are fetched.
    let resolver = tree.join("etc/resolv.conf");
    fs::copy("/etc/resolv.conf", &resolver).map_err(Failure::io("write", &resolver))?;
    let hosts = tree.join("etc/hosts");
    fs::copy("/etc/hosts", &hosts).map_err(Failure::io("write", &hosts))?;
    let no_services = tree.join("usr/sbin/policy-rc.d");
    write(&no_services, "#!/bin/sh\nexit 101\n")?;
    fs::set_permissions(&no_services, fs::Permissions::from_mode(0o755))
        .map_err(Failure::io("chmod", &no_services))?;
    let script = format!(
        "export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8\n\
         apt-get -q update && apt-get -q install -y --no-install-recommends {} && apt-get clean && \
         rm -rf /var/lib/apt/lists/*",
        PACKAGES.join(" ")
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c"]);
    command.arg("mount -t proc proc \"$1/proc\" && exec chroot \"$1\" sh -c \"$2\"").arg("sh");
    step::note("installing systemd, a kernel and what the tests need into it, for some minutes");
    step::read(command.arg(tree).arg(script))?;
    fs::remove_file(&no_services).map_err(Failure::io("remove", &no_services))
}

fn configure(tree: &Path) -> Result<(), Failure> {
    let payload = tree.join("payload");
    fs::create_dir(&payload).map_err(Failure::io("create", &payload))?;
    let text = [
        ("etc/hostname", "kiln-machine\n"),
        ("etc/hosts", "127.0.0.1 localhost kiln-machine\n::1 localhost\n"),
        ("etc/resolv.conf", ""),
        ("etc/fstab", "/dev/vda / ext4 defaults 0 0\n/dev/vdb /payload ext4 defaults 0 0\n"),
        ("etc/systemd/system/job.service", SERVICE),
    ];
    for (path, text) in text {
        write(&tree.join(path), text)?;
    }
    let user = "useradd --uid 1000 --create-home --shell /bin/bash alice && mkdir -p /var/lib/systemd/linger && \
                touch /var/lib/systemd/linger/alice && passwd -q -d root";
    step::read(Command::new("chroot").arg(tree).args(["sh", "-c", user]))?;
    let units = tree.join("etc/systemd/system");
    let masked = ["apt-daily.timer", "apt-daily-upgrade.timer", "fstrim.timer", "e2scrub_all.timer"];
    for unit in masked.into_iter().chain(["getty@tty1.service", "serial-getty@ttyS0.service"]) {
        let link = units.join(unit);
        symlink("/dev/null", &link).map_err(Failure::io("link", &link))?;
    }
    let wants = units.join("multi-user.target.wants");
    fs::create_dir_all(&wants).map_err(Failure::io("create", &wants))?;
    let link = wants.join("job.service");
    symlink("../job.service", &link).map_err(Failure::io("link", &link))
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    // A link of the distribution's, as /etc/resolv.conf may be, is not followed out of the tree.
    let _ = fs::remove_file(path);
    fs::write(path, text).map_err(Failure::io("write", path))
}
