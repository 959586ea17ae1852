"""Supervised training, and what every training loop needs: optimizer, schedule, CUDA graphs."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from .data import NO_AUGMENT, Augment, Batch, Split, batches
from .device import autocast, derived_generator
from .errors import UserError
from .models import count, paused

if TYPE_CHECKING:
    from .run import Run

Schedule = Literal["constant", "cosine", "onecycle", "plateau", "triangular"]
TRIANGLE = (0.2, 0.23, 0.07)
"""Of the schedule triangular: the first rate as a share of the peak's, the share of the steps at
which the peak is reached, and the last rate as a share of the peak's (K. Jordan, 2024,
https://arxiv.org/abs/2404.00498, as LOOKAHEAD)."""
LOOKAHEAD_STEPS, LOOKAHEAD_DECAY = 5, 0.95
"""Steps between two updates of the slow weights, and how much of the slow weights they keep at the
end of the training for each step; before, this share grows with the cube of the progress."""
BY_STEP = ("onecycle", "triangular")
"""Schedules that change the rate after each step; all others after each epoch."""
WORTH_A_GRAPH = 200
"""Steps from which on a training on a GPU runs as CUDA graphs (performance/gpu.py)."""
ROUND = 50
"""Steps between two checkpoints of a training that is counted in steps."""


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; the flags of attacks say what each field does."""

    epochs: int
    batch_size: int
    lr: float
    """Learning rate; the peak with the schedules onecycle and triangular."""
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    bias_lr: float = 1.0
    """Learning rate of the biases of batch normalisation, as a multiple of `lr`."""
    label_smoothing: float = 0.0
    lookahead: bool = False
    optimizer: Literal["sgd", "adam"] = "sgd"
    amsgrad: bool = False
    schedule: Schedule = "cosine"
    schedule_epochs: int | None = None
    """Length of the cosine in epochs; None: as long as the training."""
    augment: Augment = NO_AUGMENT
    alternate_flip: bool = False
    """Mirror an image in every other epoch, where `augment` mirrors images."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy with label smoothing, (N, K), int64 (N,) -> ()."""
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


