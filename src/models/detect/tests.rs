use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::weights::synth::{self, Manifest};

/// Names and shapes, as a file or a manifest has them.
type Shapes = Vec<(String, Vec<usize>)>;

fn manifest_shapes(manifest: &Manifest) -> Shapes {
    manifest
        .shapes()
        .map(|(name, shape)| (name.to_owned(), shape.iter().map(|&d| d as usize).collect()))
        .collect()
}

fn sd15() -> Shapes {
    manifest_shapes(&Manifest::built_in("sd15").unwrap())
}

fn demo() -> Arc<WeightsFile> {
    WeightsFile::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo-sd.safetensors")).unwrap()
}

fn metadata(pairs: &[(&str, &str)]) -> std::collections::BTreeMap<String, String> {
    pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect()
}

fn with_layout<T>(shapes: &Shapes, pairs: &[(&str, &str)], f: impl FnOnce(&Layout) -> T) -> T {
    let metadata = metadata(pairs);
    let tensors = shapes.iter().map(|(name, shape)| (name.as_str(), DType::F16, shape.as_slice()));
    let names = Names::from_stored(tensors);
    f(&Layout::new("test.safetensors".into(), names.iter(), &metadata))
}

fn detect_shapes(shapes: &Shapes, pairs: &[(&str, &str)]) -> Result<Checkpoint, DetectError> {
    with_layout(shapes, pairs, |layout| {
        let (row, unet) = family_of(layout)?;
        checkpoint(layout, row, unet, |_| None)
    })
}

