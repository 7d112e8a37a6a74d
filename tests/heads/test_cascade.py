import pytest
import torch
import torch.nn.functional as F
from samples import pyramid, random_boxes, random_target
from torch import nn

from detpipe import boxes as box_ops
from detpipe.heads import CascadeHead, FastRCNNHead, LaterStages, RoISampler
from detpipe.heads import base as module
from detpipe.roi_pooling import RoIAlign

STRIDES = {"c3": 8, "c4": 16}
SIZES = [(60, 80), (64, 96)]


def make(**arguments) -> CascadeHead:
    settings = {"pooler": RoIAlign(2), "fc": [12], "sampler": RoISampler(10), **arguments}
    head = CascadeHead(4, 3, STRIDES, **settings)
    for stage in head.stages:
        nn.init.normal_(stage.classifier.weight)
        nn.init.normal_(stage.regressor.weight, std=0.3)
    return head


def inputs(objects=(3, 2)):
    targets = [random_target(count) for count in objects]
    near = [torch.cat([t["boxes"] + torch.randn_like(t["boxes"]) * 3 for _ in range(4)]) for t in targets]
    return pyramid(len(objects), STRIDES), [torch.cat((random_boxes(9), boxes)) for boxes in near], targets


def test_without_later_stages_it_is_a_class_agnostic_fast_rcnn_head():
    plain = FastRCNNHead(4, 3, STRIDES, pooler=RoIAlign(2), fc=[12], class_agnostic=True, sampler=RoISampler(10))
    head = make(later=LaterStages((), (), ()))
    head.stages[0].load_state_dict(plain.state_dict())
    features, proposals, targets = inputs()
    torch.manual_seed(0)
    _, want = plain(features, proposals, SIZES, targets)
    torch.manual_seed(0)
    _, got = head(features, proposals, SIZES, targets)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert sorted(got) == sorted(want)
    found, expected = head.eval()(features, proposals, SIZES)[0], plain.eval()(features, proposals, SIZES)[0]
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_losses_equal_a_slow_loop():
    head = make()
    features, proposals, targets = inputs()
    torch.manual_seed(1)
    _, losses = head(features, proposals, SIZES, targets)
    assert sorted(losses) == sorted(
        f"loss_{kind}{end}" for kind in ("classifier", "box_reg") for end in ("", "_2", "_3")
    )
    torch.manual_seed(1)
    rois = head.sampler(proposals, targets)
    boxes, valid = rois.rois, rois.valid
    for index, (iou, weight, factor) in enumerate(zip((0.5, 0.6, 0.7), (1, 0.5, 0.25), (1, 2, 3), strict=True)):
        stage = head.stages[index]
        logits, deltas = stage.outputs(stage.hidden(head.pooler(features, boxes, STRIDES)))
        entropy, distance, count, moved = 0.0, 0.0, 0, boxes.clone()
        for n in range(2):
            for s in range(boxes.shape[1]):
                if not valid[n, s]:
                    continue
                overlaps = box_ops.iou(boxes[n, s][None], targets[n]["boxes"])[0]
                best = int(overlaps.argmax())
                label = int(targets[n]["labels"][best]) if overlaps[best] >= iou else 0
                entropy += F.cross_entropy(logits[n, s], torch.tensor(label)).item()
                count += 1
                scale = torch.tensor([10.0, 10, 5, 5]) * factor
                if label:
                    want = box_ops.encode(targets[n]["boxes"][best], boxes[n, s]) * factor
                    distance += F.smooth_l1_loss(deltas[n, s, 0], want, reduction="sum").item()
                moved[n, s] = box_ops.decode(deltas[n, s, 0], boxes[n, s], tuple(scale.tolist())).detach()
                moved[n, s] = box_ops.clip(moved[n, s], *map(float, SIZES[n]))
        end = "" if index == 0 else f"_{index + 1}"
        assert losses[f"loss_classifier{end}"].item() == pytest.approx(weight * entropy / count, rel=1e-4)
        assert losses[f"loss_box_reg{end}"].item() == pytest.approx(weight * distance / count, rel=1e-4, abs=1e-7)
        valid = valid & box_ops.valid(moved)
        boxes = box_ops.fill(moved, valid)


