"""BU: backdoor defense by machine unlearning (BAERASER).

Backdoor Defense with Machine Unlearning. Y. Liu, M. Fan, C. Chen, X. Liu, Z. Ma, L. Wang, J. Ma.
INFOCOM 2022. https://arxiv.org/abs/2201.09538 . Its trigger recovery is MESA: Defending Neural
Backdoors via Generative Distribution Modeling. X. Qiao, Y. Yang, H. Li. NeurIPS 2019.
https://arxiv.org/abs/1910.04749

Assumes: the poisoned model and a few trusted images.

  1. Recovery: for each class and each level beta, a generator of small patches learns as wide a
  distribution as it can (entropy,
     estimated by MINE) of patches that make the model see that class with probability beta.
  2. Target: the class whose patches work best on trusted images that were kept apart. 3.
  Unlearning: ascend the loss of images with its patches, descend that of clean images, and hold the
  weights that matter
     for clean images where they were.

Departs from the public code, which cannot run (docs/methods/bu.md lists why): the target is
inferred and not given, all is in pixel space, each image has its own position, images of the target
class are left out, the ascent is capped, and unlearning does not stop at what the true trigger does
on test images: it runs to its end, or with `--stop_asr` looks at recovered triggers on trusted
images. `--trigger blend` is ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split, batches, to_bytes, to_device, to_float
from backdoorlab.errors import UserError
from backdoorlab.perturb import frozen
from backdoorlab.record import DefenderView
from backdoorlab.run import Run
from backdoorlab.triggers import patch_side

ASSUMES = ("model", "trusted")

SLICE = 16
"""Numbers of the latent code that enter each of the generator's four layers."""
BANK = 64
"""Triggers kept of each generator."""
TRIALS = 256
"""Least images that a generator is judged by: fewer held-out ones are shown several of its triggers
each."""
CLOSE = 0.1
"""Margin over the second class below which the result doubts its target."""


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    trigger: Literal["patch", "blend"] = "patch"
    """What is recovered: a small opaque square anywhere, as in the paper, or a faint picture over
    the whole image (ours)."""
    position: Literal["learnt", "random"] = "learnt"
    """Where a square is pasted: anywhere, as in the paper, or where it has worked so far (ours),
    for triggers that work in one place."""
    trigger_size: int | None = None
    """Side of the square in pixels; None is 3 for every 32 pixels of the image."""
    blend_alpha: float = 0.2
    """blend: share of the picture in the image."""
    levels: tuple[float, ...] = (0.5, 0.8, 0.9)
    """beta: probabilities of the class beyond which a trigger is not rewarded; one generator
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
    """alpha: weight of the entropy."""
    noise: float = 0.1
    """Standard deviation of the noise on triggers while they are learnt, in pixels of [0, 1]."""
    held_out: float = 0.2
    """Share of the trusted images that neither recovery nor unlearning trains on."""
    accept: float = 0.5
    """Share of held-out images that a generator's triggers must turn for it to be believed: most of
    them."""
    epochs: int = 10
    """Passes of unlearning over the trusted images."""
    lr: float = 1e-3
    """SGD's learning rate of unlearning."""
    momentum: float = 0.9
    """SGD's momentum."""
    batch_size: int = 128
    """Trusted images a step of unlearning."""
    clean_weight: float = 1.0
    """Weight of the clean loss; the public code has 100, with a rate of 0.0001."""
    ascent_cap: float = -math.log(0.01)
    """Loss of a triggered image at which the ascent stops pushing."""
    penalty: Literal["weighted", "constant"] = "weighted"
    """weighted: |theta - theta0| times the mean |gradient| of the clean loss, anew each epoch.
    constant: the same for all, as in the code."""
    penalty_weight: float | None = None
    """Weight of the penalty; None is 1 (weighted) or 1e-6 (constant)."""
    train_bn: bool = False
    """Batch statistics in unlearning instead of the poisoned model's."""
    stop_asr: float | None = None
    """Share of the held-out images, turned by recovered triggers, at which unlearning ends early;
    None: it does not (docs/methods/bu.md)."""

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
        "held_out": "(0, 1)",
        "accept": "[0, 1]",
        "epochs": ">= 0",
        "lr": ">= 0",
        "momentum": ">= 0",
        "batch_size": ">= 1",
        "clean_weight": ">= 0",
        "penalty_weight": ">= 0",
        "stop_asr": "[0, 1]",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    if not config.levels:
        raise UserError("--levels: expected at least one number in (0, 1], got none")
    model = view.load_model().eval()
    shape = trigger_shape(view.image_shape, config)
    search, held_out = halves(to_device(view.trusted, run.device), view.num_classes, config, run)

    def recover() -> dict[str, Tensor]:
        return recover_triggers(model, search, held_out, shape, view.num_classes, config, run)

    found = run.cached("triggers", recover)
    scores, bank = found["scores"], found["bank"].to(run.device)
    best = scores.amax(1)
    target = int(best.argmax())
    others = best.clone()
    others[target] = -1
    ranking = ", ".join(
        f"{view.class_names[label]} {best[label]:.2f}"
        for label in best.argsort(descending=True).tolist()
    )
    margin = best[target] - others.max()
    run.note(f"recovered triggers turn held-out images into: {ranking} (margin {margin:.2f})")
    run.picture(
        "triggers",
        [
            to_bytes(bank[label, int(scores[label].argmax()), :16])
            for label in range(view.num_classes)
        ],
    )
    if best[target] < config.accept:
        run.note(
            f"no trigger found: none turns {config.accept:g} of the held-out images, so the model"
            " is returned as it was"
        )
        return model
    if margin < CLOSE:
        run.note(
            "another class is as easy a target: these triggers may be any network's weakness rather"
            " than the attacker's"
        )
    accepted = scores[target] >= config.accept
    triggers, corners = (
        tensor[target][accepted].flatten(0, 1) for tensor in (bank, found["corners"].to(run.device))
    )
    return unlearn(model, search, held_out, triggers, corners, target, config, run)


