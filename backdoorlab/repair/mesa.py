"""MESA: recover small triggers of a model, for each class a distribution of them.

Defending Neural Backdoors via Generative Distribution Modeling. X. Qiao, Y. Yang, H. Li. NeurIPS
2019. https://arxiv.org/abs/1910.04749

For each class and each level beta, a generator learns as wide a distribution as it can of triggers
that make the model see that class with probability beta: it ascends the mean of min(p_class, beta)
over images, plus alpha times the entropy of its triggers, estimated by MINE. All generators learn
side by side: their layers are one batched product, their images one batch for the model.

Ours, in a section of its own: a picture over the whole image instead of a square, and where a
square is pasted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Split, batches, to_float
from ..perturb import frozen
from ..run import Run
from ..triggers import patch_side
from .every_target import mean_of_others, of_others, parts
from .stacked import Mine, Stacked, StackedNorm

SLICE = 16
"""Numbers of the latent code that enter each of the generator's four layers."""
BANK = 64
"""Triggers kept of each generator."""
TRIALS = 256
"""Least number of images that a generator is judged by. Fewer held-out images are shown several of
its triggers each."""


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """Settings of the recovery. A method inherits these fields, which makes them its flags."""

    trigger: Literal["patch", "blend"] = "patch"
    """What is recovered: a small opaque square, as in the paper, or a faint picture over the whole
    image (ours)."""
    position: Literal["learnt", "random"] = "learnt"
    """Where a square is pasted: anywhere, as in the paper, or where it has worked so far (ours),
    for triggers that work in one place."""
    trigger_size: int | None = None
    """Side of the square in pixels; None is 3 for every 32 pixels of the image."""
    blend_alpha: float = 0.2
    """Share of the picture in the image, with trigger blend; more finds triggers more easily, also
    where there is no backdoor."""
    levels: tuple[float, ...] = (0.5, 0.8, 0.9)
    """beta: probabilities of the class above which a trigger gains nothing more; one generator
    each."""
    search_epochs: int = 10
    """Passes of recovery over the trusted images."""
    search_batch_size: int = 128
    """Images a step of recovery, for each generator."""
    search_lr: float = 2e-4
    """Adam's learning rate of generators and of MINE, betas 0.5 and 0.999."""
    hidden: int = 512
    """Width of the generators and of MINE's networks."""
    entropy: float = 0.1
    """alpha: weight of the entropy; more makes the triggers of a generator more different."""
    noise: float = 0.1
    """Standard deviation of the noise on triggers in training, in pixels of [0, 1]."""

    RANGES: ClassVar[dict[str, str]] = {
        "trigger_size": ">= 1",
        "blend_alpha": "(0, 1]",
        "levels": "(0, 1]",
        "search_epochs": ">= 0",
        "search_batch_size": ">= 2",
        "search_lr": ">= 0",
        "hidden": ">= 1",
        "entropy": ">= 0",
        "noise": ">= 0",
    }


class Generators(nn.Module):
    """`count` generators of MESA: a fourth of the code enters at each of four layers.

    z in [0, 1] (count, n, 4 SLICE) -> triggers in (0, 1) (count, n, outputs).
    """

    def __init__(self, count: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Stacked(count, SLICE + (hidden if i else 0), hidden) for i in range(3)
        )
        self.norms = nn.ModuleList(StackedNorm(count, hidden) for _ in range(3))
        self.last = Stacked(count, SLICE + hidden, outputs)

    def forward(self, z: Tensor) -> Tensor:
        *codes, last = z.split(SLICE, dim=2)
        # Nothing but its part of the code enters the first layer.
        h = z[:, :, :0]
        for code, layer, norm in zip(codes, self.layers, self.norms, strict=True):
            h = F.leaky_relu(norm(layer(torch.cat([h, code], 2))), 0.2)
        return self.last(torch.cat([h, last], 2)).sigmoid()


def recover_triggers(
    model: nn.Module,
    search: Split,
    held_out: Split,
    shape: tuple[int, int, int],
    num_classes: int,
    config: RecoveryConfig,
    run: Run,
) -> dict[str, Tensor]:
    """Recover triggers of every class.

    Args:
        model: in evaluation mode.
        search: images that the generators learn from.
        held_out: images that they are judged by.
        shape: (C, h, w) of a trigger.
        num_classes: K.

    Returns:
        scores (K, levels): share of the held-out images that each generator turns into its class;
        bank (K, levels, BANK, C, h, w): its triggers;
        corners (K, levels, BANK, 2): where they were pasted.
    """
    # One generator for each class and level.
    levels = torch.tensor(config.levels, device=run.device)
    classes = torch.arange(num_classes, device=run.device).repeat_interleave(len(levels))
    count = len(classes)
    generators = Generators(count, math.prod(shape), config.hidden).to(run.device)
    mine = Mine(count, 4 * SLICE, math.prod(shape), config.hidden).to(run.device)
    places = Places(count, search.images.shape[2:], shape[-1], config).to(run.device)

    # Learn, then take of each generator a bank of triggers and judge it by the other images.
    with frozen(model):
        beta = levels.repeat(num_classes)
        learn(model, search, generators, mine, places, classes, beta, shape, config, run)
        generators.eval()
        places.eval()
        with torch.no_grad():
            bank = generators(codes(count, BANK, run)).view(count, BANK, *shape)
            corners = torch.stack([places.draw(torch.full((BANK,), g), run) for g in range(count)])
            scores = [
                hit_rate(model, held_out, bank[g], corners[g], int(classes[g]), config, run)
                for g in range(count)
            ]
    return {
        "scores": torch.stack(scores).view(num_classes, -1),
        "bank": bank.view(num_classes, -1, BANK, *shape),
        "corners": corners.view(num_classes, -1, BANK, 2),
    }


