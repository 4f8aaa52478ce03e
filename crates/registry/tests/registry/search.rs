//! Search, in both forms.

use crate::bench::Bench;
use crate::server::{Server, answer};

#[test]
fn a_catalogue_is_filtered_over_its_pages() {
    let server = Server::scripted(|request, _| {
        let page = |names: &str, link: &str| {
            let body = format!("{{\"repositories\":{names}}}");
            Some(answer(200, &[("Link", link)], body.as_bytes()))
        };
        match (request.path.as_str(), request.query.as_str()) {
            ("/v2/_catalog", "n=1000") => page(r#"["a/app","b"]"#, "</v2/_catalog?last=b>; rel=\"next\""),
            // The last page leads round in a circle.
            ("/v2/_catalog", _) => page(r#"["c/app\u001b[31m"]"#, "</v2/_catalog?last=b>; rel=\"next\""),
            _ => None,
        }
    });
    let bench = Bench::new();
    let names = |limit| {
        let found = bench.run(bench.client.search(&server.domain(), "app", limit)).unwrap();
        found.into_iter().map(|found| found.name).collect::<Vec<_>>()
    };
    assert_eq!(names(10), ["a/app", "c/app [31m"]);
    assert_eq!(names(1), ["a/app"]);
}

#[test]
fn a_registry_without_a_catalogue_is_asked_as_docker_hub_is() {
    let server = Server::scripted(|request, _| match request.path.as_str() {
        "/v2/_catalog" => Some(answer(404, &[], b"")),
        "/v1/search" => {
            assert_eq!(request.query, "q=a+b&n=2");
            let body = br#"{"results":[{"name":"x","description":"d","star_count":7,"is_official":true},{"name":"y"}]}"#;
            Some(answer(200, &[], body))
        }
        _ => None,
    });
    let bench = Bench::new();
    let found = bench.run(bench.client.search(&server.domain(), "a b", 2)).unwrap();
    assert_eq!((found[0].name.as_str(), found[0].stars, found[0].official), ("x", 7, true));
    assert_eq!((found[1].name.as_str(), found[1].official), ("y", false));
    let page = Server::scripted(|request, _| (request.path != "/v2/").then(|| answer(200, &[], b"<html>")));
    let error = bench.run(bench.client.search(&page.domain(), "x", 2)).unwrap_err();
    assert!(error.to_string().contains("something else than a list"), "{error}");
}
