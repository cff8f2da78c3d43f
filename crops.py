"""One uint8 picture a pair -> many crops, for the whole batch, on the batch's device.

A worker process decodes each picture once and lays it in the corner of a square canvas (data.py). Everything
after that happens here: random boxes drawn in the picture's own aspect ratio, antialiased bicubic resampling,
flips, CLIP's normalisation, and, if asked for, SimCLR's colour distortion and blur (the paper's first
finding).

Randomness is a hash of (seed, slot, crop, purpose), not the state of a generator: however the slots are split
over ranks, and on whatever device, slot 12345 gets the same boxes.

What it leaves out: decoding (data.py), evaluation's fixed preprocessing (kelip.py), and any policy search: no
RandAugment, no MixUp.
"""

import math
import re

import numpy as np
import torch
import torch.nn.functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
RATIO = (3 / 4, 4 / 3)  # width / height of a box: Inception's range, as everybody's RandomResizedCrop
TRIES = 10  # draws of a box before the largest centred one is taken


def parse_crops(text):
    """Parse "2x224+6x96" into [(2, 224), (6, 96)]: groups of (number of crops, side in pixels).

    Raises ValueError when the text is not of that form.
    """
    groups = []
    for part in text.split("+"):
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)", part.strip())
        if not match or 0 in (int(match[1] or 1), int(match[2])):
            raise ValueError(f"crops {text!r}: write groups of NUMBERxSIDE joined by +, such as 2x224+6x96")
        groups.append((int(match[1] or 1), int(match[2])))
    return groups


# --- Randomness by counter ----------------------------------------------------------------------------------

