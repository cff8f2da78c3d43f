"""Classes to evaluate on: names and prompts in two languages, labels, and sets on disk.

    classes = read_classes("cifar10")          # names and prompt templates, from prompts.json
    format_prompt("{}{을/를} 찍은 사진", "사과")   # '사과를 찍은 사진', "a photo of an apple"
    pairs, classes = open_set(["wds_vtab-cifar10"], "cifar10")
    labels = labels_of(pairs, classes)         # [6, 9, 9, ...], None for a pair without a class

From top to bottom: prompts and their Korean particles, the class of a pair, class names on disk,
and opening a set. A set is shards as data.py reads them, or a folder in CLIP_benchmark's layout:

    wds_vtab-cifar10/classnames.txt                          one per line, class 0 first: airplane
                     zeroshot_classification_templates.txt   one per line: a photo of a {c}. ...
                     dataset_type.txt                        "retrieval" for a set of captions
                     test/nshards.txt                        the number of tars
                     test/0.tar, test/1.tar, ...             KEY.cls in them is a class's number

Not included: downloading sets, and images that have several classes.
"""

import functools
import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import data
from command import one_line
from tokenizer import not_utf8, read_file, read_json

# For class names on disk without templates.
DEFAULT_TEMPLATES = {"en": ["a photo of a {}."], "ko": ["{} 사진"]}

MAX_NAME = 1000  # characters of a class name or of a template
PLACE = re.compile(r"\{c?\}")  # of the name in a template
CODE_POINTS = re.compile("[0-9A-F]{1,6}(-[0-9A-F]{1,6})?")


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
    word = unicodedata.normalize("NFC", word)  # macOS spells Hangul in parts of a syllable
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
    text = PLACE.sub(lambda _: name, template)
    prompt, end = "", 0
    for particle in re.finditer(r"\{([^{}/]+)/([^{}/]+)\}", text):
        prompt += text[end:particle.start()]
        after_consonant, after_vowel = particle.groups()
        sound = last_sound(prompt[-100:])  # a bound, since a template may have many particles
        is_vowel = sound == VOWEL or (sound == RIEUL and after_vowel.startswith("로"))
        prompt += after_vowel if is_vowel else after_consonant
        end = particle.end()
    return prompt + text[end:]


def spellings(name):
    """The spellings of a class as a list. prompts.json has one text or several for each class."""
    return [name] if isinstance(name, str) else name


def read_classes(name):
    """A set of prompts.json: a dict with

        name: the name of the set
        classnames: {language: [C names]}, each a text or a list of spellings
        templates: {language: [templates for format_prompt]}
        codepoints: only in sets of emoji: the code points of each class, "1F600-1F644 1F910"

    Raises ValueError when there is no such set, or when it does not have this form.
    """
    path = Path(__file__).with_name("prompts.json")
    sets = read_json(path)
    if name not in sets:
        raise ValueError(f"--classes {name}: prompts.json has {one_line(', '.join(sets))}")
    error = _error_in_set(sets[name])
    if error:
        raise ValueError(f"{path}: {name}: {error}")
    keys = ("classnames", "templates", "codepoints")
    return {"name": name, **{key: sets[name][key] for key in keys if key in sets[name]}}


def _error_in_set(found):
    """What is wrong with a set of prompts.json, in words; None if nothing is."""
    for key in ("classnames", "templates"):
        if not isinstance(found, dict) or not isinstance(found.get(key), dict) or not found[key]:
            return f'"{key}" is not of the form {{"en": [...], "ko": [...]}}'
    counts = {}
    for language, names in found["classnames"].items():
        if not isinstance(names, list) or not names:
            return f'"classnames" has no list for {language!r}'
        for label, spelled in enumerate(names):
            if not _are_texts(spellings(spelled)):
                return (f"class {label} in {language!r} is not a name of at most {MAX_NAME:,} "
                        "characters, or a list of spellings")
        templates = found["templates"].get(language)
        if not _are_texts(templates) or not all(map(PLACE.search, templates)):
            return (f'"templates" has no list such as ["a photo of a {{}}."] for {language!r}, '
                    "each with {} for the name")
        counts[language] = len(names)
    if "codepoints" in found:
        ranges = found["codepoints"]
        if not _are_texts(ranges) or not all(map(CODE_POINTS.fullmatch, " ".join(ranges).split())):
            return '"codepoints" is not a list such as ["1F600-1F644 1F910", ...]'
        counts["codepoints"] = len(ranges)
    if len(set(counts.values())) > 1:
        counts = ", ".join(f"{count} in {key!r}" for key, count in counts.items())
        return f"the numbers of classes differ: {counts}"
    return None


