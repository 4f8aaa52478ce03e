//! A registry whose images somebody else keeps: the same requirements, and what is its own. Deleting blobs is left out:
//! there they go with the last manifest that needs them.

mod care;
mod lab;
mod pushes;

#[path = "../discovery.rs"]
mod discovery;
#[path = "../management.rs"]
mod management;
#[path = "../pull.rs"]
mod pull;
#[path = "../push.rs"]
mod push;
