//! What token servers and mirrors do that they should not, or need not.

use super::End::{Apart, Fails, Good};
use super::Fault::{Integrity, Limit, Network};
use super::{Row, Who, content, row};
use crate::server::{Reply, answer};

/// A token's whole answer, however it comes.
const TOKEN: &[u8] = br#"{"token":"canary-token"}"#;

const fn tokens(name: &'static str, both: super::End, act: super::Act) -> Row {
    row(name, both, both, act).by(Who::Tokens)
}

/// What is pushed goes to the registry itself, which need not ask anybody.
const fn mirror(name: &'static str, pull: super::End, act: super::Act) -> Row {
    row(name, pull, Apart, act).by(Who::Mirror)
}

pub(super) const ROWS: &[Row] = &[
    tokens("500 once", Good, |scene| scene.once(|| answer(500, &[], b""))),
    tokens("429 once", Good, |scene| scene.once(|| answer(429, &[("Retry-After", "1")], b""))),
    tokens("reset once", Good, |scene| scene.once(|| Reply::Reset(Vec::new()))),
    tokens("503 for ever", Fails(Network), |scene| scene.status(503)),
    tokens("401", Fails(Network), |scene| scene.status(401)),
    tokens("404", Fails(Network), |scene| scene.status(404)),
    tokens("silence", Fails(Network), |_| Some(Reply::Hang(Vec::new()))),
    tokens("silence in the token", Fails(Network), |_| {
        let Reply::Bytes(whole) = answer(200, &[], TOKEN) else { return None };
        Some(Reply::Hang(whole[..whole.len() - 9].to_vec()))
    }),
    tokens("one byte at a time", Fails(Network), |_| {
        let head = crate::server::head(200, &[], 1000);
        Some(Reply::Trickle(head, vec![b' '; 1000]))
    }),
    tokens("a token that is none", Fails(Network), |_| Some(answer(200, &[], br#"{"token":"a\r\nb: c"}"#))),
    tokens("a token that the registry does not take", Fails(Network), |_| {
        Some(answer(200, &[], br#"{"token":"canary-other"}"#))
    }),
    tokens("no token", Fails(Network), |_| Some(answer(200, &[], b"{}"))),
    tokens("a web page", Fails(Network), |_| Some(answer(200, &[("Content-Type", "text/html")], b"<html>"))),
    tokens("a token without end", Fails(Limit), |_| Some(answer(200, &[], &vec![b' '; (1 << 20) + 1]))),
    tokens("another host has them", Fails(Network), |scene| {
        let target = format!("http://localhost:{}/token", scene.other.port);
        Some(answer(307, &[("Location", &target)], b""))
    }),
    mirror("404", Good, |scene| scene.status(404)),
    mirror("403", Good, |scene| scene.status(403)),
    mirror("it wants a password", Good, |_| {
        Some(answer(401, &[("WWW-Authenticate", "Basic realm=\"x\"")], b""))
    }),
    mirror("500 for ever", Good, |scene| scene.status(500)),
    mirror("429 for a day", Good, |_| Some(answer(429, &[("Retry-After", "86400")], b""))),
    mirror("reset before the answer", Good, |_| Some(Reply::Reset(Vec::new()))),
    mirror("silence", Good, |_| Some(Reply::Hang(Vec::new()))),
    mirror("silence in a blob", Good, |scene| match scene.request.is_blob() {
        true => scene.hangs_after(|head, body| [head, &body[..body.len() / 2]].concat()),
        false => None,
    }),
    mirror("cut in a blob, again and again", Good, |scene| {
        if !scene.request.is_blob() {
            return None;
        }
        let (head, body) = scene.parts();
        Some(Reply::Bytes([head, body[..body.len() / 3].to_vec()].concat()))
    }),
    // Found out before anything was written: the registry has the manifest, and the blob as well.
    mirror("one bit of everything is another", Good, |scene| {
        if !scene.is_read() {
            return None;
        }
        let (head, mut body) = scene.parts();
        body[7] ^= 1;
        Some(Reply::Bytes([head, body].concat()))
    }),
    // Found out when it is too late to ask somebody else.
    mirror("one bit of a blob is another", Fails(Integrity), |scene| {
        let mut other = content();
        other[7] ^= 1;
        scene.request.is_blob().then(|| answer(200, &[], &other))
    }),
    mirror("a web page", Good, |scene| {
        (!scene.is("HEAD")).then(|| answer(200, &[("Content-Type", "text/html")], b"<html>"))
    }),
    mirror("another host has it", Good, |scene| {
        let target = format!("http://localhost:{}{}", scene.other.port, scene.request.path);
        scene.is_read().then(|| answer(307, &[("Location", &target)], b""))
    }),
    mirror("a redirect to the neighbours", Good, |scene| {
        let secrets = [("Location", "http://169.254.169.254/latest/meta-data")];
        scene.is_read().then(|| answer(307, &secrets, b""))
    }),
    mirror("redirects without end", Good, |scene| {
        scene.is_read().then(|| answer(307, &[("Location", &scene.request.path)], b""))
    }),
];
