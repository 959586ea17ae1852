"""Contents of record.json and result.json, and the tensors that belong to them.

Whatever is used later is checked here, once, when it is read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..ranking import RANKS
from .reading import Check, Shapes, check_entry, damaged, is_count

SCHEMA = 2
"""Version of record.json and result.json, raised when an older reader could not use them."""
PAYLOAD = ("model.safetensors", "train_poison.safetensors", "test_poison.safetensors")
SCORES = ("clean_accuracy", "asr", "robust_accuracy")
LATER_SCORES = ("balanced_accuracy", "largest_share")
"""Scores that files of older versions do not have."""
ASSUMABLE = {
    "model": "poisoned model",
    "train": "poisoned training set",
    "trusted": "trusted images",
    "seeds": "clean seeds",
    "split": "split",
}
"""What a defense may assume, with the table's words for it."""
AUDIT_FORMAT = 1
"""Version of an audit's file."""
DETECTOR = "detector"
"""The `kind` of a result that has a split and no model."""
UNKNOWN = "unknown"
"""Precision of a model that was trained elsewhere, or of a run that did not store it."""
LARGEST_SIDE = 8192
"""Most pixels along a side of an image, and most channels: more is treated as damage."""
WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+\-]*")
"""Names of methods and models. They are printed and used in paths, so they contain nothing that a
terminal or a path treats specially."""


def check_record(path: Path, info: Mapping[str, Any]) -> None:
    """Raise a UserError unless a record.json has all required fields, each of a sound type and
    value."""
    _check_schema(path, info)
    required = (
        "attack",
        "config",
        "dataset",
        "architecture",
        "num_classes",
        "seed",
        "scores",
        "files",
    )
    _refuse_missing(path, info, required)

    # Each of these must be an object before anything in it is looked at.
    dataset, architecture, config, scores = (
        _object(path, info, key) for key in ("dataset", "architecture", "config", "scores")
    )
    _refuse_missing(
        path, dataset, ("name", "fingerprint", "image_shape", "image_size", "grey", "train_size")
    )
    _refuse_missing(path, architecture, ("name", "width", "mean", "std"))

    # Optional fields: an imported record does not know them all.
    sound = {
        "attack": _is_word(info["attack"]),
        "seed": is_count(info["seed"]),
        "seconds": _is_number(info.get("seconds")),
        "poisoned": info.get("poisoned") is None or is_count(info["poisoned"]),
        "target": info.get("target") is None or is_count(info["target"]),
        "known_poison": isinstance(info.get("known_poison", True), bool),
        "has_train": isinstance(info.get("has_train", True), bool),
        "source": (
            info.get("source") is None
            or (isinstance(info["source"], dict) and isinstance(info["source"].get("sha256"), str))
        ),
        "config crop_padding": (
            is_count(config.get("crop_padding")) and config["crop_padding"] <= LARGEST_SIDE
        ),
        "config flip": isinstance(config.get("flip"), bool),
        "config poison_rate": _is_number(config.get("poison_rate")),
        "scores triggered_predictions": _are_counts(scores.get("triggered_predictions")),
    }
    _refuse_unsound(path, sound | _dataset_soundness(dataset) | _common_soundness(info))

    # A network is built by these, so their values are bounded before memory is taken.
    _check_network(path, architecture, dataset["image_shape"], info["num_classes"])
    _check_scores(path, scores)
    # Training-controlled attacks may have the scores of an ordinary model besides.
    if info.get("plain_scores") is not None:
        plain = _object(path, info, "plain_scores")
        _check_scores(path, plain)
        _refuse_unsound(path, {"plain_scores seconds": _is_number(plain.get("seconds"))})
    _check_manifest(path, info, PAYLOAD)


def _dataset_soundness(dataset: Mapping[str, Any]) -> dict[str, bool]:
    """Return field -> whether it is sound, for a record's data set."""
    side = dataset["image_size"]
    return {
        "dataset name": is_plain(dataset["name"]),
        "dataset fingerprint": bool(re.fullmatch("[0-9a-f]{64}", str(dataset["fingerprint"]))),
        "dataset image_size": side is None or (is_count(side) and 1 <= side <= LARGEST_SIDE),
        "dataset grey": dataset["grey"] in (None, True, False),
        "dataset train_size": is_count(dataset["train_size"]),
        "dataset class_names": _are_texts(dataset.get("class_names")),
    }


def check_export(path: Path, meta: Mapping[str, Any]) -> None:
    """Raise a UserError unless the metadata of exported weights describe a network."""
    _refuse_missing(path, meta, ("architecture", "image_shape", "num_classes"))
    architecture = _object(path, meta, "architecture")
    _refuse_missing(path, architecture, ("name", "width", "mean", "std"))
    _check_network(path, architecture, meta["image_shape"], meta["num_classes"])


