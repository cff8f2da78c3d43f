"""Speed and memory on one GPU: python -m extras.bench gpu --out FILE.

    python -m extras.bench gpu --out gpu.md --demo data/emoji       all rows, in about eight minutes
    python -m extras.bench gpu --out gpu.md --rows loss crops       some of them
    python -m extras.bench gpu --pack data/emoji-webp               pack the demo for a GPU machine

row       measures
limits    matrix products and copies alone: what this GPU can do
crops     crops from uint8 on the GPU
loss      the contrastive loss, its matrix products alone, and open_clip's loss
train     training steps of ViT-B/32 and ViT-L/14 in bfloat16, compiled and eager; ViT-B/32 in turns
          with open_clip's compiled model and loss
loader    decoding with 8 and 16 processes, and train_clip.py from JPEG shards
mae       training steps of stage 1
profile   the parts of a step: matrix products, attention, loss, copies, gaps
waits     calls in a step that wait for the GPU: there should be none
deterministic  steps under torch.use_deterministic_algorithms, in turns with the same without it
demo      train_clip.py on the demo's pairs (--demo), and its time to 40 % R@1
more      training steps in float16; ViT-L/14 in turns with open_clip's, which compiles for minutes

FILE.md holds the table and FILE.json its numbers. Both are written again after each line. A row
that fails leaves its error in the table, and the next one starts. Nothing is downloaded. Without
open_clip, its lines have no peer. MFU is defined in extras/bench.py (describe_flops).

From top to bottom: the sizes, the table, timing, a section for each row, and the command.

Not included: several GPUs, and the quality of models.
"""

import argparse
import collections
import gc
import io
import json
import lzma
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
from command import ArgumentParser, number, run_command
from extras import bench

GOALS = dict(open_clip=1.5, mfu=0.45, loss=1.1)  # see look_at_first
RECALL = 0.4                                     # R@1 to reach on the demo


# ---- sizes ----

class Model(NamedTuple):
    """A model to train, and the batch of its steps."""
    config: dict
    batch: int
    peer: str  # open_clip's name


class Sizes(NamedTuple):
    """How much is measured."""
    models: dict      # name -> Model; rows that need one model take the first
    mae: Model
    multi_crop: str   # crops
    losses: tuple     # batches of the contrastive loss
    matrix: int       # the side of the matrices of `limits`
    copies: int       # of 96 JPEGs, for `loader`
    workers: tuple    # numbers of loader processes
    steps: int        # of train_clip.py from JPEG shards, 0 for none
    epochs: int       # of the demo

    @property
    def first(self):
        """The name and the Model of the first model."""
        return next(iter(self.models.items()))


def clip_config(preset):
    """A preset with the vocabulary of OpenAI's CLIP, as open_clip has it."""
    return dict(kelip.PRESETS[preset], vocab_size=49_408)


FULL = Sizes(
    models={"ViT-B/32": Model(clip_config("ViT-B/32"), 1024, "ViT-B-32-quickgelu"),
            "ViT-L/14": Model(clip_config("ViT-L/14"), 192, "ViT-L-14-quickgelu")},
    mae=Model(clip_config("ViT-B/16"), 512, ""), multi_crop="2x224+6x96", losses=(8192, 32768),
    matrix=8192, copies=48, workers=(8, 16), steps=40, epochs=20)
TOY_MODEL = Model(dict(clip_config("ViT-B/32"), vision_width=64, vision_layers=2, embed_dim=64,
                       transformer_width=64, transformer_heads=1, transformer_layers=2), 4, "")
TOY = Sizes(models={"toy": TOY_MODEL}, mae=TOY_MODEL, multi_crop="1x224+1x96", losses=(64,),
            matrix=64, copies=1, workers=(1,), steps=0, epochs=1)


# ---- the table ----

