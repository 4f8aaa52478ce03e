//! `kiln mutate`, `kiln flatten`: images made of others, without a Dockerfile.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kiln_content::{ImageRecord, LayerRecord};
use kiln_oci::image::{EmptyObject, History, ImageConfig};
use kiln_oci::{DiffId, Platform, Reference};

use super::ToolkitError;
use super::append::append;
use super::layers::chain;
use super::squash::squash;
use crate::image::{read_config, store_image, with_layers};
use crate::layers::describe;
use crate::{BuildCancel, BuildError, Engine};

/// What to change in an image. `None` and empty lists leave it as it is.
#[derive(Debug, Clone, Default)]
pub struct Mutation {
    /// Tars that become layers on top, lowest first.
    pub append: Vec<PathBuf>,
    /// Environment variables to remove, before others are set; those that are not there stay away.
    pub unset_env: Vec<String>,
    /// Environment variables to set.
    pub env: Vec<(String, String)>,
    /// Labels to remove, before others are set.
    pub unset_labels: Vec<String>,
    /// Labels to set.
    pub labels: BTreeMap<String, String>,
    /// The entrypoint; an empty list removes it. The command goes with the old one, unless it is
    /// given as well.
    pub entrypoint: Option<Vec<String>>,
    /// The command; an empty list removes it.
    pub cmd: Option<Vec<String>>,
    /// The user; empty: root.
    pub user: Option<String>,
    /// The working directory; a relative one stands below the old.
    pub workdir: Option<String>,
    /// Ports to expose: `80`, `53/udp`, `8000-8010`.
    pub expose: Vec<String>,
    /// Directories that containers have as volumes.
    pub volumes: Vec<String>,
    /// The signal that asks a container to end: `SIGTERM`, `9`; empty: that of the runtime.
    pub stop_signal: Option<String>,
    /// What HEALTHCHECK would be given, `NONE` among it; empty: nothing is said of it.
    pub healthcheck: Option<String>,
    /// Make one layer of several, appended ones included.
    pub squash: Option<Squash>,
}

/// Which layers become one.
#[derive(Debug, Clone)]
pub enum Squash {
    /// Those above the base.
    Own {
        /// The base; `None`: the image with a name that has most of this one's layers, and is not all
        /// of it.
        base: Option<ImageRecord>,
    },
    /// All.
    All,
}

/// A new image.
#[derive(Debug, Clone)]
pub struct Mutated {
    /// The image.
    pub image: ImageRecord,
    /// How many layers became one; `None`: nothing was squashed.
    pub squashed: Option<usize>,
    /// What they stand on, as far as it has a name.
    pub base: Option<String>,
}

/// Makes an image like `image` with the changes of `mutation`, and lets `names` lead to it.
///
/// The new image is as old as the old one: the same changes of the same image give the same bytes.
///
/// # Errors
/// [`ToolkitError`]; no name has moved then.
pub fn mutate(
    engine: &Engine,
    image: &ImageRecord,
    mutation: &Mutation,
    names: &[Reference],
    cancel: &BuildCancel,
) -> Result<Mutated, ToolkitError> {
    let mut config = read_config(engine, &image.config)?;
    let said = set(&mut config, mutation)?;
    let mut snapshots = chain(engine, image)?;
    let mut layers = Vec::with_capacity(snapshots.len() + mutation.append.len());
    for snapshot in &snapshots {
        layers.push(describe(&engine.store, &*engine.snapshots, snapshot)?);
    }
    let base = match &mutation.squash {
        None => None,
        Some(Squash::All) => Some(Base::default()),
        Some(Squash::Own { base }) => Some(find_base(engine, image, base.as_ref(), &layers)?),
    };
    settle_history(&mut config, layers.len());
    for path in &mutation.append {
        let layer = append(engine, path, snapshots.last(), cancel)?;
        snapshots.push(layer.snapshot.clone());
        layers.push(layer);
        let name = path.file_name().map_or_else(|| "-".into(), |name| name.to_string_lossy());
        record(&mut config, format!("kiln mutate --append {name}"), false);
    }
    if !said.is_empty() {
        record(&mut config, format!("kiln mutate {}", said.join(" ")), true);
    }
    let mut mutated = Mutated { image: image.clone(), squashed: None, base: None };
    if let Some(base) = base {
        let (below, own) = snapshots.split_at(base.layers);
        mutated.squashed = Some(own.len());
        let top = squash(engine, below, own, cancel)?;
        forget_layers(&mut config, base.layers);
        record(&mut config, format!("kiln mutate --squash ({} layers)", own.len()), false);
        layers.truncate(base.layers);
        layers.push(describe(&engine.store, &*engine.snapshots, &top)?);
        mutated.base = base.name;
    }
    mutated.image = keep(engine, config, &layers, names)?;
    Ok(mutated)
}