def _are_texts(value):
    """Whether a value is a list of one or more texts that are not too long."""
    return isinstance(value, list) and len(value) > 0 and all(
        isinstance(text, str) and len(text) <= MAX_NAME for text in value)


# ---- labels ----

def label_of(pair, classes):
    """The class of a pair, an int below C, or None if it has none.

    classes: as read_classes or open_set returns them. The class is the first of these that applies:

    - if the pair has a .cls member, the number in it,
    - if the set has code points, the class of the emoji in the pair's key,
    - the class whose name ends the caption ("a red apple": apple), if the caption names no other
      class. The English caption is read if the set has English names.

    Raises ValueError("bad .cls: details") when .cls is not the number of a class.
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
        for spelling in filter(None, spellings(name)):  # a name may be empty
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
    if not re.fullmatch(rb"\d{1,18}", text) or int(text) >= len(order):
        reason = "bad .cls"
        if text == str(len(order)).encode():
            reason += " (one above the last, as numbers begin at 0)"
        raise ValueError(f"{reason}: {pair.key}: class {text[:20].decode(errors='replace')!r}, but "
                         f"the set has {len(order)}, from 0 to {len(order) - 1}")
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


def labels_of(pairs, classes, skipped=None):
    """label_of for each pair: a list of int and None.

    A bad .cls also makes it None. skipped: a Counter, to which these are added.
    """
    labels = []
    for pair in pairs:
        try:
            labels.append(label_of(pair, classes))
        except ValueError as error:
            labels.append(None)
            if skipped is not None:
                skipped[str(error).partition(":")[0]] += 1
    return labels


# ---- names on disk ----

def match_classes(found, names, what):
    """The class of each name on disk: a list of int below C, one for each of `found`.

    found: the names on disk, in order. names: the C names of a set of prompts.json. what: the file
    or folder, for errors.

    A name matches a class if it is one of its spellings, whatever the case and punctuation. If some
    names match no class (ImageNet's n01440764), all are taken to be in the order of the set. There
    must then be as many as classes, and those that match must be in the right place, except for one
    in fifty: ImageNet has two classes called missile. Raises ValueError otherwise.
    """
    labels = {}
    for label, name in enumerate(names):
        for spelling in spellings(name):
            labels.setdefault(_plain(spelling), []).append(label)
    matches = [labels.get(_plain(name), []) for name in found]
    if all(len(match) == 1 for match in matches):
        return [match[0] for match in matches]

    if len(found) != len(names):
        number = next(number for number, match in enumerate(matches) if len(match) != 1)
        unmatched = one_line(found[number]) or f"line {number + 1}, which is blank,"
        raise ValueError(f"{what}: {unmatched} names no class of --classes, or several, and there "
                         f"are {len(found)} names for {len(names)} classes")
    matched = [number for number, match in enumerate(matches) if match]
    misplaced = [number for number in matched if number not in matches[number]]
    if 50 * len(misplaced) > len(matched):
        first = misplaced[0]
        raise ValueError(f"{what}: some names are no classes of --classes, and "
                         f"{one_line(found[first])} is number {first} here but {matches[first][0]} "
                         "in --classes: the order cannot be trusted")
    return list(range(len(found)))


def _plain(name):
    """A name in lower case, with single spaces between words and no punctuation."""
    words = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFC", name).lower())
    return words.strip()


# ---- sets ----

class EvaluationSet(NamedTuple):
    """A set to evaluate on.

    classes: as read_classes returns them, or None. They may also have "order", the class of each
    number on disk.
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

    Raises FileNotFoundError when there are no shards, ValueError when options are unknown, names on
    disk do not fit the set, or sources differ in layout or classes.
    """
    classes = read_classes(name) if name else None
    shards, layouts = [], []
    for source in sources:
        try:
            data.parse_source(source)
        except ValueError as error:
            raise ValueError(f"--{split} {error}") from None
        folder, colons, options = source.partition("::")
        if is_benchmark(source, split):
            folder = os.path.expanduser(folder)
            layouts.append(_read_layout(Path(folder)))
            if layouts[-1].kind == "retrieval":  # each line of a .txt is a caption
                options += "::lines"
            tars = [f"{folder}/{split}/{i}.tar" for i in _tar_numbers(Path(folder, split))]
            shards += [f"{tar}{colons}{options}" for tar in tars]
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

    layout, folder = layouts[0], _folder_of(sources[0])
    if layout and layout.names:
        classes = _classes_on_disk(folder, layout, classes)
    return EvaluationSet(pairs, classes)


def is_benchmark(source, split="test"):
    """Whether a source, as open_set takes it, is a folder in CLIP_benchmark's layout."""
    return (_folder_of(source) / split / "nshards.txt").is_file()


def _folder_of(source):
    """The path in a source, without ::LANGUAGE."""
    return Path(os.path.expanduser(source.partition("::")[0]))


def _classes_on_disk(folder, layout, classes):
    """The classes of a folder in CLIP_benchmark's layout.

    classes: a set of prompts.json to use instead, which gets the "order" of the names on disk.
    """
    has_hangul = re.search("[가-힣]", unicodedata.normalize("NFC", "".join(layout.names)))
    language = "ko" if has_hangul else "en"
    if classes is None:
        return {"name": folder.resolve().name,
                "classnames": {language: layout.names},
                "templates": {language: layout.templates or DEFAULT_TEMPLATES[language]}}
    if language not in classes["classnames"]:
        language = next(iter(classes["classnames"]))
    order = match_classes(layout.names, classes["classnames"][language], str(folder))
    return {**classes, "order": order}


class _Layout(NamedTuple):
    """The text files of a folder in CLIP_benchmark's layout.

    A class's number is that of its line. The name of a blank line is empty, as in CLIP_benchmark's
    own clevr_closest_object_distance.
    """
    kind: str  # "retrieval" for sets of captions
    names: list
    templates: list


def _read_layout(folder):
    """The _Layout of a folder. Raises ValueError when its images have several classes, or a
    template has no place for the name.
    """
    kind = " ".join(_read_lines(folder / "dataset_type.txt")).strip().lower()
    if kind == "multilabel":
        raise ValueError(f"{folder}: images have several classes there, which is not supported")
    names = _read_lines(folder / "classnames.txt")
    path = folder / "zeroshot_classification_templates.txt"
    templates = _read_lines(path)
    for number, template in enumerate(templates, 1):
        if template and not PLACE.search(template):  # a blank one counts, as in CLIP_benchmark
            raise ValueError(f"{path}: line {number}, {template[:100]!r}, has no {{c}} for the "
                             "name")
    return _Layout(kind, names, templates)


def _tar_numbers(folder):
    """The numbers of the tars of a split: range(n), where its nshards.txt has n."""
    path = folder / "nshards.txt"
    count = " ".join(_read_lines(path)).strip()
    if not re.fullmatch("[0-9]{1,18}", count) or int(count) == 0:
        raise ValueError(f"{path}: {count[:100]!r} instead of the number of tars")
    for number in range(int(count)):
        if not (folder / f"{number}.tar").is_file():
            raise FileNotFoundError(f"{folder}/{number}.tar: missing; nshards.txt there says that "
                                    f"there are {int(count):,} tars")
    return range(int(count))


def _read_lines(path):
    """The lines of a text file, stripped, as CLIP_benchmark reads them; [] if there is no file."""
    if not path.exists():
        return []
    content = read_file(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: {not_utf8(content)}") from None
    lines = [line.strip() for line in text.splitlines()]
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_NAME:
            raise ValueError(f"{path}: line {number} has {len(line):,} characters, and at most "
                             f"{MAX_NAME:,} are read")
    return lines
