"""What both stages of training share: the run, processes, precision, optimizer, schedule.

A training script owns its loop and drives a Run:

    with Run(args, stage="clip") as run:                   # join the processes, lock the run folder
        pairs = run.open_pairs()
        ...                                                # build the model and the optimizer
        run.start(model, optimizer, pairs, model.config)   # length of the run; restore a checkpoint
        loader = run.open_loader(pairs, tokenizer)
        for step, batch in run.steps(loader):
            ...                                            # forward pass, loss
            run.backward(loss)
            grad_norm = run.optimizer_step()
            run.log(step, loss, grad_norm)
            run.save_if_due(step)

The same code runs under `python` and under `torchrun`, in one process or in many. After the weights
are initialized, all randomness is a function of the seed and the sample index (crops.py). So a
checkpoint needs no state of generators: it is the weights, the optimizer's state and the number of
steps done. Until the first step is done, the run's folder holds nothing but its lock.

From top to bottom: command-line flags, the run, processes, precision and compilation. folder.py has
the lock, the checks of checkpoints, and the log; optimizer.py the optimizers and the schedule.

Not included: sharded weights and optimizers (these models fit on one GPU).
"""

import contextlib
import ctypes
import json
import math
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import demo
from command import number, one_line
from folder import (
    FolderLock,
    Log,
    check_checkpoint,
    check_free_space,
    flatten,
    link_or_copy,
    older_checkpoints,
)
from kelip import (
    PRESETS,
    Block,
    check_vocabulary,
    entry,
    load_checkpoint,
    load_weights,
    read_run,
    save_checkpoint,
)
from optimizer import learning_rate, load_optimizer
from tokenizer import atomic_write

FEW_STEPS = 100  # a run of fewer steps learns little, and is warned about
MAX_GRAD_NORM = 1.0
MAX_WORKERS = 512
MAX_LR = 1000
MAX_WEIGHT_DECAY = 1000


def add_arguments(parser, out, lr, batch_size, epochs):
    """Add the flags of both stages to a parser, with this stage's defaults."""
    add = parser.add_argument
    add("--data", nargs="+", default=[f"{demo.DEMO}/train-*.tar"], metavar="SHARDS",
        help="training pairs: tar files, folders, globs or brace ranges; optionally ::WEIGHT and "
             "::LANGUAGE (of captions that name none) after each, as in 'ko-*.tar::2::ko'; "
             "@LIST is a text file of these, one a line; docs/data.md has more options (default: "
             "the demo's pairs, which are packed on first use)")
    add("--model", metavar="PRESET",
        help="a preset of kelip.py: tiny, ViT-S/16, ViT-B/32, ViT-B/16, ViT-L/14 (default: tiny)")
    add("--out", default=out, metavar="FOLDER", help=f"folder of the run (default: {out})")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--batch-size", type=number(int, 1, 1 << 24), default=batch_size, metavar="N",
        help=f"pairs per step, of all processes together (default: {batch_size})")
    add("--epochs", type=number(float, above=0, high=1e6), default=epochs, metavar="N",
        help=f"epochs to train (default: {epochs:g})")
    add("--steps", type=number(int, 1, 1 << 40), metavar="N",
        help="steps to train; overrides --epochs")
    add("--warmup", type=number(int, 0, 1 << 40), metavar="N",
        help="steps of linear warm-up (default: 2,000, at most 10 %% of the run)")
    add("--lr", type=number(float, 0, MAX_LR), metavar="X",
        help=f"peak learning rate (default: {lr})")
    add("--optimizer", choices=["adamw", "muon"],
        help="muon trains the matrices of the transformer blocks with Muon, at three times the "
             "learning rate, and the rest with AdamW (default: muon for tiny, else adamw)")
    add("--precision", choices=["auto", "fp64", "fp32", "bf16", "fp16"], default="auto",
        help="auto is bf16 where the hardware multiplies it fast, else fp32 (default: auto)")
    add("--compile", action="store_true",
        help="torch.compile the transformer blocks and the contrastive loss: slower to start, "
             "faster on GPUs")
    add("--seed", type=number(int, 0, (1 << 63) - 1), default=0, metavar="N",
        help="seed of the initial weights, the order of samples and the crops (default: 0)")
    add("--workers", type=number(int, 0, MAX_WORKERS), metavar="N",
        help="decoding processes per training process (default: 0 on a CPU, 8 on a GPU)")
    add("--save-every", type=number(int, 1, 1 << 40), default=1000, metavar="N",
        help="steps between checkpoints (default: 1000)")
    add("--keep", type=number(int, 1, 1 << 20), default=2, metavar="N",
        help="checkpoints to keep: last.pt and the step-*.pt before it (default: 2)")


