"""Convert CLIP weights from OpenAI, open_clip and transformers, and export KELIP to the last two.

    # into a folder that kelip.build_model, train_clip.py --init and evaluate.py open
    python -m extras.convert clip-vit-base-patch32/ OUT
    python -m extras.convert state_dict.pt OUT --tokenizer bpe_simple_vocab_16e6.txt.gz
    python -m extras.convert epoch_32.pt OUT --tokenizer tokenizer.json --activation gelu

    # into a folder for another library
    python -m extras.convert runs/clip OUT --to hf          # CLIPModel.from_pretrained(OUT)
    python -m extras.convert runs/clip OUT --to open_clip   # create_model("local-dir:OUT")

From top to bottom: read and write; what all CLIPs of other libraries need; open_clip's and OpenAI's
format; transformers' format; tokenizers; the command. KELIP's parameters have the names of OpenAI's
CLIP, which open_clip uses too. Only transformers has other names.

Weights alone do not determine a model: the number of heads and the activation (GELU or QuickGELU)
come from the configuration in the same folder, or from --activation, --vision-heads and
--transformer-heads. A configuration that KELIP's encoders cannot compute is an error that names the
key.

OpenAI's code cleans texts before it tokenizes them: it repairs broken UTF-8 (with the package
ftfy), replaces HTML entities such as &amp;, and collapses whitespace. A tokenizer.json can express
only part of this. On clean text, a converted tokenizer returns OpenAI's ids.

Not included: image encoders other than ViTs, text encoders that do not pool at the end token,
sigmoid losses (SigLIP), TorchScript archives.
"""

import argparse
import gzip
import importlib.util
import json
import math
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

# The names that a file of weights may have in a folder. The first that exists is read.
WEIGHT_FILES = (
    "last.pt", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
    "pytorch_model.bin.index.json", "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"


# ---- read and write ----

def read(src, tokenizer=None, **given):
    """Read a checkpoint of any known format: a kelip.Checkpoint whose weights fit its config.

    src: a file of weights or a folder with one: a run of train_clip.py, released KELIP, or a CLIP
    of OpenAI, open_clip or transformers. tokenizer: the path of a tokenizer.json or of CLIP's list
    of merges (default: the one in the same folder). given: keys of KELIP's configuration that are
    in no file, such as activation="gelu" and vision_heads=16.

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


def write(checkpoint, out, to="kelip"):
    """Write a Checkpoint of `read` as a new folder, which appears when it is complete.

    to: "kelip" is the layout of released KELIP, which kelip.build_model opens; "hf" is that of
    transformers' CLIPModel; "open_clip" is open_clip's. Raises FileExistsError when `out` is not
    empty, ImportError when the package safetensors is needed and missing.
    """
    writers = {"kelip": write_kelip, "hf": write_hf, "open_clip": write_open_clip}
    with new_folder(str(out)) as folder:
        writers[to](checkpoint, Path(folder))


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
    index = read_json(path)
    if "weight_map" not in index:
        raise ValueError(f"{path}: has no weight_map, which lists the files of the parameters")
    state = {}
    for name in sorted(set(index["weight_map"].values())):
        state |= kelip.read_weights(path.with_name(name))
    return state


def is_kelip(path, state):
    """Whether kelip.py itself can read this file: a run, or released KELIP."""
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
                         "train_clip.py --init opens it without conversion")
    return checkpoint


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
    # The authors' code adds the start and end token itself, after the tokenizer.
    write_tokenizer(checkpoint, folder, template=False)


def save_safetensors(weights, path):
    """Write a .safetensors file, with the metadata that transformers asks for."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError(
            f"{path.name}: writing it needs a package: pip install safetensors") from None
    # safetensors refuses tensors that share memory, as the chunks of in_proj do.
    tensors = {key: value.clone(memory_format=torch.contiguous_format)
               for key, value in weights.items()}
    save_file(tensors, path, {"format": "pt"})


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


# ---- CLIPs of other libraries ----

# What transformers and open_clip use for keys that a configuration leaves out: ViT-B/32.
DEFAULTS = dict(
    embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=32,
    vision_heads=12, vision_mlp_width=3072, context_length=77, vocab_size=49408,
    transformer_width=512, transformer_heads=8, transformer_layers=12, transformer_mlp_width=2048,
    activation="quick_gelu")

# Numbers that OpenAI's state dicts hold among the weights, and others do not.
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")

# Names of parameters that only models of another kind have: how they start, and the kind.
REFUSED = {
    "visual.layer1.": "of a ResNet",
    "visual.trunk.": "of an image encoder of timm",
    "text.transformer.embeddings.": "of a text encoder of transformers",
    "logit_bias": "of a sigmoid loss",
}


