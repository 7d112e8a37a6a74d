"""The ``detpipe`` command: ``train``, ``evaluate``, ``predict`` and others, the same as the scripts in ``tools/``.

Nothing heavy is imported before a command is known, so that help and mistakes answer at once. Exit status: 0 for success, 2
for a wrong command line or configuration, 1 for anything else that went wrong, 130 when interrupted, 143 when a training was asked
to end (SIGTERM, SIGUSR1).
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from detpipe.support.allocator import keep_freed_memory
from detpipe.support.errors import DetpipeError, StoppedBySignal, UsageError
from detpipe.support.terminal import printable

HELP = """usage: detpipe [--debug] [--trust MODULE] COMMAND ...

Region-based object detection with attention.

commands:
  train CONFIG.yaml [MORE.yaml ...] [--key.path value ...]
                        train a detector, evaluate it, leave checkpoints, curves and numbers in a run folder
  evaluate CONFIG.yaml [MORE.yaml ...] --ckpt_path CHECKPOINT
  evaluate --detections FILE.json --annotations FILE.json --protocol coco|voc07|voc10
                        mean average precision of a model, or of a file of detections
  predict CHECKPOINT|NAME IMAGE_OR_FOLDER ... -o FOLDER
                        draw detections and write them as JSON
  pretrain CONFIG.yaml [MORE.yaml ...] [--key.path value ...]
                        train a backbone as a classifier on an image folder, export its weights for detectors
  train_regions CONFIG.yaml [MORE.yaml ...] [--key.path value ...]
                        train what else looks at regions, such as a classifier of given boxes
  classify CHECKPOINT IMAGE_OR_FOLDER ... --boxes FILE.json -o FOLDER
                        name what is in given boxes, draw it and write it as JSON
  inspect CHECKPOINT IMAGE_OR_FOLDER ... -o FOLDER
                        draw what the attention of a backbone does: gates by class, branches by scale, spatial maps
  ablate STUDY.yaml -o FOLDER
                        train variants of one configuration with the same seeds, and tabulate what each is worth
  proposals make|convert|info|recall ...
                        boxes of one's own: make them, or turn other programs' files into a store, and know their recall
  data check|info|show|convert|split|shards PATH ...
                        a data set: name its faults, measure and draw it, convert it between layouts, divide it, pack it
  data download voc07|voc12|coco2017
                        fetch and unpack a public data set
  zoo                   list detectors with published weights, whose names predict takes; zoo NAME -o FILE.ckpt writes one

options:
  --debug               show the whole traceback of an error
  --trust MODULE        let configurations and checkpoints name classes of this module too, which then runs as code; may be
                        repeated; MODULE.py may lie in the current folder
  -h, --help            show this message; 'detpipe COMMAND --help' shows the options of a command
  --version             show the version

examples:
  detpipe train configs/fast_rcnn_se.yaml
  detpipe train configs/fast_rcnn_squeezenet.yaml configs/data/voc_custom.yaml --data.root MY_FOLDER
  detpipe evaluate configs/fast_rcnn_se.yaml --ckpt_path runs/fast_rcnn_se/.../best.ckpt
  detpipe pretrain configs/pretrain/se_resnet18.yaml