def _check_network(
    path: Path, architecture: Mapping[str, Any], shape: Any, num_classes: Any
) -> None:
    """Raise a UserError unless a network could be built: `shape` is its images' [C, H, W]."""
    # The shape comes first: the number of means and deviations is compared with its channels.
    sound = {
        "num_classes": is_count(num_classes) and num_classes >= 1,
        "image_shape": (
            isinstance(shape, list)
            and len(shape) == 3
            and all(is_count(n) and 1 <= n <= LARGEST_SIDE for n in shape)
        ),
        "architecture name": _is_word(architecture["name"]),
        "architecture width": (
            architecture["width"] is None
            or (is_count(architecture["width"]) and architecture["width"] >= 1)
        ),
        "architecture stem": architecture.get("stem", "small") in ("small", "stock"),
        "architecture mean": _are_numbers(architecture["mean"]),
        "architecture std": _are_numbers(architecture["std"]),
    }
    _refuse_unsound(path, sound)

    if len(architecture["mean"]) != shape[0] or len(architecture["std"]) != shape[0]:
        raise damaged(path, f"mean and std need {shape[0]} numbers each")


def check_result(path: Path, result: Mapping[str, Any]) -> None:
    """Raise a UserError unless a result.json has all required fields, each of a sound type and
    value."""
    _check_schema(path, result)
    _refuse_missing(
        path, result, ("assumes", "after", "der", "split", "seconds", "collapsed", "files")
    )
    # A detector leaves no model, so nothing was scored.
    if result.get("kind") != DETECTOR:
        _check_scores(path, _object(path, result, "after"))
        if "before" in result:
            _check_scores(path, _object(path, result, "before"))

    # A method that reports no split has None there; one of several stages has more than one.
    split = result["split"]
    sound = {
        "assumes": (
            isinstance(result["assumes"], list)
            and set(map(str, result["assumes"])) <= set(ASSUMABLE)
        ),
        "der": _is_number(result["der"]),
        "config": isinstance(result.get("config", {}), dict),
        "seconds": _is_present_number(result["seconds"]),
        "collapsed": result["collapsed"] in (None, True, False),
        "split": split is None or (_is_quality(split) and is_count(split.get("flagged"))),
        "splits": (
            result.get("splits") is None
            or (
                isinstance(result["splits"], dict)
                and all(map(_is_quality, result["splits"].values()))
            )
        ),
        "seed": result.get("seed") is None or is_count(result["seed"]),
        "triggered_predictions": _are_counts(result.get("triggered_predictions")),
        "kind": result.get("kind", "defense") in ("defense", DETECTOR, "unlearner"),
        "given_split": _is_given_split(result.get("given_split")),
    }
    _refuse_unsound(path, sound | _common_soundness(result))
    _check_manifest(path, result, ())


def check_audit(path: Path, content: Mapping[str, Any]) -> None:
    """Raise a UserError unless an audit's file has all required fields, each of a sound type and
    value."""
    _refuse_missing(
        path, content, ("format", "kind", "model", "settings", "tests", "summary", "why")
    )
    if content["format"] != AUDIT_FORMAT:
        raise UserError(
            f"{path}: an audit of format {str(content['format'])[:20]}, but this version reads"
            f" format {AUDIT_FORMAT}: audit the record again with --overwrite True"
        )
    summary = _object(path, content, "summary")
    # Of the tests only the summary is ever shown.
    _object(path, content, "tests")
    _object(path, content, "settings")
    names = ("depth", "bn_asr", "excess", "t50", "similarity")
    p_asr = summary.get("p_asr", {})
    sound = {
        "kind": _is_word(content["kind"]),
        "model": bool(re.fullmatch("[0-9a-f]{64}", str(content["model"]))),
        "why": content["why"] is not None and _are_texts(content["why"]),
        "summary p_asr": isinstance(p_asr, dict) and all(map(_is_number, p_asr.values())),
        **{f"summary {name}": _is_number(summary.get(name)) for name in names},
    }
    _refuse_unsound(path, sound)


def poison_shapes(info: Mapping[str, Any], most: int | None) -> Check:
    """Return the check of a file of poisoned images.

    Its columns must have one length N, and its images the shape of the record's data.

    Args:
        info: the record's record.json.
        most: largest N; None for no limit.
    """
    image_shape = tuple(info["dataset"]["image_shape"])

    def check(shapes: Shapes) -> None:
        # The index says how many images there are; the other columns must agree.
        rows = shapes["index"][1][0] if "index" in shapes and shapes["index"][1] else 0
        wanted = {
            "index": (torch.int64, (rows,)),
            "images": (torch.uint8, (rows, *image_shape)),
            "labels": (torch.int64, (rows,)),
            "original_labels": (torch.int64, (rows,)),
            "kind": (torch.uint8, (rows,)),
        }
        refuse_difference(shapes, wanted)

        if most is not None and rows > most:
            raise ValueError(f"{rows} poisoned images in a training set of {most}")

    return check


