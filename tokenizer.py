"""Byte-level byte-pair encoding: train, encode, decode, load, save. Standard library and `regex` only.

`learn_merges` joins the most frequent pair of neighbours again and again, `apply_merges` replays those joins on new
text: that is the algorithm. The rest makes it fast and keeps it in step with Hugging Face's `tokenizers`: the file is
its tokenizer.json, merges and ids are equal to its own, ties included. Left out: models other than byte-level BPE, and
special tokens inside a text: nothing that a caption says becomes a start, end or padding token.

    tok = Tokenizer.train(["a red apple", "빨간 사과"], vocab_size=300)
    tok.decode(tok.encode_ordinary("A red  APPLE"))     # 'a red apple'
    tok.encode(["a red apple"], context_length=77)      # LongTensor [1, 77]: start, text, end, padding

Sources: Sennrich et al., arXiv 1508.07909 (BPE); Radford et al. 2019, GPT-2 (bytes, the pattern of words).
"""

import argparse
import gzip
import heapq
import html
import json
import os
import sys
import tarfile
import time
import unicodedata
from array import array
from collections import Counter, defaultdict
from contextlib import nullcontext
from functools import cached_property
from itertools import chain, groupby, islice
from multiprocessing import Pool
from pathlib import Path

import regex


# ---- the algorithm ----

def learn_merges(pieces, count, progress=False):
    """The first `count` merges, pairs of ids, that BPE learns from `pieces`: {bytes read as ids: how often}.

    Ids below 256 are single bytes; merge number n makes the id 256 + n. Of pairs that are equally frequent, the one
    with the lower ids goes first. Fewer merges are returned when every piece has become one token.
    """
    pairs, merges = PairCounts(pieces), []
    for new in passing(range(256, 256 + count), "merges learned", progress):
        pair = pairs.most_frequent()
        if pair is None:
            break
        pairs.merge(pair, new)
        merges.append(pair)
    return merges


def apply_merges(ids, ranks, made):
    """Replay merges on the list `ids`: the earliest learned goes first, and of equals the leftmost.

    `ranks[a]` maps b to the place of the pair (a, b) among the merges, `made` that place to the id it makes.
    """
    never = len(made)
    order = [ranks[a].get(b, never) for a, b in zip(ids, ids[1:])]
    while order and (rank := min(order)) < never:
        i = order.index(rank)
        ids[i] = made[rank]
        del ids[i + 1], order[i]
        if i > 0:
            order[i - 1] = ranks[ids[i - 1]].get(ids[i], never)
        if i < len(order):
            order[i] = ranks[ids[i]].get(ids[i + 1], never)
    return ids


# ---- the same, fast ----

GAP, INSIDE = -1, -2


class PairCounts:
    """How often each pair of neighbours occurs in the pieces, corrected only where a merge changes it.

    All pieces lie in one list of cells, a cell a byte, a gap after each piece. A token writes its id into its first and
    its last cell, where its neighbours look. So a merge costs what it changes, however long the pieces are.
    """

    def __init__(self, pieces):
        self.cells, self.weights, self.lengths = [GAP], [0], [1] * 256
        for ids, count in pieces.items():
            self.cells += [*ids, GAP]
            self.weights += [count] * len(ids) + [0]
        self.counts, self.places = defaultdict(int), defaultdict(list)
        for i, pair in enumerate(zip(self.cells, self.cells[1:])):
            if GAP not in pair:
                self.counts[pair] += self.weights[i]
                self.places[pair].append(i)
        self.heap = [(-count, pair) for pair, count in self.counts.items()]
        heapq.heapify(self.heap)

    def most_frequent(self):
        """The most frequent pair, of equals the one with the lower ids, or None when no pair is left."""
        while self.heap:
            count, pair = heapq.heappop(self.heap)
            now = self.counts[pair]
            if now == -count:
                return pair
            if now > 0:  # other merges took some of its places: it waits for its new turn
                heapq.heappush(self.heap, (-now, pair))

    def merge(self, pair, new):
        """Make every occurrence of `pair` one token, `new`, and correct the counts of the pairs around it."""
        a, b = pair
        cells, weights, lengths, counts = self.cells, self.weights, self.lengths, self.counts
        length_a, length_b = lengths[a], lengths[b]
        lengths.append(length_a + length_b)
        formed = defaultdict(list)
        for i in self.places.pop(pair):
            j = i + length_a
            if cells[i] != a or cells[j] != b:  # an earlier merge took one of the two
                continue
            after = j + length_b
            count, left, right = weights[i], cells[i - 1], cells[after]
            if left != GAP:
                counts[left, a] -= count
                counts[left, new] += count
                formed[left, new].append(i - lengths[left])
            if right != GAP:
                counts[b, right] -= count
                counts[new, right] += count
                formed[new, right].append(i)
            cells[j - 1] = cells[j] = INSIDE
            cells[i] = cells[after - 1] = new
        for pair, places in formed.items():
            if counts[pair] > 0:
                self.places[pair] = places
                heapq.heappush(self.heap, (-counts[pair], pair))


