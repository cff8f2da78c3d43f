"""KELIP, a Korean-English CLIP (Ko and Gu, arXiv 2203.14463): models, losses, weights.

    import kelip
    model, preprocess, tokenizer = kelip.build_model("runs/clip")

    image = preprocess(Image.open("apple.png"))[None]           # [1, 3, 48, 48]
    tokens = tokenizer.encode(["a red apple", "빨간 사과"])        # [2, 77]
    logits_per_image, logits_per_text = model(image, tokens)    # [1, 2], [2, 1]

From top to bottom: the transformer, the image encoder (a ViT in the form of OpenAI's CLIP), KELIP
with its GPT-2 style text encoder, the masked autoencoder of stage 1, the contrastive loss of
stage 2, preprocessing, reading and writing weights, and checks of what is read. Parameters have the
names of OpenAI's CLIP.

To use a trained model, this file and tokenizer.py are enough.

Not included: reading data (data.py), random crops (crops.py), the training loops (train_mae.py,
train_clip.py), and weights of other libraries (extras/convert.py).
"""

import argparse
import contextlib
import functools
import math
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.attention import SDPBackend, sdpa_kernel

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
WHITES = (1, 255, 1023, 4095, 16383, 65535)  # what white may be in images of floats or integers
MAX_ASPECT = 1000  # from here on, preprocess refuses an image: long side / short side


def _preset(patch, resolution, vision, text, embed_dim, vocab_size=98_304, context_length=77):
    """A configuration. vision and text are (width, layers). Heads are 64 wide, as in CLIP."""
    vision_width, vision_layers = vision
    text_width, text_layers = text
    return dict(
        embed_dim=embed_dim, image_resolution=resolution, vision_layers=vision_layers,
        vision_width=vision_width, vision_patch_size=patch, context_length=context_length,
        vocab_size=vocab_size, transformer_width=text_width, transformer_heads=text_width // 64,
        transformer_layers=text_layers)


# ViT-B/32 is the paper's model. "tiny" trains on a laptop, on the demo's emoji. The others are
# CLIP's usual sizes. vocab_size is the paper's "about 98K"; train_clip.py uses its tokenizer's.
PRESETS = {
    "tiny": _preset(16, 48, vision=(320, 4), text=(384, 1), embed_dim=256, vocab_size=4_096),
    "ViT-S/16": _preset(16, 224, vision=(384, 12), text=(384, 12), embed_dim=384),
    "ViT-B/32": _preset(32, 224, vision=(768, 12), text=(512, 12), embed_dim=512),
    "ViT-B/16": _preset(16, 224, vision=(768, 12), text=(512, 12), embed_dim=512),
    "ViT-L/14": _preset(14, 224, vision=(1024, 24), text=(768, 12), embed_dim=768),
}


# ---- the transformer ----

class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP and of KELIP."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


# The other kernels compute 128 positions at a time, and are slower on short sequences.
SHORT_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q, k, v, heads, mask=None, causal=False):
    """Multi-head attention: softmax(q k^T / sqrt(d)) v for each head of width d.

    q [N, M, W], k and v [N, L, W] -> [N, M, W]. mask: None or bool [N, M, L], True where a query
    may attend. causal: a query attends only to its own position and those before it (M = L).
    """
    N, M, W = q.shape
    L, H, d = k.shape[1], heads, W // heads
    q, k, v = (t.view(N, t.shape[1], H, d).transpose(1, 2) for t in (q, k, v))  # [N, H, M or L, d]
    if q.device.type != "cpu":
        if mask is not None:
            mask = mask.unsqueeze(1)                                         # [N, 1, M, L]
        is_short = k.shape[2] <= 64
        with sdpa_kernel(SHORT_KERNELS) if is_short else contextlib.nullcontext():
            x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return x.transpose(1, 2).flatten(2)
    # On a CPU in bfloat16, the fused kernel's backward pass takes five times as long as this.
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))                           # [N * H, M or L, d]
    scores = q @ k.transpose(1, 2) * d ** -0.5                               # [N * H, M, L]
    if causal:
        mask = torch.ones(1, M, M, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        mask = mask.view(-1, 1, M, L)                                        # [1 or N, 1, M, L]
        scores = scores.view(N, H, M, L).masked_fill(~mask, float("-inf"))
    weights = scores.view(N * H, M, L).softmax(-1, dtype=v.dtype)            # [N * H, M, L]
    return (weights @ v).view(N, H, M, d).transpose(1, 2).flatten(2)         # [N, M, H * d]


def ceil_div(a, b):
    """a / b rounded up, for integers."""
    return (a + b - 1) // b


class Packing(NamedTuple):
    """How N sequences of different lengths are concatenated without their padding.

    Captions have 6 to 25 tokens of 77, so most of a padded tensor [N, L, W] would be padding. A
    packed tensor [T, W] holds only the tokens, one sequence after the other. Only attention needs
    the padded form.
    """
    index: torch.Tensor     # int64 [T], the position of each packed token among the N * L padded
    is_token: torch.Tensor  # bool [N, L], False at padding
    last: torch.Tensor      # int64 [N], the position in [T] of each sequence's last token

    def unpack(self, x):
        """[T, W] -> [N, L, W], zeros at padding."""
        N, L = self.is_token.shape
        padded = x.new_zeros(N * L, x.shape[-1])
        return padded.index_copy(0, self.index, x).view(N, L, -1)

    def pack(self, x):
        """[N, L, W] -> [T, W]."""
        return x.flatten(0, 1).index_select(0, self.index)


def make_packing(lengths, L, device):
    """The Packing of sequences of these lengths: int64 [N], on the CPU, each at most L."""
    is_token = torch.arange(L) < lengths[:, None]                            # [N, L]
    tokens = is_token.flatten().nonzero()[:, 0]
    padding = is_token.flatten().logical_not().nonzero()[:, 0]
    # Matrix libraries prepare a kernel for each new shape, so T is rounded up to a multiple of 64.
    # The extra rows are padding, which nothing reads.
    T = ceil_div(len(tokens), 64) * 64
    index = torch.cat([tokens, padding])[:T]
    last = lengths.cumsum(0) - 1
    return Packing(*(t.to(device, non_blocking=True) for t in (index, is_token, last)))


class Attention(nn.Module):
    """Multi-head self-attention, with the parameter names and shapes of nn.MultiheadAttention."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, packing=None):
        """x [N, L, W] -> [N, L, W]; with packing, [T, W] -> [T, W]."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)            # [N, L, 3W]
        if packing:
            qkv = packing.unpack(qkv)                                        # [T, 3W] -> [N, L, 3W]
        x = attend(*qkv.chunk(3, dim=-1), self.heads, causal=self.causal)    # [N, L, W]
        if packing:
            x = packing.pack(x)                                              # [T, W]
        return self.out_proj(x)

    def forward_one(self, x, query, packing=None):
        """The output for one query per sequence, which attends to all tokens of its sequence.

        CLIP reads one token per sequence, so its last block computes only that one. x [N, L, W], or
        packed [T, W]; query [N, W] -> [N, W].
        """
        W = query.shape[-1]
        w_q, w_kv = self.in_proj_weight.split((W, 2 * W))
        b_q, b_kv = self.in_proj_bias.split((W, 2 * W))
        q = F.linear(query, w_q, b_q)[:, None]                               # [N, 1, W]
        kv = F.linear(x, w_kv, b_kv)                                         # [N, L, 2W]
        mask = None
        if packing:
            kv = packing.unpack(kv)                                          # [T, 2W] -> [N, L, 2W]
            mask = packing.is_token[:, None]                                 # [N, 1, L]
        x = attend(q, *kv.chunk(2, dim=-1), self.heads, mask)                # [N, 1, W]
        return self.out_proj(x[:, 0])


class Block(nn.Module):
    """A pre-LayerNorm residual block: x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, width, heads, causal, mlp_width, activation):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, mlp_width))
        self.mlp.add_module("gelu", ACTIVATIONS[activation]())
        self.mlp.add_module("c_proj", nn.Linear(mlp_width, width))

    def forward(self, x, packing=None):
        """x [N, L, W] -> [N, L, W]; with packing, [T, W] -> [T, W]."""
        x = x + self.attn(self.ln_1(x), packing)
        return x + self.mlp(self.ln_2(x))

    def forward_one(self, x, token, packing=None):
        """The output at one token per sequence: x[token] is [N, W] and so is the result."""
        normed = self.ln_1(x)
        x = x[token] + self.attn.forward_one(normed, normed[token], packing)  # [N, W]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, initialized as in GPT-2.

    Weights that write into the residual stream are scaled by 1/sqrt(2 x layers), so that the sum
    over all blocks starts at the scale of one. Raises ValueError when heads do not divide the
    width.
    """

    def __init__(self, width, layers, heads, causal, mlp_width=None, activation="quick_gelu"):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a transformer of width {width} cannot have {heads} heads: "
                             "the number of heads must divide the width")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r}: choose from {', '.join(ACTIVATIONS)}")
        self.resblocks = nn.ModuleList(
            Block(width, heads, causal, mlp_width or 4 * width, activation) for _ in range(layers))
        residual_std = width ** -0.5 * (2 * layers) ** -0.5
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def forward(self, x):
        """x [N, L, W] -> [N, L, W]."""
        for block in self.resblocks:
            x = block(x)
        return x

    def forward_one(self, x, token, packing=None):
        """forward(x)[token], without computing the other tokens in the last block.

        x [N, L, W], or packed [T, W]; token: an index such that x[token] is [N, W].
        """
        for block in self.resblocks[:-1]:
            x = block(x, packing)
        return self.resblocks[-1].forward_one(x, token, packing)


