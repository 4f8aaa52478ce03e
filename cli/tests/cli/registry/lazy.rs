//! Bases of which nobody reads a byte: their documents come, and no layer does.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::process::Signal;

use super::server::Bench;
use crate::harness::{Context, Running, needs_root, text};
use crate::remote_cache::{id, warnings};
use crate::scripted::{Server, answer};

const CACHE: &str = "/v2/team/cache/";

/// Brings two images of one layer, `team/base:tools` and `team/base:runtime`, to a registry.
fn offer_bases(server: &Server) {
    let maker = Bench::empty();
    for tag in ["tools", "runtime"] {
        let files = [("Dockerfile", "FROM scratch\nCOPY of /of\nENV OF=base\n"), ("of", tag)];
        maker.build(&Context::new(&files), &["--push", "-t", &base(server, tag)]).expect(0);
    }
}

fn base(server: &Server, tag: &str) -> String {
    format!("{}/team/base:{tag}", server.domain())
}

/// The digest of the layer of such an image.
fn layer(server: &Server, tag: &str) -> String {
    let manifest = server.state.lock().unwrap().manifests[tag].1.clone();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    manifest["layers"][0]["digest"].as_str().unwrap().to_owned()
}

/// A stage that serves one COPY, and an image on another base.
fn two_stages(server: &Server) -> Context {
    let dockerfile = format!(
        "FROM {} AS made\nCOPY src /src\nCOPY more /more\nFROM {}\nCOPY --from=made /src /app\n",
        base(server, "tools"),
        base(server, "runtime")
    );
    Context::new(&[("Dockerfile", &dockerfile), ("src", "src\n"), ("more", "more\n")])
}

/// The requests about bases since there were `from`, sorted.
fn asked(server: &Server, from: usize) -> Vec<String> {
    let lines = server.lines().into_iter().skip(from);
    let mut asked: Vec<String> = lines.filter(|line| line.contains(" /v2/team/base/")).collect();
    asked.sort();
    asked
}

/// How often a layer of a base was asked for.
fn layers_asked(server: &Server, from: usize) -> usize {
    let layers = ["tools", "runtime"].map(|tag| format!("GET /v2/team/base/blobs/{}", layer(server, tag)));
    asked(server, from).iter().filter(|line| layers.contains(line)).count()
}

#[test]
fn a_base_whose_bytes_nobody_needs_is_never_pulled() {
    needs_root!();
    let server = Server::new();
    offer_bases(&server);
    let dir = tempfile::tempdir().unwrap();
    let place = format!("type=registry,ref={}/team/cache:main", server.domain());
    let local = |side: &str| format!("type=local,{side}={}", text(dir.path()));
    for (to, from) in [(local("dest"), local("src")), (place.clone(), place)] {
        let context = two_stages(&server);
        let to = format!("{to},mode=max");
        let first = Bench::empty().build(&context, &["-t", "app", "--cache-to", &to]).expect(0);
        assert_eq!((first.ran().len(), warnings(&first)), (3, vec![]), "{to}");

        let (bench, seen) = (Bench::empty(), server.lines().len());
        let cached = bench.build(&context, &["-t", "app", "--cache-from", &from]).expect(0);
        assert_eq!((cached.ran(), warnings(&cached), id(&cached)), (vec![], vec![], id(&first)), "{from}");
        // Two documents of each.
        let documents = asked(&server, seen);
        assert_eq!((documents.len(), layers_asked(&server, seen)), (4, 0), "{documents:?}");
        // Of the cache, the layers of the image.
        let lines = server.lines().into_iter().skip(seen);
        let blobs = format!("GET {CACHE}blobs/");
        let blobs: Vec<String> = lines.filter(|line| line.starts_with(&blobs)).collect();
        assert_eq!(blobs.len(), if from.contains("registry") { 2 } else { 0 }, "{blobs:?}");
        assert_eq!(bench.ok(&["images"]).matches("team/base").count(), 0);
        bench.store.sound().unwrap();

        // Nothing has changed: nobody is asked, also without the cache.
        let seen = server.lines().len();
        for flags in [&["-t", "app"][..], &["--offline", "-t", "app"], &["--pull=never", "-t", "app"]] {
            assert_eq!(bench.build(&context, flags).expect(0).ran(), [""; 0], "{flags:?}");
        }
        let checked = bench.kiln(&["build", "--check", context.path()]);
        checked.expect(0);
        assert_eq!(asked(&server, seen), [""; 0]);
        bench.build(&context, &["--pull", "-t", "app"]).expect(0);
        let heads = ["runtime", "tools"].map(|tag| format!("HEAD /v2/team/base/manifests/{tag}"));
        assert_eq!(asked(&server, seen), heads);

        // A step needs one of them: without a way to it that is an error, and with one it comes.
        context.write("src", "changed\n");
        let failed = bench.build(&context, &["--offline", "-t", "app"]).expect(4);
        failed.says(&[&base(&server, "tools"), "is not in the store", "Dockerfile:1", "kiln pull"]);
        let seen = server.lines().len();
        let changed = bench.build(&context, &["-t", "app"]).expect(0);
        assert_eq!(changed.ran().len(), 3, "{}", changed.stderr);
        let layers = [format!("GET /v2/team/base/blobs/{}", layer(&server, "tools"))];
        assert_eq!(asked(&server, seen), layers);
        assert_eq!(bench.ok(&["images"]).matches("team/base").count(), 2);
        bench.store.sound().unwrap();
        assert_eq!(records(&bench).len(), 0);
    }
}