def apply_merges_long(ids, ranks, made):
    """`apply_merges` in O(n log n): a heap of pairs to merge, links from each token to its neighbours."""
    end = len(ids)
    after, before = array("l", range(1, end + 1)), array("l", range(-1, end - 1))
    heap = [ranks[a][b] * end + i for i, (a, b) in enumerate(zip(ids, ids[1:])) if b in ranks[a]]
    heapq.heapify(heap)
    while heap:
        rank, i = divmod(heapq.heappop(heap), end)
        j = after[i]
        if ids[i] is None or j == end or ranks[ids[i]].get(ids[j]) != rank:
            continue  # an earlier merge took one of the two
        ids[i], ids[j] = made[rank], None
        after[i] = after[j]
        if after[i] < end:
            before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < end and ids[right] in ranks[ids[left]]:
                heapq.heappush(heap, ranks[ids[left]][ids[right]] * end + left)
    return [token for token in ids if token is not None]


class Cache(dict):
    """key -> what `make` makes of it. Long keys are not kept; when `size` are kept, it starts anew."""

    def __init__(self, make, size=1 << 17):
        self.make, self.size = make, size

    def __missing__(self, key):
        value = self.make(key)
        if len(key) <= 64:
            if len(self) >= self.size:
                self.clear()
            self[key] = value
        return value


def passing(items, label, progress):
    """Hand `items` on; where `progress` is true, say every second on standard error how many have passed."""
    start = said = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        if progress and time.monotonic() - said > 1:
            said = time.monotonic()
            print(f"\r{number:,} {label}, {said - start:.0f} s ", end="", file=sys.stderr, flush=True)
    if said > start:
        print(file=sys.stderr)


# ---- text to words, words to pieces, pieces to bytes ----

