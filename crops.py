"""Random crops of a batch of images, on the batch's device: multi-crop and SimCLR's augmentations.

    import crops
    spec = crops.parse_crops("2x224+6x96")
    views = crops.multi_crop(images, spec, seed=0, sample_index=torch.arange(len(images)))

images are uint8 [N, 3, S, S]; views are two tensors [N, 3, 224, 224] and six [N, 3, 96, 96],
normalized for the model. Images that are not square lie in the upper left corner of the padded
square S x S, and `aspect` says which part they fill. So a worker process decodes and pads each
image once (data.py), and everything random happens here, for the entire batch.

Copies to the device have non_blocking=True: without it, the CPU waits at each of them until the GPU
has done all that was queued before.

From top to bottom: multi_crop, and then its parts: counter-based random numbers, boxes, resampling,
color distortion and blur. This file needs torch and numpy, and no other file of the project.

Not included: decoding (data.py), the fixed preprocessing of evaluation (kelip.py), and learned or
mixed augmentations (RandAugment, MixUp).
"""

import math
import re

import numpy as np
import torch
import torch.nn.functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_CROPS, MAX_SIDE = 100, 4096  # crops of an image, pixels of a side
MAX_PIXELS = 1 << 26              # of all crops of an image


# ---- multi-crop ----

def parse_crops(text):
    """Parse "2x224+6x96" into [(2, 224), (6, 96)]: groups of (number of crops, side in pixels).

    A group without a number is one crop. Raises ValueError when the text is not of that form.
    """
    groups = []
    for part in text.split("+"):
        match = re.fullmatch(r"(?:(\d{1,9})x)?(\d{1,9})", part.strip())
        number, size = (int(match[1] or 1), int(match[2])) if match else (0, 0)
        if not 1 <= number <= MAX_CROPS or not 1 <= size <= MAX_SIDE:
            raise ValueError(f"--crops {text}: write groups of NUMBERxSIDE joined by +, such as "
                             f"2x224+6x96, of at most {MAX_CROPS} crops and {MAX_SIDE:,} pixels")
        groups.append((number, size))
    n_crops = sum(number for number, _ in groups)
    pixels = sum(number * size ** 2 for number, size in groups)
    if n_crops > MAX_CROPS or pixels > MAX_PIXELS:
        raise ValueError(f"--crops {text:.60}: {n_crops:,} crops of {pixels:,} pixels for each "
                         f"image: at most {MAX_CROPS} crops and {MAX_PIXELS:,} pixels")
    return groups


def format_crops(groups):
    """The text of --crops for groups as parse_crops returns them: "2x224+6x96"."""
    return "+".join(f"{number}x{size}" for number, size in groups)


def multi_crop(images, crops, seed, sample_index, aspect=None, scale=(0.4, 1.0),
               low_scale=(0.05, 0.4), flip=False, augment=False):
    """Random crops of every image, ready for the model (multi-crop: SwAV, arXiv 2006.09882).

    Args:
        images: uint8 [N, 3, S, S] on any device, each image in the upper left corner of its padded
            square, with its longer side S.
        crops: groups of (number, side in pixels), as parse_crops returns them.
        seed, sample_index: an int and int64 [N]. The random numbers depend only on them and on the
            crop.
        aspect: float [N], width / height of each image. None means square images. Keep it and
            sample_index on the CPU: the boxes are computed there, and copying them back would wait
            for the GPU.
        scale: the range of the fraction of the image's area that a crop of the first group covers.
        low_scale: the same for the other groups.
        flip: mirror half of the crops.
        augment: SimCLR's color distortion and blur (distort).

    Returns a list of float32 [N, 3, size, size], one for each crop, normalized by MEAN and STD.
    """
    S = images.shape[-1]
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, S, S):
        raise ValueError(f"images: uint8 [N, 3, S, S] expected, got {images.dtype} "
                         f"{list(images.shape)}")
    boxes, sizes = [], []
    for group, (number, size) in enumerate(crops):
        for _ in range(number):
            area = low_scale if group else scale
            boxes.append(crop_boxes(seed, sample_index, len(boxes), S, aspect, area))
            sizes.append(size)
    resample = resample_each if images.device.type == "cpu" else resample_batch
    views = resample(images, boxes, sizes)
    for crop, view in enumerate(views):
        if flip:
            mirrored = uniform(seed, sample_index, crop, FLIP)[:, 0] < 0.5   # [N]
            mirrored = mirrored.to(view.device, non_blocking=True)[:, None, None, None]
            view = torch.where(mirrored, view.flip(3), view)
        if augment:
            pixel_scale, offset = (x.view(3, 1, 1) for x in _normalization(view.device))
            view = (view - offset) / (255 * pixel_scale)                     # back to 0..1
            view = distort(view, seed, sample_index, crop)
            view = view * (255 * pixel_scale) + offset
        views[crop] = view
    return views


