//! kiln and buildah build the same Dockerfile to the same tree and config.
//!
//! [`case`] says what a folder of `testdata/differential` holds. Where buildah differs from BuildKit, the
//! case says why, and holds the lines that kiln must give instead; a difference that is gone fails the test
//! as one that is new does.

mod case;
mod image;

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use self::case::Case;
use self::image::Lines;
use crate::harness::{Context, Store, busybox_tar, needs_root, text};
use crate::interop::{Tools, needs};

const BASE: &str = "localhost/base";

/// What buildah's RUN leaves of its mount points. BuildKit removes them, so kiln has to.
const STUBS: [(&str, &str); 8] = [
    ("/dev", "dir 0755 0:0"),
    ("/etc/hostname", "file 0755 0:0 \"\""),
    ("/etc/hosts", "file 0755 0:0 \"\""),
    ("/etc/resolv.conf", "file 0755 0:0 \"\""),
    ("/proc", "dir 0755 0:0"),
    ("/run/secrets", "dir 0755 0:0"),
    ("/run", "dir 0755 0:0"),
    ("/sys", "dir 0755 0:0"),
];

/// Both builders, with the busybox image.
struct Pair {
    kiln: Store,
    buildah: Tools,
    busybox: Lines,
}

impl Pair {
    fn new() -> Pair {
        let (kiln, buildah) = (Store::with_busybox(), Tools::new());
        let tar = busybox_tar(kiln.root().parent().expect("the store has a parent"));
        let path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let name = "docker.io/library/busybox:latest";
        buildah.podman(&["import", "-q", "--change", path, "--change", "CMD [\"sh\"]", text(&tar), name]);
        let busybox = saved(&kiln, "busybox");
        Pair { kiln, buildah, busybox }
    }

    /// The image, or what buildah says instead.
    fn buildah(&self, case: &Case, context: &Context) -> Result<Lines, String> {
        let build = |file: &str, name: &str, more: &[String]| {
            let dockerfile = format!("{}/{file}", context.path());
            let mut args =
                vec!["bud", "--isolation", "chroot", "--runtime", "runc", "--format", "docker", "-q"];
            args.extend(["--pull-never", "--network", "host", "--layers=false"]);
            args.extend(["-f", &dockerfile, "-t", name]);
            args.extend(more.iter().map(String::as_str));
            args.push(context.path());
            run(&mut self.buildah.command("buildah", &[], &args))
        };
        if case.has_base {
            build("Dockerfile.base", BASE, &[])?;
        }
        build("Dockerfile", "localhost/case", &case.args(context))?;
        let tar = self.buildah.path("case.tar");
        let to = format!("docker-archive:{}:localhost/case", text(&tar));
        run(&mut self.buildah.command("buildah", &[], &["push", "-q", "localhost/case", &to]))?;
        let mut lines = image::read(&tar);
        fs::remove_file(&tar).expect("just written");
        for (path, stub) in STUBS {
            let inside = format!("{path}/");
            if lines.get(path).is_some_and(|line| line == stub)
                && !lines.keys().any(|key| key.starts_with(&inside))
            {
                lines.remove(path);
            }
        }
        Ok(lines)
    }

    /// The image, or what kiln says instead.
    fn kiln(&self, case: &Case, context: &Context) -> Result<Lines, String> {
        let build = |file: &str, name: &str, more: &[String]| {
            let dockerfile = format!("{}/{file}", context.path());
            let mut args = vec!["build", "--progress", "plain", "-f", &dockerfile, "-t", name];
            args.extend(more.iter().map(String::as_str));
            args.push(context.path());
            run(&mut self.kiln.command(&args))
        };
        if case.has_base {
            build("Dockerfile.base", BASE, &[])?;
        }
        build("Dockerfile", "localhost/case", &case.args(context))?;
        Ok(saved(&self.kiln, "localhost/case"))
    }

