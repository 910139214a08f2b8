//! Named contexts: what the client puts in place of a stage or an image (`--build-context`).

use kiln_llb::State;
use kiln_llb::state::{Constraints, Late};
use kiln_oci::{ImageRef, Platform};

use super::client::BuildClient;
use super::source::{self, CONTEXT_FILE, Local};
use crate::bridge::{Bridge, BridgeErrorKind, OciStore, ResolveImageOptions};
use crate::error::{DockerfileError, Located};
use crate::git_ref::{self, Detected};
use crate::gotext::quote;
use crate::image::Image;
use crate::options::{BuildOptions, ResolveMode};

/// How often a source policy may turn one context into another.
const MAX_REDIRECTS: usize = 10;

/// A named context that is not loaded yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedContext {
    input: String,
    name: String,
    /// The name with the platform it was given for.
    full_name: String,
    shared_key: String,
    platform: Option<Platform>,
}

/// A directory of the client of which only what is used will be transferred: its source is made when all uses are known.
#[derive(Clone, Debug)]
pub(crate) struct PendingLocal {
    late: Late,
    name: String,
    full_name: String,
    session: String,
    shared_key: String,
    exclude: Vec<String>,
}

impl PendingLocal {
    /// Decides on the paths to transfer; none means all.
    pub(crate) fn settle(&self, follow: &[String]) {
        let shared_key = format!("context:{}-{}", self.full_name, self.shared_key);
        let local = Local {
            name: &self.name,
            session: &self.session,
            follow,
            exclude: &self.exclude,
            shared_key: &shared_key,
            no_diff: false,
        };
        self.late.set(&local.state(Constraints::named(format!(
            "[context {}] load from client",
            self.full_name
        ))));
    }
}

/// A context after loading.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    /// Its files.
    pub state: State,
    /// Its configuration, if it is an image.
    pub image: Option<Image>,
    /// Set if its source is still open.
    pub pending: Option<PendingLocal>,
}

impl From<State> for Loaded {
    fn from(state: State) -> Self {
        Self {
            state,
            ..Self::default()
        }
    }
}

impl NamedContext {
    /// Looks up `name`, an image reference or stage name, first with platform, then without.
    pub(super) fn find(
        options: &BuildOptions,
        name: &str,
        platform: Option<&Platform>,
    ) -> Result<Option<Self>, DockerfileError> {
        let reference =
            ImageRef::parse(name).map_err(|e| DockerfileError::new(format!("invalid context name {name}: {e}")))?;
        let familiar = reference.familiar();
        let name = familiar.strip_suffix(":latest").unwrap_or(&familiar);
        let id = platform.map_or_else(|| Platform::host().id(), Platform::id);
        for full_name in [format!("{name}::{id}"), name.to_owned()] {
            if let Some(input) = options.attr(&format!("context:{full_name}")) {
                let shared_key = options
                    .attr(&format!("sharedkey:localdir:{full_name}"))
                    .unwrap_or_default();
                return Ok(Some(Self {
                    input: input.to_owned(),
                    name: name.to_owned(),
                    full_name,
                    shared_key: shared_key.to_owned(),
                    platform: platform.cloned(),
                }));
            }
        }
        Ok(None)
    }

    /// Loads it.
    pub(crate) async fn load<B: Bridge>(&self, client: &BuildClient<'_, B>) -> Result<Loaded, DockerfileError> {
        let mut input = self.input.clone();
        for _ in 0..=MAX_REDIRECTS {
            match self.load_from(client, &input).await? {
                Ok(loaded) => return Ok(loaded),
                Err(redirected) => input = redirected,
            }
        }
        Err(DockerfileError::new(format!(
            "context recursion limit exceeded; this may indicate a cycle in the provided source policies: {input}"
        )))
    }