def trigger_shape(image_shape: tuple[int, int, int], config: Config) -> tuple[int, int, int]:
    """(C, h, w) of a trigger."""
    channels, height, width = image_shape
    if config.trigger == "blend":
        return image_shape
    size = patch_side(config.trigger_size, 3, height, min(height, width), "trigger_size")
    return channels, size, size


def halves(trusted: Split, num_classes: int, config: Config, run: Run) -> tuple[Split, Split]:
    """The trusted images to train on, and those kept apart; every class must be there."""
    missing = sorted(set(range(num_classes)) - set(trusted.labels.tolist()))
    if missing:
        raise UserError(
            "BU tries every class as the target and needs trusted images of each, but there is"
            f" none of {missing[:5]}: give more"
        )
    order = torch.randperm(len(trusted), generator=run.generator)
    kept = max(1, round(config.held_out * len(trusted)))
    if len(trusted) - kept < 2:
        raise UserError(
            f"expected at least 3 trusted images, got {len(trusted)}: change --trusted_ratio or"
            " --trusted_count"
        )
    return trusted.subset(order[kept:]), trusted.subset(order[:kept])


def stamp(x: Tensor, triggers: Tensor, corners: Tensor, config: Config) -> Tensor:
    """Images (n, C, H, W) with a trigger each (n, C, h, w), both in [0, 1]: pasted with its corner
    at (n, 2) top and left, or blended in."""
    if config.trigger == "blend":
        return torch.lerp(x, triggers, config.blend_alpha)
    steps = torch.arange(triggers.shape[-1], device=x.device)
    rows, columns = (
        (corners[:, :1] + steps)[:, None, :, None],
        (corners[:, 1:] + steps)[:, None, None, :],
    )
    images, channels = (
        torch.arange(len(x), device=x.device)[:, None, None, None],
        torch.arange(x.shape[1], device=x.device)[None, :, None, None],
    )
    return x.index_put((images, channels, rows, columns), triggers)


# --- 1. recovery


