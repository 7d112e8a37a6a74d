import pytest
import torch
from torch import nn

from detpipe.attention import CBAM, ECA, ConcurrentSqueezeExcitation, SpatialSqueezeExcitation, SqueezeExcitation
from detpipe.attention.choice import GATINGS, by_stage, make_gating, open_gates

KINDS = {
    "se": SqueezeExcitation,
    "sse": SpatialSqueezeExcitation,
    "scse": ConcurrentSqueezeExcitation,
    "eca": ECA,
    "cbam": CBAM,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_name_makes_its_module(name):
    assert list(GATINGS) == list(KINDS)
    module = make_gating(name, 64, reduction=4)
    assert type(module) is KINDS[name]
    assert module(torch.rand(2, 64, 3, 5)).shape == (2, 64, 3, 5)


def test_the_arguments_of_the_hidden_layer_arrive():
    squeeze = make_gating("se", 64, reduction=8, bias=False, divisor=1)
    assert squeeze.squeeze.out_channels == 8
    assert squeeze.excite.bias is None
    assert make_gating("scse", 64, reduction=4, bias=False).channel.squeeze.bias is None
    assert make_gating("scse", 64, reduction=4).channel.squeeze.out_channels == 16
    cbam = make_gating("cbam", 66, reduction=6, bias=False, divisor=1)
    assert (cbam.squeeze.out_channels, cbam.squeeze.bias) == (11, None)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"unknown attention 'ce': expected one of \['se', .*did you mean"):
        make_gating("ce", 64)
    with pytest.raises(ValueError, match=r"reduction must be in 1..channels \(8\), got 16"):
        make_gating("se", 8)


def test_stages_are_spelled_out():
    assert by_stage("se", ("c3", "c4")) == {"c3": "se", "c4": "se"}
    assert by_stage(None, ("c3", "c4")) == {"c3": None, "c4": None}
    assert by_stage({"c4": "eca"}, ("c3", "c4")) == {"c3": None, "c4": "eca"}
    assert by_stage("sk", ("c2",), ("se", "sk")) == {"c2": "sk"}
    with pytest.raises(ValueError, match=r"attention: unknown kind 'sk', expected null or one of \['se', "):
        by_stage("sk", ("c2",))
    with pytest.raises(ValueError, match=r"attention: unknown stage 'c5', expected some of \['c3', 'c4'\]"):
        by_stage({"c5": "se"}, ("c3", "c4"))


@pytest.mark.parametrize("name", KINDS)
def test_opened_gates_change_little(name):
    torch.manual_seed(0)
    network = nn.Sequential(make_gating(name, 64))
    features = torch.rand(2, 64, 5, 7)
    open_gates(network)
    ratio = (network(features) / features).mean().item()
    low, high = {"eca": (0.3, 0.7), "scse": (0.6, 1.4)}.get(name, (0.93, 1.0))
    assert low < ratio < high


def test_gates_without_a_bias_stay_as_they_are():
    gate = SqueezeExcitation(64, bias=False)
    before = {name: value.clone() for name, value in gate.state_dict().items()}
    open_gates(gate)
    assert all(torch.equal(value, before[name]) for name, value in gate.state_dict().items())