def _mix(x):
    """One round of splitmix64 (Steele et al., 2014) on int64 tensors, whose products wrap as unsigned ones
    do.
    """
    x = (x ^ ((x >> 30) & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ ((x >> 27) & (1 << 37) - 1)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ ((x >> 31) & (1 << 33) - 1)


def uniform(seed, slots, crop, purpose, draws=1):
    """Numbers in [0, 1), float64 [N, draws], that depend on the arguments alone.

    slots: int64 [N], the slot of each sample in the run; crop: which crop of the sample; purpose: an int that
    keeps the box, the flip and so on independent of each other.
    """
    slots = slots.to("cpu", torch.int64)
    key = _mix(_mix(torch.tensor([seed])) + (crop << 32) + (purpose << 16) + torch.arange(draws))  # [draws]
    bits = _mix(_mix(slots)[:, None] + key)                                                       # [N, draws]
    return ((bits >> 11) & (1 << 53) - 1).double() / (1 << 53)


# --- Boxes --------------------------------------------------------------------------------------------------

BOX, FLIP, JITTER, GREY, BLUR = range(5)  # what draws are for

def canvas_size(crops, scale=(0.4, 1.0), low_scale=(0.05, 0.4)):
    """The canvas, in pixels, on which the smallest box of a 4:3 picture has as many pixels as its crop."""
    sides = [size / math.sqrt((low_scale if group else scale)[0] * 3 / 4)
             for group, (_, size) in enumerate(crops)]
    return -(-int(max(sides)) // 64) * 64


def crop_boxes(seed, slots, crop, canvas, aspect=None, scale=(0.4, 1.0)):
    """Random boxes on the canvas: int64 [N, 4] of (left, top, width, height) in its pixels, on the CPU.

    Each covers a part of the picture's area drawn from `scale` and has a width / height drawn from 3/4 to 4/3
    (Szegedy et al., arXiv 1409.4842). aspect: float [N], width / height of the pictures, which fill the
    canvas in their longer side; None means square ones. A draw that does not fit is drawn again, and after
    ten the largest centred box of an allowed shape is taken.
    """
    aspect = torch.ones(len(slots)) if aspect is None else aspect.cpu()
    aspect = aspect.double()[:, None]                                                              # [N, 1]
    whole_w = (canvas * aspect).round().clamp(1, canvas)
    whole_h = (canvas / aspect).round().clamp(1, canvas)
    draws = uniform(seed, slots, crop, BOX, 2 * TRIES + 2)
    area = (scale[0] + (scale[1] - scale[0]) * draws[:, :TRIES]) * whole_w * whole_h              # [N, TRIES]
    ratio = torch.exp(math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * draws[:, TRIES:2 * TRIES])
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (width <= whole_w) & (height <= whole_h)
    first = fits.int().argmax(1, keepdim=True)
    none = ~fits.any(1, keepdim=True)
    width = torch.where(none, whole_w.minimum((whole_h * RATIO[1]).round()), width.gather(1, first))
    height = torch.where(none, whole_h.minimum((whole_w / RATIO[0]).round()), height.gather(1, first))
    width, height = width.clamp(min=1), height.clamp(min=1)                                        # [N, 1]
    place = torch.where(none, 0.5, draws[:, -2:])                                                  # [N, 2]
    left = (place[:, :1] * (whole_w - width + 1)).floor().minimum(whole_w - width)
    top = (place[:, 1:] * (whole_h - height + 1)).floor().minimum(whole_h - height)
    return torch.cat([left, top, width, height], 1).long()


# --- Resampling ---------------------------------------------------------------------------------------------

def _resample_each(images, boxes, sizes):
    """The boxes of every crop, resampled by torch's integer kernel, which repeats Pillow's, and normalised: fastest on
    a CPU. boxes: int64 [N, 4] for each crop; sizes: of the crops. Returns a list, one [N, 3, size, size] a crop.
    """
    # numpy asks for huge pages, without which touching so much fresh memory costs as much as resampling.
    out = [torch.from_numpy(np.empty((len(images), size, size * 3), np.float32)) for size in sizes]
    affine = {size: [x.repeat(size) for x in _affine("cpu")] for size in sizes}                    # [size * 3] each
    boxes = torch.stack(boxes, 1).tolist()                                                         # [N][crops][4]
    for i, image in enumerate(images.split(1)):  # all crops of one picture, while the cache holds it
        for view, size, (x, y, w, h) in zip(out, sizes, boxes[i]):
            pixels = F.interpolate(image[:, :, y:y + h, x:x + w], (size, size), mode="bicubic", antialias=True)
            scale, offset = affine[size]
            torch.addcmul(offset, pixels.permute(0, 2, 3, 1).reshape(size, size * 3), scale, out=view[i])
    return [view.view(-1, size, size, 3).permute(0, 3, 1, 2) for view, size in zip(out, sizes)]


def _weights(start, length, size, canvas, device):
    """Rows of bicubic weights [N, size, canvas] that resample [start, start + length) to `size` pixels.

    Pillow's rule: Keys' cubic with a = -0.5, stretched by the reduction, cut at the box's edges, each row
    summing to 1, and in the same fixed point, so that the crops are the same numbers as _resample_each's.
    """
    start, length = (x.to(device, torch.float64)[:, None, None] for x in (start, length))          # [N, 1, 1]
    step = length / size
    centre = start + (torch.arange(size, device=device)[:, None] + 0.5) * step                  # [N, size, 1]
    pixel = torch.arange(canvas, device=device) + 0.5                                              # [canvas]
    x = ((pixel - centre) / step.clamp(min=1)).abs()                                       # [N, size, canvas]
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    cubic = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    cubic = cubic * ((pixel > start) & (pixel < start + length))
    weights = cubic / cubic.sum(2, keepdim=True)
    unit = torch.exp2((32767.5 / weights.amax((1, 2), keepdim=True)).log2().floor())
    return ((weights * unit).round() / unit).float()                                       # [N, size, canvas]


def _resample_batch(images, boxes, size, chunk=64):
    """All boxes at once, as products with weights, what a GPU likes; rounds where the integer kernel does."""
    canvas, out = images.shape[-1], []
    scale, offset = (x.view(3, 1, 1) for x in _affine(images.device))
    for pictures, part in zip(images.split(chunk), boxes.split(chunk)):  # bounds the memory that weights take
        x, y, w, h = part.unbind(1)
        across = _weights(x, w, size, canvas, images.device)[:, None].transpose(2, 3)        # [n, 1, S, size]
        down = _weights(y, h, size, canvas, images.device)[:, None]                          # [n, 1, size, S]
        narrow = (pictures.float() @ across).add_(0.5).floor_().clamp_(0, 255)               # [n, 3, S, size]
        both = (down @ narrow).add_(0.5).floor_().clamp_(0, 255)                          # [n, 3, size, size]
        out.append(both.mul_(scale).add_(offset))
    return torch.cat(out)


def _affine(device):
    """Factors and offsets, [3] each, that bring 0..255 to CLIP's mean and standard deviation."""
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    return 1 / (255 * std), -mean / std


# --- Strong augmentation ------------------------------------------------------------------------------------

GREY_WEIGHTS = (0.299, 0.587, 0.114)  # luma of RGB, ITU-R BT.601


def _grey(x):
    """Luma of RGB pictures, [N, 3, H, W] -> [N, 1, H, W]."""
    return (x * torch.tensor(GREY_WEIGHTS, device=x.device).view(3, 1, 1)).sum(1, keepdim=True)


def _turn_hue(x, angle):
    """Turn colours about the grey axis by `angle` radians, [N, 1, 1, 1], their luma kept (in YIQ)."""
    y = _grey(x)
    i = (x * torch.tensor((0.596, -0.274, -0.322), device=x.device).view(3, 1, 1)).sum(1, keepdim=True)
    q = (x * torch.tensor((0.211, -0.523, 0.312), device=x.device).view(3, 1, 1)).sum(1, keepdim=True)
    i, q = i * angle.cos() - q * angle.sin(), i * angle.sin() + q * angle.cos()
    return torch.cat([y + 0.956 * i + 0.621 * q, y - 0.272 * i - 0.647 * q, y - 1.106 * i + 1.703 * q], 1)


JITTERS = (  # of pictures in 0..1, by a factor [N, 1, 1, 1] drawn from -1..1
    lambda x, draw: x * (1 + 0.8 * draw),                                      # brightness
    lambda x, draw: torch.lerp(_grey(x).mean((2, 3), True), x, 1 + 0.8 * draw),  # contrast
    lambda x, draw: torch.lerp(_grey(x), x, 1 + 0.8 * draw),                   # saturation
    lambda x, draw: _turn_hue(x, 0.4 * math.pi * draw),                     # hue, up to a fifth of the circle
)


def distort(x, seed, slots, crop):
    """SimCLR's colour distortion and blur (Chen et al., arXiv 2002.05709, appendix A; its strength 1).

    x: float [N, 3, H, W] in 0..1. Four in five pictures have brightness, contrast, saturation and hue
    changed, in an order of each one's own; one in five is made grey; half are blurred, sigma 0.1 to 2, over a
    tenth of the side. One thing differs: hue is turned in YIQ and not in HSV.
    """
    draws = uniform(seed, slots, crop, JITTER, 9).float()                                          # [N, 9]
    factors, orders = (2 * draws[:, :4] - 1).to(x.device), draws[:, 4:8].argsort(1)              # [N, 4] each
    for turn in range(4):
        for number, jitter in enumerate(JITTERS):
            chosen = ((orders[:, turn] == number) & (draws[:, 8] < 0.8)).nonzero()[:, 0].to(x.device)
            x[chosen] = jitter(x[chosen], factors[chosen, number].view(-1, 1, 1, 1)).clamp(0, 1)
    chosen = (uniform(seed, slots, crop, GREY)[:, 0] < 0.2).nonzero()[:, 0].to(x.device)
    x[chosen] = _grey(x[chosen]).expand(-1, 3, -1, -1)
    draws = uniform(seed, slots, crop, BLUR, 2).float()
    chosen = (draws[:, 0] < 0.5).nonzero()[:, 0]
    sigma = (0.1 + 1.9 * draws[chosen, 1]).to(x.device)
    chosen = chosen.to(x.device)
    if len(chosen):
        x[chosen] = blur(x[chosen], sigma).clamp(0, 1)
    return x


def blur(x, sigma):
    """Gaussian blur of [N, 3, H, W] by a standard deviation, in pixels, for each picture, [N]."""
    n, _, h, w = x.shape
    reach = min(max(1, w // 20), h - 1, w - 1)
    offset = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-offset ** 2 / (2 * sigma[:, None] ** 2))                          # [N, 2 * reach + 1]
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None, None]     # [3N, 1, 1, K]
    x = F.pad(x.reshape(1, 3 * n, h, w), (reach,) * 4, mode="reflect")
    x = F.conv2d(F.conv2d(x, kernel, groups=3 * n), kernel.transpose(2, 3), groups=3 * n)
    return x.view(n, 3, h, w)


# --- All crops ----------------------------------------------------------------------------------------------

def multi_crop(images, crops, seed, slots, aspect=None, scale=(0.4, 1.0), low_scale=(0.05, 0.4), flip=False,
               augment=False):
    """Crops of every picture, ready for the model: a list of float32 [N, 3, size, size], one tensor a crop.

    images: uint8 [N, 3, S, S], pictures as `data.Batch` has them, on any device; crops: as parse_crops gives;
    seed, slots: what the draws depend on, int and int64 [N]; aspect: float [N], width / height of the
    pictures; scale: area of a box in the first group of crops, low_scale: in the groups after it (SwAV, arXiv
    2006.09882); flip: mirror half of the crops; augment: SimCLR's colour distortion and blur (arXiv
    2002.05709). Raises ValueError when images are not square uint8 pictures.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, *[images.shape[-1]] * 2):
        raise ValueError(f"images: uint8 [N, 3, S, S] expected, got {images.dtype} {list(images.shape)}")
    sizes, scales = zip(*((size, low_scale if group else scale)
                          for group, (number, size) in enumerate(crops) for _ in range(number)))
    boxes = [crop_boxes(seed, slots, crop, images.shape[-1], aspect, area) for crop, area in enumerate(scales)]
    if images.device.type == "cpu":
        views = _resample_each(images, boxes, sizes)
    else:
        views = [_resample_batch(images, *each) for each in zip(boxes, sizes)]
    for crop, pictures in enumerate(views):
        if flip:
            mirrored = uniform(seed, slots, crop, FLIP)[:, 0] < 0.5
            mirrored = mirrored.to(images.device)[:, None, None, None]
            views[crop] = pictures = torch.where(mirrored, pictures.flip(3), pictures)
        if augment:
            factor, offset = (x.view(3, 1, 1) for x in _affine(images.device))
            pictures = (pictures - offset) / (255 * factor)
            views[crop] = distort(pictures, seed, slots, crop) * (255 * factor) + offset
    return views
