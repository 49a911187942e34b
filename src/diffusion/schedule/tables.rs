//! Published optimal schedules, as numbers.
//!
//! Source: A. Sabour, S. Fidler, K. Kreis, "Align your steps: optimizing
//! sampling schedules in diffusion models", 2024, quick-start guide.

/// Ten steps for Stable Diffusion 1.5.
pub(super) const AYS_SD1: [f64; 11] = [
    14.6146412293,
    6.4745760956,
    3.8636745985,
    2.6946151520,
    1.8841921177,
    1.3943805092,
    0.9642583904,
    0.6523686016,
    0.3977456272,
    0.1515232662,
    0.0291671582,
];

/// Ten steps for Stable Diffusion XL.
pub(super) const AYS_SDXL: [f64; 11] = [
    14.6146412293,
    6.3184485287,
    3.7681790315,
    2.1811480769,
    1.3405244945,
    0.8620721141,
    0.5550693289,
    0.3798540708,
    0.2332364134,
    0.1114188177,
    0.0291671582,
];

/// Ten steps for Stable Video Diffusion.
pub(super) const AYS_SVD: [f64; 11] =
    [700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002];
