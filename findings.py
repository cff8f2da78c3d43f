"""The paper's claims, tried at the size of the demo: its ablation and its four findings, each beside a control.

    python findings.py ablation        stage 1 and multi-crop each help, together most
    python findings.py augmentation    strong augmentation helps classification and hurts retrieval
    python findings.py alignment       the languages align through the pictures that they share
    python findings.py culture         words of one meaning find different pictures in each language
    python findings.py analogy         image - text + text finds the analogous image
    python findings.py all

A finding trains arms, which are runs of train_clip.py that differ in one thing, once for each seed, or takes those that
are there; it writes OUT/NAME.json with every number and OUT/NAME.html, and says whether the claim held. It holds if its
difference to the control is positive with every seed and on average larger than its standard deviation over them; chance
alone gives three positive differences of three once in eight times. That, and what is compared with what, stands
in FINDINGS, and stood there before the runs.

What it leaves out: the size of the paper. What holds or fails here says so about this data and a model of 4.6M
parameters; and no setting is tuned on the test (what was chosen, was chosen on another vendor held out).
"""

import argparse
import collections
import fcntl
import hashlib
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import crops
import data
import evaluate
import kelip
import packing
import page
import shards
import train_clip
import trainer
from tokenizer import Tokenizer

LANGUAGES = ("en", "ko")
HERE = Path(__file__).resolve().parent
# The paper's two sizes of crops, 224 and 96 pixels, are 64 and 32 here, 16 patches and 4. A drawing fills its picture:
# boxes of DINO's 0.05 to 0.4 of the area lose what the caption says, so the low-resolution ones are larger.
MULTI_CROP = ("--crops", "1x64+2x32", "--low-scale", "0.3", "0.8")
ARMS = {  # what sets an arm apart, in flags of train_clip.py
    "clip": (), "mae": (), "crops": MULTI_CROP, "both": MULTI_CROP, "augment": (*MULTI_CROP, "--augment"),
    "shared": (), "apart": ()}
STAGE_1 = {"mae", "both"}     # arms that start from stage 1
STAGE_1_STEPS = 2             # steps of stage 1 for one of stage 2, as the defaults of the two scripts have it
VARIANTS = ("shared", "apart")  # arms that train on captions of one language a pair
NEAREST = 10                  # pictures of which culture asks whether two names share them
ANALOGIES = 2000              # of a kind, at most: a sample where there are more


class Finding(NamedTuple):
    """What is claimed, what is trained for it, and what would refute it."""
    claim: str
    trains: str
    refuted: str


FINDINGS = {
    "ablation": Finding(
        "Stage 1 (a masked autoencoder on the pictures) and multi-crop each help, and together they help most.",
        "CLIP alone, + MAE, + multi-crop and both, for the same number of pictures in stage 2 (stage 1's come on top); then "
        "the first three again for as long as the operations of 'both', stage 1 among them, would pay for. 2 hours on two "
        "CPU cores.",
        "Each difference is one of mean R@1 (both languages, both directions): + MAE and + multi-crop less CLIP alone, both "
        "less the best of the other three. A part of the claim is refuted where its difference is not above zero."),
    "augmentation": Finding(
        "Strong augmentation (SimCLR's colour distortion and blur) helps classification and hurts retrieval.",
        "Multi-crop with --augment, and without it, the ablation's arm. 20 minutes, or 40 without the ablation.",
        "Classification is accuracy on coarse groups of emoji, the mean over groups and languages; retrieval is mean R@1. "
        "Refuted unless with --augment the first is higher and the second is lower."),
    "alignment": Finding(
        "Without any loss between them, the two languages align through the pictures that they share.",
        "'shared': every drawing is captioned in one language only, by a hash of its key, so that no pair carries both names "
        "but both languages name each thing, in drawings of different vendors. Its control 'apart': every thing, with all "
        "its skin tones and genders, is captioned in one language only. 25 minutes.",
        "Measured is translation without a picture: the Korean name nearest to an English one among all names, and back, "
        "mean R@1. Refuted where 'shared' is not above 'apart'. The control has never seen one of a thing's two names: what "
        "it gets right comes from what names have in common, such as skin tones."),
    "culture": Finding(
        "Names of one meaning find different pictures in the two languages, and not by chance.",
        "CLIP alone, the ablation's arm. Ten minutes for three seeds, or seconds after the ablation.",
        f"Two names agree by the Jaccard index of the {NEAREST} test drawings nearest to each. Refuted where names in one "
        "language agree no more across two seeds than names in two languages across the same seeds do; and where the parting "
        "of the languages by concept in one seed is correlated no more with that in the others than with how little the other "
        "seeds agree in one language (names that find little for sure part by noise alone)."),
    "analogy": Finding(
        "Image - text + text finds the analogous image.",
        "CLIP alone, the ablation's arm, or any --run. Ten minutes for three seeds, or seconds after the ablation.",
        "For drawings A and B of the test whose English names differ in one attribute, B is looked for among all drawings "
        "but A by A - text(attribute of A) + text(attribute of B), the weight being 1, and once more with whole names for "
        "attributes. Measured is R@1, the mean over kinds of attribute and languages. Refuted where it is not above the "
        "better of A alone and the target's text alone."),
}


