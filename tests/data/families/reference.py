#!/usr/bin/env python3
"""Forward passes of the tiny UNets in float64, for tests/families.rs.

    reference.py OUT.safetensors          (needs torch and safetensors)

Written from the papers (Rombach et al. 2022; Podell et al. 2023), independent of the program's own code: weights
are those that `kiln synth --tiny` writes, a pure function of tensor name and shape, rounded to f16; everything
else is float64. Each case holds x, timesteps, context and, where the family has one, the vector y; and the output.
"""
import math
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

MASK = (1 << 64) - 1
PREFIX = "model.diffusion_model."
GROUPS = 8


def fnv1a(name):
    h = 0xCBF29CE484222325
    for b in name.encode():
        h = ((h ^ b) * 0x100000001B3) & MASK
    return h


def uniform(name, count):
    import numpy as np
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(fnv1a(name))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0 ** -23) - np.float32(1)


def weight(name, *shape):
    name = PREFIX + name
    if name.endswith(".bias"):
        scale, shift = 0.05, 0.0
    elif len(shape) == 1:
        scale, shift = 0.1, 1.0
    else:
        scale, shift = (3.0 / math.prod(shape[1:])) ** 0.5, 0.0
    values = torch.from_numpy(uniform(name, math.prod(shape)))
    values = values * torch.tensor(scale, dtype=torch.float32) + torch.tensor(shift, dtype=torch.float32)
    return values.half().double().reshape(shape)


def linear(x, name, to, bias=True):
    return F.linear(x, weight(f"{name}.weight", to, x.shape[-1]), weight(f"{name}.bias", to) if bias else None)


