//! Other tools take what kiln saves, and kiln takes what other tools save.

mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::harness::{Context, Store, base, busybox_tar, needs_root, text};

/// Returns from the test, aloud, unless all of these programs are installed.
macro_rules! needs {
    ($($tool:literal),*) => {
        needs_root!();
        for tool in [$($tool),*] {
            if Command::new(tool).arg("--version").output().is_err() {
                eprintln!("SKIPPED ALOUD: needs {tool}");
                return;
            }
        }
    };
}
pub(crate) use needs;

/// podman, buildah, skopeo and umoci with a store of their own.
pub(crate) struct Tools {
    dir: TempDir,
    /// podman refuses a run root whose path has more than 50 characters.
    run: TempDir,
}

impl Tools {
    pub(crate) fn new() -> Tools {
        let dir = tempfile::tempdir().expect("temporary directories can be made");
        // Both raise limits above what a root without CAP_SYS_RESOURCE may. Ours are always allowed.
        let limits = fs::read_to_string("/proc/self/limits").expect("/proc is mounted");
        let hard = |name: &str| {
            let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("");
            line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(32768u64).min(32768)
        };
        let (files, processes) = (hard("Max open files"), hard("Max processes"));
        let conf = format!(
            "[containers]\ndefault_ulimits = [\"nofile={files}:{files}\", \"nproc={processes}:{processes}\"]\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n"
        );
        fs::write(dir.path().join("containers.conf"), conf).expect("ours to write");
        let policy = r#"{"default": [{"type": "insecureAcceptAnything"}]}"#;
        fs::write(dir.path().join("policy.json"), policy).expect("ours to write");
        let run = tempfile::Builder::new().prefix("kiln-").tempdir_in("/tmp").expect("/tmp can be written");
        Tools { dir, run }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    #[track_caller]
    pub(crate) fn podman(&self, args: &[&str]) -> String {
        self.with_store("podman", &["--runtime", "runc", "--cgroup-manager", "cgroupfs"], args)
    }

    #[track_caller]
    pub(crate) fn buildah(&self, args: &[&str]) -> String {
        self.with_store("buildah", &[], args)
    }

    #[track_caller]
    fn skopeo_copy(&self, from: &str, to: &str) {
        let policy = self.path("policy.json");
        finish(Command::new("skopeo").arg("--policy").arg(policy).args(["copy", "--quiet", from, to]));
    }

    #[track_caller]
    fn with_store(&self, program: &str, flags: &[&str], args: &[&str]) -> String {
        finish(&mut self.command(program, flags, args))
    }

    /// A command line of podman or buildah on this store.
    pub(crate) fn command(&self, program: &str, flags: &[&str], args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(flags).arg("--root").arg(self.path("root")).arg("--runroot").arg(self.run.path());
        command.args(["--storage-driver", "overlay"]).args(args);
        command.env("CONTAINERS_CONF", self.path("containers.conf"));
        command
    }
}

impl Drop for Tools {
    fn drop(&mut self) {
        // Their overlay store is a mount of itself, which would keep the directory from going.
        let _ = Command::new("umount").args(["-l", text(&self.path("root/overlay"))]).output();
    }
}

#[track_caller]
fn finish(command: &mut Command) -> String {
    let output = command.output().expect("checked to be installed");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}\n{stdout}\n{stderr}");
    stdout.into_owned()
}

/// An image in which a lower file is deleted, a directory replaced, and two names share a file.
const TRICKY: &str = "FROM busybox\n\
    RUN mkdir /d && echo gone > /d/gone && echo kept > /kept && echo 1 > /x && echo app:x:1234:1234::/:/bin/sh >> /etc/passwd\n\
    RUN rm -r /d && mkdir /d && echo new > /d/new && ln /kept /linked && chmod 4755 /kept && ln -s kept /symbolic && rm /x\n\
    COPY --chown=1234 file /home/app/file\n\
    ENV GREETING=hello\n\
    USER app\n\
    WORKDIR /home/app\n\
    ENTRYPOINT [\"/bin/sh\", \"-c\"]\n\
    CMD [\"ls /d; cat /symbolic file; stat -c '%a %h %u' /kept /home/app/file; ls /x 2>/dev/null; echo $GREETING; id -u; pwd\"]\n";

