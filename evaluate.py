"""Evaluate a trained model: retrieval and zero-shot classification, each in English and in Korean.

    python evaluate.py runs/clip                             on the demo's test
    python evaluate.py runs/clip --classes "emoji groups"    classification too
    python evaluate.py runs/clip --test 'coco-ko/*.tar::ko' --out results
    python evaluate.py runs/clip --test wds_vtab-cifar10 --classes cifar10

Retrieval finds the captions of an image among all captions, and the image of a caption among all
images. R@k is the fraction of queries with a right one among the k nearest candidates. Zero-shot
classification predicts the class whose prompts ("a photo of a {}") are nearest to the image (CLIP,
arXiv 2103.00020, section 3.1). The results are printed, and written to a JSON file and a page:
evaluation-SET.json and evaluation-SET.html in the model's folder, where evaluations.html lists the
pages of all sets, or evaluation.json and index.html in --out.

From top to bottom: embedding a set, retrieval, classification, the report, the command.

Not included: opening a set and its labels (classes.py), linear probes (extras/probe.py), and a
cache of feature vectors (extras/features.py).
"""

import argparse
import collections
import functools
import hashlib
import json
import os
import re
import tempfile
import unicodedata
from pathlib import Path

import torch
from tqdm import tqdm

import kelip
import page
import shards
from classes import format_prompt, is_benchmark, labels_of, open_set, read_classes, spellings
from command import ArgumentParser, number, one_line, run_command
from tokenizer import read_json

KS = (1, 5, 10)  # R@1, R@5, R@10
BATCH = 128      # images or texts to encode at a time
CHUNK = 256      # rows of scores to compute at a time
LANGUAGE_NAMES = {"en": "English", "ko": "Korean", "": "captions"}
DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}
LIST = "evaluations.html"  # lists the pages of all sets


# ---- embedding ----

class Embedded:
    """The unit vectors of a set's images and captions.

    Args:
        pairs: data.Pairs.
        candidates: {language: texts}, further texts for retrieval to choose from. Languages that no
            pair has, and texts that are captions of pairs, are ignored.
        strict: whether a caption is right for its own image alone, as CLIP_benchmark counts, or
            also for the images of equal captions.

    Attributes:
        images: float32 [M, D], unit vectors of the M images that decode.
        pairs: their M pairs, each read from disk when it is indexed.
        skipped: a Counter of reasons why images and captions are missing.
        captions: {language: [P texts]}, the captions of the pairs first, then further candidates.
        texts: {language: float32 [P, D]}, unit vectors of the captions.
        owner: {language: int64 [P]}, the image of each caption, below M; -1 for further candidates.
        repeated: {language: number of captions that are equal to an earlier one}.
        cut: {language: captions that have more tokens than the model reads}.
        equal_to: {language: int64 [P]}, the first caption that is equal to each, for recall_at_k;
            None if strict, or if none is repeated.

    Raises ValueError when no image decodes.
    """

    def __init__(self, model, pairs, tokenizer, candidates=None, progress=True, strict=False):
        self.images, kept, self.skipped = embed_images(model, pairs, progress)
        if not kept:
            raise ValueError(f"none of the {len(pairs):,} images decodes: "
                             f"{shards.format_counts(self.skipped)}")
        self.pairs = torch.utils.data.Subset(pairs, kept)
        self.captions = collections.defaultdict(list)
        owner = collections.defaultdict(list)
        for i, pair in enumerate(self.pairs):
            self.skipped.update(pair.errors)
            for language, texts in pair.captions.items():
                self.captions[language] += texts
                owner[language] += [i] * len(texts)
        if not self.captions:  # a set for classification alone
            del self.skipped["no caption"]
        for language in self.captions.keys() & (candidates or {}).keys():
            own = set(self.captions[language])
            more = [text for text in dict.fromkeys(candidates[language]) if text not in own]
            self.captions[language] += more
            owner[language] += [-1] * len(more)
        self.owner = {language: torch.tensor(indices) for language, indices in owner.items()}
        self.equal_to, self.repeated = {}, {}
        for language, texts in self.captions.items():
            first = _first_equal(texts)
            self.repeated[language] = int((first != torch.arange(len(texts))).sum())
            self.equal_to[language] = first if self.repeated[language] and not strict else None
        self.texts, self.cut = {}, {}
        for language, texts in self.captions.items():
            self.texts[language] = embed_texts(model, tokenizer, texts, progress)
            # Tokenizers of other libraries do not have `cut`.
            self.cut[language] = list(getattr(tokenizer, "cut", {}).values())


