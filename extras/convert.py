"""KELIP's relatives, in and out: OpenAI's CLIP, open_clip and transformers' CLIPModel.

`read` makes our names and KELIP's configuration of a state dict and the files beside it; `write` makes such files of
ours. Our names are OpenAI's, and open_clip's, so that only transformers speaks another dialect. What weights cannot say
(how many heads, GELU or QuickGELU) is read from the configuration beside them or asked for, and what a configuration
says that KELIP's encoders do not do is refused by its name.

    python kelip.py export runs/clip OUT --to hf              # CLIPModel, AutoTokenizer, CLIPImageProcessor open OUT
    python kelip.py export runs/clip OUT --to open_clip       # open_clip.create_model("local-dir:OUT") does
    python kelip.py export ViT-B-32.pt OUT --to kelip --tokenizer bpe_simple_vocab_16e6.txt.gz

Left out: image encoders other than ViTs, text encoders that pool elsewhere than at the end token, sigmoid losses.
"""

import argparse
import json
import math
import re
import warnings
from pathlib import Path

import torch

from kelip import MEAN, STD
from tokenizer import Tokenizer, read_json

# What both libraries take where a configuration is silent.
DEFAULT = dict(embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=32,
               vision_heads=12, vision_mlp_width=3072, context_length=77, vocab_size=49408, transformer_width=512,
               transformer_heads=8, transformer_layers=12, transformer_mlp_width=2048, activation="quick_gelu")
# Our keys and theirs, by the parts of their configurations.
HF = {"vision_config": dict(image_resolution="image_size", vision_layers="num_hidden_layers",
                            vision_width="hidden_size", vision_patch_size="patch_size",
                            vision_heads="num_attention_heads", vision_mlp_width="intermediate_size",
                            activation="hidden_act"),
      "text_config": dict(context_length="max_position_embeddings", vocab_size="vocab_size",
                          transformer_width="hidden_size", transformer_heads="num_attention_heads",
                          transformer_layers="num_hidden_layers", transformer_mlp_width="intermediate_size",
                          activation="hidden_act")}
OPEN_CLIP = {"vision_cfg": dict(image_resolution="image_size", vision_layers="layers", vision_width="width",
                                vision_patch_size="patch_size"),
             "text_cfg": dict(context_length="context_length", vocab_size="vocab_size", transformer_width="width",
                              transformer_heads="heads", transformer_layers="layers")}
# Other keys of open_clip's that may have a value: these ones, or for () any.
HARMLESS = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",),
            "interpolation": ("bicubic",), "resize_mode": ("shortest",), "mean": (), "std": (), "size": (),
            "mode": ("RGB",), "head_width": (), "mlp_ratio": (), "patch_dropout": (), "hf_tokenizer_name": (),
            "pad_id": (), "eos_id": ()}
# Parts of names, ours and transformers'; none is a part of another.
NAMES = [("transformer.resblocks.", "encoder.layers."), ("attn.out_proj.", "self_attn.out_proj."),
         ("ln_1.", "layer_norm1."), ("ln_2.", "layer_norm2."), ("mlp.c_fc.", "mlp.fc1."), ("mlp.c_proj.", "mlp.fc2."),
         ("ln_pre.", "pre_layrnorm."), ("ln_post.", "post_layernorm."), ("ln_final.", "final_layer_norm."),
         ("conv1.", "embeddings.patch_embedding."), ("token_embedding.", "embeddings.token_embedding."),
         ("class_embedding", "embeddings.class_embedding"),
         ("positional_embedding", "embeddings.position_embedding.weight")]
FOREIGN = {"visual.layer1.": "of a ResNet", "visual.trunk.": "of an image encoder of timm's",
           "text.transformer.embeddings.": "of a text encoder of transformers'", "logit_bias": "of a sigmoid loss"}


# ------------------------------------------------------------------------------------------------------------- in