# ------------------------------------------------------------------------------------------------------------ arms

class Arm(NamedTuple):
    """One training run. flops: operations of a step, forward and backward. command: its script, and the flags that set it
    apart. init: the arm of stage 1 that it starts from."""
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


def make_arm(args, name, seed, steps=None):
    """The arm of this name, of --steps steps if no number is given."""
    config = kelip.PRESETS["tiny"]
    sizes = [size for number, size in crops.parse_crops(options(ARMS[name]).crops) for _ in range(number)]
    forward = trainer.image_flops(config, sizes) + trainer.text_flops(config, args.length)
    source = [str(args.out / "data" / name)] if name in VARIANTS else args.data
    command = ("train_clip.py", "--data", *source, "--test", *args.test, "--tokenizer", str(args.out / "tokenizer.json"),
               "--evals", "1", *ARMS[name])
    first = None
    if name in STAGE_1:
        mae = kelip.MAE(kelip.KELIP(**config).visual)
        first = Arm("stage-1", seed, STAGE_1_STEPS * args.steps, 3.0 * args.batch_size * trainer.mae_flops(mae),
                    ("train_mae.py", "--data", *args.data))
        command += ("--init", str(place(args, first) / "last.pt"))
    return Arm(name, seed, steps or args.steps, 3.0 * args.batch_size * forward, command, first)  # backward: twice forward


def options(flags):
    """Flags of an arm as train_clip.py understands them."""
    return train_clip.parse_arguments(list(flags))[0]


def place(args, arm):
    """The folder of an arm's run; arms of other lengths lie beside each other."""
    return args.out / "arms" / f"{arm.name}-{arm.steps}-seed{arm.seed}"


def matched(args, name, seed, budget):
    """The arm that does as many operations as budget, stage 1 included, give or take half a step."""
    arm = make_arm(args, name, seed)
    first = arm.init.compute if arm.init else 0
    return arm._replace(steps=max(1, round((budget - first) / arm.flops)))


def train(args, arms):
    """Train arms, and the stage 1 of those that start from one; finished ones stay as they are, others go on."""
    todo = []
    for arm in dict.fromkeys(one for arm in arms for one in (arm.init, arm) if one):
        last = place(args, arm) / "last.pt"
        done = kelip.load_checkpoint(last)["step"] if last.exists() else None
        measured = arm.name == "stage-1" or (place(args, arm) / "evaluation.json").exists()
        if done != arm.steps or not measured:
            todo.append((arm, done, arm.flops * (arm.steps - (done or 0))))
    spent = seconds = 0
    for number, (arm, done, flops) in enumerate(todo, 1):
        print(f"\n[{number} of {len(todo)}] {place(args, arm)}: {arm.steps:,} steps"
              + (f", going on from step {done:,}" if done is not None else ""), flush=True)
        begin = time.monotonic()
        launch(args, [*arm.command, "--out", str(place(args, arm)), "--steps", str(arm.steps), "--seed", str(arm.seed),
                      "--batch-size", str(args.batch_size), "--save-every", "50", "--keep", "1",
                      *["--resume"] * (done is not None)])
        seconds, spent = seconds + time.monotonic() - begin, spent + flops
        rest = sum(flops for *_, flops in todo[number:])
        if rest and spent:
            print(f"{number} of {len(todo)} arms trained; the others take some {rest * seconds / spent / 60:.0f} minutes at "
                  f"this rate", flush=True)


def launch(args, command):
    """Run a training script to its end, its output shown. It inherits the lock, and so holds it should it be left behind.
    Raises ValueError when it fails. Ctrl-C and SIGTERM end this process after the script has saved."""
    process = subprocess.Popen([sys.executable, str(HERE / command[0]), *command[1:]], pass_fds=[args.lock.fileno()])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)  # a second Ctrl-C would not wait for the checkpoint, this does
        process.wait()
        raise
    if code:
        raise ValueError(f"{command[0]} ended with {code}, see above; the same command goes on from the last checkpoint")


