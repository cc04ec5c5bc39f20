"""Augmentation: one draw per sample, the same for all its cameras, and the same again in a resumed run."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_dataset import configured, recorded
from test_train import TINY, assert_bit_equal, tiny, trained
from writing import picture

import train
from config import load
from dataset.augment import Augment
from dataset.batches import Batch
from dataset.normalize import Normalizer, imagenet, moments
from faults import Fault

PICTURES = torch.from_numpy(picture(3)).expand(4, 2, 48, 64, 3).contiguous()  # samples, cameras


def augmented(names: list[str]) -> torch.Tensor:
    nothing = torch.zeros(4, 1)
    images = Augment(names, (48, 64))(Batch(nothing, PICTURES, nothing, nothing)).images
    assert images is not None
    return images


@pytest.mark.parametrize("names", [["color"], ["crop"], ["affine"], ["color", "crop", "affine"]])
def test_each_sample_changes_a_little_and_all_its_cameras_alike(names: list[str]) -> None:
    torch.manual_seed(0)
    changed = augmented(names)
    assert changed.shape == PICTURES.shape and changed.dtype == torch.uint8
    assert changed[:, 0].equal(changed[:, 1]) and not changed[0].equal(changed[1])
    difference = (changed.float() - PICTURES).abs().mean((1, 2, 3, 4))
    assert (difference > 0.5).all() and (difference < 60).all()
    torch.manual_seed(0)
    assert augmented(names).equal(changed)
    pixels = Normalizer(moments(np.ones((2, 1))), moments(np.ones((2, 1))), {"a": imagenet(), "b": imagenet()}).images(
        changed
    )
    assert pixels is not None and pixels.flatten(0, 1).is_contiguous(memory_format=torch.channels_last), (
        "as the network reads"
    )


def test_off_by_default_and_only_in_training(tmp_path: Path) -> None:
    path = tiny(recorded(tmp_path), "model.dropout=0", "training.steps=6")
    plain = trained(path, f"output_dir={tmp_path}/plain")
    one = trained(path, "training.augment=[color, affine]", f"output_dir={tmp_path}/whole")
    with pytest.raises(AssertionError):
        assert_bit_equal(plain, one)
    shutil.rmtree(trained(path, "training.augment=[color, affine]"))  # as if it had been killed before the last step
    assert_bit_equal(one, trained(path, "training.augment=[color, affine]"))


def test_a_dry_run_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny(recorded(tmp_path), "training.augment=[color, crop, affine]")
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(path), "--dry-run"])
    train.main()
    assert "augmented pictures: " in capsys.readouterr().out
    sheet = cv2.imread(str(tmp_path / "run/augmented.png"))
    assert sheet is not None and sheet.shape == (32, 8 * 48, 3) and len(np.unique(sheet)) > 20


def test_an_unknown_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"training.augment\[0\]: expected color or crop or affine"):
        load(None, [*TINY, "training.augment=[flip]"])
    assert configured(tmp_path).training.augment == ()
