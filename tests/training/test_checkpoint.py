from __future__ import annotations

import os
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from together import succeed

from detpipe.datasets import read_image
from detpipe.support.errors import CheckpointError
from detpipe.training import checkpoint
from detpipe.training.checkpoint import AtomicCheckpointIO, Description, check_class_names, load_weights, read
from detpipe.training.models import load_detector

KILLS = 12
KILL_DURING_SAVES = """
import os, random, signal, sys, time, torch
from pathlib import Path
from detpipe.support.files import remove_orphans
from detpipe.training.checkpoint import PREVIOUS, SUM_SUFFIX, AtomicCheckpointIO, _hash, check_sums

torch.set_num_threads(1)  # a forked process has none of its parent's threads, and would wait for them
path, chance = Path(sys.argv[1]), random.Random(0)
for kill in range(int(sys.argv[2])):
    step, before = torch.load(path, weights_only=True)["step"], path.stat().st_ino
    writer = os.fork()
    while writer == 0:  # the writer, until it is killed
        step += 1
        AtomicCheckpointIO().save_checkpoint({"step": step, "weights": torch.full((200_000,), step)}, path)
    while kill % 2 and path.stat().st_ino == before:  # every other time, however busy the machine is, one save is done
        time.sleep(0.0005)
    while not any(".partial-" in file.name for file in path.parent.iterdir()):  # no save has begun
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.01))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    left = torch.load(path, weights_only=True)
    whole = torch.equal(left["weights"], torch.full((200_000,), left["step"])) and left["step"] >= step
    orphans, both = len(remove_orphans(path.parent)), [path, path.with_name(PREVIOUS)]
    sound = all(_hash(one) in check_sums(one) for one in both if one.exists())
    known = {name for one in both for name in (one.name, one.name + SUM_SUFFIX)}
    print(whole, orphans, sound, {file.name for file in path.parent.iterdir()} <= known)
"""


def stored(trained: Path) -> dict[str, Any]:
    return torch.load(trained / "best.ckpt", weights_only=True)


def saved(content: Any, folder: Path) -> Path:
    path = folder / "other.ckpt"
    torch.save(content, path)
    return path


def refusal(path: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_detector(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_row_40_a_kill_during_a_save_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 0, "weights": torch.full((200_000,), 0)}, path)
    [told] = succeed(KILL_DURING_SAVES, [str(path), str(KILLS)], 1, 120)
    reports = [line.split() for line in told.splitlines()]
    assert [(whole, *others) for whole, _, *others in reports] == [("True", "True", "True")] * KILLS
    assert any(int(orphans) for _, orphans, *_ in reports)  # else no kill hit a save, and nothing was tested
    assert torch.load(path, weights_only=True)["step"] > 0


def test_row_41_a_save_that_fails_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises(Exception, match=r"pickle|local object"):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "odd": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert sorted(found.name for found in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]


def test_a_checkpoint_is_removed_with_its_check_sum(tmp_path):
    """As by a callback of the user that keeps the best ones."""
    writer = checkpoint.AtomicCheckpointIO()
    for name in ("one.ckpt", "two.ckpt"):
        writer.save_checkpoint({"state_dict": {}}, tmp_path / name)
    writer.remove_checkpoint(tmp_path / "one.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"two.ckpt", "two.ckpt.sha256"}


def test_a_detector_is_rebuilt_from_its_checkpoint_alone(trained, demo_root):
    import runs

    from detpipe.commands import training
    from detpipe.training.configuration import CLI

    cli = CLI([runs.CONFIG, *runs.options(demo_root)], training.add_arguments)
    load_weights(cli.model, stored(trained), trained / "best.ckpt")
    detector, description = load_detector(trained / "best.ckpt")
    assert description.class_names == cli.datamodule.class_names == tuple("0123456789")
    assert description.category_ids == cli.datamodule.category_ids
    assert not detector.training
    images = [read_image(path) for path in sorted((demo_root / "coco" / "val").iterdir())]
    with torch.inference_mode():
        expected, found = cli.model.eval()(images), detector(images)
    assert sum(len(one["scores"]) for one in found) > 0
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "scores", "labels"))


