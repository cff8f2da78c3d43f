"""Pairs on disk: WebDataset tars, their index, captions, and decoding of images.

    paths = expand_pattern("data/emoji/train-{0..7}.tar")
    shard = index_shards(paths)[0]                      # walks the tar once, then reads the index
    with open(shard.path, "rb") as file:
        pair = read_pair(file, shard.path, shard_rows(shard)[0])
    pair.captions                                       # {"en": "red apple", "ko": "빨간 사과"}
    decode(pair.image)                                  # a PIL image in RGB

A shard is a tar as img2dataset writes it: `000001.jpg` with `000001.txt`, or with `000001.en.txt`
and `000001.ko.txt`, or with a `000001.json` that has a "caption". Consecutive members with the same
key, `000001`, form a pair. The index says where each pair begins and how long it is, so that a
single read gets any pair.

From top to bottom: tars, the index, patterns that name shards, pairs and their captions, decoding.
data.py makes one array of all pairs, and the batches of a run. extras/pack.py makes shards from
images, and checks shards.

Not included: shards on other machines, compressed tars, and images larger than memory.
"""

import collections
import contextlib
import functools
import glob
import hashlib
import html
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import tarfile
import tempfile
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from kelip import atomic_write, ceil_div, to_rgb

BLOCK = 512                      # bytes; the unit of a tar
MAX_PAIR = 64 << 20              # bytes; larger pairs are skipped
MAX_PIXELS = 89_478_485          # of one image, a quarter of a gigabyte as RGB; Pillow's own limit
INDEX_CHUNK = 256                # shards to walk before the index is written
INDEX_FORMAT = "pairs 1"
IMAGE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm"}
# The image formats that Pillow may open. Not EPS, for which it would run another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]+)*")
PACK = "make shards of {} with `python -m extras.pack images OUT {}`"


# ---- tars ----

def walk_tar(read, start, end):
    """Walk the regular files of a tar: yields (name, first_header, body, size) for each.

    first_header and body are the offsets of its first header and of its bytes. read(size, offset)
    returns bytes, like os.pread. Handles the long names of ustar, GNU and pax.

    Raises ValueError("damaged tar: ...") or ValueError("truncated tar: ..."). The files that were
    yielded before are complete.
    """
    offset = first_header = start
    long_name = None
    while offset + BLOCK <= end:
        header = read(BLOCK, offset)
        if not header.strip(b"\0"):  # a block of zeros ends the tar
            return
        size = _read_size(header, offset)
        kind = header[156:157]
        body = offset + BLOCK
        offset = body + ceil_div(size, BLOCK) * BLOCK
        if body + size > end:
            raise ValueError(f"truncated tar: it ends inside the file at byte {body}")
        if kind in b"Lx" and size <= 64 * BLOCK:  # the name of the file that follows
            long_name = _read_long_name(kind, read(size, body)) or long_name
            continue
        if kind in (b"0", b"\0", b"7"):  # a regular file
            name = long_name or _read_name(header)
            yield name.decode("utf-8", "backslashreplace"), first_header, body, size
        first_header = offset
        long_name = None


def _read_size(header, offset):
    """The size of a file, from its header. Raises ValueError when the checksum is wrong."""
    try:
        checksum = int(header[148:156].split(b"\0")[0], 8)
        if header[124] & 0x80:  # GNU's way to write sizes of 8 GB and more
            size = int.from_bytes(header[125:136], "big")
        else:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
    except (ValueError, IndexError):
        checksum, size = -1, 0
    # The checksum is computed as if its own eight bytes were spaces.
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise ValueError(f"damaged tar: no header at byte {offset}")
    return size


def _read_name(header):
    """The name of a file, from its header. ustar puts the start of a long name in a prefix."""
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and prefix:
        return prefix + b"/" + name
    return name


def _read_long_name(kind, record):
    """The name in a GNU (L) or pax (x) record, or None."""
    if kind == b"L":
        return record.rstrip(b"\0")
    match = re.search(rb"\d+ path=([^\n]*)\n", record)
    return match and match[1]


