"""The published steps of defenses, transcribed plainly from their description: what ours are measured against.

Images are made as in the published code, one PIL image at a time in DataLoaders, and models run in fp32.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

Step = Callable[[], tuple[Tensor, Tensor]]
"""One step of a defense; returns the perturbation and the loss."""


def sau_step(model: nn.Module, reference: nn.Module, x: Tensor, y: Tensor) -> Step:
    """24 forwards and 12 backwards with all weight gradients: clean images again at every step, the reference in the graph."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, amsgrad=True)

    def step() -> tuple[Tensor, Tensor]:
        delta = torch.full_like(x, 0.2)
        for _ in range(5):
            delta = delta.detach().requires_grad_()
            clean, clean_reference = model(x), reference(x)
            seen, seen_reference = model(x + delta), reference(x + delta)
            left, left_reference = seen.argmax(1) != clean.argmax(1), seen_reference.argmax(1) != clean_reference.argmax(1)
            shared = left & left_reference & (seen.argmax(1) == seen_reference.argmax(1))
            adversarial = -F.cross_entropy(seen, y, reduction="none") * ~left - F.cross_entropy(seen_reference, y, reduction="none") * ~left_reference
            p, q = seen.softmax(1).clamp_min(1e-8), seen_reference.softmax(1).clamp_min(1e-8)
            mean = 0.5 * (p + q)
            divergence = (0.5 * p * p.log() + 0.5 * q * q.log() - mean * mean.log()).sum(1) * ~shared
            loss = (0.01 * 0.5 * adversarial + divergence).sum() / len(x)
            if shared.all():
                break
            loss.backward()
            assert delta.grad is not None
            delta = (delta.detach() - 0.2 * delta.grad.sign()).clamp(-0.2, 0.2)
        delta = delta.detach()
        clean, seen = model(torch.cat([x, x + delta])).chunk(2)
        clean_reference, seen_reference = reference(x), reference(x + delta)
        wrong = seen_reference.argmax(1)
        fooled = (wrong != y) & (wrong != clean_reference.argmax(1))
        p = seen.softmax(1)
        of_wrong = p.gather(1, wrong[:, None]).squeeze(1)
        others = p.scatter(1, wrong[:, None], 0).sum(1)
        first, second = -(1e-6 + others.clamp_max(0.999)).log(), -(1 + 1e-6 - of_wrong.clamp_min(0.001)).log()
        loss = F.cross_entropy(clean, y) + ((first + second) / 2 * fooled).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return delta, loss.detach()

    return step


class _Pool(TorchDataset[Any]):
    """ASD's pools: a deep copy of the whole data set with some of its rows, augmented once, or twice for the unlabelled one."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, index: np.ndarray, twice: bool) -> None:
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
    model: nn.Module, images: np.ndarray, labels: np.ndarray, clean: np.ndarray, iterations: int, batch_size: int, workers: int, classes: int
) -> int:
    """Part of an epoch of ASD: pools copied, loaders started again when they are empty, five forwards a step. Returns the images trained on.

    images: uint8 (N, H, W, C); clean: bool (N,).
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    device = next(model.parameters()).device

    def loader(index: np.ndarray, twice: bool) -> DataLoader[Any]:
        pool = _Pool(images, labels, index, twice)
        return DataLoader(pool, batch_size, shuffle=True, drop_last=True, num_workers=workers, pin_memory=device.type == "cuda")

    labelled, unlabelled = loader(np.flatnonzero(clean), False), loader(np.flatnonzero(~clean), True)
    first: Iterator[Any] = iter(labelled)
    second: Iterator[Any] = iter(unlabelled)
    for step in range(iterations):
        (x, y), first = _next(first, labelled)
        (u1, u2), second = _next(second, unlabelled)
        x, y, u1, u2 = (tensor.to(device, non_blocking=True) for tensor in (x, y, u1, u2))
        with torch.no_grad():
            p = (model(u1).softmax(1) + model(u2).softmax(1)) / 2
            guess = p**2 / (p**2).sum(1, keepdim=True)
        inputs = torch.cat([x, u1, u2])
        targets = torch.cat([F.one_hot(y, classes).float(), guess, guess])
        share = np.random.beta(0.75, 0.75)
        share = max(share, 1 - share)
        order = torch.randperm(len(inputs), device=device)
        mixed, mixed_targets = share * inputs + (1 - share) * inputs[order], share * targets + (1 - share) * targets[order]
        chunks = _interleave(list(mixed.split(batch_size)), batch_size)
        logits = _interleave([model(chunk) for chunk in chunks], batch_size)
        labelled_loss = -(mixed_targets[:batch_size] * logits[0].log_softmax(1)).sum(1).mean()
        unlabelled_loss = (torch.cat(logits[1:]).softmax(1) - mixed_targets[batch_size:]).square().mean()
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
    """Swap slices between equal parts, so that each holds some of all; its own inverse."""
    count = len(parts)
    sizes = [batch // count + (1 if i >= count - batch % count else 0) for i in range(count)]
    slices = [list(part.split(sizes)) for part in parts]
    for i in range(1, count):
        slices[0][i], slices[i][i] = slices[i][i], slices[0][i]
    return [torch.cat(part) for part in slices]
