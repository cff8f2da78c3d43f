"""Pairs on disk: WebDataset tars, their index, captions, and decoding of images.

    paths = expand_pattern("data/emoji/train-{0..7}.tar")
    shard = index_shards(paths)[0]                      # walks the tar once, then reads the index
    with open(shard.path, "rb") as file:
        pair = read_pair(file, shard.path, shard_rows(shard)[0])
    pair.captions                                       # {"en": ["red apple"], "ko": ["빨간 사과"]}
    decode(pair.image)                                  # a PIL image in RGB

A shard is a tar as img2dataset writes it: `000001.jpg` with `000001.txt`, or with `000001.en.txt`
and `000001.ko.txt`, or with a `000001.json` that has a "caption". Consecutive members with the same
key, `000001`, form a pair. CaptionRule says what else may be a caption. The index says where each
pair begins and how long it is, so that a single read gets any pair.

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
import signal
import stat
import sys
import tarfile
import tempfile
import warnings
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, features
from tqdm import tqdm

from command import one_line
from kelip import ceil_div, to_rgb
from tokenizer import atomic_write

BLOCK = 512                      # bytes; the unit of a tar
SCAN = 1 << 20                   # bytes to read at once where there is no header
MAX_PAIR = 64 << 20              # bytes; larger pairs are skipped
MAX_JSON = 1 << 20               # bytes; larger .json members are not read
MAX_FIELDS = 256                 # names of fields that the index counts, of one shard,
MAX_FIELD_NAME = 64              # and their characters; an option of --data may name others
MAX_SHARDS = 10_000_000          # that one pattern may name
MAX_PIXELS = 89_478_485          # of one image, a quarter of a gigabyte as RGB; Pillow's own limit
MAX_SCANS = 1000                 # of a progressive JPEG, which usually has about ten
MAX_SCANNED = 1_000_000_000      # pixels of all its scans
MAX_READS = 100_000              # of parts of an image, which usually has less than a thousand
MAX_CAPTION = 1_000_000          # characters of a caption that are read
MAX_INDEX = 1 << 30              # bytes of an index file
INDEX_CHUNK = 256                # shards to walk before the index is written
INDEX_FORMAT = "pairs 3"
OCTAL = re.compile(b"[0-7]+")
IMAGE_SUFFIXES = {"jpg", "jpeg", "jfif", "png", "webp", "avif", "gif", "bmp", "tif", "tiff"}
# The image formats that Pillow may open. Not EPS, for which it would run another program, and not
# PPM, some of which it decodes in Python, pixel by pixel. Pillow has AVIF since version 11.3.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF",
           *(["AVIF"] if "avif" in features.modules else []))
PACK = "make shards of {} with `python -m extras.pack images OUT {}`"
APART = "members apart"  # a reason to skip a member: it is not next to the others of its key


# ---- tars ----

class Member(NamedTuple):
    """A regular file in a tar, or a damaged place."""
    name: str
    header: int      # offset of its first header, bytes
    body: int        # offset of its content
    size: int        # of its content
    error: str = ""  # of a damaged place, which has no name: "damaged tar" or "truncated tar"


def walk_tar(read, start, end, is_entire=False):
    """Walk the regular files between two offsets of a tar: yields a Member for each.

    read(size, offset) returns bytes, like os.pread. Handles the long names of ustar, GNU and pax.
    A damaged place is a Member with an error; the walk continues at the next header after it.
    is_entire: whether the tar ends at `end`. It is then truncated unless it ends in a block of
    zeros.
    """
    offset = first_header = start
    long_name = long_size = None
    while offset + BLOCK <= end:
        header = read(BLOCK, offset)
        size = _read_size(header)
        body = offset + BLOCK
        if size is None:  # no header
            following = _find_header(read, offset, end)
            if following is None:  # only zeros, which end the tar
                return
            yield Member("", offset, offset, 0, "damaged tar")
            if following == end:
                return
            offset = first_header = following
            long_name = long_size = None
            continue
        kind = header[156:157]
        if kind not in b"Lx" and long_size is not None:
            size = long_size
        if kind in b"123456":  # links, devices and folders have no content
            size = 0
        if body + size > end:
            yield Member("", offset, body, 0, "truncated tar")
            return
        offset = body + ceil_div(size, BLOCK) * BLOCK
        if kind in b"Lx" and size <= SCAN:  # the name and size of the file that follows
            name, file_size = _read_record(kind, read(size, body))
            long_name, long_size = name or long_name, file_size or long_size
            continue
        if kind in (b"0", b"\0", b"7"):  # a regular file
            name = (long_name or _read_name(header)).decode("utf-8", "backslashreplace")
            yield Member(name, first_header, body, size)
        first_header = offset
        long_name = long_size = None
    if is_entire:
        yield Member("", offset, offset, 0, "truncated tar")


def _read_size(header):
    """The size of a file, from its header; None if the bytes are not a header."""
    checksum = _read_octal(header[148:156])
    if checksum is None:
        return None
    # The checksum is computed as if its own eight bytes were spaces.
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return None
    if header[124] == 0x80:  # GNU's way to write sizes of 8 GB and more
        return int.from_bytes(header[125:136], "big")
    return _read_octal(header[124:136])


def _read_octal(field):
    """The number in a field of a header, None if it is not octal digits."""
    digits = field.strip(b" \0") or b"0"
    return int(digits, 8) if OCTAL.fullmatch(digits) else None


def _find_header(read, offset, end):
    """The offset of the next header after a block that is not one.

    Without a header, returns None if only zeros follow, and `end` if other data does.
    """
    zeros, result, size = bytes(SCAN), None, 8 * BLOCK
    while offset < end:
        chunk = read(min(size, end - offset), offset)
        if chunk != zeros[:len(chunk)]:
            result = end
            for i in range(0, len(chunk) - BLOCK + 1, BLOCK):
                if _read_size(chunk[i:i + BLOCK]) is not None:
                    return offset + i
        offset += size
        size = min(2 * size, SCAN)  # the next header is mostly near
    return result


def _read_name(header):
    """The name of a file, from its header. ustar puts the start of a long name in a prefix."""
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and prefix:
        return prefix + b"/" + name
    return name


def _read_record(kind, content):
    """(name, size) of the next file in a GNU (L) or pax (x) member. None for what it does not say.
    """
    if kind == b"L":
        return content.rstrip(b"\0"), None
    name = size = None
    while match := re.match(rb"(\d{1,9}) ([^=]+)=", content):  # a record: "LENGTH KEY=VALUE\n"
        length = int(match[1])
        value = content[match.end():max(length - 1, match.end())]
        if match[2] == b"path":
            name = value
        elif match[2] == b"size" and re.fullmatch(rb"\d{1,18}", value):
            size = int(value)
        content = content[max(length, match.end()):]
    return name, size


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

    Raises FileExistsError when `out` is a file, or holds one whose name does not match the regular
    expression `replaceable`.
    """
    if os.path.lexists(out) and not os.path.isdir(out):
        raise FileExistsError(f"{out} is a file: name a new folder")
    for name in os.listdir(out) if os.path.isdir(out) else []:
        if not re.fullmatch(replaceable, name):
            raise FileExistsError(f"{out} is not empty, it holds {name}: name a new folder")
    temporary = f"{out.rstrip('/')}.{os.getpid()}.part"
    try:
        os.makedirs(temporary)
    except OSError as error:
        raise OSError(error.errno, error.strerror, out) from None
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
    size: int             # bytes
    mtime: int            # time of last change, nanoseconds
    count: int            # pairs
    languages: dict = {}  # language -> pairs with captions in it; "" for those that name none
    skipped: dict = {}    # reason -> number of pairs or members that are not in the index
    fields: dict = {}     # other texts, maybe captions -> pairs with them: "url.txt", "ko.json"
    digest: str = ""      # of headers and captions; it tells tars of equal size apart
    checksum: int = 0     # of its rows
    first_row: int = 0    # where its rows begin in rows_file, which has the rows of several shards
    rows_file: str = ""   # "" for a shard that is missing


