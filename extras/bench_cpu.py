"""Training steps on a CPU: how far they are from this machine's limit, and their parts.

    python -m extras.bench train    among others, rows "limit of ..."
    python -m extras.bench parts    the parts of steps: milliseconds and percent

A step cannot be faster than its matrix products. Its limit is the rate at which this machine
computes the same products alone: operations, shapes, strides, dtypes and threads are the same, and
each product is repeated, so that its operands are in the cache. The products are those of torch
in a step: forward and backward pass, loss and optimizer. Their FLOPs are torch's
(torch.utils.flop_counter). Compared with the formulas of extras/bench.py, the backward pass
computes no gradient of the pixels, and the loss and the optimizer add theirs.

From top to bottom: the steps, a recorder of what they compute, the limit, the parts.

Not included: memory (extras/bench_memory.py), GPUs (extras/bench_gpu.py), and compiled steps, of
which a recorder sees nothing.
"""

import collections
import time
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

import crops
import kelip
import train_clip
import trainer
from extras import bench
from optimizer import make_optimizer

aten = torch.ops.aten


# ---- steps ----

class Setting(NamedTuple):
    """What a step trains, as train_clip.py does."""
    preset: str
    batch: int
    crops: str = "1x224"
    scale: tuple = (0.4, 1.0)
    captions: int = 1           # of a pair
    tokens: tuple = (6, 25)     # the shortest and the longest caption
    optimizer: str = "adamw"
    micro_batch: int = None

    def __str__(self):
        micro_batch = f", --micro-batch {self.micro_batch}" if self.micro_batch else ""
        return f"{self.preset}, {self.crops}, batch {self.batch}{micro_batch}"


# The demo's captions, one in each of two languages, have 3 to 10 tokens.
TINY = Setting("tiny", 512, "1x48", (0.8, 1.0), captions=2, tokens=(3, 10), optimizer="muon")
SETTINGS = [Setting("ViT-B/32", 32), Setting("ViT-B/32", 32, "2x224+6x96"), TINY,
            TINY._replace(batch=256)]


def make_step(setting, dtype=torch.bfloat16):
    """A function that takes a step of train_clip.py on random pairs, its model and its optimizer.

    It goes from uint8 images to updated weights. dtype: of autocast, None for none.
    """
    torch.manual_seed(0)
    config = kelip.PRESETS[setting.preset]
    model = kelip.KELIP(**config)
    encoders = train_clip.Encoders(model)
    optimizer = make_optimizer(model, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2,
                               name=setting.optimizer, dtype=dtype)
    groups, batch = crops.parse_crops(setting.crops), setting.batch
    S = crops.padded_size(groups, setting.scale)
    images = torch.randint(0, 256, (batch, S, S, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    aspect, sample_index = torch.full((batch,), 4 / 3), torch.arange(batch)
    tokens = random_captions(setting, config)                                # [N, C, L]
    valid = torch.ones(setting.captions, batch, dtype=torch.bool)            # [C, N]

    def make_views(_, rows=slice(None)):
        with record_function("crops"):
            return crops.multi_crop(images[rows], groups, 0, sample_index[rows], aspect[rows],
                                    setting.scale)

    def autocast():
        return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)

    def step():
        if setting.micro_batch:
            run = SimpleNamespace(args=SimpleNamespace(compile=False), group=None,
                                  autocast=autocast, backward=torch.Tensor.backward)
            train_clip.backward_in_micro_batches(
                run, encoders, make_views, SimpleNamespace(tokens=tokens), valid,
                setting.micro_batch)
        else:
            views = make_views(None)
            with autocast():
                features = encoders(views, tokens)
            with record_function("loss"):
                loss = kelip.contrastive_loss(*features, valid=valid)
            loss.backward()
        with record_function("gradient norm"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.MAX_GRAD_NORM)
        with record_function("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return step, model, optimizer


def random_captions(setting, config):
    """Captions of random lengths and tokens: int64 [N, C, L]."""
    shortest, longest = setting.tokens
    end = config["vocab_size"] - 1
    tokens = torch.randint(300, end, (setting.batch, setting.captions, config["context_length"]))
    last = torch.randint(shortest - 1, longest, (*tokens.shape[:2], 1))
    position = torch.arange(config["context_length"])
    return tokens.masked_fill(position == last, end).masked_fill(position > last, 0)


# ---- what a step computes ----

class Operand(NamedTuple):
    """What the time of a product depends on, of a tensor."""
    shape: tuple
    stride: tuple
    dtype: torch.dtype

    def random(self):
        """A tensor of random numbers like this one."""
        size = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.stride))
        return torch.randn(size).to(self.dtype).as_strided(self.shape, self.stride)


