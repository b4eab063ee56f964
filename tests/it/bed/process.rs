//! Child processes: starting, waiting with a time limit, and killing.

use std::io;
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A command to start, and where the child goes.
type Order = (Command, SyncSender<io::Result<Child>>);

/// Starts a program that the kernel kills when this process ends, however it does; nothing else would end a server
/// that a killed test leaves behind. The program's path is the first argument to add to the command.
pub(crate) fn spawn_tethered(arguments: impl FnOnce(&mut Command)) -> io::Result<Child> {
    // The signal is sent when the *thread* that started the program ends, and a test's thread ends with the test. So
    // one thread that never ends starts them all.
    static KEEPER: LazyLock<Mutex<Sender<Order>>> = LazyLock::new(|| {
        let (orders, taken) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, reply) in taken {
                reply.send(command.spawn()).ok();
            }
        });
        Mutex::new(orders)
    });
    // `prctl` between fork and exec is unsafe code; this tool does it and becomes the program.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    arguments(&mut command);
    let (reply, child) = sync_channel(1);
    let order = KEEPER.lock().unwrap_or_else(PoisonError::into_inner).send((command, reply));
    order.expect("the keeper never ends");
    child.recv().expect("the keeper answers")
}

/// Waits until the child ends, or returns `None` when it has not within the limit.
pub(crate) fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    let pid = Pid::from_raw(child.id().cast_signed()).expect("a child has a pid");
    // An already reaped child answers at once; the descriptor of an unreaped one cannot be of another process.
    if let Some(status) = child.try_wait().expect("asking for a child's status") {
        return Some(status);
    }
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("a descriptor for a child");
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).expect("a limit of hours at most");
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(_) => return child.try_wait().expect("asking for a child's status"),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("waiting for a child: {}", io::Error::from(error)),
        }
    }
}

/// Kills the child (SIGKILL) and reaps it.
pub(crate) fn kill9(child: &mut Child) {
    // The error says that it has ended already.
    child.kill().ok();
    assert!(wait(child, Duration::from_secs(30)).is_some(), "process {} survives SIGKILL", child.id());
}
