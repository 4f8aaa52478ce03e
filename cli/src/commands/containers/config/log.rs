//! Where output goes.

use kiln_containers::LogOptions;

use crate::args::limits::bytes;
use crate::errors::Failure;

pub(super) fn log_options(driver: &str, options: &[String]) -> Result<LogOptions, Failure> {
    let mut log = LogOptions::default();
    match driver {
        "json-file" | "local" => {}
        "none" => log.none = true,
        other => return Err(Failure::usage(format!("--log-driver {other:?}: there are json-file and none"))),
    }
    for option in options {
        let wrong =
            || Failure::usage(format!("--log-opt {option:?}: there are max-size=SIZE, max-file=COUNT"));
        match option.split_once('=').ok_or_else(wrong)? {
            ("max-size", size) => log.max_bytes = Some(bytes(size).map_err(|_| wrong())?),
            ("max-file", count) => {
                log.max_files = count.parse().ok().filter(|count| *count > 0).ok_or_else(wrong)?;
            }
            _ => return Err(wrong()),
        }
    }
    Ok(log)
}
