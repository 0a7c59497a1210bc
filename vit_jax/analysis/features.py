"""What a model has learned: position embeddings, patch filters, and how alike its layers are."""

from typing import Any

import numpy as np


def position_vectors(params: dict[str, Any], grid: tuple[int, int]) -> np.ndarray | None:
    """The learned position embedding of every patch, [height, width, D]; None if there is none."""
    tables = params["Transformer"].get("posembed_input")
    if tables is None:
        return None
    height, width = grid
    if "pos_embedding" in tables:  # the class token's comes first
        return np.asarray(tables["pos_embedding"][0, -height * width :]).reshape(height, width, -1)
    rows, columns = (np.asarray(tables[f"{axis}_embedding"][0]) for axis in ("row", "column"))
    rows = np.repeat(rows[:, None], width, axis=1)
    return np.concatenate([rows, np.repeat(columns[None], height, axis=0)], axis=-1)


def position_similarity(positions: np.ndarray) -> np.ndarray:
    """Cosine similarity of every patch's position embedding with all others (the paper's Figures 7
    centre and 10): [height, width, D] to [height, width, height, width]."""
    unit = np.float64(positions)
    unit /= np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), np.finfo(float).tiny)
    return np.einsum("hwd,ijd->hwij", unit, unit)


def filter_components(kernel: np.ndarray, count: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the patch-embedding filters (the paper's Figure 7 left).

    Args:
      kernel: [p, p, C, D], D filters of p x p pixels.
      count: components, at most; 28 in the paper.

    Returns:
      components of length 1, [count, p, p, C], by falling variance, with the sign that makes the
      largest entry positive; and their shares of the variance, [count].
    """
    filters = np.float64(kernel).reshape(-1, kernel.shape[-1]).T
    _, scale, components = np.linalg.svd(filters - filters.mean(axis=0), full_matrices=False)
    variance = scale**2
    components = components[:count]
    largest = np.abs(components).argmax(axis=1)
    components *= np.sign(components[np.arange(len(components)), largest])[:, None]
    shares = variance[:count] / max(variance.sum(), np.finfo(float).tiny)
    return components.reshape(-1, *kernel.shape[:3]), shares


def layer_similarity(features: np.ndarray) -> np.ndarray:
    """Linear centred kernel alignment of all pairs of layers: [L, n, D] to [L, L].

    CKA (Kornblith et al., arXiv 1905.00414, section 3) is HSIC(K, K') / sqrt(HSIC(K, K) HSIC(K',
    K')) of the layers' Gram matrices of n examples: 1 for features that are equal up to rotation
    and scale. HSIC is its unbiased estimate (Song et al. 2012, as in Nguyen et al., arXiv
    2010.15327), so that layers that have nothing in common get about 0 however few the examples
    are; with the biased one they come near 1 when n is below D.

    Raises:
      ValueError: fewer than 4 examples.
    """
    if features.shape[1] < 4:
        raise ValueError(f"similarity needs 4 examples or more, not {features.shape[1]}.")
    grams = np.stack([_u_centred(layer @ layer.T).ravel() for layer in np.float64(features)])
    inner = grams @ grams.T
    norms = np.sqrt(np.diag(inner))
    return inner / np.maximum(np.outer(norms, norms), np.finfo(float).tiny)


def _u_centred(gram):
    """A Gram matrix [n, n] such that inner products of two of them are n (n - 3) times the unbiased
    HSIC (Szekely & Rizzo 2014, section 3): zero diagonal, and rows and columns that add up to 0."""
    n = len(gram)
    np.fill_diagonal(gram, 0)
    rows = gram.sum(axis=0) / (n - 2)
    gram = gram - rows - rows[:, None] + rows.sum() / (n - 1)
    np.fill_diagonal(gram, 0)
    return gram
