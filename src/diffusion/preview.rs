//! Quick pictures of a latent: a linear map from its channels to colours.

use crate::tensor::HostTensor;

/// Linear weights from latent channels to red, green and blue in −1..1.
#[derive(Clone, Debug, PartialEq)]
pub struct Latent2Rgb {
    /// One row a channel.
    pub factors: &'static [[f32; 3]],
    /// Added to every pixel.
    pub bias: [f32; 3],
}

impl Latent2Rgb {
    /// The first sample of `latent` (`[B, C, h, w]`, model scale) as `[1, h, w, 3]` in 0..1.
    pub fn picture(&self, latent: &HostTensor) -> HostTensor {
        let (c, h, w) = (latent.dim(1), latent.dim(2), latent.dim(3));
        let plane = h * w;
        let mut out = Vec::with_capacity(plane * 3);
        for i in 0..plane {
            for k in 0..3 {
                let terms = self.factors.iter().take(c).enumerate();
                let sum: f32 = terms.map(|(j, f)| latent.data()[j * plane + i] * f[k]).sum();
                out.push(((sum + self.bias[k] + 1.0) / 2.0).clamp(0.0, 1.0));
            }
        }
        HostTensor::new(&[1, h, w, 3], out).unwrap_or_default()
    }
}

/// Stable Diffusion 1 and 2.
///
/// The factors are a published least-squares fit of decoded pictures to latents.
pub static SD1: Latent2Rgb = Latent2Rgb {
    factors: &[
        [0.3512, 0.2297, 0.3227],
        [0.3250, 0.4974, 0.2350],
        [-0.2829, 0.1762, 0.2721],
        [-0.2120, -0.2616, -0.7177],
    ],
    bias: [0.0; 3],
};

/// Stable Diffusion XL.
pub static SDXL: Latent2Rgb = Latent2Rgb {
    factors: &[
        [0.3651, 0.4232, 0.4341],
        [-0.2533, -0.0042, 0.1068],
        [0.1076, 0.1111, -0.0362],
        [-0.3165, -0.2492, -0.2188],
    ],
    bias: [0.1084, -0.0175, -0.0011],
};

#[cfg(test)]
mod tests {
    use super::{Latent2Rgb, SD1, SDXL};
    use crate::tensor::HostTensor;

    /// The reference's 8-bit pictures (truncated) of one prediction; a value on
    /// the edge of two levels may fall to either.
    #[test]
    fn pictures_are_the_reference_s() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden/previews.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let x0 = file.tensor("preview_latent2rgb.x0").unwrap();
        let values = x0.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let latent = HostTensor::new(x0.shape(), values.collect()).unwrap();
        let check = |name: &str, map: &Latent2Rgb| {
            let want = file.tensor(name).unwrap();
            let got = map.picture(&latent).map(|v| (v * 255.0).trunc());
            let pairs = got.data().iter().zip(want.data());
            let off: Vec<f32> = pairs.map(|(g, w)| (g - f32::from(*w)).abs()).filter(|d| *d > 0.0).collect();
            assert!(off.len() <= 2 && off.iter().all(|d| *d <= 1.0), "{name}: {off:?}");
        };
        check("preview_latent2rgb.rgb_u8", &SD1);
        check("preview_latent2rgb_sdxl.rgb_u8", &SDXL);
    }
}