/// Makes an image with the files and the config of `image` that has one layer and one history entry,
/// and lets `names` lead to it.
///
/// # Errors
/// As [`mutate`].
pub fn flatten(
    engine: &Engine,
    image: &ImageRecord,
    names: &[Reference],
    cancel: &BuildCancel,
) -> Result<Mutated, ToolkitError> {
    let mut config = read_config(engine, &image.config)?;
    let own = chain(engine, image)?;
    let top = squash(engine, &[], &own, cancel)?;
    let layers = [describe(&engine.store, &*engine.snapshots, &top)?];
    config.history.clear();
    record(&mut config, format!("kiln flatten ({} layers)", own.len()), false);
    let image = keep(engine, config, &layers, names)?;
    Ok(Mutated { image, squashed: Some(own.len()), base: None })
}

fn keep(
    engine: &Engine,
    config: ImageConfig,
    layers: &[LayerRecord],
    names: &[Reference],
) -> Result<ImageRecord, ToolkitError> {
    let top = layers.last().map(|layer| layer.snapshot.clone());
    let image = store_image(engine, &with_layers(config, layers), layers, top, None)?;
    for name in names {
        engine.store.set_name(name, &image)?;
    }
    engine.store.barrier()?;
    Ok(image)
}

/// Applies the settings; what was set, as flags.
fn set(config: &mut ImageConfig, mutation: &Mutation) -> Result<Vec<String>, ToolkitError> {
    let mut said = Vec::new();
    let run = &mut config.config;
    for name in &mutation.unset_env {
        run.env.retain(|entry| entry.split_once('=').is_none_or(|(known, _)| known != name));
        said.push(format!("--unset-env {name}"));
    }
    for (name, value) in &mutation.env {
        let wrong = |problem| ToolkitError::Setting { what: "--env", value: name.clone(), problem };
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(wrong("cannot be a variable"));
        }
        let entry = format!("{name}={value}");
        let is_it = |known: &&mut String| known.split_once('=').is_some_and(|(known, _)| known == name);
        match run.env.iter_mut().find(is_it) {
            Some(known) => known.clone_from(&entry),
            None => run.env.push(entry.clone()),
        }
        said.push(format!("--env {entry}"));
    }
    for name in &mutation.unset_labels {
        run.labels.remove(name);
        said.push(format!("--unset-label {name}"));
    }
    for (name, value) in &mutation.labels {
        run.labels.insert(name.clone(), value.clone());
        said.push(format!("--label {name}={value}"));
    }
    if let Some(words) = &mutation.entrypoint {
        run.entrypoint = (!words.is_empty()).then(|| words.clone());
        // As docker does: it was written for the other one.
        run.cmd = None;
        run.args_escaped = false;
        said.push(format!("--entrypoint {}", json(words)));
    }
    if let Some(words) = &mutation.cmd {
        run.cmd = (!words.is_empty()).then(|| words.clone());
        run.args_escaped = false;
        said.push(format!("--cmd {}", json(words)));
    }
    if let Some(path) = &mutation.workdir {
        run.working_dir = working_dir(&run.working_dir, path)?;
        said.push(format!("--workdir {path}"));
    }
    for path in &mutation.volumes {
        if !path.starts_with('/') || path.contains('\0') {
            let (value, problem) = (path.clone(), "is no directory from the root on");
            return Err(ToolkitError::Setting { what: "--volume", value, problem });
        }
        run.volumes.insert(path.clone(), EmptyObject::default());
        said.push(format!("--volume {path}"));
    }
    // The rules are those of the instructions; these values have nothing in them to be expanded.
    let mut changes = Vec::new();
    if let Some(user) = &mutation.user {
        if user.is_empty() {
            config.config.user.clear();
        } else if user.chars().any(|c| c.is_whitespace() || c.is_control() || "$\\'\"`#".contains(c)) {
            let value = user.clone();
            return Err(ToolkitError::Setting { what: "--user", value, problem: "cannot be a user" });
        } else {
            changes.push(format!("USER {user}"));
        }
        said.push(format!("--user {user}"));
    }
    for port in &mutation.expose {
        if port.is_empty() || !port.chars().all(|c| c.is_ascii_alphanumeric() || "/-".contains(c)) {
            let (value, problem) = (port.clone(), "is no port such as 80, 53/udp or 8000-8010");
            return Err(ToolkitError::Setting { what: "--expose", value, problem });
        }
        changes.push(format!("EXPOSE {port}"));
        said.push(format!("--expose {port}"));
    }
    if let Some(signal) = &mutation.stop_signal {
        match signal.as_str() {
            "" => config.config.stop_signal = None,
            text if text.chars().all(|c| c.is_ascii_alphanumeric() || "+-".contains(c)) => {
                changes.push(format!("STOPSIGNAL {text}"));
            }
            _ => {
                let (value, problem) = (signal.clone(), "is no signal such as SIGTERM or 9");
                return Err(ToolkitError::Setting { what: "--stop-signal", value, problem });
            }
        }
        said.push(format!("--stop-signal {signal}"));
    }
    if let Some(text) = &mutation.healthcheck {
        if text.contains(['\n', '\r', '\0']) {
            let (value, problem) = (text.clone(), "is more than one line");
            return Err(ToolkitError::Setting { what: "--healthcheck", value, problem });
        }
        match text.trim() {
            "" => config.config.healthcheck = None,
            text => changes.push(format!("HEALTHCHECK {text}")),
        }
        said.push(format!("--healthcheck {text}"));
    }
    kiln_frontend::apply_changes(config, &changes, &Platform::host())
        .map_err(|error| BuildError::Change { message: error.to_string() })?;
    Ok(said)
}

