"""KELIP: a Korean-English CLIP (Ko and Gu, arXiv 2203.14463): the models, their losses and their weights.

From the ground up: the transformer block, the image encoder (ViT in OpenAI CLIP's form), KELIP itself with its
GPT-2 style text encoder, the masked autoencoder of stage 1, the contrastive loss of stage 2, preprocessing, and
reading and writing weights. Parameter names are those of OpenAI's CLIP, so that weights travel.

This file and tokenizer.py are all that is needed to use a trained model:

    import kelip
    model, preprocess, tokenizer = kelip.build_model("runs/clip")

Left out: reading data (data.py), random crops (crops.py), the training loop (trainer.py, train_*.py), and the names and
configurations of other libraries (convert.py, which may be missing).
"""

import argparse
import functools
import json
import math
import os
import pickle
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)


def _preset(patch, resolution, vision, text, embed_dim, vocab_size=98_304, context_length=77):
    """(width, layers) of either tower -> a configuration; heads are 64 wide, as everywhere in CLIP."""
    return dict(embed_dim=embed_dim, image_resolution=resolution, vision_layers=vision[1],
                vision_width=vision[0], vision_patch_size=patch, context_length=context_length,
                vocab_size=vocab_size, transformer_width=text[0], transformer_heads=text[0] // 64,
                transformer_layers=text[1])


# "ViT-B/32" is the paper's; the others are the field's usual sizes, and "tiny" is for drawings of 72 pixels on a
# laptop. vocab_size is the paper's "about 98K"; training replaces it with the size of the tokenizer it is given.
PRESETS = {
    "tiny": _preset(16, 64, (192, 6), (192, 2), 256, vocab_size=4_096),
    "ViT-S/16": _preset(16, 224, (384, 12), (384, 12), 384),
    "ViT-B/32": _preset(32, 224, (768, 12), (512, 12), 512),
    "ViT-B/16": _preset(16, 224, (768, 12), (512, 12), 512),
    "ViT-L/14": _preset(14, 224, (1024, 24), (768, 12), 768),
}


# ---------------------------------------------------------------------------------------------- the transformer

class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP and of KELIP."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(d)) v over heads; q [N, H, M, d], k and v [N, H, L, d] -> [N, M, H * d].

    mask is bool, True where a query may look: [M, L] for all rows, [N, M, L] for each, or None.
    """
    N, H, M, d = q.shape
    if q.device.type != "cpu":
        mask = mask if mask is None or mask.ndim == 2 else mask.unsqueeze(1)  # [N, 1, M, L]
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    # On a CPU the fused kernel's backward pass in bfloat16 takes five times as long as these three lines.
    q, k, v = (t.reshape(N * H, -1, d) for t in (q, k, v))
    scores = q @ k.transpose(1, 2) * d ** -0.5                               # [N * H, M, L]
    if mask is not None:
        scores = scores.view(N, H, M, -1).masked_fill(~mask.view(-1, 1, M, mask.shape[-1]), float("-inf"))
    weights = scores.view(N * H, M, -1).softmax(-1, dtype=v.dtype)           # [N * H, M, L]
    return (weights @ v).view(N, H, M, d).transpose(1, 2).flatten(2)         # [N, M, H * d]


class Packing(NamedTuple):
    """How N sequences of different lengths lie end to end in one row of T tokens, [T, W] and not [N, L, W]: then nothing
    but attention meets any padding. Captions are some 6 to 25 tokens of 77."""
    index: torch.Tensor   # [T], where each token is in [N * L]
    inside: torch.Tensor  # bool [N, L], True at tokens
    last: torch.Tensor    # [N], where each sequence's last token is in the row

    def unpack(self, x):
        """x [T, W] -> [N, L, W], zeros behind each sequence's end."""
        N, L = self.inside.shape
        return x.new_zeros(N * L, x.shape[-1]).index_copy(0, self.index, x).view(N, L, -1)


