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
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import demo
from kelip import Block, load_checkpoint, load_weights, save_checkpoint

LOG_EVERY = 10         # steps, at most
LOG_SECONDS = 5        # and about this long at most: a signal to stop is seen at log steps, and has 30 seconds
BAD_STEPS = 10         # steps in a row whose loss or gradients are not finite end a run
DEMO = "data/emoji"
# Dense bfloat16 and float16 operations a second by the maker's data sheets, for the log's utilisation.
PEAK = {"V100": 125e12, "A100": 312e12, "A800": 312e12, "A10": 125e12, "L4": 121e12, "L40S": 362e12, "H100 PCIe": 756e12,
        "H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12}


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
    rank = int(os.environ["RANK"])
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=meet(rank, world_size), rank=rank,
                            world_size=world_size)
    return Job(rank, world_size, device, dist.group.WORLD)


def meet(rank, world_size, seconds=600):
    """The store through which the processes of a job find each other, of this attempt alone: rank 0 hosts it.

    torchrun's own store outlives the processes that it starts again; those would find there the addresses of the dead, and
    wait for them. Here all that they may find is a port on which nobody answers, and then they ask again. Raises
    TimeoutError.
    """
    address, end, patience = os.environ["MASTER_ADDR"], time.monotonic() + seconds, timedelta(seconds=seconds)
    alone = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # started by something else: there is no other store
    shared = dist.TCPStore(address, int(os.environ["MASTER_PORT"]), world_size, alone and rank == 0, patience,
                           wait_for_workers=False)
    if alone:
        return shared
    if rank == 0:
        store = dist.TCPStore(address, 0, world_size, True, patience, wait_for_workers=False)
        shared.set("rank 0", str(store.port))
    while time.monotonic() < end:
        with contextlib.suppress(dist.DistNetworkError):
            if rank > 0:
                store = dist.TCPStore(address, int(shared.get("rank 0")), world_size, False, timedelta(seconds=5),
                                      wait_for_workers=False)
                store.set_timeout(patience)
                store.add("here", 1)
                return store
            if store.add("here", 0) == world_size - 1:
                shared.delete_key("rank 0")  # so that the next attempt finds none
                return store
        time.sleep(0.05)
    raise TimeoutError(f"rank {rank}: not all of {world_size} processes met at {address} within {seconds} seconds")