class Result(NamedTuple):
    """A line of the table."""
    what: str
    value: float = None       # None if it could not be measured: the note says why
    unit: str = ""
    mfu: float = None         # model FLOPs utilization
    memory: float = None      # peak, GB
    peer: str = ""            # what the value is compared with
    peer_value: float = None
    note: str = ""
    row: str = ""             # set by measure()


def format_table(results):
    """The results as a table in Markdown."""
    lines = ["| row | what | value | unit | MFU | GB | compared with | its value | ratio | note |",
             "|---" * 10 + "|"]
    for r in results:
        ratio = r.value / r.peer_value if r.value and r.peer_value else None
        mfu = "" if r.mfu is None else f"{r.mfu:.1%}"
        cells = [r.row, r.what, _number(r.value), r.unit, mfu, _number(r.memory), r.peer,
                 _number(r.peer_value), _number(ratio), r.note]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(x):
    """A number with three digits; "" for None."""
    if x is None:
        return ""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def write_results(path, title, results):
    """Write FILE.md and FILE.json."""
    path = Path(path).with_suffix("")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(f"{title}\n\n{format_table(results)}\n", encoding="utf-8")
    contents = {"title": title, "results": [r._asdict() for r in results]}
    path.with_suffix(".json").write_text(json.dumps(contents, indent=1), encoding="utf-8")


def look_at_first(results):
    """The errors and the missed goals: lines of text."""
    lines = []
    for r in results:
        ratio = r.value / r.peer_value if r.value and r.peer_value else None
        if r.value is None:
            lines.append(f"{r.row}: {r.what}: {r.note}")
        elif r.row == "train" and ratio and ratio < GOALS["open_clip"]:
            lines.append(f"{r.what}: {ratio:.2f} times {r.peer}; the goal is {GOALS['open_clip']}")
        elif "ViT-L/14" in r.what and "compiled" in r.what and r.mfu and r.mfu < GOALS["mfu"]:
            lines.append(f"{r.what}: MFU {r.mfu:.1%}; the goal is {GOALS['mfu']:.0%}")
        elif r.row == "loss" and "ours, compiled" in r.what and ratio > GOALS["loss"]:
            lines.append(f"{r.what}: {ratio:.2f} times {r.peer}; the goal is {GOALS['loss']}")
        elif r.row == "waits" and r.value:
            lines.append(f"{r.what}: {r.value}: {r.note}")
    return lines or ["nothing: all goals are met"]


# ---- timing ----

def synchronize(device):
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(device, *functions, budget=1.0, calls=4):
    """The median seconds of each function, after one call to warm up.

    They are timed in turns, about `budget` seconds each, at least three times. Each time has
    several calls and waits for the device after the last one, as training does between log steps.
    """
    for function in functions:
        function()
    synchronize(device)
    times = [[] for _ in functions]
    end = time.perf_counter() + budget * len(functions)
    while len(times[0]) < 3 or time.perf_counter() < end:
        for function, own_times in zip(functions, times):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize(device)
            own_times.append((time.perf_counter() - start) / calls)
    return [float(np.median(own_times)) for own_times in times]


