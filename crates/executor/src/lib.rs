//! Processes in namespaces on a given root tree, without an external runtime.
//!
//! Read [`spec`](ProcessSpec) first, then `linux/start.rs` (this side), `linux/outer.rs` (the
//! re-executed helper that makes the namespaces) and `linux/init.rs` (process 1 inside, up to
//! `execve`). Networks: `linux/net.rs` (the one of steps), `linux/bridges.rs` and `linux/namespace.rs`
//! (those that users make, for whoever looks after containers).
//!
//! # Invariants
//! - No Rust code runs between fork and exec in a process with threads: the helper is this binary
//!   executed again, and it has one thread.
//! - A root tree arrives as an open detached mount and is never resolved by path on the host.
//! - When [`Executor::run`] returns, no process, mount or interface of the container is left; when
//!   the calling process dies instead, the kernel takes the helper and process 1 with it.
//! - `unsafe` stands in `linux::sys` only.

mod cancel;
mod capabilities;
mod error;
mod linux;
mod managed;
mod relay;
mod spec;
mod unfit;

pub use cancel::Cancel;
pub use capabilities::Capabilities;
pub use error::ExecError;
pub use linux::{
    Address, Authorities, AuthorityError, Bridge, Check, Ids, Linux, MoreGroups, NetworkNamespace, Plug,
    PublishedPort, PublishedPorts, Seccomp, SeccompProfile, SubIds, Subnet, Subordinate, UserIds,
    UserNetwork, become_root, check_emulator, check_mount_target, check_sysctl, close_inherited_at_exec,
    detach, free_subnet, host_resolver, ids, init_if_asked, is_subnet_routed, join_root, probe_sandbox,
    redirect_resolver, resolve_user, signal_by_fd,
};
pub use managed::{Managed, Started};
pub use relay::Relay;
pub use spec::{
    Device, Executor, Exit, Finished, Handles, Network, ProcessSpec, Resolver, ResourceLimit, Resources,
    Security, Stdio, Stream, SystemPaths, Usage,
};
pub use unfit::{Foreign, NoProgram, Unfit};
