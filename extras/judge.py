"""Measure images from text: does a second model recognize what the first one drew?

    python -m extras.generate train
    python train_clip.py --seed 1 --out runs/judge
    python -m extras.judge runs/clip runs/judge

For names of test images in both languages, runs/clip guides the denoiser of extras/generate.py. The
judge, another model that took no part, then looks for the name of each image among all names.

Claim: the model guides a generator in both languages alike. It is refuted if

    in English or in Korean, the judge does not find the name at first place more often than if the
    text was that of another name;
    or it finds the names of one language more often than those of the other.

More often means: with every seed, and by a mean difference beyond its standard deviation over the
seeds. For comparison, the judge also names test drawings (its ceiling), in full and at the size of
the samples, samples without a text (its floor), and images optimized directly. Copies would be
nearer to a training image, by pixels, than test drawings are: the table has both distances.

The last table asks whether the images of the two languages differ most for the names on which the
languages disagree most: by the test images that are nearest to the name in each, as both models see
them (finding `culture` of extras/findings.py).

Images are saved as they are drawn. A command that was stopped continues from there.

Not included: people's judgment, and measures of quality such as FID.
"""

import argparse
import functools
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import data
import demo
import evaluate
import kelip
import page
import shards
from command import ArgumentParser, number, run_command
from extras import generate
from extras.findings import (
    LANGUAGES,
    NEAREST,
    SKIN_TONES,
    agreements,
    code_points,
    concept,
    is_flag,
    rank_correlation,
    show,
    verdict,
)
from tokenizer import atomic_write, read_json

BATCH = 32  # images to draw at a time
ANOTHER = "guided by another name"
CLAIM = "The model guides a generator in both languages alike"


class Names(NamedTuple):
    """The names to draw, and what the models know of them."""
    pairs: list       # their test pairs
    texts: dict       # {language: the vectors by which the model guides, [N, D]}
    candidates: dict  # {language: the judge's vectors of all names, [P, D]}
    own: dict         # {language: the number of each name among the candidates, int64 [N]}
    disagreement: torch.Tensor  # of the languages on each name, [N]


# ---- names ----

def choose(pairs, trained, count):
    """The indices of up to `count` pairs, evenly spaced among those that can be compared.

    These have a name in both languages that training images have, no skin tone and no flag, and no
    two show the same. trained: the English names of the training images.
    """
    first = {}  # what a pair shows -> the first such pair
    for i, pair in enumerate(pairs):
        if (pair.captions.keys() >= set(LANGUAGES) and pair.captions["en"][0] in trained
                and not is_flag(pair.key) and not SKIN_TONES & set(code_points(pair.key))):
            first.setdefault(concept(pair), i)
    if not first:
        raise ValueError("--test: has no names in English and Korean that training images have")
    spaced = np.linspace(0, len(first) - 1, min(count, len(first))).round().astype(int)
    return np.array([*first.values()])[spaced].tolist()


def open_names(args, guide, judge, sources):
    """Names. guide, judge: what kelip.build_model returns. sources: the denoiser's --data."""
    trained = data.Pairs(sources)
    trained = {text for i in range(len(trained)) for text in trained[i].captions.get("en", [])}
    test, candidates = data.Pairs(args.test), evaluate.read_candidates(args.test)
    by_judge, by_guide = (evaluate.Embedded(model, test, tokenizer, candidates)
                          for model, _, tokenizer in (judge, guide))
    chosen = choose(by_judge.pairs, trained, args.names)
    own = {x: torch.tensor([by_judge.captions[x].index(by_judge.pairs[i].captions[x][0])
                            for i in chosen]) for x in LANGUAGES}
    # As in the finding culture, with these two models as its two seeds.
    nearest = [{x: (by.texts[x][own[x]] @ by.images.T).topk(min(NEAREST, len(by.images))).indices
                for x in LANGUAGES} for by in (by_guide, by_judge)]
    same, across, *_ = agreements(nearest)                                   # [1, N] each
    return Names([by_judge.pairs[i] for i in chosen],
                 {x: by_guide.texts[x][own[x]] for x in LANGUAGES}, by_judge.texts, own,
                 (same - across)[0])


# ---- images ----

def draw(kind, model, denoiser, texts, seeds, guidance):
    """Images of one kind, [N, 3, S, S], for texts [N, D] and seeds [N]. The kinds: see draw_all."""
    if kind == "unguided":
        return generate.sample(denoiser, seeds)[-1]
    device, side = model.logit_scale.device, model.config["image_resolution"]
    guide = functools.partial(generate.distance, model, texts.to(device), seeds)
    if kind == "guided":
        return generate.sample(denoiser, seeds, guide, guidance)[-1]
    return generate.optimize(side, seeds, guide, device)[-1]


