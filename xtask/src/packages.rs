//! Packages of the distribution: which program comes from which package, and what for.

use std::path::Path;
use std::process::Command;

use crate::step::{self, Failure};

/// How to see that a package's work is there, wherever it came from.
enum Probe {
    /// A program on PATH or in the system's sbin directories.
    Program(&'static str),
    /// A file.
    File(&'static str),
    /// Only dpkg knows (the name of the program says too little).
    Dpkg,
}

/// A package and the reason for it.
pub(crate) struct Package {
    name: &'static str,
    what_for: &'static str,
    probe: Probe,
}

macro_rules! packages {
    ($($name:literal, $probe:expr, $what_for:literal;)*) => {
        &[$(Package { name: $name, what_for: $what_for, probe: $probe }),*]
    };
}

/// What the demo needs.
pub(crate) const DEMO: &[Package] = packages![
    "gcc", Probe::Program("cc"), "links the binary";
    "libc6-dev", Probe::File("/usr/include/stdio.h"), "holds the C library that a static binary takes in";
    "debootstrap", Probe::Program("debootstrap"), "makes the Debian base tree";
    "debian-archive-keyring", Probe::File("/usr/share/keyrings/debian-archive-keyring.gpg"), "verifies the Debian base tree";
    "busybox-static", Probe::Dpkg, "is the busybox base tree";
    "ca-certificates", Probe::File("/etc/ssl/certs/ca-certificates.crt"), "verifies https servers";
];

/// What the tests and benches need besides.
pub(crate) const TEST: &[Package] = packages![
    "g++", Probe::Program("c++"), "compiles libFuzzer, which runs the fuzz targets";
    "podman", Probe::Program("podman"), "must load and run what kiln saves";
    "runc", Probe::Program("runc"), "runs podman's and buildah's containers";
    "crun", Probe::Program("crun"), "runs containers that kiln describes";
    "skopeo", Probe::Program("skopeo"), "must accept what kiln saves";
    "umoci", Probe::Program("umoci"), "must unpack the OCI form of what kiln saves";
    "buildah", Probe::Program("buildah"), "builds images that kiln must load";
    "docker-registry", Probe::Program("docker-registry"), "is the registry that kiln pushes to and pulls from";
    "openssl", Probe::Program("openssl"), "makes the certificates of that registry";
    "nftables", Probe::Program("nft"), "shows the rules that a RUN's network adds";
    "iptables", Probe::Program("iptables"), "sets the FORWARD policy that other engines set";
    "iproute2", Probe::Program("ip"), "makes the network that a RUN is tested in";
    "tmux", Probe::Program("tmux"), "is the terminal for `kiln run -it`";
    "libarchive-tools", Probe::Program("bsdtar"), "makes archives that kiln must unpack as GNU tar does";
    "btrfs-progs", Probe::Program("mkfs.btrfs"), "makes a file system whose files can share their blocks";
    "fuse-overlayfs", Probe::Program("fuse-overlayfs"), "mounts snapshots where overlayfs cannot";
    "uidmap", Probe::Program("newuidmap"), "gives a user the ids of a rootless build";
    "slirp4netns", Probe::Program("slirp4netns"), "is the network of a rootless RUN";
    "python3-pip", Probe::File("/usr/lib/python3/dist-packages/pip/__init__.py"), "installs a server that speaks S3";
    "xz-utils", Probe::Program("xz"), "compresses archives that kiln must unpack";
    "bzip2", Probe::Program("bzip2"), "compresses archives that kiln must unpack";
    "zstd", Probe::Program("zstd"), "compresses archives that kiln must unpack";
];

/// What the virtual machine needs.
pub(crate) const MACHINE: &[Package] = packages![
    "qemu-system-x86", Probe::Program("qemu-system-x86_64"), "is the machine";
    "e2fsprogs", Probe::Program("mke2fs"), "makes the machine's disks";
    "binutils", Probe::Program("strip"), "makes tests small enough to carry";
];

/// Installs what is missing, saying what and why.
///
/// # Errors
/// [`Failure::Packages`] when that takes somebody else: not root, or no apt-get here.
pub(crate) fn ensure(lists: &[&[Package]]) -> Result<(), Failure> {
    let missing: Vec<&Package> =
        lists.iter().flat_map(|list| list.iter()).filter(|p| !p.is_there()).collect();
    if missing.is_empty() {
        step::note("all there");
        return Ok(());
    }
    let names: Vec<&'static str> = missing.iter().map(|package| package.name).collect();
    if let Some(reason) = obstacle() {
        return Err(Failure::Packages { missing: names, reason });
    }
    for package in &missing {
        step::note(&format!("installing {}: {}", package.name, package.what_for));
    }
    apt_get(&["update"])?;
    let mut install = vec!["install", "-y", "--no-install-recommends"];
    install.extend(names);
    apt_get(&install)
}

/// Finds a program on PATH or in the system's sbin directories, which a user's PATH may lack.
pub(crate) fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(std::path::PathBuf::from);
    std::env::split_paths(&path).chain(sbin).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Whether this process runs as root.
pub(crate) fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

impl Package {
    fn is_there(&self) -> bool {
        match self.probe {
            Probe::Program(program) => find_program(program).is_some(),
            Probe::File(file) => Path::new(file).exists(),
            Probe::Dpkg => {
                let query = ["-W", "-f", "${db:Status-Status}", self.name];
                step::read(Command::new("dpkg-query").args(query)).is_ok_and(|status| status == "installed")
            }
        }
    }
}

fn obstacle() -> Option<&'static str> {
    if find_program("apt-get").is_none() {
        Some("packages are missing and this is neither Debian nor Ubuntu")
    } else if !is_root() {
        Some("packages are missing and only root can install them")
    } else {
        None
    }
}

// apt prints hundreds of lines; they are only of interest when it fails.
fn apt_get(args: &[&str]) -> Result<(), Failure> {
    let mut command = Command::new("apt-get");
    command.arg("-q").args(args).env("DEBIAN_FRONTEND", "noninteractive");
    step::note(&format!("$ {}", step::typed(&command)));
    step::read(&mut command).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_package_stands_in_one_list_once_and_says_what_for() {
        let all: Vec<&Package> = [DEMO, TEST, MACHINE].into_iter().flatten().collect();
        for (i, package) in all.iter().enumerate() {
            assert!(!package.what_for.is_empty());
            assert!(all[..i].iter().all(|other| other.name != package.name), "{} twice", package.name);
        }
    }

    #[test]
    fn a_package_that_dpkg_does_not_know_is_missing() {
        let package = Package { name: "no-such-package-here", what_for: "nothing", probe: Probe::Dpkg };
        assert!(!package.is_there());
    }

    #[test]
    fn programs_are_found_by_name() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-here").is_none());
    }
}
