"""What may enter one mean, and what may be concluded from it."""

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from scipy import stats

from backdoorlab.datasets import locations
from backdoorlab.device import Exact
from backdoorlab.execution.defense import defense_job
from backdoorlab.execution.precision import Timing
from backdoorlab.execution.stage import made_with, open_stage
from backdoorlab.record import Record
from backdoorlab.settings import methods
from backdoorlab.tables import formats, layout, published, significance
from backdoorlab.tables import groups as grouping
from backdoorlab.tables import rows as measured
from backdoorlab.tables.rows import Row


def row(
    defense: str = "none",
    seed: int = 0,
    attack: str = "badnet",
    der: float | None = None,
    **values: Any,
) -> Row:
    """A row of the digits; what is not said is the same in all."""
    plain: dict[str, Any] = dict(
        record=f"{attack}-s{seed}",
        run="" if defense == "none" else f"seed{seed}",
        attack=attack,
        defense=defense,
        assumes=() if defense == "none" else ("model", "trusted"),
        dataset="digits",
        fingerprint="a" * 64,
        architecture="preactresnet10 w16",
        poison_rate=0.1,
        seed=seed,
        defense_seed=None if defense == "none" else seed,
        clean_accuracy=0.9,
        asr=0.95 if defense == "none" else 0.1,
        robust_accuracy=0.05,
        asr_before=0.95,
        der=der,
        comparable_der=der,
        tpr=None,
        fpr=None,
        collapsed=False,
        seconds=10.0,
        forward=100,
        backward=50,
        peak_memory_bytes=1000,
        train_size=1442,
        device="cpu",
        attack_settings=json.dumps({"code": "c0de", "label_mode": "all2one", "position": "corner"}),
        defense_settings="" if defense == "none" else json.dumps({"code": "c0de", "lr": 0.01}),
    )
    return Row(**(plain | values))


def test_seeds_make_a_mean_and_nothing_else_does() -> None:
    rows = [row("ft", seed, der=der) for seed, der in enumerate((0.5, 0.6, 0.8))]
    (group,) = grouping.grouped(rows)
    score = group.score("der")
    assert score is not None and group.n == score.n == 3
    assert (
        math.isclose(score.mean, np.mean([0.5, 0.6, 0.8]))
        and score.sd is not None
        and math.isclose(score.sd, np.std([0.5, 0.6, 0.8], ddof=1))
    )
    assert group.worst.seed == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "b" * 64}, "data"),
        ({"architecture": "preactresnet10 w8"}, "architecture"),
        (
            {
                "attack_settings": json.dumps(
                    {"code": "c0de", "label_mode": "all2one", "position": "random"}
                )
            },
            "position",
        ),
        (
            {
                "attack_settings": json.dumps(
                    {"code": "0ther", "label_mode": "all2one", "position": "corner"}
                )
            },
            "code",
        ),
        ({"defense_settings": json.dumps({"code": "c0de", "lr": 0.1})}, "lr"),
        ({"defense_settings": json.dumps({"code": "0ther", "lr": 0.01})}, "code"),
    ],
)
def test_another_protocol_code_or_data_is_kept_apart_and_named(
    change: dict[str, Any], named: str
) -> None:
    rows = [row("ft", 0, der=0.5), row("ft", 1, der=0.6, **change)]
    groups = grouping.grouped(rows)
    assert [group.n for group in groups] == [1, 1]
    (remark,) = grouping.remarks(rows)
    assert f"2 experiments that differ in {named} are kept apart" in remark
    labels = grouping.labels(groups)
    assert labels[0] != labels[1] and all(
        f"{named}=" in label.attack + label.defense for label in labels
    )
    assert len(grouping.grouped([rows[0], row("ft", 1, der=0.6)])) == 1, (
        "the control: without the change they are one group"
    )


@pytest.mark.parametrize(
    "change",
    [{"poison_rate": 0.05}, {"dataset": "mnist"}, {"attack": "blended"}, {"run": "lite-s1"}],
)
def test_another_experiment_is_another_row_without_a_remark(change: dict[str, Any]) -> None:
    rows = [row("ft", 0, der=0.5), dataclasses.replace(row("ft", 1, der=0.6), **change)]
    assert len(grouping.grouped(rows)) == 2 and grouping.remarks(rows) == []


