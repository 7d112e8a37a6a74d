"""Which transforms of albumentations a configuration may name: those that move boxes as they move pixels.

The tables cover every transform of albumentations 2.0; a name outside them is not known, and nothing is imported for it.
"""

from __future__ import annotations

from detpipe.support.suggest import did_you_mean

PIXELS = (  # change colors only
    *(
        "AdditiveNoise",
        "AdvancedBlur",
        "AutoContrast",
        "Blur",
        "CLAHE",
        "ChannelDropout",
        "ChannelShuffle",
        "ColorJitter",
    ),
    *("Defocus", "Downscale", "Emboss", "Equalize", "FancyPCA", "GaussNoise", "GaussianBlur", "HEStain"),
    *("HueSaturationValue", "ISONoise", "Illumination", "ImageCompression", "InvertImg", "MedianBlur", "MotionBlur"),
    *("MultiplicativeNoise", "NoOp", "PixelDropout", "PlanckianJitter", "PlasmaBrightnessContrast", "PlasmaShadow"),
    *("Posterize", "RGBShift", "RandomBrightnessContrast", "RandomFog", "RandomGamma", "RandomGravel", "RandomRain"),
    *(
        "RandomShadow",
        "RandomSnow",
        "RandomSunFlare",
        "RandomToneCurve",
        "RingingOvershoot",
        "SaltAndPepper",
        "Sharpen",
    ),
    *("ShotNoise", "Solarize", "Spatter", "Superpixels", "ToGray", "ToSepia", "UnsharpMask", "ZoomBlur"),
)
FRAMES = (  # map the image by flips, shifts, scales, rotations or a perspective, and the boxes with it
    *("Affine", "CenterCrop", "Crop", "CropAndPad", "D4", "HorizontalFlip", "LongestMaxSize", "Pad", "PadIfNeeded"),
    *("Perspective", "RandomCrop", "RandomCropFromBorders", "RandomResizedCrop", "RandomRotate90", "RandomScale"),
    *(
        "RandomSizedCrop",
        "Resize",
        "Rotate",
        "SafeRotate",
        "SmallestMaxSize",
        "SquareSymmetry",
        "Transpose",
        "VerticalFlip",
    ),
)
ALLOWED = tuple(sorted(PIXELS + FRAMES))

_WARPS = "bends the image, and boxes follow only roughly"
_HIDES = "hides parts of objects, and boxes do not tell"
_OTHERS = "needs other images or data than the image"
_COMPOSES = "holds other transforms; list them themselves, each with its p"
_VOLUMES = "is for volumes"
_TYPES = "changes the type of the image, which stays uint8 until the network"
_SPECTRA = "is for spectrograms"
REFUSED = {
    **dict.fromkeys(("ElasticTransform", "GridDistortion", "GridElasticDeform", "OpticalDistortion"), _WARPS),
    **dict.fromkeys(
        ("PiecewiseAffine", "ThinPlateSpline", "ChromaticAberration", "GlassBlur", "Morphological"), _WARPS
    ),
    **dict.fromkeys(("CoarseDropout", "ConstrainedCoarseDropout", "Erasing", "GridDropout", "MaskDropout"), _HIDES),
    **dict.fromkeys(("CropNonEmptyMaskIfExists", "RandomCropNearBBox"), _OTHERS),
    "XYMasking": _HIDES,
    **dict.fromkeys(
        ("FDA", "HistogramMatching", "PixelDistributionAdaptation", "OverlayElements", "TextImage"), _OTHERS
    ),
    **dict.fromkeys(("CenterCrop3D", "CoarseDropout3D", "CubicSymmetry", "Pad3D", "PadIfNeeded3D"), _VOLUMES),
    **dict.fromkeys(("RandomCrop3D", "ToTensor3D"), _VOLUMES),
    **dict.fromkeys(("FromFloat", "Normalize", "ToFloat", "ToTensorV2", "ToRGB"), _TYPES),
    **dict.fromkeys(("FrequencyMasking", "TimeMasking", "TimeReverse"), _SPECTRA),
    **dict.fromkeys(
        ("Compose", "OneOf", "OneOrOther", "RandomOrder", "ReplayCompose", "SelectiveChannelTransform"), _COMPOSES
    ),
    **dict.fromkeys(("Sequential", "SomeOf"), _COMPOSES),
    **dict.fromkeys(
        ("AtLeastOneBBoxRandomCrop", "BBoxSafeRandomCrop", "RandomSizedBBoxSafeCrop"),
        "reads boxes by rules of its own; set safe_crop instead",
    ),
    "Lambda": "runs code of the configuration",
    "Mosaic": "needs other images; set combine.mosaic instead",
    "RandomGridShuffle": "moves pieces of objects, and boxes do not follow",
    "ShiftScaleRotate": "is an old name; use Affine instead",
}


def check_name(name: str) -> None:
    """Refuse a transform that a configuration may not use; nothing is imported.

    Args:
        name: as in the configuration.

    Raises:
        ValueError: it does not keep boxes in step, and the message says why, or it is no transform; near names are listed.
    """
    if name in ALLOWED:
        return
    if name in REFUSED:
        raise ValueError(f"transforms: {name} {REFUSED[name]}")
    near = did_you_mean(name, ALLOWED)
    raise ValueError(f"transforms: {name!r} is no transform of albumentations that moves boxes with the pixels{near}")
