from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import yaml

import detpipe
from detpipe import cli
from detpipe.commands import training
from detpipe.commands.training import RegionCLI
from detpipe.datasets import DetectionData
from detpipe.demo.dataset import Demo
from detpipe.support.errors import DetpipeError, UsageError
from detpipe.training import config_errors, configuration
from detpipe.training.configuration import CLI, positional_configs
from detpipe.training.trainer import build_trainer


def parse(*arguments: str) -> Any:
    return runs.Parsed([runs.CONFIG, *arguments], training.add_arguments).config


def build(root: Path, *arguments: str) -> CLI:
    return CLI([runs.CONFIG, *runs.demo(root), *arguments], training.add_arguments)


def refusal(arguments: list[str], kind: type[CLI] = runs.Parsed) -> str:
    with pytest.raises(UsageError) as caught:
        kind(arguments, training.add_arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 400
    assert not {"jsonargparse", "Namespace", "Subtypes", "<class", "NestedArg"} & set(message.replace("(", " ").split())
    return message


def overlay(folder: Path, text: str) -> str:
    path = folder / "overlay.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


MISSPELT = [
    ("model.backbone.init_args.variant.reducton", 4, "model.backbone.variant.reducton", "reduction"),
    ("model.backbone.variant.reducton", 4, "model.backbone.variant.reducton", "reduction"),
    ("model.backbonne.init_args.depth", 18, "model.backbonne", "backbone"),
    ("model.optimizer.lrr", 0.1, "model.optimizer.lrr", "lr"),
    ("model.optimiser.lr", 0.1, "model.optimiser", "optimizer"),
    ("model.min_sizee", 3, "model.min_sizee", "min_size"),
    ("model.head.init_args.pooler.init_args.output_sise", 3, "model.head.pooler.output_sise", "output_size"),
    ("model.head.init_args.sampler.rois_per_imag", 3, "model.head.sampler.rois_per_imag", "rois_per_image"),
    ("data.init_args.rooot", "x", "data.rooot", "root"),
    ("data.init_args.loader.bach_size", 3, "data.loader.bach_size", "batch_size"),
    ("data.init_args.scenes.trainn", 3, "data.scenes.trainn", "train"),
    ("trainer.max_epoch", 1, "trainer.max_epoch", "max_epochs"),
    ("trianer.max_epochs", 1, "trianer", "trainer"),
    ("outptu", "x", "outptu", "output"),
]


@pytest.mark.parametrize(("key", "value", "named", "meant"), MISSPELT)
def test_a_misspelt_key_on_the_command_line(key, value, named, meant):
    option = [f"--{key}={value}"] if key.endswith("lrr") else [f"--{key}", str(value)]
    message = refusal([runs.CONFIG, *option])
    assert message.startswith(f"{named}: unknown key; did you mean '{meant}'")


@pytest.mark.parametrize(("key", "value", "named", "meant"), MISSPELT)
def test_a_misspelt_key_in_a_file(key, value, named, meant, tmp_path):
    content: Any = value
    for part in reversed(key.split(".")):
        content = {part: content}
    message = refusal([runs.CONFIG, overlay(tmp_path, yaml.safe_dump(content))])
    assert message.startswith(f"{named}: unknown key; did you mean '{meant}'")


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        (
            "model.backbone",
            "SEResNett",
            "model.backbone: unknown class 'SEResNett'; did you mean 'SEResNet' or 'SEResNeXt'?",
        ),
        ("model.proposals", "DenseGrd", "model.proposals: unknown class 'DenseGrd'; did you mean 'DenseGrid'?"),
        (
            "model.head.init_args.pooler",
            "RoiAlign",
            "model.head.pooler: unknown class 'RoiAlign'; did you mean 'RoIAlign'?",
        ),
        ("data", "COCOO", "data: unknown class 'COCOO'; did you mean 'COCO'?"),
        (
            "model.backbone",
            "detpipe.backbones.SEResNett",
            "model.backbone: class 'detpipe.backbones.SEResNett' is not one of detpipe's; did you mean 'SEResNet' or "
            "'SEResNeXt'?",
        ),
    ],
)
def test_an_unknown_class(key, name, message, tmp_path):
    content: Any = {"class_path": name}
    for part in reversed(key.split(".")):
        content = {part: content}
    assert refusal([runs.CONFIG, overlay(tmp_path, yaml.safe_dump(content))]) == message
    assert refusal([runs.CONFIG, f"--{key}", name]) == message


