//! `--cache-to` and `--cache-from`: results of one store's builds in another one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use kiln_testkit::random::Random;
use tempfile::TempDir;

use crate::harness::{Context, Outcome, Store, needs_root, text};

/// Twenty steps in three stages: 17 RUNs, of which 7 are not part of the image, and three COPYs.
pub(crate) fn project() -> Context {
    let run = |stage: &str, nth: usize| {
        format!("RUN --network=none mkdir -p /{stage} && echo {stage}{nth} > /{stage}/{nth}\n")
    };
    let runs = |stage: &str, count| (0..count).map(|nth| run(stage, nth)).collect::<String>();
    let dockerfile = format!(
        "FROM busybox AS tools\n{}FROM busybox AS made\nCOPY src /src\n{}\
         FROM busybox\nCOPY src/a /a\n{}COPY --from=made /made /made\n{}",
        runs("tools", 2),
        runs("made", 5),
        runs("app", 5),
        // A stage that nobody reads from is not built: this one is read.
        "RUN --network=none --mount=type=bind,from=tools,target=/t cat /t/tools/1 > /tool\n",
    );
    let more = runs("end", 5);
    Context::new(&[("Dockerfile", &(dockerfile + &more)), ("src/a", "a"), ("src/b", "b")])
}

/// Four steps.
pub(crate) fn small() -> Context {
    let dockerfile = "FROM busybox\nCOPY a /a\nRUN --network=none echo b > /b\n\
         RUN --network=none cp /b /c\nCOPY a /d\n";
    Context::new(&[("Dockerfile", dockerfile), ("a", "a\n")])
}

/// A directory that is a cache, and the image that all stores build on.
pub(crate) struct Cache {
    dir: TempDir,
}

impl Cache {
    pub(crate) fn new() -> Self {
        let cache = Self { dir: tempfile::tempdir().expect("temporary directories can be made") };
        // An import has its own time, and so a digest of its own.
        Store::with_busybox().ok(&["save", "-o", text(&cache.base()), "busybox"]);
        cache
    }

    fn base(&self) -> PathBuf {
        self.dir.path().join("base.tar")
    }

    /// A store without results.
    pub(crate) fn store(&self) -> Store {
        let store = Store::empty();
        store.ok(&["load", "-i", text(&self.base())]);
        store
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    pub(crate) fn to(&self, more: &str) -> String {
        format!("type=local,dest={}{more}", self.path().display())
    }

    pub(crate) fn from(&self, more: &str) -> String {
        format!("type=local,src={}{more}", self.path().display())
    }

    /// The files of a kind (`records`, `blobs`), sorted.
    fn files(&self, kind: &str) -> Vec<PathBuf> {
        let mut files = Vec::new();
        list(&self.path().join("kiln-cache-1").join(kind), &mut files);
        files.sort();
        files
    }
}

pub(crate) fn list(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            list(&entry.path(), files);
        } else {
            files.push(entry.path());
        }
    }
}

pub(crate) fn id(build: &Outcome) -> String {
    let line = build.stdout.lines().find_map(|line| line.strip_prefix("image "));
    line.and_then(|line| line.split([',', ' ']).next()).expect("the build says its ID").to_owned()
}

pub(crate) fn build(store: &Store, context: &Context, flags: &[&str]) -> Outcome {
    store.build(context, flags).expect(0)
}

/// What a store without results makes of `context` with `from`.
fn from_nothing(cache: &Cache, context: &Context, from: &str) -> (Store, Outcome) {
    let store = cache.store();
    let built = build(&store, context, &["-t", "app", "--cache-from", from]);
    (store, built)
}

/// Every sentence that a build warns with.
pub(crate) fn warnings(build: &Outcome) -> Vec<&str> {
    build.stderr.lines().filter_map(|line| line.strip_prefix("warning: ")).collect()
}

