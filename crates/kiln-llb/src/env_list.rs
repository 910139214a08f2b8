//! Environment variables in the order of their last assignment, which is the order steps see them in.

use std::collections::HashMap;

/// An ordered environment. Assigning a variable again moves it to the end.
#[derive(Clone, Debug, Default)]
pub struct EnvList {
    values: HashMap<String, (u64, String)>,
    next: u64,
    bytes: usize,
}

impl EnvList {
    /// The value of `name`, if it is set.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(|(_, value)| value.as_str())
    }

    /// Sets `name` and makes it the last one.
    pub fn set(&mut self, name: impl Into<String>, value: impl Into<String>) {
        let (name, value) = (name.into(), value.into());
        let order = self.next;
        self.next += 1;
        self.bytes += name.len() + value.len() + 2;
        let key_len = name.len();
        if let Some((_, old)) = self.values.insert(name, (order, value)) {
            self.bytes = self.bytes.saturating_sub(key_len + old.len() + 2);
        }
    }

    /// Unsets `name`.
    pub fn remove(&mut self, name: &str) {
        if let Some((_, old)) = self.values.remove(name) {
            self.bytes = self.bytes.saturating_sub(name.len() + old.len() + 2);
        }
    }

    /// How many variables are set.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether none is set.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Names and values, the last assigned one last.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let mut all: Vec<_> = self.values.iter().collect();
        all.sort_unstable_by_key(|(_, (order, _))| *order);
        all.into_iter()
            .map(|(name, (_, value))| (name.as_str(), value.as_str()))
    }

    /// `NAME=value` entries, the last assigned one last.
    pub fn to_vec(&self) -> Vec<String> {
        self.iter().map(|(name, value)| format!("{name}={value}")).collect()
    }

    /// Bytes that all entries take together.
    pub fn size(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_that_of_the_last_assignment() {
        let mut env = EnvList::default();
        env.set("A", "1");
        env.set("B", "2");
        env.set("A", "3");
        assert_eq!(env.to_vec(), ["B=2", "A=3"]);
        assert_eq!((env.get("A"), env.get("C"), env.size()), (Some("3"), None, 8));
        env.remove("B");
        assert_eq!((env.to_vec(), env.size()), (vec!["A=3".to_owned()], 4));
    }
}