def read_clip(path, state, tokenizer, given):
    """The Checkpoint of another library's CLIP, and a function from KELIP's names to the file's."""
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
    if config_path.is_file() and is_hf:
        config, mean, std = read_hf_config(config_path, tokenizer.eot_id)
    elif config_path.is_file():
        config, mean, std = read_open_clip_config(config_path)
    else:
        config, mean, std = read_sizes(path, weights, name_in_file), MEAN, STD
        is_openai = None not in numbers
        config |= choose_options(path, config, config_path.name, is_openai, given)
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
    prefix = ""
    for wrapper in ("_orig_mod.", "module.", "_orig_mod.", "model."):
        if all(key.startswith(prefix + wrapper) for key in state):
            prefix += wrapper
    tensors = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            found = type(value).__name__
            raise ValueError(f"{path}: {name} holds {found}, where weights are tensors by name")
        key = name.removeprefix(prefix)
        for start, kind in REFUSED.items():
            if key.startswith(start):
                raise ValueError(f"{path}: holds {name}, {kind}, which cannot be converted")
        if not key.endswith("embeddings.position_ids"):  # a buffer: 0, 1, 2, ...
            tensors[key] = value.float()
    return tensors, prefix


def read_sizes(path, weights, name_in_file=str):
    """The part of KELIP's configuration that the shapes of its weights determine."""
    def shape(key, dimensions):
        if key not in weights or weights[key].ndim != dimensions:
            raise ValueError(f"{path}: has no {name_in_file(key)} of {dimensions} dimensions, "
                             "which every CLIP with a ViT has")
        return weights[key].shape

    def count_layers(prefix):
        return len({key[len(prefix):].split(".")[0] for key in weights if key.startswith(prefix)})

    vision_width, _, _, patch = shape("visual.conv1.weight", 4)
    grid = math.isqrt(shape("visual.positional_embedding", 2)[0] - 1)
    context_length, text_width = shape("positional_embedding", 2)
    vision, text = "visual.transformer.resblocks.", "transformer.resblocks."
    return dict(
        embed_dim=shape("text_projection", 2)[1],
        image_resolution=grid * patch,
        vision_layers=count_layers(vision),
        vision_width=vision_width,
        vision_patch_size=patch,
        vision_mlp_width=shape(f"{vision}0.mlp.c_fc.weight", 2)[0],
        context_length=context_length,
        vocab_size=shape("token_embedding.weight", 2)[0],
        transformer_width=text_width,
        transformer_layers=count_layers(text),
        transformer_mlp_width=shape(f"{text}0.mlp.c_fc.weight", 2)[0])


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
    kernel = weights.get("visual.conv1.weight")                              # [W, 3, P, P]
    positions = weights.get("visual.positional_embedding")                   # [1 + g*g, W]
    if kernel is None or positions is None or (tuple(mean), tuple(std)) == (MEAN, STD):
        return weights  # load_weights reports missing ones
    mean, std, clip_mean, clip_std = (
        torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (mean, std, MEAN, STD))
    shift = (kernel * ((clip_mean - mean) / std)).sum(dim=(1, 2, 3))         # [W]
    positions = torch.cat([positions[:1], (positions[1:] + shift).float()])
    kernel = (kernel * (clip_std / std)).float()
    return {**weights, "visual.conv1.weight": kernel, "visual.positional_embedding": positions}


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
    "mean", "std", "size", "head_width", "mlp_ratio", "patch_dropout", "hf_tokenizer_name",
    "pad_id", "eos_id"}
# These keys must be empty or have one of these values. Keys in no table must be empty.
OPEN_CLIP_REQUIRED = {
    "pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",),
    "interpolation": ("bicubic",), "resize_mode": ("shortest",), "mode": ("RGB",)}


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


