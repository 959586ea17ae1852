"""Grids: names and commands of their cells, and every mistake as one line before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from backdoorlab.bench import grid
from backdoorlab.errors import UserError
from backdoorlab.settings import methods, resources


def write(folder: Path, **content: Any) -> str:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def cells(path: str | None = None, **flags: str) -> list[grid.Cell]:
    return grid.cells(grid.read(path, **flags))


def test_the_digits_grid_is_three_attacks_six_defenses_three_seeds() -> None:
    found = cells("bench_digits")
    assert (
        sum(cell.kind == "attack" for cell in found) == 9
        and sum(cell.kind == "defense" for cell in found) == 54
    )
    assert {cell.record for cell in found} >= {
        "digits-badnet-0.1-s0",
        "digits-blended-0.1-s2",
        "digits-badnet-random-0.1-s1",
    }
    assert (
        len({cell.name for cell in found})
        == len(found)
        == len({cell.folder(Path("r")) for cell in found})
    )


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in resources.resource("config").glob("bench_*.yaml"))
)
def test_every_shipped_grid_goes_through_the_parsers_of_its_methods(name: str) -> None:
    found = cells(name)
    assert len({cell.name for cell in found}) == len(found) > 9


def test_the_field_s_protocol_is_each_method_s_own_default() -> None:
    found = {cell.name: json.loads(cell.settings) for cell in cells("bench_cifar10", seeds="0")}
    attack = found["cifar10-badnet-0.1-s0"]
    assert (
        attack["epochs"],
        attack["width"],
        attack["lr"],
        attack["schedule"],
        attack["batch_size"],
    ) == (100, None, 0.01, "cosine", 128)
    assert (
        found["cifar10-badnet-0.1-s0 dau seed0"]["epochs"] == 20
        and found["cifar10-badnet-0.1-s0 ibau seed0"]["lr"] == 1e-4
    )
    control = {
        cell.name: json.loads(cell.settings) for cell in cells("bench_cifar10_w16", seeds="0")
    }
    assert control["cifar10-w16-badnet-0.1-s0"]["epochs"] == 10


def test_a_name_holds_data_network_preset_attack_rate_and_seed(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        datasets=[{"digits": {"model": "preactresnet10", "width": 8}}],
        attacks=[
            "none",
            {"blended-faint": {"method": "blended", "alpha": 0.1, "poison_rate": 0.05}},
        ],
        defenses=["ft", {"sau-lite": {"method": "sau", "yaml_path": "sau_lite"}}],
        poison_rates=[0.1, 0.01],
        seeds=[3],
    )
    names = [cell.name for cell in cells(path)]
    record = "digits-preactresnet10-w8-{}-s3"
    assert names == [
        record.format("none"),
        record.format("none") + " ft seed3",
        record.format("none") + " sau lite-s3",
        record.format("blended-faint-0.05"),
        record.format("blended-faint-0.05") + " ft seed3",
        record.format("blended-faint-0.05") + " sau lite-s3",
    ]
    lite = cells(path)[2]
    assert lite.flags[:6] == (
        "--result_file",
        record.format("none"),
        "--run_name",
        "lite-s3",
        "--seed",
        "3",
    )
    (tmp_path / "quick.yaml").write_text("epochs: 3")
    quick = cells(
        write(
            tmp_path,
            attacks=["badnet"],
            defenses=[],
            seeds=[0],
            attack={"yaml_path": str(tmp_path / "quick.yaml")},
        )
    )
    assert [cell.name for cell in quick] == ["digits-quick-badnet-0.1-s0"] and json.loads(
        quick[0].settings
    )["epochs"] == 3


def test_an_alias_is_the_flag_that_it_stands_for(tmp_path: Path) -> None:
    found = cells(
        write(
            tmp_path,
            attacks=[{"badnet": {"pratio": [0.02, 0.03]}}],
            defenses=[],
            seeds=[0],
            attack={"attack_target": 3},
        )
    )
    assert [cell.name for cell in found] == ["digits-badnet-0.02-s0", "digits-badnet-0.03-s0"]
    assert [json.loads(cell.settings)["poison_rate"] for cell in found] == [0.02, 0.03]
    assert json.loads(found[0].settings)["target_label"] == 3


def test_a_cells_settings_are_those_of_its_command() -> None:
    """The grid expects in record.json what the command's own parser makes of the flags."""
    from backdoorlab.execution.attack import attack_job

    for cell in cells("bench_digits"):
        method = methods.load(cell.kind, cell.method)
        if cell.kind == "attack":
            config = attack_job(method, cell.flags, "test").config
            assert config.save_folder_name == cell.record
            assert json.loads(cell.settings) == json.loads(grid.settings_of(config.science()))
    assert json.loads(cells("bench_digits")[4].settings)["epochs"] == 20, (
        "ft's epochs on the digits, from digits.yaml"
    )