def test_a_seed_counts_once_however_often_it_was_run() -> None:
    rows = [row("ft", 0, der=0.5), row("ft", 1, der=0.6), row("ft", 0, der=0.5, record="copy")]
    (group,) = grouping.grouped(rows)
    assert group.n == 2
    assert grouping.remarks(rows) == [
        "copy's ft seed0 repeats a seed of the same experiment, so it is not counted again"
    ]


def test_seconds_of_different_machines_are_not_averaged() -> None:
    same, other = (
        [row("ft", 0, seconds=1.0), row("ft", 1, seconds=3.0, device=device)]
        for device in ("cpu", "cuda")
    )
    (group,) = grouping.grouped(same)
    assert group.score("seconds") == grouping.Summary(2.0, math.sqrt(2), 2)
    (group,) = grouping.grouped(other)
    assert group.score("seconds") is None and group.score("clean_accuracy") is not None


def test_the_worst_seed_is_one_model() -> None:
    rows = [
        row("ft", 0, der=0.9, clean_accuracy=0.5),
        row("ft", 1, der=0.6, clean_accuracy=0.99),
        row("ft", 2, der=0.7, clean_accuracy=0.9),
    ]
    (group,) = grouping.grouped(rows)
    assert (group.worst.seed, group.worst.clean_accuracy) == (
        1,
        0.99,
    ), "the lowest DER, though its clean accuracy is the best"
    clean = [
        row("ft", seed, der=None, attack="none", asr=None, clean_accuracy=0.9 - seed / 10)
        for seed in range(2)
    ]
    assert grouping.grouped(clean)[0].worst.seed == 1
    clean[0] = dataclasses.replace(clean[0], clean_accuracy=None)
    assert grouping.grouped(clean)[0].worst.seed == 1, "a seed without a number is not the worst"


def test_a_defense_no_better_than_fine_tuning_on_the_same_records() -> None:
    rows = [
        row(),
        row("ft", 0, der=0.7),
        row("ft", 1, der=0.9),
        row("good", 0, der=0.75),
        row("poor", 1, der=0.8),
        row("poor", 2, der=0.99),
    ]
    groups = grouping.grouped(rows)
    marks = {
        group.first.defense: mark
        for group, mark in zip(groups, grouping.no_better_than_baseline(groups), strict=True)
    }
    assert marks == {
        "none": None,
        "ft": None,
        "good": False,
        "poor": True,
    }, "poor's seed 2 has no fine-tuning beside it and does not count"
    elsewhere = grouping.grouped([row("ft", 0, der=0.7), row("good", 0, attack="blended", der=0.5)])
    assert grouping.no_better_than_baseline(elsewhere) == [None, None]


# --- from files


@pytest.mark.parametrize(
    ("info", "wanted"),
    [
        ({"config": {"precision": "auto"}, "precision": "bf16"}, "bf16"),
        ({"config": {"precision": "fp32"}, "precision": "fp32"}, "fp32"),
        ({"config": {"precision": "fp32"}}, "fp32"),
        ({"config": {"precision": "auto"}}, "unknown"),
        ({"config": {"crop_padding": 4, "flip": False}}, "unknown"),
    ],
)
def test_the_precision_is_what_was_computed_in(info: dict[str, Any], wanted: str) -> None:
    assert measured.precision(info) == wanted