def read(where, weights, tokenizer, given):
    """What is in a file of weights that is neither a run's nor released KELIP's: (weights, config, Tokenizer, name).

    where: the file, weights: its content; tokenizer: a path, None for the one beside it; given: keys of KELIP's
    configuration that the caller knows. The weights returned have our names and are float32; name(ours) is the file's.
    Raises ValueError that names the file and the key that is missing or not read here, FileNotFoundError without a
    tokenizer.
    """
    weights = clean(where, weights)
    # Only what OpenAI published holds these three numbers; all of it has QuickGELU and heads of 64.
    own = [weights.pop(key, None) for key in ("input_resolution", "context_length", "vocab_size")]
    hf = any(key.startswith("vision_model.") for key in weights)
    path = where.with_name("config.json" if hf else "open_clip_config.json")
    weights = from_hf(where, weights) if hf else {key.removeprefix("text."): weights[key] for key in weights}
    if "logit_scale" in weights and weights["logit_scale"].shape == (1,):    # as some of open_clip's
        weights["logit_scale"] = weights["logit_scale"][0]
    tokenizer = Tokenizer.load(tokenizer or find_tokenizer(where))
    if path.is_file():
        config, mean, std = hf_config(path, tokenizer) if hf else open_clip_config(path)
        take_over_pixels(weights, mean, std)
    else:
        config = ask(where, sizes(where, weights), path.name, None not in own, given)
    config = {key: value for key, value in config.items() if value != usual(config).get(key)}
    return weights, config, tokenizer, hf_name if hf else str


def usual(config):
    """The keys that a configuration of KELIP's leaves out where they have these values."""
    return {"activation": "quick_gelu", "vision_heads": config["vision_width"] // 64,
            "vision_mlp_width": 4 * config["vision_width"], "transformer_mlp_width": 4 * config["transformer_width"]}


def clean(where, weights):
    """A checkpoint's content -> its tensors by name, float32, the wrappers' prefixes taken off."""
    weights = weights.get("state_dict", weights)
    for key, value in weights.items() or [("it", None)]:
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{where}: {key} holds {type(value).__name__}, where weights are tensors by name")
    for prefix in ("_orig_mod.", "module.", "_orig_mod.", "model."):
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    for start, kind in FOREIGN.items():
        if key := next((key for key in weights if key.startswith(start)), None):
            raise ValueError(f"{where}: holds {key}, {kind}, which is not read here")
    return {key: value.float() for key, value in weights.items() if not key.endswith("embeddings.position_ids")}


def find_tokenizer(where):
    """The path of the tokenizer beside a file of weights."""
    for path in (where.with_name("tokenizer.json"), where.with_name("bpe_simple_vocab_16e6.txt.gz")):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{where}: no tokenizer.json beside it: name one by tokenizer= or --tokenizer (OpenAI's "
                            "English one is bpe_simple_vocab_16e6.txt.gz)")


def sizes(where, weights):
    """What shapes say of KELIP's configuration."""
    def shape(key, dims):
        if key not in weights or weights[key].ndim != dims:
            raise ValueError(f"{where}: has no {key} of {dims} dimensions, as every ViT of CLIP's does")
        return weights[key].shape

    def layers(prefix):
        return len({key[len(prefix):].split(".")[0] for key in weights if key.startswith(prefix)})
    vision, text = "visual.transformer.resblocks.", "transformer.resblocks."
    width, _, _, patch = shape("visual.conv1.weight", 4)
    grid = math.isqrt(shape("visual.positional_embedding", 2)[0] - 1)
    context_length, text_width = shape("positional_embedding", 2)
    return dict(embed_dim=shape("text_projection", 2)[1], image_resolution=grid * patch, vision_width=width,
                vision_layers=layers(vision), vision_patch_size=patch,
                vision_mlp_width=shape(f"{vision}0.mlp.c_fc.weight", 2)[0], context_length=context_length,
                vocab_size=shape("token_embedding.weight", 2)[0], transformer_width=text_width,
                transformer_layers=layers(text), transformer_mlp_width=shape(f"{text}0.mlp.c_fc.weight", 2)[0])


