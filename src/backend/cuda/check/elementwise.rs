//! Cases of elementwise operations.

use super::random::{ELEMENTS, Shapes, distinct};
use super::{Case, Context, Measured};
use crate::backend::cuda::launch::elementwise::{Act, Activate, Axpby, Function, activate, axpby};
use crate::backend::cuda::{CudaError, Element};
use crate::tensor::Curve;

/// Error function.
fn erf(x: f64) -> f64 {
    statrs::function::erf::erf(x)
}

/// All activation functions of epilogues.
pub(super) const ACTS: [Act; 6] =
    [Act::None, Act::Silu, Act::Gelu, Act::QuickGelu, Act::Relu, Act::LeakyRelu];

/// `act(x)` in f64.
pub(super) fn act(x: f64, act: Act) -> f64 {
    match act {
        Act::None => x,
        Act::Silu => x / (1.0 + (-x).exp()),
        Act::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Act::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Act::Relu => x.max(0.0),
        Act::LeakyRelu => x.max(f64::from(0.2f32) * x),
    }
}

/// `curve(x)` in f64.
fn curve(x: f64, curve: Curve) -> f64 {
    match curve {
        Curve::LeakyRelu => x.max(f64::from(0.01f32) * x),
        Curve::Elu => x.max(0.0) + x.min(0.0).exp_m1(),
        Curve::HardSwish => x * (x + 3.0).clamp(0.0, 6.0) / 6.0,
        Curve::Tanh => x.tanh(),
        Curve::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Curve::Softsign => x / (1.0 + x.abs()),
        Curve::Mish => x * x.exp().ln_1p().tanh(),
    }
}

/// All that the kernel applies.
fn functions() -> Vec<Function> {
    ACTS.into_iter().map(Function::Act).chain(Curve::ALL.into_iter().map(Function::Curve)).collect()
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for element in ELEMENTS {
        for count in [1usize, 7, 8, 9, 63, 255, 1000, 2048, 2049, 4_096_001] {
            cases.push(axpby_case(count, element));
        }
        for function in functions() {
            for count in [5usize, 16, 777, 20_480, 4_096_003] {
                cases.push(activate_case(count, element, function));
            }
        }
    }
    cases
}

/// Counts of any kind, up to a few blocks.
pub(super) fn random(shapes: &mut Shapes) -> Vec<Case> {
    let mut cases = Vec::new();
    for element in ELEMENTS {
        cases.extend(distinct(shapes, |s| axpby_case(s.of(1..=9000), element)));
        cases.extend(distinct(shapes, |s| activate_case(s.of(1..=9000), element, s.pick(&functions()))));
    }
    cases
}

fn axpby_case(count: usize, element: Element) -> Case {
    let name = format!("axpby_{} {count}", element.suffix());
    case(name, count, element, 3, move |cx| run_axpby(cx, count, element))
}

fn activate_case(count: usize, element: Element, function: Function) -> Case {
    let name = format!("activate_{} {function:?} {count}", element.suffix());
    case(name, count, element, 2, move |cx| run_activate(cx, count, element, function))
}

fn case(
    name: String,
    count: usize,
    element: Element,
    arrays: usize,
    run: impl Fn(&mut Context<'_>) -> Result<Measured, CudaError> + Send + Sync + 'static,
) -> Case {
    Case {
        family: "elementwise",
        name,
        quick: count < 10_000,
        needs_gpu: count > 1_000_000,
        is_random: false,
        flops: 0.0,
        bytes: (arrays * count * element.size()) as f64,
        // One rounding of the result, and float arithmetic with its exp (2 ulp) before it.
        tolerance: element.rounding() * 1.01 + 1e-6,
        run: Box::new(run),
    }
}

fn run_axpby(cx: &mut Context<'_>, count: usize, element: Element) -> Result<Measured, CudaError> {
    let (x, y) = (cx.values(count, 1.0, element), cx.values(count, 2.0, element));
    let (a, b) = (0.75f32, -1.25f32);
    let want: Vec<f64> =
        x.iter().zip(&y).map(|(x, y)| f64::from(a) * f64::from(*x) + f64::from(b) * f64::from(*y)).collect();
    let (dx, dy) = (cx.upload(&x, element)?, cx.upload(&y, element)?);
    let out = cx.output(count * element.size())?;
    let gpu = cx.gpu;
    let op = Axpby { x: dx.ptr, y: dy.ptr, out: out.ptr, count, a, b, element };
    cx.measure(out, element, &want, || axpby(gpu, &op))
}

fn run_activate(
    cx: &mut Context<'_>,
    count: usize,
    element: Element,
    function: Function,
) -> Result<Measured, CudaError> {
    let x = cx.values(count, 2.0, element);
    let want: Vec<f64> = x
        .iter()
        .map(|x| match function {
            Function::Act(function) => act(f64::from(*x), function),
            Function::Curve(function) => curve(f64::from(*x), function),
        })
        .collect();
    let dx = cx.upload(&x, element)?;
    let out = cx.output(count * element.size())?;
    let gpu = cx.gpu;
    let op = Activate { x: dx.ptr, out: out.ptr, count, function, element };
    cx.measure(out, element, &want, || activate(gpu, &op))
}
