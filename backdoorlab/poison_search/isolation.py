"""ABL's isolation: a training after which poison has the lowest loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Split, batches
from ..engine import Forward
from ..features import extract
from ..losses import cross_entropy
from ..models import Classifier
from ..record import DefenderView
from ..run import Run


def isolate(
    view: DefenderView,
    train: Split,
    epochs: int,
    batch_size: int,
    lr: float,
    gamma: float,
    run: Run,
) -> Classifier:
    """Train a new model, ascending the loss of each batch where its mean is below gamma.

    ABL's isolation (Anti-Backdoor Learning, Y. Li et al., NeurIPS 2021,
    https://arxiv.org/abs/2110.11571), after which poison has the lowest loss. As in ABL's code: its
    formula keeps each sample's own loss at gamma, the poison's too, which is then no lower than
    others'.
    """
    model = view.new_model()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True
    )
    forward = Forward(model.train(), run, train, epochs * (len(train) // batch_size), batch_size)

    for _ in run.epochs("isolate", epochs, isolated=model, optimizer=optimizer):
        model.train()
        for batch in batches(
            train,
            batch_size,
            device=run.device,
            generator=run.generator,
            augment=view.augment,
            drop_last=True,
        ):
            # sign(L - gamma) L: what is learnt early is not learnt further.
            loss = F.cross_entropy(forward(batch.images).float(), batch.labels)
            run.step(optimizer, (loss.detach() - gamma).sign() * loss)
    return model


def low_loss(model: Classifier, train: Split, run: Run) -> Tensor:
    """Suspect each of N images the more the lower its loss is, without crops and flips.

    Returns:
        float (N,) on the run's device: minus the cross-entropy.
    """
    features = extract(model, train, run)
    return -cross_entropy(features.logits, features.labels)
