import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from detpipe.proposal_files.store import ProposalStore, ProposalWriter, write_store
from detpipe.proposal_files.store_format import read_header
from detpipe.support.errors import DataError

BOXES = [[0.0, 0.0, 10.0, 20.0], [5.0, 5.0, 30.0, 40.0], [1.0, 2.0, 3.0, 4.0]]
RECORDS = {"b": (BOXES, [0.1, 0.9, 0.5]), "a": ([], []), "é": (BOXES[:1], [0.0])}

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
numbers = st.floats(-100, 1000, width=32)


@st.composite
def images(draw):
    corners = draw(st.lists(st.tuples(numbers, numbers, st.floats(0, 500, width=32), st.floats(0, 500, width=32))))
    boxes = np.array(corners, dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = draw(st.lists(st.floats(-10, 10, width=32), min_size=len(boxes), max_size=len(boxes)))
    return boxes, np.array(scores, dtype=np.float32)


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "s.safetensors", RECORDS, source="by hand", settings={"k": [1, "two", None]})


def parts(path: Path) -> tuple[dict, bytes]:
    """Header and arrays of a store."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite(path: Path, header: dict, arrays: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + arrays)


def place(path: Path, name: str) -> int:
    """The first byte of an array."""
    with path.open("rb") as file:
        return read_header(file, path, path.stat().st_size)[1][name].start


def overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def test_boxes_come_back_sorted_by_score(store):
    boxes, scores = store["b"]
    assert boxes.tolist() == [BOXES[1], BOXES[2], BOXES[0]]
    assert scores.tolist() == pytest.approx([0.9, 0.5, 0.1])
    assert boxes.dtype == scores.dtype == np.float32
    boxes[:] = 0  # the caller's own
    assert store["b"].boxes[0].tolist() == BOXES[1]
    assert store["a"].boxes.shape == (0, 4)
    assert store["a"].scores.shape == (0,)


def test_a_store_is_a_mapping_in_the_order_of_the_ids(store):
    assert list(store) == ["a", "b", "é"]
    assert len(store) == 3
    assert "é" in store
    assert "c" not in store
    assert store.get("c") is None
    assert [len(record.boxes) for record in store.values()] == [0, 3, 1] == store.box_counts().tolist()
    assert (store.source, store.settings, store.version, store.num_boxes) == ("by hand", {"k": [1, "two", None]}, 1, 4)
    with pytest.raises(KeyError, match=r"no proposals for image 'c' .it has 3 images, such as 'a', 'b', 'é'"):
        _ = store["c"]
    with pytest.raises(TypeError, match="image ids are text, such as '139'; got 139"):
        _ = 139 in store


def test_equal_scores_keep_their_order(tmp_path):
    boxes = [[i, 0, i + 1, 1] for i in range(50)]
    store = write_store(tmp_path / "s.safetensors", {"a": (boxes, [0.5] * 50)}, source="s")
    assert store["a"].boxes.tolist() == boxes


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(names, images(), max_size=5), st.randoms())
def test_what_is_written_is_read_and_the_order_of_adding_changes_no_byte(tmp_path_factory, records, random):
    folder = tmp_path_factory.mktemp("stores")
    first = write_store(folder / "a.safetensors", records, source="s", settings={"b": 1, "a": 2})
    for name, (boxes, scores) in records.items():
        order = np.argsort(-scores, kind="stable")
        np.testing.assert_array_equal(first[name].boxes, boxes[order])
        np.testing.assert_array_equal(first[name].scores, scores[order])
    assert list(first) == sorted(records, key=lambda name: name.encode())
    first.verify()
    rows = [(name, *record) for name, record in records.items()]
    random.shuffle(rows)
    second = write_store(folder / "b.safetensors", iter(rows), source="s", settings={"a": 2, "b": 1})
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first == second
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_the_hash_names_the_content(tmp_path, store):
    def hash_of(records, source="by hand", settings=None):
        return write_store(
            tmp_path / "o.safetensors", records, source, settings or {"k": [1, "two", None]}
        ).content_hash

    assert hash_of(RECORDS) == store.content_hash
    others = [
        hash_of({**RECORDS, "c": ([], [])}),
        hash_of({**RECORDS, "b": (BOXES, [0.1, 0.9, 0.6])}),
        hash_of({**RECORDS, "b": ([[0, 0, 10, 21], *BOXES[1:]], [0.1, 0.9, 0.5])}),
        hash_of(RECORDS, source="other"),
        hash_of(RECORDS, settings={"k": 2}),
        hash_of([(name, *record, (50, 60)) for name, record in RECORDS.items()]),
    ]
    assert len({store.content_hash, *others}) == 7


def test_the_safetensors_library_reads_a_store(store):
    arrays = load_file(store.path)
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "offsets": ("int64", (4,)),
        "id_offsets": ("int64", (4,)),
        "extents": ("float32", (3, 4)),
        "sizes": ("int32", (3, 2)),
        "boxes": ("float32", (4, 4)),
        "scores": ("float32", (4,)),
        "id_bytes": ("uint8", (4,)),
    }
    np.testing.assert_array_equal(arrays["extents"][1], [0, 0, 30, 40])
    with safe_open(store.path, "numpy") as file:
        assert file.metadata()["content_hash"] == store.content_hash
        assert json.loads(file.metadata()["settings"]) == store.settings
    for name in ("offsets", "boxes", "scores", "sizes"):
        assert place(store.path, name) % 4 == 0


def test_an_empty_store(tmp_path):
    store = write_store(tmp_path / "s.safetensors", {}, source="s")
    assert list(store) == []
    assert "a" not in store
    store.verify()
    assert store.check([]) == []
    assert "no proposals for 1 of 1 images: 'a' (it has 0 images)" in store.check(["a"])[0]


@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        (
            [[0, 0, float("nan"), 1]],
            [1],
            r"image '7': box 0 is \[0.0, 0.0, nan, 1.0\] \(x1, y1, x2, y2\): expected finite",
        ),
        ([[0, 0, 1, 1], [0, 0, float("inf"), 1]], [1, 1], r"box 1 is \[0.0, 0.0, inf, 1.0\].*finite"),
        ([[0, 0, 1e39, 1]], [1], r"box 0 is .*1e\+39.*finite"),
        ([[5, 0, 4, 1]], [1], r"box 0 is \[5.0, 0.0, 4.0, 1.0\].*x2 is less than x1"),
        ([[0, 3, 4, 1]], [1], "y2 is less than y1"),
        ([[0, 0, 1, 1]], [float("nan")], "box 0 has the score nan"),
        ([[0, 0, 1, 1]], [1, 2], r"1 boxes need scores of shape \[1\], got shape \[2\]"),
        ([[0, 0, 1]], [1], r"boxes must be \[P, 4\], got shape \[1, 3\]"),
        ([0, 0, 1, 1], [1], r"boxes must be \[P, 4\], got shape \[4\]"),
        ([[0, 0, 1, 1], [0, 0]], [1, 1], "boxes are no regular array"),
        ([["a", "b", "c", "d"]], [1], "boxes must be numbers"),
        (None, [1], "boxes must be numbers"),
        ([[True, True, True, True]], [1], "boxes must be numbers"),
        ([[0, 0, 1, 1]], ["x"], "scores must be numbers"),
    ],
)
def test_bad_boxes_are_refused_with_image_box_and_value(tmp_path, boxes, scores, message):
    with ProposalWriter(tmp_path / "s.safetensors", "s", {}) as writer:
        with pytest.raises(DataError, match=message) as error:
            writer.add("7", boxes, scores)
        assert str(error.value).startswith(f"{tmp_path / 's.safetensors'}: image '7'")
        assert "\n" not in str(error.value)
        writer.add("7", [[0, 0, 1, 1]], [1])  # the faulty one was not added
    assert len(ProposalStore(tmp_path / "s.safetensors")) == 1


def test_bad_ids_sizes_and_descriptions_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    with ProposalWriter(path, "s", {}) as writer:
        writer.add("7", [], [])
        for image_id, message in [
            ("7", "'7': added twice"),
            (7, "must be text"),
            ("", "not empty"),
            ("\ud800", "text"),
        ]:
            with pytest.raises(DataError, match=message):
                writer.add(image_id, [], [])
        for size in [(0, 5), (5,), (2.5, 3), (2**31, 1)]:
            with pytest.raises(DataError, match="size must be height and width"):
                writer.add("8", [], [], size)
        with pytest.raises(DataError, match="reaches beyond its image of height 10, width 20"):
            writer.add("8", [[0, 0, 10, 20]], [1], (10, 20))
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.add("9", [], [])
    for source, settings_, name, message in [
        ("", {}, path, "source must name"),
        ("s", {1: 2}, path, "settings must be a dict with text keys"),
        ("s", {"a": float("nan")}, path, "settings must be a dict that JSON can hold"),
        ("s", {"a": path}, path, "settings must be a dict that JSON can hold"),
        ("s", [], path, "settings must be a dict"),
        ("s", {}, tmp_path / "s.npz", "must end in .safetensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            ProposalWriter(name, source, settings_)


def test_nothing_is_written_after_an_exception_and_what_was_there_stays(tmp_path, store):
    before = store.path.read_bytes()
    with pytest.raises(DataError, match="twice"):
        write_store(store.path, [("a", [], []), ("a", [], [])], source="s")
    assert store.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [store.path.name]


def test_closing_twice_writes_once(tmp_path):
    writer = ProposalWriter(tmp_path / "s.safetensors", "s", {})
    writer.add("a", BOXES, [1, 2, 3])
    writer.close()
    writer.close()
    assert len(ProposalStore(tmp_path / "s.safetensors")["a"].boxes) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="kills a process and looks for what it left")
def test_a_killed_writer_leaves_nothing(tmp_path):
    program = (
        "import os, sys; from detpipe.proposal_files.store import ProposalWriter\n"
        "w = ProposalWriter(sys.argv[1], 's', {}); w.add('a', [[0, 0, 1, 1]] * 10000, [1] * 10000)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "s.safetensors")], timeout=60, check=False)
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_a_store_travels_to_other_processes(tmp_path, store):
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert copy["b"].boxes.tolist() == store["b"].boxes.tolist()
    assert len(pickle.dumps(store)) < 500
    sent = pickle.dumps(store)
    write_store(store.path, {"other": ([], [])}, source="s")
    assert len(store["b"].boxes) == 3  # what was opened stays as it was
    with pytest.raises(DataError, match="replaced by another store"):
        pickle.loads(sent)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_store_works_in_forked_processes(store):
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of threads; the child starts none and leaves at once
        child = os.fork()
    if child == 0:
        os.write(write, store["b"].boxes.tobytes())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(read, 1000) == store["b"].boxes.tobytes()
    os.close(read)
    os.close(write)


def test_a_truncated_store_is_refused_at_every_length(tmp_path, store):
    content = store.path.read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(
            DataError, match=r"cut\.safetensors: (cut off: it has|not a proposal store|damaged)"
        ) as error:
            ProposalStore(path)
        assert "\n" not in str(error.value)
    path.write_bytes(content[:-3])
    with pytest.raises(DataError, match=f"cut off: it has {len(content) - 3} bytes of {len(content)}; copy or write"):
        ProposalStore(path)
    path.write_bytes(content + b"more")
    with pytest.raises(DataError, match=r"damaged: it has .* bytes, 4 more than its header says"):
        ProposalStore(path)


def test_foreign_files_are_refused(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "f.safetensors"
    with pytest.raises(DataError, match="no such file"):
        ProposalStore(path)
    with pytest.raises(DataError, match="is a folder"):
        ProposalStore(tmp_path)
    for content in [b"", b"hello", b"\x80\x04" + b"x" * 100, b"PK\x03\x04" * 30, bytes(100)]:
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=r"not a proposal store: it does not start like a safetensors file.*convert"
        ):
            ProposalStore(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(DataError, match=r"safetensors file of another kind .format None, arrays: weight"):
        ProposalStore(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, "store of version 2, but this program reads versions up to 1: update detpipe"),
        ({"version": "x"}, r"Expected `str` .*version"),
        ({"format": "other"}, "of another kind .format 'other'"),
        ({"settings": "{1"}, r"metadata cannot be read \(JSON is malformed"),
        ({"settings": "[1]"}, r"metadata cannot be read \(Expected `object`, got `array`"),
        ({"source": None}, r"metadata cannot be read \(Expected `str`, got `null` - at `\$\.source`"),
        ({"content_hash": "12"}, r"Expected `str` matching .* at `\$\.content_hash`"),
    ],
)
def test_bad_metadata_is_named(store, change, message):
    header, arrays = parts(store.path)
    header["__metadata__"].update(change)
    rewrite(store.path, header, arrays)
    with pytest.raises(DataError, match=message):
        ProposalStore(store.path)


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("scores", None, "the array 'scores' is missing"),
        ("boxes", {"dtype": "F64", "shape": [2, 4]}, r"the array 'boxes' is F64 \[2, 4\], expected F32 \[2, 4\]"),
        ("scores", {"shape": [5]}, r"'scores' is F32 \[5\], expected F32 \[4\]"),
        ("offsets", {"data_offsets": [0, 8]}, "'offsets' is I64"),
        ("offsets", {"data_offsets": [-8, 24]}, "entry of the array 'offsets' cannot be read"),
        ("offsets", {"shape": "x"}, "entry of the array 'offsets' cannot be read"),
    ],
)
def test_bad_arrays_are_named(store, name, entry, message):
    header, arrays = parts(store.path)
    if entry is None:
        del header[name]
    else:
        header[name].update(entry)
    rewrite(store.path, header, arrays)
    with pytest.raises(DataError, match=message):
        ProposalStore(store.path)


def test_arrays_that_are_not_known_are_ignored(store):
    header, arrays = parts(store.path)
    header["later"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(arrays), len(arrays) + 4]}
    rewrite(store.path, header, arrays + b"abcd")
    ProposalStore(store.path).verify()


def test_a_damaged_index_is_found(store):
    first = place(store.path, "offsets")
    overwrite(store.path, first + 8, struct.pack("<q", 10**12))
    with pytest.raises(DataError, match="damaged: the boxes of image 'a' lie outside"):
        _ = ProposalStore(store.path)["a"]
    overwrite(store.path, first, struct.pack("<q", 3))
    with pytest.raises(DataError, match="damaged: its index does not fit"):
        ProposalStore(store.path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("boxes", struct.pack("<f", -7.0), r"image 'b': its extent .* is not that of its boxes"),
        ("boxes", struct.pack("<f", float("nan")), "image 'b' has boxes that are not finite"),
        ("scores", struct.pack("<f", 0.01), "image 'b' has boxes that are .*not in order"),
        ("scores", struct.pack("<f", 0.91), "its content has the hash"),
        ("sizes", struct.pack("<ii", 5, 5), "its content has the hash"),
        ("id_bytes", b"b", "the image id 'b' .entry 1. is twice"),
        ("id_bytes", b"c", "the image id 'b' .entry 1. is out of order"),
        ("id_bytes", b"A", "its content has the hash"),
        ("id_bytes", b"\x80", r"the image id '.*' .entry 1. is out of order"),
        ("id_bytes", b"a\x80", r"an image id is not UTF-8 text \(b'.x80'\)"),
    ],
)
def test_verify_finds_any_change(store, name, content, message):
    overwrite(store.path, place(store.path, name), content)
    with pytest.raises(DataError, match=f"damaged: {message}"):
        ProposalStore(store.path).verify()


def test_an_id_that_is_no_text_is_damage_wherever_it_is_met(store):
    overwrite(store.path, place(store.path, "id_bytes"), b"a\x80")
    damaged = ProposalStore(store.path)
    assert len(damaged["a"].boxes) == 0
    for read in (lambda: list(damaged), lambda: damaged["x"], lambda: damaged.check(["x"])):
        with pytest.raises(DataError, match=r"damaged: an image id is not UTF-8 text \(b'.x80'\)"):
            read()


def test_check_names_what_is_missing(tmp_path):
    store = write_store(tmp_path / "s.safetensors", {f"{i:06}": ([], []) for i in range(3)}, source="s")
    assert store.check(["000001", "000000"]) == []
    [line] = store.check([f"{i:06}" for i in range(1, 12)])
    assert "no proposals for 9 of 11 images: the first are '000003', '000004', '000005', '000006', '000007' (it" in line
    assert "it has 3 images, such as '000000', '000001', '000002'); is the store of another data set or split?" in line
    [line] = store.check(["2", "1"])
    assert "the store names images otherwise ('000002' for '2'): convert again with --images" in line
    with pytest.raises(TypeError, match="image ids are text"):
        store.check([2])
    with pytest.raises(ValueError, match=r"sizes must be \[1, 2\]"):
        store.check(["000001"], [(3, 4), (5, 6)])


def test_check_finds_other_frames(tmp_path):
    records = [("a", [[0, 0, 30, 10]], [1]), ("b", [[0, 0, 5, 5], [0, 0, 40, 15]], [1, 2], (20, 40))]
    store = write_store(tmp_path / "s.safetensors", records, source="s")
    assert store.size("a") is None
    assert store.size("b") == (20, 40)
    assert store.num_sizes() == 1
    assert store.check(["b", "a"], [(20, 40), (10, 30)]) == []
    [line] = store.check(["a"], [(30, 10)])
    assert "1 of 1 images" in line
    assert "'a' (box 0 is [0.0, 0.0, 30.0, 10.0], the image 30 x 10)" in line
    assert "with x and y swapped all would lie inside" in line
    [other, outside] = store.check(["b", "a"], [(10, 20), (10, 30)])
    assert "'b' (20 x 40, the data has 10 x 20); make the proposals from these images" in other
    assert "'b' (box 0 is [0.0, 0.0, 40.0, 15.0], the image 10 x 20); are they of other images or of resized" in outside
    assert len(store.check(["a", "z"], [(5, 5), (5, 5)])) == 2


def test_check_allows_a_pixel_beyond_the_image(tmp_path):
    store = write_store(tmp_path / "s.safetensors", {"a": ([[-1, -1, 31, 11]], [1])}, source="s")
    assert store.check(["a"], [(10, 30)]) == []
    assert len(store.check(["a"], [(10, 29)])) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_neither_writing_nor_reading_holds_the_boxes_in_memory(tmp_path):
    program = """
import sys
import warnings
from pathlib import Path
import numpy as np
from detpipe.proposal_files.store import ProposalStore, ProposalWriter
def memory(key):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) / 1024
scores = np.linspace(1, 0, 20000, dtype=np.float32)
boxes = np.zeros((20000, 4), dtype=np.float32) + [1, 2, 3, 4]
before = memory("RssAnon")
with ProposalWriter(sys.argv[1], "s", {}) as writer:
    for i in range(200):
        writer.add(f"{i:06}", boxes, scores)
print(memory("RssAnon") - before)
before, mapped = memory("RssAnon"), memory("RssFile")
store = ProposalStore(sys.argv[1])
print(memory("RssAnon") - before, memory("RssFile") - mapped)
for name in store:
    store[name]
print(memory("RssAnon") - before)
"""
    path = tmp_path / "s.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, timeout=120
    )
    written, opened, mapped, read = map(float, done.stdout.split())
    assert path.stat().st_size > 75 * 2**20
    assert written < 20
    assert opened < 2
    assert mapped < 8  # the pages that opening has touched, and what the system reads around them
    assert read < 5
