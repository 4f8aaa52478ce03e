//! The power goes at any moment: what a command that has ended said it did is there, and of all else
//! nothing is wrong.
//!
//! A recorder writes down what commands do to the store. Of that, states of the disk are made up
//! that a power cut may leave, and kiln is let loose on them: the store has to be sound, names have to
//! lead where they led, and the next build has to make what it always makes.
//!
//! A run of the test command looks at some 100 states of a few sequences, with seeds of its own;
//! `KILN_POWER=N` looks at N states of all sequences of up to three commands. `KILN_SEED=N` repeats
//! the choices of a run; `KILN_POWER_KEEP=DIR` keeps the states with which something is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use kiln_testkit::disk::{Disk, Sync};
use kiln_testkit::faults::observe;
use kiln_testkit::machine::Machine;
use kiln_testkit::random::Random;
use kiln_testkit::recorder::Recorder;
use serde_json::Value;

use crate::deltas::deltas_below;
use crate::harness::{Context, Store, needs_root, text};

/// States that a run of the test command looks at.
const STATES: usize = 100;
/// Files of a copy: so many that few changes make a delta.
const FILES: usize = 80;
/// Too many for that.
const MANY: usize = 20;

const DOCKERFILE: &str = "FROM base\n\
    ARG V\n\
    COPY . /\n\
    RUN --network=none echo $V > /made && touch -d @7 /made\n";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// With another file than before: its copy stands in front of the one that made all.
    Build,
    /// With many other files: its copy makes all, with links, and what it has is written down.
    Rebuild,
    Tag,
    Collect,
    Load,
}

/// Names, and what they lead to.
type Names = BTreeMap<String, String>;

/// Where the commands start from, and what they make.
struct Bench {
    store: Store,
    context: Context,
    archive: PathBuf,
    loaded: String,
    /// Image IDs by what was built: [`Bench::build`].
    golden: Vec<String>,
    names: Names,
}

/// What a sequence of commands did.
struct Story {
    disk: Disk,
    /// Where in the log the first command begins, and where each has ended.
    marks: Vec<usize>,
    /// The names before the first command, and after each.
    names: Vec<Names>,
    /// What was built last.
    last: usize,
}

fn kiln(root: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.args(args).env("KILN_ROOT", root).stdin(Stdio::null()).env_remove("SOURCE_DATE_EPOCH");
    command
}

/// Runs a command; its output, or what it said when it failed.
fn run(mut command: Command) -> Result<String, String> {
    let output = command.output().expect("kiln starts");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() {
        Ok(stdout.into_owned())
    } else {
        Err(format!("{:?}: {}\n{stdout}{stderr}", command.get_args(), output.status))
    }
}

fn image_id(stdout: &str) -> String {
    let id = stdout.lines().find_map(|line| line.strip_prefix("image "));
    let id = id.expect("a build says what it made");
    id.split(',').next().unwrap_or(id).to_owned()
}

/// All names and what they lead to.
fn names(root: &Path) -> Result<Names, String> {
    let listed = run(kiln(root, &["images", "--no-trunc", "--format", "json"]))?;
    let mut names = Names::new();
    for line in listed.lines() {
        let image: Value = serde_json::from_str(line).expect("images prints JSON");
        let part = |key: &str| image[key].as_str().unwrap_or_default().to_owned();
        if part("Repository") != "<none>" {
            names.insert(format!("{}:{}", part("Repository"), part("Tag")), part("ID"));
        }
    }
    Ok(names)
}

/// A root file system with nothing but a shell.
fn base_tar(scratch: &Path) -> PathBuf {
    let tree = scratch.join("base");
    fs::create_dir_all(tree.join("bin")).expect("ours to write");
    fs::copy("/bin/busybox", tree.join("bin/busybox")).expect("busybox-static is installed");
    for applet in ["sh", "touch"] {
        symlink("busybox", tree.join("bin").join(applet)).expect("ours to write");
    }
    let tar = scratch.join("base.tar");
    let packed = Command::new("tar").arg("-C").arg(&tree).arg("-cf").arg(&tar).arg(".").status();
    assert!(packed.expect("tar runs").success());
    tar
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(copied.expect("cp runs").success());
}

