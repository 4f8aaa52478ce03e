//! Real processes in real namespaces, on a tree with busybox. Needs root and busybox-static.

mod harness;

mod mounts;
mod process;
mod seccomp;
mod settings;
