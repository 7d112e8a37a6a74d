"""Files that take a moment to send and a machine to read, and a program that reads each and reports what that took.

``python tests/hostile.py FOLDER`` prints a JSON object: case -> seconds, MiB above what the process had before, and what was said.
Each case runs in a process of its own, which is ended after `PATIENCE` seconds.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

PATIENCE = 20
Case = Callable[[Path], Callable[[], object]]  # writes into a folder, and gives the reading
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    def keep(function: Case) -> Case:
        CASES[name] = function
        return function

    return keep


def nested(levels: int, width: int, key: str = "") -> str:
    """Aliases of aliases: ``width ** levels`` nodes in some hundred bytes."""
    lines = ["a0: &a0 {x: 1}" if key else "a0: &a0 [x]"]
    for level in range(1, levels):
        inner = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} {{{key}: [{inner}]}}" if key else f"a{level}: &a{level} [{inner}]")
    return "\n".join(lines)


YAML = {
    "aliases of aliases": nested(9, 9),
    "merged aliases": nested(9, 9, "<<"),
    "an alias within itself": "a: &a [*a, *a]",
    "many levels": "a: " + "[" * 100_000 + "]" * 100_000,
    "levels of keys": "".join(f"{' ' * level}a:\n" for level in range(1500)),
    "many nodes": "a: [" + "1," * 1_000_000 + "]",
    "a long number": "a: " + "1" * 1_000_000,
    "a long sexagesimal number": "a: 1" + ":1" * 500_000,
    "a large file": "a: b\n" * 1_000_000,
    "a large scalar": "a: " + "b" * 3_000_000,
}


def yaml_cases() -> None:
    from detpipe.commands.ablation import read_study
    from detpipe.datasets.formats.yolo_yaml import read_yolo_yaml
    from detpipe.training.configuration import check_file

    def made(text: str, read: Callable[[Path], object]) -> Case:
        def write(folder: Path) -> Callable[[], object]:
            (folder / "data.yaml").write_text(text)
            return lambda: read(folder / "data.yaml")

        return write

    for name, text in YAML.items():
        for kind, read in {"configuration": check_file, "data.yaml": read_yolo_yaml, "study": read_study}.items():
            CASES[f"{kind}: {name}"] = made(text, read)


def shared(levels: int, start: bytes = b"](K\x01e") -> bytes:
    """A list of lists of lists, each in the next one ten times."""
    return start + b"".join(b"q" + bytes([n]) + b"0](" + (b"h" + bytes([n])) * 10 + b"e" for n in range(levels))


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x89\x88\x87R"
PICKLES = {
    "lists of the same lists": shared(8),
    "an array many times": b"("
    + (ARRAY + b"(K\x01J" + struct.pack("<i", 1_000_000) + b"\x85" + DTYPE + b"\x89B" + struct.pack("<I", 1_000_000))
    + b"\0" * 1_000_000
    + b"tb"
    + b"q\x01"
    + b"h\x01" * 2000
    + b"l",
    "a text many times": b"(X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000 + b"q\x01" + b"h\x01" * 2000 + b"l",
    "arrays of the same bytes": b"(B" + struct.pack("<I", 1_000_000) + b"\0" * 1_000_000 + b"q\x01" + DTYPE + b"q\x020"
    + (ARRAY + b"(K\x01J" + struct.pack("<i", 1_000_000) + b"\x85h\x02\x89h\x01tb") * 2000 + b"l",
    "many sets": b"(" + b"\x8f" * 4_000_000 + b"l",
    "a far number in the memo": b"Nr" + struct.pack("<I", 400_000_000),
    "tuples in tuples": b"})" + b"\x85" * 1_000_000 + b"Ns",
    "copies of text": b"(c_codecs\nencode\nq\x01X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000 + b"q\x02"
    + b"h\x01h\x02\x85R" * 2000 + b"l",
    "copies of copies": b"(c__builtin__\nlist\nq\x01(" + b"K\x01" * 100_000 + b"tq\x02" + b"h\x01h\x02\x85R" * 3000 + b"l",
    "a count for bytes": b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    "a long integer": b"\x8b" + struct.pack("<i", 3_000_000) + b"\x01" * 3_000_000,
    "a long frame": b"\x95" + struct.pack("<Q", 2**40),
    "long bytes": b"\x8e" + struct.pack("<Q", 2**40),
}  # fmt: skip


def pickle_cases() -> None:
    from detpipe.proposal_files.restricted_pickle import load_plain_pickle

    def made(content: bytes) -> Case:
        def write(folder: Path) -> Callable[[], object]:
            (folder / "a.pkl").write_bytes(b"\x80\x04" + content + b".")
            return lambda: load_plain_pickle(folder / "a.pkl")

        return write

    CASES.update({f"pickle: {name}": made(content) for name, content in PICKLES.items()})


def many(count: int, **more: object) -> str:
    """So many categories."""
    return json.dumps([{"id": number, "name": str(number), **more} for number in range(count)])


COCO = {  # images, categories
    "many categories": ('[{"id": 1}]', many(40_000)),
    "many categories of one": ('[{"id": 1}]', many(40_000, supercategory="0")),
    "a long name": (json.dumps([{"id": -1, "file_name": "a" * 1_000_000}, *({"id": n} for n in range(500))]), many(1)),
}


def coco_cases() -> None:
    from detpipe.evaluation import read_coco_annotations

    def made(images: str, categories: str) -> Case:
        def write(folder: Path) -> Callable[[], object]:
            boxes = '[{"id": 1}]'  # the fault that is named where the lists are read
            (folder / "a.json").write_text(
                f'{{"images": {images}, "categories": {categories}, "annotations": {boxes}}}'
            )
            return lambda: read_coco_annotations(folder / "a.json")

        return write

    CASES.update({f"COCO: {name}": made(*lists) for name, lists in COCO.items()})


def read_npz(path: Path) -> list[Any]:
    from detpipe.proposal_files.array_readers import read_numpy
    from detpipe.proposal_files.raw_proposals import Tally

    return list(read_numpy(path, None, Tally("error")).images)


def npy(shape: str, data: bytes) -> bytes:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


@case("npz: zeros of gigabytes")
def npz_zeros(folder: Path) -> Callable[[], object]:
    with (
        zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w") as part,
    ):
        part.write(npy("(16777216, 4)", b""))
        for _ in range(64):
            part.write(bytes(2**23))
    return lambda: read_npz(folder / "a.npz")


@case("npz: a header of terabytes")
def npz_header(folder: Path) -> Callable[[], object]:
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr("a.npy", npy("(30000000000, 4)", bytes(64)))
    return lambda: read_npz(folder / "a.npz")


@case("npz: a single array of terabytes")
def npy_header(folder: Path) -> Callable[[], object]:
    (folder / "a.npz").write_bytes(npy("(2000000000, 4)", bytes(64)))
    return lambda: read_npz(folder / "a.npz")


@case("npz: parts that overlap")
def npz_overlap(folder: Path) -> Callable[[], object]:
    return lambda: read_npz(overlapping(folder / "a.npz", "a{}.npy"))


def overlapping(path: Path, name: str) -> Path:
    """A zip file, of whose 1000 parts each is the same 8 MiB."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name.format(0), npy("(262144, 4)", bytes(2**23)))
        for number in range(1, 1000):
            part = zipfile.ZipInfo(name.format(number))
            for field in ("CRC", "compress_size", "file_size", "header_offset", "create_system"):
                setattr(part, field, getattr(archive.filelist[0], field))
            archive.filelist.append(part)
    return path


