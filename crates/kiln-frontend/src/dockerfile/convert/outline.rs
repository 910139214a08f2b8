//! What a build takes from its user: arguments, secrets, agents.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::{Bridge, Conversion};
use crate::dockerfile::instruction::Argument;
use crate::dockerfile::span::Span;

/// An argument, where it is declared.
#[derive(Clone, Debug, Default)]
pub(crate) struct ArgInfo {
    /// Its name.
    pub name: String,
    /// Its value in this build.
    pub value: String,
    /// What the comment above says.
    pub description: String,
    /// Other arguments its default is made of.
    pub deps: BTreeSet<String>,
    /// Where it is declared.
    pub span: Option<Span>,
}

impl ArgInfo {
    /// An argument without a value yet.
    pub(super) fn new(arg: &Argument, span: Span) -> Self {
        Self {
            name: arg.name.clone(),
            description: arg.description.clone(),
            span: Some(span),
            ..Self::default()
        }
    }
}

/// A secret or agent.
#[derive(Clone, Debug)]
pub(crate) struct Requirement {
    /// Its id.
    pub name: String,
    /// Whether it must be there.
    pub required: bool,
    /// The first instruction that wants it.
    pub span: Span,
}

/// The outline of a target, each list by line.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outline {
    /// Name of the target.
    pub name: String,
    /// What the comment above it says.
    pub description: String,
    /// Arguments that have an effect.
    pub args: Vec<ArgInfo>,
    /// Secrets.
    pub secrets: Vec<Requirement>,
    /// Agents.
    pub ssh: Vec<Requirement>,
}

/// What one stage contributes to an outline.
#[derive(Clone, Debug, Default)]
pub(super) struct Capture {
    /// Arguments declared in the stage, over those before the first FROM.
    pub declared: BTreeMap<String, ArgInfo>,
    /// Arguments used.
    pub used: BTreeSet<String>,
    /// Secrets.
    pub secrets: BTreeMap<String, Requirement>,
    /// Agents.
    pub ssh: BTreeMap<String, Requirement>,
}

impl<B: Bridge> Conversion<'_, B> {
    /// The outline of stage `target` and everything it needs.
    pub(super) fn outline(&self, target: usize) -> Outline {
        let stage = &self.table.stages[target];
        let mut out = Outline {
            name: stage.name.clone(),
            description: stage.description.clone(),
            ..Outline::default()
        };
        let (mut args, mut secrets, mut ssh) = (HashSet::new(), HashSet::new(), HashSet::new());
        // A stage based on another one sees what that one captured, as well as its own.
        for index in self.table.reachable(target) {
            let mut chain = Some(index);
            let mut visited = HashSet::new();
            let mut declared: Vec<&BTreeMap<String, ArgInfo>> = Vec::new();
            let mut used = BTreeSet::new();
            while let Some(i) = chain.filter(|i| visited.insert(*i) && visited.len() <= MAX_CHAIN) {
                let capture = &self.table.stages[i].capture;
                declared.push(&capture.declared);
                used.extend(capture.used.iter().cloned());
                for (all, seen, out) in [
                    (&capture.secrets, &mut secrets, &mut out.secrets),
                    (&capture.ssh, &mut ssh, &mut out.ssh),
                ] {
                    let new = all.values().filter(|r| seen.insert(r.name.clone()));
                    out.extend(new.cloned());
                }
                chain = self.table.stages[i].base;
            }
            declared.push(&self.table.global_args);
            let info = |name: &str| declared.iter().find_map(|known| known.get(name));
            let mut pending: Vec<String> = used.into_iter().collect();
            let mut marked = HashSet::new();
            while let Some(name) = pending.pop() {
                if !marked.insert(name.clone()) {
                    continue;
                }
                if let Some(arg) = info(&name) {
                    pending.extend(arg.deps.iter().cloned());
                    if args.insert(name) {
                        out.args.push(arg.clone());
                    }
                }
            }
        }
        let line = |span: Option<&Span>| span.and_then(Span::first).unwrap_or(0);
        out.args.sort_by_key(|a| (line(a.span.as_ref()), a.name.clone()));
        out.secrets.sort_by_key(|r| (line(Some(&r.span)), r.name.clone()));
        out.ssh.sort_by_key(|r| (line(Some(&r.span)), r.name.clone()));
        out
    }
}

/// Longest chain of stages that is followed for an outline.
const MAX_CHAIN: usize = 1000;
