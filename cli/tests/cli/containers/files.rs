//! What containers write, and what becomes of it.

use std::fs;
use std::process::Stdio;

use super::Docker;
use crate::harness::{Context, Store, needs_root, text};

#[test]
fn a_container_becomes_an_image() {
    needs_root!();
    Docker::each(|docker| {
        docker.start("web", &[], "mkdir /made && echo x > /made/x && rm /etc/group; exec sleep 31536110");
        docker.until(&["exec", "web", "test", "!", "-e", "/etc/group"], |outcome| outcome.code == Some(0));
        let changed = docker.ok(&["diff", "web"]);
        for line in ["A /made", "A /made/x", "C /etc", "D /etc/group"] {
            assert!(changed.lines().any(|changed| changed == line), "{line}: {changed}");
        }
        docker.ok(&[
            "commit",
            "-a",
            "me",
            "-c",
            "ENV KEPT=1",
            "-c",
            "CMD [\"cat\", \"/made/x\"]",
            "web",
            "app:1",
        ]);
        docker.ok(&["rm", "-f", "web"]);
        assert_eq!(docker.ok(&["run", "--rm", "--network", "none", "app:1"]), "x");
        let script = "echo $KEPT; ls /etc/group 2>/dev/null; true";
        assert_eq!(docker.ok(&["run", "--rm", "--network", "none", "app:1", "sh", "-c", script]), "1");
        docker.ok(&["rmi", "app:1"]);
    });
}

#[test]
fn a_commit_tells_who_and_why() {
    needs_root!();
    let store = Store::with_busybox();
    let docker = Docker::Kiln(store);
    docker.ok(&["run", "--name", "web", "--network", "none", "busybox", "touch", "/made"]);
    docker.ok(&["commit", "-m", "why", "-a", "who", "web", "app:1"]);
    let Docker::Kiln(store) = &docker else { return };
    let config = store.config("app:1");
    let last = config["history"].as_array().and_then(|all| all.last()).expect("a history");
    assert_eq!((&last["comment"], &last["author"]), (&"why".into(), &"who".into()));
    assert_eq!((&last["created_by"], &config["author"]), (&"touch /made".into(), &"who".into()));
    docker.ok(&["rm", "web"]);
    docker.is_clean();
}

#[test]
fn files_are_copied_in_and_out_whether_it_runs_or_not() {
    needs_root!();
    let context = Context::new(&[("in", "from here"), ("dir/a", "a"), ("dir/b", "b")]);
    Docker::each(|docker| {
        docker.start("web", &[], "mkdir /there && echo inside > /out; exec sleep 31536111");
        docker.until(&["exec", "web", "cat", "/out"], |outcome| outcome.stdout == "inside\n");
        let out = tempfile::tempdir().expect("temporary directories can be made");
        let to = |name: &str| text(&out.path().join(name)).to_owned();
        let from = |name: &str| text(&context.at(name)).to_owned();
        for running in [true, false] {
            docker.ok(&["cp", &from("in"), "web:/there"]);
            docker.ok(&["cp", &from("in"), "web:/there/renamed"]);
            docker.ok(&["cp", &from("dir"), "web:/there"]);
            docker.ok(&["cp", &format!("{}/.", from("dir")), "web:/there"]);
            docker.ok(&["cp", "web:/out", &to("out")]);
            assert_eq!(fs::read_to_string(to("out")).expect("copied"), "inside\n");
            let all = to(if running { "all" } else { "again" });
            docker.ok(&["cp", "web:/there", &all]);
            for (name, content) in [("in", "from here"), ("renamed", "from here"), ("dir/a", "a"), ("b", "b")]
            {
                let path = std::path::Path::new(&all).join(name);
                assert_eq!(fs::read_to_string(&path).expect(name), content, "{name}");
            }
            assert!(docker.run(&["cp", "web:/absent", &to("absent")]).code != Some(0));
            assert!(docker.run(&["cp", &from("in"), "web:/absent/in"]).code != Some(0));
            if running {
                docker.ok(&["stop", "-t", "0", "web"]);
            }
        }
        docker.ok(&["start", "web"]);
        docker.ok(&["exec", "web", "cat", "/there/in"]);
        docker.ok(&["rm", "-f", "web"]);
    });
}

#[test]
fn a_link_inside_leads_no_copy_outside() {
    needs_root!();
    let docker = Docker::kiln();
    let context = Context::new(&[("in", "from here"), ("victim/kept", "kept")]);
    let victim = text(&context.at("victim")).to_owned();
    docker.start("web", &[], &format!("mkdir -p /d; ln -s {victim} /d/link; exec sleep 31536112"));
    docker.until(&["exec", "web", "readlink", "/d/link"], |outcome| outcome.code == Some(0));
    let source = text(&context.at("in")).to_owned();
    for _ in 0..2 {
        docker.run(&["cp", &source, "web:/d/link/kept"]);
        assert_eq!(fs::read_to_string(context.at("victim/kept")).expect("ours"), "kept");
        let out = tempfile::tempdir().expect("temporary directories can be made");
        docker.run(&["cp", "web:/d/link/kept", text(&out.path().join("x"))]);
        assert!(!out.path().join("x").exists());
        docker.ok(&["stop", "-t", "0", "web"]);
    }
    docker.ok(&["rm", "-f", "web"]);
    docker.is_clean();
}

#[test]
fn export_writes_what_the_container_has() {
    needs_root!();
    let docker = Docker::kiln();
    docker.start("web", &["-v", "/data"], "echo x > /made; echo no > /data/no; exec sleep 31536113");
    docker.until(&["exec", "web", "cat", "/data/no"], |outcome| outcome.stdout == "no\n");
    let mut command = docker.command(&["export", "web"]);
    let output = command.stdout(Stdio::piped()).output().expect("kiln starts");
    let mut names = Vec::new();
    for entry in tar::Archive::new(&output.stdout[..]).entries().expect("a tar") {
        let path = entry.expect("whole").path().expect("text").display().to_string();
        names.push(path.trim_start_matches("./").to_owned());
    }
    assert!(names.contains(&"made".to_owned()) && names.contains(&"bin/busybox".to_owned()), "{names:?}");
    assert!(!names.iter().any(|name| name.starts_with("proc/") || name == "data/no"), "{names:?}");
    docker.ok(&["rm", "-f", "-v", "web"]);
    assert_eq!(docker.ok(&["volume", "ls", "-q"]), "");
    docker.is_clean();
}

#[test]
fn a_new_volume_has_what_the_image_has_there() {
    needs_root!();
    let store = Store::with_busybox();
    store.image(
        "app",
        "FROM busybox\nRUN --network=none mkdir /data && echo first > /data/x && chmod 700 /data\n",
    );
    let docker = Docker::Kiln(store);
    let run = |script: &str| {
        docker.ok(&["run", "--rm", "--network", "none", "-v", "vol:/data", "app", "sh", "-c", script])
    };
    assert_eq!(run("cat /data/x; stat -c %a /data; echo second > /data/x"), "first\n700");
    assert_eq!(run("cat /data/x"), "second");
    docker.ok(&["volume", "rm", "vol"]);
    docker.is_clean();
}
