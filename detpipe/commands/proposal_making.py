"""The ``proposals make`` command: the boxes of a source for all images of a data set or folder, as one proposal store.

What is made is kept at once: a run that was killed goes on where it stopped, and ends with the same file.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import cv2
import numpy as np
import numpy.typing as npt
import torch
from jsonargparse import ArgumentParser, Namespace

from detpipe import images as frames
from detpipe.commands.data_source import add_data_options
from detpipe.commands.parser import check_least, progress
from detpipe.commands.predict import choose_device
from detpipe.datasets import read_image
from detpipe.datasets.datamodule import image_files
from detpipe.datasets.formats.recognize import EXPECTED, layout_of, open_split
from detpipe.datasets.image_files import PLAIN_FILES, ImageFiles, image_paths
from detpipe.prediction.inputs import find_images
from detpipe.prediction.machines import team
from detpipe.proposal_files.offline import Item, Proposer, Summary, make_store
from detpipe.proposal_files.store import ProposalStore
from detpipe.proposal_files.store_format import SUFFIX
from detpipe.proposals import RPN
from detpipe.proposals.registry import SOURCES, find_class, make_source
from detpipe.support.errors import DetpipeError, UsageError
from detpipe.support.processes import gather_objects
from detpipe.support.terminal import say
from detpipe.training.models import load_detector
from detpipe.types import RGB

HELP = f"""usage: detpipe proposals make SOURCE --data DATA [--split SPLIT] -o STORE{SUFFIX} [options]

Make boxes for all images of a data set, and write them to a store.

SOURCE is one of
  {", ".join(SOURCES)},
several of them joined by +, or the checkpoint of a trained detector, whose own proposals are written.

