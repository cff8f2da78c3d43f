"""What a trained model knows: retrieval, zero-shot classification, and a page that shows both.

    python evaluate.py runs/clip                                    on the demo's unseen style of drawing
    python evaluate.py runs/clip --test 'coco-val/*.tar'            retrieval on any captioned shards
    python evaluate.py runs/clip --test cars/ --classes stanfordcars   classification, class names from prompts.json

Retrieval finds the captions of a picture among all captions, and the picture of a caption among all pictures, in each
language by itself. Zero-shot classification makes a class's vector out of prompts ("a photo of a {}") and takes the class
nearest to the picture (CLIP, arXiv 2103.00020, section 3.1). Both run in float32, whatever training used.

What it leaves out: fitting anything to the pictures that it measures on.
"""

import argparse
import collections
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import data
import kelip
import page
import shards

KS = (1, 5, 10)
BATCH = 256
NAMES = {"en": "English", "ko": "Korean", "": "captions"}
WAYS = {"image_to_text": "image to text", "text_to_image": "text to image"}


# ------------------------------------------------------------------------------------------------------ embeddings

class Embedded:
    """Pairs as a model sees them.

    images: [M, D], unit vectors of the pictures that decode. texts: {language: [P, D]}; owner: {language: int64 [P]},
    the picture of each text, -1 for a candidate that has none; captions: {language: list of P str}. pairs: the M pairs
    that they are of. skipped: what did not decode, by cause.
    """

    def __init__(self, model, pairs, tokenizer, candidates=None, progress=True):
        self.pairs, self.skipped = [], collections.Counter()
        self.captions, owner = collections.defaultdict(list), collections.defaultdict(list)
        self.images = torch.cat(list(self._embed_images(model, pairs, progress)) or [torch.empty(0, 1)])
        if not self.pairs:
            raise ValueError(f"none of the {len(pairs)} pictures decodes: {dict(self.skipped)}")
        for i, pair in enumerate(self.pairs):
            for language, text in pair.captions.items():
                self.captions[language].append(text)
                owner[language].append(i)
        for language, texts in (candidates or {}).items():
            more = [text for text in dict.fromkeys(texts) if text not in set(self.captions[language])]
            self.captions[language] += more
            owner[language] += [-1] * len(more)
        self.owner = {language: torch.tensor(indices) for language, indices in owner.items()}
        self.texts = {language: embed_texts(model, tokenizer, texts, progress)
                      for language, texts in self.captions.items()}

    def _embed_images(self, model, pairs, progress):
        preprocess = kelip.preprocess(model.config["image_resolution"])
        batch = []
        for i in tqdm(range(len(pairs)), desc="pictures", disable=not progress, leave=False, file=sys.stdout):
            pair = pairs[i]
            try:
                batch.append(preprocess(shards.decode(pair.image)))
                self.pairs.append(pair)
            except ValueError as error:
                self.skipped[str(error).partition(":")[0]] += 1
            if batch and (len(batch) == BATCH or i == len(pairs) - 1):
                yield _encode(model, model.encode_image, torch.stack(batch))
                batch = []
        if batch:
            yield _encode(model, model.encode_image, torch.stack(batch))


def embed_texts(model, tokenizer, texts, progress=False):
    """A list of P texts -> unit vectors, float32 [P, D], on the CPU."""
    context = model.config["context_length"]
    starts = tqdm(range(0, len(texts), BATCH), desc="texts", disable=not progress, leave=False, file=sys.stdout)
    return torch.cat([_encode(model, model.encode_text, tokenizer.encode(texts[i:i + BATCH], context))
                      for i in starts])


@torch.no_grad()
def _encode(model, encode, batch):
    was_training = model.training
    model.eval()
    device = "cpu" if batch.dtype == torch.int64 else model.logit_scale.device  # encode_text packs token ids on the CPU
    features = encode(batch.to(device), l2norm=True).float().cpu()
    model.train(was_training)
    return features


# ------------------------------------------------------------------------------------------------------- retrieval

def recall_at_k(image_features, text_features, owner, ks=KS, chunk=1024):
    """Recall both ways. image_features [M, D], text_features [P, D], unit vectors; owner int64 [P], the picture of each
    text, -1 for none. A picture's hit is any of its own texts among the k nearest.

    Scores exist chunk rows at a time. Returns {"image_to_text": {"R@1": ...}, "text_to_image": {...}}, in 0..1; pictures
    without a text, and texts without a picture, are candidates only.
    """
    image_ranks, text_ranks = [], []
    pictures = owner[owner >= 0].unique()
    for i in pictures.split(chunk):
        scores = image_features[i] @ text_features.T                         # [chunk, P]
        best = scores.masked_fill(owner != i[:, None], -math.inf).amax(1, keepdim=True)
        image_ranks.append((scores > best).sum(1))
    owned = (owner >= 0).nonzero()[:, 0]
    for j in owned.split(chunk):
        scores = text_features[j] @ image_features.T                         # [chunk, M]
        text_ranks.append((scores > scores.gather(1, owner[j, None])).sum(1))
    return {way: {f"R@{k}": (torch.cat(ranks) < k).float().mean().item() for k in ks}
            for way, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks))}


