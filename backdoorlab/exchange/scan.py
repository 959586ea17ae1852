"""scan: the training images that DAU, or another detector, classifies as poison, for a person to
look at."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tyro.conf import Positional

from ..data import Split
from ..datasets.load import train_files
from ..errors import UserError, suggest
from ..execution.defense import defense_job, prepare, run_defense, start, view_of
from ..execution.stage import open_stage
from ..metrics import guesses
from ..poison_search.anti_learning import find_poison
from ..record import Record, check_name, read_result, record_root
from ..settings import methods
from ..storage import reading, writing
from ..storage.staging import refuse_existing, staged

SHOWN, COLUMNS, LABELS, SIDE, GAP, TITLE = 10, 16, 40, 48, 3, 14
"""Positions in a line of text, pictures in a row, labels in a sheet; pixels of a picture, between
pictures, of a heading."""


DEFAULT = "dau"
"""Whose search it is, unless a detector is named. DAU also unlearns, which a scan does not."""


@dataclass(frozen=True)
class Scan:
    """Which training images DAU, or another detector, takes for poison: a count for each class, a
    list, and a contact sheet. Nothing is unlearned."""

    name: Positional[str | None] = None
    """The record."""
    detector: str = DEFAULT
    """Whose search: dau, or the name of any detector."""
    trusted_path: str | None = None
    """Folder of a few clean images with true labels, <class>/*.png, for a detector that assumes
    trusted images."""
    run_name: str | None = None
    """Which finished run of it to read; None is seed0, and where there is none, the search is done
    now (and kept for the next scan)."""
    dataset_path: str | None = None
    """Folder of the data, train/<class>/*.png: the list then names files."""
    dataset_config: str | None = None
    """Configuration of parquet shards to read, where that folder has several. None: the only one,
    or the default."""
    out: str | None = None
    """Folder for flagged.csv and flagged.png; default record/NAME/scan/, or scan-DETECTOR/."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    record_root: str | None = None
    """Folder of records."""
    overwrite: bool = False
    """Replace another list and contact sheet in that folder, and nothing else there."""
    debug: bool = False
    """Show a traceback with an error."""


def scan(options: Scan) -> int:
    """Print what is flagged, and write the list and the contact sheet; 0 is success."""
    if options.name is None:
        raise UserError("NAME is missing: which record to scan")
    known = [DEFAULT, *methods.with_role("detector")]
    if options.detector not in known:
        raise UserError(
            f"--detector {options.detector}: expected one of {', '.join(known)}."
            f"{suggest(options.detector, known)}"
        )
    plain = options.detector == DEFAULT
    title = "DAU" if plain else f"the detector {options.detector}"
    place = "scan" if plain else f"scan-{options.detector}"
    record = Record.load(options.name, record_root(options.record_root))
    dataset = record.dataset(options.dataset_path, options.dataset_config)
    flagged, notes = _found(record, options)
    _say_what_was_learned(record, flagged)
    train = record.train_poison.apply(dataset.train)
    names = None if options.dataset_path is None else train_files(options.dataset_path)
    if not flagged.any():
        print(
            f"nothing found: {title} flags none of the {len(train):,} training images of"
            f" {record.name}"
        )
        for note in notes:
            print(f"  {note}")
        return 0

    print(
        f"{title} flags {int(flagged.sum()):,} of the {len(train):,} training images of"
        f" {record.name} ({flagged.double().mean():.1%})"
    )
    _print_classes(flagged, train.labels, dataset.class_names, names)
    target = Path(options.out) if options.out else record.folder / place
    contents = {
        "flagged.csv": as_csv(flagged, train.labels, dataset.class_names, names),
        "flagged.png": sheet(train, flagged, dataset.class_names),
    }

    # A scan that finds what the files say already leaves them alone.
    if not all(
        (target / name).is_file() and _says(name, (target / name).read_bytes(), data, names)
        for name, data in contents.items()
    ):
        _write(target, contents, options.overwrite)
    print(f"list: {target / 'flagged.csv'}\ncontact sheet: {target / 'flagged.png'}")
    return 0


def _say_what_was_learned(record: Record, flagged: Tensor) -> None:
    """Print how good the model is: what it has not learned, it groups at random."""
    accuracy = record.info["scores"].get("clean_accuracy")
    if accuracy is None:
        return
    said = f"the model classifies {accuracy:.1%} of the clean test images right"
    if guesses(accuracy, record.info["num_classes"]):
        said = f"this scan tells nothing: {said}, which is little better than guessing. Train it"
        print(f"{said} longer")
    else:
        print(f"{said}: what it has not learned, no search can tell apart")
        if flagged.any() and 1 - accuracy > flagged.double().mean().item():
            print(
                "it gets more images wrong than are flagged, which may be just those: train it"
                " longer, or at a lower --lr, and see whether they are flagged again"
            )


def _print_classes(
    flagged: Tensor, labels: Tensor, class_names: tuple[str, ...], names: list[str] | None
) -> None:
    """Print a line for each class with flagged images: how many, and the first of them."""
    for label, class_name in enumerate(class_names):
        own = labels == label
        index = (flagged & own).nonzero().squeeze(1).tolist()
        if not index:
            continue
        title = f"label {label}" + (f" ({class_name})" if class_name != str(label) else "")
        shown = ", ".join(str(i) if names is None else names[i] for i in index[:SHOWN])
        rest = ", ..." if len(index) > SHOWN else ""
        total = int(own.sum())
        print(f"  {title}: {len(index):,} of {total:,}: {shown}{rest}")
        if 2 * len(index) > total > len(index):
            others = f"the other {total - len(index):,} may be the strangers"
            print(f"    more than half of the label: if these look right, {others}")


def _says(name: str, there: bytes, now: bytes, names: list[str] | None) -> bool:
    """Whether a file says what would be written; without `names` a list may name files besides."""
    if there == now or names is not None or not name.endswith(".csv"):
        return there == now
    was, would = (
        list(csv.reader(io.StringIO(text.decode(errors="replace")))) for text in (there, now)
    )
    return [line[:3] for line in was] == [line[:3] for line in would]


def _write(target: Path, contents: dict[str, bytes], overwrite: bool) -> None:
    """A new folder comes as a whole; in one that is there, these files are replaced and whatever
    else it holds is left alone."""
    refuse_existing(target, "flagged.csv", overwrite)
    if target.exists():
        for name, data in contents.items():
            writing.write_bytes(target / name, data)
        return
    with staged(target, "flagged.csv", overwrite) as final:
        for name, data in contents.items():
            writing.write_bytes(final / name, data)


def as_csv(
    flagged: Tensor, labels: Tensor, class_names: tuple[str, ...], names: list[str] | None
) -> bytes:
    """One line for each flagged image: position in the training set, label, class name, and file
    where known."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["index", "label", "class", "file"])
    writer.writerows(
        [i, int(labels[i]), class_names[int(labels[i])], names[i] if names else ""]
        for i in flagged.nonzero().squeeze(1).tolist()
    )
    return stream.getvalue().encode()


def sheet(train: Split, flagged: Tensor, class_names: tuple[str, ...]) -> bytes:
    """PNG: for each label with flagged images a row of these, and below it a row of the label's
    other images."""
    labels = [
        label for label in range(len(class_names)) if (flagged & (train.labels == label)).any()
    ][:LABELS]
    block = TITLE + 2 * (SIDE + GAP) + GAP
    picture = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, len(labels) * block), "white")
    draw = ImageDraw.Draw(picture)

    # Of each label, flagged images above others, spread over the data set.
    for number, label in enumerate(labels):
        own = train.labels == label
        parts = [(own & flagged).nonzero().squeeze(1), (own & ~flagged).nonzero().squeeze(1)]
        # What the built-in font can draw
        name = class_names[label].encode("ascii", "replace").decode()[:40]
        word = "" if name == str(label) else f" ({name})"
        draw.text(
            (GAP, number * block),
            f"label {label}{word}: {len(parts[0])} flagged (upper row), {len(parts[1])} not (lower"
            " row)",
            fill="black",
        )

        for row, index in enumerate(parts):
            spread = (
                index[torch.linspace(0, len(index) - 1, min(COLUMNS, len(index))).long()]
                if len(index)
                else index
            )
            for column, image in enumerate(train.images[spread]):
                array = image.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
                small = Image.fromarray(array).resize(
                    (SIDE, SIDE),
                    (
                        Image.Resampling.NEAREST
                        if array.shape[0] < SIDE
                        else Image.Resampling.BILINEAR
                    ),
                )
                picture.paste(
                    small,
                    (GAP + column * (SIDE + GAP), number * block + TITLE + row * (SIDE + GAP)),
                )
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _found(record: Record, options: Scan) -> tuple[Tensor, list[str]]:
    """What is flagged, bool (N,), and the method's notes: from a finished run, else from a
    search."""
    folder, run_name = record.folder / "defense" / options.detector, options.run_name or "seed0"
    check_name(run_name)

    # A finished run, whatever its settings.
    if not (folder / run_name / "result.json").is_file():
        if options.run_name is not None:
            raise UserError(
                f"record {record.name!r} has no finished run {run_name!r} of {options.detector}:"
                " leave --run_name out to search now"
            )
        if options.detector == DEFAULT:
            return _searched(record, options)
        _detect(record, options)
    result = read_result(folder / run_name)
    entry = result["files"]["split.safetensors"]
    split = reading.read_tensors(folder / run_name / "split.safetensors", entry=entry)[0]
    return split["flagged"], result.get("notes", [])


def _detect(record: Record, options: Scan) -> None:
    """Run a detector with its default settings, as its own command does; its result is kept."""
    method = methods.load("defense", options.detector)
    # Of one's own data a draw may be poisoned, too, and a threshold from it would say nothing.
    drawn = "trusted" in method.assumes and options.trusted_path is None
    if drawn and not record.known_poison:
        raise UserError(
            f"{method.name} assumes trusted images, and nobody vouches for those of {record.name}:"
            " give --trusted_path FOLDER, a few clean images with true labels, or choose a detector"
            " that assumes none"
        )
    run_defense(defense_job(method, _flags(record, options), "backdoorlab scan"))


def _flags(record: Record, options: Scan) -> list[str]:
    """Flags of a defense on the record that a scan passes on."""
    argv = ["--result_file", record.name, "--record_root", str(record.folder.parent)]
    argv += ["--device", options.device]
    for flag in ("dataset_path", "dataset_config", "trusted_path"):
        value = getattr(options, flag)
        argv += [f"--{flag}", value] if value else []
    return argv


def _searched(record: Record, options: Scan) -> tuple[Tensor, list[str]]:
    """Search with DAU's default settings for this data set, now or in an earlier scan.

    What was found stays in an unfinished run named scan, so that a later run of the defense is not
    bound to these settings.
    """
    dau = methods.load("defense", "dau")
    argv = [*_flags(record, options), "--run_name", "scan"]
    job = defense_job(dau, argv, "backdoorlab scan")

    # The same device, precision and random numbers as in a run of the defense.
    prepared = prepare(job, record, record.folder / "defense" / "dau" / "scan")

    # Kept in the stage, and read from there by the next scan.
    precision, device = prepared.choice.precision, prepared.device
    with open_stage(
        prepared.target, "result.json", job, prepared.inputs, precision, device
    ) as stage:
        run, _ = start(prepared, stage)
        view = view_of(prepared, run)

        def search() -> dict[str, Tensor]:
            return {"flagged": find_poison(view, job.config, job.config.batch_size, run)[0]}

        flagged = run.cached("split", search)["flagged"]
    return flagged, run.notes
