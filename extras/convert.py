"""Convert CLIP weights from OpenAI, open_clip and transformers, and export models.

    # into a folder that kelip.build_model, train_clip.py --init and evaluate.py open
    python -m extras.convert clip-vit-base-patch32/ OUT
    python -m extras.convert state_dict.pt OUT --tokenizer bpe_simple_vocab_16e6.txt.gz
    python -m extras.convert epoch_32.pt OUT --tokenizer tokenizer.json --activation gelu

    # into a folder for another library
    python -m extras.convert runs/clip OUT --to hf          # CLIPModel.from_pretrained(OUT)
    python -m extras.convert runs/clip OUT --to open_clip   # create_model("local-dir:OUT")
    python -m extras.convert runs/clip OUT --to onnx        # python OUT/example.py IMAGE TEXTS

    # into a model between two, such as before and after fine-tuning
    python -m extras.convert runs/mine OUT --blend runs/clip 0.5

From top to bottom: read, write and blend; what all CLIPs of other libraries need; open_clip's and
OpenAI's format; transformers' format; ONNX; tokenizers; the command. KELIP's parameters have the
names of OpenAI's CLIP, which open_clip uses too. Only transformers has other names.

Weights alone do not determine a model: the number of heads and the activation (GELU or QuickGELU)
come from the configuration in the same folder, or from --activation, --vision-heads and
--transformer-heads. All sizes come from the weights, and the configuration must agree with them. A
configuration that KELIP's encoders or its `preprocess` cannot compute is an error that names the
file and the key.

OpenAI's code and open_clip clean texts before they tokenize them: they repair broken UTF-8 and
curly quotes (with the package ftfy), replace HTML entities such as &amp;, and collapse whitespace.
A tokenizer.json can express only part of this. Where this cleaning changes nothing, ids are equal.

Not included: image encoders other than ViTs, text encoders that do not pool at the end token,
sigmoid losses (SigLIP), TorchScript archives.
"""

import argparse
import functools
import gzip
import importlib.util
import json
import re
import shutil
import sys
import warnings
import zlib
from pathlib import Path

import torch

import kelip
from command import ArgumentParser, number, one_line, run_command
from extras import export
from extras.calibrate import read_calibration
from kelip import MEAN, STD, read_sizes
from shards import new_folder
from tokenizer import ALPHABET, BYTE_LEVEL, END, START, Tokenizer, build_spec, read_json

# The names that a file of weights may have in a folder. The first that exists is read.
WEIGHT_FILES = (
    "last.pt", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
    "pytorch_model.bin.index.json", "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"
CONVERTIBLE = ("CLIPs of OpenAI, open_clip and transformers (model_type 'clip') can be converted "
               "if their image encoder is a ViT and their text encoder is CLIP's own")


# ---- read, write and blend ----

def read(src, tokenizer=None, **given):
    """Read a checkpoint of any known format: a kelip.Checkpoint whose weights fit its config.

    src: a file of weights or a folder with one: a run of train_clip.py, released KELIP, or a CLIP
    of OpenAI, open_clip or transformers. tokenizer: the path of a tokenizer.json or of CLIP's list
    of merges (default: the one in the same folder; another must have the same vocabulary). given:
    keys of KELIP's configuration that no file states, such as activation="gelu".

    The weights are float32 and have KELIP's names. Raises FileNotFoundError when the weights or the
    tokenizer are missing, and ValueError with the file and its key when they do not fit.
    """
    config_path = Path(src) / "config.json"
    if config_path.is_file() and not config_path.with_name("last.pt").is_file():
        check_model_type(config_path)
    path = find_weights(src)
    state = read_weights(path)
    if is_kelip(path, state):
        checkpoint = read_kelip(path, tokenizer)
    else:
        checkpoint = read_clip(path, state, tokenizer, given)
    config = {**kelip.default_options(checkpoint.config), **checkpoint.config}
    for key, value in given.items():
        if config[key] != value:
            flag = key.replace("_", "-")
            raise ValueError(f"{path}: its {key} is {config[key]}: leave out --{flag} {value}")
    return checkpoint


def write(checkpoint, out, to="kelip", half=False):
    """Write a Checkpoint of `read` as a new folder, which appears when it is complete.

    to: "kelip" is the layout of released KELIP, which kelip.build_model opens; "hf" is that of
    transformers' CLIPModel; "open_clip" is open_clip's; "onnx" is two encoders for onnxruntime,
    with weights in float16 if `half`. Raises FileExistsError when `out` is not empty, ImportError
    when a package is needed and missing.
    """
    writers = {"kelip": write_kelip, "hf": write_hf, "open_clip": write_open_clip,
               "onnx": functools.partial(write_onnx, half=half)}
    with new_folder(str(out)) as folder:
        writers[to](checkpoint, Path(folder))


def blend(before, after, alpha):
    """The Checkpoint on the straight line from one (alpha 0) to another (alpha 1), by weights.

    WiSE-FT (Wortsman et al., arXiv 2109.01903). Raises ValueError when the two have different
    configurations or tokenizers.
    """
    config, other = ({**kelip.default_options(checkpoint.config), **checkpoint.config}
                     for checkpoint in (before, after))
    differences = [f"{key} ({config[key]} and {other[key]})"
                   for key in sorted(config) if config[key] != other[key]]
    if before.tokenizer.digest != after.tokenizer.digest:
        differences.append("tokenizer")
    if differences:
        raise ValueError(f"{before.path} and {after.path} differ in {', '.join(differences)}: to "
                         "blend two models, fine-tune one from the other at the same resolution")
    if alpha in (0, 1):  # the formula would make 0 of -0
        return after if alpha else before
    return after._replace(weights={
        key: (1 - alpha) * before.weights[key] + alpha * value
        for key, value in after.weights.items()})


def find_weights(src):
    """The file of weights for a folder, a file or the name of a preset."""
    path = Path("weights") if src in kelip.PRESETS else Path(src)
    if path.is_file():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{src}: no weights there: give a file, or a folder with one of "
                            f"{', '.join(WEIGHT_FILES)}")


