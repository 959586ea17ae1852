"""Numbers enter once: defaults < the data set's YAML < --yaml_path < flags."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from backdoorlab import config as configs
from backdoorlab.data import Augment
from backdoorlab.errors import UserError
from backdoorlab.settings import methods, resources
from backdoorlab.settings.parse import Parsed, Trained, parse

Presets = Callable[..., None]


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Presets:
    """Replace resource/config/ by files that the test writes: presets(toy={section: {key:
    value}})."""
    folder = tmp_path / "resource" / "config"
    folder.mkdir(parents=True)
    monkeypatch.setattr(
        "backdoorlab.settings.resources.resource", lambda name: tmp_path / "resource" / name
    )

    def write(**files: Any) -> None:
        for name, content in files.items():
            (folder / f"{name}.yaml").write_text(
                content if isinstance(content, str) else yaml.safe_dump(content)
            )

    return write


def attack(*argv: str, method: str = "badnet") -> Parsed:
    return parse(
        methods.load("attack", method).config_class,
        method,
        "attack",
        argv,
        lambda c: Trained(c.dataset, c.epochs),
        "test",
    )


def defense(
    *argv: str, method: str = "dau", dataset: str = "toy", epochs: int | None = 100
) -> Parsed:
    """`epochs`: what the record's model was trained."""
    trained = Trained(dataset, epochs)
    return parse(
        methods.load("defense", method).config_class,
        method,
        "defense",
        argv,
        lambda _: trained,
        "test",
    )


def test_each_layer_wins_over_the_one_before(presets: Presets, tmp_path: Path) -> None:
    presets(
        toy={
            "attack": {"lr": 0.2, "momentum": 0.8, "epochs": 7, "weight_decay": 0.1},
            "badnet": {"momentum": 0.7, "patch_size": 5},
        }
    )
    mine = tmp_path / "mine.yaml"
    mine.write_text("epochs: 8\nweight_decay: 0.2\n")
    found = attack("--dataset", "toy", "--yaml_path", str(mine), "--weight_decay", "0.3")
    config = found.config
    assert config.batch_size == 128, "default"
    assert config.lr == 0.2, "attack section over default"
    assert (config.momentum, config.patch_size) == (0.7, 5), "method section over attack section"
    assert config.epochs == 8, "file over data set"
    assert config.weight_decay == 0.3, "flag over file"
    assert found.origins == {
        "lr": "toy.yaml",
        "momentum": "toy.yaml",
        "patch_size": "toy.yaml",
        "epochs": "mine.yaml",
        "weight_decay": "flag",
        "dataset": "flag",
        "yaml_path": "flag",
    }
    assert "lr 0.2 (toy.yaml)" in found.describe() and "weight_decay 0.3 (flag)" in found.describe()
    assert attack("--dataset", "other").config.lr == 0.01, "another data set has no such file"


def test_sections_belong_to_their_kind_and_method(presets: Presets) -> None:
    presets(
        toy={
            "attack": {"lr": 0.2},
            "defense": {"seed": 3},
            "dau": {"epochs": 2},
            "ft": {"epochs": 4},
            "blended": {"alpha": 0.5},
        }
    )
    assert attack("--dataset", "toy").config.seed == 0
    assert attack("--dataset", "toy", method="blended").config.alpha == 0.5
    assert (defense().config.epochs, defense().config.seed, defense().config.lr) == (2, 3, 1e-4)
    assert defense(method="ft").config.epochs == 4


