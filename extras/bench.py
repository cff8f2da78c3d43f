"""Speed and memory, compared with other libraries: the only place where speed is claimed.

    python -m extras.bench                          all parts that measure
    python -m extras.bench train                    one part
    python -m extras.bench tokenizer --size 0.05    on a twentieth of the captions
    python -m extras.bench gpu --out gpu.md --rows loss crops    on a GPU: extras/bench_gpu.py

part        measures                                             peers                 minutes
data        images from shards to crops, how exact crops are,    open_clip,                  5
            the index of shards, loader processes                torchvision, webdataset
tokenizer   training on 3.5 million captions (98,000 entries,    tokenizers, tiktoken,      15
            as in the paper), encoding Korean and English        open_clip
train       the contrastive loss, training steps of ViT-B/32,    open_clip                   6
            Muon, stage 1, train_clip.py itself, two processes,
            on a CPU how far steps are from the machine's limit
evaluate    embedding, also by ONNX files, retrieval among       open_clip,                 10
            50,000 images, search among 1,000,000,               onnxruntime
            classification
network     nothing: what 80 or 96 GPUs would send each other,   none                        0
            and the memory of one, by arithmetic
parts       on a CPU, what the time of training steps goes to    none                        1
memory      on a CPU, the memory of training steps, and what     none                        5
            --micro-batch saves

Each row of the table is one quantity: ours, a peer's and their ratio. A peer is another library
that does the same. Both are measured in one run, alternately, and the best of several rounds
counts, because the speed of a machine varies. Rates are better when higher; seconds (s) and
megabytes (MB) when lower. A row whose peer is not installed names the `pip install` that adds it.
The minutes are for two CPU cores.

Nothing is downloaded. Images are random, with the spectrum of photographs. Captions are drawn from
the word frequencies of the package wordfreq. The text to encode is the help of LibreOffice
(`apt-get install libreoffice-help-ko libreoffice-help-en-us`, or unpack the two packages with
`dpkg -x` and name the folder with --help-pages).

From top to bottom: rows of the table, timing, and a section for each part, with FLOPs before train.
A part is a generator of rows: `data_rows` and so on.

Not included: the quality of models (evaluate.py, extras/findings.py), and training on many GPUs,
which `network` only estimates.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as in train_clip.py, for peers too

import argparse
import html
import importlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tokenizer
from command import ArgumentParser, number, run_command

# Some rows are measured in fresh processes, which import this file under the name __mp_main__. Such
# a process imports only what it measures, so that its peak memory is that of the row.
if __name__ != "__mp_main__":
    import numpy as np
    import torch
    from PIL import Image

    import crops
    import data
    import kelip
    import shards
    import train_clip
    import trainer
    from extras import export
    from optimizer import make_optimizer

ROOT = Path(__file__).parent.parent
HELP_PAGES = "/usr/share/libreoffice/help"
# package -> what to install, if that differs
PIP = {"open_clip": "open_clip_torch", "onnxruntime": "onnx onnxscript onnxruntime"}


# ---- rows of the table ----

class Row(NamedTuple):
    """One quantity, ours and a peer's."""
    what: str
    ours: float     # None if it could not be measured
    peer_name: str  # a package, or what else ours is compared with; "" for nothing
    peer: float     # None without a peer, or if it is not installed
    unit: str       # of ours and of the peer's
    note: str       # on what it was measured


def format_row(row):
    """A Row as a line of the table."""
    ours = "-" if row.ours is None else f"{row.ours:,.2f}"
    peer = "-" if row.peer is None else f"{row.peer:,.2f}"
    ratio = f"{row.ours / row.peer:.2f}" if row.ours and row.peer else "-"
    notes = [row.unit, row.peer_name or "no peer", row.note]
    if row.peer is None and row.peer_name:
        notes.append(f"peer not installed: pip install {PIP.get(row.peer_name, row.peer_name)}")
    return f"{row.what:58} {ours:>10} {peer:>10} {ratio:>7}  {'; '.join(notes)}"


HEADER = f"{'what':58} {'ours':>10} {'peer':>10} {'ratio':>7}  unit; peer; measured on"


# ---- timing ----

def seconds_of(function, *arguments):
    """The seconds that one call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def first_and_second(function, *arguments):
    """The seconds of the first call and of the second, when caches are filled."""
    return seconds_of(function, *arguments), seconds_of(function, *arguments)


def least_seconds(*functions, repeats=5, clock=time.perf_counter):
    """The least time of each function, called alternately, after a first round to warm up.

    clock: time.perf_counter, or time.process_time for CPU seconds.
    """
    times = [[] for _ in functions]
    for _ in range(1 + repeats):
        for function, own_times in zip(functions, times):
            start = clock()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            own_times.append(clock() - start)
    return [min(own_times[1:]) for own_times in times]


def best_of(rounds, ours, peer):
    """Call two functions alternately, and take the least of each number that they return.

    ours, peer: functions that return the same number of seconds or megabytes. Returns two lists;
    the second contains only None if peer is None.
    """
    our_results, peer_results = [], []
    for _ in range(rounds):
        our_results.append(ours())
        if peer:
            peer_results.append(peer())
    our_best = [min(numbers) for numbers in zip(*our_results)]
    if not peer:
        return our_best, [None] * len(our_best)
    return our_best, [min(numbers) for numbers in zip(*peer_results)]


def alone(function, *arguments, threads=1):
    """The result of function(*arguments) in a fresh process, with this number of threads.

    The process has used no library before, and its peak memory is that of the function.
    """
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # of tokenizers
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def memory_of_process(field):
    """Megabytes of this process: "VmRSS" is what it holds now, "VmHWM" the most that it has held.

    Not by getrusage, whose ru_maxrss starts at that of the parent process.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


def peak_memory():
    """The most megabytes that this process has held."""
    return memory_of_process("VmHWM")


def try_import(package):
    """A package, or None if it is not installed or does not load."""
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError, OSError):
        return None


# ---- data: images from shards to crops ----

N_IMAGES = BATCH = 96
PADDED_SIZE = 512


def data_rows():
    """All rows of this part."""
    yield from crop_rows()
    yield from exactness_rows()
    yield from index_rows()
    yield from large_index_rows(1000)
    yield from large_index_rows(8000)
    yield from worker_rows()


