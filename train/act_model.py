"""The ACT policy network and its loss: an observation in, a chunk of future actions out.

ACT (Zhao et al. 2023, arXiv:2304.13705) is a conditional VAE around a DETR-style Transformer (Carion et al. 2020,
arXiv:2005.12872) over ResNet-18 features (He et al. 2015, arXiv:1512.03385). Function, initialization and state names
are LeRobot's ACT's, so weights can be exchanged in both directions; ResNet-18 has torchvision's state names.

Shapes: B batch, T chunk, C cameras, S state, A action, D width, L latent, N tokens, H W image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from config import Model

IMAGENET_WEIGHTS = "https://download.pytorch.org/models/resnet18-f37072fd.pth"  # torchvision's

# MKL's vector functions choose their accuracy at a process's first call. If two threads make it at once, one may compute
# to only 1e-4, and runs differ. So the first call is here.
torch.zeros(1).sin()


class ACTOutput(NamedTuple):
    """The network's output: a normalized chunk and, from the VAE encoder in training, the latent's distribution."""

    actions: Tensor  # (B, T, A)
    mu: Tensor | None  # (B, L)
    log_sigma_x2: Tensor | None  # (B, L), the logarithm of the variance


class ACT(nn.Module):
    """Action Chunking Transformer; with `cameras == 0` it sees only the state and has no backbone."""

    vae_encoder_pos_enc: Tensor

    def __init__(self, config: Model, state_dim: int, action_dim: int, cameras: int) -> None:
        super().__init__()
        width = config.dim_model
        self.latent_dim = config.latent_dim
        self.use_vae = config.use_vae

        if config.use_vae:
            self.vae_encoder = Encoder(config, config.n_vae_encoder_layers)
            self.vae_encoder_cls_embed = nn.Embedding(1, width)
            self.vae_encoder_robot_state_input_proj = nn.Linear(state_dim, width)
            self.vae_encoder_action_input_proj = nn.Linear(action_dim, width)
            self.vae_encoder_latent_output_proj = nn.Linear(width, 2 * config.latent_dim)
            steps = torch.arange(config.chunk_size + 2, dtype=torch.float64)
            self.register_buffer("vae_encoder_pos_enc", sinusoid(steps, width)[None].float())

        if cameras:
            self.backbone = ResNet18()
            self.encoder_img_feat_input_proj = nn.Conv2d(512, width, kernel_size=1)
        self.encoder_latent_input_proj = nn.Linear(config.latent_dim, width)
        self.encoder_robot_state_input_proj = nn.Linear(state_dim, width)
        self.encoder_1d_feature_pos_embed = nn.Embedding(2, width)  # of the latent and of the state
        self.encoder = Encoder(config, config.n_encoder_layers)
        self.decoder = Decoder(config, config.n_decoder_layers)
        self.decoder_pos_embed = nn.Embedding(config.chunk_size, width)
        self.action_head = nn.Linear(width, action_dim)

        for parameter in [*self.encoder.parameters(), *self.decoder.parameters()]:
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        state: Tensor,
        images: Tensor | None,
        actions: Tensor | None = None,
        action_is_pad: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> ACTOutput:
        """Predict the chunk (B, T, A) from state (B, S) and images (B, C, 3, H, W), all normalized.

        In training the latent is drawn, with standard normal `noise` (B, L) if given, from the VAE encoder's
        distribution for `actions` (B, T, A), where `action_is_pad` (B, T) marks steps past the episode's end. Otherwise
        it is zero, the prior's mean.
        """
        mu = log_sigma_x2 = None
        latent = state.new_zeros(len(state), self.latent_dim)
        if self.training and self.use_vae and actions is not None:
            mu, log_sigma_x2 = self.encode_actions(state, actions, action_is_pad)
            latent = mu + (log_sigma_x2 / 2).exp() * (torch.randn_like(mu) if noise is None else noise)

        tokens = torch.stack([self.encoder_latent_input_proj(latent), self.encoder_robot_state_input_proj(state)], 1)
        positions = self.encoder_1d_feature_pos_embed.weight
        if images is not None:
            pixels, pixel_positions = self.encode_images(images)
            tokens = torch.cat([tokens, pixels], 1)
            positions = torch.cat([positions, pixel_positions])

        memory = self.encoder(tokens, positions)
        chunk = self.decoder(memory, positions, self.decoder_pos_embed.weight)
        return ACTOutput(self.action_head(chunk), mu, log_sigma_x2)

    def encode_actions(self, state: Tensor, actions: Tensor, action_is_pad: Tensor | None) -> tuple[Tensor, Tensor]:
        """The latent's mean and log variance, (B, L) each, given the actions."""
        tokens = torch.cat(
            [
                self.vae_encoder_cls_embed.weight.expand(len(state), 1, -1),
                self.vae_encoder_robot_state_input_proj(state)[:, None],
                self.vae_encoder_action_input_proj(actions),
            ],
            1,
        )
        attend = None  # (B, 1, 1, T + 2), True where a token takes part in attention
        if action_is_pad is not None:
            attend = F.pad(~action_is_pad, (2, 0), value=True)[:, None, None]
        summary = self.vae_encoder(tokens, self.vae_encoder_pos_enc[0], attend, keep=1)[:, 0]
        mu, log_sigma_x2 = self.vae_encoder_latent_output_proj(summary).float().chunk(2, -1)
        return mu, log_sigma_x2

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """One token for each cell of each camera's feature map (B, N, D), and their positions (N, D)."""
        batch, cameras = images.shape[:2]
        features = self.encoder_img_feat_input_proj(self.backbone(images.flatten(0, 1)))
        height, width = features.shape[-2:]
        tokens = features.permute(0, 2, 3, 1).reshape(batch, cameras * height * width, -1)
        positions = image_positions if torch.compiler.is_compiling() else cached_image_positions
        return tokens, positions(height, width, features.shape[1], features.device).repeat(cameras, 1)


