"""What a model sees in clean and in triggered images, in two dimensions: t-SNE of its features
before and after each defense.

van der Maaten and Hinton, JMLR 2008, https://jmlr.org/papers/v9/vandermaaten08a.html, as
scikit-learn computes it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import record
from ..data import Dataset, Split, batches
from ..errors import UserError
from ..models import Classifier
from ..poison import POISON
from .artifacts import Cell
from .charts import Chart, Panel, Series
from .looks import TEXT

CLASSES, PER_CLASS, TRIGGERED = 10, 40, 120
"""Clean test images of how many classes (the target among them), how many of each, and how many
triggered ones."""
PERPLEXITY = 30.0
"""How many neighbours each image is thought to have."""


def chart(cells: Sequence[Cell], dataset_path: str | None, device: torch.device) -> Chart:
    """A panel for the attacked model and one for each finished run; needs the data set and
    scikit-learn."""
    own = cells[0].record
    dataset = own.dataset(dataset_path)
    clean, triggered = sample(dataset, own)
    panels = []
    for cell in cells:
        model = weights(cell)
        if model is not None:
            places = embed(features(model, [clean, triggered], device))
            title = "no defense" if cell.undefended else cell.name
            panels.append(
                Panel(title, series=_series(places, clean, dataset.class_names), bare=True)
            )
    caption = (
        "Each panel is one model, its axes have no unit: only who lies near whom counts. With a"
        " backdoor the triggered images (x) form an island of their own or lie with the target"
        " class. After a defense that works they lie among the classes that they show."
    )
    return Chart(
        "tsne", "What the model sees: t-SNE of features of test images", caption, tuple(panels)
    )


def sample(dataset: Dataset, own: record.Record) -> tuple[Split, Split]:
    """(clean, triggered) test images, the first of each class and an even draw: no random number,
    so the same for every model."""
    target = own.info.get("target")
    labels = [
        *([target] if target is not None else []),
        *(label for label in range(dataset.num_classes) if label != target),
    ][:CLASSES]
    index = torch.cat(
        [
            (dataset.test.labels == label).nonzero().squeeze(1)[:PER_CLASS]
            for label in sorted(labels)
        ]
    )
    # What wears the trigger with its true label is not meant to be misread
    poison = own.test_poison.of_kind(POISON)
    usable = torch.isin(poison.original_labels, torch.tensor(labels)).nonzero().squeeze(1)
    chosen = (
        usable[torch.linspace(0, len(usable) - 1, min(TRIGGERED, len(usable))).long()]
        if len(usable)
        else usable
    )
    return dataset.test.subset(index), Split(poison.images[chosen], poison.labels[chosen])


def weights(cell: Cell) -> Classifier | None:
    """The model of a cell; None where the result holds none."""
    if cell.undefended:
        # Plain training leaves its scores only
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
    """(N, D) float32 on the CPU: what the last layer sees, in evaluation mode."""
    model.to(device).eval()
    assert isinstance(model, nn.Module)
    found = [
        model.forward_head(model.forward_features(b.images), pre_logits=True)
        for part in parts
        for b in batches(part, 250, device=device)
    ]
    return torch.cat(found).float().cpu()


def embed(found: Tensor) -> Tensor:
    """(N, D) -> (N, 2), the same at each call."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise UserError("--tsne True needs scikit-learn: pip install scikit-learn") from error
    perplexity = min(PERPLEXITY, (len(found) - 1) / 3)
    return torch.from_numpy(
        TSNE(perplexity=perplexity, init="pca", random_state=0, n_jobs=1).fit_transform(
            found.numpy()
        )
    )


def _series(places: Tensor, clean: Split, class_names: Sequence[str]) -> tuple[Series, ...]:
    labels = clean.labels.cpu()
    groups = [
        (class_names[label], number, labels == label)
        for number, label in enumerate(sorted(set(labels.tolist())))
    ]
    found = []
    for name, look, mask in groups:
        own = places[: len(labels)][mask]
        found.append(
            Series(f"class {name}", look, "points", own[:, 0].tolist(), own[:, 1].tolist())
        )
    rest = places[len(labels) :]
    if len(rest):
        found.append(Series("triggered", TEXT, "points", rest[:, 0].tolist(), rest[:, 1].tolist()))
    return tuple(found)
