"""Where a policy looks: its decoder's attention to the cells of the pictures, as shares and drawn onto them."""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from act_model import Attention, DecoderLayer
from dataset.batches import Batch
from policy.runner import Policy

PICTURE_WIDTH = 384  # pixels, at least
STRENGTH = 0.6  # of the colours where the attention is greatest


@torch.inference_mode()
def attention(policy: Policy, batch: Batch, steps: int) -> Tensor:
    """Shares (B, C, h, w) of the last decoder layer's attention on each cell of each camera's feature map.

    The mean over its heads and over the first `steps` of the chunk; what lacks to 1 is on the latent and the state.
    """
    assert batch.images is not None
    decoder_layer = policy.model.decoder.layers[-1]
    assert isinstance(decoder_layer, DecoderLayer)
    layer: Attention = decoder_layer.multihead_attn
    inputs: list[tuple[Tensor, ...]] = []
    hook = layer.register_forward_pre_hook(lambda _, given: inputs.append(given))
    try:
        policy.predict(batch.state, batch.images)
    finally:
        hook.remove()
    weights, biases = layer.in_proj_weight.chunk(3)[:2], layer.in_proj_bias.chunk(3)[:2]
    projections = zip(inputs[0][:2], weights, biases, strict=True)  # the query and the key
    q, k = (F.linear(x, w, b).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for x, w, b in projections)
    shares = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, :steps].mean((1, 2))  # (B, N)
    cameras, height = batch.images.shape[1], -(-batch.images.shape[2] // 32)
    return shares[:, 2:].unflatten(1, (cameras, height, -1)).cpu()  # the first two are the latent and the state


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8, several times as large if it is small."""
    times = -(-PICTURE_WIDTH // pixels.shape[1])
    return cv2.resize(pixels, None, fx=times, fy=times, interpolation=cv2.INTER_CUBIC)


def overlay(pixels: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8, enlarged, under the attention (h, w) to it: red where that is greatest."""
    large = enlarged(pixels)
    heat = cv2.resize(shares / shares.max(), large.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    colours = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    strength = STRENGTH * heat[..., None]
    return (large * (1 - strength) + colours * strength).astype(np.uint8)
