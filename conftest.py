"""What several tests share: small models, made-up images and pairs, and runs on them.

`shapes` is a set of colored shapes with captions in two languages. `one_run` is a short run on it,
`small_run` an untrained one. Nothing is downloaded. A test with the fixture `device` runs on the
CPU, and on a GPU where there is one: `pytest -m gpu`.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the training scripts do, before torch

import contextlib
import copy
import hashlib
import io
import itertools
import json
import signal
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import kelip
import shards
import train_clip
from tokenizer import Tokenizer

HERE = Path(__file__).parent

# ---- devices ----

HAS_GPU = torch.cuda.is_available()
DEVICES = ["cpu", *[pytest.param("cuda", marks=pytest.mark.gpu)] * HAS_GPU]


def pytest_configure(config):
    """Without a GPU, `pytest -m gpu` is an error, and not a run of no tests."""
    if config.option.markexpr == "gpu" and not HAS_GPU:
        raise pytest.UsageError("pytest -m gpu: torch finds no GPU, so there is nothing to run")


@pytest.fixture(params=DEVICES)
def device(request):
    """The device of a test. TF32 is off, whose results differ from float32's."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False  # until a Run sets it
    yield torch.device(request.param)
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.fixture(autouse=True)
def other_tests_see_no_gpu(request, monkeypatch):
    """Only tests that are marked gpu find the GPU, in this process and in those that they start."""
    if HAS_GPU and not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


# ---- models ----

SMALL = dict(embed_dim=48, image_resolution=56, vision_layers=2, vision_width=128,
             vision_patch_size=8, context_length=20, vocab_size=300, transformer_width=64,
             transformer_heads=4, transformer_layers=3)

# The runs of the tests train this model instead of the preset tiny, for a tenth of its FLOPs.
TINY = dict(kelip.PRESETS["tiny"], embed_dim=64, vision_width=128, transformer_width=128,
            transformer_heads=2)


def small_model(seed=0, dtype=torch.float64, device="cpu", **changes):
    """A KELIP of the SMALL configuration, with random weights."""
    torch.manual_seed(seed)
    model = kelip.KELIP(**{**SMALL, **changes}).to(dtype)
    # Biases start at zero and LayerNorms at one, where a test could not see whether they are used.
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.to(device)


def some_tokens(lengths, L=20, end=299):
    """Random token ids [N, L] of these lengths: a start token, an end token, then padding."""
    rows = torch.full((len(lengths), L), 297)
    for row, n in zip(rows, lengths):
        row[0] = 298
        row[1:n - 1] = torch.randint(0, 297, (n - 2,))
        row[n - 1] = end
    return rows


def agree(expected, found, tolerance):
    """Assert that two dicts of tensors agree, each in the relative norm of its difference.

    The bias of the keys changes no output, so that its true gradient is zero and its computed one
    is rounding error. That third of in_proj_bias is compared in absolute terms.
    """
    for name, value in expected.items():
        other = found[name]
        if name.endswith("in_proj_bias"):
            query, key, val = value.chunk(3)
            other_query, other_key, other_val = other.chunk(3)
            assert (key - other_key).abs().max() <= tolerance, name
            value = torch.cat([query, val])
            other = torch.cat([other_query, other_val])
        difference = (other - value).norm()
        assert difference <= tolerance * value.norm(), (name, (difference / value.norm()).item())


# ---- pairs ----

COLORS = {"red": "빨간색", "green": "초록색", "blue": "파란색", "black": "검은색"}
SHAPES = {"circle": "원", "square": "네모", "triangle": "세모", "cross": "십자"}


def shape_image(color, shape, seed):
    """A shape of a color at a random position on a light background, as JPEG."""
    rng = np.random.default_rng(seed)
    background = tuple(int(x) for x in rng.integers(200, 255, 3))
    image = Image.new("RGB", (96, 80), background)
    draw = ImageDraw.Draw(image)
    x, y = rng.integers(2, 30, 2)
    box = (x, y, x + 40, y + 40)
    if shape == "circle":
        draw.ellipse(box, fill=color)
    elif shape == "square":
        draw.rectangle(box, fill=color)
    elif shape == "triangle":
        draw.polygon([(x, y + 40), (x + 40, y + 40), (x + 20, y)], fill=color)
    else:
        draw.rectangle((x + 15, y, x + 25, y + 40), fill=color)
        draw.rectangle((x, y + 15, x + 40, y + 25), fill=color)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tar(path, pairs):
    """Write [(key, {suffix: bytes})] with tarfile, as other tools write shards."""
    with tarfile.open(path, "w") as tar:
        for key, members in pairs:
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_pairs(path, seeds):
    """A shard with every color and shape once per seed, captioned in both languages."""
    pairs = []
    for n, (seed, color, shape) in enumerate(itertools.product(seeds, COLORS, SHAPES)):
        pairs.append((f"{n:06d}", {
            "jpg": shape_image(color, shape, 1000 * seed + n),
            "en.txt": f"a {color} {shape}".encode(),
            "ko.txt": f"{COLORS[color]} {SHAPES[shape]}".encode()}))
    write_tar(path, pairs)


