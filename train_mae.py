"""Stage 1: a masked autoencoder (He et al., arXiv 2111.06377) on the images, without captions.

    python train_mae.py
    python train_clip.py --init runs/mae

Three quarters of the patches of every image are masked (half for "tiny", whose images have only
nine). The image encoder sees only the others, a small decoder predicts the masked ones, and the
loss is their squared error. Stage 2 then starts from the encoder.

Not included: the changes of KELIP's released autoencoder to He et al.'s (README, "From the paper,
and ours").
"""

import os

# Idle OpenMP threads spin by default, which on a busy machine takes CPU time from working ones. Let
# them sleep after some tenths of a millisecond. libgomp reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import argparse

import numpy as np
import torch
from PIL import Image

import crops
import data
import kelip
from command import ArgumentParser, number, run_command
from optimizer import make_optimizer
from trainer import (
    MAX_WEIGHT_DECAY,
    Run,
    add_arguments,
    check_preset,
    check_scale,
    compile_blocks,
    weight_dtype,
)

RECONSTRUCTIONS = 4  # how many times a run draws reconstructions.png


def parse_arguments(argv=None):
    """The command line."""
    parser = ArgumentParser(
        description=__doc__.partition("\nNot included")[0],
        epilog="The run's folder then holds last.pt for `train_clip.py --init`, config.json,\n"
               "metrics.jsonl and reconstructions.png: images, what the encoder saw of them, and\n"
               "what the decoder predicted.",
        fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, out="runs/mae", lr="0.001", batch_size=512, epochs=20)
    parser.set_defaults(lr=1e-3)
    add = parser.add_argument
    add("--size", type=number(int, 1, crops.MAX_SIDE), metavar="PIXELS",
        help="side of the crops (default: the preset's resolution)")
    add("--scale", nargs=2, type=number(float), default=(0.2, 1.0), metavar=("MIN", "MAX"),
        help="area of a crop, as a fraction of the image (default: 0.2 1)")
    add("--mask-ratio", type=number(float, above=0, high=0.99), metavar="X",
        help="fraction of the patches to mask (default: 0.5 for tiny, else 0.75)")
    add("--weight-decay", type=number(float, 0, MAX_WEIGHT_DECAY), default=0.05, metavar="X",
        help="weight decay, of matrices only (default: 0.05)")
    args = parser.parse_args(argv)
    check_preset(args.model)
    args.model = args.model or "tiny"
    preset = kelip.PRESETS[args.model]
    args.optimizer = args.optimizer or ("muon" if args.model == "tiny" else "adamw")
    # Three quarters of the 9 patches of "tiny" would leave two.
    args.mask_ratio = args.mask_ratio or (0.5 if args.model == "tiny" else 0.75)
    args.size = args.size or preset["image_resolution"]
    if args.size % preset["vision_patch_size"]:
        raise ValueError(f"--size {args.size}: not a multiple of {args.model}'s patch of "
                         f"{preset['vision_patch_size']} pixels")
    check_scale("--scale", args.scale)
    return args


def prepare(batch, args, mae, device):
    """Crop a batch, and draw the noise that decides what is masked.

    Returns images [N, 3, size, size] and noise [N, L] for L patches. Both depend on the seed and
    the sample index alone.
    """
    images = batch.images.to(device, non_blocking=True)
    [images] = crops.multi_crop(images, [(1, args.size)], args.seed, batch.sample_index,
                                batch.aspect, scale=args.scale, flip=True)
    n_patches = len(mae.decoder_positions) - 1  # without the class token
    noise = crops.uniform(args.seed, batch.sample_index, crop=0, purpose=crops.MASK,
                          draws=n_patches).float()
    return images.to(mae.mask_token.dtype), noise.to(device, non_blocking=True)


