//! `kiln why`, `kiln history builds`, `kiln log`: why steps ran, and what is known of builds that are over.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use kiln_testkit::random::Random;
use serde_json::Value;

use crate::deltas::{are_possible, deltas};
use crate::harness::{Context, Outcome, Store, needs_root, text};

/// What stands behind `why:` in a build's progress, in its order.
fn reasons(build: &Outcome) -> Vec<String> {
    let why = |line: &str| line.split_once(" why: ").map(|(_, why)| why.to_owned());
    build.stderr.lines().filter(|line| line.starts_with('#')).filter_map(why).collect()
}

/// Builds, and expects these reasons, each to begin so.
#[track_caller]
fn check(store: &Store, context: &Context, args: &[&str], expected: &[&str]) {
    let build = store.build(context, args).expect(0);
    let reasons = reasons(&build);
    let alike = reasons.iter().zip(expected).all(|(reason, expected)| reason.starts_with(expected));
    assert!(alike && reasons.len() == expected.len(), "{reasons:#?}\nare not\n{expected:#?}");
}

const PROJECT: &str = "FROM base\nARG VERSION=1\nENV MODE=x\nUSER root\n\
     COPY src /src\n\
     RUN --network=none echo $VERSION > /version\n\
     RUN --network=none --mount=type=bind,source=bound,target=/b cat /b/file\n";

fn project(store: &Store) -> Context {
    base(store, "one");
    let files = [("Dockerfile", PROJECT), ("src/a", "a"), ("src/b", "b"), ("bound/file", "x")];
    let context = Context::new(&files);
    store.build(&context, &[]).expect(0);
    context
}

/// Makes an image `base` whose files differ from those of another label.
fn base(store: &Store, label: &str) {
    let context = Context::new(&[("Dockerfile", &format!("FROM busybox\nCOPY <<EOF /of\n{label}\nEOF\n"))]);
    store.build(&context, &["-q", "-t", "base"]).expect(0);
}

#[test]
fn every_reason_is_told() {
    needs_root!();
    let store = Store::with_busybox();
    let context = project(&store);
    let write = |from: &str, to: &str| context.write("Dockerfile", &PROJECT.replace(from, to));
    let ran = |number: usize| format!("step {number} (");
    // Nothing changed: nothing is said, and there is nothing to say in a first build.
    check(&store, &context, &[], &[]);
    context.write("src/a", "A");
    context.write("src/new", "n");
    check(&store, &context, &[], &["2 of 3 files differ: src/a, src/new added", &ran(2), &ran(3)]);
    fs::set_permissions(context.at("src/b"), fs::Permissions::from_mode(0o640)).expect("ours");
    check(&store, &context, &[], &["1 of 3 files differs: src/b has another mode", &ran(2), &ran(3)]);
    let version = &["--build-arg", "VERSION=2"];
    check(&store, &context, version, &["ARG VERSION changed from \"1\" to \"2\"", "ARG VERSION"]);
    write("MODE=x", "MODE=x MORE=y");
    check(&store, &context, version, &["ENV MORE added: \"y\"", "ENV MORE added"]);
    write("MODE=x", "MODE=x MORE=y\nWORKDIR /tmp");
    // /tmp is there already in busybox, or made: the step itself is new either way.
    let build = store.build(&context, version).expect(0);
    assert!(reasons(&build).iter().any(|why| why.contains("WORKDIR changed from \"/\" to \"/tmp\"")));
    write("MODE=x", "MODE=x MORE=y");
    check(&store, &context, version, &[]);
    write("USER root\n", "ENV MORE=y\nUSER 0\n");
    let build = store.build(&context, version).expect(0);
    assert!(reasons(&build)[0].starts_with("USER changed from"), "{:?}", reasons(&build));
    write("echo", "echo of");
    let build = store.build(&context, version).expect(0);
    let changed =
        "the instruction changed: RUN --network=none echo $VERSION > /version -> RUN --network=none echo of";
    assert!(reasons(&build)[0].contains(changed), "{:?}", reasons(&build));
    context.write("bound/file", "y");
    check(&store, &context, version, &["1 of 1 file differs: bound/file"]);
    base(&store, "two");
    let build = store.build(&context, version).expect(0);
    let why = reasons(&build);
    assert!(why[0].starts_with("base base:latest moved from sha256:"), "{why:?}");
    assert!(why[1..].iter().all(|why| why.contains(" ran again") && !why.contains("base")), "{why:?}");
    check(&store, &context, &["--no-cache"], &["--no-cache"; 3]);
    // What it made is there.
    check(&store, &context, &[], &[]);
    // Another target, or another Dockerfile, is another thing: a first build says nothing.
    context.write("Other", PROJECT.replace("echo", "echo other").as_str());
    check(&store, &context, &["-f", text(&context.at("Other"))], &[]);
    store.sound().expect("sound");
}

