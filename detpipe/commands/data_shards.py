"""The ``data shards`` command: a data set as a few large tar files, for disks and networks that are slow with many small ones."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from detpipe.commands.data_source import find_data, open_splits, read_split, source_parser
from detpipe.commands.parser import check_least, left_out, listed, output_folder, progress
from detpipe.datasets.datamodule import DetectionData
from detpipe.datasets.formats.export import file_name_of
from detpipe.datasets.shards.index import INDEX, KEYS, find_splits
from detpipe.datasets.shards.read import verify_shards
from detpipe.datasets.shards.write import SUFFIX, Made, Sharding, make_shards
from detpipe.support.errors import DataError, UsageError
from detpipe.support.terminal import say
from detpipe.types import Annotations

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SHOWN = 5


def run_shards(arguments: Sequence[str]) -> int:
    """Write the splits of a data set as shards, or compare shards with their index.

    Shards that are written before an error stay, and the same command goes on from there.
    """
    options = _parser().parse_args(list(arguments))
    if options.verify:
        return _verify(Path(options.data))
    if options.output is None:
        raise UsageError("-o FOLDER is missing: where shards are to be written; see 'detpipe data shards --help'")
    sharding = _sharding(options)
    if find_data(options).layout == "shards":
        raise UsageError(
            f"{options.data} holds shards already: for other ones, bring it into COCO layout before, with 'detpipe data convert'"
        )
    folder = output_folder(options.output)
    _refuse_strangers(folder)
    opened = open_splits(argparse.Namespace(**{**vars(options), "skip_bad": False}))
    stores = _stores(options.proposals or [], list(opened))
    for name, data in opened.items():
        annotations = read_annotations(data) if sharding.skip else read_split(name, opened)
        start = time.perf_counter()
        key = next(known for known, function in KEYS.items() if function is data.image_key)
        with progress(len(annotations), name) as move:
            made = make_shards(annotations, folder / file_name_of(name), name, key, sharding, stores.get(name), move)
        say(report(made, name, time.perf_counter() - start))
    return 0


def read_annotations(data: DetectionData) -> Annotations:
    """Read the annotations of a split without what is faulty; its images are decoded later, by several processes.

    Raises:
        DataError: there are faults that may not be skipped.
    """
    collected = data.faults("collect", decode=False)
    annotations = data.annotations("val", collected)
    fatal = [fault for fault in collected.found if fault.kind.startswith("data set:")]
    if fatal:
        more = f" (and {len(fatal) - 1} more such faults)" if len(fatal) > 1 else ""
        raise DataError(f"{annotations.root}: {fatal[0].message}{more}; correct the annotations")
    return annotations


def report(made: Made, split: str, seconds: float) -> str:
    """Say what was made of a split, in a few lines."""
    shards, a = made.shards, made.shards.annotations
    skipped = sum(n for name, n in a.counts.items() if "skipped" in name and name.startswith("images"))
    total = sum(shard.bytes for shard in shards.shards)
    kept = f"; {made.there} shards were there from an earlier run" if made.there else ""
    lines = [
        f"{split}: {len(a) + skipped} images read = {len(a)} written + {skipped} skipped; {len(a.boxes)} boxes; "
        f"{len(shards.shards)} shards, {total / 1e6:.1f} MB in {shards.folder}; {seconds:.1f} s{kept}"
    ]
    lines += [f"  {text}" for text in left_out(a.counts)]
    return "\n".join([*lines, *listed([message for _, _, message in made.skipped], _SHOWN)])


def read_bytes(text: str) -> int:
    """``256MB``, ``1.5GiB`` or ``1000000`` as bytes; a UsageError if it is no such size."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kmg]i?|)b?", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise UsageError(f"--shard-size {text}: expected a size such as 256MB, 1GB or 512MiB")
    return size


def _parser() -> argparse.ArgumentParser:
    parser = source_parser(
        "shards", "Write a data set as tar files that are read in one piece, with an index of all images."
    )
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", help="gets a folder for each split; what is begun there goes on"
    )
    parser.add_argument("--shard-size", default="256MB", metavar="SIZE", help="the most that a shard may have (256MB)")
    parser.add_argument(
        "--images-per-shard", type=int, metavar="N", help="images of every shard but the last, in place of a size"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes (1); the shards do not depend on it"
    )
    parser.add_argument(
        "--proposals",
        action="append",
        metavar="[SPLIT=]STORE",
        help="boxes of a proposal store that are to ride along; may be repeated, once a split",
    )
    parser.add_argument(
        "--no-decode", action="store_true", help="read only the headers of images; damaged ones are not noticed"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides which images share a shard (0)")
    parser.add_argument(
        "--verify", action="store_true", help="PATH holds shards: read them all and compare them with their index"
    )
    return parser


def _sharding(options: argparse.Namespace) -> Sharding:
    check_least(options, 1, "images-per-shard", "workers")
    check_least(options, 0, "seed")
    return Sharding(
        shard_bytes=read_bytes(options.shard_size),
        images_per_shard=options.images_per_shard,
        decode=not options.no_decode,
        skip=options.skip_bad,
        seed=options.seed,
        workers=options.workers,
    )


def _refuse_strangers(folder: Path) -> None:
    """Write only beside shards of ours."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        shards = path.is_dir() and ((path / INDEX).is_file() or path.name.endswith(SUFFIX))
        if not shards and not path.name.endswith(f"{SUFFIX}.lock"):
            raise UsageError(f"--output {folder}: holds {path.name}, which is no folder of shards: name a new folder")


def _stores(given: Sequence[str], splits: Sequence[str]) -> Mapping[str, str]:
    """Splits and their proposal stores."""
    stores: dict[str, str] = {}
    for text in given:
        split, _, path = text.rpartition("=")
        if split not in splits:
            split, path = (splits[0], text) if len(splits) == 1 else ("", text)
        if not split or split in stores:
            raise UsageError(
                f"--proposals {text}: expected SPLIT=STORE once for a split; the splits are {', '.join(splits)}"
            )
        stores[split] = path
    return stores


def _verify(folder: Path) -> int:
    """Compare the shards of a split, or of all splits of a folder, with their indices."""
    found = find_splits(folder)
    if not found:
        raise UsageError(f"{folder}: no shards here: expected a folder that 'detpipe data shards' wrote")
    for path in found.values():
        with progress(None, path.name, "shard", logged=False) as move:
            shards = verify_shards(path, move)
        say(f"{path}: {len(shards.shards)} shards with {len(shards.annotations)} images are as they were written")
    return 0
