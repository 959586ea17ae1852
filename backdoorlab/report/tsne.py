"""t-SNE of a model's features of clean and triggered images, before and after each defense.

van der Maaten and Hinton, JMLR 2008, https://jmlr.org/papers/v9/vandermaaten08a.html, as
scikit-learn computes it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import record
from ..data import Dataset, Split, batches
from ..errors import UserError
from ..features import last_features
from ..models import Classifier
from ..poison import POISON
from .artifacts import Cell
from .charts import Chart, Panel, Series
from .looks import TEXT

CLASSES = 10
"""From how many classes clean test images are shown; the target is one of them."""
PER_CLASS = 40
"""Clean test images of each class."""
TRIGGERED = 120
"""Triggered test images."""
PERPLEXITY = 30.0
"""About how many neighbours of each image t-SNE keeps near it."""


def chart(cells: Sequence[Cell], dataset_path: str | None, device: torch.device) -> Chart:
    """Draw a panel for the attacked model and one for each finished run.

    Args:
        cells: The cells of one record, of which the undefended one is the first.
        dataset_path: Folder of the data set, if it is no longer in the cache.
        device: Where to compute the features.
    """
    own = cells[0].record
    dataset = own.dataset(dataset_path)
    clean, triggered = sample(dataset, own)

    # All models are shown the same images.
    panels = []
    for cell in cells:
        model = weights(cell)
        if model is None:
            continue
        places = embed(features(model, [clean, triggered], device))
        title = "no defense" if cell.undefended else cell.name
        panels.append(Panel(title, series=_series(places, clean, dataset.class_names), bare=True))

    caption = (
        "Each panel is one model, its axes have no unit: only who lies near whom counts. With a"
        " backdoor the triggered images (x) form an island of their own or lie with the target"
        " class. After a defense that works they lie among the classes that they show."
    )
    return Chart(
        "tsne", "What the model sees: t-SNE of features of test images", caption, tuple(panels)
    )


def sample(dataset: Dataset, own: record.Record) -> tuple[Split, Split]:
    """Choose test images without drawing at random, so that all models are shown the same.

    Returns:
        The first clean images of each class, and triggered images of these classes at even
        distances.
    """
    target = own.info.get("target")
    others = [label for label in range(dataset.num_classes) if label != target]
    labels = ([target] if target is not None else []) + others
    labels = labels[:CLASSES]
    members = [(dataset.test.labels == label).nonzero().squeeze(1) for label in sorted(labels)]
    index = torch.cat([positions[:PER_CLASS] for positions in members])

    # Images that keep their true label with the trigger are not meant to be misclassified.
    poison = own.test_poison.of_kind(POISON)
    usable = torch.isin(poison.original_labels, torch.tensor(labels)).nonzero().squeeze(1)

    # At even distances, so that nothing is drawn at random.
    chosen = usable
    if len(usable):
        count = min(TRIGGERED, len(usable))
        chosen = usable[torch.linspace(0, len(usable) - 1, count).long()]
    return dataset.test.subset(index), Split(poison.images[chosen], poison.labels[chosen])


def weights(cell: Cell) -> Classifier | None:
    """Load the model of a cell; None if the result has none."""
    if cell.undefended:
        # Of plain training nothing but its scores was kept.
        return None if cell.row.run else cell.record.model()
    if "model.safetensors" not in cell.info["files"]:
        return None
    model = cell.record.new_model()
    record.load_weights(
        model, cell.folder / "model.safetensors", cell.info["files"], cell.record.model_shapes()
    )
    return model


@torch.no_grad()
def features(model: Classifier, parts: Sequence[Split], device: torch.device) -> Tensor:
    """Compute the input of the last layer in evaluation mode: float32 (N, D) on the CPU."""
    model.to(device).eval()
    assert isinstance(model, nn.Module)
    found = [
        last_features(model, b.images) for part in parts for b in batches(part, 250, device=device)
    ]
    return torch.cat(found).float().cpu()


def embed(found: Tensor) -> Tensor:
    """Embed features with t-SNE: (N, D) -> (N, 2), the same at each call."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError("--tsne True needs scikit-learn: pip install scikit-learn") from error

    # t-SNE needs more images than neighbours.
    perplexity = min(PERPLEXITY, (len(found) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=0, n_jobs=1)
    return torch.from_numpy(tsne.fit_transform(found.numpy()))


def _series(places: Tensor, clean: Split, class_names: Sequence[str]) -> tuple[Series, ...]:
    """Make a series of each class, and one of the triggered images, which come last in `places`."""
    labels = clean.labels.cpu()
    found = []
    for look, label in enumerate(sorted(set(labels.tolist()))):
        own = places[: len(labels)][labels == label]
        x, y = own[:, 0].tolist(), own[:, 1].tolist()
        found.append(Series(f"class {class_names[label]}", look, "points", x, y))

    rest = places[len(labels) :]
    if len(rest):
        found.append(Series("triggered", TEXT, "points", rest[:, 0].tolist(), rest[:, 1].tolist()))
    return tuple(found)
