"""What both stages of training share: processes, precision, optimiser, schedule, run folder, checkpoints, the loop.

A stage (train_mae.py, train_clip.py) says what its model, its data and one step are; `fit` does the rest, the same under
`python` and under `torchrun`, in one process or in many. All randomness of a run is a function of its seed and of the slot
of a picture (crops.py), none of it the state of a generator: a run is its weights, its optimiser and one number, the
slots consumed.

What it leaves out: sharded weights and optimisers (these models fit one GPU) and any experiment tracker
(metrics.jsonl is one line a log step).
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import packing
from kelip import load_checkpoint, load_weights, save_checkpoint

LOG_EVERY = 10  # steps
DEMO = "data/emoji"


class Job(NamedTuple):
    """Where this process stands among those that train one model."""
    rank: int
    world_size: int
    device: torch.device
    group: object     # the process group, None in a single process

    @property
    def main(self):
        """Whether this process writes files and prints."""
        return self.rank == 0


def start_job():
    """Join the other processes that torchrun started, over nccl on GPUs and gloo on CPUs; alone, nothing to join."""
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
        torch.backends.cuda.matmul.allow_tf32 = True
    else:
        device = torch.device("cpu")
        # glibc gives blocks over 32 MB at most back to the system when they are freed, and asks for them anew, page by
        # page, in the next step. Keeping them is worth a sixth of the time of a step.
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 32 << 20)   # M_MMAP_THRESHOLD
            libc.mallopt(-1, 1 << 30)    # M_TRIM_THRESHOLD
    if world_size == 1:
        return Job(0, 1, device, None)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Job(dist.get_rank(), world_size, device, dist.group.WORLD)


def choose_precision(name, device):
    """'auto', 'fp32', 'bf16' or 'fp16' -> the dtype of autocast, None for none. auto is bfloat16 where matrix units
    take it: GPUs from Ampere on, CPUs with AMX or AVX-512's bfloat16 instructions."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            fast = _cpu_flags() & {"amx_bf16", "avx512_bf16"}
        name = "bf16" if fast else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _cpu_flags():
    try:
        with open("/proc/cpuinfo") as file:
            return set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        return set()


def make_optimizer(module, lr, betas, eps, weight_decay):
    """AdamW with decay on matrices only: not on biases, LayerNorms, the class embedding or logit_scale. A scalar, which is
    logit_scale, learns ten times as fast: AdamW moves it by the learning rate a step at most, and a run of a thousand
    steps would end before a logarithm came from 2.7 to 4."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay, "times": 1},
              {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0, "times": 1},
              {"params": [p for p in trained if p.ndim == 0], "weight_decay": 0.0, "times": 10}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step, steps, warmup, peak):
    """Linear from 0 over `warmup` steps, then half a cosine from peak to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ----------------------------------------------------------------------------------------------------- run folders

def add_arguments(parser, out, lr, batch_size, epochs):
    """The flags that both stages have, with their defaults."""
    add = parser.add_argument
    add("--data", nargs="+", default=[f"{DEMO}/train-*.tar"], metavar="SHARDS",
        help="training pairs: tars, folders, globs or brace ranges, each with ::WEIGHT behind it if you like "
             "(default: the demo's, packed when missing)")
    add("--model", default="tiny", help="a preset of kelip.py: tiny, ViT-S/16, ViT-B/32, ViT-B/16, ViT-L/14 (default: tiny)")
    add("--out", default=out, metavar="FOLDER", help=f"the run's folder (default: {out})")
    add("--resume", action="store_true", help="go on with the run in --out where it stopped")
    add("--batch-size", type=int, default=batch_size, metavar="N",
        help=f"pairs a step over all processes together (default: {batch_size})")
    add("--epochs", type=float, default=epochs, metavar="N", help=f"passes over the data (default: {epochs:g})")
    add("--steps", type=int, metavar="N", help="length of the run in steps, instead of --epochs")
    add("--warmup", type=int, metavar="N", help="steps of rising learning rate (default: 2,000, at most 10 %% of the run)")
    add("--lr", type=float, default=lr, help=f"peak learning rate (default: {lr:g})")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="auto is bf16 where the hardware multiplies it fast")
    add("--seed", type=int, default=0, help="of weights, order and crops (default: 0)")
    add("--workers", type=int, metavar="N",
        help="processes that decode, for each training process (default: 0 on a CPU, 8 on a GPU)")
    add("--save-every", type=int, default=1000, metavar="N", help="steps between checkpoints (default: 1000)")


