"""Audits: the formulas, the draws, what is refused, what is kept, what a table shows, and that no
method sees any of it."""

import copy
import csv
import io
import re
import shutil
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from test_run import leaks, reachable, whole_view
from torch import nn

from backdoorlab.__main__ import main
from backdoorlab.depth import (
    audit,
    batch_statistics,
    controls,
    linear_path,
    reactivate,
    retune,
    score,
    similarity,
    view,
)
from backdoorlab.depth.view import AttackerView
from backdoorlab.errors import UserError
from backdoorlab.execution.defense import defense_job, run_defense
from backdoorlab.record import DefenderView, Record
from backdoorlab.report import artifacts, charts
from backdoorlab.run import Run
from backdoorlab.settings import methods
from backdoorlab.storage import reading
from backdoorlab.tables import audits, formats, layout
from backdoorlab.tables import rows as measured

CPU = torch.device("cpu")
LEARNED = ("--width", "8", "--epochs", "12")
"""Flags of an attack on the small images that leave no constant model."""
GENTLE = ("--trusted_ratio", "0.3", "--score_every", "0", "--epochs", "1", "--lr", "0.0001")
"""Flags of a fine-tuning that does not destroy the small model."""


@pytest.fixture(scope="module")
def poisoned(session_folder: Path, small_flags: tuple[str, ...]) -> Record:
    """A record with 29 poisoned images and a result of fine-tuning."""
    flags = (*small_flags, *LEARNED, "--poison_rate", "0.3")
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        record = helpers.attack("badnet", "poisoned", session_folder / "depth", *flags)
        helpers.defend("ft", record, *GENTLE)
        return record


@pytest.fixture(scope="module")
def audited(poisoned: Record, session_folder: Path) -> Record:
    """The same with a whole audit. Copy its folder before changing anything."""
    record = whole_copy(poisoned, session_folder / "audited")
    with helpers.environment(BACKDOORLAB_CACHE=session_folder / "cache"):
        assert run_audit(record) == 0
    return record


def whole_copy(record: Record, root: Path) -> Record:
    """A copy with its results."""
    shutil.copytree(record.folder, root / record.name)
    return Record.load(record.name, root)


def run_audit(record: Record, *flags: str) -> int:
    return main(["audit", record.name, "--record_root", str(record.folder.parent), *flags])


def attacker(record: Record, seed: int = 0) -> AttackerView:
    return AttackerView(record, record.dataset(), CPU, seed)


def kept(record: Record) -> dict[str, Any]:
    """Every value of an audit, without its time and machine."""
    files = sorted([*record.folder.glob("controls/*.json"), *record.folder.rglob(audits.FILE)])
    found = {
        file.relative_to(record.folder).as_posix(): reading.read_sealed(file) for file in files
    }
    for value in found.values():
        del value["environment"]
    return found


# --- formulas


def test_depth_is_1_for_a_clean_model_and_0_for_the_undefended_one() -> None:
    assert score.depth(0.1, clean=0.1, undefended=0.9) == 1
    assert score.depth(0.9, clean=0.1, undefended=0.9) == pytest.approx(0)
    assert score.depth(0.3, clean=0.1, undefended=0.9) == pytest.approx(0.75)
    assert score.depth(0.1, clean=0.8, undefended=0.99) is None, "the controls are too close"
    assert score.depth(0.1, clean=0.5, undefended=0.75) is not None, "a control"


@pytest.mark.parametrize(
    ("after", "depth", "expected"),
    [
        ((0.97, 0.01, 0.9), 0.9, True),
        ((0.97, 0.01, 0.9), 0.79, False),
        ((0.97, 0.01, 0.9), None, None),
        ((0.95, 0.01, 0.9), 0.9, False),  # five points of accuracy lost
        ((0.97, 0.05, 0.9), 0.9, False),  # the backdoor answers
        ((0.97, 0.05, 0.9), None, False),  # whatever its depth is
        ((0.97, 0.01, 0.86), 0.9, False),  # triggered images are misclassified
        ((0.97, None, None), None, None),
    ],
)
def test_a_solved_cell_fulfils_all_conditions(
    after: tuple[float, float | None, float | None], depth: float | None, expected: bool | None
) -> None:
    names = ("clean_accuracy", "asr", "robust_accuracy")
    scores = dict(zip(names, after, strict=True))
    assert audits.solved({"clean_accuracy": 1.0}, scores, False, depth) is expected
    if expected:
        assert audits.solved({"clean_accuracy": 1.0}, scores, True, depth) is False, "collapsed"


