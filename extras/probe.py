"""Linear probe: how well a linear layer on a frozen image encoder classifies images.

    python -m extras.probe runs/mae                              # the demo's groups of emoji
    python -m extras.probe runs/clip --train cars --test cars    # your own classes

The probe is a multinomial logistic regression on features before the projection, as in CLIP (arXiv
2103.00020, appendix A.3). Stage 1 trains no projection, so both stages are compared at the same
layer. There are two kinds of features: the class token after ln_post, and the mean of the patch
tokens. They are standardized, which corresponds to the BatchNorm without scale of He et al. (arXiv
2111.06377, section A.1). The L2 penalty is the best of nine on a fifth of the training images, held
out. The baseline is the same probe on an untrained encoder of the same size.

From top to bottom: the encoders, the regression, the command.

Not included: fine-tuning, and augmentation of the training images.
"""

import argparse
import functools

import torch
import torch.nn.functional as F
from tqdm import tqdm

import kelip
from classes import labels_of, open_set
from command import ArgumentParser, run_command
from extras.features import embed_images, open_cache
from shards import format_counts

FEATURES = ("class token", "mean of patches")
L2_PENALTIES = [10.0 ** n for n in range(2, -7, -1)]


# ---- the encoders ----

def open_encoder(name_or_path, device="cpu"):
    """A KELIP with a trained image encoder, and an untrained one of the same size (seed 0).

    name_or_path: a run of either stage, or released KELIP.
    """
    checkpoint = kelip.open_checkpoint(name_or_path)
    torch.manual_seed(0)
    untrained = kelip.KELIP(**checkpoint.config)
    trained = kelip.KELIP(**checkpoint.config)
    kelip.init_from(trained, checkpoint)
    return trained.to(device).eval(), untrained.to(device).eval()


def encode(model, images):
    """images [N, 3, size, size] -> both FEATURES, concatenated: [N, 2W]."""
    visual = model.visual
    positions = visual.positions(images)                                     # [1 + L, W]
    x = visual.embed(visual.patchify(images), positions[0], positions[1:])   # [N, 1 + L, W]
    x = visual.ln_post(visual.transformer(visual.ln_pre(x)))
    return torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1)                 # [N, 2W]


def features_of(model, name_or_path, evaluation_set, flag):
    """The features of the images that have a class.

    evaluation_set: from classes.open_set. flag: the flag that named it, for the error. Returns
    features [N, 2W], labels int64 [N], and a Counter of the errors of images that are skipped.
    Raises ValueError for fewer than five images.
    """
    pairs, classes = evaluation_set
    cache = open_cache(name_or_path, model, "probe", width=2 * model.config["vision_width"])
    features, kept, skipped = embed_images(
        model, pairs, cache, encode=functools.partial(encode, model))
    labels = labels_of(torch.utils.data.Subset(pairs, kept), classes, skipped)
    chosen = [i for i, label in enumerate(labels) if label is not None]
    if len(chosen) < 5:
        causes = f"; skipped: {format_counts(skipped)}" if skipped else ""
        raise ValueError(f"{flag}: {len(chosen)} of {len(labels)} images that decode have a class, "
                         f"too few for a probe{causes}")
    return features[chosen], torch.tensor([labels[i] for i in chosen]), skipped


# ---- the regression ----

def fit(x, y, n_classes, l2_penalty, start=None):
    """Multinomial logistic regression by L-BFGS.

    x [N, W], y int64 [N] below n_classes. Returns weights [W + 1, n_classes], the bias in the last
    row. They minimize

        cross_entropy(predict(weights, x), y) + l2_penalty / 2 * weights[:-1].square().sum()

    which is convex. start: initial weights, by default zeros.
    """
    if start is None:
        start = torch.zeros(x.shape[1] + 1, n_classes, dtype=x.dtype)
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=300, tolerance_grad=1e-6,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        penalty = l2_penalty / 2 * weights[:-1].square().sum()
        loss = F.cross_entropy(predict(weights, x), y) + penalty
        loss.backward()
        return loss
    optimizer.step(closure)
    return weights.detach()


def predict(weights, x):
    """x [N, W] -> logits [N, C]."""
    return x @ weights[:-1] + weights[-1]