const TRICKY_SAYS: &str = "new\nkept\ncopied\n4755 2 0\n644 1 1234\nhello\n1234\n/home/app\n";

fn tricky(store: &Store) {
    let context = Context::new(&[("Dockerfile", TRICKY), ("file", "copied\n")]);
    store.build(&context, &["-t", "tricky:1"]).expect(0);
}

fn saved(store: &Store, format: &str) -> PathBuf {
    packed(store, format, "uncompressed")
}

/// Every way to pack layers.
const PACKINGS: [&str; 4] = ["uncompressed", "gzip", "zstd", "estargz"];

fn packed(store: &Store, format: &str, packing: &str) -> PathBuf {
    let tar = store.beside(&format!("{format}-{packing}.tar"));
    store.ok(&["save", "--format", format, "--compression", packing, "-o", text(&tar), "tricky:1"]);
    tar
}

#[test]
fn podman_loads_and_runs_what_kiln_saves() {
    needs!("podman", "runc");
    let (store, tools) = (Store::with_busybox(), Tools::new());
    tricky(&store);
    assert_eq!(store.ok(&["run", "--rm", "--network", "none", "tricky:1"]).stdout, TRICKY_SAYS);
    for (format, packing) in PACKINGS.iter().flat_map(|packing| [("docker", packing), ("oci", packing)]) {
        let loaded = tools.podman(&["load", "-q", "-i", text(&packed(&store, format, packing))]);
        assert!(loaded.contains("tricky:1"), "{loaded}");
        let name = loaded.trim().rsplit(' ').next().expect("the name comes last").to_owned();
        let says = tools.podman(&["run", "--rm", "--network", "none", &name]);
        assert_eq!(says, TRICKY_SAYS, "{format} {packing}");
        tools.podman(&["rmi", "-f", &name]);
    }
}

#[test]
fn every_output_of_a_build_is_taken_by_other_tools() {
    needs!("podman", "buildah", "skopeo", "umoci", "runc");
    let (store, tools) = (Store::with_busybox(), Tools::new());
    let context = Context::new(&[("Dockerfile", TRICKY), ("file", "copied\n")]);
    let at = |name: &str| text(&store.beside(name)).to_owned();
    let outputs = [
        format!("type=docker,dest={},oci-mediatypes=false", at("docker.tar")),
        format!("type=oci,dest={}", at("oci.tar")),
        format!("type=oci,dest={},tar=false,compression=zstd", at("zstd")),
        format!("type=tar,dest={}", at("rootfs.tar")),
    ];
    let mut args = vec!["-t", "tricky:1"];
    outputs.iter().for_each(|output| args.extend(["-o", output]));
    store.build(&context, &args).expect(0);
    // A layout directory has no name that buildah could take its own from.
    let from_layout = text(&tools.path("zstd.tar")).to_owned();
    let to = format!("oci-archive:{from_layout}:localhost/tricky:1");
    tools.skopeo_copy(&format!("oci:{}:1", at("zstd")), &to);
    for from in [
        format!("docker-archive:{}", at("docker.tar")),
        format!("oci-archive:{}", at("oci.tar")),
        format!("oci-archive:{from_layout}"),
    ] {
        let name = tools.buildah(&["pull", "-q", "--policy", "always", &from]).trim().to_owned();
        let says = tools.podman(&["run", "--rm", "--network", "none", &name]);
        assert_eq!(says, TRICKY_SAYS, "{from}");
        tools.podman(&["rmi", "-f", &name]);
    }
    let bundle = tools.path("oci-bundle");
    let unpacked = tools.path("unpacked");
    fs::create_dir(&unpacked).expect("ours");
    finish(Command::new("tar").arg("-C").arg(&unpacked).arg("-xf").arg(at("oci.tar")));
    finish(Command::new("umoci").args([
        "unpack",
        "--image",
        &format!("{}:1", text(&unpacked)),
        text(&bundle),
    ]));
    assert_eq!(fs::read_to_string(bundle.join("rootfs/d/new")).expect("unpacked"), "new\n");
    tools.podman(&["import", "-q", &at("rootfs.tar"), "rootfs:1"]);
    let ls = tools.podman(&["run", "--rm", "--network", "none", "rootfs:1", "/bin/cat", "/d/new"]);
    assert_eq!(ls, "new\n");
}

