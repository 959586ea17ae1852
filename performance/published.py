"""The conventional implementations that ours are measured against, transcribed from descriptions.

Images are loaded one PIL image at a time in DataLoaders. Models run in fp32 in torch's default
memory format. Clean accuracy, ASR and RA each take a pass after every epoch.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from backdoorlab.data import NO_AUGMENT, Augment, Split
from backdoorlab.engine import Recipe
from backdoorlab.poison import Poison

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""One step of a defense on images and labels, which returns the perturbation and the loss."""


class Images(TorchDataset[tuple[Tensor, int]]):
    """Images that pass through torchvision's transforms one PIL image at a time."""

    def __init__(
        self,
        split: Split,
        augment: Augment = NO_AUGMENT,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        self.images = [transforms.functional.to_pil_image(image) for image in split.images.cpu()]
        self.labels = split.labels.tolist()
        steps: list[Any] = []
        if augment.crop_padding:
            steps.append(
                transforms.RandomCrop(tuple(split.images.shape[2:]), padding=augment.crop_padding)
            )
        if augment.flip:
            steps.append(transforms.RandomHorizontalFlip())
        steps.append(transforms.ToTensor())
        if normalize is not None:
            steps.append(transforms.Normalize(*normalize))
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.transform(self.images[number]), self.labels[number]


@dataclass(frozen=True)
class Tests:
    """The test data of clean accuracy, ASR and RA, one loader for each."""

    clean_accuracy: DataLoader[Any]
    asr: DataLoader[Any]
    robust_accuracy: DataLoader[Any]

    @staticmethod
    def of(test: Split, triggered: Poison, batch_size: int, workers: int) -> "Tests":
        splits = (test, triggered.triggered(), Split(triggered.images, triggered.original_labels))
        return Tests(
            *(DataLoader(Images(split), batch_size, num_workers=workers) for split in splits)
        )

    def score(self, model: nn.Module) -> dict[str, float]:
        """Return the scores, shares in [0, 1], by name."""
        return {
            name: _accuracy(model, getattr(self, name))
            for name in ("clean_accuracy", "asr", "robust_accuracy")
        }


@torch.no_grad()
def _accuracy(model: nn.Module, stream: DataLoader[Any]) -> float:
    model.eval()
    device, right, seen = next(model.parameters()).device, 0, 0
    for x, y in stream:
        right += (model(x.to(device)).argmax(1) == y.to(device)).sum().item()
        seen += len(y)
    return right / seen


def training(
    model: nn.Module, train: Split, recipe: Recipe, tests: Tests, workers: int
) -> dict[str, float]:
    """Train with SGD and a one-cycle or cosine schedule, evaluate after each epoch.

    Returns:
        The scores after the last epoch.
    """
    device = next(model.parameters()).device
    torch.backends.cudnn.allow_tf32 = True  # torch's default, which ours turns off
    stream = DataLoader(
        Images(train, recipe.augment),
        recipe.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    total = recipe.epochs * len(stream)
    schedule: Any = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=total, cycle_momentum=False
    )
    if recipe.schedule != "onecycle":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)

    scores: dict[str, float] = {}
    for _ in range(recipe.epochs):
        model.train()
        for x, y in stream:
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        scores = tests.score(model)
    return scores


def sau(
    model: nn.Module,
    reference: nn.Module,
    trusted: Split,
    rounds: int,
    batch_size: int,
    lr: float,
    tests: Tests,
    workers: int,
) -> dict[str, float]:
    """Run SAU, and evaluate after each round; both models stay in evaluation mode.

    Returns:
        The scores after the last round.
    """
    device = next(model.parameters()).device
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    stream = DataLoader(Images(trusted), batch_size, shuffle=True, num_workers=workers)
    step, scores = sau_step(model.eval(), reference.eval(), lr), {}
    for _ in range(rounds):
        for x, y in stream:
            step(x.to(device), y.to(device))
        scores = tests.score(model)
    return scores


