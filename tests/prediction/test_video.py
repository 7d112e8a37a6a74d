from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="PyAV is not installed: pip install 'detpipe[video]'")

import av

from detpipe.prediction import ImageWindows
from detpipe.prediction.inputs import ImageInput
from detpipe.prediction.tracking import Tracker
from detpipe.prediction.video import Frame, VideoEnd, look_at_video, read_frames, read_video
from detpipe.support.errors import DataError
from detpipe.types import RGB, Detection

TIMES = [0, 40, 120, 160, 400, 440]  # milliseconds: a rate that changes


def picture(step: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A gray picture with a white square of 16 pixels that moves to the right by 4 a step."""
    image = np.full((*size, 3), 60, dtype=np.uint8)
    image[16:32, 4 * step : 4 * step + 16] = 255
    return image


def write_video(
    path: Path, times: Sequence[int] = TIMES, codec: str = "mpeg4", size: tuple[int, int] = (48, 64)
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = size
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        for step, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(step, size), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def bright(frames: Sequence[Frame]) -> list[Detection]:
    """What is white in each frame, as one box."""
    found = []
    for frame in frames:
        y, x = (frame.image[0] > 160).nonzero(as_tuple=True)
        boxes = torch.tensor([[x.min(), y.min(), x.max() + 1, y.max() + 1]]).float() if len(x) else torch.zeros(0, 4)
        labels = torch.ones(len(boxes), dtype=torch.int64)
        found.append(Detection(boxes=boxes, scores=torch.full((len(boxes),), 0.9), labels=labels))
    return found


def frames_of(inputs: Sequence[ImageInput], rate: float = 10, every: int = 1) -> Iterator[Frame]:
    return read_frames(inputs, rate, every, lambda one: ImageWindows(one.read(RGB)))


def look(
    frames: Any, folder: Path, batch_size: int = 1, tracker: Tracker | None = None
) -> tuple[str | None, list[Any]]:
    head, out = {"file": "x", "class_names": ["square"]}, folder / "found.jsonl"
    count, end = look_at_video(frames, bright, out, folder / "found.mp4", head, tracker, batch_size)
    first, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert (first, count) == (head, len(lines))
    return end, lines


@pytest.mark.parametrize("batch_size", [1, 4])
def test_frames_come_with_their_times_and_go_to_a_video(batch_size, tmp_path):
    end, lines = look(read_video(write_video(tmp_path / "in.mp4")), tmp_path, batch_size)
    assert end is None
    assert [line["frame"] for line in lines] == list(range(6))
    assert [line["seconds"] for line in lines] == pytest.approx([time / 1000 for time in TIMES], abs=2e-3)
    for step, line in enumerate(lines):
        [one] = line["detections"]
        assert one["label"] == "square"
        assert one["box"] == pytest.approx([4 * step, 16, 4 * step + 16, 32], abs=1)
    again = list(read_video(tmp_path / "found.mp4"))
    with av.open(str(tmp_path / "found.mp4")) as written:
        assert next(written.decode(video=0)).time == 0
    assert [frame.seconds for frame in again] == pytest.approx([line["seconds"] for line in lines], abs=2e-3)
    assert {frame.image.shape for frame in again} == {(3, 48, 64)}
    red, green, blue = (again[0].image[channel, 24, 0:1].float().mean() for channel in range(3))
    assert red > max(green, blue) + 20  # the box, in the color of the first class


def test_some_frames_and_pictures_of_odd_sizes(tmp_path):
    frames = read_video(write_video(tmp_path / "in.mp4"), every=4)
    assert [line["frame"] for line in look(frames, tmp_path)[1]] == [0, 4]
    inputs = []
    for step in range(3):
        path = tmp_path / f"{step}.npy"
        np.save(path, picture(step, (49, 65)))
        inputs.append(ImageInput(path.name, path))
    end, lines = look(frames_of(inputs, every=2), tmp_path)
    assert (end, [line["seconds"] for line in lines]) == (None, [0, 0.2])
    assert [tuple(frame.image.shape) for frame in read_video(tmp_path / "found.mp4")] == [(3, 50, 66)] * 2
    missing = [*inputs[:2], ImageInput("gone.png", tmp_path / "gone.png")]
    end, lines = look(frames_of(missing), tmp_path, batch_size=8)
    assert len(lines) == 2
    assert "gone.png: no such image file" in str(end)


def test_frames_of_several_sizes(tmp_path):
    """They are no video, which has all frames until then; lines alone are written, and batches are of one size."""
    inputs = []
    for step, size in enumerate([(48, 64), (48, 64), (32, 64)]):
        np.save(tmp_path / f"{step}.npy", picture(step, size))
        inputs.append(ImageInput(f"{step}.npy", tmp_path / f"{step}.npy"))
    with pytest.raises(
        DataError, match=r"found\.mp4: frame 2 has 64 x 32 pixels, the first has 64 x 48, .* add --no-drawings"
    ):
        look(frames_of(inputs), tmp_path, 4)
    written = (tmp_path / "found.jsonl").read_text().splitlines()[1:]
    assert len(list(read_video(tmp_path / "found.mp4"))) == len(written) == 2
    batches = []

    def seen(frames: Sequence[Frame]) -> list[Detection]:
        batches.append([frame.number for frame in frames])
        return bright(frames)

    head = {"file": "x", "class_names": ["square"]}
    assert look_at_video(frames_of(inputs), seen, tmp_path / "found.jsonl", None, head, None, 4) == (3, None)
    assert batches == [[0, 1], [2]]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_video_that_is_cut_off_keeps_what_was_found(suffix, tmp_path):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".mp4":
        write_video(tmp_path / "in.mp4", range(0, 4000, 40))
        with (
            av.open(str(tmp_path / "in.mp4")) as whole,
            av.open(str(path), "w", options={"movflags": "faststart"}) as out,
        ):
            stream = out.add_stream_from_template(whole.streams.video[0])
            for packet in whole.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
    else:  # as recorders write it, whose clock runs before they begin
        write_video(path, range(60_000, 64_000, 40))
    content = path.read_bytes()
    assert look(read_video(path), tmp_path)[0] is None
    path.write_bytes(content[: 2 * len(content) // 3])
    end, lines = look(read_video(path), tmp_path, batch_size=4)
    assert 0 < len(lines) < 100
    assert f"{path}: " in str(end)
    assert len(list(read_video(tmp_path / "found.mp4"))) == len(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read as a video \(No such file"),
        (b"", "cannot be read as a video"),
        (b"no video" * 99, "cannot be read as a video"),
        ("mp4", "is it damaged|cut off"),
    ],
)
def test_what_is_no_video(content, message, tmp_path):
    path = tmp_path / "in.mp4"
    if content == "mp4":  # without its index, which is at the end
        content = write_video(path).read_bytes()[:-200]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((DataError, VideoEnd), match=message) as caught:
        list(read_video(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sound_file_has_no_pictures(tmp_path):
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError, match=r"sound\.mkv: has no pictures"):
        list(read_video(tmp_path / "sound.mkv"))


def test_a_square_that_moves_is_one_track(tmp_path):
    pytest.importorskip("trackers", reason="trackers is not installed: pip install 'detpipe[track]'")
    path = write_video(tmp_path / "in.mp4", range(0, 400, 40))
    frames = [frame._replace(image=frame.image * (frame.number > 0)) for frame in read_video(path)]
    _, lines = look(iter(frames), tmp_path, 3, Tracker(25))
    assert lines[0]["detections"] == []
    tracks = [line["detections"][0]["track"] for line in lines[1:]]
    assert tracks[0] is None  # one that was seen once is not followed yet
    assert set(tracks[2:]) == {1}