def test_the_file_of_pretrained_weights_is_not_needed_to_load():
    config = {
        "backbone": {"class_path": "detpipe.Extractor", "init_args": {"weights": "/gone.pth", "padding": 8}},
        "a": (1, Path("x")),
    }
    description = checkpoint.describe_model(config)
    assert description["backbone"]["init_args"] == {"weights": None, "padding": 8}
    assert description["a"] == [1, "x"]
    assert config["backbone"]["init_args"]["weights"] == "/gone.pth"  # the configuration itself stays


def test_a_checkpoint_holds_plain_data_only(trained):
    entry = stored(trained)[checkpoint.KEY]
    assert set(entry) == {"format", "model", "class_names", "category_ids", "pixels", "proposals"}
    assert (entry["format"], entry["class_names"]) == (checkpoint.FORMAT, list("0123456789"))


@pytest.mark.parametrize("name", ["foreign_module_of_a_test.Net", "os.system", "detpipes.Net", 7])
def test_a_foreign_class_is_refused_before_it_is_imported(name, trained, tmp_path, monkeypatch):
    (tmp_path / "foreign_module_of_a_test.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    for place in ("backbone", "pooler"):
        content = stored(trained)
        model = content[checkpoint.KEY]["model"]
        (model["backbone"] if place == "backbone" else model["head"]["init_args"]["pooler"])["class_path"] = name
        message = refusal(saved(content, tmp_path))
        told = {"os.system": "is not allowed, since", 7: "its model cannot be built"}
        assert told.get(name, f"class {name!r} is not one of detpipe's; if you trust its code, give --trust") in message
    assert not (tmp_path / "marker").exists()
    assert "foreign_module_of_a_test" not in sys.modules


def test_row_44_a_malicious_checkpoint_is_refused_without_a_side_effect(trained, tmp_path):
    marker = tmp_path / "marker"
    for content in (Malicious(marker), {**stored(trained), "more": Malicious(marker)}):
        message = refusal(saved(content, tmp_path))
        assert "is damaged or holds more than tensors and plain data" in message
    assert not marker.exists()
    torch.load(tmp_path / "other.ckpt", weights_only=False)
    assert marker.exists()  # it would have worked


@pytest.mark.parametrize("address", ["http://localhost:1/best.ckpt", "https://x/best.ckpt", "s3://bucket/best.ckpt"])
def test_an_address_is_refused(address):
    assert "addresses are not loaded, download the file first" in refusal(address)


def test_a_missing_checkpoint_a_folder_and_an_exported_file(tmp_path):
    assert "does not exist; expected a file such as RUN/best.ckpt" in refusal(tmp_path / "best.ckpt")
    assert f"is a folder; give a file in it, such as {tmp_path / checkpoint.BEST}" in refusal(tmp_path)
    (tmp_path / "model.pt2").touch()
    assert "is what 'detpipe export' wrote; give the checkpoint" in refusal(tmp_path / "model.pt2")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
def test_a_checkpoint_that_is_cut_off(part, trained, tmp_path):
    content = (trained / "best.ckpt").read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(content[: int(len(content) * part)])
    assert "is damaged or holds more than tensors and plain data" in refusal(path)


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_a_flipped_byte_is_noticed(rank, trained, tmp_path):
    content = bytearray((trained / "best.ckpt").read_bytes())
    with zipfile.ZipFile(trained / "best.ckpt") as archive:
        part = sorted(archive.infolist(), key=lambda info: -info.file_size)[rank]  # one of the largest tensors
    content[part.header_offset + part.file_size // 2 + 200] ^= 0xFF
    path = tmp_path / "flipped.ckpt"
    path.write_bytes(content)
    assert f"{part.filename} does not match its check sum" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02", b"PK\x03\x04", bytes(range(256)) * 8])
def test_a_file_that_is_no_checkpoint(content, tmp_path):
    path = tmp_path / "no.ckpt"
    path.write_bytes(content)
    assert "is damaged or holds more than tensors and plain data" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {}}, {"weight": torch.zeros(1)}, [1], {"detpipe": {"format": 1}}, {"detpipe": 3, "state_dict": {}}],
)
def test_a_checkpoint_of_another_program(content, tmp_path):
    assert "is not a checkpoint of detpipe; give one that 'detpipe train' or 'detpipe pretrain' wrote" in refusal(
        saved(content, tmp_path)
    )


