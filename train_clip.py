"""Stage 2: contrastive training of both encoders on pairs in both languages, over many crops of every picture.

    torchrun train_clip.py                                     the demo: emoji and their names, on any laptop
    torchrun train_clip.py --init runs/mae/last.pt             the same from stage 1's image encoder
    torchrun --nproc-per-node 8 train_clip.py --model ViT-B/32 --data 'pairs/{00000..09999}.tar'

Every pair brings one caption a step, drawn from those that it has, so that both languages meet in one batch; no loss ties
the languages to each other. Each crop of the batch is contrasted with the same texts, which are encoded once:
loss = mean over crops of InfoNCE(that crop of every picture, texts). The batch is that of all processes together, and
means the same however it is cut: into ranks, or by --micro-batch into pieces that fit a GPU.

What it leaves out: hard negatives, distillation, and a second loss of any kind.
"""

import os

# How long a thread spins that waits for the others before it sleeps: some tenths of a millisecond. Between the many short
# operations of a step that saves waking it up; for ever, as is usual, all wait for one whose core something else has
# taken. Read by libgomp when torch is loaded, so it stands before all imports.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import argparse
import contextlib
import hashlib
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn

from extras import convert
import crops
import data
import evaluate
import kelip
import trainer
from tokenizer import Tokenizer

MAX_LOGIT_SCALE = math.log(100)  # CLIP, arXiv 2103.00020, section 2.5
# Crops by preset: a drawing of 72 pixels fills its picture and loses what it is when cut; the others have the paper's
# kind, at 224 and 96 pixels (for encoders of other sizes, their own and 3/7 of it), and DINO's scales.
CROPS = {"tiny": ("1x64", (0.8, 1.0)), "": ("2x{size}+6x{low}", (0.4, 1.0))}


def parse_arguments(argv=None):
    """The command line, defaults filled in; the model's configuration; what --init holds, None where it is not read."""
    parser = argparse.ArgumentParser(
        description="Train a Korean-English CLIP on pairs. Without flags: on emoji and their names in both languages, "
                    "which pip packages bring; some minutes on two CPU cores.",
        epilog="A run's folder holds last.pt, tokenizer.json, config.json, metrics.jsonl and index.html; "
               "kelip.build_model(folder) opens it.")
    trainer.add_arguments(parser, out="runs/clip", lr=4e-4, batch_size=256, epochs=10)
    add = parser.add_argument
    add("--tokenizer", metavar="FILE", help="a tokenizer.json (default: train one on the captions)")
    add("--init", metavar="RUN", help="start from these weights: a run of train_mae.py, or what kelip.build_model "
                                      "opens, and then of its sizes and with its tokenizer")
    add("--freeze", choices=["image"], help="keep the image encoder as --init brings it, and train the rest")
    add("--crops", metavar="SPEC", help="crops of a picture, NUMBERxPIXELS joined by + (default: 1x64 for tiny, else "
                                        "2x224+6x96)")
    add("--scale", nargs=2, type=float, metavar=("MIN", "MAX"),
        help="area of the first group's crops, as a part of the picture's (default: 0.8 1 for tiny, else 0.4 1)")
    add("--low-scale", nargs=2, type=float, default=(0.05, 0.4), metavar=("MIN", "MAX"),
        help="area of the other groups' crops (default: 0.05 0.4)")
    add("--augment", action="store_true", help="SimCLR's colour distortion and blur: helps classification, hurts "
                                               "retrieval (the paper's first finding)")
    add("--micro-batch", type=int, metavar="N",
        help="encode this many pairs at a time in each process, twice, and have the loss over all of them all the same "
             "(GradCache): for batches that do not fit (default: all at once)")
    add("--weight-decay", type=float, default=0.2, help="of matrices (default: 0.2)")
    add("--test", nargs="+", metavar="SHARDS", help="held-out pairs, for retrieval during the run and after it "
                                                    f"(default with the demo's data: {trainer.DEMO}/test-*.tar)")
    add("--evals", type=int, default=4, metavar="N", help="how often to measure retrieval, the end included (default: 4)")
    args = parser.parse_args(argv)
    args.classes = None
    if args.model not in kelip.PRESETS:
        raise ValueError(f"--model {args.model}: no such preset; there are {', '.join(kelip.PRESETS)}")
    if args.freeze and not args.init and not args.resume:
        raise ValueError("--freeze image: without --init it would keep an image encoder that has learned nothing")
    args.model, config, opened = starting_point(args)
    patch, size = config["vision_patch_size"], config["image_resolution"]
    spec, scale = CROPS.get(args.model, CROPS[""])
    args.crops = args.crops or spec.format(size=size, low=max(1, round(size * 3 / 7 / patch)) * patch)
    args.scale = args.scale or scale
    if opened and opened.config:
        config["image_resolution"] = crops.parse_crops(args.crops)[0][1]
    for _, size in crops.parse_crops(args.crops):
        if size % patch:
            raise ValueError(f"--crops {args.crops}: {size} pixels is not a multiple of {args.model}'s patch of {patch}")
    if args.test is None and args.data == parser.get_default("data"):
        args.test, args.classes = [f"{trainer.DEMO}/test-*.tar"], "skin tone"
    return args, config, opened