PATTERN = regex.compile(  # GPT-2's
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
SURROGATE, MANY_MARKS = regex.compile("[\ud800-\udfff]"), regex.compile(r"\p{M}{99,}")

# GPT-2's printable stand-in for each of the 256 bytes: tokens are bytes, a tokenizer.json holds text.
PRINTABLE, SPARE = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
BYTE_TO_CHAR = [chr(byte if byte in PRINTABLE else next(SPARE)) for byte in range(256)]
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
ALPHABET = sorted(BYTE_TO_CHAR)  # the order in which `tokenizers`, and CLIP, number the bytes
BYTE_TO_ID = bytes(map(ALPHABET.index, BYTE_TO_CHAR))


def sort_marks(match):
    """The matched marks, decomposed, each run of them in the order of their combining classes."""
    marks = "".join(unicodedata.normalize("NFD", mark) for mark in match[0])
    runs = groupby(marks, key=lambda mark: unicodedata.combining(mark) > 0)
    return "".join("".join(sorted(run, key=unicodedata.combining)) for _, run in runs)


def compose(form, text):
    """`unicodedata.normalize`, hundreds of marks in a row put in order first: its own sort is quadratic."""
    return unicodedata.normalize(form, MANY_MARKS.sub(sort_marks, text) if len(text) > 99 else text)


def lower(text):
    """Lower case, character by character: str.lower() looks around a capital sigma, `tokenizers` does not."""
    return text.replace("Σ", "σ").lower()


def split_words(text):
    """The words of a text as they came, a line break before the first: no space stands before that one."""
    words = text.split()
    if words:
        words[0] = "\n" + words[0]
    return words


def normalize_word(word):
    """One of `split_words`, composed (NFC) and in lower case, with the space that stands before it.

    Joined, they are the normalised text, of which NORMALIZER, below, tells other tools.
    """
    before, word = ("", word[1:]) if word[0] == "\n" else (" ", word)
    return before + (word.lower() if word.isascii() else lower(compose("NFC", SURROGATE.sub("\ufffd", word))))


def find_pieces(text):
    """The pieces that PATTERN finds in `text`; it would take letters alone, one space before them, whole."""
    return [text] if text.removeprefix(" ").isalpha() else PATTERN.findall(text)


def count_words(texts):
    """{word of `split_words`: how often} in a list of texts."""
    words, opening = Counter(), Counter(word for text in texts for word in text.split(None, 1)[:1])
    for start in range(0, len(texts), 100):  # few enough to stay in the processor's cache
        words.update(" ".join(texts[start:start + 100]).split())
    words.subtract(opening)
    words.update({"\n" + word: count for word, count in opening.items()})
    return +words  # without those that only open texts


def count_pieces(texts, workers=1, progress=False):
    """The pieces of the normalised words in `texts`: {bytes read as ids: how often}. None reaches across a space."""
    texts, words, pieces = iter(texts), Counter(), Counter()
    batches = passing(iter(lambda: list(islice(texts, 50_000)), []), "x 50,000 texts counted", progress)
    with Pool(workers) if workers > 1 else nullcontext() as pool:
        for counted in pool.imap(count_words, batches) if pool else map(count_words, batches):
            words.update(counted)
    for word, count in words.items():
        for piece in find_pieces(normalize_word(word)):
            pieces[piece] += count
    return {piece.encode().translate(BYTE_TO_ID): count for piece, count in pieces.items()}


# ---- tokenizer.json ----

PAD, START, END = SPECIALS = ("[PAD]", "<|startoftext|>", "<|endoftext|>")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "NFC"}, {"type": "Lowercase"},
    {"type": "Replace", "pattern": {"Regex": r"[\s\x1c-\x1f]+"}, "content": " "},  # where str.split() splits
    {"type": "Strip", "strip_left": True, "strip_right": True}]}
CLIP_NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, {"type": "Lowercase"}]}
CLIP_WORDS = {"type": "Split", "behavior": "Removed", "invert": True, "pattern": {
    "Regex": r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"}}


def read_json(path):
    """The content of a JSON file. Raises ValueError that names it."""
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def build_spec(tokens, merges, specials=SPECIALS, normalizer=NORMALIZER, pre_tokenizer=BYTE_LEVEL, suffix=None):
    """The content of a tokenizer.json: `tokens`, then `specials`, as ids go, start and end last."""
    vocab = {token: i for i, token in enumerate([*tokens, *specials])}
    start, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in specials[-2:])
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": vocab[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for token in specials],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": BYTE_LEVEL,
        "post_processor": {
            "type": "TemplateProcessing", "single": [start, first, end], "pair": [start, first, end, second, end],
            "special_tokens": {token: {"id": token, "ids": [vocab[token]], "tokens": [token]}
                               for token in specials[-2:]}},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": suffix, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": merges}}


