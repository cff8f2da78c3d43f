"""Byte-level byte-pair encoding: train, encode, decode, load, save. Standard library and `regex` only.

The algorithm comes first and is short: `learn_merges` joins the most frequent pair of neighbours again and
again, `apply_merges` replays those joins on new text. What follows makes the two fast (counts corrected only
where a merge changes them, a heap for very long words, a cache of words) and keeps them in step with Hugging
Face's `tokenizers`: the file is its tokenizer.json, merges and ids are equal to its own, ties included.

Left out: models other than byte-level BPE, offsets into the text, and special tokens inside a text: nothing
that a caption says becomes a start, end or padding token.

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
import zlib
from array import array
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from itertools import chain, groupby, islice
from pathlib import Path

try:
    import regex
except ImportError as error:
    raise ImportError("the package regex is missing: pip install regex") from error


# ---- the algorithm ----

def learn_merges(pieces, count, progress=False):
    """The first `count` merges, pairs of ids, that BPE learns from `pieces`: {bytes read as ids: how often}.

    Ids below 256 are single bytes; merge number n makes the id 256 + n. Of pairs that are equally frequent,
    the one with the lower ids goes first. Fewer merges are returned when every piece has become one token.
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

    All pieces lie in one list of cells, a cell a byte, with a gap after each piece. A token writes its id
    into its first and its last cell: its left neighbour ends one cell before the first, its right neighbour
    begins one cell after the last. So a merge costs what it changes, however long the pieces are.
    """

    def __init__(self, pieces):
        """Lay out `pieces`, {bytes read as ids: how often}, and count every pair of neighbours."""
        self.cells, self.weights = [GAP], [0]
        for ids, count in pieces.items():
            self.cells += ids
            self.cells.append(GAP)
            self.weights += [count] * len(ids) + [0]
        self.lengths = [1] * 256
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
        return None

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


class WordCache(dict):
    """word -> tuple of ids, found by `encode` when missing. When full, the older half is dropped."""

    def __init__(self, encode, size=1 << 16, longest=64):
        """At most 2 x `size` words of at most `longest` characters are kept; `encode` gives a word's ids."""
        self.encode, self.size, self.longest, self.older = encode, size, longest, {}

    def __missing__(self, word):
        """The ids of a word that the younger generation lacks."""
        ids = self.older.get(word)
        if ids is None:
            ids = tuple(self.encode(word))
        if len(word) <= self.longest:
            if len(self) >= self.size:
                self.older = dict(self)
                self.clear()
            self[word] = ids
        return ids


def passing(items, label, progress):
    """Hand `items` on; where `progress` is true, say each second on standard error how many have passed."""
    start = said = time.monotonic()
    number = 0
    for number, item in enumerate(items, 1):
        yield item
        if progress and time.monotonic() - said > 1:
            said = time.monotonic()
            print(f"\r{number:,} {label}, {said - start:.0f} s", end="", file=sys.stderr, flush=True)
    if progress:
        print(f"\r{number:,} {label}, {time.monotonic() - start:.0f} s", file=sys.stderr)


# ---- bytes, words and pieces ----

