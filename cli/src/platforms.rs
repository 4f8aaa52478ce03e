//! Platforms as users name them: on the command line, or once for all in docker's variable.

use kiln_oci::Platform;

use crate::errors::Failure;

/// docker's: the platform of builds, pulls and containers when nobody says.
const DEFAULT: &str = "DOCKER_DEFAULT_PLATFORM";

/// One platform; `local` and `linux` are this machine's.
pub(crate) fn parse(text: &str) -> Result<Platform, String> {
    if matches!(text, "local" | "linux") {
        return Ok(Platform::host());
    }
    text.parse().map_err(|error: kiln_oci::PlatformError| {
        match kiln_frontend::nearest(text, Platform::USUAL) {
            Some(near) => format!("{error}; did you mean `{near}`?"),
            None => error.to_string(),
        }
    })
}

/// What was asked for, each once; where nothing was, what the environment says.
pub(crate) fn asked(given: &[Platform]) -> Result<Vec<Platform>, Failure> {
    let mut all = given.to_vec();
    if given.is_empty() {
        all.extend(by_environment()?);
    }
    let mut once: Vec<Platform> = Vec::with_capacity(all.len());
    for platform in all {
        if !once.contains(&platform) {
            once.push(platform);
        }
    }
    Ok(once)
}

/// The same where only one can be asked for.
pub(crate) fn asked_one(given: Option<&Platform>) -> Result<Option<Platform>, Failure> {
    match given {
        Some(given) => Ok(Some(given.clone())),
        None => by_environment(),
    }
}

fn by_environment() -> Result<Option<Platform>, Failure> {
    match std::env::var(DEFAULT) {
        Ok(text) if !text.is_empty() => {
            parse(&text).map(Some).map_err(|error| Failure::usage(format!("{DEFAULT}: {error}")))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_platform_is_asked_for_once() {
        let all = ["linux/arm64", "linux/amd64", "linux/aarch64"].map(|text| parse(text).unwrap());
        let asked: Vec<String> = asked(&all).ok().unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(asked, ["linux/arm64", "linux/amd64"]);
        assert_eq!(parse("local"), Ok(Platform::host()));
        assert!(parse("linux/arm46").unwrap_err().ends_with("did you mean `linux/arm64`?"));
    }
}
