//! What an earlier process of this node left in VMs: found by the journals in the fleece directory.

use super::{
    AgentConfig, KubeletDirectory,
    work::{WorkError, clean_up, connect_vm},
};
use crate::fleecing::Journal;
use std::{path::Path, time::Duration};

/// Cleans up in every VM of which there is a journal; true when nothing is left. A VM whose launcher is gone has nothing
/// left in it: its QEMU went with it.
pub(super) async fn clean_up_all(config: &AgentConfig) -> bool {
    let kubelet = KubeletDirectory::new(config.kubelet_directory.clone(), config.check_cgroups);
    let mut clean = true;
    for launcher in journals(&config.fleece_directory) {
        if let Err(error) = clean_up_one(config, &kubelet, &launcher).await {
            if !kubelet.has_pod(&launcher) {
                forget(config, &launcher);
                continue;
            }
            clean = false;
            let error = super::report::chain_of(&error);
            tracing::warn!(launcher, error, "what an earlier session left in a VM cannot be removed yet");
        }
    }
    clean
}

/// The launchers' UIDs.
fn journals(directory: &Path) -> Vec<String> {
    let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let names = files.filter_map(|file| file.file_name().into_string().ok());
    names.filter_map(|name| Some(name.strip_suffix(".journal")?.to_owned())).collect()
}

async fn clean_up_one(config: &AgentConfig, kubelet: &KubeletDirectory, launcher: &str) -> Result<(), WorkError> {
    let journal = Journal::at(config.fleece_directory.join(format!("{launcher}.journal")));
    let Ok(Some(leftover)) = journal.leftover() else {
        forget(config, launcher);
        return Ok(());
    };
    // The name of the VM at its target: `NAMESPACE/NAME` in a repository, `NAMESPACE.NAME` in a directory of images. A
    // namespace has neither character in its own name.
    let (namespace, name) = leftover.begin.vm.split_once(['/', '.']).unwrap_or(("", &leftover.begin.vm));
    let (mut connection, _socket) = connect_vm(config, kubelet, launcher, namespace, name).await?;
    let _lock = connection.lock(Duration::ZERO).await?;
    clean_up(&mut connection).await.map(drop)
}

fn forget(config: &AgentConfig, launcher: &str) {
    for extension in ["journal", "nbd", "lock"] {
        let _ = std::fs::remove_file(config.fleece_directory.join(format!("{launcher}.{extension}")));
    }
}
