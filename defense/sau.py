"""SAU: Shared Adversarial Unlearning.

Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial Examples. S.
Wei, M. Zhang, H. Zha, B. Wu. NeurIPS 2023. https://arxiv.org/abs/2307.10562 ; the constants are
those of the published code, which are not all in the paper.

Assumes: the poisoned model and a few trusted images.

A trigger of the poisoned model is an adversarial example that this model and its purified version
must not share. For each batch of trusted images:
  1. Find, by projected gradient descent, a perturbation of each image that fools the current and
     the poisoned model into the same wrong class.
  2. Train the current model on the clean images, and away from the wrong class that the poisoned
     model gives to the perturbed ones.

Departs from the published code in cost: the poisoned model's predictions on clean images are
computed once, gradients are taken to the perturbation only, and an image whose perturbation is
shared already, and so can no longer move, leaves the search. Its two log terms of step 2 are the
same number and are one here. Options that its defaults do not take (a random start, an l2 ball) are
corrected. A guard undoes rounds that destroy the model (backdoorlab/repair/guard.py).
docs/methods/sau.md has the list and the effects.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import batches, to_device
from backdoorlab.features import predictions
from backdoorlab.perturb import Norm, frozen, project, same_reach, steepest
from backdoorlab.record import DefenderView
from backdoorlab.repair.guard import GuardConfig, guarded_epochs
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(GuardConfig, DefenseConfig):
    n_rounds: int = 100
    """Passes over the trusted images (20 on Tiny ImageNet)."""
    batch_size: int = 256
    """Trusted images a step."""
    lr: float = 1e-4
    """Learning rate of Adam, with amsgrad."""
    cosine: bool = False
    """Let the learning rate fall to 0 along a cosine; the published code makes such a schedule and
    never steps it."""
    train_bn: bool = False
    """Batch statistics in step 2 instead of the poisoned model's."""
    norm: Norm = "linf"
    """Norm of the perturbation."""
    eps: float | None = None
    """Largest perturbation, in that norm and in pixels of [0, 1]. None: 0.2, in l2 the smallest
    ball around linf's."""
    pgd_steps: int = 5
    """Steps of the search."""
    pgd_lr: float = 1.0
    """Length of a step as a share of eps."""
    pgd_init: Literal["max", "zero", "random"] = "max"
    """Where the search starts: every pixel as high as eps lets it, no perturbation, or uniform in
    [-eps, eps]."""
    clip_box: bool = False
    """Keep perturbed images within [0, 1]."""
    beta1: float = 0.01
    """Search: weight of fooling either model."""
    beta2: float = 1.0
    """Search: weight of both models agreeing."""
    lambda1: float = 1.0
    """Training: weight of the clean images."""
    lambda2: float = 0.0
    """Training: weight of the true labels of perturbed images, plain adversarial training."""
    lambda3: float = 1.0
    """Training: weight of unlearning the shared wrong class. More removes more of the backdoor and
    costs clean accuracy."""

    RANGES: ClassVar[dict[str, str]] = {
        "n_rounds": ">= 0",
        "batch_size": ">= 1",
        "lr": ">= 0",
        "eps": "> 0",
        "pgd_steps": ">= 0",
        "pgd_lr": "> 0",
        "beta1": ">= 0",
        "beta2": ">= 0",
        "lambda1": ">= 0",
        "lambda2": ">= 0",
        "lambda3": ">= 0",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, poisoned = view.load_model(), view.load_model().eval().requires_grad_(False)
    trusted = to_device(view.trusted, run.device)
    # The search's batches shrink, and each new size would be tuned anew.
    torch.backends.cudnn.benchmark = False
    believed = predictions(poisoned, trusted, run)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, amsgrad=True, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, config.n_rounds))
    for _ in guarded_epochs(
        run, "unlearn", config.n_rounds, trusted, config, model, optimizer, schedule
    ):
        model.eval()
        for batch in batches(
            trusted, config.batch_size, device=run.device, generator=run.generator
        ):
            x, y, answers = batch.images, batch.labels, believed[batch.index]

            # Step 1: what fools both models into the same wrong class.
            delta = shared_perturbation(model, poisoned, x, y, answers, config, run)

            # Step 2: clean images, and away from that class.
            loss = training_loss(model, poisoned, x, y, delta, answers, config, run)
            run.step(optimizer, loss)
        if config.cosine:
            schedule.step()
    return model


# --- 1. the search


