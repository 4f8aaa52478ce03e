//! `kiln doctor`: what is found, what is in the way, what helps.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::{Ids, User};
use crate::harness::{Outcome, Store, needs_root, text};

fn rungs(outcome: &Outcome) -> Value {
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {}", outcome.stdout))
}

/// State and help of a rung.
fn rung(report: &Value, name: &str) -> (String, String) {
    let all = report["rungs"].as_array().unwrap();
    let found = all.iter().find(|rung| rung["name"] == name).unwrap_or_else(|| panic!("{name}: {report:#}"));
    (
        found["state"].as_str().unwrap().to_owned(),
        format!("{} | {}", found["found"].as_str().unwrap(), found["help"].as_str().unwrap_or_default()),
    )
}

#[test]
fn root_can_build() {
    needs_root!();
    let store = Store::empty();
    let report = rungs(&store.ok(&["doctor", "--format", "json"]));
    assert_eq!(report["ok"], true);
    for name in ["overlayfs", "sandbox", "seccomp", "ids"] {
        assert_eq!(rung(&report, name).0, "ok", "{name}");
    }
    // Each is tried on a root of its own: what is in the way of one is not what an earlier one left.
    for name in ["network", "limits"] {
        let (state, text) = rung(&report, name);
        assert!(state == "ok" || !text.contains("attributes of the root"), "{name}: {text}");
    }
    assert_eq!(rung(&report, "user namespaces").0, "unused");
    // Nothing of it is left, and no store was made.
    assert!(!store.root().exists());
    assert_eq!(fs::read_dir(store.beside("")).unwrap().count(), 0);
    let table = store.ok(&["doctor"]).stdout;
    assert!(table.ends_with("builds can run\n") && table.contains("sandbox"), "{table}");
}

#[test]
fn a_user_with_a_range_has_it_all() {
    needs_root!();
    let Some(user) = User::new(Ids::Range) else { return };
    let report = rungs(&user.ok(&["doctor", "--format", "json"]));
    assert_eq!(report["ok"], true);
    for name in ["subuid/subgid", "user namespaces", "ids", "overlayfs", "sandbox"] {
        assert_eq!(rung(&report, name).0, "ok", "{name}: {report:#}");
    }
    assert!(!user.at("home/.local").exists());
    assert_eq!(fs::read_dir(user.at("home")).unwrap().count(), 0);
}

#[test]
fn a_user_without_a_range_is_told_how_to_get_one() {
    needs_root!();
    let Some(user) = User::new(Ids::Single) else { return };
    let report = rungs(&user.ok(&["doctor", "--format", "json"]));
    let (state, text) = rung(&report, "subuid/subgid");
    assert_eq!(state, "limited");
    assert!(text.contains("/etc/subuid has no line") && text.contains("usermod --add-subuids"), "{text}");
    let (state, text) = rung(&report, "ids");
    assert!(state == "limited" && text.contains("(su, sudo"), "{text}");
    assert_eq!(rung(&report, "sandbox").0, "ok");
}

#[test]
fn newuidmap_without_its_bit_is_found() {
    needs_root!();
    let Some(mut user) = User::new(Ids::Range) else { return };
    let copy = user.at("newuidmap");
    fs::copy("/usr/bin/newuidmap", &copy).unwrap();
    fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    user.prepare(&format!("mount --bind {} /usr/bin/newuidmap || exit 97", text(&copy)));
    let outcome = user.ok(&["doctor", "--format", "json"]);
    assert!(outcome.stderr.contains("newuidmap or newgidmap gave no range"), "{}", outcome.stderr);
    let (state, text) = rung(&rungs(&outcome), "subuid/subgid");
    assert_eq!(state, "limited");
    assert!(text.contains("sudo chmod u+s /usr/bin/newuidmap"), "{text}");
}

#[test]
fn a_host_without_user_namespaces_is_found() {
    needs_root!();
    let Some(user) = User::new(Ids::Single) else { return };
    // A namespace around the user, in which the setting is only its own.
    let kiln = user.at("kiln");
    let uid = user.uid();
    let script = format!(
        "echo ready; read go; echo 0 > /proc/sys/user/max_user_namespaces && \
         exec setpriv --reuid {uid} --regid {uid} --clear-groups \"$@\""
    );
    let run = |args: &[&str]| {
        let mut command = Command::new("unshare");
        command
            .args(["-U", "--keep-caps", "sh", "-c", &script, "sh"])
            .arg(&kiln)
            .args(args)
            .env("HOME", user.at("home"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut String::new()).unwrap();
        for map in ["uid_map", "gid_map"] {
            fs::write(format!("/proc/{}/{map}", child.id()), "0 0 4000000").unwrap();
        }
        child.stdin.take().unwrap().write_all(b"go\n").unwrap();
        let mut stdout = String::new();
        output.read_to_string(&mut stdout).unwrap();
        Outcome { stdout, ..Outcome::of(child.wait_with_output().unwrap()) }
    };
    let outcome = run(&["doctor", "--format", "json"]).expect(1);
    let report = rungs(&outcome);
    assert_eq!(report["ok"], false);
    let (state, text) = rung(&report, "user namespaces");
    assert_eq!(state, "blocked");
    assert!(text.contains("sudo sysctl -w user.max_user_namespaces="), "{text}");
    run(&["images"]).expect(6).says(&["a user cannot have a namespace", "kiln doctor"]);
}