def test_a_short_run_has_settings_of_its_own(presets: Presets) -> None:
    short_run = {
        "epochs_below": 50,
        "attack": {"lr": 0.1, "schedule": "onecycle"},
        "dau": {"epochs": 3},
    }
    presets(toy={"attack": {"lr": 0.01, "epochs": 100}, "dau": {"lr": 0.5}, "short_run": short_run})
    run = lambda *argv: attack("--dataset", "toy", *argv)  # noqa: E731
    assert (run().config.lr, run().config.schedule) == (0.01, "cosine")
    assert (run("--epochs", "50").config.lr, run("--epochs", "50").config.schedule) == (
        0.01,
        "cosine",
    )
    short = run("--epochs", "49")
    assert (short.config.lr, short.config.schedule) == (0.1, "onecycle")
    assert short.origins["lr"] == "toy.yaml: short_run"
    assert run("--epochs", "5", "--lr", "0.3").config.lr == 0.3, "a flag wins over it"
    assert [defense(epochs=epochs).config.epochs for epochs in (100, 50, 49, None)] == [
        20,
        20,
        3,
        20,
    ], "of a model that was trained shortly"
    assert (
        defense(epochs=5).config.lr == 0.5 and defense("--epochs", "7", epochs=5).config.epochs == 7
    )


def test_a_data_sets_width_is_for_networks_that_have_one(presets: Presets) -> None:
    short_run = {"epochs_below": 50, "attack": {"width": 8}}
    presets(
        toy={"attack": {"width": 16, "lr": 0.2}, "badnet": {"width": 4}, "short_run": short_run},
        mine="width: 2\n",
    )
    run = lambda *argv: attack("--dataset", "toy", *argv)  # noqa: E731
    assert [run("--epochs", epochs).config.width for epochs in ("50", "3")] == [4, 8]
    for epochs in ("50", "3"):
        found = run("--model", "resnet18", "--epochs", epochs)
        assert (
            found.config.width is None and "width" not in found.origins and found.config.lr == 0.2
        )
    assert run("--model", "resnet18", "--width", "2").config.width == 2, (
        "what the user asks for is left to be refused"
    )
    assert run("--model", "resnet18", "--yaml_path", "mine").config.width == 2


def test_values_of_every_type_from_yaml(presets: Presets) -> None:
    presets(
        toy={
            "attack": {
                "mean": [0.1, 0.2, 0.3],
                "flip": True,
                "grey": False,
                "schedule_epochs": None,
                "width": 16,
                "optimizer": "adam",
                "lr": 1,
            }
        }
    )
    config = attack("--dataset", "toy").config
    assert config.mean == (0.1, 0.2, 0.3) and isinstance(config.mean, tuple)
    assert config.flip is True and config.grey is False and config.schedule_epochs is None
    assert config.width == 16 and config.optimizer == "adam" and config.lr == 1.0
    presets(toy="attack:\n  lr: 1e-3\n  weight_decay: 5.0e-04\n")
    assert (
        attack("--dataset", "toy").config.lr,
        attack("--dataset", "toy").config.weight_decay,
    ) == (1e-3, 5e-4), "1e-3 is text to YAML"
    assert attack("--flip", "False", "--dataset", "toy").config.flip is False


def test_tuples_and_booleans_from_flags() -> None:
    config = attack(
        "--mean",
        "0.1",
        "0.2",
        "0.3",
        "--flip",
        "True",
        "--width",
        "None",
        "--dataset=cifar10",
        "--poison-rate",
        "0.2",
    ).config
    assert (
        config.mean == (0.1, 0.2, 0.3)
        and config.flip is True
        and config.width is None
        and config.dataset == "cifar10"
    )
    assert config.poison_rate == 0.2, "dashes and underscores are the same"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"attack": {"learning_rat": 0.1}}, r"toy.yaml: attack: unknown key 'learning_rat'"),
        ({"attack": {"epoch": 3}}, r"unknown key 'epoch'. Did you mean 'epochs'"),
        ({"atack": {"lr": 0.1}}, r"unknown section 'atack'. Did you mean 'attack'"),
        (
            {"short_run": {"epochs_below": 200, "attack": {"leraning_rate": 1}}},
            "short_run: attack: unknown key 'leraning_rate'",
        ),
        (
            {"short_run": {"epochs_below": 200, "atack": {"lr": 1}}},
            "short_run: unknown section 'atack'. Did you mean 'attack'",
        ),
        ({"short_run": {"epochs_below": 200, "lr": 1}}, "short_run: unknown section 'lr'"),
        ({"short_run": {"attack": {"lr": 1}}}, "toy.yaml: short_run.*epochs_below"),
        ({"attack": {"lr": "fast"}}, "lr"),
        ({"attack": {"schedule": "linear"}}, "schedule"),
        ({"attack": [1, 2]}, "toy.yaml"),
        ("attack: [", "not readable as YAML"),
        ("attack: " + "[" * 3000 + "]" * 3000, "not readable as YAML .*thousands deep"),
        ("just text", "expected lines of `key: value`"),
        ("", "expected lines of `key: value`"),
    ],
)
def test_a_mistake_in_a_yaml_file_is_one_line(presets: Presets, content: Any, message: str) -> None:
    presets(toy=content)
    with pytest.raises(UserError, match=message) as caught:
        attack("--dataset", "toy")
    assert "\n" not in str(caught.value)


