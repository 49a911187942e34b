//! LoRA, ControlNet, upscalers and TAESD on the SIMT layer, against the CPU backend.

#[path = "../adapters/files.rs"]
#[allow(dead_code, reason = "made for the adapters' tests")]
mod files;

use kiln::driver::Driver;

use crate::pipeline::{cpu, engine, picture, psnr, run, simt};

/// f16 (bf16 in the autoencoders) against f32. What adapters add are more sums of the same kind, so the bound is that
/// of the plain pipeline, but for the compact autoencoder, which is in bf16 both ways.
#[test]
fn pictures_with_adapters_are_those_of_the_cpu() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for folder in [&ours, &theirs] {
        files::write_all(&folder.path().join("models"));
    }
    let (driver, placement) = simt();
    let (on_simt, on_cpu) = (engine(placement, ours.path()), engine(cpu(), theirs.path()));
    let cases = [
        ("lora-stack", 38.0),
        ("controlnet-stack", 38.0),
        ("controlnet-forms", 38.0),
        ("upscale-chain", 38.0),
        ("tiny-vae", 34.0),
    ];
    for (name, least) in cases {
        let mut prompt = files::workflow(name);
        prompt["3"]["inputs"]["steps"] = 2.into();
        let a = picture(&run(&on_simt, prompt.clone()), ours.path());
        let b = picture(&run(&on_cpu, prompt), theirs.path());
        let db = psnr(&a, &b);
        println!("{name}: {db:.1} dB");
        assert!(db >= least, "{name}: {db:.1} dB");
    }
    assert!(driver.instruments().counts().graph_launches > 0, "steps with nets replay a graph");
    on_simt.shutdown();
    on_cpu.shutdown();
}