def test_every_stage_learns_from_its_own_losses_only():
    head = make()
    features, proposals, targets = inputs()
    _, losses = head(features, proposals, SIZES, targets)
    losses["loss_classifier_3"].backward(retain_graph=True)
    assert head.stages[2].classifier.weight.grad is not None
    assert head.stages[0].regressor.weight.grad is None
    assert head.stages[1].regressor.weight.grad is None
    sum(losses.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())


def test_scores_are_means_and_boxes_the_last(monkeypatch):
    head = make().eval()
    head.return_glimpses = True
    features, boxes = pyramid(2, STRIDES), torch.stack([random_boxes(6), random_boxes(6)])
    found = head.detect(features, boxes, SIZES)
    scores, place = [], boxes
    for index, stage in enumerate(head.stages):
        logits, deltas = stage.outputs(stage.hidden(head.pooler(features, place, STRIDES)))
        scores.append(logits.softmax(-1)[..., 1:])
        weights = tuple(w * (index + 1) for w in box_ops.DELTA_WEIGHTS)
        last = torch.stack(
            [box_ops.clip(box_ops.decode(deltas[n, :, 0], place[n], weights), *map(float, SIZES[n])) for n in range(2)]
        )
        place = box_ops.fill(last, box_ops.valid(last))
        if index < 2:
            torch.testing.assert_close(found.glimpses[:, :, index, 0], place[..., :2])
            torch.testing.assert_close(found.glimpses[:, :, index, 2], place[..., 2:])
    torch.testing.assert_close(found.scores, torch.stack(scores).mean(0))
    torch.testing.assert_close(found.boxes[:, :, 0], last)
    whole, _ = head(features, list(boxes), SIZES)
    monkeypatch.setattr(module, "ROIS_PER_PASS", 4)
    parts, _ = head(features, list(boxes), SIZES)
    for one, other in zip(whole, parts, strict=True):
        assert all(torch.allclose(one[key].float(), other[key].float(), atol=1e-4) for key in one)


@pytest.mark.parametrize(("objects", "count"), [((0, 0), 5), ((0, 2), 0), ((0, 0), 0)])
def test_batches_without_objects_or_proposals_are_finite(objects, count):
    head, targets = make(), [random_target(n) for n in objects]
    features = {key: level.requires_grad_() for key, level in pyramid(2, STRIDES).items()}
    _, losses = head(features, [random_boxes(count)] * 2, SIZES, targets)
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
    found, _ = head.eval()(features, [random_boxes(count)] * 2, SIZES)
    assert len(found) == 2


def test_boxes_that_a_stage_drives_out_of_the_image_take_no_part():
    head = make()
    with torch.no_grad():
        head.stages[0].regressor.bias.copy_(torch.tensor([-1e4, 0, 0, 0]))
    features, proposals, targets = inputs()
    _, losses = head(features, proposals, SIZES, targets)
    assert losses["loss_classifier"] > 0
    assert losses["loss_classifier_2"] == 0
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_crowds_and_difficult_objects_are_neither():
    head = make(sampler=RoISampler(4, add_ground_truth=False))
    box = torch.tensor([[10.0, 10.0, 40.0, 40.0]])
    target = {"boxes": box, "labels": torch.tensor([1]), "difficult": torch.tensor([True])}
    found = head.sampler.rematch(box[None], torch.ones(1, 1) > 0, [target], 0.6)
    assert not found.valid.any()
    assert not found.foreground.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ious": (0.6,)}, "one number for each stage"),
        ({"ious": (0.6, 1.2)}, "ious must be in 0..1"),
        ({"loss_weights": (0.5, 0.0)}, "positive"),
        ({"delta_factors": (2.0, -1.0)}, "positive"),
    ],
)
def test_bad_stages_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LaterStages(**change)
