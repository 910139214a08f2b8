//! [`Exporter`]: one requested export, from attributes to response.
//!
//! An export has two phases. [`Exporter::export`] makes the result and hands it to the client; [`Exported::finalize`]
//! pushes, after all exporters of a build are through their first phase (semantics.md §7).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_oci::{Descriptor, DiffId, ImageConfig, ImageRef, Timestamp, go_json};
use kiln_registry::Client;
use kiln_session::{Session, SessionError};
use kiln_store::{BlobHandle, ContentStore, RealizeCtx, View};

use crate::annotations::Annotations;
use crate::archive::{self, status_name};
use crate::attestation::{self, Claim};
use crate::error::ExportError;
use crate::files::{self, Layout, PlatformFiles};
use crate::image::{Form, Image, PlatformImage, assemble};
use crate::layers::{self, LayerBlobs, PackedLayer, Rewrite};
use crate::options::{ExporterKind, FilesOptions, ImageOptions};
use crate::progress::{ExportProgress, Status};
use crate::registry;
use crate::result::{Attestation, AttestationContent, BuildResult, Refs, ResultPlatform, key};
use crate::{blocking, local, tar};

/// Everything an export needs beside the result.
pub struct ExportRequest {
    /// Index of the exporter in the client's request.
    pub index: usize,
    /// The client that gets files; `None` if it is gone or there is none.
    pub session: Option<Session>,
    /// Registries, with the client's credentials.
    pub registry: Client,
    /// Where manifests and configs are kept.
    pub content: ContentStore,
    /// Providers of lazy layers and who watches their download.
    pub realize: RealizeCtx,
    /// Where statuses go.
    pub progress: Arc<dyn ExportProgress>,
}

enum Options {
    Image(Box<ImageOptions>),
    Files(FilesOptions),
}

/// One requested export.
pub struct Exporter {
    kind: ExporterKind,
    options: Options,
}

/// What came of an export's first phase.
pub struct Exported {
    /// Entries of the response to the client.
    pub response: BTreeMap<String, String>,
    /// The image's root, for the build's history.
    pub descriptor: Option<Descriptor>,
    /// Keep the documents in the content store.
    pub leases: Vec<BlobHandle>,
    push: Option<PendingPush>,
}

struct PendingPush {
    image: Image,
    targets: Vec<ImageRef>,
    layers: Arc<LayerBlobs>,
    client: Client,
    progress: Arc<dyn ExportProgress>,
}

impl Exporter {
    /// Parses a request.
    ///
    /// # Errors
    /// [`ExportError::Invalid`] for unknown types and bad attributes.
    pub fn new(kind: &str, attrs: &BTreeMap<String, String>) -> Result<Self, ExportError> {
        let kind = ExporterKind::parse(kind)?;
        let options = match kind {
            ExporterKind::Local | ExporterKind::Tar => Options::Files(FilesOptions::parse(kind, attrs)?),
            _ => Options::Image(Box::new(ImageOptions::parse(kind, attrs)?)),
        };
        Ok(Self { kind, options })
    }

    /// What kind it is.
    pub fn kind(&self) -> ExporterKind {
        self.kind
    }