def conv(x, name, to, size=3, stride=1):
    w = weight(f"{name}.weight", to, x.shape[1], size, size)
    return F.conv2d(x, w, weight(f"{name}.bias", to), stride=stride, padding=size // 2)


def group_norm(x, name, eps):
    c = x.shape[1]
    return F.group_norm(x, GROUPS, weight(f"{name}.weight", c), weight(f"{name}.bias", c), eps)


def layer_norm(x, name):
    c = x.shape[-1]
    return F.layer_norm(x, (c,), weight(f"{name}.weight", c), weight(f"{name}.bias", c), 1e-5)


def residual(x, emb, name, to):
    h = conv(F.silu(group_norm(x, f"{name}.in_layers.0", 1e-5)), f"{name}.in_layers.2", to)
    h = h + linear(F.silu(emb), f"{name}.emb_layers.1", to)[:, :, None, None]
    h = conv(F.silu(group_norm(h, f"{name}.out_layers.0", 1e-5)), f"{name}.out_layers.3", to)
    skip = x if x.shape[1] == to else conv(x, f"{name}.skip_connection", to, size=1)
    return skip + h


def attention(x, context, name, heads):
    b, s, c = x.shape
    q, k, v = (
        linear(t, f"{name}.to_{p}", c, bias=False).reshape(b, -1, heads, c // heads).transpose(1, 2)
        for p, t in (("q", x), ("k", context), ("v", context))
    )
    weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(c // heads), dim=-1)
    return linear((weights @ v).transpose(1, 2).reshape(b, s, c), f"{name}.to_out.0", c)


def transformer(x, context, name, depth, heads, is_linear):
    b, c, h, w = x.shape
    y = group_norm(x, f"{name}.norm", 1e-6)
    tokens = lambda t: t.reshape(b, c, h * w).transpose(1, 2)
    if is_linear:
        y = linear(tokens(y), f"{name}.proj_in", c)
    else:
        y = tokens(conv(y, f"{name}.proj_in", c, size=1))
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        n = layer_norm(y, f"{block}.norm1")
        y = y + attention(n, n, f"{block}.attn1", heads)
        y = y + attention(layer_norm(y, f"{block}.norm2"), context, f"{block}.attn2", heads)
        value, gate = linear(layer_norm(y, f"{block}.norm3"), f"{block}.ff.net.0.proj", 8 * c).chunk(2, dim=-1)
        y = y + linear(value * F.gelu(gate), f"{block}.ff.net.2", c)
    if is_linear:
        y = linear(y, f"{name}.proj_out", c)
        return x + y.transpose(1, 2).reshape(b, c, h, w)
    return x + conv(y.transpose(1, 2).reshape(b, c, h, w), f"{name}.proj_out", c, size=1)


def sinusoid(t, width):
    half = width // 2
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def unet(case, x, timesteps, context, y):
    width, depths, is_linear = case["width"], case["depths"], case["linear"]
    heads = lambda c: case["heads"] or c // 64
    block = lambda h, name, c, depth: (
        transformer(h, context, name, depth, heads(c), is_linear) if depth else h
    )
    emb = F.silu(linear(sinusoid(timesteps, width), "time_embed.0", 4 * width))
    emb = linear(emb, "time_embed.2", 4 * width)
    if y is not None:
        emb = emb + linear(F.silu(linear(y, "label_emb.0.0", 4 * width)), "label_emb.0.2", 4 * width)
    channels = [width, 2 * width, 2 * width]
    h = conv(x, "input_blocks.0.0", width)
    skips = [h]
    index = 1
    for level, c in enumerate(channels):
        h = residual(h, emb, f"input_blocks.{index}.0", c)
        h = block(h, f"input_blocks.{index}.1", c, depths[level])
        skips.append(h)
        index += 1
        if level < 2:
            h = conv(h, f"input_blocks.{index}.0.op", c, stride=2)
            skips.append(h)
            index += 1
    c = channels[-1]
    h = residual(h, emb, "middle_block.0", c)
    h = block(h, "middle_block.1", c, 1)
    h = residual(h, emb, "middle_block.2", c)
    index = 0
    for level in (2, 1, 0):
        for unit in range(2):
            h = residual(torch.cat([h, skips.pop()], dim=1), emb, f"output_blocks.{index}.0", channels[level])
            h = block(h, f"output_blocks.{index}.1", channels[level], depths[level])
            if level and unit == 1:
                h = F.interpolate(h, scale_factor=2, mode="nearest")
                h = conv(h, f"output_blocks.{index}.{2 if depths[level] else 1}.conv", channels[level])
            index += 1
    return conv(F.silu(group_norm(h, "out.0", 1e-5)), "out.2", 4)


SD1 = dict(width=32, depths=[1, 1, 0], linear=False, heads=2, channels=4, context=32, vector=0)
SD2 = dict(SD1, width=64, linear=True, heads=0)
CASES = {
    "sd1": SD1,
    "sd1-inpaint": dict(SD1, channels=9),
    "sd1-ip2p": dict(SD1, channels=8),
    "sd2": SD2,
    "sdxl": dict(SD2, depths=[0, 1, 2], context=64, vector=2816),
    "sdxl-inpaint": dict(SD2, depths=[0, 1, 2], context=64, vector=2816, channels=9),
    "sdxl-refiner": dict(SD2, depths=[0, 1, 0], context=32, vector=2560),
}


def main():
    out = {}
    for name, case in CASES.items():
        generator = torch.Generator().manual_seed(len(out))
        rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float32)
        inputs = {
            "x": rand(2, case["channels"], 8, 12),
            "timesteps": torch.tensor([17.0, 801.0]),
            "context": rand(2, 77, case["context"]),
        }
        if case["vector"]:
            inputs["y"] = rand(2, case["vector"])
        doubles = {k: v.double() for k, v in inputs.items()}
        result = unet(case, doubles["x"], doubles["timesteps"], doubles["context"], doubles.get("y"))
        print(name, "std", result.std().item())
        out.update({f"{name}.{k}": v.contiguous() for k, v in inputs.items()})
        out[f"{name}.output"] = result.float().contiguous()
    save_file(out, sys.argv[1])


if __name__ == "__main__":
    main()
