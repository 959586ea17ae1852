"""Grad-CAM: which pixels speak for the class that a model predicts, without and with the trigger.

Selvaraju et al., ICCV 2017, https://arxiv.org/abs/1610.02391, as captum computes it, at the last
stage of the network.
"""

import torch
from torch import Tensor

from ...data import to_float
from ...errors import UserError
from ...execution.preview import one_per_class, sheet
from ...features import stage_output
from ...models import Classifier
from ..charts import Chart, Panel
from .subject import Subject, title

STRENGTH = 0.65
"""How much of a pixel the colour hides where it speaks most."""
RED = (255, 32, 32)


def chart(subject: Subject) -> Chart:
    """Draw a picture for the attacked model and one for each finished run."""
    # The same images without and with the trigger, where there is one.
    parts = [subject.untriggered, subject.triggered] if len(subject.triggered) else [subject.clean]
    few = one_per_class(parts[0].labels)
    rows = [part.images[few] for part in parts]

    panels = []
    for cell, model in subject.models:
        shown = []
        for images in rows:
            shown += [_coloured(images), overlay(images, heat(model, images, subject.device))]
        panels.append(Panel(title(cell), picture=sheet(shown)))

    caption = (
        "From above: test images, where each model looks to classify them (red), the same images"
        " with the trigger, and where it looks then. With a backdoor the red jumps to the trigger;"
        " after a defense that works it stays where it was without it."
    )
    return Chart("gradcam", "Where the model looks: Grad-CAM", caption, tuple(panels))


def heat(model: Classifier, images: Tensor, device: torch.device) -> Tensor:
    """Compute Grad-CAM of the predicted classes.

    Args:
        model: in evaluation mode.
        images: uint8 (N, C, H, W).
        device: where the model is.

    Returns:
        float32 (N, 1, H, W) in [0, 1] on the CPU, the largest value of each image 1, or 0 where
        nothing speaks for its class.
    """
    try:
        from captum.attr import LayerAttribution, LayerGradCam
    except ImportError as error:
        raise UserError(
            "--analysis gradcam needs captum: pip install 'backdoorlab[report]'"
        ) from error

    pixels = to_float(images).to(device)
    with torch.no_grad(), stage_output(model, -1) as read:
        predicted = model(pixels).argmax(1)
        maps = read()
    attribution = LayerGradCam(model, model.stages()[-1]).attribute(
        pixels, target=predicted, relu_attributions=True
    )
    # Of another order, such as (N, H, W, C), captum would sum over the wrong axis.
    if attribution.dim() != 4 or attribution.shape[2:] != maps.shape[2:]:
        raise UserError(
            "Grad-CAM needs a network whose last stage gives feature maps (N, C, H, W), which"
            f" {type(model.network).__name__} does not: leave gradcam out of --analysis"
        )
    whole = LayerAttribution.interpolate(attribution.detach(), images.shape[2:], "bilinear").cpu()
    return whole / whole.amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(whole.dtype).tiny)


def overlay(images: Tensor, share: Tensor) -> Tensor:
    """Colour images by how much each pixel speaks.

    Args:
        images: uint8 (N, C, H, W), C 1 or 3.
        share: float (N, 1, H, W) in [0, 1].

    Returns:
        uint8 (N, 3, H, W).
    """
    hidden = STRENGTH * share
    red = torch.tensor(RED, dtype=torch.float32)[:, None, None]
    return ((1 - hidden) * _coloured(images) + hidden * red).round().to(torch.uint8)


def _coloured(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)
