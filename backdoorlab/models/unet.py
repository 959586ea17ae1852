"""A small U-Net, for triggers that a network makes, or finds."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError


class UNet(nn.Module):
    """Two halvings and back, with skip connections; H and W must be 8 or more.

    float (N, inputs, H, W) -> float (N, outputs, H, W).
    """

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(inputs, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, 2, padding=1)
        self.deeper = nn.Conv2d(2 * width, 2 * width, 3, 2, padding=1)
        self.rise = nn.Conv2d(4 * width, 2 * width, 3, padding=1)
        self.leave = nn.Conv2d(3 * width, width, 3, padding=1)
        self.last = nn.Conv2d(width + inputs, outputs, 1)

    def forward(self, given: Tensor) -> Tensor:
        if min(given.shape[2:]) < 8:
            height, width = given.shape[2:]
            raise UserError(
                "the U-Net halves images twice and needs 8x8 pixels or more, got"
                f" {height}x{width}: an attack makes them larger by --image_size"
            )

        full = F.relu(self.enter(given))
        half = F.relu(self.down(full))
        quarter = F.relu(self.deeper(half))

        # Back to full size; each step also gets the features of its size from the way down.
        half = F.relu(self.rise(torch.cat([half, F.interpolate(quarter, size=half.shape[2:])], 1)))
        full = F.relu(self.leave(torch.cat([full, F.interpolate(half, size=full.shape[2:])], 1)))
        return self.last(torch.cat([full, given], 1))
