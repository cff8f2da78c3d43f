"""Stage 2: contrastive training of both encoders on images and captions in two languages.

    python train_clip.py                                   # the demo: emoji and their names
    python train_clip.py --init runs/mae                   # the same from stage 1's image encoder
    torchrun --nproc-per-node 8 train_clip.py --model ViT-B/32 --data 'pairs/{00000..09999}.tar'

KELIP is a CLIP for Korean and English (Ko and Gu, arXiv 2203.14463). Each step uses one caption of
a pair in each of its languages, or, where pairs have a single caption, batches that mix the
languages. They are aligned only through the images that they share: no term of the loss compares
Korean with English. The loss is the mean over crops k and captions c of
InfoNCE(k-th crop of every image, c-th caption of every image), and each caption is encoded once.
Splitting the batch over processes or into micro-batches changes the results only by rounding.

From top to bottom: arguments, where a run starts from, the tokenizer, crops, the encoders, the
micro-batches of GradCache, and in main the training loop.

Not included: hard negatives, distillation, and auxiliary losses.
"""

import os

# Idle OpenMP threads spin by default, which on a busy machine takes CPU time from working ones. Let
# them sleep after some tenths of a millisecond. libgomp reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import argparse
import contextlib
import itertools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

import crops
import data
import demo
import evaluate
import kelip
from command import ArgumentParser, number, run_command
from optimizer import make_optimizer
from tokenizer import Tokenizer
from trainer import (
    MAX_WEIGHT_DECAY,
    Run,
    add_arguments,
    check_preset,
    check_scale,
    compile_blocks,
    weight_dtype,
)

MAX_LOGIT_SCALE = math.log(100)  # CLIP, arXiv 2103.00020, section 2.5
DEMO_TEST = f"{demo.DEMO}/test-*.tar"
DEMO_CLASSES = "skin tone"  # the classes of prompts.json for the demo's zero-shot classification
LR = {"adamw": 4e-4, "muon": 8e-4}  # the default for random weights
FINE_TUNING_LR = 4e-5               # and for trained ones
PROJECTIONS = ("visual.proj", "text_projection", "logit_scale")  # all that is in no encoder
MAX_PAIRS_TO_READ = 5_000_000  # before the first step, which more would delay by hours
MANY_DUPLICATES = 0.05  # among the captions of a batch, which is said


def parse_arguments(argv=None):
    """The command line."""
    parser = ArgumentParser(
        description=__doc__.partition("\nFrom top")[0],
        epilog="The run's folder then holds last.pt, tokenizer.json, config.json, metrics.jsonl\n"
               "and index.html; with test pairs also best.pt, the weights with the highest mean\n"
               "R@1. kelip.build_model(FOLDER) loads last.pt.",
        fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, out="runs/clip", batch_size=512, epochs=10,
                  lr=f"{LR['adamw']:g}, with muon {LR['muon']:g}; {FINE_TUNING_LR:g} to fine-tune "
                     "the complete model of --init")
    add = parser.add_argument
    add("--tokenizer", metavar="FILE",
        help="a tokenizer.json (default: that of --init's model, else one trained on the captions)")
    add("--init", metavar="RUN",
        help="initial weights: a run of train_mae.py (its image encoder), or a run of "
             "train_clip.py, released KELIP or what extras.convert wrote (the entire model, with "
             "its sizes and its tokenizer)")
    add("--languages", nargs="+", metavar="LANGUAGE",
        help="train on captions in these languages alone, such as en (default: all)")
    add("--new-text", action="store_true",
        help="keep only the image encoder of --init's model: the text encoder starts from random "
             "weights, with --tokenizer or one trained on the captions")
    add("--freeze", choices=["image", "text"],
        help="do not train this encoder. Needs --init")
    add("--encoder-lr-factor", type=number(float, 0, 1000), metavar="X",
        help="learning rate of the encoders without their projections, as a multiple of --lr; 0 "
             "trains the projections alone. Needs --init (default: 1)")
    add("--crops", metavar="SPEC",
        help="crops per image, NUMBERxPIXELS joined by + (default: 1x48 for tiny, else 2x224+6x96; "
             "sizes are multiples of the model's patch, so ViT-L/14 has 6x98)")
    add("--scale", nargs=2, type=number(float), metavar=("MIN", "MAX"),
        help="area of the crops in the first group of --crops, as a fraction of the image "
             "(default: 0.8 1 for tiny, else 0.4 1)")
    add("--low-scale", nargs=2, type=number(float), default=(0.05, 0.4), metavar=("MIN", "MAX"),
        help="the same for the other groups (default: 0.05 0.4)")
    add("--augment", action="store_true",
        help="SimCLR's color distortion and blur: in the KELIP paper this helps classification "
             "and hurts retrieval")
    add("--micro-batch", type=number(int, 1), metavar="N",
        help="encode N pairs per process at a time (GradCache): the same loss and gradients in "
             "less memory, for one more forward pass (default: all at once)")
    add("--weight-decay", type=number(float, 0, MAX_WEIGHT_DECAY), default=0.2, metavar="X",
        help="weight decay, of matrices only (default: 0.2)")
    add("--test", nargs="+", metavar="SHARDS",
        help="held-out pairs for retrieval, during the run and after it (default with the demo's "
             f"data: {DEMO_TEST})")
    add("--holdout", type=number(float, above=0, high=0.99), metavar="FRACTION",
        help="hold out this fraction of the pairs as test pairs, in place of --test. The digest of "
             "an image decides, so that it stays on its side when pairs are added. Reads all pairs")
    add("--evals", type=number(int, 0, 10_000), default=4, metavar="N",
        help="evaluations during the run on the test pairs, including one at the end (default: 4)")
    args = parser.parse_args(argv)
    check_preset(args.model)
    if args.batch_size < 2:
        raise ValueError("--batch-size 1: a pair learns from the others of its batch, so it needs "
                         "at least 2")
    needs_init = {f"--freeze {args.freeze}": args.freeze, "--new-text": args.new_text,
                  "--encoder-lr-factor": args.encoder_lr_factor is not None}
    for flag, is_given in needs_init.items():
        if is_given and not args.init and not args.resume:
            raise ValueError(f"{flag}: needs --init, since without it all weights are random")
    if args.scale:
        check_scale("--scale", args.scale)
    check_scale("--low-scale", args.low_scale)
    if args.crops:
        crops.parse_crops(args.crops)
    if args.holdout and args.test:
        raise ValueError(f"--holdout {args.holdout:g}: --test names the test pairs already: leave "
                         "out one of the two")
    if not (args.holdout or args.test) and args.data == parser.get_default("data"):
        args.test = [DEMO_TEST]
    return args


