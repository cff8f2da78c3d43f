"""Stage 2: contrastive training of both encoders on images and captions in two languages.

    python train_clip.py                                   # the demo: emoji and their names
    python train_clip.py --init runs/mae                   # the same from stage 1's image encoder
    torchrun --nproc-per-node 8 train_clip.py --model ViT-B/32 --data 'pairs/{00000..09999}.tar'

Every pair brings one caption per step, drawn from those that it has, so that a batch mixes the
languages. No term of the loss ties one language to the other. Every crop of the batch is contrasted
with the same texts, which are encoded once: the loss is the mean over crops of InfoNCE(that crop of
every image, texts). Results do not depend on how the batch is split, over processes or into
micro-batches.

The file reads from top to bottom: arguments, where a run starts from, crops, the encoders, the
micro-batches of GradCache, and the training loop in main.

Not included: hard negatives, distillation, and a second loss of any kind.
"""

import os

# By default OpenMP threads spin while they wait; on a busy machine that stalls the others. This
# lets them sleep after some tenths of a millisecond. libgomp reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import argparse
import contextlib
import json
import math
import sys
from typing import NamedTuple

import torch
import torch.nn as nn

import crops
import data
import demo
import evaluate
import kelip
from tokenizer import Tokenizer, run_command
from trainer import Run, add_arguments, compile_blocks, make_optimizer, weight_dtype

MAX_LOGIT_SCALE = math.log(100)  # CLIP, arXiv 2103.00020, section 2.5
DEMO_TEST = f"{demo.DEMO}/test-*.tar"
MAX_PAIRS_FOR_TOKENIZER = 5_000_000  # to read more captions before the first step takes hours


def parse_arguments(argv=None):
    """The command line. Reads no files."""
    parser = argparse.ArgumentParser(
        description="Train a Korean-English CLIP on images and captions. Without flags: on emoji "
                    "and their names in both languages, some minutes on two CPU cores.",
        epilog="The run's folder then holds last.pt, tokenizer.json, config.json, metrics.jsonl "
               "and index.html. kelip.build_model(FOLDER) opens it.")
    add_arguments(parser, out="runs/clip", lr=4e-4, batch_size=256, epochs=10)
    add = parser.add_argument
    add("--tokenizer", metavar="FILE",
        help="a tokenizer.json (default: that of --init's model, else train one on the captions)")
    add("--init", metavar="RUN",
        help="start from these weights: the image encoder of a run of train_mae.py, or a whole "
             "model: a run of train_clip.py or released KELIP. A whole model also brings its "
             "sizes and its tokenizer")
    add("--freeze", choices=["image"], help="do not train the image encoder")
    add("--crops", metavar="SPEC",
        help="crops per image, NUMBERxPIXELS joined by + (default: 1x64 for tiny, 2x224+6x96 for "
             "models of 224 pixels)")
    add("--scale", nargs=2, type=float, metavar=("MIN", "MAX"),
        help="area of the first group's crops, as a fraction of the image (default: 0.8 1 for "
             "tiny, else 0.4 1)")
    add("--low-scale", nargs=2, type=float, default=(0.05, 0.4), metavar=("MIN", "MAX"),
        help="area of the other groups' crops (default: 0.05 0.4)")
    add("--augment", action="store_true",
        help="SimCLR's color distortion and blur: helps classification, hurts retrieval (the "
             "paper's first finding)")
    add("--micro-batch", type=int, metavar="N",
        help="encode N pairs per process at a time, twice, to fit large batches into memory. The "
             "loss is still that of the whole batch (GradCache; default: all at once)")
    add("--weight-decay", type=float, default=0.2, help="of matrices (default: 0.2)")
    add("--test", nargs="+", metavar="SHARDS",
        help="held-out pairs, for retrieval during the run and after it (default with the demo's "
             f"data: {DEMO_TEST})")
    add("--evals", type=int, default=4, metavar="N",
        help="evaluations per run, the end included (default: 4)")
    args = parser.parse_args(argv)
    if args.model not in kelip.PRESETS:
        presets = ", ".join(kelip.PRESETS)
        raise ValueError(f"--model {args.model}: no such preset; choose from {presets}")
    if args.freeze and not args.init and not args.resume:
        raise ValueError("--freeze image: without --init, the image encoder would stay random")
    if args.test is None and args.data == parser.get_default("data"):
        args.test = [DEMO_TEST]
    return args


