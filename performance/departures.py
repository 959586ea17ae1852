"""What our departures from the published codes change, measured on the digits.

    python performance/departures.py [--pages dau asd ...] [--attacks badnet blended ...]
        [--seeds 0 1] [--record_root FOLDER]

Each departure is run as it is here, and as the published code has it. Where a flag makes the
difference, it is that flag; else a function of the method is replaced while it runs, and it is an
error if nothing called the replacement. The rows are those of the tables in docs/methods: clean
accuracy / ASR / RA in percent, one entry for each seed, which is that of the attack and of the
defense. All runs are in fp32 on one thread. With --record_root, records and results are kept there,
and those that are there already are not made again.
"""

import argparse
import contextlib
import itertools
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from backdoorlab.data import Batch
from backdoorlab.device import derived_generator
from backdoorlab.errors import UserError
from backdoorlab.execution.attack import attack_job, run_attack
from backdoorlab.execution.defense import defense_job, run_defense
from backdoorlab.metrics import SUMMARY
from backdoorlab.poison import outside_target
from backdoorlab.record import Record, read_result
from backdoorlab.repair import mesa
from backdoorlab.settings import methods

EXACT = ("--precision", "fp32", "--score_every", "0")
ATTACKS = {
    "badnet": ("badnet",),
    "blended": ("blended",),
    "anywhere": ("badnet", "--position", "random"),
}
"""Name -> the attack's file and its flags."""
FRESH = 16384
"""Triggers of each generator that stand for an endless supply: a run of BU on the digits draws two
thousand of them."""

Change = Callable[[ModuleType], AbstractContextManager[object]]
"""Changes a method's module inside, as the published code has it."""


def unchanged(_module: ModuleType) -> AbstractContextManager[object]:
    """Leave a method as it is."""
    return nullcontext()


@dataclass(frozen=True)
class Side:
    """One of the two ways to run a method."""

    name: str
    """Of the result, and of the record where the attack is changed."""
    flags: tuple[str, ...] = ()
    change: Change = unchanged
    attack_flags: tuple[str, ...] = ()
    attack_change: Change = unchanged

    @property
    def own_attack(self) -> bool:
        """Whether its record is another than that of the default settings."""
        return bool(self.attack_flags) or self.attack_change is not unchanged


OURS = Side("ours")


@dataclass(frozen=True)
class Departure:
    """A row of a table."""

    page: str
    """The page of docs/methods that has the row."""
    name: str
    published: Side
    ours: Side = OURS
    attacks: tuple[str, ...] = ("badnet", "blended")
    of_attack: bool = False
    """The attack's own scores are compared, and no defense is run."""


# --- what is replaced


