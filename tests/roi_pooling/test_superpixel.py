import random
from math import nan

import pytest
import runs
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn.functional import interpolate

from detpipe.roi_pooling import superpixel_ops
from detpipe.roi_pooling.superpixel import superpixel_pool, superpixel_smooth

ops = torch.ops.detpipe
REDUCE, RESOLUTION = ["mean", "sum", "max"], ["labels", "features"]
DOCUMENTED = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]]), torch.tensor([[[0, 0], [1, 2]]])


def case(seed=0, size=(9, 7), images=2, channels=3, superpixels=5, dtype=torch.float64):
    """Features [N, C, 4, 5] and labels; -1 and every id occur."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(images, channels, 4, 5, generator=draw, dtype=torch.float64).to(dtype)
    return features, torch.randint(-1, superpixels, (images, *size), generator=draw)


def overlap(pixels, cells):
    """[pixels, cells]: how much of each cell each pixel covers along an axis, in whole numbers out of ``pixels``."""
    return [
        [max(0, min((p + 1) * cells, (c + 1) * pixels) - max(p * cells, c * pixels)) for c in range(cells)]
        for p in range(pixels)
    ]


def covers(size, cells):
    """What each pixel covers: (i, j, row, column, share of the cell)."""
    rows, columns = overlap(size[0], cells[0]), overlap(size[1], cells[1])
    for i in range(size[0]):
        for j in range(size[1]):
            for row, high in enumerate(rows[i]):
                for column, wide in enumerate(columns[j]):
                    if high and wide:
                        yield i, j, row, column, high * wide / (size[0] * size[1])


def slow_pool(features, labels, superpixels, reduce, resolution):
    """From the definition, a pixel at a time; differentiable."""
    images, channels = features.shape[:2]
    pooled, count = [], torch.zeros(images, superpixels, dtype=features.dtype)
    at_labels = interpolate(features, labels.shape[1:], mode="bilinear", align_corners=False)
    for image in range(images):
        read = [[] for _ in range(superpixels)]  # (value, weight) of each
        if resolution == "labels":
            for i in range(labels.shape[1]):
                for j in range(labels.shape[2]):
                    if labels[image, i, j] >= 0:
                        read[labels[image, i, j]].append((at_labels[image, :, i, j], 1.0))
        else:
            for i, j, row, column, share in covers(labels.shape[1:], features.shape[2:]):
                if labels[image, i, j] >= 0:
                    read[labels[image, i, j]].append((features[image, :, row, column], share))
        for superpixel, pairs in enumerate(read):
            covered = sum(weight for _, weight in pairs)
            count[image, superpixel] = covered
            if not pairs:
                pooled.append(features[image].sum(dim=(1, 2)).nan_to_num() * 0)
            elif reduce == "max":
                pooled.append(torch.stack([value for value, _ in pairs]).amax(dim=0))
            else:
                total = torch.stack([value * weight for value, weight in pairs]).sum(dim=0)
                pooled.append(total / covered if reduce == "mean" else total)
    result = torch.stack(pooled) if pooled else features.new_zeros(0, channels)
    return result.view(images, superpixels, channels), count


def slow_smooth(features, labels, superpixels):
    means, _ = slow_pool(features, labels, superpixels, "mean", "features")
    smooth = torch.zeros_like(features)
    for image in range(features.shape[0]):
        for i, j, row, column, share in covers(labels.shape[1:], features.shape[2:]):
            label = labels[image, i, j]
            value = means[image, label] if label >= 0 else features[image, :, row, column]
            smooth[image, :, row, column] += share * value
    return smooth


@pytest.mark.parametrize("resolution", RESOLUTION)
def test_the_documented_example(resolution):
    pooled, count = superpixel_pool(*DOCUMENTED, resolution=resolution)
    torch.testing.assert_close(pooled, torch.tensor([[[0.15], [0.3], [0.4]]]))
    assert count.tolist() == [[2, 1, 1]]


@pytest.mark.parametrize(
    ("reduce", "resolution", "pooled", "count"),
    [
        # the four columns of labels read a row of two cells at -.25, .25, .75, 1.25: 2, 2 + 1, 6 - 1, 6
        ("sum", "labels", [2.0, 3 + 5 + 6], [1, 3]),
        ("mean", "labels", [2.0, 14 / 3], [1, 3]),
        ("max", "labels", [2.0, 6], [1, 3]),
        # and cover a half of a cell each
        ("sum", "features", [1.0, 1 + 6], [0.5, 1.5]),
        ("mean", "features", [2.0, 7 / 1.5], [0.5, 1.5]),
        ("max", "features", [2.0, 6], [0.5, 1.5]),
    ],
)
def test_worked_by_hand(reduce, resolution, pooled, count):
    features, labels = torch.tensor([[[[2.0, 6.0]]]]), torch.tensor([[[0, 1, 1, 1]]])
    got, pixels = superpixel_pool(features, labels, reduce=reduce, resolution=resolution)
    torch.testing.assert_close(got[0, :, 0], torch.tensor(pooled))
    assert pixels[0].tolist() == count


def random_case(seed):
    """Label maps larger and smaller than the features along each axis, ids with gaps, pieces and single pixels."""
    pick = random.Random(seed)
    draw = torch.Generator().manual_seed(seed)
    images, channels, height, width = pick.randint(1, 2), pick.randint(1, 4), pick.randint(1, 7), pick.randint(1, 7)
    grow = pick.choice([1, 1, 2, 3])
    equal, multiple = pick.random() < 0.2, pick.random() < 0.3
    size = (height, width) if equal else (pick.randint(1, 10), pick.randint(1, 10))
    size = (height * grow, width * grow) if multiple else size
    superpixels = pick.randint(1, 8)
    blocks = torch.randint(-1, superpixels, (images, *size), generator=draw).repeat_interleave(pick.choice([1, 3]), 2)
    features = torch.randn(images, channels, height, width, generator=draw, dtype=torch.float64)
    return features, blocks[..., : size[1]], superpixels + pick.choice([0, 0, 3])


@pytest.mark.parametrize("dtype", runs.mostly_slow([torch.float32, torch.float64], torch.float32))
@pytest.mark.parametrize("resolution", RESOLUTION)
def test_equals_the_loop_on_200_random_cases(resolution, dtype):
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    for seed in range(200):
        features, labels, superpixels = random_case(seed)
        leaf, exact = features.to(dtype).requires_grad_(), features.to(dtype).double().requires_grad_()
        reduce = REDUCE[seed % 3]
        got, count = superpixel_pool(leaf, labels, superpixels, reduce, resolution)
        want, area = slow_pool(exact, labels, superpixels, reduce, resolution)
        assert got.dtype == count.dtype == dtype
        torch.testing.assert_close(got.double(), want, **close)
        torch.testing.assert_close(count.double(), area, **close)
        grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
        got.backward(grad)
        want.backward(grad.double())
        torch.testing.assert_close(leaf.grad.double(), exact.grad, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smooth_equals_the_loop(dtype):
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    for seed in range(60):
        features, labels, superpixels = random_case(seed)
        got = superpixel_smooth(features.to(dtype), labels, superpixels)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), slow_smooth(features, labels, superpixels), **close)


def test_smooth_by_hand():
    # the upper half of the left cell is superpixel 0 (mean 4, from a half and a whole), the lower is ignored
    features = torch.tensor([[[[6.0, 3.0]]]])
    got = superpixel_smooth(features, torch.tensor([[[0, 0], [-1, 0]]]))
    torch.testing.assert_close(got, torch.tensor([[[[5.0, 4.0]]]]))


def test_other_ids_in_each_image():
    features, _ = case()
    labels = torch.tensor([7, 2, -1]).repeat(20)[:40].view(2, 4, 5)
    labels[1] = 4
    pooled, count = superpixel_pool(features, labels)
    assert pooled.shape == (2, 8, 3)
    assert (count > 0).nonzero().tolist() == [[0, 2], [0, 7], [1, 4]]
    torch.testing.assert_close(pooled[1, 4], features[1].mean(dim=(1, 2)))
    assert not pooled[1, :4].any()
    assert not pooled[1, 5:].any()


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("resolution", RESOLUTION)
def test_absent_ids_are_zero_and_so_are_their_gradients(reduce, resolution):
    features, labels = case()
    leaf = features.requires_grad_()
    pooled, count = superpixel_pool(leaf, torch.where(labels == 2, -1, labels), 9, reduce, resolution)
    absent = torch.tensor([2, 5, 6, 7, 8])
    assert not pooled[:, absent].any()
    assert not count[:, absent].any()
    (grad,) = torch.autograd.grad(pooled[:, absent].sum(), leaf, retain_graph=True)
    assert not grad.any()
    (grad,) = torch.autograd.grad(pooled.square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), leaf)
    assert grad.isfinite().all()
    assert second.isfinite().all()


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("resolution", RESOLUTION)
@pytest.mark.parametrize("size", [(4, 5), (8, 10)])
def test_ignored_cells_do_not_leak(reduce, resolution, size):
    features, labels = case(size=(4, 5))
    cell = torch.zeros(4, 5, dtype=torch.bool)
    cell[:2, :2] = True
    features[..., 0, 0] = nan
    labels = torch.where(cell, -1, labels)
    labels = labels.repeat_interleave(size[0] // 4, 1).repeat_interleave(size[1] // 5, 2)
    leaf = features.requires_grad_()
    pooled, _ = superpixel_pool(leaf, labels, 5, reduce, resolution)
    assert pooled.isfinite().all()
    (grad,) = torch.autograd.grad(pooled.sum(), leaf)
    assert grad.isfinite().all()
    smooth = superpixel_smooth(leaf, labels, 5)
    assert smooth.isnan().nonzero().tolist() == [[n, c, 0, 0] for n in range(2) for c in range(3)]


@pytest.mark.parametrize("resolution", RESOLUTION)
@pytest.mark.parametrize("size", [(4, 5), (9, 7)])
def test_a_value_that_is_not_a_number_is_the_largest(resolution, size):
    features, labels = case(size=size)
    features[1, 2, 1, 1] = nan
    got, _ = superpixel_pool(features, labels, 5, "max", resolution)
    want, _ = slow_pool(features, labels, 5, "max", resolution)
    assert got.isnan().any()
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("resolution", RESOLUTION)
@pytest.mark.parametrize("size", [(4, 5), (9, 7)])
def test_nothing_to_pool(reduce, resolution, size):
    features, labels = case(size=size)
    for images, superpixels, fill in ((2, 4, -1), (0, 4, -1), (2, 0, -1), (0, None, -1), (2, None, -1)):
        leaf = features[:images].requires_grad_()
        pooled, count = superpixel_pool(leaf, labels[:images] * 0 + fill, superpixels, reduce, resolution)
        assert pooled.shape == (images, superpixels or 0, 3)
        assert count.shape == pooled.shape[:2]
        assert not pooled.any()
        assert not count.any()
        pooled.sum().backward()
        assert leaf.grad is not None
        assert not leaf.grad.any()
        leaf.grad = None
        assert torch.equal(superpixel_smooth(leaf, labels[:images] * 0 - 1, superpixels), leaf)


def test_the_first_of_equal_maxima_gets_the_gradient():
    features = torch.ones(1, 1, 2, 2, requires_grad=True)
    superpixel_pool(features, torch.tensor([[[1, 0], [0, 0]]]), reduce="max")[0].sum().backward()
    assert features.grad.tolist() == [[[[1, 1], [0, 0]]]]


@pytest.mark.parametrize("size", runs.mostly_slow([(4, 5), (9, 7), (2, 11)], (9, 7)))
@pytest.mark.parametrize("resolution", RESOLUTION)
@pytest.mark.parametrize("reduce", REDUCE)
def test_gradients_are_right(size, resolution, reduce):
    features, labels = case(size=size, channels=1)
    leaf = features.requires_grad_()

    def pool(features):
        return superpixel_pool(features, labels, 5, reduce, resolution)[0]

    assert gradcheck(pool, leaf)
    assert gradgradcheck(pool, leaf)


@pytest.mark.parametrize("size", [(9, 7), (3, 2)])
def test_gradients_of_smooth_are_right(size):
    features, labels = case(size=size, channels=1)
    leaf = features.requires_grad_()
    assert gradcheck(lambda features: superpixel_smooth(features, labels, 5), leaf)
    assert gradgradcheck(lambda features: superpixel_smooth(features, labels, 5), leaf)


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("resolution", RESOLUTION)
def test_equal_to_the_bit_for_every_run_and_number_of_threads(reduce, resolution):
    draw = torch.Generator().manual_seed(0)
    leaf = torch.randn(2, 64, 20, 30, generator=draw, requires_grad=True)
    labels = torch.randint(-1, 40, (2, 90, 60), generator=draw).repeat_interleave(3, 2)
    grad = torch.randn(2, 40, 64, generator=draw)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            pooled, _ = superpixel_pool(leaf, labels, 40, reduce, resolution)
            runs.append((pooled, *torch.autograd.grad(pooled, leaf, grad)))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(got, want) for got, want in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("resolution", RESOLUTION)
def test_memory_layout_and_integer_type_do_not_matter(reduce, resolution):
    features, labels = case()
    want, _ = superpixel_pool(features, labels, 5, reduce, resolution)
    strided = torch.stack((features, features), dim=4)[..., 0]
    last = features.contiguous(memory_format=torch.channels_last)
    turned = labels.transpose(1, 2).contiguous().transpose(1, 2)
    for other, ids in ((strided, labels), (last, turned), (features, labels.int()), (features, labels.to(torch.int8))):
        assert torch.equal(superpixel_pool(other, ids, 5, reduce, resolution)[0], want)
    unsigned = labels.clamp(min=0)
    want, _ = superpixel_pool(features, unsigned, 300, reduce, resolution)
    assert torch.equal(superpixel_pool(features, unsigned.to(torch.uint8), 300, reduce, resolution)[0], want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("resolution", RESOLUTION)
def test_half_precision_is_summed_in_float32(dtype, resolution):
    # a sum in bfloat16 would not get past 256
    features = torch.ones(1, 2, 64, 64, dtype=dtype, requires_grad=True)
    labels = torch.zeros(1, 64, 64, dtype=torch.int64)
    total, count = superpixel_pool(features, labels, 1, "sum", resolution)
    assert total.dtype == dtype
    assert count.dtype == torch.float32
    assert total.tolist() == [[[4096, 4096]]]
    total.sum().backward()
    assert features.grad.dtype == dtype
    values, labels = case(dtype=dtype)
    for reduce in REDUCE:
        got, _ = superpixel_pool(values, labels, 5, reduce, resolution)
        want, _ = superpixel_pool(values.float(), labels, 5, reduce, resolution)
        torch.testing.assert_close(got, want.to(dtype))
    assert superpixel_smooth(values, labels).dtype == dtype


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("resolution", RESOLUTION)
def test_autocast_changes_nothing(reduce, resolution):
    features, labels = case(dtype=torch.float32)
    plain, _ = superpixel_pool(features, labels, 5, reduce, resolution)
    smooth = superpixel_smooth(features, labels, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, count = superpixel_pool(features, labels, 5, reduce, resolution)
        assert count.dtype == cast.dtype == torch.float32
        assert torch.equal(cast, plain)
        assert torch.equal(superpixel_smooth(features, labels, 5), smooth)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch's own, which it hides badly
@pytest.mark.parametrize("labels_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("resolution", RESOLUTION)
def test_registered_as_operators_should_be(resolution, labels_dtype):
    features, labels = case(channels=2)
    labels = labels.to(labels_dtype)
    rows = features.permute(0, 2, 3, 1).flatten(0, 2)
    where = (labels, 4, 5, 5, resolution)
    opcheck(ops.superpixel_sum.default, (rows.clone().requires_grad_(), *where))
    opcheck(ops.superpixel_sum.default, (rows.bfloat16(), *where))
    opcheck(ops.superpixel_sum_adjoint.default, (torch.randn(10, 2).double().requires_grad_(), *where))
    opcheck(ops.superpixel_argmax.default, (rows, *where))
    opcheck(ops.superpixel_count.default, (labels, 5))


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("resolution", RESOLUTION)
@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 1), (2, 0)])
def test_vmap_equals_a_loop(reduce, resolution, dims):
    cases = [case(seed) for seed in range(3)]
    stacked = [
        cases[0][at] if dim is None else torch.stack([each[at] for each in cases], dim) for at, dim in enumerate(dims)
    ]

    def pool(features, labels):
        return superpixel_pool(features, labels, 5, reduce, resolution)

    leaf = stacked[0].requires_grad_()
    pooled, count = torch.vmap(pool, dims)(*stacked)
    grad = torch.autograd.grad(pooled.square().sum(), leaf)[0]
    smooth = torch.vmap(lambda features, labels: superpixel_smooth(features, labels, 5), dims)(*stacked)
    total = 0
    for v in range(3):
        features, labels = (cases[0 if dim is None else v][at] for at, dim in enumerate(dims))
        features = leaf if dims[0] is None else leaf.select(dims[0], v)
        want, pixels = pool(features, labels)
        total = total + want.square().sum()
        torch.testing.assert_close(pooled[v], want)
        assert torch.equal(count[v], pixels)
        torch.testing.assert_close(smooth[v], superpixel_smooth(features, labels, 5))
    torch.testing.assert_close(grad, torch.autograd.grad(total, leaf)[0])


@pytest.mark.parametrize("reduce", runs.mostly_slow(REDUCE, "mean"))
@pytest.mark.parametrize("resolution", RESOLUTION)
def test_compiles_without_a_break(reduce, resolution):
    features, labels = case()
    leaf = features.requires_grad_()

    def loss(features, labels):
        pooled, count = superpixel_pool(features, labels, 5, reduce, resolution)
        smooth = superpixel_smooth(features, labels, 5)
        return (pooled * count[..., None]).sin().sum() + smooth.sin().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    want = torch.autograd.grad(loss(leaf, labels), leaf)
    assert torch.equal(torch.autograd.grad(compiled(leaf, labels), leaf)[0], want[0])


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("resolution", RESOLUTION)
@pytest.mark.parametrize("size", [(4, 5), (9, 7)])
def test_without_a_look_at_the_labels_the_same(monkeypatch, reduce, resolution, size):
    # what other devices than the CPU do
    features, labels = case(size=size)
    labels[1, 1:] = -1
    leaf = features.requires_grad_()

    def everything():
        pooled, count = superpixel_pool(leaf, labels, 5, reduce, resolution)
        smooth = superpixel_smooth(leaf, labels, 5)
        return pooled, count, smooth, torch.autograd.grad(pooled.square().sum() + smooth.square().sum(), leaf)[0]

    want = everything()
    monkeypatch.setattr(superpixel_ops, "FREE_TO_LOOK", ())
    monkeypatch.setattr(superpixel_ops, "IGNORED_AT_ONCE", 4)
    for got, expected in zip(everything(), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    wrong = labels.clone()
    wrong[0, 0, 0] = 2**40 + 1
    ignored = labels.clone()
    ignored[0, 0, 0] = -1
    got, _ = superpixel_pool(leaf, wrong, 5, reduce, resolution)
    assert torch.equal(got, superpixel_pool(leaf, ignored, 5, reduce, resolution)[0])
    with torch.autograd.set_detect_anomaly(True), pytest.raises(ValueError, match=r"labels\[0, 0, 0\] is 109951162"):
        superpixel_pool(leaf, wrong, 5, reduce, resolution)


def peak_of(function):
    """Bytes that a function has allocated at most at one time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("reduce", REDUCE)