def photograph_jpeg(seed, width=512, height=384):
    """A JPEG of random pixels with the spectrum of photographs.

    Their amplitudes fall with frequency ** 1.5.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    phases = np.exp(2j * np.pi * rng.random((3, *frequency.shape)))          # [3, H, W / 2 + 1]
    channels = [np.fft.irfft2(phase / frequency ** 1.5, (height, width)) for phase in phases]
    pixels = np.stack(channels, axis=-1)                                     # [H, W, 3]
    gray = pixels.mean(axis=-1, keepdims=True)
    pixels = 0.7 * gray + 0.3 * pixels  # photographs are rarely colorful
    pixels = 128 + 55 * pixels / pixels.std()
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_photographs(path, copies=1):
    """Write a shard with `copies` copies of N_IMAGES images. Returns the images as JPEGs."""
    images = [photograph_jpeg(seed) for seed in range(N_IMAGES)]
    shards.write_shard(path, [(f"{i:04d}", {"jpg": image, "txt": b"a photograph"})
                              for i, image in enumerate(images * copies)])
    return images


def crop_rows():
    """Images per second from a shard to crops as the model takes them, on one core.

    One crop of 224 pixels, as open_clip's transform makes it, and 2x224+6x96, as torchvision's
    transforms make it. The peers have the bytes in memory, or read the shard through webdataset.
    """
    open_clip = try_import("open_clip")
    open_clip_crop = open_clip.image_transform(224, is_train=True) if open_clip else None
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/images.tar"
        images = write_photographs(path)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield from compare_crops(images, path, "224", (0.9, 1.0), "open_clip", open_clip_crop)
        yield from compare_crops(images, path, "2x224+6x96", (0.4, 1.0), "torchvision",
                                 torchvision_crops())
        torch.set_num_threads(threads)


def compare_crops(images, path, spec, scale, name, transform):
    """The two rows of one kind of crops. transform: the peer's, None if it is not installed."""
    def transform_all():
        for image in images:
            transform(Image.open(io.BytesIO(image)))

    functions = [partial(make_crops, data.Pairs(path), spec, scale)]
    if transform:
        functions.append(transform_all)
    if transform and try_import("webdataset"):
        functions.append(partial(make_crops_by_webdataset, path, transform))
    seconds = least_seconds(*functions, repeats=6, clock=time.process_time)
    rates = [N_IMAGES / s for s in seconds]
    ours, peer, webdataset = rates + [None] * (3 - len(rates))
    kilobytes = np.mean([len(image) for image in images]) / 1000
    note = f"JPEGs of 512 x 384, {kilobytes:.0f} KB; padded square {PADDED_SIZE}; one core"
    yield Row(f"crops {spec}", ours, name, peer, "images/s", f"{note}; peer without shards")
    yield Row(f"crops {spec}", ours, "webdataset", webdataset, "images/s",
              f"{note}; peer with {name}'s transform")


def make_crops(pairs, spec, scale):
    """Read a shard once, through data.py and crops.py."""
    groups = crops.parse_crops(spec)
    # A new loader has decoded nothing yet, so each call decodes all images.
    for batch in data.Loader(pairs, None, BATCH, PADDED_SIZE):
        crops.multi_crop(batch.images, groups, 0, batch.sample_index, batch.aspect, scale)


def make_crops_by_webdataset(path, transform):
    """Read a shard once, through webdataset: shuffled, decoded, transformed and batched."""
    import webdataset as wds

    def one_tensor(image):  # a batch holds one tensor for each image
        views = transform(image)
        return views[0] if isinstance(views, list) else views

    pipeline = wds.DataPipeline(
        wds.SimpleShardList(path), wds.tarfile_to_samples(), wds.shuffle(100),
        wds.decode("pilrgb"), wds.to_tuple("jpg", "txt"), wds.map_tuple(one_tensor),
        wds.batched(BATCH))
    for _ in pipeline:
        pass


def torchvision_crops():
    """2x224+6x96 of an image by torchvision, antialiased bicubic like ours: a function, or None."""
    if not try_import("torchvision"):
        return None
    from torchvision import transforms as T

    def random_crop(size, scale):
        bicubic = T.InterpolationMode.BICUBIC
        return T.Compose([T.RandomResizedCrop(size, scale=scale, interpolation=bicubic),
                          T.ToTensor(), T.Normalize(kelip.MEAN, kelip.STD)])
    large, small = random_crop(224, (0.4, 1.0)), random_crop(96, (0.05, 0.4))

    def transform(image):
        image = image.convert("RGB")
        return [crop(image) for crop in [large] * 2 + [small] * 6]
    return transform


def exactness_rows():
    """How far our crops are from Pillow's, which crops and resizes the full image.

    Ours are cropped from the padded square, into which the image was resized before.
    """
    for width, height in ((400, 300), (512, 384), (1024, 768)):
        for size, difference in crop_differences(width, height).items():
            yield Row(f"crops of {size} from {width} x {height}, difference from Pillow's",
                      difference, "the bound", 2.0, "of 255",
                      f"mean absolute difference; padded square {PADDED_SIZE}; lower is better")


def crop_differences(width, height):
    """The mean absolute difference from Pillow's crops, in 0..255, for each size of crops."""
    groups = crops.parse_crops("2x224+6x96")
    padded_size = crops.padded_size(groups)
    sample_index = torch.arange(8)
    aspect = torch.full((8,), width / height)
    mean, std = (255 * np.array(x, np.float32) for x in (kelip.MEAN, kelip.STD))
    differences = {size: [] for _, size in groups}
    for seed in range(4):
        jpeg = photograph_jpeg(seed, width, height)
        full = shards.decode(jpeg)
        pixels = data.resize_to_fit(shards.decode(jpeg, padded_size), padded_size)
        h, w, _ = pixels.shape
        images = torch.zeros(8, 3, padded_size, padded_size, dtype=torch.uint8)
        images[:, :, :h, :w] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        views = crops.multi_crop(images, groups, 0, sample_index, aspect)    # 8 x [N, 3, s, s]
        for crop, view in enumerate(views):
            size = view.shape[-1]
            scale = (0.4, 1.0) if size == 224 else (0.05, 0.4)
            boxes = crops.crop_boxes(0, sample_index, crop, padded_size, aspect, scale)
            ours = view.permute(0, 2, 3, 1).numpy() * std + mean             # [N, s, s, 3]
            for own, box in zip(ours, boxes.tolist()):
                differences[size].append(
                    np.abs(own - pillow_crop(full, box, padded_size, size)).mean())
    return {size: float(np.mean(values)) for size, values in differences.items()}


def pillow_crop(image, box, padded_size, size):
    """Pillow's crop of a box of the padded square, from the full image: float32 [size, size, 3]."""
    x, y, w, h = (value * image.width / padded_size for value in box)
    box = (x, y, min(x + w, image.width), min(y + h, image.height))
    return np.asarray(image.resize((size, size), Image.BICUBIC, box=box), np.float32)


def index_rows():
    """Seconds to index one shard, and for tarfile to list its members."""
    n_pairs = 10_000
    jpeg = os.urandom(53_000)
    record = json.dumps({  # as img2dataset writes it
        "caption": "a caption", "url": "https://example.com/" + 60 * "x", "key": "000000000",
        "status": "success", "error_message": None, "width": 512, "height": 384, "exif": "{}",
        "original_width": 1024, "original_height": 768, "sha256": 64 * "0"}).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/images.tar"
        shards.write_shard(path, ((f"{i:09d}", {"jpg": jpeg, "json": record, "txt": b"a caption"})
                                  for i in range(n_pairs)))

        def list_members():
            with tarfile.open(path) as tar:
                for _ in tar:
                    pass
        ours, peer = least_seconds(partial(shards.index_tar, path), list_members, repeats=2,
                                   clock=time.process_time)
    yield Row(f"index of {n_pairs:,} pairs", ours, "tarfile alone", peer, "s",
              "jpg, json and txt each, 560 MB in the page cache")