# ---- where a run starts from ----

class Start(NamedTuple):
    """What a run starts from: --model's preset, --init's weights, or the checkpoint to resume."""
    preset: str    # what the model is called
    config: dict   # of kelip.KELIP
    init: object   # the kelip.Checkpoint of --init, None without

    @property
    def is_whole_model(self):
        """Whether --init brings a whole model, and not the image encoder of stage 1."""
        return self.init is not None and not self.init.is_stage_1


def starting_point(args, checkpoint):
    """The Start of a run. checkpoint: what --resume continues, or None."""
    if checkpoint:
        begun = checkpoint["config"]
        if args.model not in ("tiny", begun["preset"]):
            raise ValueError(f"--model {args.model}: the run in {args.out} trains "
                             f"{begun['preset']}: resume without --model")
        return Start(begun["preset"], begun["model"], None)
    if not args.init:
        return Start(args.model, kelip.PRESETS[args.model], None)
    init = kelip.open_checkpoint(args.init)
    if init.is_stage_1:
        return Start(args.model, kelip.PRESETS[args.model], init)
    preset = os.path.basename(args.init)
    for name, config in kelip.PRESETS.items():
        if {**config, "vocab_size": init.config["vocab_size"]} == init.config:
            preset = name
    if args.model not in ("tiny", preset):
        raise ValueError(f"--model {args.model}: the model of --init has other sizes: "
                         "give one of the two")
    return Start(preset, init.config, init)


def open_tokenizer(args, run, pairs, start):
    """The tokenizer of the run, which is saved in its folder.

    It is that of the checkpoint to resume, else that of --tokenizer, else that of --init's model,
    else one trained on the captions. Raises ValueError when --tokenizer differs from the run's.
    """
    path = run.folder / "tokenizer.json"
    with run.rank_zero_first():
        if run.is_rank_zero:
            tokenizer = _choose_tokenizer(args, run.checkpoint, pairs, start)
            tokenizer.save(path)
        tokenizer = Tokenizer.load(path)
    if start.is_whole_model:
        kelip.check_vocabulary(start.init._replace(tokenizer=tokenizer))
    return tokenizer


def _choose_tokenizer(args, checkpoint, pairs, start):
    if checkpoint:
        tokenizer = Tokenizer(json.loads(checkpoint["tokenizer"]))
        if args.tokenizer and Tokenizer.load(args.tokenizer).spec != tokenizer.spec:
            raise ValueError(f"--tokenizer {args.tokenizer}: not that of the run in {args.out}: "
                             "resume without --tokenizer")
        return tokenizer
    if args.tokenizer:
        return Tokenizer.load(args.tokenizer)
    if start.is_whole_model:
        return start.init.tokenizer
    if len(pairs) > MAX_PAIRS_FOR_TOKENIZER:
        raise ValueError(f"{len(pairs):,} pairs are too many to train a tokenizer on now: train "
                         "one with `python tokenizer.py train`, and give it as --tokenizer")
    texts = (text for i in range(len(pairs)) for text in pairs[i].captions.values())
    return Tokenizer.train(texts, start.config["vocab_size"], progress=sys.stdout.isatty())


# ---- crops ----