def split_name(name):
    """Split a member's name into key and suffix: 'a/0001.en.txt' -> ('a/0001', 'en.txt').

    The key ends at the first dot after the last slash, as in WebDataset. Returns None if the key or
    the suffix is empty. Keys are never used as paths.
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem or not suffix:
        return None
    return folder + slash + stem, suffix.lower()


def write_shard(path, pairs):
    """Write (key, {suffix: bytes}) pairs to a tar. The same pairs always give the same bytes."""
    try:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in pairs:
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    except OSError as error:  # a full disk is an error without a path
        raise OSError(error.errno, error.strerror, path) from None


@contextlib.contextmanager
def new_folder(out, replaceable=""):
    """A temporary folder that becomes `out` when the block ends, and is deleted if it raises.

    `out` is replaced if the names of all files in it match the regular expression `replaceable`.
    Otherwise raises FileExistsError.
    """
    for name in os.listdir(out) if os.path.isdir(out) else []:
        if not re.fullmatch(replaceable, name):
            raise FileExistsError(f"{out} is not empty, it holds {name}: name a new folder")
    temporary = f"{out.rstrip('/')}.{os.getpid()}.part"
    os.makedirs(temporary)
    try:
        yield temporary
        shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- the index ----

class Shard(NamedTuple):
    """What the index knows of one tar."""
    path: str
    size: int            # bytes
    mtime: int           # time of last change, nanoseconds
    count: int           # pairs
    languages: dict      # language -> number of captions; "" for those whose name has none
    skipped: dict        # reason -> number of pairs or members that are not in the index
    first_row: int = 0   # where its rows begin in rows_file, which several shards share
    rows_file: str = ""  # "" for a shard that is missing


def index_tar(path):
    """Find the pairs of one tar: (Shard, rows). The rows are not on disk yet.

    rows: uint32 [count, 2], the first block and the number of bytes of each pair, in order.

    A pair is consecutive members with the same key, one of them an image. Keys without an image,
    keys that occur again and everything after a damaged place are skipped, and counted in
    Shard.skipped.
    """
    rows = []
    languages, skipped = collections.Counter(), collections.Counter()
    seen = set()
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        read = functools.partial(os.pread, file.fileno())
        for key, start, end, suffixes in _walk_pairs(read, status.st_size, skipped):
            if key in seen:
                skipped["duplicate key"] += 1
            elif not IMAGE_SUFFIXES & suffixes:
                skipped["no image"] += 1
            elif end - start > MAX_PAIR:
                skipped["pair too large"] += 1
            else:
                rows.append((start // BLOCK, end - start))
                named = {caption_language(suffix) for suffix in suffixes} - {None}
                if not named and "json" in suffixes:
                    named = {""}  # the caption is in the .json
                languages.update(named)
            seen.add(key)
    shard = Shard(path, status.st_size, status.st_mtime_ns, len(rows), dict(languages),
                  dict(skipped))
    return shard, np.array(rows, np.uint32).reshape(-1, 2)


def _walk_pairs(read, size, skipped):
    """Walk a tar of `size` bytes: yields (key, start, end, suffixes) for consecutive equal keys.

    Counts in `skipped` what it cannot use, and stops at a damaged place.
    """
    key, start, end, suffixes = None, 0, 0, set()
    try:
        for name, header, body, length in walk_tar(read, 0, size):
            parts = split_name(name)
            if parts is None:
                skipped["member without a key"] += 1
                continue
            member_key, suffix = parts
            if member_key != key:
                if suffixes:
                    yield key, start, end, suffixes
                key, start, suffixes = member_key, header, set()
            elif suffix in suffixes:
                skipped["duplicate key"] += 1
            suffixes.add(suffix)
            end = body + length
        if end + BLOCK > size:  # a complete tar ends with blocks of zeros
            skipped["truncated tar"] += 1
    except ValueError as error:
        skipped[str(error).partition(":")[0]] += 1
    if suffixes:
        yield key, start, end, suffixes


def index_shards(paths, workers=0):
    """The Shard of each path. Walks tars that are new or have changed, and writes the index.

    A folder's index is pairs.index in it. If the folder is read-only, the index goes into
    ~/.cache/kelip. If that cannot be written either, it goes into a temporary folder, which is
    deleted when the process ends. workers: processes that walk tars.
    """
    by_folder = collections.defaultdict(list)
    for path in dict.fromkeys(paths):
        by_folder[os.path.dirname(path)].append(path)
    result = {}
    for folder, members in by_folder.items():
        known = {}
        for index_file in reversed(_index_files(folder)):
            known.update(_read_index(index_file, folder))
        changed = []
        for path in members:
            status = os.stat(path)
            shard = known.get(path)
            if not shard or (shard.size, shard.mtime) != (status.st_size, status.st_mtime_ns):
                changed.append(path)
        # The index is written after each chunk, so that an interruption loses one chunk at most.
        for first in range(0, len(changed), INDEX_CHUNK):
            chunk = changed[first:first + INDEX_CHUNK]
            title = f"index, {first:,} of {len(changed):,} shards done"
            walked = map_processes(index_tar, chunk, workers, title)
            known.update(_save_rows(folder, known, walked))
        result.update((path, known[path]) for path in members)
    return [result[path] for path in paths]


def shard_rows(shard):
    """The rows of a shard, uint32 [count, 2], memory-mapped."""
    if not shard.count:
        return np.empty((0, 2), np.uint32)
    return np.memmap(shard.rows_file, np.uint32, "r", offset=8 * shard.first_row,
                     shape=(shard.count, 2))


def write_index(path, shards, rows):
    """Write a folder's index: a file of new rows, then the table of all shards.

    path: the index file. shards: {path: Shard}, all shards of the folder. rows: {path: uint32
    [count, 2]} of shards that are new or have changed. Returns {path: Shard} of these, with
    first_row and rows_file set.

    New rows always go into a new file, and both files are written atomically: a process that has
    read the old index can keep using it.
    """
    folder = os.path.dirname(path)
    os.makedirs(folder or ".", exist_ok=True)
    content = b"".join(one.tobytes() for one in rows.values())
    digest = hashlib.sha256(content).hexdigest()[:12]
    rows_file = os.path.splitext(path)[0] + f"-{digest}.rows"
    written, first_row = {}, 0
    for name, one in rows.items():
        written[name] = shards[name]._replace(first_row=first_row, rows_file=rows_file)
        first_row += len(one)

    table = {"format": INDEX_FORMAT}
    for shard in sorted({**shards, **written}.values()):
        if os.path.exists(shard.path):
            *fields, shard_rows_file = shard[1:]
            fields.append(os.path.relpath(shard_rows_file, folder))
            table[os.path.basename(shard.path)] = fields
    for name, data in ((rows_file, content), (path, json.dumps(table).encode())):
        with atomic_write(name) as file:
            file.write(data)
    return written


def _index_files(folder):
    """Where the index of a folder may be: in the folder, or at home if the folder is read-only."""
    digest = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:16]
    return [os.path.join(folder, "pairs.index"),
            os.path.expanduser(f"~/.cache/kelip/{digest}.index")]


@functools.cache
def _temporary_folder():
    """A folder for indexes that cannot be written elsewhere. Deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="kelip-")