def open_out(args):
    """Make or open args.out for the settings of this call, and train its tokenizer. Sets args.length, the mean length of a
    caption in tokens. Raises ValueError when the folder is in use, or was begun with other settings."""
    args.out.mkdir(parents=True, exist_ok=True)
    args.lock = open(args.out / ".lock", "w")
    try:
        fcntl.flock(args.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{args.out}: another findings.py, or a training that one left behind, is at work there") from None
    settings = {"data": args.data, "test": args.test, "batch_size": args.batch_size, "arms": {k: [*v] for k, v in ARMS.items()},
                "stage_1_steps": STAGE_1_STEPS}
    path = args.out / "settings.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    for key, value in settings.items():
        if before.get(key) != value:
            raise ValueError(f"{args.out}: {key} was {before.get(key)} and is now {value}: set it back, or name another --out")
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    pairs = trainer.open_pairs(args, trainer.Job(0, 1, torch.device("cpu"), None), None)
    captions = [pairs[i].captions for i in tqdm(range(len(pairs)), "names", delay=2, leave=False, file=sys.stdout)]
    if not all(names.keys() >= set(LANGUAGES) for names in captions):
        raise ValueError("--data: findings are about pairs with a name in each language, and some lack one")
    path = args.out / "tokenizer.json"
    if not path.exists():  # one for all arms, so that they differ in one thing alone
        Tokenizer.train([text for names in captions for text in names.values()], kelip.PRESETS["tiny"]["vocab_size"],
                        progress=sys.stdout.isatty()).save(path)
    tokenizer = Tokenizer.load(path)
    args.length = statistics.fmean(len(tokenizer.encode_ordinary(text)) + 2 for names in captions for text in names.values())
    return pairs


def embed(args, run):
    """A run's model and tokenizer, and the test as it sees it: (model, tokenizer, evaluate.Embedded)."""
    model, _, tokenizer = kelip.build_model(str(run), "cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer, evaluate.Embedded(model, data.Pairs(args.test), tokenizer, evaluate.read_candidates(args.test))


def recalls(run):
    """R@1 of a finished run, in 0..1: {"English, image to text": ..., "mean": ...}."""
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["retrieval"]
    values = {f"{evaluate.NAMES[language]}, {title}": found[language][way]["R@1"]
              for language in LANGUAGES for way, title in evaluate.WAYS.items()}
    return {**values, "mean": statistics.fmean(values.values())}


# --------------------------------------------------------------------------------------------------------- verdicts

def verdict(text, differences, times=100):
    """A part of a claim, and whether it held. differences: one a seed, to the control. Held where all are positive and their
    mean is larger than their standard deviation; None, undecided, where fewer than two leave no spread."""
    differences = [times * float(x) for x in differences]
    deviation = statistics.stdev(differences) if len(differences) > 1 else 0.0
    held = min(differences) > 0 and statistics.fmean(differences) > deviation if len(differences) > 1 else None
    return {"claim": text, "differences": differences, "mean": statistics.fmean(differences or [0]), "sd": deviation,
            "range": [min(differences, default=0), max(differences, default=0)], "held": held}


def sentence(part):
    """A verdict in words."""
    end = {True: "held here", False: "did not hold here", None: "not decided here: the spread needs more seeds"}[part["held"]]
    low, high = part["range"]
    numbers = f"{part['mean']:+.2f} ± {part['sd']:.2f} ({low:+.2f} to {high:+.2f}, n = {len(part['differences'])})"
    return f"{part['claim']}: {numbers if part['differences'] else 'no number'}: {end}"


def show(values, times=100, digits=1):
    """Numbers of several seeds as "mean ± standard deviation"."""
    values = [times * x for x in values]
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values) if len(values) > 1 else 0:.{digits}f}"


def conclude(args, name, numbers, tables, verdicts, *parts):
    """Print the tables and the verdicts, write OUT/name.json and OUT/name.html. tables: (title, head, rows of text)."""
    finding = FINDINGS[name]
    lines = [sentence(part) for part in verdicts]
    for title, head, rows in tables:
        print(f"\n{title}")
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        for row in (head, *rows):
            print("  ".join([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])]))
    print("\n" + "\n".join(lines))
    written = {"finding": name, **finding._asdict(), "seeds": args.seeds, "steps": args.steps, "verdicts": verdicts, **numbers}
    (args.out / f"{name}.json").write_text(json.dumps(written, indent=1, ensure_ascii=False), encoding="utf-8")
    page.write(args.out / f"{name}.html", finding.claim, finding.trains,
               page.heading("What would refute it", finding.refuted), page.heading("What was found"),
               page.names("", [(line, part["held"]) for line, part in zip(lines, verdicts)], "en"),
               *(page.heading(title) + page.table(head, rows) for title, head, rows in tables), *parts)
    print(f"{args.out}/{name}.json, {args.out}/{name}.html")
    return verdicts


def table_of(rows, less):
    """Recalls of arms as (head, rows of text). rows: {label: (text, one dict of recalls a seed)}; less: the label that the
    others are compared with, seed by seed."""
    columns = list(rows[less][1][0])
    lines = []
    for label, (text, found) in rows.items():
        cells = [show([one[column] for one in found]) for column in columns]
        apart = show([one["mean"] - other["mean"] for one, other in zip(found, rows[less][1])], digits=2)
        lines.append([label, text, *cells, "" if label == less else apart])
    return ["R@1, %", "steps", *columns, f"mean less {less}"], lines


