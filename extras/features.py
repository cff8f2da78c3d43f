"""Cache the vectors of images on disk, so that each is computed once.

    cache = open_cache("runs/clip", model)                  # runs/clip/features/...
    vectors, kept, skipped = embed_images(model, pairs, cache)

A second call with the same images reads their vectors from the cache. It also does so after the
first was interrupted, after images were moved, and for images that are now in another set. The
folder may be deleted at any time. Several processes may add vectors at the same time.

Vectors of unit length are float16, others float32. Files are mapped into memory, where the system
keeps as much of them as there is room for: a search of a million vectors needs little memory.

From top to bottom: FeatureCache, which reads and writes the files; embed_images, which is
evaluate.embed_images with a cache.

Not included: removing vectors that are no longer used, and an approximate index.
"""

import collections
import contextlib
import functools
import hashlib
import json
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import kelip
import shards
from evaluate import encode_batch, folder_of, load_batches
from tokenizer import atomic_write

SAVE_VECTORS, SAVE_SECONDS = 4096, 60  # new vectors are written at least this often
MAX_FILE = 256 << 20                   # bytes; larger files are ignored
CHUNK = 1024                           # vectors to multiply at a time


def digest(content):
    """A short SHA-256 of some bytes: 32 hexadecimal characters."""
    return hashlib.sha256(content).hexdigest()[:32]


# ---- the cache ----

class FeatureCache:
    """Vectors of images, as rows of an array [rows, D] that only grows.

    Every vector has two keys. The key of the image's location finds it without reading the image.
    The key of the image's bytes finds it after the image was moved.

    folder: has files of numpy's format, named after the digest of their rows. Files that are
    damaged or have another width are ignored: their vectors are computed again. width: D. is_unit:
    whether vectors have unit length.
    """

    def __init__(self, folder, width, is_unit=False):
        self.folder = Path(folder)
        self.dtype = np.dtype([("location", np.int64), ("content", np.int64),
                               ("vector", np.float16 if is_unit else np.float32, width)])
        self.parts = []  # arrays of this type, the rows one after the other
        self.new, self.saved_at = [], time.monotonic()  # records that are not in a file yet
        for path in sorted(self.folder.glob("*.npy")):
            with contextlib.suppress(Exception):  # on damaged files numpy raises more than OSError
                self.parts.append(self._read(path))

    def __len__(self):
        return sum(map(len, self.parts))

    def keys(self, name):
        """The keys of all rows, "location" or "content": int64 [rows]."""
        return np.concatenate([np.empty(0, np.int64), *(part[name] for part in self.parts)])

    def find(self, locations):
        """The row of each location, -1 if there is none: int64 [N]."""
        row_of = dict(zip(self.keys("location").tolist(), range(len(self))))
        return np.array([row_of.get(location, -1) for location in locations], np.int64)

    def vectors(self, rows):
        """The vectors of some rows, int64 [N]: float32 [N, D]."""
        found = np.empty((len(rows), *self.dtype["vector"].shape), np.float32)
        start = 0
        for part in self.parts:
            own = (start <= rows) & (rows < start + len(part))
            found[own] = part["vector"][rows[own] - start]
            start += len(part)
        return found

    def cosines(self, query):
        """The dot product of every row with a query [D]: float32 [rows]."""
        scores = torch.empty(len(self))
        buffer = torch.empty(CHUNK, len(query))  # small enough for a processor's cache
        start = 0
        for part in self.parts:
            for chunk in torch.from_numpy(part["vector"]).split(CHUNK):      # float16 [n, D]
                end = start + len(chunk)
                torch.mv(buffer[:len(chunk)].copy_(chunk), query, out=scores[start:end])
                start = end
        return scores

    def add(self, location, content, vector):
        """Add a vector, float32 [D], under both keys. Saves the new vectors from time to time."""
        self.new.append((location, content, vector))
        seconds = time.monotonic() - self.saved_at
        if len(self.new) == SAVE_VECTORS or seconds > SAVE_SECONDS:
            self.save()

    def save(self):
        """Write the new vectors to a file of their own, atomically. They become rows.

        If that fails, it warns once, and from then on vectors are in memory only.
        """
        if self.new:
            part = np.array(self.new, self.dtype)
            try:
                if self.folder:
                    path = self.folder / f"{digest(part.tobytes())}.npy"
                    self.folder.mkdir(parents=True, exist_ok=True)
                    with atomic_write(path) as file:
                        np.save(file, part)
                    part = self._read(path)  # mapped, it needs no memory
            except OSError as error:
                warnings.warn(f"{self.folder}: {error.strerror}: vectors are not cached there",
                              stacklevel=2)
                self.folder = None
            self.parts.append(part)
        self.new, self.saved_at = [], time.monotonic()

    def _read(self, path):
        """Map a file. Raises ValueError, or an error of numpy, when save() did not write it."""
        if not path.is_file() or path.stat().st_size > MAX_FILE:  # reading a pipe would block
            raise ValueError
        # "c" is copy-on-write, since torch wants arrays that it may write to.
        part = np.load(path, mmap_mode="c")  # refuses pickled objects
        if part.dtype != self.dtype or part.ndim != 1 or path.stem != digest(part.tobytes()):
            raise ValueError
        return part


