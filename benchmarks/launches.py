"""How many operations does a training step of a configuration ask a device for, where, and which of them make it wait?

A dispatch mode counts what PyTorch hands to a device, one for each operation that has a kernel: views, and tensors that are only
allocated, are left out. Each is put down to the stage whose file called it; one of the backward pass to the stage of the forward
operation that it belongs to. An operator of detpipe's own counts once, whatever it launches. What would make the host wait for a
GPU is listed: numbers, masks and indices that are read back, and copies to a GPU that are not ``non_blocking``.

On ``cuda`` without a GPU, tensors are fake: they have shapes and devices, but no values. A step that waits for a value ends with
an error that shows where. PyTorch has no backward pass without a driver, and detection has results of unknown length: both are
counted with values, on a CPU or a real GPU.
"""

from __future__ import annotations

import argparse
import bisect
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detpipe.detector import TwoStageDetector, total_loss
from detpipe.types import Target

Batch = tuple[list[Tensor], list[Target]]
# a part of detpipe that calls an operation -> the stage it counts for; parts that serve several stages are left out
STAGES = {
    "images": "images",
    "backbones": "backbone",
    "attention": "backbone",
    "proposals/rpn_head": "RPN network",
    "proposals/anchors": "RPN anchors",
    "proposals/rpn_objective": "RPN sampling",
    "proposals/rpn_selection": "RPN selection",
    "proposals": "RPN rest",
    "heads/sampling": "RoI sampling",
    "heads/objective": "head losses",
    "heads/postprocess": "postprocess",
    "heads": "head",
    "roi_pooling": "pooling",
    "spatial_transformer": "glimpse",
    "heads/glimpse": "glimpse",
    "heads/estimators": "policy losses",
    "detector": "detector",
}
PACKAGE = str(Path(__file__).resolve().parents[1] / "detpipe") + "/"
# tensors that are only allocated, or that share memory with another
WITHOUT_KERNEL = (
    "device",
    "empty",
    "new_empty",
    "detach",
    "alias",
    "lift",
    "_unsafe_view",
    "_reshape_alias",
    "sym_",
    "resize_",
)
WAITS = (
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "nms"),
    *("_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
)


class Launches(TorchDispatchMode):
    """Count operations on a device by stage, and note those that wait for it.

    Args:
        device: ``"cpu"`` or ``"cuda"``; operations on others are not counted.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.forward: Counter[str] = Counter()
        self.backward: Counter[str] = Counter()
        self.operations: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self._numbers: list[int] = []  # of the autograd nodes that forward operations have made, with their stages
        self._stages: list[str] = []
        self._made = _MadeOnDevice(self)

    def __enter__(self) -> Launches:
        """Begin to count."""
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End."""
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Count an operation, and run it."""
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        on_device, node = self._touches((args, kwargs)), torch._C._current_autograd_node()
        if on_device and self._waits(func, args, kwargs):
            self.waits[self.stage() if node is None else "backward", name] += 1
        result = func(*args, **kwargs)
        if not (on_device or self._touches(result)) or func.is_view or name.startswith(WITHOUT_KERNEL):
            return result
        if node is None:
            stage = self.stage()
            self._numbers.append(torch.autograd._get_sequence_nr())  # pyright: ignore[reportPrivateImportUsage]
            self._stages.append(stage)
            self.forward[stage] += 1
        else:  # the node took its number just before its operation ran
            at = bisect.bisect_right(self._numbers, node._sequence_nr())
            stage = self._stages[min(at, len(self._stages) - 1)] if self._stages else "elsewhere"
            self.backward[stage] += 1
        self.operations[stage, name] += 1
        return result

    def total(self) -> int:
        """All operations."""
        return self.forward.total() + self.backward.total()

    def _touches(self, values: Any) -> bool:
        return any(isinstance(leaf, Tensor) and leaf.device.type == self.device for leaf in tree_leaves(values))

    def _waits(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        name = func.__name__.partition(".")[0]
        if name in WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            return True
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], Sequence):
            return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
        devices = {leaf.device.type for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        if name == "_to_copy":
            target = "" if kwargs.get("device") is None else torch.device(kwargs["device"]).type
            crosses = target != "" and target not in devices
            return crosses and (target == "cpu" or not kwargs.get("non_blocking"))
        if name != "copy_" or len(devices) == 1:
            return False
        return args[0].device.type == "cpu" or not (kwargs.get("non_blocking") or args[2:] == (True,))

    @staticmethod
    def stage() -> str:
        """The stage of the innermost part of detpipe that is running, and serves one stage only."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                part = frame.f_code.co_filename[len(PACKAGE) : -len(".py")]
                stage = STAGES.get(part) or STAGES.get(part.partition("/")[0])
                if stage is not None:
                    return stage
            frame = frame.f_back
        return "elsewhere"


