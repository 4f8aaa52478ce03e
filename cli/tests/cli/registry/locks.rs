//! `kiln.lock`: what it pins counts, who writes it, and what a project of somebody else may have in its place.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::heads::{asked, asked_by, base, digest, offer, offer_two};
use super::server::Bench;
use crate::harness::{Context, Outcome, needs_root, text};
use crate::scripted::Server;

fn on(server: &Server, tag: &str) -> Context {
    let dockerfile = format!("FROM {}\nCOPY src /src\n", base(server, tag));
    Context::new(&[("Dockerfile", &dockerfile), ("src", "src\n")])
}

fn lock(context: &Context) -> String {
    fs::read_to_string(context.at("kiln.lock")).unwrap_or_default()
}

/// The lines that pin something.
fn pinned(text: &str) -> Vec<(String, String)> {
    let pin = |line: &str| {
        let (name, digest) = line.strip_prefix('"')?.split_once("\" = \"")?;
        Some((name.to_owned(), digest.trim_end_matches('"').to_owned()))
    };
    text.lines().filter_map(pin).collect()
}

fn pin(server: &Server, tag: &str) -> (String, String) {
    (base(server, tag), digest(server, tag))
}

/// What the base of an image is.
fn stands_on(bench: &Bench, context: &Context, args: &[&str]) -> String {
    let out = bench.at("out");
    bench.build(context, &[args, &["-o", text(&out)]].concat()).expect(0);
    fs::read_to_string(out.join("of")).unwrap()
}

#[test]
fn what_is_pinned_counts_wherever_the_tag_goes() {
    needs_root!();
    let server = Server::new();
    offer(&server, "v1", "one");
    let (context, bench) = (on(&server, "v1"), Bench::empty());
    // Nobody has asked for a file.
    bench.build(&context, &["-t", "app"]).expect(0);
    assert!(!context.at("kiln.lock").exists());
    let written = bench.build(&context, &["--lock", "-t", "app"]).expect(0);
    let line = format!("wrote {}\n", context.at("kiln.lock").display());
    assert!(written.stdout.contains(&line) && written.ran().is_empty(), "{}", written.stdout);
    let (name, one) = pin(&server, "v1");
    let expected = format!("version = 1\n\n[images]\n\"{name}\" = \"{one}\"\n");
    assert!(lock(&context).starts_with("# ") && lock(&context).ends_with(&expected), "{}", lock(&context));

    // The tag moves, and a machine that has nothing gets what is pinned.
    offer(&server, "v1", "two");
    let other = Bench::empty();
    let from = server.lines().len();
    assert_eq!(stands_on(&other, &context, &[]), "one");
    let came = asked(&server, from);
    assert_eq!(came.iter().filter(|line| line.contains("manifests/")).count(), 1, "{came:?}");
    assert_eq!(came[0], format!("GET manifests/{one}"));
    // From then on nobody is asked, and no key moves: whoever has it, under whatever name.
    for bench in [&bench, &other] {
        for flags in [&[][..], &["--pull"], &["--offline"], &["--locked", "--offline"], &["--lock"]] {
            let from = server.lines().len();
            let built = bench.build(&context, &[flags, &["-t", "app"]].concat()).expect(0);
            assert_eq!((built.ran(), asked(&server, from)), (vec![], vec![]), "{flags:?}: {}", built.stderr);
            assert!(!built.stdout.contains("kiln.lock") && !built.stderr.contains("kiln.lock"), "{built:?}");
        }
    }
    // The tag of the store has gone on as well; what it led to is there still, also behind a collection.
    bench.ok(&["pull", &name]);
    bench.ok(&["gc"]);
    assert_eq!(stands_on(&bench, &context, &["--offline"]), "one");
    assert_eq!(stands_on(&bench, &context, &["--lock=off"]), "two");

    // An update costs a look, and what has changed.
    let from = server.lines().len();
    let updated = other.build(&context, &["--lock=update", "-t", "app"]).expect(0);
    assert!(updated.stdout.contains("kiln.lock"), "{}", updated.stdout);
    let came = asked(&server, from);
    let (_, two) = pin(&server, "v1");
    assert_eq!(came[..2], ["HEAD manifests/v1".to_owned(), format!("GET manifests/{two}")], "{came:?}");
    assert_eq!(pinned(&lock(&context)), [pin(&server, "v1")]);
    assert_eq!(asked_by(&server, &other, &context, &["--lock=update", "-t", "app"]), ["HEAD manifests/v1"]);
    assert_eq!(stands_on(&other, &context, &["--locked"]), "two");
    bench.store.sound().unwrap();
    other.store.sound().unwrap();
}