    /// The name of its vertex.
    pub fn vertex_name(&self) -> &'static str {
        self.kind.vertex_name()
    }

    /// Makes the result and hands it to the client; pushing is left to [`Exported::finalize`]. Cancel by dropping.
    ///
    /// # Errors
    /// See [`ExportError`].
    pub async fn export(&self, result: &BuildResult, request: &ExportRequest) -> Result<Exported, ExportError> {
        match &self.options {
            Options::Image(options) => self.export_image(options, result, request).await,
            Options::Files(options) => {
                self.export_files(options, result, request).await?;
                Ok(Exported {
                    response: BTreeMap::new(),
                    descriptor: None,
                    leases: Vec::new(),
                    push: None,
                })
            }
        }
    }

    async fn export_image(
        &self,
        options: &ImageOptions,
        result: &BuildResult,
        request: &ExportRequest,
    ) -> Result<Exported, ExportError> {
        if self.kind == ExporterKind::Docker && result.is_map() {
            let text = "docker exporter does not currently support exporting manifest lists";
            return Err(ExportError::Invalid(text.to_owned()));
        }
        // Attributes that nobody knows count as metadata of the result, for this exporter alone.
        let mut result = result.clone();
        for (key, value) in &options.metadata {
            result.metadata.insert(key.clone(), value.clone().into_bytes());
        }
        let mut annotations = Annotations::default();
        annotations.merge(&options.annotations);
        for (key, value) in &result.metadata {
            annotations.add(key, &String::from_utf8_lossy(value))?;
        }
        let platforms = result.platforms()?;
        let index = result.is_map() || must_attach(options, &result, &platforms);
        let mut name = options.name.clone();
        if name == "*" {
            name = result
                .metadata
                .get(key::NAME)
                .map(|n| String::from_utf8_lossy(n).into_owned())
                .unwrap_or_default();
        }
        let names = parse_names(&name)?;

        let (images, layers) = self
            .platform_images(options, &result, &platforms, index, request)
            .await?;
        let form = Form {
            oci: options.oci_types,
            artifacts: options.artifacts(),
            keep_foreign: options.prefer_nondist,
            index,
            annotations,
            names: names.clone(),
        };
        let image = assemble(&images, &form)?;
        let mut leases = keep_documents(&image, request).await?;

        let mut root = image.root.clone();
        let mut response = BTreeMap::new();
        response.insert("containerimage.digest".to_owned(), root.digest.to_string());
        if let Some(config) = image.config {
            response.insert("containerimage.config.digest".to_owned(), config.to_string());
        }
        let mut push = None;
        if self.kind == ExporterKind::Image {
            let targets = self.push_targets(options, &name, &image)?;
            if let Some(given) = with_dangling(options, &name, &image) {
                response.insert("image.name".to_owned(), given);
            }
            if !targets.is_empty() {
                let client = if options.insecure {
                    request.registry.clone().insecure()
                } else {
                    request.registry.clone()
                };
                let layers = Arc::new(LayerBlobs::new(&layers, &request.realize));
                push = Some(PendingPush {
                    image: image.clone(),
                    targets,
                    layers,
                    client,
                    progress: request.progress.clone(),
                });
            }
        } else {
            if !names.is_empty() {
                let full: Vec<String> = names.iter().map(ToString::to_string).collect();
                response.insert("image.name".to_owned(), full.join(","));
            }
            let created = match options.epoch {
                Some(Some(epoch)) => epoch,
                Some(None) => Timestamp::now(),
                None => result.epoch("")?.unwrap_or_else(Timestamp::now),
            };
            root.annotations
                .entry("org.opencontainers.image.created".to_owned())
                .or_insert_with(|| Timestamp::new(created.seconds(), 0).to_string());
        }
        let descriptor =
            go_json::to_vec(&root).map_err(ExportError::json("failed to marshal the image's descriptor"))?;
        response.insert("containerimage.descriptor".to_owned(), STANDARD.encode(descriptor));
        if self.kind != ExporterKind::Image {
            leases.extend(layers::fetch_all(&layers, &request.realize).await?);
            self.hand_over(options, &image, &root, names, &layers, &response, request)
                .await?;
        }
        Ok(Exported {
            response,
            descriptor: Some(root),
            leases,
            push,
        })
    }

    /// Where an image is pushed to.
    fn push_targets(&self, options: &ImageOptions, name: &str, image: &Image) -> Result<Vec<ImageRef>, ExportError> {
        if !options.push {
            return Ok(Vec::new());
        }
        let given = with_dangling(options, name, image).unwrap_or_default();
        given
            .split(',')
            .filter(|n| !n.is_empty())
            .map(|n| registry::target(n, options.push_by_digest))
            .collect()
    }

    /// Packs the layers of all platforms and reads their attestations.
    async fn platform_images(
        &self,
        options: &ImageOptions,
        result: &BuildResult,
        platforms: &[ResultPlatform],
        index: bool,
        request: &ExportRequest,
    ) -> Result<(Vec<PlatformImage>, Vec<PackedLayer>), ExportError> {
        let mut epochs = Vec::new();
        for p in platforms {
            epochs.push(match options.epoch {
                Some(epoch) => epoch,
                None => result.epoch(&p.id)?,
            });
        }
        let packed = {
            let _status = Status::begin(&request.progress, "exporting layers");
            let each = platforms.iter().zip(&epochs).map(|(p, epoch)| async move {
                let rewrite = match (options.rewrite_timestamp, epoch) {
                    (true, Some(epoch)) => Some(Rewrite {
                        epoch: *epoch,
                        base: base_diff_ids(result.meta(key::BASE_CONFIG, &p.id))?,
                    }),
                    (true, None) => {
                        tracing::warn!("rewrite-timestamp is specified, but no source-date-epoch was found");
                        None
                    }
                    _ => None,
                };
                layers::pack(result.layer(&p.id), options.packing, rewrite, &request.realize).await
            });
            futures::future::try_join_all(each).await?
        };
        let mut images = Vec::new();
        let mut all = Vec::new();
        for ((p, epoch), packed) in platforms.iter().zip(epochs).zip(packed) {
            let claims = match result.attestations.get(&p.id) {
                Some(attestations) if index => load_claims(attestations.clone(), &request.realize).await?,
                _ => Vec::new(),
            };
            images.push(PlatformImage {
                id: p.id.clone(),
                platform: p.platform.clone(),
                layers: packed.iter().map(|l| l.image.clone()).collect(),
                config: result.meta(key::CONFIG, &p.id).map(<[u8]>::to_vec),
                base_config: result.meta(key::BASE_CONFIG, &p.id).map(<[u8]>::to_vec),
                epoch,
                inline_cache: result.inline_cache.get(&p.id).cloned(),
                claims,
            });
            all.extend(packed);
        }
        Ok((images, all))
    }

    /// Sends an image to the client, as tar or blob by blob.
    #[allow(clippy::too_many_arguments)]
    async fn hand_over(
        &self,
        options: &ImageOptions,
        image: &Image,
        root: &Descriptor,
        names: Vec<ImageRef>,
        layers: &[PackedLayer],
        response: &BTreeMap<String, String>,
        request: &ExportRequest,
    ) -> Result<(), ExportError> {
        let session = session(request)?;
        if !options.tar {
            let source = LayerBlobs::new(layers, &request.realize);
            return archive::send_blobs(image, &session.content("export"), &source).await;
        }
        let _status = Status::begin(&request.progress, "sending tarball");
        let mut writer = session.send_file(request.index, response)?;
        let (image, root, docker) = (image.clone(), root.clone(), self.kind == ExporterKind::Docker);
        let mut open = layers::opener(layers);
        let written = blocking(move |_| {
            let outcome = archive::write(&image, &root, &names, docker, &mut open, &mut writer);
            Ok((writer, outcome))
        });
        let (writer, outcome) = written.await?;
        finish(writer, outcome).await
    }

    async fn export_files(
        &self,
        options: &FilesOptions,
        result: &BuildResult,
        request: &ExportRequest,
    ) -> Result<(), ExportError> {
        let session = session(request)?;
        let map = result.is_map();
        let platforms = result.platforms()?;
        let mut files = Vec::new();
        for p in &platforms {
            let epoch = match options.epoch {
                Some(epoch) => epoch,
                None => result.epoch(&p.id)?,
            };
            let own = result.attestations.get(&p.id).map(Vec::as_slice).unwrap_or_default();
            let own: Vec<Attestation> = own.iter().filter(|a| !a.is_inline_only()).cloned().collect();
            files.push(PlatformFiles {
                id: p.id.clone(),
                view: layers::view(result.layer(&p.id), &request.realize).await?,
                epoch,
                claims: load_claims(own, &request.realize).await?,
            });
        }
        let split = options.platform_split.unwrap_or(map);
        let layout = Layout {
            // A tar always separates platforms; there the option only names attestation files.
            split: if self.kind == ExporterKind::Tar { map } else { split },
            platform_in_names: map && !split,
            attestation_prefix: options.attestation_prefix.clone(),
            now: Timestamp::new(Timestamp::now().seconds(), 0),
        };
        if self.kind == ExporterKind::Tar {
            let _status = Status::begin(&request.progress, "sending tarball");
            let mut writer = session.send_file(request.index, &BTreeMap::new())?;
            let written = blocking(move |stop| {
                let listing = files::list(&files, &layout, stop)?;
                let outcome = tar::write(&listing, &mut writer, stop);
                Ok((writer, outcome))
            });
            let (writer, outcome) = written.await?;
            return finish(writer, outcome).await;
        }
        if options.delete {
            let listing = blocking(move |stop| files::list(&files, &layout, stop)).await?;
            let id = "copying files".to_owned();
            return local::send(session, request.index, listing, true, id, &request.progress).await;
        }
        let listings = blocking(move |stop| {
            if !layout.split && files.len() > 1 {
                // Only for the check that no path is there twice.
                files::list(&files, &layout, stop)?;
            }
            let one = |f: &PlatformFiles| Ok((f.id.clone(), files::list(std::slice::from_ref(f), &layout, stop)?));
            files.iter().map(one).collect::<Result<Vec<_>, ExportError>>()
        });
        let sends = listings.await?.into_iter().map(|(id, listing)| {
            let label = if split {
                format!("copying files {id}")
            } else {
                "copying files".to_owned()
            };
            local::send(session, request.index, listing, false, label, &request.progress)
        });
        futures::future::try_join_all(sends).await.map(|_| ())
    }
}