def views(pairs, arms, number=6):
    """Pieces of a page: drawings, and the crops of them that arms train on."""
    size = 72
    batch = next(iter(data.Loader(pairs, None, number, size, steps=1)))
    for title, name in arms.items():
        flags = options(ARMS[name])
        many = crops.multi_crop(batch.images, crops.parse_crops(flags.crops), 0, batch.slots, batch.aspect, flags.scale,
                                flags.low_scale, augment=flags.augment)
        deviation, mean = (torch.tensor(x).view(3, 1, 1) for x in (crops.STD, crops.MEAN))
        pictures = [((crop * deviation + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
                    for each in zip(*many) for crop in each]
        yield page.heading(title) + page.row(page.picture(Image.fromarray(x), x.shape[0]) for x in pictures)


# ------------------------------------------------------------------------------------------------------ the findings

LABELS = {"clip": "CLIP alone", "mae": "+ MAE", "crops": "+ multi-crop", "both": "+ both"}


def ablation(args, pairs):
    """The paper's ablation, at the same pictures and at the same operations."""
    budget = make_arm(args, "both", 0).compute
    settings = {
        "the same pictures in stage 2": [{name: make_arm(args, name, seed) for name in LABELS} for seed in range(args.seeds)],
        "the same operations": [{name: matched(args, name, seed, budget) for name in LABELS} for seed in range(args.seeds)]}
    train(args, [arm for seed in range(args.seeds) for arms in settings.values() for arm in arms[seed].values()])
    numbers, tables, verdicts = {"caption_length": args.length, "recalls": {}}, [], []
    for setting, arms in settings.items():
        found = {name: [recalls(place(args, each[name])) for each in arms] for name in LABELS}
        arm = arms[0]

        def length(name):
            first = f"{arm[name].init.steps:,} of stage 1 + " if arm[name].init else ""
            return f"{first}{arm[name].steps:,} = {arm[name].compute / 1e15:.2f} Pflop"
        rows = {label: (length(name), found[name]) for name, label in LABELS.items()}
        tables.append((f"At {setting}", *table_of(rows, "CLIP alone")))
        mean = {name: [one["mean"] for one in many] for name, many in found.items()}
        verdicts += [
            verdict(f"At {setting}, + MAE less CLIP alone, points", np.subtract(mean["mae"], mean["clip"])),
            verdict(f"At {setting}, + multi-crop less CLIP alone, points", np.subtract(mean["crops"], mean["clip"])),
            verdict(f"At {setting}, both less the best of the other three, points",
                    np.subtract(mean["both"], np.max([mean[name] for name in ("clip", "mae", "crops")], axis=0)))]
        numbers["recalls"][setting] = {name: {"steps": arm[name].steps, "operations": arm[name].compute, "seeds": many}
                                       for name, many in found.items()}
    return conclude(args, "ablation", numbers, tables, verdicts,
                    *views(pairs, {"What CLIP alone sees of a drawing": "clip", "What multi-crop sees of it": "crops"}))


def augmentation(args, pairs):
    """The paper's first finding: classification against retrieval, with strong augmentation and without."""
    arms = {name: [make_arm(args, name, seed) for seed in range(args.seeds)] for name in ("crops", "augment")}
    train(args, [arm for many in arms.values() for arm in many])
    found, accuracy = {}, {}
    for name, many in arms.items():
        found[name] = [recalls(place(args, arm)) for arm in many]
        accuracy[name] = []
        for arm in many:
            model, tokenizer, embedded = embed(args, place(args, arm))
            embedded.pairs, classes = groups_of(embedded.pairs)
            result = evaluate.classify(model, None, tokenizer, classes, embedded=embedded)
            values = {evaluate.NAMES[language]: result[language]["mean_per_class"] for language in LANGUAGES}
            accuracy[name].append({**values, "mean": statistics.fmean(values.values())})
    rows = {label: (f"{args.steps:,}", found[name]) for name, label in (("crops", "plain"), ("augment", "augmented"))}
    groups = [[label, *(show([one[key] for one in accuracy[name]]) for key in accuracy[name][0])]
              for name, label in (("crops", "plain"), ("augment", "augmented"))]
    tables = [("Retrieval", *table_of(rows, "plain")),
              (f"Classification of {result['pictures']:,} drawings into {result['classes']} groups, chance "
               f"{100 / result['classes']:.1f} %", ["mean per group, %", *accuracy["crops"][0]], groups)]

    def gain(values):
        return np.subtract([one["mean"] for one in values["augment"]], [one["mean"] for one in values["crops"]])
    verdicts = [verdict("Classification, augmented less plain, points", gain(accuracy)),
                verdict("Retrieval, plain less augmented, points", -gain(found))]
    return conclude(args, "augmentation", {"recalls": found, "classification": accuracy}, tables, verdicts,
                    *views(pairs, {"Plain crops": "crops", "Augmented crops": "augment"}))


GROUPS = {  # English and Korean name: first code points, from-to
    ("face", "얼굴"): "1F600-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F97A",
    ("person", "사람"): "1F466-1F478 1F481-1F487 1F645-1F647 1F64B-1F64E 1F6B4-1F6B6 1F926 1F930-1F93E 1F9CD-1F9DF",
    ("hand", "손"): "1F446-1F450 1F590 1F595-1F596 1F918-1F91F 1FAF0-1FAF8 270A-270D",
    ("animal", "동물"): "1F400-1F43F 1F980-1F9AE",
    ("food", "음식"): "1F32D-1F330 1F345-1F37F 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADB",
    ("vehicle", "탈것"): "1F680-1F6A2 1F6F4-1F6FC",
    ("clock", "시계"): "1F550-1F567 231A-231B 23F0-23F3",
    ("flag", "깃발"): "1F1E6-1F1FF 1F3F4"}


def groups_of(pairs):
    """Pairs with their coarse group of emoji as .cls, by the first code point of their key, without captions and .cls those
    of no group; and the groups as evaluate.classify takes classes."""
    spans = [[[int(end, 16) for end in (span + "-" + span).split("-")[:2]] for span in text.split()]
             for text in GROUPS.values()]
    result = []
    for pair in pairs:
        first = (code_points(pair.key) or [0])[0]
        group = [i for i, many in enumerate(spans) if any(low <= first <= high for low, high in many)]
        result.append(pair._replace(captions={}, members={"cls": b"%d" % group[0]} if group else {}))
    names = dict(zip(LANGUAGES, map(list, zip(*GROUPS))))
    return result, {"classnames": names, "templates": {"en": ["{}"], "ko": ["{}"]}}


def code_points(key):
    """'Joy-U+1F468-U+1F3FF' -> [0x1F468, 0x1F3FF]; [] for keys of another kind."""
    return [int(part[2:], 16) for part in key.split("-") if part.startswith("U+")]


def concept(pair):
    """What a drawing is of, whatever its gender and skin tone: its code points without those, its English name where the key
    has none."""
    points = [0x1F9D1 if point in (0x1F468, 0x1F469) else point for point in code_points(pair.key)]  # man, woman: person
    kept = [point for point in points if not 0x1F3FB <= point <= 0x1F3FF and point not in (0x2640, 0x2642, 0x200D, 0xFE0F)]
    return " ".join(map(str, kept)) or pair.captions["en"]


def language_of(variant, pair):
    """The one language that a variant captions a pair in: by its key in 'shared', by its concept in 'apart'."""
    text = pair.key if variant == "shared" else concept(pair)
    return LANGUAGES[hashlib.sha256(text.encode()).digest()[0] % 2]


def write_variant(folder, variant, pairs):
    """The training shards again, each pair without its caption in the other language; a folder that is there is kept."""
    if folder.exists():
        return
    with packing.whole_folder(str(folder), "") as temporary:
        for number in tqdm(range(len(pairs.shards)), f"{variant}: shards", leave=False, file=sys.stdout):
            chosen = (pairs[i] for i in range(pairs.starts[number], pairs.starts[number + 1]))
            shards.write_shard(f"{temporary}/{number:06d}.tar", (
                (pair.key, {suffix: content for suffix, content in pair.members.items()
                            if suffix not in {f"{other}.txt" for other in LANGUAGES if other != language_of(variant, pair)}})
                for pair in chosen))


def alignment(args, pairs):
    """The paper's second finding: translation through pictures that the languages share, and where they share none."""
    test = data.Pairs(args.test)
    everyone = [pairs[i] for i in range(len(pairs))]
    names = sorted({tuple(pair.captions[language] for language in LANGUAGES)
                    for pair in (*everyone, *(test[i] for i in range(len(test))))})
    trained = {variant: {language: {pair.captions[language] for pair in everyone if language_of(variant, pair) == language}
                         for language in LANGUAGES} for variant in VARIANTS}
    for variant in VARIANTS:
        write_variant(args.out / "data" / variant, variant, pairs)
    arms = {variant: [make_arm(args, variant, seed) for seed in range(args.seeds)] for variant in VARIANTS}
    train(args, [arm for many in arms.values() for arm in many])
    found, nearest = {}, {}
    for variant, many in arms.items():
        found[variant] = []
        for arm in many:
            model, tokenizer, embedded = embed(args, place(args, arm))
            english, korean = (evaluate.embed_texts(model, tokenizer, list(texts)) for texts in zip(*names))  # [P, D] each
            ways = evaluate.recall_at_k(english, korean, torch.arange(len(names)))
            values = {"English to Korean": ways["image_to_text"], "Korean to English": ways["text_to_image"]}
            for language in LANGUAGES:  # that each learned both: pictures of things that it was told in this language
                told = torch.tensor([text in trained[variant][language] for text in embedded.captions[language]])
                owner = embedded.owner[language].masked_fill(~told, -1)
                ways = evaluate.recall_at_k(embedded.images, embedded.texts[language], owner)
                values[f"pictures, {evaluate.NAMES[language]}"] = {
                    key: statistics.fmean(way[key] for way in ways.values()) for key in ways["image_to_text"]}
            found[variant].append(values)
            nearest.setdefault(variant, (english @ korean.T).topk(min(3, len(names))).indices)  # [P, 3], of the first seed
    keys = [f"R@{k}" for k in evaluate.KS]
    rows = [[f"{variant}: {way}", *(show([one[way][key] for one in many]) for key in keys),
             *(["{:.2f}".format(100 / len(names))] if " to " in way else [""])]
            for variant, many in found.items() for way in many[0]]
    means = {variant: [statistics.fmean(one[way]["R@1"] for way in one if " to " in way) for one in many]
             for variant, many in found.items()}
    cards = []
    embedded_names = {pair.captions["en"]: pair for pair in embedded.pairs}
    for i in range(0, len(names), max(1, len(names) // 24)):
        pair = embedded_names.get(names[i][0])
        if pair:
            lists = [page.names(f"{names[i][0]}, {variant}", [(names[j][1], j == i) for j in nearest[variant][i].tolist()], "ko")
                     for variant in VARIANTS]
            cards.append(page.card(page.picture(shards.decode(pair.image)), "".join(lists)))
    return conclude(
        args, "alignment", {"names": len(names), "chance": 1 / len(names), "recalls": found},
        [(f"Translation among {len(names):,} names, and pictures with names", ["%", *keys, "chance R@1"], rows)],
        [verdict("Translation, shared less apart, points of R@1", np.subtract(means["shared"], means["apart"]))],
        page.heading("The Korean names nearest to an English one", "With the first seed; the right one is marked."),
        page.cards(cards))


def jaccard(one, other):
    """Rows of K different numbers, int64 [P, K] each -> what part of each two rows' union both have, float [P]."""
    both = (one[:, :, None] == other[:, None, :]).any(2).sum(1)
    return both / (2 * one.shape[1] - both)


def rank_correlation(x, y):
    """Spearman's, of two float [P]; equal values have their mean rank."""
    def ranks(values):
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        return (count.cumsum(0) - (count - 1) / 2)[place]
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].nan_to_num(0).item()


def agreements(nearest):
    """What culture measures. nearest: for each seed {language: int64 [P, K]}, the pictures nearest to each concept's name.

    Returns for each two seeds the agreement of names in one language, and of those in two, [pairs, P] each; and for each
    seed (how its parting of the languages by concept is correlated with the others', and its control: with how little the
    others agree in one language; None where there are no two others).
    """
    def of(a, b, one, other):
        return jaccard(nearest[a][one], nearest[b][other])
    couples = list(itertools.combinations(range(len(nearest)), 2))
    same = torch.stack([(of(a, b, "en", "en") + of(a, b, "ko", "ko")) / 2 for a, b in couples])
    cross = torch.stack([(of(a, b, "en", "ko") + of(a, b, "ko", "en")) / 2 for a, b in couples])
    parting = [1 - of(a, a, "en", "ko") for a in range(len(nearest))]
    consistency = []
    for a in range(len(nearest)):
        others = [1 - one for one, couple in zip(same, couples) if a not in couple]
        control = statistics.fmean(rank_correlation(parting[a], one) for one in others) if others else None
        consistency.append((statistics.fmean(rank_correlation(parting[a], parting[b])
                                             for b in range(len(nearest)) if b != a), control))
    return same, cross, consistency


def culture(args, pairs):
    """The paper's third finding: what names of one meaning find in each language, against what they find by chance."""
    if args.seeds < 2:
        raise ValueError(f"--seeds {args.seeds}: culture compares seeds, at least 2")
    arms = [make_arm(args, "clip", seed) for seed in range(args.seeds)]
    train(args, arms)
    scores = []
    for arm in arms:
        *_, embedded = embed(args, place(args, arm))
        M = len(embedded.pairs)  # the first M names of each language are those of the pictures
        scores.append({language: embedded.texts[language][:M] @ embedded.images.T for language in LANGUAGES})  # [M, M]
    k = min(NEAREST, M)
    same, cross, consistency = agreements([{language: one[language].topk(k).indices for language in LANGUAGES}
                                           for one in scores])
    rows = [["two seeds, one language", show(same.mean(1).tolist())], ["two seeds, two languages", show(cross.mean(1).tolist())],
            ["chance", f"{100 * k / (2 * M - k):.1f}"]]
    ours, controls = zip(*consistency)
    decided = None not in controls
    rhos = [["with the parting in another seed", show(ours, times=1, digits=2)],
            ["with disagreement in one language", show(controls, times=1, digits=2) if decided else "needs three seeds"]]
    parted = (same - cross).amin(0)                                          # [M], in every two seeds at least this much
    chosen, seen = [], set()
    for i in parted.argsort(descending=True, stable=True).tolist():
        if concept(embedded.pairs[i]) not in seen and len(chosen) < 16:
            chosen.append(i)
            seen.add(concept(embedded.pairs[i]))
    shown, mean = [], {language: torch.stack([one[language] for one in scores]).mean(0) for language in LANGUAGES}
    drawing = {i: page.picture(shards.decode(embedded.pairs[i].image), 44, embedded.pairs[i].captions["en"])
               for i in {j for i in chosen for language in LANGUAGES for j in (i, *mean[language][i].topk(k).indices.tolist())}}
    for i in chosen:
        lists = [page.names(embedded.pairs[i].captions[language], [], language)
                 + page.row(drawing[j] for j in mean[language][i].topk(k).indices.tolist()) for language in LANGUAGES]
        shown.append(page.card(drawing[i], "".join(lists)))
    concepts = [{**embedded.pairs[i].captions, "parting": parted[i].item()} for i in parted.argsort(descending=True)[:100].tolist()]
    return conclude(
        args, "culture", {"agreement": {"one language": same.mean(1).tolist(), "two languages": cross.mean(1).tolist()},
                          "consistency": ours, "control": controls, "concepts": concepts},
        [(f"Agreement of the {k} nearest of {M:,} drawings", ["Jaccard index, %", "mean over pairs of seeds"], rows),
         ("Rank correlation of the parting of the languages by concept", ["correlation", "mean over seeds"], rhos)],
        [verdict("Agreement across seeds, in one language less in two, points", (same - cross).mean(1).tolist()),
         verdict("Rank correlation over concepts of the parting of the languages, with other seeds less with disagreement in "
                 "one language", np.subtract(ours, controls).tolist() if decided else [], times=1)],
        page.heading("Where the languages part most in every two seeds", f"The {k} drawings nearest to the English name, and to "
                     "the Korean one, by the mean over seeds. Picked as the most extreme of all, they owe part of it to luck."),
        page.cards(shown))


ATTRIBUTES = {  # kind: groups of attributes that take each other's place in English names, with their Korean
    "skin tone": [{"light skin tone": "하얀 피부", "medium-light skin tone": "연한 갈색 피부", "medium skin tone": "갈색 피부",
                   "medium-dark skin tone": "진한 갈색 피부", "dark skin tone": "검은색 피부"}],
    "gender": [{"man": "남자", "woman": "여자", "person": "사람"}, {"men": "남자", "women": "여자", "people": "사람"},
               {"boy": "남자 아이", "girl": "여자 아이"}],
    "hair": [{"red hair": "빨간 머리", "curly hair": "곱슬머리", "white hair": "백발", "bald": "대머리", "blond hair": "금발"}],
    "colour": [{"red": "빨간색", "orange": "주황색", "yellow": "노란색", "green": "초록색", "blue": "파란색", "purple": "보라색",
                "brown": "갈색", "black": "검은색", "white": "흰색"}],
}


def analogies(pairs):
    """All analogies between pairs: {kind: [(A, B, {language: (attribute of A, attribute of B)})]}, A and B places in pairs.

    B's English name is A's with one attribute of ATTRIBUTES, that stands in it once, in place of another: "man artist" and
    "woman artist". Flags of countries are analogies of each other, and the countries' names are the attributes.
    """
    place_of = {pair.captions["en"]: i for i, pair in reversed(list(enumerate(pairs)))}
    found, seen = collections.defaultdict(list), set()
    for kind, groups in ATTRIBUTES.items():
        for group, (name, a) in itertools.product(groups, place_of.items()):
            for old in group:
                parts = re.split(rf"(?<![\w-]){old}(?![\w-])", name)
                for new in group if len(parts) == 2 else ():
                    b = place_of.get(new.join(parts))
                    if new != old and b is not None and (a, b) not in seen:  # "red hair" is no colour
                        seen.add((a, b))
                        found[kind].append((a, b, {"en": (old, new), "ko": (group[old], group[new])}))
    flags = [i for i in place_of.values() if code_points(pairs[i].key) and all(
        0x1F1E6 <= point <= 0x1F1FF for point in code_points(pairs[i].key))]
    for a, b in itertools.permutations(flags, 2):
        words = {language: tuple(pairs[i].captions[language].removeprefix("깃발 ") for i in (a, b)) for language in LANGUAGES}
        found["flag"].append((a, b, words))
    return found


QUERIES = {"A - text + text": (1, -1, 1), "A + text": (1, 0, 1), "A": (1, 0, 0), "text": (0, 0, 1)}


def place_in_order(images, a, b, old, new, weights):
    """Where the right picture stands. images [M, D], unit vectors; a, b: int64 [n], the pictures of each analogy; old, new:
    unit vectors [n, D] of their texts; weights: of A, of the old text and of the new one. Returns int64 [n], how many
    pictures but A lie nearer to the query than B."""
    query = kelip.unit(weights[0] * images[a] + weights[1] * old + weights[2] * new)
    scores = query @ images.T                                                # [n, M]
    scores[torch.arange(len(a)), a] = -2
    return (scores > scores.gather(1, b[:, None])).sum(1)


def analogy(args, pairs):
    """The paper's fourth finding: arithmetic of features across pictures and texts."""
    runs = args.run
    if not runs:
        arms = [make_arm(args, "clip", seed) for seed in range(args.seeds)]
        train(args, arms)
        runs = [place(args, arm) for arm in arms]
    found = collections.defaultdict(list)  # (texts, language, kind, query) -> {"R@1", "R@5"} of each run
    for run in runs:
        model, tokenizer, embedded = embed(args, run)
        everything = analogies(embedded.pairs)
        chosen = {kind: [many[i] for i in np.random.default_rng(0).permutation(len(many))[:ANALOGIES]]
                  for kind, many in everything.items()}
        for (kind, many), language in itertools.product(chosen.items(), LANGUAGES):
            a, b = (torch.tensor([one[side] for one in many]) for side in (0, 1))
            words = [[one[2][language][side] for one in many] for side in (0, 1)]
            vocabulary = sorted({*words[0], *words[1]})
            vectors = evaluate.embed_texts(model, tokenizer, vocabulary)
            attributes = [vectors[[vocabulary.index(word) for word in side]] for side in words]     # [n, D] each
            names = [embedded.texts[language][side] for side in (a, b)]
            for texts, (old, new) in (("attributes", attributes), ("names", names)):
                for query, weights in QUERIES.items():
                    ranks = place_in_order(embedded.images, a, b, old, new, weights)
                    found[texts, language, kind, query].append(
                        {f"R@{k}": (ranks < k).float().mean().item() for k in (1, 5)})
    kinds, tables, verdicts, M = list(chosen), [], [], len(embedded.pairs)

    def mean(texts, query, languages=LANGUAGES, key="R@1"):
        """Over kinds and languages, of each run."""
        return [statistics.fmean(found[texts, language, kind, query][i][key] for language in languages for kind in kinds)
                for i in range(len(runs))]
    for texts, language in itertools.product(("attributes", "names"), LANGUAGES):
        rows = [[kind, f"{len(chosen[kind]):,} of {len(everything[kind]):,}",
                 *(show([one["R@1"] for one in found[texts, language, kind, query]]) for query in QUERIES),
                 show([one["R@5"] for one in found[texts, language, kind, "A - text + text"]])] for kind in kinds]
        rows.append(["mean over kinds", "", *(show(mean(texts, query, [language])) for query in QUERIES),
                     show(mean(texts, "A - text + text", [language], "R@5"))])
        tables.append((f"{evaluate.NAMES[language]} {texts}, R@1 and at last R@5, %; chance {100 / (M - 1):.2f} and "
                       f"{500 / (M - 1):.2f}", ["kind", "analogies", *QUERIES, "A - text + text"], rows))
    for texts in ("attributes", "names"):
        better = np.maximum(mean(texts, "A"), mean(texts, "text"))
        verdicts.append(verdict(f"With {texts}, A - text + text less the better of A alone and text alone, points of R@1",
                                np.subtract(mean(texts, "A - text + text"), better)))
    numbers = {" | ".join(key): values for key, values in found.items()}
    return conclude(args, "analogy", {"runs": list(map(str, runs)), "of": {kind: len(many) for kind, many in everything.items()},
                                      "accuracy": numbers}, tables, verdicts,
                    page.heading("Some of them", "The three drawings found first with the last run; the right one is marked."),
                    page.cards(_analogy_cards(model, tokenizer, embedded, chosen)))


def _analogy_cards(model, tokenizer, embedded, chosen, each=4):
    """Cards of some analogies of each kind: drawing A, the words, and what was found in each language."""
    for kind, many in chosen.items():
        for a, b, words in many[:each]:
            body = ""
            for language in LANGUAGES:
                old, new = evaluate.embed_texts(model, tokenizer, list(words[language]))
                scores = embedded.images @ kelip.unit(embedded.images[a] - old + new)
                scores[a] = -2
                top = scores.topk(min(3, len(scores) - 1)).indices.tolist()
                body += page.names("− {} + {}".format(*words[language]),
                                   [(embedded.pairs[i].captions[language], i == b) for i in top], language)
                body += page.row(page.picture(shards.decode(embedded.pairs[i].image), 44) for i in top)
            yield page.card(page.picture(shards.decode(embedded.pairs[a].image), 56), body)


# ------------------------------------------------------------------------------------------------------ the command

RUN = {"ablation": ablation, "augmentation": augmentation, "alignment": alignment, "culture": culture, "analogy": analogy}


def parse_arguments(argv=None):
    """The command line."""
    told = "\n\n".join(f"{name}\n  claim:   {finding.claim}\n  trains:  {finding.trains}\n  refuted: {finding.refuted}"
                       for name, finding in FINDINGS.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("finding", choices=[*FINDINGS, "all"])
    add("--data", nargs="+", default=[f"{trainer.DEMO}/train-*.tar"], metavar="SHARDS",
        help="training pairs, with a name in each language (default: the demo's, packed when missing)")
    add("--test", nargs="+", default=[f"{trainer.DEMO}/test-*.tar"], metavar="SHARDS",
        help="held-out pairs; names.json beside them holds all names (default: the demo's)")
    add("--out", type=Path, default=Path("runs/findings"), metavar="FOLDER",
        help="results, and the arms that findings share (default: runs/findings)")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each arm (default: 3)")
    add("--steps", type=int, default=400, metavar="N", help="steps of an arm in stage 2 (default: 400)")
    add("--batch-size", type=int, default=256, metavar="N", help="pairs a step (default: 256)")
    add("--run", nargs="+", metavar="RUN", help="analogy: with these runs, what kelip.build_model opens, instead of arms")
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
    found = {name: RUN[name](args, pairs) for name in (FINDINGS if args.finding == "all" else [args.finding])}
    if len(found) > 1:
        print("\n" + "\n".join(f"{name}: {sentence(part)}" for name, parts in found.items() for part in parts))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"findings.py: {error}")
    except KeyboardInterrupt:
        sys.exit("findings.py: stopped; the same command goes on where it was")
