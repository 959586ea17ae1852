"""Recover the smallest trigger of each class: a mask and a pattern, as Neural Cleanse does.

Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks. B. Wang, Y. Yao, S.
Shan, H. Li, B. Viswanath, H. Zheng, B. Y. Zhao. S&P 2019. https://doi.org/10.1109/SP.2019.00031

For each class, a mask m and a pattern p are learnt so that images (1 - m) x + m p are seen as that
class: the loss is CE + c |m|. c rises while they are, and falls while they are not. All classes
learn side by side: their images are one batch for the model.

Departs from the published code: images of the class itself do not count, for they need no trigger.
After each pass the triggers are judged by all images, so that a mask that is kept works. All
classes have the same number of passes; there a class ends where nothing more is gained. The search
sees images as they are (BackdoorBench crops and mirrors them).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Split, batches, in_order
from ..perturb import frozen
from ..run import Run
from .every_target import mean_of_others, of_others, parts


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings of the search. A method inherits these fields, which makes them its flags."""

    search_epochs: int = 80
    """Passes over the trusted images of the search, at most. More find smaller triggers."""
    search_batch_size: int = 256
    """Images a step of the search, for each class. Smaller batches take more steps."""
    search_lr: float = 0.1
    """Adam's learning rate of masks and patterns, betas 0.5 and 0.9."""
    size_weight: float = 1e-3
    """First value of c, the weight of the mask's size; until the trigger works it is 0."""
    size_factor: float = 2.0
    """What c is multiplied by while the trigger works; while it does not, c is divided by its power
    of 1.5."""
    works: float = 0.99
    """Share of the images that a trigger must turn to work. Less finds smaller triggers, also where
    there is no backdoor."""
    patience: int = 5
    """Passes in a row that work, or do not, after which c changes."""

    RANGES: ClassVar[dict[str, str]] = {
        "search_epochs": ">= 0",
        "search_batch_size": ">= 1",
        "search_lr": ">= 0",
        "size_weight": ">= 0",
        "size_factor": "> 1",
        "works": "[0, 1]",
        "patience": ">= 1",
    }


class Search(nn.Module):
    """A mask and a pattern for each of K classes, and how far the search for each has come."""

    best_masks: Tensor
    """(K, 1, H, W): the smallest that worked, at first the whole image."""
    best_patterns: Tensor
    """(K, C, H, W)."""
    weights: Tensor
    """(K,): c."""
    streaks: Tensor
    """(2, K): passes in a row that worked, and that did not."""

    def __init__(self, classes: int, image_shape: Sequence[int]) -> None:
        super().__init__()
        channels, height, width = image_shape
        whole = torch.ones(classes, 1, height, width)
        # tanh / 2 + 1 / 2 of these lies in (0, 1).
        self.mask = nn.Parameter(whole.clone())
        self.pattern = nn.Parameter(whole.repeat(1, channels, 1, 1))
        self.register_buffer("best_masks", whole)
        self.register_buffer("best_patterns", 0.5 * whole.repeat(1, channels, 1, 1))
        self.register_buffer("weights", torch.zeros(classes))
        self.register_buffer("streaks", torch.zeros(2, classes))

    def triggers(self) -> tuple[Tensor, Tensor]:
        """Return the masks and patterns of now."""
        return self.mask.tanh() / 2 + 0.5, self.pattern.tanh() / 2 + 0.5

    @torch.no_grad()
    def judge(self, rates: Tensor, config: SearchConfig) -> None:
        """Keep smaller masks that work, and move c; `rates`, (K,), are shares of images turned."""
        works = rates >= config.works
        masks, patterns = self.triggers()
        smaller = works & (size(masks) < size(self.best_masks))
        self.best_masks[smaller], self.best_patterns[smaller] = masks[smaller], patterns[smaller]

        # c changes after `patience` passes in a row of one kind, and then they are counted anew.
        self.streaks.add_(1).mul_(torch.stack([works, ~works]))
        rises, falls = self.streaks >= config.patience
        higher = torch.where(
            self.weights > 0, config.size_factor * self.weights, config.size_weight
        )
        self.weights[rises] = higher[rises]
        self.weights[falls] /= config.size_factor**1.5
        self.streaks.mul_(~(rises | falls))