fn json(words: &[String]) -> String {
    serde_json::to_string(words).unwrap_or_default()
}

/// `path` below `old`, without `.` and `..`; they end at the root.
fn working_dir(old: &str, path: &str) -> Result<String, ToolkitError> {
    if path.is_empty() || path.contains('\0') {
        let (value, problem) = (path.to_owned(), "cannot be a directory");
        return Err(ToolkitError::Setting { what: "--workdir", value, problem });
    }
    let mut parts: Vec<&str> = Vec::new();
    let start = if path.starts_with('/') { "" } else { old };
    for part in start.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    Ok(format!("/{}", parts.join("/")))
}

/// Adds a history entry, as old as the image.
fn record(config: &mut ImageConfig, created_by: String, empty_layer: bool) {
    let created = config.created.clone();
    config.history.push(History { created, created_by: Some(created_by), empty_layer, ..History::default() });
}

/// Makes the history tell of as many layers as there are; some images have none, or half of one.
fn settle_history(config: &mut ImageConfig, layers: usize) {
    let told = config.history.iter().filter(|entry| !entry.empty_layer).count();
    if told == layers {
        return;
    }
    forget_layers(config, 0);
    let unknown = (0..layers).map(|_| History::default());
    config.history.splice(0..0, unknown);
}

/// Says of all history entries but those of the lowest `kept` layers that they made no layer.
fn forget_layers(config: &mut ImageConfig, kept: usize) {
    let made = config.history.iter_mut().filter(|entry| !entry.empty_layer);
    made.skip(kept).for_each(|entry| entry.empty_layer = true);
}

/// What squashed layers stand on.
#[derive(Default)]
struct Base {
    layers: usize,
    name: Option<String>,
}

