"""Which classes configurations and checkpoints may name: decided by name alone, before anything is imported.

Allowed are the classes of this package that a model or its data are built of, and by name those of Lightning whose arguments are
data, and those that torchvision's RPN and RoI heads are built of. No function is allowed, so that nothing can be called that a
file names. ``--trust MODULE`` adds a user's own.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import RLock
from typing import Any

from detpipe.support.errors import UsageError
from detpipe.support.strict_yaml import parse_yaml

_PARTS = (  # modules and folders of this package
    "attention backbones datasets demo detector heads optimization proposals regions roi_pooling spatial_transformer types"
)
_OTHERS = {
    "lightning.pytorch.callbacks": "BatchSizeFinder DeviceStatsMonitor EarlyStopping EMAWeightAveraging LearningRateFinder "
    "GradientAccumulationScheduler LearningRateMonitor ModelCheckpoint ModelSummary OnExceptionCheckpoint RichModelSummary "
    "RichProgressBar SpikeDetection StochasticWeightAveraging Timer TQDMProgressBar WeightAveraging",
    "lightning.pytorch.callbacks.progress.rich_progress": "RichProgressBarTheme",
    "lightning.pytorch.loggers": "CometLogger CSVLogger MLFlowLogger TensorBoardLogger WandbLogger",
    "lightning.pytorch.strategies": "DDPStrategy SingleDeviceStrategy",
    "lightning.pytorch.profilers": "AdvancedProfiler PassThroughProfiler PyTorchProfiler SimpleProfiler",
    "lightning.pytorch.plugins": "AsyncCheckpointIO DoublePrecision HalfPrecision MixedPrecision Precision TorchCheckpointIO "
    "TorchSyncBatchNorm",
    "lightning.pytorch.plugins.environments": "KubeflowEnvironment LightningEnvironment LSFEnvironment MPIEnvironment "
    "SLURMEnvironment TorchElasticEnvironment",
    "torchvision.models.detection.roi_heads": "RoIHeads",
    "torchvision.models.detection.rpn": "RegionProposalNetwork RPNHead",
    "torchvision.models.detection.anchor_utils": "AnchorGenerator",
    "torchvision.models.detection.faster_rcnn": "FastRCNNConvFCHead FastRCNNPredictor TwoMLPHead",
    "torchvision.ops": "MultiScaleRoIAlign",
}
_MOVED = {  # modules that configurations and checkpoints of earlier versions name -> where their classes are
    "backbones.extractor": "backbones.bodies",
    "backbones.sknet": "backbones.se_resnet",
    "classifier": "regions.image_classifier",
    "datasets.augment_settings": "datasets.augment.settings",
    "datasets.coco": "datasets.formats.coco",
    "datasets.csv_boxes": "datasets.formats.csv",
    "datasets.demo": "demo.dataset",
    "datasets.demo_digits": "demo.digits",
    "datasets.labeled_images": "datasets.classification",
    "datasets.transforms": "datasets.augment.augmentation",
    "datasets.views": "datasets.classification",
    "datasets.voc": "datasets.formats.voc",
    "datasets.yolo": "datasets.formats.yolo",
    "heads.superpixel_pooling": "regions.superpixel_pooling",
    "region_classifier": "regions.region_classifier",
    "region_context": "regions.region_context",
    "superpixel_localizer": "regions.superpixel_localizer",
    "superpixels": "regions.superpixels",
}
_LINE = re.compile(r"^class (?P<name>[A-Z]\w*)|^    def (?P<method>\w+)|^\S", re.MULTILINE)
GIVEN: list[str] = []  # modules of the command line
_active: list[set[str]] = []  # what is trusted where parsers are restricted
_lock = RLock()  # the settings are those of the process


@cache
def _classes() -> dict[str, list[str]]:
    """The path of each class of this package that may be named -> its methods."""
    classes: dict[str, list[str]] = {}
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        places = file.relative_to(root.parent).with_suffix("").parts
        path = ""
        for found in _LINE.finditer(file.read_text(encoding="utf-8") if places[1] in _PARTS.split() else ""):
            if found["method"] and path:
                classes[path].append(f"{path}.{found['method']}")
            elif not found["method"]:
                path = ".".join((*places, found["name"])) if found["name"] else ""
                classes.update({path: []} if path else {})
    return classes


def _shortened(path: str, least: int = 1) -> list[str]:
    """The paths of a class by its module and the packages around that."""
    *places, name = path.split(".")
    return [".".join((*places[:depth], name)) for depth in range(least, len(places) + 1)]


@cache
def policy() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The import paths that are allowed, and those below them that are not: methods, which are functions."""
    allowed = [path for home in _classes() for path in _shortened(home)]
    denied = [method for methods in _classes().values() for method in methods]
    for module, names in _OTHERS.items():
        for kind in (getattr(import_module(module), name) for name in names.split()):
            path = f"{kind.__module__}.{kind.__qualname__}"
            allowed += [f"{module}.{kind.__name__}", *_shortened(path, least=2)]
            denied += [f"{path}.{name}" for name, value in vars(kind).items() if inspect.isroutine(value)]
    return tuple(allowed), tuple(denied)


