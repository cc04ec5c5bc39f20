"""The network: what padding, dropout, cameras and shortcuts may change, and what they may not."""

import functools
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from act_model import (
    ACT,
    ACTOutput,
    Attention,
    Dropout,
    Encoder,
    FrozenBatchNorm,
    ResNet18,
    act_loss,
    calibrate_norms,
    load_imagenet_weights,
)
from config import Model

TINY = Model(
    chunk_size=6,
    n_action_steps=6,
    dim_model=32,
    n_heads=4,
    dim_feedforward=48,
    n_encoder_layers=2,
    n_decoder_layers=1,
    use_vae=True,
    latent_dim=4,
    n_vae_encoder_layers=2,
    dropout=0.0,
)


def network(cameras: int = 1, **changes: Any) -> ACT:
    torch.manual_seed(0)
    return ACT(replace(TINY, **changes), state_dim=3, action_dim=2, cameras=cameras)


@pytest.fixture
def torchvision() -> ModuleType:
    """torchvision, also where its CUDA build stands beside a CPU torch and cannot register its operators."""
    try:
        import torchvision
    except RuntimeError:
        for module in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[module]
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        import torchvision
    return torchvision


def test_what_stands_in_the_padding_changes_neither_loss_nor_gradients() -> None:
    model = network(cameras=0).train()
    state, actions = torch.randn(4, 3), torch.randn(4, 6, 2)
    pad = torch.arange(6) >= torch.tensor([6, 4, 1, 3])[:, None]
    results = []
    for filler in (0.0, 1e3):
        torch.manual_seed(1)  # the latent's noise
        filled = actions.masked_fill(pad[..., None], filler)
        model.zero_grad()
        loss, l1, kl = act_loss(model(state, None, filled, pad), filled, pad, kl_weight=10.0)
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([loss, l1, kl, *gradients])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_the_loss_is_a_mean_over_real_entries() -> None:
    pad = torch.tensor([[False, False, True, True], [False, True, True, True]])
    predicted = torch.where(pad[..., None], 100.0, 2.0).expand(2, 4, 5)
    mu, log_sigma_x2 = torch.full((2, 3), 2.0), torch.zeros(2, 3)
    loss, l1, kl = act_loss(ACTOutput(predicted, mu, log_sigma_x2), torch.zeros(2, 4, 5), pad, kl_weight=10.0)
    assert (l1, kl, loss) == (2.0, 6.0, 62.0)  # KL of N(2, 1) to N(0, 1) is 2**2 / 2 for each of three latents

    loss, l1, kl = act_loss(ACTOutput(predicted, None, None), torch.zeros(2, 4, 5), pad, kl_weight=10.0)
    assert (l1, kl, loss) == (2.0, 0.0, 2.0)


def test_only_training_with_actions_samples_the_latent() -> None:
    model = network(cameras=0)
    state, actions = torch.randn(4, 3), torch.randn(4, 6, 2)
    assert model.train()(state, None, actions).mu is not None
    assert model.train()(state, None).mu is None
    evaluated = model.eval()(state, None, actions)
    assert evaluated.mu is None
    assert torch.equal(evaluated.actions, model(state, None).actions)
    without = network(cameras=0, use_vae=False)
    assert without.train()(state, None, actions).mu is None
    assert not any(name.startswith("vae_encoder") for name in without.state_dict())


def test_a_last_layer_for_the_class_token_alone_equals_the_whole_layer() -> None:
    torch.manual_seed(0)
    encoder = Encoder(TINY, 2)
    x, positions, attend = torch.randn(3, 8, 32), torch.randn(8, 32), torch.rand(3, 1, 1, 8) > 0.3
    torch.testing.assert_close(encoder(x, positions, attend, keep=1), encoder(x, positions, attend)[:, :1])


def test_cameras_may_come_in_any_order_but_colours_may_not() -> None:
    model = network(cameras=2).eval()
    state, images = torch.randn(2, 3), torch.randn(2, 2, 3, 40, 56)
    actions = model(state, images).actions
    torch.testing.assert_close(model(state, images.flip(1)).actions, actions)
    assert not torch.allclose(model(state, images.flip(2)).actions, actions, atol=1e-3)
    interleaved = images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)  # as bytes come from the cache
    torch.testing.assert_close(model(state, interleaved).actions, actions)


def test_dropout_has_its_rate_and_scale_and_follows_the_seed() -> None:
    dropout, x = Dropout(0.1).train(), torch.ones(1001, 999)
    torch.manual_seed(3)
    first = dropout(x)
    assert (first == 0).double().mean().item() == pytest.approx(0.1, abs=2e-3)
    assert first.mean().item() == pytest.approx(1.0, abs=2e-3)
    assert len(first.unique()) == 2
    assert not torch.equal(dropout(x), first)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first)
    assert torch.equal(dropout.eval()(x), x)


def test_attention_with_dropout_agrees_on_average_with_attention_without() -> None:
    torch.manual_seed(0)
    attention = Attention(32, heads=4, dropout=0.3)
    x = torch.randn(1, 5, 32)
    expected = attention.eval()(x, x, x)
    many = attention.train()(*[x.expand(20_000, -1, -1)] * 3).mean(0, keepdim=True)
    torch.testing.assert_close(many, expected, atol=0.02, rtol=0)


def test_resnet_is_torchvisions(torchvision: ModuleType) -> None:
    torch.manual_seed(0)
    norm = torchvision.ops.misc.FrozenBatchNorm2d
    theirs, ours = torchvision.models.resnet18(norm_layer=norm), ResNet18()
    for module in theirs.modules():
        if isinstance(module, norm):
            for buffer in (module.weight, module.running_var):
                buffer.uniform_(0.5, 1.5)
            for buffer in (module.bias, module.running_mean):
                buffer.normal_()
    theirs.fc = theirs.avgpool = torch.nn.Identity()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 70, 90)
    torch.testing.assert_close(ours(images).flatten(1), theirs(images), rtol=1e-4, atol=1e-4)


def test_imagenet_weights_come_from_torchvisions_cache(
    torchvision: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    file = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    weights = torchvision.models.resnet18().state_dict()  # as downloaded: with fc and num_batches_tracked
    torch.save(weights, file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = network()
    load_imagenet_weights(model)
    loaded = model.backbone.state_dict()
    assert loaded.keys() == {name for name in weights if "fc." not in name and "num_batches" not in name}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())


def test_a_frozen_norm_is_saved_but_not_trained() -> None:
    norm = FrozenBatchNorm(4)
    assert not list(norm.parameters())
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var"}


def test_calibrated_norms_are_what_a_batch_norm_measures(torchvision: ModuleType) -> None:
    theirs, ours = (
        torchvision.models.resnet18(norm_layer=functools.partial(torch.nn.BatchNorm2d, momentum=1.0)),
        ResNet18(),
    )
    theirs.load_state_dict(ours.state_dict(), strict=False)
    images = torch.randn(8, 3, 128, 192)
    calibrate_norms(ours, images)
    expected = torch.nn.Sequential(*list(theirs.train().children())[:-2])(images)
    measured = [value for name, value in theirs.state_dict().items() if "running" in name]
    calibrated = [value for name, value in ours.state_dict().items() if "running" in name]
    assert len(calibrated) == 40
    for mine, other in zip(calibrated, measured, strict=True):
        assert torch.allclose(mine, other, rtol=0.02, atol=0.01), "front to back"
    assert (ours(images) - expected).abs().mean() < 0.02 * expected.abs().mean(), "and they are used"
