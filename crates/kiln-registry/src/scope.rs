//! Scopes of tokens: what a token lets its bearer do (Docker registry token specification, "scope").

use std::collections::{BTreeMap, BTreeSet};

/// A set of `type:name:action,…` scopes in one normal form: one entry per resource, actions sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ScopeSet(BTreeMap<String, BTreeSet<String>>);

impl ScopeSet {
    /// Reading a repository.
    pub(crate) fn pull(repository: &str) -> Self {
        let mut set = Self::default();
        set.add(&format!("repository:{repository}:pull"));
        set
    }

    /// Reading and writing a repository.
    pub(crate) fn push(repository: &str) -> Self {
        let mut set = Self::default();
        set.add(&format!("repository:{repository}:pull,push"));
        set
    }

    /// Adds one scope. The name may hold colons (a port); the action list is what follows the last one.
    pub(crate) fn add(&mut self, scope: &str) {
        let Some((resource, actions)) = scope.rsplit_once(':') else {
            return;
        };
        let entry = self.0.entry(resource.to_owned()).or_default();
        entry.extend(actions.split(',').filter(|a| !a.is_empty()).map(str::to_owned));
    }

    /// Adds a blank-separated list of scopes, as challenges carry them.
    pub(crate) fn add_list(&mut self, list: &str) {
        list.split_ascii_whitespace().for_each(|s| self.add(s));
    }

    /// Everything in either set.
    pub(crate) fn union(&self, other: &Self) -> Self {
        let mut out = self.clone();
        for (resource, actions) in &other.0 {
            out.0
                .entry(resource.clone())
                .or_default()
                .extend(actions.iter().cloned());
        }
        out
    }

    /// Whether everything in `other` is here too.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        other
            .0
            .iter()
            .all(|(r, actions)| self.0.get(r).is_some_and(|mine| actions.is_subset(mine)))
    }

    /// The scopes as texts, sorted.
    pub(crate) fn to_strings(&self) -> Vec<String> {
        self.0
            .iter()
            .map(|(r, actions)| format!("{r}:{}", actions.iter().cloned().collect::<Vec<_>>().join(",")))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_merge_per_resource() {
        let mut a = ScopeSet::pull("x/y");
        a.add_list("repository:x/y:push registry:catalog:*");
        assert_eq!(a.to_strings(), ["registry:catalog:*", "repository:x/y:pull,push"]);
        assert!(a.covers(&ScopeSet::push("x/y")));
        assert!(!ScopeSet::pull("x/y").covers(&a));
        assert_eq!(ScopeSet::pull("a").union(&ScopeSet::push("a")), ScopeSet::push("a"));
    }
}