def peak_gigabytes(device, function):
    """The peak memory of a GPU during one call, in GB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated() / 1e9


def utilization(flops_per_second, device):
    """MFU, None if the peak of the device is not known."""
    peak = bench.peak_flops(device)
    return flops_per_second / peak if peak else None


# ---- limits ----

def limits_rows(device, sizes):
    """Matrix products in two precisions, and copies."""
    N = sizes.matrix
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32 as TF32", torch.float32)):
        a, b = (torch.randn(N, N, device=device, dtype=dtype) for _ in range(2))
        [seconds] = median_seconds(device, partial(torch.matmul, a, b), budget=0.5)
        yield Result(f"product of {N} x {N}, {name}", 2 * N ** 3 / seconds / 1e12, "TFLOP/s")
    a = torch.zeros(16 * N * N, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    [seconds] = median_seconds(device, partial(b.copy_, a), budget=0.5)
    yield Result("copy, read and written", 2 * a.numel() / seconds / 1e9, "GB/s")


# ---- crops ----

def uint8_images(device, batch, sizes):
    """Images on padded squares, as the loader makes them: uint8 [N, 3, S, S], and their aspect."""
    S = crops.padded_size(crops.parse_crops(sizes.multi_crop))
    images = torch.randint(0, 256, (batch, S, S, 3), dtype=torch.uint8, device=device)
    return images.permute(0, 3, 1, 2), torch.full((batch,), 4 / 3)


def crops_rows(device, sizes):
    """Images per second from uint8 on the device to normalized crops."""
    _, model = sizes.first
    images, aspect = uint8_images(device, model.batch // 2, sizes)
    for spec, augment in ((sizes.multi_crop, False), ("1x224", False), (sizes.multi_crop, True)):
        function = partial(crops.multi_crop, images, crops.parse_crops(spec), 0,
                           torch.arange(len(images)), aspect, augment=augment)
        [seconds] = median_seconds(device, function)
        yield Result(f"{spec}, --augment" if augment else spec, len(images) / seconds, "images/s",
                     memory=peak_gigabytes(device, function),
                     note=f"batch {len(images)}, padded square {images.shape[-1]}")


# ---- loss ----

def loss_step(loss, *features):
    """Forward and backward pass of a loss of features."""
    leaves = [feature.detach().requires_grad_() for feature in features]
    loss(*leaves).backward()


def products_of_loss(image, text):
    """The matrix products of the loss, in its chunks: the logits twice, and both gradients."""
    d_text = torch.zeros_like(text)
    for part in image.split(max(512, kelip.GPU_LOGITS // len(text))):
        part @ text.T                                                        # [chunk, N]
        logits = part @ text.T
        logits @ text                                                        # [chunk, D]
        d_text.addmm_(logits.T, part)


def loss_rows(device, sizes):
    """The loss, forward and backward. float32, with TF32 products as in training."""
    losses = {"ours, compiled": partial(kelip.contrastive_loss, compile=True),
              "ours, eager": kelip.contrastive_loss}
    open_clip = bench.try_import("open_clip")
    if open_clip:
        losses["open_clip's"] = open_clip.loss.ClipLoss()
    for batch in sizes.losses:
        image, text = (kelip.l2_normalize(torch.randn(batch, 512, device=device)) for _ in range(2))
        scale = torch.tensor(1 / 0.07, device=device)
        functions = [partial(loss_step, loss, image, text, scale) for loss in losses.values()]
        products, *seconds = median_seconds(device, partial(products_of_loss, image, text),
                                            *functions)
        for name, function, own_seconds in zip(losses, functions, seconds):
            yield Result(f"batch {batch:,}, {name}", 1e3 * own_seconds, "ms",
                         memory=peak_gigabytes(device, function), peer="its products alone",
                         peer_value=1e3 * products)


# ---- train ----

def sides(spec):
    """The side of each crop: "2x224+6x96" -> [224, 224, 96, ...]."""
    return [size for number, size in crops.parse_crops(spec) for _ in range(number)]


def random_inputs(device, batch, spec):
    """Crops on the device, and captions of 6 to 25 tokens on the CPU."""
    _, tokens = bench.random_batch(batch, [])
    return [torch.randn(batch, 3, size, size, device=device) for size in sides(spec)], tokens


def our_step(device, config, views, tokens, dtype="bfloat16", compiled=True):
    """A training step of our model on views and tokens, and its model."""
    torch.compiler.reset()
    with device:  # weights are drawn there, which is faster
        model = kelip.KELIP(**config)
    if compiled:
        trainer.compile_blocks(model)
    encode = partial(train_clip.Encoders(model), views, tokens[:, None])
    loss = partial(kelip.contrastive_loss, compile=compiled)
    return bench.training_step(model, device, encode, loss, dtype), model


def open_clip_step(device, name, views, tokens):
    """A training step of open_clip's compiled model and loss; None if it is not installed."""
    open_clip = bench.try_import("open_clip")
    if not open_clip or not name:
        return None
    model = open_clip.create_model(name, device=device)
    encode = partial(torch.compile(model), views[0], tokens.to(device))
    return bench.training_step(model, device, encode, open_clip.loss.ClipLoss())