def padded_size(crops, scale=(0.4, 1.0), low_scale=(0.05, 0.4)):
    """The side S of a padded square that is large enough for the arguments of multi_crop.

    The smallest box of a 4:3 image, scale[0] of S x 3/4 S, then has about as many pixels as its
    crop. The result is a multiple of 64.
    """
    sides = []
    for group, (_, size) in enumerate(crops):
        smallest, _ = low_scale if group else scale
        sides.append(size / math.sqrt(smallest * 3 / 4))
    return math.ceil(int(max(sides)) / 64) * 64


# ---- counter-based random numbers ----
#
# Each draw of a usual random generator changes its state, so a number depends on how many were
# drawn before it. Here a number is a hash of a counter, which says what the number is for:
#
#     (seed, sample index, crop, purpose, draw)
#
# The numbers are the same in any process, in any order, and however samples are split into batches.
# A resumed run has no state to restore, and a new purpose changes no other number. See Salmon et
# al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

BOX, FLIP, JITTER, GRAY, BLUR = range(5)  # purposes
MASK = 8                                  # the patches that stage 1 masks (train_mae.py)


def uniform(seed, sample_index, crop, purpose, draws=1):
    """Random numbers in [0, 1), a function of the arguments alone: float64 [N, draws].

    sample_index: int64 [N], the position of each sample in the run. crop: the index of the crop.
    purpose: one of the integers above; numbers for different purposes are independent.
    """
    sample_index = sample_index.to("cpu", torch.int64)
    # The draw takes bits 0 to 15, the purpose 16 to 31, the crop 32 and above.
    counter = (crop << 32) + (purpose << 16) + torch.arange(draws)           # [draws]
    key = _mix(_mix(torch.tensor([seed])) + counter)                         # [draws]
    bits = _mix(_mix(sample_index)[:, None] + key)                           # [N, draws]
    return _shift_right(bits, 11).double() / (1 << 53)  # a double holds 53 bits


