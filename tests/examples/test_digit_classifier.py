from __future__ import annotations

import warnings

import pytest
import torch
import yaml
from lightning import Trainer
from runs import CONFIGS

from detpipe.optimization import Optimizer
from stn_digits.classifier import MODELS, DigitClassifier, Model
from stn_digits.digits import DistortedDigits

TRANSFORMERS = [model for model in MODELS if model != "cnn"]


def size(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("parameters", [30_000, 60_000, 200_000])
def test_all_models_have_as_many_parameters(parameters: int) -> None:
    sizes = [size(DigitClassifier(model, parameters)) for model in MODELS]
    assert max(sizes) <= 1.02 * min(sizes)
    assert all(abs(found - parameters) <= 262 for found in sizes)  # half of what a hidden number costs


def test_the_study_compares_networks_of_one_size() -> None:
    asked = yaml.safe_load((CONFIGS / "stn_digits.yaml").read_text())
    sizes = [size(DigitClassifier(model, asked["parameters"], asked["glimpse"])) for model in asked["models"]]
    assert len(sizes) == 4
    assert max(sizes) <= 1.02 * min(sizes)


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_a_transformer_starts_at_the_identity(model: Model) -> None:
    classifier, images = DigitClassifier(model).eval(), torch.rand(3, 1, 28, 28)
    seen = classifier.transform(images)
    assert torch.equal(seen.output, images)
    logits = classifier.head(classifier.features(images).flatten(1))
    assert torch.equal(classifier(images), logits)
    assert classifier.transform(torch.rand(3, 1, 42, 50)).output.shape == (3, 1, 28, 28)


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_what_a_transformer_reads_outside_is_empty(model: Model) -> None:
    classifier = DigitClassifier(model).eval()
    assert classifier.transformer is not None
    theta = classifier.transformer.localization[1].choose.theta  # type: ignore[index,union-attr]
    with torch.no_grad():
        theta.bias += 3 * (torch.eye(3)[2].repeat(3)[: len(theta.bias)] if model != "tps" else torch.ones(32))
        output = classifier.transform(torch.ones(1, 1, 28, 28)).output
    assert output[0, 0, -1, -1] == 0


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_learns_after_the_first_step(model: Model) -> None:
    classifier = DigitClassifier(model)
    steps = torch.optim.SGD(classifier.parameters(), lr=0.01)
    images, labels = torch.rand(6, 1, 42, 42), torch.arange(6)
    for _ in range(2):  # the first step moves what is zero at the start
        steps.zero_grad()
        torch.nn.functional.cross_entropy(classifier(images), labels).backward()
        steps.step()
    still = [name for name, parameter in classifier.named_parameters() if not parameter.grad.abs().sum() > 0]  # type: ignore[union-attr]
    assert still == []


def test_the_localization_network_learns_more_slowly() -> None:
    optimizer = Optimizer("adamw", lr=0.004, weight_decay=0.1, backbone_scale=0.25)
    rates: dict[str, set[float]] = {}
    for model in ("cnn", "affine"):
        classifier = DigitClassifier(model, optimizer=optimizer)
        trainer = Trainer(
            accelerator="cpu",
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice
            trainer.fit(classifier, datamodule=DistortedDigits("R"))
        own = {id(parameter) for parameter in (classifier.transformer or torch.nn.Module()).parameters()}
        [built] = trainer.optimizers
        assert sum(len(group["params"]) for group in built.param_groups) == len(list(classifier.parameters()))
        for group in built.param_groups:
            for parameter in group["params"]:
                part = "localization" if id(parameter) in own else model
                rates.setdefault(part, set()).add(group["initial_lr"])
    assert rates == {"cnn": {0.004}, "affine": {0.004}, "localization": {0.001}}


def test_it_learns_by_heart() -> None:
    images, labels = DistortedDigits("R").train_epoch(0)
    images, labels = images[:20], labels[:20]
    classifier = DigitClassifier("affine", parameters=30_000)
    assert classifier.transformer is not None
    steps = classifier.optimizer.build(classifier.transformer, classifier.features, classifier.head)
    for _ in range(60):
        steps.zero_grad()
        torch.nn.functional.cross_entropy(classifier(images), labels).backward()
        steps.step()
    assert classifier(images).argmax(dim=1).tolist() == labels.tolist()
    assert not torch.equal(classifier.transform(images).output, images)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="model must be one of cnn, affine, projective, tps, got 'thin'"):
        DigitClassifier("thin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="glimpse must be at least 8 pixels, got 7"):
        DigitClassifier("affine", glimpse=7)
    with pytest.raises(ValueError, match=r"parameters must be at least [0-9]+ for 'tps', got 9000") as caught:
        DigitClassifier("tps", parameters=9000)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert size(DigitClassifier("tps", parameters=least)) == least
    with pytest.raises(ValueError, match="has no transformer"):
        DigitClassifier("cnn").transform(torch.zeros(1, 1, 28, 28))


@pytest.mark.parametrize("model", ["cnn", "tps"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 3, 28, 28), (2, 1, 7, 28)])
def test_bad_images(model: Model, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be floating-point \[N, 1, S, S\].*got \["):
        DigitClassifier(model)(torch.zeros(shape))
    with pytest.raises(ValueError, match="uint8"):
        DigitClassifier(model)(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
