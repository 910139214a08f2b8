//! A small file server on the loopback interface, for ADD from an address and for git over plain HTTP.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Serves the files of a directory. The thread ends with the test program.
#[derive(Debug)]
pub struct HttpServer {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl HttpServer {
    /// Serves `dir`.
    pub fn start(dir: &Path) -> HttpServer {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (dir, seen) = (dir.to_owned(), Arc::clone(&requests));
        std::thread::Builder::new()
            .name("http-server".into())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    // A client that goes away in the middle is its own business.
                    let _ = serve(&stream, &dir, &seen);
                }
            })
            .expect("a thread");
        HttpServer { address, requests }
    }

    /// `http://127.0.0.1:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The request lines so far, `GET /path`.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("the list").clone()
    }
}

fn serve(stream: &TcpStream, dir: &Path, seen: &Mutex<Vec<String>>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut reader = BufReader::new(stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut known = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("if-none-match")
        {
            known = value.trim().to_owned();
        }
    }
    let mut words = request.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    seen.lock().expect("the list").push(format!("{method} {target}"));
    let path = target.split('?').next().unwrap_or_default().trim_start_matches('/');
    let clean = Path::new(path)
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    let file: PathBuf = dir.join(path);
    let mut out = stream;
    match std::fs::read(&file) {
        Ok(bytes) if clean => {
            let tag = format!("\"{:x}-{}\"", crc(&bytes), bytes.len());
            if known.split(", ").any(|known| known == tag) {
                return write!(
                    out,
                    "HTTP/1.1 304 Not Modified\r\nETag: {tag}\r\nConnection: close\r\n\r\n"
                );
            }
            write!(
                out,
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nETag: {tag}\r\nLast-Modified: Tue, 14 Nov 2023 22:13:20 GMT\r\nConnection: close\r\n\r\n",
                bytes.len()
            )?;
            if method == "HEAD" {
                Ok(())
            } else {
                out.write_all(&bytes)
            }
        }
        _ => write!(
            out,
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        ),
    }
}

/// Enough of a checksum to notice that a file changed.
fn crc(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