def starting_point(args):
    """(the name of the model's sizes, its configuration, what --init holds): those of --model, unless --init holds a
    whole model, or did so when the run that --resume goes on with began."""
    path, opened, config = Path(args.out) / "config.json", None, None
    begun = json.loads(path.read_text(encoding="utf-8")) if args.resume and path.exists() else {}
    if begun.get("init"):
        config = begun["model"]
    elif args.init and not begun:
        opened = kelip.open_weights(args.init, args.tokenizer)
        config = opened.config
    if config is None:
        return args.model, dict(kelip.PRESETS[args.model]), opened
    same = [name for name, preset in kelip.PRESETS.items() if {**preset, "vocab_size": config["vocab_size"]} == config]
    name = begun["preset"] if begun else same[0] if same else Path(args.init).name
    if args.model not in ("tiny", name):
        raise ValueError(f"--model {args.model}: --init brings a model of other sizes: leave one of the two out")
    return name, dict(config), opened


def open_tokenizer(args, job, pairs, vocab_size, state):
    """The run's tokenizer, in its folder: --tokenizer, or the checkpoint's, or one trained on the captions. Raises
    ValueError when a run goes on with another."""
    path = Path(args.out) / "tokenizer.json"
    if state and not path.exists():
        path.write_text(state["tokenizer"], encoding="utf-8")
    if args.tokenizer:
        given = Tokenizer.load(args.tokenizer)
        if state and json.dumps(given.spec, ensure_ascii=False) != state["tokenizer"]:
            raise ValueError(f"--tokenizer {args.tokenizer}: not that of the run in {args.out}: leave it out to resume")
        if job.main:  # the others come here at the same time, and one folder may be that of several machines
            given.save(path)
    elif not path.exists():
        if len(pairs) > 5_000_000:
            raise ValueError(f"{len(pairs):,} pairs are too many to train a tokenizer on in passing: "
                             "make one with `python tokenizer.py train` and name it with --tokenizer")
        texts = (text for i in range(len(pairs)) for text in pairs[i].captions.values())
        Tokenizer.train(texts, vocab_size, progress=sys.stdout.isatty()).save(path)
    return Tokenizer.load(path)


