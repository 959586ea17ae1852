"""The table against text written by hand."""

import csv
import io
import shutil
from pathlib import Path
from typing import Any

import helpers
import pytest

from backdoorlab.__main__ import main
from backdoorlab.data import Split
from backdoorlab.errors import UserError
from backdoorlab.execution.defense import report
from backdoorlab.poison import no_poison
from backdoorlab.record import Record, read_result
from backdoorlab.settings import methods
from backdoorlab.storage import reading, writing
from backdoorlab.storage.schema import SCHEMA
from backdoorlab.tables import formats, layout
from backdoorlab.tables import groups as grouping
from backdoorlab.tables import rows as measured

TEXT = """\
record  attack  defense        assumes                 clean acc %  ASR %   RA %  DER %  TPR %  FPR %  seconds
------  ------  -------------  ----------------------  -----------  -----  -----  -----  -----  -----  -------
b_ad    badnet  none           -                             91.82  93.79   5.12      -      -      -       61
b_ad    badnet  dau            model + training set          90.00   1.00  88.00  95.48  98.75   0.12       30
b_ad    badnet  ft             model + trusted images        87.43   4.48  80.00  92.46      -      -       13
b_ad    badnet  ft (long)      model + trusted images        91.82  93.79   5.12  50.00      -      -      100

clean   none    none           -                             99.00      -      -      -      -      -        5
clean   none    dau COLLAPSED  model + training set          10.00      -      -      -      -   2.50        7
clean   none    ft             model + trusted images            -      -      -      -      -      -        -

No ASR for clean: no attack, so no image has a trigger.
"""

MARKDOWN = """\
| record | attack | defense | assumes | clean acc % | ASR % | RA % | DER % | TPR % | FPR % | seconds |
| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| b_ad | badnet | none | - | 91.82 | 93.79 | 5.12 | - | - | - | 61 |
| b_ad | badnet | dau | model + training set | 90.00 | 1.00 | 88.00 | 95.48 | 98.75 | 0.12 | 30 |
| b_ad | badnet | ft | model + trusted images | 87.43 | 4.48 | 80.00 | 92.46 | - | - | 13 |
| b_ad | badnet | ft (long) | model + trusted images | 91.82 | 93.79 | 5.12 | 50.00 | - | - | 100 |
| clean | none | none | - | 99.00 | - | - | - | - | - | 5 |
| clean | none | dau COLLAPSED | model + training set | 10.00 | - | - | - | - | 2.50 | 7 |
| clean | none | ft | model + trusted images | - | - | - | - | - | - | - |

- No ASR for clean: no attack, so no image has a trigger.
"""

CSV = """\
record,attack,defense,assumes,clean acc %,ASR %,RA %,DER %,TPR %,FPR %,seconds
b_ad,badnet,none,,91.82,93.79,5.12,,,,61
b_ad,badnet,dau,model + training set,90.00,1.00,88.00,95.48,98.75,0.12,30
b_ad,badnet,ft,model + trusted images,87.43,4.48,80.00,92.46,,,13
b_ad,badnet,ft (long),model + trusted images,91.82,93.79,5.12,50.00,,,100
clean,none,none,,99.00,,,,,,5
clean,none,dau COLLAPSED,model + training set,10.00,,,,,2.50,7
clean,none,ft,model + trusted images,,,,,,,
"""

LATEX = r"""\begin{tabular}{llllrrrrrrr}
\toprule
record & attack & defense & assumes & clean acc \% & ASR \% & RA \% & DER \% & TPR \% & FPR \% & seconds \\
\midrule
b\_ad & badnet & none & - & 91.82 & 93.79 & 5.12 & - & - & - & 61 \\
b\_ad & badnet & dau & model + training set & 90.00 & 1.00 & 88.00 & 95.48 & 98.75 & 0.12 & 30 \\
b\_ad & badnet & ft & model + trusted images & 87.43 & 4.48 & 80.00 & 92.46 & - & - & 13 \\
b\_ad & badnet & ft (long) & model + trusted images & 91.82 & 93.79 & 5.12 & 50.00 & - & - & 100 \\
\midrule
clean & none & none & - & 99.00 & - & - & - & - & - & 5 \\
clean & none & dau COLLAPSED & model + training set & 10.00 & - & - & - & - & 2.50 & 7 \\
clean & none & ft & model + trusted images & - & - & - & - & - & - & - \\
\bottomrule
\end{tabular}
% No ASR for clean: no attack, so no image has a trigger.
"""


def scores(
    clean_accuracy: float, asr: float | None, robust_accuracy: float | None
) -> dict[str, float | None]:
    return {"clean_accuracy": clean_accuracy, "asr": asr, "robust_accuracy": robust_accuracy}