#[test]
fn an_empty_store_runs_nothing_and_gets_the_same_image() {
    needs_root!();
    let (context, cache) = (project(), Cache::new());
    let first = build(&cache.store(), &context, &["--cache-to", &cache.to(",mode=max")]);
    assert_eq!((first.ran().len(), warnings(&first)), (21, vec![]));
    let (store, again) = from_nothing(&cache, &context, &cache.from(""));
    assert_eq!((again.ran(), warnings(&again)), (vec![], vec![]));
    // Bytes, times and all.
    assert_eq!(id(&again), id(&first));
    assert_eq!(store.shell("app", "cat /made/4 /end/4 /tool"), "made4\nend4\ntools1");
    // The history says where it came from.
    let label = format!("directory {}", cache.path().display());
    let why = store.ok(&["why"]).stdout;
    assert!(why.contains(&format!("cached, from {label}")), "{why}");
    assert!(again.stderr.contains(&format!("CACHED from {label}")), "{}", again.stderr);
    // What came is here now.
    fs::remove_dir_all(cache.path()).expect("ours");
    let alone = build(&store, &context, &[]);
    assert_eq!((alone.ran(), id(&alone)), (vec![], id(&first)));
    assert_eq!(store.sound(), Ok(()));
}

/// A base counts by its files: its config may have another time, as imports have, and other labels.
#[test]
fn machines_that_imported_the_same_tar_share_results() {
    needs_root!();
    let (context, cache) = (small(), Cache::new());
    let first = build(&Store::with_busybox(), &context, &["--cache-to", &cache.to(",mode=max")]);
    assert_eq!(first.ran().len(), 4);
    let store = Store::with_busybox();
    let labelled = Context::new(&[("Dockerfile", "FROM busybox\nLABEL machine=two\n")]);
    build(&store, &labelled, &["-t", "busybox"]);
    let again = build(&store, &context, &["-t", "app", "--cache-from", &cache.from("")]);
    assert_eq!((again.ran(), warnings(&again)), (vec![], vec![]));
    assert_ne!(id(&again), id(&first));
    assert_eq!(store.shell("app", "cat /a /b /c /d"), "a\nb\nb\na");
    let config = store.ok(&["inspect", "app"]).stdout;
    assert!(config.contains("\"machine\": \"two\""), "{config}");
    assert_eq!(store.sound(), Ok(()));
    // What the base's config says to a process is in the process's own step.
    let other = Context::new(&[("Dockerfile", "FROM busybox\nENV machine=two\n")]);
    build(&store, &other, &["-t", "busybox"]);
    assert_eq!(build(&store, &context, &[]).ran().len(), 3, "from the first RUN on");
}

#[test]
fn only_layers_that_the_result_needs_are_fetched() {
    needs_root!();
    let (context, cache) = (project(), Cache::new());
    build(&cache.store(), &context, &["--cache-to", &cache.to(",mode=max")]);
    // Without what is not part of the image nothing is missed.
    let (store, _) = from_nothing(&cache, &context, &cache.from(""));
    let layers = store.inspect("app")["RootFS"]["Layers"].as_array().expect("a list").len();
    assert_eq!(store.snapshots(), layers, "snapshots of other stages are there, too");
    // Fewer files are read than there are.
    let blobs = cache.files("blobs").len();
    assert!(blobs > layers, "{blobs} blobs");
}

#[test]
fn min_has_the_steps_of_the_image_and_max_has_all() {
    needs_root!();
    let (context, min, max) = (project(), Cache::new(), Cache::new());
    let store = min.store();
    build(&store, &context, &["--cache-to", &min.to(""), "--cache-to", &max.to(",mode=max")]);
    assert!(min.files("records").len() < max.files("records").len());
    assert!(min.files("blobs").len() < max.files("blobs").len());
    // What other stages made is not asked for: what stands on them is known by what they say.
    let (_, built) = from_nothing(&min, &context, &min.from(""));
    assert_eq!(built.ran(), [""; 0]);
    // When they say something else and make the same, only they are run.
    let dockerfile = fs::read_to_string(context.at("Dockerfile")).expect("ours");
    context.write("Dockerfile", &dockerfile.replacen("mkdir -p /made", "mkdir  -p /made", 1));
    let (_, built) = from_nothing(&min, &context, &min.from(""));
    let ran = built.ran();
    assert!(
        ran.len() == 6 && ran.iter().all(|step| step.contains("/made") || step == "COPY src /src"),
        "{ran:?}"
    );
    let (_, built) = from_nothing(&min, &context, &max.from(""));
    assert!(!built.ran().contains(&"COPY src /src".to_owned()), "{:?}", built.ran());
}