class Towers(nn.Module):
    """What one step encodes, as one forward pass, which is where DistributedDataParallel looks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, views, tokens):
        """views: a list of K crops [N, 3, size, size], tokens [N, L] -> (features of the views [K, N, D] and of the texts
        [N, D], all of unit length; the logit scale itself, not its log)."""
        image_features = []
        sizes = [view.shape[-1] for view in views]
        for size in dict.fromkeys(sizes):  # crops of one size go through the encoder together
            group = [view for view in views if view.shape[-1] == size]
            image_features += self.model.encode_image(torch.cat(group), l2norm=True).chunk(len(group))
        text_features = self.model.encode_text(tokens, l2norm=True)
        return torch.stack(image_features), text_features, self.model.logit_scale.exp()


def make_step(job, args, model, languages):
    """The step of this stage for trainer.fit: crops, both encoders, the loss, and the backward pass."""
    towers = trainer.wrap(Towers(model), job)
    dtype = trainer.choose_precision(args.precision, job.device)
    spec = crops.parse_crops(args.crops)
    sizes = [size for number, size in spec for _ in range(number)]

    def encode(batch, rows):
        """Crops of some rows of the batch, and their features as Towers gives them."""
        images, aspect = (t[rows].to(job.device, non_blocking=True) for t in (batch.images, batch.aspect))
        views = crops.multi_crop(images, spec, args.seed, batch.slots[rows], aspect, scale=args.scale,
                                 low_scale=args.low_scale, augment=args.augment)
        with torch.autocast(job.device.type, dtype, enabled=dtype is not None):
            return towers(views, batch.tokens[rows])

    def backward_of_loss(image_features, text_features, logit_scale, valid, scaler):
        """The mean over crops of InfoNCE, after its backward pass into the features: (loss, each own pair's share [n])."""
        loss, shares = kelip.contrastive_loss(image_features, text_features, logit_scale, job.group, valid, per_pair=True)
        scaler.scale(loss).backward()
        return loss.detach(), shares

    def backward_in_pieces(batch, size, valid, scaler):
        """The same with only `size` pairs in the encoders at a time (GradCache, arXiv 2101.06983): features of all without
        a graph, the loss and its gradients by them, then each piece again with a graph, from these gradients on."""
        pieces = [slice(i, i + size) for i in range(0, len(valid), size)]
        with torch.no_grad():
            parts = [encode(batch, rows) for rows in pieces]
        images, texts, scales = zip(*parts)
        features = torch.cat(images, dim=1), torch.cat(texts), scales[0].clone()
        result = backward_of_loss(*(t.requires_grad_() for t in features), valid, scaler)
        by_images, by_texts, by_scale = (t.grad for t in features)           # [K, n, D], [n, D], []
        for rows in pieces:
            last = rows is pieces[-1]
            # Gradients stay in this process until the last piece, which sends the sum; the scale's go in once, with it.
            with contextlib.nullcontext() if last or job.group is None else towers.no_sync():
                grads = by_images[:, rows], by_texts[rows], by_scale * last
                # an encoder that --freeze keeps has no graph
                pairs = [(output, grad) for output, grad in zip(encode(batch, rows), grads) if output.requires_grad]
                torch.autograd.backward(*zip(*pairs))
        return result

    def step(batch, scaler):
        valid = batch.valid.to(job.device, non_blocking=True)
        pieces = args.micro_batch is not None and args.micro_batch < len(valid)
        if pieces:
            loss, share = backward_in_pieces(batch, args.micro_batch, valid, scaler)
        else:
            image_features, text_features, logit_scale = encode(batch, slice(None))
            loss, share = backward_of_loss(image_features, text_features, logit_scale, valid, scaler)
        length = (batch.tokens.argmax(dim=1) + 1).float().mean()             # of a caption, in tokens
        flops = trainer.image_flops(model.config, sizes) + trainer.text_flops(model.config, length)
        # A backward pass costs twice its forward pass; pieces go forward once more.
        metrics = {"loss": loss, "logit_scale": model.logit_scale.detach().exp(),
                   "flops": ((4 if pieces else 3) * flops).to(job.device, non_blocking=True)}
        language = batch.language.to(job.device, non_blocking=True)
        for i, name in enumerate(languages):
            chosen = (valid & (language == i)).float()
            metrics[f"sum/loss_{name or 'text'}"] = (share * chosen).sum()
            metrics[f"count/loss_{name or 'text'}"] = chosen.sum()
        return metrics

    return step


def main(argv=None):
    """Set up, train, evaluate, and say where everything is."""
    args, config, opened = parse_arguments(argv)
    job = trainer.start_job()
    state = trainer.open_run(args, job)
    pairs = trainer.open_pairs(args, job, state)
    test = trainer.main_first(job, lambda: data.Pairs(args.test)) if args.test else None
    if test and not test.languages:
        raise ValueError(f"--test {' '.join(args.test)}: no captions there to measure with")
    candidates = evaluate.read_candidates(args.test) if args.test else None

    if opened and opened.tokenizer and not args.tokenizer and job.main and not state:
        convert.write_tokenizer(opened.tokenizer, Path(args.out), config["context_length"])
    tokenizer = trainer.main_first(job, lambda: open_tokenizer(args, job, pairs, config["vocab_size"], state))
    if not (opened and opened.config or state and state["config"]["init"]):
        config["vocab_size"] = len(tokenizer)
    torch.manual_seed(args.seed)
    model = kelip.KELIP(**config)
    if opened and not state:
        taken = kelip.init_from(model, opened)
        if job.main:
            print(f"starts from {taken}")
    model.visual.requires_grad_(args.freeze != "image")
    trainer.place(model, args, job)
    if args.compile:
        trainer.compile_blocks(model)
    optimizer = trainer.make_optimizer(model, args.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=args.weight_decay)
    vocabulary = Path(args.out, "tokenizer.json").read_text(encoding="utf-8")
    run = trainer.describe_run("clip", args, config, pairs, state,
                               vocabulary=hashlib.sha256(vocabulary.encode()).hexdigest()[:16])
    loader = trainer.open_loader(args, job, pairs, tokenizer, run, state,
                                 crops.canvas_size(crops.parse_crops(args.crops), args.scale, args.low_scale))
    if job.main:
        dtype = trainer.choose_precision(args.precision, job.device) or torch.float32
        print(f"{args.model}: {kelip.count_parameters(model) / 1e6:.1f}M parameters, {len(tokenizer):,} tokens; "
              f"{run['steps']:,} steps of {args.batch_size} pairs, {args.crops} crops; {job.world_size} x "
              f"{job.device.type}, {str(dtype).removeprefix('torch.')}", flush=True)

    def clamp():
        model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)

    latest = None  # what the last evaluation embedded: the page at the end shows the same

    def measure(_):
        nonlocal latest
        latest = evaluate.Embedded(model, test, tokenizer, candidates, progress=False)
        found = evaluate.retrieve(model, test, tokenizer, embedded=latest)
        return {f"{language}/{way}/{k}": value for language, ways in found.items()
                for way, values in ways.items() for k, value in values.items()}

    trainer.fit(job, args, model, optimizer, loader, make_step(job, args, model, loader.languages), run, state,
                after_step=clamp, evaluate=measure if test else None, extra={"tokenizer": vocabulary})
    if job.main:
        print(loader.report())
        if test:
            evaluate.report(args.out, model, test, tokenizer, candidates, args.classes, embedded=latest)
        print(f"{args.out}: last.pt, tokenizer.json, config.json, metrics.jsonl"
              + (f"; look at {args.out}/index.html" if test else ""))
    trainer.end_job(job)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"train_clip.py: {error}")
