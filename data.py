"""Pairs -> batches: one long array of all pairs, the order of a run, and the loader.

    python data.py emoji                            the demo's pairs, into data/emoji
    python data.py pack OUT FOLDER_or_TABLE...      shards from folders of pictures or from tables
    python data.py index SHARDS...                  where each pair lies, written once for all runs
    python data.py check SHARDS...                  read everything, report what is there and what is bad

From top to bottom: `Pairs` makes one long array of all shards of all sources; `Order` says which pair stands in
which slot of a run; `Loader` reads, decodes and batches the slots of one rank. Whatever the ranks and workers,
slot 12345 of a run holds the same pair, so that a position in the run is one number and resuming is starting
there.

What it leaves out: shards on other machines (copy them, or fetch whole ones ahead of `Order`) and crops (crops.py).
"""

import argparse
import collections
import os
import signal
import sys
import threading
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import demo
from extras import pack as packing
from shards import LANGUAGE, Shard, decode, expand, index, read_pair, shard_rows

BAND_SHARDS = 64                 # shards that are read side by side
BAND_ROWS = 1 << 20              # and no more pairs than this, give or take a shard
WINDOW = 1 << 16                 # pairs among which the order is a wholly random one
MIX = 1 << 12                    # slots in which every source has its exact share
OPEN_SHARDS = 2 * BAND_SHARDS    # files that a process holds open
CACHE = 512 << 20                # bytes of decoded pictures that a process keeps, when all of them fit


# --- Sources and pairs --------------------------------------------------------------------------------------

class Source(NamedTuple):
    """One `--data` argument."""
    name: str
    weight: float    # passes over it in an epoch
    language: str    # of captions that name none
    first: int       # number of its first shard
    shards: int
    pairs: int


def _parse_source(text):
    """'ko-*.tar::2::ko' -> ('ko-*.tar', 2.0, 'ko')."""
    pattern, *options = text.split("::")
    weight, language = 1.0, ""
    for option in options:
        if LANGUAGE.fullmatch(option):
            language = option
            continue
        try:
            weight = float(option)
        except ValueError:
            weight = 0.0
        if not 0 < weight < 1e6:
            raise ValueError(f"--data {text}: after :: comes a weight above 0 or a language such as ko")
    return pattern, weight, language


