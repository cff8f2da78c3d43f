"""What a model makes of pictures and texts, each vector made once: kept on disk, piece by piece, under what it is of.

    store = open_store("runs/clip", model)                     # runs/clip/features/...; may be deleted at any time
    vectors, kept, skipped = embed_images(model, pairs, store)
    vectors = embed_texts(model, tokenizer, ["a red apple", "빨간 사과"], store=store)

A second run finds what the first has made, also when that was stopped half way, and also for pictures that were moved or
are in another set. Everything is float32, whatever training used.

What it leaves out: telling one run what another, at the same time, has made (each writes pieces of its own).
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
from tqdm import tqdm

import kelip
import shards

BATCH = 128
PIECE, PATIENCE = 4096, 60  # vectors that are made, and seconds that pass, before they are written


def digest(content):
    """32 hexadecimal characters for some bytes."""
    return hashlib.sha256(content).hexdigest()[:32]


class Store:
    """Vectors by what they are of: `store[key]` is float32 [D], a key is a digest.

    folder: where the vectors lie in pieces, each a file of numpy's, and where save() puts new ones; None keeps them in
    memory only. A picture has two keys, of the place where it lies, so that it is found without being read, and of its
    bytes, so that it is found when it was moved.
    """

    def __init__(self, folder=None):
        self.folder, self.vectors, self.fresh, self.saved = folder and Path(folder), {}, [], time.monotonic()
        for path in sorted(self.folder.glob("*.npz")) if folder else []:
            try:
                with np.load(path) as piece:                               # np.load unpickles nothing unless told to
                    keys, vectors = piece["keys"].tolist(), piece["vectors"]
                found = [(key, vector) for pair, vector in zip(keys, vectors) for key in pair]
            except Exception:  # whatever numpy makes of damaged bytes: what they held is made again
                continue
            self.vectors.update(found)

    def __contains__(self, key):
        return key in self.vectors

    def __getitem__(self, key):
        return self.vectors[key]

    def add(self, place, content, vector):
        """Keep a vector, float32 [D], under two keys; every 4,096 are written, and every minute."""
        self.vectors[place] = self.vectors[content] = vector
        self.fresh.append((place, content))
        if len(self.fresh) == PIECE or time.monotonic() - self.saved > PATIENCE:
            self.save()

    def save(self):
        """Write what is new as one more piece, whole or not at all. Where that cannot be, vectors stay in memory only."""
        if self.folder and self.fresh:
            name = digest("".join(place for place, _ in self.fresh).encode())
            temporary = self.folder / f".{name}.{os.getpid()}"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with open(temporary, "wb") as file:
                    np.savez(file, keys=np.array(self.fresh), vectors=np.stack([self[place] for place, _ in self.fresh]))
                os.replace(temporary, self.folder / f"{name}.npz")
            except OSError as error:
                warnings.warn(f"{self.folder}: {error.strerror}: vectors are not kept there")
                self.folder = None
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()
        self.fresh, self.saved = [], time.monotonic()


def folder_of(where):
    """The folder of the weights that kelip.build_model opens: where, or where it is a file, its folder."""
    folder = Path("weights") if where in kelip.PRESETS else Path(where)
    return folder if folder.is_dir() else folder.parent


def open_store(where, model, kind="unit"):
    """The Store of a model: features/DIGEST beside its weights, or in ~/.cache/kelip where that folder is read-only.

    where: what kelip.build_model opened. The digest is of weights, configuration and kind, what the vectors are: those of
    other weights are never taken for these.
    """
    state = hashlib.sha256(json.dumps([kind, model.config], sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        state.update(name.encode())
        state.update(weight.cpu().contiguous().numpy())
    folder = folder_of(where)
    if not os.access(folder, os.W_OK):
        folder = Path("~/.cache/kelip").expanduser()
    return Store(folder / "features" / state.hexdigest()[:16])


# ---------------------------------------------------------------------------------------------------- pictures

class _Decoded:
    """What workers do: picture i -> (i, digest of its bytes, float [3, size, size]); None in the place of a picture whose
    vector is known by these bytes, text in that of one that cannot be read, the cause."""

    def __init__(self, pairs, size, known):
        self.pairs, self.preprocess, self.known = pairs, kelip.preprocess(size), known

    def __getitem__(self, i):
        try:
            image = self.pairs[i].image
            content = digest(image)
            return i, content, None if content in self.known else self.preprocess(shards.decode(image))
        except ValueError as error:
            return i, "", str(error).partition(":")[0]


def places(pairs):
    """A key for where each picture lies, by its shard's or file's path, size and time, and its number there."""
    for shard in pairs.shards:
        path = os.fsencode(f"{os.path.abspath(shard.path)} {shard.size} {shard.mtime}")
        for number in range(shard.count):
            yield digest(path + f" {number}".encode())


def embed_images(model, pairs, store=None, progress=True, encode=None):
    """The vectors of pictures: (float32 [M, D] on the CPU, the numbers of the M that decode, {cause: how many do not, or
    were left out of pairs already}).

    pairs: data.Pairs or sets.Folder. encode: images [N, 3, size, size] -> [N, D], by default encode_image's unit
    vectors. What is made is saved also when this is interrupted. On a GPU, other processes decode.
    """
    encode = encode or functools.partial(model.encode_image, l2norm=True)
    store, skipped, keys = Store() if store is None else store, collections.Counter(pairs.left_out), list(places(pairs))
    missing = [i for i, key in enumerate(keys) if key not in store]
    device = model.logit_scale.device
    loader = torch.utils.data.DataLoader(
        _Decoded(pairs, model.config["image_resolution"], set(store.vectors)), BATCH, sampler=missing, collate_fn=list,
        num_workers=0 if device.type == "cpu" or len(missing) < PIECE else min(16, os.cpu_count()),
        generator=torch.Generator())                                         # the run's own random numbers stay as they are
    bar = tqdm(total=len(missing), desc="pictures", disable=not (progress and missing), leave=False, delay=1)
    try:
        for batch in loader:
            fresh = [(i, content, image) for i, content, image in batch if torch.is_tensor(image)]
            if fresh:
                images = torch.stack([image for _, _, image in fresh])
                for (i, content, _), vector in zip(fresh, _encode(model, encode, images.to(device)).numpy()):
                    store.add(keys[i], content, vector)
            for i, content, image in batch:
                if image is None:
                    store.add(keys[i], content, store[content])
                elif isinstance(image, str):
                    skipped[image] += 1
            bar.update(len(batch))
    finally:
        store.save()
        bar.close()
    kept = [i for i, key in enumerate(keys) if key in store]
    vectors = [store[keys[i]] for i in kept]
    return torch.from_numpy(np.stack(vectors)) if kept else torch.empty(0, 1), kept, skipped


# ------------------------------------------------------------------------------------------------------- texts

def embed_texts(model, tokenizer, texts, progress=False, store=None):
    """A list of P texts -> unit vectors, float32 [P, D], on the CPU. A text that stands there twice is encoded once."""
    store = Store() if store is None else store
    tokens = tokenizer.encode(texts, model.config["context_length"])         # [P, context_length]
    keys = [digest(row.tobytes()) for row in tokens.numpy()]
    missing = list({key: i for i, key in enumerate(keys) if key not in store}.items())
    try:
        for first in tqdm(range(0, len(missing), BATCH), desc="texts", disable=not (progress and missing), leave=False, delay=1):
            some = missing[first:first + BATCH]
            rows = tokens[[i for _, i in some]]
            for (key, _), vector in zip(some, _encode(model, functools.partial(model.encode_text, l2norm=True), rows).numpy()):
                store.add(key, key, vector)
    finally:
        store.save()
    return torch.from_numpy(np.stack([store[key] for key in keys]))          # [P, D]


@torch.no_grad()
def _encode(model, encode, batch):
    """encode(batch) in evaluation mode, float32, on the CPU."""
    was_training = model.training
    model.eval()
    features = encode(batch).float().cpu()
    model.train(was_training)
    return features
