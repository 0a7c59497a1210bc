"""PyTorch's side of the input pipeline: a DataLoader of processes that decode with Pillow.

Crops are drawn as ours, so that there is as much to do. torchvision's would be larger.
"""

import math
import random

from serve import reader, serve


def crop_box(width, height, area, aspect):
    """(left, top, right, bottom) as of `inception_box` of vit_jax/data/augment.py, which PyTorch's
    environment need not have."""
    smallest, largest = (share * height * width for share in area)
    for _ in range(100):
        ratio = random.uniform(*aspect)
        highest = min(round(math.sqrt(largest / ratio)), height,
                      math.ceil((width + 0.5) / ratio) - 1)
        h = random.randint(min(highest, round(math.sqrt(smallest / ratio))), highest)
        w = round(h * ratio)
        if smallest <= h * w <= largest and 0 < h <= height and 0 < w <= width:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height


def prepare(kind, task):
    import numpy as np
    import PIL
    import torch
    from PIL import Image

    height, width = task["image_size"]

    class Photos(torch.utils.data.Dataset):
        def __len__(self):
            return len(task["paths"])

        def __getitem__(self, index):
            with Image.open(task["paths"][index]) as file:
                image = file.convert("RGB")
            box = crop_box(*image.size, task["area"], task["aspect"])
            image = image.crop(box).resize((width, height), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)), 0

    photos = Photos()
    # Photos may be fewer than a batch; a sampler with replacement makes an endless epoch.
    sampler = torch.utils.data.RandomSampler(photos, replacement=True, num_samples=10**7)
    loader = iter(torch.utils.data.DataLoader(
        photos, batch_size=task["batch_size"], sampler=sampler, num_workers=task["workers"]))

    about = {"library": f"torch {torch.__version__}, Pillow {PIL.__version__}"}
    return reader(loader, 2 * task["workers"]), about  # its prefetch_factor is 2


if __name__ == "__main__":
    serve(prepare)