def _first_equal(texts):
    """The index of the first text that is equal to each of P texts: int64 [P]."""
    first = {}
    # NFC and NFD are two ways to write the same text.
    return torch.tensor([first.setdefault(unicodedata.normalize("NFC", text), i)
                         for i, text in enumerate(texts)])


def embed_images(model, pairs, progress=True):
    """The unit vectors of all images that decode: (vectors, kept, skipped).

    vectors: float32 [M, D] on the CPU. kept: the M indices of their pairs. skipped: a Counter of
    reasons, including those of the index of the shards.
    """
    device = model.logit_scale.device
    vectors = [torch.empty(0, model.config["embed_dim"])]
    kept, skipped = [], collections.Counter(pairs.skipped)
    encode = functools.partial(model.encode_image, l2norm=True)
    dataset = _Preprocessed(pairs, model.config["image_resolution"])
    for batch in load_batches(dataset, range(len(pairs)), device, progress):
        images = []
        for i, image, error in batch:
            if error:
                skipped[error] += 1
            else:
                images.append(image)
                kept.append(i)
        if images:
            vectors.append(encode_batch(encode, torch.stack(images).to(device)))
    return torch.cat(vectors), kept, skipped


class _Preprocessed:
    """A dataset of (i, float32 [3, size, size], "") or, if image i is bad, (i, None, error)."""

    def __init__(self, pairs, size):
        self.pairs, self.preprocess = pairs, kelip.preprocess(size)

    def __getitem__(self, i):
        try:
            return i, self.preprocess(shards.decode(self.pairs[i].image)), ""
        except ValueError as error:
            return i, None, str(error).partition(":")[0]


def load_batches(dataset, indices, device, progress=True):
    """Iterate over dataset[i] for i in indices, in lists of BATCH."""
    # For many images on a GPU, several processes decode, since the GPU would wait for a single one.
    workers = min(16, os.cpu_count()) if device.type != "cpu" and len(indices) >= 4096 else 0
    # Without a generator of its own, DataLoader would draw a seed from torch's global one, and an
    # evaluation during training would change the rest of the run.
    loader = torch.utils.data.DataLoader(dataset, BATCH, sampler=indices, collate_fn=list,
                                         num_workers=workers, generator=torch.Generator())
    return with_progress(loader, len(indices), "images", progress)


def with_progress(batches, total, unit, progress):
    """Iterate over batches of `total` items. Shows a progress bar of items after a second."""
    with tqdm(total=total, desc=unit, unit=f" {unit}", leave=False, delay=1,
              disable=not progress) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def embed_texts(model, tokenizer, texts, progress=False):
    """The unit vectors of a list of P texts: float32 [P, D] on the CPU."""
    tokens = tokenizer.encode(texts, model.config["context_length"])         # [P, L]
    # Texts with the same tokens are encoded once. In different batches, their vectors could differ
    # in the last digit, and would no longer tie.
    keys = [row.tobytes() for row in tokens.numpy()]
    first = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    distinct = tokens[list(first.values())]                                  # [Q, L]
    encode = functools.partial(model.encode_text, l2norm=True)
    batches = with_progress(distinct.split(BATCH), len(distinct), "texts", progress)
    vectors = torch.cat([encode_batch(encode, batch) for batch in batches])  # [Q, D]
    position = {key: q for q, key in enumerate(first)}
    return vectors[[position[key] for key in keys]]                          # [P, D]


@torch.no_grad()
def encode_batch(encode, batch):
    """encode(batch) without gradients, as float32 on the CPU."""
    return encode(batch).float().cpu()


# ---- retrieval ----

