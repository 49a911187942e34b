"""Tests of compare.py and of peer_torch.py's table reading, with nothing but Python:

    python3 -m unittest discover -s benches -p 'test_*.py'
"""
import json, os, subprocess, sys, tempfile, unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import compare, peer_torch

TABLE = """stage,op,dims,M,N,K,count_per_forward,GFLOP_each,min_MB_each
unet,attention,b2 h8 d40 q64 kv77,64,77,40,5,0.5,1.5
unet,conv,b2 320->640 3x3 s2 8x6->4x3,24,640,2880,1,2,3
unet,gemm,,128,1280,5120,1,1.678,14.748
unet,group_norm,"(2, 1280, 8, 8) g32",,,,12,0.0,0.6553
unet,layer_norm,"(2, 77, 768)",,,,2,0,0.5
unet,elt:silu,"(2, 640, 32, 32)",,,,6,0.0,5.2
"""


def kiln(element="f16", **changes):
    """What `kiln bench kernels --json` writes: one layer as changed, and one that could not be timed."""
    layer = {"stage": "unet", "op": "gemm", "shape": "Gemm([8, 16, 32])", "count": 2, "us": 10.0, "flops": 8192.0, "bytes": 1.0, "floor_us": 5.0}
    failed = {"stage": "unet", "op": "gemm", "shape": "Gemm([9, 9, 9])", "count": 1, "flops": 1.0, "bytes": 1.0, "error": "out of device memory"}
    return {"device": "GPU", "element": element, "layers": [{**layer, **changes}, failed]}


def torch(element="f16", **changes):
    layer = {"stage": "unet", "op": "gemm", "extents": [8, 16, 32], "count": 2, "us": 30.0, "flops": 8192.0, "bytes": 1.0, "by": ""}
    other = {**layer, "op": "conv", "extents": [1, 2, 3, 4, 5, 6, 7]}
    return {"device": "GPU", "element": element, "torch": "2.11", "layers": [{**layer, **changes}, other]}


def run(ours, theirs):
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("kiln.json", "torch.json")]
        for path, body in zip(paths, (ours, theirs)):
            with open(path, "w") as file:
                json.dump(body, file)
        return subprocess.run([sys.executable, os.path.join(HERE, "compare.py"), *paths], capture_output=True, text=True)


class Compare(unittest.TestCase):
    def test_ratios_and_sums(self):
        done = run(kiln(), torch())
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("| unet | gemm | 8x16x32 | 2 | 10.0 | 30.0 |  | 3.00 | 0 | 50% |", done.stdout)
        self.assertIn("| gemm | 20 | 60 | 3.00 |", done.stdout)

    def test_what_is_left_out_is_named(self):
        done = run(kiln(), torch())
        self.assertIn("Not compared (2):", done.stdout)
        for line in ("unet gemm 9x9x9: kiln has no time (out of device memory)", "unet conv 1x2x3x4x5x6x7: kiln has no such layer"):
            self.assertIn(f"- {line}", done.stdout)
            self.assertIn(f"not compared: {line}", done.stderr)

    def test_nothing_in_common_is_an_error(self):
        done = run(kiln(), torch(extents=[8, 16, 33]))
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("no layer was timed by both: 2 of kiln, 2 of the peer", done.stderr)

    def test_two_element_types_are_an_error(self):
        done = run(kiln("f16"), torch("bf16"))
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("kiln ran f16, the peer bf16", done.stderr)

    def test_without_ceilings_there_is_no_floor(self):
        both, dropped = compare.pairs(kiln(floor_us=None), torch())
        lines, points = compare.table(kiln(), torch(), both, dropped)
        self.assertTrue(any(line.endswith("| 3.00 | 0 | - |") for line in lines), lines)
        self.assertEqual(points, [("gemm", 16384.0, 3.0)])

    def test_a_time_that_is_no_number_is_left_out(self):
        with self.assertRaises(ValueError):
            compare.pairs(kiln(), torch(us=float("inf")))


class PeerTable(unittest.TestCase):
    def read(self, text):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "layers.csv")
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            return list(peer_torch.read_layers(path))

    def test_rows_are_read_as_kiln_reads_them(self):
        rows = self.read("\ufeff" + TABLE)
        kinds = [(kind, extents) for _, kind, extents, *_ in rows]
        expected = [
            ("attention", [2, 8, 40, 64, 77]),
            ("conv", [2, 320, 640, 3, 2, 8, 6]),
            ("gemm", [128, 1280, 5120]),
            ("group_norm", [2, 1280, 64, 32]),
            ("layer_norm", [154, 768]),
        ]
        self.assertEqual(kinds, expected)
        self.assertEqual(rows[0][3:], (5.0, 0.5e9, 1.5e6))

    def test_a_typo_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "line 4 of .*: 'gemmm' is not known"):
            self.read(TABLE.replace("unet,gemm,", "unet,gemmm,"))


if __name__ == "__main__":
    unittest.main()
