"""What both stages of training share: processes, precision, optimizer, run folders, log.

A training script owns its loop and drives a Run:

    run = Run(args, stage="clip")                      # join the processes, open the run folder
    pairs = run.open_pairs()
    ...                                                # build the model and the optimizer
    run.start(model, optimizer, pairs, model.config)   # length of the run; restore a checkpoint
    loader = run.open_loader(pairs, tokenizer, padded_size)
    for step, batch in run.steps(loader):
        ...                                            # forward pass, loss
        run.backward(loss)
        grad_norm = run.optimizer_step()
        run.log(step, loss, grad_norm)
        run.save_if_due(step)
    run.close()

The same code runs under `python` and under `torchrun`, in one process or in many. After the weights
are initialized, all randomness is a function of the seed and the sample index (crops.py). So a
checkpoint needs no state of generators: it is the weights, the optimizer's state and the number of
steps done.

From top to bottom: command-line flags, the run, processes, precision and compilation, optimizer
and schedule, run folders, the log.

Not included: sharded weights and optimizers (these models fit on one GPU), and experiment trackers
(metrics.jsonl has one line per log step).
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import demo
from kelip import Block, atomic_write, load_checkpoint, load_weights, save_checkpoint

LOG_EVERY = 10    # steps between lines of the log, or fewer if
LOG_SECONDS = 5   # they take longer than this: signals are noticed when a line is written
BAD_STEPS = 10    # steps in a row with non-finite gradients that end a run, checked at log steps
MAX_GRAD_NORM = 1.0


def add_arguments(parser, out, lr, batch_size, epochs):
    """Add the flags of both stages to a parser, with this stage's defaults."""
    add = parser.add_argument
    add("--data", nargs="+", default=[f"{demo.DEMO}/train-*.tar"], metavar="SHARDS",
        help="training pairs: tar files, folders, globs or brace ranges; optionally ::WEIGHT and "
             "::LANGUAGE (of captions that name none) after each, as in 'ko-*.tar::2::ko' "
             "(default: the demo's pairs, which are packed on first use)")
    add("--model", metavar="PRESET",
        help="a preset of kelip.py: tiny, ViT-S/16, ViT-B/32, ViT-B/16, ViT-L/14 (default: tiny)")
    add("--out", default=out, metavar="FOLDER", help=f"folder of the run (default: {out})")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--batch-size", type=int, default=batch_size, metavar="N",
        help=f"pairs per step, of all processes together (default: {batch_size})")
    add("--epochs", type=float, default=epochs, metavar="N",
        help=f"epochs to train (default: {epochs:g})")
    add("--steps", type=int, metavar="N", help="steps to train; overrides --epochs")
    add("--warmup", type=int, metavar="N",
        help="steps of linear warm-up (default: 2,000, at most 10 %% of the run)")
    add("--lr", type=float, default=lr, metavar="X", help=f"peak learning rate (default: {lr:g})")
    add("--precision", choices=["auto", "fp64", "fp32", "bf16", "fp16"], default="auto",
        help="auto is bf16 where the hardware multiplies it fast, else fp32 (default: auto)")
    add("--compile", action="store_true",
        help="torch.compile the transformer blocks: slower to start, faster on GPUs")
    add("--seed", type=int, default=0, metavar="N",
        help="seed of the initial weights, the order of samples and the crops (default: 0)")
    add("--workers", type=int, metavar="N",
        help="decoding processes per training process (default: 0 on a CPU, 8 on a GPU)")
    add("--save-every", type=int, default=1000, metavar="N",
        help="steps between checkpoints (default: 1000)")
    add("--keep", type=int, default=2, metavar="N",
        help="checkpoints to keep: last.pt and the step-*.pt before it (default: 2)")


# Flags that may change when a run is resumed. The number of steps may not, whatever --epochs says.
MAY_CHANGE = {"data", "out", "resume", "workers", "save_every", "keep", "precision", "compile",
              "micro_batch", "init", "evals", "test", "tokenizer", "epochs"}


# ---- the run ----

