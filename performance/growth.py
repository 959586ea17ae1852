"""How the cost of each method grows with the number of images.

    python performance/growth.py [--sizes 5000 10000 25000 50000] [--trusted 250 1000 2500]
        [--width 16] [--json FILE] [--plot FILE.png]

It runs one epoch (round, pass) of each stage of each method on synthetic images of 32 x 32 x 3,
each cell in a process of its own. Methods that train on the training set get sets of --sizes,
methods that use trusted images get --trusted of them. All other settings are the defaults. It
prints seconds, image passes (exact: they do not depend on the machine), peak memory, and the
exponent p of a fit of cost = c n^p. Costs of more epochs are multiples.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from measure import cifar_network, describe_machine, fresh_process

from backdoorlab.data import Augment, Split
from backdoorlab.device import choose_device, seed_everything
from backdoorlab.engine import Recipe, train
from backdoorlab.features import extract
from backdoorlab.poison_search.anti_learning import anti_learn
from backdoorlab.record import DefenderView
from backdoorlab.run import Run, peak_memory
from backdoorlab.settings import methods

CLASSES = 10
AUGMENT = Augment(crop_padding=4, flip=True)


@dataclass(frozen=True)
class Cell:
    """The cost of one epoch of a method on `images` images."""

    method: str
    images: int
    seconds: float
    forward: int
    backward: int
    megabytes: float
    """Peak memory of the process, including torch and the images."""


Work = Callable[[DefenderView, Run], Any]


def _attack(view: DefenderView, run: Run) -> None:
    train(
        view.load_model(),
        view.train,
        Recipe(epochs=1, batch_size=128, lr=0.01, augment=AUGMENT),
        run,
    )


def _dau(view: DefenderView, run: Run) -> None:
    """Run DAU as if it had detected poison: features, heads, unlearning.

    The pool is 1 % of the images, the flagged samples are 10 %.
    """
    dau: Any = methods.load("defense", "dau").module
    config, model = dau.Config(epochs=1, head_epochs=1), view.load_model()
    features = extract(model, view.train, run)
    flagged = torch.arange(len(view.train)) % 10 == 0
    pool = torch.arange(len(view.train)) % 100 == 0
    anti_learn(features, pool, model.get_classifier(), config.beta1, config, run)
    dau.unlearn(view, flagged, config, run)


def _defense(name: str, **constants: Any) -> Work:
    def work(view: DefenderView, run: Run) -> None:
        module: Any = methods.load("defense", name).module
        module.defend(view, module.Config(**constants), run)

    return work


ON_TRAINING: dict[str, Work] = {
    "attack, 1 epoch": _attack,
    "dau, 1 + 1 epochs": _dau,
    "asd, stage 1, 64 steps": _defense(
        "asd", stage1_epochs=1, stage2_epochs=0, stage3_epochs=0, iterations=64
    ),
    "asd, stage 3, 64 steps": _defense(
        "asd", stage1_epochs=0, stage2_epochs=0, stage3_epochs=1, iterations=64
    ),
}
ON_TRUSTED: dict[str, Work] = {
    "ft, 1 epoch": _defense("ft", epochs=1),
    "sau, 1 round": _defense("sau", n_rounds=1),
    "ibau, 1 round": _defense("ibau", n_rounds=1),
    "ibau K = 0, 1 round": _defense("ibau", n_rounds=1, K=0),
    "bu, 1 + 1 passes": _defense("bu", search_epochs=1, epochs=1, accept=0.0),
}


def cell(name: str, count: int, width: int, device_name: str) -> Cell:
    """Run one epoch of a method; in a process of its own, so that peak memory is the cell's.

    Args:
        name: key of ON_TRAINING or ON_TRUSTED.
        count: number of images.
        width: channels of the network's first stage.
        device_name: as --device.
    """
    device = choose_device(device_name)
    seed_everything(0, device)
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=draws, dtype=torch.uint8)
    split = Split(images, torch.arange(count) % CLASSES)
    model = cifar_network(width, device)

    def new_model() -> Any:
        return cifar_network(width, device)

    # The method gets the same images as training set and as trusted images.
    granted = dict(
        model=model, train=split, trusted=split, seeds=torch.arange(100), new_model=new_model
    )
    view = DefenderView("", CLASSES, (3, 32, 32), tuple(map(str, range(CLASSES))), AUGMENT, granted)

    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), seed=0, device=device)
        (ON_TRAINING | ON_TRUSTED)[name](view, run)
        spent = run.spent()

    return Cell(
        name,
        count,
        round(spent.seconds, 2),
        spent.forward,
        spent.backward,
        round(peak_memory(device) / 2**20),
    )


def exponent(sizes: list[int], costs: list[float]) -> float:
    """Return p of the least-squares fit of log cost = log c + p log n.

    NaN if there is only one size, or if a cost is 0.
    """
    if len(sizes) < 2 or min(costs) <= 0:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def plot(cells: list[Cell], file: Path) -> None:
    """Draw image passes and seconds over the number of images, on logarithmic axes."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.5), constrained_layout=True)

    # One mark for each method, the same in both pictures.
    marks = "os^Dv<>Pp"
    for axis, (label, cost) in zip(
        axes,
        (("image passes", lambda c: c.forward + c.backward), ("seconds", lambda c: c.seconds)),
        strict=True,
    ):
        for mark, name in zip(marks, dict.fromkeys(c.method for c in cells), strict=False):
            mine = [c for c in cells if c.method == name]
            dashes = "-" if name in ON_TRAINING else "--"
            axis.loglog(
                [c.images for c in mine],
                [cost(c) for c in mine],
                dashes,
                marker=mark,
                markersize=5,
                label=name,
            )
        axis.set(xlabel="images (solid: training set, dashed: trusted)", ylabel=label)
        axis.grid(alpha=0.3)

    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    options = _options()
    header = describe_machine(
        choose_device(options.device),
        data="synthetic images of 32 x 32 x 3",
        width=str(options.width),
    )
    for key, value in header.items():
        print(f"{key:<9} {value}", flush=True)

    # Measure every method on every size, each cell in a process of its own.
    print(
        f"\n{'what':<26} {'images':>8} {'seconds':>9} {'forward':>10} {'backward':>10}"
        f" {'peak MB':>9}"
    )
    cells: list[Cell] = []
    for group, sizes in ((ON_TRAINING, options.sizes), (ON_TRUSTED, options.trusted)):
        for name in group:
            for size in sizes:
                with fresh_process() as process:
                    found = process.submit(cell, name, size, options.width, options.device).result()
                print(
                    f"{name:<26} {size:>8,} {found.seconds:>9.1f} {found.forward:>10,}"
                    f" {found.backward:>10,} {found.megabytes:>9,.0f}",
                    flush=True,
                )
                cells.append(found)

    # Fit an exponent to each column of a method.
    print(
        f"\n{'exponents':<26} {'':>8} {'seconds':>9} {'forward':>10} {'backward':>10}"
        f" {'peak MB':>9}"
    )
    fits: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(c.method for c in cells):
        mine = [c for c in cells if c.method == name]
        fits[name] = {
            what: exponent([c.images for c in mine], [getattr(c, what) for c in mine])
            for what in ("seconds", "forward", "backward", "megabytes")
        }
        print(
            f"{name:<26} {'':>8} "
            + " ".join(
                f"{value:>{w}.2f}"
                for value, w in zip(fits[name].values(), (9, 10, 10, 9), strict=True)
            )
        )
    if options.json is not None:
        options.json.write_text(
            json.dumps(
                dict(header=header, cells=[asdict(c) for c in cells], exponents=fits), indent=2
            )
            + "\n"
        )
    if options.plot is not None:
        plot(cells, options.plot)


def _options() -> argparse.Namespace:
    parser = measure.options(__doc__)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[5_000, 10_000, 25_000, 50_000],
        help="training images",
    )
    parser.add_argument(
        "--trusted", type=int, nargs="+", default=[250, 1_000, 2_500], help="trusted images"
    )
    parser.add_argument(
        "--width", type=int, default=16, help="channels of PreAct-ResNet18's first stage"
    )
    parser.add_argument(
        "--plot", type=Path, default=None, metavar="FILE", help="a picture, .png or .svg"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
