import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from detpipe.support.errors import DataError
from detpipe.support.files import atomic_folder, atomic_remove, atomic_write, remove_orphans, sole_writer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_writer(code: str, folder: Path) -> int:
    """Run code that prints a line in the middle of writing and then waits; kill it there, return its process id."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=10) == -signal.SIGKILL
    process.stdout.close()
    return process.pid


KILLED_FILE = """
    import sys, time
    from pathlib import Path
    from detpipe.support.files import atomic_write
    with atomic_write(Path(sys.argv[1]) / "model.ckpt") as temporary:
        temporary.write_bytes(b"half")
        print("writing", flush=True)
        time.sleep(60)
"""
KILLED_FOLDER = """
    import sys, time
    from pathlib import Path
    from detpipe.support.files import atomic_folder
    with atomic_folder(Path(sys.argv[1]) / "demo") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_bytes(b"half")
        print("writing", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("name", ["metrics.json", "\u00e9" * 125 + ".json"], ids=["short", "of 255 bytes"])
def test_write_replaces_the_old_file_only_at_the_end(name, tmp_path):
    path = tmp_path / name
    path.write_text("old")
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path
        assert not temporary.exists()
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == [name]


def test_write_synchronizes_file_before_and_folder_after_the_rename(tmp_path, monkeypatch):
    steps = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        steps.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve() == tmp_path.resolve() else "file")
        real_fsync(descriptor)

    def replace(source, target):
        steps.append("replace")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert steps == ["file", "replace", "folder"]


def test_write_makes_parent_folders(tmp_path):
    with atomic_write(tmp_path / "a" / "b" / "c.txt") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "a" / "b" / "c.txt").read_text() == "x"


def write_half(path, error):
    with atomic_write(path) as temporary:
        temporary.write_text("ha")
        raise error


def make_half(path):
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("x")
        raise RuntimeError


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_write_leaves_the_old_file_on_an_exception(tmp_path, error):
    path = tmp_path / "model.ckpt"
    path.write_text("old")
    with pytest.raises(error):
        write_half(path, error)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["model.ckpt"]


def test_write_without_content_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


def test_write_onto_a_folder_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert names(tmp_path) == ["a"]


def test_two_writers_in_one_process_do_not_share_a_temporary_file(tmp_path):
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1"  # the outer block ends last