def draw_all(args, model, denoiser, texts):
    """Draw all images, or read those that are drawn already.

    texts: that of Names. Returns {(kind, language): uint8 [seeds, N, S, S, 3]}, where kind is
    "guided", "direct" or "unguided", whose language is "".
    """
    kinds = [("unguided", ""), *itertools.product(args.kinds, LANGUAGES)]
    n, drawn = len(texts["en"]), {}
    for (kind, language), seed in itertools.product(kinds, range(args.seeds)):
        path = args.out / f"{'-'.join(filter(None, [kind, language]))}-{seed}.npy"
        if not path.exists():
            images, noise = [], torch.arange(n) * args.seeds + seed  # other noise for each name
            for part in evaluate.with_progress(torch.arange(n).split(BATCH), n, path.stem, True):
                vectors = texts[language or "en"][part]  # "unguided" does not use them
                images += draw(kind, model, denoiser, vectors, noise[part], args.guidance)
            with atomic_write(path) as file:
                np.save(file, np.stack([generate.to_pil(image) for image in images]))
        drawn.setdefault((kind, language), []).append(np.load(path))
    return drawn


# ---- numbers ----

def embed(opened, images):
    """The unit vectors of N images, PIL or arrays, by an opened model: float32 [N, D]."""
    model, preprocess, _ = opened
    encode = functools.partial(model.encode_image, l2norm=True)
    images = torch.stack([preprocess(Image.fromarray(np.asarray(image))) for image in images])
    return torch.cat([evaluate.encode_batch(encode, batch.to(model.logit_scale.device))
                      for batch in images.split(evaluate.BATCH)])


def found_at(vectors, texts, own):
    """The fraction of vectors [N, D] whose own text is the nearest of [P, D], or one of five.

    own: int64 [N]. A text that ties with the own one counts as nearer.
    """
    scores = vectors @ texts.T                                               # [N, P]
    rank = (scores >= scores.gather(1, own[:, None])).sum(dim=1)             # from 1
    return [(rank <= k).float().mean().item() for k in (1, 5)]


def gap(one, other):
    """How much more alike the images of a name are in a group than across two groups: [N].

    one, other: unit vectors [seeds, N, D]. It is the mean cosine of two seeds in one group less
    that of two seeds in different groups.
    """
    pairs = list(itertools.permutations(range(len(one)), 2))
    within = sum((x[a] * x[b]).sum(dim=-1) for x in (one, other) for a, b in pairs) / 2
    return (within - sum((one[a] * other[b]).sum(dim=-1) for a, b in pairs)) / len(pairs)


