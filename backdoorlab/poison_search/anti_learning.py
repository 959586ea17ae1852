"""Anti-learning: DAU's detection, steps 1 to 3 of its algorithm box.

  1. Pool: find a small set that is almost pure poison.
  2. Anti-learning: with the features fixed, the last layer learns all samples but unlearns the
     pool. The poison outside the pool shares its features and is unlearned with it.
  3. Split: a sample is poison if anti-learning took its label from it.

Source, and departures from it: defense/dau.py and docs/methods/dau.md.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Split, to_device
from ..errors import UserError
from ..features import Features, extract
from ..losses import cce, cross_entropy
from ..record import DefenderView
from ..run import Run
from .isolation import isolate
from .pool import Found, SearchConfig, alone, draw, mask, search

AT_ONCE = 20_000
"""Samples on which all heads answer at once; more need more memory."""


@dataclass(frozen=True, kw_only=True)
class AntiLearningConfig(SearchConfig):
    """Settings of detection. A method inherits these fields, which makes them its flags."""

    pool: Literal["bimodal", "isolation", "model_loss"] = "bimodal"
    """How the first poison is found: bimodal: a label whose features fall into two groups (ours);
    isolation: lowest loss after ABL's training; model_loss: lowest loss of the model."""
    pool_rate: float = 0.01
    """|P0| / N of isolation and model_loss. Larger pools lead anti-learning better, where the
    poison is not less than them."""
    isolation_epochs: int = 20
    """Passes of the isolation training."""
    isolation_gamma: float = 0.5
    """gamma: mean loss of a batch below which isolation ascends; 0 is plain cross-entropy."""
    isolation_lr: float = 0.1
    """Learning rate of the isolation training."""
    heads: int = 5
    """Heads trained side by side; their median decides."""
    pool_share: float = 0.5
    """Share of what bimodal found that each head unlearns, drawn for each. Larger ones lead
    anti-learning better and flag more clean samples."""
    alpha1: float = 1.0
    """alpha of anti-learning: weight of learning everything outside the pool."""
    beta1: float = 1000.0
    """beta of anti-learning: weight of unlearning the pool; higher flags more, clean or not."""
    rest_flagged: float = 0.1
    """Largest share of what surely lies in the other group of the pool's label that a head may
    flag. One that flags more is trained again; 1 never is."""
    rest_weight: float = 4.0
    """Weight of learning that other group then. More flags less of it, and less poison."""
    beta1_fallback: float = 99.0
    """beta1 of a second attempt, where the head breaks down at the first."""
    head_lr: float = 0.1
    """Learning rate of the heads, plain SGD."""
    head_lr_decay: bool = True
    """Let it fall linearly to 0 over the passes; the port keeps it constant."""
    head_clip: float | None = 10.0
    """Largest gradient norm of a head. Without it (None, the port) steps at beta1 overshoot."""
    head_batch_size: int = 512
    """Samples a step."""
    head_epochs: int = 30
    """Passes. Few leave clean samples of the label unlearned, many tell the pool from the rest."""
    threshold: float = 0.1
    """Share of the poisoned model's p_y below which the head's flags a sample; more flags more."""
    relative: bool = True
    """False: `threshold` is a probability instead, as in the port (0.0103, its SCE > 20.53)."""
    breakdown: float = 0.3
    """Loss of accuracy on unflagged samples, against the poisoned model, above which a head is
    refused. 1 accepts every split, even one that leaves a label without clean samples."""

    RANGES: ClassVar[dict[str, str]] = {
        "pool_rate": "(0, 1]",
        "isolation_epochs": ">= 0",
        "isolation_lr": ">= 0",
        "heads": ">= 1",
        "pool_share": "(0, 1]",
        "rest_flagged": "[0, 1]",
        "rest_weight": ">= 0",
        "head_lr": ">= 0",
        "head_batch_size": ">= 1",
        "head_epochs": ">= 0",
        "head_clip": "> 0",
        "threshold": "(0, 1)",
    }


