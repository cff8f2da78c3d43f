"""Teach a trained CLIP another language, by text alone.

    torchrun -m extras.teach runs/english --text pairs.tsv --out runs/taught
    torchrun train_clip.py --init runs/taught --freeze image --out runs/taught-clip

The teacher is a CLIP whose text encoder knows English. The student is a new text encoder with a
tokenizer of both languages. It learns to give an English text and its translations the feature that
the teacher gives to the English text (teacher learning, as in AltCLIP, arXiv 2211.06679, and
Multilingual-CLIP, Carlsson et al. 2022):

    loss = mean of |student(text) - teacher(English text)|^2 over English texts and translations

All features have unit length. The result is an ordinary run: the teacher's image encoder and
temperature, the student's text encoder and tokenizer. The second command above then trains the text
encoder on images, too.

The teacher encodes each distinct English text once, before the first step. Its features are in a
float16 file in the run's folder, which all processes map into memory: 50 million texts of width 768
are 77 GB, more than the memory of most machines, and float16 changes a unit vector by less than
0.001. A resumed run uses the file again, and the end of the run deletes it.

From top to bottom: arguments, tables of texts, the texts of a run, batches, the teacher's features,
the student, and in main the training loop.

Not included: languages other than English for the teacher, and distillation of image encoders.
"""

import os

# Idle OpenMP threads spin by default, which on a busy machine takes CPU time from working ones. Let
# them sleep after some tenths of a millisecond. libgomp reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import argparse
import collections
import csv
import functools
import hashlib
import io
import json
import shutil
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import data
import evaluate
import kelip
import page
from command import ArgumentParser, number, one_line, run_command
from extras.features import model_digest
from kelip import TEXT_KEYS
from optimizer import make_optimizer
from shards import COUNTRIES, CaptionRule, clean_caption, format_counts, is_language
from tokenizer import check_is_file, not_utf8
from train_clip import FINE_TUNING_LR, LR, Origin, open_tokenizer
from trainer import (
    DEMO_TRAIN,
    MAX_WEIGHT_DECAY,
    Run,
    add_arguments,
    check_preset,
    compile_blocks,
    weight_dtype,
)

ENGLISH = "en"         # the teacher's language
HELD_OUT = 1000        # English texts, at most 5 % of all
MAX_LINE = 1 << 20     # bytes
MAX_FIELD = 1 << 16    # characters of a quoted field of a .csv
BLOCK_ROWS = 1 << 14   # rows that count as a shard in data.Order
CHUNK = 256            # texts that are encoded at a time, outside of training