    /// Loads `input`, or returns what a source policy wants to be loaded instead.
    async fn load_from<B: Bridge>(
        &self,
        client: &BuildClient<'_, B>,
        input: &str,
    ) -> Result<Result<Loaded, String>, DockerfileError> {
        let Some((scheme, rest)) = input.split_once(':') else {
            let message = format!("invalid context specifier {input} for {}", self.full_name);
            return Err(DockerfileError::new(message));
        };
        let scheme = if scheme.starts_with("git@") { "git" } else { scheme };
        Ok(Ok(match scheme {
            "docker-image" => return self.load_image(client, rest.strip_prefix("//").unwrap_or(rest)).await,
            "git" | "http" | "https" => self.load_address(input, scheme)?,
            "oci-layout" => {
                self.load_layout(client, rest.strip_prefix("//").unwrap_or(rest))
                    .await?
            }
            "local" => self.load_local(client, rest).await?,
            "input" => self.load_input(client, rest).await?,
            other => {
                let message = format!("unsupported context source {other} for {}", self.full_name);
                return Err(DockerfileError::new(message));
            }
        }))
    }

    fn about(&self, what: &str) -> Constraints {
        Constraints::named(format!("[context {}] {what}", self.full_name))
    }

    async fn load_image<B: Bridge>(
        &self,
        client: &BuildClient<'_, B>,
        reference: &str,
    ) -> Result<Result<Loaded, String>, DockerfileError> {
        if reference == "scratch" {
            return Ok(Ok(State::scratch().into()));
        }
        let named = ImageRef::parse(reference)
            .map_err(|e| DockerfileError::new(e.to_string()))?
            .or_latest();
        let options = ResolveImageOptions {
            log_name: format!("[context {}] load metadata for {reference}", self.full_name),
            platform: self.platform.clone(),
            resolve_mode: client.options.resolve_mode.name().to_owned(),
            store: None,
        };
        let resolved = match client.resolve_image(&named.to_string(), options).await {
            Ok(resolved) => resolved,
            Err(error) => match &error.kind {
                BridgeErrorKind::NotAnImage(updated) => {
                    let (scheme, rest) = updated
                        .split_once("://")
                        .ok_or_else(|| DockerfileError::new(format!("could not parse ref: {updated}")))?;
                    return Ok(Err(format!("{scheme}:{rest}")));
                }
                _ => return Err(error.into()),
            },
        };
        let mut image = Image::parse(&resolved.config).map_err(|e| DockerfileError::new(e.to_string()))?;
        image.created = None;
        let resolved_ref = ImageRef::parse(&resolved.reference)
            .map_or_else(|_| resolved.reference.clone(), |r| r.or_latest().to_string());
        let about = self.about(reference).on(self.platform.clone());
        let mut state = source::image(&resolved_ref, ResolveMode::Default, about);
        source::apply_config(&mut state, &image);
        Ok(Ok(Loaded {
            state,
            image: Some(image),
            pending: None,
        }))
    }

    fn load_address(&self, input: &str, scheme: &str) -> Result<Loaded, DockerfileError> {
        match git_ref::detect(input) {
            Detected::Invalid(message) => Err(DockerfileError::new(message)),
            Detected::Git(git) => {
                let about = Constraints::named(format!("[internal] load git source {input}"));
                Ok(source::git(&git, git.keep_git_dir == Some(true), about).into())
            }
            Detected::Other if scheme == "git" => Err(DockerfileError::new(format!("invalid git context {input}"))),
            Detected::Other => Ok(source::http(input, CONTEXT_FILE, "", self.about(input)).into()),
        }
    }

