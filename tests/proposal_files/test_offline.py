import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from slow_source import Build, items, read

from detpipe.proposal_files.offline import Item, Made, make_store, open_journal
from detpipe.proposal_files.store import ProposalStore
from detpipe.support.errors import DataError

PROGRAM = Path(__file__).resolve().parents[1] / "slow_source.py"


def start(output, count=40, workers=1):
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(output), str(count), str(workers)], stderr=subprocess.PIPE
    )


def test_any_number_of_workers_makes_the_same_file(tmp_path):
    alone = make_store(Build(0), items(30), tmp_path / "one.safetensors", read)
    pool = make_store(Build(0), items(30)[::-1], tmp_path / "two.safetensors", read, workers=2)
    assert (alone.images, alone.made, pool.made) == (29, 29, 29)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    store = ProposalStore(tmp_path / "one.safetensors")
    boxes, scores = store["7"]
    assert len(boxes) == (4 * 5 * 3 * 7) % 5 == len(scores)
    assert store.size("7") == (4, 5)
    assert not list(tmp_path.glob("*.partial"))


def test_kills_leave_no_trace(tmp_path):
    make_store(Build(0), items(40), tmp_path / "whole.safetensors", read)
    output = tmp_path / "killed.safetensors"
    journal, sizes = output.with_name(output.name + ".partial"), [0]
    for _ in range(3):
        process = start(output)
        begun = time.monotonic()
        while process.poll() is None and (not journal.exists() or journal.stat().st_size <= sizes[-1]):
            assert time.monotonic() - begun < 60
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert not output.exists()
        sizes.append(journal.stat().st_size)
    assert sizes == sorted(set(sizes))
    process = start(output)
    assert process.communicate()[1] == b""
    assert process.returncode == 0
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not journal.exists()


def journal_of_three(output, settings):
    with open_journal(output, "slow", settings) as journal:
        for number in range(3):
            journal.add(Made(str(number), (4, 5), np.ones((2, 4), np.float32), np.ones(2, np.float32)))
    return journal.path, journal.path.read_bytes()


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_record_that_was_cut_short_is_made_again(tmp_path, cut):
    output = tmp_path / "store.safetensors"
    path, data = journal_of_three(output, {"depth": 1})
    path.write_bytes(data[:-cut])
    with open_journal(output, "slow", {"depth": 1}) as journal:
        assert [made.image_id for made in journal.entries()] == ["0", "1"]
        journal.add(Made("2", (4, 5), np.ones((2, 4), np.float32), np.ones(2, np.float32)))
    assert journal.path.read_bytes() == data


def test_a_damaged_record_ends_the_journal(tmp_path):
    path, data = journal_of_three(tmp_path / "s.safetensors", {})
    path.write_bytes(data[:-70] + bytes([data[-70] ^ 1]) + data[-69:])  # in the second record
    with open_journal(tmp_path / "s.safetensors", "slow", {}) as journal:
        assert [made.image_id for made in journal.entries()] == ["0"]


def test_a_first_line_that_was_cut_short_is_written_again(tmp_path):
    with open_journal(tmp_path / "s.safetensors", "slow", {"a": 1}) as journal:
        data = journal.path.read_bytes()
    journal.path.write_bytes(data[:-5])
    with open_journal(tmp_path / "s.safetensors", "slow", {"a": 1}) as journal:
        assert journal.path.read_bytes() == data


def test_other_settings_do_not_go_on(tmp_path):
    with open_journal(tmp_path / "s.safetensors", "slow", {"depth": 2}) as journal:
        journal.add(Made("0", (4, 5), np.ones((2, 4), np.float32), np.ones(2, np.float32)))
    with pytest.raises(
        DataError, match=r's\.safetensors\.partial: an interrupted run left it with .*"depth": 2.*"depth": 1'
    ):
        make_store(Build(0), items(3), tmp_path / "s.safetensors", read)
    journal.path.write_bytes(b"something else\n")
    with pytest.raises(DataError, match="this is no journal"):
        make_store(Build(0), items(3), tmp_path / "s.safetensors", read)
    assert journal.path.read_bytes() == b"something else\n"