    /// `None` if all is as it should be.
    fn complaint(&self, case: &Case) -> Option<String> {
        if let Some(reason) = case.differs.as_ref().or(case.alone.as_ref()) {
            eprintln!("DIFFERS from buildah: {}: {reason}", case.name);
        }
        let context = case.context();
        let kiln = self.kiln(case, &context);
        let buildah = match &case.alone {
            None => self.buildah(case, &context),
            Some(reason) => Err(reason.clone()),
        };
        let differs = case.differs.is_some() || case.alone.is_some();
        match (kiln, buildah, &case.fails) {
            (Err(kiln), _, Some(words)) if !kiln.contains(words.as_str()) => {
                Some(format!("kiln does not say `{words}` but\n{kiln}"))
            }
            (Err(_), buildah, Some(_)) if buildah.is_ok() != differs => {
                Some(format!("kiln refuses it; buildah says {:?}", buildah.map(|_| "that it is fine")))
            }
            (Err(_), _, Some(_)) => None,
            (Ok(_), _, Some(words)) => Some(format!("kiln builds it, and ought to say `{words}`")),
            (Err(kiln), _, None) => Some(format!("kiln refuses it:\n{kiln}")),
            (Ok(_), Err(buildah), None) if !differs => Some(format!("buildah refuses it:\n{buildah}")),
            (Ok(kiln), buildah, None) => {
                let from = buildah.as_ref().unwrap_or(&self.busybox);
                difference(&case.expected(from), &kiln).or_else(|| {
                    let stale = differs && buildah.as_ref() == Ok(&kiln);
                    stale.then(|| "buildah does not differ".to_owned())
                })
            }
        }
    }
}

fn saved(store: &Store, name: &str) -> Lines {
    let tar = store.beside("case.tar");
    store.ok(&["save", "--format", "docker", "-o", text(&tar), name]);
    let lines = image::read(&tar);
    fs::remove_file(&tar).expect("just written");
    lines
}

/// What a failed command says.
fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().expect("checked to be installed");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!stderr.contains("panicked at"), "{stderr}");
    if output.status.success() { Ok(()) } else { Err(stderr.into_owned()) }
}

fn difference(expected: &Lines, kiln: &Lines) -> Option<String> {
    let mut text = String::new();
    for key in expected.keys().chain(kiln.keys()).collect::<BTreeSet<_>>() {
        let (wanted, got) = (expected.get(key), kiln.get(key));
        if wanted != got {
            let show = |line: Option<&String>| line.map_or("absent", String::as_str).to_owned();
            let _ = write!(text, "\n  {key}: {}\n    but kiln has {}", show(wanted), show(got));
        }
    }
    (!text.is_empty()).then_some(text)
}

fn folders() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/differential");
    let entries =
        fs::read_dir(dir).expect("the cases are there").map(|entry| entry.expect("a folder").path());
    let mut folders: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

/// The part of a folder's name before the first `-`.
fn group(folder: &Path) -> String {
    let name = folder.file_name().expect("a folder has a name").to_string_lossy();
    name.split('-').next().unwrap_or_default().to_owned()
}

/// Builds the cases of a group and reports all that went wrong. `KILN_CASE` in the environment picks those whose name contains it.
#[track_caller]
fn check(wanted: &str) {
    let only = std::env::var("KILN_CASE").unwrap_or_default();
    let cases: Vec<Case> =
        folders().iter().filter(|path| group(path) == wanted).map(|path| Case::read(path)).collect();
    assert!(!cases.is_empty(), "no case begins with {wanted}-");
    let pair = Pair::new();
    let complain = |case: &Case| Some(format!("\n{}: {}", case.name, pair.complaint(case)?));
    let complaints: Vec<String> =
        cases.iter().filter(|case| case.name.contains(&only)).filter_map(complain).collect();
    assert!(complaints.is_empty(), "{} of {} cases:{}", complaints.len(), cases.len(), complaints.concat());
}

macro_rules! groups {
    ($($test:ident: $group:literal,)*) => {
        $(
            #[test]
            fn $test() {
                needs!("podman", "buildah", "runc", "bzip2", "xz", "zstd");
                check($group);
            }
        )*

        #[test]
        fn every_differential_case_is_in_a_group() {
            let known = [$($group),*];
            let lost: Vec<_> = folders().into_iter().filter(|path| !known.contains(&group(path).as_str())).collect();
            assert!(lost.is_empty(), "{lost:?}");
            assert!(folders().len() >= 75);
        }
    };
}

groups! {
    add_is_what_buildah_makes: "add",
    config_is_what_buildah_makes: "config",
    copy_is_what_buildah_makes: "copy",
    expansion_is_what_buildah_makes: "expand",
    flags_are_what_buildah_makes: "flag",
    heredocs_are_what_the_case_expects: "heredoc",
    ignored_files_are_what_buildah_ignores: "ignore",
    onbuild_is_what_buildah_makes: "onbuild",
    run_is_what_buildah_makes: "run",
    stages_are_what_buildah_makes: "stage",
    user_and_workdir_are_what_buildah_makes: "user",
}