# ---- the image encoder ----

class VisionTransformer(nn.Module):
    """A ViT in the form of OpenAI's CLIP: images [N, 3, size, size] -> features [N, embed_dim].

    Patch convolution without bias, class embedding, learned positions, LayerNorm before and after
    the blocks, projection without bias. Raises ValueError when the patch does not divide the
    resolution.
    """

    def __init__(self, resolution, patch_size, width, layers, heads, embed_dim, **block):
        super().__init__()
        if resolution % patch_size:
            raise ValueError(f"image_resolution {resolution} is not a multiple of "
                             f"vision_patch_size {patch_size}")
        self.resolution, self.patch_size = resolution, patch_size
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        scale = width ** -0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        # Initialize positions at the scale of the patch embeddings. With CLIP's 1/sqrt(width), a
        # run of a thousand steps spends a third of them on growing the positions.
        n_positions = (resolution // patch_size) ** 2 + 1
        self.positional_embedding = nn.Parameter(1.5 * torch.randn(n_positions, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, causal=False, **block)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))
        nn.init.normal_(self.conv1.weight, std=(3 * patch_size ** 2) ** -0.5)

    def forward(self, images):
        x = self.patchify(images).to(self.conv1.weight.dtype)                # [N, g*g, 3*P*P]
        positions = self.positions(images)                                   # [1 + g*g, W]
        x = self.embed(x, positions[0], positions[1:])                       # [N, 1 + g*g, W]
        class_token = (slice(None), 0)                                       # x[:, 0]
        x = self.transformer.forward_one(self.ln_pre(x), class_token)        # [N, W]
        return self.ln_post(x) @ self.proj                                   # [N, embed_dim]

    def positions(self, images):
        """Position embeddings for images of this size, the class token's first: [1 + g*g, W]."""
        grid = images.shape[-1] // self.patch_size
        return interpolate_positions(self.positional_embedding, grid)

    def embed(self, patches, class_position, patch_positions):
        """Embed the class token and patches, before ln_pre: [N, 1 + L, W].

        patches [N, L, 3*P*P], class_position [W], patch_positions [L, W] for all images or
        [N, L, W].
        """
        class_token = self.class_embedding + class_position                  # [W]
        # A convolution with stride equal to its kernel size is a matrix product over patches.
        x = F.linear(patches, self.conv1.weight.flatten(1)) + patch_positions  # [N, L, W]
        # x.shape[0] and not len(x), which traces and exports would keep as a constant.
        return torch.cat([class_token.expand(x.shape[0], 1, -1), x], dim=1)  # [N, 1 + L, W]

    def patchify(self, images):
        """Cut images [N, 3, size, size] into patches [N, g*g, 3*P*P].

        The pixels of a patch are ordered as in conv1's kernel: channel, row, column. Raises
        TypeError or ValueError when images are of another type or shape.
        """
        P = self.patch_size
        _check_images(images, P)
        N, C, H, _ = images.shape
        g = H // P
        x = images.view(N, C, g, P, g, P).permute(0, 2, 4, 1, 3, 5)          # [N, g, g, 3, P, P]
        return x.reshape(N, g * g, C * P * P)

    def unpatchify(self, patches):
        """The inverse of patchify: [N, g*g, 3*P*P] -> [N, 3, g*P, g*P]."""
        N, L, _ = patches.shape
        g, P = math.isqrt(L), self.patch_size
        x = patches.view(N, g, g, 3, P, P).permute(0, 3, 1, 4, 2, 5)         # [N, 3, g, P, g, P]
        return x.reshape(N, 3, g * P, g * P)


def interpolate_positions(positions, grid):
    """Resize the position embeddings of a square patch grid: [1 + g*g, W] -> [1 + grid*grid, W].

    The class token's position comes first and is kept. The others are interpolated bicubically with
    the scale factor (grid + 0.1) / g, as in KELIP's released code. Interpolating to `size=grid`
    returns other values, which change the features.
    """
    g = math.isqrt(len(positions) - 1)
    if grid == g:
        return positions
    patches = positions[1:].T.reshape(1, -1, g, g)                           # [1, W, g, g]
    patches = F.interpolate(patches, scale_factor=(grid + 0.1) / g, mode="bicubic")
    return torch.cat([positions[:1], patches.flatten(2)[0].T])               # [1 + grid*grid, W]


