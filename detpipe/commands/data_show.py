"""The ``data show`` command: images with their boxes, on a contact sheet or one a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from detpipe.commands.data_source import open_splits, read_split, source_parser
from detpipe.commands.parser import check_least, distinct, output_folder
from detpipe.datasets.dataset import DetectionDataset
from detpipe.datasets.formats.export import file_name_of
from detpipe.pictures.visualize import contact_sheet, draw_target, save_png
from detpipe.support.errors import UsageError
from detpipe.support.suggest import did_you_mean
from detpipe.support.terminal import say
from detpipe.types import Annotations, Target

Chosen = list[tuple[str, int]]  # split and row


def run_show(arguments: Sequence[str]) -> int:
    """Draw some images of a data set."""
    parser = source_parser("show", "Draw images with their boxes; crowd regions and difficult objects are gray.")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT.png|FOLDER", help="one sheet, or a picture an image"
    )
    parser.add_argument("-n", type=int, default=16, metavar="N", help="how many images (16)")
    parser.add_argument("--seed", type=int, default=0, help="decides which images are drawn (0)")
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="NAME", help="only images and boxes of these classes"
    )
    options = parser.parse_args(list(arguments))
    check_least(options, 1, "n")
    check_least(options, 0, "seed")
    opened = open_splits(options)
    splits = {name: read_split(name, opened) for name in opened}
    known = list(dict.fromkeys(word for a in splits.values() for word in a.class_names))
    unknown = [word for word in options.classes if word not in known]
    if unknown:
        raise UsageError(
            f"--classes {' '.join(unknown)}: there are no such classes{did_you_mean(unknown[0], known)}; "
            f"there are {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"
        )
    labels = {
        name: [a.class_names.index(w) + 1 for w in options.classes if w in a.class_names] for name, a in splits.items()
    }
    wanted = {name: np.array(found, np.int64) for name, found in labels.items()} if options.classes else None
    chosen = choose(splits, wanted, options.n, options.seed)
    if not chosen:
        raise UsageError(f"--classes {' '.join(options.classes)}: no image has an object of these classes")
    out = output_folder(options.output) if not Path(options.output).suffix else Path(options.output)
    datasets = {name: DetectionDataset(a, contents=opened[name].contents("val")) for name, a in splits.items()}
    count = _write(out, datasets, chosen, wanted, options.data)
    say(f"wrote {count} images to {out}")
    return 0


def choose(
    splits: Mapping[str, Annotations], wanted: Mapping[str, npt.NDArray[np.int64]] | None, n: int, seed: int
) -> Chosen:
    """Draw ``n`` images at random, of those that have a box of the wanted labels, in the order of the splits."""
    images: Chosen = []
    for name, a in splits.items():
        rows = np.arange(len(a))
        if wanted is not None:
            image = np.repeat(rows, np.diff(a.offsets))
            rows = np.unique(image[np.isin(a.labels, wanted[name])])
        images += [(name, row) for row in rows.tolist()]
    places = np.random.default_rng(seed).permutation(len(images))[:n]
    return [images[place] for place in sorted(places.tolist())]


def _write(
    out: Path,
    splits: Mapping[str, DetectionDataset],
    chosen: Chosen,
    wanted: Mapping[str, npt.NDArray[np.int64]] | None,
    data: str,
) -> int:
    samples = _samples(splits, chosen, wanted)
    if out.suffix.lower() == ".png":
        names = {name: splits[name].annotations.class_names for name, _ in chosen}
        if len(set(names.values())) > 1:
            raise UsageError("the splits have other classes: show one at a time with --split, or write to a folder")
        images, targets = zip(*((image, target) for _, image, target in samples), strict=True)
        title = f"{data}: {len(chosen)} of {sum(map(len, splits.values()))} images ({', '.join(names)})"
        save_png(out, contact_sheet(images, targets, next(iter(names.values())), title))
        return len(chosen)
    if out.suffix:
        raise UsageError(f"--output {out}: expected a name that ends in .png, or a folder")
    taken: set[str] = set()
    for name, image, target in samples:
        file = Path(target.get("file_name", ""))
        drawn = draw_target(image, target, splits[name].annotations.class_names)
        stem = distinct(f"{file_name_of(name)}_{'_'.join(file.with_suffix('').parts)}", taken)
        save_png(out / f"{stem}.png", drawn)
    return len(chosen)


def _samples(
    splits: Mapping[str, DetectionDataset], chosen: Chosen, wanted: Mapping[str, npt.NDArray[np.int64]] | None
) -> Iterator[tuple[str, Tensor, Target]]:
    """Split, image and target of each."""
    for name, row in tqdm(chosen, desc="drawing", unit="image", disable=None, leave=False):
        image, target = splits[name][0, row]
        if wanted is not None:
            target = _keep(target, wanted[name])
        yield name, image, target


def _keep(target: Target, labels: npt.NDArray[np.int64]) -> Target:
    """Only the boxes of some classes."""
    boxes: dict[str, Tensor] = {key: value for key, value in target.items() if isinstance(value, Tensor)}
    keep = torch.isin(boxes["labels"], torch.from_numpy(labels))
    return cast(Target, {**target, **{key: value[keep] for key, value in boxes.items()}})
