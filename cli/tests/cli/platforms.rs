//! `kiln build --platform`: for another machine, and for several at once.

use std::fs;
use std::path::Path;

use kiln_oci::{Digest, Platform};
use serde_json::Value;

use crate::harness::{Context, Outcome, Store, needs_root, text};

const USAGE: i32 = 2;
const SOURCE: i32 = 4;
const STORE: i32 = 6;

/// One that no machine which runs these tests is of.
fn other() -> &'static str {
    if Platform::host().architecture == "riscv64" { "linux/s390x" } else { "linux/riscv64" }
}

fn host() -> String {
    Platform::host().to_string()
}

/// A file for each of some processors, and images that have theirs.
fn files_by_processor() -> Context {
    let architectures = ["amd64", "arm64", "arm", "riscv64", "s390x"];
    let context = Context::new(&[("Dockerfile", "FROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH /for\n")]);
    architectures.iter().for_each(|name| context.write(name, name));
    context
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("written")).expect("JSON")
}

/// The document that a descriptor of a layout points to.
fn blob(layout: &Path, descriptor: &Value) -> Value {
    let digest = descriptor["digest"].as_str().expect("a digest");
    json(&layout.join("blobs").join(digest.replace(':', "/")))
}

/// `os/architecture[/variant]` of an index's entries, or of a config.
fn platform_of(value: &Value) -> String {
    let words = ["os", "architecture", "variant"].iter().filter_map(|name| value[name].as_str());
    words.collect::<Vec<_>>().join("/")
}

/// Builds into a layout; the index that it lists.
#[track_caller]
fn layout_of(store: &Store, context: &Context, args: &[&str]) -> (std::path::PathBuf, Value) {
    let dir = store.beside("layout");
    let _ = fs::remove_dir_all(&dir);
    let output = format!("type=oci,tar=false,dest={}", text(&dir));
    store.build(context, &[args, &["-o", &output]].concat()).expect(0);
    let root = json(&dir.join("index.json"));
    let root = blob(&dir, &root["manifests"][0]);
    (dir, root)
}

#[test]
fn arguments_say_what_is_built_for_and_what_builds() {
    needs_root!();
    let store = Store::with_busybox();
    let dockerfile = "FROM --platform=$BUILDPLATFORM busybox AS build\n\
        ARG TARGETPLATFORM TARGETOS TARGETARCH TARGETVARIANT BUILDPLATFORM\n\
        RUN echo \"$TARGETPLATFORM $TARGETOS $TARGETARCH [$TARGETVARIANT] $BUILDPLATFORM\" > /said\n\
        FROM scratch\nCOPY --from=build /said /\n";
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    let host = host();
    for (asked, said, variant) in [
        ("linux/arm/v6", format!("linux/arm/v6 linux arm [v6] {host}\n"), Some("v6")),
        ("linux/arm", format!("linux/arm/v7 linux arm [v7] {host}\n"), Some("v7")),
        ("linux/aarch64/v8", format!("linux/arm64 linux arm64 [] {host}\n"), None),
        ("linux/amd64/v3", format!("linux/amd64/v3 linux amd64 [v3] {host}\n"), Some("v3")),
        ("darwin/arm64", format!("darwin/arm64 darwin arm64 [] {host}\n"), None),
    ] {
        let out = store.beside("out");
        store.build(&context, &["--platform", asked, "-t", "made", "-o", text(&out), "--load"]).expect(0);
        assert_eq!(fs::read_to_string(out.join("said")).expect("written"), said, "{asked}");
        let config = store.config("made");
        assert_eq!(config["variant"].as_str(), variant, "{asked}");
        assert!(said.starts_with(&platform_of(&config)), "{config}");
    }
    // Without a flag, and by docker's variable; the flag goes before it.
    let build = |variable: &str, args: &[&str]| {
        let args = [&["build", "-t", "made"], args, &[context.path()]].concat();
        let mut command = store.command(&args);
        Outcome::of(command.env("DOCKER_DEFAULT_PLATFORM", variable).output().expect("kiln starts"))
    };
    for (variable, args, expected) in [
        ("", &[][..], host.as_str()),
        (other(), &[], other()),
        (other(), &["--platform", "local"], &host),
        (other(), &["--platform", "linux/386"], "linux/386"),
    ] {
        build(variable, args).expect(0);
        assert_eq!(platform_of(&store.config("made")), expected, "{variable} {args:?}");
    }
    build("linux/arm46", &[]).expect(USAGE).says(&["DOCKER_DEFAULT_PLATFORM", "did you mean `linux/arm64`?"]);
}

