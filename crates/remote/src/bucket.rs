//! A bucket of an object store: S3 and whatever speaks like it, Google's, Azure's.

use std::future::Future;
use std::io::{self, Read};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, MultipartUpload, ObjectStore, ObjectStoreExt, PutMode,
    PutOptions, PutPayload, RetryConfig,
};
use tokio::runtime::Runtime;

use crate::store::Exactly;
use crate::{Existing, ObjectName, RemoteError, RemoteStore, Stop};

/// Whose API a bucket speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    /// Amazon's, and all that are compatible with it.
    S3,
    /// Google's.
    Gcs,
    /// Azure's blob storage.
    Azure,
}

impl Provider {
    /// Whether it has an option of this name.
    pub fn knows(self, option: &str) -> bool {
        match self {
            Self::S3 => option.parse::<AmazonS3ConfigKey>().is_ok(),
            Self::Gcs => option.parse::<GoogleConfigKey>().is_ok(),
            Self::Azure => option.parse::<AzureConfigKey>().is_ok(),
        }
    }
}

/// Where a bucket is, and who asks. What is not said comes from the environment, as each provider's own
/// tools have it (`AWS_ACCESS_KEY_ID`, `GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_NAME`, …).
#[derive(Clone, PartialEq, Eq)]
pub struct BucketConfig {
    /// Whose API.
    pub provider: Provider,
    /// Options as the provider names them (`region`, `endpoint_url`, `access_key_id`); some are secret.
    pub options: Vec<(String, String)>,
    /// Stands in front of all names; may be empty.
    pub prefix: String,
    /// Objects that are sent or asked for at a time.
    pub parallel: usize,
}

/// Values may be secret: names only.
impl std::fmt::Debug for BucketConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.options.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("BucketConfig")
            .field("provider", &self.provider)
            .field("prefix", &self.prefix)
            .field("options", &names)
            .finish_non_exhaustive()
    }
}

/// How long a server has to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// How long a server may say nothing.
const STALL: Duration = Duration::from_secs(15);
/// What is sent in one go may take longer than that: so many bytes a second are expected.
const SLOWEST_BYTES: u64 = 64 << 10;
/// What comes slower than so many bytes a second is not waited for.
const TRICKLE_BYTES: u64 = 8 << 10;
/// Larger objects are sent in parts of this size, or of a size of which ten thousand suffice.
const PART_BYTES: u64 = 8 << 20;
const MAX_PARTS: u64 = 9_000;
/// How often a wait looks whether anybody still waits.
const TICK: Duration = Duration::from_millis(50);

/// A bucket.
pub struct Bucket {
    store: Box<dyn ObjectStore>,
    prefix: String,
    parallel: usize,
    stop: Stop,
    /// How long a server may say nothing.
    stall: Duration,
    /// `None` only while it is dropped.
    runtime: Option<Runtime>,
}