def train_rows(device, sizes):
    """Training steps in bfloat16. The first one is timed in turns with open_clip's."""
    first, _ = sizes.first
    kinds = [(name, "1x224") for name in sizes.models] + [(first, sizes.multi_crop)]
    for compiled in (True, False):
        for name, spec in kinds:
            with_peer = compiled and (name, spec) == (first, "1x224")
            yield partial(train_row, device, sizes, name, spec, "bfloat16", compiled, with_peer)


def more_rows(device, sizes):
    """Training steps in float16, and the other models in turns with open_clip's."""
    first, *others = sizes.models
    kinds = [(name, "1x224") for name in sizes.models] + [(first, sizes.multi_crop)]
    for compiled in (False, True):
        for name, spec in kinds:
            yield partial(train_row, device, sizes, name, spec, "float16", compiled, False)
    for name in others:
        yield partial(train_row, device, sizes, name, "1x224", "bfloat16", True, True)


def train_row(device, sizes, name, spec, dtype, compiled, with_peer):
    """Images per second of a training step, from crops on, with MFU and memory."""
    model = sizes.models[name]
    batch = model.batch if spec == "1x224" else model.batch // 2
    views, tokens = random_inputs(device, batch, spec)
    step, _ = our_step(device, model.config, views, tokens, dtype, compiled)
    first = bench.seconds_of(step)  # it compiles
    memory = peak_gigabytes(device, step)
    peer = open_clip_step(device, model.peer, views, tokens) if with_peer else None
    rates = [batch / s for s in median_seconds(device, *filter(None, [step, peer]))]
    length = (tokens.argmax(dim=1) + 1).float().mean().item()
    flops = bench.image_flops(model.config, sides(spec)) + bench.text_flops(model.config, length)
    kind = "compiled" if compiled else "eager"
    return Result(f"{name}, {spec}, {dtype}, {kind}", rates[0], "images/s",
                  mfu=utilization(bench.FORWARD_AND_BACKWARD * flops * rates[0], device),
                  memory=memory, peer="open_clip, compiled" if peer else "",
                  peer_value=rates[1] if peer else None,
                  note=f"batch {batch}; the first step takes {first:.0f} s")


# ---- loader ----