#[test]
fn why_says_that_a_base_moved_when_the_lock_changed() {
    needs_root!();
    let (server, maker, bench) = (Server::new(), Bench::new(), Bench::empty());
    let offer = |content: &str| {
        let context = Context::new(&[("Dockerfile", "FROM busybox\nCOPY of /of\n"), ("of", content)]);
        maker.build(&context, &["--push", "-t", &base(&server, "v1")]).expect(0);
    };
    offer("one");
    let context = Context::new(&[("Dockerfile", &format!("FROM {}\nRUN cat /of\n", base(&server, "v1")))]);
    bench.build(&context, &["--lock", "-t", "app"]).expect(0);
    offer("two");
    assert_eq!(bench.build(&context, &["--pull=missing", "-t", "app"]).expect(0).ran(), [""; 0]);
    bench.build(&context, &["--lock=update", "-t", "app"]).expect(0);
    let said = bench.ok(&["why"]);
    assert!(said.contains(&format!("base {} moved from sha256:", base(&server, "v1"))), "{said}");
}

#[test]
fn locked_means_that_every_name_is_pinned() {
    needs_root!();
    let server = Server::new();
    offer(&server, "v1", "one");
    offer(&server, "v2", "two");
    let (context, bench) = (on(&server, "v1"), Bench::empty());
    let from = server.lines().len();
    let failed = bench.build(&context, &["--locked"]).expect(7);
    failed.says(&[
        "there is no kiln.lock that would pin",
        &base(&server, "v1"),
        "Dockerfile:1",
        "kiln build --lock",
    ]);
    assert_eq!(asked(&server, from), [""; 0]);
    bench.build(&context, &["--lock"]).expect(0);
    bench.build(&context, &["--locked"]).expect(0);

    let exact = format!("{}@{}", base(&server, "v2"), digest(&server, "v2"));
    let more = format!("FROM {exact} AS exact\nFROM {}\nCOPY --from=exact /of /two\n", base(&server, "v1"));
    context.write("Dockerfile", &more);
    bench.build(&context, &["--locked"]).expect(0);
    let more = format!("FROM {}\nCOPY --from={} /of /two\n", base(&server, "v1"), base(&server, "v2"));
    context.write("Dockerfile", &more);
    let before = lock(&context);
    let failed = bench.build(&context, &["--locked"]).expect(7);
    failed.says(&["kiln.lock does not pin", &base(&server, "v2"), "Dockerfile:2"]);
    let warned = bench.build(&context, &[]).expect(0);
    warned.says(&["kiln.lock does not pin", &base(&server, "v2"), "`kiln build --lock` adds it"]);
    assert_eq!(lock(&context), before);
    // What is pinned stays, though its tag has moved.
    let (name, one) = pin(&server, "v1");
    offer(&server, "v1", "three");
    bench.build(&context, &["--lock"]).expect(0);
    assert_eq!(pinned(&lock(&context)), [(name, one), pin(&server, "v2")]);
    bench.build(&context, &["--locked"]).expect(0);

    bench.build(&context, &["--lock", "--locked"]).expect(2);
    bench.build(&context, &["--lock=update", "--offline"]).expect(2).says(&["asks registries"]);
    bench.build(&context, &["--lock=frozen"]).expect(2);
}

