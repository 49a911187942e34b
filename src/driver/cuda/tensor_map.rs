//! Tensor maps: descriptors of bulk tensor copies (CUDA driver API, "Tensor Map Object Management").

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle,
};

use super::super::{DriverError, MapElement, Swizzle, TensorMap, TensorMapDesc};
use super::ffi::cu;

/// Drivers up to this one encode a bit wrongly for tensors below 128 KiB: their
/// out-of-bounds handling fails on Blackwell. On Hopper the bit is reserved.
const SMALL_TENSOR_BUG: i32 = 13_010;
const SMALL_TENSOR_BYTES: u64 = 128 << 10;
/// Bit 85 of the map.
const SMALL_TENSOR_BIT: u64 = 1 << 21;

/// Encodes a map with the driver of that version, which must be loaded.
pub(super) fn encode(desc: &TensorMapDesc, driver_version: i32) -> Result<TensorMap, DriverError> {
    check(desc).map_err(|reason| invalid(desc, reason))?;
    let mut map = CUtensorMap { opaque: [0; 16] };
    let element = match desc.element {
        MapElement::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        MapElement::BF16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        MapElement::F32 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    };
    let swizzle = match desc.swizzle {
        Swizzle::None => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        Swizzle::B32 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        Swizzle::B64 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        Swizzle::B128 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let interleave = CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE;
    // A miss brings 256 bytes into the second-level cache: the next tile along the innermost dimension.
    let promotion = CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
    let fill = CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
    let (base, rank) = (desc.base.0 as *mut std::ffi::c_void, desc.extents.len());
    let mut steps = [1u32; 5];
    let encoded = match &desc.im2col {
        // SAFETY: every array has `rank` elements (strides one less), checked above; the memory is not touched.
        None => unsafe {
            cu!(cuTensorMapEncodeTiled(
                &mut map,
                element,
                rank as u32,
                base,
                desc.extents.as_ptr(),
                desc.strides.as_ptr(),
                desc.box_extents.as_ptr(),
                steps.as_ptr(),
                interleave,
                swizzle,
                promotion,
                fill,
            ))
        },
        Some(im2col) => {
            steps[1..3].copy_from_slice(&im2col.stride);
            // SAFETY: as above; rank 4 has two corner offsets, innermost (W) first.
            unsafe {
                cu!(cuTensorMapEncodeIm2col(
                    &mut map,
                    element,
                    rank as u32,
                    base,
                    desc.extents.as_ptr(),
                    desc.strides.as_ptr(),
                    im2col.lower.as_ptr(),
                    im2col.upper.as_ptr(),
                    desc.box_extents[0],
                    im2col.pixels,
                    steps.as_ptr(),
                    interleave,
                    swizzle,
                    promotion,
                    fill,
                ))
            }
        }
    };
    encoded.map_err(|error| invalid(desc, format!("the driver refuses ({error})")))?;
    if driver_version <= SMALL_TENSOR_BUG && span_bytes(desc) < SMALL_TENSOR_BYTES {
        map.opaque[1] &= !SMALL_TENSOR_BIT;
    }
    Ok(TensorMap(map.opaque))
}

fn invalid(desc: &TensorMapDesc, reason: String) -> DriverError {
    DriverError::Invalid { what: "tensor map", reason: format!("{reason}: {desc:?}") }
}

/// Bytes from the first to behind the last element.
fn span_bytes(desc: &TensorMapDesc) -> u64 {
    let size = u64::from(desc.element.size());
    let steps = std::iter::once(size).chain(desc.strides.iter().copied());
    let last: u64 =
        desc.extents.iter().zip(steps).map(|(n, step)| n.saturating_sub(1).saturating_mul(step)).sum();
    last + size
}

/// The limits that the driver API names, in words: its own refusal is only "invalid value".
fn check(desc: &TensorMapDesc) -> Result<(), String> {
    let rank = desc.extents.len();
    if !(1..=5).contains(&rank) || desc.strides.len() + 1 != rank {
        return Err(format!(
            "{rank} extents and {} strides; one to five, one stride less",
            desc.strides.len()
        ));
    }
    let boxes = if desc.im2col.is_some() { 1 } else { rank };
    if desc.box_extents.len() < boxes || (desc.im2col.is_some() && rank != 4) {
        return Err(format!(
            "{} box extents for rank {rank}; im2col maps have rank 4",
            desc.box_extents.len()
        ));
    }
    if !desc.base.0.is_multiple_of(16) || desc.strides.iter().any(|s| !s.is_multiple_of(16) || *s >= 1 << 40)
    {
        return Err("address and strides must be multiples of 16, strides below 2^40".into());
    }
    if desc.extents.iter().any(|n| *n == 0 || *n > 1 << 32) {
        return Err("extents must be 1 to 2^32".into());
    }
    let inner = desc.box_extents[0] * desc.element.size();
    let span = match desc.swizzle {
        Swizzle::None => u32::MAX,
        Swizzle::B32 => 32,
        Swizzle::B64 => 64,
        Swizzle::B128 => 128,
    };
    if desc.box_extents[..boxes].iter().any(|n| *n == 0 || *n > 256)
        || !inner.is_multiple_of(16)
        || inner > span
    {
        return Err(format!(
            "box extents must be 1 to 256, the innermost {inner} bytes a multiple of 16 within the swizzle"
        ));
    }
    if let Some(im2col) = &desc.im2col {
        let corners = im2col.lower.iter().chain(&im2col.upper);
        if corners.into_iter().any(|c| !(-128..128).contains(c)) || !(1..=1024).contains(&im2col.pixels) {
            return Err("corners must be -128 to 127, pixels 1 to 1024".into());
        }
        if im2col.stride.iter().any(|s| !(1..=8).contains(s)) {
            return Err("pixel strides must be 1 to 8".into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{DevicePtr, Im2col};

    fn valid() -> TensorMapDesc {
        TensorMapDesc {
            base: DevicePtr(1 << 20),
            element: MapElement::F16,
            extents: vec![320, 64, 64, 2],
            strides: vec![640, 640 * 64, 640 * 64 * 64],
            box_extents: vec![64, 8, 8, 1],
            swizzle: Swizzle::B128,
            im2col: None,
        }
    }

    #[test]
    fn limits_are_named() {
        assert_eq!(check(&valid()), Ok(()));
        let broken = |change: &dyn Fn(&mut TensorMapDesc)| {
            let mut desc = valid();
            change(&mut desc);
            check(&desc).unwrap_err()
        };
        assert!(broken(&|d| d.strides.truncate(2)).contains("4 extents and 2 strides"));
        assert!(broken(&|d| d.base.0 += 8).contains("multiples of 16"));
        assert!(broken(&|d| d.strides[0] = 648).contains("multiples of 16"));
        assert!(broken(&|d| d.extents[3] = 0).contains("extents"));
        assert!(broken(&|d| d.box_extents[0] = 72).contains("144 bytes"));
        assert!(broken(&|d| d.box_extents[1] = 257).contains("256"));
        let im2col = Im2col { lower: [-1, -1], upper: [-1, -1], pixels: 128, stride: [1, 1] };
        let with = |im2col: Im2col| TensorMapDesc { im2col: Some(im2col), ..valid() };
        assert_eq!(check(&with(im2col.clone())), Ok(()));
        assert!(check(&with(Im2col { pixels: 1025, ..im2col.clone() })).is_err());
        assert!(check(&with(Im2col { stride: [2, 9], ..im2col })).is_err());
    }

    #[test]
    fn span_counts_from_first_to_last_element() {
        assert_eq!(span_bytes(&valid()), 640 * 64 * 64 * 2);
        let narrow = TensorMapDesc { extents: vec![8, 3], strides: vec![64], ..valid() };
        assert_eq!(span_bytes(&narrow), 2 * 64 + 16);
    }
}
