//! Everything that goes wrong between a client and a registry, each while pulling and while pushing, in one go and
//! in pieces.
//!
//! A row says who does what, the registry, its token server or a mirror of it, and what has to come of it. Whatever
//! that is: it has been done, no wrong byte is taken, no password reaches another host, and it ends soon. Time is
//! the client's clock: nobody waits.

mod others;
mod rows;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use kiln_oci::Digest;
use kiln_oci::image::{Descriptor, media_type};
use kiln_registry::{
    Clock, Credential, CredentialError, CredentialSource, Error, Fault, Mirror, Settings, Which,
};

use crate::bench::{Bench, password, text};
use crate::growing::{made, steps};
use crate::pieces::ahead;
use crate::server::{Ears, Reply, Request, Server, answer};

const MANIFEST: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#;
/// What [`password`] looks like on its way.
const BASIC: &str = "Basic dXNlcjpjYW5hcnktcGFzc3dvcmQ=";
/// More than that is no bounded time, pauses and waits together.
const LONGEST: Duration = Duration::from_secs(15 * 60);
const MOST_REQUESTS: usize = 60;

fn content() -> Vec<u8> {
    (0..700_000u32).map(|n| (n ^ (n >> 8)) as u8).collect()
}

/// What is done beside such a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Pull,
    /// By several connections.
    PullPieces,
    Push,
    /// Of a blob that is still being made.
    PushGrowing,
}

const WAYS: [Way; 4] = [Way::Pull, Way::PullPieces, Way::Push, Way::PushGrowing];

impl Way {
    fn is_push(self) -> bool {
        matches!(self, Way::Push | Way::PushGrowing)
    }
}

/// What has to come of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Good,
    Fails(Fault),
    /// It does not come to that, and all goes well.
    Apart,
}

/// Who it is that does something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    /// A registry that lets in everybody.
    Open,
    /// A registry that wants the password.
    Locked,
    /// The token server of a registry that wants its tokens.
    Tokens,
    /// A mirror. The registry behaves.
    Mirror,
}

use End::{Apart, Fails, Good};

/// One request that something may happen to.
struct Scene<'a> {
    request: &'a Request,
    /// Among those of the same method and path.
    nth: usize,
    server: &'a Server,
    /// Another host, which our password is not for.
    other: &'a Server,
}

impl Scene<'_> {
    fn is(&self, method: &str) -> bool {
        self.request.method == method
    }

    /// What a registry answers.
    fn good(&self) -> Vec<u8> {
        match self.server.behave(self.request) {
            Reply::Bytes(bytes) => bytes,
            _ => unreachable!("behaving means to answer"),
        }
    }

    /// The same, as headers and body.
    fn parts(&self) -> (Vec<u8>, Vec<u8>) {
        let whole = self.good();
        let end = whole.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
        (whole[..end].to_vec(), whole[end..].to_vec())
    }

    /// Only the first time.
    fn once(&self, reply: impl FnOnce() -> Reply) -> Option<Reply> {
        (self.nth == 0).then(reply)
    }

    /// Each time.
    fn status(&self, status: u16) -> Option<Reply> {
        Some(answer(status, &[], b""))
    }

    /// Where the part of a blob ends that is being sent.
    fn last_byte(&self) -> usize {
        let range = self.request.header("content-range").unwrap();
        range.split_once('-').unwrap().1.parse().unwrap()
    }

    /// The upload goes on behind this byte.
    fn arrived_up_to(&self, last: usize) -> Reply {
        let range = format!("0-{last}");
        answer(202, &[("Location", &self.request.path), ("Range", &range)], b"")
    }

    /// The body of an answer that changes nothing at the registry.
    fn body_of_a_read(&self) -> Vec<u8> {
        if self.is_read() { self.parts().1 } else { Vec::new() }
    }

    /// What comes at once of the answer to `self`, and no end.
    fn hangs_after(&self, part: impl Fn(&[u8], &[u8]) -> Vec<u8>) -> Option<Reply> {
        let (head, body) = self.parts();
        Some(Reply::Hang(part(&head, &body)))
    }

    /// Is it a blob, or a manifest, that is asked for?
    fn is_read(&self) -> bool {
        self.is("GET") && !self.request.path.contains("/uploads/")
    }
}

