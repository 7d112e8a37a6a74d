"""Requests a second of ``detpipe serve`` on this machine, against what its model does alone on the same images.

Clients in threads send JPEG files over connections that stay open, as fast as they are answered. In turns with them the model
alone runs in this process, on decoded images in batches of the size that the server takes, and one by one. Clients, server and
decoding share the cores with the model; the ratio is what they leave of it.

    python benchmarks/serving.py RUN/best.ckpt IMAGES --clients 8 --rounds 5
"""

from __future__ import annotations

import argparse
import http.client
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from detpipe.prediction.inputs import find_images
from detpipe.serving.given_boxes import AtGivenBoxes
from detpipe.training.models import load_detector


def main() -> int:
    """Run the benchmark and print its table."""
    options = parse()
    inputs = list(islice(cycle(find_images(options.images)), options.requests))
    bodies = [one.path.read_bytes() for one in inputs]
    detector, description = load_detector(options.checkpoint)
    images = [one.read(description.pixels) for one in inputs]
    server = [
        sys.executable,
        "-m",
        "detpipe",
        "serve",
        options.checkpoint,
        "--port",
        "0",
        "--batch",
        str(options.batch),
    ]
    with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port = int(re.findall(r":(\d+)/detect", process.stdout.readline())[0])
            model = AtGivenBoxes(detector)
            contestants: dict[str, Callable[[], None]] = {
                f"the model, {options.batch} images at a time": lambda: run_model(model, images, options.batch),
                "the model, one image at a time": lambda: run_model(model, images, 1),
                f"the server, {options.clients} clients": lambda: ask(port, bodies, options.clients),
                "the server, 1 client": lambda: ask(port, bodies, 1),
            }
            report(measure(contestants, options.rounds, len(images)))
        finally:
            process.terminate()
    return 0


def run_model(model: AtGivenBoxes, images: Sequence[torch.Tensor], batch: int) -> None:
    """Run the model alone, on images of one size."""
    for start in range(0, len(images), batch):
        model(images[start : start + batch])


def ask(port: int, bodies: Sequence[bytes], clients: int) -> None:
    """Send all images, each client its share one after the other."""

    def client(share: Sequence[bytes]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        for body in share:
            connection.request("POST", "/detect", body)
            answer = json.loads(connection.getresponse().read())
            assert "boxes" in answer, answer
        connection.close()

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, [bodies[start::clients] for start in range(clients)]))


def measure(contestants: dict[str, Callable[[], None]], rounds: int, images: int) -> dict[str, list[float]]:
    """Images a second of each contestant, in turns; a first round is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if index:
                rates[name].append(images / (time.perf_counter() - start))
    return rates


def report(rates: dict[str, list[float]]) -> None:
    """Print medians, and ratios to the first contestant by round."""
    first = next(iter(rates.values()))
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"
    )
    print("| | images a second | ratio (lowest to highest round) |\n| --- | ---: | ---: |")
    for name, values in rates.items():
        ratios = [value / one for value, one in zip(values, first, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {statistics.median(values):.2f} | {spread} |")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("images", nargs="+", help="images of one size")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--requests", type=int, default=32, help="images of a round")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