def recover_triggers(
    model: nn.Module,
    search: Split,
    held_out: Split,
    shape: tuple[int, int, int],
    num_classes: int,
    config: Config,
    run: Run,
) -> dict[str, Tensor]:
    """scores (classes, levels): share of the held-out images that each generator turns; its
    triggers in bank (classes, levels, BANK, C, h, w), and where they were pasted in corners
    (classes, levels, BANK, 2).

    All generators learn side by side: their layers are one batched product, their images one batch
    for the model.
    """
    levels = torch.tensor(config.levels, device=run.device)
    classes = torch.arange(num_classes, device=run.device).repeat_interleave(len(levels))
    beta = levels.repeat(num_classes)
    count = len(classes)
    generators = Generators(count, math.prod(shape), config.hidden).to(run.device)
    mine = Mine(count, 4 * SLICE, math.prod(shape), config.hidden).to(run.device)
    optimizers = [
        torch.optim.Adam(net.parameters(), lr=config.search_lr, betas=(0.5, 0.999))
        for net in (generators, mine)
    ]
    places = Places(count, search.images.shape[2:], shape[-1], config).to(run.device)

    def draw(size: int) -> Tensor:
        return torch.rand(count, size, 4 * SLICE, generator=run.generator).to(run.device)

    with frozen(model):
        for _ in run.epochs(
            "recover",
            config.search_epochs,
            generators=generators,
            mine=mine,
            places=places,
            first=optimizers[0],
            second=optimizers[1],
        ):
            generators.train()
            places.train()
            for batch in batches(
                search, config.search_batch_size, device=run.device, generator=run.generator
            ):
                size = len(batch.labels)
                if size < 2:
                    continue  # no batch statistics
                z = draw(size)
                triggers = generators(z)
                hits, pull = reward(
                    model,
                    batch.images,
                    batch.labels,
                    triggers,
                    places,
                    classes,
                    beta,
                    shape,
                    config,
                    run,
                )
                entropy = mine.information(z, draw(size), triggers)
                run.step(optimizers[0], -(pull * triggers).sum() - config.entropy * entropy.sum())
                z = draw(size)
                loss = mine.loss(z, draw(size), generators(z).detach())
                optimizers[1].zero_grad(set_to_none=True)
                loss.backward()
                optimizers[1].step()
                run.watch(hits=hits, entropy=entropy.mean())
        generators.eval()
        places.eval()
        with torch.no_grad():
            bank = generators(draw(BANK)).view(count, BANK, *shape)
            corners = torch.stack([places.draw(torch.full((BANK,), g), run) for g in range(count)])
            scores = torch.stack(
                [
                    hit_rate(model, held_out, bank[g], corners[g], int(classes[g]), config, run)
                    for g in range(count)
                ]
            )
    return {
        "scores": scores.view(num_classes, -1),
        "bank": bank.view(num_classes, -1, BANK, *shape),
        "corners": corners.view(num_classes, -1, BANK, 2),
    }