def read_open_clip_config(path):
    """open_clip_config.json, or one of open_clip's model_configs: (KELIP's config, mean, std)."""
    content = read_json(path)
    model, pixels = content.get("model_cfg", content), content.get("preprocess_cfg", {})
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in model:
            raise ValueError(f"{path}: has no {key}")
    vision, text = model["vision_cfg"], model["text_cfg"]
    config = {**DEFAULTS, "embed_dim": model["embed_dim"], "vision_patch_size": 16}
    for part, values in (("vision_cfg", vision), ("text_cfg", text), ("preprocess_cfg", pixels)):
        names = OPEN_CLIP_CONFIG.get(part, {})
        for key, name in names.items():
            if name in values:
                config[key] = values[name]
        for name, value in values.items():
            is_harmless = not value or name in OPEN_CLIP_IGNORED or name in names.values()
            if not is_harmless and value not in OPEN_CLIP_REQUIRED.get(name, ()):
                raise ValueError(
                    f"{path}: {part}.{name} is {value!r}, which KELIP does not compute")
    config["vision_heads"] = config["vision_width"] // vision.get("head_width", 64)
    config["vision_mlp_width"] = int(config["vision_width"] * vision.get("mlp_ratio", 4))
    config["transformer_mlp_width"] = int(config["transformer_width"] * text.get("mlp_ratio", 4))
    config["activation"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return config, pixels.get("mean", MEAN), pixels.get("std", STD)


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
            weights[transposed[name]] = value.T.contiguous()
            continue
        if "self_attn.k_proj." in name or "self_attn.v_proj." in name:
            continue  # q_proj takes them along
        if "self_attn.q_proj." in name:
            parts = [name.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            for part in parts:
                if part not in tensors or tensors[part].shape != value.shape:
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


def read_hf_config(path, eot_id):
    """A CLIPModel's config.json and the preprocessor_config.json of its folder, if there is one.

    eot_id: the tokenizer's end of text. Returns (KELIP's config, mean, std).
    """
    content = read_json(path)
    pixels_path = path.with_name("preprocessor_config.json")
    pixels = read_json(pixels_path) if pixels_path.is_file() else {}
    parts = {part: content.get(f"{part}_dict") or content.get(part) or {}  # _dict: older files
             for part in HF_CONFIG}
    vision, text = parts["vision_config"], parts["text_config"]

    activation = vision.get("hidden_act", "quick_gelu")
    rules = [  # (key, value, what KELIP computes)
        ("model_type", content.get("model_type"), ["clip"]),
        # KELIP pools at the highest id. Old published files say 2 by mistake and mean the same.
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


# ---- tokenizers ----

CLIP_ENTRIES = 49_408  # 256 bytes, 256 bytes at the end of a word, 48,894 merges, start and end
CLIP_NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "NFC"},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Lowercase"}]}
CLIP_WORDS = {
    "type": "Split", "behavior": "Removed", "invert": True,  # keep what matches, drop the rest
    "pattern": {"Regex": r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"}}


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
    warnings.warn(f"{path}: a tokenizer.json cannot express all of OpenAI's cleaning of texts: "
                  "broken UTF-8 (ftfy), HTML entities and rare whitespace are encoded as they are",
                  stacklevel=3)
    return read_clip_merges(path)


def read_clip_merges(path):
    """OpenAI's bpe_simple_vocab_16e6.txt.gz as a Tokenizer of 49,408 entries.

    The last byte of each word has the suffix </w>. Texts are lower-cased (a final capital sigma
    becomes σ, not ς) and whitespace is collapsed, without OpenAI's other cleaning. Padding is 0, as
    in OpenAI's code. Raises ValueError when the file is another one.
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
    parser = argparse.ArgumentParser(
        prog="python -m extras.convert", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__.partition("\n\nFrom top")[0])
    add = parser.add_argument
    add("src", metavar="SRC",
        help="a folder or a file of weights: a run, released KELIP, OpenAI's state dict, "
             "open_clip's or transformers' CLIP")
    add("out", metavar="OUT", help="a new or empty folder")
    add("--to", choices=["kelip", "hf", "open_clip"], default="kelip",
        help="what opens OUT: kelip.build_model (default), transformers' CLIPModel, open_clip")
    add("--tokenizer", metavar="PATH",
        help=f"a tokenizer.json or OpenAI's {CLIP_MERGES} (default: the one in the folder of the "
             "weights)")
    add("--activation", choices=list(kelip.ACTIVATIONS),
        help="of both encoders, if there is no configuration: quick_gelu (as OpenAI's weights) or "
             "gelu (as most of open_clip's)")
    add("--vision-heads", type=int, metavar="N",
        help="attention heads of the image encoder, if there is no configuration (default: its "
             "width / 64)")
    add("--transformer-heads", type=int, metavar="N", help="the same for the text encoder")
    args = parser.parse_args(argv)
    given = {key: getattr(args, key) for key in ("activation", "vision_heads", "transformer_heads")}
    given = {key: value for key, value in given.items() if value is not None}
    with warnings.catch_warnings():
        warnings.showwarning = print_warning
        write(read(args.src, args.tokenizer, **given), args.out, args.to)
    print(f"{args.out}: {', '.join(sorted(path.name for path in Path(args.out).iterdir()))}")


def print_warning(message, *_):
    """Print a warning as one line, without the line of code that Python would add."""
    print(f"extras.convert: {message}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