def read_weights(path):
    """The content of a file of weights, or of all files that an .index.json lists."""
    if not path.name.endswith(".index.json"):
        return kelip.read_weights(path)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: has no weight_map, which lists the files of the parameters")
    state = {}
    for name in sorted(set(map(str, weight_map.values()))):
        # Nothing outside the folder is read, and no other index.
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name):
            raise ValueError(f"{path}: weight_map names {name!r:.80}; it must name .safetensors or "
                             ".bin files in the same folder")
        file = path.with_name(name)
        if not file.is_file():
            raise FileNotFoundError(f"{path}: weight_map names {name}, which is not in the folder")
        state |= kelip.read_weights(file)
    return state


def as_object(path, name, content):
    """Return `content`. Raises ValueError unless it is an object. name: its key in the file."""
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {name} is {content!r:.80}, where an object {{...}} is expected")
    return content


def is_kelip(path, state):
    """Whether kelip.py itself can read this file: a run, or released KELIP."""
    if isinstance(state.get("config"), dict) and "model" in state:
        return True
    config_path = path.with_name("config.json")
    return config_path.is_file() and "embed_dim" in read_json(config_path)


def read_kelip(path, tokenizer):
    """The Checkpoint of a run of stage 2 or of released KELIP."""
    if path.suffix == ".json":
        raise ValueError(f"{path}: released KELIP in several files cannot be read; save it as one "
                         "model.safetensors")
    checkpoint = kelip.open_checkpoint(path)
    if checkpoint.is_stage_1:
        raise ValueError(f"{path}: a run of stage 1, which is an image encoder alone; "
                         "train_clip.py --init opens it without conversion")
    config = check_model(path, checkpoint.weights, checkpoint.config)
    return choose_tokenizer(checkpoint._replace(config=config), tokenizer)


def write_kelip(checkpoint, folder):
    """The files of released KELIP, whose names of weights start with "model."."""
    config = checkpoint.config
    if unknown := ", ".join(sorted(config.keys() & kelip.default_options(config).keys())):
        warnings.warn(f"config.json: the code that KELIP's authors released does not know "
                      f"{unknown}; kelip.py does", stacklevel=3)
    if "Lowercase" not in str(checkpoint.tokenizer.spec.get("normalizer")):
        warnings.warn("tokenizer.json: keeps upper case, but KELIP lower-cases every text; texts "
                      "with upper case get other ids than in the original model", stacklevel=3)
    weights = {f"model.{key}": value for key, value in checkpoint.weights.items()}
    if importlib.util.find_spec("safetensors"):
        save_safetensors(weights, folder / "model.safetensors")
    else:
        kelip.save_checkpoint(folder / "pytorch_model.bin", weights)
    write_json(folder / "config.json",
               {"architectures": ["KelipModel"], "model_type": "kelip", **config})
    write_json(folder / "preprocessor.json", describe_preprocess(config))
    # The authors' code adds the start and end token itself, after the tokenizer.
    write_tokenizer(checkpoint, folder, template=False)


def describe_preprocess(config):
    """What kelip.preprocess does, for preprocessor.json."""
    return {"image_size": config["image_resolution"], "resize": "shortest side",
            "interpolation": "bicubic", "crop": "center", "mean": MEAN, "std": STD}


def save_safetensors(weights, path):
    """Write a .safetensors file, with the metadata that transformers asks for."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError(
            f"{path.name}: writing it needs a package: pip install safetensors") from None
    # safetensors refuses tensors that share memory, as the chunks of in_proj do.
    tensors = {key: value.clone(memory_format=torch.contiguous_format)
               for key, value in weights.items()}
    path.touch()
    mode = path.stat().st_mode  # what the umask asks for; safetensors 0.8 writes a private file
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{path}: {error}") from None
    path.chmod(mode)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


# ---- CLIPs of other libraries ----

# Numbers that OpenAI's state dicts hold among the weights, and others do not.
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")

# Parts of names of parameters that only models of another kind have, and the kind.
REFUSED = {
    "visual.layer1.": "of a ResNet",
    "visual.trunk.": "of an image encoder of timm",
    "visual.blocks.": "of an EVA-CLIP",
    "text.transformer.embeddings.": "of a text encoder of transformers",
    "word_embeddings.": "of another text encoder, such as BERT",
    "logit_bias": "of a sigmoid loss",
}


def check_model_type(path):
    """Raise ValueError when a config.json is that of another model than CLIP or KELIP."""
    content = read_json(path)
    model_type = content.get("model_type")
    if model_type not in (None, "clip") and "embed_dim" not in content:
        raise ValueError(f"{path}: model_type is {model_type!r:.80}, which cannot be converted; "
                         f"{CONVERTIBLE}")


def read_clip(path, state, tokenizer, given):
    """The Checkpoint of another library's CLIP."""
    tensors, prefix = strip_wrappers(path, state)
    is_hf = any(key.startswith("vision_model.") for key in tensors)
    has_text_prefix = any(key.startswith("text.") for key in tensors)

    def name_in_file(key):
        return prefix + (hf_name(key) if is_hf else open_clip_name(key, has_text_prefix))

    if is_hf:
        weights, config_path = from_hf(path, tensors, prefix), path.with_name("config.json")
    else:
        weights, config_path = from_open_clip(tensors), path.with_name("open_clip_config.json")
    numbers = [weights.pop(key, None) for key in OPENAI_NUMBERS]
    sizes = read_sizes(path, weights, name_in_file)
    if config_path.is_file() and is_hf:
        config, mean, std = read_hf_config(config_path, sizes)
    elif config_path.is_file():
        config, mean, std = read_open_clip_config(config_path, sizes)
    else:
        is_openai = None not in numbers
        options = choose_options(path, sizes, config_path.name, is_openai, given)
        config, mean, std = {**sizes, **options}, MEAN, STD
    config = check_model(path, weights, config, name_in_file)
    weights = fold_normalization(weights, mean, std)

    own = find_tokenizer(path)
    checkpoint = kelip.Checkpoint(path, weights, config, own and load_tokenizer(own))
    checkpoint = choose_tokenizer(checkpoint, tokenizer)
    if config_path.is_file() and is_hf:
        check_hf_end(config_path, checkpoint.tokenizer.eot_id)
    return checkpoint