impl Bench {
    fn new() -> Self {
        let (store, other) = (Store::empty(), Store::empty());
        let tar = base_tar(&store.beside(""));
        store.ok(&["import", text(&tar), "base", "-c", "CMD [\"sh\"]", "-c", "ENV PATH=/bin"]);
        let small = Context::new(&[("Dockerfile", "FROM scratch\nCOPY f /loaded\n"), ("f", "loaded")]);
        other.build(&small, &["--build-arg", "SOURCE_DATE_EPOCH=0", "-t", "loaded:1"]).expect(0);
        let archive = store.beside("loaded.tar");
        other.ok(&["save", "--compression", "gzip", "-o", text(&archive), "loaded:1"]);
        let context = Context::new(&[("Dockerfile", DOCKERFILE), ("a", "a"), ("d/b", "b")]);
        let large = "x".repeat(3 * 4096 + 100);
        context.write("d/large", &large);
        let loaded = names(&other.root()).expect("images can be listed").remove("loaded:1");
        let mut bench = Self {
            store,
            context,
            archive,
            loaded: loaded.expect("it was built"),
            golden: Vec::new(),
            names: Names::new(),
        };
        // What the builds make is found out beside the store that the stories begin with.
        let beside = bench.store.beside("golden");
        bench.golden.push(image_id(&run(bench.build(&bench.store.root(), 0)).expect("it builds")));
        copy(&bench.store.root(), &beside);
        for what in 1..=3 {
            bench.golden.push(image_id(&run(bench.build(&beside, what)).expect("it builds")));
        }
        assert_eq!(deltas_below(&beside).len(), 2, "one file changes, then many, then one");
        bench.names = names(&bench.store.root()).expect("images can be listed");
        bench
    }

    /// Builds a context in which one file is another one (1), or many are (2), or both (3).
    fn build(&self, root: &Path, what: usize) -> Command {
        for nth in 0..FILES {
            let is_other = (nth == 0 && what & 1 != 0) || ((1..=MANY).contains(&nth) && what & 2 != 0);
            let path = format!("many/{nth}");
            self.context.write(&path, if is_other { "other" } else { "first" });
            // One image, whenever it is built.
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
            fs::File::open(self.context.at(&path)).and_then(|file| file.set_modified(time)).expect("ours");
        }
        let value = format!("V={what}");
        let args = ["--build-arg", "SOURCE_DATE_EPOCH=0", "--build-arg", &value, "-t", "app"];
        kiln(root, &[&["build", "--progress", "plain"][..], &args, &[self.context.path()]].concat())
    }

    /// Lets the commands run once, and writes down what they do.
    fn story(&self, steps: &[Step], at: &Path) -> Story {
        copy(&self.store.root(), at);
        let mut recorder = Recorder::new(at, unseen).expect("the store can be read");
        let mut story = Story {
            disk: Disk::default(),
            marks: vec![recorder.disk().now()],
            names: vec![self.names.clone()],
            last: 0,
        };
        for (number, step) in steps.iter().enumerate() {
            let mut now = story.names[number].clone();
            let command = match step {
                Step::Build | Step::Rebuild => {
                    story.last |= if *step == Step::Build { 1 } else { 2 };
                    now.insert("app:latest".to_owned(), self.golden[story.last].clone());
                    self.build(at, story.last)
                }
                Step::Tag => {
                    let name = format!("kept:{number}");
                    now.insert(name.clone(), now["app:latest"].clone());
                    kiln(at, &["tag", "app", &name])
                }
                Step::Collect => kiln(at, &["gc", "--keep-duration", "0s"]),
                Step::Load => {
                    now.insert("loaded:1".to_owned(), self.loaded.clone());
                    kiln(at, &["load", "-i", text(&self.archive)])
                }
            };
            let traced = observe(&command, &mut recorder).expect("kiln can be traced");
            assert_eq!(traced.code, Some(0), "{step:?}: {}{}", traced.stdout, traced.stderr);
            story.marks.push(recorder.disk().now());
            story.names.push(now);
        }
        story.disk = recorder.finish().expect("all of it can be written down");
        fs::remove_dir_all(at).expect("ours");
        story
    }

