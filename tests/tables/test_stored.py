"""Numbers on pages are those of the stored results: nothing is typed by hand, nothing changes
unseen."""

import contextlib
import dataclasses
import getpass
import io
import re
import shlex
import shutil
import socket
from pathlib import Path
from types import ModuleType
from typing import Any

import helpers
import pytest

from backdoorlab.__main__ import main
from backdoorlab.errors import UserError
from backdoorlab.record import Record
from backdoorlab.report import heat_map
from backdoorlab.storage import reading, writing
from backdoorlab.storage.schema import AUDIT_FORMAT
from backdoorlab.tables import audits, board, rows, stored

Capture = pytest.CaptureFixture[str]
STORES = helpers.CHECKOUT / "docs" / "results" / "stored"
LARGEST = 10_000
"""Bytes of a model in a store: its JSON and that of its audit."""


@pytest.fixture
def performance() -> Any:
    return helpers.script("performance/store.py")


@pytest.fixture
def results() -> Any:
    return helpers.script("performance/results.py")


@pytest.fixture
def kept(performance: ModuleType, small: Record, tmp_path: Path) -> Path:
    """A store of the record `small` and of DAU on it."""
    store = tmp_path / "store"
    performance.keep(small.folder.parent, store, "python -m backdoorlab bench")
    return store


def result_of(store: Path) -> Path:
    return next(store.glob("small/defense/dau/*/result.json"))


def change(path: Path, **values: Any) -> None:
    """Change a sealed file so that its own checksum is right."""
    content = {key: value for key, value in reading.read_sealed(path).items() if key != "checksum"}
    writing.write_sealed(path, content | values)


def list_anew(store: Path) -> None:
    """Make the list of a store fit its files."""
    change(store / stored.STORED, files=stored.files(store))


def shown(root: Path, capsys: Capture, *flags: str) -> str:
    assert main(["table", "--record_root", str(root), *flags]) == 0
    return capsys.readouterr().out


# --- a store


@pytest.mark.parametrize("flags", [(), ("--mean", "True"), ("--wide", "True")])
def test_a_table_of_a_store_is_that_of_its_records(
    flags: tuple[str, ...], kept: Path, small: Record, capsys: Capture
) -> None:
    table = shown(kept, capsys, *flags)
    assert table == shown(small.folder.parent, capsys, *flags) and "dau" in table
    assert {path.suffix for path in kept.rglob("*") if path.is_file()} == {".json"}

    # A control: another number gives another table.
    change(result_of(kept), der=0.123456)
    list_anew(kept)
    other = shown(kept, capsys)
    assert "12.35" in other and "12.35" not in shown(small.folder.parent, capsys)


def test_files_are_copied_byte_for_byte(kept: Path, small: Record) -> None:
    for name in stored.files(kept):
        path = name.removeprefix("small/")
        assert (kept / name).read_bytes() == (small.folder / path).read_bytes()


def test_what_is_not_as_the_list_says_is_refused(kept: Path, tmp_path: Path) -> None:
    stored.readable(["small"], kept)

    def broken(name: str) -> Path:
        return Path(shutil.copytree(kept, tmp_path / name))

    changed = broken("changed")
    change(result_of(changed), der=0.321)
    missing = broken("missing")
    result_of(missing).unlink()
    added = broken("added")
    shutil.copytree(added / "small", added / "another")
    for store in (changed, missing, added):
        with pytest.raises(UserError, match=r"not as stored\.json lists it"):
            stored.readable(["small"], store)

    # One flipped digit, in the file and in the list.
    damaged = broken("damaged")
    file = result_of(damaged)
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    list_anew(damaged)
    with pytest.raises(UserError, match="its own checksum"):
        rows.rows(stored.readable(["small"], damaged))


