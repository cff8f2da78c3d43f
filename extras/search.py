"""Search in pictures: by words in either language, by a picture, or by a picture with something taken away and added.

    python evaluate.py search --images PHOTOS "빨간 사과"
    python evaluate.py search --images 'data/emoji/test-*.tar' --like apple.png
    python evaluate.py search --images PHOTOS --like king.png --minus man --plus woman
    python evaluate.py search --images PHOTOS             asks what to look for, until nothing is said

Prints the ten best and writes a page, search.html, with forty. Pictures are embedded once (features.py): the next search
only looks for new ones, and one that was moved or renamed is not new.

What it leaves out: an approximate index; a million pictures are one product with a vector.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import torch

import data
import kelip
import page
import shards
from extras.features import embed_images, embed_texts, folder_of, open_store
from classes import Folder, holds_pictures

SHOWN, PRINTED = 40, 10         # pictures on the page and on the terminal
SIDE = 112                       # of a picture on the page, in its pixels


def query_vector(model, tokenizer, words=(), like=None, minus=()):
    """The unit vector of a query, [D]: the sum of the unit vectors of words and of a picture (like, its path), less those
    of minus (KELIP's fourth finding). Raises OSError or ValueError where the picture cannot be read, or nothing is left."""
    vector = torch.zeros(model.config["embed_dim"])
    if like:
        try:
            image = kelip.preprocess(model.config["image_resolution"])(shards.decode(Path(like).read_bytes()))
        except ValueError as error:
            raise ValueError(f"--like {like}: {error}") from None
        with torch.no_grad():
            vector += model.encode_image(image[None].to(model.logit_scale.device), l2norm=True)[0].float().cpu()
    for texts, sign in ((words, 1), (minus, -1)):
        if texts:
            vector += sign * embed_texts(model, tokenizer, list(texts)).sum(0)
    if vector.norm() < 1e-6:
        raise ValueError(f"{' '.join(words)} less {' '.join(minus)}: nothing is left to look for")
    return kelip.unit(vector[None])[0]


def search(vectors, query, count=SHOWN):
    """The pictures nearest to a query: [(score, row)], the best first. vectors [M, D], query [D], unit vectors."""
    scores, rows = (vectors @ query).topk(min(count, len(vectors)))
    return list(zip(scores.tolist(), rows.tolist()))


def main(argv=None):
    """Search, print, and write the page."""
    parser = argparse.ArgumentParser(prog="evaluate.py search", description=__doc__.split("\nPrints")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("words", nargs="?", help="what to look for, in English or Korean (default: ask, or read a query a line)")
    add("--images", required=True, metavar="FOLDER", help="a folder of pictures, with all folders under it, or shards")
    add("--model", default="runs/clip", help="what kelip.build_model opens (default: runs/clip)")
    add("--like", metavar="PICTURE", help="look for what is like this picture")
    add("--plus", action="append", default=[], metavar="WORDS", help="and like these words; may stand several times")
    add("--minus", action="append", default=[], metavar="WORDS", help="and unlike these; likewise")
    add("--out", metavar="FOLDER", help="where search.html goes (default: the model's folder)")
    args = parser.parse_args(argv)
    words, args.minus = ([text for text in texts if text.strip()] for texts in ([args.words or ""] + args.plus, args.minus))
    if args.minus and not words and not args.like:
        raise ValueError("--minus: from what? give words, or --like PICTURE")
    pairs = Folder(args.images) if holds_pictures(args.images) else data.Pairs(args.images)
    model, _, tokenizer = kelip.build_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(args.out or folder_of(args.model))
    folder.mkdir(parents=True, exist_ok=True)
    signed = [f"+ {text}" for text in [args.like] * bool(args.like) + words] + [f"− {text}" for text in args.minus]
    if signed:
        queries = [(" ".join(signed).removeprefix("+ "), query_vector(model, tokenizer, words, args.like, args.minus))]
    else:
        queries = ((text, query_vector(model, tokenizer, [text])) for text in ask())
    vectors, kept, skipped = embed_images(model, pairs, open_store(args.model, model))
    if not kept:
        raise ValueError(f"none of the {len(pairs)} pictures decodes: {dict(skipped)}")
    if skipped:
        print(f"skipped: {dict(skipped)}")
    pictures, asked = torch.utils.data.Subset(pairs, kept), 0
    for asked, (title, query) in enumerate(queries, 1):
        show(folder, pictures, search(vectors, query), title)
    if not asked:
        raise ValueError('nothing to look for: give words, "빨간 사과", or --like PICTURE, or a line for each query')


def ask():
    """What a terminal answers, until that is nothing; or the lines that are piped in, blank ones aside."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin or () if line.strip())
        return
    with contextlib.suppress(EOFError):
        while text := input("\nlook for: ").strip():
            yield text


def show(folder, pictures, found, title):
    """Print what search found, and write folder/search.html."""
    cards = []
    for rank, (score, row) in enumerate(found):
        pair = pictures[row]
        name = [pair.key, *pair.captions.values()]
        if rank < PRINTED:
            print(f"{score:6.3f}  {', '.join(name)}")
        picture = page.picture(shards.decode(pair.image, 2 * SIDE), SIDE)
        cards.append(page.card(picture, page.lines(f"{score:.3f}", name)))
    page.write(folder / "search.html", title, f"The {len(cards)} nearest of {len(pictures):,} pictures, by cosine.",
               page.cards(cards))
    print(f"{folder}/search.html", flush=True)
