//! Cache keys: when are two pieces of work the same?
//!
//! # The idea
//!
//! A result may be taken from the cache if making it again could not give anything else. Kiln decides that from the
//! *operation* and from its *inputs*, and it does so twice:
//!
//! 1. The **definition key** is made of the operation's digest and, for each input, the key of that input: "the same
//!    command on top of the same thing". It needs no bytes at all, so a build whose definition has not changed is
//!    answered without pulling, unpacking or mounting anything.
//! 2. The **content key** replaces the key of an input by a digest of what the input holds at the paths that are used,
//!    where the operation says that nothing else can matter (the source of a `COPY`, a read-only mount). It needs the
//!    input, or a remembered digest of it. It is what makes a rebuilt stage with equal files a hit.
//!
//! Where an operation asks for content, the content key is the *canonical* one: the record carries it as its id, and the
//! definition key becomes an alias that leads to it. Where no input is asked for content both keys are the same. So an
//! id is a pure function of operation and inputs, equal on every daemon, and alternatives do not multiply: whichever way
//! a vertex was found, its consumers build their keys upon one id.
//!
//! # What is in a key
//!
//! | Part | Definition key | Content key |
//! |---|---|---|
//! | operation (see the worker's `op` modules for what is left out) | digest | digest |
//! | input used as a whole, e.g. the root of a RUN | id of its record, output, selector | the same |
//! | input used by content, e.g. the source of a COPY | id of its record, output, selector | digest of the content |
//! | input without id (a local directory) | there is no definition key | digest of the content |
//! | tenant, resource limits, names, secrets, times | no | no |
//!
//! An image has two operation digests, by manifest and by layer chain; the last one given is canonical and the others are
//! aliases.
//!
//! # What keeps a key honest
//!
//! * Results are saved under keys of the inputs that were really used: after the inputs are there, the key is made again.
//! * A record has a **version** that every run raises. An alias from a definition key to a content key names the versions
//!   of the inputs it was made from, and so does a remembered content digest. When an input is made again, they are void
//!   and content is looked at again, so a stale alias never decides anything.
//! * A vertex that ignores the cache has no definition key in that build: what is built upon it is found by content or
//!   run again. It is saved under its normal id all the same, and replaces what was there.
//! * What depends, other than by content, on something without a lasting identity is never stored.

use std::fmt;

use kiln_llb::OutputIndex;
use kiln_oci::{Digest, Hasher};
use serde::{Deserialize, Serialize};

kiln_oci::digest_id! {
    /// Digest of an operation without its inputs, byte-exact as BuildKit computes it.
    OpDigest
}

kiln_oci::digest_id! {
    /// Identity of a cache record or of an alias that leads to one.
    KeyId
}

kiln_oci::digest_id! {
    /// "Somebody used this input in this place of this operation": see [`KeyParts::links`].
    LinkId
}

impl OpDigest {
    /// Digest under which an exported cache knows output `output` of this operation: over `<op digest>@<output>`.
    pub fn record_digest(&self, output: OutputIndex) -> Digest {
        Digest::of(format!("{}@{output}", self.0))
    }
}

/// Digest under which an exported cache knows a content key: over `<content digest>@-1`.
pub fn content_record_digest(content: &Digest) -> Digest {
    Digest::of(format!("{content}@-1"))
}

/// An output of a record: what an input's identity consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RecordOutput {
    /// The record.
    pub record: KeyId,
    /// Which of its outputs.
    pub output: OutputIndex,
}

/// What a key says about one input.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KeyInput {
    /// Identity of the input, if it has a lasting one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<RecordOutput>,
    /// Which part of the input the operation uses; `None` stands for no selector.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<Digest>,
    /// Digest of what the input holds there, if the operation is keyed by content and the digest is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<Digest>,
}

/// Everything a key was made of. Stored with the record, so that "why was this not cached?" is a comparison of two.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct KeyParts {
    /// Digests of the operation; the last is canonical.
    pub ops: Vec<OpDigest>,
    /// The text the canonical operation digest was taken over, for people; empty if it is not kept.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub subject: String,
    /// Inputs by position.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<KeyInput>,
}

impl KeyParts {
    /// The canonical key: content where it is known, identities elsewhere. `None` if an input has neither.
    pub fn canonical(&self) -> Option<KeyId> {
        self.hash(self.ops.last()?, true)
    }

    /// Whether some input is given by its content.
    pub fn by_content(&self) -> bool {
        self.inputs.iter().any(|i| i.content.is_some())
    }

