//! Extended attributes: which ones may enter or leave a tree, and how a list of them is held.

/// Extended attributes of one file, sorted by the bytes of their names.
pub type Xattrs = Vec<(Box<[u8]>, Box<[u8]>)>;

/// The attribute that carries file capabilities; the only one of `security.*` that a layer keeps.
pub const SECURITY_CAPABILITY: &[u8] = b"security.capability";

/// Attributes that belong to overlayfs itself. They would change how a tree is mounted, so none is accepted from
/// outside and none is kept when a tree is sealed.
pub fn is_overlay_private(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
}

/// Whether an attribute found in an image layer is kept: `security.capability` and `user.*`, except overlayfs' own.
pub fn kept_from_layer(name: &[u8]) -> bool {
    name == SECURITY_CAPABILITY || (name.starts_with(b"user.") && !is_overlay_private(name))
}

/// Whether a sealed tree notes an attribute: everything but `security.*` (other than capabilities), `system.*` and
/// overlayfs' own. `trusted.*` is noted where it can be read.
pub fn kept_in_tree(name: &[u8]) -> bool {
    if name == SECURITY_CAPABILITY {
        return true;
    }
    !(name.starts_with(b"security.") || name.starts_with(b"system.") || is_overlay_private(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters() {
        assert!(kept_from_layer(b"user.x") && kept_from_layer(b"security.capability"));
        assert!(!kept_from_layer(b"user.overlay.opaque") && !kept_from_layer(b"trusted.overlay.opaque"));
        assert!(!kept_from_layer(b"security.selinux") && !kept_from_layer(b"trusted.x"));
        assert!(kept_in_tree(b"trusted.b") && !kept_in_tree(b"system.posix_acl_access"));
        assert!(!kept_in_tree(b"trusted.overlay.redirect"));
    }
}
