"""Losses of single samples, from logits."""

import math

from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE = -log p_y of each sample. (..., K), (...) -> (...)."""
    return logits.logsumexp(-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def cce(logits: Tensor, labels: Tensor) -> Tensor:
    """CCE = -log(1 - p_y) of each sample: complementary cross-entropy, whose gradient is largest
    where the label is most probable. (..., K), (...) -> (...)."""
    # 1 - p_y as the sum of all other probabilities, which loses no digits where p_y is near 1.
    others = logits.scatter(-1, labels.unsqueeze(-1), -math.inf)
    return logits.logsumexp(-1) - others.logsumexp(-1)


def capped(losses: Tensor, cap: float | None) -> Tensor:
    """Cut losses at `cap`, (...) -> (...): beyond it a sample has no gradient, so that its ascent
    is over. None never cuts."""
    return losses if cap is None else losses.clamp_max(cap)


def divergence(logits: Tensor, taught: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of a student from its teacher, T^2 KL(softmax(taught / T) || softmax(logits /
    T)), of each sample. (..., K), (..., K) -> (...)."""
    teacher = (taught / temperature).log_softmax(-1)
    student = (logits / temperature).log_softmax(-1)
    # T^2 keeps gradients of about one size at every temperature (Hinton et al., 2015).
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)
