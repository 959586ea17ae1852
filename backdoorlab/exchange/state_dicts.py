"""State dicts as wrappers and trainers leave them, brought under the names of the network.

Whatever stands before the names (module., model., net., model_ema.module.) is found by comparing
them with those of the network, so that no list of wrappers is needed.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError

DEEPEST = 12
"""Parts of a name, from its beginning, that may belong to a prefix."""
WITHIN = frozenset(["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
"""Parts that torch.compile, checkpointing and FSDP put anywhere into a name."""
COUNTERS = frozenset(["total_ops", "total_params", "n_averaged", "num_batches_tracked"])
"""Last parts of names that count something, and that a network runs without."""
STATISTICS = (("mean", "std"), ("mu", "sigma"), ("pixel_mean", "pixel_std"))
"""Last parts of the names under which networks keep their normalisation."""
AVERAGES = ("ema", "average", "swa", "teacher", "shadow")
"""Words in the prefix of a moving average of a model."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types of weights that a network can run with."""
LISTED = 4
"""Groups of names that a note lists."""


@dataclass(frozen=True)
class Unwrapped:
    """A state dict under the names of a network, and what stood around it."""

    weights: Mapping[str, Tensor]
    """What belongs to the network. A name that the network lacks means another network."""
    prefix: str
    """What stood before the names, such as "module."; "" for nothing."""
    others: tuple[str, ...]
    """Prefixes under which as many names of the network are, such as those of a moving average."""
    left_out: Mapping[str, Tensor]
    """What the network cannot have, under its names in the file."""

    def notes(self) -> list[str]:
        """Say what was removed and left out, one sentence each."""
        said = [f"{self.prefix!r} was removed from the names of the weights"] if self.prefix else []
        if self.others:
            said.append(
                f"the file has the network's weights more than once: {self.prefix or 'bare names'}"
                f" taken, {', '.join(other or 'bare names' for other in self.others)} left out"
            )
        # Means and deviations are read as the normalisation, or lose to a better one.
        statistics = {word for pair in STATISTICS for word in pair}
        names = [
            name
            for name in self.left_out
            if name.split(".")[-1] not in statistics and not self._copied(name)
        ]
        if names:
            said.append(f"left out, as the network has no such part: {grouped(names)}")
        return said

    def _copied(self, name: str) -> bool:
        """Return whether a name belongs to another copy of the network."""
        return any(other and name.startswith(other) for other in self.others)


def unwrap(weights: Mapping[str, Tensor], wanted: Collection[str]) -> Unwrapped:
    """Find a network's weights in a state dict.

    Args:
        weights: the state dict of a file.
        wanted: names of the network's state dict.

    Returns:
        The weights under the network's names. Left out are names without the prefix, names under
        a part that the network does not have, counters, and tables of integers.
    """
    named = {
        ".".join(part for part in name.split(".") if part not in WITHIN): tensor
        for name, tensor in weights.items()
    }
    prefix, others = _prefix(named, wanted)
    # Nothing of it is this network's: what it has says which network it is.
    if not any(name.removeprefix(prefix) in wanted for name in named):
        return Unwrapped(named, "", (), {})
    parts = {name.split(".")[0] for name in wanted}

    kept: dict[str, Tensor] = {}
    left_out: dict[str, Tensor] = {}
    for name, tensor in named.items():
        own = name.removeprefix(prefix)
        if name.startswith(prefix) and (own in wanted or not _foreign(own, tensor, parts)):
            kept[own] = tensor
        else:
            left_out[name] = tensor
    return Unwrapped(kept, prefix, others, left_out)


def _prefix(names: Iterable[str], wanted: Collection[str]) -> tuple[str, tuple[str, ...]]:
    """Return the prefix under which most names are wanted, and others that have as many."""
    fits: Counter[str] = Counter()
    for name in names:
        parts = name.split(".", DEEPEST)
        for depth in range(len(parts)):
            if ".".join(parts[depth:]) in wanted:
                fits["".join(f"{part}." for part in parts[:depth])] += 1

    # Of a model and its moving average, the model is taken.
    def rank(prefix: str) -> tuple[int, bool, int, str]:
        average = any(word in prefix.lower() for word in AVERAGES)
        return -fits[prefix], average, len(prefix), prefix

    ranked = sorted(fits, key=rank)
    if not ranked:
        return "", ()
    best, *rest = ranked
    # One name in common, such as a bias, is no second copy of the network.
    same = [
        prefix for prefix in rest if fits[prefix] == fits[best] and 2 * fits[best] > len(wanted)
    ]
    return best, tuple(same)


def _foreign(name: str, tensor: Tensor, parts: Collection[str]) -> bool:
    """Return whether a network with these parts can do without a name that it does not have."""
    # More layers of a part that it has are no extra: they are those of a deeper network.
    first, last = name.split(".")[0], name.split(".")[-1]
    return first not in parts or last in COUNTERS or not tensor.is_floating_point()


def normalisation(
    left_out: Mapping[str, Tensor], channels: int
) -> tuple[str, tuple[float, ...], tuple[float, ...]] | None:
    """Find the normalisation that a model keeps beside its network.

    Args:
        left_out: what does not belong to the network.
        channels: C, channels of the images.

    Returns:
        (names, mean, std) in [0, 1] units; None where there is none for these channels.
    """
    for name, first in left_out.items():
        *path, last = name.split(".")
        for mean, std in STATISTICS:
            beside = ".".join([*path, std])
            if last != mean or beside not in left_out:
                continue
            pair = [_numbers(row, channels) for row in (first, left_out[beside])]
            if all(pair) and min(pair[1]) > 0:
                return f"{name} and {beside}", pair[0], pair[1]
    return None


def _numbers(tensor: Tensor, channels: int) -> tuple[float, ...]:
    """Return one finite number a channel, or nothing."""
    if not tensor.is_floating_point() or tensor.numel() not in (1, channels):
        return ()
    numbers = tensor.flatten().double().expand(channels)
    return tuple(numbers.tolist()) if numbers.isfinite().all() else ()


def refuse_unusable(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: Path
) -> None:
    """Raise a UserError for weights that no network can run with.

    Args:
        weights: under the network's names.
        wanted: state dict of the network, of which only types count.
        source: file of the weights.
    """
    for name, tensor in weights.items():
        needed = name not in wanted or wanted[name].is_floating_point()
        if needed and tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{source}: {name} is {kind}, expected float32, float16 or bfloat16: weights that"
                " were quantised need their scales; save the model before it was quantised"
            )
        if needed and not tensor.isfinite().all():
            raise UserError(
                f"{source}: {name} contains NaN or infinity, so that the model predicts nothing:"
                " its training diverged, or the file is damaged"
            )


def grouped(names: Iterable[str]) -> str:
    """List names in few words: those of one part together, with their number."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        # Counters sit in every layer, so that they are no part of one.
        last = name.split(".")[-1]
        groups[f"*.{last}" if last in COUNTERS and "." in name else name.split(".")[0]].append(name)

    said = [
        found[0] if len(found) == 1 else f"{group} ({len(found)} tensors)"
        for group, found in groups.items()
    ]
    return f"{', '.join(said[:LISTED])}{', ...' if len(said) > LISTED else ''}"
