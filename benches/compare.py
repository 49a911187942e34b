"""The ratio table of two runs on one layer table: `kiln bench kernels --json` and peer_torch.py.

    python benches/compare.py kiln.json torch.json [--plot out.png] > table.md

A ratio is peer time / kiln time: above 1 kiln is faster. Layers that only one of the two has timed are named below
the table and on the terminal; with nothing to compare, or with two element types, there is no table but an error.
The plot needs matplotlib.
"""
import argparse, json, sys
from collections import defaultdict


def numbers(row):
    """Extents of a layer: kiln writes them as `Gemm([1, 2, 3])`."""
    if "extents" in row:
        return tuple(row["extents"])
    return tuple(int(n) for n in row["shape"].split("[")[1].rstrip("])").split(","))


def key(row):
    return row["stage"], row["op"], numbers(row)


def name(key):
    return f"{key[0]} {key[1]} {'x'.join(map(str, key[2]))}"


def pairs(ours, theirs):
    """Layers that both have timed, and a line for each that is left out."""
    if ours["element"] != theirs["element"]:
        raise ValueError(f"kiln ran {ours['element']}, the peer {theirs['element']}: run both with --bf16 or both without")
    peers = {key(row): row for row in theirs["layers"]}
    both, dropped, seen = [], [], set()
    for row in ours["layers"]:
        peer = peers.get(key(row))
        seen.add(key(row))
        if "us" not in row:
            dropped.append(f"{name(key(row))}: kiln has no time ({row.get('error', 'no reason given')})")
        elif peer is None:
            dropped.append(f"{name(key(row))}: the peer has no such layer")
        elif not 0 < peer["us"] < float("inf"):
            dropped.append(f"{name(key(row))}: the peer has no time")
        else:
            both.append((row, peer))
    dropped += [f"{name(k)}: kiln has no such layer" for k in peers if k not in seen]
    if not both:
        raise ValueError(f"no layer was timed by both: {len(ours['layers'])} of kiln, {len(peers)} of the peer")
    return both, dropped


def table(ours, theirs, both, dropped):
    """Lines of the tables in Markdown, and a point for each layer: op, FLOP of a forward pass, ratio."""
    lines = [f"kiln on {ours['device']}, {ours['element']}; PyTorch {theirs.get('torch', '?')} on {theirs['device']}", ""]
    lines.append("| stage | op | shape | count | kiln us | peer us | by | ratio | kiln TFLOP/s | of floor |")
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    sums, points = defaultdict(lambda: [0.0, 0.0, 0.0]), []
    for row, peer in both:
        ratio = peer["us"] / row["us"]
        floor = "-" if row.get("floor_us") is None else f"{100 * row['floor_us'] / row['us']:.0f}%"
        shape = "x".join(map(str, numbers(row)))
        lines.append(
            f"| {row['stage']} | {row['op']} | {shape} | {row['count']:g} | {row['us']:.1f} | {peer['us']:.1f} | "
            f"{peer.get('by') or ''} | {ratio:.2f} | {row['flops'] / row['us'] / 1e6:.0f} | {floor} |"
        )
        total = sums[row["op"]]
        total[0] += row["count"] * row["us"]
        total[1] += row["count"] * peer["us"]
        total[2] += row["count"] * row["flops"]
        points.append((row["op"], row["flops"] * row["count"], ratio))
    lines += ["", "| op | kiln us | peer us | ratio | kiln TFLOP/s | peer TFLOP/s |", "|---|---|---|---|---|---|"]
    for op, (kiln, peer, flops) in sorted(sums.items()):
        ratio = f"{peer / kiln:.2f} | {flops / kiln / 1e6:.0f} | {flops / peer / 1e6:.0f}" if kiln and peer else "- | - | -"
        lines.append(f"| {op} | {kiln:.0f} | {peer:.0f} | {ratio} |")
    for unet, ms in theirs.get("unet_ms", {}).items():
        lines += ["", f"PyTorch UNet, cfg pair at 512², {unet}: {ms:.2f} ms"]
    if dropped:
        lines += ["", f"Not compared ({len(dropped)}):", ""] + [f"- {line}" for line in dropped]
    return lines, points


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kiln")
    parser.add_argument("peer")
    parser.add_argument("--plot")
    args = parser.parse_args()
    ours, theirs = (json.load(open(path, encoding="utf-8")) for path in (args.kiln, args.peer))
    try:
        both, dropped = pairs(ours, theirs)
    except ValueError as error:
        sys.exit(f"compare.py: {error}")
    lines, points = table(ours, theirs, both, dropped)
    print("\n".join(lines))
    for line in dropped:
        print(f"not compared: {line}", file=sys.stderr)
    if args.plot:
        plot(points, args.plot)


def plot(points, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5))
    for op in sorted({p[0] for p in points}):
        some = [p for p in points if p[0] == op]
        axes.scatter([max(p[1], 1e6) / 1e9 for p in some], [p[2] for p in some], label=op, s=20)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="GFLOP of a forward pass in this layer", ylabel="peer time / kiln time", title="above 1: kiln is faster")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
