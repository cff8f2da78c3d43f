"""Byte-level byte-pair encoding (BPE): train, encode, decode, load, save.

    tok = Tokenizer.train(["a red apple", "빨간 사과"], vocab_size=300)
    ids = tok.encode_ordinary("A red  APPLE")       # a list of int
    tok.decode(ids)                                 # 'a red apple'
    tok.encode(["a red apple"], context_length=77)  # [1, 77]: start, text, end, padding
    tok.save("tokenizer.json")                      # in the format of Hugging Face's tokenizers

From the command line:

    python tokenizer.py train captions.txt --vocab-size 8000
    python tokenizer.py encode "a red apple"
    python tokenizer.py decode 64 265 258

From top to bottom: BPE in its plain form, which is the definition; how text becomes words,
pre-tokens and bytes; the class Tokenizer; BPE in a fast form with the same results; files; the
format of tokenizer.json; the commands. Merges and ids equal those of the package `tokenizers`, ties
included.

Not included: models other than byte-level BPE, and special tokens in text. A caption that says
"<|endoftext|>" is encoded character by character.

Sources: Sennrich et al., arXiv 1508.07909 (BPE); Radford et al. 2019, GPT-2 (bytes, and the regular
expression of pre-tokens). Needs the package `regex`; only `encode` needs torch.
"""

import argparse
import codecs
import contextlib
import errno
import hashlib
import heapq
import json
import os
import reprlib
import signal
import stat
import sys
import time
import unicodedata
from array import array
from collections import Counter, defaultdict
from functools import cached_property, partial
from itertools import chain, groupby, islice
from multiprocessing import Pool
from pathlib import Path

import regex

# ---- BPE, the plain form ----
#
# A text is first split into pre-tokens, such as "a", " red" and " apple"; no merge crosses their
# borders. Ids below 256 are single bytes. Merge number n joins two ids into the new id 256 + n.

def count_pairs(pre_tokens):
    """Count the pairs of adjacent ids in {ids of a pre-token: how often it occurs}."""
    counts = Counter()
    for ids, times in pre_tokens.items():
        for pair in zip(ids, ids[1:]):
            counts[pair] += times
    return counts


def replace_pair(ids, pair, new_id):
    """Replace each occurrence of `pair` in the tuple `ids` by `new_id`."""
    replaced = []
    i = 0
    while i < len(ids):
        if ids[i:i + 2] == pair:
            replaced.append(new_id)
            i += 2
        else:
            replaced.append(ids[i])
            i += 1
    return tuple(replaced)


def learn_merges_plain(pre_tokens, count):
    """Learn up to `count` merges, a list of pairs of ids: merge the most frequent pair, repeat.

    pre_tokens: {ids of a pre-token, as bytes: how often it occurs}.
    """
    pre_tokens = {tuple(ids): times for ids, times in pre_tokens.items()}
    merges = []
    for new_id in range(256, 256 + count):
        counts = count_pairs(pre_tokens)
        if not counts:
            break  # every pre-token is one token
        pair = min(counts, key=lambda pair: (-counts[pair], pair))  # a tie goes to the lower ids
        pre_tokens = {replace_pair(ids, pair, new_id): n for ids, n in pre_tokens.items()}
        merges.append(pair)
    return merges


def apply_merges_plain(ids, pair_to_rank, rank_to_id):
    """Encode: merge the pair of lowest rank in the list `ids`, until no learned pair is left.

    pair_to_rank: a pair of ids -> its rank, the number of its merge in the order of learning.
    rank_to_id: the number of a merge -> the id that it makes.
    """
    no_rank = len(rank_to_id)
    while len(ids) > 1:
        ranks = [pair_to_rank.get(pair, no_rank) for pair in zip(ids, ids[1:])]
        rank = min(ranks)
        if rank == no_rank:
            break
        i = ranks.index(rank)  # the leftmost pair of this rank
        ids = ids[:i] + [rank_to_id[rank]] + ids[i + 2:]
    return ids


# ---- from text to words, pre-tokens and bytes ----
#
# A text is normalized (NFC, lower case, one space between words, none at the ends) and split into
# pre-tokens. A space always begins a pre-token, so words are normalized, split and cached one by
# one.

