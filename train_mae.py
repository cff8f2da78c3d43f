"""Stage 1: a masked autoencoder (He et al., arXiv 2111.06377) on the pictures of the pairs, without their texts.

    torchrun train_mae.py
    torchrun train_clip.py --init runs/mae/last.pt

Three quarters of every picture's patches are hidden; the image encoder sees the rest, a small decoder fills the hidden
ones in, and the loss is the squared error on these. The encoder then starts stage 2.

What it leaves out: everything of the release's own autoencoder that He et al. do not have (README, "from the paper,
and ours").
"""

import os

# How long a thread spins that waits for the others before it sleeps: some tenths of a millisecond. Between the many short
# operations of a step that saves waking it up; for ever, as is usual, all wait for one whose core something else has
# taken. Read by libgomp when torch is loaded, so it stands before all imports.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import crops
import data
import kelip
import trainer

NOISE = 8  # the purpose of the masks' random numbers, apart from those of crops.py


def parse_arguments(argv=None):
    """The command line, defaults filled in."""
    parser = argparse.ArgumentParser(
        description="Pre-train the image encoder as a masked autoencoder. Without flags: on the demo's emoji.",
        epilog="A run's folder holds last.pt for `train_clip.py --init`, config.json, metrics.jsonl and "
               "reconstructions.png: picture, what the encoder saw, what the decoder made of it.")
    trainer.add_arguments(parser, out="runs/mae", lr=1e-3, batch_size=256, epochs=20)
    add = parser.add_argument
    add("--size", type=int, metavar="PIXELS", help="of the pictures (default: the preset's resolution)")
    add("--scale", nargs=2, type=float, default=(0.2, 1.0), metavar=("MIN", "MAX"),
        help="area of a crop, as a part of the picture's (default: 0.2 1)")
    add("--mask-ratio", type=float, default=0.75, help="part of the patches that is hidden (default: 0.75)")
    add("--weight-decay", type=float, default=0.05, help="of matrices (default: 0.05)")
    args = parser.parse_args(argv)
    args.evals = 4
    if args.model not in kelip.PRESETS:
        raise ValueError(f"--model {args.model}: no such preset; there are {', '.join(kelip.PRESETS)}")
    args.size = args.size or kelip.PRESETS[args.model]["image_resolution"]
    patch = kelip.PRESETS[args.model]["vision_patch_size"]
    if args.size % patch:
        raise ValueError(f"--size {args.size}: not a multiple of {args.model}'s patch of {patch} pixels")
    if not 0 < args.mask_ratio < 1:
        raise ValueError(f"--mask-ratio {args.mask_ratio}: a part between 0 and 1")
    return args


def make_step(job, args, mae):
    """The step of this stage for trainer.fit: one crop, the masks, the loss, and the backward pass."""
    model = trainer.wrap(mae, job)
    flops = torch.tensor(3.0 * trainer.mae_flops(mae))
    dtype = trainer.choose_precision(args.precision, job.device)

    def step(batch, scaler):
        images, noise = prepare(batch, args, mae, job.device)
        valid = batch.valid.to(job.device, non_blocking=True)
        with torch.autocast(job.device.type, dtype, enabled=dtype is not None):
            loss, _, _ = model(images, noise, valid)
        # The mean over the pictures of all ranks, of which each may have holes of its own.
        count = valid.sum().float()
        everyone = trainer.sum_over_ranks(count.clone(), job)
        loss = loss * count * job.world_size / everyone.clamp(min=1)
        scaler.scale(loss).backward()
        return {"loss": loss.detach(), "flops": flops.to(job.device, non_blocking=True)}

    return step


def prepare(batch, args, mae, device):
    """A batch of the loader -> (images [N, 3, size, size], the masks' noise [N, L]), both functions of seed and slots."""
    [images] = crops.multi_crop(batch.images.to(device, non_blocking=True), [(1, args.size)], args.seed, batch.slots,
                                batch.aspect, scale=args.scale, flip=True)
    patches = len(mae.decoder_positions) - 1
    noise = crops.uniform(args.seed, batch.slots, 0, NOISE, patches).float()
    return images.to(mae.mask_token.dtype), noise.to(device, non_blocking=True)


@torch.no_grad()
def draw(path, mae, images, noise):
    """Write a picture with a row for each image: itself, what the encoder saw, the reconstruction."""
    _, prediction, mask = mae(images, noise)
    _, mean, std = mae.targets(images)
    visual = mae.visual
    shown = visual.patchify(images)                                          # [N, L, 3*P*P]
    filled = torch.where(mask[..., None] > 0, prediction.float() * std + mean, shown)
    grey = torch.zeros_like(shown)
    masked = torch.where(mask[..., None] > 0, grey, shown)
    rows = torch.cat([visual.unpatchify(x) for x in (shown, masked, filled)], dim=3)  # [N, 3, size, 3 * size]
    deviation, centre = (torch.tensor(x, device=rows.device).view(3, 1, 1) for x in (kelip.STD, kelip.MEAN))
    pixels = ((rows * deviation + centre).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).flatten(0, 1)
    picture = Image.fromarray(np.ascontiguousarray(pixels.cpu().numpy()))    # [N * size, 3 * size, 3]
    zoom = max(1, 128 // images.shape[-1])
    picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST).save(path)


def main(argv=None):
    """Set up, train, and draw."""
    args = parse_arguments(argv)
    job = trainer.start_job()
    state = trainer.open_run(args, job)
    pairs = trainer.open_pairs(args, job, state)
    torch.manual_seed(args.seed)
    config = dict(kelip.PRESETS[args.model], image_resolution=args.size)
    mae = kelip.MAE(kelip.KELIP(**config).visual, mask_ratio=args.mask_ratio)
    trainer.place(mae, args, job)
    if args.compile:
        trainer.compile_blocks(mae)
    optimizer = trainer.make_optimizer(mae, args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=args.weight_decay)
    run = trainer.describe_run("mae", args, config, pairs, state)
    loader = trainer.open_loader(args, job, pairs, None, run, state, crops.canvas_size([(1, args.size)], args.scale))
    few = next(iter(data.Loader(pairs, None, 8, loader.canvas, args.seed, steps=1)))

    def look(_):
        draw(Path(args.out) / "reconstructions.png", mae, *prepare(few, args, mae, job.device))
        return {}

    trainer.fit(job, args, mae, optimizer, loader, make_step(job, args, mae), run, state, evaluate=look)
    if job.main:
        print(f"{loader.report()}\n{args.out}: last.pt for train_clip.py --init, metrics.jsonl; "
              f"look at {args.out}/reconstructions.png")
    trainer.end_job(job)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"train_mae.py: {error}")
