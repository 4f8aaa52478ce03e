//! Images from and to registries: Debian's `docker-registry`, and one that lies.

mod attestations;
mod bases;
mod cache;
mod collected;
mod copy;
mod damaged;
mod deadline;
mod directions;
mod helpers;
mod hostile;
mod lazy;
mod lists;
mod login;
mod mirrors;
mod own;
mod pace;
mod plain;
mod platforms;
mod replies;
mod run;
mod server;
mod short_names;
mod tokens;
mod transfer;
mod trust;