def parse_arguments(argv=None):
    """The command line."""
    parser = ArgumentParser(
        description=__doc__.partition("\nThe teacher encodes")[0],
        epilog="A table has a header of languages, such as en and ko, and a pair in each row.\n\n"
               "The run's folder then holds last.pt, tokenizer.json, config.json, metrics.jsonl\n"
               "and index.html. kelip.build_model(FOLDER) loads the model; evaluate.py,\n"
               "extras.search, extras.convert and train_clip.py --init take it as any run.\n\n"
               "To put released KELIP's text encoder on OpenAI's ViT-L/14 image encoder:\n"
               "    python -m extras.convert clip-vit-large-patch14 weights/openai\n"
               "    torchrun -m extras.teach weights/openai --init weights/kelip --text pairs.tsv",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("teacher", metavar="TEACHER",
        help="a run of train_clip.py, released KELIP or what extras.convert wrote; only its text "
             "encoder is replaced")
    add("--text", nargs="+", dest="data", default=[DEMO_TRAIN], metavar="FILE",
        help="tables of English texts and translations (.tsv, .csv), or shards, of which the first "
             "caption in each language is used (default: the names of the demo's emoji)")
    add_arguments(parser, out="runs/taught", batch_size=512, epochs=10, has_images=False,
                  lr=f"{LR['adamw']:g}, with muon {LR['muon']:g}; {FINE_TUNING_LR:g} with --init")
    add("--tokenizer", metavar="FILE",
        help="a tokenizer.json (default: that of --init's model, else one trained on the texts)")
    add("--init", metavar="MODEL",
        help="a model whose text encoder and tokenizer the student starts from, without its "
             "projection (default: random weights)")
    add("--holdout", type=number(int, 0, 1 << 24), default=HELD_OUT, metavar="N",
        help="English texts that are not trained on, with all their translations; during the run, "
             f"they measure retrieval (default: {HELD_OUT:,}; at most 5 %% of the texts)")
    add("--evals", type=number(int, 0, 10_000), default=4, metavar="N",
        help="evaluations during the run, including one at the end (default: 4)")
    add("--weight-decay", type=number(float, 0, MAX_WEIGHT_DECAY), default=0.2, metavar="X",
        help="weight decay, of matrices only (default: 0.2)")
    # What train_clip.open_tokenizer reads.
    parser.set_defaults(new_text=False)
    args = parser.parse_args(argv)
    check_preset(args.model)
    for flag in ("model", "tokenizer"):
        if args.init and getattr(args, flag):
            raise ValueError(f"--{flag} {getattr(args, flag)}: --init brings its own: leave out "
                             f"--{flag}")
    return args


# ---- tables of texts ----

class Table:
    """The rows of a .tsv or .csv file, read from disk: table[i] -> {language: text}.

    Memory has the offset of each row, 8 bytes. The header names the languages; other columns are
    not read. Texts are cleaned as captions are. A quoted field of a .csv may have line breaks; in a
    .tsv, quotes belong to the text. Blank lines are no rows.

    table[i] raises ValueError with the reason when row i cannot be read. Raises ValueError when the
    file has no header of languages or no rows.
    """

    def __init__(self, path):
        self.path, self.file = path, None
        self.is_csv = path.lower().endswith(".csv")
        self.separator = "\t"
        check_is_file(path)
        csv.field_size_limit(MAX_FIELD)
        with open(path, "rb") as file:
            header = file.readline(MAX_LINE)
            if self.is_csv:
                self.separator = next((mark for mark in ",;\t" if mark.encode() in header), ",")
            file.seek(0)
            self.offsets = self._find_rows(file)                             # int64 [rows + 2]
        if len(self.offsets) == 1:  # the end of the file alone
            raise ValueError(f"{path}: an empty file, where a header of languages is expected")
        try:
            names = [name.strip().lower() for name in self._fields(0)]
        except ValueError as error:
            raise ValueError(f"{path}: the header cannot be read: {error}") from None
        self.languages = [name if is_language(name) else None for name in names]
        self._check_header(names)
        if not len(self):
            raise ValueError(f"{path}: only a header, and no rows")

    def _find_rows(self, file):
        """The offset of each row that is not blank, and the end of the file."""
        offsets, position = array("q"), 0
        while line := file.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise ValueError(f"{self.path}: the line at byte {position:,} is longer than "
                                 f"{MAX_LINE:,} bytes: write one pair per line")
            size = len(line)
            if self.is_csv and b'"' in line:
                size = self._size_of_row(file, line)
                file.seek(position + size)
            if line.strip(b"\r\n"):
                offsets.append(position)
            position += size
        offsets.append(position)
        return np.array(offsets)

    def _size_of_row(self, file, line):
        """The bytes of a .csv's row, of which the first line is read: more if a field goes on.

        If the quotes are wrong, the row is this line alone, so that the next ones are not lost.
        """
        lines = [line]

        def decoded():
            yield line.decode("latin-1")  # a character for each byte
            while following := file.readline(MAX_LINE):
                lines.append(following)
                yield following.decode("latin-1")

        try:
            next(csv.reader(decoded(), delimiter=self.separator, strict=True))
        except csv.Error:
            return len(line)
        return sum(map(len, lines))

    def _check_header(self, names):
        """Raise ValueError unless the header has English and another language, each once."""
        found = [language for language in self.languages if language]
        shown = one_line(", ".join(names))[:200]
        for name in names:
            if name in COUNTRIES and COUNTRIES[name] not in names:
                raise ValueError(f"{self.path}: {name} is a country: name the column "
                                 f"{COUNTRIES[name]}")
        if len(set(found)) < len(found):
            raise ValueError(f"{self.path}: its header, {shown}, names a language twice")
        if ENGLISH not in found or len(found) < 2:
            raise ValueError(f"{self.path}: its header is {shown}, where {ENGLISH} and another "
                             "language, such as ko, are expected")

    def __len__(self):
        return len(self.offsets) - 2  # without the header and the end of the file

    def __getitem__(self, i):
        fields = self._fields(i + 1)
        if len(fields) != len(self.languages):
            raise ValueError("more or fewer fields than the header")
        try:
            texts = {language: clean_caption(field)
                     for language, field in zip(self.languages, fields) if language}
        except ValueError:
            raise ValueError("bad HTML entity") from None
        return {language: text for language, text in texts.items() if text}

    def _fields(self, row):
        """The fields of a row, of which the header is the first."""
        self.file = self.file or open(self.path, "rb")
        begin, end = self.offsets[row:row + 2].tolist()
        content = os.pread(self.file.fileno(), end - begin, begin)
        try:
            text = content.decode("utf-8-sig")  # the header may begin with a byte order mark
        except UnicodeDecodeError:
            reason, _, _ = not_utf8(content).partition(":")
            raise ValueError(reason) from None
        text = text.rstrip("\r\n")
        if not self.is_csv:
            return text.split(self.separator)
        lines = io.StringIO(text, newline="")
        try:
            [fields] = csv.reader(lines, delimiter=self.separator, strict=True)
        except (csv.Error, ValueError):
            raise ValueError("bad quotes") from None
        return fields

    def name(self, i):
        """Where row i is, for messages. The header is row 1."""
        return f"{self.path}, row {i + 2:,}"

    def __getstate__(self):
        """What is pickled to worker processes: everything but the open file."""
        return {**self.__dict__, "file": None}


class Captions:
    """The captions of shards, as a Table: the first one in each language."""

    def __init__(self, source):
        self.pairs = data.Pairs(source)

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        pair = self.pairs[i]
        if not pair.captions:
            raise ValueError(pair.errors[0])
        return {language: texts[0] for language, texts in pair.captions.items()}

    def name(self, i):
        """Where row i is, for messages."""
        return f"pair {i:,} of {self.pairs.sources[0].name}"


def open_texts(source):
    """The Table or the Captions of one argument of --text."""
    if source.lower().endswith((".tsv", ".csv")):
        return Table(source)
    if os.path.isfile(source) and not source.endswith(".tar"):
        raise ValueError(f"{source}: neither a table (.tsv, .csv) nor shards (.tar)")
    return Captions(source)


# ---- the texts of a run ----

class Texts:
    """English texts and their translations, in place of data.Pairs: texts[i] -> {language: text}.

    Reads everything once, to number the distinct English texts and to find the rows that cannot be
    used. The others are in `rows`, which is all that data.Order sees. Texts stay on disk: ten
    million rows take 0.3 GB of memory, and 0.9 GB while they are numbered.

    Args:
        sources: tables and shards.
        state: what state() returned when the run began.
        holdout: distinct English texts to hold out, at most 5 %. They are those whose hashes are
            lowest, and so the same in every run.

    Attributes:
        rows: int64 [n], the numbers of the rows to train on.
        english: int64 [n], the number of each one's English text, in 0..K-1.
        held_out: M, the number of English texts that are held out, which are 0..M-1.
        test_rows, test_english: the same as rows and english, of the held-out texts.
        first_rows: int64 [K], the first row with each English text.
        languages, skipped: Counters of texts and of reasons, over all rows.

    Raises ValueError when there is nothing to train on, or the texts are not those of `state`.
    """

    def __init__(self, sources, state=None, holdout=0):
        self.tables = [open_texts(source) for source in sources]
        self.name = " ".join(sources)
        self.table_starts = np.cumsum([0] + [len(table) for table in self.tables])
        self.languages, self.skipped = collections.Counter(), collections.Counter()
        self.examples = {}                                  # reason -> the first row with it
        hashes = np.zeros(self.table_starts[-1], np.uint64)  # 0 for rows that cannot be used
        content, size = hashlib.sha256(), 0
        for i in tqdm(range(len(hashes)), desc="texts", unit=" rows", disable=None):
            try:
                row = self.read(i)
            except ValueError as error:
                reason = str(error).partition(":")[0]
                self.skipped[reason] += 1
                number, i = self._locate(i)
                self.examples.setdefault(reason, self.tables[number].name(i))
                continue
            line = json.dumps(row).encode()
            content.update(line)
            size += len(line)
            self.languages.update(row.keys())
            english = hashlib.blake2b(row[ENGLISH].encode(), digest_size=8).digest()
            hashes[i] = int.from_bytes(english, "little") | 1
        used = np.flatnonzero(hashes)
        distinct, first, english = np.unique(hashes[used], return_index=True, return_inverse=True)
        self.held_out = min(holdout, len(distinct) // 20)
        # The lowest hashes are held out. The others are numbered in the order of the tables, so
        # that rows that are read together have features that are near each other on disk.
        order = np.lexsort((first, np.arange(len(distinct)) >= self.held_out))  # [K]
        self.first_rows = used[first[order]]
        english = order.argsort()[english]
        is_test = english < self.held_out
        self.rows, self.english = used[~is_test], english[~is_test]
        self.test_rows, self.test_english = used[is_test], english[is_test]
        self.digest = content.hexdigest()
        if not len(self):
            raise ValueError(f"--text {self.name}: no text can be used: {self.report()}")
        # data.Order shuffles blocks of rows as if they were shards.
        self.starts = np.append(np.arange(0, len(self), BLOCK_ROWS), len(self))
        rule = CaptionRule()
        self.sources = [data.Source(self.name, 1.0, rule, 0, len(self.starts) - 1, len(self))]
        self.shards = ()  # none that may be missing: any change is an error
        self._state = {"options": [""], "shards": [[[self.name, size, len(used), self.digest]]]}
        if state and [shard[1:] for shard in sum(state["shards"], [])] != [
                [size, len(used), self.digest]]:
            raise ValueError(f"--text {self.name}: other texts than those that the run began with: "
                             "restore them, or choose another --out")

    def read(self, row):
        """A row of the tables: {language: text}. Raises ValueError when it is no pair."""
        number, i = self._locate(row)
        texts = self.tables[number][i]
        if ENGLISH not in texts:
            raise ValueError("no English text")
        if len(texts) < 2:
            raise ValueError("no translation")
        return texts

    def _locate(self, row):
        """The number of a row's table, and its number there."""
        number = int(np.searchsorted(self.table_starts, row, "right")) - 1
        return number, int(row - self.table_starts[number])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.read(self.rows[i])

    def texts(self):
        """Yield all texts to train on, for the tokenizer."""
        for i in range(len(self)):
            yield from self[i].values()

    def state(self):
        """What a checkpoint saves, in the form of data.Pairs.state."""
        return self._state

    def describe(self):
        """Lines of text on what there is, what is held out and what is skipped."""
        line = (f"{self.name}: {len(self):,} pairs to train on; texts: "
                f"{format_counts(self.languages)}; {len(self.first_rows):,} distinct English "
                f"texts, {self.held_out:,} of them held out")
        return one_line(line) + (f"\n{self.report()}" if self.skipped else "")

    def report(self):
        """A line on the rows that are skipped: the count of each reason, and its first example."""
        if not self.skipped:
            return "no row was skipped"
        reasons = ", ".join(f"{count:,} {reason} (first: {self.examples[reason]})"
                            for reason, count in self.skipped.most_common())
        return one_line(f"skipped {sum(self.skipped.values()):,} rows: {reasons}")


# ---- batches ----

class TextBatch(NamedTuple):
    """One process's part of a batch: n rows in C languages, those of Loader.languages.

    Texts that a row does not have are empty, and not valid.
    """
    tokens: torch.Tensor   # int64 [n, C, context_length]
    valid: torch.Tensor    # bool [n, C]
    english: torch.Tensor  # int64 [n], the number of each row's English text


class TextLoader(data.Loader):
    """data.Loader for Texts: the same order, ranks, workers and place to resume."""

    def make_batch(self, step):
        """This process's part of one batch: (TextBatch, [(reason, example) of each skipped row]).

        Only rows that have changed since Texts read them are skipped here.
        """
        n = self.local_batch_size
        numbers = self.order(self.first + step * self.batch_size + self.rank * n, n)
        rows, skipped = [], []
        for i in numbers.tolist():
            try:
                rows.append(self.pairs[i])
            except ValueError as error:
                rows.append({})
                skipped.append(("changed during the run", f"{self.pairs.name}: {error}"))
        texts = [row.get(language, "") for row in rows for language in self.languages]
        tokens = self.tokenizer.encode(texts, self.context_length)           # [n * C, L]
        valid = torch.tensor([[language in row for language in self.languages] for row in rows])
        tokens = tokens.view(n, len(self.languages), -1)                     # [n, C, L]
        return TextBatch(tokens, valid, torch.from_numpy(self.pairs.english[numbers])), skipped


# ---- the teacher's features ----

@torch.no_grad()
def embed_english(run, teacher, tokenizer, texts):
    """The teacher's features of all distinct English texts: float16 [K, D], mapped from a file.

    Each process encodes its part. A file of the same teacher and the same texts is used again.
    """
    shape = len(texts.first_rows), teacher.config["embed_dim"]
    row_bytes = 2 * shape[1]
    path = run.folder / f"teacher-{run.args.teacher_digest}-{texts.digest[:16]}.f16"
    temporary = run.folder / ".teacher.part"
    is_missing = not path.is_file() or path.stat().st_size != shape[0] * row_bytes
    if run.broadcast(is_missing):
        with run.rank_zero_first():
            if run.is_rank_zero:
                _allocate(temporary, shape[0] * row_bytes)
        starts = range(run.rank * CHUNK, shape[0], run.world_size * CHUNK)
        # disable=None: no progress bar if stderr is not a terminal.
        starts = tqdm(starts, desc="teacher", unit_scale=CHUNK, unit=" texts",
                      disable=None if run.is_rank_zero else True)
        try:
            with open(temporary, "r+b") as file:
                for start in starts:
                    rows = texts.first_rows[start:start + CHUNK]
                    english = [texts.read(row)[ENGLISH] for row in rows]
                    tokens = tokenizer.encode(english, teacher.config["context_length"])
                    features = teacher.encode_text(tokens, l2norm=True)      # [CHUNK, D]
                    file.seek(start * row_bytes)
                    file.write(features.half().cpu().numpy())
            run.sum_over_ranks(torch.ones(1, device=run.device)).item()  # all ranks are done
            with run.rank_zero_first():
                if run.is_rank_zero:
                    os.replace(temporary, path)
        finally:
            if run.is_rank_zero:
                temporary.unlink(missing_ok=True)  # after an error
    return np.memmap(path, np.float16, "r", shape=shape)


def _allocate(path, size):
    """Make a file of zeros. Raises OSError when the disk has no room for it."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(f"{path.parent}: the teacher's features need {size / 1e9:.1f} GB, and its "
                      f"disk has {free / 1e9:.1f} GB free")
    with open(path, "wb") as file:
        file.truncate(size)


# ---- the student ----

def find_origin(args, checkpoint, teacher):
    """What the student starts from, a train_clip.Origin whose config is that of the result.

    The image encoder and embed_dim are the teacher's. The sizes of the text encoder are those of
    the checkpoint to resume, else those of --init's model, else those of --model. Fills in the
    defaults of --model, --optimizer and --lr.
    """
    init = None
    if checkpoint:
        preset, config = checkpoint["config"]["preset"], checkpoint["config"]["model"]
    else:
        if args.init:
            init = kelip.open_checkpoint(args.init)
            if init.is_stage_1:
                raise ValueError(f"--init {args.init}: a run of stage 1, which has no text encoder")
            preset, text_config = Path(args.init).name, init.config
            own, needed = (x.get("activation", "quick_gelu") for x in (init.config, teacher.config))
            if own != needed:
                raise ValueError(f"--init {args.init}: its activation is {own} and the teacher's "
                                 f"{needed}, and both encoders of a model have the same")
        else:
            preset = args.model or "tiny"
            text_config = kelip.PRESETS[preset]
        config = {key: value for key, value in teacher.config.items() if key not in TEXT_KEYS}
        config |= {key: text_config[key] for key in TEXT_KEYS if key in text_config}
    args.model = args.model or preset
    args.optimizer = args.optimizer or ("muon" if preset == "tiny" else "adamw")
    if args.lr is None:
        args.lr = FINE_TUNING_LR if init else LR[args.optimizer]
        if checkpoint:
            args.lr = checkpoint["config"]["lr"]
    return Origin(preset, config, init)


def build_student(origin, teacher, dtype, device):
    """A KELIP with the teacher's image encoder and logit_scale, which are not trained."""
    model = kelip.KELIP(**origin.config)
    if origin.init:
        weights = {key: value for key, value in origin.init.weights.items()
                   if not key.startswith("visual.")
                   and key not in ("text_projection", "logit_scale")}
        kelip.load_weights(model, {**model.state_dict(), **weights}, origin.init.path)
    model.to(device, dtype)
    model.visual.load_state_dict(teacher.visual.state_dict())
    model.logit_scale.data.copy_(teacher.logit_scale)
    model.visual.requires_grad_(False)
    model.logit_scale.requires_grad_(False)
    return model


class Student(nn.Module):
    """The text encoder: tokens [n, C, L], on the CPU -> features of unit length [C, n, D]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        texts = tokens.transpose(0, 1)                                       # [C, n, L]
        features = self.model.encode_text(texts.flatten(0, 1), l2norm=True)
        return features.view(*texts.shape[:2], -1)                           # [C, n, D]


def teacher_loss(student, teacher):
    """The loss of each text: the squared distance of its feature from the teacher's.

    student [C, n, D], teacher [n, D], all of unit length -> [C, n]. This is the mean squared error
    times D, so that its size does not depend on the width: 2 - 2 * cosine, from 0 to 4.
    """
    return (student - teacher.to(student.dtype)).square().sum(dim=-1)


@torch.no_grad()
def evaluate_student(run, model, tokenizer, texts, features):
    """How often a held-out text finds the teacher's feature of its English text: R@1, 5 and 10.

    The candidates are the features of all held-out English texts. Returns {language:
    {"text_to_teacher": {"R@1": ...}}}.
    """
    candidates = torch.from_numpy(features[:texts.held_out].astype(np.float32))  # [M, D]
    by_language = collections.defaultdict(list)
    for row, english in zip(texts.test_rows, texts.test_english.tolist()):
        for language, text in texts.read(row).items():
            by_language[language].append((text, english))
    results = {}
    for language, found in sorted(by_language.items()):
        encoded = []
        for start in range(0, len(found), CHUNK):
            tokens = tokenizer.encode([text for text, _ in found[start:start + CHUNK]],
                                      model.config["context_length"])
            with run.autocast():
                encoded.append(model.encode_text(tokens, l2norm=True).float().cpu())
        owner = torch.tensor([english for _, english in found])
        recall = evaluate.recall_at_k(candidates, torch.cat(encoded), owner)
        # The "images" of recall_at_k are the teacher's features.
        results[language] = {"text_to_teacher": recall["text_to_image"]}
    return results


def write_page(folder, texts, recall):
    """Write index.html: the last evaluation and the curves of the run."""
    rows = [[language, *(f"{100 * value:.1f}" for value in result["text_to_teacher"].values())]
            for language, result in recall.items()]
    page.write(
        folder / "index.html", f"{folder.resolve().name}: what the student learned",
        f"Held-out texts, and the teacher's features of {texts.held_out:,} English texts. A text "
        "should be nearest to that of its own.",
        page.table(["held-out texts, %", *(f"R@{k}" for k in evaluate.KS)], rows),
        *evaluate.curves(folder, "text_to_teacher",
                         "R@1 of held-out texts among the teacher's features, %"))


# ---- training ----

def train(args, run):
    """Set up, compute the teacher's features, train, and print where the result is."""
    teacher, _, teacher_tokenizer = kelip.build_model(args.teacher)
    args.teacher_digest = model_digest(teacher)  # for config.json, which --resume compares
    origin = find_origin(args, run.checkpoint, teacher)
    texts = run.open_pairs(functools.partial(Texts, holdout=args.holdout))
    tokenizer = open_tokenizer(args, run, texts, origin)
    if not run.checkpoint and not origin.init:
        origin.config["vocab_size"] = len(tokenizer)
    torch.manual_seed(args.seed)
    dtype = weight_dtype(args.precision)
    teacher.to(run.device, dtype)
    model = build_student(origin, teacher, dtype, run.device)
    if args.compile:
        compile_blocks(model)

    # Betas and epsilon are those of train_clip.py.
    optimizer = make_optimizer(model, args.lr, betas=(0.9, 0.98), eps=1e-6,
                               weight_decay=args.weight_decay, name=args.optimizer, dtype=run.dtype)
    # Fixes the number of steps, or restores the checkpoint. There are no images to pad.
    run.start(model, optimizer, texts, origin.config, args.evals if texts.held_out else 0,
              tokenizer, padded_size=1)
    features = embed_english(run, teacher, teacher_tokenizer, texts)         # [K, D]
    del teacher
    student = run.data_parallel(Student(model))
    loader = run.open_loader(texts, tokenizer, TextLoader)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.announce(f"{args.model}: {trained / 1e6:.1f}M parameters of the text encoder, "
                 f"{len(tokenizer):,} tokens, taught by {args.teacher}")
    recall = {}  # at the last evaluation

    def evaluate_at(step):
        """Retrieval among the held-out texts, by rank zero, into metrics.jsonl."""
        nonlocal recall
        with run.evaluation(step):  # the other ranks wait
            if run.is_rank_zero:
                recall = evaluate_student(run, model, tokenizer, texts, features)
                run.log_evaluation(step, recall)

    if run.evaluates_at(run.first_step):  # the run was killed between saving and evaluating
        evaluate_at(run.first_step)
    for step, batch in run.steps(loader):  # step counts from 1; sets the learning rate
        valid = batch.valid.T.to(run.device, non_blocking=True)              # [C, n]
        target = torch.from_numpy(features[batch.english.numpy()]).to(run.device)  # [n, D]
        with run.autocast():
            student_features = student(batch.tokens)                         # [C, n, D]
        per_text = teacher_loss(student_features, target)                    # [C, n]
        # The mean over the texts of all ranks, though rows differ in how many texts they have.
        # DistributedDataParallel takes the mean of the gradients over ranks:
        #     mean over ranks of (sum * world_size / total) = sum over all texts / total
        total = run.sum_over_ranks(valid.sum().float()).clamp(min=1)
        loss = per_text.where(valid, 0).sum() * run.world_size / total
        run.backward(loss)
        grad_norm = run.optimizer_step()  # clip to norm 1, step if finite, clear the gradients
        # (values, where) logs the mean of values where `where` holds: the loss of each language.
        by_language = {f"loss_{language}": (per_text.detach()[i], valid[i])
                       for i, language in enumerate(loader.languages)}
        run.log(step, loss, grad_norm, **by_language)
        run.save_if_due(step)  # exits after a signal
        if run.evaluates_at(step):
            evaluate_at(step)

    if run.is_rank_zero:
        for path in run.folder.glob("teacher-*.f16"):
            path.unlink()  # the other processes may still have it mapped
        print(texts.report())
        if loader.skipped:
            print(loader.report())
        for language, result in recall.items():
            print(f"{language}: {100 * result['text_to_teacher']['R@1']:.1f} % of the held-out "
                  f"texts find the teacher's feature of their English text, among "
                  f"{texts.held_out:,}, at first place")
        print(f"{args.out}: last.pt, tokenizer.json, config.json, metrics.jsonl")
        write_page(run.folder, texts, recall)
        print(f"open {args.out}/index.html")


def main(argv=None):
    """Read the command line, and train in the folder of the run."""
    args = parse_arguments(argv)
    with Run(args, stage="teach", unit="pairs") as run:
        train(args, run)


if __name__ == "__main__":
    run_command(main, output="log", on_out_of_memory=": lower --batch-size or --workers")
