"""The command `export`: a record for BackdoorBench's scripts, or weights for any PyTorch code."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tyro.conf import Positional

from .. import models
from ..errors import UserError
from ..metrics import SUMMARY
from ..poison import POISON
from ..record import Record, check_name, read_result, record_root
from ..settings.parse import published
from ..storage.staging import refuse_existing, staged
from . import backdoorbench, class_order, weights


@dataclass(frozen=True)
class Export:
    """Export a record for BackdoorBench's scripts, or a model for any PyTorch code."""

    name: Positional[str | None] = None
    """The record."""
    path: Positional[str | None] = None
    """Folder to write a BackdoorBench record to."""
    to: Literal["backdoorbench"] | None = None
    """Format of PATH."""
    weights: str | None = None
    """File to write a model to, ending in .safetensors. Its names are those of timm or
    torchvision."""
    defense: str | None = None
    """Export the model after this defense; None is the record's own, with its backdoor. With
    --weights only."""
    run_name: str = "seed0"
    """Run of the defense."""
    record_root: str | None = None
    """Folder of records."""
    overwrite: bool = False
    """Replace what is at the place to write to."""
    debug: bool = False
    """Show a traceback with an error."""


def export_record(options: Export) -> int:
    """Run the command; returns its exit code."""
    root = record_root(options.record_root)
    if options.name is None:
        raise UserError("NAME is missing: which record to export")
    # Exactly one of the two formats.
    if (options.to is None) == (options.weights is None):
        raise UserError(
            "say what to export: --weights FILE.safetensors, or --to backdoorbench NAME PATH"
        )

    record = Record.load(options.name, root)
    if options.weights is not None:
        if options.path is not None:
            raise UserError(f"{options.path}: --weights FILE takes no further path")
        return _export_weights(record, Path(options.weights), options)

    if options.path is None:
        raise UserError("--to backdoorbench NAME PATH is missing its PATH: the folder to write")
    if options.defense is not None:
        raise UserError(
            "--defense goes with --weights: a BackdoorBench record holds the attacked model"
        )
    return _export_backdoorbench(record, Path(options.path), options)


def _export_weights(record: Record, path: Path, options: Export) -> int:
    """Write a model's weights, and print how to load them."""
    # By its suffix, `import` and other programs know what the file is.
    if path.suffix != ".safetensors" or not path.parent.is_dir():
        raise UserError(
            f"--weights {path}: expected a file that ends in .safetensors, in a folder that exists"
        )
    if path.exists() and not options.overwrite:
        raise UserError(
            f"{path} exists: choose another name, or pass --overwrite True to replace it"
        )

    # The record's own model, or that after a defense, each with its scores.
    folder, info, scores = record.folder, record.info, record.info["scores"]
    if options.defense is not None:
        folder = _run_folder(record, options.defense, options.run_name)
        info = read_result(folder)
        scores = info["after"]
        if scores is None:
            raise UserError(
                f"--defense {options.defense}: a detector leaves a split and no model: expected a"
                " defense or an unlearner"
            )
    model = record.model_in(folder, info)

    meta = {
        "record": record.name,
        "attack": record.info["attack"],
        "defense": options.defense,
        "architecture": record.info["architecture"],
        "image_shape": record.info["dataset"]["image_shape"],
        "num_classes": record.info["num_classes"],
        "class_names": record.info["dataset"]["class_names"],
        "scores": {key: scores[key] for key in SUMMARY},
        "precision": info.get("precision"),  # of the scores; the weights are float32
    }

    try:
        weights.write_weights(path, model, **meta)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error}): choose a place with space where you may write"
        ) from error
    print(
        f"{path}: {record.info['architecture']['name']} of {record.name},"
        f" {'after ' + options.defense if options.defense else 'as attacked'}"
    )
    print(weights.describe(meta))
    print(f"classes: {class_order.listed(meta['class_names'] or ['not known'])}")
    print(f"scores: {_scores(meta['scores'])}")
    return 0


def _scores(scores: Mapping[str, float | None]) -> str:
    """Write scores for a message; "-" for one that does not exist."""
    words = {"clean_accuracy": "clean accuracy", "asr": "ASR", "robust_accuracy": "RA"}
    said = []
    for key, word in words.items():
        score = scores[key]
        said.append(f"{word} {'-' if score is None else f'{100 * score:.2f} %'}")
    return ", ".join(said)


def _run_folder(record: Record, defense: str, run_name: str) -> Path:
    """Return the folder of a finished run of a defense."""
    # Both come from the command line and become parts of a path.
    check_name(run_name)
    check_name(defense)
    folder = record.folder / "defense" / defense / run_name
    if not (folder / "result.json").is_file():
        runs = sorted(
            f"{p.parent.parent.name} ({p.parent.name})"
            for p in (record.folder / "defense").glob("*/*/result.json")
        )
        raise UserError(
            f"record {record.name!r} has no finished run {run_name!r} of {defense!r}. Finished:"
            f" {', '.join(runs) or 'none yet'}"
        )
    return folder


