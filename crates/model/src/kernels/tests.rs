use proptest::prelude::*;

use super::*;

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

proptest! {
    #[test]
    fn products_have_the_same_bits_everywhere(
        (width, x, w) in (1_usize..70, 1_usize..18, 1_usize..10).prop_flat_map(|(width, rows, outputs)| {
            let values = |n: usize| proptest::collection::vec(-8.0_f32..8.0, n * width);
            (Just(width), values(rows), values(outputs))
        })
    ) {
        let halves: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
        let n = x.len() / width * (w.len() / width);
        let (mut wanted, mut wanted_halves) = (vec![0.0; n], vec![0.0; n]);
        matmul(Isa::Baseline, &x, &w, width, &mut wanted);
        matmul(Isa::Baseline, &x, &halves, width, &mut wanted_halves);
        for isa in Isa::all() {
            let (mut y, mut y_halves) = (vec![0.0; n], vec![0.0; n]);
            matmul(isa, &x, &w, width, &mut y);
            matmul(isa, &x, &halves, width, &mut y_halves);
            prop_assert_eq!(bits(&y), bits(&wanted));
            prop_assert_eq!(bits(&y_halves), bits(&wanted_halves));
            // Row by row and output by output: the register block must not show.
            let n_outputs = w.len() / width;
            for (at, wanted) in wanted.iter().enumerate() {
                let (row, output) = (at / n_outputs, at % n_outputs);
                let mut alone = 0.0;
                let (x, w) = (&x[row * width..][..width], &w[output * width..][..width]);
                matmul(isa, x, w, width, std::slice::from_mut(&mut alone));
                prop_assert_eq!(alone.to_bits(), wanted.to_bits());
            }
        }
    }
}

/// Blocks that stay in a cache: several, the last not whole, and of the least outputs, met by rows in several passes and parts.
#[test]
fn a_matrix_of_several_blocks_has_the_same_bits_as_its_outputs_alone() {
    for (width, n_outputs) in [(515, 137), (2_055, 70), (40_000, 7)] {
        let numbers = |n: usize, step: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * step) % 199) as f32 / 99.0 - 1.0).collect()
        };
        let (x, w) = (numbers(71 * width, 17), numbers(n_outputs * width, 31));
        let halves: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
        for isa in Isa::all() {
            for n_rows in [0, 1, 5, 13, 14, 31, 71] {
                let x = &x[..n_rows * width];
                let (mut y, mut y_halves) = (vec![0.0; n_rows * n_outputs], vec![0.0; n_rows * n_outputs]);
                matmul(isa, x, &w, width, &mut y);
                matmul(isa, x, &halves, width, &mut y_halves);
                for at in 0..y.len() {
                    let (row, output) = (at / n_outputs, at % n_outputs);
                    let (x, place) = (&x[row * width..][..width], output * width..(output + 1) * width);
                    let (mut alone, mut alone_of_halves) = (0.0, 0.0);
                    matmul(isa, x, &w[place.clone()], width, std::slice::from_mut(&mut alone));
                    matmul(isa, x, &halves[place], width, std::slice::from_mut(&mut alone_of_halves));
                    assert_eq!(y[at].to_bits(), alone.to_bits(), "{isa:?} {row} {output}");
                    assert_eq!(y_halves[at].to_bits(), alone_of_halves.to_bits(), "{isa:?} {row} {output}");
                }
            }
        }
    }
}