def model_digest(model, kind="unit"):
    """16 hexadecimal characters that stand for a model and a kind of vectors.

    They cover weights, configuration and kind: another model, or the same model after more
    training, has others.
    """
    state = hashlib.sha256(json.dumps([kind, model.config], sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        state.update(name.encode())
        state.update(weight.cpu().contiguous().numpy())
    return state.hexdigest()[:16]


def open_cache(name_or_path, model, kind="unit", width=None):
    """The FeatureCache of a model: features/DIGEST in the folder of its weights.

    If that folder is read-only, it is in ~/.cache/kelip. name_or_path: what kelip.build_model
    opened. kind: a name for what the vectors are; "unit" is encode_image's, of unit length. width:
    that of other kinds.
    """
    is_unit = kind == "unit"
    folder = folder_of(name_or_path)
    if not os.access(folder, os.W_OK):
        folder = Path("~/.cache/kelip").expanduser()
    return FeatureCache(folder / "features" / model_digest(model, kind),
                        model.config["embed_dim"] if is_unit else width, is_unit)


# ---- embedding ----

def embed_images(model, pairs, cache, progress=True, encode=None):
    """The vectors of images. Those that are not in the cache are computed and added to it.

    pairs: data.Pairs or extras.search.ImageFolder. encode: images [N, 3, size, size] -> [N, D], by
    default encode_image's unit vectors. Returns vectors float32 [M, D] on the CPU; kept, the M
    indices of pairs whose image decodes and has a finite vector; and skipped, a Counter of errors.
    When interrupted, it saves the vectors computed so far.
    """
    rows, kept, skipped = update(model, pairs, cache, progress, encode)
    return torch.from_numpy(cache.vectors(rows)), kept, skipped


def update(model, pairs, cache, progress=True, encode=None):
    """The same as embed_images, with the rows of the cache, int64 [M], in place of the vectors."""
    encode = encode or functools.partial(model.encode_image, l2norm=True)
    device = model.logit_scale.device
    locations = list(_locations(pairs))
    missing = np.flatnonzero(cache.find(locations) < 0).tolist()
    skipped = collections.Counter(pairs.skipped)
    known = cache.keys("content")
    dataset = _Preprocessed(pairs, model.config["image_resolution"], known)
    try:
        for batch in load_batches(dataset, missing, device, progress):
            images, keys = [], []
            for i, content, image, error in batch:
                if error:
                    skipped[error] += 1
                elif image is None:
                    [vector] = cache.vectors(np.flatnonzero(known == content)[:1])
                    cache.add(locations[i], content, vector)
                else:
                    images.append(image)
                    keys.append((locations[i], content))
            if images:
                vectors = encode_batch(encode, torch.stack(images).to(device)).numpy()
                for (location, content), vector in zip(keys, vectors):
                    if np.isfinite(vector).all():
                        cache.add(location, content, vector)
                    else:
                        skipped["vector not finite"] += 1
    finally:
        cache.save()
    rows = cache.find(locations)
    kept = np.flatnonzero(rows >= 0)
    return rows[kept], kept.tolist(), skipped


def _key(content):
    """63 bits of the SHA-256 of some bytes, which an int64 holds."""
    return int(digest(content)[:16], 16) >> 1


def _locations(pairs):
    """The key of each image's location: its shard's path, size and time, and its number there."""
    for shard in pairs.shards:
        path = os.fsencode(f"{os.path.abspath(shard.path)} {shard.size} {shard.mtime}")
        for number in range(shard.count):
            yield _key(path + f" {number}".encode())


class _Preprocessed:
    """A dataset of (i, key of the bytes, float32 [3, size, size], "").

    The image is None if its key is in `known`. A bad image is (i, 0, None, error).
    """

    def __init__(self, pairs, size, known):
        self.pairs, self.preprocess, self.known = pairs, kelip.preprocess(size), known

    def __getitem__(self, i):
        try:
            data = self.pairs[i].image
            content = _key(data)
            if content in self.known:
                return i, content, None, ""
            return i, content, self.preprocess(shards.decode(data)), ""
        except ValueError as error:
            return i, 0, None, str(error).partition(":")[0]
