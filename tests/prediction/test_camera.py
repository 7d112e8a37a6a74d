from __future__ import annotations

import collections
import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from detpipe import cli
from detpipe.prediction import camera
from detpipe.prediction.inputs import ImageInput, find_inputs
from detpipe.prediction.video import VideoEnd
from detpipe.support.errors import UsageError
from detpipe.types import RGB

PICTURES = 12


class _Stream(BaseHTTPRequestHandler):
    """A red square that moves to the right by 2 pixels a picture."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=next")
        self.end_headers()
        for step in range(PICTURES):
            image = np.full((48, 64, 3), 60, np.uint8)
            image[16:32, 2 * step : 2 * step + 16] = (0, 0, 255)
            data = cv2.imencode(".jpg", image)[1].tobytes()
            head = f"--next\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            self.wfile.write(head.encode() + data + b"\r\n")
            time.sleep(0.02)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Stream) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://user:secret@127.0.0.1:{server.server_port}/yard.mjpg"
        server.shutdown()


def test_a_camera_that_streams(address):
    [source] = find_inputs([address], allow_network=True)
    frames = []
    with pytest.raises(VideoEnd, match=r"http://127\.0\.0\.1:[0-9]+/yard\.mjpg: gives no picture after frame"):
        collections.deque(map(frames.append, camera.read_camera(source, every=3)))
    numbers, times = [frame.number for frame in frames], [frame.seconds for frame in frames]
    assert numbers[0] == times[0] == 0
    assert min(np.diff(numbers)) >= 3
    assert times == sorted(times)
    for frame in frames:
        red, green, _ = frame.image[:, 24, 2 * frame.number + 8].tolist()
        assert (red > 200, green < 60) == (True, True)


def test_who_is_slow_gets_the_newest_picture():
    pictures = [(True, np.full((1, 1, 3), value, np.uint8)) for value in range(5)]
    newest = camera._Newest(Mock(read=Mock(side_effect=[*pictures, (False, None)])))
    newest.follow()
    found = newest.after(1)
    assert found is not None
    assert (found[0], found[2].max()) == (4, 4)
    assert newest.after(5) is None


def test_detections_of_a_camera_are_written_picture_by_picture(address, trained, tmp_path, capsys):
    pytest.importorskip("av", reason="PyAV is not installed: pip install 'detpipe[video]'")
    command = [
        "predict",
        str(trained / "best.ckpt"),
        address,
        "--allow_network",
        "-o",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert cli.main(command) == 3
    assert "gives no picture after frame" in capsys.readouterr().err
    written = (tmp_path / "yard.jsonl").read_text()
    head, *lines = [json.loads(line) for line in written.splitlines()]
    assert "secret" not in written
    assert head["file"].endswith("/yard.mjpg")
    assert {line["width"] for line in lines} == {64}
    assert (tmp_path / "yard.mp4").stat().st_size > 0


@pytest.mark.parametrize(
    ("names", "status", "message"),
    [
        (["camera:9876"], 1, "camera:9876: this camera cannot be opened; is it connected"),
        (
            ["rtsp://me:secret@localhost:1/x", "--allow_network"],
            1,
            "rtsp://localhost:1/x: this camera cannot be opened",
        ),
        (
            ["rtsp://me:secret@with@localhost:1/x?pwd=secret"],
            2,
            "rtsp://localhost:1/x: is on the network; add --allow_network",
        ),
        (["camera:0", "camera:1"], 2, "camera:0: a camera has no end, so nothing can come after it"),
        (["camera:0", "--rate", "5"], 2, "--rate is for images as the frames of a video"),
        (["camera:0", "--resume"], 2, "a video goes through one process"),
    ],
)
def test_mistakes_are_one_line(names, status, message, trained, tmp_path, capfd):
    assert cli.main(["predict", str(trained / "best.ckpt"), *names, "-o", str(tmp_path / "out")]) == status
    shown = capfd.readouterr().err
    assert len(shown.splitlines()) == 1
    assert message in shown
    assert "secret" not in shown


def test_a_camera_is_no_image():
    with pytest.raises(UsageError, match=r"camera:0: a camera is watched by detpipe predict alone"):
        ImageInput("camera:0", Path("camera-0"), url="camera:0").read(RGB)


def test_nobody_waits_for_a_camera_that_failed():
    newest = camera._Newest(Mock(read=Mock(side_effect=RuntimeError)))
    with pytest.raises(RuntimeError):
        newest.follow()
    assert newest.after(0) is None
