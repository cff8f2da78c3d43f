"""Test the paper's ablation, its four findings, and teaching by text, at the scale of the demo.

    python -m extras.findings ablation        do stage 1 and multi-crop help, most of all together?
    python -m extras.findings augmentation    does strong augmentation help or hurt?
    python -m extras.findings alignment       do the languages align through shared images?
    python -m extras.findings culture         do translations of a name find different images?
    python -m extras.findings analogy         does image - text + text find the analogous image?
    python -m extras.findings teacher         can a CLIP be taught a second language by text alone?
    python -m extras.findings all

A finding trains variants: runs of train_clip.py that differ in one thing, once per seed. Runs that
exist are reused, and a command that was stopped resumes when it is run again. The results go to
OUT/NAME.json and, as a page, to OUT/NAME.html.

A claim has one or more parts. Each part is a difference to a control. It holds if the difference is
positive for every seed and its mean exceeds its standard deviation over the seeds. This takes at
least three seeds. By chance alone, one part in nine would hold.

What would refute each claim, in short. The docstrings below say it in full.

    ablation        adding stage 1, multi-crop or both does not raise R@1
    augmentation    it does not raise accuracy, or does not lower R@1
    alignment       translation is no better than where each thing is named in one language only
    culture         two runs agree across languages as much as in one language, or the names on
                    which the languages disagree vary between seeds as much as noise does
    analogy         image alone, text alone or image + text finds the analogous image as often
    teacher         Korean falls below 90 % of English, or English below 95 % of the teacher's

From top to bottom: the variants, training them, numbers and verdicts, the findings, the report, the
command.

Not included: the paper's scale. The results hold for a model of 8.7M parameters on emoji.
"""

import argparse
import collections
import fcntl
import hashlib
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import classes
import crops
import data
import demo
import evaluate
import kelip
import page
import shards
import train_clip
import train_mae
from command import ArgumentParser, number, run_command
from extras.bench import FORWARD_AND_BACKWARD, image_flops, mae_flops, text_flops
from tokenizer import Tokenizer

LANGUAGES = ("en", "ko")
RECALL_COLUMNS = [f"{evaluate.LANGUAGE_NAMES[language]}, {direction}" for language in LANGUAGES
                  for direction in evaluate.DIRECTIONS.values()] + ["mean"]


# ---- the variants ----

class Variant(NamedTuple):
    """How a variant differs from CLIP alone."""
    flags: tuple = ()           # of train_clip.py
    from_stage_1: bool = False  # starts from a run of train_mae.py
    split: bool = False         # each pair has a caption in one language only: see split_language


# An emoji fills its 72 pixels, so a small crop often loses what the caption names. Multi-crop means
# two large crops here.
MULTI_CROP = ("--crops", "2x48")

VARIANTS = {
    "clip": Variant(),
    "mae": Variant(from_stage_1=True),
    "crops": Variant(MULTI_CROP),
    "both": Variant(MULTI_CROP, from_stage_1=True),
    "augment": Variant((*MULTI_CROP, "--augment")),
    "shared": Variant(split=True),
    "apart": Variant(split=True),
    "english": Variant(("--languages", "en")),
}
RUNS_PER_GPU = 6   # at the same time
STAGE_1_STEPS = 2  # per step of stage 2: the ratio of the two scripts' --epochs


class Study(NamedTuple):
    """What all findings work on."""
    args: argparse.Namespace
    pairs: list            # the training pairs, shards.Pair
    caption_length: float  # mean tokens per caption, start and end included
    lock: object           # an open file; its lock keeps other processes out of args.out


class TrainingRun(NamedTuple):
    """A variant, or stage 1, with one seed."""
    name: str
    seed: int
    steps: int
    step_flops: float          # of one step, forward and backward
    module: str
    flags: tuple
    start: object = None       # the TrainingRun that it starts from

    @property
    def chain(self):
        """The runs that must be trained in turn, this one last."""
        return [*(self.start.chain if self.start else []), self]

    @property
    def total_flops(self):
        """FLOPs of the run and of those before it."""
        return sum(run.steps * run.step_flops for run in self.chain)


def make_run(study, name, seed, budget=None):
    """The TrainingRun of a variant. It has --steps steps.

    With a budget of FLOPs, it has the number of steps that comes closest to it, stage 1 included.
    """
    args, variant = study.args, VARIANTS[name]
    config = kelip.PRESETS["tiny"]
    sources = [str(args.out / "data" / name)] if variant.split else args.data
    flags = ["--data", *sources, "--test", *args.test, "--evals", "1",
             "--tokenizer", str(args.out / "tokenizer.json"), *variant.flags]
    stage_1 = None
    if variant.from_stage_1:
        mask_ratio = train_mae.parse_arguments([]).mask_ratio
        mae = kelip.MAE(kelip.KELIP(**config).visual, mask_ratio)
        step_flops = FORWARD_AND_BACKWARD * args.batch_size * mae_flops(mae)
        stage_1 = TrainingRun("stage-1", seed, STAGE_1_STEPS * args.steps, step_flops,
                              "train_mae", ("--data", *args.data))
        flags += ["--init", str(folder_of(study, stage_1) / "last.pt")]
    groups, _ = crop_settings(name)
    sizes = [size for number, size in groups for _ in range(number)]
    # The captions of each pair in a step.
    captions = 1 if variant.split or "--languages" in variant.flags else len(LANGUAGES)
    pair_flops = image_flops(config, sizes) + captions * text_flops(config, study.caption_length)
    step_flops = FORWARD_AND_BACKWARD * args.batch_size * pair_flops
    steps = args.steps
    if budget:
        left = budget - (stage_1.total_flops if stage_1 else 0)
        steps = max(1, round(left / step_flops))
    return TrainingRun(name, seed, steps, step_flops, "train_clip", tuple(flags), stage_1)


def crop_settings(name):
    """The crops of a variant: (groups of crops.parse_crops, the flags of train_clip.py)."""
    flags = train_clip.parse_arguments(list(VARIANTS[name].flags))
    origin = train_clip.Origin("tiny", kelip.PRESETS["tiny"])
    groups = train_clip.fill_in_crops(flags, origin)  # also sets flags.scale
    return groups, flags


# ---- training ----

def train_seeds(study, names):
    """Train variants with every seed: {name: folders of its runs, in the order of seeds}."""
    seeds = range(study.args.seeds)
    runs = {name: [make_run(study, name, seed) for seed in seeds] for name in names}
    train(study, [runs[name][seed] for seed in seeds for name in names])
    return {name: [folder_of(study, run) for run in runs[name]] for name in names}