def clip_spec(text):
    """OpenAI's bpe_simple_vocab_16e6.txt as a tokenizer.json: 49,408 entries, `</w>` at the end of a word."""
    merges = [line.split() for line in text.split("\n")[1:49152 - 256 - 2 + 1]]
    if len(merges) != 48894 or any(len(pair) != 2 for pair in merges):
        raise ValueError("not CLIP's list of merges, the only compressed file that is read here")
    tokens = ALPHABET + [char + "</w>" for char in ALPHABET] + [a + b for a, b in merges]
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [CLIP_WORDS, BYTE_LEVEL | {"use_regex": False}]}
    return build_spec(tokens, merges, (START, END), CLIP_NORMALIZER, pre_tokenizer, "</w>")


def clip_clean(text):
    """CLIP's own cleaning but ftfy: entities resolved twice, and Python's lower case with its final sigma."""
    return html.unescape(html.unescape(text)).lower()


def pattern_text(spec):
    """The pattern of a Replace or a Split: a regular expression, or a string that means itself."""
    return spec["pattern"]["Regex"] if "Regex" in spec["pattern"] else regex.escape(spec["pattern"]["String"])


def normalizer_steps(spec):
    """The functions from text to text that a "normalizer" names, in their order."""
    if spec is None:
        return []
    kind = spec["type"]
    if spec == NORMALIZER:
        return [lambda text: "".join(map(normalize_word, split_words(text)))]
    if kind == "Sequence":
        return [step for part in spec["normalizers"] for step in normalizer_steps(part)]
    if kind == "Lowercase":
        return [lower]
    if kind == "Replace":
        pattern = regex.compile(pattern_text(spec))
        return [lambda text: pattern.sub(lambda match: spec["content"], text)]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return [lambda text: compose(kind, text)]
    raise ValueError(f"the normalizer is {kind}, which is not read here")


def split_step(spec):
    """The function from a text to its pieces that one part of a "pre_tokenizer" names."""
    if spec["type"] == "Split":
        pattern = regex.compile(f"({pattern_text(spec)})")  # its split: gaps and matches in turns
        if spec["behavior"] == "Isolated" and pattern.groups == 1:
            return lambda text: filter(None, pattern.split(text))
        if spec["behavior"] == "Removed" and pattern.groups == 1:
            return lambda text: filter(None, pattern.split(text)[bool(spec["invert"])::2])
    raise ValueError(f"the pre-tokenizer has the part {spec}, which is not read here")


def split_steps(spec):
    """The functions from a text to its pieces that a "pre_tokenizer" names, in their order."""
    *splits, last = spec["pretokenizers"] if spec and spec["type"] == "Sequence" else [spec or {"type": "missing"}]
    if last["type"] != "ByteLevel":
        raise ValueError(f"the pre-tokenizer is {last['type']}, where byte-level BPE ends in ByteLevel")
    steps = [split_step(part) for part in splits]
    if last["add_prefix_space"]:
        steps.append(lambda text: [text if text.startswith(" ") else " " + text])
    return steps + [find_pieces] * last.get("use_regex", True)


def special_ids(spec, config, ids):
    """The ids of the start, end and padding token: what tokenizer_config.json names, else the template."""
    start, end, pad = None, None, next(filter(ids.__contains__, (PAD, "<pad>", "<|pad|>")), None)
    processor = spec.get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        if part.get("type") == "TemplateProcessing":  # of [start, text, end] the text has no name
            names = [item.get("SpecialToken", {}).get("id") for item in part["single"]]
            start, end = names[0], names[-1]
        elif "cls" in part:  # RobertaProcessing, which OpenAI's CLIP has
            start, end = part["cls"][0], part["sep"][0]
    pad = (spec.get("padding") or {}).get("pad_token", pad)
    names = [config.get(key) or name for key, name in (("bos_token", start), ("eos_token", end), ("pad_token", pad))]
    return [ids[name["content"] if isinstance(name, dict) else name] if name else None for name in names]


