"""The command line and YAML of training and evaluation: LightningCLI over jsonargparse, with short errors.

A class path is the registry: ``class_path: SEResNet`` works for every stage of this package, and a full path for classes
elsewhere. Files are merged from left to right, options on the command line win.
"""

from __future__ import annotations

import enum
import io
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, get_args

import jsonargparse
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from detpipe import backbones, demo, heads, proposals
from detpipe.datasets import DetectionData
from detpipe.detector import TwoStageDetector
from detpipe.support.errors import DetpipeError, UsageError
from detpipe.support.processes import is_first
from detpipe.support.strict_json import shorten
from detpipe.support.strict_yaml import load_yaml
from detpipe.support.suggest import did_you_mean
from detpipe.training.allowed import only_allowed
from detpipe.training.config_errors import explain
from detpipe.training.saving import CheckpointSettings
from detpipe.training.trainer import DEFAULTS
from detpipe.types import RGB

yaml.SafeDumper.add_multi_representer(
    enum.Enum, lambda dumper, value: dumper.represent_data(value.value)
)  # as of Timer
STAGES = (backbones, demo, heads, proposals)  # short names work for classes that are imported


LINKED = {  # what is not given, but follows something else
    "model.head.num_classes": "the classes of the data",
    "model.head.in_channels": "model.backbone.out_channels",
    "model.head.strides": "the strides of the backbone",
    "model.proposals.in_channels": "model.backbone.out_channels",
    "model.proposals.strides": "the strides of the backbone",
    "model.proposals.pixel_format": "model.backbone.pixel_format",
    "model.num_classes": "the classes of the data",
    "data.seed": "seed_everything",
}


SECTIONS = ("model", "data", "trainer", "checkpoint", "model.optimizer", "model.lr_scheduler")
# options of a training that its config.yaml does not repeat
ONE_RUN = ("output", "ckpt_path", "accept_changes", "init_from")


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, with a suggestion where a name is misspelt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})  # or --trainer.max_epoch would pass for max_epochs

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Turn a parser's error into a `UsageError`."""
        raise UsageError(explain(message, self)) from ex

    def parse_args(self, args: Sequence[str], *more: Any, **settings: Any) -> jsonargparse.Namespace:  # pyright: ignore
        """Parse; no class is imported that is not allowed, and no file is read but those of ``--config``."""
        with only_allowed():
            config = super().parse_args(_with_contents(args), *more, **settings)
        self._check(config)
        return config

    def instantiate(self, *config: Any, **settings: Any) -> jsonargparse.Namespace:
        """Build what is allowed, of settings that have values; jsonargparse calls it for each class within."""
        self._check(config[0])
        with only_allowed():
            return super().instantiate(*config, **settings)

    def _check(self, config: jsonargparse.Namespace) -> None:
        """Refuse null, or no keys, for a setting that needs others: jsonargparse takes null for a value of any type."""
        groups = [str(group.dest) for group in self._action_groups if hasattr(group, "instantiate_class")]
        for key in ("trainer", *groups):
            value = config.get(key, config)
            if not isinstance(value, jsonargparse.Namespace):
                raise UsageError(f"{key}: expected keys with values, got {shorten(value)}")
        for action in self._actions:
            kind = getattr(action, "_typehint", None)
            takes_null = kind in (None, Any) or type(None) in get_args(kind)
            if config.get(action.dest, 0) is None and action.default is not None and not takes_null:
                raise UsageError(f"{action.dest}: null is no value for it; leave it out for {action.default!r}")


