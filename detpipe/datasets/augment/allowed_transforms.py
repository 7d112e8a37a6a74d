"""Which transforms of albumentations a configuration may name: those that move boxes as they move pixels.

The tables cover every transform of albumentations 2.0; a name outside them is not known, and nothing is imported for it.
"""

from __future__ import annotations

from detpipe.support.suggest import did_you_mean

_PIXELS = (  # change colors only
    "AdditiveNoise AdvancedBlur AutoContrast Blur CLAHE ChannelDropout ChannelShuffle ColorJitter Defocus Downscale "
    "Emboss Equalize FancyPCA GaussNoise GaussianBlur HEStain HueSaturationValue ISONoise Illumination "
    "ImageCompression InvertImg MedianBlur MotionBlur MultiplicativeNoise NoOp PixelDropout PlanckianJitter "
    "PlasmaBrightnessContrast PlasmaShadow Posterize RGBShift RandomBrightnessContrast RandomFog RandomGamma "
    "RandomGravel RandomRain RandomShadow RandomSnow RandomSunFlare RandomToneCurve RingingOvershoot SaltAndPepper "
    "Sharpen ShotNoise Solarize Spatter Superpixels ToGray ToSepia UnsharpMask ZoomBlur"
)
_FRAMES = (  # map the image by flips, shifts, scales, rotations or a perspective, and the boxes with it
    "Affine CenterCrop Crop CropAndPad D4 HorizontalFlip LongestMaxSize Pad PadIfNeeded Perspective RandomCrop "
    "RandomCropFromBorders RandomResizedCrop RandomRotate90 RandomScale RandomSizedCrop Resize Rotate SafeRotate "
    "SmallestMaxSize SquareSymmetry Transpose VerticalFlip"
)
PIXELS, FRAMES = tuple(_PIXELS.split()), tuple(_FRAMES.split())
ALLOWED = tuple(sorted(PIXELS + FRAMES))

_REFUSED = {
    "bends the image, and boxes follow only roughly": (
        "ElasticTransform GridDistortion GridElasticDeform OpticalDistortion PiecewiseAffine ThinPlateSpline "
        "ChromaticAberration GlassBlur Morphological"
    ),
    "hides parts of objects, and boxes do not tell": (
        "CoarseDropout ConstrainedCoarseDropout Erasing GridDropout MaskDropout XYMasking"
    ),
    "needs other images or data than the image": (
        "CropNonEmptyMaskIfExists RandomCropNearBBox FDA HistogramMatching PixelDistributionAdaptation OverlayElements "
        "TextImage"
    ),
    "is for volumes": "CenterCrop3D CoarseDropout3D CubicSymmetry Pad3D PadIfNeeded3D RandomCrop3D ToTensor3D",
    "changes the type of the image, which stays uint8 until the network": (
        "FromFloat Normalize ToFloat ToTensorV2 ToRGB"
    ),
    "is for spectrograms": "FrequencyMasking TimeMasking TimeReverse",
    "holds other transforms; list them themselves, each with its p": (
        "Compose OneOf OneOrOther RandomOrder ReplayCompose SelectiveChannelTransform Sequential SomeOf"
    ),
    "reads boxes by rules of its own; set safe_crop instead": (
        "AtLeastOneBBoxRandomCrop BBoxSafeRandomCrop RandomSizedBBoxSafeCrop"
    ),
    "runs code of the configuration": "Lambda",
    "needs other images; set combine.mosaic instead": "Mosaic",
    "moves pieces of objects, and boxes do not follow": "RandomGridShuffle",
    "is an old name; use Affine instead": "ShiftScaleRotate",
}
REFUSED = {name: why for why, names in _REFUSED.items() for name in names.split()}


def check_name(name: str) -> None:
    """Refuse by a ValueError, which says why, a transform that a configuration may not use; nothing is imported."""
    if name in ALLOWED:
        return
    if name in REFUSED:
        raise ValueError(f"transforms: {name} {REFUSED[name]}")
    near = did_you_mean(name, ALLOWED)
    raise ValueError(f"transforms: {name!r} is no transform of albumentations that moves boxes with the pixels{near}")
