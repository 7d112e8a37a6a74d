"""A head of one's own, written with the toolkit alone: its RoIs look at each other."""

import math

import pytest
import torch
from samples import pyramid, random_boxes, random_target
from torch import Tensor, nn

from detpipe.heads import base, toolkit
from detpipe.heads.toolkit import (
    Found,
    Postprocess,
    ProposalHead,
    RoIAlign,
    RoISampler,
    box_losses,
    box_outputs,
    hidden_layers,
    in_parts,
    output_layers,
)

STRIDES = {"c3": 8, "c4": 16}
SIZES = [(60, 80), (64, 96), (40, 50), (64, 64)]
COUNTS = (20, 9, 0, 1)
EVERYTHING = Postprocess(score_threshold=0.0, nms_iou=1.0, detections_per_image=1000)


class SelfAttention(ProposalHead):
    """Each RoI sees all RoIs of its image, and has no layers named fc, and no glimpses."""

    def __init__(self, pooler: nn.Module, **settings) -> None:
        super().__init__(3, STRIDES, **settings)
        self.pooler = pooler
        self.shared = hidden_layers(4 * 9, [16])
        self.mix = nn.Linear(16, 48)
        self.classifier, self.regressor = output_layers(16, 3, class_agnostic=True)
        for layer in (self.classifier, self.regressor):
            nn.init.normal_(layer.weight)

    def _pooled(self, features, boxes: Tensor) -> Tensor:
        return self.shared(self.pooler(features, boxes, STRIDES).flatten(0, 1)).unflatten(0, boxes.shape[:2])

    def _predict(self, features, boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        hidden = in_parts(lambda part: self._pooled(features, part), boxes)
        query, key, value = self.mix(hidden).chunk(3, dim=-1)
        weights = (query @ key.mT).masked_fill(~valid[:, None], -1e4).softmax(-1)
        return box_outputs(self.classifier, self.regressor, hidden + weights @ value)

    def losses(self, features, rois, image_sizes, targets):
        return box_losses(rois, *self._predict(features, rois.rois, rois.valid))

    def detect(self, features, boxes, image_sizes, valid):
        return Found.of(*self._predict(features, boxes, valid), boxes)


def make(**settings) -> SelfAttention:
    torch.manual_seed(1)
    return SelfAttention(RoIAlign(3), sampler=RoISampler(rois_per_image=12), **settings)


def detected(head: ProposalHead, features, proposals: list[Tensor], sizes: list[tuple[int, int]]):
    with torch.no_grad():
        return head.eval()(features, proposals, sizes)[0]


def same(one, other) -> None:
    assert len(one["scores"]) == len(other["scores"])
    torch.testing.assert_close(one["scores"], other["scores"], rtol=0, atol=1e-5)
    assert torch.equal(one["labels"], other["labels"])
    torch.testing.assert_close(one["boxes"], other["boxes"], rtol=0, atol=1e-3)


def test_regions_that_look_at_each_other_do_not_see_what_shares_the_batch():
    head, features = make(postprocess=EVERYTHING), pyramid(4, STRIDES)
    proposals = [random_boxes(count, 40, 50) for count in COUNTS]
    proposals[1][3, 2:] = proposals[1][3, :2]  # without an area
    together = detected(head, features, proposals, SIZES)
    assert [len(found["boxes"]) > 0 for found in together] == [True, True, False, True]
    for image in range(4):
        part = {name: level[image : image + 1] for name, level in features.items()}
        [alone] = detected(head, part, [proposals[image]], [SIZES[image]])
        same(alone, together[image])
    fewer = [proposals[0][:10], *proposals[1:]]
    changed = detected(head, features, fewer, SIZES)
    common = {round(score, 4) for score in together[0]["scores"].tolist()}
    assert not common >= {round(score, 4) for score in changed[0]["scores"].tolist()}  # it does look


def test_only_pooling_is_cut_into_parts(monkeypatch):
    head, features = make(postprocess=EVERYTHING), pyramid(4, STRIDES)
    proposals = [random_boxes(count, 40, 50) for count in COUNTS]
    whole = detected(head, features, proposals, SIZES)
    sizes = []
    head.pooler.register_forward_hook(lambda _, given, pooled: sizes.append(math.prod(pooled.shape[:2])))
    monkeypatch.setattr(base, "ROIS_PER_PASS", 12)
    for one, other in zip(whole, detected(head, features, proposals, SIZES), strict=True):
        same(one, other)
    assert sizes == [12] * 6 + [8]


def test_a_head_of_ones_own_trains_and_shows_its_proposals():
    head, features = make(), pyramid(4, STRIDES)
    targets = [random_target(count, height=40, width=50) for count in (3, 0, 0, 2)]
    proposals = [random_boxes(count, 40, 50) for count in COUNTS]  # the third image has no RoI at all
    for given, wanted in ((proposals, targets), ([boxes[:0] for boxes in proposals], [targets[1]] * 4)):
        head.zero_grad()
        _, losses = head.train()(features, given, SIZES, wanted)
        assert sorted(losses) == ["loss_box_reg", "loss_classifier"]
        sum(losses.values()).backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())
    head.return_glimpses = True
    for found in detected(head, features, proposals, SIZES):
        assert found["glimpses"].shape == (len(found["boxes"]), 0, 4, 2)
        assert found["proposals"].shape == found["boxes"].shape


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda scores, boxes: Found(torch.zeros(2, 5, 4), boxes),
            r"scores must be a tensor of shape \[N, P, K\] = \[2, 5, 3\], got one of shape \[2, 5, 4\]",
        ),
        (
            lambda scores, boxes: Found(scores.flatten(0, 1), boxes),
            r"scores must be a tensor of shape .*, got one of shape \[10, 3\]",
        ),
        (
            lambda scores, boxes: Found(scores, boxes[:, :, 0]),
            r"boxes must be a tensor of shape \[N, P, K or 1, 4\] = \[2, 5, 3, 4\], got one of shape \[2, 5, 4\]",
        ),
        (lambda scores, boxes: Found(scores, None), "boxes must be a tensor .* got a value of type NoneType"),
        (lambda scores, boxes: (scores, boxes), r"must return Found\(scores, boxes\), got tuple"),
    ],
)
def test_what_detect_returns_is_checked(answer, message):
    class Wrong(SelfAttention):
        def detect(self, features, boxes, image_sizes, valid):
            return answer(torch.zeros(2, 5, 3), boxes[:, :, None])

    with pytest.raises(ValueError, match=rf"^Wrong.detect:? {message}"):
        detected(Wrong(RoIAlign(3)), pyramid(2, STRIDES), [random_boxes(5)] * 2, SIZES[:2])


