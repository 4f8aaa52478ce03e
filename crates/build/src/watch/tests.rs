//! Directories and what is done to them; no build.

use std::os::unix::fs::{PermissionsExt, symlink};

use tempfile::TempDir;

use super::*;

struct Tree {
    _dir: TempDir,
    root: PathBuf,
    watcher: Watcher,
}

impl Tree {
    /// A tree of which these parts are read, but for what the rules leave out.
    fn new(dirs: &[&str], parts: &[&str], ignore: &str) -> Self {
        let dir = tempfile::tempdir().expect("temporary directories can be made");
        let root = dir.path().canonicalize().expect("it is there");
        for name in dirs {
            fs::create_dir_all(root.join(name)).expect("ours");
        }
        let mut tree = Self { _dir: dir, root, watcher: Watcher::new().expect("the kernel has inotify") };
        let reads = tree.reads(parts, ignore);
        tree.watcher.watch(reads).expect("there are few");
        tree
    }

    fn reads(&self, parts: &[&str], ignore: &str) -> Reads {
        let ignore = Patterns::parse(ignore).expect("rules");
        let parts = parts.iter().map(|part| literal(part)).collect();
        let trees = vec![ReadTree { root: self.root.clone(), ignore, parts }];
        Reads { trees, files: [self.root.join("Dockerfile")].into(), written: vec![self.root.join("out")] }
    }

    /// What is done here is news, and of this place. The kernel has it before the call that does it returns.
    #[track_caller]
    fn tells(&mut self, place: &str, act: impl FnOnce(&Path)) {
        act(&self.root);
        assert_eq!(self.watcher.read().expect("watched"), Some(News::Changed(self.root.join(place))));
    }

    /// What is done here is none.
    #[track_caller]
    fn is_silent(&mut self, act: impl FnOnce(&Path)) {
        act(&self.root);
        assert_eq!(self.watcher.read().expect("watched"), None);
    }
}

fn write(path: &str) -> impl FnOnce(&Path) {
    let path = path.to_owned();
    move |root| fs::write(root.join(path), "text").expect("ours")
}

#[test]
fn a_lock_file_is_news_unless_the_build_writes_it() {
    let tree = Tree::new(&[], &["."], "");
    for mode in [LockMode::Read, LockMode::Strict, LockMode::Add, LockMode::Update] {
        let mut reads = tree.reads(&["."], "");
        reads.add_lock(&tree.root.join(lock::NAME), mode);
        for name in ["kiln.lock", "kiln.lock.partial"] {
            assert_eq!(reads.concerns(&tree.root.join(name), false), !mode.writes(), "{mode:?} {name}");
        }
        // Also where no step copies it.
        let mut alone = Reads::default();
        alone.add_lock(&tree.root.join(lock::NAME), mode);
        assert_eq!(alone.concerns(&tree.root.join("kiln.lock"), false), !mode.writes(), "{mode:?}");
    }
}

#[test]
fn files_are_news_however_they_are_written() {
    let mut tree = Tree::new(&["src/deep"], &["src", "single"], "");
    tree.tells("src/new", write("src/new"));
    tree.tells("src/deep/new", write("src/deep/new"));
    tree.tells("src/new", |root| {
        let file = fs::OpenOptions::new().append(true).open(root.join("src/new")).expect("it is there");
        io::Write::write_all(&mut &file, b"more").expect("it takes more");
    });
    // As editors do: whole files under another name, renamed over it.
    tree.tells("src/.new.swp", |root| {
        fs::write(root.join("src/.new.swp"), "other").expect("ours");
        fs::rename(root.join("src/.new.swp"), root.join("src/new")).expect("ours");
    });
    tree.tells("src/new", |root| {
        fs::write(root.join("elsewhere"), "other").expect("ours");
        fs::rename(root.join("elsewhere"), root.join("src/new")).expect("ours");
    });
    tree.tells("single", write("single"));
    tree.tells("single", |root| fs::remove_file(root.join("single")).expect("ours"));
    tree.tells("src/link", |root| symlink("new", root.join("src/link")).expect("ours"));
    tree.tells("src/new", |root| {
        fs::set_permissions(root.join("src/new"), fs::Permissions::from_mode(0o600)).expect("ours");
    });
    tree.tells("Dockerfile", write("Dockerfile"));
    tree.is_silent(|root| drop(fs::read(root.join("src/new")).expect("it is there")));
}

#[test]
fn what_is_not_read_is_no_news() {
    let mut tree =
        Tree::new(&["src/kept", "other", "out"], &["src/*.c", "src/kept"], "**/*.o\nsrc/kept/tmp\n");
    tree.is_silent(write("README"));
    tree.is_silent(write("other/file"));
    tree.is_silent(write("src/kept/a.o"));
    tree.is_silent(write("src/kept/tmp"));
    tree.tells("src/a.c", write("src/a.c"));
    let mut all = Tree::new(&["out", "ignored/deep"], &[""], "ignored\n");
    all.is_silent(write("out/file"));
    all.is_silent(write("out.1234.partial"));
    all.is_silent(write("ignored/deep/file"));
    assert_eq!(all.watcher.directories(), 1, "neither what is written nor what is ignored");
}