def sau_step(model: nn.Module, reference: nn.Module, lr: float = 1e-4) -> Step:
    """Build the published step of SAU: 24 forward and 12 backward passes per image.

    It computes all weight gradients, classifies the clean images again at every step of the search,
    and keeps the reference in the graph.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, amsgrad=True)

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        # Shared adversarial examples, by five steps of PGD.
        delta = torch.full_like(x, 0.2)
        for _ in range(5):
            delta = delta.detach().requires_grad_()
            clean, clean_reference = model(x), reference(x)
            seen, seen_reference = model(x + delta), reference(x + delta)
            left, left_reference = (
                seen.argmax(1) != clean.argmax(1),
                seen_reference.argmax(1) != clean_reference.argmax(1),
            )
            shared = left & left_reference & (seen.argmax(1) == seen_reference.argmax(1))
            adversarial = (
                -F.cross_entropy(seen, y, reduction="none") * ~left
                - F.cross_entropy(seen_reference, y, reduction="none") * ~left_reference
            )
            p, q = seen.softmax(1).clamp_min(1e-8), seen_reference.softmax(1).clamp_min(1e-8)
            mean = 0.5 * (p + q)
            divergence = (0.5 * p * p.log() + 0.5 * q * q.log() - mean * mean.log()).sum(
                1
            ) * ~shared
            loss = (0.01 * 0.5 * adversarial + divergence).sum() / len(x)
            if shared.all():
                break
            loss.backward()
            assert delta.grad is not None
            delta = (delta.detach() - 0.2 * delta.grad.sign()).clamp(-0.2, 0.2)

        # Unlearn those that the reference classifies wrongly.
        delta = delta.detach()
        clean, seen = model(torch.cat([x, x + delta])).chunk(2)
        clean_reference, seen_reference = reference(x), reference(x + delta)
        wrong = seen_reference.argmax(1)
        fooled = (wrong != y) & (wrong != clean_reference.argmax(1))
        p = seen.softmax(1)
        of_wrong = p.gather(1, wrong[:, None]).squeeze(1)
        others = p.scatter(1, wrong[:, None], 0).sum(1)
        first, second = (
            -(1e-6 + others.clamp_max(0.999)).log(),
            -(1 + 1e-6 - of_wrong.clamp_min(0.001)).log(),
        )
        loss = F.cross_entropy(clean, y) + ((first + second) / 2 * fooled).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return delta, loss.detach()

    return step


def ibau_round(
    model: nn.Module,
    stream: DataLoader[Any],
    shape: Sequence[int],
    steps: int = 5,
    lr: float = 1e-3,
) -> float:
    """Run a round of I-BAU as its authors do.

    The search uses predicted labels and also computes gradients of the weights. The implicit term
    comes from a fixed-point iteration that starts at 0.

    Args:
        model: is changed in place.
        stream: batches of trusted images.
        shape: (C, H, W).
        steps: of the fixed-point iteration.
        lr: of Adam.

    Returns:
        The L2 norm of delta.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    device, weights = next(model.parameters()).device, list(model.parameters())
    model.eval()

    # Inner problem: one perturbation for all images.
    delta = torch.zeros(1, *shape, device=device, requires_grad=True)
    search = torch.optim.SGD([delta], lr=10)
    kept = []
    for x, y in stream:
        x, y = x.to(device), y.to(device)
        kept.append((x, y))
        with torch.no_grad():
            predicted = model(x).argmax(1)
        loss = -F.cross_entropy(model(x + delta), predicted) + 0.001 * delta.square().sum()
        search.zero_grad()
        loss.backward()
        search.step()

    # Outer problem: unlearn it, with the total derivative.
    first_x, first_y = kept[0]
    for x, y in kept:
        carry = torch.randperm(len(x), device=device)[: int(0.01 * len(x))]
        shown = x.clone()
        shown[carry] = shown[carry] + delta
        outer = F.cross_entropy(model(shown), y)

        pull = torch.autograd.grad(outer, delta, retain_graph=True, allow_unused=True)[0]
        direct = torch.autograd.grad(outer, weights)
        inner = -F.cross_entropy(model(first_x + delta), first_y) + 0.001 * delta.square().sum()
        moved = delta - 0.1 * torch.autograd.grad(inner, delta, create_graph=True)[0]
        g = torch.zeros_like(delta) if pull is None else pull
        v = torch.zeros_like(delta)
        for _ in range(steps):
            v = torch.autograd.grad(moved, delta, v, retain_graph=True)[0] + g

        implicit = torch.autograd.grad(moved, weights, v, allow_unused=True)
        optimizer.zero_grad()
        for weight, a, b in zip(weights, direct, implicit, strict=True):
            weight.grad = a if b is None else a + b
        optimizer.step()
    return delta.detach().norm().item()