#[test]
fn what_is_there_is_not_written_again() {
    needs_root!();
    let (context, cache) = (project(), Cache::new());
    let store = cache.store();
    let to = cache.to(",mode=max");
    build(&store, &context, &["--cache-to", &to]);
    let stamps = || {
        let files = [cache.files("blobs"), cache.files("records")].concat();
        let stamp = |path: PathBuf| (fs::metadata(&path).expect("there").modified().expect("a time"), path);
        files.into_iter().map(stamp).collect::<Vec<_>>()
    };
    let before = stamps();
    build(&store, &context, &["--cache-to", &to]);
    assert_eq!(stamps(), before);
    // Another machine that took everything from it has nothing to add, and one step more adds that.
    let (other, _) = from_nothing(&cache, &context, &cache.from(""));
    build(&other, &context, &["--cache-from", &cache.from(""), "--cache-to", &to]);
    assert_eq!(stamps(), before);
    let dockerfile = fs::read_to_string(context.at("Dockerfile")).expect("ours");
    context.write("Dockerfile", &format!("{dockerfile}RUN --network=none echo more > /more\n"));
    build(&other, &context, &["--cache-to", &to]);
    let after = stamps();
    let new = after.iter().filter(|stamp| !before.contains(stamp));
    let new: Vec<bool> =
        new.map(|(_, path)| path.starts_with(cache.path().join("kiln-cache-1/blobs"))).collect();
    assert_eq!((new.len(), new.iter().filter(|is_blob| **is_blob).count()), (2, 1));
}

#[test]
fn scopes_do_not_see_each_other() {
    needs_root!();
    let (context, cache) = (small(), Cache::new());
    build(&cache.store(), &context, &["--cache-to", &cache.to(",mode=max,scope=feature/x")]);
    let blobs = cache.files("blobs").len();
    let (other, built) = from_nothing(&cache, &context, &cache.from(",scope=main"));
    assert_eq!(built.ran().len(), 4);
    let (_, built) = from_nothing(&cache, &context, &cache.from(",scope=feature/x"));
    assert_eq!(built.ran(), [""; 0]);
    // Of what is the same in both, the bytes are there once.
    build(&other, &context, &["--cache-to", &cache.to(",mode=max,scope=main")]);
    assert!(cache.files("blobs").len() < 2 * blobs);
    assert_eq!(fs::read_dir(cache.path().join("kiln-cache-1/records")).expect("there").count(), 2);
}

/// The record of the step with `words` in its title, in `scope`.
fn record_of(cache: &Cache, scope: &str, words: &str) -> serde_json::Value {
    let files = cache.files(&format!("records/{scope}"));
    let read = |path: PathBuf| serde_json::from_slice(&fs::read(path).expect("ours")).expect("JSON");
    let is_it = |record: &serde_json::Value| record["title"].as_str().is_some_and(|it| it.contains(words));
    files.into_iter().map(read).find(is_it).expect("it was exported")
}

/// Writes `record` where whoever asks `scope` for its key finds it.
fn put_record(cache: &Cache, scope: &str, record: &serde_json::Value) {
    let key = record["key"].as_str().and_then(|key| key.strip_prefix("sha256:")).expect("a digest");
    let dir = cache.path().join(format!("kiln-cache-1/records/{scope}/{}", &key[..2]));
    fs::create_dir_all(&dir).expect("ours");
    fs::write(dir.join(key), record.to_string()).expect("ours");
}

/// A project with these two steps, on each other.
fn two_steps(first: &str, second: &str) -> Context {
    let dockerfile = format!("FROM busybox\nRUN --network=none {first}\nRUN --network=none {second}\n");
    Context::new(&[("Dockerfile", &dockerfile)])
}

/// What main and a branch of it build, and a cache that the branch may write to.
fn main_and_branch() -> (Cache, Context, Context) {
    let cache = Cache::new();
    let main = two_steps("echo good > /made", "cp /made /out");
    let branch = two_steps("echo evil > /made", "cp /made /out");
    for (context, scope) in [(&main, "known"), (&branch, "pr-12")] {
        build(&cache.store(), context, &["--cache-to", &cache.to(&format!(",mode=max,scope={scope}"))]);
    }
    (cache, main, branch)
}