@pytest.mark.parametrize(("seconds", "wanted"), [(0.5, "bf16"), (2.0, "fp32")])
def test_what_auto_became_is_kept(
    seconds: float, wanted: str, tmp_path: Path, small: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = helpers.copy(small, tmp_path)
    record.dataset()  # into the cache
    shutil.copytree(
        locations.cache_root(), tmp_path / "cache", ignore=shutil.ignore_patterns("precision-*")
    )
    monkeypatch.setenv("BACKDOORLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BACKDOORLAB_PRECISION", "auto")
    monkeypatch.setattr(
        "backdoorlab.execution.precision.measure", lambda _model, _shape: Timing(2, 1.0, seconds)
    )
    result = helpers.defend("ft", record, *helpers.short_flags("ft"), "--epochs", "1")
    assert (
        result is not None
        and result["precision"] == wanted
        and result["config"]["precision"] == "auto"
    )
    assert (
        result["precision_why"]
        == f"measured on this machine: a training step in bf16 takes {seconds:.2f} times as long as"
        " in fp32"
    )


def test_precisions_are_never_in_one_mean(tmp_path: Path, small: Record) -> None:
    made = []
    for seed, computed in enumerate(("bf16", "bf16", "fp32", None, None)):
        folder = helpers.copy(small, tmp_path, f"r{seed}").folder
        config = small.info["config"] | {"precision": "auto"}
        helpers.edit_json(folder / "record.json", seed=seed, precision=computed, config=config)
        made.append(Record.load(folder.name, tmp_path))
    found = measured.rows(made)
    assert sorted(tuple(row.record for row in group.rows) for group in grouping.grouped(found)) == [
        ("r0", "r1"),
        ("r2",),
        ("r3", "r4"),
    ]
    assert (
        grouping.remarks(found)[0]
        == "badnet on small: 3 experiments that differ in precision are kept apart, not averaged"
    )


def test_a_run_that_went_on_in_another_precision_says_both(tmp_path: Path, small: Record) -> None:
    record = helpers.copy(small, tmp_path)
    job = defense_job(
        methods.load("defense", "ft"),
        ["--result_file", record.name, "--record_root", str(tmp_path)],
        "test",
    )
    target = record.folder / "defense" / "ft" / "seed0"
    said = []
    computed: tuple[Exact, ...] = ("bf16", "bf16", "fp32", "fp32")
    for here in computed:
        with open_stage(target, "result.json", job, {}, here, torch.device("cpu")) as stage:
            (stage / "cached-something.safetensors").touch()
            said.append(made_with(stage)["precision"])
    assert said == ["bf16", "bf16", "bf16+fp32", "bf16+fp32"]


def test_two_imported_models_are_two_experiments(small: Record, tmp_path: Path) -> None:
    copies = []
    for name, digest in (("a", "a" * 64), ("b", "b" * 64), ("c", "a" * 64)):
        folder = helpers.copy(small, tmp_path, name).folder
        helpers.edit_json(
            folder / "record.json",
            source={"format": "pt", "sha256": digest},
            config={"crop_padding": 4, "flip": False},
        )
        copies.append(Record.load(name, tmp_path))
    found = measured.rows(copies)
    assert [group.n for group in grouping.grouped(found)] == [1, 1]
    assert grouping.remarks(found)[:2] == [
        "badnet on small: 2 experiments that differ in source are kept apart, not averaged",
        "c repeats a seed of the same experiment, so it is not counted again",
    ]


# --- statistics


@pytest.mark.parametrize("n", [1, 2, 5, 6, 9])
def test_sign_flip_is_the_exact_permutation_test(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(20):
        numbers = rng.normal(0.5, 1, n).round(1)
        patterns = np.array(list(itertools.product((1, -1), repeat=n)))
        listed = np.mean(abs(patterns @ numbers) >= abs(numbers.sum()) - 1e-9)
        assert significance.sign_flip(numbers.tolist()) == pytest.approx(listed, abs=1e-15)


def test_sign_flip_agrees_with_scipy() -> None:
    numbers = np.random.default_rng(0).normal(0.4, 1, 8)
    theirs = stats.permutation_test(
        (numbers,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert significance.sign_flip(numbers.tolist()) == pytest.approx(theirs.pvalue)


def test_sign_flip_counts_equal_sums_as_equal_though_they_are_rounded() -> None:
    """The sum is 0, so no pattern's is nearer to 0. scipy misses some that are as near."""
    numbers = [-0.04, -0.08, -0.02, 0.02, 0.08, 0.04]
    assert significance.sign_flip(numbers) == 1.0
    theirs = stats.permutation_test(
        (np.array(numbers),), np.sum, permutation_type="samples", n_resamples=np.inf
    )
    assert theirs.pvalue < 0.95, "why the test is our own"


def test_sign_flip_of_many_is_exact_too() -> None:
    assert significance.sign_flip([1.0] * 40) == 2 / 2**40
    assert significance.sign_flip([1.0, -1.0] * 10) == 1.0
    with pytest.raises(ValueError, match="at least one"):
        significance.sign_flip([])


def test_sign_flip_of_more_draws_the_same_patterns_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = np.random.default_rng(0).normal(0.5, 1, 12).tolist()
    exact = significance.sign_flip(numbers)
    monkeypatch.setattr("backdoorlab.tables.significance.MOST_LISTED", 11)
    drawn = significance.sign_flip(numbers)
    assert drawn == significance.sign_flip(numbers) != exact
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / significance.DRAWN)), (
        "four standard errors"
    )
    assert significance.sign_flip([1.0] * 200) == 1 / (1 + significance.DRAWN), "never 0"


def test_holm() -> None:
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0] and significance.holm([]) == []


def test_fewer_than_six_attacks_cannot_show_significance() -> None:
    """Whatever the numbers: all in one direction gives the smallest p there is."""
    assert (
        significance.sign_flip([1.0] * 5)
        > significance.SIGNIFICANT
        >= significance.sign_flip([1.0] * 6)
    )
    assert significance.fewest_attacks(1) == 6
    for comparisons in range(1, 30):
        n = significance.fewest_attacks(comparisons)
        assert significance.holm([significance.sign_flip([1.0] * n)] * comparisons)[0] <= 0.05
        assert significance.holm([significance.sign_flip([1.0] * (n - 1))] * comparisons)[0] > 0.05


def attacked(attacks: int, **defenses: float) -> list[grouping.Group]:
    """`attacks` attacks, two rates each, with fine-tuning at DER 0.6 and each defense above it by
    so much and a little more."""
    rows = []
    for number in range(attacks):
        for rate in (0.1, 0.05):
            shared: dict[str, Any] = dict(attack=f"attack{number}", poison_rate=rate)
            rows += [row(**shared), row("ft", der=0.6, **shared)]
            rows += [
                row(name, der=0.6 + lead + number / 1000, **shared)
                for name, lead in defenses.items()
            ]
    return grouping.grouped(rows)


@pytest.mark.parametrize(
    ("attacks", "says"),
    [
        (5, "Fewer than six attacks cannot show"),
        (6, "2 comparisons need 7"),
        (7, "Different from ft at 5 % after Holm: good."),
    ],
)
def test_the_verdict_says_what_so_many_attacks_can_show(attacks: int, says: str) -> None:
    (compared,) = significance.compare(attacked(attacks, good=0.1, even=-0.003))
    comparisons = compared.comparisons
    assert compared.notes == ()
    assert [comparison.defense for comparison in comparisons] == ["good", "even"]
    assert {comparison.attacks for comparison in comparisons} == {attacks}, (
        "rates of one attack are not two attacks"
    )
    assert comparisons[0].difference == pytest.approx(0.1 + (attacks - 1) / 2000)
    assert says in significance.verdict(comparisons)


def test_a_difference_is_one_of_two_defenses_on_one_record() -> None:
    """What fine-tuning was not run on counts for nobody, be it a rate or a seed."""
    rates = [row("ft", der=0.9), row("sau", der=0.9), row("sau", der=0.5, poison_rate=0.01)]
    seeds = [
        row("ft", 0, der=0.9),
        *(row("sau", seed, der=der) for seed, der in enumerate((0.95, 0.5, 0.5))),
    ]
    for rows, difference in ((rates, 0.0), (seeds, 0.05)):
        (comparison,) = significance.compare(grouping.grouped(rows))[0].comparisons
        assert comparison.difference == pytest.approx(difference)
    both = [*rates, row("ft", der=0.6, poison_rate=0.01)]
    (comparison,) = significance.compare(grouping.grouped(both))[0].comparisons
    assert comparison.difference == pytest.approx(-0.05), (
        "the control: with fine-tuning at both rates it is their mean"
    )


def settings(**values: Any) -> str:
    return json.dumps(
        {"code": "c0de", "label_mode": "all2one", "position": "corner", **values}, sort_keys=True
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attack_settings": settings(code="0ther")}, "(code=c0de), not (code=0ther)"),
        (
            {"architecture": "preactresnet10 w8"},
            "(architecture=preactresnet10 w16), not (architecture=preactresnet10 w8)",
        ),
        ({"attack_settings": settings(epochs=50)}, "(epochs=None), not (epochs=50)"),
        ({"fingerprint": "b" * 64}, "(data=aaaaaaaa), not (data=bbbbbbbb)"),
    ],
)
def test_an_attack_that_was_run_in_two_ways_is_one_observation(
    change: dict[str, Any], named: str
) -> None:
    """Three attacks, twice each: as six observations all in one direction they would be
    significant."""
    pairs = [
        (f"attack{number}", name, der)
        for number in range(3)
        for name, der in (("ft", 0.6), ("sau", 0.8))
    ]
    once = [row(name, seed, attack, der) for attack, name, der in pairs for seed in range(2)]
    twice = [
        dataclasses.replace(one, comparable_der=0.1 + (one.comparable_der or 0.0), **change)
        for one in once[2:]
        if one.seed == 0
    ]
    (alone,), (compared,) = (
        significance.compare(grouping.grouped(rows)) for rows in (once, once + twice)
    )
    assert (
        compared.comparisons == alone.comparisons
        and compared.comparisons[0].attacks == 3
        and compared.comparisons[0].p == 0.25
    )
    assert len(compared.notes) == 2 and alone.notes == (), (
        "the first was not run with fine-tuning in the second way"
    )
    assert compared.notes[0] == f"digits, attack1 was run in 2 ways, and the test takes {named}"


