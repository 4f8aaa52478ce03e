//! `kiln mutate`, `kiln flatten`: images made of others.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tar::EntryType;

use crate::harness::{Context, Store, needs_root, text};
use crate::interop::{Tools, needs};
use crate::toolkit_image::{Layer, image, json};

/// Steps that add, hide, replace and touch, with hard links, special files and times.
const STEPS: &str = "
RUN mkdir -p /a/b/c /home/app && echo big > /a/big && echo 1 > /a/b/1 && echo 2 > /a/b/2 && ln /a/b/1 /a/b/c/linked && mkfifo /a/fifo
COPY file /home/app/file
RUN rm -r /a/b/c && echo file > /a/b/c && chmod 700 /a/b/2 && rm /bin/yes && ln /bin/busybox /bin/linked && mkdir /tmp/x
RUN rm -r /a/b && ln -s / /a/b && rm /a/fifo && mkdir /a/fifo && echo x > /a/fifo/x && touch -d '1999-01-01 00:00:00' /home/app
RUN rm -r /home && mkdir -p /home/app && echo again > /home/app/file && chown -R 12:34 /home/app && chmod 4711 /home/app/file
RUN rm /a/fifo/x && touch -d '2020-02-02 02:02:02' /a/fifo /a
";

fn built(store: &Store, name: &str, from: &str, steps: &str) {
    let dockerfile = format!("FROM {from}\n{steps}ENV GREETING=hello\nCMD [\"sh\"]\n");
    let context = Context::new(&[("Dockerfile", &dockerfile), ("file", "content\n")]);
    store.build(&context, &["-t", name]).expect(0);
}