def test_flags_replace_the_files_lists_and_keep_its_entries() -> None:
    found = cells("bench_digits", attacks="badnet-random", defenses="ft", seeds="7")
    assert [cell.name for cell in found] == [
        "digits-badnet-random-0.1-s7",
        "digits-badnet-random-0.1-s7 ft seed7",
    ]
    assert json.loads(found[0].settings)["position"] == "random"


def test_a_flags_rates_are_in_place_of_single_attacks_own() -> None:
    assert "digits-sig-0.05-s0" in [
        cell.name for cell in cells("bench_digits_attacks", attacks="sig", seeds="0")
    ], "the control"
    found = [
        cell.name
        for cell in cells(
            "bench_digits_attacks",
            attacks="sig,badnet",
            poison_rates="0.02",
            defenses="ft",
            seeds="0",
        )
    ]
    assert found[::2] == ["digits-sig-0.02-s0", "digits-badnet-0.02-s0"]


def test_all_is_every_method_there_is() -> None:
    found = cells(None, attacks="all", defenses="all", seeds="0")
    assert {cell.method for cell in found if cell.kind == "attack"} == set(
        methods.available("attack")
    ) - {"none"}
    assert {cell.method for cell in found if cell.kind == "defense"} == set(
        methods.with_role("defense")
    ), "detectors and unlearners are combined in pairs"
    named = cells(None, attacks="all,none", defenses="ft", seeds="0")
    assert {cell.method for cell in named if cell.kind == "attack"} == set(
        methods.available("attack")
    ), "none where it is named"


def test_a_pair_is_a_detector_and_an_unlearner_that_waits_for_it() -> None:
    found = cells(
        None, attacks="badnet", defenses="spectral+ssd,oracle+ssd,loss,loss+ssd", seeds="3"
    )
    runs = [
        (cell.method, cell.run, cell.needs and cell.needs[1:])
        for cell in found
        if cell.kind == "defense"
    ]
    assert runs == [
        ("spectral", "seed3", None),
        ("ssd", "spectral-s3", ("spectral", "seed3")),
        ("ssd", "oracle-s3", ("oracle", "seed3")),
        ("loss", "seed3", None),
        ("ssd", "loss-s3", ("loss", "seed3")),
    ]
    flags = next(cell.flags for cell in found if cell.run == "spectral-s3")
    assert flags[flags.index("--split") + 1] == "spectral"
    for word in ("nobody+ssd", "spectral+nobody"):
        with pytest.raises(UserError, match=r"unknown defense '.*nobody"):
            cells(None, attacks="badnet", defenses=word, seeds="0")


def test_a_method_with_options_beside_all(tmp_path: Path) -> None:
    found = cells(
        write(tmp_path, attacks=["badnet"], defenses=["all", {"ft": {"epochs": 3}}], seeds=[0])
    )
    epochs = [json.loads(cell.settings)["epochs"] for cell in found if cell.method == "ft"]
    assert epochs == [3], "the named entry takes the place of the one that `all` brings"


