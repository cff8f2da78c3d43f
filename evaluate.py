"""What a trained model knows: retrieval, zero-shot classification, and a page that shows both.

    python evaluate.py runs/clip                                      on the demo's unseen style of drawing
    python evaluate.py runs/clip --classes "emoji groups"             classification too, with names from prompts.json
    python evaluate.py runs/clip --test wds_vtab-cifar10 --classes cifar10
    python evaluate.py runs/clip --test 'coco-val/*.tar'              retrieval on any captioned shards
    python evaluate.py probe runs/mae                                 a linear probe (probe.py)
    python evaluate.py search --images PHOTOS "a red apple"           search in a folder of pictures (search.py)

Retrieval finds the captions of a picture among all captions, and the picture of a caption among all pictures, in each
language by itself. Zero-shot classification makes a class's vector out of prompts ("a photo of a {}") and takes the class
nearest to the picture (CLIP, arXiv 2103.00020, section 3.1). Both run in float32, whatever training used.

What it leaves out: fitting anything to the pictures that it measures on.
"""

import argparse
import collections
import json
import signal
import sys
import unicodedata
from pathlib import Path

import torch

import kelip
import page
import shards
from extras.features import embed_images, embed_texts, folder_of, open_store
from classes import fill, labels_of, open_set, read_classes, spellings

KS = (1, 5, 10)
CHUNK = 256                      # rows of scores that exist at a time
NAMES = {"en": "English", "ko": "Korean", "": "captions"}
WAYS = {"image_to_text": "image to text", "text_to_image": "text to image"}


class Embedded:
    """Pairs as a model sees them.

    images: [M, D], unit vectors of the pictures that decode. texts: {language: [P, D]}; owner: {language: int64 [P]},
    the picture of each text, -1 for a candidate that has none; captions: {language: list of P str}. pairs: the M pairs
    that they are of, read when they are asked for. skipped: what did not decode, by cause. store: a features.Store, where
    vectors are to be kept; lines: whether each line of a .txt is a caption of its own.
    """

    def __init__(self, model, pairs, tokenizer, candidates=None, progress=True, store=None, lines=False):
        self.images, kept, self.skipped = embed_images(model, pairs, store, progress)
        if not kept:
            raise ValueError(f"none of the {len(pairs)} pictures decodes: {dict(self.skipped)}")
        self.pairs = torch.utils.data.Subset(pairs, kept)
        self.captions, owner = collections.defaultdict(list), collections.defaultdict(list)
        for i, pair in enumerate(self.pairs):
            for language, text in captions_of(pair, lines):
                self.captions[language].append(text)
                owner[language].append(i)
        for language in self.captions.keys() & (candidates or {}).keys():
            texts, own = candidates[language], set(self.captions[language])
            more = [text for text in dict.fromkeys(texts) if text not in own]
            self.captions[language] += more
            owner[language] += [-1] * len(more)
        self.owner = {language: torch.tensor(indices) for language, indices in owner.items()}
        self.texts = {language: embed_texts(model, tokenizer, texts, progress, store)
                      for language, texts in self.captions.items()}


def captions_of(pair, lines=False):
    """A pair's captions, [(language, text)]; with lines, each line of its .txt is one."""
    found = []
    for language, caption in pair.captions.items():
        text = pair.members.get(f"{language}.txt", pair.members.get("txt"))  # None: it comes from a json
        several = text.decode("utf-8-sig").splitlines() if lines and text is not None else [caption]
        found += [(language, shards.clean_caption(line)) for line in several if line.strip()]
    return found


# ------------------------------------------------------------------------------------------------------- retrieval

def recall_at_k(image_features, text_features, owner, ks=KS):
    """Recall both ways. image_features [M, D], text_features [P, D], unit vectors; owner int64 [P], the picture of each
    text, -1 for none. A picture's hit is any of its own texts among the k nearest, as in CLIP_benchmark.

    Where candidates score the same, the value is what shuffling them would give on average: a model that maps everything
    to one point has chance_recall. Scores exist some rows at a time. Returns {"image_to_text": {"R@1": ...},
    "text_to_image": {...}}, in 0..1; pictures without a text, and texts without a picture, are candidates only.
    """
    owned = (owner >= 0).nonzero()[:, 0]                                     # [Q]
    pictures, counts = owner[owned].unique(return_counts=True)               # [N]
    by_picture = owned[owner[owned].argsort(stable=True)].split(counts.tolist())
    own = torch.nn.utils.rnn.pad_sequence(list(by_picture), True, -1)        # [N, most]
    return {"image_to_text": _recall(image_features, pictures, text_features, own, ks),
            "text_to_image": _recall(text_features, owned, image_features, owner[owned, None], ks)}


