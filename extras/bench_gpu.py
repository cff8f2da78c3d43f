"""Speed and memory on one GPU: python -m extras.bench gpu --out FILE.

    python -m extras.bench gpu --out gpu.md                  all rows, within eight minutes
    python -m extras.bench gpu --out gpu.md --rows loss crops
    python -m extras.bench gpu --pack data/emoji-webp        the demo's pairs, to take along

row        measures
limits     matrix products and copies alone: what this card can do
crops      crops from uint8 on the GPU
loss       the contrastive loss beside its matrix products alone, and beside open_clip's
train      training steps of ViT-B/32 and ViT-L/14 in bf16, eager and compiled; ViT-B/32 beside
           open_clip's compiled model and loss
loader     decoding with 8 and 16 processes, and train_clip.py from JPEG shards
mae        steps of stage 1
profile    the parts of a step: matrix products, attention, loss, copies, gaps
waits      calls in a step that wait for the GPU: there should be none
demo       the demo from end to end, and the time to 40 % R@1 (--demo: a folder of --pack)
more       training steps in fp16, and ViT-L/14 beside open_clip's, which compiles for minutes

FILE.md holds the table and FILE.json the numbers. Both are written again after each line. A row
that fails leaves its error in the table, and the next one starts. A line whose turn comes after
--minutes is left out, and says so.

Nothing is downloaded. Rows whose package is not installed have no peer. Utilization is MFU: the
FLOPs that the model needs, per second, as a fraction of the card's peak (extras/bench.py).

From top to bottom: results and their table, timing, a section for each row, and the command.

Not included: several GPUs, and the quality of models.
"""

import argparse
import collections
import gc
import io
import json
import os
import tarfile
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import crops
import data
import demo
import kelip
import shards
import train_clip
import trainer
from extras import bench
from tokenizer import run_command


class Sizes(NamedTuple):
    """How much is measured."""
    models: dict      # the name of a model -> (its configuration, open_clip's name, its batch)
    multi_crop: str   # crops
    losses: tuple     # batches of the contrastive loss
    matrix: int       # side of the matrices of `limits`
    copies: int       # of the shard of 96 images, for the loader
    steps: int        # of train_clip.py from JPEG shards
    epochs: int       # of the demo
    workers: tuple    # numbers of loader processes

    @property
    def small(self):
        """The model of the rows that take one: the first."""
        return next(iter(self.models))


def base(name):
    """A preset with the vocabulary of OpenAI's CLIP, as open_clip has it."""
    return dict(kelip.PRESETS[name], vocab_size=49_408)


FULL = Sizes(
    models={"ViT-B/32": (base("ViT-B/32"), "ViT-B-32-quickgelu", 1024),
            "ViT-L/14": (base("ViT-L/14"), "ViT-L-14-quickgelu", 192)},
    multi_crop="2x224+6x96", losses=(8192, 32768), matrix=8192, copies=48,
    steps=40, epochs=40, workers=(8, 16))
TINY = dict(base("ViT-B/32"), vision_width=64, vision_layers=2, transformer_width=64,
            transformer_heads=1, transformer_layers=2, embed_dim=64)
TOY = Sizes(
    models={"toy": (TINY, "", 4)}, multi_crop="1x224+1x96", losses=(64,), matrix=64,
    copies=1, steps=2, epochs=1, workers=(1,))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


# ---- results and their table ----

class Result(NamedTuple):
    """One line of the table."""
    what: str
    value: float         # None for an error
    unit: str
    mfu: float = None    # model FLOPs utilization
    memory: float = None  # gigabytes, the peak
    peer: str = ""       # what the value is compared with
    peer_value: float = None
    note: str = ""
    row: str = ""        # filled in by the command


def format_number(x, spec=".4g"):
    """A number as short text; "" for None."""
    if x is None:
        return ""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:{spec}}"


