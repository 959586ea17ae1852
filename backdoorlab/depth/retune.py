"""Retuning attack: does fine-tuning on a few poisoned images bring the backdoor back?

Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor Defense. R. Min et al.
NeurIPS 2024. https://arxiv.org/abs/2410.09838 (their RA, which is robust accuracy here).

A set R of 2 % of the training set is clean but for its first n images, which are poisoned ones with
the target label. The model is fine-tuned on it, and its ASR measured again (P-ASR). At n = 0 it
shows what fine-tuning alone brings back. Departs: at least LEAST images, as 2 % of a small set are
one small batch; each image's augmentation is drawn once, as in the published code.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..data import NO_AUGMENT, Split, batches, to_bytes
from ..tables import audits
from .tuning import fine_tune
from .view import AttackerView, too_few

COUNTS = tuple(map(int, audits.COUNTS))
"""Numbers n of poisoned images in R: those that tables have columns for."""
DRAWS = range(3)
"""The draws of R whose mean is reported."""
CHECKS = range(3, 6)
"""Other draws, by which a control is compared with itself."""
SHARE, LEAST = 0.02, 144
"""Size of R as a share of the training set, and its least size."""
MEASURED = 2000
"""Test images by which a tuned model is measured, at most: a share of them is within .02 of that
of all in 95 of 100 draws, and most of an audit's time on a large set would go into them."""
EPOCHS, LR, BATCH_SIZE = 5, 0.01, 128
"""Of the published fine-tuning."""


def refusal(view: AttackerView) -> str | None:
    """Say why there are not images enough; None where there are."""
    return too_few(len(view.poisoned), max(COUNTS))


def retune(
    view: AttackerView,
    model: nn.Module,
    counts: Iterable[int] = COUNTS,
    draws: Iterable[int] = DRAWS,
) -> dict[str, Any]:
    """Measure the ASR after fine-tuning on n poisoned images, for each n and each draw.

    Args:
        view: the attacker's side.
        model: the model under test, which stays as it is.
        counts: the numbers n.
        draws: the draws of R; equal ones are equal images for each model and n.

    Returns:
        `p_asr` and `clean_accuracy`: n as text -> one value in [0, 1] for each draw, by MEASURED
        images; `o_asr` and `o_clean_accuracy`: before any fine-tuning, by all images.
    """
    found: dict[str, Any] = {
        "o_asr": view.asr(model),
        "o_clean_accuracy": view.clean_accuracy(model),
        "p_asr": {},
        "clean_accuracy": {},
    }
    # Every tuning starts from the same weights, never from another one's.
    chosen = list(draws)
    for count in counts:
        tuned = [_tuned(view, model, count, draw) for draw in chosen]
        found["p_asr"][str(count)] = [view.asr(one, MEASURED) for one in tuned]
        found["clean_accuracy"][str(count)] = [view.clean_accuracy(one, MEASURED) for one in tuned]
    return found


def _tuned(view: AttackerView, model: nn.Module, count: int, draw: int) -> nn.Module:
    """Return a copy of the model, fine-tuned on one R."""
    tuned = copy.deepcopy(model)
    fine_tune(
        tuned,
        retuning_set(view, count, draw),
        epochs=EPOCHS,
        lr=LR,
        batch_size=BATCH_SIZE,
        device=view.device,
        generator=view.generator(f"retune order {draw}"),
    )
    return tuned


def retuning_set(view: AttackerView, count: int, draw: int) -> Split:
    """Draw R: clean training images, of which the first `count` are replaced by poisoned ones.

    Args:
        view: the attacker's side.
        count: n, number of poisoned images.
        draw: number of the draw. A larger n of the same draw keeps the images of a smaller one.

    Returns:
        max(SHARE N, LEAST) images, or as many as there are.
    """
    generator = view.generator(f"retune {draw}")
    size = max(round(SHARE * len(view.dataset.train)), LEAST)
    clean = view.draw_clean(size, generator)
    images = _augmented(view, clean, generator)

    # The poisoned ones are not augmented: no crop cuts the trigger off.
    poison = torch.randperm(len(view.poisoned), generator=generator)[:count]
    return Split(
        torch.cat([view.poisoned.images[poison], images[count:]]),
        torch.cat([view.poisoned.labels[poison], clean.labels[count:]]),
    )


def _augmented(view: AttackerView, clean: Split, generator: torch.Generator) -> torch.Tensor:
    """Draw the augmentation of each image once. -> uint8 (N, C, H, W)."""
    # As in the published code: one draw an image, and not one an epoch.
    augment = view.record.augment()
    if augment == NO_AUGMENT:
        return clean.images
    order, cpu = torch.arange(len(clean)), torch.device("cpu")
    passed = batches(
        clean, len(clean), device=cpu, generator=generator, augment=augment, order=order
    )
    return torch.cat([to_bytes(batch.images) for batch in passed]).contiguous()
