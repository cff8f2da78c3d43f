"""Convert CLIP weights: from OpenAI, open_clip or transformers to KELIP, and from KELIP to them.

    # into a folder that kelip.build_model, train_clip.py --init and evaluate.py open
    python -m extras.convert clip-vit-base-patch32/ OUT
    python -m extras.convert state_dict.pt OUT --tokenizer bpe_simple_vocab_16e6.txt.gz
    python -m extras.convert epoch_32.pt OUT --tokenizer tokenizer.json --activation gelu

    # out of the project
    python -m extras.convert runs/clip OUT --to hf          # CLIPModel.from_pretrained(OUT)
    python -m extras.convert runs/clip OUT --to open_clip   # create_model("local-dir:OUT")

From top to bottom: tables of names, reading (all formats, open_clip's and OpenAI's, transformers'),
tokenizers, writing (released KELIP, open_clip, transformers), the command. KELIP's parameters have
the names of OpenAI's CLIP, which open_clip uses too. Only transformers has others.

Weights alone do not determine a model: the number of heads and the activation (GELU or QuickGELU)
come from the configuration in the same folder, or from --activation, --vision-heads and
--transformer-heads. A configuration that asks for what KELIP's encoders do not compute is refused,
and the error names its key.

OpenAI's code cleans texts before it tokenizes them: it repairs broken UTF-8 (with the package
ftfy), replaces HTML entities such as &amp;, and collapses all that Python takes for whitespace. A
tokenizer.json cannot express all of this, so that a converted tokenizer does less of it. On clean
text its ids are OpenAI's.

Not included: image encoders other than ViTs, text encoders that pool elsewhere than at the end
token, sigmoid losses (SigLIP), TorchScript archives.
"""

import argparse
import functools
import gzip
import importlib.util
import json
import math
import re
import sys
import warnings
import zlib
from pathlib import Path

import torch

import kelip
from kelip import MEAN, STD
from shards import new_folder
from tokenizer import (
    ALPHABET,
    BYTE_LEVEL,
    END,
    START,
    Tokenizer,
    build_spec,
    read_json,
    run_command,
)

# ---- tables of names ----

# Where weights may be in a folder. The first file that exists is read.
WEIGHT_FILES = (
    "last.pt", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
    "pytorch_model.bin.index.json", "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"

# What transformers and open_clip assume where their configuration is silent: ViT-B/32.
DEFAULTS = dict(
    embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=32,
    vision_heads=12, vision_mlp_width=3072, context_length=77, vocab_size=49408,
    transformer_width=512, transformer_heads=8, transformer_layers=12, transformer_mlp_width=2048,
    activation="quick_gelu")

# KELIP's key of a configuration -> the key in each part of the other library's.
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
OPEN_CLIP_CONFIG = {
    "vision_cfg": dict(
        image_resolution="image_size", vision_layers="layers", vision_width="width",
        vision_patch_size="patch_size"),
    "text_cfg": dict(
        context_length="context_length", vocab_size="vocab_size", transformer_width="width",
        transformer_heads="heads", transformer_layers="layers"),
}

# Other keys of open_clip. These do not change features, or are read on their own.
OPEN_CLIP_IGNORED = {
    "mean", "std", "size", "head_width", "mlp_ratio", "patch_dropout", "hf_tokenizer_name",
    "pad_id", "eos_id"}
# These must be empty or have one of these values. Keys in no table must be empty.
OPEN_CLIP_REQUIRED = {
    "pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",),
    "interpolation": ("bicubic",), "resize_mode": ("shortest",), "mode": ("RGB",)}

# Parts of parameter names: KELIP's and transformers'. No part contains another of its column, so
# that their order does not matter. in_proj is one matrix here and q_proj, k_proj, v_proj there.
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
# Matrices that transformers stores transposed, as the weights of a linear layer.
HF_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}

# Numbers that OpenAI's state dicts hold among the weights.
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")

# How parameters start that show a model of another kind.
REFUSED = {
    "visual.layer1.": "of a ResNet",
    "visual.trunk.": "of an image encoder of timm",
    "text.transformer.embeddings.": "of a text encoder of transformers",
    "logit_bias": "of a sigmoid loss",
}


# ---- reading ----

