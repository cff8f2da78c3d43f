"""Teach a trained CLIP another language, by text alone.

    torchrun -m extras.teach runs/english --text pairs.tsv --out runs/taught
    torchrun train_clip.py --init runs/taught --freeze image --out runs/taught-clip

The teacher is a CLIP whose text encoder knows English. The student is a new text encoder with a
tokenizer of both languages. It learns to give an English text and its translations the feature that
the teacher gives to the English text (teacher learning, as in AltCLIP, arXiv 2211.06679, and
Multilingual-CLIP, Carlsson et al. 2022):

    loss = mean of |student(text) - teacher(English text)|^2 over English texts and translations

All features have unit length. The result is an ordinary run: the teacher's image encoder and
temperature, the student's text encoder and tokenizer. The second command then trains the text
encoder on images, too.

From top to bottom: arguments, tables of texts, the texts of a run, batches, the teacher's features,
the student, evaluation, and in train the training loop.

Not included: teachers of other languages than English, and distillation of image encoders.
"""

import os

# Idle OpenMP threads spin by default, which on a busy machine takes CPU time from working ones. Let
# them sleep after some tenths of a millisecond. libgomp reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

import argparse
import collections
import csv
import hashlib
import itertools
import shutil
from array import array

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import data
import evaluate
import kelip
import page
from command import ArgumentParser, number, one_line, run_command
from optimizer import make_optimizer
from shards import CaptionRule, Pair, format_counts, format_cut, is_language, read_captions
from tokenizer import check_is_file
from train_clip import find_origin, open_tokenizer
from trainer import (
    MAX_WEIGHT_DECAY,
    Run,
    add_arguments,
    check_preset,
    compile_blocks,
    weight_dtype,
)

ENGLISH = "en"            # the teacher's language
HELD_OUT = 1000           # English texts to hold out, at most 5 % of all
BLOCK_ROWS = 1 << 14      # rows that data.Order shuffles as one shard
CHUNK = 1024              # texts that the teacher encodes at a time
FEATURES = "teacher.npy"  # in the run's folder, while it runs


