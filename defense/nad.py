"""NAD: Neural Attention Distillation.

Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks. Y. Li, X. Lyu,
N. Koren, L. Lyu, B. Li, X. Ma. ICLR 2021. https://arxiv.org/abs/2101.05930

Assumes: the poisoned model and a few trusted images.

  1. The teacher is the poisoned model, fine-tuned on the trusted images.
  2. The student is the poisoned model, trained on these images with cross-entropy and so that its
     attention, where in the image each of the last three stages is active, is the teacher's.
The attention map of feature maps f is A = sum over channels of |f|^p, divided by its length.

Departs: features of the student come from the pass that its loss comes from; BackdoorBench takes
three further passes in training mode a step, which moves the batch statistics four times. Maps are
those of the network's last three stages; for PreAct-ResNets BackdoorBench's third is the pooled
output, whose map is 1 whatever it is. The student's rate is 0.01 throughout, the published code's
0.1 in the first two epochs. A guard undoes epochs that destroy the model
(backdoorlab/repair/guard.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backdoorlab.cli import main
from backdoorlab.config import DefenseConfig
from backdoorlab.data import to_device
from backdoorlab.errors import UserError
from backdoorlab.features import maps_of
from backdoorlab.models import Classifier, trained_weights
from backdoorlab.record import DefenderView
from backdoorlab.repair.finetuning import FinetuneConfig, augmented_batches, finetune
from backdoorlab.repair.guard import guarded_epochs
from backdoorlab.run import Run

ASSUMES = ("model", "trusted")


@dataclass(frozen=True, kw_only=True)
class Config(FinetuneConfig, DefenseConfig):
    teacher_epochs: int = 10
    """Passes over the trusted images that make the teacher. More leave it less of the backdoor."""
    epochs: int = 20
    """Passes over the trusted images of the student."""
    batch_size: int = 64
    """Images a step. Smaller batches take more steps."""
    weight_decay: float = 1e-4
    """L2 penalty."""
    p: float = 2.0
    """Power of the activations in an attention map; more weighs the strongest ones."""
    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    """Weight of the attention of each of the last stages, the last one's at the end. More ties the
    student closer to the teacher."""

    RANGES: ClassVar[dict[str, str]] = {
        "teacher_epochs": ">= 0",
        "p": "> 0",
        "betas": ">= 0",
    }


def defend(view: DefenderView, config: Config, run: Run) -> nn.Module:
    trusted = to_device(view.trusted, run.device)

    # Step 1: the teacher.
    teacher = view.load_model()
    finetune(teacher, trusted, view, config, run, stage="teacher", epochs=config.teacher_epochs)
    teacher.eval().requires_grad_(False)

    # Step 2: the student, which starts from the poisoned model and not from the teacher.
    model = view.load_model()
    optimizer = torch.optim.SGD(
        trained_weights(model),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
        fused=True,
    )

    for _ in guarded_epochs(run, "distill", config.epochs, trusted, config, model, optimizer):
        model.train()
        for batch in augmented_batches(trusted, view, config.batch_size, run):
            # Attention of the teacher, and of the student in the pass that its loss comes from.
            with torch.no_grad(), run.autocast(), stage_maps(teacher, config) as wanted:
                teacher(batch.images)
            with run.autocast(), stage_maps(model, config) as found:
                logits = model(batch.images).float()

            # CE + sum over stages of beta_l MSE(A_l, A_l of the teacher).
            apart = sum(
                beta * F.mse_loss(attention(f, config.p), attention(t, config.p))
                for beta, f, t in zip(stage_weights(config, found), found, wanted, strict=True)
            )
            run.watch(apart=torch.as_tensor(apart))
            run.step(optimizer, F.cross_entropy(logits, batch.labels) + apart)
    return model


def stage_weights(config: Config, maps: list[Tensor]) -> tuple[float, ...]:
    """Return the weight of each stage's attention; of a network of fewer stages, the last ones."""
    return config.betas[len(config.betas) - len(maps) :]


@contextmanager
def stage_maps(model: Classifier, config: Config) -> Iterator[list[Tensor]]:
    """Collect the feature maps, (B, C, H, W), of the last stages in a pass inside."""
    found: list[Tensor] = []
    infos = model.network.feature_info
    channels = [info.get("num_chs") for info in infos]
    stages = list(zip(model.stages(), channels, strict=True))[-len(config.betas) :]

    def keep(width: int | None) -> Any:
        def hook(module: nn.Module, _inputs: object, output: object) -> None:
            if not isinstance(output, Tensor):
                raise UserError(
                    "the attention of this network cannot be read: a stage"
                    f" ({type(module).__name__}) gives no single tensor; choose another defense"
                )
            found.append(maps_of(output.float(), width))

        return hook

    hooks = [stage.register_forward_hook(keep(width)) for stage, width in stages]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) != len(stages):
        raise UserError(
            "the attention of this network cannot be read: its stages are not passed one by one;"
            " choose another defense"
        )


def attention(maps: Tensor, p: float) -> Tensor:
    """Compute where in an image a stage is active: sum over channels of |f|^p, in length 1.

    (B, C, H, W) -> (B, H W). A map of one pixel is 1 whatever it is.
    """
    strength = maps.abs().pow(p).sum(1).flatten(1)
    return strength / (strength.norm(dim=1, keepdim=True) + 1e-6)


if __name__ == "__main__":
    raise SystemExit(main(__file__))
