import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from evaluation.builders import truth
from lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from detpipe.backbones import SEResNet
from detpipe.boxes import iou, valid
from detpipe.detector import TwoStageDetector, total_loss
from detpipe.evaluation import CocoEvaluator
from detpipe.heads import FastRCNNHead, Postprocess, RoISampler
from detpipe.optimization import LRSchedule, Optimizer
from detpipe.proposals import RPN, Anchors, DenseGrid, PrecomputedProposals
from detpipe.roi_pooling import RoIAlign
from detpipe.types import Target

IMAGES = [torch.rand(3, 50, 70), torch.rand(3, 64, 48)]


def make(proposals=None, min_size: int = 64, max_size: int = 96, level: str = "c3", **postprocess) -> TwoStageDetector:
    backbone = SEResNet(18, levels=[level], out_channels=32)
    head = FastRCNNHead(
        32,
        num_classes=2,
        strides=backbone.strides,
        pooler=RoIAlign(4, sampling_ratio=1),
        fc=[64],
        sampler=RoISampler(rois_per_image=32),
        postprocess=Postprocess(**{"score_threshold": 0.05, **postprocess}),
    )
    source = (
        DenseGrid(scales=[16, 24, 32], ratios=[0.7, 1, 1.4], stride=8, spacing=0) if proposals is None else proposals
    )
    return TwoStageDetector(
        backbone, source, head, Optimizer("adamw", lr=2e-3), LRSchedule("cosine", warmup=0.1), min_size, max_size
    )


def some_targets() -> list[Target]:
    return [
        Target(boxes=torch.tensor([[5.0, 6.0, 30.0, 28.0], [40.0, 20.0, 60.0, 45.0]]), labels=torch.tensor([1, 2])),
        Target(boxes=torch.tensor([[10.0, 10.0, 40.0, 50.0]]), labels=torch.tensor([2])),
    ]


def no_objects() -> Target:
    return Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))


def modes(detector: TwoStageDetector) -> dict[str, bool]:
    return {name: module.training for name, module in detector.named_modules()}


@pytest.mark.parametrize("training", [True, False])
def test_forward_detects_and_losses_returns_losses_in_either_mode(training):
    detector = make().train(training)
    detector.backbone.stages["c2"].eval()  # a mixture of modes is kept as well
    before = modes(detector)
    detections = detector(IMAGES)
    assert [sorted(found) for found in detections] == [["boxes", "labels", "scores"]] * 2
    losses = detector.losses(IMAGES, some_targets())
    assert sorted(losses) == ["loss_box_reg", "loss_classifier"]
    assert total_loss(losses).requires_grad
    assert modes(detector) == before


class Wrapped(nn.Module):
    """A stage around another, which tells it whether to return losses, or forgets to."""

    def __init__(self, inner: nn.Module, tells: bool) -> None:
        super().__init__()
        self.inner, self.tells = inner, tells

    def forward(self, *arguments):
        if self.tells:
            self.inner.training = self.training
        return self.inner(*arguments)


def small_rpn() -> RPN:
    return RPN(32, {"c3": 8}, anchors=Anchors(sizes=[[16, 24]]))


@pytest.mark.parametrize("training", [True, False])
def test_a_wrapped_stage_that_passes_the_flag_on_trains_and_detects(training):
    detector = make(Wrapped(small_rpn(), tells=True))
    detector.head = Wrapped(detector.head, tells=True)
    detector.train(training)
    assert sorted(detector.losses(IMAGES, some_targets())) == [
        "loss_box_reg", "loss_classifier", "loss_objectness", "loss_rpn_box_reg",
    ]  # fmt: skip
    assert len(detector(IMAGES)) == 2


def test_a_wrapped_stage_that_does_not_pass_the_flag_on_is_named():
    detector = make()
    detector.head = Wrapped(detector.head, tells=False)
    with pytest.raises(
        ValueError, match=r"Wrapped returned 0 detections for 2 images: .*inner.training = self.training"
    ):
        detector.train()(IMAGES, some_targets())
    with pytest.raises(
        ValueError, match=r"Wrapped returned no loss named 'loss_\*', got \[\]: .*inner.training = self"
    ):
        detector.eval().losses(IMAGES, some_targets())
    detector = make(Wrapped(small_rpn(), tells=False))
    with pytest.raises(ValueError, match=r"Wrapped has parameters to train, but returned no losses: .*requires_grad_"):
        detector.eval().losses(IMAGES, some_targets())
    detector.proposals.requires_grad_(False)
    assert sorted(detector.losses(IMAGES, some_targets())) == ["loss_box_reg", "loss_classifier"]


