"""Classes to evaluate on: names and prompts in two languages, labels, and sets on disk.

    classes = read_classes("cifar10")          # names and prompt templates, from prompts.json
    format_prompt("{}{을/를} 찍은 사진", "사과")   # '사과를 찍은 사진', "a photo of an apple"
    pairs, classes = open_set(["wds_vtab-cifar10"], "cifar10")
    labels = labels_of(pairs, classes)         # [6, 9, 9, ...], None for a pair without a class

From top to bottom: prompts and their Korean particles, the class of a pair, class names on disk,
and opening a set. A set is shards as data.py reads them, or a folder in CLIP_benchmark's layout:

    wds_vtab-cifar10/classnames.txt                          one name a line: airplane, ...
                     zeroshot_classification_templates.txt   one a line: a photo of a {c}. ...
                     dataset_type.txt                        "retrieval" for a set of captions
                     test/nshards.txt                        the number of tars
                     test/0.tar, test/1.tar, ...             KEY.cls in them is a class's number

Not included: downloading sets, and images that have several classes.
"""

import functools
import json
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import data

# For class names on disk without templates.
DEFAULT_TEMPLATES = {"en": ["a photo of a {}."], "ko": ["{} 사진"]}


# ---- prompts ----

# How a word ends. In a Hangul syllable's code point, the final consonant is a number from 0 to 27:
# 0 is none and 8 is ㄹ. OTHER stands for the other 26.
VOWEL, RIEUL, OTHER = 0, 8, 1

# The last sounds of the digits 영 일 이 삼 사 오 육 칠 팔 구; VOWEL for those not listed. A number
# that ends in 0 is read as 십, 백, 천 or 만, which end in a consonant like 영.
DIGITS = {0: OTHER, 1: RIEUL, 3: OTHER, 6: OTHER, 7: RIEUL, 8: RIEUL}
LETTERS = {"L": RIEUL, "R": RIEUL, "M": OTHER, "N": OTHER}  # 엘, 알, 엠, 엔


def last_sound(word):
    """The sound that a word ends with in Korean: VOWEL, RIEUL (ㄹ) or OTHER, any other consonant.

    Hangul spells it out. Digits are read in Korean. A single Latin letter, or a word in capitals
    (BMW), is read letter by letter. Other Latin words go by their spelling: -l and -le end in ㄹ
    (apple, 애플); -m, -n, -me, -ne, -ng, -ck, and b, c, k, p, t after a vowel end in a consonant
    (cup, 컵); all others end in a vowel (car 카, bus 버스, desk 데스크).
    """
    letters = "".join(re.findall(r"[^\W_]", word))  # quotes and brackets are silent
    last = letters[-1:]
    if "가" <= last <= "힣":
        final = (ord(last) - ord("가")) % 28
        return final if final in (VOWEL, RIEUL) else OTHER
    if last.isdecimal():
        return DIGITS.get(int(last), VOWEL)
    latin = re.search("[A-Za-z]*$", letters)[0]
    if latin.isupper() or len(latin) == 1:
        return LETTERS.get(last.upper(), VOWEL)
    latin = latin.lower()
    if re.search("le?$", latin):
        return RIEUL
    if re.search("([mn]e?|ng|ck|[aeiouy][bckpt])$", latin):
        return OTHER
    return VOWEL


def format_prompt(template, name):
    """Put a class's name into a prompt template.

    {} is the name, and so is CLIP_benchmark's {c}. A Korean particle that depends on the sound
    before it is written {after a consonant/after a vowel}:

        format_prompt("{}{이/가}", "연필")       -> '연필이'
        format_prompt("{}{이/가}", "사과")       -> '사과가'
        format_prompt("{}{으로/로}", "연필")     -> '연필로', since 로 follows vowels and ㄹ
    """
    text = re.sub(r"\{c?\}", lambda _: name, template)
    while particle := re.search(r"\{([^{}/]+)/([^{}/]+)\}", text):
        before, after = text[:particle.start()], text[particle.end():]
        after_consonant, after_vowel = particle.groups()
        sound = last_sound(before)
        is_vowel = sound == VOWEL or (sound == RIEUL and after_vowel.startswith("로"))
        text = before + (after_vowel if is_vowel else after_consonant) + after
    return text