def train(
    model: nn.Module, split: Split, recipe: Recipe, run: "Run", *, stage: str = "train"
) -> None:
    """Train a model in place by cross-entropy on the given labels.

    Args:
        model: images (B, C, H, W) -> logits (B, K).
        split: the training set.
        recipe: epochs, optimizer, schedule and augmentation.
        run: the context of the attack or defense.
        stage: name of the stage, under which a killed run continues.
    """
    # The forward passes are captured for the modes of a training.
    optimizer = make_optimizer(model, recipe)
    scheduler = LRSchedule(optimizer, recipe, len(split))
    lookahead = Lookahead(model, recipe, len(split))
    steps = recipe.epochs * (len(split) // recipe.batch_size)
    forward = Forward(model.train(), run, split, steps, recipe.batch_size)
    first = _mirrored_first(split, recipe, run)

    for epoch in run.epochs(
        stage,
        recipe.epochs,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        lookahead=lookahead,
    ):
        model.train()
        for batch in batches(
            split,
            recipe.batch_size,
            device=run.device,
            generator=run.generator,
            augment=recipe.augment,
            drop_last=True,
            mirrored=None if first is None else first ^ (epoch % 2 == 1),
        ):
            # Logits are float32 again before the loss, whatever the precision.
            run.step(optimizer, recipe.loss(forward(batch.images).float(), batch.labels))
            scheduler.after_step()
            lookahead.after_step()
        scheduler.after_epoch(run.mean("loss"))


def _mirrored_first(split: Split, recipe: Recipe, run: "Run") -> Tensor | None:
    """Draw which images are mirrored in the first epoch, bool (N,), where epochs alternate."""
    if not (recipe.alternate_flip and recipe.augment.flip):
        return None
    # Drawn from the seed alone, so that a continued training has the same.
    generator = derived_generator(run.seed, "mirrored first")
    return torch.rand(len(split), generator=generator) < 0.5


class Forward:
    """The forward passes of a training, as CUDA graphs on a GPU: images -> logits.

    On a GPU a step of a small network is some hundred kernels, each shorter than its launch from
    Python. If there are steps enough, forward and backward become a CUDA graph each for batches of
    the given sizes. Batches of other sizes go the ordinary way. The kernels are those that would
    have run.

    Modes of the model's parts, and which parameters require gradients, must not change. After each
    call there is at most one backward pass.
    """

    def __init__(
        self, model: nn.Module, run: "Run", split: Split, steps: int, *batch_sizes: int
    ) -> None:
        """Capture the graphs, if there are steps enough.

        Args:
            model: in the modes that the training has.
            run: its precision is that of the passes.
            split: the training set, for the shape of its images.
            steps: steps of the whole training.
            batch_sizes: sizes of the batches that it has.
        """
        self._model, self._run = model, run
        self._graphs: dict[torch.Size, nn.Module] = {}
        if run.device.type == "cuda" and steps >= WORTH_A_GRAPH:
            for size in batch_sizes:
                self._capture(torch.Size((size, *split.images.shape[1:])))

    def __call__(self, images: Tensor) -> Tensor:
        """Pass images (B, C, H, W) through the model under the run's precision."""
        # A captured pass counts nothing by itself.
        if images.shape in self._graphs:
            return count(self._graphs[images.shape](images), len(images))
        with self._run.autocast():
            return self._model(images)

    def _capture(self, shape: torch.Size) -> None:
        """Capture the passes of one shape; a network that cannot be captured is noted.

        Batch statistics, random numbers and counted passes stay as they were.
        """
        # Capture runs a few passes, which move batch statistics: they are put back.
        device, model = self._run.device, _Whole(self._model)
        images = torch.zeros(shape, device=device).to(memory_format=torch.channels_last)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        # Torch waits for the stream that it warns about.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")

        try:
            with (
                torch.cuda.device(device),
                torch.random.fork_rng([device]),
                paused(),
                autocast(device, self._run.precision, cache=False),
            ):
                torch.cuda.make_graphed_callables(model, (images,), allow_unused_input=True)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            self._run.note(
                f"this network's passes cannot be captured as CUDA graphs ({why}): each kernel is"
                " launched by itself"
            )
        else:
            self._graphs[shape] = model
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)


class _Whole(nn.Module):
    """A wrapper whose `forward` the capture replaces, so that the model's own stays."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def random_batches(
    split: Split, steps: int, batch_size: int, run: "Run", *, stage: str, **state: Any
) -> Iterator[Batch]:
    """Yield batches drawn with replacement, not augmented; a checkpoint every ROUND steps.

    Args:
        split: drawn from.
        steps: number of batches.
        batch_size: images in each.
        run: the context of the attack or defense.
        stage: name of the stage.
        state: what changes from step to step, as for `run.epochs`.
    """
    # A stage counts rounds of steps as its epochs, and draws a round's images at once.
    for done in run.epochs(stage, math.ceil(steps / ROUND), **state):
        count = min(ROUND, steps - done * ROUND) * batch_size
        order = torch.randint(len(split), (count,), generator=run.generator)
        yield from batches(split, batch_size, device=run.device, order=order)


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Make the recipe's optimizer, SGD with momentum or Adam, fused into one kernel."""
    # One kernel for all parameters: a step of a small network is bound by launches.
    groups = _groups(model, recipe)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, amsgrad=recipe.amsgrad, fused=True)
    return torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)