    /// All other keys that lead to the canonical one: the definition key where content took part, and those of the
    /// operation's other digests.
    pub fn aliases(&self) -> Vec<KeyId> {
        let canonical = self.canonical();
        let mut out = Vec::new();
        for op in &self.ops {
            for by_content in [true, false] {
                if let Some(id) = self.hash(op, by_content)
                    && Some(id) != canonical
                    && !out.contains(&id)
                {
                    out.push(id);
                }
            }
        }
        out
    }

    /// The definition key: identities only. `None` if an input has none.
    pub fn definition(&self) -> Option<KeyId> {
        self.hash(self.ops.last()?, false)
    }

    fn hash(&self, op: &OpDigest, by_content: bool) -> Option<KeyId> {
        let mut h = Hasher::new();
        h.update(b"kiln.key.1\0");
        h.update(op.0.as_bytes());
        for input in &self.inputs {
            match (&input.content, &input.key) {
                (Some(content), _) if by_content => {
                    h.update(b"c");
                    h.update(content.as_bytes());
                }
                (_, Some(key)) => {
                    h.update(b"k");
                    h.update(key.record.0.as_bytes());
                    h.update(key.output.to_be_bytes());
                    match &input.selector {
                        Some(selector) => {
                            h.update(b"s");
                            h.update(selector.as_bytes());
                        }
                        None => h.update(b"-"),
                    }
                }
                (_, None) => return None,
            }
        }
        Some(KeyId(h.finish()))
    }

    /// One link per input that is used by identity. If one of them has never been saved, no record of this operation on
    /// that input exists, so a lookup by content cannot match and all inputs may be made at once.
    pub fn links(&self) -> Vec<LinkId> {
        self.inputs
            .iter()
            .enumerate()
            .filter(|(_, i)| i.content.is_none())
            .filter_map(|(n, _)| self.link(n))
            .collect()
    }

    /// The link of input `index`; `None` if the input has no identity.
    pub fn link(&self, index: usize) -> Option<LinkId> {
        let op = self.ops.last()?;
        let input = self.inputs.get(index)?;
        let key = input.key.as_ref()?;
        let mut h = Hasher::new();
        h.update(b"kiln.link.1\0");
        h.update(op.0.as_bytes());
        h.update((index as u64).to_be_bytes());
        h.update(key.record.0.as_bytes());
        h.update(key.output.to_be_bytes());
        if let Some(selector) = &input.selector {
            h.update(selector.as_bytes());
        }
        Some(LinkId(h.finish()))
    }
}

/// Why work was not found in the cache: the difference between what was looked for and the nearest record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MissReason {
    /// The cache was not asked, because the build said so.
    Ignored,
    /// The work depends on something that has no lasting identity.
    Transient,
    /// No record of this operation exists, on no input.
    NewOperation,
    /// The operation is known, but inputs differ: their positions.
    Inputs(Vec<InputMiss>),
    /// Everything is equal; the result itself was removed.
    Removed,
}

/// What differs about one input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputMiss {
    /// Position among the operation's inputs.
    pub index: usize,
    /// What is different.
    pub difference: InputDifference,
}

/// How an input differs from the one a record was made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputDifference {
    /// Other content at the paths used.
    Content,
    /// Made in another way, or from other inputs.
    Identity,
    /// Other paths of it are used.
    Selector,
}

impl MissReason {
    /// Compares what was looked for with the nearest record of the same operation.
    pub fn between(wanted: &KeyParts, nearest: Option<&KeyParts>) -> Self {
        let Some(nearest) = nearest else {
            return Self::NewOperation;
        };
        if wanted.ops.last() != nearest.ops.last() || wanted.inputs.len() != nearest.inputs.len() {
            return Self::NewOperation;
        }
        let differences: Vec<InputMiss> = wanted
            .inputs
            .iter()
            .zip(&nearest.inputs)
            .enumerate()
            .filter_map(|(index, (a, b))| {
                let difference = if a.selector != b.selector {
                    InputDifference::Selector
                } else {
                    match (a.content, b.content) {
                        (Some(x), Some(y)) if x == y => return None,
                        (Some(_), Some(_)) => InputDifference::Content,
                        _ if a.key == b.key => return None,
                        _ => InputDifference::Identity,
                    }
                };
                Some(InputMiss { index, difference })
            })
            .collect();
        if differences.is_empty() {
            Self::Removed
        } else {
            Self::Inputs(differences)
        }
    }
}