def byte_characters():
    """GPT-2's printable stand-in for each of the 256 bytes: tokens are bytes, a tokenizer.json holds text."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in plain else next(spare)) for byte in range(256)]


BYTE_TO_CHAR = byte_characters()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
ALPHABET = sorted(BYTE_TO_CHAR)  # the order in which `tokenizers`, and CLIP, number the bytes
BYTE_TO_ID = bytes(map(ALPHABET.index, BYTE_TO_CHAR))
PAD, START, END = SPECIALS = ("[PAD]", "<|startoftext|>", "<|endoftext|>")

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
CLIP_PATTERN = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "NFC"},
    {"type": "Lowercase"},
    {"type": "Replace", "pattern": {"Regex": r"[\s\x1c-\x1f]+"}, "content": " "},  # where str.split() splits
    {"type": "Strip", "strip_left": True, "strip_right": True}]}
PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

SURROGATE = regex.compile("[\ud800-\udfff]")
WHITE_SPACE = "".join(regex.findall(r"\s", "".join(map(chr, range(0x3001)))))
MANY_MARKS = regex.compile(r"\p{M}{99,}")


def sorted_marks(match):
    """The matched marks, decomposed, each run of them in the order of their combining classes."""
    marks = "".join(unicodedata.normalize("NFD", mark) for mark in match[0])
    runs = groupby(marks, key=lambda mark: unicodedata.combining(mark) > 0)
    return "".join("".join(sorted(run, key=unicodedata.combining) if moves else run) for moves, run in runs)


def compose(form, text):
    """`unicodedata.normalize`, hundreds of marks in a row put in order first: its own sort is quadratic."""
    return unicodedata.normalize(form, MANY_MARKS.sub(sorted_marks, text))


def lower(text):
    """Lower case, character by character: str.lower() looks around a capital sigma, `tokenizers` does not."""
    return text.replace("Σ", "σ").lower()


def normalize_word(word):
    """What NORMALIZER makes of a word without white space."""
    return word.lower() if word.isascii() else lower(compose("NFC", SURROGATE.sub("\ufffd", word)))


def count_words(texts):
    """Two Counters of the words in `texts`, a list: all of them, and those that open a text."""
    words, opening = Counter(), Counter()
    for start in range(0, len(texts), 100):  # few enough to stay in the processor's cache
        some = texts[start:start + 100]
        words.update(" ".join(some).split())
        opening.update(word for text in some for word in text.split(None, 1)[:1])
    return words, opening


def in_processes(function, items, workers):
    """`map` over `workers` processes that, unlike Executor.map, reads `items` no faster than they work."""
    with ProcessPoolExecutor(workers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def count_pieces(texts, workers=1, progress=False):
    """The pieces that PATTERN finds in normalised `texts`: {bytes read as ids: how often}.

    White space is folded, so no piece reaches across a space and the pattern runs on each distinct word once.
    """
    texts, words, opening = iter(texts), Counter(), Counter()
    batches = passing(iter(lambda: list(islice(texts, 50_000)), []), "x 50,000 texts counted", progress)
    for counted in in_processes(count_words, batches, workers) if workers > 1 else map(count_words, batches):
        words.update(counted[0])
        opening.update(counted[1])
    pieces, find = Counter(), regex.compile(PATTERN).findall
    for word, count in words.items():
        at_start, word = opening[word], normalize_word(word)
        for text, times in ((word, at_start), (" " + word, count - at_start)):
            for piece in find(text) if times else ():
                pieces[piece] += times
    return {piece.encode().translate(BYTE_TO_ID): count for piece, count in pieces.items()}


# ---- the file format ----

def build_spec(tokens, merges, specials, normalizer, pre_tokenizer, suffix=None):
    """The content of a tokenizer.json: `tokens`, then `specials`, as ids go, start and end last."""
    vocab = {token: i for i, token in enumerate([*tokens, *specials])}
    start, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in specials[-2:])
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": vocab[token], "content": token, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True} for token in specials],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first, end], "pair": [start, first, end, second, end],
            "special_tokens": {token: {"id": token, "ids": [vocab[token]], "tokens": [token]}
                               for token in specials[-2:]}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": suffix, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "vocab": vocab, "merges": merges}}


def clip_spec(text):
    """OpenAI's bpe_simple_vocab_16e6.txt as a tokenizer.json: 49,408 entries, `</w>` at the end of a word."""
    merges = [line.split() for line in text.split("\n")[1:49152 - 256 - 2 + 1]]
    if len(merges) != 48894 or any(len(pair) != 2 for pair in merges):
        raise ValueError("not CLIP's list of merges, the only compressed file that is read here")
    tokens = ALPHABET + [char + "</w>" for char in ALPHABET] + [a + b for a, b in merges]
    fold = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "NFC"}, fold, {"type": "Lowercase"}]}
    words = {"type": "Split", "pattern": {"Regex": CLIP_PATTERN}, "behavior": "Removed", "invert": True}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [words, PRE_TOKENIZER | {"use_regex": False}]}
    return build_spec(tokens, merges, (START, END), normalizer, pre_tokenizer, "</w>")


