"""Linear probe: how much of what pictures show can be read off a frozen image encoder by one linear layer.

    python evaluate.py probe runs/mae
    python evaluate.py probe runs/clip --train cars/train --test cars/test

Multinomial logistic regression on the encoder's features before the projection, as CLIP has it (arXiv 2103.00020, appendix
A.3): the class token after ln_post, and beside it the mean of the patches' tokens. Stage 1 trains no projection, so that
both stages are read at the same place. Features are standardised (He et al., arXiv 2111.06377, section A.1, have a
BatchNorm without scale there), and the strength of the L2 penalty is the best of nine on a fifth of the training set held
out. Beside it stands the same probe of an encoder of the same sizes that has learned nothing.

What it leaves out: fine-tuning, and augmentation of the training pictures.
"""

import argparse
import functools

import torch
import torch.nn.functional as F
from tqdm import tqdm

import kelip
from extras.features import embed_images, open_store
from classes import labels_of, open_set

STRENGTHS = [10.0 ** n for n in range(2, -7, -1)]
FEATURES = ("class token", "mean of patches")


def open_encoder(name, device="cpu"):
    """Two KELIPs: one whose image encoder is that of a run of either stage or of anything that kelip.build_model opens, and
    one of the same sizes as it is before training (seed 0)."""
    opened = kelip.open_weights(name)
    config = opened.config or kelip.load_checkpoint(opened.where)["config"]["model"]
    torch.manual_seed(0)
    random, model = kelip.KELIP(**config), kelip.KELIP(**config)
    kelip.init_from(model, opened)
    return model.to(device).eval(), random.to(device).eval()


def encode(model, images):
    """images [N, 3, size, size] -> both FEATURES, one behind the other, [N, 2W]."""
    v = model.visual
    x = v.ln_post(v.transformer(v.ln_pre(v.embed(images))))                  # [N, 1 + L, W]
    return torch.cat([x[:, 0], x[:, 1:].mean(1)], dim=1)                     # [N, 2W]


def fit(x, y, classes, strength, start=None):
    """Multinomial logistic regression by L-BFGS: weights [W + 1, C], the last row the bias, that minimise the mean
    cross-entropy + strength / 2 * |weights without bias|^2. x [N, W], y int64 [N] below C; start: weights to start from."""
    weights = torch.zeros(x.shape[1] + 1, classes, dtype=x.dtype) if start is None else start.clone()
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(predict(weights, x), y) + strength / 2 * weights[:-1].square().sum()
        value.backward()
        return value
    optimizer.step(loss)
    return weights.detach()


def predict(weights, x):
    """x [N, W] -> logits [N, C]."""
    return x @ weights[:-1] + weights[-1]


def probe(train, test, bar=None):
    """Fit on one set and measure on the other: {"top1", "mean_per_class", in 0..1, "strength"}.

    train, test: (features float32 [N, W], labels int64 [N]).
    """
    (x, y), (x_test, y_test) = train, test
    classes = int(torch.cat([y, y_test]).max()) + 1
    mean, deviation = x.mean(0), x.std(0).clamp(min=1e-6)
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held, rest = order[:len(y) // 5], order[len(y) // 5:]
    weights, found = None, []
    for strength in STRENGTHS:  # from the strongest, whose fit is quick, each from where the one before it ended
        weights = fit(x[rest], y[rest], classes, strength, weights)
        hits = predict(weights, x[held]).argmax(1) == y[held]
        found.append((hits.float().mean().item(), strength))
        if bar is not None:
            bar.update()
    strength = max(found)[1]
    hits = predict(fit(x, y, classes, strength), x_test).argmax(1) == y_test
    per_class = [hits[y_test == c].float().mean() for c in y_test.unique()]
    return {"top1": hits.float().mean().item(), "mean_per_class": torch.stack(per_class).mean().item(), "strength": strength}


def features_of(model, where, pairs, classes, flag):
    """(features of the pictures that decode and have a class, [N, 2W], their labels [N], {cause: how many do not decode}).
    flag: what they were named by. Raises ValueError where they are fewer than five."""
    store = open_store(where, model, "probe")
    x, kept, skipped = embed_images(model, pairs, store, encode=functools.partial(encode, model))
    labels = labels_of(torch.utils.data.Subset(pairs, kept), classes)
    chosen = [i for i, label in enumerate(labels) if label is not None]
    if len(chosen) < 5:
        raise ValueError(f"{flag}: {len(chosen)} of {len(labels)} pictures that decode have a class, too few to probe with"
                         + (f"; skipped: {dict(skipped)}" if skipped else ""))
    return x[chosen], torch.tensor([labels[i] for i in chosen]), skipped


def main(argv=None):
    """Probe an encoder, and one of its sizes that has learned nothing."""
    parser = argparse.ArgumentParser(prog="evaluate.py probe", description=__doc__.split("\nMulti")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="a run of train_mae.py or train_clip.py, or anything else that kelip.build_model opens")
    add("--train", nargs="+", default=["data/emoji/train-*.tar"], metavar="SET", help="shards, a set in CLIP_benchmark's "
        "layout or a folder of class folders (default: the demo's, data/emoji/train-*.tar)")
    add("--test", nargs="+", default=["data/emoji/test-*.tar"], metavar="SET", help="likewise (default: the demo's)")
    add("--classes", metavar="SET", help="a set of prompts.json (default: what lies beside the pictures, or the demo's "
                                         "\"emoji groups\")")
    args = parser.parse_args(argv)
    if not args.classes and args.train == parser.get_default("train"):
        args.classes = "emoji groups"
    sets = [open_set(args.train, args.classes, "train"), open_set(args.test, args.classes)]
    names = [found.classes and found.classes["classnames"] for found in sets]
    if not all(names) or names[0] != names[1]:
        raise ValueError("--train and --test have no classes or not the same ones; --classes names a set of prompts.json")
    results = []
    for title, model in zip((args.model, "the same, untrained"), open_encoder(args.model, _device())):
        (*train, skipped), (*test, skipped_test) = (
            features_of(model, args.model, found.pairs, found.classes, flag) for found, flag in zip(sets, ("--train", "--test")))
        if len(train[1].unique()) < 2:
            raise ValueError("--train: all its pictures are of one class, which there is nothing to learn from")
        width = train[0].shape[1] // 2
        with tqdm(total=2 * len(STRENGTHS), desc="fit", leave=False) as bar:
            for number, name in enumerate(FEATURES):
                part = slice(number * width, (number + 1) * width)
                results.append((f"{title}, {name}", probe((train[0][:, part], train[1]), (test[0][:, part], test[1]), bar)))
    right = test[1] == train[1].bincount().argmax()
    print(f"{len(train[1]):,} pictures to fit on, {len(test[1]):,} to measure on")
    for title, causes in (("fit", skipped), ("measure", skipped_test)):
        if causes:
            print(f"skipped, to {title} on: {dict(causes)}")
    lines = [("linear probe, %", "top-1", "mean per class", "L2")]
    lines += [(title, f"{100 * r['top1']:.1f}", f"{100 * r['mean_per_class']:.1f}", f"{r['strength']:g}") for title, r in results]
    lines.append(("always the most frequent class", f"{100 * right.float().mean():.1f}",
                  f"{100 * right.any() / len(test[1].unique()):.1f}", ""))
    width = max(len(line[0]) for line in lines)
    for title, *cells in lines:
        print("  ".join([title.ljust(width), *(cell.rjust(14) for cell in cells)]))


def _device():
    return "cuda" if torch.cuda.is_available() else "cpu"