def train(study, runs):
    """Train runs that are not finished, each after the run that it starts from.

    Raises ValueError when one fails.
    """
    needed = dict.fromkeys(needed for run in runs for needed in run.chain)
    unfinished = [run for run in needed if not is_finished(study, run)]
    # Runs with one thread each, at the same time, are faster than one run after the other. One run
    # of "tiny" keeps a GPU busy for a fraction of the time only.
    cores = os.cpu_count()
    most = RUNS_PER_GPU if torch.cuda.is_available() else cores
    at_once = max(1, min(cores, most, len(unfinished)))
    threads = max(1, cores // at_once)
    waiting, running = list(unfinished), {}  # running: process -> TrainingRun
    bar = tqdm(total=sum(run.steps * run.step_flops for run in unfinished) / 1e12,
               bar_format="{l_bar}{bar}| {n:,.0f} of {total:,.0f} TFLOPs "
                          "[{elapsed}<{remaining}] {postfix}",
               disable=not unfinished, mininterval=1, file=sys.stdout)
    try:
        while waiting or running:
            unavailable = [*waiting, *running.values()]
            ready = [run for run in waiting if run.start not in unavailable]
            for run in ready[:at_once - len(running)]:
                waiting.remove(run)
                running[launch(study, run, threads)] = run
            time.sleep(0.2)
            for process, run in list(running.items()):
                if process.poll() is not None:
                    del running[process]
                    if not is_finished(study, run):
                        raise ValueError(f"{folder_of(study, run)}: {last_line(study, run)}")
            names = [folder_of(study, run).name for run in running.values()]
            bar.set_postfix_str(", ".join(names), refresh=False)
            done = sum(run.step_flops * steps_done(study, run) for run in unfinished)
            bar.update(done / 1e12 - bar.n)
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)  # the run saves a checkpoint and ends
        for process in running:
            process.wait()
        bar.close()


def launch(study, run, threads):
    """Start or resume a run: a subprocess.Popen."""
    folder = folder_of(study, run)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", run.module,
               "--out", str(folder), "--steps", str(run.steps), "--seed", str(run.seed),
               "--batch-size", str(study.args.batch_size), "--save-every", "50", "--keep", "1",
               *run.flags]
    if (folder / "last.pt").exists():
        command.append("--resume")
    with open(folder.with_suffix(".log"), "w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                pass_fds=[study.lock.fileno()],  # held while the process lives
                                env={**os.environ, "OMP_NUM_THREADS": str(threads),
                                     "PYTHONPATH": str(Path(__file__).resolve().parents[1])})


def is_finished(study, run):
    """Whether a run was trained to its end and, by train_clip.py, was evaluated on --test."""
    folder = folder_of(study, run)
    if run.module == "train_clip" and not (folder / "evaluation.json").exists():
        return False
    last = folder / "last.pt"
    return last.exists() and kelip.load_checkpoint(last)["step"] == run.steps


def folder_of(study, run):
    """The folder of a run. Next to it, a .log of the same name has what the run prints."""
    return study.args.out / "runs" / f"{run.name}-{run.steps}-seed{run.seed}"


def last_line(study, run):
    """The last line that a run printed, which is the error if it failed."""
    printed = folder_of(study, run).with_suffix(".log").read_text(encoding="utf-8")
    return printed.strip().split("\n")[-1] or "ended before it printed anything"


def steps_done(study, run):
    """The last step in a run's metrics.jsonl."""
    path = folder_of(study, run) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    # The last line may be incomplete while it is being written.
    lines = [line for line in lines[-2:] if line.endswith("}")]
    return max((json.loads(line)["step"] for line in lines), default=0)


# ---- numbers and verdicts ----

class Result(NamedTuple):
    """What a finding returns."""
    numbers: dict    # for the JSON file; may hold arrays
    tables: list     # of (title, header, rows); all cells are text
    verdicts: list   # one for each part of the claim
    parts: list      # HTML that the page shows after the tables


def verdict(part, differences, scale=100):
    """Whether one part of a claim held.

    part: what is compared. differences: to the control, one for each seed; shown times scale.
    Returns a dict; its held is True, False, or None with fewer than three seeds, and its words are
    one line for the reader.
    """
    values = [scale * float(x) for x in differences]
    mean = fmean(values) if values else 0.0
    sd = stdev(values) if len(values) > 1 else 0.0
    if len(values) < 3:
        held, conclusion = None, "not decided: fewer than three seeds"
    elif min(values) > 0 and mean > sd:
        held, conclusion = True, "held"
    elif max(values) < 0 and -mean > sd:
        held, conclusion = False, "did not hold: the opposite did"
    else:
        held, conclusion = False, "did not hold: within the spread"
    digits = 2 if scale > 1 else 3
    each = ", ".join(f"{value:+.{digits}f}" for value in values) or "none"
    return {"part": part, "differences": values, "mean": mean, "sd": sd, "held": held,
            "words": f"{part}: {mean:+.{digits}f} ± {sd:.{digits}f} ({each}): {conclusion}"}


def show(values, scale=100, digits=1):
    """The values of several seeds as "mean ± standard deviation"."""
    values = [scale * float(x) for x in values]
    sd = stdev(values) if len(values) > 1 else 0
    return f"{fmean(values):.{digits}f} ± {sd:.{digits}f}"


def compare(title, columns, rows, control):
    """A table of variants. Its last column is the difference to the first, the control.

    rows: {label: float [seeds, columns], in 0..1}. The difference is in the last of the columns,
    seed by seed. control: the name of the first row in the header.
    """
    first = next(iter(rows.values()))[:, -1]
    lines = [[label, *map(show, values.T), show(values[:, -1] - first, digits=2)]
             for label, values in rows.items()]
    lines[0][-1] = ""
    return title, ["", *columns, f"Δ vs {control}"], lines


def with_mean(values):
    """[*values, their mean]."""
    return [*values, fmean(values)]


