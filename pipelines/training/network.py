"""A matcher with its losses: what is trained. From a batch of pairs to one number, and what the log tells of it."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from pipelines.encoders.matcher_model import Matcher
from pipelines.training import losses
from pipelines.training.settings import LossConfig

LARGEST_SCALE = 100.0
"""Of InfoNCE, as Radford and others, Learning Transferable Visual Models, ICML 2021, bound it."""


class Network(nn.Module):
    """matcher: its towers. classifier: of CMPC, [embed_dim, classes]. log_scale: of InfoNCE."""

    def __init__(self, matcher: Matcher, classes: int, weights: LossConfig) -> None:
        super().__init__()
        self.matcher, self.weights = matcher, weights
        dim = matcher.image_head.out_features
        self.classifier = nn.Parameter(torch.randn(dim, classes) / dim**0.5) if weights.cmpc else None
        self.log_scale = nn.Parameter(torch.tensor(-log(weights.temperature))) if weights.infonce else None

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor, identities: Tensor) -> dict[str, Tensor]:
        """`loss`, and each part of it by its name, unweighted, over the pairs of all workers.

        pixels: normalised, [n, 3, height, width]. ids, mask: int64 [n, length]. identities: int64 [n], class numbers
        where CMPC has a weight.
        """
        images, texts = self.matcher.image(pixels), self.matcher.text(ids, mask)
        images, texts, identities = gathered(images.float()), gathered(texts.float()), gathered(identities)
        parts = self._parts(images, texts, identities)
        total = sum(getattr(self.weights, name) * part for name, part in parts.items() if hasattr(self.weights, name))
        with torch.no_grad():
            return {"loss": total, **parts, **similarities(images, texts, identities)}

    @torch.no_grad()
    def keep_in_bounds(self) -> None:
        """After a step. A bound within the loss would have no gradient beyond it, and the scale never come back."""
        if self.log_scale is not None:
            self.log_scale.clamp_(max=log(LARGEST_SCALE))

    def _parts(self, images: Tensor, texts: Tensor, identities: Tensor) -> dict[str, Tensor]:
        weights, parts = self.weights, {}
        if weights.cmpm:
            parts["cmpm"] = losses.cmpm(images, texts, identities)
        if self.classifier is not None:
            parts["cmpc"], *logits = losses.cmpc(images, texts, identities, self.classifier)
            for name, each in zip(("image_precision", "text_precision"), logits, strict=True):
                parts[name] = (each.detach().argmax(1) == identities).float().mean()
        if self.log_scale is not None:
            parts["infonce"] = losses.infonce(images, texts, identities, self.log_scale.exp())
        if weights.constraint_images:
            parts["constraint_images"] = losses.constraint(images, identities)
        if weights.constraint_texts:
            parts["constraint_texts"] = losses.constraint(texts, identities)
        return parts


def similarities(images: Tensor, texts: Tensor, identities: Tensor) -> dict[str, Tensor]:
    """Mean cosine of images and captions of one identity, and of different ones."""
    cosines, same = losses.cosines(images, texts), identities[:, None] == identities
    unmatched = cosines[~same]
    return {
        "matched_similarity": cosines[same].mean(),
        "unmatched_similarity": unmatched.mean() if len(unmatched) else cosines.new_zeros(()),
    }


def gathered(tensor: Tensor) -> Tensor:
    """The rows of all workers, so that any number of them compute the loss of the whole batch.

    Each worker's gradient comes back as the sum of what all of them have; averaging over workers, as data-parallel
    training does with parameters, makes it that of one worker with the whole batch.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return tensor
    if tensor.is_floating_point():
        return torch.cat(all_gather(tensor))  # type: ignore[no-untyped-call]
    held = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(held, tensor)
    return torch.cat(held)