/// A record says by which key its users go on: the branch's says main's.
#[test]
fn a_scope_that_says_its_files_are_those_of_another_step_is_believed_by_nobody_else() {
    needs_root!();
    let (cache, main, branch) = main_and_branch();
    let mut lie = record_of(&cache, "pr-12", "echo evil");
    lie["canonical"] = record_of(&cache, "known", "echo good")["canonical"].clone();
    put_record(&cache, "pr-12", &lie);
    let (store, from) = (cache.store(), cache.from(",scope=pr-12"));
    // Its second step runs on its own files, as if they were main's.
    let built = build(&store, &branch, &["-t", "branch", "--cache-from", &from]);
    assert_eq!(built.ran(), ["RUN --network=none cp /made /out"]);
    assert_eq!(store.shell("branch", "cat /out"), "evil");
    let built = build(&store, &main, &["-t", "main"]);
    assert_eq!((built.ran().len(), store.shell("main", "cat /out").as_str()), (2, "good"));
    // Who believed it has it, whatever becomes of the cache.
    fs::remove_dir_all(cache.path()).expect("ours");
    let built = build(&store, &branch, &["--cache-from", &from]);
    assert_eq!((built.ran(), warnings(&built)), (vec![], vec![]));
    assert_eq!(store.sound(), Ok(()));
}

/// A copy out of such files is known by their content; that they are main's is hearsay.
#[test]
fn a_copy_out_of_what_a_scope_gave_is_not_one_out_of_what_it_says_that_is() {
    needs_root!();
    let cache = Cache::new();
    let project = |first: &str, more: &str| {
        let dockerfile = format!(
            "FROM busybox AS made\nRUN --network=none {first}\n{more}FROM busybox\nCOPY --from=made /made /out\n"
        );
        Context::new(&[("Dockerfile", &dockerfile)])
    };
    let (main, branch) = (project("echo good > /made", ""), project("echo evil > /made", ""));
    for (context, scope) in [(&main, "known"), (&branch, "pr-12")] {
        build(&cache.store(), context, &["--cache-to", &cache.to(&format!(",mode=max,scope={scope}"))]);
    }
    let mut lie = record_of(&cache, "pr-12", "echo evil");
    lie["canonical"] = record_of(&cache, "known", "echo good")["canonical"].clone();
    fs::remove_dir_all(cache.path().join("kiln-cache-1/records/pr-12")).expect("ours");
    put_record(&cache, "pr-12", &lie);
    let store = cache.store();
    // Made here, of the same content: what the copy is found as.
    build(&store, &project("echo evil > /made && true", ""), &[]);
    let built = build(&store, &branch, &["-t", "branch", "--cache-from", &cache.from(",scope=pr-12")]);
    assert_eq!((built.ran(), store.shell("branch", "cat /out").as_str()), (vec![], "evil"));
    build(&store, &main, &["-t", "main"]);
    assert_eq!(store.shell("main", "cat /out"), "good");
}

/// The plain way: an answer to main's own step.
#[test]
fn what_a_scope_says_of_a_step_is_not_asked_for_by_builds_that_do_not_name_it() {
    needs_root!();
    let (cache, main, _) = main_and_branch();
    let mut lie = record_of(&cache, "pr-12", "echo evil");
    let good = record_of(&cache, "known", "echo good");
    for field in ["key", "canonical"] {
        lie[field] = good[field].clone();
    }
    put_record(&cache, "pr-12", &lie);
    let (store, from) = (cache.store(), cache.from(",scope=pr-12"));
    let both = ["-t", "branch", "--cache-from", &cache.from(",scope=main"), "--cache-from", &from];
    let built = build(&store, &main, &both);
    assert_eq!((built.ran().len(), store.shell("branch", "cat /out").as_str()), (1, "evil"));
    // Neither without scopes, nor with one of the two.
    let built = build(&store, &main, &["-t", "main", "--cache-from", &cache.from(",scope=main")]);
    assert_eq!((built.ran().len(), store.shell("main", "cat /out").as_str()), (2, "good"));
    let built = build(&store, &main, &["-t", "main"]);
    assert_eq!((built.ran(), store.shell("main", "cat /out").as_str()), (vec![], "good"));
    // What was made here goes before what somebody says.
    build(&store, &main, &both);
    assert_eq!(store.shell("branch", "cat /out"), "good");
    // A cache without a scope is this store's own: what came from it is here for all.
    let own = cache.store();
    put_record(&cache, "default", &lie);
    assert_eq!(build(&own, &main, &["--cache-from", &cache.from("")]).ran().len(), 1);
    let built = build(&own, &main, &["-t", "main"]);
    assert_eq!((built.ran(), own.shell("main", "cat /out").as_str()), (vec![], "evil"));
    assert_eq!(store.sound(), Ok(()));
}

