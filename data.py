"""Pairs -> batches: one array of all pairs, the order of a run, and the loader.

    python data.py emoji                                # the demo's pairs, into data/emoji
    python data.py index SHARDS...                      # index shards, print what is in them
    python data.py captions SHARDS... --language ko     # one caption per line, for a tokenizer

    pairs = Pairs(["ko-{0000..0099}.tar::ko", "en-*.tar::2::en"])
    loader = Loader(pairs, tokenizer, batch_size=256, padded_size=512, seed=0, workers=8)
    for batch in loader:                                # Batch(images, aspect, tokens, ...)

From top to bottom: `Pairs` is one array of all pairs of all sources. `Order` says which pair is at
which sample index of a run. `Loader` reads, decodes and batches the samples of one process.

Sample index 12345 of a run is the same pair for any number of processes and workers. The position
in a run is therefore one number, and a resumed run starts there.

Not included: shards on other machines, random crops (crops.py), and making shards from images
(extras/pack.py).
"""

import argparse
import collections
import contextlib
import copy
import hashlib
import os
import re
import signal
import sys
import threading
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import demo
from command import ArgumentParser, number, one_line, run_command
from kelip import ceil_div
from shards import (
    APART,
    COUNTRIES,
    CaptionRule,
    Shard,
    are_sound,
    decode,
    expand_pattern,
    format_counts,
    format_cut,
    index_shards,
    index_tar,
    is_language,
    open_image,
    read_pair,
    shard_rows,
)

CHUNK_SAMPLES = 1 << 12          # samples within which every source has its exact proportion
GROUP_SHARDS = 64                # shards that are read interleaved
GROUP_PAIRS = 1 << 20            # a group ends with the shard that reaches this number of pairs
BUFFER_PAIRS = 1 << 16           # pairs of a shuffle buffer, whose order is uniformly random
OPEN_SHARDS = 2 * GROUP_SHARDS   # files that a process keeps open
CACHE_BYTES = 512 << 20          # decoded images are kept if all of them fit, once per worker


# ---- sources and pairs ----

class Source(NamedTuple):
    """One argument of `--data`."""
    name: str
    weight: float     # epochs of this source in one epoch of the run
    rule: CaptionRule
    first_shard: int  # index in Pairs.shards
    shards: int       # number of shards
    pairs: int        # number of pairs

    @property
    def options(self):
        """The weight and the caption rule as text, such as "2.0::ko::ko=title"."""
        fields = ["=".join(field) for field in self.rule.fields]
        options = [str(self.weight), self.rule.language, *fields, "lines" * self.rule.lines]
        return "::".join(filter(None, options))


def parse_source(text):
    """'ko-*.tar::2::ko' -> ('ko-*.tar', 2.0, CaptionRule("ko")).

    Any number of options may follow the pattern, each after two colons: a weight, the language of
    captions whose name has none, `lines` if each line of a .txt is a caption, and LANGUAGE=NAME for
    further captions, which are in KEY.NAME.txt or under NAME in KEY.json. Raises ValueError for
    other options.
    """
    pattern, *options = text.split("::")
    weight, rule = 1.0, CaptionRule()
    for option in options:
        language, _, name = option.partition("=")
        language = language.lower()
        if language in COUNTRIES:
            raise ValueError(f"{text}: {language} is a country; the language is "
                             f"{COUNTRIES[language]}")
        if option == "lines":
            rule = rule._replace(lines=True)
        elif re.fullmatch("[a-zA-Z][-_a-zA-Z0-9]*", language) and name:
            rule = rule._replace(fields=(*rule.fields, (language, name)))
        elif is_language(option) and not rule.language:
            rule = rule._replace(language=language)
        else:
            weight = float(option) if re.fullmatch(r"\d+\.?\d*|\.\d+", option) else 0.0
            if not 0 < weight < 1e6:
                raise ValueError(f"{text}: {option or 'nothing'} after ::, where a weight above 0, "
                                 "a language such as ko, lines, or LANGUAGE=NAME may stand")
    return pattern, weight, rule