def refuse_difference(found: Shapes, wanted: Shapes) -> None:
    """Raise a ValueError that names the first tensor that is missing, unknown, or of another dtype
    or shape."""
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{name[:100]}: expected {_shape(wanted.get(name))}, found"
                f" {_shape(found.get(name))}"
            )


def _shape(entry: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    """Return a dtype and a shape as text, such as "uint8 (50, 3, 32, 32)"."""
    return "nothing" if entry is None else f"{str(entry[0]).removeprefix('torch.')} {entry[1]}"


def _check_schema(path: Path, info: Mapping[str, Any]) -> None:
    _refuse_missing(path, info, ("schema",))
    if info["schema"] != SCHEMA:
        shown = info["schema"] if is_count(info["schema"]) else "unreadable"
        raise UserError(
            f"{path}: schema {shown}, but this version reads schema {SCHEMA}: use the version that"
            " wrote it"
        )


def _refuse_missing(path: Path, info: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    # All of them in one message.
    missing = [key for key in keys if key not in info]
    if missing:
        raise damaged(path, f"no {', '.join(missing)}")


def _refuse_unsound(path: Path, sound: Mapping[str, bool]) -> None:
    wrong = [name for name, good in sound.items() if not good]
    if wrong:
        raise damaged(path, f"nothing usable on {', '.join(wrong)}")


def _object(path: Path, info: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(info[key], dict):
        raise damaged(path, f"nothing usable on {key}")
    return info[key]


def _check_scores(path: Path, scores: Mapping[str, Any]) -> None:
    _refuse_missing(path, scores, SCORES)
    _refuse_unsound(
        path,
        {name: _is_number(scores.get(name)) for name in (*SCORES, *LATER_SCORES)}
        | {SCORES[0]: _is_present_number(scores[SCORES[0]])},
    )


def _check_manifest(path: Path, info: Mapping[str, Any], required: tuple[str, ...]) -> None:
    manifest = _object(path, info, "files")
    _refuse_missing(path, manifest, required)
    # Names first: a path out of the folder must never be opened.
    for name, entry in manifest.items():
        check_entry(path.parent, name, entry)


def _common_soundness(info: Mapping[str, Any]) -> dict[str, bool]:
    """Return field -> whether it is sound or absent, for the optional fields that records and
    results share."""
    # Counts of images, by which methods are compared; texts, which are printed.
    passes = info.get("image_passes")
    return {
        "image_passes": (
            passes is None
            or (
                isinstance(passes, dict)
                and all(is_count(passes.get(key)) for key in ("forward", "backward"))
            )
        ),
        "evaluation_seconds": _is_number(info.get("evaluation_seconds")),
        "peak_memory_bytes": (
            info.get("peak_memory_bytes") is None or is_count(info["peak_memory_bytes"])
        ),
        "device": info.get("device") is None or isinstance(info["device"], str),
        "notes": _are_texts(info.get("notes")),
        "code": info.get("code") is None or isinstance(info["code"], str),
        "precision": info.get("precision") is None or _is_word(info["precision"]),
        "precision_why": (
            info.get("precision_why") is None or isinstance(info["precision_why"], str)
        ),
    }


def _are_texts(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(text, str) for text in value)
    )


def _are_counts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(is_count, value)))


def _is_quality(value: Any) -> bool:
    """Return whether a value is the quality of a detection: tpr, fpr and precision."""
    return (
        isinstance(value, dict)
        and all(key in value and _is_number(value[key]) for key in ("tpr", "fpr", "precision"))
        and all(_is_number(value.get(key)) for key in RANKS)
    )


def _is_given_split(value: Any) -> bool:
    """Return whether a value says whose split an unlearner used, or is absent."""
    return value is None or (
        isinstance(value, dict)
        and is_plain(str(value.get("name")).replace("/", "-"))
        and isinstance(value.get("oracle"), bool)
        and bool(re.fullmatch("[0-9a-f]{64}", str(value.get("sha256"))))
    )


def _is_number(value: Any) -> bool:
    """Return whether a value is a number, or None for a score that does not exist."""
    return value is None or (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15
    )


def _is_present_number(value: Any) -> bool:
    return value is not None and _is_number(value)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_present_number, values))


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 200 and bool(WORD.fullmatch(value))


def is_plain(value: Any) -> bool:
    """Return whether a value is a name of 1 to 200 printable characters, and no path."""
    return (
        isinstance(value, str)
        and 0 < len(value) <= 200
        and value.isprintable()
        and not any(c in value for c in "/\\")
        and value not in (".", "..")
    )