def spellings(name):
    """The spellings of a class as a list. prompts.json has one text or several for each class."""
    return [name] if isinstance(name, str) else name


def read_classes(name):
    """A set of prompts.json: a dict with

        name: the name of the set
        classnames: {language: [C names]}, each a text or a list of spellings
        templates: {language: [templates for format_prompt]}
        codepoints: only in sets of emoji: the code points of each class, "1F600-1F644 1F910"

    Raises ValueError when there is no such set.
    """
    path = Path(__file__).with_name("prompts.json")
    sets = json.loads(path.read_text(encoding="utf-8"))
    if name not in sets:
        raise ValueError(f"--classes {name}: prompts.json has {', '.join(sets)}")
    return {"name": name, **sets[name]}


# ---- labels ----

def label_of(pair, classes):
    """The class of a pair, an int below C, or None if it has none.

    classes: as read_classes or open_set returns them. The class is the first of these that applies:

    - if the pair has a .cls member, the number in it,
    - if the set has code points, the class of the emoji in the pair's key,
    - the class whose name ends the caption ("a red apple": apple), if the caption names no other
      class. The English caption is read if the set has English names.

    Raises ValueError when .cls is not the number of a class.
    """
    if "cls" in pair.members:
        return _label_of_cls(pair, classes)
    if "codepoints" in classes:
        emoji = re.search(r"U\+([0-9A-F]+)", pair.key)
        if emoji is None:
            return None
        return _class_of_codepoint(int(emoji[1], 16), tuple(classes["codepoints"]))
    classnames = classes["classnames"]
    language = "en" if "en" in classnames else next(iter(classnames))
    caption = f" {pair.captions.get(language, [''])[0]}".lower()
    named, at_end = set(), set()
    for label, name in enumerate(classnames[language]):
        for spelling in spellings(name):
            word = f" {spelling.lower()}"  # the space keeps "cat" from matching "a bobcat"
            if word in caption:
                named.add(label)
            if caption.endswith(word):
                at_end.add(label)
    return named.pop() if len(named) == 1 and named == at_end else None


def _label_of_cls(pair, classes):
    """The class whose number is in a pair's .cls member."""
    text = pair.members["cls"].strip()
    count = len(next(iter(classes["classnames"].values())))
    order = classes.get("order", range(count))
    if not text.isdigit() or int(text) >= len(order):
        raise ValueError(f"{pair.key}.cls: class {text.decode(errors='replace')!r}, but the set "
                         f"has {count}, from 0 to {count - 1}")
    return order[int(text)]


@functools.cache
def _class_of_codepoint(point, classes):
    """The index of the class whose ranges, "1F600-1F644 1F910", contain a code point, or None."""
    for label, ranges in enumerate(classes):
        for part in ranges.split():
            low, _, high = part.partition("-")
            if int(low, 16) <= point <= int(high or low, 16):
                return label
    return None


def labels_of(pairs, classes):
    """label_of for each pair: a list of int and None."""
    return [label_of(pair, classes) for pair in pairs]


# ---- names on disk ----

def match_classes(found, names, what):
    """The class of each name on disk: a list of int below C, one for each of `found`.

    found: the names on disk, in order. names: the C names of a set of prompts.json. what: the file
    or folder, for errors.

    A name matches a class if it is one of its spellings, whatever the case and punctuation. Names
    of another kind (ImageNet's n01440764) match nothing. The names are then taken to be in the
    order of the set. There must be as many as classes, and those that match must be in the right
    place, except for one in fifty: ImageNet has two classes called missile. Raises ValueError
    otherwise.
    """
    labels = {}
    for label, name in enumerate(names):
        for spelling in spellings(name):
            labels.setdefault(_plain(spelling), []).append(label)
    matches = [labels.get(_plain(name), []) for name in found]
    if all(len(match) == 1 for match in matches):
        return [match[0] for match in matches]

    if len(found) != len(names):
        unmatched = next(name for name, match in zip(found, matches) if len(match) != 1)
        raise ValueError(f"{what}: {unmatched} names no class of --classes, or several, and there "
                         f"are {len(found)} names for {len(names)} classes")
    matched = [number for number, match in enumerate(matches) if match]
    misplaced = [number for number in matched if number not in matches[number]]
    if 50 * len(misplaced) > len(matched):
        first = misplaced[0]
        raise ValueError(f"{what}: some names are no classes of --classes, and {found[first]} is "
                         f"number {first} here but {matches[first][0]} in --classes: the order "
                         "cannot be trusted")
    return list(range(len(found)))