def clip_clean(text):
    """CLIP's own cleaning but ftfy: entities resolved twice, and Python's lower case with its final sigma."""
    return html.unescape(html.unescape(text)).lower()


def check_model(model):
    """Refuse, with ValueError, a "model" that is not a BPE of bytes whose ids follow from the text alone."""
    kind = model.get("type", "BPE" if "merges" in model else "of an unknown kind")
    if kind != "BPE":
        raise ValueError(f"the model is {kind}, and only byte-level BPE is read here")
    if model.get("dropout"):
        raise ValueError(f"dropout {model['dropout']} makes ids random: set it to null")
    if model.get("continuing_subword_prefix"):
        raise ValueError("it has a continuing_subword_prefix, which byte-level BPE does not use")
    if model.get("byte_fallback") and not model["vocab"].keys() >= set(ALPHABET):
        raise ValueError("it needs byte_fallback, as some of the 256 bytes are not in its vocabulary")


def compile_pattern(pattern):
    """The pattern of a Split or a Replace, {"String": ...} or {"Regex": ...}, compiled."""
    try:
        return regex.compile(pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"]))
    except regex.error as error:
        raise ValueError(f"regex does not understand its pattern {pattern}: {error}") from None


def normalizer_steps(spec):
    """The functions from text to text that a "normalizer" names, in their order."""
    kind = spec["type"] if spec else None
    if kind is None:
        return []
    if kind == "Sequence":
        return list(chain.from_iterable(map(normalizer_steps, spec["normalizers"])))
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return [partial(compose, kind)]
    if kind == "Lowercase":
        return [lower]
    if kind == "Replace":
        return [partial(compile_pattern(spec["pattern"]).sub, lambda match: spec["content"])]
    if kind == "Strip":
        return [lambda text: text.lstrip(WHITE_SPACE) if spec["strip_left"] else text,
                lambda text: text.rstrip(WHITE_SPACE) if spec["strip_right"] else text]
    raise ValueError(f"the normalizer {kind} is not read here")


def split_steps(spec):
    """The functions from a text to a list of texts that a "pre_tokenizer" names, in their order."""
    parts = spec["pretokenizers"] if spec and spec["type"] == "Sequence" else [spec or {"type": "missing"}]
    if parts[-1]["type"] != "ByteLevel":
        raise ValueError(f"the pre-tokenizer is {parts[-1]['type']}, where byte-level BPE ends in ByteLevel")
    steps = []
    for part in parts[:-1]:
        if part["type"] == "Digits":
            digits = r"\p{N}" if part["individual_digits"] else r"\p{N}+"
            part = {"type": "Split", "pattern": {"Regex": digits}, "behavior": "Isolated", "invert": False}
        if part["type"] != "Split" or part["behavior"] not in ("Isolated", "Removed"):
            raise ValueError(f"the pre-tokenizer {part['type']} {part.get('behavior', '')} is not read here")
        both = part["behavior"] == "Isolated"
        steps.append(partial(split_text, compile_pattern(part["pattern"]), both or part["invert"],
                             both or not part["invert"]))
    if parts[-1]["add_prefix_space"]:
        steps.append(lambda text: [text if text.startswith(" ") else " " + text])
    if parts[-1].get("use_regex", True):
        steps.append(regex.compile(PATTERN).findall)
    return steps


def split_text(pattern, keep_matches, keep_gaps, text):
    """`text` cut before and after each match of `pattern`."""
    pieces, end = [], 0
    for match in pattern.finditer(text):
        pieces += [text[end:match.start()]] * keep_gaps + [match[0]] * keep_matches
        end = match.end()
    return [piece for piece in pieces + [text[end:]] * keep_gaps if piece]


def special_names(spec, config):
    """The names of the start, end and padding token: what tokenizer_config.json says, else the template."""
    added = {token["content"] for token in spec.get("added_tokens") or []}
    pad = next((name for name in (PAD, "<pad>", "<|pad|>") if name in added), None)
    pad = (spec.get("padding") or {}).get("pad_token", pad)
    names = {"bos_token": None, "eos_token": None, "pad_token": pad}
    processor = spec.get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        if part.get("type") == "TemplateProcessing":
            items = [item.get("SpecialToken", {}).get("id") for item in part["single"]]
            text = items.index(None)
            names |= {"bos_token": next(iter(items[:text]), None),
                      "eos_token": next(iter(items[text + 1:]), None)}
        elif part.get("type") in ("RobertaProcessing", "BertProcessing"):
            names |= {"bos_token": part["cls"][0], "eos_token": part["sep"][0]}
    for key in names:
        said = config.get(key)
        names[key] = (said["content"] if isinstance(said, dict) else said) or names[key]
    return names.values()


def take_out(tokens, parts):
    """Put ids in place of the texts of `tokens`, {text: id}, longest first, in a list of texts and ids."""
    if not tokens:
        return parts
    pattern = regex.compile("(" + "|".join(map(regex.escape, sorted(tokens, key=len, reverse=True))) + ")")
    cut = ([part] if isinstance(part, int) else pattern.split(part) for part in parts)
    return [tokens[part] if i % 2 else part for pieces in cut for i, part in enumerate(pieces)]


def token_bytes(token, suffix):
    """The bytes that a token of tokenizer.json stands for; an end-of-word suffix stands for a space."""
    if suffix and token.endswith(suffix):
        return token_bytes(token.removesuffix(suffix), None) + b" "
    try:
        return bytes(map(CHAR_TO_BYTE.__getitem__, token))
    except KeyError:  # an added token is plain text
        return token.encode()


def read_json(path):
    """The content of a JSON file; ValueError when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None


class Tokenizer:
    """A byte-level BPE tokenizer, from `Tokenizer.train(texts, vocab_size)` or `Tokenizer.load(path)`.

    `pad_id`, `sot_id` and `eot_id` are the ids of the padding, start and end token; `len(tok)` is one more
    than the highest id, which in a tokenizer that was trained here is `eot_id`.
    """

    def __init__(self, spec, config=None, clean=None):
        """The contents of tokenizer.json and tokenizer_config.json; `clean` replaces the normalizer."""
        self.spec, self._config, self._clean = spec, config or {}, clean
        model, added = spec["model"], spec.get("added_tokens") or []
        check_model(model)
        self._vocab, suffix = model["vocab"], model.get("end_of_word_suffix")
        ids = self._vocab | {token["content"]: token["id"] for token in added}
        special = {token["id"] for token in added if token["special"]}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]
                  if not (isinstance(pair, str) and pair.startswith("#version"))]
        self._made = [self._vocab[a + b] for a, b in merges]
        self._ranks = [{} for _ in range(max(ids.values(), default=-1) + 1)]
        for rank, (a, b) in enumerate(merges):
            if self._made[rank] not in special:  # text never becomes a special token
                self._ranks[self._vocab[a]][self._vocab[b]] = rank
        self._whole = {}
        if model.get("ignore_merges"):
            self._whole = {token: i for token, i in self._vocab.items() if i not in special}
        self._byte_ids = [self._vocab.get(char) for char in BYTE_TO_CHAR]
        self._last_ids = [self._vocab.get(char + suffix) for char in BYTE_TO_CHAR] if suffix else []
        self._tokens = {i: "" if i in special else token for token, i in ids.items()}
        names = special_names(spec, self._config)
        self.sot_id, self.eot_id, self.pad_id = (ids[name] if name else None for name in names)
        self.pad_id = self.pad_id or 0  # CLIP's, where the file names none

        self._steps = [clean] if clean else normalizer_steps(spec.get("normalizer"))
        self._splits = split_steps(spec.get("pre_tokenizer"))
        words = [token for token in added if not token["special"]]
        if any(token["single_word"] or token["lstrip"] or token["rstrip"] for token in words):
            raise ValueError("added tokens with single_word, lstrip or rstrip are not read here")
        own = spec.get("normalizer") == NORMALIZER and spec.get("pre_tokenizer") == PRE_TOKENIZER
        self._by_word = own and not words
        self._added_raw = {token["content"]: token["id"] for token in words if not token["normalized"]}
        self._added = {self.normalize(token["content"]): token["id"]
                       for token in words if token["normalized"]}
        self._pieces = WordCache(self._encode_piece)
        self._opening = WordCache(partial(self._encode_word, ""))
        self._following = WordCache(partial(self._encode_word, " "))

    def __reduce__(self):
        """Pickling takes the file's content along and leaves the caches."""
        return Tokenizer, (self.spec, self._config, self._clean)

    def __len__(self):
        """The number of rows that an embedding of the ids needs."""
        return len(self._ranks)

    @cached_property
    def _bytes(self):
        """id -> the bytes that it decodes to; loader processes, which only encode, never build it."""
        suffix = self.spec["model"].get("end_of_word_suffix")
        return {i: token_bytes(token, suffix) for i, token in self._tokens.items()}

    @classmethod
    def train(cls, texts, vocab_size, progress=True, workers=1):
        """Learn `vocab_size` entries (256 bytes, merges, 3 special tokens) from an iterable of str.

        They are fewer when the texts run out of pairs. `workers` processes count words; the merges are
        learned in this one. Raises ValueError on a `vocab_size` below 259 and on a str in place of a list.
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
        return cls(build_spec(tokens, merges, SPECIALS, NORMALIZER, PRE_TOKENIZER))

    @classmethod
    def load(cls, path):
        """Read a Hugging Face tokenizer.json, or OpenAI CLIP's bpe_simple_vocab_16e6.txt.gz.

        Raises FileNotFoundError when there is no such file, ValueError when it is not a byte-level BPE.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; `python tokenizer.py train` makes one")
        data = path.read_bytes()
        try:
            if data.startswith(b"\x1f\x8b"):
                return cls(clip_spec(gzip.decompress(data).decode()), clean=clip_clean)
            config = path.with_name("tokenizer_config.json")
            return cls(read_json(path), read_json(config) if config.exists() else None)
        except KeyError as error:
            raise ValueError(f"{path}: not a whole tokenizer.json: {error} is missing") from error
        except (TypeError, AttributeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: not a tokenizer.json: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path):
        """Write a Hugging Face tokenizer.json; a file that stood there is replaced in one step."""
        unfinished = Path(f"{path}.{os.getpid()}")
        unfinished.write_text(json.dumps(self.spec, ensure_ascii=False), encoding="utf-8")
        unfinished.replace(path)

    def normalize(self, text):
        """The text that `decode(encode_ordinary(text))` gives back."""
        if self._by_word:
            return " ".join(map(normalize_word, text.split()))
        text = SURROGATE.sub("\ufffd", text)
        for step in self._steps:
            text = step(text)
        return text

    def encode_ordinary(self, text):
        """The ids (list of int) of `text` (str), without start and end token."""
        if not self._by_word:
            return self._encode_by_steps(text)
        words = text.split()
        ids = list(self._opening[words[0]]) if words else []
        ids.extend(chain.from_iterable(map(self._following.__getitem__, words[1:])))
        return ids

    def encode_ordinary_batch(self, texts):
        """`encode_ordinary` of each of `texts`: a list of lists of int."""
        return [self.encode_ordinary(text) for text in texts]

    def encode(self, texts, context_length=77):
        """Start, text, end and padding of a str, or of each of a list: LongTensor [N, context_length].

        A text that is too long loses its end; the end token stays. Raises ValueError when the file names no
        start and end token, ImportError without torch.
        """
        try:
            import torch
        except ImportError as error:
            raise ImportError("encode makes a tensor, and torch is missing: pip install torch") from error
        if self.sot_id is None or self.eot_id is None:
            raise ValueError("this tokenizer has no start and end token: name bos_token and eos_token in "
                             "the tokenizer_config.json beside its file, or use encode_ordinary")
        if context_length < 2:
            raise ValueError(f"context_length is {context_length}: the start and the end token alone take 2")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return torch.empty(0, context_length, dtype=torch.long)
        rows = array("q", [self.pad_id]) * (context_length * len(texts))
        for start, text in zip(range(0, len(rows), context_length), texts):
            ids = [self.sot_id, *self.encode_ordinary(text)[:context_length - 2], self.eot_id]
            rows[start:start + len(ids)] = array("q", ids)
        return torch.frombuffer(rows, dtype=torch.long).view(-1, context_length)  # [N, context_length]

    __call__ = encode

    def decode(self, ids):
        """The text of `ids`, an iterable of int or a tensor of one dimension, special tokens left out.

        Bytes that are not UTF-8, as where a character is cut, become U+FFFD. Raises ValueError on an id that
        does not exist.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            text = b"".join(map(self._bytes.__getitem__, ids)).decode("utf-8", "replace")
        except KeyError as error:
            raise ValueError(f"there is no token {error}: ids go from 0 to {len(self) - 1}") from None
        return text.removesuffix(" ") if self._last_ids else text

    def _encode_word(self, before, word):
        """ids of one word as it came; `before` is the space that stands before it, or nothing."""
        word = normalize_word(word)
        if word.isalpha():  # PATTERN would take it whole
            return self._pieces[before + word]
        return chain.from_iterable(map(self._pieces.__getitem__, self._splits[0](before + word)))

    def _encode_by_steps(self, text):
        """ids of a text by the file's own normalizer, added tokens and pre-tokenizer."""
        parts = take_out(self._added_raw, [text])
        parts = [part if isinstance(part, int) else self.normalize(part) for part in parts]
        ids = []
        for part in take_out(self._added, parts):
            if isinstance(part, int):
                ids.append(part)
                continue
            pieces = [part] if part else []
            for split in self._splits:
                pieces = [small for piece in pieces for small in split(piece)]
            ids.extend(chain.from_iterable(map(self._pieces.__getitem__, pieces)))
        return ids

    def _encode_piece(self, piece):
        """ids of one of the pattern's pieces: its bytes, merged."""
        data = piece.encode()
        if self._whole and (token := "".join(BYTE_TO_CHAR[byte] for byte in data)) in self._whole:
            return [self._whole[token]]
        ids = list(map(self._byte_ids.__getitem__, data))
        if self._last_ids:
            ids[-1] = self._last_ids[data[-1]]
        if None in ids:
            ids = self._without_unknown(ids)
        return (apply_merges if len(ids) < 100 else apply_merges_long)(ids, self._ranks, self._made)

    def _without_unknown(self, ids):
        """`ids` with the file's unknown token, if it has one, for each byte (or run of bytes) it lacks."""
        model = self.spec["model"]
        if model.get("fuse_unk"):
            ids = [i for n, i in enumerate(ids) if i is not None or n == 0 or ids[n - 1] is not None]
        unknown = self._vocab.get(model.get("unk_token"))
        return [unknown if i is None else i for i in ids if i is not None or unknown is not None]


# ---- the command ----

def captions(paths):
    """The captions in text files (one a line), in WebDataset shards (.tar), for "-" on standard input."""
    for path in paths:
        try:
            if ".tar" in Path(path).suffixes:
                yield from shard_captions(path)
                continue
            with open(0 if path == "-" else path, "rb", closefd=path != "-") as lines:
                yield from (line.decode() for line in lines)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; give text files, .tar shards or -") from None
        except (tarfile.TarError, zlib.error, EOFError) as error:
            raise ValueError(f"{path}: not a whole tar file: {str(error).splitlines()[0]}") from error
        except ValueError as error:
            raise ValueError(f"{path}: its captions cannot be read: {error}") from error


def shard_captions(path):
    """The captions of a shard: each pair's .txt files or, where it has none, "caption" in its .json."""
    with tarfile.open(path) as shard:
        for _, members in groupby(shard, key=lambda member: regex.match(r"(.*/)?[^/.]*", member.name)[0]):
            files = {member.name: shard.extractfile(member).read() for member in members
                     if member.name.endswith((".txt", ".json"))}
            texts = [data.decode() for name, data in files.items() if name.endswith(".txt")]
            described = [json.loads(data).get("caption") for name, data in files.items() if not texts]
            yield from texts or filter(None, described)


def sampled(texts, samples):
    """Hand `texts` on; keep the first 10,000 and then each hundredth in `samples`, by language."""
    for number, text in enumerate(texts):
        if number < 10_000 or number % 100 == 0:
            samples["Korean" if regex.search(r"\p{Hangul}", text) else "English"].append(text)
        yield text


def train_command(args):
    """`train`: captions to a tokenizer.json, and how short it makes each language."""
    start, samples = time.monotonic(), defaultdict(list)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    tok = Tokenizer.train(sampled(captions(args.files), samples), args.vocab_size, workers=args.workers)
    if not samples:
        raise ValueError(f"{' '.join(args.files)}: no captions; give text files, one a line, or .tar shards")
    tok.save(args.out)
    print(f"{args.out}: {len(tok):,} entries in {time.monotonic() - start:.0f} s")
    for language, texts in samples.items():
        size = sum(len(tok.normalize(text).encode()) for text in texts)
        count = sum(map(len, tok.encode_ordinary_batch(texts)))
        print(f"{language}: {size / max(count, 1):.2f} bytes per token, in {len(texts):,} of the captions")


def encode_command(args):
    """`encode`: each text to a line of ids."""
    tok = Tokenizer.load(args.tokenizer)
    for text in args.texts or captions(["-"]):
        print(*tok.encode_ordinary(text))


def decode_command(args):
    """`decode`: ids, or each line of them, to text."""
    tok = Tokenizer.load(args.tokenizer)
    for line in [" ".join(args.ids)] if args.ids else sys.stdin:
        print(tok.decode(map(int, line.split())))


def main():
    """Read the command line and run one of the three commands."""
    parser = argparse.ArgumentParser(description="Byte-level BPE: train a tokenizer.json, and use it.")
    commands = parser.add_subparsers(required=True, metavar="train | encode | decode")
    train = commands.add_parser("train", help="learn a tokenizer from captions", description=(
        "Learn a byte-level BPE from captions and write a Hugging Face tokenizer.json. Text is composed "
        "(NFC) and lower-cased, white space folded. The paper has 98,000 entries from 2.0M English and 1.5M "
        "Korean sentences."))
    train.add_argument("files", nargs="+", metavar="FILE", help=(
        "text with one caption a line, a WebDataset .tar (.txt, else caption in .json), or - for stdin"))
    train.add_argument("--vocab-size", type=int, default=98_000, metavar="N", help=(
        "entries in all: 256 bytes, merges, 3 special tokens (default 98000)"))
    train.add_argument("--out", default="tokenizer.json", metavar="PATH", help="default tokenizer.json")
    train.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help=(
        "processes that count words (default: one a core)"))
    train.set_defaults(command=train_command)
    encode = commands.add_parser("encode", help="text to ids, a line each", description=(
        "Print the ids of each text on a line, without start and end token. Without a text, read lines."))
    encode.add_argument("texts", nargs="*", metavar="TEXT")
    encode.set_defaults(command=encode_command)
    decode = commands.add_parser("decode", help="ids to text", description=(
        "Print the text of the ids. Without ids, read lines of them. Special tokens are left out."))
    decode.add_argument("ids", nargs="*", metavar="ID")
    decode.set_defaults(command=decode_command)
    for command in (encode, decode):
        command.add_argument("--tokenizer", default="tokenizer.json", metavar="PATH", help=(
            "a tokenizer.json, or CLIP's bpe_simple_vocab_16e6.txt.gz (default tokenizer.json)"))
    args = parser.parse_args()
    args.command(args)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"tokenizer.py: {error}")