def embed(study, folder):
    """The model of a run and the test pairs as it sees them: (model, tokenizer, Embedded).

    Each image has one name in each language, so the first M texts of a language are the names of
    the M images, in the same order.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _, tokenizer = kelip.build_model(str(folder), device)
    candidates = evaluate.read_candidates(study.args.test)
    test = data.Pairs(study.args.test)
    return model, tokenizer, evaluate.Embedded(model, test, tokenizer, candidates)


def recall_of_run(folder):
    """R@1 of a finished run, in 0..1, in the order of RECALL_COLUMNS: float [5]."""
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return np.array(with_mean([evaluation["retrieval"][language][direction]["R@1"]
                               for language in LANGUAGES for direction in evaluate.DIRECTIONS]))


def recall_of_texts(embedded, language, keep):
    """evaluate.recall_at_k of the texts in keep, bool [P], and of the images that own one of them.

    The other texts and images are only candidates.
    """
    owner = embedded.owner[language].masked_fill(~keep, -1)
    return evaluate.recall_at_k(embedded.images, embedded.texts[language], owner)


def crop_examples(pairs, variants):
    """HTML with all crops of six images, for each variant. variants: {title: name}."""
    images = np.stack([shards.decode(pair.image).resize((72, 72)) for pair in pairs[:6]])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)                    # [N, 3, 72, 72]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (crops.MEAN, crops.STD))
    parts = []
    for title, name in variants.items():
        groups, flags = crop_settings(name)
        views = crops.multi_crop(
            images, groups, 0, torch.arange(len(images)), scale=flags.scale,
            low_scale=flags.low_scale, augment=flags.augment)                # K x [N, 3, s, s]
        shown = []
        for views_of_image in zip(*views):
            for view in views_of_image:                                      # [3, s, s]
                pixels = ((view * std + mean).clamp(0, 1) * 255).round().byte()
                image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
                shown.append(page.image(image, image.height))
        parts.append(page.heading(title) + page.row(shown))
    return parts


# ---- ablation ----

LABELS = {"clip": "CLIP alone", "mae": "+ MAE", "crops": "+ multi-crop", "both": "+ both"}


def ablation(study):
    """Do stage 1 and multi-crop each help, and most of all together?

    Claim: Stage 1 (a masked autoencoder on the images) and multi-crop each help, and together they
    help most.

    Refuted if: The difference to the control is not positive beyond its spread, for any of + MAE,
    + multi-crop and + both.

    Runs: CLIP alone, + MAE, + multi-crop and + both, with each seed. First, all four see the same
    number of images in stage 2, and stage 1 sees twice as many in addition. Then the first three
    are trained again, for as many FLOPs as + both takes, its stage 1 included. Multi-crop is two
    crops of full size here.

    Control: CLIP alone. For + both, the one of the other three with the highest mean.

    Measure: R@1, the mean over both languages and both directions.
    """
    budgets = {"the same images in stage 2": None,
               "the same FLOPs": make_run(study, "both", 0).total_flops}
    seeds = range(study.args.seeds)
    settings = {title: {name: [make_run(study, name, seed, budget) for seed in seeds]
                        for name in LABELS} for title, budget in budgets.items()}
    train(study, [runs[name][seed] for seed in seeds for runs in settings.values()
                  for name in LABELS])

    numbers = {"caption_length": study.caption_length, "columns": RECALL_COLUMNS}
    tables, verdicts = [], []
    for title, runs in settings.items():
        recall, rows = {}, {}                                                # of [seeds, 5]
        numbers[title] = {}
        for name, label in LABELS.items():
            recall[name] = np.stack([recall_of_run(folder_of(study, run)) for run in runs[name]])
            run = runs[name][0]
            numbers[title][name] = {"steps": run.steps, "FLOPs": run.total_flops,
                                    "R@1": recall[name]}
            steps = " + ".join(f"{x.steps:,}" for x in run.chain)
            rows[f"{label}, {steps} steps, {run.total_flops / 1e12:,.1f} TFLOPs"] = recall[name]
        tables.append(compare(f"R@1 with {title}, %", RECALL_COLUMNS, rows, LABELS["clip"]))
        clip, mae, multi_crop, both = (recall[name][:, -1] for name in LABELS)
        best_other = max((clip, mae, multi_crop), key=np.mean)
        for compared, difference in (("+ MAE vs CLIP alone", mae - clip),
                                     ("+ multi-crop vs CLIP alone", multi_crop - clip),
                                     ("+ both vs the best other", both - best_other)):
            verdicts.append(verdict(f"R@1 with {title}: Δ, {compared}, points", difference))
    examples = {"Images as CLIP alone sees them": "clip", "Images with multi-crop": "crops"}
    return Result(numbers, tables, verdicts, crop_examples(study.pairs, examples))


# ---- augmentation ----

def augmentation(study):
    """Does strong augmentation help classification and hurt retrieval?

    Claim: Strong augmentation (SimCLR's color distortion and blur) helps classification and hurts
    retrieval.

    Refuted if: Accuracy is not higher with it, or R@1 is not lower, each beyond its spread. Half of
    the names state a skin tone or a color, which augmentation removes from the image, so R@1 must
    be lower for the other names too.

    Runs: Multi-crop (two crops of full size), which the ablation trains, and the same with
    --augment.

    Control: Multi-crop without --augment.

    Measure: Accuracy on coarse groups of emoji, the mean over groups and languages, and R@1, the
    mean over languages and directions.
    """
    folders = train_seeds(study, ["crops", "augment"])
    recall, colorless_recall, accuracy = {}, {}, {}                          # [seeds, ... and mean]
    for label, name in (("plain", "crops"), ("augmented", "augment")):
        recall[label] = np.stack([recall_of_run(folder) for folder in folders[name]])
        accuracies, recalls = [], []
        for folder in folders[name]:
            model, tokenizer, embedded = embed(study, folder)
            groups = evaluate.classify(model, None, tokenizer, classes.read_classes("emoji groups"),
                                       embedded=embedded)
            accuracies.append(with_mean([groups[x]["mean_per_class"] for x in LANGUAGES]))
            colorless, n_colorless = _recall_of_colorless(embedded)
            recalls.append(colorless)
        accuracy[label], colorless_recall[label] = np.array(accuracies), np.array(recalls)

    tables = [
        compare("Retrieval, R@1, %", RECALL_COLUMNS, recall, "plain"),
        compare(f"Retrieval of the {n_colorless:,} names without skin tone or color, R@1, %",
                RECALL_COLUMNS, colorless_recall, "plain"),
        compare(f"{groups['images']:,} images in {groups['classes']} groups, accuracy by group, %",
                ["English", "Korean", "mean"], accuracy, "plain")]
    better, worse, colorless_worse = (x["augmented"][:, -1] - x["plain"][:, -1]
                                      for x in (accuracy, recall, colorless_recall))
    verdicts = [
        verdict("Classification: Δ, augmented vs plain, points", better),
        verdict("Retrieval: Δ, plain vs augmented, points", -worse),
        verdict("Retrieval of names without skin tone or color: Δ, plain vs augmented, points",
                -colorless_worse)]
    numbers = {"columns": RECALL_COLUMNS, "R@1": recall,
               "R@1 without skin tone or color": colorless_recall, "accuracy": accuracy,
               "chance": 1 / groups["classes"]}
    examples = {"Images with plain crops": "crops", "The same, augmented": "augment"}
    return Result(numbers, tables, verdicts, crop_examples(study.pairs, examples))


def _recall_of_colorless(embedded):
    """R@1 of the images whose English name has no skin tone or color, and how many they are.

    R@1 is a list in the order of RECALL_COLUMNS.
    """
    colors = "|".join(ATTRIBUTES["color"][0])
    pattern = re.compile(rf"skin tone|(?<![\w-])({colors})(?![\w-])")
    names = embedded.captions["en"][:len(embedded.pairs)]
    keep = torch.tensor([not pattern.search(name) for name in names])        # [M]
    values = []
    for language in LANGUAGES:
        # A text without an owner, -1, stays a candidate, whatever keep[-1] is.
        recall = recall_of_texts(embedded, language, keep[embedded.owner[language]])
        values += [recall[direction]["R@1"] for direction in evaluate.DIRECTIONS]
    return with_mean(values), int(keep.sum())


# ---- alignment ----

TRANSLATIONS = ("English to Korean", "Korean to English")


def alignment(study):
    """Do the two languages align through the images that they share?

    Claim: The two languages align through the images that they share, without any loss between
    them.

    Refuted if: Translation in "shared" is not better than in "apart" beyond the spread.

    Runs: "shared" and "apart". In "shared", each image has its caption in one language only, chosen
    by a hash of its key. So no pair has both names, but nearly each thing is named in both
    languages, on images of different vendors.

    Control: "apart", where each thing, with all its skin tones and genders, is named in one
    language only. This model never sees the other name of a thing. What it translates correctly
    comes from words that names have in common, such as skin tones. All seeds split the languages in
    the same way.

    Measure: R@1 of translation: the Korean name that is nearest to an English one, among all names
    of training, and the reverse, without an image between them. Retrieval of the names that were
    in training shows that both variants learned both languages.
    """
    for name in ("shared", "apart"):
        write_split(study.args.out / "data" / name, name, study.pairs)
    folders = train_seeds(study, ["shared", "apart"])

    names = sorted({tuple(pair.captions[x][0] for x in LANGUAGES) for pair in study.pairs})
    recall, nearest = {}, {}
    for variant in folders:
        trained = set()  # (language, name)
        for pair in study.pairs:
            language = split_language(variant, pair)
            trained.add((language, pair.captions[language][0]))
        recall[variant] = []
        for folder in folders[variant]:
            model, tokenizer, embedded = embed(study, folder)
            english, korean = (evaluate.embed_texts(model, tokenizer, list(texts))
                               for texts in zip(*names))                     # [P, D] each
            found = evaluate.recall_at_k(english, korean, torch.arange(len(names)))
            found = dict(zip(TRANSLATIONS, (found["image_to_text"], found["text_to_image"])))
            for language, title in zip(LANGUAGES, ("images, English", "images, Korean")):
                texts = embedded.captions[language]
                keep = torch.tensor([(language, text) in trained for text in texts])
                both = recall_of_texts(embedded, language, keep).values()    # directions
                found[title] = {f"R@{k}": fmean(values[f"R@{k}"] for values in both)
                                for k in evaluate.KS}
            recall[variant].append(found)
            if variant not in nearest:  # the first seed's, for the page
                nearest[variant] = (english @ korean.T).topk(min(3, len(names))).indices

    rows = [[f"{variant}: {what}", *(show([found[what][f"R@{k}"] for found in recall[variant]])
                                     for k in evaluate.KS)]
            for variant in recall for what in recall[variant][0]]
    title = f"Translation among {len(names):,} names, chance {100 / len(names):.2f} %; and images"
    tables = [(title, ["%", *(f"R@{k}" for k in evaluate.KS)], rows)]
    shared, apart = (np.array([fmean(found[what]["R@1"] for what in TRANSLATIONS)
                               for found in recall[variant]]) for variant in ("shared", "apart"))
    verdicts = [verdict("R@1 of translation: Δ, shared vs apart, points", shared - apart)]
    parts = [page.heading("The Korean names nearest to an English one",
                          "By the runs of the first seed. The right one is marked."),
             page.cards(_translation_cards(names, nearest, embedded.pairs))]
    return Result({"names": len(names), "found": recall}, tables, verdicts, parts)


def _translation_cards(names, nearest, pairs):
    """Some English names, an image of each, and the Korean names that each variant finds."""
    pair_of = {pair.captions["en"][0]: pair for pair in pairs}
    cards = []
    for i in range(0, len(names), max(1, len(names) // 24)):
        english, _ = names[i]
        if english in pair_of:
            lists = ""
            for variant, indices in nearest.items():
                found = [(names[j][1], j == i) for j in indices[i].tolist()]
                lists += page.names(f"{english}, {variant}", found)
            cards.append(page.card(page.image(shards.decode(pair_of[english].image)), lists))
    return cards


def write_split(folder, name, pairs):
    """Write training pairs as shards with one caption each, unless the folder exists."""
    if folder.exists():
        return
    with shards.new_folder(str(folder)) as temporary:
        for number, part in enumerate(np.array_split(np.arange(len(pairs)), 8)):
            written = []
            for pair in (pairs[i] for i in part):
                caption = f"{split_language(name, pair)}.txt"
                members = {suffix: content for suffix, content in pair.members.items()
                           if suffix == caption or not suffix.endswith("txt")}
                written.append((pair.key, members))
            shards.write_shard(f"{temporary}/train-{number}.tar", written)


def split_language(name, pair):
    """The language of a pair's caption: by its key in "shared", by its concept in "apart"."""
    text = pair.key if name == "shared" else concept(pair)
    return LANGUAGES[hashlib.sha256(text.encode()).digest()[0] % 2]


def code_points(key):
    """"Joy-U+1F468-U+1F3FF" -> [0x1F468, 0x1F3FF]; [] for keys that name no emoji."""
    return [int(part[2:], 16) for part in key.split("-") if part.startswith("U+")]


SKIN_TONES = set(range(0x1F3FB, 0x1F400))
MALE_FEMALE_JOINER_SELECTOR = {0x2642, 0x2640, 0x200D, 0xFE0F}
WITHOUT_GENDER = {
    0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1,  # man, woman: person
    0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2,  # boy, girl: child
    0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3,  # old man, old woman: older person
    0x1F57A: 0x1F483,                    # dancing man: dancing woman
    0x1F478: 0x1F934,                    # princess: prince
    0x1F936: 0x1F385,                    # Mrs. Claus: Santa Claus
    0x1FAC3: 0x1F930, 0x1FAC4: 0x1F930,  # pregnant man, pregnant person: pregnant woman
}
SAME_CONCEPT = {  # code points, in hexadecimal -> those of another emoji that shows the same
    "1F491": "1F9D1 2764 1F9D1",         # couple with heart
    "1F48F": "1F9D1 2764 1F48B 1F9D1",   # kiss
    "1F9D1 1F384": "1F385",              # Mx Claus: Santa Claus
    "1F46B": "1F9D1 1F91D 1F9D1",        # woman and man, two men, two women holding hands
    "1F46C": "1F9D1 1F91D 1F9D1",
    "1F46D": "1F9D1 1F91D 1F9D1",
}


def concept(pair):
    """What an emoji shows, regardless of gender and skin tone.

    Returns the code points in its key, without those of gender and skin tone, or its English name
    if the key has no code points. All families are one concept.
    """
    ignored = SKIN_TONES | MALE_FEMALE_JOINER_SELECTOR
    points = [WITHOUT_GENDER.get(point, point) for point in code_points(pair.key)]
    text = " ".join(f"{point:X}" for point in points if point not in ignored)
    if re.fullmatch("(1F9D1 )+1F9D2( 1F9D2)*", text):
        return "1F46A"  # family
    return SAME_CONCEPT.get(text, text) or pair.captions["en"][0]


# ---- culture ----

NEAREST = 10  # two names are compared by the images that are nearest to each


def culture(study):
    """Do names of one meaning find different images in the two languages?

    Claim: Names of one meaning find different images in the two languages, and not by chance.

    Refuted if: Two seeds agree no more in one language than across the two, beyond the spread over
    pairs of seeds. (Pairs share seeds, so this spread is too small.) Or if the disagreement of the
    languages, name by name, is correlated with that in other seeds no more than with noise, beyond
    its spread.

    Runs: CLIP alone, which the ablation trains.

    Control: For the agreement across languages: the agreement in one language. For the correlation
    with other seeds: the correlation with noise, which is the disagreement of two other seeds in
    one language. Names that find nothing reliably disagree by noise alone.

    Measure: Two names agree by the Jaccard index of the ten test images nearest to each. Names that
    no training image has, names with a skin tone (half of all) and flags (only their Korean names
    say "flag") are not included. Names are translations, and the images are the same for both
    languages. So a difference comes from the other words of each language, not from two cultures.
    """
    if study.args.seeds < 2:
        raise ValueError(f"--seeds {study.args.seeds}: culture compares seeds: at least 2")
    scores = []  # for each seed {language: float [P, M]}, of P names and M images
    for folder in train_seeds(study, ["clip"])["clip"]:
        *_, embedded = embed(study, folder)
        chosen = _names_to_compare(study, embedded)
        scores.append({x: embedded.texts[x][chosen] @ embedded.images.T for x in LANGUAGES})
    n_images = len(embedded.pairs)
    k = min(NEAREST, n_images)
    nearest = [{x: of_seed[x].topk(k).indices for x in LANGUAGES} for of_seed in scores]
    same, cross, correlations, controls = agreements(nearest)

    has_controls = None not in controls
    noise = show(controls, 1, 2) if has_controls else "needs three seeds"
    tables = [
        (f"Jaccard index of the {k} nearest of {n_images:,} images to {len(chosen):,} names, %",
         ["agreement", "mean over pairs of seeds"],
         [["two seeds, one language", show(same.mean(1))],
          ["two seeds, two languages", show(cross.mean(1))],
          ["chance", f"{100 * k / (2 * n_images - k):.1f}"]]),
        ("Correlation of the disagreement of the languages, over names",
         ["rank correlation", "mean over seeds"],
         [["with the disagreement of the languages in another seed", show(correlations, 1, 2)],
          ["with noise: the disagreement of two others in one language", noise]])]
    differences = np.subtract(correlations, controls) if has_controls else []
    verdicts = [
        verdict("Agreement of two seeds: Δ, one language vs two, points", (same - cross).mean(1)),
        verdict("Correlation of the disagreement: Δ, with other seeds vs with noise", differences,
                scale=1)]

    disagreement = (same - cross).amin(0)                                    # [P], in all pairs
    names = [embedded.pairs[i].captions["en"][0] for i in chosen]
    most = disagreement.argsort(descending=True)[:100].tolist()
    numbers = {"one language": same.mean(1).tolist(), "two languages": cross.mean(1).tolist(),
               "correlation": correlations, "control": controls,
               "disagreement": {names[i]: disagreement[i].item() for i in most}}
    total = {x: sum(of_seed[x] for of_seed in scores) for x in LANGUAGES}    # [P, M] each
    parts = [page.heading("Where the languages disagree most, in every pair of seeds",
                          f"The {k} images nearest to the English name and to the Korean one, by "
                          "the sum of the scores over seeds. These names are the most extreme of "
                          "all, so some are here by chance."),
             page.cards(_culture_cards(embedded.pairs, chosen, disagreement, total, k))]
    return Result(numbers, tables, verdicts, parts)


def _names_to_compare(study, embedded):
    """The test pairs whose names are compared, indices below M. Raises ValueError without any."""
    trained = {pair.captions["en"][0] for pair in study.pairs}
    chosen = [i for i, pair in enumerate(embedded.pairs)
              if pair.captions["en"][0] in trained and not is_flag(pair.key)
              and not SKIN_TONES & set(code_points(pair.key))]
    if not chosen:
        raise ValueError(f"--test {' '.join(study.args.test)}: has none of the names in --data")
    return chosen


def is_flag(key):
    """Whether a key is that of a country's flag."""
    points = code_points(key)
    return bool(points) and 0x1F1E6 <= points[0] <= 0x1F1FF


def agreements(nearest):
    """How much names agree across seeds, in one language and in two.

    nearest: for each seed {language: int64 [P, K]}, the images nearest to each of P names.

    Returns
        same: float [pairs of seeds, P], the agreement of two seeds in one language.
        cross: the same across languages.
        correlations: for each seed the correlation, over names, of the disagreement of its
            languages with that in the other seeds.
        controls: for each seed its correlation with noise, which is the disagreement of two other
            seeds in one language; None if there are no two others.
    """
    seed_pairs = list(itertools.combinations(range(len(nearest)), 2))
    same, cross = [], []
    for a, b in seed_pairs:
        one, other = nearest[a], nearest[b]
        same.append((jaccard(one["en"], other["en"]) + jaccard(one["ko"], other["ko"])) / 2)
        cross.append((jaccard(one["en"], other["ko"]) + jaccard(one["ko"], other["en"])) / 2)
    same, cross = torch.stack(same), torch.stack(cross)
    disagreement = [1 - jaccard(of_seed["en"], of_seed["ko"]) for of_seed in nearest]
    correlations, controls = [], []
    for seed, own in enumerate(disagreement):
        others = [other for other in disagreement if other is not own]
        noise = [1 - agreed for agreed, pair in zip(same, seed_pairs) if seed not in pair]
        correlations.append(fmean(rank_correlation(own, other) for other in others))
        controls.append(fmean(rank_correlation(own, x) for x in noise) if noise else None)
    return same, cross, correlations, controls


def jaccard(one, other):
    """The Jaccard index of sets, row by row: int64 [P, K], K different numbers each -> [P]."""
    common = (one[:, :, None] == other[:, None, :]).any(dim=2).sum(dim=1)    # [P]
    return common / (2 * one.shape[1] - common)


def rank_correlation(x, y):
    """Spearman's correlation of two float [P]. Equal values have their mean rank."""
    def ranks(values):
        _, inverse, count = values.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[inverse]
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].nan_to_num(0).item()


