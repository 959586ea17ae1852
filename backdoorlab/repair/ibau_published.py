"""What the published codes of I-BAU do where ours departs: their search, and their solver.

`--quirks True` and `--solver fixed_point` of defense/ibau.py take these functions in place of its
own. Reasons and effects in docs/methods/ibau.md.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..data import Batch
from ..perturb import project
from ..run import Run


def find_delta(
    inner: Callable[[Tensor, Tensor, Tensor], Tensor],
    searched: Iterable[Batch],
    delta: Tensor,
    lr: float,
    radius: float,
    model: nn.Module,
    run: Run,
) -> tuple[Tensor, Batch | None]:
    """Search by steps down `inner` on the model's own answers, and project delta once, at the end.

    Args:
        inner: loss of images (B, C, H, W), labels (B,) and delta.
        searched: batches, one a step.
        delta: (1, C, H, W), where the search starts.
        lr: size of a step along the gradient.
        radius: of the L2 ball, in pixels of [0, 1]; infinite for none.

    Returns:
        delta; and the first batch, on which L_in is taken in the whole round.
    """
    first: Batch | None = None
    for batch in searched:
        first = first or batch

        # The model's own predictions stand for the labels.
        with torch.no_grad(), run.autocast():
            answers = model(batch.images).argmax(1)
        delta.requires_grad_()
        (slope,) = torch.autograd.grad(inner(batch.images, answers, delta), delta)
        delta = delta.detach() - lr * slope

    return project(delta, "l2", radius), first


def carried(size: int, share: float) -> int:
    """Images of a batch that carry delta: none in a batch smaller than 1 / share."""
    return int(share * size)


def fixed_point(
    hessian: Callable[[Tensor], Tensor], g: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Iterate v <- v + 0.1 (g - H v) from 0; it diverges where H has eigenvalues outside (0, 20).

    Returns:
        v, and the size of its last step as a share of |g|.
    """
    # The step size is fixed, whatever the eigenvalues.
    v = 0.1 * g
    change = g
    for _ in range(steps - 1):
        change = g - hessian(v)
        v = v + 0.1 * change
    return v, change.norm() / g.norm().clamp_min(1e-30)