# ---- where a run starts from ----

class Origin(NamedTuple):
    """What a run starts from."""
    preset: str                    # the name of the sizes: a preset, else the file name of --init
    config: dict                   # the arguments of kelip.KELIP
    init: object = None            # the kelip.Checkpoint of --init
    is_from_stage_1: bool = False

    @property
    def has_complete_model(self):
        """Whether --init has both encoders, and not stage 1's image encoder alone."""
        return self.init is not None and not self.is_from_stage_1


def find_origin(args, checkpoint):
    """The Origin of a run. checkpoint: the one to resume, or None.

    The sizes are those of the checkpoint, else those of --init's model, else those of --model.
    Fills in the defaults of --optimizer and --lr, which depend on the origin.
    """
    if checkpoint:
        preset, config, init = checkpoint["config"]["preset"], checkpoint["config"]["model"], None
        is_from_stage_1 = checkpoint["config"].get("is_from_stage_1", False)
    else:
        preset = args.model or "tiny"
        config = kelip.PRESETS[preset]
        init = kelip.open_checkpoint(args.init) if args.init else None
        is_from_stage_1 = bool(init and init.is_stage_1)
        if init and not is_from_stage_1:
            config = init.config
            preset = _preset_of(config) or Path(args.init).name
    if args.model not in (None, preset):
        flag = "--resume" if checkpoint else "--init"
        raise ValueError(f"--model {args.model}: {flag} brings a model of other sizes: leave out "
                         "--model")
    if is_from_stage_1 and (args.freeze == "text" or args.new_text):
        flag = "--new-text" if args.new_text else "--freeze text"
        raise ValueError(f"{flag}: --init {args.init} is a run of stage 1, which has no text "
                         "encoder")
    origin = Origin(preset, config, init, is_from_stage_1)
    args.optimizer = args.optimizer or ("muon" if preset == "tiny" else "adamw")
    args.is_from_stage_1 = is_from_stage_1  # for config.json, from which it is resumed
    if args.lr is None:
        is_fine_tuning = origin.has_complete_model and not args.new_text
        args.lr = FINE_TUNING_LR if is_fine_tuning else LR[args.optimizer]
        if checkpoint:
            args.lr = checkpoint["config"]["lr"]
    return origin


def _preset_of(config):
    """The name of the preset that equals config in all but the vocabulary size, or None."""
    for name, preset in kelip.PRESETS.items():
        if {**preset, "vocab_size": config["vocab_size"]} == config:
            return name
    return None


