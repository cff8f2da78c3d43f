"""The paper's claims, tried at the size of the demo: its ablation and its four findings, each beside a control.

    python findings.py ablation        stage 1 and multi-crop each help, together most
    python findings.py augmentation    strong augmentation helps classification and hurts retrieval
    python findings.py alignment       the languages align through the pictures that they share
    python findings.py culture         names of one meaning find different pictures in each language
    python findings.py analogy         image - text + text finds the analogous image
    python findings.py all

A finding trains arms, runs of train_clip.py that differ in one thing, once for each seed, or takes those that are
there, and writes OUT/NAME.json, all numbers, and OUT/NAME.html. A part of a claim holds if its difference to the
control is positive with every seed, and its mean is larger than its standard deviation over them. That takes three
seeds at least, which chance alone would make hold once in nine times: of all parts here one or two. What is compared with
what stands in the docstring of each finding, which --help and the page show. After Ctrl-C or a kill the same command goes on.

What it leaves out: the size of the paper. What holds or fails here does so with a model of 4.6M parameters on drawings.
"""

import argparse
import collections
import contextlib
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
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import crops
import data
import evaluate
import kelip
import demo as packing
import page
import classes as sets
import shards
import train_clip
import trainer
from tokenizer import Tokenizer

LANGUAGES = ("en", "ko")
COLUMNS = [f"{evaluate.NAMES[x]}, {title}" for x in LANGUAGES for title in evaluate.WAYS.values()] + ["mean"]
# A drawing of 72 pixels fills its picture. Crops of the paper's two kinds cost here more than they bring: on another
# vendor held out, 300 steps named 13.5 % right with one crop of 64 pixels, 10.7 with 1x64+2x32 (areas of 0.3 to 0.8, 4
# patches), 11.7 with 1x64+2x48 (0.5 to 1, 9 patches) and 14.0 with 2x64, which is what multi-crop means here.
MULTI_CROP = ("--crops", "2x64")
ARMS = {  # what sets an arm apart, in flags of train_clip.py
    "clip": (), "mae": (), "crops": MULTI_CROP, "both": MULTI_CROP, "augment": (*MULTI_CROP, "--augment"),
    "shared": (), "apart": ()}
STAGE_1 = {"mae", "both"}       # arms that start from stage 1
STAGE_1_STEPS = 2               # its steps for each of stage 2, as the defaults of the two scripts have it
VARIANTS = ("shared", "apart")  # arms whose pairs carry a caption in one language only
NEAREST = 10                    # pictures of which culture asks whether two names share them


# ------------------------------------------------------------------------------------------------------------ arms

class Arm(NamedTuple):
    """One training run. flops: operations of a step, forward and backward; command: its script and the flags that set
    it apart; init: the arm of stage 1 that it starts from."""
    name: str
    seed: int
    steps: int
    flops: float
    command: tuple
    init: object = None

    @property
    def compute(self):
        """Operations in all, those of stage 1 included."""
        return self.steps * self.flops + (self.init.compute if self.init else 0)


def make_arm(args, name, seed, budget=None):
    """The arm of this name, of --steps steps, or of as many as do `budget` operations together with its stage 1's."""
    config = kelip.PRESETS["tiny"]
    flags = train_clip.parse_arguments([*ARMS[name]])[0]
    sizes = [size for number, size in crops.parse_crops(flags.crops) for _ in range(number)]
    forward = trainer.image_flops(config, sizes) + trainer.text_flops(config, args.length)
    source = [str(args.out / "data" / name)] if name in VARIANTS else args.data
    command = ("train_clip.py", "--data", *source, "--test", *args.test, "--evals", "1",
               "--tokenizer", str(args.out / "tokenizer.json"), *ARMS[name])
    first = None
    if name in STAGE_1:
        mae = kelip.MAE(kelip.KELIP(**config).visual)
        first = Arm("stage-1", seed, STAGE_1_STEPS * args.steps, 3.0 * args.batch_size * trainer.mae_flops(mae),
                    ("train_mae.py", "--data", *args.data))
        command += ("--init", str(place(args, first) / "last.pt"))
    arm = Arm(name, seed, args.steps, 3.0 * args.batch_size * forward, command, first)  # backward is twice forward
    rest = budget and budget - (first.compute if first else 0)
    return arm._replace(steps=max(1, round(rest / arm.flops))) if budget else arm


def place(args, arm):
    """The folder of an arm's run; those of other lengths lie beside each other."""
    return args.out / "arms" / f"{arm.name}-{arm.steps}-seed{arm.seed}"