def recall_at_k(image_features, text_features, owner, ks=KS, equal_to=None):
    """Recall@k in both directions, as CLIP_benchmark measures it.

    Recall@k is the fraction of queries that have one of their positives among the k candidates with
    the highest scores (cosines). From image to text, it is the mean over images i of

        (owner[scores[i].topk(k).indices] == i).any()

    Args:
        image_features: [M, D], unit vectors.
        text_features: [P, D], unit vectors.
        owner: int64 [P], the image of each text, -1 for none. The positives of an image are all
            texts that it owns. Texts without an image and images without a text are candidates
            only.
        equal_to: int64 [P], the first text that is equal to each. A text is then a positive of all
            images that own an equal one. By default it is one of its own image alone, as in
            CLIP_benchmark.

    Returns {"image_to_text": {"R@1": ...}, "text_to_image": {...}}, in 0..1.

    If scores tie, this is the expected recall under random tie-breaking. Let h candidates score
    higher than the best positive of a query, and t candidates, p of them positives, score the same
    as it. In random order, the first d = k - h of these t enter the top k:

        P(hit) = 1 - C(t - p, d) / C(t, d)

    Without ties, t = p = 1 and this is 0 or 1. For a model that maps everything to one point, it
    equals chance_recall.

    NaN never helps: candidates whose score is NaN rank first, and a query with NaN among the scores
    of its positives is a miss.
    """
    first, number, repeats, links = _distinct_texts(owner, equal_to)
    owned = (owner >= 0).nonzero()[:, 0]                                     # [Q], texts
    images, texts_of_image = _group(links[:, 1], by=links[:, 0])             # [N], N tensors
    texts, images_of_text = _group(links[:, 0], by=links[:, 1])              # [T], T tensors
    images_of_owned = [images_of_text[i]
                       for i in torch.searchsorted(texts, number[owned]).tolist()]
    candidates = text_features
    if equal_to is None:
        repeats = None
    else:  # equal texts are one candidate, so that rounding cannot tell them apart
        candidates = text_features[first]                                    # [G, D]
    return {
        "image_to_text": _recall(image_features, images, candidates, texts_of_image, ks, repeats),
        "text_to_image": _recall(text_features, owned, image_features, images_of_owned, ks)}


def _distinct_texts(owner, equal_to=None):
    """Number the G distinct texts. owner, equal_to: int64 [P], as recall_at_k takes them.

    Returns first, [G], an index of each among the texts; number, [P], that of each text, below G;
    repeats, [G], how often each occurs; and links, [L, 2], the pairs (image, number) of images and
    texts that they own, each once and sorted.
    """
    if equal_to is None:
        equal_to = torch.arange(len(owner))
    first, number, repeats = equal_to.unique(return_inverse=True, return_counts=True)
    owned = owner >= 0
    links = torch.stack([owner[owned], number[owned]], dim=1).unique(dim=0)
    return first, number, repeats, links


def _group(values, by):
    """Group values by key: the different keys, ascending, and a tensor of values for each."""
    order = by.argsort(stable=True)
    keys, counts = by[order].unique_consecutive(return_counts=True)
    return keys, values[order].split(counts.tolist())


def _recall(queries, rows, candidates, positives, ks, repeats=None):
    """{"R@k": ...} of queries[rows], [N, D], among candidates [P, D].

    positives: N int64 tensors, the right candidates of each query. repeats: int64 [P], how many
    candidates each stands for, by default one.
    """
    def count(mask):                                                         # [n, P] -> [n]
        return (mask if repeats is None else mask * repeats).sum(dim=1)

    # Allocated once, outside the loop: small tensors allocated between the large scores of two
    # chunks would keep the memory of the first from being used again.
    higher, tied, tied_positives = torch.empty(3, len(rows), dtype=torch.int64)
    n_candidates = len(candidates) if repeats is None else int(repeats.sum())
    for start in range(0, len(rows), CHUNK):
        chunk = slice(start, start + CHUNK)
        scores = queries[rows[chunk]] @ candidates.T                         # [n, P]
        right = torch.nn.utils.rnn.pad_sequence(
            positives[chunk], batch_first=True, padding_value=-1)            # [n, most]
        own = scores.gather(1, right.clamp(min=0)).masked_fill(right < 0, -torch.inf)
        best = own.amax(dim=1, keepdim=True)                                 # [n, 1], may be NaN
        not_higher = count(scores <= best)                                   # NaN compares as False
        higher[chunk] = n_candidates - not_higher
        tied[chunk] = not_higher - count(scores < best)
        is_tied = own == best                                                # [n, most]
        if repeats is not None:
            is_tied = is_tied * repeats[right]
        tied_positives[chunk] = is_tied.sum(dim=1)
    return {f"R@{k}": _hit_probability(k - higher, tied, tied_positives).mean().item() for k in ks}


