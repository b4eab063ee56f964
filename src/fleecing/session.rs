//! One session on one QEMU process, from the first command to the last undo.

use super::{
    Budget, Disks, Engine, EngineChoice, FleeceDirectory, Journal, SessionError, View, Volume, budget,
    guardian::Guardian,
    journal::{Begin, Entry},
    names::{self, Slot},
    quiesce::{Quiesce, QuiesceOutcome},
    storage::{FleeceFile, worst_case},
    teardown,
};
use crate::{
    chain::{BitmapName, GRANULARITY, VolumePlan},
    qmp::{Qmp, command::*},
};
use jiff::Timestamp;
use std::{
    io,
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    time::{Duration, Instant},
};
use tokio::time::sleep;

/// How long QEMU may take to format a fleece.
const CREATE_LIMIT: Duration = Duration::from_secs(30);

/// What a session is asked to do.
#[derive(Debug)]
pub struct Request {
    /// Who it is for.
    pub begin: Begin,
    /// The disks and how each is backed up.
    pub disks: Vec<(Volume, VolumePlan)>,
    /// How the point in time is made.
    pub engine: EngineChoice,
    /// The most that all fleeces together may take, in bytes.
    pub fleece_limit: Option<u64>,
}

/// A disk of the session.
#[derive(Debug)]
pub struct SessionDisk {
    /// Its place.
    pub slot: Slot,
    /// The volume.
    pub volume: Volume,
    /// Full or incremental.
    pub plan: VolumePlan,
    /// Where old data goes.
    pub(super) fleece: FleeceFile,
}

impl SessionDisk {
    /// The bitmap that says what an incremental backup reads.
    pub fn previous_bitmap(&self) -> Option<String> {
        match &self.plan {
            VolumePlan::Full { .. } => None,
            VolumePlan::Incremental { bitmap, .. } => Some(bitmap.to_string()),
        }
    }
}

/// The point in time.
#[derive(Debug, Clone)]
pub struct Cut {
    /// When, by this host's clock: right after QEMU confirmed it.
    pub point_in_time: Timestamp,
    /// How long QEMU took for the transaction (job), or the CPUs stood still (filter).
    pub pause: Duration,
    /// What became of freezing.
    pub quiesce: QuiesceOutcome,
}

/// How a session ends for the bitmaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The backup is complete and durable: the new bitmaps are the chain's.
    Committed,
    /// It is not: the new bitmaps are merged back.
    RolledBack,
}

/// A session. Dropping it leaves everything in QEMU, as a crash would: call [`Session::end`].
#[derive(Debug)]
pub struct Session {
    pub(super) qmp: Qmp,
    journal: Journal,
    pub(super) directory: FleeceDirectory,
    begin: Begin,
    pub(super) engine: EngineChoice,
    pub(super) disks: Vec<SessionDisk>,
    pub(super) budget: Budget,
    socket: PathBuf,
    nbd_server: bool,
}

impl Session {
    /// Prepares fleeces and NBD server. Nothing touches the guest's disks yet. On an error everything is undone.
    pub async fn prepare(
        qmp: Qmp,
        directory: FleeceDirectory,
        journal: Journal,
        request: Request,
    ) -> Result<Self, SessionError> {
        let sizes: Vec<u64> = request.disks.iter().map(|(volume, _)| volume.virtual_size).collect();
        let available = directory.available()?;
        let no_space = || SessionError::NoFleeceSpace { path: directory.path().to_owned(), available };
        let budget = budget(&sizes, available, request.fleece_limit).ok_or_else(no_space)?;
        let socket = journal.path().with_extension("nbd");
        let mut session = Self {
            qmp,
            journal,
            directory,
            begin: request.begin,
            engine: request.engine,
            disks: Vec::new(),
            budget,
            socket,
            nbd_server: false,
        };
        match session.prepare_all(request.disks).await {
            Ok(()) => Ok(session),
            Err(error) => {
                session.undo_quietly().await;
                Err(error)
            }
        }
    }