def recover_masks(
    model: nn.Module, trusted: Split, num_classes: int, config: SearchConfig, run: Run
) -> tuple[Tensor, Tensor]:
    """Search the smallest trigger of each class.

    Args:
        model: in evaluation mode.
        trusted: images that the triggers learn from.
        num_classes: K.
        config: the search.
        run: the context of the defense.

    Returns:
        masks (K, 1, H, W) and patterns (K, C, H, W) in [0, 1]; where no trigger has worked the mask
        is the whole image, and the pattern grey.
    """
    classes = torch.arange(num_classes, device=run.device)
    search = Search(num_classes, trusted.images.shape[1:]).to(run.device)
    with frozen(model):
        learn(model, trusted, search, classes, config, run)
    return search.best_masks, search.best_patterns


def learn(
    model: nn.Module,
    trusted: Split,
    search: Search,
    classes: Tensor,
    config: SearchConfig,
    run: Run,
) -> None:
    """Train the masks and patterns in place. Arguments as in `recover_masks`."""
    optimizer = torch.optim.Adam(search.parameters(), lr=config.search_lr, betas=(0.5, 0.9))

    for _ in run.epochs("recover", config.search_epochs, search=search, optimizer=optimizer):
        for batch in batches(
            trusted, config.search_batch_size, device=run.device, generator=run.generator
        ):
            counts = of_others(batch.labels, classes)
            loss = torch.zeros((), device=run.device)
            gradients = [torch.zeros_like(parameter) for parameter in search.parameters()]
            for part in parts(len(classes), len(batch.labels), run.device):
                masks, patterns = (values[part] for values in search.triggers())
                logits = stamped_logits(model, batch.images, masks, patterns, run)

                # CE to the class, of the images of other classes, + c |m|.
                wanted = classes[part, None].expand(-1, len(batch.labels))
                losses = F.cross_entropy(logits.movedim(2, 1), wanted, reduction="none")
                sizes = search.weights[part] * size(masks)
                aimed = (mean_of_others(losses, counts[part]) + sizes).sum()
                loss += aimed.detach()
                slopes = torch.autograd.grad(aimed, list(search.parameters()))
                for total, slope in zip(gradients, slopes, strict=True):
                    total += slope
            run.step(optimizer, loss, gradients)
        search.judge(hit_rates(model, trusted, search, classes, run), config)


@torch.no_grad()
def hit_rates(
    model: nn.Module, trusted: Split, search: Search, classes: Tensor, run: Run
) -> Tensor:
    """Compute the share of the images of other classes that each trigger turns, (K,)."""
    masks, patterns = search.triggers()
    turned, seen = torch.zeros(2, len(classes), device=run.device)
    for batch in in_order(trusted, run.device):
        counts = of_others(batch.labels, classes)
        seen += counts.sum(1)
        for part in parts(len(classes), len(batch.labels), run.device):
            logits = stamped_logits(model, batch.images, masks[part], patterns[part], run)
            hit = logits.argmax(2) == classes[part, None]
            turned[part] += (hit * counts[part]).sum(1)
    return turned / seen.clamp_min(1)


def stamped_logits(
    model: nn.Module, x: Tensor, masks: Tensor, patterns: Tensor, run: Run
) -> Tensor:
    """Classify each image with each trigger. (n, C, H, W), (g, 1, H, W), (g, C, H, W) -> float32
    (g, n, K)."""
    stamped = torch.lerp(x[None], patterns[:, None], masks[:, None])
    with run.autocast():
        logits: Tensor = model(stamped.flatten(0, 1))
    return logits.float().view(len(masks), len(x), -1)


def size(masks: Tensor) -> Tensor:
    """|m|: sum of each mask, (K, 1, H, W) -> (K,), in pixels."""
    return masks.flatten(1).sum(1)