PARTS = {  # the names of operations; then modules count, and scopes of record_function before both
    "matrix products": {"mm", "addmm", "convolution", "convolution_backward"},
    "attention": {"bmm", "baddbmm", "_softmax", "_softmax_backward_data", "masked_fill", "tril"},
    "LayerNorm": {"native_layer_norm", "native_layer_norm_backward"},
    "casts": {"_to_copy"},
    "sums for the gradients of biases": {"sum"},
    "packing, embeddings": {"index_select", "index_add", "index_copy", "index", "embedding",
                            "embedding_dense_backward"}}
MODULES = {"gelu": "activation", "attn": "attention"}
REST = "Python, autograd, memory"


class Recorder(TorchDispatchMode):
    """Records the operations of a step, of the forward and of the backward pass.

    Attributes: products, {(operation, arguments): how often}; flops, {(operation, arguments): those
    of one}; seconds, {part: seconds}.
    """

    def __init__(self, clock=time.perf_counter):
        super().__init__()
        self.clock = clock
        self.products, self.flops = collections.Counter(), {}
        self.seconds = collections.Counter()
        self._scopes = []
        self._modules = ModuleTracker()

    def __enter__(self):
        self._modules.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._modules.__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        start = self.clock()
        result = operation(*args, **kwargs)
        seconds = self.clock() - start
        name = operation.overloadpacket.__name__
        if name == "_record_function_enter_new":
            self._scopes.append(args[0])
        elif name == "_record_function_exit":
            self._scopes.pop()
        self.seconds[self.part_of(name)] += seconds
        # addmm_ takes the FLOPs of addmm, which has a formula.
        formula = flop_registry.get(getattr(aten, name.removesuffix("_"), None))
        if formula:
            leaves, structure = tree_flatten((args, kwargs))
            leaves = tuple(Operand(tuple(x.shape), x.stride(), x.dtype) if torch.is_tensor(x) else x
                           for x in leaves)
            product = operation, leaves, structure
            self.products[product] += 1
            self.flops[product] = formula(*args, **kwargs, out_val=result)
        return result

    def part_of(self, name):
        """The part of a step to which an operation of this name belongs now."""
        if self._scopes:
            return self._scopes[0]
        for part, names in PARTS.items():
            if name in names:
                return part
        for module in self._modules.parents:
            kind = module.rpartition(".")[2]
            if kind in MODULES:
                return MODULES[kind]
        return "residual sums and others"

    def total_flops(self):
        """The FLOPs of all products."""
        return sum(count * self.flops[product] for product, count in self.products.items())


# ---- the limit ----

def seconds_alone(products, repeats=5, clock=time.perf_counter):
    """The seconds that these products take alone: for each, the least of several times its count.
    """
    total = 0.0
    for (operation, leaves, structure), count in products.items():
        leaves = [x.random() if isinstance(x, Operand) else x for x in leaves]
        args, kwargs = tree_unflatten(leaves, structure)
        [seconds] = bench.least_seconds(partial(operation, *args, **kwargs), repeats=repeats,
                                        clock=clock)
        total += count * seconds
    return total


def limit_row(what, step):
    """A step in TFLOP/s, and its products alone: the ratio is its fraction of the limit."""
    step()
    with Recorder() as recorder:
        step()
    alone = seconds_alone(recorder.products)
    [seconds] = bench.least_seconds(step)
    alone = min(alone, seconds_alone(recorder.products))  # the machine may have been busy
    flops = recorder.total_flops()
    return bench.Row(f"limit of {what}", flops / seconds / 1e12, "its products alone",
                     flops / alone / 1e12, "TFLOP/s", f"bfloat16, {torch.get_num_threads()} "
                     f"threads, {seconds:.2f} s a step; ratio: fraction of the limit")


def limit_rows():
    """The limit_row of each setting."""
    for setting in SETTINGS:
        step, _, _ = make_step(setting)
        yield limit_row(f"{setting}", step)


# ---- the parts of a step ----

def parts_of(step, repeats=3, clock=time.perf_counter):
    """{part: seconds} of a step, which sum to its least time. REST lies between the operations."""
    [total] = bench.least_seconds(step, repeats=repeats, clock=clock)
    recorders = []
    for _ in range(repeats):
        with Recorder(clock) as recorder:
            step()
        recorders.append(recorder)
    seconds = min((recorder.seconds for recorder in recorders), key=lambda s: s.total())
    seconds[REST] = max(0.0, total - seconds.total())
    return seconds


def print_parts():
    """Print the parts of each setting's step."""
    bench.training_device()
    for setting in SETTINGS:
        step, _, _ = make_step(setting)
        seconds = parts_of(step)
        total = seconds.total()
        print(f"{setting}, {setting.optimizer}, {torch.get_num_threads()} threads: {total:.3f} s")
        for part, own in seconds.most_common():
            print(f"    {part:35} {1e3 * own:8.1f} ms {own / total:7.1%}")
