//! Drives the real binary against real stores, each in a temporary directory of its own.
//!
//! Read [`harness`] first. `cargo xtask test` sets `KILN_TEST_BASES` to a directory with
//! `busybox.tar` and `debian-bookworm.tar`; without it, busybox comes from this machine and what
//! needs Debian is skipped aloud.

#![forbid(unsafe_code)]

mod harness;
// A registry that does what a test says, as the tests of kiln-registry have it.
#[allow(dead_code, reason = "each side uses what it needs")]
#[path = "../../../crates/registry/tests/registry/server.rs"]
mod scripted;
// Servers and repositories, as the tests of kiln-build have them.
#[allow(dead_code, reason = "each side uses what it needs")]
#[path = "../../../crates/build/src/source/tests/repo.rs"]
mod repo;
#[allow(dead_code, reason = "each side uses what it needs")]
#[path = "../../../crates/build/src/source/tests/web.rs"]
mod web;

mod attestations;
mod bad_input;
mod between;
mod bit_rot;
mod build;
mod build_process;
mod cache_mount;
mod cases;
mod catalogue;
mod certificates;
mod cgroups;
mod check;
mod clouds;
mod command_line;
mod concurrency;
mod containers;
mod context;
mod copy;
mod crash;
mod deltas;
mod differential;
mod disk;
mod du;
mod edits;
mod faults;
mod fsck;
mod full_disk;
mod gc;
mod hash_states;
mod image;
mod interop;
mod interrupts;
mod kept_layers;
mod keys;
mod kills;
mod layers;
mod manifests;
mod no_cache;
mod outputs;
mod platforms;
mod power;
mod reflink;
mod registry;
mod remote;
mod remote_add;
mod remote_cache;
mod remote_cache_clouds;
mod remote_cache_deltas;
mod remote_cache_ends;
mod remote_cache_s3;
mod remote_contexts;
mod remote_git;
mod remote_git_contexts;
mod remote_named;
mod rootless;
mod run;
mod run_mounts;
mod runtime;
mod sandbox;
mod save;
mod shell;
mod signals;
mod solver;
mod stamps;
mod surroundings;
mod toolkit_cp;
mod toolkit_diff;
mod toolkit_image;
mod toolkit_layer;
mod toolkit_mutate;
mod universal;
mod watch;
mod why;