#[test]
fn several_platforms_are_one_solve_and_one_index() {
    needs_root!();
    let store = Store::with_busybox();
    let dockerfile = "FROM --platform=$BUILDPLATFORM busybox AS shared\nRUN echo once > /shared\n\
        FROM --platform=$BUILDPLATFORM busybox AS own\nARG TARGETARCH\nRUN echo $TARGETARCH > /own\n\
        FROM scratch\nCOPY --from=shared /shared /\nCOPY --from=own /own /\nLABEL of=test\n";
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    let (host, other) = (host(), other());
    let both = format!("{other},{host}");
    let (iid, metadata) = (store.beside("iid"), store.beside("metadata"));
    let files = ["--iidfile", text(&iid), "--metadata-file", text(&metadata)];
    let args =
        [&["--platform", &both, "--platform", "linux/arm/v7", "--platform", other, "-t", "app"], &files[..]]
            .concat();
    let first = store.build(&context, &args).expect(0);
    let ran = first.ran();
    let count = |title: &str| ran.iter().filter(|ran| ran.starts_with(title)).count();
    assert_eq!(count("RUN echo once"), 1, "what is the same is made once: {ran:?}");
    assert_eq!(count("RUN echo $TARGETARCH"), 3, "{ran:?}");
    assert_eq!(count("COPY --from=shared"), 1, "{ran:?}");
    assert_eq!(count("COPY --from=own"), 3, "{ran:?}");
    assert!(first.stderr.contains(&format!("[{host} shared 2/2] RUN echo once")), "{}", first.stderr);
    assert!(first.stderr.contains(&format!("[{other} stage-2 2/2] COPY")), "{}", first.stderr);
    let made_here = format!("[{host}->{} own 2/2] RUN", other.trim_start_matches("linux/"));
    assert!(first.stderr.contains(&made_here), "{}", first.stderr);

    let id = fs::read_to_string(&iid).expect("written");
    assert!(
        first.stdout.contains(&format!("image {id} for {other}, {host}, linux/arm/v7\n")),
        "{}",
        first.stdout
    );
    let metadata = json(&metadata);
    assert_eq!(metadata["containerimage.digest"], id.as_str());
    assert_eq!(metadata["containerimage.descriptor"]["mediaType"], "application/vnd.oci.image.index.v1+json");
    assert!(metadata["containerimage.config.digest"].is_null(), "{metadata}");
    // The name is this machine's image, and the index goes with it.
    assert_eq!(platform_of(&store.config("app")), host);
    for _ in 0..2 {
        let saved = store.beside("saved.tar");
        store.ok(&["save", "--format", "oci", "-o", text(&saved), "app"]);
        let dir = store.beside("unpacked");
        fs::create_dir_all(&dir).expect("ours");
        let tar = std::process::Command::new("tar").arg("-C").arg(&dir).arg("-xf").arg(&saved).status();
        assert!(tar.expect("tar runs").success());
        let listed = json(&dir.join("index.json"))["manifests"][0].clone();
        assert_eq!(listed["digest"], id.as_str());
        let index = blob(&dir, &listed);
        let entries = index["manifests"].as_array().expect("a list");
        let platforms: Vec<String> = entries.iter().map(|entry| platform_of(&entry["platform"])).collect();
        assert_eq!(platforms, [other, &host, "linux/arm/v7"]);
        for (entry, platform) in entries.iter().zip(&platforms) {
            let manifest = blob(&dir, entry);
            assert_eq!(manifest["layers"].as_array().map(Vec::len), Some(2));
            assert_eq!(platform_of(&blob(&dir, &manifest["config"])), *platform);
        }
        store.ok(&["gc"]);
    }
    store.sound().unwrap();

    // The same again is the same, and nothing runs; what changes for one platform is made for that one.
    let again = store.build(&context, &args).expect(0);
    assert!(again.ran().is_empty(), "{}", again.stderr);
    assert_eq!(fs::read_to_string(&iid).expect("written"), id);
    let one = store.build(&context, &["--platform", other, "--no-cache=own", "-t", "one"]).expect(0);
    assert_eq!(one.ran(), ["RUN echo $TARGETARCH > /own"]);
    let again = store.build(&context, &[&args[..], &["--no-cache=own:2"]].concat()).expect(0);
    assert_eq!(again.ran(), ["RUN echo $TARGETARCH > /own"; 3]);
    assert_eq!(fs::read_to_string(&iid).expect("written"), id);
    // A step that fails is told with its platform and its place.
    context.write(
        "Dockerfile",
        "FROM --platform=$BUILDPLATFORM busybox\nARG TARGETARCH\nRUN test $TARGETARCH = x\n",
    );
    let failed = store.build(&context, &["--platform", &both, "-t", "app"]).expect(1);
    failed.says(&["Dockerfile:3", "RUN test"]);
    assert_eq!(platform_of(&store.config("app")), host);
}