def train(args, arms):
    """Train arms and the stage 1 of those that start from it; finished ones stay as they are, others go on. Returns the
    folders of the runs. Raises ValueError when one fails.

    On CPUs there are as many at a time as cores, since two runs of one thread each do more than one of two threads.
    """
    todo = [arm for arm in dict.fromkeys(one for arm in arms for one in (arm.init, arm) if one) if not finished(args, arm)]
    cores = 1 if torch.cuda.is_available() else os.cpu_count()
    many = max(1, min(cores, len(todo)))
    waiting, running = list(todo), {}
    bar = tqdm(total=sum(arm.flops * arm.steps for arm in todo) / 1e12, unit="Tflop", bar_format="{l_bar}{bar}| {n:,.0f} of "
               "{total:,.0f} Tflop [{elapsed}<{remaining}] {postfix}", disable=not todo, mininterval=1, file=sys.stdout)
    try:
        while waiting or running:
            ready = [arm for arm in waiting if arm.init not in (*waiting, *running.values())]
            for arm in ready[:many - len(running)]:
                waiting.remove(arm)
                running[launch(args, arm, max(1, cores // many))] = arm
            time.sleep(0.2)
            for process, arm in [*running.items()]:
                if process.poll() is not None:
                    del running[process]
                    if not finished(args, arm):
                        words = log_of(args, arm).read_text(encoding="utf-8").split("\n")
                        raise ValueError(f"{place(args, arm)}: {[line for line in words if line.strip()][-1]}")
            bar.set_postfix_str(", ".join(place(args, arm).name for arm in running.values()), refresh=False)
            bar.update(sum(arm.flops * steps_of(place(args, arm)) for arm in todo) / 1e12 - bar.n)
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)  # asks for a checkpoint
        for process in running:
            process.wait()
        bar.close()
    return [place(args, arm) for arm in arms]


def finished(args, arm):
    """Whether an arm has been trained to its end, and what lies there was measured on --test."""
    last, found = place(args, arm) / "last.pt", None
    if arm.name != "stage-1":
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((place(args, arm) / "evaluation.json").read_text(encoding="utf-8"))
        if not found or found.get("test") != [source.partition("::")[0] for source in args.test]:
            return False  # to resume it measures it again
    return last.exists() and kelip.load_checkpoint(last)["step"] == arm.steps


def steps_of(folder):
    """How far a run is by its log, in steps."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines[-2:] if line.endswith("}")), default=0)


def log_of(args, arm):
    """The file of what an arm printed."""
    return args.out / "arms" / f"{place(args, arm).name}.log"


def launch(args, arm, threads):
    """Start the training of an arm, or go on with it: a subprocess.Popen. It inherits the lock, and holds it should it be
    left behind."""
    script, folder = Path(__file__).resolve().parent.parent / arm.command[0], place(args, arm)
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [*arm.command[1:], "--out", str(folder), "--steps", str(arm.steps), "--seed", str(arm.seed), "--batch-size",
               str(args.batch_size), "--save-every", "50", "--keep", "1", *["--resume"] * (folder / "last.pt").exists()]
    with open(log_of(args, arm), "w", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, str(script), *command], pass_fds=[args.lock.fileno()], stdout=log,
                                stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)})


def train_seeds(args, names):
    """Train the arms of these names with every seed. Returns {name: the runs' folders, one a seed}."""
    runs = train(args, [make_arm(args, name, seed) for seed in range(args.seeds) for name in names])
    return {name: runs[i::len(names)] for i, name in enumerate(names)}


def open_out(args):
    """Make or open args.out, train the tokenizer of all arms, and read the training pairs, a list.

    Sets args.lock, and args.length, the mean length of a caption in tokens. Raises ValueError when the folder is in use
    or was begun with other settings, or a pair lacks a name.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    args.lock = open(args.out / ".lock", "w")
    try:
        fcntl.flock(args.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{args.out}: another findings.py, or a run that one left behind, is at work there") from None
    path = args.out / "settings.json"
    settings = {"data": args.data, "test": args.test, "batch_size": args.batch_size, "stage_1_steps": STAGE_1_STEPS,
                "arms": {name: list(flags) for name, flags in ARMS.items()}}
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else settings
    except (ValueError, TypeError):
        raise ValueError(f"{path}: damaged; without it, these settings are taken for those of the arms there") from None
    for key, value in settings.items():
        if before.get(key) != value:
            raise ValueError(f"{args.out}: {key} was {before.get(key)} and is now {value}: name another --out")
    pairs, test = trainer.open_pairs(args, trainer.Job(0, 1, torch.device("cpu"), None), None), data.Pairs(args.test)
    pairs = [pairs[i] for i in tqdm(range(len(pairs)), "pairs", delay=2, leave=False, file=sys.stdout)]
    if not all(pair.captions.keys() >= set(LANGUAGES) for pair in (*pairs, *(test[i] for i in range(len(test))))):
        raise ValueError("--data, --test: findings are about pairs with a name in each language, and some lack one")
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    texts, path = [text for pair in pairs for text in pair.captions.values()], args.out / "tokenizer.json"
    if not path.exists():
        Tokenizer.train(texts, kelip.PRESETS["tiny"]["vocab_size"], progress=sys.stdout.isatty()).save(path)
    args.length = fmean(len(ids) + 2 for ids in Tokenizer.load(path).encode_ordinary_batch(texts))  # with start and end
    return pairs


# --------------------------------------------------------------------------------------------- numbers and verdicts

def embed(args, run):
    """A run's model and tokenizer, and the test as they see it: (model, tokenizer, evaluate.Embedded). Its first M names
    in each language are those of its M pictures."""
    model, _, tokenizer = kelip.build_model(str(run), "cuda" if torch.cuda.is_available() else "cpu")
    names = evaluate.read_candidates(args.test)
    return model, tokenizer, evaluate.Embedded(model, data.Pairs(args.test), tokenizer, names)


def recalls(run):
    """R@1 of a finished run, in 0..1, float [5]: what COLUMNS says."""
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["retrieval"]
    values = [found[language][way]["R@1"] for language in LANGUAGES for way in evaluate.WAYS]
    return np.array([*values, fmean(values)])


def verdict(claim, differences, times=100):
    """A part of a claim, whether it held, and that in words. differences: one a seed, to the control. Held where all
    are positive and their mean is larger than their standard deviation; None, undecided, where they are fewer than 3."""
    values = [times * float(x) for x in differences]
    mean, sd = fmean(values or [0]), stdev(values) if len(values) > 1 else 0.0
    held = min(values) > 0 and mean > sd if len(values) > 2 else None
    opposite = held is False and max(values) < 0 and -mean > sd
    end = {True: "held here", False: "did not hold here" + (", the opposite did" if opposite else ", within the spread"),
           None: "not decided here, three seeds are the least"}[held]
    digits = 2 if times > 1 else 3
    each = ", ".join(f"{value:+.{digits}f}" for value in values) or "none"
    return {"claim": claim, "differences": values, "mean": mean, "sd": sd, "held": held,
            "words": f"{claim}: {mean:+.{digits}f} ± {sd:.{digits}f} ({each}): {end}"}


def show(values, times=100, digits=1):
    """Numbers of several seeds as "mean ± standard deviation"."""
    values = [times * float(x) for x in values]
    return f"{fmean(values):.{digits}f} ± {stdev(values) if len(values) > 1 else 0:.{digits}f}"


def compare(title, columns, rows):
    """A table of arms. rows: {label: float [seeds, columns], in 0..1}; the last column is compared with that of the
    first row, seed by seed."""
    first = next(iter(rows.values()))[:, -1]
    lines = [[label, *map(show, found.T), show(found[:, -1] - first, digits=2)] for label, found in rows.items()]
    return title, ["", *columns, "less the first"], lines


def conclude(args, name, numbers, tables, verdicts, parts):
    """Print the tables and verdicts, write OUT/name.json and OUT/name.html. tables: (title, head, rows of text) each;
    parts: more pieces of the page. Returns the verdicts in words."""
    claim, trains, refuted = (" ".join(part.split()) for part in inspect.getdoc(FINDINGS[name]).split("\n\n"))
    held = [part["held"] for part in verdicts]
    answer = ("not decided here" if None in held else "held here" if all(held) else "did not hold here" if not any(held)
              else f"held here in {sum(held)} of {len(held)} parts")
    lines = [*(part["words"] for part in verdicts), f"{claim.rstrip('.')}: {answer}."]
    for title, head, rows in tables:
        print(f"\n{title}")
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        for row in (head, *rows):
            print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(row[1:], widths[1:]))]))
    print("", *lines, f"{args.out}/{name}.json, {args.out}/{name}.html", sep="\n")
    found = {"claim": claim, "answer": answer, "refuted": refuted, "steps": args.steps, "seeds": args.seeds, "verdicts": verdicts}
    (args.out / f"{name}.json").write_text(json.dumps(
        {**found, **numbers}, indent=1, ensure_ascii=False, default=np.ndarray.tolist), encoding="utf-8")
    page.write(args.out / f"{name}.html", claim, trains, page.heading("What would refute it", refuted),
               page.heading("What was found", lines[-1]), page.names("", [(part["words"], part["held"]) for part in verdicts]),
               *(page.heading(title) + page.table(head, rows) for title, head, rows in tables), *parts)
    return lines


def views(pairs, arms):
    """Pieces of a page: drawings as arms see them, all their crops. arms: {title: name}."""
    images = np.stack([shards.decode(pair.image).resize((72, 72)) for pair in pairs[:6]])    # [N, 72, 72, 3]
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (crops.MEAN, crops.STD))
    for title, name in arms.items():
        flags = train_clip.parse_arguments([*ARMS[name]])[0]
        many = crops.multi_crop(torch.from_numpy(images).permute(0, 3, 1, 2), crops.parse_crops(flags.crops), 0,
                                torch.arange(len(images)), None, flags.scale, flags.low_scale, augment=flags.augment)
        pixels = [((crop * deviation + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
                  for drawing in zip(*many) for crop in drawing]
        yield page.heading(title) + page.row(page.picture(Image.fromarray(x), x.shape[0]) for x in pixels)


# ----------------------------------------------------------------------------------------------------- the findings

LABELS = {"clip": "CLIP alone", "mae": "+ MAE", "crops": "+ multi-crop", "both": "+ both"}


def ablation(args, pairs):
    """Stage 1 (a masked autoencoder on the pictures) and multi-crop each help, and together they help most.

    Trains, for each seed, CLIP alone, + MAE, + multi-crop and both, on equally many pictures in stage 2 (stage 1's, twice
    as many, come on top); then the first three for as many operations as both does, its stage 1 included. Multi-crop is two
    crops of full size here: drawings of 72 pixels lose more than they gain by smaller ones. 75 minutes on two CPU cores.

    Compared is mean R@1 over both languages and directions, of + MAE and of + multi-crop with CLIP alone, of both with
    that of the other three whose mean is the best. Refuted in each part where the difference is not positive beyond its
    spread.
    """
    budget = make_arm(args, "both", 0).compute
    settings = {title: {name: [make_arm(args, name, seed, limit) for seed in range(args.seeds)] for name in LABELS}
                for title, limit in (("the same pictures in stage 2", None), ("the same operations", budget))}
    train(args, [arms[name][seed] for seed in range(args.seeds) for arms in settings.values() for name in LABELS])
    numbers, tables, verdicts = {"caption_length": args.length, "columns": COLUMNS}, [], []
    for title, arms in settings.items():
        found = {name: np.stack([recalls(place(args, arm)) for arm in many]) for name, many in arms.items()}
        clip, mae, multi, both = (found[name][:, -1] for name in LABELS)
        labels = {name: f"{LABELS[name]}, " + (f"{arm.init.steps:,} + " if arm.init else "")
                  + f"{arm.steps:,} steps, {arm.compute / 1e12:,.1f} Tflop" for name, (arm, *_) in arms.items()}
        tables.append(compare(f"R@1 at {title}, %", COLUMNS, {labels[name]: found[name] for name in LABELS}))
        verdicts += [verdict(f"At {title}, {text}, points of R@1", difference) for text, difference in (
            ("+ MAE less CLIP alone", mae - clip), ("+ multi-crop less CLIP alone", multi - clip),
            ("both less the best other", both - max((clip, mae, multi), key=np.mean)))]
        numbers[title] = {name: {"steps": arm.steps, "operations": arm.compute, "R@1": found[name]}
                          for name, (arm, *_) in arms.items()}
    return numbers, tables, verdicts, views(pairs, {"Drawings as CLIP alone sees them": "clip", "Multi-crop": "crops"})


def recall_of(embedded, language, keep):
    """evaluate.recall_at_k, of the texts where keep, bool [P], and of the pictures that own one; the others stay candidates."""
    return evaluate.recall_at_k(embedded.images, embedded.texts[language], embedded.owner[language].masked_fill(~keep, -1))


def augmentation(args, pairs):
    """Strong augmentation (SimCLR's colour distortion and blur) helps classification and hurts retrieval.

    Trains multi-crop (two crops of full size) with --augment and without, which is the ablation's arm. 20 minutes after the
    ablation, else 40.

    Compared are accuracy on coarse groups of emoji, the mean over groups and languages, and mean R@1. Refuted unless
    the first is higher with --augment, and the second lower, each beyond its spread. Half of the names tell a skin tone or
    a colour, which such augmentation takes away from the picture; retrieval has to be lower for the other names too.
    """
    found, accuracy, rest = {}, {}, {}
    coloured = re.compile(rf"skin tone|(?<![\w-])({'|'.join(ATTRIBUTES['colour'][0])})(?![\w-])")
    for label, runs in zip(("plain", "augmented"), train_seeds(args, ["crops", "augment"]).values()):
        found[label], accuracy[label], rest[label] = np.stack([recalls(run) for run in runs]), [], []
        for run in runs:
            model, tokenizer, embedded = embed(args, run)
            result = evaluate.classify(model, None, tokenizer, sets.read_classes("emoji groups"), embedded=embedded)
            values = [result[language]["mean_per_class"] for language in LANGUAGES]
            accuracy[label].append([*values, fmean(values)])
            colourless = torch.tensor([not coloured.search(name) for name in embedded.captions["en"][:len(embedded.pairs)]])
            values = [way["R@1"] for x in LANGUAGES for way in recall_of(
                embedded, x, colourless[embedded.owner[x].clamp(min=0)] & (embedded.owner[x] >= 0)).values()]
            rest[label].append([*values, fmean(values)])
        accuracy[label], rest[label] = np.array(accuracy[label]), np.array(rest[label])      # [seeds, ... and mean]
    title = f"{result['pictures']:,} drawings in {result['classes']} groups, accuracy by group, %"
    tables = [compare("Retrieval, R@1, %", COLUMNS, found),
              compare(f"Retrieval of the {int(colourless.sum()):,} names without skin tone or colour, R@1, %", COLUMNS, rest),
              compare(title, ["English", "Korean", "mean"], accuracy)]
    better, worse, other = (values["augmented"][:, -1] - values["plain"][:, -1] for values in (accuracy, found, rest))
    verdicts = [verdict("Classification, augmented less plain, points", better),
                verdict("Retrieval, plain less augmented, points", -worse),
                verdict("Retrieval of names without skin tone or colour, plain less augmented, points", -other)]
    return ({"columns": COLUMNS, "R@1": found, "R@1 without tone or colour": rest, "accuracy": accuracy,
             "chance": 1 / result["classes"]}, tables, verdicts,
            views(pairs, {"Drawings with plain crops": "crops", "Augmented": "augment"}))


def code_points(key):
    """'Joy-U+1F468-U+1F3FF' -> [0x1F468, 0x1F3FF]; [] for keys of another kind."""
    return [int(part[2:], 16) for part in key.split("-") if part.startswith("U+")]


def is_flag(key):
    """Whether a key is that of a country's flag."""
    return 0x1F1E6 <= (code_points(key) or [0])[0] <= 0x1F1FF


TONES = set(range(0x1F3FB, 0x1F400))
GENDERS = {0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1,  # man, woman: person; boy, girl: child; and so on
           0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2, 0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3, 0x1F57A: 0x1F483, 0x1F478: 0x1F934,
           0x1F936: 0x1F385, 0x1FAC3: 0x1F930, 0x1FAC4: 0x1F930}
COUPLES = {"1F491": "1F9D1 2764 1F9D1", "1F48F": "1F9D1 2764 1F48B 1F9D1", "1F9D1 1F384": "1F385",
           **dict.fromkeys(("1F46B", "1F46C", "1F46D"), "1F9D1 1F91D 1F9D1")}


def concept(pair):
    """What a drawing is of, whatever the gender and skin tone: the code points of its key without those, or else its
    English name. All families are one."""
    points = [GENDERS.get(point, point) for point in code_points(pair.key)]
    text = " ".join(f"{point:X}" for point in points if point not in TONES | {0x2640, 0x2642, 0x200D, 0xFE0F})
    family = re.fullmatch("(1F9D1 )+1F9D2( 1F9D2)*", text)
    return "1F46A" if family else COUPLES.get(text, text) or pair.captions["en"]


def language_of(variant, pair):
    """The one language that a variant captions a pair in: by its key in 'shared', by its concept in 'apart'."""
    text = pair.key if variant == "shared" else concept(pair)
    return LANGUAGES[hashlib.sha256(text.encode()).digest()[0] % 2]


def write_variant(folder, variant, pairs):
    """Training pairs as shards again, each with its caption in one language only. A folder that is there is kept."""
    if folder.exists():
        return
    with packing.whole_folder(str(folder), "") as temporary:
        for number, part in enumerate(np.array_split(np.arange(len(pairs)), 8)):
            chosen = [(pairs[i], f"{language_of(variant, pairs[i])}.txt") for i in part]
            shards.write_shard(f"{temporary}/train-{number}.tar", [
                (pair.key, {suffix: content for suffix, content in pair.members.items()
                            if suffix == kept or not suffix.endswith("txt")}) for pair, kept in chosen])


def alignment(args, pairs):
    """Without any loss between them, the two languages align through the pictures that they share.

    Trains 'shared', where every drawing is captioned in one language only, by a hash of its key, so that no pair carries
    both names but both languages name nearly each thing, in drawings of different vendors; and its control 'apart', where
    every thing, with all its skin tones and genders, is captioned in one language only. 15 minutes.

    Compared is translation with no picture between: the Korean name nearest to an English one among all names of training,
    and back, mean R@1. Refuted where 'shared' is not above 'apart' beyond the spread. The control was never told one of a
    thing's two names: what it gets right comes from words that names have in common, such as skin tones; so the
    difference says how much pictures bring, and hardly could be none where names are learned at all. All seeds have
    the same split into languages. Rows of pictures show that each arm learned both: retrieval, mean of both directions, of
    the names that it was told.
    """
    names = sorted({tuple(pair.captions[language] for language in LANGUAGES) for pair in pairs})
    for variant in VARIANTS:
        write_variant(args.out / "data" / variant, variant, pairs)
    found, nearest = collections.defaultdict(list), {}
    for variant, folders in train_seeds(args, VARIANTS).items():
        told = {(language, pair.captions[language]) for pair in pairs for language in [language_of(variant, pair)]}
        for folder in folders:
            model, tokenizer, embedded = embed(args, folder)
            english, korean = (evaluate.embed_texts(model, tokenizer, list(texts)) for texts in zip(*names))  # [P, D]
            ways = evaluate.recall_at_k(english, korean, torch.arange(len(names)))
            ways = {"English to Korean": ways["image_to_text"], "Korean to English": ways["text_to_image"]}
            for language in LANGUAGES:
                both = recall_of(embedded, language, torch.tensor([(language, x) in told for x in embedded.captions[language]]))
                ways[f"pictures, {evaluate.NAMES[language]}"] = {
                    key: fmean(way[key] for way in both.values()) for key in both["image_to_text"]}
            found[variant].append(ways)
            nearest.setdefault(variant, (english @ korean.T).topk(min(3, len(names))).indices)   # of the first seed
    rows = [[f"{variant}: {way}", *(show([one[way][key] for one in many]) for key in many[0][way])]
            for variant, many in found.items() for way in many[0]]
    translation = {variant: np.array([fmean(one[way]["R@1"] for way in one if " to " in way) for one in many])
                   for variant, many in found.items()}
    place_of = {pair.captions["en"]: pair for pair in embedded.pairs}
    cards = [page.card(page.picture(shards.decode(place_of[names[i][0]].image)), "".join(
        page.names(f"{names[i][0]}, {variant}", [(names[j][1], j == i) for j in nearest[variant][i].tolist()])
        for variant in VARIANTS)) for i in range(0, len(names), max(1, len(names) // 24)) if names[i][0] in place_of]
    head = ["%", *(f"R@{k}" for k in evaluate.KS)]
    return ({"names": len(names), "found": found},
            [(f"Translation among {len(names):,} names, chance {100 / len(names):.2f} %; and pictures", head, rows)],
            [verdict("Translation, shared less apart, points of R@1", translation["shared"] - translation["apart"])],
            [page.heading("The Korean names nearest to an English one", "The first seed's; the right one is marked."),
             page.cards(cards)])


def jaccard(one, other):
    """Rows of K different numbers, int64 [P, K] each -> the part of each two rows' union that is in both, float [P]."""
    both = (one[:, :, None] == other[:, None, :]).any(2).sum(1)
    return both / (2 * one.shape[1] - both)


def rank_correlation(x, y):
    """Spearman's, of two float [P]; equal values have their mean rank."""
    def ranks(values):
        _, inverse, count = values.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[inverse]
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].nan_to_num(0).item()


def agreements(nearest):
    """What culture measures. nearest: for each seed {language: int64 [P, K]}, the pictures nearest to each of P names.

    Returns, for each two seeds, the agreement of names in one language and of those in two, [pairs of seeds, P] each;
    and for each seed how its parting of the languages, over names, is correlated with the other seeds' and, as control,
    with how little two others agree in one language (None where there are no two others).
    """
    couples = list(itertools.combinations(range(len(nearest)), 2))

    def agree(languages):
        return torch.stack([sum(jaccard(nearest[a][x], nearest[b][y]) for x, y in languages) / 2 for a, b in couples])
    same, cross = agree([("en", "en"), ("ko", "ko")]), agree([("en", "ko"), ("ko", "en")])
    parting = [1 - jaccard(one["en"], one["ko"]) for one in nearest]
    ours, controls = [], []
    for a, one in enumerate(parting):
        noise = [1 - agreed for agreed, couple in zip(same, couples) if a not in couple]
        ours.append(fmean(rank_correlation(one, other) for other in parting if other is not one))
        controls.append(fmean(rank_correlation(one, other) for other in noise) if noise else None)
    return same, cross, ours, controls


def culture(args, pairs):
    """Names of one meaning find different pictures in the two languages, and not by chance.

    Trains CLIP alone, the ablation's arm. A minute after the ablation, else twelve.

    Two names agree by the Jaccard index of the ten test drawings nearest to each. Left out are names that no drawing of
    training has, skin tones (half of all names) and flags (whose Korean names alone say "flag"). Refuted where names in one
    language agree no more across two seeds than names in two languages across the same two; and where how far the languages
    part, name by name, is correlated no more across seeds than it is with how little two other seeds agree in one language
    (names that find nothing for sure part by noise alone); each beyond the spread, which is over pairs of seeds for the
    first and so smaller than it should be, since pairs share seeds. The names are translations and the drawings the same for
    both languages: what parts here is what two words of one meaning share with other words, and not two cultures.
    """
    if args.seeds < 2:
        raise ValueError(f"--seeds {args.seeds}: culture compares seeds, at least 2")
    scores, trained = [], {pair.captions["en"] for pair in pairs}
    for run in train_seeds(args, ["clip"])["clip"]:
        *_, embedded = embed(args, run)
        M = len(embedded.pairs)
        chosen = [i for i, pair in enumerate(embedded.pairs) if pair.captions["en"] in trained and not is_flag(pair.key)
                  and not set(code_points(pair.key)) & TONES]
        if not chosen:
            raise ValueError(f"{' '.join(args.test)}: no name there is one of --data's")
        scores.append({x: embedded.texts[x][chosen] @ embedded.images.T for x in LANGUAGES})  # [P, M] each
    k = min(NEAREST, M)
    same, cross, ours, controls = agreements([{x: one[x].topk(k).indices for x in LANGUAGES} for one in scores])
    known = None not in controls
    tables = [(f"Jaccard index of the {k} nearest of {M:,} drawings to {len(chosen):,} names, %", ["agreement", "mean over pairs of seeds"],
               [["two seeds, one language", show(same.mean(1))], ["two seeds, two languages", show(cross.mean(1))],
                ["chance", f"{100 * k / (2 * M - k):.1f}"]]),
              ("Rank correlation, over names, of the parting of the languages", ["with", "mean over seeds"],
               [["the parting in another seed", show(ours, 1, 2)],
                ["disagreement of two others in one language", show(controls, 1, 2) if known else "needs three seeds"]])]
    verdicts = [verdict("Agreement across seeds, in one language less in two, points", (same - cross).mean(1)),
                verdict("Correlation of the parting, with other seeds' less with their disagreement in one language",
                        np.subtract(ours, controls) if known else [], times=1)]
    parting, named = (same - cross).amin(0), torch.utils.data.Subset(embedded.pairs, chosen)  # [P]: in every two seeds at least
    most = {concept(named[i]): i for i in parting.argsort(stable=True).tolist()}              # name of each concept
    top = {x: sum(one[x] for one in scores).topk(k).indices.tolist() for x in LANGUAGES}

    def drawings(numbers):
        chosen = [embedded.pairs[i] for i in numbers]
        return page.row(page.picture(shards.decode(pair.image), 44, pair.captions["en"]) for pair in chosen)
    cards = [page.card(drawings([chosen[i]]), "".join(page.names(named[i].captions[x], [], x) + drawings(top[x][i])
                                                      for x in LANGUAGES))
             for i in sorted(most.values(), key=lambda i: -parting[i])[:16]]
    numbers = {"one language": same.mean(1).tolist(), "two languages": cross.mean(1).tolist(), "correlation": ours,
               "control": controls, "parting": {named[i].captions["en"]: parting[i].item()
                                                for i in parting.argsort(descending=True)[:100].tolist()}}
    return numbers, tables, verdicts, [
        page.heading("Where the languages part most in every two seeds", f"The {k} drawings nearest to the English name "
                     "and to the Korean one, by the sum over seeds. The most extreme of all, and so in part by luck."),
        page.cards(cards)]


ATTRIBUTES = {  # kind: groups of attributes that take each other's place in English names, with their Korean
    "skin tone": [{"light skin tone": "하얀 피부", "medium-light skin tone": "연한 갈색 피부", "medium skin tone": "갈색 피부",
                   "medium-dark skin tone": "진한 갈색 피부", "dark skin tone": "검은색 피부"}],
    "gender": [{"man": "남자", "woman": "여자", "person": "사람"}, {"men": "남자", "women": "여자", "people": "사람"},
               {"boy": "남자 아이", "girl": "여자 아이"}],
    "hair": [{"red hair": "빨간 머리", "curly hair": "곱슬머리", "white hair": "백발", "bald": "대머리", "blond hair": "금발"}],
    "colour": [{"red": "빨간색", "orange": "주황색", "yellow": "노란색", "green": "초록색", "blue": "파란색", "purple": "보라색",
                "brown": "갈색", "black": "검은색", "white": "흰색"}]}
QUERIES = {"A - text + text": (1, -1, 1), "A + text": (1, 0, 1), "A": (1, 0, 0), "text": (0, 0, 1)}  # weights


def analogies(pairs):
    """All analogies between pairs: {kind: [(A, B, {language: (attribute of A, of B)})]}, A and B places in pairs.

    B's English name is A's with one attribute of ATTRIBUTES, which stands in it once, in place of another: "man artist"
    and "woman artist". Flags of countries are analogies of each other, their names being the attributes.
    """
    keys, names = zip(*((pair.key, pair.captions) for pair in pairs))
    place_of = {captions["en"]: i for i, captions in enumerate(names)}
    found, seen = collections.defaultdict(list), set()
    for kind, groups in ATTRIBUTES.items():
        for (name, a), group in itertools.product(place_of.items(), groups):
            for old, new in itertools.permutations(group, 2):
                parts = re.split(rf"(?<![\w-]){old}(?![\w-])", name)
                b = place_of.get(new.join(parts)) if len(parts) == 2 else None
                if b is not None and (a, b) not in seen:  # "red hair" is of one kind alone, the first
                    seen.add((a, b))
                    found[kind].append((a, b, {"en": (old, new), "ko": (group[old], group[new])}))
    for a, b in itertools.permutations([i for i, key in enumerate(keys) if is_flag(key)], 2):
        found["flag"].append((a, b, {x: (names[a][x], names[b][x]) for x in LANGUAGES}))
    return found


def rank_of_analogue(images, a, b, old, new, weights):
    """How many pictures but A lie nearer to weights[0] A + weights[1] old + weights[2] new than B does, int64 [n].
    images: unit vectors [M, D]; a, b: int64 [n]; old, new: unit vectors of texts [n, D]."""
    ranks = []
    for part in torch.arange(len(a)).split(4096):
        queries = weights[0] * images[a[part]] + weights[1] * old[part] + weights[2] * new[part]
        scores = kelip.unit(queries) @ images.T                              # [n, M]
        scores[torch.arange(len(part)), a[part]] = -2
        ranks.append((scores > scores.gather(1, b[part, None])).sum(1))
    return torch.cat(ranks)


def analogy(args, pairs):
    """Image - text + text finds the analogous image.

    Trains CLIP alone, the ablation's arm, or takes any --run. Three minutes after the ablation, else twelve.

    For all drawings A and B of the test that differ and whose English names differ in one attribute, and for all flags of
    countries, B is looked for among all drawings but A by A - text(attribute of A) + text(attribute of B), weights 1, and
    once more with whole names for attributes. Compared is R@1, the mean over kinds of attribute and languages, with the
    better of A alone and the target's text alone in each of these, and with A + text, to which nothing is lost by taking
    away. Refuted in each part where it is not higher beyond the spread.
    """
    runs = args.run or train_seeds(args, ["clip"])["clip"]
    found, cards = collections.defaultdict(list), []  # (texts, language, kind, query) -> (R@1, R@5) of each run
    for run in runs:
        model, tokenizer, embedded = embed(args, run)
        if not found:
            drawn = [shards.decode(pair.image).tobytes() for pair in embedded.pairs]  # some names share one drawing
            chosen = {kind: [one for one in many if drawn[one[0]] != drawn[one[1]]]
                      for kind, many in analogies(embedded.pairs).items()}
        if not any(chosen.values()):
            raise ValueError(f"{' '.join(args.test)}: no two English names there differ in one attribute")
        for (kind, many), language in itertools.product(chosen.items(), LANGUAGES):
            sides = a, b = [torch.tensor([one[side] for one in many]) for side in (0, 1)]
            words = {word: i for i, word in enumerate(dict.fromkeys(word for one in many for word in one[2][language]))}
            vectors = evaluate.embed_texts(model, tokenizer, list(words))
            texts = {"attributes": [vectors[[words[one[2][language][side]] for one in many]] for side in (0, 1)],
                     "names": [embedded.texts[language][side] for side in sides]}            # [n, D] each
            for (what, vectors), (query, weights) in itertools.product(texts.items(), QUERIES.items()):
                ranks = rank_of_analogue(embedded.images, a, b, *vectors, weights)
                found[what, language, kind, query].append([(ranks < k).float().mean().item() for k in (1, 5)])
    kinds, M, ours = list(chosen), len(embedded.pairs), "A - text + text"
    found = {key: np.array(values).T for key, values in found.items()}      # [R@1 and R@5, runs]

    def better(what, x, kind):
        """R@1 of the better of the image and the text alone, by its mean over runs, [runs]."""
        return max((found[what, x, kind, query][0] for query in ("A", "text")), key=np.mean)
    tables, verdicts = [], []
    for what, x in itertools.product(texts, LANGUAGES):
        rows = [[f"{kind}, {len(chosen[kind]):,}", *(found[what, x, kind, query][0] for query in QUERIES),
                 found[what, x, kind, ours][1], found[what, x, kind, ours][0] - better(what, x, kind)] for kind in kinds]
        rows.append(["mean over kinds", *(np.mean(column, axis=0) for column in list(zip(*rows))[1:])])
        tables.append((f"{evaluate.NAMES[x]} {what}: R@1, %, and R@5 of the first; chance {100 / (M - 1):.2f} and "
                       f"{500 / (M - 1):.2f}", ["kind, analogies", *QUERIES, "R@5", "less better of A, text"],
                       [[row[0], *map(show, row[1:])] for row in rows]))
    for what, (words, other) in itertools.product(texts, (
            ("the better of A and text alone", better), ("A + text", lambda *cell: found[(*cell, "A + text")][0]))):
        verdicts.append(verdict(f"With {what}, {ours} less {words}, points of R@1", np.mean(
            [found[what, x, kind, ours][0] - other(what, x, kind) for x in LANGUAGES for kind in kinds], axis=0)))
    for a, b, words in (one for many in chosen.values() for one in many[:4]):
        lists = ""
        for x in LANGUAGES:
            old, new = evaluate.embed_texts(model, tokenizer, list(words[x]))
            nearest = (embedded.images @ (embedded.images[a] - old + new)).topk(min(4, M)).indices.tolist()
            nearest = [i for i in nearest if i != a][:3]
            lists += page.names(f"- {words[x][0]} + {words[x][1]}",
                                [(embedded.pairs[i].captions[x], i == b) for i in nearest], x)
            lists += page.row(page.picture(shards.decode(embedded.pairs[i].image), 44) for i in nearest)
        cards.append(page.card(page.picture(shards.decode(embedded.pairs[a].image), 56), lists))
    return ({"runs": list(map(str, runs)), "analogies": {kind: len(many) for kind, many in chosen.items()},
             "R@1 and R@5": {", ".join(key): values for key, values in found.items()}}, tables, verdicts,
            [page.heading("Some of them", "What the last run finds; the right one is marked."), page.cards(cards)])


# ------------------------------------------------------------------------------------------------------ the command

FINDINGS = {finding.__name__: finding for finding in (ablation, augmentation, alignment, culture, analogy)}


def parse_arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="\n\n".join(f"{name}: {inspect.getdoc(f)}" for name, f in FINDINGS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("finding", choices=[*FINDINGS, "all"])
    add("--data", nargs="+", default=[f"{trainer.DEMO}/train-*.tar"], metavar="SHARDS",
        help="training pairs, with a name in each language (default: the demo's, packed when missing)")
    add("--test", nargs="+", default=[f"{trainer.DEMO}/test-*.tar"], metavar="SHARDS",
        help="held-out pairs, names.json with all names beside them (default: the demo's)")
    add("--out", type=Path, default=Path("runs/findings"), metavar="FOLDER",
        help="results, and the arms that findings share (default: runs/findings)")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each arm (default: 3)")
    add("--steps", type=int, default=300, metavar="N", help="steps of an arm in stage 2 (default: 300)")
    add("--batch-size", type=int, default=256, metavar="N", help="pairs a step (default: 256)")
    add("--run", nargs="+", metavar="RUN", help="analogy: take these, as kelip.build_model opens them")
    args = parser.parse_args(argv)
    for flag in ("seeds", "steps", "batch_size"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least 1")
    if args.run and args.finding != "analogy":
        raise ValueError("--run: for analogy alone")
    return args


def main(argv=None):
    """Try one finding, or all, and say which claims held."""
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    pairs = open_out(args)
    names = list(FINDINGS) if args.finding == "all" else [args.finding]
    found = {name: conclude(args, name, *FINDINGS[name](args, pairs)) for name in names}
    if len(names) > 1:
        print("", *(f"{name}: {line}" for name in names for line in found[name]), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"findings.py: {error}")
    except KeyboardInterrupt:
        sys.exit("findings.py: stopped; the same command goes on where it was")