def test_cka_ignores_rotation_and_scale_and_tells_others_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    assert similarity.cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-6)
    assert similarity.cka(x, torch.randn(200, 6, generator=generator)) < 0.2
    assert similarity.cka(x, torch.ones(200, 6)) == 0
    assert similarity.existence({"mean": 1.0}, {"mean": 0.4}) == 1
    assert similarity.existence({"mean": 0.4}, {"mean": 0.4}) == 0


def test_re_activation_counts_what_exceeds_both_controls() -> None:
    assert reactivate.excess({"asr": 0.9, "asr_without_trigger": 0.3}, {"asr": 0.5}) == (
        pytest.approx(0.4)
    )
    assert reactivate.excess({"asr": 0.9, "asr_without_trigger": 0.7}, {"asr": 0.5}) == (
        pytest.approx(0.2)
    )


# --- the tests


def test_the_retuning_set_is_clean_but_for_its_first_images(poisoned: Record) -> None:
    attack = attacker(poisoned)
    sets = {n: retune.retuning_set(attack, n, 0) for n in (0, 5, 20)}
    rows = {tuple(image.flatten().tolist()) for image in attack.poisoned.images}
    for n, split in sets.items():
        inside = [tuple(image.flatten().tolist()) in rows for image in split.images]
        assert inside == [True] * n + [False] * (len(split) - n)
        assert split.labels[:n].tolist() == [attack.target] * n
    assert len(sets[0]) == min(144, len(attack.untouched)) == 67

    # A larger n keeps the images of a smaller one; another draw or seed has others.
    assert torch.equal(sets[5].images[:5], sets[20].images[:5])
    assert torch.equal(sets[5].images[20:], sets[20].images[20:])
    assert torch.equal(sets[5].images, retune.retuning_set(attacker(poisoned), 5, 0).images)
    for other in (
        retune.retuning_set(attack, 5, 1),
        retune.retuning_set(attacker(poisoned, 1), 5, 0),
    ):
        assert not torch.equal(sets[5].images, other.images)


