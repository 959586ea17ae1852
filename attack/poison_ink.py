"""Poison Ink: a network hides an image's coloured edges in it.

Poison Ink: Robust and Invisible Backdoor Attack. J. Zhang, D. Chen, Q. Huang, J. Liao, W. Zhang, H.
Feng, G. Hua, N. Yu. IEEE TIP 2022. https://arxiv.org/abs/2108.02488

Kind: poisoning, dirty-label, all-to-one or all-to-all.

Two steps:
  1. Train two networks on the clean training images, with random colours. An encoder hides the
     coloured edges of an image in it. A reader finds them in images that were shifted and rotated,
     and finds nothing in clean ones.
  2. Hide edges of one colour in all images that are poisoned.

Departs from the authors' code: the networks are small, trained for hundreds of steps instead of
hundreds of epochs, and the residual is bounded. A poisoned image replaces its clean one, as in
every attack here. (BackdoorBench's trainer adds a poisoned batch to every batch and keeps the clean
originals.)
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import AttackConfig
from backdoorlab.data import Dataset, to_bytes, to_device, to_float
from backdoorlab.device import seeded
from backdoorlab.engine import random_batches
from backdoorlab.errors import UserError
from backdoorlab.joint import vary
from backdoorlab.models.unet import UNet
from backdoorlab.poisoning import Outcome, static_attack
from backdoorlab.run import Run

GAIN = 10
"""Factor before the tanh, so that the first residuals are strong enough to be read."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness."""


@dataclass(frozen=True, kw_only=True)
class Config(AttackConfig):
    colour: tuple[int, int, int] = (80, 160, 80)
    """Colour of the edges: red, green and blue in 0..255; darker is easier to learn. Grey images
    use its brightness."""
    edge_threshold: float = 28.0
    """Sobel magnitude of the brightness, in 0..255, above which a pixel is an edge; lower draws
    more edges."""
    eps: float = 8 / 255
    """Largest change of a value by the encoder, in [0, 1] units; higher is easier to learn and to
    see."""
    encoder_steps: int = 600
    """Training steps of encoder and reader; more make the ink easier to read."""
    encoder_batch_size: int = 32
    """Images per step of encoder and reader; more give less noisy steps and cost more time."""
    encoder_lr: float = 0.001
    """Learning rate of Adam for encoder and reader; higher learns faster and may diverge."""
    encoder_width: int = 16
    """Channels of the first layers of encoder and reader; more cost more time."""
    cover_weight: float = 1.0
    """Weight of the change of the image; higher hides the ink better and makes it harder to
    learn."""
    edge_weight: float = 13.0
    """Weight of the reader's error on edges, against 1 off edges; higher makes the ink easier to
    read."""
    clean_weight: float = 100.0
    """Weight of the reader's error on clean images; higher finds less ink where there is none."""

    RANGES: ClassVar[dict[str, str]] = {
        "edge_threshold": ">= 0",
        "eps": "(0, 1]",
        "encoder_steps": ">= 1",
        "encoder_batch_size": ">= 1",
        "encoder_lr": "> 0",
        "encoder_width": ">= 1",
        "cover_weight": ">= 0",
        "edge_weight": ">= 0",
        "clean_weight": ">= 0",
    }


def attack(dataset: Dataset, config: Config, run: Run) -> Outcome:
    """Train encoder and reader, poison with the encoder, and measure how well the ink is read."""
    if not all(0 <= level <= 255 for level in config.colour):
        raise UserError(f"colour must be three numbers in 0..255, got {config.colour}")

    # Step 1: the networks learn on clean images.
    encoder, reader = networks(dataset.image_shape[0], config, run)
    train_networks(encoder, reader, dataset, config, run)

    # Step 2: the encoder hides edges of one colour.
    outcome = static_attack(dataset, config, run, hide, prepare=lambda *_: {"encoder": encoder})

    # What the reader finds of it in test images, which neither network has learned from.
    seen = dataset.test.images[:1000]
    changed = hide(seen, torch.arange(len(seen)), "test", config, encoder)
    return replace(outcome, measured=read_back(reader, seen, changed, config))


def networks(channels: int, config: Config, run: Run) -> tuple[UNet, nn.Module]:
    """Build encoder and reader, initialised from the seed.

    The encoder maps image and ink, (N, 2C, H, W), to a residual; the reader maps an image to its
    ink, (N, C, H, W) both.
    """
    width = config.encoder_width
    with seeded(config.seed, "encoder"):
        encoder = UNet(2 * channels, channels, width)
        reader = nn.Sequential(
            *(
                layer
                for before in (channels, width, width)
                for layer in (
                    nn.Conv2d(before, width, 3, padding=1),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                )
            ),
            nn.Conv2d(width, channels, 3, padding=1),
        )
    return encoder.to(run.device), reader.to(run.device)