#[test]
fn outputs_have_a_place_for_each_platform() {
    needs_root!();
    let (store, context) = (Store::empty(), files_by_processor());
    let both = ["--platform", "linux/amd64,linux/arm/v7"];
    let build = |output: &str| store.build(&context, &[&both[..], &["-o", output]].concat());
    let dir = store.beside("out");
    build(text(&dir)).expect(0);
    let read = |path: &str| fs::read_to_string(dir.join(path)).expect("written");
    assert_eq!((read("linux_amd64/for"), read("linux_arm_v7/for")), ("amd64".into(), "arm".into()));
    build(&format!("type=local,dest={},platform-split=false", text(&dir))).expect(0);
    assert_eq!(read("for"), "arm", "the later one counts");
    let mixed = format!("type=local,dest={},platform-split=false,mode=delete", text(&dir));
    build(&mixed).expect(USAGE).says(&["mode=delete"]);

    let tar = store.beside("out.tar");
    build(&format!("type=tar,dest={}", text(&tar))).expect(0);
    let mut archive = tar::Archive::new(fs::File::open(&tar).expect("written"));
    let entries = archive
        .entries()
        .expect("a tar")
        .map(|entry| entry.expect("a tar").path().expect("UTF-8").into_owned());
    let names: Vec<String> = entries.map(|path| text(&path).trim_end_matches('/').to_owned()).collect();
    assert_eq!(names, ["linux_amd64", "linux_amd64/for", "linux_arm_v7", "linux_arm_v7/for"]);
    let whole = fs::read(&tar).expect("written");
    assert!(whole.len() % 512 == 0 && whole.ends_with(&[0; 1024]));

    let index = "type=oci,tar=false,annotation-index.of=all,annotation[linux/arm/v7].of=one";
    let layout = store.beside("annotated");
    build(&format!("{index},dest={}", text(&layout))).expect(0);
    let root = blob(&layout, &json(&layout.join("index.json"))["manifests"][0]);
    assert_eq!(root["annotations"]["of"], "all");
    let of: Vec<Value> = root["manifests"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|entry| blob(&layout, entry)["annotations"]["of"].clone())
        .collect();
    assert_eq!(of, [Value::Null, "one".into()]);
    let alone = format!("{index},dest={}", text(&layout));
    store.build(&context, &["-o", &alone]).expect(USAGE).says(&["no index to annotate"]);
    // The same index in a tar, as a layout and in the store.
    let (_, plain) = layout_of(&store, &context, &both);
    let digest = Digest::of(&fs::read(store.beside("layout").join("index.json")).expect("written"));
    let (_, again) = layout_of(&store, &context, &both);
    assert_eq!(plain, again);
    assert_eq!(Digest::of(&fs::read(store.beside("layout").join("index.json")).expect("written")), digest);

    let docker = format!("type=docker,dest={}", text(&store.beside("docker.tar")));
    build(&docker).expect(USAGE).says(&["type=docker", "type=oci"]);
    assert!(!store.beside("docker.tar").exists());
    // Without layers in gzip, too.
    for how in ["type=image,name=plain,compression=uncompressed", "type=image,name=zstd,compression=zstd"] {
        build(how).expect(0);
        store.ok(&["gc"]);
        store.sound().unwrap();
    }
}

