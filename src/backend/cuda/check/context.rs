//! What a case works with: random operands, poisoned outputs, comparison, timing.

use super::{Fault, Measured};
use crate::backend::cuda::{CudaError, Element, Gpu};
use crate::driver::DevicePtr;

/// Bytes behind every output that must stay as they are.
const GUARD: usize = 256;
/// What unwritten memory holds: a NaN in every element type.
const POISON: u8 = 0xff;

/// How cases run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Changes every random operand.
    pub seed: u64,
    /// Time the kernels as well.
    pub timing: bool,
}

/// Device memory of a case; freed with the context.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Address.
    pub ptr: DevicePtr,
    /// Bytes, without guard.
    pub bytes: usize,
    /// Poisoned bytes behind the end; none on the SIMT layer, where a page that faults follows every allocation.
    pub guard: usize,
}

/// Operands, outputs and results of one case.
pub struct Context<'a> {
    /// The device.
    pub gpu: &'a Gpu,
    options: Options,
    /// State of the random numbers.
    state: u64,
    owned: Vec<DevicePtr>,
}

impl<'a> Context<'a> {
    pub(super) fn new(gpu: &'a Gpu, name: &str, options: Options) -> Self {
        // FNV-1a of the name: every case has its own numbers, the same in every run.
        let mut state = 0xcbf2_9ce4_8422_2325 ^ options.seed;
        for byte in name.bytes() {
            state = (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        Self { gpu, options, state, owned: Vec::new() }
    }

    /// A context without a case: only memory.
    pub(in crate::backend::cuda) fn for_layer(gpu: &'a Gpu) -> Self {
        Self::new(gpu, "layer", Options::default())
    }

    /// Memory of `count` random elements; values repeat after a while.
    pub(in crate::backend::cuda) fn random_memory(
        &mut self,
        count: usize,
        element: Element,
    ) -> Result<DevicePtr, CudaError> {
        const PATTERN: usize = 1 << 16;
        let pattern = element.encode(&self.values(count.min(PATTERN), 0.25, element));
        let (driver, stream) = (self.gpu.driver(), self.gpu.stream());
        let bytes = count * element.size();
        let ptr = driver.alloc(bytes.max(1), stream)?;
        self.owned.push(ptr);
        driver.upload(ptr, &pattern, stream)?;
        // Doubling copies on the device: the host makes a little, whatever the size.
        let mut filled = pattern.len();
        while filled < bytes {
            let next = filled.min(bytes - filled);
            driver.copy(ptr.offset(filled), ptr, next, stream)?;
            filled += next;
        }
        Ok(ptr)
    }

    /// A random number (splitmix64).
    pub fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `count` values, about normal with deviation `scale`, rounded to `element`.
    pub fn values(&mut self, count: usize, scale: f32, element: Element) -> Vec<f32> {
        (0..count)
            .map(|_| {
                // Sum of four uniform numbers: near enough to normal, and bounded.
                let bits = self.random();
                let sum: f32 = (0..4).map(|i| ((bits >> (16 * i)) & 0xffff) as f32 / 65536.0 - 0.5).sum();
                element.round(sum * 1.732 * scale)
            })
            .collect()
    }

    /// Memory that holds `bytes`.
    pub fn upload_bytes(&mut self, bytes: &[u8]) -> Result<Buffer, CudaError> {
        let (driver, stream) = (self.gpu.driver(), self.gpu.stream());
        let ptr = driver.alloc(bytes.len().max(1), stream)?;
        self.owned.push(ptr);
        driver.upload(ptr, bytes, stream)?;
        Ok(Buffer { ptr, bytes: bytes.len(), guard: 0 })
    }

    /// Memory that holds `values` as `element`.
    pub fn upload(&mut self, values: &[f32], element: Element) -> Result<Buffer, CudaError> {
        self.upload_bytes(&element.encode(values))
    }

    /// Poisoned memory for a result of `bytes`, guarded behind its end.
    pub fn output(&mut self, bytes: usize) -> Result<Buffer, CudaError> {
        let (driver, stream) = (self.gpu.driver(), self.gpu.stream());
        let guard = if driver.device().is_simulated { 0 } else { GUARD };
        let ptr = driver.alloc((bytes + guard).max(1), stream)?;
        self.owned.push(ptr);
        driver.fill(ptr, POISON, bytes + guard, stream)?;
        Ok(Buffer { ptr, bytes, guard })
    }

    /// Memory for a result that is written in part: it holds `values`, guarded behind its end.
    pub fn output_over(&mut self, values: &[f32], element: Element) -> Result<Buffer, CudaError> {
        let buffer = self.output(values.len() * element.size())?;
        self.gpu.driver().upload(buffer.ptr, &element.encode(values), self.gpu.stream())?;
        Ok(buffer)
    }

    /// The bytes of `buffer`; `None` if something was written behind its end.
    pub fn download(&self, buffer: Buffer) -> Result<Option<Vec<u8>>, CudaError> {
        let (driver, stream) = (self.gpu.driver(), self.gpu.stream());
        let mut bytes = vec![0; buffer.bytes + buffer.guard];
        driver.download(&mut bytes, buffer.ptr, stream)?;
        let intact = bytes[buffer.bytes..].iter().all(|b| *b == POISON);
        bytes.truncate(buffer.bytes);
        Ok(intact.then_some(bytes))
    }

    /// Launches, compares `out` with `want`, and times the launch if asked to.
    pub fn measure(
        &mut self,
        out: Buffer,
        element: Element,
        want: &[f64],
        launch: impl Fn() -> Result<(), CudaError>,
    ) -> Result<Measured, CudaError> {
        self.measure_by(out, |bytes| compare(&element.decode(bytes), want), launch)
    }

    /// Launches, judges the bytes of `out`, and times the launch if asked to.
    pub fn measure_by(
        &mut self,
        out: Buffer,
        judge: impl Fn(&[u8]) -> Measured,
        launch: impl Fn() -> Result<(), CudaError>,
    ) -> Result<Measured, CudaError> {
        launch()?;
        let measured = self.download(out)?.map_or(Measured::bad(Fault::BehindTheEnd), |bytes| judge(&bytes));
        Ok(Measured { micros: self.time(launch)?, ..measured })
    }

    /// Microseconds of one launch: the median of several, if timing was asked for.
    pub fn time(&self, launch: impl Fn() -> Result<(), CudaError>) -> Result<Option<f64>, CudaError> {
        if !self.options.timing {
            return Ok(None);
        }
        // A trace has seen the launch that was checked, and would slow these down.
        self.gpu.driver().instruments().untraced(|| self.time_rounds(launch))
    }

    fn time_rounds(&self, launch: impl Fn() -> Result<(), CudaError>) -> Result<Option<f64>, CudaError> {
        let (driver, stream) = (self.gpu.driver(), self.gpu.stream());
        let (from, to) = (driver.create_event(true)?, driver.create_event(true)?);
        let rounds = if driver.device().is_simulated { 1 } else { 11 };
        let mut times = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            driver.record(from, stream)?;
            launch()?;
            driver.record(to, stream)?;
            driver.synchronize_event(to)?;
            times.push(f64::from(driver.elapsed_ms(from, to)?) * 1e3);
        }
        driver.destroy_event(from)?;
        driver.destroy_event(to)?;
        times.sort_by(f64::total_cmp);
        Ok(Some(times[times.len() / 2]))
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        for ptr in self.owned.drain(..) {
            if let Err(error) = self.gpu.driver().free(ptr, self.gpu.stream()) {
                tracing::warn!(%error, "device memory of a check was not freed");
            }
        }
    }
}

/// Whether all bits are ones: what poisoned memory holds, and no arithmetic makes (a half widened has zeros behind them).
pub(super) fn is_poison(value: f32) -> bool {
    value.to_bits() | 0xffff == u32::MAX
}

/// The first element that was not written or is a NaN, of rows `width` wide and `pitch` apart, or was written between two of them.
pub(super) fn fault_of_rows(got: &[f32], width: usize, pitch: usize) -> Option<Fault> {
    let of = got.len();
    let mut faults =
        got.iter().enumerate().filter_map(|(at, value)| match (at % pitch < width, is_poison(*value)) {
            (true, true) => Some(Fault::Unwritten { at, of }),
            (true, false) if value.is_nan() => Some(Fault::NotANumber { at, of }),
            (false, false) => Some(Fault::BetweenRows { at }),
            _ => None,
        });
    faults.next()
}

/// Largest |got − want| / max(|want|, rms of want), and where; infinite for a NaN.
pub(super) fn compare(got: &[f32], want: &[f64]) -> Measured {
    let of = want.len();
    if got.len() != of {
        return Measured::bad(Fault::Length { got: got.len(), want: of });
    }
    let rms = (want.iter().map(|w| w * w).sum::<f64>() / of.max(1) as f64).sqrt();
    let mut worst = Measured::default();
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        if is_poison(*got) {
            return Measured::bad(Fault::Unwritten { at, of });
        }
        let error = (f64::from(*got) - want).abs() / want.abs().max(rms).max(f64::MIN_POSITIVE);
        let fault = Some(Fault::Wrong { at, of, got: f64::from(*got), want: *want });
        if error.is_nan() {
            return Measured { error: f64::INFINITY, fault, micros: None };
        }
        if error > worst.error {
            worst = Measured { error, fault, micros: None };
        }
    }
    worst
}