# Runs a script with TINY: tiny.py SCRIPT FLAGS. With SLOWLY, there is time to kill it in each step
# and while it writes a file.
TINY_SCRIPT = f"""
import os, runpy, sys, time
sys.path.insert(0, {str(HERE)!r})
import kelip, trainer

def slowly(function):
    def wait_and_call(*arguments):
        time.sleep(0.1)
        return function(*arguments)
    return wait_and_call

if "SLOWLY" in os.environ:
    trainer.Run.optimizer_step = slowly(trainer.Run.optimizer_step)
    os.replace = slowly(os.replace)
kelip.PRESETS["tiny"] = {TINY}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder with two shards to train on, one to test on, a tokenizer, and tiny.py."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "tiny.py").write_text(TINY_SCRIPT)
    write_pairs(folder / "train-0.tar", range(4))
    write_pairs(folder / "train-1.tar", range(4, 8))
    write_pairs(folder / "test-0.tar", [8])
    texts = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    texts += [f"{color} {shape}" for color in COLORS.values() for shape in SHAPES.values()]
    Tokenizer.train(texts, 400, progress=False).save(folder / "tokenizer.json")
    return folder


# ---- runs ----

TRAIN = ["--batch-size", "32", "--steps", "6", "--precision", "fp32", "--warmup", "1",
         "--workers", "0"]
TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def run(command, folder, processes=1, check=True, **environment):
    """Run a script in a folder, under torchrun for several processes: the finished process."""
    script, *arguments = command
    Path(folder, "tiny.py").write_text(TINY_SCRIPT)
    launcher = [sys.executable]
    if processes > 1:
        launcher += [*TORCHRUN, f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*launcher, "tiny.py", HERE / script, *map(str, arguments)], cwd=folder, text=True,
        timeout=240, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@contextlib.contextmanager
def signal_handlers_restored():
    """Restore the handlers that a run installs, which processes forked later would inherit."""
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = {number: signal.getsignal(number) for number in signals}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def here(main, *arguments, threads=1, tiny=TINY):
    """What main() of a script prints, run in this process, on one thread or more.

    tiny: what it trains as the preset tiny.
    """
    printed = io.StringIO()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with (mock.patch.dict(kelip.PRESETS, tiny=tiny), signal_handlers_restored(),
              contextlib.redirect_stdout(printed)):
            main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads_before)
    return printed.getvalue()


def clip_flags(shapes, out, *more):
    """The flags of a short run of train_clip.py on the shapes."""
    return ["--data", shapes / "train-*.tar", "--tokenizer", shapes / "tokenizer.json",
            "--out", out, *TRAIN, *more]


def clip(shapes, out, *more, processes=1, **options):
    """A short run of train_clip.py in processes of its own."""
    return run(["train_clip.py", *clip_flags(shapes, out, *more)], shapes, processes, **options)


def clip_here(shapes, out, *more):
    """A short run of train_clip.py in this process: what it printed."""
    return here(train_clip.main, *clip_flags(shapes, out, *more))


def on_ranks(function, ranks, *arguments):
    """Call function(rank, port, *arguments) in a process for each rank. The port is free."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # A fork has torch imported already, but cannot use a GPU that this process has used.
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(function, (port, *arguments), ranks, start_method=method)


def clip_on_rank(rank, port, ranks, *flags):
    """One process of a run of train_clip.py, without torchrun."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    here(train_clip.main, *flags)


def weights_of(folder):
    """The weights of a run."""
    return kelip.load_checkpoint(Path(folder) / "last.pt")["model"]


def log_of(folder):
    """The lines of a run's metrics.jsonl."""
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def one_run(shapes, tmp_path_factory):
    """The folder of six steps of train_clip.py in one process, with crops of two sizes."""
    out = tmp_path_factory.mktemp("runs") / "one"
    clip(shapes, out, "--crops", "1x64+2x32", "--test", shapes / "test-*.tar", "--evals", "2")
    return out


