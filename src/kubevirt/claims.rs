//! The volumes of a VM that a backup can have; for a VM that is stopped.

use super::{Disk, VirtualMachineInstanceSpec, Volume};

/// A volume whose data is in a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimedVolume {
    /// Its name in the VM's spec.
    pub name: String,
    /// The `PersistentVolumeClaim`, in the VM's namespace.
    pub claim: String,
}

/// A volume that is not backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SkippedVolume {
    /// Its name in the VM's spec.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// Splits the volumes of a VM into those that can be backed up and those that cannot. Volumes without a disk (config
/// maps for file systems, memory dumps) are neither.
pub fn claimed_volumes(spec: &VirtualMachineInstanceSpec) -> (Vec<ClaimedVolume>, Vec<SkippedVolume>) {
    let (mut claimed, mut skipped) = (Vec::new(), Vec::new());
    for disk in &spec.domain.devices.disks {
        let Some(volume) = spec.volumes.iter().find(|volume| volume.name == disk.name) else { continue };
        match claim_of(disk, volume) {
            Ok(claim) => claimed.push(ClaimedVolume { name: disk.name.clone(), claim }),
            Err(reason) => skipped.push(SkippedVolume { name: disk.name.clone(), reason }),
        }
    }
    (claimed, skipped)
}

fn claim_of(disk: &Disk, volume: &Volume) -> Result<String, String> {
    if disk.cdrom.is_some() {
        return Err("it is a CD-ROM".into());
    }
    if disk.lun.is_some() {
        return Err("it is a LUN: the guest speaks to the device itself".into());
    }
    if disk.shareable == Some(true) {
        return Err("it is shared with other VMs".into());
    }
    let claim = volume.persistent_volume_claim.as_ref().map(|source| &source.claim_name);
    let claim = claim.or(volume.data_volume.as_ref().map(|source| &source.name));
    match claim {
        Some(claim) if !claim.is_empty() => Ok(claim.clone()),
        _ => Err(format!("its data is not in a claim ({})", volume.other.keys().next().map_or("unknown", |kind| kind))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn disks_on_claims_are_backed_up_and_the_rest_says_why_not() {
        let spec: VirtualMachineInstanceSpec = serde_json::from_value(json!({
            "domain": {"devices": {"disks": [
                {"name": "root", "disk": {"bus": "virtio"}},
                {"name": "data"},
                {"name": "iso", "cdrom": {}},
                {"name": "init", "disk": {}},
                {"name": "lost", "disk": {}},
                {"name": "both", "disk": {}, "shareable": true},
            ]}},
            "volumes": [
                {"name": "root", "dataVolume": {"name": "root-dv"}},
                {"name": "data", "persistentVolumeClaim": {"claimName": "data-claim"}},
                {"name": "iso", "persistentVolumeClaim": {"claimName": "iso"}},
                {"name": "init", "cloudInitNoCloud": {"userData": "x"}},
                {"name": "both", "persistentVolumeClaim": {"claimName": "both"}},
            ],
        }))
        .unwrap();
        let (claimed, skipped) = claimed_volumes(&spec);
        let claims: Vec<_> = claimed.iter().map(|volume| (volume.name.as_str(), volume.claim.as_str())).collect();
        assert_eq!(claims, [("root", "root-dv"), ("data", "data-claim")]);
        let names: Vec<_> = skipped.iter().map(|volume| volume.name.as_str()).collect();
        assert_eq!(names, ["iso", "init", "both"]);
        assert!(skipped[1].reason.contains("cloudInitNoCloud"));
    }
}
