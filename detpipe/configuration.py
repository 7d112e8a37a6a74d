"""The command line and YAML of training and evaluation: LightningCLI over jsonargparse, with short errors.

A class path is the registry: ``class_path: SEResNet`` works for every stage of this package, and a full path for classes
elsewhere. Files are merged from left to right, options on the command line win.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import detpipe.backbones
import detpipe.datasets
import detpipe.heads
import detpipe.proposals
import detpipe.roi_pooling
from detpipe.checkpoint import link_stages
from detpipe.datasets import DetectionData
from detpipe.detector import TwoStageDetector
from detpipe.errors import DetpipeError, UsageError
from detpipe.suggest import did_you_mean

TRAINER_DEFAULTS = {
    "max_epochs": 10,
    "logger": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, with a suggestion where a key is misspelt."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Turn a parser's error into a `UsageError`."""
        raise UsageError(shorten(message, set(known_keys(self)))) from ex


class CLI(LightningCLI):
    """Build the model and the data of a configuration, and a trainer that training completes.

    Args:
        arguments: configuration files and options.
        add_arguments: adds the options of one command to the parser.
    """

    def __init__(self, arguments: Sequence[str], add_arguments: Callable[[LightningArgumentParser], None]) -> None:
        self._command_arguments = add_arguments
        super().__init__(
            TwoStageDetector,
            DetectionData,
            run=False,
            args=positional_configs(arguments),
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_class=Parser,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let the parts that must agree follow each other."""
        parser.link_arguments("data.num_classes", "model.head.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_as_seed)
        link_stages(parser)
        self._command_arguments(parser)

    def instantiate_classes(self) -> None:
        """Build model and data; what their constructors refuse is an error in the configuration."""
        try:
            super().instantiate_classes()
        except DetpipeError:
            raise
        except (ValueError, TypeError) as error:
            raise UsageError(str(error).strip()) from error

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Leave the trainer to :meth:`trainer_with`, when there is something to run."""
        return None

    def trainer_with(self, **kwargs: Any) -> Any:
        """Build the trainer of the configuration with some arguments added.

        Args:
            kwargs: of ``lightning.Trainer``; callbacks are added to those of the configuration.

        Returns:
            The trainer.
        """
        callbacks = kwargs.pop("callbacks", [])
        trainer = super().instantiate_trainer(**kwargs, callbacks=callbacks)
        return trainer


def positional_configs(arguments: Sequence[str]) -> list[str]:
    """Write leading file names as ``--config`` options, and check that they are there.

    Args:
        arguments: as on the command line, ``CONFIG.yaml [MORE.yaml ...] [--key.path value ...]``.

    Returns:
        Options only.

    Raises:
        UsageError: no configuration, a file that does not exist, or a duplicate key in one.

    Example:
        >>> positional_configs(["--print_config"])
        ['--print_config']
    """
    rest = list(arguments)
    options: list[str] = []
    while rest and not rest[0].startswith("-"):
        path = Path(rest.pop(0))
        if not path.is_file():
            near = did_you_mean(str(path), [str(other) for other in path.parent.glob("*.yaml")])
            raise UsageError(f"configuration {path} does not exist{near}")
        check_duplicate_keys(path)
        options += ["--config", str(path)]
    return options + rest


def check_duplicate_keys(path: Path) -> None:
    """Refuse a YAML file that gives one key twice, of which YAML keeps the last without a word.

    Args:
        path: of the file.

    Raises:
        UsageError: a key is given twice, or the file is no YAML; the line is named.
    """
    import yaml

    def visit(node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if key.value in seen:
                    raise UsageError(f"{path}, line {key.start_mark.line + 1}: key {key.value!r} is given twice")
                seen.add(key.value)
                visit(value)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                visit(value)

    try:
        with path.open(encoding="utf-8") as stream:
            root = yaml.compose(stream, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if root is not None:
        visit(root)


def known_keys(parser: jsonargparse.ArgumentParser) -> list[str]:
    """List the names that a configuration may use, those of the stages' arguments included."""
    names = {part for action in parser._actions for part in str(action.dest).split(".")}
    for package in (detpipe.backbones, detpipe.proposals, detpipe.heads, detpipe.datasets, detpipe.roi_pooling):
        for public in package.__all__:
            names.add(public)
            if inspect.isclass(getattr(package, public)):
                names |= set(inspect.signature(getattr(package, public)).parameters)
    return sorted(names - {"help"})


def shorten(message: str, known: set[str]) -> str:
    """Say what a parser's error means in one line.

    Args:
        message: of jsonargparse, often many lines.
        known: names that a configuration may use.

    Returns:
        One line.
    """
    text = " ".join(message.split())
    unknown = re.search(r"[Kk]ey '?\"?([\w.]+)'?\"? is not expected|Unrecognized arguments?: (?:--)?([\w.]+)", text)
    unknown = unknown or re.search(r"does not accept (?:nested )?(?:key|option) '?\"?([\w.]+)", text)
    if unknown:
        key = next(group for group in unknown.groups() if group)
        return f"unknown key {key!r}{did_you_mean(key.rpartition('.')[2], known)}"
    text = re.sub(r"^Validation failed: |^Parser key ", "", text)
    return text if len(text) <= 600 else f"{text[:600]} ..."


def quiet() -> None:
    """Keep Lightning's advice and banners from the terminal; warnings of this package stay."""
    import logging
    import warnings

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(lightning|torch|jsonargparse)\b")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _as_seed(seed: int | bool | None) -> int:
    if seed is None or seed is False or seed is True:
        return 0
    return int(seed)