#[test]
fn every_way_to_name_an_image_is_pinned_and_what_was_made_here_is_not() {
    needs_root!();
    let server = Server::new();
    for tag in ["v1", "v2", "v3", "v4"] {
        offer(&server, tag, tag);
    }
    let bench = Bench::new();
    let [one, two, three, four] = ["v1", "v2", "v3", "v4"].map(|tag| base(&server, tag));
    let dockerfile = format!(
        "FROM {one} AS one\nFROM busybox\nCOPY --from={two} /of /two\nCOPY --from=one /of /one\n\
         RUN --mount=from={three},target=/m cat /m/of > /three\nCOPY --from=named /of /four\n"
    );
    let context = Context::new(&[("sub/other.Dockerfile", &dockerfile)]);
    let file = context.at("sub/other.Dockerfile");
    let named = format!("named=docker-image://{four}");
    let args = ["-f", text(&file), "--build-context", &named, "-t", "app"];
    let built = bench.build(&context, &[&args[..], &["--lock"]].concat()).expect(0);
    built.says(&["kiln.lock cannot pin busybox:latest: it was made or loaded here"]);
    let lock = fs::read_to_string(context.at("sub/kiln.lock")).unwrap();
    assert_eq!(pinned(&lock), ["v1", "v2", "v3", "v4"].map(|tag| pin(&server, tag)));
    assert!(!context.at("kiln.lock").exists());
    let from = server.lines().len();
    for flags in [&["--pull=missing"][..], &["--lock=update", "--target", "one"], &["--lock"]] {
        bench.build(&context, &[&args[..], flags].concat()).expect(0);
        // What a build does not stand on stays pinned.
        assert_eq!(fs::read_to_string(context.at("sub/kiln.lock")).unwrap(), lock, "{flags:?}");
    }
    assert_eq!(asked(&server, from), ["HEAD manifests/v1"]);
    let strict = bench.build(&context, &[&args[..], &["--locked"]].concat()).expect(7);
    strict.says(&["does not pin busybox:latest", "other.Dockerfile:2"]);
}

#[test]
fn an_index_is_pinned_for_all_platforms() {
    needs_root!();
    let server = Server::new();
    let both = offer_two(&server, "many", "one");
    let (context, bench, other) = (on(&server, "many"), Bench::empty(), Bench::empty());
    let flags = ["--platform", both, "-o", "type=cacheonly"];
    bench.build(&context, &[&flags[..], &["--lock"]].concat()).expect(0);
    let expected = [pin(&server, "many")];
    assert_eq!(pinned(&lock(&context)), expected);
    offer_two(&server, "many", "two");
    let came = asked_by(&server, &other, &context, &flags);
    assert!(came.iter().all(|line| !line.ends_with("/many")), "{came:?}");
    let of_index = format!("GET manifests/{}", expected[0].1);
    assert_eq!(came.iter().filter(|line| **line == of_index).count(), 1, "{came:?}");
    for bench in [&bench, &other] {
        let offline = [&flags[..], &["--locked", "--offline"]].concat();
        assert_eq!(bench.build(&context, &offline).expect(0).ran(), [""; 0]);
        // The index may go: what was built on has the name that pins it.
        bench.ok(&["gc"]);
        assert_eq!(bench.build(&context, &offline).expect(0).ran(), [""; 0]);
    }
    let update = [&flags[..], &["--lock=update"]].concat();
    let came = asked_by(&server, &bench, &context, &update);
    assert_eq!(came.iter().filter(|line| line.ends_with("/many")).count(), 1, "{came:?}");
    assert_eq!(pinned(&lock(&context)), [pin(&server, "many")]);
}

