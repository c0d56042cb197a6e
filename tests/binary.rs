//! The program under test. `shoal` itself, under a name that `env!("CARGO_BIN_EXE_shoal-under-test")` finds and that
//! is built whenever the tests are.

use std::process::ExitCode;

fn main() -> ExitCode {
    shoal::main()
}