fn find_base(
    engine: &Engine,
    image: &ImageRecord,
    given: Option<&ImageRecord>,
    layers: &[LayerRecord],
) -> Result<Base, ToolkitError> {
    let own: Vec<DiffId> = layers.iter().map(|layer| layer.diff_id).collect();
    if let Some(given) = given {
        let below = read_config(engine, &given.config)?.rootfs.diff_ids;
        if !own.starts_with(&below) {
            return Err(ToolkitError::NotBase);
        }
        return Ok(Base { layers: below.len(), name: None });
    }
    let survey = engine.store.survey()?;
    let mut best = Base::default();
    for (name, id) in &survey.names {
        let Some(other) = survey.images.iter().find(|other| other.config == *id) else { continue };
        let Some(top) = &other.snapshot else { continue };
        if other.config == image.config {
            continue;
        }
        // Images built here on others stand on their very snapshots.
        let below = layers.iter().position(|layer| layer.snapshot == *top).map_or(0, |at| at + 1);
        if below > best.layers && below < layers.len() {
            best = Base { layers: below, name: Some(name.familiar()) };
        }
    }
    if best.layers == 0 { Err(ToolkitError::NoBase) } else { Ok(best) }
}

impl Mutation {
    /// Whether it changes nothing but the name.
    pub fn is_empty(&self) -> bool {
        let Self { append, unset_env, env, unset_labels, labels, entrypoint, cmd, user, .. } = self;
        let Self { workdir, expose, volumes, stop_signal, healthcheck, squash, .. } = self;
        append.is_empty()
            && unset_env.is_empty()
            && env.is_empty()
            && unset_labels.is_empty()
            && labels.is_empty()
            && expose.is_empty()
            && volumes.is_empty()
            && stop_signal.is_none()
            && healthcheck.is_none()
            && entrypoint.is_none()
            && cmd.is_none()
            && user.is_none()
            && workdir.is_none()
            && squash.is_none()
    }