    async fn load_layout<B: Bridge>(&self, client: &BuildClient<'_, B>, spec: &str) -> Result<Loaded, DockerfileError> {
        let (name, digest) = match spec.split_once('@') {
            Some((name, digest)) => (name, Some(digest)),
            None => (spec, None),
        };
        // A colon behind the last slash begins a tag; one before it belongs to a port.
        let store = match name
            .rfind(':')
            .filter(|&i| !name.get(i..).unwrap_or_default().contains('/'))
        {
            Some(i) => name.get(..i).unwrap_or_default(),
            None => name,
        };
        let unreadable =
            |e: String| DockerfileError::new(format!("could not parse oci-layout reference {}: {e}", quote(spec)));
        if store.is_empty() {
            return Err(unreadable("invalid reference format".to_owned()));
        }
        let Some(digest) = digest else {
            return Err(DockerfileError::new(format!(
                "oci-layout reference {} has no digest",
                quote(spec)
            )));
        };
        let digest = digest
            .parse()
            .map_err(|_| unreadable("invalid reference format".to_owned()))?;
        // The reference only names things here; what counts is the digest.
        let reference = ImageRef::parse(&self.name)
            .map_err(|e| {
                DockerfileError::new(format!(
                    "could not parse oci-layout reference {}: {e}",
                    quote(&self.name)
                ))
            })?
            .with_digest(digest)
            .to_string();
        let session = client.info.session_id.clone();
        let options = ResolveImageOptions {
            log_name: format!("[context {}] load metadata for {reference}", self.full_name),
            platform: self.platform.clone(),
            resolve_mode: String::new(),
            store: Some(OciStore {
                session_id: session.clone(),
                store_id: store.to_owned(),
            }),
        };
        let resolved = client.resolve_image(&reference, options).await?;
        let image = Image::parse(&resolved.config)
            .map_err(|e| DockerfileError::new(format!("could not parse oci-layout image config: {e}")))?;
        let about = self.about("OCI load from client").on(self.platform.clone());
        let mut state = source::oci_layout(&reference, &session, store, about);
        source::apply_config(&mut state, &image);
        Ok(Loaded {
            state,
            image: Some(image),
            pending: None,
        })
    }

    async fn load_local<B: Bridge>(&self, client: &BuildClient<'_, B>, name: &str) -> Result<Loaded, DockerfileError> {
        const IGNORE_FILE: &str = ".dockerignore";
        let session = client.session_of(name).to_owned();
        let shared_key = format!("context:{}-{IGNORE_FILE}", self.full_name);
        let local = Local {
            name,
            session: &session,
            follow: &[IGNORE_FILE.to_owned()],
            shared_key: &shared_key,
            no_diff: true,
            ..Local::default()
        };
        let state = local.state(self.about(&format!("load {IGNORE_FILE}")));
        let definition = state.marshal(None).map_err(|e| DockerfileError::new(e.to_string()))?;
        let reference = client.solve(definition, true).await?;
        let text = client
            .bridge
            .read_file(reference.as_ref(), IGNORE_FILE, None)
            .await
            .unwrap_or_default();
        let exclude = kiln_match::parse_ignore_file(&text)
            .map_err(|e| DockerfileError::new(format!("failed parsing {IGNORE_FILE}: {e}")))?;
        let pending = PendingLocal {
            late: Late::default(),
            name: name.to_owned(),
            full_name: self.full_name.clone(),
            session,
            shared_key: self.shared_key.clone(),
            exclude,
        };
        Ok(Loaded {
            state: pending.late.state(),
            image: None,
            pending: Some(pending),
        })
    }

    async fn load_input<B: Bridge>(&self, client: &BuildClient<'_, B>, key: &str) -> Result<Loaded, DockerfileError> {
        use base64::Engine as _;
        let inputs = client.bridge.inputs().await?;
        let Some(definition) = inputs.get(key) else {
            return Err(DockerfileError::new(format!(
                "invalid input {key} for {}",
                self.full_name
            )));
        };
        let mut state = State::from_definition(definition).map_err(|e| DockerfileError::new(e.to_string()))?;
        let Some(metadata) = client.options.attr(&format!("input-metadata:{key}")) else {
            return Ok(state.into());
        };
        let members: std::collections::BTreeMap<String, Option<String>> = serde_json::from_str(metadata)
            .map_err(|e| DockerfileError::new(format!("failed to parse input metadata {metadata}: {e}")))?;
        let Some(Some(encoded)) = members.get("containerimage.config") else {
            return Ok(state.into());
        };
        let image = base64::engine::general_purpose::STANDARD
            .decode(encoded)
            .map_err(|e| e.to_string())
            .and_then(|json| Image::parse(&json).map_err(|e| e.to_string()))
            .map_err(DockerfileError::new)
            .context(format!("failed to parse image config for {}", self.full_name))?;
        source::apply_config(&mut state, &image);
        Ok(Loaded {
            state,
            image: Some(image),
            pending: None,
        })
    }
}
