"""Similarity: are the channels that the trigger moves still computing the same?

Breaking the False Sense of Security in Backdoor Defense through Re-Activation Attack. M. Zhu,
S. Liang, B. Wu. NeurIPS 2024. https://arxiv.org/abs/2405.16134 (backdoor existence coefficient).

Of each convolution of the poisoned model, the tenth of the channels is taken that the trigger moves
most. Their maps of triggered images in the poisoned and in the defended model are compared by
linear CKA (S. Kornblith et al., ICML 2019, https://arxiv.org/abs/1905.00414). Departs: scaled by a
clean model alone (1 is the poisoned model, 0 a clean one), and not by which other defenses stand in
the table.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Split, batches
from ..models import paused
from .view import AttackerView

SHARE = 0.1
"""Share of the channels of each layer that are compared; at least one channel."""
IMAGES, BATCH_SIZE = 500, 100
"""Triggered test images, at most, and how many pass at once."""
SHORTCUTS = ("shortcut", "downsample")
"""Names of the convolutions beside the layers, which are left out."""


def refusal(undefended: nn.Module) -> str | None:
    """Say why the channels cannot be compared; None where they can."""
    return None if _layers(undefended) else "it compares convolutions, and this network has none"


def similarity(view: AttackerView, model: nn.Module, undefended: nn.Module) -> dict[str, Any]:
    """Compare the channels that the trigger moves most in two models.

    Args:
        view: the attacker's side.
        model: the model under test.
        undefended: the poisoned model, of the same architecture.

    Returns:
        `layers`: CKA in [0, 1] of each convolution; `mean`: their mean.
    """
    images, plain = view.triggered.images[:IMAGES], view.untriggered.images[:IMAGES]
    moved = _moved(view, undefended, images, plain)
    was = _whole_maps(view, undefended, images, moved)
    is_now = _whole_maps(view, model, images, moved)
    layers = {name: cka(was[name].flatten(1), is_now[name].flatten(1)) for name in was}
    return {"layers": layers, "mean": math.fsum(layers.values()) / len(layers)}


def existence(found: dict[str, Any], clean: dict[str, Any]) -> float | None:
    """Scale a similarity so that 1 is the poisoned model and 0 a clean one.

    Args:
        found: what `similarity` returns of the model.
        clean: the same of a clean model.
    """
    if clean["mean"] >= 1:
        return None
    return (found["mean"] - clean["mean"]) / (1 - clean["mean"])


def cka(x: Tensor, y: Tensor) -> float:
    """Return the linear CKA of two representations of the same N images.

    Args:
        x: float (N, D).
        y: float (N, E).

    Returns:
        A value in [0, 1]; 0 where one of them is constant.
    """
    # N x N products: D is the larger number where a layer has large maps.
    first, second = (_centred(one.double() @ one.double().T) for one in (x, y))
    norm = (first.norm() * second.norm()).item()
    return (first * second).sum().item() / norm if norm > 0 else 0.0


def _centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions of the layers by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not set(SHORTCUTS) & set(name.split("."))
    }


def _moved(
    view: AttackerView, model: nn.Module, images: Tensor, plain: Tensor
) -> dict[str, Tensor]:
    """Choose the channels of each layer that the trigger moves most.

    Args:
        view: the attacker's side.
        model: the poisoned model.
        images: uint8 (N, C, H, W), with the trigger.
        plain: the same images without it.

    Returns:
        Layer -> positions of its channels, int64 (k,).
    """
    # Sums over batches: the maps of all images together would take gigabytes.
    change: dict[str, Tensor] = {}
    for with_trigger, without in zip(
        _maps(view, model, images, None), _maps(view, model, plain, None), strict=True
    ):
        for name, maps in with_trigger.items():
            moved = (maps - without[name]).abs().sum((0, 2, 3), dtype=torch.float64)
            change[name] = change[name] + moved if name in change else moved

    counts = {name: max(1, round(SHARE * len(sums))) for name, sums in change.items()}
    return {name: sums.topk(counts[name]).indices.sort().values for name, sums in change.items()}


def _whole_maps(
    view: AttackerView, model: nn.Module, images: Tensor, channels: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the chosen channels' maps of all images, float (N, k, H, W), by layer."""
    parts = list(_maps(view, model, images, channels))
    return {name: torch.cat([part[name] for part in parts]) for name in channels}


def _maps(
    view: AttackerView, model: nn.Module, images: Tensor, channels: Mapping[str, Tensor] | None
) -> Iterator[dict[str, Tensor]]:
    """Yield the chosen channels' maps of each convolution, (B, k, H, W) on the CPU, by batch.

    Args:
        view: the attacker's side.
        model: the network.
        images: uint8 (N, C, H, W).
        channels: layer -> channels that are kept; None keeps all.
    """
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            wanted = output if channels is None else output[:, channels[name].to(output.device)]
            # A copy: activations that follow may write over it.
            kept[name] = wanted.detach().clone().cpu()

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in _layers(model).items()]
    split = Split(images, torch.zeros(len(images), dtype=torch.int64))
    try:
        for batch in batches(split, BATCH_SIZE, device=view.device):
            # Not around the loop: two of these generators run in turn.
            with torch.inference_mode(), paused():
                model(batch.images)
            yield dict(kept)
    finally:
        for hook in hooks:
            hook.remove()