    /// Id of the backup.
    pub fn backup(&self) -> &str {
        &self.begin.backup
    }

    /// The disks.
    pub fn disks(&self) -> &[SessionDisk] {
        &self.disks
    }

    /// How the fleeces are kept from running full.
    pub fn budget(&self) -> Budget {
        self.budget
    }

    /// Whether what was read is discarded from the snapshot: the guest's later writes there are not slowed by a copy any
    /// more, and the fleece shrinks.
    ///
    /// A copy that is under way at that very moment may land in the fleece behind the discard, where the space reserved
    /// for it is free for others by now. Where a full fleece hits the guest, reserved space is therefore kept.
    pub fn discards(&self) -> bool {
        let may = self.engine.guest_safe || self.budget != Budget::Reserved;
        // For tests that compare.
        self.engine.discards && may && std::env::var_os("VIRT_FLEECE_TEST_NO_DISCARD").is_none()
    }

    async fn prepare_all(&mut self, disks: Vec<(Volume, VolumePlan)>) -> Result<(), SessionError> {
        self.note(&Entry::Begin(self.begin.clone()))?;
        for (index, (volume, plan)) in disks.into_iter().enumerate() {
            let slot = Slot(u16::try_from(index).unwrap_or(u16::MAX));
            self.note(&Entry::PrepareFleece(slot.0))?;
            let fleece = self.directory.create_file()?;
            let size = volume.virtual_size;
            if self.engine.view == View::SnapshotAccess {
                fleece.set_len(size).map_err(SessionError::local("sizing the fleece"))?;
            }
            if self.budget == Budget::Reserved
                && let Err(error) = fleece.reserve(worst_case(size))
            {
                // Not every file system can (fallocate on tmpfs can, on some network ones not): watch instead.
                tracing::warn!(%error, "the fleece's space cannot be reserved; it is watched instead");
                let available = self.directory.available()?;
                self.budget = Budget::Watched { limit: available / 10 * 9 };
            }
            self.add_fleece(slot, &volume, &fleece).await?;
            self.disks.push(SessionDisk { slot, volume, plan, fleece });
        }
        self.start_nbd_server().await?;
        self.prepare_end_marks().await
    }

    async fn add_fleece(&self, slot: Slot, volume: &Volume, fleece: &FleeceFile) -> Result<(), SessionError> {
        let attempt = || SessionError::qmp(format!("preparing the fleece of volume `{}`", volume.name));
        for fd in fleece.descriptors().map_err(SessionError::local("duplicating the fleece's descriptor"))? {
            let add = AddFd { fdset_id: slot.fleece_fdset(), opaque: names::FDSET_OPAQUE.into() };
            self.qmp.execute_with_fds(&add, vec![fd]).await.map_err(attempt())?;
        }
        let file = NodeOptions::File {
            filename: format!("/dev/fdset/{}", slot.fleece_fdset()),
            locking: "off",
            // The fleece dies with the session: nothing of it has to reach the disk.
            cache: Some(CacheOptions { direct: false, no_flush: true }),
            discard: self.engine.discards.then_some("unmap"),
        };
        if self.engine.view == View::SnapshotAccess {
            let add = BlockdevAdd { node_name: slot.fleece(), options: file };
            self.qmp.execute(&add).await.map_err(attempt())?;
            return Ok(());
        }
        let add = BlockdevAdd { node_name: slot.fleece_file(), options: file };
        self.qmp.execute(&add).await.map_err(attempt())?;
        let create = BlockdevCreate {
            job_id: slot.create_job(&self.begin.backup),
            options: CreateOptions::Qcow2 {
                file: slot.fleece_file(),
                size: volume.virtual_size,
                cluster_size: GRANULARITY,
            },
        };
        self.qmp.execute(&create).await.map_err(attempt())?;
        self.wait_for_create(slot, volume).await?;
        let options = NodeOptions::Qcow2 { file: slot.fleece_file(), backing: Some(volume.format_node.clone()) };
        let add = BlockdevAdd { node_name: slot.fleece(), options };
        self.qmp.execute(&add).await.map_err(attempt())?;
        Ok(())
    }

