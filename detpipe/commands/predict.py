"""The ``predict``, ``merge`` and ``classify`` commands: find objects in images of the user's own, or name what is in given boxes.

What they write, and how: see :mod:`detpipe.prediction.job`. Regions of ``classify`` are in the order of the boxes. With
``--show-glimpses`` detections also have ``proposal`` and ``glimpses`` (outlines in order), and there is a page of pictures.

Boxes for a detector that needs some, and for a classifier: see :mod:`detpipe.commands.given_proposals`. Exit status: 3 where some
images could not be read, and all others are done; 1 where none could.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from detpipe import zoo
from detpipe.commands.given_proposals import Boxes, advice, open_boxes
from detpipe.commands.parser import OVERLAP, Parser, check_least, check_tiles, output_folder, progress
from detpipe.datasets.workers import usable_cores
from detpipe.detector import TwoStageDetector
from detpipe.heads import ProposalHead
from detpipe.pictures import glimpse_pictures
from detpipe.prediction import AugmentedDetector, Detector, ImageWindows, Merge, PlacedDetector, TiledDetector, Windows
from detpipe.prediction.batches import WHOLE, Part
from detpipe.prediction.camera import read_camera
from detpipe.prediction.inputs import ImageInput, find_inputs
from detpipe.prediction.job import Job, Look, Read, drawing_names
from detpipe.prediction.lines import KINDS, Tally, join, recorded
from detpipe.prediction.machines import Team, team
from detpipe.prediction.onnx_detector import OnnxDetector
from detpipe.prediction.tiff import open_windows, split_pages
from detpipe.prediction.tracking import Tracker
from detpipe.prediction.video import Frame, is_video, look_at_video, read_frames, read_video
from detpipe.proposals import PrecomputedProposals
from detpipe.support.errors import DataError, UsageError
from detpipe.support.strict_json import load_json
from detpipe.support.terminal import printable, say
from detpipe.training.checkpoint import Description
from detpipe.training.models import load_region_classifier
from detpipe.types import RGB, Detection, PixelType, Target

_PART = re.compile(r"(\d+)/(\d+)")
SOME_FAILED = 3  # exit status


def predict(arguments: Sequence[str]) -> int:
    """Detect, draw, and write; the exit status."""
    options = _parse_predict(arguments)
    with team() as own:
        if options.checkpoint.endswith(".onnx"):
            detector, description = _open_onnx(options)
            device, limit = torch.device("cpu"), None  # where images are handed over
        else:
            detector, description = zoo.load(options.checkpoint, options.weights)
            limit = _set_head(detector, options)
            device = choose_device(options.device, own.local_rank)
            detector.to(device)
        tiled, pixels = options.tiles is not None, description.pixels
        batch_size = 1 if tiled else options.batch_size or (4 if device.type == "cpu" else 8)
        inputs = _inputs(options, own)
        read = partial(open_windows if tiled else _read_whole, pixels=pixels)
        if tiled and pixels.channels in (1, 3):  # pages are channels else
            inputs = split_pages(inputs)
        boxes = choose_proposals(detector, options, [one.path for one in inputs], description)
        look = _look_by(detector, boxes, options, device)
        if options.rate is not None or any(is_video(one.path) or one.is_camera for one in inputs):
            _check_videos(inputs, options, own, pixels)
            stems = [Path(name).stem for name in drawing_names(inputs, Path(options.output), "mp4")]
            videos = [([one], stem) for one, stem in zip(inputs, stems, strict=True)]
            videos = [(inputs, "frames")] if options.rate is not None else videos
            status = 0
            for video in videos:
                try:
                    code = _predict_video(*video, options, description.class_names, read, look, batch_size)
                except DataError as error:  # of several, the others are looked at
                    if len(videos) == 1:
                        raise
                    say(f"skipped: {error}", sys.stderr)
                    code = SOME_FAILED
                status = max(status, code)
            return status
        if options.track or options.every != 1:
            raise UsageError("--track and --every are about videos: leave them out, or take images as frames by --rate")
        names = ("score_threshold", "max_detections", "proposals", "tiles", "overlap", "merge", "tta", "show_glimpses")
        settings = {name: getattr(options, name) for name in names}
        job = _job(inputs, options, description, "detections", settings, batch_size)
        status = _do(job, options, own, read, look, None if tiled else limit)  # which is that of a tile
        if options.show_glimpses and own.is_first:
            page = glimpse_pictures.write_page(job.out, load_json(job.out / "detections.json")["images"])
            say(f"glimpses: {page}")
        return status


def _open_onnx(options: argparse.Namespace) -> tuple[OnnxDetector, Description]:
    """Open a file of ``detpipe export``, whose settings are those that it was exported with."""
    if options.weights or options.tta or options.max_detections or options.show_glimpses:
        raise UsageError(
            f"{options.checkpoint}: an ONNX file is as it was exported; leave out --weights, --tta, --max_detections and "
            "--show-glimpses"
        )
    detector = OnnxDetector(options.checkpoint, options.device)
    return detector, Description({}, detector.class_names, tuple(detector.metadata["category_ids"]))


def _check_videos(inputs: Sequence[ImageInput], options: argparse.Namespace, own: Team, pixels: PixelType) -> None:
    """Refuse what cannot be done with videos."""
    images = [one.name for one in inputs if not (is_video(one.path) or one.is_camera)]
    cameras = [one.name for one in inputs if one.is_camera]
    remote = [one.name for one in inputs if is_video(one.path) and one.url and not one.is_camera]
    if cameras and len(inputs) > 1:
        raise UsageError(f"{cameras[0]}: a camera has no end, so nothing can come after it; give it alone")
    if options.rate is None and images:
        raise UsageError(f"{images[0]} is no video; give videos alone, or with --rate images as the frames of one")
    if options.rate is not None and len(images) < len(inputs):
        raise UsageError("--rate is for images as the frames of a video, which a video has by itself; leave it out")
    if remote:
        raise UsageError(f"{remote[0]}: videos are read from files alone; download it, and give the file")
    if own.part != WHOLE or options.part != WHOLE or options.resume or options.show_glimpses:
        raise UsageError("a video goes through one process; leave out --part, --resume and --show-glimpses")
    if options.drawings == "png":
        raise UsageError("what is found in a video is drawn as a video; leave out --drawings")
    if pixels != RGB and options.rate is None:
        raise UsageError(f"frames of videos are 8-bit RGB, but {options.checkpoint} is of images of {pixels}")


def _predict_video(
    inputs: Sequence[ImageInput],
    stem: str,
    options: argparse.Namespace,
    class_names: Sequence[str],
    read: Read,
    look: Look,
    batch_size: int,
) -> int:
    """Look at a video, or at all its frames; the exit status."""
    if options.rate is not None:
        frames = read_frames(inputs, options.rate, options.every, read)
    elif inputs[0].is_camera:
        frames, batch_size = read_camera(inputs[0], options.every), 1
    else:
        frames = read_video(inputs[0].path, options.every)

    def look_at(batch: Sequence[Frame]) -> Sequence[Detection]:
        sources = [inputs[0 if options.rate is None else frame.number] for frame in batch]
        return look(sources, [ImageWindows(frame.image) for frame in batch])

    lines, video = (Path(options.output, f"{stem}.{suffix}") for suffix in ("jsonl", "mp4"))
    written = None if options.drawings is None else video
    if written and written.exists() and not recorded(lines.parent, stem, "checkpoint"):
        raise UsageError(
            f"{written}: is there, and no {lines.name} beside it says that it was made here: give another -o, or move it away"
        )
    head = {"file": inputs[0].name, "checkpoint": options.checkpoint, "class_names": list(class_names)}
    tracker = Tracker((options.rate or 25) / options.every) if options.track else None
    with progress(None, stem, unit="frame", logged=False) as move:
        tell = lambda count: move(count, count)  # noqa: E731
        count, end = look_at_video(frames, look_at, lines, written, head, tracker, batch_size, tell)
    if not count:
        raise DataError(str(end))
    say(f"{count} frames of {inputs[0].name}; see {written or lines}")
    if end is None:
        return 0
    say(f"ended early: {end}; what was found before is kept", sys.stderr)
    return SOME_FAILED


def merge(arguments: Sequence[str]) -> int:
    """Join what parts of one command have written; the exit status."""
    parser = Parser(
        prog="detpipe merge", description="Join what predict or classify has written by --part NUMBER/PARTS."
    )
    parser.add_argument("parts", nargs="+", help="the folders of the parts, or their files (*.jsonl)")
    parser.add_argument(
        "-o", "--output", help="the JSON file to write; detections.json or regions.json in the first folder by default"
    )
    options = parser.parse_args(list(arguments))
    places, paths = list(map(Path, options.parts)), list[Path]()
    for place in places:
        if not place.exists():
            raise UsageError(
                f"{place} does not exist; expected a folder or file that 'detpipe predict --part' has written"
            )
        paths += _parts_in(place) if place.is_dir() else [place]
    kind = "regions" if paths and paths[0].name.startswith("regions.") else "detections"
    output = Path(options.output or (places[0] if places[0].is_dir() else places[0].parent) / f"{kind}.json")
    return _ended(join(list(dict.fromkeys(paths)), output), kind, output)


def _parts_in(folder: Path) -> list[Path]:
    """The parts of detections in a folder, or of regions where it has none."""
    detections, regions = (sorted(folder.glob(f"{kind}.part-*.jsonl")) for kind in KINDS)
    return detections or regions


def classify(arguments: Sequence[str]) -> int:
    """Classify, draw, and write; the exit status."""
    text = "Name what is in given boxes, draw it, and write it as JSON."
    parser = _parser("classify", text, "of a RegionClassifier, such as RUN/best.ckpt", "regions")
    parser.add_argument(
        "--boxes",
        required=True,
        help="JSON: image name -> [[x1, y1, x2, y2], ...]; or a store, or a source such as selective_search",
    )
    options = _parse(parser, arguments)
    with team() as own:
        model, description = load_region_classifier(options.checkpoint)
        inputs = _inputs(options, own)
        boxes_of = open_boxes(options.boxes, [one.path for one in inputs], None)
        model.to(choose_device(options.device, own.local_rank))

        def look(inputs: Sequence[ImageInput], images: Sequence[Windows]) -> list[Detection]:
            [one], [image] = inputs, (image.whole() for image in images)
            boxes = boxes_of(one.path, images[0])
            try:
                [found] = model.predict([image], [boxes])
            except ValueError as error:  # a box outside of the image, or an image too small for the network
                raise DataError(f"{one.name}: {error}") from error
            return [{"boxes": boxes, "labels": found["labels"].cpu(), "scores": found["scores"].cpu()}]

        job = _job(inputs, options, description, "regions", {"boxes": options.boxes}, 1)
        return _do(job, options, own, partial(_read_whole, pixels=description.pixels), look)


def _inputs(options: argparse.Namespace, own: Team) -> list[ImageInput]:
    inputs = find_inputs(options.images, options.allow_network)
    if own.part != WHOLE and (options.part != WHOLE or any(one.content is not None for one in inputs)):
        raise UsageError("several processes share the images: leave out --part, and give '-' to one process alone")
    return inputs


def _read_whole(source: ImageInput, pixels: PixelType) -> ImageWindows:
    return ImageWindows(source.read(pixels))


def _job(
    inputs: Sequence[ImageInput],
    options: argparse.Namespace,
    description: Description,
    kind: str,
    settings: dict[str, Any],
    batch_size: int,
) -> Job:
    model = _identity(options.checkpoint)
    if getattr(options, "weights", None) is not None:
        model += f" {_identity(options.weights)}"
    for name in ("proposals", "boxes"):
        if settings.get(name) is not None:
            settings[name] = _identity(settings[name])
    return Job(
        inputs,
        Path(options.output),
        options.checkpoint,
        description.class_names,
        kind,
        {**settings, "model": model, "drawings": options.drawings},
        options.drawings,
        batch_size,
    )


def _identity(name: str) -> str:
    """What a file is told by, wherever it lies, its check sum; of what is none, such as a source of boxes, its name."""
    if not Path(name).is_file():
        return name
    value = 0
    with open(name, "rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"crc32 {value:08x}"


def _do(job: Job, options: argparse.Namespace, own: Team, read: Read, look: Look, limit: int | None = None) -> int:
    """Do the part of this process, and join all parts where it is the first of them."""
    part = own.part if own.part != WHOLE else options.part
    with progress(len(job.inputs), logged=False) as move:

        def tell(done: int, of: int, reason: str | None) -> None:
            move(done, of)
            if reason is not None:
                tqdm.write(printable(f"skipped: {reason}"), file=sys.stderr)

        job.do(part, read, look, options.workers or usable_cores(), options.resume, tell)
    if options.part != WHOLE:
        merge = f"detpipe merge {shlex.quote(str(job.out))}"
        say(f"part {part.number} of {part.of} is done; when all are there, join them: {merge}")
        return 0
    own.wait(f"what is done is kept in {job.out}; the same command with --resume goes on from there")
    if not own.is_first:
        return 0
    return _ended(job.finish(part.of, limit), job.kind, job.out / f"{job.kind}.json", limit)


def _ended(tally: Tally, kind: str, output: Path, limit: int | None = None) -> int:
    failed = "unreadable" if kind == "detections" else "failed"
    say(f"{tally.images} images, {tally.found} {kind}, {tally.failed} {failed}; see {output}")
    if tally.limited:
        say(
            f"{tally.limited} images have {limit} detections, the most that the model gives: --max_detections takes more"
        )
    if tally.failed and tally.images:
        return SOME_FAILED
    return 0 if tally.images else 1


def _look_by(
    detector: TwoStageDetector | OnnxDetector, boxes: Boxes | None, options: argparse.Namespace, device: torch.device
) -> Look:
    """What looks at a batch of images, by tiles and several times where that is asked for."""
    looks: Detector = AugmentedDetector(detector) if options.tta else detector
    looks = PlacedDetector(looks, device, options.score_threshold)
    if options.tiles is not None:
        batch_size = options.batch_size or 4
        looks = TiledDetector(looks, options.tiles, options.overlap, merge=Merge(options.merge), batch_size=batch_size)

    def look(inputs: Sequence[ImageInput], images: Sequence[Windows]) -> Sequence[Detection]:
        targets: list[Target] | None = None
        if boxes is not None:
            pairs = zip(inputs, images, strict=True)
            targets = [{"proposals": boxes(source.path, image)} for source, image in pairs]
        if isinstance(looks, TiledDetector):
            return [looks.detect(*pair) for pair in zip(images, targets or [None] * len(images), strict=True)]
        return looks([image.whole() for image in images], targets)

    return look


def detect(detector: TwoStageDetector, image: Tensor, proposals: Tensor | None, score_threshold: float) -> Detection:
    """Detect objects in one image ``[C, H, W]``, as `read_image` reads it, with proposals ``[P, 4]`` xyxy or none.

    Detections below the threshold are left out; they are on the CPU, with proposals and glimpses where the head returns them.
    """
    targets: list[Target] | None = None if proposals is None else [{"proposals": proposals}]
    [found] = PlacedDetector(detector, detector.device, score_threshold)([image], targets)
    return found


def _set_head(detector: TwoStageDetector, options: argparse.Namespace) -> int | None:
    """Let the head return what is asked for; how many detections of an image at most, None where that is not known."""
    head = detector.head
    if not isinstance(head, ProposalHead):
        name = type(head).__name__
        if options.max_detections is not None:
            raise UsageError(f"--max_detections: the head {name} has no such setting")
        if options.show_glimpses:
            raise UsageError(f"--show-glimpses: the head {name} of {options.checkpoint} does not tell where it looks")
        return None
    if options.show_glimpses:
        head.return_glimpses = True
    if options.max_detections is not None:
        most = options.max_detections
        candidates = max(head.postprocess.candidates_per_image, 10 * most)
        head.postprocess = replace(head.postprocess, detections_per_image=most, candidates_per_image=candidates)
    return head.postprocess.detections_per_image


def choose_proposals(
    detector: TwoStageDetector | OnnxDetector,
    options: argparse.Namespace,
    images: Sequence[Path],
    description: Description,
) -> Boxes | None:
    """Open the boxes that take the place of the detector's own source; None if it finds them itself and none are given."""
    if isinstance(detector, OnnxDetector):
        precomputed = detector.takes_boxes
        if options.proposals is not None and not precomputed:
            raise UsageError(f"--proposals: {options.checkpoint} finds its own; export it with --boxes to give it some")
    else:
        precomputed = isinstance(detector.proposals, PrecomputedProposals)
    if options.proposals is None:
        if precomputed:
            raise UsageError(advice(options.checkpoint, description.proposals))
        return None
    boxes = open_boxes(options.proposals, images, description.proposals)
    if isinstance(detector, TwoStageDetector) and not precomputed:
        detector.proposals = PrecomputedProposals(max_boxes=None)
    return boxes


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Find a device: CUDA if there is one for ``auto``, of several processes the next, else by its name.

    A UsageError if it cannot be used.
    """
    if name == "auto":
        several = torch.cuda.device_count()
        return torch.device("cuda", local_rank % several) if several else torch.device("cpu")
    try:
        found = torch.zeros(1, device=name)
        found.item()  # which a device without memory has none of
        return found.device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def _part(text: str) -> Part:
    found = _PART.fullmatch(text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"expected NUMBER/PARTS such as 3/16, got {text!r}")
    return Part(int(found[1]), int(found[2]))


def _parser(command: str, description: str, checkpoint: str, kind: str) -> Parser:
    parser = Parser(prog=f"detpipe {command}", description=description)
    add = parser.add_argument
    add("checkpoint", help=checkpoint)
    add("images", nargs="+", help="files, folders, patterns, @LIST.txt, - (standard input), web addresses; camera:0")
    add("-o", "--output", required=True, help=f"folder for the drawings, {kind}.jsonl and {kind}.json")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--resume", action="store_true", help="go on with a run that was stopped, by the same command")
    add("--part", type=_part, default=WHOLE, metavar="NUMBER/PARTS", help="this share of the images, such as 3/16")
    drawings = parser.add_mutually_exclusive_group()
    drawings.add_argument("--drawings", choices=("jpg", "png"), default="jpg", help="format of the pictures")
    drawings.add_argument("--no-drawings", dest="drawings", action="store_const", const=None, help="write no pictures")
    add("--workers", type=int, help="threads that read and draw; as many as there are cores by default")
    add("--allow_network", action="store_true", help="fetch images from web addresses")
    return parser


def _parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    options = parser.parse_args(list(arguments))
    check_least(options, 1, "workers")
    output_folder(options.output)
    return options


def _parse_predict(arguments: Sequence[str]) -> argparse.Namespace:
    text = "Detect objects in images, draw them, and write them as JSON."
    known = "such as RUN/best.ckpt; its model and class names are used; a name of 'detpipe zoo'; or FILE.onnx of 'detpipe export'"
    parser = _parser("predict", text, known, "detections")
    add = parser.add_argument
    add("--weights", metavar="FILE", help="the published file of a name, where it lies in no usual place")
    add("--score_threshold", type=float, default=0.5, help="leave out detections below it (default .5)")
    add("--max_detections", type=int, help="of an image or tile, at most; as in training by default")
    add("--batch_size", type=int, help="images of one size, or tiles, at a time; 4 on a CPU and 8 else by default")
    add("--tiles", type=int, metavar="SIDE", help="look at each image tile by tile, of so many pixels, and as a whole")
    add("--overlap", type=float, default=OVERLAP, help="share of a tile that the next one has too (default .2)")
    add("--merge", choices=("nms", "box_fusion"), default="nms", help="how what tiles find becomes one")
    add("--tta", action="store_true", help="look at each image mirrored and at other sizes too, six times in all")
    add(
        "--proposals",
        help="boxes to look at: a source (selective_search), a store, or JSON: image name -> [[x1, y1, x2, y2], ...]",
    )
    add("--every", type=int, default=1, metavar="N", help="of a video or camera, look at each N-th frame alone")
    add("--rate", type=float, help="take the images as frames of a video, so many a second")
    add("--track", action="store_true", help="of a video, follow objects from frame to frame (ByteTrack)")
    add(
        "--show-glimpses",
        action="store_true",
        help="draw the proposal of each detection and where the head looked beside it; glimpses.html shows all images",
    )
    options = _parse(parser, arguments)
    if not 0 <= options.score_threshold <= 1:
        raise UsageError(f"--score_threshold must be in 0..1, got {options.score_threshold}")
    check_tiles(options)
    if options.show_glimpses and (options.tta or options.tiles or options.drawings is None or options.part != WHOLE):
        raise UsageError(
            "--show-glimpses is for whole images and their drawings; leave out --tiles, --tta, --part, --no-drawings"
        )
    check_least(options, 1, "max_detections", "batch_size", "every")
    if options.rate is not None and not 0 < options.rate <= 1000:
        raise UsageError(f"--rate must be above 0 and at most 1000 frames a second, got {options.rate}")
    return options