@pytest.mark.parametrize(
    ("logits", "deltas", "message"),
    [
        ((4, 12), (4, 12, 1, 4), r"logits must be a tensor of shape \[N, S, K \+ 1\] = .*, got one of shape \[4, 12\]"),
        (
            (4, 12, 4),
            (4, 12, 4),
            r"deltas must be a tensor of shape \[N, S, B, 4\] = \[4, 12, B, 4\], got .*\[4, 12, 4\]",
        ),
        ((4, 12, 4), (48, 1, 4), r"deltas must be .*, got one of shape \[48, 1, 4\]"),
    ],
)
def test_what_box_losses_takes_is_checked(logits, deltas, message):
    rois = RoISampler(rois_per_image=12)([random_boxes(9)] * 4, [random_target(2)] * 4)
    with pytest.raises(ValueError, match=f"^box_losses: {message}"):
        box_losses(rois, torch.zeros(logits), torch.zeros(deltas))


def test_parts_are_joined_as_they_come(monkeypatch):
    monkeypatch.setattr(base, "ROIS_PER_PASS", 4)
    boxes = torch.rand(2, 5, 4)
    logits, nothing = in_parts(lambda part: (part + 1, None), boxes)
    assert torch.equal(logits, boxes + 1)
    assert nothing is None
    found = in_parts(lambda part: Found(part, part[:, :, None]), boxes)
    assert isinstance(found, Found)
    assert torch.equal(found.scores, boxes)
    assert in_parts(lambda part: part.sum(-1), boxes[:, :0]).shape == (2, 0)


def test_the_toolkit_says_what_it_has():
    assert all(getattr(toolkit, name) is not None for name in toolkit.__all__)
    told = toolkit.__doc__ or ""
    assert [name for name in toolkit.__all__ if name not in told] == []
