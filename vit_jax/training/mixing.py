"""Augmentation of a batch on the device: random erasing, mixup and CutMix.

`draw` makes every random choice for the whole batch, before it is split into accumulation parts;
`mixed_images` and `mixed_targets` then treat each row by itself. So the result depends neither on
the number of parts nor, under jit, on the number of devices.

A box is (top, left, bottom, right) in pixels, the last two exclusive; (0, 0, 0, 0) is empty.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Random erasing as timm does it.
_ERASED_AREA = (0.02, 1 / 3)  # share of the image
_ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width
_ERASING_TRIES = 10


def draw(
    key: jax.Array, batch: dict[str, Any], *, mixup: float, cutmix: float, erasing: float
) -> dict[str, Any]:
    """Decides what happens to every image; no pixel changes yet.

    The partner of row i is row i - 1, that of the first row the last: one image moves between
    neighbouring devices. Under pmap a device sees only its own rows and pairs those. A partner
    that could not be decoded (`mask` False) takes no part.

    Args:
      key: of the step.
      batch: image uint8 [B, H, W, 3], label [B] and mask [B], besides others.
      mixup: alpha of the Beta(alpha, alpha) that weights come from (arXiv 1710.09412); 0: off.
      cutmix: the same for CutMix. With both, each image takes one of them, with probability 1/2.
      erasing: probability that an image is erased.

    Returns:
      The batch with what the functions below read: erase_box [B, 4] and noise_key [B]; partner, a
      dictionary of the partners' rows; blend float32 [B] and cut_box [B, 4], see `mix`.
    """
    rows, size = len(batch["image"]), batch["image"].shape[1:3]
    erase_key, noise_key, switch_key, share_key, box_key = jax.random.split(key, 5)
    if erasing:
        batch = batch | {
            "erase_box": erasing_boxes(erase_key, erasing, rows, size),
            # A key per image, because parts of the batch draw their noise separately.
            "noise_key": jax.random.split(noise_key, rows),
        }
    if not mixup and not cutmix:
        return batch
    if mixup and cutmix:
        cut = jax.random.bernoulli(switch_key, 0.5, (rows,))
    else:
        cut = jnp.full(rows, bool(cutmix))
    alpha = _on_every_device(jnp.where(cut, cutmix, mixup))
    share = _on_every_device(jax.random.beta(share_key, alpha, alpha))
    # mixup's smaller half is mirrored, as in big_vision: the image outweighs its partner.
    blend = jnp.where(cut, 1.0, jnp.maximum(share, 1 - share))
    box = jnp.where(cut[:, None], cutmix_boxes(box_key, share, size), 0)
    partner = {
        # Not an indexed gather, for which the compiler would collect all images on every device.
        name: jnp.roll(batch[name], 1, axis=0)
        for name in ("image", "label", "mask", "erase_box", "noise_key") if name in batch
    }
    valid = partner.pop("mask")
    return batch | {
        "partner": partner,
        "blend": jnp.where(valid, blend, 1.0),
        "cut_box": jnp.where(valid[:, None], box, 0),
    }


def mixed_images(
    batch: dict[str, Any], normalize: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Normalises, erases and mixes, in this order, what `draw` returned: an erased area is mixed as
    the rest of its image, as in DeiT's script (timm's own loader erases what is mixed already).

    Args:
      batch: from `draw`, or some of its rows.
      normalize: uint8 [B, H, W, 3] to float32.

    Returns:
      float32 [B, H, W, 3].
    """

    def prepare(rows):
        images = normalize(rows["image"])
        if "erase_box" not in rows:
            return images
        return erase(images, rows["erase_box"], rows["noise_key"])

    images = prepare(batch)
    if "partner" not in batch:
        return images
    return mix(images, prepare(batch["partner"]), batch["blend"], batch["cut_box"])


