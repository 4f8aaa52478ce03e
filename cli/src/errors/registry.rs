//! Errors of registries as users see them.

use std::io::ErrorKind;

use kiln_build::BuildError;
use kiln_registry::{CredentialError, Error, Fault};
use kiln_registry_server::{AccountsError, DirectoryError, StartError};

use super::{Code, FROM_ELSEWHERE, Failure, chain, exit, shortage};

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        of_registry(&error)
    }
}

/// The error with its code, and what helps.
pub(super) fn of_registry(error: &Error) -> Failure {
    let failure = Failure { code: code(error), text: format!("error: {}", chain(error)), hint: None };
    match hint(error) {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

pub(super) fn code(error: &Error) -> Code {
    match error.fault() {
        Fault::Network => exit::NETWORK,
        Fault::Integrity | Fault::Store => exit::STORE,
        Fault::Refused => exit::POLICY,
        Fault::Limit => exit::LIMIT,
        // docker's file, a helper, a certificate: what the user has configured.
        Fault::Configuration => exit::USAGE,
    }
}

/// Whether a registry does not have what it was asked for.
pub(super) fn is_absent(error: &BuildError) -> bool {
    matches!(error, BuildError::Registry(error) if matches!(**error, Error::NotFound { .. }))
}

/// What whoever gave a name without a host may not have meant.
const HUB: &str = "a name without a host is one of Docker Hub, unless [registries.aliases] in the configuration \
                   file says where it is";

pub(super) fn hint(error: &Error) -> Option<String> {
    Some(match error {
        // Docker Hub says so of what it does not have, too.
        Error::Denied { registry, known: false, .. } if **registry == *"docker.io" => {
            format!("`kiln login docker.io` may help; {HUB}")
        }
        Error::NotFound { host, .. } if host == "registry-1.docker.io" => {
            format!("look for a mistake in the name or the tag; {HUB}")
        }
        Error::Denied { registry, known: false, .. } => format!("`kiln login {registry}` may help"),
        Error::Denied { registry, .. } => format!(
            "the credentials for {registry} are wrong or not enough; `kiln login {registry}` replaces them"
        ),
        Error::NotFound { .. } => {
            "look for a mistake in the name or the tag; some registries say this of what needs a login, too"
                .to_owned()
        }
        // A server that misses a certificate hangs up, and sometimes nothing more is heard of it.
        Error::Transfer { host, source, .. } if is_certificate(source) || is_hung_up(source) => format!(
            "put the registry's authority into /etc/docker/certs.d/{host}/ca.crt, or name it as \
             ca-certificates in the configuration file; what it wants to be shown goes there as NAME.cert \
             and NAME.key"
        ),
        Error::Transfer { host, source, .. } if source.is_connect() => format!(
            "is {host} the right name? A registry that speaks plain http is listed under [registries] \
             insecure in the configuration file"
        ),
        Error::Transfer { host, source, .. } if is_end_of_connection(source) => format!(
            "{host} hung up before it answered, as a registry does that wants to be shown a certificate: \
             that goes into /etc/docker/certs.d/{host}/ as NAME.cert and NAME.key"
        ),
        Error::Limited { .. } => "a login often raises the limit".to_owned(),
        Error::Refused { reason, .. } if reason.contains("encryption") => {
            "list the host that it leads to under [registries] insecure in the configuration file if that is meant"
                .to_owned()
        }
        // A manifest has never more than it has when nobody says anything.
        Error::Deadline { path, .. } if path.contains("/blobs/") => {
            "`--transfer-timeout TIME`, or transfer-timeout under [registries] in the configuration file, gives \
             it more time"
                .to_owned()
        }
        Error::Mismatch { .. } | Error::Size { .. } | Error::Misnamed { .. } | Error::Document { .. } => {
            FROM_ELSEWHERE.to_owned()
        }
        Error::Credentials(CredentialError::NoHelper { program }) => {
            format!("install {program}, or take it out of docker's config.json")
        }
        _ => return None,
    })
}

fn is_hung_up(error: &(dyn std::error::Error + 'static)) -> bool {
    error.to_string() == "channel closed" || error.source().is_some_and(is_hung_up)
}

/// rustls says so in words; no type of its errors leaves the client.
fn is_certificate(error: &(dyn std::error::Error + 'static)) -> bool {
    error.to_string().contains("ertificate") || error.source().is_some_and(is_certificate)
}

/// With TLS 1.3 a client without its certificate has sent the request before it is refused; then the end of the
/// connection may arrive in place of the reason. hyper says so in words, too.
fn is_end_of_connection(error: &(dyn std::error::Error + 'static)) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    let ended = match error.downcast_ref::<std::io::Error>() {
        Some(error) => {
            matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
        }
        None => error.to_string().contains("connection closed"),
    };
    ended || error.source().is_some_and(is_end_of_connection)
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        let failure = Failure { code: exit::USAGE, text: format!("error: {}", chain(&error)), hint: None };
        match &error {
            StartError::Directory(error @ DirectoryError::Taken { .. }) => of_directory(error, failure)
                .hint("choose another place with `--dir DIR`; without `--push` any number may serve a store"),
            StartError::Directory(error @ DirectoryError::Format { .. }) => {
                of_directory(error, failure).hint("choose an empty directory with `--dir DIR`")
            }
            StartError::Directory(error) => of_directory(error, failure),
            StartError::Listen { source, .. } if source.kind() == ErrorKind::AddrInUse => {
                failure.with_code(exit::NETWORK).hint("`--listen 127.0.0.1:0` takes a port that is free")
            }
            StartError::Listen { .. } => failure.with_code(exit::NETWORK),
            StartError::Accounts(AccountsError::Line { .. }) => {
                failure.hint("`htpasswd -B FILE USER` of apache2-utils writes such lines")
            }
            StartError::Accounts(_) | StartError::Pem { .. } => failure.with_code(exit::SOURCE),
            _ => failure,
        }
    }
}

impl From<DirectoryError> for Failure {
    fn from(error: DirectoryError) -> Self {
        let failure = Failure { code: exit::USAGE, text: format!("error: {}", chain(&error)), hint: None };
        let failure = of_directory(&error, failure);
        match error {
            DirectoryError::Taken { .. } => failure.hint(
                "whoever serves it collects from time to time, and at once when it gets SIGUSR1; --dry-run tells \
                 what would go",
            ),
            _ => failure,
        }
    }
}

/// With the code for it.
fn of_directory(error: &DirectoryError, failure: Failure) -> Failure {
    match error {
        DirectoryError::Missing { .. } => failure.with_code(exit::SOURCE),
        DirectoryError::Host { source, .. } => failure.with_code(exit::STORE).for_want_of(shortage(source)),
        _ => failure.with_code(exit::STORE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_did_not_mean_docker_hub_is_told_that_it_was_asked() {
        let hint_at = |host: &str, registry: &str| {
            let (host, path, method) = (host.to_owned(), "/v2/library/x".to_owned(), "GET".to_owned());
            let absent = Error::NotFound { host: host.clone(), path: path.clone(), said: String::new() };
            let (status, said, registry) = (401, String::new(), registry.into());
            let denied = Error::Denied { host, method, path, status, said, registry, known: false };
            [absent, denied].map(|error| hint(&error).unwrap_or_default())
        };
        for hint in hint_at("registry-1.docker.io", "docker.io") {
            assert!(hint.contains("[registries.aliases]"), "{hint}");
        }
        for hint in hint_at("r.example", "r.example") {
            assert!(!hint.contains("Docker Hub"), "{hint}");
        }
    }

    #[test]
    fn the_end_of_a_connection_is_told_from_one_that_was_never_there() {
        use std::io::{Error, ErrorKind};
        let said = |text: &str| is_end_of_connection(&*Box::<dyn std::error::Error>::from(text));
        assert!(said("connection closed before message completed"));
        assert!(is_end_of_connection(&Error::from(ErrorKind::ConnectionReset)));
        assert!(!said("tls handshake eof"));
        assert!(!is_end_of_connection(&Error::from(ErrorKind::ConnectionRefused)));
    }
}