def act_loss(
    output: ACTOutput, actions: Tensor, action_is_pad: Tensor, kl_weight: float, real_steps: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its two terms: L1 over the real entries of actions (B, T, A), and the KL divergence to N(0, 1).

    If several processes share a batch, `real_steps` () is their mean number of real steps: the mean of their losses is
    then the loss of the whole batch.
    """
    real = ~action_is_pad[..., None]
    if real_steps is None:
        real_steps = real.sum()
    l1 = ((output.actions - actions).abs() * real).sum() / (real_steps * actions.shape[-1]).clamp_min(1)
    if output.mu is None or output.log_sigma_x2 is None:
        return l1, l1, torch.zeros_like(l1)
    kl = 0.5 * (output.mu**2 + output.log_sigma_x2.exp() - 1 - output.log_sigma_x2).sum(-1).mean()
    return l1 + kl_weight * kl, l1, kl


def load_imagenet_weights(model: ACT) -> None:
    """Load torchvision's ImageNet weights into the backbone, from torch's folder of downloads or the network.

    Raises what reading or the download raises (OSError, RuntimeError, and others for a damaged file).
    """
    weights = torch.hub.load_state_dict_from_url(
        IMAGENET_WEIGHTS, progress=False, check_hash=True, map_location="cpu", weights_only=True
    )
    unused = ("fc.", "num_batches_tracked")
    model.backbone.load_state_dict({k: v for k, v in weights.items() if not any(part in k for part in unused)})


def sinusoid(position: Tensor, width: int) -> Tensor:
    """Sines and cosines, interleaved, of `position` (N,) at `width / 2` frequencies: (N, width)."""
    half = torch.arange(width // 2, dtype=position.dtype, device=position.device)
    angle = position[:, None] / 10000 ** (2 * half / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def image_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """DETR's position of each cell of a feature map, row by row: half of its channels for y, half for x: (N, D)."""
    y, x = (
        sinusoid(torch.arange(1, size + 1, device=device) * (2 * math.pi / (size + 1e-6)), channels // 2)
        for size in (height, width)
    )
    return torch.cat([y[:, None].expand(-1, width, -1), x.expand(height, -1, -1)], -1).flatten(0, 1)


cached_image_positions = functools.lru_cache(maxsize=8)(image_positions)  # a compiler cannot see through a cache


class Encoder(nn.Module):
    """Transformer encoder."""

    def __init__(self, config: Model, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(layers))

    def forward(self, x: Tensor, positions: Tensor, attend: Tensor | None = None, keep: int | None = None) -> Tensor:
        """Encode tokens (B, N, D) at positions (N, D); of the last layer only the first `keep` tokens are computed."""
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x, positions, attend, keep if i == last else None)
        return x


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each followed by its norm."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        width = config.dim_model
        self.self_attn = Attention(width, config.n_heads, config.dropout)
        self.linear1 = nn.Linear(width, config.dim_feedforward)
        self.linear2 = nn.Linear(config.dim_feedforward, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor, attend: Tensor | None, keep: int | None) -> Tensor:
        key = x + positions
        query = key[:, :keep]
        x = self.norm1(x[:, :keep] + self.dropout(self.self_attn(query, key, x, attend)))
        hidden = self.dropout(self.linear1(x).relu())
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class Decoder(nn.Module):
    """Transformer decoder from learned queries; its tokens start as zeros, as DETR's do."""

    def __init__(self, config: Model, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(layers))
        self.norm = nn.LayerNorm(config.dim_model)

    def forward(self, memory: Tensor, memory_positions: Tensor, positions: Tensor) -> Tensor:
        """Decode memory (B, N, D) at memory_positions (N, D) into one token for each of positions (T, D): (B, T, D)."""
        x = memory.new_zeros(len(memory), *positions.shape)
        key = memory + memory_positions
        for layer in self.layers:
            x = layer(x, positions, key, memory)
        return self.norm(x)


class DecoderLayer(nn.Module):
    """Self-attention, attention to the memory and a feed-forward network, each followed by its norm."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        width = config.dim_model
        self.self_attn = Attention(width, config.n_heads, config.dropout)
        self.multihead_attn = Attention(width, config.n_heads, config.dropout)
        self.linear1 = nn.Linear(width, config.dim_feedforward)
        self.linear2 = nn.Linear(config.dim_feedforward, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor, key: Tensor, memory: Tensor) -> Tensor:
        placed = x + positions
        x = self.norm1(x + self.dropout(self.self_attn(placed, placed, x)))
        x = self.norm2(x + self.dropout(self.multihead_attn(x + positions, key, memory)))
        hidden = self.dropout(self.linear1(x).relu())
        return self.norm3(x + self.dropout(self.linear2(hidden)))


class Attention(nn.Module):
    """Multi-head attention with the state names of nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.dropout = Dropout(dropout)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, N, D) as (B, heads, N, D / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None = None) -> Tensor:
        """Let query (B, M, D) look at key and value (B, N, D) where attend, if given, is true."""
        bias_q, bias_k, bias_v = self.in_proj_bias.chunk(3)
        # the softmax cancels the key's bias: its gradient is rounding noise, which AdamW would follow
        weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3)
        q = self.split_heads(F.linear(query, weight_q, bias_q))
        k = self.split_heads(F.linear(key, weight_k, bias_k.detach()))
        v = self.split_heads(F.linear(value, weight_v, bias_v))
        if query.device.type == "cpu":  # its fused kernel has no dropout, and takes two to seven times as long
            scores = (q * q.shape[-1] ** -0.5) @ k.mT
            if attend is not None:
                scores = scores.masked_fill(~attend, -math.inf)
            out = self.dropout(scores.softmax(-1)) @ v
        else:
            rate = self.dropout.rate if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attend, rate)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Dropout(nn.Module):
    """Dropout; on a CPU its mask uses 16 random bits per element, which takes a quarter of F.dropout's time."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not self.training or self.rate == 0:
            return F.dropout(x, self.rate, self.training)
        dropped = round(self.rate * 2**16)  # of 2**16 equally likely values
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        keep = bits[: x.numel()].view(x.shape) >= dropped - 2**15
        return x * keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))


class ResNet18(nn.Module):
    """ResNet-18 without its classifier: images (B, 3, H, W) to features (B, 512, H / 32, W / 32), rounded up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = FrozenBatchNorm(64)
        self.layer1 = nn.Sequential(Block(64, 64, 1), Block(64, 64, 1))
        self.layer2 = nn.Sequential(Block(64, 128, 2), Block(128, 128, 1))
        self.layer3 = nn.Sequential(Block(128, 256, 2), Block(256, 256, 1))
        self.layer4 = nn.Sequential(Block(256, 512, 2), Block(512, 512, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, convolve: Convolve | None = None) -> Tensor:
        convolve = convolve or normed_conv
        x = F.max_pool2d(
            convolve(x, self.conv1, self.bn1), 3, stride=2, padding=1
        ).relu_()  # relu after pooling: the same result from a quarter of the values
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            x = block(x, convolve)
        return x


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = FrozenBatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = FrozenBatchNorm(outputs)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), FrozenBatchNorm(outputs))

    def forward(self, x: Tensor, convolve: Convolve) -> Tensor:
        shortcut = x if self.downsample is None else convolve(x, *self.downsample)
        x = convolve(x, self.conv1, self.bn1).relu_()
        return convolve(x, self.conv2, self.bn2).add_(shortcut).relu_()