def _check_images(images, patch_size):
    """Raise TypeError or ValueError unless images are float [N, 3, size, size] of complete patches.
    """
    if not torch.is_tensor(images) or not images.is_floating_point():
        found = images.dtype if torch.is_tensor(images) else type(images).__name__
        raise TypeError(f"images are {found}: the image encoder takes normalized floats "
                        "[N, 3, size, size], as preprocess returns them for one image")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images of shape {list(images.shape)}: the image encoder takes "
                         "[N, 3, size, size]; image[None] makes a batch of one image")
    H, W = images.shape[2:]
    if H % patch_size or W % patch_size or H != W:
        raise ValueError(f"images of {W} x {H} pixels: the image encoder takes squares whose side "
                         f"is a multiple of {patch_size} pixels")


# ---- KELIP ----

def l2_normalize(x):
    """Scale x [N, D] to unit length, in at least float32: cosines need more than half precision."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class KELIP(nn.Module):
    """A bilingual CLIP: an image encoder and a GPT-2 style text encoder into one space.

    KELIP(**PRESETS["ViT-B/32"]) builds the paper's model. model.config holds these arguments. The
    last four are for weights of other CLIPs. Their defaults are QuickGELU, heads of width 64, and
    MLPs of four times the width; model.config holds only other values.
    """

    def __init__(self, *, embed_dim, image_resolution, vision_layers, vision_width,
                 vision_patch_size, context_length, vocab_size, transformer_width,
                 transformer_heads, transformer_layers, activation="quick_gelu",
                 vision_heads=None, vision_mlp_width=None, transformer_mlp_width=None):
        super().__init__()
        self.config = dict(
            embed_dim=embed_dim, image_resolution=image_resolution, vision_layers=vision_layers,
            vision_width=vision_width, vision_patch_size=vision_patch_size,
            context_length=context_length, vocab_size=vocab_size,
            transformer_width=transformer_width, transformer_heads=transformer_heads,
            transformer_layers=transformer_layers)
        options = default_options(self.config)
        given = dict(activation=activation, vision_heads=vision_heads,
                     vision_mlp_width=vision_mlp_width, transformer_mlp_width=transformer_mlp_width)
        for key, value in given.items():
            if value not in (None, options[key]):
                options[key] = self.config[key] = value

        self.visual = VisionTransformer(
            image_resolution, vision_patch_size, vision_width, vision_layers,
            options["vision_heads"], embed_dim,
            mlp_width=options["vision_mlp_width"], activation=activation)
        self.transformer = Transformer(
            transformer_width, transformer_layers, transformer_heads, causal=True,
            mlp_width=options["transformer_mlp_width"], activation=activation)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        # Embeddings start at a quarter of CLIP's 0.01 and 0.02, so that the output of the blocks is
        # not small in comparison.
        self.positional_embedding = nn.Parameter(
            0.0025 * torch.randn(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(
            transformer_width ** -0.5 * torch.randn(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))    # its log, as in CLIP
        nn.init.normal_(self.token_embedding.weight, std=0.005)

    def encode_image(self, image, l2norm=False):
        """image [N, 3, size, size], normalized by MEAN and STD -> features [N, embed_dim].

        l2norm: scale features to unit length. size: any multiple of the patch size; positions are
        interpolated.
        """
        x = self.visual(image)
        return l2_normalize(x) if l2norm else x

    def encode_text(self, text, l2norm=False):
        """text [N, L], token ids from Tokenizer.encode -> features [N, embed_dim].

        L is at most context_length. The feature is that of the end-of-text token, which argmax
        finds because its id is the highest:

            x = token_embedding(text) + positional_embedding[:L]             # [N, L, W]
            x = ln_final(transformer(x))                                     # [N, L, W]
            return x[arange(N), text.argmax(-1)] @ text_projection           # [N, embed_dim]

        Attention is causal, so the padding after that token has no effect. This method returns the
        same features without computing padding. Keep text on the CPU even if the model is on a GPU:
        the lengths are needed there, and copying them back would wait for the GPU.
        """
        _check_tokens(text, len(self.positional_embedding), len(self.token_embedding.weight))
        text = text.cpu()
        device = self.positional_embedding.device
        lengths = text.argmax(dim=-1) + 1                                    # [N]
        longest = ceil_div(int(lengths.max()), 8) * 8  # a multiple of 8: fewer different shapes
        L = min(text.shape[1], longest)
        packing = make_packing(lengths, L, device)
        tokens = text[:, :L].flatten().to(device, non_blocking=True)         # [N * L]
        tokens = tokens[packing.index]                                       # [T]
        x = self.token_embedding(tokens)                                     # [T, W]
        # Not by indexing, whose gradient adds in another order each time, on several CPU threads.
        x = x + F.embedding(packing.index % L, self.positional_embedding)    # [T, W]
        x = self.transformer.forward_one(x, packing.last, packing)           # [N, W]
        x = self.ln_final(x) @ self.text_projection                          # [N, embed_dim]
        return l2_normalize(x) if l2norm else x

    def forward(self, image, text):
        """image [N, 3, size, size], text [M, L] -> logits per image [N, M] and per text [M, N]."""
        image_features = self.encode_image(image, l2norm=True)
        text_features = self.encode_text(text, l2norm=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.T
        return logits_per_image, logits_per_image.T


def _check_tokens(text, context_length, vocab_size):
    """Raise TypeError or ValueError unless text is token ids [N, L], with L <= context_length.

    Ids are compared with vocab_size on the CPU alone: elsewhere, it would wait for the device.
    """
    if not torch.is_tensor(text) or text.dtype not in (torch.int64, torch.int32):
        found = text.dtype if torch.is_tensor(text) else type(text).__name__
        raise TypeError(f"text is {found}: the text encoder takes token ids, int64 [N, L]; "
                        "tokenizer.encode(texts) makes them")
    if text.ndim != 2 or 0 in text.shape:
        raise ValueError(f"text of shape {list(text.shape)}: the text encoder takes token ids "
                         "[N, L]; tokenizer.encode(texts) makes them")
    if text.shape[1] > context_length:
        raise ValueError(f"text of {text.shape[1]} tokens: context_length is {context_length}")
    if text.device.type == "cpu":
        lowest, highest = text.aminmax()
        if lowest < 0 or highest >= vocab_size:
            raise ValueError(f"text has token ids from {lowest} to {highest}: those of the model "
                             f"are from 0 to {vocab_size - 1}; is it another model's tokenizer?")


def default_options(config):
    """The defaults of KELIP's optional arguments for a configuration."""
    return dict(activation="quick_gelu", vision_heads=config["vision_width"] // 64,
                vision_mlp_width=4 * config["vision_width"],
                transformer_mlp_width=4 * config["transformer_width"])


