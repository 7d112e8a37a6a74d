"""Exported files: what they find, what they say about themselves, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from detpipe.exporting import files, onnx_graph, weights
from detpipe.exporting.files import Labels, ParityError, check_file, export
from detpipe.exporting.parity import sample_images
from detpipe.heads import Postprocess
from detpipe.prediction import onnx_detector
from detpipe.prediction.onnx_detector import FORMAT, OnnxDetector, by_image
from detpipe.roi_pooling import RoIAlign, RoIMaxPool
from detpipe.support.errors import UsageError
from export.detectors import detector

onnx = pytest.importorskip("onnx", reason="needs the extra export")
pytest.importorskip("onnxruntime", reason="needs the extra export")
NAMES = ["cat", "dog", "owl"]
OTHERS = ["plain torchvision", "glimpse", "fpn aod max", "boxes agnostic", "fpn glimpse"]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a cascade on two levels; read it, do not write to it."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    parity = export(detector("fpn cascade"), path, Labels(NAMES, [3, 5, 8], "RUN/best.ckpt", "MIT"), vectors=True)
    assert parity is not None
    assert parity.detections > 100
    return path


@pytest.mark.slow
def test_finds_what_the_detector_finds_in_other_sizes(written):
    sizes = ((2, (33, 150)), (1, (200, 90)), (1, (5, 3)), (1, (3, 700)))
    batches = [torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8) for count, size in sizes]
    parity = check_file(detector("fpn cascade"), OnnxDetector(written), batches)
    assert parity.faults == ()
    assert parity.images == 5


@pytest.mark.slow
def test_is_one_small_file_with_named_sizes(written):
    model = onnx.load(written, load_external_data=False)
    onnx.checker.check_model(model)
    assert [path.name for path in written.parent.iterdir()] == ["model.onnx"]
    assert not any(node.metadata_props for node in model.graph.node)
    [images] = model.graph.input
    assert [size.dim_param or size.dim_value for size in images.type.tensor_type.shape.dim] == [
        "batch",
        3,
        "height",
        "width",
    ]
    assert [value.name for value in model.graph.output] == ["boxes", "scores", "labels", "count", "vectors"]
    [pool] = {node.op_type for node in model.graph.node} & {"RoiAlign"}
    ratios = [
        [a.i for a in node.attribute if a.name == "sampling_ratio"] for node in model.graph.node if node.op_type == pool
    ]
    assert ratios == [[2]] * len(ratios)  # written, since some readers take another default


@pytest.mark.slow
def test_says_what_it_is(written):
    known = OnnxDetector(written).metadata
    assert (known["format"], known["class_names"], known["category_ids"]) == (FORMAT, NAMES, [3, 5, 8])
    assert (known["source"], known["license"]) == ("RUN/best.ckpt", "MIT")
    assert known["resize"] == {"min_size": 64, "max_size": 96, "rule": "detpipe"}
    assert known["thresholds"] == {"score": 0.2, "nms_iou": 0.5, "detections": 100}
    assert known["sha256"] == files.weights_hash(detector("fpn cascade"))


@pytest.mark.slow
def test_a_file_of_other_weights_is_not_compared(written):
    other = detector("fpn cascade")
    other.head.stages[0].classifier.bias.add_(1)
    with pytest.raises(UsageError, match="made of other weights than the detector given"):
        check_file(other, OnnxDetector(written), [])


@pytest.mark.slow
def test_a_file_that_differs_is_told_and_not_written(written, monkeypatch, tmp_path):
    wrong = onnx.load(written)
    weight = next(held for held in wrong.graph.initializer if held.name.endswith("regressor.weight"))
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 2, weight.name))
    monkeypatch.setattr(onnx_graph, "to_onnx", lambda program: wrong)
    with pytest.raises(ParityError, match=r"so it was not written \(20 images"):
        export(detector("fpn cascade"), tmp_path / "model.onnx", vectors=True)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["half", "int8"])
def test_smaller_files_find_nearly_the_same(how, written, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_graph, "to_onnx", lambda program: onnx.load(written))
    model = detector("fpn cascade")
    images = [image for batch in sample_images(model) for image in batch]
    chosen = {"half": True} if how == "half" else {"calibration": images}
    said: list[str] = []
    export(model.train(), tmp_path / "small.onnx", Labels(NAMES), check=False, say=said.append, **chosen)
    assert model.training
    assert not any("compar" in line for line in said)
    whole, small = OnnxDetector(written), OnnxDetector(tmp_path / "small.onnx")
    assert small.metadata["class_names"] == NAMES
    near = [abs(whole([one])[0]["scores"][0] - small([one])[0]["scores"][0]) for one in images]
    assert 0 < max(near) < 0.1
    nodes = onnx.load(tmp_path / "small.onnx").graph.node
    assert ("QuantizeLinear" in {node.op_type for node in nodes}) == (how == "int8")
    if how == "int8":  # but for what gives scores and boxes
        layers = {node.input[1] for node in nodes if node.op_type in ("Conv", "Gemm")}
        kept = sorted(name for name in layers if name.startswith("program.") and "Dequantize" not in name)
        stages = [f"program.head.stages.{stage}" for stage in range(3)]
        assert kept == [f"{stage}.{part}.weight" for stage in stages for part in ("classifier", "regressor")]


@pytest.mark.slow
def test_openvino_reads_the_file(written):
    openvino = pytest.importorskip("openvino", reason="needs openvino")
    compiled = openvino.Core().compile_model(str(written), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = torch.randint(0, 256, (1, 3, 50, 60), dtype=torch.uint8).numpy()  # shrunk images would not be smoothed
    values = compiled({"images": images})
    [found] = by_image(["boxes", "scores", "labels", "count"], [values[index] for index in range(4)])
    [expected] = OnnxDetector(written).run(images)
    assert len(expected["scores"]) > 10
    np.testing.assert_array_equal(found["labels"], expected["labels"])
    np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_every_head_and_source(kind, tmp_path):
    pooler = {"pooler": RoIMaxPool(4)} if "max" in kind else {}
    model = detector(kind, **pooler)
    parity = export(model, tmp_path / "model.onnx")
    assert parity is not None
    assert parity.detections > 100
    if "boxes" in kind:
        none = {"proposals": torch.zeros(0, 4)}
        [found] = OnnxDetector(tmp_path / "model.onnx")([torch.zeros(3, 50, 60, dtype=torch.uint8)], [none])
        assert len(found["scores"]) == 0


ALONE = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
for size in ((50, 70), (90, 64), (3, 200)):  # the last one gets one row of cells
    given = [torch.rand(1, 9, 4).cumsum(2) * 20] * ("boxes" in sys.argv[2])
    boxes, scores, labels, count = program(torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8), *given)
    print(boxes.shape[0], int(count.min()) > 0 or min(size) == 3)
assert not {"detpipe", "torchvision"} & {*sys.modules}
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fpn", "boxes"])
def test_a_pt2_file_runs_in_a_process_with_torch_alone(kind, tmp_path):
    path = tmp_path / "model.pt2"
    parity = export(detector(kind), path)
    assert parity is not None
    assert (parity.images, parity.detections > 100) == (20, True)  # at both thresholds
    command = [sys.executable, "-c", ALONE, str(path), kind]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.split() == ["1", "True"] * 3, done.stderr


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("model.pb", {}, "ends in .onnx or .pt2"),
        ("", {}, "ends in .onnx or .pt2"),
        ("model.pt2", {"half": True}, "16 and 8 bits are for .onnx files"),
        ("model.onnx", {"half": True, "calibration": [torch.zeros(3, 64, 64)]}, "not both"),
        ("model.onnx", {"labels": Labels(["cat"])}, "has 3 classes, and 1 names are given"),
        ("model.pt2", {"labels": Labels(NAMES, [1, 2])}, "has 3 classes, and 2 category ids are given"),
    ],
)
def test_what_is_wrong_is_told_before_minutes_of_work(name, more, message, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("minutes of work"))
    with pytest.raises(UsageError, match=message):
        export(detector(), tmp_path / name, **more)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_detector_of_another_type_is_written_in_float32(dtype, written, monkeypatch, tmp_path):
    def to_onnx(program):
        assert {parameter.dtype for parameter in program.parameters()} == {torch.float32}
        return onnx.load(written)

    monkeypatch.setattr(onnx_graph, "to_onnx", to_onnx)
    model = detector("fpn cascade").to(dtype)
    export(model, tmp_path / "model.onnx", check=False)
    assert OnnxDetector(tmp_path / "model.onnx").metadata["sha256"] == files.weights_hash(model)
    assert model.backbone.input_dtype == dtype


@pytest.mark.parametrize("pooler", [RoIMaxPool(4), RoIAlign(4, sampling_ratio=0)])
def test_poolers_that_torch_alone_does_not_have_are_named(pooler, tmp_path):
    with pytest.raises(UsageError, match=f"pooler {type(pooler).__name__}.* write an .onnx file"):
        export(detector(pooler=pooler), tmp_path / "model.pt2")


@pytest.mark.parametrize(
    ("kind", "candidates", "before", "message"),
    [
        (
            "boxes",
            20_000,
            60,
            "each of 20000 boxes with each other, .* lower postprocess.candidates_per_image to 12000",
        ),
        ("plain", 20_000, 20_000, "each of 20000 boxes with each other, .* lower selection.pre_nms_top_n to 12000"),
        ("plain", 20_000, 60, "minutes of work"),  # 40 proposals of 3 classes
    ],
)
def test_more_boxes_than_memory_can_compare_are_named(kind, candidates, before, message, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("minutes of work"))
    model = detector(kind, postprocess=Postprocess(candidates_per_image=candidates))
    if kind == "plain":
        model.proposals.selection = replace(model.proposals.selection, pre_nms_top_n=(before, before))
    with pytest.raises((UsageError, pytest.fail.Exception), match=message):
        export(model, tmp_path / "model.pt2")


def test_a_head_that_torch_alone_does_not_have_is_named(tmp_path):
    model = detector()
    model.head = torch.nn.Identity()
    with pytest.raises(UsageError, match="the head Identity cannot be written as a graph"):
        export(model, tmp_path / "model.pt2")


def test_layers_that_give_scores_and_boxes_keep_their_bits():
    names = [f"program.head.{layer}.weight" for layer in ("shared.1", "classifier", "regressor", "quality")]
    assert [weights._gives_results(name) for name in names] == [False, True, True, True]


def test_weights_that_16_bits_cannot_hold_stay_as_they_are():
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 64])
    large = onnx.numpy_helper.from_array(np.full((64, 64), 1e5, np.float32), "w")
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [value], [value], [large])
    model = onnx.helper.make_model(graph)
    weights.to_half(model)
    assert [held.name for held in model.graph.initializer] == ["w"]


def test_a_path_that_cannot_be_written_is_told_at_once(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(onnx_graph, "to_onnx", lambda program: pytest.fail("minutes of work"))
    with pytest.raises(OSError, match="file"):
        export(detector(), tmp_path / "file" / "model.onnx")


@pytest.mark.slow
def test_a_full_disk_leaves_the_file_that_was_there(written, monkeypatch, tmp_path):
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "model.onnx"
    path.write_text("before")
    monkeypatch.setattr(onnx_graph, "to_onnx", lambda program: onnx.load(written))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: .*model\.onnx"):
        export(detector("fpn cascade"), path, check=False)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("model.onnx", "before")]


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_detector, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(UsageError, match=r"the package onnxscript, which is not installed: .*detpipe\[export\]"):
        export(detector(), tmp_path / "model.onnx")


@pytest.mark.slow
def test_boxes_that_are_not_wanted_are_refused(written):
    with pytest.raises(ValueError, match=r"takes no boxes; got \[1, 2, 4\]"):
        OnnxDetector(written).run(np.zeros((1, 3, 64, 64), np.uint8), np.zeros((1, 2, 4), np.float32))
