//! Launches of a step: each costs its start, so their number is a bar of its own.

use std::collections::BTreeMap;

use kiln::models::text::TextKind;
use kiln::models::unet::UnetInput;
use kiln::tensor::HostTensor;

use crate::{Opened, encode, opened};

/// Most launches of one forward pass of the UNet.
const MOST: usize = 350;

#[test]
fn a_forward_pass_of_sd15_takes_few_launches() {
    let Opened { driver, file, .. } = &opened("sd15");
    let conds = [encode(file, TextKind::Sd1), encode(file, TextKind::Sd1)];
    let unet = file.unet().unwrap();
    let context = unet.context(&conds).unwrap();
    let x = HostTensor::zeros(&[2, 4, 64, 64]);
    // The first pass packs weights; the second one is recorded.
    let mut launches = Vec::new();
    for _ in 0..2 {
        driver.take_launches();
        let input = UnetInput { x: &x, timesteps: &[500.0; 2], context: &context, vector: None };
        unet.forward(&input, None).unwrap();
        launches = driver.take_launches();
    }
    let mut by_name = BTreeMap::<&str, usize>::new();
    for name in &launches {
        *by_name.entry(name).or_default() += 1;
    }
    for (name, count) in &by_name {
        println!("{count:>4} x {name}");
    }
    println!("{} launches", launches.len());
    assert!(launches.len() <= MOST, "{} launches, {MOST} may be used", launches.len());
    // The whole network is there: 16 transformer blocks with two attentions each.
    let attentions: usize = by_name.iter().filter(|(n, _)| n.starts_with("attention")).map(|(_, c)| c).sum();
    assert_eq!(attentions, 32);
}