#[test]
fn what_is_infinite_in_one_output_stays_there() {
    const WIDTH: usize = 32;
    for isa in Isa::all() {
        for n_rows in 1..8 {
            for at in 0..WIDTH {
                let mut w = [bf16::from_f32(0.5); 3 * WIDTH];
                w[WIDTH + at] = bf16::INFINITY;
                let mut y = vec![0.0; 3 * n_rows];
                matmul(isa, &vec![1.0; n_rows * WIDTH], &w, WIDTH, &mut y);
                for y in y.chunks_exact(3) {
                    assert_eq!(y, [16.0, f32::INFINITY, 16.0], "{isa:?}, {n_rows} rows, number {at}");
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn exponentials_are_summed_as_libm_does(
        values in proptest::collection::vec(-30.0_f32..30.0, 0..5_000), scale in 0.1_f32..4.0
    ) {
        let max = largest(&values);
        prop_assert_eq!(max, values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let wanted: f64 = values.iter().map(|value| f64::from(scale * (value - max)).exp()).sum();
        let sum = sum_of_exp(&values, max, scale);
        prop_assert!((sum - wanted).abs() <= 1e-6 * wanted, "{} for {}", sum, wanted);
        prop_assert_eq!(sum.to_bits(), generic::sum_of_exp(&values, max, scale).to_bits());
    }
}

#[test]
fn what_is_within_a_bound_is_all_of_it() {
    assert!(within(&[], 1.0));
    for len in [1, 15, 16, 17, 64, 100] {
        let values = vec![-1.5; len];
        assert!(within(&values, 1.5) && !within(&values, 1.0));
        for (at, odd) in (0..len).zip([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -2.0].into_iter().cycle())
        {
            let mut values = values.clone();
            values[at] = odd;
            assert!(!within(&values, 1.5), "{odd} at {at} of {len}");
        }
    }
    assert!(within(&[f32::MAX, -f32::MAX], f32::MAX) && !within(&[0.0, f32::INFINITY], f32::MAX));
}

#[test]
fn what_is_no_number_is_not_the_largest() {
    assert_eq!(largest(&[]), f32::NEG_INFINITY);
    for at in [0, 3, 16, 40] {
        let mut values = [-1.0; 41];
        values[(at + 1) % 41] = 2.0;
        values[at] = f32::NAN;
        assert_eq!(largest(&values), 2.0);
    }
}

/// What [`attend`] sums, in f64 and without tiles.
fn attended(q: &[f32], rows: &[&[f32]], scale: f32, width: usize) -> Vec<f64> {
    let dot = |row: &[f32]| q.iter().zip(row).map(|(q, x)| f64::from(*q) * f64::from(*x)).sum::<f64>();
    let scores: Vec<f64> = rows.iter().map(|row| dot(row) * f64::from(scale)).collect();
    let highest = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mean =
        |at: usize| rows.iter().zip(&weights).map(|(row, weight)| weight * f64::from(row[at])).sum::<f64>();
    (0..width).map(|at| mean(at) / total).collect()
}

proptest! {
    #[test]
    fn heads_read_the_same_everywhere_and_alone(
        (row, width, q, rows) in (1_usize..90, 1_usize..20, 1_usize..120).prop_flat_map(|(row, heads, n_rows)| {
            let values = |n: usize| proptest::collection::vec(-2.0_f32..2.0, n * row);
            (Just(row), 1..=row, values(heads.min(HEADS_MAX)), values(n_rows))
        })
    ) {
        let rows: Vec<&[f32]> = rows.chunks_exact(row).collect();
        let read = |isa, q: &[f32]| {
            let mut means = vec![0.0; q.len() / row * width];
            let mut softmaxes = vec![Softmax::NOTHING; q.len() / row];
            attend(isa, q, &rows, 0.3, &mut means, &mut softmaxes);
            let of_heads = means.chunks_exact_mut(width).zip(softmaxes);
            of_heads.for_each(|(means, softmax)| softmax.finish(means));
            means
        };
        // The first head, whose positions are read in two parts.
        let (first, second) = rows.split_at(rows.len() / 2);
        let part = |rows| {
            let (mut sums, mut softmax) = (vec![0.0; width], [Softmax::NOTHING]);
            attend(Isa::Baseline, &q[..row], rows, 0.3, &mut sums, &mut softmax);
            (sums, softmax[0])
        };
        let ((mut means, mut softmax), (next_sums, next)) = (part(first), part(second));
        softmax.merge(&mut means, next, &next_sums);
        softmax.finish(&mut means);
        for (mean, wanted) in means.iter().zip(attended(&q[..row], &rows, 0.3, width)) {
            prop_assert!((f64::from(*mean) - wanted).abs() < 2e-5, "{mean}, wanted {wanted}");
        }
        for isa in Isa::all() {
            for (q, means) in q.chunks_exact(row).zip(read(isa, &q).chunks_exact(width)) {
                prop_assert_eq!(bits(means), bits(&read(Isa::Baseline, q)));
                for (mean, wanted) in means.iter().zip(attended(q, &rows, 0.3, width)) {
                    prop_assert!((f64::from(*mean) - wanted).abs() < 2e-5, "{mean}, wanted {wanted}");
                }
            }
        }
    }
}

/// Within a few ulp of the same computed by candle, which shares no code with us.
mod candle {
    use candle_core::{D, Device, Tensor};

    use super::super::*;

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + 13) % 1000) as f32 / 250.0 - 2.0).collect()
    }

    fn check(ours: &[f32], theirs: &Tensor) {
        let theirs: Vec<f32> = theirs.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(theirs) {
            assert!((ours - theirs).abs() <= 2e-6 * theirs.abs().max(1.0), "{ours}, candle has {theirs}");
        }
    }

    #[test]
    fn linear_softmax_norm_and_silu_agree_with_candle() {
        let device = Device::Cpu;
        let (x, w) = (values(5 * 37), values(11 * 37));
        let tensor =
            |values: &[f32], rows| Tensor::from_slice(values, (rows, values.len() / rows), &device).unwrap();
        let x_tensor = tensor(&x, 5);
        let product = x_tensor.matmul(&tensor(&w, 11).t().unwrap()).unwrap();
        let product_of = Product { width: 37, outputs: 11, factors: Factors::F32(&x, &w) };
        let ours = &products(&[product_of])[0];
        check(&ours.iter().map(|y| y / 40.0).collect::<Vec<_>>(), &(product / 40.0).unwrap());

        let mut probabilities = x.clone();
        probabilities.chunks_exact_mut(37).for_each(softmax);
        let shifted =
            x_tensor.broadcast_sub(&x_tensor.max_keepdim(D::Minus1).unwrap()).unwrap().exp().unwrap();
        check(&probabilities, &shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1).unwrap()).unwrap());

        let mean = x_tensor.sqr().unwrap().mean_keepdim(D::Minus1).unwrap();
        let normed = x_tensor.broadcast_div(&(mean + 1e-6).unwrap().sqrt().unwrap()).unwrap();
        check(&RmsNorm::new(vec![1.0; 37], 1e-6).apply(&x), &normed);

        let mut gate = x.clone();
        silu_mul(&mut gate, &vec![1.0; x.len()]);
        check(&gate, &x_tensor.silu().unwrap());
    }
}

#[test]
fn norms_and_activations_have_the_same_bits_everywhere() {
    let x: Vec<f32> = (0..5 * 37).map(|i| ((i * 7919 + 13) % 1000) as f32 / 25.0 - 20.0).collect();
    let (mut gate, mut wanted) = (x.clone(), x.clone());
    silu_mul(&mut gate, &x);
    generic::silu_mul(&mut wanted, &x);
    assert_eq!(bits(&gate), bits(&wanted));
    let (mut scores, mut wanted) = (x.clone(), x.clone());
    softmax(&mut scores);
    generic::softmax(&mut wanted);
    assert_eq!(bits(&scores), bits(&wanted));
    let mut normed = vec![0.0; x.len()];
    generic::norm_rows(&x, &[0.7; 37], 1e-6, &mut normed);
    assert_eq!(bits(&RmsNorm::new(vec![0.7; 37], 1e-6).apply(&x)), bits(&normed));
}
