"""What a detector answers with, a suspicion and a flag for each training image, and how it goes
through them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import UserError, described


class Detection(NamedTuple):
    """The answer of `detect(view, config, run)`, over the N images of `view.train`."""

    suspicion: Tensor
    """float (N,), finite; higher is more suspicious."""
    flagged: Tensor
    """bool (N,): what the detector calls poison."""


def checked(found: Any, size: int, where: object) -> Detection:
    """Refuse what is no detection of a training set, in one line; return it on the CPU.

    Args:
        found: what `detect` returned.
        size: N of the training set.
        where: the method's file, with which the message begins.
    """
    if not (isinstance(found, tuple) and len(found) == 2):
        raise UserError(
            f"{where}: detect returned {described(found)}: expected a"
            " backdoorlab.detection.Detection(suspicion, flagged)"
        )
    suspicion, flagged = found
    for name, value, kind in (("suspicion", suspicion, "float"), ("flagged", flagged, "bool")):
        if not _is_column(value, size, kind):
            raise UserError(
                f"{where}: detect returned {name} as {described(value)}: expected {kind} ({size},),"
                " one for each training image"
            )

    # NaN has no place in an order, and an infinity none in a picture.
    lost = int((~suspicion.isfinite()).sum())
    if lost:
        raise UserError(
            f"{where}: detect returned a suspicion that is NaN or infinite for {lost} of {size}"
            " training images: expected finite numbers, higher for what is more suspicious"
        )
    return Detection(suspicion.detach().cpu().float(), flagged.cpu())


def _is_column(value: Any, size: int, kind: str) -> bool:
    """Whether a value is a tensor (N,) of that kind, float or bool."""
    if not isinstance(value, Tensor) or value.shape != (size,):
        return False
    return value.is_floating_point() if kind == "float" else value.dtype == torch.bool


def by_label(labels: Tensor, num_classes: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each label with the positions of its images, int64 (n,).

    Labels of fewer than two images are left out: nothing in them can be compared.
    """
    for label in range(num_classes):
        members = (labels == label).nonzero().squeeze(1)
        if len(members) > 1:
            yield label, members


def assumed_share(rate: float, factor: float) -> float:
    """Share of a label that is flagged where `rate` of it is taken for poison: at most half."""
    return min(0.5, factor * rate)


def highest(suspicion: Tensor, rate: float) -> Tensor:
    """Flag the most suspicious images: float (N,), a share in (0, 1) of them -> bool (N,), at least
    one image and not all."""
    size = len(suspicion)
    count = min(max(1, round(rate * size)), size - 1)
    flagged = torch.zeros(size, dtype=torch.bool, device=suspicion.device)
    # Stable: of equal suspicions the first images are flagged, on every machine.
    flagged[suspicion.argsort(descending=True, stable=True)[:count]] = True
    return flagged
