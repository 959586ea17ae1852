"""A whole attack and a whole defense, ours against the conventional way, with both sides' scores.

    python performance/whole.py [--seeds 3] [--rounds 15] [--json FILE] [flags of attack/badnet.py]

The conventional way is in published.py. Ours is what the commands run, including reading the data
and writing the record. Both train the same network on the same poisoned set with the same settings,
score it after each epoch, and are measured alternately. Speed counts only at equal scores, so each
row also shows clean accuracy and ASR, as means over the seeds. Each seed draws another network and
other poison. Flags of attack/badnet.py are, for example, --dataset, --epochs and --width.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import measure
import published
import torch
import torch.nn.functional as F
from measure import Row, busy, describe_machine, report, timed

from backdoorlab.device import choose_device, seed_everything
from backdoorlab.execution.attack import attack_job, run_attack
from backdoorlab.execution.defense import defense_job, run_defense
from backdoorlab.execution.stage import Job
from backdoorlab.execution.trusted import trusted_images
from backdoorlab.poisoning import new_model
from backdoorlab.record import Record
from backdoorlab.settings import methods

badnet, sau = methods.load("attack", "badnet"), methods.load("defense", "sau")
PROG = "performance/whole.py"


@dataclass(frozen=True)
class Side:
    """The time and the final scores of one side."""

    seconds: float
    clean: float
    asr: float


def main() -> None:
    options, flags = _options()
    device = choose_device(options.device)

    # The start of the GPU counts for neither side.
    F.conv2d(torch.zeros(1, 3, 8, 8, device=device), torch.zeros(1, 3, 3, 3, device=device))
    caution = "the machine is busy" if busy() else "none"
    header = describe_machine(
        device,
        data=" ".join(flags) or "attack/badnet.py without flags",
        caution=caution,
        seeds=str(options.seeds),
    )
    report(header, _rows(options, flags, device), options.json)


def _rows(options: argparse.Namespace, flags: list[str], device: torch.device) -> Iterator[Row]:
    attacks, defenses = [], []
    with tempfile.TemporaryDirectory() as root:
        for seed in range(options.seeds):
            # The attack on both sides: the conventional one on the record's poisoned set.
            common = ["--seed", str(seed), "--record_root", root, "--device", options.device]
            job = attack_job(badnet, [*flags, *common, "--save_folder_name", f"seed{seed}"], PROG)
            seconds, record = timed(partial(run_attack, job), device)
            attacks.append(
                (
                    _attack(record, job, options.workers, device),
                    _side(seconds, record.info["scores"]),
                )
            )

            # The defense on both sides, on that record.
            chosen = [
                "--result_file",
                record.name,
                "--n_rounds",
                str(options.rounds),
                "--cosine",
                "False",
            ]
            job = defense_job(sau, [*chosen, *common], PROG)
            seconds, result = timed(partial(run_defense, job), device)
            assert result is not None
            defenses.append(
                (_defense(record, job, options.workers, device), _side(seconds, result["after"]))
            )

    yield _row("a whole attack (BadNets)", attacks)
    yield _row(f"a whole defense (SAU, {options.rounds} rounds)", defenses)


def _attack(record: Record, job: Job, workers: int, device: torch.device) -> Side:
    """Time the conventional training on the record's poisoned set, from the same first weights."""
    config = job.config

    def work() -> dict[str, float]:
        dataset = record.dataset(config.dataset_path)
        received = record.train_poison.apply(dataset.train)
        tests = published.Tests.of(dataset.test, record.test_poison, config.batch_size, workers)
        seed_everything(config.seed, device)
        model = new_model(dataset, config).to(memory_format=torch.contiguous_format).to(device)
        return published.training(model, received, config.recipe(), tests, workers)

    return _side(*timed(work, device))


def _defense(record: Record, job: Job, workers: int, device: torch.device) -> Side:
    """Time the conventional SAU on the same trusted images."""
    config = job.config

    def work() -> dict[str, float]:
        dataset = record.dataset(config.dataset_path)
        tests = published.Tests.of(dataset.test, record.test_poison, config.batch_size, workers)
        seed_everything(config.seed, device)
        model, reference = (
            record.model().to(memory_format=torch.contiguous_format).to(device) for _ in range(2)
        )
        return published.sau(
            model,
            reference,
            trusted_images(config, record, dataset)[0],
            config.n_rounds,
            config.batch_size,
            config.lr,
            tests,
            workers,
        )

    return _side(*timed(work, device))


def _side(seconds: float, scores: dict[str, Any]) -> Side:
    return Side(seconds, scores["clean_accuracy"], scores["asr"])


def _row(name: str, pairs: list[tuple[Side, Side]]) -> Row:
    theirs, ours = zip(*pairs, strict=True)
    detail = ", ".join(
        f"{side} {_mean(found, 'seconds'):.0f} s {100 * _mean(found, 'clean'):.1f} /"
        f" {100 * _mean(found, 'asr'):.1f} %"
        for side, found in (("conventional", theirs), ("ours", ours))
    )
    return Row(
        f"conventional / ours: {name}",
        "-",
        tuple(a.seconds / b.seconds for a, b in pairs),
        detail=detail,
    )


def _mean(sides: tuple[Side, ...], what: str) -> float:
    return statistics.mean(getattr(side, what) for side in sides)


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = measure.options(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15, help="of SAU")
    parser.add_argument(
        "--workers", type=int, default=2, help="loader workers of the conventional way"
    )
    return parser.parse_known_args()


if __name__ == "__main__":
    main()