def entry(model: Any) -> dict[str, Any]:
    return {"format": 1, "model": model, "class_names": ["a"], "category_ids": [1]}


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def rezipped(path: Path, compression: int, pickled: bytes | None = None, more: int = 0) -> Path:
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        for name, content in parts.items():
            archive.writestr(name, pickled if pickled is not None and name.endswith("data.pkl") else content)
        if more:
            with archive.open(f"{path.stem}/data/9", "w") as part:
                for _ in range(more):
                    part.write(bytes(2**23))
    return path


def both_cases() -> None:
    """Files of torch.save, read as checkpoint and as weights."""
    from detpipe.backbones.weights import read_state
    from detpipe.training.models import load_detector

    one = torch.zeros(1)

    def written(folder: Path, content: Any) -> Path:
        return saved(content, folder / "a.pth")

    made: dict[str, Callable[[Path], Path]] = {
        "zeros of gigabytes": lambda f: rezipped(written(f, {"a": one}), zipfile.ZIP_DEFLATED, more=64),
        "parts that overlap": lambda f: overlapping(f / "a.pth", "a/data/{}"),
        "lists of the same lists": lambda f: rezipped(written(f, {"a": one}), 0, b"\x80\x02" + shared(9) + b"."),
        "a far number in the memo": lambda f: rezipped(
            written(f, {"a": one}), 0, b"\x80\x02" + PICKLES["a far number in the memo"] + b"."
        ),
        "tuples in tuples": lambda f: rezipped(
            written(f, {"a": one}), 0, b"\x80\x02" + PICKLES["tuples in tuples"] + b"."
        ),
        "many dicts": lambda f: rezipped(written(f, {"a": one}), 0, b"\x80\x02(" + b"}" * 4_000_000 + b"l."),
        "a tensor that repeats a number": lambda f: written(
            f, {"state_dict": {"a": one.expand(10**9, 1000)}, "detpipe": entry({})}
        ),
        "a storage that is larger than its file": huge_storage,
        "an old file of many dicts": old,
    }

    def reading(write: Callable[[Path], Path], read: Callable[[Path], object]) -> Case:
        def prepare(folder: Path) -> Callable[[], object]:
            path = write(folder)
            return lambda: read(path)

        return prepare

    for name, write in made.items():
        CASES[f"checkpoint: {name}"] = reading(write, load_detector)
        CASES[f"weights: {name}"] = reading(write, read_state)


