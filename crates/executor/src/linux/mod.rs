//! The Linux executor.

mod channel;
mod dev;
mod etc;
mod init;
mod inputs;
mod join;
mod mounts;
mod net;
mod netlink;
mod nft;
mod outer;
mod paths;
mod pty;
mod start;
mod sys;
mod user;

pub use inputs::check_mount_target;
pub use mounts::detach;
pub use outer::init_if_asked;
pub use start::Linux;
pub use user::{UserIds, resolve_user};