#[test]
fn a_base_is_looked_up_for_its_platform() {
    needs_root!();
    let (store, context) = (Store::with_busybox(), files_by_processor());
    let (host, other) = (host(), other());
    let on_base = Context::new(&[("Dockerfile", "FROM base\nCOPY more /\n"), ("more", "more")]);
    let of = |image: &str| store.config(image)["architecture"].as_str().expect("text").to_owned();
    let other_architecture = other.trim_start_matches("linux/");

    // For another platform only: not used where nobody asks for that.
    store.build(&context, &["--platform", other, "-t", "base"]).expect(0);
    let refused = store.build(&on_base, &["-t", "app"]).expect(SOURCE);
    refused.says(&["Dockerfile:1", "base:latest", other, &host, &format!("FROM --platform={other}")]);
    store.build(&on_base, &["--platform", other, "-t", "app"]).expect(0);
    assert_eq!(of("app"), other_architecture);
    let own = format!("FROM --platform={other} base AS {other_architecture}\nCOPY more /\n");
    on_base.write("own.Dockerfile", &own);
    let file = on_base.at("own.Dockerfile");
    store.build(&on_base, &["-f", text(&file), "-t", "app"]).expect(0);
    assert_eq!(of("app"), other_architecture, "the flag of FROM goes before this machine");

    // Both at once under one name: of each build its own.
    store.build(&context, &["--platform", &format!("{host},{other}"), "-t", "base"]).expect(0);
    store.build(&on_base, &["-t", "app"]).expect(0);
    assert_eq!(platform_of(&store.config("app")), host);
    store.build(&on_base, &["--platform", "linux/mips64le", "-t", "app"]).expect(SOURCE);
    store.build(&on_base, &["--platform", &format!("{other},{host}"), "-t", "app"]).expect(0);
    let out = store.beside("files");
    store.build(&on_base, &["--platform", &format!("{other},{host}"), "-o", text(&out)]).expect(0);
    for (dir, architecture) in [(other, other_architecture), (&host, &Platform::host().architecture)] {
        let dir = out.join(dir.replace('/', "_"));
        assert_eq!(fs::read_to_string(dir.join("for")).expect("written"), architecture);
        assert_eq!(fs::read_to_string(dir.join("more")).expect("written"), "more");
    }
    // An index in a layout has one for each as well.
    let (layout, _) = layout_of(&store, &context, &["--platform", &format!("{host},{other}")]);
    let named = format!("base=oci-layout://{}", text(&layout));
    let fresh = Store::empty();
    fresh.build(&on_base, &["--build-context", &named, "--platform", other, "-o", text(&out)]).expect(0);
    assert_eq!(fs::read_to_string(out.join("for")).expect("written"), other_architecture);
    let absent = ["--build-context", &named, "--platform", "linux/s390x,linux/mips64le"];
    fresh.build(&on_base, &absent).expect(5).says(&["holds no image for"]);
    store.ok(&["gc"]);
    store.sound().unwrap();
}

/// What begins as a program of [`other`] does, and is none.
fn program() -> [u8; 64] {
    let (order, kind, machine) =
        if other() == "linux/riscv64" { (1, 16, [243, 0]) } else { (2, 17, [0, 22]) };
    let mut program = [0; 64];
    program[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, order, 1]);
    program[kind] = 2;
    program[18..20].copy_from_slice(&machine);
    program
}

/// Shows the kernel's rules for programs, adds one, and becomes a command.
const AMONG_RULES: &str = "mount -t binfmt_misc none /proc/sys/fs/binfmt_misc || exit 99\n\
    [ -z \"$RULE\" ] || printf %s \"$RULE\" > /proc/sys/fs/binfmt_misc/register || exit 98\n\
    exec \"$@\"\n";

/// A build in a user namespace of its own, where rules are the test's alone; `None`: there are none of one's own.
fn build_among_rules(store: &Store, context: &Context, rule: &str, args: &[&str]) -> Option<Outcome> {
    among_rules(store, rule, &[&["build", "--progress", "plain"], args, &[context.path()]].concat())
}