def reward(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    triggers: Tensor,
    places: "Places",
    classes: Tensor,
    beta: Tensor,
    shape: tuple[int, int, int],
    config: Config,
    run: Run,
) -> tuple[Tensor, Tensor]:
    """Share of hits, and d sum_g E[min(p_class, beta)] / d triggers (G, n, D). Images of a
    generator's own class do not count.

    The model's passes go in parts, so that memory does not grow with the number of generators.
    """
    count, n, _ = triggers.shape
    slopes, hits = [], []
    at_once = max(1, (4096 if run.device.type == "cuda" else 512) // n)
    for part in torch.arange(count).split(at_once):
        leaf = triggers[part].detach().requires_grad_()
        noise = config.noise * torch.randn(leaf.shape, generator=run.generator).to(leaf)
        owners = part.repeat_interleave(n)
        corners = places.draw(owners, run)
        seen = stamp(x.repeat(len(part), 1, 1, 1), (leaf + noise).view(-1, *shape), corners, config)
        with run.autocast():
            logits = model(seen)
        wanted = classes[part].repeat_interleave(n)
        counts = (y.repeat(len(part)) != wanted).float().view(len(part), n)
        p = logits.float().softmax(1).gather(1, wanted[:, None]).view(len(part), n)
        gained = (torch.minimum(p, beta[part, None]) * counts).sum(1) / counts.sum(1).clamp_min(1)
        slopes.append(torch.autograd.grad(gained.sum(), leaf)[0])
        places.learn(owners, corners, p.detach().flatten(), counts.flatten())
        hits.append(
            ((logits.argmax(1) == wanted).view(len(part), n) * counts).sum(1)
            / counts.sum(1).clamp_min(1)
        )
    return torch.cat(hits).mean(), torch.cat(slopes)


@torch.no_grad()
def hit_rate(
    model: nn.Module,
    held_out: Split,
    triggers: Tensor,
    corners: Tensor,
    target: int,
    config: Config,
    run: Run,
) -> Tensor:
    """Share of the images of other classes that triggers (m, C, h, w) at corners (m, 2), drawn at
    random, turn into the target."""
    images = to_float(held_out.images[held_out.labels != target]).to(run.device)
    if len(images) == 0:
        return torch.zeros((), device=run.device)
    images = images.repeat(math.ceil(TRIALS / len(images)), 1, 1, 1)
    drawn = torch.randint(len(triggers), (len(images),), generator=run.generator).to(run.device)
    with run.autocast():
        logits = torch.cat(
            [
                model(part)
                for part in stamp(images, triggers[drawn], corners[drawn], config).split(250)
            ]
        )
    return (logits.argmax(1) == target).float().mean()


class Places(nn.Module):
    """Where each of `count` squares is pasted: uniformly, or at each place as often as the square
    of what it gained there."""

    gained: Tensor

    def __init__(self, count: int, image_size: Sequence[int], size: int, config: Config) -> None:
        super().__init__()
        self.learnt = config.position == "learnt" and config.trigger == "patch"
        self.ends = torch.tensor([side - size for side in image_size])
        self.jitter = size // 2
        self.register_buffer("gained", torch.zeros(count, math.prod((self.ends + 1).tolist())))

    def draw(self, owners: Tensor, run: Run) -> Tensor:
        """int64 (n, 2), top and left, for the squares of `owners` (n,). In training a fourth is
        anywhere, the others near what is known."""
        anywhere = (torch.rand(len(owners), 2, generator=run.generator) * (self.ends + 1)).long()
        if not self.learnt:
            return anywhere.to(run.device)
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
        """Move the average gain of each square's place a fifth towards p (n,), where counts (n,) is
        1."""
        at = (
            owners.to(corners.device) * self.gained.shape[1]
            + corners[:, 0] * (int(self.ends[1]) + 1)
            + corners[:, 1]
        )
        sums, seen = (
            torch.zeros(self.gained.numel(), device=p.device)
            .index_add_(0, at, value)
            .view_as(self.gained)
            for value in (p * counts, counts)
        )
        self.gained += 0.2 * torch.where(seen > 0, sums / seen.clamp_min(1) - self.gained, 0)


class Stacked(nn.Module):
    """`count` linear layers side by side. (count, n, inputs) -> (count, n, outputs)."""

    def __init__(self, count: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(count, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class StackedNorm(nn.Module):
    """Batch normalisation of `count` layers side by side. (count, n, width) -> the same."""

    mean: Tensor
    variance: Tensor

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.scale, self.shift = (
            nn.Parameter(torch.ones(count, 1, width)),
            nn.Parameter(torch.zeros(count, 1, width)),
        )
        self.register_buffer("mean", torch.zeros(count, 1, width))
        self.register_buffer("variance", torch.ones(count, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.mean, self.variance
        if self.training:
            variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
            with torch.no_grad():
                self.mean.lerp_(mean, 0.1)
                self.variance.lerp_(variance * x.shape[1] / (x.shape[1] - 1), 0.1)
        return (x - mean) * (variance + 1e-5).rsqrt() * self.scale + self.shift


class Generators(nn.Module):
    """MESA's generators: a fourth of the code enters at each of four layers. z in [0, 1] (count, n,
    64) -> triggers in (0, 1) (count, n, outputs)."""

    def __init__(self, count: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Stacked(count, SLICE + (hidden if i else 0), hidden) for i in range(3)
        )
        self.norms = nn.ModuleList(StackedNorm(count, hidden) for _ in range(3))
        self.last = Stacked(count, SLICE + hidden, outputs)

    def forward(self, z: Tensor) -> Tensor:
        *codes, last = z.split(SLICE, dim=2)
        h = z[:, :, :0]
        for code, layer, norm in zip(codes, self.layers, self.norms, strict=True):
            h = F.leaky_relu(norm(layer(torch.cat([h, code], 2))), 0.2)
        return self.last(torch.cat([h, last], 2)).sigmoid()


class Mine(nn.Module):
    """Mutual information of two variables, estimated by a network (Belghazi et al., ICML 2018):
    `count` estimates side by side."""

    average: Tensor

    def __init__(self, count: int, first: int, second: int, hidden: int) -> None:
        super().__init__()
        self.joint, self.middle, self.last = (
            Stacked(count, first + second, hidden),
            Stacked(count, hidden, hidden),
            Stacked(count, hidden, 1),
        )
        self.register_buffer("average", torch.ones(count))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """T(a, b): (count, n, first), (count, n, second) -> (count, n)."""
        h = F.leaky_relu(self.joint(torch.cat([a, b], 2)), 0.2)
        return self.last(F.leaky_relu(self.middle(h), 0.2)).squeeze(2)

    def information(self, a: Tensor, other: Tensor, b: Tensor) -> Tensor:
        """(count,) in nats: mean T on pairs less log mean exp T on pairs of `b` with an `other`,
        independent draw of a."""
        return self(a, b).mean(1) - (self(other, b).logsumexp(1) - math.log(b.shape[1]))

    def loss(self, a: Tensor, other: Tensor, b: Tensor) -> Tensor:
        """What training descends: the estimate's gradient with the mean of exp T averaged over
        steps, which removes its bias."""
        free = self(other, b).exp().mean(1)
        with torch.no_grad():
            self.average.lerp_(free, 0.01)
        return -(self(a, b).mean(1) - free / self.average).sum()


# --- 3. unlearning


def unlearn(
    model: nn.Module,
    search: Split,
    held_out: Split,
    triggers: Tensor,
    corners: Tensor,
    target: int,
    config: Config,
    run: Run,
) -> nn.Module:
    """Ascend on the triggered images of other classes, descend on clean ones, within the
    penalty."""
    weights = list(model.parameters())
    # No two batches have as many triggered images, and each new size would be tuned anew
    torch.backends.cudnn.benchmark = False
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.SGD(weights, lr=config.lr, momentum=config.momentum, fused=True)
    weight_of_penalty = (
        config.penalty_weight
        if config.penalty_weight is not None
        else {"weighted": 1.0, "constant": 1e-6}[config.penalty]
    )
    for _ in run.epochs("unlearn", config.epochs, model=model, optimizer=optimizer):
        model.eval()
        matters = (
            importance(model, search, config, run)
            if config.penalty == "weighted"
            else [torch.ones_like(w) for w in weights]
        )
        model.train(config.train_bn)
        for batch in batches(search, config.batch_size, device=run.device, generator=run.generator):
            other = batch.labels != target
            drawn = torch.randint(len(triggers), (len(batch.labels),), generator=run.generator).to(
                run.device
            )
            seen = stamp(batch.images, triggers[drawn], corners[drawn], config)[other]
            with run.autocast():
                clean, triggered = (
                    model(torch.cat([batch.images, seen])).float().split([len(other), len(seen)])
                )
            learned = F.cross_entropy(clean, batch.labels)
            wanted = torch.full((len(seen),), target, device=run.device)
            forgotten = F.cross_entropy(triggered, wanted, reduction="none").clamp_max(
                config.ascent_cap
            ).sum() / max(1, len(seen))
            moved = sum(
                (
                    (m * (w - b).abs()).sum()
                    for m, w, b in zip(matters, weights, before, strict=True)
                ),
                torch.zeros((), device=run.device),
            )
            run.step(
                optimizer, config.clean_weight * learned - forgotten + weight_of_penalty * moved
            )
            run.watch(learned=learned, forgotten=forgotten, moved=moved)
        model.eval()
        left = hit_rate(model, held_out, triggers, corners, target, config, run).item()
        run.log(left=left)
        if config.stop_asr is not None and left <= config.stop_asr:
            run.end_stage()
    return model


def importance(model: nn.Module, search: Split, config: Config, run: Run) -> list[Tensor]:
    """omega: for each weight the mean over batches of |d clean loss / d weight|."""
    weights = list(model.parameters())
    sums, count = [torch.zeros_like(weight) for weight in weights], 0
    for batch in batches(search, config.batch_size, device=run.device):
        with run.autocast():
            logits = model(batch.images)
        for total, slope in zip(
            sums,
            torch.autograd.grad(F.cross_entropy(logits.float(), batch.labels), weights),
            strict=True,
        ):
            total += slope.abs()
        count += 1
    return [total / count for total in sums]


if __name__ == "__main__":
    raise SystemExit(main(__file__))
