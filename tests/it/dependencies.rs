//! The direction of dependencies between the folders of `src/`, as `src/lib.rs` states it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What each folder may use besides itself and `reason`. A new folder has to be entered here.
const MAY_USE: [(&str, &[&str]); 18] = [
    (
        "cli",
        &[
            "controller",
            "agent",
            "operator",
            "run",
            "api",
            "kubevirt",
            "fleecing",
            "mover",
            "repository",
            "image",
            "nbd",
            "guest_agent",
            "qmp",
            "backup",
            "chain",
            "extent",
        ],
    ),
    ("controller", &["operator", "api", "kubevirt", "mover", "backup", "chain"]),
    (
        "agent",
        &["operator", "run", "api", "kubevirt", "fleecing", "mover", "guest_agent", "qmp", "backup", "chain", "extent"],
    ),
    ("operator", &[]),
    ("run", &["fleecing", "mover", "nbd", "guest_agent", "qmp", "backup", "chain", "extent"]),
    ("api", &[]),
    ("kubevirt", &[]),
    ("fleecing", &["image", "nbd", "guest_agent", "qmp", "chain", "extent"]),
    ("mover", &["repository", "image", "nbd", "guest_agent", "qmp", "backup", "chain", "extent"]),
    ("repository", &["image", "backup", "chain", "extent"]),
    ("image", &["qmp", "backup", "chain", "extent"]),
    ("nbd", &["qmp", "chain", "extent"]),
    ("guest_agent", &["qmp", "chain", "extent"]),
    ("qmp", &["chain", "extent"]),
    ("chain", &["extent"]),
    ("extent", &[]),
    ("backup", &[]),
    (REASON, &[]),
];
/// The trait that every error implements.
const REASON: &str = "reason";
/// The folders that may speak to Kubernetes; some are still to come.
const MAY_USE_KUBE: [&str; 5] = ["api", "kubevirt", "controller", "agent", "cli"];
/// The crates by which one does.
const KUBE: [&str; 5] = ["kube", "kube_client", "kube_core", "kube_runtime", "k8s_openapi"];

/// A part of a source file, as far as paths are concerned.
#[derive(Debug, PartialEq, Eq)]
enum Token {
    /// A word or a number.
    Word(String),
    /// `::`
    Colons,
    /// Any other character.
    Other(char),
}

/// Splits a source into words and characters, without comments and the contents of strings.
fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut tokens = Vec::new();
    let mut i = 0;
    while i < chars.len() {
        match at(i) {
            '/' if at(i + 1) == '/' => i += chars[i..].iter().take_while(|c| **c != '\n').count(),
            '/' if at(i + 1) == '*' => i = skip_comment(&chars, i),
            '"' => i = skip_string(&chars, i + 1),
            '\'' if at(i + 1) == '\\' => {
                // The escaped character itself may be a quote.
                i += 3;
                i += chars[i.min(chars.len())..].iter().take_while(|c| **c != '\'').count() + 1;
            }
            '\'' if at(i + 2) == '\'' => i += 3,
            ':' if at(i + 1) == ':' => {
                tokens.push(Token::Colons);
                i += 2;
            }
            c if is_word(c) => {
                let word: String = chars[i..].iter().copied().take_while(|c| is_word(*c)).collect();
                i += word.chars().count();
                let hashes = chars[i..].iter().take_while(|c| **c == '#').count();
                if matches!(word.as_str(), "r" | "br" | "cr") && at(i + hashes) == '"' {
                    let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
                    i += hashes + 1;
                    while i < chars.len() && !chars[i..].starts_with(&end) {
                        i += 1;
                    }
                    i += end.len();
                } else if word == "r" && hashes == 1 {
                    i += 1;
                } else {
                    tokens.push(Token::Word(word));
                }
            }
            c if c.is_whitespace() => i += 1,
            c => {
                tokens.push(Token::Other(c));
                i += 1;
            }
        }
    }
    tokens
}