def test_a_checkpoint_of_another_format_or_without_a_description(trained, tmp_path):
    content = stored(trained)
    for weights in ([1], {"head.weight": "text"}):
        assert "its weights are no tensors by name" in refusal(saved({**content, "state_dict": weights}, tmp_path))
    content[checkpoint.KEY]["format"] = 99
    assert "has format 99, this version reads format 1" in refusal(saved(content, tmp_path))
    content[checkpoint.KEY] = {"format": 1, "model": {}}
    assert "lacks class_names, category_ids in its description" in refusal(saved(content, tmp_path))
    content[checkpoint.KEY] = {"format": 1, "model": None, "class_names": [], "category_ids": []}
    assert "describes its model by None, expected keys" in refusal(saved(content, tmp_path))


def test_a_model_that_this_version_cannot_build(trained, tmp_path):
    content = stored(trained)
    content[checkpoint.KEY]["model"]["backbone"]["init_args"]["wings"] = 2
    message = refusal(saved(content, tmp_path))
    assert "its model cannot be built by this version" in message
    assert "wings" in message


def test_weights_of_another_model_name_the_differences(trained, tmp_path):
    content = stored(trained)
    content[checkpoint.KEY]["model"]["head"]["init_args"]["fc"] = [16, 16]
    message = refusal(saved(content, tmp_path))
    assert (
        "belongs to another model (2 differences: head.shared.3.weight is missing; head.shared.3.bias is missing)"
        in message
    )
    content = stored(trained)
    content[checkpoint.KEY]["model"]["head"]["init_args"]["fc"] = [8]
    assert "head.shared.1.weight has shape [16, 200], expected [8, 200]" in refusal(saved(content, tmp_path))
    content = stored(trained)
    content["state_dict"]["wings"] = torch.zeros(1)
    assert "(1 differences: wings is unknown)" in refusal(saved(content, tmp_path))


def test_reading_tells_the_classes(trained):
    content, description = read(trained / "best.ckpt")
    assert {"state_dict", "optimizer_states", "global_step"} <= set(content)
    assert isinstance(description, Description)
    assert description.to_dict() == content[checkpoint.KEY]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat",), "knows 2 classes, the data have 1; give data with the classes of training"),
        (("cat", "cow"), "knows 2 classes, the data have 2; they differ in 'dog' / 'cow'; give"),
        (("dog", "cat"), "they differ in 'cat' / 'dog', 'dog' / 'cat'; give"),
        ((), "knows 2 classes, the data have 0"),
    ],
)
def test_class_names_that_differ_are_refused(names, message):
    description = Description({}, ("cat", "dog"), (1, 2))
    with pytest.raises(CheckpointError) as caught:
        check_class_names(description, names, "best.ckpt")
    assert f"checkpoint best.ckpt {message}" in str(caught.value) or message in str(caught.value)
    check_class_names(description, ("cat", "dog"), "best.ckpt")


def test_a_side_file_without_end_takes_no_memory(tmp_path):
    side = tmp_path / f"last.ckpt{checkpoint.SUM_SUFFIX}"
    side.write_text("abc  last.ckpt\n")
    os.truncate(side, 2**28)
    tracemalloc.start()
    assert checkpoint.check_sums(tmp_path / "last.ckpt")[0] == "abc"
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
