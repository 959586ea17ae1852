"""The order of a model's classes, where it is not that of the data set; and what chance is.

Folders named 0 .. 11 are numbered 0, 1, 10, 11, 2, ... by a reader that sorts their names as text,
and 0, 1, 2, ... by one that sorts numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError

AS_GIVEN = "as given"
BY_FAR = 3.0
"""Standard deviations by which one order must be right more often than another to be chosen."""
CHANCE = 0.01
"""Probability that guessing is as accurate, from which on a model counts as near chance."""
SHOWN = 12
"""Classes that a message lists."""


@dataclass(frozen=True)
class Order:
    """An order of the classes."""

    word: str
    labels: Tensor
    """int64 (K,): the data set's label of each output."""

    def names(self, class_names: Sequence[str]) -> list[str]:
        """Return the names in this order; `class_names` are those of the data set."""
        return [class_names[label] for label in self.labels.tolist()]


def usual(class_names: Sequence[str]) -> list[Order]:
    """List the orders in which readers number these classes, the data set's own first."""
    count = range(len(class_names))
    sorts = {
        AS_GIVEN: list(count),
        "text order": sorted(count, key=lambda i: class_names[i]),
        "alphabetical order": sorted(count, key=lambda i: class_names[i].casefold()),
    }
    # Where all names are numbers, there may also be a reader that counts.
    if all(name.isdecimal() for name in class_names):
        sorts["numerical order"] = sorted(count, key=lambda i: int(class_names[i]))
        sorts["text order of the numbers"] = sorts.pop("text order")
        del sorts["alphabetical order"]

    # Most of them are the same for most data sets.
    found = {tuple(order): word for word, order in reversed(sorts.items())}
    orders = [Order(word, torch.tensor(order)) for order, word in found.items()]
    return sorted(orders, key=lambda order: order.word != AS_GIVEN)


def stated(names: Sequence[str], class_names: Sequence[str], word: str) -> Order | None:
    """Return the order of these names; None where they are not those of the data set."""
    if len(set(class_names)) != len(class_names) or sorted(names) != sorted(class_names):
        return None
    place = {name: label for label, name in enumerate(class_names)}
    return Order(word, torch.tensor([place[name] for name in names]))


def read(file: str, class_names: Sequence[str]) -> Order:
    """Read the order of a model's classes from a file of one name a line.

    Args:
        file: the value of --classes.
        class_names: those of the data set, in its order.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "no UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(
            f"--classes {file}: not readable ({why}): expected one class name a line"
        ) from error

    # Names may have been written by an editor that ends lines in its own way.
    names = [line.strip() for line in lines if line.strip()]
    order = stated(names, class_names, f"as in {Path(file).name}")
    if order is None:
        # An example: a name that the data set lacks, or else one that the file lacks.
        odd = [name for name in names if name not in class_names] or [
            name for name in class_names if name not in names
        ]
        found = f", such as {odd[0]!r}" if odd else ""
        raise UserError(
            f"--classes {file}: expected the {len(class_names)} class names of the data set, one a"
            f" line, each once, in the order of the model's outputs; got {len(names)} that are not"
            f" these{found}"
        )
    return order


def by_far(right: Tensor, other: Tensor) -> bool:
    """Return whether one order is right more often than another, beyond doubt.

    McNemar's test: only images on which the two differ count.

    Args:
        right: bool (N,), images that the one gets right.
        other: bool (N,), images that the other gets right.
    """
    gained, lost = int((right & ~other).sum()), int((other & ~right).sum())
    return gained - lost > BY_FAR * (gained + lost) ** 0.5


def suspected(answers: Tensor, labels: Tensor, order: Order) -> Order | None:
    """Return the order that the answers speak for, where it is none of the usual ones.

    Args:
        answers: int64 (N,), outputs of the model.
        labels: int64 (N,), true labels.
        order: the best of the usual orders.

    Returns:
        The order in which each class is the one that most of its images are classified as; None if
        that is no order, or not right by far more often.
    """
    classes = len(order.labels)
    if classes > len(labels):
        return None

    # How often images of each class get each output.
    counts = torch.bincount(labels * classes + answers, minlength=classes**2)
    most = counts.view(classes, classes).argmax(1)  # label -> output
    if len(most.unique()) < classes or (counts.view(classes, classes).sum(1) == 0).any():
        return None
    found = Order("another order", most.argsort())
    better = by_far(found.labels[answers] == labels, order.labels[answers] == labels)
    return found if better else None


def near_chance(answers: Tensor, labels: Tensor) -> str | None:
    """Test answers against guessing.

    Guessing answers as often with each class as the model does, whatever the image shows. Its
    number of right answers is binomial.

    Args:
        answers: int64 (N,), predicted labels.
        labels: int64 (N,), true labels.

    Returns:
        Numbers for a message where guessing could do as well; None for a better model, and where
        all images are of one class, which says nothing.
    """
    count, right = len(labels), int((answers == labels).sum())
    if len(labels.unique()) < 2:
        return None

    # The probability that two independent draws, of an answer and of a label, are the same.
    classes = int(max(answers.max(), labels.max())) + 1
    shares = [torch.bincount(x, minlength=classes).double() / count for x in (answers, labels)]
    guess = float((shares[0] * shares[1]).sum())
    if _tail(right, count, guess) < CHANCE:
        return None

    spread = 2 * (count * guess * (1 - guess)) ** 0.5
    return (
        f"{right} of {count:,} test images right, and guessing gets {count * guess:.0f}"
        f" +- {spread:.0f}"
    )


def _tail(right: int, count: int, share: float) -> float:
    """Return the probability of at least `right` hits in `count` draws that hit with `share`."""
    if share <= 0 or share >= 1:
        return float(right == 0 or share >= 1)
    # By logarithms, as the binomial coefficients of a thousand images are no floats.
    hits = torch.arange(right, count + 1, dtype=torch.float64)
    ways = torch.lgamma(torch.tensor(count + 1.0, dtype=torch.float64))
    ways = ways - torch.lgamma(hits + 1) - torch.lgamma(count - hits + 1)
    logs = torch.tensor([share, 1 - share], dtype=torch.float64).log()
    return float((ways + hits * logs[0] + (count - hits) * logs[1]).exp().sum())


def listed(names: Sequence[str]) -> str:
    """List class names for a message."""
    return f"{', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