def _mix(x):
    """Hash an int64 tensor: flipping one bit of x flips about half of the bits of the result.

    This is the output function of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
    number generators", OOPSLA 2014). It is defined for unsigned integers; products of torch's
    signed integers have the same 64 bits.
    """
    x = (x ^ _shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift_right(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift_right(x, 31)


def _shift_right(x, n):
    """x >> n, filled with zeros from the left. The operator >> of int64 fills with the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)


# ---- boxes ----

ASPECT = (3 / 4, 4 / 3)  # the range of width / height of a box
TRIES = 10               # draws of a box before the largest centered one is used


def crop_boxes(seed, sample_index, crop, size, aspect=None, scale=(0.4, 1.0)):
    """Random boxes, by the rules of torchvision's RandomResizedCrop.

    The fraction of the image's area that a box covers is drawn uniformly from `scale`, and the
    logarithm of its width / height uniformly from ASPECT (Szegedy et al., arXiv 1409.4842, section
    6). A box that does not fit into the image is drawn again. After ten tries, the largest centered
    box of an allowed shape is used.

    size: the side of the padded square. aspect: that of multi_crop. Returns int64 [N, 4] on the
    CPU, each box as (left, top, width, height) in pixels of the padded square.
    """
    if aspect is None:
        aspect = torch.ones(len(sample_index))
    aspect = aspect.cpu().double()[:, None]                                  # [N, 1]
    image_w = (size * aspect).round().clamp(1, size)                         # [N, 1]
    image_h = (size / aspect).round().clamp(1, size)
    draws = uniform(seed, sample_index, crop, BOX, 2 * TRIES + 2)
    area_draw, ratio_draw, position = draws.split((TRIES, TRIES, 2), dim=1)

    # Compute all tries at once, and use the first that fits.
    area = (scale[0] + (scale[1] - scale[0]) * area_draw) * image_w * image_h  # [N, TRIES]
    ratio = torch.exp(math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * ratio_draw)
    width = (area * ratio).sqrt().round()                                    # [N, TRIES]
    height = (area / ratio).sqrt().round()
    fits = (width <= image_w) & (height <= image_h)
    first = fits.int().argmax(dim=1, keepdim=True)                           # [N, 1]
    width, height = width.gather(1, first), height.gather(1, first)          # [N, 1] each

    none_fits = ~fits.any(dim=1, keepdim=True)                               # [N, 1]
    largest_w = image_w.minimum((image_h * ASPECT[1]).round())
    largest_h = image_h.minimum((image_w / ASPECT[0]).round())
    width = torch.where(none_fits, largest_w, width).clamp(min=1)
    height = torch.where(none_fits, largest_h, height).clamp(min=1)
    position = torch.where(none_fits, 0.5, position)                         # [N, 2]

    room_w, room_h = image_w - width, image_h - height
    left = (position[:, :1] * (room_w + 1)).floor().minimum(room_w)
    top = (position[:, 1:] * (room_h + 1)).floor().minimum(room_h)
    return torch.cat([left, top, width, height], dim=1).long()


# ---- resampling ----
#
# Two functions make the same crops: one box after the other, which is fastest on a CPU, and all
# boxes at once as matrix products, for a GPU. Both use Pillow's antialiased bicubic filter, round
# to 8 bits after each of its two passes, and normalize by MEAN and STD.

def resample_each(images, boxes, sizes):
    """Resample one box after the other, with torch's integer kernel.

    images: uint8 [N, 3, S, S]; boxes: int64 [N, 4] for each crop; sizes: the side of each crop.
    Returns a list of float32 [N, 3, size, size], one for each crop.
    """
    scale, offset = _normalization("cpu")                                    # [3] each
    # numpy allocates huge pages. With ordinary pages, the first write to this memory takes as long
    # as the resampling.
    views = [torch.from_numpy(np.empty((len(images), size, size * 3), np.float32))
             for size in sizes]
    row_scale = {size: scale.repeat(size) for size in sizes}                 # [size * 3] each
    row_offset = {size: offset.repeat(size) for size in sizes}
    boxes = torch.stack(boxes, dim=1).tolist()                               # [N][crops][4]
    for i, image in enumerate(images.split(1)):                              # [1, 3, S, S]
        # All crops of one image, while it is in the CPU's cache.
        for view, size, (x, y, w, h) in zip(views, sizes, boxes[i]):
            pixels = F.interpolate(image[:, :, y:y + h, x:x + w], (size, size), mode="bicubic",
                                   antialias=True)                           # [1, 3, size, size]
            rows = pixels.permute(0, 2, 3, 1).reshape(size, size * 3)
            torch.addcmul(row_offset[size], rows, row_scale[size], out=view[i])
    return [view.view(-1, size, size, 3).permute(0, 3, 1, 2) for view, size in zip(views, sizes)]


def resample_batch(images, boxes, sizes, chunk=None):
    """Resample all boxes at once: a crop is weights_y @ image @ weights_x^T.

    Arguments and result are those of resample_each, on any device. Both products are rounded to
    0..255, as in the integer kernel. chunk: images at a time, to bound the memory of the products
    (default: about 0.3 GB of pixels). A GPU waits less for a few large tasks than for many small.
    """
    N, _, S, _ = images.shape
    device = images.device
    chunk = chunk or max(1, (1 << 26) // (3 * S * S))
    scale, offset = (x[:, None] for x in _normalization(device))             # [3, 1] each
    views = [torch.empty(N, size, 3, size, device=device) for size in sizes]
    for size in dict.fromkeys(sizes):  # the K crops of one size together
        of_size = [crop for crop, other in enumerate(sizes) if other == size]
        K = len(of_size)
        box = torch.stack([boxes[crop] for crop in of_size], dim=1)          # [N, K, 4]
        box = box.to(device, non_blocking=True)
        for i in range(0, N, chunk):
            part = images[i:i + chunk].permute(0, 2, 1, 3).float()           # [n, S, 3, S]
            part, n = part.reshape(-1, 3 * S, S), len(part)                  # rows of all channels
            start, length = box[i:i + chunk].permute(2, 0, 1).split(2)       # [2, n, K] each
            high, low = _bicubic_weights(start, length, size, S)             # [2, n, K, size, S]
            weights_x = torch.stack([high[0], low[0]], dim=1).view(n, -1, S)  # [n, 2*K*size, S]
            products = (part @ weights_x.mT).view(n, S, 3, 2, K, size)
            products = products.permute(3, 0, 4, 1, 2, 5)                    # [2, n, K, S, 3, size]
            rows = torch.empty(n, K, S, 3, size, device=device)
            torch.add(products[0], products[1], out=rows)
            rows = _round(rows).view(n * K, S, 3 * size)
            high, low = high[1].reshape(-1, size, S), low[1].reshape(-1, size, S)
            pixels = (low @ rows).baddbmm_(high, rows)                       # [n*K, size, 3*size]
            pixels = _round(pixels).view(n, K, size, 3, size)
            for k, crop in enumerate(of_size):
                torch.addcmul(offset, pixels[:, k], scale, out=views[crop][i:i + chunk])
    return [view.permute(0, 2, 1, 3) for view in views]                      # [N, 3, size, size]


def _round(pixels):
    """Round to integers in 0..255, in place."""
    return pixels.add_(0.5).floor_().clamp_(0, 255)


def _bicubic_weights(start, length, size, S):
    """Weights that resample [start, start + length) of S pixels to `size` pixels.

    start, length: int64 [...]. As in Pillow: Keys' cubic with a = -0.5, stretched when the box
    shrinks, and cut off at the edges of the box. Each row sums to 1. Returns two tensors
    [..., size, S], whose sum is the weights (_to_fixed_point).
    """
    device = start.device
    start, length = start.double()[..., None, None], length.double()[..., None, None]
    step = length / size                                                     # [..., 1, 1]
    center = start + (torch.arange(size, device=device)[:, None] + 0.5) * step  # [..., size, 1]
    # Only the pixels within 2 * max(1, step) of the center count: T of them, from `first` on.
    T = min(S, int(4 * max(1, S / size)) + 3)
    first = (center - 2 * step.clamp(min=1)).floor().clamp(0, S - T)
    index = first.long() + torch.arange(T, device=device)                    # [..., size, T]
    pixel = index + 0.5
    x = ((pixel - center) / step.clamp(min=1)).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    cubic = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    cubic = cubic * ((pixel > start) & (pixel < start + length))
    parts = _to_fixed_point(cubic / cubic.sum(dim=-1, keepdim=True))
    return [part.new_zeros(*part.shape[:-1], S).scatter_(-1, index, part) for part in parts]


def _to_fixed_point(weights):
    """Round weights as torch's integer kernel does: float64 [..., size, T] -> two of float32.

    The kernel stores weights as 16-bit integers, with as many binary digits as the largest weight
    of the box allows. With the same rounding, GPU and CPU return the same crops, except for rare
    pixels that differ by one of 255 levels. The sum of the two parts is the weights. Each has 8
    digits, because the matrix units of a GPU read only 11 digits of a float32 (TF32).
    """
    largest = weights.amax(dim=(-2, -1), keepdim=True)                       # [..., 1, 1]
    unit = torch.exp2((32767.5 / largest).log2().floor())
    integers = (weights * unit).round()
    high = (integers / 256).round() * 256
    return (high / unit).float(), ((integers - high) / unit).float()


def _normalization(device):
    """(scale, offset), [3] each: scale * pixels + offset normalizes pixels in 0..255."""
    mean, std = torch.tensor([MEAN, STD]).to(device, non_blocking=True)
    return 1 / (255 * std), -mean / std


# ---- color distortion and blur ----

def distort(x, seed, sample_index, crop):
    """SimCLR's color distortion and blur (Chen et al., arXiv 2002.05709, appendix A, with s = 1).

    x: float [N, 3, H, W] in 0..1, changed in place and returned.

    - Color jitter, for 80 % of the images: brightness, contrast, saturation and hue, in an order
      drawn for each image.
    - Gray, for 20 %.
    - Gaussian blur, for 50 %: sigma from 0.1 to 2 pixels, a kernel of a tenth of the side.

    The difference from SimCLR: hue is rotated in YIQ, where a rotation is linear, and not in HSV.
    """
    draws = uniform(seed, sample_index, crop, JITTER, 9).float()             # [N, 9]
    amounts = (2 * draws[:, :4] - 1).to(x.device, non_blocking=True)         # [N, 4], in -1..1
    order = draws[:, 4:8].argsort(dim=1)                                     # [N, 4], permutations
    has_jitter = draws[:, 8] < 0.8                                           # [N]
    for step in range(4):
        for k, adjust in enumerate(JITTERS):  # apply each to the images that have it at this step
            rows = ((order[:, step] == k) & has_jitter).nonzero()[:, 0]
            rows = rows.to(x.device, non_blocking=True)
            x[rows] = adjust(x[rows], amounts[rows, k].view(-1, 1, 1, 1)).clamp(0, 1)

    is_gray = uniform(seed, sample_index, crop, GRAY)[:, 0] < 0.2            # [N]
    rows = is_gray.nonzero()[:, 0].to(x.device, non_blocking=True)
    x[rows] = _luma(x[rows]).expand(-1, 3, -1, -1)

    draws = uniform(seed, sample_index, crop, BLUR, 2).float()               # [N, 2]
    rows = (draws[:, 0] < 0.5).nonzero()[:, 0]
    if len(rows):
        sigma = (0.1 + 1.9 * draws[rows, 1]).to(x.device, non_blocking=True)
        rows = rows.to(x.device, non_blocking=True)
        x[rows] = blur(x[rows], sigma).clamp(0, 1)
    return x


# Arguments of these functions: images [N, 3, H, W] in 0..1, and an amount [N, 1, 1, 1] in -1..1,
# where 0 changes nothing.

def adjust_brightness(x, amount):
    """Multiply by 0.2 to 1.8."""
    return x * (1 + 0.8 * amount)


def adjust_contrast(x, amount):
    """Multiply the distance from the image's mean luma by 0.2 to 1.8."""
    return torch.lerp(_luma(x).mean((2, 3), True), x, 1 + 0.8 * amount)


def adjust_saturation(x, amount):
    """Multiply the distance from each pixel's luma by 0.2 to 1.8."""
    return torch.lerp(_luma(x), x, 1 + 0.8 * amount)


def adjust_hue(x, amount):
    """Rotate hue by up to a fifth of the circle in either direction, in YIQ; Y is the luma."""
    angle = 0.4 * math.pi * amount
    y = _luma(x)                                                             # [N, 1, H, W]
    i = _weighted_sum(x, (0.596, -0.274, -0.322))
    q = _weighted_sum(x, (0.211, -0.523, 0.312))
    i, q = i * angle.cos() - q * angle.sin(), i * angle.sin() + q * angle.cos()
    red = y + 0.956 * i + 0.621 * q
    green = y - 0.272 * i - 0.647 * q
    blue = y - 1.106 * i + 1.703 * q
    return torch.cat([red, green, blue], dim=1)                              # [N, 3, H, W]


JITTERS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def blur(x, sigma):
    """Gaussian blur of x [N, 3, H, W]. sigma: [N], the standard deviation in pixels."""
    n, _, h, w = x.shape
    reach = min(max(1, w // 20), h - 1, w - 1)  # reflection padding must be below the side
    offset = torch.arange(-reach, reach + 1, device=x.device)                # [K]
    kernel = torch.exp(-offset ** 2 / (2 * sigma[:, None] ** 2))             # [N, K]
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    kernel = kernel.repeat_interleave(3, dim=0)[:, None, None]               # [3N, 1, 1, K]
    # A grouped convolution with one group per channel and image, because each image has its kernel.
    x = F.pad(x.reshape(1, 3 * n, h, w), (reach,) * 4, mode="reflect")
    x = F.conv2d(x, kernel, groups=3 * n)                                    # along rows
    x = F.conv2d(x, kernel.transpose(2, 3), groups=3 * n)                    # along columns
    return x.view(n, 3, h, w)


def _luma(x):
    """Luma of RGB by ITU-R BT.601: [N, 3, H, W] -> [N, 1, H, W]."""
    return _weighted_sum(x, (0.299, 0.587, 0.114))


def _weighted_sum(x, weights):
    """Sum over channels with a weight each: [N, 3, H, W] -> [N, 1, H, W]."""
    weights = torch.tensor(weights).to(x.device, non_blocking=True)          # [3]
    return (x * weights.view(3, 1, 1)).sum(1, keepdim=True)