#[test]
fn kiln_loads_what_skopeo_and_podman_pack_in_every_way() {
    needs!("podman", "skopeo", "runc");
    let (store, tools) = (Store::with_busybox(), Tools::new());
    tricky(&store);
    let oci = format!("oci-archive:{}", text(&saved(&store, "oci")));
    for (packing, to) in
        ["gzip", "zstd"].iter().flat_map(|packing| [(packing, "oci-archive"), (packing, "dir")])
    {
        let tar = tools.path(&format!("{packing}-{to}.tar"));
        let policy = tools.path("policy.json");
        let mut copy = Command::new("skopeo");
        copy.arg("--policy").arg(policy).args(["copy", "--quiet", "--dest-compress-format", packing]);
        if to == "dir" {
            let layout = format!("oci:{}:tricky", text(&tar.with_extension("layout")));
            finish(copy.args(["--dest-oci-accept-uncompressed-layers", &oci, &layout]));
            finish(
                Command::new("tar").arg("-C").arg(tar.with_extension("layout")).arg("-cf").arg(&tar).arg("."),
            );
            let loaded = Store::empty();
            let id = loaded.ok(&["load", "-i", text(&tar)]).stdout;
            let id = id.trim().rsplit("sha256:").next().expect("the ID comes last").to_owned();
            let outcome = loaded.ok(&["run", "--rm", "--network", "none", &id]);
            assert_eq!(outcome.stdout, TRICKY_SAYS, "{packing}: {}", outcome.stderr);
        } else {
            finish(copy.args([&oci, &format!("oci-archive:{}:localhost/theirs:1", text(&tar))]));
            check_kiln_runs(&Store::empty(), &tar, "localhost/theirs:1");
        }
    }
}

#[test]
fn skopeo_copies_and_umoci_unpacks_what_kiln_saves() {
    needs!("skopeo", "umoci");
    let (store, tools) = (Store::with_busybox(), Tools::new());
    tricky(&store);
    let docker = format!("docker-archive:{}", text(&saved(&store, "docker")));
    tools.skopeo_copy(&docker, &format!("oci:{}:x", text(&tools.path("from-docker"))));

    for packing in PACKINGS {
        let oci = format!("oci-archive:{}", text(&packed(&store, "oci", packing)));
        let layout = tools.path(&format!("layout-{packing}"));
        tools.skopeo_copy(&oci, &format!("oci:{}:x", text(&layout)));
        // Debian's umoci does not know zstd.
        if packing == "zstd" {
            continue;
        }
        let bundle = tools.path(&format!("bundle-{packing}"));
        let image = format!("{}:x", text(&layout));
        finish(Command::new("umoci").args(["unpack", "--image", &image, text(&bundle)]));
        let rootfs = bundle.join("rootfs");
        assert_eq!(fs::read_to_string(rootfs.join("d/new")).expect("unpacked"), "new\n");
        assert!(!rootfs.join("d/gone").exists() && !rootfs.join("x").exists());
    }
}