def choose_precision(name, device):
    """'auto', 'fp64', 'fp32', 'bf16' or 'fp16' -> the dtype of autocast, None for none. auto is bfloat16 where matrix
    units take it: GPUs from Ampere on, CPUs with AMX or AVX-512's bfloat16 instructions."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            fast = _cpu_flags() & {"amx_bf16", "avx512_bf16"}
        name = "bf16" if fast else "fp32"
    return {"fp64": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def place(module, args, job):
    """Move a module to its device and to the type its weights are kept in: float64 under --precision fp64, else float32."""
    return module.to(job.device, torch.float64 if args.precision == "fp64" else torch.float32)


def compile_blocks(module):
    """torch.compile for every transformer block, one by one: the blocks of a tower share their code, so that compiling
    takes a minute, and state dicts keep their names."""
    for block in module.modules():
        if isinstance(block, Block):
            block.compile(dynamic=True)
            block.forward_one = torch.compile(block.forward_one, dynamic=True)


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
    add("--precision", choices=["auto", "fp64", "fp32", "bf16", "fp16"], default="auto",
        help="auto is bf16 where the hardware multiplies it fast, else fp32")
    add("--compile", action="store_true", help="torch.compile the transformer blocks: slow to start, faster on GPUs")
    add("--seed", type=int, default=0, help="of weights, order and crops (default: 0)")
    add("--workers", type=int, metavar="N",
        help="processes that decode, for each training process (default: 0 on a CPU, 8 on a GPU)")
    add("--save-every", type=int, default=1000, metavar="N", help="steps between checkpoints (default: 1000)")
    add("--keep", type=int, default=2, metavar="N",
        help="checkpoints to keep: last.pt, and step-*.pt before it (default: 2)")


def open_run(args, job):
    """Make or open the run folder args.out. Returns the checkpoint to go on from, None for a fresh run.

    A folder that holds a run is refused without --resume, so that nothing good is written over; a job that torchrun
    starts again after a failure resumes by itself. Raises ValueError for numbers that make no run.
    """
    for flag in ("batch_size", "micro_batch", "save_every", "keep", "steps"):
        if getattr(args, flag, None) is not None and getattr(args, flag) < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least 1")
    folder = Path(args.out)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    state, problem = None, None
    if (folder / "last.pt").exists():
        if args.resume or restarted:
            try:
                state = load_checkpoint(folder / "last.pt")
            except ValueError as error:
                older = [path.name for path in older_checkpoints(folder)][-1:]
                problem = ValueError(f"{error}" + (f"; {older[0]} in the same folder can take its place" if older else ""))
        else:
            problem = ValueError(f"{folder} holds a run already: --resume goes on with it, --out FOLDER starts another")
    elif args.resume and not restarted:
        problem = FileNotFoundError(f"{folder}/last.pt: no run to resume; leave --resume out to start one")
    barrier(job)  # so that no rank finds what another one has just written
    if problem:
        raise problem
    if job.main:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".last.pt.*"):  # of a process that was killed while it wrote
            leftover.unlink()
    return state


def older_checkpoints(folder):
    """The checkpoints before last.pt, oldest first."""
    return sorted(folder.glob("step-*.pt"), key=lambda path: int(path.stem.removeprefix("step-")))


def save_run(folder, state, before, keep):
    """Write folder/last.pt, whole or not at all. before: the step of the last.pt that is there, which stays as
    step-N.pt (None: there is none); keep: how many checkpoints stay, last.pt among them."""
    last, aside = folder / "last.pt", folder / f"step-{before}.pt"
    if before is not None and keep > 1 and not aside.exists():
        try:
            os.link(last, aside)
        except OSError:  # a file system without hard links
            shutil.copyfile(last, aside)
    save_checkpoint(last, state)
    older = older_checkpoints(folder)
    for path in older[:max(0, len(older) - keep + 1)]:
        path.unlink()


def open_pairs(args, job, state):
    """The training pairs; the demo's are packed when they are missing. Prints what they are. Raises ValueError when a
    run goes on and its shards are no longer what they were; one that is missing is worth holes, and is printed."""
    if any(source.startswith(DEMO) for source in args.data):
        main_first(job, lambda: os.path.exists(DEMO) or demo.pack_emoji(DEMO))
    pairs = main_first(job, lambda: data.Pairs(args.data, state and state["data"]))
    for cause in ("shard changed", "shard missing") if state else ():
        shard = next((shard for shard in pairs.shards if cause in shard.left_out), None)
        if shard and (cause == "shard changed" or 2 * pairs.left_out[cause] > len(pairs)):
            raise ValueError(f"--data: {cause}: {shard.path}, of {shard.count:,} pairs and {shard.size:,} bytes when the "
                             f"run began; put it back, or start another run with another --out")
    if job.main:
        print(pairs.describe(), flush=True)
    return pairs


# What a resumed run may change: where and how fast it runs, not what it computes.
FREE = {"data", "out", "resume", "workers", "save_every", "keep", "precision", "compile", "micro_batch", "init",
        "evals", "test", "tokenizer", "epochs"}


def describe_run(stage, args, model_config, pairs, state, **facts):
    """What run this is, as plain values for config.json and the checkpoint. Raises ValueError when args.resume goes on with
    a run that was something else, naming the first difference."""
    steps = args.steps or int(args.epochs * data.Order(pairs, args.seed).slots_per_epoch // args.batch_size)
    if steps < 1:
        raise ValueError(f"{len(pairs):,} pairs are fewer than one batch: lower --batch-size {args.batch_size}")
    warmup = min(2000, max(1, steps // 10)) if args.warmup is None else args.warmup
    config = {"stage": stage, "preset": args.model, "model": dict(model_config), "pairs": len(pairs), **facts,
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
    return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)


def fit(job, args, module, optimizer, loader, step_fn, config, state=None, after_step=None, evaluate=None, extra=None):
    """Train: the loop of both stages.

    module: what is trained and kept in the checkpoint. step_fn(batch, scaler) -> dict of detached tensors, "loss" and
    "flops" (for a pair) among them, after its backward pass. config: as describe_run gives. state: the checkpoint to go on
    from. after_step(): what is done to the weights after each step. evaluate(step) -> dict for the log, args.evals times,
    on rank 0. extra: more for the checkpoint. Raises ValueError when the loss or gradients stay non-finite, SystemExit
    after a signal that asked for an end.
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

    saved = state and first

    def save(step):
        nonlocal saved
        if job.main and saved != step:
            save_run(folder, {
                "model": module.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "step": step, "slots": step * args.batch_size, "config": config, "data": loader.pairs.state(),
                **(extra or {})}, saved, args.keep)
        saved = step

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
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).detach()
        finite, finite_loss = norm.isfinite().float(), metrics["loss"].isfinite().float()
        metrics.update({"sum/grad_norm": norm.nan_to_num(0, 0), "count/grad_norm": finite})
        # Gradients that are not finite skip the step, on all ranks together since all have the same ones; the fused
        # kernel reads found_inf on the device, so that nothing waits for it. Under fp16 the scaler does that, and gradients
        # that overflow while the loss is finite are its ordinary way to find a scale.
        metrics["skipped"] = 1 - finite
        if scaler.is_enabled():
            metrics["overflow"], metrics["skipped"] = finite_loss * (1 - finite), 1 - finite_loss
        else:
            optimizer.found_inf = metrics["skipped"]
        scaler.step(optimizer)
        scaler.update()
        if after_step:
            after_step()
        step += 1
        log.add(metrics)
        if log.due(step):
            log.write(step, optimizer.param_groups[0]["lr"])
            if log.bad >= BAD_STEPS:
                good = f"from the last good checkpoint, {folder}/last.pt of step {saved}, by --init" if saved else "again"
                raise ValueError(f"the loss or the gradients of the last {log.bad} steps were not finite: start {good} "
                                 "with a lower --lr and another --out")
            if stop.seen(job):
                save(step)
                log.close()
                line = f"{stop.name} at step {step} of {steps}: saved {folder}/last.pt; --resume goes on"
                raise SystemExit(line if job.main else 1)
        if step in evaluations:
            start = time.perf_counter()
            if job.main:
                log.note(step, evaluate(step))
            barrier(job)
            log.since += time.perf_counter() - start  # counts in no rate
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
        self.steps, self.next, self.peak = steps, first + 1, peak_flops(job.device)
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

    def due(self, step):
        """Whether a line is written after this step: the same on all ranks."""
        return step >= self.next or step == self.steps

    def write(self, step, lr):
        """A line of means over the steps since the last; sums of "sum/..." are over all ranks, for their quotients."""
        seconds = time.perf_counter() - self.since
        self.sums["seconds"] = torch.tensor(seconds, device=self.job.device)
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
        # The next line is after ten steps, or fewer slow ones: on all ranks after the same, since it is their mean that says.
        self.next = step + max(1, min(LOG_EVERY - step % LOG_EVERY, int(LOG_SECONDS / line["seconds"])))
        self.bad = self.bad + self.count if line["skipped"] == 1 else 0
        line["images_per_second"] = self.batch_size * self.count / seconds
        line["data_wait"] = self.waited / seconds
        line["tflops"] = line.pop("flops") * line["images_per_second"] / 1e12
        if self.peak:
            line["utilisation"] = line["tflops"] * 1e12 / (self.peak * self.job.world_size)
        line["memory_gb"] = peak_memory(self.job.device) / 1e9
        line["holes"] = sum(self.loader.skipped.values())
        self._append(line)
        self.bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['images_per_second']:.0f} images/s")
        self._reset()

    def note(self, step, result):
        """Add a line of evaluation results."""
        self._append({"step": step, **result})

    def _append(self, line):
        if self.job.main:
            line = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in line.items()}
            line = {key: value if value == value and abs(value) != math.inf else None for key, value in line.items()}
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


