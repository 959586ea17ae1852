"""Pair convolutions with the batch normalisations that follow them, by what enters each of them.

The order in which modules are listed does not say it: in pre-activation networks it joins some that
have nothing to do with each other.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .pruning import batch_norms


@torch.no_grad()
def paired(model: nn.Module, image: Tensor) -> dict[str, nn.Conv2d]:
    """Find the convolution whose output enters each batch normalisation unchanged.

    Args:
        model: a network.
        image: any, (1, C, H, W).

    Returns:
        name of a batch normalisation -> convolution. Those that get something else are left out.
    """
    # Outputs are kept, so that no later tensor gets the identity of one.
    seen: dict[int, tuple[Tensor, int, str]] = {}
    found: dict[str, str] = {}
    reader = copy.deepcopy(model).eval()

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            seen[id(output)] = (output, output._version, name)

        return hook

    def find(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # An addition in place leaves the tensor the same, and counts its version up.
            _, version, convolution = seen.get(id(inputs[0]), (None, -1, ""))
            if version == inputs[0]._version:
                found[name] = convolution

        return hook

    for name, module in reader.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(keep(name))
    for name, module in batch_norms(reader).items():
        module.register_forward_pre_hook(find(name))
    reader(image)
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {name: convolutions[before] for name, before in found.items()}