def test_killed_write_leaves_the_old_file_and_an_orphan_that_is_removed(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_text("old")
    pid = killed_writer(KILLED_FILE, tmp_path)
    assert path.read_text() == "old"
    (orphan,) = (name for name in names(tmp_path) if name != "model.ckpt")
    assert f".partial-{pid}-" in orphan
    assert [removed.name for removed in remove_orphans(tmp_path)] == [orphan]
    assert names(tmp_path) == ["model.ckpt"]


def test_killed_folder_is_not_visible_and_is_removed(tmp_path):
    killed_writer(KILLED_FOLDER, tmp_path)
    assert not (tmp_path / "demo").exists()
    assert len(remove_orphans(tmp_path)) == 1
    assert names(tmp_path) == []


def test_orphans_of_running_processes_and_other_files_stay(tmp_path):
    (tmp_path / "outside").mkdir()
    keep = [
        f"a.ckpt.partial-{os.getppid()}-0123abcd",  # its writer runs
        "a.partial",
        "a.partial-12",
        "a.partial-12-0123abcd.txt",
        "notes.partial-x-0123abcd",
    ]
    folder = tmp_path / "run"
    folder.mkdir()
    for name in keep:
        (folder / name).write_text("x")
    dead = folder / "b.ckpt.partial-99999999999999999999-0123abcd"
    dead.write_text("x")
    own_number = folder / f"c.ckpt.partial-{os.getpid()}-0123abcd"
    own_number.write_text("x")
    link = folder / "d.partial-99999999999999999999-0123abcd"
    link.symlink_to(tmp_path / "outside")
    assert remove_orphans(folder) == [dead, own_number, link]
    assert names(folder) == sorted(keep)
    assert (tmp_path / "outside").is_dir()


def test_a_process_that_has_ended_but_was_not_waited_for_is_not_running(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read()  # until it has closed it, which is at its end
    process.stdout.close()
    orphan = tmp_path / f"a.json.partial-{process.pid}-00000000"
    orphan.touch()
    end = time.monotonic() + 30
    while not remove_orphans(tmp_path):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert process.wait(timeout=10) == 0  # only now
    assert names(tmp_path) == []


def test_the_sole_writer_removes_what_bears_the_number_of_a_running_process(tmp_path):
    (tmp_path / f"a.json.partial-{os.getppid()}-00000000").touch()
    assert remove_orphans(tmp_path) == []
    assert len(remove_orphans(tmp_path, sole_writer=True)) == 1


def test_missing_folder_has_no_orphans(tmp_path):
    assert remove_orphans(tmp_path / "nowhere") == []


def test_folder_appears_complete(tmp_path):
    with atomic_folder(tmp_path / "new" / "demo") as temporary:
        (temporary / "a").write_text("x")
        assert not (tmp_path / "new" / "demo").exists()
    assert names(tmp_path / "new") == ["demo"]
    assert (tmp_path / "new" / "demo" / "a").read_text() == "x"


def test_first_folder_wins(tmp_path):
    with atomic_folder(tmp_path / "demo") as slow:
        (slow / "a").write_text("slow")
        with atomic_folder(tmp_path / "demo") as fast:
            (fast / "a").write_text("fast")
    assert (tmp_path / "demo" / "a").read_text() == "fast"
    assert names(tmp_path) == ["demo"]


def test_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(NotADirectoryError), atomic_folder(tmp_path / "demo") as temporary:
        (temporary / "a").write_text("x")
    assert (tmp_path / "demo").read_text() == "mine"
    assert names(tmp_path) == ["demo"]


def test_folder_is_dropped_on_an_exception(tmp_path):
    with pytest.raises(RuntimeError):
        make_half(tmp_path / "demo")
    assert names(tmp_path) == []


def test_import_needs_no_torch():
    code = "import sys; import detpipe.support.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_folder_is_renamed_before_it_is_deleted(tmp_path, monkeypatch):
    (tmp_path / "demo" / "inner").mkdir(parents=True)
    seen = []

    def killed_here(path):
        seen.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr("detpipe.support.files.shutil.rmtree", killed_here)
    with pytest.raises(KeyboardInterrupt):
        atomic_remove(tmp_path / "demo")
    monkeypatch.undo()
    assert not (tmp_path / "demo").exists()
    assert remove_orphans(tmp_path) == seen
    assert names(tmp_path) == []


HOLD = """
import sys, time
from detpipe.support.errors import DataError
from detpipe.support.files import sole_writer
with sole_writer(sys.argv[1], DataError("busy")):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_writer_is_free_when_its_process_was_killed(tmp_path):
    busy = DataError("another one writes a")
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "a"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(DataError, match="another one writes a"), sole_writer(tmp_path / "a", busy):
            pass
        process.kill()
    with sole_writer(tmp_path / "a", busy):
        assert os.listdir(tmp_path) == ["a.lock"]
    assert os.listdir(tmp_path) == []


WITHOUT_FCNTL = """
import sys
sys.modules["fcntl"] = None
import detpipe.datasets
from detpipe.support.errors import DataError
from detpipe.support.files import sole_writer
for time in range(2):  # free again the second time
    with sole_writer(sys.argv[1], DataError("busy")):
        try:
            with sole_writer(sys.argv[1], DataError("busy")):
                print("both")
        except DataError as error:
            print(error)
"""


@pytest.mark.slow
def test_the_data_layer_works_without_fcntl(tmp_path):
    """As on Windows."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_FCNTL, tmp_path / "a"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "busy\nbusy\n", ended.stderr
    assert os.listdir(tmp_path) == []