def test_a_misspelt_key_of_a_users_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("poison_rat: 0.2\n")
    with pytest.raises(
        UserError, match=r"mine.yaml: unknown key 'poison_rat'. Did you mean 'poison_rate'"
    ):
        attack("--yaml_path", str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("yaml_path: other.yaml\n")
    with pytest.raises(
        UserError, match=r"mine.yaml: yaml_path in a file of settings is not followed"
    ):
        attack("--yaml_path", str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("poison_rate: 0.2\n")
    assert attack("--yaml_path", str(tmp_path / "mine.yaml")).config.poison_rate == 0.2


def test_a_preset_is_found_by_name(presets: Presets) -> None:
    presets(quick="epochs: 3\nlr: 0.5\n", other="epochs: 9\n")
    found = attack("--yaml_path", "quick", "--dataset", "nothing")
    assert (found.config.epochs, found.config.lr, found.origins["lr"]) == (3, 0.5, "quick.yaml")
    with pytest.raises(UserError, match=r"no preset of that name\. Presets: other, quick"):
        attack("--yaml_path", "quickly")


SHIPPED = sorted(
    file
    for file in resources.resource("config").glob("*.yaml")
    if not file.stem.startswith("bench_")
)


def of_a_data_set(file: Path) -> bool:
    """A data set's file has sections, a preset has flags."""
    return all(isinstance(value, dict) for value in yaml.safe_load(file.read_text()).values())


def test_every_data_sets_file_that_ships_is_read_by_every_method() -> None:
    files = [file for file in SHIPPED if of_a_data_set(file)]
    assert {"digits", "cifar10"} <= {file.stem for file in files}
    for file in files:
        sections = yaml.safe_load(file.read_text())
        for method in methods.available("attack"):
            config = attack("--dataset", file.stem, method=method).config
            for key, value in {**sections.get("attack", {}), **sections.get(method, {})}.items():
                assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value)
        for method in methods.available("defense"):
            config = defense(method=method, dataset=file.stem).config
            for key, value in {**sections.get("defense", {}), **sections.get(method, {})}.items():
                assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("preset", sorted(file.stem for file in SHIPPED if not of_a_data_set(file)))
def test_every_preset_that_ships_is_read_by_some_method(preset: str) -> None:
    values = yaml.safe_load((resources.resource("config") / f"{preset}.yaml").read_text())
    readers = []
    for kind, read in (("attack", attack), ("defense", defense)):
        for method in methods.available("attack" if kind == "attack" else "defense"):
            try:
                found = read("--yaml_path", preset, method=method)
            except UserError:
                continue
            readers.append(method)
            assert all(found.origins[key] == f"{preset}.yaml" for key in values)
    assert readers


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--epoch", "3"), r"unknown flag --epoch. Did you mean --epochs"),
        (("--learning_rate", "0.1"), r"unknown flag --learning_rate. Did you mean --lr\?"),
        (("--poison_rat=0.1",), r"unknown flag --poison_rat. Did you mean --poison_rate"),
        (("--epochs", "three"), "^--epochs takes a whole number, got 'three'. See --help$"),
        (
            ("--attack_target", "zero"),
            "^--target_label takes a whole number, got 'zero'. See --help$",
        ),
        (("--lr", "fast"), "^--lr takes a number, got 'fast'. See --help$"),
        (("--width", "wide"), "^--width takes a whole number, got 'wide'. See --help$"),
        (("--mean", "0.5", "x"), "^--mean takes numbers, got '0.5 x'. See --help$"),
        (("--flip",), "^--flip takes True or False: --flip True. See --help$"),
        (("--grey", "--lr", "0.1"), "^--grey takes True or False: --grey True. See --help$"),
        (("--flip", "yes"), "^--flip takes True or False, got 'yes'. See --help$"),
        (("--schedule", "linear"), "schedule"),
        (("--epochs",), "^--epochs takes a whole number, got nothing. See --help$"),
        (
            ("--dataset_path", "/photos"),
            "^--dataset_path /photos: which data set is that. Pass --dataset NAME as well",
        ),
        (("stray",), "stray"),
        (
            ("--epochs", "3", "stray", "--epochs", "4"),
            "^--epochs is given twice, with more than one word after the first: 3 stray",
        ),
    ],
)
def test_a_mistake_in_a_flag_is_one_line(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        attack(*argv)
    assert "\n" not in str(caught.value)


def test_names_of_backdoorbench_are_understood() -> None:
    config = attack(
        *(
            "--pratio",
            "0.2",
            "--attack_target",
            "3",
            "--random_seed",
            "7",
            "--attack_label_trans",
            "all2all",
            "--client_optimizer",
            "adam",
        ),
        *(
            "--lr_scheduler",
            "plateau",
            "--sgd_momentum",
            "0.5",
            "--wd",
            "0.001",
            "--architecture",
            "preactresnet10",
        ),
    ).config
    assert (
        config.poison_rate,
        config.target_label,
        config.seed,
        config.label_mode,
        config.optimizer,
    ) == (0.2, 3, 7, "all2all", "adam")
    assert (config.schedule, config.momentum, config.weight_decay, config.model) == (
        "plateau",
        0.5,
        0.001,
        "preactresnet10",
    )
    for name, ours in (("CosineAnnealingLR", "cosine"), ("ReduceLROnPlateau", "plateau")):
        assert attack("--lr_scheduler", name).config.schedule == ours
    assert (
        attack("--client_optimizer=Adam").config.optimizer == "adam"
        and attack("--client_optimizer", "sgd").config.optimizer == "sgd"
    )
    with pytest.raises(UserError, match="invalid choice 'StepLR'"):
        attack("--lr_scheduler", "StepLR")
    config = defense("--ratio", "0.1", "--random_seed", "2", method="ft").config
    assert (config.trusted_ratio, config.seed) == (0.1, 2)


def test_a_folder_of_data_needs_a_name(tmp_path: Path) -> None:
    """Else it would be the digits, with their settings."""
    (tmp_path / "mine.yaml").write_text("dataset: photos\n")
    for named in (
        ("--dataset", "cifar10"),
        ("--dataset", "digits"),
        ("--yaml_path", str(tmp_path / "mine.yaml")),
    ):
        assert attack("--dataset_path", "/photos", *named).config.dataset_path == "/photos"


def test_what_counts_as_science() -> None:
    config = attack(
        "--save_folder_name", "x", "--device", "cpu", "--mean", "0.5", "0.5", "0.5"
    ).config
    science = config.science()
    assert (
        not set(science) & configs.RUN_OPTIONS
        and science["mean"] == [0.5, 0.5, 0.5]
        and science["poison_rate"] == 0.1
    )
    assert {"seed", "precision", "dataset", "model", "patch_size"} <= set(science)


def test_the_recipe_takes_every_training_option() -> None:
    config = attack(
        "--epochs",
        "3",
        "--lr",
        "0.5",
        "--optimizer",
        "adam",
        "--schedule",
        "constant",
        "--crop_padding",
        "1",
        "--flip",
        "True",
    ).config
    recipe = config.recipe()
    assert (recipe.epochs, recipe.lr, recipe.optimizer, recipe.schedule, recipe.augment) == (
        3,
        0.5,
        "adam",
        "constant",
        Augment(1, True),
    )