def shared_perturbation(
    model: nn.Module,
    poisoned: nn.Module,
    x: Tensor,
    y: Tensor,
    believed: Tensor,
    config: Config,
    run: Run,
) -> Tensor:
    """Find a perturbation that moves both models from their predictions to the same other class.

    The loss is a sum over images, so that delta does not depend on which images share a batch.

    Args:
        model: current weights; `poisoned`: those that the defense began with.
        x: (B, C, H, W) in [0, 1].
        y: (B,) true labels.
        believed: (B,) the poisoned model's predictions on x.

    Returns:
        delta (B, C, H, W).
    """
    eps = config.eps or (0.2 if config.norm == "linf" else same_reach(0.2, x.shape[1:]))
    delta = start(x, eps, config, run)
    with frozen(model):
        with torch.no_grad(), run.autocast():
            answers = model(x).argmax(1)

        searching = torch.arange(len(x), device=x.device)
        for _ in range(config.pgd_steps):
            here = delta[searching].requires_grad_()
            with run.autocast():
                f, g = model(x[searching] + here).float(), poisoned(x[searching] + here).float()
            loss, shared = search_loss(
                f, g, answers[searching], believed[searching], y[searching], config
            )
            if shared.all():
                break

            # A step of projected gradient descent.
            (gradient,) = torch.autograd.grad(loss, here)
            moved = here.detach() - config.pgd_lr * eps * steepest(gradient, config.norm)
            moved = allowed(moved, x[searching], eps, config)

            # A shared image has no gradient and would stay where it is: drop it.
            delta[searching[~shared]] = moved[~shared]
            searching = searching[~shared]
    return delta


def start(x: Tensor, eps: float, config: Config, run: Run) -> Tensor:
    """Perturbation (B, C, H, W) before the first step."""
    if config.pgd_init == "random":
        drawn = torch.rand(x.shape, generator=run.generator).to(x).mul_(2).sub_(1)
    else:
        drawn = torch.full_like(x, 1.0 if config.pgd_init == "max" else 0.0)
    return allowed(drawn * eps, x, eps, config)


def allowed(delta: Tensor, x: Tensor, eps: float, config: Config) -> Tensor:
    """Project delta to the ball of radius eps, and with clip_box x + delta to [0, 1]."""
    delta = project(delta, config.norm, eps)
    return (x + delta).clamp(0, 1) - x if config.clip_box else delta


def search_loss(
    f: Tensor, g: Tensor, answers: Tensor, believed: Tensor, y: Tensor, config: Config
) -> tuple[Tensor, Tensor]:
    """Compute what the search descends.

    A model that is fooled already adds nothing more (its loss would grow without end), and an image
    that is shared adds nothing at all.

    Args:
        f, g: logits (B, K) of the current and of the poisoned model on perturbed images.
        answers, believed: (B,) their predictions on the clean images.
        y: (B,) true labels.

    Returns:
        the loss, summed over images; and bool (B,), where both models are fooled into the same
        class.
    """
    left_f, left_g = f.argmax(1) != answers, g.argmax(1) != believed
    shared = left_f & left_g & (f.argmax(1) == g.argmax(1))

    # -beta_1 CE of either model while it is right + beta_2 JS(f, g).
    stay = (
        F.cross_entropy(f, y, reduction="none") * ~left_f
        + F.cross_entropy(g, y, reduction="none") * ~left_g
    )
    return (-config.beta1 * stay / 2 + config.beta2 * jensen_shannon(f, g) * ~shared).sum(), shared


def jensen_shannon(f: Tensor, g: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, (B,), of softmax(f) and softmax(g), logits (B, K).
    Probabilities count as at least 1e-8."""
    p, q = f.softmax(1).clamp_min(1e-8), g.softmax(1).clamp_min(1e-8)
    m = (p + q) / 2
    return ((p * p.log() + q * q.log()) / 2 - m * m.log()).sum(1)


# --- 2. the training


def training_loss(
    model: nn.Module,
    poisoned: nn.Module,
    x: Tensor,
    y: Tensor,
    delta: Tensor,
    believed: Tensor,
    config: Config,
    run: Run,
) -> Tensor:
    """Learn the clean images, and unlearn the wrong class that the poisoned model gives to the
    perturbed ones.

    The model is in evaluation mode afterwards. Shapes as in `shared_perturbation`.
    """
    with torch.no_grad(), run.autocast():
        wrong = poisoned(x + delta).argmax(1)
    # Only where the perturbation fools the poisoned model is there a wrong class to unlearn.
    fooled = (wrong != y) & (wrong != believed)

    model.train(config.train_bn)
    with run.autocast():
        clean, perturbed = model(torch.cat([x, x + delta])).float().chunk(2)
    model.eval()

    # lambda_1 CE(clean) + lambda_3 L_unlearn(perturbed) + lambda_2 CE(perturbed).
    leave = unlearning_loss(perturbed, wrong, fooled)
    run.watch(leave=leave, fooled=fooled.float().mean())
    loss = config.lambda1 * F.cross_entropy(clean, y) + config.lambda3 * leave
    return loss + config.lambda2 * F.cross_entropy(perturbed, y) if config.lambda2 else loss


def unlearning_loss(logits: Tensor, wrong: Tensor, fooled: Tensor) -> Tensor:
    """Mean over the batch of -log(1 - p_wrong) where `fooled`.

    At most 13.8 an image, and without a gradient once p_wrong < 0.001.

    Args:
        logits: (B, K) of the current model on perturbed images.
        wrong: (B,) the poisoned model's predictions on them.
        fooled: bool (B,).
    """
    # 1 - p_wrong, without its cancellation.
    others = logits.softmax(1).scatter(1, wrong.unsqueeze(1), 0).sum(1)
    return (-(others.clamp_max(0.999) + 1e-6).log() * fooled).mean()


if __name__ == "__main__":
    raise SystemExit(main(__file__))