def test_all_attacks_are_on_one_network_where_they_can_be() -> None:
    small = {"architecture": "preactresnet10 w8"}
    rows = [
        row(name, attack=f"attack{number}", der=der)
        for number in range(3)
        for name, der in (("ft", 0.6), ("sau", 0.8))
    ]
    rows += [
        row(name, seed, attack="attack0", der=0.5, **small)
        for name in ("ft", "sau")
        for seed in range(2)
    ]
    (compared,) = significance.compare(grouping.grouped(rows))
    assert (
        "attack0 was run in 2 ways, and the test takes (architecture=preactresnet10 w16)"
        in compared.notes[0]
    )
    assert compared.comparisons[0].difference == pytest.approx(0.2)


def test_own_settings_make_another_attack_and_rates_do_not() -> None:
    random = settings(position="random")
    rows = [row(name, der=der) for name, der in (("ft", 0.6), ("sau", 0.8))]
    rows += [dataclasses.replace(one, attack_settings=random) for one in rows]
    assert significance.compare(grouping.grouped(rows))[0].comparisons[0].attacks == 2
    rows += [dataclasses.replace(one, poison_rate=0.05) for one in rows[:2]]
    assert significance.compare(grouping.grouped(rows))[0].comparisons[0].attacks == 2
    clean_label = [
        dataclasses.replace(one, attack_settings=settings(clean_label_ratio=share))
        for one in rows[:2]
        for share in (0.5, 0.2)
    ]
    assert significance.compare(grouping.grouped(clean_label))[0].comparisons[0].attacks == 1


