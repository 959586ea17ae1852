"""The cost of each method in image passes, computed from its settings, and in GPU hours.

    python performance/cost.py [RECORD ...] [--record_root FOLDER] [--tflops 50]
    python performance/cost.py --grid bench_cifar10_fast [--tflops 0.165] [--jobs 2]

With records, which may be those of a store, it prints the passes counted in their results beside
those of the formulas below. With a grid, it prints what the grid costs, on machines that run so
many commands at once, each at this rate. Else it prints what the methods cost with their published
settings on three data sets.

A forward pass of an image counts once, a backward pass twice (gradients of activations and of
weights). torch counts the operations of a forward pass on the network itself. --tflops is the rate
that a GPU or a thread is assumed to achieve; hours scale with its inverse.
"""

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from backdoorlab import models
from backdoorlab.bench import grid
from backdoorlab.errors import UserError
from backdoorlab.record import read_result, record_root
from backdoorlab.repair.guard import ENOUGH
from backdoorlab.repair.mesa import TRIALS
from backdoorlab.settings import methods
from backdoorlab.tables import stored
from backdoorlab.tables.rows import result_folders

Passes = tuple[float, float]
"""Images forward, images backward."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of the data that a method is run on."""

    n: int
    """Training images."""
    trusted: int
    classes: int


# One formula for each method: c is its config, s the data it runs on. No epoch is repeated.


def guard(c: Mapping[str, Any], trusted: int, epochs: int) -> int:
    """The guard classifies trusted images before the first epoch and after each, at most ENOUGH."""
    if c["guard_drop"] is None:
        return 0
    return math.ceil(trusted / math.ceil(trusted / ENOUGH)) * (epochs + 1)


def training(c: Mapping[str, Any], s: Setting) -> Passes:
    """An attack: every epoch sees every image. Encoders, generators and surrogates come on top."""
    seen = c["epochs"] * s.n
    return seen, seen


def ft(c: Mapping[str, Any], s: Setting) -> Passes:
    """Every epoch sees every trusted image."""
    seen = c["epochs"] * s.trusted
    return seen + guard(c, s.trusted, c["epochs"]), seen


def sau(c: Mapping[str, Any], s: Setting) -> Passes:
    """An upper bound: an image leaves the search as soon as its perturbation is found.

    The poisoned model's answers are computed once.
    """
    seen, steps = c["n_rounds"] * s.trusted, 2 * c["pgd_steps"]
    judged = guard(c, s.trusted, c["n_rounds"])
    return s.trusted + seen * (4 + steps) + judged, seen * (2 + steps)


def ibau(c: Mapping[str, Any], s: Setting) -> Passes:
    """The steps that search delta, then a pass over the trusted images.

    The implicit term takes a backward pass for each of K steps at most, and two more.
    """
    batches = math.ceil(s.trusted / c["batch_size"])
    searched = s.trusted * (c["delta_steps"] or batches) / batches
    forward, backward = (2, c["K"] + 3) if c["K"] else (1, 1)
    judged = guard(c, s.trusted, c["n_rounds"])
    return c["n_rounds"] * (searched + forward * s.trusted) + judged, c["n_rounds"] * (
        searched + backward * s.trusted
    )


def dau(c: Mapping[str, Any], s: Setting) -> Passes:
    """The features once, then passes over the whole training set.

    The heads are too small to count. Recovery omits a few images, and reads the flagged ones in two
    more passes.
    """
    passes = c["epochs"] + c.get("recovery_epochs", 0)
    return s.n * (1 + passes), s.n * passes


def asd(c: Mapping[str, Any], s: Setting) -> Passes:
    """Three batches per step and two to guess labels, and a pass per epoch to split.

    Stage 3 adds a training pass and a pass to evaluate it in each epoch.
    """
    epochs = c["stage1_epochs"] + c["stage2_epochs"] + c["stage3_epochs"]
    batches = c["iterations"] * c["batch_size"] * epochs
    return (
        5 * batches + s.n * (epochs + 2 * c["stage3_epochs"]),
        3 * batches + s.n * c["stage3_epochs"],
    )


