//! Device memory of SDXL at 1024², by the runtime's own accounting.

use kiln::models::text::TextKind;
use kiln::models::unet::UnetInput;
use kiln::tensor::HostTensor;

use crate::{Opened, encode, opened};

/// What SDXL at 1024² may take.
const LIMIT_BYTES: u64 = 9_000_000_000;

#[test]
fn sdxl_at_1024_pixels_fits_into_nine_gigabytes() {
    let Opened { driver, store, file, .. } = &opened("sdxl-base");
    let conds = [encode(file, TextKind::Sdxl), encode(file, TextKind::Sdxl)];
    let text_bytes = driver.used_and_peak().0;
    let unet = file.unet().unwrap();
    let context = unet.context(&conds).unwrap();
    let x = HostTensor::zeros(&[2, 4, 128, 128]);
    let vector = HostTensor::zeros(&[2, 2816]);
    for _ in 0..3 {
        let input = UnetInput { x: &x, timesteps: &[500.0; 2], context: &context, vector: Some(&vector) };
        unet.forward(&input, None).unwrap();
    }
    let sampling_bytes = driver.used_and_peak();
    file.vae().unwrap().decode_raw(&x.rows(0, 1)).unwrap();
    let (used, peak) = driver.used_and_peak();
    let report = store.placement().diffusion.memory();
    println!(
        "text encoders {:.2} GB; with the UNet {:.2} GB, at most {:.2} GB; with the VAE {:.2} GB, at most {:.2} GB; \
         weights {:.2} GB",
        text_bytes as f64 / 1e9,
        sampling_bytes.0 as f64 / 1e9,
        sampling_bytes.1 as f64 / 1e9,
        used as f64 / 1e9,
        peak as f64 / 1e9,
        report.weights as f64 / 1e9
    );
    // 3.47 G parameters of two bytes, packed: nothing was left out.
    assert!(report.weights > 6_500_000_000, "{} bytes of weights", report.weights);
    assert!(peak <= LIMIT_BYTES, "{peak} bytes at the peak, {LIMIT_BYTES} may be used");
}
