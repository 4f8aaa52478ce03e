//! `type=gcs` and `type=azblob`: what is sent, and what comes back.

use std::fs;

use kiln_oci::Digest;

use crate::clouds::{Asked, Cloud, SECRET, Server};
use crate::harness::{Context, Outcome, needs_root};
use crate::remote_cache::{Cache, build, id, small, warnings};

/// Three parts' worth.
const LARGE_BYTES: usize = 20 << 20;

/// Four steps, and one whose layer is large and nothing that compresses.
fn project() -> Context {
    let context = small();
    let mut random = kiln_testkit::random::Random::of(21);
    let bytes: Vec<u8> = (0..LARGE_BYTES / 8).flat_map(|_| random.number().to_ne_bytes()).collect();
    fs::write(context.at("large"), bytes).expect("ours");
    let dockerfile = fs::read_to_string(context.at("Dockerfile")).expect("ours");
    context.write("Dockerfile", &format!("{dockerfile}COPY large /large\n"));
    context
}

fn writes(asked: &[Asked]) -> Vec<&Asked> {
    asked.iter().filter(|asked| !["GET", "HEAD"].contains(&asked.method.as_str())).collect()
}

#[track_caller]
fn has_no_secret(outcome: &Outcome) {
    assert!(!outcome.stderr.contains(SECRET) && !outcome.stdout.contains(SECRET), "{outcome:?}");
}

#[track_caller]
fn check(cloud: Cloud) {
    let (server, context, base) = (Server::start(cloud), project(), Cache::new());
    let place = cloud.place(server.address, ",prefix=some/where,scope=feature/x");
    let to = format!("{place},mode=max");
    let first = build(&base.store(), &context, &["--cache-to", &to]);
    assert_eq!((first.ran().len(), warnings(&first)), (5, vec![]));
    let asked = server.asked();
    // Nothing but what it does with objects below the prefix, and each time with the key.
    for asked in &asked {
        assert!(asked.name.starts_with("some/where/kiln-cache-1/"), "{asked:?}");
        assert!([200, 201, 404].contains(&asked.status), "{asked:?}");
    }
    let objects = server.objects();
    let of = |kind: &str| -> Vec<(&String, &Vec<u8>)> {
        objects.iter().filter(|(name, _)| name.contains(&format!("/kiln-cache-1/{kind}/"))).collect()
    };
    let (records, blobs) = (of("records/feature=2Fx"), of("blobs"));
    assert_eq!(
        (records.len() + blobs.len(), blobs.len() >= 5),
        (objects.len(), true),
        "{:?}",
        objects.keys()
    );
    for (name, bytes) in &blobs {
        assert!(name.ends_with(&Digest::of(bytes).hex()), "{name} is something else");
    }
    // Blobs before the records that speak of them; records are made, never replaced.
    let writes = writes(&asked);
    let is_record = |asked: &&Asked| asked.name.contains("/records/");
    let first_record = writes.iter().position(is_record).expect("records were sent");
    assert!(writes[first_record..].iter().all(is_record), "a blob comes after a record");
    let (header, value) = cloud.only_if_absent();
    for asked in &writes[first_record..] {
        assert_eq!(asked.headers.get(header).map(String::as_str), Some(value), "{asked:?}");
    }
    assert_eq!(writes.len() - first_record, records.len(), "each record once");
    // The large one in parts of 8 MiB, the others in one.
    let is_part =
        |asked: &&&Asked| asked.parameter("partNumber").is_some() || asked.parameter("comp") == Some("block");
    let mut parts: Vec<usize> = writes.iter().filter(is_part).map(|asked| asked.length).collect();
    parts.sort_unstable_by(|one, other| other.cmp(one));
    assert_eq!((parts.len(), parts[0], parts[1]), (3, 8 << 20, 8 << 20), "{parts:?}");

    // Another machine gets all of it, and has nothing to add.
    let store = base.store();
    let again = build(&store, &context, &["-t", "app", "--cache-from", &place, "--cache-to", &to]);
    assert_eq!((again.ran(), warnings(&again), id(&again)), (vec![], vec![], id(&first)));
    assert_eq!(self::writes(&server.asked()).len(), 0);
    assert_eq!(store.shell("app", "wc -c < /large").trim(), LARGE_BYTES.to_string());
    assert_eq!(store.sound(), Ok(()));
    has_no_secret(&first);
    has_no_secret(&again);

    // Somebody else's record came first, in the moment between the look and the writing: it stays.
    server.hide_records();
    let raced = build(&base.store(), &context, &["--cache-to", &to]);
    assert_eq!((raced.ran().len(), warnings(&raced)), (5, vec![]));
    let refused = server.asked().iter().filter(|asked| [409, 412].contains(&asked.status)).count();
    assert_eq!(refused, records.len());
    let now = server.objects();
    for (name, bytes) in records {
        assert_eq!(now.get(name), Some(bytes));
    }

    // Nobody is let in any more.
    server.refuse();
    let alone = build(&base.store(), &context, &["-t", "app", "--cache-from", &place, "--cache-to", &to]);
    let warned = warnings(&alone);
    assert_eq!((alone.ran().len(), warned.len()), (5, 2), "{warned:?}");
    assert!(warned.iter().all(|text| text.contains("403")), "{warned:?}");
    has_no_secret(&alone);
}

#[test]
fn google_is_sent_each_layer_and_each_record_once() {
    needs_root!();
    check(Cloud::Google);
}

#[test]
fn azure_is_sent_each_layer_and_each_record_once() {
    needs_root!();
    check(Cloud::Azure);
}
