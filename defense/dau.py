"""DAU: backdoor defense via Decoupled Adversarial Unlearning.

Z. Zhu, Machine Intelligence Laboratory, Harbin Institute of Technology (Shenzhen), 2025. No paper body is public: the
losses, the split rule and the constants are those of the author's MindSpore port, examples/community/DAU in
https://github.com/mindspore-ai/mindarmour; https://github.com/MiLab-HITSZ/DAU holds a README.

Assumes: the poisoned training set and the model trained on it. No clean image, no oracle.

  1. Pool: a small set that is almost pure poison.
  2. Anti-learning: with the features fixed, the last layer learns all samples but unlearns the pool. The poison outside
     the pool shares its features and is unlearned with it.
  3. Split: a sample is poison if anti-learning took its label from it.
  4. Unlearning: from the poisoned model, learn the clean part and unlearn the poisoned part with CCE.

Departs from the port, with reasons and effects in docs/methods/dau.md:
  - The port draws its pool from the true poison; `isolation` is the pre-filter that its configuration describes,
    `bimodal` (the default) is ours, because isolation with a fixed schedule does not find every trigger.
  - Anti-learning runs on cached evaluation-mode features, so that the extractor really is fixed; it takes the median of
    several heads, because one is noisy, and clips their gradients, because at beta = 1000 the first steps overshoot.
  - What anti-learning took is measured against the poisoned model's own belief, not by a fixed 1 %, which hard clean
    samples fail from the start.
  - CCE is computed from logits, unclamped: clamped probabilities have no gradient exactly where the backdoor is intact.
  - A pool is never larger than half of the cluster it is drawn from, the ascent in `both` is bounded, and two guards
    return the model unharmed where no poison shows or the anti-learned head breaks down.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import Split, batches, place
from backdoorlab.errors import UserError
from backdoorlab.features import Features, extract
from backdoorlab.models import Classifier
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train")

UNIFORM = 5 / 9
"""Sarle's coefficient of the uniform distribution: beyond it two groups are plain."""


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    subtask: Literal["all", "anti_learning", "unlearning", "test"] = "all"
    """anti_learning stops once the split is written, unlearning goes on from it, test only scores the saved model."""
    pool: Literal["bimodal", "isolation", "model_loss"] = "bimodal"
    """How the first poison is found: a label whose features fall in two (ours), early learning (ABL), lowest loss."""
    pool_rate: float = 0.01
    """|P0| / N: larger pools lead the head better, but soon hold what should be found."""
    bimodality: float = 0.45
    """Sarle's coefficient above which a label's features may be two groups (1/3 normal, 5/9 uniform, 1 two points)."""
    outlying: float = 3.0
    """Robust standard deviations by which a poisoned label's group must mix more classes than the groups of the other labels."""
    trim: float = 0.2
    """Share of the poisoned group, nearest to the other group, that the pool is not drawn from."""
    isolation_epochs: int = 20
    """Length of the isolation training."""
    isolation_gamma: float = 0.5
    """gamma: loss below which isolation ascends; 0 is plain cross-entropy."""
    isolation_lr: float = 0.1
    """Learning rate of the isolation training."""
    heads: int = 5
    """Heads trained side by side; their median decides."""
    alpha1: float = 1.0
    """alpha of anti-learning: weight of learning everything outside the pool."""
    beta1: float = 1000.0
    """beta of anti-learning: weight of unlearning the pool; higher finds more poison and forgives less impurity."""
    beta1_fallback: float = 99.0
    """beta that is tried where the head breaks down at beta1."""
    head_lr: float = 0.1
    """Learning rate of the heads, plain SGD, falling linearly to 0."""
    head_clip: float | None = 10.0
    """Largest gradient norm of a head; None is the port's. At beta1 the first steps overshoot and take the label's clean samples along."""
    head_batch_size: int = 512
    """Samples a step."""
    head_epochs: int = 10
    """Passes; many more let the head tell the pool from the other poison."""
    threshold: float = 0.1
    """A sample is poison where the head gives its label less than this ..."""
    relative: bool = True
    """... share of what the poisoned model gave it. False: less than this probability, as in the port (0.0103, its SCE > 20.53)."""
    breakdown: float = 0.3
    """Loss of accuracy on unflagged samples, against the poisoned model, at which a head is refused."""
    loss: Literal["cce", "both", "gga"] = "cce"
    """Unlearning loss: cce, gga (gradient ascent), or both = cce + tau gga."""
    alpha2: float = 1.0
    """alpha of unlearning: weight of the clean part."""
    beta2: float = 1.0
    """beta of unlearning: weight of the poisoned part."""
    tau: float = 0.2
    """tau: share of ascent in `both`."""
    ascent_cap: float | None = -math.log(0.0103)
    """Cross-entropy at which the ascent of `both` stops pushing; None never stops, as in the port."""
    epochs: int = 20
    """Passes of unlearning."""
    lr: float = 1e-4
    """Learning rate of unlearning."""
    lr_decay: bool = False
    """Let it fall linearly to 0 over the unlearning: a large rate ends where its last step happened to lead."""
    momentum: float = 0.9
    """SGD's momentum in unlearning."""
    weight_decay: float = 5e-4
    """L2 penalty in unlearning."""
    batch_size: int = 128
    """Images a step in unlearning."""

    RANGES: ClassVar[dict[str, str]] = {
        "pool_rate": "(0, 1]",
        "trim": "[0, 1)",
        "isolation_epochs": ">= 0",
        "isolation_lr": ">= 0",
        "heads": ">= 1",
        "head_lr": ">= 0",
        "head_batch_size": ">= 1",
        "head_epochs": ">= 0",
        "head_clip": "> 0",
        "threshold": "(0, 1)",
        "epochs": ">= 0",
        "lr": ">= 0",
        "momentum": ">= 0",
        "weight_decay": ">= 0",
        "batch_size": ">= 1",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module | None:
    def split() -> dict[str, Tensor]:
        if config.subtask == "unlearning":
            raise UserError("--subtask unlearning starts from a split, and there is none yet: run --subtask anti_learning first")
        return {"flagged": find_poison(view, config, run)}

    flagged = run.once("split", split)["flagged"]
    if config.subtask == "anti_learning":
        return None
    if not flagged.any():
        return view.model
    return unlearn(view, flagged, config, run)


def find_poison(view: DefenderView, config: Config, run: Run) -> Tensor:
    """Steps 1 to 3: bool (N,), True for what is taken to be poison; all False where a guard says so."""
    model, train = view.model, place(view.train, run.device)
    features = extract(model, train, run)
    pool = find_pool(view, model, train, features, config, run)
    nothing = torch.zeros(len(train), dtype=torch.bool)
    if not pool.any():
        run.report_split(nothing)
        return nothing
    run.report_split(pool, "pool")

    for beta in dict.fromkeys((config.beta1, config.beta1_fallback)):
        log_p = anti_learn(features, pool, model.get_classifier(), beta, config, run)
        flagged = lost_label(log_p, features, config)
        lost = accuracy(features.logits, features.labels, ~flagged) - accuracy(log_p, features.labels, ~flagged)
        if flagged.all() or lost <= config.breakdown:
            break
        run.note(f"beta {beta:g}: the anti-learned head loses {lost:.2f} of the accuracy on what it calls clean, so its split is refused")
    else:
        flagged = torch.zeros_like(flagged)
        run.note("no poison found: every anti-learned head broke down, so the model is returned as it was")
    remaining = set(features.labels[~flagged].tolist())
    if flagged.any() and len(remaining) < view.num_classes:
        run.note(f"the split would leave {view.num_classes - len(remaining)} label(s) without a clean sample: the model is returned as it was")
        flagged = torch.zeros_like(flagged)
    if flagged.any():
        counts = torch.bincount(features.labels[flagged], minlength=view.num_classes).tolist()
        run.note("flagged by label: " + ", ".join(f"{label}: {count}" for label, count in enumerate(counts) if count))
    run.report_split(flagged, suspicion=doubt(log_p, features, config))
    return flagged.cpu()


def lost_label(log_p: Tensor, features: Features, config: Config) -> Tensor:
    """Step 3: bool (N,), where the anti-learned log p (N, K) gives a sample's own label too little."""
    return doubt(log_p, features, config) > -math.log(config.threshold)


def doubt(log_p: Tensor, features: Features, config: Config) -> Tensor:
    """float (N,): how much less, as a log, the anti-learned head believes in a sample's label than the poisoned model did."""
    before = cross_entropy(features.logits, features.labels) if config.relative else 0
    return cross_entropy(log_p, features.labels) - before


def accuracy(logits: Tensor, labels: Tensor, among: Tensor) -> float:
    """Share of the samples in the bool mask `among` that get their label."""
    return (logits.argmax(1) == labels)[among].float().mean().item()


# --- 1. pool -----------------------------------------------------------------------------------------------------


def find_pool(view: DefenderView, model: Classifier, train: Split, features: Features, config: Config, run: Run) -> Tensor:
    """bool (N,): at most pool_rate N samples that are almost surely poison; none where no label looks poisoned."""
    size = max(1, round(config.pool_rate * len(train)))
    if config.pool == "bimodal":
        return bimodal_pool(features, size, view.num_classes, config, run)
    if config.pool == "isolation":
        model = isolate(view, train, config, run)
        features = extract(model, train, run)
    losses = F.cross_entropy(features.logits, features.labels, reduction="none")
    return _mask(losses.argsort()[:size], len(train))


def bimodal_pool(features: Features, size: int, num_classes: int, config: Config, run: Run) -> Tensor:
    """Ours. A label given to two kinds of images has features in two groups; the group that mixes several classes is poison."""
    members = [(features.labels == label).nonzero().squeeze(1) for label in range(num_classes)]
    along = [first_component(features.pooled[index]) for index in members]
    bimodality = torch.tensor([sarle(x) for x in along])
    halves = []
    for label, (index, x) in enumerate(zip(members, along, strict=True)):
        upper = two_means(x)
        mixed = ((mixture(features.early, index[half], features.labels, label), half) for half in (upper, ~upper))
        halves.append(sorted(mixed, key=lambda pair: -pair[0]))
    outlying = outlyingness(torch.tensor([most for (most, _), _ in halves]))
    suspicious = (bimodality > config.bimodality) & (outlying > config.outlying)
    if (bimodality > UNIFORM).sum() > num_classes // 2:
        suspicious = bimodality > UNIFORM  # all-to-all: each label has the images of one other class, so nothing is mixed
    chosen = []
    for label in range(num_classes):
        (most, half), (least, other) = halves[label]
        if suspicious[label] or bimodality[label] > UNIFORM:
            verdict = "the first is taken for poison" if suspicious[label] else "no more than in other labels, so these are taken for two styles"
            run.note(
                f"label {label} has features in two groups (bimodality {bimodality[label]:.2f}) of {int(half.sum())} and {int(other.sum())} samples,"
                f" which mix {most:.2f} and {least:.2f} of the other classes ({outlying[label]:.1f} deviations from the other labels): {verdict}"
            )
        if suspicious[label]:
            apart = (along[label][half] - along[label][other].mean()).abs()
            chosen.append(members[label][half][apart >= apart.quantile(config.trim)])
    if not chosen:
        run.note("no poison found: no label has a group that mixes other classes' images, so the model is returned as it was")
        return torch.zeros(len(features.labels), dtype=torch.bool)
    found = torch.cat(chosen)
    # Drawn at random: the most extreme ones would be purer, but unlike the rest. Half of the group stays out, to be found.
    drawn = torch.randperm(len(found), generator=run.generator)[: min(size, max(1, len(found) // 2))].to(found.device)
    return _mask(found[drawn], len(features.labels))


def outlyingness(x: Tensor) -> Tensor:
    """(n,): distance from the median in robust standard deviations (1.4826 times the median absolute deviation, at least 0.02)."""
    apart = x - x.median()
    return apart / (1.4826 * apart.abs().median()).clamp_min(0.02)


def first_component(x: Tensor) -> Tensor:
    """(n, D) -> (n,): coordinates along the direction of largest variance."""
    if len(x) == 0:
        return x.new_zeros(0, dtype=torch.float64)
    x = x.double() - x.double().mean(0)
    return x @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -1]


def sarle(x: Tensor) -> float:
    """Sarle's bimodality coefficient (skewness^2 + 1) / kurtosis: 1 for two points, 5/9 uniform, 1/3 normal."""
    if len(x) < 4:
        return 0.0
    x = x - x.mean()
    variance = x.square().mean()
    if variance <= 0:
        return 0.0
    skewness, kurtosis = (x**3).mean() / variance**1.5, (x**4).mean() / variance**2
    return ((skewness.square() + 1) / kurtosis).item()


def two_means(x: Tensor) -> Tensor:
    """bool (n,): the upper of the two groups with the least squared distance to their means, exactly (one dimension)."""
    ordered = x.sort().values
    n = len(x)
    below = torch.arange(1, n, device=x.device)
    sums = ordered.cumsum(0)
    between = sums[:-1].square() / below + (sums[-1] - sums[:-1]).square() / (n - below)
    return x > ordered[between.argmax()]


def mixture(x: Tensor, group: Tensor, labels: Tensor, label: int) -> float:
    """How many classes a group of one label holds: about 0 for one class, 1 for all the others.

    x: (N, D) features; group: int64 index of the group; labels: (N,). The spread of the group along the directions
    that tell the *other* labels apart, against its spread along all further directions, both in units of the other labels'
    within-class spread. A trigger that shifts or shrinks the features of its images changes neither ratio.
    """
    x = (x.double() - x.double().mean(0)) / x.double().std(0).clamp_min(1e-6)
    others = [x[labels == other] for other in labels.unique().tolist() if other != label]
    telling = min(len(others) - 1, x.shape[1] // 2)
    if telling < 1 or len(group) < 3:
        return 0.0
    means = torch.stack([part.mean(0) for part in others])
    residuals = torch.cat([part - mean for part, mean in zip(others, means, strict=True)])
    within = residuals.T @ residuals / len(residuals)
    within += 1e-2 * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype, device=within.device)
    values, vectors = torch.linalg.eigh(within)
    whiten = vectors / values.sqrt()
    _, strengths, directions = torch.linalg.svd((means - means.mean(0)) @ whiten, full_matrices=True)
    spread = (x[group] @ whiten @ directions.T).var(0)
    between = strengths[:telling].square().sum() / len(others)
    return ((spread[:telling] / spread[len(others) - 1 :].median() - 1).sum() / between).item()


def isolate(view: DefenderView, train: Split, config: Config, run: Run) -> Classifier:
    """ABL's isolation (Li et al., NeurIPS 2021): train from scratch, ascending on samples whose loss is below gamma."""
    model = view.new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=config.isolation_lr, momentum=0.9, weight_decay=5e-4, fused=True)
    for _ in run.epochs("isolate", config.isolation_epochs, isolated=model, optimizer=optimizer):
        model.train()
        for batch in batches(train, config.batch_size, device=run.device, generator=run.generator, augment=view.augment, drop_last=True):
            with run.autocast():
                logits = model(batch.images)
            losses = F.cross_entropy(logits.float(), batch.labels, reduction="none")
            run.step(optimizer, (losses.detach() - config.isolation_gamma).sign().mul(losses).mean())
    return model


# --- 2. anti-learning --------------------------------------------------------------------------------------------


def anti_learn(features: Features, pool: Tensor, head: nn.Module, beta: float, config: Config, run: Run) -> Tensor:
    """log p (N, K): the median over heads that start as the model's own, learn the samples outside the pool and unlearn the pool."""
    if not isinstance(head, nn.Linear):
        raise UserError(f"DAU needs a model that ends in a linear layer, got {type(head).__name__}")
    n, num_classes = features.logits.shape
    pool = pool.to(features.labels.device)
    weight = head.weight.detach().float().expand(config.heads, -1, -1).clone().requires_grad_()
    bias = head.bias.detach().float().expand(config.heads, -1).clone().requires_grad_()
    share = n / num_classes / int(pool.sum())  # the pool gets the mass of one class
    odds = torch.where(pool.cpu(), max(1.0, share), 1.0).expand(config.heads, -1)
    total = config.head_epochs * math.ceil(n / config.head_batch_size)
    done = 0
    for _ in range(config.head_epochs):
        order = torch.multinomial(odds, n, replacement=True, generator=run.generator).to(features.labels.device)
        for index in order.split(config.head_batch_size, dim=1):
            labels, poisoned = features.labels[index], pool[index]
            logits = torch.einsum("hbd,hkd->hbk", features.pooled[index], weight) + bias[:, None]
            losses = config.alpha1 * cross_entropy(logits, labels) * ~poisoned + beta * cce(logits, labels) * poisoned
            steps = torch.autograd.grad(losses.mean(1).sum(), [weight, bias])
            with torch.no_grad():
                norm = (steps[0].square().sum((1, 2)) + steps[1].square().sum(1)).sqrt()
                clipped = torch.ones_like(norm) if config.head_clip is None else (config.head_clip / norm).clamp_max(1)
                scale = config.head_lr * (1 - done / total) * clipped
                weight -= scale[:, None, None] * steps[0]
                bias -= scale[:, None] * steps[1]
            done += 1
    with torch.no_grad():
        found = [(features.pooled @ w.T + b).log_softmax(1) for w, b in zip(weight, bias, strict=True)]
        return torch.stack(found).median(0).values


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p_y for each sample. (..., K), (...) -> (...)."""
    return logits.logsumexp(-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def cce(logits: Tensor, labels: Tensor) -> Tensor:
    """-log(1 - p_y) for each sample: complementary cross-entropy, pushing hardest where the label is believed most. (..., K), (...) -> (...)."""
    others = logits.scatter(-1, labels.unsqueeze(-1), -math.inf)
    return logits.logsumexp(-1) - others.logsumexp(-1)


# --- 4. unlearning -----------------------------------------------------------------------------------------------


def unlearn(view: DefenderView, flagged: Tensor, config: Config, run: Run) -> nn.Module:
    model, train, flagged = view.model, place(view.train, run.device), flagged.to(run.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
    steps = config.epochs * math.ceil(len(train) / config.batch_size)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0 if config.lr_decay else 1.0, total_iters=max(1, steps))
    for _ in run.epochs("unlearn", config.epochs, model=model, optimizer=optimizer, scheduler=scheduler):
        model.train()
        for batch in batches(train, config.batch_size, device=run.device, generator=run.generator, augment=view.augment):
            with run.autocast():
                logits = model(batch.images)
            run.step(optimizer, unlearning_loss(logits.float(), batch.labels, flagged[batch.index], config))
            scheduler.step()
    return model


def unlearning_loss(logits: Tensor, labels: Tensor, poisoned: Tensor, config: Config) -> Tensor:
    """alpha CE on the clean part plus beta times the unlearning loss on the poisoned part, both over the whole batch."""
    learned = cross_entropy(logits, labels)
    if config.loss == "gga":
        unlearned = -learned
    elif config.loss == "both":
        ascent = learned if config.ascent_cap is None else learned.clamp_max(config.ascent_cap)
        unlearned = cce(logits, labels) - config.tau * ascent
    else:
        unlearned = cce(logits, labels)
    return torch.where(poisoned, config.beta2 * unlearned, config.alpha2 * learned).mean()


def _mask(index: Tensor, size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[index.cpu()] = True
    return mask


if __name__ == "__main__":
    raise SystemExit(main(__file__))
