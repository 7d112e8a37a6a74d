"""A task that a proposal alone cannot solve: what tells the class lies beside the box, and the box says on which side.

Each object is a box of 6 x 6 cells whose four channels say "right", "below", "left" or "above". One box width away on each
side lies a cue of 4 x 4 cells, positive or negative at random; the class is the sign of the cue on the side that the box
names. A head that sees the box alone is right half of the time. Glimpses may move but hardly zoom.

    python benchmarks/glimpse_toy.py [--seeds 5] [--steps 400]

Prints accuracy on fresh objects, time of training, and the spread of the gradient that reaches the policy, as Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from detpipe import (
    AttentionalHead,
    FastRCNNHead,
    GlimpseSequence,
    GlimpseSettings,
    Pathwise,
    Reinforce,
    RoIAlign,
    RoISampler,
)
from detpipe.detector import total_loss
from detpipe.heads.base import ProposalHead
from detpipe.types import Features, Target

STRIDE, MAP, BOX, CHANNELS = 8, 24, 6, 8
OBJECTS = 1  # an image: cues of neighbors would lie on one another
STRIDES = {"c3": STRIDE}
SEQUENCE = {"max_shift": 1.5, "max_log_scale": 0.2}


def batch(images: int, generator: torch.Generator) -> tuple[Features, list[Tensor], list[Target]]:
    """Draw feature maps with one object each, whose box is the only proposal."""
    maps = 0.1 * torch.randn(images, CHANNELS, MAP, MAP, generator=generator)
    boxes, targets = [], []
    low, high = BOX + 2, MAP - 2 * BOX - 2
    for image in maps:
        x, y = (int(torch.randint(low, high + 1, (1,), generator=generator)) for _ in range(2))
        side = int(torch.randint(0, 4, (1,), generator=generator))
        signs = torch.randint(0, 2, (4,), generator=generator) * 2.0 - 1
        image[side, y : y + BOX, x : x + BOX] += 1
        for k, (dx, dy) in enumerate(((1, 0), (0, 1), (-1, 0), (0, -1))):
            cx, cy = x + BOX // 2 + dx * BOX, y + BOX // 2 + dy * BOX
            image[4, cy - 2 : cy + 2, cx - 2 : cx + 2] += 2 * signs[k]
        box = torch.tensor([[x, y, x + BOX, y + BOX]]).float() * STRIDE
        boxes.append(box)
        targets.append(Target(boxes=box, labels=torch.tensor([1 if signs[side] > 0 else 2])))
    return {"c3": maps}, boxes, targets


def make(arm: str) -> FastRCNNHead | AttentionalHead:
    """Build one of the contestants."""
    common = {"pooler": RoIAlign(5, sampling_ratio=2), "fc": [64, 64], "sampler": RoISampler(1, 1.0)}
    if arm.startswith("T=1"):
        return FastRCNNHead(CHANNELS, 2, STRIDES, **common)
    if arm.startswith("STN"):
        return FastRCNNHead(
            CHANNELS,
            2,
            STRIDES,
            **common,
            glimpse=GlimpseSettings("affine" if "affine" in arm else "attention", max_shift=3.0),
        )
    estimator = Pathwise(0.5) if "pathwise" in arm else Reinforce(sigma=0.3)
    return AttentionalHead(CHANNELS, 2, STRIDES, **common, glimpses=GlimpseSequence(2, **SEQUENCE), estimator=estimator)


def accuracy(head: FastRCNNHead | AttentionalHead, generator: torch.Generator) -> float:
    """Classify fresh objects, by the proposal and the means of the policy."""
    features, boxes, targets = batch(512, generator)
    head.eval()
    with torch.no_grad():
        logits, _ = head.predict(features, torch.stack(boxes))
    head.train()
    labels = torch.cat([target.get("labels", torch.empty(0)) for target in targets])
    return (logits[:, 0, 1:].argmax(-1) + 1 == labels).float().mean().item()


def gradient_spread(head: ProposalHead, generator: torch.Generator, draws: int = 32) -> float:
    """Variance, over draws of the noise on one batch, of the gradient to the policy's weights, over its squared mean."""
    if not isinstance(head, AttentionalHead):
        return float("nan")
    features, boxes, targets = batch(64, generator)
    parameter = head.policy.weight
    rows = []
    for _ in range(draws):
        _, losses = head(features, boxes, [(MAP * STRIDE,) * 2] * 64, targets)
        [gradient] = torch.autograd.grad(total_loss(losses), parameter)
        rows.append(gradient.flatten())
    stacked = torch.stack(rows)
    return (stacked.var(0).sum() / stacked.mean(0).square().sum()).item()


def train(arm: str, seed: int, steps: int) -> tuple[float, float, float]:
    """Train one contestant: accuracy, seconds a thousand steps, spread of the gradient after a tenth of the steps."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    head = make(arm).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    seconds, spread = 0.0, float("nan")
    for step in range(steps):
        features, boxes, targets = batch(64, generator)
        start = time.perf_counter()
        _, losses = head(features, boxes, [(MAP * STRIDE,) * 2] * 64, targets)
        optimizer.zero_grad()
        total_loss(losses).backward()
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - start
        if step == steps // 10:
            spread = gradient_spread(head, generator)
    return accuracy(head, generator), 1000 * seconds / steps, spread


ARMS = ("T=1", "T=2 reinforce", "T=2 pathwise", "STN attention", "STN affine")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    options = parser.parse_args()
    print("| head | accuracy by seed | ms a step | gradient variance / squared mean |\n| --- | --- | --- | --- |")
    for arm in options.arms:
        rows = [train(arm, seed, options.steps) for seed in range(options.seeds)]
        found = " ".join(f"{row[0]:.3f}" for row in rows)
        cost, spread = (statistics.median(row[column] for row in rows) for column in (1, 2))
        print(f"| {arm} | {found} | {cost:.1f} | {spread:.1f} |", flush=True)


if __name__ == "__main__":
    main()
