"""Nothing that a configuration or a checkpoint says runs code, is imported, is read or is fetched without being asked for."""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import runs
import torch
import yaml

from detpipe import cli
from detpipe.commands import training
from detpipe.support.errors import CheckpointError, UsageError
from detpipe.training import allowed, checkpoint
from detpipe.training.models import load_detector

EVIL = "evil_module_of_a_test"
HEAD = '''
from detpipe.heads import FastRCNNHead

class MyHead(FastRCNNHead):
    """A stranger's head."""

def make(*arguments, **settings):
    return MyHead(*arguments, **settings)
'''


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is there once the evil module was imported, or its function called."""
    path = tmp_path / "marker"
    (tmp_path / f"{EVIL}.py").write_text(f"open({str(path)!r}, 'w')\nX = run = print\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", _no_network)
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    return path


def _no_network(*arguments: Any, **settings: Any) -> None:
    raise AssertionError(f"asked the network for {arguments}")


def with_callback(name: str, **settings: Any) -> dict[str, Any]:
    return {"trainer": {"callbacks": [{"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": settings}]}}


def with_box_head(box_head: Any) -> dict[str, Any]:
    return {"class_path": "torchvision.models.detection.roi_heads.RoIHeads", "init_args": {"box_head": box_head}}


SYMPY = {
    "class_path": "sympy.Lambda",
    "init_args": {"signature": "x", "expr": "__import__('os').system('touch MARKER')"},
}
SPEC = {"class_path": f"{EVIL}.X"}
CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a callable that compiles text": (with_callback("LambdaCallback", on_fit_start=SYMPY), "is not one of detpipe's"),
    "a callable for an allowed callback": (
        with_callback("StochasticWeightAveraging", swa_lrs=0.1, avg_fn=SYMPY),
        "'sympy.Lambda' is not one of detpipe's",
    ),
    "a function": (with_callback("StochasticWeightAveraging", swa_lrs=0.1, avg_fn="os.system"), "is not allowed"),
    "a function of ours": (
        with_callback("StochasticWeightAveraging", swa_lrs=0.1, avg_fn="detpipe.support.files.atomic_remove"),
        "'detpipe.support.files.atomic_remove' is not one of detpipe's",
    ),
    "a method of an allowed class": (
        with_callback("StochasticWeightAveraging", swa_lrs=0.1, avg_fn="detpipe.RoIAlign.forward"),
        "'detpipe.roi_pooling.align.RoIAlign.forward' is not one of detpipe's",
    ),
    "through our modules": (with_callback("LambdaCallback", setup="detpipe.support.files.os.system"), "is not one of detpipe's"),
    "an evil callback": ({"trainer": {"callbacks": [SPEC]}}, f"'{EVIL}.X' is not one of detpipe's"),
    "a callback's keys": (
        {"trainer": {"callbacks": {"class_path": f"{EVIL}.X", "dict_kwargs": {"a": SPEC}}}},
        f"'{EVIL}.X' is not one of detpipe's",
    ),
    "a stage": ({"model": {"head": SPEC}}, f"model.head: class '{EVIL}.X' is not one of detpipe's"),
    "a stage as text": ({"model": {"head": f"{EVIL}.X"}}, f"model.head: class '{EVIL}.X' is not one of detpipe's"),
    "a stage as JSON in text": ({"model": {"head": json.dumps(SPEC)}}, f"'{EVIL}.X' is not one of detpipe's"),
    "inside of a stage": ({"model": {"head": {"init_args": {"pooler": SPEC}}}}, f"'{EVIL}.X' is not one of detpipe's"),
    "inside of a stage of torchvision": (
        {"model": {"head": with_box_head(SPEC)}},
        f"model.head.box_head: class '{EVIL}.X' is not one of detpipe's",
    ),
    "a function inside of a stage of torchvision": (
        {"model": {"head": with_box_head("torchvision.ops.nms")}},
        "model.head.box_head: class 'torchvision.ops.nms' is not one of detpipe's",
    ),
    "no module inside of a stage of torchvision": (
        {"model": {"head": with_box_head({"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}})}},
        "model.head.box_head: 'lightning.pytorch.loggers.CSVLogger' is not a Module",
    ),
    "settings": ({"model": {"optimizer": SPEC}}, f"'{EVIL}.X'"),
    "data": ({"data": f"{EVIL}.X"}, f"'{EVIL}.X' is not one of detpipe's"),
    "a logger": ({"trainer": {"logger": SPEC}}, f"'{EVIL}.X'"),
    "a strategy": ({"trainer": {"strategy": SPEC}}, f"'{EVIL}.X'"),
    "a plugin": ({"trainer": {"plugins": [SPEC]}}, f"'{EVIL}.X'"),
    "a profiler": ({"trainer": {"profiler": SPEC}}, f"'{EVIL}.X'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_row_45_a_configuration_imports_and_calls_nothing(case, tmp_path, marker):
    content, message = CONFIGURATIONS[case]
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump(content).replace("MARKER", str(marker)))
    with pytest.raises(UsageError) as caught:
        runs.Parsed([runs.CONFIG, str(path)], training.add_arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert EVIL not in sys.modules


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_commands_refuse_in_one_line(command, tmp_path, marker, demo_root, capsys):
    path = tmp_path / "overlay.yaml"
    path.write_text(yaml.safe_dump(CONFIGURATIONS["a callable that compiles text"][0]).replace("MARKER", str(marker)))
    more = ["--ckpt_path", "best.ckpt"] if command == "evaluate" else []
    assert cli.main([command, runs.CONFIG, str(path), *runs.demo(demo_root), *more]) == 2
    error = capsys.readouterr().err.strip()
    name = "lightning.pytorch.callbacks.LambdaCallback"
    assert error == (
        f"detpipe: error: trainer.callbacks: class '{name}' is not one of detpipe's; if you trust its code, give --trust "
        "lightning.pytorch.callbacks"
    )
    assert not marker.exists()


@pytest.mark.parametrize("name", ["nested.yaml", "pipe", "http://localhost:1/x.yaml", "file:///etc/hostname"])
@pytest.mark.parametrize("key", ["model.optimizer", "model.head", "data", "trainer.callbacks"])
def test_a_configuration_reads_no_other(key, name, tmp_path, marker, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nested.yaml").write_text("lr: 0.5\n")
    os.mkfifo("pipe")  # which would be waited for
    content: Any = name
    for part in reversed(key.split(".")):
        content = {part: content}
    Path("overlay.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match=key):
        runs.Parsed([runs.CONFIG, "overlay.yaml"], training.add_arguments)


def test_callbacks_with_data_for_arguments_are_allowed(tmp_path):
    names = {"EarlyStopping": {"monitor": "val/AP"}, "early_stopping.EarlyStopping": {"monitor": "val/AP"}}
    more = {"LearningRateMonitor": {}, "ModelCheckpoint": {"monitor": "val/AP"}, "RichProgressBar": {}, "Timer": {}}
    for name, settings in {**names, **more}.items():
        (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(with_callback(name, **settings)))
        [callback] = CLI_config(tmp_path / "overlay.yaml").trainer.callbacks
        assert callback.class_path.endswith(name.rpartition(".")[2])


def CLI_config(path: Path) -> Any:
    return runs.Parsed([runs.CONFIG, str(path)], training.add_arguments).config


def test_every_allowed_name_of_ours_is_a_class_and_no_function_is_allowed():
    paths, denied = allowed.policy()
    assert {"detpipe.SEResNet", "detpipe.backbones.SEResNet", "detpipe.backbones.se_resnet.SEResNet"} <= {*paths}
    assert {"detpipe.Augment", "detpipe.PixelFormat", "detpipe.datasets.shards.remote.ShardCache"} <= {*paths}
    assert all(path.rpartition(".")[2][0].isupper() for path in paths)
    assert not [path for path in paths if path.startswith(("detpipe.support.files", "detpipe.training", "detpipe.cli"))]
    assert not {"lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.Callback"} & {*paths}
    assert "detpipe.detector.TwoStageDetector.forward" in denied


def test_the_settings_of_other_parsers_come_back():
    from jsonargparse import _common, _optionals, get_loader

    before = (dict(_common.parsing_settings), _optionals._config_read_mode, get_loader("yaml"))
    with pytest.raises(ZeroDivisionError), allowed.only_allowed(["my_head"]):
        raise ZeroDivisionError
    assert (dict(_common.parsing_settings), _optionals._config_read_mode, get_loader("yaml")) == before


# --- checkpoints


def stored(trained: Path) -> dict[str, Any]:
    return torch.load(trained / "best.ckpt", weights_only=True)


def refusal(content: dict[str, Any], folder: Path, **settings: Any) -> str:
    path = folder / "other.ckpt"
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        load_detector(path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


Change = Callable[[dict[str, Any]], Any]
DESCRIPTIONS: dict[str, tuple[Change, str]] = {
    "text": (lambda model: model.update(backbone=f"{EVIL}.X"), f"class '{EVIL}.X' is not one of detpipe's"),
    "JSON in text": (lambda model: model.update(backbone=json.dumps(SPEC)), f"class '{EVIL}.X' is not one of detpipe's"),
    "YAML in text": (lambda model: model.update(backbone=yaml.safe_dump(SPEC)), f"'{EVIL}.X' is not one of detpipe's"),
    "keys": (lambda model: model.update(backbone=SPEC), f"class '{EVIL}.X' is not one of detpipe's"),
    "settings": (lambda model: model.update(optimizer=SPEC), EVIL),
    "deeper": (lambda model: model["head"]["init_args"].update(pooler=SPEC), f"'{EVIL}.X' is not one of detpipe's"),
    "in a list": (
        lambda model: model.update(proposals={"class_path": "detpipe.Union", "init_args": {"sources": [SPEC]}}),
        f"'{EVIL}.X' is not one of detpipe's",
    ),
    "dict_kwargs": (lambda model: model["head"].update(dict_kwargs={"x": SPEC}), "x"),
    "through our modules": (lambda model: model.update(backbone="detpipe.support.files.os.system"), "is not one of detpipe's"),
    "a method": (lambda model: model.update(backbone="detpipe.SEResNet.forward"), "is not one of detpipe's"),
    "another file": (lambda model: model.update(optimizer="nested.yaml"), "optimizer"),
    "another file for a stage": (lambda model: model.update(backbone="nested.yaml"), "nested.yaml"),
    "a pipe": (lambda model: model.update(optimizer="pipe"), "optimizer"),
    "an address": (lambda model: model.update(optimizer="http://localhost:1/x.yaml"), "optimizer"),
    "short names of strangers": (lambda model: model.update(head="Stranger"), "Stranger' is not one of detpipe's"),
    "names of networks of a hub": (
        lambda model: model.update(
            backbone={"class_path": "detpipe.Extractor", "init_args": {"network": "timm/hf-hub:a/b", "levels": ["c4"]}}
        ),
        "timm has no network 'hf-hub:a/b'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_description_imports_reads_and_fetches_nothing(case, trained, tmp_path, marker, monkeypatch):
    from detpipe.heads import FastRCNNHead

    stranger = ModuleType("stranger")  # imported, but not trusted
    stranger.Stranger = type("Stranger", (FastRCNNHead,), {"__module__": "stranger"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stranger", stranger)
    change, message = DESCRIPTIONS[case]
    monkeypatch.chdir(tmp_path)
    Path("nested.yaml").write_text("lr: 0.5\n")
    os.mkfifo("pipe")
    content = stored(trained)
    change(content[checkpoint.KEY]["model"])
    assert message in refusal(content, tmp_path)
    assert not marker.exists()
    assert EVIL not in sys.modules


@pytest.mark.parametrize("weights", ["DEFAULT", "timm/resnet18.a1_in1k", "pipe", {"source": "DEFAULT"}])
def test_pretrained_weights_of_a_description_are_not_looked_at(weights, trained, tmp_path, marker, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    content = stored(trained)
    content[checkpoint.KEY]["model"]["backbone"]["init_args"]["weights"] = weights
    torch.save(content, "other.ckpt")
    detector, _ = load_detector("other.ckpt")
    assert not detector.training


def test_a_refusal_says_how_to_trust(trained, tmp_path):
    content = stored(trained)
    content[checkpoint.KEY]["model"]["head"]["class_path"] = "my_head.MyHead"
    assert refusal(content, tmp_path).endswith(
        "model.head: class 'my_head.MyHead' is not one of detpipe's; if you trust its code, give --trust my_head, in Python "
        "trust=('my_head',)"
    )


# --- resuming

KEEP = "ModelCheckpoint{'monitor': 'val/AP'}"


def state(folder: Path, **changes: Any) -> dict[str, Any]:
    best, last = str(folder / "best.ckpt"), str(folder / "last.ckpt")
    paths = {"best_model_path": best, "kth_best_model_path": best, "last_model_path": last, "dirpath": str(folder)}
    return {"monitor": "val/AP", **paths, "best_k_models": {best: 0.5}, **changes}


@pytest.mark.parametrize(
    "change",
    [
        {"best_model_path": "/elsewhere/thesis.ckpt"},
        {"best_model_path": "RUN/../precious.ckpt"},
        {"last_model_path": "RUN/config.yaml"},
        {"kth_best_model_path": "elsewhere/best.ckpt"},
        {"best_k_models": {"RUN/best.ckpt": 0.5, "/tmp/precious.ckpt": 0.1}},
        {"best_model_path": ["a"]},
        {"dirpath": "/elsewhere"},
    ],
)
def test_states_of_callbacks_lose_paths_that_lead_elsewhere(change, tmp_path):
    told = json.loads(json.dumps(change).replace("RUN", str(tmp_path)))
    content = {"callbacks": {KEEP: state(tmp_path, **told), "Other": {"a": 1}}}
    checkpoint.drop_foreign_paths(content, tmp_path)
    empty = dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path", "dirpath"), "")
    assert content["callbacks"] == {KEEP: {"monitor": "val/AP", **empty, "best_k_models": {}}, "Other": {"a": 1}}


def test_states_of_callbacks_keep_their_own_paths(tmp_path):
    content = {"callbacks": {KEEP: state(tmp_path)}}
    checkpoint.drop_foreign_paths(content, tmp_path)
    assert content == {"callbacks": {KEEP: state(tmp_path)}}


@pytest.mark.slow
def test_resuming_deletes_nothing_that_a_checkpoint_names(demo_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.dirpath", "run/theirs"]
    theirs += [
        "--trainer.callbacks.monitor",
        "val/AP",
        "--trainer.callbacks.mode",
        "max",
        "--trainer.callbacks.save_last",
        "true",
    ]
    train = ["train", runs.CONFIG, *runs.options(demo_root, epochs=1), *theirs, "--output", "run"]
    assert cli.main(train) == 0
    Path("run/summary.json").unlink()
    precious = tmp_path / "precious.ckpt"
    precious.write_text("mine")
    content = torch.load("run/last.ckpt", weights_only=True)
    assert any(key.startswith("ModelCheckpoint") for key in content["callbacks"])
    named = f"{tmp_path / 'run'}/../precious.ckpt"  # below the folder of the run, as Lightning looks at it
    for key in content["callbacks"]:
        if key.startswith("ModelCheckpoint"):
            content["callbacks"][key] |= {
                "best_model_path": named,
                "kth_best_model_path": named,
                "last_model_path": named,
            }
            content["callbacks"][key] |= {"best_k_models": {named: torch.tensor(-1.0)}, "kth_value": torch.tensor(-1.0)}
            content["callbacks"][key] |= {"current_score": torch.tensor(-1.0), "best_model_score": torch.tensor(-1.0)}
    torch.save(content, "run/crafted.ckpt")
    train[train.index("--trainer.max_epochs") + 1] = "2"
    assert cli.main([*train, "--ckpt_path", "run/crafted.ckpt", "--accept_changes", "schedule"]) == 0
    assert precious.read_text() == "mine"


# --- trust


@pytest.mark.parametrize(
    "name", ["os", "subprocess", "builtins", "jsonargparse", "logging", "functools.partial", "sys"]
)
def test_what_runs_anything_cannot_be_trusted(name, trained, capsys):
    assert cli.main(["predict", "x.ckpt", "x.jpg", "-o", "out", "--trust", name]) == 2
    assert f"--trust {name}: refused, since {name} can run any code" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="can run any code"):
        load_detector(trained / "best.ckpt", trust=(name,))


@pytest.mark.parametrize("arguments", [["--trust", "my head", "train"], ["train", "--trust"], ["train", "--trust="]])
def test_a_name_to_trust_is_one(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "expected the name of a module" in capsys.readouterr().err


def test_trust_beside_no_command(capsys):
    assert [cli.main(["--trust", "a", *more]) for more in ([], ["--help"], ["--version"])] == [2, 0, 0]
    assert "--trust MODULE" in capsys.readouterr().out


@pytest.mark.slow
def test_trust_works_for_every_command(demo_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_head.py").write_text(HEAD)
    Path("own.yaml").write_text("model: {head: {class_path: my_head.MyHead}}\n")
    train = ["train", runs.CONFIG, "own.yaml", *runs.options(demo_root, epochs=1), "--output", "run"]
    assert cli.main(train) == 2
    assert "give --trust my_head" in capsys.readouterr().err
    assert "my_head" not in sys.modules
    path = list(sys.path)
    assert cli.main(["--trust", "my_head", *train]) == 0
    assert cli.main(["evaluate", "run/config.yaml", "--ckpt_path", "run/best.ckpt", "--trust=my_head"]) == 0
    image = str(next((demo_root / "coco" / "val").iterdir()))
    assert cli.main(["predict", "run/best.ckpt", image, "-o", "out"]) == 1
    assert "give --trust my_head" in capsys.readouterr().err
    assert cli.main(["predict", "--trust", "other", "run/best.ckpt", image, "-o", "out", "--trust", "my_head"]) == 0
    assert sys.path == path
    with pytest.raises(CheckpointError, match="if you trust its code"):
        load_detector("run/best.ckpt")
    detector, _ = load_detector("run/best.ckpt", trust=("my_head",))
    assert type(detector.head).__name__ == "MyHead"
    sys.modules.pop("my_head", None)


OWN_MODULE = """
from detpipe.heads import FastRCNNHead

