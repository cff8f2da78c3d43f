"""Sets to measure on: how a class is said in a sentence, which class a picture is of, and the layouts on disk.

    classes = read_classes("emoji groups")        # names and templates in each language, from prompts.json
    fill("{}{을/를} 찍은 사진", "사과")              # '사과를 찍은 사진'
    pairs, classes, lines = open_set(["cifar10/"], "cifar10")

Three layouts: CLIP_benchmark's (`test/nshards.txt`, `test/0.tar`, ... with KEY.cls or a KEY.txt of one caption a line,
beside `classnames.txt`, `zeroshot_classification_templates.txt` and `dataset_type.txt`), a folder of class folders, and
shards as data.py reads them.

What it leaves out: fetching sets, and pictures of several classes at once.
"""

import functools
import json
import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import data
from shards import IMAGES, Pair, Shard

LAYOUTS = ("nothing to measure on: give shards (tars, globs), a set in CLIP_benchmark's layout (FOLDER/{split}/nshards.txt; converted sets: "
           "huggingface.co/datasets/clip-benchmark, such as wds_vtab-cifar10), or one folder of class folders")
TEMPLATES = {"en": ["a photo of a {}."], "ko": ["{} 사진"]}   # where a folder has names of classes and no templates
RIEUL, VOWEL, OTHER = 8, 0, 1    # the last sound of a word; 8 is ㄹ's number among the final consonants of Hangul


# ------------------------------------------------------------------------------------------------------- prompts

def last_sound(word):
    """How a word ends when it is said in Korean: VOWEL, RIEUL (ㄹ), or OTHER for any other consonant.

    Hangul says so itself. Digits as they are read: 영 일 이 삼 사 오 육 칠 팔 구, and 십 백 천 만 all end in a consonant, as 영
    does. Latin letters by their names when they stand alone or all are capitals (L 엘, M 엠, N 엔, R 알); other words
    by their last letters: l and le are ㄹ (apple 애플); m, n, me, ne, ng and ck are consonants, and b, c, k, p, t after a vowel
    (cup 컵); the rest are vowels (car 카, bus 버스, desk 데스크).
    """
    letters = "".join(re.findall(r"[^\W_]", word))
    last = letters[-1:]
    if "가" <= last <= "힣":
        final = (ord(last) - ord("가")) % 28
        return final if final in (VOWEL, RIEUL) else OTHER
    if last.isdecimal():
        return {1: RIEUL, 7: RIEUL, 8: RIEUL, 0: OTHER, 3: OTHER, 6: OTHER}.get(int(last), VOWEL)
    latin = re.search("[A-Za-z]*$", letters)[0]
    if latin.isupper() or len(latin) == 1:
        return {"L": RIEUL, "R": RIEUL, "M": OTHER, "N": OTHER}.get(last.upper(), VOWEL)
    if re.search("le?$", latin.lower()):
        return RIEUL
    return OTHER if re.search("([mn]e?|ng|ck|[aeiouy][bckpt])$", latin.lower()) else VOWEL


def fill(template, name):
    """A prompt: name in the place of {} (CLIP_benchmark writes {c}), and each {after consonant/after vowel} behind it
    as the particle that the sound before it asks for; 으로/로 is 로 after ㄹ.

    fill("{}{이라는/라는} 것", "연필") is '연필이라는 것', fill("{}{으로/로}", "연필") '연필로'.
    """
    text = re.sub(r"\{c?\}", lambda _: name, template)
    while match := re.search(r"\{([^{}/]+)/([^{}/]+)\}", text):
        sound = last_sound(text[:match.start()])
        vowel = sound == VOWEL or sound == RIEUL and match[2].startswith("로")
        text = text[:match.start()] + match[2 if vowel else 1] + text[match.end():]
    return text


def spellings(name):
    """The ways to write a class's name: itself, or all of a list."""
    return [name] if isinstance(name, str) else name


def read_classes(name):
    """A set of prompts.json: {"name", "classnames": {language: [C names]}, "templates": {language: [...]}}. A name is text,
    or a list of spellings. "codepoints", where a set has it, is a text for each class: ranges of the first character, in
    hexadecimal, of the emoji that are in it. Raises ValueError when there is no such set."""
    sets = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))
    if name not in sets:
        raise ValueError(f"--classes {name}: prompts.json has {', '.join(sets)}")
    return {"name": name, **sets[name]}


# -------------------------------------------------------------------------------------------------------- labels