impl Exported {
    /// Whether there is a second phase.
    pub fn is_pending(&self) -> bool {
        self.push.is_some()
    }

    /// Pushes, name after name.
    ///
    /// # Errors
    /// [`ExportError::Push`].
    pub async fn finalize(&self) -> Result<(), ExportError> {
        let Some(p) = &self.push else { return Ok(()) };
        for target in &p.targets {
            let places = |blob: &Descriptor| p.layers.places(blob.digest);
            registry::push(&p.image, target, &p.client, &*p.layers, &places, &p.progress).await?;
            let (layers, repository) = (p.layers.clone(), target.name());
            blocking(move |_| {
                layers.remember(&repository);
                Ok(())
            })
            .await?;
        }
        Ok(())
    }
}

fn session(request: &ExportRequest) -> Result<&Session, ExportError> {
    request
        .session
        .as_ref()
        .ok_or_else(|| ExportError::Invalid("no session to export to".to_owned()))
}

/// Ends a transfer. If the client has the result already, that its stream broke is no failure.
async fn finish(writer: kiln_session::FileWriter, outcome: Result<(), ExportError>) -> Result<(), ExportError> {
    match outcome {
        Ok(()) => {
            writer.finish().await?;
            Ok(())
        }
        Err(error) => match writer.finish().await {
            Ok(kiln_session::FileSent::AlreadyThere) => Ok(()),
            // What the client said explains the broken stream best.
            Err(cause @ SessionError::Remote { .. }) if matches!(error, ExportError::Io { .. }) => Err(cause.into()),
            _ => Err(error),
        },
    }
}

