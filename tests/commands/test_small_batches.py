import pytest

from detpipe.backbones import Regime, SEResNet
from detpipe.commands.training import LEAST_IMAGES, small_batches


@pytest.mark.parametrize("norm", ["batch", "group", "frozen"])
def test_batch_normalization_is_not_trained_on_few_images_without_a_word(norm: str) -> None:
    backbone = SEResNet(18, levels=["c2"], regime=Regime(norm)).train()
    warning = small_batches(backbone, LEAST_IMAGES - 1)
    assert (warning is not None) == (norm == "batch")
    assert warning is None or "trained on 7 images a device; with fewer than 8" in warning
    assert small_batches(backbone, LEAST_IMAGES) is None


def test_frozen_stages_are_not_trained() -> None:
    backbone = SEResNet(18, levels=["c2"], regime=Regime(frozen=("stem", "c2"))).train()
    assert small_batches(backbone, 2) is None
