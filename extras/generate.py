"""Images from text: a diffusion model of drawings, guided by a trained KELIP.

    python -m extras.generate train
    python -m extras.generate sample runs/clip "빨간 사과" "red apple"
    python -m extras.generate sample runs/clip "빨간 사과" --direct    # without a diffusion model

`train` trains a denoiser on images alone. From noise, it draws images like those that it was
trained on. `sample` turns the noise of each step toward a text, along the gradient of the distance
between the text and crops of the image, as KELIP sees them. `--direct` changes pixels without a
denoiser, for models of photographs. extras/judge.py measures how well this works.

Not included: a denoiser that reads texts (classifier-free guidance).
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # see train_mae.py

import argparse
import copy
import functools
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import trange

import crops
import data
import evaluate
import kelip
import page
import trainer
from command import ArgumentParser, number, one_line, run_command
from extras.calibrate import language_of
from optimizer import make_optimizer

EMA = 0.999         # decay of the moving average of the weights
SAMPLES = 8         # how many times a run draws samples.png
STEPS, GUIDANCE = 100, 0.1           # of sampling
DIRECT_STEPS, DIRECT_LR = 50, 0.05   # of --direct
CUTOUTS, AREA = 4, (0.8, 1.0)        # crops at each step; their area, as in train_clip.py
NOISE, LEVEL = 16, 17  # purposes of random numbers, which crops.py does not have
BLACK, WHITE = (((x - torch.tensor(kelip.MEAN)) / torch.tensor(kelip.STD)).view(3, 1, 1)
                for x in (0, 1))  # as kelip.preprocess normalizes pixels: [3, 1, 1] each


# ---- the denoiser ----

class Denoiser(nn.Module):
    """Separates a noisy image into image and noise.

    It is kelip.py's image encoder, with an embedding of the noise level added to all tokens, and a
    linear layer from each patch's token to pixels. A noisy image lies on the quarter circle from an
    image to noise, and the prediction, v, is the direction of the circle (arXiv 2202.00512):

        noisy = cos(angle) * image + sin(angle) * noise             # angle in 0..pi/2
        v     = cos(angle) * noise - sin(angle) * image
        image = cos(angle) * noisy - sin(angle) * v
    """

    def __init__(self, visual):
        super().__init__()
        W = visual.conv1.out_channels
        self.visual = visual
        visual.proj.requires_grad_(False)  # not used
        self.level = nn.Sequential(nn.Linear(W, W), nn.SiLU(), nn.Linear(W, W))
        self.pixels = nn.Linear(W, 3 * visual.patch_size ** 2)
        nn.init.zeros_(self.pixels.weight)
        # A denoiser with the moving average of the weights, which draws better images.
        self.average = copy.deepcopy(self).requires_grad_(False)

    def forward(self, noisy, angle):
        """noisy [N, 3, S, S], in the units of kelip.preprocess; angle [N] -> v [N, 3, S, S]."""
        visual, W = self.visual, self.pixels.in_features
        frequency = torch.logspace(0, 3, W // 2, device=noisy.device)        # [W/2]
        wave = (angle[:, None] * frequency).to(noisy.dtype)                  # [N, W/2]
        level = self.level(torch.cat([wave.sin(), wave.cos()], dim=1))[:, None]  # [N, 1, W]
        positions = visual.positions(noisy)                                  # [1 + L, W]
        x = visual.embed(visual.patchify(noisy), positions[0] + level, positions[1:] + level)
        x = visual.ln_post(visual.transformer(visual.ln_pre(x)))             # [N, 1 + L, W]
        return visual.unpatchify(self.pixels(x[:, 1:]).to(noisy.dtype))

    @torch.no_grad()
    def update_average(self, step):
        """Move the average toward the weights, after `step` steps."""
        decay = min(EMA, (1 + step) / (10 + step))
        for name, average in self.average.named_parameters():
            average.lerp_(self.get_parameter(name), 1 - decay)


def normal(seed, sample_index, shape, number=0):
    """Standard normal numbers, a function of the arguments alone: float32 [N, *shape]."""
    x = crops.uniform(seed, sample_index, number, NOISE, math.prod(shape))
    return torch.special.ndtri(x.clamp(min=2 ** -54)).float().view(-1, *shape)


def open_denoiser(folder, device="cpu"):
    """The averaged denoiser of a run of `train`, in eval mode, and the run's --data."""
    path = Path(folder) / "last.pt"
    state = kelip.load_checkpoint(path) if path.exists() else {}
    config = state.get("config")
    if not isinstance(config, dict) or config.get("stage") != "generate":
        raise ValueError(f"{path}: no denoiser; extras.generate train --out {folder} trains one")
    checkpoint = kelip.read_run(path, state)
    denoiser = Denoiser(kelip.KELIP(**checkpoint.config).visual)
    kelip.load_weights(denoiser, checkpoint.weights, path)
    return denoiser.average.to(device).eval(), kelip.entry(config, "data", list, f"{path}: config.")