def result(
    folder: Path, defense: str, run: str, after: dict[str, float | None], **values: Any
) -> None:
    path = folder / "defense" / defense / run
    path.mkdir(parents=True)
    assumes = {"dau": ["model", "train"], "ft": ["model", "trusted"]}[defense]
    content = {
        "assumes": assumes,
        "after": after,
        "der": None,
        "collapsed": False,
        "split": None,
        "seconds": 1.0,
        **values,
    }
    writing.write_sealed(path / "result.json", {"schema": SCHEMA, "files": {}, **content})


@pytest.fixture
def two_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """One attacked record with three results, one clean one with a result and a defense that was
    not run."""
    known = {
        "attack": methods.available("attack"),
        "defense": {n: p for n, p in methods.available("defense").items() if n in ("dau", "ft")},
    }
    monkeypatch.setattr("backdoorlab.settings.methods.available", lambda kind: known[kind])
    import torch

    poison = no_poison(
        Split(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    )
    shared = {
        "config": {},
        "dataset": {"name": "digits", "fingerprint": "0" * 64, "train_size": 9},
        "architecture": {"name": "preactresnet10", "width": None},
        "seed": 0,
    }
    first = {
        "attack": "badnet",
        "scores": scores(0.9182, 0.9379, 0.0512),
        "seconds": 60.7,
        "measured": {"psnr": 25.0},
        **shared,
    }
    second = {"attack": "none", "scores": scores(0.99, None, None), "seconds": 5.2, **shared}
    bad = tmp_path / "b_ad"
    split = {"tpr": 0.9875, "fpr": 0.0012, "precision": 0.9, "flagged": 3, "cross_flagged": None}
    result(bad, "dau", "seed0", scores(0.9, 0.01, 0.88), der=0.95485, split=split, seconds=30.2)
    result(bad, "ft", "seed0", scores(0.8743, 0.0448, 0.8), der=0.9246, seconds=12.9)
    result(bad, "ft", "long", scores(0.9182, 0.9379, 0.0512), der=0.5, seconds=100)
    result(bad, "ft", "other.partial", scores(0.1, 0.1, 0.1))
    clean_split = {**split, "tpr": None, "fpr": 0.025}
    result(
        tmp_path / "clean",
        "dau",
        "seed0",
        scores(0.1, None, None),
        collapsed=True,
        split=clean_split,
        seconds=7,
    )
    return [Record(bad, first, poison, poison), Record(tmp_path / "clean", second, poison, poison)]


@pytest.mark.parametrize(
    ("form", "golden"), [("text", TEXT), ("markdown", MARKDOWN), ("csv", CSV), ("latex", LATEX)]
)
def test_golden_forms(two_records: list[Record], form: formats.Format, golden: str) -> None:
    assert layout.render(layout.rows(two_records), form) == golden


@pytest.mark.parametrize(
    ("attack", "why"),
    [
        ("none", "no attack, so no image has a trigger"),
        ("unknown", "its trigger is unknown"),
        ("badnet", "no test image could be triggered"),
    ],
)
def test_a_missing_asr_says_why(two_records: list[Record], attack: str, why: str) -> None:
    attacked, clean = two_records
    clean.info["attack"] = attack  # type: ignore[index]
    for mean in (False, True):
        shown = formats.render(layout.table(two_records, mean=mean), "text")
        assert f"No ASR for clean: {why}." in shown
        assert "No ASR" not in formats.render(layout.table([attacked], mean=mean), "text"), (
            "a defense that was not run has no ASR either, and needs no reason"
        )
    result = read_result(clean.folder / "defense" / "dau" / "seed0")
    said = report({**result, "attack": attack, "before": scores(0.99, None, None)})
    assert f"clean accuracy 99.00 -> 10.00 %, no ASR ({why}), 7 s" in said


def test_means_of_unknown_attacks_name_their_records(two_records: list[Record]) -> None:
    for width, record in enumerate(two_records, 8):
        record.info["attack"] = "unknown"  # type: ignore[index]
        record.info["config"] = {"width": width}  # type: ignore[index]
    shown = formats.render(layout.table(two_records, mean=True), "text")
    assert all(f"unknown: {record.name} " in shown for record in two_records)
    assert "kept apart" not in shown, "nobody says that they are one experiment"


def test_a_constant_answer_is_collapsed_in_tables(two_records: list[Record]) -> None:
    """Its clean accuracy and ASR are those of a success; an older result does not say better."""
    sound = {**scores(0.93, 1.0, 0.0), "balanced_accuracy": 0.92, "largest_share": 0.88}
    answer = {**scores(0.90, 0.0, 1.0), "balanced_accuracy": 0.5, "largest_share": 1.0}
    older = scores(0.90, 0.0, 1.0)
    for run, after, mark in (("a", answer, " COLLAPSED"), ("b", older, ""), ("c", sound, "")):
        folder = two_records[0].folder
        result(folder, "ft", run, after, before=sound)
        assert f"ft ({run}){mark}" in [row["defense"].text for row in layout.rows(two_records)]


def test_csv_leaves_out_what_was_not_run(two_records: list[Record]) -> None:
    read = list(csv.DictReader(io.StringIO(layout.render(layout.rows(two_records), "csv"))))
    not_run = next(row for row in read if row["record"] == "clean" and row["defense"] == "ft")
    assert not_run["clean acc %"] == "" and not_run["ASR %"] == ""
    assert not_run["assumes"] == "model + trusted images"
    assert len(read) == 7


def test_a_cell_carries_the_number_behind_its_text(two_records: list[Record]) -> None:
    shown = layout.rows(two_records)[1]
    assert shown["DER %"] == formats.Cell("95.48", 0.95485), "a fraction that is not rounded"
    assert shown["seconds"] == formats.Cell("30", 30.2)
    assert shown["assumes"].value is None and shown["defense"].value is None, "words have none"
    assert layout.rows(two_records)[0]["DER %"] == formats.EMPTY == formats.Cell("-", None)


def test_a_table_of_records_is_of_runs_or_of_means(two_records: list[Record]) -> None:
    assert formats.render(layout.table(two_records), "text") == TEXT
    rows = measured.rows(two_records)
    assert layout.table(two_records, mean=True) == layout.means(rows)
    assert layout.table(two_records, "csv", mean=True) == layout.means(rows, "csv")
    assert layout.table(two_records, worst=True) == layout.means(rows, worst=True)


def test_unfinished_results_are_not_shown(two_records: list[Record]) -> None:
    assert not [row for row in layout.rows(two_records) if "other" in row["defense"].text]


def test_what_is_put_aside_is_no_result(two_records: list[Record]) -> None:
    """.seed0.old is the last result while the new one takes its place, .seed0.trash a half-deleted
    one."""
    shown = layout.rows(two_records)
    runs = two_records[0].folder / "defense" / "ft"
    shutil.copytree(runs / "seed0", runs / ".seed0.old")
    (runs / ".seed0.trash").mkdir()
    (runs / ".seed0.trash" / "result.json").write_text("{")
    assert layout.rows(two_records) == shown


def test_a_result_of_an_unknown_defense_is_shown_too(two_records: list[Record]) -> None:
    (two_records[0].folder / "defense" / "dau").rename(
        two_records[0].folder / "defense" / "mystery"
    )
    shown = {row["defense"].text: row for row in layout.rows(two_records[:1])}
    assert "mystery" in shown and "dau" in shown, "and the known one is shown as not run"
    assert shown["dau"]["clean acc %"] == formats.EMPTY


def test_no_record_is_a_heading(two_records: list[Record]) -> None:
    for form in ("text", "markdown", "csv", "latex"):
        assert "clean acc" in layout.render([], form)


@pytest.mark.parametrize("content", ["{", "[]", '{"after": 3}', "{}"])
def test_a_damaged_result_is_one_line_that_names_it(
    two_records: list[Record], content: str
) -> None:
    path = two_records[0].folder / "defense" / "ft" / "seed0" / "result.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"result.json: damaged"):
        layout.rows(two_records)


WRONG: list[dict[str, Any]] = [
    {"config": None},
    {"config": 7},
    {"before": None},
    {"config": []},
    {"before": 7},
    {"before": {"clean_accuracy": 1.0, "asr": None}},
    {"before": {"clean_accuracy": None, "asr": None, "robust_accuracy": None}},
    {"before": {"clean_accuracy": 1.0, "asr": "x", "robust_accuracy": None}},
    {"before": {**scores(1.0, None, None), "balanced_accuracy": "x"}},
    {"after": {**scores(1.0, None, None), "largest_share": [1]}},
    {"after": {"clean_accuracy": None, "asr": None, "robust_accuracy": None}},
    {"seconds": "x"},
    {"evaluation_seconds": "x"},
    {"split": {"tpr": 1.0, "fpr": 0.0, "precision": 1.0}},
    {"split": {"tpr": 1.0, "fpr": 0.0, "flagged": 3}},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_sealed_result_that_holds_something_else_in_a_field_is_one_line(
    two_records: list[Record], wrong: dict[str, Any]
) -> None:
    """Its checksum is right, so nothing but this keeps it from the readers, which would end in a
    traceback."""
    path = two_records[0].folder / "defense" / "ft" / "seed0" / "result.json"
    sound = {"config": {"lr": 0.1}, "before": scores(0.9, 0.9, 0.1), "evaluation_seconds": 1.0}
    content = {key: value for key, value in reading.read_json(path).items() if key != "checksum"}
    writing.write_sealed(path, {**content, **sound})
    read_result(path.parent)
    assert layout.rows(two_records) and grouping.grouped(measured.rows(two_records)), "a control"
    writing.write_sealed(path, {**content, **sound, **wrong})
    with pytest.raises(
        UserError, match=rf"{path}: damaged file \((nothing usable on|no) [a-z_, ]+\)"
    ) as caught:
        read_result(path.parent)
    assert "\n" not in str(caught.value)


def test_a_damaged_result_is_a_row_without_numbers_where_the_rest_is_wanted(
    two_records: list[Record],
) -> None:
    whole = layout.rows(two_records)
    path = two_records[0].folder / "defense" / "ft" / "long" / "result.json"
    path.write_text("{")
    damaged: list[measured.Damaged] = []
    left = layout.rows(two_records, damaged.append)
    changed = [
        number
        for number, (now, before) in enumerate(zip(left, whole, strict=True))
        if now != before
    ]
    assert [left[number]["defense"].text for number in changed] == ["ft (long)"]
    assert left[changed[0]]["clean acc %"] == formats.EMPTY
    ((where, why),) = [((one.record, one.defense, one.run), one.why) for one in damaged]
    assert where == ("b_ad", "ft", "long") and str(path) in why
    assert len(measured.rows(two_records, on_damage=damaged.append)) == 5, (
        "two records and three whole results"
    )


def test_what_a_defense_assumes_in_words() -> None:
    assert layout.assumes(("model", "train", "trusted")) == "model + training set + trusted images"
    assert layout.assumes(()) == "nothing"


def named(record: str) -> formats.Row:
    """A row of nothing but a name."""
    return dict.fromkeys(layout.COLUMNS, formats.EMPTY) | {"record": formats.Cell(record)}


@pytest.mark.parametrize("form", ["text", "markdown", "latex", "csv"])
def test_a_line_break_in_a_name_splits_no_row(form: formats.Format) -> None:
    row = named("a\nb\u2028\x1b[1mc")
    plain = layout.render([named("a b  [1mc")], form)
    assert layout.render([row], form) == plain and "a b  [1mc" in plain


def test_latex_escapes() -> None:
    line = layout.render([named("a_b&c%d#e")], "latex").splitlines()[4]
    assert line.startswith(r"a\_b\&c\%d\#e &")


def test_some_methods_beside_the_attacked_models(two_records: list[Record]) -> None:
    only = measured.OfMethods(("ft",))
    shown = [row["defense"].text for row in layout.table(two_records, only=only).rows]
    assert shown == ["none", "ft", "ft (long)", "none", "ft"], "the last one was not run"
    mean = layout.table(two_records, mean=True, only=only)
    assert {row["defense"].text for row in mean.rows} == {"none", "ft", "ft long"}
    everything = [row["defense"].text for row in layout.table(two_records).rows]
    assert "dau" in everything, "a control"


def test_a_method_that_does_not_exist_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "--defenses", "dau,fft", "--record_root", str(helpers.CHECKOUT)]) == 2
    assert "no defense 'fft'. Did you mean 'ft'?" in capsys.readouterr().err


def test_some_columns_and_no_rows_of_what_was_not_run(two_records: list[Record]) -> None:
    chosen = layout.table(two_records, missing=False, columns="defense, ASR,der %")
    assert chosen.columns == ["defense", "ASR %", "DER %"] == ["defense", *chosen.numbers]
    # What is known of an attack's trigger is shown where it is asked for, in the attack's row.
    seen = layout.table(two_records, missing=False, columns="record,psnr")
    assert [row["PSNR dB"] != formats.EMPTY for row in seen.rows[:2]] == [True, False]
    assert "PSNR dB" not in layout.table(two_records).columns
    shown = formats.render(chosen, "text").splitlines()
    assert shown[3].split() == ["dau", "1.00", "95.48"]
    names = [row["defense"].text for row in chosen.rows if row["record"].text == "clean"]
    assert names == ["none", "dau COLLAPSED"], "ft was not run"
    whole = layout.table(two_records)
    assert [row["defense"].text for row in whole.rows][-1] == "ft", "a control"
    with pytest.raises(UserError, match=r"no column 'asrr'\. Did you mean 'asr'\? Known: record"):
        layout.table(two_records, columns="asrr")