def _recall(queries, rows, candidates, own, ks):
    """{"R@k": ...} of queries[rows], [N, D]; own: int64 [N, most], the right ones among the candidates [P, D], -1 behind."""
    before, right, tied = torch.empty(3, len(rows), dtype=torch.int64)      # small results kept between large scores would
    for first in range(0, len(rows), CHUNK):                                # keep the memory of these from being used again
        part = slice(first, first + CHUNK)
        scores = queries[rows[part]] @ candidates.T                          # [n, P]
        own_scores = scores.gather(1, own[part].clamp(min=0)).masked_fill(own[part] < 0, -torch.inf)  # [n, most]
        best = own_scores.amax(1, keepdim=True)
        behind = (scores <= best).sum(1)                                     # what is no number is before all others
        before[part] = len(candidates) - behind
        tied[part] = behind - (scores < best).sum(1)
        right[part] = (own_scores == best).sum(1)
    return {f"R@{k}": _hit(k - before, right, tied).mean().item() for k in ks}


def _hit(places, right, tied):
    """The chance that drawing candidates into so many places, none twice, hits one of the right ones among those tied:
    float64, int64 tensors or numbers that go together."""
    places, right, tied = (torch.as_tensor(x) for x in (places, right, tied))
    miss = torch.ones((), dtype=torch.float64)
    for j in range(max(0, int(places.max()))):
        step = (tied - right - j).clamp(min=0).double() / (tied - j).clamp(min=1)
        miss = miss * torch.where(j < places, step, 1)
    return torch.where(right > 0, 1 - miss, 0)                               # no right one: its score is no number


def chance_recall(owner, images, ks=KS):
    """What recall_at_k would be for a model that knows nothing: all candidates tie."""
    own = owner[owner >= 0].unique(return_counts=True)[1]
    return {"image_to_text": {f"R@{k}": _hit(k, own, len(owner)).mean().item() for k in ks},
            "text_to_image": {f"R@{k}": _hit(k, 1, images).item() for k in ks}}


def retrieve(model, pairs, tokenizer, candidates=None, progress=True, embedded=None):
    """Zero-shot retrieval in each language by itself: {language: {way: {"R@1": ...}}}, in 0..1.

    candidates: {language: texts} of captions that stand beside those of the pairs, of no picture. embedded: the pairs as
    Embedded has them, where that is done already.
    """
    embedded = embedded or Embedded(model, pairs, tokenizer, candidates, progress)
    return {language: recall_at_k(embedded.images, embedded.texts[language], embedded.owner[language])
            for language in sorted(embedded.texts)}


# -------------------------------------------------------------------------------------------------- classification

def zero_shot_weights(model, tokenizer, classnames, templates, progress=False, store=None):
    """Class vectors [D, C]: for each class the mean of its prompts' unit vectors, made a unit vector again (CLIP, section
    3.1.4). classnames: C texts, or lists of spellings, whose prompts all count the same; templates as sets.fill takes
    them."""
    prompts = [(number, fill(template, name)) for number, names in enumerate(classnames) for name in spellings(names)
               for template in templates]
    numbers, texts = zip(*prompts)
    vectors = embed_texts(model, tokenizer, list(texts), progress, store)    # [prompts, D]
    sums = vectors.new_zeros(len(classnames), vectors.shape[1]).index_add_(0, torch.tensor(numbers), vectors)
    return kelip.unit(sums).T


def classify(model, pairs, tokenizer, classes, progress=True, embedded=None, store=None):
    """Zero-shot classification of pairs that have a class, with class names and templates in each language.

    classes: as read_classes gives. Returns the numbers of "pictures" and "classes", and {language: {"top1", "top5",
    "mean_per_class", in 0..1, "confusions"}}: what is most often taken for what, {"true", "predicted", "pictures",
    "share" of the true class's, "example", a number in embedded.pairs}. Raises ValueError when no pair has a class.
    """
    embedded = embedded or Embedded(model, pairs, tokenizer, progress=progress, store=store)
    labels = labels_of(embedded.pairs, classes)
    chosen = [i for i, label in enumerate(labels) if label is not None]
    if not chosen:
        raise ValueError("no pair has a class: neither a .cls member nor a class's name in its caption")
    truth = torch.tensor([labels[i] for i in chosen])
    result = {"pictures": len(chosen), "classes": len(next(iter(classes["classnames"].values())))}
    for language, classnames in classes["classnames"].items():
        weights = zero_shot_weights(model, tokenizer, classnames, classes["templates"][language], progress, store)
        top = best_classes(embedded.images[chosen], weights)                 # [M, 5]
        hits = top == truth[:, None]
        per_class = [hits[truth == c, 0].float().mean() for c in truth.unique()]
        result[language] = {"top1": hits[:, 0].float().mean().item(), "top5": hits.any(1).float().mean().item(),
                            "mean_per_class": torch.stack(per_class).mean().item(),
                            "confusions": _confusions(truth, top[:, 0], chosen, classnames)}
    return result


