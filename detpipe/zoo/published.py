"""The detectors whose weights others have published, by name: what they are, where their files are, and how they are read.

torchvision's files are fetched by its own loader into PyTorch's folder of weights, or given; those of detectron2 are put there by
the user, or given. Nothing in a file is run: see :mod:`detpipe.support.untrusted`. The numbers are those of the libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor
from torch.hub import get_dir, load_state_dict_from_url
from torchvision.models import detection, get_model_weights

from detpipe.backbones.regime import convert_norm
from detpipe.backbones.weights import read_state, refuse_differences
from detpipe.datasets.formats.voc import VOC_CLASSES
from detpipe.detector import TwoStageDetector
from detpipe.proposal_files.restricted_pickle import load_plain_pickle
from detpipe.support.errors import CheckpointError, DataError, UsageError
from detpipe.support.suggest import did_you_mean
from detpipe.training import checkpoint
from detpipe.training.checkpoint import Description
from detpipe.training.models import load_detector, rebuild
from detpipe.zoo.detectron2 import cascade_rcnn_fpn, fast_rcnn_fpn, faster_rcnn_c4, faster_rcnn_fpn, to_own_names
from detpipe.zoo.torchvision_models import settings_of, state_of

GAP = "N/A"  # what torchvision calls ids that COCO gave to no class
Stored = tuple[dict[str, Any], Description]


@dataclass(frozen=True)
class Entry:
    """A detector with published weights.

    Args:
        library: that trained it.
        data: the sets that it was trained on and measured on.
        ap: box AP there, as published.
        license: of the library's weights; those of torchvision may have terms of the data too.
        address: of the file.
        size: of the file in MB; None where it is not published.
        settings: makes those under ``model`` of a configuration; None for one of torchvision, which are read off its model.
        frozen: parts of the backbone that fine-tuning leaves as they are, as the library does.
        eps: of frozen norms of torchvision's; None where norms are not frozen.
    """

    library: str
    data: str
    ap: float
    license: str
    address: str
    size: float | None = None
    settings: Callable[[], dict[str, Any]] | None = None
    frozen: tuple[str, ...] = ()
    eps: float | None = None

    @property
    def path(self) -> Path:
        """Where the file is looked for, and put by torchvision's loader."""
        return Path(get_dir()) / "checkpoints" / self.address.rpartition("/")[2]


_TORCHVISION = {  # name -> frozen parts of the backbone, eps of frozen norms
    "fasterrcnn_resnet50_fpn": (("stem", "c2"), 0.0),
    "fasterrcnn_resnet50_fpn_v2": (("stem", "c2"), None),
    "fasterrcnn_mobilenet_v3_large_fpn": (tuple(f"features.{index}" for index in range(7)), 1e-5),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (tuple(f"features.{index}" for index in range(7)), 1e-5),
}
_DETECTRON2 = {  # name -> data, AP, file, settings
    "faster_rcnn_R_50_FPN_3x": (
        ("COCO", 40.2, "COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl"),
        faster_rcnn_fpn,
    ),
    "fast_rcnn_R_50_FPN_1x": (
        ("COCO", 37.8, "COCO-Detection/fast_rcnn_R_50_FPN_1x/137635226/model_final_e5f7ce.pkl"),
        fast_rcnn_fpn,
    ),
    "cascade_mask_rcnn_R_50_FPN_3x": (
        ("COCO", 44.3, "Misc/cascade_mask_rcnn_R_50_FPN_3x/144998488/model_final_480dd8.pkl"),
        cascade_rcnn_fpn,
    ),
    "faster_rcnn_R_50_C4_voc": (
        ("VOC", 51.9, "PascalVOC-Detection/faster_rcnn_R_50_C4/142202221/model_final_b1acc2.pkl"),
        faster_rcnn_c4,
    ),
}


@cache
def entries() -> dict[str, Entry]:
    """All detectors by name."""
    found = {}
    for name, (frozen, eps) in _TORCHVISION.items():
        known: Any = get_model_weights(name)["COCO_V1"]
        ap, size = known.meta["_metrics"]["COCO-val2017"]["box_map"], known.meta["_file_size"]
        found[name] = Entry("torchvision", "COCO", ap, "BSD-3-Clause", known.url, size, None, frozen, eps)
    for name, ((data, ap, file), settings) in _DETECTRON2.items():
        address = f"https://dl.fbaipublicfiles.com/detectron2/{file}"
        found[name] = Entry("detectron2", data, ap, "CC BY-SA 3.0", address, None, settings)
    return found


def classes_of(entry: Entry) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names of the classes of a detector, label 1 first, and their ids in annotation files."""
    if entry.data == "VOC":
        return tuple(VOC_CLASSES), tuple(range(1, len(VOC_CLASSES) + 1))
    rows = [(name, label) for label, name in enumerate(_categories()) if label and name != GAP]
    return tuple(name for name, _ in rows), tuple(label for _, label in rows)


def _categories() -> list[str]:
    """COCO's classes by id, the background first."""
    known: Any = get_model_weights("fasterrcnn_resnet50_fpn")["COCO_V1"]
    return list(known.meta["categories"])


def _is_published(source: str, weights: str | None) -> bool:
    """Whether something is meant as the name of a published detector: no file, and no name of a file, which has its weights."""
    if source in entries() or not (Path(source).suffix or "/" in source or Path(source).exists()):
        return True
    if weights is not None:
        raise UsageError(
            f"--weights {weights}: belongs to a name of 'detpipe zoo', but {source} has weights of its own"
        )
    return False