def test_other_images_do_not_go_on(tmp_path):
    with open_journal(tmp_path / "s.safetensors", "slow", {"depth": 1}) as journal:
        journal.add(Made("99", (4, 5), np.ones((2, 4), np.float32), np.ones(2, np.float32)))
    with pytest.raises(DataError, match="1 images that are not asked for, such as 99"):
        make_store(Build(0), items(3), tmp_path / "s.safetensors", read)


def test_two_runs_at_once_are_refused(tmp_path):
    with (
        open_journal(tmp_path / "s.safetensors", "slow", {}),
        pytest.raises(DataError, match="another process is writing"),
    ):
        open_journal(tmp_path / "s.safetensors", "slow", {})


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_image_stops_the_run_or_is_counted(tmp_path, workers):
    output, small = tmp_path / "s.safetensors", Item("13", Path("13.png"))
    with pytest.raises(DataError, match=r"13\.png: the image has 2 rows, too few to segment; \d+ images are kept in"):
        make_store(Build(0), [*items(5), small, *items(20)[5:]], output, read, workers)
    assert not output.exists()
    summary = make_store(Build(0), [*items(20), small], output, read, workers, on_bad="skip")
    assert summary.skipped == {"13": "the image has 2 rows, too few to segment"}
    store = ProposalStore(output)
    assert len(store) == summary.images == 20
    assert len(store["13"].boxes) == 0


def test_a_bad_image_is_told_again_by_the_run_that_goes_on(tmp_path):
    output, small = tmp_path / "s.safetensors", Item("13", Path("13.png"))

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_store(Build(0), [small, *items(5)], output, read, on_bad="skip", progress=stop)
    with pytest.raises(DataError, match=r"13\.png: the image has 2 rows, too few to segment; 2 images are kept"):
        make_store(Build(0), [small, *items(5)], output, read)
    summary = make_store(Build(0), [small, *items(5)], output, read, on_bad="skip")
    assert (list(summary.skipped), summary.images - summary.made) == (["13"], 2)
    assert [len(ProposalStore(output)), len(ProposalStore(output)["13"].boxes)] == [6, 0]


def test_boxes_that_no_store_holds_are_not_kept(tmp_path):
    class Diverged:
        name, settings = "slow", {"depth": 1}

        def propose(self, image):
            return np.ones((1, 4), np.float32), np.full(1, np.inf, np.float32)

    output = tmp_path / "s.safetensors"
    with pytest.raises(
        DataError, match=r"0\.png: slow: box 0 has the score inf: expected a finite number; 0 images are kept"
    ):
        make_store(Diverged, items(3), output, read)
    assert make_store(Build(0), items(3), output, read).made == 3


def test_two_images_of_one_id_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"images a/1\.png and b/1\.png have the same id '1'"):
        make_store(Build(0), [Item("1", Path("a/1.png")), Item("1", Path("b/1.png"))], tmp_path / "s.safetensors", read)


def test_a_file_whose_name_is_no_utf8_text_is_refused_before_boxes_are_made(tmp_path):
    named = Item("caf\udce9", Path("caf\udce9.png"))
    with pytest.raises(DataError, match=r"caf\udce9\.png: an image id must be text \(UTF-8\)"):
        make_store(Build(0), [*items(3), named], tmp_path / "s.safetensors", read)
    assert not list(tmp_path.iterdir())


def test_progress_counts_what_was_there_before(tmp_path):
    output, told = tmp_path / "s.safetensors", []
    with open_journal(output, "slow", {"depth": 1}) as journal:
        journal.add(Made("0", (4, 5), np.zeros((0, 4), np.float32), np.zeros(0, np.float32)))
    summary = make_store(Build(0), items(3), output, read, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert summary.made == 2
    assert len(ProposalStore(output)) == 3
