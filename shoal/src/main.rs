//! The `shoal` program.

fn main() -> std::process::ExitCode {
    shoal::main()
}