class CommandCLI(LightningCLI, ABC):
    """Build the model and the data of a configuration, and what its trainer is made of.

    Args:
        arguments: configuration files and options.
        add_arguments: adds the options of one command to the parser.
    """

    model_type: ClassVar[type]  # of the model, which is built with the keys under ``model``
    model_is_named: ClassVar[bool] = False  # or ``model`` names a subclass, by ``class_path`` and ``init_args``
    data_type: ClassVar[type]  # of which ``data`` names a subclass

    def __init__(self, arguments: Sequence[str], add_arguments: Callable[[LightningArgumentParser], None]) -> None:
        self._command_arguments = add_arguments
        options = positional_configs(arguments)
        self.name = Path(options[1]).stem if options[:1] == ["--config"] else "detector"
        super().__init__(
            self.model_type,
            self.data_type,
            run=False,
            args=options,
            subclass_mode_model=self.model_is_named,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults=DEFAULTS,
            parser_class=Parser,
        )

    @abstractmethod
    def link(self, parser: LightningArgumentParser) -> None:
        """Let the parts of the model follow each other and the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the parts that must agree follow each other."""
        self.link(parser)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_as_seed)
        _add_training_settings(parser)
        self._command_arguments(parser)
        _keep_whole_numbers(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse what would be lost without a word."""
        self.config = parser.parse_args(args)
        for key, value in vars(self.config).items():
            if value == "":
                raise UsageError(f"--{key} is empty; give a value, or leave it out")

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:  # outside of the range of numpy's
            raise UsageError(f"seed_everything: {error}") from error

    def instantiate_classes(self) -> None:
        """Build model and data; what their constructors refuse, or does not fit together, is an error in the configuration."""
        try:
            self.follow_data()
            super().instantiate_classes()
            self.check_sizes()
        except DetpipeError:
            raise
        except (ValueError, TypeError) as error:
            raise UsageError(explain(str(error))) from error

    def follow_data(self) -> None:
        """Let settings of the model follow those of the data that cannot be linked, for they lie at any depth."""

    def _dump_config(self) -> None:
        """What Lightning gives to ``save_hyperparameters``: as it does it, without parsing once more what has been parsed."""
        if not hasattr(self, "config_dump"):
            text = self.parser.dump(self.config, skip_link_targets=False, skip_unset=False, skip_validation=True)
            self.config_dump = yaml.safe_load(text)

    def check_sizes(self) -> None:
        """Refuse what only detectors know of: data that resize images, or give others than 8-bit RGB; a ValueError."""
        if getattr(self.datamodule, "resize", None) is not None:
            raise ValueError(
                f"data.init_args.resize: {type(self.model).__name__} resizes images itself; remove resize, or set it to null"
            )
        if (pixels := getattr(self.datamodule, "pixels", RGB)) != RGB:
            raise ValueError(
                f"data.init_args.channels and range: {type(self.model).__name__} takes 8-bit RGB alone, got {pixels}; leave "
                "them out"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Leave the trainer to :func:`detpipe.training.trainer.build_trainer`; its callbacks, loggers and plugins are built."""
        self.trainer_settings: dict[str, Any] = dict(self.config_init["trainer"])
        return None

    def reusable(self) -> str:
        """The configuration as text that trains the same model again, without what belongs to one run."""
        text = self.parser.dump(self.config, skip_link_targets=True, skip_unset=False, skip_validation=True)
        settings = yaml.safe_load(text)
        return yaml.safe_dump({k: v for k, v in settings.items() if k not in ONE_RUN}, sort_keys=False)


class CLI(CommandCLI):
    """A detector and its data."""

    model_type = TwoStageDetector
    data_type = DetectionData

    def link(self, parser: LightningArgumentParser) -> None:
        """The head follows the classes of the data, and head and proposals what the backbone declares."""
        parser.add_argument(
            "--published",
            type=str | None,
            default=None,
            help="begin with the weights of this name of 'detpipe zoo'; configurations after the one that says it leave sizes of "
            "images and anchors as these weights have them",
        )
        parser.link_arguments("data.num_classes", "model.head.init_args.num_classes", apply_on="instantiate")
        link_stages(parser)

    def follow_data(self) -> None:
        """Give a backbone, or the one below a pyramid, the channels of the images; a ValueError if it is told another number."""
        channels = self.config.data.get("init_args", {}).get("channels", 3)
        settings = self.config.model.backbone.get("init_args") or {}
        while isinstance(settings.get("backbone"), jsonargparse.Namespace):
            settings = settings["backbone"].get("init_args") or {}
        if "in_channels" not in settings:
            return
        if settings["in_channels"] not in (3, channels):
            raise ValueError(
                f"model.backbone.in_channels is {settings['in_channels']}, but data.init_args.channels is {channels}; remove "
                "in_channels, which follows the data"
            )
        settings["in_channels"] = channels

    def check_sizes(self) -> None:
        """Refuse data of other channels than the backbone, or resized to another size than by the detector; a ValueError."""
        taken = self.model.backbone.pixel_format.channels
        if taken != self.datamodule.channels:
            raise ValueError(
                f"data.init_args.channels is {self.datamodule.channels}, but {type(self.model.backbone).__name__} takes images of "
                f"{taken} channels; give it an argument in_channels, or set channels to {taken}"
            )
        if self.datamodule.resize is not None:
            self.datamodule.resize.check_detector(self.model.min_size, self.model.max_size, self.model.resize)


def link_stages(parser: jsonargparse.ArgumentParser) -> None:
    """Give the head, and a proposal source that asks for them, what the backbone declares of its levels and its pixels."""
    for stage, strides in (("head", "roi_strides"), ("proposals", "strides")):
        for source, target in (("out_channels", "in_channels"), (strides, "strides")):
            parser.link_arguments(
                f"model.backbone.{source}", f"model.{stage}.init_args.{target}", apply_on="instantiate"
            )
    parser.link_arguments(
        "model.backbone.pixel_format", "model.proposals.init_args.pixel_format", apply_on="instantiate"
    )


def positional_configs(arguments: Sequence[str]) -> list[str]:
    """Write leading file names as ``--config`` options, and check every configuration file, as of :func:`check_file`.

    Example:
        >>> positional_configs(["--print_config"])
        ['--print_config']
    """
    rest = list(arguments)
    options: list[str] = []
    while rest and not rest[0].startswith("-"):
        options += ["--config", rest.pop(0)]
    options += ["--config" if option == "-c" else option for option in rest]
    for option, value in zip(options, [*options[1:], ""], strict=False):
        name, equals, joined = option.partition("=")
        if name == "--config":
            check_file(Path(joined if equals else value))
        elif name.startswith("--"):
            _refuse_linked(name.removeprefix("--"), "command line")
    return options


def check_file(path: Path) -> None:
    """Refuse a configuration file that is missing, no YAML or empty, gives a key twice, has a tag, or gives what is linked."""
    if not path.exists() or path.is_dir():
        near = did_you_mean(str(path), [str(other) for other in path.parent.glob("*.yaml")])
        problem = "is a folder; expected a YAML file" if path.is_dir() else "does not exist"
        raise UsageError(f"configuration {path} {problem}{near}")
    content = load_yaml(path, UsageError, _refuse_linked)
    if content is None:
        raise UsageError(f"configuration {path} is empty; expected keys such as model and data")
    if not isinstance(content, dict):
        raise UsageError(f"configuration {path}: expected keys such as model and data, got {shorten(content)}")
    if "config" in content:
        raise UsageError(
            f"configuration {path}: config: give other configurations on the command line, before this one"
        )
    _check_parts(content)


def _check_parts(content: dict[str, Any], at: str = "") -> None:
    """Refuse what has no keys where there must be some: an option that follows it would take its place without a word."""
    for name, value in content.items():
        key = f"{at}{name}"
        if key in SECTIONS or name == "init_args":
            expected, kinds = "keys with values", (dict, str) if key in ("data", "model") else dict
        elif name == "class_path":
            expected, kinds = "the name of a class", str
        else:
            expected, kinds = "", object
        if not isinstance(value, kinds):
            raise UsageError(f"{key}: expected {expected}, got {shorten(value)}")
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                _check_parts(part, f"{key}.")


def _with_contents(arguments: Sequence[str]) -> list[str]:
    """Put the text of each configuration in the place of its name."""
    given, rest = [], iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name == "--config":
            argument = f"--config={Path(value if equals else next(rest, '')).read_text(encoding='utf-8-sig')}"
        given.append(argument)
    return _kept_as_published(given)


def _kept_as_published(arguments: list[str]) -> list[str]:
    """Leave out of configurations what published weights, which one before them names, were trained with: sizes and anchors."""
    name, kept, dropped = None, [], []
    for argument in arguments:
        option, equals, text = argument.partition("=")
        content: Any = jsonargparse.get_loader("yaml")(text) if option == "--config" and equals else None
        model = content.get("model") if isinstance(content, dict) else None
        if name is not None and isinstance(model, dict):
            source = model.get("proposals")
            anew = isinstance(source, dict) and "class_path" in source
            found = [
                key
                for key in ("proposals", "min_size", "max_size")
                if key in model and not (anew and key == "proposals")
            ]
            if found:
                left = {key: value for key, value in model.items() if key not in found}
                argument = f"--config={yaml.safe_dump({**content, 'model': left})}"
            dropped += [key for key in found if key not in dropped]
        elif isinstance(content, dict):
            name = content.get("published", name)
        kept.append(argument)
    if dropped:
        print(
            f"note: {', '.join(dropped)} stay as {name} has them; options of the command line change them",
            file=sys.stderr,
        )
    return kept


def _refuse_linked(key: str, where: str) -> None:
    key = key.replace(".init_args.", ".")
    if key in LINKED:
        raise UsageError(f"{where}: {key} follows {LINKED[key]}; remove it, a value would be lost")


def quiet() -> None:
    """Keep Lightning's advice and banners from the terminal; warnings of this package stay.

    Of several processes only the first prints what it does; errors of the others are still seen.
    """
    import logging
    import warnings

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|jsonargparse)\b")
    if is_first():
        if isinstance(sys.stdout, io.TextIOWrapper):  # that of a notebook is none, and waits for no full buffer
            sys.stdout.reconfigure(line_buffering=True)
    else:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)


def _add_training_settings(parser: LightningArgumentParser) -> None:
    """What every command reads, so that the ``config.yaml`` of a training serves it, and trainings use."""
    parser.add_argument(
        "--ema",
        type=float | None,
        default=None,
        help="average the weights with this decay, such as .999; validation, best.ckpt and prediction use the average",
    )
    parser.add_argument(
        "--early_stopping",
        type=int | None,
        default=None,
        help="end training when so many epochs have brought no better validation",
    )
    parser.add_class_arguments(CheckpointSettings, "checkpoint")


def _keep_whole_numbers(parser: LightningArgumentParser) -> None:
    """Where a whole number and a fraction mean different things (1 batch, all batches), read 1 as the former, 1.0 as the latter."""
    for action in parser._actions:
        kinds = set(get_args(getattr(action, "_typehint", None)))
        if action.dest.startswith("trainer.") and {int, float} <= kinds <= {int, float, type(None)}:
            action._typehint = int | float | None if type(None) in kinds else int | float  # pyright: ignore


def _as_seed(seed: int | bool | None) -> int:
    if seed is None or seed is False or seed is True:
        return 0
    return int(seed)
