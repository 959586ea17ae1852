"""I-BAU: Implicit Backdoor Adversarial Unlearning.

Adversarial Unlearning of Backdoors via Implicit Hypergradient. Y. Zeng, S. Chen, W. Park, Z. M.
Mao, M. Jin, R. Jia. ICLR 2022. https://arxiv.org/abs/2110.03735

Assumes: the poisoned model and a few trusted images.

min over theta of the max over one perturbation delta of the loss on trusted images; a round is
  1. delta, from zero: one pass of gradient steps that raise the loss of the perturbed images. 2.
  theta, for each batch: a step down the loss of the batch with delta on 1 % of its images, along
  the total derivative,
     which also counts how delta would move with theta:
         d L_out / d theta = grad_theta L_out - (d^2 L_in / d delta d theta)^T v,    A v = grad_delta L_out,
     A the Hessian of the inner problem L_in = 0.001 |delta|^2 - loss. K = 0 leaves the second term
     out.

Departs from the published code, whose delta grows without bound and whose fixed-point iteration
then diverges or does nothing; reasons and effects in docs/methods/ibau.md:
  - delta stays in an L2 ball, perturbed images in [0, 1], and at least one image of a batch carries delta.
  - L_in is taken on the batch of L_out and on true labels, as in the paper's equation; the code takes it on its first batch.
  - On the ball's surface delta can move along the surface only, so A is the Hessian there, with the surface's curvature;
    A v = g is solved in K Lanczos steps, which cannot diverge, and v is at most |g| over the
    damping.
The presets ibau_official, ibau_notebook and ibau_backdoorbench undo this as far as each published
variant does without it.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import NO_AUGMENT, Batch, batches, to_device
from backdoorlab.errors import UserError
from backdoorlab.perturb import frozen, l2, project, same_reach
from backdoorlab.record import DefenderView
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(DefenseConfig):
    n_rounds: int = 3
    """Rounds of finding delta and unlearning it (3 in the authors' README, 5 in their
    defense.py)."""
    K: int = 5
    """Steps of the hypergradient's solve, each as dear as two passes; 0 is the first-order
    version."""
    batch_size: int = 100
    """Trusted images a step."""
    optim: Literal["Adam", "AMSGrad", "SGD"] = "Adam"
    """Optimizer of theta."""
    lr: float = 1e-4
    """Learning rate of theta: BackdoorBench's for PreAct-ResNet18, which the 1e-3 of the authors'
    README (small VGG) destroys once fully trained."""
    lr_decay: bool = False
    """Let it fall linearly to 0 over the rounds: a constant rate ends where its last steps happened
    to lead."""
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
    """Share of a batch that carries delta while theta is trained."""
    solver: Literal["lanczos", "fixed_point"] = "lanczos"
    """How A v = g is solved; fixed_point is the published iteration of step size 0.1, on the bare
    Hessian."""
    damping: float = 0.01
    """lanczos: added to A's eigenvalues, as a share of the largest."""
    quirks: bool = False
    """The published code's habits: predicted labels in step 1, one projection after it, L_in always
    on the first batch, no delta in batches below 1 / patched."""
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
    if not config.projected:
        radius = math.inf
    weights = list(model.parameters())
    optimizer = make_optimizer(weights, config)

    def one_pass() -> Iterator[Batch]:
        return batches(
            trusted, config.batch_size, device=run.device, generator=run.generator, augment=augment
        )

    def searched() -> Iterator[Batch]:
        endless = itertools.chain.from_iterable(one_pass() for _ in itertools.count())
        return (
            one_pass()
            if config.delta_steps is None
            else itertools.islice(endless, config.delta_steps)
        )

    def loss(images: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
        shown = images + delta * (model.std if config.normalised else 1)
        with run.autocast():
            logits = model(shown.clamp(0, 1) if config.clip_box else shown)
        return F.cross_entropy(logits.float(), labels)

    def inner(images: Tensor, labels: Tensor, delta: Tensor) -> Tensor:
        return config.delta_weight * delta.square().sum() - loss(images, labels, delta)

    def outer(images: Tensor, labels: Tensor, where: Tensor, delta: Tensor) -> Tensor:
        return loss(images, labels, delta * where)

    steps = config.n_rounds * math.ceil(len(trusted) / config.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.0 if config.lr_decay else 1.0, total_iters=max(1, steps)
    )
    for _ in run.epochs(
        "unlearn", config.n_rounds, model=model, optimizer=optimizer, schedule=schedule
    ):
        model.eval()
        delta = torch.zeros(1, *view.image_shape, device=run.device)
        first: Batch | None = None
        with frozen(model):
            for batch in searched():
                first = first or batch
                labels = batch.labels
                if config.quirks:
                    with torch.no_grad(), run.autocast():
                        labels = model(batch.images).argmax(1)
                delta.requires_grad_()
                (slope,) = torch.autograd.grad(inner(batch.images, labels, delta), delta)
                delta = project(
                    delta.detach() - config.delta_lr * slope,
                    "l2",
                    math.inf if config.quirks else radius,
                )
        if config.quirks:
            delta = project(delta, "l2", radius)
        run.log(delta=l2(delta).item())

        for batch in one_pass():
            seen = first if config.quirks and first is not None else batch
            with differentiable_twice():
                found = hypergradient(
                    partial(
                        outer, batch.images, batch.labels, carriers(len(batch.labels), config, run)
                    ),
                    partial(inner, seen.images, seen.labels),
                    delta,
                    weights,
                    radius,
                    config,
                )
            run.step(optimizer, found.loss, found.gradients)
            schedule.step()
            if config.K:
                run.watch(implicit=found.implicit, residual=found.residual)
    return model


@contextlib.contextmanager
def differentiable_twice() -> Iterator[None]:
    """Attention in its plain form, since the gradient of its fast ones has no gradient; a network
    with another such part is refused."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if not re.match(r"derivative for \S+ is not implemented", str(error)):
            raise
        raise UserError(
            "I-BAU's hypergradient differentiates the network twice, and this one cannot be"
            f" ({error}): use --K 0"
        ) from error


def make_optimizer(weights: list[nn.Parameter], config: Config) -> torch.optim.Optimizer:
    if config.optim == "SGD":
        return torch.optim.SGD(weights, lr=config.lr, fused=True)
    return torch.optim.Adam(weights, lr=config.lr, amsgrad=config.optim == "AMSGrad", fused=True)


def carriers(size: int, config: Config, run: Run) -> Tensor:
    """(size, 1, 1, 1): 1 for the images of a batch that carry delta, drawn at random, 0 for the
    others."""
    count = int(config.patched * size)
    if not config.quirks and config.patched:
        count = max(1, count)
    mask = torch.zeros(size)
    mask[torch.randperm(size, generator=run.generator)[:count]] = 1
    return mask.to(run.device).view(-1, 1, 1, 1)


# --- the hypergradient


@dataclass(frozen=True)
class Hypergradient:
    gradients: list[Tensor]
    """d L_out / d theta, one for each weight."""
    loss: Tensor
    """L_out."""
    implicit: Tensor
    """Length of the implicit term, as a share of the direct one's."""
    residual: Tensor
    """|A v - g| / |g| of the solve."""


def hypergradient(
    outer: Callable[[Tensor], Tensor],
    inner: Callable[[Tensor], Tensor],
    delta: Tensor,
    weights: list[nn.Parameter],
    radius: float,
    config: Config,
) -> Hypergradient:
    """Total derivative of outer(delta*(theta), theta), with delta* the minimum of inner in the
    ball. delta: (1, C, H, W)."""
    delta = delta.detach().requires_grad_(config.K > 0)
    loss = outer(delta)
    nothing = torch.zeros((), device=delta.device)
    if config.K == 0:
        return Hypergradient(list(torch.autograd.grad(loss, weights)), loss, nothing, nothing)
    g, *direct = torch.autograd.grad(loss, [delta, *weights])
    (slope,) = torch.autograd.grad(inner(delta), delta, create_graph=True)

    def hessian(v: Tensor) -> Tensor:
        return torch.autograd.grad(slope, delta, v, retain_graph=True)[0]

    if config.solver == "fixed_point":
        v, residual = fixed_point(hessian, g, config.K)
    else:
        project_tangent, curvature = surface(delta.detach(), slope.detach(), radius)

        def restricted(v: Tensor) -> Tensor:
            return project_tangent(hessian(v) + curvature * v)

        v, residual = lanczos(restricted, project_tangent(g), config.K, config.damping)
    implicit = torch.autograd.grad(slope, weights, v, materialize_grads=True)
    size = _length(implicit) / _length(direct).clamp_min(1e-30)
    return Hypergradient(
        [a - b for a, b in zip(direct, implicit, strict=True)], loss, size, residual
    )


def surface(
    delta: Tensor, slope: Tensor, radius: float
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Where delta may move: a projection, and what the ball's surface adds to the Hessian
    (Lagrange's multiplier over the length).

    Inside the ball every direction is free. On its surface, with the slope pressing outwards, only
    the tangent ones are.
    """
    squared = delta.square().sum()
    multiplier = -(slope * delta).sum() / squared.clamp_min(1e-30)
    if squared.sqrt() < radius * (1 - 1e-4) or multiplier <= 0:
        return lambda v: v, torch.zeros_like(squared)
    return lambda v: v - delta * ((v * delta).sum() / squared), multiplier


def lanczos(
    matvec: Callable[[Tensor], Tensor], g: Tensor, steps: int, damping: float
) -> tuple[Tensor, Tensor]:
    """v with (A + shift) v = g, as well as it can be in the Krylov space of `steps` products with
    the symmetric A, and its residual.

    shift = damping times the largest eigenvalue seen, plus twice the most negative one: delta has
    not reached a minimum where A has such, and the inner problem is then the one with a proximal
    term that makes it convex. With shift 0 this is the method of conjugate gradients, exact after
    as many steps as there are dimensions.
    """
    length = g.norm()
    if length == 0:
        return torch.zeros_like(g), torch.zeros_like(length)
    basis, diagonal, beside = [g / length], [], []
    for _ in range(steps):
        w = matvec(basis[-1])
        diagonal.append((w * basis[-1]).sum())
        for _ in range(2):  # once leaves rounding behind
            for q in basis:
                w = w - q * (w * q).sum()
        beside.append(w.norm())
        if beside[-1] <= 1e-5 * torch.stack(diagonal).abs().max():
            break
        basis.append(w / beside[-1])
    off = torch.stack(beside[: len(diagonal) - 1]) if len(diagonal) > 1 else length.new_zeros(0)
    t = (torch.stack(diagonal).diag() + off.diag(1) + off.diag(-1)).double().cpu()
    values, vectors = torch.linalg.eigh(t)
    shift = damping * values.abs().max() + 2 * (-values.min()).clamp_min(0)
    y = (vectors @ (vectors[0] / (values + shift).clamp_min(1e-30))).to(g) * length
    v = sum((q * c for q, c in zip(basis, y, strict=False)), torch.zeros_like(g))
    return v, (beside[-1] * y[-1]).abs() / length


def fixed_point(
    hessian: Callable[[Tensor], Tensor], g: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """The published iteration v <- v + 0.1 (g - H v) from 0, and its last step's size; diverges
    where H has eigenvalues outside (0, 20)."""
    v = 0.1 * g
    change = g
    for _ in range(steps - 1):
        change = g - hessian(v)
        v = v + 0.1 * change
    return v, change.norm() / g.norm().clamp_min(1e-30)


def _length(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


if __name__ == "__main__":
    raise SystemExit(main(__file__))
