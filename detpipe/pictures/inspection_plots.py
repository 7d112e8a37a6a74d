"""Pictures of attention: gates by channel and class, branch weights by scale, maps over an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from detpipe.pictures.figures import image_panels, new_figure, plain_axes, save_figure
from detpipe.pictures.visualize import PALETTE, plot_color


def plot_class_gates(gates: Mapping[str, Tensor], class_names: Sequence[str], counts: Sequence[int], out: Path) -> None:
    """Draw the mean gate of each channel, ``[K, C]`` by module, NaN for classes without objects, as in Hu et al. 2018, figure 5.

    Of more classes than there are colors those with most objects are drawn.
    """
    drawn = sorted(range(len(counts)), key=lambda index: -counts[index])[: len(PALETTE)]
    drawn = sorted(index for index in drawn if counts[index])
    figure = new_figure(8.5, max(1.9 * len(gates) + 0.9, 0.19 * len(drawn) + 0.3), "attention")
    panels = np.atleast_1d(figure.subplots(len(gates), 1))
    for axes, (name, values) in zip(panels, gates.items(), strict=True):
        for index in drawn:
            label = f" {class_names[index]} ({counts[index]})"  # a legend leaves out what begins with an underscore
            axes.plot(values[index].numpy(), color=plot_color(index + 1), linewidth=0.9, label=label)
        axes.set_xlim(0, values.shape[1] - 1)
        seen = values[~values.isnan().any(dim=1)]
        apart = float((seen.amax(0) - seen.amin(0)).max())
        axes.set_title(f"{name}: classes at most {apart:.3f} apart", loc="left", fontsize=9)
        axes.set_ylabel("gate")
        plain_axes(axes)
    panels[-1].set_xlabel("channel")
    some = f"; {len(drawn)} classes with most objects" if len(drawn) < sum(map(bool, counts)) else ""
    figure.suptitle(f"mean gate of each channel by class (objects){some}", x=0.02, ha="left", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    save_figure(figure, out)


def plot_branches(branches: Mapping[str, Tensor], shares: Sequence[float], objects: int, out: Path) -> None:
    """Draw the mean weight of the widest kernel in each module, ``[S, M]``, a line a scale, as in Li et al. 2019, figure 3."""
    figure = new_figure(max(6.0, 0.5 * len(branches) + 3), 4.2, "attention")
    axes = figure.subplots()
    for index, share in enumerate(shares):
        values = [float(weights[index, -1]) for weights in branches.values()]
        axes.plot(values, "o-", color=plot_color(index + 1), markersize=4, label=f"object is {share:.0%} of the side")
    axes.axhline(1 / next(iter(branches.values())).shape[1], color="#888888", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(branches)), list(branches), rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("weight")
    axes.set_title(f"mean weight of the widest kernel, {objects} objects", loc="left", fontsize=11)
    axes.legend(fontsize=8, frameon=False)
    plain_axes(axes)
    save_figure(figure, out)


def plot_maps(image: Tensor, maps: Mapping[str, Tensor], out: Path) -> None:
    """Draw spatial gates ``[H, W]`` over an image ``[3, H, W]`` uint8 RGB, a panel a module, each on its own scale."""
    figure, panels, aspect = image_panels(len(maps) + 1, image.shape[1:], 3.2, 0.4, "attention")
    gray = image.float().mean(0).numpy()
    panels[0].imshow(image.permute(1, 2, 0).numpy(), aspect=aspect)
    panels[0].set_title("image", loc="left", fontsize=9)
    for axes, (name, values) in zip(panels[1:], maps.items(), strict=False):
        axes.imshow(gray, cmap="gray", aspect=aspect)
        drawn = axes.imshow(values.numpy(), cmap="inferno", alpha=0.6, aspect=aspect)
        axes.set_title(f"{name}  {float(values.min()):.2f} to {float(values.max()):.2f}", loc="left", fontsize=8)
        figure.colorbar(drawn, ax=axes, shrink=0.7)
    save_figure(figure, out)
