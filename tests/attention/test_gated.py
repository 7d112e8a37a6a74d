import copy
import io

import pytest
import torch
from torch import nn

from detpipe.attention import CBAM, ECA, SqueezeExcitation
from detpipe.attention.gated import Gated


class Scale(nn.Module):
    def forward(self, features):
        return 2 * features


def branch():
    return nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8)})


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = branch()

    def forward(self, features):
        return self.parts["norm"](self.parts["conv"](features))


def network(gated=True):
    plain = nn.Sequential(Branch(), nn.ReLU())
    if gated:
        plain[0] = Gated(plain[0], SqueezeExcitation(8, 2))
    return plain.eval()


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
OLD = ["conv.weight", "conv.bias", *(f"norm.{key}" for key in NORM)]


def test_gates_what_the_module_returns():
    gated, features = Gated(nn.Conv2d(3, 8, 3), SqueezeExcitation(8, 2)), torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(gated(features), gated.attention(gated.module(features)), rtol=0, atol=0)


def test_channels_last():
    gated, features = Gated(nn.Linear(5, 8), CBAM(8, 2), channels_last=True), torch.randn(2, 4, 6, 5)
    expected = gated.attention(gated.module(features).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(gated(features), expected, rtol=0, atol=0)


def test_state_keeps_its_names():
    plain, gated = network(gated=False), network()
    old, new = plain.state_dict(), gated.state_dict()
    assert list(old) == [f"0.parts.{key}" for key in OLD]
    assert list(new)[: len(old)] == list(old)
    assert list(new)[len(old) :] == [f"0.attention.{key}" for key in gated[0].attention.state_dict()]
    assert new["0.parts.conv.weight"].data_ptr() == gated[0].module.parts["conv"].weight.data_ptr()
    assert list(gated[0].state_dict()) == [key.removeprefix("0.") for key in new]  # on its own as well


def test_weights_from_before_load():
    old, gated = network(gated=False).state_dict(), network()
    reported = gated.load_state_dict(old, strict=False)
    assert reported.missing_keys == [f"0.attention.{key}" for key in gated[0].attention.state_dict()]
    assert reported.unexpected_keys == []
    torch.testing.assert_close(gated.state_dict()["0.parts.conv.weight"], old["0.parts.conv.weight"], rtol=0, atol=0)
    assert list(old) == [f"0.parts.{key}" for key in OLD]  # the caller's dictionary is his own


def test_weights_from_after_load():
    first, second = network(), network()
    assert second.load_state_dict(first.state_dict(), strict=True)
    features = torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(second(features), first(features), rtol=0, atol=0)


def test_a_module_with_attention_is_refused():
    with pytest.raises(ValueError, match=r"Gated has a child called attention already"):
        Gated(Gated(Scale(), ECA(8)), ECA(8))  # both would have the same names in a state dict


def test_what_does_not_load_is_named_as_in_the_state():
    state = network().state_dict()
    state["0.parts.conv.wieght"] = state.pop("0.parts.conv.weight")
    reported = network().load_state_dict(state, strict=False)
    assert reported.missing_keys == ["0.parts.conv.weight"]
    assert reported.unexpected_keys == ["0.parts.conv.wieght"]
    state = {**network().state_dict(), "0.parts.conv.bias": torch.zeros(9)}
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.parts\.conv\.bias"):
        network().load_state_dict(state)


def test_copies_are_independent():
    gated, features = network(), torch.randn(2, 3, 6, 7)
    stored = io.BytesIO()
    torch.save(gated, stored)
    stored.seek(0)
    for other in (copy.deepcopy(gated), torch.load(stored, weights_only=False)):
        torch.testing.assert_close(other(features), gated(features), rtol=0, atol=0)
        changed = {key: torch.zeros_like(value) for key, value in gated.state_dict().items()}
        other.load_state_dict(changed)
        assert not other.state_dict()["0.parts.conv.weight"].any()
        assert gated.state_dict()["0.parts.conv.weight"].any()


def test_hooks_see_the_gated_output_and_can_go():
    module, seen = Scale(), []
    handle = module.register_forward_hook(lambda *hooked: seen.append(hooked[-1]))
    gated, features = Gated(module, ECA(4)), torch.randn(1, 4, 3, 3)
    output = gated(features)
    assert len(seen) == 1
    assert seen[0] is output
    handle.remove()
    gated(features)
    assert len(seen) == 1


def test_the_network_around_can_read_the_module_through_it():
    """timm's EdgeNeXt asks a convolution for the device of its weight."""
    conv = torch.nn.Conv2d(3, 4, 1)
    gated = Gated(conv, ECA(4))
    assert gated.weight is conv.weight
    assert gated.out_channels == 4
    assert not hasattr(gated, "nothing")
    with pytest.raises(AttributeError, match="'Conv2d' object has no attribute 'nothing'"):
        _ = gated.nothing