def _culture_cards(pairs, chosen, disagreement, scores, k):
    """The names with the largest disagreement, one of each concept, and the images they find."""
    strongest = {}  # concept -> its name with the largest disagreement
    for i in disagreement.argsort(stable=True).tolist():
        strongest[concept(pairs[chosen[i]])] = i
    top = {x: scores[x].topk(k).indices.tolist() for x in LANGUAGES}         # [P][k]

    def row(indices):
        found = [pairs[i] for i in indices]
        return page.row(page.image(shards.decode(pair.image), 44, pair.captions["en"][0])
                        for pair in found)
    cards = []
    for i in sorted(strongest.values(), key=lambda i: -disagreement[i])[:16]:
        captions, lists = pairs[chosen[i]].captions, ""
        for language in LANGUAGES:
            lists += page.names(captions[language][0], [], language) + row(top[language][i])
        cards.append(page.card(row([chosen[i]]), lists))
    return cards


# ---- analogy ----

ATTRIBUTES = {  # kind -> groups of attributes that replace each other in names, with their Korean
    "skin tone": [
        {"light skin tone": "하얀 피부", "medium-light skin tone": "연한 갈색 피부",
         "medium skin tone": "갈색 피부", "medium-dark skin tone": "진한 갈색 피부",
         "dark skin tone": "검은색 피부"}],
    "gender": [
        {"man": "남자", "woman": "여자", "person": "사람"},
        {"men": "남자", "women": "여자", "people": "사람"},
        {"boy": "남자 아이", "girl": "여자 아이"}],
    "hair": [
        {"red hair": "빨간 머리", "curly hair": "곱슬머리", "white hair": "백발", "bald": "대머리",
         "blond hair": "금발"}],
    "color": [
        {"red": "빨간색", "orange": "주황색", "yellow": "노란색", "green": "초록색",
         "blue": "파란색", "purple": "보라색", "brown": "갈색", "black": "검은색",
         "white": "흰색"}],
}
OURS = "A - text + text"
QUERIES = {  # the weights of image A, of the text of its attribute, and of the text of B's
    OURS: (1, -1, 1),
    "A + text": (1, 0, 1),
    "A": (1, 0, 0),
    "text": (0, 0, 1),
}