@pytest.mark.parametrize("resolution", RESOLUTION)
def test_makes_no_map_at_the_resolution_of_the_labels(reduce, resolution):
    leaf = torch.randn(1, 128, 16, 24, requires_grad=True)
    labels = (torch.arange(480)[:, None] // 60 * 12 + torch.arange(720) // 60)[None]
    upsampled = 480 * 720 * 128 * 4
    assert peak_of(lambda: interpolate(leaf, (480, 720), mode="bilinear")) >= upsampled
    assert peak_of(lambda: superpixel_pool(leaf, labels, 96, reduce, resolution)[0].sum().backward()) < upsampled / 4


def wrong_id(value, place):
    labels = torch.zeros(2, 9, 7, dtype=torch.int64)
    labels[place] = value
    labels[1, 8, 6] = value
    return labels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (wrong_id(5, (0, 3, 2)), r"labels\[0, 3, 2\] is 5: expected -1 \(ignored\) or an id in 0..4"),
        (wrong_id(-2, (1, 0, 4)), r"labels\[1, 0, 4\] is -2: expected -1"),
        (wrong_id(5, (1, 7, 1)).int(), r"labels\[1, 7, 1\] is 5: .*since num_superpixels is 5"),
        (torch.zeros(2, 9, 7), r"labels must be of an integer type, got torch.float32: convert them with .long\(\)"),
        (torch.zeros(2, 9, 7, dtype=torch.bool), "labels must be of an integer type, got torch.bool"),
        (None, r"labels must be a tensor \[N, Hl, Wl\], got NoneType"),
        (torch.zeros(2, 1, 9, 7).long(), r"labels must be \[N, Hl, Wl\] .*got \[2, 1, 9, 7\]"),
        (torch.zeros(3, 9, 7).long(), r"labels must be .* N = 2, as the features have.*got \[3, 9, 7\]"),
        (torch.zeros(2, 0, 7).long(), r"labels must be .* at least one pixel; got \[2, 0, 7\]"),
        (torch.zeros(2, 9, 7, device="meta").long(), "labels are on meta and the features on cpu: move one"),
    ],
)
@pytest.mark.parametrize("resolution", RESOLUTION)
def test_bad_labels(labels, message, resolution):
    features, _ = case()
    for reduce in REDUCE:
        with pytest.raises(ValueError, match=message):
            superpixel_pool(features, labels, 5, reduce, resolution)
    with pytest.raises(ValueError, match=message):
        superpixel_smooth(features, labels, 5)


def test_other_bad_input():
    features, labels = case()
    with pytest.raises(ValueError, match=r"features must be \[N, C, H, W\]"):
        superpixel_pool(features[0], labels)
    with pytest.raises(ValueError, match="features must be floating-point"):
        superpixel_pool(features.long(), labels)
    with pytest.raises(ValueError, match="reduce must be 'mean', 'max' or 'sum', got 'median'"):
        superpixel_pool(features, labels, reduce="median")
    with pytest.raises(ValueError, match="resolution must be 'labels' or 'features', got 'image'"):
        superpixel_pool(features, labels, resolution="image")
    for wrong in (-1, 2.0, True, "5"):
        with pytest.raises(ValueError, match=f"num_superpixels must be a whole number, 0 or larger, got {wrong!r}"):
            superpixel_pool(features, labels, wrong)
    with pytest.raises(ValueError, match=r"labels\[0, \d, \d\] is \d: .*\(ignored\) since num_superpixels is 0"):
        superpixel_pool(features, labels, 0)
