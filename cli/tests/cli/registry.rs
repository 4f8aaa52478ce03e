//! Images from and to registries: Debian's `docker-registry`, and one that lies.

mod bases;
mod cache;
mod copy;
mod hostile;
mod lazy;
mod lists;
mod login;
mod mirrors;
mod own;
mod pace;
mod replies;
mod run;
mod server;
mod transfer;