def label_of(pair, classes):
    """The class of a pair in a set as read_classes or open_set gives it, None where it is in none.

    The number in its .cls member; else, where the set has codepoints, the class of the emoji in its key; else the one
    class whose name its caption ends with, if no other class is named in it, both in English where the set has that.
    Raises ValueError when there is no class of that number.
    """
    names = classes["classnames"]
    language = "en" if "en" in names else next(iter(names))
    if "cls" in pair.members:
        text, count = pair.members["cls"].strip(), len(next(iter(names.values())))
        order = classes.get("order", range(count))
        if not text.isdigit() or int(text) >= len(order):
            raise ValueError(f"{pair.key}.cls: class {text.decode(errors='replace')!r}, where the set has {count}")
        return order[int(text)]
    if "codepoints" in classes:
        first = re.search(r"U\+([0-9A-F]+)", pair.key)
        return first and _in_ranges(int(first[1], 16), tuple(classes["codepoints"]))
    caption = f" {pair.captions.get(language, '')}".lower()
    words = [(i, f" {spelling.lower()}") for i, name in enumerate(names[language]) for spelling in spellings(name)]
    found = {i for i, word in words if word in caption}
    ends = {i for i, word in words if caption.endswith(word)}
    return found.pop() if len(found) == 1 and found == ends else None


@functools.lru_cache(None)
def _in_ranges(point, texts):
    """The number of the text one of whose ranges, '1F600-1F644 1F910', holds a code point; None when none does."""
    for number, text in enumerate(texts):
        for part in text.split():
            low, _, high = part.partition("-")
            if int(low, 16) <= point <= int(high or low, 16):
                return number


def labels_of(pairs, classes):
    """label_of for each of pairs: a list of numbers and None."""
    return [label_of(pair, classes) for pair in pairs]


def match_classes(found, names, what):
    """Which class each name found on disk is: found, a list of text, in the order of the numbers there; names, the C names
    of a set. Returns a list of numbers below C.

    Names match any spelling, in either case, underscores and punctuation as spaces. Where some match none (ImageNet's
    folders are called n01440764, ...), the order must be the set's: as many as there are classes, and those that do match
    in their own place, but for one in fifty (ImageNet has two missiles). Raises ValueError that names the first that is not.
    """
    places = {}
    for number, name in enumerate(names):
        for spelling in spellings(name):
            places.setdefault(_plain(spelling), []).append(number)
    options = [places.get(_plain(name), []) for name in found]
    if all(len(option) == 1 for option in options):
        return [option[0] for option in options]
    if len(found) != len(names):
        unknown = next(name for name, option in zip(found, options) if len(option) != 1)
        raise ValueError(f"{what}: {unknown} names no class of --classes, or several, and {len(found)} names are not its "
                         f"{len(names)}")
    astray = [number for number, option in enumerate(options) if option and number not in option]
    if 50 * len(astray) > sum(map(bool, options)):
        first = astray[0]
        raise ValueError(f"{what}: not all {len(found)} names are classes of --classes, and {found[first]} is number {first} "
                         f"here and {options[first][0]} there: the order cannot be trusted")
    return list(range(len(found)))


def _plain(name):
    return " ".join(re.sub(r"[\W_]+", " ", unicodedata.normalize("NFC", name).lower()).split())


def _language_of(names):
    """The language of names of classes: Korean where there is Hangul."""
    return "ko" if re.search("[가-힣]", unicodedata.normalize("NFC", "".join(names))) else "en"


# ------------------------------------------------------------------------------------------------------- layouts