def chance_recall(owner, images, ks=KS):
    """What recall_at_k would be for a model that knows nothing: k draws out of all candidates."""
    texts, own = len(owner), owner[owner >= 0].bincount()
    own = own[own > 0].double()

    def hit(k, of):
        k = min(k, texts)
        miss = torch.stack([(texts - of - j).clamp(min=0) / (texts - j) for j in range(k)]).prod(0)
        return (1 - miss).mean().item()
    return {"image_to_text": {f"R@{k}": hit(k, own) for k in ks},
            "text_to_image": {f"R@{k}": min(1, k / images) for k in ks}}


def retrieve(model, pairs, tokenizer, candidates=None, progress=True, embedded=None):
    """Zero-shot retrieval in each language by itself: {language: {way: {"R@1": ...}}}, in 0..1.

    candidates: {language: texts} of captions that stand beside those of the pairs, of no picture. embedded: the pairs as
    Embedded has them, where that is done already.
    """
    embedded = embedded or Embedded(model, pairs, tokenizer, candidates, progress)
    return {language: recall_at_k(embedded.images, embedded.texts[language], embedded.owner[language])
            for language in sorted(embedded.texts)}


# -------------------------------------------------------------------------------------------------- classification

def zero_shot_weights(model, tokenizer, classnames, templates):
    """Class vectors [D, C]: for each class the mean of its prompts' unit vectors, made a unit vector again (CLIP, section
    3.1.4). templates hold one {} each."""
    texts = [template.replace("{}", name) for name in classnames for template in templates]
    vectors = embed_texts(model, tokenizer, texts).view(len(classnames), len(templates), -1)  # [C, T, D]
    return kelip.unit(vectors.mean(1)).T


def read_classes(name):
    """A set of prompts.json: {"classnames": {language: [C names]}, "templates": {language: [...]}}. Raises ValueError."""
    path = Path(__file__).with_name("prompts.json")
    sets = json.loads(path.read_text(encoding="utf-8"))
    if name not in sets:
        raise ValueError(f"--classes {name}: prompts.json has {', '.join(sets)}")
    return sets[name]


def label_of(pair, classnames):
    """The class of a pair: the number in its .cls member, or the one class whose English name its English caption ends
    with, if no other class is named in it. None where there is none."""
    if "cls" in pair.members:
        return int(pair.members["cls"])
    caption = f" {pair.captions.get('en', '')}".lower()
    named = [i for i, name in enumerate(classnames["en"]) if f" {name}" in caption]
    return named[0] if len(named) == 1 and caption.endswith(" " + classnames["en"][named[0]]) else None


def classify(model, pairs, tokenizer, classes, progress=True, embedded=None):
    """Zero-shot classification of pairs that have a class, with class names and templates in each language.

    classes: as read_classes gives. Returns {language: {"top1", "top5", "mean_per_class"}}, in 0..1, and the numbers of
    "pictures" and "classes". Raises ValueError when no pair has a class.
    """
    embedded = embedded or Embedded(model, pairs, tokenizer, progress=progress)
    labels = [label_of(pair, classes["classnames"]) for pair in embedded.pairs]
    chosen = [i for i, label in enumerate(labels) if label is not None]
    if not chosen:
        raise ValueError("no pair has a class: neither a .cls member nor a class's name in its caption")
    truth = torch.tensor([labels[i] for i in chosen])
    result = {"pictures": len(chosen), "classes": len(classes["classnames"]["en"])}
    for language, classnames in classes["classnames"].items():
        weights = zero_shot_weights(model, tokenizer, classnames, classes["templates"][language])
        scores = embedded.images[chosen] @ weights                           # [M, C]
        top = scores.topk(min(5, len(classnames)), dim=1).indices
        hits = top == truth[:, None]
        per_class = [hits[truth == c, 0].float().mean() for c in truth.unique()]
        result[language] = {"top1": hits[:, 0].float().mean().item(), "top5": hits.any(1).float().mean().item(),
                            "mean_per_class": torch.stack(per_class).mean().item()}
    return result


# -------------------------------------------------------------------------------------------------------- the page

def report(folder, model, pairs, tokenizer, candidates=None, classes=None, progress=True, embedded=None):
    """Measure, print, and write evaluation.json and index.html into folder. classes: a set's name in prompts.json;
    embedded: as retrieve has it."""
    embedded = embedded or Embedded(model, pairs, tokenizer, candidates, progress)
    languages = sorted(embedded.texts)
    found = {"pictures": len(embedded.pairs), "skipped": dict(embedded.skipped), "retrieval": {}, "chance": {},
             "candidates": {language: len(embedded.captions[language]) for language in languages}}
    for language in languages:
        owner = embedded.owner[language]
        found["retrieval"][language] = recall_at_k(embedded.images, embedded.texts[language], owner)
        found["chance"][language] = chance_recall(owner, len(embedded.images))
    if classes:
        found["classes"] = classes
        found["classification"] = classify(model, pairs, tokenizer, read_classes(classes), embedded=embedded)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    render_page(folder, embedded, found)
    print_report(found)
    return found