def learn(
    model: nn.Module,
    search: Split,
    generators: Generators,
    mine: Mine,
    places: "Places",
    classes: Tensor,
    beta: Tensor,
    shape: tuple[int, int, int],
    config: RecoveryConfig,
    run: Run,
) -> None:
    """Train the generators, and in turn with them the estimate of their entropy.

    Args:
        classes: int64 (G,), the class that each generator aims at.
        beta: float (G,), its level.
        shape: (C, h, w) of a trigger.
    """
    first, second = (
        torch.optim.Adam(net.parameters(), lr=config.search_lr, betas=(0.5, 0.999))
        for net in (generators, mine)
    )
    state: dict[str, Any] = dict(
        generators=generators, mine=mine, places=places, first=first, second=second
    )

    for _ in run.epochs("recover", config.search_epochs, **state):
        generators.train()
        places.train()
        for batch in batches(
            search, config.search_batch_size, device=run.device, generator=run.generator
        ):
            x, y, size = batch.images, batch.labels, len(batch.labels)
            if size < 2:
                continue  # no batch statistics

            # Generators ascend E[min(p_class, beta)] + alpha H(triggers); the code tells its
            # trigger, so that their mutual information is the entropy.
            z = codes(len(classes), size, run)
            triggers = generators(z)
            hits, pull = reward(model, x, y, triggers, places, classes, beta, shape, config, run)
            entropy = mine.information(z, codes(len(classes), size, run), triggers)
            run.step(first, -(pull * triggers).sum() - config.entropy * entropy.sum())

            # MINE follows the generators that have moved.
            z = codes(len(classes), size, run)
            loss = mine.loss(z, codes(len(classes), size, run), generators(z).detach())
            second.zero_grad(set_to_none=True)
            loss.backward()
            second.step()
            run.watch(hits=hits, entropy=entropy.mean())


def codes(count: int, size: int, run: Run) -> Tensor:
    """(count, size, 4 SLICE): latent codes of `size` triggers a generator, uniform in [0, 1]."""
    return torch.rand(count, size, 4 * SLICE, generator=run.generator).to(run.device)


def reward(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    triggers: Tensor,
    places: "Places",
    classes: Tensor,
    beta: Tensor,
    shape: tuple[int, int, int],
    config: RecoveryConfig,
    run: Run,
) -> tuple[Tensor, Tensor]:
    """Compute how often triggers hit, and the gradient of what they gain.

    The model's passes go in parts, so that memory does not grow with the number of generators.
    Images of a generator's own class do not count.

    Args:
        x, y: images (n, C, H, W) and labels (n,), shown to every generator's triggers.
        triggers: (G, n, D), one for each image.
        classes, beta: (G,), as in `learn`.
        shape: (C, h, w) of a trigger, D numbers.

    Returns:
        share of hits, (); and d sum_g E[min(p_class, beta)] / d triggers, (G, n, D).
    """
    count, n, _ = triggers.shape
    slopes, hits = [], []
    for part in parts(count, n, run.device):
        # Each image with the noisy trigger of each generator of this part.
        leaf = triggers[part].detach().requires_grad_()
        noise = config.noise * torch.randn(leaf.shape, generator=run.generator).to(leaf)
        owners = part.repeat_interleave(n)
        corners = places.draw(owners, run)
        seen = stamp(x.repeat(len(part), 1, 1, 1), (leaf + noise).view(-1, *shape), corners, config)
        with run.autocast():
            logits = model(seen)

        # E[min(p_class, beta)] over the images of other classes.
        wanted = classes[part].repeat_interleave(n)
        counts = of_others(y, classes[part])
        p = logits.float().softmax(1).gather(1, wanted[:, None]).view(len(part), n)
        gained = mean_of_others(torch.minimum(p, beta[part, None]), counts)
        slopes.append(torch.autograd.grad(gained.sum(), leaf)[0])

        places.learn(owners, corners, p.detach().flatten(), counts.flatten())
        hit = (logits.argmax(1) == wanted).view(len(part), n)
        hits.append(mean_of_others(hit, counts))
    return torch.cat(hits).mean(), torch.cat(slopes)


