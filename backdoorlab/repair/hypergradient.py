"""The implicit hypergradient: how a loss changes with the weights when a perturbation follows them.

delta*(theta) minimises an inner loss L_in in an L2 ball. The total derivative of an outer loss is

    d L_out / d theta = grad_theta L_out - (d^2 L_in / d delta d theta)^T v,
    A v = g = grad_delta L_out,

with A the Hessian of L_in in delta (implicit function theorem). On the ball's surface delta can
move along the surface only, so A is the Hessian there, with the surface's curvature. A v = g is
solved in K Lanczos steps, which cannot diverge.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError

Solver = Callable[[Callable[[Tensor], Tensor], Tensor, int], tuple[Tensor, Tensor]]
"""Hessian product, right-hand side g, number of products -> v and its residual, as a share of
|g|."""


@dataclass(frozen=True)
class Hypergradient:
    """The total derivative, and what it is made of."""

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
    steps: int,
    damping: float,
    solve: Solver | None = None,
) -> Hypergradient:
    """Total derivative of outer(delta*(theta), theta), with delta* the minimum of inner in a ball.

    Args:
        outer, inner: losses of a perturbation, at the present weights.
        delta: (1, C, H, W), taken for the minimum.
        radius: of the ball; infinite for none.
        steps: products with the Hessian; 0 leaves the implicit term out.
        damping: of `lanczos`.
        solve: another solver, on the Hessian over all directions.
    """
    # The first-order version needs no graph of the inner loss.
    delta = delta.detach().requires_grad_(steps > 0)
    loss = outer(delta)
    nothing = torch.zeros((), device=delta.device)
    if steps == 0:
        first_order = torch.autograd.grad(loss, weights, materialize_grads=True)
        return Hypergradient(list(first_order), loss, nothing, nothing)

    # g = grad_delta L_out and grad_theta L_out, and the inner gradient, to be differentiated again.
    # A weight that no pass uses, such as a cached bias of LeViT, has a gradient of zeros.
    g, *direct = torch.autograd.grad(loss, [delta, *weights], materialize_grads=True)
    (slope,) = torch.autograd.grad(inner(delta), delta, create_graph=True)

    def hessian(v: Tensor) -> Tensor:
        return torch.autograd.grad(slope, delta, v, retain_graph=True)[0]

    # A v = g, over the directions in which delta may move.
    if solve is not None:
        v, residual = solve(hessian, g, steps)
    else:
        project_tangent, curvature = surface(delta.detach(), slope.detach(), radius)

        def restricted(v: Tensor) -> Tensor:
            return project_tangent(hessian(v) + curvature * v)

        v, residual = lanczos(restricted, project_tangent(g), steps, damping)

    # The implicit term, (d^2 L_in / d delta d theta)^T v.
    implicit = torch.autograd.grad(slope, weights, v, materialize_grads=True)
    size = _length(implicit) / _length(direct).clamp_min(1e-30)
    gradients = [a - b for a, b in zip(direct, implicit, strict=True)]
    return Hypergradient(gradients, loss, size, residual)


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


def surface(
    delta: Tensor, slope: Tensor, radius: float
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Find where delta may move, and the curvature of the surface that it lies on.

    Inside the ball every direction is free. On its surface, where a descent would leave the ball,
    only the tangent ones are.

    Args:
        delta: (1, C, H, W).
        slope: gradient of the inner loss there.

    Returns:
        a projection to the free directions; and what the surface adds to the Hessian, ():
        Lagrange's multiplier of |delta|^2 / 2.
    """
    squared = delta.square().sum()
    multiplier = -(slope * delta).sum() / squared.clamp_min(1e-30)
    if squared.sqrt() < radius * (1 - 1e-4) or multiplier <= 0:
        return lambda v: v, torch.zeros_like(squared)
    return lambda v: v - delta * ((v * delta).sum() / squared), multiplier


def lanczos(
    matvec: Callable[[Tensor], Tensor], g: Tensor, steps: int, damping: float
) -> tuple[Tensor, Tensor]:
    """Solve (A + shift) v = g in the Krylov space of `steps` products with the symmetric A.

    shift = damping times the largest eigenvalue seen, plus twice the most negative one: delta has
    not reached a minimum where A has such, and the inner problem is then the one with a proximal
    term that makes it convex. So |v| is at most |g| over the damping. With shift 0 this is the
    method of conjugate gradients, exact after as many steps as there are dimensions.

    Returns:
        v, of the shape of g; and |(A + shift) v - g| / |g|, ().
    """
    length = g.norm()
    if length == 0:
        return torch.zeros_like(g), torch.zeros_like(length)

    # An orthonormal basis in which A is tridiagonal.
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

    # The small system, by its eigenvalues.
    off = torch.stack(beside[: len(diagonal) - 1]) if len(diagonal) > 1 else length.new_zeros(0)
    t = (torch.stack(diagonal).diag() + off.diag(1) + off.diag(-1)).double().cpu()
    values, vectors = torch.linalg.eigh(t)
    shift = damping * values.abs().max() + 2 * (-values.min()).clamp_min(0)
    y = (vectors @ (vectors[0] / (values + shift).clamp_min(1e-30))).to(g) * length

    v = sum((q * c for q, c in zip(basis, y, strict=False)), torch.zeros_like(g))
    return v, (beside[-1] * y[-1]).abs() / length


def _length(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()