def best_classes(images, weights, count=5):
    """The nearest classes, the best first: images [M, D], weights [D, C] -> int64 [M, count], or as many as there are."""
    count = min(count, weights.shape[1])
    return torch.cat([(part @ weights).topk(count, dim=1).indices for part in images.split(CHUNK)])


def _confusions(truth, predicted, chosen, classnames, most=20):
    """The most frequent wrong answers, as classify gives them; truth, predicted int64 [M], chosen: the M pairs' numbers."""
    totals, count, example = truth.bincount(), collections.Counter(), {}
    for i, pair in zip(chosen, zip(truth.tolist(), predicted.tolist())):
        if pair[0] != pair[1]:
            count[pair] += 1
            example.setdefault(pair, i)
    name = [spellings(names)[0] for names in classnames]
    return [{"true": name[t], "predicted": name[p], "pictures": n, "share": n / int(totals[t]), "example": example[t, p]}
            for (t, p), n in count.most_common(most)]


# -------------------------------------------------------------------------------------------------------- the page

def report(folder, model, pairs, tokenizer, candidates=None, classes=None, progress=True, embedded=None, store=None,
           lines=False):
    """Measure, print, and write evaluation.json and index.html into folder. classes: a set's name in prompts.json, or a
    set as sets.open_set gives it; embedded: what is embedded already; store, lines: as Embedded has them. Raises
    ValueError where pairs have neither captions nor classes."""
    embedded = embedded or Embedded(model, pairs, tokenizer, candidates, progress, store, lines)
    found = {"pictures": len(embedded.pairs), "skipped": dict(embedded.skipped), "retrieval": {}, "chance": {},
             "candidates": {language: len(texts) for language, texts in sorted(embedded.captions.items())},
             "test": [source.name for source in pairs.sources]}
    for language in sorted(embedded.texts):
        owner = embedded.owner[language]
        found["retrieval"][language] = recall_at_k(embedded.images, embedded.texts[language], owner)
        found["chance"][language] = chance_recall(owner, len(embedded.images))
    if classes:
        classes = read_classes(classes) if isinstance(classes, str) else classes
        found["classes"] = classes["name"]
        found["classification"] = classify(model, pairs, tokenizer, classes, progress, embedded, store)
    elif not embedded.texts:
        raise ValueError(f"{found['test'][0]}: neither captions nor classes; --classes names a set of prompts.json, where "
                         "there are .cls members or class folders")
    print_report(found)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page.write_whole(folder / "evaluation.json", json.dumps(found, indent=1, ensure_ascii=False))
    render_page(folder, embedded, found)
    return found


def rows_of(found):
    """The tables of a report: (header, rows of str) each."""
    tables = []
    if found["retrieval"]:
        head = ["retrieval, %"] + [f"R@{k}" for k in KS] + ["chance R@1"]
        rows = [[f"{named(language)}, {title}"]
                + [f"{100 * found['retrieval'][language][way][f'R@{k}']:.1f}" for k in KS]
                + [f"{100 * found['chance'][language][way]['R@1']:.2f}"]
                for language in found["retrieval"] for way, title in WAYS.items()]
        tables.append((head, rows))
    if result := found.get("classification"):
        languages = [language for language in result if isinstance(result[language], dict)]
        rows = [[f"{named(language)} prompts"]
                + [f"{100 * result[language][key]:.1f}" for key in ("top1", "top5", "mean_per_class")]
                + [f"{100 / result['classes']:.1f}"] for language in languages]
        tables.append(([f"{found['classes']}, %", "top-1", "top-5", "mean per class", "chance top-1"], rows))
        rows = [[f"{named(language)}: {wrong['true']} → {wrong['predicted']}", f"{wrong['pictures']:,}",
                 f"{100 * wrong['share']:.1f}"] for language in languages for wrong in result[language]["confusions"][:3]]
        tables.append((["taken for another", "pictures", "% of the class"], rows))
    return tables


def named(language):
    """A language's name."""
    return NAMES.get(language, language)