/// The place behind the block comment that begins here; they nest.
fn skip_comment(chars: &[char], mut i: usize) -> usize {
    let mut depth = 0;
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
            ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

/// The place behind the end of the string that this is inside of.
fn skip_string(chars: &[char], mut i: usize) -> usize {
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// The module of a file: `["fleecing", "session"]` for `fleecing/session.rs`.
fn module_of(file: &Path) -> Vec<String> {
    let mut module: Vec<String> =
        file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if module.last().is_some_and(|last| matches!(last.as_str(), "mod" | "lib" | "main")) {
        module.pop();
    }
    module
}

/// The top-level modules that a path reaches which begins at token `i` in `module`; `None` stands for all of them.
fn reached(tokens: &[Token], mut i: usize, mut module: Vec<String>, found: &mut BTreeSet<Option<String>>) -> usize {
    loop {
        match tokens.get(i) {
            Some(Token::Word(word)) if word == "crate" => module.clear(),
            Some(Token::Word(word)) if word == "super" => drop(module.pop()),
            Some(Token::Word(word)) if word == "self" => {}
            Some(Token::Word(word)) => {
                if module.is_empty() {
                    found.insert(Some(word.clone()));
                }
                // Its own module from here on.
                module.push(word.clone());
            }
            Some(Token::Other('{')) => {
                i += 1;
                loop {
                    match tokens.get(i) {
                        None => return i,
                        Some(Token::Other('}')) => return i + 1,
                        Some(Token::Other(',')) => i += 1,
                        // `as name` and the like are skipped.
                        Some(Token::Word(word)) if word == "as" => i += 2,
                        Some(_) => i = reached(tokens, i, module.clone(), found).max(i + 1),
                    }
                }
            }
            Some(Token::Other('*')) => {
                if module.is_empty() {
                    found.insert(None);
                }
                return i + 1;
            }
            _ => return i,
        }
        i += 1;
        if tokens.get(i) != Some(&Token::Colons) {
            if module.is_empty() {
                found.insert(None);
            }
            return i;
        }
        i += 1;
    }
}

/// What is wrong in a file, whose path is relative to `src/`.
fn violations(file: &Path, source: &str) -> Vec<String> {
    let module = module_of(file);
    // The root only lists the modules, and the binary only calls the library.
    let Some(folder) = module.first() else { return Vec::new() };
    let tokens = tokens(source);
    let mut found = BTreeSet::new();
    let mut wrong = Vec::new();
    // Modules inside the file: name and the depth of braces that they end at.
    let mut inner: Vec<(String, usize)> = Vec::new();
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate() {
        let before = i.checked_sub(1).map(|before| &tokens[before]);
        let after = tokens.get(i + 1);
        match token {
            Token::Other('{') => {
                if let [Token::Word(keyword), Token::Word(name)] = &tokens[i.saturating_sub(2)..i]
                    && keyword == "mod"
                {
                    inner.push((name.clone(), depth));
                }
                depth += 1;
            }
            Token::Other('}') => {
                depth = depth.saturating_sub(1);
                inner.retain(|(_, ends)| *ends < depth);
            }
            Token::Word(word) if before != Some(&Token::Colons) => {
                let here = || module.iter().cloned().chain(inner.iter().map(|(name, _)| name.clone())).collect();
                let is_use = before == Some(&Token::Word("use".into()));
                if matches!(word.as_str(), "crate" | "super") && (after == Some(&Token::Colons) || is_use) {
                    reached(&tokens, i, here(), &mut found);
                }
                let is_path = after == Some(&Token::Colons) || is_use;
                if is_path && KUBE.contains(&word.as_str()) && !MAY_USE_KUBE.contains(&folder.as_str()) {
                    wrong.push(format!("{}: `{folder}` uses Kubernetes (`{word}`)", file.display()));
                }
            }
            _ => {}
        }
    }
    let Some((_, may_use)) = MAY_USE.iter().find(|(name, _)| name == folder) else {
        wrong.push(format!("{}: the folder `{folder}` is not in MAY_USE", file.display()));
        return wrong;
    };
    for used in found {
        match used {
            None => wrong.push(format!("{}: imports the crate's root, which hides what it uses", file.display())),
            Some(used) if used == *folder || used == REASON || may_use.contains(&used.as_str()) => {}
            Some(used) => wrong.push(format!("{}: `{folder}` must not use `{used}`", file.display())),
        }
    }
    wrong
}

/// All sources below a directory.
fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory of sources") {
        let path = entry.expect("a directory entry").path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

#[test]
fn dependencies_point_downwards() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = sources(&root);
    assert!(files.len() > 20, "the sources are not where they are looked for: {files:?}");
    let mut wrong = Vec::new();
    for file in &files {
        let source = fs::read_to_string(file).expect("a source");
        wrong.extend(violations(file.strip_prefix(&root).expect("below the root"), &source));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn upward_dependencies_are_found() {
    let cases = [
        ("extent/range.rs", "use crate::chain::BitmapName;"),
        ("qmp/mod.rs", "use crate::{chain::plan, fleecing::{Session, names}};"),
        ("qmp/mod.rs", "use crate::{\n    reason::Reason,\n    nbd as n,\n};"),
        ("image/sink.rs", "fn f() -> crate::mover::Pull { todo!() }"),
        ("image/sink.rs", "fn f() { g::<crate::nbd::Client>() }"),
        ("nbd/client.rs", "use super::super::image::Raw;"),
        ("nbd/mod.rs", "pub use super::image::Raw;"),
        ("nbd/mod.rs", "mod tests { use super::super::image::Raw; }"),
        ("nbd/mod.rs", "mod tests {} use super::{image::Raw};"),
        ("reason.rs", "use super::qmp::QmpError;"),
        ("mover/pull.rs", "let c = '\"'; use crate::fleecing::Session; let d = '\"';"),
        ("mover/pull.rs", "let c = r#\"\"\"#; use crate::fleecing::Session;"),
        ("chain/mod.rs", "use crate::*;"),
        ("chain/mod.rs", "use crate as root;"),
        ("fleecing/session.rs", "use kube::Client;"),
        ("fleecing/session.rs", "fn f(c: kube::Client) {}"),
        ("chain/plan.rs", "use k8s_openapi::api::core::v1::Pod;"),
        ("novelty/mod.rs", "fn f() {}"),
    ];
    for (file, source) in cases {
        let found = violations(Path::new(file), source);
        assert_eq!(found.len(), 1, "{file}: {source}: {found:?}");
    }
}

#[test]
fn downward_dependencies_are_no_violations() {
    let cases = [
        ("cli/backup.rs", "use crate::{fleecing::Session, mover::{Pull, self}, reason::Reason}; use kube::Client;"),
        ("fleecing/session.rs", "use super::names; use crate::qmp::Qmp; pub(crate) fn f() {}"),
        ("fleecing/session.rs", "mod tests { use super::*; use super::super::names; }"),
        ("image/qcow2/writer.rs", "use super::super::sink::Sink; use crate::{extent::Piece, image::Raw};"),
        ("extent/plan.rs", "// use crate::qmp::Qmp;\n/* crate::cli */ const A: &str = \"crate::cli::main\\\"\";"),
        ("extent/plan.rs", "fn f<'a>(kube: &'a str) { kube.len(); }"),
        ("qmp/codec.rs", "impl<'a> crate::reason::Reason for A<'a> {}"),
        ("lib.rs", "pub mod chain;"),
        ("main.rs", "virt_fleece::cli::main()"),
    ];
    for (file, source) in cases {
        assert_eq!(violations(Path::new(file), source), Vec::<String>::new(), "{file}: {source}");
    }
}