def freeze(model, encoder, origin, lr_factors):
    """Exclude parameters from training: those of an encoder, "image", "text" or None, and those
    whose learning rate is 0.
    """
    if encoder == "image":
        model.visual.requires_grad_(False)
        # Stage 1 leaves the projection random, so it must be trained.
        model.visual.proj.requires_grad_(origin.is_from_stage_1)
    elif encoder == "text":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("visual.") or name == "logit_scale")
    for name, parameter in model.named_parameters():
        if lr_factors[name] == 0:
            parameter.requires_grad_(False)


def open_tokenizer(args, run, pairs, origin):
    """The tokenizer of the run.

    In order of precedence: that of the checkpoint to resume, --tokenizer, that of --init's model,
    one trained on the captions. Raises ValueError if --tokenizer is another one than the weights
    were trained with.
    """
    spec = None
    with run.rank_zero_first():
        if run.is_rank_zero:
            spec = _choose_tokenizer(args, run.checkpoint, pairs, origin).spec
    return Tokenizer(run.broadcast(spec))


def _choose_tokenizer(args, checkpoint, pairs, origin):
    trained = None  # the tokenizer of trained weights
    if checkpoint:
        trained = Tokenizer(json.loads(checkpoint["tokenizer"]))
    elif origin.has_complete_model and not args.new_text:
        trained = origin.init.tokenizer
    given = Tokenizer.load(args.tokenizer) if args.tokenizer else trained
    if trained and given.digest != trained.digest:
        advice = "resume without --tokenizer" if checkpoint else "leave it out, or add --new-text"
        raise ValueError(f"--tokenizer {args.tokenizer}: not the one that the weights were trained "
                         f"with, so each embedding would stand for another text: {advice}")
    if trained:
        return trained
    if given:
        return given
    if len(pairs) > MAX_PAIRS_TO_READ:
        raise ValueError(f"{len(pairs):,} pairs are too many to train a tokenizer on now: train "
                         "one with `python tokenizer.py train`, and give it as --tokenizer")
    texts = pairs.texts()
    first = next(texts, None)
    if first is None:
        raise ValueError(f"--data {' '.join(args.data)}: no caption can be read; `python data.py "
                         "captions SHARDS` says why")
    return Tokenizer.train(itertools.chain([first], texts), origin.config["vocab_size"],
                           progress=sys.stdout.isatty())


# ---- crops ----

def fill_in_crops(args, origin):
    """Fill in the defaults of --crops and --scale. Returns --crops as a list of (number, size).

    The defaults are KELIP's two crops of 224 pixels and six of 96, at the scales of DINO (arXiv
    2104.14294). At another resolution, all sizes scale with it. "tiny" gets one large crop: the
    demo's emoji fill their 72 pixels, and a small crop would lose what the caption names. Both go
    into args, so that config.json has them and --resume compares them.
    """
    patch, resolution = origin.config["vision_patch_size"], origin.config["image_resolution"]
    if origin.preset == "tiny":
        default_crops, default_scale = "1x48", (0.8, 1.0)
    else:
        low = max(1, round(resolution * 96 / 224 / patch)) * patch  # a multiple of the patch
        default_crops, default_scale = f"2x{resolution}+6x{low}", (0.4, 1.0)
    args.crops = args.crops or default_crops
    args.scale = args.scale or default_scale
    groups = crops.parse_crops(args.crops)
    args.crops = crops.format_crops(groups)  # "64" and "1x64" are equal
    for _, size in groups:
        if size % patch:
            raise ValueError(f"--crops {args.crops}: {size} pixels is not a multiple of "
                             f"{origin.preset}'s patch of {patch}")
    return groups


# ---- encoders and micro-batches ----

