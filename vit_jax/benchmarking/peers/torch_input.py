"""PyTorch's side of the input pipeline: a DataLoader of processes that decode with Pillow.

The crop is torchvision's RandomResizedCrop, written out so that torchvision need not be installed.
"""

import math

from serve import reader, serve


def crop_box(width, height, area, aspect, torch):
    for _ in range(10):
        target = height * width * torch.empty(1).uniform_(*area).item()
        ratio = math.exp(torch.empty(1).uniform_(*map(math.log, aspect)).item())
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,)).item()
            left = torch.randint(0, width - w + 1, (1,)).item()
            return left, top, left + w, top + h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2


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
            box = crop_box(*image.size, task["area"], task["aspect"], torch)
            image = image.crop(box).resize((width, height), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)), 0

    photos = Photos()
    # Photos may be fewer than a batch; a sampler with replacement makes an endless epoch.
    sampler = torch.utils.data.RandomSampler(photos, replacement=True, num_samples=10**7)
    loader = iter(torch.utils.data.DataLoader(
        photos, batch_size=task["batch_size"], sampler=sampler, num_workers=task["workers"]))

    about = {"library": f"torch {torch.__version__}, Pillow {PIL.__version__}"}
    return reader(loader, task["read_ahead"]), about


if __name__ == "__main__":
    serve(prepare)