def large_index_rows(n_shards):
    """Seconds and memory to open the index of many pairs, and to go to the third epoch."""
    pairs_per_shard, blocks = 10_000, 120  # a pair takes 120 blocks of its tar
    first_block = np.arange(pairs_per_shard, dtype=np.uint32) * blocks
    n_bytes = np.full(pairs_per_shard, 55_000, np.uint32)
    rows = np.stack([first_block, n_bytes], axis=1)                          # [pairs, 2]
    with tempfile.TemporaryDirectory() as folder:
        listed, rows_of = {}, {}
        for i in range(n_shards):
            path = f"{folder}/{i:05d}.tar"
            with open(path, "wb") as file:
                # A sparse file, which takes no space on the disk: nothing in it is read.
                file.truncate(pairs_per_shard * blocks * shards.BLOCK + 2 * shards.BLOCK)
            status = os.stat(path)
            listed[path] = shards.Shard(path, status.st_size, status.st_mtime_ns, pairs_per_shard,
                                        languages={"": pairs_per_shard},
                                        checksum=zlib.crc32(rows))
            rows_of[path] = rows
        shards.write_index(f"{folder}/pairs.index", listed, rows_of)
        seconds, megabytes, n_pairs = alone(open_in_third_epoch, folder)
    note = f"{n_pairs / 1e6:.0f}M pairs in {n_shards:,} shards"
    yield Row("open the index and go to the middle of the third epoch", seconds, "", None, "s",
              note)
    yield Row("memory that this takes", megabytes, "", None, "MB", note)


def open_in_third_epoch(folder):
    """Open the index, and look up where the pairs of a batch of the third epoch are on disk.

    Returns (seconds, megabytes, number of pairs).
    """
    import numpy as np

    import data
    import shards
    before = memory_of_process("VmRSS")
    start = time.perf_counter()
    pairs = data.Pairs(folder)
    numbers = data.Order(pairs, seed=1)(5 * len(pairs) // 2, 4096)
    rows = {}  # shard -> its rows
    for i in numbers:
        shard = int(np.searchsorted(pairs.starts, i, "right")) - 1
        if shard not in rows:
            rows[shard] = shards.shard_rows(pairs.shards[shard])
        _first_block, _n_bytes = rows[shard][i - pairs.starts[shard]]
    return time.perf_counter() - start, memory_of_process("VmRSS") - before, len(pairs)


def worker_rows():
    """Images per second from the loader, for each number of worker processes up to the cores."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/images.tar"
        write_photographs(path, copies=8)
        pairs = data.Pairs(path)
        one_worker = None
        for workers in range(1, len(os.sched_getaffinity(0)) + 1):
            batches = iter(data.Loader(pairs, None, BATCH, PADDED_SIZE, workers=workers))
            next(batches)  # the workers have started
            start = time.perf_counter()
            count = sum(len(batch.images) for batch in batches)
            rate = count / (time.perf_counter() - start)
            one_worker = one_worker or rate
            yield Row(f"loading, worker processes: {workers}", rate, "one worker", one_worker,
                      "images/s", "decoded, on the padded square, in the training process")


# ---- tokenizer: training and encoding ----

def tokenizer_rows(size, vocab_size, help_pages, rounds):
    """All rows of this part.

    size: of the corpus; 1 is 3.5 million captions. rounds: of encoding; training has one.
    """
    if not try_import("wordfreq"):
        yield Row("train", None, "wordfreq", None, "s", "no captions to train on")
        return
    with tempfile.TemporaryDirectory() as folder:
        captions, path = f"{folder}/captions.txt", f"{folder}/tokenizer.json"
        write_captions(captions, size)
        yield from tokenizer_training_rows(captions, path, vocab_size)
        lines, source = lines_to_encode(help_pages, captions)
        yield from encoding_rows(lines, path, source, rounds)
        seconds, megabytes = alone(encode_long_word, path)
        yield Row("one word of 1,000,000 Hangul syllables", seconds, "", None, "s",
                  f"{megabytes:.0f} MB peak")


def write_captions(path, size):
    """Write random captions of 4 to 16 words, one per line: size x 2.0M English, 1.5M Korean."""
    import wordfreq
    with open(path, "w", encoding="utf-8") as file:
        for language, count in (("en", 2_000_000), ("ko", 1_500_000)):
            frequency = wordfreq.get_frequency_dict(language, "best")
            words, weights = list(frequency), list(itertools.accumulate(frequency.values()))
            rng = random.Random(0)
            for _ in range(int(count * size)):
                drawn = rng.choices(words, cum_weights=weights, k=rng.randint(4, 16))
                file.write(" ".join(drawn) + "\n")


def lines_to_encode(help_pages, captions):
    """Korean and English paragraphs of LibreOffice's help, shuffled, and what they are.

    If the help is not installed, the last 100,000 captions.
    """
    korean = read_paragraphs(Path(help_pages) / "ko", 1.7e6, is_mostly_hangul)
    english = read_paragraphs(Path(help_pages) / "en-US", 3.3e6, str.isascii)
    if not korean or not english:
        return list(read_lines(captions))[-100_000:], (
            "captions, since there is no real text (apt-get install libreoffice-help-ko "
            "libreoffice-help-en-us)")
    lines = korean + english
    random.Random(0).shuffle(lines)
    return lines, (f"LibreOffice's help, {megabytes_of(korean):.1f} MB Korean + "
                   f"{megabytes_of(english):.1f} MB English")


def read_paragraphs(folder, limit, is_wanted):
    """The paragraphs in a folder of HTML pages, each once, up to `limit` bytes."""
    found, size = {}, 0
    for page in sorted(Path(folder).rglob("*.html")):
        text = page.read_text("utf-8", "replace")
        text = re.sub(r"(?s)<(script|style|head).*?</\1>", "", text)
        text = " ".join(text.split())
        text = re.sub(r"</?(p|div|li|h\d|td|tr|dt|dd|pre|br|table|ul)\b[^>]*>", "\0", text)
        text = html.unescape(re.sub(r"<[^>]+>", "", text))
        for line in text.split("\0"):
            line = " ".join(line.split())
            if len(line) > 20 and line not in found and is_wanted(line):
                found[line] = None
                size += len(line.encode())
                if size > limit:
                    return list(found)
    return list(found)


def is_mostly_hangul(line):
    """Whether a third of the characters are Korean syllables. Untranslated pages have fewer."""
    return 3 * len(re.findall("[가-힣]", line)) > len(line)


def read_lines(path):
    """Yield the lines of a text file, without holding all of it."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield line.rstrip("\n")


def megabytes_of(lines):
    """The size of lines in UTF-8, without line breaks."""
    return sum(len(line.encode()) for line in lines) / 1e6


# -- training --

def tokenizer_training_rows(captions, path, vocab_size):
    """Training with one thread, its peak memory, and training with two. Saves ours at `path`."""
    megabytes = os.path.getsize(captions) / 1e6
    n_captions = sum(1 for _ in read_lines(captions))
    note = f"{megabytes:.0f} MB, {n_captions:,} captions, {vocab_size:,} entries"
    for threads in (1, 2):
        seconds, memory, merges = alone(train_ours, captions, vocab_size, path, threads)
        peer_seconds, peer_memory, merges_note = None, None, ""
        if try_import("tokenizers"):
            peer_seconds, peer_memory, peer_merges = alone(
                train_tokenizers, captions, vocab_size, threads=threads)
            verdict = "equal" if merges == peer_merges else "DIFFER"
            merges_note = f"; {len(merges):,} merges {verdict}"
        what = "one thread" if threads == 1 else "two processes or threads"
        yield Row(f"train, {what}", seconds, "tokenizers", peer_seconds, "s", note + merges_note)
        if threads == 1:
            yield Row("train, peak memory", memory, "tokenizers", peer_memory, "MB", note)


def train_ours(captions, vocab_size, path, workers):
    """(seconds, peak megabytes, merges). Saves the tokenizer at `path`."""
    start = time.perf_counter()
    tok = tokenizer.Tokenizer.train(read_lines(captions), vocab_size, progress=False,
                                    workers=workers)
    seconds = time.perf_counter() - start
    tok.save(path)
    return seconds, peak_memory(), tok.spec["model"]["merges"]


def train_tokenizers(captions, vocab_size):
    """The same by tokenizers, which is fastest when it reads the file itself."""
    import tokenizers
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.normalizer = short_normalizer()
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    peer_trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(tokenizer.SPECIALS), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    start = time.perf_counter()
    peer.train([captions], peer_trainer)
    seconds = time.perf_counter() - start
    return seconds, peak_memory(), json.loads(peer.to_str())["model"]["merges"]


def short_normalizer():
    """The normalizer of the tokenizers package here: NFC and lower case.

    White space in these texts is folded already. Folding it again would double the peer's time.
    """
    from tokenizers import normalizers
    return normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])