class Analogy(NamedTuple):
    """Two pairs whose names differ in one attribute, such as "man artist" and "woman artist"."""
    a: int            # indices of the pairs
    b: int
    attributes: dict  # language -> (attribute of A, attribute of B)


def analogy(study):
    """Does image - text + text find the analogous image?

    Claim: Image - text + text finds the analogous image.

    Refuted if: R@1 is not higher than that of the control beyond the spread, in each part: with
    attributes and with full names, against both controls.

    Runs: CLIP alone, which the ablation trains, or the models of --run.

    Control: The better of A alone and the target's text alone, for each kind and language. And
    A + text, which subtracts nothing.

    Measure: A and B are any two pairs of the test whose images differ and whose English names
    differ in one attribute, or any two flags of countries. The query for B, among all images but A,
    is A - text(attribute of A) + text(attribute of B), with weights 1, and again with full names
    instead of attributes. R@1 is the mean over kinds of attributes and languages.
    """
    folders = study.args.run or train_seeds(study, ["clip"])["clip"]
    recall, chosen = collections.defaultdict(list), None
    for folder in folders:
        model, tokenizer, embedded = embed(study, folder)
        chosen = chosen or _analogies_of_test(study, embedded.pairs)
        for key, values in _recall_of_analogies(model, tokenizer, embedded, chosen).items():
            recall[key].append(values)
    # {(attributes or names, language, kind, query): float [2, runs]}, R@1 and R@5
    recall = {key: np.array(values).T for key, values in recall.items()}

    tables, verdicts = _compare_queries(recall, chosen, len(embedded.pairs))
    numbers = {"runs": [str(folder) for folder in folders],
               "analogies": {kind: len(found) for kind, found in chosen.items()},
               "R@1 and R@5": {", ".join(key): values for key, values in recall.items()}}
    examples = [example for found in chosen.values() for example in found[:4]]
    parts = [page.heading("Examples", "What the last run finds. The right one is marked."),
             page.cards([_analogy_card(model, tokenizer, embedded, x) for x in examples])]
    return Result(numbers, tables, verdicts, parts)


