//! Containers for tests.

use kiln_executor::{Network, ProcessSpec, Security};
use kiln_oci::Digest;
use kiln_oci::image::RunConfig;

use crate::config::CONFIG_VERSION;
use crate::{Config, ContainerId, LogOptions, RestartPolicy, Time};

pub(crate) fn config(name: &str) -> Config {
    Config {
        version: CONFIG_VERSION,
        id: ContainerId::random().unwrap(),
        name: name.to_owned(),
        created: Time::now(),
        image: Digest::of(b"image"),
        image_name: "busybox".to_owned(),
        snapshot: None,
        process: ProcessSpec {
            args: vec!["sh".to_owned()],
            env: Vec::new(),
            cwd: "/".to_owned(),
            create_cwd: true,
            user: None,
            hostname: name.to_owned(),
            network: Network::None,
            security: Security::Sandbox,
            mounts: Vec::new(),
            extra_hosts: Vec::new(),
            no_new_privileges: false,
        },
        settings: RunConfig::default(),
        mounts: Vec::new(),
        ports: Vec::new(),
        tty: false,
        open_stdin: false,
        stdin_once: false,
        auto_remove: false,
        restart: RestartPolicy::No,
        stop_signal: 15,
        stop_timeout: None,
        health: None,
        log: LogOptions::default(),
    }
}