def test_a_loss_of_two_stages_is_named():
    class Same(DenseGrid):
        def forward(self, *arguments):
            return super().forward(*arguments)[0], {"loss_classifier": torch.zeros(())}

    with pytest.raises(ValueError, match="Same and FastRCNNHead both return a loss 'loss_classifier': rename it"):
        make(Same(scales=[32])).losses(IMAGES, some_targets())


class Answer(nn.Module):
    """A stage that returns what it is told to."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *given):
        return self.answer


FOUND = {"boxes": torch.zeros(3, 4), "scores": torch.zeros(3), "labels": torch.zeros(3, dtype=torch.int64)}
WITHOUT_SCORES = {key: value for key, value in FOUND.items() if key != "scores"}


@pytest.mark.parametrize(
    ("stage", "answer", "message"),
    [
        ("head", [FOUND, FOUND], "Answer must return a pair, a list of detections and a dict of losses, got list"),
        ("head", (FOUND, {}), r"Answer must return a pair, .* got \[dict, dict\]"),
        ("head", ([FOUND, FOUND], {}, {}), r"Answer must return a pair, .* got \[list, dict, dict\]"),
        (
            "head",
            ([FOUND, WITHOUT_SCORES], {}),
            r"Answer: detections\[1\] must be a dict with 'boxes', 'scores' and 'labels', got \['boxes', 'labels'\]",
        ),
        (
            "head",
            ([FOUND, torch.zeros(3, 4)], {}),
            r"Answer: detections\[1\] must be a dict .* got a value of type Tensor",
        ),
        (
            "head",
            ([{**FOUND, "boxes": torch.zeros(3, 2, 4)}, FOUND], {}),
            r"detections\[0\]\['boxes'\] must be a tensor of shape \[D, 4\], got one of shape \[3, 2, 4\]",
        ),
        (
            "head",
            ([{**FOUND, "labels": torch.zeros(2)}, FOUND], {}),
            r"detections\[0\]\['labels'\] must be a tensor of shape \[D\] = \[3\], got one of shape \[2\]",
        ),
        (
            "head",
            ([FOUND, FOUND], {"loss_x": torch.zeros(5)}),
            r"Answer: losses\['loss_x'\] must be a tensor without dimensions, got one of shape \[5\]",
        ),
        ("head", ([FOUND, FOUND], {"loss_x": 0.5}), r"losses\['loss_x'\] must be a .* got a value of type float"),
        ("head", ([FOUND], {}), "Answer returned 1 detections for 2 images"),
        (
            "proposals",
            (torch.zeros(2, 5, 4), {}),
            r"Answer must return a pair, a list of boxes .* got \[Tensor, dict\]",
        ),
        ("proposals", ([torch.zeros(5, 4)], {}), "Answer returned the boxes of 1 images for 2 images"),
        (
            "proposals",
            ([torch.zeros(5, 4), torch.zeros(5, 5)], {}),
            r"Answer: boxes\[1\] must be a tensor of shape \[P, 4\], got one of shape \[5, 5\]",
        ),
    ],
)
def test_what_a_stage_returns_is_checked(stage, answer, message):
    detector = make()
    setattr(detector, stage, Answer(answer))
    with pytest.raises(ValueError, match=message):
        detector(IMAGES)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            torch.zeros(2, 32, 8, 12),
            r"must return a dict with a map for each level of its strides, \['c3'\]; got a value of",
        ),
        ({"c4": torch.zeros(2, 32, 8, 12)}, r"a map for each level of its strides, \['c3'\]; got \['c4'\]"),
        (
            {"c3": torch.zeros(2, 16, 8, 12)},
            r"features\['c3'\] must be a tensor of shape \[N, C, H, W\] = \[2, 32, H, W\], got one of shape \[2, 16, 8, 12\]",
        ),
        ({"c3": torch.zeros(2, 32, 16, 24)}, "strides says 8 pixels a cell of 'c3', but 96 pixels gave 24 cells"),
    ],
)
def test_what_a_backbone_returns_is_checked(features, message):
    detector = make()
    detector.backbone.forward = lambda images: features
    with pytest.raises(ValueError, match=f"SEResNet:? .*{message}"):
        detector(IMAGES)


def test_layers_of_another_width_than_the_features_are_named():
    detector = make()
    detector.head.shared[1] = nn.Linear(7, 64)
    with pytest.raises(ValueError, match=r"FastRCNNHead: layers and features differ in width \(mat1 .*'c3': \[2, 32, "):
        detector(IMAGES)
    detector = make(RPN(16, {"c3": 8}, anchors=Anchors(sizes=[[16, 24]])))
    with pytest.raises(ValueError, match=r"RPN: layers and features differ in width \(.*channels.*'c3': \[2, 32, "):
        detector(IMAGES)


def test_too_few_outputs_for_the_classes_are_named():
    detector = make()
    detector.head.num_classes = 3
    targets = [{**target, "labels": target["labels"] + 1} for target in some_targets()]  # classes 2 and 3 of two
    with pytest.raises(ValueError, match="FastRCNNHead: Target 3 is out of bounds: for K classes it needs K"):
        detector.losses(IMAGES, targets)


@pytest.mark.parametrize("drops", [True, False])
def test_a_source_is_told_whether_the_head_drops_boxes_without_area(drops):
    detector, told = make(), []
    assert detector.head.drops_empty
    detector.head.drops_empty = drops
    detector.proposals.register_forward_pre_hook(lambda source, _inputs: told.append(source.fills_up))
    detector.losses([torch.rand(3, 48, 64)], some_targets()[:1])
    assert told == [drops]
    assert not detector.proposals.fills_up


def test_modes_are_restored_after_an_error():
    detector = make(PrecomputedProposals()).eval()
    before = modes(detector)
    with pytest.raises(ValueError, match="no proposals"):
        detector.losses(IMAGES, some_targets())
    assert modes(detector) == before


def test_detections_are_in_pixels_of_the_images_passed():
    """A head that returns its RoIs shows the proposals themselves, after both changes of frame."""
    detector = make(PrecomputedProposals(), score_threshold=0.0).eval()
    torch.nn.init.zeros_(detector.head.regressor.weight)
    boxes = [torch.tensor([[5.0, 6.0, 30.0, 28.0]]), torch.tensor([[0.0, 0.0, 48.0, 64.0], [1.0, 2.0, 12.0, 40.0]])]
    for size in (64, 33, 150):
        detector.min_size, detector.max_size = size, 2 * size
        detections = detector(IMAGES, [{"proposals": b} for b in boxes])
        for found, wanted, image in zip(detections, boxes, IMAGES, strict=True):
            overlap = iou(wanted, found["boxes"]).amax(dim=1)
            torch.testing.assert_close(overlap, torch.ones(len(wanted)), rtol=1e-4, atol=0)
            assert valid(found["boxes"]).all()
            assert (found["boxes"] >= 0).all()
            assert (found["boxes"][:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()


def test_losses_see_targets_in_the_frame_of_the_batch():
    """Larger images with larger boxes, shrunk to the same batch, give the same losses."""
    detector = make().eval()
    targets = some_targets()
    torch.manual_seed(3)
    small = detector.losses(IMAGES, targets)
    doubled = [Target(boxes=t["boxes"] * 2, labels=t["labels"]) for t in targets]
    images = [image.repeat_interleave(2, 1).repeat_interleave(2, 2) for image in IMAGES]
    detector.min_size, detector.max_size = 64, 96
    torch.manual_seed(3)
    large = detector.losses(images, doubled)
    for name, value in small.items():
        assert large[name].item() == pytest.approx(value.item(), rel=0.1)


def test_an_image_is_detected_alike_alone_and_in_a_batch():
    detector = make(score_threshold=0.2).eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    together, alone = detector(images)[1], detector(images[1:])[0]
    assert len(alone["boxes"]) > 0
    for key in ("boxes", "scores", "labels"):
        torch.testing.assert_close(together[key], alone[key], rtol=1e-4, atol=1e-4)


def colored_scene() -> tuple[torch.Tensor, Target]:
    image = 0.3 + 0.05 * torch.rand(3, 64, 96)
    boxes = torch.tensor([[8.0, 10.0, 34.0, 40.0], [50.0, 22.0, 84.0, 46.0]])
    for channel, (x1, y1, x2, y2) in zip((0, 2), boxes.int().tolist(), strict=True):
        image[channel, y1:y2, x1:x2] = 0.9
    return image, Target(boxes=boxes, labels=torch.tensor([1, 2]))


def train(detector: TwoStageDetector, images, targets, steps: int) -> list[float]:
    optimizer = detector.optimizer.build(detector.backbone, detector.proposals, detector.head)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, detector.lr_scheduler.factor(steps))
    history = []
    for _ in range(steps):
        loss = total_loss(detector.losses(images, targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(loss.item())
    return history


@pytest.mark.slow
def test_one_image_is_overfitted_to_ap_1():
    detector = make(level="c2")
    image, target = colored_scene()
    train(detector, [image], [target], 300)
    with torch.no_grad():
        found = detector.eval()([image])
    objects = [
        (1, int(label), tuple(box)) for box, label in zip(target["boxes"].tolist(), target["labels"], strict=True)
    ]
    evaluator = CocoEvaluator(truth(objects, [1], ("red", "blue")))
    evaluator.update(found, [1])
    assert evaluator.compute()["AP"] == 1.0


def test_training_twice_gives_the_same_weights_to_the_last_bit():
    states = []
    for _ in range(2):
        torch.manual_seed(11)
        detector = make()
        train(detector, IMAGES, some_targets(), 3)
        states.append(detector.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    torch.manual_seed(11)
    fresh = make().state_dict()
    assert not all(torch.equal(value, states[0][key]) for key, value in fresh.items())


@pytest.mark.parametrize("targets", [[no_objects(), no_objects()], [some_targets()[0], no_objects()]])
def test_images_without_objects_are_trained_on(targets):
    detector = make()
    loss = total_loss(detector.losses(IMAGES, targets))
    loss.backward()
    assert 0 < loss.item() < math.inf
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_no_proposals_at_all():
    detector = make(PrecomputedProposals())
    targets = [{**target, "proposals": torch.zeros(0, 4)} for target in (no_objects(), no_objects())]
    assert [len(found["boxes"]) for found in detector(IMAGES, targets)] == [0, 0]
    loss = total_loss(detector.losses(IMAGES, targets))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None for parameter in detector.parameters())


def test_nan_in_an_image_is_not_hidden_from_the_losses():
    images = [IMAGES[0], IMAGES[1].clone()]
    images[1][0, 3, 4] = math.nan
    losses = make().eval().losses(images, some_targets())
    assert all(torch.isnan(loss) for loss in losses.values())


def collate(rows):
    images, targets = zip(*rows, strict=True)
    return list(images), list(targets)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")
def test_lightning_trains_validates_and_predicts(tmp_path):
    detector = make()
    rows = list(zip(IMAGES, some_targets(), strict=True))
    loader = DataLoader(rows, batch_size=2, collate_fn=collate)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    before = {name: value.clone() for name, value in detector.named_parameters()}
    trainer.fit(detector, loader, loader)  # begins with a validation in inference mode
    logged = trainer.callback_metrics
    for stage in ("train", "val"):
        assert {f"{stage}/loss", f"{stage}/loss_classifier", f"{stage}/loss_box_reg"} <= set(logged)
        parts = logged[f"{stage}/loss_classifier"] + logged[f"{stage}/loss_box_reg"]
        torch.testing.assert_close(logged[f"{stage}/loss"], parts)
    assert all(not torch.equal(value, before[name]) for name, value in detector.named_parameters())
    assert detector.training
    [found] = trainer.predict(detector, loader)
    assert len(found) == 2


def test_only_named_losses_are_summed():
    parts = {"loss_a": torch.tensor(1.0), "loss_b": torch.tensor(2.5), "accuracy": torch.tensor(0.9)}
    assert total_loss(parts) == 3.5
    with pytest.raises(ValueError, match=r"at least one loss named 'loss_\*', got \['accuracy'\]"):
        total_loss({"accuracy": torch.tensor(0.9)})


@pytest.mark.parametrize("sizes", [(0, 10), (20, 10)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="expected 0 < min_size <= max_size"):
        make(None, *sizes)


@torch.no_grad()
@pytest.mark.parametrize("min_size", [40, 96])
def test_images_that_the_data_resized_are_not_resized_again(min_size):
    """Whatever its own sizes, the detector finds the same in an image whose target gives the size of the picture in it."""
    detector = make(PrecomputedProposals(), min_size, 2 * min_size, score_threshold=0.0).eval()
    torch.nn.init.zeros_(detector.head.regressor.weight)
    image = torch.zeros(3, 64, 80)
    image[:, :48, :72] = torch.rand(3, 48, 72)
    boxes = torch.tensor([[8.0, 6.0, 40.0, 30.0]])
    target = Target(
        boxes=boxes, labels=torch.tensor([1]), proposals=boxes, content_size=(48, 72), file_size=(96, 216), image_id=1
    )
    [found] = detector([image], [target])
    own = make(PrecomputedProposals(), 48, 72, score_threshold=0.0).eval()
    own.load_state_dict(detector.state_dict())
    [wanted] = own([image[:, :48, :72]], [{"proposals": boxes}])
    assert float(iou(found["boxes"], boxes).max()) > 0.999  # in pixels of the image that was passed
    torch.testing.assert_close(found["boxes"], wanted["boxes"])
    in_file = boxes * torch.tensor([3.0, 2.0, 3.0, 2.0])
    for step in (detector.validation_step, detector.predict_step):
        detector.on_validation_epoch_start()
        [moved] = step(([image], [target]), 0)
        assert float(iou(moved["boxes"], in_file).max()) > 0.999  # in pixels of the file
        torch.testing.assert_close(moved["scores"], found["scores"])


def test_nothing_is_found_in_the_padding_of_the_data():
    detector = make(score_threshold=0.0).eval()
    target = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), content_size=(40, 56))
    [found] = detector([torch.rand(3, 96, 96)], [target])
    assert len(found["boxes"])
    assert (found["boxes"][:, 2:] <= torch.tensor([56.0, 40.0])).all()


def test_a_divisor_of_batches_and_another_librarys_rule():
    plain = make()
    other = TwoStageDetector(
        plain.backbone, plain.proposals, plain.head, min_size=64, max_size=96, divisor=48, resize="torchvision"
    )
    image = torch.rand(3, 50, 71)
    assert plain.to_batch([image]).tensors.shape[2:] == (64, 96)
    assert plain.to_batch([image]).image_sizes == [(64, 91)]
    assert other.to_batch([image]).tensors.shape[2:] == (96, 96)
    assert other.to_batch([image]).image_sizes == [(64, 90)]
    [found] = other.eval()([image])
    assert set(found) == {"boxes", "scores", "labels"}
    for wrong in ({"divisor": 0}, {"resize": "pillow"}):
        with pytest.raises(ValueError, match=r"divisor must be|resize must be one of detpipe, torchvision, detectron2"):
            TwoStageDetector(plain.backbone, plain.proposals, plain.head, **wrong)


def test_threads_share_a_detector():
    detector = make().eval()
    expected = detector(IMAGES)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: detector(IMAGES), range(40)):
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)


def test_objects_of_more_pixels_than_float16_holds_are_learned_in_half_precision():
    source = PrecomputedProposals()
    detector, image = make(source, min_size=300, max_size=300).half(), torch.rand(3, 300, 300)
    target = Target(boxes=torch.tensor([[5.0, 6.0, 290.0, 280.0]]).half(), labels=torch.tensor([1]))
    target["proposals"] = target["boxes"] + 3
    assert detector.losses([image.half()], [target])["loss_box_reg"] > 0


def test_a_label_outside_the_classes_is_named():
    targets = some_targets()
    targets[1]["labels"] = torch.tensor([3])
    with pytest.raises(ValueError, match=r"targets\[1\], box 0: label 3, expected 1\.\.2"):
        make().losses(IMAGES, targets)


@pytest.mark.parametrize("sizes", [((50, 70), (50, 70)), ((50, 70), (64, 48))])
def test_gradients_reach_the_images(sizes):
    detector, images = make(), [torch.rand(3, *size, requires_grad=True) for size in sizes]
    total_loss(detector.losses(images, some_targets())).backward()
    assert all(image.grad.abs().sum() > 0 for image in images)


def test_every_image_has_a_target():
    with pytest.raises(ValueError, match="expected one target for each image, got 1 for 2 images"):
        make().losses(IMAGES, some_targets()[:1])


@pytest.mark.parametrize("kind", [torch.float16, torch.uint8])
def test_images_are_resized_by_a_detector_in_half_precision(kind):
    detector = make(min_size=32, max_size=48).half()
    image = (torch.rand(3, 64, 80) * (255 if kind == torch.uint8 else 1)).to(kind)
    torch.set_default_dtype(torch.float16)  # as Lightning does where precision is 16-true
    try:
        assert detector.to_batch([image]).tensors.dtype == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)


def test_validation_steps_run_without_a_trainer():
    detector = make().eval()
    assert len(detector.validation_step((IMAGES, some_targets()), 0)) == 2