def test_a_class_of_another_kind_lists_the_right_ones(tmp_path):
    message = refusal([runs.CONFIG, overlay(tmp_path, "model: {backbone: {class_path: DenseGrid}}")])
    assert message.startswith("model.backbone: unknown class 'DenseGrid'; expected ")
    backbones = {"Extractor", "FPN", "SEInceptionV3", "SEResNeXt", "SEResNet", "SKNet", "ViTPyramid"}
    end = ", or the full path of a class"
    assert message.endswith(end)
    listed = message.rpartition("; expected ")[2].removesuffix(end).split(", ")
    assert listed == sorted(listed)
    assert backbones == set(listed) & set(detpipe.__all__)  # backbones of other tests may be listed too


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.backbone.depth", "abc", "model.backbone.depth: expected a whole number, got abc"),
        ("model.min_size", "1.5", "model.min_size: expected a whole number, got 1.5"),
        ("model.optimizer.lr", "fast", "model.optimizer.lr: expected a number, got fast"),
        (
            "model.optimizer.name",
            "adam",
            "model.optimizer.name: expected 'sgd' or 'adamw', got adam; did you mean 'adamw'?",
        ),
        (
            "model.backbone.regime.norm",
            "Frozen",
            "model.backbone.regime.norm: expected 'batch' or 'frozen' or 'sync' or 'group', got Frozen; did you mean 'frozen'?",
        ),
        ("trainer.max_epochs", "many", "trainer.max_epochs: expected a whole number or null, got many"),
        ("data.loader.batch_size", "x", "data.loader.batch_size: expected a whole number, got x"),
        ("data.layout", "vocc", "data.layout: expected 'coco' or 'voc', got vocc; did you mean 'voc'?"),
        ("data.loader", "3", "data.loader: expected keys with values, got '3'"),
        ("model.optimizer", "3", "model.optimizer: expected keys with values, got '3'"),
        ("seed_everything", "x", "seed_everything: expected true or false or a whole number, got x"),
    ],
)
def test_a_value_of_the_wrong_type(key, value, message):
    assert refusal([runs.CONFIG, f"--{key}", value]) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {optimizer: 3}", "model.optimizer: expected keys with values, got 3"),
        ("model: {backbone: {init_args: {depth: abc}}}", "model.backbone.depth: expected a whole number, got abc"),
        ("model: {backbone: null}", "model.backbone: missing; give it in a configuration file or as an option"),
        ("data: 3", "data: expected keys with values, got 3"),
        ("trainer: 3", "trainer: expected keys with values, got 3"),
        ("model:", "model: expected keys with values, got None"),
        ("data: {init_args: }", "data.init_args: expected keys with values, got None"),
        (
            "trainer: {callbacks: [{class_path: 3}]}",
            "trainer.callbacks.class_path: expected the name of a class, got 3",
        ),
    ],
)
def test_a_wrong_type_in_a_file(text, message, tmp_path):
    path = overlay(tmp_path, text)
    assert refusal([runs.CONFIG, path]) == message
    if "missing" not in message:  # options that follow would take its place
        assert refusal([runs.CONFIG, path, "--trainer.max_epochs", "1", "--model.optimizer.lr", "1"]) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.backbone.depth", "18"], "model.backbone: expected class_path (and init_args) of a Backbone"),
        ([runs.CONFIG, "--init_from", ""], "--init_from is empty; give a value, or leave it out"),
        (
            [runs.CONFIG, "--seed_everything", "-1"],
            "seed_everything: -1 is not in bounds, numpy accepts from 0 to 4294967295",
        ),
        ([runs.CONFIG, "-c", "nowhere.yaml"], "configuration nowhere.yaml does not exist"),
        (
            ["--model.head.help", "FastRCNHead"],
            "--model.head.help: unknown class 'FastRCNHead'; did you mean 'FastRCNNHead'?",
        ),
    ],
)
def test_options_that_stand_for_nothing(arguments, message):
    assert refusal(arguments) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {optimizer: {lr: null}}", "model.optimizer.lr: null is no value for it; leave it out for 0.001"),
        ("model: {backbone: {init_args: {depth: null}}}", "depth: null is no value for it; leave it out for 50"),
        ("model: {head: {init_args: {sampler: null}}}", "sampler: expected keys with values, got None"),
        ("data: {init_args: {loader: []}}", "loader: expected keys with values, got []"),
        ("data: {init_args: {root: null}}", "root: null is no value for it; leave it out for 'data/demo'"),
    ],
)
def test_null_for_a_setting_that_needs_a_value(text, message, demo_root, tmp_path):
    more = [] if "root" in text else ["--data.root", str(demo_root)]
    assert refusal([runs.CONFIG, overlay(tmp_path, text), *more, "--data.scenes", str(runs.SCENES)], CLI) == message