#[test]
fn results_that_were_removed_and_steps_that_failed_are_told() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        ("Dockerfile", "FROM busybox\nCOPY file /file\nRUN --network=none grep -q good /file\n"),
        ("file", "bad"),
    ]);
    store.build(&context, &["-o", "type=cacheonly"]).expect(1);
    let again = store.build(&context, &["-o", "type=cacheonly"]).expect(1);
    assert_eq!(reasons(&again), ["it failed the last time"]);
    context.write("file", "good");
    check(&store, &context, &["-o", "type=cacheonly"], &["1 of 1 file differs: file", "step 2 (COPY"]);
    store.ok(&["prune", "--force"]);
    let build = store.build(&context, &["-o", "type=cacheonly"]).expect(0);
    assert_eq!(reasons(&build).len(), 2, "{}", build.stderr);
    for why in reasons(&build) {
        assert!(why.starts_with("its result was removed by prune "), "{why}");
    }
    // A record of removals that is gone: as much as is known.
    store.ok(&["prune", "--force"]);
    fs::remove_file(store.root().join("builds/taken")).expect("it was written");
    let build = store.build(&context, &["-o", "type=cacheonly"]).expect(0);
    assert_eq!(reasons(&build)[0], "nothing differs, but the store has no result of it any more");
}

/// Seconds since 1970.
fn now_unix() -> i64 {
    let now = std::time::UNIX_EPOCH.elapsed().expect("it is later than 1970");
    i64::try_from(now.as_secs()).expect("and not that late")
}

#[test]
fn results_that_gc_removed_are_told_with_the_time() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[
        (
            "Dockerfile",
            "FROM busybox\nRUN --network=none true > /one\nCOPY file /file\nRUN --network=none cp /file /two\n",
        ),
        ("file", "1"),
    ]);
    store.build(&context, &["-t", "app"]).expect(0);
    context.write("file", "2");
    store.build(&context, &["-t", "app"]).expect(0);
    // Of the former image goes what the new one does not stand on.
    let before = now_unix();
    store.ok(&["gc", "--keep-duration", "0s"]);
    let after = now_unix();
    check(&store, &context, &[], &[]);
    context.write("file", "1");
    let build = store.build(&context, &["-o", "type=cacheonly"]).expect(0);
    assert_eq!(build.ran(), ["COPY file /file", "RUN --network=none cp /file /two"]);
    let told = reasons(&build);
    assert!(told[0].starts_with("its result was removed by gc ") && told[0].ends_with(" ago"), "{told:?}");
    let why = store.ok(&["why", "3"]).stdout;
    assert!(why.contains("its result was removed by gc ") && why.contains(" ago"), "{why}");
    let json: Value = serde_json::from_str(&store.ok(&["why", "3", "--json"]).stdout).expect("JSON");
    let reason = &json["steps"][0]["why"][0];
    assert_eq!((&reason["reason"], &reason["by"]), (&"evicted".into(), &"gc".into()), "{json}");
    let at_unix = reason["at_unix"].as_i64().expect("a time");
    assert!((before..=after).contains(&at_unix), "{before} {at_unix} {after}");
}