def _hit_probability(draws, candidates, positives):
    """The probability that drawing without replacement finds a positive: float64.

    d draws from t candidates miss all p positives with probability

        C(t - p, d) / C(t, d) = product over j < d of (t - p - j) / (t - j)

    Arguments are int or int64 tensors that broadcast. Without draws or positives it is 0.
    """
    d, t, p = (torch.as_tensor(x) for x in (draws, candidates, positives))
    miss = torch.ones((), dtype=torch.float64)
    for j in range(max(0, int(d.max()))):
        factor = (t - p - j).clamp(min=0).double() / (t - j).clamp(min=1)
        miss = miss * torch.where(j < d, factor, 1)
    return torch.where(p > 0, 1 - miss, 0)


def chance_recall(owner, n_images, ks=KS, equal_to=None):
    """The expected recall_at_k of random scores, in the same form. owner, equal_to: as there."""
    _, number, repeats, links = _distinct_texts(owner, equal_to)
    images, row = links[:, 0].unique(return_inverse=True)                    # [N], [L]
    texts_of_image = torch.zeros_like(images).index_add(0, row, repeats[links[:, 1]])  # [N]
    images_of_text = torch.ones(1)
    if equal_to is not None:
        images_of_text = links[:, 1].bincount()[number[owner >= 0]]          # [Q]
    found = {"image_to_text": (len(owner), texts_of_image),
             "text_to_image": (n_images, images_of_text)}
    return {direction: {f"R@{k}": _hit_probability(k, *counts).mean().item() for k in ks}
            for direction, counts in found.items()}


def retrieve(model, pairs, tokenizer, candidates=None, embedded=None, progress=True):
    """Zero-shot retrieval in each language: {language: recall_at_k of its captions}.

    candidates: as Embedded takes them. embedded: the Embedded of the pairs if it exists already;
    pairs and candidates are not used then.
    """
    embedded = embedded or Embedded(model, pairs, tokenizer, candidates, progress)
    return {language: recall_at_k(embedded.images, texts, embedded.owner[language],
                                  equal_to=embedded.equal_to[language])
            for language, texts in sorted(embedded.texts.items())}


def mean_recall(retrieval):
    """The mean R@1 over languages and directions. retrieval: what retrieve returns."""
    values = [recall[direction]["R@1"] for recall in retrieval.values()
              for direction in DIRECTIONS]
    return sum(values) / max(1, len(values))


# ---- zero-shot classification ----

def zero_shot_weights(model, tokenizer, classnames, templates, progress=False):
    """The vectors of classes, [D, C]: unit vectors in columns.

    A class's vector is the mean of the unit vectors of its prompts, scaled to unit length (CLIP,
    section 3.1.4). Its prompts are all its spellings in all templates (see format_prompt).
    classnames: C texts or lists of spellings.
    """
    prompts, class_of_prompt = [], []
    for label, name in enumerate(classnames):
        for spelling in spellings(name):
            for template in templates:
                prompts.append(format_prompt(template, spelling))
                class_of_prompt.append(label)
    vectors = embed_texts(model, tokenizer, prompts, progress)               # [prompts, D]
    sums = vectors.new_zeros(len(classnames), vectors.shape[1])              # [C, D]
    sums.index_add_(0, torch.tensor(class_of_prompt), vectors)
    return kelip.l2_normalize(sums).T


