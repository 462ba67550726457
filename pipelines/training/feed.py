"""What a worker's network is fed: batches of pairs, and the tensors that are made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.encoders.batch import Normalize, padded
from pipelines.encoders.matcher import image_transform
from pipelines.encoders.matcher_folder import MatcherConfig
from pipelines.encoders.matcher_text import WordTokenizer
from pipelines.encoders.torch_encoder import masked
from pipelines.training.batches import Pair, batches, hashed, pairs, shuffled
from pipelines.training.place import Place
from pipelines.training.settings import TrainConfig
from pipelines.training.survey import Survey

READ_ROWS = 128


class Feed:
    """The same batches for the same seed, epoch, place and order of samples."""

    def __init__(self, config: TrainConfig, matcher: MatcherConfig, survey: Survey, place: Place) -> None:
        self._config, self._place, self._size = config, place, matcher.image_size
        self._tokenize = WordTokenizer(survey.vocabulary, matcher.max_words)
        self._normalize = Normalize(image_transform(matcher), place.device, torch.float32)
        self._classes = {identity: at for at, identity in enumerate(survey.classes)}

    def batches(self, epoch: int, done: int) -> Iterator[list[Pair]]:
        """This worker's of an epoch, but for the first `done`, for as long as every worker has one."""
        return self._agreed(islice(self._own(epoch), done, None))

    def _own(self, epoch: int) -> Iterator[list[Pair]]:
        data, seed = self._config.data, self._config.optim.seed
        stream = pairs(self._place.tables("train", READ_ROWS), self._size, data.captions, epoch)
        if data.shuffle > 1:
            stream = shuffled(stream, data.shuffle, Random(f"{seed} {epoch} {self._place.rank}"))
        workers = self._place.workers
        return batches(stream, self._config.optim.batch_size // workers, whole_alone=workers > 1)

    def _agreed(self, mine: Iterable[list[Pair]]) -> Iterator[list[Pair]]:
        """A step is of all workers. What one has left is read to its end."""
        stream = iter(mine)
        for batch in stream:
            if not self._place.all(True):
                break
            yield batch
        else:
            self._place.all(False)
        for _ in stream:
            pass

    # -- tensors -----------------------------------------------------------------------------------

    def tensors(self, batch: list[Pair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixels, ids, mask and identities, as Network takes them. Some images are mirrored, by torch's generator."""
        pixels = self.pixels(np.stack([pair.pixels for pair in batch]))
        if self._config.data.flip:
            mirrored = torch.rand(len(batch), device=self._place.device) < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        numbers = [self._number(pair.identity) for pair in batch]
        ids, mask = self.tokens([pair.caption for pair in batch])
        return pixels, ids, mask, torch.tensor(numbers, device=self._place.device)

    def _number(self, identity: str) -> int:
        return self._classes[identity] if self._classes else hashed(identity)

    def pixels(self, images: NDArray[np.uint8]) -> Tensor:
        """Normalised float32 [n, 3, height, width] of [n, height, width, 3]."""
        return self._normalize.images(torch.tensor(images, device=self._place.device))

    def tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """ids and mask, int64 [n, length]."""
        ids, mask = masked(padded(self._tokenize(captions), self._tokenize.longest))
        device = self._place.device
        return ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)
