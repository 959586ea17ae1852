"""Pre-activation ResNet for small images.

Identity Mappings in Deep Residual Networks. K. He, X. Zhang, S. Ren, J. Sun. ECCV 2016.
https://arxiv.org/abs/1603.05027

The stem is one 3x3 convolution, and there is no normalisation after the last stage. Backdoor
benchmarks share this network, so their weights load by name (102 entries for preactresnet18).
"""

import torch.nn.functional as F
from torch import Tensor, nn

FEW = 16
"""Input channels below which a strided 1x1 convolution is avoided: oneDNN's weight gradient writes
past its buffer (uxlfoundation/oneDNN#6035)."""


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice; the shortcut starts after the first activation.

    (N, C, H, W) -> (N, C', H/stride, W/stride).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, padding=1, bias=False)
        self.skip = stride if in_channels < FEW else 1
        """Step over rows and columns in front of the shortcut's convolution, which then needs no
        stride of its own and computes the same."""
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride // self.skip, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        # In place: no other computation needs the output of a batch normalisation.
        activated = F.relu(self.bn1(x), inplace=True)
        shortcut = (
            self.shortcut(activated[..., :: self.skip, :: self.skip])
            if hasattr(self, "shortcut")
            else x
        )
        return self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True)).add_(shortcut)


class PreActResNet(nn.Module):
    """Four stages of pre-activation blocks, then a linear head.

    The stages have width, 2 width, 4 width and 8 width channels, and `blocks` blocks each.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        *,
        num_classes: int,
        in_chans: int = 3,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.num_features = 8 * width
        self.feature_info = [
            dict(num_chs=width * 2**i, reduction=2**i, module=f"layer{i + 1}") for i in range(4)
        ]
        # For images of 32 pixels: no stride and no pooling before the stages.
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.layer1 = _stage(width, width, blocks[0], stride=1)
        self.layer2 = _stage(width, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks[2], stride=2)
        self.layer4 = _stage(4 * width, 8 * width, blocks[3], stride=2)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the feature map (N, 8 width, H/8, W/8) of normalised images (N, C, H, W)."""
        # The last block's sum is pooled as it is, without normalisation or ReLU.
        return self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (N, K) of a feature map; with `pre_logits` its mean (N, 8 width)."""
        pooled = x.mean(dim=(2, 3))
        return pooled if pre_logits else self.linear(pooled)

    def get_classifier(self) -> nn.Linear:
        """Return the last layer."""
        return self.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Build a stage; its first block changes the number of channels and has the stride."""
    first = PreActBlock(in_channels, out_channels, stride)
    return nn.Sequential(
        first, *(PreActBlock(out_channels, out_channels, 1) for _ in range(blocks - 1))
    )


def preactresnet18(*, num_classes: int, in_chans: int = 3, width: int = 64) -> PreActResNet:
    """Build the network with two blocks per stage: 11.2 million parameters at width 64."""
    return PreActResNet((2, 2, 2, 2), num_classes=num_classes, in_chans=in_chans, width=width)


def preactresnet10(*, num_classes: int, in_chans: int = 3, width: int = 64) -> PreActResNet:
    """Build the network with one block per stage: half the depth and cost of preactresnet18."""
    return PreActResNet((1, 1, 1, 1), num_classes=num_classes, in_chans=in_chans, width=width)