impl fmt::Display for MissReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ignored => f.write_str("the build asked to ignore the cache"),
            Self::Transient => f.write_str("it depends on something without a lasting identity"),
            Self::NewOperation => f.write_str("this operation has not been run before"),
            Self::Removed => f.write_str("its result was removed from the cache"),
            Self::Inputs(list) => {
                for (n, miss) in list.iter().enumerate() {
                    let what = match miss.difference {
                        InputDifference::Content => "has other content",
                        InputDifference::Identity => "is another one",
                        InputDifference::Selector => "is used at other paths",
                    };
                    write!(f, "{}input {} {what}", if n == 0 { "" } else { ", " }, miss.index)?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(text: &str) -> OpDigest {
        OpDigest(Digest::of(text))
    }

    fn by_key(text: &str) -> KeyInput {
        KeyInput {
            key: Some(RecordOutput {
                record: KeyId(Digest::of(text)),
                output: 0,
            }),
            selector: None,
            content: None,
        }
    }

    fn parts(ops: &[&str], inputs: Vec<KeyInput>) -> KeyParts {
        KeyParts {
            ops: ops.iter().map(|o| op(o)).collect(),
            subject: String::new(),
            inputs,
        }
    }

    #[test]
    fn record_digests_are_those_of_exported_caches() {
        let file: OpDigest = "sha256:4ecc3e69fbf1e191a072a11011f955ea46d4d4c1d071dc359aa8758a45f9c6b4"
            .parse()
            .unwrap();
        assert_eq!(
            file.record_digest(0).to_string(),
            "sha256:65e4ec5541ca8bb8e9f6ebc37db1d4cc9e91efb3202911f91169e04999cd12be"
        );
        let content: Digest = "sha256:286f4db492f491f7b3f357be9b60a4964ab5322915dda76c7810107aa9e116c3"
            .parse()
            .unwrap();
        assert_eq!(
            content_record_digest(&content).to_string(),
            "sha256:c24a47b576469b52903dd7e5045a62fee5855b447dee1771d67b829458d2c08e"
        );
    }

    #[test]
    fn content_replaces_identity_in_the_canonical_key_only() {
        let mut a = parts(&["copy"], vec![by_key("base"), by_key("stage-1")]);
        let mut b = parts(&["copy"], vec![by_key("base"), by_key("stage-2")]);
        assert_eq!(a.canonical(), a.definition());
        assert!(a.aliases().is_empty());
        assert_ne!(a.canonical(), b.canonical());
        a.inputs[1].content = Some(Digest::of("files"));
        b.inputs[1].content = Some(Digest::of("files"));
        assert_eq!(a.canonical(), b.canonical());
        assert_ne!(a.definition(), b.definition());
        assert_eq!(a.aliases(), vec![a.definition().unwrap()]);
        // No identity at all: content alone makes a key.
        b.inputs[1].key = None;
        assert_eq!(a.canonical(), b.canonical());
        assert_eq!(b.definition(), None);
    }

    #[test]
    fn selectors_outputs_and_positions_are_part_of_a_key() {
        let base = parts(&["run"], vec![by_key("a"), by_key("b")]);
        let swapped = parts(&["run"], vec![by_key("b"), by_key("a")]);
        let mut selected = base.clone();
        selected.inputs[0].selector = Some(Digest::of("/"));
        let mut output = base.clone();
        output.inputs[0].key.as_mut().unwrap().output = 1;
        let ids = [&base, &swapped, &selected, &output].map(|p| p.canonical().unwrap());
        for (i, a) in ids.iter().enumerate() {
            for b in &ids[i + 1..] {
                assert_ne!(a, b);
            }
        }
    }

    #[test]
    fn an_image_is_found_by_either_key() {
        let image = parts(&["manifest", "chain"], vec![]);
        let again = parts(&["other manifest", "chain"], vec![]);
        assert_eq!(image.canonical(), again.canonical());
        assert_eq!(image.aliases(), vec![parts(&["manifest"], vec![]).canonical().unwrap()]);
    }

    #[test]
    fn a_miss_names_what_differs() {
        let mut a = parts(&["copy"], vec![by_key("base"), by_key("ctx")]);
        a.inputs[1].content = Some(Digest::of("new"));
        let mut b = a.clone();
        b.inputs[1].content = Some(Digest::of("old"));
        assert_eq!(MissReason::between(&a, None), MissReason::NewOperation);
        assert_eq!(MissReason::between(&a, Some(&a)), MissReason::Removed);
        assert_eq!(
            MissReason::between(&a, Some(&b)).to_string(),
            "input 1 has other content"
        );
        b.inputs[0] = by_key("other base");
        assert_eq!(
            MissReason::between(&a, Some(&b)).to_string(),
            "input 0 is another one, input 1 has other content"
        );
    }
}