@pytest.mark.parametrize(
    ("content", "flags", "complaint"),
    [
        (
            {"attacks": ["badnt"]},
            {},
            r"grid.yaml: unknown attack 'badnt'. Did you mean 'badnet'\? Known: ",
        ),
        (
            {"attacks": ["badnet"], "defenses": ["sauu"]},
            {},
            r"unknown defense 'sauu'. Did you mean 'sau'\?",
        ),
        (
            {"attacks": ["badnet"], "seed": [0]},
            {},
            r"unknown key 'seed'. Did you mean 'seeds'\? Known: datasets, ",
        ),
        ({"attacks": []}, {}, "an empty grid; attacks names nothing"),
        ({"attacks": ["badnet"], "seeds": []}, {}, "an empty grid; seeds names nothing"),
        ({"attacks": ["badnet"]}, {"datasets": ""}, "an empty grid; datasets names nothing"),
        ({}, {}, "expected lines of|an empty grid"),
        (
            {"defenses": ["ft"]},
            {},
            "an empty grid; name a file with --config, or attacks with --attacks",
        ),
        ({"attacks": ["badnet"], "seeds": ["one"]}, {}, "seeds: expected whole numbers, got 'one'"),
        ({"attacks": ["badnet"], "poison_rates": [1.5]}, {}, "1.5"),
        (
            {"attacks": [{"badnet": {"positon": "random"}}]},
            {},
            r"badnet: unknown key 'positon'. Did you mean 'position'\?",
        ),
        ({"attacks": ["badnet"], "defense": {"epoch": 2}}, {}, "unknown key 'epoch'"),
        ({"attacks": [{"badnet": {"seed": 3}}]}, {}, "seed is set by the grid"),
        (
            {"attacks": ["badnet"], "attack": {"random_seed": 3}},
            {},
            "attack: seed is set by the grid",
        ),
        ({"attacks": [{"badnet": {"position": "middle"}}]}, {}, "position"),
        ({"attacks": [{"bad/net": {"method": "badnet"}}]}, {}, "is no name"),
        ({"attacks": [["badnet"]]}, {}, "expected names, or"),
        ({"attacks": [{"a": {"method": "badnet"}, "b": {}}]}, {}, "expected names, or"),
        ({"attacks": ["badnet"], "attack": 3}, {}, "expected lines of `key: value`, found 3"),
        (
            {
                "attacks": ["badnet"],
                "defenses": [{"sau-x": {"method": "sau"}}, {"sau_x": {"method": "sau"}}],
            },
            {},
            "give one of them another label",
        ),
    ],
)
def test_mistakes(
    tmp_path: Path, content: dict[str, Any], flags: dict[str, str], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        cells(write(tmp_path, **content), **flags)


def test_one_label_is_one_entry(tmp_path: Path) -> None:
    complaint = (
        r"grid.yaml: attacks: two unlike entries are called badnet: give one another label, `-"
        r" LABEL: \{method: badnet, ...\}`"
    )
    for flags in ({}, {"attacks": "badnet"}):
        with pytest.raises(UserError, match=complaint):
            cells(write(tmp_path, attacks=["badnet", {"badnet": {"position": "random"}}]), **flags)
    alike = cells(write(tmp_path, attacks=["badnet", "badnet"], defenses=[], seeds=[0]))
    assert [cell.name for cell in alike] == ["digits-badnet-0.1-s0"]
    other = cells(
        write(
            tmp_path,
            attacks=["badnet", {"badnet-random": {"method": "badnet", "position": "random"}}],
            defenses=[],
            seeds=[0],
        )
    )
    assert [cell.name for cell in other] == ["digits-badnet-0.1-s0", "digits-badnet-random-0.1-s0"]


def test_one_data_set_on_two_networks(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        datasets=["digits", {"digits": {"width": 8}}],
        attacks=["badnet"],
        defenses=[],
        seeds=[0],
    )
    names = ["digits-badnet-0.1-s0", "digits-w8-badnet-0.1-s0"]
    assert (
        [cell.name for cell in cells(path)]
        == names
        == [cell.name for cell in cells(path, datasets="digits")]
    )


def test_a_shared_poison_rate_is_refused_only_where_it_would_be_lost(tmp_path: Path) -> None:
    for shared in ({"poison_rate": 0.05}, {"pratio": 0.05}):
        with pytest.raises(
            UserError, match=r"attack: poison_rate is not shared: say `poison_rates: \[0.05\]`"
        ):
            cells(write(tmp_path, attacks=["badnet"], attack=shared))


def test_an_attack_without_a_rate_is_an_empty_grid(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an empty grid; badnet: poison_rate names nothing"):
        cells(write(tmp_path, attacks=["blended", {"badnet": {"poison_rate": []}}]))


def test_what_every_command_would_refuse_is_refused_before(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"grid.yaml: seeds: each must lie in 0..2147483647, got -1"
    ):
        cells(write(tmp_path, attacks=["badnet"], seeds=[0, -1]))
    with pytest.raises(
        UserError,
        match=(
            r"unknown data set 'digit'. Did you mean 'digits'\? Known: digits, .*dataset_path:"
            r" FOLDER"
        ),
    ):
        cells(write(tmp_path, attacks=["badnet"]), datasets="digit")
    with pytest.raises(UserError, match="mine: dataset_path /nowhere: no such folder"):
        cells(
            write(tmp_path, attacks=["badnet"], datasets=[{"mine": {"dataset_path": "/nowhere"}}])
        )
    assert cells(
        write(tmp_path, attacks=["badnet"], datasets=[{"mine": {"dataset_path": str(tmp_path)}}])
    ), "the control: a folder that is there"
    with pytest.raises(UserError, match=r"unknown model 'resnet-18'. Did you mean 'resnet18'"):
        cells(write(tmp_path, attacks=["badnet"], attack={"model": "resnet-18"}))
    (tmp_path / "deep.yaml").write_text("attacks: " + "[" * 3000 + "]" * 3000)
    with pytest.raises(
        UserError, match=r"deep.yaml: not readable as YAML \(brackets within brackets"
    ):
        cells(str(tmp_path / "deep.yaml"))


def test_an_unknown_grid_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        UserError,
        match=(
            r"no grid of that name. Did you mean 'bench_digits'\? Grids: bench_cifar10,"
            r" bench_cifar10_fast, bench_cifar10_w16, bench_curve, bench_datasets, bench_depth,"
            r" bench_digits"
        ),
    ):
        grid.read("bench_digit")
    with pytest.raises(UserError, match="an empty grid; name a file with --config"):
        grid.read(None)
