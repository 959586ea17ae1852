"""Both commands as a user types them, and every mistake answered with one line."""

import dataclasses
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import helpers
import pytest

from backdoorlab import __main__, api, cli
from backdoorlab.config import RUN_OPTIONS
from backdoorlab.datasets.load import load as load_dataset
from backdoorlab.errors import UserError
from backdoorlab.record import Record
from backdoorlab.settings import help, methods, resources
from backdoorlab.settings.parse import flag_names
from backdoorlab.storage import reading

BADNET = helpers.CHECKOUT / "attack" / "badnet.py"
NONE = helpers.CHECKOUT / "attack" / "none.py"
BLENDED = helpers.CHECKOUT / "attack" / "blended.py"
DAU = helpers.CHECKOUT / "defense" / "dau.py"
FT = helpers.CHECKOUT / "defense" / "ft.py"
IBAU = helpers.CHECKOUT / "defense" / "ibau.py"
SAU = helpers.CHECKOUT / "defense" / "sau.py"

Capture = pytest.CaptureFixture[str]


def complaint(stderr: str) -> str:
    """The one line of a refusal; lines that begin with two spaces only inform."""
    lines = [line for line in stderr.splitlines() if not line.startswith("  ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert "Traceback" not in stderr
    return lines[0]


def test_attack_defense_and_table_in_processes_of_their_own(tmp_path: Path) -> None:
    """From another folder and without PYTHONPATH."""
    here, env = (
        tmp_path / "elsewhere",
        helpers.child_environment(BACKDOORLAB_RECORDS=tmp_path / "record"),
    )
    here.mkdir()
    done = helpers.command(
        BADNET, "--save_folder_name", "first", *helpers.TINY, "--pratio", "0.2", cwd=here, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "record written" in done.stdout and "clean acc %" in done.stdout
    assert [line.split()[:3] for line in done.stdout.splitlines() if line.startswith("first")] == [
        ["first", "badnet", "none"]
    ]
    assert done.stdout.splitlines()[-1] == "next: python defense/dau.py --result_file first"
    assert (
        "settings: " in done.stderr
        and "poison_rate 0.2 (flag)" in done.stderr
        and "digits.yaml" in done.stderr
    )
    assert reading.read_json(tmp_path / "record" / "first" / "record.json")["poisoned"] == round(
        0.2 * 1442
    )

    done = helpers.command(
        DAU,
        "--result_file",
        "first",
        "--pool",
        "model_loss",
        "--epochs",
        "1",
        "--head_epochs",
        "1",
        cwd=here,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert "clean accuracy" in done.stdout and "ASR" in done.stdout
    # The last line is a command that works, if the model does.
    following = done.stdout.splitlines()[-1]
    if "COLLAPSED" not in done.stdout:
        said, _, typed = following.partition(": python -m backdoorlab ")
        assert said == "to use the model"
        words = typed.replace("FILE", str(tmp_path / "repaired")).split()
        with helpers.environment(BACKDOORLAB_RECORDS=tmp_path / "record"):
            assert __main__.main(words) == 0
        assert (tmp_path / "repaired.safetensors").is_file()

    done = helpers.command("-m", "backdoorlab", "table", cwd=here, env=env)
    assert done.returncode == 0, done.stderr
    first = [line for line in done.stdout.splitlines() if line.startswith("first")]
    assert len(first) >= 3 and any(" dau " in line and "%" not in line for line in first)
    assert not list(here.iterdir()), "nothing is left in the folder it was started from"


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = helpers.command(BADNET, "--save_folder_name", "x", "--poison_rat", "0.1", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        complaint(done.stderr)
        == "error: unknown flag --poison_rat. Did you mean --poison_rate? See --help"
    )


def test_list_names_every_method(capsys: Capture) -> None:
    assert __main__.main(["list"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "badnet",
        "blended",
        "none",
        "dau",
        "ft",
        "digits",
        "cifar10",
        "preactresnet18",
        "model, train",
    ):
        assert word in shown


def test_list_has_one_aligned_line_for_each_method(capsys: Capture) -> None:
    assert __main__.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    roles: tuple[methods.Role, ...] = ("defense", "detector", "unlearner")
    tables = [("changes", list(methods.available("attack")))]
    tables += [("assumes", methods.with_role(role)) for role in roles]
    after = 0
    for column, names in tables:
        heads = [i for i, line in enumerate(lines) if line.split() == ["method", "idea", column]]
        after = head = next(i for i in heads if i > after)
        rows = lines[head + 2 : head + 2 + len(names)]
        assert [row.split()[0] for row in rows] == names
        for at in (lines[head].index("idea"), lines[head].index(column)):
            assert all(row[at - 1] == " " and row[at] != " " for row in rows)
        assert not any("..." in row for row in rows), "every method has a title that fits"


def test_list_shortens_a_long_title() -> None:
    for title, room, short in (
        ("BadNets: a patch.", 15, "BadNets: a..."),
        ("BadNets: a patch.", 16, "BadNets: a patch"),
        ("BadNets: a patch, white.", 20, "BadNets: a patch"),
        ("BadNets: a patch of pixels.", 20, "BadNets: a patch..."),
    ):
        assert __main__._summary(title, room) == short


def test_doctor_looks_around(tiny: Record, capsys: Capture) -> None:
    assert __main__.main(["doctor", "--record_root", str(tiny.folder.parent)]) == 0
    shown = capsys.readouterr().out
    assert (
        "1 finished, writable" in shown
        and "torch" in shown
        and "digits: 1442 + 355 images of 1 x 32 x 32, fingerprint" in shown
    )
    assert __main__.main(["doctor", "--record_root", str(tiny.folder / "record.json" / "x")]) == 0
    assert "NOT writable" in capsys.readouterr().out


def test_doctor_tells_the_image_size_of_cached_data(
    tiny: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("BACKDOORLAB_CACHE", str(tmp_path / "cache"))
    for size in (8, 16):
        load_dataset("digits", image_size=size)
    files = list((tmp_path / "cache").rglob("train_images.npy"))
    assert __main__.main(["doctor", "--record_root", str(tiny.folder.parent)]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "(cached)" in line]
    assert sorted(line.split(" images of ")[1].split(",")[0] for line in shown) == [
        "1 x 16 x 16",
        "1 x 8 x 8",
    ]
    for file in files:
        file.write_bytes(b"")
    assert __main__.main(["doctor", "--record_root", str(tiny.folder.parent)]) == 0
    assert capsys.readouterr().out.count("an unknown size") == 2


def test_usage_without_a_command(capsys: Capture) -> None:
    assert __main__.main([]) == 0
    assert "python -m backdoorlab COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("file", [BADNET, BLENDED, NONE, DAU, FT, IBAU, SAU])
def test_help_says_what_every_flag_does(file: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(str(file), ["--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out.replace("-", "_")
    for flag in (
        "seed",
        "device",
        "overwrite",
        "n_rounds" if file in (IBAU, SAU) else "epochs",
        "save_folder_name" if file.parent.name == "attack" else "result_file",
    ):
        assert f"__{flag} " in shown


@pytest.mark.parametrize(
    ("file", "own"),
    [(BADNET, "patch_size"), (NONE, "suspicious"), (FT, "epochs"), (DAU, "pool_rate")],
)
def test_help_begins_with_the_methods_own_numbers(file: Path, own: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main(str(file), ["--help"])
    shown = capsys.readouterr().out
    places = [
        shown.index(words)
        for words in (
            " method options ",
            f"--{own} ",
            " data and model options ",
            "--dataset_path ",
            " run options ",
            "--save_folder_name " if file.parent.name == "attack" else "--result_file ",
            "--debug ",
        )
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("kind", ["attack", "defense"])
def test_help_shows_every_field_once_with_its_text(kind: resources.Kind) -> None:
    for name in methods.available(kind):
        config_class = methods.load(kind, name).config_class
        groups, fields = help.groups(config_class), dataclasses.fields(config_class)
        assert list(groups) == ["method", "data and model", "run"]
        shown = [name for names in groups.values() for name in names]
        assert sorted(shown) == sorted(field.name for field in fields), name
        assert set(help.texts(config_class)) >= set(shown), name
        own = set(config_class.__annotations__) - {"RANGES"} - RUN_OPTIONS
        assert set(groups["method"][: len(own)]) == own, name


def test_help_shows_the_names_of_backdoorbench(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        cli.main(str(BADNET), ["-h"])
    shown = capsys.readouterr().out
    aliases = set(flag_names(methods.load("attack", "badnet").config_class))
    assert {"pratio", "attack_target", "client_optimizer"} <= aliases
    assert all(f"--{alias} " in shown for alias in aliases)


def test_help_of_commands(capsys: Capture) -> None:
    for argv, words in (
        (["table", "--help"], "Records and defenses side by side."),
        (
            ["attack", "badnet", "--help"],
            "BadNets: a small patch of pixels is the trigger. https://arxiv.org/abs/1708.06733",
        ),
        (
            ["defense", "ft", "--help"],
            "FT: fine-tuning on the trusted images, the baseline that every other defense has to"
            " beat.",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            __main__.main(argv)
        shown = " ".join(capsys.readouterr().out.split())
        assert not stop.value.code and "--debug" in shown and words in shown


def test_version_is_the_packages(capsys: Capture) -> None:
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out == f"backdoorlab {version('backdoorlab')}\n"


def test_what_to_do_next_is_typed_as_the_attack_was(
    small_flags: tuple[str, ...], tmp_path: Path, capsys: Capture
) -> None:
    root = str(tmp_path / "my records")
    assert (
        __main__.main(
            ["attack", "badnet", "--save_folder_name", "a", "--record_root", root, *small_flags]
        )
        == 0
    )
    following = capsys.readouterr().out.splitlines()[-1]
    assert (
        following
        == f"next: python -m backdoorlab defense dau --result_file a --record_root '{root}'"
    )


def test_a_model_that_learned_nothing_is_noted(
    backdoored: Record, small_flags: tuple[str, ...], tmp_path: Path
) -> None:
    """With a trigger and without one; the control: one that learned."""
    first = small_flags.index("--patch_size")
    without = small_flags[:first] + small_flags[first + 4 :]
    assert cli.main(str(BADNET), ["--save_folder_name", "x", *small_flags, "--epochs", "0"]) == 0
    assert cli.main(str(NONE), ["--save_folder_name", "y", *without, "--epochs", "0"]) == 0
    records = [Record.load(name, tmp_path / "record") for name in ("x", "y")]
    noted = [
        any("the model learned nothing" in note for note in record.info["notes"])
        for record in (*records, backdoored)
    ]
    assert noted == [True, True, False], records[0].info["scores"]


def test_table_of_some_records_in_every_form(tiny: Record, tmp_path: Path, capsys: Capture) -> None:
    root = tmp_path / "record"
    helpers.copy(tiny, root, "alpha")
    helpers.copy(tiny, root, "beta")
    assert __main__.main(["table", "beta"]) == 0
    shown = capsys.readouterr().out
    assert "beta" in shown and "alpha" not in shown
    for form, mark in (
        ("markdown", "| record |"),
        ("csv", "record,attack"),
        ("latex", r"\begin{tabular}"),
    ):
        assert __main__.main(["table", "-f", form]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(mark) and "alpha" in shown and "beta" in shown


def test_backdoorbench_flags_run(tmp_path: Path) -> None:
    argv = [
        "--save_folder_name",
        "bb",
        *helpers.TINY,
        "--pratio",
        "0.3",
        "--attack_target",
        "2",
        "--random_seed",
        "4",
        "--client_optimizer",
        "adam",
    ]
    argv += [
        "--lr_scheduler",
        "cosine",
        "--sgd_momentum",
        "0.8",
        "--wd",
        "0.001",
        "--lr",
        "0.001",
        "--attack_label_trans",
        "all2all",
    ]
    assert cli.main(str(BADNET), argv) == 0
    record = Record.load("bb", tmp_path / "record")
    assert (
        len(record.train_poison) == round(0.3 * 1442)
        and record.info["seed"] == 4
        and record.info["config"]["optimizer"] == "adam"
    )
    assert (
        record.train_poison.labels == (record.train_poison.original_labels + 1) % 10
    ).all() and record.info["target"] is None
    assert (
        cli.main(
            str(FT),
            ["--result_file", "bb", "--ratio", "0.1", "--random_seed", "3", "--epochs", "1"],
        )
        == 0
    )
    result = reading.read_json(record.folder / "defense" / "ft" / "seed3" / "result.json")
    assert result["config"]["trusted_ratio"] == 0.1 and result["seed"] == 3


def test_a_timm_model_by_name_on_the_digits(tmp_path: Path) -> None:
    """Whose YAML file sets a width, which is not for it."""
    argv = [
        "--save_folder_name",
        "r",
        "--model",
        "resnet10t",
        "--image_size",
        "8",
        "--epochs",
        "1",
        "--score_every",
        "0",
    ]
    assert cli.main(str(BADNET), argv) == 0
    assert Record.load("r", tmp_path / "record").info["architecture"]["width"] is None


def test_dau_in_three_subtasks(backdoored: Record, tmp_path: Path, capsys: Capture) -> None:
    record = helpers.copy(backdoored, tmp_path / "record")
    folder = record.folder / "defense" / "dau"
    run = lambda subtask: cli.main(  # noqa: E731
        str(DAU),
        [
            "--result_file",
            record.name,
            "--epochs",
            "1",
            *(("--subtask", subtask) if subtask else ()),
        ],
    )
    assert run("unlearning") == 2
    assert "run --subtask anti_learning first" in complaint(capsys.readouterr().err)
    assert run("test") == 2
    assert "no finished run to test" in complaint(capsys.readouterr().err)
    assert run("anti_learning") == 0
    assert (
        not (folder / "seed0").exists()
        and (folder / "seed0.partial" / "cached-split.safetensors").exists()
    )
    assert run("unlearning") == 0
    result = reading.read_json(folder / "seed0" / "result.json")
    assert (
        result["after"]["asr"] < result["before"]["asr"] - 0.5
        and not (folder / "seed0.partial").exists()
    )
    before = {path.name: reading.sha256(path) for path in (folder / "seed0").iterdir()}
    capsys.readouterr()
    assert run("test") == 0
    assert (
        f"ASR {100 * result['before']['asr']:.2f} -> {100 * result['after']['asr']:.2f} %"
        in capsys.readouterr().out
    )
    assert before == {path.name: reading.sha256(path) for path in (folder / "seed0").iterdir()}, (
        "test changes nothing"
    )
    shutil.move(folder / "seed0", folder / "stepwise")
    assert run("") == 0
    whole, stepwise = (
        reading.read_tensors(folder / name / "model.safetensors")[0]
        for name in ("seed0", "stepwise")
    )
    assert all(whole[name].equal(stepwise[name]) for name in whole), (
        "in steps or at once, the result is the same"
    )


ATTACK_MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("--epoch", "1"), "unknown flag --epoch. Did you mean --epochs"),
    (
        ("--poison_rate", "0"),
        "poison_rate must lie in (0, 1], got 0.0. A clean run is attack/none.py",
    ),
    (("--poison_rate", "1.5"), "poison_rate must lie in (0, 1], got 1.5"),
    (("--poison_rate", "0.0001"), "is no image at all"),
    (("--target_label", "10"), "target_label must lie in 0..9 for this data set, got 10"),
    (("--target_label", "-1"), "target_label must lie in 0..9"),
    (("--device", "cuda:99"), "--device cuda:99: this machine has"),
    (("--device", "gpu"), "--device gpu: expected auto, cpu, cuda or cuda:N"),
    (("--dataset", "digit"), "unknown data set 'digit'. Did you mean 'digits'"),
    (("--dataset", "mine"), "unknown data set 'mine'"),
    (
        ("--dataset", "mine", "--dataset_path", "/no/such/folder"),
        "--dataset_path /no/such/folder: no such folder",
    ),
    (
        ("--model", "preactresnet81"),
        "unknown model 'preactresnet81'. Did you mean 'preactresnet18'",
    ),
    (("--model", "resnet18"), "width is for preactresnet18, preactresnet10"),
    (("--epochs", "three"), "epochs"),
    (("--flip", "yes"), "flip"),
    (("--schedule", "linear"), "schedule"),
    (("--seed", "-1"), "seed must lie in 0.."),
    (("--seed", "99999999999"), "seed must lie in 0.."),
    (("--save_folder_name", "../x"), "a record name is one folder name"),
    (("--save_folder_name", ""), "--save_folder_name NAME is missing"),
    (("--mean", "0.5", "0.5", "0.5"), "--mean and --std need 1 numbers each"),
    (("--std", "0"), "std"),
    (("--yaml_path", "nothing"), "--yaml_path nothing: no such file, and no preset of that name"),
    (("--patch_size", "17"), "patch_size must lie in 1..16"),
    (("--epochs", "-1"), "epochs"),
    (("--batch_size", "0"), "batch_size"),
    (("--batch_size", "-5"), "batch_size"),
    (("--lr", "-0.1"), "lr"),
    (("--width", "0"), "width"),
    (("--width", "-4"), "width"),
    (("--image_size", "0"), "image_size"),
    (("--image_size", "-8"), "image_size"),
    (("--crop_padding", "-1"), "crop_padding"),
    (("--momentum", "-1"), "momentum"),
    (("--score_every", "-1"), "score_every"),
]


@pytest.mark.parametrize(
    ("flags", "message"), ATTACK_MISTAKES, ids=[" ".join(flags) for flags, _ in ATTACK_MISTAKES]
)
def test_a_mistake_in_an_attack_is_one_line(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: Capture
) -> None:
    import torch

    if flags == ("--device", "cuda:99") and not torch.cuda.is_available():
        message = "--device cuda:99: this machine has no usable GPU"
    assert cli.main(str(BADNET), ["--save_folder_name", "x", *helpers.TINY, *flags]) == 2
    assert message in complaint(capsys.readouterr().err)
    assert not (tmp_path / "record" / "x").exists()


DEFENSE_MISTAKES: list[tuple[Path, tuple[str, ...], str]] = [
    (DAU, ("--result_file", "tinny"), "no record 'tinny'"),
    (DAU, ("--result_file", ""), "--result_file NAME is missing. Records in"),
    (DAU, ("--result_file", "../tiny"), "a record name is one folder name"),
    (DAU, ("--run_name", "a/b"), "--run_name a/b: expected letters, digits, and _ . + - within"),
    (DAU, ("--run_name", "a.partial"), "a record name is one folder name"),
    (DAU, ("--loss", "gaa"), "loss"),
    (DAU, ("--pool_rat", "0.1"), "unknown flag --pool_rat. Did you mean --pool_rate"),
    (DAU, ("--pool_rate", "0"), "pool_rate"),
    (DAU, ("--pool_rate", "2"), "pool_rate"),
    (DAU, ("--heads", "0"), "heads"),
    (DAU, ("--threshold", "0"), "threshold"),
    (DAU, ("--seed", "-1"), "seed must lie in 0.."),
    (DAU, ("--subtask", "test"), "no finished run to test"),
    (FT, ("--trusted_ratio", "0"), "trusted_ratio must lie in (0, 1], got 0.0"),
    (FT, ("--trusted_count", "0"), "the trusted set needs between 1 and 1442 images, got 0"),
    (FT, ("--trusted_count", "1443"), "the trusted set needs between 1 and 1442 images, got 1443"),
    (FT, ("--batch_size", "0"), "batch_size"),
    (FT, ("--lr", "-1"), "lr"),
    (FT, ("--epochs", "-1"), "epochs"),
    (FT, ("--dataset_path", "/no/such/folder"), "no such folder"),
    (SAU, ("--eps", "0"), "eps must be > 0, got 0.0"),
    (SAU, ("--lr", "inf"), "lr must be >= 0, got inf"),
    (SAU, ("--norm", "l1"), "norm"),
    (SAU, ("--trusted_count", "0"), "the trusted set needs between 1 and 1442 images, got 0"),
    (
        IBAU,
        ("--unl_set", "/no/such/folder"),
        "--trusted_path /no/such/folder: no such folder. Give a folder with <class>/*.png",
    ),
    (IBAU, ("--patched", "2"), "patched must be in [0, 1], got 2.0"),
    (IBAU, ("--optim", "Adamm"), "optim"),
    (IBAU, ("--K", "-1"), "K must be >= 0, got -1"),
]


@pytest.mark.parametrize(
    ("file", "flags", "message"),
    DEFENSE_MISTAKES,
    ids=[f"{f.stem} {' '.join(x)}" for f, x, _ in DEFENSE_MISTAKES],
)
def test_a_mistake_in_a_defense_is_one_line(
    file: Path, flags: tuple[str, ...], message: str, tiny: Record, tmp_path: Path, capsys: Capture
) -> None:
    helpers.copy(tiny, tmp_path / "record")
    assert cli.main(str(file), ["--result_file", "tiny", *flags]) == 2
    assert message in complaint(capsys.readouterr().err)
    assert not list((tmp_path / "record" / "tiny" / "defense").glob("*/seed0/result.json"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tabel"], "unknown command 'tabel'. Did you mean 'table'"),
        (["table"], "no records in"),
        (["table", "nothing"], "no record 'nothing'"),
        (["table", "--format", "html"], "format"),
        (["table", "--mean"], "--mean takes True or False: --mean True"),
        (["attack"], "attack NAME is missing. Known: adaptive_blend, adaptive_patch, badnet, "),
        (["attack", "badnets"], "unknown attack 'badnets'. Did you mean 'badnet'"),
        (["defense", "dua", "--result_file", "x"], "unknown defense 'dua'. Did you mean 'dau'"),
        (["defense", "--result_file", "x"], "defense NAME is missing"),
        (["list", "--verbose"], "unknown flag --verbose"),
    ],
)
def test_a_mistake_in_a_command_is_one_line(argv: list[str], message: str, capsys: Capture) -> None:
    assert __main__.main(argv) == 2
    assert message in complaint(capsys.readouterr().err)


def test_a_form_that_no_table_has_is_one_line_from_python(tiny: Record) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"format must be one of text, markdown, csv, latex, got 'latexx'. Did you mean"
            r" 'latex'\?"
        ),
    ):
        api.table([tiny], format="latexx")  # type: ignore[arg-type]


def test_missing_data_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import socket

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert cli.main(str(BADNET), ["--save_folder_name", "x", "--dataset", "cifar10"]) == 2
    assert "there is no network to download it: pass --dataset_path FOLDER" in complaint(
        capsys.readouterr().err
    )


def test_a_misspelt_yaml_key_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine.yaml").write_text("learning_rat: 0.1\nepochs: 1\n")
    assert (
        cli.main(
            str(BADNET), ["--save_folder_name", "x", "--yaml_path", str(tmp_path / "mine.yaml")]
        )
        == 2
    )
    assert "mine.yaml: unknown key 'learning_rat'" in complaint(capsys.readouterr().err)


def test_an_existing_record_is_one_line(tiny: Record, tmp_path: Path, capsys: Capture) -> None:
    helpers.copy(tiny, tmp_path / "record")
    assert cli.main(str(BADNET), ["--save_folder_name", "tiny", *helpers.TINY]) == 2
    said = "exists and is finished: choose another --save_folder_name, or pass --overwrite True"
    assert said in complaint(capsys.readouterr().err)


def test_a_name_without_its_flag_is_answered_with_it(capsys: Capture) -> None:
    for file, flag in ((BADNET, "save_folder_name"), (FT, "result_file")):
        assert cli.main(str(file), ["demo"]) == 2
        assert f"'demo' belongs to no flag. Did you mean --{flag} demo?" in complaint(
            capsys.readouterr().err
        )


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _no_json(folder: Path) -> None:
    (folder / "record.json").write_text("{")


def _lost(folder: Path) -> None:
    (folder / "test_poison.safetensors").unlink()


def _other_data(folder: Path) -> None:
    info = reading.read_json(folder / "record.json")
    helpers.edit_json(folder / "record.json", dataset={**info["dataset"], "fingerprint": "f" * 64})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "model.safetensors"),
        (_no_json, "record.json"),
        (_lost, "test_poison.safetensors"),
        (_other_data, "is not in the cache"),
    ],
)
def test_a_damaged_record_is_one_line(
    damage: Callable[[Path], None], message: str, tiny: Record, tmp_path: Path, capsys: Capture
) -> None:
    damage(helpers.copy(tiny, tmp_path / "record").folder)
    assert cli.main(str(FT), ["--result_file", "tiny", "--epochs", "1"]) == 2
    assert message in complaint(capsys.readouterr().err)


@pytest.mark.parametrize("flag", [["--debug", "True"], ["--debug=True"]])
def test_debug_adds_a_traceback(flag: list[str], capsys: Capture) -> None:
    argv = ["--save_folder_name", "x", "--poison_rate", "2"]
    assert cli.main(str(BADNET), argv + flag) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.splitlines()[-1].startswith(
        "error: poison_rate must lie in"
    )
    assert cli.main(str(BADNET), [*argv, "--debug", "False"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_defect_of_ours_is_one_line_and_another_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def broken(*_args: object) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("backdoorlab.execution.attack.run_attack", broken)
    assert cli.main(str(BADNET), ["--save_folder_name", "x"]) == 1
    assert (
        complaint(capsys.readouterr().err)
        == "error: unexpected ZeroDivisionError: first line (pass --debug True to see where)"
    )
    with pytest.raises(ZeroDivisionError):
        cli.main(str(BADNET), ["--save_folder_name", "x", "--debug", "True"])


def test_an_interruption_says_how_to_continue(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("backdoorlab.execution.attack.run_attack", interrupted)
    assert cli.main(str(BADNET), ["--save_folder_name", "x"]) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
