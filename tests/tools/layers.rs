//! `kiln bench kernels` on good and bad tables.

use serde_json::Value as Json;

use crate::{Said, empty, has_simt, run, text};

const HEADER: &str = "stage,op,dims,M,N,K,count_per_forward,GFLOP_each,min_MB_each";

fn bench(name: &str, table: &str, more: &[&str]) -> Said {
    let path = empty(name).join("layers.csv");
    std::fs::write(&path, table).unwrap();
    run(&[&["bench", "kernels", "--device", "simt", "--layers", text(&path)], more].concat())
}

#[test]
fn a_table_that_cannot_be_read_is_refused_with_its_place() {
    let said = bench("layers-typo", &format!("{HEADER}\nunet,gemmm,,8,8,8,1,0,0\n"), &[]);
    assert_eq!((said.code, said.out.as_str()), (Some(1), ""));
    assert!(
        said.err.contains("layers.csv: line 2 of the layer table, column 'op': 'gemmm' is not known"),
        "{}",
        said.err
    );
    let said = bench("layers-nan", &format!("{HEADER}\nunet,gemm,,8,8,8,nan,0,0\n"), &[]);
    assert!(
        said.err.contains("line 2 of the layer table, column 'count_per_forward': 'nan'"),
        "{}",
        said.err
    );
}

/// Two good layers around one that no device can hold, a row that is fused, a mark at the start of the file.
fn mixed() -> String {
    format!(
        "\u{feff}{HEADER}\nunet,gemm,,8,16,8,2,0.000002,0.0006\nunet,gemm,,2000000,2000000,8,1,64,16000000\n\
         unet,elt:silu,\"(2, 8)\",,,,3,0,0\nunet,layer_norm,\"(4, 32)\",,,,1,0,0.0005\n"
    )
}

#[test]
fn a_layer_that_cannot_be_timed_leaves_the_others() {
    if !has_simt() {
        return;
    }
    let said = bench("layers-json", &mixed(), &["--json"]);
    assert_eq!((said.code, said.err.trim_end()), (Some(1), "error: 1 of 3 layers can't be timed"));
    let body: Json = serde_json::from_str(&said.out).expect("JSON");
    let layers = body["layers"].as_array().unwrap();
    assert!(layers[0]["us"].as_f64().is_some_and(|us| us > 0.0), "{}", layers[0]);
    assert!(layers[1]["us"].is_null(), "{}", layers[1]);
    assert!(layers[1]["error"].as_str().is_some_and(|e| e.contains("out of device memory")), "{}", layers[1]);
    assert_eq!(layers[2]["op"], "layer_norm");
    assert!(layers[2]["us"].as_f64().is_some_and(|us| us > 0.0), "{}", layers[2]);
    assert_eq!(body["left_out"]["elt:silu"], 1);
    assert!(body["ceilings"].is_null() && layers[0]["floor_us"].is_null(), "the SIMT layer has no ceilings");
}

#[test]
fn a_table_says_what_failed_and_what_was_left_out() {
    if !has_simt() {
        return;
    }
    let said = bench("layers-table", &mixed(), &[]);
    assert_eq!(said.code, Some(1));
    assert!(said.out.contains("FAILED: out of device memory"), "{}", said.out);
    assert!(said.out.contains("left out, as they have no kernel of their own: 1 elt:silu"), "{}", said.out);
    assert!(!said.out.contains('%'), "no share of a floor that is not known: {}", said.out);
}