def read(src, tokenizer=None, **given):
    """Read any checkpoint that this file knows: a kelip.Checkpoint whose weights fit its config.

    src: a folder or a file of weights: a run of train_clip.py, released KELIP, or OpenAI's,
    open_clip's or transformers' CLIP. tokenizer: the path of a tokenizer.json or of CLIP's list of
    merges; None takes the one in the same folder. given: keys of KELIP's configuration that no file
    says, such as activation="gelu" and vision_heads=16.

    The weights are float32 and have KELIP's names. Raises FileNotFoundError when the weights or the
    tokenizer are missing, and ValueError that names the file and its key when they do not fit.
    """
    path = find_weights(src)
    state = read_weights(path)
    if is_kelip(path, state):
        checkpoint, name_in_file = read_kelip(path), str
        if tokenizer:
            checkpoint = checkpoint._replace(tokenizer=load_tokenizer(tokenizer))
    else:
        tokenizer = load_tokenizer(tokenizer or find_tokenizer(path))
        checkpoint, name_in_file = read_clip(path, state, tokenizer, given)
    checkpoint = checkpoint._replace(config={**checkpoint.config, **given})
    kelip.check_vocabulary(checkpoint)
    try:
        model = kelip.KELIP(**checkpoint.config)
    except TypeError as error:
        raise ValueError(f"{path}: its configuration does not fit: {error}") from None
    kelip.load_weights(model, checkpoint.weights, path, name_in_file)
    return checkpoint._replace(config=model.config)


def find_weights(src):
    """The file of weights that a folder, a file or the name of a preset stands for."""
    path = Path("weights") if src in kelip.PRESETS else Path(src)
    if path.is_file():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{src}: no weights there: give a file, or a folder with one of "
                            f"{', '.join(WEIGHT_FILES)}")


def read_weights(path):
    """What a file of weights holds; of an .index.json, what all files that it lists hold."""
    if not path.name.endswith(".index.json"):
        return kelip.read_weights(path)
    index = read_json(path)
    if "weight_map" not in index:
        raise ValueError(f"{path}: has no weight_map, which lists the files of the parameters")
    state = {}
    for name in sorted(set(index["weight_map"].values())):
        state |= kelip.read_weights(path.with_name(name))
    return state


def is_kelip(path, state):
    """Whether kelip.py reads this file itself: a run, or released KELIP."""
    if isinstance(state, dict) and isinstance(state.get("config"), dict):
        return True
    config_path = path.with_name("config.json")
    return config_path.is_file() and "embed_dim" in read_json(config_path)


def read_kelip(path):
    """The Checkpoint of a run of stage 2 or of released KELIP."""
    if path.suffix == ".json":
        raise ValueError(f"{path}: released KELIP in several files cannot be read; save it as one "
                         "model.safetensors")
    checkpoint = kelip.open_checkpoint(path)
    if checkpoint.is_stage_1:
        raise ValueError(f"{path}: a run of stage 1, which is an image encoder alone; "
                         "train_clip.py --init starts from it as it is")
    return checkpoint


def read_clip(path, state, tokenizer, given):
    """The Checkpoint of another library's CLIP, and a function from KELIP's names to the file's."""
    tensors, prefix = strip_wrappers(path, state)
    is_hf = any(key.startswith("vision_model.") for key in tensors)
    if is_hf:
        config_path = path.with_name("config.json")
        rename = hf_name
        weights = from_hf(path, tensors, prefix)
    else:
        config_path = path.with_name("open_clip_config.json")
        has_text_prefix = any(key.startswith("text.") for key in tensors)
        rename = functools.partial(open_clip_name, has_text_prefix=has_text_prefix)
        weights = from_open_clip(tensors)

    def name_in_file(key):
        return prefix + rename(key)

    # Only OpenAI's models hold these numbers. All of them have QuickGELU and heads 64 wide.
    numbers = [weights.pop(key, None) for key in OPENAI_NUMBERS]
    if config_path.is_file() and is_hf:
        config, mean, std = read_hf_config(config_path, tokenizer.eot_id)
    elif config_path.is_file():
        config, mean, std = read_open_clip_config(config_path)
    else:
        config, mean, std = read_sizes(path, weights, name_in_file), MEAN, STD
        config |= choose_options(path, config, config_path.name, None not in numbers, given)
    weights = fold_normalization(weights, mean, std)
    return kelip.Checkpoint(path, weights, config, tokenizer), name_in_file


