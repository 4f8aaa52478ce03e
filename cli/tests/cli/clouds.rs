//! Google's and Azure's object stores, in memory: as much of their APIs as is spoken here, and strict about that.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// Whose API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cloud {
    Google,
    Azure,
}

/// What must not be seen anywhere. Azure takes keys in base64 only.
pub(crate) const SECRET: &str = "U0VDUkVUU0VDUkVU";

impl Cloud {
    /// What both flags take for a bucket `cache` of the server at `address`.
    pub(crate) fn place(self, address: SocketAddr, more: &str) -> String {
        match self {
            Self::Google => {
                format!("type=gcs,bucket=cache,base_url=http://{address},bearer_token={SECRET}{more}")
            }
            Self::Azure => format!(
                "type=azblob,account_url=http://{address}/me,container=cache,secret_access_key={SECRET}{more}"
            ),
        }
    }

    /// What stands in front of the names of objects.
    fn root(self) -> &'static str {
        match self {
            Self::Google => "/cache/",
            Self::Azure => "/me/cache/",
        }
    }

    /// The header that asks for an object to be made, not replaced.
    pub(crate) fn only_if_absent(self) -> (&'static str, &'static str) {
        match self {
            Self::Google => ("x-goog-if-generation-match", "0"),
            Self::Azure => ("if-none-match", "*"),
        }
    }
}

/// A request as it came, and how it was answered.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) method: String,
    /// The object's name.
    pub(crate) name: String,
    /// Parameters in their order.
    pub(crate) query: Vec<(String, String)>,
    /// By their names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) length: usize,
    pub(crate) status: u16,
}

impl Asked {
    pub(crate) fn parameter(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// A server with a bucket.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    inside: Arc<Inside>,
}

struct Inside {
    cloud: Cloud,
    objects: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Parts of objects that are not whole, by what tells uploads apart, and then by what tells their parts apart.
    parts: Mutex<BTreeMap<String, BTreeMap<String, Vec<u8>>>>,
    asked: Mutex<Vec<Asked>>,
    hides_records: AtomicBool,
    refuses: AtomicBool,
}

impl Server {
    pub(crate) fn start(cloud: Cloud) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("there are ports");
        let address = listener.local_addr().expect("it is bound");
        let inside = Arc::new(Inside {
            cloud,
            objects: Mutex::default(),
            parts: Mutex::default(),
            asked: Mutex::default(),
            hides_records: AtomicBool::new(false),
            refuses: AtomicBool::new(false),
        });
        let of_thread = inside.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let inside = of_thread.clone();
                thread::spawn(move || inside.serve(client));
            }
        });
        Self { address, inside }
    }

    /// What was asked since the last time.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.inside.asked.lock().expect("nobody panics"))
    }

    pub(crate) fn objects(&self) -> BTreeMap<String, Vec<u8>> {
        self.inside.objects.lock().expect("nobody panics").clone()
    }

    /// Says of no record any more that it is there, as if another machine wrote it in the moment after.
    pub(crate) fn hide_records(&self) {
        self.inside.hides_records.store(true, Ordering::SeqCst);
    }

    /// Lets nobody in any more.
    pub(crate) fn refuse(&self) {
        self.inside.refuses.store(true, Ordering::SeqCst);
    }
}

struct Answer {
    status: u16,
    body: Vec<u8>,
    /// Of what is asked for without its content.
    length: usize,
}

impl From<u16> for Answer {
    fn from(status: u16) -> Self {
        Self { status, body: Vec::new(), length: 0 }
    }
}

impl Inside {
    fn serve(&self, client: TcpStream) {
        let Ok(mut writing) = client.try_clone() else { return };
        let mut reading = BufReader::new(client);
        while let Some((mut asked, body)) = self.read(&mut reading) {
            let answer = self.answer(&asked, body);
            asked.status = answer.status;
            let head = format!(
                "HTTP/1.1 {} Said\r\nContent-Length: {}\r\nETag: \"1\"\r\nLast-Modified: Fri, 01 Jan 2021 00:00:00 GMT\r\n\
                 x-goog-generation: 1\r\n\r\n",
                answer.status,
                answer.length.max(answer.body.len()),
            );
            self.asked.lock().expect("nobody panics").push(asked);
            if writing.write_all(&[head.as_bytes(), &answer.body].concat()).is_err() {
                return;
            }
        }
    }

    /// The next request; `None`: there is none.
    fn read(&self, reading: &mut impl BufRead) -> Option<(Asked, Vec<u8>)> {
        let mut line = String::new();
        let mut next = |reading: &mut dyn BufRead| {
            line.clear();
            reading.read_line(&mut line).ok().filter(|length| *length > 0)?;
            Some(line.trim_end().to_owned())
        };
        let first = next(reading)?;
        let mut headers = BTreeMap::new();
        loop {
            let line = next(reading)?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.insert(name.to_lowercase(), value.trim().to_owned());
        }
        let (method, target) = first.strip_suffix(" HTTP/1.1")?.split_once(' ')?;
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let pair = |text: &str| {
            let (name, value) = text.split_once('=').unwrap_or((text, ""));
            (decoded(name), decoded(value))
        };
        let query = query.split('&').filter(|text| !text.is_empty()).map(pair).collect();
        let path = decoded(path);
        let name =
            path.strip_prefix(self.cloud.root()).map_or_else(|| format!("outside: {path}"), str::to_owned);
        let length = headers.get("content-length").map_or(0, |length| length.parse().expect("a number"));
        assert!(!headers.contains_key("transfer-encoding"), "these stores want to know the length");
        let mut body = vec![0; length];
        reading.read_exact(&mut body).ok()?;
        let method = method.to_owned();
        Some((Asked { method, name, query, headers, length, status: 0 }, body))
    }