class Tokenizer:
    """Text to ids and back. `pad_id`, `sot_id` and `eot_id` are the ids of the padding, start and end token."""

    def __init__(self, spec, config=None, clean=None):
        """The contents of tokenizer.json and tokenizer_config.json; `clean` replaces the normalizer."""
        self.spec, self._config, self._clean = spec, config or {}, clean
        model, added = spec["model"], spec.get("added_tokens") or []
        for key, read in (("type", "BPE"), ("dropout", None), ("continuing_subword_prefix", ""), ("fuse_unk", False),
                          ("byte_fallback", False)):
            if (model.get(key) or read) != read:
                raise ValueError(f"the model's {key} is {model[key]}: only plain byte-level BPE is read here")
        vocab, suffix = model["vocab"], model.get("end_of_word_suffix")
        self._ids = vocab | {token["content"]: token["id"] for token in added}
        self._special = {token["id"] for token in added}
        self.sot_id, self.eot_id, self.pad_id = special_ids(spec, self._config, self._ids)
        known = {self.sot_id, self.eot_id, self.pad_id}
        if words := [token["content"] for token in added if not token["special"] and token["id"] not in known]:
            raise ValueError(f"the added tokens {words} are not special: no text becomes an added token here")
        self.pad_id = self.pad_id or 0  # CLIP's, where the file names none

        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        self._made = [vocab[a + b] for a, b in merges]
        self._ranks = [{} for _ in range(max(self._ids.values(), default=-1) + 1)]
        for rank, (a, b) in enumerate(merges):
            if self._made[rank] not in self._special:  # text never becomes a special token
                self._ranks[vocab[a]][vocab[b]] = rank
        self._byte_ids = [vocab.get(char, vocab.get(model.get("unk_token"))) for char in BYTE_TO_CHAR]
        self._last_ids = [vocab[char + suffix] for char in BYTE_TO_CHAR] if suffix else []
        whole = vocab.items() if model.get("ignore_merges") else ()
        self._whole = {token: i for token, i in whole if i not in self._special}
        self._split = lambda text: [SURROGATE.sub("\ufffd", text)]
        self._normalizers = [clean] if clean else normalizer_steps(spec.get("normalizer"))
        self._splitters = split_steps(spec.get("pre_tokenizer"))
        if spec.get("normalizer") == NORMALIZER and spec["pre_tokenizer"] == BYTE_LEVEL:  # word by word is the same
            self._split, self._normalizers = split_words, [normalize_word]
        self._words, self._pieces = Cache(self._encode_word), Cache(self._encode_piece)
        self._rows = Cache(lambda word: array("q", self._encode_word(word)).tobytes())  # joining bytes is one call

    def __reduce__(self):  # pickling takes the file's content along and leaves the caches
        return Tokenizer, (self.spec, self._config, self._clean)

    def __len__(self):
        return len(self._ranks)  # one more than the highest id

    @classmethod
    def train(cls, texts, vocab_size, progress=True, workers=1):
        """Learn `vocab_size` entries (256 bytes, merges, 3 special tokens) from an iterable of str.

        They are fewer when the texts run out of pairs. `workers` processes count words; this one learns the merges.
        Raises ValueError on a `vocab_size` below 259 and on a str in place of a list.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one string: give a list of texts, or another iterable of them")
        count = vocab_size - len(ALPHABET) - len(SPECIALS)
        if count < 0:
            raise ValueError(f"vocab_size is {vocab_size}: 256 bytes and 3 special tokens need at least 259")
        tokens, merges = list(ALPHABET), []
        for a, b in learn_merges(count_pieces(texts, workers, progress), count, progress):
            merges.append([tokens[a], tokens[b]])
            tokens.append(tokens[a] + tokens[b])
        return cls(build_spec(tokens, merges))

    @classmethod
    def load(cls, path):
        """Read a Hugging Face tokenizer.json, or OpenAI CLIP's bpe_simple_vocab_16e6.txt.gz.

        Raises FileNotFoundError when there is no such file, ValueError when it is not a byte-level BPE.
        """
        path = Path(path)
        data, beside = path.read_bytes(), path.with_name("tokenizer_config.json")
        config = read_json(beside) if beside.exists() else {}
        try:
            if data.startswith(b"\x1f\x8b"):
                return cls(clip_spec(gzip.decompress(data).decode()), clean=clip_clean)
            return cls(json.loads(data), config)
        except Exception as error:  # whatever is wrong with the file, one line says it
            what = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{path}: not a tokenizer that is read here: {what}") from error

    def save(self, path):
        """Write a Hugging Face tokenizer.json; a file that stood there is replaced in one step."""
        unfinished = Path(f"{path}.{os.getpid()}")
        unfinished.write_text(json.dumps(self.spec, ensure_ascii=False), encoding="utf-8")
        unfinished.replace(path)

    def normalize(self, text):
        """The text that `decode(encode_ordinary(text))` gives back."""
        return "".join(map(self._normalize, self._split(text)))

    def encode_ordinary(self, text):
        """The ids (list of int) of `text` (str), without start and end token."""
        return list(chain.from_iterable(map(self._words.__getitem__, self._split(text))))

    def encode_ordinary_batch(self, texts):
        """`encode_ordinary` of each of `texts`: a list of lists of int."""
        return [self.encode_ordinary(text) for text in texts]

    def encode(self, texts, context_length=77):
        """Start, text, end and padding of a str, or of each of a list: LongTensor [N, context_length].

        A text that is too long loses its end; the end token stays. Raises ValueError when the file names no start and
        end token.
        """
        import torch
        if self.sot_id is None or self.eot_id is None:
            raise ValueError("this tokenizer has no start and end token: name bos_token and eos_token in "
                             "the tokenizer_config.json beside its file, or use encode_ordinary")
        if context_length < 2:
            raise ValueError(f"context_length is {context_length}: the start and the end token alone take 2")
        start, end, pad = (array("q", [token]).tobytes() for token in (self.sot_id, self.eot_id, self.pad_id))
        room, padding = 8 * (context_length - 2), pad * context_length
        texts = [texts] if isinstance(texts, str) else texts
        rows = [start + b"".join(map(self._rows.__getitem__, self._split(text)))[:room] + end for text in texts]
        if not rows:
            return torch.empty(0, context_length, dtype=torch.long)
        data = bytearray().join(row + padding[len(row):] for row in rows)
        return torch.frombuffer(data, dtype=torch.long).view(-1, context_length)  # [N, context_length]

    __call__ = encode

    def decode(self, ids):
        """The text of `ids`, an iterable of int or a tensor of one dimension, special tokens left out.

        Bytes that are not UTF-8, as where a character is cut, become U+FFFD. Raises ValueError on an id that does not
        exist.
        """
        try:
            text = b"".join(self._bytes[int(i)] for i in ids).decode("utf-8", "replace")
        except KeyError as error:
            raise ValueError(f"there is no token {error}: ids go from 0 to {len(self) - 1}") from None
        return text.removesuffix(" ") if self._last_ids else text

    @cached_property
    def _bytes(self):
        """id -> the bytes that it decodes to, none for special tokens; an end-of-word suffix decodes to a space."""
        suffix, found = self.spec["model"].get("end_of_word_suffix") or "\0", {}
        for token, i in self._ids.items():
            ends = token.endswith(suffix)
            data = bytes(CHAR_TO_BYTE.get(char, 63) for char in token.removesuffix(suffix)) + b" " * ends
            found[i] = b"" if i in self._special else data
        return found

    def _normalize(self, word):
        for step in self._normalizers:
            word = step(word)
        return word

    def _encode_word(self, word):
        """The ids of one of `split_words`, or of a whole text where the file's rules may reach across spaces."""
        pieces = filter(None, [self._normalize(word)])
        for split in self._splitters:
            pieces = chain.from_iterable(map(split, pieces))
        return tuple(chain.from_iterable(map(self._pieces.__getitem__, pieces)))

    def _encode_piece(self, piece):
        """The ids of one of the pattern's pieces: its bytes, merged."""
        data = piece.encode()
        if self._whole and (token := "".join(BYTE_TO_CHAR[byte] for byte in data)) in self._whole:
            return (self._whole[token],)
        ids = [self._byte_ids[byte] for byte in data]
        if ids and self._last_ids:
            ids[-1] = self._last_ids[data[-1]]
        if None in ids:  # `tokenizers` drops a byte that the file lacks
            ids = [i for i in ids if i is not None]
        return tuple((apply_merges if len(ids) < 100 else apply_merges_long)(ids, self._ranks, self._made))