def bu(c: Mapping[str, Any], s: Setting) -> Passes:
    """Every class is tried at every level; then the triggers found are unlearned.

    A pass of unlearning sees all images clean, those of other classes with a patch, and with the
    weighted penalty all images once more. Held-out images of other classes are judged after each
    pass; if they are few, each of them with several patches.
    """
    held_out, others = round(c["held_out"] * s.trusted), 1 - 1 / s.classes
    images, generators = s.trusted - held_out, len(c["levels"]) * s.classes
    passes = images * (
        generators * c["search_epochs"] + c["epochs"] * (1 + others + (c["penalty"] == "weighted"))
    )

    # Few images are judged with several triggers each.
    judged = others * held_out
    judged *= math.ceil(TRIALS / max(1, judged))
    judged = judged * (generators + c["epochs"]) + guard(c, held_out, c["epochs"])
    return round(passes + judged), round(passes)


COSTS: dict[str, Callable[[Mapping[str, Any], Setting], Passes]] = {
    "ft": ft,
    "sau": sau,
    "ibau": ibau,
    "dau": dau,
    "asd": asd,
    "bu": bu,
}
SCALES = {
    "CIFAR-10": (Setting(50_000, 2_500, 10), "preactresnet18", 32, 100),
    "Tiny ImageNet": (Setting(100_000, 5_000, 200), "preactresnet18", 64, 200),
    "ImageNet": (Setting(1_281_167, 64_058, 1000), "resnet50", 224, 90),
}
"""Data set -> its size with 5 % trusted images, network, image side in pixels, epochs of the
attack."""
PUBLISHED = {"Tiny ImageNet": {"sau": {"n_rounds": 20}}}
"""Settings by which a publication departs from a method's defaults there."""


SIZES = {
    "digits": (Setting(1_442, 72, 10), 32),
    "cifar10": (Setting(50_000, 2_500, 10), 32),
    "cifar100": (Setting(50_000, 2_500, 100), 32),
    "gtsrb": (Setting(39_209, 1_960, 43), 32),
}
"""Data set -> its size with 5 % trusted images, and the image side."""


def counted(names: list[str], root: str | None) -> None:
    """Print the passes that each result counted beside those of the formula.

    Args:
        names: records.
        root: folder of records; None for the default.
    """
    print(
        "| record | defense | forward | formula | backward | formula |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |"
    )
    for record in stored.readable(names, record_root(root)):
        size, classes = record.info["dataset"]["train_size"], record.info["num_classes"]
        for folder in result_folders(record.folder):
            result, method = read_result(folder), folder.parent.name
            if method not in COSTS or "image_passes" not in result:
                continue

            config = result["config"]
            trusted = (
                (result.get("trusted") or {}).get("count")
                or config.get("trusted_count")
                or round(size * config.get("trusted_ratio", 0))
            )
            forward, backward = COSTS[method](config, Setting(size, trusted, classes))
            seen = result["image_passes"]
            print(
                f"| {record.name} | {method} {folder.name} | {seen['forward']:,} | {forward:,.0f}"
                f" | {seen['backward']:,} | {backward:,.0f} |"
            )


@functools.cache
def operations(network: str, side: int, classes: int, width: int | None = None) -> int:
    """Count the floating-point operations of one image's forward pass.

    A multiplication with its addition counts as two.

    Args:
        network: name of an architecture.
        side: height and width of the image in pixels.
        classes: number of classes.
        width: channels of its first stage; None is the architecture's own.
    """
    stem = "stock" if side > 64 else "small"
    shape = dict(
        num_classes=classes,
        in_chans=3,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        width=width,
        image_size=side,
        stem=stem,
    )
    model = models.build(network, **shape).eval()  # type: ignore[arg-type]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, side, side))
    return counter.get_total_flops()


