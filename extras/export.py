"""Write the two encoders of a model as ONNX files: `python -m extras.convert RUN OUT --to onnx`.

    write_encoders(model, folder)                           # folder/image.onnx, folder/text.onnx
    compare(model, tokenizer, folder)                       # {"image.onnx": 3e-7, ...}

kelip.KELIP.encode_text computes captions without their padding, which depends on the lengths of the
captions, so it cannot be traced. TextEncoder has the same weights and computes padding too; its
vectors are equal to 1e-5.

From top to bottom: the encoders, ONNX files, the comparison with torch, example.py.

Not included: reading models and the other files of the folder (extras/convert.py).
"""

import logging
import warnings

import torch
import torch.nn as nn

import kelip

INPUTS = {"image": "pixels", "text": "tokens"}  # encoder -> the name of its input
LARGEST_DIFFERENCE = 1e-4  # between a number of a unit vector by torch and by onnxruntime
MAX_BYTES = 2**31 - 2**20  # of weights in an ONNX file, which is limited to 2 GB


# ---- the encoders ----

class ImageEncoder(nn.Module):
    """encode_image of a KELIP: pixels [N, 3, size, size] -> unit vectors [N, D]."""

    def __init__(self, model):
        super().__init__()
        self.visual = model.visual

    def forward(self, pixels):
        return kelip.l2_normalize(self.visual(pixels))


class TextEncoder(nn.Module):
    """encode_text of a KELIP, with padding: tokens [N, L] -> unit vectors [N, D].

    These are the lines in the docstring of KELIP.encode_text. L is at most context_length.
    """

    def __init__(self, model):
        super().__init__()
        self.token_embedding, self.transformer = model.token_embedding, model.transformer
        self.positional_embedding, self.ln_final = model.positional_embedding, model.ln_final
        self.text_projection = model.text_projection

    def forward(self, tokens):
        x = self.token_embedding(tokens)                                     # [N, L, W]
        x = x + self.positional_embedding[:tokens.shape[1]]
        x = self.ln_final(self.transformer(x))                               # [N, L, W]
        end = tokens.argmax(dim=-1)[:, None, None]                           # [N, 1, 1]
        x = x.gather(1, end.expand(-1, -1, x.shape[-1]))[:, 0]               # [N, W]
        return kelip.l2_normalize(x @ self.text_projection)                  # [N, D]


def example_inputs(model):
    """{name: (encoder, an input, which sizes of the input are free)}."""
    size, L = model.config["image_resolution"], model.config["context_length"]
    batch, length = torch.export.Dim("N"), torch.export.Dim("L", max=L)
    # Sizes of the inputs are neither 1 nor the largest, which a trace would take for fixed.
    return {
        "image": (ImageEncoder(model), torch.zeros(2, 3, size, size), {0: batch}),
        "text": (TextEncoder(model), torch.zeros(2, L - 1, dtype=torch.int64),
                 {0: batch, 1: length})}


# ---- ONNX files ----

