"""Every family of timm that can be made without a download: import, FT, SAU, I-BAU and DAU of one
step each on images of 32 and 64 pixels run, or say in one line why not.

Hours on two cores: `pytest -m slow tests/exchange/test_families.py -s` prints what each of them
did. A part: `-k resnet`.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from backdoorlab import models
from backdoorlab.errors import UserError
from backdoorlab.exchange.importing import Import, import_record
from backdoorlab.execution.defense import defense_job, run_defense
from backdoorlab.settings import methods

FAMILIES = """
    beit_base_patch16_224 botnet26t_256 repvgg_a0 cait_xxs24_224 coat_lite_tiny coat_tiny
    convit_tiny convmixer_768_32 convnext_atto cpubone_nano crossvit_tiny_240 csatv2 cspresnet50
    cspnext_tiny davit_tiny deit_tiny_distilled_patch16_224 densenet121 dla46_c dpn48b
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 mnasnet_small efficientnet_b0
    efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_a hgnetv2_b0 hiera_tiny_224
    sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3
    inception_v4 lcnetv2_small levit_128s lowformer_b0 mambaout_femto coatnet_pico_rw_224
    poolformer_s12 mixer_s32_224 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny
    naflexvit_base_patch16_gap nest_tiny nextvit_small dm_nfnet_f0 pit_ti_224 pvt_v2_b0
    qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9 res2net50_14w_8s resnest14d
    resnet10t resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18
    starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
    swinv2_tiny_window8_256 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_svt_small vgg11_bn
    visformer_tiny vit_tiny_patch16_224 vit_small_r26_s32_224 vit_relpos_small_patch16_224
    samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception
    xception41 xcit_nano_12_p16_224
"""
"""The smallest variants. Left out: deepseek_vit and gemma4_vit (hundreds of millions of weights),
nasnetalarge and pnasnet5large (convolutions of the same kind, 90 million weights)."""
STEPS = {
    "ft": ("--epochs", "1", "--batch_size", "8"),
    "sau": ("--n_rounds", "1", "--pgd_steps", "1", "--batch_size", "8"),
    "ibau": ("--n_rounds", "1", "--K", "1", "--batch_size", "8"),
    "dau": ("--epochs", "1", "--head_epochs", "1", "--pool", "model_loss"),
}
"""Flags that make a run one step."""


@pytest.fixture(scope="module", params=[32, 64])
def photos(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make 8 + 4 images of two classes; the folder is named after their side."""
    root = tmp_path_factory.mktemp("families") / str(request.param)
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("test", 2)):
        for label in range(2):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                shape = (request.param, request.param, 3)
                pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied at once: all records together would take tens of gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FAMILIES.split())
def test_a_family_runs_or_says_why_not(name: str, photos: Path, folder: Path) -> None:
    side = int(photos.name)
    done = []
    try:
        stem = models.choose_stem("auto", name, (3, side, side), 2)
        torch.manual_seed(0)
        model = models.build(
            name,
            num_classes=2,
            in_chans=3,
            mean=[0.5] * 3,
            std=[0.5] * 3,
            image_size=side,
            stem=stem,
        )
        torch.save(model.network.state_dict(), folder / "model.pt")
        options = Import(
            weights=str(folder / "model.pt"),
            architecture=name,
            dataset_path=str(photos),
            save_folder_name="own",
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            record_root=str(folder),
        )
        import_record(options)
        done.append("import")
    except UserError as error:
        _one_line(name, side, "import", error)
        return

    for method, flags in STEPS.items():
        argv = ["--result_file", "own", "--record_root", str(folder), "--trusted_ratio", "1"]
        argv = [*argv, "--dataset_path", str(photos), "--score_every", "0", *flags]
        try:
            run_defense(defense_job(methods.load("defense", method), argv, "test"))
            done.append(method)
        except UserError as error:
            _one_line(name, side, method, error)
    print(f"{name} {side}: {', '.join(done)}")


def _one_line(name: str, side: int, what: str, error: UserError) -> None:
    """Say why something does not run; the reason must be one line of words."""
    assert str(error) and "\n" not in str(error)
    print(f"{name} {side}: no {what}: {error}")
