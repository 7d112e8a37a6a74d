from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from PIL import Image
from torch import nn

from detpipe import cli, detector
from detpipe.commands import training
from detpipe.pictures.run_pictures import TrainingPicture, ValidationPicture
from detpipe.pictures.visualize import contact_sheet
from detpipe.support.errors import TrainingError
from detpipe.training.callbacks import (
    NONFINITE_BATCH,
    MeanAveragePrecision,
    StepSeed,
    StopOnNonFinite,
    Throughput,
    ValidateLastStep,
)
from detpipe.training.configuration import CLI, quiet
from detpipe.training.trainer import build_trainer


def built(root: Path, *options: str) -> CLI:
    quiet()
    cli = CLI([runs.CONFIG, *runs.options(root), *options], training.add_arguments)
    torch.manual_seed(0)
    return cli


def trainer_of(cli: CLI, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    settings = {**cli.trainer_settings, "logger": False, "enable_progress_bar": False, **options}
    return build_trainer(settings, folder, callbacks)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_parameters()}


class PoisonAt(StepSeed):
    """Spoil a step: the pixels of an image, or a gradient."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(0)
        self.step, self.what = step, what
        self.names: list[str] = []
        self.before: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if trainer.global_step == self.step:
            self.before = state(pl_module)
            self.names = [target["file_name"] for target in batch[1]]
            if self.what == "image":
                batch[0][0] = batch[0][0].float() / 255
                batch[0][0][0, 5, 5] = torch.nan

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.step and self.what == "gradient":
            pl_module.head.classifier.weight.grad[0, 0] = torch.inf


@pytest.mark.parametrize(
    ("what", "told", "options"),
    [
        ("image", "proposals of the RPN: image {}: a score is nan", []),
        ("image", "the loss is nan", ["--model.proposals", "DenseGrid"]),
        ("gradient", "the gradient of head.classifier.weight is not finite", []),
    ],
)
def test_row_36_training_stops_before_a_nan_reaches_the_weights(what, told, options, demo_root, tmp_path):
    cli, poison = built(demo_root, *options), PoisonAt(2, what)
    trainer = trainer_of(cli, tmp_path, poison, StopOnNonFinite(tmp_path))
    with pytest.raises(TrainingError) as caught:
        trainer.fit(cli.model, datamodule=cli.datamodule)
    message = str(caught.value)
    assert message.startswith(
        f"step 2: {told.format(poison.names[0])}; the weights were not changed. Images of the batch: {', '.join(poison.names)} "
    )
    assert f"(saved in {tmp_path / NONFINITE_BATCH})" in message
    assert "\n" not in message
    after = state(cli.model)
    assert all(torch.equal(after[name], value) for name, value in poison.before.items())
    batch = torch.load(tmp_path / NONFINITE_BATCH, weights_only=True)
    assert batch["step"] == 2
    assert [target["file_name"] for target in batch["targets"]] == batch["file_names"] == poison.names
    assert len(batch["images"]) == 4
    assert bool(torch.isnan(batch["images"][0].float()).any()) == (what == "image")


def test_row_36_through_the_command(demo_root, tmp_path, monkeypatch, capsys):
    """Status 1, one line, and the batch stays in the run folder even when the first step fails."""
    monkeypatch.setattr(detector, "total_loss", lambda losses: sum(losses.values()) * torch.nan)
    folder = tmp_path / "run"
    assert cli.main(["train", runs.CONFIG, "--output", str(folder), *runs.options(demo_root)]) == 1
    shown = capsys.readouterr().err
    assert "detpipe: error: step 0: the loss is nan; the weights were not changed. Images of the batch: 0000" in shown
    assert "Traceback" not in shown
    assert (folder / NONFINITE_BATCH).is_file()
    assert not list(folder.glob("*.ckpt"))


def test_limited_validation_is_evaluated_on_the_images_that_were_seen(demo_root, tmp_path):
    cli = built(demo_root, "--data.loader.eval_batch_size", "2")
    average = MeanAveragePrecision()
    trainer = trainer_of(cli, tmp_path, average, limit_val_batches=1)
    seen: list[int] = []
    detections = {}

    def perfect(batch: Any, batch_idx: int) -> list[Any]:
        seen.extend(int(target["image_id"]) for target in batch[1])
        found = [{**{k: t[k] for k in ("boxes", "labels")}, "scores": torch.ones(len(t["labels"]))} for t in batch[1]]
        detections.update({int(t["image_id"]): d for t, d in zip(batch[1], found, strict=True)})
        return found

    cli.model.validation_step = perfect  # type: ignore[method-assign]
    trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    assert len(seen) == 2
    assert sum(len(found["labels"]) for found in detections.values()) > 0
    assert average.metrics["AP"] == average.metrics["AP50"] == pytest.approx(1.0)
    assert trainer.callback_metrics["val/AP"] == pytest.approx(1.0)
    assert average.state_dict()["metrics"] == average.metrics


def test_pictures_show_the_validation_images_and_no_more_than_asked(demo_root, tmp_path):
    cli = built(demo_root, "--trainer.limit_train_batches", "1", "--trainer.max_epochs", "1")
    few, all_, one = (ValidationPicture(tmp_path / str(n), cli.datamodule.class_names, images=n) for n in (2, 12, 1))
    trainer_of(cli, tmp_path, few, all_, one).fit(cli.model, datamodule=cli.datamodule)
    areas = []
    for n in (1, 2, 12):
        with Image.open(tmp_path / str(n) / "validation.png") as picture:
            areas.append(picture.width * picture.height)
    assert areas[0] < areas[1] < areas[2]


def test_pictures_show_the_first_training_images_as_the_model_gets_them(demo_root, tmp_path, monkeypatch):
    """Five of twelve images in batches of four, or all of them where there are fewer than are to be drawn; once a run."""
    drawn: dict[int, list[tuple[torch.Tensor, Any]]] = {5: [], 50: []}
    titles = []

    def sheet(images: Any, targets: Any, class_names: Any, title: str, **settings: Any) -> torch.Tensor:
        titles.append(title)
        drawn[5 if len(images) == 5 else 50] += zip(images, targets, strict=True)
        return contact_sheet(images, targets, class_names, title, **settings)

    monkeypatch.setattr("detpipe.pictures.visualize.contact_sheet", sheet)
    cli = built(demo_root, "--trainer.max_epochs", "2", "--data.augment.flip", "1.0")
    pictures = [TrainingPicture(tmp_path / str(n), cli.datamodule.class_names, n) for n in drawn]
    trainer_of(cli, tmp_path, *pictures, limit_val_batches=0).fit(cli.model, datamodule=cli.datamodule)
    assert titles == ["training images of epoch 0, as the model gets them"] * 2
    batches = list(built(demo_root, "--data.augment.flip", "1.0").datamodule.train_dataloader())
    expected = [pair for images, targets in batches for pair in zip(images, targets, strict=True)]
    assert len(expected) == len(drawn[50]) == 12
    for found in drawn.values():
        for (image, target), (wanted, truth) in zip(found, expected, strict=False):
            assert torch.equal(image, wanted)
            assert torch.equal(target["boxes"], truth["boxes"])
    for n in drawn:
        with Image.open(tmp_path / str(n) / "training.png") as picture:
            assert min(picture.size) > 200


def test_a_sanity_check_draws_nothing(demo_root, tmp_path):
    cli = built(demo_root, "--trainer.limit_train_batches", "0", "--trainer.num_sanity_val_steps", "1")
    trainer = trainer_of(cli, tmp_path, ValidationPicture(tmp_path, cli.datamodule.class_names))
    trainer.fit(cli.model, datamodule=cli.datamodule)
    assert not (tmp_path / "validation.png").exists()


class Draws(StepSeed):
    """Note what a step would draw."""

    def __init__(self, seed: int, disturbed: bool) -> None:
        super().__init__(seed)
        self.disturbed = disturbed
        self.drawn: dict[int, float] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.disturbed:
            torch.rand(7)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.drawn[trainer.global_step] = torch.rand(1).item()


def test_the_draws_of_a_step_depend_on_seed_and_step_alone(demo_root, tmp_path):
    draws = [Draws(0, False), Draws(0, True), Draws(1, False)]
    for one in draws:
        cli = built(demo_root, "--trainer.max_epochs", "1")
        trainer_of(cli, tmp_path, one, limit_val_batches=0).fit(cli.model, datamodule=cli.datamodule)
    assert draws[0].drawn == draws[1].drawn
    assert len(set(draws[0].drawn.values()) | set(draws[2].drawn.values())) == 6


class PartDraws(StepSeed):
    """Note what each batch would draw."""

    def __init__(self) -> None:
        super().__init__(0)
        self.drawn: list[tuple[int, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.drawn.append((trainer.global_step, torch.rand(1).item()))


def test_batches_of_an_accumulated_step_draw_for_themselves(demo_root, tmp_path):
    """Twelve images in batches of four: two batches for the first step of an epoch, one for the second."""
    draws = PartDraws()
    cli = built(demo_root, "--trainer.max_epochs", "2", "--trainer.accumulate_grad_batches", "2")
    trainer_of(cli, tmp_path, draws, limit_val_batches=0).fit(cli.model, datamodule=cli.datamodule)
    assert [step for step, _ in draws.drawn] == [0, 0, 1, 2, 2, 3]
    assert len({number for _, number in draws.drawn}) == 6


class Names(StepSeed):
    """Note the images of each batch."""

    def __init__(self) -> None:
        super().__init__(0)
        self.seen: list[list[str]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append([target["file_name"] for target in batch[1]])


@pytest.mark.slow
@pytest.mark.parametrize(("options", "same"), [({"overfit_batches": 2}, True), ({"limit_train_batches": 2}, False)])
def test_overfitting_has_the_same_images_in_every_epoch(options, same, demo_root, tmp_path):
    names, cli = Names(), built(demo_root, "--trainer.max_epochs", "3")
    trainer_of(cli, tmp_path, names, **options).fit(cli.model, datamodule=cli.datamodule)
    assert len(names.seen) == 6
    assert (names.seen[:2] == names.seen[2:4] == names.seen[4:]) == same


def test_throughput_counts_training_images_only(demo_root, tmp_path):
    cli, speed = built(demo_root), Throughput()
    assert speed.images_per_second == 0
    trainer_of(cli, tmp_path, speed).fit(cli.model, datamodule=cli.datamodule)
    assert speed.images == 24
    assert speed.images_per_second == 24 / speed.seconds


def test_a_last_step_in_the_middle_of_an_epoch_is_validated(demo_root, tmp_path):
    for last_step, validations in ((4, 2), (3, 1)):
        cli = built(demo_root, "--trainer.max_epochs", "-1")
        counted: list[int] = []
        counting = LambdaCallback(on_validation_epoch_start=lambda *_, counted=counted: counted.append(1))
        trainer = trainer_of(cli, tmp_path, ValidateLastStep(), counting, max_steps=last_step)
        trainer.fit(cli.model, datamodule=cli.datamodule)
        assert (trainer.global_step, len(counted)) == (last_step, validations)


@pytest.mark.parametrize(
    "kept", [{"AP": 0.5, "epoch": 1}, '{"AP": 0.5, "epoch": 1}'], ids=["numbers", "text, as before"]
)
def test_numbers_come_back_from_a_checkpoint(kept):
    assert MeanAveragePrecision.stored({"callbacks": {"MeanAveragePrecision": {"metrics": kept}}}) == {
        "AP": 0.5,
        "epoch": 1,
    }
    assert MeanAveragePrecision.stored({"callbacks": {}}) == {}
    callback = MeanAveragePrecision()
    callback.load_state_dict({"metrics": kept})
    assert callback.state_dict() == {"metrics": {"AP": 0.5, "epoch": 1}}
