//! Many at once.

use std::sync::{Arc, Barrier};

use kiln_oci::Digest;

use super::Own;
use super::client::Client;

const CLIENTS: usize = 64;

/// Pushes an image of its own and reads it back.
fn round(client: &mut Client, number: usize, round: usize) {
    let name = format!("team/app{}", number % 8);
    let content = format!("{number}-{round}-{}", "x".repeat(50_000));
    let tag = format!("t{number}-{round}");
    let (digest, manifest) = client.push_image(&name, &tag, &content);
    assert_eq!(client.get(&format!("/v2/{name}/manifests/{tag}")).expect(200).body, manifest);
    client.send("HEAD", &format!("/v2/{name}/manifests/{digest}"), &[], b"").expect(200);
    let layer = Digest::of(format!("layer of {content}").as_bytes());
    let came = client.get(&format!("/v2/{name}/blobs/{layer}")).expect(200);
    assert_eq!(Digest::of(&came.body), layer);
    client.get(&format!("/v2/{name}/tags/list?n=3")).expect(200);
}

/// All clients at once, each with a connection of its own.
fn all(own: &Own, work: impl Fn(&mut Client, usize) + Send + Sync + 'static) {
    let (start, work) = (Arc::new(Barrier::new(CLIENTS)), Arc::new(work));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (start, work, address) = (start.clone(), work.clone(), own.address);
            std::thread::spawn(move || {
                let mut client = Client::new(address);
                start.wait();
                work(&mut client, number);
            })
        })
        .collect();
    for client in clients {
        client.join().expect("no client sees an error");
    }
}

#[test]
fn sixty_four_clients_push_and_pull_at_once_in_flat_memory() {
    let rounds = std::env::var("KILN_REGISTRY_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let own = Own::start();
    let reads = |client: &mut Client, number: usize| {
        for _ in 0..60 {
            let name = format!("team/app{}", number % 8);
            client.get(&format!("/v2/{name}/manifests/t{number}-0")).expect(200);
            let layer = Digest::of(format!("layer of {number}-0-{}", "x".repeat(50_000)).as_bytes());
            client.get(&format!("/v2/{name}/blobs/{layer}")).expect(200);
        }
    };
    all(&own, |client, number| round(client, number, 0));
    all(&own, reads);
    // All buffers that there will ever be are there now.
    let warm = own.rss_kib();
    for number_of_round in 1..=rounds {
        all(&own, move |client, number| round(client, number, number_of_round));
        all(&own, reads);
    }
    let end = own.rss_kib();
    eprintln!("from {warm} KiB to {end} KiB");
    // Some 8,000 requests a round: a kibibyte that each leaves would be 8 MiB.
    assert!(end < warm + 12 * 1024, "from {warm} KiB to {end} KiB");
    assert!(end < 150 * 1024, "{end} KiB");
    let metrics = String::from_utf8(own.client().get("/metrics").expect(200).body).unwrap();
    let errors = metrics.lines().filter(|line| line.contains("status=\"5") || line.contains("status=\"4"));
    assert_eq!(errors.collect::<Vec<_>>(), [""; 0]);
    let pushed = format!("{{method=\"PUT\",route=\"manifest\",status=\"201\"}} {}", CLIENTS * (rounds + 1));
    assert!(metrics.contains(&pushed), "{metrics}");
}