/// Of all processes of a step together, and of the step that needed most.
#[test]
fn what_a_step_took_and_needed_is_listed() {
    needs_root!();
    let store = Store::with_busybox();
    // Each of the four has read all of it when it says the first of it, and holds it until nobody is left who could
    // want the rest. That is when all have held it for a while, in which somebody
    // looks.
    let hold = "for n in 1 2 3 4; do dd if=/dev/zero bs=24M count=1 2>/dev/null | \
                { head -c 1 > /$n; until [ -s /1 ] && [ -s /2 ] && [ -s /3 ] && [ -s /4 ]; do sleep 0.02; done; sleep 3; } & \
                done; wait";
    let dockerfile = format!("FROM busybox\nRUN --network=none true\nRUN --network=none {hold}\n");
    let context = Context::new(&[("Dockerfile", &dockerfile)]);
    let begun = std::time::Instant::now();
    store.build(&context, &[]).expect(0);
    let whole_ms = u64::try_from(begun.elapsed().as_millis()).expect("less than an age");
    store.build(&context, &[]).expect(0);
    let list: Value = serde_json::from_str(&store.ok(&["history", "builds", "--json"]).stdout).expect("JSON");
    let (cached, ran) = (&list[0], &list[1]);
    let number = |step: usize, field: &str| ran["steps"][step][field].as_u64().unwrap_or_default();
    let mib = |step| number(step, "peak_memory_bytes") >> 20;
    assert!((96..144).contains(&mib(1)) && mib(0) < 24, "{ran}");
    // One after the other, within the time of the build.
    assert!(number(1, "took_ms") >= 1000, "{ran}");
    let took = ran["took_ms"].as_u64().unwrap_or_default();
    assert!(took >= number(0, "took_ms") + number(1, "took_ms") && took <= whole_ms, "{whole_ms}: {ran}");
    assert_eq!(cached["steps"][1].get("peak_memory_bytes"), None, "{cached}");
    // The table has the same, newest first.
    let table = store.ok(&["history", "builds"]).stdout;
    let lines: Vec<&str> = table.lines().collect();
    let column = |line: &str, name: &str| {
        let at = lines[0].find(name).expect("a column");
        line[at..].split_whitespace().next().unwrap_or_default().to_owned()
    };
    let memory = format!("{}MB", (number(1, "peak_memory_bytes") as f64 / 1e6).round());
    assert_eq!(column(lines[2], "MEMORY"), memory, "{table}");
    assert!(column(lines[2], "TOOK").ends_with('s') && column(lines[1], "TOOK").ends_with("ms"), "{table}");
    assert!(!column(lines[1], "MEMORY").ends_with('B'), "nothing ran: {table}");
}

