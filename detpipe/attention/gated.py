"""What carries attention inside somebody else's network: a gated module, and torchvision's residual blocks with a gate.

N images, C channels, H x W cells.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck


class AttentiveBasicBlock(BasicBlock):
    """torchvision's block of two convolutions, with its child ``attention`` before the residual sum."""

    attention: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, C', H', W']``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.attention(self.bn2(self.conv2(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class AttentiveBottleneck(Bottleneck):
    """torchvision's block of three convolutions, with its child ``attention`` before the residual sum."""

    attention: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, C', H', W']``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.attention(self.bn3(self.conv3(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Gated(nn.Module):
    """A module whose output goes through attention, under the module's own names in a state dict.

    A state dict holds the entries of the module as if it stood there alone, and those of the attention after them, under
    ``attention.``. So weights saved before the attention came still load, and what does not load is named as it was.

    Args:
        module: returns ``[N, C, H, W]``; the forward hooks registered on it come to see the gated output.
        attention: ``[N, C, H, W]`` -> ``[N, C, H, W]``.
        channels_last: the module returns ``[N, H, W, C]`` instead.

    Raises:
        ValueError: the module has a child of the name ``attention``.
    """

    def __init__(self, module: nn.Module, attention: nn.Module, channels_last: bool = False) -> None:
        super().__init__()
        if "attention" in module._modules:
            raise ValueError(f"{type(module).__name__} has a child called attention already; gate another module")
        self.module, self.attention, self.channels_last = module, attention, channels_last
        self.training = module.training
        for hooks in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
            taken = getattr(module, hooks)
            setattr(module, hooks, getattr(self, hooks))
            setattr(self, hooks, taken)  # the same dictionary, so that its handles can still remove the hooks
        self.register_load_state_dict_pre_hook(_add_level)
        self.register_load_state_dict_post_hook(_drop_level)

    def __getattr__(self, name: str) -> Any:
        """Give what the network around reads of the module, such as its ``weight``."""
        own = name in self.__dict__.get("_modules", ())
        return super().__getattr__(name) if own or name == "module" else getattr(self.module, name)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Run the module and gate what it returns, in the module's own layout."""
        features = self.module(*inputs, **named)
        if self.channels_last:
            return self.attention(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.attention(features)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Collect the state, the module's under its own names."""
        destination = self.module.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.attention.state_dict(destination=destination, prefix=f"{prefix}attention.", keep_vars=keep_vars)


def _add_level(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *faults: list[str]
) -> None:
    """Rename the entries of a state dict to where the gated module keeps them."""
    module.__dict__["_loading"] = prefix, faults[-1]  # what is named wrongly until the end: missing keys and messages
    for key in [key for key in state_dict if key.startswith(prefix)]:
        if not key.startswith(f"{prefix}attention."):
            state_dict[f"{prefix}module.{key.removeprefix(prefix)}"] = state_dict.pop(key)


def _drop_level(module: nn.Module, incompatible: Any) -> None:
    """Name what does not load as it is named in the state dict."""
    prefix, messages = module.__dict__.pop("_loading")
    for lines in (*incompatible, messages):
        lines[:] = [line.replace(f"{prefix}module.", prefix, 1) for line in lines]
