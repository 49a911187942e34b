"""PyTorch on the layer tables that `kiln bench kernels` takes: cuDNN convolutions, cuBLAS products, SDPA's backends.

Prints one JSON object in the form of `kiln bench kernels --json`, for compare.py.
Needs: torch with CUDA. `--device cpu` works too (small tables; to try the script).

    python benches/peer_torch.py --layers layers.csv > torch.json
    python benches/peer_torch.py --layers layers.csv --unet > torch.json   # an SD1.5-shaped UNet as well; needs diffusers
"""
import argparse, csv, json, math, re, statistics, sys, time

try:
    import torch
    import torch.nn.functional as F
except ImportError:  # reading a table needs no torch
    torch = None

LAUNCHES, ROUNDS, MOST_SETS = 24, 7, 16


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def read_layers(path):
    """The rows that kiln times too: (stage, kind, extents, count, flops, bytes)."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        for line, row in enumerate(csv.DictReader(file), 2):
            op, dims = row["op"], numbers(row["dims"] or "")
            if op == "attention":
                kind, extents = "attention", dims
            elif op == "conv":
                batch, cin, cout, side, _, stride, height, width = dims[:8]
                kind, extents = "conv", [batch, cin, cout, side, stride, height, width]
            elif op in ("gemm", "gemm(conv1x1)"):
                kind, extents = "gemm", [int(float(row[c])) for c in "MNK"]
            elif op == "group_norm":
                n, c, h, w, groups = dims
                kind, extents = "group_norm", [n, c, h * w, groups]
            elif op == "layer_norm":
                kind, extents = "layer_norm", [math.prod(dims[:-1]), dims[-1]]
            elif op.startswith("elt:"):
                continue  # no kernel of its own in kiln
            else:
                raise ValueError(f"line {line} of {path}: '{op}' is not known")
            cost = float(row["GFLOP_each"]) * 1e9, float(row["min_MB_each"]) * 1e6
            yield row["stage"], kind, extents, float(row["count_per_forward"]), *cost


def make(kind, extents, dtype, device, backend):
    """A function of no arguments that runs the layer on operands of its own."""

    def rand(*shape):
        return torch.randn(*shape, device=device, dtype=dtype) * 0.25

    if kind == "attention":
        b, h, d, q, k = extents
        Q, K, V = rand(b, h, q, d), rand(b, h, k, d), rand(b, h, k, d)

        def attention():
            with torch.nn.attention.sdpa_kernel(backend):
                return F.scaled_dot_product_attention(Q, K, V)

        return attention
    if kind == "conv":
        b, cin, cout, side, stride, h, w = extents
        x = rand(b, cin, h, w).to(memory_format=torch.channels_last)
        weight = rand(cout, cin, side, side).to(memory_format=torch.channels_last)
        bias = rand(cout)
        return lambda: F.conv2d(x, weight, bias, stride=stride, padding=side // 2)
    if kind == "gemm":
        m, n, k = extents
        x, weight, bias = rand(m, k), rand(n, k), rand(n)
        return lambda: F.linear(x, weight, bias)
    if kind == "group_norm":
        n, c, pixels, groups = extents
        x = rand(n, c, pixels, 1).to(memory_format=torch.channels_last)
        weight, bias = rand(c), rand(c)
        return lambda: F.silu(F.group_norm(x, groups, weight, bias))
    rows, c = extents
    x, weight, bias = rand(rows, c), rand(c), rand(c)
    return lambda: F.layer_norm(x, (c,), weight, bias)


def micros(runs, device):
    """Median microseconds of one launch: a graph of launches over all operand sets, as kiln does it."""
    for run in runs:
        run()
    if device == "cpu":
        start = time.perf_counter()
        for i in range(LAUNCHES):
            runs[i % len(runs)]()
        return (time.perf_counter() - start) * 1e6 / LAUNCHES
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            runs[i % len(runs)]()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAUNCHES)
    return statistics.median(times)


def backends(kind):
    if kind != "attention":
        return {"": None}
    names = torch.nn.attention.SDPBackend
    return {"flash": names.FLASH_ATTENTION, "cudnn": names.CUDNN_ATTENTION, "efficient": names.EFFICIENT_ATTENTION, "math": names.MATH}


def time_layer(kind, extents, size, dtype, device):
    l2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    sets = min(max(math.ceil(2 * l2 / max(size, 1)), 1), MOST_SETS)
    best, by = math.inf, None
    for name, backend in backends(kind).items():
        try:
            us = micros([make(kind, extents, dtype, device, backend) for _ in range(sets)], device)
        except RuntimeError:
            continue  # this backend does not take the shape
        if us < best:
            best, by = us, name
    return best, by


def time_unet(dtype, device, mode):
    """Milliseconds of an SD1.5-shaped UNet forward, cfg pair at 512²: eager channels-last and compiled."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(cross_attention_dim=768).to(device, dtype).to(memory_format=torch.channels_last).eval()
    x = torch.randn(2, 4, 64, 64, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    text, t = torch.randn(2, 77, 768, device=device, dtype=dtype), torch.tensor([801, 801], device=device)
    result = {}
    for name, model in (("eager", unet), (f"compile {mode}", torch.compile(unet, mode=mode))):
        with torch.no_grad():
            for _ in range(3):
                model(x, t, text)
            times = []
            for _ in range(20):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                model(x, t, text)
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
        result[name] = statistics.median(times)
        print(f"unet {name}: {result[name]:.2f} ms", file=sys.stderr)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", required=True)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--filter", default="")
    parser.add_argument("--unet", action="store_true")
    parser.add_argument("--compile-mode", default="reduce-overhead", help="of torch.compile; max-autotune takes many minutes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    args = parser.parse_args()
    if torch is None:
        sys.exit("peer_torch.py: PyTorch is not installed")
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    torch.backends.cudnn.benchmark = True
    rows = []
    with torch.no_grad():
        for stage, kind, extents, count, flops, size in read_layers(args.layers):
            if args.filter not in kind and args.filter not in stage:
                continue
            us, by = time_layer(kind, extents, size, dtype, args.device)
            rows.append({"stage": stage, "op": kind, "extents": extents, "count": count, "us": us, "flops": flops, "bytes": size, "by": by})
            print(f"{stage} {kind} {extents}: {us:.1f} us {by or ''}", file=sys.stderr)
    name = torch.cuda.get_device_name(0) if args.device == "cuda" else "cpu"
    body = {"device": name, "element": "bf16" if args.bf16 else "f16", "torch": torch.__version__, "layers": rows}
    if args.unet:
        body["unet_ms"] = time_unet(dtype, args.device, args.compile_mode)
    json.dump(body, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