def huge_storage(folder: Path) -> Path:
    path = saved({"a": torch.zeros(7777)}, folder / "a.pth")
    with zipfile.ZipFile(path) as archive:
        content = archive.read("a/data.pkl")
    content = content.replace(b"M" + struct.pack("<H", 7777), b"J" + struct.pack("<i", 2**31 - 1))
    return rezipped(path, 0, content)


def old(folder: Path) -> Path:
    torch.save({"a": torch.zeros(1)}, folder / "a.pth", _use_new_zipfile_serialization=False)
    content = (folder / "a.pth").read_bytes()
    start = content.index(b"}", content.index(b"little_endian") + 50)
    (folder / "a.pth").write_bytes(content[: start - 2] + b"\x80\x02(" + b"}" * 4_000_000 + b"l." + content[start:])
    return folder / "a.pth"


@case("checkpoint: a description of the same lists")
def description(folder: Path) -> Callable[[], object]:
    from detpipe.training.models import load_detector

    value: Any = [1]
    for _ in range(30):
        value = [value, value]
    path = saved({"state_dict": {}, "detpipe": entry({"backbone": value})}, folder / "a.ckpt")
    return lambda: load_detector(path)


@case("checkpoint: a description of many levels")
def deep_description(folder: Path) -> Callable[[], object]:
    from detpipe.training.models import load_detector

    value: Any = [1]
    for _ in range(300):
        value = [value]
    path = saved({"state_dict": {}, "detpipe": entry({"backbone": value})}, folder / "a.ckpt")
    return lambda: load_detector(path)


@case("checkpoint: aliases of aliases in text")
def text_description(folder: Path) -> Callable[[], object]:
    from detpipe.training.models import load_detector

    path = saved({"state_dict": {}, "detpipe": entry({"backbone": nested(9, 9)})}, folder / "a.ckpt")
    return lambda: load_detector(path)


@case("weights: a safetensors header that lies")
def lying_header(folder: Path) -> Callable[[], object]:
    from detpipe.backbones.weights import read_state

    header = json.dumps({"a": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}).encode()
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    return lambda: read_state(folder / "a.safetensors")