def read(source: str | Path, weights: str | None = None) -> Stored:
    """Read a checkpoint, or a published detector as one.

    Args:
        source: a file, or a name of :func:`entries`.
        weights: the file of a published detector; None: where torchvision's loader puts it, and fetches it to.

    Returns:
        What :func:`detpipe.training.checkpoint.read` returns.

    Raises:
        UsageError: an unknown name, or ``weights`` for a file.
        CheckpointError: the file is missing, damaged, of another model, or cannot be fetched.
    """
    if not _is_published(str(source), weights):
        return checkpoint.read(source)
    detector, description = _build(str(source), weights)
    return {"state_dict": detector.state_dict(), checkpoint.KEY: description.to_dict(), "global_step": 0}, description


def find(name: str) -> Entry:
    """What is known of a detector by its name; a UsageError lists near names where there is none."""
    if name not in entries():
        raise UsageError(
            f"unknown detector {name!r}: expected a checkpoint such as RUN/best.ckpt, or a name of 'detpipe zoo'"
            f"{did_you_mean(name, entries())}"
        )
    return entries()[name]


def load(source: str, weights: str | None = None) -> tuple[TwoStageDetector, Description]:
    """Build a detector from its checkpoint, or a published one, in evaluation mode; arguments and errors as of :func:`read`."""
    return _build(source, weights) if _is_published(source, weights) else load_detector(source)


def settings_by_name(name: str) -> dict[str, Any]:
    """The settings of a published detector: class paths and arguments under ``model`` of a configuration."""
    entry = find(name)
    return settings_of_model(entry, torchvision_model(name, entry)) if entry.settings is None else entry.settings()


def settings_of_model(entry: Entry, model: Any) -> dict[str, Any]:
    """The settings of torchvision's model, with what fine-tuning freezes, and outputs for COCO's gaps."""
    settings = settings_of(model)
    settings["backbone"]["init_args"]["backbone"]["init_args"]["regime"]["frozen"] = list(entry.frozen)
    settings["head"]["init_args"]["extra_outputs"] = _categories().count(GAP)
    return settings


def torchvision_model(name: str, entry: Entry) -> Any:
    """Torchvision's model as it is when its weights are loaded, but for these."""
    model = getattr(detection, name)(weights=None, weights_backbone=None)
    if entry.eps is not None:
        convert_norm(model.backbone, "frozen", entry.eps)
    return model.eval()


def _build(name: str, weights: str | None) -> tuple[TwoStageDetector, Description]:
    entry = find(name)
    if entry.settings is None and weights in ("DEFAULT", "COCO_V1"):  # torchvision's names of its files
        weights = None
    file = entry.path if weights is None else Path(weights)
    if not file.is_file() and (weights is not None or entry.settings is not None):
        raise CheckpointError(f"weights file {file}: no such file; {_advice(name, entry)}")
    if entry.settings is None:
        model = torchvision_model(name, entry)
        _fill(model, name, read_state(file) if file.is_file() else _fetch(name, entry), file)
        settings = settings_of_model(entry, model)
        state = _without_gaps(state_of(model, settings))
    else:
        settings = entry.settings()
        state = _detectron2_state(name, settings, file)
    description = Description(_in_full(settings), *classes_of(entry))
    return rebuild(file, {"state_dict": state}, description), description


def _in_full(settings: Any) -> Any:
    """Settings with whole class paths, as checkpoints of trainings have them."""
    if not isinstance(settings, dict):
        return settings
    return {key: f"detpipe.{value}" if key == "class_path" else _in_full(value) for key, value in settings.items()}


def _fetch(name: str, entry: Entry) -> dict[str, Tensor]:
    """Fetch the weights by torchvision's loader, which compares the check sum in their name."""
    try:
        return load_state_dict_from_url(entry.address, check_hash=True, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, UnpicklingError) as error:  # no network; another check sum; no tensors
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"weights of {name} cannot be downloaded ({reason}); {_advice(name, entry)}") from error


def _advice(name: str, entry: Entry) -> str:
    return f"put {entry.address} at {entry.path}, or give the path of that file: {name} with --weights FILE"


def _fill(model: Any, name: str, state: Mapping[str, Tensor], file: Path) -> None:
    """Load torchvision's file, of earlier versions as well, into its own model."""
    own: dict[str, Tensor] = model.state_dict()
    bias = "roi_heads.box_predictor.cls_score.bias"
    outputs, found = own[bias], state.get(bias)
    if found is not None and len(found) != len(outputs):
        raise CheckpointError(
            f"{file} has {len(found)} outputs, {name} has {len(outputs)} (the background is one): it is a model of other classes; "
            "load it in Python, and give it to detpipe.zoo.from_torchvision"
        )
    unequal = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    refuse_differences(str(file), name, (), (), unequal)
    left = model.load_state_dict(state, strict=False)
    missing, foreign = ([key for key in keys if "num_batches" not in key] for keys in left)
    refuse_differences(str(file), name, missing, foreign, ())


def _without_gaps(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the outputs of ids without a class behind the others, and drop their boxes."""
    categories = _categories()
    known = [label for label, name in enumerate(categories) if label and name != GAP]
    gaps = [label for label, name in enumerate(categories) if name == GAP]
    for kind in ("weight", "bias"):
        classifier, regressor = f"head.classifier.{kind}", f"head.regressor.{kind}"
        state[classifier] = state[classifier][[0, *known, *gaps]]
        state[regressor] = state[regressor].unflatten(0, (-1, 4))[[label - 1 for label in known]].flatten(0, 1)
    return state


def _detectron2_state(name: str, settings: dict[str, Any], file: Path) -> dict[str, Tensor]:
    try:
        return to_own_names(load_plain_pickle(file), settings)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:
        raise CheckpointError(f"{file} does not hold {name}: {error}") from error
