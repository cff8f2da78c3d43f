"""Make shards from your own images, and check shards.

    python -m extras.pack images OUT photos/ more.csv   # pairs of images and captions
    python -m extras.pack classes OUT photos/           # a test set from one folder per class
    python -m extras.pack check 'OUT/*.tar'             # read everything, report errors

`images` takes folders and tables. In a folder, the captions of NAME.jpg are in NAME.txt (one
caption in any language), in NAME.en.txt and NAME.ko.txt, or in a NAME.json that has a "caption". A
table (.csv or .tsv) has a header: the first column is `image`, each other column is `caption` or a
language such as `en` or `ko`. Train on the result with `python train_clip.py --data OUT`.

`classes` takes a folder with one folder of images per class, and writes CLIP_benchmark's layout:
OUT/classnames.txt, OUT/test/nshards.txt, OUT/test/0.tar, ... Evaluate a model on it with `python
evaluate.py MODEL --test OUT`.

The same input results in the same bytes for any number of workers. A folder of shards appears when
it is complete.

Not included: downloading images (img2dataset does that, and writes the same shards).
"""

import argparse
import collections
import csv
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

import shards
from extras.search import ImageFolder
from kelip import ceil_div
from shards import IMAGE_SUFFIXES, is_language
from tokenizer import run_command

SHARD_PAIRS = 10_000


# ---- pairs of images and captions ----

def pack_images(out, inputs, shard_pairs=SHARD_PAIRS, workers=1):
    """Make shards OUT/000000.tar, ... from folders and tables, shuffled with a fixed seed.

    inputs: paths of folders and of .csv and .tsv files, as the top of this file describes. Returns
    (number of pairs, [a line on each file that could not be read]). Raises ValueError when an input
    is neither or there are no images, FileExistsError when OUT is not empty, OSError when the disk
    is full.
    """
    found = []
    for path in inputs:
        if os.path.isdir(path):
            found += _folder_pairs(path)
        elif path.lower().endswith((".csv", ".tsv")):
            found += _table_pairs(path)
        else:
            raise ValueError(f"{path}: neither a folder of images nor a table (.csv, .tsv)")
    if not found:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{', '.join(inputs)}: no images there ({suffixes})")
    order = np.random.default_rng(0).permutation(len(found))
    items = [(f"{i:09d}", *found[source]) for i, source in enumerate(order.tolist())]
    with shards.new_folder(out) as temporary:
        paths = [f"{temporary}/{i:06d}.tar" for i in range(ceil_div(len(items), shard_pairs))]
        return _write_shards(paths, items, shard_pairs, workers)


def _folder_pairs(folder):
    """The images under a folder, sorted, with their captions: [(path, {suffix: Path})]."""
    caption = re.compile(r"(.+?)\.((?:[a-z]{2}([-_][A-Za-z0-9]+)*\.)?txt|json)")
    found = []
    for parent, folders, files in os.walk(folder):
        folders.sort()  # os.walk visits them in this order
        captions = collections.defaultdict(dict)                             # by stem and suffix
        for name in files:
            if match := caption.fullmatch(name):
                captions[match[1]][match[2]] = pathlib.Path(parent, name)
        for name in sorted(files):
            stem, _, suffix = name.rpartition(".")
            if suffix.lower() in IMAGE_SUFFIXES:
                found.append((os.path.join(parent, name), dict(sorted(captions[stem].items()))))
    return found


def _table_pairs(path):
    """The rows of a .csv or .tsv, whose paths are relative to it: [(path, {suffix: caption})]."""
    options = {}
    if path.lower().endswith(".tsv"):
        options = dict(delimiter="\t", quoting=csv.QUOTE_NONE)
    with open(path, encoding="utf-8-sig", newline="") as file:
        header, *rows = list(csv.reader(file, **options)) or [[]]
    known = all(name == "caption" or is_language(name) for name in header[1:])
    if header[:1] not in (["image"], ["path"]) or not known:
        raise ValueError(f"{path}: its header is {', '.join(header)!r}: the first column must be "
                         "image, each other one caption or a language such as en or ko")
    suffixes = ["txt" if name == "caption" else f"{name}.txt" for name in header[1:]]
    folder = os.path.dirname(path)
    found = []
    for row in rows:
        if row:
            captions = {suffix: text for suffix, text in zip(suffixes, row[1:]) if text}
            found.append((os.path.join(folder, row[0]), captions))
    return found