def ask(where, config, name, openai, given):
    """A configuration where none lies beside the weights: the activation is the caller's to say, and heads that nobody
    counts are 64 wide, with a warning."""
    if not openai and "activation" not in given:
        raise ValueError(f"{where}: nothing says its activation: put {name} beside it, or give activation= (`kelip.py "
                         "export --activation`): quick_gelu, as OpenAI's weights, or gelu, as most of open_clip's")
    heads = {"vision_heads": config["vision_width"] // 64, "transformer_heads": config["transformer_width"] // 64}
    if not openai and not heads.keys() <= given.keys():
        warnings.warn(f"{where}: nothing says how many heads it has; they are taken to be 64 wide, {heads | given}: if "
                      f"that is wrong, put {name} beside it or give vision_heads= and transformer_heads=", stacklevel=5)
    return {**config, **heads, "activation": "quick_gelu", **given}


def open_clip_config(path):
    """open_clip_config.json, or one of open_clip's model_configs -> (KELIP's configuration, mean, std of pixels)."""
    config = read_json(path)
    model, pixels = config.get("model_cfg", config), config.get("preprocess_cfg", {})
    try:
        found, vision, text = {**DEFAULT, "embed_dim": model["embed_dim"]}, model["vision_cfg"], model["text_cfg"]
    except KeyError as error:
        raise ValueError(f"{path}: has no {error}") from None
    for part, values in (("vision_cfg", vision), ("text_cfg", text), ("preprocess_cfg", pixels)):
        names = OPEN_CLIP.get(part, {})
        for key, value in values.items():
            if value and key not in names.values() and value not in (HARMLESS.get(key, (None,)) or (value,)):
                raise ValueError(f"{path}: {part}.{key} is {value!r}, which is not read here")
        found |= {ours: values[theirs] for ours, theirs in names.items() if theirs in values}
    found["vision_patch_size"] = vision.get("patch_size", 16)
    found["vision_heads"] = found["vision_width"] // vision.get("head_width", 64)
    found["vision_mlp_width"] = int(found["vision_width"] * vision.get("mlp_ratio", 4))
    found["transformer_mlp_width"] = int(found["transformer_width"] * text.get("mlp_ratio", 4))
    found["activation"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return found, pixels.get("mean", MEAN), pixels.get("std", STD)


def hf_config(path, tokenizer):
    """A CLIPModel's config.json, and the preprocessor_config.json beside it if any -> as open_clip_config."""
    config, pixels = read_json(path), path.with_name("preprocessor_config.json")
    pixels = read_json(pixels) if pixels.is_file() else {}
    parts = {part: config.get(f"{part}_dict") or config.get(part) or {} for part in HF}
    found = {**DEFAULT, "embed_dim": config.get("projection_dim", 512)}
    for part, names in HF.items():
        found |= {ours: parts[part][theirs] for ours, theirs in names.items() if theirs in parts[part]}
    act = parts["vision_config"].get("hidden_act", "quick_gelu")
    rules = [("model_type", config.get("model_type"), ["clip"]),
             # 2 is an old mistake that stands for "the highest id", which is where KELIP pools; the default is OpenAI's
             ("text_config.eos_token_id", parts["text_config"].get("eos_token_id", 49407), [2, tokenizer.eot_id]),
             ("vision_config.hidden_act", act, ["quick_gelu", "gelu"]),
             ("text_config.hidden_act", parts["text_config"].get("hidden_act", "quick_gelu"), [act]),
             *((f"{part}.layer_norm_eps", parts[part].get("layer_norm_eps", 1e-5), [1e-5]) for part in HF),
             ("resample, in preprocessor_config.json,", pixels.get("resample", 3), [3])]
    for key, value, allowed in rules:
        if value not in allowed:
            raise ValueError(f"{path}: {key} is {value!r}; what is read here is {' or '.join(map(repr, allowed))}")
    return found, pixels.get("image_mean", MEAN), pixels.get("image_std", STD)


def hf_name(key):
    """Our name of a weight -> transformers'. Queries, keys and values are three there: q_proj stands for them."""
    if key in ("visual.proj", "text_projection"):
        return key.replace("visual.proj", "visual_projection") + ".weight"
    if not key.startswith(("visual.", "logit_scale")):
        key = f"text_model.{key}"
    for ours, theirs in NAMES:
        key = key.replace(ours, theirs)
    return key.replace("visual.", "vision_model.").replace("attn.in_proj_", "self_attn.q_proj.")


def from_hf(where, weights):
    """A CLIPModel's state dict -> ours. Queries, keys and values become one matrix, projections are transposed."""
    ours = {}
    for key, value in weights.items():
        key = re.sub(r"self_attn\.[kv]_proj\.", "self_attn.q_proj.", key)
        if "self_attn.q_proj." in key:
            parts = [key.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            for part in parts:
                if part not in weights or weights[part].shape != value.shape:
                    raise ValueError(f"{where}: has no {part} of {list(value.shape)}, which the model needs")
            key, value = key.replace("self_attn.q_proj.", "attn.in_proj_"), torch.cat([weights[part] for part in parts])
        if key in ("visual_projection.weight", "text_projection.weight"):
            key, value = key.replace("visual_projection", "visual.proj").removesuffix(".weight"), value.T.contiguous()
        for name, theirs in NAMES:
            key = key.replace(theirs, name)
        ours[key.replace("vision_model.", "visual.").removeprefix("text_model.")] = value
    return ours


def take_over_pixels(weights, mean, std):
    """Let weights that were trained on pixels of another mean and deviation take CLIP's. The patch embedding is linear:
    a deviation is a factor of its kernel, and a mean adds the same to every patch, as if to its position."""
    kernel, positions = weights.get("visual.conv1.weight"), weights.get("visual.positional_embedding")
    if kernel is None or positions is None or (tuple(mean), tuple(std)) == (MEAN, STD):
        return  # what is missing will be named
    mean, std, ours, our_std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (mean, std, MEAN, STD))
    shift = (kernel * ((ours - mean) / std)).sum(dim=(1, 2, 3))              # [W]
    weights["visual.positional_embedding"] = torch.cat([positions[:1], (positions[1:] + shift).float()])
    weights["visual.conv1.weight"] = (kernel * (our_std / std)).float()


# ------------------------------------------------------------------------------------------------------------ out

def write(weights, config, tokenizer, out, to):
    """Make a folder that another library opens.

    weights: a KELIP's state dict, config: its configuration; to: "hf" (transformers' CLIPModel), "open_clip" or "kelip"
    (as the authors released theirs). Raises ValueError when out is not an empty folder, ImportError without
    safetensors.
    """
    out, save = Path(out), torch.save if to == "kelip" else safetensors_save(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: not an empty folder, and nothing is written over")
    out.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(tokenizer, out, config["context_length"], template=to != "kelip")
    full, names = {**usual(config), **config}, OPEN_CLIP if to == "open_clip" else HF
    parts = {part: {theirs: full[ours] for ours, theirs in keys.items()} for part, keys in names.items()}
    if to == "kelip":
        if unknown := ", ".join(sorted(config.keys() & usual(config).keys())):
            warnings.warn(f"{out}/config.json: the authors' own code does not know its {unknown}", stacklevel=3)
        save({f"model.{key}": value for key, value in weights.items()}, out / "pytorch_model.bin")
        write_json(out / "config.json", {"architectures": ["KelipModel"], "model_type": "kelip", **config})
    elif to == "open_clip":
        parts["vision_cfg"] |= {"head_width": full["vision_width"] // full["vision_heads"],
                                "mlp_ratio": ratio(full["vision_mlp_width"], full["vision_width"])}
        # any name tells local-dir: to look for the tokenizer in the folder
        parts["text_cfg"] |= {"mlp_ratio": ratio(full["transformer_mlp_width"], full["transformer_width"]),
                              "hf_tokenizer_name": out.resolve().name, "pad_id": ids["pad_token"]}
        save(weights, out / "open_clip_model.safetensors")
        write_json(out / "open_clip_config.json", {
            "model_cfg": {"embed_dim": full["embed_dim"], "quick_gelu": full["activation"] == "quick_gelu", **parts},
            "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}})
    else:
        parts["vision_config"] |= {"model_type": "clip_vision_model", "projection_dim": full["embed_dim"]}
        # CLIPModel pools at eos_token_id, whose default is OpenAI's
        parts["text_config"] |= {"model_type": "clip_text_model", "projection_dim": full["embed_dim"],
                                 **{f"{name}_id": i for name, i in ids.items()}}
        save(to_hf(weights), out / "model.safetensors")
        size = full["image_resolution"]
        write_json(out / "preprocessor_config.json", {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
            "size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": {"height": size, "width": size},
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD})
        write_json(out / "config.json", {"architectures": ["CLIPModel"], "model_type": "clip",
                                         "projection_dim": full["embed_dim"], **parts})


def to_hf(weights):
    """Our state dict -> a CLIPModel's."""
    theirs = {}
    for key, value in weights.items():
        name = hf_name(key)
        if "self_attn.q_proj." in name:
            theirs |= {name.replace("q_proj", f"{letter}_proj"): part for letter, part in zip("qkv", value.chunk(3))}
        else:
            theirs[name] = value.T if key in ("visual.proj", "text_projection") else value
    return theirs


def ratio(part, width):
    """What open_clip multiplies a width by, and rounds down, to have the mlp's."""
    return part / width if int(width * (part / width)) == part else (part + 0.5) / width


def safetensors_save(out):
    """A function that writes weights to a path; the word on their format is what transformers asks for."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError(f"{out}: writing it needs a package: pip install safetensors") from None
    return lambda weights, path: save_file({key: value.clone(memory_format=torch.contiguous_format)
                                            for key, value in weights.items()}, path, {"format": "pt"})


def write_tokenizer(tokenizer, folder, context_length, template=True):
    """Write tokenizer.json and tokenizer_config.json; AutoTokenizer then gives the ids that Tokenizer.encode does.

    template: whether the file itself puts start and end around a text; the authors' code does that outside. Returns
    {"bos_token": id, "eos_token": id, "pad_token": id}. Raises ValueError when the tokenizer has no start or end.
    """
    spec, added = tokenizer.spec, tokenizer.spec.get("added_tokens") or []
    ids = {"bos_token": tokenizer.sot_id, "eos_token": tokenizer.eot_id, "pad_token": tokenizer.pad_id}
    if None in ids.values():
        raise ValueError(f"{folder}: the tokenizer has no start and end token, which a CLIP needs")
    if not any(token["special"] and token["id"] == tokenizer.pad_id for token in added):
        ids["pad_token"] = tokenizer.eot_id  # CLIP's 0 is a word; what stands behind the end does not matter
    texts = {i: token for token, i in spec["model"]["vocab"].items()}
    texts |= {token["id"]: token["content"] for token in added}
    names = {key: texts[i] for key, i in ids.items()}
    start, end = ({"SpecialToken": {"id": names[key], "type_id": 0}} for key in ("bos_token", "eos_token"))
    first, second = ({"Sequence": {"id": letter, "type_id": 0}} for letter in "AB")
    around = {"type": "TemplateProcessing", "single": [start, first, end], "pair": [start, first, end, second, end],
              "special_tokens": {names[key]: {"id": names[key], "ids": [ids[key]], "tokens": [names[key]]}
                                 for key in ("bos_token", "eos_token")}}
    write_json(folder / "tokenizer.json", {**spec, "post_processor": around if template else None})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length, "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False,
        "split_special_tokens": True, **names})
    return ids


def write_json(path, content):
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def main(build_model, argv):
    """`kelip.py export`; build_model is kelip's."""
    parser = argparse.ArgumentParser(prog="kelip.py export", description="Write a model for another library.")
    add = parser.add_argument
    add("run", help="whatever kelip.build_model opens: a run's folder, or released KELIP, OpenAI's, open_clip's or "
                    "transformers' CLIP, a folder or a file")
    add("out", help="the folder to make")
    add("--to", choices=["hf", "open_clip", "kelip"], required=True,
        help="transformers' CLIPModel, open_clip, or the layout of released KELIP")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json or OpenAI's bpe_simple_vocab_16e6.txt.gz, where none "
                                            "lies beside the weights")
    add("--activation", choices=["quick_gelu", "gelu"], help="where no configuration lies beside the weights")
    add("--vision-heads", type=int, metavar="N", help="the same")
    add("--transformer-heads", type=int, metavar="N", help="the same, of the text encoder")
    args = parser.parse_args(argv)
    known = {key: getattr(args, key) for key in ("activation", "vision_heads", "transformer_heads")}
    model, _, tokenizer = build_model(args.run, tokenizer=args.tokenizer,
                                      **{key: value for key, value in known.items() if value is not None})
    write(model.state_dict(), model.config, tokenizer, args.out, args.to)
    print(f"{args.out}: {', '.join(sorted(path.name for path in Path(args.out).iterdir()))}")
