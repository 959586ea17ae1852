"""Supervised training, once, and what every loop needs: optimizer, schedule, captured passes."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from .data import NO_AUGMENT, Augment, Batch, Split, batches
from .device import autocast
from .models import count, paused

if TYPE_CHECKING:
    from .run import Run
Schedule = Literal["constant", "cosine", "onecycle", "plateau"]
WORTH_A_GRAPH = 200
"""Steps from which on a training on a GPU is captured (performance/gpu.py)."""
ROUND = 50
"""Steps between two checkpoints of a training that is counted in steps."""


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: Schedule = "cosine"
    schedule_epochs: int | None = None
    """Length of the cosine; None: as long as the training."""
    augment: Augment = NO_AUGMENT


def train(
    model: nn.Module, split: Split, recipe: Recipe, run: "Run", *, stage: str = "train"
) -> None:
    """Cross-entropy on the given labels. Trains `model` in place; resumable under the name
    `stage`."""
    optimizer = make_optimizer(model.parameters(), recipe)
    scheduler = LRSchedule(optimizer, recipe, len(split))
    forward = Forward(
        model.train(),
        run,
        split,
        recipe.epochs * (len(split) // recipe.batch_size),
        recipe.batch_size,
    )
    for _ in run.epochs(
        stage, recipe.epochs, model=model, optimizer=optimizer, scheduler=scheduler
    ):
        model.train()
        for batch in batches(
            split,
            recipe.batch_size,
            device=run.device,
            generator=run.generator,
            augment=recipe.augment,
            drop_last=True,
        ):
            run.step(optimizer, F.cross_entropy(forward(batch.images).float(), batch.labels))
            scheduler.after_step()
        scheduler.after_epoch(run.mean("loss"))


class Forward:
    """A model's passes in `steps` of training under the run's precision: called as the model,
    images -> logits, at most one backward pass a call.

    On a GPU a step of a small network is some hundred kernels, each shorter than its launch from
    Python. Where there are steps enough, forward and backward become a CUDA graph each for batches
    of the given sizes; others go the ordinary way. The kernels are those that would have run. The
    modes of the model's parts and what of it requires gradients must stay as they are.
    """

    def __init__(
        self, model: nn.Module, run: "Run", split: Split, steps: int, *batch_sizes: int
    ) -> None:
        self._model, self._run = model, run
        self._graphs: dict[torch.Size, nn.Module] = {}
        if run.device.type == "cuda" and steps >= WORTH_A_GRAPH:
            for size in batch_sizes:
                self._capture(torch.Size((size, *split.images.shape[1:])))

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape in self._graphs:
            return count(self._graphs[images.shape](images), len(images))
        with self._run.autocast():
            return self._model(images)

    def _capture(self, shape: torch.Size) -> None:
        """Leaves no trace in batch statistics, random numbers and what is counted; no graph where
        the network cannot be captured."""
        device, model = self._run.device, _Whole(self._model)
        images = torch.zeros(shape, device=device).to(memory_format=torch.channels_last)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        # Torch waits for it
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
    """A model whose own `forward` stays as it is: capture replaces this one's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def random_batches(
    split: Split, steps: int, batch_size: int, run: "Run", *, stage: str, **state: Any
) -> Iterator[Batch]:
    """`steps` batches of images as they are, drawn with replacement; resumable, with all of
    `state`, every ROUND steps."""
    for done in run.epochs(stage, math.ceil(steps / ROUND), **state):
        count = min(ROUND, steps - done * ROUND) * batch_size
        order = torch.randint(len(split), (count,), generator=run.generator)
        yield from batches(split, batch_size, device=run.device, order=order)


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> Optimizer:
    """SGD with momentum or Adam, fused into one kernel."""
    if recipe.optimizer == "adam":
        return torch.optim.Adam(
            parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


class LRSchedule:
    """The learning rate's way through a training on `size` images, part of its checkpoint: told of
    every step and every epoch."""

    def __init__(self, optimizer: Optimizer, recipe: Recipe, size: int) -> None:
        self._schedule = recipe.schedule
        self._scheduler = _scheduler(optimizer, recipe, max(1, size // recipe.batch_size))

    def after_step(self) -> None:
        if self._schedule == "onecycle":
            self._scheduler.step()

    def after_epoch(self, loss: float) -> None:
        """`loss`: the epoch's mean training loss, which the plateau schedule goes by."""
        if self._schedule == "plateau":
            self._scheduler.step(loss)
        elif self._schedule != "onecycle":
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
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
        case "onecycle":
            # The momentum stays what the recipe says; 30 % of the steps warm up from lr / 25.
            return lr_scheduler.OneCycleLR(
                optimizer,
                max_lr=recipe.lr,
                total_steps=max(1, recipe.epochs * steps),
                cycle_momentum=False,
            )


def _constant(_epoch: int) -> float:
    return 1.0