def _write_shards(paths, items, shard_pairs, workers):
    """Write items (key, path of the image, {suffix: text or Path}), shard_pairs to a shard.

    Returns (number of pairs, [a line on each file that could not be read]).
    """
    jobs = [(path, items[i * shard_pairs:(i + 1) * shard_pairs]) for i, path in enumerate(paths)]
    unreadable = []
    for of_shard in shards.map_processes(_write_one_shard, jobs, workers, "pack"):
        unreadable += of_shard
    return len(items) - len(unreadable), unreadable


def _write_one_shard(job):
    """Write one shard; returns a line on each file that could not be read."""
    path, items = job
    unreadable = []

    def pairs():
        for key, image, others in items:
            files = {image.rpartition(".")[2].lower(): pathlib.Path(image), **others}
            try:
                members = {
                    suffix: value.encode() if isinstance(value, str) else value.read_bytes()
                    for suffix, value in files.items()}
            except OSError as error:
                unreadable.append(f"{error.filename}: {error.strerror}")
                continue
            yield key, members

    shards.write_shard(path, pairs())
    return unreadable


# ---- folders of classes ----

def pack_classes(out, folder, split="test", workers=1):
    """Make a set for zero-shot classification from a folder with one folder of images per class.

    Writes CLIP_benchmark's layout: OUT/classnames.txt, OUT/SPLIT/nshards.txt, and OUT/SPLIT/0.tar,
    1.tar, ..., in which each image has a .cls, the number of its class among the sorted names.
    Another call with another split of the same classes adds it to OUT. Images may be in folders
    inside those of the classes. Hidden files are ignored, links are followed.

    Returns (number of images, class names, [a line on each image that was skipped]). Raises
    ValueError when there are no class folders or OUT has other classes, FileExistsError when the
    split exists, OSError when there are no images, a folder cannot be read or the disk is full.
    """
    images = ImageFolder(folder)
    found = []  # (class name or "", path)
    for key, image in zip(images.keys, images.shards):
        class_folder, slash, _ = key.partition("/")
        found.append((class_folder if slash else "", image.path))
    names = sorted({name for name, _ in found if name})
    if not names:
        raise ValueError(f"{folder}: no folders of images there, one for each class")
    text = "".join(f"{name}\n" for name in names)
    names_file = pathlib.Path(out, "classnames.txt")
    if names_file.exists() and names_file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{names_file}: lists other classes than {folder}: name another OUT")
    skipped = [f"{path}: not in the folder of a class" for name, path in found if not name]
    numbers = {name: str(i) for i, name in enumerate(names)}
    labeled = [(path, {"cls": numbers[name]}) for name, path in found if name]
    items = [(f"{i:09d}", *item) for i, item in enumerate(labeled)]
    with shards.new_folder(os.path.join(out, split)) as temporary:
        paths = [f"{temporary}/{i}.tar" for i in range(ceil_div(len(items), SHARD_PAIRS))]
        count, unreadable = _write_shards(paths, items, SHARD_PAIRS, workers)
        pathlib.Path(temporary, "nshards.txt").write_text(f"{len(paths)}\n")
        names_file.write_text(text, encoding="utf-8")
    return count, names, skipped + unreadable


# ---- checking shards ----

class ShardReport(NamedTuple):
    """The result of check_shard."""
    pairs: int
    good_pairs: int                   # have a caption and an image that decodes
    captions: collections.Counter     # by language
    errors: collections.Counter       # by reason
    examples: dict                    # reason -> the first pair with it
    pixels: list                      # of each image that decodes
    sizes: list                       # bytes, of the same images