def test_what_is_no_class_to_name_is_not_offered(tmp_path):
    message = refusal([runs.CONFIG, "--trainer.logger", "nothing"])
    known = "CSVLogger, CometLogger, MLFlowLogger, TensorBoardLogger, WandbLogger"
    assert message == f"trainer.logger: unknown class 'nothing'; expected {known}, or the full path of a class"
    message = refusal([runs.CONFIG, overlay(tmp_path, "config: other.yaml")])
    assert message.endswith("config: give other configurations on the command line, before this one")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.backbone.depth", "19"], "depth must be one of [18, 26, 34, 50, 101, 152], got 19"),
        (["--model.min_size", "-1"], "expected 0 < min_size <= max_size, got min_size=-1, max_size=160"),
        (["--model.head.sampler.rois_per_image", "0"], "rois_per_image must be at least 1, got 0"),
        (["--data.loader.batch_size", "0"], "loader.batch_size must be at least 1, got 0"),
        (["--data.augment.flip", "2"], "flip must be in 0..1, got 2.0"),
        (["--data.scenes.size", "20"], "scenes.size: must be 64 to 1024 pixels, got 20"),
    ],
)
def test_what_a_constructor_refuses_is_an_error_of_the_configuration(options, message, demo_root):
    told = refusal([runs.CONFIG, *runs.demo(demo_root), *options], CLI)
    assert told.replace("scenes.size must", "scenes.size: must") == message


@pytest.mark.parametrize(
    ("options", "start"),
    [
        (["--trainer.accelerator", "gpuu"], "trainer: "),
        (["--trainer.gradient_clip_algorithm", "x"], "trainer: "),
        (["--trainer.max_epochs", "-5"], "trainer: "),
        (
            ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp_spawn"],
            "trainer.strategy: 2 processes under DDPStrategy; give 'ddp'",
        ),
    ],
)
def test_what_the_trainer_refuses_is_an_error_of_the_configuration(options, start, demo_root):
    cli = build(demo_root, *options)
    with pytest.raises(UsageError) as caught:
        build_trainer(cli.trainer_settings)
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {min_size: 3}", "model.backbone: missing, and so are model.proposals, model.head, data; give it in"),
        (
            "model: {backbone: SEResNet, proposals: DenseGrid, head: FastRCNNHead}",
            "data: missing; give it in a configuration file or as an option",
        ),
        (
            "model: {backbone: SEResNet, proposals: DenseGrid, head: FastRCNNHead}\ndata: {class_path: VOC}",
            "data.root: missing; give it in a configuration file or as an option",
        ),
        (
            "model: {backbone: Extractor, proposals: DenseGrid, head: FastRCNNHead}\ndata: Demo",
            "model.backbone.network: missing, and so is levels; give it in a configuration file or as an option",
        ),
    ],
)
def test_a_missing_key(text, message, tmp_path):
    assert refusal([overlay(tmp_path, text)]).startswith(message)


def test_no_configuration_at_all_names_what_is_missing():
    assert refusal([]).startswith("model.backbone: missing, and so are model.proposals, model.head, data; give it in")


def test_the_custom_overlays_ask_for_their_root():
    for name in ("voc_custom", "coco_custom"):
        message = refusal([runs.CONFIG, str(runs.CONFIGS / "data" / f"{name}.yaml")])
        assert message == "data.root: missing; give it in a configuration file or as an option"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stray"], "unexpected argument 'stray'; options start with --"),
        (["b.yaml"], "configuration b.yaml stands after an option; give the configurations first, then the options"),
    ],
)
def test_an_argument_after_the_options(arguments, message):
    assert refusal([runs.CONFIG, "--model.min_size", "100", *arguments]) == message


def test_an_option_without_a_value():
    assert refusal([runs.CONFIG, "--model.min_size"]) == "model.min_size: the option needs a value after it"


def test_numbers_in_scientific_notation(tmp_path):
    for text in ("1e-3", "1.0e-3", "1E-3"):
        assert parse(overlay(tmp_path, f"model: {{optimizer: {{lr: {text}}}}}")).model.optimizer.lr == 0.001
    assert parse("--model.optimizer.lr", "1e-3").model.optimizer.lr == 0.001


def test_row_46_a_key_given_twice_names_the_line(tmp_path):
    path = overlay(tmp_path, "model:\n  min_size: 64\n  max_size: 64\n  min_size: 80\n")
    assert refusal([runs.CONFIG, path]) == f"{path}, line 4: key 'min_size' is given twice; remove one"
    for option in (["--config", path], [f"--config={path}"]):
        assert refusal([runs.CONFIG, *option]) == f"{path}, line 4: key 'min_size' is given twice; remove one"
    inside_a_list = overlay(tmp_path, "trainer:\n  callbacks:\n  - {class_path: a, class_path: b}\n")
    assert "line 3: key 'class_path' is given twice" in refusal([inside_a_list])