class Pairs:
    """All pairs of all sources as one array: len(pairs), pairs[i] -> Pair.

    Args:
        sources: a string or a list of strings. Each is a tar, a folder of tars, a glob or a brace
            range, with options as parse_source takes them: "ko-{00000..07079}.tar::2::ko".
        state: what state() returned when the run began. Every pair then keeps its number, even if
            shards are missing.
        workers: processes that index shards.
        languages: read captions in these languages alone (default: in all).

    Attributes: sources, a list of Source; shards, a list of Shard; starts, int64 [shards + 1], the
    number of each shard's first pair; languages, a Counter of captions; fields, a Counter of other
    texts, which may be captions; skipped, a Counter of what the index skipped, by reason.

    Raises FileNotFoundError when a source names no shards, ValueError when they hold no pairs, or
    no caption in one of `languages`.
    """

    def __init__(self, sources, state=None, workers=0, languages=None):
        sources = [sources] if isinstance(sources, str) else list(sources)
        if state and len(state["shards"]) != len(sources):
            raise ValueError(f"--data: {len(sources)} sources, but the run began with "
                             f"{len(state['shards'])}")
        self.sources, self.shards = [], []
        self.languages, self.skipped, self.fields = (collections.Counter() for _ in range(3))
        for i, text in enumerate(sources):
            pattern, weight, rule = parse_source(text)
            rule = rule._replace(only=tuple(languages or ()))
            names = [x for _, name in rule.fields for x in (f"{name.lower()}.txt", f"{name}.json")]
            paths = expand_pattern(pattern, partial=bool(state))
            shards = index_shards(paths, workers, names)
            if state:
                shards = _match_shards(state["shards"][i], shards)
            count = sum(shard.count for shard in shards)
            source = Source(pattern, weight, rule, len(self.shards), len(shards), count)
            if state and state["options"][i] != source.options:
                raise ValueError(f"--data {text}: the run began with {pattern}::"
                                 f"{state['options'][i]:.100}: set it back to resume, or choose "
                                 "another --out")
            self.sources.append(source)
            self.shards += shards
            found = {name: 0 for _, name in rule.fields}  # pairs that have this field
            for shard in shards:
                self.skipped.update(shard.skipped)
                for language, captions in shard.languages.items():
                    self.languages[language or rule.language] += captions
                fields = dict(shard.fields)
                for language, name in rule.fields:
                    count = fields.pop(f"{name.lower()}.txt", 0) + fields.pop(f"{name}.json", 0)
                    self.languages[language] += count
                    found[name] += count
                self.fields.update(fields)
            for name in found:
                if not found[name] and not state:
                    raise ValueError(f"{text}: no pair has KEY.{name}.txt, or {name} in KEY.json "
                                     "with a text")
        self.languages, self.fields = +self.languages, +self.fields  # without counts of zero
        if languages:
            for language in languages:
                if language not in self.languages:
                    raise ValueError(f"--languages {language}: the captions are "
                                     f"{format_counts(self.languages) or 'none'}")
            self.languages = collections.Counter({x: self.languages[x] for x in languages})
        self.starts = np.cumsum([0] + [shard.count for shard in self.shards])
        self._masks = None  # for one side of split(): for each shard, which of its pairs are here
        self._open = {}  # shard number -> (file, rows), in the order of opening
        if not len(self):
            reasons = format_counts(self.skipped) or "they are empty"
            raise ValueError(f"{' '.join(sources)}: no pairs there ({reasons}){self._hint()}; a "
                             "pair is KEY.jpg and KEY.txt")

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i):
        """Read pair i. Raises ValueError("reason: details") when it cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")  # it also ends `for pair in pairs`
        number = int(np.searchsorted(self.starts, i, "right")) - 1
        if number not in self._open:
            self._open_shard(number)
        file, rows = self._open[number]
        row = rows[i - int(self.starts[number])]
        return read_pair(file, self.shards[number].path, row, self._rule(number))

    def _rule(self, number):
        """The caption rule of the source that a shard belongs to."""
        for source in self.sources:
            if number < source.first_shard + source.shards:
                return source.rule

    def _open_shard(self, number):
        """Open a shard. When too many are open, first close the one that was opened first."""
        shard = self.shards[number]
        if not shard.rows_file:
            raise ValueError(f"{next(iter(shard.skipped))}: {shard.path}")
        try:
            file = open(shard.path, "rb")
        except OSError as error:
            reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            raise ValueError(f"shard {reason}: {shard.path}: {error.strerror}") from None
        if os.fstat(file.fileno()).st_size != shard.size:
            file.close()
            raise ValueError(f"shard changed: {shard.path} was indexed with another size")
        try:
            rows = shard_rows(shard)
            if not are_sound(rows, shard.size):
                print(one_line(f"{shard.rows_file}: damaged; {shard.path} is indexed again"),
                      file=sys.stderr)
                _, rows = index_tar(shard.path)
            if len(rows) != shard.count:
                raise ValueError
        except (OSError, ValueError):
            file.close()
            raise ValueError(f"index damaged: {shard.rows_file}") from None
        if self._masks:
            rows = rows[self._masks[number]]
        if len(self._open) >= OPEN_SHARDS:
            oldest_file, _ = self._open.pop(next(iter(self._open)))
            oldest_file.close()
        self._open[number] = file, rows

    def split(self, fraction, progress=True):
        """Hold out a fraction of the pairs, by their images: (the other pairs, those held out).

        A pair is held out if the SHA-256 of its image, as a number in [0, 1), is below `fraction`.
        So equal images are on the same side, and stay there when shards are reordered or pairs are
        added. Both sides are Pairs. Reads all pairs, and raises ValueError when one cannot be read
        or a side is empty.
        """
        is_held_out = np.zeros(len(self), bool)
        for i in tqdm(range(len(self)), desc="--holdout", unit=" pairs", leave=False, delay=2,
                      disable=None if progress else True):
            digest = hashlib.sha256(self[i].image).digest()
            is_held_out[i] = int.from_bytes(digest[:8], "big") < fraction * 2**64
        if is_held_out.all() or not is_held_out.any():
            raise ValueError(f"--holdout {fraction:g}: holds out {is_held_out.sum():,} of "
                             f"{len(self):,} pairs: choose another fraction, or name test pairs "
                             "with --test")
        return self._part(~is_held_out), self._part(is_held_out)

    def _part(self, mask):
        """The pairs where mask, bool [len(self)], is True, numbered from 0."""
        part = copy.copy(self)
        part._open, part.skipped = {}, collections.Counter()
        part._masks = np.split(mask, self.starts[1:-1])
        part.starts = np.append(0, mask.cumsum())[self.starts]
        part.sources = []
        for source in self.sources:
            first, end = part.starts[[source.first_shard, source.first_shard + source.shards]]
            part.sources.append(source._replace(pairs=int(end - first)))
        return part

    def texts(self):
        """Yield all captions. Pairs that cannot be read are skipped."""
        for i in range(len(self)):
            with contextlib.suppress(ValueError):
                for texts in self[i].captions.values():
                    yield from texts

    def __getstate__(self):
        """What is pickled to worker processes: everything but the open files."""
        return {**self.__dict__, "_open": {}}

    def state(self):
        """What a checkpoint saves: each source's options, and its shards.

        A shard is [file name, bytes, pairs, digest].
        """
        shards = []
        for source in self.sources:
            own = self.shards[source.first_shard:source.first_shard + source.shards]
            shards.append([[os.path.basename(x.path), x.size, x.count, x.digest] for x in own])
        return {"options": [source.options for source in self.sources], "shards": shards}

    def describe(self):
        """Lines of text: one for each source, then one on captions and one on what was skipped."""
        total = sum(source.weight * source.pairs for source in self.sources)
        lines = []
        for source in self.sources:
            percentage = 100 * source.weight * source.pairs / total
            line = (f"{source.name}: {source.pairs:,} pairs in {source.shards:,} shards, "
                    f"{percentage:.1f} % of samples")
            if source.weight != 1:
                line += f" at weight {source.weight:g}"
            lines.append(line)
        if len(self.sources) > OPEN_SHARDS:
            lines.append(f"{len(self.sources):,} sources are read at the same time, which is slow: "
                         "name shards of one kind together, as in 'pairs/*.tar' or "
                         "'pairs/{0001,0003}.tar'")
        lines.append(f"captions: {format_counts(self.languages) or 'none'}")
        unread = {name: count for name, count in self.fields.items() if name.endswith(".txt")}
        if unread:
            name = next(iter(unread)).removesuffix(".txt")
            example = f"{COUNTRIES.get(name, 'LANGUAGE')}={name}"
            lines.append(f"not read as captions: {format_counts(unread)}; to read them, write "
                         f"::{example} after the shards")
        if self.skipped:
            lines.append(f"skipped: {format_counts(self.skipped)}{self._hint()}")
        return "\n".join(map(one_line, lines))

    def require_captions(self, flag):
        """Raise ValueError if no pair has a caption. flag: the one that names the pairs."""
        for source in self.sources:
            own = self.shards[source.first_shard:source.first_shard + source.shards]
            if self.languages and not source.rule.fields and not any(x.languages for x in own):
                raise ValueError(f"{flag} {source.name}: no captions there, though the other "
                                 "sources have some: leave it out")
        if not self.languages:
            # Of images alone, the first pair says why: no caption, bad json, ...
            found = format_counts(self.skipped | self.fields) or ", ".join(self[0].errors)
            raise ValueError(f"{flag} {' '.join(source.name for source in self.sources)}: no "
                             f"captions there ({found}){self._hint()}; a caption is in KEY.txt, "
                             "KEY.ko.txt, or under \"caption\" in KEY.json; others are named as "
                             "SHARDS::LANGUAGE=NAME")

    def _hint(self):
        """How to repack shards in which the members of a pair are apart, if there are any."""
        if not self.skipped[APART]:
            return ""
        return ("; the members of a pair must be next to each other, as `tar --sort=name` packs "
                "them")


def _match_shards(saved, shards):
    """A source's shards as they were when the run began. saved: from Pairs.state().

    A shard that is missing or has changed keeps its pair numbers, but its pairs cannot be read.
    """
    by_name = collections.defaultdict(list)
    for shard in shards:
        by_name[os.path.basename(shard.path)].append(shard)
    matched = []
    for name, size, count, digest in saved:
        shard = by_name[name].pop(0) if by_name[name] else None
        if shard is None:
            shard = Shard(name, size, 0, count, skipped={"shard missing": count}, digest=digest)
        elif (shard.size, shard.count, shard.digest) != (size, count, digest):
            shard = Shard(name, size, 0, count, skipped={"shard changed": count}, digest=digest)
        matched.append(shard)
    return matched


# ---- the order of a run ----
#
# sample index  0         4,096     8,192            samples_per_epoch
# the run       |  chunk  |  chunk  |   ...   |  chunk  |  chunk  |  chunk  |   ...
#               '--------------- epoch 0 ---------------'--------- epoch 1 ...
#
# a chunk       the next samples of every source, in proportion to weight x pairs, shuffled:
#               A A B A B B A A A B A A ...
#
# source A      |  group  |  group  | group |  group  |  group  | group |   ...
#               '------- its epoch 0 -------'------- its epoch 1 -------'
#               Each epoch has every pair once. Its shards are shuffled, then grouped.
#
# a group       64 shards of the source, read interleaved, each from front to back:
#               shard 17   rows  0 1 2 | 3 4 5 | 6 7 8
#               shard  3   rows  0 1   | 2 3   | 4 5
#               shard 88   rows  0 1   | 2 3   | 4
#               buffer           0       1       2
#
# a buffer      the same fraction of every shard, about 65,536 pairs, in random order
#
# Each of these is a pure function of the seed and of its numbers. To find the pair at any sample
# index takes one chunk, and one group of each source. The second number in every random generator's
# seed (0, 1 or 2) keeps the three kinds of shuffles independent.

class Order:
    """Which pair is at which sample index of a run, a pure function of the seed and the index.

    order(first, count) returns the numbers i of `count` pairs, for pairs[i]. The order has no end:
    every samples_per_epoch samples, the next epoch begins. An epoch has each pair of a source of
    weight 1 once.
    """

    def __init__(self, pairs, seed):
        self.seed = seed
        self.streams, samples = [], []
        for source in pairs.sources:
            if source.pairs:
                end = source.first_shard + source.shards
                starts = pairs.starts[source.first_shard:end + 1]
                self.streams.append(SampleStream(starts, seed, len(self.streams)))
                samples.append(max(1, round(source.weight * source.pairs)))
        self.samples_of_source = np.array(samples)                           # [sources], per epoch
        self.samples_per_epoch = sum(samples)
        self.n_chunks = ceil_div(self.samples_per_epoch, CHUNK_SAMPLES)
        self._chunk = LastResult(self._make_chunk)

    def __call__(self, first, count):
        """The numbers of the pairs at sample indices first to first + count - 1: int64 [count]."""
        parts = [np.empty(0, np.int64)]
        while count > 0:
            epoch, sample = divmod(first, self.samples_per_epoch)
            chunk = self._find_chunk(sample)
            begin = sample - int(self._samples_before(chunk).sum())
            part = self._chunk(epoch, chunk)[begin:begin + count]
            parts.append(part)
            first += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def _samples_before(self, chunk):
        """The number of samples of each source before a chunk of an epoch: int64 [sources]."""
        return self.samples_of_source * chunk // self.n_chunks

    def _find_chunk(self, sample):
        """The chunk that a sample of an epoch is in."""
        # _samples_before rounds down, so this estimate may be too low, but never too high.
        chunk = sample * self.n_chunks // self.samples_per_epoch
        while self._samples_before(chunk + 1).sum() <= sample:
            chunk += 1
        return chunk

    def _make_chunk(self, epoch, chunk):
        """The numbers of the pairs of one chunk."""
        before = self._samples_before(chunk)                                 # [sources]
        first = epoch * self.samples_of_source + before                      # [sources]
        counts = self._samples_before(chunk + 1) - before                    # [sources]
        source_of = np.repeat(np.arange(len(self.streams)), counts)          # [samples]
        source_of = np.random.default_rng((self.seed, 0, epoch, chunk)).permutation(source_of)
        numbers = np.empty(len(source_of), np.int64)
        for source, stream in enumerate(self.streams):
            numbers[source_of == source] = stream(int(first[source]), int(counts[source]))
        return numbers


class SampleStream:
    """The samples of one source: its epochs one after the other, every pair once in each.

    starts: int64 [shards + 1], the number of the first pair of each shard of the source, and the
    end of the last one. source: the number of the source.
    """

    def __init__(self, starts, seed, source):
        self.starts, self.seed, self.source = starts, seed, source
        self.counts = np.diff(starts)                                        # [shards], pairs
        self.samples_per_epoch = int(self.counts.sum())
        self._groups = LastResult(self._make_groups)
        self._group = LastResult(self._shuffle_group)

    def __call__(self, first, count):
        """The numbers of the pairs at samples first to first + count - 1: int64 [count]."""
        parts = [np.empty(0, np.int64)]
        while count > 0:
            epoch, sample = divmod(first, self.samples_per_epoch)
            _, group_starts = self._groups(epoch)
            group = int(np.searchsorted(group_starts, sample, "right")) - 1
            begin = sample - group_starts[group]
            part = self._group(epoch, group)[begin:begin + count]
            parts.append(part)
            first += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def _make_groups(self, epoch):
        """The groups of an epoch, lists of shards, and the sample at which each begins."""
        rng = np.random.default_rng((self.seed, 1, self.source, epoch))
        shards = rng.permutation(len(self.counts))
        groups, starts, total = [], [], 0
        for shard, count in zip(shards.tolist(), self.counts[shards].tolist()):
            if not count:
                continue
            if not groups or len(groups[-1]) == GROUP_SHARDS or total - starts[-1] >= GROUP_PAIRS:
                groups.append([])
                starts.append(total)
            groups[-1].append(shard)
            total += count
        return groups, starts

    def _shuffle_group(self, epoch, group):
        """The numbers of the pairs of one group, in the order of the run."""
        shards = np.array(self._groups(epoch)[0][group])                     # [G]
        counts = self.counts[shards]                                         # [G]
        total = int(counts.sum())
        # From here on there is one entry for each pair, shard after shard.
        shard_of = np.repeat(np.arange(len(shards)), counts)                 # [total], in 0..G-1
        first_of_shard = np.cumsum(counts) - counts                          # [G]
        row = np.arange(total) - first_of_shard[shard_of]                    # [total], in its shard
        number = self.starts[shards][shard_of] + row                         # [total]
        # With 5 buffers, the first fifth of every shard goes into buffer 0, and so on.
        n_buffers = ceil_div(total, BUFFER_PAIRS)
        buffer = row * n_buffers // counts[shard_of]                         # [total]
        # Sorting by buffer + a random number in [0, 1) shuffles within each buffer.
        rng = np.random.default_rng((self.seed, 2, self.source, epoch, group))
        order = np.argsort(buffer + rng.random(total), kind="stable")
        return number[order]


class LastResult:
    """A function that keeps its last result, since consecutive batches ask for the same one.

    Unlike functools.lru_cache(1), it can be pickled to worker processes.
    """

    def __init__(self, function):
        self.function, self.arguments, self.result = function, None, None

    def __call__(self, *arguments):
        if arguments != self.arguments:
            self.result = self.function(*arguments)
            self.arguments = arguments
        return self.result


def duplicate_captions(pairs, seed, batch_size, samples=1024):
    """The fraction of a batch's captions that are equal to an earlier one, on average.

    Looks at the first caption of each pair in each language, in the batches of the first `samples`
    samples, or in the first batch if it is larger. A batch that ends in another epoch than it
    begins in may have a pair twice.
    """
    order, total, duplicates = Order(pairs, seed), 0, 0
    for batch in range(max(1, samples // batch_size)):
        captions = []
        for i in order(batch * batch_size, batch_size).tolist():
            with contextlib.suppress(ValueError):
                captions += [(language, texts[0]) for language, texts in pairs[i].captions.items()]
        total += len(captions)
        duplicates += len(captions) - len(set(captions))
    return duplicates / max(1, total)


# ---- batches ----

class Batch(NamedTuple):
    """One process's part of a batch: n samples, with C captions each (Loader.captions_per_pair).

    Each image is in the upper left corner of its padded square, and its longer side is S. A sample
    is invalid if its pair was skipped or it comes after the end; its image is black. Captions of
    invalid samples, and those that a pair does not have, are empty.
    """
    images: torch.Tensor        # uint8 [n, 3, S, S], channels last in memory
    aspect: torch.Tensor        # float32 [n], width / height of each image
    tokens: object              # int64 [n, C, context_length], None without a tokenizer
    language: object            # int64 [n, C], index in Loader.languages, -1 for none; or None
    valid: torch.Tensor         # bool [n]
    sample_index: torch.Tensor  # int64 [n]


def random_fraction(seed, sample_index):
    """A random number in [0, 1) for each sample index, float64 [n], by splitmix64.

    It depends on seed and index alone (Steele et al., Fast Splittable Pseudorandom Number
    Generators, 2014). crops.uniform is the same in torch, for crops.
    """
    x = np.asarray(sample_index, np.uint64)
    x = x + np.uint64((seed * 0x9E3779B97F4A7C15) % (1 << 64))
    for _ in range(2):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(11)).astype(np.float64) / (1 << 53)


def fitted_size(aspect, padded_size):
    """(width, height) of an image whose longer side is padded_size. aspect: width / height."""
    width = max(1, min(padded_size, round(padded_size * aspect)))
    height = max(1, min(padded_size, round(padded_size / aspect)))
    return width, height


def resize_to_fit(image, padded_size):
    """Resize a PIL image in RGB so that its longer side is padded_size: uint8 [h, w, 3]."""
    pixels = np.array(image)                                                 # [H, W, 3]
    # float32 like Batch.aspect, from which the crops compute the same size.
    width, height = fitted_size(float(np.float32(image.width / image.height)), padded_size)
    if (width, height) == image.size:
        return pixels
    pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None]                 # [1, 3, H, W]
    pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()                                # [h, w, 3]


def fit_padded_size(padded_size, pairs, samples=256):
    """padded_size, or less if the images are smaller: a larger square would show no more detail.

    pairs: Pairs. Looks at `samples` of their images, evenly spaced, and takes the longer side that
    99 % of them do not exceed.
    """
    sides = []
    for i in np.linspace(0, len(pairs) - 1, min(samples, len(pairs))).astype(int).tolist():
        with contextlib.suppress(Exception):  # the loader skips and counts what is broken
            sides.append(max(open_image(pairs[i].image).size))
    if not sides:
        return padded_size
    return min(padded_size, int(np.quantile(sides, 0.99, method="lower")))


class Loader:
    """The batches of one process, in order: for batch in loader.

    Args:
        pairs: Pairs.
        tokenizer: anything with encode(texts, context_length) -> int64 [N, context_length], or None
            for images alone.
        batch_size: that of all processes together.
        padded_size: the side in pixels of the square that each image is padded to.
        seed: decides the order, and which captions are drawn from a pair with more than
            captions_per_pair: each of its languages is equally likely, and then each of the
            captions in it.
        first: the sample index to begin at, that is, the number of samples used before.
        steps: the number of batches. By default, they reach to the end of the first epoch, and
            samples of the last batch after that end are invalid.
        rank, world_size: which part of each batch to make.
        workers: processes that read and decode, 0 for none.
        context_length: tokens of a caption.
        pin_memory: put batches into memory that is copied to a GPU faster.

    A pair that cannot be read becomes an invalid sample. `skipped` counts them by reason;
    `examples` has the first of each reason. `languages` is the list that Batch.language refers to.
    `captions_per_pair` is the number of languages in which an average pair has captions, rounded.
    Those of one sample are in different languages, in the order of `languages`.

    If all decoded images fit into CACHE_BYTES, once per worker, they are kept. Raises ValueError
    when batch_size is not divisible by world_size, OSError when workers keep dying.
    """

    def __init__(self, pairs, tokenizer, batch_size, padded_size, seed=0, first=0, steps=None,
                 rank=0, world_size=1, workers=0, context_length=77, pin_memory=False):
        if batch_size % world_size:
            raise ValueError(f"--batch-size {batch_size}: not divisible by {world_size} processes")
        self.pairs, self.tokenizer, self.context_length = pairs, tokenizer, context_length
        self.padded_size, self.seed = padded_size, seed
        self.batch_size, self.local_batch_size = batch_size, batch_size // world_size
        self.rank, self.workers, self.pin_memory = rank, workers, pin_memory
        self.order = Order(pairs, seed)
        self.first, self.steps = first, steps  # samples from self.end on are invalid
        if steps is None:
            self.end = self.order.samples_per_epoch
            self.steps = ceil_div(max(0, self.end - first), batch_size)
        else:
            self.end = first + steps * batch_size
        named = {language for source in pairs.sources for language, _ in source.rule.fields}
        self.languages = sorted({*pairs.languages, *named})
        # Pairs whose captions languages counts: not those of shards that are missing.
        indexed = sum(shard.count for shard in pairs.shards if shard.rows_file)
        self.captions_per_pair = max(1, round(sum(pairs.languages.values()) / max(1, indexed)))
        self.skipped, self.examples = collections.Counter(), {}
        self.cut, self.longest = 0, ""  # captions that were cut, and the longest of them
        image_bytes = 3 * padded_size * padded_size
        self._may_cache = len(pairs) * image_bytes * max(1, workers) <= CACHE_BYTES
        self._cache = {}  # pair number -> what _prepare returns

    def __len__(self):
        return self.steps

    def __iter__(self):
        """Yield each Batch. When a worker dies, new ones continue after the last batch."""
        done = deaths = 0
        while done < self.steps:
            try:
                for batch, skipped, cut in self._batches(done):
                    done += 1
                    deaths = 0
                    self.cut += len(cut)
                    self.longest = max([self.longest, *cut], key=len)
                    for reason, example in skipped:
                        self.skipped[reason] += 1
                        self.examples.setdefault(reason, example)
                    yield batch
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                if not self.workers or not _is_worker_death(error):
                    raise
                deaths += 1
                if deaths == 3:
                    raise OSError(f"loader workers died {deaths} times before batch {done}: is "
                                  "memory short? Try fewer --workers") from None
                print(f"a loader worker died before batch {done}; starting new workers",
                      file=sys.stderr)

    def _batches(self, first_step):
        """An iterator over make_batch(step) from first_step on, by worker processes if any."""
        handler = signal.getsignal(signal.SIGCHLD)
        # The "dataset" of torch's loader is the range of steps. Without a generator, the loader
        # would draw from torch's global one.
        batches = iter(torch.utils.data.DataLoader(
            range(first_step, self.steps), batch_size=None, collate_fn=self.make_batch,
            num_workers=self.workers, pin_memory=self.pin_memory, generator=torch.Generator(),
            worker_init_fn=_exit_on_sigterm))
        if self.workers and threading.current_thread() is threading.main_thread():
            # torch's handler would raise in the middle of a training step. Without it, next()
            # still notices that a worker died.
            signal.signal(signal.SIGCHLD, handler)
        return batches

    def make_batch(self, step):
        """This process's part of one batch.

        Returns (Batch, [(reason, example) of each skipped pair], [captions that were cut]).
        """
        n, size, C = self.local_batch_size, self.padded_size, self.captions_per_pair
        first = self.first + step * self.batch_size + self.rank * n
        sample_index = np.arange(first, first + n)
        # In numpy, since writing single elements of tensors is slow.
        images = np.zeros((n, size, size, 3), np.uint8)
        aspect = np.ones(n, np.float32)
        valid = np.zeros(n, bool)
        language = np.full((n, C), -1)
        tokens = None
        if self.tokenizer is not None:
            tokens = self.tokenizer.encode([""], self.context_length).repeat(n, C, 1)
        fraction = random_fraction(self.seed, sample_index)
        numbers = self.order(first, min(n, max(0, self.end - first)))
        skipped, cut = [], []
        for i, pair_number in enumerate(numbers.tolist()):
            try:
                pixels, image_aspect, captions = self._prepare(pair_number)
            except ValueError as error:
                reason, _, example = str(error).partition(": ")
                skipped.append((reason, example))
                continue
            height, width, _ = pixels.shape
            images[i, :height, :width] = pixels
            aspect[i] = image_aspect
            valid[i] = True
            if self.tokenizer is not None:
                start, choice = divmod(fraction[i] * len(captions), 1)
                # C of the languages: the one at `start`, and those after it, in a circle.
                chosen = {(int(start) + c) % len(captions) for c in range(C)}
                for c, position in enumerate(sorted(chosen)):
                    language[i, c], choices, cut_texts = captions[position]
                    row = int(choice * len(choices))
                    tokens[i, c] = choices[row]
                    if row in cut_texts:
                        cut.append(cut_texts[row])
        images, aspect, language, valid, sample_index = (
            torch.from_numpy(x) for x in (images, aspect, language, valid, sample_index))
        images = images.permute(0, 3, 1, 2)                                  # [n, 3, S, S]
        if self.tokenizer is None:
            language = None
        return Batch(images, aspect, tokens, language, valid, sample_index), skipped, cut

    def _prepare(self, number):
        """Read and decode a pair: (uint8 [h, w, 3], width / height, captions).

        captions: for each language, (its index in self.languages, int64 [captions, L], {row: text}
        of captions that were cut). The index is len(self.languages) for a language that the shards'
        index did not have. Raises ValueError("reason: details").
        """
        if number in self._cache:
            return self._cache[number]
        pair = self.pairs[number]
        captions = []
        if self.tokenizer is not None:
            if not pair.captions:
                raise ValueError(f"{pair.errors[0]}: pair {pair.key}")
            number_of = {language: i for i, language in enumerate(self.languages)}
            for language, texts in sorted(pair.captions.items()):
                tokens = self.tokenizer.encode(texts, self.context_length)
                cut = getattr(self.tokenizer, "cut", {})  # other tokenizers may not have it
                captions.append((number_of.get(language, len(number_of)), tokens, cut))
        try:
            image = decode(pair.image, min_side=self.padded_size)
        except ValueError as error:
            raise ValueError(f"{error} (pair {pair.key})") from None
        pixels = resize_to_fit(image, self.padded_size)
        prepared = pixels, image.width / image.height, captions
        if self._may_cache:
            self._cache[number] = prepared
        return prepared

    def report(self):
        """A line on the pairs skipped so far, and on the captions that were cut."""
        text = format_skipped(self.skipped, self.examples)
        if self.cut:
            text += f"; {format_cut(self.cut, self.longest)}"
        return one_line(text)


def format_skipped(skipped, examples):
    """Say how many pairs were skipped for each reason, with the first example of each."""
    if not skipped:
        return "no pair was skipped"
    reasons = ", ".join(f"{count:,} {reason} (first: {examples[reason]})"
                        for reason, count in skipped.most_common())
    return f"skipped {sum(skipped.values()):,} pairs: {reasons}"


def _exit_on_sigterm(worker):
    """Let a worker that is ended by SIGTERM delete its temporary folder, which has a socket.

    torch's own handler would end it at once. torchrun, and a process that fails, send this signal.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())


