//! What a registry does that it should not, or need not.

use kiln_oci::Digest;
use kiln_oci::image::media_type;

use super::End::{Apart, Fails, Good};
use super::Fault::{Integrity, Network, Refused};
use super::{MANIFEST, Row, Who, content, row};
use crate::server::{Ears, Reply, answer, head};

const LATER: &str = "Sun, 09 Sep 2001 01:46:49 GMT";

/// What the registry itself does.
pub(super) const ROWS: &[Row] = &[
    row("nothing", Apart, Apart, |_| None),
    row("401 without a challenge", Fails(Network), Fails(Network), |scene| scene.status(401)),
    row("401 for ever", Fails(Network), Fails(Network), |_| {
        Some(answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b""))
    }),
    row("403", Fails(Network), Fails(Network), |scene| scene.status(403)),
    // To a push it says that a blob is to be sent, and then that the upload is nowhere.
    row("404", Fails(Network), Fails(Network), |scene| scene.status(404)),
    row("405", Fails(Network), Fails(Network), |scene| scene.status(405)),
    row("408 once", Good, Good, |scene| scene.once(|| answer(408, &[], b""))),
    row("416, and where to go on", Fails(Network), Good, |scene| match scene.request.method.as_str() {
        "PATCH" => scene.once(|| answer(416, &[("Range", "0-0")], b"")),
        _ if scene.is_read() => scene.status(416),
        _ => None,
    }),
    row("429 once", Good, Good, |scene| scene.once(|| answer(429, &[], b""))),
    row("429 for seconds", Good, Good, |scene| scene.once(|| answer(429, &[("Retry-After", "3")], b""))),
    row("429 until a date", Good, Good, |scene| scene.once(|| answer(429, &[("Retry-After", LATER)], b""))),
    row("429 for a day", Fails(Network), Fails(Network), |_| {
        Some(answer(429, &[("Retry-After", "86400")], b"slow down"))
    }),
    row("500 once", Good, Good, |scene| scene.once(|| answer(500, &[], b""))),
    row("502 twice", Good, Good, |scene| (scene.nth < 2).then(|| answer(502, &[], b"<html>"))),
    row("503 with Retry-After", Good, Good, |scene| scene.once(|| answer(503, &[("Retry-After", "1")], b""))),
    row("504 once", Good, Good, |scene| scene.once(|| answer(504, &[], b""))),
    row("500 for ever", Fails(Network), Fails(Network), |scene| scene.status(500)),
    row("507", Fails(Network), Fails(Network), |scene| scene.status(507)),
    row("closed before the answer", Good, Good, |scene| scene.once(|| Reply::Bytes(Vec::new()))),
    row("reset before the answer", Good, Good, |scene| scene.once(|| Reply::Reset(Vec::new()))),
    row("reset in the headers", Good, Good, |scene| {
        scene.once(|| Reply::Reset(b"HTTP/1.1 200 OK\r\nContent-Le".to_vec()))
    }),
    // Of a push, the registry has what was sent, and nobody knows.
    row("reset behind the headers", Good, Good, |scene| {
        (scene.nth == 0 && !scene.is("PUT")).then(|| Reply::Reset(scene.parts().0))
    }),
    row("cut in the body, again and again", Good, Good, |scene| {
        if scene.nth > 2 || !scene.is_read() {
            return None;
        }
        let (mut head, body) = scene.parts();
        head.extend_from_slice(&body[..body.len() / 3]);
        Some(Reply::Bytes(head))
    })
    .hearing(|request, nth| (request.method == "PATCH" && nth <= 2).then_some(Ears::Broken(100_000))),
    // Of a push, nobody knows before its end.
    row("bytes that come twice", Fails(Integrity), Fails(Network), |scene| {
        if scene.is("PATCH") {
            (0..2).for_each(|_| scene.server.arrive(scene.request, scene.request.body.len()));
            return Some(scene.arrived_up_to(scene.last_byte()));
        }
        if !scene.is_read() {
            return None;
        }
        let (mut head, body) = scene.parts();
        let half = body.len() / 2;
        head.extend_from_slice(&[&body[..half], &body[..half], &body[2 * half..]].concat());
        Some(Reply::Bytes(head))
    }),
    row("a range that nobody asked for", Fails(Network), Fails(Network), |scene| match scene.nth {
        _ if scene.is("PATCH") => {
            let location = scene.request.path.clone();
            Some(answer(202, &[("Location", &location), ("Range", "0-99999999")], b""))
        }
        _ if !scene.request.is_blob() => None,
        0 => Some(Reply::Bytes([head(200, &[], 700_000), content()[..9].to_vec()].concat())),
        _ => Some(answer(206, &[("Content-Range", "bytes 0-699999/700000")], &content())),
    }),
    row("no ranges", Good, Good, |scene| match scene.nth {
        // Where an upload stands is not said, either.
        _ if scene.is("PATCH") => {
            scene.good();
            Some(answer(202, &[("Location", &scene.request.path)], b""))
        }
        _ if !scene.request.is_blob() => None,
        0 => Some(Reply::Bytes([head(200, &[], 700_000), content()[..300_000].to_vec()].concat())),
        _ => Some(answer(200, &[], &content())),
    }),
    row("chunks without end", Good, Good, |scene| {
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n".as_bytes();
        match scene.request.method.as_str() {
            "GET" if scene.nth == 0 => Some(Reply::Bytes([head, &scene.parts().1[..9]].concat())),
            "POST" if scene.nth == 0 => Some(Reply::Bytes([head, b"{}"].concat())),
            _ => None,
        }
    }),
    row("one byte at a time", Fails(Network), Fails(Network), |scene| {
        let (head, body) = scene.parts();
        match body.is_empty() {
            true => Some(Reply::Trickle(Vec::new(), head)),
            false => Some(Reply::Trickle(head, body[..body.len().min(200)].to_vec())),
        }
    }),
    row("silence", Fails(Network), Fails(Network), |_| Some(Reply::Hang(Vec::new()))),
    row("silence in the headers", Fails(Network), Fails(Network), |scene| {
        scene.hangs_after(|head, _| head[..20].to_vec())
    }),
    row("silence in the body", Fails(Network), Fails(Network), |scene| match scene.is_read() {
        true => scene.hangs_after(|head, body| [head, &body[..body.len() / 2]].concat()),
        false => None,
    })
    .hearing(|request, _| (request.method == "PATCH").then_some(Ears::Deaf(50_000))),
    row("HTTP/1.0", Good, Good, |scene| {
        let whole = String::from_utf8_lossy(&scene.parts().0).replace("HTTP/1.1", "HTTP/1.0");
        Some(Reply::Bytes([whole.into_bytes(), scene.body_of_a_read()].concat()))
    }),
    row("HTTP/1.0 that ends early", Good, Apart, |scene| {
        let early = || [b"HTTP/1.0 200 OK\r\n\r\n", &content()[..1000]].concat();
        (scene.request.is_blob() && scene.nth == 0).then(|| Reply::Bytes(early()))
    }),
    row("what it knew is forgotten", Good, Good, |scene| {
        let path = &scene.request.path;
        match scene.request.method.as_str() {
            "PATCH" if path.ends_with("/u0") => Some(answer(404, &[], b"")),
            "GET" if path.ends_with("/u0") => Some(answer(404, &[], b"")),
            // A token that has run out between two requests.
            "GET" if scene.nth == 0 && scene.request.is_blob() => {
                Some(answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b""))
            }
            _ => None,
        }
    }),
    row("one bit is another", Fails(Integrity), Fails(Integrity), |scene| {
        if scene.is("PUT") {
            let other = Digest::of(b"other").to_string();
            return Some(answer(201, &[("Docker-Content-Digest", &other)], b""));
        }
        if !scene.is_read() {
            return None;
        }
        let (head, mut body) = scene.parts();
        let at = body.len() - 3;
        body[at] ^= 1;
        Some(Reply::Bytes([head, body].concat()))
    }),
    row("a byte more", Fails(Integrity), Fails(Network), |scene| match scene.is("PATCH") {
        true => {
            scene.good();
            Some(scene.arrived_up_to(scene.last_byte() + 1))
        }
        false => {
            let one_more = || answer(200, &[], &[content(), b"x".to_vec()].concat());
            scene.request.is_blob().then(one_more)
        }
    }),
    row("a byte less", Fails(Integrity), Good, |scene| match scene.is("PATCH") {
        true => scene.once(|| {
            scene.server.arrive(scene.request, scene.request.body.len() - 1);
            scene.arrived_up_to(scene.last_byte() - 1)
        }),
        false => scene.request.is_blob().then(|| answer(200, &[], &content()[1..])),
    }),
    row("the tag leads elsewhere a moment later", Fails(Integrity), Apart, |scene| {
        let other = MANIFEST.iter().copied().chain(*b" ").collect::<Vec<u8>>();
        let kind = ("Content-Type", media_type::OCI_MANIFEST);
        (scene.is_read() && scene.request.path.contains("/manifests/sha256:"))
            .then(|| answer(200, &[kind], &other))
    }),
    // The password is on its way when the registry says so.
    row("another host has it", Good, Good, |scene| {
        let target = format!("http://localhost:{}{}", scene.other.port, scene.request.path);
        match scene.request.method.as_str() {
            "GET" if scene.is_read() => Some(answer(307, &[("Location", &target)], b"")),
            "POST" => {
                let begun = scene.other.behave(scene.request);
                let Reply::Bytes(begun) = begun else { return None };
                let begun = String::from_utf8(begun).unwrap();
                let there = format!("Location: http://localhost:{}/", scene.other.port);
                Some(Reply::Bytes(begun.replace("Location: /", &there).into_bytes()))
            }
            _ => None,
        }
    })
    .by(Who::Locked),
    row("redirects without end", Fails(Network), Fails(Network), |scene| {
        Some(answer(307, &[("Location", &scene.request.path)], b""))
    }),
    row("a redirect to a file", Fails(Refused), Fails(Refused), |scene| match scene.is("POST") {
        true => Some(answer(202, &[("Location", "file:///etc/passwd")], b"")),
        false if scene.is_read() => Some(answer(302, &[("Location", "file:///etc/passwd")], b"")),
        false => None,
    }),
    row("a token server of another name", Fails(Network), Fails(Network), |scene| {
        let challenge = format!("Bearer realm=\"http://localhost:{}/token\",service=\"s\"", scene.other.port);
        Some(answer(401, &[("WWW-Authenticate", &challenge)], b""))
    }),
    row("a redirect to the neighbours", Fails(Refused), Fails(Refused), |scene| {
        let secrets = [("Location", "http://169.254.169.254/latest/meta-data")];
        match scene.is("POST") {
            true => Some(answer(202, &secrets, b"")),
            false if scene.is_read() => Some(answer(307, &secrets, b"")),
            false => None,
        }
    }),
    row("packed for transport", Good, Good, |scene| {
        let (head, body) = scene.parts();
        let head = String::from_utf8_lossy(&head).replacen("\r\n", "\r\nContent-Encoding: gzip\r\n", 1);
        Some(Reply::Bytes([head.into_bytes(), body].concat()))
    }),
    row("a web page", Fails(Integrity), Fails(Network), |scene| match scene.is("HEAD") {
        true => None,
        false => Some(answer(200, &[("Content-Type", "text/html")], b"<html>who are you?</html>")),
    }),
    row("no HTTP", Good, Good, |scene| scene.once(|| Reply::Bytes(b"SSH-2.0-x\r\n".to_vec()))),
    row("headers without end", Fails(Network), Fails(Network), |_| {
        let mut reply = b"HTTP/1.1 200 OK\r\n".to_vec();
        (0..20_000).for_each(|n| reply.extend_from_slice(format!("X-{n}: y\r\n").as_bytes()));
        Some(Reply::Bytes(reply))
    }),
    row("hints before the answer", Good, Good, |scene| {
        Some(Reply::Bytes(
            [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n".to_vec(), scene.good()].concat(),
        ))
    }),
    row("an answer that nobody asked for behind it", Good, Good, |scene| {
        Some(Reply::Bytes([scene.good(), b"HTTP/1.1 500 X\r\n\r\n".to_vec()].concat()))
    }),
    row("digests that are none", Fails(Integrity), Good, |scene| {
        if scene.is("PUT") {
            scene.good();
            return Some(answer(201, &[("Docker-Content-Digest", "sha256:../x")], b""));
        }
        let headers = [("Content-Type", media_type::OCI_MANIFEST), ("Docker-Content-Digest", "sha256:../x")];
        (scene.is_read() && !scene.request.is_blob()).then(|| answer(200, &headers, b"[]"))
    }),
];