/// What is known of images without layers.
fn records(bench: &Bench) -> Vec<PathBuf> {
    let files = fs::read_dir(bench.store.root().join("state/bases")).into_iter().flatten().flatten();
    files.map(|file| file.path()).collect()
}

/// A registry that has the documents of its bases, and their layers once it is told so.
fn without_layers(status: u16) -> (Server, Arc<AtomicBool>) {
    let (has_layers, layers) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(Vec::new())));
    let (is_whole, of_bases) = (has_layers.clone(), layers.clone());
    let server = Server::scripted(move |request, _| {
        let is_layer = of_bases.lock().unwrap().iter().any(|layer: &String| request.path.ends_with(layer));
        let is_gone = request.is_blob() && is_layer && !is_whole.load(Ordering::SeqCst);
        is_gone.then(|| answer(status, &[], b"no layer"))
    });
    offer_bases(&server);
    layers.lock().unwrap().push(layer(&server, "tools"));
    has_layers.store(false, Ordering::SeqCst);
    (server, has_layers)
}

fn on_tools(server: &Server) -> Context {
    let dockerfile = format!("# Somebody's image\nFROM {}\nCOPY src /src\n", base(server, "tools"));
    Context::new(&[("Dockerfile", &dockerfile), ("src", "src\n")])
}

#[test]
fn a_pull_that_fails_when_a_step_needs_it_names_the_line() {
    needs_root!();
    for (status, said, asks_again) in [(404, "does not have", true), (500, "500", false)] {
        let (server, has_layers) = without_layers(status);
        let (context, bench) = (on_tools(&server), Bench::empty());
        bench.write("kiln.toml", "[registries]\ntries = 1\n");
        let failed = bench.build(&context, &["-t", "app"]).expect(5);
        let name = base(&server, "tools");
        failed.says(&[&format!("base image {name}"), "cannot be pulled", "Dockerfile:2", said]);
        assert_eq!(bench.ok(&["images", "-q"]), "");
        assert_eq!(bench.store.active_snapshots(), [""; 0]);
        bench.store.sound().unwrap();
        // What its manifest lists is gone for good: the tag may lead elsewhere by now.
        has_layers.store(true, Ordering::SeqCst);
        let seen = server.lines().len();
        bench.build(&context, &["-t", "app"]).expect(0);
        let again = asked(&server, seen).iter().any(|line| line.contains("/manifests/"));
        assert_eq!((again, layers_asked(&server, seen)), (asks_again, 1), "{status}");
        bench.store.sound().unwrap();
    }
    // What does not exist is said before anything is done.
    let (server, bench) = (Server::new(), Bench::empty());
    let context = two_stages(&server);
    let failed = bench.build(&context, &[]).expect(5);
    let failed = failed.says(&[&format!("base image {}", base(&server, "tools")), "Dockerfile:1"]);
    assert!(!failed.stderr.contains('#'), "{}", failed.stderr);
}

