"""Installed from a wheel, without a checkout, the same commands work."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import partial
from pathlib import Path

import helpers
import pytest

PARTS = (
    *("setup.py", "pyproject.toml", "README.md", "LICENSE"),
    *("backdoorlab", "attack", "defense", "resource"),
)


def pip(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_requirements_txt_names_the_dependencies_of_the_package() -> None:
    listed = (helpers.CHECKOUT / "requirements.txt").read_text().split("\n")
    project = tomllib.loads((helpers.CHECKOUT / "pyproject.toml").read_text())["project"]
    assert [line for line in listed if line] == ["-e .", *project["dependencies"]]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools")),
    reason="building a wheel offline needs pip and setuptools",
)
def test_a_wheel_holds_everything_and_runs_without_a_checkout(tmp_path: Path) -> None:
    source, dist, site, here = (tmp_path / name for name in ("source", "dist", "site", "here"))
    for part in PARTS:  # a copy, so that building leaves nothing in the checkout
        if (helpers.CHECKOUT / part).is_dir():
            shutil.copytree(
                helpers.CHECKOUT / part, source / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(helpers.CHECKOUT / part, source / part)
    pip("wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(dist), cwd=source)
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    wanted = {
        "backdoorlab/py.typed",
        "backdoorlab/resource/reported.yaml",
        *(
            f"backdoorlab/resource/config/{p.name}"
            for p in (helpers.CHECKOUT / "resource" / "config").glob("*.yaml")
        ),
    }
    wanted |= {
        f"backdoorlab/{kind}/{path.name}"
        for kind in ("attack", "defense")
        for path in (helpers.CHECKOUT / kind).glob("*.py")
    }
    wanted |= {
        path.relative_to(helpers.CHECKOUT).as_posix()
        for path in (helpers.CHECKOUT / "backdoorlab").rglob("*.py")
    }
    wanted |= {
        f"backdoorlab/resource/page/{path.name}"
        for path in (helpers.CHECKOUT / "resource" / "page").iterdir()
    }
    assert wanted <= inside, f"missing: {sorted(wanted - inside)}"
    assert not [
        name for name in inside if name.startswith(("tests/", "attack/", "defense/", "record/"))
    ]

    pip("install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=tmp_path)
    shutil.rmtree(source)
    here.mkdir()
    env = {
        name: value
        for name, value in helpers.child_environment(PYTHONPATH=site).items()
        if name != "BACKDOORLAB_RECORDS"
    }
    run = partial(helpers.command, cwd=here, env=env)
    where = run("-c", "import backdoorlab; print(backdoorlab.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(site), where.stdout + where.stderr

    done = run("-m", "backdoorlab", "attack", "badnet", "--save_folder_name", "x", *helpers.TINY)
    assert done.returncode == 0, done.stderr
    assert (here / "record" / "x" / "record.json").is_file(), (
        "without a checkout, records go to ./record"
    )
    assert "digits.yaml" in done.stderr, "the data set's settings travel with the package"
    done = run("-m", "backdoorlab", "defense", "ft", "--result_file", "x", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    done = run("-m", "backdoorlab", "table", "--format", "csv")
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines()[1:]]
    assert [row[2] for row in rows if row[2] in ("none", "dau", "ft")] == ["none", "dau", "ft"]
    assert next(row for row in rows if row[2] == "ft")[4], "fine-tuning has numbers"
    assert not next(row for row in rows if row[2] == "dau")[4], "DAU was not run"