def _export_backdoorbench(record: Record, path: Path, options: Export) -> int:
    """Write a record in BackdoorBench's format, and print what its scripts will see differently."""
    if not len(record.test_poison):
        raise UserError(
            f"record {record.name!r} holds no triggered images, which a BackdoorBench record needs:"
            " only --weights can be exported"
        )

    dataset = record.info["dataset"]
    channels, height, width = dataset["image_shape"]
    backdoorbench.refuse_foreign_shapes(dataset["name"], height, width)

    # Imported triggered images are only numbered: their positions belong to other images.
    clean, triggered = record.dataset().test, record.test_poison.of_kind(POISON)
    if not torch.equal(clean.labels[triggered.index], triggered.original_labels):
        raise UserError(
            f"record {record.name!r} does not know which test images its triggered ones were (they"
            " were given with --triggered_path), which a BackdoorBench record says: only --weights"
            " can be exported"
        )

    # Nothing that is not ours is deleted with an older export.
    refuse_existing(path, backdoorbench.RESULT, options.overwrite)
    strange = backdoorbench.foreign_file(path)
    if strange is not None:  # such as results of BackdoorBench's own defenses
        raise UserError(
            f"{strange} is not part of an export, and replacing {path} would delete it: move it, or"
            " choose another name"
        )

    with staged(path, backdoorbench.RESULT, options.overwrite) as final:
        backdoorbench.write(
            final,
            name=path.name,
            model_name=record.info["architecture"]["name"],
            weights=record.model().network.state_dict(),
            num_classes=record.info["num_classes"],
            image_shape=(channels, height, width),
            data_name=dataset["name"],
            train=record.train_poison if record.info.get("has_train", True) else None,
            train_size=dataset["train_size"],
            test=triggered,
            test_size=len(clean),
            settings=_settings(record, path.name),
        )
    print(f"BackdoorBench record written: {path}")
    for note in _misfits(record, path):
        print(note)
    return 0


def _settings(record: Record, name: str) -> dict[str, Any]:
    """Return the settings of a record as BackdoorBench's scripts store them in info.pickle."""
    dataset, architecture = record.info["dataset"], record.info["architecture"]
    channels, height, width = dataset["image_shape"]

    settings = {
        "attack": record.info["attack"],
        "dataset": dataset["name"],
        "model": architecture["name"],
        "num_classes": record.info["num_classes"],
        "img_size": (height, width, channels),
        "input_height": height,
        "input_width": width,
        "input_channel": channels,
        "attack_target": record.info["target"],
        "attack_label_trans": "all2one" if record.info["target"] is not None else "all2all",
        "pratio": record.info["poisoned"] / dataset["train_size"],
        "random_seed": record.info["seed"],
        "save_folder_name": name,
        **{key: architecture[key] for key in ("mean", "std")},
    }

    config = record.info["config"]
    settings |= {
        key: config[key]
        for key in ("epochs", "batch_size", "lr", "crop_padding", "flip")
        if key in config
    }

    # An imported record keeps what BackdoorBench attacked with. `backdoorbench.write` adds which
    # images are cover samples.
    theirs = record.info.get("source", {}).get("settings", {})
    return settings | {key: theirs[key] for key in ("pratio", "batch_size") if key in theirs}


def _misfits(record: Record, path: Path) -> list[str]:
    """List, for the user, what BackdoorBench's scripts will see differently."""
    architecture, name = record.info["architecture"], record.info["dataset"]["name"]
    notes = []
    if path.resolve().parent.name != "record":
        notes.append(
            "BackdoorBench's scripts look for it in their folder record/: copy it there under the"
            " same name"
        )

    # Their networks go by name alone, ours also by width and stem.
    if architecture["name"] == "preactresnet18" and architecture["width"] not in (None, 64):
        notes.append(
            f"BackdoorBench's preactresnet18 has width 64, this one {architecture['width']}: its"
            " images can be used there, its weights cannot"
        )
    elif architecture["name"] == "preactresnet10" or (
        architecture.get("stem") == "small" and architecture["name"] not in models.OWN
    ):
        notes.append(
            f"BackdoorBench has no {architecture['name']} with our stem: its images can be used"
            " there, its weights cannot"
        )

    # Compared as they are printed.
    mean, std = ([round(x, 6) for x in architecture[key]] for key in ("mean", "std"))
    usual = published(name)
    if [list(usual.get("mean", ())), list(usual.get("std", ()))] != [mean, std]:
        notes.append(
            "BackdoorBench normalises by the data set's name; this model was trained with mean"
            f" {mean} and std {std}"
        )
    return notes