#[test]
fn a_layer_that_is_not_what_it_should_be_is_not_kept() {
    needs_root!();
    let server = Server::new();
    offer_bases(&server);
    let tools: kiln_oci::Digest = layer(&server, "tools").parse().unwrap();
    server.state.lock().unwrap().blobs.get_mut(&tools).unwrap()[20] ^= 1;
    let (context, bench) = (on_tools(&server), Bench::empty());
    let failed = bench.build(&context, &["-t", "app"]).expect(6);
    failed.says(&[&format!("base image {}", base(&server, "tools")), "Dockerfile:2"]);
    assert_eq!(bench.ok(&["images", "-q"]), "");
    bench.store.sound().unwrap();
}

#[test]
fn a_build_that_is_killed_before_the_layers_come_leaves_what_it_has_found_out() {
    needs_root!();
    let (held, layers) = (Arc::new(Mutex::new(())), Arc::new(Mutex::new(None)));
    let (gate, of_tools) = (held.clone(), layers.clone());
    // Its layers wait until the test lets go.
    let server = Server::scripted(move |request, _| {
        let layer: Option<String> = of_tools.lock().unwrap().clone();
        if layer.is_some_and(|layer| request.is_blob() && request.path.ends_with(&layer)) {
            drop(gate.lock());
        }
        None
    });
    offer_bases(&server);
    *layers.lock().unwrap() = Some(layer(&server, "tools"));
    let (context, bench) = (on_tools(&server), Bench::empty());
    let waits = held.lock().unwrap();
    let mut known = None;
    for (signal, code) in [(Signal::KILL, None), (Signal::INT, Some(130))] {
        let mut build = Running::start(bench.command(&["build", "--progress", "plain", context.path()]));
        build.wait_for("fetching 1 of 1 layers");
        build.signal(signal);
        assert_eq!(build.end().code, code);
        assert_eq!((bench.ok(&["images", "-q"]), records(&bench).len()), (String::new(), 1));
        bench.store.sound().unwrap();
        known.get_or_insert(server.lines().len());
    }
    drop(waits);
    bench.build(&context, &["-t", "app"]).expect(0);
    let asked = asked(&server, known.unwrap());
    assert!(!asked.is_empty() && asked.iter().all(|line| !line.contains("/manifests/")), "{asked:?}");
    assert_eq!(records(&bench).len(), 0);
    bench.store.sound().unwrap();
    assert_eq!(fs::read_dir(bench.store.root().join("ingest")).unwrap().count(), 0);
}

#[test]
fn what_is_known_of_a_base_outlives_garbage_collection_and_no_damage() {
    needs_root!();
    let (server, has_layers) = without_layers(500);
    let (context, bench) = (on_tools(&server), Bench::empty());
    bench.write("kiln.toml", "[registries]\ntries = 1\n");
    bench.build(&context, &[]).expect(5);
    let asks = || {
        let seen = server.lines().len();
        bench.build(&context, &[]).expect(5);
        asked(&server, seen).iter().any(|line| line == "GET /v2/team/base/manifests/tools")
    };
    bench.ok(&["prune", "--all", "--force"]);
    assert!(!asks());
    bench.store.sound().unwrap();
    let file = records(&bench).pop().unwrap();
    let whole = fs::read_to_string(&file).unwrap();
    for damaged in [
        String::new(),
        "{}".to_owned(),
        whole[..whole.len() / 2].to_owned(),
        whole.replace("\"version\":1", "\"version\":2"),
        whole.replace("OF=base", "OF=evil"),
        whole.replacen("schemaVersion", "schemaversion", 1),
    ] {
        assert_ne!(damaged, whole);
        fs::write(&file, &damaged).unwrap();
        assert!(asks(), "{damaged}");
        assert!(!asks());
    }
    // A pull by hand ends it.
    has_layers.store(true, Ordering::SeqCst);
    bench.ok(&["pull", &base(&server, "tools")]);
    assert_eq!(records(&bench).len(), 0);
    bench.build(&context, &["--offline"]).expect(0);
    bench.store.sound().unwrap();
}

