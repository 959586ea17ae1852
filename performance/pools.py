"""DAU's first pool, detected in three ways, and the split that each leads to.

    python performance/pools.py RECORD ... [--pools bimodal model_loss isolation true] [--seeds 0]
        [--record_root FOLDER] [--dataset_path FOLDER]

`true` draws the pool from the true poison, as the port does and no defender can. It distinguishes a
pool that was not detected from anti-learning that does not work. `isolation` trains a network of
its own for 20 epochs. All settings are those of `defense/dau.py --result_file RECORD`. Each row of
the Markdown table is printed as soon as it is measured.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backdoorlab.device import choose_device, seed_everything
from backdoorlab.errors import UserError
from backdoorlab.execution.defense import defense_job
from backdoorlab.execution.scores import ScoreLog
from backdoorlab.poison_search.anti_learning import find_poison
from backdoorlab.poison_search.pool import alone, draw
from backdoorlab.record import Record, defender_view, record_root
from backdoorlab.run import Run
from backdoorlab.settings import methods

POOLS = ("bimodal", "model_loss", "isolation", "true")
DAU = methods.load("defense", "dau")


def main() -> None:
    options = _options()
    print(
        "| record | clean accuracy, ASR | seed | pool | size, precision | flagged | TPR | FPR"
        " |\n|---|---|---|---|---|---|---|---|"
    )
    try:
        for row in rows(options):
            print(f"| {' | '.join(row)} |", flush=True)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the cells of one row for each record, seed and pool."""
    root = record_root(options.record_root)
    for name in options.records:
        argv = ["--result_file", name, "--record_root", str(root), "--device", options.device]
        config = defense_job(DAU, argv, "pools.py").config
        record, device = Record.load(name, root), choose_device(options.device)
        if not record.known_poison:
            raise UserError(
                f"{name} does not say which of its training images are poison: pools are measured"
                " on records of attacks"
            )

        dataset = record.dataset(options.dataset_path)
        before = record.info["scores"]

        # Every pool from the same seed, each in a run of its own.
        for seed in options.seeds:
            for pool in options.pools:
                with tempfile.TemporaryDirectory() as folder:
                    seed_everything(seed, device)
                    log = ScoreLog(train_poison=record.train_poison)
                    run = Run(
                        Path(folder),
                        seed=seed,
                        device=device,
                        precision=config.precision,
                        callbacks=log.callbacks(),
                    )
                    view = defender_view(record, dataset, DAU.assumes, None, device)
                    split(view, pool, record, config, run)

                found, flagged = log.splits.get("pool"), log.splits["split"]
                size = (
                    "none" if found is None else f"{found['flagged']}, {_share(found['precision'])}"
                )
                scores = f"{_share(before['clean_accuracy'])}, {_share(before['asr'])}"
                yield [
                    name,
                    scores,
                    str(seed),
                    pool,
                    size,
                    str(flagged["flagged"]),
                    _share(flagged["tpr"]),
                    _share(flagged["fpr"], 4),
                ]


def split(view: Any, pool: str, record: Record, config: Any, run: Run) -> None:
    """Run DAU's steps 1 to 3, which report their pool and their split to `run`.

    Args:
        view: DAU's view of the record.
        pool: one of POOLS.
        record: names the true poison, for the pool `true`.
        config: DAU's config.
        run: receives the splits `pool` and `split`.
    """
    if pool != "true":
        find_poison(view, dataclasses.replace(config, pool=pool), config.batch_size, run)
        return

    poison = record.train_poison.mask(len(view.train))
    share = min(0.5, config.pool_rate * len(view.train) / int(poison.sum()))
    (drawn,) = draw(poison, share, 1, run)
    whole = dataclasses.replace(config, pool_share=1.0)
    find_poison(view, whole, config.batch_size, run, alone(drawn))


def _share(value: float | None, digits: int = 3) -> str:
    return "none" if value is None else f"{value:.{digits}f}".removeprefix("0")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("records", nargs="+", help="names of records whose poison is known")
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=POOLS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the defense")
    parser.add_argument("--record_root", default=None, help="folder of records")
    parser.add_argument(
        "--dataset_path", default=None, help="the data set, if it is not where the record says"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args()


if __name__ == "__main__":
    main()