def choose_crops(args, start):
    """--crops as a list of (number, size), with the defaults of --crops and --scale filled in.

    The paper's are two crops of 224 pixels and six of 96, with DINO's scales; encoders of another
    resolution get the same proportions. The drawings of the demo fill their 72 pixels, and lose
    what they show when they are cut, so "tiny" gets one large crop.
    """
    patch, size = start.config["vision_patch_size"], start.config["image_resolution"]
    if start.preset == "tiny":
        default_crops, default_scale = "1x64", (0.8, 1.0)
    else:
        low = max(1, round(size * 3 / 7 / patch)) * patch
        default_crops, default_scale = f"2x{size}+6x{low}", (0.4, 1.0)
    args.crops = args.crops or default_crops
    args.scale = args.scale or default_scale
    groups = crops.parse_crops(args.crops)
    for _, size in groups:
        if size % patch:
            raise ValueError(f"--crops {args.crops}: {size} pixels is not a multiple of "
                             f"{start.preset}'s patch of {patch}")
    return groups


# ---- encoders and micro-batches ----

class Encoders(nn.Module):
    """Everything that a step encodes, as one forward pass, since DistributedDataParallel wraps one.

    views: a list of K crops [N, 3, size, size]; tokens [N, L]. Returns features of unit length, of
    the views [K, N, D] and of the texts [N, D], and the factor on the cosines, [].
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, views, tokens):
        image_features = []
        sizes = [view.shape[-1] for view in views]
        for size in dict.fromkeys(sizes):  # crops of one size go through the encoder together
            group = [view for view in views if view.shape[-1] == size]
            features = self.model.encode_image(torch.cat(group), l2norm=True)
            image_features += features.chunk(len(group))
        text_features = self.model.encode_text(tokens, l2norm=True)
        return torch.stack(image_features), text_features, self.model.logit_scale.exp()


def backward_in_micro_batches(run, encoders, make_views, batch, valid, micro_batch):
    """The loss and the gradients of a batch, with only `micro_batch` pairs in the encoders at once.

    GradCache (Gao et al., arXiv 2101.06983): first, features of all pairs without a graph, and the
    gradient of the loss by them; then every micro-batch again with a graph, continued backward from
    its part of that gradient. Returns (loss, per_pair_loss) like contrastive_loss.
    """
    micro_batches = [slice(i, i + micro_batch) for i in range(0, len(valid), micro_batch)]

    def encode(rows):
        views = make_views(batch, rows)                                      # K x [m, 3, s, s]
        with run.autocast():
            return encoders(views, batch.tokens[rows])                       # [K, m, D], [m, D], []

    with torch.no_grad():
        image_features, text_features, logit_scales = zip(*map(encode, micro_batches))
    features = [torch.cat(image_features, dim=1), torch.cat(text_features), logit_scales[0].clone()]
    for feature in features:
        feature.requires_grad_()                                             # [K, n, D], [n, D], []
    loss, per_pair_loss = kelip.contrastive_loss(*features, run.group, valid, per_pair=True)
    run.backward(loss)
    d_image, d_text, d_scale = (feature.grad for feature in features)

    for rows in micro_batches:
        is_last = rows is micro_batches[-1]
        # Ranks exchange gradients once, in the last backward pass. That of the scale goes in once.
        skip_exchange = run.group is not None and not is_last
        with encoders.no_sync() if skip_exchange else contextlib.nullcontext():
            outputs = encode(rows)
            grads = d_image[:, rows], d_text[rows], d_scale * is_last
            # A frozen encoder has no graph.
            trained = [(out, grad) for out, grad in zip(outputs, grads) if out.requires_grad]
            torch.autograd.backward(*zip(*trained))  # the gradients are scaled already
    return loss, per_pair_loss


# ---- training ----

def main(argv=None):
    """Set up, train, evaluate, and say where everything is."""
    args = parse_arguments(argv)
    run = Run(args, stage="clip")
    start = starting_point(args, run.checkpoint)
    args.model = start.preset
    crop_groups = choose_crops(args, start)

    pairs = run.open_pairs()
    test = None
    if args.test:
        with run.rank_zero_first():
            test = data.Pairs(args.test)
        if not test.languages:
            raise ValueError(f"--test {' '.join(args.test)}: holds no captions to evaluate with")
        candidates = evaluate.read_candidates(args.test)

    tokenizer = open_tokenizer(args, run, pairs, start)
    tokenizer_json = (run.folder / "tokenizer.json").read_text(encoding="utf-8")

    config = dict(start.config)
    if start.is_whole_model:
        config["image_resolution"] = crop_groups[0][1]
    elif not run.checkpoint:
        config["vocab_size"] = len(tokenizer)
    torch.manual_seed(args.seed)
    model = kelip.KELIP(**config)
    if start.init:
        loaded = kelip.init_from(model, start.init)
        if run.is_rank_zero:
            print(f"starts from {loaded}")
    if args.freeze == "image":
        model.visual.requires_grad_(False)
    model.to(run.device, weight_dtype(args.precision))
    if args.compile:
        compile_blocks(model)

    optimizer = make_optimizer(model, args.lr, betas=(0.9, 0.98), eps=1e-6,
                               weight_decay=args.weight_decay)
    run.start(model, optimizer, pairs, config, evaluations=args.evals if test else 0)
    encoders = run.data_parallel(Encoders(model))
    padded_size = crops.padded_size(crop_groups, args.scale, args.low_scale)
    loader = run.open_loader(pairs, tokenizer, padded_size)
    if run.is_rank_zero:
        dtype = str(run.dtype or torch.float32).removeprefix("torch.")
        print(f"{args.model}: {kelip.count_parameters(model) / 1e6:.1f}M parameters, "
              f"{len(tokenizer):,} tokens; {run.total_steps:,} steps of {args.batch_size} pairs, "
              f"{args.crops} crops; {run.world_size} x {run.device.type}, {dtype}", flush=True)

    def make_views(batch, rows=slice(None)):
        """Crops of some rows of a batch, normalised: a list of K tensors [n, 3, size, size]."""
        images = batch.images[rows].to(run.device, non_blocking=True)
        aspect = batch.aspect[rows].to(run.device, non_blocking=True)
        return crops.multi_crop(
            images, crop_groups, args.seed, batch.sample_index[rows], aspect, scale=args.scale,
            low_scale=args.low_scale, augment=args.augment)

    embedded = None  # the test pairs' features at the last evaluation
    for step, batch in run.steps(loader):
        valid = batch.valid.to(run.device, non_blocking=True)                # [n]
        language = batch.language.to(run.device, non_blocking=True)          # [n]
        if args.micro_batch and args.micro_batch < len(valid):
            loss, per_pair_loss = backward_in_micro_batches(
                run, encoders, make_views, batch, valid, args.micro_batch)
        else:
            views = make_views(batch)                                        # K x [n, 3, s, s]
            with run.autocast():
                image_features, text_features, logit_scale = encoders(
                    views, batch.tokens)                                     # [K, n, D], [n, D], []
            loss, per_pair_loss = kelip.contrastive_loss(
                image_features, text_features, logit_scale, run.group, valid, per_pair=True)
            run.backward(loss)
        logit_scale = model.logit_scale.detach().exp()  # this step's, before the update
        grad_norm = run.optimizer_step()
        model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)

        metrics = {"logit_scale": logit_scale}
        for i, name in enumerate(loader.languages):  # the mean over the valid pairs of a language
            metrics[f"loss_{name or 'text'}"] = per_pair_loss, valid & (language == i)
        run.log(step, loss, grad_norm, **metrics)

        if run.evaluates_at(step):
            with run.paused():
                if run.is_rank_zero:
                    embedded = evaluate.Embedded(model, test, tokenizer, candidates, progress=False)
                    recall = evaluate.retrieve(model, test, tokenizer, embedded=embedded)
                    run.log_evaluation(step, recall)
        run.save_if_due(step, tokenizer=tokenizer_json)

    if run.is_rank_zero:
        print(loader.report())
        files = f"{args.out}: last.pt, tokenizer.json, config.json, metrics.jsonl"
        if test:
            classes = "skin tone" if args.test == [DEMO_TEST] else None
            evaluate.report(args.out, model, test, tokenizer, candidates, classes,
                            embedded=embedded)
            files += f"; open {args.out}/index.html"
        print(files)
    run.close()


if __name__ == "__main__":
    run_command(main)