@torch.no_grad()
def hit_rate(
    model: nn.Module,
    held_out: Split,
    triggers: Tensor,
    corners: Tensor,
    target: int,
    config: RecoveryConfig,
    run: Run,
) -> Tensor:
    """Share, (), of the images of other classes that are classified as the target with a trigger.

    Args:
        triggers: (m, C, h, w), of which one is drawn for each image.
        corners: (m, 2), where they are pasted.
    """
    images = to_float(held_out.images[held_out.labels != target]).to(run.device)
    if len(images) == 0:
        return torch.zeros((), device=run.device)

    # Few images are shown several triggers each.
    images = images.repeat(math.ceil(TRIALS / len(images)), 1, 1, 1)
    drawn = torch.randint(len(triggers), (len(images),), generator=run.generator).to(run.device)
    stamped = stamp(images, triggers[drawn], corners[drawn], config)
    with run.autocast():
        logits = torch.cat([model(part) for part in stamped.split(250)])
    return (logits.argmax(1) == target).float().mean()


def stamp(x: Tensor, triggers: Tensor, corners: Tensor, config: RecoveryConfig) -> Tensor:
    """Put a trigger into each image, pasted as a square or blended in.

    Args:
        x: (n, C, H, W) in [0, 1].
        triggers: (n, C, h, w) in [0, 1].
        corners: int64 (n, 2), top and left of a square.
    """
    if config.trigger == "blend":
        return torch.lerp(x, triggers, config.blend_alpha)

    # Rows and columns of each image's own square.
    steps = torch.arange(triggers.shape[-1], device=x.device)
    rows = (corners[:, :1] + steps)[:, None, :, None]
    columns = (corners[:, 1:] + steps)[:, None, None, :]
    images = torch.arange(len(x), device=x.device)[:, None, None, None]
    channels = torch.arange(x.shape[1], device=x.device)[None, :, None, None]
    return x.index_put((images, channels, rows, columns), triggers)


# --- ours: pictures over the whole image, and places that are learnt


def trigger_shape(
    image_shape: tuple[int, int, int], config: RecoveryConfig
) -> tuple[int, int, int]:
    """(C, h, w) of a trigger: a square, or with trigger blend the whole image."""
    channels, height, width = image_shape
    if config.trigger == "blend":
        return image_shape
    size = patch_side(config.trigger_size, 3, height, min(height, width), "trigger_size")
    return channels, size, size


class Places(nn.Module):
    """Where each of `count` squares is pasted.

    Uniformly, or (position learnt) at each place with a probability that grows with the square of
    what it gained there.
    """

    gained: Tensor
    """float (count, places): the average probability of the class with the square there."""

    def __init__(
        self, count: int, image_size: Sequence[int], size: int, config: RecoveryConfig
    ) -> None:
        super().__init__()
        self.learnt = config.position == "learnt" and config.trigger == "patch"
        self.ends = torch.tensor([side - size for side in image_size])
        self.jitter = size // 2
        self.register_buffer("gained", torch.zeros(count, math.prod((self.ends + 1).tolist())))

    def draw(self, owners: Tensor, run: Run) -> Tensor:
        """Draw top and left, int64 (n, 2), for the squares of `owners` (n,). In training a fourth
        is anywhere, the others near places that gain."""
        anywhere = (torch.rand(len(owners), 2, generator=run.generator) * (self.ends + 1)).long()
        if not self.learnt:
            return anywhere.to(run.device)

        # A place by what it gained, moved a little so that its neighbours are tried as well.
        odds = (self.gained.cpu().square() + 1e-12)[owners.cpu()]
        place = torch.multinomial(odds, 1, generator=run.generator).squeeze(1)
        known = torch.stack([place // (self.ends[1] + 1), place % (self.ends[1] + 1)], 1)
        if self.training:
            near = known + torch.randint(
                -self.jitter, self.jitter + 1, known.shape, generator=run.generator
            )
            explore = torch.rand(len(owners), 1, generator=run.generator) < 0.25
            known = torch.where(explore, anywhere, torch.minimum(near.clamp_min(0), self.ends))
        return known.to(run.device)

    @torch.no_grad()
    def learn(self, owners: Tensor, corners: Tensor, p: Tensor, counts: Tensor) -> None:
        """Move the average gain of each square's place a fifth of the way towards p (n,), where
        counts (n,) is 1."""
        # Sums over the squares of this step that lie at the same place.
        across = int(self.ends[1]) + 1
        at = (
            owners.to(corners.device) * self.gained.shape[1]
            + corners[:, 0] * across
            + corners[:, 1]
        )
        sums, seen = (
            torch.zeros(self.gained.numel(), device=p.device)
            .index_add_(0, at, value)
            .view_as(self.gained)
            for value in (p * counts, counts)
        )
        self.gained += 0.2 * torch.where(seen > 0, sums / seen.clamp_min(1) - self.gained, 0)
