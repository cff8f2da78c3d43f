"""Speed and memory, beside the peers that are installed: the only place where speed is claimed.

    python bench.py data                        # loader, crops, index: a few minutes
    python bench.py tokenizer                   # 3.5M captions, 98K entries, as in the paper: some ten minutes
    python bench.py tokenizer --size 0.05       # a twentieth of the captions
    python bench.py train                       # losses, steps, processes: some minutes
    python bench.py evaluate                    # embedding, retrieval, classification: some ten minutes
    python bench.py network                     # what 80 GPUs would send each other, by arithmetic

Ratios are taken in one run, ours and the peer's in turns, best of several; a row whose peer is missing says which pip
install mends it. Tokenizer rows run each in a fresh process, on captions drawn from the word frequencies of the package
wordfreq and on the help of LibreOffice (`apt-get install libreoffice-help-ko libreoffice-help-en-us`, or unpack the two
with `dpkg -x` and name the folder with --help-pages). Pictures are drawn at random with the spectrum of photographs.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as train_clip.py has it, for ours and for the peers

import argparse
import html
import importlib
import importlib.util
import io
import json
import multiprocessing
import random
import re
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import accumulate, chain
from pathlib import Path

import tokenizer

if __name__ != "__mp_main__":  # the fresh processes of the tokenizer's rows, whose memory is a row, do without these
    import numpy as np
    import torch
    from PIL import Image

    import crops
    import data
    import evaluate
    import kelip
    import shards
    import train_clip
    import trainer

HELP_PAGES = "/usr/share/libreoffice/help"
PIP = {"tokenizers": "tokenizers", "tiktoken": "tiktoken",
       "open_clip": "--no-deps open_clip_torch ftfy wcwidth", "torchvision": "torchvision", "webdataset": "webdataset"}


# ---- tokenizer.py: the texts ----

def write_captions(path, size):
    """size x 3.5M captions of 4 to 16 words, 2.0M English and 1.5M Korean, one a line; the seed is fixed."""
    import wordfreq
    with open(path, "w", encoding="utf-8") as file:
        for language, count in (("en", 2_000_000), ("ko", 1_500_000)):
            rng, frequency = random.Random(0), wordfreq.get_frequency_dict(language, "best")
            words, weights = list(frequency), list(accumulate(frequency.values()))
            for _ in range(int(count * size)):
                file.write(" ".join(rng.choices(words, cum_weights=weights, k=rng.randint(4, 16))) + "\n")
    return Path(path).stat().st_size / 1e6


def paragraphs(folder, limit, wanted):
    """The paragraphs in a folder of HTML pages that `wanted` accepts, none twice, up to `limit` bytes."""
    found, size = {}, 0
    for page in sorted(Path(folder).rglob("*.html")):
        text = re.sub(r"(?s)<(script|style|head).*?</\1>", "", page.read_text("utf-8", "replace"))
        text = re.sub(r"</?(p|div|li|h\d|td|tr|dt|dd|pre|br|table|ul)\b[^>]*>", "\0", " ".join(text.split()))
        for line in html.unescape(re.sub(r"<[^>]+>", "", text)).split("\0"):
            line = " ".join(line.split())
            if len(line) > 20 and line not in found and wanted(line):
                found[line] = None
                size += len(line.encode())
                if size > limit:
                    return list(found)
    return list(found)


def mostly_hangul(line):
    """Whether a third of the characters are Korean syllables: untranslated pages are left out."""
    return 3 * len(re.findall("[가-힣]", line)) > len(line)


def write_real_text(path, help_pages, captions):
    """Korean and English paragraphs, shuffled, or captions if the pages are missing. Returns what it is."""
    korean = paragraphs(Path(help_pages) / "ko", 1.7e6, mostly_hangul)
    english = paragraphs(Path(help_pages) / "en-US", 3.3e6, str.isascii)
    if korean and english:
        lines = korean + english
        random.Random(0).shuffle(lines)
        sizes = [sum(len(line.encode()) for line in part) / 1e6 for part in (korean, english)]
        what = f"LibreOffice's help, {sizes[0]:.1f} MB Korean + {sizes[1]:.1f} MB English"
    else:
        lines = Path(captions).read_text(encoding="utf-8").splitlines()[-100_000:]
        what = "captions, for want of real text (apt-get install libreoffice-help-ko libreoffice-help-en-us)"
    Path(path).write_text("\n".join(lines), encoding="utf-8")
    return what


# ---- what is measured, each function in a process of its own ----

def lines_of(path):
    """The lines of a text file."""
    return Path(path).read_text(encoding="utf-8").split("\n")


def timed(function, *arguments):
    """Seconds that a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def read_lines(path):
    """Yield the lines of a text file."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield line.rstrip("\n")


def peak_memory():
    """Most megabytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train_ours(captions, entries, path, workers):
    """Seconds and peak memory in MB; the tokenizer is saved at `path`."""
    start = time.perf_counter()
    tok = tokenizer.Tokenizer.train(read_lines(captions), entries, progress=False, workers=workers)
    seconds = time.perf_counter() - start
    tok.save(path)
    return seconds, peak_memory(), tok.spec["model"]["merges"]