def open_run(args, job):
    """Make or open the run folder args.out. Returns the checkpoint to go on from, None for a fresh run.

    A folder that holds a run is refused without --resume, so that nothing good is written over; a job that torchrun
    starts again after a failure resumes by itself.
    """
    folder = Path(args.out)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    state, problem = None, None
    if (folder / "last.pt").exists():
        if args.resume or restarted:
            state = load_checkpoint(folder / "last.pt")
        else:
            problem = ValueError(f"{folder} holds a run already: --resume goes on with it, --out FOLDER starts another")
    elif args.resume and not restarted:
        problem = FileNotFoundError(f"{folder}/last.pt: no run to resume; leave --resume out to start one")
    barrier(job)  # so that no rank finds what another one has just written
    if problem:
        raise problem
    if job.main:
        folder.mkdir(parents=True, exist_ok=True)
    return state


def open_pairs(args, job, state):
    """The training pairs; the demo's are packed when they are missing. Prints what they are."""
    if any(source.startswith(DEMO) for source in args.data):
        main_first(job, lambda: os.path.exists(DEMO) or packing.pack_emoji(DEMO))
    pairs = main_first(job, lambda: data.Pairs(args.data, state and state["data"]))
    if job.main:
        print(pairs.describe(), flush=True)
    return pairs


# What a resumed run may change: where and how fast it runs, not what it computes.
FREE = {"data", "out", "resume", "workers", "save_every", "precision", "init", "evals", "test", "tokenizer", "epochs"}