#[test]
fn a_lock_file_of_somebody_else_is_data() {
    needs_root!();
    let server = Server::new();
    offer(&server, "v1", "one");
    let (context, bench) = (on(&server, "v1"), Bench::empty());
    bench.build(&context, &["--lock"]).expect(0);
    let good = lock(&context);
    let path = context.at("kiln.lock");
    let refused = |code: i32, said: &[&str]| {
        for flags in [&[][..], &["--lock"], &["--lock=update"], &["--locked"]] {
            let outcome =
                bench.store.bounded(bench.command(&[&["build"], flags, &[context.path()]].concat()));
            outcome.expect(code).says(said).says(&["--lock=off"]);
        }
        // Whoever wants to build all the same can.
        bench.build(&context, &["--lock=off"]).expect(0);
    };
    context.write("kiln.lock", &format!("{good}<<<<<<< HEAD\n"));
    refused(4, &["kiln.lock:6: ", "kiln build --lock"]);
    context.write("kiln.lock", "version = 1\n\n[images]\n\"debian\" = \"sha256:\\u001b[31m\"\n");
    let escaped = bench.build(&context, &[]).expect(4);
    assert!(!escaped.stderr.contains('\u{1b}'), "{}", escaped.stderr);
    refused(4, &["kiln.lock:4: "]);
    context.write("kiln.lock", "version = 2\nimages = []\n");
    refused(4, &["kiln.lock has version 2", "this kiln reads version 1"]);
    fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    refused(8, &["kiln.lock is larger than 1048576 bytes"]);
    fs::remove_file(&path).unwrap();

    let elsewhere = tempfile::tempdir().unwrap();
    let target = elsewhere.path().join("kiln.lock");
    fs::write(&target, &good).unwrap();
    symlink(&target, &path).unwrap();
    refused(4, &["cannot read", "kiln.lock", "it is a link"]);
    assert_eq!(fs::read_to_string(&target).unwrap(), good);
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 1);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    refused(4, &["not a regular file"]);
    fs::remove_dir(&path).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    refused(4, &["not a regular file"]);
    fs::remove_file(&path).unwrap();

    // A digest that nobody has: it is not taken for what the tag leads to.
    let absent = kiln_oci::Digest::of(b"nobody has this").to_string();
    context.write("kiln.lock", &good.replace(&digest(&server, "v1"), &absent));
    let failed = bench.build(&context, &[]).expect(5);
    failed.says(&["Dockerfile:1", &absent, "kiln.lock pins it", "--lock=update"]);
    bench.build(&context, &["--offline"]).expect(4).says(&[&absent, "is not in the store"]);
    bench.build(&context, &["--lock=update"]).expect(0);
    assert_eq!(lock(&context), good);

    // What is pinned is known, and its layers are gone.
    server.state.lock().unwrap().blobs.retain(|_, blob| blob.starts_with(b"{"));
    let other = Bench::empty();
    let failed = other.build(&context, &["-o", text(&other.at("out"))]).expect(5);
    failed.says(&["Dockerfile:1", &digest(&server, "v1"), "kiln.lock pins it", "--lock=update"]);
}

/// A context in a tar.
fn packed(context: &Context, names: &[&str]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    tar.follow_symlinks(false);
    for name in names {
        tar.append_path_with_name(context.at(name), name).unwrap();
    }
    tar.into_inner().unwrap()
}

fn piped(bench: &Bench, input: &[u8], args: &[&str]) -> Outcome {
    let path = bench.at("input");
    fs::write(&path, input).unwrap();
    let mut command = bench.command(&[&["build", "--progress", "plain"], args].concat());
    command.stdin(fs::File::open(path).unwrap());
    Outcome::of(command.output().unwrap())
}

