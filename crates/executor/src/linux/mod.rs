//! The Linux executor.

mod cgroup;
mod channel;
mod chown;
mod dev;
mod etc;
mod init;
mod inputs;
mod join;
mod limits;
mod mounts;
mod net;
mod netlink;
mod nft;
mod outer;
mod paths;
mod probe;
mod pty;
mod reaper;
mod seccomp;
mod start;
mod sys;
mod user;
mod user_net;
mod userns;

pub use inputs::check_mount_target;
pub use limits::check_sysctl;
pub use mounts::detach;
pub use outer::init_if_asked;
pub use probe::{Check, probe_sandbox};
pub use seccomp::{Seccomp, SeccompProfile};
pub use start::Linux;
pub use sys::signal_by_fd;
pub use user::{UserIds, resolve_user};
pub use user_net::UserNetwork;
pub use userns::{Ids, SubIds, Subordinate, become_root, ids, join_root};