#[test]
fn builds_are_listed_compared_and_have_logs() {
    needs_root!();
    let store = Store::with_busybox();
    store.kiln(&["why"]).expect(4).says(&["nothing was built"]);
    let run = "RUN --network=none --mount=type=secret,id=key echo of $VERSION && cat /run/secrets/key >&2";
    let dockerfile = format!("FROM busybox\nARG VERSION=1\nCOPY file /file\n{run}\n");
    let context = Context::new(&[("Dockerfile", &dockerfile), ("file", "1")]);
    let secret = context.at("secret");
    fs::write(&secret, "very-secret-value").expect("ours");
    let key = format!("id=key,src={}", text(&secret));
    store.build(&context, &["--secret", &key, "-t", "app"]).expect(0);
    store.build(&context, &["--secret", &key]).expect(0);
    context.write("file", "2");
    let arg = "VERSION=https://me:hidden@host/";
    store.build(&context, &["--secret", &key, "--build-arg", arg]).expect(0);
    fs::write(context.at("Dockerfile"), format!("{dockerfile}RUN --network=none exit 3\n")).expect("ours");
    store.build(&context, &["--secret", &key, "--build-arg", arg]).expect(1);

    let list: Value = serde_json::from_str(&store.ok(&["history", "builds", "--json"]).stdout).expect("JSON");
    let list = list.as_array().expect("a list");
    let number_of = |nth: usize| list[list.len() - 1 - nth]["number"].as_u64().expect("a number").to_string();
    assert_eq!(number_of(0), "1");
    let states = |nth: usize| {
        let steps = list[list.len() - 1 - nth]["steps"].as_array().expect("steps").iter();
        steps.map(|step| step["state"].as_str().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(states(0), ["ran", "ran"]);
    assert_eq!(states(1), ["cached", "cached"]);
    assert_eq!(states(3), ["cached", "cached", "failed"]);
    let table = store.ok(&["history", "builds"]).stdout;
    assert!(table.lines().next().is_some_and(|line| line.starts_with("BUILD ")), "{table}");
    assert!(
        table.contains("failed") && table.contains("docker.io/library/app") || table.contains("app:latest"),
        "{table}"
    );

    // Logs are whole, and have no secrets.
    assert_eq!(store.ok(&["log", "1", "3"]).stdout, "of 1\n***");
    let title = format!("==> [3/3] {run} <==\n");
    assert_eq!(store.ok(&["log", "1"]).stdout, format!("{title}of 1\n***\n"));
    store.kiln(&["log", "2", "3"]).expect(4).says(&["came from the cache"]);
    store.kiln(&["log", "9"]).expect(4).says(&["no record of build 9", "builds 1 to 4 are known"]);
    store.kiln(&["log", "1", "7"]).expect(4).says(&["build 1 has no step 7"]);

    let why = store.ok(&["why", "--build", "3"]).stdout;
    assert!(why.contains("1 of 1 file differs: file"), "{why}");
    assert!(why.contains("ARG VERSION changed from \"1\" to \"https://***@host/\""), "{why}");
    let step: Value =
        serde_json::from_str(&store.ok(&["why", "2", "--build", "3", "--json"]).stdout).expect("JSON");
    assert_eq!(step["steps"][0]["why"][0]["changes"]["first"][0]["path"], "file");
    let diff = store.ok(&["why", "--diff", "2", "3"]).stdout;
    assert!(diff.contains("1 of 1 file differs: file") && diff.contains("ARG VERSION changed"), "{diff}");
    assert_eq!(store.ok(&["why", "--diff", "1", "2"]).stdout, "the steps are the same\n");
    let diff: Value =
        serde_json::from_str(&store.ok(&["why", "--diff", "3", "4", "--json"]).stdout).expect("JSON");
    assert_eq!(diff["steps"][0]["change"], "added", "{diff}");

    // Nothing of it is for others, and nothing of it has a secret.
    let mode = fs::metadata(store.root().join("builds")).expect("made").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    let record = fs::read_to_string(store.root().join("builds/log")).expect("written");
    assert!(!record.contains("hidden") && !record.contains("very-secret"), "{record}");
}

#[test]
fn a_damaged_history_changes_no_build() {
    needs_root!();
    let store = Store::with_busybox();
    let context = project(&store);
    let damage = |what: &dyn Fn(&std::path::Path)| {
        let mut open = vec![store.root().join("builds")];
        while let Some(dir) = open.pop() {
            for entry in fs::read_dir(dir).expect("made").map(|entry| entry.expect("listed").path()) {
                if entry.is_dir() { open.push(entry) } else { what(&entry) }
            }
        }
    };
    damage(&|file| fs::write(file, [0_u8; 100]).expect("ours"));
    context.write("src/a", "other");
    store.build(&context, &[]).expect(0);
    store.ok(&["history", "builds"]);
    context.write("src/a", "yet another");
    check(&store, &context, &[], &["1 of 2 files differs: src/a", "step 2 (COPY", "step 3 (RUN"]);
    // A place where nothing can be written.
    fs::remove_dir_all(store.root().join("builds")).expect("ours");
    fs::write(store.root().join("builds"), "").expect("ours");
    context.write("src/a", "one more");
    check(&store, &context, &[], &[]);
    store.sound().expect("sound");
}

/// What the property below may change, one at a time.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Inputs {
    files: Files,
    argument: usize,
    default: usize,
    variable: usize,
    user: usize,
    command: usize,
    destination: usize,
    host: usize,
    base: usize,
}

/// What stands at each name.
type Files = BTreeMap<String, Node>;

#[derive(Clone, PartialEq, Eq, Hash)]
enum Node {
    /// Its content and its mode.
    File(usize, u32),
    /// Its target.
    Link(usize),
}

impl Inputs {
    fn dockerfile(&self) -> String {
        let Self { default, variable, user, command, destination, .. } = self;
        format!(
            "FROM base AS tools\nARG GIVEN\nARG DEFAULT={default}\nENV VARIABLE={variable}\nWORKDIR /w\n\
             USER {user}\nRUN --network=none true {command}\n\
             FROM busybox\nCOPY src /src\nCOPY --from=tools /w /w\nCOPY single /single{destination}\n"
        )
    }

    /// Makes the context that these are of the one that has the files of `before`.
    fn write(&self, before: &Files, context: &Context) {
        context.write("Dockerfile", &self.dockerfile());
        // Directories stay: one that goes with its last file would be another thing that changed. So do files that
        // are the same, for a copy with another time is another copy.
        for (name, _) in before.iter().filter(|(name, node)| self.files.get(*name) != Some(*node)) {
            fs::remove_file(context.at(name)).expect("it was written");
        }
        for (name, node) in self.files.iter().filter(|(name, node)| before.get(*name) != Some(*node)) {
            match node {
                Node::File(content, mode) => {
                    // All contents are of one length: nothing but content may tell.
                    context.write(name, &format!("{content:08}"));
                    fs::set_permissions(context.at(name), fs::Permissions::from_mode(*mode)).expect("ours");
                }
                Node::Link(target) => {
                    let path = context.at(name);
                    fs::create_dir_all(path.parent().expect("in the context")).expect("ours");
                    symlink(format!("/target{target}"), path).expect("ours");
                }
            }
        }
    }

    /// Changes one thing to what it never was; what the explanation has to begin and to end with.
    fn change(&mut self, random: &mut Random, unique: usize) -> (String, String) {
        let exactly = |text: String| (text, String::new());
        let variable = |kind: &str, name: &str, place: &mut usize| {
            let old = std::mem::replace(place, unique);
            exactly(format!("{kind} {name} changed from \"{old}\" to \"{unique}\""))
        };
        let before = self.clone();
        match random.below(20) {
            0 => variable("ARG", "GIVEN", &mut self.argument),
            1 => variable("ARG", "DEFAULT", &mut self.default),
            2 => variable("ENV", "VARIABLE", &mut self.variable),
            3 => {
                let old = std::mem::replace(&mut self.user, unique);
                exactly(format!("USER changed from \"{old}\" to \"{unique}\""))
            }
            4 => {
                self.command = unique;
                let run = |command| format!("RUN --network=none true {command}");
                exactly(format!("the instruction changed: {} -> {}", run(before.command), run(unique)))
            }
            5 => {
                self.destination = unique;
                let copy = |place| format!("COPY single /single{place}");
                exactly(format!("the instruction changed: {} -> {}", copy(before.destination), copy(unique)))
            }
            6 => {
                self.host = unique;
                let old = before.host;
                exactly(format!("host changed from \"there{old}\" to \"there{unique}\""))
            }
            7 => {
                self.base = unique;
                exactly("base base:latest moved from sha256:".to_owned())
            }
            8 => {
                let name = format!("src/dir/new{unique}");
                self.files.insert(name.clone(), Node::File(unique, 0o644));
                ("1 of ".to_owned(), format!(" differs: {name} added"))
            }
            _ => {
                let names: Vec<String> = self.files.keys().cloned().collect();
                let name = names[random.below(names.len())].clone();
                let node = self.files.get_mut(&name).expect("it is one of them");
                let what = match (node.clone(), random.below(4)) {
                    // The copy that names it must find it.
                    (Node::File(..), 0) if name != "single" && names.len() > 6 => {
                        self.files.remove(&name);
                        " removed"
                    }
                    (Node::File(..), 1) if name != "single" => {
                        *node = Node::Link(unique);
                        " is of another type"
                    }
                    (Node::File(content, mode), 2) => {
                        *node = Node::File(content, 0o600 + (mode + 1 + unique as u32) % 0o100);
                        " has another mode"
                    }
                    (Node::File(_, mode), _) => {
                        *node = Node::File(unique, mode);
                        ""
                    }
                    (Node::Link(_), 0) => {
                        *node = Node::File(unique, 0o644);
                        " is of another type"
                    }
                    (Node::Link(_), _) => {
                        *node = Node::Link(unique);
                        ""
                    }
                };
                ("1 of ".to_owned(), format!(" differs: {name}{what}"))
            }
        }
    }
}

/// Of everything that a build depends on one thing is changed, and the explanation names that and nothing
/// else, but for the steps that ran because of it.
#[test]
fn the_one_thing_that_changed_is_named_and_nothing_else() {
    needs_root!();
    let store = Store::with_busybox();
    let context = Context::new(&[]);
    let mut random = Random::new();
    let seed = random.seed();
    let names = ["src/a", "src/b", "src/dir/c", "src/dir/deep/d", "src/e", "single"].map(str::to_owned);
    // So many that the copy of them is a delta, most often.
    let names = names.into_iter().chain((0..80).map(|nth| format!("src/dir/many/{nth}")));
    let mut inputs = Inputs {
        files: names.map(|name| (name, Node::File(0, 0o644))).collect(),
        argument: 0,
        default: 0,
        variable: 0,
        user: 0,
        command: 0,
        destination: 0,
        host: 0,
        base: 0,
    };
    inputs.files.insert("src/link".to_owned(), Node::Link(0));
    let mut written = Files::new();
    let mut build = |inputs: &Inputs| {
        inputs.write(&written, &context);
        written.clone_from(&inputs.files);
        let given = format!("GIVEN={}", inputs.argument);
        let host = format!("there{}:10.0.0.1", inputs.host);
        store.build(&context, &["--build-arg", &given, "--add-host", &host, "-o", "type=cacheonly"]).expect(0)
    };
    base(&store, "0");
    build(&inputs);
    let mut seen = HashSet::from([inputs.files.clone()]);
    let mut cases = 0;
    let mut unique = 0;
    while cases < 200 {
        unique += 1;
        let before = inputs.clone();
        let (start, end) = inputs.change(&mut random, unique);
        if inputs == before || (inputs.files != before.files && !seen.insert(inputs.files.clone())) {
            // As it was once: that is in the cache.
            inputs = before;
            continue;
        }
        if inputs.base != before.base {
            base(&store, &unique.to_string());
        }
        let built = build(&inputs);
        let all = reasons(&built);
        assert!(!all.is_empty(), "seed {seed}: nothing ran for {start}…{end}\n{}", built.stderr);
        let told: Vec<&str> = all.iter().flat_map(|why| why.split("; ")).collect();
        let is_it = |why: &&&str| why.starts_with(&start) && why.ends_with(&end);
        assert!(told.iter().any(|why| is_it(&why)), "seed {seed}: {start}…{end} is not told: {all:#?}");
        let others = told.iter().filter(|why| !is_it(why) && !why.ends_with(" ran again"));
        assert_eq!(others.collect::<Vec<_>>(), Vec::<&&str>::new(), "seed {seed}: beside {start}…{end}");
        cases += 1;
    }
    let deltas = deltas(&store).len();
    assert!(deltas > cases / 8 || !are_possible(&store), "seed {seed}: {deltas} copies were deltas");
}