def peak_flops(device):
    """Operations a second that a GPU could do at most in half precision; None where they are not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((PEAK[key] for key in sorted(PEAK, key=len, reverse=True) if key in name), None)


def transformer_flops(tokens, width, layers, one=False):
    """Operations of the matrix products of a transformer's forward pass over one sequence, a multiplication and an addition
    being two: 24 width^2 for each token and layer, and 4 width for each pair of tokens. one: the last layer computes one
    token, from the keys and values of all."""
    last = 4 * tokens * width ** 2 + 20 * width ** 2 + 4 * width * tokens
    return (layers - one) * tokens * (24 * width ** 2 + 4 * width * tokens) + one * last


def image_flops(config, sizes):
    """Operations of the image encoder's forward pass over crops of these sizes of one picture."""
    width, patch, layers = config["vision_width"], config["vision_patch_size"], config["vision_layers"]
    patches = [(size // patch) ** 2 for size in sizes]
    return sum(2 * n * 3 * patch ** 2 * width + transformer_flops(n + 1, width, layers, one=True)
               + 2 * width * config["embed_dim"] for n in patches)


def text_flops(config, length):
    """Operations of the text encoder's forward pass over a caption of `length` tokens, start and end included."""
    width = config["transformer_width"]
    return transformer_flops(length, width, config["transformer_layers"], one=True) + 2 * width * config["embed_dim"]


def mae_flops(mae):
    """Operations of the autoencoder's forward pass over one picture: the encoder on the patches that stay, the decoder on
    all."""
    patches, pixels = len(mae.decoder_positions) - 1, mae.decoder_pred.out_features
    kept = max(1, round(patches * (1 - mae.mask_ratio)))
    width, decoder = mae.decoder_embed.in_features, mae.decoder_embed.out_features
    encoder_layers, decoder_layers = len(mae.visual.transformer.resblocks), len(mae.decoder.resblocks)
    return (2 * kept * pixels * width + transformer_flops(kept + 1, width, encoder_layers) + 2 * (kept + 1) * width * decoder
            + transformer_flops(patches + 1, decoder, decoder_layers) + 2 * patches * decoder * pixels)
