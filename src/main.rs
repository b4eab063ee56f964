//! The `virt-fleece` command.

fn main() -> std::process::ExitCode {
    virt_fleece::cli::main()
}