def _groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the optimizer's groups of parameters: all, and the biases that have a rate of their
    own."""
    if recipe.bias_lr == 1:
        return [dict(params=model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)]
    biases = [
        module.bias
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.bias is not None
    ]
    if not biases:
        raise UserError(
            f"--bias_lr {recipe.bias_lr:g} is for biases of batch normalisation, and this network"
            " has none: leave it out"
        )
    # The pull of weight decay, rate times decay, is the same for all.
    own = {id(bias) for bias in biases}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in own]
    faster, decay = recipe.lr * recipe.bias_lr, recipe.weight_decay / recipe.bias_lr
    return [
        dict(params=rest, lr=recipe.lr, weight_decay=recipe.weight_decay),
        dict(params=biases, lr=faster, weight_decay=decay),
    ]


class Lookahead:
    """Slow weights that follow the trained ones, and replace them every few steps; part of a
    checkpoint.

    Lookahead Optimizer: k steps forward, 1 step back. M. Zhang, J. Lucas, G. Hinton, J. Ba. NeurIPS
    2019. https://arxiv.org/abs/1907.08610. They follow ever more slowly, and at the end they are
    the model.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, size: int) -> None:
        """Start from the model's weights and running statistics.

        Args:
            model: the trained network.
            recipe: says whether there is lookahead at all, and how long the training is.
            size: number of training images.
        """
        state = model.state_dict().values() if recipe.lookahead else []
        self._fast = [tensor for tensor in state if tensor.is_floating_point()]
        self._slow = [tensor.clone() for tensor in self._fast]
        self._steps = recipe.epochs * max(1, size // recipe.batch_size)
        self._done = 0

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the slow weights towards the trained ones, where it is time, and take them."""
        self._done += 1
        last = self._done == self._steps
        if not self._slow or not (last or self._done % LOOKAHEAD_STEPS == 0):
            return
        # What is kept grows with the third power of progress, so that they follow ever more slowly.
        keep = LOOKAHEAD_DECAY**LOOKAHEAD_STEPS * (self._done / self._steps) ** 3
        if not last:
            torch._foreach_lerp_(self._slow, self._fast, 1 - keep)
        torch._foreach_copy_(self._fast, self._slow)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"slow": self._slow, "done": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        for tensor, kept in zip(self._slow, state["slow"], strict=True):
            tensor.copy_(kept)
        self._done = state["done"]


class LRSchedule:
    """The learning-rate schedule of a training; part of its checkpoint.

    `after_step` follows each step, `after_epoch` each epoch, whatever the schedule is.
    """

    def __init__(self, optimizer: Optimizer, recipe: Recipe, size: int) -> None:
        """Set the first learning rate.

        Args:
            optimizer: its learning rate is changed.
            recipe: names the schedule and its length.
            size: number of training images.
        """
        self._schedule = recipe.schedule
        self._scheduler = _scheduler(optimizer, recipe, max(1, size // recipe.batch_size))

    def after_step(self) -> None:
        """Move on by one step."""
        if self._schedule in BY_STEP:
            self._scheduler.step()

    def after_epoch(self, loss: float) -> None:
        """Move on by one epoch; `loss`, its mean training loss, decides in the plateau schedule."""
        if self._schedule == "plateau":
            self._scheduler.step(loss)
        elif self._schedule not in BY_STEP:
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self._scheduler.load_state_dict(state)


def _scheduler(optimizer: Optimizer, recipe: Recipe, steps: int) -> Any:
    match recipe.schedule:
        case "constant":
            return lr_scheduler.LambdaLR(optimizer, _constant)
        case "cosine":
            return lr_scheduler.CosineAnnealingLR(
                optimizer, T_max=max(1, recipe.schedule_epochs or recipe.epochs)
            )
        case "plateau":
            return lr_scheduler.ReduceLROnPlateau(optimizer)
        case "triangular":
            total = max(1, recipe.epochs * steps)
            return lr_scheduler.LambdaLR(optimizer, partial(_triangle, total=total))
        case "onecycle":
            # The momentum stays what the recipe says; 30 % of the steps warm up from lr / 25.
            return lr_scheduler.OneCycleLR(
                optimizer,
                max_lr=[group["lr"] for group in optimizer.param_groups],
                total_steps=max(1, recipe.epochs * steps),
                cycle_momentum=False,
            )


def _constant(_epoch: int) -> float:
    return 1.0


def _triangle(step: int, total: int) -> float:
    """Return the rate at a step as a share of the peak's."""
    first, at, last = TRIANGLE
    progress = step / total
    if progress < at:
        return first + (1 - first) * progress / at
    return 1 + (last - 1) * (progress - at) / (1 - at)