#[test]
fn a_lock_file_in_a_context_from_elsewhere_is_read_and_never_written() {
    needs_root!();
    let server = Server::new();
    offer(&server, "v1", "one");
    let (context, bench) = (on(&server, "v1"), Bench::empty());
    context.write("sub/Dockerfile", &fs::read_to_string(context.at("Dockerfile")).unwrap());
    bench.build(&context, &["--lock"]).expect(0);
    fs::copy(context.at("kiln.lock"), context.at("sub/kiln.lock")).unwrap();
    offer(&server, "v1", "two");
    let built = |input: &[u8], args: &[&str]| {
        let (bench, out) = (Bench::empty(), bench.at("out"));
        piped(&bench, input, &[args, &["-o", text(&out), "-"]].concat()).expect(0);
        fs::read_to_string(out.join("of")).unwrap()
    };
    let all = packed(&context, &["Dockerfile", "src", "kiln.lock", "sub/Dockerfile", "sub/kiln.lock"]);
    assert_eq!(built(&all, &[]), "one");
    assert_eq!(built(&all, &["-f", "sub/Dockerfile", "--locked"]), "one");
    assert_eq!(built(&packed(&context, &["Dockerfile", "src"]), &[]), "two");
    for lock in ["--lock", "--lock=update"] {
        piped(&bench, &all, &[lock, "-"]).expect(2).says(&["has no place for a kiln.lock"]);
    }
    for target in ["sub/kiln.lock", "nowhere"] {
        fs::remove_file(context.at("kiln.lock")).unwrap();
        symlink(target, context.at("kiln.lock")).unwrap();
        let linked = packed(&context, &["Dockerfile", "src", "kiln.lock", "sub/kiln.lock"]);
        piped(&bench, &linked, &["-"]).expect(4).says(&["cannot read", "kiln.lock"]);
    }
    fs::remove_file(context.at("kiln.lock")).unwrap();
    context.write("kiln.lock", "version = 1\n?\n");
    piped(&bench, &packed(&context, &["Dockerfile", "src", "kiln.lock"]), &["-"])
        .expect(4)
        .says(&["kiln.lock:2: "]);
    // What comes alone has nothing beside it.
    let dockerfile = fs::read(context.at("Dockerfile")).unwrap();
    piped(&bench, &dockerfile, &["--lock", "-f", "-", context.path()]).expect(2).says(&["no place"]);
    piped(&bench, &dockerfile, &["--locked", "-f", "-", context.path()]).expect(7).says(&["no kiln.lock"]);
    piped(&bench, &dockerfile, &["--pull", "-f", "-", context.path()]).expect(0);
}

#[test]
fn builds_that_write_one_file_at_once_lose_no_line() {
    needs_root!();
    let server = Server::new();
    let tags: Vec<String> = (0..6).map(|nth| format!("v{nth}")).collect();
    tags.iter().for_each(|tag| offer(&server, tag, tag));
    let context = Context::new(&[]);
    for tag in &tags {
        context.write(&format!("{tag}.Dockerfile"), &format!("FROM {}\n", base(&server, tag)));
    }
    std::thread::scope(|scope| {
        for tag in &tags {
            let (context, file) = (&context, context.at(&format!("{tag}.Dockerfile")));
            scope.spawn(move || Bench::empty().build(context, &["--lock", "-f", text(&file)]).expect(0));
        }
    });
    let expected: Vec<(String, String)> = tags.iter().map(|tag| pin(&server, tag)).collect();
    assert_eq!(pinned(&lock(&context)), expected);
    assert_eq!(partial(Path::new(context.path())), [""; 0]);
}

/// What writers have left behind.
fn partial(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".partial")).collect()
}

#[test]
fn a_lock_file_in_the_context_is_there_before_the_context_is_read() {
    needs_root!();
    let server = Server::new();
    offer(&server, "v1", "one");
    let (context, bench) = (on(&server, "v1"), Bench::empty());
    context.write("Dockerfile", &format!("FROM {}\nCOPY . /all\n", base(&server, "v1")));
    bench.build(&context, &["--lock", "-t", "app"]).expect(0);
    assert_eq!(bench.build(&context, &["-t", "app"]).expect(0).ran(), [""; 0]);
    let out = bench.at("out");
    bench.build(&context, &["--locked", "-o", text(&out)]).expect(0);
    assert_eq!(fs::read_to_string(out.join("all/kiln.lock")).unwrap(), lock(&context));
    assert_eq!(partial(&out.join("all")), [""; 0]);
}