def test_a_defense_with_other_settings_is_another_and_with_other_code_left_out() -> None:
    rows = [
        row(name, attack=f"attack{number}", der=der)
        for number in range(3)
        for name, der in (("ft", 0.6), ("sau", 0.8))
    ]
    last = rows[-1]
    other = [
        *rows[:-1],
        dataclasses.replace(last, defense_settings=json.dumps({"code": "c0de", "lr": 0.1})),
    ]
    (compared,) = significance.compare(grouping.grouped(other))
    assert {(c.defense, c.attacks) for c in compared.comparisons} == {
        ("sau (lr=0.01)", 2),
        ("sau (lr=0.1)", 1),
    }
    other[-1] = dataclasses.replace(
        last, defense_settings=json.dumps({"code": "0ther", "lr": 0.01})
    )
    (compared,) = significance.compare(grouping.grouped(other))
    assert [(c.defense, c.attacks) for c in compared.comparisons] == [("sau", 2)]
    assert compared.notes == (
        "digits, sau was run in 2 ways, and the test takes (code=c0de), not (code=0ther)",
    )


def test_one_of_two_baselines_is_taken_and_named() -> None:
    rows = [
        row(name, attack=f"attack{number}", der=der)
        for number in range(2)
        for name, der in (("ft", 0.6), ("sau", 0.8))
    ]
    rows += [
        row(
            "ft",
            der=0.5,
            attack="attack0",
            defense_settings=json.dumps({"code": "c0de", "lr": 0.1}),
        )
    ]
    (compared,) = significance.compare(grouping.grouped(rows))
    assert {(c.defense, c.baseline, c.attacks) for c in compared.comparisons} == {
        ("sau", "ft (lr=0.01)", 2),
        ("ft (lr=0.1)", "ft (lr=0.01)", 1),
    }
    assert compared.notes == (
        "digits, ft (lr=0.01), ft (lr=0.1) are there: the others are compared with ft (lr=0.01)",
    )
    assert any(
        note.startswith("digits, DER minus ft (lr=0.01)'s") for note in layout.means(rows).notes
    )


def test_a_defense_without_a_record_in_common_with_fine_tuning_is_named() -> None:
    rows = [row("ft", der=0.6), row("sau", der=0.8), row("dau", 1, der=0.9), row("sau", 1, der=0.9)]
    (compared,) = significance.compare(grouping.grouped(rows))
    assert [c.defense for c in compared.comparisons] == ["sau"]
    assert compared.notes == (
        "digits, not compared with ft, as they have no record in common: dau",
    )


