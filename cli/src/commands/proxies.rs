//! The proxies that processes in containers are told of.
//!
//! Containers get what docker gives them: what `~/.docker/config.json` says, and nothing of the caller's
//! environment. The steps of builds get the caller's as well.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use crate::errors::say;

/// Set in capitals and in small letters: programs look at either.
const NAMES: [&str; 5] = ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "FTP_PROXY", "ALL_PROXY"];

#[derive(Deserialize, Default)]
struct ConfigFile {
    #[serde(default)]
    proxies: BTreeMap<String, Proxies>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Proxies {
    http_proxy: String,
    https_proxy: String,
    no_proxy: String,
    ftp_proxy: String,
    all_proxy: String,
}

/// Those of this process's environment.
pub(super) fn of_environment() -> Vec<(String, String)> {
    let both = NAMES.into_iter().flat_map(|name| [name.to_owned(), name.to_ascii_lowercase()]);
    both.filter_map(|name| std::env::var(&name).ok().map(|value| (name, value))).collect()
}

/// Those of docker's config file, `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`, for all hosts
/// that it does not name.
pub(super) fn of_config_file() -> Vec<(String, String)> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let dir = variable("DOCKER_CONFIG").or_else(|| variable("HOME").map(|home| home.join(".docker")));
    let Some(path) = dir.map(|dir| dir.join("config.json")) else { return Vec::new() };
    let Ok(text) = std::fs::read(&path) else { return Vec::new() };
    match serde_json::from_slice(&text) {
        Ok(file) => of_file(file),
        Err(error) => {
            say(&format!("warning: {} cannot be used: {error}\n", path.display()));
            Vec::new()
        }
    }
}

fn of_file(mut file: ConfigFile) -> Vec<(String, String)> {
    let all = file.proxies.remove("default").unwrap_or_default();
    let values = [all.http_proxy, all.https_proxy, all.no_proxy, all.ftp_proxy, all.all_proxy];
    let given = NAMES.into_iter().zip(values).filter(|(_, value)| !value.is_empty());
    given
        .flat_map(|(name, value)| [(name.to_owned(), value.clone()), (name.to_ascii_lowercase(), value)])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_dockers_file_says_is_set_in_both_ways() {
        let text = r#"{"auths": {}, "proxies": {
            "default": {"httpProxy": "http://p:1", "noProxy": "local"}, "tcp://other": {"ftpProxy": "x"}}}"#;
        let found = of_file(serde_json::from_str(text).unwrap());
        let shown: Vec<String> = found.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(
            shown,
            ["HTTP_PROXY=http://p:1", "http_proxy=http://p:1", "NO_PROXY=local", "no_proxy=local"]
        );
        assert!(of_file(serde_json::from_str("{}").unwrap()).is_empty());
    }
}
