use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::weights::synth::Manifest;

/// 80 prompts with the ids and weights ComfyUI 0.3.64 makes of them, for four text encoders.
const GOLDEN: &str = include_str!("../../tests/data/golden/tokenizer.json");

/// The three synthetic embeddings the recording had, as the text encoder of `encoder` loads them.
fn synthetic(encoder: &str) -> impl Fn(&str) -> Option<EmbeddingRows> {
    let is_big = encoder == "sdxl_g";
    move |name| {
        let (tensor, rows, width) = match name.strip_suffix(".safetensors").unwrap_or(name) {
            "synth-embed" => ("emb_params", 3, 768),
            "synth-embed-l" => ("clip_l", 2, 768),
            "synth-embed-xl" if is_big => ("clip_g", 2, 1280),
            "synth-embed-xl" => ("clip_l", 2, 768),
            _ => return None,
        };
        let manifest = Manifest::from_json(&format!(r#"{{"{tensor}": [{rows}, {width}]}}"#)).ok()?;
        let values = manifest.values(tensor, 0..rows * width)?;
        // The files are f16.
        let values: Vec<f32> = values.into_iter().map(|v| half::f16::from_f32(v).to_f32()).collect();
        Some(values.chunks(width as usize).map(Arc::from).collect())
    }
}

/// Compares a token with a recorded id or a recorded row: its first four values, to the six decimals recorded, and its width.
fn is_recorded(token: &Token, recorded: &Value) -> bool {
    match token {
        Token::Id(id) => recorded.as_u64() == Some(u64::from(*id)),
        Token::Vector(row) => {
            let first = recorded["emb_first"].as_array().map(Vec::as_slice).unwrap_or_default();
            recorded["dim"].as_u64() == Some(row.len() as u64)
                && first.len() == 4
                && first
                    .iter()
                    .zip(row.iter())
                    .all(|(r, v)| r.as_f64().is_some_and(|r| (r - f64::from(*v)).abs() < 6e-7))
        }
    }
}

fn is_recorded_weight(weight: f32, recorded: &Value) -> bool {
    match recorded {
        Value::String(nan) => nan == "NaN" && weight.is_nan(),
        _ => recorded.as_f64().is_some_and(|r| r as f32 == weight),
    }
}

#[test]
fn all_recorded_prompts_give_the_recorded_tokens() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 80);
    let mut compared = 0;
    for case in cases {
        let prompt = case["prompt"].as_str().unwrap();
        for encoder in ["sd1", "sdxl_l", "sdxl_g", "sd2_h"] {
            let mut recorded = &case[encoder];
            while let Some(other) = recorded.as_str().and_then(|s| s.strip_prefix("same as ")) {
                recorded = &case[other];
            }
            let is_open_clip = matches!(encoder, "sdxl_g" | "sd2_h");
            // The recording's SD2 encoder shares the answers of SDXL's second, embeddings included.
            let lookup = synthetic(if is_open_clip { "sdxl_g" } else { "sd1" });
            let options = if is_open_clip { TokenizerOptions::open_clip() } else { TokenizerOptions::sd1() };
            let chunks = tokenize(prompt, &options, &lookup);
            let recorded = recorded.as_array().unwrap();
            assert_eq!(chunks.len(), recorded.len(), "{encoder} chunks of {prompt:?}");
            for (chunk, recorded) in chunks.iter().zip(recorded) {
                let ids = recorded["ids"].as_array().unwrap();
                assert_eq!((chunk.len(), ids.len()), (CHUNK_TOKENS, CHUNK_TOKENS));
                for (place, (token, weight)) in chunk.iter().enumerate() {
                    let expected_weight = recorded["weights"].get(place).unwrap_or(&recorded["weights"]);
                    assert!(
                        is_recorded(token, &ids[place]),
                        "{encoder} {prompt:?} place {place}: {token:?}, recorded {}",
                        ids[place]
                    );
                    assert!(
                        is_recorded_weight(*weight, expected_weight),
                        "{encoder} {prompt:?} place {place}: weight {weight}, recorded {expected_weight}"
                    );
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 80 * 4 * CHUNK_TOKENS, "{compared} places compared");
}

/// Ids by `transformers` 5.23 with CLIP's vocabulary.
#[test]
fn spellings_that_look_like_markers_and_odd_letters_encode_as_in_transformers() {
    let cases: &[(&str, &[u32])] = &[
        ("<|endoftext|>", &[49407]),
        ("a<|endoftext|>b", &[320, 49407, 321]),
        ("..<|endoftext|>..", &[852, 49407, 852]),
        ("<|ENDOFTEXT|>", &[27, 347, 40786, 4160, 91, 285]),
        ("<|ENDOFTEXT|>[", &[27, 347, 40786, 4160, 91, 285, 314]),
        ("..<|ENDOFTEXT|>[", &[608, 27, 347, 40786, 4160, 91, 29, 314]),
        (
            "x<|EndOfText|><|ENDOFTEXT|>..",
            &[343, 27, 347, 40786, 4160, 91, 285, 27, 347, 40786, 4160, 91, 285, 852],
        ),
        ("<|StartOfText|> x", &[27, 347, 993, 6659, 4160, 91, 285, 343]),
        ("<start_of_text>", &[283, 1572, 318, 539, 318, 4160, 285]),
        ("<END_OF_TEXT> a", &[283, 806, 318, 539, 318, 4160, 285, 320]),
        ("ΟΔΟΣ", &[138, 123, 138, 112, 138, 123, 139, 481]),
        ("ς σ Σ", &[139, 480, 139, 481, 139, 481]),
        ("İI", &[328, 16384, 328]),
        ("ß ẞ", &[127, 509, 127, 509]),
        ("ǅ", &[131, 484]),
        ("½ ² Ⅷ ٣", &[33613, 41175, 158, 227, 371, 149, 352]),
        ("a\u{1c}b", &[320, 472, 321]),
        ("a\u{85}b", &[320, 321]),
        ("\0a", &[444, 320]),
        ("A\u{301}", &[22229]),
        ("", &[]),
    ];
    for &(text, ids) in cases {
        assert_eq!(encode(text), ids, "{text:?}");
    }
}

/// The ids of the tokens between start and padding, `None` for vectors.
fn content(prompt: &str, lookup: &dyn EmbeddingLookup) -> Vec<Option<u32>> {
    let chunks = tokenize(prompt, &TokenizerOptions::open_clip(), lookup);
    let ids = chunks[0].iter().map(|(token, _)| if let Token::Id(id) = token { Some(*id) } else { None });
    ids.skip(1).take_while(|id| *id != Some(END_TOKEN)).collect()
}

#[test]
fn embeddings_are_found_where_they_count_and_dropped_where_they_do_not() {
    let lookup = |name: &str| (name == "e").then(|| vec![Arc::from([0.5f32; 4].as_slice())]);
    let (a, b, comma, e) = (Some(320), Some(321), Some(267), None);
    let as_text =
        |first: &[u32]| first.iter().chain(&[19703, 796, 281, 324]).copied().map(Some).collect::<Vec<_>>();
    let cases: &[(&str, &[Option<u32>])] = &[
        ("embedding:e", &[e]),
        ("a embedding:e b", &[a, e, b]),
        ("a\nembedding:e\nb", &[a, e, b]),
        ("embedding:e embedding:e", &[e, e]),
        ("embedding:e, b", &[e, comma, b]),
        ("embedding:e,embedding:e", &[]),
        ("embedding: e b", &[e, b]),
        ("embedding:x b", &[b]),
        ("embedding:x, b", &[comma, b]),
        ("embedding:", &[]),
        ("embedding:,", &[comma]),
        ("a\tembedding:e", &as_text(&[320])),
        ("aembedding:e", &as_text(&[64])),
    ];
    for &(prompt, expected) in cases {
        assert_eq!(content(prompt, &lookup), expected, "{prompt:?}");
    }
}

#[test]
fn long_embeddings_run_over_chunk_borders() {
    let lookup = |_: &str| Some((0..200).map(|i| Arc::from([i as f32].as_slice())).collect());
    let chunks = tokenize("(embedding:long:0.5)", &TokenizerOptions::sd1(), &lookup);
    assert_eq!(chunks.len(), 3);
    let rows: Vec<f32> = chunks
        .iter()
        .flatten()
        .filter_map(
            |(token, weight)| if let Token::Vector(row) = token { Some(row[0] * weight * 2.0) } else { None },
        )
        .collect();
    assert_eq!(rows, (0..200).map(|i| i as f32).collect::<Vec<_>>());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn any_prompt_gives_whole_chunks(prompt in prop_oneof![
        any::<String>(),
        "[()\\\\:.0-9a embding,\n_-]{0,120}",
        "(\\(|\\)|:1\\.5|a| embedding:e|<\\|endoftext\\|>|\\\\|\u{3a3}|\u{3000}){0,60}",
    ]) {
        let lookup = |name: &str| name.starts_with('e').then(|| vec![Arc::from([1.0f32].as_slice()); name.len() % 12]);
        let chunks = tokenize(&prompt, &TokenizerOptions::sd1(), &lookup);
        prop_assert!(!chunks.is_empty());
        for chunk in &chunks {
            prop_assert_eq!(chunk.len(), CHUNK_TOKENS);
            prop_assert_eq!(&chunk[0], &(Token::Id(START_TOKEN), 1.0));
            prop_assert_eq!(&chunk[CHUNK_TOKENS - 1], &(Token::Id(END_TOKEN), 1.0));
            prop_assert!(chunk.iter().all(|(t, _)| !matches!(t, Token::Id(id) if *id > END_TOKEN)));
        }
    }
}