def check_preset(name):
    """Raise ValueError unless --model names a preset, or is not given."""
    if name not in (None, *PRESETS):
        raise ValueError(f"--model {name}: no such preset; choose from {', '.join(PRESETS)}")


def check_scale(flag, scale):
    """Raise ValueError unless the values of a flag are fractions with 0 < low <= high <= 1."""
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"{flag} {low:g} {high:g}: must be two fractions of the image's area, the "
                         "lower one first, such as 0.4 1")


# Flags that may change when a run is resumed. The number of steps may not, whatever --epochs says.
MAY_CHANGE = {"data", "out", "resume", "workers", "save_every", "keep", "compile",
              "micro_batch", "init", "evals", "test", "tokenizer", "epochs", "new_text"}


# ---- the run ----

class Run:
    """A training run, driven by a script. The module's docstring shows the order of the calls.

    Attributes: rank, world_size, device and group (the process group, None for one process), as
    torch.distributed calls them; is_rank_zero, whether this process writes files and prints;
    folder; unit, what the log counts; checkpoint, the dict to resume from, None for a new run;
    after start() also total_steps; config, what config.json holds; and best, the step and score of
    best.pt.

    It is a context manager, since it locks its folder. A run that fails before its first step
    leaves the folder as it was.

    Raises ValueError when another process writes into the folder, or when it holds a run and
    --resume is not given; FileNotFoundError when there is nothing to resume.
    """

    def __init__(self, args, stage, unit="images"):
        self.args, self.stage, self.unit = args, stage, unit
        self.rank, self.world_size, self.device, self.group = _join_processes()
        self.is_rank_zero = self.rank == 0
        self.folder = Path(args.out)
        args.precision, self._precision_reason = choose_precision(args.precision, self.device)
        # The dtype of autocast, None for none.
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
        self.has_begun = False  # whether a step is done
        self._log = self._stop_signal = None
        self._lock = FolderLock(self.folder) if self.is_rank_zero else None
        try:
            self.checkpoint = self._open_checkpoint()
        except (OSError, ValueError):
            self._release_folder()
            raise

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        if self._log and self._log.bar:
            self._log.bar.close()
        if self._stop_signal:
            self._stop_signal.restore_handlers()
        self._release_folder()
        if self.group is not None and error is None:
            self.barrier()
            dist.destroy_process_group()

    def _release_folder(self):
        if self._lock:
            self._lock.release(remove_folder=not self.has_begun)
            self._lock = None

    def _open_checkpoint(self):
        """The checkpoint in the folder, to resume from; None for a new run."""
        last, checkpoint = self.folder / "last.pt", None
        # When a process fails, torchrun restarts all of them, and they resume without --resume. But
        # not a run that this torchrun did not begin: its first attempt was refused.
        store = _agent_store() if self.is_rank_zero else None
        began = self.broadcast(store is not None and store.check([f"began {self.folder}"]))
        if last.exists():
            if not (self.args.resume or began):
                raise ValueError(f"{self.folder} holds a run already: add --resume to continue it, "
                                 "or choose another --out")
            checkpoint = self._read_checkpoint(last)
        elif self.args.resume:
            raise FileNotFoundError(f"{last}: no run to resume; start one without --resume")
        elif older := [*self.folder.glob("best.pt"), *older_checkpoints(self.folder)]:
            raise ValueError(f"{self.folder} holds checkpoints of an older run, such as "
                             f"{older[-1].name}: choose another --out, or delete them")
        if self.is_rank_zero:
            for temporary in self.folder.glob(".*.pt.*"):  # of a process killed while it wrote
                if temporary.suffix[1:].isdecimal() and temporary.is_file():
                    temporary.unlink()
        if store is not None:
            store.set(f"began {self.folder}", "")
        return checkpoint

    def _read_checkpoint(self, last):
        """The content of last.pt. Raises ValueError if no run of this stage can resume from it."""
        try:
            checkpoint = load_checkpoint(last)
            check_checkpoint(checkpoint, last)
            found = read_run(last, checkpoint)
            if found.is_stage_1 != (checkpoint["config"]["stage"] in ("mae", "generate")):
                raise ValueError(f"{last}: its stage and its weights do not fit")
            if not found.is_stage_1:
                check_vocabulary(found)
        except ValueError as error:
            older = [path.name for path in older_checkpoints(self.folder)][-1:]
            hint = f"; {older[0]} in the same folder can replace it" if older else ""
            raise ValueError(f"{error}{hint}") from None
        if checkpoint["config"]["stage"] != self.stage:
            raise ValueError(f"{self.folder} holds a run of another stage, "
                             f"{checkpoint['config']['stage']:.20}: choose another --out")
        return checkpoint

    def open_pairs(self, pairs_class=data.Pairs, **options):
        """The training pairs of --data. The demo's pairs are packed when missing.

        pairs_class: data.Pairs, or a class like it. It is called with --data, the state to resume
        from and these options.

        Prints a description. Raises ValueError when a resumed run's shards have changed or most of
        them are missing, or the processes have different shards. Pairs in missing shards are
        skipped.
        """
        args, checkpoint = self.args, self.checkpoint
        with self.rank_zero_first():
            uses_demo = any(source.startswith(demo.DEMO) for source in args.data)
            if uses_demo and not os.path.exists(demo.DEMO):
                demo.pack_emoji(demo.DEMO)
            pairs = pairs_class(args.data, checkpoint and checkpoint["data"], **options)
        if checkpoint:
            _check_shards(pairs)
        if self.group is not None:
            self._check_same_shards(pairs)
        if self.is_rank_zero:
            print(pairs.describe(), flush=True)
        return pairs

    def start(self, module, optimizer, pairs, model_config, evaluations=0, tokenizer=None,
              padded_size=None):
        """Fix the length of the run, and restore the checkpoint if there is one.

        Checkpoints hold module, optimizer and tokenizer. evaluations: how many times evaluates_at
        is true, the last time at the end. padded_size: the side of the square to which the loader
        pads images that are large enough; it is less if they are smaller. Raises ValueError when
        the pairs or the epochs are less than a batch or a run is resumed with other settings,
        OSError when the disk has no room for the checkpoints.
        """
        args = self.args
        if args.batch_size > len(pairs):
            raise ValueError(f"--batch-size {args.batch_size}: there are {len(pairs):,} pairs to "
                             f"train on, fewer than a batch: at most --batch-size {len(pairs)}")
        steps = args.steps
        if not steps:
            samples_per_epoch = data.Order(pairs, args.seed).samples_per_epoch
            steps = int(args.epochs * samples_per_epoch // args.batch_size)
        if steps < 1:
            raise ValueError(f"{args.epochs:g} epochs of {len(pairs):,} pairs are fewer than one "
                             f"batch: raise --epochs, or lower --batch-size {args.batch_size}")
        warmup = args.warmup
        if warmup is None:
            warmup = min(2000, max(1, steps // 10))
        flags = {key: value for key, value in vars(args).items() if key != "model"}
        self.config = {"stage": self.stage, "preset": args.model, "model": dict(model_config),
                       **flags, "pairs": len(pairs), "steps": steps, "warmup": warmup,
                       "padded_size": padded_size}
        if not self.checkpoint:
            self.config["padded_size"] = data.fit_padded_size(padded_size, pairs)
        self.module, self.optimizer, self.tokenizer = module, optimizer, tokenizer
        self.total_steps, self.warmup = steps, warmup
        self.first_step = 0
        self.saved_step = None
        self.best = self._read_best()
        evaluations = min(evaluations, steps)
        self.evaluation_steps = {round(steps * i / evaluations) for i in range(1, evaluations + 1)}
        # Scales the loss under fp16, whose gradients would underflow. Disabled otherwise.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if self.checkpoint:
            self._restore()
        if self.is_rank_zero:
            saves = (steps // args.save_every - self.first_step // args.save_every
                     + max(1, len(self.evaluation_steps)))
            has_best = self.stage == "clip" and bool(self.evaluation_steps)
            check_free_space(self.folder, module, args.keep, min(saves, steps - self.first_step),
                             has_best)
            if steps < FEW_STEPS:
                print(f"{steps} steps are few, and teach a model little: raise --epochs, or lower "
                      f"--batch-size {args.batch_size}")
        self._log = Log(self)

    def _restore(self):
        """Load weights, optimizer and step from the checkpoint."""
        path = self.folder / "last.pt"
        before = self.checkpoint["config"]
        fitted, largest = before["padded_size"], self.config["padded_size"]
        if not 1 <= fitted <= largest:
            raise ValueError(f"{path}: config.padded_size is {fitted}, where the crops need at "
                             f"most {largest}")
        self.config["padded_size"] = fitted
        for key, value in self.config.items():
            was = before.get(key)
            # As JSON, in which 1 is not true, and a tuple is a list.
            if json.dumps(was) == json.dumps(value):
                continue
            if key == "precision" and "fp64" not in (was, value):
                if self.is_rank_zero:
                    print(one_line(f"--precision was {was!s:.100} and is now {value}"))
            elif key not in MAY_CHANGE:
                flag = "--precision" if key == "precision" else key
                raise ValueError(f"{path}: {flag} was {was!s:.100} and is now {value}: "
                                 "set it back to resume, or choose another --out")
        step = self.checkpoint["step"]
        if not 0 <= step <= self.total_steps:
            raise ValueError(f"{path}: step is {step}, but the run has {self.total_steps} steps")
        load_weights(self.module, self.checkpoint["model"], path)
        load_optimizer(self.optimizer, self.checkpoint["optimizer"], step, path)
        saved = self.checkpoint["scaler"]
        if self.scaler.is_enabled() and saved:  # empty if --precision was another
            scale = entry(saved, "scale", float, f"{path}: scaler.")
            good_steps = entry(saved, "_growth_tracker", int, f"{path}: scaler.")
            if not 0 < scale < math.inf or not 0 <= good_steps < 1 << 31:
                raise ValueError(f"{path}: the state of the gradient scaler is damaged")
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale,
                                         "_growth_tracker": good_steps})
        self.first_step = self.saved_step = step

    def _check_same_shards(self, pairs):
        """Raise ValueError, on all ranks, unless all have the same shards.

        Each rank takes its part of every batch, in an order that follows from the shards.
        """
        differs = self.broadcast(pairs.state()) != pairs.state()
        count = int(self.sum_over_ranks(torch.tensor(differs, dtype=torch.int, device=self.device)))
        if count:
            raise ValueError(f"--data: {count} of {self.world_size} processes have other shards "
                             "than rank zero: name the same shards, in the same order, on every "
                             "node")

    def open_loader(self, pairs, tokenizer, loader_class=data.Loader):
        """This rank's data.Loader, from the first sample that is not yet used."""
        args = self.args
        workers = args.workers
        if workers is None:
            workers = 8 if self.device.type == "cuda" else 0
        return loader_class(
            pairs, tokenizer, args.batch_size, self.config["padded_size"], args.seed,
            first=self.first_step * args.batch_size, steps=self.total_steps - self.first_step,
            rank=self.rank, world_size=self.world_size, workers=workers,
            context_length=self.config["model"]["context_length"],
            pin_memory=self.device.type == "cuda")

    def data_parallel(self, module):
        """The module in DistributedDataParallel; for a single process, the module itself."""
        if self.group is None:
            return module
        # Without device_ids, inputs stay where they are: encode_text wants tokens on the CPU.
        return DistributedDataParallel(module, gradient_as_bucket_view=True)

    def announce(self, what):
        """Print what the run trains, for how long, and on what. what: the model, as text."""
        if self.is_rank_zero:
            args = self.args
            epochs = self.total_steps * args.batch_size / self.config["pairs"]
            print(one_line(f"{what}; {self.total_steps:,} steps of {args.batch_size} of "
                           f"{self.config['pairs']:,} pairs, {epochs:.1f} epochs"))
            print(f"device: {self.world_size} x {_device_name(self.device)}; precision: "
                  f"{args.precision} ({self._precision_reason})", flush=True)

    # -- the loop --

    def steps(self, loader):
        """Yield (step, batch), with the learning rate set, until the end of the run.

        step counts from 1: it is the number of steps that are done when the loop's body ends.
        """
        self._stop_signal = _StopSignal(self)
        self._log.begin(loader)
        batches = iter(loader)
        for step in range(self.first_step + 1, self.total_steps + 1):
            start = time.perf_counter()
            batch = next(batches)
            self._log.data_wait += time.perf_counter() - start
            lr = learning_rate(step - 1, self.total_steps, self.warmup, self.args.lr)
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr_factor"] * lr
            yield step, batch
        self._log.bar.close()
        self._stop_signal.restore_handlers()

    def autocast(self):
        """The context of the forward pass: --precision's dtype for matrix products."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss):
        """The backward pass from a loss, which is scaled under fp16."""
        self.scaler.scale(loss).backward()

    def optimizer_step(self):
        """Clip the gradients, update the weights, clear the gradients.

        Returns the norm of the gradients before clipping, a tensor. Gradients that are not finite
        skip the step. All ranks skip it together, since all have the same gradients.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM).detach()
        if not self.scaler.is_enabled():  # the scaler sets this itself
            # The optimizer reads it on the device. An `if` here would wait for the device.
            self.optimizer.found_inf = 1 - grad_norm.isfinite().float()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def log(self, step, loss, grad_norm, **metrics):
        """Collect the metrics of a step, and at log steps write a line to metrics.jsonl.

        A metric is a scalar tensor, which is averaged over steps and ranks; or a pair of tensors
        (values, where) of equal shape, which is averaged over the values where `where` is True, of
        all steps and ranks. Metrics stay on the device until a line is written.

        Raises ValueError when gradients stay non-finite, and when most pairs cannot be read.
        """
        log = self._log
        finite = grad_norm.isfinite()
        log.add("loss", loss.detach())
        log.add("grad_norm", grad_norm, where=finite)
        if self.scaler.is_enabled():
            # Finite losses with infinite gradients are how the scaler finds the largest scale.
            log.add("overflow", loss.detach().isfinite() & ~finite)
            log.add("skipped", ~loss.detach().isfinite())
        else:
            log.add("skipped", ~finite)
        for name, metric in metrics.items():
            values, where = metric if isinstance(metric, tuple) else (metric, None)
            log.add(name, values, where)
        log.end_step()
        self._stop_signal.agree()
        if not self.has_begun:
            self._write_settings()
        if log.is_due(step) or self._stop_signal.agreed:
            group = self.optimizer.param_groups[0]
            log.write(step, group["lr"] / group["lr_factor"])
            log.check(step)

    def _write_settings(self):
        """After the first step: write config.json and tokenizer.json."""
        self.has_begun = True
        path = self.folder / "config.json"
        if self.is_rank_zero and not (self.checkpoint and path.exists()):
            text = json.dumps(self.config, indent=1, ensure_ascii=False)
            with atomic_write(path) as file:
                file.write(text.encode("utf-8", "backslashreplace"))  # paths may not be UTF-8
        if self.is_rank_zero and self.tokenizer:
            self.tokenizer.save(self.folder / "tokenizer.json")

    def save_if_due(self, step):
        """Save a checkpoint every --save-every steps, before evaluations and at the end.

        After a signal, saves and raises SystemExit.
        """
        stopping = self._stop_signal.agreed
        if (stopping or step % self.args.save_every == 0 or step == self.total_steps
                or step in self.evaluation_steps):
            self._save(step)
        if stopping:
            line = (f"{self._stop_signal.name} at step {step} of {self.total_steps}: saved "
                    f"{self.folder}/last.pt; continue with --resume")
            self._log.bar.close()
            raise SystemExit(line if self.is_rank_zero else 1)

    def _save(self, step):
        """Write last.pt. The previous one is kept as step-N.pt; --keep counts both."""
        if self.is_rank_zero and step != self.saved_step:
            last, keep = self.folder / "last.pt", self.args.keep
            state = {
                **self._model_state(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "step": step,
                "data": self._log.loader.pairs.state()}
            if not torch.stack([x.isfinite().all() for x in state["model"].values()]).all():
                raise ValueError(f"the weights are not finite after step {step}: "
                                 f"{self._log.advice()}")
            if self.saved_step is not None and keep > 1:
                link_or_copy(last, self.folder / f"step-{self.saved_step}.pt")
            save_checkpoint(last, state)
            older = older_checkpoints(self.folder)
            for path in older[:max(0, len(older) - keep + 1)]:
                path.unlink()
        self.saved_step = step

    def save_best(self, step, score):
        """Write best.pt, the weights alone, if this score is the highest so far. For rank zero."""
        if score > self.best["score"]:
            self.best = {"step": step, "score": score}
            save_checkpoint(self.folder / "best.pt", {**self._model_state(), **self.best})

    def _read_best(self):
        """The step and the score of best.pt, which a resumed run must not replace by a worse one.
        """
        path, best = self.folder / "best.pt", {"step": 0, "score": -1.0}
        if self.is_rank_zero and path.exists():
            state = load_checkpoint(path)
            config = entry(state, "config", dict, f"{path}: ")
            if config.get("test") == self.config.get("test"):  # else scores do not compare
                for key, value in best.items():
                    best[key] = entry(state, key, type(value), f"{path}: ")
        return best

    def _model_state(self):
        """What kelip.build_model needs of a checkpoint."""
        state = {"model": self.module.state_dict(), "config": self.config}
        if self.tokenizer:
            state["tokenizer"] = json.dumps(self.tokenizer.spec, ensure_ascii=False)
        return state

    def evaluates_at(self, step):
        """Whether an evaluation is due after this step, and not in the log yet.

        If a run was killed after it saved and before it evaluated, this is true when it resumes.
        """
        return step in self.evaluation_steps and step not in self._log.evaluated

    @contextlib.contextmanager
    def evaluation(self, step):
        """The other ranks wait while rank zero evaluates. The log's rates do not count this time.

        The checkpoint is saved already, so if the evaluation fails, a line says so and the run
        continues.
        """
        start = time.perf_counter()
        try:
            yield
        except (OSError, ValueError) as error:
            self._log.say(f"the evaluation at step {step} failed, and training continues: {error}")
        self.barrier()
        self._log.since += time.perf_counter() - start

    def log_evaluation(self, step, values):
        """Write a line of results to metrics.jsonl. Keys of nested dicts are joined by "/"."""
        self._log.append({"step": step, **flatten(values)})

    # -- ranks --

    @contextlib.contextmanager
    def rank_zero_first(self):
        """Rank zero runs the block first, so that the other ranks find the files that it writes."""
        if not self.is_rank_zero:
            self.barrier()
        try:
            yield
        finally:  # on an error, too: the others would wait for rank zero
            if self.is_rank_zero:
                self.barrier()

    def broadcast(self, value):
        """Rank zero's value, on all ranks. Others pass anything."""
        values = [value]
        if self.group is not None:
            dist.broadcast_object_list(values, 0, self.group, device=self.device)
        return values[0]

    def sum_over_ranks(self, tensor):
        """The sum of a tensor over all ranks."""
        tensor = tensor.clone()
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def barrier(self):
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(self.group)


def _check_shards(pairs):
    """Raise ValueError when a resumed run's shards have changed, or most of them are missing."""
    for error in ("shard changed", "shard missing"):
        affected = [shard for shard in pairs.shards if error in shard.skipped]
        if affected and (error == "shard changed" or 2 * pairs.skipped[error] > len(pairs)):
            shard = affected[0]
            raise ValueError(
                f"--data: {error}: {shard.path}, which had {shard.count:,} pairs and "
                f"{shard.size:,} bytes when the run began; restore it, or choose another --out")


# ---- processes ----

def _join_processes():
    """Join the processes that torchrun started: (rank, world_size, device, group)."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing and "WORLD_SIZE" in os.environ:
        raise ValueError(f"WORLD_SIZE is set, but not {', '.join(missing)}: start with torchrun, "
                         "or unset WORLD_SIZE and RANK for one process")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError("torchrun --nproc-per-node: each process needs a GPU, and this "
                             f"machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        device = torch.device("cpu")
        _keep_freed_memory()
    if world_size == 1:
        return 0, 1, device, None
    rank = int(os.environ["RANK"])
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Ranks wait for rank zero while it evaluates, or trains a tokenizer: longer than the default.
    dist.init_process_group(backend, store=_rendezvous(rank, world_size), rank=rank,
                            world_size=world_size, timeout=timedelta(hours=2))
    return rank, world_size, device, dist.group.WORLD


def _end_with_parent():
    """Tell Linux to kill this process when torchrun ends, or it would continue alone.

    Not for a process without torchrun: a run under nohup must outlive its shell.
    """
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        PR_SET_PDEATHSIG = 1  # prctl.h
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _keep_freed_memory():
    """Tell glibc to keep freed memory instead of returning it to the system.

    By default it returns large blocks, and every step asks for them again, page by page. Keeping
    them makes a step on a CPU a sixth faster.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _agent_store():
    """torchrun's own key-value store, which outlives the processes that it restarts, or None."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False)


def _rendezvous(rank, world_size, seconds=600):
    """The key-value store through which the processes of this attempt find each other.

    torchrun's own store outlives the processes that it restarts. In it, restarted processes would
    find the addresses of the failed ones and wait for them. So rank zero opens a new store, and
    publishes its port in torchrun's. A rank that reads the port of a failed attempt cannot connect,
    and reads again. Raises TimeoutError.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=seconds)
    end = time.monotonic() + seconds
    agent_store = _agent_store()
    if agent_store is None:  # not started by torchrun
        return dist.TCPStore(address, port, world_size, rank == 0, timeout, wait_for_workers=False)
    agent_store.set_timeout(timeout)
    if rank == 0:
        store = dist.TCPStore(address, 0, world_size, True, timeout, wait_for_workers=False)
        agent_store.set("rank 0", str(store.port))
    while time.monotonic() < end:
        with contextlib.suppress(dist.DistNetworkError):
            if rank > 0:
                store = dist.TCPStore(address, int(agent_store.get("rank 0")), world_size, False,
                                      timedelta(seconds=5), wait_for_workers=False)
                store.set_timeout(timeout)
                store.add("arrived", 1)
                return store
            if store.add("arrived", 0) == world_size - 1:
                agent_store.delete_key("rank 0")  # for the next attempt
                return store
        time.sleep(0.05)
    raise TimeoutError(f"rank {rank}: only some of {world_size} processes connected to {address} "
                       f"within {seconds} seconds")


