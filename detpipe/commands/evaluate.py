"""The ``evaluate`` command: mean average precision of a model on a data set, or of a file of detections."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from detpipe import evaluation
from detpipe.errors import UsageError
from detpipe.files import atomic_write


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see 'detpipe evaluate --help'")


def evaluate(arguments: Sequence[str]) -> int:
    """Print a table and write what is asked for.

    Args:
        arguments: of the command; with ``--detections`` a file is evaluated, else a model.

    Returns:
        The exit status.

    Raises:
        DetpipeError: what users can mend.
    """
    own = any(argument.split("=")[0] in ("--detections", "--annotations") for argument in arguments)
    if own or list(arguments) in ([], ["-h"]):
        return _evaluate_file(arguments)
    return _evaluate_model(arguments)


def _evaluate_file(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="detpipe evaluate",
        description="Evaluate a file of detections; for a model: detpipe evaluate CONFIG.yaml --ckpt_path CHECKPOINT.",
    )
    parser.add_argument("--detections", required=True, help="JSON in COCO's result format")
    parser.add_argument("--annotations", required=True, help="JSON in COCO's annotation format")
    parser.add_argument("--protocol", choices=evaluation.PROTOCOLS, default="coco")
    parser.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args(list(arguments))
    annotations = evaluation.read_coco_annotations(options.annotations)
    detections = evaluation.read_detections(options.detections, annotations)
    _report(evaluation.evaluate(annotations, detections, options.protocol), options.protocol, options.json)
    return 0


def _evaluate_model(arguments: Sequence[str]) -> int:
    from lightning.pytorch.callbacks import TQDMProgressBar

    from detpipe import checkpoint
    from detpipe.configuration import CLI, quiet

    quiet()
    cli = CLI(arguments, _add_arguments)
    config, data = cli.config, cli.datamodule
    if config.ckpt_path is None:
        raise UsageError("--ckpt_path is missing: give the checkpoint to evaluate, such as RUN/best.ckpt")
    stored, description = checkpoint.read(config.ckpt_path)
    split = config.split or ("test" if getattr(data, "splits", {}).get("test") else "val")
    annotations = data.annotations(split)
    checkpoint.check_class_names(description, annotations.class_names, config.ckpt_path)
    checkpoint.load_weights(cli.model, stored, config.ckpt_path)
    run = Path(config.ckpt_path).parent
    results = Path(config.detections_out or run / f"{split}_detections.json")
    numbers = Path(config.json or run / f"{split}_{config.protocol}.json")
    for path in (results, numbers):
        if path.is_dir():
            raise UsageError(f"{path} is a folder; give the name of a file for --json and --detections_out")
    print(data.describe(split))
    loader = data.eval_dataloader(split)
    trainer = cli.trainer_with(callbacks=[TQDMProgressBar()], enable_checkpointing=False)
    order = [int(key[1]) for batch in loader.batch_sampler for key in batch]
    found = [one for batch in trainer.predict(cli.model, loader) for one in batch]
    detections = evaluation.pack(found, [int(annotations.image_ids[row]) for row in order])
    evaluation.write_detections(results, detections, annotations)
    _report(evaluation.evaluate(annotations, detections, config.protocol), config.protocol, numbers)
    print(f"\nnumbers {numbers}\ndetections {results}")
    return 0


def _add_arguments(parser: Any) -> None:
    from typing import Literal

    parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to evaluate")
    parser.add_argument(
        "--split",
        type=Literal["train", "val", "test"] | None,
        default=None,
        help="part of the data; test where the configuration names one, else val",
    )
    parser.add_argument("--protocol", type=Literal["coco", "voc07", "voc10"], default="coco")
    parser.add_argument(
        "--json", type=str | None, default=None, help="for the numbers; beside the checkpoint by default"
    )
    parser.add_argument(
        "--detections_out",
        type=str | None,
        default=None,
        help="for the detections in COCO's result format; beside the checkpoint by default",
    )


def _report(metrics: dict[str, Any], protocol: str, path: str | Path | None) -> None:
    if path is not None:  # before the table, which a closed pipe may end
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(evaluation.format_table(metrics, protocol))