# -- encoding --

def encoding_rows(lines, path, source, rounds):
    """Encoding to lists of ids with each peer, loading the file, and encoding to a tensor.

    Each for words that the process has not seen before, and for the same words again.
    """
    megabytes = megabytes_of(lines)
    vocab_size = len(json.loads(Path(path).read_bytes())["model"]["vocab"])
    note = f"{source}, {len(lines):,} lines, {vocab_size:,} entries"
    to_tensor = "encode to [N, 77]"
    for what, encode, name, encode_peer in (
            ("encode", encode_ours, "tokenizers", encode_tokenizers),
            ("encode", encode_ours, "tiktoken", encode_tiktoken),
            ("encode", encode_ours, "open_clip", encode_open_clip),
            (to_tensor, encode_ours_to_tensor, "open_clip", encode_open_clip_to_tensor)):
        if what == to_tensor:
            note += ", open_clip with CLIP's 49,408"
        peer = partial(alone, encode_peer, lines, path) if try_import(name) else None
        (load, *ours), (peer_load, *theirs) = best_of(
            rounds, partial(alone, encode, lines, path), peer)
        for words, seconds, peer_seconds in zip(("not seen before", "seen before"), ours, theirs):
            peer_rate = megabytes / peer_seconds if peer else None
            yield Row(f"{what}, words {words}", megabytes / seconds, name, peer_rate, "MB/s", note)
        if name == "tokenizers":
            yield Row("load the file", load, name, peer_load, "s", f"{vocab_size:,} entries")


# Each of these returns the seconds to load the tokenizer, 0 if they are not measured, and to encode
# all lines the first and the second time.

def encode_ours(lines, path):
    load = seconds_of(tokenizer.Tokenizer.load, path)
    return load, *first_and_second(tokenizer.Tokenizer.load(path).encode_ordinary_batch, lines)


def encode_tokenizers(lines, path):
    import tokenizers
    load = seconds_of(tokenizers.Tokenizer.from_file, path)
    peer = tokenizers.Tokenizer.from_file(path)
    peer.normalizer = short_normalizer()
    return load, *first_and_second(partial(peer.encode_batch_fast, add_special_tokens=False), lines)


def encode_tiktoken(lines, path):
    import tiktoken
    tok = tokenizer.Tokenizer.load(path)
    ranks = {}  # the bytes of a token -> its id
    for token, i in tok.spec["model"]["vocab"].items():
        if token not in tokenizer.SPECIALS:
            ranks[bytes(tokenizer.CHAR_TO_BYTE[char] for char in token)] = i
    peer = tiktoken.Encoding("peer", pat_str=tokenizer.PATTERN.pattern, mergeable_ranks=ranks,
                             special_tokens={})
    # It has no normalizer, so its time does not include normalizing.
    lines = [tok.normalize(line) for line in lines]

    def encode():
        return [peer.encode_ordinary(line) for line in lines]
    return 0, *first_and_second(encode)


def encode_open_clip(lines, path):
    peer = open_clip_tokenizer()

    def encode():
        return [peer.encode(line) for line in lines]
    return 0, *first_and_second(encode)


def encode_ours_to_tensor(lines, path):
    import torch
    torch.set_num_threads(1)
    return 0, *first_and_second(tokenizer.Tokenizer.load(path).encode, lines)


def encode_open_clip_to_tensor(lines, path):
    import torch
    torch.set_num_threads(1)
    return 0, *first_and_second(open_clip_tokenizer(), lines)


def open_clip_tokenizer():
    """open_clip's Python tokenizer, loaded without the rest of the package and its memory."""
    folder = Path(importlib.util.find_spec("open_clip").origin).parent
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def encode_long_word(path):
    """(seconds, peak megabytes) for one word of a million random Hangul syllables."""
    tok = tokenizer.Tokenizer.load(path)
    rng = random.Random(0)
    word = "".join(chr(rng.randrange(0xAC00, 0xD7A4)) for _ in range(1_000_000))
    return seconds_of(tok.encode_ordinary, word), peak_memory()


# ---- FLOPs ----
#
# These are the FLOPs that the model needs for one sample. Only matrix products count; the loss and
# the optimizer add little. A multiplication and an addition are two FLOPs.

# The backward pass takes twice the FLOPs of the forward pass: the gradients of inputs and weights.
FORWARD_AND_BACKWARD = 3

# Peak FLOP/s of dense matrix products in bfloat16 (float16 on V100), from the vendors' data sheets.
PEAK_FLOPS = {
    "V100": 125e12, "A10": 125e12, "A100": 312e12, "A800": 312e12, "L4": 121e12, "L40S": 362e12,
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12}