def _compare_queries(recall, chosen, n_images):
    """The tables and the verdicts of analogy, from its recall."""
    tables, verdicts = [], []
    for what in ("attributes", "names"):
        vs_alone, vs_sum = [], []  # differences of R@1 for each language and kind, [runs] each
        for language in LANGUAGES:
            rows = []
            for kind, found in chosen.items():
                at_1 = [recall[what, language, kind, query][0] for query in QUERIES]
                ours, a_plus_text, a, text = at_1
                at_5 = recall[what, language, kind, OURS][1]
                better = max((a, text), key=np.mean)  # by the mean over runs
                vs_alone.append(ours - better)
                vs_sum.append(ours - a_plus_text)
                rows.append([f"{kind}, {len(found):,}", *at_1, at_5, ours - better])
            means = [np.mean(column, axis=0) for column in list(zip(*rows))[1:]]
            rows.append(["mean over kinds", *means])
            title = (f"{evaluate.LANGUAGE_NAMES[language]} {what}: R@1, %, and R@5 of the first; "
                     f"chance {100 / (n_images - 1):.2f} and {500 / (n_images - 1):.2f}")
            header = ["kind, analogies", *QUERIES, "R@5", "Δ vs the better of A and text"]
            tables.append((title, header, [[row[0], *map(show, row[1:])] for row in rows]))
        for control, differences in (("the better of A and text", vs_alone), ("A + text", vs_sum)):
            verdicts.append(verdict(f"R@1 with {what}: Δ, {OURS} vs {control}, points",
                                    np.mean(differences, axis=0)))
    return tables, verdicts


def analogies(pairs):
    """All analogies between pairs: {kind: [Analogy]}.

    The English name of B is that of A with one attribute of ATTRIBUTES, which occurs in it once,
    replaced by another of its group. Flags of countries are analogies of each other; their names
    are the attributes.
    """
    keys = [pair.key for pair in pairs]
    names = [{x: pair.captions[x][0] for x in LANGUAGES} for pair in pairs]
    index_of = {captions["en"]: i for i, captions in enumerate(names)}
    found, seen = collections.defaultdict(list), set()
    for kind, groups in ATTRIBUTES.items():
        for (name, a), group in itertools.product(index_of.items(), groups):
            for old, new in itertools.permutations(group, 2):
                parts = re.split(rf"(?<![\w-]){old}(?![\w-])", name)
                b = index_of.get(new.join(parts)) if len(parts) == 2 else None
                # "red hair" is an attribute of hair, not also of color.
                if b is not None and (a, b) not in seen:
                    seen.add((a, b))
                    attributes = {"en": (old, new), "ko": (group[old], group[new])}
                    found[kind].append(Analogy(a, b, attributes))
    flags = [i for i, key in enumerate(keys) if is_flag(key)]
    for a, b in itertools.permutations(flags, 2):
        attributes = {x: (names[a][x], names[b][x]) for x in LANGUAGES}
        found["flag"].append(Analogy(a, b, attributes))
    return found


def _analogies_of_test(study, pairs):
    """The analogies between different images. Raises ValueError when there are none."""
    images = [shards.decode(pair.image).tobytes() for pair in pairs]  # some names share an image
    chosen = {}
    for kind, found in analogies(pairs).items():
        different = [x for x in found if images[x.a] != images[x.b]]
        if different:
            chosen[kind] = different
    if not chosen:
        raise ValueError(f"--test {' '.join(study.args.test)}: no two English names differ in one "
                         "attribute")
    return chosen


def _recall_of_analogies(model, tokenizer, embedded, chosen):
    """Of one model: {(attributes or names, language, kind, query): [R@1, R@5]}, in 0..1."""
    recall = {}
    for (kind, found), language in itertools.product(chosen.items(), LANGUAGES):
        a, b = torch.tensor([x.a for x in found]), torch.tensor([x.b for x in found])  # [n]
        old, new = zip(*(x.attributes[language] for x in found))
        words = list(dict.fromkeys(itertools.chain.from_iterable(zip(old, new))))
        vectors = dict(zip(words, evaluate.embed_texts(model, tokenizer, words)))
        texts = {
            "attributes": [torch.stack([vectors[word] for word in side]) for side in (old, new)],
            "names": [embedded.texts[language][side] for side in (a, b)]}    # [n, D] each
        for (what, (of_a, of_b)), query in itertools.product(texts.items(), QUERIES):
            ranks = rank_of_analogue(embedded.images, a, b, of_a, of_b, QUERIES[query])
            recall[what, language, kind, query] = [(ranks < k).float().mean().item()
                                                   for k in (1, 5)]
    return recall


def rank_of_analogue(images, a, b, old, new, weights):
    """The rank of image B, from 0, among all images but A.

    The query is weights[0] * A + weights[1] * old + weights[2] * new. images: unit vectors [M, D];
    a, b: int64 [n]; old, new: unit vectors of texts [n, D]. Returns int64 [n].
    """
    ranks = []
    for part in torch.arange(len(a)).split(4096):
        queries = weights[0] * images[a[part]] + weights[1] * old[part] + weights[2] * new[part]
        scores = kelip.l2_normalize(queries) @ images.T                      # [n, M]
        scores[torch.arange(len(part)), a[part]] = -2  # below all cosines
        ranks.append((scores > scores.gather(1, b[part, None])).sum(dim=1))
    return torch.cat(ranks)


def _analogy_card(model, tokenizer, embedded, example):
    """Image A and, for each language, the query and the three nearest images."""
    pairs, lists = embedded.pairs, ""
    for language in LANGUAGES:
        words = example.attributes[language]
        old, new = evaluate.embed_texts(model, tokenizer, list(words))
        scores = embedded.images @ (embedded.images[example.a] - old + new)  # [M]
        nearest = [i for i in scores.topk(min(4, len(scores))).indices.tolist() if i != example.a]
        found = [(pairs[i].captions[language][0], i == example.b) for i in nearest[:3]]
        lists += page.names(f"- {words[0]} + {words[1]}", found, language)
        lists += page.row(page.image(shards.decode(pairs[i].image), 44) for i in nearest[:3])
    return page.card(page.image(shards.decode(pairs[example.a].image), 56), lists)


# ---- teacher ----

FRACTIONS = (10, 25, 50, 100)  # % of the names that the students learn from
TEACH_BATCH = 256              # names in a step of a student
TUNING = 4                     # the contrastive stage has this fraction of the teacher's steps
KEEPS_KOREAN, KEEPS_ENGLISH = 0.9, 0.95


