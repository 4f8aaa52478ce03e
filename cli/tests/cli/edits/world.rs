//! A context that is edited, the store that knows it, and empty ones to compare with.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use kiln_testkit::random::Random;
use rustix::fs::{AtFlags, CWD, RenameFlags, Timespec, Timestamps, renameat_with, utimensat};

use super::model::{self, Kind, Listing, Model};
use crate::deltas::deltas;
use crate::harness::{Context, Outcome, Store, busybox_tar, text};

/// Directories that stay, and names that come and go in them.
const DIRS: [&str; 9] =
    ["", "src", "src/sub", "lib", "lib/deep", "lib/other", "lib/many", "bound", "bound/deep"];
/// So many files below two of them: copies of these share files with earlier ones, or stand in front of them.
const MANY: usize = 64;
const NAMES: [&str; 9] = ["a.txt", "A.txt", "b.txt", "c.rs", "x.md", "n.log", "ignored", "UPPER", "upper"];
/// Sometimes a file, sometimes a directory; sometimes a link.
const EITHER: &str = "either";
const LINK: &str = "link";
const TARGETS: [&str; 4] = ["c.rs", "nowhere", "../src/keep.txt", "/etc/passwd"];
const MODES: [u32; 6] = [0o644, 0o600, 0o755, 0o444, 0o4755, 0o640];
const DIR_MODES: [u32; 4] = [0o755, 0o700, 0o711, 0o1777];

/// Kinds of edits.
pub(super) const KINDS: usize = 14;

/// What a build did.
pub(super) struct Done {
    /// Steps that ran.
    pub(super) ran: usize,
    pub(super) cached: usize,
    /// Copies that stand in front of earlier ones.
    pub(super) deltas: usize,
}

/// What of a build is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// Which steps ran.
    Steps,
    /// And whether its image is that of a build in an empty store.
    Image,
    /// And whether the files are, one by one.
    Trees,
}

pub(super) struct World {
    store: Store,
    context: Context,
    order: Vec<&'static str>,
    model: Model,
}

impl World {
    /// A context that was built once.
    pub(super) fn new(random: &mut Random) -> World {
        let (store, context) = (Store::empty(), Context::new(&[]));
        let mut order = model::COPIES.to_vec();
        for at in (1..order.len()).rev() {
            order.swap(at, random.below(at + 1));
        }
        context.write("Dockerfile", &model::dockerfile(&order));
        context.write(".dockerignore", model::IGNORE);
        busybox(&context);
        for (nth, dir) in DIRS.iter().enumerate() {
            context.write(&place(dir, "keep.txt"), &format!("kept {nth}"));
            context.write(&place(dir, "c.rs"), "code");
        }
        for nth in 0..MANY {
            for dir in ["lib/many", "src/many"] {
                context.write(&format!("{dir}/{nth}.rs"), &format!("one of many {nth}"));
            }
        }
        let mut world = World { store, context, order, model: Model::default() };
        for _ in 0..8 {
            world.edit(random);
        }
        world.check(Depth::Steps, "first build");
        world
    }

    /// Builds here, and in an empty store where that is asked for.
    #[track_caller]
    pub(super) fn check(&mut self, depth: Depth, what: &str) -> Done {
        let listing = model::list(Path::new(self.context.path()));
        let mut expected = self.model.build(&self.order, &listing);
        let trees = tempfile::tempdir().expect("temporary directories can be made");
        let trees = (depth == Depth::Trees).then_some(trees.path());
        let before = deltas(&self.store).len();
        let warm = build(&self.store, &self.context, trees.map(|dir| dir.join("warm")));
        let order = self.order.join("\n  ");
        let why = || format!("{what}\nDockerfile:\n  {order}\n{}", warm.stderr);
        if depth != Depth::Steps {
            let cold = build(&Store::empty(), &self.context, trees.map(|dir| dir.join("cold")));
            assert_eq!(warm.stdout, cold.stdout, "the image is not that of a cold build\n{}", why());
        }
        if let Some(trees) = trees {
            let tree = |name: &str| {
                let listing: Listing = model::list(&trees.join(name));
                model::describe(listing.iter().map(|(path, node)| (path.as_str(), node)), true)
            };
            assert_eq!(tree("warm"), tree("cold"), "{}", why());
        }
        let mut ran = warm.ran();
        ran.sort();
        expected.sort();
        assert_eq!(ran, expected, "other steps ran than had to\n{}", why());
        let deltas = deltas(&self.store).len() - before;
        Done { ran: ran.len(), cached: warm.steps().len() - ran.len(), deltas }
    }

