"""Search images by words in English or Korean, by an image, or by both, plus and minus words.

    python -m extras.search runs/clip 빨간 사과 --images PHOTOS
    python -m extras.search runs/clip red apple --images 'data/emoji/test-*.tar'
    python -m extras.search runs/clip --images PHOTOS --like apple.png
    python -m extras.search runs/clip --images PHOTOS --like king.png --minus man --plus woman
    python -m extras.search runs/clip --images PHOTOS      # asks for words, again and again
    python -m extras.search runs/clip --images PHOTOS --duplicates 0.95

Prints the ten nearest images and writes a page, search.html, with forty. Vectors of images are
cached (extras/features.py), so later searches start at once. While it asks, images may be added to
the folder or deleted. After `python -m extras.calibrate`, a search by words shows p beside each
cosine, the probability that the image matches. --duplicates writes a page of images that are nearly
the same, duplicates.html.

From top to bottom: files in folders, a folder of images as a set, the query, duplicates, the
command.

Not included: an approximate index. Searching a million images is one matrix product.
"""

import argparse
import contextlib
import functools
import itertools
import os
import stat
import sys
import unicodedata
from pathlib import Path

import torch

import data
import kelip
import page
import shards
from command import ArgumentParser, number, one_line, run_command
from evaluate import CHUNK, check_writable, embed_texts, folder_of, with_progress
from extras.calibrate import probability, read_calibration
from extras.features import open_cache, update
from shards import IMAGE_SUFFIXES, Pair, Shard

PRINTED, SHOWN = 10, 40  # results on the terminal and on the page
SIDE = 112               # of an image on the page, in pixels


# ---- files in folders ----