def _save_rows(folder, known, walked):
    """Write the results of index_tar, `walked`, into the first index file that can be written.

    known: {path: Shard}, the shards of the folder so far. Returns {path: Shard} of those walked.
    """
    shards = {**known, **{shard.path: shard for shard, _ in walked}}
    rows = {shard.path: one for shard, one in walked}
    for index_file in _index_files(folder):
        with contextlib.suppress(OSError):
            return write_index(index_file, shards, rows)
    name = os.path.basename(_index_files(folder)[-1])  # differs from folder to folder
    return write_index(os.path.join(_temporary_folder().name, name), shards, rows)


def _read_index(path, folder):
    """{path: Shard} of an index file; {} when it does not exist or is damaged.

    Leaves out shards whose rows are not on disk any more.
    """
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file)
        if table.pop("format") != INDEX_FORMAT:
            return {}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}
    shards = []
    for name, (*fields, rows_file) in table.items():
        rows_file = os.path.join(os.path.dirname(path), rows_file)
        shards.append(Shard(os.path.join(folder, name), *fields, rows_file))
    sizes = {}
    for rows_file in {shard.rows_file for shard in shards}:
        sizes[rows_file] = os.path.getsize(rows_file) if os.path.exists(rows_file) else -1
    return {shard.path: shard for shard in shards
            if sizes[shard.rows_file] >= 8 * (shard.first_row + shard.count)}


