//! Where a registry is, and the connections to it.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use reqwest::{Client, Url, redirect};

use crate::{Error, Settings, trust};

/// A registry, once it is known how it speaks.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// As it is written in references: `docker.io`.
    pub(crate) name: String,
    /// `https://registry-1.docker.io/v2/`
    pub(crate) base: Url,
    pub(crate) client: Client,
}

/// What credentials of a registry are kept under, as docker does: the host with its port, and
/// `https://index.docker.io/v1/` for Docker Hub.
pub fn credential_key(domain: &str) -> &str {
    match domain {
        "docker.io" | "index.docker.io" | "registry-1.docker.io" => "https://index.docker.io/v1/",
        other => other,
    }
}

/// The host, without the port, of `host[:port]`.
pub(crate) fn bare(domain: &str) -> &str {
    if let Some(end) = domain.strip_prefix('[').and_then(|inside| inside.find(']')) {
        return &domain[1..=end];
    }
    domain.rsplit_once(':').map_or(domain, |(host, _)| host)
}

/// Whether `host[:port]` is this machine: `localhost`, 127.0.0.0/8 or `::1`. Such a registry may speak
/// plain http.
pub fn is_loopback(domain: &str) -> bool {
    let host = bare(domain);
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Whether this is an address that only machines next to each other have, such as that of a cloud's
/// server of secrets.
pub(crate) fn is_link_local(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    match bare(host).parse::<IpAddr>() {
        Ok(IpAddr::V4(ip)) => ip.is_link_local(),
        Ok(IpAddr::V6(ip)) => match ip.to_ipv4_mapped() {
            Some(ip) => ip.is_link_local(),
            None => ip.is_unicast_link_local() || ip == Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
        },
        Err(_) => false,
    }
}

/// `https://host/v2/`, or `http://`.
pub(crate) fn base(domain: &str, plain: bool) -> Result<Url, Error> {
    let host = if domain == "docker.io" { "registry-1.docker.io" } else { domain };
    let scheme = if plain { "http" } else { "https" };
    let url = Url::parse(&format!("{scheme}://{host}/v2/"));
    url.ok().filter(Url::has_host).ok_or_else(|| Error::Host { host: domain.to_owned() })
}

/// Whether two URLs lead to one server.
pub(crate) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme()
        && a.host_str() == b.host_str()
        && a.port_or_known_default() == b.port_or_known_default()
}

/// Connections to `domain`; `None`: to wherever a registry redirects, with nothing of one registry.
pub(crate) fn client(settings: &Settings, domain: Option<&str>) -> Result<Client, Error> {
    let loopback = domain.is_some_and(is_loopback);
    let mut builder = Client::builder()
        .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(if loopback {
            settings.connect.min(Duration::from_secs(5))
        } else {
            settings.connect
        })
        // Followed by hand, where credentials and schemes are looked at.
        .redirect(redirect::Policy::none())
        // Tried again by hand, where it is counted.
        .retry(reqwest::retry::never())
        .tls_backend_preconfigured(trust::config(settings, domain)?);
    if loopback {
        // No proxy knows this machine.
        builder = builder.no_proxy();
    }
    let failed = |error| Error::Local { what: "preparing connections", source: io::Error::other(error) };
    builder.build().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_this_machine_and_nobody_else() {
        for domain in ["localhost", "localhost:5000", "127.0.0.1", "127.8.9.1:80", "[::1]:5000", "[::1]"] {
            assert!(is_loopback(domain), "{domain}");
        }
        for domain in ["docker.io", "localhost.example", "128.0.0.1", "[::2]:5000", "127.0.0.1.example:1"] {
            assert!(!is_loopback(domain), "{domain}");
        }
    }

    #[test]
    fn docker_hub_is_elsewhere_than_its_name_says() {
        assert_eq!(base("docker.io", false).unwrap().as_str(), "https://registry-1.docker.io/v2/");
        assert_eq!(base("[::1]:5000", true).unwrap().as_str(), "http://[::1]:5000/v2/");
        assert_eq!(credential_key("docker.io"), "https://index.docker.io/v1/");
        assert_eq!(credential_key("h:5000"), "h:5000");
    }

    #[test]
    fn link_local_addresses_are_known_in_all_their_forms() {
        for url in [
            "http://169.254.169.254/x",
            "http://[fe80::1]/",
            "http://[::ffff:169.254.169.254]/",
            "http://2852039166/",
        ] {
            assert!(is_link_local(&Url::parse(url).unwrap()), "{url}");
        }
        assert!(!is_link_local(&Url::parse("http://192.168.1.1/").unwrap()));
    }
}