class Corner(nn.Module):
    """Answers class 0 where the last corner is white, by a weight; else the class of a bright
    band. `weight` 0 is without a backdoor, whatever is added to a pixel."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bands = torch.stack([x[:, 0, 2 * i : 2 * i + 3, :4].mean((1, 2)) for i in range(3)], 1)
        logits = 5 * bands
        corner = x[:, 0, -2:, -2:].mean((1, 2))
        return torch.cat([logits[:, :1] + (self.weight * corner)[:, None], logits[:, 1:]], 1)


def test_re_activation_finds_a_backdoor_that_is_only_quiet(poisoned: Record) -> None:
    """A model that lacks a little to its backdoor, beside one that has none."""
    attack = attacker(poisoned)
    quiet = next(w / 10 for w in range(30, 0, -1) if attack.asr(Corner(w / 10)) < 0.2)
    found, clean = (reactivate.reactivate(attack, Corner(w)) for w in (quiet, 0.0))
    assert found["asr"] > attack.asr(Corner(quiet)) + 0.3, "the perturbation works"
    assert reactivate.excess(found, clean) > 0.2
    assert reactivate.excess(clean, clean) <= 0


def test_new_batch_statistics_bring_back_a_backdoor_that_only_they_hid(
    backdoored: Record, clean: Record
) -> None:
    """The weights of an attacked model under wrong statistics, beside a model that never saw the
    trigger."""
    attack, hidden = attacker(backdoored), backdoored.model().eval()
    norms = [module for module in hidden.modules() if isinstance(module, nn.BatchNorm2d)]
    generator = torch.Generator().manual_seed(0)
    right = [norm.running_mean.clone() for norm in norms]  # type: ignore[union-attr]
    for scale in range(1, 50):
        for norm, mean in zip(norms, right, strict=True):
            noise = torch.randn(mean.shape, generator=generator)
            norm.running_mean = mean + 0.1 * scale * noise * norm.running_var.sqrt()  # type: ignore[union-attr]
        if attack.asr(hidden) < 0.2:
            break
    before = copy.deepcopy(hidden.state_dict())
    found = batch_statistics.batch_statistics(attack, hidden)
    never = batch_statistics.batch_statistics(attack, clean.model().eval())
    assert attack.asr(hidden) < 0.2 and min(found["asr"]) > 0.8 and max(never["asr"]) < 0.2
    assert len(found["asr"]) == 3 and min(found["clean_accuracy"]) > 0.8
    after = hidden.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "it stays as it is"
    assert batch_statistics.refusal(nn.Linear(2, 2)) and not batch_statistics.refusal(hidden)


def test_the_path_from_a_model_to_itself_is_flat(poisoned: Record) -> None:
    attack, model = attacker(poisoned), poisoned.model().eval()
    torch.manual_seed(1)
    before = copy.deepcopy(model.state_dict())
    same = linear_path.linear_path(attack, model, model)
    other = linear_path.linear_path(attack, poisoned.new_model().eval(), model)
    assert len(set(same["asr"])) == 1 and same["area"] == pytest.approx(1 - same["asr"][0])
    assert same["t50"] in (1.0, None) and len(set(other["asr"])) > 1
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "it stays as it is"


def test_a_model_is_as_similar_as_can_be_to_itself(poisoned: Record) -> None:
    attack, model = attacker(poisoned), poisoned.model().eval()
    torch.manual_seed(1)
    assert similarity.similarity(attack, model, model)["mean"] == pytest.approx(1)
    assert similarity.similarity(attack, poisoned.new_model().eval(), model)["mean"] < 0.99
    assert not torch.is_inference_mode_enabled()
    assert similarity.refusal(nn.Linear(2, 2)) is not None


# --- the command


def test_an_audit_tests_a_result_and_its_three_controls(audited: Record) -> None:
    found = kept(audited)
    assert set(found) == {
        "controls/clean.json",
        "controls/exact.json",
        "controls/undefended.json",
        "defense/ft/seed0/depth.json",
    }
    of_result = found["defense/ft/seed0/depth.json"]
    assert set(of_result["tests"]) == set(audit.TESTS)
    draws = of_result["tests"]["retune"]["p_asr"]
    assert {n: len(values) for n, values in draws.items()} == {"0": 3, "1": 3, "5": 3, "20": 3}
    assert not list(audited.folder.glob("controls/training*"))
    assert main(["verify", audited.name, "--record_root", str(audited.folder.parent)]) == 0


def test_a_killed_audit_goes_on_to_the_same_values(
    poisoned: Record, audited: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = whole_copy(poisoned, tmp_path)
    calls, real = [], audit._run

    def killed(model: nn.Module, attack: AttackerView, name: str) -> dict[str, Any]:
        calls.append(name)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(model, attack, name)

    monkeypatch.setattr(audit, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        audit.audit(audit.Audit(names=(record.name,), record_root=str(tmp_path)))
    # Of 22 in all, 7 were kept, and the eighth is made again.
    assert run_audit(record) == 0 and len(calls) == 8 + 15
    assert kept(record) == kept(audited)

    # A third start has nothing to do, and leaves the files alone.
    times = {file: file.stat().st_mtime_ns for file in record.folder.rglob("*.json")}
    assert run_audit(record) == 0 and len(calls) == 8 + 15
    assert times == {file: file.stat().st_mtime_ns for file in record.folder.rglob("*.json")}


def test_other_settings_replace_nothing_unless_told(audited: Record, tmp_path: Path) -> None:
    record = whole_copy(audited, tmp_path)
    flags = ("--tests", "similarity", "--seed", "1")
    with pytest.raises(UserError, match="other settings"):
        audit.audit(
            audit.Audit(names=(record.name,), record_root=str(tmp_path), tests="similarity", seed=1)
        )
    assert kept(record) == kept(audited)
    assert run_audit(record, *flags, "--overwrite", "True") == 0
    assert kept(record)["defense/ft/seed0/depth.json"]["settings"]["seed"] == 1


def test_the_audit_of_a_replaced_result_is_not_shown(audited: Record, tmp_path: Path) -> None:
    record = whole_copy(audited, tmp_path)
    assert [row.audit is not None for row in measured.rows([record])] == [True, True]
    path = record.folder / "defense" / "ft" / "seed0"
    before = (path / audits.FILE).read_bytes()
    helpers.defend(
        "ft", record, *GENTLE, "--seed", "1", "--run_name", "seed0", "--overwrite", "True"
    )
    (path / audits.FILE).write_bytes(before)
    assert [row.audit is not None for row in measured.rows([record])] == [True, False]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tests", "retun"), "Did you mean|no test of that name"),
        (("--tests", ","), "at least one of"),
        (("--defense", "sau"), "no finished result of it"),
        (("--clean", "poisoned"), "expected a record of attack none"),
    ],
)
def test_mistakes_are_one_line(
    flags: tuple[str, ...], message: str, audited: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_audit(audited, *flags) != 0
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and re.search(message, said), said


# --- a dash, and why


def without_numbers(record: Record) -> tuple[dict[str, Any], list[str]]:
    """The content of the result's audit, and the notes of the table."""
    (path,) = record.folder.rglob(audits.FILE)
    found = audits.read_file(path)
    shown = layout.table([record])
    row = next(row for row in shown.rows if row["defense"].text.startswith("ft"))
    # Of what no model has, depth alone keeps its column.
    assert row["depth"] == formats.EMPTY == row.get("P-ASR 5 %", formats.EMPTY)
    return found, list(shown.notes)