impl Bucket {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// [`RemoteError::Options`] for options that the provider does not know, or that do not suffice.
    pub fn new(config: &BucketConfig, stop: Stop) -> Result<Self, RemoteError> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime =
            runtime.map_err(|error| RemoteError::Options(format!("threads cannot be started: {error}")))?;
        let store = store(config)?;
        let prefix = config.prefix.trim_matches('/').to_owned();
        Ok(Self {
            store,
            prefix,
            parallel: config.parallel.max(1),
            stop,
            stall: STALL,
            runtime: Some(runtime),
        })
    }

    fn path(&self, name: &ObjectName) -> Path {
        let prefix = self.prefix.split('/').filter(|part| !part.is_empty()).map(str::to_owned);
        Path::from_iter(prefix.chain(name.parts()))
    }

    fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.as_ref().expect("the runtime goes when the bucket is dropped").block_on(work)
    }

    /// Waits for `work`, as long as a server may take for it and somebody waits.
    async fn bounded<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = Result<T, object_store::Error>>,
    ) -> Result<T, RemoteError> {
        let stopped = async {
            while !(self.stop)() {
                tokio::time::sleep(TICK).await;
            }
        };
        tokio::select! {
            // Who gives up is told so, even if the answer comes with it.
            biased;
            () = stopped => Err(RemoteError::Stopped),
            answer = tokio::time::timeout(limit, work) => match answer {
                Ok(answer) => answer.map_err(|error| server(&error)),
                Err(_) => Err(RemoteError::Server(format!("no answer for {limit:?}"))),
            },
        }
    }

    /// An object's bytes, at most `max_bytes` and one more.
    async fn get(&self, name: &ObjectName, max_bytes: u64) -> Result<Option<Vec<u8>>, RemoteError> {
        let mut bytes = Vec::new();
        let mut keep = |piece: &[u8]| {
            let room = usize::try_from(max_bytes.saturating_add(1)).unwrap_or(usize::MAX) - bytes.len();
            bytes.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.len() >= room { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(()) }
        };
        match self.stream(name, &mut keep).await {
            Ok(true) => Ok(Some(bytes)),
            Ok(false) => Ok(None),
            // There is more, which nobody wants.
            Err(RemoteError::Content(_)) => Ok(Some(bytes)),
            Err(error) => Err(error),
        }
    }

    async fn stream(
        &self,
        name: &ObjectName,
        out: &mut (dyn FnMut(&[u8]) -> io::Result<()> + '_),
    ) -> Result<bool, RemoteError> {
        let path = self.path(name);
        let found = async {
            match self.store.get_opts(&path, GetOptions::default()).await {
                Err(object_store::Error::NotFound { .. }) => Ok(None),
                other => other.map(Some),
            }
        };
        let Some(found) = self.bounded(self.stall, found).await? else { return Ok(false) };
        let mut pieces = found.into_stream();
        let (started, mut received_bytes) = (tokio::time::Instant::now(), 0);
        loop {
            let next = async { pieces.next().await.transpose() };
            match self.bounded(self.stall, next).await? {
                None => return Ok(true),
                Some(piece) => {
                    received_bytes += piece.len() as u64;
                    // A byte now and then is as bad as silence.
                    if started.elapsed() > self.stall + Duration::from_secs(received_bytes / TRICKLE_BYTES) {
                        return Err(RemoteError::Server("it is slower than 8 KiB a second".to_owned()));
                    }
                    out(&piece).map_err(RemoteError::Content)?;
                }
            }
        }
    }

    async fn put_small(&self, path: &Path, bytes: Bytes, existing: Existing) -> Result<(), RemoteError> {
        let limit = sending(self.stall, bytes.len() as u64);
        if existing == Existing::Keep {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let created = async {
                match self.store.put_opts(path, PutPayload::from(bytes.clone()), options).await {
                    Ok(_) | Err(object_store::Error::AlreadyExists { .. }) => Ok(true),
                    // Not every server can put only what is not there.
                    Err(
                        object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. },
                    ) => Ok(false),
                    Err(error) => Err(error),
                }
            };
            if self.bounded(limit, created).await? {
                return Ok(());
            }
        }
        self.bounded(limit, self.store.put(path, PutPayload::from(bytes))).await.map(drop)
    }

    async fn put_parts(
        &self,
        path: &Path,
        content: &mut Exactly<'_>,
        size_bytes: u64,
    ) -> Result<(), RemoteError> {
        let mut upload = self.bounded(self.stall, self.store.put_multipart(path)).await?;
        let sent = self.send_parts(&mut *upload, content, size_bytes).await;
        match sent {
            Ok(()) => self.bounded(sending(self.stall, size_bytes), upload.complete()).await.map(drop),
            Err(error) => {
                // What is left of it is the bucket's own rule for uploads that were never completed.
                let _ = tokio::time::timeout(CONNECT, upload.abort()).await;
                Err(error)
            }
        }
    }

    async fn send_parts(
        &self,
        upload: &mut dyn MultipartUpload,
        content: &mut Exactly<'_>,
        size_bytes: u64,
    ) -> Result<(), RemoteError> {
        let part_bytes = PART_BYTES.max(size_bytes.div_ceil(MAX_PARTS));
        let mut left_bytes = size_bytes;
        while left_bytes > 0 {
            // Some at a time: the next are read while nothing is sent, but a disk is faster.
            let mut parts = Vec::new();
            for _ in 0..self.parallel {
                let length = left_bytes.min(part_bytes);
                if length == 0 {
                    break;
                }
                parts.push(upload.put_part(PutPayload::from(read_exactly(content, length)?)));
                left_bytes -= length;
            }
            let limit = sending(self.stall, part_bytes * parts.len() as u64);
            self.bounded(limit, futures_util::future::try_join_all(parts)).await?;
        }
        at_end(content)
    }
}

/// How long sending so much may take.
fn sending(stall: Duration, bytes: u64) -> Duration {
    stall + Duration::from_secs(bytes / SLOWEST_BYTES)
}

fn read_exactly(content: &mut Exactly<'_>, length: u64) -> Result<Bytes, RemoteError> {
    let length =
        usize::try_from(length).map_err(|_| RemoteError::Content(io::ErrorKind::FileTooLarge.into()))?;
    let mut bytes = vec![0; length];
    content.read_exact(&mut bytes).map_err(RemoteError::Content)?;
    Ok(Bytes::from(bytes))
}

