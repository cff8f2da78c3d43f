"""The folder of a run: its lock, its checkpoints and its log.

    runs/clip/last.pt            the last checkpoint: weights, optimizer, step, settings
              step-500.pt        the one before it
              best.pt            the weights with the highest R@1 on the test pairs
              metrics.jsonl      one line for every ten steps, and one for each evaluation
              .lock              while a process trains

trainer.Run uses these pieces. From top to bottom: FolderLock, checks of a checkpoint and of the
disk, and Log, which writes metrics.jsonl and shows the progress bar.

Not included: experiment trackers.
"""

import contextlib
import json
import math
import os
import shutil
import socket
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from command import one_line
from kelip import entry
from tokenizer import atomic_write, check_is_file, read_file

LOG_EVERY = 10       # steps between lines of the log
BAD_STEPS = 10       # steps in a row with non-finite gradients that end a run
SKIPPED_STEPS = 200  # steps after which a run ends if more than half of its pairs were skipped


# ---- the lock ----

class FolderLock:
    """Makes a folder, and keeps other processes from writing a run into it.

    The lock is on its file .lock, and ends with the process. Raises ValueError when another process
    has it.
    """

    def __init__(self, folder):
        import fcntl  # not on Windows
        # A link would be followed to a file of the user, and a pipe would block.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        self.path = folder / ".lock"
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self.path, flags, 0o644)
            check_is_file(self.path)
            self.file = open(descriptor, "r+", encoding="utf-8")
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                self.file.seek(0)
                holder = self.file.read().strip()
                raise ValueError(f"{folder}: {holder or 'another process'} writes a run there: end "
                                 "it first, or choose another --out") from None
            except OSError:  # a file system without locks
                pass
            with contextlib.suppress(OSError):  # the file may have been removed by its last holder
                if os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                    break
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self, remove_folder):
        """Remove the lock and, if `remove_folder` is true, the folders made for it."""
        self.path.unlink(missing_ok=True)
        self.file.close()
        if remove_folder:
            with contextlib.suppress(OSError):  # not empty
                for path in self.made:
                    path.rmdir()


# ---- checkpoints ----

def older_checkpoints(folder):
    """The checkpoints before last.pt, oldest first."""
    found = [path for path in folder.glob("step-*.pt")
             if path.stem.removeprefix("step-").isdecimal() and path.is_file()]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step-")))


def check_checkpoint(checkpoint, path):
    """Raise ValueError unless a checkpoint has all that a run is resumed from."""
    kinds = {"config": dict, "model": dict, "optimizer": dict, "scaler": dict, "step": int,
             "data": dict}
    for key, kind in kinds.items():
        entry(checkpoint, key, kind, f"{path}: ")
    config = {"is_from_stage_1": False, **checkpoint["config"]}  # that of stage 1 has no such key
    for key, kind in {"stage": str, "preset": str, "model": dict, "padded_size": int, "lr": float,
                      "is_from_stage_1": bool}.items():
        entry(config, key, kind, f"{path}: config.")
    if not 0 <= config["lr"] <= 1000:
        raise ValueError(f"{path}: config.lr, {config['lr']}, is out of range")
    for key, value in config.items():  # all others are compared with the flags
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"{path}: config.{key!s:.40} is not a plain value, as JSON has "
                             "them") from None
    shards = entry(checkpoint["data"], "shards", list, f"{path}: data.")
    options = entry(checkpoint["data"], "options", list, f"{path}: data.")
    if [type(x) for x in options] != [str] * len(shards):
        raise ValueError(f"{path}: its list of sources is damaged")
    for source in shards:
        for shard in source if isinstance(source, list) else [None]:
            # [file name, bytes, pairs, digest]: see data.Pairs.state
            if (not isinstance(shard, list) or [type(x) for x in shard] != [str, int, int, str]
                    or not 0 <= shard[2] <= shard[1] < 1 << 60):
                raise ValueError(f"{path}: its list of shards is damaged")


def check_free_space(folder, module, keep, saves, has_best=False):
    """Raise OSError when the disk has no room for the next checkpoints of a module.

    keep: how many are kept. saves: how many are written at most. has_best: whether there will be a
    best.pt.
    """
    # AdamW keeps two numbers for each weight that is trained.
    one = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1)
              for p in module.parameters())
    existing = len(older_checkpoints(folder)) + (folder / "last.pt").exists()
    count = 1 + max(0, min(keep - existing, saves - 1))  # one more than is kept while it is written
    needed, free, best = one * count, shutil.disk_usage(folder).free, ""
    if has_best and not (folder / "best.pt").exists():
        needed += sum(p.numel() * p.element_size() for p in module.parameters())
        best = " and best.pt"
    if needed > free:
        raise OSError(f"{folder}: its disk has {free / 1e9:.1f} GB free, and {count} more "
                      f"checkpoint(s) of {one / 1e9:.1f} GB{best} need {needed / 1e9:.1f} GB: make "
                      "room, or lower --keep")


def link_or_copy(path, name):
    """Give a file a second name, or copy it if the file system has no hard links."""
    if name.exists():
        return
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


# ---- the log ----

