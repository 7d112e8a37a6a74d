import inspect

import numpy as np
import pytest

from detpipe.datasets import Augment
from detpipe.datasets.augment.allowed_transforms import ALLOWED, FRAMES, PIXELS, REFUSED, check_name
from detpipe.datasets.augment.settings import Transform

from ..pixel_oracle import Drawn, check_against_pixels, left, transformed

ARGUMENTS = {  # of those that move more, or need some
    "Affine": {"rotate": [-30, 30], "scale": [0.7, 1.3], "translate_percent": [-0.2, 0.2], "shear": [-10, 10]},
    "CenterCrop": {"height": 50, "width": 40},
    "Crop": {"x_min": 5, "y_min": 7, "x_max": 55, "y_max": 50},
    "CropAndPad": {"px": [-10, 10]},
    "LongestMaxSize": {"max_size": 90},
    "Pad": {"padding": [3, 8]},
    "PadIfNeeded": {"min_height": 150, "min_width": 160},
    "RandomCrop": {"height": 50, "width": 40},
    "RandomResizedCrop": {"size": [70, 90]},
    "RandomScale": {"scale_limit": [-0.4, 0.5]},
    "RandomSizedCrop": {"min_max_height": [30, 55], "size": [70, 90]},
    "Resize": {"height": 77, "width": 133},
    "Rotate": {"limit": [-40, 40]},
    "SafeRotate": {"limit": [-40, 40]},
    "SmallestMaxSize": {"max_size": 90},
}
TURNS = (
    "Affine",
    "Perspective",
    "Rotate",
    "SafeRotate",
)  # boxes around turned boxes: cut off, they reach beyond the pixels


def alone(name: str) -> Augment:
    transform = Transform(name, {**ARGUMENTS.get(name, {}), "p": 1.0})
    return Augment(flip=0, min_visibility=0, transforms=(transform,))


def random_image(random: np.random.Generator) -> Drawn:
    height, width = random.integers(60, 140, 2).tolist()
    boxes = []
    for _ in range(2):
        x, y = int(random.integers(0, width - 12)), int(random.integers(0, height - 12))
        boxes.append((x, y, int(random.integers(x + 12, width + 1)), int(random.integers(y + 12, height + 1))))
    return Drawn(height, width, tuple(boxes), difficult=(False, True))


@pytest.mark.parametrize("name", FRAMES)
def test_boxes_move_as_the_pixels_do(name: str) -> None:
    def tight(seen: list[int], size: tuple[int, int]) -> bool:
        cut = seen[0] == 0 or seen[1] == 0 or seen[2] == size[1] or seen[3] == size[0]
        return name not in TURNS or not cut

    random, augment, compared = np.random.default_rng(0), alone(name), 0
    for seed in range(12):
        compared += check_against_pixels(augment, [random_image(random)], seed, 2.0 if name in TURNS else 1.0, tight)
    assert compared > 9


@pytest.mark.parametrize("name", PIXELS)
def test_colors_change_and_boxes_stay(name: str) -> None:
    image = random_image(np.random.default_rng(1))
    pixels, target = transformed(alone(name), [image], 3, painted=0)
    assert pixels.shape == (3, image.height, image.width)
    assert [boxes[0] for boxes in left(target).values()] == [list(map(float, box)) for box in image.boxes]
    again = transformed(alone(name), [image], 3, painted=0)[0]
    assert (again == pixels).all(), "the seed decides all draws"


def test_the_tables_name_every_transform_of_albumentations() -> None:
    import albumentations

    kinds = (albumentations.BasicTransform, albumentations.BaseCompose)
    bases = {"BasicTransform", "BaseCompose", "DualTransform", "ImageOnlyTransform", "Transform3D"}
    known = {
        name
        for name, kind in vars(albumentations).items()
        if inspect.isclass(kind) and issubclass(kind, kinds) and name not in bases
    }
    assert known == {*ALLOWED, *REFUSED}
    assert not set(ALLOWED) & set(REFUSED)
    assert all(not issubclass(getattr(albumentations, name), albumentations.BaseCompose) for name in ALLOWED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_does_not_keep_boxes_in_step_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^transforms: {name} ") as caught:
        Transform(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Afine", "transforms: 'Afine' is no transform .*; did you mean 'Affine'"),
        ("affine", "did you mean 'Affine'"),
        ("os.system", "transforms: 'os.system' is no transform of albumentations"),
        ("core.utils.format_args", "is no transform of albumentations"),
        ("", "transforms: '' is no transform"),
    ],
)
def test_other_names_are_refused_without_an_import(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_name(name)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Affine", {"rotat": 10}, "transforms: Affine has no argument 'rotat'; did you mean 'rotate'"),
        ("Rotate", {"limit": "far"}, "transforms: Rotate refuses its arguments: "),
        ("Affine", {"p": 7}, "transforms: Affine refuses its arguments: "),
        ("CenterCrop", {}, "transforms: CenterCrop refuses its arguments: "),
        ("Affine", {"border_mode": 2}, "transforms: Affine.border_mode must be 0 .* got 2"),
    ],
)
def test_wrong_arguments_are_one_line(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Augment(transforms=(Transform(name, arguments),)).check()
    assert "\n" not in str(caught.value)


def test_an_image_that_is_no_image_any_more_is_refused() -> None:
    augment = Augment(transforms=(Transform("ToGray", {"num_output_channels": 1, "p": 1.0}),))
    with pytest.raises(ValueError, match=r"transforms: ToGray made an image of uint8 .*; change its arguments"):
        transformed(augment, [Drawn(20, 30, ())], 0)
