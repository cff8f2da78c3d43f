"""Cache the vectors of images on disk, so that each is computed once.

    cache = open_cache("runs/clip", model)                  # runs/clip/features/...
    vectors, kept, skipped = embed_images(model, pairs, cache)

A second call with the same images reads their vectors from the cache. It also does so after the
first was interrupted, after images were moved, and for images that are now in another set. The
folder may be deleted at any time. Vectors are float32, in whatever precision the model was trained.

From top to bottom: FeatureCache, which reads and writes the files; embed_images, which is
evaluate.embed_images with a cache.

Not included: sharing new vectors between processes that run at the same time, and removing vectors
that are no longer used.
"""

import collections
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


def digest(content):
    """A short SHA-256 of some bytes: 32 hexadecimal characters."""
    return hashlib.sha256(content).hexdigest()[:32]


# ---- the cache ----

class FeatureCache:
    """Vectors of images: cache[key] is float32 [D].

    Every vector has two keys. The digest of the image's location finds it without reading the
    image. The digest of the image's bytes finds it after the image was moved.

    folder: has the vectors in files of numpy's format. Files that are damaged or have vectors of
    another width or length are ignored: their vectors are computed again. width: D, by default that
    of the first file. is_unit: whether vectors have unit length.
    """

    def __init__(self, folder, width=None, is_unit=False):
        self.folder, self.vectors = Path(folder), {}
        self.new_keys, self.saved_at = [], time.monotonic()
        for path in sorted(self.folder.glob("*.npz")):
            try:
                keys, vectors = _read_vectors(path, width, is_unit)
            except Exception:  # on damaged files numpy raises more than OSError
                continue
            width = vectors.shape[1]
            for (location, content), vector in zip(keys, vectors):
                self.vectors[location] = self.vectors[content] = vector

    def __contains__(self, key):
        return key in self.vectors

    def __getitem__(self, key):
        return self.vectors[key]

    def add(self, location, content, vector):
        """Add a vector, float32 [D], under both keys. Saves the new vectors from time to time."""
        self.vectors[location] = self.vectors[content] = vector
        self.new_keys.append((location, content))
        seconds = time.monotonic() - self.saved_at
        if len(self.new_keys) == SAVE_VECTORS or seconds > SAVE_SECONDS:
            self.save()

    def save(self):
        """Write the new vectors to a file of their own, atomically.

        If that fails, it warns once, and from then on vectors are in memory only.
        """
        if self.folder and self.new_keys:
            locations = [location for location, _ in self.new_keys]
            path = self.folder / f"{digest(''.join(locations).encode())}.npz"
            vectors = np.stack([self.vectors[location] for location in locations])
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as file:
                    np.savez(file, keys=np.array(self.new_keys), vectors=vectors)
            except OSError as error:
                warnings.warn(f"{self.folder}: {error.strerror}: vectors are not cached there",
                              stacklevel=2)
                self.folder = None
        self.new_keys, self.saved_at = [], time.monotonic()


def _read_vectors(path, width, is_unit):
    """The keys and vectors of a file of the cache: a list of N pairs, and float32 [N, D].

    Raises ValueError, or an error of zipfile or numpy, when save() did not write it so.
    """
    if not path.is_file() or path.stat().st_size > MAX_FILE:  # reading a pipe would block
        raise ValueError
    if kelip.error_in_archive(path):
        raise ValueError
    with np.load(path) as file:  # refuses pickled objects
        keys, vectors = file["keys"], file["vectors"]
    n, width = len(keys), width or vectors.shape[-1]
    if (keys.dtype.kind, keys.shape) != ("U", (n, 2)):
        raise ValueError
    if (vectors.dtype, vectors.shape) != (np.float32, (n, width)):
        raise ValueError
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(vectors, axis=1)
    # In bfloat16, unit vectors have length 1 within a percent. A comparison with NaN is false.
    is_good = abs(lengths - 1) < 0.01 if is_unit else (lengths > 0) & (lengths < np.inf)
    if not is_good.all():
        raise ValueError
    return keys.tolist(), vectors


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
    encode = encode or functools.partial(model.encode_image, l2norm=True)
    device = model.logit_scale.device
    locations = list(_locations(pairs))
    missing = [i for i, location in enumerate(locations) if location not in cache]
    skipped = collections.Counter(pairs.skipped)
    dataset = _Preprocessed(pairs, model.config["image_resolution"], set(cache.vectors))
    try:
        for batch in load_batches(dataset, missing, device, progress):
            images, keys = [], []
            for i, content, image, error in batch:
                if error:
                    skipped[error] += 1
                elif image is None:
                    cache.add(locations[i], content, cache[content])
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
    kept = [i for i, location in enumerate(locations) if location in cache]
    if not kept:
        return torch.empty(0, 1), kept, skipped
    vectors = np.stack([cache[locations[i]] for i in kept])
    return torch.from_numpy(vectors), kept, skipped


def _locations(pairs):
    """The key of each image's location: its shard's path, size and time, and its number there."""
    for shard in pairs.shards:
        path = os.fsencode(f"{os.path.abspath(shard.path)} {shard.size} {shard.mtime}")
        for number in range(shard.count):
            yield digest(path + f" {number}".encode())


class _Preprocessed:
    """A dataset of (i, digest of the bytes, float32 [3, size, size], "").

    The image is None if its digest is in `known`. A bad image is (i, "", None, error).
    """

    def __init__(self, pairs, size, known):
        self.pairs, self.preprocess, self.known = pairs, kelip.preprocess(size), known

    def __getitem__(self, i):
        try:
            data = self.pairs[i].image
            content = digest(data)
            if content in self.known:
                return i, content, None, ""
            return i, content, self.preprocess(shards.decode(data)), ""
        except ValueError as error:
            return i, "", None, str(error).partition(":")[0]