def print_report(found):
    """The report's tables on the terminal."""
    def cells(text):  # Hangul takes two places of a terminal
        return len(text) + sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    for head, rows in rows_of(found):
        width = max(cells(row[0]) for row in [head, *rows])
        for first, *rest in [head, *rows]:
            print("  ".join([first + " " * (width - cells(first)), *(x.rjust(max(6, len(h))) for x, h in zip(rest, head[1:]))]))
        print()
    if found["skipped"]:
        print(f"skipped: {found['skipped']}")


def render_page(folder, embedded, found, examples=30):
    """Write folder/index.html: the numbers, the learning curves, what was taken for what, and what the model calls some of
    the pictures."""
    parts = [*(page.table(head, rows) for head, rows in rows_of(found)), *_curves(folder)]
    for language, result in found.get("classification", {}).items():
        if isinstance(result, dict) and result["confusions"]:
            parts += [page.heading(f"Taken for another, {named(language)} prompts", "One picture of each; the most frequent first."),
                      page.cards(_confusion(embedded, wrong) for wrong in result["confusions"][:12])]
    if embedded.texts:
        step = max(1, len(embedded.pairs) // examples)
        shown = list(range(step // 2, len(embedded.pairs), step))[:examples]
        parts += [page.heading("What it calls pictures that it has not seen",
                               "The three nearest names in each language; the right one is marked."),
                  page.cards(_card(embedded, i) for i in shown)]
    counts = ", ".join(f"{n:,} {named(language)}" for language, n in found["candidates"].items())
    tested = ", ".join(found["test"][:3]) + (" and more" if len(found["test"]) > 3 else "")
    page.write(folder / "index.html", f"{folder.name}: what the model learned", f"{found['pictures']:,} held-out pictures of "
               f"{tested}" + (f"; candidates: {counts}." if counts else "."), *parts)


def _confusion(embedded, wrong):
    """A picture of one class that was taken for another."""
    image = shards.decode(embedded.pairs[wrong["example"]].image)
    return page.card(page.picture(image), page.lines(f"{wrong['true']} → {wrong['predicted']}", [
        f"{wrong['pictures']:,} pictures, {wrong['share']:.0%} of the class"]))


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
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]  # whole ones

    def over_steps(key, times=1):
        return {name: [(line["step"], times * line[key.format(language)]) for line in lines
                       if line.get(key.format(language)) is not None] for language, name in NAMES.items()}
    yield page.plot("Training loss by language of the caption", over_steps("loss_{}"))
    yield page.plot("Right names at first place, held-out pictures, %", over_steps("{}/image_to_text/R@1", 100), dots=True)


def main(argv=None):
    """Evaluate a model on pairs; or probe, or search, which the files of these names do."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["probe"]:
        from extras import probe
        return probe.main(argv[1:])
    if argv[:1] == ["search"]:
        from extras import search
        return search.main(argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.split("\nRetrieval")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="what kelip.build_model opens: a run's folder or a folder of released weights")
    add("--test", nargs="+", default=["data/emoji/test-*.tar"], metavar="SET",
        help="shards of captioned or labelled pictures, a set in CLIP_benchmark's layout, with ::ko behind where its captions "
             "are Korean, or a folder of class folders (default: the demo's, data/emoji/test-*.tar)")
    add("--candidates", metavar="FILE", help="a json of {language: captions} that stand beside those of the pairs "
                                             "(default: names.json beside the shards)")
    add("--classes", metavar="SET", help="classify with the class names and prompts of this set of prompts.json (default: "
                                         "classnames.txt of CLIP_benchmark's layout, or the folders' names)")
    add("--out", metavar="FOLDER", help="where evaluation.json and index.html go (default: the model's folder)")
    args = parser.parse_args(argv)
    out = Path(args.out or folder_of(args.model))
    if args.out:
        out.mkdir(parents=True, exist_ok=True)
    candidates = read_candidates(args.test, args.candidates)
    pairs, classes, lines = open_set(args.test, args.classes)
    model, _, tokenizer = kelip.build_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")
    report(out, model, pairs, tokenizer, candidates, classes, store=open_store(args.model, model), lines=lines)
    print(f"{out}/index.html")


def read_candidates(sources, path=None):
    """{language: captions} from a json, by default names.json beside the first shard, None where there is none. Raises
    OSError, and ValueError when it is something else."""
    if not path:
        first = Path(sources[0].partition("::")[0])
        path = (first if first.is_dir() else first.parent) / "names.json"
        if not path.is_file():
            return None
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts)
                                              for texts in found.values()):
        raise ValueError(f'{path}: not of the form {{"en": ["a red apple", ...], "ko": [...]}}')
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is embedded is kept
    sys.stdout.reconfigure(errors="backslashreplace")          # names that the terminal cannot show
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("evaluate.py: stopped; what is embedded is kept, and the same command goes on from there")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"evaluate.py: {error}")