    /// What is wrong with a store after a power cut while `story` was at `at`.
    fn complaint(&self, root: &Path, story: &Story, at: usize) -> Result<(), String> {
        run(kiln(root, &["fsck", "--deep"]))?;
        let found = names(root)?;
        let ended = story.marks.iter().rposition(|mark| *mark <= at).unwrap_or(0);
        let before = &story.names[ended];
        // While a command runs, its names may lead to either.
        let after = story.names.get(ended + 1).unwrap_or(before);
        let known: BTreeSet<&String> = before.keys().chain(after.keys()).chain(found.keys()).collect();
        for name in known {
            let leads = found.get(name);
            if leads != before.get(name) && leads != after.get(name) {
                let (old, new) = (before.get(name), after.get(name));
                return Err(format!("{name} leads to {leads:?}, not to {old:?} or {new:?}"));
            }
        }
        let made = image_id(&run(self.build(root, story.last))?);
        if made != self.golden[story.last] {
            return Err(format!("the next build makes {made}, not {}", self.golden[story.last]));
        }
        run(kiln(root, &["fsck", "--deep"]))?;
        run(kiln(root, &["gc", "--keep-duration", "0s"])).map(drop)
    }
}

/// What other programs write, and what no program expects to find again.
fn unseen(path: &Path) -> bool {
    path.starts_with("snapshots/active") && path.components().count() > 2
        || path.to_string_lossy().ends_with("-shm")
}

/// States of the disk that a story may leave, and what is wrong with them.
struct Campaign<'b> {
    bench: &'b Bench,
    machine: Machine,
    random: Random,
    place: PathBuf,
    wrong: Vec<String>,
    looked: usize,
}

impl<'b> Campaign<'b> {
    /// Moves the calling thread to a machine of its own.
    fn new(bench: &'b Bench, random: Random) -> Self {
        let machine = Machine::start(&bench.store.beside("")).expect("root has mounts of its own");
        let place = bench.store.beside("memory");
        fs::create_dir(&place).expect("ours to write");
        machine.mount_memory(&place).expect("root may mount");
        Self { bench, machine, random, place, wrong: Vec::new(), looked: 0 }
    }

    fn story(&self, steps: &[Step]) -> Story {
        self.bench.story(steps, &self.place.join("story"))
    }

    fn look(&mut self, steps: &[Step], story: &Story, states: usize) {
        let first = story.marks[0];
        for _ in 0..states {
            // The end of a command is when its promise counts.
            let at = match self.random.below(3) {
                0 => story.marks[self.random.below(story.marks.len())],
                _ => first + self.random.below(story.disk.now() + 1 - first),
            };
            let image = story.disk.crash(at, &mut self.random);
            let root = self.place.join("store");
            image.write_to(&root).expect("root can make any file");
            self.machine.restart().expect("ours to write");
            if let Err(what) = self.bench.complaint(&root, story, at) {
                self.wrong.push(format!("{steps:?}: {}: {what}", image.story));
                if let Some(keep) = std::env::var_os("KILN_POWER_KEEP") {
                    fs::create_dir_all(&keep).expect("KILN_POWER_KEEP is a directory");
                    let kept = Path::new(&keep).join(format!("{:x}", self.random.seed()));
                    image.write_to(&kept).expect("root can make any file");
                }
            }
            self.looked += 1;
            fs::remove_dir_all(&root).expect("ours");
        }
    }
}

/// All sequences of up to three different commands.
fn sequences() -> Vec<Vec<Step>> {
    let all = [Step::Build, Step::Rebuild, Step::Tag, Step::Collect, Step::Load];
    let mut found: Vec<Vec<Step>> = vec![Vec::new()];
    let mut from = 0;
    for _ in 0..3 {
        let until = found.len();
        for known in from..until {
            for step in all.iter().filter(|step| !found[known].contains(step)).collect::<Vec<_>>() {
                let longer = [&found[known][..], &[*step]].concat();
                found.push(longer);
            }
        }
        from = until;
    }
    found.split_off(1)
}