"""

COMMANDS = {
    "train": ("detpipe.commands.training", "train"),
    "evaluate": ("detpipe.commands.evaluate", "evaluate"),
    "predict": ("detpipe.commands.predict", "predict"),
    "pretrain": ("detpipe.commands.training", "pretrain"),
    "train_regions": ("detpipe.commands.training", "train_regions"),
    "classify": ("detpipe.commands.predict", "classify"),
    "ablate": ("detpipe.commands.ablation", "run_ablate"),
    "inspect": ("detpipe.commands.inspect_attention", "run_inspect"),
    "proposals": ("detpipe.commands.proposal_commands", "main"),
    "data": ("detpipe.commands.data_commands", "main"),
    "zoo": ("detpipe.commands.zoo", "run_zoo"),
}

_WORKERS = {  # how PyTorch's messages of data workers begin -> what to do
    "DataLoader worker (pid": "a process that loads images was ended from outside, most often because memory ran out; checkpoints "
    "are intact; start again with fewer, --data.loader.num_workers (0 loads in the main process)",
    "DataLoader timed out": "a process that loads images hangs, or the storage is slow; checkpoints are intact; a longer wait is "
    "--data.loader.timeout SECONDS",
}

# what backends say of a process that is no longer there
_PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command and its arguments; those of the process by default.

    Returns:
        The exit status.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        given, trust = _without_trust(given)
        if not given or given[0] in ("-h", "--help"):
            print(HELP, end="")
            return 0 if given else 2
        if given[0] == "--version":
            from importlib.metadata import version

            print(f"detpipe {version('detpipe')}")
            return 0
        if not trust:
            return run(given)
        from detpipe.training.allowed import trusted

        with trusted(trust):
            return run(given)
    except KeyboardInterrupt:
        return interrupted()
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # how Lightning leaves when interrupted
            return interrupted()
        return stop.code if isinstance(stop.code, int) else 0
    except StoppedBySignal as stop:
        from detpipe.support.processes import is_first

        if not is_first():
            return 0  # or whoever started this process would end the first one, which says it
        print(f"detpipe: {stop}", file=sys.stderr)
        return stop.status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"detpipe: error: {printable(one_line(error))}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _without_trust(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take ``--trust MODULE`` out of the arguments, wherever it stands."""
    rest, modules, left = [], [], iter(arguments)
    for argument in left:
        name, equals, value = argument.partition("=")
        if name != "--trust":
            rest.append(argument)
        elif value := value if equals else next(left, ""):
            modules.append(value)
        else:
            raise UsageError("--trust: expected the name of a module after it, such as my_head")
    return rest, modules


def interrupted() -> int:
    """Say that the command was stopped by its user, and return the exit status for that."""
    print("\ninterrupted; what was saved before stays", file=sys.stderr)
    return 130


def run(arguments: Sequence[str]) -> int:
    """Run a command and let its errors through.

    Args:
        arguments: the command and its arguments.

    Returns:
        The exit status.

    Raises:
        UsageError: there is no such command.
    """
    command, *rest = arguments
    if command not in COMMANDS:
        from detpipe.support.suggest import did_you_mean

        raise UsageError(
            f"unknown command {command!r}: expected {', '.join(COMMANDS)}{did_you_mean(command, COMMANDS)}"
        )
    module, function = COMMANDS[command]
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for a newer version
    keep_freed_memory()
    return getattr(import_module(module), function)(rest) or 0


def one_line(error: BaseException) -> str:
    """Say what went wrong in one line.

    Args:
        error: any exception; one from a data worker carries a traceback in its text.

    Returns:
        The message of an error that users can mend; with its type and a hint for any other.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    message = lines[-1].strip() if lines else ""
    if lines and lines[0].startswith("Caught "):  # raised in a data worker: the last line is "type: message"
        message = message.partition(": ")[2] or message
        lines = [message]
    if isinstance(error, DetpipeError):
        return " ".join(line.strip() for line in lines)
    if isinstance(error, OSError):
        return f"{error}{_room(error)}"
    advice = next((text for sign, text in _WORKERS.items() if message.startswith(sign)), None)
    if any(sign in str(error) for sign in _PEER_GONE):
        return "another process of this training has ended; its message says why"
    if advice:
        return f"{message.rstrip('. ')}: {advice}"
    return f"{type(error).__name__}: {message} (run again with --debug for the traceback)"


def _room(error: OSError) -> str:
    """How much is free where a file did not fit."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or error.filename is None:
        return ""
    folder = os.path.dirname(os.fspath(error.filename)) or "."
    free = f"; {shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there" if os.path.isdir(folder) else ""
    return f"{free}; files that were complete before are intact"