def strip_wrappers(path, state):
    """Take a state dict out of what a training script wraps it in: (tensors by name, prefix).

    prefix is what DistributedDataParallel, torch.compile and others put before every name. The
    tensors become float32. Raises ValueError when they cannot be the weights of a CLIP.
    """
    state = state.get("state_dict", state)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: holds {type(state).__name__}, where weights are tensors by "
                         f"name; {CONVERTIBLE}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: {name} holds {type(value).__name__}, where weights are "
                             f"tensors by name; {CONVERTIBLE}")
    prefix = ""
    for wrapper in ("_orig_mod.", "module.", "_orig_mod.", "model."):
        if all(key.startswith(prefix + wrapper) for key in state):
            prefix += wrapper
    numbers, weights = {}, {}
    for name, value in state.items():
        for part, kind in REFUSED.items():
            if part in name:
                raise ValueError(f"{path}: holds {name}, {kind}, which cannot be converted; "
                                 f"{CONVERTIBLE}")
        key = name.removeprefix(prefix)
        if key in OPENAI_NUMBERS:
            numbers[key] = value
        elif not key.endswith("embeddings.position_ids"):  # a buffer: 0, 1, 2, ...
            weights[name] = value
    kelip.check_weights(weights, path)
    tensors = {name.removeprefix(prefix): value.float() for name, value in weights.items()}
    tensors |= numbers
    if not any(key.startswith(("visual.", "vision_model.")) for key in tensors):
        raise ValueError(f"{path}: holds {next(iter(state))} and others, but no image encoder of a "
                         f"CLIP; {CONVERTIBLE}")
    return tensors, prefix


def complete_config(path, sizes, stated):
    """KELIP's configuration: the sizes of the weights, and what the file at `path` states.

    stated: {KELIP's key: (the file's name for it, its value)}. Raises ValueError when a value
    contradicts `sizes`, or when KELIP cannot compute it.
    """
    config = dict(sizes)
    for key, (name, value) in stated.items():
        if key in sizes and (type(value) is not int or value != sizes[key]):  # true is not 1
            raise ValueError(f"{path}: {name} is {value!r:.80}, and the weights have {sizes[key]}")
        config[key] = value
    for key in ("vision_heads", "transformer_heads"):
        name, heads = stated.get(key, (key, None))
        width = sizes[key.replace("heads", "width")]
        if type(heads) is not int or heads < 1 or width % heads:
            raise ValueError(f"{path}: {name} makes {heads!r:.80} heads, which must divide the "
                             f"width, {width}")
    name, activation = stated["activation"]
    check_values(path, {name: activation}, {name: list(kelip.ACTIVATIONS)})
    return config


def check_values(path, values, allowed, prefix=""):
    """Raise ValueError for a value of a configuration that KELIP does not compute.

    values: {key: value}. allowed: {key: [values]}. Other keys must be empty, since their effect is
    unknown. prefix: what to print before a key.
    """
    for key, value in values.items():
        found = f"{path}: {prefix}{key} is {value!r:.80}"
        if key not in allowed and value:
            raise ValueError(f"{found}, which KELIP does not compute")
        if key in allowed and value not in allowed[key]:
            raise ValueError(f"{found}; KELIP computes {' or '.join(map(repr, allowed[key]))}")