# ---- the command ----

def captions(path):
    """The captions of a text file (one a line), of a WebDataset shard (.tar) or, for "-", of standard input."""
    try:
        if ".tar" not in Path(path).suffixes:
            with open(0 if path == "-" else path, encoding="utf-8", newline="\n", closefd=path != "-") as lines:
                yield from lines
            return
        with tarfile.open(path) as shard:
            for _, members in groupby(shard, key=lambda member: regex.match(r"(.*/)?[^/.]*", member.name)[0]):
                files = [(member.name, shard.extractfile(member).read().decode()) for member in members
                         if member.name.endswith((".txt", ".json"))]
                texts = [text for name, text in files if name.endswith(".txt")]  # else what the .json says
                yield from texts or filter(None, (json.loads(text).get("caption") for _, text in files))
    except Exception as error:  # whatever is wrong with the file, one line says it
        raise ValueError(f"{path}: its captions cannot be read: {error!r}") from error


def train_command(args):
    """Captions to a tokenizer.json, and how short it makes each language."""
    start, samples = time.monotonic(), defaultdict(list)

    def texts():
        for number, text in enumerate(chain.from_iterable(map(captions, args.inputs))):
            if number < 10_000 or number % 100 == 0:
                samples["Korean" if regex.search(r"\p{Hangul}", text) else "English"].append(text)
            yield text

    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer.train(texts(), args.vocab_size, workers=args.workers)
    if not samples:
        raise ValueError(f"{' '.join(args.inputs)}: no captions; give text files, one a line, or .tar shards")
    tok.save(args.out)
    print(f"{args.out}: {len(tok):,} entries in {time.monotonic() - start:.0f} s")
    for language, sample in samples.items():
        size = sum(len(tok.normalize(text).encode()) for text in sample)
        count = sum(map(len, tok.encode_ordinary_batch(sample)))
        print(f"{language}: {size / max(count, 1):.2f} bytes per token, in {len(sample):,} of the captions")


