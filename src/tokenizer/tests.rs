//! Edge cases and properties; recorded prompts are compared in `tests/golden`.

use proptest::prelude::*;

use super::*;

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