def lean_normalizer():
    """The peer's share of normalising: white space is folded in these texts, and folding doubles its time."""
    from tokenizers import normalizers
    return normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])


def train_tokenizers(captions, entries, path, workers):
    import tokenizers
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.normalizer = lean_normalizer()
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    start = time.perf_counter()
    peer.train([captions], tokenizers.trainers.BpeTrainer(  # its fastest way: it reads the file itself
        vocab_size=entries - 3, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return time.perf_counter() - start, peak_memory(), json.loads(peer.to_str())["model"]["merges"]


def encode_ours(text, path):
    """Seconds to load the file, to encode lines for the first time, the second time, and to a tensor."""
    lines = lines_of(text)
    load = timed(tokenizer.Tokenizer.load, path)
    tok = tokenizer.Tokenizer.load(path)
    return load, timed(tok.encode_ordinary_batch, lines), timed(tok.encode_ordinary_batch, lines)


def tensor_ours(text, path):
    """Seconds to a padded tensor, the first time and the second time."""
    import torch
    torch.set_num_threads(1)
    lines, tok = lines_of(text), tokenizer.Tokenizer.load(path)
    return timed(tok.encode, lines), timed(tok.encode, lines)


def encode_tokenizers(text, path):
    import tokenizers
    lines = lines_of(text)
    load = timed(tokenizers.Tokenizer.from_file, path)
    peer = tokenizers.Tokenizer.from_file(path)
    peer.normalizer = lean_normalizer()
    return load, *(timed(lambda: peer.encode_batch_fast(lines, add_special_tokens=False)) for _ in range(2))


def encode_tiktoken(text, path):
    import tiktoken
    lines, spec = lines_of(text), json.loads(Path(path).read_bytes())
    tok = tokenizer.Tokenizer(spec)
    ranks = {tok._bytes[i]: i for i in spec["model"]["vocab"].values() if tok._bytes[i]}
    peer = tiktoken.Encoding("peer", pat_str=tokenizer.PATTERN.pattern, mergeable_ranks=ranks, special_tokens={})
    lines = [tok.normalize(line) for line in lines]  # it has no normalizer, so its time is without
    return 0, *(timed(lambda: [peer.encode_ordinary(line) for line in lines]) for _ in range(2))


def open_clip_tokenizer():
    """open_clip's Python tokenizer, loaded without the rest of the package."""
    folder = Path(importlib.util.find_spec("open_clip").origin).parent
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)  # the package itself would need torchvision
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def encode_open_clip(text, path):
    lines, peer = lines_of(text), open_clip_tokenizer()
    return 0, *(timed(lambda: [peer.encode(line) for line in lines]) for _ in range(2))


def tensor_open_clip(text, path):
    import torch
    torch.set_num_threads(1)
    lines, peer = lines_of(text), open_clip_tokenizer()
    return timed(peer, lines), timed(peer, lines)


def long_word_ours(path):
    """Seconds and MB for one word of a million random Hangul syllables."""
    rng, tok = random.Random(0), tokenizer.Tokenizer.load(path)
    word = "".join(chr(rng.randrange(0xAC00, 0xD7A4)) for _ in range(1_000_000))
    return timed(tok.encode_ordinary, word), peak_memory()


def alone(function, *arguments, threads=1):
    """Run `function` in a fresh process whose libraries may use so many threads, and return its result."""
    limits = {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
              "OMP_NUM_THREADS": str(threads)}
    before = {key: os.environ.get(key) for key in limits}
    os.environ.update(limits)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        for key, value in before.items():
            os.environ.pop(key)
            if value is not None:
                os.environ[key] = value


def best_of(rounds, ours, peer, package):
    """The best of each of the times that the two give in alternating rounds; None for a missing peer."""
    have = peer is not None and importlib.util.find_spec(package) is not None
    results = [(ours(), peer() if have else None) for _ in range(rounds)]
    return [min(times) for times in zip(*(pair[0] for pair in results))], (
        [min(times) for times in zip(*(pair[1] for pair in results))] if have else None)


def row(what, ours, package, peer, unit, better, note):
    """A row of the table."""
    missing = f"; missing peer: pip install {PIP[package]}" if peer is None and package in PIP else ""
    return {"what": what, "ours": ours, "peer_name": package, "peer": peer, "unit": unit, "better": better,
            "note": note + missing}


# ---- the rows ----

def training_rows(captions, path, entries, note):
    """Training on one thread, on two, and its peak memory. Leaves our tokenizer at `path`."""
    have = importlib.util.find_spec("tokenizers") is not None
    for threads in (1, 2):
        seconds, memory, merges = alone(train_ours, captions, entries, path, threads)
        peer = [None, None, None]
        if have:
            peer = alone(train_tokenizers, captions, entries, path, threads, threads=threads)
        same = f"; {len(merges):,} merges {'equal' if merges == peer[2] else 'DIFFER'}" if have else ""
        label = "one thread" if threads == 1 else "two processes or threads"
        yield row(f"train, {label}", seconds, "tokenizers", peer[0], "s", "lower", note + same)
        if threads == 1:
            yield row("train, peak memory", memory, "tokenizers", peer[1], "MB", "lower", note)


def encoding_rows(text, path, what, rounds):
    """Encoding text never seen in the process, then seen, to lists and to a tensor; and loading the file."""
    size = sum(len(line.encode()) for line in lines_of(text)) / 1e6
    entries = len(json.loads(Path(path).read_bytes())["model"]["vocab"])
    note = f"{what}, {len(lines_of(text)):,} lines, {entries:,} entries"
    for package, peer in (("tokenizers", encode_tokenizers), ("tiktoken", encode_tiktoken),
                          ("open_clip", encode_open_clip)):
        ours, peers = best_of(rounds, partial(alone, encode_ours, text, path),
                              partial(alone, peer, text, path), package)
        peers = peers or [None] * 3
        for label, i in (("first time", 1), ("seen before", 2)):
            yield row(f"encode, {label}", size / ours[i], package, peers[i] and size / peers[i], "MB/s",
                      "higher", note)
        if package == "tokenizers":
            yield row("load the file", ours[0], package, peers[0], "s", "lower", f"{entries:,} entries")
    ours, peers = best_of(rounds, partial(alone, tensor_ours, text, path),
                          partial(alone, tensor_open_clip, text, path), "open_clip")
    peers = peers or [None] * 2
    for label, i in (("first time", 0), ("seen before", 1)):
        yield row(f"encode to [N, 77], {label}", size / ours[i], "open_clip", peers[i] and size / peers[i],
                  "MB/s", "higher", note + ", open_clip with CLIP's 49,408")


def tokenizer_rows(size=1.0, entries=98_000, help_pages=HELP_PAGES, rounds=3):
    """All rows. `size` 1 is 3.5M captions; training has one round, encoding `rounds`."""
    if importlib.util.find_spec("wordfreq") is None:
        yield row("train", None, "tokenizers", None, "s", "lower",
                  "no corpus: pip install --no-deps wordfreq langcodes locate msgpack ftfy wcwidth")
        return
    with tempfile.TemporaryDirectory() as folder:
        captions, text, path = (f"{folder}/{name}" for name in ("captions.txt", "text.txt", "tokenizer.json"))
        megabytes = write_captions(captions, size)
        note = f"{megabytes:.0f} MB, {int(3.5e6 * size):,} captions, {entries:,} entries"
        yield from training_rows(captions, path, entries, note)
        yield from encoding_rows(text, path, write_real_text(text, help_pages, captions), rounds)
        seconds, memory = alone(long_word_ours, path)
        yield row("a word of 1,000,000 Hangul syllables", seconds, "", None, "s", "lower",
                  f"{memory:.0f} MB peak")


# ---- data.py and crops.py ----

PICTURES, BATCH = 96, 96


def photograph(seed, width=512, height=384):
    """A random picture with the spectrum of photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    phases = np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
    planes = np.stack([np.fft.irfft2(phase / frequency**1.5, (height, width)) for phase in phases], -1)
    planes = 0.7 * planes.mean(-1, keepdims=True) + 0.3 * planes
    return Image.fromarray(np.clip(128 + 55 * planes / planes.std(), 0, 255).astype(np.uint8))


def jpegs(count=PICTURES):
    """The bytes of some pictures."""
    result = []
    for seed in range(count):
        file = io.BytesIO()
        photograph(seed).save(file, "JPEG", quality=90)
        result.append(file.getvalue())
    return result


def least_cpu(*functions, repeats=7):
    """The least CPU seconds of each function, called in turns."""
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, kept in zip(functions, times):
            start = time.process_time()
            function()
            kept.append(time.process_time() - start)
    return [min(kept) for kept in times]


def installed(name):
    """A package, None where it is missing or does not load."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError):
        return None


def through_webdataset(path, transform):
    """A function that reads `path` once through webdataset, shuffled, decoded, transformed and batched."""
    import webdataset as wds
    stages = [wds.SimpleShardList(path), wds.tarfile_to_samples(), wds.shuffle(100), wds.decode("pilrgb"),
              wds.to_tuple("jpg", "txt"), wds.map_tuple(transform), wds.batched(BATCH)]
    return lambda: [None for _ in wds.DataPipeline(*stages)]


def through_ours(path, spec, scale):
    """A function that reads `path` once through data.py and crops.py."""
    spec, pairs = crops.parse_crops(spec), data.Pairs(path)

    def read():
        loader = data.Loader(pairs, None, BATCH, 512)
        loader._kept = None  # decode anew each time, as with more pairs than memory holds
        for batch in loader:
            crops.multi_crop(batch.images, spec, 0, batch.slots, batch.aspect, scale)
    return read


def torchvision_crops():
    """torchvision's 2x224+6x96 of a picture, antialiased bicubic like ours."""
    from torchvision import transforms as T
    two, six = (T.Compose([T.RandomResizedCrop(side, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
                           T.ToTensor(), T.Normalize(crops.MEAN, crops.STD)])
                for side, scale in ((224, (0.4, 1.0)), (96, (0.05, 0.4))))
    return lambda image: [crop(image.convert("RGB")) for crop in [two] * 2 + [six] * 6]


def bench_crops():
    """Pictures a second from a shard to tensors ready for the model, for both kinds of crops."""
    torch.set_num_threads(1)
    clip = installed("open_clip")
    peers = {"open_clip": clip and clip.image_transform(224, True),
             "torchvision": torchvision_crops() if installed("torchvision") else None}
    with tempfile.TemporaryDirectory() as folder:
        pictures, path = jpegs(), f"{folder}/x.tar"
        shards.write_shard(path, [(f"{i:04d}", {"jpg": p, "txt": b"a photograph"}) for i, p in enumerate(pictures)])
        note = f"JPEGs of 512 x 384, {np.mean([len(p) for p in pictures]) / 1000:.0f} KB; canvas 512; one core; peer"
        for spec, scale, name in (("224", (0.9, 1.0), "open_clip"), ("2x224+6x96", (0.4, 1.0), "torchvision")):
            functions, transform = [through_ours(path, spec, scale)], peers[name]
            if transform:
                functions.append(lambda: [transform(Image.open(io.BytesIO(p))) for p in pictures])
            if transform and installed("webdataset"):
                one = transform if name == "open_clip" else lambda image: transform(image)[0]  # batches want one tensor
                functions.append(through_webdataset(path, one))
            rates = [PICTURES / seconds for seconds in least_cpu(*functions)] + [None] * 2
            yield row(f"{spec}: pictures a second", rates[0], name, rates[1], "pictures/s", "higher",
                      f"{note} without shards")
            yield row(f"{spec}: pictures a second", rates[0], "webdataset", rates[2], "pictures/s", "higher",
                      f"{note} + {name}'s transform")


def bench_quality():
    """How far our crops are from Pillow's crop and antialiased bicubic of the whole picture."""
    for width, height in ((400, 300), (512, 384), (1024, 768)):
        for side, error in measure_quality(width, height).items():
            yield row(f"crops of {side} from {width} x {height}: from Pillow's", error, "the bound", 2.0, "of 255", "lower",
                      "mean absolute difference; canvas 512")


def measure_quality(width, height):
    """Mean absolute difference in 0..255 by the crops' side, over four pictures of a size."""
    spec = crops.parse_crops("2x224+6x96")
    canvas, slots = crops.canvas_size(spec), torch.arange(8)
    aspect = torch.full((8,), width / height)
    factor, offset = (torch.tensor(x).view(3, 1, 1) * 255 for x in (crops.STD, crops.MEAN))
    errors = {224: [], 96: []}
    for seed in range(4):
        file = io.BytesIO()
        photograph(seed, width, height).save(file, "JPEG", quality=90)
        whole = shards.decode(file.getvalue())
        pixels = data.fit(shards.decode(file.getvalue(), canvas), canvas)
        images = torch.zeros(8, 3, canvas, canvas, dtype=torch.uint8)
        images[:, :, : pixels.shape[0], : pixels.shape[1]] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        for crop, view in enumerate(crops.multi_crop(images, spec, 0, slots, aspect)):
            side, scale = view.shape[-1], (0.4, 1.0) if crop < 2 else (0.05, 0.4)
            boxes = crops.crop_boxes(0, slots, crop, canvas, aspect, scale)
            for one, box in zip(view * factor + offset, boxes.tolist()):
                x, y, w, h = (v * whole.width / canvas for v in box)
                box = (x, y, min(x + w, whole.width), min(y + h, whole.height))
                wanted = np.asarray(whole.resize((side, side), Image.BICUBIC, box=box), np.float32)
                errors[side].append(np.abs(one.permute(1, 2, 0).numpy() - wanted).mean())
    return {side: float(np.mean(kept)) for side, kept in errors.items()}


def bench_index():
    """Seconds to index a shard of 10,000 pairs of 53 KB, beside the standard library's walk over it."""
    with tempfile.TemporaryDirectory() as folder:
        path, body = f"{folder}/x.tar", os.urandom(53_000)
        shards.write_shard(path, ((f"{i:09d}", {"jpg": body, "json": b"{}" * 200, "txt": b"a caption"})
                                  for i in range(10_000)))

        def walk():
            with tarfile.open(path) as tar:
                return sum(1 for _ in tar)
        ours, theirs = least_cpu(lambda: shards.index_tar(path), walk, repeats=3)
    yield row("index of 10,000 pairs", ours, "tarfile alone", theirs, "s", "lower",
              "jpg, json and txt each, 560 MB in the page cache")


LISTED = """
import re, sys, time
import numpy as np
import data
import shards
memory = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before, start = memory(), time.perf_counter()
pairs = data.Pairs(sys.argv[1])
loader = data.Loader(pairs, None, 4096, 224, seed=1, start=5 * len(pairs) // 2)
numbers = loader.order(loader.start, 4096)
rows = {}
for number in numbers:
    shard = int(np.searchsorted(pairs.starts, number, "right")) - 1
    if shard not in rows:
        rows[shard] = shards.shard_rows(pairs.shards[shard])
    block, length = rows[shard][number - pairs.starts[shard]]
print(time.perf_counter() - start, memory() - before, len(pairs))
"""


def bench_listed(tars, rows=10_000):
    """Start-up and memory with so many shards listed, of 10,000 pairs each: open the index, go to the middle of the third
    epoch, and find where on disk each of a batch's 4,096 pairs lies."""
    with tempfile.TemporaryDirectory() as folder:
        listed = []
        table = np.stack([np.arange(rows, dtype=np.uint32) * 120, np.full(rows, 55_000, np.uint32)], 1)
        for i in range(tars):
            path = f"{folder}/{i:05d}.tar"
            with open(path, "wb") as file:
                file.truncate(rows * 120 * 512 + 1024)  # a file of holes: none of it is read
            status = os.stat(path)
            listed.append(shards.Shard(path, status.st_size, status.st_mtime_ns, rows, {"": rows}, {}, rows=table))
        shards._write_index(f"{folder}/pairs.index", {shard.path: shard for shard in listed})
        run = subprocess.run([sys.executable, "-c", LISTED, folder], capture_output=True, text=True, check=True,
                             cwd=Path(__file__).parent.parent)
        seconds, megabytes, count = map(float, run.stdout.split())
    note = f"{count / 1e6:.0f}M pairs in {tars:,} shards"
    yield row("open the index and reach the 2.5th epoch", seconds, "", None, "s", "lower", note)
    yield row("memory that this takes", megabytes, "", None, "MB", "lower", note)


def bench_workers():
    """Pictures a second against worker processes, as far as the cores go."""
    with tempfile.TemporaryDirectory() as folder:
        pictures, path = jpegs(), f"{folder}/x.tar"
        shards.write_shard(path, [(f"{i:04d}", {"jpg": pictures[i % PICTURES], "txt": b"x"}) for i in range(768)])
        pairs, single = data.Pairs(path), None
        for workers in range(1, len(os.sched_getaffinity(0)) + 1):
            loader = data.Loader(pairs, None, BATCH, 512, workers=workers)
            loader._kept = None
            batches = iter(loader)
            next(batches)  # workers are up
            start = time.perf_counter()
            count = sum(len(batch.slots) for batch in batches)
            rate = count / (time.perf_counter() - start)
            single = single or rate
            yield row(f"loading with {workers} workers", rate, "one worker", single, "pictures/s", "higher",
                      "decoded, on the canvas, in the training process")


# ---- training ----

def loss_and_backward(which, batch, width=512):
    """Least seconds, and megabytes beyond its inputs, of one loss of a library, forward and backward, in float32."""
    import kelip
    import torch
    features = [kelip.unit(torch.randn(batch, width)).requires_grad_() for _ in range(2)]
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    if which == "open_clip":
        from open_clip.loss import ClipLoss
        loss = ClipLoss()
    else:
        loss = kelip.contrastive_loss
    small = [x[:64].detach().requires_grad_() for x in features]
    loss(*small, scale).backward()  # libraries are loaded and threads are up
    before, seconds = peak_memory(), [timed(lambda: loss(*features, scale).backward())]
    after = peak_memory()
    if batch <= 8192:
        seconds += [timed(lambda: loss(*features, scale).backward()) for _ in range(3)]
    return min(seconds), after - before


def bench_loss(batches, threads=2):
    """The contrastive loss alone, each library's in a fresh process."""
    for batch in batches:
        ours, theirs = best_of(1 if batch > 8192 else 2, *(
            partial(alone, loss_and_backward, which, batch, threads=threads) for which in ("ours", "open_clip")), "open_clip")
        theirs = theirs or (None, None)
        note = f"batch {batch:,}, width 512, forward and backward, float32, {threads} threads"
        yield row("contrastive loss", ours[0], "open_clip", theirs[0], "s", "lower", note)
        yield row("contrastive loss, memory", ours[1], "open_clip", theirs[1], "MB", "lower", note)


def fastest(*steps, repeats=5):
    """Least seconds of each step, taken in turns after one round to warm up."""
    times = [[] for _ in steps]
    for turn in range(repeats + 1):
        for step, kept in zip(steps, times):
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            kept += [time.perf_counter() - start] * (turn > 0)
    return [min(kept) for kept in times]


def batch_of(config, batch, sizes, seed=0):
    """Crops of each size and captions of 6 to 25 tokens, as token ids padded to 77."""
    torch.manual_seed(seed)
    end = config["vocab_size"] - 1
    tokens = torch.randint(300, end - 3, (batch, 77))
    place, last = torch.arange(77), torch.randint(5, 25, (batch, 1))
    tokens = tokens.masked_fill(place == last, end).masked_fill(place > last, 0)
    return [torch.randn(batch, 3, size, size) for size in sizes], tokens


def step_of(model, job, crops_or_images, tokens, encode, loss):
    """A step of training: forward in bfloat16, loss, backward, AdamW."""
    optimizer = trainer.make_optimizer(model, 1e-4, (0.9, 0.98), 1e-6, 0.2)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(job.device.type, torch.bfloat16):
            features = encode(crops_or_images, tokens)
        loss(*features).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def our_step(config, job, views, tokens):
    """A step of train_clip.py, from crops on."""
    model = kelip.KELIP(**config).to(job.device)
    towers = train_clip.Towers(model)
    return step_of(model, job, views, tokens, towers, kelip.contrastive_loss)


def open_clip_step(config, job, views, tokens):
    """The same by open_clip, whose model is compiled on a GPU."""
    import open_clip
    model = open_clip.create_model("ViT-B-32-quickgelu").to(job.device)
    encode = torch.compile(model) if job.device.type == "cuda" else model
    return step_of(model, job, views[0], tokens.to(job.device), encode, open_clip.loss.ClipLoss())


def bench_steps(batch=32):
    """Whole steps of ViT-B/32 on this machine's device, open_clip's and ours in turns."""
    job = trainer.start_job()
    batch = 4096 if job.device.type == "cuda" else batch
    config = dict(kelip.PRESETS["ViT-B/32"], vocab_size=49_408)
    views, tokens = batch_of(config, batch, [224])
    views = [view.to(job.device) for view in views]
    note = f"ViT-B/32, 49,408 tokens, batch {batch:,}, bfloat16, captions of 6 to 25 tokens"
    steps = [our_step(config, job, views, tokens)]
    if importlib.util.find_spec("open_clip"):
        steps.append(open_clip_step(config, job, views, tokens))
    rates = [batch / seconds for seconds in fastest(*steps)]
    length = float((tokens.argmax(1) + 1).float().mean())
    tflops = 3 * (trainer.image_flops(config, [224]) + trainer.text_flops(config, length)) * rates[0] / 1e12
    yield row("step, one 224 crop", rates[0], "open_clip", rates[1] if len(rates) > 1 else None, "pairs/s", "higher",
              f"{note}; ours does {tflops:.2f} Tflop/s")
    del steps
    views, tokens = batch_of(config, batch, [224] * 2 + [96] * 6)
    views = [view.to(job.device) for view in views]
    [seconds] = fastest(our_step(config, job, views, tokens), repeats=3)
    yield row("step, 2x224+6x96", batch / seconds, "", None, "pairs/s", "higher", note)


def bench_autoencoder(batch=32):
    """The encoder of stage 1 on a quarter of the patches, beside all of them; then the whole of stage 1."""
    job = trainer.start_job()
    config = dict(kelip.PRESETS["ViT-B/16"], vocab_size=512, transformer_layers=1)
    mae = kelip.MAE(kelip.KELIP(**config).visual).to(job.device)
    images = torch.randn(batch, 3, 224, 224, device=job.device)
    patches = len(mae.decoder_positions) - 1
    every = torch.arange(patches, device=job.device).expand(batch, -1)

    def encoder(keep):
        with torch.autocast(job.device.type, torch.bfloat16):
            latent = mae.forward_encoder(images, keep)
        latent.float().square().mean().backward()

    def whole():
        with torch.autocast(job.device.type, torch.bfloat16):
            loss, _, _ = mae(images)
        loss.backward()
    quarter, full, stage = fastest(lambda: encoder(every[:, :patches // 4]), lambda: encoder(every), whole, repeats=3)
    note = f"ViT-B/16, batch {batch}, bfloat16, forward and backward"
    yield row("encoder on 25 % of the patches", quarter, "all patches", full, "s", "lower", note)
    yield row("stage 1, with its decoder of 8 x 512", stage, "all patches", full, "s", "lower", note)


def bench_processes(steps=40):
    """Two gloo processes on two cores beside one on one core, through train_clip.py on the demo's pairs."""
    rates = []
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
            subprocess.run([sys.executable, *launcher, "train_clip.py", "--steps", str(steps), "--evals", "0",
                            "--batch-size", str(128 * processes), "--out", f"{folder}/run"], check=True,
                           capture_output=True, cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})
            lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl", encoding="utf-8")]
            found = sorted(line["images_per_second"] for line in lines if line["step"] > 10)
            rates.append(found[len(found) // 2])
    yield row("two processes, each on a core", rates[1], "one on one core", rates[0], "pairs/s", "higher",
              "train_clip.py, tiny, 128 pairs a process, torchrun")


def bench_photographs(steps=10, batch=4):
    """train_clip.py itself: ViT-B/32 at 2x224+6x96, ten steps from a shard as img2dataset writes it."""
    with tempfile.TemporaryDirectory() as folder:
        pictures = jpegs(16)
        captions = [f"photograph number {i} of no place in particular" for i in range(8)] + [
            f"어디도 아닌 곳의 사진 {i}번" for i in range(8)]
        shards.write_shard(f"{folder}/00000.tar", [
            (f"{i:09d}", {"jpg": picture, "txt": caption.encode(), "json": json.dumps({"caption": caption}).encode()})
            for i, (picture, caption) in enumerate(zip(pictures, captions))])
        subprocess.run([sys.executable, "train_clip.py", "--model", "ViT-B/32", "--data", f"{folder}/00000.tar", "--steps",
                        str(steps), "--batch-size", str(batch), "--evals", "0", "--out", f"{folder}/run"], check=True,
                       capture_output=True, cwd=Path(__file__).parent.parent)
        lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl", encoding="utf-8")]
    rates = sorted(line["images_per_second"] for line in lines)
    yield row(f"train_clip.py, {steps} steps from shards", rates[len(rates) // 2], "", None, "pairs/s", "higher",
              f"ViT-B/32, 2x224+6x96, batch {batch}, JPEGs of 512 x 384, loader and all; loss {lines[0]['loss']:.2f} to "
              f"{lines[-1]['loss']:.2f}")


# ---- evaluate.py ----

class Lengths:
    """A tokenizer whose texts are as long as captions: 6 to 25 tokens, the same for the same text."""

    def encode(self, texts, context_length):
        import torch
        rows = torch.zeros(len(texts), context_length, dtype=torch.int64)
        for row, text in zip(rows, texts):
            rng = random.Random(text)
            length = rng.randint(5, 24)
            row[:length + 1] = torch.tensor([rng.randint(300, 49_000) for _ in range(length)] + [49_407])
        return rows


def encoders(batch=64):
    """(what, ours, open_clip's or None) of ViT-B/32 without gradients, one batch each: pictures and captions, in float32 and in
    bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = dict(kelip.PRESETS["ViT-B/32"], vocab_size=49_408)
    [images], tokens = batch_of(config, batch, [224])
    images, model, theirs = images.to(device), kelip.KELIP(**config).to(device).eval(), None
    if importlib.util.find_spec("open_clip"):
        import open_clip
        theirs = open_clip.create_model("ViT-B-32-quickgelu").to(device).eval()

    def encode(model, name, inputs, half):
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=half):
            getattr(model, name)(inputs)
    for name, what, inputs in (("encode_image", "pictures", images), ("encode_text", "captions", tokens)):
        for half in (False, True):
            yield (f"{what} embedded, {'bfloat16' if half else 'float32'}", partial(encode, model, name, inputs, half),
                   theirs and partial(encode, theirs, name, inputs.to(device), half))


def retrieval_of(count, width=512):
    """Seconds and megabytes, beyond the features, of recall both ways between so many pictures and as many texts."""
    import evaluate
    import kelip
    import torch
    images = kelip.unit(torch.randn(count, width))
    texts = kelip.unit(images + torch.randn(count, width))
    owner = torch.arange(count)
    evaluate.recall_at_k(images[:64], texts[:64], owner[:64])
    before = peak_memory()
    return timed(evaluate.recall_at_k, images, texts, owner), peak_memory() - before


def classification_of(count, classes=1000, templates=24, part=20):
    """Seconds for the classes' vectors, from a part of them, and for the five best classes of so many pictures, with
    ViT-B/32."""
    import evaluate
    import kelip
    import torch
    model = kelip.KELIP(**dict(kelip.PRESETS["ViT-B/32"], vocab_size=49_408)).eval()
    names, prompts = [f"class {n}" for n in range(classes)], [f"{n} {{}}" for n in range(templates)]
    images, weights = (kelip.unit(torch.randn(n, 512)) for n in (count, classes))
    seconds = timed(evaluate.zero_shot_weights, model, Lengths(), names[:-(-classes // part)], prompts)
    return part * seconds, timed(evaluate.best_classes, images, weights.T)


def bench_evaluate(size=1.0, batch=64):
    """Embedding beside open_clip, then retrieval and classification of 50,000 x size pictures."""
    note, rate = f"ViT-B/32, batch {batch}, no gradients", None
    for what, ours, theirs in encoders(batch):
        seconds = fastest(*filter(None, (ours, theirs)))
        rate = rate or batch / seconds[0]
        yield row(what, batch / seconds[0], "open_clip", batch / seconds[1] if theirs else None, "per s", "higher", note)
    count, classes = int(50_000 * size), max(2, int(1000 * size))
    seconds, megabytes = alone(retrieval_of, count, threads=os.cpu_count())
    note = f"{count:,} pictures x {count:,} texts, width 512, float32, both ways"
    yield row("recall at 1, 5, 10", seconds, "", None, "s", "lower", note)
    yield row("recall at 1, 5, 10, memory", megabytes, "", None, "MB", "lower", f"{note}; all scores would be "
              f"{4 * count ** 2 / 1e6:,.0f} MB")
    vectors, scores = alone(classification_of, count, classes, threads=os.cpu_count())
    note = f"{count:,} pictures, {classes:,} classes, 24 templates; embedding the pictures, at the rate above, {count / rate:,.0f} s"
    yield row("vectors of the classes, 20 times those of a 20th", vectors, "", None, "s", "lower", note)
    yield row("scores and the five best", scores, "", None, "s", "lower", note)


# ---- many GPUs, on paper ----

NVLINK, INFINIBAND = 300e9, 25e9  # bytes a second and GPU, each way: A100 SXM's NVSwitch; 8 x HDR 200 Gbit/s a node of 8


def print_network(nodes=10, gpus=8, batch=32_000, utilisation=0.4, caption=15):
    """What one step of ViT-B/32 at 2x224+6x96 sends between A100s, by arithmetic; nothing is measured here.

    A ring sends (W - 1) / W of the whole, twice for a sum; times are for the slower of NVLink, if all GPUs were on one
    switch, and of InfiniBand, with every byte across it."""
    config, world, crops_ = kelip.PRESETS["ViT-B/32"], nodes * gpus, [224] * 2 + [96] * 6
    with torch.device("meta"):
        weights = kelip.count_parameters(kelip.KELIP(**config))
    flops = 3 * (trainer.image_flops(config, crops_) + trainer.text_flops(config, caption)) * batch / world
    step = flops / (utilisation * trainer.PEAK["A100"])
    ring = (world - 1) / world
    width, K = config["embed_dim"], len(crops_)
    parts = (("texts' features, gathered", ring * batch * width * 4),
             ("their gradients, summed", 2 * ring * batch * width * 4),
             (f"normalisers of {K} x {batch:,} columns", 4 * ring * K * batch * 4),
             (f"gradients of {weights / 1e6:.0f}M weights, summed", 2 * ring * weights * 4))
    print(f"{world} x A100, batch {batch:,}: {flops / 1e12:.1f} Tflop a GPU, {1e3 * step:.0f} ms a step "
          f"at {utilisation:.0%} of {trainer.PEAK['A100'] / 1e12:.0f} Tflop/s (assumed)")
    print(f"{'sent by each GPU, each step':42} {'MB':>8} {'NVLink, ms':>11} {'InfiniBand, ms':>15} {'of the step':>12}")
    for what, size in (*parts, ("all", sum(size for _, size in parts))):
        print(f"{what:42} {size / 1e6:8.0f} {1e3 * size / NVLINK:11.1f} {1e3 * size / INFINIBAND:15.1f} "
              f"{size / INFINIBAND / step:12.1%}")


# ---- the command ----

def main():
    """Print the rows of one part, or of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", choices=["data", "tokenizer", "train", "evaluate", "network"],
                        default=["data", "tokenizer", "train", "evaluate"], help="what to measure (default: all)")
    parser.add_argument("--batches", type=int, nargs="+", default=[8192], metavar="N",
                        help="batches of the loss's rows (default: 8192; 32768 takes minutes and open_clip 17 GB)")
    parser.add_argument("--size", type=float, default=1.0, help="of the tokenizer's corpus: 1 is 3.5M captions, 188 MB; and of "
                        "the sets that are evaluated: 1 is 50,000 pictures (default: 1)")
    parser.add_argument("--vocab-size", type=int, default=98_000, help="entries of the tokenizer (default: 98000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the encoding rows (default: 3)")
    parser.add_argument("--help-pages", default=HELP_PAGES, help="LibreOffice's help, with ko and en-US")
    args = parser.parse_args()
    rows = {"train": lambda: chain(bench_loss(args.batches), bench_steps(), bench_autoencoder(), bench_photographs(),
                                   bench_processes()),
            "data": lambda: chain(bench_crops(), bench_quality(), bench_index(), bench_listed(1000), bench_listed(8000),
                                  bench_workers()),
            "evaluate": lambda: bench_evaluate(args.size),
            "tokenizer": lambda: tokenizer_rows(args.size, args.vocab_size, args.help_pages, args.rounds)}
    if "network" in args.part:
        print_network()
        args.part = [part for part in args.part if part != "network"]
    print(f"{'what':58} {'ours':>10} {'peer':>10} {'ratio':>7}" * bool(args.part))
    for part in dict.fromkeys(args.part):
        for row in rows[part]():
            ours, peer = ("-" if row[key] is None else f"{row[key]:,.2f}" for key in ("ours", "peer"))
            ratio = f"{row['ours'] / row['peer']:.2f}" if row["peer"] and row["ours"] else "-"
            print(f"{row['what']:58} {ours:>10} {peer:>10} {ratio:>7}  {row['unit']}; {row['peer_name']}; {row['note']}",
                  flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"bench.py: {error}")