def test_defenses_are_compared_against_one_model() -> None:
    """A training-time defense on a joint attack has a DER of its own, against plain training, whose
    ASR is lower: not to be held against it."""
    rows = [
        row(attack="wanet"),
        row("ft", attack="wanet", der=0.89),
        row("asd", attack="wanet", der=0.87, comparable_der=0.92),
    ]
    table = layout.means(rows)
    assert not any("†" in note for note in table.notes) and any(
        "asd +3.00" in note for note in table.notes
    )
    assert "DER of asd on joint attacks: against plain training on the same images;" in " ".join(
        table.notes
    )
    control = layout.means([*rows[:2], row("asd", attack="wanet", der=0.87)])
    assert any("†" in note for note in control.notes) and not any(
        "joint attacks" in note for note in control.notes
    )


def test_fine_tuning_alone_is_compared_with_nothing() -> None:
    rows = [row(), row("ft", der=0.6)]
    assert significance.compare(grouping.grouped(rows)) == [significance.Compared((), ())]
    assert not any("DER minus" in note for note in layout.means(rows).notes)


def test_a_table_of_more_attacks_than_can_be_listed_says_so() -> None:
    (note,) = [
        note
        for note in layout.means(
            [member for group in attacked(41, good=0.1) for member in group.rows]
        ).notes
        if "DER minus" in note
    ]
    assert note.endswith(
        "Different from ft at 5 % after Holm: good. p from 100,000 random sign flips, as all of 41"
        " attacks are too many to list."
    )


def test_an_attack_that_did_not_take_proves_nothing() -> None:
    groups = grouping.grouped(
        [
            row(asr=0.2, asr_before=0.2),
            row("ft", der=0.5, asr_before=0.2),
            row("good", der=0.6, asr_before=0.2),
        ]
    )
    assert significance.compare(groups) == []
    assert grouping.remarks([member for group in groups for member in group.rows]) == [
        "badnet (10 %) on digits was hardly implanted: ASR 20 % before any defense, so its DER says"
        " little"
    ]


# --- tables

ROWS = [
    row(),
    row(seed=1, asr=0.97),
    row("ft", 0, der=0.6, clean_accuracy=0.88),
    row("ft", 1, der=0.7, clean_accuracy=0.9),
    row("sau", 0, der=0.55, tpr=0.5, fpr=0.25),
    row("sau", 1, der=0.65, collapsed=True, tpr=0.7, fpr=0.35),
]

TEXT = """\
data    attack  poison %  defense               assumes                 n   clean acc %         ASR %         RA %           DER %          TPR %         FPR %  seconds
------  ------  --------  --------------------  ----------------------  -  ------------  ------------  -----------  --------------  -------------  ------------  -------
digits  badnet        10  none                  -                       2  90.00 ± 0.00  96.00 ± 1.41  5.00 ± 0.00               -              -             -   10 ± 0
digits  badnet        10  ft                    model + trusted images  2  89.00 ± 1.41  10.00 ± 0.00  5.00 ± 0.00    65.00 ± 7.07              -             -   10 ± 0
digits  badnet        10  sau COLLAPSED 1 of 2  model + trusted images  2  90.00 ± 0.00  10.00 ± 0.00  5.00 ± 0.00  60.00 ± 7.07 †  60.00 ± 14.14  30.00 ± 7.07   10 ± 0
digits  badnet        10  dau                   model + training set    0             -             -            -               -              -             -        -

Mean ± standard deviation over n seeds; seconds without evaluation.
RA: triggered images that are classified correctly. DER: 50 is no effect, 100 is an ASR from 100 to 0 at no cost in accuracy.
digits: preactresnet10 w16, 1,442 training images.
†: no better than fine-tuning (ft) in DER on the same records.
digits, DER minus ft's, mean over attacks: sau -5.00. Fewer than six attacks cannot show significance: with 1 the smallest p that an exact \
sign-flip test can give is 1, 1 after Holm.
"""


def test_golden_means() -> None:
    assert (
        formats.render(
            layout.means(ROWS, missing=[layout.Missing("digits", "badnet", 0.1, "dau", "dau")]),
            "text",
        )
        == TEXT
    )


def test_cells_of_means_carry_numbers_that_are_not_rounded() -> None:
    (_, tuned, unlearned) = layout.means([*ROWS[:5], dataclasses.replace(ROWS[5], der=0.66)]).rows
    assert tuned["DER %"].text == "65.00 ± 7.07" and tuned["DER %"].value == pytest.approx(0.65)
    assert unlearned["DER %"].value == pytest.approx(0.605), "the mark is text only"
    assert (tuned["n"].value, tuned["poison %"].value) == (2, 10)
    assert tuned["TPR %"] == formats.EMPTY
    spread = layout.means(ROWS, "csv").rows[1]["DER % sd"]
    assert spread.text == "7.07" and spread.value == pytest.approx(math.sqrt(0.005))