def rows_of(found):
    """The tables of a report: (header, rows of str) each."""
    head = ["retrieval, %"] + [f"R@{k}" for k in KS] + ["chance R@1"]
    rows = [[f"{NAMES.get(language, language)}, {title}"]
            + [f"{100 * found['retrieval'][language][way][f'R@{k}']:.1f}" for k in KS]
            + [f"{100 * found['chance'][language][way]['R@1']:.2f}"]
            for language in found["retrieval"] for way, title in WAYS.items()]
    tables = [(head, rows)]
    if "classification" in found:
        result = found["classification"]
        rows = [[f"{NAMES.get(language, language)} prompts"]
                + [f"{100 * result[language][key]:.1f}" for key in ("top1", "top5", "mean_per_class")]
                + [f"{100 / result['classes']:.1f}"] for language in NAMES if language in result]
        tables.append(([f"{found['classes']}, %", "top-1", "top-5", "mean per class", "chance top-1"], rows))
    return tables


def print_report(found):
    """The report's tables on the terminal."""
    for head, rows in rows_of(found):
        width = max(len(row[0]) for row in [head, *rows])
        for row in [head, *rows]:
            print("  ".join([row[0].ljust(width)] + [cell.rjust(max(6, len(h))) for cell, h in zip(row[1:], head[1:])]))
        print()
    if found["skipped"]:
        print(f"skipped: {found['skipped']}")


def render_page(folder, embedded, found, examples=30):
    """Write folder/index.html: the numbers, the learning curves, and what the model calls some of the pictures."""
    step = max(1, len(embedded.pairs) // examples)
    shown = list(range(step // 2, len(embedded.pairs), step))[:examples]
    counts = ", ".join(f"{n:,} {NAMES.get(language, language)}" for language, n in found["candidates"].items())
    page.write(folder / "index.html", f"{folder.name}: what the model learned",
               f"{found['pictures']:,} held-out pictures; candidates: {counts}.",
               *(page.table(head, rows) for head, rows in rows_of(found)), *_curves(folder),
               page.heading("What it calls pictures that it has not seen",
                            "The three nearest names in each language; the right one is marked."),
               page.cards(_card(embedded, i) for i in shown))


def _card(embedded, i):
    """A picture, and the names nearest to it."""
    pair, lists = embedded.pairs[i], ""
    for language in sorted(embedded.texts):
        scores = embedded.texts[language] @ embedded.images[i]
        found = [(embedded.captions[language][j], bool(embedded.owner[language][j] == i))
                 for j in scores.topk(min(3, len(scores))).indices.tolist()]
        lists += page.names(pair.captions.get(language, ""), found, language)
    return page.card(page.picture(shards.decode(pair.image)), lists)


def _curves(folder):
    """The loss and the recall of each language over the run, from metrics.jsonl, as drawings."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def over_steps(key, times=1):
        return {name: [(line["step"], times * line[key.format(language)]) for line in lines
                       if line.get(key.format(language)) is not None] for language, name in NAMES.items()}
    yield page.plot("Training loss by language of the caption", over_steps("loss_{}"))
    yield page.plot("Right names at first place, held-out pictures, %", over_steps("{}/image_to_text/R@1", 100), dots=True)


def main(argv=None):
    """Evaluate a model on pairs."""
    parser = argparse.ArgumentParser(description="Measure a trained model: retrieval in each language, zero-shot "
                                                 "classification, and a page with both.")
    add = parser.add_argument
    add("model", help="what kelip.build_model opens: a run's folder or a folder of released weights")
    add("--test", nargs="+", default=["data/emoji/test-*.tar"], metavar="SHARDS",
        help="held-out pairs (default: the demo's, data/emoji/test-*.tar)")
    add("--candidates", metavar="FILE", help="a json of {language: captions} that stand beside those of the pairs "
                                             "(default: names.json beside the shards)")
    add("--classes", metavar="SET", help="classify too, with the class names and prompts of this set of prompts.json")
    add("--out", metavar="FOLDER", help="where evaluation.json and index.html go (default: the model's folder)")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _, tokenizer = kelip.build_model(args.model, device)
    pairs = data.Pairs(args.test)
    report(args.out or args.model, model, pairs, tokenizer, read_candidates(args.test, args.candidates), args.classes)
    print(f"{args.out or args.model}/index.html")


def read_candidates(sources, path=None):
    """{language: captions} from a json, by default names.json beside the first shard, None where there is none."""
    path = Path(path) if path else Path(sources[0].partition("::")[0]).parent / "names.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"evaluate.py: {error}")