PATTERN = regex.compile(  # GPT-2's
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
SURROGATE = regex.compile("[\ud800-\udfff]")  # half a character, which UTF-8 cannot encode
MANY_COMBINING = regex.compile(r"\p{M}{99,}")
MAX_TRAINED = 100_000  # characters of a pre-token to train on: a caption can be one long word


def bytes_to_unicode():
    """GPT-2's printable character for each byte, because a JSON file holds text and not bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_TO_CHAR = bytes_to_unicode()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
ALPHABET = sorted(BYTE_TO_CHAR)  # the first 256 tokens, in the order of `tokenizers` and of CLIP
BYTE_TO_ID = bytes(ALPHABET.index(char) for char in BYTE_TO_CHAR)


def normalize_unicode(form, text):
    """`unicodedata.normalize` in linear time.

    It sorts combining characters, and a long run of them takes quadratic time unless they are
    sorted already.
    """
    if len(text) > 99:
        text = MANY_COMBINING.sub(sort_combining, text)
    return unicodedata.normalize(form, text)


def sort_combining(match):
    """Decompose the matched characters and sort them into Unicode's canonical order.

    Each run without a character of class 0 is sorted by combining class, stably.
    """
    decomposed = "".join(unicodedata.normalize("NFD", char) for char in match[0])
    runs = groupby(decomposed, key=lambda char: unicodedata.combining(char) > 0)
    return "".join("".join(sorted(run, key=unicodedata.combining)) for _, run in runs)


def lower(text):
    """Lower case, character by character: str.lower() turns a final capital sigma into ς."""
    return text.replace("Σ", "σ").lower()


def normalize_word(word):
    """A word in NFC and lower case. NORMALIZER, below, is the same for entire texts."""
    if word.isascii():
        return word.lower()
    return lower(normalize_unicode("NFC", SURROGATE.sub("\ufffd", word)))


def pre_tokenize(text):
    """Split a text or a word into pre-tokens, the matches of PATTERN."""
    if text.removeprefix(" ").isalpha():  # most words: one match, found faster
        return [text]
    return PATTERN.findall(text)


def count_words(texts):
    """Count the words that begin a text, and those that follow a space: two Counters.

    Their pre-tokens differ: "red" and " red".
    """
    first_words = Counter(word for text in texts for word in text.split(None, 1)[:1])
    later_words = Counter(chain.from_iterable(map(str.split, texts)))
    later_words.subtract(first_words)
    return first_words, +later_words  # + drops the zeros


def end_process(signal_number, frame):
    """A signal handler that exits normally, so that the process releases its locks."""
    sys.exit(1)


def count_pre_tokens(texts, workers=1, progress=False):
    """Count pre-tokens with `workers` processes: {ids of the bytes, as bytes: how often}."""
    texts = iter(texts)
    batches = iter(lambda: list(islice(texts, 50_000)), [])
    batches = show_progress(batches, "x 50,000 texts counted", progress)
    first_words, later_words = Counter(), Counter()
    # Ctrl-C interrupts all processes. Only this one should print an error.
    end_quietly = dict(initializer=signal.signal, initargs=(signal.SIGINT, end_process))
    with Pool(workers, **end_quietly) if workers > 1 else contextlib.nullcontext() as pool:
        counted = pool.imap(count_words, batches) if pool else map(count_words, batches)
        for first, later in counted:
            first_words.update(first)
            later_words.update(later)
    pre_tokens = Counter()
    for before, words in (("", first_words), (" ", later_words)):
        for word, times in words.items():
            for pre_token in pre_tokenize(before + normalize_word(word)):
                pre_tokens[pre_token[:MAX_TRAINED]] += times
    return {text.encode().translate(BYTE_TO_ID): times for text, times in pre_tokens.items()}


# ---- the tokenizer ----

class Cache(dict):
    """A dict that computes missing values with `make(key)`.

    It does not store long keys, and it empties itself when it holds `size` values.
    """

    def __init__(self, make, size=1 << 17):
        self.make = make
        self.size = size

    def __missing__(self, key):
        value = self.make(key)
        if len(key) <= 64:
            if len(self) >= self.size:
                self.clear()
            self[key] = value
        return value


class Tokenizer:
    """Text to ids and back.

    spec: the content of a tokenizer.json. config: the content of a special_tokens_map.json or a
    tokenizer_config.json; its bos_token, eos_token and pad_token override those of spec. Raises
    ValueError when spec is not a byte-level BPE.

    Attributes: sot_id, eot_id and pad_id are the ids of the start, end and padding token. If none
    is named, sot_id and eot_id are None and pad_id is 0, as in CLIP. `spec` is spec with the tokens
    of config.
    """

    def __init__(self, spec, config=None):
        model = read_model(spec)
        vocab = field(model, "vocab", dict, "model.")
        added = objects(spec, "added_tokens", optional=True)
        self._token_to_id = read_token_ids(vocab, added)
        self._size = max(self._token_to_id.values(), default=-1) + 1

        names = find_special_tokens(spec, config or {}, self._token_to_id)
        check_special_tokens(names, added, self._token_to_id)
        self.sot_id, self.eot_id, pad_id = map(self._token_to_id.get, names)
        self.pad_id = pad_id or 0
        self.spec = set_special_tokens(spec, names, self._token_to_id)

        # No text becomes a special token: not by a merge, as a byte, or as an entire pre-token.
        self._special = {token["id"] for token in added}
        special = self._special | {self.sot_id, self.eot_id} - {None}
        self._pair_to_rank, self._rank_to_id = {}, []
        for rank, (left, right, merged) in enumerate(read_merges(model, vocab)):
            self._rank_to_id.append(merged)
            if merged not in special:
                self._pair_to_rank[left, right] = rank

        # A byte that is not in the vocabulary becomes the unknown token, unless that is special.
        unknown_id = vocab.get(field(model, "unk_token", str, "model.", optional=True))
        if unknown_id in (self.sot_id, self.eot_id, pad_id):
            unknown_id = None
        self._suffix = field(model, "end_of_word_suffix", str, "model.", optional=True)
        ends = ["", self._suffix or ""]
        self._byte_to_id, self._last_byte_to_id = (
            [vocab.get(char + end, unknown_id) for char in BYTE_TO_CHAR] for end in ends)
        # Padding may be a word, as in CLIP, since what follows the end token has no effect.
        allowed = {unknown_id, pad_id} - {self.sot_id, self.eot_id}
        clash = (special - allowed) & {*self._byte_to_id, *self._last_byte_to_id}
        if clash:
            raise ValueError(f"the special token with the id {min(clash)} is also a byte of text")
        # With ignore_merges, a pre-token that is in the vocabulary is one token.
        self._whole_token_to_id = {}
        if field(model, "ignore_merges", bool, "model.", optional=True):
            self._whole_token_to_id = {token: i for token, i in vocab.items() if i not in special}

        # The rules of other files may cross spaces, so the entire text is encoded as one word.
        normalizer = field(spec, "normalizer", dict, optional=True)
        pre_tokenizer = field(spec, "pre_tokenizer", dict, optional=True)
        self.word_by_word = normalizer == NORMALIZER and pre_tokenizer == BYTE_LEVEL
        self._normalizers = [normalize_word] if self.word_by_word else read_normalizer(normalizer)
        self._pre_tokenizers = read_pre_tokenizer(pre_tokenizer)
        self._pre_token_ids = Cache(self._encode_pre_token)
        self._first_word_ids = Cache(lambda word: self._encode_word("", word))
        self._later_word_ids = Cache(lambda word: self._encode_word(" ", word))

    def __reduce__(self):  # pickling drops the caches
        return type(self), (self.spec,)

    def __len__(self):
        return self._size  # the highest id + 1

    @cached_property
    def digest(self):
        """SHA-256 in hex of what decides the ids: tokens and ids, merges in order, start and end.

        Padding is not part of it: what follows the end token changes no feature.
        """
        tokens = sorted(self._token_to_id.items(), key=lambda item: item[::-1])
        merges = sorted(self._pair_to_rank, key=self._pair_to_rank.get)
        content = [tokens, merges, [self.sot_id, self.eot_id]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @classmethod
    def train(cls, texts, vocab_size, progress=True, workers=1):
        """Learn `vocab_size` entries (256 bytes, merges, 3 special tokens) from an iterable of str.

        There are fewer entries if the texts run out of pairs. `workers` processes count words.
        Raises ValueError when `vocab_size` is below 259, and when `texts` is a single str.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one string: give a list of texts, or another iterable")
        count = vocab_size - len(ALPHABET) - len(SPECIALS)
        if count < 0:
            raise ValueError(
                f"vocab_size is {vocab_size}: 256 bytes and 3 special tokens need at least 259")
        tokens = list(ALPHABET)
        merges = []
        for a, b in learn_merges(count_pre_tokens(texts, workers, progress), count, progress):
            merges.append([tokens[a], tokens[b]])
            tokens.append(tokens[a] + tokens[b])
        return cls(build_spec(tokens, merges))

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json, and the tokenizer_config.json in the same folder if there is one.

        Raises OSError, and ValueError when the file is not a byte-level BPE.
        """
        path = Path(path)
        data = read_file(path)
        config_path = path.with_name("tokenizer_config.json")
        config = read_json(config_path) if config_path.exists() else None
        try:
            if data.startswith(b"\x1f\x8b"):
                raise ValueError("a gzip file; if it holds CLIP's merges, extras.convert."
                                 "read_clip_merges(path).save('tokenizer.json') makes one")
            return cls(parse_json(data), config)
        except ValueError as error:
            raise ValueError(f"{path}: not a tokenizer that can be read: {error}") from None

    def save(self, path):
        """Write a tokenizer.json, atomically. It needs no tokenizer_config.json."""
        with atomic_write(path) as file:
            file.write(json.dumps(self.spec, ensure_ascii=False).encode())

    def normalize(self, text):
        """The text that `decode(encode_ordinary(text))` returns."""
        return " ".join(map(self._normalize, self._split(text)))

    def encode_ordinary(self, text):
        """The ids of a text as a list of int, without start and end token."""
        ids = []
        word_ids = self._first_word_ids
        for word in self._split(text):
            ids += word_ids[word]
            word_ids = self._later_word_ids
        return ids

    def encode_ordinary_batch(self, texts):
        """The ids of each text, as `encode_ordinary` returns them."""
        return [self.encode_ordinary(text) for text in texts]

    def encode(self, texts, context_length=77):
        """Encode a list of texts, or one: LongTensor [N, context_length].

        A row holds the start token, the text, the end token and padding. A text that is too long is
        cut; the end token stays. `cut` then is {row: text} of the texts that were cut. Only the
        first 100 * context_length characters of a text are read, after white space is collapsed, so
        that no text takes long. Normal text has at most a dozen characters per token, so its rows
        do not change. Raises ValueError when the tokenizer has no start or end token.
        """
        import torch
        if self.sot_id is None or self.eot_id is None:
            raise ValueError(
                "this tokenizer has no start and end token: name bos_token and eos_token in a "
                "tokenizer_config.json in the same folder, or use encode_ordinary")
        if context_length < 2:
            raise ValueError(
                f"context_length is {context_length}: the start and end token alone need 2")
        texts = [texts] if isinstance(texts, str) else list(texts)
        self.cut = {}
        if not texts:
            return torch.empty(0, context_length, dtype=torch.long)
        # An array is filled ten times as fast as a tensor.
        rows = array("q", [self.pad_id]) * (len(texts) * context_length)
        for i, text in enumerate(texts):
            if len(text) > 100 * context_length:
                text = self._cut(text, 100 * context_length)
            ids = self.encode_ordinary(text)
            if len(ids) > context_length - 2:
                self.cut[i] = texts[i]
                ids = ids[:context_length - 2]
            row = array("q", [self.sot_id, *ids, self.eot_id])
            start = i * context_length
            rows[start:start + len(row)] = row
        return torch.frombuffer(rows, dtype=torch.long).view(-1, context_length)  # [N, L]

    __call__ = encode

    def decode(self, ids):
        """The text of `ids`, an iterable of int or a tensor [L]. Special tokens are skipped.

        Bytes that are not UTF-8, such as half a character, become U+FFFD. Raises ValueError for an
        id that does not exist.
        """
        try:
            data = b"".join(self._id_to_bytes[int(i)] for i in ids)
        except KeyError as error:
            raise ValueError(
                f"there is no token {error}: ids go from 0 to {len(self) - 1}") from None
        text = data.decode("utf-8", "replace")
        return text.removesuffix(" ") if self._suffix else text

    @cached_property
    def _id_to_bytes(self):
        """id -> the bytes that it stands for; those of a special token are empty."""
        id_to_bytes = {}
        for token, i in self._token_to_id.items():
            ends_word = self._suffix and token.endswith(self._suffix)
            chars = token.removesuffix(self._suffix) if ends_word else token
            data = bytes(CHAR_TO_BYTE.get(char, ord("?")) for char in chars)
            id_to_bytes[i] = data + b" " if ends_word else data
        return id_to_bytes | dict.fromkeys(self._special, b"")

    def _cut(self, text, length):
        """The first `length` characters of a text, after white space is collapsed."""
        if self.word_by_word:  # `length` words have enough characters
            text = " ".join(text.split(None, length)[:length])
        return text[:length]

    def _split(self, text):
        return text.split() if self.word_by_word else [text]

    def _normalize(self, word):
        for step in self._normalizers:
            word = step(word)
        return word

    def _encode_word(self, before, word):
        """The ids of a word. `before` is a space, or empty for the first word of a text."""
        text = before + self._normalize(word)
        pre_tokens = [text] if text else []
        for split in self._pre_tokenizers:
            pre_tokens = [part for pre_token in pre_tokens for part in split(pre_token)]
        ids = []
        for pre_token in pre_tokens:
            ids += self._pre_token_ids[pre_token]
        return tuple(ids)

    def _encode_pre_token(self, pre_token):
        """The ids of a pre-token: the ids of its bytes, merged."""
        data = pre_token.encode()
        if self._whole_token_to_id:
            token = "".join(BYTE_TO_CHAR[byte] for byte in data)
            if token in self._whole_token_to_id:
                return (self._whole_token_to_id[token],)
        ids = [self._byte_to_id[byte] for byte in data]
        if self._suffix and data:
            ids[-1] = self._last_byte_to_id[data[-1]]
        if None in ids:  # a byte is not in the vocabulary; `tokenizers` drops it, too
            ids = [i for i in ids if i is not None]
        return tuple(apply_merges(ids, self._pair_to_rank, self._rank_to_id))


# ---- BPE, the fast form ----
#
# learn_merges and apply_merges return what learn_merges_plain and apply_merges_plain return.

def learn_merges(pre_tokens, count, progress=False):
    """Learn merges, and update the counts of pairs instead of counting again."""
    pairs = PairCounts(pre_tokens)
    merges = []
    for new_id in show_progress(range(256, 256 + count), "merges learned", progress):
        pair = pairs.most_frequent()
        if pair is None:
            break
        pairs.merge(pair, new_id)
        merges.append(pair)
    return merges


GAP, INSIDE = -1, -2


class PairCounts:
    """The counts of adjacent pairs, updated only where a merge changes them.

    All pre-tokens are stored in one list of cells: one cell per byte, and a gap after each
    pre-token. A token that spans several cells has its id in its first and its last cell. Example:
    "low" and "lot", after the merges (l, o) -> 256 and (256, w) -> 257:

        GAP    l     o      w    GAP    l    o    t   GAP
        GAP   256   256     w    GAP   256  256   t   GAP
        GAP   257  INSIDE  257   GAP   256  256   t   GAP

    So the cell before a token always holds the id of its left neighbor, and the cell after it the
    id of its right neighbor. A merge visits only the places where the pair occurs; counting again
    would visit the entire text.
    """

    def __init__(self, pre_tokens):
        self.cells = [GAP]
        self.weights = [0]         # for each cell, how often its pre-token occurs
        self.lengths = [1] * 256   # for each id, how many cells it spans
        for ids, times in pre_tokens.items():
            self.cells += [*ids, GAP]
            self.weights += [times] * len(ids) + [0]
        self.counts = defaultdict(int)
        self.positions = defaultdict(list)  # for each pair, the cells at which it may begin
        for i, pair in enumerate(zip(self.cells, self.cells[1:])):
            if GAP not in pair:
                self.counts[pair] += self.weights[i]
                self.positions[pair].append(i)
        self.heap = [(-count, pair) for pair, count in self.counts.items()]
        heapq.heapify(self.heap)

    def most_frequent(self):
        """Return the most frequent pair, or None if none is left. A tie goes to the lower ids."""
        while self.heap:
            count, pair = heapq.heappop(self.heap)
            current = self.counts[pair]
            if current == -count:
                return pair
            if current > 0:  # merges of other pairs lowered its count since it was pushed
                heapq.heappush(self.heap, (-current, pair))
        return None

    def merge(self, pair, new_id):
        """Replace each occurrence of `pair` by `new_id`, and update the counts around it."""
        a, b = pair
        cells, weights, lengths, counts = self.cells, self.weights, self.lengths, self.counts
        length_a, length_b = lengths[a], lengths[b]
        lengths.append(length_a + length_b)
        new_positions = defaultdict(list)
        for i in self.positions.pop(pair):
            j = i + length_a
            if cells[i] != a or cells[j] != b:  # an earlier merge used one of the two
                continue
            after = j + length_b
            left, right = cells[i - 1], cells[after]
            times = weights[i]
            if left != GAP:
                counts[left, a] -= times
                counts[left, new_id] += times
                new_positions[left, new_id].append(i - lengths[left])
            if right != GAP:
                counts[b, right] -= times
                counts[new_id, right] += times
                new_positions[new_id, right].append(i)
            cells[j - 1] = cells[j] = INSIDE
            cells[i] = cells[after - 1] = new_id  # after INSIDE: these may be cells j - 1 and j
        for new_pair, positions in new_positions.items():
            if counts[new_pair] > 0:
                self.positions[new_pair] = positions
                heapq.heappush(self.heap, (-counts[new_pair], new_pair))


def apply_merges(ids, pair_to_rank, rank_to_id):
    """Encode, and update the ranks instead of looking all up again. The list `ids` is changed."""
    if len(ids) >= 100:
        return apply_merges_long(ids, pair_to_rank, rank_to_id)
    no_rank = len(rank_to_id)
    rank_of = pair_to_rank.get
    ranks = [rank_of(pair, no_rank) for pair in zip(ids, ids[1:])]
    while ranks:
        rank = min(ranks)
        if rank == no_rank:
            break
        i = ranks.index(rank)
        ids[i] = rank_to_id[rank]
        del ids[i + 1], ranks[i]
        if i > 0:
            ranks[i - 1] = rank_of((ids[i - 1], ids[i]), no_rank)
        if i < len(ranks):
            ranks[i] = rank_of((ids[i], ids[i + 1]), no_rank)
    return ids


def apply_merges_long(ids, pair_to_rank, rank_to_id):
    """The same in O(n log n): a heap of pairs, and links from each token to its neighbors.

    A caption may be one word of a million letters, which would take hours in quadratic time.
    """
    end = len(ids)
    following = array("l", range(1, end + 1))
    previous = array("l", range(-1, end - 1))
    heap = []
    for i, pair in enumerate(zip(ids, ids[1:])):
        if pair in pair_to_rank:
            heap.append((pair_to_rank[pair], i))
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = following[i]
        if ids[i] is None or j == end or pair_to_rank.get((ids[i], ids[j])) != rank:
            continue  # an earlier merge used one of the two
        ids[i], ids[j] = rank_to_id[rank], None
        following[i] = following[j]
        if following[i] < end:
            previous[following[i]] = i
        for left, right in ((previous[i], i), (i, following[i])):
            if left >= 0 and right < end and (ids[left], ids[right]) in pair_to_rank:
                heapq.heappush(heap, (pair_to_rank[ids[left], ids[right]], left))
    return [token for token in ids if token is not None]


def show_progress(items, label, progress):
    """Yield `items`. If `progress` is true, print their number to stderr every second."""
    start = printed = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if progress and now - printed > 1:
            printed = now
            line = f"\r{number:,} {label}, {now - start:.0f} s "
            print(line, end="", file=sys.stderr, flush=True)
    if printed > start:
        print(file=sys.stderr)


# ---- files ----

MAX_FILE_BYTES = 1 << 26  # a vocabulary of 200,000 tokens takes 30 MB


@contextlib.contextmanager
def atomic_write(path):
    """Open a binary file that replaces `path` once it is complete and on disk.

    If writing fails, `path` stays as it was. An OSError names `path`. A link stays one: its target
    is replaced, and a pipe or a device never is.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EEXIST, "a folder, pipe or device, not a file", str(path))
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_file(path):
    """The bytes of a file of at most MAX_FILE_BYTES. Raises OSError, or ValueError if it has more.
    """
    check_is_file(path)
    size = os.stat(path).st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: {size:,} bytes, more than the {MAX_FILE_BYTES:,} that such a "
                         "file may have")
    return Path(path).read_bytes()


