//! How fast the kernels are, beside what the machine can do at most: the figures of `shoal bench --kernels`.

use std::{hint::black_box, time::Duration};

use half::bf16;

use crate::{
    Bits, Error,
    checkpoint::memory::Memory,
    kernels::{Factors, HEADS_MAX, Isa, Lines, Product, Softmax, attend, limits, packed, products, threads},
    tune::FILL,
};

/// One kernel.
#[derive(Clone, Debug)]
pub struct Figure {
    pub name: String,
    /// `GB/s`, `GOP/s` of int8 or `GFLOP/s`; two operations a multiply-add.
    pub unit: &'static str,
    pub value: f64,
    /// What the machine's limit was in the same run.
    pub limit: f64,
}

/// Beyond most caches.
const MEMORY_BYTES: usize = 1 << 30;
const READ_PART: usize = 1 << 20;
const WIDTH: usize = 2048;
/// Outputs of the matrices that many rows are multiplied with.
const OUTPUTS: usize = 8 * 1536;
/// The best of so many runs counts, of kernels and limits alike. They are by turns: what a machine can do changes within
/// seconds.
const RUNS: usize = 5;

/// Work, in operations or bytes, and what does it.
type Run<'a> = (f64, &'a dyn Fn());

/// The best rates of `kernel` and of `limit`, in billions a second.
fn rates(elapsed: &dyn Fn() -> Duration, kernel: Run<'_>, limit: Run<'_>) -> (f64, f64) {
    let time = |run: &dyn Fn()| {
        let before = elapsed();
        run();
        elapsed().saturating_sub(before).as_secs_f64().max(1e-9)
    };
    let (mut of_kernel, mut of_limit) = (f64::MAX, f64::MAX);
    for _ in 0..RUNS {
        of_limit = of_limit.min(time(limit.1));
        of_kernel = of_kernel.min(time(kernel.1));
    }
    (kernel.0 / of_kernel / 1e9, limit.0 / of_limit / 1e9)
}

/// Measures with the threads installed here. `elapsed` is the time since whenever.
pub fn kernels(elapsed: &dyn Fn() -> Duration, huge_pages: bool) -> Result<Vec<Figure>, Error> {
    let n_threads = threads::count();
    let mut memory = Memory::new(MEMORY_BYTES, huge_pages)
        .map_err(|error| Error::new(format!("no memory for {MEMORY_BYTES} bytes: {error}")))?;
    memory.fill(FILL);
    let parts: Vec<&[u8]> = memory.chunks(READ_PART).collect();
    let read = || {
        threads::run(parts.len(), &|part| {
            black_box(limits::read(parts[part]));
        });
    };
    let on_all_threads =
        |run: &(dyn Fn() -> usize + Sync)| threads::run(n_threads, &|_| _ = black_box(run()));
    let work_of = |run: &dyn Fn() -> usize| (2 * run() * n_threads) as f64;
    let multiply_i8 = || black_box(limits::multiply_i8(black_box(1))).0;
    let multiply_i4 = || black_box(limits::multiply_i4(black_box(1))).0;
    let multiply_f32 = || black_box(limits::multiply_f32(black_box(1.0))).0;
    let (limit_i8, limit_i4) = (|| on_all_threads(&multiply_i8), || on_all_threads(&multiply_i4));
    let limit_f32 = || on_all_threads(&multiply_f32);
    let bytes: Run<'_> = (MEMORY_BYTES as f64, &read);
    let int8: Run<'_> = (work_of(&multiply_i8), &limit_i8);
    let int4: Run<'_> = (work_of(&multiply_i4), &limit_i4);
    let f32: Run<'_> = (work_of(&multiply_f32), &limit_f32);
    let mut figures = Vec::new();
    let mut compare = |name: String, unit, kernel: Run<'_>, limit: Run<'_>| {
        let (value, limit) = rates(elapsed, kernel, limit);
        figures.push(Figure { name, unit, value, limit });
    };

    if Isa::detect().has_tiles() {
        let tiles = || on_all_threads(&limits::multiply_tiles);
        compare("int8, tiles alone".to_owned(), "GOP/s", (work_of(&limits::multiply_tiles), &tiles), int8);
    }
    let names = [(Bits::Eight, "int8"), (Bits::Four, "int4")];
    for (bits, name) in names {
        let outputs = MEMORY_BYTES / bits.panel_bytes(WIDTH) * packed::OUTPUTS;
        let n_bytes = bits.matrix_bytes(outputs, WIDTH);
        let rows = packed::Rows::quantize(&[0.5; WIDTH], WIDTH);
        let run = || {
            let factors = Factors::Packed(&rows, bits, &memory[..n_bytes]);
            black_box(products(&[Product { width: WIDTH, outputs, factors }]));
        };
        compare(format!("{name}, 1 row"), "GB/s", (n_bytes as f64, &run), bytes);
    }
    let halves: &[bf16] = bytemuck::cast_slice(&memory[..MEMORY_BYTES]);
    let run = || {
        let factors = Factors::Bf16(&[0.5; WIDTH], halves);
        black_box(products(&[Product { width: WIDTH, outputs: halves.len() / WIDTH, factors }]));
    };
    compare("bf16, 1 row".to_owned(), "GB/s", (MEMORY_BYTES as f64, &run), bytes);
    for n_rows in [16, 64, 512] {
        let x = vec![0.5; n_rows * WIDTH];
        let rows = packed::Rows::quantize(&x, WIDTH);
        let work = (2 * n_rows * WIDTH * OUTPUTS) as f64;
        for (bits, name) in names {
            let n_bytes = bits.matrix_bytes(OUTPUTS, WIDTH);
            let run = || {
                let factors = Factors::Packed(&rows, bits, &memory[..n_bytes]);
                black_box(products(&[Product { width: WIDTH, outputs: OUTPUTS, factors }]));
            };
            let limit = if bits == Bits::Four { int4 } else { int8 };
            compare(format!("{name}, {n_rows} rows"), "GOP/s", (work, &run), limit);
        }
        let run = || {
            let factors = Factors::Bf16(&x, &halves[..OUTPUTS * WIDTH]);
            black_box(products(&[Product { width: WIDTH, outputs: OUTPUTS, factors }]));
        };
        compare(format!("bf16, {n_rows} rows"), "GFLOP/s", (work, &run), f32);
    }
    attention(|name, kernel| compare(name, "GFLOP/s", kernel, f32));
    Ok(figures)
}

/// Heads of DeepSeek's size over 2,048 latents.
fn attention(compare: impl FnOnce(String, Run<'_>)) {
    const ROW: usize = 576;
    const LATENT: usize = 512;
    const POSITIONS: usize = 2048;
    const TASKS: usize = 32;
    let mut latents = Lines::zeros(POSITIONS * ROW);
    latents.fill(0.01);
    let rows: Vec<&[f32]> = latents.chunks_exact(ROW).collect();
    let mut q = Lines::zeros(HEADS_MAX * ROW);
    q.fill(0.01);
    let work = 2 * TASKS * HEADS_MAX * POSITIONS * (ROW + LATENT);
    let run = || {
        threads::run(TASKS, &|_| {
            let mut sums = Lines::zeros(HEADS_MAX * LATENT);
            attend(Isa::detect(), &q, &rows, 1.0, &mut sums, &mut [Softmax::NOTHING; HEADS_MAX]);
            black_box(sums);
        });
    };
    compare(format!("attention over {POSITIONS} positions"), (work as f64, &run));
}