def strip_wrappers(path, state):
    """Take a state dict out of what a training script wraps it in: (tensors by name, prefix).

    prefix is what DistributedDataParallel, torch.compile and others put before every name. The
    tensors become float32.
    """
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: holds {type(state).__name__}, where weights are tensors by name")
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            found = type(value).__name__
            raise ValueError(f"{path}: {key} holds {found}, where weights are tensors by name")
    prefix = ""
    for wrapper in ("_orig_mod.", "module.", "_orig_mod.", "model."):
        if all(key.startswith(prefix + wrapper) for key in state):
            prefix += wrapper
    tensors = {}
    for name, value in state.items():
        key = name.removeprefix(prefix)
        for start, kind in REFUSED.items():
            if key.startswith(start):
                raise ValueError(f"{path}: holds {name}, {kind}, which cannot be converted")
        if not key.endswith("embeddings.position_ids"):  # a buffer: 0, 1, 2, ...
            tensors[key] = value.float()
    return tensors, prefix


def read_sizes(path, weights, name_in_file=str):
    """The part of KELIP's configuration that the shapes of its weights tell."""
    def shape(key, dimensions):
        if key not in weights or weights[key].ndim != dimensions:
            raise ValueError(f"{path}: has no {name_in_file(key)} of {dimensions} dimensions, "
                             "which every CLIP with a ViT has")
        return weights[key].shape

    vision_width, _, _, patch = shape("visual.conv1.weight", 4)
    grid = math.isqrt(shape("visual.positional_embedding", 2)[0] - 1)
    context_length, text_width = shape("positional_embedding", 2)
    vision, text = "visual.transformer.resblocks.", "transformer.resblocks."
    return dict(
        embed_dim=shape("text_projection", 2)[1],
        image_resolution=grid * patch,
        vision_layers=count_layers(weights, vision),
        vision_width=vision_width,
        vision_patch_size=patch,
        vision_mlp_width=shape(f"{vision}0.mlp.c_fc.weight", 2)[0],
        context_length=context_length,
        vocab_size=shape("token_embedding.weight", 2)[0],
        transformer_width=text_width,
        transformer_layers=count_layers(weights, text),
        transformer_mlp_width=shape(f"{text}0.mlp.c_fc.weight", 2)[0])


def count_layers(weights, prefix):
    """How many different numbers follow the prefix in the names of weights."""
    return len({key[len(prefix):].split(".")[0] for key in weights if key.startswith(prefix)})


def choose_options(path, sizes, config_name, is_openai, given):
    """The activation and the numbers of heads, which shapes do not show.

    The activation must be given, except for OpenAI's weights. Heads that are not given are 64 wide,
    as in OpenAI's models, with a warning.
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
    """Change weights that were trained on pixels of another mean and std so that they take CLIP's.

    The patch embedding is linear. Another std is a factor of its kernel. Another mean adds the same
    vector to all patches, which can be added to their positions instead.
    """
    kernel = weights.get("visual.conv1.weight")                              # [W, 3, P, P]
    positions = weights.get("visual.positional_embedding")                   # [1 + g*g, W]
    if kernel is None or positions is None or (tuple(mean), tuple(std)) == (MEAN, STD):
        return weights  # load_weights will name what is missing
    mean, std, clip_mean, clip_std = (
        torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (mean, std, MEAN, STD))
    shift = (kernel * ((clip_mean - mean) / std)).sum(dim=(1, 2, 3))         # [W]
    positions = torch.cat([positions[:1], (positions[1:] + shift).float()])
    kernel = (kernel * (clip_std / std)).float()
    return {**weights, "visual.conv1.weight": kernel, "visual.positional_embedding": positions}


# ---- reading: open_clip's and OpenAI's format ----

def from_open_clip(tensors):
    """A state dict of open_clip or OpenAI with KELIP's names."""
    weights = {key.removeprefix("text."): value for key, value in tensors.items()}
    if "logit_scale" in weights and weights["logit_scale"].shape == (1,):  # in some of open_clip's
        weights["logit_scale"] = weights["logit_scale"][0]
    return weights