def main():
    """Read the command line and run one of the three commands."""
    parser = argparse.ArgumentParser(description="Byte-level BPE: train a tokenizer.json, and use it.")
    add = parser.add_argument
    add("command", choices=["train", "encode", "decode"], help="captions to a tokenizer.json, text to ids, ids to text")
    add("inputs", nargs="*", default=["-"], metavar="INPUT", help=(
        "files to train on, a caption a line, or .tar shards; texts to encode; ids to decode; - is standard input"))
    add("--vocab-size", type=int, default=98_000, help="256 bytes, merges and 3 special tokens (default: 98000)")
    add("--out", default="tokenizer.json", help="what train writes (default: tokenizer.json)")
    add("--tokenizer", default="tokenizer.json", help="what encode and decode read (default: tokenizer.json)")
    add("--workers", type=int, default=os.cpu_count(), help="processes that count words (default: one a core)")
    args = parser.parse_intermixed_args()
    if args.command == "train":
        return train_command(args)
    tok = Tokenizer.load(args.tokenizer)
    if args.command == "encode":
        for text in captions("-") if args.inputs == ["-"] else args.inputs:
            print(*tok.encode_ordinary(text))
    else:
        for ids in captions("-") if args.inputs == ["-"] else [" ".join(args.inputs)]:
            print(tok.decode(ids.split()))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"tokenizer.py: {error}")
