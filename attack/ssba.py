"""SSBA (ISSBA): an encoder hides a message in each image.

Invisible Backdoor Attack with Sample-Specific Triggers. Y. Li, Y. Li, B. Wu, L. Li, R. He, S. Lyu.
ICCV 2021. https://arxiv.org/abs/2012.03816 ; the encoder and decoder follow StegaStamp (M. Tancik,
B. Mildenhall, R. Ng. CVPR 2020).

Kind: poisoning, dirty-label, all-to-one or all-to-all. The encoder's residual is the trigger.

Two steps:
  1. Train an encoder and a decoder on the clean training images to transmit random messages.
  2. Hide one fixed message in all images that are poisoned.

Departs from the authors' code: the networks are small, the residual is bounded instead of
penalised, and no test image is used in their training.

Nearly all of the residual is common to all images, so the trigger is universal rather than
sample-specific. The *universal share* (energy of the mean residual over the mean energy) is
measured and stored in record.json, and `universal_penalty` lowers it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import AttackConfig
from backdoorlab.data import Dataset, to_bytes, to_device, to_float
from backdoorlab.device import derived_generator, seeded
from backdoorlab.engine import random_batches
from backdoorlab.models.unet import UNet
from backdoorlab.poisoning import Outcome, static_attack
from backdoorlab.run import Run

GAIN = 10
"""Factor before the tanh. Without it the first residuals are too faint to read any bit, and nothing
is learned."""
PLANE = 16
"""Side of the plane that a message is spread over before it is resized to the image."""


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    bits: int = 20
    """Length of the message; more are harder to transmit."""
    eps: float = 8 / 255
    """Largest change of a value by the encoder, in [0, 1] units; higher is easier to learn and to
    see."""
    encoder_steps: int = 500
    """Training steps of encoder and decoder; more transmit the message better."""
    encoder_batch_size: int = 32
    """Images per step of encoder and decoder; more give less noisy steps and cost more time."""
    encoder_lr: float = 0.001
    """Learning rate of Adam for encoder and decoder; higher learns faster and may diverge."""
    encoder_width: int = 16
    """Channels of the first layers of encoder and decoder; more cost more time."""
    universal_penalty: float = 0.0
    """Weight of the universal share in the loss of encoder and decoder; higher makes the triggers
    of two images differ more."""

    RANGES: ClassVar[dict[str, str]] = {
        "bits": ">= 1",
        "eps": "(0, 1]",
        "encoder_steps": ">= 1",
        "encoder_batch_size": ">= 2",
        "encoder_lr": "> 0",
        "encoder_width": ">= 1",
        "universal_penalty": ">= 0",
    }


class Encoder(nn.Module):
    """Images (N, C, H, W) in [0, 1], messages (N, bits) -> residuals (N, C, H, W) within eps."""

    def __init__(self, channels: int, bits: int, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.spread = nn.Linear(bits, 3 * PLANE * PLANE)
        self.draw = UNet(channels + 3, channels, width)

    def forward(self, images: Tensor, messages: Tensor) -> Tensor:
        # As in StegaStamp: the message becomes a small picture that is laid beside the image.
        plane = F.relu(self.spread(2 * messages - 1)).view(-1, 3, PLANE, PLANE)
        spread = F.interpolate(plane, size=images.shape[2:])
        return self.eps * torch.tanh(GAIN * self.draw(torch.cat([images, spread], 1)))


def decoder(channels: int, bits: int, width: int) -> nn.Module:
    """Build the decoder: images (N, C, H, W) -> one logit per bit, (N, bits)."""
    layers: list[nn.Module] = []
    sizes = [(channels, 2), (2 * width, 2), (2 * width, 4), (4 * width, 4)]
    for k, (before, after) in enumerate(sizes):
        layers += [
            nn.Conv2d(before, after * width, 3, 2 if k else 1, padding=1),
            nn.BatchNorm2d(after * width),
            nn.ReLU(),
        ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * 4 * width, bits)
    )


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    """Train encoder and decoder, poison with the encoder, and measure the trigger."""
    # Step 1: encoder and decoder learn to transmit any message.
    encoder, reader, message = networks(dataset, config, run)
    train_encoder(encoder, reader, message, dataset, config, run)

    # Step 2: the encoder hides one message in all poisoned images.
    outcome = static_attack(
        dataset, config, run, hide, prepare=lambda *_: {"encoder": encoder, "message": message}
    )

    # The trigger on test images: how universal, how readable, how visible.
    seen = dataset.test.images[:1000]
    changed = hide(seen, torch.arange(len(seen)), "test", config, encoder, message)
    share = universal_share(changed.float() - seen.float()).item()
    return replace(
        outcome,
        measured={
            "universal_share": share,
            "bit_accuracy": bit_accuracy(reader, changed, message),
        },
    )


def networks(dataset: Dataset, config: Config, run: Run) -> tuple[Encoder, nn.Module, Tensor]:
    """Build encoder, decoder and the message, float (bits,) of 0 and 1, all from the seed."""
    channels = dataset.image_shape[0]
    generator = derived_generator(config.seed, "message")
    message = (torch.rand(config.bits, generator=generator) < 0.5).float()
    with seeded(config.seed, "encoder"):
        encoder = Encoder(channels, config.bits, config.encoder_width, config.eps)
        reader = decoder(channels, config.bits, config.encoder_width)
    return encoder.to(run.device), reader.to(run.device), message


def train_encoder(
    encoder: Encoder, reader: nn.Module, message: Tensor, dataset: Dataset, config: Config, run: Run
) -> None:
    """Train encoder and decoder to transmit random messages through 8-bit images; resumable.

    Args:
        encoder: trained in place.
        reader: the decoder, trained in place.
        message: float (bits,), the attack's message, for the universal share.
        dataset: the clean data, of which training images are used.
        config: the options.
        run: the run.
    """
    optimizer = torch.optim.Adam(
        [*encoder.parameters(), *reader.parameters()], lr=config.encoder_lr
    )
    train, size = to_device(dataset.train, run.device), config.encoder_batch_size
    state = {"encoder": encoder, "reader": reader, "optimizer": optimizer}
    for batch in random_batches(train, config.encoder_steps, size, run, stage="encoder", **state):
        # A new message for each image: what is learned is to transmit, not one pattern.
        messages = (
            (torch.rand(size, config.bits, generator=run.generator) < 0.5).float().to(run.device)
        )
        residual = encoder(batch.images, messages)

        # Noise stands for the rounding to bytes, through which no gradient passes.
        noise = (torch.rand(residual.shape, generator=run.generator) - 0.5).to(run.device) / 255
        logits = reader((batch.images + residual + noise).clamp(0, 1))
        # The bits alone: eps bounds the residual, so that no term has to weigh its size.
        loss = F.binary_cross_entropy_with_logits(logits, messages)
        accuracy = ((logits > 0) == messages.bool()).float().mean()
        run.watch(bit_accuracy=accuracy)

        if config.universal_penalty:
            share = universal_share(encoder(batch.images, message.to(run.device).expand(size, -1)))
            # The penalty grows with the accuracy. Otherwise the residuals become different before
            # they can be read.
            readable = (2 * accuracy - 1).clamp_min(0).square()
            loss = loss + config.universal_penalty * readable * share
            run.watch(universal_share=share)
        run.step(optimizer, loss)


@torch.no_grad()
def hide(
    images: Tensor, index: Tensor, split: str, config: Config, encoder: Encoder, message: Tensor
) -> Tensor:
    """Hide the message in each image.

    Args:
        images: uint8 (N, C, H, W).
        index: not used; the trigger depends on the image alone.
        split: not used.
        config: not used.
        encoder: the trained encoder.
        message: float (bits,) of 0 and 1.

    Returns:
        uint8 (N, C, H, W).
    """
    device = encoder.spread.weight.device
    found = []
    for part in images.split(256):
        x = to_float(part).to(device)
        found.append(to_bytes(x + encoder(x, message.to(device).expand(len(x), -1))).cpu())
    return torch.cat(found)


@torch.no_grad()
def bit_accuracy(reader: nn.Module, images: Tensor, message: Tensor) -> float:
    """Return the share of bits that the decoder reads correctly in images, uint8 (N, C, H, W)."""
    reader.eval()
    device = next(reader.parameters()).device
    read = torch.cat([reader(to_float(part).to(device)).cpu() > 0 for part in images.split(256)])
    return (read == message.bool()).double().mean().item()


def universal_share(residuals: Tensor) -> Tensor:
    """Return the energy of the mean residual over the mean energy, in [1/N, 1].

    It is 1 if all images get the same residual. float (N, C, H, W) -> ().
    """
    mean_energy = residuals.square().sum((1, 2, 3)).mean().clamp_min(1e-12)
    return residuals.mean(0).square().sum() / mean_energy


if __name__ == "__main__":
    raise SystemExit(main(__file__))