def open_clip_name(key, has_text_prefix):
    """KELIP's name of a weight -> open_clip's. In some models the text encoder has a prefix."""
    if has_text_prefix and not key.startswith(("visual.", "logit_scale")):
        return f"text.{key}"
    return key


def read_open_clip_config(path):
    """open_clip_config.json, or one of open_clip's model_configs: (KELIP's config, mean, std)."""
    content = read_json(path)
    model, pixels = content.get("model_cfg", content), content.get("preprocess_cfg", {})
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in model:
            raise ValueError(f"{path}: has no {key}")
    vision, text = model["vision_cfg"], model["text_cfg"]
    config = {**DEFAULTS, "embed_dim": model["embed_dim"]}
    for part, values in (("vision_cfg", vision), ("text_cfg", text), ("preprocess_cfg", pixels)):
        names = OPEN_CLIP_CONFIG.get(part, {})
        refuse_unknown(path, part, values, names)
        for key, name in names.items():
            if name in values:
                config[key] = values[name]
    config["vision_patch_size"] = vision.get("patch_size", 16)
    config["vision_heads"] = config["vision_width"] // vision.get("head_width", 64)
    config["vision_mlp_width"] = int(config["vision_width"] * vision.get("mlp_ratio", 4))
    config["transformer_mlp_width"] = int(config["transformer_width"] * text.get("mlp_ratio", 4))
    config["activation"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return config, pixels.get("mean", MEAN), pixels.get("std", STD)


def refuse_unknown(path, part, values, names):
    """Raise ValueError for a key of open_clip's that would change what the model computes."""
    for key, value in values.items():
        if not value or key in OPEN_CLIP_IGNORED or key in names.values():
            continue
        if value not in OPEN_CLIP_REQUIRED.get(key, ()):
            raise ValueError(f"{path}: {part}.{key} is {value!r}, which KELIP does not compute")


# ---- reading: transformers' format ----

def from_hf(path, tensors, prefix=""):
    """A CLIPModel's state dict with KELIP's names. path and prefix are for the error."""
    transposed = {hf_key: key for key, hf_key in HF_TRANSPOSED.items()}
    weights = {}
    for key, value in join_qkv(path, tensors, prefix).items():
        if key in transposed:
            weights[transposed[key]] = value.T.contiguous()
            continue
        for part, hf_part in HF_PARTS:
            key = key.replace(hf_part, part)
        key = key.replace("vision_model.", "visual.").removeprefix("text_model.")
        weights[key] = value
    return weights


def join_qkv(path, tensors, prefix):
    """Concatenate q_proj, k_proj and v_proj of each layer, under the name q_proj."""
    joined = {}
    for key, value in tensors.items():
        name = re.sub(r"self_attn\.[qkv]_proj\.", "self_attn.q_proj.", key)
        if "self_attn.q_proj." not in name:
            joined[key] = value
        elif name not in joined:
            parts = [name.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            for part in parts:
                if part not in tensors or tensors[part].shape != value.shape:
                    raise ValueError(f"{path}: has no {prefix}{part} of {list(value.shape)}, which "
                                     "the model needs")
            joined[name] = torch.cat([tensors[part] for part in parts])
    return joined


def hf_name(key):
    """KELIP's name of a weight -> transformers'. For in_proj it is that of the queries."""
    if key in HF_TRANSPOSED:
        return HF_TRANSPOSED[key]
    if not key.startswith(("visual.", "logit_scale")):
        key = f"text_model.{key}"
    for part, hf_part in HF_PARTS:
        key = key.replace(part, hf_part)
    return key.replace("visual.", "vision_model.")


def read_hf_config(path, eot_id):
    """A CLIPModel's config.json and the preprocessor_config.json of its folder, if there is one.

    eot_id: the tokenizer's end of text. Returns (KELIP's config, mean, std).
    """
    content = read_json(path)
    pixels_path = path.with_name("preprocessor_config.json")
    pixels = read_json(pixels_path) if pixels_path.is_file() else {}
    parts = {}
    for part in HF_CONFIG:
        parts[part] = content.get(f"{part}_dict") or content.get(part) or {}  # _dict: older files
    vision, text = parts["vision_config"], parts["text_config"]

    activation = vision.get("hidden_act", "quick_gelu")
    rules = [  # (key, value, what KELIP computes)
        ("model_type", content.get("model_type"), ["clip"]),
        # KELIP pools at the highest id. 2 is an old mistake in published files that stands for it;
        # 49407 is transformers' default.
        ("text_config.eos_token_id", text.get("eos_token_id", 49407), [2, eot_id]),
        ("vision_config.hidden_act", activation, ["quick_gelu", "gelu"]),
        ("text_config.hidden_act", text.get("hidden_act", "quick_gelu"), [activation]),
        ("vision_config.layer_norm_eps", vision.get("layer_norm_eps", 1e-5), [1e-5]),
        ("text_config.layer_norm_eps", text.get("layer_norm_eps", 1e-5), [1e-5]),
        ("resample, in preprocessor_config.json,", pixels.get("resample", 3), [3]),
    ]
    for key, value, allowed in rules:
        if value not in allowed:
            raise ValueError(f"{path}: {key} is {value!r}; KELIP computes "
                             f"{' or '.join(map(repr, allowed))}")

    config = {**DEFAULTS, "embed_dim": content.get("projection_dim", DEFAULTS["embed_dim"])}
    for part, names in HF_CONFIG.items():
        for key, name in names.items():
            if name in parts[part]:
                config[key] = parts[part][name]
    return config, pixels.get("image_mean", MEAN), pixels.get("image_std", STD)


# ---- tokenizers ----

def find_tokenizer(path):
    """The tokenizer in the folder of a file of weights."""
    for name in ("tokenizer.json", CLIP_MERGES):
        if path.with_name(name).is_file():
            return path.with_name(name)
    raise FileNotFoundError(f"{path}: no tokenizer.json in its folder: name one with --tokenizer "
                            f"(OpenAI's is {CLIP_MERGES})")


def load_tokenizer(path):
    """The Tokenizer of a tokenizer.json or of CLIP's list of merges."""
    path = Path(path)
    if path.suffix != ".gz":
        return Tokenizer.load(path)
    warnings.warn(f"{path}: {NOT_CLEANED}", stacklevel=3)
    return read_clip_merges(path)


NOT_CLEANED = ("a tokenizer.json cannot express all of OpenAI's cleaning of texts: broken UTF-8 "
               "(ftfy), HTML entities and rare whitespace are encoded as they stand")
CLIP_ENTRIES = 49_408  # 256 bytes, 256 bytes at the end of a word, 48,894 merges, start and end
CLIP_NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "NFC"},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Lowercase"}]}
CLIP_WORDS = {
    "type": "Split", "behavior": "Removed", "invert": True,  # keep what matches, drop the rest
    "pattern": {"Regex": r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"}}


def read_clip_merges(path):
    """OpenAI's bpe_simple_vocab_16e6.txt.gz as a Tokenizer of 49,408 entries.

    The last byte of each word has the suffix </w>. Of OpenAI's cleaning, texts are lower-cased
    (a final capital sigma becomes σ, not ς) and their whitespace is collapsed; see the top of this
    file. Padding is 0, as in OpenAI's code. Raises ValueError when the file is another one.
    """
    path = Path(path)
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not CLIP's list of merges: {error}") from None
    # The first line is a comment, and the file holds more merges than CLIP uses.
    count = CLIP_ENTRIES - 2 * len(ALPHABET) - 2
    merges = [line.split() for line in lines[1:1 + count]]
    if len(merges) != count or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path}: not CLIP's list of merges, {count:,} lines of two tokens")
    tokens = ALPHABET + [char + "</w>" for char in ALPHABET] + [a + b for a, b in merges]
    return Tokenizer(build_spec(
        tokens, merges, specials=(START, END), normalizer=CLIP_NORMALIZER, suffix="</w>",
        pre_tokenizer={"type": "Sequence",
                       "pretokenizers": [CLIP_WORDS, {**BYTE_LEVEL, "use_regex": False}]}))


# ---- writing ----

def write(checkpoint, out, to="kelip"):
    """Write a Checkpoint of `read` as a new folder, which appears when it is complete.

    to: "kelip" is the layout of released KELIP, which kelip.build_model opens; "hf" is that of
    transformers' CLIPModel; "open_clip" is open_clip's. Raises FileExistsError when `out` is not
    empty, ImportError when the package safetensors is needed and missing.
    """
    writers = {"kelip": write_kelip, "hf": write_hf, "open_clip": write_open_clip}
    with new_folder(str(out)) as folder:
        writers[to](checkpoint, Path(folder))


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
    write_json(folder / "preprocessor.json", {
        "image_size": config["image_resolution"], "resize": "shortest side",
        "interpolation": "bicubic", "crop": "center", "mean": MEAN, "std": STD})
    # The authors' code puts the start and end token around a text outside of its tokenizer.
    write_tokenizer(checkpoint, folder, template=False)


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


def rename_config(config, tables):
    """The parts of another library's configuration: {part: {its key: value}}."""
    parts = {}
    for part, names in tables.items():
        parts[part] = {name: config[key] for key, name in names.items()}
    return parts


def mlp_ratio(mlp_width, width):
    """The ratio for open_clip, which computes the width of the MLP as int(width * ratio)."""
    ratio = mlp_width / width
    if int(width * ratio) == mlp_width:
        return ratio
    return (mlp_width + 0.5) / width  # the quotient was rounded down


def write_tokenizer(checkpoint, folder, template=True):
    """Write tokenizer.json and the tokenizer_config.json from which AutoTokenizer opens it.

    template: whether the tokenizer puts the start and end token around a text itself. Returns
    {"bos_token": id, "eos_token": id, "pad_token": id}.
    """
    tokenizer, spec = checkpoint.tokenizer, checkpoint.tokenizer.spec
    added = spec.get("added_tokens") or []
    ids = {"bos_token": tokenizer.sot_id, "eos_token": tokenizer.eot_id,
           "pad_token": tokenizer.pad_id}
    if None in ids.values():
        raise ValueError(f"{checkpoint.path}: its tokenizer has no start and end token, which a "
                         "CLIP needs")
    # OpenAI pads with 0, which is a word, and transformers needs a special token. What follows the
    # end token changes no feature.
    if not any(token["special"] and token["id"] == tokenizer.pad_id for token in added):
        ids["pad_token"] = tokenizer.eot_id
    texts = {token_id: token for token, token_id in spec["model"]["vocab"].items()}
    for token in added:
        texts[token["id"]] = token["content"]
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


def save_safetensors(weights, path):
    """Write a .safetensors file, with the metadata that transformers asks for."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError(
            f"{path.name}: writing it needs a package: pip install safetensors") from None
    tensors = {}
    for key, value in weights.items():
        tensors[key] = value.clone(memory_format=torch.contiguous_format)  # chunks share memory
    save_file(tensors, path, {"format": "pt"})


def write_json(path, content):
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


# ---- the command ----

def main(argv=None):
    """Read the command line, convert, print the files."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.convert", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.partition("\n\nFrom top")[0])
    add = parser.add_argument
    add("src", metavar="SRC", help="a folder or a file of weights: a run, released KELIP, OpenAI's "
                                   "state dict, open_clip's or transformers' CLIP")
    add("out", metavar="OUT", help="the folder to make")
    add("--to", choices=["kelip", "hf", "open_clip"], default="kelip",
        help="what opens OUT: kelip.build_model (default), transformers' CLIPModel, open_clip")
    add("--tokenizer", metavar="PATH", help=f"a tokenizer.json or OpenAI's {CLIP_MERGES} (default: "
                                            "the one in the folder of the weights)")
    add("--activation", choices=list(kelip.ACTIVATIONS),
        help="of both encoders, where no configuration says it: quick_gelu (as OpenAI's weights) "
             "or gelu (as most of open_clip's)")
    add("--vision-heads", type=int, metavar="N",
        help="attention heads of the image encoder, where no configuration says it (default: its "
             "width / 64)")
    add("--transformer-heads", type=int, metavar="N", help="the same, of the text encoder")
    args = parser.parse_args(argv)
    given = {key: getattr(args, key) for key in ("activation", "vision_heads", "transformer_heads")}
    given = {key: value for key, value in given.items() if value is not None}
    with warnings.catch_warnings():
        warnings.showwarning = print_warning
        write(read(args.src, args.tokenizer, **given), args.out, args.to)
    print(f"{args.out}: {', '.join(sorted(path.name for path in Path(args.out).iterdir()))}")


def print_warning(message, *_):
    """A warning of the command is one line, without the line of code that gave it."""
    print(f"extras.convert: {message}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