# ---- training ----

def square(batch, size, device):
    """The images of a batch, resized to squares: [N, 3, size, size], normalized."""
    images = batch.images.to(device, non_blocking=True)
    # The entire image, or its center if it is longer than 4:3.
    return crops.multi_crop(images, [(1, size)], 0, batch.sample_index, batch.aspect,
                            scale=(1, 1))[0]


def train(args, run):
    """Set up, train, and draw samples as it goes."""
    pairs = run.open_pairs()
    torch.manual_seed(args.seed)
    config = dict(kelip.PRESETS[args.model], image_resolution=args.size,
                  vision_patch_size=args.size // 8)
    denoiser = Denoiser(kelip.KELIP(**config).visual)
    denoiser.to(run.device, trainer.weight_dtype(args.precision))
    if args.compile:
        trainer.compile_blocks(denoiser)
    optimizer = make_optimizer(denoiser, args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05,
                               name=args.optimizer, dtype=run.dtype)
    run.start(denoiser, optimizer, pairs, config, SAMPLES, padded_size=args.size)
    model = run.data_parallel(denoiser)
    loader = run.open_loader(pairs, tokenizer=None)
    run.announce(f"{args.model}: {kelip.count_parameters(denoiser.average) / 1e6:.1f}M parameters, "
                 f"images of {args.size} pixels")

    for step, batch in run.steps(loader):  # step counts from 1; sets the learning rate
        valid = batch.valid.to(run.device, non_blocking=True)                # [n]
        images = square(batch, args.size, run.device).to(denoiser.pixels.weight.dtype)
        # Noise and its level depend on the seed and the sample index alone.
        noise = normal(args.seed, batch.sample_index, images.shape[1:]).to(images)
        angle = crops.uniform(args.seed, batch.sample_index, 0, LEVEL)[:, 0] * math.pi / 2
        angle = angle.to(images)  # [n], uniform: the cosine schedule (arXiv 2102.09672)
        cos, sin = (wave.view(-1, 1, 1, 1) for wave in (angle.cos(), angle.sin()))
        with run.autocast():
            v = model(cos * images + sin * noise, angle)                     # [n, 3, S, S]
        error = (v - (cos * noise - sin * images)).square().mean(dim=(1, 2, 3))  # [n]
        # The mean over the valid images of all ranks, as in extras/teach.py.
        total = run.sum_over_ranks(valid.sum().float()).clamp(min=1)
        loss = error.where(valid, 0).sum() * run.world_size / total
        run.backward(loss)
        grad_norm = run.optimizer_step()  # clip to norm 1, step if finite, clear the gradients
        denoiser.update_average(step)
        run.log(step, loss, grad_norm)
        run.save_if_due(step)  # exits after a signal
        if run.evaluates_at(step):
            with run.evaluation(step):  # the other ranks wait
                if run.is_rank_zero:
                    images = sample(denoiser.average, torch.arange(32))[-1]
                    rows = [torch.cat([*row], dim=2) for row in images.split(16)]
                    to_pil(torch.cat(rows, dim=1)).save(run.folder / "samples.png")

    if run.is_rank_zero:
        print(loader.report(), f"{args.out}: last.pt, metrics.jsonl, samples.png", sep="\n")


# ---- guidance ----

def distance(model, texts, seeds, images, step):
    """How far images [N, 3, S, S] are from texts [N, D], unit vectors: a mean over crops, [N].

    It is half of the squared angle between two vectors, as in KELIP's released notebook. Crops
    depend on the seeds, int64 [N], and the step.
    """
    size, side, K = images.shape[-1], model.config["image_resolution"], CUTOUTS
    boxes = [crops.crop_boxes(0, seeds, step * K + k, size, scale=AREA) for k in range(K)]
    boxes = torch.stack(boxes, dim=1).flatten(0, 1)                          # [N*K, 4]
    corner, extent = boxes.to(images).split(2, dim=1)                        # [N*K, 2] each
    center = (2 * corner + extent) / size - 1  # affine_grid has an image reach from -1 to 1
    zoom = torch.cat([torch.diag_embed(extent / size), center[:, :, None]], dim=2)
    points = F.affine_grid(zoom, [len(zoom), 3, side, side], align_corners=False)
    cutouts = F.grid_sample(images.repeat_interleave(K, dim=0), points, padding_mode="border",
                            align_corners=False)                             # [N*K, 3, side, side]
    with autocast(images.device):
        features = model.encode_image(cutouts, l2norm=True).unflatten(0, (-1, K))
    chord = (features - texts[:, None]).norm(dim=2)                          # [N, K]
    return 2 * (chord / 2).asin().square().mean(dim=1)


def sample(denoiser, seeds, guide=None, guidance=GUIDANCE, steps=STEPS):
    """Draw an image from each seed, int64 [N]: a list of the images that each step predicts.

    The last, [N, 3, S, S], is the result. A step predicts the image and its noise, and exchanges a
    part of the noise for fresh noise (DDIM with eta = 1, arXiv 2010.02502, equation 16).

    guide: (images, step) -> distances [N], to be lowered. It turns the fresh noise against their
    gradient, without changing its length (DSG, arXiv 2402.03201), so that noisy images stay like
    those of training. guidance: the weight of the gradient's direction in the noise, 0..1.
    """
    weight, shape = denoiser.pixels.weight, (3, *[denoiser.visual.resolution] * 2)
    noisy, predicted = normal(0, seeds, shape).to(weight), []                # [N, 3, S, S]
    angles = torch.linspace(math.pi / 2, 0, steps + 1, device=weight.device)
    for step in trange(steps, desc="steps", leave=False, delay=1):
        angle, following = angles[step], angles[step + 1]
        with autocast(weight.device):
            v = denoiser(noisy.requires_grad_(guide is not None), angle.expand(len(noisy)))
        image = angle.cos() * noisy - angle.sin() * v
        fresh = normal(0, seeds, shape, step + 1).to(weight)
        if guide:
            gradient = torch.autograd.grad(guide(image, step).sum(), noisy)[0]
            direction = -F.rms_norm(gradient, shape, eps=1e-30)  # as long as noise
            fresh = F.rms_norm(torch.lerp(fresh, direction, guidance), shape)
        image, noisy = image.detach().clamp(BLACK.to(weight), WHITE.to(weight)), noisy.detach()
        noise = (noisy - angle.cos() * image) / angle.sin()
        kept = following.tan() / angle.tan()  # of the noise: most in the middle, 0 at both ends
        noise = kept * noise + (1 - kept ** 2).sqrt() * fresh
        noisy = following.cos() * image + following.sin() * noise
        predicted.append(image)
    return predicted


def optimize(size, seeds, guide, device, steps=DIRECT_STEPS):
    """The same without a denoiser: change pixels to lower the distance."""
    # An image is a sum of images of 1, 2, 4, ... pixels, so that large parts change as easily.
    sides = [2 ** i for i in range(size.bit_length() - 1)] + [size]
    levels = [0.1 * normal(0, seeds, (3, side, side), side).to(device) for side in sides]
    optimizer = torch.optim.Adam([level.requires_grad_() for level in levels], DIRECT_LR)
    predicted = []  # before each change
    for step in trange(steps, desc="steps", leave=False, delay=1):
        total = sum(F.interpolate(level, size, mode="bilinear") for level in levels)
        image = torch.lerp(BLACK.to(device), WHITE.to(device), total.sigmoid())
        optimizer.zero_grad()
        guide(image, step).sum().backward()
        optimizer.step()
        predicted.append(image.detach())
    return predicted


def autocast(device):
    """The context in which matrix products are fastest."""
    precision, _ = trainer.choose_precision("auto", device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# ---- the page and the commands ----

def to_pil(image):
    """A PIL image of a normalized tensor [3, height, width]."""
    pixels = ((image.cpu() - BLACK) / (WHITE - BLACK) * 255).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def all_images(sources, size):
    """All images of shards, as in training: float32 [M, 3, size, size]."""
    loader = data.Loader(data.Pairs(sources), tokenizer=None, batch_size=256, padded_size=size)
    return torch.cat([square(batch, size, "cpu")[batch.valid] for batch in loader])


def nearest(images, drawings):
    """The nearest of M drawings to each image: indices [N] and RMS distances of pixels [N]."""
    one, other = ((x.cpu() / (WHITE - BLACK)).flatten(1) for x in (images, drawings))
    distances, indices = torch.cdist(one, other).min(dim=1)
    return indices, distances / math.sqrt(one.shape[1])


def write_samples(args):
    """The command `sample`: draw images for each text, and write a page."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _, tokenizer = kelip.build_model(args.model, device)
    model.requires_grad_(False)
    if empty := [text for text in args.texts if not tokenizer.encode_ordinary(text)]:
        raise ValueError(f"{empty[0]!r}: has no token; give words to draw")
    folder = Path(args.out or evaluate.folder_of(args.model))
    evaluate.check_writable(folder)
    if not args.direct:
        denoiser, sources = open_denoiser(args.denoiser, device)
        drawings = all_images(sources, denoiser.visual.resolution)           # [M, 3, S, S]
    seeds, parts = torch.arange(args.seeds), []
    for text, vector in zip(args.texts, evaluate.embed_texts(model, tokenizer, args.texts)):
        vectors = vector.to(device).expand(args.seeds, -1)
        guide = functools.partial(distance, model, vectors, seeds)
        if args.direct:
            size, steps = model.config["image_resolution"], args.steps or DIRECT_STEPS
            predicted = optimize(size, seeds, guide, device, steps)
        else:
            predicted = sample(denoiser, seeds, guide, args.guidance, args.steps or STEPS)
        line = f"{text}: distance {guide(predicted[-1], 0).mean():.3f}"
        first = [images[0] for images in predicted[::kelip.ceil_div(len(predicted), 12)]]
        rows = {"": predicted[-1], "The first, step by step": first}
        if not args.direct:
            found, far = nearest(predicted[-1], drawings)
            line += f"; of pixels, to the nearest training image: {far.mean():.3f}"
            rows["The nearest training image of each"] = drawings[found]
        parts.append(page.heading(f"{text} ({evaluate.LANGUAGE_NAMES[language_of(text)]})"))
        for title, images in rows.items():
            parts += [page.lines(title, []), page.row(page.image(to_pil(x)) for x in images)]
        print(one_line(line), flush=True)
    page.write(folder / "generated.html", "Images from text", f"Guided by {args.model}.", *parts)
    print(f"{folder}/generated.html")


def parse_arguments(argv=None):
    """The command line of both commands."""
    parser = ArgumentParser(
        prog="python -m extras.generate", description=__doc__.partition("\nNot included")[0],
        fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", description="Train a denoiser on images alone.")
    trainer.add_arguments(training, out="runs/generate", lr="0.001", batch_size=64, epochs=14)
    training.set_defaults(model="tiny", lr=1e-3)
    training.add_argument("--size", type=int, default=32, choices=(16, 32, 64, 128),
                          help="side of the images in pixels (default: %(default)s)")
    drawing = commands.add_parser("sample", description="Draw images for texts.")
    add = drawing.add_argument
    add("model", metavar="MODEL", help="the folder of a run or of released weights")
    add("texts", nargs="+", metavar="TEXT", help="what to draw, in English or Korean")
    add("--denoiser", default="runs/generate", metavar="FOLDER",
        help="a run of `train` (default: %(default)s)")
    add("--direct", action="store_true", help="change pixels, without --denoiser and --guidance")
    add("--seeds", type=number(int, 1, 256), default=8, metavar="N",
        help="images of each text (default: %(default)s)")
    add("--steps", type=number(int, 1, 10_000), metavar="N",
        help=f"steps of an image (default: {STEPS}; {DIRECT_STEPS} with --direct)")
    add("--guidance", type=number(float, 0, 1), default=GUIDANCE, metavar="X",
        help="part of each step's noise that the text determines, 0..1 (default: %(default)g)")
    add("--out", metavar="FOLDER", help="folder of the page (default: the model's)")
    args = parser.parse_args(argv)
    if args.command == "train":
        trainer.check_preset(args.model)
        args.optimizer = args.optimizer or ("muon" if args.model == "tiny" else "adamw")
    return args


def main(argv=None):
    """Train a denoiser, or draw images for texts."""
    args = parse_arguments(argv)
    if args.command == "train":
        with trainer.Run(args, stage="generate") as run:
            train(args, run)
    else:
        write_samples(args)


if __name__ == "__main__":
    run_command(main, output="log", on_out_of_memory=": lower --batch-size, --size or --seeds")
