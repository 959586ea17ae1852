"""Batch statistics: does the backdoor come back when they are estimated anew?

Batch normalisation keeps a mean and a variance of each channel beside its weights. A repair that
trains on few images, or prunes, can leave the weights of the backdoor in place and only shift the
channels that carry it. No weight is trained here, and neither a label nor a poisoned image is
needed: some clean images pass once, as AdaBN does (Li et al., 2016,
https://arxiv.org/abs/1603.04779) where data come from another camera.
"""

import copy
from typing import Any

import torch
from torch import nn

from ..data import Split, in_order
from ..models import paused
from .retune import MEASURED
from .view import AttackerView

DRAWS = 3
"""How often images are drawn."""
IMAGES = 250
"""Clean training images in a draw."""


def refusal(model: nn.Module) -> str | None:
    """Say why there are no statistics; None where there are."""
    return None if _normalisations(model) else "this network has no batch normalisation"


def batch_statistics(view: AttackerView, model: nn.Module) -> dict[str, Any]:
    """Measure a model whose batch statistics are those of clean training images.

    Args:
        view: the attacker's side.
        model: the model under test, which stays as it is.

    Returns:
        `asr` and `clean_accuracy`, in [0, 1], of each draw.
    """
    other = copy.deepcopy(model)
    asr, accuracy = [], []
    for draw in range(DRAWS):
        clean = view.draw_clean(IMAGES, view.generator(f"statistics {draw}"))
        estimate(other, clean, view.device)
        asr.append(view.asr(other, MEASURED))
        accuracy.append(view.clean_accuracy(other, MEASURED))
    return {"asr": asr, "clean_accuracy": accuracy}


def estimate(model: nn.Module, clean: Split, device: torch.device) -> None:
    """Set the running statistics of batch normalisation to those of the images.

    Args:
        model: where there is no batch normalisation, it stays as it is.
        clean: the images.
        device: where the model is.
    """
    model.eval()
    normalisations = _normalisations(model)
    # Without a momentum, the running statistics are the mean over all batches.
    before = [module.momentum for module in normalisations]
    for module in normalisations:
        module.reset_running_stats()
        module.momentum = None
        module.train()
    if normalisations:
        with torch.inference_mode(), paused():
            for batch in in_order(clean, device):
                model(batch.images)
    for module, momentum in zip(normalisations, before, strict=True):
        module.momentum = momentum
    model.eval()


def _normalisations(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [
        module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