/// How many values differ, and the first that does.
pub(super) fn differing<T: Copy + PartialEq + Into<f64>>(got: &[T], want: &[T]) -> Measured {
    let of = want.len();
    if got.len() != of {
        return Measured::bad(Fault::Length { got: got.len(), want: of });
    }
    let mut all = got.iter().zip(want).enumerate().filter(|(_, (got, want))| got != want);
    let first = all.next();
    let fault =
        first.map(|(at, (got, want))| Fault::Wrong { at, of, got: (*got).into(), want: (*want).into() });
    Measured { error: (usize::from(first.is_some()) + all.count()) as f64, fault, micros: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        assert_eq!(compare(&[1.0, 2.0], &[1.0, 2.0]), Measured::default());
        let says = |got: &[f32]| compare(got, &[1.0, -2.0, 3.0]).fault.map(|fault| fault.to_string());
        assert_eq!(says(&[1.5, -2.0, 0.0]).unwrap(), "element 2 of 3 is 0, should be 3");
        assert_eq!(says(&[1.0, f32::NAN, 0.0]).unwrap(), "element 1 of 3 is NaN, should be -2");
        assert_eq!(says(&[1.0, -2.0]).unwrap(), "2 elements, should be 3");
        for element in [Element::F16, Element::BF16, Element::F32] {
            let tail = element.decode(&vec![POISON; element.size()])[0];
            assert_eq!(says(&[1.0, -2.0, tail]).unwrap(), "element 2 of 3 was not written");
        }
        let few = differing(&[1u8, 2, 4, 4], &[1, 2, 3, 5]);
        assert_eq!(
            (few.error, few.fault.unwrap().to_string()),
            (2.0, "element 2 of 4 is 4, should be 3".into())
        );
    }
}
