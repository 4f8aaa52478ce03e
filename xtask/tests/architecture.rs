//! The arrows between crates are those of the design, and no others.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// Which workspace crates each crate may use, in any kind of dependency.
const ALLOWED: &[(&str, &[&str])] = &[
    ("kiln-oci", &[]),
    ("kiln-llb", &["kiln-oci"]),
    ("kiln-frontend", &["kiln-llb", "kiln-oci"]),
    ("kiln-solver", &["kiln-oci"]),
    ("kiln-layer", &["kiln-oci"]),
    ("kiln-content", &["kiln-oci"]),
    ("kiln-registry", &["kiln-oci"]),
    // The client for what a mirror asks another registry.
    ("kiln-registry-server", &["kiln-oci", "kiln-registry"]),
    // The last for its tests.
    ("kiln-snapshotter", &["kiln-oci", "kiln-layer", "kiln-testkit"]),
    ("kiln-executor", &["kiln-oci"]),
    ("kiln-remote", &["kiln-oci"]),
    (
        "kiln-build",
        &[
            "kiln-oci",
            "kiln-llb",
            "kiln-frontend",
            "kiln-solver",
            "kiln-layer",
            "kiln-content",
            "kiln-registry",
            "kiln-snapshotter",
            "kiln-executor",
            "kiln-remote",
        ],
    ),
    ("kiln-containers", &["kiln-oci", "kiln-content", "kiln-snapshotter", "kiln-executor"]),
    (
        "kiln",
        &[
            "kiln-oci",
            "kiln-llb",
            "kiln-frontend",
            "kiln-solver",
            "kiln-layer",
            "kiln-content",
            "kiln-registry",
            "kiln-registry-server",
            "kiln-snapshotter",
            "kiln-executor",
            "kiln-build",
            "kiln-containers",
            // For its tests.
            "kiln-testkit",
        ],
    ),
    ("kiln-testkit", &[]),
    ("xtask", &[]),
];

#[test]
fn crates_use_only_the_crates_that_the_design_lets_them_use() {
    let wrong = violations(&workspace());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn an_arrow_that_points_back_is_found() {
    let packages =
        BTreeMap::from([("kiln-solver".to_owned(), vec!["kiln-llb".to_owned(), "petgraph".to_owned()])]);
    assert_eq!(violations(&packages), ["kiln-solver may not use kiln-llb"]);
}

#[test]
fn a_crate_that_the_design_does_not_list_is_found() {
    let packages = BTreeMap::from([("kiln-common".to_owned(), Vec::new())]);
    assert_eq!(violations(&packages), ["kiln-common is not in the design's table of crates"]);
}

fn violations(packages: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (name, dependencies) in packages {
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| known == name) else {
            wrong.push(format!("{name} is not in the design's table of crates"));
            continue;
        };
        let ours = |dependency: &&String| *dependency == "kiln" || dependency.starts_with("kiln-");
        for dependency in dependencies.iter().filter(ours) {
            if !allowed.contains(&dependency.as_str()) {
                wrong.push(format!("{name} may not use {dependency}"));
            }
        }
    }
    wrong
}

// Names of the workspace's packages with the names of all they depend on.
fn workspace() -> BTreeMap<String, Vec<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the repository");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(root).args(["metadata", "--no-deps", "--format-version", "1"]);
    let output = cargo.output().expect("cargo runs this test");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("metadata is JSON");
    let name = |value: &serde_json::Value| value["name"].as_str().expect("packages have names").to_owned();
    let packages = metadata["packages"].as_array().expect("a workspace has packages");
    packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().expect("a package lists dependencies");
            (name(package), dependencies.iter().map(name).collect())
        })
        .collect()
}