#[test]
fn sd15_has_the_published_configuration() {
    let found = detect_shapes(&sd15(), &[]).unwrap();
    let unet = UnetConfig {
        prefix: "model.diffusion_model.".into(),
        in_channels: 4,
        out_channels: 4,
        model_channels: 320,
        time_embed_dim: 1280,
        channel_mult: vec![1, 2, 4, 4],
        num_res_blocks: vec![2, 2, 2, 2],
        input_depth: vec![1, 1, 1, 1, 1, 1, 0, 0],
        middle_depth: 1,
        output_depth: vec![0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        context_dim: 768,
        heads: Heads::Count(8),
        norm_groups: 32,
        use_linear_in_transformer: false,
        adm_channels: None,
    };
    let clip = ClipConfig {
        variant: ClipVariant::L,
        projection: None,
        prefix: "cond_stage_model.transformer.text_model.".into(),
        width: 768,
        layers: 12,
        heads: 12,
        mlp: 3072,
        vocab: 49408,
        max_positions: 77,
        activation: Activation::QuickGelu,
        layer_norm_eps: 1e-5,
    };
    let vae = VaeConfig {
        prefix: "first_stage_model.".into(),
        ch: 128,
        ch_mult: vec![1, 2, 4, 4],
        num_res_blocks: 2,
        z_channels: 4,
        in_channels: 3,
        out_channels: 3,
        norm_groups: 32,
        has_attention: true,
        has_quant_conv: true,
    };
    let sampling = SamplingConfig {
        prediction: Prediction::Epsilon,
        beta_schedule: BetaSchedule { start: 0.00085, end: 0.012, steps: 1000 },
        has_zero_terminal_snr: false,
        continuous: None,
        latent_scale: 0.18215,
        native_width: 512,
        native_height: 512,
    };
    assert_eq!(unet.heads_of(1280), 8);
    assert_eq!(vae.downscale(), 8);
    let expected =
        Checkpoint { family: Family::Sd1, unet, clips: vec![clip], vae: Some(vae), sampling, unused: vec![] };
    assert_eq!(found, expected);
}

#[test]
fn the_configuration_lists_exactly_the_tensors_of_the_manifest() {
    let mut shapes = sd15();
    let found = detect_shapes(&shapes, &[]).unwrap();
    let mut listed = found.unet.tensors();
    assert_eq!(listed.len(), 686);
    listed.extend(found.clips[0].tensors());
    listed.extend(found.vae.unwrap().tensors());
    listed.sort();
    shapes.sort();
    assert!(listed == shapes, "{} listed, {} in the manifest", listed.len(), shapes.len());
}

#[test]
fn the_demo_model_is_read_with_its_metadata() {
    let file = demo();
    let found = detect(&file).unwrap();
    let (unet, clip, vae) = (&found.unet, &found.clips[0], found.vae.as_ref().unwrap());
    assert_eq!(
        (unet.model_channels, &*unet.channel_mult, &*unet.num_res_blocks),
        (32, &[1, 2, 3][..], &[1, 1, 1][..])
    );
    assert_eq!((&*unet.input_depth, unet.middle_depth), (&[0, 1, 1][..], 1));
    assert_eq!(unet.output_depth, [1, 1, 1, 1, 0, 0]);
    assert_eq!((unet.context_dim, unet.heads, unet.norm_groups), (48, Heads::Count(2), 4));
    assert_eq!((clip.width, clip.layers, clip.heads, clip.mlp, clip.vocab), (48, 3, 3, 192, 49408));
    assert_eq!((vae.ch, &*vae.ch_mult, vae.num_res_blocks, vae.norm_groups), (16, &[1, 2, 2, 4][..], 1, 4));
    assert_eq!((found.sampling.native_width, found.sampling.native_height), (128, 128));
    assert_eq!((found.sampling.latent_scale, found.sampling.prediction), (0.18215, Prediction::Epsilon));
    assert_eq!(found.unused, [""; 0]);
    assert_eq!(unet.tensors().len() + clip.tensors().len() + vae.tensors().len(), file.len());
}

#[test]
fn a_vae_or_text_encoder_file_of_its_own_is_read() {
    let open = |text: &str| {
        let shapes = manifest_shapes(&Manifest::from_json(text).unwrap());
        with_layout(&shapes, &[], |layout| {
            (kind::kind_in(layout), vae::derive(layout, ""), clip::derive(layout, "text_model.", None))
        })
    };
    let (kind, vae, _) = open(include_str!("../../../tests/data/manifests/vae.json"));
    let vae = vae.unwrap();
    assert_eq!((kind, vae.prefix.as_str(), vae.ch, vae.z_channels), (Kind::Vae, "", 128, 4));
    assert_eq!(vae.tensors().len(), 248);
    let (kind, _, clip) = open(include_str!("../../../tests/data/manifests/clip_l.json"));
    let clip = clip.unwrap();
    assert_eq!((kind, clip.layers, clip.width, clip.heads), (Kind::TextEncoder, 12, 768, 12));
}

#[test]
fn the_file_entry_points_agree_with_each_other() {
    let file = demo();
    let found = detect(&file).unwrap();
    assert_eq!(kind_of(&file), Kind::Checkpoint);
    assert_eq!(Some(detect_vae(&file).unwrap()), found.vae);
    assert_eq!(detect_text_encoders(&file).unwrap(), found.clips);
}

#[test]
fn early_text_encoder_names_and_missing_parts_are_accepted() {
    let mut shapes = sd15();
    for (name, _) in &mut shapes {
        *name = name.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.");
    }
    shapes.push(("cond_stage_model.logit_scale".into(), vec![]));
    let found = detect_shapes(&shapes, &[]).unwrap();
    assert_eq!(found.clips[0].prefix, "cond_stage_model.transformer.");
    assert_eq!(found.unused, ["cond_stage_model.logit_scale"]);

    shapes.retain(|(name, _)| name.starts_with("model."));
    let found = detect_shapes(&shapes, &[]).unwrap();
    assert_eq!((found.clips, found.vae), (vec![], None));
}

#[test]
fn inpainting_models_have_nine_input_channels() {
    let mut shapes = sd15();
    let conv_in = shapes.iter_mut().find(|(name, _)| name.ends_with("input_blocks.0.0.weight")).unwrap();
    conv_in.1[1] = 9;
    assert_eq!(detect_shapes(&shapes, &[]).unwrap().unet.in_channels, 9);
}

fn demo_shapes() -> Shapes {
    demo().infos().map(|t| (t.name.to_owned(), t.shape.to_vec())).collect()
}

const DEMO_METADATA: &[(&str, &str)] =
    &[("unet.num_heads", "2"), ("clip.num_heads", "3"), ("group_norm.num_groups", "4")];

/// Every tensor in turn is left out; none may be missed, and the message names a tensor.
#[test]
fn no_tensor_can_be_missing_unnoticed() {
    let whole = demo_shapes();
    for left_out in 0..whole.len() {
        let mut shapes = whole.clone();
        let (name, _) = shapes.remove(left_out);
        match detect_shapes(&shapes, DEMO_METADATA) {
            Err(DetectError::Missing { .. } | DetectError::Shape { .. }) => {}
            other => panic!("{name}: {other:?}"),
        }
    }
}

/// Every extent in turn is off by one; the result is an error or another configuration.
#[test]
fn no_extent_can_be_wrong_unnoticed() {
    let whole = demo_shapes();
    let right = detect_shapes(&whole, DEMO_METADATA).unwrap();
    let mut accepted = Vec::new();
    for i in 0..whole.len() {
        for axis in 0..whole[i].1.len() {
            let mut shapes = whole.clone();
            shapes[i].1[axis] += 1;
            if let Ok(found) = detect_shapes(&shapes, DEMO_METADATA) {
                assert_ne!(found, right, "{} axis {axis}", whole[i].0);
                accepted.push((whole[i].0.rsplit('.').nth(1).unwrap_or_default().to_owned(), axis));
            }
        }
    }
    // What may differ: input channels of the VAE, the vocabulary, the longest sequence.
    accepted.sort();
    let expected = [("conv_in", 1), ("position_embedding", 0), ("token_embedding", 0)];
    assert_eq!(accepted, expected.map(|(name, axis)| (name.to_owned(), axis)));
}

#[test]
fn metadata_is_checked_before_it_is_trusted() {
    let shapes = demo_shapes();
    let with = |key: &'static str, value: &'static str| {
        let pairs: Vec<_> =
            DEMO_METADATA.iter().copied().filter(|(k, _)| *k != key).chain([(key, value)]).collect();
        detect_shapes(&shapes, &pairs)
    };
    let bad = [
        ("unet.num_heads", "0"),
        ("unet.num_heads", "5"),
        ("unet.num_heads", "two"),
        ("unet.num_heads", "-2"),
        ("unet.num_heads", "99999999999999999999999"),
        ("clip.num_heads", "7"),
        ("clip.activation", "relu"),
        ("group_norm.num_groups", "0"),
        ("group_norm.num_groups", "32"),
        ("group_norm.num_groups", "3"),
        ("latent_scale", "0"),
        ("latent_scale", "nan"),
        ("latent_scale", "-1"),
        ("prediction", "x0"),
        ("beta_schedule", "linear 0.1 0.2 1000"),
        ("beta_schedule", "scaled_linear 0.2 0.1 1000"),
        ("beta_schedule", "scaled_linear 0.1 0.2 99999999999"),
        ("beta_schedule", "scaled_linear 0.1 0.2"),
        ("native_width", "0"),
        ("native_height", "1000000"),
    ];
    for (key, value) in bad {
        let error = with(key, value).unwrap_err();
        assert!(
            matches!(error, DetectError::Metadata { .. } | DetectError::Divide { .. }),
            "{key} {value}: {error}"
        );
        assert!(error.to_string().contains(key), "{key} {value}: {error}");
    }
    let good = with("prediction", "v").unwrap();
    assert_eq!(good.sampling.prediction, Prediction::V);
    let good = with("beta_schedule", "scaled_linear 0.001 0.02 500").unwrap();
    assert_eq!(good.sampling.beta_schedule, BetaSchedule { start: 0.001, end: 0.02, steps: 500 });
    assert_eq!(with("clip.activation", "gelu").unwrap().clips[0].activation, Activation::Gelu);

    // The demo's sizes do not fit the family's defaults, and the message says which key is missing.
    let key_of = |pairs: &[(&str, &str)]| match detect_shapes(&shapes, pairs) {
        Err(DetectError::Divide { value, channels, key, .. }) => (value, channels, key),
        other => panic!("{other:?}"),
    };
    assert_eq!(key_of(&[]), (64, 48, "clip.num_heads"));
    assert_eq!(key_of(&[("clip.num_heads", "3")]), (32, 16, "group_norm.num_groups"));
}

#[test]
fn integer_weights_are_refused() {
    let shapes = demo_shapes();
    let metadata = metadata(DEMO_METADATA);
    let tensors = shapes.iter().map(|(name, shape)| {
        let dtype = if name.ends_with("out.2.weight") { DType::I64 } else { DType::BF16 };
        (name.as_str(), (dtype, shape.as_slice()))
    });
    let layout = Layout::new("test".into(), tensors, &metadata);
    let (_, unet) = family_of(&layout).unwrap();
    let error = unet.check(&layout).unwrap_err();
    assert!(matches!(error, DetectError::DType { dtype: DType::I64, .. }), "{error}");
}

/// The kind under the names that the file itself uses.
fn stored_kind(shapes: &Shapes) -> Kind {
    let tensors = shapes.iter().map(|(name, shape)| (name.as_str(), (DType::F16, shape.as_slice())));
    kind::kind_in(&Layout::new("test".into(), tensors, &metadata(&[])))
}

/// The names by which each other kind of file is known, and what a loader for checkpoints answers.
#[test]
fn other_files_are_named_for_what_they_are() {
    let cases: &[(&[&str], Kind)] = &[
        (&["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], Kind::Lora),
        (&["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], Kind::Lora),
        (&["lycoris_mid_block_attentions_0_proj_in.oft_blocks"], Kind::Lora),
        (&["lora_unet_mid_block_attentions_0_proj_in.a1.weight"], Kind::Lora),
        (
            &["control_model.input_blocks.0.0.weight", "control_model.input_hint_block.0.weight"],
            Kind::ControlNet,
        ),
        (
            &["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
            Kind::ControlNet,
        ),
        (&["input_blocks.0.0.weight", "out.2.weight"], Kind::DiffusionModel),
        (&["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], Kind::Diffusers),
        (&["encoder.conv_in.weight", "decoder.conv_in.weight"], Kind::Vae),
        (&["text_model.encoder.layers.0.mlp.fc1.weight"], Kind::TextEncoder),
        (&["emb_params"], Kind::Embedding),
        (&["clip_l", "clip_g"], Kind::Embedding),
        (&["conv_first.weight", "body.0.rdb1.conv1.weight"], Kind::Upscaler),
        (&["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"], Kind::Upscaler),
        (&["1.weight", "3.conv.0.weight"], Kind::Taesd),
        (&["x"], Kind::Unknown),
        (&[], Kind::Unknown),
    ];
    for &(names, kind) in cases {
        let shapes: Shapes = names.iter().map(|name| ((*name).to_owned(), vec![1])).collect();
        assert_eq!(stored_kind(&shapes), kind, "{names:?}");
        let error = detect_shapes(&shapes, &[]).unwrap_err();
        if matches!(kind, Kind::DiffusionModel | Kind::Diffusers) {
            // These are looked into further: what is no whole network lacks tensors or has damaged ones.
            use DetectError::{Kind, Missing, Shape};
            assert!(matches!(&error, Missing { .. } | Kind { .. } | Shape { .. }), "{error}");
            continue;
        }
        assert!(matches!(&error, DetectError::Kind { found, .. } if *found == kind), "{error}");
        assert!(error.to_string().contains(kind.advice()), "{error}");
    }
}

/// The names and shapes that tell families apart, on top of an SD1.x UNet.
#[test]
fn later_families_are_recognised() {
    let linear = |mut shapes: Shapes| {
        for (name, shape) in &mut shapes {
            if name.contains("proj_in.weight") || name.contains("proj_out.weight") {
                shape.truncate(2);
            }
            if name.contains("attn2.to_k") || name.contains("attn2.to_v") {
                shape[1] = 1024;
            }
        }
        shapes
    };
    let adm = |width| {
        let mut shapes = linear(sd15());
        shapes.push((format!("{UNET_PREFIX}label_emb.0.0.weight"), vec![1280, width]));
        shapes
    };
    let family = |shapes| with_layout(&shapes, &[], |layout| family_of(layout).map(|(row, _)| row.family));
    assert_eq!(family(sd15()), Ok(Family::Sd1));
    assert_eq!(family(linear(sd15())), Ok(Family::Sd2));
    assert_eq!(family(adm(2816)), Ok(Family::Sdxl));
    assert_eq!(family(adm(2560)), Ok(Family::SdxlRefiner));
    assert!(matches!(family(adm(768)), Err(DetectError::Unknown { .. })));
    assert!(FAMILIES.iter().all(|row| row.family.name() == row.name && row_of(row.family).name == row.name));
}

#[test]
fn the_statistics_of_its_latents_tell_playground() {
    let mut shapes = sd15();
    shapes.push((PLAYGROUND_MARKS[0].into(), vec![1, 4, 1, 1]));
    assert_eq!(detect_shapes(&shapes, &[]).unwrap().sampling.prediction, Prediction::Epsilon);
    shapes.push((PLAYGROUND_MARKS[1].into(), vec![1, 4, 1, 1]));
    let sampling = detect_shapes(&shapes, &[]).unwrap().sampling;
    assert_eq!((sampling.prediction, sampling.continuous), (Prediction::Edm, Some(PLAYGROUND_RANGE)));
}

/// SD2 checkpoints tell ε from v by one bias; the same rule on synthetic values of both spreads
/// (a uniform distribution over ±a has a standard deviation of a/√3).
#[test]
fn the_spread_of_a_bias_tells_v_prediction() {
    let row = row_of(Family::Sd2);
    let unet = detect_shapes(&sd15(), &[]).unwrap().unet;
    let name = format!("{UNET_PREFIX}{}", row.v_bias.unwrap());
    for (scale, expected) in [(0.05, Prediction::Epsilon), (0.14, Prediction::Epsilon), (0.2, Prediction::V)]
    {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bias.safetensors");
        let text = format!(r#"{{"{name}": {{"shape": [320], "scale": {scale}}}}}"#);
        synth::write(&Manifest::from_json(&text).unwrap(), &path, DType::F32, &[], |_, _| ()).unwrap();
        let file = WeightsFile::open(&path).unwrap();
        let spread = spread_of(&file.get(&name).unwrap()).unwrap();
        assert!((spread * 3f64.sqrt() / scale - 1.0).abs() < 0.06, "{spread} for {scale}");
        let layout = Layout::as_stored(&file);
        let spread = |name: &str| spread_of(&file.get(name)?);
        assert_eq!(prediction_of(&layout, row, &unet, spread), Ok(expected), "{scale}");
        let inpainting = UnetConfig { in_channels: 9, ..unet.clone() };
        assert_eq!(prediction_of(&layout, row, &inpainting, spread), Ok(Prediction::Epsilon));
    }
}

#[test]
fn descriptions_read_well() {
    let text = describe(&demo()).to_string();
    for line in [
        "a checkpoint of the family Stable Diffusion 1.x: 5.92 M parameters in 562 tensors, 11.9 MB",
        "UNet              2.71 M parameters,   326 tensors, 5.4 MB",
        "text encoder      2.46 M parameters,    52 tensors, 4.9 MB",
        "VAE              756.3 K parameters,   184 tensors, 1.5 MB",
        "UNet: 32 channels x [1, 2, 3], [1, 1, 1] residual blocks, transformers [0, 1, 1] + 1 + [1, 1, 1, 1, 0, 0], 2 heads, context 48, 4 groups, 4 -> 4 channels",
        "text encoder: 3 layers of width 48, 3 heads, MLP 192, 49408 tokens, 77 places, QuickGelu",
        "VAE: 16 channels x [1, 2, 2, 4], 1 residual blocks, 4 latent channels at 1/8, with attention, 4 groups",
        "predicts noise (eps); betas 0.00085 to 0.012 in 1000 steps; latents x 0.18215; made for 128 x 128 pixels",
        "metadata license = CC0-1.0",
    ] {
        assert!(text.contains(line), "no {line:?} in:\n{text}");
    }
}

#[test]
fn descriptions_hold_no_control_characters_and_no_endless_values() {
    let header = format!(
        r#"{{"__metadata__":{{"k\u001b[2J":"\u0007{}"}},"emb_params":{{"dtype":"F16","shape":[0],"data_offsets":[0,0]}}}}"#,
        "x".repeat(5000)
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    let text = describe(&WeightsFile::from_bytes(bytes, "e\u{1b}vil").unwrap()).to_string();
    assert!(text.contains("an embedding") && text.contains(r"k\u{1b}[2J"), "{text}");
    assert!(text.len() < 500 && !text.contains(['\u{1b}', '\u{7}']), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Random shapes under real names: any result, no panic.
    #[test]
    fn odd_shapes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), prop::collection::vec(0usize..70, 0..5)), 1..20), keep in 0usize..562) {
        let mut shapes = demo_shapes();
        for (at, shape) in changes {
            let at = at.index(shapes.len());
            shapes[at].1 = shape;
        }
        let keep = if keep < 200 { keep } else { shapes.len() };
        shapes.truncate(keep);
        let _ = detect_shapes(&shapes, DEMO_METADATA);
    }
}