#[test]
fn a_result_from_elsewhere_does_not_replace_one_that_is_here() {
    needs_root!();
    let context = Context::new(&[(
        "Dockerfile",
        "FROM busybox\nRUN --network=none cat /proc/sys/kernel/random/uuid > /id\n",
    )]);
    let cache = Cache::new();
    build(&cache.store(), &context, &["--cache-to", &cache.to("")]);
    let store = cache.store();
    let mine = build(&store, &context, &[]);
    let again = build(&store, &context, &["--cache-from", &cache.from("")]);
    assert_eq!((again.ran(), id(&again)), (vec![], id(&mine)));
    // Nor does the first answer in a cache change, unless all was run on purpose.
    let record = || fs::read(&cache.files("records")[0]).expect("one record");
    let first = record();
    build(&store, &context, &["--cache-to", &cache.to("")]);
    assert_eq!(record(), first);
    build(&store, &context, &["--no-cache", "--cache-to", &cache.to("")]);
    assert_ne!(record(), first);
}

/// Builds with a cache that is as `change` left it: the right image, and no other exit code.
#[track_caller]
fn check_damaged(context: &Context, cache: &Cache, first: &Outcome, what: &str) -> Outcome {
    let (store, built) = from_nothing(cache, context, &cache.from(""));
    assert_eq!(store.shell("app", "cat /a /b /c /d"), "a\nb\nb\na", "{what}");
    assert_eq!(built.code, first.code, "{what}");
    assert_eq!(store.sound(), Ok(()), "{what}");
    built
}

#[test]
fn damaged_records_and_blobs_are_a_warning_and_a_miss() {
    needs_root!();
    let (context, cache) = (small(), Cache::new());
    let store = cache.store();
    let to = cache.to(",mode=max");
    let first = build(&store, &context, &["--cache-to", &to]);
    let mut random = Random::of(12);
    for kind in ["records", "blobs"] {
        let whole = cache.files(kind).into_iter().map(|path| (fs::read(&path).expect("ours"), path));
        let whole: Vec<(Vec<u8>, PathBuf)> = whole.collect();
        // All of them, each in one bit, cut off, longer, or something else altogether.
        for damage in 0..4 {
            for (bytes, path) in &whole {
                let mut bytes = bytes.clone();
                match damage {
                    0 => {
                        let at = random.below(bytes.len());
                        bytes[at] ^= 1 << random.below(8);
                    }
                    1 => bytes.truncate(random.below(bytes.len())),
                    2 => bytes.extend_from_slice(b"{}"),
                    _ => bytes = vec![b'['; 300 << 10],
                }
                fs::write(path, bytes).expect("ours");
            }
            let built = check_damaged(&context, &cache, &first, &format!("{kind} {damage}"));
            // A bit of a time or a title may be another time or title.
            let warned = warnings(&built);
            assert!(damage == 0 || (1..=5).contains(&warned.len()), "{kind} {damage}: {warned:?}");
        }
        // Whoever has it right mends what answered: a result that is found in one way is not looked for in
        // others, and what answers those is mended by who asks for it.
        build(&store, &context, &["--cache-to", &to]);
        let is_mended = |(bytes, path): &&(Vec<u8>, PathBuf)| fs::read(path).expect("ours") == *bytes;
        let mended = whole.iter().filter(is_mended).count();
        assert!(mended + 1 >= whole.len(), "{kind}: {mended} of {}", whole.len());
        let (_, built) = from_nothing(&cache, &context, &cache.from(""));
        assert_eq!((built.ran(), warnings(&built)), (Vec::new(), Vec::new()), "{kind}");
    }
}

