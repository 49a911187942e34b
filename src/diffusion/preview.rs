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

/// SD1.x: a least-squares fit of the decoder's output, in common use.
pub const SD1: Latent2Rgb = Latent2Rgb {
    factors: &[
        [0.3512, 0.2297, 0.3227],
        [0.3250, 0.4974, 0.2350],
        [-0.2829, 0.1762, 0.2721],
        [-0.2120, -0.2616, -0.7177],
    ],
    bias: [0.0; 3],
};

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