def test_a_configuration_that_does_not_exist_has_near_names():
    message = refusal([runs.CONFIG.replace("_se.", "_see.")])
    assert message.startswith(
        f"configuration {runs.CONFIG.replace('_se.', '_see.')} does not exist; did you mean '{runs.CONFIG}'"
    )
    assert refusal(["--config", "nowhere.yaml"]) == "configuration nowhere.yaml does not exist"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", " is empty; expected keys such as model and data"),
        ("# nothing but a comment\n", " is empty; expected keys such as model and data"),
        ("- a\n- b\n", ": expected keys such as model and data, got ['a', 'b']"),
        ("just text", ": expected keys such as model and data, got 'just text'"),
    ],
)
def test_a_file_without_keys(text, part, tmp_path):
    path = overlay(tmp_path, text)
    assert refusal([runs.CONFIG, path]) == f"configuration {path}{part}"


def test_broken_yaml_names_file_and_line(tmp_path):
    path = overlay(tmp_path, "model:\n  min_size: [1,\n  }\n")
    message = refusal([runs.CONFIG, path])
    assert message.startswith(f"{path}: not valid YAML: ")
    assert "line 3" in message
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00model")
    assert "binary.yaml: not valid YAML: " in refusal([str(tmp_path / "binary.yaml")])
    assert refusal([str(tmp_path)]) == f"configuration {tmp_path} is a folder; expected a YAML file"


def test_a_tag_is_refused_and_runs_nothing(tmp_path):
    marker = tmp_path / "marker"
    path = overlay(tmp_path, f"model:\n  min_size: !!python/object/apply:os.mkdir ['{marker}']\n")
    message = refusal([runs.CONFIG, path])
    assert message == f"{path}, line 2: tags are not allowed, got tag:yaml.org,2002:python/object/apply:os.mkdir"
    assert not marker.exists()


def test_later_files_win_over_earlier_ones_and_options_over_both(tmp_path):
    path = overlay(tmp_path, "model: {min_size: 100, optimizer: {lr: 0.5}, backbone: {init_args: {depth: 34}}}")
    config = parse(path, "--model.optimizer.lr", "0.25")
    assert (config.model.min_size, config.model.max_size) == (100, 160)
    assert (config.model.optimizer.lr, config.model.optimizer.name) == (0.25, "adamw")
    assert (config.model.backbone.init_args.depth, config.model.backbone.init_args.out_channels) == (34, 128)
    assert parse(path, runs.CONFIG).model.backbone.init_args.depth == 18


def test_another_class_keeps_what_both_take(tmp_path):
    config = parse(overlay(tmp_path, "data: {class_path: VOC, init_args: {root: x}}"))
    assert config.data.class_path == "detpipe.VOC"
    assert config.data.init_args.loader.batch_size == 4
    assert "scenes" not in config.data.init_args


def test_short_names_and_full_paths_are_the_same_class():
    for name in ("SEResNet", "detpipe.SEResNet", "detpipe.backbones.SEResNet", "detpipe.backbones.se_resnet.SEResNet"):
        assert parse("--model.backbone", name).model.backbone.class_path.endswith(".SEResNet")


def test_linked_values_reach_the_head_and_the_data(demo_root):
    cli = build(
        demo_root,
        "--model.backbone.levels",
        "[c2, c3]",
        "--model.backbone.out_channels",
        "24",
        "--model.proposals.anchors.sizes",
        "[20, 28]",
        "--seed_everything",
        "5",
    )
    assert isinstance(cli.datamodule, Demo)
    assert (cli.model.head.num_classes, cli.datamodule.num_classes) == (10, 10)
    assert cli.model.head.strides == {"c2": 4, "c3": 8} == cli.model.backbone.strides
    assert cli.model.head.shared[1].in_features == 24 * 5 * 5
    assert cli.model.proposals.strides == cli.model.backbone.strides
    assert cli.model.proposals.head.convs[0].in_channels == 24
    assert cli.datamodule.seed == 5


