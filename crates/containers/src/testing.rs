//! Containers for tests.

use kiln_executor::{Network, ProcessSpec};
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
            create_cwd: true,
            hostname: name.to_owned(),
            network: Network::None,
            ..ProcessSpec::default()
        },
        settings: RunConfig::default(),
        mounts: Vec::new(),
        ports: Vec::new(),
        networks: Vec::new(),
        network_of: None,
        publish_all: false,
        tty: false,
        open_stdin: false,
        stdin_once: false,
        auto_remove: false,
        restart: RestartPolicy::No,
        stop_timeout: None,
        health: None,
        log: LogOptions::default(),
        runtime: None,
    }
}
