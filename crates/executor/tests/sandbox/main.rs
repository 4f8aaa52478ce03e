//! Real processes in real namespaces, on a tree with busybox. Needs root and busybox-static.

mod harness;
mod join;
mod mounts;
mod network;
mod process;
mod seccomp;
mod settings;
