"""The ``demo`` command: a page in the browser to try a detector on; see :mod:`detpipe.serving.page`."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from detpipe import zoo
from detpipe.commands.given_proposals import open_boxes
from detpipe.commands.inspect_attention import Objects, attention_modules, draw_gates, draw_maps
from detpipe.commands.parser import Parser
from detpipe.commands.predict import choose_device
from detpipe.commands.serve import add_common
from detpipe.detector import TwoStageDetector
from detpipe.prediction.windows import ImageWindows
from detpipe.proposals import PrecomputedProposals
from detpipe.proposals.registry import SOURCES
from detpipe.serving.trial import Tried
from detpipe.support.errors import UsageError
from detpipe.support.terminal import say
from detpipe.types import RGB, Detection

_FETCHES = "detector"  # a source that needs weights of others
_MOST_OBJECTS = 16  # whose gates are averaged


def run_demo(arguments: Sequence[str]) -> None:
    """Show the page until a signal comes."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="detpipe-demo-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        try:
            from detpipe.serving.listening import address_of, listen, run
            from detpipe.serving.page import create_page_app
            from detpipe.serving.trial import Trial
        except ImportError as error:
            raise UsageError(f"the page needs Gradio ({error}): pip install 'detpipe[demo]'") from error
        with listen(options.host, options.port) as listener:
            app = create_page_app(Trial(open_tried(options), Path(folder)))
            say(f"try {options.checkpoint} on {address_of(listener)}; Ctrl+C stops it", flush=True)
            run(app, listener, 1)
    say("stopped")


def open_tried(options: argparse.Namespace) -> Tried:
    """Open a checkpoint or a published detector."""
    detector, description = zoo.load(options.checkpoint, options.weights)
    detector.to(choose_device(options.device))

    def propose(name: str, image: Tensor) -> Tensor:
        boxes = open_boxes(name, [], description.proposals)  # opened late: not each is installed
        return boxes(Path("image"), ImageWindows(image))

    sources = {name: partial(propose, name) for name in SOURCES if name != _FETCHES}
    has_gates = description.pixels == RGB and attention_modules(detector.backbone)
    return Tried(
        Path(options.checkpoint).name,
        detector,
        description.class_names,
        sources,
        partial(_draw_attention, detector, description.class_names) if has_gates else None,
        isinstance(detector.proposals, PrecomputedProposals),
        description.pixels,
    )


def _draw_attention(
    detector: TwoStageDetector, class_names: Sequence[str], picture: Tensor, found: Detection, out: Path
) -> list[Path]:
    """Draw what ``detpipe inspect`` draws, of one image and the best of what was found in it."""
    written = draw_maps(detector, [Path("image.png")], [picture], out)
    count = min(_MOST_OBJECTS, len(found["labels"]))
    if count:
        objects = Objects([picture] * count, found["boxes"][:count], found["labels"][:count])
        written += draw_gates(detector, objects, class_names, out, {})
    return written


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("detpipe demo", description="Open a page in the browser to try a detector on.")
    parser.add_argument("checkpoint", help="such as RUN/best.ckpt, or a name of 'detpipe zoo'")
    add_common(parser, 7860)
    return parser.parse_args(list(arguments))