def _is_worker_death(error):
    """Whether an error of torch's DataLoader means that a worker process died."""
    if "Caught" in str(error):  # "Caught ... in DataLoader worker": an error that a worker raised
        return False
    return not isinstance(error, RuntimeError) or "DataLoader worker" in str(error)


# ---- the command ----

def print_captions(sources, languages=None, workers=0):
    """Print every caption of the sources, cleaned, one per line, in the order of the shards.

    languages: those to print, all by default.
    """
    pairs = Pairs(sources, workers=workers)
    for language in languages or ():
        if language not in pairs.languages:
            raise ValueError(f"--language {language}: the captions are "
                             f"{format_counts(pairs.languages)}")
    skipped = collections.Counter()
    # disable=None: no progress bar if stderr is not a terminal.
    for i in tqdm(range(len(pairs)), desc="captions", unit=" pairs", disable=None):
        try:
            pair = pairs[i]
        except ValueError as error:
            skipped[str(error).partition(": ")[0]] += 1
            continue
        skipped.update(pair.errors)
        for language, texts in pair.captions.items():
            if not languages or language in languages:
                print(*texts, sep="\n")
    if skipped:
        print(f"skipped: {format_counts(skipped)}", file=sys.stderr)


def main(argv=None):
    """The command: emoji, index or captions."""
    parser = ArgumentParser(
        description="Pack the demo's pairs, index shards, or print the captions in shards.\n\n"
                    + "\n".join(__doc__.splitlines()[2:5]),
        epilog="To make shards from images, or to check shards: python -m extras.pack --help",
        fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    emoji = commands.add_parser(
        "emoji", help="pack the demo's pairs",
        description="Pack the demo's pairs: emoji by seven vendors, with their names in English "
                    "and Korean. One vendor is the test.")
    emoji.add_argument("--out", default=demo.DEMO, metavar="FOLDER",
                       help="folder for the shards (default: %(default)s)")
    emoji.add_argument("--test", default=demo.TEST, metavar="VENDOR",
                       help="vendor whose drawings are the test (default: %(default)s, which is "
                            "never trained on)")
    index = commands.add_parser(
        "index", help="index shards, and print what is in them",
        description="Index shards, and print the number of pairs, captions by language, and what "
                    "is skipped. A run does this itself; for many shards, do it once before.")
    captions = commands.add_parser(
        "captions", help="print the captions, one per line",
        description="Print the captions, cleaned as in training, one per line: python data.py "
                    "captions SHARDS | python tokenizer.py train -")
    for command in (index, captions):
        command.add_argument("sources", nargs="+", metavar="SHARDS",
                             help="tars, folders, globs or brace ranges; ::WEIGHT, ::LANGUAGE and "
                                  "the other options of docs/data.md may follow each; @LIST is "
                                  "a text file of these, one a line")
        command.add_argument("--workers", type=number(int, 0, 512), default=os.cpu_count(),
                             metavar="N",
                             help="processes that index shards (default: the number of cores)")
    captions.add_argument("--language", nargs="+", metavar="LANGUAGE",
                          help="print only captions in these languages, such as en ko")
    args = parser.parse_args(argv)
    if args.command == "emoji":
        demo.pack_emoji(args.out, args.test)
    elif args.command == "index":
        print(Pairs(args.sources, workers=args.workers).describe())
    else:
        print_captions(args.sources, args.language, args.workers)


if __name__ == "__main__":
    run_command(main, output="data")