@cache
def _homes() -> dict[str, str]:
    """Each path that names one class of this package, or did so in an earlier version -> its public path, or its module's."""
    text = (Path(__file__).parents[1] / "__init__.py").read_text(encoding="utf-8")
    public = ast.literal_eval(text.partition("__all__ = ")[2].partition("]")[0] + "]")
    homes: dict[str, set[str]] = {}
    for home in _classes():
        module, _, name = home.removeprefix("detpipe.").rpartition(".")
        olds = [f"detpipe.{old}.{name}" for old, now in _MOVED.items() if now == module]
        for path in (path for one in (home, *olds) for path in _shortened(one)):
            homes.setdefault(path, set()).add(f"detpipe.{name}" if name in public else home)
    return {path: min(found) for path, found in homes.items() if len(found) == 1}


def paths_of(name: str) -> list[str]:
    """The paths of all classes of this package that have a name, such as ``FastRCNNHead``."""
    return [path for path in _classes() if path.endswith(f".{name}")]


def may_be_named(path: str) -> bool:
    """Whether a configuration may name a class, by its full path."""
    return path in policy()[0] or any(f"{path}.".startswith(f"{name}.") for name in (*GIVEN, *(_active or [()])[-1]))


def where_classes_are(value: Any) -> Any:
    """Give classes of this package in a configuration, or a part of it, the import path of today.

    What is no path that a class has, or had in an earlier version, is as it was.
    """
    if isinstance(value, dict):
        return {key: where_classes_are(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [where_classes_are(entry) for entry in value]
    return _homes().get(value, value) if isinstance(value, str) else value


@contextmanager
def only_allowed(trust: Sequence[str] = ()) -> Iterator[None]:
    """While it lasts, parsers build only what is allowed or ``trust`` names, and read no file but those that they are given."""
    import jsonargparse
    from jsonargparse import _common, _optionals

    check_trust(trust)
    _declare_modules()
    for name in (*GIVEN, *trust):
        _import(name)
    with _lock:
        if _active and {*trust} <= _active[-1]:
            yield
            return
        allowed, denied = policy()
        settings, mode = dict(_common.parsing_settings), _optionals._config_read_mode
        loader = jsonargparse.get_loader("yaml")
        jsonargparse.set_parsing_settings(
            config_read_mode_fsspec_enabled=False,
            instantiate_subclass_spec_in_any=False,
            import_path_denylist=["*", *denied],
            import_path_allowlist=[*allowed, *GIVEN, *trust],
        )
        _optionals._config_read_mode = (
            "fF"  # no path is both: text is a value, and is not read from the file of that name
        )
        jsonargparse.set_loader("yaml", lambda text: _load(text, loader))
        _active.append({*GIVEN, *trust})
        try:
            yield
        finally:
            _active.pop()
            jsonargparse.set_loader("yaml", loader)
            _optionals._config_read_mode = mode
            _common.parsing_settings.update(settings)


@contextmanager
def trusted(modules: Sequence[str]) -> Iterator[None]:
    """Trust modules, packages or classes that the command line names, which may lie in the current folder."""
    check_trust(modules)
    here = str(Path.cwd())
    GIVEN.extend(modules)
    sys.path.append(here)  # at the end: what lies there takes no other module's place
    try:
        yield
    finally:
        sys.path.remove(here)
        del GIVEN[len(GIVEN) - len(modules) :]


def runs_code(path: str) -> bool:
    """Whether an import path belongs to what can run anything, such as ``os`` or ``functools``, or holds such."""
    from jsonargparse._common import default_import_path_denylist

    return any(
        f"{path}.".startswith(f"{entry}.") or entry.startswith(f"{path}.") for entry in default_import_path_denylist
    )


def check_trust(modules: Sequence[str]) -> None:
    """Refuse names that cannot be trusted: those of no module, and of what can run anything; a UsageError."""
    for name in modules:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UsageError(f"--trust {name}: expected the name of a module, such as my_head for my_head.py")
        if runs_code(name):
            raise UsageError(f"--trust {name}: refused, since {name} can run any code; name your own module")


@cache
def _declare_modules() -> None:
    """Say which arguments of torchvision's RoI heads are modules, which it leaves open: only modules are built for them."""
    from torch import nn
    from torchvision.models.detection.roi_heads import RoIHeads

    RoIHeads.__init__.__annotations__.update(dict.fromkeys(("box_roi_pool", "box_head", "box_predictor"), nn.Module))


def _import(name: str) -> None:
    """Import what is trusted, so that its classes have short names; of a module that is absent, none can be named.

    Raises:
        UsageError: its code fails.
    """
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UsageError(f"--trust {name}: its import failed: {error}") from error
        if "." in name and error.name == name:  # a class, maybe, of the module before it
            _import(name.rpartition(".")[0])
    except Exception as error:
        raise UsageError(f"--trust {name}: its import failed: {type(error).__name__}: {error}") from error


def _load(text: str, loader: Any) -> Any:
    """Parse the text of a value, or of a configuration."""
    parse_yaml(text, "configuration", UsageError)
    return where_classes_are(loader(text))