def transformer_flops(tokens, width, layers, forward_one=False):
    """FLOPs of the forward pass of a kelip.Transformer over one sequence.

    For L tokens of width W, a layer takes

        6 L W^2     queries, keys and values
        4 L^2 W     q k^T, and the weighted sum of v
        2 L W^2     the projection of the heads' outputs
        16 L W^2    the MLP, whose hidden layer is 4 W wide

    together 24 L W^2 + 4 L^2 W. With forward_one (see Transformer.forward_one), the last layer
    takes 4 L W^2 for the keys and values of all tokens, and 20 W^2 + 4 L W for one query and what
    follows from it.
    """
    L, W = tokens, width
    layer = 24 * L * W ** 2 + 4 * L ** 2 * W
    if not forward_one:
        return layers * layer
    last_layer = 4 * L * W ** 2 + 20 * W ** 2 + 4 * L * W
    return (layers - 1) * layer + last_layer


def image_flops(config, sizes):
    """FLOPs of the image encoder's forward pass over one image's crops.

    config: of a KELIP; sizes: the side of each crop in pixels. A crop of n patches takes

        2 n (3 P^2) W               patches of P x P pixels to width W
        transformer_flops(n + 1)    with the class token
        2 W D                       the projection to embed_dim = D
    """
    patch, width = config["vision_patch_size"], config["vision_width"]
    total = 0
    for size in sizes:
        patches = (size // patch) ** 2
        total += 2 * patches * 3 * patch ** 2 * width
        total += transformer_flops(patches + 1, width, config["vision_layers"], forward_one=True)
        total += 2 * width * config["embed_dim"]
    return total


def text_flops(config, length):
    """FLOPs of the text encoder's forward pass over a caption.

    transformer_flops(length) + 2 W D, for width W and embed_dim D. config: of a KELIP; length:
    tokens, start and end included. Padding costs nothing, since captions are packed.
    """
    width = config["transformer_width"]
    transformer = transformer_flops(length, width, config["transformer_layers"], forward_one=True)
    return transformer + 2 * width * config["embed_dim"]


def mae_flops(mae):
    """FLOPs of the forward pass of a kelip.MAE over one image.

    For n patches of 3 P^2 = p numbers, l of them visible, an encoder of width W and a decoder of
    width D:

        2 l p W                       visible patches to width W
        transformer_flops(l + 1)      the encoder, with the class token
        2 (l + 1) W D                 its output to width D
        transformer_flops(n + 1)      the decoder
        2 n D p                       pixels of all patches
    """
    n_patches, pixels = len(mae.decoder_positions) - 1, mae.decoder_pred.out_features
    n_visible = max(1, round(n_patches * (1 - mae.mask_ratio)))
    width, decoder_width = mae.decoder_embed.in_features, mae.decoder_embed.out_features
    layers, decoder_layers = len(mae.visual.transformer.resblocks), len(mae.decoder.resblocks)
    encoder = 2 * n_visible * pixels * width + transformer_flops(n_visible + 1, width, layers)
    between = 2 * (n_visible + 1) * width * decoder_width
    decoder = transformer_flops(n_patches + 1, decoder_width, decoder_layers)
    return encoder + between + decoder + 2 * n_patches * decoder_width * pixels


def peak_flops(device):
    """PEAK_FLOPS of a torch.device, None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for key in sorted(PEAK_FLOPS, key=len, reverse=True):  # "H100 PCIe" before "H100"
        if key in name:
            return PEAK_FLOPS[key]
    return None


def describe_flops(flops_per_second, device):
    """"12.34 TFLOP/s", and the model FLOPs utilization if the device's peak is known.

    MFU is the FLOP/s that the model needs as a fraction of the device's peak (Chowdhery et al.,
    PaLM, arXiv 2204.02311, section 4.1).
    """
    text = f"ours does {flops_per_second / 1e12:.2f} TFLOP/s"
    peak = peak_flops(device)
    if peak:
        text += f", MFU {flops_per_second / peak:.1%} of {peak / 1e12:,.0f} TFLOP/s"
    return text


# ---- train: losses, steps, processes ----

MULTI_CROP = [224] * 2 + [96] * 6                    # the sizes of 2x224+6x96
OPEN_CLIP_MODEL = "ViT-B-32-quickgelu"               # ViT-B/32 with CLIP's 49,408 tokens


def train_rows(batches):
    """All rows of this part. batches: those of the contrastive loss."""
    for batch in batches:
        yield from loss_rows(batch)
    device = training_device()
    yield step_row(device, "one 224 crop", [224], "open_clip")
    yield step_row(device, "2x224+6x96", MULTI_CROP)
    if device.type == "cpu":
        bench_cpu = importlib.import_module("extras.bench_cpu")
        yield from bench_cpu.limit_rows()
    yield optimizer_row(device)
    yield from autoencoder_rows(device)
    yield script_row()
    yield processes_row()


def training_device():
    """The device that train_clip.py would use. Makes the settings of training, as a Run does."""
    with tempfile.TemporaryDirectory() as folder:
        args = train_clip.parse_arguments(["--out", f"{folder}/run"])
        return trainer.Run(args, stage="clip").device


def loss_rows(batch):
    """Seconds and memory of the contrastive loss alone, each library's in a fresh process."""
    ours = partial(alone, loss_and_backward, "kelip", batch, threads=2)
    peer = None
    if try_import("open_clip"):
        peer = partial(alone, loss_and_backward, "open_clip", batch, threads=2)
    rounds = 1 if batch > 8192 else 2
    (seconds, megabytes), (peer_seconds, peer_megabytes) = best_of(rounds, ours, peer)
    note = f"batch {batch:,}, width 512, forward and backward, float32, 2 threads"
    yield Row("contrastive loss", seconds, "open_clip", peer_seconds, "s", note)
    yield Row("contrastive loss, memory", megabytes, "open_clip", peer_megabytes, "MB", note)


def loss_and_backward(library, batch):
    """(least seconds, megabytes beyond the inputs) of a library's loss, forward and backward."""
    import torch

    import kelip
    image_features = kelip.l2_normalize(torch.randn(batch, 512)).requires_grad_()
    text_features = kelip.l2_normalize(torch.randn(batch, 512)).requires_grad_()
    logit_scale = torch.tensor(1 / 0.07, requires_grad=True)
    loss = kelip.contrastive_loss
    if library == "open_clip":
        from open_clip.loss import ClipLoss
        loss = ClipLoss()

    def step(images, texts):
        loss(images, texts, logit_scale).backward()

    # A small batch first, which loads libraries and starts threads.
    step(*(x[:64].detach().requires_grad_() for x in (image_features, text_features)))
    before = peak_memory()
    seconds = [seconds_of(step, image_features, text_features)]
    megabytes = peak_memory() - before
    if batch <= 8192:
        seconds += [seconds_of(step, image_features, text_features) for _ in range(3)]
    return min(seconds), megabytes