@pytest.fixture(scope="session")
def small_run(shapes, tmp_path_factory):
    """An untrained run of stage 2, with a run of stage 1 of the same encoder in ../mae."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    tokenizer = (shapes / "tokenizer.json").read_text(encoding="utf-8")
    config = dict(TINY, vision_layers=2, transformer_layers=1,
                  vocab_size=len(Tokenizer.load(shapes / "tokenizer.json")))
    model = kelip.KELIP(**config)
    state = {"config": {"model": config}, "model": model.state_dict(), "tokenizer": tokenizer}
    (folder / "clip").mkdir()
    kelip.save_checkpoint(folder / "clip" / "last.pt", state)
    (folder / "clip" / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    (folder / "mae").mkdir()
    state = {"config": {"model": config}, "model": kelip.MAE(model.visual).state_dict()}
    kelip.save_checkpoint(folder / "mae" / "last.pt", state)
    return folder / "clip"


def repeat_entries(path, out):
    """Copy a zip archive without compression. Each entry has a second name for the same bytes."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
            again = copy.copy(new.getinfo(name))
            again.filename += "-again"
            new.filelist.append(again)


# ---- shared images and tars ----

def encoded(image, kind="PNG", **options):
    """The bytes of a PIL image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photograph(seed, width=512, height=384):
    """An image with the 1/f spectrum of photographs, on which resampling errors depend."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * rng.random(frequency.shape))
        planes.append(np.fft.irfft2(phase / frequency**1.3, (height, width)))
    planes = np.stack(planes, -1)
    planes = 0.7 * planes.mean(-1, keepdims=True) + 0.3 * planes
    return Image.fromarray(np.clip(128 + 55 * planes / planes.std(), 0, 255).astype(np.uint8))


def image_bytes(seed=0, size=(48, 36), kind="JPEG"):
    """The bytes of a smooth random image."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise).resize(size, Image.BICUBIC), kind)


def make_pair(key, seed=0, **texts):
    """A pair as write_shard takes it."""
    return key, {"jpg": image_bytes(seed), **(texts or {"txt": f"caption {key}".encode()})}


def reader(content):
    """read(size, offset) of bytes, as walk_tar takes it."""
    return lambda size, offset: content[offset:offset + size]


def write_bad_corpus(folder):
    """Shards with every error. Returns the keys of good pairs in whole shards and in a cut one."""
    os.makedirs(folder)
    text = {"txt": b"fine"}
    bad = [
        {"jpg": b"", **text},
        {"jpg": b"<html>", **text},
        {"jpg": image_bytes(size=(300, 200))[:2000], **text},
        {"png": encoded(Image.new("1", (30_000, 30_000))), **text},
        {"jpg": image_bytes(), "txt": b" "},
        {"jpg": image_bytes()},
        {"jpg": image_bytes(), "txt": b"\xff\xfe\xfa"},
        {"jpg": image_bytes(), "json": b"{not json"},
        {"txt": b"a caption alone"},
    ]
    keys = []
    for i in range(6):
        pairs = []
        for j in range(23):
            key = f"../../{i}-{j}" if j == 3 else f"{i}-{j}"
            keys.append(key)
            pairs.append(make_pair(key, j))
            pairs.append((f"bad{i}-{j}", bad[j % len(bad)]))
        pairs.append(make_pair(f"{i}-5", 1))  # the same key again
        shards.write_shard(f"{folder}/{i}.tar", pairs)
    Path(folder, "empty.tar").write_bytes(b"")
    shards.write_shard(f"{folder}/nothing.tar", [])
    shards.write_shard(f"{folder}/cut.tar", [make_pair(f"cut-{j}", j) for j in range(9)])
    content = Path(folder, "cut.tar").read_bytes()
    starts = [header for name, header, *_ in shards.walk_tar(reader(content), 0, len(content))
              if name.endswith("jpg")]
    Path(folder, "cut.tar").write_bytes(content[:starts[6] + 900])
    # Names change and checksums do not, so that nothing in this shard can be trusted.
    damaged = bytearray(content.replace(b"cut-", b"dam-"))
    damaged[starts[4] + 10:starts[4] + 20] = b"??????????"
    Path(folder, "damaged.tar").write_bytes(damaged)
    return keys, [f"cut-{j}" for j in range(6)]


def digests(folder):
    """{name: digest} of the tars in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).glob("*.tar"))}