def scaled(tflops: float) -> None:
    """Print passes per training image and hours for every method at its published settings."""
    every = [_costs(title, tflops) for title in SCALES]
    heads = [f"{title}: forward / backward | hours" for title in SCALES]
    print(f"| method | {' | '.join(heads)} |\n| --- |{' ---: |' * 2 * len(SCALES)}")
    for name in ("attack", *COSTS):
        shown = (
            f"{forward:.4g} / {backward:.4g} | {hours:.3g}"
            for forward, backward, hours in (costs[name] for costs in every)
        )
        print(f"| `{name}` | {' | '.join(shown)} |")
    of_record = [sum(hours for _, _, hours in costs.values()) for costs in every]
    for name, times in (("a record with these defenses", 1), ("ten attacks, three seeds", 30)):
        print(f"| {name} | {' | '.join(f'| {times * hours:.3g}' for hours in of_record)} |")

    print(f"\nPasses are per training image; hours at {tflops:g} TFLOP/s.\n")
    for title, (setting, network, side, epochs) in SCALES.items():
        print(
            f"- {title}: {setting.n:,} images of {side} pixels, {setting.trusted:,} trusted,"
            f" {network} of {operations(network, side, setting.classes) / 1e9:.2f} GFLOP a forward"
            f" pass, attack of {epochs} epochs{_departures(title)}."
        )


def _costs(title: str, tflops: float) -> dict[str, tuple[float, float, float]]:
    """Each method -> forward and backward passes per training image, and hours."""
    setting, network, side, epochs = SCALES[title]
    passes = {"attack": training({"epochs": epochs}, setting)}
    for name, formula in COSTS.items():
        config = methods.load("defense", name).config_class(
            **PUBLISHED.get(title, {}).get(name, {})
        )
        passes[name] = formula(dataclasses.asdict(config), setting)
    rate = operations(network, side, setting.classes) / (tflops * 1e12) / 3600
    return {
        name: (forward / setting.n, backward / setting.n, (forward + 2 * backward) * rate)
        for name, (forward, backward) in passes.items()
    }


def _departures(title: str) -> str:
    return "".join(
        f", {name} with {option} {value}"
        for name, values in PUBLISHED.get(title, {}).items()
        for option, value in values.items()
    )


def of_grid(name: str, tflops: float, jobs: int) -> None:
    """Print what the cells of a grid cost by the formulas, one line a method.

    Args:
        name: file of a grid, or its name in resource/config/.
        tflops: rate of each command in TFLOP/s.
        jobs: commands that run at once.
    """
    spent: dict[str, list[float]] = {}
    unknown = set()
    trained: dict[str, dict[str, Any]] = {}
    for cell in grid.cells(grid.read(name)):
        config = json.loads(cell.settings)
        if cell.kind == "attack":
            trained[cell.record] = config
        attack = trained[cell.record]
        formula = training if cell.kind == "attack" else COSTS.get(cell.method)
        if formula is None or attack["dataset"] not in SIZES:
            unknown.add(cell.method if formula is None else attack["dataset"])
            continue

        setting, side = SIZES[attack["dataset"]]
        forward, backward = formula(config, setting)
        flops = operations(attack["model"], side, setting.classes, attack["width"])
        label = "attack" if cell.kind == "attack" else cell.label
        line = f"{attack['dataset']}, {attack['model']} w{attack['width']}, {label}"
        spent.setdefault(line, []).append((forward + 2 * backward) * flops / 1e15)

    print("| method | cells | PFLOP a cell | hours |\n| --- | ---: | ---: | ---: |")
    hours = {line: sum(each) / tflops / 3.6 / jobs for line, each in spent.items()}
    for line, each in spent.items():
        print(f"| {line} | {len(each)} | {sum(each) / len(each):.3g} | {hours[line]:.3g} |")
    total = sum(map(sum, spent.values()))
    print(f"| together | {sum(map(len, spent.values()))} | | {sum(hours.values()):.3g} |")
    print(f"\n{total:.3g} PFLOP at {jobs} x {tflops:g} TFLOP/s.")
    if unknown:
        print(f"Not counted: {', '.join(sorted(unknown))}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="*")
    parser.add_argument("--record_root")
    parser.add_argument("--tflops", type=float, default=50.0)
    parser.add_argument("--grid")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()

    try:
        if options.grid:
            of_grid(options.grid, options.tflops, options.jobs)
        elif options.records:
            counted(options.records, options.record_root)
        else:
            scaled(options.tflops)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
