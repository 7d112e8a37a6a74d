"""Inception-v3 with a gate on the output of every Inception block, for images of any size.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015, arXiv 1512.00567, as built by torchvision;
Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv 1709.01507, figure 2: the gates.

Deviations:
1. ``padded`` puts zeros around the maps before each of the seven parts that the paper leaves unpadded, so that levels have
   ceil(H / stride) x ceil(W / stride) cells, as near to where RoI pooling takes them to be as can be
   (:mod:`detpipe.backbones.inception_blocks`).
2. The blocks that halve the map (Mixed_6a, Mixed_7a) have gates as the others have.
3. Convolutions are initialized as those of the residual networks: He et al. 2015, arXiv 1502.01852.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torchvision.models.inception import InceptionAux

from detpipe.attention.choice import by_stage, make_gating
from detpipe.backbones.inception_blocks import (
    STAGES,
    STRIDES,
    WIDTHS,
    best_paddings,
    build_stage,
    offset,
    smallest_side,
    to_own_names,
)
from detpipe.backbones.input_channels import check_channels, set_input_channels
from detpipe.backbones.laterals import Laterals, Width
from detpipe.backbones.pretrained import Pretrained, load_pretrained
from detpipe.backbones.regime import Regime, convert_norm, names_within
from detpipe.backbones.staged import StagedBackbone, choose_levels
from detpipe.stages import initialize
from detpipe.support.numbers import check_whole
from detpipe.types import Features, PixelFormat

Kind = Literal["se", "sse", "scse", "eca", "cbam"]
Choice = Kind | None | dict[str, Kind | None]

GATED_STAGES = ("c3", "c4", "c5")
AUXILIARY_CELLS = 17  # of c4 in a row, at least: pooling leaves five, as many as the auxiliary classifier's kernel has


class SEInceptionV3(StagedBackbone):
    """Inception-v3 with squeeze-and-excitation, or other attention, or none.

    Args:
        attention: what each Inception block has at its output: "se", "sse", "scse" (squeeze-and-excitation of channels, places,
            both), "eca", "cbam", or None; or stage (c3, c4, c5) -> one of them.
        reduction: channels of a block divided by the width of its gate's hidden layer.
        levels: which of c2, c3, c4, c5 to return; stages after the last one are not built.
        out_channels: project every level to this width; None keeps the width, for a single level; "own" lets each level
            keep its own, for an FPN.
        padded: what detection needs; False computes what torchvision does: maps are smaller, and 7.5 to 21.5 pixels off.
        auxiliary_classes: adds torchvision's auxiliary classifier on c4, for this many classes.
        weights: a local file (``.pth``, ``.pt``, ``.safetensors``, or ``.ckpt`` of a run; never downloads): ours or
            torchvision's; or the name of torchvision weights (``DEFAULT``), or ``timm/NAME``, such as
            ``timm/inception_v3.tv_in1k``. Only ours have gates; with others give ``Pretrained(..., new_gates=True)``, and they
            start almost open ("eca": half open).
        regime: normalization, frozen stages (of stem, c2 to c5), checkpointing; no drop path, for want of shortcuts.
        in_channels: C of the images; weights of three channels are spread over others. In a configuration it follows the data.

    Attributes:
        offsets: level -> by how many pixels the middle of cell (i, j) lies right of (j + .5) * stride and below (i + .5) * stride.

    Raises:
        ValueError: an argument outside these choices, or a reduction that is larger than the channels.
        UsageError: an unknown name of weights, or a stage to freeze that is not built.
        CheckpointError: weights that are missing or belong to another network.

    Example:
        >>> import torch
        >>> backbone = SEInceptionV3(levels=["c2", "c3"], out_channels=64)
        >>> {level: list(map_.shape) for level, map_ in backbone(torch.zeros(1, 3, 75, 101)).items()}
        {'c2': [1, 64, 19, 26], 'c3': [1, 64, 10, 13]}
        >>> SEInceptionV3(levels=["c4"]).offsets
        {'c4': 0.5}
    """

    def __init__(
        self,
        attention: Choice = "se",
        reduction: int = 16,
        levels: Sequence[str] = ("c4",),
        out_channels: Width = None,
        padded: bool = True,
        auxiliary_classes: int | None = None,
        weights: str | Pretrained | None = None,
        regime: Regime = Regime(),  # noqa: B008 (frozen)
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        self.levels = choose_levels(levels)
        check_whole(reduction=reduction, auxiliary_classes=auxiliary_classes)
        if auxiliary_classes is not None and not {"c4", "c5"} & set(levels):
            raise ValueError(f"auxiliary_classes needs level c4 or c5, got levels {list(levels)}")
        if regime.drop_path:
            raise ValueError(
                f"regime.drop_path must be 0, for Inception blocks have no shortcuts; got {regime.drop_path}"
            )
        built = tuple(STAGES)[: list(STAGES).index(self.levels[-1]) + 1]
        self.regime, self.frozen, self.padded = regime, names_within(regime.frozen, built), padded
        # -1..1, which torchvision's transform_input makes of its usual format
        self.pixel_format = PixelFormat(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).spread(check_channels(in_channels))
        self.strides = {level: STRIDES[level] for level in self.levels}
        paddings = best_paddings(self.levels) if padded else {}
        self.offsets = {level: offset(level, paddings) for level in self.levels}
        kinds = by_stage(attention, GATED_STAGES)
        stages = {}
        for stage in built:
            kind = kinds.get(stage)
            gate = None if kind is None else partial(make_gating, kind, reduction=reduction)
            stages[stage] = build_stage(stage, paddings, gate)
        self.stem = stages.pop("stem")
        set_input_channels(self.stem, in_channels)
        self.stages = nn.ModuleDict(stages)
        self.auxiliary_classes = auxiliary_classes
        self.auxiliary = None if auxiliary_classes is None else InceptionAux(WIDTHS["c4"], auxiliary_classes)
        self.laterals = Laterals({level: WIDTHS[level] for level in self.levels}, out_channels)
        initialize(self)
        if self.auxiliary is not None:
            nn.init.trunc_normal_(self.auxiliary.fc.weight, std=0.001)  # as torchvision's
            nn.init.zeros_(self.auxiliary.fc.bias)
        convert_norm(self, regime.norm, regime.eps)
        if weights is not None:
            load_pretrained(self, weights, "inception_v3", partial(to_own_names, network=self))
        self.train()  # a new module is in training mode, the batch norm of frozen stages must not be

    def forward(self, images: Tensor) -> Features:
        """Compute the levels.

        Args:
            images: ``[N, C, H, W]`` in -1..1.

        Returns:
            level name -> ``[N, C, ceil(H / stride), ceil(W / stride)]``; fewer cells without ``padded``.

        Raises:
            ValueError: images smaller than the coarsest stride, or without ``padded`` than what leaves a cell.
        """
        return self.laterals(self._maps(images, self.levels))

    def forward_with_auxiliary(self, images: Tensor) -> tuple[Features, Tensor]:
        """Compute the levels and the auxiliary classifier, everything once.

        Args:
            images: ``[N, C, H, W]`` in -1..1, of at least 257 pixels, without ``padded`` 299.

        Returns:
            What :meth:`forward` returns, and logits ``[N, auxiliary_classes]``.

        Raises:
            ValueError: smaller images, or a backbone without ``auxiliary_classes``.
        """
        if self.auxiliary is None:
            raise ValueError(
                "this backbone has no auxiliary classifier: give auxiliary_classes, for example auxiliary_classes=1000"
            )
        side = smallest_side("c4", AUXILIARY_CELLS, self.padded)
        if min(images.shape[-2:]) < side:
            raise ValueError(
                f"the auxiliary classifier needs {AUXILIARY_CELLS} x {AUXILIARY_CELLS} cells of level c4, and so images of at "
                f"least {side} x {side} pixels, got {images.shape[-2]} x {images.shape[-1]}"
            )
        maps = self._maps(images, (*self.levels, "c4"))
        return self.laterals({level: maps[level] for level in self.levels}), self.auxiliary(maps["c4"])

    def _maps(self, images: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of stages, before any projection."""
        self._check_size(images)
        return self._through([("stem", self.stem), *self.stages.items()], images, wanted)

    def _check_size(self, images: Tensor) -> None:
        if self.padded:
            self.check_size(images)
            return
        level = self.levels[-1]
        side = smallest_side(level, 1, padded=False)
        if min(images.shape[-2:]) < side:
            raise ValueError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels are smaller than what level {level} of stride "
                f"{self.strides[level]} needs without padding: expected at least {side} x {side}; enlarge them, or leave level "
                f"{level} out"
            )