def probe(train, test, bar=None):
    """Fit on one set, evaluate on another: {"top1", "mean_per_class", "l2_penalty"}.

    train, test: (features float32 [N, W], labels int64 [N]). bar: a progress bar, updated after
    each fit.
    """
    (x, y), (x_test, y_test) = train, test
    n_classes = int(torch.cat([y, y_test]).max()) + 1
    mean, std = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:len(y) // 5], order[len(y) // 5:]
    weights, accuracies = None, []
    # The strongest penalty first: its fit is fast and a good start for the next one.
    for l2_penalty in L2_PENALTIES:
        weights = fit(x[rest], y[rest], n_classes, l2_penalty, weights)
        hits = predict(weights, x[held_out]).argmax(dim=1) == y[held_out]
        accuracies.append((hits.float().mean().item(), l2_penalty))
        if bar is not None:
            bar.update()
    _, l2_penalty = max(accuracies)  # at equal accuracy, the stronger penalty
    weights = fit(x, y, n_classes, l2_penalty)
    top1, mean_per_class = accuracy(predict(weights, x_test).argmax(dim=1), y_test)
    return {"top1": top1, "mean_per_class": mean_per_class, "l2_penalty": l2_penalty}


def accuracy(predicted, y):
    """Accuracy over all images, and its mean over the classes of y. predicted, y: int64 [N]."""
    hits = (predicted == y).float()
    per_class = [hits[y == label].mean() for label in y.unique()]
    return hits.mean().item(), torch.stack(per_class).mean().item()


# ---- the command ----

def main(argv=None):
    """Read the command line, probe the encoder and an untrained one, print a table."""
    parser = ArgumentParser(
        prog="python -m extras.probe", description=__doc__.partition("\nFrom top")[0],
        fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL",
        help="a run of train_mae.py or train_clip.py, or a folder of released weights")
    add("--train", nargs="+", default=["data/emoji/train-*.tar"], metavar="SET",
        help="images to fit on: shards, or a folder in CLIP_benchmark's layout, which `python -m "
             "extras.pack classes OUT FOLDER --split train` makes from class folders (default: the "
             "demo's, data/emoji/train-*.tar)")
    add("--test", nargs="+", default=["data/emoji/test-*.tar"], metavar="SET",
        help="images to evaluate on, with the same classes (default: the demo's, "
             "data/emoji/test-*.tar)")
    add("--classes", metavar="NAME",
        help="a set of classes in prompts.json (default: the names in CLIP_benchmark's layout; for "
             "the demo, \"emoji groups\")")
    args = parser.parse_args(argv)
    if not args.classes and args.train == parser.get_default("train"):
        args.classes = "emoji groups"
    train_set = open_set(args.train, args.classes, "train")
    test_set = open_set(args.test, args.classes, "test")
    both_have_classes = train_set.classes and test_set.classes
    if not both_have_classes or train_set.classes["classnames"] != test_set.classes["classnames"]:
        raise ValueError("--train and --test have different classes or none; --classes NAME takes "
                         "those of prompts.json for both")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained, untrained = open_encoder(args.model, device)
    rows = []
    for title, model in ((args.model, trained), ("the same, untrained", untrained)):
        x, y, skipped = features_of(model, args.model, train_set, "--train")
        x_test, y_test, skipped_test = features_of(model, args.model, test_set, "--test")
        if len(y.unique()) < 2:
            raise ValueError("--train: all images are of one class, so there is nothing to learn")
        halves = zip(FEATURES, x.chunk(2, dim=1), x_test.chunk(2, dim=1))    # [N, W]
        with tqdm(total=2 * len(L2_PENALTIES), desc="fit", leave=False) as bar:
            for name, half, half_test in halves:
                result = probe((half, y), (half_test, y_test), bar)
                rows.append((f"{title}, {name}", result["top1"], result["mean_per_class"],
                             f"{result['l2_penalty']:g}"))
    most_frequent = y.bincount().argmax().expand(len(y_test))
    rows.append(("always the most frequent class", *accuracy(most_frequent, y_test), ""))

    print(f"{len(y):,} images to fit on, {len(y_test):,} to evaluate on")
    for flag, errors in (("--train", skipped), ("--test", skipped_test)):
        if errors:
            print(f"skipped in {flag}: {format_counts(errors)}")
    _print_table(rows)


def _print_table(rows):
    """Print a line (title, top-1, mean per class, L2 penalty) for each probe."""
    lines = [("linear probe, %", "top-1", "mean per class", "L2 penalty")]
    for title, top1, mean_per_class, l2_penalty in rows:
        lines.append((title, f"{100 * top1:.1f}", f"{100 * mean_per_class:.1f}", l2_penalty))
    width = max(len(line[0]) for line in lines)
    for title, *cells in lines:
        print("  ".join([title.ljust(width), *(cell.rjust(14) for cell in cells)]))


if __name__ == "__main__":
    run_command(main, "vectors are cached; the same command continues from there")
