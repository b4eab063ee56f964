//! The kubelet's directory: sockets in the `emptyDir` volumes of pods.
//!
//! Tenants own what is in these volumes. So a path below a pod's directory is never walked by the kernel on its own: each
//! step is resolved beneath the directory before it, without links (`openat2`), and a socket is connected through a
//! descriptor of the very inode that was looked at. Who answers is checked afterwards.

use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags},
    net::sockopt::socket_peercred,
};
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

/// Where the kubelet keeps `emptyDir` volumes of a pod (`pkg/volume/emptydir`).
const EMPTY_DIRS: &str = "volumes/kubernetes.io~empty-dir";

/// Why a socket in a pod cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KubeletError {
    /// A name of a pod or volume is none.
    #[error("`{0}` is no name of a pod's directory")]
    BadName(String),
    /// The directory or socket cannot be opened.
    #[error("{path} of pod {pod} cannot be opened")]
    Open {
        /// UID of the pod.
        pod: String,
        /// Below the pod's directory.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is not a socket.
    #[error("{path} of pod {pod} is not a socket")]
    NoSocket {
        /// UID of the pod.
        pod: String,
        /// Below the pod's directory.
        path: String,
    },
    /// Somebody else answers.
    #[error("{path} of pod {pod} is served by a process that does not belong to the pod ({detail})")]
    Foreign {
        /// UID of the pod.
        pod: String,
        /// Below the pod's directory.
        path: String,
        /// Who it is.
        detail: String,
    },
}

/// The kubelet's directory.
#[derive(Debug, Clone)]
pub struct KubeletDirectory {
    path: PathBuf,
    /// Whether processes of pods are told by their control groups; not where the kubelet is a stand-in without any.
    check_cgroups: bool,
}

/// A socket in a pod, held by its inode.
#[derive(Debug)]
pub struct PodSocket {
    inode: OwnedFd,
    pod: String,
    path: String,
    check_cgroups: bool,
}

