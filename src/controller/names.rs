//! Names of the objects that we make.

/// Digits of the hash in a name: 48 bits, over names that nobody can choose (UIDs).
const DIGITS: usize = 12;
/// Letters of the owner's name in a name. A pod's name is its host name as well, which may have 63.
const LETTERS: usize = 35;

fn hash(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex()[..DIGITS].to_owned()
}

/// The beginning of a name, such that more can follow it.
fn beginning(name: &str) -> String {
    let cut: String = name.chars().take(LETTERS).map(|c| if c == '.' { '-' } else { c }).collect();
    cut.trim_end_matches('-').to_owned()
}

/// Name of the mover pod of an attempt: `vfb-NAME-HASH-ATTEMPT`. The hash over namespace and UID keeps backups of the
/// same name in several namespaces apart, whose movers may meet in the operator's namespace, and a backup from an
/// earlier one of its name.
pub(super) fn mover(namespace: &str, name: &str, uid: &str, attempt: i64) -> String {
    format!("vfb-{}-{}-{attempt}", beginning(name), hash(&[namespace, uid]))
}

/// Name of the pod that forgets the data of a backup.
pub(super) fn forget(namespace: &str, name: &str, uid: &str) -> String {
    format!("vfb-{}-{}-forget", beginning(name), hash(&[namespace, uid]))
}

/// Name of the pod that probes a repository, as of a generation of its spec.
pub(super) fn probe(kind: &str, namespace: &str, name: &str, uid: &str, generation: i64) -> String {
    format!("vfr-{}-{}-{generation}", beginning(name), hash(&[kind, namespace, uid]))
}

/// Whether a text may be the value of a label.
pub(super) fn is_label_value(text: &str) -> bool {
    let alphanumeric = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && alphanumeric(text.chars().next())
        && alphanumeric(text.chars().last())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn movers_of_several_tenants_never_share_a_name() {
        let one = mover("team-a", "nightly", "uid-1", 1);
        assert!(one.starts_with("vfb-nightly-") && one.ends_with("-1"), "{one}");
        let others = [
            mover("team-b", "nightly", "uid-1", 1),
            mover("team-a", "nightly", "uid-2", 1),
            mover("team-a", "nightly", "uid-1", 2),
            // The border between the parts counts.
            mover("team-", "nightly", "auid-1", 1),
            forget("team-a", "nightly", "uid-1"),
        ];
        for other in others {
            assert_ne!(one, other);
        }
        assert_eq!(one, mover("team-a", "nightly", "uid-1", 1));
    }

    #[test]
    fn names_are_valid_names_of_pods() {
        let long = "a.".repeat(100);
        let names = [
            mover("n", &long, "u", i64::MAX),
            forget("n", &long, "u"),
            probe("BackupRepository", "n", &long, "u", 999_999),
            mover("n", "x.--", "u", 1),
        ];
        for name in names {
            assert!(name.len() <= 80 && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'), "{name}");
            assert!(is_label_value(&mover("n", &long, "u", 9_999_999)));
        }
    }

    #[test]
    fn label_values() {
        for good in ["a", "a-b", "A.b_c9", &"x".repeat(63)] {
            assert!(is_label_value(good), "{good}");
        }
        for bad in ["", "-a", "a-", "a/b", &"x".repeat(64), "ä"] {
            assert!(!is_label_value(bad), "{bad}");
        }
    }
}
