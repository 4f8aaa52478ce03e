//! The Linux executor.

mod channel;
mod init;
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

pub use outer::init_if_asked;
pub use start::Linux;
pub use user::{UserIds, resolve_user};
