//! Names of layers, and merged weights recorded from PyPI's `lycoris-lora`.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use kiln::models::detect::{Heads, UnetConfig};
use kiln::models::layers::WeightSource;
use kiln::models::lora::{Lora, Target, unet_targets};
use kiln::models::patch::{PatchedSource, Patches};
use kiln::tensor::RawTensor;
use kiln::weights::WeightsFile;
use kiln::weights::synth::Manifest;

use crate::files;

struct Stored(Arc<WeightsFile>);

impl WeightSource for Stored {
    fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        self.0.get(name)
    }

    fn packed(&self, _: &str) {}
}

/// Weights, adapters and merged weights of `lycoris-lora` 4.1.3, by case: `CASE.weight`, `CASE.x.*`, `CASE.merged`.
fn recorded() -> Arc<WeightsFile> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/lycoris.safetensors");
    WeightsFile::open(Path::new(path)).unwrap()
}

fn merged(file: &Arc<WeightsFile>, case: &str, strength: f64) -> Vec<f32> {
    let weight = format!("{case}.weight");
    let elements = file.info(&weight).unwrap().numel();
    let target = Target { name: weight.clone(), elements, aliases: vec![format!("{case}.x")] };
    let lora = Lora::read(file, &[target]);
    assert_eq!((lora.changes.len(), lora.misfits.len()), (1, 0), "{case}");
    let own = lora.unused.iter().filter(|name| name.starts_with(&format!("{case}.x."))).count();
    assert_eq!(own, 0, "{case}: {:?}", lora.unused);
    let base: Arc<dyn WeightSource> = Arc::new(Stored(file.clone()));
    let source =
        PatchedSource::new(base, vec![Default::default()], Patches::default().with(lora.at(strength)));
    source.raw(&weight).unwrap().to_f32()
}

/// Cases in which that version multiplies by alpha / rank, here 1/2, twice when it merges. ComfyUI does so once for all.
const SCALED_TWICE: [&str; 3] = ["loha", "loha_tucker", "lokr_both"];

/// The recorded merge of a case, scaled once.
fn expected(file: &WeightsFile, case: &str, weight: &[f32]) -> Vec<f32> {
    let merged = file.get(&format!("{case}.merged")).unwrap().to_f32();
    if !SCALED_TWICE.contains(&case) {
        return merged;
    }
    weight.iter().zip(&merged).map(|(w, m)| w + 2.0 * (m - w)).collect()
}

fn assert_close(case: &str, got: &[f32], want: &[f32]) {
    let scale = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // f32 sums of up to 64 products in another order.
    assert!(
        got.len() == want.len() && worst <= 2e-6 * scale,
        "{case}: off by {worst}, largest value {scale}"
    );
}

#[test]
fn merged_weights_are_those_of_lycoris() {
    let file = recorded();
    let cases: BTreeSet<&str> = file.names().filter_map(|name| name.split('.').next()).collect();
    assert_eq!(cases.len(), 18, "{cases:?}");
    for case in cases {
        let weight = file.get(&format!("{case}.weight")).unwrap().to_f32();
        assert_close(case, &merged(&file, case, 1.0), &expected(&file, case, &weight));
    }
}

#[test]
fn half_the_strength_is_half_the_way() {
    let file = recorded();
    for case in ["locon_tucker", "dora", "loha", "lokr_both"] {
        let weight = file.get(&format!("{case}.weight")).unwrap().to_f32();
        let whole = expected(&file, case, &weight);
        let want: Vec<f32> = weight.iter().zip(&whole).map(|(w, m)| w + 0.5 * (m - w)).collect();
        assert_close(case, &merged(&file, case, 0.5), &want);
    }
}

#[test]
fn layers_have_their_names_in_all_layouts() {
    let targets = files::demo().unet_targets().unwrap();
    let of = |name: &str| targets.iter().find(|t| t.name == name).unwrap().aliases.clone();
    let aliases = of("diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0.weight");
    for name in [
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "lycoris_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
        "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0",
    ] {
        assert!(aliases.iter().any(|alias| alias == name), "{name} is not among {aliases:?}");
    }
    let time = of("diffusion_model.time_embed.0.weight");
    assert!(time.contains(&"lora_unet_time_embedding_linear_1".to_owned()), "{time:?}");
    let norm = of("diffusion_model.out.0.bias");
    assert_eq!(norm, ["diffusion_model.out.0.bias"]);
}

fn sd15_config() -> UnetConfig {
    UnetConfig {
        prefix: "model.diffusion_model.".into(),
        in_channels: 4,
        out_channels: 4,
        model_channels: 320,
        time_embed_dim: 1280,
        channel_mult: vec![1, 2, 4, 4],
        num_res_blocks: vec![2; 4],
        input_depth: vec![1, 1, 1, 1, 1, 1, 0, 0],
        middle_depth: 1,
        output_depth: vec![0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        context_dim: 768,
        heads: Heads::Count(8),
        norm_groups: 32,
        use_linear_in_transformer: false,
        adm_channels: None,
    }
}

/// Every module name of a kohya file for SD1.5 belongs to one layer: 192 of the UNet, 72 of the text encoder.
#[test]
fn a_kohya_file_is_used_up() {
    let manifest = Manifest::built_in("sd15-lora").unwrap();
    let mut modules: BTreeSet<String> = BTreeSet::new();
    for (name, _) in manifest.shapes() {
        modules.insert(name.split('.').next().unwrap().to_owned());
    }
    assert_eq!(modules.len(), 264);
    let config = sd15_config();
    let known: BTreeSet<String> = unet_targets(&config).into_iter().flat_map(|t| t.aliases).collect();
    let (unet, text): (Vec<_>, Vec<_>) = modules.iter().partition(|m| m.starts_with("lora_unet_"));
    assert_eq!((unet.len(), text.len()), (192, 72));
    let unknown: Vec<_> = unet.iter().filter(|m| !known.contains(m.as_str())).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}