def recognition(names, drawn, judge, drawings):
    """The first table: its rows, and {(title, language): float [seeds, 2]} of found_at.

    drawings: the training images, [M, 3, S, S].
    """
    size, N = drawings.shape[-1], len(names.pairs)
    full = [shards.decode(pair.image) for pair in names.pairs]
    small = [image.resize((size, size), Image.BICUBIC) for image in full]
    shown = {"test drawings": full, f"test drawings at {size} pixels": small}
    shown = {title: {x: [images] for x in LANGUAGES} for title, images in shown.items()}
    for kind in dict.fromkeys(kind for kind, _ in drawn):
        shown[kind] = {x: drawn.get((kind, x), drawn.get((kind, ""))) for x in LANGUAGES}
    shown[ANOTHER] = shown["guided"]
    to_tensor = kelip.preprocess(size)
    rows, found, threshold = [], {}, None
    for title, images in shown.items():
        row, far = [title], []
        for x in LANGUAGES:
            own = names.own[x].roll(N // 2) if title == ANOTHER else names.own[x]
            found[title, x] = np.array([found_at(embed(judge, of_seed), names.candidates[x], own)
                                        for of_seed in images[x]])           # [seeds, 2]
            row += map(show, found[title, x].T)
            for of_seed in images[x]:
                pixels = torch.stack([to_tensor(Image.fromarray(np.asarray(image)))
                                      for image in of_seed])
                far.append(generate.nearest(pixels, drawings)[1])
        far = torch.cat(far)
        threshold = far.quantile(0.05) if threshold is None else threshold
        close = 100 * (far < threshold).float().mean()
        rows.append([*row, f"{far.median():.3f}", f"{close:.1f}"])
    return rows, found


def culture(names, images, judge):
    """The second table, of the gap between languages: its row, and the gap of each name, [N].

    images: {language: uint8 [seeds, N, S, S, 3]}, the guided ones.
    """
    one, other = (torch.stack([embed(judge, of_seed) for of_seed in images[x]]) for x in LANGUAGES)
    gaps = gap(one, other)
    order = names.disagreement.argsort(descending=True, stable=True)
    quarter = kelip.ceil_div(len(order), 4)
    row = [f"{part.mean():.3f} ± {part.std(correction=0) / (len(part) - 1) ** 0.5:.3f}"
           for part in (gaps, gaps[order[:quarter]], gaps[order[quarter:]])]
    return [*row, f"{rank_correlation(names.disagreement, gaps):.2f}"], gaps


# ---- the command ----

def main(argv=None):
    """Draw, judge, print the tables, and write them with examples."""
    args = parse_arguments(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    guide, judge = (kelip.build_model(name, device) for name in (args.model, args.judge))
    guide[0].requires_grad_(False)
    denoiser, sources = generate.open_denoiser(args.denoiser, device)
    evaluate.check_writable(args.out)
    settings = {key: str(getattr(args, key)) for key in ("test", "names", "seeds", "guidance")}
    modules = {"model": guide[0], "denoiser": denoiser, "judge": judge[0]}
    for key, module in modules.items():  # this sum tells weights apart
        settings[key] = f"{sum(p.double().abs().sum() for p in module.parameters()):.3f}"
    if settings.pop("judge") == settings["model"]:
        raise ValueError(f"{args.judge}: the model that guides cannot be the judge, too; train one "
                         "with another --seed")
    path = args.out / "settings.json"
    begun = read_json(path) if path.exists() else settings
    for key in settings:
        if begun.get(key) != settings[key]:
            raise ValueError(f"{args.out}: was begun with {key} {begun.get(key)}, and not "
                             f"{settings[key]}: name another --out")
    names = open_names(args, guide, judge, sources)
    page.write_text(path, json.dumps(settings))

    drawn = draw_all(args, guide[0], denoiser, names.texts)
    drawings = generate.all_images(sources, denoiser.visual.resolution)
    rows, found = recognition(names, drawn, judge, drawings)
    first = {key: of_seeds[:, 0] for key, of_seeds in found.items()}         # [seeds]
    verdicts = [verdict(f"{evaluate.LANGUAGE_NAMES[x]}, 1st place: guided vs {ANOTHER}",
                        first["guided", x] - first[ANOTHER, x]) for x in LANGUAGES]
    difference = first["guided", "en"] - first["guided", "ko"]
    verdicts += [verdict("1st place: English vs Korean", difference),
                 verdict("1st place: Korean vs English", -difference)]
    held = [part["held"] for part in verdicts]
    claim = ("not decided: fewer than three seeds" if None in held else
             "not refuted" if held == [True, True, False, False] else "refuted")
    images = {x: drawn["guided", x] for x in LANGUAGES}
    row, gaps = culture(names, images, judge)
    tables = [
        (["found by the judge, %", "English, 1st place", "top 5", "Korean, 1st place", "top 5",
          "nearest training image", "nearer than most, %"], rows),
        (["gap between languages, all names", "quarter of most disagreement", "other names",
          "rank correlation"], [row])]

    numbers = {"names": {x: [pair.captions[x][0] for pair in names.pairs] for x in LANGUAGES},
               "disagreement": names.disagreement.tolist(), "gap": gaps.tolist(), "claim": claim,
               "verdicts": verdicts,
               "found": {" ".join(key): of_seeds.tolist() for key, of_seeds in found.items()}}
    page.write_text(args.out / "judge.json", json.dumps(numbers, indent=1, ensure_ascii=False))
    cards = []
    for i in names.disagreement.argsort(descending=True).tolist():
        shown = page.row([page.image(shards.decode(names.pairs[i].image), 44)])
        for x in LANGUAGES:
            shown += page.names(names.pairs[i].captions[x][0], [], x)
            shown += page.row(page.image(Image.fromarray(of_seed[i]), 44) for of_seed in images[x])
        cards.append(page.card("", shown))
    page.write(args.out / "judge.html", "Images from text, judged", f"Guide: {args.model}.",
               *(page.table(*table) for table in tables),
               page.heading(f"{CLAIM}: {claim}"),
               page.names("", [(part["words"], part["held"]) for part in verdicts]),
               page.heading("All names", "First those on which the languages disagree most."),
               page.cards(cards))
    for header, cells in tables:
        print("", *(" | ".join(row) for row in [header, *cells]), sep="\n")
    print("", *(part["words"] for part in verdicts), f"{CLAIM}: {claim}",
          f"{args.out}/judge.html", sep="\n")


def parse_arguments(argv=None):
    """The command line."""
    parser = ArgumentParser(
        prog="python -m extras.judge", description=__doc__.partition("\nNot included")[0],
        fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="the model that guides: a run or released weights")
    add("judge", metavar="JUDGE", help="the model that names the images: a run of another seed")
    add("--denoiser", default="runs/generate", metavar="FOLDER",
        help="a run of `python -m extras.generate train` (default: runs/generate)")
    add("--test", nargs="+", default=[f"{demo.DEMO}/test-*.tar"], metavar="SHARDS",
        help="pairs that were not trained on, with names in both languages (default: the demo's)")
    add("--names", type=number(int, 2, 1 << 20), default=100, metavar="N",
        help="names to draw, at most (default: 100)")
    add("--seeds", type=number(int, 2, 1 << 20), default=4, metavar="N",
        help="images of each name in each language (default: 4)")
    add("--guidance", type=number(float, 0, 1), default=generate.GUIDANCE, metavar="X",
        help="as of `extras.generate sample` (default: %(default)g)")
    add("--kinds", nargs="+", choices=["guided", "direct"], default=["guided", "direct"],
        help="guided by the model along a denoiser's steps; direct, without it (default: both)")
    add("--out", type=Path, default=Path("runs/judged"), metavar="FOLDER",
        help="images, numbers and a page (default: runs/judged)")
    args = parser.parse_args(argv)
    args.kinds = dict.fromkeys(["guided", *args.kinds])
    return args


if __name__ == "__main__":
    run_command(main, "images are saved; the same command continues", output="log")