    /// Edits something; of which kind it is, and what.
    pub(super) fn edit(&self, random: &mut Random) -> (usize, String) {
        loop {
            let (dir, kind) = (DIRS[random.below(DIRS.len())], random.below(KINDS));
            if let Some(what) = self.try_edit(random, dir, kind) {
                return (kind, what);
            }
        }
    }

    /// `None`: there is nothing to do this with.
    fn try_edit(&self, random: &mut Random, dir: &str, kind: usize) -> Option<String> {
        let files = self.files(dir);
        let any = |random: &mut Random| files.get(random.below(files.len().max(1))).cloned();
        let free = |name: &str| is_free(name).then(|| self.at(dir, name));
        let content = format!("content {}", random.below(3));
        let said = |what: &str, path: &Path| {
            let path = path.strip_prefix(self.context.path()).expect("below it");
            Some(format!("{what} {}", path.display()))
        };
        match kind {
            0 => {
                let path = self.at(dir, NAMES[random.below(NAMES.len())]);
                fs::write(&path, content).ok()?;
                said("write", &path)
            }
            1 => {
                let path = any(random)?;
                let before = fs::metadata(&path).ok()?;
                let mut bytes = fs::read(&path).ok()?;
                *bytes.last_mut()? ^= 1;
                fs::write(&path, bytes).ok()?;
                set_mtime(&path, before.mtime(), before.mtime_nsec());
                said("other content, same size and time", &path)
            }
            2 => {
                let path = any(random)?;
                fs::set_permissions(&path, Permissions::from_mode(MODES[random.below(MODES.len())])).ok()?;
                said("mode of file", &path)
            }
            3 => {
                let path = self.at(dir, "");
                let mode = DIR_MODES[random.below(DIR_MODES.len())];
                fs::set_permissions(&path, Permissions::from_mode(mode)).ok()?;
                said(&format!("mode {mode:o} of directory"), &path)
            }
            4 => {
                let (from, to) =
                    (any(random).filter(|path| may_go(path))?, free(NAMES[random.below(NAMES.len())])?);
                fs::rename(&from, &to).ok()?;
                said(&format!("rename {} to", from.display()), &to)
            }
            5 => {
                let path = self.at(dir, LINK);
                let _ = fs::remove_file(&path);
                symlink(TARGETS[random.below(TARGETS.len())], &path).ok()?;
                said("point", &path)
            }
            6 => {
                let (one, other) = [("a.txt", "A.txt"), ("upper", "UPPER")][random.below(2)];
                let (one, other) = (self.at(dir, one), self.at(dir, other));
                let (from, to) = if one.exists() { (one, other) } else { (other, one) };
                (from.exists() && !to.exists()).then_some(())?;
                fs::rename(&from, &to).ok()?;
                said("other case for", &from)
            }
            7 => {
                let path = any(random)?;
                set_mtime(&path, 1_000_000_000 + random.below(9) as i64, random.below(1_000_000_000) as i64);
                said("touch", &path)
            }
            8 => {
                let target = DIRS[random.below(DIRS.len())];
                let (from, to) = (any(random)?, self.at(target, NAMES[random.below(NAMES.len())]));
                let _ = fs::remove_file(&to).is_ok_and(|()| from != to);
                fs::hard_link(&from, &to).ok()?;
                said(&format!("link {} to", from.display()), &to)
            }
            9 => {
                let path = any(random).filter(|path| may_go(path))?;
                fs::remove_file(&path).ok()?;
                said("remove", &path)
            }
            10 => {
                let path = self.at(dir, EITHER);
                match fs::symlink_metadata(&path) {
                    Ok(stat) if stat.is_dir() => {
                        fs::remove_dir_all(&path).ok()?;
                        fs::write(&path, content).ok()?;
                    }
                    there => {
                        let _ = there.and_then(|_| fs::remove_file(&path));
                        fs::create_dir(&path).ok()?;
                        fs::write(path.join("in.rs"), content).ok()?;
                    }
                }
                said("directory to file or back", &path)
            }
            11 => {
                let path = any(random)?;
                let before = fs::metadata(&path).ok()?;
                let temporary = self.at(dir, "new");
                fs::copy(&path, &temporary).ok()?;
                if random.below(2) == 0 {
                    fs::write(&temporary, content).ok()?;
                }
                set_mtime(&temporary, before.mtime(), before.mtime_nsec());
                fs::rename(&temporary, &path).ok()?;
                said("another inode for", &path)
            }
            12 => {
                let target = DIRS[random.below(DIRS.len())];
                let from = any(random).filter(|path| may_go(path))?;
                let to = self.at(target, from.file_name()?.to_str()?);
                (from != to && !to.is_dir()).then_some(())?;
                fs::rename(&from, &to).ok()?;
                said(&format!("move {} to", from.display()), &to)
            }
            _ => {
                let (one, other) = (any(random)?, any(random)?);
                (one != other).then_some(())?;
                renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE).ok()?;
                said(&format!("exchange {} and", one.display()), &other)
            }
        }
    }

    fn at(&self, dir: &str, name: &str) -> PathBuf {
        self.context.at(&place(dir, name))
    }

    /// Files of a directory that are not part of the set-up.
    fn files(&self, dir: &str) -> Vec<PathBuf> {
        let listing = fs::read_dir(self.at(dir, "")).expect("it stays");
        let mut files: Vec<PathBuf> = listing.map(|entry| entry.expect("it is there").path()).collect();
        files.retain(|path| {
            let kind = fs::symlink_metadata(path).expect("nobody else is here").file_type();
            kind.is_file() && !path.ends_with("Dockerfile") && !path.ends_with(".dockerignore")
        });
        files.sort();
        files
    }
}

