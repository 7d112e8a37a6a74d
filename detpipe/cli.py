"""The ``detpipe`` command: ``train``, ``evaluate``, ``predict`` and others, the same as the scripts in ``tools/``.

Nothing heavy is imported before a command is known, so that help and mistakes answer at once. Exit status: 0 for success, 2
for a wrong command line or configuration, 1 for anything else that went wrong, 3 where a prediction is done but for images that
could not be read, 130 when interrupted, 143 when a training was asked to end (SIGTERM, SIGUSR1).
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
from detpipe.support.terminal import package_version, printable

HELP = """usage: detpipe [--debug] [--trust MODULE] COMMAND ...

Region-based object detection with attention.

commands:
  train CONFIG.yaml [MORE.yaml ...] [--key.path value ...]
                        train a detector, evaluate it, leave checkpoints, curves and numbers in a run folder
  evaluate CONFIG.yaml [MORE.yaml ...] --ckpt_path CHECKPOINT
  evaluate --detections FILE.json --annotations FILE.json --protocol coco|voc07|voc10
                        mean average precision of a model, or of a file of detections
  predict CHECKPOINT|NAME|FILE.onnx IMAGE_OR_FOLDER ... -o FOLDER [--tiles 640] [--tta] [--resume] [--part 3/16]
                        draw detections and write them as JSON, image by image
  merge FOLDER ...      join what the parts of a prediction have written
  serve CHECKPOINT|NAME|FILE.onnx
                        answer images over HTTP with detections as JSON
  demo CHECKPOINT|NAME  open a page in the browser to try a detector on
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
  export CHECKPOINT|NAME -o model.onnx|model.pt2
                        write a detector as a file that runs without detpipe; --check FILE IMAGES compares one
  zoo                   list detectors with published weights, whose names predict takes; zoo NAME -o FILE.ckpt writes one

options:
  --debug               show the whole traceback of an error
  --trust MODULE        let configurations and checkpoints name classes of this module too, which then runs as code; may be
                        repeated; MODULE.py may lie in the current folder
  -h, --help            show this message; 'detpipe COMMAND --help' shows the options of a command
  --version             show the version

examples:
  detpipe train configs/fast_rcnn_se.yaml
  detpipe train configs/recommended.yaml configs/data/voc_custom.yaml --data.root MY_FOLDER
  detpipe evaluate configs/fast_rcnn_se.yaml --ckpt_path runs/fast_rcnn_se/.../best.ckpt
  detpipe pretrain configs/pretrain/se_resnet18.yaml
"""

PROPOSALS_HELP = """usage: detpipe proposals make|convert|info|recall ...

Region proposals in files: boxes that a detector with precomputed proposals looks at.

commands:
  make SOURCE --data DATA [--split SPLIT] -o STORE.safetensors
                        make boxes for all images of a data set or folder
  convert FILE -o STORE.safetensors
                        turn Fast R-CNN's .mat, COCO results, detectron2's or mmdetection's pickle, CSV or .npz into a store
  info STORE.safetensors
                        how many boxes it holds, what made them, and its hash
  recall STORE.safetensors ... --data DATA [--split SPLIT] [-o FOLDER]
                        how many objects the boxes find, as table, JSON and picture

'detpipe proposals COMMAND --help' shows the options of a command.
"""

DATA_HELP = """usage: detpipe data check|info|show|convert|split|shards PATH ...
       detpipe data download voc07|voc12|coco2017

A data set of images with boxes. PATH is a folder in VOC, COCO or YOLO layout, a COCO annotation file (*.json, with --images),
a table with a row a box (*.csv), or shards: a folder that 'detpipe data shards' wrote, or its web address.

commands:
  check PATH            name every fault in it, and pictures that several splits share
  info PATH [-o FOLDER]
                        count and measure images and boxes, draw it, suggest sizes of anchors
  show PATH -o OUT.png  draw images with their boxes
  convert PATH --to coco|voc|yolo|csv -o FOLDER
                        write it in another layout, without loss where that can be
  split PATH -o FOLDER --parts train=.8,val=.1,test=.1
                        divide it into parts with equal shares of the objects of every class
  download voc07|voc12|coco2017 [-o FOLDER]
                        fetch and unpack a public data set, or go on where that was cut off
  shards PATH -o FOLDER --workers 8
                        write it as tar files with an index, to train from without unpacking; --verify compares them

'detpipe data COMMAND --help' shows the options of a command.
"""

COMMANDS: dict[
    str, dict[str, str]
] = {  # what stands before a command, if anything -> command -> its function in detpipe.commands, or its full path
    "": {
        "train": "training.train",
        "evaluate": "evaluate.evaluate",
        "predict": "predict.predict",
        "merge": "predict.merge",
        "serve": "serve.run_serve",
        "demo": "demo.run_demo",
        "pretrain": "training.pretrain",
        "train_regions": "training.train_regions",
        "classify": "predict.classify",
        "ablate": "ablation.run_ablate",
        "inspect": "inspect_attention.run_inspect",
        "export": "export.run_export",
        "zoo": "zoo.run_zoo",
        "proposals": "",
        "data": "",
    },
    "proposals": {
        "make": "proposal_making.run_make",
        "convert": "proposal_stores.run_convert",
        "info": "proposal_stores.run_info",
        "recall": "proposal_recall.run_recall",
    },
    "data": {
        "check": "data_check.run_check",
        "info": "data_info.run_info",
        "show": "data_show.run_show",
        "convert": "data_convert.run_convert",
        "split": "data_split.run_split",
        "download": "data_download.run_download",
        "shards": "data_shards.run_shards",
    },
}
_HELP = {"": HELP, "proposals": PROPOSALS_HELP, "data": DATA_HELP}

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
        if given[:1] == ["--version"]:
            print(f"detpipe {package_version()}")
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


def run(arguments: Sequence[str], group: str = "") -> int:
    """Run a command and let its errors through.

    Args:
        arguments: the command and its arguments.
        group: what comes before the command, such as ``data``.

    Returns:
        The exit status.

    Raises:
        UsageError: there is no such command.
    """
    commands = COMMANDS[group]
    command, *rest = arguments or [""]
    if command in ("", "-h", "--help"):
        print(_HELP[group], end="")
        return 0 if command else 2
    if command not in commands:
        from detpipe.support.suggest import did_you_mean

        more = f"; see 'detpipe {group} --help'" if group else ""
        near = did_you_mean(command, commands)
        raise UsageError(f"unknown command {command!r}: expected {', '.join(commands)}{near}{more}")
    if command in COMMANDS:
        return run(rest, command)
    module, _, function = commands[command].rpartition(".")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for a newer version
    keep_freed_memory()
    return getattr(import_module(module if "." in module else f"detpipe.commands.{module}"), function)(rest) or 0


def one_line(error: BaseException) -> str:
    """Say what went wrong: the message of an error that users can mend; with its type and a hint for any other."""
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