def parse_arguments(argv=None):
    """The command line."""
    parser = ArgumentParser(
        prog="python -m extras.teach",
        description=__doc__.partition("\nFrom top")[0],
        epilog="The run's folder then holds last.pt, tokenizer.json, config.json, metrics.jsonl\n"
               "and index.html. kelip.build_model(FOLDER) loads the model.",
        fromfile_prefix_chars="@", formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve")  # of --data, which is here another name of --text
    add = parser.add_argument
    add("teacher", metavar="TEACHER",
        help="a run of train_clip.py, released KELIP or what extras.convert wrote; only its text "
             "encoder is replaced")
    add_arguments(parser, out="runs/taught", batch_size=512, epochs=10,
                  lr="that of train_clip.py")
    add("--text", "--data", nargs="+", dest="data", required=True, metavar="FILE",
        help="tables (.tsv, .csv) with a header of languages, such as en and ko, and a text and "
             "its translations in each line; or shards, of which the first caption in each "
             "language is used")
    add("--tokenizer", metavar="FILE",
        help="a tokenizer.json (default: that of --init's model, else one trained on the texts)")
    add("--init", metavar="MODEL",
        help="a model whose text encoder and tokenizer the student starts from, with a new "
             "projection (default: random weights)")
    add("--weight-decay", type=number(float, 0, MAX_WEIGHT_DECAY), default=0.2, metavar="X",
        help="weight decay, of matrices only (default: 0.2)")
    add("--evals", type=number(int, 0, 10_000), default=4, metavar="N",
        help=f"evaluations during the run on {HELD_OUT:,} English texts and their translations, "
             "which are not trained on (at most 5 %% of the texts; default: 4)")
    parser.set_defaults(freeze=None, new_text=False)  # train_clip.find_origin reads them
    args = parser.parse_args(argv)
    check_preset(args.model)
    return args


# ---- tables of texts ----

class Table:
    """The lines of a .tsv or .csv file below its header: table[i] -> shards.Pair, with no image.

    The header names the language of each column. Columns with other names are not read. Fields of a
    .csv may be in quotes, but no field may have a line break. Lines stay on disk: memory has the
    offset of each, 8 bytes. Raises ValueError when the file has no header of languages or no lines.
    """

    def __init__(self, path):
        check_is_file(path)
        self.path, self.file = path, None
        with open(path, "rb") as file:
            offsets = itertools.accumulate(map(len, file), initial=0)
            self.offsets = np.fromiter(offsets, np.int64)                    # [lines + 1]
        if len(self.offsets) < 3:  # the header, a line, and the end of the file
            raise ValueError(f"{path}: no lines below a header")
        names = [name.decode("utf-8-sig", "replace") for name in self._fields(0)]
        self.languages = [name.strip().lower() for name in names]
        found = [name for name in self.languages if is_language(name)]
        if ENGLISH not in found or len(found) < 2 or len(set(found)) < len(found):
            raise ValueError(f"{path}: its header is {', '.join(names)[:200]}, where {ENGLISH} and "
                             "another language, such as ko, are expected, each once, in UTF-8")

    def __len__(self):
        return len(self.offsets) - 2  # without the header and the end of the file

    def __getitem__(self, i):
        fields = self._fields(i + 1)
        captions, errors = {}, ["not as many fields as the header"]
        if len(fields) == len(self.languages):
            members = {f"{name}.txt": field for name, field in zip(self.languages, fields)}
            captions, errors = read_captions(members)
        return Pair(f"{self.path}, line {i + 2:,}", b"", captions, {}, errors)

    def _fields(self, line):
        """The fields of a line, as bytes. Line 0 is the header."""
        self.file = self.file or open(self.path, "rb")
        begin, end = self.offsets[line:line + 2].tolist()
        content = os.pread(self.file.fileno(), end - begin, begin).rstrip(b"\r\n")
        if self.path.lower().endswith(".tsv"):
            return content.split(b"\t")
        # csv reads str, and the line may not be UTF-8. Latin-1 has a character for every byte.
        text = content.decode("latin-1")
        try:
            if text.count('"') % 2:  # as in each line of a field with a line break
                raise csv.Error
            [fields] = csv.reader([text], strict=True)
        except csv.Error:
            raise ValueError(f"bad quotes: {self.path}, line {line + 1:,}") from None
        return [field.encode("latin-1") for field in fields]

    def __getstate__(self):
        """What is pickled to worker processes: everything but the open file."""
        return {**self.__dict__, "file": None}


# ---- the texts of a run ----

class Texts:
    """English texts and their translations, in place of data.Pairs: texts[i] -> {language: text}.

    All rows of all tables are read once, to skip those that cannot be used, and to number the
    distinct English texts. Texts stay on disk: memory has 32 bytes for each row.

    Attributes:
        rows: int64 [n], the numbers of the rows to train on.
        english: int64 [n], the number of each one's English text, in 0..K-1.
        test_rows, test_english: the same of the held-out texts.
        first_rows: int64 [K], the first row with each English text.
        held_out: M, the number of English texts that are held out, which are 0..M-1.
        skipped, examples: a Counter of reasons, and the first row that was skipped for each.

    Raises ValueError when no row can be used, or the texts are not those of `state`.
    """

    def __init__(self, sources, state=None):
        self.tables = [Table(source) if source.lower().endswith((".tsv", ".csv"))
                       else data.Pairs(source) for source in sources]
        self.table_starts = np.cumsum([0] + [len(table) for table in self.tables])
        self.languages, self.skipped = collections.Counter(), collections.Counter()
        self.examples = {}
        rows, hashes, digest = array("q"), array("Q"), hashlib.sha256()
        for row in tqdm(range(self.table_starts[-1]), desc="texts", unit=" rows", disable=None):
            try:
                texts = self.read(row)
            except ValueError as error:
                reason, _, example = str(error).partition(": ")
                self.skipped[reason] += 1
                self.examples.setdefault(reason, example)
                continue
            rows.append(row)
            english = hashlib.blake2b(texts[ENGLISH].encode(), digest_size=8).digest()
            hashes.append(int.from_bytes(english, "little"))
            digest.update(repr(texts).encode())
            self.languages.update(texts.keys())
        if not rows:
            raise ValueError(f"--text {' '.join(sources)}: no row can be used: {self.report()}")

        rows = np.array(rows)
        # Distinct hashes are sorted. The lowest are held out: the same texts in every run.
        _, first, english = np.unique(np.array(hashes), return_index=True, return_inverse=True)
        self.first_rows = rows[first]                                        # [K]
        self.held_out = min(HELD_OUT, len(first) // 20)
        is_test = english < self.held_out
        self.rows, self.english = rows[~is_test], english[~is_test]          # [n]
        self.test_rows, self.test_english = rows[is_test], english[is_test]

        # What data.Order and Run need: one source, whose shards are blocks of rows.
        n = len(self.rows)
        self.starts = np.append(np.arange(0, n, BLOCK_ROWS), n)
        self.sources = [data.Source("", 1.0, CaptionRule(), 0, len(self.starts) - 1, n)]
        self.shards = ()  # none that may be missing when a run is resumed
        self._state = {"options": [""], "shards": [[["texts", n, n, digest.hexdigest()]]]}
        if state not in (None, self._state):
            raise ValueError(f"--text {' '.join(sources)}: other texts than those that the run "
                             "began with: restore them, or choose another --out")

    def read(self, row):
        """A row of the tables: {language: text}. Raises ValueError("reason: details")."""
        number = int(np.searchsorted(self.table_starts, row, "right")) - 1
        pair = self.tables[number][int(row - self.table_starts[number])]
        if ENGLISH not in pair.captions or len(pair.captions) < 2:
            reason = pair.errors[0] if pair.errors else "not English and a translation"
            raise ValueError(f"{reason}: {pair.key}")
        return {language: texts[0] for language, texts in pair.captions.items()}

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
        """Lines of text on what there is and what is skipped."""
        return (f"texts: {format_counts(self.languages)}; {len(self):,} rows to train on; "
                f"{len(self.first_rows):,} distinct English texts, {self.held_out:,} of them held "
                f"out\n{self.report()}")

    def report(self):
        """A line on the rows that are skipped."""
        return one_line(data.format_skipped(self.skipped, self.examples))


# ---- batches ----

class TextLoader(data.Loader):
    """data.Loader for Texts: the same order, ranks, workers and place to resume."""

    def make_batch(self, step):
        """This process's part of one batch, n rows in C languages.

        Returns ((tokens, valid, english), [], texts that were cut). tokens: int64 [n, C, L]. valid:
        bool [n, C], whether the row has a text in the language. english: int64 [n], the number of
        the English text. The second list is of rows that are skipped now: none.
        """
        n, C = self.local_batch_size, len(self.languages)
        numbers = self.order(self.first + step * self.batch_size + self.rank * n, n)
        rows = [self.pairs[i] for i in numbers]
        texts = [row.get(language, "") for row in rows for language in self.languages]
        tokens = self.tokenizer.encode(texts, self.context_length)           # [n * C, L]
        valid = torch.tensor([[language in row for language in self.languages] for row in rows])
        cut = list(self.tokenizer.cut.values())
        return (tokens.view(n, C, -1), valid, self.pairs.english[numbers]), [], cut


# ---- the teacher's features ----

def embed_english(run, teacher, tokenizer, texts):
    """The teacher's unit vectors of the distinct English texts: float16 [K, D], mapped from a file.

    Each process encodes a part of the texts. In memory, the vectors of ten million texts would take
    15 GB for each process. float16 changes a unit vector by less than 0.001.
    """
    path = run.folder / FEATURES
    shape = len(texts.first_rows), teacher.config["embed_dim"]               # K, D
    with run.rank_zero_first():
        if run.is_rank_zero:
            needed, free = 2 * shape[0] * shape[1], shutil.disk_usage(run.folder).free
            if needed > free:
                raise OSError(f"{path}: the teacher's features need {needed / 1e9:.1f} GB, and the "
                              f"disk has {free / 1e9:.1f} GB free")
            np.lib.format.open_memmap(path, "w+", np.float16, shape)
    features = np.load(path, mmap_mode="r+")
    starts = range(run.rank * CHUNK, shape[0], run.world_size * CHUNK)
    # disable=None: no progress bar if stderr is not a terminal.
    for start in tqdm(starts, desc="teacher", disable=None if run.is_rank_zero else True):
        rows = texts.first_rows[start:start + CHUNK]
        english = [texts.read(row)[ENGLISH] for row in rows]
        features[start:start + CHUNK] = evaluate.embed_texts(teacher, tokenizer, english)
    features.flush()
    run.barrier()
    return np.load(path, mmap_mode="r")


# ---- the student ----

def student_config(teacher, origin):
    """The result's configuration: the teacher's, with the sizes of the origin's text encoder."""
    if origin.is_from_stage_1:
        raise ValueError(f"{origin.init.path}: a run of stage 1, which has no text encoder")
    needed, own = (config.get("activation", "quick_gelu")
                   for config in (teacher.config, origin.config))
    if origin.init and own != needed:
        raise ValueError(f"{origin.init.path}: its activation is {own} and the teacher's "
                         f"{needed}: both encoders of a model have the same")
    return {**{key: value for key, value in teacher.config.items() if key not in kelip.TEXT_KEYS},
            **{key: value for key, value in origin.config.items() if key in kelip.TEXT_KEYS}}


def build_student(config, teacher, init):
    """A KELIP with the teacher's image encoder and logit_scale, which are not trained.

    init: the kelip.Checkpoint whose text encoder it has, or None for random weights.
    """
    model = kelip.KELIP(**config)
    if init:  # without its projection, which is to the features of another image encoder
        weights = {key: value for key, value in init.weights.items()
                   if not key.startswith(("visual.", "logit_scale", "text_projection"))}
        kelip.load_weights(model, {**model.state_dict(), **weights}, init.path)
    model.visual.load_state_dict(teacher.visual.state_dict())
    model.logit_scale.data.copy_(teacher.logit_scale)
    model.visual.requires_grad_(False)
    model.logit_scale.requires_grad_(False)
    return model


class Student(nn.Module):
    """The text encoder as a module, which DistributedDataParallel needs.

    tokens [n, C, L], on the CPU -> features of unit length [n, C, D].
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        n, C, _ = tokens.shape
        return self.model.encode_text(tokens.flatten(0, 1), l2norm=True).view(n, C, -1)


# ---- evaluation ----

def evaluate_student(model, tokenizer, texts, features):
    """How often a held-out text finds the teacher's feature of its English text, at rank 1, 5, 10.

    The candidates are the features of all M held-out English texts. Returns
    {language: {"text_to_teacher": {"R@1": ...}}}.
    """
    candidates = torch.from_numpy(features[:texts.held_out].astype(np.float32))  # [M, D]
    found = collections.defaultdict(list)  # language -> [(text, number of its English text)]
    for row, english in zip(texts.test_rows, texts.test_english):
        for language, text in texts.read(row).items():
            found[language].append((text, english))
    results = {}
    for language in sorted(found):
        own, english = zip(*found[language])
        vectors = evaluate.embed_texts(model, tokenizer, list(own))          # [P, D]
        recall = evaluate.recall_at_k(candidates, vectors, torch.tensor(english))
        results[language] = {"text_to_teacher": recall["text_to_image"]}
    return results


# ---- training ----

def train(args, run):
    """Set up, compute the teacher's features, train, and print where the result is."""
    teacher, _, teacher_tokenizer = kelip.build_model(args.teacher)
    # The text encoder's sizes and weights, and the defaults of --optimizer and --lr.
    origin = find_origin(args, run.checkpoint)
    args.model = origin.preset
    config = student_config(teacher, origin)
    texts = run.open_pairs(Texts)
    tokenizer = open_tokenizer(args, run, texts, origin)
    if not run.checkpoint and not origin.init:
        config["vocab_size"] = len(tokenizer)
    torch.manual_seed(args.seed)
    model = build_student(config, teacher, origin.init)
    for module in (teacher, model):
        module.to(run.device, weight_dtype(args.precision))
    if args.compile:
        compile_blocks(model)

    # Betas and epsilon are those of train_clip.py.
    optimizer = make_optimizer(model, args.lr, betas=(0.9, 0.98), eps=1e-6,
                               weight_decay=args.weight_decay, name=args.optimizer, dtype=run.dtype)
    # Fixes the number of steps, or restores the checkpoint. There are no images to pad.
    run.start(model, optimizer, texts, config, args.evals, tokenizer, padded_size=1)
    teacher_features = embed_english(run, teacher, teacher_tokenizer, texts)  # [K, D]
    del teacher
    student = run.data_parallel(Student(model))
    loader = run.open_loader(texts, tokenizer, TextLoader)
    trained = kelip.count_parameters(model) - kelip.count_parameters(model.visual)
    run.announce(f"{args.model}: a text encoder of {trained / 1e6:.1f}M parameters, "
                 f"{len(tokenizer):,} tokens, taught by {args.teacher}")

    recall = {}  # at the last evaluation
    for step, (tokens, valid, english) in run.steps(loader):  # step counts from 1
        valid = valid.to(run.device, non_blocking=True)                      # [n, C]
        target = torch.from_numpy(teacher_features[english]).to(run.device)  # [n, D]
        with run.autocast():
            features = student(tokens)                                       # [n, C, D]
        # The squared distance is D times the mean squared error, so that its size does not depend
        # on D. For vectors of unit length it is 2 - 2 * cosine.
        per_text = (features - target[:, None]).square().sum(dim=-1)         # [n, C]
        # The mean over the texts of all ranks, though rows differ in how many texts they have.
        # DistributedDataParallel takes the mean of the gradients over ranks:
        #     mean over ranks of (sum * world_size / total) = sum over all texts / total
        total = run.sum_over_ranks(valid.sum().float()).clamp(min=1)
        loss = per_text.where(valid, 0).sum() * run.world_size / total
        run.backward(loss)
        grad_norm = run.optimizer_step()  # clip to norm 1, step if finite, clear the gradients
        # (values, where) logs the mean of values where `where` holds: the loss of each language.
        by_language = {f"loss_{language}": (per_text.detach()[:, i], valid[:, i])
                       for i, language in enumerate(loader.languages)}
        run.log(step, loss, grad_norm, **by_language)
        run.save_if_due(step)  # exits after a signal
        if run.evaluates_at(step):
            with run.evaluation(step):  # the other ranks wait
                if run.is_rank_zero:
                    recall = evaluate_student(model, tokenizer, texts, teacher_features)
                    run.log_evaluation(step, recall)

    if run.is_rank_zero:
        print(texts.report())
        if loader.cut:
            print(one_line(format_cut(loader.cut, loader.longest)))
        for language, result in recall.items():
            print(f"{language}: {100 * result['text_to_teacher']['R@1']:.1f} % of the held-out "
                  f"texts find the teacher's feature of their English text at first place, among "
                  f"{texts.held_out:,}")
        print(f"{args.out}: last.pt, tokenizer.json, config.json, metrics.jsonl")
        page.write(run.folder / "index.html",
                   f"{run.folder.resolve().name}: what the student learned",
                   f"Held-out texts and the teacher's features of {texts.held_out:,} English "
                   "texts: each text should be nearest to that of its own.",
                   *evaluate.curves(run.folder, "text_to_teacher"))
        print(f"open {args.out}/index.html")


def main(argv=None):
    """Read the command line, and train in the folder of the run."""
    args = parse_arguments(argv)
    with Run(args, stage="teach", unit="pairs") as run:
        try:
            train(args, run)
        finally:
            if run.is_rank_zero:
                (run.folder / FEATURES).unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(main, output="log", on_out_of_memory=": lower --batch-size or --workers")
