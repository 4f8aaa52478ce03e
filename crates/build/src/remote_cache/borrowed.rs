//! What caches with a scope say, in this store: for builds that name the same scopes, and for nobody else.
//!
//! A record may say any files of any key. Whoever names its scope believes that, and so does what is made from it;
//! a build of another branch in the same store must not (`docs/adr/0021-remote-caches.md`).

use std::collections::BTreeSet;

use kiln_oci::Digest;

use super::CacheSource;

/// Where the store keeps such results: under other keys, which are made of these scopes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Borrowed(Digest);

impl Borrowed {
    /// Of those of `sources` that have a scope, in any order; `None`: none has one.
    pub(crate) fn of(sources: &[CacheSource]) -> Option<Self> {
        let scoped = sources.iter().filter(|source| source.is_scoped());
        let places: BTreeSet<String> = scoped.map(CacheSource::identity).collect();
        // Debug's quotes keep one place from looking like two.
        (!places.is_empty()).then(|| Self(Digest::of(format!("scopes {places:?}").as_bytes())))
    }

    /// The key that the store knows `key` by.
    pub(crate) fn key(&self, key: &Digest) -> Digest {
        Digest::of(format!("borrowed {} {key}", self.0).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(sources: &[&str]) -> Option<Borrowed> {
        let sources: Vec<CacheSource> = sources.iter().map(|source| source.parse().unwrap()).collect();
        Borrowed::of(&sources)
    }

    #[test]
    fn each_set_of_scopes_has_keys_of_its_own() {
        assert_eq!(of(&["type=local,src=/x", "app", "type=local,src=/y,scope=default"]), None);
        let sets: [&[&str]; 7] = [
            &["type=local,src=/x,scope=a"],
            &["type=local,src=/x,scope=b"],
            &["type=local,src=/y,scope=a"],
            &["type=local,src=/x,scope=a", "type=local,src=/x,scope=b"],
            &["type=inline,ref=app,scope=a"],
            &["type=s3,bucket=b,endpoint_url=https://one,scope=a"],
            &["type=s3,bucket=b,endpoint_url=https://two,scope=a"],
        ];
        let key = Digest::of(b"key");
        let keys: BTreeSet<Digest> = sets.iter().map(|set| of(set).unwrap().key(&key)).collect();
        assert_eq!((keys.len(), keys.contains(&key)), (sets.len(), false));
    }

    #[test]
    fn order_credentials_and_caches_without_scope_do_not_count() {
        let (one, other) = ("type=s3,bucket=b,scope=a", "type=local,src=/x,scope=b");
        assert_eq!(of(&[one, other]), of(&[other, "app", one, one]));
        assert_eq!(of(&["type=s3,bucket=b,scope=a,access_key_id=ID,secret_access_key=KEY"]), of(&[one]));
    }
}
