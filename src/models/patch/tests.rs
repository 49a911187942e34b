//! Lists of patches over a file in memory.

use std::borrow::Cow;

use super::*;

/// Tensors in memory.
struct Memory(Vec<(&'static str, Vec<usize>, Vec<f32>)>);

impl WeightSource for Memory {
    fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        let (_, shape, data) = self.0.iter().find(|(n, ..)| *n == name)?;
        let bytes = Cow::Borrowed(bytemuck::cast_slice(data));
        Some(RawTensor { dtype: DType::F32, shape, bytes })
    }

    fn packed(&self, _: &str) {}
}

fn source(tensors: &[(&'static str, f32)]) -> Arc<dyn WeightSource> {
    let tensor = |(name, value): &(&'static str, f32)| (*name, vec![2, 3], vec![*value; 6]);
    Arc::new(Memory(tensors.iter().map(tensor).collect()))
}

fn names(file: &str, patch: &str) -> Prefixes {
    vec![(file.to_owned(), patch.to_owned())]
}

fn add(values: &Arc<dyn WeightSource>, name: &str, strength: f64, strength_model: f64) -> Patch {
    let change = Arc::new(Change::Add(Values::of(values, name).unwrap()));
    Patch { strength, change, strength_model }
}

#[test]
fn patches_apply_in_order_and_only_where_they_belong() {
    let base = source(&[("unet.a.weight", 2.0), ("unet.b.weight", 5.0)]);
    let values = source(&[("one", 1.0), ("ten", 10.0)]);
    let first = Patches::default().with([("x.a.weight".to_owned(), add(&values, "one", 0.5, 1.0))].into());
    let both = first.with([("x.a.weight".to_owned(), add(&values, "ten", 0.25, 0.75))].into());
    let read = |patches: &Patches, name: &str| {
        let source = PatchedSource::new(base.clone(), names("unet.", "x."), patches.clone());
        source.raw(name).unwrap().to_f32()[5]
    };
    assert_eq!(read(&first, "unet.a.weight"), 2.5);
    assert_eq!(read(&both, "unet.a.weight"), 2.5 * 0.75 + 2.5);
    assert_eq!(read(&both, "unet.b.weight"), 5.0);
    assert_ne!(first.identity(), both.identity());
    assert_eq!(first.clone().identity(), first.identity());
}

#[test]
fn a_merge_takes_the_other_model_with_its_patches() {
    let (a, b) = (source(&[("u.w", 1.0)]), source(&[("m.w", 3.0)]));
    let lora =
        Patches::default().with([("x.w".to_owned(), add(&source(&[("d", 4.0)]), "d", 0.5, 1.0))].into());
    let other: Arc<dyn WeightSource> = Arc::new(PatchedSource::new(b, names("m.", "x."), lora));
    // 30 % of the first model and 70 % of the second one with its LoRA.
    let merge = Patches::default().with([("x.w".to_owned(), add(&other, "m.w", 0.7, 0.3))].into());
    let merged = PatchedSource::new(a, names("u.", "x."), merge).raw("u.w").unwrap().to_f32();
    assert!((merged[0] - (0.3 + 0.7 * 5.0)).abs() < 1e-6, "{merged:?}");
}

#[test]
fn text_encoders_are_rounded_to_f16_where_they_are_patched() {
    let base = source(&[("t.w", 1.0), ("t.v", 0.1)]);
    let values = source(&[("d", 1e-4)]);
    let patches = Patches::default().with([("c.w".to_owned(), add(&values, "d", 1.0, 1.0))].into());
    let source = PatchedSource::new(base, names("t.", "c."), patches).rounded();
    let raw = source.raw("t.w").unwrap();
    assert_eq!((raw.dtype, raw.to_f32()[0]), (DType::F16, 1.0));
    assert_eq!(source.raw("t.v").unwrap().dtype, DType::F32);
}

#[test]
fn a_change_of_another_size_leaves_the_weight() {
    let base = source(&[("w", 1.0)]);
    let odd: Arc<dyn WeightSource> = Arc::new(Memory(vec![("d", vec![5], vec![1.0; 5])]));
    let patches = Patches::default().with([("w".to_owned(), add(&odd, "d", 1.0, 1.0))].into());
    assert_eq!(PatchedSource::new(base, names("", ""), patches).raw("w").unwrap().to_f32(), [1.0; 6]);
}
