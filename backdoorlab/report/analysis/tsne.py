"""t-SNE of a model's features of clean and triggered images, before and after each defense.

van der Maaten and Hinton, JMLR 2008, https://jmlr.org/papers/v9/vandermaaten08a.html, as
scikit-learn computes it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...data import Split, batches
from ...features import last_features
from ...models import Classifier
from ..charts import Chart, Panel, Series
from ..looks import TEXT
from .subject import Subject, title

PERPLEXITY = 30.0
"""About how many neighbours of each image t-SNE keeps near it."""


def chart(subject: Subject) -> Chart:
    """Draw a panel for the attacked model and one for each finished run."""
    clean, triggered = subject.clean, subject.triggered

    # All models are shown the same images.
    panels = []
    for cell, model in subject.models:
        places = embed(features(model, [clean, triggered], subject.device))
        series = _series(places, clean, subject.dataset.class_names)
        panels.append(Panel(title(cell), series=series, bare=True))

    caption = (
        "Each panel is one model, its axes have no unit: only who lies near whom counts. With a"
        " backdoor the triggered images (x) form an island of their own or lie with the target"
        " class. After a defense that works they lie among the classes that they show."
    )
    return Chart(
        "tsne", "What the model sees: t-SNE of features of test images", caption, tuple(panels)
    )


@torch.no_grad()
def features(model: Classifier, parts: Sequence[Split], device: torch.device) -> Tensor:
    """Compute the input of the last layer in evaluation mode: float32 (N, D) on the CPU."""
    found = [
        last_features(model, b.images) for part in parts for b in batches(part, 250, device=device)
    ]
    return torch.cat(found).float().cpu()


def embed(found: Tensor) -> Tensor:
    """Embed features with t-SNE: (N, D) -> (N, 2), the same at each call."""
    # Imported here, because it takes a second.
    from sklearn.manifold import TSNE

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