class Log:
    """The progress bar and metrics.jsonl. Metrics are summed on the device between log steps."""

    def __init__(self, run):
        self.run, self.loader = run, None
        self.path = run.folder / "metrics.jsonl"
        self.bad_steps = 0      # steps in a row that were skipped
        self.skipped_pairs = 0  # of all ranks, since this process began
        self.one = torch.ones((), device=run.device)
        evaluated = _drop_lines_after(self.path, run.first_step) if run.is_rank_zero else None
        self.evaluated = run.broadcast(evaluated)  # steps whose evaluation is in the log
        self.bar = None
        self.since = 0.0

    def begin(self, loader):
        """Show the progress bar, and begin the first line."""
        run, self.loader = self.run, loader
        self.bar = tqdm(total=run.total_steps, initial=run.first_step, unit="step",
                        disable=not run.is_rank_zero, dynamic_ncols=True, file=sys.stdout)
        self.reset()

    def reset(self):
        """Begin the next line."""
        self.sums = {}       # name -> float32 [2], a sum of values and their number
        self.n_steps = 0
        self.data_wait = 0.0
        self.skipped_before = sum(self.loader.skipped.values())
        self.since = time.perf_counter()

    def add(self, name, values, where=None):
        """Add a scalar, or the values at which `where` is True."""
        if where is None:
            total, count = values, self.one
        else:
            total = values.where(where, 0).sum()  # not values * where: 0 * NaN is NaN
            count = where.sum()
        pair = torch.stack([total.float(), count.float()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def is_due(self, step):
        """Whether a line is due. This depends on the step alone, so logs of two runs compare."""
        return step == 1 or step % LOG_EVERY == 0 or step == self.run.total_steps

    def end_step(self):
        self.n_steps += 1
        self.bar.update()

    def write(self, step, lr):
        """Write a line of means since the last one. Between lines, nothing waits for the device."""
        run = self.run
        seconds = time.perf_counter() - self.since
        skipped_pairs = sum(self.loader.skipped.values()) - self.skipped_before
        self.sums["skipped_pairs"] = torch.tensor([skipped_pairs, 1.0], device=run.device)
        names = sorted(self.sums)
        table = torch.stack([self.sums[name] for name in names])             # [metrics, 2]
        if run.group is not None:
            dist.all_reduce(table, group=run.group)
        means = {}
        for name, (total, count) in zip(names, table.tolist()):
            if count:
                means[name] = total / count
        # Only this is a sum: of all ranks, since the last line.
        self.last_skipped = round(means.pop("skipped_pairs") * run.world_size)
        self.skipped_pairs += self.last_skipped
        self.last_pairs = run.args.batch_size * self.n_steps
        self.bad_steps = self.bad_steps + self.n_steps if means["skipped"] == 1 else 0
        self.append({
            "step": step, "lr": lr, **means, f"{run.unit}_per_second": self.last_pairs / seconds,
            "data_wait": self.data_wait / seconds, "memory_gb": _peak_memory(run.device) / 1e9,
            "skipped_pairs": self.skipped_pairs})
        self.bar.set_postfix_str(f"loss {means['loss']:.3f}, "
                                 f"{self.last_pairs / seconds:.0f} {run.unit}/s")
        left = run.total_steps - step
        if left and self.n_steps > 1 and step - run.first_step < 2 * LOG_EVERY:  # the first time
            self.say(f"{left:,} more steps at {seconds / self.n_steps:.2f} seconds each: about "
                     f"{seconds / self.n_steps * left / 60:.1f} minutes, without evaluations")
        self.reset()

    def say(self, text):
        """Print a line above the progress bar."""
        if self.run.is_rank_zero:
            tqdm.write(one_line(text), file=sys.stdout)

    def check(self, step):
        """Raise ValueError when training cannot succeed. Called after a line is written."""
        run, steps_done = self.run, step - self.run.first_step
        pairs_done = run.args.batch_size * steps_done
        if self.last_skipped == self.last_pairs or (
                steps_done >= SKIPPED_STEPS and 2 * self.skipped_pairs > pairs_done):
            raise ValueError(f"{self.skipped_pairs:,} of {pairs_done:,} pairs could not be used: "
                             f"{self.loader.report()}")
        # A run does not succeed if it ends with such steps.
        if self.bad_steps >= (1 if step == run.total_steps else BAD_STEPS):
            raise ValueError("the loss or the gradients were not finite in the last "
                             f"{self.bad_steps} step(s): {self.advice()}")

    def advice(self):
        """How to continue when the loss, the gradients or the weights are not finite."""
        run, again = self.run, "start again"
        if run.saved_step:
            again = (f"start from the last good checkpoint, {run.folder}/last.pt of step "
                     f"{run.saved_step}, with --init")
        return f"{again}, a lower --lr and another --out"

    def append(self, line):
        """Add a line to metrics.jsonl. JSON has no NaN and infinity: they become null."""
        if not self.run.is_rank_zero:
            return
        for key, value in line.items():
            if isinstance(value, float):
                line[key] = float(f"{value:.6g}") if math.isfinite(value) else None
        # A new run replaces the log of another one that was killed before its first checkpoint.
        mode = "w" if line["step"] == 1 and "lr" in line else "a"
        try:
            with open(self.path, mode, encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:  # a full disk is an error without a path
            raise OSError(error.errno, error.strerror, str(self.path)) from None


def _drop_lines_after(path, step):
    """Remove the lines of metrics.jsonl that a resumed run will write again.

    Returns the steps of the evaluations that remain. Damaged lines are removed, too: the last one
    may be cut short.
    """
    if os.path.lexists(path):
        check_is_file(path)  # a pipe would block, also when it is written
    if not step or not path.exists():
        return set()
    kept, damaged, evaluated = [], 0, set()
    for text in read_file(path).decode("utf-8", "replace").splitlines():
        try:
            line = json.loads(text)
            is_before = line["step"] <= step
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged += 1
            continue
        if is_before:
            kept.append(text + "\n")
            if "loss" not in line:
                evaluated.add(line["step"])
    if damaged:
        print(one_line(f"{path}: damaged lines removed: {damaged}"))
    with atomic_write(path) as file:
        file.write("".join(kept).encode())
    return evaluated


def flatten(values, prefix=""):
    """{"en": {"R@1": 0.5}} -> {"en/R@1": 0.5}."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _peak_memory(device):
    """The peak memory of this process in bytes: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024  # bytes; macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