def _plain(name):
    """A name in lower case, with single spaces between words and no punctuation."""
    words = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFC", name).lower())
    return words.strip()


# ---- sets ----

class EvaluationSet(NamedTuple):
    """A set to evaluate on.

    classes: as read_classes returns them, or None. They may also have "order", the class of each
    number on disk. In CLIP_benchmark's retrieval sets, each line of a .txt is a caption of its own.
    """
    pairs: data.Pairs
    classes: dict


OTHER_SETS = (
    "`python -m extras.pack classes OUT FOLDER` makes a set from a folder of class folders, and "
    "huggingface.co/datasets/clip-benchmark has sets such as wds_vtab-cifar10")


def open_set(sources, name=None, split="test"):
    """Open what --test or --train names: an EvaluationSet.

    sources: a list. Each is shards, as data.Pairs takes them, or a folder in CLIP_benchmark's
    layout, with an optional ::LANGUAGE. name: a set of prompts.json, used instead of the names and
    templates on disk. split: the subfolder of CLIP_benchmark's layout that has the tars.

    Raises FileNotFoundError when there are no shards, ValueError when names on disk do not fit the
    set or sources differ in layout or classes.
    """
    classes = read_classes(name) if name else None
    shards, layouts = [], []
    for source in sources:
        folder, colons, options = source.partition("::")
        count = _count_tars(Path(folder), split)
        if count:
            layouts.append(_read_layout(Path(folder)))
            if layouts[-1].kind == "retrieval":
                options += "::lines"
            shards += [f"{folder}/{split}/{i}.tar{colons}{options}" for i in range(count)]
        else:
            shards.append(source)
            layouts.append(None)
        if layouts[-1] != layouts[0]:
            raise ValueError(f"{sources[0]} and {source} differ in layout, classes or templates: "
                             "evaluate on one at a time")
    try:
        pairs = data.Pairs(shards)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {OTHER_SETS}") from None

    layout, folder = layouts[0], Path(sources[0].partition("::")[0])
    if layout and layout.names:
        classes = _classes_on_disk(folder, layout, classes)
    return EvaluationSet(pairs, classes)


def _classes_on_disk(folder, layout, classes):
    """The classes of a folder in CLIP_benchmark's layout.

    classes: a set of prompts.json to use instead, which gets the "order" of the names on disk.
    """
    has_hangul = re.search("[가-힣]", unicodedata.normalize("NFC", "".join(layout.names)))
    language = "ko" if has_hangul else "en"
    if classes is None:
        return {"name": folder.name,
                "classnames": {language: [name.replace("_", " ") for name in layout.names]},
                "templates": {language: layout.templates or DEFAULT_TEMPLATES[language]}}
    if language not in classes["classnames"]:
        language = next(iter(classes["classnames"]))
    order = match_classes(layout.names, classes["classnames"][language], str(folder))
    return {**classes, "order": order}


class _Layout(NamedTuple):
    """The text files of a folder in CLIP_benchmark's layout."""
    kind: str  # "retrieval" for sets of captions
    names: list
    templates: list


def _read_layout(folder):
    """The _Layout of a folder. Raises ValueError when its images have several classes."""
    kind = " ".join(_read_lines(folder / "dataset_type.txt")).lower()
    if kind == "multilabel":
        raise ValueError(f"{folder}: images have several classes there, which is not supported")
    names = _read_lines(folder / "classnames.txt")
    templates = _read_lines(folder / "zeroshot_classification_templates.txt")
    return _Layout(kind, names, templates)


def _count_tars(folder, split):
    """The number of tars of a split, None if the folder is not in CLIP_benchmark's layout."""
    path = folder / split / "nshards.txt"
    if not path.is_file():
        return None
    count = " ".join(_read_lines(path))
    if not count.isdecimal() or int(count) == 0:
        raise ValueError(f"{path}: {count!r} instead of the number of tars")
    return int(count)


def _read_lines(path):
    """The lines of a text file, stripped, without blank ones; [] if there is no file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