/// Reads the end: whoever checks content as it passes by does it there.
fn at_end(content: &mut Exactly<'_>) -> Result<(), RemoteError> {
    match content.read(&mut [0]).map_err(RemoteError::Content)? {
        0 => Ok(()),
        _ => Err(RemoteError::Content(io::ErrorKind::FileTooLarge.into())),
    }
}

fn store(config: &BucketConfig) -> Result<Box<dyn ObjectStore>, RemoteError> {
    let wrong = |error: &dyn std::error::Error| RemoteError::Options(scrubbed(error));
    let unknown = |name: &str| RemoteError::Options(format!("there is no attribute {name:?}"));
    let retry = RetryConfig { backoff: BackoffConfig::default(), max_retries: 3, retry_timeout: STALL };
    let client = ClientOptions::new()
        .with_connect_timeout(CONNECT)
        .with_read_timeout(STALL)
        // A large blob may take long as long as it moves.
        .with_timeout_disabled();
    Ok(match config.provider {
        Provider::S3 => {
            let mut builder = AmazonS3Builder::from_env();
            for (name, value) in &config.options {
                let key: AmazonS3ConfigKey = name.parse().map_err(|_| unknown(name))?;
                builder = builder.with_config(key, value);
            }
            let plain = builder.get_config_value(&AmazonS3ConfigKey::Endpoint);
            let plain = plain.is_some_and(|url| url.starts_with("http://"));
            let builder = builder.with_retry(retry).with_client_options(client.with_allow_http(plain));
            Box::new(builder.build().map_err(|error| wrong(&error))?)
        }
        Provider::Gcs => {
            let mut builder = GoogleCloudStorageBuilder::from_env();
            for (name, value) in &config.options {
                let key: GoogleConfigKey = name.parse().map_err(|_| unknown(name))?;
                builder = builder.with_config(key, value);
            }
            let plain =
                config.options.iter().any(|(name, url)| name == "base_url" && url.starts_with("http://"));
            let builder = builder.with_retry(retry).with_client_options(client.with_allow_http(plain));
            Box::new(builder.build().map_err(|error| wrong(&error))?)
        }
        Provider::Azure => {
            let mut builder = MicrosoftAzureBuilder::from_env();
            for (name, value) in &config.options {
                let key: AzureConfigKey = name.parse().map_err(|_| unknown(name))?;
                builder = builder.with_config(key, value);
            }
            let plain = builder.get_config_value(&AzureConfigKey::Endpoint);
            let plain = plain.is_some_and(|url| url.starts_with("http://"));
            let builder = builder.with_retry(retry).with_client_options(client.with_allow_http(plain));
            Box::new(builder.build().map_err(|error| wrong(&error))?)
        }
    })
}

fn server(error: &object_store::Error) -> RemoteError {
    RemoteError::Server(scrubbed(error))
}

/// Longer messages are a server's web pages.
const MAX_MESSAGE: usize = 400;

/// An error with its causes in one line, and of URLs only the host: the rest may be keys, and is long.
fn scrubbed(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Most repeat what is below them.
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    let mut clean = String::new();
    let mut is_hidden = false;
    for c in text.chars().take(4 * MAX_MESSAGE) {
        match c {
            '?' => is_hidden = true,
            '/' if ends_with_host(&clean) => is_hidden = true,
            ' ' | ')' | '"' | '\'' | '>' | '\n' if is_hidden => is_hidden = false,
            _ => {}
        }
        if !is_hidden {
            clean.push(if c.is_control() { ' ' } else { c });
        }
    }
    clean.chars().take(MAX_MESSAGE).collect()
}

/// Whether a text ends with a URL that has a host and nothing behind it.
fn ends_with_host(text: &str) -> bool {
    let word = text.rsplit(' ').next().unwrap_or_default();
    word.split_once("://").is_some_and(|(_, host)| !host.is_empty())
}

impl RemoteStore for Bucket {
    fn get_many(&self, names: &[ObjectName], max_bytes: u64) -> Result<Vec<Option<Vec<u8>>>, RemoteError> {
        self.block_on(async {
            let asked = stream::iter(names.iter().map(|name| self.get(name, max_bytes)));
            // Records are small: more of them at a time than blobs.
            let answers: Vec<_> = asked.buffered(self.parallel * 8).collect().await;
            answers.into_iter().collect()
        })
    }

