"""Features and predictions of a frozen model on a whole set of images, computed once."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from .data import Split, batches, in_order
from .errors import UserError, described
from .models import Classifier

if TYPE_CHECKING:
    from .run import Run

Network = TypeVar("Network", bound=nn.Module)

STATISTICS = 250
"""Largest number of images of which `adapted` takes batch statistics at once."""


class Features(NamedTuple):
    """What a model computes of each sample: one row each, float32, on the run's device."""

    pooled: Tensor
    """(N, D): the last layer's input."""
    early: Tensor
    """(N, 2 C): mean and standard deviation over positions of the last stage's input."""
    spatial: Tensor
    """float16 (N, C side^2): the last stage's input, averaged to side x side positions. The side is
    4, 2 or 1, the largest with at most 1,024 numbers."""
    logits: Tensor
    """(N, K)."""
    labels: Tensor
    """int64 (N,), as given."""


@torch.no_grad()
def extract(model: Classifier, split: Split, run: "Run") -> Features:
    """Compute the features of a split, in evaluation mode and without augmentation.

    The model is in evaluation mode afterwards. Of an empty split it is asked nothing, and every
    tensor has 0 columns. UserError where its last stage but one gives no single tensor.
    """
    model.eval()
    if not len(split):
        return _no_features(split, run)
    pooled, early, spatial, logits = [], [], [], []
    with last_stage_input(model) as read:
        classifier = _last_layer(model)
        for batch in in_order(split, run.device):
            with run.autocast():
                features = last_features(model, batch.images)
            pooled.append(features.float())
            logits.append(_logits(classifier, pooled[-1]))

            # Two summaries of its feature maps: over all positions, and coarsely by position.
            maps = read()
            early.append(torch.cat([maps.mean((2, 3)), maps.std((2, 3), correction=0)], 1))
            side = next((side for side in (4, 2) if maps.shape[1] * side**2 <= 1024), 1)
            spatial.append(F.adaptive_avg_pool2d(maps, side).flatten(1).half())
    return Features(
        torch.cat(pooled),
        torch.cat(early),
        torch.cat(spatial),
        torch.cat(logits),
        split.labels.to(run.device),
    )


def last_stage_input(model: Classifier) -> contextlib.AbstractContextManager[Callable[[], Tensor]]:
    """Watch the last stage's input, which is the output of the one before: `stage_output`."""
    return stage_output(model, max(0, len(model.stages()) - 2), "its last but one stage")


@contextlib.contextmanager
def stage_output(
    model: Classifier, number: int, called: str = "its last stage"
) -> Iterator[Callable[[], Tensor]]:
    """Watch what a stage gives: inside, the function that is given returns that of the latest
    forward pass, float32 (B, C, H, W).

    Args:
        model: the network.
        number: of the stage; -1 is the last.
        called: the stage's name in errors.

    UserError where it gives no single tensor, or is not passed by itself.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, _inputs: object, output: object) -> None:
        if not isinstance(output, Tensor):
            raise UserError(
                f"the features of this network cannot be read: {called}"
                f" ({type(module).__name__}) gives no single tensor"
            )
        seen.append(output.float())

    channels = model.network.feature_info[number].get("num_chs")

    def read() -> Tensor:
        if not seen:
            raise UserError(
                f"the features of this network cannot be read: {called} is not passed by itself"
            )
        return maps_of(seen.pop(), channels)

    hook = model.stages()[number].register_forward_hook(keep)
    try:
        yield read
    finally:
        hook.remove()


def last_features(model: Classifier, images: Tensor) -> Tensor:
    """Compute the last layer's input, (B, D), of images (B, C, H, W) in [0, 1]."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


def _last_layer(model: Classifier) -> nn.Module:
    """Return the last layer; UserError for a network that has several."""
    classifier: object = model.get_classifier()
    if not isinstance(classifier, nn.Module) or isinstance(classifier, nn.ModuleList):
        raise UserError(
            "the features of this network cannot be read: it has several last layers"
            f" ({type(model.network).__name__})"
        )
    return classifier


def _logits(classifier: nn.Module, pooled: Tensor) -> Tensor:
    """Compute logits (N, K) of the last layer's input, (N, D); UserError where it is no such."""
    try:
        logits = classifier(pooled)
    except (RuntimeError, TypeError, IndexError) as error:
        raise UserError(
            "the features of this network cannot be read: its last layer"
            f" ({type(classifier).__name__}) does not take {described(pooled)}"
        ) from error
    found: Tensor = logits
    return found


def _no_features(split: Split, run: "Run") -> Features:
    """Return the features of no image, whose widths only a forward pass could tell."""
    empty = torch.zeros(0, 0, device=run.device)
    return Features(empty, empty, empty.half(), empty, split.labels.to(run.device))


@torch.no_grad()
def predictions(model: nn.Module, split: Split, run: "Run") -> Tensor:
    """Classify a split: int64 (N,) on the run's device. The model is in evaluation mode
    afterwards."""
    model.eval()
    found = []
    for batch in in_order(split, run.device):
        with run.autocast():
            found.append(model(batch.images).argmax(1))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=run.device)


def adapted(model: Network, split: Split, run: "Run") -> Network:
    """Copy a model and give its batch normalisation the means and variances of a split.

    AdaBN (Li et al., 2016, https://arxiv.org/abs/1603.04779): a shift that all images of the split
    have in common is removed. Of a single image there are no statistics: the copy is then as the
    model.
    """
    reader = copy.deepcopy(model)
    if len(split) > 1:
        order = torch.randperm(len(split), generator=run.generator)
        # Batches of one size, because their statistics count alike.
        size = math.ceil(len(split) / math.ceil(len(split) / STATISTICS))
        shown = batches(split, size, device=run.device, order=order)
        with run.autocast():
            update_bn((batch.images for batch in shown), reader)
    return reader


def maps_of(x: Tensor, channels: int | None = None) -> Tensor:
    """Bring a stage's output to (N, C, ., .): from feature maps (N, C, H, W), or (N, H, W, C) as in
    Swin, from tokens (N, T, C), or from one vector (N, C). `channels`: C, where it is known."""
    # Of images that are not square, only the number of channels tells the two apart.
    last = x.dim() == 4 and x.shape[1] != channels == x.shape[3]
    if last or (x.dim() == 4 and x.shape[1] == x.shape[2] != x.shape[3]):
        return x.movedim(3, 1)
    if x.dim() == 3:
        return x.movedim(2, 1).unsqueeze(3)
    return x if x.dim() == 4 else x[:, :, None, None]