type Act = fn(&Scene<'_>) -> Option<Reply>;
type Hears = fn(&Request, usize) -> Option<Ears>;

/// What somebody does, and what comes of it when he does so to a pull and to a push.
struct Row {
    name: &'static str,
    who: Who,
    /// To requests that are not whole.
    hears: Hears,
    act: Act,
    pull: End,
    push: End,
}

const fn row(name: &'static str, pull: End, push: End, act: Act) -> Row {
    Row { name, who: Who::Open, hears: |_, _| None, act, pull, push }
}

impl Row {
    const fn by(self, who: Who) -> Self {
        Self { who, ..self }
    }

    const fn hearing(self, hears: Hears) -> Self {
        Self { hears, ..self }
    }
}

fn rows() -> impl Iterator<Item = &'static Row> {
    rows::ROWS.iter().chain(others::ROWS)
}

/// The servers of a row.
struct Stage {
    registry: Server,
    /// Who does what the row says; it may be the registry.
    actor: Server,
    other: Server,
    /// So often it was done.
    met: Arc<AtomicUsize>,
}

/// Its password is for one registry.
struct Only(String);

impl CredentialSource for Only {
    fn credential(&self, key: &str) -> Result<Option<Credential>, CredentialError> {
        Ok((key == self.0).then(password))
    }
}

/// Somebody who does what the row says, and who stands around him.
fn stage(row: &'static Row) -> Stage {
    let (other, met) = (Server::new(), Arc::new(AtomicUsize::new(0)));
    let own: Arc<OnceLock<Server>> = Arc::default();
    let (known, elsewhere, heard, done) = (own.clone(), other.clone(), met.clone(), met.clone());
    let hears = move |request: &Request, nth| {
        let ears = (row.hears)(request, nth)?;
        heard.fetch_add(1, Ordering::SeqCst);
        Some(ears)
    };
    let actor = Server::hearing(hears, move |request, nth| {
        if request.path == "/v2/" {
            return None;
        }
        if row.who == Who::Locked && request.header("authorization") != Some(BASIC) {
            return Some(answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b""));
        }
        let server = known.get().expect("set before the first request");
        let act = (row.act)(&Scene { request, nth, server, other: &elsewhere });
        if act.is_some() {
            done.fetch_add(1, Ordering::SeqCst);
        }
        let token = || answer(200, &[], br#"{"token":"canary-token"}"#);
        act.or_else(|| (row.who == Who::Tokens).then(token))
    });
    own.set(actor.clone()).ok().unwrap();
    let registry = match row.who {
        Who::Open | Who::Locked => actor.clone(),
        Who::Mirror => Server::new(),
        Who::Tokens => {
            let challenge = format!("Bearer realm=\"http://{}/token\",service=\"s\"", actor.domain());
            Server::scripted(move |request, _| {
                let good = request.header("authorization") == Some("Bearer canary-token");
                (!good).then(|| answer(401, &[("WWW-Authenticate", &challenge)], b""))
            })
        }
    };
    Stage { registry, actor, other, met }
}

impl Stage {
    fn servers(&self) -> [&Server; 3] {
        [&self.registry, &self.actor, &self.other]
    }

    fn bench(&self, who: Who, way: Way) -> Bench {
        let mut settings = Settings { tries: 4, ..Settings::default() };
        match way {
            Way::Pull | Way::Push => {}
            Way::PullPieces => (settings.piece_bytes, settings.fast_bytes) = (80_000, u64::MAX),
            Way::PushGrowing => settings.chunk_bytes = Some(200_000),
        }
        if who == Who::Mirror {
            let mirror: Mirror = self.actor.domain().parse().unwrap();
            settings.mirrors = [(self.registry.domain(), vec![mirror])].into();
        }
        let bench = Bench::with(settings, Arc::new(Only(self.registry.domain())));
        self.servers().iter().for_each(|server| server.keep_time(bench.pauses.clone()));
        bench
    }
}

async fn pull(repository: &kiln_registry::Repository, blob: &Descriptor, way: Way) -> Result<Vec<u8>, Error> {
    let head = repository.resolve(Which::Tag("v1")).await?;
    let manifest = repository.manifest(Which::Digest(&head.digest)).await?;
    assert_eq!(manifest.bytes, MANIFEST, "other bytes");
    let mut out = Vec::new();
    match way {
        Way::PullPieces => {
            let mut sink = kiln_oci::Sha256Writer::new(&mut out);
            repository.fetch_blob_ahead(blob, &mut sink, Some(&ahead(3))).await?;
        }
        _ => repository.fetch_blob(blob, &mut out).await?,
    }
    Ok(out)
}

