"""Fine-tuning by an attacker, or by the control that knows the trigger: plain SGD."""

import torch
import torch.nn.functional as F
from torch import nn

from ..data import Split, batches
from ..models import paused


def fine_tune(
    model: nn.Module,
    split: Split,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    """Fine-tune all weights in place by SGD of momentum .9 at a constant rate, in fp32.

    Args:
        model: images (B, C, H, W) -> logits (B, K).
        split: the images, which are not augmented.
        epochs: passes over them.
        lr: learning rate.
        batch_size: images per step.
        device: where the model is.
        generator: shuffles the images.
    """
    # Batch statistics follow, too: the attacker trains as usual.
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    # These passes are no cost of any method.
    with paused():
        for _ in range(epochs):
            for batch in batches(split, batch_size, device=device, generator=generator):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(batch.images), batch.labels).backward()
                optimizer.step()
    model.eval()
