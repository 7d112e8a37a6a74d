import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from detpipe.evaluation.worst_images import ImageOutcome
from detpipe.pictures import visualize
from detpipe.pictures.glimpse_pictures import draw_glimpses
from detpipe.pictures.report_images import draw_outcome
from detpipe.pictures.visualize import (
    IGNORED_COLOR,
    PALETTE,
    class_color,
    comparison_grid,
    contact_sheet,
    draw,
    fit,
    save_png,
)
from detpipe.support.errors import UsageError
from detpipe.types import Detection, Target

NAMES = ("cat", "dog", "bird")
HAS_SUPERVISION = importlib.util.find_spec("supervision") is not None
needs_supervision = pytest.mark.skipif(not HAS_SUPERVISION, reason="supervision (extra viz) is not installed")
renderers = pytest.mark.parametrize("renderer", [pytest.param("supervision", marks=needs_supervision), "torchvision"])


def gray(height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def pixels_of(image: torch.Tensor, color: tuple[int, int, int]) -> int:
    """How many pixels have exactly this color."""
    return int((image == torch.tensor(color)[:, None, None]).all(dim=0).sum())


def detection(*rows: tuple[float, float, float, float, float, int]) -> Detection:
    values = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": values[:, :4], "scores": values[:, 4], "labels": values[:, 5].long()}


def truth(*rows: tuple[float, float, float, float, int], **more) -> Target:
    values = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    return {"boxes": values[:, :4], "labels": values[:, 4].long(), **more}


@renderers
def test_boxes_lie_where_they_should_in_the_color_of_their_class(renderer):
    image = gray(500, 600)
    boxes = torch.tensor([[100.0, 100, 200, 300], [300, 50, 500, 400]])
    drawn = draw(image, boxes, torch.tensor([1, 3]), NAMES, renderer=renderer)
    assert drawn.shape == image.shape
    assert drawn.dtype == torch.uint8
    assert (image == 128).all()
    for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), (1, 3), strict=True):
        for y, x in ((y1, (x1 + x2) // 2), (y2 - 1, (x1 + x2) // 2), ((y1 + y2) // 2, x1), ((y1 + y2) // 2, x2 - 1)):
            near = drawn[:, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            assert pixels_of(near, class_color(label)) >= 3, (label, y, x)
        assert (drawn[:, y1 + 30 : y2 - 30, x1 + 30 : x2 - 30] == 128).all()


@renderers
def test_tags_stay_inside_of_the_image(renderer):
    label = torch.tensor([2])
    middle = draw(
        gray(500, 500), torch.tensor([[200.0, 200, 260, 260]]), label, NAMES, torch.tensor([0.5]), renderer=renderer
    )
    for corner in ([0.0, 0, 60, 60], [440.0, 0, 500, 60], [440.0, 440, 500, 500], [0.0, 440, 60, 500]):
        drawn = draw(gray(500, 500), torch.tensor([corner]), label, NAMES, torch.tensor([0.5]), renderer=renderer)
        assert pixels_of(drawn, class_color(2)) > 0.75 * pixels_of(middle, class_color(2)), corner


@renderers
def test_names_that_are_not_one_line_of_text_are_drawn(renderer):
    names = ("a\nb", "caf\udce9")
    boxes, labels = torch.tensor([[9.0, 30, 99, 99], [9, 300, 99, 400]]), torch.tensor([1, 2])
    drawn, shown = (
        draw(gray(500, 600), boxes, labels, known, renderer=renderer) for known in (names, ("a b", "caf\\udce9"))
    )
    assert torch.equal(drawn, shown)
    contact_sheet([gray(50, 60)], [truth(file_name=f"{names[0]}.png")], NAMES, names[1])


@renderers
def test_boxes_that_stick_out_or_have_no_size_are_drawn(renderer):
    boxes = torch.tensor([[-50.0, -20, 700, 900], [30, 30, 30, 30], [-9, -9, -5, -5]])
    assert draw(gray(500, 600), boxes, torch.tensor([1, 2, 3]), NAMES, renderer=renderer).shape == (3, 500, 600)


@pytest.mark.parametrize(
    ("boxes", "places"),
    [
        ([[20, 30, 60, 60]], [[20, 20]]),  # above
        ([[20, 5, 60, 60]], [[20, 5]]),  # inside, where there is no room above
        ([[80, 30, 95, 60]], [[70, 20]]),  # moved into the image
        ([[20, 30, 60, 60], [20, 30, 70, 60]], [[20, 30], [20, 20]]),  # the last one is on top and has the first choice
        ([[0, 0, 100, 60], [0, 0, 100, 60]], [[70, 0], [0, 0]]),
        ([], []),
    ],
)
def test_tags_leave_each_other_room(boxes, places):
    placed = visualize._place_tags(np.array(boxes, float).reshape(-1, 4), np.full((len(boxes), 2), (30, 10)), 100, 60)
    assert placed.tolist() == places


@renderers
def test_higher_scores_are_drawn_last(renderer):
    boxes = torch.tensor([[100.0, 100, 300, 300]]).repeat(2, 1)
    drawn = draw(gray(500, 500), boxes, torch.tensor([1, 2]), NAMES, torch.tensor([0.9, 0.4]), renderer=renderer)
    assert pixels_of(drawn, class_color(1)) > 700
    assert pixels_of(drawn[:, 200:], class_color(2)) == 0


@renderers
def test_given_colors_replace_those_of_the_classes(renderer):
    boxes = torch.tensor([[100.0, 100, 300, 300], [50, 350, 150, 450]])
    scores, colors = torch.tensor([0.9, 0.4]), [(1, 2, 3), (9, 8, 7)]
    drawn = draw(gray(500, 500), boxes, torch.tensor([1, 2]), NAMES, scores, colors=colors, renderer=renderer)
    assert pixels_of(drawn[:, 250:302], (1, 2, 3)) > 100
    assert pixels_of(drawn[:, 400:460], (9, 8, 7)) > 100


@renderers
def test_nothing_to_draw(renderer):
    image = torch.randint(0, 256, (3, 500, 480), dtype=torch.uint8)
    drawn = draw(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), NAMES, torch.zeros(0), renderer=renderer)
    assert torch.equal(drawn, image)
    assert drawn.data_ptr() != image.data_ptr()


@pytest.mark.parametrize(("size", "factor"), [((160, 160), 3), ((100, 333), 5), ((375, 500), 1), ((480, 640), 1)])
def test_small_images_are_enlarged_by_a_whole_factor(size, factor):
    box, label = torch.tensor([[10.0, 20, 60, 70]]), torch.tensor([1])
    drawn = draw(gray(*size), box, label, NAMES, renderer="torchvision")
    assert drawn.shape == (3, size[0] * factor, size[1] * factor)
    near_bottom_edge = drawn[:, 70 * factor - 2 : 70 * factor + 1, 20 * factor : 50 * factor]
    assert pixels_of(near_bottom_edge, class_color(1)) >= 30 * factor
    assert draw(gray(*size), box, label, NAMES, min_side=0).shape == (3, *size)


@needs_supervision
def test_both_renderers_choose_the_same_colors():
    boxes = torch.tensor([[20.0 + 90 * k, 100, 90 + 90 * k, 300] for k in range(3)])
    arguments = (gray(500, 500), boxes, torch.tensor([3, 1, 2]), NAMES, torch.tensor([0.2, 0.9, 0.5]))
    first, second = draw(*arguments, renderer="supervision"), draw(*arguments, renderer="torchvision")
    for color in PALETTE[:3]:
        assert pixels_of(first, color) > 500
        assert pixels_of(second, color) > 500
    assert (first.int() - second.int()).abs().amax(dim=0).gt(60).float().mean() < 0.03


def test_colors_go_round_after_the_last():
    assert len(set(PALETTE)) == len(PALETTE)
    assert class_color(1) == PALETTE[0]
    assert class_color(len(PALETTE) + 1) == PALETTE[0]


def test_without_supervision_torchvision_draws(monkeypatch):
    arguments = (gray(480, 480), torch.tensor([[10.0, 50, 60, 90]]), torch.tensor([1]), NAMES)
    expected = draw(*arguments, renderer="torchvision")
    monkeypatch.setattr(visualize.importlib.util, "find_spec", lambda name: None)
    assert torch.equal(draw(*arguments), expected)
    with pytest.raises(UsageError, match=r"detpipe\[viz\]"):
        draw(*arguments, renderer="supervision")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(3, 8, 8)}, "uint8"),
        ({"image": torch.zeros(8, 8, 3, dtype=torch.uint8)}, r"\[3, H, W\]"),
        ({"image": torch.zeros(3, 0, 8, dtype=torch.uint8)}, r"\[3, H, W\]"),
        ({"boxes": torch.zeros(1, 5)}, r"\[D, 4\]"),
        ({"boxes": torch.tensor([[0.0, 0, float("nan"), 1]])}, "finite"),
        ({"labels": torch.tensor([4])}, r"1\.\.3"),
        ({"labels": torch.tensor([0])}, r"1\.\.3"),
        ({"labels": torch.tensor([1, 1])}, "labels"),
        ({"scores": torch.zeros(2)}, "scores"),
        ({"colors": []}, "colors"),
        ({"renderer": "cairo"}, "cairo"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    right = {"image": gray(8, 8), "boxes": torch.tensor([[1.0, 1, 5, 5]]), "labels": torch.tensor([1])}
    with pytest.raises(ValueError, match=message):
        draw(**{**right, "class_names": NAMES, **change})


@renderers
def test_grid_of_images_of_different_sizes_and_empties(renderer):
    images = [gray(160, 160), gray(300, 100), gray(90, 400)]
    targets = [
        truth((10, 30, 60, 90, 1), (90, 90, 150, 150, 2), iscrowd=torch.tensor([False, True]), file_name="a/b.jpg"),
        truth(),
        truth((50, 30, 100, 80, 3), difficult=torch.tensor([True])),
    ]
    detections = [detection((10, 30, 60, 90, 0.9, 1), (60, 60, 90, 90, 0.1, 2)), detection(), detection()]
    grid = comparison_grid(images, targets, detections, NAMES, 0.5, panel_side=300, renderer=renderer)
    assert grid.dtype == torch.uint8
    width = 2 * (2 * 300 + 4 + 16) + 16  # two pairs of panels a row, the widest panel decides
    assert grid.shape == (3, 44 + (300 + 22 + 16) + (68 + 22 + 16), width)
    left, right = grid[:, 44:360, 16:316], grid[:, 44:360, 320:620]
    assert pixels_of(left, class_color(1)) > 100
    assert pixels_of(right, class_color(1)) > 100
    assert pixels_of(left, IGNORED_COLOR) > 100
    assert pixels_of(grid, class_color(2)) == 0  # a crowd region, and a detection below the threshold
    assert pixels_of(grid, class_color(3)) == 0  # difficult


def test_grid_of_one_image_has_no_empty_column():
    grid = comparison_grid([gray(100, 100)], [truth()], [detection()], NAMES, panel_side=200)
    assert grid.shape[:2] == (3, 44 + 200 + 22 + 16)
    assert 404 + 32 <= grid.shape[2] < 404 + 32 + 200  # as wide as its header


@pytest.mark.parametrize(("images", "detections"), [([], []), ([gray(8, 8)], [])])
def test_grid_needs_one_of_each(images, detections):
    with pytest.raises(ValueError, match=r"images.*targets.*detections"):
        comparison_grid(images, [truth() for _ in images], detections, NAMES)


def test_png_round_trip(tmp_path):
    image = torch.randint(0, 256, (3, 7, 11), dtype=torch.uint8)
    save_png(tmp_path / "new" / "image.png", image)
    with Image.open(tmp_path / "new" / "image.png") as read:
        assert read.format == "PNG"
        assert torch.equal(torch.from_numpy(np.array(read)).permute(2, 0, 1), image)


def test_failed_png_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    path.write_text("old")
    with pytest.raises(ValueError, match="uint8"):
        save_png(path, torch.zeros(3, 4, 4))

    def disk_full(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        save_png(path, gray(4, 4))
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]


SLIM = [(1, 3000), (3000, 1), (16, 8000), (8000, 16), (1, 1), (2, 100_000)]


def slim(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image, and a box of its first third and one of its last."""
    boxes = [[0, 0, width / 3, height / 3], [width * 2 / 3, height * 2 / 3, width, height]]
    return gray(height, width), torch.tensor(boxes)


@pytest.mark.parametrize("size", SLIM)
@renderers
def test_slim_images_are_drawn_in_bounded_memory_and_can_be_read(size, renderer):
    image, boxes = slim(*size)
    drawn = draw(image, boxes, torch.tensor([1, 3]), NAMES, torch.tensor([0.9, 0.8]), renderer=renderer)
    high, wide = (after // before for after, before in zip(drawn.shape[1:], size, strict=True))
    assert drawn.shape == (3, high * size[0], wide * size[1])
    assert min(drawn.shape[1:]) >= 60  # a tag has 19 pixels
    assert max(drawn.shape[1:]) <= max(6 * 480, *size)
    assert pixels_of(drawn, class_color(1)) > 300
    assert pixels_of(drawn, class_color(3)) > 300
    ends = (
        drawn[:, : drawn.shape[1] // 2, : drawn.shape[2] // 2],
        drawn[:, drawn.shape[1] // 2 :, drawn.shape[2] // 2 :],
    )
    assert pixels_of(ends[0], class_color(1)) > 100  # boxes are stretched with the image
    assert pixels_of(ends[1], class_color(3)) > 50


@pytest.mark.parametrize("size", [*SLIM[:-1], pytest.param(SLIM[-1], marks=pytest.mark.slow)])
def test_panels_of_slim_images_are_no_threads(size):
    image, boxes = slim(*size)
    labels, scores = torch.tensor([1, 3]), torch.tensor([0.9, 0.8])
    target: Target = {"boxes": boxes, "labels": labels, "file_name": "slim.png"}
    grid = comparison_grid([image], [target], [{"boxes": boxes, "labels": labels, "scores": scores}], NAMES)
    sheet = contact_sheet([image], [target], NAMES)
    corners = torch.stack([boxes[:, [0, 1]], boxes[:, [2, 1]], boxes[:, [2, 3]], boxes[:, [0, 3]]], dim=1)
    seen = {"boxes": boxes, "labels": labels, "scores": scores, "proposals": boxes, "glimpses": corners[:, None]}
    glimpses = draw_glimpses(image, seen, NAMES)
    truth_and_found = (boxes.numpy(), labels.numpy(), ("found",) * 2, boxes.numpy(), labels.numpy(), scores.numpy())
    outcome = ImageOutcome(0, 1, "slim.png", 0.0, *truth_and_found, ("right",) * 2)
    outcomes = draw_outcome(image, outcome, list(NAMES))
    for picture, longest in ((grid, 1000), (sheet, 500), (glimpses, max(6 * 480, *size) + 700), (outcomes.found, 640)):
        assert max(picture.shape[1:]) <= longest
        assert min(picture.shape[1:]) >= 60
    for picture in (grid, sheet, glimpses):
        assert pixels_of(picture, class_color(1)) > 100
        assert pixels_of(picture, class_color(3)) > 100


def test_images_that_are_not_slim_keep_their_proportions():
    for size in ((60, 300), (300, 60), (480, 640), (600, 100)):
        image, _ = slim(*size)
        picture, factors = fit(image, 360)
        assert factors.tolist() == pytest.approx([360 / max(size)] * 4)
        assert picture.shape[1:] == tuple(round(side * 360 / max(size)) for side in size)