def pack(lengths, L, device):
    """Packing of sequences of lengths [N], a tensor on the CPU, none of them over L.

    T is filled up to a multiple of 64 with positions of the padding, where there are any: they change nothing, and
    matrix libraries, which prepare their kernels for each shape, meet few shapes.
    """
    inside = (torch.arange(L) < lengths[:, None]).flatten()                  # [N * L]
    order = inside.logical_not().argsort(stable=True)                        # tokens in their order, then padding
    index = order[:-(-int(lengths.sum()) // 64) * 64]                        # [T]
    return Packing(*(t.to(device, non_blocking=True) for t in (
        index, inside.view(-1, L), lengths.cumsum(0) - 1)))


class Attention(nn.Module):
    """Multi-head self-attention; parameters named and shaped as those of nn.MultiheadAttention."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, packing=None):
        W = x.shape[-1]
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)            # [N, L, 3W], or packed [T, 3W]
        if packing:
            qkv = packing.unpack(qkv)                                        # [N, L, 3W]
        N, L, _ = qkv.shape
        mask = torch.ones(L, L, dtype=torch.bool, device=x.device).tril() if self.causal else None
        q, k, v = (t.view(N, L, self.heads, -1).transpose(1, 2) for t in qkv.split(W, -1))  # [N, H, L, W/H] each
        x = attend(q, k, v, mask)                                            # [N, L, W]
        if packing:
            x = x.flatten(0, 1)[packing.index]                               # [T, W]
        return self.out_proj(x)

    def forward_one(self, x, query, packing=None):
        """The same for one position of every sequence, which may look at all of its own: query [N, W] -> [N, W]."""
        N, W = query.shape
        (wq, wkv), (bq, bkv) = (p.split((W, 2 * W)) for p in (self.in_proj_weight, self.in_proj_bias))
        q = F.linear(query, wq, bq)[:, None]                                 # [N, 1, W]
        kv = F.linear(x, wkv, bkv)                                           # [N, L, 2W], or packed [T, 2W]
        if packing:
            kv = packing.unpack(kv)                                          # [N, L, 2W]
        q, k, v = (t.view(N, -1, self.heads, W // self.heads).transpose(1, 2) for t in (q, *kv.split(W, -1)))
        x = attend(q, k, v, packing and packing.inside[:, None])             # [N, 1, W]
        return self.out_proj(x[:, 0])


class Block(nn.Module):
    """One pre-LayerNorm residual block: x + attn(ln(x)), then x + mlp(ln(x))."""

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
        x = x + self.attn(self.ln_1(x), packing)
        return x + self.mlp(self.ln_2(x))

    def forward_one(self, x, packing=None):
        """The same for one position of every sequence, [N, L, W] -> [N, W]: the first, or, packed, the last."""
        normed = self.ln_1(x)
        at = (slice(None), 0) if packing is None else packing.last
        x = x[at] + self.attn.forward_one(normed, normed[at], packing)       # [N, W]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks. Initialised as GPT-2 is: what writes into the residual stream starts smaller by
    1/sqrt(2 x layers), so that the sum of all layers starts at a layer's size."""

    def __init__(self, width, layers, heads, causal, mlp_width=None, activation="quick_gelu"):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a transformer of width {width} cannot have {heads} heads: heads must divide width")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r}: there are {', '.join(ACTIVATIONS)}")
        blocks = (Block(width, heads, causal, mlp_width or 4 * width, activation) for _ in range(layers))
        self.resblocks = nn.ModuleList(blocks)
        residual = width ** -0.5 * (2 * layers) ** -0.5
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def forward(self, x):
        """x [N, L, W] -> [N, L, W]."""
        for block in self.resblocks:
            x = block(x)
        return x

    def forward_one(self, x, packing=None):
        """The output at one position of every sequence, where CLIP reads its features: x [N, L, W] -> [N, W] at the
        first, or packed, x [T, W] -> [N, W] at the last. The last block computes no other, 1/6 of its cost."""
        for block in self.resblocks[:-1]:
            x = block(x, packing)
        return self.resblocks[-1].forward_one(x, packing)


# -------------------------------------------------------------------------------------------- the image encoder

def interpolate_positions(positions, grid):
    """Positions of a square patch grid, class position first, for another grid.

    positions [1 + g*g, W] -> [1 + grid*grid, W]. The class position is kept; the rest is interpolated bicubically
    with KELIP's own scale factor, (grid + 0.1) / g, which is not what size=grid gives: released weights at 96
    pixels (7 x 7 to 3 x 3) only agree with this call (released code).
    """
    old = math.isqrt(len(positions) - 1)
    if grid == old:
        return positions
    patches = positions[1:].T.reshape(1, -1, old, old)                       # [1, W, g, g]
    patches = F.interpolate(patches, scale_factor=(grid + 0.1) / old, mode="bicubic")  # [1, W, grid, grid]
    return torch.cat([positions[:1], patches.flatten(2)[0].T])               # [1 + grid*grid, W]


class VisionTransformer(nn.Module):
    """ViT in OpenAI CLIP's form: bias-free patch convolution, class embedding, learned positions, LayerNorm
    before and after the blocks, projection without bias. images [N, 3, size, size] -> [N, embed_dim]."""

    def __init__(self, resolution, patch_size, width, layers, heads, embed_dim, **block):
        super().__init__()
        if resolution % patch_size:
            raise ValueError(f"image_resolution {resolution} is not a multiple of vision_patch_size {patch_size}")
        self.resolution, self.patch_size = resolution, patch_size
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        scale = width ** -0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        # Where a patch is starts as large as what it shows; CLIP's own start, 1/sqrt(width), takes a run of a thousand
        # steps a third of them to make up for.
        self.positional_embedding = nn.Parameter(1.5 * torch.randn((resolution // patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, causal=False, **block)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))
        nn.init.normal_(self.conv1.weight, std=(3 * patch_size ** 2) ** -0.5)

    def patchify(self, images):
        """images [N, 3, size, size] -> the pixels of each patch together, [N, g*g, 3*P*P]: channel, row, column, as
        the convolution's kernel has them."""
        N, C, h, w = images.shape
        P = self.patch_size
        if h % P or w % P or h != w:
            raise ValueError(f"images of {w} x {h} pixels: the encoder takes squares of a multiple of {P} pixels")
        x = images.view(N, C, h // P, P, w // P, P).permute(0, 2, 4, 1, 3, 5)  # [N, g, g, 3, P, P]
        return x.reshape(N, (h // P) * (w // P), C * P * P)                  # [N, g*g, 3*P*P]

    def unpatchify(self, patches):
        """The inverse of patchify: [N, g*g, 3*P*P] -> [N, 3, g*P, g*P]."""
        N, L, _ = patches.shape
        g, P = math.isqrt(L), self.patch_size
        return patches.view(N, g, g, 3, P, P).permute(0, 3, 1, 4, 2, 5).reshape(N, 3, g * P, g * P)

    def embed(self, images, keep=None):
        """images [N, 3, size, size] -> the sequence that enters the blocks but for ln_pre, [N, 1 + L, W]: class
        embedding, then patches, positions added. keep [N, L] says which patches; None is all, L = g*g."""
        positions = interpolate_positions(self.positional_embedding, images.shape[-1] // self.patch_size)
        first, positions = self.class_embedding + positions[0], positions[1:]
        x = self.patchify(images.to(self.conv1.weight.dtype))                # [N, g*g, 3*P*P]
        if keep is not None:
            x = x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # [N, L, 3*P*P]
            positions = positions[keep]                                      # [N, L, W]
        # A convolution whose stride is its kernel is one matrix product over patches.
        x = F.linear(x, self.conv1.weight.flatten(1)) + positions            # [N, L, W]
        return torch.cat([first.expand(len(x), 1, -1), x], dim=1)            # [N, 1 + L, W]

    def forward(self, images):
        x = self.ln_pre(self.embed(images))                                  # [N, 1 + g*g, W]
        x = self.transformer.forward_one(x)                                  # [N, W], the class token's
        return self.ln_post(x) @ self.proj                                   # [N, embed_dim]


# ------------------------------------------------------------------------------------------------------- KELIP

def unit(x):
    """x [N, D] as vectors of length one, in float32 at least: half precision would blur what the loss compares."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class KELIP(nn.Module):
    """The bilingual CLIP: an image encoder and a GPT-2 style text encoder into one space.

    KELIP(**config), the keys being those of PRESETS. model.config is that configuration, a plain dict. Its relatives
    have some more keys, which stand there where they are not the default: activation ("quick_gelu" or "gelu"),
    vision_heads (width / 64), and the width inside the mlps (4 x width), vision_mlp_width and transformer_mlp_width.
    """

    def __init__(self, *, embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size,
                 context_length, vocab_size, transformer_width, transformer_heads, transformer_layers,
                 activation="quick_gelu", vision_heads=None, vision_mlp_width=None, transformer_mlp_width=None):
        super().__init__()
        usual = dict(activation="quick_gelu", vision_heads=vision_width // 64, vision_mlp_width=4 * vision_width,
                     transformer_mlp_width=4 * transformer_width)
        self.config = {k: v for k, v in locals().items()
                       if k not in ("self", "__class__", "usual") and v not in (None, usual.get(k))}
        self.visual = VisionTransformer(
            image_resolution, vision_patch_size, vision_width, vision_layers, vision_heads or vision_width // 64,
            embed_dim, mlp_width=vision_mlp_width, activation=activation)
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads, causal=True,
                                       mlp_width=transformer_mlp_width, activation=activation)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        # A quarter of CLIP's 0.01 and 0.02: what the blocks write then counts from the first steps on.
        self.positional_embedding = nn.Parameter(0.0025 * torch.randn(context_length, transformer_width))
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(transformer_width ** -0.5 * torch.randn(transformer_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))    # the log of the factor
        nn.init.normal_(self.token_embedding.weight, std=0.005)

    def encode_image(self, image, l2norm=False):
        """image [N, 3, size, size], normalised by MEAN and STD -> [N, embed_dim]; l2norm makes them unit vectors.

        size may be any multiple of the patch: positions are interpolated (see interpolate_positions).
        """
        x = self.visual(image)
        return unit(x) if l2norm else x

    def encode_text(self, text, l2norm=False):
        """text [N, L], token ids as Tokenizer.encode gives them, L <= context_length -> [N, embed_dim].

        The end-of-text id is the highest of all, so argmax over a row finds it; attention being causal, nothing behind
        it counts, and nothing behind it is computed. text is best left on the CPU, where its lengths are known, whatever
        device the model is on: a GPU would have to be asked and waited for.
        """
        text = text.cpu()
        if text.shape[1] > len(self.positional_embedding):
            raise ValueError(f"text of {text.shape[1]} tokens: context_length is {len(self.positional_embedding)}")
        lengths = text.argmax(dim=-1) + 1                                    # [N]
        L, device = min(text.shape[1], -(-int(lengths.max()) // 8) * 8), self.positional_embedding.device
        packing = pack(lengths, L, device)
        tokens = text[:, :L].flatten().to(device, non_blocking=True)[packing.index]  # [T]
        x = self.token_embedding(tokens) + self.positional_embedding[packing.index % L]  # [T, W]
        x = self.transformer.forward_one(x, packing)                         # [N, W]
        x = self.ln_final(x) @ self.text_projection                          # [N, embed_dim]
        return unit(x) if l2norm else x

    def forward(self, image, text):
        """image [N, 3, size, size], text [M, L] -> (logits_per_image [N, M], logits_per_text [M, N])."""
        image_features = self.encode_image(image, l2norm=True)
        text_features = self.encode_text(text, l2norm=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.T
        return logits_per_image, logits_per_image.T


# ----------------------------------------------------------------------------------- stage 1: masked autoencoder

class MAE(nn.Module):
    """Masked autoencoder (He et al., arXiv 2111.06377) around an image encoder; methods have the authors' names.

    The encoder sees the class token and the patches that are not masked, up to ln_post; a bidirectional decoder of
    its own width and depth fills in the rest; the loss is the mean squared error on the masked patches alone, each
    target patch normalised by its own mean and deviation. visual.proj takes no part.
    """

    def __init__(self, visual, decoder_width=None, decoder_layers=None, mask_ratio=0.75):
        super().__init__()
        W, L = visual.conv1.out_channels, len(visual.positional_embedding) - 1
        # He et al.'s decoder for ViT-B and ViT-L is 512 wide and 8 deep; small encoders get smaller ones.
        width = decoder_width or min(512, max(64, W // 2 // 64 * 64))
        layers = decoder_layers or min(8, max(2, len(visual.transformer.resblocks) // 2))
        self.visual, self.mask_ratio = visual, mask_ratio
        visual.proj.requires_grad_(False)
        self.decoder_embed = nn.Linear(W, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.register_buffer("decoder_positions", sine_positions(math.isqrt(L), width), persistent=False)
        self.decoder = Transformer(width, layers, width // 32, causal=False)
        self.decoder_norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, 3 * visual.patch_size ** 2)

    def random_masking(self, noise):
        """noise [N, L], uniform -> keep [N, l], the patches that stay, l = (1 - mask_ratio) L, those of least noise;
        restore [N, L], where each patch is found once the masked ones are put behind; mask [N, L], 1 = masked."""
        N, L = noise.shape
        shuffle = noise.argsort(dim=1, stable=True)                          # [N, L]
        restore = shuffle.argsort(dim=1)                                     # [N, L]
        kept = max(1, round(L * (1 - self.mask_ratio)))
        return shuffle[:, :kept], restore, (restore >= kept).float()

    def forward_encoder(self, images, keep):
        """images [N, 3, size, size], keep [N, l] -> [N, 1 + l, W]."""
        v = self.visual
        return v.ln_post(v.transformer(v.ln_pre(v.embed(images, keep))))

    def forward_decoder(self, latent, restore):
        """latent [N, 1 + l, W], restore [N, L] -> pixels of all patches [N, L, 3*P*P]."""
        x = self.decoder_embed(latent)                                       # [N, 1 + l, D]
        N, L, D = *restore.shape, x.shape[-1]
        masked = self.mask_token.to(x.dtype).expand(N, L + 1 - x.shape[1], D)
        patches = torch.cat([x[:, 1:], masked], dim=1)                       # [N, L, D], shuffled
        patches = patches.gather(1, restore.unsqueeze(-1).expand(-1, -1, D))  # [N, L, D], in order
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_positions   # [N, 1 + L, D]
        return self.decoder_pred(self.decoder_norm(self.decoder(x)[:, 1:]))

    def targets(self, images):
        """images -> (their patches normalised each by its own mean and deviation, the means, the deviations):
        [N, L, 3*P*P], [N, L, 1], [N, L, 1]."""
        x = self.visual.patchify(images)
        mean, std = x.mean(-1, keepdim=True), (x.var(-1, keepdim=True) + 1e-6).sqrt()
        return (x - mean) / std, mean, std

    def forward_loss(self, images, prediction, mask, valid=None):
        """Mean squared error over the pixels of masked patches alone (He et al., section 3)."""
        error = (prediction.to(images.dtype) - self.targets(images)[0]).square().mean(-1)  # [N, L]
        mask = mask if valid is None else mask * valid[:, None]
        return (error * mask).sum() / mask.sum().clamp(min=1)

    def forward(self, images, noise=None, valid=None):
        """images [N, 3, size, size]; noise [N, L] uniform in 0..1 decides what is masked, drawn here when None; valid
        bool [N], False for images that are not to count.

        Returns (loss, prediction [N, L, 3*P*P] in units of normalised patches, mask [N, L], 1 = masked).
        """
        if noise is None:
            noise = torch.rand(len(images), len(self.decoder_positions) - 1, device=images.device)
        keep, restore, mask = self.random_masking(noise)
        prediction = self.forward_decoder(self.forward_encoder(images, keep), restore)
        return self.forward_loss(images, prediction, mask, valid), prediction, mask


def sine_positions(grid, width):
    """Fixed positions of a square grid, half of the width for rows and half for columns, sines then cosines; zeros
    for the class token: [1 + grid*grid, width]."""
    frequency = 10000 ** -(torch.arange(width // 4) / (width // 4))          # [width/4]
    angle = torch.arange(grid)[:, None] * frequency                          # [grid, width/4]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)                      # [grid, width/2]
    rows = wave[:, None].expand(grid, grid, -1)
    columns = wave[None].expand(grid, grid, -1)
    patches = torch.cat([rows, columns], dim=-1).flatten(0, 1)               # [grid*grid, width]
    return torch.cat([torch.zeros(1, width), patches])


# ------------------------------------------------------------------------------------- stage 2: contrastive loss

def contrastive_loss(image_features, text_features, logit_scale, group=None, valid=None, per_pair=False, chunk=512):
    """InfoNCE both ways between N images and their N texts: with logits = logit_scale * images @ texts.T, the mean of
    the cross-entropies over rows and over columns whose right answers are on the diagonal (CLIP, arXiv 2103.00020,
    figure 3).

    image_features: [n, D], or [K, n, D] for K crops of every image, whose losses' mean is the loss; text_features [n, D];
    both already of unit length. logit_scale: the factor itself, not its log. valid: bool [n], False where there is no pair:
    such a row is in no sum and no mean. chunk: rows of the logits that exist at a time, so that memory grows with chunk * N
    and not with N * N.
    group: None is the plain formula over the features given, in this process. With a torch.distributed group the
    batch is that of all its processes together, N = n * world_size (n the same on each); the value is that of the
    whole batch on every rank, and gradients are such that their mean over the ranks, which is what
    DistributedDataParallel takes, is the gradient of that value.
    Returns a scalar, float32 (float64 for float64 features); with per_pair also each own pair's share [n] of it, without
    gradient, whose mean over all valid pairs is the loss.
    """
    crops = image_features if image_features.ndim == 3 else image_features[None]
    loss, shares = _ContrastiveLoss.apply(crops, text_features, logit_scale, group, valid, chunk)
    return (loss, shares) if per_pair else loss


class _ContrastiveLoss(torch.autograd.Function):
    """Two passes over chunks of rows. The first finds the normalisers, logsumexp over each row and each column; the
    second makes the logits again, turns them into the gradient of the loss by the logits,

        G = (softmax over rows + softmax over columns - 2 * identity) / 2N,

    and sums G @ texts, G.T @ images and G * logits up at once. A rank has its own rows and all columns; what other
    ranks add to a column's normaliser, and to the gradients of a rank's texts, is exchanged, once for all crops."""

    @staticmethod
    def forward(ctx, image, text, scale, group, valid, chunk):
        ctx.dtypes = [t.dtype for t in (image, text, scale)]
        dtype = torch.promote_types(image.dtype, torch.float32)
        image, text, s = image.detach().to(dtype), text.detach().to(dtype), scale.detach().to(dtype)
        (K, n, _), rank, world = image.shape, 0, 1
        if group is not None:
            rank, world = dist.get_rank(group), dist.get_world_size(group)
        own = slice(rank * n, rank * n + n)
        valid = torch.ones(n, device=image.device, dtype=dtype) if valid is None else valid.to(dtype)
        image, text = image * valid[:, None], text * valid[:, None]          # what is not there adds nothing to products
        texts, valids = _gather(text, group), _gather(valid, group)          # [N, D], [N]
        off_row, off_column = torch.log(valid), torch.log(valids)            # 0 where valid, else -inf
        count = K * valids.sum().clamp(min=1)
        pieces = [(k, slice(i, min(i + chunk, n))) for k in range(K) for i in range(0, n, chunk)]

        row_norm = image.new_empty(K, n)
        column_norm = image.new_full((K, world * n), float("-inf"))          # over this rank's rows so far
        for k, i in pieces:
            logits = (s * image[k, i]) @ texts.T                             # [chunk, N]
            row_norm[k, i] = torch.logsumexp(logits.add_(off_column), dim=1)
            part = torch.logsumexp(logits.add_(off_row[i, None]), dim=0)
            column_norm[k] = torch.logaddexp(column_norm[k], part)
        column_norm = _logsumexp_over_ranks(column_norm, group)              # [K, N], over all rows
        column_norm.masked_fill_(valids == 0, float("inf"))
        diagonal = s * (image * text).sum(dim=-1)                            # [K, n]
        shares = ((row_norm + column_norm[:, own]) / 2 - diagonal).masked_fill(valid == 0, 0)  # [K, n]
        loss = _gather(shares.sum()[None], group).sum() / count

        if any(ctx.needs_input_grad[:3]):
            d_image, d_texts, d_scale = torch.empty_like(image), torch.zeros_like(texts), 0
            for k, i in pieces:
                logits = (s * image[k, i]) @ texts.T                         # [chunk, N]
                G = (logits - row_norm[k, i, None]).exp_()
                G += logits.sub_(column_norm[k]).exp_()
                G[torch.arange(len(G)), torch.arange(own.start + i.start, own.start + i.stop)] -= 2
                d_image[k, i] = G @ texts
                d_texts.addmm_(G.T, image[k, i])
                d_scale = d_scale + (d_image[k, i] * image[k, i]).sum()
            if group is not None:
                dist.all_reduce(d_texts, group=group)
            each = world / (2 * count)                                       # DDP will take the mean over ranks
            by_row = each * s * valid[:, None]                               # [n, 1]
            ctx.save_for_backward(by_row * d_image, by_row * d_texts[own], each * d_scale)
        shares = shares.mean(dim=0)                                          # [n]
        ctx.mark_non_differentiable(shares)
        return loss, shares

    @staticmethod
    def backward(ctx, grad, _):
        return *((grad * d).to(dtype) for d, dtype in zip(ctx.saved_tensors, ctx.dtypes)), None, None, None


def _logsumexp_over_ranks(x, group):
    """log of the sum of exp(x) over all ranks, element by element."""
    if group is None:
        return x
    top = x.clamp(min=torch.finfo(x.dtype).min)  # -inf - -inf would be no number
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    total = (x - top).exp_()
    dist.all_reduce(total, group=group)
    return total.log_().add_(top)


def _gather(x, group):
    """x [n, ...] of every rank, in rank order: [world_size * n, ...]."""
    if group is None:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------- preprocessing

def to_rgb(image):
    """Any PIL image -> RGB: turned as its EXIF orientation says, transparency on white, 16 bits and more a channel scaled
    to 8, palettes and CMYK as Pillow converts them, the first frame of an animation."""
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # convert() would clip these at 255; floats may be of 0..255 as well as of 0..65535
        full = 65535 if image.mode != "F" or image.getextrema()[1] > 255 else 255
        image = image.convert("F").point(lambda value: value * (255 / full) + 0.5).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy


def _preprocess(image, size):
    image = to_rgb(image)
    w, h = image.size
    if min(w, h) != size:
        w, h = (size, int(size * h / w)) if w < h else (int(size * w / h), size)
        image = image.resize((w, h), Image.BICUBIC)
    x, y = round((w - size) / 2), round((h - size) / 2)
    image = image.crop((x, y, x + size, y + size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3)
    pixels = pixels.permute(2, 0, 1).float() / 255                           # [3, size, size]
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def preprocess(size):
    """The evaluation's way from a picture to the encoder: a callable, PIL image of any mode -> float [3, size, size].
    Bicubic resize of the short side to size, centre crop, CLIP's mean and deviation (released code)."""
    return functools.partial(_preprocess, size=size)


# -------------------------------------------------------------------------------------------------------- weights

def save_checkpoint(path, state):
    """Write a dict of tensors and plain values to path, whole or not at all: a crash or a full disk in the middle
    leaves what was there before."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path):
    """Read what torch.save wrote, onto the CPU. Nothing but tensors and plain values is ever unpickled.

    Raises FileNotFoundError, and ValueError when the file is cut short or holds any other object.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says two things of a TorchScript archive
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: holds objects other than tensors and plain values, which are never loaded "
                         f"({str(error).splitlines()[0]})") from None
    except (RuntimeError, EOFError, OSError) as error:
        if "TorchScript" in str(error):
            raise ValueError(f"{path}: a TorchScript archive, a program, which is never run; as plain weights: "
                             "huggingface.co/openai, clip-vit-base-patch32 and others") from None
        raise ValueError(f"{path}: not a whole checkpoint ({str(error).splitlines()[0]})") from None


def read_weights(path):
    """The state dict in a .safetensors file, in the parts that an .index.json lists, or whatever torch.save wrote: as
    load_checkpoint, and ImportError without the package safetensors."""
    if path.name.endswith(".index.json"):
        parts = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        return {key: value for part in sorted(parts) for key, value in read_weights(path.with_name(part)).items()}
    if path.suffix != ".safetensors":
        return load_checkpoint(path)
    try:
        from safetensors import SafetensorError, torch as safetensors_torch
    except ImportError:
        raise ImportError(f"{path}: reading it needs a package: pip install safetensors") from None
    try:
        return safetensors_torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole checkpoint ({error})") from None


def load_weights(model, weights, where, name=str):
    """Put a state dict into a model, key by key. Raises ValueError that names the file (where) and the first key that
    is missing, left over or of another shape; name(key) is what the file calls it."""
    own = model.state_dict()
    for key in sorted(own.keys() | weights.keys()):
        if key not in weights:
            raise ValueError(f"{where}: has no {name(key)}, which the model needs")
        if key not in own:
            raise ValueError(f"{where}: holds {name(key)}, which the model does not have")
        if own[key].shape != weights[key].shape:
            found, needed = list(weights[key].shape), list(own[key].shape)
            raise ValueError(f"{where}: {name(key)} is {found}, the model's is {needed}")
    model.load_state_dict(weights)


FILES = ("last.pt", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
         "pytorch_model.bin.index.json", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
         "open_clip_pytorch_model.bin")


class Opened(NamedTuple):
    """What a file of weights says; a run of stage 1 holds an image encoder alone, without config and tokenizer."""
    where: Path
    weights: dict       # named as ours
    config: dict = None
    tokenizer: object = None
    name: object = str  # our name of a weight -> the file's


def open_weights(name_or_path, tokenizer=None, **given):
    """Read a model of any origin without building it: Opened. Arguments and errors are those of build_model."""
    from tokenizer import Tokenizer, read_json
    path = Path("weights") if name_or_path in PRESETS else Path(name_or_path)
    where = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), None)
    if where is None:
        raise FileNotFoundError(f"{name_or_path}: no such checkpoint: put a run's last.pt and tokenizer.json in {path}/, or "
                                "a release's config.json, pytorch_model.bin or model.safetensors, and tokenizer.json")
    weights, beside, name = read_weights(where), where.with_name("config.json"), str
    if not isinstance(weights, dict):
        raise ValueError(f"{where}: holds a {type(weights).__name__}, where weights are tensors by name")
    config = read_json(beside) if beside.is_file() else {}
    if "config" in weights:  # a run
        config, weights = weights["config"].get("model"), weights["model"]
        if "logit_scale" not in weights:
            return Opened(where, weights)
        tokenizer = Tokenizer.load(tokenizer or where.with_name("tokenizer.json"))
    elif "embed_dim" in config:  # released KELIP
        known = {*PRESETS["tiny"], *KELIP.__init__.__kwdefaults__}
        config = {key: value for key, value in config.items() if key in known}
        weights = {key.removeprefix("model."): value.float() for key, value in weights.items()}
        tokenizer = Tokenizer.load(tokenizer) if tokenizer else _released_tokenizer(where.parent)
    else:
        from extras import convert
        weights, config, tokenizer, name = convert.read(where, weights, tokenizer, given)
    rows = len(weights.get("token_embedding.weight", ()))
    fit = f"{where}: {name('token_embedding.weight')} has {rows} rows, and the tokenizer {len(tokenizer)} entries"
    if 0 < rows < len(tokenizer) or tokenizer.eot_id not in (None, len(tokenizer) - 1):
        raise ValueError(f"{fit}: they must fit, and the end token, number {tokenizer.eot_id}, must be the last")
    if len(tokenizer) < rows:
        warnings.warn(fit, stacklevel=3)
    return Opened(where, weights, {**config, **given}, tokenizer, name)


def _released_tokenizer(folder):
    """The release's own: its code lower-cases texts before, and start and end may stand in any of three files."""
    from tokenizer import Tokenizer, read_json
    spec, names = Tokenizer.load(folder / "tokenizer.json").spec, {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        names |= read_json(path) if path.is_file() else {}
    if "Lowercase" not in json.dumps(spec.get("normalizer")):
        steps = [{"type": "Lowercase"}] + [spec["normalizer"]] * bool(spec.get("normalizer"))
        spec = {**spec, "normalizer": {"type": "Sequence", "normalizers": steps}}
    return Tokenizer(spec, names)


def init_from(model, opened):
    """Start a KELIP from what open_weights gave: all of a model, or the image encoder of stage 1 (but visual.proj,
    which stage 1 does not train). Positions are interpolated where the resolution is another. Returns a line that says
    what was taken. Raises ValueError when it does not fit."""
    def taken(key):
        return opened.config or key.startswith("visual.") and key != "visual.proj"
    weights = {key: value for key, value in model.state_dict().items() if not taken(key)}
    weights |= {key: value for key, value in opened.weights.items() if taken(key)}
    if (key := "visual.positional_embedding") in weights:
        weights[key] = interpolate_positions(weights[key], model.visual.resolution // model.visual.patch_size)
    load_weights(model, weights, opened.where, opened.name)
    return f"{'all weights' if opened.config else 'the image encoder'} from {opened.where}"


def build_model(name_or_path="ViT-B/32", device="cpu", tokenizer=None, **given):
    """A trained model and what goes with it: (model in eval mode, preprocess, tokenizer).

    name_or_path: a run folder of train_clip.py; released KELIP (config.json, pytorch_model.bin or model.safetensors,
    tokenizer.json); with convert.py beside this file OpenAI's, open_clip's or transformers' CLIP, a folder or a file;
    or a preset's name, such as 'ViT-B/32', which looks in ./weights.
    tokenizer: the path of one, where none stands beside the weights. given: keys of KELIP's configuration that neither
    the weights nor a file beside them say, such as activation="gelu", vision_heads=16.
    Raises FileNotFoundError or ValueError with a line that says what is missing or does not fit.
    """
    name_or_path = given.pop("model_name", name_or_path)  # the release's word for it
    where, weights, config, tokenizer, name = open_weights(name_or_path, tokenizer, **given)
    if config is None:
        raise ValueError(f"{where}: a run of stage 1, an image encoder alone; train_clip.py --init takes it")
    try:
        model = KELIP(**config)
    except TypeError as error:
        raise ValueError(f"{where}: its configuration does not fit: {error}") from None
    load_weights(model, weights, where, name)
    return model.to(device).eval(), preprocess(config["image_resolution"]), tokenizer


def count_parameters(module):
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def main():
    """Print the presets and how many parameters each part of them has; or export, which convert.py does."""
    if sys.argv[1:2] == ["export"]:
        from extras import convert
        return convert.main(build_model, sys.argv[2:])
    argparse.ArgumentParser(description="Prints the presets of kelip.py and their sizes, in millions of parameters. "
                            "`kelip.py export --help`: weights for other libraries.").parse_args()
    print(f"{'preset':10} {'image':>7} {'text':>7} {'all':>7}   (millions of parameters; text with its embedding)")
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = KELIP(**config)
        image, everything = count_parameters(model.visual), count_parameters(model)
        print(f"{name:10} {image / 1e6:7.1f} {(everything - image) / 1e6:7.1f} {everything / 1e6:7.1f}   "
              f"{config['image_resolution']} pixels, {config['vocab_size']} tokens")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"kelip.py: {error}")