    async fn wait_for_create(&self, slot: Slot, volume: &Volume) -> Result<(), SessionError> {
        let id = slot.create_job(&self.begin.backup);
        let deadline = Instant::now() + CREATE_LIMIT;
        loop {
            let jobs = self.qmp.execute(&QueryJobs {}).await.map_err(SessionError::qmp("formatting the fleece"))?;
            let lost = |detail: String| SessionError::JobLost { volume: volume.name.clone(), job: id.clone(), detail };
            let Some(job) = jobs.into_iter().find(|job| job.id == id) else {
                return Err(lost("it disappeared".into()));
            };
            if job.status == "concluded" {
                let dismiss = JobDismiss { id: id.clone() };
                self.qmp.execute(&dismiss).await.map_err(SessionError::qmp("formatting the fleece"))?;
                return job.error.map_or(Ok(()), |error| Err(lost(error)));
            }
            if Instant::now() > deadline {
                return Err(SessionError::Stuck { what: format!("job {id}"), limit: CREATE_LIMIT });
            }
            sleep(Duration::from_millis(2)).await;
        }
    }

    /// Before the cut, so that a server of somebody else's is found before anything happens to the guest.
    async fn start_nbd_server(&mut self) -> Result<(), SessionError> {
        self.note(&Entry::StartNbdServer)?;
        let listener = short_path(&self.socket)
            .and_then(|path| {
                let _ = std::fs::remove_file(&self.socket);
                UnixListener::bind(path.1)
            })
            .map_err(SessionError::local("opening the NBD socket"))?;
        let fd = listener.as_fd().try_clone_to_owned().map_err(SessionError::local("opening the NBD socket"))?;
        let get = GetFd { fdname: names::LISTENER_FD.into() };
        self.qmp.execute_with_fds(&get, vec![fd]).await.map_err(SessionError::qmp("handing over the NBD socket"))?;
        let addr = ServerAddress::Fd { str: names::LISTENER_FD.into() };
        self.qmp.execute(&NbdServerStart { addr }).await.map_err(SessionError::qmp(
            "starting QEMU's NBD server (there is one per VM: another backup or a storage migration may be running)",
        ))?;
        self.nbd_server = true;
        Ok(())
    }

    /// Freezes if wanted, makes the point in time, thaws. On an error the guest runs and is thawed; the caller ends
    /// the session.
    pub async fn cut(&mut self, quiesce: &mut Quiesce, guardian: &mut Guardian) -> Result<Cut, SessionError> {
        if !quiesce.is_wanted() {
            let (point_in_time, pause) = self.make_cut(guardian).await?;
            return Ok(Cut { point_in_time, pause, quiesce: quiesce.outcome() });
        }
        self.note(&Entry::Freeze)?;
        let result = match quiesce.freeze(guardian).await {
            Ok(()) => self.make_cut(guardian).await,
            Err(error) => Err(error),
        };
        // Right behind the cut, whatever came of it.
        let outcome = quiesce.thaw(guardian).await;
        self.note(&Entry::Thawed)?;
        result.map(|(point_in_time, pause)| Cut { point_in_time, pause, quiesce: outcome })
    }

    async fn make_cut(&mut self, guardian: &mut Guardian) -> Result<(Timestamp, Duration), SessionError> {
        match self.engine.engine {
            Engine::Job => self.cut_by_jobs().await,
            Engine::Filter => self.cut_by_filters(guardian).await,
        }
    }