def format_table(results):
    """The results as a table in Markdown."""
    lines = ["| row | what | value | unit | MFU | GB | compared with | its value | value / its | "
             "note |", "|---" * 10 + "|"]
    for r in results:
        ratio = r.value / r.peer_value if r.value and r.peer_value else None
        mfu = "" if r.mfu is None else f"{r.mfu:.1%}"
        cells = [r.row, r.what, format_number(r.value), r.unit, mfu, format_number(r.memory, ".1f"),
                 r.peer, format_number(r.peer_value), format_number(ratio, ".2f"), r.note]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_results(path, title, results):
    """Write FILE.md and FILE.json."""
    path = Path(path).with_suffix("")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"{title}\n\n{format_table(results)}\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    lines = [r._asdict() for r in results]
    path.with_suffix(".json").write_text(
        json.dumps({"title": title, "results": lines}, indent=1), encoding="utf-8")


# ---- timing ----

class Clock:
    """Times functions on a device."""

    def __init__(self, device):
        self.device = device
        self.is_gpu = device.type == "cuda"

    def synchronize(self):
        if self.is_gpu:
            torch.cuda.synchronize()

    def free_memory(self):
        """Free the models of the last result, which refer to themselves where they are compiled."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def seconds(self, *functions, budget=1.0, least=3, calls=4):
        """The median seconds of each function, timed in turns after one call to warm up.

        A function is timed for `budget` seconds, and at least `least` times. Each time has several
        calls, and waits for the GPU after the last one, as training does between log steps.
        """
        for function in functions:
            function()
            self.synchronize()
        times = [[] for _ in functions]
        end = time.perf_counter() + budget * len(functions)
        while len(times[0]) < least or time.perf_counter() < end:
            for function, own in zip(functions, times):
                start = time.perf_counter()
                for _ in range(calls):
                    function()
                self.synchronize()
                own.append((time.perf_counter() - start) / calls)
        return [float(np.median(own)) for own in times]

    def peak_memory(self, function):
        """The most gigabytes that one call holds, None on a CPU."""
        if not self.is_gpu:
            return None
        torch.cuda.reset_peak_memory_stats()
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated() / 1e9


# ---- limits ----

def limits_rows(clock, sizes, args):
    """What the card does at best: products in each precision, and copies."""
    N, peak = sizes.matrix, bench.peak_flops(clock.device)
    for name, dtype in (("bf16", torch.bfloat16), ("float32 as TF32", torch.float32)):
        a, b = (torch.randn(N, N, device=clock.device, dtype=dtype) for _ in range(2))
        [seconds] = clock.seconds(lambda a=a, b=b: a @ b, budget=0.5)
        rate = 2 * N ** 3 / seconds
        yield Result(f"product of {N} x {N}, {name}", rate / 1e12, "TFLOP/s",
                     mfu=peak and dtype == torch.bfloat16 and rate / peak or None)
    a = torch.empty(16 * N * N, dtype=torch.uint8, device=clock.device)
    b = torch.empty_like(a)
    [seconds] = clock.seconds(lambda: b.copy_(a), budget=0.5)
    yield Result("copy on the device", 2 * a.numel() / seconds / 1e9, "GB/s", note="read + written")


# ---- train ----

class Step:
    """A training step as in train_clip.py, from normalized crops on.

    encode() returns image features, text features and the factor on the cosines.
    """

    def __init__(self, device, model, encode, loss, dtype):
        self.device, self.model, self.encode, self.loss, self.dtype = (
            device, model, encode, loss, DTYPES[dtype])
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = trainer.make_optimizer(model, lr=1e-5, betas=(0.9, 0.98), eps=1e-6,
                                                weight_decay=0.2)
        is_fp16 = dtype == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=is_fp16, init_scale=256.0)

    def __call__(self):
        with torch.autocast(self.device.type, self.dtype):
            features = self.encode()
        loss = self.loss(*features)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, trainer.MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def our_step(device, config, inputs, dtype, compiled):
    """A Step of our model. inputs: views and tokens."""
    with device:  # initialize there, which is faster
        model = kelip.KELIP(**config)
    if compiled:
        trainer.compile_blocks(model)
    encode = partial(train_clip.Encoders(model), *inputs)
    loss = partial(kelip.contrastive_loss, compile=compiled)
    return Step(device, model, encode, loss, dtype)


def open_clip_step(device, name, inputs, dtype):
    """A Step of open_clip's model and loss, compiled; None if it is not installed."""
    open_clip = bench.try_import("open_clip")
    if not open_clip or not name:
        return None
    model = open_clip.create_model(name, device=device)
    views, tokens = inputs
    encode = partial(torch.compile(model), views[0], tokens.to(device))
    return Step(device, model, encode, open_clip.loss.ClipLoss(), dtype)


