"""Compare ways to fine-tune a model on your pairs: what each gains, and what the model forgets.

    python -m extras.finetune runs/clip --data 'new/train-*.tar' --test 'new/test-*.tar' \\
        --old 'old/test-*.tar' --sizes 100 500

way                     what is trained
all weights             both encoders, at each learning rate of --lr
image encoder frozen    train_clip.py --freeze image
text encoder frozen     train_clip.py --freeze text
encoders at a tenth     the encoders have a tenth of the projections' learning rate
projections alone       a linear probe: the encoders have none
blends                  no training: weights between before and after (WiSE-FT, arXiv 2109.01903)

All ways but the first have the middle one of the learning rates, and so has the run that is
blended. Each way is trained once per seed, on all pairs and on --sizes of them. R@1 is the mean
over languages and directions, of last.pt: on the pairs that were trained on, on --test, and on
--old, pairs that the model knew before. Choose a way by --test, and by what --old may lose.

Runs that exist are reused, and a command that was stopped resumes when it is run again. Tables are
printed and written to OUT/finetune.html, with a plot of the blends, and to OUT/finetune.json.

From top to bottom: the ways, training, measuring, the command.

Not included: a search over other flags of train_clip.py; give them to it directly.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import data
import evaluate
import kelip
import page
import shards
import train_clip
from command import ArgumentParser, number, run_command
from extras import convert, findings
from extras.bench import FORWARD_AND_BACKWARD, image_flops, text_flops

ALPHAS = (0.25, 0.5, 0.75)
LR = train_clip.FINE_TUNING_LR
CAPTION_LENGTH = 10  # tokens of a caption, to estimate the time


# ---- the ways ----

class Way(NamedTuple):
    """A way to fine-tune."""
    label: str    # in the tables
    name: str     # of the folder
    flags: tuple  # of train_clip.py


def make_ways(rates):
    """The ways to train, and the one to blend: (list of Way, Way). rates: sorted."""
    ways = [Way(f"all weights, --lr {lr:g}", f"lr-{lr:g}", ("--lr", f"{lr:g}")) for lr in rates]
    middle, blended = rates[len(rates) // 2], ways[len(rates) // 2]
    for label, name, flags in (
            ("image encoder frozen", "image-frozen", ("--freeze", "image")),
            ("text encoder frozen", "text-frozen", ("--freeze", "text")),
            ("encoders at a tenth", "tenth", ("--encoder-lr-factor", "0.1")),
            ("projections alone", "projections", ("--encoder-lr-factor", "0"))):
        ways.append(Way(label, f"{name}-{middle:g}", ("--lr", f"{middle:g}", *flags)))
    return ways, blended


# ---- training ----

def write_part(folder, pairs, n):
    """Write n of the pairs as a shard, unless the folder exists. The digests of their images decide
    which, so that a smaller part is within a larger one.
    """
    if folder.exists():
        return
    order = sorted(range(len(pairs)), key=lambda i: hashlib.sha256(pairs[i].image).digest())
    with shards.new_folder(str(folder)) as temporary:
        # Keys are new, since those of different shards may be equal.
        shards.write_shard(f"{temporary}/train.tar",
                           ((f"{i:08d}", pairs[k].members) for i, k in enumerate(order[:n])))


def make_run(args, config, way, seed, sources, n):
    """The findings.TrainingRun of a way on n pairs in `sources`."""
    batch_size = min(args.batch_size, max(2, n // 2))
    steps = max(1, round(args.epochs * n / batch_size))
    pair_flops = (image_flops(config, [config["image_resolution"]])
                  + text_flops(config, CAPTION_LENGTH))
    flags = ("--init", args.model, "--data", *sources, "--test", *args.test, "--evals", "1",
             "--batch-size", str(batch_size), *way.flags)
    return findings.TrainingRun(f"{way.name}-of-{n}", seed, steps,
                                FORWARD_AND_BACKWARD * batch_size * pair_flops, "train_clip", flags)


# ---- measuring ----

def recall(model, tokenizer, sources, candidates):
    """The mean R@1 of a model on pairs."""
    pairs = data.Pairs(sources)
    return evaluate.mean_recall(evaluate.retrieve(model, pairs, tokenizer, candidates,
                                                  progress=False))


def measure(checkpoint, sets):
    """R@1 on sets of pairs: {name: R@1}. checkpoint: a kelip.Checkpoint; sets: {name: shards}."""
    model = kelip.KELIP(**checkpoint.config).eval()
    kelip.load_weights(model, checkpoint.weights, checkpoint.path)
    results = {}
    for name, sources in sets.items():
        # The pairs that are trained on have the same candidates as those of --test.
        candidates = evaluate.read_candidates(sets["old" if name == "old" else "test"])
        results[name] = recall(model, checkpoint.tokenizer, sources, candidates)
    return results


def measure_ways(before, folders, blended, sets):
    """R@1 before, after each way and of the blends of one: (results, those of blends by alpha).

    before: a kelip.Checkpoint. folders: {way: its runs, one for each seed}. results: {label: [what
    measure returns, for each seed]}.
    """
    total = 1 + sum(map(len, folders.values())) + len(ALPHAS) * len(folders[blended])
    with tqdm(total=total, desc="measuring", unit=" models", disable=None, leave=False) as bar:
        def measured(checkpoint):
            bar.update()
            return measure(checkpoint, sets)

        results = {"before": [measured(before)]}
        for way, of_way in folders.items():
            results[way.label] = [{**measured(convert.read(folder)), "seconds": seconds_of(folder)}
                                  for folder in of_way]
        blends = {0.0: results["before"], 1.0: results[blended.label]}
        after = [convert.read(folder) for folder in folders[blended]]
        for alpha in ALPHAS:
            blends[alpha] = [measured(convert.blend(before, one, alpha)) for one in after]
            results[f"blend of {blended.label}, alpha {alpha:g}"] = blends[alpha]
    return results, dict(sorted(blends.items()))


def seconds_of(folder):
    """The time that the steps of a run took, from its metrics.jsonl."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    batch_size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["batch_size"]
    seconds, last = 0.0, 0
    for line in map(json.loads, text.splitlines()):
        if "images_per_second" in line:
            seconds += batch_size * (line["step"] - last) / line["images_per_second"]
            last = line["step"]
    return seconds