def find_poison(
    view: DefenderView,
    config: AntiLearningConfig,
    batch_size: int,
    run: Run,
    found: Found | None = None,
) -> tuple[Tensor, bool]:
    """Find the poison by steps 1 to 3, or by 2 and 3 from a given pool.

    Args:
        batch_size: images a step in the training of `--pool isolation`.
        found: the pool.

    Returns:
        bool (N,) on the CPU, all False where a guard refuses the split; and whether the poison was
        found as images of one class.
    """
    head = linear(view.load_model().get_classifier())
    train = to_device(view.train, run.device)
    features = extract(view.load_model(), train, run)

    # Step 1: the pool.
    if found is None:
        found = find_pool(view, train, features, config, batch_size, run)
    if not found.pool.any():
        run.report_split(found.pool)
        return found.pool, False
    run.report_split(found.pool, "pool")
    # The heads' median hangs less on what is drawn where each has its own part of the pool.
    # Published pools are unlearned whole: nothing is drawn.
    pools = found.pool
    if config.pool == "bimodal":
        pools = draw(found.pool, config.pool_share, config.heads, run)

    # Steps 2 and 3, with a smaller beta where the head breaks down.
    for beta in dict.fromkeys((config.beta1, config.beta1_fallback)):
        log_p = anti_learn(features, pools, head, beta, config, run)
        flagged = lost_label(log_p, features, config)
        if takes_the_rest(flagged, found.rest, config, run):
            weights = torch.where(found.rest, config.rest_weight, 1.0)
            log_p = anti_learn(features, pools, head, beta, config, run, weights)
            flagged = lost_label(log_p, features, config)
        if is_intact(log_p, flagged, beta, features, config, run):
            break
    else:
        flagged = torch.zeros_like(flagged)
        why = "every anti-learned head broke down, so the model is returned as it was"
        run.note(f"no poison found: {why}")
    flagged = unless_emptied(flagged, features, config, run)
    if flagged.any():
        counts = torch.bincount(features.labels[flagged], minlength=view.num_classes).tolist()
        by_label = [f"{label}: {count}" for label, count in enumerate(counts) if count]
        run.note("flagged by label: " + ", ".join(by_label))
    run.report_split(flagged, suspicion=doubt(log_p, features, config))
    return flagged.cpu(), found.one_class


# --- 1. pool


def find_pool(
    view: DefenderView,
    train: Split,
    features: Features,
    config: AntiLearningConfig,
    batch_size: int,
    run: Run,
) -> Found:
    """Find samples that are almost surely poison.

    Args:
        train: the N training samples, on the run's device.
        features: of all of them, by the poisoned model.
        batch_size: images a step in the training of `isolation`.
    """
    if config.pool == "bimodal":
        return search(features, view.num_classes, config, run)

    # Lowest loss, of the poisoned model or of one that was trained for this alone.
    if config.pool == "isolation":
        epochs, lr, gamma = config.isolation_epochs, config.isolation_lr, config.isolation_gamma
        model = isolate(view, train, epochs, batch_size, lr, gamma, run)
        features = extract(model, train, run)
    losses = F.cross_entropy(features.logits, features.labels, reduction="none")
    size = max(1, round(config.pool_rate * len(train)))
    return alone(mask(losses.argsort()[:size], len(train)))


# --- 2. anti-learning


def linear(head: nn.Module) -> nn.Linear:
    """Refuse a last layer that is not linear."""
    if not isinstance(head, nn.Linear):
        raise UserError(f"DAU needs a model that ends in a linear layer, got {type(head).__name__}")
    return head


def anti_learn(
    features: Features,
    pool: Tensor,
    head: nn.Module,
    beta: float,
    config: AntiLearningConfig,
    run: Run,
    weights: Tensor | None = None,
) -> Tensor:
    """Train copies of the model's own head to learn all samples but unlearn the pool.

    Args:
        pool: bool (N,), or (heads, N), one for each head, of one size.
        weights: float (N,), how much each sample outside the pool counts; None: alike.

    Returns:
        log p (N, K), the median over the heads. It is not renormalised over the classes: heads that
        send a sample to different ones leave every median low.
    """
    n, num_classes = features.logits.shape
    head, pool = linear(head), pool.to(features.labels.device).expand(config.heads, -1)
    alpha = config.alpha1 * (torch.ones(n) if weights is None else weights).to(pool.device)
    weight = head.weight.detach().float().expand(config.heads, -1, -1).clone().requires_grad_()
    bias = head.bias.detach().float().expand(config.heads, -1).clone().requires_grad_()

    # A pool smaller than a class is drawn as often as a class.
    share = n / num_classes / int(pool[0].sum())
    odds = torch.where(pool.cpu(), max(1.0, share), 1.0)
    total = config.head_epochs * math.ceil(n / config.head_batch_size)
    done = 0
    for _ in range(config.head_epochs):
        order = torch.multinomial(odds, n, replacement=share > 1, generator=run.generator)
        for index in order.to(pool.device).split(config.head_batch_size, dim=1):
            # alpha CE outside the pool + beta CCE on it, for all heads (h) in one product.
            labels, poisoned = features.labels[index], pool.gather(1, index)
            logits = torch.einsum("hbd,hkd->hbk", features.pooled[index], weight) + bias[:, None]
            losses = (
                alpha[index] * cross_entropy(logits, labels) * ~poisoned
                + beta * cce(logits, labels) * poisoned
            )
            steps = torch.autograd.grad(losses.mean(1).sum(), [weight, bias])

            rate = config.head_lr * (1 - done / total if config.head_lr_decay else 1)
            descend_heads(weight, bias, steps, rate, config.head_clip)
            done += 1

    # In parts, as all heads' answers on all samples may exceed the memory.
    parts = features.pooled.split(AT_ONCE)
    return torch.cat([median_log_p(x, weight.detach(), bias.detach()) for x in parts])