def index_tar(path, fields=()):
    """Find the pairs of one tar: (Shard, rows). The rows are not on disk yet.

    rows: uint32 [count, 2], the first block and the number of bytes of each pair, in order. fields:
    names of other texts, as Shard.fields has them, that are counted in any case.

    A pair is consecutive members with the same key, one of them an image. Keys without an image,
    keys that occur again and damaged places are skipped, and counted in Shard.skipped.
    """
    rows = []
    languages, skipped = collections.Counter(), collections.Counter()
    fields = collections.Counter(dict.fromkeys(fields, 0))
    suffixes_of = {}  # key -> the suffixes of its members
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())

        def read(size, offset):
            content = os.pread(file.fileno(), size, offset)
            digest.update(content)
            return content

        for key, start, end, members in _walk_pairs(read, status.st_size, skipped):
            suffixes = frozenset(members)
            if key in suffixes_of:
                is_apart = not suffixes & suffixes_of[key]
                skipped[APART if is_apart else "duplicate key"] += 1
            elif not IMAGE_SUFFIXES & suffixes:
                dotted = {suffix for suffix in suffixes
                          if suffix.rpartition(".")[2] in IMAGE_SUFFIXES}
                skipped["name with dots (a key ends at the first)" if dotted else "no image"] += 1
            elif end - start > MAX_PAIR:
                skipped["pair too large"] += 1
            else:
                rows.append((start // BLOCK, end - start))
                if len(IMAGE_SUFFIXES & suffixes) > 1:
                    skipped["further images of a key"] += 1
                _count_captions(members, read, languages, fields)
            suffixes_of[key] = suffixes | suffixes_of.get(key, frozenset())
    rows = np.array(rows, np.uint32).reshape(-1, 2)
    shard = Shard(path, status.st_size, status.st_mtime_ns, len(rows), dict(languages),
                  dict(skipped), dict(fields), digest.hexdigest(), zlib.crc32(rows))
    return shard, rows


def _walk_pairs(read, size, skipped):
    """Walk a tar of `size` bytes: yields (key, start, end, members) for consecutive equal keys.

    members: {suffix: Member}. Counts in `skipped` what it cannot use.
    """
    key, start, end, members = None, 0, 0, {}
    for member in walk_tar(read, 0, size, is_entire=True):
        member_key, suffix = split_name(member.name) or (None, None)
        if member_key is None:
            skipped[member.error or "member without a key"] += 1
        if member.error or member_key not in (None, key):
            # A pair does not continue after a damaged place: it would lack what was there.
            if members:
                yield key, start, end, members
            key, start, members = member_key, member.header, {}
        if member_key is None:
            continue
        if suffix in members:
            skipped["duplicate key"] += 1
        else:
            members[suffix] = member
        end = member.body + member.size
    if members:
        yield key, start, end, members


def _count_captions(members, read, languages, fields):
    """Add a pair to the Counters `languages` and `fields` of a Shard. members: {suffix: Member}."""
    has_caption, names = False, []
    for suffix, member in members.items():
        if suffix == "txt" or suffix.endswith(".txt"):
            read(min(member.size, MAX_JSON), member.body)  # for the digest
            language = caption_language(suffix)
            if language is None:
                names.append(suffix)
            else:
                languages[language] += 1
                has_caption = True
    if "json" in members and members["json"].size <= MAX_JSON:
        record = _parse_json(read(members["json"].size, members["json"].body)) or {}
        names += [f"{name}.json" for name, value in record.items()
                  if isinstance(value, (str, list))]
        if not has_caption:
            languages.update({language for language, _ in _by_language(record.get("caption"))})
    for name in names:
        if name in fields or (len(fields) < MAX_FIELDS and len(name) <= MAX_FIELD_NAME):
            fields[name] += 1


def index_shards(paths, workers=0, fields=()):
    """The Shard of each path. Walks tars that are new or have changed, and writes the index.

    A folder's index is pairs.index in it. If the folder is read-only, the index is in
    ~/.cache/kelip, and if that is read-only, too, in a temporary folder, which is deleted when the
    process ends. A damaged index is made again. workers: processes that walk tars. fields: names
    that Shard.fields must have. Raises ValueError when a file is not a tar.
    """
    by_folder = collections.defaultdict(list)
    for path in dict.fromkeys(paths):
        by_folder[os.path.dirname(path)].append(path)
    result = {}
    for folder, members in by_folder.items():
        known = {}
        for index_file in reversed(_index_files(folder)):
            known.update(_read_index(index_file, folder))
        changed, damaged = [], set()
        for path in members:
            status = os.stat(path)
            shard = known.get(path)
            if not shard or (shard.size, shard.mtime) != (status.st_size, status.st_mtime_ns):
                _check_is_tar(path)
                changed.append(path)
            elif not _has_rows(shard):
                if os.path.exists(shard.rows_file):
                    damaged.add(shard.rows_file)
                changed.append(path)
            elif not _has_counted(shard, fields):
                changed.append(path)
        for rows_file in sorted(damaged):
            print(one_line(f"{rows_file}: damaged; its shards are indexed again"),
                  file=sys.stderr)
        # Write the index after each chunk: an interruption then loses one chunk at most.
        for first in range(0, len(changed), INDEX_CHUNK):
            chunk = changed[first:first + INDEX_CHUNK]
            title = f"index, {first:,} of {len(changed):,} shards done"
            walked = map_processes(functools.partial(index_tar, fields=fields), chunk, workers,
                                   title)
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
    rows_file = f"{os.path.splitext(path)[0]}-{_digest(content)}.rows"
    written, first_row = {}, 0
    for name, one in rows.items():
        written[name] = shards[name]._replace(first_row=first_row, rows_file=rows_file)
        first_row += len(one)

    table = {}
    for shard in sorted({**shards, **written}.values()):
        if os.path.exists(shard.path):
            *values, shard_rows_file = shard[1:]
            values.append(os.path.relpath(shard_rows_file, folder))
            table[os.path.basename(shard.path)] = values
    text = json.dumps(table)
    head = json.dumps({"format": INDEX_FORMAT, "digest": _digest(text.encode())})
    for name, data in ((rows_file, content), (path, f"{head}\n{text}".encode())):
        with atomic_write(name) as file:
            file.write(data)
    return written


def _digest(content):
    """A short SHA-256 of bytes: 12 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:12]


def _index_files(folder):
    """Where the index of a folder may be: in the folder, or at home if the folder is read-only."""
    digest = hashlib.sha256(os.fsencode(os.path.abspath(folder))).hexdigest()[:16]
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
    """{path: Shard} of an index file. {} when it does not exist, has another format or is damaged.
    """
    if not os.path.isfile(path):
        return {}
    try:
        if os.path.getsize(path) > MAX_INDEX:
            raise ValueError
        with open(path, encoding="utf-8") as file:
            head, text = json.loads(file.readline()), file.read()
        if head["format"] != INDEX_FORMAT:
            return {}
        if head["digest"] != _digest(text.encode()):
            raise ValueError
        shards = [Shard(os.path.join(folder, name), *values)
                  for name, values in json.loads(text).items()]
        if not all(map(_is_sound, shards)):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        print(one_line(f"{path}: damaged; the shards are indexed again"), file=sys.stderr)
        return {}
    above = os.path.dirname(path)
    return {shard.path: shard._replace(rows_file=os.path.join(above, shard.rows_file))
            for shard in shards}


def _is_sound(shard):
    """Whether an entry of an index file is of the right types."""
    numbers = [shard.size, shard.mtime, shard.count, shard.checksum, shard.first_row]
    for counts in (shard.languages, shard.skipped, shard.fields):
        numbers += counts.values()
    return (all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
            and isinstance(shard.digest, str) and os.path.basename(shard.rows_file)
            == shard.rows_file and shard.rows_file.endswith(".rows"))


def _has_rows(shard):
    """Whether the file of rows has those of a shard. A wrong row would be a wrong pair.

    Reads no more rows than the tar has blocks, since a damaged index may name any file. The
    checksum is a CRC, which is faster than a digest: a billion pairs have gigabytes of rows.
    """
    if not os.path.isfile(shard.rows_file) or shard.count > shard.size // BLOCK:
        return False
    begin, size = 8 * shard.first_row, 8 * shard.count  # bytes
    with contextlib.suppress(OSError), open(shard.rows_file, "rb") as file:
        if begin + size <= os.fstat(file.fileno()).st_size:
            return zlib.crc32(os.pread(file.fileno(), size, begin)) == shard.checksum
    return False


def _has_counted(shard, fields):
    """Whether a shard's counts include these fields, even if they are zero."""
    has_all = len(shard.fields) < MAX_FIELDS
    return all(name in shard.fields or (has_all and len(name) <= MAX_FIELD_NAME)
               for name in fields)


def are_sound(rows, size):
    """Whether rows, uint32 [count, 2], are pairs one after the other in a tar of `size` bytes."""
    starts, lengths = rows[:, 0].astype(np.int64) * BLOCK, rows[:, 1].astype(np.int64)
    ends = starts + lengths                                                  # [count]
    return bool((lengths > 0).all() and (starts[1:] >= ends[:-1]).all()
                and (ends[-1:] <= size).all())


def map_processes(function, items, workers, title):
    """list(map(function, items)), in processes. Shows a progress bar after two seconds."""
    bar = dict(total=len(items), desc=title, delay=2, leave=False)
    if workers < 2 or len(items) < 2:
        return list(tqdm(map(function, items), **bar))
    # Ctrl-C reaches all processes of a terminal. Only this one should say so.
    ignore_interrupts = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with multiprocessing.Pool(min(workers, len(items)), **ignore_interrupts) as pool:
        return list(tqdm(pool.imap(function, items), **bar))


# ---- patterns that name shards ----

def expand_pattern(pattern, partial=False):
    """The tars that a pattern names, in order.

    A pattern is a path, a folder of tars or a glob, and may have braces: {000..012}, {a,b}. If a
    path of this name exists, it is not expanded. Raises FileNotFoundError when there are no tars or
    one of a range is missing, unless `partial`.
    """
    return [path for one in _expand_braces(os.path.expanduser(pattern))
            for path in _expand_path(one, partial)]


def _expand_braces(pattern):
    """The patterns that a pattern with braces stands for."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if not brace or os.path.exists(pattern):
        return [pattern]
    before, after = pattern[:brace.start()], pattern[brace.end():]
    return [one for option in _brace_options(brace[1])
            for one in _expand_braces(before + option + after)]


def _brace_options(text):
    """The texts that braces stand for: '08..10' -> ['08', '09', '10'], 'a,b' -> ['a', 'b']."""
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", text)
    if not numbers:
        return text.split(",")
    first, last = numbers.groups()
    count = int(last) - int(first) + 1
    if not 1 <= count <= MAX_SHARDS:
        raise ValueError(f"{{{text}}}: write a range from the lower to the higher number, of at "
                         f"most {MAX_SHARDS:,}")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def _expand_path(pattern, partial):
    """The tars that a pattern without braces names."""
    if os.path.isdir(pattern):
        paths = sorted(glob.glob(os.path.join(glob.escape(pattern), "*.tar")))
    elif glob.has_magic(pattern) and not os.path.exists(pattern):
        paths = sorted(glob.glob(pattern))
    else:
        paths = [pattern] if os.path.exists(pattern) else []
    if not paths and not partial:
        if "://" in pattern or pattern.startswith("pipe:"):
            raise FileNotFoundError(f"{pattern}: shards are files on this machine: download them")
        if glob.glob(os.path.join(glob.escape(pattern), "*.tar.*")):
            raise FileNotFoundError(
                f"{pattern}: compressed tars, which are not read: decompress them")
        if _holds_images(pattern):
            raise FileNotFoundError(
                f"{pattern}: images, not shards; {PACK.format('them', pattern)}")
        raise FileNotFoundError(
            f"{pattern}: no shards there; name tars, folders, globs or brace ranges")
    return paths


def _check_is_tar(path):
    """Raise ValueError if a file is not a tar. A damaged .tar passes: index_tar counts the damage.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: not a regular file, and so not a shard")
    suffix = path.rpartition(".")[2].lower()
    with open(path, "rb") as file:
        header = file.read(BLOCK)
    if header.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a pointer of Git LFS, not the file: run `git lfs pull`")
    if header.startswith(b"PK\x03\x04") or header.lstrip()[:1] == b"<":
        kind = "a zip file" if header.startswith(b"PK") else "a page of HTML or XML"
        raise ValueError(f"{path}: {kind}, not a tar")
    if header[:2] == b"\x1f\x8b" or header[:3] == b"BZh" or header[:4] in (b"\x28\xb5\x2f\xfd",
                                                                         b"\xfd7zX"):
        raise ValueError(f"{path}: compressed, and compressed tars are not read: decompress it")
    if suffix == "tar" or (len(header) == BLOCK and _read_size(header) is not None):
        return
    if suffix in ("csv", "tsv"):
        raise ValueError(f"{path}: a table, not shards; {PACK.format('its images', path)}")
    if suffix in IMAGE_SUFFIXES:
        folder = os.path.dirname(path) or "."
        raise ValueError(f"{path}: an image, not a shard; {PACK.format('its folder', folder)}")
    raise ValueError(f"{path}: not a tar")


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
    captions: dict   # language -> texts, cleaned; "" for captions whose name has no language
    members: dict    # suffix -> bytes, all members with this key
    errors: list     # why captions are missing: ["empty caption"]; [] if none is


class CaptionRule(NamedTuple):
    """Which members of a pair are captions.

    KEY.txt is a caption, and KEY.LANGUAGE.txt for a language of ISO 639-1, such as ko or en-us.
    Without either, "caption" in KEY.json is: a text, a list of texts, or either by language,
    {"en": ["red apple", "apple"], "ko": "사과"}.
    """
    language: str = ""   # of captions whose file name has none
    fields: tuple = ()   # further captions, as (language, name): KEY.NAME.txt, or NAME in KEY.json
    lines: bool = False  # whether each line of a .txt is a caption of its own
    only: tuple = ()     # read captions in these languages alone; () for all


DEFAULT_RULE = CaptionRule()


def read_pair(file, path, row, rule=DEFAULT_RULE):
    """Read the pair at a row of the index from an open tar.

    Raises ValueError("reason: details") when the pair cannot be read or is no longer there.
    """
    start, length = int(row[0]) * BLOCK, int(row[1])
    if length > MAX_PAIR:
        raise ValueError(f"index damaged: a pair of {length:,} bytes in {path}")
    try:
        data = os.pread(file.fileno(), length, start)
    except OSError as error:
        raise ValueError(f"shard unreadable: {path}: {error.strerror}") from None
    if len(data) < length:
        raise ValueError(f"shard changed: {path} is shorter than when it was indexed")

    def read(size, offset):
        return data[offset - start:offset - start + size]

    key, members = None, {}
    for member in walk_tar(read, start, start + length):
        if member.error:
            raise ValueError(f"shard changed: {path} is damaged at byte {member.header}")
        member_key, suffix = split_name(member.name) or (None, None)
        key = key or member_key
        if key and member_key == key:
            members.setdefault(suffix, read(member.size, member.body))
    image = next((members[suffix] for suffix in members if suffix in IMAGE_SUFFIXES), None)
    if image is None:
        raise ValueError(f"shard changed: {path} no longer has the pair at byte {start}")
    captions, errors = read_captions(members, rule)
    return Pair(key, image, captions, members, errors)


# The languages of ISO 639-1, without kr (Kanuri), which is mostly written for Korean.
ISO_639_1 = set((
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy "
    "da de dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu "
    "hy hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko ks ku kv kw ky la lb lg "
    "li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or "
    "os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta "
    "te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu").split())
COUNTRIES = {"kr": "ko", "jp": "ja", "cn": "zh"}  # country codes that are written for languages


def is_language(name):
    """Whether a name is a language of ISO 639-1, maybe with a script and a region: zh-hant-tw."""
    code = re.fullmatch(r"([a-z]{2})([-_][a-z]{4})?([-_]([a-z]{2}|\d{3}))?", name.lower())
    return bool(code) and code[1] in ISO_639_1


@functools.lru_cache(1024)
def caption_language(suffix):
    """The language in a suffix: 'ko.txt' -> 'ko', 'txt' -> '', 'jpg' -> None (not a caption)."""
    if suffix == "txt":
        return ""
    name, _, extension = suffix.rpartition(".")
    return name if extension == "txt" and is_language(name) else None


def clean_caption(text):
    """Decode HTML entities, collapse white space: "Tom &amp;amp; \\n Jerry" -> "Tom & Jerry".

    Reads the first MAX_CAPTION characters. Raises ValueError when an entity is a number with
    thousands of digits.
    """
    return " ".join(html.unescape(html.unescape(text[:MAX_CAPTION])).split())


def read_captions(members, rule=DEFAULT_RULE):
    """The captions of a pair, and the reasons why others are missing.

    members: suffix -> bytes. Returns captions, {language: [texts]}, and errors, a list of reasons:
    ({"ko": ["사과"]}, []) or ({}, ["empty caption"]).
    """
    found = []  # (language, content), bytes from a .txt or a text from a .json
    for suffix, content in members.items():
        language = caption_language(suffix)
        if language is not None:
            found.append((language or rule.language, content))
    is_named = bool(found)
    record, errors = {}, []
    if "json" in members and (rule.fields or not is_named):
        record = _parse_json(members["json"])
        if record is None:
            record = {}
            errors.append("bad json")
    if not is_named:
        found = [(language or rule.language, text)
                 for language, text in _by_language(record.get("caption"))]
    for language, name in rule.fields:
        suffix = f"{name.lower()}.txt"
        if suffix in members and caption_language(suffix) is None:
            found.append((language, members[suffix]))
        found += [(language, text) for text in _texts(record.get(name))]

    captions = {}
    for language, content in found:
        if rule.only and language not in rule.only:
            continue
        if isinstance(content, str):
            # A .json may escape half of a surrogate pair, which no encoding can write.
            lines = [content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")]
        else:
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError:
                errors.append("caption not UTF-8")
                continue
            lines = text.splitlines() if rule.lines and text else [text]
        for line in lines:
            try:
                line = clean_caption(line)
            except ValueError:
                errors.append("bad HTML entity")
                continue
            if line:
                captions.setdefault(language, []).append(line)
            else:
                errors.append("empty caption")
    if not captions and not errors:
        errors.append("no caption")
    return captions, errors


def _parse_json(content):
    """The object in a .json member, {} if it is another value, None if it is damaged."""
    if len(content) > MAX_JSON:
        return None
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else {}


def _by_language(value):
    """The captions in "caption" of a .json: [(language, text)], "" for those without a language."""
    values = value if isinstance(value, dict) else {"": value}
    return [(language.lower(), text) for language, texts in values.items()
            if not language or is_language(language) for text in _texts(texts)]


def _texts(value):
    """The captions in a value of a .json: a text or a list of texts."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def format_counts(counts):
    """Counts as text, sorted by name: {"en": 1234, "": 5} -> "5 unnamed, 1,234 en"."""
    return ", ".join(f"{count:,} {name or 'unnamed'}" for name, count in sorted(counts.items()))


def format_cut(count, longest):
    """Say how many texts were cut, and which is the longest."""
    return (f"texts with more tokens than the model reads, which were cut: {count:,}; the longest "
            f"has {len(longest):,} characters: {longest[:60]}")


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
            image = open_image(data)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height}")
            _check_scans(data, image.width * image.height)
            if min_side:
                scale = min_side / max(image.size)
                size = tuple(max(1, int(side * scale)) for side in image.size)
                image.draft(None, size)  # only JPEG has a draft mode
            image.load()
            return to_rgb(image)
        except Image.DecompressionBombError as error:
            raise ValueError(f"too many pixels: {error}") from None
        except TooMuchEffort as error:
            raise ValueError(f"decoding takes too long: {error}") from None
        except Image.UnidentifiedImageError:
            formats = ", ".join(FORMATS)
            raise ValueError(f"not an image: {len(data):,} bytes, none of {formats}") from None
        except Exception as error:  # on broken bytes, Pillow raises errors of many kinds
            raise ValueError(f"not an image: {error}") from None


class TooMuchEffort(ValueError):
    """A small file that would take many seconds to decode."""


def _check_scans(data, n_pixels):
    """Raise TooMuchEffort for a JPEG of many scans, each of which is a pass over the entire image.
    """
    # FF DA begins a scan.
    at_most = data.count(b"\xff\xda") if data[:2] == b"\xff\xd8" else 1
    if at_most > MAX_SCANS or at_most * n_pixels > MAX_SCANNED:
        scans = _count_scans(data)
        if scans > MAX_SCANS or scans * n_pixels > MAX_SCANNED:
            raise TooMuchEffort(f"{scans:,} scans of {n_pixels:,} pixels in one JPEG")


class CountedReads(io.BytesIO):
    """A file in memory of which only MAX_READS parts can be read.

    Pillow reads the chunks of a PNG, the segments of a JPEG, the strips of a TIFF and the runs of a
    BMP one by one, in Python.
    """
    count = 0

    def read(self, size=-1):
        self.count += 1
        if self.count > MAX_READS:
            raise TooMuchEffort(f"the image is in more than {MAX_READS:,} parts")
        return super().read(size)


def open_image(data):
    """A PIL image, of which only the header is read. Broken bytes raise errors of many kinds."""
    return Image.open(CountedReads(data), formats=FORMATS)


def _count_scans(data):
    """The number of scans of a JPEG: a progressive one refines the image with each."""
    scans, offset = 0, 2
    # A marker is FF, maybe repeated, and a byte. 01 and D0 to D8 have no length; 00 is no marker.
    marker = re.compile(b"\xff+([^\x00\x01\xff\xd0-\xd8])")
    while (match := marker.search(data, offset)) and match[1] != b"\xd9":  # the end of the image
        scans += match[1] == b"\xda"
        offset = match.end() + int.from_bytes(data[match.end():match.end() + 2], "big")
    return scans