class Run:
    """A training run, driven by a script. The module's docstring shows the order of the calls.

    Attributes: rank, world_size, device and group (the process group, None for one process), as
    torch.distributed calls them; is_rank_zero, whether this process writes files and prints;
    folder; checkpoint, the dict to resume from, None for a new run; after start() also total_steps
    and config, what config.json holds.

    Raises ValueError for invalid flags, and for a folder that holds a run already, so that nothing
    is overwritten; FileNotFoundError when there is nothing to resume.
    """

    def __init__(self, args, stage):
        for flag in ("batch_size", "micro_batch", "save_every", "keep", "steps"):
            value = getattr(args, flag, None)
            if value is not None and value < 1:
                raise ValueError(f"--{flag.replace('_', '-')} {value}: must be at least 1")
        self.args, self.stage = args, stage
        self.rank, self.world_size, self.device, self.group = _join_processes()
        self.is_rank_zero = self.rank == 0
        self.folder = Path(args.out)
        self.dtype = choose_precision(args.precision, self.device)
        self.checkpoint = self._open_folder()

    def _open_folder(self):
        """Make the run folder, or read the checkpoint in it."""
        last = self.folder / "last.pt"
        # When a process fails, torchrun restarts all of them, and they resume without --resume.
        # Only the node of the failed process counts this as a restart.
        restarts = float(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        restarted = self.sum_over_ranks(torch.tensor(restarts, device=self.device)).item() > 0
        checkpoint, error = None, None
        if last.exists() and not (self.args.resume or restarted):
            error = ValueError(f"{self.folder} holds a run already: add --resume to continue it, "
                               "or choose another --out")
        elif last.exists():
            try:
                checkpoint = load_checkpoint(last)
            except ValueError as reason:
                older = [path.name for path in _older_checkpoints(self.folder)][-1:]
                hint = f"; {older[0]} in the same folder can replace it" if older else ""
                error = ValueError(f"{reason}{hint}")
        elif self.args.resume and not restarted:
            error = FileNotFoundError(
                f"{last}: no run to resume; start one without --resume")
        if checkpoint and checkpoint["config"]["stage"] != self.stage:
            error = ValueError(f"{self.folder} holds a run of train_{checkpoint['config']['stage']}"
                               f".py: choose another --out")
        self._barrier()  # no rank may look for last.pt after another rank has written it
        if error:
            raise error
        if self.is_rank_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for temporary in self.folder.glob(".last.pt.*"):  # of a process killed while it wrote
                temporary.unlink()
        return checkpoint

    def open_pairs(self):
        """The training pairs: data.Pairs of --data. The demo's pairs are packed when missing.

        Prints what they are. Raises ValueError when a resumed run's shards have changed, or most of
        them are missing. The pairs of a few missing shards are skipped.
        """
        checkpoint = self.checkpoint
        with self.rank_zero_first():
            uses_demo = any(source.startswith(demo.DEMO) for source in self.args.data)
            if uses_demo and not os.path.exists(demo.DEMO):
                demo.pack_emoji(demo.DEMO)
            pairs = data.Pairs(self.args.data, checkpoint and checkpoint["data"])
        if checkpoint:
            _check_shards(pairs)
        if self.is_rank_zero:
            print(pairs.describe(), flush=True)
        return pairs

    def start(self, module, optimizer, pairs, model_config, evaluations=0):
        """Fix the length of the run, and restore the checkpoint if there is one.

        module is what checkpoints hold. evaluations: how many times evaluates_at is true, the end
        included. Raises ValueError when the pairs are too few for a batch, and when a run is
        resumed with other settings.
        """
        args = self.args
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
                       "pairs": len(pairs), **flags, "steps": steps, "warmup": warmup}
        self.module, self.optimizer = module, optimizer
        self.total_steps, self.warmup = steps, warmup
        self.first_step = 0
        self.saved_step = None
        self.evaluation_steps = {round(steps * i / evaluations) for i in range(1, evaluations + 1)}
        # Scales the loss under fp16, whose gradients would underflow. Disabled otherwise.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if self.checkpoint:
            self._restore()
        elif self.is_rank_zero:
            text = json.dumps(self.config, indent=1, ensure_ascii=False)
            (self.folder / "config.json").write_text(text, encoding="utf-8")

    def _restore(self):
        """Load weights, optimizer and step from the checkpoint."""
        before = self.checkpoint["config"]
        for key, value in self.config.items():
            if key not in MAY_CHANGE and before.get(key) != value:
                raise ValueError(f"{self.folder}/last.pt: {key} was {before.get(key)} and is now "
                                 f"{value}: set it back to resume, or choose another --out")
        load_weights(self.module, self.checkpoint["model"], self.folder / "last.pt")
        self.optimizer.load_state_dict(self.checkpoint["optimizer"])
        self.scaler.load_state_dict(self.checkpoint["scaler"])
        self.first_step = self.saved_step = self.checkpoint["step"]

    def open_loader(self, pairs, tokenizer, padded_size):
        """This rank's data.Loader, from the sample at which the run stands.

        padded_size: see crops.padded_size.
        """
        args = self.args
        if args.model == "tiny":
            # The demo's images have 72 pixels: a larger square would hold no more detail.
            padded_size = min(padded_size, 72)
        workers = args.workers
        if workers is None:
            workers = 8 if self.device.type == "cuda" else 0
        return data.Loader(
            pairs, tokenizer, args.batch_size, padded_size, args.seed,
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

    # -- the loop --

    def steps(self, loader):
        """Yield (step, batch), with the learning rate set, until the end of the run.

        step counts from 1: it is the number of steps that are done when the loop's body ends.
        """
        self._stop_signal = _StopSignal()
        self._log = _Log(self, loader)
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
        if not self.scaler.is_enabled():  # the scaler does this itself
            _skip_step_unless_finite(self.optimizer, grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def log(self, step, loss, grad_norm, **metrics):
        """Collect the metrics of a step, and at log steps write a line to metrics.jsonl.

        A metric is a scalar tensor, which is averaged over steps and ranks; or a pair of tensors
        (values, where) of equal shape, which is averaged over the values where `where` is True, of
        all steps and ranks. Metrics stay on the device until a line is written.

        Raises ValueError when gradients stay non-finite.
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
        if log.is_due(step):
            log.write(step, self.optimizer.param_groups[0]["lr"])
            if log.bad_steps >= BAD_STEPS:
                log.bar.close()
                again = "start again"
                if self.saved_step:
                    again = (f"start from the last good checkpoint, {self.folder}/last.pt of step "
                             f"{self.saved_step}, with --init")
                raise ValueError(f"the loss or the gradients of the last {log.bad_steps} steps "
                                 f"were not finite: {again}, a lower --lr and another --out")
            self._stop_signal.agree(self)

    def evaluates_at(self, step):
        """Whether to evaluate after this step. False when a signal is about to end the run."""
        return step in self.evaluation_steps and not self._stop_signal.agreed

    def log_evaluation(self, step, values):
        """Write a line of results to metrics.jsonl. Keys of nested dicts are joined by "/"."""
        self._log.append({"step": step, **_flatten(values)})

    def save_if_due(self, step, **extra):
        """Save a checkpoint every --save-every steps, at evaluations and at the end.

        extra goes into the checkpoint. After a signal, saves and raises SystemExit.
        """
        stopping = self._stop_signal.agreed
        if (stopping or step % self.args.save_every == 0 or step == self.total_steps
                or step in self.evaluation_steps):
            self._save(step, extra)
        if stopping:
            self._log.bar.close()
            line = (f"{self._stop_signal.name} at step {step} of {self.total_steps}: saved "
                    f"{self.folder}/last.pt; continue with --resume")
            raise SystemExit(line if self.is_rank_zero else 1)

    def _save(self, step, extra):
        """Write last.pt. The previous one is kept as step-N.pt; --keep counts both."""
        if self.is_rank_zero and step != self.saved_step:
            last, keep = self.folder / "last.pt", self.args.keep
            if self.saved_step is not None and keep > 1:
                _link(last, self.folder / f"step-{self.saved_step}.pt")
            save_checkpoint(last, {
                "model": self.module.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "step": step, "config": self.config,
                "data": self._log.loader.pairs.state(), **extra})
            older = _older_checkpoints(self.folder)
            for path in older[:max(0, len(older) - keep + 1)]:
                path.unlink()
        self.saved_step = step

    def close(self):
        """Shut down the process group."""
        self._barrier()
        if self.group is not None:
            dist.destroy_process_group()

    # -- ranks --

    @contextlib.contextmanager
    def rank_zero_first(self):
        """Rank zero runs the block first, the other ranks after it: they find the files it left."""
        if not self.is_rank_zero:
            self._barrier()
        try:
            yield
        finally:  # on an error, too: the others would wait for rank zero
            if self.is_rank_zero:
                self._barrier()

    @contextlib.contextmanager
    def paused(self):
        """The other ranks wait while rank zero works. The log's rates leave out this time."""
        start = time.perf_counter()
        yield
        self._barrier()  # not in a finally: an error on rank zero ends the run
        self._log.since += time.perf_counter() - start

    def sum_over_ranks(self, tensor):
        """The sum of a tensor over all ranks."""
        tensor = tensor.clone()
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def _barrier(self):
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(self.group)


# ---- processes ----

def _join_processes():
    """Join the processes that torchrun started: (rank, world_size, device, group)."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
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
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    agent_store = dist.TCPStore(address, port, world_size, rank == 0 and not has_agent, timeout,
                                wait_for_workers=False)
    if not has_agent:  # not started by torchrun: the store is new
        return agent_store
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
    """SIGTERM, SIGUSR1 and Ctrl-C end a run at the next log step, where all ranks agree on it."""

    def __init__(self):
        self.name = ""
        self.agreed = False
        self._previous = {number: signal.signal(number, self._handle)
                          for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}

    def restore_handlers(self):
        """After the loop, signals end the process as usual."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C ends the run at once
        self.name = signal.Signals(number).name

    def agree(self, run):
        """Set `agreed`, the same on all ranks: whether any of them has had a signal."""
        signalled = torch.tensor(float(bool(self.name)), device=run.device)
        if run.group is not None:
            dist.all_reduce(signalled, op=dist.ReduceOp.MAX, group=run.group)
        self.agreed = bool(signalled)
        if self.agreed and not self.name:
            self.name = "a signal to another process"


# ---- precision and compilation ----

def choose_precision(name, device):
    """The dtype of autocast, None for none, from 'auto', 'fp64', 'fp32', 'bf16' or 'fp16'.

    'auto' is bfloat16 where matrix units support it: GPUs since Ampere, and CPUs with AMX or
    AVX-512's bfloat16 instructions.
    """
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            fast = bool(_cpu_flags() & {"amx_bf16", "avx512_bf16"})
        name = "bf16" if fast else "fp32"
    return {"fp64": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


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


def _cpu_flags():
    """The instruction sets of this CPU, as Linux names them."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("flags"):
                    return set(line.split())
    except OSError:
        pass
    return set()


# ---- optimizer and schedule ----

def make_optimizer(module, lr, betas, eps, weight_decay):
    """AdamW with weight decay on matrices only: not on biases, LayerNorms, the class embedding.

    A scalar, which is logit_scale, learns ten times as fast. AdamW moves a parameter by at most
    about the learning rate per step, and a run of a thousand steps would end before this logarithm
    rose from 2.7 to 4. An optimizer that is not fused would have to skip non-finite gradients
    itself (see _skip_step_unless_finite).
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay,
         "lr_factor": 1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0, "lr_factor": 1},
        {"params": [p for p in trained if p.ndim == 0], "weight_decay": 0.0, "lr_factor": 10},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step, steps, warmup, peak):
    """The learning rate of a step, counted from 0: linear warm-up, then half a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def _skip_step_unless_finite(optimizer, grad_norm):
    """Let the next optimizer step do nothing if the norm is infinite or NaN.

    Fused AdamW reads found_inf on the device, as GradScaler sets it. An `if` in Python would wait
    for the device at every step.
    """
    optimizer.found_inf = 1 - grad_norm.isfinite().float()


# ---- run folders ----

def _older_checkpoints(folder):
    """The checkpoints before last.pt, oldest first."""
    return sorted(folder.glob("step-*.pt"), key=lambda path: int(path.stem.removeprefix("step-")))


def _link(path, name):
    """Give a file a second name, or copy it where file systems have no hard links."""
    if name.exists():
        return
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


def _check_shards(pairs):
    """Raise ValueError when a resumed run's shards have changed, or most of them are missing."""
    for error in ("shard changed", "shard missing"):
        affected = [shard for shard in pairs.shards if error in shard.skipped]
        if affected and (error == "shard changed" or 2 * pairs.skipped[error] > len(pairs)):
            shard = affected[0]
            raise ValueError(
                f"--data: {error}: {shard.path}, which had {shard.count:,} pairs and "
                f"{shard.size:,} bytes when the run began; restore it, or choose another --out")


# ---- the log ----

class _Log:
    """The progress bar and metrics.jsonl. Metrics are summed on the device between log steps."""

    def __init__(self, run, loader):
        self.run, self.loader = run, loader
        self.path = run.folder / "metrics.jsonl"
        self.next_line = run.first_step + 1
        self.bad_steps = 0   # steps in a row that were skipped
        self.one = torch.ones((), device=run.device)
        if run.is_rank_zero:
            _drop_lines_after(self.path, run.first_step)
        self.bar = tqdm(total=run.total_steps, initial=run.first_step, unit="step",
                        disable=not run.is_rank_zero, dynamic_ncols=True, file=sys.stdout)
        self.reset()

    def reset(self):
        """Begin the next line."""
        self.sums = {}       # name -> float32 [2], a sum of values and their number
        self.n_steps = 0
        self.data_wait = 0.0
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

    def end_step(self):
        """Count a step."""
        self.n_steps += 1
        self.bar.update()

    def is_due(self, step):
        """Whether a line is written after this step: the same on all ranks."""
        return step >= self.next_line or step == self.run.total_steps

    def write(self, step, lr):
        """Write a line of means since the last one. Between lines, nothing waits for the device."""
        run = self.run
        seconds = time.perf_counter() - self.since
        self.sums["seconds"] = torch.tensor([seconds, self.n_steps], device=run.device)
        names = sorted(self.sums)
        table = torch.stack([self.sums[name] for name in names])             # [metrics, 2]
        if run.group is not None:
            dist.all_reduce(table, group=run.group)
        means = {}
        for name, (total, count) in zip(names, table.tolist()):
            if count:
                means[name] = total / count
        # The mean over ranks decides when the next line is written, so that all ranks agree.
        seconds_per_step = means.pop("seconds")
        n_steps = min(LOG_EVERY - step % LOG_EVERY, int(LOG_SECONDS / seconds_per_step))
        self.next_line = step + max(1, n_steps)
        self.bad_steps = self.bad_steps + self.n_steps if means["skipped"] == 1 else 0
        rate = run.args.batch_size * self.n_steps / seconds
        self.append({
            "step": step, "lr": lr, **means, "images_per_second": rate,
            "data_wait": self.data_wait / seconds, "memory_gb": _peak_memory(run.device) / 1e9,
            "skipped_pairs": sum(self.loader.skipped.values())})
        self.bar.set_postfix_str(f"loss {means['loss']:.3f}, {rate:.0f} images/s")
        self.reset()

    def append(self, line):
        """Add a line to metrics.jsonl. JSON has no NaN and infinity: they become null."""
        if not self.run.is_rank_zero:
            return
        for key, value in line.items():
            if isinstance(value, float):
                line[key] = float(f"{value:.6g}") if math.isfinite(value) else None
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _drop_lines_after(path, step):
    """Remove the lines of metrics.jsonl that a resumed run will write again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line.endswith("}")]  # the last one may be cut short
    kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
    with atomic_write(path) as file:
        file.write("".join(kept).encode())


def _flatten(values, prefix=""):
    """{"en": {"R@1": 0.5}} -> {"en/R@1": 0.5}."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _peak_memory(device):
    """The most bytes that this process has held: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
