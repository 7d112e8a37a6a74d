"""The ``serve`` command: a detector behind HTTP; see :mod:`detpipe.serving.server`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detpipe import zoo
from detpipe.commands.given_proposals import advice, open_boxes
from detpipe.commands.parser import Parser, check_least
from detpipe.commands.predict import choose_device
from detpipe.prediction.onnx_detector import OnnxDetector
from detpipe.prediction.windows import ImageWindows
from detpipe.proposals import PrecomputedProposals
from detpipe.proposals.registry import SOURCES
from detpipe.serving.batching import Served
from detpipe.serving.given_boxes import AtGivenBoxes
from detpipe.support.errors import UsageError
from detpipe.support.terminal import say


def run_serve(arguments: Sequence[str]) -> None:
    """Serve a detector until a signal comes."""
    options = _parse(arguments)
    try:
        from detpipe.serving.listening import address_of, listen, run
        from detpipe.serving.server import Limits, create_app
    except ImportError as error:
        raise UsageError(f"serving needs FastAPI and others ({error}): pip install 'detpipe[serve]'") from error
    limits = Limits(
        options.queue, math.ceil(options.body * 2**20), seconds=options.seconds, upload_seconds=options.upload
    )
    with listen(options.host, options.port) as listener:
        model = open_served(options)
        app = create_app(model, limits, options.batch, options.score_threshold)
        say(f"{model.name} answers on {address_of(listener)}/detect; Ctrl+C stops it", flush=True)
        run(app, listener, options.seconds)
    say("stopped")


def open_served(options: argparse.Namespace) -> Served:
    """Open a checkpoint, a published detector or an ONNX file, and run it once, so that the first request finds it warm."""
    served = _open_onnx(options) if options.model.endswith(".onnx") else _open_detector(options)
    blank = torch.zeros(served.pixels.channels, 64, 64, dtype=torch.uint8)
    box = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    served.detect([blank], None if served.make_boxes is None else [{"proposals": box}])
    return served


def _open_onnx(options: argparse.Namespace) -> Served:
    detector = OnnxDetector(options.model, options.device)
    if options.weights or (options.proposals is not None) != detector.takes_boxes:
        wanted = (
            "takes boxes: add --proposals SOURCE" if detector.takes_boxes else "finds its own: leave out --proposals"
        )
        raise UsageError(f"{options.model} has its weights in it, and {wanted}")
    name, make_boxes = Path(options.model).name, _source(options.proposals, None)
    return Served(name, detector.class_names, detector, takes_boxes=detector.takes_boxes, make_boxes=make_boxes)


def _open_detector(options: argparse.Namespace) -> Served:
    detector, description = zoo.load(options.model, options.weights)
    if options.proposals is None and isinstance(detector.proposals, PrecomputedProposals):
        raise UsageError(advice(options.model, description.proposals))
    name, make_boxes = Path(options.model).name, _source(options.proposals, description.proposals)
    detector.to(choose_device(options.device))
    return Served(name, description.class_names, AtGivenBoxes(detector), description.pixels, make_boxes=make_boxes)


def _source(names: str | None, trained_on: dict[str, Any] | None) -> Callable[[Tensor], Tensor] | None:
    """What makes boxes of images that come without."""
    if names is None:
        return None
    if not set(names.split("+")) <= set(SOURCES):
        raise UsageError(f"--proposals {names}: expected a source, {', '.join(SOURCES)}; files are of known images")
    boxes = open_boxes(names, [], trained_on)
    return lambda image: boxes(Path("image"), ImageWindows(image))


def add_common(parser: Parser, port: int) -> None:
    """Add the options of commands that open a detector and listen, with the port by default."""
    add = parser.add_argument
    add("--weights", metavar="FILE", help="the published file of a name, where it lies in no usual place")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    add("--port", type=int, default=port, help=f"port to listen on (default {port}; 0: a free one)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("detpipe serve", description="Answer images over HTTP with detections as JSON.")
    parser.add_argument(
        "model", help="checkpoint such as RUN/best.ckpt, a name of 'detpipe zoo', or an ONNX file of a detector"
    )
    parser.add_argument("--proposals", help="source of boxes for images that come without, such as selective_search")
    add_common(parser, 8000)
    parser.add_argument("--score_threshold", type=float, default=0.5, help="for requests that give none (default .5)")
    parser.add_argument("--batch", type=int, default=8, help="most images of one run of the model (default 8)")
    parser.add_argument(
        "--queue", type=int, default=64, help="most requests under way; others are refused (default 64)"
    )
    parser.add_argument("--body", type=float, default=16, help="largest body of a request in MiB (default 16)")
    parser.add_argument("--seconds", type=float, default=30, help="longest wait for an answer (default 30)")
    parser.add_argument("--upload", type=float, default=10, help="longest upload in seconds (default 10)")
    options = parser.parse_args(list(arguments))
    if not 0 <= options.score_threshold <= 1:
        raise UsageError(f"--score_threshold must be in 0..1, got {options.score_threshold}")
    check_least(options, 1, "batch", "queue")
    for name in ("body", "seconds", "upload"):
        if not 0 < getattr(options, name) < 1e6:
            raise UsageError(f"--{name} must be positive and below a million, got {getattr(options, name)}")
    return options
