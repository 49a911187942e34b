//! Elementwise ops, embeddings, transfers, and the vector functions.

use super::*;
use crate::backend::cpu::simd::map::Activate;

#[test]
fn activations_match_the_reference() {
    let mut rng = Rng(10);
    for b in backends() {
        for act in ACTIVATIONS {
            let values: Vec<f32> = (0..1003).map(|_| rng.value() * 8.0).collect();
            let x = b.put(Shape::tokens(1, 1, 1003), &values);
            let mut out = b.poisoned(x.shape());
            b.activate(&x, act, &mut out).unwrap();
            let reference: Vec<f64> = b.get(&x).iter().map(|&v| activation(act, f64::from(v))).collect();
            b.check(&format!("{act:?}"), &out, &reference, 2e-7);
        }
    }
}

#[test]
fn activations_are_accurate_value_by_value() {
    // SiLU over the whole range shows the exponential, GELU the error function.
    let x: Vec<f32> = (0..200_000).map(|i| (i as f32 - 100_000.0) * 1.3e-4).collect();
    for isa in Isa::available() {
        // QuickGELU rounds 1.702·x before the exponential sees it.
        for (act, rounding) in [(Activation::Silu, 0.0), (Activation::QuickGelu, 1.3e-7)] {
            let mut out = vec![f32::NAN; x.len()];
            isa.launch(Activate { x: &x, act, out: &mut out });
            for (&x, &y) in x.iter().zip(&out) {
                let r = activation(act, f64::from(x));
                let tolerance = 4e-7 + rounding * f64::from(x.abs());
                assert!(
                    (f64::from(y) - r).abs() <= tolerance * r.abs() + 1e-37,
                    "{isa:?} {act:?}({x}) = {y}, not {r}"
                );
            }
        }
        let mut out = vec![f32::NAN; x.len()];
        isa.launch(Activate { x: &x, act: Activation::Gelu, out: &mut out });
        for (&x, &y) in x.iter().zip(&out) {
            let r = activation(Activation::Gelu, f64::from(x));
            // 1 + erf cancels for negative x: an absolute error of |x|·2⁻²³.
            assert!(
                (f64::from(y) - r).abs() <= 2e-7 * f64::from(x.abs()),
                "{isa:?} gelu({x}) = {y}, not {r}"
            );
        }
    }
}

/// Ops of their own: f32 library functions, then a rounding to the backend's type.
#[test]
fn curves_match_the_reference() {
    let reference = |curve: Curve, x: f64| match curve {
        Curve::LeakyRelu => x.max(f64::from(0.01f32) * x),
        Curve::Elu => x.max(0.0) + x.min(0.0).exp_m1(),
        Curve::HardSwish => x * (x + 3.0).clamp(0.0, 6.0) / 6.0,
        Curve::Tanh => x.tanh(),
        Curve::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Curve::Softsign => x / (1.0 + x.abs()),
        Curve::Mish => x * x.exp().ln_1p().tanh(),
    };
    let mut rng = Rng(12);
    for b in backends() {
        for curve in Curve::ALL {
            let values: Vec<f32> = (0..1003).map(|_| rng.value() * 8.0).collect();
            let x = b.put(Shape::tokens(1, 1, 1003), &values);
            let mut out = b.poisoned(x.shape());
            b.curve(&x, curve, &mut out).unwrap();
            let want: Vec<f64> = b.get(&x).iter().map(|&v| reference(curve, f64::from(v))).collect();
            b.check(&format!("{curve:?}"), &out, &want, 2e-7);
        }
    }
}

#[test]
fn activations_keep_nan_and_infinity() {
    let x = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30, 0.0];
    for isa in Isa::available() {
        for act in [Activation::Silu, Activation::Gelu] {
            let mut out = [0f32; 6];
            isa.launch(Activate { x: &x, act, out: &mut out });
            assert!(out[0].is_nan(), "{isa:?} {act:?}");
            assert_eq!((out[1], out[3], out[5]), (f32::INFINITY, 1e30, 0.0));
            assert!(out[4].abs() < 1e-6, "{isa:?} {act:?}: {out:?}");
        }
    }
}

#[test]
fn axpby_matches_the_reference() {
    let mut rng = Rng(11);
    for b in backends() {
        let shape = Shape::nhwc(1, 3, 7, 5);
        let (x, y) = (b.random(shape, &mut rng), b.random(shape, &mut rng));
        let mut out = b.poisoned(shape);
        b.axpby(0.5, &x, -2.0, &y, &mut out).unwrap();
        let reference: Vec<f64> = b
            .get(&x)
            .iter()
            .zip(&b.get(&y))
            .map(|(&x, &y)| 0.5 * f64::from(x) - 2.0 * f64::from(y))
            .collect();
        b.check("axpby", &out, &reference, 1e-7);
    }
}