class Pairs:
    """All pairs of all sources, counted and addressable: len(pairs), pairs[i] -> Pair.

    sources: one or a list of strings, each a tar, a folder of tars, a glob or a brace range, with an optional
    weight and an optional language for captions that name none: "ko-{00000..07079}.tar::2::ko". state: what
    `state()` gave when the run began, so that on resuming every pair has its old number, whatever became of
    the shards since. Travels to worker processes at little cost. Raises FileNotFoundError when a source names
    no shards and ValueError when there is no pair in any of them.
    """

    def __init__(self, sources, state=None, workers=0):
        self.sources, self.shards = [], []
        sources = [sources] if isinstance(sources, str) else list(sources)
        if state and len(state["shards"]) != len(sources):
            raise ValueError(f"--data: {len(sources)} sources, but the run began with {len(state['shards'])}")
        for number, text in enumerate(sources):
            pattern, weight, language = _parse_source(text)
            shards = index(expand(pattern, partial=bool(state)), workers)
            if state:
                shards = _as_they_were(state["shards"][number], shards)
            count = sum(shard.count for shard in shards)
            self.sources.append(Source(pattern, weight, language, len(self.shards), len(shards), count))
            self.shards += shards
        self.starts = np.cumsum([0] + [shard.count for shard in self.shards])
        self.languages, self.left_out = collections.Counter(), collections.Counter()
        for source in self.sources:
            for shard in self.shards[source.first:source.first + source.shards]:
                self.left_out.update(shard.left_out)
                self.languages.update({lang or source.language: n for lang, n in shard.languages.items()})
        if not len(self):
            causes = ", ".join(f"{n} {cause}" for cause, n in self.left_out.items()) or "they are empty"
            raise ValueError(f"{' '.join(sources)}: no pairs there ({causes}); a pair is KEY.jpg and KEY.txt")
        self._open = {}

    def __len__(self):
        """Pairs in all sources."""
        return int(self.starts[-1])

    def __getstate__(self):
        """Without open files, for another process."""
        return {**self.__dict__, "_open": {}}

    def state(self):
        """What a checkpoint needs for `state`: each source's shards as [file name, bytes, pairs]."""
        spans = [self.shards[s.first:s.first + s.shards] for s in self.sources]
        return {"shards": [[[os.path.basename(x.path), x.size, x.count] for x in span] for span in spans]}

    def __getitem__(self, i):
        """Read pair i. Raises IndexError, or ValueError("cause: what") when it cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        number = int(np.searchsorted(self.starts, i, "right")) - 1
        shard = self.shards[number]
        file, rows = self._open.get(number) or self._open_shard(number)
        return read_pair(file, shard.path, rows[i - int(self.starts[number])], self._language(number))

    def _language(self, shard):
        """The language of captions that name none, by shard."""
        return next(s.language for s in self.sources if s.first <= shard < s.first + s.shards)

    def _open_shard(self, number):
        """Open a shard that still is what the index says, and close the one that was opened longest ago."""
        shard = self.shards[number]
        if shard.rows is None:
            raise ValueError(f"{next(iter(shard.left_out))}: {shard.path}")
        try:
            file = open(shard.path, "rb")
        except OSError as error:
            cause = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
            raise ValueError(f"shard {cause}: {shard.path}: {error.strerror}") from None
        if os.fstat(file.fileno()).st_size != shard.size:
            file.close()
            raise ValueError(f"shard changed: {shard.path} is not of the size that was indexed")
        if len(self._open) >= OPEN_SHARDS:
            self._open.pop(next(iter(self._open)))[0].close()
        try:
            self._open[number] = file, shard_rows(shard)
        except (OSError, ValueError):
            raise ValueError(f"index damaged: {shard.rows}") from None
        return self._open[number]

    def describe(self):
        """The mix, a line a source: pairs, shards, share; then the languages and what is left out."""
        total = sum(s.weight * s.pairs for s in self.sources)
        lines = []
        for s in self.sources:
            share = f"{100 * s.weight * s.pairs / total:.1f} %" + f" at weight {s.weight:g}" * (s.weight != 1)
            lines.append(f"{s.name}: {s.pairs:,} pairs in {s.shards:,} shards, {share}")
        for title, counts in (("captions", self.languages), ("left out", self.left_out)):
            if counts:
                listed = ", ".join(f"{n:,} {name or 'unnamed'}" for name, n in sorted(counts.items()))
                lines.append(f"{title}: {listed}")
        return "\n".join(lines)


def _as_they_were(old, shards):
    """A source's shards as a run began with them; what is gone or changed keeps its places, empty."""
    now = collections.defaultdict(list)
    for shard in shards:
        now[os.path.basename(shard.path)].append(shard)
    result = []
    for name, size, count in old:
        shard = now[name].pop(0) if now[name] else None
        if shard is None or (shard.size, shard.count) != (size, count):
            cause = "shard missing" if shard is None else "shard changed"
            shard = Shard(name, size, 0, count, {}, {cause: count})
        result.append(shard)
    return result


# --- Order --------------------------------------------------------------------------------------------------

