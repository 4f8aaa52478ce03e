//! What clients ask kiln's registry for: a path that is understood names nothing outside of its directory and
//! means the same when it is written out; ranges stay inside the blob.
//!
//! The input is a path, a line feed, a header.
#![no_main]

use kiln_oci::Digest;
use libfuzzer_sys::fuzz_target;

#[allow(dead_code, unreachable_pub, reason = "as the server has it")]
#[path = "../../crates/registry-server/src/range.rs"]
mod range;
#[allow(dead_code, unreachable_pub, reason = "as the server has it")]
#[path = "../../crates/registry-server/src/route.rs"]
mod route;

use range::{Asked, asked, piece};
use route::{Name, Route, Which, parameter};

fuzz_target!(|text: &str| {
    let (path, header) = text.split_once('\n').unwrap_or((text, ""));
    if let Ok(route) = Route::parse(path) {
        let inside = |name: &Name| {
            for part in name.as_str().split('/') {
                assert!(!part.is_empty() && part.len() < 256, "{part:?}");
                assert!(part.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit()));
            }
        };
        let written = match &route {
            Route::Base => "/v2/".to_owned(),
            Route::Catalog => "/v2/_catalog".to_owned(),
            Route::Metrics => "/metrics".to_owned(),
            Route::Tags(name) => format!("/v2/{name}/tags/list"),
            Route::Referrers(name, digest) => format!("/v2/{name}/referrers/{digest}"),
            Route::Manifest(name, Which::Tag(tag)) => {
                assert!(
                    !tag.as_str().contains('/') && !tag.as_str().starts_with('.') && !tag.as_str().is_empty()
                );
                format!("/v2/{name}/manifests/{tag}")
            }
            Route::Manifest(name, Which::Digest(digest)) => format!("/v2/{name}/manifests/{digest}"),
            Route::Blob(name, digest) => format!("/v2/{name}/blobs/{digest}"),
            Route::Uploads(name) => format!("/v2/{name}/blobs/uploads/"),
            Route::Upload(name, id) => format!("/v2/{name}/blobs/uploads/{id}"),
        };
        match &route {
            Route::Tags(name)
            | Route::Referrers(name, _)
            | Route::Manifest(name, _)
            | Route::Blob(name, _)
            | Route::Uploads(name)
            | Route::Upload(name, _) => inside(name),
            Route::Base | Route::Catalog | Route::Metrics => {}
        }
        assert_eq!(Route::parse(&written), Ok(route), "{written:?}");
    }
    for size in [0, 1, 10, u64::MAX] {
        if let Asked::Part(from, to) = asked(header, size) {
            assert!(from < to && to <= size, "{header:?} of {size}");
        }
    }
    if let Some((from, length)) = piece(header) {
        assert!(length > 0 && from.checked_add(length - 1).is_some(), "{header:?}");
    }
    if let Some(digest) = parameter(header, "digest").and_then(|text| text.parse::<Digest>().ok()) {
        assert_eq!(digest.to_string().len(), 71);
    }
});