@contextlib.contextmanager
def replaced(
    module: ModuleType, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Put make(function) in the place of a module's function inside.

    Raises:
        AssertionError: nothing called it, so that nothing was compared.
    """
    ours, calls = getattr(module, name), itertools.count()
    new = make(ours)

    def counted(*args: Any, **kwargs: Any) -> Any:
        next(calls)
        return new(*args, **kwargs)

    setattr(module, name, counted)
    try:
        yield
    finally:
        setattr(module, name, ours)
    assert next(calls), f"{module.__name__}.{name} was never called"


@contextlib.contextmanager
def poison_by_chance(attack: ModuleType) -> Iterator[None]:
    """ASD: each training image of another class than the target is poisoned by chance."""
    drawn = []

    def victims(labels: Tensor, split: str, config: Any) -> Tensor:
        chosen = outside_target(labels, config)
        if split == "train":
            draws = torch.rand(len(labels), generator=derived_generator(config.seed, "by chance"))
            chosen &= draws < config.poison_rate
            drawn.append(int(chosen.sum()))
        return chosen

    # An attack's file need not have this function.
    with mock.patch.object(attack, "victims", victims, create=True):
        yield
    assert drawn and drawn[0], "nothing was poisoned by chance"


@contextlib.contextmanager
def five_passes(asd: ModuleType) -> Iterator[None]:
    """ASD: two passes guess labels, three see a third of the mixed images each, and all five move
    the running statistics as a pass does."""

    def in_parts(forward: Callable[[Tensor], Tensor], size: int, images: Tensor) -> Tensor:
        everything, parts = torch.arange(len(images)), len(images) // size
        # Guesses: u1, then u2. Mixed images: every third one, so that each has x, u1 and u2.
        index = [everything[p::parts] for p in range(parts)]
        index = list(everything.chunk(2)) if parts == 2 else index
        logits = torch.cat([forward(images[part]) for part in index])
        return logits[torch.cat(index).argsort()]

    def make(ours: Callable[..., Any]) -> Callable[..., Any]:
        def forward(model: nn.Module, run: Any, split: Any, steps: int, *sizes: int) -> Any:
            whole = ours(model, run, split, steps, *sizes)
            # The copy of stage 3 has batches of one size, in one pass here and there.
            return whole if len(sizes) == 1 else partial(in_parts, whole, sizes[0] // 2)

        return forward

    with replaced(asd, "Forward", make), ordinary_passes(asd):
        yield


def ordinary_passes(asd: ModuleType) -> AbstractContextManager[None]:
    """ASD: a pass moves the running statistics once, as torch does."""
    return replaced(asd, "statistics_of", lambda _ours: lambda _model, _passes: nullcontext())


@contextlib.contextmanager
def first_step_only(bu: ModuleType) -> Iterator[None]:
    """BU, with --train_bn True: batch statistics end with the first step of an epoch."""
    ended = itertools.count()

    def end(model: nn.Module, _images: Any, _logits: Any) -> None:
        if model.training:
            model.eval()
            next(ended)

    def make(ours: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def unlearn(model: nn.Module, *rest: Any) -> nn.Module:
            handle = model.register_forward_hook(end)
            try:
                return ours(model, *rest)
            finally:
                handle.remove()

        return unlearn

    with replaced(bu, "unlearn", make):
        yield
    assert next(ended), "no step of unlearning had batch statistics"


def fresh_triggers(bu: ModuleType) -> AbstractContextManager[None]:
    """BU: so many triggers of each generator that hardly one is drawn twice."""

    def make(ours: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        def recover(*given: Any) -> dict[str, Tensor]:
            with mock.patch.object(mesa, "BANK", FRESH):
                found = ours(*given)
            assert found["bank"].shape[2] == FRESH
            return found

        return recover

    return replaced(bu, "recover_triggers", make)


@contextlib.contextmanager
def drawn_once(ibau: ModuleType) -> Iterator[None]:
    """I-BAU: the batches of step 2 are drawn and augmented once for the run; the search of step 1
    still draws its own."""
    redraw: Callable[..., Iterator[Batch]] = ibau.one_pass
    kept: list[Batch] = []

    def once(*given: Any) -> Iterator[Batch]:
        kept.extend(() if kept else redraw(*given))
        return iter(kept)

    def search(trusted: Any, augment: Any, config: Any, run: Any) -> Iterator[Batch]:
        steps = config.delta_steps or math.ceil(len(trusted) / config.batch_size)
        passes = (redraw(trusted, augment, config, run) for _ in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(passes), steps)

    with (
        replaced(ibau, "search_batches", lambda _ours: search),
        replaced(ibau, "one_pass", lambda _ours: once),
    ):
        yield


def from_the_least(sau: ModuleType) -> AbstractContextManager[None]:
    """SAU, init `min`: the search starts at -eps in every pixel, where `max` starts at eps."""
    return replaced(sau, "start", lambda ours: lambda *given: -ours(*given))


def in_l1_ball(sau: ModuleType, per_pixel: bool) -> AbstractContextManager[None]:
    """SAU, norm `L1`: steps along signs as in linf, then scaled into the L1 ball.

    Args:
        per_pixel: the radius is eps for every pixel and channel, which is the smallest ball around
            linf's; else eps for the whole image, what --eps gives there.
    """

    def project(delta: Tensor, _norm: str, eps: float) -> Tensor:
        radius = eps * delta[0].numel() if per_pixel else eps
        length = delta.abs().sum((1, 2, 3), keepdim=True).clamp_min(1e-12)
        return delta * (radius / length).clamp_max(1)

    return replaced(sau, "project", lambda _ours: project)


@contextlib.contextmanager
def two_outer_steps(sau: ModuleType) -> Iterator[None]:
    """SAU, outer_steps 2: two steps on each batch with the same perturbation."""
    last: dict[str, Tensor] = {}

    def twice(ours: Callable[..., Iterator[Batch]]) -> Callable[..., Iterator[Batch]]:
        return lambda *given, **named: (batch for batch in ours(*given, **named) for _ in range(2))

    def once(ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def search(model: nn.Module, poisoned: nn.Module, x: Tensor, *rest: Any) -> Tensor:
            if last.get("x") is not x:
                last.update(x=x, delta=ours(model, poisoned, x, *rest))
            return last["delta"]

        return search

    with replaced(sau, "batches", twice), replaced(sau, "shared_perturbation", once):
        yield


# --- the rows

CHANCE = Side("by-chance", attack_flags=("--poison_rate", "0.05"), attack_change=poison_by_chance)
OF_ALL = Side("of-all", attack_flags=("--poison_rate", "0.05"))
BACKDOORBENCH = ("--yaml_path", "ibau_backdoorbench", "--trusted_ratio", "0.5")
ADAM = ("--optimizer", "adam", "--lr", "0.01", "--amsgrad")
COSINE = ("--schedule", "cosine", "--lr", "0.01")

DEPARTURES = (
    Departure(
        "dau",
        "unlearning crops images; published: no augmentation (`--augment False`)",
        Side("no-augmentation", ("--augment", "False")),
    ),
    Departure(
        "dau",
        "the same in `dau_port` (ours: with `--augment True`)",
        Side("port", ("--yaml_path", "dau_port")),
        Side("port-augmented", ("--yaml_path", "dau_port", "--augment", "True")),
        attacks=("badnet",),
    ),
    Departure(
        "asd",
        "`--poison_rate 0.05`, drawn among all images; published: each image of another class with"
        " probability .05",
        CHANCE,
        OF_ALL,
        attacks=("badnet",),
    ),
    Departure(
        "asd",
        "statistics of two passes, moved as far as five would; published: five passes",
        Side("five-passes", change=five_passes),
        attacks=("badnet",),
    ),
    Departure(
        "asd",
        "the same; here until 29 November 2026: two ordinary passes",
        Side("ordinary-passes", change=ordinary_passes),
        attacks=("badnet",),
    ),
    Departure(
        "bu",
        "the poisoned model's batch statistics; published: the batch's in the first step of each"
        " epoch",
        Side("first-step", ("--train_bn", "True"), first_step_only),
        attacks=("badnet", "anywhere"),
    ),
    Departure(
        "bu",
        "64 triggers kept of each generator; published: fresh ones at every step",
        Side("fresh-triggers", change=fresh_triggers),
        attacks=("badnet", "anywhere"),
    ),
    Departure(
        "ibau",
        "batches of step 2 redrawn each round; BackdoorBench: drawn once",
        Side("drawn-once", change=drawn_once),
    ),
    Departure(
        "ibau",
        "the same in `ibau_backdoorbench` with `--trusted_ratio 0.5`",
        Side("backdoorbench-once", BACKDOORBENCH, drawn_once),
        Side("backdoorbench", BACKDOORBENCH),
        attacks=("badnet",),
    ),
    Departure(
        "ibau",
        "Adam; BackdoorBench: AMSGrad (`--optim AMSGrad`)",
        Side("amsgrad", ("--optim", "AMSGrad")),
    ),
    Departure("sau", "start `max`; option: `min`", Side("min", change=from_the_least)),
    Departure(
        "sau",
        "norm linf; option: `L1` of radius eps",
        Side("l1", change=partial(in_l1_ball, per_pixel=False)),
    ),
    Departure(
        "sau",
        "norm linf; option: `L1` of radius eps times pixels and channels",
        Side("l1-around", change=partial(in_l1_ball, per_pixel=True)),
    ),
    Departure(
        "sau",
        "one step on each batch; option: `outer_steps` 2",
        Side("two-steps", change=two_outer_steps),
    ),
    Departure(
        "ft",
        "the cosine ends at the last epoch, 20; BackdoorBench: T_max 100 (`--schedule_epochs 100`)",
        Side("cosine-100", ("--schedule_epochs", "100")),
    ),
    Departure(
        "ft",
        "the attack's cosine (`--schedule cosine --lr 0.01`) ends at epoch 20; BackdoorBench: T_max"
        " 100",
        Side("cosine-100", attack_flags=(*COSINE, "--schedule_epochs", "100")),
        Side("cosine-20", attack_flags=COSINE),
        attacks=("badnet",),
        of_attack=True,
    ),
    Departure(
        "ft",
        "the attack's Adam (`--optimizer adam --lr 0.01`); BackdoorBench: AMSGrad"
        " (`--amsgrad True`)",
        Side("amsgrad", attack_flags=(*ADAM, "True")),
        Side("adam", attack_flags=(*ADAM, "False")),
        attacks=("badnet",),
        of_attack=True,
    ),
)


# --- the runs


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = options.record_root or Path(folder)
        print("| departure | attack | attacked | ours | as published |\n|---|---|---|---|---|")
        try:
            for row in rows(options.pages, options.attacks, options.seeds, root):
                print(f"| {' | '.join(row)} |", flush=True)
        except UserError as error:
            raise SystemExit(f"error: {error}") from error


def rows(
    pages: list[str], attacks: list[str], seeds: list[int], root: Path
) -> Iterator[tuple[str, ...]]:
    """Yield the cells of one row for each departure and attack, in the order of DEPARTURES."""
    for departure in DEPARTURES:
        for attack in departure.attacks:
            if departure.page not in pages or attack not in attacks:
                continue
            found = [compared(departure, attack, seed, root) for seed in seeds]
            yield departure.name, attack, *("; ".join(cells) for cells in zip(*found, strict=True))


def compared(departure: Departure, attack: str, seed: int, root: Path) -> tuple[str, str, str]:
    """Run both sides with one seed, and write down the scores before, ours and as published."""
    sides = (departure.ours, departure.published)
    records = [attacked(side, attack, seed, root) for side in sides]
    before = [shown(record.info["scores"]) for record in records]
    if departure.of_attack:
        return "", before[0], before[1]
    after = [
        shown(defended(side, departure.page, record, seed)["after"])
        for side, record in zip(sides, records, strict=True)
    ]
    return " and ".join(dict.fromkeys(before)), after[0], after[1]


def attacked(side: Side, attack: str, seed: int, root: Path, *flags: str) -> Record:
    """Make the record of a side, or read it if it is there."""
    name = "-".join([attack, *([side.name] if side.own_attack else []), f"seed{seed}"])
    if (root / name / "record.json").exists():
        return Record.load(name, root)
    file, *own = ATTACKS[attack]
    method = methods.load("attack", file)
    place = ("--save_folder_name", name, "--record_root", str(root), "--seed", str(seed))
    job = attack_job(method, [*place, *EXACT, *own, *side.attack_flags, *flags], "departures.py")
    # What the runs print is no part of the table.
    with contextlib.redirect_stdout(sys.stderr), side.attack_change(method.module):
        return run_attack(job)


def defended(side: Side, name: str, record: Record, seed: int, *flags: str) -> dict[str, Any]:
    """Run a side of a defense, or read its result if it is there."""
    folder = record.folder / "defense" / name / f"{side.name}-seed{seed}"
    if not (folder / "result.json").exists():
        method = methods.load("defense", name)
        place = ("--result_file", record.name, "--record_root", str(record.folder.parent))
        which = ("--seed", str(seed), "--run_name", folder.name)
        argv = [*place, *which, *EXACT, *side.flags, *flags]
        job = defense_job(method, argv, "departures.py")
        # What is replaced may have a state that no checkpoint knows: never continued.
        shutil.rmtree(folder.with_name(f"{folder.name}.partial"), ignore_errors=True)
        with contextlib.redirect_stdout(sys.stderr), side.change(method.module):
            run_defense(job)
    return read_result(folder)


def shown(scores: dict[str, Any]) -> str:
    """Write clean accuracy / ASR / RA in percent."""
    return " / ".join(f"{100 * scores[key]:.2f}" for key in SUMMARY)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    pages = list(dict.fromkeys(departure.page for departure in DEPARTURES))
    parser.add_argument("--pages", nargs="+", choices=pages, default=pages)
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--record_root", type=Path, default=None, help="folder to keep records and results in"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