def anti_learning(
    model: nn.Module,
    head: nn.Linear,
    split: Split,
    pool: Tensor,
    epochs: int,
    batch_size: int,
    workers: int,
) -> None:
    """Run DAU's first stage as in its port.

    Only the last layer is trained, but every image passes through the whole network in every epoch.

    Args:
        model: the poisoned model, with `head` as its last layer.
        head: is trained in place.
        split: the training set.
        pool: bool (N,), the samples to unlearn.
        epochs: passes over the set.
        batch_size: images per step.
        workers: of the DataLoader.
    """
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    device, flags = next(model.parameters()).device, pool.tolist()
    stream = DataLoader(
        _Flagged(Images(split), flags), batch_size, shuffle=True, num_workers=workers
    )
    for _ in range(epochs):
        for x, y, poisoned in stream:
            x, y, poisoned = x.to(device), y.to(device), poisoned.to(device)
            logits = model(x)
            p = logits.softmax(1).gather(1, y[:, None]).squeeze(1)
            loss = (
                F.cross_entropy(logits, y, reduction="none") * ~poisoned
                - 1000 * (1 - p + 1e-6).log() * poisoned
            ).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class _Flagged(TorchDataset[Any]):
    """Images and labels with one flag for each image."""

    def __init__(self, images: Images, flags: list[bool]) -> None:
        self.images, self.flags = images, flags

    def __len__(self) -> int:
        return len(self.flags)

    def __getitem__(self, number: int) -> Any:
        return *self.images[number], self.flags[number]


class _Pool(TorchDataset[Any]):
    """One of ASD's pools: a deep copy of the whole data set, of which some rows are used.

    Images are augmented once, or twice for the unlabelled pool.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, index: np.ndarray, twice: bool
    ) -> None:
        self.images, self.labels = copy.deepcopy(images), copy.deepcopy(labels)
        self.index, self.twice = index, twice
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Any:
        image = self.images[self.index[number]]
        if self.twice:
            return self.transform(image), self.transform(image)
        return self.transform(image), self.labels[self.index[number]]


def asd_epoch(
    model: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    clean: np.ndarray,
    iterations: int,
    batch_size: int,
    workers: int,
    classes: int,
) -> int:
    """Run part of an epoch of ASD: copied pools, restarted loaders, five forward passes per step.

    Args:
        model: is trained in place.
        images: uint8 (N, H, W, C).
        labels: int64 (N,).
        clean: bool (N,), the labelled pool; all others are unlabelled.
        iterations: number of steps.
        batch_size: images per pool and step.
        workers: of each DataLoader.
        classes: number of classes.

    Returns:
        The number of images trained on.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    device = next(model.parameters()).device

    def loader(index: np.ndarray, twice: bool) -> DataLoader[Any]:
        pool = _Pool(images, labels, index, twice)
        return DataLoader(
            pool,
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )

    labelled, unlabelled = (
        loader(np.flatnonzero(clean), False),
        loader(np.flatnonzero(~clean), True),
    )
    first: Iterator[Any] = iter(labelled)
    second: Iterator[Any] = iter(unlabelled)
    for step in range(iterations):
        (x, y), first = _next(first, labelled)
        (u1, u2), second = _next(second, unlabelled)
        x, y, u1, u2 = (tensor.to(device, non_blocking=True) for tensor in (x, y, u1, u2))

        # Guess the labels of the unlabelled images from two views, and sharpen the guess.
        with torch.no_grad():
            p = (model(u1).softmax(1) + model(u2).softmax(1)) / 2
            guess = p**2 / (p**2).sum(1, keepdim=True)

        # Mix images and labels.
        inputs = torch.cat([x, u1, u2])
        targets = torch.cat([F.one_hot(y, classes).float(), guess, guess])
        share = np.random.beta(0.75, 0.75)
        share = max(share, 1 - share)
        order = torch.randperm(len(inputs), device=device)
        mixed, mixed_targets = (
            share * inputs + (1 - share) * inputs[order],
            share * targets + (1 - share) * targets[order],
        )

        # Classify them in interleaved batches, as batch norm needs.
        chunks = _interleave(list(mixed.split(batch_size)), batch_size)
        logits = _interleave([model(chunk) for chunk in chunks], batch_size)
        labelled_loss = -(mixed_targets[:batch_size] * logits[0].log_softmax(1)).sum(1).mean()
        unlabelled_loss = (
            (torch.cat(logits[1:]).softmax(1) - mixed_targets[batch_size:]).square().mean()
        )
        loss = labelled_loss + 15 * step / iterations * unlabelled_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 3 * batch_size * iterations


def _next(stream: Iterator[Any], loader: DataLoader[Any]) -> tuple[Any, Iterator[Any]]:
    try:
        return next(stream), stream
    except StopIteration:
        stream = iter(loader)
        return next(stream), stream


def _interleave(parts: list[Tensor], batch: int) -> list[Tensor]:
    """Swap slices between equal parts, so that each contains some of all; its own inverse."""
    count = len(parts)
    sizes = [batch // count + (1 if i >= count - batch % count else 0) for i in range(count)]
    slices = [list(part.split(sizes)) for part in parts]
    for i in range(1, count):
        slices[0][i], slices[i][i] = slices[i][i], slices[0][i]
    return [torch.cat(part) for part in slices]
