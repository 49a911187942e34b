#!/usr/bin/env python3
"""The forward pass of the tiny SD1.x UNet under ../pytorch/hypernetwork.pt in float64, for tests/families.rs.

    hypernetwork.py OUT.safetensors          (needs torch and safetensors)

The hypernetwork (Eon's and AUTOMATIC1111's design): k and v of every attention are projected from h + s·network(h).
"""
import pathlib
import sys

import reference
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

STRENGTH = 0.7
FILE = torch.load(pathlib.Path(__file__).parent / "../pytorch/hypernetwork.pt")


def network(x, layers):
    layers = {name: tensor.double() for name, tensor in layers.items()}
    y = x
    for linear, norm in (("linear.0", "linear.2"), ("linear.3", "linear.4")):
        y = F.relu(F.linear(y, layers[f"{linear}.weight"], layers[f"{linear}.bias"]))
        y = F.layer_norm(y, y.shape[-1:], layers[f"{norm}.weight"], layers[f"{norm}.bias"], 1e-5)
    return y


def attention(x, context, name, heads):
    b, s, c = x.shape
    keys, values = (context + STRENGTH * network(context, layers) for layers in FILE[context.shape[-1]])
    q, k, v = (
        reference.linear(t, f"{name}.to_{p}", c, bias=False).reshape(b, -1, heads, c // heads).transpose(1, 2)
        for p, t in (("q", x), ("k", keys), ("v", values))
    )
    out = F.scaled_dot_product_attention(q, k, v)
    return reference.linear(out.transpose(1, 2).reshape(b, s, c), f"{name}.to_out.0", c)


def main():
    reference.attention = attention
    generator = torch.Generator().manual_seed(99)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float32)
    out = {"x": rand(2, 4, 8, 12), "timesteps": torch.tensor([17.0, 801.0]), "context": rand(2, 77, 32)}
    result = reference.unet(reference.CASES["sd1"], *(out[k].double() for k in ("x", "timesteps", "context")), None)
    print("std", result.std().item())
    out = {f"sd1-hypernetwork.{k}": v.contiguous() for k, v in {**out, "output": result.float()}.items()}
    save_file(out, sys.argv[1])


main()