class FrozenBatchNorm(nn.Module):
    """The constants of a batch norm that is not trained: the identity until weights are loaded or it is calibrated."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))


Convolve = Callable[[Tensor, nn.Conv2d, FrozenBatchNorm], Tensor]


def normed_conv(x: Tensor, conv: nn.Conv2d, norm: FrozenBatchNorm) -> Tensor:
    """A convolution with its frozen norm folded into weight and bias: saves two passes over the feature map."""
    weight, bias = _folded(conv, norm) if conv.bias is None else (conv.weight, conv.bias)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


def _folded(conv: nn.Conv2d, norm: FrozenBatchNorm) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + 1e-5).rsqrt()
    return conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


@torch.no_grad()
def calibrate_norms(backbone: ResNet18, images: Tensor) -> None:
    """Let each frozen norm of a backbone with random weights make its channels standard normal over images (N, 3, H, W).

    Without it a small object is seen late or never. As data-dependent initialization: Krähenbühl et al. 2016,
    arXiv:1511.06856.
    """

    def measured(x: Tensor, conv: nn.Conv2d, norm: FrozenBatchNorm) -> Tensor:
        variance, mean = torch.var_mean(F.conv2d(x, conv.weight, None, conv.stride, conv.padding), dim=(0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        return normed_conv(x, conv, norm)

    backbone(images, measured)


def fold_norms(backbone: ResNet18) -> None:
    """Fold the norms into the weights, for a network that is no longer trained or saved."""
    pairs: list[Any] = [(backbone.conv1, backbone.bn1)]
    for block in (module for module in backbone.modules() if isinstance(module, Block)):
        pairs += [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if block.downsample is not None:
            pairs.append(block.downsample)
    for conv, norm in pairs:
        weight, bias = _folded(conv, norm)
        conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