def inputs_of(device, batch, sizes):
    """Random crops on the device, and captions of 6 to 25 tokens in pinned memory."""
    _, tokens = bench.random_batch(batch, [])
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    return [torch.randn(batch, 3, size, size, device=device) for size in sizes], tokens


def sides(spec):
    """The side of each crop: "2x224+6x96" -> [224, 224, 96, ...]."""
    return [size for number, size in crops.parse_crops(spec) for _ in range(number)]


def flops_of(config, sizes, tokens):
    """FLOPs of a training step, of one pair."""
    length = (tokens.argmax(dim=1) + 1).float().mean().item()
    forward = bench.image_flops(config, sizes) + bench.text_flops(config, length)
    return bench.FORWARD_AND_BACKWARD * forward


def train_rows(clock, sizes, args):
    """Images per second of training steps in bf16. open_clip's is timed in turns with ours."""
    small, *others = sizes.models
    kinds = [(name, "1x224") for name in sizes.models] + [(small, sizes.multi_crop)]
    for compiled in (True, False):
        for name, spec in kinds:
            with_peer = compiled and (name, spec) == (small, "1x224")
            yield partial(train_row, clock, sizes, name, spec, "bf16", compiled, with_peer)


def more_rows(clock, sizes, args):
    """Training steps in fp16, and open_clip's of the larger models."""
    small, *others = sizes.models
    for compiled in (False, True):
        for name, spec in [(name, "1x224") for name in sizes.models] + [(small, sizes.multi_crop)]:
            yield partial(train_row, clock, sizes, name, spec, "fp16", compiled, False)
    for name in others:
        yield partial(train_row, clock, sizes, name, "1x224", "bf16", True, True)


def train_row(clock, sizes, name, spec, dtype, compiled, with_peer):
    """The Result of one kind of step."""
    config, peer_name, batch = sizes.models[name]
    if spec == sizes.multi_crop:  # it has more tokens
        batch //= 2
    inputs = inputs_of(clock.device, batch, sides(spec))
    torch._dynamo.reset()
    start = time.perf_counter()
    steps = [our_step(clock.device, config, inputs, dtype, compiled)]
    steps[0]()
    clock.synchronize()
    first = time.perf_counter() - start
    memory = clock.peak_memory(steps[0])
    peer = open_clip_step(clock.device, peer_name, inputs, dtype) if with_peer else None
    if peer:
        start = time.perf_counter()
        peer()
        clock.synchronize()
        first_of_peer = time.perf_counter() - start
        steps.append(peer)
    rates = [batch / seconds for seconds in clock.seconds(*steps)]
    flops = flops_of(config, sides(spec), inputs[1]) * rates[0]
    peak = bench.peak_flops(clock.device)
    note = f"batch {batch}; first step {first:.0f} s"
    if peer:
        note += f"; its first step {first_of_peer:.0f} s"
    kind = "compiled" if compiled else "eager"
    return Result(f"{name}, {spec}, {dtype}, {kind}", rates[0], "images/s",
                  mfu=flops / peak if peak else None, memory=memory,
                  peer="open_clip compiled" if peer else "",
                  peer_value=rates[1] if peer else None, note=note)


# ---- profile ----

KINDS = (  # the parts of a step, by words in the names of kernels; the first that fits counts
    ("compiled kernels: LayerNorm, GELU, sums", ("triton",)),
    ("copies between host and device", ("HtoD", "DtoH")),
    ("attention", ("sdpa", "flash", "fmha", "attention")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "xmma")),
    ("optimizer and norm of gradients", ("multi_tensor", "Adam")),
    ("copies and casts on the device", ("Memcpy", "Memset", "copy", "fill", "CatArray")),
    ("LayerNorm", ("layer_norm", "LayerNorm", "GammaBeta")),
    ("gathers and scatters", ("index", "gather", "scatter", "embedding", "sort", "Radix")))


