"""I-BAU: Implicit Backdoor Adversarial Unlearning.

Adversarial Unlearning of Backdoors via Implicit Hypergradient. Y. Zeng, S. Chen, W. Park, Z. M.
Mao, M. Jin, R. Jia. ICLR 2022. https://arxiv.org/abs/2110.03735

Assumes: the poisoned model and a few trusted images.

min over theta of the max over one perturbation delta of the loss on trusted images; a round is
  1. delta, from zero: one pass of gradient steps that raise the loss of the perturbed images.
  2. theta, for each batch: a step down the loss of the batch with delta on 1 % of its images, along
     the total derivative, which also counts how delta would move with theta
     (backdoorlab/repair/hypergradient.py). The inner problem is L_in = 0.001 |delta|^2 - loss.
     K = 0 leaves the second term out.

Departs from the published code, whose delta grows without bound and whose fixed-point iteration
then diverges or does nothing; reasons and effects in docs/methods/ibau.md:
  - delta stays in an L2 ball, perturbed images in [0, 1], at least one of a batch carries delta.
  - L_in is taken on true labels and on the batch of L_out, as in the paper's equation.
  - The Hessian is that on the ball's surface, and its system is solved in K Lanczos steps.
  - A guard undoes rounds that destroy the model (backdoorlab/repair/guard.py).
The presets ibau_official, ibau_notebook and ibau_backdoorbench take the published steps instead
(backdoorlab/repair/ibau_published.py).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import NO_AUGMENT, Augment, Batch, Split, batches, to_device
from backdoorlab.models import Classifier, trained_weights
from backdoorlab.perturb import frozen, l2, project, same_reach
from backdoorlab.record import DefenderView
from backdoorlab.repair import ibau_published as published
from backdoorlab.repair.guard import GuardConfig, guarded_epochs
from backdoorlab.repair.hypergradient import differentiable_twice, hypergradient
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(GuardConfig, DefenseConfig):
    n_rounds: int = 3
    """Rounds of finding delta and unlearning it; the authors have 3 (README) and 5 (defense.py)."""
    K: int = 5
    """Steps of the hypergradient's solve, two passes each; 0 is the first-order version."""
    batch_size: int = 100
    """Trusted images a step."""
    optim: Literal["Adam", "AMSGrad", "SGD"] = "Adam"
    """Optimizer of theta."""
    lr: float = 1e-4
    """Learning rate of theta, BackdoorBench's. The 1e-3 of the authors' README (small VGG) destroys
    a fully trained PreAct-ResNet18."""
    lr_decay: bool = False
    """Let it fall linearly to 0: with a constant rate the result depends on the last steps."""
    delta_steps: int | None = None
    """Steps of finding delta, one a batch; None is one pass over the trusted images."""
    delta_lr: float = 10.0
    """Learning rate of delta, plain SGD."""
    delta_weight: float = 1e-3
    """Weight of |delta|^2 in the inner problem."""
    projected: bool = True
    """Keep delta in an L2 ball."""
    radius: float | None = None
    """Radius of that ball in pixels of [0, 1]. None: 10 for a 32 x 32 x 3 image, else of the same
    root mean square."""
    clip_box: bool = True
    """Keep perturbed images within [0, 1]."""
    patched: float = 0.01
    """Share of a batch that carries delta while theta is trained, at least one image. More removes
    more of the backdoor and costs clean accuracy."""
    solver: Literal["lanczos", "fixed_point"] = "lanczos"
    """How A v = g is solved; fixed_point is the published iteration, on the bare Hessian."""
    damping: float = 0.01
    """lanczos: added to A's eigenvalues, as a share of the largest."""
    quirks: bool = False
    """The published code's habits (repair/ibau_published.py): predicted labels in step 1, one
    projection after it, L_in always on the first batch, no delta in batches below 1 / patched."""
    normalised: bool = False
    """delta in units of the model's normalised input instead of pixels."""
    augment: bool = False
    """Augment the trusted images as in ordinary training."""

    RANGES: ClassVar[dict[str, str]] = {
        "n_rounds": ">= 0",
        "K": ">= 0",
        "batch_size": ">= 1",
        "lr": ">= 0",
        "delta_steps": ">= 0",
        "delta_lr": ">= 0",
        "delta_weight": ">= 0",
        "radius": "> 0",
        "patched": "[0, 1]",
        "damping": ">= 0",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    model, trusted = view.load_model(), to_device(view.trusted, run.device)
    augment = view.augment if config.augment else NO_AUGMENT
    radius = config.radius or same_reach(10 / math.sqrt(3 * 32 * 32), view.image_shape)
    radius = radius if config.projected else math.inf
    ours = (find_delta, carried)
    find, count = (published.find_delta, published.carried) if config.quirks else ours
    solve = published.fixed_point if config.solver == "fixed_point" else None

    weights = trained_weights(model)
    optimizer = make_optimizer(weights, config)
    steps = config.n_rounds * math.ceil(len(trusted) / config.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0 if config.lr_decay else 1.0, total_iters=max(1, steps)
    )

    # The two problems: L_in, which delta descends, and L_out, which theta descends.
    def inner(images: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
        size = config.delta_weight * delta.square().sum()
        return size - loss(model, config, run, images, labels, delta)

    def outer(batch: Batch, carrying: Tensor, delta: Tensor) -> Tensor:
        return loss(model, config, run, batch.images, batch.labels, delta * carrying)

    for _ in guarded_epochs(
        run, "unlearn", config.n_rounds, trusted, config, model, optimizer, schedule
    ):
        # Step 1: one delta, from 0 in every round, raises the loss of all images.
        model.eval()
        delta = torch.zeros(1, *view.image_shape, device=run.device)
        searched = search_batches(trusted, augment, config, run)
        with frozen(model):
            delta, first = find(inner, searched, delta, config.delta_lr, radius, model, run)
        run.log(delta=l2(delta).item())

        # Step 2: theta lowers the loss where some images carry delta, along the total derivative.
        for batch in one_pass(trusted, augment, config, run):
            size, seen = len(batch.labels), first or batch
            # A few images of the batch carry delta, the others keep what is right as it is.
            carrying = carriers(size, count(size, config.patched), run)
            with differentiable_twice():
                found = hypergradient(
                    partial(outer, batch, carrying),
                    partial(inner, seen.images, seen.labels),
                    delta,
                    weights,
                    radius,
                    config.K,
                    config.damping,
                    solve,
                )

            # The gradients are the direct part and the implicit part together.
            run.step(optimizer, found.loss, found.gradients)
            schedule.step()
            if config.K:
                run.watch(implicit=found.implicit, residual=found.residual)
    return model


def loss(
    model: Classifier, config: Config, run: Run, images: Tensor, labels: Tensor, delta: Tensor
) -> Tensor:
    """Cross-entropy of images (B, C, H, W) + delta, (1, C, H, W) or one for each image."""
    shown = images + delta * (model.std if config.normalised else 1)
    with run.autocast():
        logits = model(shown.clamp(0, 1) if config.clip_box else shown)
    return F.cross_entropy(logits.float(), labels)


def one_pass(trusted: Split, augment: Augment, config: Config, run: Run) -> Iterator[Batch]:
    """One pass over the trusted images, in random order."""
    return batches(
        trusted, config.batch_size, device=run.device, generator=run.generator, augment=augment
    )


def search_batches(trusted: Split, augment: Augment, config: Config, run: Run) -> Iterator[Batch]:
    """Batches of step 1: one pass, or delta_steps batches of as many passes as that takes."""
    if config.delta_steps is None:
        return one_pass(trusted, augment, config, run)
    passes = (one_pass(trusted, augment, config, run) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(passes), config.delta_steps)


def find_delta(
    inner: Callable[[Tensor, Tensor, Tensor], Tensor],
    searched: Iterable[Batch],
    delta: Tensor,
    lr: float,
    radius: float,
    _model: nn.Module,
    _run: Run,
) -> tuple[Tensor, Batch | None]:
    """Step 1: descend `inner` from delta (1, C, H, W) within the ball. The batch beside the result
    is that of L_in in step 2; None is that of L_out."""
    for batch in searched:
        delta.requires_grad_()
        (slope,) = torch.autograd.grad(inner(batch.images, batch.labels, delta), delta)
        delta = project(delta.detach() - lr * slope, "l2", radius)
    return delta, None


def carried(size: int, share: float) -> int:
    """Images of a batch that carry delta: at least one, unless the share is 0."""
    return max(1, int(share * size)) if share else 0


def carriers(size: int, count: int, run: Run) -> Tensor:
    """(size, 1, 1, 1): 1 for `count` images of a batch, drawn at random, 0 for the others."""
    mask = torch.zeros(size)
    mask[torch.randperm(size, generator=run.generator)[:count]] = 1
    return mask.to(run.device).view(-1, 1, 1, 1)


def make_optimizer(weights: list[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """Optimizer of theta."""
    if config.optim == "SGD":
        return torch.optim.SGD(weights, lr=config.lr, fused=True)
    return torch.optim.Adam(weights, lr=config.lr, amsgrad=config.optim == "AMSGrad", fused=True)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
