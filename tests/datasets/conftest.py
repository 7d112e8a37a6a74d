"""Data sets that several tests read, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def eleven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``files``, eleven images in COCO layout, and ``shards`` of them, two a shard: to be read, not written to."""
    from .shard_cases import files_in, pack  # imports much, which a conftest does before warnings are looked at

    folder = tmp_path_factory.mktemp("eleven")
    pack(files_in(folder / "files"), folder / "shards")
    return folder


@pytest.fixture
def packed(eleven: Path, tmp_path: Path) -> Path:
    """The shards of `eleven`, to be spoiled; beside them are the files."""
    shutil.copytree(eleven, tmp_path, dirs_exist_ok=True)
    return tmp_path / "shards"
