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


needs_building = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools")),
    reason="building a wheel offline needs pip and setuptools",
)


def copy_parts(source: Path) -> None:
    """Copy what is built, so that building leaves nothing in the checkout."""
    source.mkdir()
    for part in PARTS:
        if (helpers.CHECKOUT / part).is_dir():
            shutil.copytree(
                helpers.CHECKOUT / part, source / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(helpers.CHECKOUT / part, source / part)


@needs_building
def test_beside_a_checkout_of_its_name_the_package_is_found(tmp_path: Path) -> None:
    """Python takes the folder that holds the checkout for a package, unless the installed one comes
    in the same way."""
    checkout, site = tmp_path / "backdoorlab", tmp_path / "site"
    copy_parts(checkout)
    site.mkdir()
    build = "from setuptools import build_meta; print(build_meta.build_editable({!r}))"
    done = helpers.command("-c", build.format(str(site)), cwd=checkout)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(site.glob("*.whl"))) as archive:
        archive.extractall(site)

    # Without the site-packages of this test, in which the checkout itself may be installed.
    def found(added: str) -> str:
        start = "import site, sys; from importlib.util import find_spec; sys.path[0:0] = ['.']"
        code = f"{start}; {added}; print(find_spec('backdoorlab').origin)"
        done = helpers.command("-I", "-S", "-c", code, cwd=tmp_path)
        return done.stdout.strip() or done.stderr

    assert found("pass") == "None", "the control: the folder is taken for a package"
    assert found(f"site.addsitedir({str(site)!r})") == str(checkout / "backdoorlab" / "__init__.py")


@needs_building
def test_a_wheel_holds_everything_and_runs_without_a_checkout(tmp_path: Path) -> None:
    source, dist, site, here = (tmp_path / name for name in ("source", "dist", "site", "here"))
    copy_parts(source)
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
