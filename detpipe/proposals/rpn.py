"""The region proposal network: a small network on the features says where objects are and refines anchors to proposals.

Ren et al., "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", 2015, arXiv 1506.01497; on the
levels of a pyramid: Lin et al., "Feature Pyramid Networks for Object Detection", 2017, arXiv 1612.03144, section 4.1.

Deviations:
1. One logit an anchor and binary cross-entropy instead of a softmax over two, as in torchvision and Detectron2.
2. Both losses are divided by the number of sampled anchors of the batch; box deltas are compared by smooth L1 with beta 1/9.
3. Proposals carry no gradient into the boxes (approximate joint training, section 3.2 of the paper).
4. In training, the outputs that the loss needs are computed again from the cells around the sampled anchors alone, see
   :mod:`detpipe.proposals.rpn_head`: equal losses and gradients, without a dense backward pass.

Which anchors there are, which are trained on and which become proposals: :mod:`~detpipe.proposals.anchors`,
:mod:`~detpipe.proposals.rpn_objective`, :mod:`~detpipe.proposals.rpn_selection`, with their own deviations.

N images, C channels, P anchors of an image, S of them sampled for the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from detpipe import boxes as box_ops
from detpipe.proposals.anchors import AnchorGrid, Anchors
from detpipe.proposals.rpn_head import RPNHead
from detpipe.proposals.rpn_objective import AnchorTargets, RPNObjective
from detpipe.proposals.rpn_selection import NotFiniteError, ProposalSelection
from detpipe.stages import ImageList, Losses, ProposalSource
from detpipe.support.errors import DataError, NonFiniteStepError, TrainingError
from detpipe.support.numbers import check_whole
from detpipe.support.processes import any_sharing_rank, count_per_rank
from detpipe.types import Features, Target

CACHED_GRIDS = 32  # shapes of batches whose anchors are kept


class RPN(ProposalSource):
    """Propose boxes from features; learns with the detector, or is frozen.

    A frozen network returns no losses and takes part in no gradient, whether or not the rest trains.

    Args:
        in_channels: C of the features, the same at every level.
        strides: image pixels a cell of each level to look at, finest first.
        anchors: the reference boxes.
        objective: which anchors are trained on, and the loss.
        selection: what becomes a proposal.
        conv_dims: widths of the 3 x 3 convolutions; None is one that keeps C.
        extra_levels: coarser levels to look at too, each every second cell of the one before (P6 of Lin et al.).
        frozen: do not learn.

    Raises:
        ValueError: no level in ``strides``, one that is not positive, or fewer than 0 extra levels.

    Example:
        >>> rpn = RPN(8, {"c4": 16}, anchors=Anchors(sizes=[[32]])).eval()
        >>> images = ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)])
        >>> boxes, losses = rpn(images, {"c4": torch.rand(1, 8, 4, 6)})
        >>> boxes[0].shape[1], losses
        (4, {})
    """

    def __init__(
        self,
        in_channels: int,
        strides: dict[str, int],
        anchors: Anchors = Anchors(),  # noqa: B008 (frozen)
        objective: RPNObjective = RPNObjective(),  # noqa: B008 (frozen)
        selection: ProposalSelection = ProposalSelection(),  # noqa: B008 (frozen)
        conv_dims: Sequence[int] | None = None,
        extra_levels: int = 0,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if not strides:
            raise ValueError(f"strides need at least one level, got {strides}")
        check_whole(strides=list(strides.values()))
        check_whole(0, extra_levels=extra_levels)
        self.strides, self.extra_levels, self.frozen = dict(strides), extra_levels, frozen
        self.anchors, self.objective, self.selection = anchors, objective, selection
        *_, last = strides.values()
        self._strides = [*strides.values(), *(last * 2**step for step in range(1, extra_levels + 1))]
        self.head = RPNHead(in_channels, anchors.per_cell(self._strides), conv_dims or [in_channels])
        self.head.requires_grad_(not frozen)
        self._grids: dict[tuple[object, ...], tuple[list[AnchorGrid], Tensor]] = {}

    def forward(
        self, images: ImageList, features: Features, targets: list[Target] | None = None
    ) -> tuple[list[Tensor], Losses]:
        """Propose boxes, and in training compute the losses.

        Args:
            images: the padded batch and the height and width of each image in it; boxes are clipped to their own image.
            features: level name -> ``[N, C, H_l, W_l]``.
            targets: N targets with ``boxes`` and ``labels``; needed in training, unless frozen.

        Returns:
            N boxes tensors ``[P_i, 4]`` xyxy in pixels of the batch, best first, without gradient; in training
            ``loss_objectness`` and ``loss_rpn_box_reg``, else no losses. Where the head leaves boxes without area out
            (``fills_up``), training on a GPU gives as many boxes for each image, and the host does not wait for it; what is not
            finite then makes the losses NaN.

        Raises:
            ValueError: training without targets, a level that is missing or does not have its stride.
            NonFiniteStepError: in training, a score or box is NaN or infinite; the image is named.
            DataError: the same at inference.
        """
        if not self.training or self.frozen:
            return self.propose(images, features)[0], {}
        if targets is None:
            raise ValueError("the RPN is in training mode and needs targets; call eval() to propose, or freeze it")
        maps = self._maps(images, features)
        grids, anchors = self._anchors(images, maps)
        sampled = self.objective(grids, anchors, targets)
        sparse = self.head.computes_less_at(maps, sampled.index.shape[1])
        with torch.no_grad() if sparse else nullcontext():
            logits, deltas = (output.float() for output in self.head(maps))
        fill_up = self.fills_up and not logits.is_cpu
        nothing = 0 * (logits.detach().sum() + deltas.detach().sum()) if fill_up else 0  # NaN if any is not finite
        boxes, _ = self._select(logits, deltas, grids, anchors, images, targets, fill_up)
        if sparse:
            logits, deltas = (output.float() for output in self.head.at(maps, sampled.index))
        else:
            logits = logits.gather(1, sampled.index)
            deltas = box_ops.take(deltas, sampled.index)
        return boxes, {name: loss + nothing for name, loss in self._losses(logits, deltas, sampled).items()}

    @torch.no_grad()
    def propose(self, images: ImageList, features: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Propose boxes with their scores, in training mode too.

        Args:
            images: the padded batch.
            features: level name -> ``[N, C, H_l, W_l]``.

        Returns:
            N boxes tensors ``[P_i, 4]`` xyxy in pixels of the batch, best first, and N scores ``[P_i]`` in 0..1.

        Raises:
            ValueError: a level is missing or does not have its stride.
            DataError: a score or box is NaN or infinite; the image is named.
        """
        maps = self._maps(images, features)
        grids, anchors = self._anchors(images, maps)
        logits, deltas = (output.float() for output in self.head(maps))
        boxes, logits = self._select(logits, deltas, grids, anchors, images, None)
        return boxes, [row.sigmoid() for row in logits]

    @torch.no_grad()
    def propose_padded(self, images: ImageList, features: Features) -> tuple[Tensor, Tensor]:
        """Propose boxes as tensors of fixed size, without a look at any value: what :meth:`propose` does, for exported graphs.

        Args:
            images: the padded batch; one size may stand for all images.
            features: level name -> ``[N, C, H_l, W_l]``.

        Returns:
            ``[N, P, 4]`` xyxy in pixels of the batch, best first, and ``[N, P]`` bool, False where an image has fewer than P.
        """
        maps = self._maps(images, features)
        grids, anchors = self._anchors(images, maps)
        logits, deltas = (output.float() for output in self.head(maps))
        sizes = [grid.count for grid in grids]
        boxes, _, present = self.selection.padded(logits, deltas, anchors, sizes, images.image_sizes, training=False)
        return boxes, present

    def _maps(self, images: ImageList, features: Features) -> list[Tensor]:
        """Pick the levels, channels last, and check that they have the strides that anchors rely on."""
        missing = [name for name in self.strides if name not in features]
        if missing:
            raise ValueError(f"the RPN looks at level {missing[0]!r}, but the features have {sorted(features)}")
        maps = [features[name] for name in self.strides]
        for _ in range(self.extra_levels):
            maps.append(maps[-1][:, :, ::2, ::2])
        if torch.compiler.is_compiling():  # sizes may be symbols, and a batch that runs has been checked before
            return maps
        for (name, stride), level in zip(self.strides.items(), maps, strict=False):
            for side, cells in zip(images.tensors.shape[-2:], level.shape[-2:], strict=True):
                if abs(cells - side / stride) >= 2:
                    raise ValueError(
                        f"level {name!r}: stride {stride} is declared, but a batch of {list(images.tensors.shape[-2:])} "
                        f"pixels has {list(level.shape[-2:])} cells; declare the strides of the backbone"
                    )
        return [level.contiguous(memory_format=torch.channels_last) for level in maps]

    def _anchors(self, images: ImageList, maps: Sequence[Tensor]) -> tuple[list[AnchorGrid], Tensor]:
        """Lay the anchors, or take them from an earlier call: each level's, and all of them ``[P, 4]``."""
        cells = tuple((level.shape[2], level.shape[3]) for level in maps)
        batch = (images.tensors.shape[-2], images.tensors.shape[-1]) if self.anchors.measured else None
        if torch.compiler.is_compiling():
            grids = self.anchors.grids(cells, self._strides, maps[0].device, batch)
            return grids, torch.cat([grid.boxes() for grid in grids])
        key = (cells, batch, maps[0].device)
        found = self._grids.get(key)
        if found is None:
            if len(self._grids) >= CACHED_GRIDS:
                self._grids.clear()  # in one step, whatever other threads do
            grids = self.anchors.grids(cells, self._strides, maps[0].device, batch)
            found = self._grids[key] = grids, torch.cat([grid.boxes() for grid in grids])
        return found

    def _select(
        self,
        logits: Tensor,
        deltas: Tensor,
        grids: Sequence[AnchorGrid],
        anchors: Tensor,
        images: ImageList,
        targets: Sequence[Target] | None,
        fill_up: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        training = self.training and (not self.frozen or self.selection.frozen_as == "training")
        sizes = [grid.count for grid in grids]
        candidates = (logits.detach(), deltas.detach(), anchors, sizes, images.image_sizes, training)
        if fill_up:
            return self.selection(*candidates, fill_up)
        found, failed = None, None
        try:
            found = self.selection(*candidates)
        except NotFiniteError as error:
            target = Target() if targets is None else targets[error.image]
            name = target.get("file_name", target.get("image_id", f"{error.image} of the batch"))
            what = f"proposals of the RPN: image {name}: a {error.what} is {error.value}"
            message = f"{what}; expected finite numbers. Check the image, "
            if targets is None:
                raise DataError(f"{message}and the weights for NaN") from error
            failed = NonFiniteStepError(f"{message}or lower optimizer.lr or set trainer.gradient_clip_val", what)
        stop = targets is not None and any_sharing_rank(failed is not None, anchors.device)
        if stop or found is None:  # the other processes would wait for the losses of this one
            raise failed or TrainingError("stopped, since proposals of the RPN are not finite in another process")
        return found

    def _losses(self, logits: Tensor, deltas: Tensor, sampled: AnchorTargets) -> Losses:
        """Compare ``[N, S]`` logits and ``[N, S, 4]`` deltas with what they should be."""
        count = count_per_rank(sampled.valid.sum())
        entropy = F.binary_cross_entropy_with_logits(logits, sampled.positive.to(logits), reduction="none")
        distance = F.smooth_l1_loss(deltas, sampled.deltas, reduction="none", beta=self.objective.beta)
        return {
            "loss_objectness": (entropy * sampled.valid).sum() / count,
            "loss_rpn_box_reg": (distance * sampled.positive[..., None]).sum() / count,
        }