def base_config():
    """ViT-B/32 with the vocabulary of OpenAI's CLIP, as open_clip has it."""
    return dict(kelip.PRESETS["ViT-B/32"], vocab_size=49_408)


def random_batch(batch, sizes):
    """A crop of each size [N, 3, size, size], and captions of 6 to 25 tokens [N, 77]."""
    torch.manual_seed(0)
    end = 49_407
    tokens = torch.randint(300, end - 3, (batch, 77))
    position, last = torch.arange(77), torch.randint(5, 25, (batch, 1))
    tokens = tokens.masked_fill(position == last, end).masked_fill(position > last, 0)
    return [torch.randn(batch, 3, size, size) for size in sizes], tokens


def step_row(device, name, sizes, peer_name=""):
    """Pairs per second of training steps as in train_clip.py, from the crops on."""
    config, batch = base_config(), 512 if device.type == "cuda" else 32
    views, tokens = random_batch(batch, sizes)
    views = [view.to(device) for view in views]
    model = kelip.KELIP(**config).to(device)
    encode = partial(train_clip.Encoders(model), views, tokens[:, None])
    steps = [training_step(model, device, encode, kelip.contrastive_loss)]
    open_clip = try_import(peer_name) if peer_name else None
    if open_clip:
        model = open_clip.create_model(OPEN_CLIP_MODEL).to(device)
        encode = torch.compile(model) if device.type == "cuda" else model
        encode = partial(encode, views[0], tokens.to(device))
        steps.append(training_step(model, device, encode, open_clip.loss.ClipLoss()))
    rates = [batch / seconds for seconds in least_seconds(*steps)]
    length = (tokens.argmax(dim=1) + 1).float().mean().item()
    flops = FORWARD_AND_BACKWARD * (image_flops(config, sizes) + text_flops(config, length))
    return Row(f"step, {name}", rates[0], peer_name, rates[1] if open_clip else None, "pairs/s",
               f"ViT-B/32, 49,408 tokens, batch {batch:,}, bfloat16, captions of 6 to 25 tokens; "
               + describe_flops(flops * rates[0], device))


