"""How much memory the operators take above their operands, next to torchvision's, in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)

MEASURE = """
import ctypes, json, sys
sys.path[:0] = ["benchmarks", "."]
import torch
from roi_operators import CASES, OPERATORS, make_operands, peak_memory
from detpipe.roi_pooling import precise_roi_pool, rotated_roi_align, superpixel_pool

torch.set_num_threads(1)
labels = torch.arange(800 * 1088).view(1, 800, 1088) // 2000
OPERATORS["precise"] = (OPERATORS["RoIAlign adaptive"][0], lambda f, b: precise_roi_pool(f[0], b, 7, 1 / 16))
corners = lambda b: torch.cat((b[:, :1], (b[:, 1:3] + b[:, 3:]) / 2, b[:, 3:] - b[:, 1:3], b[:, :1] * 30), dim=1)
OPERATORS["rotated"] = (
    OPERATORS["RoIAlign 2 x 2"][0], lambda f, b: rotated_roi_align(f[0], corners(b), 7, 1 / 16, sampling_ratio=2))
OPERATORS["superpixels"] = (
    lambda f, b: torch.nn.functional.interpolate(f[0], (800, 1088), mode="bilinear"),
    lambda f, b: superpixel_pool(f[0], labels.expand(len(f[0]), -1, -1), 436)[0])
result = {}
for name, pair in OPERATORS.items():
    if name in ("deterministic", "RoIAlign of a pyramid"):
        continue
    for which in (0, 1):
        ctypes.CDLL(None).malloc_trim(0)  # what the one before has freed must not serve the next
        result.setdefault(name, []).append(peak_memory(name, CASES["standard"], "proposals", "cpu", which) / 2**20)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def peaks():
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RoIAlign 2 x 2", "RoIAlign adaptive", "RoI max pooling", "precise", "rotated"])
def test_takes_at_most_twice_what_torchvision_takes(name, peaks):
    peer, ours = peaks[name]
    result = 1024 * 256 * 49 * 4 / 2**20
    assert result < ours < 2 * peer, f"{name}: {ours:.0f} MiB, torchvision's {peer:.0f} MiB"


@pytest.mark.slow
def test_superpixels_need_no_map_at_their_resolution(peaks):
    peer, ours = peaks["superpixels"]
    assert ours < peer / 10, f"{ours:.0f} MiB; the features at the labels' resolution take {peer:.0f} MiB"
