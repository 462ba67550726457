"""Splits by key hash: the same sample is in the same split in every run, whatever else is in the input."""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import Field, model_validator

from pipelines.config import Section

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class SplitConfig(Section):
    """Shares of the groups: of keys, or of what samples share that must not be torn apart."""

    train: float = Field(0.8, ge=0, le=1)
    val: float = Field(0.1, ge=0, le=1)
    test: float = Field(0.1, ge=0, le=1)
    by: str = Field("key", min_length=1, description="key, label, or a field of the metadata such as identity")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _whole(self) -> SplitConfig:
        if abs(self.train + self.val + self.test - 1) > 1e-9:
            raise ValueError(f"the shares add up to {self.train + self.val + self.test:g}, not to 1")
        return self


def split_of(group: str, shares: SplitConfig) -> Split:
    """By the group's hash alone: samples of one group are in one split."""
    digest = hashlib.sha256(f"{shares.seed}:{group}".encode()).digest()
    at = int.from_bytes(digest[:8]) / 2**64
    if at < shares.train:
        return "train"
    return "val" if at < shares.train + shares.val or not shares.test else "test"