@case("weights: a safetensors header without end")
def long_header(folder: Path) -> Callable[[], object]:
    from detpipe.backbones.weights import read_state

    (folder / "a.safetensors").write_bytes(struct.pack("<Q", 2**50) + b"{}")
    return lambda: read_state(folder / "a.safetensors")


@case("shards: a list of proposals of terabytes")
def shard_proposals(folder: Path) -> Callable[[], object]:
    from detpipe.datasets.shards.read import ShardProposals

    class Files:
        def read_part(self, *_: Any) -> bytes:
            return npy("(30000000000, 4)", bytes(64))

        def name(self, row: int) -> str:
            return f"image {row}"

        class shards:
            class annotations:
                image_ids = np.array([7])

    proposals = ShardProposals(Files(), None)  # type: ignore[arg-type]
    return lambda: proposals[7]


def pipe_cases() -> None:
    from detpipe.backbones.weights import read_state
    from detpipe.datasets import image_size, load_coco, read_image
    from detpipe.datasets.formats.csv_table import Table
    from detpipe.datasets.formats.yolo_yaml import read_yolo_yaml
    from detpipe.datasets.unpack import unpack
    from detpipe.evaluation.predictions import read_lines
    from detpipe.proposal_files import ProposalStore
    from detpipe.proposal_files.array_readers import read_mat
    from detpipe.proposal_files.known_images import read_known_images
    from detpipe.proposal_files.raw_proposals import Tally
    from detpipe.proposal_files.restricted_pickle import load_plain_pickle
    from detpipe.support.strict_json import load_json, read_text
    from detpipe.training.configuration import check_file
    from detpipe.training.models import load_detector

    readers: dict[str, Callable[[Path], object]] = {
        "image": read_image,
        "size of an image": image_size,
        "JSON": load_json,
        "COCO": lambda path: load_coco(path, path.parent),
        "list of images": lambda path: read_text(path, "a list of image names"),
        "list of ids": read_known_images,
        "table": Table,
        "archive": lambda path: unpack(path, path.parent / "out"),
        "data.yaml": read_yolo_yaml,
        "configuration": check_file,
        "checkpoint": load_detector,
        "weights": read_state,
        "store": ProposalStore,
        "pickle": load_plain_pickle,
        "npz": read_npz,
        "mat": lambda path: read_mat(path, None, Tally("error")),
        "lines of predictions": read_lines,
    }

    def reading(read: Callable[[Path], object]) -> Case:
        def prepare(folder: Path) -> Callable[[], object]:
            os.mkfifo(folder / "pipe")
            return lambda: read(folder / "pipe")

        return prepare

    for name, read in readers.items():
        CASES[f"pipe: {name}"] = reading(read)
    CASES["device: image"] = lambda folder: lambda: read_image("/dev/zero")


def collect() -> dict[str, Case]:
    for fill in (yaml_cases, pickle_cases, coco_cases, both_cases, pipe_cases):
        fill()
    return CASES


def memory(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def run(prepare: Case, folder: Path, out: int) -> None:
    """In the child: read, and write what it took."""
    from detpipe.support.errors import DetpipeError

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    read = prepare(folder)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.perf_counter()
    try:
        read()
        told = "nothing: it was read"
    except DetpipeError as error:
        told = str(error)
    except BaseException as error:
        told = f"{type(error).__name__}: {error}"[:200] + " (no error of detpipe)"
    report = {"seconds": time.perf_counter() - start, "MiB": memory("VmHWM") - before, "told": told}
    os.write(out, json.dumps(report).encode())


def measure(name: str, prepare: Case, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            run(prepare, folder, write_end)
        finally:
            os._exit(0)
    os.close(write_end)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and os.waitpid(child, os.WNOHANG)[0] == 0:
        time.sleep(0.01)
    if time.monotonic() >= end:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as stream:
        content = stream.read()
    return (
        json.loads(content) if content else {"seconds": PATIENCE, "MiB": 0, "told": "nothing: it was ended, or crashed"}
    )


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {name: measure(name, prepare, folder / str(n)) for n, (name, prepare) in enumerate(collect().items())}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