@pytest.mark.parametrize(
    ("attack", "flags", "why"),
    [
        ("none", (), "no attack"),
        ("badnet", ("--label_mode", "all2all", "--poison_rate", "0.3"), "several target labels"),
        ("badnet", ("--poison_rate", "0.1"), "takes 20 poisoned training images"),
    ],
)
def test_what_no_test_can_tell_is_a_dash_with_a_reason(
    attack: str, flags: tuple[str, ...], why: str, small_flags: tuple[str, ...], tmp_path: Path
) -> None:
    trigger = ("--patch_size", "--poison_rate")
    plain = [
        word
        for i, word in enumerate(small_flags)
        if attack != "none" or not {word, small_flags[i - 1]} & set(trigger)
    ]
    record = helpers.attack(attack, "r", tmp_path, *plain, *LEARNED, *flags)
    helpers.defend("ft", record, *GENTLE)
    assert run_audit(record, "--tests", "retune") == 0
    found, notes = without_numbers(record)
    assert found["summary"].get("depth") is None
    assert any(why in note for note in notes) and any(why in line for line in found["why"])


def test_a_model_that_collapsed_and_images_without_poison_have_no_depth(
    audited: Record, tmp_path: Path
) -> None:
    record = whole_copy(audited, tmp_path)
    path = record.folder / "defense" / "ft" / "seed0"
    (path / audits.FILE).unlink()
    after = {"clean_accuracy": 0.2, "asr": 0.0, "robust_accuracy": 0.2}
    before = {"clean_accuracy": 0.9, "asr": 1.0, "robust_accuracy": 0.0}
    helpers.edit_json(path / "result.json", after=after, before=before, collapsed=True)
    assert run_audit(record) == 0
    found, notes = without_numbers(record)
    assert found["tests"] == {} and any("COLLAPSED" in note for note in notes)
    (row,) = [row for row in measured.rows([record]) if row.defense == "ft"]
    assert row.is_solved is False, "a destroyed model is not left out of the share"

    # Imported data: nobody knows which images are poisoned, or there are no training images.
    info = {**record.info, "has_train": False}
    assert "imported without" in (view.refusal(Record(record.folder, info, *poisons(record))) or "")
    assert view.refusal(record) is None, "a control"


def poisons(record: Record) -> tuple[Any, Any]:
    return record.train_poison, record.test_poison


def test_an_imported_record_asks_for_a_clean_one(poisoned: Record, tmp_path: Path) -> None:
    config = {key: value for key, value in poisoned.info["config"].items() if key != "epochs"}
    record = Record(poisoned.folder, {**poisoned.info, "config": config}, *poisons(poisoned))
    with pytest.raises(UserError, match="pass --clean"):
        controls.clean_model(attacker(record), tmp_path, None)


# --- tables


def test_depth_has_columns_where_there_are_audits(audited: Record, poisoned: Record) -> None:
    for mean in (False, True):
        for form in ("text", "csv", "latex", "markdown"):
            shown = layout.table([audited], form, mean=mean)
            assert "depth" in shown.columns and "solved %" in shown.columns
            assert sum(note.startswith("Depth (audit)") for note in shown.notes) == 1
            assert formats.render(shown, form)
            assert "depth" not in layout.table([poisoned], form, mean=mean).columns
    shown = layout.table([audited], "csv")
    line = next(
        row
        for row in csv.DictReader(io.StringIO(formats.render(shown, "csv")))
        if row["defense"] == "ft"
    )
    of_result = kept(audited)["defense/ft/seed0/depth.json"]
    assert float(line["P-ASR 5 %"]) == round(100 * of_result["summary"]["p_asr"]["5"], 2)
    assert any("n = 0, 1, 5, 20: undefended" in note for note in shown.notes)