def training_step(model, device, encode, loss, dtype="bfloat16"):
    """A function that takes a step: forward pass in half precision, loss, backward pass, AdamW.

    encode() -> the arguments of loss: image features, text features, the factor on the cosines.
    dtype: of the forward pass, bfloat16 or float16.
    """
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    optimizer = make_optimizer(model, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, getattr(torch, dtype)):
            features = encode()
        scaler.scale(loss(*features)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()
    return step


def optimizer_row(device):
    """Seconds of an update of ViT-B/32's weights by Muon, and by AdamW."""
    updates = []
    for name in ("muon", "adamw"):
        model = kelip.KELIP(**base_config()).to(device)
        optimizer = make_optimizer(model, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2,
                                   name=name, dtype=torch.bfloat16)
        gradients = [1e-4 * torch.randn_like(p) for p in model.parameters()]
        updates.append(partial(update, optimizer, list(model.parameters()), gradients))
    ours, peer = least_seconds(*updates, repeats=3)
    return Row("update by Muon", ours, "AdamW", peer, "s", "ViT-B/32, weights in float32, matrix "
               "products in bfloat16")


def update(optimizer, parameters, gradients):
    """A step of an optimizer."""
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient  # Muon clears those of its matrices
    optimizer.step()


def autoencoder_rows(device):
    """Stage 1: the encoder on a quarter of the patches, and encoder and decoder together.

    Both are compared with the encoder on all patches.
    """
    config = dict(kelip.PRESETS["ViT-B/16"], vocab_size=512, transformer_layers=1)
    mae = kelip.MAE(kelip.KELIP(**config).visual).to(device)
    images = torch.randn(32, 3, 224, 224, device=device)
    n_patches = len(mae.decoder_positions) - 1
    all_patches = torch.arange(n_patches, device=device).expand(32, -1)      # [N, L]
    quarter_of_patches = all_patches[:, :n_patches // 4]                     # [N, L / 4]

    def encoder(keep):
        with torch.autocast(device.type, torch.bfloat16):
            latent = mae.forward_encoder(images, keep)
        latent.float().square().mean().backward()

    def autoencoder():
        with torch.autocast(device.type, torch.bfloat16):
            loss, _, _ = mae(images)
        loss.backward()

    quarter, full, both = least_seconds(
        partial(encoder, quarter_of_patches), partial(encoder, all_patches), autoencoder, repeats=3)
    note = "ViT-B/16, batch 32, bfloat16, forward and backward"
    yield Row("encoder on 25 % of the patches", quarter, "all patches", full, "s", note)
    flops_per_second = FORWARD_AND_BACKWARD * mae_flops(mae) * 32 / both
    yield Row("stage 1, with its decoder of 8 x 512", both, "all patches", full, "s",
              f"{note}; {describe_flops(flops_per_second, device)}")
    if device.type == "cpu":
        bench_cpu = importlib.import_module("extras.bench_cpu")
        yield bench_cpu.limit_row("stage 1, ViT-B/16, batch 32, without optimizer", autoencoder)


def script_row():
    """Pairs per second of train_clip.py: ViT-B/32, 2x224+6x96, a shard as img2dataset writes it."""
    english = [f"photograph number {i} of no place in particular" for i in range(8)]
    korean = [f"어디도 아닌 곳의 사진 {i}번" for i in range(8)]
    pairs = []
    for i, caption in enumerate(english + korean):
        record = json.dumps({"caption": caption}).encode()
        pairs.append((f"{i:09d}", {"jpg": photograph_jpeg(i), "txt": caption.encode(),
                                   "json": record}))
    with tempfile.TemporaryDirectory() as folder:
        shards.write_shard(f"{folder}/00000.tar", pairs)
        log = run_train_clip(folder, [], "--model", "ViT-B/32", "--data", f"{folder}/00000.tar",
                             "--steps", 10, "--batch-size", 4)
    first, last = log[0]["loss"], log[-1]["loss"]
    return Row("train_clip.py, 10 steps from shards", median_rate(log), "", None, "pairs/s",
               "ViT-B/32, 2x224+6x96, batch 4, JPEGs of 512 x 384, with the loader; "
               f"loss {first:.2f} to {last:.2f}")


def processes_row():
    """Pairs per second of train_clip.py with two processes, a core each, and with one."""
    rates = []
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        with tempfile.TemporaryDirectory() as folder:
            log = run_train_clip(folder, launcher, "--steps", 40,
                                 "--batch-size", 128 * processes, OMP_NUM_THREADS="1")
        rates.append(median_rate([line for line in log if line["step"] > 10]))
    one, two = rates
    return Row("two processes, each on a core", two, "one process on a core", one, "pairs/s",
               "train_clip.py, tiny, the demo's pairs, 128 of them per process, gloo, torchrun")


def run_train_clip(folder, launcher, *flags, evaluations=0, **environment):
    """Run train_clip.py: the lines of its metrics.jsonl.

    launcher: arguments of python before the script. Raises ValueError when it fails.
    """
    command = [sys.executable, *launcher, "train_clip.py", "--out", f"{folder}/run",
               "--evals", str(evaluations), *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, text=True,
                          capture_output=True)
    if done.returncode:
        raise ValueError(f"train_clip.py failed: {done.stderr.strip()[-500:]}")
    text = Path(f"{folder}/run/metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def median_rate(log):
    """The median of images_per_second over lines of metrics.jsonl."""
    rates = sorted(line["images_per_second"] for line in log)
    return rates[len(rates) // 2]


# ---- evaluate: embedding, retrieval, classification ----

def evaluate_rows(size):
    """All rows of this part. size: of the sets; 1 is 50,000 images, and 1,000 classes."""
    images_per_second = None
    for row in embedding_rows():
        images_per_second = images_per_second or row.ours  # the first row is images in float32
        yield row
    yield from onnx_rows()

    n_images, n_classes = int(50_000 * size), max(2, int(1000 * size))
    seconds, megabytes = alone(retrieval_of, n_images, threads=os.cpu_count())
    note = f"{n_images:,} images x {n_images:,} texts, width 512, float32, both directions"
    yield Row("recall at 1, 5, 10", seconds, "", None, "s", note)
    yield Row("recall at 1, 5, 10, memory", megabytes, "", None, "MB",
              f"{note}; all scores would be {4 * n_images ** 2 / 1e6:,.0f} MB")

    n_vectors = int(1_000_000 * size)
    seconds, megabytes = alone(search_of, n_vectors, threads=os.cpu_count())
    note = f"{n_vectors:,} vectors of width 512, float16, in files that the system has in memory"
    yield Row("search for the 40 nearest images", seconds, "", None, "s", note)
    yield Row("search, anonymous memory", megabytes, "", None, "MB", note)

    vectors, scores = alone(classification_of, n_images, n_classes, threads=os.cpu_count())
    note = (f"{n_images:,} images, {n_classes:,} classes, 24 templates; to embed the images would "
            f"take {n_images / images_per_second:,.0f} s at the rate above")
    yield Row("class vectors, 20 times those of a twentieth", vectors, "", None, "s", note)
    yield Row("scores and the five nearest classes", scores, "", None, "s", note)


def embedding_rows():
    """Images and captions per second through ViT-B/32 without gradients, in two precisions."""
    device, batch = "cuda" if torch.cuda.is_available() else "cpu", 64
    [images], tokens = random_batch(batch, [224])
    model, peer = kelip.KELIP(**base_config()).to(device).eval(), None
    open_clip = try_import("open_clip")
    if open_clip:
        peer = open_clip.create_model(OPEN_CLIP_MODEL).to(device).eval()

    def encode(method, inputs, in_bfloat16):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=in_bfloat16):
            method(inputs)

    for method, what, inputs in (("encode_image", "images", images.to(device)),
                                 ("encode_text", "captions", tokens)):  # ours takes CPU tokens
        for precision in ("float32", "bfloat16"):
            in_bfloat16 = precision == "bfloat16"
            functions = [partial(encode, getattr(model, method), inputs, in_bfloat16)]
            if peer:
                functions.append(
                    partial(encode, getattr(peer, method), inputs.to(device), in_bfloat16))
            rates = [batch / seconds for seconds in least_seconds(*functions)]
            yield Row(f"embed {what}, {precision}", rates[0], "open_clip",
                      rates[1] if peer else None, "per s",
                      f"ViT-B/32, batch {batch}, no gradients")


def onnx_rows():
    """Images and captions per second through ViT-B/32 on the CPU: torch, and its ONNX files."""
    batch = 64
    [images], tokens = random_batch(batch, [224])
    model = kelip.KELIP(**base_config()).eval()
    has_packages = all(map(try_import, ("onnx", "onnxscript", "onnxruntime")))
    with tempfile.TemporaryDirectory() as folder:
        if has_packages:
            export.write_encoders(model, Path(folder))
        for name, encode, what, inputs in (
                ("image", model.encode_image, "images", images),
                ("text", model.encode_text, "captions", tokens[:, :25])):  # the longest has 25
            functions = [torch.no_grad()(partial(encode, inputs, l2norm=True))]
            if has_packages:
                session = try_import("onnxruntime").InferenceSession(f"{folder}/{name}.onnx")
                functions.append(
                    partial(session.run, None, {export.INPUTS[name]: inputs.numpy()}))
            rates = [batch / seconds for seconds in least_seconds(*functions)]
            yield Row(f"embed {what}, torch and {name}.onnx", rates[0], "onnxruntime",
                      rates[1] if has_packages else None, "per s",
                      f"ViT-B/32, batch {batch}, float32, CPU")


def retrieval_of(count):
    """(seconds, megabytes beyond the features) of recall between `count` images and their texts."""
    import torch

    import evaluate
    import kelip
    images = kelip.l2_normalize(torch.randn(count, 512))
    texts = kelip.l2_normalize(images + torch.randn(count, 512))
    owner = torch.arange(count)
    evaluate.recall_at_k(images[:64], texts[:64], owner[:64])  # starts threads
    before = peak_memory()
    seconds = seconds_of(evaluate.recall_at_k, images, texts, owner)
    return seconds, peak_memory() - before


def search_of(count):
    """(seconds of a query, megabytes of anonymous memory) among `count` vectors in a cache."""
    import torch

    import kelip
    from extras import features, search
    with tempfile.TemporaryDirectory() as folder:
        cache = features.FeatureCache(folder, 512, is_unit=True)
        for start in range(0, count, features.SAVE_VECTORS):
            vectors = torch.randn(min(features.SAVE_VECTORS, count - start), 512)
            for i, vector in enumerate(kelip.l2_normalize(vectors).numpy(), start):
                cache.add(i, i, vector)
        cache.save()
        cache = features.FeatureCache(folder, 512, is_unit=True)
        rows, [query] = cache.find(range(count)), kelip.l2_normalize(torch.randn(1, 512))

        def find():
            search.nearest(cache.cosines(query)[rows])
        find()  # reads the files
        return min(seconds_of(find) for _ in range(5)), memory_of_process("RssAnon")


def classification_of(count, n_classes):
    """(seconds for the vectors of n_classes, seconds for the nearest classes of count images)."""
    import torch

    import evaluate
    import kelip
    model = kelip.KELIP(**dict(kelip.PRESETS["ViT-B/32"], vocab_size=49_408)).eval()
    # A twentieth of the class vectors is timed, and counts 20 times.
    names = [f"class {i}" for i in range(kelip.ceil_div(n_classes, 20))]
    templates = [f"{i} {{}}" for i in range(24)]
    seconds = seconds_of(evaluate.zero_shot_weights, model, RandomTokens(), names, templates)
    images = kelip.l2_normalize(torch.randn(count, 512))
    weights = kelip.l2_normalize(torch.randn(n_classes, 512)).T              # [D, C]
    return 20 * seconds, seconds_of(evaluate.top_classes, images, weights)


class RandomTokens:
    """A stand-in for a tokenizer: 6 to 25 random tokens, the same for the same text."""

    def encode(self, texts, context_length):
        import torch
        rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(rows, texts):
            rng = random.Random(text)
            length = rng.randint(5, 24)
            row[:length] = torch.tensor([rng.randint(300, 49_000) for _ in range(length)])
            row[length] = 49_407  # the end token
        return rows


# ---- network: many GPUs, by arithmetic ----

# Bytes per second and GPU, in each direction: NVSwitch of an A100 SXM, and a node of 8 GPUs with 8
# InfiniBand HDR adapters of 200 Gbit/s.
NVLINK, INFINIBAND = 300e9, 25e9


# (model, crops, batch, GPUs): the run of docs/scaling.md, and larger ones.
NETWORKS = [("ViT-B/32", "2x224+6x96", 32_000, 80), ("ViT-B/32", "2x224+6x96", 98_304, 96),
            ("ViT-L/14", "2x224+6x98", 32_000, 80), ("ViT-L/14", "2x224+6x98", 98_304, 96)]
MICRO_BATCH = 32  # pairs


def print_networks():
    """Print what one step sends between A100s, and the memory of one. Nothing is measured."""
    for model, spec, batch, world_size in NETWORKS:
        print_network(model, spec, batch, world_size)


def print_network(model, spec, batch, world_size):
    """Print what one step sends between GPUs, and the memory of one, by arithmetic.

    Ring algorithms: each of W ranks sends (W - 1) / W of the data to gather it, and twice that to
    sum it. Times are for all bytes over NVLink, as if all GPUs were on one switch, and for all
    bytes over InfiniBand.
    """
    # These two import this file.
    bench_cpu = importlib.import_module("extras.bench_cpu")
    bench_memory = importlib.import_module("extras.bench_memory")
    utilization = 0.4  # assumed
    config, peak = kelip.PRESETS[model], PEAK_FLOPS["A100"]
    sizes = [size for number, size in crops.parse_crops(spec) for _ in range(number)]
    K, width = len(sizes), config["embed_dim"]
    with torch.device("meta"):
        n_weights = kelip.count_parameters(kelip.KELIP(**config))
    caption_flops = text_flops(config, 15)  # captions of 15 tokens
    flops_per_pair = FORWARD_AND_BACKWARD * (image_flops(config, sizes) + caption_flops)
    flops = flops_per_pair * batch / world_size
    step_seconds = flops / (utilization * peak)

    gather = (world_size - 1) / world_size
    all_reduce = 2 * gather
    sent = [
        ("text features, gathered", gather * batch * width * 4),
        ("their gradients, summed", all_reduce * batch * width * 4),
        # Two sums: of the maxima, and of the exponentials.
        (f"logsumexp of {K} x {batch:,} columns", 2 * all_reduce * K * batch * 4),
        (f"gradients of {n_weights / 1e6:.0f}M weights, summed", all_reduce * n_weights * 4),
    ]
    sent.append(("all", sum(n_bytes for _, n_bytes in sent)))

    print(f"{model}, {spec}, {world_size} x A100, batch {batch:,}: {flops / 1e12:.1f} TFLOPs a GPU "
          f"and step take {1e3 * step_seconds:.0f} ms at {utilization:.0%} of {peak / 1e12:.0f} "
          "TFLOP/s (assumed)")
    print(f"{'sent by each GPU, each step':42} {'MB':>8} {'NVLink, ms':>11} "
          f"{'InfiniBand, ms':>15} {'of the step':>12}")
    for what, n_bytes in sent:
        over_infiniband = n_bytes / INFINIBAND
        print(f"{what:42} {n_bytes / 1e6:8.0f} {1e3 * n_bytes / NVLINK:11.1f} "
              f"{1e3 * over_infiniband:15.1f} {over_infiniband / step_seconds:12.1%}")

    pairs = batch // world_size
    at_once = bench_memory.memory_of(bench_cpu.Setting(model, pairs, spec))
    split = bench_memory.memory_of(bench_cpu.Setting(model, pairs, spec, micro_batch=MICRO_BATCH))
    kept = " + ".join(f"{what} {at_once[what] / 1e3:.1f}"
                      for what in ("weights", "optimizer", "gradients", "copies in bfloat16"))
    print(f"memory of each GPU, GB: {kept} + activations, of {pairs} pairs at once "
          f"{at_once['activations'] / 1e3:,.1f}, with --micro-batch {MICRO_BATCH} "
          f"{split['activations'] / 1e3:.1f}\n")


# ---- the command ----

PARTS = ("data", "tokenizer", "train", "evaluate", "network", "parts", "memory")


def main(argv=None):
    """Print the rows of some parts, or of all that measure."""
    parser = ArgumentParser(
        prog="python -m extras.bench", description=__doc__.partition("\nFrom top")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART",
        help=f"what to measure: {', '.join(PARTS)} (default: the first four)")
    add("--size", type=number(float, above=0, high=1), default=1.0, metavar="FRACTION",
        help="of the tokenizer's corpus (1 is 3.5 million captions, 188 MB) and of the sets of "
             "evaluate (1 is 50,000 images; default: 1)")
    add("--batches", type=number(int, 1, 1 << 24), nargs="+", default=[8192], metavar="N",
        help="batch sizes of the contrastive loss (default: 8192; 32768 takes minutes, and 17 GB "
             "for open_clip)")
    add("--vocab-size", type=number(int, 259), default=98_000, metavar="N",
        help="entries of the tokenizer (default: 98000)")
    add("--rounds", type=number(int, 1), default=3, metavar="N",
        help="rounds of encoding; the best one counts (default: 3)")
    add("--help-pages", default=HELP_PAGES, metavar="FOLDER",
        help="LibreOffice's help, with folders ko and en-US (default: %(default)s)")
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["gpu"]:
        return importlib.import_module("extras.bench_gpu").main(argv[1:])
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            raise ValueError(f"{part}: no such part; choose from {', '.join(PARTS)}")

    rows_of = {
        "data": data_rows,
        "tokenizer": partial(tokenizer_rows, args.size, args.vocab_size, args.help_pages,
                             args.rounds),
        "train": partial(train_rows, args.batches),
        "evaluate": partial(evaluate_rows, args.size),
    }
    tables = {"network": print_networks,
              "parts": importlib.import_module("extras.bench_cpu").print_parts,
              "memory": importlib.import_module("extras.bench_memory").print_memory}
    parts = list(dict.fromkeys(args.parts)) or list(rows_of)
    if set(parts) & set(rows_of):
        print(HEADER)
    for part in parts:
        if part in tables:
            tables[part]()
            continue
        for row in rows_of[part]():
            print(format_row(row), flush=True)


if __name__ == "__main__":
    run_command(main)