def kernel_seconds(clock, function):
    """The seconds of each kind of kernel in one call, and the call's: (Counter, seconds, list).

    The list has the kernels that take most: (seconds, name).
    """
    function()
    clock.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        function()
    clock.synchronize()
    wall = (time.perf_counter() - start) / 3
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            function()
        clock.synchronize()
    kinds, names = collections.Counter(), collections.Counter()
    for event in profile.events():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if not on_device or getattr(event, "is_user_annotation", False):
            continue
        seconds = event.time_range.elapsed_us() / 1e6 / 3
        kind = "other element-wise kernels"
        for name, words in KINDS:
            if any(word.lower() in event.name.lower() for word in words):
                kind = name
                break
        kinds[kind] += seconds
        names[event.name] += seconds
    return kinds, wall, [(seconds, name) for name, seconds in names.most_common(12)]


def profile_rows(clock, sizes, args):
    """The parts of a step, eager and compiled; the loss is a part of its own."""
    for compiled in (True, False):
        yield from profile_of(clock, sizes, "1x224", compiled)


def profile_of(clock, sizes, spec, compiled):
    """The parts of one step, in milliseconds."""
    config, _, batch = sizes.models[sizes.small]
    inputs = inputs_of(clock.device, batch, sides(spec))
    torch._dynamo.reset()
    step = our_step(clock.device, config, inputs, "bf16", compiled)
    with torch.no_grad(), torch.autocast(clock.device.type, torch.bfloat16):
        features = step.encode()
    kinds, wall, names = kernel_seconds(clock, step)
    loss_kinds, _, _ = kernel_seconds(clock, partial(loss_step, kelip.contrastive_loss, features))
    kinds.subtract(loss_kinds)
    kinds["loss"] = loss_kinds.total()
    kinds["gaps: the GPU has nothing to do"] = wall - kinds.total()
    kind = "compiled" if compiled else "eager"
    what = f"{sizes.small}, {spec}, bf16, {kind}"
    yield Result(f"{what}: a step", 1e3 * wall, "ms", note=f"batch {batch}")
    for name, seconds in kinds.most_common():
        yield Result(f"{what}: {name}", 1e3 * seconds, "ms", note=f"{seconds / wall:.1%}")
    longest = "; ".join(f"{1e3 * seconds:.2f} ms {name[:60]}" for seconds, name in names)
    print(f"longest kernels: {longest}", flush=True)


# ---- waits ----

def waits_rows(clock, sizes, args):
    """Calls in a step that wait for the GPU, crops included, as torch's debug mode finds them."""
    config, _, batch = sizes.models[sizes.small]
    batch //= 2
    images, aspect, tokens = uint8_images(clock.device, batch, sizes)
    step = our_step(clock.device, config, (None, tokens), "bf16", compiled=False)
    groups = crops.parse_crops(sizes.multi_crop)
    encoders = train_clip.Encoders(step.model)

    def encode():
        index = torch.arange(batch)
        return encoders(crops.multi_crop(images, groups, 0, index, aspect, flip=True), tokens)

    step.encode = encode
    step()
    places = collections.Counter()
    if clock.is_gpu:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "synchroniz" in str(warning.message):
                places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
    note = ", ".join(f"{place} ({count})" for place, count in places.most_common(8))
    yield Result(f"waits in a step, {sizes.multi_crop}, eager", places.total(), "calls", note=note)


# ---- loss ----

def loss_step(loss, features):
    """The loss of features, forward and backward."""
    leaves = [feature.detach().requires_grad_() for feature in features]
    loss(*leaves).backward()