def loader_rows(device, sizes):
    """Images per second of the loader from JPEG shards, and of train_clip.py with it."""
    name, model = sizes.first
    padded_size = crops.padded_size(crops.parse_crops(sizes.multi_crop))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/images.tar"
        bench.write_photographs(path, sizes.copies)
        pairs = data.Pairs(path)
        for workers in sizes.workers:
            batches = iter(data.Loader(pairs, None, min(256, len(pairs) // 2), padded_size,
                                       workers=workers, pin_memory=device.type == "cuda"))
            next(batches)  # the workers have started
            start = time.perf_counter()
            count = sum(len(batch.images) for batch in batches)
            yield Result(f"{workers} processes", count / (time.perf_counter() - start), "images/s",
                         note=f"JPEGs of 512 x 384, padded square {padded_size}, "
                              f"{os.cpu_count()} cores")
        for spec in (sizes.multi_crop, "1x224") if sizes.steps else ():
            log = bench.run_train_clip(
                f"{folder}/{spec}", [], "--model", name, "--data", path, "--steps", sizes.steps,
                "--batch-size", model.batch // 2, "--crops", spec, "--workers", max(sizes.workers))
            log = [line for line in log if line["step"] > sizes.steps // 2]
            wait = np.mean([line["data_wait"] for line in log])
            yield Result(f"train_clip.py, {name}, {spec}, eager", bench.median_rate(log),
                         "images/s", memory=log[-1]["memory_gb"],
                         note=f"{max(sizes.workers)} processes decode; steps wait for them "
                              f"{wait:.0%} of the time")


# ---- mae ----

def mae_step(device, sizes, compiled):
    """A training step of stage 1, and its model."""
    torch.compiler.reset()
    with device:
        mae = kelip.MAE(kelip.KELIP(**sizes.mae.config).visual)
        images = torch.randn(sizes.mae.batch, 3, 224, 224)
    if compiled:
        trainer.compile_blocks(mae)
    # The loss is the first of three results.
    return bench.training_step(mae, device, lambda: mae(images)[:1], lambda loss: loss), mae


def mae_rows(device, sizes):
    """Training steps of stage 1: three quarters of the patches are masked."""
    for compiled in (True, False):
        step, mae = mae_step(device, sizes, compiled)
        [seconds] = median_seconds(device, step)
        rate = sizes.mae.batch / seconds
        flops = bench.FORWARD_AND_BACKWARD * bench.mae_flops(mae)
        yield Result(f"ViT-B/16, bfloat16, {'compiled' if compiled else 'eager'}", rate, "images/s",
                     mfu=utilization(flops * rate, device), memory=peak_gigabytes(device, step),
                     note=f"batch {sizes.mae.batch}")


# ---- profile ----

PARTS = {  # words in the names of kernels; the first part with such a word counts
    "compiled kernels: LayerNorm, GELU, sums": ("triton",),
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
    "gradient norm and optimizer": ("multi_tensor", "adam"),
    "copies between CPU and GPU": ("htod", "dtoh"),
    "copies and casts": ("memcpy", "memset", "copy", "fill", "cat"),
    "LayerNorm": ("layer_norm", "layernorm", "gammabeta"),
    "gathers and scatters": ("index", "gather", "scatter", "embedding", "sort")}


def part_of(kernel):
    """The part of a step that a kernel belongs to, by its name."""
    for part, words in PARTS.items():
        if any(word in kernel.lower() for word in words):
            return part
    return "other kernels"


def kernel_seconds(device, function, calls=3):
    """Seconds per call of each part, a Counter, by torch's profiler, which sees GPUs alone."""
    function()
    synchronize(device)
    with torch.profiler.profile() as profile:
        for _ in range(calls):
            function()
        synchronize(device)
    seconds = collections.Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            seconds[part_of(event.name)] += event.time_range.elapsed_us() / 1e6 / calls
    return seconds


def profile_rows(device, sizes):
    """The parts of a step of the first model. The loss counts as one part, products included."""
    name, model = sizes.first
    views, tokens = random_inputs(device, model.batch, "1x224")
    for compiled in (True, False):
        step, own_model = our_step(device, model.config, views, tokens, compiled=compiled)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            features = train_clip.Encoders(own_model)(views, tokens[:, None])
        parts = kernel_seconds(device, step)
        of_loss = kernel_seconds(device, partial(
            loss_step, partial(kelip.contrastive_loss, compile=compiled), *features))
        parts.subtract(of_loss)
        parts["loss"] = of_loss.total()
        [total] = median_seconds(device, step)
        parts["gaps, in which the GPU waits"] = max(0.0, total - parts.total())
        what = f"{name}, 1x224, bfloat16, {'compiled' if compiled else 'eager'}"
        yield Result(f"{what}: a step", 1e3 * total, "ms", note=f"batch {model.batch}")
        for part, seconds in parts.most_common():
            yield Result(f"{what}: {part}", 1e3 * seconds, "ms", note=f"{seconds / total:.1%}")


# ---- waits ----

def waits_rows(device, sizes):
    """Calls in a step that wait for the GPU, from crops to optimizer, in torch's debug mode."""
    _, model = sizes.first
    batch = model.batch // 2
    images, aspect = uint8_images(device, batch, sizes)
    _, tokens = bench.random_batch(batch, [])
    with device:
        encoders = train_clip.Encoders(kelip.KELIP(**model.config))

    def encode():
        with torch.autocast(device.type, enabled=False):  # crops are outside in train_clip.py
            views = crops.multi_crop(images, crops.parse_crops(sizes.multi_crop), 0,
                                     torch.arange(batch), aspect, flip=True, augment=True)
        return encoders(views, tokens[:, None])

    step = bench.training_step(encoders, device, encode, kelip.contrastive_loss)
    step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        step()
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught
              if "synchronizing" in str(w.message)]
    yield Result(f"a step with {sizes.multi_crop}, --augment, eager", len(places), "calls",
                 note=", ".join(sorted(set(places))))


# ---- deterministic ----

def deterministically(step):
    """Take a step under torch.use_deterministic_algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        step()
    finally:
        torch.use_deterministic_algorithms(False)


def deterministic_rows(device, sizes):
    """Eager steps of both stages.

    Stage 2 has one crop. With crops of another size it raises an error, because the gradient of
    interpolated positions has no deterministic form.
    """
    name, model = sizes.first
    step, _ = mae_step(device, sizes, compiled=False)
    yield deterministic_row(device, "stage 1, ViT-B/16", step, sizes.mae.batch)
    views, tokens = random_inputs(device, model.batch, "1x224")
    step, _ = our_step(device, model.config, views, tokens, compiled=False)
    yield deterministic_row(device, f"{name}, 1x224", step, model.batch)


def deterministic_row(device, what, step, batch):
    """Images per second of a step that is deterministic, and of the same step that need not be."""
    times = median_seconds(device, partial(deterministically, step), step)
    ours, peer = (batch / seconds for seconds in times)
    return Result(f"{what}, bfloat16, eager", ours, "images/s", peer="not deterministic",
                  peer_value=peer, note=f"batch {batch}")


# ---- demo ----

def demo_rows(device, sizes, folder):
    """train_clip.py on the demo's pairs: seconds from start to end, and to 40 % R@1."""
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        log = bench.run_train_clip(
            out, [], "--data", f"{folder}/train-*.tar", "--test", f"{folder}/test-*.tar",
            "--epochs", sizes.epochs, evaluations=max(1, sizes.epochs // 4))
        wall = time.perf_counter() - start
    batch_size = train_clip.parse_arguments([]).batch_size
    trained, step, reached, best = 0.0, 0, None, 0.0
    for line in log:
        if "images_per_second" in line:
            trained += batch_size * (line["step"] - step) / line["images_per_second"]
            step = line["step"]
        else:
            recall = np.mean([value for key, value in line.items() if key.endswith("R@1")])
            best = max(best, recall)
            if recall >= RECALL and reached is None:
                reached = trained
    yield Result(f"{sizes.epochs} epochs, from start to end", wall, "s",
                 note=f"{trained:.0f} s in {step:,} steps; mean R@1 {best:.1%}")
    yield Result(f"steps to a mean R@1 of {RECALL:.0%}", reached, "s",
                 note="" if reached else f"not reached: {best:.1%}")


def pack_demo(out):
    """Write the demo's shards as OUT/*.tar.xz, with images as lossless WebP: 42 MB, not 112.

    `xz -d OUT/*.xz` unpacks them on a machine without the demo's packages.
    """
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
            with lzma.open(f"{out}/{path.name}.xz", "wb", preset=1) as file:
                file.write(Path(f"{folder}/{path.name}").read_bytes())


def as_webp(png):
    """The bytes of an image as lossless WebP. All pixels stay equal, transparent ones too."""
    image = Image.open(io.BytesIO(png))
    if image.mode != "RGB":
        image = image.convert("RGBA")
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, exact=True)
    return file.getvalue()


# ---- the command ----

ROWS = {"limits": limits_rows, "crops": crops_rows, "loss": loss_rows, "train": train_rows,
        "loader": loader_rows, "mae": mae_rows, "profile": profile_rows, "waits": waits_rows,
        "deterministic": deterministic_rows, "demo": demo_rows, "more": more_rows}


def measure(rows, minutes, write):
    """Measure rows one after the other: a list of Results. Calls write(results) after each Result.

    rows: {name: function}. Each function yields Results, or functions that return one. After
    `minutes`, nothing else starts.
    """
    results = []
    end = time.monotonic() + 60 * minutes

    def add(name, result):
        results.append(result._replace(row=name))
        print(format_table(results).splitlines()[-1], flush=True)
        write(results)

    for name, function in rows.items():
        lines = function()
        while True:
            try:
                if time.monotonic() > end:
                    add(name, Result("not measured", note="out of time: raise --minutes"))
                    break
                result = next(lines, None)
                if result is None:
                    break
                add(name, result if isinstance(result, Result) else result())
            except Exception as error:  # the other rows can still be measured
                reason = str(error).strip().partition("\n")[0]
                add(name, Result("failed", note=f"{type(error).__name__}: {reason[:200]}"))
                traceback.print_exc()
            gc.collect()  # compiled models refer to themselves
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return results


def main(argv=None):
    """Measure, and print the table and what to look at first."""
    parser = ArgumentParser(
        prog="python -m extras.bench gpu", description=__doc__.partition("\nFrom top")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", metavar="FILE", default="gpu.md",
        help="writes FILE.md and FILE.json; a suffix of FILE is ignored (default: gpu.md)")
    add("--rows", nargs="+", metavar="ROW",
        help=f"what to measure: {', '.join(ROWS)} (default: all, demo if --demo is given)")
    add("--minutes", type=number(float, 0), default=8, metavar="N",
        help="start no measurement after N minutes (default: 8)")
    add("--demo", metavar="FOLDER", help="the demo's shards, train-*.tar and test-*.tar")
    add("--pack", metavar="FOLDER",
        help="measure nothing: write the demo's shards as small files, to copy to a GPU machine")
    add("--toy", action="store_true",
        help="toy sizes, which a CPU measures in seconds, to test this command")
    args = parser.parse_args(argv)
    if args.pack:
        return pack_demo(args.pack)
    names = args.rows or [name for name in ROWS if name != "demo" or args.demo]
    for name in names:
        if name not in ROWS:
            raise ValueError(f"--rows {name}: no such row; choose from {', '.join(ROWS)}")
    if "demo" in names and not args.demo:
        raise ValueError("--rows demo: name the folder of the demo's shards, --demo FOLDER")
    if not torch.cuda.is_available() and not args.toy:
        raise ValueError("python -m extras.bench gpu: torch finds no GPU; --toy tries the command "
                         "on a CPU")
    # The row `deterministic` needs it, before the first matrix product. It is an H100's default.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with tempfile.TemporaryDirectory() as folder:  # a Run changes torch's settings for training
        run_args = train_clip.parse_arguments(["--out", f"{folder}/run"])
        device = trainer.Run(run_args, stage="clip").device
    sizes = TOY if args.toy else FULL
    rows = {name: partial(ROWS[name], device, sizes) for name in names}
    if "demo" in rows:
        rows["demo"] = partial(demo_rows, device, sizes, args.demo)

    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, toy sizes"
    title = f"{card}, torch {torch.__version__}, `python -m extras.bench gpu`"
    print(title, flush=True)
    results = measure(rows, args.minutes, partial(write_results, args.out, title))
    print(f"\n{title}\n\n{format_table(results)}\n\nLook at first:")
    for line in look_at_first(results):
        print(f"- {line}")


if __name__ == "__main__":
    run_command(main)
