"""CLP: channel Lipschitzness based pruning, which needs no image.

Data-free Backdoor Removal based on Channel Lipschitzness. R. Zheng, R. Tang, J. Li, L. Liu. ECCV
2022. https://arxiv.org/abs/2208.03111

Assumes: the poisoned model, with batch normalisation.

Channels that a trigger excites change much for a small change of their input. The bound of this
change is known for a convolution that a batch normalisation follows: the largest singular value of
the channel's kernel, times |gamma| / sqrt(var + eps). Channels whose bound lies more than u
standard deviations above the mean of their layer are pruned: scale and bias become 0.

Departs: the published code pairs convolutions and normalisations by the order in which modules are
listed, which in pre-activation networks joins some that have nothing to do with each other. Here
one grey image shows which normalisation takes a convolution's output as it is. A normalisation of
anything else (a residual sum, pooled maps) is left as it is. eps is counted as batch normalisation
does, so that a channel with a variance of 0 has a bound, too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.errors import UserError
from backdoorlab.record import DefenderView
from backdoorlab.repair.pairs import paired
from backdoorlab.repair.pruning import BatchNorm, above, batch_norms, prune
from backdoorlab.run import Run

ASSUMES = ("model",)


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    u: float = 3.0
    """Standard deviations above a layer's mean from which on a channel is pruned. Less prunes
    more channels and costs clean accuracy."""

    RANGES: ClassVar[dict[str, str]] = {"u": ">= 0"}


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model = view.load_model()
    norms = batch_norms(model)
    pairs = paired(model, torch.full((1, *view.image_shape), 0.5, device=run.device))
    if not pairs:
        raise UserError(
            "this defense needs batch normalisation that follows a convolution, and this network"
            f" ({type(model.network).__name__}) has none: choose another defense, such as ft"
        )
    marked = {
        name: above(lipschitz(convolution, norms[name]), config.u)
        for name, convolution in pairs.items()
    }

    # A layer of ten channels or fewer can have none three standard deviations above.
    small = sum((len(part) - 1) / len(part) ** 0.5 <= config.u for part in marked.values())

    # With its bias, so that a pruned channel gives 0 whatever it gets.
    count = prune(model, marked, biases=True)
    total = sum(len(part) for part in marked.values())
    beyond = f"; {small} of them are too small to have such a channel" if small else ""
    run.note(
        f"{count} of {total} channels are pruned, in {len(pairs)} of {len(norms)} batch"
        f" normalisations, the others do not follow a convolution{beyond}"
    )
    return model


@torch.no_grad()
def lipschitz(convolution: nn.Conv2d, norm: BatchNorm) -> Tensor:
    """Bound how much each channel changes with its input, (C,).

    sigma_k = ||W_k||_2 |gamma_k| / sqrt(var_k + eps), W_k the kernel of channel k, (C_in, h w).
    """
    assert norm.running_var is not None, "in evaluation mode it has statistics"
    largest = torch.linalg.matrix_norm(convolution.weight.flatten(2), ord=2)
    return largest * norm.weight.abs() / (norm.running_var + norm.eps).sqrt()


if __name__ == "__main__":
    raise SystemExit(main(__file__))
