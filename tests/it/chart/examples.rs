//! Each example is applied.

use super::{OPERATOR, checkout, cluster, install, install_foreign_kinds};
use std::{collections::BTreeSet, fs, path::Path};

/// All YAML files below a directory.
fn yaml_files(directory: &Path, files: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            yaml_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "yaml") {
            files.insert(path.display().to_string());
        }
    }
}

#[test]
fn the_api_server_takes_every_example() {
    let cluster = cluster();
    let admin = cluster.admin();
    install(&cluster, &[]);
    install_foreign_kinds(&admin);
    for namespace in ["team-a", "argocd", "flux-system"] {
        cluster.create_namespace(namespace);
    }
    let examples = checkout("examples");
    let mut files = BTreeSet::new();
    yaml_files(&examples, &mut files);
    assert!(files.len() >= 12, "{files:?}");
    for file in &files {
        if file.ends_with("kustomization.yaml") {
            continue;
        }
        let text = fs::read_to_string(file).expect("an example");
        let namespace = ["virt-fleece", "argocd", "flux-system"]
            .into_iter()
            .find(|namespace| text.contains(&format!("namespace: {namespace}\n")));
        // What gets its name from the API server cannot be applied.
        let named = !text.contains("generateName");
        let verb: &[&str] = if named { &["apply", "--server-side", "--force-conflicts"] } else { &["create"] };
        let mut arguments = [verb, &["--dry-run=server", "--validate=strict", "-f", file.as_str()]].concat();
        // Those that name a namespace keep to it.
        if namespace.is_none() {
            arguments.extend(["-n", "team-a"]);
        }
        assert!(!admin.run(arguments).is_empty(), "{file}");
    }
    // For real, too: our kinds, with the defaults that the API server fills in.
    for name in ["repository-s3", "cluster-repository", "backup", "backup-qcow2-pvc"] {
        let file = examples.join(format!("{name}.yaml")).display().to_string();
        let mut arguments = vec!["create", "--validate=strict", "-f", &file];
        if name != "cluster-repository" {
            arguments.extend(["-n", "team-a"]);
        }
        admin.run(arguments);
    }
    let repository = admin.get(&["-n", "team-a", "vfrepo", "main"]);
    assert_eq!(repository["spec"]["create"], true);
    assert_eq!(admin.get(&["-n", OPERATOR, "secret", "cluster-backup-s3"])["type"], "Opaque");
    admin.run(["-n", "team-a", "delete", "vfrepo", "main"]);
    let kustomize = examples.join("kustomize").display().to_string();
    admin.run(["apply", "--server-side", "--validate=strict", "-k", &kustomize]);
    let repository = admin.get(&["-n", "team-a", "vfrepo", "main"]);
    assert_eq!(repository["spec"]["s3"]["prefix"], "cluster-1/team-a");
    assert_eq!(repository["spec"]["mover"]["resources"]["limits"]["memory"], "1Gi");
}
