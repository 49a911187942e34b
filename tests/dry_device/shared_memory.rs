//! Shared memory of a block: what launchers ask for fits every device, from the 64 KB of Turing on.

use std::sync::Arc;

use kiln::backend::cuda::{Gpu, check};
use kiln::driver::Capability;
use kiln::models::text::TextKind;
use kiln::models::unet::UnetInput;
use kiln::tensor::HostTensor;

use crate::driver::DryDriver;
use crate::{Opened, encode, opened_on};

/// With the KB of a block that CUDA's table gives.
const DEVICES: [(u32, u32, u32); 9] = [
    (7, 5, 64),
    (8, 0, 163),
    (8, 6, 99),
    (8, 7, 163),
    (8, 9, 99),
    (9, 0, 227),
    (10, 0, 227),
    (12, 0, 99),
    (12, 1, 99),
];

/// Every launcher with the shapes of the checks; the driver refuses what does not fit.
#[test]
fn every_launch_fits_every_device() {
    for (major, minor, kib) in DEVICES {
        let capability = Capability { major, minor };
        assert_eq!(capability.shared_memory(), kib << 10);
        let driver = Arc::new(DryDriver::open_as(capability));
        let gpu = Gpu::new(driver.clone()).unwrap();
        for case in check::cases().iter().filter(|case| case.quick && case.runs_on(&gpu)) {
            if let Err(error) = check::run(&gpu, case, &check::Options::default()) {
                panic!("{capability}: {}: {error}", case.name);
            }
        }
        let launches = driver.take_launches();
        assert!(launches.len() > 300, "{} launches on {capability}", launches.len());
        assert_eq!(launches.iter().any(|name| name.contains("sm90")), major == 9);
    }
}

#[test]
fn a_network_fits_the_smallest_devices() {
    for (major, minor) in [(7, 5), (8, 6)] {
        let Opened { driver, file, .. } = &opened_on("sd15", DryDriver::open_as(Capability { major, minor }));
        let conds = [encode(file, TextKind::Sd1), encode(file, TextKind::Sd1)];
        let unet = file.unet().unwrap();
        let context = unet.context(&conds).unwrap();
        let x = HostTensor::zeros(&[2, 4, 64, 64]);
        driver.take_launches();
        let input = UnetInput { x: &x, timesteps: &[500.0; 2], context: &context, vector: None };
        unet.forward(&input, None).unwrap();
        let launches = driver.take_launches();
        // Wide tiles, not a fallback for odd shapes.
        assert!(launches.iter().any(|name| name == "conv_sm80_128x160_f16"), "{launches:?}");
        assert!(launches.iter().all(|name| !name.contains("attention_rows")));
    }
}
