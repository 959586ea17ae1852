"""DAU: backdoor defense via Decoupled Adversarial Unlearning.

Z. Zhu, Machine Intelligence Laboratory, Harbin Institute of Technology (Shenzhen), 2025. No paper
body is public: the losses, the split rule and the constants are those of the author's MindSpore
port, examples/community/DAU in https://github.com/mindspore-ai/mindarmour;
https://github.com/MiLab-HITSZ/DAU holds a README.

Assumes: the poisoned training set and the model trained on it. No clean image, no oracle.

  1. Pool: find a small set that is almost pure poison.
  2. Anti-learning: with the features fixed, the last layer learns all samples but unlearns the
     pool. The poison outside the pool shares its features and is unlearned with it.
  3. Split: a sample is poison if anti-learning took its label from it.
  4. Unlearning: from the poisoned model, learn the clean part and unlearn the poisoned part by CCE.
  5. Recovery (ours, off by default): learn the poisoned part with the labels that the unlearned
     model reads in it once the trigger's common shift is removed.

Departs from the port, with reasons and effects in docs/methods/dau.md:
  - The port draws its pool from the true poison. Ours is searched for (poison_search.py).
  - Anti-learning runs on cached evaluation-mode features. The median of several heads decides,
    because one is noisy; their gradients are clipped, because at beta = 1000 they overshoot.
  - What anti-learning took is measured against the poisoned model's own probability, not by a fixed
    1 %, which hard clean samples fail from the start.
  - CCE is computed from logits, unclamped: clamped probabilities have no gradient exactly where the
    backdoor is intact. The ascent in `both` is bounded.
  - Guards return the model unchanged where no poison shows or the anti-learned head breaks down.
  - Unlearning crops and flips images as ordinary training does; `--augment False` is the port's.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import NO_AUGMENT, Split, batches, to_device
from backdoorlab.engine import Forward
from backdoorlab.errors import UserError
from backdoorlab.features import Features, adapted, extract, predictions
from backdoorlab.models import paused
from backdoorlab.poison_search import SearchConfig, find_pool
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "train")

AT_ONCE = 20_000
"""Samples on which all heads answer at once; more need more memory."""
STAYED = 0.5
"""Share of flagged samples that keep their label after unlearning, above which a note says so."""


@dataclass(frozen=True, kw_only=True)
class Config(SearchConfig, DefenseConfig):
    subtask: Literal["all", "anti_learning", "unlearning", "test"] = "all"
    """anti_learning ends with the split, unlearning starts at it, test scores the saved model."""
    heads: int = 5
    """Heads trained side by side; their median decides."""
    alpha1: float = 1.0
    """alpha of anti-learning: weight of learning everything outside the pool."""
    beta1: float = 1000.0
    """beta of anti-learning: weight of unlearning the pool; higher flags more, clean or not."""
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
    loss: Literal["cce", "both", "gga"] = "cce"
    """Unlearning loss: cce, gga (gradient ascent), or both = cce + tau gga."""
    alpha2: float = 1.0
    """alpha of unlearning: weight of the clean part."""
    beta2: float = 1.0
    """beta of unlearning: weight of the poisoned part."""
    tau: float = 0.2
    """tau: share of ascent in `both`."""
    ascent_cap: float | None = -math.log(0.0103)
    """Cross-entropy at which the ascent of `both` ends; None, as in the port, never ends it."""
    epochs: int = 20
    """Passes of unlearning."""
    lr: float = 1e-4
    """Learning rate of unlearning."""
    lr_decay: bool = False
    """Let it fall linearly to 0: with a large constant rate the result depends on the last step."""
    momentum: float = 0.9
    """SGD's momentum in unlearning."""
    weight_decay: float = 5e-4
    """L2 penalty in unlearning."""
    batch_size: int = 128
    """Images a step of unlearning, recovery and isolation."""
    augment: bool = True
    """Crop and flip images in unlearning and recovery as in ordinary training; the port: False."""
    recovery_epochs: int = 0
    """Passes of recovery (ours): flagged samples are learned with the labels that the unlearned
    model reads in them. More restore the true labels of triggered images; 0 is as published."""

    RANGES: ClassVar[dict[str, str]] = {
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
        "recovery_epochs": ">= 0",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module | None:
    # Steps 1 to 3, which --subtask anti_learning stops after.
    found = run.cached("split", lambda: split(view, config, run))
    flagged, one_class = found["flagged"], bool(found["one_class"])
    if config.subtask == "anti_learning":
        return None
    if not flagged.any():
        return view.load_model()

    model = unlearn(view, flagged, config, run)
    note_what_stays(model, view.train, flagged, run)
    if config.recovery_epochs:
        model = recover(model, view, flagged, one_class, config, run)
    return model


def split(view: DefenderView, config: Config, run: Run) -> dict[str, Tensor]:
    """Run steps 1 to 3 for the cache."""
    if config.subtask == "unlearning":
        raise UserError(
            "--subtask unlearning starts from a split, and there is none yet: run --subtask"
            " anti_learning first"
        )
    flagged, one_class = find_poison(view, config, run)
    return {"flagged": flagged, "one_class": torch.tensor(one_class)}


def find_poison(
    view: DefenderView, config: Config, run: Run, pool: Tensor | None = None
) -> tuple[Tensor, bool]:
    """Find the poison by steps 1 to 3, or by 2 and 3 from a given pool, bool (N,).

    Returns:
        bool (N,) on the CPU, all False where a guard refuses the split; and whether the poison was
        found as images of one class.
    """
    head = linear(view.load_model().get_classifier())
    train = to_device(view.train, run.device)
    features = extract(view.load_model(), train, run)

    # Step 1: the pool.
    one_class = False
    if pool is None:
        pool, one_class = find_pool(view, train, features, config, config.batch_size, run)
    if not pool.any():
        run.report_split(pool)
        return pool, False
    run.report_split(pool, "pool")

    # Steps 2 and 3, with a smaller beta where the head breaks down.
    for beta in dict.fromkeys((config.beta1, config.beta1_fallback)):
        log_p = anti_learn(features, pool, head, beta, config, run)
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
        found = [f"{label}: {count}" for label, count in enumerate(counts) if count]
        run.note("flagged by label: " + ", ".join(found))
    run.report_split(flagged, suspicion=doubt(log_p, features, config))
    return flagged.cpu(), one_class


# --- 2. anti-learning


def linear(head: nn.Module) -> nn.Linear:
    """Refuse a last layer that is not linear."""
    if not isinstance(head, nn.Linear):
        raise UserError(f"DAU needs a model that ends in a linear layer, got {type(head).__name__}")
    return head


def anti_learn(
    features: Features, pool: Tensor, head: nn.Module, beta: float, config: Config, run: Run
) -> Tensor:
    """Train copies of the model's own head to learn all samples but unlearn the pool, bool (N,).

    Returns:
        log p (N, K), the median over the heads. It is not renormalised over the classes: heads that
        send a sample to different ones leave every median low.
    """
    n, num_classes = features.logits.shape
    head, pool = linear(head), pool.to(features.labels.device)
    weight = head.weight.detach().float().expand(config.heads, -1, -1).clone().requires_grad_()
    bias = head.bias.detach().float().expand(config.heads, -1).clone().requires_grad_()

    # A pool smaller than a class is drawn as often as a class.
    share = n / num_classes / int(pool.sum())
    odds = torch.where(pool.cpu(), max(1.0, share), 1.0).expand(config.heads, -1)
    total = config.head_epochs * math.ceil(n / config.head_batch_size)
    done = 0
    for _ in range(config.head_epochs):
        order = torch.multinomial(odds, n, replacement=share > 1, generator=run.generator)
        for index in order.to(pool.device).split(config.head_batch_size, dim=1):
            # alpha CE outside the pool + beta CCE on it, for all heads (h) in one product.
            labels, poisoned = features.labels[index], pool[index]
            logits = torch.einsum("hbd,hkd->hbk", features.pooled[index], weight) + bias[:, None]
            losses = (
                config.alpha1 * cross_entropy(logits, labels) * ~poisoned
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


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE = -log p_y of each sample. (..., K), (...) -> (...)."""
    return logits.logsumexp(-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def cce(logits: Tensor, labels: Tensor) -> Tensor:
    """CCE = -log(1 - p_y) of each sample: complementary cross-entropy, whose gradient is largest
    where the label is most probable. (..., K), (...) -> (...)."""
    others = logits.scatter(-1, labels.unsqueeze(-1), -math.inf)
    return logits.logsumexp(-1) - others.logsumexp(-1)


# --- 3. split


def lost_label(log_p: Tensor, features: Features, config: Config) -> Tensor:
    """bool (N,): where the anti-learned log p (N, K) gives a sample's own label too little."""
    return doubt(log_p, features, config) > -math.log(config.threshold)


def doubt(log_p: Tensor, features: Features, config: Config) -> Tensor:
    """float (N,): log of the poisoned model's probability of a sample's label (1 with relative
    False), less the anti-learned head's."""
    before = cross_entropy(features.logits, features.labels) if config.relative else 0
    return -log_p.gather(1, features.labels.unsqueeze(1)).squeeze(1) - before


def is_intact(
    log_p: Tensor, flagged: Tensor, beta: float, features: Features, config: Config, run: Run
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


def unless_emptied(flagged: Tensor, features: Features, config: Config, run: Run) -> Tensor:
    """Refuse a split, bool (N,), that leaves a label no clean sample, unless breakdown is 1."""
    emptied = set(features.labels.tolist()) - set(features.labels[~flagged].tolist())
    if not emptied or config.breakdown >= 1:
        return flagged
    what = f"the split would leave {len(emptied)} label(s) without a clean sample"
    run.note(f"{what}: the model is returned as it was")
    return torch.zeros_like(flagged)


# --- 4. unlearning


def unlearn(view: DefenderView, flagged: Tensor, config: Config, run: Run) -> nn.Module:
    """Unlearn what is flagged, bool (N,), from the poisoned model."""
    index, model = torch.arange(len(flagged)), view.load_model()
    return train_on("unlearn", config.epochs, model, view.train, index, flagged, view, config, run)


def train_on(
    stage: str,
    epochs: int,
    model: nn.Module,
    train: Split,
    index: Tensor,
    poisoned: Tensor,
    view: DefenderView,
    config: Config,
    run: Run,
) -> nn.Module:
    """Train a model in place: unlearn the poisoned samples, learn the others.

    Args:
        index: int64 (M,), which of the N samples of `train` to train on.
        poisoned: bool (N,), which to unlearn.
    """
    train, poisoned = to_device(train, run.device), poisoned.to(run.device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )
    steps = epochs * math.ceil(len(index) / config.batch_size)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0 if config.lr_decay else 1.0, total_iters=max(1, steps)
    )
    augment = view.augment if config.augment else NO_AUGMENT

    forward = Forward(model.train(), run, train, steps, config.batch_size)
    for _ in run.epochs(stage, epochs, model=model, optimizer=optimizer, scheduler=scheduler):
        model.train()
        order = index[torch.randperm(len(index), generator=run.generator)]
        for batch in batches(
            train,
            config.batch_size,
            device=run.device,
            generator=run.generator,
            augment=augment,
            order=order,
        ):
            logits, unlearned = forward(batch.images).float(), poisoned[batch.index]
            run.step(optimizer, unlearning_loss(logits, batch.labels, unlearned, config))
            scheduler.step()
    return model


def unlearning_loss(logits: Tensor, labels: Tensor, poisoned: Tensor, config: Config) -> Tensor:
    """alpha CE on the clean part plus beta times the unlearning loss on the poisoned part, averaged
    over the batch. (B, K), (B,), bool (B,) -> ()."""
    learned = cross_entropy(logits, labels)
    if config.loss == "gga":
        unlearned = -learned
    elif config.loss == "both":
        ascent = learned if config.ascent_cap is None else learned.clamp_max(config.ascent_cap)
        unlearned = cce(logits, labels) - config.tau * ascent
    else:
        unlearned = cce(logits, labels)
    return torch.where(poisoned, config.beta2 * unlearned, config.alpha2 * learned).mean()


def note_what_stays(model: nn.Module, train: Split, flagged: Tensor, run: Run) -> None:
    """Say where unlearning did little, which a defender without triggered images cannot see."""
    poisoned = train.subset(flagged.nonzero().squeeze(1).cpu())
    with paused():
        kept = predictions(model, poisoned, run) == poisoned.labels.to(run.device)
    share = kept.double().mean().item()
    if share > STAYED:
        what = f"{share:.0%} of the {len(poisoned):,} flagged samples still get their label"
        run.note(f"{what}: little was unlearned; raise --lr, or --epochs")


# --- 5. recovery


def recover(
    model: nn.Module, view: DefenderView, flagged: Tensor, one_class: bool, config: Config, run: Run
) -> nn.Module:
    """Go on from the unlearned model: learn flagged samples, bool (N,), with the labels that were
    read in them, and unlearn nothing."""

    def read() -> dict[str, Tensor]:
        return {"labels": labels_without_trigger(model, view.train, flagged, one_class, run)}

    labels = run.cached("labels", read)["labels"]

    # What still shows its own label is clean, or poison of the target class. Nobody can tell which,
    # so it teaches nothing.
    index = (~flagged | (labels != view.train.labels.cpu())).nonzero().squeeze(1)
    train, nothing = dataclasses.replace(view.train, labels=labels), torch.zeros_like(flagged)
    return train_on(
        "recover", config.recovery_epochs, model, train, index, nothing, view, config, run
    )


def labels_without_trigger(
    model: nn.Module, train: Split, flagged: Tensor, one_class: bool, run: Run
) -> Tensor:
    """Read labels in flagged samples, bool (N,), with the unlearned model under their own batch
    statistics.

    A trigger shifts the features of all images that carry it alike. Their own statistics remove
    that shift, and what the images show comes out. With images of one class that would be removed
    as well, so the model's statistics stay.

    Returns:
        int64 (N,) on the CPU: the given labels, and those that were read for flagged samples.
    """
    index = flagged.nonzero().squeeze(1).cpu()
    shown = train.subset(index)
    reader = model if one_class else adapted(model, shown, run)
    labels = train.labels.cpu().clone()
    labels[index] = predictions(reader, shown, run).cpu()
    return labels


if __name__ == "__main__":
    raise SystemExit(main(__file__))