#[test]
fn an_image_comes_once_for_all_stages_and_names() {
    needs_root!();
    let server = Server::new();
    offer_bases(&server);
    let same = server.state.lock().unwrap().manifests["tools"].clone();
    server.state.lock().unwrap().manifests.insert("again".to_owned(), same);
    let (tools, again) = (base(&server, "tools"), base(&server, "again"));
    let dockerfile = format!(
        "FROM {tools} AS a\nCOPY src /a\nFROM {tools} AS b\nCOPY src /b\nFROM scratch\n\
         COPY --from=a /of /x\nCOPY --from=b /of /y\nCOPY --from={again} /of /z\n"
    );
    let context = Context::new(&[("Dockerfile", &dockerfile), ("src", "src\n")]);
    let (bench, seen) = (Bench::empty(), server.lines().len());
    bench.build(&context, &["-t", "app"]).expect(0);
    assert_eq!(layers_asked(&server, seen), 1, "{:?}", asked(&server, seen));
    for name in [&tools, &again] {
        assert_eq!(bench.id(name), bench.id(&tools));
    }
    assert_eq!(records(&bench).len(), 0);
    bench.store.sound().unwrap();
}

#[test]
fn a_tag_that_moves_before_its_layers_came_is_followed_when_somebody_asks() {
    needs_root!();
    let (server, has_layers) = without_layers(500);
    let (context, bench) = (on_tools(&server), Bench::empty());
    bench.write("kiln.toml", "[registries]\ntries = 1\n");
    bench.build(&context, &[]).expect(5);
    // What the tag led to is what comes, and nothing else.
    let moved = server.state.lock().unwrap().manifests["runtime"].clone();
    let before = server.state.lock().unwrap().manifests.insert("tools".to_owned(), moved).unwrap();
    has_layers.store(true, Ordering::SeqCst);
    bench.build(&context, &["-t", "app"]).expect(0);
    let digest = kiln_oci::Digest::of(&before.1).to_string();
    let by_digest = format!("{}/team/base@{digest}", server.domain());
    bench.ok(&["pull", &by_digest]);
    assert_eq!(bench.id(&base(&server, "tools")), bench.id(&by_digest));
    // The store has the old one under that name: `--pull` brings the new one whole.
    let seen = server.lines().len();
    bench.build(&context, &["--pull", "-t", "app"]).expect(0);
    assert_eq!(layers_asked(&server, seen), 1);
    assert_ne!(bench.id(&base(&server, "tools")), bench.id(&by_digest));
    bench.store.sound().unwrap();
}

#[test]
fn layers_of_a_base_that_never_came_are_mounted_by_a_push() {
    needs_root!();
    // It says of no blob that the new repository has it, and mounts what it is asked to.
    let server = Server::scripted(move |request, _| {
        let is_app = request.path.starts_with("/v2/team/app/blobs/");
        match request.method.as_str() {
            "HEAD" if is_app => Some(answer(404, &[], b"")),
            "POST" if is_app && request.query.contains("mount=") => Some(answer(201, &[], b"")),
            _ => None,
        }
    });
    offer_bases(&server);
    let (context, dir) = (two_stages(&server), tempfile::tempdir().unwrap());
    let local = |side: &str| format!("type=local,{side}={}", text(dir.path()));
    let first = Bench::empty().build(&context, &["--cache-to", &format!("{},mode=max", local("dest"))]);
    first.expect(0);
    let (bench, seen) = (Bench::empty(), server.lines().len());
    let app = format!("{}/team/app:v1", server.domain());
    let pushed = bench.build(&context, &["--push", "-t", &app, "--cache-from", &local("src")]).expect(0);
    assert_eq!((pushed.ran(), warnings(&pushed)), (vec![], vec![]));
    assert!(pushed.stdout.contains("1 mounted"), "{}", pushed.stdout);
    assert_eq!(layers_asked(&server, seen), 0, "{:?}", asked(&server, seen));
    let runtime = layer(&server, "runtime").replace(':', "%3A");
    let mounts = server.seen().into_iter().filter(|request| request.query.contains("mount="));
    let mounts: Vec<String> = mounts.map(|request| request.query).collect();
    assert_eq!(mounts, [format!("mount={runtime}&from=team%2Fbase")]);
    bench.store.sound().unwrap();
}