class Order:
    """Which pair stands in which slot of a run: a function of the seed and the slot alone.

    A run is an endless row of slots, `slots_per_epoch` to an epoch. Each source is gone through in passes,
    every pair once in each: its shards, shuffled, are cut into bands of 64, a band's shards are read side by
    side from front to back, and within a window of 65,536 pairs of a band the order is wholly random. Sources
    take turns in proportion to weight x pairs, exactly so over every 4,096 slots or so. To fetch shards
    ahead, `_bands` says all that is needed.
    """

    def __init__(self, pairs, seed):
        self.seed, self.recent = seed, {}
        self.sources = [source for source in pairs.sources if source.pairs]
        self.counts = np.diff(pairs.starts)
        self.starts = pairs.starts
        self.share = np.array([max(1, round(source.weight * source.pairs)) for source in self.sources])
        self.slots_per_epoch = int(self.share.sum())
        self.windows = -(-self.slots_per_epoch // MIX)

    def __call__(self, first, count):
        """The pair numbers of slots first .. first + count - 1, int64 [count]."""
        parts = [np.empty(0, np.int64)]
        while count > 0:
            epoch, place = divmod(first, self.slots_per_epoch)
            window = place * self.windows // self.slots_per_epoch
            while self._taken(window + 1).sum() <= place:
                window += 1
            numbers = self._latest(self._mix, 0, epoch, window)
            begin = place - int(self._taken(window).sum())
            parts.append(numbers[begin:begin + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def _latest(self, function, source, *place):
        """function(source, *place), remembered until it is asked for another place."""
        kept = self.recent.get((function.__name__, source))
        if kept is None or kept[0] != place:
            kept = self.recent[function.__name__, source] = place, function(source, *place)
        return kept[1]

    def _taken(self, window):
        """How far each source is at the beginning of a window of an epoch, int64 [sources]."""
        return self.share * window // self.windows

    def _mix(self, _, epoch, window):
        """The pair numbers of one window of an epoch: the sources' next pairs, in random turns."""
        low, high = (epoch * self.share + self._taken(window + i) for i in (0, 1))
        turns = np.repeat(np.arange(len(self.sources)), high - low)
        turns = np.random.default_rng((self.seed, 0, epoch, window)).permutation(turns)
        numbers = np.empty(len(turns), np.int64)
        for source in range(len(self.sources)):
            numbers[turns == source] = self._stream(source, int(low[source]), int(high[source]))
        return numbers

    def _stream(self, source, low, high):
        """Entries low .. high - 1 of a source's passes, one behind the other."""
        parts = [np.empty(0, np.int64)]
        while low < high:
            turn, place = divmod(low, self.sources[source].pairs)
            bands, starts = self._latest(self._bands, source, turn)
            band = int(np.searchsorted(starts, place, "right")) - 1
            numbers = self._latest(self._band, source, turn, band)
            place -= int(starts[band])
            parts.append(numbers[place:place + high - low])
            low += len(parts[-1])
        return np.concatenate(parts)

    def _bands(self, source, turn):
        """A pass's bands, arrays of shard numbers as they are read, and where in the pass each begins."""
        span = self.sources[source]
        shards = np.random.default_rng((self.seed, 1, source, turn)).permutation(span.shards) + span.first
        shards = shards[self.counts[shards] > 0]
        cuts, rows, width = [0], 0, 0
        for i, count in enumerate(self.counts[shards].tolist()):
            if width == BAND_SHARDS or rows >= BAND_ROWS:
                cuts.append(i)
                rows, width = 0, 0
            rows, width = rows + count, width + 1
        ends = np.concatenate([[0], np.cumsum(self.counts[shards])])
        return np.split(shards, cuts[1:]), ends[cuts]

    def _band(self, source, turn, band):
        """The pair numbers of one band in the order of reading."""
        shards = self._latest(self._bands, source, turn)[0][band]
        counts = self.counts[shards]
        total = int(counts.sum())
        row = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)        # place within its shard
        window = row * -(-total // WINDOW) // np.repeat(counts, counts)
        chance = np.random.default_rng((self.seed, 2, source, turn, band)).random(total)
        return (np.repeat(self.starts[shards], counts) + row)[np.argsort(window + chance, kind="stable")]


# --- Batches ------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """One rank's part of a batch. A hole (valid False) has a black picture and an empty caption."""
    images: torch.Tensor    # uint8 [n, 3, S, S], each in the upper left corner, channels last in memory
    aspect: torch.Tensor    # float32 [n], width / height of each, whose longer side is S
    tokens: object          # int64 [n, context_length], None without a tokenizer
    language: object        # int64 [n], which of loader.languages, -1 in a hole; None without a tokenizer
    valid: torch.Tensor     # bool [n]
    slots: torch.Tensor     # int64 [n]


def _draw(seed, slots):
    """A number in [0, 1) for each slot, float64 [n]: splitmix64 (Steele et al., 2014) of both."""
    x = np.asarray(slots, np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15) % (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)) * 2:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x >> np.uint64(11)).astype(np.float64) / (1 << 53)


def extent(aspect, canvas):
    """Width and height in pixels of a picture that fills a square canvas in its longer side."""
    return (max(1, min(canvas, round(canvas * aspect))), max(1, min(canvas, round(canvas / aspect))))


def fit(image, canvas):
    """A PIL image in RGB as uint8 [h, w, 3], antialiased bicubic, its longer side as long as the canvas."""
    size = extent(float(np.float32(image.width / image.height)), canvas)
    pixels = np.asarray(image)
    if size == image.size:
        return pixels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these pixels cannot be written, nor are they
        pixels = torch.from_numpy(pixels).permute(2, 0, 1)[None]                         # [1, 3, H, W]
    pixels = F.interpolate(pixels, size[::-1], mode="bicubic", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


class Loader:
    """The batches of one rank, in order: for batch in loader.

    pairs: Pairs; tokenizer: anything with encode(texts, context_length) -> int64 [N, context_length], or None
    when pictures alone are wanted; batch_size: of all ranks together; canvas: side of the pictures in pixels;
    seed: of order and languages; start: slots consumed before, wherever that was; steps: batches to make, by
    default to `stop`, a slot number, by default the first epoch's end: a last batch that would go beyond it
    has holes there. rank, world_size: which part of each batch. workers: processes that decode, 0 for none.

    A pair that cannot be read is a hole, and counted in `skipped` by cause. Small sets are decoded once and
    kept. Raises ValueError when the ranks do not divide the batch, and OSError when workers keep dying.
    """

    def __init__(self, pairs, tokenizer, batch_size, canvas, seed=0, start=0, steps=None, stop=None, rank=0,
                 world_size=1, workers=0, context_length=77, pin_memory=False):
        if batch_size % world_size:
            raise ValueError(f"--batch-size {batch_size} does not divide by {world_size} processes")
        self.pairs, self.tokenizer, self.context_length = pairs, tokenizer, context_length
        self.batch_size, self.canvas, self.seed, self.start = batch_size, canvas, seed, start
        self.rank, self.local = rank, batch_size // world_size
        self.workers, self.pin_memory = workers, pin_memory
        self.order = Order(pairs, seed)
        if stop is None:
            stop = self.order.slots_per_epoch if steps is None else start + steps * batch_size
        self.stop, self.steps = stop, -(-max(0, stop - start) // batch_size) if steps is None else steps
        self.languages = sorted(pairs.languages)
        self.skipped, self.examples = collections.Counter(), {}
        fits = len(pairs) * 3 * canvas * canvas * max(1, workers) <= CACHE
        self._kept = {} if fits else None

    def __len__(self):
        """Batches in all."""
        return self.steps

    def __iter__(self):
        """Yield Batch after Batch. Workers that die are started anew where the last batch ended."""
        done = deaths = 0
        while done < self.steps:
            try:
                for batch, faults in self._batches(done):
                    done, deaths = done + 1, 0
                    for cause, what in faults:
                        self.skipped[cause] += 1
                        self.examples.setdefault(cause, what)
                    yield batch
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                gone = not isinstance(error, RuntimeError) or "DataLoader worker" in str(error)
                if not self.workers or not gone or "Caught" in str(error):  # what a worker itself raised
                    raise
                deaths += 1
                if deaths == 3:
                    raise OSError(f"loader workers died {deaths} times before batch {done}: is memory short? "
                                  f"try fewer --workers") from None
                print(f"a loader worker died before batch {done}; starting workers anew", file=sys.stderr)

    def _batches(self, done):
        """What self[done], self[done + 1], ... give, from workers when there are any."""
        if not self.workers:
            return map(self.__getitem__, range(done, self.steps))
        handler = signal.getsignal(signal.SIGCHLD)
        batches = iter(torch.utils.data.DataLoader(
            self, batch_size=None, sampler=range(done, self.steps), num_workers=self.workers,
            pin_memory=self.pin_memory))
        if threading.current_thread() is threading.main_thread():
            # torch's handler would raise in the middle of a training step; next() notices the dead as well
            signal.signal(signal.SIGCHLD, handler)
        return batches

    def __getitem__(self, step):
        """Make this rank's part of one batch: (Batch, [(cause, example) of each skipped pair])."""
        first = self.start + step * self.batch_size + self.rank * self.local
        slots = np.arange(first, first + self.local)
        numbers = self.order(first, min(self.local, max(0, self.stop - first)))
        images = np.empty((self.local, self.canvas, self.canvas, 3), np.uint8)
        aspect, valid = np.ones(self.local, np.float32), np.zeros(self.local, bool)
        language, draws = np.full(self.local, -1), _draw(self.seed, slots)
        tokens = self.tokenizer and self.tokenizer.encode([""], self.context_length).repeat(self.local, 1)
        faults = []
        for i, number in enumerate(numbers.tolist()):
            try:
                pixels, aspect[i], captions = self._prepare(number)
            except ValueError as error:
                cause, _, what = str(error).partition(": ")
                faults.append((cause, what))
                continue
            h, w, _ = pixels.shape
            images[i, :h, :w], images[i, h:], images[i, :h, w:] = pixels, 0, 0
            valid[i] = True
            if self.tokenizer:
                language[i], tokens[i] = captions[int(draws[i] * len(captions))]
        images[~valid] = 0
        named = self.tokenizer and torch.from_numpy(language)
        return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(aspect), tokens, named,
                     torch.from_numpy(valid), torch.from_numpy(slots)), faults

    def _prepare(self, number):
        """A pair as (uint8 [h, w, 3], width / height, [(language, tokens)]). Raises as pairs[i] does."""
        if self._kept is not None and number in self._kept:
            return self._kept[number]
        pair = self.pairs[number]
        captions = []
        if self.tokenizer:
            if not pair.captions:
                raise ValueError(f"{pair.fault}: pair {pair.key}")
            names, texts = zip(*sorted(pair.captions.items()))
            rows = self.tokenizer.encode(list(texts), self.context_length)
            captions = [(self.languages.index(name), row) for name, row in zip(names, rows)]
        try:
            image = decode(pair.image, self.canvas)
        except ValueError as error:
            raise ValueError(f"{error} (pair {pair.key})") from None
        result = fit(image, self.canvas), image.width / image.height, captions
        if self._kept is not None:
            self._kept[number] = result
        return result

    def report(self):
        """One line on what was skipped so far, by cause, each with its first example."""
        causes = ", ".join(f"{count:,} {cause} (first: {self.examples[cause]})"
                           for cause, count in self.skipped.most_common())
        return f"skipped {sum(self.skipped.values()):,} pairs: {causes}" if causes else "no pair was skipped"


# --- The command --------------------------------------------------------------------------------------------

def main():
    """The command: emoji, pack, index or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\nFrom top")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("emoji", help="pack the demo's pairs")
    sub.add_argument("--out", default="data/emoji", help="folder for the shards (default: %(default)s)")
    sub.add_argument("--test", default="Joy", help="vendor held out as the test; Joy's drawings never train")
    sub = commands.add_parser("pack", help="make shards from folders and tables")
    sub.add_argument("out", metavar="OUT", help="a new or empty folder")
    sub.add_argument("inputs", nargs="+", metavar="FOLDER_or_TABLE",
                     help="pictures with NAME.txt, NAME.ko.txt or NAME.json beside them; or a .tsv or .csv "
                          "whose first row is image, then a language (en, ko) or caption for each column")
    sub.add_argument("--shard-pairs", type=int, default=10_000, help="pairs a shard (default: %(default)s)")
    for name, text in (("index", "write down where each pair lies, and print the mix"),
                       ("check", "read and decode everything, report what is bad")):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("sources", nargs="+", metavar="SHARDS",
                         help="tars, folders, globs or brace ranges, with ::WEIGHT or ::LANGUAGE if wanted")
    for name in ("pack", "index", "check"):
        commands.choices[name].add_argument("--workers", type=int, default=os.cpu_count(),
                                            help="processes (default: %(default)s)")
    args = parser.parse_args()
    if args.command == "emoji":
        demo.pack_emoji(args.out, args.test)
    elif args.command == "pack":
        if args.shard_pairs < 1:
            raise ValueError(f"--shard-pairs {args.shard_pairs}: at least 1")
        count, missing = packing.pack(args.out, args.inputs, args.shard_pairs, args.workers)
        left = f"; {len(missing):,} left out, such as {missing[0]}" if missing else ""
        print(f"{args.out}: {count:,} pairs{left}")
    elif args.command == "index":
        print(Pairs(args.sources, workers=args.workers).describe())
    else:
        packing.check([path for source in args.sources for path in expand(_parse_source(source)[0])], args.workers)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"data.py: {error}")
