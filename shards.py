"""What lies on disk: WebDataset tars, the index that says where each of their pairs is, captions, pictures.

A tar is walked once and the places of its pairs go into an index, one for each folder; after that a pair is one
read of a known length at a known place, and its members are found inside. data.py makes one long array of all
shards, and the batches of a run; packing.py makes shards and checks them.

What it leaves out: shards on other machines, compressed tars, and pictures larger than memory.
"""

import collections
import contextlib
import functools
import glob
import hashlib
import html
import io
import json
import multiprocessing
import os
import re
import tarfile
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from kelip import to_rgb

BLOCK = 512                      # a tar's unit, bytes
MAX_PAIR = 64 << 20              # bytes; a larger pair is left out
MAX_PIXELS = 89_478_485          # of a picture, a quarter of a gigabyte as RGB; Pillow's own limit
INDEX_PIECE = 256                # shards that are indexed before the index is written
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
            known.update(zip(piece, map_processes(index_tar, piece, workers, title)))
            for place in _index_places(folder):
                with contextlib.suppress(OSError):
                    known.update(_write_index(place, known))
                    break
        result.update((path, known[path]) for path in members)
    return [result[path] for path in paths]


def map_processes(function, items, workers, title):
    """list(map(function, items)) over processes, with a bar when it takes more than a moment."""
    bar = dict(total=len(items), desc=title, delay=2, leave=False)
    if workers < 2 or len(items) < 2:
        return list(tqdm(map(function, items), **bar))
    with multiprocessing.Pool(min(workers, len(items))) as pool:
        return list(tqdm(pool.imap(function, items), **bar))


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


# --- Pairs --------------------------------------------------------------------------------------------------

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


# --- Pictures -----------------------------------------------------------------------------------------------

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
            return to_rgb(image)
        except Image.DecompressionBombError as error:
            raise ValueError(f"too many pixels: {error}") from None
        except Image.UnidentifiedImageError:
            raise ValueError(f"not an image: {len(data):,} bytes of no format that is read") from None
        except Exception as error:  # what decoders raise on broken bytes is not limited to OSError
            raise ValueError(f"not an image: {error}") from None
