//! Opening sled where a panic harms nobody, replacing it when it is damaged, rewriting it when it is mostly dead data.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::sled_tables::SledTables;
use super::{IndexOpened, MetaStore, caught};
use crate::error::{IoContext as _, Result, StoreError};

/// The engine's directory within the index.
const ENGINE: &str = "sled";
/// Where a rewritten copy is made.
const FRESH: &str = "sled.fresh";
/// The engine's directory while a rewritten copy takes its place.
const OLD: &str = "sled.old";
/// A file of this name says that the engine failed while it was in use.
pub(super) const BROKEN: &str = "broken";
/// A rewrite is worth it from this many bytes on disk.
const COMPACT_FROM: u64 = 32 << 20;
/// … and when the disk holds this many times the live data.
const COMPACT_FACTOR: u64 = 4;
/// Memory for the engine's page cache, in bytes.
const CACHE: u64 = 32 << 20;

/// Opens the engine in `dir/sled`, creating what is missing. What cannot be opened moves below `aside`.
pub(super) fn open(dir: &Path, aside: &Path, opened: &mut IndexOpened) -> Result<Box<dyn MetaStore>> {
    fs::create_dir_all(dir).during("create", dir)?;
    let engine = dir.join(ENGINE);
    remove_dir(&dir.join(FRESH))?;
    let marker = dir.join(BROKEN);
    let old = dir.join(OLD);
    if old.exists() && !engine.exists() {
        fs::rename(&old, &engine).during("rename", &old)?;
    }
    remove_dir(&old)?;
    let existed = engine.exists();
    let usable = if marker.exists() {
        Err(StoreError::Index("the engine failed when it was last used".into()))
    } else {
        open_in_helper(&engine)
    };
    let tables = match usable {
        Ok(tables) => {
            if !existed {
                opened.rebuild = Some("there was no index".into());
            }
            tables
        }
        Err(error) if error_is_full(&error) => return Err(error),
        Err(error) => {
            opened.rebuild = Some(error.to_string());
            set_aside(dir, aside)?;
            open_in_helper(&engine)?
        }
    };
    let tables = compact_if_worth(dir, &engine, tables, opened)?;
    Ok(Box::new(tables))
}

fn error_is_full(error: &StoreError) -> bool {
    error.is_no_space() || matches!(error, StoreError::Index(text) if text.contains("os error 28"))
}

fn open_in_helper(engine: &Path) -> Result<SledTables> {
    let path = engine.to_owned();
    let work = move || {
        caught("open", || {
            let db = open_engine(&path)?;
            let tables = SledTables::new(db, &path)?;
            // Reading everything once brings damage to light here, not in the middle of a build.
            tables.live_bytes()?;
            Ok(tables)
        })
    };
    let helper = std::thread::Builder::new().name("index-open".into()).spawn(work);
    let helper = helper.map_err(|e| StoreError::Index(format!("start a thread: {e}")))?;
    helper.join().map_err(|_| StoreError::Panicked {
        task: "opening the index",
    })?
}

/// Opens the engine's directory. An engine of this process that was just dropped may hold its file lock for a moment
/// longer (its threads end in the background); nobody else can, because the state directory is locked.
fn open_engine(path: &Path) -> Result<sled::Db> {
    let give_up = Instant::now() + Duration::from_secs(5);
    loop {
        let config = sled::Config::new()
            .path(path)
            .cache_capacity(CACHE)
            .flush_every_ms(None);
        match config.open() {
            Ok(db) => return Ok(db),
            Err(error) if error.to_string().contains("acquire lock") && Instant::now() < give_up => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(StoreError::Index(format!("open: {error}"))),
        }
    }
}

/// Moves the engine and the journal away; they are evidence, not garbage, until the rebuilt index is in use.
fn set_aside(dir: &Path, aside: &Path) -> Result<()> {
    fs::create_dir_all(aside).during("create", aside)?;
    let target = aside.join(format!("index-{}", crate::ids::TreeId::random()));
    fs::rename(dir, &target).during("rename", dir)?;
    fs::create_dir_all(dir).during("create", dir)
}

fn compact_if_worth(dir: &Path, engine: &Path, tables: SledTables, opened: &mut IndexOpened) -> Result<SledTables> {
    let disk = disk_bytes(engine)?;
    if disk < COMPACT_FROM || disk < COMPACT_FACTOR * tables.live_bytes()?.max(1) {
        return Ok(tables);
    }
    let fresh = dir.join(FRESH);
    let copied = open_in_helper(&fresh).and_then(|copy| {
        tables.copy_to(&copy)?;
        copy.sync()
    });
    if let Err(error) = copied {
        tracing::warn!(%error, "could not rewrite the index; the old one stays in use");
        remove_dir(&fresh)?;
        return Ok(tables);
    }
    drop(tables);
    // Both are complete; a crash between the two renames is mended by `open`, which takes the old one back.
    let old: PathBuf = dir.join(OLD);
    fs::rename(engine, &old).during("rename", engine)?;
    fs::rename(&fresh, engine).during("rename", &fresh)?;
    remove_dir(&old)?;
    opened.compacted = true;
    open_in_helper(engine)
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).during("remove", dir),
        _ => Ok(()),
    }
}

fn disk_bytes(dir: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let mut total = 0;
    for entry in fs::read_dir(dir).during("list", dir)? {
        let entry = entry.during("list", dir)?;
        let meta = entry.metadata().during("stat", entry.path())?;
        total += if meta.is_dir() {
            disk_bytes(&entry.path())?
        } else {
            meta.blocks() * 512
        };
    }
    Ok(total)
}