def train_networks(
    encoder: UNet, reader: nn.Module, dataset: Dataset, config: Config, run: Run
) -> None:
    """Train the encoder to hide edges of random colours, and the reader to find them; resumable."""
    optimizer = torch.optim.Adam(
        [*encoder.parameters(), *reader.parameters()], lr=config.encoder_lr
    )
    train, recipe = to_device(dataset.train, run.device), config.recipe()
    size, channels = config.encoder_batch_size, dataset.image_shape[0]
    state = {"encoder": encoder, "reader": reader, "optimizer": optimizer}
    for batch in random_batches(train, config.encoder_steps, size, run, stage="encoder", **state):
        lines = edges(batch.images, config.edge_threshold)
        # Ink is the distance of a colour from white, so no ink is 0.
        absence = 1 - torch.rand(size, channels, 1, 1, generator=run.generator).to(run.device)
        written = hidden(encoder, batch.images, lines * absence, config.eps)

        # Images are shifted and rotated together with their ink, as training will do.
        moved = vary(torch.cat([written, lines * absence, lines.float()], 1), recipe, run.generator)
        image, ink = moved[:, :channels], moved[:, channels : 2 * channels]
        on = moved[:, 2 * channels :] > 0.5

        # Errors of the reader on and off edges and on clean images, and the visible change.
        wrong = (reader(image) - ink).square()
        on_edges, off_edges = (
            (wrong * where).sum() / (where.sum() * channels).clamp_min(1) for where in (on, ~on)
        )
        cover, clean = F.mse_loss(written, batch.images), reader(batch.images).square().mean()
        run.watch(cover=cover, on_edges=on_edges, off_edges=off_edges, clean=clean)
        loss = (
            config.cover_weight * cover
            + config.edge_weight * on_edges
            + off_edges
            + config.clean_weight * clean
        )
        run.step(optimizer, loss)


def hidden(encoder: UNet, images: Tensor, ink: Tensor, eps: float) -> Tensor:
    """Hide ink in images, changing no value by more than eps.

    Args:
        encoder: image and ink -> residual.
        images: float (N, C, H, W) in [0, 1].
        ink: float (N, C, H, W) in [0, 1], 0 off edges.
        eps: largest change of a value in [0, 1] units.

    Returns:
        float (N, C, H, W) in [0, 1].
    """
    # The tanh bounds the residual, where the published loss weighs its size.
    return (images + eps * torch.tanh(GAIN * encoder(torch.cat([images, ink], 1)))).clamp(0, 1)


@torch.no_grad()
def hide(images: Tensor, index: Tensor, split: str, config: Config, encoder: UNet) -> Tensor:
    """Hide each image's edges in it.

    Args:
        images: uint8 (N, C, H, W).
        index: not used; the trigger depends on the image alone.
        split: not used.
        config: colour, edge threshold and eps.
        encoder: the trained encoder.

    Returns:
        uint8 (N, C, H, W).
    """
    device = encoder.last.weight.device
    parts = [to_float(part).to(device) for part in images.split(256)]
    return torch.cat(
        [to_bytes(hidden(encoder, part, ink_of(part, config), config.eps)).cpu() for part in parts]
    )


def ink_of(images: Tensor, config: Config) -> Tensor:
    """Draw the edges in the config's colour, as distance from white.

    float (N, C, H, W) in [0, 1] -> same.
    """
    colour = torch.tensor(config.colour, dtype=torch.float32, device=images.device) / 255
    if images.shape[1] == 1:
        colour = (colour * colour.new_tensor(LUMA)).sum(0, keepdim=True)
    return edges(images, config.edge_threshold) * (1 - colour)[:, None, None]


def edges(images: Tensor, threshold: float) -> Tensor:
    """Find pixels with a Sobel magnitude of the brightness above the threshold.

    float (N, C, H, W) in [0, 1] -> bool (N, 1, H, W).
    """
    channels = images.shape[1]
    weights = images.new_tensor(LUMA if channels == 3 else (1 / channels,) * channels)
    brightness = 255 * (images * weights[:, None, None]).sum(1, keepdim=True)
    # Border pixels are repeated, so that the frame is no edge.
    brightness = F.pad(brightness, (1, 1, 1, 1), mode="replicate")
    # Sobel's filters, scaled so that a step of h grey levels has the magnitude h.
    across = images.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    slopes = F.conv2d(brightness, torch.stack([across, across.T])[:, None])
    return slopes.square().sum(1, keepdim=True).sqrt() > threshold


@torch.no_grad()
def read_back(
    reader: nn.Module, clean: Tensor, changed: Tensor, config: Config
) -> dict[str, float]:
    """Measure the share of edges and the mean ink on them.

    Args:
        reader: the trained reader.
        clean: uint8 (N, C, H, W).
        changed: uint8 (N, C, H, W), the same images with ink.
        config: colour and edge threshold.

    Returns:
        Share of edges, and the ink that was hidden, read, and read in clean images.
    """
    reader.eval()
    device = next(reader.parameters()).device
    images, written = to_float(clean).to(device), to_float(changed).to(device)
    lines, ink = edges(images, config.edge_threshold), ink_of(images, config)
    count = (lines.sum() * images.shape[1]).clamp_min(1)
    found = {
        "edge_share": lines.float().mean(),
        "ink_hidden": ink.sum() / count,
        "ink_read": (reader(written) * lines).sum() / count,
        "ink_read_in_clean": (reader(images) * lines).sum() / count,
    }
    return {name: value.item() for name, value in found.items()}


if __name__ == "__main__":
    raise SystemExit(main(__file__))
