"""Prune channels of batch normalisation: which there are, masks that are learnt, how far to go.

A channel is pruned by a scale of 0, so that it is the same number everywhere. Defenses that prune
differ in what they rank channels by. Where to stop is decided on trusted images.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ..data import Split, in_order
from ..errors import UserError
from ..features import predictions
from ..run import Run


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """Return the batch normalisations with scales and running statistics, by name; UserError if
    there is none."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.affine and module.track_running_stats
    }
    if not found:
        network = type(getattr(model, "network", model)).__name__
        raise UserError(
            "this defense needs a network with batch normalisation, and this one"
            f" ({network}) has none: choose another defense, such as ft"
        )
    return found


@torch.no_grad()
def watch_inputs(
    model: nn.Module,
    split: Split,
    run: Run,
    see: Callable[[str, Tensor], None],
    *,
    exact: bool = False,
) -> None:
    """Show what enters each batch normalisation, in evaluation mode, so that no statistics move.

    Args:
        model: the network.
        split: images that pass it, in order.
        run: the context of the defense.
        see: is called with a name and (B, C, ...), batch by batch.
        exact: float32 whatever the precision of the run.
    """

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: see(name, inputs[0])

    hooks = [
        norm.register_forward_pre_hook(watch(name)) for name, norm in batch_norms(model).items()
    ]
    model.eval()
    for batch in in_order(split, run.device):
        with contextlib.nullcontext() if exact else run.autocast():
            model(batch.images)
    for hook in hooks:
        hook.remove()


class Masks(nn.Module):
    """A factor for the scale of each channel of a network's batch normalisations, 1 at first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norms = list(batch_norms(model))
        """Names of the batch normalisations, in the order of `factors`."""
        # Created anew with requires_grad: scales of a network may be fixed (fastnet's are).
        self.factors = nn.ParameterList(
            nn.Parameter(torch.ones_like(norm.weight)) for norm in batch_norms(model).values()
        )

    @torch.no_grad()
    def clip(self) -> None:
        """Bring all factors back to [0, 1]."""
        for factor in self.factors:
            factor.clamp_(0, 1)

    def up_to(self, threshold: float) -> dict[str, Tensor]:
        """Mark channels whose factor is at most `threshold`: name of the norm -> bool (C,)."""
        pairs = zip(self.norms, self.factors, strict=True)
        return {name: factor.detach() <= threshold for name, factor in pairs}


def masked(
    model: nn.Module,
    masks: Masks,
    images: Tensor,
    scale_noise: Sequence[Tensor] | None = None,
    bias_noise: Sequence[Tensor] | None = None,
) -> Tensor:
    """Classify images with scales gamma (m + n) and biases beta (1 + n_b).

    The model's weights stay as they are and get no gradient. In training mode its running
    statistics move.

    Args:
        model: the network.
        masks: m.
        images: (B, C, H, W) in [0, 1].
        scale_noise: n, one tensor (C,) for each batch normalisation; None is 0.
        bias_noise: n_b, likewise.

    Returns:
        logits (B, K).
    """
    norms, weights = batch_norms(model), {}
    for i, name in enumerate(masks.norms):
        factor = masks.factors[i] if scale_noise is None else masks.factors[i] + scale_noise[i]
        weights[f"{name}.weight"] = norms[name].weight.detach() * factor
        if bias_noise is not None:
            weights[f"{name}.bias"] = norms[name].bias.detach() * (1 + bias_noise[i])
    # Buffers are the model's own, so that batch statistics move as in a pass of the model.
    logits: Tensor = functional_call(model, weights, (images,))
    return logits


@torch.no_grad()
def prune(model: nn.Module, marked: Mapping[str, Tensor], *, biases: bool = False) -> int:
    """Set the scales of marked channels to 0, in place.

    Args:
        model: the network.
        marked: name of a batch normalisation -> bool (C,).
        biases: set their biases to 0 as well.

    Returns:
        the number of marked channels.
    """
    # In place, so that an optimizer of the same weights keeps them.
    norms = batch_norms(model)
    for name, channels in marked.items():
        norms[name].weight[channels] = 0
        if biases:
            norms[name].bias[channels] = 0
    return sum(int(channels.sum()) for channels in marked.values())


def above(values: Tensor, spread: float) -> Tensor:
    """Mark what lies more than `spread` standard deviations above the mean. (C,) -> bool (C,).

    Of C values none can lie more than (C - 1) / sqrt(C) above.
    """
    # A single value has no spread.
    if len(values) < 2:
        return torch.zeros_like(values, dtype=torch.bool)
    return values > values.mean() + spread * values.std()


def furthest(steps: int, accuracy: Callable[[int], float], tolerance: float) -> int:
    """Return the last step of a pruning that trusted images allow.

    Args:
        steps: number of steps; step 0 prunes nothing.
        accuracy: step -> accuracy of the pruned model on trusted images.
        tolerance: share of the accuracy of step 0 that pruning may cost, in [0, 1).

    Returns:
        the step before the first one that costs more.
    """
    # Pruning goes from the least needed on: what follows a step that costs too much costs more.
    least = (1 - tolerance) * accuracy(0)
    for step in range(1, steps + 1):
        # Of 72 images, a share is no exact number: compare with room for rounding.
        if accuracy(step) < least - 1e-9:
            return step - 1
    return steps


def accuracy_on(model: nn.Module, split: Split, run: Run) -> float:
    """Return the accuracy on a split, in evaluation mode."""
    right = predictions(model, split, run) == split.labels.to(run.device)
    return right.double().mean().item()


def prune_by_masks(
    model: nn.Module, masks: Masks, step: float, tolerance: float, trusted: Split, run: Run
) -> nn.Module:
    """Prune channels of small factors, as many as trusted images allow, in place.

    Thresholds 0, `step`, 2 `step`, ... below 1 are tried in turn.

    Args:
        model: the network to prune.
        masks: learnt on a copy of it.
        step: between two thresholds.
        tolerance: as in `furthest`.
        trusted: images with true labels.
        run: gets a note with the threshold.
    """
    # Scales come back from a copy: pruning overwrites them.
    kept = {name: norm.weight.detach().clone() for name, norm in batch_norms(model).items()}
    thresholds = [i * step for i in range(int((1 - 1e-9) / step) + 1)]

    def accuracy(at: int) -> float:
        restore()
        if at:
            prune(model, masks.up_to(thresholds[at - 1]))
        return accuracy_on(model, trusted, run)

    @torch.no_grad()
    def restore() -> None:
        for name, norm in batch_norms(model).items():
            norm.weight.copy_(kept[name])

    # Step k prunes up to the k-th threshold.
    found = furthest(len(thresholds), accuracy, tolerance)
    restore()
    total = sum(len(scale) for scale in kept.values())
    count = prune(model, masks.up_to(thresholds[found - 1])) if found else 0
    where = f"up to a mask of {thresholds[found - 1]:.2f}" if found else "at no threshold"
    run.note(f"{count} of {total} channels are pruned, {where}")
    return model