def map_processes(function, items, workers, title):
    """list(map(function, items)), in processes. Shows a progress bar after two seconds."""
    bar = dict(total=len(items), desc=title, delay=2, leave=False)
    if workers < 2 or len(items) < 2:
        return list(tqdm(map(function, items), **bar))
    with multiprocessing.Pool(min(workers, len(items))) as pool:
        return list(tqdm(pool.imap(function, items), **bar))


# ---- patterns that name shards ----

def expand_pattern(pattern, partial=False):
    """The tars that a pattern names, in order.

    A pattern is a path, a folder of tars or a glob, and may have braces: {000..012}, {a,b}. Raises
    FileNotFoundError when there are none or one of a range is missing, unless `partial`.
    """
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace:
        before, after = pattern[:brace.start()], pattern[brace.end():]
        paths = []
        for option in _brace_options(brace[1]):
            paths += expand_pattern(before + option + after, partial)
        return paths
    if os.path.isdir(pattern):
        paths = sorted(glob.glob(os.path.join(glob.escape(pattern), "*.tar")))
    elif glob.has_magic(pattern) and not os.path.exists(pattern):
        paths = sorted(glob.glob(pattern))
    else:
        paths = [pattern] if os.path.exists(pattern) else []
    tables = [path for path in paths if path.lower().endswith((".csv", ".tsv"))]
    if tables:
        raise FileNotFoundError(
            f"{tables[0]}: a table, not shards; {PACK.format('its images', tables[0])}")
    if not paths and not partial:
        if _holds_images(pattern):
            raise FileNotFoundError(
                f"{pattern}: images, not shards; {PACK.format('them', pattern)}")
        raise FileNotFoundError(
            f"{pattern}: no shards there; name tars, folders, globs or brace ranges")
    return paths


def _brace_options(text):
    """The texts that braces stand for: '08..10' -> ['08', '09', '10'], 'a,b' -> ['a', 'b']."""
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not numbers:
        return text.split(",")
    first, last = numbers.groups()
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def _holds_images(folder):
    """Whether there are images in a folder or in its subfolders."""
    folder = glob.escape(folder)
    paths = itertools.chain(glob.iglob(f"{folder}/*"), glob.iglob(f"{folder}/*/*"))
    return any(path.rpartition(".")[2].lower() in IMAGE_SUFFIXES for path in paths)


# ---- pairs and captions ----

class Pair(NamedTuple):
    """One pair as it is on disk."""
    key: str
    image: bytes
    captions: dict   # language -> text, cleaned; "" for a caption whose name has no language
    members: dict    # suffix -> bytes, all members with this key
    error: str       # why there is no caption, "" if there is one