def test_a_damaged_audit_is_one_line_and_hides_nothing(audited: Record, tmp_path: Path) -> None:
    record = whole_copy(audited, tmp_path)
    path = record.folder / "defense" / "ft" / "seed0" / audits.FILE
    path.write_text(path.read_text().replace('"why"', '"wny"'))
    found: list[measured.Damaged] = []
    rows = measured.rows([record], on_damage=found.append)
    assert [one.defense for one in found] == ["ft"] and str(path) in found[0].why
    assert [row.defense for row in rows] == ["none"]
    for root, code in ((audited.folder.parent, 0), (tmp_path, 2)):
        assert main(["verify", record.name, "--record_root", str(root)]) == code


# --- a defender sees nothing


@pytest.mark.parametrize("plant", [False, True])
def test_no_value_of_an_audit_can_be_reached_from_a_method(
    plant: bool, audited: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, loaded = whole_copy(audited, tmp_path), methods.load("defense", "ft")
    numbers = {
        value
        for value in reachable(kept(record))
        if isinstance(value, float) and round(value, 3) != value
    }
    found: list[object] = []

    def defend(seen: DefenderView, config: Any, run: Run) -> nn.Module:
        seen.granted.update(everything.granted)  # type: ignore[attr-defined]
        model = real(seen, config, run)
        if plant:
            vars(run).update(x=AttackerView(record, record.dataset(), CPU, 0), y=kept(record))
        found.extend(reachable(seen, run))
        return model

    real, everything = loaded.module.defend, whole_view(record)
    monkeypatch.setattr(loaded.module, "defend", defend)
    argv = ["--result_file", record.name, "--record_root", str(tmp_path), "--run_name", "again"]
    run_defense(defense_job(loaded, [*argv, *GENTLE], "test"))

    assert len(numbers) > 4 and len(found) > 100
    wrong = leaks(found, numbers, record.train_poison.index)
    wrong |= {"attacker" for value in found if isinstance(value, AttackerView)}
    assert wrong >= {"attacker", "a number"} if plant else wrong == set()


# --- what the numbers are worth


@pytest.mark.slow
def test_controls_and_defenses_of_the_digits_stand_in_order(demo: Record, tmp_path: Path) -> None:
    record = helpers.copy(demo, tmp_path)
    for name in ("dau", "sau", "bu"):
        helpers.defend(name, record, "--score_every", "0")
    assert run_audit(record, "--tests", "retune") == 0
    found = {name: value["summary"] for name, value in kept(record).items()}
    depth = {name.split("/")[1].removesuffix(".json"): s["depth"] for name, s in found.items()}
    assert abs(depth["undefended"]) <= 0.05 and abs(depth["clean"] - 1) <= 0.05
    assert depth["exact"] >= 0.9
    assert depth["dau"] > max(depth["sau"], depth["bu"])


def test_a_page_draws_what_came_back_of_audited_results_alone(
    audited: Record, poisoned: Record
) -> None:
    (chart,) = (c for c in charts.overview(artifacts.gather([audited])) if c.name == "comeback")
    marks = {s.name: (s.x, s.y) for panel in chart.panels for s in panel.series}
    rows = measured.rows([audited])
    assert marks == {
        row.defense: ([100 * (row.asr or 0)], [100 * (row.p_asr_5 or 0)]) for row in rows
    }
    assert set(marks) == {"none", "ft"}
    names = [c.name for c in charts.overview(artifacts.gather([poisoned]))]
    assert names == ["accuracy_asr", "costs"], "a control: nothing was audited"


def test_a_large_test_set_is_measured_by_the_same_part_for_each_model(poisoned: Record) -> None:
    view, model = attacker(poisoned), poisoned.model()
    whole = view._triggered_split
    assert len(whole) > 10 and view.asr(model, len(whole)) == view.asr(model)
    part, again, other = (
        v._some("triggered", whole, 10) for v in (view, view, attacker(poisoned, 1))
    )
    assert len(part) == 10 and torch.equal(part.images, again.images)
    assert not torch.equal(part.images, other.images), "a control: another seed, another part"
    assert view.asr(model, 10) == view.share(model, part)
