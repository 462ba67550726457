"""The two towers of a matcher: a backbone of timm, and a bi-LSTM over word embeddings with max over time.

Zhang and Lu, Deep Cross-Modal Projection Learning for Image-Text Matching, ECCV 2018, section 3.1.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pipelines.encoders.matcher_folder import MatcherConfig
from pipelines.errors import EncoderError


class Matcher(nn.Module):
    """Image and text towers with a linear head each, into one space of config.embed_dim dimensions."""

    def __init__(
        self, config: MatcherConfig, vocabulary_size: int, dropout: float = 0.0, backbone: nn.Module | None = None
    ) -> None:
        """dropout: share of word embeddings, and of the LSTM's outputs, that training drops. backbone: the image tower,
        where it is at hand, else one of random weights. Raises: EncoderError where timm cannot build it."""
        super().__init__()
        self.image_tower = backbone or image_tower(config.image_tower, config.image_arguments)
        self.text_tower = TextTower(vocabulary_size, config.word_dim, config.lstm_hidden, dropout)
        self.image_head = nn.Linear(_features(self.image_tower, config), config.embed_dim)
        self.text_head = nn.Linear(2 * config.lstm_hidden, config.embed_dim)

    def image(self, pixels: Tensor) -> Tensor:
        """[n, embed_dim] of normalised pixels [n, 3, height, width]; not of unit length."""
        return self.image_head(self.image_tower(pixels))  # type: ignore[no-any-return]

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[n, embed_dim] of int64 ids and mask [n, length], 1 where there is a word; each caption has one at least."""
        return self.text_head(self.text_tower(ids, mask))  # type: ignore[no-any-return]


class TextTower(nn.Module):
    """Word embeddings, a bidirectional LSTM that never sees padding, and the maximum over a caption's words."""

    def __init__(self, words: int, word_dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(words, word_dim, padding_idx=0)
        self.lstm = nn.LSTM(word_dim, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[n, 2 * hidden]."""
        words = self.dropout(self.words(ids))
        # Packed, the backward direction starts at a caption's last word and not in its padding.
        packed = pack_padded_sequence(words, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=ids.shape[1])
        padding = (mask == 0).unsqueeze(-1)
        return self.dropout(outputs).masked_fill(padding, -torch.inf).amax(1)  # type: ignore[no-any-return]


def image_tower(name: str, arguments: dict[str, Any], weights: str | None = None) -> nn.Module:
    """A timm model without its classifier. weights: a local file that it starts from, or `timm`, its own from the
    model hub; random ones where None. Raises: EncoderError."""
    start: dict[str, Any] = {"pretrained": weights is not None}
    if weights not in (None, "timm"):
        start["pretrained_cfg_overlay"] = {"file": weights}
    try:
        model: nn.Module = timm.create_model(name, num_classes=0, **start, **arguments)
    except Exception as error:
        raise EncoderError(f"timm cannot build {name}: {error}", "Check its name and arguments.") from error
    return model


def _features(tower: nn.Module, config: MatcherConfig) -> int:
    """Computed, without values: `num_features` is not what comes out of some networks' heads."""
    training = tower.training
    try:
        with torch.no_grad():
            output = tower.eval()(torch.zeros(1, 3, *config.image_size, device=next(tower.parameters()).device))
    except Exception as error:
        raise EncoderError(
            f"{config.image_tower} cannot embed images of {config.image_size}: {error}", "Set another image size."
        ) from error
    finally:
        tower.train(training)
    if output.dim() != 2:
        raise EncoderError(f"{config.image_tower} gives no one vector an image.", "Choose another backbone.")
    return int(output.shape[1])