def read_pair(file, path, row, language=""):
    """Read the pair at a row of the index from an open tar.

    language: the language of captions whose name has none. Raises ValueError("reason: details")
    when the pair cannot be read or is no longer there.
    """
    start, length = int(row[0]) * BLOCK, int(row[1])
    try:
        data = os.pread(file.fileno(), length, start)
    except OSError as error:
        raise ValueError(f"shard unreadable: {path}: {error.strerror}") from None
    if len(data) < length:
        raise ValueError(f"shard changed: {path} is shorter than when it was indexed")

    def read(size, offset):
        return data[offset - start:offset - start + size]

    key, members = None, {}
    for name, _, body, size in walk_tar(read, start, start + length):
        member_key, suffix = split_name(name) or (None, None)
        key = key or member_key
        if key and member_key == key:
            members.setdefault(suffix, read(size, body))
    image = next((members[suffix] for suffix in members if suffix in IMAGE_SUFFIXES), None)
    if image is None:
        raise ValueError(f"shard changed: {path} no longer has the pair at byte {start}")
    captions, error = read_captions(members, language)
    return Pair(key, image, captions, members, error)


def caption_language(suffix):
    """The language in a suffix: 'ko.txt' -> 'ko', 'txt' -> '', 'jpg' -> None (not a caption)."""
    if suffix == "txt":
        return ""
    language, _, extension = suffix.rpartition(".")
    return language if extension == "txt" and LANGUAGE.fullmatch(language) else None


def clean_caption(text):
    """Decode HTML entities, collapse white space: "Tom &amp;amp; \\n Jerry" -> "Tom & Jerry"."""
    return " ".join(html.unescape(html.unescape(text)).split())


def read_captions(members, language=""):
    """The captions of a pair: ({"ko": "사과"}, ""), or an error, such as ({}, "empty caption").

    members: suffix -> bytes. Reads txt and LANGUAGE.txt, or the caption in json if there are none.
    language: the language of captions whose name has none.
    """
    texts = {}
    for suffix, data in members.items():
        own_language = caption_language(suffix)
        if own_language is not None:
            texts[own_language or language] = data
    if not texts and "json" in members:
        try:
            record = json.loads(members["json"])
        except ValueError:
            return {}, "bad json"
        if isinstance(record, dict) and isinstance(record.get("caption"), str):
            texts[language] = record["caption"].encode("utf-8", "surrogatepass")
    captions, error = {}, "no caption"
    for own_language, data in texts.items():
        try:
            text = clean_caption(data.decode("utf-8-sig"))
        except UnicodeDecodeError:
            error = "caption not UTF-8"
            continue
        if text:
            captions[own_language] = text
        else:
            error = "empty caption"
    return captions, "" if captions else error


def caption_lines(pair):
    """The captions of a pair that has one a line, as in CLIP_benchmark's retrieval sets.

    Returns [(language, text)].
    """
    found = []
    for language, caption in pair.captions.items():
        data = pair.members.get(f"{language}.txt", pair.members.get("txt"))
        lines = [caption]  # from a json, when there is no .txt
        if data is not None:
            lines = data.decode("utf-8-sig").splitlines()
        found += [(language, clean_caption(line)) for line in lines if line.strip()]
    return found


def format_counts(counts):
    """Counts as text, sorted by name: {"en": 1234, "": 5} -> "5 unnamed, 1,234 en"."""
    return ", ".join(f"{count:,} {name or 'unnamed'}" for name, count in sorted(counts.items()))


# ---- decoding ----

def decode(data, min_side=None):
    """Decode the bytes of an image to a PIL image in RGB (see kelip.to_rgb).

    min_side: pixels of the longer side that are enough. A JPEG is then decoded at 1/2, 1/4 or 1/8
    of its size if possible, which is much faster. Raises ValueError("reason: details") when the
    bytes are not an image, are cut short, or have more than MAX_PIXELS pixels.
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
                scale = min_side / max(image.size)
                size = tuple(max(1, int(side * scale)) for side in image.size)
                image.draft(None, size)  # only JPEG has a draft mode
            image.load()
            return to_rgb(image)
        except Image.DecompressionBombError as error:
            raise ValueError(f"too many pixels: {error}") from None
        except Image.UnidentifiedImageError:
            formats = ", ".join(FORMATS)
            raise ValueError(f"not an image: {len(data):,} bytes, none of {formats}") from None
        except Exception as error:  # on broken bytes, decoders raise errors of many kinds
            raise ValueError(f"not an image: {error}") from None