    /// One transaction: first the backup jobs, which hold their disks drained until its end, then the bitmaps. The
    /// other way round the guest writes between the two, and about one changed block in 10^4 is in no bitmap.
    async fn cut_by_jobs(&mut self) -> Result<(Timestamp, Duration), SessionError> {
        self.note(&Entry::Cut)?;
        let jobs = self.disks.iter().map(|disk| {
            TransactionAction::BlockdevBackup(BlockdevBackup {
                job_id: disk.slot.fleece_job(&self.begin.backup),
                device: disk.volume.format_node.clone(),
                target: disk.slot.fleece(),
                sync: "none",
                filter_node_name: Some(disk.slot.filter()),
                on_cbw_error: self.engine.guest_safe.then_some("break-snapshot"),
                bitmap: None,
                bitmap_mode: None,
                speed: None,
                compress: None,
                auto_dismiss: false,
                x_perf: None,
            })
        });
        let actions = jobs.chain(self.new_bitmaps()).chain(self.disable_previous()).collect();
        let begun = Instant::now();
        let made = self.qmp.execute(&Transaction { actions }).await;
        if let Err(error) = made.map_err(SessionError::qmp("making the point in time")) {
            return Err(self.or_resized(error).await);
        }
        Ok((Timestamp::now(), begun.elapsed()))
    }

    /// Per disk, so the CPUs stand still around all of them: without that the disks' instants differ.
    async fn cut_by_filters(&mut self, guardian: &mut Guardian) -> Result<(Timestamp, Duration), SessionError> {
        self.note(&Entry::Cut)?;
        let actions = self.new_bitmaps().collect();
        let started = self.qmp.execute(&Transaction { actions }).await;
        if let Err(error) = started.map_err(SessionError::qmp("starting the bitmaps")) {
            return Err(self.or_resized(error).await);
        }
        let status = self.qmp.execute(&QueryStatus {}).await.map_err(SessionError::qmp("reading the VM's state"))?;
        for disk in &self.disks {
            let filter = NodeOptions::CopyBeforeWrite {
                file: disk.volume.root_node.clone(),
                target: disk.slot.fleece(),
                bitmap: None,
                on_cbw_error: "break-snapshot",
                cbw_timeout: None,
            };
            let add = BlockdevAdd { node_name: disk.slot.filter(), options: filter };
            self.qmp.execute(&add).await.map_err(SessionError::qmp("adding the filter"))?;
        }
        if !status.running {
            let begun = Instant::now();
            self.switch_drives().await?;
            return Ok((Timestamp::now(), begun.elapsed()));
        }
        self.note(&Entry::Stop)?;
        guardian.watch_stop();
        let begun = Instant::now();
        let stopped = self.qmp.execute(&Stop {}).await.map_err(SessionError::qmp("stopping the CPUs"));
        let switched = match stopped {
            Ok(_) => self.switch_drives().await,
            Err(error) => Err(error),
        };
        let at = Timestamp::now();
        let continued = self.qmp.execute(&Cont {}).await.map_err(SessionError::qmp("continuing the CPUs"));
        let pause = begun.elapsed();
        continued?;
        guardian.stop_ended();
        self.note(&Entry::Continued)?;
        switched?;
        Ok((at, pause))
    }

    async fn switch_drives(&mut self) -> Result<(), SessionError> {
        let switches: Vec<_> = self
            .disks
            .iter()
            .map(|disk| (disk.slot, disk.volume.qdev.clone(), disk.volume.root_node.clone()))
            .collect();
        for (slot, qdev, original) in switches {
            let attempt = || SessionError::qmp(format!("putting the filter on {qdev}"));
            self.note(&Entry::SwitchDrive { slot: slot.0, qdev: qdev.clone(), original })?;
            let get = QomGet { path: qdev.clone(), property: "drive".into() };
            let drive = self.qmp.execute(&get).await.map_err(attempt())?;
            // Setting the node that is there already aborts QEMU 10.0.2 and kills the guest.
            if drive != slot.filter() {
                let set = QomSet { path: qdev.clone(), property: "drive".into(), value: slot.filter().into() };
                self.qmp.execute(&set).await.map_err(attempt())?;
            }
        }
        let actions: Vec<_> = self.disable_previous().collect();
        if !actions.is_empty() {
            let attempt = SessionError::qmp("stopping the previous bitmaps");
            self.qmp.execute(&Transaction { actions }).await.map_err(attempt)?;
        }
        Ok(())
    }