/// The same for any command.
fn among_rules(store: &Store, rule: &str, args: &[&str]) -> Option<Outcome> {
    let kiln = store.command(args);
    let mut command = std::process::Command::new("unshare");
    command.args(["-Urm", "sh", "-c", AMONG_RULES, "sh"]).arg(kiln.get_program()).args(kiln.get_args());
    for (name, value) in kiln.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let outcome = Outcome::of(command.env("RULE", rule).output().ok()?);
    (!matches!(outcome.code, Some(98 | 99)) && !outcome.stderr.contains("unshare")).then_some(outcome)
}

/// A rule for [`program`], whose emulator is `cp` of the host.
fn rule(store: &Store, flags: &str) -> String {
    let emulator = store.beside("cp");
    if !emulator.exists() {
        fs::copy("/bin/busybox", &emulator).expect("busybox-static is installed");
    }
    let hex: String = program()[..20].iter().map(|byte| format!("\\x{byte:02x}")).collect();
    format!(":kiln-test:M:0:{hex}::{}:{flags}", text(&emulator))
}

/// What is said of an image for [`other`].
fn cannot_run() -> String {
    let (host, other) = (host(), other());
    format!("the image is for {other}, and this machine ({host}) cannot run {other} programs: ")
}

#[test]
fn a_step_runs_by_the_emulator_that_the_kernel_has_a_rule_for() {
    needs_root!();
    let store = Store::empty();
    let dockerfile = "FROM scratch\nCOPY --chmod=755 file /\nRUN --network=none [\"/file\", \"/made\"]\n";
    let context = Context::new(&[("Dockerfile", dockerfile)]);
    fs::write(context.at("file"), program()).expect("ours");
    // Started as `cp /file /made`.
    let rule = |flags: &str| rule(&store, flags);
    let out = store.beside("out");
    let args = ["--platform", other(), "-o", text(&out)];
    let Some(without) = build_among_rules(&store, &context, "", &args) else {
        eprintln!(
            "SKIPPED ALOUD: this kernel has no rules for a user namespace alone (Linux 6.7 has), or no unshare"
        );
        return;
    };
    let cannot = cannot_run();
    without.expect(STORE).says(&["Dockerfile:3", &cannot, "no emulator for them is registered"]);
    let closed = build_among_rules(&store, &context, &rule(""), &args).expect("as before");
    closed.expect(STORE).says(&["Dockerfile:3", &cannot, "without the flag F"]);
    let built = build_among_rules(&store, &context, &rule("F"), &args).expect("as before").expect(0);
    assert_eq!(built.ran(), ["RUN --network=none [\"/file\", \"/made\"]"]);
    assert_eq!(fs::read(out.join("made")).expect("written"), program());
    // What is in the cache needs no emulator.
    let again = build_among_rules(&store, &context, "", &args).expect("as before").expect(0);
    assert!(again.ran().is_empty(), "{}", again.stderr);
}

#[test]
fn a_step_for_a_machine_that_nothing_here_runs_is_refused_before_it_starts() {
    needs_root!();
    let store = Store::with_busybox();
    let context =
        Context::new(&[("Dockerfile", "FROM scratch\nCOPY file /\nRUN [\"/file\"]\n"), ("file", "x")]);
    let refused = store.build(&context, &["--platform", "darwin/arm64"]).expect(STORE);
    refused.says(&["Dockerfile:3", "cannot run darwin/arm64 programs", "emulator"]);
    // What is only copied needs none.
    context.write("Dockerfile", "FROM scratch\nCOPY file /\n");
    store.build(&context, &["--platform", "darwin/arm64"]).expect(0);
    if Path::new("/proc/sys/fs/binfmt_misc/status").exists() {
        eprintln!("SKIPPED ALOUD: this machine may have an emulator for what follows");
        return;
    }
    // Where the kernel's rules are not to be seen, it is the kernel that knows.
    fs::write(context.at("file"), program()).expect("ours");
    context.write("Dockerfile", "FROM scratch\nCOPY --chmod=755 file /\nRUN [\"/file\"]\n");
    let refused = store.build(&context, &["--platform", other()]).expect(STORE);
    refused.says(&["Dockerfile:3", &cannot_run()]);
}