@torch.no_grad()
def draw_reconstructions(path, mae, images, noise):
    """Write one row for each image: the image, what the encoder saw, the prediction.

    Visible patches are copied into the prediction, as in He et al.'s figures.
    """
    _, prediction, mask = mae(images, noise)
    _, mean, std = mae.targets(images)
    masked = mask[..., None] > 0                                             # [N, L, 1]
    patches = mae.visual.patchify(images)                                    # [N, L, 3*P*P]
    seen = patches.masked_fill(masked, 0)
    predicted = torch.where(masked, prediction.float() * std + mean, patches)
    columns = [mae.visual.unpatchify(x) for x in (patches, seen, predicted)]
    grid = torch.cat(columns, dim=3)                                         # [N, 3, size, 3*size]
    pixel_std = torch.tensor(kelip.STD, device=grid.device).view(3, 1, 1)
    pixel_mean = torch.tensor(kelip.MEAN, device=grid.device).view(3, 1, 1)
    pixels = ((grid * pixel_std + pixel_mean).clamp(0, 1) * 255).round().byte()
    pixels = pixels.permute(0, 2, 3, 1).flatten(0, 1)                        # [N*size, 3*size, 3]
    image = Image.fromarray(np.ascontiguousarray(pixels.cpu().numpy()))
    zoom = max(1, 128 // images.shape[-1])
    image.resize((image.width * zoom, image.height * zoom), Image.NEAREST).save(path)


def train(args, run):
    """Set up, train, and draw reconstructions."""
    pairs = run.open_pairs()
    torch.manual_seed(args.seed)
    config = dict(kelip.PRESETS[args.model], image_resolution=args.size)
    mae = kelip.MAE(kelip.KELIP(**config).visual, mask_ratio=args.mask_ratio)
    mae.to(run.device, weight_dtype(args.precision))
    if args.compile:
        compile_blocks(mae)

    # The betas of He et al. (arXiv 2111.06377, table 8).
    optimizer = make_optimizer(mae, args.lr, betas=(0.9, 0.95), eps=1e-8,
                               weight_decay=args.weight_decay, name=args.optimizer, dtype=run.dtype)
    # The loader pads images to squares that are large enough for the crops.
    padded_size = crops.padded_size([(1, args.size)], args.scale)
    # Fixes the number of steps, or restores the checkpoint.
    run.start(mae, optimizer, pairs, config, RECONSTRUCTIONS, padded_size=padded_size)
    model = run.data_parallel(mae)
    loader = run.open_loader(pairs, tokenizer=None)
    # Eight images to draw, the same each time.
    shown = next(iter(data.Loader(pairs, tokenizer=None, batch_size=8, seed=args.seed, steps=1,
                                  padded_size=loader.padded_size)))
    run.announce(f"{args.model}: {kelip.count_parameters(mae) / 1e6:.1f}M parameters with the "
                 f"decoder, images of {args.size} pixels")

    for step, batch in run.steps(loader):  # step counts from 1; sets the learning rate
        valid = batch.valid.to(run.device, non_blocking=True)                # [n]
        images, noise = prepare(batch, args, mae, run.device)
        with run.autocast():
            loss, _, _ = model(images, noise, valid)
        # DistributedDataParallel takes the mean of the gradients over ranks, which may have
        # different numbers of valid images. This weight makes it the mean over all images:
        #     mean over ranks of (loss * count * world_size / total) = sum over images / total
        count = valid.sum().float()
        total = run.sum_over_ranks(count).clamp(min=1)
        loss = loss * count * run.world_size / total
        run.backward(loss)
        grad_norm = run.optimizer_step()  # clip to norm 1, step if finite, clear the gradients
        run.log(step, loss, grad_norm)
        run.save_if_due(step)  # exits after a signal
        if run.evaluates_at(step):
            with run.evaluation(step):  # the other ranks wait
                if run.is_rank_zero:
                    draw_reconstructions(run.folder / "reconstructions.png", mae,
                                         *prepare(shown, args, mae, run.device))

    if run.is_rank_zero:
        print(loader.report())
        print(f"{args.out}: last.pt for train_clip.py --init, metrics.jsonl; "
              f"open {args.out}/reconstructions.png")


def main(argv=None):
    """Read the command line, and train in the folder of the run."""
    args = parse_arguments(argv)
    with Run(args, stage="mae") as run:
        train(args, run)


if __name__ == "__main__":
    run_command(main, output="log",
                on_out_of_memory=": lower --batch-size, --size or --workers")