def make_table(label_results, columns):
    """Rows of text: {label: [a dict of numbers for each seed]}, each number as mean ± deviation."""
    rows = []
    for label, results in label_results.items():
        row = [label]
        for column in columns:
            values = [result[column] for result in results if column in result]
            scale = 1 if column == "seconds" else 100
            row.append(findings.show(values, scale) if values else "")
        rows.append(row)
    return rows


def plot_blends(title, results):
    """A plot of R@1 over alpha. results: {label: [...]} as make_table takes them."""
    series = {}
    for name, label in (("test", "--test"), ("old", "--old")):
        points = []
        for alpha, found in results.items():
            values = [100 * result[name] for result in found if name in result]
            if values:
                points.append((alpha, sum(values) / len(values)))
        series[label] = points
    return page.plot(title, series, dots=True, unit="alpha")


# ---- the command ----

def parse_arguments(argv=None):
    """The command line."""
    parser = ArgumentParser(
        prog="python -m extras.finetune", description=__doc__.partition("\nFrom top")[0],
        fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL",
        help="a run of train_clip.py, released KELIP or what extras.convert wrote")
    add("--data", nargs="+", required=True, metavar="SHARDS", help="pairs to train on")
    add("--test", nargs="+", required=True, metavar="SHARDS",
        help="held-out pairs of the same kind; a names.json in their folder has further captions "
             "to choose from")
    add("--old", nargs="+", metavar="SHARDS",
        help="held-out pairs of the kind that the model was trained on (default: none)")
    add("--sizes", nargs="+", type=number(int, 4), default=[], metavar="N",
        help="train on so many pairs, too")
    add("--lr", nargs="+", type=number(float, above=0), default=[LR / 4, LR, 4 * LR], metavar="X",
        help=f"learning rates (default: {LR / 4:g} {LR:g} {4 * LR:g})")
    add("--epochs", type=number(float, above=0, high=1e6), default=10, metavar="N",
        help="epochs to train (default: 10)")
    add("--batch-size", type=number(int, 2, 1 << 24), default=128, metavar="N",
        help="pairs per step, at most half of all (default: 128)")
    add("--seeds", type=number(int, 1, 1 << 20), default=3, metavar="N",
        help="runs of each way (default: 3)")
    add("--out", default="runs/finetune", metavar="FOLDER",
        help="tables, and the runs (default: runs/finetune)")
    args = parser.parse_args(argv)
    args.out = Path(args.out)
    args.lr = sorted(set(args.lr))
    return args


def main(argv=None):
    """Train all ways, measure them, and print the tables."""
    args = parse_arguments(argv)
    before = convert.read(args.model)
    config = {**kelip.default_options(before.config), **before.config}
    lock = findings.lock_folder(args.out)
    settings = {"model": args.model, "data": args.data, "test": args.test, "epochs": args.epochs,
                "batch_size": args.batch_size}
    findings.check_settings(args.out, settings)
    pairs = data.Pairs(args.data)
    print(pairs.describe(), flush=True)
    page.write_text(args.out / "settings.json", json.dumps(settings, indent=1))
    trained_on = {}  # number of pairs -> shards
    for n in sorted({n for n in args.sizes if n < len(pairs)}):
        trained_on[n] = [str(args.out / "data" / str(n))]
        write_part(Path(trained_on[n][0]), pairs, n)
    trained_on[len(pairs)] = args.data

    study = findings.Study(args, pairs, CAPTION_LENGTH, lock)
    (ways, blended), seeds = make_ways(args.lr), range(args.seeds)
    runs = {(n, way): [make_run(args, config, way, seed, sources, n) for seed in seeds]
            for n, sources in trained_on.items() for way in ways}
    findings.train(study, [run for of_way in runs.values() for run in of_way])

    parts, numbers = [], {}
    columns = ["trained on", "test", *(["old"] if args.old else []), "seconds"]
    for n, sources in trained_on.items():
        sets = {"trained on": sources, "test": args.test, **({"old": args.old} if args.old else {})}
        folders = {way: [findings.folder_of(study, run) for run in runs[n, way]] for way in ways}
        numbers[n], blends = measure_ways(before, folders, blended, sets)
        title = f"{n:,} pairs, {runs[n, blended][0].steps:,} steps: R@1, %"
        table = (title, ["", *columns], make_table(numbers[n], columns))
        findings.print_table(*table)
        sys.stdout.flush()
        parts += [page.heading(title) + page.table(*table[1:]),
                  plot_blends(f"{n:,} pairs: R@1 of blends, %", blends)]
    page.write_text(args.out / "finetune.json", json.dumps(numbers, indent=1))
    page.write(args.out / "finetune.html", f"Ways to fine-tune {args.model}",
               f"{args.seeds} seeds, {args.epochs:g} epochs. R@1 is the mean over languages and "
               "directions.", *parts)
    print(f"{args.out}/finetune.json\nopen {args.out}/finetune.html")


if __name__ == "__main__":
    run_command(main, "checkpoints are saved; the same command resumes", output="log",
                on_out_of_memory=": lower --batch-size")