    /// For each disk a bitmap that records, and its end mark.
    fn new_bitmaps(&self) -> impl Iterator<Item = TransactionAction> + '_ {
        let new = self.new_name();
        self.disks.iter().flat_map(move |disk| {
            let add = |name: String, disabled| {
                TransactionAction::BlockDirtyBitmapAdd(BitmapAdd {
                    node: disk.volume.format_node.clone(),
                    name,
                    granularity: GRANULARITY,
                    persistent: disk.volume.persistent_bitmaps,
                    disabled,
                })
            };
            [add(new.to_string(), false), add(new.end_mark(), true), Self::set_end_mark(disk, new.end_mark())]
        })
    }

    fn disable_previous(&self) -> impl Iterator<Item = TransactionAction> + '_ {
        self.disks.iter().filter_map(|disk| {
            let name = disk.previous_bitmap()?;
            let bitmap = BitmapRef { node: disk.volume.format_node.clone(), name };
            Some(TransactionAction::BlockDirtyBitmapDisable(bitmap))
        })
    }

    /// Name of the bitmap that this session starts on every disk.
    pub fn new_bitmap(&self) -> String {
        self.new_name().to_string()
    }

    pub(super) fn new_name(&self) -> BitmapName {
        BitmapName::new(&self.begin.bitmap_line, &self.begin.backup)
    }

    /// Makes the snapshots readable over NBD.
    pub async fn export(&mut self) -> Result<(), SessionError> {
        self.check_end_marks().await?;
        for index in 0..self.disks.len() {
            let slot = self.disks[index].slot;
            if self.engine.view == View::SnapshotAccess {
                self.note(&Entry::OpenSnapshot(slot.0))?;
                let options =
                    NodeOptions::SnapshotAccess { file: slot.filter(), discard: self.discards().then_some("unmap") };
                let add = BlockdevAdd { node_name: slot.snapshot(), options };
                self.qmp.execute(&add).await.map_err(SessionError::qmp("opening the snapshot"))?;
            }
            self.note(&Entry::Export(slot.0))?;
            let disk = &self.disks[index];
            let bitmap = disk.previous_bitmap();
            let node_name = match self.engine.view {
                View::SnapshotAccess => slot.snapshot(),
                View::Overlay => slot.fleece(),
            };
            let add = BlockExportAdd {
                kind: "nbd",
                id: slot.export(),
                node_name,
                name: slot.export(),
                // Writes through a snapshot fail; this allows discards, and nothing else.
                writable: self.discards(),
                bitmaps: bitmap
                    .map(|name| BitmapSource(BitmapRef { node: disk.volume.format_node.clone(), name }))
                    .into_iter()
                    .collect(),
            };
            let attempt = format!("exporting the snapshot of volume `{}`", disk.volume.name);
            self.qmp.execute(&add).await.map_err(SessionError::qmp(attempt))?;
        }
        Ok(())
    }

    /// A connection to QEMU's NBD server.
    pub fn connect(&self) -> Result<UnixStream, SessionError> {
        short_path(&self.socket)
            .and_then(|path| UnixStream::connect(path.1))
            .map_err(SessionError::local("connecting to QEMU's NBD server"))
    }

    /// The backup is about to be committed at its target.
    pub fn note_committing(&mut self) -> Result<(), SessionError> {
        self.note(&Entry::Committing)
    }

    /// Takes everything but the bitmaps out of QEMU, once all was read and the snapshot is proved unbroken: the VM must
    /// not wait for a target that takes its time to make the backup durable. [`Session::end`] has to follow.
    pub async fn release(&mut self) -> Result<(), SessionError> {
        teardown::remove_all(&self.qmp, self.nbd_server).await?;
        self.nbd_server = false;
        Ok(())
    }

    /// Takes everything out of QEMU and puts the bitmaps in order. To be called however the session went.
    pub async fn end(mut self, outcome: Outcome) -> Result<(), SessionError> {
        // A journal that cannot be written (its file system is full) must not keep anything in the VM.
        if let Err(error) = self.note(&Entry::Teardown) {
            tracing::warn!(error = &error as &dyn std::error::Error, "the journal cannot be written");
        }
        teardown::remove_all(&self.qmp, self.nbd_server).await?;
        let _ = std::fs::remove_file(&self.socket);
        match outcome {
            Outcome::Committed => {
                let disks = self.disks.iter().map(|disk| disk.volume.name.as_str()).collect::<Vec<_>>();
                let head = |volume: &str| disks.contains(&volume).then(|| self.begin.backup.clone());
                teardown::settle_bitmaps(&self.qmp, &self.begin.bitmap_line, head).await?;
            }
            Outcome::RolledBack => self.roll_back().await?,
        }
        self.journal.close().map_err(SessionError::local("closing the journal"))
    }

    /// Ends a session that was released, without a decision about its bitmaps: whether the backup is complete is not
    /// known. Both generations stay, and with them the journal, by which the next run asks the target.
    pub fn leave(self) {
        let _ = std::fs::remove_file(&self.socket);
    }

    /// Gives the previous bitmaps back what the new ones recorded.
    async fn roll_back(&self) -> Result<(), SessionError> {
        let new = self.new_bitmap();
        let disks = Disks::discover(&self.qmp).await?;
        for disk in &self.disks {
            let node = disk.volume.format_node.clone();
            let Some(now) = disks.volumes.iter().find(|volume| volume.format_node == node) else { continue };
            let exists = |name: &str| now.bitmaps.iter().any(|bitmap| bitmap.name.as_deref() == Some(name));
            if !exists(&new) {
                continue;
            }
            let new = BitmapRef { node: node.clone(), name: new.clone() };
            let mut actions = Vec::new();
            if let Some(previous) = disk.previous_bitmap().filter(|name| exists(name)) {
                let target = BitmapRef { node: node.clone(), name: previous.clone() };
                actions.push(TransactionAction::BlockDirtyBitmapEnable(target));
                actions.push(TransactionAction::BlockDirtyBitmapMerge(BitmapMerge {
                    node,
                    target: previous,
                    bitmaps: vec![new.clone()],
                }));
            }
            actions.push(TransactionAction::BlockDirtyBitmapRemove(new));
            let mark = self.new_name().end_mark();
            if exists(&mark) {
                let mark = BitmapRef { node: disk.volume.format_node.clone(), name: mark };
                actions.push(TransactionAction::BlockDirtyBitmapRemove(mark));
            }
            self.qmp.execute(&Transaction { actions }).await.map_err(SessionError::qmp("rolling back the bitmaps"))?;
        }
        Ok(())
    }

    async fn undo_quietly(self) {
        if let Err(error) = self.end(Outcome::RolledBack).await {
            tracing::error!(error = &error as &dyn std::error::Error, "the VM could not be cleaned up");
        }
    }

    pub(super) fn note(&mut self, entry: &Entry) -> Result<(), SessionError> {
        self.journal.append(entry).map_err(SessionError::local("writing the session's journal"))
    }
}

/// A path to the socket that fits into the 108 bytes of a Unix socket address, by way of its directory's descriptor
/// (which has to be held as long as the path is used).
fn short_path(socket: &std::path::Path) -> io::Result<(std::fs::File, PathBuf)> {
    use std::os::fd::AsRawFd;
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let directory = std::fs::File::open(socket.parent().ok_or_else(invalid)?)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    Ok((directory, path.join(socket.file_name().ok_or_else(invalid)?)))
}
