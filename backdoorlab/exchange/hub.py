"""Records on the Hugging Face hub: pushed as one commit, pulled from one commit, verified before
use.

Only .safetensors, .json, .csv and .png files that a manifest lists are uploaded or downloaded.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..record import Record, check_name, read_folder, read_result, result_folders
from ..storage import folders, locks, reading, writing
from ..storage.schema import WORD
from ..storage.staging import refuse_existing, refuse_foreign
from .verify import verify, verify_record

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
RESULT = re.compile(rf"defense/{WORD.pattern}/{WORD.pattern}/result\.json")
LEFT_ALONE = (".gitattributes", "README.md")
"""Files of a repository that its owner writes: `push` neither counts nor deletes them."""

CARD = """---
tags: [backdoorlab, backdoor, security-research]
---
**This model was given a backdoor on purpose, for research on defenses. Do not deploy it.**

A record of backdoorlab: attack `{attack}` on `{dataset}`, `{architecture}`. Weights, poison and
results are safetensors and JSON; record.json holds the SHA-256 of every file.

    python -m backdoorlab pull {repo}@COMMIT --save_folder_name NAME
"""


@dataclass(frozen=True)
class Pulled:
    """A record that was pulled."""

    record: Record
    commit: str
    results: int
    """Number of results of defenses in it."""


def connect() -> Any:
    """Return huggingface_hub's client, which uses the user's own token."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError(
            "push and pull need huggingface_hub: pip install 'backdoorlab[hub]'"
        ) from error
    return HfApi()


def push(
    name: str, root: Path, repo: str, api: Any, *, private: bool = False, overwrite: bool = False
) -> str:
    """Verify a record with its results, and upload it as one commit.

    Args:
        name: the record.
        root: folder of records.
        repo: "owner/name", made where it does not exist.
        api: the client by `connect`.
        private: whether a new repository is private.
        overwrite: replace what is in the repository.

    Returns:
        The commit.
    """
    _check_repository(repo)
    # What does not verify here would be refused by everybody who pulls it.
    found = verify(name, root)
    if found.wrong:
        raise UserError(found.wrong[0])
    record = Record.load(name, root)
    wanted = _record_files(record)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with _short_complaints(repo):
        api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        before = api.repo_info(repo, repo_type="model")

        # Whatever else is there is deleted, so that the commit is the record and nothing more.
        there = {entry.rfilename for entry in before.siblings or ()}
        others = sorted(there - set(LEFT_ALONE))
        if others and not overwrite:
            raise UserError(
                f"{repo} is not empty"
                f" ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}): choose another"
                " --repo, or --overwrite True"
            )

        operations: list[Any] = [
            CommitOperationAdd(path, str(record.folder / path)) for path in wanted
        ]
        operations += [CommitOperationDelete(path) for path in others if path not in wanted]
        if "README.md" not in there:
            operations.append(CommitOperationAdd("README.md", _card(record, repo).encode()))

        # On the parent that was looked at: a commit by somebody else meanwhile is an error.
        done = api.create_commit(
            repo,
            operations,
            commit_message=f"backdoorlab record {name}",
            repo_type="model",
            parent_commit=before.sha,
        )
    return str(done.oid)


def pull(source: str, name: str, root: Path, api: Any, *, overwrite: bool = False) -> Pulled:
    """Download a record, verify it, and only then give it its name.

    Args:
        source: owner/name[@revision]; a revision is resolved to its commit first.
        name: name of the new record.
        root: folder of records.
        api: the client by `connect`.
        overwrite: replace a record of this name.

    Raises:
        UserError: it cannot be downloaded, or does not verify; nothing of it is kept.
    """
    repo, _, revision = source.partition("@")
    _check_repository(repo)
    check_name(name)

    target = root / name
    # Before the download, and again under the lock.
    refuse_existing(target, "record.json", overwrite)
    stage = root / f"{name}.partial"
    with locks.locked(stage):
        refuse_existing(target, "record.json", overwrite)
        if (stage / "run.json").exists() and not (stage / "pull.json").exists():
            raise UserError(
                f"{stage} holds an unfinished run: finish it, or choose another --save_folder_name"
            )
        refuse_foreign(stage, "pull.json", "--save_folder_name")

        try:
            writing.write_json(stage / "pull.json", {"source": source})
            final = stage / "final"
            folders.remove(final)
            final.mkdir()
            with _short_complaints(repo):
                commit, sizes = _resolve(repo, revision, api)
                for path in _download(repo, commit, sizes, final, stage / "download", api):
                    if path not in sizes:
                        raise UserError(
                            f"{repo}@{commit}: {path} is in its manifest, but not in the repository"
                        )

            record = read_folder(final)
            found = verify_record(record)
            if found.wrong:
                raise UserError(found.wrong[0])
            folders.put(final, target)
        except UserError as error:
            # The stage is gone when the message is read: it names the source in its place.
            raise UserError(
                str(error)
                .replace(f"{stage / 'final'}/", f"{source}: ")
                .replace(str(stage / "final"), source)
            ) from error
        finally:
            folders.remove(stage)
    return Pulled(Record.load(name, root), commit, found.results)