impl KubeletDirectory {
    /// At this path, `/var/lib/kubelet` as a rule.
    pub fn new(path: PathBuf, check_cgroups: bool) -> Self {
        Self { path, check_cgroups }
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A socket of a pod: in its volume with this name.
    pub fn socket(&self, pod_uid: &str, volume: &str, name: &str) -> Result<PodSocket, KubeletError> {
        // A UID comes from the API server, but it becomes part of a path.
        for part in [pod_uid, volume, name] {
            let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
            if part.is_empty() || part.starts_with('.') || !part.chars().all(good) {
                return Err(KubeletError::BadName(part.chars().take(80).collect()));
            }
        }
        let path = format!("{EMPTY_DIRS}/{volume}/{name}");
        let failed = |source: rustix::io::Errno| KubeletError::Open {
            pod: pod_uid.to_owned(),
            path: path.clone(),
            source: source.into(),
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(self.path.join("pods"), flags, Mode::empty()).map_err(failed)?;
        let pod = beneath(&root, pod_uid, flags).map_err(failed)?;
        let directory = beneath(&pod, &format!("{EMPTY_DIRS}/{volume}"), flags).map_err(failed)?;
        let inode = beneath(&directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC).map_err(failed)?;
        let stat = rustix::fs::fstat(&inode).map_err(failed)?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Socket {
            return Err(KubeletError::NoSocket { pod: pod_uid.to_owned(), path });
        }
        Ok(PodSocket { inode, pod: pod_uid.to_owned(), path, check_cgroups: self.check_cgroups })
    }

    /// Whether the pod's directory is there.
    pub fn has_pod(&self, pod_uid: &str) -> bool {
        let good = !pod_uid.is_empty() && pod_uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        good && self.path.join("pods").join(pod_uid).symlink_metadata().is_ok_and(|it| it.is_dir())
    }
}

/// Opens what is beneath a directory, by way of no link and no other mount point's magic.
fn beneath(directory: &OwnedFd, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(directory, path, flags, Mode::empty(), resolve)
}

impl PodSocket {
    /// A path that leads to this very inode for as long as this is held, also from other processes of this user: a link
    /// that the kernel itself keeps, which names nothing that could be replaced.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.inode.as_raw_fd()))
    }

    /// Connects, and looks at who answers.
    pub async fn connect(&self) -> Result<tokio::net::UnixStream, KubeletError> {
        let failed = |source: io::Error| KubeletError::Open { pod: self.pod.clone(), path: self.path.clone(), source };
        let stream = tokio::net::UnixStream::connect(self.path()).await.map_err(failed)?;
        self.check_peer(std::os::fd::AsFd::as_fd(&stream))?;
        Ok(stream)
    }

    /// Whether the process that serves the socket belongs to the pod. Its credentials are those at the time when it
    /// began to listen (`unix(7)`, `SO_PEERCRED`).
    pub fn check_peer(&self, stream: BorrowedFd<'_>) -> Result<(), KubeletError> {
        if !self.check_cgroups {
            return Ok(());
        }
        let foreign = |detail: String| KubeletError::Foreign { pod: self.pod.clone(), path: self.path.clone(), detail };
        let peer = socket_peercred(stream).map_err(|error| foreign(error.to_string()))?;
        let pid = peer.pid.as_raw_nonzero();
        let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
            .map_err(|error| foreign(format!("process {pid}: {error}")))?;
        if is_of_pod(&cgroup, &self.pod) {
            return Ok(());
        }
        Err(foreign(format!("process {pid} of user {}", peer.uid.as_raw())))
    }
}

/// Whether a control group is one of a pod's: both drivers of the kubelet put the UID into its name, with `-` or `_`
/// (`pkg/kubelet/cm`, `GetPodCgroupNameSuffix`).
fn is_of_pod(cgroup: &str, pod_uid: &str) -> bool {
    let (plain, systemd) = (format!("pod{pod_uid}"), format!("pod{}", pod_uid.replace('-', "_")));
    cgroup.lines().any(|line| {
        let path = line.splitn(3, ':').nth(2).unwrap_or_default();
        path.split('/').any(|part| {
            let part = part.trim_end_matches(".slice");
            part == plain || part.rsplit('-').next() == Some(systemd.as_str()) || part == systemd
        })
    })
}

/// Whether the directory exists at all: a mistake in the configuration otherwise.
pub(super) fn check(path: &Path) -> io::Result<()> {
    rustix::fs::openat(CWD, path.join("pods"), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::{fs::symlink, net::UnixListener};

    const POD: &str = "0b6fa3a5-6c1b-4b2e-9d55-3f2b7f4c1a11";

    fn node() -> (tempfile::TempDir, KubeletDirectory, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let volume = root.path().join("pods").join(POD).join(EMPTY_DIRS).join("libvirt-runtime");
        std::fs::create_dir_all(&volume).unwrap();
        let directory = KubeletDirectory::new(root.path().to_owned(), false);
        (root, directory, volume)
    }

    /// Listens in a directory whose path is too long for the address of a socket.
    fn listen(directory: &Path, name: &str) -> UnixListener {
        let held = std::fs::File::open(directory).unwrap();
        UnixListener::bind(format!("/proc/self/fd/{}/{name}", held.as_raw_fd())).unwrap()
    }

    fn open(directory: &KubeletDirectory) -> Result<PodSocket, KubeletError> {
        directory.socket(POD, "libvirt-runtime", "virtqemud-sock")
    }

    #[tokio::test]
    async fn a_socket_is_found_and_stays_the_one_that_was_looked_at() {
        let (_root, directory, volume) = node();
        let path = volume.join("virtqemud-sock");
        let listener = listen(&volume, "virtqemud-sock");
        let socket = open(&directory).unwrap();
        // Swapped behind our back: the connection goes to the inode that was checked.
        std::fs::rename(&path, volume.join("elsewhere")).unwrap();
        let other = listen(&volume, "virtqemud-sock");
        other.set_nonblocking(true).unwrap();
        let _stream = socket.connect().await.unwrap();
        listener.accept().unwrap();
        assert!(other.accept().is_err());
    }

    #[test]
    fn links_anywhere_on_the_way_are_refused() {
        let (root, directory, volume) = node();
        let outside = root.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        let _listener = listen(&outside, "virtqemud-sock");
        symlink(outside.join("virtqemud-sock"), volume.join("virtqemud-sock")).unwrap();
        assert!(matches!(open(&directory), Err(KubeletError::NoSocket { .. } | KubeletError::Open { .. })));
        std::fs::remove_dir_all(&volume).unwrap();
        symlink(&outside, &volume).unwrap();
        assert!(matches!(open(&directory), Err(KubeletError::Open { .. })));
        let pods = root.path().join("pods");
        std::fs::remove_dir_all(pods.join(POD)).unwrap();
        symlink(&outside, pods.join(POD)).unwrap();
        assert!(matches!(open(&directory), Err(KubeletError::Open { .. })));
        assert!(!directory.has_pod(POD));
    }

    #[test]
    fn files_devices_pipes_and_strange_names_are_refused() {
        let (_root, directory, volume) = node();
        let path = volume.join("virtqemud-sock");
        std::fs::write(&path, "x").unwrap();
        assert!(matches!(open(&directory), Err(KubeletError::NoSocket { .. })));
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mkfifoat(CWD, &path, Mode::RUSR).unwrap();
        assert!(matches!(open(&directory), Err(KubeletError::NoSocket { .. })), "and it does not hang");
        for bad in ["..", ".", "", "a/b", "../../etc", "a\0b"] {
            let refused = directory.socket(bad, "libvirt-runtime", "virtqemud-sock");
            assert!(matches!(refused, Err(KubeletError::BadName(_))), "{bad:?}");
            assert!(matches!(directory.socket(POD, bad, "x"), Err(KubeletError::BadName(_))), "{bad:?}");
        }
    }

    #[test]
    fn control_groups_tell_the_pod() {
        let systemd = format!(
            "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{}.slice/cri-x.scope\n",
            POD.replace('-', "_")
        );
        let plain = format!("4:memory:/kubepods/besteffort/pod{POD}/0123\n1:name=systemd:/x\n");
        assert!(is_of_pod(&systemd, POD));
        assert!(is_of_pod(&plain, POD));
        let other = POD.replace("0b6f", "ffff");
        assert!(!is_of_pod(&systemd, &other));
        assert!(!is_of_pod(&plain, &other));
        assert!(!is_of_pod(&format!("0::/user.slice/evilpod{POD}\n"), POD));
        assert!(!is_of_pod("", POD));
    }

    #[tokio::test]
    async fn a_process_outside_the_pod_is_not_believed() {
        let (root, _, volume) = node();
        let directory = KubeletDirectory::new(root.path().to_owned(), true);
        let _listener = listen(&volume, "virtqemud-sock");
        let socket = open(&directory).unwrap();
        assert!(matches!(socket.connect().await, Err(KubeletError::Foreign { .. })));
    }
}