@pytest.mark.parametrize(
    ("key", "source"),
    [
        ("model.head.init_args.num_classes", "the classes of the data"),
        ("model.head.in_channels", "model.backbone.out_channels"),
        ("model.head.init_args.strides", "the strides of the backbone"),
        ("model.proposals.in_channels", "model.backbone.out_channels"),
        ("model.proposals.init_args.strides", "the strides of the backbone"),
        ("data.seed", "seed_everything"),
    ],
)
def test_a_linked_value_that_would_be_lost_is_refused(key, source, tmp_path):
    short = key.replace(".init_args", "")
    message = refusal([runs.CONFIG, f"--{key}", "5"])
    assert message == f"command line: {short} follows {source}; remove it, a value would be lost"
    content: Any = 5
    for part in reversed(key.split(".")):
        content = {part: content}
    path = overlay(tmp_path, yaml.safe_dump(content))
    assert refusal([runs.CONFIG, path]).endswith(f"{short} follows {source}; remove it, a value would be lost")


def test_data_errors_of_the_constructor_keep_their_kind(tmp_path):
    arguments = [runs.CONFIG, "--data", "VOC", "--data.root", str(tmp_path / "nowhere")]
    with pytest.raises(DetpipeError, match="nowhere: no such folder") as caught:
        CLI(arguments, training.add_arguments)
    assert not isinstance(caught.value, UsageError)


def test_data_can_be_a_class_of_the_users_own(demo_root):
    cli = build(demo_root, "--data", f"{Demo.__module__}.{Demo.__qualname__}", *runs.demo(demo_root))
    assert isinstance(cli.datamodule, DetectionData)


def test_positional_configurations_become_options():
    assert positional_configs([runs.CONFIG, runs.CONFIG, "--a", "b"]) == [
        *("--config", runs.CONFIG),
        *("--config", runs.CONFIG),
        *("--a", "b"),
    ]


def test_an_explanation_is_short_whatever_comes():
    assert len(config_errors.explain("word " * 1000)) <= 600
    assert config_errors.explain("a\n  b\n") == "a b"
    assert config_errors.explain("") == ""


def test_the_seed_of_the_data():
    assert [configuration._as_seed(seed) for seed in (None, False, True, 3)] == [0, 0, 0, 3]


@pytest.mark.parametrize(("given", "meant"), [("1", 1), ("1.0", 1.0), ("0.5", 0.5), ("3", 3)])
def test_one_batch_is_not_all_of_them(given, meant, tmp_path):
    keys = ("limit_train_batches", "limit_val_batches", "overfit_batches", "val_check_interval")
    options = [f"--trainer.{key}={given}" for key in keys]
    for arguments in (options, [overlay(tmp_path, f"trainer: {{{', '.join(f'{key}: {given}' for key in keys)}}}")]):
        trainer = parse(*arguments).trainer
        assert [(trainer[key], type(trainer[key])) for key in keys] == [(meant, type(meant))] * 4


def test_data_that_resize_images_agree_with_the_detector(demo_root, tmp_path):
    resize = "{policy: shortest_side, min_size: [64, 96], max_size: 160}"
    path = overlay(tmp_path, f"data:\n  init_args:\n    resize: {resize}\n")
    told = refusal([runs.CONFIG, path, *runs.demo(demo_root)], CLI)
    assert told == (
        "data.init_args.resize brings images to min_size 96 and max_size 160 in evaluation, but model.min_size is 160 and "
        "model.max_size is 160; give both the same, or resize: null"
    )
    cli = CLI([runs.CONFIG, path, *runs.demo(demo_root), "--model.min_size", "96"], training.add_arguments)
    assert cli.datamodule.resize.sizes == (64, 96)
    assert build(demo_root).datamodule.resize is None
    square = ["--data.resize.policy", "letterbox", "--data.resize.min_size", "160"]
    assert build(demo_root, *square).datamodule.resize.detector_sizes == (160, 160)


def test_only_detectors_take_images_that_the_data_resized(demo_root):
    arguments = [str(runs.CONFIGS / "region_classifier.yaml"), *runs.demo(demo_root)]
    square = ["--data.resize", "{policy: letterbox, min_size: 160}"]
    told = refusal([*arguments, *square], RegionCLI)
    assert told == "data.init_args.resize: RegionClassifier resizes images itself; remove resize, or set it to null"
    RegionCLI(arguments, training.add_arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{policy: letterbox, min_size: 64, max_size: 96}", "resize.max_size must be left out for letterbox"),
        ("{min_size: 64}", "resize.max_size is missing"),
        ("{policy: stretch, min_size: 64, max_size: 96}", "data.resize"),
    ],
)
def test_wrong_settings_of_resize(options, message, demo_root):
    assert message in refusal([runs.CONFIG, *runs.demo(demo_root), "--data.resize", options], CLI)


def test_commands_run_where_the_output_is_no_file(monkeypatch):
    """As in a notebook."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli.main(["train", "nowhere.yaml"]) == 2