def teacher(study):
    """Can a CLIP be taught a second language by text alone?

    Claim: A text encoder that learns from translations alone is as good in both languages as its
    English teacher is in English.

    Refuted if: R@1 in Korean is below 90 % of that in English, or R@1 in English is below 95 % of
    the teacher's, or shuffled translations teach Korean too, each beyond its spread.

    Runs: The teacher is CLIP with the English names alone. The student (extras/teach.py) learns
    from the English and Korean names of the training images, without an image, for twice as many
    steps of 256 names. It is then trained on images and names, with the image encoder frozen, for a
    quarter of the steps. CLIP with both languages is trained for as many FLOPs as these three
    together. Further students learn from a tenth, a quarter and half of the names.

    Control: A student that learns from the same names, with each English name next to the Korean
    name of another image.

    Measure: R@1, the mean over both directions, in each language. Names of the other half are those
    that the students of at most half of the names have not learned from.
    """
    folder = study.args.out / "data" / "names"
    names = write_names(folder, study.pairs)
    seeds = range(study.args.seeds)
    runs = {}
    for seed in seeds:
        english = make_run(study, "english", seed)
        taught = {f"{percent} %": make_student(study, english, f"{percent}", len(names))
                  for percent in FRACTIONS}
        student = taught["100 %"]
        tuned = make_tuned(study, student)
        of_seed = {"teacher": english, "student": student, "student, then images": tuned,
                   "both languages from the start": make_run(study, "clip", seed,
                                                             tuned.total_flops),
                   "control: shuffled": make_student(study, english, "shuffled", len(names)),
                   **taught}
        for label, run in of_seed.items():
            runs.setdefault(label, []).append(run)
    train(study, [of_label[seed] for seed in seeds for of_label in runs.values()])

    half = {english for english, _ in names if fraction_of(english) < 0.5}
    measured = {run: measure_languages(study, run, half)
                for run in dict.fromkeys(run for of_label in runs.values() for run in of_label)}
    results = {label: [measured[run] for run in of_label] for label, of_label in runs.items()}
    english = np.array([found["en"]["R@1"] for found in results["teacher"]])
    rows, curve = [], []
    for label, found in results.items():
        kept = np.array([x["en"]["R@1"] for x in found]) / english
        tflops = f"{runs[label][0].total_flops / 1e12:.1f}"
        if not label.endswith("%"):
            rows.append([label, *(show([x[language][key] for x in found]) for language in LANGUAGES
                                  for key in ("R@1", "R@5", "R@10", "groups")),
                         show(kept), tflops])
        else:
            curve.append([label, *(show([x[language][key] for x in found])
                                   for language in LANGUAGES for key in ("R@1", "other half"))])
    columns = [f"{evaluate.LANGUAGE_NAMES[language]} {key}" for language in LANGUAGES
               for key in ("R@1", "R@5", "R@10", "groups")]
    tables = [("Retrieval, classification of groups, and English R@1 as a fraction of the "
               "teacher's, %", ["", *columns, "English kept", "TFLOPs"], rows),
              ("Students of some of the names: R@1 of all names and of the other half, %",
               ["", *(f"{evaluate.LANGUAGE_NAMES[language]}{half}" for language in LANGUAGES
                      for half in ("", ", other half"))], curve)]

    def differences(label, language, factor, other, other_language):
        return [x[language]["R@1"] - factor * y[other_language]["R@1"]
                for x, y in zip(results[label], results[other])]
    verdicts = [
        verdict(f"R@1 of the student: Korean - {KEEPS_KOREAN:.0%} of English, points",
                differences("student", "ko", KEEPS_KOREAN, "student", "en")),
        verdict(f"English R@1: student - {KEEPS_ENGLISH:.0%} of the teacher's, points",
                differences("student", "en", KEEPS_ENGLISH, "teacher", "en")),
        verdict("Korean R@1: student - student of shuffled translations, points",
                differences("student", "ko", 1, "control: shuffled", "ko"))]
    return Result({"names": len(names), "results": results}, tables, verdicts, [])


def fraction_of(name):
    """A number in [0, 1) that depends on a name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def write_names(folder, pairs):
    """Write the tables of names that students learn from. Returns all (English, Korean) names.

    FOLDER/10.tsv has the names whose fraction_of is below 10 %. So each table is a part of the next
    one. In FOLDER/shuffled.tsv, each Korean name is that of another English one.
    """
    names = sorted({tuple(pair.captions[x][0] for x in LANGUAGES) for pair in pairs})
    tables = {str(percent): [name for name in names if fraction_of(name[0]) < percent / 100]
              for percent in FRACTIONS}
    order = sorted(range(len(names)), key=lambda i: fraction_of(names[i][0]))
    # Each name gets the translation of the next one in an order without meaning.
    tables["shuffled"] = [(names[i][0], names[j][1])
                          for i, j in zip(order, order[1:] + order[:1])]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        lines = ["\t".join(row) for row in (LANGUAGES, *rows)]
        page.write_text(folder / f"{name}.tsv", "\n".join(lines) + "\n")
    return names


def make_student(study, english, table, n_names):
    """The TrainingRun of a student of a teacher, which learns from a table of write_names."""
    config = kelip.PRESETS["tiny"]
    # No name may be in a batch twice, and teach.py holds out some of the smallest table.
    batch_size = max(1, min(TEACH_BATCH, n_names * FRACTIONS[0] // 125))
    pair_flops = len(LANGUAGES) * text_flops(config, study.caption_length)
    flags = (str(folder_of(study, english) / "last.pt"),
             "--text", str(study.args.out / "data" / "names" / f"{table}.tsv"),
             "--tokenizer", str(study.args.out / "tokenizer.json"), "--evals", "0",
             "--batch-size", str(batch_size))
    return TrainingRun(f"student-{table}", english.seed, 2 * study.args.steps,
                       FORWARD_AND_BACKWARD * batch_size * pair_flops, "extras.teach", flags,
                       english)


def make_tuned(study, student):
    """The TrainingRun that continues a student on images and names, its image encoder frozen."""
    args, config = study.args, kelip.PRESETS["tiny"]
    texts = len(LANGUAGES) * text_flops(config, study.caption_length)
    image = image_flops(config, [config["image_resolution"]])
    step_flops = args.batch_size * (FORWARD_AND_BACKWARD * texts + image)
    flags = ("--data", *args.data, "--test", *args.test, "--evals", "1", "--freeze", "image",
             "--init", str(folder_of(study, student) / "last.pt"))
    return TrainingRun("tuned", student.seed, max(1, args.steps // TUNING), step_flops,
                       "train_clip", flags, student)


def measure_languages(study, run, half):
    """Retrieval and classification by a run: {language: {"R@1": ..., "groups": ...}}.

    "other half" is R@1 of the test names whose English name is not in `half`.
    """
    model, tokenizer, embedded = embed(study, folder_of(study, run))
    groups = evaluate.classify(model, None, tokenizer, classes.read_classes("emoji groups"),
                               embedded=embedded)
    names = [pair.captions["en"][0] for pair in embedded.pairs]
    in_other_half = torch.tensor([name not in half for name in names])       # [M]
    results = {}
    for language in LANGUAGES:
        owner = embedded.owner[language]
        everything = recall_of_texts(embedded, language, owner >= 0)
        other = recall_of_texts(embedded, language, in_other_half[owner])
        results[language] = {
            **{f"R@{k}": fmean(everything[x][f"R@{k}"] for x in evaluate.DIRECTIONS)
               for k in evaluate.KS},
            "groups": groups[language]["mean_per_class"],
            "other half": fmean(other[x]["R@1"] for x in evaluate.DIRECTIONS)}
    return results


# ---- the report ----

FINDINGS = {finding.__name__: finding
            for finding in (ablation, augmentation, alignment, culture, analogy, teacher)}


def describe(name):
    """The docstring of a finding: {"Question": ..., "Claim": ..., "Refuted if": ..., ...}."""
    question, *paragraphs = inspect.getdoc(FINDINGS[name]).split("\n\n")
    parts = {"Question": question}
    for paragraph in paragraphs:
        title, _, text = " ".join(paragraph.split()).partition(": ")
        parts[title] = text
    return parts


def report(args, name, result):
    """Write OUT/NAME.json and OUT/NAME.html, and print. Returns the lines on verdicts."""
    text = describe(name)
    held = [part["held"] for part in result.verdicts]
    if None in held:
        answer = "not decided"
    elif all(held):
        answer = "held"
    elif any(held):
        answer = f"held in {sum(held)} of {len(held)} parts"
    else:
        answer = "did not hold"
    lines = [*(part["words"] for part in result.verdicts), f"{text['Claim'].rstrip('.')}: {answer}"]
    numbers = {"question": text["Question"], "claim": text["Claim"], "answer": answer,
               "refuted if": text["Refuted if"], "steps": args.steps, "seeds": args.seeds,
               "verdicts": result.verdicts, **result.numbers}
    page.write_text(args.out / f"{name}.json", json.dumps(
        numbers, indent=1, ensure_ascii=False, default=np.ndarray.tolist))
    verdicts = [(part["words"], part["held"]) for part in result.verdicts]
    parts = [page.heading(title, text[title]) for title in ("Claim", "Refuted if")]
    parts += [page.heading("Result", f"{answer.capitalize()}."), page.names("", verdicts)]
    for title, header, rows in result.tables:
        parts.append(page.heading(title) + page.table(header, rows))
    parts += result.parts
    parts += [page.heading(title, text[title]) for title in ("Runs", "Control", "Measure")]
    intro = f"{args.seeds} seeds, {args.steps:,} steps of {args.batch_size} pairs in stage 2."
    if args.run:
        intro = f"Measured on {', '.join(args.run)}."
    page.write(args.out / f"{name}.html", text["Question"], intro, *parts)

    for table in result.tables:
        print_table(*table)
    print("", *lines, f"{args.out}/{name}.json, {args.out}/{name}.html", sep="\n")
    return lines


def print_table(title, header, rows):
    """Print a table, its columns aligned."""
    print(f"\n{title}")
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for first, *rest in [header, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))


# ---- the command ----

def lock_folder(folder):
    """Make the folder, and keep other processes out of it while the returned file is open."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: in use by another such command, or by a run that it started: "
                         "wait until it ends, or name another --out") from None
    return lock