fn place(dir: &str, name: &str) -> String {
    if dir.is_empty() || name.is_empty() { format!("{dir}{name}") } else { format!("{dir}/{name}") }
}

/// The Dockerfile names these.
fn may_go(path: &Path) -> bool {
    !path.ends_with("keep.txt")
}

fn is_free(name: &str) -> bool {
    name != EITHER && name != LINK
}

fn set_mtime(path: &Path, tv_sec: i64, tv_nsec: i64) {
    let time = Timespec { tv_sec, tv_nsec };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).expect("ours");
}

/// The program that RUN runs: the images stand on nothing.
fn busybox(context: &Context) {
    let scratch = tempfile::tempdir().expect("temporary directories can be made");
    let tar = fs::File::open(busybox_tar(scratch.path())).expect("it was made");
    let mut archive = tar::Archive::new(tar);
    for entry in archive.entries().expect("a tar") {
        let mut entry = entry.expect("a whole tar");
        if entry.path().expect("a path").ends_with("bin/busybox") && entry.header().entry_type().is_file() {
            fs::create_dir(context.at("tools")).expect("ours to write");
            entry.unpack(context.at("tools/busybox")).expect("ours to write");
            return;
        }
    }
    panic!("no busybox in it");
}

#[track_caller]
fn build(store: &Store, context: &Context, tree: Option<PathBuf>) -> Outcome {
    let tree = tree.map(|dir| format!("type=local,dest={}", text(&dir)));
    let mut args = vec!["-o", "type=image,rewrite-timestamp=true", "--build-arg", "SOURCE_DATE_EPOCH=1000"];
    args.extend(tree.iter().flat_map(|output| ["-o", output.as_str()]));
    let mut outcome = store.build(context, &args).expect(0);
    let line = outcome.stdout.lines().find(|line| line.starts_with("image sha256:"));
    let id = line.and_then(|line| line.split([' ', ',']).nth(1)).map(str::to_owned);
    outcome.stdout = id.unwrap_or_else(|| panic!("no image in {}", outcome.stdout));
    outcome
}

/// So that a listing of a tree can be told from one of nothing.
#[test]
fn a_listing_has_what_is_there() {
    let context = Context::new(&[("d/f", "x")]);
    let listing = model::list(Path::new(context.path()));
    assert_eq!(listing["d/f"].kind, Kind::File(b"x".to_vec()));
}