/// All files of an image as one tar: owners, modes, times, links, content.
#[track_caller]
fn files(store: &Store, name: &str) -> Vec<u8> {
    let output = store.command(&["cp", &format!("{name}:/"), "-"]).output().expect("kiln starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn layers(store: &Store, name: &str) -> Vec<Value> {
    let listed = json(&store.ok(&["layer", "ls", "--format", "json", name]));
    listed["layers"].as_array().expect("a list").clone()
}

#[track_caller]
fn sound(store: &Store) {
    store.sound().unwrap_or_else(|problems| panic!("{problems}"));
}

#[test]
fn settings_are_set_and_the_rest_stays() {
    needs_root!();
    let store = Store::with_busybox();
    built(&store, "app:1", "busybox", "LABEL a=1 b=2\nEXPOSE 80\n");
    let before = store.config("app:1");
    let line = "mutate app:1 -t m:1 --env GREETING=bye --env NEW=a=b --label b=3 --user 12:34 --workdir /srv \
                --expose 53/udp --entrypoint /bin/echo --cmd";
    let args: Vec<&str> = line.split_whitespace().chain(["[\"a b\", \"c\"]"]).collect();
    let id = store.ok(&args).stdout;
    let after = store.config("m:1");
    let config = &after["config"];
    let env = config["Env"].as_array().expect("a list");
    assert_eq!(env[1..], [json!("GREETING=bye"), json!("NEW=a=b")]);
    assert_eq!(config["Labels"], json!({ "a": "1", "b": "3" }));
    assert_eq!((&config["User"], &config["WorkingDir"]), (&json!("12:34"), &json!("/srv")));
    assert_eq!(config["ExposedPorts"], json!({ "53/udp": {}, "80/tcp": {} }));
    assert_eq!((&config["Entrypoint"], &config["Cmd"]), (&json!(["/bin/echo"]), &json!(["a b", "c"])));
    assert_eq!((&after["rootfs"], &after["created"]), (&before["rootfs"], &before["created"]));
    let history = after["history"].as_array().expect("a list");
    assert_eq!(history[..history.len() - 1], before["history"].as_array().expect("a list")[..]);
    assert_eq!(history[history.len() - 1]["empty_layer"], true);
    assert_eq!(store.ok(&["run", "--rm", "--network", "none", "m:1"]).stdout, "a b c\n");
    // The same again is the same image, whatever the clock says.
    assert_eq!(store.ok(&args).stdout, id);
    // A new entrypoint takes the old one's command away; nothing removes.
    store.ok(&["mutate", "app:1", "-t", "m:2", "--entrypoint", "/bin/true"]);
    assert_eq!(store.config("m:2")["config"]["Cmd"], Value::Null);
    store.ok(&["mutate", "m:1", "-t", "m:3", "--entrypoint", "", "--cmd", "", "--user", ""]);
    let config = &store.config("m:3")["config"];
    assert_eq!([&config["Entrypoint"], &config["Cmd"], &config["User"]], [&Value::Null; 3]);
}

#[test]
fn volumes_signals_and_checks_are_set_and_variables_and_labels_go() {
    needs_root!();
    let store = Store::with_busybox();
    built(&store, "app:1", "busybox", "LABEL a=1 b=2\nVOLUME /old\n");
    let check = "--interval=5s --retries=2 CMD test -e /ready";
    let args = ["mutate", "app:1", "-t", "m:1", "--unset-env", "GREETING", "--unset-label", "b"];
    let more = ["--volume", "/data", "--stop-signal", "SIGINT", "--healthcheck", check];
    store.ok(&[&args[..], &more].concat());
    let config = store.config("m:1")["config"].clone();
    assert_eq!(config["Env"].as_array().map(Vec::len), Some(1), "PATH is left: {config}");
    assert_eq!((&config["Labels"], &config["StopSignal"]), (&json!({ "a": "1" }), &json!("SIGINT")));
    assert_eq!(config["Volumes"], json!({ "/data": {}, "/old": {} }));
    let shell = json!(["CMD-SHELL", "test -e /ready"]);
    assert_eq!(config["Healthcheck"], json!({ "Test": shell, "Interval": 5_000_000_000_u64, "Retries": 2 }));
    let none = ["--unset-label", "a", "--stop-signal", "", "--healthcheck", "NONE"];
    store.ok(&[&["mutate", "m:1", "-t", "m:2"][..], &none].concat());
    let config = store.config("m:2")["config"].clone();
    assert_eq!([&config["Labels"], &config["StopSignal"]], [&Value::Null; 2], "{config}");
    assert_eq!(config["Healthcheck"], json!({ "Test": ["NONE"] }));
    store.ok(&["mutate", "m:2", "-t", "m:3", "--healthcheck", ""]);
    assert_eq!(store.config("m:3")["config"]["Healthcheck"], Value::Null);
}

#[test]
fn what_makes_no_sense_is_refused_and_no_name_moves() {
    needs_root!();
    let store = Store::with_busybox();
    store.ok(&["tag", "busybox", "m:1"]);
    let before = (store.ok(&["inspect", "m:1"]).stdout, store.ok(&["images"]).stdout.lines().count());
    for (args, code, says) in [
        (&["-t", "m:1"][..], 2, "nothing to change"),
        (&["--user", "x"], 2, "--tag"),
        (&["-t", "m:1", "--user", "a b"], 2, "--user"),
        (&["-t", "m:1", "--user", "4294967295"], 2, "4294967295"),
        (&["-t", "m:1", "--expose", "70000"], 2, "70000"),
        (&["-t", "m:1", "--env", "=x"], 2, "--env"),
        (&["-t", "m:1", "--env", "NO_SUCH_VARIABLE_HERE"], 2, "NO_SUCH_VARIABLE_HERE"),
        (&["-t", "m:1", "--label", "x"], 2, "NAME=VALUE"),
        (&["-t", "m:1", "--cmd", "[1]"], 2, "--cmd"),
        (&["-t", "m:1", "--volume", "data"], 2, "--volume"),
        (&["-t", "m:1", "--stop-signal", "SIGNOSUCH"], 2, "SIGNOSUCH"),
        (&["-t", "m:1", "--healthcheck", "CMD a\nUSER x"], 2, "--healthcheck"),
        (&["-t", "m:1", "--base", "busybox"], 2, "--squash"),
        (&["-t", "m:1", "--squash"], 2, "--squash=all"),
        (&["-t", "m:1", "--squash=all", "--base", "busybox"], 2, "--base"),
        (&["-t", "m:1", "--append", "-", "--append", "-"], 2, "standard input"),
        (&["-t", "m:1", "--append", "/no/such/file"], 4, "/no/such/file"),
        (&["-t", "app/UPPER", "--user", "x"], 2, "UPPER"),
    ] {
        let outcome = store.kiln(&[&["mutate", "busybox"], args].concat());
        assert_eq!(outcome.code, Some(code), "{args:?}: {}", outcome.stderr);
        outcome.says(&[says]);
    }
    let after = (store.ok(&["inspect", "m:1"]).stdout, store.ok(&["images"]).stdout.lines().count());
    assert_eq!(before, after);
}

#[test]
fn appended_layers_add_and_hide() {
    needs_root!();
    let store = Store::empty();
    image(&store, "app:1", [Layer::new().dir("d").file("d/a", "a").file("d/b", "b")]);
    let upper = Layer::new().dir("d").gone("d/a").file("d/c", "c").bytes();
    let plain = store.beside("upper.tar");
    fs::write(&plain, &upper).expect("ours to write");
    let packed = store.beside("upper.tar.gz");
    let gzip = Command::new("gzip").args(["-c", text(&plain)]).output().expect("gzip runs");
    fs::write(&packed, gzip.stdout).expect("ours to write");
    store.ok(&["mutate", "app:1", "--append", text(&plain), "-t", "plain:1"]);
    store.ok(&["mutate", "app:1", "--append", text(&packed), "-t", "packed:1"]);
    let mut command = store.command(&["mutate", "app:1", "--append", "-", "-t", "piped:1"]);
    let piped = command.stdin(fs::File::open(&packed).expect("just written")).output().expect("kiln starts");
    assert!(piped.status.success(), "{}", String::from_utf8_lossy(&piped.stderr));
    assert_eq!(store.inspect("plain:1")["RootFS"], store.inspect("packed:1")["RootFS"]);
    assert_eq!(store.inspect("plain:1")["RootFS"], store.inspect("piped:1")["RootFS"]);
    let names = |store: &Store, name: &str| {
        let bytes = files(store, name);
        let mut tar = tar::Archive::new(&bytes[..]);
        let entries = tar
            .entries()
            .expect("a tar")
            .map(|entry| entry.expect("a tar").path().expect("UTF-8").display().to_string());
        entries.collect::<Vec<_>>()
    };
    assert_eq!(names(&store, "plain:1"), ["d/", "d/b", "d/c"]);
    // Kept as it came, and on its way out and in again the same image.
    let blob = &layers(&store, "packed:1")[1]["blob"];
    assert_eq!(blob["size"].as_u64(), fs::metadata(&packed).ok().map(|file| file.len()));
    let archive = store.beside("packed.docker.tar");
    store.ok(&["save", "-o", text(&archive), "packed:1"]);
    let other = Store::empty();
    other.ok(&["load", "-i", text(&archive)]);
    assert_eq!(other.inspect("packed:1")["Id"], store.inspect("packed:1")["Id"]);
    assert_eq!(names(&other, "packed:1"), ["d/", "d/b", "d/c"]);
    sound(&store);
}

#[test]
fn bad_layers_are_refused_as_load_refuses_them() {
    needs_root!();
    let store = Store::empty();
    image(&store, "app:1", [Layer::new().file("a", "a")]);
    let regular = EntryType::Regular;
    let escape = Layer::new().raw(b"../../escaped", regular, 0o644, (0, 0), b"", b"x").bytes();
    let replaced = Layer::new().raw(b".", EntryType::Symlink, 0o777, (0, 0), b"/etc", b"").bytes();
    let missing = Layer::new().hard("linked", "etc/shadow").bytes();
    let mut broken = Layer::new().file("a", "a").bytes();
    broken[0] = b'X';
    let mut cut = Layer::new().file("a", "0123456789").bytes();
    cut.truncate(515);
    let through = Layer::new().link("l", "/").file("l/inside", "x").bytes();
    let xz = vec![0xfd, b'7', b'z', b'X', b'Z', 0, 0, 0, 0, 0, 0, 0];
    let before = store.inspect("app:1")["Id"].clone();
    for (name, bytes, code) in [
        ("escape", escape, 7),
        ("root", replaced, 7),
        ("missing", missing, 6),
        ("checksum", broken, 6),
        ("cut", cut, 6),
        ("xz", xz, 4),
        ("through", through, 0),
    ] {
        let path = store.beside(name);
        fs::write(&path, bytes).expect("ours to write");
        let outcome =
            store.bounded(store.command(&["mutate", "app:1", "--append", text(&path), "-t", "m:1"]));
        assert_eq!(outcome.code, Some(code), "{name}: {}", outcome.stderr);
        if code != 0 {
            store.kiln(&["inspect", "m:1"]).expect(4);
        }
    }
    assert_eq!(store.inspect("app:1")["Id"], before);
    assert!(!store.beside("escaped").exists() && !Path::new("/inside").exists());
    sound(&store);
}

#[test]
fn squashed_and_flattened_images_have_the_same_files_to_the_byte() {
    needs_root!();
    let store = Store::with_busybox();
    built(
        &store,
        "mid:1",
        "busybox",
        "RUN mkdir -p /a/b && echo low > /a/b/low && touch -d '2001-02-03' /a\n",
    );
    built(&store, "app:1", "mid:1", STEPS);
    let before = files(&store, "app:1");
    for (name, args, count) in [
        ("own", &["mutate", "app:1", "--squash", "-t", "own:1"][..], 3),
        ("low", &["mutate", "app:1", "--squash=own", "--base", "busybox", "-t", "low:1"], 2),
        ("all", &["mutate", "app:1", "--squash=all", "-t", "all:1"], 1),
        ("flat", &["flatten", "app:1", "-t", "flat:1"], 1),
    ] {
        store.ok(args);
        let made = format!("{name}:1");
        assert_eq!(layers(&store, &made).len(), count, "{name}");
        assert!(files(&store, &made) == before, "{name}: the files differ");
        store.kiln(&["diff", "app:1", &made]).expect(0);
        let (old, new) = (store.config("app:1"), store.config(&made));
        assert_eq!(old["config"], new["config"], "{name}");
        let history = new["history"].as_array().expect("a list");
        assert_eq!(history.iter().filter(|entry| entry["empty_layer"] != true).count(), count, "{name}");
        let again = store.ok(args).stdout;
        assert_eq!(again.trim_end(), new_id(&store, &made), "{name}: the same again is the same image");
    }
    assert_eq!(store.config("flat:1")["history"].as_array().map(Vec::len), Some(1));
    assert_eq!(store.shell("own:1", "cat /home/app/file"), "again");
    sound(&store);
}

fn new_id(store: &Store, name: &str) -> String {
    store.inspect(name)["Id"].as_str().expect("a digest").to_owned()
}

#[test]
fn later_owners_and_modes_are_folded_into_the_layer_of_the_file() {
    needs_root!();
    let store = Store::with_busybox();
    let steps = "RUN dd if=/dev/urandom of=/big bs=1k count=2000 2> /dev/null\nRUN chown 12:34 /big\nRUN chmod 600 /big\n";
    built(&store, "app:1", "busybox", steps);
    let wasted =
        |name: &str| json(&store.ok(&["layer", "show", name, "--format", "json"]))["wasted_bytes"].clone();
    assert_eq!(wasted("app:1"), 2 * 2000 * 1024);
    let told = store.ok(&["mutate", "app:1", "--squash", "-t", "own:1"]);
    assert_eq!(told.stderr, "3 layers above busybox:latest became one\n");
    assert_eq!(wasted("own:1"), 0);
    let [_, own] = &layers(&store, "own:1")[..] else { panic!("two layers") };
    assert!(own["tar_bytes"].as_u64().expect("a number") < 2100 * 1024, "{own}");
    let story = store.ok(&["layer", "show", "own:1", "/big"]).stdout;
    assert!(story.contains("/big is from layer 2: file, 0600, 12:34, 2.05MB\n"), "{story}");
    // A file of the base whose owner alone changed has to be in the upper layer, and stays there.
    built(&store, "owned:1", "busybox", "RUN chown 5:6 /bin/busybox\n");
    store.ok(&["mutate", "owned:1", "--squash", "-t", "owned:2"]);
    assert!(files(&store, "owned:1") == files(&store, "owned:2"));
}

#[test]
fn base_that_is_none_is_refused() {
    needs_root!();
    let store = Store::with_busybox();
    built(&store, "app:1", "busybox", "RUN touch /x\n");
    built(&store, "other:1", "busybox", "RUN touch /y\n");
    store
        .kiln(&["mutate", "app:1", "--squash", "--base", "other:1", "-t", "m:1"])
        .expect(2)
        .says(&["hint:", "kiln layer ls"]);
    // Without a name it is nobody's base by itself.
    store.ok(&["rmi", "busybox"]);
    store.kiln(&["mutate", "app:1", "--squash", "-t", "m:1"]).expect(2).says(&["--base IMAGE"]);
    store.ok(&["mutate", "app:1", "--squash=all", "-t", "m:1"]);
    assert!(files(&store, "app:1") == files(&store, "m:1"));
}

/// The regular files of a tree, with modes and owners, as `find` has them.
fn tree(root: &Path) -> String {
    let script = "cd \"$1\" && find . ! -name . ! -path ./proc ! -path ./sys ! -path ./dev -printf '%P %y %m %U:%G %s %l %T@\n' \
                  | sed 's/^\\([^ ]* d [^ ]* [^ ]*\\) [0-9]* /\\1 - /' | sort && find . -type f -exec sha256sum {} + | sort";
    let output = Command::new("sh").args(["-c", script, "tree", text(root)]).output().expect("sh runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn other_tools_unpack_the_new_images_to_the_same_tree() {
    needs!("umoci", "skopeo");
    let (store, tools) = (Store::with_busybox(), Tools::new());
    built(&store, "app:1", "busybox", STEPS);
    store.ok(&["mutate", "app:1", "--squash", "--env", "A=b", "-t", "own:1"]);
    store.ok(&["flatten", "app:1", "-t", "flat:1"]);
    let ours = store.beside("ours");
    store.ok(&["cp", "-a", "app:1:/", text(&ours)]);
    let expected = tree(&ours);
    assert!(expected.contains("home/app/file f 4711 12:34 6 "), "{expected}");
    for name in ["app", "own", "flat"] {
        let archive = tools.path(&format!("{name}.tar"));
        store.ok(&["save", "--format", "oci", "-o", text(&archive), &format!("{name}:1")]);
        let (layout, bundle) = (tools.path(&format!("{name}-layout")), tools.path(&format!("{name}-bundle")));
        let copied = Command::new("skopeo")
            .args(["--policy", text(&tools.path("policy.json")), "copy", "--quiet"])
            .args([format!("oci-archive:{}", text(&archive)), format!("oci:{}:{name}", text(&layout))])
            .output()
            .expect("checked");
        assert!(copied.status.success(), "{}", String::from_utf8_lossy(&copied.stderr));
        let image = format!("{}:{name}", text(&layout));
        let unpacked = Command::new("umoci")
            .args(["unpack", "--image", &image, text(&bundle)])
            .output()
            .expect("checked");
        assert!(unpacked.status.success(), "{}", String::from_utf8_lossy(&unpacked.stderr));
        assert_eq!(tree(&bundle.join("rootfs")), expected, "{name}");
    }
}

#[test]
fn mutated_images_leave_nothing_behind_when_stopped() {
    needs_root!();
    let store = Store::with_busybox();
    built(&store, "app:1", "busybox", STEPS);
    // A layer on standard input that never ends: stopped in the middle of it.
    let (reader, writer) = std::io::pipe().expect("there are file descriptors left");
    let mut command = store.command(&["mutate", "app:1", "--append", "-", "--squash", "-t", "m:1"]);
    let mut child = command.stdin(reader).stderr(std::process::Stdio::piped()).spawn().expect("kiln starts");
    drop(command);
    let bytes = Layer::new().file("a", "a").bytes();
    std::io::Write::write_all(&mut &writer, &bytes).expect("kiln reads");
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::KILL)
        .expect("our child");
    child.wait().expect("our child");
    let mut said = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut said).expect("text");
    drop(writer);
    store.kiln(&["inspect", "m:1"]).expect(4);
    assert_eq!(store.active_snapshots(), [""; 0]);
    sound(&store);
    assert_eq!(said, "");
}