def count_parameters(module):
    """The number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


# ---- stage 1: masked autoencoder ----

class MAE(nn.Module):
    """A masked autoencoder (He et al., arXiv 2111.06377) around an image encoder.

    The encoder, up to ln_post, sees the class token and the visible patches. A smaller decoder,
    used only here, predicts the pixels of every patch. The loss is the mean squared error on masked
    patches alone. Each target patch is normalized by its own mean and standard deviation.
    visual.proj is not used. Methods have the names of the authors' code. Raises ValueError when
    mask_ratio masks no patch or all.
    """

    def __init__(self, visual, mask_ratio=0.75):
        super().__init__()
        encoder_width = visual.conv1.out_channels
        grid = visual.resolution // visual.patch_size
        n_patches = grid ** 2
        if not 0 < mask_ratio < 1 or round(n_patches * (1 - mask_ratio)) in (0, n_patches):
            raise ValueError(f"mask_ratio {mask_ratio} of {n_patches} patches: at least one patch "
                             "must be masked, and one visible")
        # Half of the encoder, at most He et al.'s decoder for ViT-B and ViT-L: width 512, 8 layers.
        width = min(512, max(64, encoder_width // 2 // 64 * 64))
        layers = min(8, max(2, len(visual.transformer.resblocks) // 2))
        self.visual, self.mask_ratio = visual, mask_ratio
        visual.proj.requires_grad_(False)
        self.decoder_embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.register_buffer("decoder_positions", sine_positions(grid, width), persistent=False)
        self.decoder = Transformer(width, layers, width // 32, causal=False)
        self.decoder_norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, 3 * visual.patch_size ** 2)

    def random_masking(self, noise):
        """Keep the patches with the least noise; mask the others.

        noise [N, L], uniform in 0..1. Returns keep [N, l], the indices of the visible patches,
        l = (1 - mask_ratio) L; restore [N, L], which undoes the shuffle; mask [N, L], 1 if masked.
        """
        L = noise.shape[1]
        n_visible = round(L * (1 - self.mask_ratio))
        shuffle = noise.argsort(dim=1, stable=True)                          # [N, L]
        restore = shuffle.argsort(dim=1)                                     # [N, L]
        return shuffle[:, :n_visible], restore, (restore >= n_visible).float()

    def forward_encoder(self, images, keep):
        """images [N, 3, size, size], keep [N, l] -> [N, 1 + l, W], the class token first."""
        visual = self.visual
        patches = visual.patchify(images).to(visual.conv1.weight.dtype)      # [N, L, 3*P*P]
        # Masked patches are dropped before the embedding, to save its cost.
        patches = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        positions = visual.positions(images)                                 # [1 + L, W]
        patch_positions = F.embedding(keep, positions[1:])  # not positions[1:][keep]: encode_text
        x = visual.embed(patches, positions[0], patch_positions)             # [N, 1 + l, W]
        return visual.ln_post(visual.transformer(visual.ln_pre(x)))

    def forward_decoder(self, latent, restore):
        """latent [N, 1 + l, W], restore [N, L] -> predicted pixels of all patches [N, L, 3*P*P]."""
        x = self.decoder_embed(latent)                                       # [N, 1 + l, D]
        N, L, D = *restore.shape, x.shape[-1]
        n_masked = L + 1 - x.shape[1]
        masked = self.mask_token.to(x.dtype).expand(N, n_masked, D)
        patches = torch.cat([x[:, 1:], masked], dim=1)                       # [N, L, D], shuffled
        patches = patches.gather(1, restore.unsqueeze(-1).expand(-1, -1, D))  # [N, L, D], in order
        x = torch.cat([x[:, :1], patches], dim=1)                            # [N, 1 + L, D]
        x = self.decoder(x + self.decoder_positions)
        return self.decoder_pred(self.decoder_norm(x[:, 1:]))                # [N, L, 3*P*P]

    def targets(self, images):
        """images -> normalized patches [N, L, 3*P*P], and their mean and std [N, L, 1] each."""
        x = self.visual.patchify(images)
        mean = x.mean(-1, keepdim=True)
        std = (x.var(-1, keepdim=True) + 1e-6).sqrt()
        return (x - mean) / std, mean, std

    def forward_loss(self, images, prediction, mask, valid=None):
        """Mean squared error on the pixels of masked patches (He et al., section 3)."""
        target, _, _ = self.targets(images)
        error = (prediction.to(images.dtype) - target).square().mean(-1)     # [N, L]
        if valid is not None:
            mask = mask * valid[:, None]
        return (error * mask).sum() / mask.sum().clamp(min=1)

    def forward(self, images, noise=None, valid=None):
        """Mask, encode, decode, and compare.

        images [N, 3, size, size]; noise [N, L], that of random_masking, drawn here if None; valid
        bool [N], False for images that the loss ignores. Returns the loss, the prediction of
        normalized patches [N, L, 3*P*P], and mask [N, L], 1 where masked.
        """
        if noise is None:
            L = len(self.decoder_positions) - 1
            noise = torch.rand(len(images), L, device=images.device)
        keep, restore, mask = self.random_masking(noise)
        latent = self.forward_encoder(images, keep)
        prediction = self.forward_decoder(latent, restore)
        loss = self.forward_loss(images, prediction, mask, valid)
        return loss, prediction, mask


def sine_positions(grid, width):
    """Fixed position embeddings of a square grid: [1 + grid*grid, width].

    The class token's is zero. Half of the width encodes the row and half the column, each as sines
    followed by cosines.
    """
    frequency = 10000 ** -(torch.arange(width // 4) / (width // 4))          # [width/4]
    angle = torch.arange(grid)[:, None] * frequency                          # [grid, width/4]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)                      # [grid, width/2]
    rows = wave[:, None].expand(grid, grid, -1)
    columns = wave[None].expand(grid, grid, -1)
    patches = torch.cat([rows, columns], dim=-1).flatten(0, 1)               # [grid*grid, width]
    return torch.cat([torch.zeros(1, width), patches])


# ---- stage 2: contrastive loss ----

GPU_LOGITS = 1 << 26  # logits at a time on a GPU, 0.3 GB: with fewer, it waits for the CPU


def contrastive_loss(image_features, text_features, logit_scale, group=None, valid=None,
                     per_pair=False, chunk=None, compile=False):
    """InfoNCE between N images and their N texts, in both directions (CLIP, arXiv 2103.00020).

    The definition, as in the paper's figure 3:

        logits = logit_scale * image_features @ text_features.T              # [N, N]
        labels = arange(N)                               # text i belongs to image i: the diagonal
        image_to_text = cross_entropy(logits, labels)
        text_to_image = cross_entropy(logits.T, labels)
        loss = (image_to_text + text_to_image) / 2

    This function returns the same loss and gradients without storing all N x N logits at once.

    Args:
        image_features: [n, D], or [K, n, D] for K crops of each image; the loss is then the mean
            over crops. Both kinds of features must have unit length.
        text_features: [n, D], or [C, n, D] for C captions of each image. Those at index c are then
            a batch of texts of their own, and the loss is the mean over all captions.
        logit_scale: the factor on the cosines, not its log.
        group: a torch.distributed group. The batch is then that of all its processes together,
            N = n * world_size, with the same n on each. Every rank returns the global loss. The
            mean of the ranks' gradients, as DistributedDataParallel computes it, is the gradient.
        valid: bool [n], or [C, n] for C captions, False for pairs that the loss must ignore.
        per_pair: also return the loss of each pair, of the shape of valid, without gradient. The
            mean over all valid pairs is the loss.
        chunk: rows of logits to compute at a time. Memory grows with chunk * N. The default is 512
            on a CPU, and as many as make GPU_LOGITS on a GPU.
        compile: torch.compile what lies between the matrix products: slower to start, faster on
            GPUs.

    Returns a scalar, float32 (float64 for float64 features).
    """
    if image_features.ndim == 2:
        image_features = image_features[None]                                # [K, n, D]
    if text_features.ndim == 3:
        return _loss_of_captions(image_features, text_features, logit_scale, group, valid, per_pair,
                                 chunk, compile)
    loss, per_pair_loss = _ContrastiveLoss.apply(
        image_features, text_features, logit_scale, group, valid, chunk, compile)
    return (loss, per_pair_loss) if per_pair else loss


def _loss_of_captions(image_features, text_features, logit_scale, group, valid, per_pair, *options):
    """contrastive_loss for text_features [C, n, D]: the mean over c, weighted by valid pairs."""
    C, n, _ = text_features.shape
    if valid is None:
        valid = torch.ones(C, n, dtype=torch.bool, device=text_features.device)
    count = _gather(valid.sum(dim=1)[None], group).sum(dim=0)                # [C], of all ranks
    losses, per_pair_losses = zip(*(
        _ContrastiveLoss.apply(image_features, texts, logit_scale, group, is_valid, *options)
        for texts, is_valid in zip(text_features, valid)))
    loss = (torch.stack(losses) * count).sum() / count.sum().clamp(min=1)
    return (loss, torch.stack(per_pair_losses)) if per_pair else loss        # [], [C, n]


class _ContrastiveLoss(torch.autograd.Function):
    """The loss and its gradients, in two passes over chunks of rows of the logits.

    The loss of pair i is (logsumexp of row i + logsumexp of column i) / 2 - logits[i, i]. The first
    pass computes the logsumexps. The second pass computes the logits again, and the gradients. The
    gradient of the sum over pairs with respect to the logits is G / 2, where

        G = softmax over rows + softmax over columns - 2 * identity.

    Since logits = s * images @ texts.T, the gradients of images, texts and s are half of

        s * G @ texts,    s * G.T @ images,    sum(G * (images @ texts.T)).

    A rank computes its own rows of the logits, against the columns of all ranks. The ranks exchange
    the logsumexps of the columns and the gradients of the texts, once for all crops.
    """

    @staticmethod
    def forward(ctx, image, text, scale, group, valid, chunk, compile):
        ctx.dtypes = [t.dtype for t in (image, text, scale)]
        dtype = torch.promote_types(image.dtype, torch.float32)
        image, text, s = (t.detach().to(dtype) for t in (image, text, scale))
        K, n, _ = image.shape
        rank, world_size = 0, 1
        if group is not None:
            rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        own = slice(rank * n, rank * n + n)                                  # this rank's columns
        if valid is None:
            valid = torch.ones(n, device=image.device)
        valid = valid.to(dtype)
        # Zero features of invalid pairs drop out of matrix products. Adding log(0) = -inf to their
        # rows and columns drops them out of the logsumexps.
        image, text = image * valid[:, None], text * valid[:, None]
        texts, all_valid = _gather(text, group), _gather(valid, group)       # [N, D], [N]
        row_mask, column_mask = torch.log(valid), torch.log(all_valid)       # 0 if valid, else -inf
        count = K * all_valid.sum().clamp(min=1)
        if chunk is None:
            chunk = 512 if image.device.type == "cpu" else max(512, GPU_LOGITS // len(texts))
        logsumexps, softmaxes = _logsumexps, _softmaxes
        if compile:
            logsumexps, softmaxes = _compiled(logsumexps), _compiled(softmaxes)
        chunks = [(k, slice(i, min(i + chunk, n))) for k in range(K) for i in range(0, n, chunk)]

        row_lse = image.new_empty(K, n)
        column_lse = image.new_full((K, world_size * n), float("-inf"))      # over this rank's rows
        for k, rows in chunks:
            logits = (s * image[k, rows]) @ texts.T                          # [chunk, N]
            row_lse[k, rows], part = logsumexps(logits, row_mask[rows], column_mask)
            column_lse[k] = torch.logaddexp(column_lse[k], part)
        column_lse = _logsumexp_over_ranks(column_lse, group)                # [K, N], over all rows
        # With +inf here, the softmaxes of invalid rows and columns are zero: exp(logits - inf).
        row_lse.masked_fill_(valid == 0, float("inf"))
        column_lse.masked_fill_(all_valid == 0, float("inf"))
        diagonal = s * (image * text).sum(dim=-1)                            # [K, n]
        losses = (row_lse + column_lse[:, own]) / 2 - diagonal               # [K, n]
        losses = losses.masked_fill(valid == 0, 0)
        loss = _gather(losses.sum()[None], group).sum() / count

        if any(ctx.needs_input_grad[:3]):
            d_image, d_texts, d_scale = torch.empty_like(image), torch.zeros_like(texts), 0
            for k, rows in chunks:
                logits = (s * image[k, rows]) @ texts.T                      # [chunk, N]
                G = softmaxes(logits, row_lse[k, rows], column_lse[k])
                G.diagonal(own.start + rows.start).sub_(2)
                d_image[k, rows] = G @ texts
                d_texts.addmm_(G.T, image[k, rows])
                d_scale = d_scale + (d_image[k, rows] * image[k, rows]).sum()
            if group is not None:
                dist.all_reduce(d_texts, group=group)
            # The 2 is that of G / 2, count makes a mean over pairs and crops, and
            # DistributedDataParallel will divide by world_size.
            mean = world_size / (2 * count)
            per_row = mean * s * valid[:, None]                              # [n, 1]
            ctx.save_for_backward(per_row * d_image, per_row * d_texts[own], mean * d_scale)
        per_pair_loss = losses.mean(dim=0)                                   # [n]
        ctx.mark_non_differentiable(per_pair_loss)
        return loss, per_pair_loss

    @staticmethod
    def backward(ctx, grad, _):
        grads = [(grad * d).to(dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
        return *grads, None, None, None, None


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=True)


def _logsumexps(logits, row_mask, column_mask):
    """The logsumexp of every row, of valid columns, and of every column, of valid rows.

    logits [n, N], row_mask [n], column_mask [N] -> [n], [N].
    """
    logits = logits + column_mask
    return torch.logsumexp(logits, dim=1), torch.logsumexp(logits + row_mask[:, None], dim=0)


def _softmaxes(logits, row_lse, column_lse):
    """Softmax over rows + softmax over columns: logits [n, N] -> [n, N]."""
    return (logits - row_lse[:, None]).exp_() + (logits - column_lse).exp_()


def _logsumexp_over_ranks(x, group):
    """log of the sum over ranks of exp(x), elementwise."""
    if group is None:
        return x
    highest = x.clamp(min=torch.finfo(x.dtype).min)  # -inf - -inf would be NaN
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    total = (x - highest).exp_()
    dist.all_reduce(total, group=group)
    return total.log_().add_(highest)


def _gather(x, group):
    """x [n, ...] of every rank, in the order of ranks: [world_size * n, ...]."""
    if group is None:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


# ---- preprocessing ----

def to_rgb(image):
    """Convert any PIL image to RGB.

    Applies the EXIF orientation, composites transparency onto white, and scales channels of more
    than 8 bits to 8. An animation becomes its first frame. White is 65535 in images of 16 bits.
    In images of floats or of 32-bit integers, which do not say what white is, it is the smallest of
    WHITES that no value exceeds by more than 5 %. Raises ValueError when values are negative or not
    finite.
    """
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        # convert() would clip values at 255.
        white = 65535
        if not image.mode.startswith("I;16"):
            values = np.asarray(image)
            if not np.isfinite(values).all() or values.min() < 0:
                raise ValueError("pixels of the image are negative, infinite or not a number")
            white = next((x for x in WHITES if values.max() <= 1.05 * x), 65535)
        scale = 255 / white
        image = image.convert("F").point(lambda value: value * scale + 0.5).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy


def preprocess(size):
    """Return the transform of evaluation: a callable, PIL image -> float32 [3, size, size].

    Bicubic resize of the short side to size, center crop, normalization by MEAN and STD. Equal to
    torchvision's Resize, CenterCrop, ToTensor and Normalize. The callable raises ValueError when
    one side of the image is MAX_ASPECT times the other or longer: resized, a file of 2 kB with 1 x
    1,000,000 pixels would take gigabytes.
    """
    return functools.partial(_preprocess, size=size)


def _preprocess(image, size):
    if not isinstance(image, Image.Image):
        raise TypeError(f"preprocess takes a PIL image, not {type(image).__name__}: "
                        "PIL.Image.open(path) opens a file")
    if max(image.size) >= MAX_ASPECT * min(image.size):
        w, h = image.size
        raise ValueError(f"extreme aspect ratio: {w:,} x {h:,} pixels, {MAX_ASPECT}:1 or more")
    image = to_rgb(image)
    w, h = image.size
    if min(w, h) != size:
        w, h = (size, int(size * h / w)) if w < h else (int(size * w / h), size)
        image = image.resize((w, h), Image.BICUBIC)
    left, top = round((w - size) / 2), round((h - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3)
    pixels = pixels.permute(2, 0, 1).float() / 255                           # [3, size, size]
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


# ---- weights ----

class Checkpoint(NamedTuple):
    """Trained weights, their configuration and their tokenizer."""
    path: Path
    weights: dict      # parameter name -> tensor
    config: dict       # the arguments of KELIP
    tokenizer: object  # a Tokenizer, None in stage 1

    @property
    def is_stage_1(self):
        """Whether this is a run of train_mae.py, which trains the image encoder alone."""
        return self.tokenizer is None


def build_model(name_or_path="ViT-B/32", device="cpu", model_name=None):
    """Open a trained model: (model in eval mode, preprocess, tokenizer).

    name_or_path: the folder of a run of train_clip.py, which stands for its last.pt, or the path of
    its last.pt or best.pt; a folder with released KELIP (config.json, pytorch_model.bin or
    model.safetensors, tokenizer.json); or the name of a preset, such as "ViT-B/32", to look for
    these files in ./weights. `python -m extras.convert` converts other weights into such a folder.
    model_name is another name of name_or_path, as in the released code.

    Raises FileNotFoundError or ValueError, whose message says what is missing or does not fit.
    """
    checkpoint = open_checkpoint(model_name or name_or_path)
    if checkpoint.is_stage_1:
        raise ValueError(f"{checkpoint.path}: a run of stage 1, which is an image encoder alone; "
                         "start stage 2 from it with `train_clip.py --init`")
    model = KELIP(**checkpoint.config)
    load_weights(model, checkpoint.weights, checkpoint.path)
    model.to(device).eval()
    return model, preprocess(checkpoint.config["image_resolution"]), checkpoint.tokenizer


WEIGHT_FILES = ("last.pt", "pytorch_model.bin", "model.safetensors")
# All keys of a configuration, and those of the text encoder.
DEFAULTS = {**PRESETS["tiny"], **default_options(PRESETS["tiny"])}
TEXT_KEYS = ("context_length", "vocab_size", "transformer_width", "transformer_heads",
             "transformer_layers", "transformer_mlp_width")
NOT_KELIP = ("{0}: neither a run with config and model nor released KELIP with its "
             "config.json; `python -m extras.convert {0} OUT` converts weights of other libraries "
             "into a folder that can be opened")


def open_checkpoint(name_or_path):
    """Read a run of either stage, or released KELIP, without building the model: a Checkpoint.

    name_or_path: that of build_model. Raises FileNotFoundError, or ValueError when the file is
    damaged or from another library, or when its tokenizer does not fit.
    """
    path = _find_weights(name_or_path)
    state = read_weights(path)
    is_run = "config" in state and "model" in state
    checkpoint = read_run(path, state) if is_run else _read_released(path, state)
    if not checkpoint.is_stage_1:
        check_vocabulary(checkpoint)
    return checkpoint


def read_run(path, state):
    """The Checkpoint in a run's last.pt, of which `state` is the content.

    Raises ValueError, with the path and the key, when something is missing or does not fit.
    """
    from tokenizer import Tokenizer, parse_json
    config = entry(state, "config", dict, f"{path}: ")
    config = entry(config, "model", dict, f"{path}: config.")
    weights, tokenizer = entry(state, "model", dict, f"{path}: "), None
    check_weights(weights, path)
    if "tokenizer" in state or "token_embedding.weight" in weights:  # stage 2
        tokenizer = entry(state, "tokenizer", str, f"{path}: ")
        try:
            tokenizer = Tokenizer(parse_json(tokenizer))
        except ValueError as error:
            raise ValueError(f"{path}: tokenizer cannot be read: {error}") from None
    else:  # stage 1 has no text encoder: no weight shows its sizes, and nothing needs them
        config = {**config, **{key: DEFAULTS[key] for key in TEXT_KEYS}}
    check_config(config, weights, path, f"{path}: config.model.", has_text=tokenizer is not None)
    return Checkpoint(path, weights, config, tokenizer)


def _read_released(path, state):
    """The Checkpoint of released KELIP, whose pytorch_model.bin or model.safetensors is `state`."""
    from tokenizer import read_json
    config_path = path.with_name("config.json")
    released = read_json(config_path) if config_path.is_file() else {}
    if "embed_dim" not in released:  # a key that only KELIP's config.json has
        raise ValueError(NOT_KELIP.format(path))
    check_weights(state, path)
    weights = {key.removeprefix("model."): value.float() for key, value in state.items()}
    config = {key: value for key, value in released.items()
              if key in DEFAULTS and value is not None}
    check_config(config, weights, path, f"{config_path}: ")
    return Checkpoint(path, weights, config, _released_tokenizer(path.parent))


def _released_tokenizer(folder):
    """The tokenizer of released KELIP.

    The released code lower-cases texts before it tokenizes them, and reads the start and end tokens
    from three files.
    """
    from tokenizer import Tokenizer, read_json
    spec, special_tokens = Tokenizer.load(folder / "tokenizer.json").spec, {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            special_tokens |= read_json(folder / name)
    normalizer = spec.get("normalizer")
    if "Lowercase" not in str(normalizer):
        steps = [{"type": "Lowercase"}] + ([normalizer] if normalizer else [])
        spec = {**spec, "normalizer": {"type": "Sequence", "normalizers": steps}}
    try:
        return Tokenizer(spec, special_tokens)
    except ValueError as error:
        raise ValueError(f"{folder}: special_tokens_map.json or tokenizer_config.json does not "
                         f"fit tokenizer.json: {error}") from None


def _find_weights(name_or_path):
    """The file of weights for a name or path."""
    path = Path("weights" if name_or_path in PRESETS else os.path.expanduser(name_or_path))
    if path.exists() and not path.is_dir() and path.suffix != ".json":
        return path
    for name in WEIGHT_FILES:
        if (path / name).exists():
            return path / name
    files = [path] if path.is_file() else path.glob("*")
    if any(file.suffix in (".pt", ".bin", ".safetensors", ".json") for file in files):
        raise ValueError(NOT_KELIP.format(path))
    raise FileNotFoundError(
        f"{name_or_path}: no checkpoint there: give the folder of a run (last.pt), a folder with "
        "released KELIP (config.json, pytorch_model.bin or model.safetensors, tokenizer.json), or "
        f"a preset ({', '.join(PRESETS)}), which looks in ./weights")


def init_from(model, checkpoint, new_text=False):
    """Initialize a KELIP from a Checkpoint. Returns a line that says what was loaded.

    From stage 1, only the image encoder is loaded, without visual.proj, which stage 1 does not
    train. new_text: load only the image encoder, from other models, too. Positions are interpolated
    to the model's resolution. Raises ValueError when the weights do not fit.
    """
    weights, what = dict(checkpoint.weights), "all weights"
    if checkpoint.is_stage_1 or new_text:
        encoder = {key: value for key, value in weights.items() if key.startswith("visual.")}
        if checkpoint.is_stage_1:
            encoder["visual.proj"] = model.visual.proj
        weights, what = {**model.state_dict(), **encoder}, "the image encoder"
    key = "visual.positional_embedding"
    if key in weights:
        grid = model.visual.resolution // model.visual.patch_size
        weights[key] = interpolate_positions(weights[key], grid)
    load_weights(model, weights, checkpoint.path)
    return f"{what} from {checkpoint.path}"


def load_weights(model, weights, path, name_in_file=str):
    """Load a state dict into a model. Raises ValueError with the path and the wrong key.

    name_in_file: a function from our name of a parameter to the file's, if they differ.
    """
    check_weights(weights, path)
    own = model.state_dict()
    for key in sorted(own.keys() | weights.keys()):
        if key not in weights:
            raise ValueError(f"{path}: has no {name_in_file(key)}, which the model needs")
        if key not in own:
            raise ValueError(f"{path}: holds {name_in_file(key)}, which the model does not have")
        if own[key].shape != weights[key].shape:
            found, needed = list(weights[key].shape), list(own[key].shape)
            raise ValueError(f"{path}: {name_in_file(key)} is {found}, the model's is {needed}")
    model.load_state_dict(weights)


def read_weights(path):
    """Read a .safetensors file or a file of torch.save. Raises the errors of load_checkpoint."""
    from tokenizer import check_is_file
    if path.suffix != ".safetensors":
        return load_checkpoint(path)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError(f"{path}: reading it needs a package: pip install safetensors") from None
    check_is_file(path)
    try:
        return load_file(path)
    except SafetensorError:
        raise ValueError(f"{path}: {INCOMPLETE}") from None


INCOMPLETE = "not a complete checkpoint: it is damaged, cut short or of another format"


def load_checkpoint(path):
    """Read a dict from a file of torch.save. Only tensors and plain values are ever unpickled.

    The tensors are on the CPU. Raises FileNotFoundError, and ValueError when the file is damaged or
    holds other objects.
    """
    from tokenizer import check_is_file
    check_is_file(path)
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"  # files of torch before 1.6 are not
    try:
        error = error_in_archive(path) if is_zip else None
        if not error:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                error = f"holds {_describe(state)}, where a checkpoint is a dict"
    except pickle.UnpicklingError:  # its message advises an unsafe load
        error = ("holds objects other than tensors and plain values, or is damaged; such objects "
                 "are never loaded")
    except OSError as problem:
        error = f"cannot be read: {problem.strerror}"
    except Exception:  # a damaged file can raise anything
        error = INCOMPLETE
    if error:
        raise ValueError(f"{path}: {error}")
    return state


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values, atomically. An OSError names `path`."""
    from tokenizer import atomic_write
    with atomic_write(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch raises after a full disk or a second Ctrl-C
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise


# ---- checks of weights ----
#
# A file may be damaged, or from anyone. It is checked before anything is built from it.

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes of weights


def check_config(config, weights, path, where, has_text=True):
    """Raise ValueError unless a configuration fits the weights.

    It is compared with their shapes and nothing is built, since a damaged file may ask for a model
    of any size. path: the file of the weights. where: what to print before a key. has_text: whether
    the weights have a text encoder.
    """
    for key, value in config.items():
        if key not in DEFAULTS:
            raise ValueError(f"{where}{_describe(key)} is not a key of KELIP's configuration")
        if key == "activation":
            fits, expected = value in [*ACTIVATIONS], " or ".join(ACTIVATIONS)
        else:
            fits, expected = type(value) is int and value > 0, "a positive integer"
        if not fits:
            raise ValueError(f"{where}{key} is {_describe(value)}, where {expected} is expected")
    for key in PRESETS["tiny"]:
        if key not in config:
            raise ValueError(f"{where}{key} is missing")
    config = {**default_options(config), **config}
    for key, size in read_sizes(path, weights, has_text=has_text).items():
        if config[key] != size:
            raise ValueError(f"{where}{key} is {_describe(config[key])}, and the weights have "
                             f"{size}")
    for encoder in ("vision", "transformer"):
        width, heads = config[f"{encoder}_width"], config[f"{encoder}_heads"]
        if heads < 1 or width % heads:
            raise ValueError(f"{where}{encoder}_heads is {_describe(heads)}, which must divide the "
                             f"width, {width}")


def read_sizes(path, weights, name_in_file=str, has_text=True):
    """The part of KELIP's configuration that the shapes of its weights show.

    name_in_file: that of load_weights. Raises ValueError with the path and the parameter when the
    weights are not those of a CLIP with a ViT.
    """
    def shape(name, dimensions):
        if name not in weights or weights[name].ndim != dimensions:
            raise ValueError(f"{path}: has no {name_in_file(name)} of {dimensions} dimensions, "
                             "which every CLIP with a ViT has")
        return weights[name].shape

    def count_layers(prefix):
        return len({name[len(prefix):].split(".")[0] for name in weights
                    if name.startswith(prefix)})

    vision, text = "visual.transformer.resblocks.", "transformer.resblocks."
    vision_width, _, _, patch = shape("visual.conv1.weight", 4)
    positions = shape("visual.positional_embedding", 2)[0]
    grid = math.isqrt(max(0, positions - 1))
    if grid == 0 or positions != grid ** 2 + 1:
        raise ValueError(f"{path}: {name_in_file('visual.positional_embedding')} has {positions} "
                         "row(s), where a ViT has one for the class token and g x g for patches")
    sizes = dict(
        embed_dim=shape("visual.proj", 2)[1],
        image_resolution=grid * patch,
        vision_layers=count_layers(vision),
        vision_width=vision_width,
        vision_patch_size=patch,
        vision_mlp_width=shape(f"{vision}0.mlp.c_fc.weight", 2)[0])
    if has_text:
        context_length, text_width = shape("positional_embedding", 2)
        sizes |= dict(
            context_length=context_length,
            vocab_size=shape("token_embedding.weight", 2)[0],
            transformer_width=text_width,
            transformer_layers=count_layers(text),
            transformer_mlp_width=shape(f"{text}0.mlp.c_fc.weight", 2)[0])
    return sizes


def check_weights(weights, path):
    """Raise ValueError unless `weights` maps names to dense tensors of floating-point numbers."""
    stored = {}  # address -> bytes of a storage, which several tensors may share
    for name, value in weights.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > 200:
            raise ValueError(f"{path}: {_describe(name)} is not a name of a parameter")
        if type(value) not in (torch.Tensor, nn.Parameter):
            raise ValueError(f"{path}: {name} is {_describe(value)}, where weights are tensors")
        if (value.layout != torch.strided or value.is_nested or value.is_meta
                or value.dtype not in FLOATS):
            raise ValueError(f"{path}: {name} is {value.dtype}, {value.layout}, on {value.device}, "
                             "where weights are dense tensors of floating-point numbers")
        storage = value.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
    # An expanded tensor repeats its elements, so a small file could ask for any amount of memory.
    claimed = sum(value.nbytes for value in weights.values())
    if claimed > 2 * sum(stored.values()):
        raise ValueError(f"{path}: its tensors have {claimed:,} bytes, and it stores "
                         f"{sum(stored.values()):,}")


def check_vocabulary(checkpoint):
    """Raise ValueError when a Checkpoint's tokenizer does not fit its token embedding."""
    rows = len(checkpoint.weights.get("token_embedding.weight", ()))
    tokenizer, entries = checkpoint.tokenizer, len(checkpoint.tokenizer)
    found = (f"{checkpoint.path}: token_embedding.weight has {rows} rows, and the tokenizer "
             f"{entries} entries")
    if 0 < rows < entries:
        raise ValueError(f"{found}: they must fit")
    if tokenizer.eot_id not in (None, entries - 1):
        raise ValueError(f"{found}: the end-of-text token, {tokenizer.eot_id}, must be the last")
    if entries < rows:  # some libraries pad their embedding
        warnings.warn(found, stacklevel=3)


def entry(content, key, kind, where):
    """content[key]. Raises ValueError unless it is of this type. where: what to print before key.
    """
    if key not in content:
        raise ValueError(f"{where}{key} is missing")
    if not isinstance(content[key], kind) or (kind is int and isinstance(content[key], bool)):
        article = "an" if kind is int else "a"
        raise ValueError(f"{where}{key} is {_describe(content[key])}, where {article} "
                         f"{kind.__name__} is expected")
    return content[key]


def _describe(value):
    """A value of a file in a few words. Only plain values are printed: others may be large."""
    if isinstance(value, (int, float, str, type(None))):
        return f"{value!r:.40}"
    return f"a {type(value).__name__}"


def error_in_archive(path):
    """Why a zip archive is not a file of torch.save or numpy.savez, in words; None if it may be.

    They do not compress, so reading an archive takes no more memory than it has bytes. torch.load
    does not compare the checksums in the archive. Comparing them reads the file once, which takes
    about a second per GB.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.filename.endswith("constants.pkl") for record in records):
            return ("a TorchScript archive, which is a program and never run; plain weights are at "
                    "huggingface.co/openai, clip-vit-base-patch32 and others")
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            return "a compressed archive, which torch.save does not write"
        if sum(record.file_size for record in records) > Path(path).stat().st_size:
            return "an archive whose entries overlap, and so a damaged one"
        if archive.testzip():
            return f"{INCOMPLETE}, or torch saved it without checksums"
        return None


# ---- the command ----

def main():
    """Print the presets and the number of parameters of each encoder."""
    argparse.ArgumentParser(
        description="Print the presets of kelip.py and their sizes in millions of parameters. "
                    "--model of train_mae.py and train_clip.py takes their names.").parse_args()
    print(f"{'preset':10} {'image':>7} {'text':>7} {'all':>7}   "
          "(millions of parameters; text includes its embedding)")
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = KELIP(**config)
        image, total = count_parameters(model.visual) / 1e6, count_parameters(model) / 1e6
        print(f"{name:10} {image:7.1f} {total - image:7.1f} {total:7.1f}   "
              f"{config['image_resolution']} pixels, {config['vocab_size']:,} tokens")


if __name__ == "__main__":
    main()