def describe_run(stage, args, model_config, pairs, state, **facts):
    """What run this is, as plain values for config.json and the checkpoint. Raises ValueError when args.resume goes on with
    a run that was something else, naming the first difference."""
    steps = args.steps or int(args.epochs * data.Order(pairs, args.seed).slots_per_epoch // args.batch_size)
    if steps < 1:
        raise ValueError(f"{len(pairs):,} pairs are fewer than one batch: lower --batch-size {args.batch_size}")
    warmup = min(2000, max(1, steps // 10)) if args.warmup is None else args.warmup
    config = {"stage": stage, "model": dict(model_config), "preset": args.model, "pairs": len(pairs), **facts,
              **{key: value for key, value in vars(args).items() if key != "model"}, "steps": steps, "warmup": warmup}
    for key, value in config.items() if state else ():
        before = state["config"].get(key)
        if key not in FREE and before != value:
            raise ValueError(f"{args.out}/last.pt: {key} was {before} and is now {value}: set it back to resume, or start "
                             "another run with another --out")
    return config


def open_loader(args, job, pairs, tokenizer, config, state, canvas):
    """The loader of this process, from the slot on where the run stands. canvas: as crops.canvas_size gives."""
    if args.model == "tiny":
        canvas = min(canvas, 72)  # the side of the drawings that it is for: a larger canvas would hold no more of them
    workers = args.workers if args.workers is not None else 8 if job.device.type == "cuda" else 0
    return data.Loader(pairs, tokenizer, args.batch_size, canvas, args.seed, start=state["slots"] if state else 0,
                       stop=config["steps"] * args.batch_size, rank=job.rank, world_size=job.world_size, workers=workers,
                       context_length=config["model"]["context_length"], pin_memory=job.device.type == "cuda")


def main_first(job, work):
    """Let rank 0 do some work that leaves a file, while the others wait; then let the others do it: they find the file.
    Returns what work() returns."""
    if not job.main:
        dist.barrier(job.group)
        return work()
    try:
        return work()
    finally:
        barrier(job)


def barrier(job):
    """Wait for all processes."""
    if job.group is not None:
        dist.barrier(job.group)


def sum_over_ranks(tensor, job):
    """The tensor, in place, summed over all processes."""
    if job.group is not None:
        dist.all_reduce(tensor, group=job.group)
    return tensor


def end_job(job):
    """Leave the other processes."""
    if job.group is not None:
        dist.barrier(job.group)
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------------- the loop

def wrap(module, job):
    """DistributedDataParallel in a job of several processes; the module itself alone."""
    if job.group is None:
        return module
    ids = [job.device.index] if job.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)


def fit(job, args, module, optimizer, loader, step_fn, config, state=None, after_step=None, evaluate=None):
    """Train: the loop of both stages.

    module: what is trained and kept in the checkpoint. step_fn(batch, scaler) -> dict of detached tensors, "loss" among
    them, after its backward pass. config: as describe_run gives. state: the checkpoint to go on from. after_step(): what
    is done to the weights after each step. evaluate(step) -> dict for the log, args.evals times, on rank 0. Raises
    ValueError when gradients stay non-finite, SystemExit after a signal that asked for an end.
    """
    folder, steps = Path(args.out), config["steps"]
    first = state["step"] if state else 0
    scaler = torch.amp.GradScaler(job.device.type, enabled=choose_precision(args.precision, job.device) == torch.float16)
    if state:
        load_weights(module, state["model"], folder / "last.pt")
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    elif job.main:
        (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")

    def save(step):
        if job.main:
            save_checkpoint(folder / "last.pt", {
                "model": module.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "step": step, "slots": step * args.batch_size, "config": config, "data": loader.pairs.state()})

    stop = StopSignal()
    log = Log(job, folder, first, steps, args.batch_size, loader)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    evaluations = {round(steps * i / args.evals) for i in range(1, args.evals + 1)} if evaluate else set()
    for step, batch in log.timed(loader, first):
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * learning_rate(step, steps, config["warmup"], args.lr)
        optimizer.zero_grad(set_to_none=True)
        metrics = step_fn(batch, scaler)
        scaler.unscale_(optimizer)
        metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(trained, 1.0).detach()
        # Gradients that are not finite skip the step, on all ranks together since all have the same ones; the fused
        # kernel reads found_inf on the device, so that nothing waits for it.
        if not scaler.is_enabled():
            metrics["skipped"] = optimizer.found_inf = 1.0 - metrics["grad_norm"].isfinite().float()
        scaler.step(optimizer)
        scaler.update()
        if after_step:
            after_step()
        step += 1
        log.add(metrics)
        if step % LOG_EVERY == 0 or step == steps:
            log.write(step, optimizer.param_groups[0]["lr"])
            if log.bad >= LOG_EVERY:
                raise ValueError(f"the gradients of the last {log.bad} steps were not finite; {folder}/last.pt is the last "
                                 "good checkpoint: --resume it with a lower --lr")
            if stop.seen(job):
                save(step)
                log.close()
                raise SystemExit(f"{stop.name} at step {step} of {steps}: saved {folder}/last.pt; --resume goes on")
        if step in evaluations:
            if job.main:
                log.note(step, evaluate(step))
            barrier(job)
        if step % args.save_every == 0 or step == steps or step in evaluations:
            save(step)
    log.close()


class StopSignal:
    """SIGTERM, SIGUSR1 and Ctrl-C ask for an end at the next log step, where all ranks agree on it."""

    def __init__(self):
        self.name = ""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        self.name = signal.Signals(number).name

    def seen(self, job):
        """Whether any rank has had a signal."""
        flag = torch.tensor(float(bool(self.name)), device=job.device)
        if job.group is not None:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.name = self.name or "a signal to another process"
        stop = bool(flag)
        self.name = self.name if stop else ""
        return stop


class Log:
    """The tqdm bar, and metrics.jsonl: means over the steps since the last line, rates, memory. Tensors are added up on
    the device and read at log steps only."""

    def __init__(self, job, folder, first, steps, batch_size, loader):
        self.job, self.batch_size, self.loader, self.bad = job, batch_size, loader, 0
        self.path = folder / "metrics.jsonl"
        if job.main:
            _drop_lines_after(self.path, first)
        self.bar = tqdm(total=steps, initial=first, disable=not job.main, dynamic_ncols=True, unit="step",
                        file=sys.stdout)
        self._reset()

    def _reset(self):
        self.sums, self.count, self.waited, self.since = {}, 0, 0.0, time.perf_counter()

    def timed(self, loader, first):
        """enumerate(loader, first), with the time spent waiting for batches kept."""
        batches, step = iter(loader), first
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield step, batch
            step += 1

    def add(self, metrics):
        """Add one step's tensors."""
        for key, value in metrics.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value.clone()
        self.count += 1
        self.bar.update()

    def write(self, step, lr):
        """A line of means over the steps since the last; sums of "sum/..." are over all ranks, for their quotients."""
        keys = sorted(self.sums)
        values = torch.stack([self.sums[key].float() for key in keys])
        if self.job.group is not None:
            dist.all_reduce(values)
            values /= self.job.world_size
        mean = {key: value / self.count for key, value in zip(keys, values.tolist())}
        line = {"step": step, "lr": lr}
        for key, value in mean.items():
            if key.startswith("count/"):
                name = key.removeprefix("count/")
                line.update({name: mean["sum/" + name] / value} if value else {})
            elif not key.startswith("sum/"):
                line[key] = value
        seconds = time.perf_counter() - self.since
        self.bad = self.bad + self.count if line.get("skipped") == 1 else 0
        line["images_per_second"] = self.batch_size * self.count / seconds
        line["data_wait"] = self.waited / seconds
        line["memory_gb"] = peak_memory(self.job.device) / 1e9
        line["holes"] = sum(self.loader.skipped.values())
        self._append(line)
        self.bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['images_per_second']:.0f} images/s")
        self._reset()

    def note(self, step, result):
        """Add a line of evaluation results; their time counts in no rate."""
        self._append({"step": step, **result})
        self.since = time.perf_counter()

    def _append(self, line):
        if self.job.main:
            line = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in line.items()}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self):
        """End the bar."""
        self.bar.close()


def _drop_lines_after(path, step):
    """Keep the lines of metrics.jsonl that a resumed run does not write again; whole, or none is lost."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
        temporary = path.with_suffix(".new")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)


def peak_memory(device):
    """Most bytes that this process has held: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