def test_means_as_csv_have_a_column_for_each_sd() -> None:
    lines = formats.render(layout.means(ROWS, "csv"), "csv").splitlines()
    named = dict(zip(lines[0].split(","), lines[3].split(","), strict=True))
    assert named["DER %"] == "60.00" and named["DER % sd"] == "7.07" and named["n"] == "2"


def test_means_in_latex_and_markdown() -> None:
    latex = formats.render(layout.means(ROWS, "latex"), "latex")
    assert r"60.00 $\pm$ 7.07 $^\dagger$" in latex and latex.splitlines()[-1].startswith(
        "% digits, DER"
    )
    markdown = formats.render(layout.means(ROWS, "markdown"), "markdown").splitlines()
    assert markdown[4].startswith("| digits | badnet | 10 | sau") and markdown[6].startswith(
        "- Mean"
    )


def test_what_changes_nothing_is_no_setting() -> None:
    """How many images a defense would trust if it did, and the width that is taken anyway; for a
    defense that trusts some it is one."""

    def settings_of(assumes: list[str], **config: Any) -> str:
        return measured._settings(
            {"assumes": assumes, "code": "c", "precision": "fp32", "config": config}
        )

    assert settings_of(["model", "train"], trusted_ratio=0.1) == settings_of(
        ["model", "train"], trusted_ratio=0.05
    )
    assert settings_of(["model", "trusted"], trusted_ratio=0.1) != settings_of(
        ["model", "trusted"], trusted_ratio=0.05
    )
    assert (
        settings_of([], width=64, plain=True)
        == settings_of([], width=None, plain=False)
        != settings_of([], width=32, plain=False)
    )


@pytest.mark.parametrize(
    ("asked", "poisoned", "shown"),
    [
        (0.1, 10, 0.1),
        (0.1, 11, 0.1),
        (0.5, 20, 0.2),
        (None, 5, 0.05),
        (None, 0, None),
        (0.1, 0, 0.1),
    ],
)
def test_the_poison_rate_is_what_could_be_had(
    asked: float | None, poisoned: int, shown: float | None
) -> None:
    assert (
        measured._rate(
            {"config": {"poison_rate": asked}, "poisoned": poisoned, "dataset": {"train_size": 100}}
        )
        == shown
    )


def test_the_worst_seed_on_request() -> None:
    shown = layout.means(ROWS, worst=True)
    sau = next(line for line in shown.rows if line["defense"].text.startswith("sau"))
    assert [sau[column].text for column in ("seed", "DER %", "TPR %")] == ["0", "55.00 †", "50.00"]
    assert "n" not in shown.columns
    assert sau["defense"].text == "sau", "seed 1 collapsed, not this one"
    other = layout.means(
        [
            row(),
            *(
                row("ft", der=der, run=f"seed{seed}", defense_seed=seed)
                for seed, der in enumerate((0.6, 0.5))
            ),
        ],
        worst=True,
    )
    assert [line["seed"].text for line in other.rows] == [
        "0",
        "0 / 1",
    ], "the attack's seed, and the defense's where it is another"
    fallen = [dataclasses.replace(one, der=0.1) if one.collapsed else one for one in ROWS]
    assert layout.means(fallen, worst=True).rows[-1]["defense"].text == "sau COLLAPSED"


# --- published numbers


def test_published_numbers_are_scores_with_a_source() -> None:
    numbers = published.published()
    assert len(numbers) > 80
    for number in numbers:
        assert number.source and number.protocol and 0 < number.poison_rate < 1
        assert {"clean_accuracy", "asr"} <= set(number.scores) and all(
            0 <= score <= 1 for score in number.scores.values()
        )


def test_published_der_fits_the_published_scores() -> None:
    """FT-SAM prints DER; it follows from the other numbers, so a slip in copying shows."""
    numbers = {
        (n.attack, *sorted(n.settings.items()), n.defense): n.scores
        for n in published.published()
        if n.key == "ftsam" and n.dataset == "cifar10"
    }
    checked = 0
    for (*attack, defense), scores in numbers.items():
        if "der" in scores:
            before = numbers[(*attack, "none")]
            der = (
                max(0, before["asr"] - scores["asr"])
                - max(0, before["clean_accuracy"] - scores["clean_accuracy"])
                + 1
            ) / 2
            assert der == pytest.approx(scores["der"], abs=1.01e-4), (attack, defense)
            checked += 1
    assert checked == 10


