"""Many small networks of one shape side by side: their layers are one batched product.

Networks that are too small to fill a processor cost nearly as much each as many of them together.
Everything here has a first dimension `count`, one place for each network, and no network sees what
another one does.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stacked(nn.Module):
    """`count` linear layers. (count, n, inputs) -> (count, n, outputs)."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        # Drawn as torch draws a linear layer.
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(count, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class StackedNorm(nn.Module):
    """Batch normalisation of `count` layers, each over its own n. (count, n, width) -> the same."""

    mean: Tensor
    variance: Tensor

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(count, 1, width))
        self.shift = nn.Parameter(torch.zeros(count, 1, width))
        self.register_buffer("mean", torch.zeros(count, 1, width))
        self.register_buffer("variance", torch.ones(count, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.mean, self.variance
        if self.training:
            variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
            # Running statistics as torch keeps them: momentum 0.1, the variance unbiased.
            with torch.no_grad():
                self.mean.lerp_(mean, 0.1)
                self.variance.lerp_(variance * x.shape[1] / (x.shape[1] - 1), 0.1)
        return (x - mean) * (variance + 1e-5).rsqrt() * self.scale + self.shift


class Mine(nn.Module):
    """MINE: `count` estimates of the mutual information of two variables, by a network each.

    Mutual Information Neural Estimation. M. I. Belghazi et al. ICML 2018.
    https://arxiv.org/abs/1801.04062

    Args:
        count: estimates side by side.
        first, second: dimensions of the two variables.
        hidden: width of the networks.
    """

    average: Tensor

    def __init__(self, count: int, first: int, second: int, hidden: int) -> None:
        super().__init__()
        self.joint = Stacked(count, first + second, hidden)
        self.middle = Stacked(count, hidden, hidden)
        self.last = Stacked(count, hidden, 1)
        self.register_buffer("average", torch.ones(count))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """T(a, b): (count, n, first), (count, n, second) -> (count, n)."""
        h = F.leaky_relu(self.joint(torch.cat([a, b], 2)), 0.2)
        return self.last(F.leaky_relu(self.middle(h), 0.2)).squeeze(2)

    def information(self, a: Tensor, other: Tensor, b: Tensor) -> Tensor:
        """Estimate in nats, (count,): mean T on pairs (a, b), less log mean exp T on pairs of `b`
        with `other`, an independent draw of a."""
        return self(a, b).mean(1) - (self(other, b).logsumexp(1) - math.log(b.shape[1]))

    def loss(self, a: Tensor, other: Tensor, b: Tensor) -> Tensor:
        """What training descends: the estimate's gradient with the mean of exp T averaged over
        steps, which removes its bias."""
        # The gradient of log mean exp T is that of mean exp T over mean exp T, here over its
        # average.
        free = self(other, b).exp().mean(1)
        with torch.no_grad():
            self.average.lerp_(free, 0.01)
        return -(self(a, b).mean(1) - free / self.average).sum()
