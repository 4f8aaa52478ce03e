//! top, stats, port

use std::io::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kiln_containers::{Container, Process, Usage, processes, usage};
use serde_json::{Value, json};

use super::ps::wrong_format;
use crate::args::containers::{PortArgs, StatsArgs, TopArgs};
use crate::commands::{human_size, print, table};
use crate::errors::{Failure, exit};
use crate::escape;
use crate::session::Session;
use crate::template::Listing;

/// The kernel counts processor time in hundredths of seconds towards users (USER_HZ).
const TICKS: u64 = 100;

pub(super) fn top(session: &Session, args: &TopArgs) -> Result<u8, Failure> {
    let found = processes(&session.containers.find(&args.container)?)?;
    let header = ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"].map(str::to_owned).to_vec();
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let uptime: f64 = uptime.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    let row = |process: &Process| {
        let seconds = process.ticks / TICKS;
        let age = (uptime - process.start_ticks as f64 / TICKS as f64).max(0.01);
        vec![
            user(process.uid),
            process.pid.to_string(),
            process.ppid.to_string(),
            format!("{:.0}", 100.0 * process.ticks as f64 / TICKS as f64 / age),
            start_time(age),
            terminal(process.terminal),
            format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60),
            escape::quoted(&process.command).replace("\\\"", "\""),
        ]
    };
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(found.iter().map(row)).collect();
    print(&table(&rows))?;
    Ok(0)
}

/// As ps(1) on the host has it: a name if there is one.
fn user(uid: u32) -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    });
    name.unwrap_or_else(|| uid.to_string())
}

fn start_time(age_seconds: f64) -> String {
    let started = kiln_containers::Time::now().before(Duration::from_secs_f64(age_seconds)).to_string();
    started.get(11..16).unwrap_or("?").to_owned()
}

/// Of the device numbers of tty(4) and pts(4).
fn terminal(device: u32) -> String {
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00);
    match major {
        0 => "?".to_owned(),
        136..=143 => format!("pts/{}", (major - 136) * 256 + minor),
        _ => format!("tty{minor}"),
    }
}

pub(super) fn stats(session: &Session, args: &StatsArgs) -> Result<u8, Failure> {
    let usual =
        "{{.ID}}\t{{.Name}}\t{{.CPUPerc}}\t{{.MemUsage}}\t{{.MemPerc}}\t{{.NetIO}}\t{{.BlockIO}}\t{{.PIDs}}";
    let listing = Listing::parse(args.format.as_deref(), usual).map_err(wrong_format)?;
    let mut last: Vec<(String, Usage, Instant)> = Vec::new();
    let mut first = true;
    loop {
        let containers = chosen(session, args)?;
        let now: Vec<(Container, Usage, Instant)> = containers
            .into_iter()
            .map(|container| {
                // One that has ended uses nothing.
                let used = usage(&container).unwrap_or_default();
                (container, used, Instant::now())
            })
            .collect();
        if !first {
            let entries: Vec<Value> = now
                .iter()
                .map(|(container, used, at)| {
                    let before = last.iter().find(|(id, ..)| id == container.id().as_str());
                    entry(container, used, *at, before, args.no_trunc)
                })
                .collect();
            let text = listing.render(&headers(), &entries).map_err(wrong_format)?;
            if args.no_stream {
                print(&text)?;
                return Ok(0);
            }
            // From the top of the screen, what was there before it gone.
            print(&format!("\x1b[2J\x1b[H{text}"))?;
            let _ = std::io::stdout().flush();
        }
        last = now.iter().map(|(container, used, at)| (container.id().to_string(), *used, *at)).collect();
        // A share of processor time needs two looks.
        std::thread::sleep(if first { Duration::from_millis(500) } else { Duration::from_secs(1) });
        first = false;
        if session.cancel.flag().load(std::sync::atomic::Ordering::Relaxed) {
            return Ok(0);
        }
    }
}

fn chosen(session: &Session, args: &StatsArgs) -> Result<Vec<Container>, Failure> {
    if args.containers.is_empty() {
        let mut all = session.containers.list()?;
        all.retain(|found| args.all || found.state().is_ok_and(|state| state.status.is_active()));
        return Ok(all);
    }
    args.containers.iter().map(|name| Ok(session.containers.find(name)?)).collect()
}

fn headers() -> Value {
    json!({
        "ID": "CONTAINER ID", "Container": "CONTAINER", "Name": "NAME", "CPUPerc": "CPU %",
        "MemUsage": "MEM USAGE / LIMIT", "MemPerc": "MEM %", "NetIO": "NET I/O", "BlockIO": "BLOCK I/O",
        "PIDs": "PIDS",
    })
}

fn entry(
    container: &Container,
    used: &Usage,
    at: Instant,
    before: Option<&(String, Usage, Instant)>,
    whole: bool,
) -> Value {
    let id = if whole { container.id().as_str() } else { container.id().short() };
    let share = before.map_or(0.0, |(_, old, since)| {
        let seconds = at.duration_since(*since).as_secs_f64().max(0.001);
        used.ticks.saturating_sub(old.ticks) as f64 / TICKS as f64 / seconds * 100.0
    });
    let all = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let all = all.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let all = all.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(1) * 1024;
    let config = container.config().ok();
    let limits = config.as_ref().and_then(|config| config.process.resources.as_ref());
    let all = limits.and_then(|limits| limits.memory_bytes).map_or(all, |limit| limit.min(all)).max(1);
    let pair = |(one, other): (u64, u64)| format!("{} / {}", human_size(one), human_size(other));
    json!({
        "ID": id,
        "Container": id,
        "Name": config.map(|config| config.name).unwrap_or_default(),
        "CPUPerc": format!("{share:.2}%"),
        "MemUsage": pair((used.memory_bytes, all)),
        "MemPerc": format!("{:.2}%", 100.0 * used.memory_bytes as f64 / all as f64),
        "NetIO": pair(used.network_bytes),
        "BlockIO": pair(used.disk_bytes),
        "PIDs": used.pids.to_string(),
    })
}

pub(super) fn port(session: &Session, args: &PortArgs) -> Result<u8, Failure> {
    let container = session.containers.find(&args.container)?;
    let (config, state) = (container.config()?, container.state()?);
    let wanted =
        args.port.as_ref().map(|port| if port.contains('/') { port.clone() } else { format!("{port}/tcp") });
    let mut text = String::new();
    for port in state.ports.iter().filter(|_| state.pid != 0) {
        let at = SocketAddr::new(port.address, port.host);
        match &wanted {
            None => text.push_str(&format!("{} -> {at}\n", port.key())),
            Some(wanted) if *wanted == port.key() => text.push_str(&format!("{at}\n")),
            Some(_) => {}
        }
    }
    match wanted {
        Some(wanted) if text.is_empty() => {
            let message = format!("no port of the host leads to {wanted} in {}", config.name);
            Err(Failure::source(message).with_code(exit::RUN))
        }
        _ => print(&text).map(|()| 0),
    }
}
