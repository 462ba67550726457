"""Cross-modal projection matching and classification, the same-identity constraint, and a contrastive loss.

Zhang and Lu, Deep Cross-Modal Projection Learning for Image-Text Matching, ECCV 2018. In all of them a batch is n
pairs: `images` and `texts` [n, dim] as the towers give them, not normalised, and `identities` int64 [n], equal where an
image and a text match. They compute in float32 at least, whatever autocast is in force: EPSILON is 0 in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-8
"""Beside the target probabilities, as the paper has it."""


def cmpm(images: Tensor, texts: Tensor, identities: Tensor) -> Tensor:
    """Projection matching, both directions: KL(p || q) of what projections say from what identities say."""
    with _full_precision(images):
        images, texts = _widened(images), _widened(texts)
        target = matches(identities, images.dtype)
        return _divergence(images @ unit(texts).T, target) + _divergence(texts @ unit(images).T, target)


def cmpc(images: Tensor, texts: Tensor, identities: Tensor, classifier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Projection classification: (loss, logits of the images, logits of the texts), logits [n, classes].

    classifier: [dim, classes], a column a class, normalised here. An image is projected onto its text's direction, and
    a text onto its image's, before they are classified. identities are class numbers here.
    """
    with _full_precision(images):
        images, texts = _widened(images), _widened(texts)
        columns = functional.normalize(classifier.to(images.dtype), dim=0)
        image_logits, text_logits = _projected(images, texts) @ columns, _projected(texts, images) @ columns
        loss = functional.cross_entropy(image_logits, identities) + functional.cross_entropy(text_logits, identities)
        return loss, image_logits, text_logits


def constraint(embeddings: Tensor, identities: Tensor) -> Tensor:
    """Mean Euclidean distance of the pairs within an identity, averaged over the identities that have one; else 0."""
    with _full_precision(embeddings):
        embeddings = _widened(embeddings)
        distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
        pairs = (identities[:, None] == identities).to(embeddings.dtype).fill_diagonal_(0)
        others = pairs.sum(1)
        # Each of an identity's m items has its m - 1 others: their mean over items is that over pairs.
        means = (distances * pairs).sum(1) / others.clamp(min=1)
        weights = torch.where(others > 0, 1 / (others + 1), others)
        return (means * weights).sum() / weights.sum().clamp(min=1)


def infonce(images: Tensor, texts: Tensor, identities: Tensor, scale: Tensor) -> Tensor:
    """Contrastive, both directions averaged: cross-entropy of scaled cosines with the pairs of one identity sharing
    the target; van den Oord and others, Representation Learning with Contrastive Predictive Coding, 2018. scale: one
    number, the inverse of the temperature."""
    with _full_precision(images):
        target = matches(identities, torch.promote_types(images.dtype, torch.float32))
        logits = scale.to(target.dtype) * cosines(images, texts)
        both = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
        return both / 2


def matches(identities: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, n]: each row's target probabilities, uniform over the pairs of its identity. Rows sum to 1."""
    same = (identities[:, None] == identities).to(dtype)
    return same / same.sum(1, keepdim=True)


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """[n, n], images in rows."""
    with _full_precision(images):
        return unit(_widened(images)) @ unit(_widened(texts)).T


def unit(vectors: Tensor) -> Tensor:
    return functional.normalize(vectors, dim=-1)


def _divergence(projections: Tensor, target: Tensor) -> Tensor:
    """1/n sum_i sum_j p_ij log(p_ij / (q_ij + eps)), with p the softmax over a row."""
    logs = functional.log_softmax(projections, dim=1)
    return (logs.exp() * (logs - (target + EPSILON).log())).sum(1).mean()


def _projected(vectors: Tensor, onto: Tensor) -> Tensor:
    """Each row's projection onto the direction of the other modality's row."""
    directions = unit(onto)
    return (vectors * directions).sum(1, keepdim=True) * directions


def _full_precision(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
