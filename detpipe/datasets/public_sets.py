"""The public data sets that are fetched by name: where they are, what they are known by, and when they are complete.

VOC: sizes and MD5 of the archives as torchvision has them (``torchvision/datasets/voc.py``); addresses are those that
``host.robots.ox.ac.uk`` leads to. COCO publishes no checksums: sizes and SHA-256 are those that TensorFlow Datasets recorded
(``url_checksums/coco.txt``), which other projects' records agree with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from detpipe.datasets.fetch import RemoteFile, check_space, check_url, fetch
from detpipe.datasets.unpack import unpack
from detpipe.errors import DownloadError
from detpipe.files import atomic_folder, remove_orphans

_VOC = "https://thor.robots.ox.ac.uk/pascal/VOC"
_COCO = "http://images.cocodataset.org"


@dataclass(frozen=True)
class Part:
    """A folder that archives make.

    Args:
        target: the folder, relative to that of all data.
        inner: what it is called in the archives.
        archives: that make it together.
        files: folder in it, or pattern of files -> how many files there must be; then it is complete.
    """

    target: str
    inner: str
    archives: tuple[RemoteFile, ...]
    files: dict[str, int]


@dataclass(frozen=True)
class PublicSet:
    """A data set.

    Args:
        parts: its folders.
        configs: the configurations that read it.
        page: its home.
    """

    parts: tuple[Part, ...]
    configs: tuple[str, ...]
    page: str


PUBLIC_SETS = {
    "voc07": PublicSet(
        parts=(
            Part(
                target="VOCdevkit/VOC2007",
                inner="VOCdevkit/VOC2007",
                archives=(
                    RemoteFile(
                        f"{_VOC}/voc2007/VOCtrainval_06-Nov-2007.tar",
                        460_032_000,
                        "md5",
                        "c52e279531787c972589f7e41ab4ae64",
                    ),
                    RemoteFile(
                        f"{_VOC}/voc2007/VOCtest_06-Nov-2007.tar",
                        451_020_800,
                        "md5",
                        "b6e924de25625d8de591ea690078ad9f",
                    ),
                ),
                files={
                    "JPEGImages/*.jpg": 9963,
                    "Annotations/*.xml": 9963,
                    "ImageSets/Main/trainval.txt": 1,
                    "ImageSets/Main/test.txt": 1,
                },
            ),
        ),
        configs=("configs/data/voc07.yaml",),
        page="http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
    ),
    "voc12": PublicSet(
        parts=(
            Part(
                target="VOCdevkit/VOC2012",
                inner="VOCdevkit/VOC2012",
                archives=(
                    RemoteFile(
                        f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar",
                        1_999_639_040,
                        "md5",
                        "6cd6e144f989b92b3379bac3b3de84fd",
                    ),
                ),
                files={"JPEGImages/*.jpg": 17125, "Annotations/*.xml": 17125, "ImageSets/Main/trainval.txt": 1},
            ),
        ),
        configs=("configs/data/voc0712.yaml (with voc07)",),
        page="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    ),
    "coco2017": PublicSet(
        parts=(
            Part(
                target="coco/annotations",
                inner="annotations",
                archives=(
                    RemoteFile(
                        f"{_COCO}/annotations/annotations_trainval2017.zip",
                        252_907_541,
                        "sha256",
                        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
                    ),
                ),
                files={"instances_train2017.json": 1, "instances_val2017.json": 1},
            ),
            Part(
                target="coco/val2017",
                inner="val2017",
                archives=(
                    RemoteFile(
                        f"{_COCO}/zips/val2017.zip",
                        815_585_330,
                        "sha256",
                        "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
                    ),
                ),
                files={"*.jpg": 5000},
            ),
            Part(
                target="coco/train2017",
                inner="train2017",
                archives=(
                    RemoteFile(
                        f"{_COCO}/zips/train2017.zip",
                        19_336_861_798,
                        "sha256",
                        "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
                    ),
                ),
                files={"*.jpg": 118_287},
            ),
        ),
        configs=("configs/data/coco.yaml",),
        page="https://cocodataset.org/#download",
    ),
}


def from_mirror(part: Part, mirror: str) -> Part:
    """The same folder made of archives of the same names, sizes and checksums elsewhere.

    Args:
        part: of a data set.
        mirror: the address of the folder that holds the archives.

    Raises:
        DownloadError: it is no web address.
    """
    check_url(mirror)
    archives = tuple(replace(remote, url=f"{mirror.rstrip('/')}/{remote.name}") for remote in part.archives)
    return replace(part, archives=archives)


def is_complete(part: Part, folder: Path) -> bool:
    """Whether a folder is there with all its files.

    Args:
        part: of a data set.
        folder: of all data.

    Returns:
        True if it is complete, False if there is no such folder, or an empty one.

    Raises:
        DownloadError: it has other files.
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
    """Refuse to begin where the disk cannot hold what is unpacked and the largest archive beside it.

    Args:
        parts: that are to be made one after the other; each is about as large as its archives.
        folder: of all data; it exists.
        archives: where archives lie that need not be fetched.

    Raises:
        DownloadError: there is too little space.
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
    """Fetch the archives of a folder and unpack them.

    The folder appears when it is complete; a run that was cut off goes on with what it has fetched.

    Args:
        part: of a data set; the folder is not there yet.
        folder: of all data.
        archives: the folder where archives are fetched to, or lie already.
        keep: whether they stay there.

    Returns:
        How many files were unpacked.

    Raises:
        DownloadError: see `fetch` and `unpack`; or what was unpacked is not complete.
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
