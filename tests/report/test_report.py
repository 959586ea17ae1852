"""The page and the figures without a browser: what is in them, what is refused, and that nothing of
a stranger becomes code."""

import base64
import html
import itertools
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal

import helpers
import numpy as np
import pytest
import torch

from backdoorlab.__main__ import main
from backdoorlab.record import Record
from backdoorlab.report import artifacts, charts, figures, looks
from backdoorlab.report.html_charts import OUTLINES
from backdoorlab.report.page import Report, report
from backdoorlab.settings import methods
from backdoorlab.storage import reading, writing
from backdoorlab.tables import groups as grouping
from backdoorlab.tables import rows as measured

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`${alert(3)}<b>&amp;"


@pytest.fixture(scope="session")
def plain(small: Record) -> list[artifacts.Cell]:
    """The cells of `small`: a record, and DAU on it."""
    return artifacts.gather([small])


def page_of(record: Record, folder: Path, *names: str) -> str:
    target = folder / "page.html"
    assert (
        main(
            [
                "report",
                record.name,
                *names,
                "--record_root",
                str(record.folder.parent),
                "--html",
                str(target),
            ]
        )
        == 0
    )
    return target.read_text()


def payload(page: str) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="charts">(.*?)</script>', page, re.DOTALL
    )
    assert found
    return json.loads(found[1])


class Tags(HTMLParser):
    """What an HTML parser takes for elements, and where it finds handlers of events."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.handlers: list[str] = []
        self.sources: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "action")]


# --- the page


def test_a_page_holds_every_cell_once_and_everything_that_it_shows(
    small: Record, plain: list[artifacts.Cell], tmp_path: Path
) -> None:
    page = page_of(small, tmp_path)
    drawn = [
        cell
        for panel in payload(page)["accuracy_asr"]
        for series in panel["series"]
        for cell in series["cells"]
    ]
    assert sorted(drawn) == [0, 1] == [cell.number for cell in plain], (
        "a mark for the record, and one for DAU on it"
    )
    assert page.count("plotly.js v") == 1
    for cell in plain:
        assert (
            f"{100 * (cell.row.clean_accuracy or 0):.2f}" in page
            and f"{100 * (cell.row.asr or 0):.2f}" in page
        )
    tags = Tags(page)
    assert tags.found.count("script") == 3 and not tags.handlers
    assert all(source.startswith(("data:", "#")) for source in tags.sources), "nothing is fetched"
    preview = base64.b64encode((small.folder / "preview.png").read_bytes()).decode()
    assert f"data:image/png;base64,{preview}" in page


def test_defenses_that_were_not_run_are_lines_without_numbers(
    small: Record, tmp_path: Path
) -> None:
    page = page_of(small, tmp_path)
    assert page.count('class="not-run"') == len(
        [name for name in methods.with_role("defense") if name != "dau"]
    )
    assert re.search(r'<tr class="not-run"[^>]*data-defense="ft"[^>]*>.*not run', page)


def test_what_is_missing_is_said(small_flags: tuple[str, ...], tmp_path: Path) -> None:
    flags = [
        flag for flag in small_flags if flag not in ("--patch_size", "2", "--poison_rate", "0.2")
    ]
    flags.insert(flags.index("--width") + 1, "2")
    record = helpers.attack("none", "clean", tmp_path / "root", *flags)
    page = page_of(record, tmp_path)
    for words in (
        "no defense was run on this record",
        "none: trained on clean data, the control",
        "There are no triggered images",
        "No run on this record splits the training set",
        "no ASR: no attack, or an unknown trigger",
        "Test images; there is no trigger to show",
    ):
        assert words in page, words
    helpers.edit_json(record.folder / "record.json", attack="unknown", known_poison=False)
    page = page_of(Record.load("clean", tmp_path / "root"), tmp_path)
    assert "unknown: a stranger&#x27;s model or data" in page and "nobody knows" in page


def test_what_is_the_same_in_all_lines_is_said_once(small: Record, tmp_path: Path) -> None:
    page = page_of(small, tmp_path)
    heads = [
        re.findall(r'<button type="button">(.*?)</button>', table)
        for table in re.findall(r"<thead>.*?</thead>", page)
    ]
    assert "2 models of 1 record on small, 20 % of the training images poisoned." in page
    assert heads[0] == [
        "attack",
        "defense",
        "clean acc %",
        "ASR %",
        "RA %",
        "DER %",
        "n",
        "assumes",
        "TPR %",
        "FPR %",
        "seconds",
    ]
    assert (
        heads[1][:5] == ["record", "attack", "defense", "seed", "clean acc"]
        and "data set" not in heads[1]
    )
    assert re.search(r'<td class="number" data-v="1.0" title="small">1</td>', page), (
        "which records a mean is of"
    )
    record = helpers.copy(small, tmp_path / "root")
    page = page_of(record, tmp_path)
    heads = [
        re.findall(r'<button type="button">(.*?)</button>', table)
        for table in re.findall(r"<thead>.*?</thead>", page)
    ]
    assert not {"TPR %", "FPR %", "TPR", "FPR"} & {
        *heads[0],
        *heads[1],
    }, "nothing splits the training set"


def test_rows_of_recovered_triggers_have_the_names_of_their_classes(
    small: Record, tmp_path: Path
) -> None:
    record = helpers.copy(small, tmp_path / "root")
    assert "<li>0 (target)</li>" not in page_of(record, tmp_path), "the control"
    helpers.defend("bu", record, *helpers.short_flags("bu"))
    assert re.search(
        r'<ol><li>0 \(target\)</li><li>1</li><li>2</li></ol><img alt="bu: triggers',
        page_of(record, tmp_path),
    )


def test_words_of_a_stranger_stay_words(small: Record, tmp_path: Path) -> None:
    """Names, notes, class names, devices, stages and columns are all a stranger's."""
    record = helpers.copy(small, tmp_path / "root", "<script>alert(0)<")
    helpers.defend("ft", record, *helpers.short_flags("ft"))
    (record.folder / "defense" / "ft" / "seed0").rename(
        record.folder / "defense" / "ft" / "<img src=x onerror=alert(4)>"
    )
    info = files_json(record.folder / "record.json")
    names = [f"{EVIL}{number}" for number in range(info["num_classes"])]
    config = info["config"] | {"patch_value": EVIL, EVIL: EVIL}
    (record.folder / "history.csv").write_text(
        f'stage,epoch,seconds,loss,{"x<script>"}\n"<b onclick=alert(5)>",0,1,2,<script>\n'
    )
    manifest = info["files"] | {"history.csv": writing.manifest(record.folder)["history.csv"]}
    dataset = info["dataset"] | {"class_names": names, "name": "<svg onload=alert(6)>"}
    helpers.edit_json(
        record.folder / "record.json",
        notes=[EVIL],
        device=EVIL,
        config=config,
        dataset=dataset,
        files=manifest,
        commit=EVIL,
    )
    page = page_of(Record.load(record.name, tmp_path / "root"), tmp_path)
    tags = Tags(page)
    assert tags.found.count("script") == 3 and not tags.handlers and "b" not in tags.found
    assert set(tags.found) & {"svg", "img"} and all(
        source.startswith(("data:", "#")) for source in tags.sources
    )
    for code in ("<script>alert", "<img src=x", "<svg onload", "<b onclick"):
        assert code not in page
    assert payload(page)["<script>alert(0)</destinations"][0]["grid"]["columns"], (
        "and the charts are there"
    )
    assert "&lt;script&gt;alert(1)" in page, "the words themselves are shown"


def files_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_only_the_two_scripts_may_run(small: Record, tmp_path: Path) -> None:
    page = page_of(small, tmp_path)
    import hashlib

    inline = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    wanted = {
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for text in inline
    }
    policy = re.search(r"script-src ([^;]*);", page)
    assert (
        policy
        and set(policy[1].split()) == wanted
        and len(wanted) == 2
        and "default-src 'none'" in page
    )


# --- pictures and histories that are not what they should be


def test_a_picture_that_is_none_is_refused(
    small: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = helpers.copy(small, tmp_path)
    (record.folder / "preview.png").write_bytes(
        b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"
    )
    info = files_json(record.folder / "record.json")
    helpers.edit_json(
        record.folder / "record.json",
        files=info["files"] | {"preview.png": writing.manifest(record.folder)["preview.png"]},
    )
    assert (
        refused(
            capsys, record.name, "--record_root", str(tmp_path), "--html", str(tmp_path / "p.html")
        )
        == 1
    )
    assert not (tmp_path / "p.html").exists()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> int:
    """How many lines of complaint there are."""
    capsys.readouterr()
    assert main(["report", *arguments]) == 2
    return len(capsys.readouterr().err.strip().splitlines())


@pytest.mark.parametrize(
    "field",
    [
        {"triggered_predictions": ["<b>"]},
        {"notes": [3]},
        {"image_passes": "many"},
        {"splits": {"split": {"tpr": "x"}}},
    ],
)
def test_a_result_with_something_else_in_a_field_is_one_line(
    field: dict[str, Any], small: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = helpers.copy(small, tmp_path)
    helpers.defend("ft", record, *helpers.short_flags("ft"))
    helpers.edit_json(record.folder / "defense" / "ft" / "seed0" / "result.json", **field)
    assert (
        refused(
            capsys, record.name, "--record_root", str(tmp_path), "--html", str(tmp_path / "p.html")
        )
        == 1
    )


@pytest.mark.parametrize("name", ["result.json", "history.csv", "split.safetensors"])
def test_a_damaged_result_is_named_and_the_rest_is_shown(
    name: str, small: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = helpers.copy(small, tmp_path)
    shutil.copytree(small.folder / "defense", record.folder / "defense")
    assert 'data-defense="dau"' in page_of(record, tmp_path) and "damaged" not in page_of(
        record, tmp_path
    ), "the control"
    (record.folder / "defense" / "dau" / "seed0" / name).write_bytes(b"{}")
    root = ("--record_root", str(tmp_path))
    assert refused(capsys, record.name, *root, "--html", str(tmp_path / "page.html")) == 1
    page = (tmp_path / "page.html").read_text()
    assert re.search(r'<tr class="not-run"[^>]*data-defense="dau"[^>]*>.*>damaged<', page)
    for flags in ((), ("--mean", "True")) if name == "result.json" else ():
        assert main(["table", *root, *flags]) == 2
        said = capsys.readouterr()
        assert (
            "badnet" in said.out
            and said.err.count("\n") == 1
            and f"{name}: damaged file" in said.err
        )


@pytest.mark.parametrize(
    "command", [("table",), ("table", "--mean", "True"), ("report", "--html", "{page}")]
)
def test_a_damaged_record_is_named_and_the_others_are_shown(
    command: tuple[str, ...], small: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stands in nobody's way who did not ask for it."""
    root, page = tmp_path / "record", tmp_path / "page.html"
    argv = [*(word.replace("{page}", str(page)) for word in command), "--record_root", str(root)]
    sound, bad = (
        helpers.copy(small, root, "sound"),
        helpers.copy(small, root, "bad").folder / "record.json",
    )
    bad.write_text("{}")
    assert main(argv) == 2
    out, err = capsys.readouterr()
    shown = page.read_text() if page.exists() else out
    assert (
        err.startswith(f"error: {bad}: damaged file") and err.count("\n") == 1 and "badnet" in shown
    )
    assert main([argv[0], "bad", "sound", *argv[1:]]) == 2
    asked = capsys.readouterr()
    assert asked.err == err and not asked.out, "who asks for it is refused"
    shutil.rmtree(sound.folder)
    assert main(argv) == 2
    alone = capsys.readouterr()
    assert alone.err == err and not alone.out, "without any other there is nothing to show"
    shutil.rmtree(bad.parent)
    helpers.copy(small, root, "sound")
    assert main(argv) == 0 and not capsys.readouterr().err, "a control"


def test_only_what_is_asked_for_is_shown(
    small: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, target = str(small.folder.parent), str(tmp_path / "page.html")
    said: list[str] = []
    assert report(Report(names=("small",), html=target, record_root=root), set(), said.append) == 0
    assert (
        len(said) == 1 and said[0].startswith("page of 1 models") and capsys.readouterr().out == ""
    )
    assert len(artifacts.gather([small], {("small", "dau", "seed0")})) == 2


# --- bad input


def test_bad_input_is_one_line(
    small: Record,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = ("--record_root", str(small.folder.parent))
    (tmp_path / "mine.html").write_text("a page of my own")
    mistakes = {
        "no record 'smal'": ("smal", *root, "--html", str(tmp_path / "x.html")),
        "there is no folder": ("small", *root, "--html", str(tmp_path / "nowhere" / "x.html")),
        "is a folder": ("small", *root, "--html", str(tmp_path)),
        "was not written by this command": ("small", *root, "--html", str(tmp_path / "mine.html")),
        "nothing to write": ("small", *root),
        "no records in": (
            "--record_root",
            str(tmp_path / "empty"),
            "--html",
            str(tmp_path / "x.html"),
        ),
        "File exists": ("small", *root, "--figures", str(tmp_path / "mine.html")),
    }
    for words, arguments in mistakes.items():
        assert main(["report", *arguments]) == 2, words
        said = capsys.readouterr().err.strip()
        assert words in said and len(said.splitlines()) == 1, said
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", "small", *root, "--html", str(tmp_path / "x.html")]) == 2
    said = capsys.readouterr().err.strip()
    assert "pip install 'backdoorlab[report]'" in said and len(said.splitlines()) == 1
    assert (tmp_path / "mine.html").read_text() == "a page of my own" and not (
        tmp_path / "x.html"
    ).exists()


# --- charts


def test_rates_of_each_epoch_are_those_of_the_split(small: Record, tmp_path: Path) -> None:
    """ASD logs how many are flagged and missed; the last epoch's rates are also in result.json,
    from the mask itself."""
    record = helpers.copy(small, tmp_path)
    result = helpers.defend("asd", record, *helpers.short_flags("asd"))
    assert result is not None
    own = artifacts.gather([record])
    chart = charts.splits(own)
    epochs = next(panel for panel in chart.panels if "epoch by epoch" in panel.title)
    last = {series.name: series.y[-1] for series in epochs.series}
    for key, (name, _) in charts.RATES.items():
        assert last[name] == pytest.approx(100 * result["split"][key]), key
    histogram = charts.histograms(own)
    kept = reading.read_tensors(own[-1].folder / "split.safetensors")[0]
    assert kept["suspicion"].shape == kept["flagged"].shape
    suspect, trusted = kept["suspicion"][kept["flagged"]], kept["suspicion"][~kept["flagged"]]
    assert suspect.min() >= trusted.max(), "the number that is shown is the one that decided"
    for series in histogram.panels[0].series:
        assert sum(float(y or 0) for y in series.y) / 2 == pytest.approx(100, abs=1e-3), (
            "each outline is a whole"
        )


def test_dau_is_decided_by_its_suspicion(backdoored: Record, tmp_path: Path) -> None:
    record = helpers.copy(backdoored, tmp_path)
    result = helpers.defend(
        "dau", record, "--epochs", "1", "--score_every", "0", "--threshold", "0.2"
    )
    kept = reading.read_tensors(record.folder / "defense" / "dau" / "seed0" / "split.safetensors")[
        0
    ]
    assert result is not None and 0 < kept["flagged"].sum() < len(kept["flagged"])
    assert torch.equal(kept["flagged"], kept["suspicion"] > -np.log(result["config"]["threshold"]))
    (panel,) = charts.histograms(artifacts.gather([record])).panels
    assert panel.cut == -np.log(result["config"]["threshold"]) and not any(
        series.marked for series in panel.series
    )
    assert b"cut 1.61" in figures.drawn(charts.Chart("x", "x", "x", (panel,)))["svg"]


def test_a_suspicion_without_a_finite_value_is_no_panel(small: Record, tmp_path: Path) -> None:
    record = helpers.copy(small, tmp_path)
    helpers.defend("dau", record, *helpers.short_flags("dau"), "--pool", "model_loss")
    assert len(charts.histograms(artifacts.gather([record])).panels) == 1, "the control"
    run = record.folder / "defense" / "dau" / "seed0"
    kept = reading.read_tensors(run / "split.safetensors")[0]
    writing.write_tensors(
        run / "split.safetensors",
        {**kept, "suspicion": torch.full_like(kept["suspicion"], float("nan"))},
    )
    manifest = files_json(run / "result.json")["files"] | {
        "split.safetensors": writing.manifest(run)["split.safetensors"]
    }
    helpers.edit_json(run / "result.json", files=manifest)
    chart = charts.histograms(artifacts.gather([record]))
    assert not chart.panels and chart.missing


def test_trajectories_start_at_what_the_attack_left(small: Record, tmp_path: Path) -> None:
    record = helpers.copy(small, tmp_path)
    helpers.defend("ft", record, "--epochs", "3", "--trusted_ratio", "0.3")
    (panel,) = [
        panel for panel in charts.scores(artifacts.gather([record])).panels if panel.title == "ft"
    ]
    asr = next(series for series in panel.series if series.name == "ASR")
    assert (
        list(asr.x) == [0, 1, 2, 3]
        and asr.y[0] == pytest.approx(100 * record.info["scores"]["asr"])
        and asr.kind == "line"
    )


def test_plain_training_of_a_joint_attack_is_a_panel_of_its_own(
    small: Record, tmp_path: Path
) -> None:
    """Its epochs stand in the record's history, below those of the attack."""
    record = helpers.copy(small, tmp_path)
    scores = record.info["scores"]
    plain = {**scores, "clean_accuracy": 0.7, "asr": 0.1, "robust_accuracy": 0.5, "seconds": 1.0}
    lines = [
        ("train", 0.3, 0.6, 0.2),
        ("train", 0.4, 0.8, 0.3),
        ("plain", 0.5, 0.4, 0.4),
        ("plain", 0.6, 0.3, 0.5),
        ("plain", 0.65, 0.2, 0.5),
    ]
    rows = "\n".join(
        f"{stage},{at},1,{at},{clean},{asr},{robust}"
        for at, (stage, clean, asr, robust) in enumerate(lines)
    )
    (record.folder / "history.csv").write_text(
        f"stage,epoch,seconds,loss,clean_accuracy,asr,robust_accuracy\n{rows}\n"
    )
    manifest = record.info["files"] | {
        "history.csv": writing.manifest(record.folder)["history.csv"]
    }
    helpers.edit_json(record.folder / "record.json", plain_scores=plain, files=manifest)
    own = artifacts.gather([Record.load(record.name, tmp_path)])
    found = {
        panel.title: {series.name: (list(series.x), series.y) for series in panel.series}
        for panel in charts.scores(own).panels
    }
    assert found["the attack's training"]["ASR"] == ([1, 2], pytest.approx([60, 80]))
    assert found["plain training on the snapshot"]["ASR"] == (
        [1, 2, 3],
        pytest.approx([40, 30, 20]),
    )
    titles = {panel.title: len(panel.series[0].x) for panel in charts.losses(own).panels}
    assert titles == {"the attack's training, train": 2, "plain training on the snapshot": 3}


def test_destinations_are_shares_of_the_triggered_images(plain: list[artifacts.Cell]) -> None:
    grid = charts.destinations(plain).panels[0].grid
    assert grid is not None and len(grid.rows) == 2 and "target" in grid.columns[0]
    for row in grid.values:
        assert sum(value or 0 for value in row) == pytest.approx(100)
    assert grid.values[0][0] == pytest.approx(100 * (plain[0].row.asr or 0)), (
        "before: the target's share is the ASR"
    )


def test_means_are_those_of_the_table(
    small: Record, small_flags: tuple[str, ...], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    found = [
        helpers.attack("badnet", f"s{seed}", root, *small_flags, "--seed", str(seed))
        for seed in (0, 1)
    ]
    page = page_of(found[0], tmp_path, "s1")
    group = grouping.grouped(measured.rows(found))[0]
    score = group.score("clean_accuracy")
    assert (
        score is not None
        and score.n == 2
        and f"{100 * score.mean:.2f} ± {100 * (score.sd or 0):.2f}"
        in re.sub("</?span[^>]*>", "", page)
    )


# --- colours

CONES = {
    "all": np.eye(3),
    "no red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no blue": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
"""How linear RGB looks to people without one of the cones (Machado, Oliveira and Fernandes, IEEE
TVCG 2009, severity 1)."""


def linear(colour: str) -> np.ndarray:
    rgb = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ rgb
        / np.array([0.9505, 1, 1.089])
    )
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(a: str, b: str) -> float:
    light, dark = sorted(
        (float(np.array([0.2126, 0.7152, 0.0722]) @ linear(c)) for c in (a, b)), reverse=True
    )
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("family", ["look", "measure"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_told_apart_by_everyone(scheme: Literal["light", "dark"], family: str) -> None:
    colours = [value for name, value in looks.palette(scheme).items() if name.startswith(family)]
    assert len(colours) == (7 if family == "look" else 4)
    for cones, matrix in CONES.items():
        places = [
            lab(np.clip(np.array(matrix) @ linear(colour), 0, 1))
            for colour in (*colours, looks.INK[scheme])
        ]
        nearest = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(places, 2))
        assert nearest > 20, (cones, nearest)
    assert min(contrast(colour, looks.PAPER[scheme]) for colour in colours) >= 3, (
        "WCAG 2.1, 1.4.11: graphics"
    )
    assert contrast(looks.INK[scheme], looks.PAPER[scheme]) >= 7
    classic = ("#D62728", "#2CA02C")  # the red and green that most charts use: the test can fail
    seen = [lab(np.clip(np.array(CONES["no green"]) @ linear(colour), 0, 1)) for colour in classic]
    assert np.linalg.norm(seen[0] - seen[1]) < 45


def test_a_method_has_its_look_on_every_page(plain: list[artifacts.Cell]) -> None:
    shipped = methods.available("defense")
    own = looks.of_defenses(cell.row.defense for cell in plain)
    assert own == looks.of_defenses([])
    seen = {(looks.colour(own[name]), looks.shape(own[name])) for name in shipped}
    assert len(seen) == len(shipped), "they differ"
    assert len({looks.colour(own[name]) for name in looks.METHODS}) == len(looks.METHODS)
    assert len({(looks.colour(n), looks.shape(n)) for n in range(63)}) == 63
    assert {*looks.SHAPES, "x"} == set(figures.MARKERS) == {*OUTLINES, "x"}
    measured = {
        series.look
        for chart in charts.of_record(plain)
        for panel in chart.panels
        for series in panel.series
    }
    used = {
        looks.palette(scheme)[looks.colour(look)]
        for look in measured
        for scheme in ("light", "dark")
    }
    assert measured and not used & {*looks.LIGHT, *looks.DARK}, "no method's colour means a score"


# --- figures and t-SNE


def test_figures_are_png_and_svg_and_replace_only_their_own(
    small: Record,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)  # only the page needs it
    folder = tmp_path / "figures"
    arguments = [
        "report",
        "small",
        "--record_root",
        str(small.folder.parent),
        "--figures",
        str(folder),
    ]
    assert main(arguments) == 0
    names = {path.name for path in folder.iterdir()}
    assert {
        "accuracy_asr.png",
        "accuracy_asr.svg",
        "destinations-small.svg",
        "scores-small.png",
        "split-small.png",
        "heat_map.svg",
    } <= names
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert all(
        content.startswith(artifacts.PNG if name.endswith("png") else b"<?xml")
        for name, content in before.items()
    )
    chart = charts.accuracy_against_asr(artifacts.gather([small]))
    assert figures.drawn(chart) == {
        form: before[f"accuracy_asr.{form}"] for form in ("png", "svg")
    }, "the same, byte for byte"
    (folder / "accuracy_asr.png").write_bytes(b"a photo of my own")
    capsys.readouterr()
    assert main(arguments) == 2 and "was not written by this command" in capsys.readouterr().err
    assert (folder / "accuracy_asr.png").read_bytes() == b"a photo of my own"


@pytest.mark.parametrize("name", [os.fsdecode(b"\xff\xfe"), "a\nb|c", "x" * 245, "名前"])
def test_a_name_that_is_odd_breaks_neither_the_page_nor_a_figure(
    name: str, small: Record, tmp_path: Path
) -> None:
    helpers.copy(small, tmp_path / "root", name)
    arguments = [
        "--record_root",
        str(tmp_path / "root"),
        "--html",
        str(tmp_path / "p.html"),
        "--figures",
        str(tmp_path / "figures"),
    ]
    assert main(["report", *arguments]) == 0 == main(["report", *arguments]), (
        "and may be drawn again"
    )
    assert len(list((tmp_path / "figures").glob("destinations-*.svg"))) == 1
    page = (tmp_path / "p.html").read_text()
    keys = set(payload(page))
    assert keys and {
        html.unescape(key) for key in re.findall('data-chart="([^"]*)"', page)
    } == keys - {key for key in keys if not payload(page)[key]}


def test_figures_have_few_numbers_on_an_axis_and_a_legend_that_fits() -> None:
    def texts(panel: charts.Panel) -> list[str]:
        return re.findall(
            r">([^<>]+)</text>",
            figures.drawn(charts.Chart("x", "x", "x", (panel,)))["svg"].decode(),
        )

    costs = charts.Panel(
        "Time",
        "seconds",
        series=(charts.Series("a", 0, "points", [3.0, 900.0], ["a", "a"]),),
        log_x=True,
        lanes=("a",),
    )
    assert {"10", "100"} <= set(texts(costs)) and len(texts(costs)) < 8
    epochs = charts.Panel(
        "ft",
        "epoch",
        "%",
        (charts.Series("ASR", looks.MEASURES, "line", [0.0, 1.0, 2.0], [9.0, 5.0, 1.0]),),
    )
    assert {"0", "1", "2"} <= set(texts(epochs)) and not {"0.5", "1.5", "0.25"} & set(texts(epochs))
    assert (
        figures._across([name for name, _ in charts.RATES.values()], 3.4)
        == 1
        < figures._across(["poison", "clean"], 3.4)
    )


def test_a_dollar_sign_begins_no_formula(tmp_path: Path) -> None:
    series = charts.Series("a$b_$<b>", 0, "points", [1.0], [2.0])
    panel = charts.Panel(
        "cost in $ of x^2_$",
        "$\\frac{",
        "",
        (series, charts.Series("other", 1, "points", [1.0], [1.0])),
    )
    drawn = figures.drawn(charts.Chart("x", "x", "x", (panel,)))
    assert b"cost in $ of x^2_$" in drawn["svg"] and b"a$b_$&lt;b&gt;" in drawn["svg"]
