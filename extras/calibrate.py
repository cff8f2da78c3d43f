"""Calibrate cosines: the probability that a text describes an image.

    python -m extras.calibrate runs/clip                          # on the demo's test
    python -m extras.calibrate runs/mine --test pairs/test --prior 0.01

For each language, fits

    p(match) = sigmoid(a * cosine + b)

on half of the held-out pairs: every image with its own captions (right pairs) and with those of all
other images (wrong pairs). Right pairs are weighted as if they were 1 in 1,000, or --prior. The
hash of an image's key decides in which half it is. On the other half, measures the expected
calibration error (Guo et al., arXiv 1706.04599) of the cosine itself, read as a probability, and of
p. Also finds the lowest cosines above which 90, 95 and 99 % of the pairs are right.

Writes calibration.json into the model's folder, from where extras.search and extras.convert take
it, and a page, calibration.html, with the histograms of cosines.

From top to bottom: pairs, the fit, its quality, calibration.json, the page, the command.

Not included: calibration of zero-shot classification, where one of the classes is right.
"""

import argparse
import json
import math
import os
from pathlib import Path

import regex
import torch
import torch.nn.functional as F

import kelip
import page
from classes import open_set
from command import ArgumentParser, number, run_command
from evaluate import LANGUAGE_NAMES, Embedded, folder_of
from extras.features import digest, model_digest
from tokenizer import read_json

PRIOR = 1e-3
PRECISIONS = (0.90, 0.95, 0.99)
BINS = 15           # of p, as in Guo et al.
FEWEST = 20         # right pairs that a half needs
IMAGES = 2048       # of each half, at most, since every image makes a pair with every caption
WRONG = 1 << 22     # wrong pairs of each half, at most
BIN = 0.02          # width of a bar of the histograms
FILE = "calibration.json"


# ---- pairs ----

def halves(keys):
    """Split images by the hash of their keys: two int64 tensors of at most IMAGES indices."""
    # The hash also shuffles them.
    order = sorted((digest(key.encode(errors="replace")), i) for i, key in enumerate(keys))
    return [torch.tensor([i for hashed, i in order if int(hashed[-1], 16) % 2 == half][:IMAGES],
                         dtype=torch.int64) for half in (0, 1)]


def cosines(embedded, language, images):
    """The cosines of the right pairs [R] and of the wrong pairs [W] of some images and captions.

    embedded: an evaluate.Embedded. images: int64 [M], indices. Captions are those of these images.
    Equal captions count once, and are right for the images of all of them.
    """
    owner, equal_to = embedded.owner[language], embedded.equal_to[language]
    if equal_to is None:
        equal_to = torch.arange(len(owner))
    position = torch.full((len(embedded.images),), -1)
    position[images] = torch.arange(len(images))
    column = position[owner]                                                 # [P], -1 for others
    own = column >= 0
    first, row = equal_to[own].unique(return_inverse=True)                   # [T], [P of own]
    scores = embedded.texts[language][first] @ embedded.images[images].T     # [T, M]
    is_right = torch.zeros_like(scores, dtype=torch.bool)
    is_right[row, column[own]] = True
    wrong = scores[~is_right]
    return scores[is_right], wrong[::max(1, kelip.ceil_div(len(wrong), WRONG))]


# ---- the fit ----

def fit(right, wrong, prior):
    """The a and b of p = sigmoid(a * cosine + b): logistic regression by Newton's method.

    right [R], wrong [W]: cosines. They minimize the cross-entropy between p and what is true, over
    all pairs, in which right ones have the weight `prior` together.
    """
    x, y, weight = weighted_pairs(right, wrong, prior)                       # [R + W]
    mean, std = x.mean(), x.std().clamp(min=1e-9)
    X = torch.stack([(x - mean) / std, torch.ones_like(x)], dim=1)           # [R + W, 2]
    # A weak prior on the slope, of standard deviation 100. Without it, the slope would be infinite
    # when all right pairs have higher cosines than all wrong pairs.
    penalty = torch.tensor([1e-4 * prior / len(right), 0], dtype=x.dtype)

    def loss(theta):
        z = X @ theta
        return (weight * (F.softplus(z) - y * z)).sum() + (penalty * theta ** 2).sum() / 2

    theta = torch.tensor([0, math.log(prior / (1 - prior))], dtype=x.dtype)
    for _ in range(100):
        p = torch.sigmoid(X @ theta)
        gradient = X.T @ (weight * (p - y)) + penalty * theta                # [2]
        curvature = (X.T * (weight * p * (1 - p))) @ X + penalty.diag()      # [2, 2]
        step = torch.linalg.solve(curvature, gradient)
        if step.abs().max() < 1e-8:
            break
        while loss(theta - step) > loss(theta):  # far from the minimum, a step may be too long
            step = step / 2
        theta = theta - step
    slope, intercept = theta.tolist()
    return slope / std.item(), intercept - slope * (mean / std).item()


