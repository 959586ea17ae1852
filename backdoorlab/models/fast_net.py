"""A convolutional network that is trained in ten epochs.

94% on CIFAR-10 in 3.29 Seconds on a Single GPU. K. Jordan. 2024. https://arxiv.org/abs/2404.00498

The first convolution whitens 2x2 patches: its filters are the principal directions of the training
images' patches, both signs of each, and stay as they are. Three groups of two 3x3 convolutions
follow. Each convolution starts as the identity on its first input channels.

Departs from the paper's network: the last layer has a bias, which methods that move it expect; maps
are pooled while they are larger than one pixel, so that small images fit. Nothing is done at test
time (the paper averages six views of an image).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AT_ONCE = 500
"""Images whose patches are in memory at once."""
LEAST_VARIANCE = 5e-4
"""Added to the variance of a direction, so that directions of noise are not blown up."""
MOMENTUM = 0.4
"""Share of a batch in running statistics: there are few steps to follow."""
SCALE = 1 / 9
"""Of the last layer's input. Small logits at the start keep the first steps small."""


class Group(nn.Module):
    """Convolution, 2x2 pooling, convolution, each with batch normalisation and GELU.

    (N, C, H, W) -> (N, C', H/2, W/2); a map of one pixel stays as large.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, out_channels)
        self.bn1 = _norm(out_channels)
        self.conv2 = _convolution(out_channels, out_channels)
        self.bn2 = _norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if min(x.shape[2:]) > 1:
            x = F.max_pool2d(x, 2)
        x = F.gelu(self.bn1(x))
        return F.gelu(self.bn2(self.conv2(x)))


class FastNet(nn.Module):
    """A whitening convolution, three groups of width, 4 width and 4 width channels, a linear
    head."""

    def __init__(self, *, num_classes: int, in_chans: int = 3, width: int = 64) -> None:
        super().__init__()
        self.num_features = 4 * width
        self.feature_info = [
            dict(num_chs=channels, reduction=2**i, module=f"group{i}")
            for i, channels in enumerate((width, 4 * width, 4 * width), 1)
        ]
        self.whiten = nn.Conv2d(in_chans, 8 * in_chans, 2)
        self.whiten.weight.requires_grad_(False)
        self.group1 = Group(8 * in_chans, width)
        self.group2 = Group(width, 4 * width)
        self.group3 = Group(4 * width, 4 * width)
        self.linear = nn.Linear(4 * width, num_classes)

    @torch.no_grad()
    def fit_input(self, images: Tensor) -> None:
        """Set the first layer's filters by normalised training images, float (N, C, H, W)."""
        # Second moments of all 2x2 patches, in parts that fit into memory.
        size = self.whiten.in_channels * 4
        moments = torch.zeros(size, size, dtype=torch.float64, device=images.device)
        for part in images.split(AT_ONCE):
            patches = F.unfold(part, 2).transpose(1, 2).reshape(-1, size).double()
            moments += patches.T @ patches / len(patches) * len(part) / len(images)

        # Each direction in units of its own spread, the strongest first.
        values, vectors = torch.linalg.eigh(moments)
        filters = (vectors / (values + LEAST_VARIANCE).sqrt()).T.flip(0)
        self.whiten.weight.copy_(torch.cat([filters, -filters]).view_as(self.whiten.weight))
        assert self.whiten.bias is not None
        self.whiten.bias.zero_()

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the feature map (N, 4 width, H/8, W/8) of normalised images (N, C, H, W)."""
        return self.group3(self.group2(self.group1(F.gelu(self.whiten(x)))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (N, K) of a feature map; with `pre_logits` its scaled maximum
        (N, 4 width)."""
        pooled = x.amax(dim=(2, 3)) * SCALE
        return pooled if pre_logits else self.linear(pooled)

    def get_classifier(self) -> nn.Linear:
        """Return the last layer."""
        return self.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def fastnet(*, num_classes: int, in_chans: int = 3, width: int = 64) -> FastNet:
    """Build the network: 2 million parameters at width 64."""
    return FastNet(num_classes=num_classes, in_chans=in_chans, width=width)


def _convolution(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Build a 3x3 convolution that starts as the identity on its first input channels."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight[:in_channels])
    return convolution


def _norm(channels: int) -> nn.BatchNorm2d:
    """Build a batch normalisation whose scale stays 1."""
    norm = nn.BatchNorm2d(channels, momentum=MOMENTUM)
    norm.weight.requires_grad_(False)
    return norm