class _MadeOnDevice(TorchFunctionMode):
    """Notes numbers of Python that become a tensor on the device, which no dispatch mode sees."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            given = args[func is Tensor.new_tensor] if args else None
            if result.device.type == self.launches.device != "cpu" and not isinstance(given, Tensor):
                self.launches.waits[self.launches.stage(), func.__name__] += 1
        return result


def make_batch(images: int, size: tuple[int, int], objects: int, classes: int, device: str) -> Batch:
    """Draw images of one size, and as many objects in each: a batch with twice the images has the same shapes otherwise."""
    generator = torch.Generator().manual_seed(0)
    extent = torch.tensor([size[1], size[0]])
    pictures, targets = [], []
    for _ in range(images):
        side = (0.1 + 0.3 * torch.rand(objects, 2, generator=generator)) * extent
        corner = torch.rand(objects, 2, generator=generator) * (extent - side)
        boxes = torch.cat((corner, corner + side), dim=1).to(device)
        labels = torch.randint(1, classes + 1, (objects,), generator=generator).to(device)
        pictures.append(torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8).to(device))
        targets.append(Target(boxes=boxes, labels=labels))
    return pictures, targets


def move(network: nn.Module, convert: Callable[[Tensor], Tensor]) -> None:
    """Replace the parameters and buffers of a network, such as by fake ones on another device."""
    for module in network.modules():
        for name, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[name] = nn.Parameter(convert(value.detach()), requires_grad=value.requires_grad)
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = convert(value)


def train_once(detector: TwoStageDetector, batch: Batch, device: str) -> Launches:
    """Count the losses and the backward pass of a step; the first step, which lays anchors, is not counted."""
    for counting in (False, True):
        launches = Launches(device)
        # in one thread, which the mode is active in
        with launches if counting else nullcontext(), torch.autograd.set_multithreading_enabled(False):
            loss = total_loss(detector.losses(*batch))
            if device == "cpu" or torch.cuda.is_available():
                loss.backward()
        detector.zero_grad(set_to_none=True)
    return launches


@torch.no_grad()
def detect_once(detector: TwoStageDetector, batch: Batch, device: str) -> Launches:
    """Count detection; the first call is not counted."""
    for counting in (False, True):
        launches = Launches(device)
        with launches if counting else nullcontext():
            detector(batch[0])
    return launches


def count(configs: Sequence[str], images: int, size: tuple[int, int], device: str, detection: bool = False) -> Launches:
    """Count a training step, or detection, of a configuration.

    Args:
        configs: files and options, as of ``tools/train.py``.
        images: of the batch.
        size: their height and width.
        device: ``"cpu"`` or ``"cuda"``; tensors are fake where there is no GPU.
        detection: count detection in the place of a training step.
    """
    from detpipe.commands.training import add_arguments  # needs all that training needs
    from detpipe.training.configuration import CLI

    torch.manual_seed(0)
    cli = CLI([*map(str, configs)], add_arguments)
    detector, run = cli.model, detect_once if detection else train_once
    detector.train(not detection)
    classes = detector.head.num_classes
    if device == "cpu" or torch.cuda.is_available():
        return run(detector.to(device), make_batch(images, size, 4, classes, device), device)
    fake = FakeTensorMode()
    move(detector, fake.from_tensor)
    with fake:
        move(detector, lambda value: value.to(device))
        return run(detector, make_batch(images, size, 4, classes, device), device)


def table(columns: dict[str, Launches]) -> str:
    """Write one column for each count: forward and backward by stage."""
    stages = dict.fromkeys(stage for found in columns.values() for stage in (*found.forward, *found.backward))
    ordered = sorted(stages, key=[*dict.fromkeys(STAGES.values()), "elsewhere"].index)
    rows = [["stage", *columns], ["---", *("---:" for _ in columns)]]
    for stage in ordered:
        rows.append([stage, *(f"{found.forward[stage]} + {found.backward[stage]}" for found in columns.values())])
    rows.append(["all", *(f"{found.forward.total()} + {found.backward.total()}" for found in columns.values())])
    rows.append(["waits for the device", *(str(found.waits.total()) for found in columns.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a configuration, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="as of tools/train.py")
    parser.add_argument("--images", type=int, nargs="+", default=[2, 4], help="of a batch, a column each (2 4)")
    parser.add_argument("--size", type=int, nargs=2, default=[160, 160], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--detection", action="store_true", help="count detection, not a training step")
    parser.add_argument("--operations", type=int, default=0, metavar="N", help="list the N most frequent of each stage")
    options, more = parser.parse_known_args(arguments)
    if options.detection and options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--detection needs values: use --device cpu, or a machine with a GPU")
    columns = {}
    for images in options.images:
        found = count([*options.configs, *more], images, tuple(options.size), options.device, options.detection)
        columns[f"{images} images"] = found
    print(f"operations, forward + backward; {options.device}, torch {torch.__version__}\n")
    print(table(columns))
    last = [*columns.values()][-1]
    for (stage, name), number in last.waits.items():
        print(f"waits: {stage}: {name}, {number} times")
    for stage in dict.fromkeys(stage for stage, _ in last.operations) if options.operations else ():
        own = Counter({name: number for (where, name), number in last.operations.items() if where == stage})
        print(f"{stage}: {', '.join(f'{name} {number}' for name, number in own.most_common(options.operations))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