class ShortNamedHead(FastRCNNHead):
    def __init__(self, in_channels, num_classes, strides, width=8):  # without types
        super().__init__(in_channels, num_classes, strides, fc=[width])
"""


def test_classes_of_trusted_modules_have_short_names_and_need_no_types(demo_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("short_named.py").write_text(OWN_MODULE)
    Path("own.yaml").write_text("model: {head: {class_path: ShortNamedHead, init_args: {width: 12}}}\n")
    own = [option for option in runs.options(demo_root, epochs=1) if "model.head" not in option]
    own = [option for option in own if option not in ("[16]", "16", "0.01")]
    assert cli.main(["train", runs.CONFIG, "own.yaml", *own, "--output", "run", "--trust", "short_named"]) == 0
    assert "class_path: short_named.ShortNamedHead" in Path("run/config.yaml").read_text()
    detector, _ = load_detector("run/best.ckpt", trust=("short_named",))
    assert detector.head.classifier.in_features == 12
    sys.modules.pop("short_named", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_package_of_a_test", "No module named 'no_such_package_of_a_test'"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero"),
        ("def x(:", "SyntaxError: "),
    ],
)
def test_what_is_wrong_with_a_trusted_module_is_told(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken_of_a_test.py").write_text(text)
    assert cli.main(["train", runs.CONFIG, "--trust", "broken_of_a_test"]) == 2
    assert f"--trust broken_of_a_test: its import failed: {message}" in capsys.readouterr().err


def test_short_names_of_lightning_are_the_paths_that_are_allowed():
    """A short name is resolved to another path than that of the class, such as that of a package which hands it on."""
    from jsonargparse._util import get_import_path

    given, _ = allowed.policy()
    for module, names in allowed._OTHERS.items():
        for name in names.split():
            assert get_import_path(getattr(importlib.import_module(module), name)) in given, name