def test_what_is_missing_is_a_row_without_numbers_beside_its_like_or_at_the_end() -> None:
    missing = [
        layout.Missing("digits", "badnet", 0.1, "sau lite", "sau"),
        layout.Missing("digits", "sig", 0.05, "none", "none"),
    ]
    shown = [
        (line["attack"].text, line["defense"].text, line["n"].text)
        for line in layout.means([*ROWS, row(attack="lf")], missing=missing).rows
    ]
    assert (
        shown.index(("badnet", "sau lite", "0")) == 3
        and shown[-1] == ("sig", "none", "0")
        and len(shown) == 6
    )


def test_what_is_missing_of_an_attack_that_is_there_stands_under_its_name_there() -> None:
    settings = '{"position": "random"}', '{"position": "corner"}'
    done = [
        row(record=name, attack_settings=text)
        for name, text in zip(("r1", "r2"), settings, strict=True)
    ]
    (line,) = [
        line
        for line in layout.means(
            done, missing=[layout.Missing("digits", "badnet-random", 0.1, "sau", "sau", "r1")]
        ).rows
        if line["n"].text == "0"
    ]
    assert line["attack"].text == "badnet (position=random)"


def test_a_csv_explains_no_mark_that_it_does_not_have() -> None:
    found = [row(), row("ft", der=0.6), row("sau", der=0.5)]
    assert [
        any("†" in note for note in layout.means(found, form).notes) for form in ("text", "csv")
    ] == [True, False]


def test_leads_over_different_attacks_say_over_how_many() -> None:
    groups = [*attacked(2, sau=0.1), *grouping.grouped([row("dau", attack="attack0", der=0.9)])]
    said = next(
        note
        for note in layout.means([member for group in groups for member in group.rows]).notes
        if "minus ft" in note
    )
    assert "sau +10.05 (2 attacks)" in said and "dau +30.00 (1 attack)" in said
    alone = layout.means([member for group in attacked(2, sau=0.1) for member in group.rows]).notes
    assert any("sau +10.05." in note for note in alone), "the control"


def test_whether_an_attack_took_is_asked_of_its_own_models() -> None:
    """A defense that was run on the one seed that took does not make it an attack that did."""
    rows = [row(seed=seed, asr_before=asr) for seed, asr in enumerate((0.9, 0.1, 0.1))]
    rows += [row(name, 0, der=der, asr_before=0.9) for name, der in (("ft", 0.6), ("sau", 0.8))]
    assert significance.compare(grouping.grouped(rows)) == []
    assert significance.compare(grouping.grouped(rows[3:]))[0].comparisons[0].attacks == 1, (
        "where there is no such row, it goes by what there is"
    )


def test_a_published_number_stands_beside_the_same_experiment_only() -> None:
    ours = row("ibau", dataset="cifar10", der=0.9)
    assert {number.key for number in published.beside(ours)} == {"ftsam"}
    random = json.dumps({"code": "c0de", "label_mode": "all2one", "position": "random"})
    for change in (
        {"attack_settings": random},
        {"poison_rate": 0.2, "attack": "blended"},
        {"dataset": "digits"},
        {"defense": "sau"},
    ):
        assert published.beside(dataclasses.replace(ours, **change)) == []
    blended = dataclasses.replace(
        ours,
        attack="blended",
        attack_settings=json.dumps({"label_mode": "all2one", "alpha": 0.2, "epochs": 10}),
    )
    assert {number.key for number in published.beside(blended)} == {
        "ftsam",
        "bb",
    }, "another length is another protocol, which is shown"
    for changed in ({"alpha": 0.02}, {"label_mode": "all2all"}):
        other = json.dumps(json.loads(blended.attack_settings) | changed)
        assert published.beside(dataclasses.replace(blended, attack_settings=other)) == []
    table = layout.means([ours])
    assert table.rows[0]["reported"].text == "87.43 / 4.48 [ftsam]" and any(
        note.startswith("[ftsam] ") for note in table.notes
    )
    assert "reported" not in layout.means([dataclasses.replace(ours, dataset="digits")]).columns
    for columns, said in (("defense,reported", True), ("defense,ASR", False)):
        notes = layout.with_columns(table, columns).notes
        assert any(note.startswith("[ftsam]") for note in notes) == said