#[test]
fn columns_stand_side_by_side() {
    for b in backends() {
        let tokens = |c: usize| Shape::tokens(2, 3, c);
        let integers = |c: usize, first: f32| {
            let mut t = b.alloc(tokens(c)).unwrap();
            let values: Vec<f32> = (0..tokens(c).len()).map(|i| first + i as f32).collect();
            b.upload(&values, HostLayout::Nhwc, &mut t).unwrap();
            t
        };
        let (x, y) = (integers(3, 0.0), integers(2, 100.0));
        let mut out = b.poisoned(tokens(4));
        b.concat(&[Cols::range(&x, 1, 2), Cols::range(&y, 1, 1), Cols::range(&x, 0, 1)], &mut out).unwrap();
        let row = |i: usize| [3 * i + 1, 3 * i + 2, 101 + 2 * i, 3 * i].map(|v| v as f32);
        assert_eq!(b.get(&out), (0..6).flat_map(row).collect::<Vec<_>>());
        assert!(b.concat(&[Cols::all(&x)], &mut out).is_err(), "too few columns");
    }
}

#[test]
fn transfers_transpose_exactly() {
    for b in backends() {
        let s = Shape::nhwc(2, 3, 5, 4);
        // Small integers are exact in every storage type.
        let host: Vec<f32> = (0..s.len()).map(|i| i as f32).collect();
        let mut t = b.alloc(s).unwrap();
        b.upload(&host, HostLayout::Nchw, &mut t).unwrap();
        let nhwc = b.get(&t);
        for n in 0..2 {
            for c in 0..4 {
                for y in 0..3 {
                    for x in 0..5 {
                        let expected = (((n * 4 + c) * 3 + y) * 5 + x) as f32;
                        assert_eq!(nhwc[((n * 3 + y) * 5 + x) * 4 + c], expected);
                    }
                }
            }
        }
        let mut back = vec![f32::NAN; s.len()];
        b.download(&t, HostLayout::Nchw, &mut back).unwrap();
        assert_eq!(back, host);
    }
}

#[test]
fn embeddings_add_table_and_positions() {
    let mut rng = Rng(12);
    for b in backends() {
        let table = Stored::random(DType::F16, &[11, 6], &mut rng);
        let positions = Stored::random(DType::F32, &[4, 6], &mut rng);
        let (t, p) = (b.pack_embedding(&table.raw()).unwrap(), b.pack_embedding(&positions.raw()).unwrap());
        let own = rng.values(6);
        let tokens = [
            EmbedRow::Id(3),
            EmbedRow::Vector(&own),
            EmbedRow::Id(0),
            EmbedRow::Id(10),
            EmbedRow::Id(3),
            EmbedRow::Id(1),
        ];
        let mut out = b.poisoned(Shape::tokens(2, 3, 6));
        b.embed(&Embed { table: &t, positions: &p, tokens: &tokens }, &mut out).unwrap();
        let mut reference = Vec::new();
        for (i, row) in tokens.iter().enumerate() {
            for c in 0..6 {
                let v = match row {
                    EmbedRow::Id(id) => table.values[*id as usize * 6 + c],
                    EmbedRow::Vector(v) => v[c],
                };
                reference.push(f64::from(v) + f64::from(positions.values[i % 3 * 6 + c]));
            }
        }
        b.check("embed", &out, &reference, 1e-7);
        let wrong = [EmbedRow::Id(11)];
        let mut one = b.poisoned(Shape::tokens(1, 1, 6));
        assert!(b.embed(&Embed { table: &t, positions: &p, tokens: &wrong }, &mut one).is_err());
    }
}

#[test]
fn timestep_embeddings_match_the_reference() {
    for b in backends() {
        let steps = [999.0, 0.0, 500.5];
        let mut out = b.poisoned(Shape::nhwc(3, 1, 1, 320));
        b.timestep_embedding(&steps, &mut out).unwrap();
        let mut reference = Vec::new();
        for t in steps {
            let angle = |i: i32| f64::from(t) * 10_000f64.powf(-f64::from(i) / 160.0);
            reference.extend((0..160).map(|i| angle(i).cos()));
            reference.extend((0..160).map(|i| angle(i).sin()));
        }
        // Angles up to 999 are rounded to f32 (3e-5), as all f32 code does.
        b.check("timestep_embedding", &out, &reference, 1.5e-4);
    }
}