@torch.no_grad()
def descend_heads(
    weight: Tensor, bias: Tensor, steps: tuple[Tensor, ...], rate: float, clip: float | None
) -> None:
    """Move weight (heads, K, D) and bias (heads, K) in place by a step of SGD, each head's gradient
    clipped to the norm `clip`."""
    norm = (steps[0].square().sum((1, 2)) + steps[1].square().sum(1)).sqrt()
    scale = rate * (torch.ones_like(norm) if clip is None else (clip / norm).clamp_max(1))
    weight -= scale[:, None, None] * steps[0]
    bias -= scale[:, None] * steps[1]


def median_log_p(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, K): the median over heads (heads, K, D) of log p on features x (N, D)."""
    heads = zip(weight, bias, strict=True)
    return torch.stack([(x @ w.T + b).log_softmax(1) for w, b in heads]).median(0).values


# --- 3. split


def lost_label(log_p: Tensor, features: Features, config: AntiLearningConfig) -> Tensor:
    """bool (N,): where the anti-learned log p (N, K) gives a sample's own label too little."""
    return doubt(log_p, features, config) > -math.log(config.threshold)


def doubt(log_p: Tensor, features: Features, config: AntiLearningConfig) -> Tensor:
    """float (N,): log of the poisoned model's probability of a sample's label (1 with relative
    False), less the anti-learned head's."""
    before = cross_entropy(features.logits, features.labels) if config.relative else 0
    return -log_p.gather(1, features.labels.unsqueeze(1)).squeeze(1) - before


def takes_the_rest(flagged: Tensor, rest: Tensor, config: AntiLearningConfig, run: Run) -> bool:
    """Whether a head flags, bool (N,), too much of the rest of the pool's label, bool (N,)."""
    if not rest.any():
        return False
    share = flagged[rest.to(flagged.device)].float().mean().item()
    if share <= config.rest_flagged:
        return False
    run.note(
        f"the anti-learned head flags {share:.2f} of the rest of the pool's label, too: it is"
        " trained again, with more weight on that"
    )
    return True


def is_intact(
    log_p: Tensor,
    flagged: Tensor,
    beta: float,
    features: Features,
    config: AntiLearningConfig,
    run: Run,
) -> bool:
    """Check that a head still classifies what it did not flag, bool (N,) False; say where not."""

    def accuracy(logits: Tensor) -> float:
        return (logits.argmax(1) == features.labels)[~flagged].float().mean().item()

    lost = 1.0 if flagged.all() else accuracy(features.logits) - accuracy(log_p)
    if lost > config.breakdown:
        what = f"the anti-learned head loses {lost:.2f} of the accuracy on what it calls clean"
        run.note(f"beta {beta:g}: {what}, so its split is refused")
        return False
    if not flagged.any():
        why = f"at beta {beta:g} the anti-learned head takes no sample's label away"
        run.note(f"no poison found: {why}, so the model is returned as it was")
    return True


def unless_emptied(
    flagged: Tensor, features: Features, config: AntiLearningConfig, run: Run
) -> Tensor:
    """Refuse a split, bool (N,), that leaves a label no clean sample, unless breakdown is 1."""
    emptied = set(features.labels.tolist()) - set(features.labels[~flagged].tolist())
    if not emptied or config.breakdown >= 1:
        return flagged
    what = f"the split would leave {len(emptied)} label(s) without a clean sample"
    run.note(f"{what}: the model is returned as it was")
    return torch.zeros_like(flagged)