def _resolve(repo: str, revision: str, api: Any) -> tuple[str, dict[str, int]]:
    """Resolve a revision to its commit.

    Args:
        repo: "owner/name".
        revision: a branch, tag or commit; "" is the newest commit.
        api: the client.

    Returns:
        (commit, file name -> size in bytes).
    """
    info = api.repo_info(repo, repo_type="model", revision=revision or None, files_metadata=True)
    commit = str(info.sha)
    # The client's answer is not trusted: a commit that was asked for must be the one that comes.
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision) and commit != revision):
        raise UserError(f"{repo}: asked for commit {revision or 'of main'}, got {commit[:40]!r}")
    return commit, {entry.rfilename: int(entry.size or 0) for entry in info.siblings or ()}


def _download(
    repo: str, commit: str, sizes: Mapping[str, int], final: Path, cache: Path, api: Any
) -> Iterator[str]:
    """Download the manifests, and the files that they list, each only with its listed size.

    Args:
        repo: "owner/name".
        commit: the commit to download.
        sizes: file name in the commit -> size in bytes.
        final: folder to fill.
        cache: folder that the client may use meanwhile.
        api: the client.

    Yields:
        Each listed path, before its size is looked up: the caller refuses one that `sizes` lacks.
    """

    def fetch(path: str) -> None:
        got = api.hf_hub_download(
            repo, path, repo_type="model", revision=commit, local_dir=str(cache)
        )
        (final / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(got, final / path)

    def fetch_manifest(path: str) -> Mapping[str, Any]:
        if sizes.get(path, 0) > reading.LARGEST_JSON:
            raise UserError(
                f"{repo}@{commit}: {path} has {sizes[path]} bytes, which is too many for a"
                " manifest. Do not use it"
            )
        if path not in sizes:
            raise UserError(f"{repo}@{commit} holds no {path}, so it is no record of backdoorlab")
        fetch(path)
        # Its own checksum is verified here, its content when the record is read.
        listed = reading.read_sealed(final / path).get("files")
        return listed if isinstance(listed, dict) else {}

    def fetch_listed(folder: str, manifest: Mapping[str, Any]) -> Iterator[str]:
        for name, entry in manifest.items():
            reading.check_entry(final / folder, name, entry)

        _refuse_too_large(manifest, final, f"{repo}@{commit}")

        # A size in the repository that is not the manifest's is refused before it is downloaded.
        for name, entry in manifest.items():
            path = f"{folder}{name}"
            yield path
            if sizes[path] != entry["size"]:
                raise UserError(
                    f"{repo}@{commit}: {path} has {sizes[path]} bytes, but its manifest says"
                    f" {entry['size']}. Do not use it"
                )
            fetch(path)

    yield from fetch_listed("", fetch_manifest("record.json"))
    for path in sorted(
        path for path in sizes if RESULT.fullmatch(path) and ".partial/" not in path
    ):
        yield from fetch_listed(path.removesuffix("result.json"), fetch_manifest(path))


def _refuse_too_large(manifest: Mapping[str, Any], folder: Path, source: str) -> None:
    """Raise a UserError if the files of a manifest do not fit on the disk of a folder."""
    total = sum(entry["size"] for entry in manifest.values())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise UserError(
            f"{source} needs {total >> 20} MiB, but there are {free >> 20} MiB free here"
        )


def _record_files(record: Record) -> list[str]:
    """List a record's files and its results' files, relative to its folder."""
    found = ["record.json", *record.info["files"]]
    for folder in result_folders(record.folder):
        inside = folder.relative_to(record.folder).as_posix()
        # `_download` takes results by this pattern only.
        if not RESULT.fullmatch(f"{inside}/result.json"):
            raise UserError(
                f"{folder}: a result with other characters in its name than letters, digits, _ . +"
                " - cannot be pulled again: rename it"
            )
        found += [f"{inside}/{name}" for name in ("result.json", *read_result(folder)["files"])]
    return found


def _card(record: Record, repo: str) -> str:
    """Return the README.md of a new repository."""
    info = record.info
    return CARD.format(
        attack=info["attack"],
        dataset=info["dataset"]["name"],
        architecture=info["architecture"]["name"],
        repo=repo,
    )


def _check_repository(repo: str) -> None:
    if not REPOSITORY.fullmatch(repo):
        raise UserError(f"a repository is owner/name, got {repo!r}")


@contextmanager
def _short_complaints(repo: str) -> Iterator[None]:
    """Turn the client's errors, which are many lines long, into a UserError of one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The bases of HfHubHTTPError are what the transport library raises.
    complaints: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError)
    try:
        yield
    except complaints as error:
        # With an errno it is the disk's error and not the hub's.
        if isinstance(error, OSError) and error.errno is not None:
            raise

        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"{repo} on the hub: {lines[0][:300]} ({type(error).__name__}). Check the name, `hf"
            " auth login`, and the network"
        ) from error
