"""Weighted sums of gathered rows, their transpose and their dot products, against loops over entries."""

import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from detpipe.roi_pooling import backend, bags


def problem(seed=0, rows=7, channels=3, bag_count=5, entries=23, dtype=torch.float64):
    """Rows, gradients, index, weights and offsets; some bags are empty, some rows read twice by one bag."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, channels, generator=draw, dtype=torch.float64).to(dtype)
    grad = torch.randn(bag_count, channels, generator=draw, dtype=torch.float64).to(dtype)
    index = torch.randint(0, rows, (entries,), generator=draw)
    weight = torch.randn(entries, generator=draw, dtype=torch.float64)
    inner = torch.randint(0, entries + 1, (bag_count - 1,), generator=draw).sort().values
    offsets = torch.cat((torch.tensor([0]), inner, torch.tensor([entries])))
    return values, grad, index, weight.to(dtype), offsets


def slow_sum(rows, index, weight, offsets):
    result = torch.zeros(len(offsets) - 1, rows.shape[1], dtype=rows.dtype)
    for bag in range(len(offsets) - 1):
        for entry in range(int(offsets[bag]), int(offsets[bag + 1])):
            result[bag] += weight[entry] * rows[index[entry]]
    return result


def slow_adjoint(grad, index, weight, offsets, rows):
    result = torch.zeros(rows, grad.shape[1], dtype=grad.dtype)
    for bag in range(len(offsets) - 1):
        for entry in range(int(offsets[bag]), int(offsets[bag + 1])):
            result[index[entry]] += weight[entry] * grad[bag]
    return result


def slow_dot(grad, rows, index, offsets):
    result = torch.zeros(len(index), dtype=grad.dtype)
    for bag in range(len(offsets) - 1):
        for entry in range(int(offsets[bag]), int(offsets[bag + 1])):
            result[entry] = (grad[bag] * rows[index[entry]]).sum()
    return result


def test_worked_by_hand():
    rows = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    index, weight, offsets = torch.tensor([0, 2, 2]), torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0, 2, 2, 3])
    assert bags.bag_sum(rows, index, weight, offsets).tolist() == [[2.5, 25.0], [0.0, 0.0], [6.0, 60.0]]
    grad = torch.tensor([[1.0, 0.0], [7.0, 7.0], [0.0, 1.0]])
    assert bags.bag_sum_adjoint(grad, index, weight, offsets, 3).tolist() == [[1.0, 0.0], [0.0, 0.0], [0.5, 2.0]]
    assert bags.bag_dot(grad, rows, index, offsets).tolist() == [1.0, 3.0, 30.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_loops_on_random_cases(dtype):
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    for seed in range(100):
        draw = torch.Generator().manual_seed(seed)
        rows, channels, bag_count, entries = (int(torch.randint(1, most, (), generator=draw)) for most in (9, 6, 7, 20))
        values, grad, index, weight, offsets = problem(seed, rows, channels, bag_count, entries, dtype)
        exact = [tensor.double() for tensor in (values, grad, weight)]
        results = (
            bags.bag_sum(values, index, weight, offsets),
            bags.bag_sum_adjoint(grad, index, weight, offsets, rows),
            bags.bag_dot(grad, values, index, offsets),
        )
        wanted = (
            slow_sum(exact[0], index, exact[2], offsets),
            slow_adjoint(exact[1], index, exact[2], offsets, rows),
            slow_dot(exact[1], exact[0], index, offsets),
        )
        for got, want in zip(results, wanted, strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(got.double(), want, **tolerance)


def test_plain_functions_take_the_bag_of_each_entry():
    values, grad, index, weight, offsets = problem()
    bag_of = bags.bag_of_entries(offsets, len(index))
    assert bag_of.tolist() == [b for b in range(5) for _ in range(int(offsets[b + 1] - offsets[b]))]
    assert torch.equal(
        bags.sum_bags_adjoint(grad, index, weight, bag_of, 7), bags.bag_sum_adjoint(grad, index, weight, offsets, 7)
    )
    assert torch.equal(bags.dot_bags(grad, values, index, bag_of), bags.bag_dot(grad, values, index, offsets))


def test_adjoint_takes_entries_in_any_order():
    _, grad, index, weight, offsets = problem()
    bag_of = bags.bag_of_entries(offsets, len(index))
    shuffled = torch.randperm(len(index), generator=torch.Generator().manual_seed(1))
    got = bags.sum_bags_adjoint(grad, index[shuffled], weight[shuffled], bag_of[shuffled], 7)
    torch.testing.assert_close(got, slow_adjoint(grad, index, weight, offsets, 7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [100, 40_000])
def test_adjoint_sorts_keys_of_every_width(rows):
    grad, index = torch.ones(1, 1), torch.tensor([rows - 1, 3, rows - 1])
    got = bags.sum_bags_adjoint(grad, index, torch.ones(3), torch.zeros(3, dtype=torch.int64), rows)
    assert got[3] == 1
    assert got[rows - 1] == 2
    assert got.sum() == 3


def test_dot_by_blocks_is_the_same(monkeypatch):
    values, grad, index, _, offsets = problem()
    monkeypatch.setitem(bags.BLOCK_BYTES, "cpu", 100)  # four entries a block, the last of three
    got = bags._dot_blocks(grad, values, index, bags.bag_of_entries(offsets, len(index)))
    torch.testing.assert_close(got, slow_dot(grad, values, index, offsets), rtol=0, atol=1e-12)
    monkeypatch.setattr(bags, "_has_sampled_product", lambda *args: False)
    assert torch.equal(got, bags.bag_dot(grad, values, index, offsets))
    assert torch.equal(got, bags.dot_bags(grad, values, index, bags.bag_of_entries(offsets, len(index))))
    assert bags._dot_blocks(grad, values, index[:0], index[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("rows", "bag_count", "entries", "channels"), [(0, 4, 0, 3), (5, 0, 0, 3), (5, 4, 0, 3), (5, 2, 6, 0)]
)
def test_empty_results_have_a_graph(rows, bag_count, entries, channels):
    values = torch.randn(rows, channels, requires_grad=True)
    grad = torch.randn(bag_count, channels, requires_grad=True)
    weight, index = torch.randn(entries, requires_grad=True), torch.zeros(entries, dtype=torch.int64)
    offsets = torch.linspace(0, entries, bag_count + 1).long() if bag_count else torch.zeros(1, dtype=torch.int64)
    results = (
        bags.bag_sum(values, index, weight, offsets),
        bags.bag_sum_adjoint(grad, index, weight, offsets, rows),
        bags.bag_dot(grad, values, index, offsets),
    )
    assert [tuple(result.shape) for result in results] == [(bag_count, channels), (rows, channels), (entries,)]
    sum(result.sum() for result in results).backward()
    assert all(not tensor.grad.any() for tensor in (values, grad, weight))


def test_unread_rows_do_not_leak():
    values, _, index, weight, offsets = problem()
    values[3] = torch.nan
    result = bags.bag_sum(values, index, weight, offsets)
    touched = torch.zeros(5, dtype=torch.bool)
    touched[bags.bag_of_entries(offsets, len(index))[index == 3]] = True
    assert torch.equal(result.isnan().any(dim=1), touched)
    assert not touched.all()


def differentiable(seed=0):
    values, grad, index, weight, offsets = problem(seed, 4, 2, 3, 6)
    for tensor in (values, grad, weight):
        tensor.requires_grad_()
    return [
        (lambda r, w: bags.bag_sum(r, index, w, offsets), (values, weight)),
        (lambda g, w: bags.bag_sum_adjoint(g, index, w, offsets, 4), (grad, weight)),
        (lambda g, r: bags.bag_dot(g, r, index, offsets), (grad, values)),
    ]


@pytest.mark.parametrize("which", range(3))
def test_gradients_of_three_orders(which):
    function, inputs = differentiable()[which]
    assert torch.autograd.gradcheck(function, inputs, check_undefined_grad=False)
    assert torch.autograd.gradgradcheck(function, inputs)

    def gradient(*inputs):
        result = function(*inputs)
        return torch.autograd.grad((result * result).sum(), inputs, create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, inputs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch's own, which it hides badly
def test_registered_as_operators_should_be():
    values, grad, index, weight, offsets = problem()
    values, grad, weight = (tensor.requires_grad_() for tensor in (values, grad, weight))
    half = values.detach().bfloat16()
    for given in (
        (None, values, weight),
        (grad, None, weight),
        (grad, values, None),
        (None, half, weight.detach().float()),
        (grad.detach().bfloat16(), half, None),
    ):
        opcheck(torch.ops.detpipe.bag.default, (*given, index, offsets, 7, [5]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    rows = torch.full((1, 2), 1.0, dtype=dtype)
    index, offsets = torch.zeros(4096, dtype=torch.int64), torch.tensor([0, 4096])
    weight = torch.full((4096,), 1 / 4096)
    assert bags.bag_sum(rows, index, weight, offsets).tolist() == [[1.0, 1.0]]
    total = bags.bag_sum_adjoint(rows, index, weight, offsets, 1)
    assert total.tolist() == [[1.0, 1.0]]
    assert total.dtype == dtype
    dots = bags.bag_dot(rows.expand(1, 2), rows, index, offsets)
    assert dots.dtype == torch.float32
    assert (dots == 2).all()
    leaf = rows.clone().requires_grad_()
    small = weight.to(dtype).requires_grad_()
    bags.bag_sum(leaf, index, small, offsets).sum().backward()
    assert (leaf.grad.dtype, small.grad.dtype) == (dtype, dtype)


def test_autocast_changes_nothing():
    values, grad, index, weight, offsets = problem(dtype=torch.float32)
    bag_of = bags.bag_of_entries(offsets, len(index))
    args = (values, index, weight, offsets), (grad, values, index, offsets)
    plain = bags.bag_sum(*args[0]), bags.bag_dot(*args[1]), bags._dot_blocks(grad, values, index, bag_of)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = bags.bag_sum(*args[0]), bags.bag_dot(*args[1]), bags._dot_blocks(grad, values, index, bag_of)
    for got, want in zip(cast, plain, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


def test_memory_layout_does_not_matter():
    values, grad, index, weight, offsets = problem()
    strided = torch.stack((values, values), dim=2)[..., 0]
    turned = values.t().contiguous().t()
    for other in (strided, turned):
        assert not other.is_contiguous()
        assert torch.equal(bags.bag_sum(other, index, weight, offsets), bags.bag_sum(values, index, weight, offsets))
        assert torch.equal(bags.bag_dot(grad, other, index, offsets), bags.bag_dot(grad, values, index, offsets))
    every_other = torch.stack((index, weight), dim=1)
    got = bags.bag_sum(values, every_other[:, 0].long(), every_other[:, 1], offsets)
    assert torch.equal(got, bags.bag_sum(values, index, weight, offsets))


def test_equal_to_the_bit_for_every_run_and_number_of_threads():
    values, grad, index, weight, offsets = problem(3, 300, 64, 400, 20_000, torch.float32)

    def everything():
        total = bags.bag_sum(values, index, weight, offsets)
        return (
            total,
            bags.bag_sum_adjoint(grad, index, weight, offsets, 300),
            bags.bag_dot(grad, values, index, offsets),
        )

    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            runs.append(everything())
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(got, want) for got, want in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(
    "dims", [(0, 0, 0, 0), (0, None, None, None), (None, None, 0, None), (1, 1, 1, 1), (None, 0, None, 0)]
)
def test_vmap_equals_a_loop(dims):
    problems = [problem(seed) for seed in range(3)]

    def pick(at, dim):
        columns = [each[at] for each in problems]
        return columns[0] if dim is None else torch.stack(columns, dim)

    def one(at, dim, v):
        return problems[0 if dim is None else v][at]

    sum_args = [pick(at, dim) for at, dim in zip((0, 2, 3, 4), dims, strict=True)]
    got = torch.vmap(bags.bag_sum, dims)(*sum_args)
    adjoint_args = [pick(at, dim) for at, dim in zip((1, 2, 3, 4), dims, strict=True)]
    adjoint = torch.vmap(lambda *args: bags.bag_sum_adjoint(*args, 7), dims)(*adjoint_args)
    dot_dims = (dims[0], dims[2], dims[1], dims[3])
    dots = torch.vmap(bags.bag_dot, dot_dims)(*[pick(at, dim) for at, dim in zip((1, 0, 2, 4), dot_dims, strict=True)])
    for v in range(3):
        rows, index, weight, offsets = (one(at, dim, v) for at, dim in zip((0, 2, 3, 4), dims, strict=True))
        torch.testing.assert_close(got[v], slow_sum(rows, index, weight, offsets))
        grad = one(1, dims[0], v)
        torch.testing.assert_close(adjoint[v], slow_adjoint(grad, index, weight, offsets, 7))
        grad, rows, index, offsets = (one(at, dim, v) for at, dim in zip((1, 0, 2, 4), dot_dims, strict=True))
        torch.testing.assert_close(dots[v], slow_dot(grad, rows, index, offsets))


def test_gradients_through_vmap():
    values, _, index, weight, offsets = problem()
    stacked = torch.stack([values, 2 * values]).requires_grad_()
    weight.requires_grad_()

    def loss(rows):
        return bags.bag_sum(rows, index, weight, offsets).square().sum()

    got = torch.autograd.grad(torch.vmap(loss)(stacked).sum(), (stacked, weight))
    want = torch.autograd.grad(loss(stacked[0]) + loss(stacked[1]), (stacked, weight))
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine, expected)


def test_compiles_without_a_break():
    values, _, index, weight, offsets = problem()

    def loss(rows, weight):
        return bags.bag_sum(rows, index, weight, offsets).sin().sum()

    leaves = values.requires_grad_(), weight.requires_grad_()
    want = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, expected in zip(torch.autograd.grad(compiled(*leaves), leaves), want, strict=True):
        assert torch.equal(got, expected)


def test_kernels_are_chosen_by_device(monkeypatch):
    class OnCuda:
        is_cuda = True

    for installed, interpreted, here, there in (
        (True, False, "torch", "triton"),
        (True, True, "triton", "triton"),
        (False, False, "torch", "torch"),
    ):
        monkeypatch.setattr(backend, "TRITON_IS_INSTALLED", installed)
        monkeypatch.setattr(backend, "IS_INTERPRETED", interpreted)
        assert backend.kernels_for(torch.zeros(1)) == here
        assert backend.kernels_for(OnCuda()) == there  # type: ignore[arg-type]


@pytest.mark.slow
def test_no_warning_reaches_the_user():
    code = (
        "import torch\nfrom detpipe.roi_pooling.bags import dot_bags\n"
        "zero = torch.zeros(1, dtype=torch.int64)\nprint(dot_bags(torch.ones(1, 2), torch.ones(1, 2), zero, zero))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "tensor([2.])" in done.stdout
    assert "beta" not in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_on_a_gpu():
    values, grad, index, weight, offsets = problem(dtype=torch.float32)
    moved = [tensor.cuda() for tensor in (values, grad, index, weight, offsets)]
    total = bags.bag_sum(moved[0], moved[2], moved[3], moved[4]).cpu()
    torch.testing.assert_close(total, slow_sum(values, index, weight, offsets))
    dots = bags.bag_dot(moved[1], moved[0], moved[2], moved[4]).cpu()
    torch.testing.assert_close(dots, slow_dot(grad, values, index, offsets))