#[test]
fn a_power_cut_at_any_moment_loses_nothing_that_was_promised() {
    needs_root!();
    let given = std::env::var("KILN_POWER").ok().map(|count| count.parse().expect("KILN_POWER is a number"));
    let mut random = Random::new();
    let (seed, started) = (random.seed(), Instant::now());
    let all = sequences();
    let chosen: Vec<Vec<Step>> = match given {
        Some(_) => all,
        // The longest story, that of both kinds of copies, and another one.
        None => vec![
            vec![Step::Build, Step::Tag, Step::Load, Step::Collect],
            vec![Step::Rebuild, Step::Build],
            all[random.below(all.len())].clone(),
        ],
    };
    let bench = Bench::new();
    let each = given.unwrap_or(STATES).div_ceil(chosen.len());
    let mut campaign = Campaign::new(&bench, random);
    for steps in &chosen {
        let story = campaign.story(steps);
        campaign.look(steps, &story, each);
    }
    let (wrong, looked) = (campaign.wrong, campaign.looked);
    let took = started.elapsed().as_secs_f64();
    println!(
        "{looked} states of {} stories, seed {seed}, {took:.1} s, {} violations",
        chosen.len(),
        wrong.len()
    );
    assert!(wrong.is_empty(), "seed {seed}\n{}", wrong.join("\n"));
}

/// The first command makes the store, and the power goes.
#[test]
fn a_power_cut_while_the_store_is_made_leaves_one_that_can_be_used() {
    needs_root!();
    let (scratch, mut random) = (Store::empty(), Random::new());
    let seed = random.seed();
    let mut machine = Machine::start(&scratch.beside("")).expect("root has mounts of its own");
    let place = scratch.beside("memory");
    fs::create_dir(&place).expect("ours to write");
    machine.mount_memory(&place).expect("root may mount");
    let (root, tar) = (place.join("store"), base_tar(&scratch.beside("")));
    let import = |root: &Path| kiln(root, &["import", text(&tar), "base", "-c", "ENV PATH=/bin"]);
    let context = Context::new(&[("Dockerfile", DOCKERFILE), ("a", "a")]);
    fs::create_dir(&root).expect("ours to write");
    let mut recorder = Recorder::new(&root, unseen).expect("an empty directory can be read");
    let traced = observe(&import(&root), &mut recorder).expect("kiln can be traced");
    assert_eq!(traced.code, Some(0), "{}", traced.stderr);
    let disk = recorder.finish().expect("all of it can be written down");
    fs::remove_dir_all(&root).expect("ours");
    let mut wrong = Vec::new();
    let given = std::env::var("KILN_POWER").ok().map(|count| count.parse().expect("KILN_POWER is a number"));
    for number in 0..given.map_or(40, |count: usize| count / 10) {
        // Each third time when it says that all is done.
        let at = if number % 3 == 0 { disk.now() } else { 1 + random.below(disk.now()) };
        let image = disk.crash(at, &mut random);
        image.write_to(&root).expect("root can make any file");
        machine.restart().expect("ours to write");
        let check = || {
            run(kiln(&root, &["fsck", "--deep"]))?;
            if !names(&root)?.contains_key("base:latest") {
                if at == disk.now() {
                    return Err("the image is not there".to_owned());
                }
                run(import(&root))?;
            }
            run(kiln(&root, &["build", "-t", "app", context.path()]))?;
            run(kiln(&root, &["fsck", "--deep"]))
        };
        wrong.extend(check().err().map(|what| format!("{}: {what}", image.story)));
        fs::remove_dir_all(&root).expect("ours");
    }
    assert!(wrong.is_empty(), "seed {seed}\n{}", wrong.join("\n"));
}

/// The checker is told from a checker that finds nothing: a disk that does not do what it is asked.
#[test]
fn a_disk_that_ignores_syncs_is_found_out() {
    needs_root!();
    let bench = Bench::new();
    let mut campaign = Campaign::new(&bench, Random::of(1));
    for ignored in [Sync::All, Sync::File] {
        let steps = [Step::Build];
        let mut story = campaign.story(&steps);
        story.disk.ignore(ignored);
        campaign.wrong.clear();
        campaign.looked = 0;
        while campaign.wrong.is_empty() && campaign.looked < 200 {
            campaign.look(&steps, &story, 5);
        }
        let looked = campaign.looked;
        assert!(
            !campaign.wrong.is_empty(),
            "{looked} states of a disk that ignores {ignored:?}: all is well"
        );
        println!("{ignored:?} is ignored, which shows after {looked} states: {}", campaign.wrong[0]);
    }
}
