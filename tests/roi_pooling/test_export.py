"""The operators inside other people's programs: ONNX, graph tracing, TorchScript, a plain module."""

import pytest
import runs
import torch
from torch import Tensor, nn
from torchvision import ops as torchvision_ops

from detpipe.roi_pooling import MultiLevel, RoIAlign, precise_roi_pool, roi_align, roi_max_pool
from detpipe.roi_pooling.align import _gridded
from detpipe.roi_pooling.layouts import to_rois

ROIS = torch.tensor([[0, 1.0, 2, 30, 20], [0, 3, 5, 17, 31.5], [0, -3, -4, 7, 9]])


class Network(nn.Module):
    """A convolution, and a pooler behind it that is given in one of several ways."""

    def __init__(self, pool):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.pool = pool

    def forward(self, images, rois):
        return self.pool(self.convolution(images), rois)


class OneLevel(nn.Module):
    def __init__(self, sampling_ratio):
        super().__init__()
        self.pooler = RoIAlign((3, 2), sampling_ratio=sampling_ratio)

    def forward(self, features, rois):
        return self.pooler({"f": features}, rois[None, :, 1:], {"f": 2})[0]


class TwoLevels(nn.Module):
    def __init__(self):
        super().__init__()
        self.pooler = MultiLevel(RoIAlign(3), {"p1": 2, "p2": 4})

    def forward(self, features, rois):
        return self.pooler({"p1": features, "p2": features[:, :, ::2, ::2]}, rois)


class Function(nn.Module):
    def __init__(self, sampling_ratio, aligned):
        super().__init__()
        self.settings = (sampling_ratio, aligned)

    def forward(self, features, rois):
        return roi_align(features, rois, (3, 5), 0.5, *self.settings)


POOLS = [Function(2, True), Function(0, True), Function(2, False), OneLevel(2), OneLevel(0), TwoLevels()]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the exporter's own
@pytest.mark.parametrize("pool", runs.mostly_slow(POOLS, POOLS[0], POOLS[-1]), ids=lambda pool: type(pool).__name__)
def test_onnx_equals_eager(pool, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    torch.manual_seed(0)
    network, images = Network(pool).eval(), torch.randn(1, 3, 32, 40)
    shapes = {"images": None, "rois": {0: torch.export.Dim("R")}}
    program = torch.onnx.export(network, (images, ROIS), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "network.onnx")
    session = runtime.InferenceSession(tmp_path / "network.onnx")
    names = [given.name for given in session.get_inputs()]
    for rois in (ROIS, torch.cat((ROIS + 1, ROIS * 1.3)) * torch.tensor([0, 1, 1, 1, 1])):
        result = session.run(None, dict(zip(names, (images.numpy(), rois.numpy()), strict=True)))[0]
        with torch.no_grad():
            expected = network(images, rois)
        torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [1, 2])
def test_pytorchs_own_operators_pool_the_same(samples, aligned):
    features = torch.randn(2, 3, 9, 11)
    corner = torch.rand(2, 30, 2) * 70 - 10
    boxes = torch.cat((corner, corner + torch.rand(2, 30, 2) * 60 + 0.1), dim=2)
    expected = roi_align(features, boxes, (3, 2), 1 / 8, samples, aligned).flatten(0, 1)
    found = _gridded(features, to_rois(boxes), (3, 2), 1 / 8, samples, aligned)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_exported_program_equals_eager():
    network, images = Network(Function(2, True)).eval(), torch.randn(1, 3, 32, 40)
    program = torch.export.export(network, (images, ROIS)).module()
    torch.testing.assert_close(program(images, ROIS), network(images, ROIS))


@pytest.mark.parametrize("operator", [roi_align, roi_max_pool, precise_roi_pool])
def test_is_one_node_of_a_traced_graph(operator):
    class Pool(nn.Module):
        def forward(self, features, rois):
            return operator(features, rois, 3) * 2

    features = torch.randn(1, 2, 40, 40)
    traced = torch.fx.symbolic_trace(Pool())
    assert next(node.target for node in traced.graph.nodes if node.op == "call_function") is operator
    assert torch.equal(traced(features, ROIS), Pool()(features, ROIS))


class ScriptedAlign(nn.Module):
    def forward(self, features: Tensor, boxes: list[Tensor]) -> Tensor:
        return roi_align(features, boxes, [3, 3], 1.0, 2, False)


class ScriptedMaxPool(nn.Module):
    def forward(self, features: Tensor, boxes: list[Tensor]) -> Tensor:
        return roi_max_pool(features, boxes, [3, 3], 1.0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize(("operator", "module"), [(roi_align, ScriptedAlign()), (roi_max_pool, ScriptedMaxPool())])
def test_runs_inside_torchscript(operator, module):
    features = torch.randn(1, 2, 40, 40, requires_grad=True)
    scripted = torch.jit.script(operator)
    for size in (3, [2, 3]):
        assert torch.equal(scripted(features, ROIS, size), operator(features, ROIS, size))
        assert torch.equal(scripted(features, [ROIS[:, 1:]], size), operator(features, [ROIS[:, 1:]], size))
    scripted(features, ROIS, 3).sum().backward()
    assert features.grad is not None
    scripted = torch.jit.script(module)
    assert torch.equal(scripted(features, [ROIS[:, 1:]]), module(features, [ROIS[:, 1:]]))
    flat = torch.tensor([[3.0, 4.0, 3.0, 9.0], [6.0, 9.0, 2.0, 1.0]])  # torchvision takes them, and its tests have some
    peer = torchvision_ops.roi_align if operator is roi_align else torchvision_ops.roi_pool
    settings = (3, 1.0, 2, False) if operator is roi_align else (3, 1.0)
    pooled, expected = scripted(features, [flat]), peer(features, [flat], *settings)
    torch.testing.assert_close(pooled, expected)
    grads = (torch.autograd.grad(one.square().sum(), features) for one in (pooled, expected))
    torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match="has no area"):
        module(features, [flat])


def test_in_a_plain_module():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv2d(3, 8, 3, stride=4, padding=1)
            self.head = nn.Linear(8 * 7 * 7, 5)

        def forward(self, images, boxes):
            return self.head(roi_align(self.features(images), boxes, 7, spatial_scale=1 / 4).flatten(1))

    network, boxes = Classifier(), [ROIS[:, 1:].clone().requires_grad_(), ROIS[:1, 1:]]
    logits = network(torch.randn(2, 3, 64, 64), boxes)
    assert logits.shape == (4, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert boxes[0].grad is not None