def mixed_targets(
    batch: dict[str, Any], make_targets: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`share * target + (1 - share) * partner's target`, the share counted in pixels.

    Args:
      batch: from `draw`, or some of its rows.
      make_targets: labels [B] to target probabilities [B, K].

    Returns:
      [B, K].
    """
    targets = make_targets(batch["label"])
    if "partner" not in batch:
        return targets
    share = own_share(batch["blend"], batch["cut_box"], batch["image"].shape[1:3])[:, None]
    return share * targets + (1 - share) * make_targets(batch["partner"]["label"])


def cutmix_boxes(key: jax.Array, share: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Boxes of CutMix (arXiv 1905.04899, section 3.1): an image's shape, 1 - share of its area, the
    centre anywhere in it, clipped at its border.

    Args:
      key: of the centres.
      share: [B] in [0, 1], the own share of every image before clipping.
      size: (height, width) of the images.

    Returns:
      int32 [B, 4].
    """
    starts, ends = [], []
    for axis_key, pixels in zip(jax.random.split(key), size, strict=True):
        length = (pixels * jnp.sqrt(1 - share)).astype(jnp.int32)
        centre = jax.random.randint(axis_key, share.shape, 0, pixels)
        starts.append(jnp.clip(centre - length // 2, 0, pixels))
        ends.append(jnp.clip(centre + (length + 1) // 2, 0, pixels))
    return jnp.stack(starts + ends, axis=1)


def erasing_boxes(
    key: jax.Array, probability: float, rows: int, size: tuple[int, int]
) -> jax.Array:
    """Boxes int32 [B, 4] of random erasing (arXiv 1708.04896, algorithm 1), empty for images that
    stay whole. Area is uniform, aspect log-uniform, within timm's limits; as there, the first of
    ten draws that fits into the image counts."""
    height, width = size
    apply_key, area_key, aspect_key, top_key, left_key = jax.random.split(key, 5)
    tries = (rows, _ERASING_TRIES)
    low, high = _ERASED_AREA
    area = height * width * jax.random.uniform(area_key, tries, minval=low, maxval=high)
    low, high = map(math.log, _ERASED_ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspect_key, tries, minval=low, maxval=high))
    h = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    h, w = (jnp.take_along_axis(x, first, axis=1)[:, 0] for x in (h, w))
    top = jax.random.randint(top_key, (rows,), 0, height - h + 1)
    left = jax.random.randint(left_key, (rows,), 0, width - w + 1)
    erased = jnp.any(fits, axis=1) & jax.random.bernoulli(apply_key, probability, (rows,))
    return jnp.where(erased[:, None], jnp.stack([top, left, top + h, left + w], axis=1), 0)


def erase(images: jax.Array, boxes: jax.Array, keys: jax.Array) -> jax.Array:
    """Fills the boxes [B, 4] of the images [B, H, W, C] with standard normal noise, drawn for
    every pixel and channel from the image's own key [B]."""
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
    return jnp.where(_inside(boxes, images.shape[1:3])[..., None], noise, images)


def mix(images: jax.Array, partners: jax.Array, blend: jax.Array, boxes: jax.Array) -> jax.Array:
    """Mixup and CutMix in one: inside its box a pixel is the partner's, elsewhere it is
    `blend * own + (1 - blend) * partner's`. CutMix has blend 1, mixup an empty box.

    Args:
      images, partners: float32 [B, H, W, C].
      blend: float32 [B].
      boxes: int32 [B, 4].

    Returns:
      float32 [B, H, W, C].
    """
    inside = _inside(boxes, images.shape[1:3])
    weight = jnp.where(inside, 0.0, blend[:, None, None])[..., None]
    return weight * images + (1 - weight) * partners


def own_share(blend: jax.Array, boxes: jax.Array, size: tuple[int, int]) -> jax.Array:
    """What `mix` leaves of each image, [B] in [0, 1]: its mean weight over all pixels."""
    top, left, bottom, right = boxes.T
    return blend * (1 - (bottom - top) * (right - left) / math.prod(size))


def _inside(boxes, size):
    """bool [B, H, W]: which pixels lie in the boxes [B, 4]."""
    top, left, bottom, right = boxes.T[..., None, None]
    row, column = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None]
    return (top <= row) & (row < bottom) & (left <= column) & (column < right)


def _on_every_device(x):
    """Replicates a small array: the Beta sampler loops until all draws are accepted, and if the
    draws were sharded, every iteration would synchronise all devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec())