def weighted_pairs(right, wrong, prior):
    """The values of all pairs, 1 for right ones and 0 for wrong ones, and weights of sum 1.

    All are float64 [R + W].
    """
    x = torch.cat([right, wrong]).double()
    y = torch.cat([torch.ones(len(right)), torch.zeros(len(wrong))]).double()
    weight = y * (prior / len(right)) + (1 - y) * ((1 - prior) / len(wrong))
    return x, y, weight


# ---- its quality ----

def reliability(right, wrong, prior):
    """How often pairs of about the same p are right: for each of BINS, (weight, mean p, right).

    right [R], wrong [W]: p of the pairs. Returns float64 [bins, 3] of the bins that hold a pair.
    """
    p, y, weight = weighted_pairs(right, wrong, prior)
    bins = (p * BINS).long().clamp(max=BINS - 1)
    total, mean, hits = (torch.bincount(bins, weight * t, BINS) for t in (torch.ones_like(p), p, y))
    held = total > 0
    return torch.stack([total, mean / total, hits / total], dim=1)[held]


def calibration_error(right, wrong, prior):
    """The expected calibration error of p: the mean over pairs of |mean p - right| of their bin."""
    weight, mean, hits = reliability(right, wrong, prior).unbind(dim=1)
    return (weight * (mean - hits).abs()).sum().item()


def precision_at(right, wrong, prior, cosines):
    """Above each cosine [T], what fraction of pairs is right, and of right pairs is there: 2 x [T].

    One more wrong pair counts than there is: if no wrong pair of a sample has such a cosine, some
    of all pairs may.
    """
    right, wrong = right.sort().values, wrong.sort().values
    recall = 1 - torch.searchsorted(right, cosines) / len(right)
    false = (len(wrong) - torch.searchsorted(wrong, cosines) + 1) / (len(wrong) + 1)
    return prior * recall / (prior * recall + (1 - prior) * false), recall


def threshold(right, wrong, prior, precision):
    """The lowest cosine of a right pair above which this precision is reached; None if none is."""
    found, _ = precision_at(right, wrong, prior, right)
    reached = right[found >= precision]
    return reached.min().item() if len(reached) else None


def calibrate(pairs_to_fit, others, prior):
    """What calibration.json holds of a language. Each argument is (right [R], wrong [W])."""
    a, b = fit(*pairs_to_fit, prior)
    probabilities = [torch.sigmoid(a * t.double() + b) for t in others]
    thresholds = {}
    for precision in PRECISIONS:
        cosine, measured = threshold(*pairs_to_fit, prior, precision), None
        if cosine is not None:
            found, recall = precision_at(*others, prior, torch.tensor([cosine]))
            measured = {"cosine": cosine, "p": 1 / (1 + math.exp(-a * cosine - b)),
                        "precision": found.item(), "recall": recall.item()}
        thresholds[f"{precision:.0%}"] = measured
    right, wrong = others
    return {"a": a, "b": b, "right": len(right), "wrong": len(wrong),
            "mean_right": right.mean().item(), "mean_wrong": wrong.mean().item(),
            "error_before": calibration_error(*(t.clamp(0, 1) for t in others), prior),
            "error_after": calibration_error(*probabilities, prior), "thresholds": thresholds}


# ---- calibration.json ----