class Encoders(nn.Module):
    """Both encoders in one forward, since DistributedDataParallel takes one forward per backward.

    views: a list of K crops [N, 3, size, size]; tokens [N, C, L], on the CPU, where their lengths
    are needed. Returns features of unit length, of the views [K, N, D] and of the texts [C, N, D],
    and the logit scale, a scalar. Views of one size are adjacent in the result.
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
        texts = tokens.transpose(0, 1)                                       # [C, N, L]
        text_features = self.model.encode_text(texts.flatten(0, 1), l2norm=True)
        text_features = text_features.view(*texts.shape[:2], -1)             # [C, N, D]
        return torch.stack(image_features), text_features, self.model.logit_scale.exp()


def backward_in_micro_batches(run, encoders, make_views, batch, valid, micro_batch):
    """The loss and the gradients of a batch, with only `micro_batch` pairs in the encoders at once.

    GradCache (Gao et al., arXiv 2101.06983). First encode all pairs without a graph, and compute
    the gradient of the loss with respect to the features. Then encode each micro-batch again, with
    a graph, and propagate its part of that gradient back. Both times the crops are the same, since
    they depend on the seed and the sample index alone. Returns (loss, per_pair_loss).
    """
    n = valid.shape[1]
    micro_batches = [slice(i, i + micro_batch) for i in range(0, n, micro_batch)]

    def encode(rows):
        views = make_views(batch, rows)                                      # K x [m, 3, s, s]
        with run.autocast():
            return encoders(views, batch.tokens[rows])                       # [K, m, D], [C, m, D]

    with torch.no_grad():
        image_features, text_features, logit_scales = zip(*map(encode, micro_batches))
    features = (torch.cat(image_features, dim=1),                            # [K, n, D]
                torch.cat(text_features, dim=1),                             # [C, n, D]
                logit_scales[0])
    for feature in features:
        feature.requires_grad_()
    loss, per_pair_loss = kelip.contrastive_loss(*features, run.group, valid, per_pair=True,
                                                 compile=run.args.compile)
    run.backward(loss)
    d_image, d_text, d_scale = (feature.grad for feature in features)

    for rows in micro_batches:
        is_last = rows is micro_batches[-1]
        # Ranks average their gradients once, in the last backward pass.
        is_local = run.group is not None and not is_last
        with encoders.no_sync() if is_local else contextlib.nullcontext():
            outputs = encode(rows)
            # d_scale is that of the entire batch, so only one micro-batch adds it.
            grads = d_image[:, rows], d_text[:, rows], d_scale * is_last
            # The output of a frozen encoder has no graph.
            trained = [(out, grad) for out, grad in zip(outputs, grads) if out.requires_grad]
            # Not run.backward: grads have fp16's loss scale already.
            torch.autograd.backward(*zip(*trained))
    return loss, per_pair_loss


# ---- training ----

def describe_pairs(args, pairs, test):
    """Print where the test pairs come from, and whether many captions of a batch are equal."""
    if args.holdout:
        print(f"--holdout {args.holdout:g}: {len(test):,} pairs are held out as test pairs")
    elif not test:
        print("no test pairs, so nothing is evaluated: add --holdout 0.1, or --test SHARDS")
    duplicates = data.duplicate_captions(pairs, args.seed, args.batch_size)
    if duplicates > MANY_DUPLICATES:
        print(f"on average, {100 * duplicates:.1f} % of the captions of a batch are duplicates, "
              "which the loss counts as wrong captions of each other's images")


def train(args, run):
    """Set up, train, evaluate, and print where the results are."""
    origin = find_origin(args, run.checkpoint)
    args.model = origin.preset
    crop_groups = fill_in_crops(args, origin)

    pairs = run.open_pairs(languages=args.languages)
    pairs.require_captions("--data")
    test = candidates = None
    if args.holdout:
        if len(pairs) > MAX_PAIRS_TO_READ:
            raise ValueError(f"--holdout {args.holdout:g}: {len(pairs):,} pairs are too many to "
                             "read now: name shards of test pairs with --test")
        pairs, test = pairs.split(args.holdout, progress=run.is_rank_zero)
    elif args.test:
        with run.rank_zero_first():  # it writes the index of the shards, the others read it
            test = data.Pairs(args.test)
        test.require_captions("--test")
        candidates = evaluate.read_candidates(args.test)  # further texts to choose from

    tokenizer = open_tokenizer(args, run, pairs, origin)
    config = dict(origin.config)
    if origin.has_complete_model:
        # Fine-tune at the size of the first crops: init_from interpolates the positions to it.
        config["image_resolution"] = crop_groups[0][1]
    if not run.checkpoint and (args.new_text or not origin.has_complete_model):
        config["vocab_size"] = len(tokenizer)
    torch.manual_seed(args.seed)
    model = kelip.KELIP(**config)
    if origin.init:
        loaded = kelip.init_from(model, origin.init, args.new_text)
        if run.is_rank_zero:
            print(f"starts from {loaded}; --lr {args.lr:g}")
    factor = 1 if args.encoder_lr_factor is None else args.encoder_lr_factor
    lr_factors = {name: 1 if name in PROJECTIONS else factor
                  for name, _ in model.named_parameters()}
    freeze(model, args.freeze, origin, lr_factors)
    model.to(run.device, weight_dtype(args.precision))
    if args.compile:
        compile_blocks(model)

    # Betas and epsilon are those of CLIP's ViTs (arXiv 2103.00020, appendix F).
    optimizer = make_optimizer(model, args.lr, betas=(0.9, 0.98), eps=1e-6,
                               weight_decay=args.weight_decay, name=args.optimizer, dtype=run.dtype,
                               lr_factors=lr_factors)
    # The loader pads images to squares that are large enough for all crops.
    padded_size = crops.padded_size(crop_groups, args.scale, args.low_scale)
    # Fixes the number of steps, or restores the checkpoint.
    run.start(model, optimizer, pairs, config, args.evals if test else 0, tokenizer, padded_size)
    encoders = run.data_parallel(Encoders(model))
    loader = run.open_loader(pairs, tokenizer)
    run.announce(f"{args.model}: {kelip.count_parameters(model) / 1e6:.1f}M parameters, "
                 f"{len(tokenizer):,} tokens, {args.crops} crops")
    if run.is_rank_zero:
        describe_pairs(args, pairs, test)

    def make_views(batch, rows=slice(None)):
        """Crops of some rows of a batch, normalized: a list of K tensors [n, 3, size, size]."""
        images = batch.images[rows].to(run.device, non_blocking=True)
        return crops.multi_crop(
            images, crop_groups, args.seed, batch.sample_index[rows], batch.aspect[rows],
            scale=args.scale, low_scale=args.low_scale, augment=args.augment)

    embedded = None  # the test pairs' features at the last evaluation

    def evaluate_at(step):
        """Retrieval on the test pairs, by rank zero, into metrics.jsonl; best.pt if it is best."""
        nonlocal embedded
        embedded = None  # not those of an earlier step, if this evaluation fails
        with run.evaluation(step):  # the other ranks wait
            if run.is_rank_zero:
                embedded = evaluate.Embedded(model, test, tokenizer, candidates, progress=False)
                recall = evaluate.retrieve(model, test, tokenizer, embedded=embedded)
                run.save_best(step, evaluate.mean_recall(recall))
                run.log_evaluation(step, recall)

    if run.evaluates_at(run.first_step):  # the run was killed between saving and evaluating
        evaluate_at(run.first_step)
    for step, batch in run.steps(loader):  # step counts from 1; sets the learning rate
        language = batch.language.T.to(run.device, non_blocking=True)        # [C, n]
        # A pair that could not be read, and a caption that it does not have, have no language. The
        # loss ignores them.
        valid = language >= 0                                                # [C, n]
        if args.micro_batch and args.micro_batch < valid.shape[1]:
            loss, per_pair_loss = backward_in_micro_batches(
                run, encoders, make_views, batch, valid, args.micro_batch)
        else:
            views = make_views(batch)                                        # K x [n, 3, s, s]
            with run.autocast():
                image_features, text_features, logit_scale = encoders(
                    views, batch.tokens)                                     # [K, n, D], [C, n, D]
            # The loss of the global batch, of all ranks: every image against every text.
            loss, per_pair_loss = kelip.contrastive_loss(
                image_features, text_features, logit_scale, run.group, valid, per_pair=True,
                compile=args.compile)
            run.backward(loss)
        scale = model.logit_scale.detach().exp()  # the one that this loss used, for the log
        grad_norm = run.optimizer_step()  # clip to norm 1, step if finite, clear the gradients
        model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)

        # (values, where) logs the mean of values where `where` holds: the loss of each language.
        by_language = {f"loss_{name or 'text'}": (per_pair_loss, valid & (language == i))
                       for i, name in enumerate(loader.languages)}
        run.log(step, loss, grad_norm, logit_scale=scale, **by_language)
        run.save_if_due(step)  # exits after a signal
        if run.evaluates_at(step):
            evaluate_at(step)

    if run.is_rank_zero:
        print(loader.report())
        print(f"{args.out}: last.pt, tokenizer.json, config.json, metrics.jsonl")
        if test:
            classes = DEMO_CLASSES if args.test == [DEMO_TEST] else None
            numbers = evaluate.report(args.out, model, test, tokenizer, candidates, classes,
                                      embedded=embedded)
            print(f"open {args.out}/index.html")
            last, best = evaluate.mean_recall(numbers["retrieval"]), run.best["score"]
            if run.best["step"]:  # not with --evals 0
                better = "best.pt is better" if best > last else "last.pt is as good"
                print(f"mean R@1: last.pt {100 * last:.1f} %, best.pt {100 * best:.1f} % (step "
                      f"{run.best['step']:,}): {better}")


def main(argv=None):
    """Read the command line, and train in the folder of the run."""
    args = parse_arguments(argv)
    with Run(args, stage="clip") as run:
        train(args, run)


if __name__ == "__main__":
    run_command(main, output="log", on_out_of_memory=": lower --batch-size, --micro-batch, --crops "
                "or --workers")