def test_a_record_without_weights_is_damaged_and_no_store(
    kept: Path, small: Record, tmp_path: Path, capsys: Capture
) -> None:
    with pytest.raises(UserError, match=r"no 'smal' in the store .* Did you mean 'small'\?"):
        stored.readable(["smal"], kept)
    capsys.readouterr()
    for command, said in (
        (["verify"], "model.safetensors: missing"),
        (["report", "--html", str(tmp_path / "page.html")], "report reads records"),
    ):
        assert main([*command, "--record_root", str(kept)]) == 2
        assert said in capsys.readouterr().err

    # The same files without the list are a record that has lost its weights.
    (kept / stored.STORED).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: missing"):
        stored.readable(["small"], kept)
    lost = helpers.copy(small, tmp_path)
    (lost.folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: missing"):
        stored.readable(["small"], tmp_path)


def test_nothing_of_a_machine_is_kept(
    performance: ModuleType, small: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {
        "read from /home/ada/clean and ~/data/x.png": "read from clean and x.png",
        r"C:\Users\ada\clean": "clean",
        "98.3 / 0.0 / 98.1, cuda/cpu, 3/4": "98.3 / 0.0 / 98.1, cuda/cpu, 3/4",
        "https://arxiv.org/abs/1708.06733": "https://arxiv.org/abs/1708.06733",
        "record/demo/model.safetensors": "record/demo/model.safetensors",
    }
    cut = performance.without_paths({"notes": list(texts), "seed": 3})
    assert cut == {"notes": list(texts.values()), "seed": 3}

    root = tmp_path / "records"
    shutil.copytree(small.folder, root / "small")
    result = result_of(root)
    config = reading.read_sealed(result)["config"]
    change(result, config={**config, "trusted_path": "/home/ada/clean"})
    performance.keep(root, tmp_path / "store", "x")
    assert reading.read_sealed(result_of(tmp_path / "store"))["config"]["trusted_path"] == "clean"

    monkeypatch.setattr(socket, "gethostname", lambda: "lovelace")
    monkeypatch.setattr(getpass, "getuser", lambda: "root")
    change(result, notes=["run on lovelace"])
    with pytest.raises(UserError, match="has the name lovelace of this machine"):
        performance.keep(root, tmp_path / "store", "x")


def test_a_record_that_is_kept_again_has_no_results_of_the_earlier_one(
    performance: ModuleType, kept: Path, small: Record, tmp_path: Path
) -> None:
    helpers.copy(small, tmp_path / "again")
    helpers.copy(small, tmp_path / "again", "other")
    performance.keep(tmp_path / "again", kept, "x", "oth*")
    assert stored.records(kept) == ["other", "small"] and result_of(kept).is_file()
    performance.keep(tmp_path / "again", kept, "x", "sm*")
    assert list(stored.files(kept)) == ["other/record.json", "small/record.json"]
    with pytest.raises(UserError, match=r"no record in .* has a name like x\*"):
        performance.keep(tmp_path / "again", kept, "x", "x*")


def test_an_audit_is_kept_without_its_details(
    performance: ModuleType, small: Record, tmp_path: Path, capsys: Capture
) -> None:
    root = tmp_path / "records"
    shutil.copytree(small.folder, root / "small")
    result = result_of(root)
    audit = {
        "format": AUDIT_FORMAT,
        "kind": "result",
        "model": audits.weights(reading.read_sealed(result)),
        "settings": {"seed": 0},
        "tests": {"retune": {"draws": [0.1] * 1000}},
        "summary": {"depth": 0.95, "p_asr": {"0": 0.01, "5": 0.07}},
        "why": [],
    }
    writing.write_sealed(result.with_name(audits.FILE), audit)
    performance.keep(root, tmp_path / "store", "x")
    kept = reading.read_sealed(result_of(tmp_path / "store").with_name(audits.FILE))
    assert kept["tests"] == {} and kept["summary"] == audit["summary"]
    assert shown(tmp_path / "store", capsys) == shown(root, capsys)
    wide = shown(tmp_path / "store", capsys, "--wide", "True")
    assert "(0.95)" in wide
    found = rows.rows(stored.readable(["small"], tmp_path / "store"))
    assert ">0.95<" in heat_map.svg(board.boards(found))

    # An audit of other weights is not shown, as of a record.
    writing.write_sealed(result.with_name(audits.FILE), audit | {"model": "0" * 64})
    performance.keep(root, tmp_path / "store", "x")
    assert "(0.95)" not in shown(tmp_path / "store", capsys, "--wide", "True")


@pytest.mark.parametrize("store", sorted(STORES.iterdir()), ids=lambda store: store.name)
def test_stores_of_the_checkout_are_whole_and_small(store: Path, performance: ModuleType) -> None:
    names = stored.records(store)
    found = rows.rows(stored.readable(names, store))
    files = [store / name for name in stored.files(store)]
    models = [path for path in files if path.name in ("record.json", "result.json")]
    assert sum(path.stat().st_size for path in files) <= LARGEST * len(models)
    assert len([row for row in found if row.run != rows.PLAIN]) == len(models)
    for path in files:
        content = reading.read_sealed(path)
        assert performance.without_paths(content) == content, path
    assert "backdoorlab" in stored.contents(store)["command"]


# --- pages


def test_every_page_is_what_its_commands_give(results: ModuleType) -> None:
    made = results.results(helpers.CHECKOUT)
    different = [str(path) for path, content in made.items() if path.read_bytes() != content]
    assert not different, f"run make results: {different}"
    assert {"README.md", "README_zh.md", "digits.md"} <= {path.name for path in made}
    assert any(path.suffix == ".svg" for path in made)


def typed(text: str) -> list[str]:
    """The rows of tables outside of blocks that have a cell which is a number, or several."""
    outside = re.sub(r"^<!-- made by: .*?^<!-- end -->$", "", text, flags=re.M | re.S)
    return [
        line
        for line in outside.splitlines()
        if any(re.fullmatch(r"[\d.,/%±x ]*\d[\d.,/%±x ]*", cell) for cell in line.split("|")[1:-1])
    ]


def test_no_table_of_results_is_typed_by_hand() -> None:
    results_of = helpers.CHECKOUT / "docs" / "results"
    for path in [README, CHINESE, *sorted(results_of.glob("*.md"))]:
        assert not typed(path.read_text()), path.name
    assert any(typed(path.read_text()) for path in (results_of / "archive").glob("*.md"))
    assert typed("| ft | 98.3 / 0.0 |\n| a | b 3 |") == ["| ft | 98.3 / 0.0 |"], "a control"


def test_a_changed_number_is_seen(results: ModuleType, tmp_path: Path) -> None:
    """On the page, and in the store."""
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    command = "python -m backdoorlab table --record_root store --missing False"
    page.write_text(f"Text.\n\n<!-- made by: {command} -->\n<!-- end -->\n\nMore.\n")
    shutil.copytree(STORES / "digits", tmp_path / "store")
    made = results.results(tmp_path)[page]
    page.write_bytes(made)
    assert results.results(tmp_path) == {page: made}, "made again, it is the same"
    assert made.startswith(b"Text.\n") and made.endswith(b"\nMore.\n")

    number = re.findall(rb"\d\d\.\d\d", made)[0]
    page.write_bytes(made.replace(number, b"11.11", 1))
    assert results.results(tmp_path)[page] == made != page.read_bytes()

    change(next((tmp_path / "store").glob("*/defense/dau/seed0/result.json")), der=0.1111)
    with pytest.raises(UserError, match=r"not as stored\.json lists it"):
        results.results(tmp_path)
    list_anew(tmp_path / "store")
    assert b"11.11" in results.results(tmp_path)[page] and b"11.11" not in made


def test_check_fails_on_a_difference_and_writes_nothing(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "CHECKOUT", tmp_path)
    page = tmp_path / "README.md"
    shutil.copytree(STORES / "digits", tmp_path / "store")
    page.write_text("<!-- made by: python performance/results.py about store -->\n<!-- end -->\n")
    before = page.read_bytes()
    assert results.main(["--check"]) == 1 and page.read_bytes() == before
    assert results.main([]) == 0 and b"Precision: fp32." in page.read_bytes()
    assert results.main(["--check"]) == 0


def test_a_block_has_what_a_benchmark_printed(results: ModuleType, tmp_path: Path) -> None:
    """Names longer than their column, and words by which rows are chosen."""
    measure = helpers.script("performance/measure.py")
    rows_of = [
        measure.Row("a | b", ">= 2.5", (1.0, 2.0, 4.0), detail="3 and 6 ms"),
        measure.Row("a name that is longer than its column of 44", "<= 10 %", (0.5,), True),
        measure.Row("nothing", "-", detail="not on this machine"),
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        measure.report({"machine": "of some kind", "date": "today"}, rows_of, None)
    (tmp_path / "of.txt").write_text(printed.getvalue())

    def made(*words: str) -> list[str]:
        command = shlex.join(["python", "performance/printed.py", "of.txt", *words])
        return str(results.block(command, tmp_path / "page.md", tmp_path)[0]).strip().splitlines()

    assert made() == [
        "machine: of some kind; date: today.",
        "",
        "| what | goal | measured, median (min to max) | detail |",
        "| --- | ---: | ---: | --- |",
        r"| a \| b | >= 2.5 | 2.00 (1.00 to 4.00) | 3 and 6 ms |",
        "| a name that is longer than its column of 44 | <= 10 % | 50.0 % (50.0 % to 50.0 %) |  |",
        "| nothing | - | not applicable | not on this machine |",
    ]
    assert made("longer", "nothing") == [line for line in made() if "3 and 6" not in line]
    with pytest.raises(UserError, match="no row with neither"):
        made("neither")


@pytest.mark.parametrize(
    "command",
    ["python -m backdoorlab bench", "python attack/badnet.py", "rm -r .", "python -m backdoorlab"],
)
def test_a_block_runs_no_other_command(command: str, results: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no block is made by"):
        results.block(command, tmp_path / "page.md", tmp_path)


# --- boards and heat maps


@pytest.fixture
def found(small: Record) -> list[rows.Row]:
    """An attack without a defense and with three, of which one is another rate."""
    attacked, defended = rows.rows([small])
    scores: dict[str, Any] = dict(clean_accuracy=0.95, asr=0.014, robust_accuracy=0.9)
    scores["collapsed"] = False
    dau = dataclasses.replace(defended, **scores)
    ft = dataclasses.replace(dau, defense="ft", run="seed0", asr=0.5, collapsed=True)
    sig = dataclasses.replace(attacked, attack="sig", poison_rate=0.05, record="sig")
    seed1 = dataclasses.replace(dau, run="seed1", defense_seed=1, asr=0.034)
    detector = dataclasses.replace(dau, defense="spectral", kind="detector", asr=None)
    oracle = dataclasses.replace(dau, defense="cce", kind="unlearner", oracle=True)
    blended = dataclasses.replace(attacked, attack="blended", record="blended")
    return [attacked, dau, ft, sig, seed1, detector, oracle, blended]


def test_a_board_has_a_row_for_each_attack_and_a_column_for_each_defense(
    found: list[rows.Row],
) -> None:
    (one,) = board.boards(found)
    assert one.defenses == ("none", "ft", "dau"), "no detector, and no oracle"
    assert one.attacks == ("badnet", "blended", "sig, 5 %") and one.rate == found[0].poison_rate
    badnet, blended, sig = board.table(found).rows
    assert badnet["dau"].text == "95.0 / 2.4 / 90.0 n=2"
    assert badnet["ft"].text == "95.0 / 50.0 / 90.0 COLLAPSED"
    assert blended["dau"].text == sig["ft"].text == "-"


def test_a_heat_map_has_every_number_and_says_what_is_missing(found: list[rows.Row]) -> None:
    drawn = heat_map.svg(board.boards(found))
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", drawn)
    assert "2.4" in texts and "50.0 ×" in texts and texts.count("not run") == 4
    assert texts.count("-") == 2, "two defended models without an audit"
    assert drawn == heat_map.svg(board.boards(found)), "equal boards, equal bytes"

    # 50 % is the middle of the scale; a control with another number.
    assert 'class="c10"' in drawn
    other = [row if row.asr != 0.5 else dataclasses.replace(row, asr=1.0) for row in found]
    assert "100.0 ×" in heat_map.svg(board.boards(other))


def test_a_heat_map_has_no_row_of_the_clean_control(found: list[rows.Row]) -> None:
    clean = dataclasses.replace(found[0], attack="none", record="clean", asr=None)
    every = board.boards([*found, clean])
    assert [one.attacks for one in every] == [("badnet", "blended", "sig, 5 %", "none")]
    assert [one.attacks for one in heat_map.with_asr(every)] == [("badnet", "blended", "sig, 5 %")]
    assert heat_map.with_asr(board.boards([clean])) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_heat_map_can_be_read_by_everybody(scheme: heat_map.Scheme) -> None:
    """Letters stand out, and the scale is one of lightness, which needs no colour vision."""
    colours = [heat_map.shade(step / heat_map.STEPS, scheme) for step in range(heat_map.STEPS + 1)]
    assert all(heat_map.contrast(heat_map.readable_on(c), c) >= 4.5 for c in colours)
    light = [heat_map._luminance(colour) for colour in colours]
    assert light == sorted(light, reverse=scheme == "light") and len(set(light)) == len(light)
    assert heat_map.contrast("#FFFFFF", "#FFFF00") < 4.5, "a control"


# --- the front page

README, CHINESE = (helpers.CHECKOUT / name for name in ("README.md", "README_zh.md"))
MOST_WORDS = 700


def words(text: str) -> int:
    """As `wc -w` counts them, tables and commands included."""
    return len(text.split())


def test_the_front_page_is_read_in_a_minute() -> None:
    text = README.read_text()
    assert words(text) <= MOST_WORDS
    assert words("one, two  three\n| a | b |") == 8, "a control"


def pieces(text: str) -> dict[str, list[str]]:
    """What both languages must have in common, in order."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "README" not in link]
    return {
        "blocks": re.findall(r"^```.*?^```", text, re.M | re.S),
        "comments": re.findall(r"<!--.*?-->", text),
        "code": sorted(re.findall(r"`[^`\n]+`", prose)),
        "links": sorted([*links, *re.findall(r"\]\((docs/results/README[^)]*)\)", prose)]),
        "numbers": sorted(re.findall(r"\b\d[\d.]*\b", re.sub(r"\([^)]*\)", "", prose), re.A)),
        "headings": re.findall(r"^#+ ", text, re.M),
    }


def test_both_languages_say_the_same() -> None:
    english, chinese = pieces(README.read_text()), pieces(CHINESE.read_text())
    for name in english:
        assert english[name] == chinese[name], name
    assert "](README_zh.md)" in README.read_text() and "](README.md)" in CHINESE.read_text()


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("--save_folder_name demo\n", "--save_folder_name demo2\n", "blocks"),
        ("docs/howto/choose.md", "docs/depth.md", "links"),
        ("`make demo`", "`make demos`", "code"),
        ("13 种检测", "14 种检测", "numbers"),
        ("## ", "### ", "headings"),
    ],
)
def test_a_difference_between_the_languages_is_seen(old: str, new: str, name: str) -> None:
    text = CHINESE.read_text()
    assert old in text
    assert pieces(text.replace(old, new, 1))[name] != pieces(README.read_text())[name]


def test_the_front_page_counts_the_methods() -> None:
    from backdoorlab.settings import methods

    counts = [
        len(list((helpers.CHECKOUT / "attack").glob("*.py"))) - 1,
        *(len(methods.with_role(role)) for role in ("defense", "detector", "unlearner")),
    ]
    text = re.sub(r"\s+", " ", README.read_text())
    said = re.search(r"(\d+) \[attacks\].*?, (\d+) \[repairs.*?, (\d+) detectors, (\d+) unl", text)
    assert said is not None and list(map(int, said.groups())) == counts


def test_conda_gets_the_same_requirements() -> None:
    import tomllib

    import yaml

    listed = yaml.safe_load((helpers.CHECKOUT / "environment.yml").read_text())
    project = tomllib.loads((helpers.CHECKOUT / "pyproject.toml").read_text())["project"]
    python, pip, by_pip = listed["dependencies"]
    assert (python, pip) == (f"python{project['requires-python']}", "pip")
    # A file, so that nothing is listed twice; tests/test_wheel.py compares it with pyproject.toml.
    assert by_pip == {"pip": ["-r requirements.txt"]}
    assert (helpers.CHECKOUT / "requirements.txt").is_file() and listed["name"] == "backdoorlab"