def read_calibration(folder, model):
    """The calibration.json in a model's folder, or None if there is none for these weights.

    Raises ValueError when extras.calibrate did not write it.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        is_of_model = content["model"] == model_digest(model)
        is_good = 0 < content["prior"] < 1 and all(
            math.isfinite(found["a"] + found["b"]) for found in content["languages"].values())
        if not is_good:
            raise ValueError
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise ValueError(f"{path}: not as extras.calibrate writes it: delete it, or calibrate "
                         "again") from None
    if not is_of_model:
        print(f"{path}: is of other weights and not used; python -m extras.calibrate makes it anew")
    return content if is_of_model else None


def language_of(text):
    """"ko" for a text with Hangul, else "en"."""
    return "ko" if regex.search(r"\p{Hangul}", text) else "en"


def probability(calibration, text, cosine):
    """p(match) of a text and an image, or None if the language of the text is not calibrated.

    calibration: from read_calibration.
    """
    languages = calibration["languages"] if calibration else {}
    language = languages.get(language_of(text), languages.get(""))
    if language is None:
        return None
    return torch.tensor(language["a"] * cosine + language["b"]).sigmoid().item()


# ---- the page ----

def write_page(folder, calibration, pairs):
    """Write calibration.html. pairs: {language: (right, wrong)}, the cosines of the other half."""
    prior, languages = calibration["prior"], calibration["languages"]
    rows, cuts, parts = [], [], []
    for language, found in languages.items():
        name = LANGUAGE_NAMES.get(language, language)
        right, wrong = pairs[language]
        rows.append([name, f"{found['a']:.1f}", f"{found['b']:.1f}",
                     f"{100 * found['error_before']:.3f}", f"{100 * found['error_after']:.3f}",
                     f"{found['right']:,}", f"{found['mean_right']:.3f}",
                     f"{found['wrong']:,}", f"{found['mean_wrong']:.3f}"])
        for precision, cut in found["thresholds"].items():
            cells = ["not reached", "", "", ""]
            if cut:
                cells = [f"{cut['cosine']:.3f}", f"{100 * cut['p']:.0f}",
                         f"{100 * cut['precision']:.1f}", f"{100 * cut['recall']:.1f}"]
            cuts.append([f"{name}, {precision}", *cells])
        low = BIN * math.floor(min(right.min().item(), wrong.min().item()) / BIN)
        series = {"right pairs": histogram(right, low), "wrong pairs": histogram(wrong, low)}
        p = [torch.sigmoid(found["a"] * t.double() + found["b"]) for t in (right, wrong)]
        points = reliability(*p, prior)[:, 1:].tolist()
        parts += [
            page.plot(f"{name}: % of the pairs at each cosine", series, unit="cosine",
                      start=round(low, 2)),
            page.plot(f"{name}: how often pairs of about the same p are right",
                      {"ideal": [(0, 0), (1, 1)], "measured": points}, dots=True, unit="p")]
    page.write(
        folder / "calibration.html", f"{folder.resolve().name}: what a cosine means",
        "p = sigmoid(a cosine + b) is the probability that a text describes an image, if 1 in "
        f"{1 / prior:,.0f} pairs matches. It was fitted on half of "
        f"{', '.join(calibration['test'])}, and all numbers are those of the other half.",
        page.table(["", "a", "b", "calibration error of the cosine, %", "of p, %", "right pairs",
                    "mean cosine", "wrong pairs", "mean cosine"], rows),
        page.heading("Thresholds", "The lowest cosine above which pairs are right with this "
                     "precision in the half that was fitted, and what it finds in the other half."),
        page.table(["precision", "cosine", "p, %", "precision there, %",
                    "right pairs found there, %"], cuts), *parts)


def histogram(cosines, low):
    """The bars of a histogram, in % of all, from `low`: [(x, y)], two points for each bar."""
    bars = ((cosines - low) / BIN).long().clamp(min=0).bincount() * (100 / len(cosines))
    return [(round(low + BIN * (i + side), 2), bar)
            for i, bar in enumerate(bars.tolist()) for side in (0, 1)]


# ---- the command ----

def main(argv=None):
    """Calibrate a model, print the numbers, write calibration.json and the page."""
    parser = ArgumentParser(
        prog="python -m extras.calibrate", description=__doc__.partition("\nFrom top")[0],
        fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="RUN", help="the folder of a run or of released weights")
    add("--test", nargs="+", default=["data/emoji/test-*.tar"], metavar="SET",
        help="held-out pairs: shards with captions, or a folder in CLIP_benchmark's layout "
             "(default: the demo's, data/emoji/test-*.tar)")
    add("--prior", type=number(float, 1e-9, 0.999), default=PRIOR, metavar="P",
        help="the fraction of all pairs of an image and a text that match (default: 0.001)")
    args = parser.parse_args(argv)
    folder = folder_of(args.model)
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise OSError(f"{folder}: nothing can be written there; copy the model to another folder")
    pairs, _ = open_set(args.test, None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _, tokenizer = kelip.build_model(args.model, device)
    embedded = Embedded(model, pairs, tokenizer)
    to_fit, others = halves([pair.key for pair in embedded.pairs])

    calibration = {"model": model_digest(model), "prior": args.prior, "test": args.test,
                   "languages": {}}
    measured = {}
    for language in sorted(embedded.texts):
        parts = [cosines(embedded, language, images) for images in (to_fit, others)]
        if not all(t.isfinite().all() for part in parts for t in part):
            raise ValueError(f"{args.model}: its vectors of images or texts are not finite")
        name = LANGUAGE_NAMES.get(language, language)
        count = min(len(t) for part in parts for t in part)
        if count < FEWEST:
            print(f"{name}: skipped: a half of the test has {count} pairs, and {FEWEST} are needed")
            continue
        found = calibrate(*parts, args.prior)
        calibration["languages"][language], measured[language] = found, parts[1]
        print_language(name, found)
    if not measured:
        raise ValueError(f"{' '.join(args.test)}: too few captions to calibrate: each half needs "
                         f"{FEWEST} of a language")
    page.write_text(folder / FILE, json.dumps(calibration, indent=1, ensure_ascii=False))
    write_page(folder, calibration, measured)
    print(f"{folder}/{FILE}, {folder}/calibration.html")


def print_language(name, found):
    """Print what was found for a language."""
    print(f"{name}: p = sigmoid({found['a']:.2f} cosine {found['b']:+.2f})")
    print(f"  mean cosine of right pairs {found['mean_right']:.3f}, of wrong pairs "
          f"{found['mean_wrong']:.3f}")
    print(f"  expected calibration error {100 * found['error_before']:.3f} % before, "
          f"{100 * found['error_after']:.3f} % after")
    for precision, cut in found["thresholds"].items():
        line = "not reached"
        if cut:
            line = (f"cosine {cut['cosine']:.3f}, p {cut['p']:.0%}; on the other half: precision "
                    f"{cut['precision']:.1%}, {cut['recall']:.1%} of right pairs")
        print(f"  precision {precision}: {line}")


if __name__ == "__main__":
    run_command(main)