def walk_files(root):
    """Walk a folder and its subfolders: yields (path of a folder, [names of its files]), sorted.

    Links are followed, but no folder is visited twice. Hidden files and folders are ignored, such
    as the ._1.jpg that macOS adds to 1.jpg. Raises OSError when a folder cannot be read.
    """
    seen = set()
    for folder, folders, files in os.walk(root, onerror=_raise, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder that was walked before, or that it is in
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, sorted(name for name in files if not name.startswith("."))


def _raise(error):
    raise error


def suffix_of(name):
    """The suffix of a file's name, in lower case and without the dot: 'a/b.JPG' -> 'jpg'."""
    return os.path.splitext(name)[1][1:].lower()


def read_file(path, limit=shards.MAX_PAIR):
    """The bytes of a file. Raises ValueError(reason) if it is too large or not a regular file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise ValueError(f"file of more than {limit:,} bytes")
            return file.read(size)
    except OSError as error:
        raise ValueError(error.strerror) from None


def compose(text):
    """A text in NFC. macOS writes names of files in NFD, which looks the same."""
    return unicodedata.normalize("NFC", text)


def on_disk(path):
    """A path as it is on disk, where its names may be in NFC or NFD."""
    if os.path.lexists(path):
        return path
    found = ""
    for name in Path(path).parts:
        if not os.path.lexists(os.path.join(found, name)):
            name = _composed_names(found).get(compose(name))
            if name is None:
                return path
        found = os.path.join(found, name)
    return found


@functools.cache
def _composed_names(folder):
    """{name in NFC: name on disk} of the files and folders in a folder."""
    try:
        return {compose(name): name for name in os.listdir(folder or ".")}
    except (OSError, ValueError):
        return {}


# ---- a folder of images ----

class ImageFolder:
    """The images that walk_files finds in a folder, with data.Pairs's interface.

    `shards` are the files, each a Shard of one image. `keys` are their paths in the folder.
    Raises FileNotFoundError when there is no image, and OSError when a folder cannot be read.
    """

    def __init__(self, root):
        self.shards, self.keys, self.skipped = [], [], {}
        self._times = {}  # folder -> when a file was last added or removed
        root = str(root)
        for folder, files in walk_files(root):
            self._times[folder] = os.stat(folder).st_mtime_ns
            for name in files:
                if suffix_of(name) not in IMAGE_SUFFIXES:
                    continue
                path = os.path.join(folder, name)
                # A link without its target becomes an image that cannot be read.
                status = os.stat(path) if os.path.exists(path) else os.lstat(path)
                self.shards.append(Shard(path, status.st_size, status.st_mtime_ns, 1))
                key = os.path.relpath(path, root).replace(os.sep, "/")
                # Names from old archives may not be UTF-8.
                self.keys.append(os.fsencode(key).decode("utf-8", "backslashreplace"))
        if not self.keys:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise FileNotFoundError(f"{root}: no images there ({suffixes})")

    def __len__(self):
        return len(self.keys)

    def has_changed(self):
        """Whether files were added or removed since the folder was read."""
        return any(os.stat(folder).st_mtime_ns != time for folder, time in self._times.items())

    def __getitem__(self, i):
        """Image i, as a Pair. Raises ValueError("reason: key") when it cannot be read."""
        try:
            image = read_file(self.shards[i].path)
        except ValueError as error:
            raise ValueError(f"{error}: {self.keys[i]}") from None
        return Pair(self.keys[i], image, {}, {}, ["no caption"])


def holds_images(source):
    """Whether a source is a folder of images and not shards. ValueError when it has both."""
    folder = Path(source)
    if not source or not folder.is_dir():
        return False
    tar = next(folder.glob("*.tar"), None)
    if tar is None:
        return True
    for pattern in ("*.*", "*/*.*"):
        for path in folder.glob(pattern):
            if suffix_of(path) in IMAGE_SUFFIXES:
                raise ValueError(f"{folder} holds {tar.name} and {path.relative_to(folder)}: "
                                 f"shards or images? Give '{folder}/*.tar', or a folder of images")
    return False


# ---- the search ----

def open_images(source):
    """Open a folder of images, or shards: an ImageFolder or data.Pairs."""
    source = on_disk(source)
    return ImageFolder(source) if holds_images(source) else data.Pairs(source)


def query_vector(model, tokenizer, plus=(), like=None, minus=()):
    """The unit vector of a query: [D].

    It is the sum of the unit vectors of the texts `plus` and of the image vector `like`, minus
    those of the texts `minus`, scaled to unit length (KELIP's fourth finding). Raises ValueError
    when the sum is zero.
    """
    query = torch.zeros(model.config["embed_dim"])
    if like is not None:
        query += like
    if plus:
        query += embed_texts(model, tokenizer, list(plus)).sum(dim=0)
    if minus:
        query -= embed_texts(model, tokenizer, list(minus)).sum(dim=0)
    if query.norm() < 1e-6:
        raise ValueError(f"{' + '.join(plus)} - {' - '.join(minus)}: nothing is left to search for")
    return kelip.l2_normalize(query[None])[0]


@torch.no_grad()
def image_vector(model, path):
    """The unit vector of an image file: float32 [D]. Raises ValueError if it cannot be read."""
    preprocess = kelip.preprocess(model.config["image_resolution"])
    image = preprocess(shards.decode(read_file(on_disk(path))))              # [3, size, size]
    image = image[None].to(model.logit_scale.device)
    return model.encode_image(image, l2norm=True)[0].float().cpu()


def nearest(cosines, count=SHOWN):
    """The images with the highest cosines, float32 [M], the highest first: [(cosine, index)]."""
    scores, indices = cosines.topk(min(count, len(cosines)))  # it does not sort all
    return list(zip(scores.tolist(), indices.tolist()))


# ---- duplicates ----

def duplicates(vectors, threshold, progress=True):
    """Groups of images that are nearly the same, the largest first: lists of indices.

    vectors: [M, D], unit vectors. Each image joins the group of the first image with which its
    cosine is `threshold` or more, so groups may be chains. Groups of one image are omitted.
    """
    groups, first_of_group = {}, []
    for chunk in with_progress(vectors.split(CHUNK), len(vectors), "images", progress):  # [n, D]
        start = len(first_of_group)
        scores = chunk @ vectors[:start + len(chunk)].T                      # [n, start + n]
        is_near = scores >= threshold - 1e-6  # equal vectors may have less than 1 by rounding
        is_near[:, start:].fill_diagonal_(True)
        for i, near in enumerate(is_near.byte().argmax(dim=1).tolist(), start):
            first_of_group.append(first_of_group[near] if near < i else i)
            groups.setdefault(first_of_group[i], []).append(i)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def show_duplicates(folder, images, vectors, threshold):
    """Print the groups of duplicates, and write folder/duplicates.html."""
    groups, parts = duplicates(vectors, threshold), []
    for group in groups:
        print(one_line(", ".join(images[i].key for i in group)))
    for group in groups[:SHOWN]:
        cards = []
        for i in group[:PRINTED]:
            cosine = vectors[group[0]] @ vectors[i]
            image = page.image(shards.decode(images[i].image, 2 * SIDE), SIDE)
            cards.append(page.card(image, page.lines(f"{cosine:.3f}", [images[i].key])))
        parts += [page.heading(f"{len(group):,} images"), page.cards(cards)]
    intro = (f"{len(groups):,} groups of images that are nearly the same: each has a cosine of "
             f"{threshold:g} or more with another of its group. The number is the cosine with the "
             f"first. At most {SHOWN} groups are shown, with at most {PRINTED} images of each.")
    page.write(folder / "duplicates.html", "Duplicates", intro, *parts)
    count = sum(map(len, groups))
    print(f"{count:,} of {len(images):,} images are in {len(groups):,} groups of duplicates",
          f"{folder}/duplicates.html", sep="\n")


# ---- the command ----

def main(argv=None):
    """Read the command line, search, print, and write the page."""
    args = parse_arguments(argv)
    words = " ".join(args.words).strip()
    plus = [text for text in [words, *args.plus] if text.strip()]
    minus = [text for text in args.minus if text.strip()]
    if minus and not plus and not args.like:
        raise ValueError("--minus alone: give words or --like IMAGE to subtract from")
    if args.duplicates is not None and (plus or args.like):
        raise ValueError("--duplicates compares all images: leave out words and --like")
    folder = Path(args.out or folder_of(args.model))
    if args.out or folder.is_dir():
        check_writable(folder)
    pairs = open_images(args.images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _, tokenizer = kelip.build_model(args.model, device)
    cache = open_cache(args.model, model)
    if args.duplicates is not None:
        images, rows = embed(model, pairs, cache)
        vectors = kelip.l2_normalize(torch.from_numpy(cache.vectors(rows)))  # [M, D]
        show_duplicates(folder, images, vectors, args.duplicates)
        return

    # The query is fast, so its errors come first, before images are embedded.
    texts = [*plus, *minus]
    if texts or args.like:
        try:
            like = image_vector(model, args.like) if args.like else None
        except ValueError as error:
            raise ValueError(f"--like {args.like}: {error}") from None
        query = query_vector(model, tokenizer, plus, like, minus)
        terms = [args.like, *plus] if args.like else plus
        title = " + ".join(terms) + "".join(f" − {text}" for text in minus)
        queries = [(title, query)]
    else:
        queries = ((text, query_vector(model, tokenizer, [text])) for text in ask())
    # Cosines with images, sums and differences are not those that were calibrated.
    is_text = not args.like and not minus and len(plus) <= 1
    calibration = read_calibration(folder_of(args.model), model) if is_text else None
    images, rows = embed(model, pairs, cache)
    asked = []
    for title, query in queries:
        if isinstance(pairs, ImageFolder) and pairs.has_changed():
            pairs = open_images(args.images)
            images, rows = embed(model, pairs, cache)
        show(folder, images, nearest(cache.cosines(query)[rows]), title, calibration)
        asked.append(title)
    if not asked:
        raise ValueError("nothing to search for: give words, --like IMAGE, or one query per line "
                         "on standard input")
    tokenizer.encode(texts if texts or args.like else asked, model.config["context_length"])
    if tokenizer.cut:
        cut = tokenizer.cut.values()
        print(one_line(shards.format_cut(len(cut), max(cut, key=len))))


def embed(model, pairs, cache):
    """The images that decode, and their rows in the cache. Prints what is skipped."""
    rows, kept, skipped = update(model, pairs, cache)
    if not kept:
        raise ValueError(f"none of the {len(pairs):,} images decodes: "
                         f"{shards.format_counts(skipped)}")
    if skipped:
        print(f"skipped: {shards.format_counts(skipped)}")
    return torch.utils.data.Subset(pairs, kept), rows


def parse_arguments(argv):
    """The command line."""
    parser = ArgumentParser(
        prog="python -m extras.search", description=__doc__.partition("\nFrom top")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL",
        help="what kelip.build_model opens: the folder of a run or of released weights")
    add("words", nargs="*", metavar="WORDS",
        help="what to search for, in English or Korean (default: ask, or read one query per line "
             "from standard input)")
    add("--images", required=True, metavar="FOLDER_OR_SHARDS",
        help="a folder of images, searched with its subfolders, or shards")
    add("--like", metavar="IMAGE", help="search for images like this one")
    add("--plus", action="append", default=[], metavar="WORDS",
        help="add these words to the query; may be repeated")
    add("--minus", action="append", default=[], metavar="WORDS",
        help="subtract these words from the query; may be repeated")
    add("--duplicates", type=number(float, 0, 1), metavar="COSINE",
        help="find images whose cosine with each other is this or more, such as 0.95, and write "
             "duplicates.html")
    add("--out", metavar="FOLDER",
        help="where the pages are written (default: the model's folder)")
    return parser.parse_intermixed_args(argv)  # WORDS may follow flags, as in the first example


def ask():
    """Queries from the terminal until an empty line, or all lines of standard input if piped."""
    if sys.stdin is None:
        return
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    with contextlib.suppress(EOFError):
        while text := input("\nsearch for: ").strip():
            yield text


def show(folder, images, found, title, calibration=None):
    """Write folder/search.html, and print what `nearest` found.

    calibration: from calibrate.read_calibration, if `title` is the text that was searched for.
    """
    cards, lines = [], []
    for rank, (score, i) in enumerate(found):
        pair, p = images[i], probability(calibration, title, score)
        value = f"{score:6.3f}" if p is None else f"{score:6.3f}  p {p:6.1%}"
        names = [pair.key, *itertools.chain(*pair.captions.values())]
        if rank < PRINTED:
            lines.append(f"{value}  {one_line(', '.join(names))}")
        image = page.image(shards.decode(pair.image, 2 * SIDE), SIDE)
        cards.append(page.card(image, page.lines(value.strip(), names)))
    intro = f"The {len(found)} nearest of {len(images):,} images, by cosine."
    if p is not None:
        intro += (" p: the probability that the words describe an image, if they describe 1 in "
                  f"{1 / calibration['prior']:,.0f} images.")
    page.write(folder / "search.html", title, intro, page.cards(cards))
    print(*lines, f"{folder}/search.html", sep="\n", flush=True)


if __name__ == "__main__":
    run_command(main, "vectors are cached; the same command continues from there")