def loss_rows(clock, sizes, args):
    """The loss, compiled and eager, its four products alone, and open_clip's loss."""
    open_clip = bench.try_import("open_clip")
    for batch in sizes.losses:
        image, text = (kelip.l2_normalize(torch.randn(batch, 512, device=clock.device))
                       for _ in range(2))
        features = image, text, torch.tensor(1 / 0.07, device=clock.device)
        functions = [partial(products_of_loss, image, text)]
        for compiled in (True, False):
            loss = partial(kelip.contrastive_loss, compile=compiled)
            functions.append(partial(loss_step, loss, features))
        if open_clip:
            functions.append(partial(loss_step, open_clip.loss.ClipLoss(), features))
        products, *seconds = clock.seconds(*functions)
        _, *memory = [clock.peak_memory(function) for function in functions]
        rate = 4 * 2 * batch ** 2 * image.shape[1] / products / 1e12
        for name, own, gigabytes in zip(("compiled", "eager", "open_clip's"), seconds, memory):
            yield Result(f"contrastive loss of {batch}, forward and backward, {name}", 1e3 * own,
                         "ms", memory=gigabytes, peer="its products alone",
                         peer_value=1e3 * products, note=f"the products do {rate:.0f} TFLOP/s")


def products_of_loss(image, text):
    """The matrix products of the loss, in its chunks: the logits twice, and both gradients."""
    d_text = torch.zeros_like(text)
    chunk = max(512, kelip.GPU_LOGITS // len(text))
    for part in image.split(chunk):
        part @ text.T                                                        # [chunk, N]
        logits = part @ text.T
        logits @ text                                                        # [chunk, D]
        d_text.addmm_(logits.T, part)


# ---- crops ----

def uint8_images(device, batch, sizes):
    """Images on padded squares as the loader makes them, their aspects, and captions."""
    size = crops.padded_size(crops.parse_crops(sizes.multi_crop))
    torch.manual_seed(0)
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    aspect = torch.full((batch,), 4 / 3)
    _, tokens = bench.random_batch(batch, [])
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    return images.permute(0, 3, 1, 2), aspect, tokens


def crops_rows(clock, sizes, args):
    """Images per second from uint8 on the device to normalized crops."""
    _, _, batch = sizes.models[sizes.small]
    images, aspect, _ = uint8_images(clock.device, batch // 2, sizes)
    index = torch.arange(len(images))
    for spec, augment in ((sizes.multi_crop, False), ("1x224", False), (sizes.multi_crop, True)):
        make = partial(crops.multi_crop, images, crops.parse_crops(spec), 0, index, aspect,
                       augment=augment)
        memory = clock.peak_memory(make)
        [seconds] = clock.seconds(make)
        what = f"crops {spec}" + (", --augment" if augment else "")
        yield Result(what, len(images) / seconds, "images/s", memory=memory,
                     note=f"batch {len(images)}, padded square {images.shape[-1]}")


# ---- loader ----

def loader_rows(clock, sizes, args):
    """Images per second of the loader from JPEG shards, and of train_clip.py with it."""
    padded_size = crops.padded_size(crops.parse_crops(sizes.multi_crop))
    _, _, batch = sizes.models[sizes.small]
    is_small = batch < 64
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/images.tar"
        bench.write_photographs(path, sizes.copies)
        pairs = data.Pairs(path)
        for workers in sizes.workers:
            batch_size = min(256, len(pairs) // 2)
            batches = iter(data.Loader(pairs, None, batch_size, padded_size, workers=workers,
                                       pin_memory=clock.is_gpu))
            next(batches)  # the workers have started
            start = time.perf_counter()
            count = sum(len(images.images) for images in batches)
            rate = count / (time.perf_counter() - start)
            yield Result(f"loader, {workers} processes", rate, "images/s",
                         note=f"JPEGs of 512 x 384, padded square {padded_size}, "
                              f"{os.cpu_count()} cores")
        if is_small:
            return
        for spec in (sizes.multi_crop, "1x224"):
            log = bench.run_train_clip(
                f"{folder}/{spec}", [], "--model", sizes.small, "--data", path, "--steps",
                sizes.steps, "--batch-size", batch // 2, "--crops", spec, "--workers",
                max(sizes.workers))
            log = [line for line in log if line["step"] > sizes.steps // 2]
            wait = float(np.mean([line["data_wait"] for line in log]))
            yield Result(f"train_clip.py from JPEG shards, {spec}, eager", bench.median_rate(log),
                         "images/s", memory=log[-1]["memory_gb"],
                         note=f"{max(sizes.workers)} workers; the step waits for data in "
                              f"{wait:.0%} of its time")


# ---- mae ----

def mae_rows(clock, sizes, args):
    """Images per second of stage 1: ViT-B/16, a quarter of the patches."""
    for compiled in (False, True):
        is_toy = sizes is TOY
        config = sizes.models[sizes.small][0] if is_toy else base("ViT-B/16")
        batch = 4 if is_toy else 512
        with clock.device:
            mae = kelip.MAE(kelip.KELIP(**config).visual)
        torch._dynamo.reset()
        if compiled:
            trainer.compile_blocks(mae)
        images = torch.randn(batch, 3, 224, 224, device=clock.device)
        step = Step(clock.device, mae, lambda mae=mae, images=images: mae(images)[:1],
                    lambda loss: loss, "bf16")
        step()
        memory = clock.peak_memory(step)
        [seconds] = clock.seconds(step)
        rate = batch / seconds
        peak = bench.peak_flops(clock.device)
        flops = bench.FORWARD_AND_BACKWARD * bench.mae_flops(mae) * rate
        kind = "compiled" if compiled else "eager"
        yield Result(f"stage 1, ViT-B/16, bf16, {kind}", rate, "images/s",
                     mfu=flops / peak if peak else None, memory=memory, note=f"batch {batch}")


# ---- demo ----

GOAL = 0.4  # R@1


def demo_rows(clock, sizes, args):
    """train_clip.py on the demo's pairs: seconds, and seconds to 40 % R@1."""
    if not args.demo:
        yield Result("the demo", None, "", note="needs --demo FOLDER, a folder of --pack")
        return
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        log = bench.run_train_clip(
            folder, [], "--data", f"{args.demo}/train-*.tar", "--test", f"{args.demo}/test-*.tar",
            "--evals", sizes.epochs // 4 or 1, "--epochs", sizes.epochs)
        wall = time.perf_counter() - start
    trained, seconds, best = 0.0, None, 0.0
    previous = 0
    for line in log:
        if "images_per_second" in line:
            trained += 256 * (line["step"] - previous) / line["images_per_second"]
            previous = line["step"]
        else:
            recalls = [value for key, value in line.items() if key.endswith("R@1")]
            recall = float(np.mean(recalls))
            best = max(best, recall)
            if recall >= GOAL and seconds is None:
                seconds = trained
    yield Result(f"the demo, {sizes.epochs} epochs, from start to end", wall, "s",
                 note=f"of that {trained:.0f} s in steps; best mean R@1 {best:.1%}")
    yield Result(f"the demo, to a mean R@1 of {GOAL:.0%}", seconds, "s", note="seconds in steps")


def pack_demo(out):
    """Write the demo's pairs with their drawings as lossless WebP, which is half as large.

    OUT/*.tar.xz: unpack them with `xz -d`. Raises ValueError if a pixel changes.
    """
    import lzma
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        demo.pack_emoji(f"{folder}/emoji")
        for path in sorted(Path(f"{folder}/emoji").glob("*.tar")):
            pairs = collections.defaultdict(dict)
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, suffix = member.name.partition(".")
                    content = tar.extractfile(member).read()
                    if suffix == "png":
                        suffix, content = "webp", as_webp(content)
                    pairs[key][suffix] = content
            shards.write_shard(f"{folder}/{path.name}", pairs.items())
            with lzma.open(f"{out}/{path.name}.xz", "wb") as file:
                file.write(Path(f"{folder}/{path.name}").read_bytes())


def as_webp(png):
    """An image as lossless WebP."""
    image = Image.open(io.BytesIO(png))
    if image.mode != "RGB":
        image = image.convert("RGBA")
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, exact=True, quality=80)
    if Image.open(file).convert(image.mode).tobytes() != image.tobytes():
        raise ValueError("a drawing changes as WebP")
    return file.getvalue()


# ---- the command ----

ROWS = {"limits": limits_rows, "crops": crops_rows, "loss": loss_rows, "train": train_rows,
        "loader": loader_rows, "mae": mae_rows, "profile": profile_rows, "waits": waits_rows,
        "demo": demo_rows, "more": more_rows}


def look_at_first(results):
    """The goals that are missed, worst first."""
    missed = []
    for r in results:
        if r.value is None:
            missed.append((0, f"{r.what}: {r.note}"))
        elif r.peer.startswith("open_clip") and r.row == "train" and r.value < 1.5 * r.peer_value:
            missed.append((r.value / r.peer_value / 1.5,
                           f"{r.what}: {r.value / r.peer_value:.2f} times open_clip, goal 1.5"))
        elif r.mfu and "ViT-L/14" in r.what and "compiled" in r.what and r.mfu < 0.45:
            missed.append((r.mfu / 0.45, f"{r.what}: utilization {r.mfu:.1%}, goal 45 %"))
        elif ("compiled" in r.what and r.peer == "its products alone"
                and r.value > 1.1 * r.peer_value):
            missed.append((1.1 * r.peer_value / r.value,
                           f"{r.what}: {r.value / r.peer_value:.2f} times its products, goal 1.1"))
        elif r.row == "waits" and r.value:
            missed.append((0.5, f"{r.what}: {r.value:.0f}: {r.note}"))
    return [text for _, text in sorted(missed)]


def measure(clock, sizes, args, title):
    """Measure the rows, and write what there is after each line."""
    results = []
    end = time.monotonic() + 60 * args.minutes

    def add(result):
        results.append(result)
        print(format_table([result]).splitlines()[-1], flush=True)
        write_results(args.out, title, results)

    for row in args.rows:
        start = time.monotonic()
        lines = ROWS[row](clock, sizes, args)
        while True:
            try:
                result = next(lines, None)
                if result is None:
                    break
                if callable(result):  # not measured yet
                    if time.monotonic() > end:
                        add(Result(row, None, "", note="out of time: raise --minutes", row=row))
                        break
                    result = result()
                add(result._replace(row=row))
            except Exception as error:  # the other rows can still be measured
                text = str(error).strip().partition("\n")[0]
                add(Result(row, None, "", note=f"{type(error).__name__}: {text[:200]}", row=row))
                traceback.print_exc()
            clock.free_memory()
        print(f"{row}: {time.monotonic() - start:.0f} s", flush=True)
    return results


def main(argv=None):
    """Measure, and write FILE.md and FILE.json."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.bench gpu", description=__doc__.partition("\nFrom top")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", metavar="FILE", default="gpu", help="FILE.md and FILE.json (default: gpu)")
    add("--rows", nargs="+", metavar="ROW", default=list(ROWS),
        help=f"what to measure: {', '.join(ROWS)} (default: all)")
    add("--minutes", type=float, default=8, metavar="N",
        help="start nothing after so many minutes (default: 8)")
    add("--demo", metavar="FOLDER", help="the demo's pairs: train-*.tar and test-*.tar")
    add("--pack", metavar="FOLDER", help="only write the demo's pairs as lossless WebP, and end")
    add("--toy", action="store_true",
        help="sizes so small that a CPU measures them in seconds: a test of this command")
    args = parser.parse_args(argv)
    if args.pack:
        pack_demo(args.pack)
        return
    for row in args.rows:
        if row not in ROWS:
            raise ValueError(f"--rows {row}: no such row; choose from {', '.join(ROWS)}")
    if not torch.cuda.is_available() and not args.toy:
        raise ValueError("python -m extras.bench gpu: torch finds no GPU here; --toy tries the "
                         "command on a CPU")
    with tempfile.TemporaryDirectory() as folder:  # a Run makes the settings of training
        run_args = train_clip.parse_arguments(["--out", f"{folder}/run"])
        clock = Clock(trainer.Run(run_args, stage="clip").device)
    card = torch.cuda.get_device_name() if clock.is_gpu else "CPU, toy sizes"
    title = f"{card}, torch {torch.__version__}: python -m extras.bench gpu"
    print(title, flush=True)
    results = measure(clock, TOY if args.toy else FULL, args, title)
    print(f"\n{title}\n\n{format_table(results)}\n\nlook at first:")
    for line in look_at_first(results) or ["nothing: every goal is met"]:
        print(f"- {line}")


if __name__ == "__main__":
    run_command(main)