def check_is_file(path):
    """Raise OSError, or ValueError unless `path` is a regular file.

    A pipe could block, and a device such as /dev/zero has no end.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise ValueError(f"{path}: {kind}, not a file")


def read_json(path):
    """Read a JSON file that holds an object. Raises ValueError with its path if it does not."""
    data = read_file(path)
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_json(data):
    """Parse the bytes or the str of a JSON object, as a dict. Raises ValueError."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        content = json.loads(text)
        escapes = r"\ud" in text or r"\uD" in text
        written = json.dumps(content, ensure_ascii=False) if escapes else ""
    except UnicodeDecodeError:
        raise ValueError("not JSON: not UTF-8") from None
    except RecursionError:
        raise ValueError("not JSON: brackets nest too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except ValueError:
        raise ValueError("not JSON: a number has thousands of digits") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    if SURROGATE.search(written):
        raise ValueError("not JSON: it has half a character, as in \\ud800")
    return content


JSON_TYPES = {dict: "an object", list: "a list", str: "a string", int: "a whole number",
              bool: "true or false"}


def short(value):
    """A value as Python writes it, but at most 60 characters, for errors."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def field(parent, key, kind, where="", optional=False):
    """parent[key] of parsed JSON. Raises ValueError unless its type is `kind`.

    where: what to print before the key, such as "model.". optional: return None if the key is
    missing or null.
    """
    value = parent.get(key)
    if type(value) is kind or (value is None and optional):  # isinstance would take true for 1
        return value
    found = "missing" if value is None else f"{short(value)}, not {JSON_TYPES[kind]}"
    raise ValueError(f"{where}{key} is {found}")


def objects(parent, key, where="", optional=False):
    """parent[key] of parsed JSON, a list of objects. Raises ValueError if it is anything else."""
    values = field(parent, key, list, where, optional) or []
    for value in values:
        if type(value) is not dict:
            raise ValueError(f"{where}{key} holds {short(value)}, which is not an object")
    return values


# ---- tokenizer.json ----

PAD, START, END = SPECIALS = ("[PAD]", "<|startoftext|>", "<|endoftext|>")
BYTE_LEVEL = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "NFC"},
    {"type": "Lowercase"},
    {"type": "Replace", "pattern": {"Regex": r"[\s\x1c-\x1f]+"}, "content": " "},  # as str.split()
    {"type": "Strip", "strip_left": True, "strip_right": True}]}


def build_spec(tokens, merges, specials=SPECIALS, normalizer=NORMALIZER, pre_tokenizer=BYTE_LEVEL,
               suffix=None):
    """The content of a tokenizer.json.

    tokens: the vocabulary in the order of ids. specials: the tokens that follow, whose last two are
    start and end. merges: pairs of tokens. suffix: marks the end of a word, such as CLIP's "</w>".
    """
    vocab = {token: i for i, token in enumerate([*tokens, *specials])}
    added_tokens = [
        {"id": vocab[token], "content": token, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for token in specials]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": suffix, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False, "vocab": vocab, "merges": merges}
    start, end = specials[-2:]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens,
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": BYTE_LEVEL,
        "post_processor": build_template(start, end, vocab), "model": model}


def build_template(start, end, token_to_id):
    """The "post_processor" that puts a start and an end token around a text; either may be None."""
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    before, after = (
        [{"SpecialToken": {"id": token, "type_id": 0}}] if token else [] for token in (start, end))
    return {
        "type": "TemplateProcessing",
        "single": [*before, first, *after],
        "pair": [*before, first, *after, second, *after],
        "special_tokens": {token: {"id": token, "ids": [token_to_id[token]], "tokens": [token]}
                           for token in (start, end) if token}}


def find_special_tokens(spec, config, token_to_id):
    """The names of the start, end and padding token, from config or else from spec.

    A name is None if neither has it.
    """
    start = end = None
    where = "post_processor."
    processor = field(spec, "post_processor", dict, optional=True) or {}
    for part in objects(processor, "processors", where, optional=True) or [processor]:
        if part.get("type") == "TemplateProcessing":
            # [start, text, end], but start or end may be missing. The text gives None.
            template = [
                (field(item, "SpecialToken", dict, where, optional=True) or {}).get("id")
                for item in objects(part, "single", where)]
            start, end = (template[0], template[-1]) if template else (None, None)
        elif "cls" in part:  # RobertaProcessing, as in Hugging Face's copy of OpenAI's CLIP
            start, end = ((field(part, key, list, where) or [None])[0] for key in ("cls", "sep"))
    pad = next((name for name in (PAD, "<pad>", "<|pad|>") if name in token_to_id), None)
    pad = (field(spec, "padding", dict, optional=True) or {}).get("pad_token", pad)
    names = []
    for key, name in (("bos_token", start), ("eos_token", end), ("pad_token", pad)):
        name = config.get(key) or name
        if isinstance(name, dict):
            name = field(name, "content", str, f"{key}.")
        if not isinstance(name, str | None):
            raise ValueError(f"the {key} is {short(name)}, not a string")
        names.append(name)
    return names


def check_special_tokens(names, added_tokens, token_to_id):
    """Raise ValueError when a special token is not in the vocabulary, or an added one not special.
    """
    for name in names:
        if name and name not in token_to_id:
            raise ValueError(f"the special token {short(name)} is not in the vocabulary")
    ordinary = [token["content"] for token in added_tokens
                if not field(token, "special", bool, "added_tokens.")
                and token["content"] not in names]
    if ordinary:
        raise ValueError(f"the added tokens {short(ordinary)} are not special, which is not "
                         "supported")


def set_special_tokens(spec, names, token_to_id):
    """Return `spec` with these names of the start, end and padding token."""
    start, end, pad = names
    found_start, found_end, found_pad = find_special_tokens(spec, {}, token_to_id)
    if (start, end) != (found_start, found_end):
        spec = {**spec, "post_processor": build_template(start, end, token_to_id)}
    if pad != found_pad:
        spec = {**spec, "padding": {
            "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": token_to_id[pad], "pad_type_id": 0, "pad_token": pad}}
    return spec


def read_model(spec):
    """The "model" of a tokenizer.json. Raises ValueError unless it is plain byte-level BPE."""
    model = field(spec, "model", dict)
    check_depth({**spec, "model": {**model, "vocab": None, "merges": None}})
    plain = {"type": "BPE", "dropout": None, "continuing_subword_prefix": "", "fuse_unk": False,
             "byte_fallback": False}
    for key, value in plain.items():
        if (model.get(key) or value) != value:
            raise ValueError(f"the model's {key} is {short(model[key])}: only plain "
                             "byte-level BPE can be read")
    return model


def check_depth(content, levels=32):
    """Raise ValueError when lists and objects nest more than `levels` deep.

    Recursive functions, such as read_normalizer and json.dumps, could fail there.
    """
    if isinstance(content, (list, dict)):
        if levels == 0:
            raise ValueError("brackets nest too deeply")
        for part in content.values() if isinstance(content, dict) else content:
            check_depth(part, levels - 1)


def read_token_ids(vocab, added_tokens):
    """{token: id} of the vocabulary and of the added tokens. Each token has an id of its own.

    Ids may have gaps, but since models have a row for each id, at least half of them are used.
    """
    token_to_id = dict(vocab)
    for token in added_tokens:
        content = field(token, "content", str, "added_tokens.")
        i = field(token, "id", int, "added_tokens.")
        if token_to_id.setdefault(content, i) != i:
            raise ValueError(f"the token {short(content)} has the ids "
                             f"{short(token_to_id[content])} and {short(i)}")
    limit = 2 * len(token_to_id) + 1000
    id_to_token = {}
    for token, i in token_to_id.items():
        if type(i) is not int or not 0 <= i < limit:
            raise ValueError(f"the id of the token {short(token)} is {short(i)}, not "
                             f"a whole number from 0 to {limit - 1:,}")
        if id_to_token.setdefault(i, token) != token:
            raise ValueError(f"the tokens {short(id_to_token[i])} and "
                             f"{short(token)} have the same id, {i}")
    return token_to_id


def read_merges(model, vocab):
    """The merges of a model as ids: [(left, right, merged)].

    Older files write a merge as "a b", newer ones as ["a", "b"].
    """
    merges = []
    for merge in field(model, "merges", list, "model."):
        try:
            a, b = merge.split(" ") if isinstance(merge, str) else merge
            merges.append((vocab[a], vocab[b], vocab[a + b]))
        except (KeyError, ValueError, TypeError):
            raise ValueError(f"model.merges holds {short(merge)}, which is not two tokens "
                             "of the vocabulary that make a third") from None
    return merges


def read_pattern(spec, where, form="{}"):
    """Compile the regular expression of a Replace or a Split. A literal string is escaped."""
    pattern = field(spec, "pattern", dict, where)
    if "Regex" in pattern:
        text = field(pattern, "Regex", str, f"{where}pattern.")
    else:
        text = regex.escape(field(pattern, "String", str, f"{where}pattern."))
    try:
        if len(text) > 10_000:
            raise ValueError
        return regex.compile(form.format(text))
    except Exception:  # the compiler raises errors of many kinds
        raise ValueError(f"{where}pattern is {short(text)}, which is not a regular "
                         "expression that can be read") from None


PATTERN_SECONDS = 2  # for one text; a caption takes less than a millisecond
# Patterns that take linear time on any text: those of CLIP, Llama 3, Qwen 2 and GPT-2.
CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LLAMA_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                 r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LINEAR_PATTERNS = {
    form.format(pattern) for form in ("{}", "({})") for pattern in (
        r"\s+", CLIP_PATTERN, f"(?i){CLIP_PATTERN}", LLAMA_PATTERN,
        LLAMA_PATTERN.replace("{1,3}", ""), PATTERN.pattern)}


def apply_pattern(method, *arguments):
    """Call a method of a compiled pattern, with the text as its last argument.

    Raises ValueError when this takes too long: some patterns take exponential time on some texts.
    """
    pattern, text = method.__self__.pattern, arguments[-1]
    if pattern in LINEAR_PATTERNS:  # without a time limit, which costs as much as a short match
        return method(*arguments)
    seconds = PATTERN_SECONDS + len(text) / 100_000
    try:
        return method(*arguments, timeout=seconds, concurrent=False)
    except (TimeoutError, MemoryError):
        raise ValueError(f"the pattern {short(pattern)} of the tokenizer takes too long on a text "
                         f"of {len(text):,} characters") from None


# How many characters a step of a normalizer can make of one.
GROWTH = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2}


def read_normalizer(spec):
    """A "normalizer" -> functions from a text to a text, to be called in order."""
    steps, growth = [], 1
    for function, factor in read_normalizer_steps(spec):
        steps.append(function)
        growth *= factor
        if growth > 1000 or len(steps) > 64:
            raise ValueError("the normalizer has more than 64 steps, or could make a text over "
                             "1,000 times as long")
    return [*steps, lambda text: SURROGATE.sub("\ufffd", text)]


def read_normalizer_steps(spec):
    """Yield (function from a text to a text, how many times as long the text may become)."""
    where = "normalizer."
    if spec is None:
        return
    kind = field(spec, "type", str, where)
    if spec == NORMALIZER:
        yield lambda text: " ".join(map(normalize_word, text.split())), 6
    elif kind == "Sequence":
        for part in objects(spec, "normalizers", where):
            yield from read_normalizer_steps(part)
    elif kind == "Lowercase":
        yield lower, GROWTH[kind]
    elif kind == "Replace":
        pattern, content = read_pattern(spec, where), field(spec, "content", str, where)
        template = content.replace("\\", r"\\")  # it names no groups
        yield lambda text: apply_pattern(pattern.sub, template, text), len(content) + 1
    elif kind in ("NFC", "NFD", "NFKC", "NFKD"):
        yield lambda text: normalize_unicode(kind, text), GROWTH[kind]
    else:
        raise ValueError(f"the normalizer is {short(kind)}, which cannot be read")


def read_pre_tokenizer(spec):
    """A "pre_tokenizer" -> functions from a text to a list of its parts, to be called in order."""
    where = "pre_tokenizer."
    parts = [spec or {"type": "missing"}]
    if field(parts[0], "type", str, where) == "Sequence":
        parts = objects(spec, "pretokenizers", where) or [{"type": "missing"}]
    *splits, last = parts
    kind = field(last, "type", str, where)
    if kind != "ByteLevel":
        raise ValueError(f"the pre-tokenizer is {short(kind)}, but that of a byte-level BPE "
                         "ends in ByteLevel")
    if len(splits) > 64:
        raise ValueError("the pre-tokenizer has more than 64 steps")
    steps = [read_split(split) for split in splits]
    if field(last, "add_prefix_space", bool, where):
        steps.append(lambda text: [text if text.startswith(" ") else " " + text])
    if field(last, "use_regex", bool, where, optional=True) is not False:
        steps.append(pre_tokenize)
    return steps


def read_split(spec):
    """One Split of a "pre_tokenizer" -> the function from a text to a list of its parts."""
    where = "pre_tokenizer."
    kind = field(spec, "type", str, where)
    if kind != "Split":
        raise ValueError(f"the pre-tokenizer has the part {short(kind)}, which cannot be read")
    behavior = field(spec, "behavior", str, where)
    if behavior not in ("Isolated", "Removed"):
        raise ValueError(f"the pre-tokenizer has a Split with the behavior {short(behavior)}, "
                         "which cannot be read")
    pattern = read_pattern(spec, where, "({})")
    if pattern.groups > 1:
        raise ValueError("the pre-tokenizer has a Split with groups in its pattern, "
                         f"{short(pattern.pattern)}, which cannot be read")
    kept = slice(None)  # pattern.split() returns [gap, match, gap, match, ..., gap]
    if behavior == "Removed":
        kept = slice(1, None, 2) if field(spec, "invert", bool, where) else slice(0, None, 2)
    return lambda text: [part for part in apply_pattern(pattern.split, text)[kept] if part]


# ---- the commands ----

MAX_LINE_BYTES = 100_000_000  # a device such as /dev/zero has a line without end


def not_utf8(content):
    """What to say of bytes that are not UTF-8."""
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "not UTF-8 but UTF-16: save it as UTF-8"
    return "not UTF-8: save it as UTF-8 (Excel writes CP949)"


def read_lines(path):
    """Yield the lines of a text file in UTF-8 or, for "-", of standard input."""
    if ".tar" in Path(path).suffixes:
        raise ValueError(f"{path}: not a text file; to train on shards, use "
                         "`python data.py captions SHARDS | python tokenizer.py train -`")
    file, name = (0, "standard input") if path == "-" else (path, path)
    with open(file, "rb", closefd=file != 0) as lines:
        for number, line in enumerate(iter(partial(lines.readline, MAX_LINE_BYTES), b""), 1):
            if len(line) == MAX_LINE_BYTES:
                raise ValueError(f"{name}, line {number}: longer than {MAX_LINE_BYTES:,} bytes: "
                                 "write one caption per line")
            try:
                text = line.decode()
            except UnicodeDecodeError:
                raise ValueError(f"{name}, line {number}: {not_utf8(line)}") from None
            yield text.removeprefix("\ufeff") if number == 1 else text  # a byte order mark


def train_command(args):
    """Train on text files, save a tokenizer.json, and print each language's bytes per token."""
    start = time.monotonic()
    samples = defaultdict(list)

    def read_texts():
        for number, text in enumerate(chain.from_iterable(map(read_lines, args.inputs))):
            if (number < 10_000 or number % 100 == 0) and not text.isspace():
                language = "Korean" if regex.search(r"\p{Hangul}", text) else "English"
                samples[language].append(text)
            yield text

    folder = Path(args.out).parent
    folder.mkdir(parents=True, exist_ok=True)
    if Path(args.out).is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--out {args.out}: a file cannot be written there")
    tok = Tokenizer.train(read_texts(), args.vocab_size, workers=args.workers)
    if not samples:
        raise ValueError(f"{' '.join(args.inputs)}: no text; give files with one caption per line")
    tok.save(args.out)
    print(f"{args.out}: {len(tok):,} entries in {time.monotonic() - start:.0f} s")
    for language, texts in samples.items():
        size = sum(len(tok.normalize(text).encode()) for text in texts)
        count = sum(map(len, tok.encode_ordinary_batch(texts)))
        print(f"{language}: {size / max(count, 1):.2f} bytes per token, "
              f"in {len(texts):,} of the captions")


def read_ids(text):
    """The ids in a text: "64 265" -> [64, 265]."""
    for word in text.split():
        if not word.isdecimal() or len(word) > 18:
            raise ValueError(f"{short(word)} is not an id, which is a whole number")
    return list(map(int, text.split()))


TRAIN_HELP = """\
Learn a vocabulary from captions and save it as a tokenizer.json in Hugging Face's format. Its
entries are the 256 bytes, merges, and a padding, a start and an end token. Prints the average
number of bytes per token for each language.

  python tokenizer.py train captions.en.txt captions.ko.txt --vocab-size 98000
  python data.py captions SHARDS | python tokenizer.py train -

train_clip.py trains a tokenizer on its captions unless --tokenizer names one."""


def main():
    """Read the command line and run one of the three commands."""
    # Not at the top, so that this file without command.py is a library.
    from command import ArgumentParser, number

    parser = ArgumentParser(
        description="Byte-level BPE: train a tokenizer.json on captions, and use it.",
        epilog="`python tokenizer.py COMMAND --help` explains each command.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="text files to a tokenizer.json", description=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    train.add_argument(
        "inputs", nargs="*", default=["-"], metavar="FILE",
        help="text files in UTF-8, one caption per line; - is standard input (default: -)")
    train.add_argument("--vocab-size", type=number(int, 259), default=98_000, metavar="N",
                       help="number of entries, at least 259 (default: 98000)")
    train.add_argument("--out", default="tokenizer.json", metavar="PATH",
                       help="file to write (default: tokenizer.json)")
    train.add_argument("--workers", type=number(int, 0, 512), default=os.cpu_count(), metavar="N",
                       help="processes that count words (default: the number of cores)")
    encode = commands.add_parser(
        "encode", help="texts to ids",
        description="Print the ids of each text on one line, without start and end token.")
    encode.add_argument("inputs", nargs="*", type=str, default=["-"], metavar="TEXT",
                        help="texts; - is standard input, one text per line (default: -)")
    decode = commands.add_parser(
        "decode", help="ids to text", description="Print the text of ids.")
    decode.add_argument("inputs", nargs="*", type=str, default=["-"], metavar="ID",
                        help="ids; - is standard input, the ids of one text per line (default: -)")
    for command in (encode, decode):
        command.add_argument("--tokenizer", default="tokenizer.json", metavar="PATH",
                             help="file of the tokenizer (default: tokenizer.json)")
    args = parser.parse_args()
    if args.command == "train":
        return train_command(args)
    tok = Tokenizer.load(args.tokenizer)
    from_stdin = args.inputs == ["-"]
    if args.command == "encode":
        for text in read_lines("-") if from_stdin else args.inputs:
            print(*tok.encode_ordinary(text))
    else:
        for ids in read_lines("-") if from_stdin else [" ".join(args.inputs)]:
            print(tok.decode(read_ids(ids)))


if __name__ == "__main__":
    from command import run_command
    run_command(main, output="data")