def check_shard(path):
    """Read and decode all pairs of one shard: ShardReport."""
    captions, errors, examples = collections.Counter(), collections.Counter(), {}
    good_pairs, pixels, sizes = 0, [], []

    def note(error, where):
        reason = str(error).partition(":")[0]
        errors[reason] += 1
        examples.setdefault(reason, f"{path}: {where}")

    try:
        shard, rows = shards.index_tar(path)
    except OSError as error:
        note("shard unreadable", error.strerror)
        return ShardReport(0, 0, captions, errors, examples, pixels, sizes)
    with open(path, "rb") as file:
        for row in rows:
            where = f"at byte {int(row[0]) * shards.BLOCK}"
            try:
                pair = shards.read_pair(file, path, row)
                where = pair.key
                captions.update({x: len(texts) for x, texts in pair.captions.items()})
                for error in pair.errors:
                    note(error, where)
                image = shards.decode(pair.image)
            except ValueError as error:
                note(error, where)
                continue
            pixels.append(image.width * image.height)
            sizes.append(len(pair.image))
            good_pairs += not pair.errors
    for reason, count in shard.skipped.items():
        errors[reason] += count
        examples.setdefault(reason, path)
    return ShardReport(len(rows), good_pairs, captions, errors, examples, pixels, sizes)


def check(paths, workers=1):
    """Read and decode all pairs of some tars, print a report, return the errors: a Counter."""
    reports = shards.map_processes(check_shard, paths, workers, "check")
    captions, errors, examples = collections.Counter(), collections.Counter(), {}
    pixels, sizes = [], []
    for report in reports:
        captions.update(report.captions)
        errors.update(report.errors)
        examples = {**report.examples, **examples}
        pixels += report.pixels
        sizes += report.sizes
    pairs = sum(report.pairs for report in reports)
    good_pairs = sum(report.good_pairs for report in reports)
    print(f"{len(paths):,} shards, {pairs:,} pairs, {good_pairs:,} of them good")
    if captions:
        print(f"  captions: {shards.format_counts(captions)}")
    for values, unit in ((pixels, "pixels"), (sizes, "bytes")):
        if values:
            low, median, high = (int(q) for q in np.percentile(values, (5, 50, 95)))
            print(f"  {unit} per image: median {median:,}, 5th to 95th percentile {low:,} to "
                  f"{high:,}")
    for reason, count in errors.most_common():
        print(f"  error: {count:,} {reason} (first: {examples[reason]})")
    return errors


# ---- the command ----

def main(argv=None):
    """Read the command line, then pack or check."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.pack", description=__doc__.split("\n\nThe same input")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    images = commands.add_parser(
        "images", help="make shards from folders and tables",
        description="Make shards of pairs. Captions are files of the image's name: cat.jpg with "
                    "cat.txt, cat.ko.txt, cat.en.txt or cat.json. Or a .csv or .tsv has them, "
                    "whose first row is image, then a language (ko, en) or caption per column.")
    images.add_argument("out", metavar="OUT", help="a new or empty folder for the shards")
    images.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="a folder of images with their captions, or a .csv or .tsv")
    images.add_argument("--shard-pairs", type=int, default=SHARD_PAIRS, metavar="N",
                        help="pairs in a shard (default: %(default)s)")
    classes = commands.add_parser(
        "classes", help="make a test set from class folders",
        description="Make a set for evaluate.py and extras.probe of a folder that has one folder "
                    "of images per class, named as the class.")
    classes.add_argument("out", metavar="OUT", help="the folder for the set")
    classes.add_argument("folder", metavar="FOLDER", help="has one folder of images per class")
    classes.add_argument("--split", default="test", metavar="NAME",
                         help="the name of these images in the set (default: %(default)s)")
    checks = commands.add_parser("check", help="read and decode everything, report errors")
    checks.add_argument("shards", nargs="+", metavar="SHARDS",
                        help="tars, folders, globs or brace ranges")
    for command in (images, classes, checks):
        command.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N",
                             help="processes (default: the number of cores)")
    args = parser.parse_args(argv)
    if args.command == "check":
        paths = []
        for pattern in args.shards:
            paths += shards.expand_pattern(pattern.partition("::")[0])
        check(paths, args.workers)
        return
    if args.command == "images":
        if args.shard_pairs < 1:
            raise ValueError(f"--shard-pairs {args.shard_pairs}: at least 1")
        count, skipped = pack_images(args.out, args.inputs, args.shard_pairs, args.workers)
        line = f"{args.out}: {count:,} pairs"
    else:
        count, names, skipped = pack_classes(args.out, args.folder, args.split, args.workers)
        line = f"{args.out}: {count:,} images of {len(names):,} classes"
    if skipped:
        line += f"; {len(skipped):,} skipped, such as {skipped[0]}"
    print(line)


if __name__ == "__main__":
    run_command(main)