def classify(model, pairs, tokenizer, classes, progress=True, embedded=None):
    """Zero-shot classification in each language, of the pairs that have a class.

    classes: as read_classes or open_set returns them. embedded: the Embedded of the pairs if it
    exists already. Returns a dict with

        images: the number of pairs that have a class and an image that decodes
        classes: C
        skipped: {reason: number of images}, for images with a bad .cls
        {language}: top1, top5 and mean_per_class, accuracies in 0..1, without top5 if there are
            fewer than five classes; and confusions, the most frequent errors first: true,
            predicted, images, fraction (of the images of the true class), example (an index into
            embedded.pairs)

    Raises ValueError when no pair has a class.
    """
    embedded = embedded or Embedded(model, pairs, tokenizer, progress=progress)
    skipped = collections.Counter()
    labels = labels_of(embedded.pairs, classes, skipped)
    chosen = [i for i, label in enumerate(labels) if label is not None]
    if not chosen:
        found = f" ({shards.format_counts(skipped)})" if skipped else ""
        raise ValueError(f"no pair has a class{found}: it needs a .cls member with a class's "
                         "number, or a caption that ends with the name of a class")
    truth = torch.tensor([labels[i] for i in chosen])                        # [M]
    n_classes = len(next(iter(classes["classnames"].values())))
    result = {"images": len(chosen), "classes": n_classes, "skipped": dict(skipped)}
    for language, classnames in classes["classnames"].items():
        templates = classes["templates"][language]
        weights = zero_shot_weights(model, tokenizer, classnames, templates, progress)  # [D, C]
        top = top_classes(embedded.images[chosen], weights)                  # [M, 5]
        hits = top == truth[:, None]
        per_class = [hits[truth == label, 0].float().mean() for label in truth.unique()]
        result[language] = {
            "top1": hits[:, 0].float().mean().item(),
            "top5": hits.any(dim=1).float().mean().item(),
            "mean_per_class": torch.stack(per_class).mean().item(),
            "confusions": _confusions(truth, top[:, 0], chosen, classnames)}
        if n_classes < 5:
            del result[language]["top5"]
    return result


def top_classes(images, weights, count=5):
    """The nearest classes of each image, the nearest first.

    images [M, D], weights [D, C] -> int64 [M, count], or [M, C] if there are fewer classes.
    """
    count = min(count, weights.shape[1])
    return torch.cat([(chunk @ weights).topk(count, dim=1).indices
                      for chunk in images.split(CHUNK)])


def _confusions(truth, predicted, indices, classnames):
    """The 20 most frequent confusions, as classify returns them.

    truth, predicted: int64 [M]. indices: the M indices of the images in embedded.pairs.
    """
    images, example = collections.Counter(), {}
    for i, true, wrong in zip(indices, truth.tolist(), predicted.tolist()):
        if true != wrong:
            images[true, wrong] += 1
            example.setdefault((true, wrong), i)
    of_class = truth.bincount().tolist()
    name = [spellings(names)[0] or f"class {label}" for label, names in enumerate(classnames)]
    return [{"true": name[true], "predicted": name[wrong], "images": n,
             "fraction": n / of_class[true], "example": example[true, wrong]}
            for (true, wrong), n in images.most_common(20)]


# ---- the report ----

def report(folder, model, pairs, tokenizer, candidates=None, classes=None, progress=True,
           embedded=None, name=""):
    """Evaluate, write evaluation.json and index.html into folder, print. Returns the numbers.

    classes: the name of a set of prompts.json, or classes as open_set returns them. embedded: the
    Embedded of the pairs if it exists already. candidates: as Embedded takes them. name: if given,
    the files are evaluation-NAME.json and evaluation-NAME.html, and evaluations.html lists all such
    pages. Raises ValueError when the pairs have neither captions nor classes.
    """
    embedded = embedded or Embedded(model, pairs, tokenizer, candidates, progress)
    owners, n_images = sorted(embedded.owner.items()), len(embedded.images)
    numbers = {
        "images": n_images,
        "skipped": dict(embedded.skipped),
        "retrieval": retrieve(model, pairs, tokenizer, embedded=embedded),
        "chance": {language: chance_recall(owner, n_images, equal_to=embedded.equal_to[language])
                   for language, owner in owners},
        "candidates": {language: len(owner) for language, owner in owners},
        "notes": _notes_on_captions(embedded),
        "test": [source.name for source in pairs.sources]}
    if classes:
        classes = read_classes(classes) if isinstance(classes, str) else classes
        numbers["classes"] = classes["name"]
        found = classify(model, pairs, tokenizer, classes, progress, embedded)
        numbers["classification"] = found
        numbers["skipped"] |= found["skipped"]
        numbers["notes"] += _notes_on_classes(classes)
    elif not embedded.texts:
        causes = f" ({shards.format_counts(embedded.skipped)})" if embedded.skipped else ""
        raise ValueError(f"{numbers['test'][0]}: neither captions (KEY.txt, KEY.ko.txt) nor names "
                         f"of classes{causes}; if the pairs have KEY.cls, give --classes, a set of "
                         "prompts.json")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(numbers, indent=1, ensure_ascii=False)
    if name:
        page.write_text(folder / f"evaluation-{name}.json", text)
        _write_page(folder / f"evaluation-{name}.html", embedded, numbers)
        _list_pages(folder)
    else:
        page.write_text(folder / "evaluation.json", text)
        _write_page(folder / "index.html", embedded, numbers)
    _print_report(numbers)  # after the files, since the reader of the output may end early
    return numbers