def write_encoders(model, folder, half=False):
    """Write image.onnx and text.onnx into a folder.

    half: store weights in float16. The computation stays in float32. The weights of `model` are
    rounded, too. Raises ImportError when a package is missing, ValueError when a file would be too
    large, or a weight too large for float16.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError("writing ONNX files needs packages: pip install onnx onnxscript "
                          "onnxruntime") from None
    for name in ("onnxscript", "torch.onnx"):  # they warn of operators that nobody misses
        logging.getLogger(name).setLevel(logging.ERROR)
    if half:
        round_weights(model)
    for name, (encoder, inputs, sizes) in example_inputs(model).items():
        path = folder / f"{name}.onnx"
        n_bytes = (2 if half else 4) * kelip.count_parameters(encoder)
        if n_bytes > MAX_BYTES:
            advice = "" if half else "; --half writes half of that"
            raise ValueError(f"{path.name}: would have {n_bytes / 1e9:.1f} GB, and an ONNX file "
                             f"holds 2 GB{advice}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                encoder.eval(), (inputs,), dynamo=True, verbose=False, dynamic_shapes=(sizes,),
                input_names=[INPUTS[name]], output_names=["vectors"])
            proto = program.model_proto
        if half:
            store_in_float16(proto.graph)
        path.write_bytes(proto.SerializeToString())


@torch.no_grad()
def round_weights(model):
    """Round all weights to the nearest float16, in place."""
    for name, weight in model.named_parameters():
        weight.copy_(weight.half())
        if not weight.isfinite().all():
            raise ValueError(f"{name}: holds a number that float16 cannot: leave out --half")


def store_in_float16(graph):
    """Store the weights of an ONNX graph, which are rounded, as float16, each with a Cast back."""
    from onnx import TensorProto, helper, numpy_helper
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        weight = numpy_helper.to_array(tensor)
        half = weight.astype("float16")
        if (half == weight).all():  # not for other constants of the graph, such as 1.702
            stored = f"{tensor.name}.float16"
            casts.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
            tensor.CopyFrom(numpy_helper.from_array(half, stored))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


# ---- the comparison with torch ----

SENTENCES = {
    "English": "a photo of a red apple on the table and two more next to it",
    "Korean": "식탁 위에 있는 빨간 사과 하나와 그 옆에 놓인 사과 두 개의 사진"}


@torch.no_grad()
def compare(model, tokenizer, folder):
    """The largest difference between numbers of unit vectors by onnxruntime and by torch.

    Batches of 1, 3 and 64 images and texts, of 3 tokens to context_length, in both languages.
    Returns {"image.onnx": ..., "text.onnx": ...}, or None without onnxruntime. Raises ValueError
    when one is larger than LARGEST_DIFFERENCE.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sides = {"image": (model.encode_image, image_batches(model.config["image_resolution"])),
             "text": (model.encode_text, text_batches(tokenizer, model.config["context_length"]))}
    differences = {}
    for name, (encode, batches) in sides.items():
        path = folder / f"{name}.onnx"
        session, largest = onnxruntime.InferenceSession(str(path), options), 0
        for batch in batches:
            [found] = session.run(None, {INPUTS[name]: batch.numpy()})
            difference = (torch.from_numpy(found) - encode(batch, l2norm=True)).abs().max().item()
            if not difference <= LARGEST_DIFFERENCE:  # NaN is not
                raise ValueError(f"{path.name}: for a batch of {list(batch.shape)}, onnxruntime "
                                 f"and torch differ by {difference:.1e}, more than "
                                 f"{LARGEST_DIFFERENCE:.0e}")
            largest = max(largest, difference)
        differences[path.name] = largest
    return differences


def image_batches(size):
    """Batches of random pixels [N, 3, size, size]."""
    generator = torch.Generator().manual_seed(0)
    for n in (1, 3, 64):
        yield torch.randn(n, 3, size, size, generator=generator)


def text_batches(tokenizer, context_length):
    """Batches of tokens [N, L]: one text of every length L, and several of lengths up to L."""
    for sentence in SENTENCES.values():
        text = " ".join([sentence] * context_length)  # it has more tokens than that
        for n, step in ((1, 1), (3, 8), (64, 37)):
            for L in range(3, context_length + 1, step):
                tokens = tokenizer.encode(text, L).expand(n, L)
                last = 2 + (L - 3) * torch.arange(1, n + 1)[:, None] // n    # [N, 1]
                position = torch.arange(L)
                tokens = tokens.where(position < last, tokenizer.pad_id)
                yield tokens.where(position != last, tokenizer.eot_id)


# ---- example.py ----

EXAMPLE = '''\
"""Compare an image with texts: python example.py apple.png "red apple" "빨간 사과"

pip install onnxruntime tokenizers numpy pillow
"""
import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps
from tokenizers import Tokenizer

folder, image, texts = Path(__file__).parent, Image.open(sys.argv[1]), sys.argv[2:]
settings = json.loads((folder / "preprocessor.json").read_text())

# Transparency becomes white, the short side `size` pixels, and the center is cut out.
size, image = settings["image_size"], ImageOps.exif_transpose(image).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
w, h = (int(size * side / min(image.size)) for side in image.size)
left, top = round((w - size) / 2), round((h - size) / 2)
image = image.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size))
pixels = (np.asarray(image) / 255 - settings["mean"]) / settings["std"]
pixels = pixels.transpose(2, 0, 1)[None].astype(np.float32)  # [1, 3, size, size]

tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_truncation(settings["context_length"])
tokenizer.enable_padding()
tokenizer.encode_special_tokens = True  # a text that says <|endoftext|> is text
tokens = np.array([encoding.ids for encoding in tokenizer.encode_batch(texts)])

[image_vectors] = InferenceSession(folder / "image.onnx").run(None, {"pixels": pixels})
[text_vectors] = InferenceSession(folder / "text.onnx").run(None, {"tokens": tokens})
for text, cosine in zip(texts, text_vectors @ image_vectors[0]):
    print(f"{cosine:6.3f}  {text}")
'''