class Folder:
    """The pictures in a folder and in all folders under it, sorted by name, addressable as data.Pairs are.

    A picture's class (.cls) is the number of the folder it lies in, of `names`, those directly under the root, sorted.
    Links are followed, what begins with a point is passed over. shards, sources, left_out: the files, as Pairs has its
    shards. Raises FileNotFoundError when there is no picture, OSError for a folder that cannot be read.
    """

    def __init__(self, root):
        self.root, self.shards, self.keys, self.left_out, seen = str(root), [], [], {}, set()
        for place, folders, files in os.walk(root, onerror=_give_up, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if os.path.realpath(place) in seen:  # a link to a folder above it
                folders.clear()
                continue
            seen.add(os.path.realpath(place))
            under = "" if place == self.root else os.path.relpath(place, root).replace(os.sep, "/") + "/"
            for name in sorted(files):
                if name.rpartition(".")[2].lower() in IMAGES and not name.startswith("."):
                    path = os.path.join(place, name)
                    status = os.stat(path) if os.path.exists(path) else os.lstat(path)
                    self.shards.append(Shard(path, status.st_size, status.st_mtime_ns, 1, {}, {}))
                    self.keys.append(os.fsencode(under + name).decode("utf-8", "replace"))  # names of old archives
        if not self.shards:
            raise FileNotFoundError(f"{root}: no pictures there ({', '.join(sorted(IMAGES))})")
        self.names = sorted({key.partition("/")[0] for key in self.keys if "/" in key})
        self.sources = [data.Source(self.root, 1.0, "", 0, len(self.keys), len(self.keys))]

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        """Read picture i. Raises IndexError, or ValueError("cause: what") when it cannot be read."""
        try:
            image = Path(self.shards[i].path).read_bytes()
        except OSError as error:
            raise ValueError(f"picture unreadable: {error}") from None
        name, slash, _ = self.keys[i].partition("/")
        members = {"cls": str(self.names.index(name)).encode()} if slash else {}
        return Pair(self.keys[i], image, {}, members, "no caption")


def _give_up(error):
    raise error


def holds_pictures(source):
    """Whether a source is a folder of pictures, and not one of shards. Raises ValueError when it is both."""
    folder = Path(source)
    if not source or not folder.is_dir():
        return False
    tar = next(folder.glob("*.tar"), None)
    some = (path for pattern in ("*.*", "*/*.*") for path in folder.glob(pattern) if path.suffix[1:].lower() in IMAGES)
    if tar and (picture := next(some, None)):
        raise ValueError(f"{folder} holds {tar.name} and {picture.relative_to(folder)}: shards or pictures? Give "
                         f"'{folder}/*.tar', or a folder of pictures alone")
    return not tar


class OpenSet(NamedTuple):
    """What open_set finds."""
    pairs: object    # data.Pairs or Folder
    classes: dict    # as read_classes has it, and "order": the class of each number on disk; None without classes
    lines: bool      # whether each line of a .txt is a caption of its own, as in CLIP_benchmark's retrieval sets


def open_set(sources, name=None, split="test"):
    """Open what --test or --train names: OpenSet.

    sources: shards as data.Pairs takes them, sets in CLIP_benchmark's layout (::LANGUAGE after either), or one folder of
    class folders. name: a set of prompts.json, which goes before the names and templates that lie there. Raises
    FileNotFoundError, or ValueError where names and numbers on disk do not fit the set's, sources have not the same
    classes, or pictures have several.
    """
    classes, shards, layouts = read_classes(name) if name else None, [], []
    for source in sources:
        folder, colons, options = source.partition("::")
        layouts.append(_read_layout(Path(folder), split))
        shards += ([f"{folder}/{split}/{number}.tar{colons}{options}" for number in range(layouts[-1].count)]
                   if layouts[-1] else [source])
        if (layouts[-1] and layouts[-1][1:]) != (layouts[0] and layouts[0][1:]):
            raise ValueError(f"{sources[0]} and {source} have not the same layout, classes and prompts: measure one at a time")
    where, layout = Path(sources[0].partition("::")[0]), layouts[0]
    try:
        pictures = layout is None and len(sources) == 1 and holds_pictures(sources[0])
        pairs = Folder(where) if pictures else data.Pairs(shards)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(error).partition(': ')[0]}: {LAYOUTS.format(split=split)}") from None
    found = pairs.names if pictures else layout and layout.names
    language = _language_of(found or ())
    if found and classes:
        language = language if language in classes["classnames"] else next(iter(classes["classnames"]))
        classes = {**classes, "order": match_classes(found, classes["classnames"][language], str(where))}
    elif found:
        classes = {"name": where.name, "classnames": {language: [text.replace("_", " ") for text in found]},
                   "templates": {language: layout and layout.templates or TEMPLATES[language]}}
    return OpenSet(pairs, classes, bool(layout and layout.kind == "retrieval"))


class _Layout(NamedTuple):
    """What lies beside the tars of one of CLIP_benchmark's sets."""
    count: int
    kind: str
    names: list
    templates: list


def _read_layout(folder, split):
    """The _Layout of a folder, None when it has none."""
    path = folder / split / "nshards.txt"
    if not path.is_file():
        return None
    count = " ".join(_lines(path))
    if not count.isdecimal() or not int(count):
        raise ValueError(f"{path}: {count!r}, where the number of tars should stand")
    kind = " ".join(_lines(folder / "dataset_type.txt")).lower()
    if kind == "multilabel":
        raise ValueError(f"{folder}: pictures of several classes at once, which are not measured here")
    return _Layout(int(count), kind, *(_lines(folder / f"{name}.txt") for name in (
        "classnames", "zeroshot_classification_templates")))


def _lines(path):
    """The lines of a text file that are not blank, stripped; [] where there is none."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None
