"""TAC: how far the trigger moves each channel, before and after each defense.

Data-free Backdoor Removal based on Channel Lipschitzness. R. Zheng et al. ECCV 2022.
https://arxiv.org/abs/2208.03111 (trigger-activated change).

TAC of a channel is the mean over images of the L2 norm of its maps' difference between an image
with the trigger and the same image without it. Here it is divided by the mean norm of the
channel's maps without the trigger, averaged over channels, so that models compare.
"""

import torch
from torch import Tensor

from ...data import Split, in_order
from ...features import stage_output
from ...models import Classifier, paused
from .. import looks
from ..charts import Chart, Panel, Series
from .subject import Subject, title


def chart(subject: Subject) -> Chart:
    """Draw a line for each model, channels in the order of the attacked model's TAC."""
    heading = "What the trigger moves: TAC of the last feature maps"
    if not len(subject.triggered):
        missing = "There are no triggered images."
        return Chart("tac", heading, "", missing=missing)

    # A defense has its own colour in every chart.
    look = looks.of_defenses(cell.row.defense for cell in subject.cells)
    series, order = [], None
    for cell, model in subject.models:
        found = change(model, subject.triggered, subject.untriggered, subject.device)
        order = found.argsort(descending=True) if order is None else order
        places = [float(place) for place in range(1, len(found) + 1)]
        series.append(
            Series(title(cell), look[cell.row.defense], "line", places, found[order].tolist())
        )

    caption = (
        "One line for each model, channels from the left by how far the trigger moves them in the"
        " attacked model. A backdoor that is gone moves none of them far; a line that stays high on"
        " the left keeps the channels that carry the trigger, whatever the ASR is. 1: as large as"
        " the maps themselves are on average."
    )
    panel = Panel("", "channel", "TAC", tuple(series), large=True)
    return Chart("tac", heading, caption, (panel,))


def change(model: Classifier, triggered: Split, untriggered: Split, device: torch.device) -> Tensor:
    """Compute the TAC of each channel of the last stage's output.

    Args:
        model: in evaluation mode.
        triggered: N >= 1 images with the trigger.
        untriggered: the same images without it.
        device: where the model is.

    Returns:
        float64 (C,), at least 0.
    """
    with_trigger = _last_maps(model, triggered, device)
    without = _last_maps(model, untriggered, device)
    moved = (with_trigger - without).flatten(2).norm(dim=2).double().mean(0)
    size = without.flatten(2).norm(dim=2).double().mean()
    return moved / size if size > 0 else moved


def _last_maps(model: Classifier, split: Split, device: torch.device) -> Tensor:
    """The last stage's output for a split: float32 (N, C, ., .) on the CPU."""
    kept = []
    with stage_output(model, -1) as read, torch.inference_mode(), paused():
        for batch in in_order(split, device):
            model(batch.images)
            kept.append(read().cpu())
    return torch.cat(kept)