def check_settings(folder, settings):
    """Raise ValueError unless the runs in a folder began with these settings, {name: value}."""
    path = folder / "settings.json"
    begun = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    for key, value in settings.items():
        if begun.get(key) != value:
            raise ValueError(f"{folder}: {key} was {begun.get(key)} and is now {value}: set it "
                             "back, or name another --out")


def open_study(args):
    """Open --out, read the training pairs, and train the tokenizer of all runs: a Study."""
    lock = lock_folder(args.out)
    settings = {"data": args.data, "test": args.test, "batch_size": args.batch_size,
                "stage_1_steps": STAGE_1_STEPS,
                "variants": {name: list(variant.flags) for name, variant in VARIANTS.items()}}
    check_settings(args.out, settings)
    uses_demo = any(source.startswith(demo.DEMO) for source in args.data)
    if uses_demo and not os.path.exists(demo.DEMO):
        demo.pack_emoji(demo.DEMO)
    pairs, test = data.Pairs(args.data), data.Pairs(args.test)
    print(pairs.describe(), flush=True)
    pairs = [pairs[i] for i in tqdm(range(len(pairs)), "pairs", delay=2, leave=False,
                                    file=sys.stdout)]
    for pair in itertools.chain(pairs, (test[i] for i in range(len(test)))):
        if not pair.captions.keys() >= set(LANGUAGES):
            raise ValueError(f"--data, --test: {pair.key} does not have a name in both languages "
                             "(KEY.en.txt, KEY.ko.txt), which the findings need")
    page.write_text(args.out / "settings.json", json.dumps(settings, indent=1))

    texts = [text for pair in pairs for own in pair.captions.values() for text in own]
    path = args.out / "tokenizer.json"
    if not path.exists():
        vocab_size = kelip.PRESETS["tiny"]["vocab_size"]
        Tokenizer.train(texts, vocab_size, progress=sys.stdout.isatty()).save(path)
    tokens = Tokenizer.load(path).encode_ordinary_batch(texts)
    caption_length = fmean(len(ids) + 2 for ids in tokens)  # with start and end
    return Study(args, pairs, caption_length, lock)


def parse_arguments(argv=None):
    """The command line."""
    parser = ArgumentParser(
        prog="python -m extras.findings",
        description=__doc__.partition("\nWhat would refute each claim")[0],
        epilog="\n\n".join(f"{name}:\n{textwrap.indent(inspect.getdoc(finding), '    ')}"
                           for name, finding in FINDINGS.items()),
        fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("finding", metavar="NAME", choices=[*FINDINGS, "all"],
        help=f"{', '.join(FINDINGS)}, or all of them")
    add("--data", nargs="+", default=[f"{demo.DEMO}/train-*.tar"], metavar="SHARDS",
        help="training pairs, with a name in each language (default: the demo's, packed on first "
             "use)")
    add("--test", nargs="+", default=[f"{demo.DEMO}/test-*.tar"], metavar="SHARDS",
        help="held-out pairs; names.json in the same folder has all names (default: the demo's)")
    add("--out", default="runs/findings", metavar="FOLDER",
        help="results, and the runs that findings share (default: runs/findings)")
    add("--seeds", type=number(int, 1, 1 << 20), default=3, metavar="N",
        help="runs of each variant (default: 3)")
    add("--steps", type=number(int, 1, 1 << 40), default=200, metavar="N",
        help="steps of a variant in stage 2 (default: 200)")
    add("--batch-size", type=number(int, 1, 1 << 24), default=512, metavar="N",
        help="pairs per step (default: 512)")
    add("--run", nargs="+", metavar="RUN",
        help="analogy: measure these models, which kelip.build_model opens, and train none")
    args = parser.parse_args(argv)
    args.out = Path(args.out)
    if args.run and args.finding != "analogy":
        raise ValueError(f"--run: only analogy takes it, not {args.finding}")
    return args


def main(argv=None):
    """Test one finding or all of them, and say which claims held."""
    args = parse_arguments(argv)
    study = open_study(args)
    names = list(FINDINGS) if args.finding == "all" else [args.finding]
    lines = {name: report(args, name, FINDINGS[name](study)) for name in names}
    if len(names) > 1:
        print()
        for name in names:
            for line in lines[name]:
                print(f"{name}: {line}")


if __name__ == "__main__":
    run_command(main, "checkpoints are saved; the same command resumes", output="log",
                on_out_of_memory=": lower --batch-size")
