//! How to tell whether a container does its work.

use std::time::Duration;

use kiln_containers::{HealthCheck, parse_duration};
use kiln_oci::image::RunConfig;
use serde_json::Value;

use crate::args::RunArgs;
use crate::errors::Failure;

/// What Docker waits, tries and allows unless it is told.
const HEALTH_SECONDS: u64 = 30;

/// The flags' check, or the image's with what the flags change.
pub(super) fn health(settings: &mut RunConfig, args: &RunArgs) -> Result<Option<HealthCheck>, Failure> {
    let life = &args.life;
    if life.no_healthcheck {
        settings.healthcheck = Some(serde_json::json!({ "Test": ["NONE"] }));
        return Ok(None);
    }
    let image = settings.healthcheck.clone().unwrap_or(Value::Null);
    let test: Vec<String> = match &life.health_cmd {
        Some(command) => vec!["CMD-SHELL".to_owned(), command.clone()],
        None => serde_json::from_value(image["Test"].clone()).unwrap_or_default(),
    };
    let shell = if settings.shell.is_empty() {
        vec!["/bin/sh".to_owned(), "-c".to_owned()]
    } else {
        settings.shell.clone()
    };
    let arguments: Vec<String> = match test.split_first() {
        Some((kind, rest)) if kind == "CMD" && !rest.is_empty() => rest.to_vec(),
        Some((kind, [command])) if kind == "CMD-SHELL" => {
            shell.into_iter().chain([command.clone()]).collect()
        }
        _ => return Ok(None),
    };
    let time = |flag: &Option<String>, key: &str, usual: u64| match flag {
        Some(text) => match parse_duration(text) {
            // docker: 0 is what there is without the flag.
            Some(Duration::ZERO) => Ok(Duration::from_secs(usual)),
            Some(time) if time < Duration::from_millis(1) => {
                Err(Failure::usage(format!("{text:?} is too short: a millisecond is the least")))
            }
            Some(time) => Ok(time),
            None => Err(Failure::usage(format!("{text:?} is no duration such as 30s or 1m30s"))),
        },
        None => Ok(match image[key].as_u64() {
            Some(nanos) if nanos > 0 => Duration::from_nanos(nanos),
            _ => Duration::from_secs(usual),
        }),
    };
    let retries = life.health_retries.or(image["Retries"].as_u64().and_then(|n| u32::try_from(n).ok()));
    let check = HealthCheck {
        args: arguments,
        interval: time(&life.health_interval, "Interval", HEALTH_SECONDS)?,
        timeout: time(&life.health_timeout, "Timeout", HEALTH_SECONDS)?,
        start_period: time(&life.health_start_period, "StartPeriod", 0)?,
        start_interval: time(&life.health_start_interval, "StartInterval", 5)?,
        retries: retries.filter(|retries| *retries > 0).unwrap_or(3),
        test,
    };
    settings.healthcheck = Some(serde_json::json!({
        "Test": check.test,
        "Interval": nanos(check.interval),
        "Timeout": nanos(check.timeout),
        "StartPeriod": nanos(check.start_period),
        "Retries": check.retries,
    }));
    Ok(Some(check))
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
