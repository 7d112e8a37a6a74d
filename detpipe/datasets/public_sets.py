"""The public data sets that are fetched by name: where they are, what they are known by, and when they are complete.

The table is ``public_sets.yaml``.
VOC: sizes and MD5 of the archives as torchvision has them (``torchvision/datasets/voc.py``); addresses are those that
``host.robots.ox.ac.uk`` leads to. COCO publishes no checksums: sizes and SHA-256 are those that TensorFlow Datasets recorded
(``url_checksums/coco.txt``), which other projects' records agree with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import yaml

from detpipe.datasets.fetch import RemoteFile, check_space, check_url, fetch
from detpipe.datasets.unpack import unpack
from detpipe.support.errors import DownloadError
from detpipe.support.files import atomic_folder, remove_orphans


@dataclass(frozen=True)
class Part:
    """A folder that archives make."""

    target: str  # the folder, relative to that of all data
    inner: str  # what it is called in the archives
    archives: tuple[RemoteFile, ...]  # that make it together
    files: dict[str, int]  # folder in it, or pattern of files -> how many files there must be; then it is complete


@dataclass(frozen=True)
class PublicSet:
    """A data set."""

    parts: tuple[Part, ...]  # its folders
    configs: tuple[str, ...]  # the configurations that read it
    page: str  # its home


PUBLIC_SETS = msgspec.convert(
    yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")), dict[str, PublicSet]
)


def from_mirror(part: Part, mirror: str) -> Part:
    """The same folder made of the same archives, at another address; a DownloadError if it is none."""
    check_url(mirror)
    archives = tuple(replace(remote, url=f"{mirror.rstrip('/')}/{remote.name}") for remote in part.archives)
    return replace(part, archives=archives)


def is_complete(part: Part, folder: Path) -> bool:
    """Whether a folder is there with all its files; False if there is no such folder, or an empty one.

    A DownloadError if it has other files.
    """
    target = folder / part.target
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    for pattern, expected in part.files.items():
        found = sum(1 for _ in target.glob(pattern))
        if found != expected:
            raise DownloadError(
                f"{target}: is there already, but has {found} files {pattern}, expected {expected}: move it away, "
                "and it is made anew"
            )
    return True


def check_room(parts: Sequence[Part], folder: Path, archives: Path) -> None:
    """Refuse by a DownloadError to begin where the disk cannot hold what is unpacked and the largest archive beside it.

    Parts are made one after the other, each about as large as its archives; those that lie in ``archives`` need not be fetched.
    """
    made = [sum(remote.size for remote in part.archives) for part in parts]
    there = sum(
        path.stat().st_size
        for part in parts
        for remote in part.archives
        for path in (archives / remote.name, archives / f"{remote.name}.part")
        if path.exists()
    )
    check_space(folder, sum(made) + max(made, default=0) - there, f"{folder}, with archives beside what is unpacked")


def install(part: Part, folder: Path, archives: Path, keep: bool = False) -> int:
    """Fetch the archives of a folder that is not there yet, unless they lie there, and unpack them; how many files were unpacked.

    The folder appears when it is complete; a run that was cut off goes on with what it has fetched. A DownloadError as of `fetch`
    and `unpack`, or if what was unpacked is not complete. ``keep`` leaves the archives.
    """
    target = folder / part.target
    paths = [fetch(remote, archives) for remote in part.archives]
    remove_orphans(target.parent)
    with atomic_folder(target) as temporary:
        count = sum(unpack(path, temporary, part.inner) for path in paths)
        if not is_complete(replace(part, target="."), temporary):
            raise DownloadError(f"{paths[0]}: has no files for {target}")
    if not keep:
        for path in paths:
            path.unlink()
    return count