def check_model(path, weights, config, name_in_file=str):
    """Raise ValueError unless the weights are those of a KELIP of this configuration.

    Returns the configuration as KELIP keeps it.
    """
    try:
        with torch.device("meta"):  # shapes alone, which take no memory
            model = kelip.KELIP(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its configuration does not fit: {error}") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that nothing is copied
        kelip.load_weights(model, weights, path, name_in_file)
    return model.config


def choose_options(path, sizes, config_name, is_openai, given):
    """The activation and the numbers of heads, which shapes do not show.

    All of OpenAI's models have QuickGELU and heads 64 wide. For others, `given` must have the
    activation, and heads 64 wide are assumed with a warning.
    """
    if not is_openai and "activation" not in given:
        raise ValueError(f"{path}: its activation is unknown: put its {config_name} in the same "
                         "folder, or give --activation quick_gelu (as OpenAI's weights) or gelu "
                         "(as most of open_clip's)")
    heads = {"vision_heads": sizes["vision_width"] // 64,
             "transformer_heads": sizes["transformer_width"] // 64}
    if not is_openai and not heads.keys() <= given.keys():
        warnings.warn(f"{path}: its number of heads is unknown and assumed to be width / 64, "
                      f"{heads | given}: if that is wrong, put its {config_name} in the same "
                      "folder, or give --vision-heads and --transformer-heads", stacklevel=4)
    return {"activation": "quick_gelu", **heads, **given}


def fold_normalization(weights, mean, std):
    """Change weights for pixels of another mean and std into weights for CLIP's mean and std.

    The patch embedding is linear. Another std is a factor of its kernel. Another mean adds the same
    vector to all patches, so that vector is added to their positions.
    """
    if (tuple(mean), tuple(std)) == (MEAN, STD):
        return weights
    kernel = weights["visual.conv1.weight"]                                  # [W, 3, P, P]
    positions = weights["visual.positional_embedding"]                       # [1 + g*g, W]
    mean, std, clip_mean, clip_std = (
        torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (mean, std, MEAN, STD))
    shift = (kernel * ((clip_mean - mean) / std)).sum(dim=(1, 2, 3))         # [W]
    positions = torch.cat([positions[:1], (positions[1:] + shift).float()])
    kernel = (kernel * (clip_std / std)).float()
    return {**weights, "visual.conv1.weight": kernel, "visual.positional_embedding": positions}


def three_numbers(path, key, value, low):
    """A mean or a standard deviation of pixels: three numbers, or one for all channels."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    if len(numbers) != 3:
        raise ValueError(f"{path}: {key} has {len(numbers)} numbers, where RGB has 3")
    for value in numbers:
        check_number(path, key, value, low, 1e6)
    return numbers


def check_number(path, key, value, low, high):
    """Raise ValueError unless a value in a file is a number from low to high."""
    if type(value) not in (int, float) or not low <= value <= high:  # no True, and no NaN
        raise ValueError(f"{path}: {key} is {value!r:.80}, where a number from {low:g} to {high:g} "
                         "is expected")


def find_stated(values, tables):
    """What a configuration of another library states: {KELIP's key: (its name there, its value)}.

    values: {"part.name": value}. tables: those of rename_config.
    """
    stated = {}
    for part, names in tables.items():
        for key, name in names.items():
            name = f"{part}.{name}"
            if name in values:
                value = values[name]
                is_side = key in ("image_resolution", "vision_patch_size")  # or [side, side]
                if is_side and isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
                    value = value[0]
                stated[key] = (name, value)
    return stated


def rename_config(config, tables):
    """KELIP's configuration in the parts and keys of another library: {part: {key: value}}."""
    return {part: {name: config[key] for key, name in names.items()}
            for part, names in tables.items()}


# ---- open_clip's and OpenAI's format ----

# KELIP's keys of a configuration -> open_clip's, in each part of it.
OPEN_CLIP_CONFIG = {
    "vision_cfg": dict(
        image_resolution="image_size", vision_layers="layers", vision_width="width",
        vision_patch_size="patch_size"),
    "text_cfg": dict(
        context_length="context_length", vocab_size="vocab_size", transformer_width="width",
        transformer_heads="heads", transformer_layers="layers"),
}
# Other keys, which do not change features or are read separately.
OPEN_CLIP_IGNORED = {
    "embed_dim", "vision_cfg", "text_cfg", "preprocess_cfg", "custom_text", "init_logit_scale",
    "nonscalar_logit_scale", "cast_dtype", "output_dict", "vision_cfg.head_width",
    "vision_cfg.mlp_ratio", "vision_cfg.patch_dropout", "text_cfg.mlp_ratio",
    "text_cfg.hf_tokenizer_name", "text_cfg.pad_id", "text_cfg.eos_id", "preprocess_cfg.mean",
    "preprocess_cfg.std", "preprocess_cfg.size", "preprocess_cfg.fill_color"}
# These keys must have one of these values. Keys in no table must be empty.
OPEN_CLIP_ALLOWED = {
    "quick_gelu": [True, False, None],
    "vision_cfg.pool_type": ["tok"], "vision_cfg.pos_embed_type": ["learnable"],
    "text_cfg.pool_type": ["argmax"], "text_cfg.proj_type": ["linear"],
    "preprocess_cfg.interpolation": ["bicubic", None], "preprocess_cfg.mode": ["RGB", None],
    "preprocess_cfg.resize_mode": ["shortest", None]}


def from_open_clip(tensors):
    """A state dict of open_clip or OpenAI -> KELIP's. In some models texts have a prefix."""
    weights = {key.removeprefix("text."): value for key, value in tensors.items()}
    if "logit_scale" in weights and weights["logit_scale"].shape == (1,):  # in some of open_clip's
        weights["logit_scale"] = weights["logit_scale"][0]
    return weights


def open_clip_name(key, has_text_prefix):
    """KELIP's name of a weight -> open_clip's."""
    if has_text_prefix and not key.startswith(("visual.", "logit_scale")):
        return f"text.{key}"
    return key


def read_open_clip_config(path, sizes):
    """open_clip_config.json, or one of open_clip's model_configs: (KELIP's config, mean, std).

    sizes: those of the weights.
    """
    content = read_json(path)
    model = as_object(path, "model_cfg", content.get("model_cfg", content))
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in model:
            raise ValueError(f"{path}: has no {key}")
    vision = {"head_width": 64, **as_object(path, "vision_cfg", model["vision_cfg"])}
    text = {"heads": 8, **as_object(path, "text_cfg", model["text_cfg"])}
    pixels = as_object(path, "preprocess_cfg", content.get("preprocess_cfg") or {})
    values = dict(model)
    for part, keys in (("vision_cfg", vision), ("text_cfg", text), ("preprocess_cfg", pixels)):
        values |= {f"{part}.{key}": value for key, value in keys.items()}
    stated = find_stated(values, OPEN_CLIP_CONFIG)
    ignored = OPEN_CLIP_IGNORED | {name for name, _ in stated.values()}
    others = {key: value for key, value in values.items() if key not in ignored}
    check_values(path, others, OPEN_CLIP_ALLOWED)

    stated["embed_dim"] = ("embed_dim", model["embed_dim"])
    stated["activation"] = ("quick_gelu", "quick_gelu" if model.get("quick_gelu") else "gelu")
    # The heads of images and the MLPs follow from other numbers.
    name = "vision_cfg.head_width"
    check_number(path, name, vision["head_width"], 1, 1e6)
    stated["vision_heads"] = (name, sizes["vision_width"] // vision["head_width"])
    for key, part in (("vision", "vision_cfg"), ("transformer", "text_cfg")):
        name = f"{part}.mlp_ratio"
        if name in values:
            check_number(path, name, values[name], 0, 1e6)
            mlp_width = int(sizes[f"{key}_width"] * values[name])
            stated[f"{key}_mlp_width"] = (f"{part}.width * {name}", mlp_width)
    mean = three_numbers(path, "preprocess_cfg.mean", pixels.get("mean") or MEAN, -1e6)
    std = three_numbers(path, "preprocess_cfg.std", pixels.get("std") or STD, 1e-6)
    return complete_config(path, sizes, stated), mean, std


def write_open_clip(checkpoint, folder):
    """The files that open_clip.create_model("local-dir:FOLDER") opens."""
    config = {**kelip.default_options(checkpoint.config), **checkpoint.config}
    token_ids = write_tokenizer(checkpoint, folder)
    parts = rename_config(config, OPEN_CLIP_CONFIG)
    parts["vision_cfg"] |= {
        "head_width": config["vision_width"] // config["vision_heads"],
        "mlp_ratio": mlp_ratio(config["vision_mlp_width"], config["vision_width"])}
    parts["text_cfg"] |= {
        "mlp_ratio": mlp_ratio(config["transformer_mlp_width"], config["transformer_width"]),
        "hf_tokenizer_name": "tokenizer.json",  # with any name, open_clip reads the folder's
        "pad_id": token_ids["pad_token"]}
    save_safetensors(checkpoint.weights, folder / "open_clip_model.safetensors")
    write_json(folder / "open_clip_config.json", {
        "model_cfg": {"embed_dim": config["embed_dim"],
                      "quick_gelu": config["activation"] == "quick_gelu", **parts},
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic",
                           "resize_mode": "shortest"}})


def mlp_ratio(mlp_width, width):
    """The ratio from which open_clip computes the width of the MLP, as int(width * ratio)."""
    ratio = mlp_width / width
    if int(width * ratio) == mlp_width:
        return ratio
    return (mlp_width + 0.5) / width  # the quotient was rounded down


# ---- transformers' format ----

# KELIP's keys of a configuration -> transformers', in each part of it.
HF_CONFIG = {
    "vision_config": dict(
        image_resolution="image_size", vision_layers="num_hidden_layers",
        vision_width="hidden_size", vision_patch_size="patch_size",
        vision_heads="num_attention_heads", vision_mlp_width="intermediate_size",
        activation="hidden_act"),
    "text_config": dict(
        context_length="max_position_embeddings", vocab_size="vocab_size",
        transformer_width="hidden_size", transformer_heads="num_attention_heads",
        transformer_layers="num_hidden_layers", transformer_mlp_width="intermediate_size",
        activation="hidden_act"),
}
# Parts of parameter names, KELIP's and transformers'. No part contains another of its column, so
# they can be replaced in any order. in_proj is the three matrices q_proj, k_proj and v_proj there.
HF_PARTS = [
    ("transformer.resblocks.", "encoder.layers."),
    ("attn.in_proj_", "self_attn.q_proj."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
    ("ln_pre.", "pre_layrnorm."),  # transformers spells it so
    ("ln_post.", "post_layernorm."),
    ("ln_final.", "final_layer_norm."),
    ("conv1.", "embeddings.patch_embedding."),
    ("token_embedding.", "embeddings.token_embedding."),
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
]
# Matrices that transformers keeps transposed, as the weights of a linear layer.
HF_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}


def from_hf(path, tensors, prefix):
    """A CLIPModel's state dict -> KELIP's. path and prefix are for the error."""
    transposed = {hf_key: key for key, hf_key in HF_TRANSPOSED.items()}
    weights = {}
    for name, value in tensors.items():
        if name in transposed:
            weights[transposed[name]] = value.t().contiguous() if value.ndim == 2 else value
            continue
        if "self_attn.k_proj." in name or "self_attn.v_proj." in name:
            continue  # concatenated below, at q_proj
        if "self_attn.q_proj." in name:
            parts = [name.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            for part in parts:
                if part not in tensors or tensors[part].shape != value.shape or not value.ndim:
                    raise ValueError(f"{path}: has no {prefix}{part} of {list(value.shape)}, which "
                                     "the model needs")
            value = torch.cat([tensors[part] for part in parts])
        for part, hf_part in HF_PARTS:
            name = name.replace(hf_part, part)
        weights[name.replace("vision_model.", "visual.").removeprefix("text_model.")] = value
    return weights


def to_hf(weights):
    """A KELIP's state dict -> a CLIPModel's. The inverse of from_hf."""
    tensors = {}
    for key, value in weights.items():
        name = hf_name(key)
        if key in HF_TRANSPOSED:
            tensors[name] = value.T
        elif "self_attn.q_proj." in name:
            for letter, part in zip("qkv", value.chunk(3)):
                tensors[name.replace("q_proj", f"{letter}_proj")] = part
        else:
            tensors[name] = value
    return tensors


def hf_name(key):
    """KELIP's name of a weight -> transformers'. For in_proj it is that of the queries."""
    if key in HF_TRANSPOSED:
        return HF_TRANSPOSED[key]
    if not key.startswith(("visual.", "logit_scale")):
        key = f"text_model.{key}"
    for part, hf_part in HF_PARTS:
        key = key.replace(part, hf_part)
    return key.replace("visual.", "vision_model.")


# transformers' values of keys that are missing in a part.
HF_DEFAULTS = {
    "vision_config": {"num_attention_heads": 12, "hidden_act": "quick_gelu",
                      "layer_norm_eps": 1e-5},
    "text_config": {"num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
                    "eos_token_id": 49407}}


def read_hf_config(path, sizes):
    """A CLIPModel's config.json and its image processor's file: (KELIP's config, mean, std).

    sizes: those of the weights.
    """
    values = flatten_hf_config(path)
    allowed = {
        "model_type": ["clip"],
        "auto_map": [None, {}],             # code in the folder, which is never run
        "quantization_config": [None, {}],
        "vision_config.model_type": [None, "clip_vision_model"],
        "text_config.model_type": [None, "clip_text_model"],
        "vision_config.hidden_act": list(kelip.ACTIVATIONS),
        "text_config.hidden_act": [values["vision_config.hidden_act"]],
        "vision_config.layer_norm_eps": [1e-5],
        "text_config.layer_norm_eps": [1e-5]}
    check_values(path, {key: values.get(key) for key in allowed}, allowed)
    stated = find_stated(values, HF_CONFIG)
    if "projection_dim" in values:
        stated["embed_dim"] = ("projection_dim", values["projection_dim"])
    config = complete_config(path, sizes, stated)
    return config, *read_hf_pixels(path, config["image_resolution"])


def flatten_hf_config(path):
    """A config.json with its parts flattened: {"model_type": ..., "vision_config.key": value}."""
    content = read_json(path)
    values = dict(content)
    for name, defaults in HF_DEFAULTS.items():
        # Older files have two copies of a part, and transformers reads the one with _dict.
        older = f"{name}_dict"
        where = name if content.get(older) is None else older
        part = {} if content.get(where) is None else as_object(path, where, content[where])
        values |= {f"{name}.{key}": value for key, value in {**defaults, **part}.items()}
    return values


def check_hf_end(path, eot_id):
    """Raise ValueError unless the CLIPModel of a config.json pools at the tokenizer's end token."""
    # KELIP pools at the highest id. Old published files say 2 by mistake and mean the same.
    key = "text_config.eos_token_id"
    check_values(path, {key: flatten_hf_config(path)[key]}, {key: [2, eot_id]})


# Image processors that work as CLIP's, under their names in several versions.
HF_PROCESSORS = ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil",
                 "CLIPFeatureExtractor"]
# Keys of an image processor that do not change the pixels of an image, or are read separately.
HF_PIXELS_IGNORED = {
    "do_convert_rgb", "processor_class", "device", "return_tensors", "disable_grouping", "use_fast",
    "image_seq_length", "input_data_format", "pad_size", "_valid_processor_keys", "image_mean",
    "image_std", "rescale_factor"}


def read_hf_pixels(path, resolution):
    """The mean and std of an image processor of transformers, for RGB in 0..1.

    path: the config.json in its folder. A processor that scales pixels otherwise, such as to
    0..255, is expressed by another mean and std. Raises ValueError for what `preprocess` does not
    do.
    """
    # transformers 5 writes processor_config.json alone, and reads it first.
    file, prefix, pixels = path.with_name("processor_config.json"), "image_processor.", None
    if file.is_file():
        pixels = read_json(file).get("image_processor")
    if pixels is None:
        file, prefix = path.with_name("preprocessor_config.json"), ""
        if not file.is_file():
            warnings.warn(f"{file}: missing, as is processor_config.json; CLIP's mean and standard "
                          "deviation of pixels are assumed", stacklevel=5)
            return MEAN, STD
        pixels = read_json(file)
    pixels = dict(as_object(file, "image_processor", pixels))

    # Both default to 224. Without a crop_size, image_size is meant: CLIPModel refuses other images.
    pixels.setdefault("size", 224 if "crop_size" in pixels else resolution)
    pixels.setdefault("crop_size", resolution)
    allowed = {
        "image_processor_type": HF_PROCESSORS, "feature_extractor_type": HF_PROCESSORS,
        "do_resize": [True], "size": [resolution, {"shortest_edge": resolution}],
        "default_to_square": [False, None], "resample": [3],  # bicubic
        "do_center_crop": [True],
        "crop_size": [resolution, [resolution] * 2, {"height": resolution, "width": resolution}],
        "do_rescale": [True, False, None], "do_normalize": [True, False, None],
        "data_format": ["channels_first", None]}
    others = {key: value for key, value in pixels.items() if key not in HF_PIXELS_IGNORED}
    check_values(file, others, allowed, prefix)

    factor, mean, std = 1, [0] * 3, [1] * 3
    if pixels.get("do_rescale", True):
        factor = pixels.get("rescale_factor", 1 / 255)
        check_number(file, f"{prefix}rescale_factor", factor, 1e-6, 1e6)
    if pixels.get("do_normalize", True):
        mean = three_numbers(file, f"{prefix}image_mean", pixels.get("image_mean", MEAN), -1e6)
        std = three_numbers(file, f"{prefix}image_std", pixels.get("image_std", STD), 1e-6)
    # For x in 0..1, the processor computes (255 * factor * x - mean) / std.
    scale = 255 * factor
    return [value / scale for value in mean], [value / scale for value in std]


def write_hf(checkpoint, folder):
    """The files that CLIPModel, AutoTokenizer and CLIPImageProcessor open."""
    config = {**kelip.default_options(checkpoint.config), **checkpoint.config}
    token_ids = write_tokenizer(checkpoint, folder)
    size, embed_dim = config["image_resolution"], config["embed_dim"]
    parts = rename_config(config, HF_CONFIG)
    parts["vision_config"] |= {"model_type": "clip_vision_model", "projection_dim": embed_dim}
    parts["text_config"] |= {"model_type": "clip_text_model", "projection_dim": embed_dim}
    for name, token_id in token_ids.items():  # CLIPModel pools at eos_token_id
        parts["text_config"][f"{name}_id"] = token_id
    save_safetensors(to_hf(checkpoint.weights), folder / "model.safetensors")
    write_json(folder / "config.json", {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": embed_dim, **parts})
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": MEAN, "image_std": STD})


# ---- ONNX ----

def write_onnx(checkpoint, folder, half):
    """The two encoders as ONNX files, compared with torch, and example.py, which runs them."""
    write_tokenizer(checkpoint, folder)
    config = checkpoint.config
    write_json(folder / "preprocessor.json", {
        **describe_preprocess(config), "context_length": config["context_length"]})
    (folder / "example.py").write_text(export.EXAMPLE, encoding="utf-8")
    model = kelip.KELIP(**config).eval()
    kelip.load_weights(model, checkpoint.weights, checkpoint.path)
    if read_calibration(checkpoint.path.parent, model):
        shutil.copyfile(checkpoint.path.with_name("calibration.json"), folder / "calibration.json")
    export.write_encoders(model, folder, half)
    differences = export.compare(model, checkpoint.tokenizer, folder)
    if differences is None:
        warnings.warn("the files were not compared with torch, which needs a package: pip install "
                      "onnxruntime", stacklevel=3)
    else:
        print("largest difference from torch:",
              ", ".join(f"{value:.1e} in {name}" for name, value in differences.items()))


# ---- tokenizers ----

CLIP_ENTRIES = 49_408  # 256 bytes, 256 bytes at the end of a word, 48,894 merges, start and end
MAX_MERGES = 2**24     # bytes; CLIP's list has 3 million
CLIP_NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "NFC"},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Lowercase"}]}
CLIP_WORDS = {
    "type": "Split", "behavior": "Removed", "invert": True,  # keep what matches, drop the rest
    "pattern": {"Regex": r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"}}


def find_tokenizer(path):
    """The tokenizer in the folder of a file of weights, or None."""
    for name in ("tokenizer.json", CLIP_MERGES):
        if path.with_name(name).is_file():
            return path.with_name(name)
    return None


def choose_tokenizer(checkpoint, path):
    """The Checkpoint with the tokenizer at `path`, or with its own if path is None.

    Raises FileNotFoundError when there is neither, and ValueError when the tokenizer does not fit
    the weights, or when the two have different vocabularies.
    """
    own = checkpoint.tokenizer
    if path:
        checkpoint = checkpoint._replace(tokenizer=load_tokenizer(path))
    elif own is None:
        raise FileNotFoundError(
            f"{checkpoint.path}: no tokenizer.json in its folder: name one with --tokenizer "
            f"(OpenAI's is {CLIP_MERGES})")
    kelip.check_vocabulary(checkpoint)
    if own is not None and checkpoint.tokenizer.digest != own.digest:
        raise ValueError(f"{path}: its tokens or their ids are not those of the tokenizer of "
                         f"{checkpoint.path}, so each embedding would stand for another text: "
                         "leave out --tokenizer")
    return checkpoint


def load_tokenizer(path):
    """The Tokenizer of a tokenizer.json or of CLIP's list of merges."""
    path = Path(path)
    if path.suffix != ".gz":
        return Tokenizer.load(path)
    warnings.warn(f"{path}: a tokenizer.json cannot express all of OpenAI's cleaning of texts: "
                  "broken UTF-8 and curly quotes (ftfy), HTML entities and rare whitespace are "
                  "encoded as they are",
                  stacklevel=3)
    return read_clip_merges(path)


def read_clip_merges(path):
    """OpenAI's bpe_simple_vocab_16e6.txt.gz as a Tokenizer of 49,408 entries.

    The last byte of each word has the suffix </w>. Texts are lower-cased (a final capital sigma
    becomes σ, not ς) and whitespace is collapsed, without OpenAI's other cleaning. Padding is 0, as
    in OpenAI's code. Raises ValueError when the file is another one.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    try:
        with gzip.open(path) as file:
            text = file.read(MAX_MERGES + 1)
        if len(text) > MAX_MERGES:  # a file of 3 MB may hold 3 GB
            raise ValueError(f"{path}: not CLIP's list of merges, which has 3 million bytes")
        lines = text.decode().split("\n")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not CLIP's list of merges: {error}") from None
    # The first line is a comment, and the file holds more merges than CLIP uses.
    count = CLIP_ENTRIES - 2 * len(ALPHABET) - 2
    merges = [line.split() for line in lines[1:1 + count]]
    if len(merges) != count or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path}: not CLIP's list of merges, {count:,} lines of two tokens")
    tokens = ALPHABET + [char + "</w>" for char in ALPHABET] + [a + b for a, b in merges]
    merged = {token for pair in merges for token in pair}
    if len(set(tokens)) != len(tokens) or not merged <= set(tokens):
        raise ValueError(f"{path}: not CLIP's list of merges: tokens repeat or are unknown")
    return Tokenizer(build_spec(
        tokens, merges, specials=(START, END), normalizer=CLIP_NORMALIZER, suffix="</w>",
        pre_tokenizer={"type": "Sequence",
                       "pretokenizers": [CLIP_WORDS, {**BYTE_LEVEL, "use_regex": False}]}))


def write_tokenizer(checkpoint, folder, template=True):
    """Write tokenizer.json and the tokenizer_config.json from which AutoTokenizer opens it.

    template: whether the tokenizer itself puts the start and end token around a text. Returns
    {"bos_token": id, "eos_token": id, "pad_token": id}.
    """
    tokenizer, spec = checkpoint.tokenizer, checkpoint.tokenizer.spec
    added = spec.get("added_tokens") or []
    ids = {"bos_token": tokenizer.sot_id, "eos_token": tokenizer.eot_id,
           "pad_token": tokenizer.pad_id}
    if None in ids.values():
        raise ValueError(f"{checkpoint.path}: its tokenizer has no start and end token, which a "
                         "CLIP needs")
    # OpenAI pads with 0, which is a word, but transformers needs a special token. The end token
    # serves: what follows the first one changes no feature.
    if not any(token["special"] and token["id"] == tokenizer.pad_id for token in added):
        ids["pad_token"] = tokenizer.eot_id
    texts = {token_id: token for token, token_id in spec["model"]["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in added}
    if template:
        tokenizer.save(folder / "tokenizer.json")
    else:
        write_json(folder / "tokenizer.json", {**spec, "post_processor": None})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.config["context_length"],
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a caption that says <|endoftext|> is text
        **{name: texts[token_id] for name, token_id in ids.items()}})
    return ids


# ---- the command ----

def main(argv=None):
    """Read the command line, convert, print the files."""
    parser = ArgumentParser(
        prog="python -m extras.convert", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.partition("\n\nFrom top")[0])
    add = parser.add_argument
    add("src", metavar="SRC",
        help="a folder or a file of weights: a run, released KELIP, OpenAI's state dict, "
             "open_clip's or transformers' CLIP")
    add("out", metavar="OUT", help="a new or empty folder")
    add("--to", choices=["kelip", "hf", "open_clip", "onnx"], default="kelip",
        help="what opens OUT: kelip.build_model (default), transformers' CLIPModel, open_clip, or "
             "onnxruntime and others that run ONNX files")
    add("--half", action="store_true",
        help="with --to onnx: store weights in float16, in files of half the size; the computation "
             "stays float32")
    add("--blend", nargs=2, metavar=("BEFORE", "ALPHA"),
        help="write the model between BEFORE (ALPHA 0) and SRC (ALPHA 1), by weights: WiSE-FT. SRC "
             "is BEFORE after fine-tuning")
    add("--tokenizer", metavar="PATH",
        help=f"a tokenizer.json or OpenAI's {CLIP_MERGES} (default: the one in the folder of the "
             "weights; another must have the same vocabulary)")
    add("--activation", choices=list(kelip.ACTIVATIONS),
        help="of both encoders, if there is no configuration: quick_gelu (as OpenAI's weights) or "
             "gelu (as most of open_clip's)")
    add("--vision-heads", type=number(int, 1), metavar="N",
        help="attention heads of the image encoder, if there is no configuration (default: its "
             "width / 64)")
    add("--transformer-heads", type=number(int, 1), metavar="N",
        help="the same for the text encoder")
    args = parser.parse_args(argv)
    if args.half and args.to != "onnx":
        raise ValueError("--half: only --to onnx stores weights in float16")
    if args.blend:
        before, alpha = args.blend
        try:
            alpha = number(float, 0, 1)(alpha)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --blend: ALPHA {error}")
    given = {key: getattr(args, key) for key in ("activation", "vision_heads", "transformer_heads")}
    given = {key: value for key, value in given.items() if value is not None}
    with warnings.catch_warnings():
        warnings.showwarning = print_warning
        checkpoint = read(args.src, args.tokenizer, **given)
        if args.blend:
            checkpoint = blend(read(before, args.tokenizer, **given), checkpoint, alpha)
        write(checkpoint, args.out, args.to, args.half)
    print(f"{args.out}: {', '.join(sorted(path.name for path in Path(args.out).iterdir()))}")


def print_warning(message, *_):
    """Print a warning as one line, without the line of code that Python would add."""
    print(f"extras.convert: {one_line(str(message))}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