/// Whether a single result becomes an index for the sake of its attestations.
fn must_attach(options: &ImageOptions, result: &BuildResult, platforms: &[ResultPlatform]) -> bool {
    platforms
        .iter()
        .filter_map(|p| result.attestations.get(&p.id))
        .flatten()
        .any(|a| options.inline_attestations || !a.is_inline_only())
}

fn parse_names(name: &str) -> Result<Vec<ImageRef>, ExportError> {
    name.split(',')
        .filter(|n| !n.is_empty())
        .map(|n| {
            let parsed = ImageRef::parse(n).map_err(|source| ExportError::Name {
                name: n.to_owned(),
                source,
            })?;
            Ok(parsed.or_latest())
        })
        .collect()
}

/// The names of an image as the client gave them, with the one for results without a name. `None` if there are none.
fn with_dangling(options: &ImageOptions, name: &str, image: &Image) -> Option<String> {
    let mut names: Vec<String> = Vec::new();
    if !name.is_empty() {
        names.push(name.to_owned());
    }
    if !options.dangling_prefix.is_empty() && (!options.dangling_empty_only || name.is_empty()) {
        names.push(format!("{}@{}", options.dangling_prefix, image.root.digest));
    }
    (!names.is_empty()).then(|| names.join(","))
}

fn base_diff_ids(config: Option<&[u8]>) -> Result<Vec<DiffId>, ExportError> {
    match config {
        Some(bytes) if !bytes.is_empty() => Ok(ImageConfig::parse(bytes)?.diff_ids()?),
        _ => Ok(Vec::new()),
    }
}

/// Reads attestations, with the files of those that are in layers.
async fn load_claims(attestations: Vec<Attestation>, cx: &RealizeCtx) -> Result<Vec<Claim>, ExportError> {
    let mut views: HashMap<usize, View> = HashMap::new();
    for (i, a) in attestations.iter().enumerate() {
        if let AttestationContent::Layer(layer) = &a.content {
            views.insert(i, layers::view(Some(layer), cx).await?);
        }
    }
    blocking(move |_| {
        attestation::load(&attestations, &|wanted| {
            let at = attestations.iter().position(|a| std::ptr::eq(a, wanted));
            Ok(at.and_then(|i| views.get(&i).cloned()).unwrap_or_else(View::scratch))
        })
    })
    .await
}

/// Stores manifests and configs, and says so.
async fn keep_documents(image: &Image, request: &ExportRequest) -> Result<Vec<BlobHandle>, ExportError> {
    let (documents, content, progress) = (
        image.documents.clone(),
        request.content.clone(),
        request.progress.clone(),
    );
    blocking(move |_| {
        let mut leases = Vec::new();
        for document in &documents {
            let _status = status_name(document).map(|name| Status::begin(&progress, name));
            leases.push(content.put(&document.descriptor.media_type, &document.bytes)?);
        }
        Ok(leases)
    })
    .await
}

/// The layers that results refer to, for callers that keep them alive.
impl BuildResult {
    /// All layers of the result.
    pub fn all_layers(&self) -> Vec<kiln_store::LayerRef> {
        match &self.refs {
            Refs::Single(layer) => layer.iter().cloned().collect(),
            Refs::ByPlatform(map) => map.values().flatten().cloned().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The daemon exports from tasks.
    #[test]
    fn exports_may_move_between_threads() {
        fn export<'a>(e: &'a Exporter, b: &'a BuildResult, r: &'a ExportRequest) -> impl Future + Send + 'a {
            e.export(b, r)
        }
        fn finalize(e: &Exported) -> impl Future + Send + '_ {
            e.finalize()
        }
        let _ = (export, finalize);
    }
}