    fn sizes(&self, names: &[ObjectName]) -> Result<Vec<Option<u64>>, RemoteError> {
        let size = |name| {
            let path = self.path(name);
            async move {
                let asked = async {
                    match self.store.head(&path).await {
                        Ok(found) => Ok(Some(found.size)),
                        Err(object_store::Error::NotFound { .. }) => Ok(None),
                        Err(error) => Err(error),
                    }
                };
                self.bounded(self.stall, asked).await
            }
        };
        self.block_on(async {
            let answers: Vec<_> =
                stream::iter(names.iter().map(size)).buffered(self.parallel * 8).collect().await;
            answers.into_iter().collect()
        })
    }

    fn read(
        &self,
        name: &ObjectName,
        out: &mut (dyn FnMut(&[u8]) -> io::Result<()> + Send),
    ) -> Result<bool, RemoteError> {
        self.block_on(self.stream(name, out))
    }

    fn put(
        &self,
        name: &ObjectName,
        content: &mut (dyn Read + Send),
        size_bytes: u64,
        existing: Existing,
    ) -> Result<(), RemoteError> {
        let path = self.path(name);
        let mut content = Exactly::new(content, size_bytes);
        if size_bytes > PART_BYTES {
            return self.block_on(self.put_parts(&path, &mut content, size_bytes));
        }
        let bytes = read_exactly(&mut content, size_bytes)?;
        at_end(&mut content)?;
        self.block_on(self.put_small(&path, bytes, existing))
    }
}

impl Drop for Bucket {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Nothing of it is waited for, and this thread may be one that must not wait.
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Said(&'static str);

    #[test]
    fn keys_in_urls_are_not_told() {
        let text = scrubbed(&Said("GET (https://x.net/c/b?sv=1&sig=SECRET): no\nanswer? maybe"));
        assert_eq!(text, "GET (https://x.net): no answer maybe");
        let config = BucketConfig {
            provider: Provider::S3,
            options: vec![("secret_access_key".to_owned(), "SECRET".to_owned())],
            prefix: String::new(),
            parallel: 4,
        };
        assert!(!format!("{config:?}").contains("SECRET"));
    }

    fn config(address: &str) -> BucketConfig {
        let option = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let options = vec![
            option("bucket", "b"),
            option("region", "r"),
            option("endpoint_url", &format!("http://{address}")),
            option("access_key_id", "id"),
            option("secret_access_key", "SECRET"),
        ];
        BucketConfig { provider: Provider::S3, options, prefix: "/a//b/".to_owned(), parallel: 2 }
    }

    #[test]
    fn a_server_that_says_nothing_is_waited_for_no_longer_than_it_may_take() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let config = config(&silent.local_addr().unwrap().to_string());
        let mut bucket = Bucket::new(&config, std::sync::Arc::new(|| false)).unwrap();
        bucket.stall = Duration::from_millis(100);
        let name = ObjectName::Blob(kiln_oci::Digest::of(b"x"));
        let names = std::slice::from_ref(&name);
        let said = |error: RemoteError| error.to_string();
        assert_eq!(bucket.get_many(names, 10).map_err(said), Err("no answer for 100ms".to_owned()));
        assert_eq!(bucket.sizes(names).map_err(said), Err("no answer for 100ms".to_owned()));
        assert_eq!(bucket.read(&name, &mut |_| Ok(())).map_err(said), Err("no answer for 100ms".to_owned()));
        let put = bucket.put(&name, &mut &b"x"[..], 1, Existing::Keep);
        assert_eq!(put.map_err(said), Err("no answer for 100ms".to_owned()));
        // Nor is it waited for when nobody waits any more, however long it may take.
        let stopped = Bucket::new(&config, std::sync::Arc::new(|| true)).unwrap();
        assert!(matches!(stopped.sizes(names), Err(RemoteError::Stopped)));
    }

    #[test]
    fn a_server_that_is_not_there_is_an_error_and_not_a_miss() {
        // Nobody listens on a port that was bound and given back.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let config = config(&format!("127.0.0.1:{port}"));
        let bucket = Bucket::new(&config, std::sync::Arc::new(|| false)).unwrap();
        let name = ObjectName::Blob(kiln_oci::Digest::of(b"x"));
        assert!(bucket.path(&name).to_string().starts_with("a/b/kiln-cache-1/blobs/"));
        let error = bucket.sizes(&[name]).unwrap_err();
        assert!(matches!(&error, RemoteError::Server(text) if !text.contains("SECRET")), "{error}");
        let wrong = BucketConfig { options: vec![("regoin".to_owned(), "x".to_owned())], ..config };
        let error = Bucket::new(&wrong, std::sync::Arc::new(|| false)).err().unwrap();
        assert_eq!(error.to_string(), "there is no attribute \"regoin\"");
    }
}