#[test]
fn directories_that_come_and_go_are_watched_as_they_are() {
    let mut tree = Tree::new(&["src/old"], &["src"], "");
    tree.tells("src/new", |root| fs::create_dir_all(root.join("src/new/a/b")).expect("ours"));
    tree.tells("src/new/a/b/file", write("src/new/a/b/file"));
    tree.tells("src/old", |root| fs::rename(root.join("src/old"), root.join("away")).expect("ours"));
    tree.is_silent(write("away/file"));
    tree.tells("src/back", |root| fs::rename(root.join("away"), root.join("src/back")).expect("ours"));
    tree.tells("src/back/file", write("src/back/file"));
    tree.tells("src/new/a/b/file", |root| fs::remove_dir_all(root.join("src/new")).expect("ours"));
    tree.tells("src/new", |root| fs::create_dir(root.join("src/new")).expect("ours"));
    tree.tells("src/new/file", write("src/new/file"));
    // All of it goes, and comes again.
    fs::remove_dir_all(tree.root.join("src")).expect("ours");
    assert!(matches!(tree.watcher.read(), Ok(Some(News::Changed(_)))));
    tree.tells("src", |root| fs::create_dir(root.join("src")).expect("ours"));
    tree.tells("src/file", write("src/file"));
}

#[test]
fn more_than_the_kernel_keeps_means_that_anything_may_have_changed() {
    let mut tree = Tree::new(&["src"], &["src"], "");
    let kept = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("a kernel with inotify");
    let kept: usize = kept.trim().parse().expect("a number");
    if kept > 100_000 {
        eprintln!("skipped: this kernel keeps {kept} events");
        return;
    }
    let files = ["src/a", "src/b"].map(|name| tree.root.join(name));
    for at in 0..=kept {
        // Equal events in a row are one.
        fs::write(&files[at % 2], "").expect("ours");
    }
    fs::create_dir(tree.root.join("src/unseen")).expect("ours");
    assert_eq!(tree.watcher.read().expect("watched"), Some(News::Lost));
    tree.tells("src/unseen/file", write("src/unseen/file"));
}

#[test]
fn thousands_of_directories_are_watched() {
    let names: Vec<String> = (0..2000).map(|at| format!("src/{}/{at}", at % 40)).collect();
    let mut tree = Tree::new(&names.iter().map(String::as_str).collect::<Vec<_>>(), &[""], "");
    assert_eq!(tree.watcher.directories(), 2 + 40 + 2000);
    tree.tells("src/39/1999/file", write("src/39/1999/file"));
    let reads = tree.reads(&["src/1"], "");
    tree.watcher.watch(reads).expect("fewer");
    assert_eq!(tree.watcher.directories(), 3 + 50);
    tree.is_silent(write("src/39/1999/file"));
}

#[test]
fn a_path_through_a_link_is_the_whole_tree() {
    let tree = Tree::new(&["real/sub"], &[""], "");
    symlink("real", tree.root.join("link")).expect("ours");
    assert_eq!(without_links(&tree.root, "link/sub".into()), PathBuf::new());
    assert_eq!(without_links(&tree.root, "real/sub".into()), Path::new("real/sub"));
    assert_eq!(literal("a/b*/c"), Path::new("a"));
    assert_eq!(literal("a/./b"), Path::new("a/b"));
    assert_eq!(literal("."), PathBuf::new());
}

#[test]
fn what_is_read_as_before_is_not_walked_again_unless_a_part_of_it_was_not_there() {
    let mut tree = Tree::new(&["src/a", "src/b"], &["src"], "");
    let same = tree.reads(&["src"], "");
    let before = tree.watcher.directories();
    tree.watcher.watch(same.clone()).expect("watched");
    assert_eq!(tree.watcher.directories(), before);
    // New ones and what is in them are told all the same.
    tree.tells("src/c", |root| fs::create_dir(root.join("src/c")).expect("ours"));
    tree.watcher.watch(same.clone()).expect("watched");
    tree.tells("src/c/new", write("src/c/new"));
    // Other rules, other directories.
    let other = tree.reads(&["src"], "src/c\n");
    tree.watcher.watch(other).expect("watched");
    tree.is_silent(write("src/c/new"));
    // A directory that went and came again is watched again by the next build at the latest.
    tree.watcher.watch(same.clone()).expect("watched");
    fs::remove_dir_all(tree.root.join("src")).expect("ours");
    assert!(tree.watcher.read().expect("watched").is_some());
    tree.watcher.watch(same.clone()).expect("watched");
    fs::create_dir_all(tree.root.join("src/a")).expect("ours");
    assert!(tree.watcher.read().expect("watched").is_some());
    tree.watcher.watch(same).expect("watched");
    tree.tells("src/a/new", write("src/a/new"));
}
