//! The command line: one file per command.

mod agent;
mod backup;
mod backup_run;
mod check;
mod connection;
mod controller;
mod crds;
mod crds_reference;
mod error;
mod forget;
mod forget_plan;
mod inspect;
mod list;
mod mover;
mod output;
mod progress;
mod prune;
mod recover;
mod repository;
mod repository_args;
mod repository_info;
mod repository_key;
mod restore;
mod restore_repository;
mod serve_nbd;
mod serving;
mod size;
mod store;
mod target;
mod verify;

pub use error::CliError;

use clap::{Parser, Subcommand};
use output::Output;
use std::process::ExitCode;

/// Fleecing backups of running QEMU virtual machines.
///
/// Every disk is backed up as of one instant, taken while the guest writes; a slow, full or dead target never stalls
/// the guest. Results go to standard output, everything else to standard error.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES, max_term_width = 120)]
struct Cli {
    /// More of what happens on standard error (repeat for still more)
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Back up a running VM
    Backup(Box<backup::BackupArgs>),
    /// List backups
    List(list::ListArgs),
    /// Check that backups are what they were when they were written
    Verify(verify::VerifyArgs),
    /// Restore a VM's disks, or one of them, as of a backup
    Restore(restore::RestoreArgs),
    /// Serve a volume of a backup over NBD: look into it, copy from it or boot from it at once, without a restore
    ServeNbd(serve_nbd::ServeArgs),
    /// Forget backups in a repository, by a rule or by their ids
    Forget(Box<forget::ForgetArgs>),
    /// Make a repository, show, check and prune it, manage its passphrases
    #[command(subcommand)]
    Repository(repository::RepositoryCommand),
    /// Show a VM's disks, bitmaps, the engine that a backup would use and why, and what earlier runs left
    Inspect(inspect::InspectArgs),
    /// Remove what a backup that was killed left in a VM, and release the guest
    Recover(recover::RecoverArgs),
    /// Run the operator's controller in a cluster
    Controller(controller::ControllerArgs),
    /// Carry out the backups of a node's VMs (in the operator's `DaemonSet`)
    Agent(Box<agent::AgentArgs>),
    /// Store what an agent reads (in a pod that the operator's controller makes)
    Mover(mover::MoverArgs),
    /// Print the custom resource definitions of the operator
    Crds(crds::CrdsArgs),
    #[command(hide = true, name = crate::fleecing::guardian::SUBCOMMAND)]
    Guardian { socket: Option<std::path::PathBuf>, domain: Option<String> },
}

const EXIT_CODES: &str = "\
Exit codes: 0 done, 2 wrong usage, 3 VM unreachable, 4 backup failed, 5 damaged backup, 6 other failure of a command, \
130 interrupted, 143 terminated.";

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::Guardian { socket, domain } = cli.command {
        return if crate::fleecing::guardian::run(socket.zip(domain).as_ref()).is_ok() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
    }
    match cli.command.serving() {
        Some(log) => start_serving_log(cli.verbose, log.log_format),
        None => start_logging(cli.verbose),
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let output = cli.command.output();
    // On a worker of the runtime, which waits for sockets itself: this thread would have to be woken for each answer.
    let result = match runtime.block_on(runtime.spawn(run(cli.command))) {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    };
    // A thread that hangs in a dead target must not keep the program.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(error) => {
            output.error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

async fn run(command: Command) -> Result<ExitCode, CliError> {
    match command {
        Command::Backup(args) => backup::run(*args).await,
        Command::List(args) => list::run(args).await,
        Command::Verify(args) => verify::run(args).await,
        Command::Restore(args) => restore::run(args).await,
        Command::ServeNbd(args) => serve_nbd::run(args).await,
        Command::Forget(args) => forget::run(*args).await,
        Command::Repository(command) => repository::run(command).await,
        Command::Inspect(args) => inspect::run(args).await,
        Command::Recover(args) => recover::run(args).await,
        Command::Controller(args) => controller::run(args).await,
        Command::Agent(args) => agent::run(*args).await,
        Command::Mover(args) => mover::run(args).await,
        Command::Crds(args) => crds::run(&args),
        Command::Guardian { .. } => Ok(ExitCode::SUCCESS),
    }
}

impl Command {
    /// How a command logs that runs until it is told to end.
    fn serving(&self) -> Option<&serving::LogArgs> {
        match self {
            Self::Controller(args) => Some(&args.log),
            Self::Agent(args) => Some(&args.log),
            _ => None,
        }
    }

    fn output(&self) -> Output {
        match self {
            Self::Backup(args) => args.output,
            Self::List(args) => args.output,
            Self::Verify(args) => args.output,
            Self::Restore(args) => args.output,
            Self::ServeNbd(args) => args.output,
            Self::Forget(args) => args.output,
            Self::Repository(command) => command.output(),
            Self::Inspect(args) => args.output,
            Self::Recover(args) => args.output,
            Self::Controller(_) | Self::Agent(_) | Self::Mover(_) | Self::Crds(_) | Self::Guardian { .. } => {
                Output::Text
            }
        }
    }
}

fn log_filter(level: &str) -> tracing_subscriber::EnvFilter {
    tracing_subscriber::EnvFilter::try_from_env("VIRT_FLEECE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(format!("virt_fleece={level}")))
}

/// The log of a process of the operator: one step more talkative than that of a command.
fn start_serving_log(verbose: u8, format: serving::LogFormat) {
    let level = match verbose {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let log = tracing_subscriber::fmt().with_env_filter(log_filter(level)).with_writer(std::io::stderr);
    match format {
        serving::LogFormat::Json => {
            log.json().flatten_event(true).with_current_span(true).with_span_list(false).init();
        }
        serving::LogFormat::Text => {
            log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).with_target(false).init();
        }
    }
}

fn start_logging(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    tracing_subscriber::fmt()
        .with_env_filter(log_filter(level))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .init();
}