async fn push(repository: &kiln_registry::Repository, blob: &Descriptor, way: Way) -> Result<(), Error> {
    if way == Way::PushGrowing {
        let growing = made(content(), steps(content().len()));
        repository.push_growing(&growing, &|_| Vec::new()).await?;
    } else {
        repository.push_blob(blob, &content(), &[]).await?;
    }
    repository.put_manifest(Which::Tag("v1"), media_type::OCI_MANIFEST, MANIFEST).await?;
    Ok(())
}

/// What is wrong with how this row ends; nothing, as a rule.
fn check(row: &'static Row, way: Way) -> Vec<String> {
    let is_push = way.is_push();
    let expected = if is_push { row.push } else { row.pull };
    let (stage, start) = (stage(row), Instant::now());
    let Stage { registry, other, .. } = &stage;
    let bench = stage.bench(row.who, way);
    let bytes = content();
    let blob = Descriptor::new(media_type::OCI_LAYER_GZIP, Digest::of(&bytes), bytes.len() as u64);
    let mut wrong = Vec::new();
    let ended = if is_push {
        bench.run(push(&bench.repository(registry), &blob, way))
    } else {
        for there in stage.servers() {
            there.blob(&bytes);
            there.manifest("v1", MANIFEST);
        }
        bench.run(pull(&bench.repository(registry), &blob, way)).map(|out| {
            if out != bytes {
                wrong.push("other bytes were taken".to_owned());
            }
        })
    };
    let end = ended.as_ref().map_or_else(|error| Fails(error.fault()), |()| Good);
    let wanted = if expected == Apart { Good } else { expected };
    if end != wanted {
        let said = ended.as_ref().map_or_else(|error| text(error), |()| String::new());
        wrong.push(format!("is {end:?}, not {expected:?}: {said} {:?}", stage.actor.lines()));
    }
    let met = stage.met.load(Ordering::SeqCst);
    if (met == 0) != (expected == Apart) {
        wrong.push(format!("was done {met} times, and {expected:?} is expected: {:?}", stage.actor.lines()));
    }
    if is_push && ended.is_ok() {
        let has = |at: &&Server| at.state.lock().unwrap().blobs.get(&blob.digest) == Some(&bytes);
        if ![registry, other].iter().any(has) {
            wrong.push("the blob is nowhere".to_owned());
        }
    }
    // A blob of another content never has its name.
    if is_push && registry.state.lock().unwrap().blobs.iter().any(|(name, bytes)| *name != Digest::of(bytes))
    {
        wrong.push("a blob of other bytes".to_owned());
    }
    wrong.extend(betrayed(row.who, &stage));
    if let Err(error) = &ended
        && text(error).contains("canary")
    {
        wrong.push(format!("a message has the password: {}", text(error)));
    }
    let (took, requests) =
        (bench.pauses.now(), stage.servers().iter().map(|at| at.seen().len()).sum::<usize>());
    if took > LONGEST || start.elapsed() > Duration::from_secs(100) || requests > MOST_REQUESTS {
        wrong.push(format!("{took:?} of its time, {:?} of ours, {requests} requests", start.elapsed()));
    }
    wrong.iter().map(|what| format!("{}, {:?}, {way:?}: {what}", row.name, row.who)).collect()
}

/// Who has seen credentials that are not for him, and whether those had them whom they are for.
fn betrayed(who: Who, stage: &Stage) -> Vec<String> {
    let knows = |request: &Request| {
        let shown = request.header("authorization").is_some() || request.query.contains("account");
        shown || String::from_utf8_lossy(&request.body).contains("canary")
    };
    let has_seen = |server: &Server| server.seen().iter().any(knows);
    let mut wrong = Vec::new();
    if has_seen(&stage.other) || (who == Who::Mirror && has_seen(&stage.actor)) {
        wrong.push("another host has seen credentials".to_owned());
    }
    // Nothing could have been betrayed otherwise.
    if matches!(who, Who::Locked | Who::Tokens) && !has_seen(&stage.actor) {
        wrong.push("nobody has shown the password".to_owned());
    }
    wrong
}

#[test]
fn whatever_a_registry_does_nothing_wrong_is_taken_and_it_ends() {
    for end in [|row: &Row| row.pull, |row: &Row| row.push] {
        assert!(rows().filter(|row| end(row) != Apart).count() >= 40);
    }
    let next = Mutex::new(rows().flat_map(|row| WAYS.map(|way| (row, way))));
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        // They wait more than they work.
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let Some((row, way)) = next.lock().unwrap().next() else { break };
                    let found = check(row, way);
                    wrong.lock().unwrap().extend(found);
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
