//! Times for trees: unpacking and packing 300 MB, copying 20,000 files, content digests, sealing. Prints one line each.
//!
//! `cargo bench -p kiln-store --bench trees`

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use std::time::Instant;

use kiln_store::checksum::{Origin, Selector, checksum};
use kiln_store::layer::write::{Header, TarWriter};
use kiln_store::layer::{ApplyOptions, DiffOptions, apply, pack};
use kiln_store::{
    Algorithm, CopySpec, FileWriter, Native, OverlayFs, OverlayXattr, Snapshotter, Stop, TreeBuilder, View,
};

fn timed<T>(what: &str, bytes: u64, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let value = work();
    let s = start.elapsed().as_secs_f64();
    let rate = if bytes > 0 {
        format!("{:8.1} MB/s", bytes as f64 / 1e6 / s)
    } else {
        String::new()
    };
    println!("{what:44} {:8.1} ms {rate}", s * 1e3);
    value
}

/// Text-like bytes that compress about as well as programs do.
fn fill(seed: u32, len: usize) -> Vec<u8> {
    let mut x = seed | 1;
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if x >> 30 == 0 {
            out.extend_from_slice(&x.to_le_bytes());
        } else {
            out.extend_from_slice(b"a line of text ");
            out.push((x >> 24) as u8 & 31);
        }
    }
    out.truncate(len);
    out
}

fn archive(files: usize, size: usize) -> Vec<u8> {
    let mut w = TarWriter::new(Vec::new());
    for i in 0..files {
        if i % 100 == 0 {
            let name = format!("d{}/", i / 100);
            w.header(&Header {
                name: name.as_bytes(),
                typeflag: b'5',
                mode: 0o755,
                ..Header::default()
            })
            .unwrap();
        }
        let name = format!("d{}/f{i}", i / 100);
        let h = Header {
            name: name.as_bytes(),
            typeflag: b'0',
            mode: 0o644,
            size: size as u64,
            ..Header::default()
        };
        w.header(&h).unwrap();
        w.data(&fill(i as u32, size)).unwrap();
    }
    w.finish().unwrap()
}

fn main() {
    let tmp = tempfile::tempdir_in(std::env::var_os("BENCH_DIR").unwrap_or(".".into())).unwrap();
    let mut next = 0;
    let mut dir = || {
        next += 1;
        let d = tmp.path().join(next.to_string());
        std::fs::create_dir(&d).unwrap();
        d
    };
    let mut builder = || TreeBuilder::create(dir(), OverlayXattr::Trusted).unwrap();
    let stop = Stop::new();
    let big = archive(3000, 100_000);
    let mb = big.len() as u64;
    let options = ApplyOptions::default();
    let tree = timed("apply 300 MB, 3,000 files, not packed", mb, || {
        apply(&big[..], builder(), &options, &stop).unwrap()
    })
    .tree;
    for kind in [Algorithm::Uncompressed, Algorithm::Gzip, Algorithm::Zstd] {
        let mut out = Vec::with_capacity(mb as usize);
        let none = View::scratch();
        timed(&format!("pack 300 MB, {kind}"), mb, || {
            pack(&none, &tree, kind.into(), DiffOptions::default(), &mut out, &stop).unwrap()
        });
        if kind != Algorithm::Uncompressed {
            timed(&format!("apply 300 MB, {kind}"), mb, || {
                apply(&out[..], builder(), &options, &stop).unwrap()
            });
        }
    }
    let many = archive(20_000, 2_000);
    let src = timed("apply 20,000 files of 2 kB", many.len() as u64, || {
        apply(&many[..], builder(), &options, &stop).unwrap()
    });
    let src = View::new(vec![src.tree]).unwrap();
    let base = View::new(vec![tree]).unwrap();
    let spec = CopySpec {
        src: b"/".to_vec(),
        dest: b"/app/".to_vec(),
        dir_copy_contents: true,
        create_dest_path: true,
        ..CopySpec::default()
    };
    let copied = timed("copy 20,000 files", 0, || {
        let mut w = FileWriter::new(&base, builder()).unwrap();
        w.copy(&spec, &src, &stop).unwrap();
        w.finish(&stop).unwrap()
    });
    timed("content digest of 20,000 files, first", 0, || {
        checksum(&src, &Selector::path("/", true), Origin::Snapshot, &stop).unwrap()
    });
    timed("content digest of 20,000 files, again", 0, || {
        checksum(&src, &Selector::path("/", true), Origin::Snapshot, &stop).unwrap()
    });
    let path = copied.dir().to_owned();
    timed("open and decode a manifest of 20,000", 0, || {
        kiln_store::Tree::open(&path).manifest().unwrap()
    });
    let stack = View::new(vec![base.trees()[0].clone(), copied]).unwrap();
    timed("walk a view of 23,000 entries", 0, || {
        stack.walk(&stack.root().unwrap()).count()
    });
    timed("overlay: prepare and seal, nothing done", 0, || {
        OverlayFs
            .prepare(&stack, builder(), &stop)
            .unwrap()
            .seal(&stop)
            .unwrap()
    });
    let active = timed("native: prepare 23,000 files, 340 MB", 0, || {
        Native.prepare(&stack, builder(), &stop).unwrap()
    });
    timed("native: seal, nothing done", 0, || active.seal(&stop).unwrap());
}
