"""Push and pull, with a folder in place of the hub. The live hub is not tested."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import pytest
import torch

from backdoorlab.__main__ import main
from backdoorlab.errors import UserError
from backdoorlab.exchange import hub
from backdoorlab.exchange.verify import verify
from backdoorlab.record import Record
from backdoorlab.storage import folders, reading, writing

pytest.importorskip("huggingface_hub")


class Folder:
    """Fake of `HfApi`: repositories are folders named by commit. Counts what is downloaded."""

    def __init__(self, root: Path) -> None:
        self.root, self.downloads = root, [""][:0]

    def create_repo(self, repo: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert repo_type == "model" and exist_ok
        if not (self.root / repo).exists():
            (self.root / repo / ("0" * 40)).mkdir(parents=True)
            (self.root / repo / "main").write_text("0" * 40)

    def repo_info(
        self,
        repo: str,
        *,
        repo_type: str,
        revision: str | None = None,
        files_metadata: bool = False,
    ) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        if not (self.root / repo).exists():
            response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError(
                f"404 Client Error.\n\nRepository Not Found for {repo}", response=response
            )
        commit = (
            revision if revision not in (None, "main") else (self.root / repo / "main").read_text()
        )
        folder = self.root / repo / str(commit)
        found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        size = lambda path: path.stat().st_size if files_metadata else None  # noqa: E731
        return SimpleNamespace(
            sha=commit,
            siblings=[
                SimpleNamespace(rfilename=p.relative_to(folder).as_posix(), size=size(p))
                for p in found
            ],
        )

    def create_commit(
        self, repo: str, operations: Any, *, commit_message: str, repo_type: str, parent_commit: str
    ) -> Any:
        assert parent_commit == (self.root / repo / "main").read_text()
        commit = hashlib.sha1((parent_commit + commit_message).encode()).hexdigest()
        folder = self.root / repo / commit
        shutil.copytree(self.root / repo / parent_commit, folder)
        for operation in operations:
            path = folder / operation.path_in_repo
            if hasattr(operation, "path_or_fileobj"):
                path.parent.mkdir(parents=True, exist_ok=True)
                with operation.as_file() as stream:
                    path.write_bytes(stream.read())
            else:
                path.unlink()
        (self.root / repo / "main").write_text(commit)
        return SimpleNamespace(oid=commit)

    def hf_hub_download(
        self, repo: str, path: str, *, repo_type: str, revision: str, local_dir: str
    ) -> str:
        assert len(revision) == 40, "a commit, never a branch that may move meanwhile"
        self.downloads.append(path)
        target = Path(local_dir) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.root / repo / revision / path, target)
        return str(target)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    found = Folder(tmp_path / "hub")
    monkeypatch.setattr("backdoorlab.exchange.hub.connect", lambda: found)
    return found


@pytest.fixture
def pushed(api: Folder, small: Record, tmp_path: Path) -> Path:
    """Push the small record; returns the folder of its commit."""
    root = tmp_path / "record"
    shutil.copytree(small.folder, root / "small")
    (root / "small" / "notes.pkl").write_bytes(b"mine")
    (root / "small" / "defense" / "dau" / "begun.partial").mkdir()
    (root / "small" / "defense" / "dau" / "begun.partial" / "result.json").write_text("{}")
    commit = hub.push("small", root, "me/small", api)
    return api.root / "me" / "small" / commit


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): reading.sha256(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_record_goes_there_and_back_equal(
    pushed: Path, api: Folder, small: Record, tmp_path: Path
) -> None:
    pulled = hub.pull(f"me/small@{pushed.name}", "back", tmp_path / "record", api)
    assert pulled.commit == pushed.name and pulled.results == 1
    assert digests(pulled.record.folder) == digests(small.folder), (
        "no partial run, no file that no manifest lists"
    )
    assert not verify("back", tmp_path / "record").wrong
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            pulled.record.model().state_dict().values(),
            small.model().state_dict().values(),
            strict=True,
        )
    )
    assert sorted(path.name for path in (tmp_path / "record").iterdir()) == ["back", "small"], (
        "nothing is left of the download"
    )
    there = {path.relative_to(pushed).as_posix() for path in pushed.rglob("*") if path.is_file()}
    assert (
        there == {*digests(small.folder), "README.md"}
        and "backdoor on purpose" in (pushed / "README.md").read_text()
    )


def test_both_commands(
    api: Folder, small: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small.folder, tmp_path / "record" / "small")
    assert main(["push", "small", "--repo", "me/small"]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith("pushed: python -m backdoorlab pull me/small@") and line.endswith(
        " --save_folder_name small"
    )
    source = line.split()[5]
    assert main(["pull", "me/small", "--save_folder_name", "back"]) == 0
    assert f"is commit {source.split('@')[1]}, with 1 results" in capsys.readouterr().out
    assert main(["pull", source, "--save_folder_name", "back"]) == 2
    assert "exists and is finished" in capsys.readouterr().err
    assert main(["pull", source, "--save_folder_name", "back", "--overwrite", "True"]) == 0
    assert main(["push", "small", "--repo", "me/small"]) == 2
    assert "me/small is not empty" in capsys.readouterr().err


def test_a_second_push_replaces_the_first_as_a_whole(
    pushed: Path, api: Folder, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "record" / "small" / "defense")
    (pushed / "README.md").write_text("my own words")
    with pytest.raises(UserError, match="is not empty"):
        hub.push("small", tmp_path / "record", "me/small", api)
    commit = hub.push("small", tmp_path / "record", "me/small", api, overwrite=True)
    there = {
        path.relative_to(pushed.parent / commit).as_posix()
        for path in (pushed.parent / commit).rglob("*")
        if path.is_file()
    }
    assert (
        not [path for path in there if path.startswith("defense")]
        and (pushed.parent / commit / "README.md").read_text() == "my own words"
    )
    assert hub.pull(f"me/small@{pushed.name}", "old", tmp_path / "record", api).results == 1, (
        "the commit before is as it was"
    )
    assert hub.pull("me/small", "new", tmp_path / "record", api).results == 0


def test_a_damaged_record_is_not_pushed(api: Folder, small: Record, tmp_path: Path) -> None:
    folder = helpers.copy(small, tmp_path).folder
    (folder / "preview.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"preview\.png: damaged"):
        hub.push("small", tmp_path, "me/small", api)
    assert not api.root.exists()


def _flip(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def _larger(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes() + b"x")


def _list(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"x")
    listed = reading.read_json(folder / "record.json")["files"]
    helpers.edit_json(
        folder / "record.json",
        files={**listed, name: {"sha256": reading.sha256(folder / name), "size": 1}},
    )


def _no_record(folder: Path) -> None:
    (folder / "record.json").unlink()


def _edited(folder: Path) -> None:
    info = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**info, "seed": 7}))


def _huge(folder: Path) -> None:
    helpers.edit_json(
        folder / "record.json",
        files={
            **reading.read_json(folder / "record.json")["files"],
            "model.safetensors": {"sha256": "0" * 64, "size": 1 << 60},
        },
    )


def _result(folder: Path) -> None:
    (folder / "defense" / "dau" / "seed0" / "split.safetensors").write_bytes(
        b"x" * (folder / "defense" / "dau" / "seed0" / "split.safetensors").stat().st_size
    )


FORGED: dict[str, tuple[Any, str]] = {
    "a flipped bit": (_flip, "model.safetensors"),
    "another size": (_larger, "model.safetensors has .* bytes, but its manifest says"),
    "a pickle in the manifest": (
        lambda f: _list(f, "weights.pkl"),
        "lists 'weights.pkl', but a record holds",
    ),
    "python in the manifest": (lambda f: _list(f, "hook.py"), "lists 'hook.py'"),
    "a file outside": (lambda f: _list(f, "../outside.json"), "lists '../outside.json'"),
    "a file below": (lambda f: _list(f, "a/b.json"), "lists 'a/b.json'"),
    "no record": (_no_record, "holds no record.json, so it is no record"),
    "an edited record.json": (_edited, "record.json: damaged file .its content does not match"),
    "a size beyond the disk": (_huge, "MiB, but there are .* MiB free"),
    "a damaged result": (_result, "split.safetensors"),
}


@pytest.mark.parametrize("case", FORGED)
def test_what_does_not_verify_is_not_kept(
    case: str, pushed: Path, api: Folder, tmp_path: Path
) -> None:
    forge, message = FORGED[case]
    forge(pushed)
    with pytest.raises(UserError, match=message) as caught:
        hub.pull(f"me/small@{pushed.name}", "back", tmp_path / "record", api)
    assert "\n" not in str(caught.value) and ".partial" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "record").iterdir()) == ["small"]
    assert not [path for path in api.downloads if path.endswith((".pkl", ".py"))], (
        "not even downloaded"
    )


def test_a_hub_that_answers_with_another_commit_is_refused(
    pushed: Path, api: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = api.repo_info
    monkeypatch.setattr(
        api, "repo_info", lambda repo, **options: real(repo, **{**options, "revision": "main"})
    )
    with pytest.raises(UserError, match="asked for commit"):
        hub.pull(f"me/small@{'a' * 40}", "back", tmp_path / "record", api)
    assert not api.downloads


def test_an_unfinished_run_of_the_name_is_left_alone(
    pushed: Path, api: Folder, tmp_path: Path
) -> None:
    stage = tmp_path / "record" / "back.partial"
    for name, said in (
        ("run.json", "holds an unfinished run"),
        ("notes.txt", r"in the way and not ours \(no pull.json in it\): move it"),
    ):
        stage.mkdir()
        writing.write_json(stage / name, {})
        with pytest.raises(UserError, match=said):
            hub.pull("me/small", "back", tmp_path / "record", api)
        assert (stage / name).exists()
        folders.remove(stage)
    stage.mkdir()
    writing.write_json(stage / "pull.json", {})
    assert hub.pull("me/small", "back", tmp_path / "record", api).results == 1, (
        "the control: what a killed pull left is begun anew"
    )


def test_a_result_that_could_not_be_pulled_is_not_pushed(
    pushed: Path, api: Folder, tmp_path: Path
) -> None:
    results = tmp_path / "record" / "small" / "defense" / "dau"
    (results / "seed0").rename(results / "lr=0.1")
    with pytest.raises(
        UserError, match=r"lr=0\.1: a result with other characters in its name .*: rename it"
    ):
        hub.push("small", tmp_path / "record", "me/small", api)
    (results / "lr=0.1").rename(results / "lr-0.1")
    assert (
        hub.pull(
            f"me/other@{hub.push('small', tmp_path / 'record', 'me/other', api)}",
            "back",
            tmp_path / "record",
            api,
        ).results
        == 1
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["push", "small"], "push NAME --repo owner/name: one of the two is missing"),
        (["push", "small", "--repo", "small"], "a repository is owner/name, got 'small'"),
        (["push", "other", "--repo", "me/other"], "no record 'other'"),
        (["pull"], "one of the two is missing"),
        (["pull", "me/small"], "one of the two is missing"),
        (
            ["pull", "https://huggingface.co/me/small", "--save_folder_name", "x"],
            "a repository is owner/name",
        ),
        (["pull", "me/none", "--save_folder_name", "x"], "me/none on the hub: 404 Client Error."),
        (["pull", "me/small", "--save_folder_name", "../x"], "a record name is one folder name"),
        (["pull", "me/small", "--save_folder_name", "small"], "exists and is finished"),
    ],
)
def test_a_mistake_is_one_line(
    argv: list[str], message: str, pushed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_without_huggingface_hub_it_is_one_line(
    small: Record,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    helpers.copy(small, tmp_path / "record")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["push", "small", "--repo", "me/small"]) == 2
    assert (
        capsys.readouterr().err
        == "error: push and pull need huggingface_hub: pip install 'backdoorlab[hub]'\n"
    )


def test_the_calls_are_those_of_the_real_client() -> None:
    """The fake accepts the arguments that the real client accepts."""
    import inspect

    from huggingface_hub import HfApi

    for name in ("create_repo", "repo_info", "create_commit", "hf_hub_download"):
        fake, real = (
            list(inspect.signature(getattr(owner, name)).parameters.values())[1:]
            for owner in (Folder, HfApi)
        )
        by_name = {parameter.name: parameter for parameter in real}
        assert all(p.name in by_name for p in fake if p.kind is inspect.Parameter.KEYWORD_ONLY), (
            name
        )
        positional = [p for p in fake if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        assert len(positional) <= sum(
            p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in real
        ), name