def _notes_on_captions(embedded):
    """A sentence for each language in which captions repeat, or are cut."""
    notes = []
    for language, cut in sorted(embedded.cut.items()):
        if cut:
            notes.append(f"{_language_name(language)}: "
                         f"{shards.format_cut(len(cut), max(cut, key=len))}")
    for language, repeated in sorted(embedded.repeated.items()):
        if repeated:
            rule = "only that of the image itself is right, as CLIP_benchmark counts"
            if embedded.equal_to[language] is not None:
                rule = "one that is equal to the image's own is right"
            total = int((embedded.owner[language] >= 0).sum())
            notes.append(f"{_language_name(language)}: {repeated:,} of {total:,} captions repeat; "
                         f"{rule}")
    return notes


def _notes_on_classes(classes):
    """A sentence for each language with empty names of classes or empty templates."""
    notes = []
    for what in ("classnames", "templates"):
        for language, texts in classes[what].items():
            if texts.count(""):
                notes.append(f"{_language_name(language)}: {texts.count('')} of {len(texts):,} "
                             f"{what} are empty; they count, as in CLIP_benchmark")
    return notes


def _percent(fraction, digits=1):
    return f"{100 * fraction:.{digits}f}"


def report_tables(numbers):
    """The tables of a report: a list of (header, rows), in which all cells are text."""
    tables = []
    if numbers["retrieval"]:
        header = ["retrieval, %", *(f"R@{k}" for k in KS), "chance R@1"]
        rows = []
        for language, recall in numbers["retrieval"].items():
            for direction, title in DIRECTIONS.items():
                chance = numbers["chance"][language][direction]["R@1"]
                rows.append([f"{_language_name(language)}, {title}",
                             *(_percent(recall[direction][f"R@{k}"]) for k in KS),
                             _percent(chance, digits=2)])
        tables.append((header, rows))
    if "classification" in numbers:
        chance = 1 / numbers["classification"]["classes"]
        accuracy, confusions = [], []
        for language, result in _languages(numbers["classification"]):
            name = _language_name(language)
            columns = {"top-1": result["top1"], "top-5": result.get("top5"),
                       "mean per class": result["mean_per_class"], "chance top-1": chance}
            columns = {title: value for title, value in columns.items() if value is not None}
            header = [f"{numbers['classes']}, %", *columns]
            accuracy.append([f"{name} prompts", *map(_percent, columns.values())])
            for wrong in result["confusions"][:3]:
                confusions.append([f"{name}: {wrong['true']} → {wrong['predicted']}",
                                   f"{wrong['images']:,}", _percent(wrong["fraction"])])
        tables.append((header, accuracy))
        tables.append((["confusions", "images", "% of the class"], confusions))
    return tables


def _languages(classification):
    """The [(language, result)] in what classify returns."""
    return [(key, value) for key, value in classification.items()
            if isinstance(value, dict) and key != "skipped"]


def _language_name(language):
    return LANGUAGE_NAMES.get(language, language)


def _print_report(numbers):
    """Print the tables with aligned columns."""
    for header, rows in report_tables(numbers):
        lines = [[one_line(first), *rest] for first, *rest in [header, *rows]]
        width = max(_terminal_width(first) for first, *_ in lines)
        for first, *rest in lines:
            cells = [cell.rjust(max(6, len(title))) for cell, title in zip(rest, header[1:])]
            print("  ".join([first + " " * (width - _terminal_width(first)), *cells]))
        print()
    for note in numbers["notes"]:
        print(one_line(note))
    if numbers["skipped"]:
        print(f"skipped: {one_line(shards.format_counts(numbers['skipped']))}")


