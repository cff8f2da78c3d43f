"""Making shards, and checking them: the demo's pairs from pip packages, folders and tables of one's own pictures.

Behind `python data.py emoji`, `pack` and `check`. The same input makes the same bytes, whatever the processes, and a
folder of shards appears whole or not at all.

What it leaves out: fetching pictures from the web (img2dataset does that, and writes the same shards).
"""

import collections
import csv
import os
import pathlib
import re

import numpy as np

from demo import whole_folder
from shards import BLOCK, IMAGES, LANGUAGE, decode, index_tar, map_processes, read_pair, write_shard


def _folder_pairs(folder):
    """The pictures under a folder, sorted, and the captions beside them: [(path, {suffix: Path})]."""
    found = []
    for place, folders, files in os.walk(folder):
        folders.sort()
        texts = collections.defaultdict(dict)
        for name in files:
            match = re.fullmatch(rf"(.+?)\.((?:{LANGUAGE.pattern}\.)?txt|json)", name)
            if match:
                texts[match[1]][match[2]] = pathlib.Path(place, name)
        for name in sorted(files):
            stem, _, suffix = name.rpartition(".")
            if suffix.lower() in IMAGES:
                found.append((os.path.join(place, name), dict(sorted(texts[stem].items()))))
    return found


def _table_pairs(path):
    """The rows of a .tsv or .csv whose first row names the columns: [(path, {suffix: caption})]."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        tabs = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if path.endswith(".tsv") else {}
        names, *rows = list(csv.reader(file, **tabs)) or [[]]
    known = all(name == "caption" or LANGUAGE.fullmatch(name) for name in names[1:])
    if names[:1] not in (["image"], ["path"]) or not known:
        raise ValueError(f"{path}: its first row must be 'image', then a language or 'caption' a column")
    suffixes = ["txt" if name == "caption" else f"{name}.txt" for name in names[1:]]
    place = os.path.dirname(path)
    return [(os.path.join(place, row[0]), {suffix: text for suffix, text in zip(suffixes, row[1:]) if text})
            for row in rows if row]


def _pack_shard(job):
    """Write one shard of (number, (path, {suffix: caption or Path})): (pairs, [what is missing])."""
    path, items = job
    pairs, missing = [], []
    for number, (picture, captions) in items:
        try:
            members = {picture.rpartition(".")[2].lower(): pathlib.Path(picture).read_bytes()}
            for suffix, text in captions.items():
                members[suffix] = text.encode() if isinstance(text, str) else text.read_bytes()
            pairs.append((f"{number:09d}", members))
        except OSError as error:
            missing.append(f"{error.filename}: {error.strerror}")
    write_shard(path, pairs)
    return len(pairs), missing


def pack(out, inputs, shard_pairs=10_000, workers=1):
    """Make shards OUT/000000.tar, ... from folders of pictures and from tables, shuffled by a fixed rule.

    Captions lie beside a folder's pictures (NAME.txt, NAME.ko.txt, NAME.json); a table (.tsv, .csv) has a
    column image and one for each language. Same input, same bytes, whatever `workers`. Returns (pairs, [what
    is missing]). Raises ValueError when there are no pictures or an input is no table, OSError when OUT holds
    something or the disk is full.
    """
    items = []
    for path in inputs:
        items += _folder_pairs(path) if os.path.isdir(path) else _table_pairs(path)
    if not items:
        raise ValueError(f"{', '.join(inputs)}: no pictures there ({', '.join(sorted(IMAGES))})")
    order = np.random.default_rng(0).permutation(len(items)).tolist()
    with whole_folder(out, "") as temporary:
        jobs = [(f"{temporary}/{first // shard_pairs:06d}.tar",
                 [(i, items[order[i]]) for i in range(first, min(first + shard_pairs, len(items)))])
                for first in range(0, len(items), shard_pairs)]
        counts, missing = zip(*map_processes(_pack_shard, jobs, workers, "pack"))
    return sum(counts), [what for shard in missing for what in shard]


def check_shard(path):
    """Read and decode all of one shard: (facts, faults, {fault: example}, pixels and bytes a picture)."""
    facts, faults, examples, pixels, sizes = collections.Counter(), collections.Counter(), {}, [], []

    def fault(error, what):
        cause = str(error).partition(":")[0]
        faults[cause] += 1
        examples.setdefault(cause, f"{path}: {what}")

    try:
        shard = index_tar(path)
        with open(path, "rb") as file:
            for row in shard.rows:
                key = f"at byte {int(row[0]) * BLOCK}"
                try:
                    pair = read_pair(file, path, row)
                    key = pair.key
                    facts.update(f"captions {lang or 'unnamed'}" for lang in pair.captions)
                    if pair.fault:
                        fault(pair.fault, key)
                    image = decode(pair.image)
                    pixels.append(image.width * image.height)
                    sizes.append(len(pair.image))
                    facts["good pairs"] += not pair.fault
                except ValueError as error:
                    fault(error, key)
        facts["pairs"] = len(shard.rows)
        for cause, count in shard.left_out.items():
            faults[cause] += count
            examples.setdefault(cause, path)
    except OSError as error:
        fault("shard unreadable", error.strerror)
    return facts, faults, examples, pixels, sizes


def check(paths, workers=1):
    """Read every pair of some tars and print what is there and what is bad. Returns the faults, a Counter."""
    facts, faults, examples, pixels, sizes = collections.Counter(), collections.Counter(), {}, [], []
    for more in map_processes(check_shard, paths, workers, "check"):
        facts.update(more[0])
        faults.update(more[1])
        examples = {**more[2], **examples}
        pixels += more[3]
        sizes += more[4]
    count, good = facts.pop("pairs", 0), facts.pop("good pairs", 0)
    print(f"{len(paths):,} shards, {count:,} pairs, {good:,} of them good")
    for name, count in sorted(facts.items()):
        print(f"  {count:,} {name}")
    for values, unit in ((pixels, "pixels"), (sizes, "bytes")):
        if values:
            low, middle, high = (int(np.percentile(values, q)) for q in (5, 50, 95))
            print(f"  {unit} a picture: {middle:,} in the middle, {low:,} to {high:,} for nine in ten")
    for cause, count in faults.most_common():
        print(f"  bad: {count:,} {cause} (such as {examples[cause]})")
    return faults
