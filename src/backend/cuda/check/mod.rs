//! Every kernel against its reference in f64: random shapes, odd and real ones.
//!
//! A family's file lists [`Case`]s. A case makes random operands, launches
//! through the family's launcher into poisoned memory, and compares with a
//! reference that is computed in f64 from the rounded operands. The same cases
//! run under the SIMT layer in CI and on a GPU with `kiln check`.

mod attention;
mod attention_drawn;
mod attention_sm90;
mod band;
mod bislerp;
mod blur;
mod ceiling;
mod combine;
mod context;
mod conv;
mod conv_sm90;
mod elementwise;
mod embed;
mod epilogue;
mod gemm;
mod gemm_batched;
mod gemm_sm90;
mod image;
mod layout;
mod merge;
mod norm;
mod random;
mod region;
mod reweight;
mod sampling;

pub use ceiling::{Ceiling, measure_ceiling};
pub use context::{Buffer, Context, Options};
pub use random::EACH;

use super::{CudaError, Gpu};

/// One comparison of a kernel with its reference.
pub struct Case {
    /// Kernel family, such as `gemm`.
    pub family: &'static str,
    /// Kernel, element type and shape, in one line.
    pub name: String,
    /// Small enough for `--quick`, sanitizers and the checked SIMT build.
    pub quick: bool,
    /// Too large for the SIMT layer.
    pub needs_gpu: bool,
    /// The shape was drawn at random; of such shapes every kernel has [`EACH`].
    pub is_random: bool,
    /// Floating-point operations (a multiply-add is two); 0 if memory-bound.
    pub flops: f64,
    /// Bytes that must at least be read and written.
    pub bytes: f64,
    /// Largest error allowed, see [`Measured::error`].
    pub tolerance: f64,
    /// Runs it.
    pub run: CaseFn,
}

/// What runs a case.
pub type CaseFn = Box<dyn Fn(&mut Context<'_>) -> Result<Measured, CudaError> + Send + Sync>;

/// Where a result is wrong, or furthest from right.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Element `at` of `of` holds what memory held before the launch.
    Unwritten {
        /// Index.
        at: usize,
        /// Elements.
        of: usize,
    },
    /// Element `at` of `of` is a NaN that was computed.
    NotANumber {
        /// Index.
        at: usize,
        /// Elements.
        of: usize,
    },
    /// Element `at` of `of` is something else.
    Wrong {
        /// Index.
        at: usize,
        /// Elements.
        of: usize,
        /// What was computed.
        got: f64,
        /// The reference.
        want: f64,
    },
    /// Element `at`, between the rows of the result, was written.
    BetweenRows {
        /// Index, gaps included.
        at: usize,
    },
    /// Memory behind the result was written.
    BehindTheEnd,
    /// A second launch stored other bits in byte `at`.
    Unsteady {
        /// Index, gaps included.
        at: usize,
    },
    /// The result has another length.
    Length {
        /// Elements there are.
        got: usize,
        /// Elements there should be.
        want: usize,
    },
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unwritten { at, of } => write!(f, "element {at} of {of} was not written"),
            Self::NotANumber { at, of } => write!(f, "element {at} of {of} is NaN"),
            Self::Wrong { at, of, got, want } => write!(f, "element {at} of {of} is {got}, should be {want}"),
            Self::BetweenRows { at } => write!(f, "element {at}, between two rows, was written"),
            Self::BehindTheEnd => write!(f, "memory behind the result was written"),
            Self::Unsteady { at } => write!(f, "a second launch stored other bits in byte {at}"),
            Self::Length { got, want } => write!(f, "{got} elements, should be {want}"),
        }
    }
}

/// Result of a case.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    /// Largest |got − want| / max(|want|, rms of want); infinite if an element was not written or memory
    /// behind the result was.
    pub error: f64,
    /// Where that is; none if nothing differs.
    pub fault: Option<Fault>,
    /// Microseconds of one run, if it was timed.
    pub micros: Option<f64>,
}

impl Measured {
    /// A result that is wrong whatever the tolerance.
    fn bad(fault: Fault) -> Self {
        Self { error: f64::INFINITY, fault: Some(fault), micros: None }
    }
}

impl Case {
    /// A case of a kernel that only moves memory or nearly so.
    fn of_memory(
        family: &'static str,
        name: String,
        elements: usize,
        bytes: usize,
        tolerance: f64,
        run: CaseFn,
    ) -> Self {
        Self {
            family,
            name,
            quick: elements < 20_000,
            needs_gpu: elements > 3_000_000,
            is_random: false,
            flops: 0.0,
            bytes: bytes as f64,
            tolerance,
            run,
        }
    }

    /// Whether the device has code for this case: families of sm_90a run on Hopper only, or what claims to be one.
    pub fn runs_on(&self, gpu: &Gpu) -> bool {
        !self.family.ends_with("_sm90") || gpu.is_hopper()
    }
}

/// All cases, family by family, in a fixed order.
pub fn cases() -> Vec<Case> {
    cases_of(0)
}

/// All cases; the random shapes are those of `seed`.
pub fn cases_of(seed: u64) -> Vec<Case> {
    let mut all = Vec::new();
    all.extend(elementwise::cases());
    all.extend(gemm::cases());
    all.extend(gemm_batched::cases());
    all.extend(conv::cases());
    all.extend(attention::cases());
    all.extend(attention_drawn::cases());
    all.extend(norm::cases());
    all.extend(layout::cases());
    all.extend(embed::cases());
    all.extend(sampling::cases());
    all.extend(combine::cases());
    all.extend(region::cases());
    all.extend(band::cases());
    all.extend(blur::cases());
    all.extend(image::cases());
    all.extend(bislerp::cases());
    all.extend(reweight::cases());
    all.extend(merge::cases());
    all.extend(attention_sm90::cases());
    all.extend(gemm_sm90::cases());
    all.extend(conv_sm90::cases());
    all.extend(random::cases(seed));
    all
}

fn wide(values: impl IntoIterator<Item = f32>) -> Vec<f64> {
    values.into_iter().map(f64::from).collect()
}

/// Runs one case.
pub fn run(gpu: &Gpu, case: &Case, options: &Options) -> Result<Measured, CudaError> {
    (case.run)(&mut Context::new(gpu, &case.name, *options))
}
