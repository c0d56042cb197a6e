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
/// The best of so many runs counts, of kernels and limits alike.
const RUNS: usize = 5;

/// Measures with the threads installed here. `elapsed` is the time since whenever.
pub fn kernels(elapsed: &dyn Fn() -> Duration, huge_pages: bool) -> Result<Vec<Figure>, Error> {
    let rate = |work: f64, run: &dyn Fn()| {
        let time = |_| {
            let before = elapsed();
            run();
            elapsed().saturating_sub(before).as_secs_f64().max(1e-9)
        };
        work / (0..RUNS).map(time).fold(f64::MAX, f64::min) / 1e9
    };
    let n_threads = threads::count();
    let mut memory = Memory::new(MEMORY_BYTES, huge_pages)
        .map_err(|error| Error::new(format!("no memory for {MEMORY_BYTES} bytes: {error}")))?;
    memory.fill(FILL);
    let parts: Vec<&[u8]> = memory.chunks(READ_PART).collect();
    let read = rate(MEMORY_BYTES as f64, &|| {
        threads::run(parts.len(), &|part| {
            black_box(limits::read(parts[part]));
        });
    });
    let peak = |count: &(dyn Fn() -> usize + Sync)| {
        let n = count();
        rate((2 * n * n_threads) as f64, &|| {
            threads::run(n_threads, &|_| {
                black_box(count());
            });
        })
    };
    let peak_i8 = peak(&|| black_box(limits::multiply_i8(black_box(1))).0);
    let peak_f32 = peak(&|| black_box(limits::multiply_f32(black_box(1.0))).0);

    let mut figures = vec![Figure { name: "read".to_owned(), unit: "GB/s", value: read, limit: read }];
    if Isa::detect().has_tiles() {
        let value = peak(&|| black_box(limits::multiply_tiles()));
        figures.push(Figure { name: "int8, tiles alone".to_owned(), unit: "GOP/s", value, limit: peak_i8 });
    }
    let names = [(Bits::Eight, "int8"), (Bits::Four, "int4")];
    for (bits, name) in names {
        let outputs = MEMORY_BYTES / bits.panel_bytes(WIDTH) * packed::OUTPUTS;
        let n_bytes = bits.matrix_bytes(outputs, WIDTH);
        let x = vec![0.5; WIDTH];
        let rows = packed::Rows::quantize(&x, WIDTH);
        let value = rate(n_bytes as f64, &|| {
            let factors = Factors::Packed(&rows, bits, &memory[..n_bytes]);
            black_box(products(&[Product { width: WIDTH, outputs, factors }]));
        });
        figures.push(Figure { name: format!("{name}, 1 row"), unit: "GB/s", value, limit: read });
    }
    let halves: &[bf16] = bytemuck::cast_slice(&memory[..MEMORY_BYTES]);
    let x = vec![0.5; WIDTH];
    let value = rate(MEMORY_BYTES as f64, &|| {
        let factors = Factors::Bf16(&x, halves);
        black_box(products(&[Product { width: WIDTH, outputs: halves.len() / WIDTH, factors }]));
    });
    figures.push(Figure { name: "bf16, 1 row".to_owned(), unit: "GB/s", value, limit: read });
    for n_rows in [16, 64, 512] {
        let x = vec![0.5; n_rows * WIDTH];
        let rows = packed::Rows::quantize(&x, WIDTH);
        let work = (2 * n_rows * WIDTH * OUTPUTS) as f64;
        for (bits, name) in names {
            let n_bytes = bits.matrix_bytes(OUTPUTS, WIDTH);
            let value = rate(work, &|| {
                let factors = Factors::Packed(&rows, bits, &memory[..n_bytes]);
                black_box(products(&[Product { width: WIDTH, outputs: OUTPUTS, factors }]));
            });
            let name = format!("{name}, {n_rows} rows");
            figures.push(Figure { name, unit: "GOP/s", value, limit: peak_i8 });
        }
        let value = rate(work, &|| {
            let factors = Factors::Bf16(&x, &halves[..OUTPUTS * WIDTH]);
            black_box(products(&[Product { width: WIDTH, outputs: OUTPUTS, factors }]));
        });
        let name = format!("bf16, {n_rows} rows");
        figures.push(Figure { name, unit: "GFLOP/s", value, limit: peak_f32 });
    }
    figures.push(attention(&rate, peak_f32));
    Ok(figures)
}

/// Heads of DeepSeek's size over 2,048 latents.
fn attention(rate: &dyn Fn(f64, &dyn Fn()) -> f64, limit: f64) -> Figure {
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
    let value = rate(work as f64, &|| {
        threads::run(TASKS, &|_| {
            let mut sums = Lines::zeros(HEADS_MAX * LATENT);
            attend(Isa::detect(), &q, &rows, 1.0, &mut sums, &mut [Softmax::NOTHING; HEADS_MAX]);
            black_box(sums);
        });
    });
    Figure { name: format!("attention over {POSITIONS} positions"), unit: "GFLOP/s", value, limit }
}