fn check_kiln_runs(store: &Store, tar: &Path, name: &str) {
    store.ok(&["load", "-i", text(tar)]);
    let outcome = store.ok(&["run", "--rm", "--network", "none", name]);
    assert_eq!(outcome.stdout, TRICKY_SAYS, "{}", outcome.stderr);
}

#[test]
fn kiln_loads_and_runs_what_buildah_and_podman_make() {
    needs!("podman", "buildah", "skopeo", "runc");
    let tools = Tools::new();
    let tar = busybox_tar(tools.dir.path());
    let path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    tools.podman(&["import", "-q", "--change", path, text(&tar), "docker.io/library/busybox:latest"]);
    let context = Context::new(&[("Dockerfile", TRICKY), ("file", "copied\n")]);
    let flags = ["--runtime", "runc", "--pull-never", "--network", "host", "-q", "-t", "localhost/theirs:1"];
    let mut bud = vec!["bud"];
    bud.extend(flags);
    bud.push(context.path());
    tools.buildah(&bud);

    let docker = tools.path("docker.tar");
    tools.podman(&["save", "-q", "-o", text(&docker), "localhost/theirs:1"]);
    check_kiln_runs(&Store::empty(), &docker, "localhost/theirs:1");

    let oci = tools.path("oci.tar");
    tools.buildah(&[
        "push",
        "-q",
        "localhost/theirs:1",
        &format!("oci-archive:{}:localhost/theirs:1", text(&oci)),
    ]);
    check_kiln_runs(&Store::empty(), &oci, "localhost/theirs:1");

    let copied = tools.path("copied.tar");
    let from = format!("docker-archive:{}", text(&docker));
    tools.skopeo_copy(&from, &format!("oci-archive:{}:localhost/theirs:1", text(&copied)));
    check_kiln_runs(&Store::empty(), &copied, "localhost/theirs:1");
}

#[test]
fn kiln_loads_what_kiln_saves_as_the_same_image() {
    needs_root!();
    let store = Store::with_busybox();
    tricky(&store);
    let id = store.inspect("tricky:1")["Id"].clone();
    for format in ["docker", "oci"] {
        let other = Store::empty();
        other.ok(&["load", "-i", text(&saved(&store, format))]);
        assert_eq!(other.inspect("tricky:1")["Id"], id, "{format}");
        assert_eq!(other.ok(&["run", "--rm", "--network", "none", "tricky:1"]).stdout, TRICKY_SAYS);
    }
}

#[test]
fn saving_twice_gives_the_same_bytes() {
    needs_root!();
    let store = Store::with_busybox();
    tricky(&store);
    for format in ["docker", "oci"] {
        let first = fs::read(saved(&store, format)).expect("just written");
        assert!(fs::read(saved(&store, format)).expect("just written") == first, "{format} differs");
    }
}

#[test]
fn the_demo_image_builds_and_runs_under_podman() {
    needs!("podman", "runc");
    let Some(debian) = base("debian-bookworm.tar") else {
        eprintln!("SKIPPED ALOUD: needs the Debian base tree (`cargo xtask bases`)");
        return;
    };
    let (store, tools) = (Store::empty(), Tools::new());
    let path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    store.ok(&["import", text(&debian), "debian:bookworm", "-c", "CMD [\"bash\"]", "-c", path]);
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/demo");
    store.ok(&["build", "--progress", "plain", "-t", "kiln-demo", demo]);
    let tar = store.beside("demo.tar");
    store.ok(&["save", "-o", text(&tar), "kiln-demo"]);
    let loaded = tools.podman(&["load", "-q", "-i", text(&tar)]);
    let name = loaded.trim().rsplit(' ').next().expect("the name comes last").to_owned();
    let report = tools.podman(&["run", "--rm", "--network", "none", &name]);
    assert!(report.contains("app (uid 1234), in /app"), "{report}");
    assert!(report.contains("hello, world: the numbers from 1 to 1000 add up to 500500"), "{report}");
}