class _StopSignal:
    """SIGTERM, SIGUSR1 and Ctrl-C end a run after a step on which all ranks agree."""

    def __init__(self, run):
        self.name = ""
        self.agreed = False
        # The ranks exchange a flag at each step, on the CPU and without waiting: it is read one
        # step later. So a GPU never waits for it.
        self._group = run.group and dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        self._pending = None  # (work, flag) of the last step
        self._previous = {name: signal.signal(name, self._handle)
                          for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def restore_handlers(self):
        """After the loop, signals end the process as usual."""
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def _handle(self, number, frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C ends the run at once
        self.name = signal.Signals(number).name

    def agree(self):
        """Set `agreed`, the same on all ranks: whether any of them has had a signal."""
        if self._group is None:
            self.agreed = bool(self.name)
            return
        if self._pending:
            work, flag = self._pending
            work.wait()
            self.agreed = bool(flag)
        flag = torch.tensor(float(bool(self.name)))
        self._pending = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True), flag
        if self.agreed and not self.name:
            self.name = "a signal to another process"


# ---- precision and compilation ----

def choose_precision(name, device):
    """The precision for 'auto', 'fp64', 'fp32', 'bf16' or 'fp16', and why, as text.

    'auto' is bfloat16 where matrix units support it: GPUs since Ampere, and CPUs with AMX or
    AVX-512's bfloat16 instructions.
    """
    if name != "auto":
        return name, "from --precision"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp32", f"compute capability {major}.{minor}"
    flags = _cpu_flags()
    for flag, feature in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 bfloat16")):
        if flag in flags:
            return "bf16", f"the CPU has {feature}"
    return "fp32", "the CPU has neither AMX nor AVX-512 bfloat16"


def weight_dtype(precision):
    """The dtype of weights and optimizer state: float64 under fp64, else float32."""
    return torch.float64 if precision == "fp64" else torch.float32


def compile_blocks(module):
    """torch.compile every transformer block by itself.

    The blocks of an encoder share their code, so that compiling takes a minute. State dicts keep
    their names.
    """
    for block in module.modules():
        if isinstance(block, Block):
            block.compile(dynamic=True)
            block.forward_one = torch.compile(block.forward_one, dynamic=True)


def _device_name(device):
    """The name of a GPU, or the threads of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_flags():
    """The instruction sets of this CPU, as Linux names them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split())
    return set()
