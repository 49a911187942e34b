#!/usr/bin/env python3
"""Peer for `kiln bench model`: diffusers' SD1.5 UNet and VAE on PyTorch, on the CPU.

    pip install torch diffusers
    python3 benches/peers/torch_sd15.py --size 64 --size 256 [--bf16] [--threads 1] [--kiln target/release/kiln]

Random weights of the real architecture (the time does not depend on the values). Prints CPU seconds (user and system)
of the best of --repeats runs after one that warms up. With --kiln the two alternate, stage by stage, on the same
machine at the same time, and the last column is the ratio peer / kiln.
"""
import argparse
import re
import subprocess
import time

UNET = dict(sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, cross_attention_dim=768,
            attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
VAE = dict(in_channels=3, out_channels=3, latent_channels=4, layers_per_block=2,
           block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
           up_block_types=("UpDecoderBlock2D",) * 4)


def best(run, repeats):
    """CPU seconds (user and system, all threads) of the best of `repeats` runs after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return min(times)


def kiln(args, size):
    """CPU seconds of kiln's stages at this size: {'step': s, 'vae': s}."""
    command = [args.kiln, "bench", "model", "--size", str(size), "--threads", str(args.threads),
               "--repeats", str(args.repeats)] + (["--cpu-bf16"] if args.bf16 else [])
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for line in text.splitlines():
        for key, name in (("step", f"cfg step {size}"), ("vae", f"VAE decode {size}")):
            if line.startswith(name):
                found[key] = float(re.findall(r"[\d.]+", line[len(name):])[0])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--no-vae", action="store_true")
    parser.add_argument("--kiln", help="kiln binary to alternate with")
    args = parser.parse_args()

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    layout = torch.channels_last
    unet = UNet2DConditionModel(**UNET).eval().to(dtype=dtype, memory_format=layout)
    vae = None if args.no_vae else AutoencoderKL(**VAE).eval().to(dtype=dtype, memory_format=layout)
    print(f"torch {torch.__version__}, {dtype}, {args.threads} thread(s), {time.strftime('%Y-%m-%d')}")
    print(f"{'stage':<18}{'peer CPU s':>12}{'kiln CPU s':>12}{'ratio':>8}")
    for size in args.size or [64, 256, 512]:
        ours = kiln(args, size) if args.kiln else {}
        x = torch.randn(2, 4, size // 8, size // 8, dtype=dtype).to(memory_format=layout)
        context = torch.randn(2, 77, 768, dtype=dtype)
        stages = [("step", f"cfg step {size}", lambda: unet(x, 801, encoder_hidden_states=context))]
        if vae is not None:
            stages.append(("vae", f"VAE decode {size}", lambda: vae.decode(x[:1])))
        for key, name, run in stages:
            with torch.inference_mode():
                peer = best(run, args.repeats)
            mine = ours.get(key)
            ratio = f"{peer / mine:8.2f}" if mine else ""
            print(f"{name:<18}{peer:>12.3f}{mine or float('nan'):>12.3f}{ratio}", flush=True)


if __name__ == "__main__":
    main()
