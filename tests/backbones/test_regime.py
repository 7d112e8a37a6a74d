import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from detpipe.attention import SelectiveKernel
from detpipe.attention.selective_kernel import SqueezedBatchNorm
from detpipe.backbones.regime import (
    Regime,
    checkpointed,
    convert_norm,
    drop_path_rates,
    find_modules,
    freeze,
    names_within,
)
from detpipe.support.errors import UsageError


def worn(network: nn.Module) -> nn.Module:
    """Give batch norms weights, biases and statistics that no fresh one has."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


def stage(norm=nn.BatchNorm2d) -> nn.Module:
    return worn(
        nn.Sequential(
            nn.Conv2d(4, 64, 3, padding=1, bias=False),
            norm(64),
            nn.ReLU(inplace=True),
            nn.Dropout(0.3),
            StochasticDepth(0.5, "row"),
            nn.Conv2d(64, 6, 1),
            norm(6),
        )
    )


# --- the dataclass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "layer"}, r"norm must be one of \['batch', 'frozen', 'sync', 'group'\], got 'layer'"),
        ({"frozen": "stem"}, "frozen must be a list of names, got 'stem'"),
        ({"frozen": (1,)}, r"frozen must be a list of names, got \(1,\)"),
        ({"drop_path": 1.0}, "drop_path must be in 0..1, below 1, got 1.0"),
        ({"drop_path": -0.1}, "drop_path must be in 0..1"),
        ({"drop_path": float("nan")}, "drop_path must be in 0..1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Regime(**arguments)


def test_a_list_of_names_becomes_a_tuple():
    assert Regime(frozen=["stem"]) == Regime(frozen=("stem",))


def test_drop_path_rises_linearly_to_the_last_block():
    assert drop_path_rates(0.2, 4) == [0.05, 0.1, 0.15, 0.2]
    assert drop_path_rates(0.0, 3) == [0, 0, 0]
    assert drop_path_rates(0.3, 1) == [0.3]


# --- normalization


def test_frozen_norm_computes_what_the_stored_statistics_say():
    live = stage().eval()
    frozen = convert_norm(copy.deepcopy(live), "frozen")
    images = torch.randn(2, 4, 5, 7)
    torch.testing.assert_close(frozen(images), live(images))
    assert [type(module) for module in frozen if "Norm" in type(module).__name__] == [FrozenBatchNorm2d] * 2
    assert not any("1." in name for name, _ in frozen.named_parameters())
    before = copy.deepcopy(frozen.state_dict())
    frozen.train()(images)
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())


def test_what_is_frozen_stays_frozen():
    network = convert_norm(stage(), "frozen")
    modules, state = list(network.modules()), copy.deepcopy(network.state_dict())
    for norm in ("frozen", "group", "sync", "batch"):
        assert convert_norm(network, norm) is network
        assert all(a is b for a, b in zip(network.modules(), modules, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_batch_changes_nothing():
    network = stage()
    modules = list(network.modules())
    assert convert_norm(network, "batch") is network
    assert all(a is b for a, b in zip(network.modules(), modules, strict=True))


def test_sync_is_batch_norm_in_a_single_process():
    live = stage(nn.BatchNorm2d)
    live[3].p, live[4].p = 0.0, 0.0
    sync = convert_norm(copy.deepcopy(live), "sync")
    assert isinstance(sync[1], nn.SyncBatchNorm)
    assert sync.state_dict().keys() == live.state_dict().keys()
    images = torch.randn(2, 4, 5, 7)
    for training in (True, False):
        torch.testing.assert_close(sync.train(training)(images), live.train(training)(images))
    torch.testing.assert_close(sync.state_dict(), live.state_dict())  # statistics moved equally


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 24), (6, 6), (7, 7), (34, 17), (37, 1), (1, 1)])
def test_group_norm_in_as_many_groups_as_fit(channels, groups):
    live = worn(nn.Sequential(nn.BatchNorm2d(channels, eps=1e-3)))
    weight = live[0].weight
    grouped = convert_norm(live, "group")[0]
    assert (grouped.num_groups, grouped.eps) == (groups, 1e-3)
    assert grouped.weight is weight  # an optimizer or a network that shares it keeps it
    images = torch.randn(3, channels, 4, 5)
    expected = images.reshape(3, groups, -1)
    expected = (expected - expected.mean(-1, keepdim=True)) / (
        expected.var(-1, correction=0, keepdim=True) + 1e-3
    ).sqrt()
    expected = expected.reshape(images.shape) * weight[:, None, None] + grouped.bias[:, None, None]
    torch.testing.assert_close(grouped(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["frozen", "sync", "group"])
def test_the_norm_of_a_squeezed_vector(norm):
    kernel = worn(SelectiveKernel(64, 64, groups=2))
    image, other = torch.randn(1, 64, 5, 6), copy.deepcopy(kernel).eval()
    kernel = convert_norm(kernel, norm)
    assert not any(type(module) in (nn.BatchNorm2d, SqueezedBatchNorm) for module in kernel.modules())
    assert kernel.train()(image).isfinite().all()  # of a single image too
    if norm == "group":
        assert kernel.norm.num_groups == 1
    else:
        state = {key: value for key, value in kernel.state_dict().items() if not key.endswith("num_batches_tracked")}
        other.load_state_dict(state, strict=False)
        torch.testing.assert_close(kernel.eval()(image), other(image))


def test_a_norm_by_itself_and_one_without_weights():
    assert isinstance(convert_norm(nn.BatchNorm2d(4), "frozen"), FrozenBatchNorm2d)
    live = nn.Sequential(nn.BatchNorm2d(4, affine=False)).eval()
    images = torch.randn(2, 4, 3, 3)
    expected = live(images)
    for norm in ("frozen", "sync"):
        torch.testing.assert_close(convert_norm(copy.deepcopy(live), norm)(images), expected)
    assert convert_norm(live, "group")[0].weight is None


def test_dtype_mode_and_trainability_stay():
    network = stage().double().eval()
    network[1].requires_grad_(False)
    for norm, kind in (("frozen", FrozenBatchNorm2d), ("sync", nn.SyncBatchNorm), ("group", nn.GroupNorm)):
        converted = convert_norm(copy.deepcopy(network), norm)[1]
        assert isinstance(converted, kind)
        assert converted.weight.dtype == torch.float64
        assert not converted.training
        assert not converted.weight.requires_grad


def test_a_norm_that_cannot_be_replaced_is_named():
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="0: a Own cannot become norm 'group'"):
        convert_norm(nn.Sequential(Own(4)), "group")
    with pytest.raises(ValueError, match="0: a batch norm without statistics cannot be frozen"):
        convert_norm(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)), "frozen")


@pytest.mark.parametrize("norm", ["frozen", "sync", "group"])
def test_timms_norms_keep_their_activation(norm):
    layers = pytest.importorskip("timm.layers")
    live = worn(nn.Sequential(layers.BatchNormAct2d(8, act_layer=nn.SiLU))).eval()
    converted = convert_norm(copy.deepcopy(live), norm)
    assert isinstance(converted[0].act, nn.SiLU)
    images = torch.randn(2, 8, 4, 4)
    if norm == "group":
        expected = nn.functional.silu(nn.functional.group_norm(images, 8, live[0].weight, live[0].bias))
    else:
        expected = live(images)
    torch.testing.assert_close(converted(images), expected)


# --- frozen parts


def test_frozen_parts_are_found_by_name_and_stay():
    network = nn.ModuleDict({"stem": stage(), "c2": stage()})
    modules = find_modules(network, ["stem", "c2.1"])
    assert modules == [network["stem"], network["c2"][1]]
    freeze(modules)
    assert not network["stem"].training
    assert network["c2"].training
    assert not network["c2"][1].training
    fixed = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert fixed == {name for name, _ in network.named_parameters() if name.startswith(("stem.", "c2.1."))}
    with pytest.raises(UsageError, match=r"frozen: no parameters under 'stam'; did you mean 'stem'"):
        find_modules(network, ["stam"])
    with pytest.raises(UsageError, match=r"frozen: no parameters under 'c2\.2'"):  # a ReLU
        find_modules(network, ["c2.2"])


def test_names_of_stages_are_checked():
    assert names_within(("c3", "stem"), ["stem", "c2", "c3"]) == ("stem", "c3")
    with pytest.raises(UsageError, match=r"no stage 'stm'; did you mean 'stem'\?; expected some of \['stem', 'c2'\]"):
        names_within(("stm",), ["stem", "c2"])


# --- checkpointing


def trained_step(network: nn.Module, images: torch.Tensor, checkpointing: bool, passes: int = 1):
    network, images = copy.deepcopy(network), images.clone().requires_grad_()
    torch.manual_seed(3)
    outputs = [checkpointed(network, images) if checkpointing else network(images) for _ in range(passes)]
    sum(output.square().sum() for output in outputs).backward()
    after = torch.rand(1)  # the random numbers that follow are the same too
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {
        "outputs": outputs,
        "image": images.grad,
        "gradients": gradients,
        "state": network.state_dict(),
        "rng": after,
    }


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("passes", [1, 2])
def test_checkpointing_changes_nothing(norm, momentum, passes):
    network, images = stage(norm), torch.randn(3, 4, 6, 5)
    network[1].momentum = momentum
    plain, again = (trained_step(network, images, checkpointing, passes) for checkpointing in (False, True))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    assert again["state"]["1.num_batches_tracked"] == passes  # not moved by the second computation
    assert not torch.equal(again["state"]["1.running_mean"], network[1].running_mean)


def test_the_second_computation_sees_the_statistics_of_the_first():
    kernel = worn(SelectiveKernel(64, 64, groups=2))  # of a single image it normalizes by stored statistics
    image, batch = torch.randn(1, 64, 5, 6), torch.randn(3, 64, 5, 6)

    def gradient(checkpointing: bool, later_batch: bool) -> torch.Tensor:
        network = copy.deepcopy(kernel)
        output = checkpointed(network, image) if checkpointing else network(image)
        if later_batch:
            with torch.no_grad():
                network(batch)  # moves the statistics before the backward pass
        output.square().sum().backward()
        return network.squeeze.weight.grad

    torch.testing.assert_close(gradient(True, True), gradient(False, False), rtol=0, atol=0)


def test_a_module_that_writes_into_its_input_is_refused():
    network = nn.Sequential(nn.Hardswish(inplace=True), nn.Conv2d(2, 2, 1))
    features = torch.randn(1, 2, 3, 3, requires_grad=True) * 2
    with pytest.raises(ValueError, match=r"Sequential writes into its input.*set checkpointing to false"):
        checkpointed(network, features)


def test_two_backward_passes_through_one_checkpoint():
    network, images = stage(), torch.randn(3, 4, 6, 5)
    output = checkpointed(network, images)
    state = copy.deepcopy(network.state_dict())
    output.sum().backward(retain_graph=True)
    first = network[0].weight.grad.clone()
    output.sum().backward()
    torch.testing.assert_close(network[0].weight.grad, 2 * first)
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)


def test_checkpointing_only_where_something_is_trained(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("checkpointed")

    monkeypatch.setattr("detpipe.backbones.regime.checkpoint", refuse)
    network, images = stage(), torch.randn(3, 4, 6, 5)
    with torch.no_grad():
        checkpointed(network, images)
    checkpointed(network.eval(), images)
    with pytest.raises(AssertionError, match="checkpointed"):
        checkpointed(network.train(), images)


@pytest.mark.parametrize("norm", ["batch", "frozen", "group"])
def test_eps_of_every_norm(norm):
    network = convert_norm(stage(), norm, 0.25)
    found = [module.eps for module in network.modules() if hasattr(module, "eps")]
    assert found
    assert set(found) == {0.25}
    assert {module.eps for module in convert_norm(stage(), norm).modules() if hasattr(module, "eps")} == {1e-5}


def test_eps_is_positive_but_for_frozen_norms():
    assert Regime(norm="frozen", eps=0.0).eps == 0
    for norm, eps in (("batch", 0.0), ("frozen", -1.0), ("group", 1.0)):
        with pytest.raises(ValueError, match=r"eps must be in 0..1"):
            Regime(norm=norm, eps=eps)
