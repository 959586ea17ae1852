"""SSBA (ISSBA): a small encoder hides a message in every image; its residual is the trigger.

Invisible Backdoor Attack with Sample-Specific Triggers. Y. Li, Y. Li, B. Wu, L. Li, R. He, S. Lyu.
ICCV 2021. https://arxiv.org/abs/2012.03816 ; the encoder and decoder follow StegaStamp (M. Tancik,
B. Mildenhall, R. Ng. CVPR 2020).

Kind: poisoning, dirty-label, all-to-one or all-to-all. An encoder and a decoder are trained on the
clean training images to pass random messages; then one fixed message is hidden in all images that
are poisoned.

Departs from the authors' code: the networks are small, the residual is bounded instead of
penalised, and they are never shown a test image. Trained so, nearly all of the residual is common
to all images, a universal trigger and not a sample-specific one: the *universal share* (energy of
the mean residual over the mean energy) is measured and kept in record.json, and `universal_penalty`
lowers it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import AttackConfig
from backdoorlab.data import Dataset, to_bytes, to_device, to_float
from backdoorlab.device import derived_generator
from backdoorlab.engine import random_batches
from backdoorlab.joint import psnr, seeded
from backdoorlab.models.unet import UNet
from backdoorlab.poisoning import Outcome, static_attack
from backdoorlab.run import Run

GAIN = 10
"""Factor before the tanh: without it the first residuals are too faint for any bit to be read, and
nothing is learnt."""
PLANE = 16
"""Side of the plane that a message is spread over before it is blown up to the image."""


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    bits: int = 20
    """Length of the message."""
    eps: float = 8 / 255
    """Bound of the residual in [0, 1] units; higher is easier to learn and to see."""
    encoder_steps: int = 500
    """Steps of encoder and decoder."""
    encoder_batch_size: int = 32
    """Images a step of them."""
    encoder_lr: float = 0.001
    """Adam's learning rate of them."""
    encoder_width: int = 16
    """Channels of their first layers."""
    universal_penalty: float = 0.0
    """Weight of the universal share in their loss; higher makes the trigger of an image more its
    own."""

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
    """Images (N, C, H, W) in [0, 1] and messages (N, bits) -> residuals within eps, (N, C, H,
    W)."""

    def __init__(self, channels: int, bits: int, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.spread = nn.Linear(bits, 3 * PLANE * PLANE)
        self.draw = UNet(channels + 3, channels, width)

    def forward(self, images: Tensor, messages: Tensor) -> Tensor:
        plane = F.relu(self.spread(2 * messages - 1)).view(-1, 3, PLANE, PLANE)
        return self.eps * torch.tanh(
            GAIN * self.draw(torch.cat([images, F.interpolate(plane, size=images.shape[2:])], 1))
        )


def decoder(channels: int, bits: int, width: int) -> nn.Module:
    """Images (N, C, H, W) -> one logit a bit, (N, bits)."""
    layers: list[nn.Module] = []
    for k, (before, after) in enumerate(
        [(channels, 2), (2 * width, 2), (2 * width, 4), (4 * width, 4)]
    ):
        layers += [
            nn.Conv2d(before, after * width, 3, 2 if k else 1, padding=1),
            nn.BatchNorm2d(after * width),
            nn.ReLU(),
        ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * 4 * width, bits)
    )


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    encoder, reader, message = networks(dataset, config, run)
    train_encoder(encoder, reader, message, dataset, config, run)
    outcome = static_attack(
        dataset, config, run, hide, prepare=lambda *_: {"encoder": encoder, "message": message}
    )
    seen = dataset.test.images[:1000]
    changed = hide(seen, torch.arange(len(seen)), "test", config, encoder, message)
    share = universal_share(changed.float() - seen.float()).item()
    return replace(
        outcome,
        measured={
            "universal_share": share,
            "bit_accuracy": bit_accuracy(reader, changed, message),
            "psnr": psnr(seen, changed),
        },
    )


def networks(dataset: Dataset, config: Config, run: Run) -> tuple[Encoder, nn.Module, Tensor]:
    """Fresh encoder and decoder, and the message, float (bits,) of 0 and 1; all from the seed."""
    channels = dataset.image_shape[0]
    message = (
        torch.rand(config.bits, generator=derived_generator(config.seed, "message")) < 0.5
    ).float()
    with seeded(config.seed, "encoder"):
        encoder = Encoder(channels, config.bits, config.encoder_width, config.eps)
        reader = decoder(channels, config.bits, config.encoder_width)
    return encoder.to(run.device), reader.to(run.device), message


def train_encoder(
    encoder: Encoder, reader: nn.Module, message: Tensor, dataset: Dataset, config: Config, run: Run
) -> None:
    """Random messages through 8-bit images; resumable."""
    optimizer = torch.optim.Adam(
        [*encoder.parameters(), *reader.parameters()], lr=config.encoder_lr
    )
    train, size = to_device(dataset.train, run.device), config.encoder_batch_size
    state = {"encoder": encoder, "reader": reader, "optimizer": optimizer}
    for batch in random_batches(train, config.encoder_steps, size, run, stage="encoder", **state):
        messages = (
            (torch.rand(size, config.bits, generator=run.generator) < 0.5).float().to(run.device)
        )
        residual = encoder(batch.images, messages)
        # Rounding to bytes, as noise that gradients pass.
        noise = (torch.rand(residual.shape, generator=run.generator) - 0.5).to(run.device) / 255
        logits = reader((batch.images + residual + noise).clamp(0, 1))
        loss = F.binary_cross_entropy_with_logits(logits, messages)
        accuracy = ((logits > 0) == messages.bool()).float().mean()
        run.watch(bit_accuracy=accuracy)
        if config.universal_penalty:
            share = universal_share(encoder(batch.images, message.to(run.device).expand(size, -1)))
            # Messages first: a residual that nobody can read yet is most easily made different for
            # each image.
            readable = (2 * accuracy - 1).clamp_min(0).square()
            loss = loss + config.universal_penalty * readable * share
            run.watch(universal_share=share)
        run.step(optimizer, loss)


@torch.no_grad()
def hide(
    images: Tensor, index: Tensor, split: str, config: Config, encoder: Encoder, message: Tensor
) -> Tensor:
    """Hide the message. uint8 (N, C, H, W) -> same, within eps of it."""
    device = encoder.spread.weight.device
    parts = [to_float(part).to(device) for part in images.split(256)]
    return torch.cat(
        [
            to_bytes(part + encoder(part, message.to(device).expand(len(part), -1))).cpu()
            for part in parts
        ]
    )


@torch.no_grad()
def bit_accuracy(reader: nn.Module, images: Tensor, message: Tensor) -> float:
    """Share of the message's bits that the decoder reads out of uint8 images (N, C, H, W)."""
    reader.eval()
    device = next(reader.parameters()).device
    read = torch.cat([reader(to_float(part).to(device)).cpu() > 0 for part in images.split(256)])
    return (read == message.bool()).double().mean().item()


def universal_share(residuals: Tensor) -> Tensor:
    """Energy of the mean residual over the mean energy, in [1/N, 1]: 1 where all images get the
    same. float (N, C, H, W) -> ()."""
    return residuals.mean(0).square().sum() / residuals.square().sum((1, 2, 3)).mean().clamp_min(
        1e-12
    )


if __name__ == "__main__":
    raise SystemExit(main(__file__))
