"""Supervised training, and what every training loop needs: optimizer, schedule, CUDA graphs."""

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
"""Steps from which on a training on a GPU runs as CUDA graphs (performance/gpu.py)."""
ROUND = 50
"""Steps between two checkpoints of a training that is counted in steps."""


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained; the flags of attacks say what each field does."""

    epochs: int
    batch_size: int
    lr: float
    """Learning rate; the peak with the schedule onecycle."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    optimizer: Literal["sgd", "adam"] = "sgd"
    amsgrad: bool = False
    schedule: Schedule = "cosine"
    schedule_epochs: int | None = None
    """Length of the cosine in epochs; None: as long as the training."""
    augment: Augment = NO_AUGMENT


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
    optimizer = make_optimizer(model.parameters(), recipe)
    scheduler = LRSchedule(optimizer, recipe, len(split))
    steps = recipe.epochs * (len(split) // recipe.batch_size)
    forward = Forward(model.train(), run, split, steps, recipe.batch_size)

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
            # Logits are float32 again before the loss, whatever the precision.
            run.step(optimizer, F.cross_entropy(forward(batch.images).float(), batch.labels))
            scheduler.after_step()
        scheduler.after_epoch(run.mean("loss"))


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


def make_optimizer(parameters: Iterable[nn.Parameter], recipe: Recipe) -> Optimizer:
    """Make the recipe's optimizer, SGD with momentum or Adam, fused into one kernel."""
    # One kernel for all parameters: a step of a small network is bound by launches.
    if recipe.optimizer == "adam":
        return torch.optim.Adam(
            parameters,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            amsgrad=recipe.amsgrad,
            fused=True,
        )
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


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
        # Only this schedule counts steps; all others count epochs.
        if self._schedule == "onecycle":
            self._scheduler.step()

    def after_epoch(self, loss: float) -> None:
        """Move on by one epoch; `loss`, its mean training loss, decides in the plateau schedule."""
        if self._schedule == "plateau":
            self._scheduler.step(loss)
        elif self._schedule != "onecycle":
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
