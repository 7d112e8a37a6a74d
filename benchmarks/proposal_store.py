"""Does a store of 120,000 images x 2,000 boxes open in under a second, in memory that does not grow with it?

Two tables.

1. A store of full size, opened and read at random images in a process of its own. Its boxes and scores are a hole in a
   sparse file, so that it takes a few MB of disk in place of 4.8 GB: the system makes up zeros where a page is first
   read. The index is real. What this shows is the cost of the store's own work; a real file adds the reading of 40 KB an
   image from the disk, unless the system still has it in memory. A store of a hundredth of the images stands beside it:
   memory and opening time must not differ.
2. Real boxes (random numbers), of a size that fits into memory: the store next to a pickled list of arrays, which is how
   detectron2 and mmdetection keep proposals, and next to one array an image in a ``.npz`` file. Each is opened, then the
   same random images are read, in a process of its own, after one pass that brings the file into the system's memory.
   The median over the rounds is given, and the ratio to the store.

Memory is the growth of the process from before opening: private (``RssAnon``), which each data worker pays, and mapped
(``RssFile``), which all processes share and the system takes back when it needs it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from detpipe.proposal_files.store import ProposalStore, ProposalWriter
from detpipe.proposal_files.store_format import Description, build_header, read_header

Read = Callable[[int], tuple[Any, Any]]
KINDS = ("store", "pickle", "npz")


def write_sparse(path: Path, images: int, boxes: int) -> None:
    """Write a store whose boxes and scores are a hole; its hash is not that of its content."""
    names = [f"{i:012}".encode() for i in range(images)]
    header = build_header(Description("synthetic", {}, "0" * 64), images, images * boxes, 12 * images)
    path.write_bytes(header)
    data_bytes = 2 * 8 * (images + 1) + 24 * images + 20 * images * boxes + 12 * images
    os.truncate(path, len(header) + data_bytes)
    with path.open("r+b") as file:
        places = read_header(file, path, path.stat().st_size)[1]
        for name, step in (("offsets", boxes), ("id_offsets", 12)):
            file.seek(places[name].start)
            file.write((np.arange(images + 1, dtype="<i8") * step).tobytes())
        file.seek(places["id_bytes"].start)
        file.write(b"".join(names))


def write_real(folder: Path, images: int, boxes: int) -> None:
    """Write the same boxes in each of the three ways."""
    generator = np.random.default_rng(0)
    tables = []
    with ProposalWriter(folder / "real.store.safetensors", "synthetic", {}) as writer:
        for i in range(images):
            table = generator.random((boxes, 5), dtype=np.float32) * 300
            table[:, 2:4] += table[:, :2]
            table = table[np.argsort(-table[:, 4], kind="stable")]
            writer.add(f"{i:012}", table[:, :4], table[:, 4])
            tables.append(table)
    with (folder / "real.pickle").open("wb") as file:
        pickle.dump(tables, file, protocol=pickle.HIGHEST_PROTOCOL)
    np.savez(folder / "real.npz", **{f"{i:012}": table for i, table in enumerate(tables)})


def open_file(kind: str, path: Path) -> Read:
    """Open a file of proposals and return what reads the boxes and scores of one image."""
    if kind == "store":
        store = ProposalStore(path)
        return lambda i: store[f"{i:012}"]
    if kind == "pickle":
        with path.open("rb") as file:
            tables: Any = pickle.load(file)
        return lambda i: (tables[i][:, :4], tables[i][:, 4])
    archive: Any = np.load(path)

    def read(i: int) -> tuple[Any, Any]:
        table = archive[f"{i:012}"]
        return table[:, :4], table[:, 4]

    return read


def memory(key: str) -> float:
    """MiB of this process, by a key of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure(kind: str, path: Path, images: int, reads: int) -> dict[str, float]:
    """Open a file and read random images; times in seconds, memory in MiB."""
    before = {key: memory(key) for key in ("RssAnon", "RssFile")}
    start = time.perf_counter()
    read = open_file(kind, path)
    opened = time.perf_counter() - start
    grown = {f"open {key}": memory(key) - before[key] for key in before}
    chosen = random.Random(0).choices(range(images), k=reads)
    total = 0.0
    start = time.perf_counter()
    for i in chosen:
        boxes, scores = read(i)
        total += float(boxes.sum()) + float(scores.sum())  # what is mapped must be touched
    seconds = time.perf_counter() - start
    grown |= {f"read {key}": memory(key) - before[key] for key in before}
    return {"open": opened, "read": seconds / reads, "sum": total, **grown}


def measure_apart(kind: str, path: Path, images: int, reads: int, rounds: int) -> dict[str, float]:
    """`measure` in fresh processes; medians, the first round not counted."""
    command = [sys.executable, __file__, "--measure", kind, str(path), str(images), str(reads)]
    results = []
    for _ in range(rounds + 1):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout))
    return {key: statistics.median(result[key] for result in results[1:]) for key in results[0]}


def print_table(rows: dict[str, dict[str, float]], ratio_to: str | None = None) -> None:
    """Print one line for each contestant."""
    print(
        "| | open, s | read an image, us | private MiB, open / read | mapped MiB, open / read | open, ratio | read, ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        cells = [f"{row['open']:.5f}", f"{row['read'] * 1e6:.0f}"]
        cells += [f"{row[f'open {key}']:.1f} / {row[f'read {key}']:.1f}" for key in ("RssAnon", "RssFile")]
        base = rows[ratio_to] if ratio_to is not None else None
        cells += [f"{row[key] / base[key]:.2f}" if base else "" for key in ("open", "read")]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=120_000, help="of the synthetic store")
    parser.add_argument("--boxes", type=int, default=2_000, help="an image")
    parser.add_argument("--real_images", type=int, default=2_000, help="with real boxes, next to the peers")
    parser.add_argument("--reads", type=int, default=1_000, help="random images that are read")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the files go, in a temporary folder; the system's by default")
    parser.add_argument("--measure", nargs=4, metavar=("KIND", "FILE", "IMAGES", "READS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, path, images, reads = options.measure
        print(json.dumps(measure(kind, Path(path), int(images), int(reads))))
        return
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}, Python {platform.python_version()}"
    )
    print(f"numpy {np.__version__}; {options.reads} random images, median of {options.rounds} processes\n")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, rows = Path(name), {}
        for images in (options.images, max(options.images // 100, 1)):
            path = folder / "sparse.safetensors"
            write_sparse(path, images, options.boxes)
            label = f"{images:,} x {options.boxes:,} ({path.stat().st_size / 2**20:,.0f} MiB, sparse)"
            rows[label] = measure_apart("store", path, images, options.reads, options.rounds)
            path.unlink()
        print_table(rows)
        write_real(folder, options.real_images, options.boxes)
        paths = {"store": "real.store.safetensors", "pickle": "real.pickle", "npz": "real.npz"}
        size = (folder / paths["store"]).stat().st_size / 2**20
        print(f"\nreal boxes, {options.real_images:,} x {options.boxes:,} ({size:,.0f} MiB)")
        rows = {
            kind: measure_apart(kind, folder / paths[kind], options.real_images, options.reads, options.rounds)
            for kind in KINDS
        }
        assert len({round(row["sum"], -3) for row in rows.values()}) == 1, "all must read the same boxes"
        print_table(rows, ratio_to="store")


if __name__ == "__main__":
    main()
