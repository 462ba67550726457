"""The losses written out in float64 NumPy, a sum at a time, as ENCODERS' section 4 and the paper have them."""

from __future__ import annotations

import numpy as np

Array = np.ndarray
EPSILON = 1e-8


def softmax(row: Array) -> Array:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def divergence(from_: Array, onto: Array, identities: Array) -> float:
    n, total = len(identities), 0.0
    for i in range(n):
        p = softmax(np.array([from_[i] @ (onto[j] / np.sqrt(onto[j] @ onto[j])) for j in range(n)]))
        matching = np.array([float(identities[i] == identities[j]) for j in range(n)])
        q = matching / matching.sum()
        total += sum(p[j] * np.log(p[j] / (q[j] + EPSILON)) for j in range(n))
    return total / n


def cmpm(images: Array, texts: Array, identities: Array) -> float:
    return divergence(images, texts, identities) + divergence(texts, images, identities)


def cmpc(images: Array, texts: Array, identities: Array, classifier: Array) -> float:
    columns = classifier / np.sqrt((classifier**2).sum(0))
    total = 0.0
    for x, z, y in zip(images, texts, identities, strict=True):
        for vector, onto in ((x, z), (z, x)):
            direction = onto / np.sqrt(onto @ onto)
            total -= np.log(softmax((vector @ direction) * direction @ columns)[y])
    return total / len(identities)


def constraint(embeddings: Array, identities: Array) -> float:
    means = []
    for identity in sorted(set(identities.tolist())):
        own = embeddings[identities == identity]
        pairs = [np.sqrt(((own[i] - own[j]) ** 2).sum()) for i in range(len(own)) for j in range(i)]
        if pairs:
            means.append(np.mean(pairs))
    return float(np.mean(means)) if means else 0.0


def infonce(images: Array, texts: Array, identities: Array, scale: float) -> float:
    x, z = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (images, texts))
    total = 0.0
    for logits in (scale * x @ z.T, scale * z @ x.T):
        for i, row in enumerate(logits):
            same = identities == identities[i]
            total -= np.log(softmax(row))[same].mean()
    return total / (2 * len(identities))


# -- what has gone wrong in ports ----------------------------------------------------------------


def cmpm_reversed(images: Array, texts: Array, identities: Array) -> float:
    """KL(q || p)."""
    total = 0.0
    for a, b in ((images, texts), (texts, images)):
        p = np.stack([softmax(row) for row in a @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T])
        q = (identities[:, None] == identities).astype(float)
        q /= q.sum(1, keepdims=True)
        total += float((q * np.log((q + EPSILON) / (p + EPSILON))).sum(1).mean())
    return total


def cmpm_on_the_wrong_axis(images: Array, texts: Array, identities: Array) -> float:
    """The mask divided by its L2 norm, down the columns, as in a much-used port."""
    mask = (identities[:, None] == identities).astype(float)
    q = mask / np.linalg.norm(mask, axis=0, keepdims=True)
    total = 0.0
    for a, b in ((images, texts), (texts, images)):
        p = np.stack([softmax(row) for row in a @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T])
        total += float((p * np.log(p / (q + EPSILON))).sum(1).mean())
    return total