    fn is_known(&self, asked: &Asked) -> bool {
        let said = asked.headers.get("authorization").map_or("", String::as_str);
        match self.cloud {
            Cloud::Google => said == format!("Bearer {SECRET}"),
            Cloud::Azure => {
                let has = |name: &str| asked.headers.contains_key(name);
                said.starts_with("SharedKey me:") && has("date") && has("x-ms-version")
            }
        }
    }

    fn answer(&self, asked: &Asked, body: Vec<u8>) -> Answer {
        if self.refuses.load(Ordering::SeqCst) || !self.is_known(asked) {
            return Answer::from(403);
        }
        if asked.name.starts_with("outside") {
            return Answer::from(400);
        }
        match asked.method.as_str() {
            "GET" | "HEAD" => self.get(asked),
            "PUT" | "POST" => self.put(asked, body),
            "DELETE" if asked.parameter("uploadId").is_some() => Answer::from(204),
            _ => Answer::from(405),
        }
    }

    fn get(&self, asked: &Asked) -> Answer {
        let is_hidden = self.hides_records.load(Ordering::SeqCst) && asked.name.contains("/records/");
        let objects = self.objects.lock().expect("nobody panics");
        match objects.get(&asked.name).filter(|_| !is_hidden) {
            None => Answer::from(404),
            Some(object) if asked.method == "HEAD" => {
                Answer { status: 200, body: Vec::new(), length: object.len() }
            }
            Some(object) => Answer { status: 200, body: object.clone(), length: object.len() },
        }
    }

    fn put(&self, asked: &Asked, body: Vec<u8>) -> Answer {
        let upload = asked.parameter("uploadId").map(str::to_owned);
        let part = asked.parameter("partNumber");
        match (self.cloud, asked.method.as_str(), asked.parameter("comp")) {
            (Cloud::Google, "POST", None) if asked.parameter("uploads").is_some() => {
                let text =
                    "<InitiateMultipartUploadResult><UploadId>one</UploadId></InitiateMultipartUploadResult>";
                Answer { status: 200, body: text.into(), length: 0 }
            }
            (Cloud::Google, "PUT", None) if upload.is_some() => {
                let number: usize = part.and_then(|part| part.parse().ok()).expect("parts have numbers");
                self.keep_part(&asked.name, format!("{number:05}"), body);
                Answer::from(200)
            }
            (Cloud::Google, "POST", None) if upload.is_some() => {
                let text = String::from_utf8(body).expect("XML");
                let numbers = between(&text, "PartNumber").iter().map(|part| format!("{part:0>5}")).collect();
                let answer = self.join(&asked.name, numbers);
                let text =
                    "<CompleteMultipartUploadResult><ETag>\"1\"</ETag></CompleteMultipartUploadResult>";
                if answer.status == 201 {
                    Answer { status: 200, body: text.into(), length: 0 }
                } else {
                    answer
                }
            }
            (Cloud::Azure, "PUT", Some("block")) => {
                let id = asked.parameter("blockid").expect("blocks have names").to_owned();
                self.keep_part(&asked.name, id, body);
                Answer::from(201)
            }
            (Cloud::Azure, "PUT", Some("blocklist")) => {
                self.join(&asked.name, between(&String::from_utf8(body).expect("XML"), "Uncommitted"))
            }
            (cloud, "PUT", None) => {
                let is_blob = asked.headers.get("x-ms-blob-type").is_some_and(|kind| kind == "BlockBlob");
                if cloud == Cloud::Azure && !is_blob {
                    return Answer::from(400);
                }
                let (name, value) = cloud.only_if_absent();
                let is_careful = asked.headers.get(name).is_some_and(|said| said == value);
                let mut objects = self.objects.lock().expect("nobody panics");
                if is_careful && objects.contains_key(&asked.name) {
                    return Answer::from(if cloud == Cloud::Google { 412 } else { 409 });
                }
                objects.insert(asked.name.clone(), body);
                Answer::from(if cloud == Cloud::Google { 200 } else { 201 })
            }
            _ => Answer::from(400),
        }
    }

    fn keep_part(&self, object: &str, part: String, body: Vec<u8>) {
        let mut parts = self.parts.lock().expect("nobody panics");
        parts.entry(object.to_owned()).or_default().insert(part, body);
    }

    /// An object becomes whole.
    fn join(&self, object: &str, names: Vec<String>) -> Answer {
        let mut parts = self.parts.lock().expect("nobody panics").remove(object).unwrap_or_default();
        let joined: Option<Vec<Vec<u8>>> = names.iter().map(|name| parts.remove(name)).collect();
        match joined {
            Some(joined) if !joined.is_empty() => {
                self.objects.lock().expect("nobody panics").insert(object.to_owned(), joined.concat());
                Answer::from(201)
            }
            _ => Answer::from(400),
        }
    }
}

/// The texts of the elements of a name.
fn between(xml: &str, element: &str) -> Vec<String> {
    let (open, close) = (format!("<{element}>"), format!("</{element}>"));
    xml.split(&open).skip(1).filter_map(|rest| Some(rest.split_once(&close)?.0.to_owned())).collect()
}

/// Without `%XX` and `+`.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits =
                    [rest.next(), rest.next()].map(|digit| digit.expect("two digits stand there") as char);
                u8::from_str_radix(&String::from_iter(digits), 16).expect("hexadecimal")
            }
            b'+' => b' ',
            other => other,
        });
    }
    String::from_utf8(bytes).expect("names are UTF-8")
}