#[test]
fn hostile_records_lead_nowhere() {
    needs_root!();
    let (context, cache) = (small(), Cache::new());
    let first = build(&cache.store(), &context, &["--cache-to", &cache.to(",mode=max")]);
    let records: Vec<(PathBuf, serde_json::Value)> = cache
        .files("records")
        .into_iter()
        .map(|path| (path.clone(), serde_json::from_slice(&fs::read(&path).expect("ours")).expect("JSON")))
        .collect();
    // The lower ones are here.
    fn last(record: &mut serde_json::Value) -> &mut serde_json::Value {
        record["layers"].as_array_mut().and_then(|layers| layers.last_mut()).expect("there are layers")
    }
    type Change = fn(&mut serde_json::Value);
    let changes: [(&str, Change); 6] = [
        ("another diff ID", |record| last(record)["diffId"] = format!("sha256:{}", "1".repeat(64)).into()),
        ("a path for a blob", |record| last(record)["blob"] = "sha256:../../../../etc/passwd".into()),
        ("a huge size", |record| last(record)["blobBytes"] = (1_u64 << 60).into()),
        ("a small size", |record| last(record)["blobBytes"] = 1.into()),
        ("another version", |record| record["version"] = 2.into()),
        ("another key", |record| record["key"] = format!("sha256:{}", "2".repeat(64)).into()),
    ];
    for (what, change) in changes {
        for (path, record) in &records {
            let mut record = record.clone();
            change(&mut record);
            fs::write(path, record.to_string()).expect("ours");
        }
        let built = check_damaged(&context, &cache, &first, what);
        assert_eq!(built.ran().len(), 4, "{what}");
        let warned = warnings(&built);
        assert!((1..=5).contains(&warned.len()), "{what}: {warned:?}");
    }
}

#[test]
fn an_export_that_fails_is_a_warning() {
    needs_root!();
    let context = Context::new(&[("Dockerfile", "FROM busybox\nRUN --network=none echo x > /x\n")]);
    let cache = Cache::new();
    // A file in its place: root may write anywhere else.
    fs::write(cache.path(), "").expect("ours");
    let store = cache.store();
    let built =
        build(&store, &context, &["-t", "app", "--cache-to", &cache.to(""), "--cache-from", &cache.from("")]);
    let warned = warnings(&built);
    assert_eq!(warned.len(), 2, "{warned:?}");
    assert!(warned[0].starts_with("the build goes on without the cache of directory "), "{warned:?}");
    assert!(warned[1].starts_with("the cache is not exported to directory "), "{warned:?}");
    assert_eq!(store.shell("app", "cat /x"), "x");
    fs::remove_file(cache.path()).expect("ours");
    fs::create_dir(cache.path()).expect("ours");
    fs::set_permissions(cache.path(), fs::Permissions::from_mode(0o500)).expect("ours");
    build(&store, &context, &["--cache-to", &cache.to("")]);
}

#[test]
fn an_image_carries_the_cache_of_its_steps() {
    needs_root!();
    let (context, cache) = (project(), Cache::new());
    let first = cache.store();
    let built = build(&first, &context, &["-t", "app", "--cache-to", "type=inline"]);
    let plain = build(&first, &context, &[]);
    assert_ne!(id(&built), id(&plain), "its config has the records");
    let tar = first.beside("app.tar");
    first.ok(&["save", "-o", text(&tar), "app"]);
    let store = cache.store();
    store.ok(&["load", "-i", text(&tar)]);
    let again = build(&store, &context, &["--cache-from", "app", "--cache-to", "type=inline"]);
    assert_eq!((again.ran(), warnings(&again)), (vec![], vec![]));
    assert_eq!(store.inspect(&id(&again))["RootFS"], store.inspect("app")["RootFS"]);
    // What is built on it does not pass on what it says of itself.
    store.image("child", "FROM app\nRUN --network=none true\n");
    assert!(store.config("app").get("kiln.cache.v1").is_some());
    assert!(store.config("child").get("kiln.cache.v1").is_none());
    let built =
        build(&store, &context, &["--cache-from", "child", "--cache-from", "type=inline,ref=nobody/has:it"]);
    assert_eq!(built.ran(), [""; 0]);
}

#[test]
fn what_is_no_cache_is_said_without_its_passwords() {
    let (store, context) = (Store::empty(), Context::new(&[("Dockerfile", "FROM scratch\n")]));
    for (flag, value, said) in [
        ("--cache-to", "type=local", "--cache-to: type=local needs dest=…"),
        (
            "--cache-from",
            "type=s3,bucket=b,secret_access_kye=SECRET",
            "has no attribute \"secret_access_kye\"",
        ),
        ("--cache-from", "type=s3,\"bucket=b,secret_access_key=SECRET", "quotes stand around a whole field"),
        ("--cache-to", "type=registry", "--cache-to: type=registry needs ref=…"),
    ] {
        let outcome = store.build(&context, &[flag, value]).expect(2);
        assert!(!outcome.stderr.contains("SECRET"), "{}", outcome.stderr);
        outcome.says(&[said]);
    }
}
