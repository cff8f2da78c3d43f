"""The memory of training steps, by arithmetic and measured.

    python -m extras.bench memory     ViT-B/32 on a CPU, with and without --micro-batch
    python -m extras.bench network    the arithmetic for many GPUs, among others

A rank holds all weights, their gradients and the state of the optimizer, and of its own pairs what
the backward pass needs. The arithmetic counts matrices alone: no single numbers per token, no
memory of the libraries, and nothing that the allocator cannot use.

From top to bottom: what a model takes, what pairs take, a measurement.

Not included: GPUs, where attention saves no weights, and sharded weights (docs/scaling.md).
"""

import torch

import crops
import kelip
from extras import bench, bench_cpu
from optimizer import is_muon_matrix

# ---- by arithmetic ----

def state_bytes(model, optimizer="adamw"):
    """Bytes that a rank keeps of a model, by arithmetic: {what: bytes}.

    All are float32. AdamW has two moments of each weight, Muon one of each of its matrices.
    """
    n = kelip.count_parameters(model)
    n_muon = sum(parameter.numel() for key, parameter in model.named_parameters()
                 if optimizer == "muon" and is_muon_matrix(key, parameter))
    return {"weights": 4 * n, "gradients": 4 * n, "optimizer": 8 * n - 4 * n_muon}


def transformer_activations(batch, tokens, width, layers, n_packed=None):
    """Bytes that a kelip.Transformer under autocast to bfloat16 saves for its backward pass.

    For N sequences of L tokens of width W, together T = N L (fewer if captions are packed), a layer
    saves

        8 T W          the inputs of both LayerNorms, float32
        4 T W          their outputs
        6 N L W        queries, keys and values
        2 N H L^2      attention weights of H heads
        2 T W          the heads' outputs
        24 T W         of the MLP, 4 W wide: QuickGELU's input, sigmoid and output

    The last layer (see Transformer.forward_one) saves 6 T W for one LayerNorm, and 4 N L W of keys
    and values. What has a single token per sequence is not counted.
    """
    N, L, W, H = batch, tokens, width, width // 64
    T = n_packed or N * L
    layer = 38 * T * W + 6 * N * L * W + 2 * N * H * L ** 2
    return (layers - 1) * layer + 6 * T * W + 4 * N * L * W


def activation_bytes(config, sizes, batch, lengths):
    """Bytes of the crops, and of what both encoders save for the backward pass.

    sizes: the sides of the crops; lengths: those of all captions. Patches are saved in bfloat16,
    and the input of ln_pre in float32.
    """
    patch, width = config["vision_patch_size"], config["vision_width"]
    total = 0
    for size in sizes:
        patches = (size // patch) ** 2
        pixels = batch * patches * 3 * patch ** 2
        total += 4 * pixels + 2 * pixels + 4 * batch * (patches + 1) * width
        total += transformer_activations(batch, patches + 1, width, config["vision_layers"])
    padded = 8 * kelip.ceil_div(int(lengths.max()), 8)
    n_packed = 64 * kelip.ceil_div(int(lengths.sum()), 64)
    return total + transformer_activations(
        len(lengths), padded, config["transformer_width"], config["transformer_layers"], n_packed)


def memory_of(setting):
    """Megabytes of a step by arithmetic: {what: megabytes}, and the most that exist at once.

    At the peak, the forward pass is over: activations, and the copies of matrices in bfloat16 that
    autocast keeps. Afterwards gradients take their place. With micro-batches, the gradients of
    earlier ones exist, too.
    """
    config = kelip.PRESETS[setting.preset]
    with torch.device("meta"):
        model = kelip.KELIP(**config)
    found = state_bytes(model, setting.optimizer)
    found["copies in bfloat16"] = sum(2 * p.numel() for key, p in model.named_parameters()
                                      if p.ndim > 1 and "embedding" not in key)
    torch.manual_seed(0)
    tokens = bench_cpu.random_captions(setting, config).flatten(0, 1)
    sizes = [size for number, size in crops.parse_crops(setting.crops) for _ in range(number)]
    rows = slice(setting.micro_batch)  # of the first micro-batch, or all
    lengths = tokens.argmax(dim=1)[rows] + 1
    found["activations"] = activation_bytes(config, sizes, setting.micro_batch or setting.batch,
                                            lengths)
    passing = found["copies in bfloat16"] + found["activations"]
    if setting.micro_batch:
        passing += found["gradients"]
    passing = max(found["gradients"], passing)
    found["at the peak"] = found["weights"] + found["optimizer"] + passing
    return {what: n_bytes / 1e6 for what, n_bytes in found.items()}


# ---- measured ----

MICRO = bench.MICRO_BATCH
MEMORY_SETTINGS = [bench_cpu.Setting("ViT-B/32", MICRO), bench_cpu.Setting("ViT-B/32", 4 * MICRO),
                   bench_cpu.Setting("ViT-B/32", MICRO, micro_batch=MICRO // 2),
                   bench_cpu.Setting("ViT-B/32", 4 * MICRO, micro_batch=MICRO),
                   bench_cpu.Setting("ViT-B/32", 16 * MICRO, micro_batch=MICRO)]
# Those that docs/scaling.md measures on a GPU, here by arithmetic alone.
GPU_SETTINGS = [bench_cpu.Setting("ViT-B/32", 1024),
                bench_cpu.Setting("ViT-B/32", 512, "2x224+6x96")]


def measure_memory(setting):
    """(seconds, megabytes beyond the libraries) of a step."""
    bench_cpu.make_step(bench_cpu.TINY._replace(batch=4))[0]()  # loads libraries, starts threads
    bench.training_device()
    before = bench.memory_of_process("VmRSS")
    step, model, optimizer = bench_cpu.make_step(setting)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes its state, as the first step does
    optimizer.zero_grad(set_to_none=True)
    return bench.seconds_of(step), bench.peak_memory() - before


def print_memory():
    """Print the memory of steps by arithmetic and measured, and their times."""
    threads = torch.get_num_threads()
    print(f"MB of a step, {threads} threads, bfloat16: by arithmetic, and measured")
    columns = [*memory_of(MEMORY_SETTINGS[0]), "measured", "s a step", "pairs/s"]
    widths = [len(column) + 2 for column in columns]
    print(" " * 54 + "".join(map(str.rjust, columns, widths)))
    for setting in MEMORY_SETTINGS + GPU_SETTINGS:
        numbers = [f"{number:,.0f}" for number in memory_of(setting).values()]
        if setting in MEMORY_SETTINGS:
            seconds, megabytes = bench.alone(measure_memory, setting, threads=threads)
            numbers += [f"{megabytes:,.0f}", f"{seconds:.1f}", f"{setting.batch / seconds:.1f}"]
        print(f"{setting!s:54}" + "".join(map(str.rjust, numbers, widths)), flush=True)