def _terminal_width(text):
    """The columns that a text takes on a terminal: two for each Hangul syllable."""
    return len(text) + sum(unicodedata.east_asian_width(char) in "WF" for char in text)


def _write_page(path, embedded, numbers):
    """Write a page: the first table, examples, the curves of the run, confusions.

    The run's own page is index.html. It has the curves, and a link to the pages of other sets.
    """
    folder = path.parent
    is_of_run = path.name == "index.html" and (folder / "metrics.jsonl").is_file()
    tested = ", ".join(numbers["test"][:3]) + (" and more" if len(numbers["test"]) > 3 else "")
    intro = f"{numbers['images']:,} held-out images of {tested}"
    if numbers["candidates"]:
        counts = [f"{n:,} {_language_name(language)}"
                  for language, n in numbers["candidates"].items()]
        intro += f"; candidates: {', '.join(counts)}"
    intro = ". ".join([intro, *numbers["notes"]])

    first, *others = (page.table(header, rows) for header, rows in report_tables(numbers))
    parts = [first]
    if embedded.texts:
        step = max(1, len(embedded.pairs) // 30)
        shown = range(step // 2, len(embedded.pairs), step)[:30]
        parts += [
            page.heading("Predictions for images that were not trained on",
                         "The three nearest captions in each language. The right one is marked."),
            page.cards([_prediction_card(embedded, i) for i in shown])]
    if is_of_run:
        parts += curves(folder)
    parts += others
    for language, result in _languages(numbers.get("classification", {})):
        if result["confusions"]:
            parts += [
                page.heading(f"Confusions, {_language_name(language)} prompts",
                             "The most frequent first, with one image of each."),
                page.cards([_confusion_card(embedded, wrong)
                            for wrong in result["confusions"][:12]])]
    if is_of_run:
        parts += [
            page.heading("Other sets", "python evaluate.py writes a page for each set that it "
                         "evaluates the model on, and a page that lists them:"),
            page.links([(LIST, LIST)])]
    page.write(path, f"{folder.resolve().name}: what the model learned", f"{intro}.", *parts)
    if is_of_run:
        _list_pages(folder)


def _list_pages(folder):
    """Write evaluations.html: links to the pages of all sets."""
    names = sorted(path.name for path in folder.glob("evaluation-*.html"))
    links = [(name, name.removeprefix("evaluation-").removesuffix(".html")) for name in names]
    if (folder / "index.html").exists():
        links.insert(0, ("index.html", "the training run"))
    intro = "A page for each set on which python evaluate.py evaluated the model."
    page.write(folder / LIST, f"{folder.resolve().name}: evaluations", intro, page.links(links))


def _prediction_card(embedded, i):
    """An image and the captions nearest to it."""
    pair, lists = embedded.pairs[i], ""
    for language in sorted(embedded.texts):
        scores = embedded.texts[language] @ embedded.images[i]               # [P]
        nearest = scores.topk(min(100, len(scores))).indices.tolist()
        own = pair.captions.get(language, [])
        texts = dict.fromkeys(embedded.captions[language][j] for j in nearest)  # each once
        found = [(text, text in own) for text in list(texts)[:3]]
        lists += page.names(", ".join(own), found, language)
    return page.card(page.image(shards.decode(pair.image)), lists)


def _confusion_card(embedded, wrong):
    """An image of one class for which another was predicted."""
    image = shards.decode(embedded.pairs[wrong["example"]].image)
    counts = f"{wrong['images']:,} images, {wrong['fraction']:.0%} of the class"
    return page.card(page.image(image),
                     page.lines(f"{wrong['true']} → {wrong['predicted']}", [counts]))


def curves(folder, direction="image_to_text"):
    """Charts of the loss and the recall over a run, by language, from its metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    log = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(line)
        except (ValueError, RecursionError):  # if the run was killed, a line may be cut short
            continue
        if isinstance(line, dict) and _is_number(line.get("step")):
            log.append(line)

    losses, recalls = {}, {}
    for language, name in LANGUAGE_NAMES.items():
        losses[name] = _column(log, f"loss_{language or 'text'}")
        recall = _column(log, f"{language}/{direction}/R@1")
        recalls[name] = [(step, 100 * value) for step, value in recall]
    return [page.plot("Training loss by language of the caption", losses),
            page.plot(f"R@1, {direction.replace('_', ' ')}, of held-out pairs, %", recalls,
                      dots=True)]


def _column(log, key):
    """The values of a key in a log: [(step, value)]."""
    return [(line["step"], line[key]) for line in log if _is_number(line.get(key))]


def _is_number(value):
    """Whether a value can be drawn: not negative, not NaN and not infinite."""
    return type(value) in (int, float) and 0 <= value < 1e30


# ---- the command ----

def main(argv=None):
    """Evaluate a model on a set."""
    parser = ArgumentParser(description=__doc__.partition("\nFrom top")[0],
                            fromfile_prefix_chars="@",
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="the folder of a run or of released weights")
    add("--test", nargs="+", default=["data/emoji/test-*.tar"], metavar="SET",
        help="shards with captions or classes, or a folder in CLIP_benchmark's layout; a final "
             "::ko marks Korean captions; @LIST is a text file of sets, one a line (default: the "
             "demo's, data/emoji/test-*.tar)")
    add("--holdout", type=number(float, above=0, high=0.99), metavar="FRACTION",
        help="of --test, evaluate on the pairs that train_clip.py --holdout FRACTION holds out")
    add("--candidates", metavar="FILE",
        help="a .json of {language: [captions]}, further candidates for retrieval (default: "
             "names.json in the folder of the shards, if it exists)")
    add("--classes", metavar="NAME",
        help="classify with the names and prompts of this set of prompts.json (default: those in "
             "CLIP_benchmark's layout)")
    add("--out", metavar="FOLDER",
        help="folder for evaluation.json and index.html (default: the model's folder, where the "
             "set is part of the files' names)")
    args = parser.parse_args(argv)

    # Errors in paths come first, since the model takes the longest to open.
    out, model_folder = Path(args.out or folder_of(args.model)), folder_of(args.model)
    if args.out or out.is_dir():
        check_writable(out)
    # A run's evaluation.json and index.html are those of its training.
    name = set_name(args.test, args.classes) if out.resolve() == model_folder.resolve() else ""
    candidates = read_candidates(args.test, args.candidates)
    pairs, classes = open_set(args.test, args.classes)
    if args.holdout:
        _, pairs = pairs.split(args.holdout)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _, tokenizer = kelip.build_model(args.model, device)
    print(one_line(f"{args.model} on {' '.join(args.test)}, {len(pairs):,} images"), flush=True)
    embedded = Embedded(model, pairs, tokenizer, candidates, strict=is_benchmark(args.test[0]))
    report(out, model, pairs, tokenizer, candidates, classes, embedded=embedded, name=name)
    print(f"{out}/evaluation-{name}.html; {out}/{LIST} lists all" if name else f"{out}/index.html")


def check_writable(folder):
    """Make a folder if it is missing. Raises OSError if no file can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{folder}: nothing can be written there ({error.strerror}); name another "
                      "folder with --out") from None


def set_name(sources, classes=None):
    """A name for the files of an evaluation: 'data/emoji/test-*.tar' -> 'data-emoji-test'."""
    text = " ".join([*sources, classes or ""])
    name = re.sub(r"(\.tar\b|\W)+", "-", text).strip("-") or "set"
    if len(name.encode()) > 100:  # file names have at most 255 bytes
        name = f"{name[:20]}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:12]}"
    return name


def folder_of(model):
    """The folder of the weights that kelip.build_model opens under this name or path."""
    path = Path("weights" if model in kelip.PRESETS else os.path.expanduser(model))
    return path if path.is_dir() else path.parent


def read_candidates(sources, path=None):
    """{language: captions} of a JSON file, by default names.json in the folder of the first shard.

    Returns None if no path is given and there is no names.json. Raises OSError, and ValueError when
    the file is not regular or has another form.
    """
    if not path:
        first = Path(os.path.expanduser(sources[0].partition("::")[0]))
        path = (first if first.is_dir() else first.parent) / "names.json"
        if not os.path.lexists(path):
            return None
    candidates = read_json(path)
    if not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts)
               for texts in candidates.values()):
        raise ValueError(f'{path}: not of the form {{"en": ["a red apple", ...], "ko": [...]}}')
    return candidates


if __name__ == "__main__":
    run_command(main)