'detpipe proposals make SOURCE --help' shows the options of a source.
"""


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(f"{message}; see '{self.prog} --help'")


def run_make(arguments: Sequence[str]) -> int:
    """Make a store, and print what was done; what is made until an error is kept."""
    name, *rest = arguments or [""]
    if name in ("", "-h", "--help"):
        print(HELP, end="")
        return 0 if name else 2
    parser, build = _source_parser(name)
    options = parser.parse_args(rest)
    if Path(options.output).suffix != SUFFIX:
        raise UsageError(f"--output {options.output}: the name of a store must end in {SUFFIX}")
    check_least(options, 1, "workers")
    # results must not depend on how many processes there are: each computes with one thread
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        build(options)()  # mistakes in its settings are said before images are looked for
    except DetpipeError:
        raise
    except ValueError as error:
        raise UsageError(f"{name}: {error}; see 'detpipe proposals make {name} --help'") from error
    items, source = find_items(options.data, options.split, options.images, options.skip_bad)
    start = time.perf_counter()
    with team() as own, progress(len(items)) as move:
        summary = make_store(
            build(options),
            items,
            Path(options.output),
            partial(read_pixels, source),
            workers=options.workers,
            on_bad="skip" if options.skip_bad else "error",
            progress=move,
            share=(own.part.number - 1, own.part.of),
            wait=partial(
                own.wait, f"what is made is kept beside {options.output}; the same command goes on from there"
            ),
        )
        summaries = gather_objects(summary)
    if own.is_first:
        summary = Summary.of_all(summaries)
        say(report(summary, ProposalStore(options.output), time.perf_counter() - start))
    return 0


def find_items(
    data: str, split: str | None, images: str | None = None, skip_bad: bool = False
) -> tuple[list[Item], ImageFiles]:
    """List images with the ids that a store calls them by, and where they are; of a plain folder the names without suffix."""
    path = Path(data)
    if path.is_dir() and layout_of(path) is None:
        for option, value in (("split", split), ("images", images)):
            if value is not None:
                raise UsageError(
                    f"--{option} {value}: --data {data} is a plain folder of images, leave it out; {EXPECTED}"
                )
        return [Item(one.path.stem, one.path) for one in find_images([data])], PLAIN_FILES
    opened = open_split(data, split, images, "skip" if skip_bad else "error")
    annotations = opened.annotations("val")
    paths = image_paths(annotations)
    items = [Item(opened.image_key(annotations, row), path) for row, path in enumerate(paths)]
    return items, image_files([opened])


def read_pixels(source: ImageFiles, path: Path) -> npt.NDArray[np.uint8]:
    """Read an image as ``[H, W, 3]`` uint8 RGB."""
    content = source.read(path) if path in source else None
    return np.ascontiguousarray(read_image(source.name(path), content).permute(1, 2, 0).numpy())


def report(summary: Summary, store: ProposalStore, seconds: float) -> str:
    """Say what was done, in a few lines."""
    kept = summary.images - summary.made
    lines = [
        f"{summary.images} images, {store.num_boxes} boxes ({store.num_boxes / max(1, summary.images):.0f} an image); "
        f"{summary.seconds_an_image:.2f} s an image in one process, {seconds:.1f} s in all"
        + (f"; {kept} images were there from an earlier run" if kept else "")
    ]
    if summary.skipped:
        lines.append(f"{len(summary.skipped)} images skipped, they have no boxes:")
        lines += [f"  {image}: {reason}" for image, reason in list(summary.skipped.items())[:5]]
    lines.append(f"wrote {store.path}")
    return "\n".join(lines)


def _source_parser(name: str) -> tuple[ArgumentParser, Callable[[Namespace], Callable[[], Proposer]]]:
    """The options of a source, and what makes a picklable builder of it from them."""
    parser = _Parser(
        prog=f"detpipe proposals make {name}",
        description="Make boxes for all images of a data set.",
        exit_on_error=False,
    )
    add_data_options(parser, ", or images")
    parser.add_argument("-o", "--output", type=str, required=True, help=f"the store to write, *{SUFFIX}")
    parser.add_argument("--workers", type=int, default=1, help="processes; the boxes do not depend on it")
    if Path(name).suffix == ".ckpt":
        parser.add_argument("--device", type=str, default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
        return parser, lambda options: partial(CheckpointProposals, name, options.device)
    if "+" in name:
        for part in name.split("+"):
            find_class(part)
        return parser, lambda options: partial(make_source, name)
    source = find_class(name)
    added = parser.add_class_arguments(cast(type, source), skip={"pixel_format"}, as_group=True)
    return parser, lambda options: partial(source, **{key: options[key] for key in added})


class CheckpointProposals:
    """Propose boxes by the RPN of a detector on a device of PyTorch, or "auto"; a UsageError if it has none."""

    name = "rpn"

    def __init__(self, path: str, device: str = "auto") -> None:
        self.detector, description = load_detector(path)
        if description.pixels != RGB:
            raise UsageError(
                f"{path} is of images of {description.pixels}; boxes are proposed for 8-bit RGB alone, predict with the detector"
            )
        if not isinstance(self.detector.proposals, RPN):
            raise UsageError(
                f"{path} has no region proposal network but {type(self.detector.proposals).__name__}; name that source instead"
            )
        self.detector.to(choose_device(device))
        self._sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about the boxes: the hash of the checkpoint, and the size that images are resized to."""
        return {"sha256": self._sha256, "min_size": self.detector.min_size, "max_size": self.detector.max_size}

    @torch.inference_mode()
    def propose(self, image: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Propose ``[P, 4]`` xyxy boxes in pixels of an image ``[H, W, 3]`` uint8 RGB, best first, with scores ``[P]`` in 0..1."""
        model, rpn = self.detector, self.detector.proposals
        assert isinstance(rpn, RPN)
        tensor = torch.from_numpy(image).permute(2, 0, 1).to(model.device)
        batch = model.to_batch([tensor])
        [boxes], [scores] = rpn.propose(batch, model.backbone(batch.tensors))
        boxes = frames.scale_boxes(boxes, batch.image_sizes[0], (image.shape[0], image.shape[1]))
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([image.shape[1], image.shape[0]] * 2))
        return boxes.float().cpu().numpy(), scores.float().cpu().numpy()
