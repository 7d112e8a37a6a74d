"""One training of the spatial-transformer study, and the file that it leaves: weights, settings and result in one.

The file appears when the run has ended, so a study that was interrupted knows what is still to do.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from detpipe.optimization import LRSchedule, Optimizer
from detpipe.support.errors import TrainingError, UsageError
from detpipe.support.files import atomic_write
from stn_digits.classifier import OPTIMIZER, SCHEDULE, DigitClassifier, Model
from stn_digits.digits import DistortedDigits, Distortion
from stn_digits.pictures import Film

KEY = "detpipe"  # of the metadata in a run's file
FILMED = 8  # digits in an animation


@dataclass(frozen=True)
class Recipe:
    """How each network of a study is trained.

    Args:
        epochs: over the digits to train on, at least 1.
        batch_size: images a step.
        parameters: of each network, to within half a percent.
        glimpse: side of what a transformer hands on, pixels.
        optimizer: how weights are updated; ``backbone_scale`` is the factor of the localization network's learning rate.
        lr_scheduler: how the learning rate changes.
        test_views: how often each digit of the test is distorted.
        split: decides which digits are kept for the test.

    Raises:
        ValueError: a number below its least.
    """

    epochs: int = 30
    batch_size: int = 32
    parameters: int = 60_000
    glimpse: int = 28
    optimizer: Optimizer = OPTIMIZER
    lr_scheduler: LRSchedule = SCHEDULE
    test_views: int = 5
    split: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "test_views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.split < 0:
            raise ValueError(f"split must be at least 0, got {self.split}")


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    error: float  # percent of the test images that are classified wrongly
    parameters: int  # of the network
    seconds: float  # of a processor, for training and test: what else runs on the machine adds little to them


@dataclass(frozen=True)
class Run:
    """One network, one distortion, one seed."""

    distortion: Distortion
    model: Model
    seed: int  # of the weights, and of the order and distortions in training
    recipe: Recipe
    folder: Path  # of the study
    filmed: bool = False  # whether an animation is made along

    @property
    def file(self) -> Path:
        """Weights, settings and result."""
        return self.folder / f"{self.distortion}_{self.model}_{self.seed}.safetensors"

    @property
    def film(self) -> Path:
        """The animation."""
        return self.file.with_suffix(".gif")

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.file.is_file() and (not self.filmed or self.film.is_file())

    def data(self) -> DistortedDigits:
        """Make the digits."""
        recipe = self.recipe
        return DistortedDigits(self.distortion, recipe.batch_size, recipe.test_views, self.seed, recipe.split)

    def network(self) -> DigitClassifier:
        """Make the network, with random weights; a ValueError for too few parameters."""
        recipe = self.recipe
        return DigitClassifier(self.model, recipe.parameters, recipe.glimpse, recipe.optimizer, recipe.lr_scheduler)

    def trained(self) -> DigitClassifier:
        """Load the network of a finished run; a UsageError where the file is none."""
        network = self.network()
        try:
            network.load_state_dict(load_file(self.file))
        except (SafetensorError, RuntimeError, OSError) as error:
            raise UsageError(_not_a_run(self.file)) from error
        return network.eval()

    def result(self) -> Result:
        """Read the result of a finished run; a UsageError where the file is none, or one of other settings."""
        try:
            with safe_open(self.file, "pt") as stored:
                known = json.loads(stored.metadata()[KEY])
            recipe, result = known["recipe"], Result(**known["result"])
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise UsageError(_not_a_run(self.file)) from error
        asked = _plain(self.recipe)
        for key in asked:
            if recipe.get(key) != asked[key]:
                raise UsageError(
                    f"{self.file} holds a finished run with {key} {recipe.get(key)}, asked for {asked[key]}; give another folder "
                    "with -o, or remove it"
                )
        return result


def train(run: Run) -> Result:
    """Train and test a network, and write its file when that has ended; a TrainingError if its weights are no longer finite."""
    seed_everything(run.seed, verbose=False)
    start = time.process_time()
    network, data = run.network(), run.data()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=run.recipe.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=_film(run, data) if run.filmed else [],
    )
    trainer.fit(network, datamodule=data)
    if not all(parameter.isfinite().all() for parameter in network.parameters()):
        raise TrainingError(f"{run.file.stem}: the weights are no longer finite; lower optimizer.lr")
    [numbers] = trainer.test(network, datamodule=data, verbose=False)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    seconds = round(time.process_time() - start, 2)
    result = Result(round(100 * numbers["test/error"], 4), parameters, seconds)
    metadata = {KEY: json.dumps({"recipe": _plain(run.recipe), "result": asdict(result)})}
    with atomic_write(run.file) as temporary:
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, temporary, metadata)
    return result


def _film(run: Run, data: DistortedDigits) -> list[Callback]:
    images, labels = data.test_set()
    return [Film(images[:FILMED], labels[:FILMED], f"{run.distortion}, {run.model} transformer", run.film)]


def _plain(recipe: Recipe) -> dict[str, Any]:
    """A recipe as it comes back from JSON."""
    return json.loads(json.dumps(asdict(recipe)))


def _not_a_run(file: Path) -> str:
    return f"{file} is not the file of a finished run of this study; give another folder with -o, or remove it"