/// An image for [`other`] with its program, as `foreign`.
fn foreign_image(store: &Store) {
    let context =
        Context::new(&[("Dockerfile", "FROM scratch\nCOPY --chmod=755 file /\nENTRYPOINT [\"/file\"]\n")]);
    fs::write(context.at("file"), program()).expect("ours");
    store.build(&context, &["--platform", other(), "-t", "foreign"]).expect(0);
}

#[test]
fn a_container_runs_by_the_emulator_that_the_kernel_has_a_rule_for() {
    needs_root!();
    let store = Store::empty();
    foreign_image(&store);
    let out = store.beside("out");
    fs::create_dir(&out).expect("ours");
    let mount = format!("{}:/out", text(&out));
    let run = ["run", "--rm", "--network=none", "-v", &mount, "foreign", "/out/made"];
    let Some(without) = among_rules(&store, "", &run) else {
        eprintln!(
            "SKIPPED ALOUD: this kernel has no rules for a user namespace alone (Linux 6.7 has), or no unshare"
        );
        return;
    };
    let advice = format!("register an emulator for {}: `apt-get install", other());
    let own = format!("`--platform {}`", host());
    let reason = cannot_run() + "no emulator for them is registered with the kernel";
    without.expect(126).says(&[&reason, &advice, &own]);
    let closed = "was registered without the flag F, and the image does not have it";
    let closed_rule = among_rules(&store, &rule(&store, ""), &run).expect("as before");
    closed_rule.expect(126).says(&[&cannot_run(), closed]);
    assert!(!out.join("made").exists());
    among_rules(&store, &rule(&store, "F"), &run).expect("as before").expect(0);
    assert_eq!(fs::read(out.join("made")).expect("written"), program());
    store.sound().unwrap();
}

#[test]
fn a_container_for_a_machine_that_nothing_here_runs_says_so() {
    needs_root!();
    let store = Store::with_busybox();
    if Path::new("/proc/sys/fs/binfmt_misc/status").exists() {
        eprintln!("SKIPPED ALOUD: this machine may have an emulator for what follows");
        return;
    }
    foreign_image(&store);
    let network = "--network=none";
    // Without a monitor, with one, and in the background.
    store.kiln(&["run", "--rm", network, "foreign"]).expect(126).says(&[&cannot_run(), "hint: register"]);
    store.kiln(&["run", network, "foreign"]).expect(126).says(&[&cannot_run(), "hint: register"]);
    store.kiln(&["run", "-d", network, "foreign"]).expect(126).says(&[&cannot_run(), "hint: register"]);
    store.ok(&["create", "--name", "made", network, "foreign"]);
    store.kiln(&["start", "made"]).expect(1).says(&[&cannot_run(), "hint: register"]);
    store.kiln(&["start", "-a", "made"]).expect(126).says(&[&cannot_run(), "hint: register"]);
    let state = store.ok(&["inspect", "-f", "{{.State.Status}} {{.State.Error}}", "made"]).stdout;
    assert!(state.starts_with("created ") && state.contains(&cannot_run()), "{state}");

    // A program of another machine in an image that says that it is for this one.
    let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY --chmod=755 file script /\n")]);
    fs::write(context.at("file"), program()).expect("ours");
    context.write("script", "#! /file -x\n");
    store.build(&context, &["-t", "mixed"]).expect(0);
    let mixed = format!(
        "it is for {other}, though the image is for {host}, and this machine ({host}) cannot run {other} programs: ",
        other = other(),
        host = host()
    );
    let advice = format!("or put a program for {} into the image", host());
    store.ok(&["run", "-d", "--name", "mixed", network, "mixed", "sleep", "1000"]);
    for program in ["/file", "/script"] {
        let cannot = format!("{program:?} cannot be executed");
        let says = [&cannot, &mixed, &advice].map(String::as_str);
        store.kiln(&["run", "--rm", network, "mixed", program]).expect(126).says(&says);
        store.kiln(&["exec", "mixed", program]).expect(126).says(&says);
        store.kiln(&["exec", "-d", "mixed", program]).expect(126).says(&says);
    }
    store.ok(&["rm", "-f", "mixed"]);
    context.write("Dockerfile", "FROM mixed\nRUN [\"/file\"]\n");
    let step = store.build(&context, &[]).expect(1);
    step.says(&["Dockerfile:2", &format!("cannot run {} programs: ", other()), &advice]);
}