    /// Whether standard input is asked for more than once.
    pub fn reads_stdin_twice(&self) -> bool {
        self.append.iter().filter(|path| path.as_path() == Path::new("-")).count() > 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(history: &[bool]) -> ImageConfig {
        let mut config = ImageConfig::empty(&Platform::host());
        for &empty_layer in history {
            config.history.push(History { empty_layer, ..History::default() });
        }
        config
    }

    fn empties(config: &ImageConfig) -> Vec<bool> {
        config.history.iter().map(|entry| entry.empty_layer).collect()
    }

    #[test]
    fn history_of_squashed_layers_stays_as_that_of_no_layer() {
        let mut known = config(&[false, true, false, false]);
        settle_history(&mut known, 3);
        forget_layers(&mut known, 1);
        assert_eq!(empties(&known), [false, true, true, true]);
    }

    #[test]
    fn history_that_does_not_fit_is_made_to() {
        let mut short = config(&[false, true]);
        settle_history(&mut short, 2);
        assert_eq!(empties(&short), [false, false, true, true]);
        let mut none = config(&[]);
        settle_history(&mut none, 3);
        forget_layers(&mut none, 2);
        assert_eq!(empties(&none), [false, false, true]);
    }

    #[test]
    fn settings_replace_add_and_remove() {
        let mut image = config(&[]);
        image.config.env = vec!["PATH=/bin".to_owned(), "A=1".to_owned()];
        image.config.cmd = Some(vec!["sh".to_owned()]);
        image.config.working_dir = "/srv".to_owned();
        let mutation = Mutation {
            env: vec![("A".to_owned(), "2=3".to_owned()), ("B".to_owned(), "$A".to_owned())],
            entrypoint: Some(vec!["/app".to_owned()]),
            user: Some("app:1000".to_owned()),
            workdir: Some("../x/./y".to_owned()),
            expose: vec!["80".to_owned(), "53/udp".to_owned()],
            ..Mutation::default()
        };
        let said = set(&mut image, &mutation).unwrap();
        let run = &image.config;
        assert_eq!(run.env, ["PATH=/bin", "A=2=3", "B=$A"]);
        assert_eq!((run.entrypoint.as_deref(), &run.cmd), (Some(&["/app".to_owned()][..]), &None));
        assert_eq!((run.user.as_str(), run.working_dir.as_str()), ("app:1000", "/x/y"));
        assert_eq!(run.exposed_ports.keys().collect::<Vec<_>>(), ["53/udp", "80/tcp"]);
        assert_eq!(said[2..4], ["--entrypoint [\"/app\"]", "--workdir ../x/./y"]);
    }

    #[test]
    fn what_is_unset_goes_and_may_be_set_again() {
        let mut image = config(&[]);
        image.config.env = ["PATH=/bin", "A=1", "AA=2"].map(str::to_owned).to_vec();
        image.config.labels = [("a", "1"), ("b", "2")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        image.config.stop_signal = Some("SIGINT".to_owned());
        let words = |list: &[&str]| list.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let mutation = Mutation {
            unset_env: words(&["A", "PATH", "NONE"]),
            env: vec![("PATH".to_owned(), "/usr/bin".to_owned())],
            unset_labels: words(&["b", "c"]),
            volumes: words(&["/data", "/a b$c"]),
            stop_signal: Some(String::new()),
            healthcheck: Some("--interval=5s CMD [\"true\", \"$X\"]".to_owned()),
            ..Mutation::default()
        };
        let said = set(&mut image, &mutation).unwrap();
        let run = &image.config;
        assert_eq!(run.env, ["AA=2", "PATH=/usr/bin"]);
        assert_eq!(run.labels.keys().collect::<Vec<_>>(), ["a"]);
        assert_eq!(run.volumes.keys().collect::<Vec<_>>(), ["/a b$c", "/data"]);
        assert_eq!(run.stop_signal, None);
        let healthcheck = run.healthcheck.as_ref().unwrap();
        assert_eq!(healthcheck["Test"], serde_json::json!(["CMD", "true", "$X"]));
        assert_eq!(healthcheck["Interval"], 5_000_000_000_i64);
        assert_eq!(said[..2], ["--unset-env A", "--unset-env PATH"]);
        let of = |healthcheck: &str, stop_signal: &str| Mutation {
            healthcheck: Some(healthcheck.to_owned()),
            stop_signal: Some(stop_signal.to_owned()),
            ..Mutation::default()
        };
        set(&mut image, &of("NONE", "SIGUSR1")).unwrap();
        assert_eq!(image.config.healthcheck.as_ref().unwrap()["Test"], serde_json::json!(["NONE"]));
        assert_eq!(image.config.stop_signal.as_deref(), Some("SIGUSR1"));
        set(&mut image, &of("", "9")).unwrap();
        assert_eq!((&image.config.healthcheck, image.config.stop_signal.as_deref()), (&None, Some("9")));
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        let refused = |mutation: Mutation| set(&mut config(&[]), &mutation).unwrap_err().to_string();
        for user in ["a b", "$USER", "x\n", "4294967295"] {
            let mutation = Mutation { user: Some(user.to_owned()), ..Mutation::default() };
            assert!(!refused(mutation).is_empty());
        }
        for port in ["", "80 81", "70000", "80/ip"] {
            let mutation = Mutation { expose: vec![port.to_owned()], ..Mutation::default() };
            assert!(refused(mutation).contains(port));
        }
        let mutation = Mutation { env: vec![(String::new(), "x".to_owned())], ..Mutation::default() };
        assert!(refused(mutation).contains("--env"));
        for path in ["", "data", "a/b", "/a\0b"] {
            let mutation = Mutation { volumes: vec![path.to_owned()], ..Mutation::default() };
            assert!(refused(mutation).contains("--volume"), "{path}");
        }
        for signal in ["SIGNOSUCH", "$S", "TERM\nUSER x", "SIG TERM"] {
            let mutation = Mutation { stop_signal: Some(signal.to_owned()), ..Mutation::default() };
            assert!(!refused(mutation).is_empty(), "{signal}");
        }
        for text in ["CMD a\nUSER x", "--interval=x CMD a", "NONE of it", "true"] {
            let mutation = Mutation { healthcheck: Some(text.to_owned()), ..Mutation::default() };
            assert!(!refused(mutation).is_empty(), "{text}");
        }
    }
}
