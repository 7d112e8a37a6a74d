import json
from functools import partial

import numpy as np
import pytest

from detpipe import cli
from detpipe.proposal_files.store import ProposalStore, write_store
from detpipe.support.errors import DataError, UsageError

main = partial(cli.run, group="proposals")


@pytest.fixture
def store(tmp_path):
    records = [("7", [[0, 0, 4, 4], [0, 0, 9, 9]], [0.1, 0.9], (10, 20)), ("8", [], []), ("9", [[1, 1, 2, 2]], [0.5])]
    return write_store(tmp_path / "s.safetensors", records, source="by hand", settings={"scale": 3})


def test_help_and_mistakes(capsys):
    assert main(["--help"]) == 0
    assert "convert FILE -o STORE.safetensors" in capsys.readouterr().out
    assert main([]) == 2
    with pytest.raises(
        UsageError, match="unknown command 'covnert': expected make, convert, info, recall; did you mean 'convert'"
    ):
        main(["covnert"])
    with pytest.raises(UsageError, match="required: FILE, -o/--output; see 'detpipe proposals convert --help'"):
        main(["convert"])
    with pytest.raises(UsageError, match=r"the name of a store must end in .safetensors"):
        main(["convert", "a.csv", "-o", "b.npz"])
    with pytest.raises(UsageError, match="argument --boxes: invalid choice: 'xyyx'"):
        main(["convert", "a.csv", "-o", "b.safetensors", "--boxes", "xyyx"])


@pytest.mark.parametrize("command", ["convert", "info"])
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: detpipe proposals {command}" in capsys.readouterr().out


def test_convert_says_what_it_read_and_left_out(tmp_path, capsys):
    table, out = tmp_path / "boxes.csv", tmp_path / "new" / "out.safetensors"
    table.write_text("7,1,1,4,4,0.5\n7,1,1,nan,4,0.5\n8,1,1,99,4,0.5\n")
    (tmp_path / "val.json").write_text(
        json.dumps({"images": [{"id": i, "height": 50, "width": 60} for i in (7, 8, 9)]})
    )
    arguments = ["convert", str(table), "-o", str(out), "--boxes", "xyxy1", "--source", "mine"]
    with pytest.raises(DataError, match=r"boxes\.csv: image '7': line 2 is .*nan.*--skip-bad"):
        main(arguments)
    assert not out.exists()
    options = ["--images", str(tmp_path / "val.json"), "--skip-bad", "--fill-missing"]
    assert main([*arguments, *options]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "boxes read as xyxy1: x1, y1, x2, y2; pixels counted from 1, the last one included",
        "boxes read: 3",
        "boxes skipped: not finite: 1",
        "boxes skipped: outside the image: 1",
        "boxes written: 1",
        "images filled in: not mentioned: 1",
        "images read: 2",
        "images written: 3",
        f"wrote {out}",
    ]
    store = ProposalStore(out)
    assert store.source == "mine"
    assert store["7"].boxes.tolist() == [[0, 0, 4, 4]]
    assert store.size("9") == (50, 60)


def test_convert_gives_the_same_bytes_again(tmp_path):
    np.savez(tmp_path / "a.npz", b=np.ones((3, 4)), a=np.zeros((2, 5)))
    for name in ("x", "y"):
        assert main(["convert", str(tmp_path / "a.npz"), "-o", str(tmp_path / f"{name}.safetensors")]) == 0
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_info_describes_a_store(store, capsys):
    assert main(["info", str(store.path), "--verify"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"path: {store.path}",
        "format version: 1",
        "source: by hand",
        'settings: {"scale": 3}',
        "images: 3, the size known of 1",
        "boxes: 3; an image has 0 to 2, median 1, and 1 images have none",
        f"content hash: {store.content_hash} (verified)",
    ]


def test_info_as_json(store, capsys, tmp_path):
    assert main(["info", str(store.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": str(store.path),
        "format_version": 1,
        "source": "by hand",
        "settings": {"scale": 3},
        "images": 3,
        "images_with_size": 1,
        "images_without_boxes": 1,
        "boxes": 3,
        "boxes_per_image": {"min": 0, "median": 1.0, "max": 2},
        "content_hash": store.content_hash,
    }
    empty = write_store(tmp_path / "e.safetensors", {}, source="s")
    assert main(["info", str(empty.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["boxes_per_image"] == {"min": 0, "median": 0.0, "max": 0}


def test_info_refuses_what_is_damaged(store, capsys):
    content = bytearray(store.path.read_bytes())
    content[-10] ^= 1
    store.path.write_bytes(content)
    assert main(["info", str(store.path)]) == 0
    with pytest.raises(DataError, match="damaged"):
        main(["info", str(store.path), "--verify"])
    store.path.write_bytes(content[:50])
    with pytest.raises(DataError, match="cut off"):
        main(["info", str(store.path)])
