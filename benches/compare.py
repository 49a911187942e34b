"""The ratio table of two runs on one layer table: `kiln bench kernels --json` and peer_torch.py.

    python benches/compare.py kiln.json torch.json [--plot out.png] > table.md

A ratio is peer time / kiln time: above 1 kiln is faster. The plot needs matplotlib.
"""
import argparse, json
from collections import defaultdict


def numbers(row):
    """Extents of a layer: kiln writes them as `Gemm([1, 2, 3])`."""
    if "extents" in row:
        return tuple(row["extents"])
    return tuple(int(n) for n in row["shape"].split("[")[1].rstrip("])").split(","))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kiln")
    parser.add_argument("peer")
    parser.add_argument("--plot")
    args = parser.parse_args()
    ours, theirs = (json.load(open(path)) for path in (args.kiln, args.peer))
    peers = {(r["stage"], r["op"], numbers(r)): r for r in theirs["layers"]}
    print(f"kiln on {ours['device']}, {ours['element']}; PyTorch {theirs.get('torch', '?')} on {theirs['device']}\n")
    print("| stage | op | shape | count | kiln us | peer us | by | ratio | kiln TFLOP/s | of floor |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    sums, points = defaultdict(lambda: [0.0, 0.0, 0.0]), []
    for row in ours["layers"]:
        key = row["stage"], row["op"], numbers(row)
        peer = peers.get(key)
        if peer is None:
            continue
        ratio = peer["us"] / row["us"]
        floor = 100 * row["floor_us"] / row["us"]
        shape = "x".join(map(str, key[2]))
        print(
            f"| {row['stage']} | {row['op']} | {shape} | {row['count']:g} | {row['us']:.1f} | {peer['us']:.1f} | "
            f"{peer.get('by') or ''} | {ratio:.2f} | {row['flops'] / row['us'] / 1e6:.0f} | {floor:.0f}% |"
        )
        total = sums[row["op"]]
        total[0] += row["count"] * row["us"]
        total[1] += row["count"] * peer["us"]
        total[2] += row["count"] * row["flops"]
        points.append((row["op"], row["flops"] * row["count"], ratio))
    print("\n| op | kiln us | peer us | ratio | kiln TFLOP/s | peer TFLOP/s |")
    print("|---|---|---|---|---|---|")
    for op, (kiln, peer, flops) in sorted(sums.items()):
        print(f"| {op} | {kiln:.0f} | {peer:.0f} | {peer / kiln:.2f} | {flops / kiln / 1e6:.0f} | {flops / peer / 1e6:.0f} |")
    for name, ms in theirs.get("unet_ms", {}).items():
        print(f"\nPyTorch UNet, cfg pair at 512², {name}: {ms:.2f} ms")
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
