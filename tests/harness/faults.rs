//! A registry on a bad day: a proxy in front of a real one that refuses, cuts connections or says nothing, as a rule decides.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It reaches the registry.
    None,
    /// It is answered with a status, and `Retry-After: 0`.
    Status(u16),
    /// The answer ends after so many bytes, its head included.
    Cut(u64),
}

/// The proxy. Its thread ends with the test program.
#[derive(Debug)]
pub struct Faults {
    host: String,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Faults {
    /// A proxy in front of the registry at `upstream` (`127.0.0.1:port`). `rule` sees `METHOD /path` with the query, and
    /// how often a request with that method and path has come before: in queries registries keep the state of uploads,
    /// which is another one each time.
    pub fn before(upstream: &str, rule: impl Fn(&str, usize) -> Fault + Send + Sync + 'static) -> Faults {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let host = listener.local_addr().expect("an address").to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (rule, list, upstream) = (Arc::new(rule), Arc::clone(&seen), upstream.to_owned());
        std::thread::Builder::new()
            .name("faults".into())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (rule, list, upstream) = (Arc::clone(&rule), Arc::clone(&list), upstream.clone());
                    // One thread for each connection; either end going away is an end of it.
                    std::thread::spawn(move || {
                        let _ = pass(stream, &upstream, &list, &*rule);
                    });
                }
            })
            .expect("a thread");
        Faults { host, seen }
    }

    /// `127.0.0.1:port`, the registry's name as clients shall use it.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<String> {
        self.seen.lock().expect("the list").clone()
    }
}

/// A request without its query.
fn path_of(request: &str) -> &str {
    request.split_once('?').map_or(request, |(path, _)| path)
}

fn pass(
    client: TcpStream,
    upstream: &str,
    seen: &Mutex<Vec<String>>,
    rule: &dyn Fn(&str, usize) -> Fault,
) -> std::io::Result<()> {
    client.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut reader = BufReader::new(client.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut head = first.clone();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if !line.to_ascii_lowercase().starts_with("connection:") {
            head.push_str(&line);
        }
    }
    // One request for each connection keeps the rule simple.
    head.push_str("Connection: close\r\n\r\n");
    let request = first.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    let before = {
        let mut seen = seen.lock().expect("the list");
        let before = seen.iter().filter(|other| path_of(other) == path_of(&request)).count();
        seen.push(request.clone());
        before
    };
    let limit = match rule(&request, before) {
        Fault::Status(status) => {
            let text =
                format!("HTTP/1.1 {status} Fault\r\nRetry-After: 0\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            return (&client).write_all(text.as_bytes());
        }
        Fault::Cut(bytes) => bytes,
        Fault::None => u64::MAX,
    };
    let mut server = TcpStream::connect(upstream)?;
    server.write_all(head.as_bytes())?;
    let mut body = server.try_clone()?;
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut reader, &mut body);
    });
    let _ = std::io::copy(&mut server.take(limit), &mut &client);
    client.shutdown(Shutdown::Both)
}
