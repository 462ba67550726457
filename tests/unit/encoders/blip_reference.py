"""BLIP and BLIP-2 used as their manuals show, one image and one caption at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn.functional import normalize
from torchvision import transforms

from tests.checkpoints import SIDE
from tests.checkpoints_blip import QUERIES, Lavis, OriginalBlip
from tests.unit.encoders.reference import error, opened, spread

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def assert_near(ours: np.ndarray, theirs: np.ndarray, bound: float) -> float:
    assert np.isfinite(ours).all() and ours.shape == theirs.shape
    assert spread(theirs) >= 0.2 * np.linalg.norm(theirs, axis=1).mean(), "a checkpoint that tells nothing apart"
    worst = float(error(ours, theirs).max())
    assert worst <= bound, f"{worst:.2e}"
    return worst


class HfBlip:
    """transformers, with [ENC] set as LAVIS sets it."""

    length = 35

    def __init__(self, folder: str) -> None:
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model: Any = self._model(folder)
        self.model.eval()

    def _model(self, folder: str) -> Any:
        return transformers.BlipForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32)

    def pixels(self, data: bytes) -> torch.Tensor:
        return self.processor(images=opened(data), return_tensors="pt")["pixel_values"]

    def tokens(self, caption: str) -> Any:
        how = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        return self.tokenizer([caption], **how)

    @torch.no_grad()
    def image(self, data: bytes) -> dict[str, torch.Tensor]:
        patches = self.model.vision_model(pixel_values=self.pixels(data)).last_hidden_state[0]
        return {"projected": self.model.vision_proj(patches[0]), "hidden": patches[0], "mean": patches.mean(0)}

    @torch.no_grad()
    def text(self, caption: str) -> dict[str, torch.Tensor]:
        tokens = self.tokens(caption)
        hidden = self.model.text_encoder(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state[0]
        mean = hidden[: int(tokens["attention_mask"].sum())].mean(0)
        return {"projected": self.model.text_proj(hidden[0]), "hidden": hidden[0], "mean": mean}

    @torch.no_grad()
    def pair(self, data: bytes, caption: str) -> dict[str, torch.Tensor]:
        tokens = self.tokens(caption)
        tokens["input_ids"][:, 0] = self.model.config.text_config.bos_token_id + 1
        patches = self.model.vision_model(pixel_values=self.pixels(data)).last_hidden_state
        hidden = self.model.text_encoder(
            tokens["input_ids"],
            tokens["attention_mask"],
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:-1], dtype=torch.long),
        ).last_hidden_state[0]
        mean = hidden[: int(tokens["attention_mask"].sum())].mean(0)
        match = self.model.itm_head(hidden[0]).softmax(-1)[1]
        return {"projected": hidden[0], "hidden": hidden[0], "mean": mean, "match": match}

    @torch.no_grad()
    def itm_score(self, data: bytes, caption: str) -> torch.Tensor:
        """transformers' own forward, on ids that begin with [ENC]."""
        tokens = self.tokens(caption)
        tokens["input_ids"][:, 0] = self.model.config.text_config.bos_token_id + 1
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        return self.model(input_ids=ids, pixel_values=self.pixels(data), attention_mask=mask).itm_score.softmax(-1)[
            0, 1
        ]


class OriginalReference:
    """The original evaluation code's steps, upon timm and BERT."""

    def __init__(self, model: OriginalBlip, vocabulary: str, length: int = 35, side: int = SIDE) -> None:
        self.model, self.length = model, length
        self.tokenizer = transformers.BertTokenizer(vocab=vocabulary)
        self.transform = transforms.Compose(
            [
                transforms.Resize((side, side), interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def pixels(self, data: bytes) -> torch.Tensor:
        image: Image.Image = opened(data).convert("RGB")
        return self.transform(image)[None]

    def ids(self, caption: str) -> torch.Tensor:
        return torch.tensor([self.tokenizer(caption, truncation=True, max_length=self.length)["input_ids"]])

    @torch.no_grad()
    def image(self, data: bytes) -> dict[str, torch.Tensor]:
        patches = self.model.visual_encoder(self.pixels(data))[0]
        return {"projected": self.model.vision_proj(patches[0]), "hidden": patches[0], "mean": patches.mean(0)}

    @torch.no_grad()
    def text(self, caption: str) -> dict[str, torch.Tensor]:
        hidden = self.model.text(input_ids=self.ids(caption))[0]
        return {"projected": self.model.text_proj(hidden[0]), "hidden": hidden[0], "mean": hidden.mean(0)}

    @torch.no_grad()
    def pair(self, data: bytes, caption: str) -> dict[str, torch.Tensor]:
        ids = self.ids(caption)
        ids[:, 0] = len(self.tokenizer) + 1
        hidden = self.model.text(self.model.visual_encoder(self.pixels(data)), input_ids=ids)[0]
        match = self.model.itm_head(hidden[0]).softmax(-1)[1]
        return {"projected": hidden[0], "hidden": hidden[0], "mean": hidden.mean(0), "match": match}


class HfBlip2(HfBlip):
    length = 32

    def _model(self, folder: str) -> Any:
        return transformers.Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32)

    def patches(self, data: bytes) -> torch.Tensor:
        return self.model.vision_model(self.pixels(data))[0]

    @torch.no_grad()
    def image(self, data: bytes) -> dict[str, torch.Tensor]:
        patches = self.patches(data)
        seen = torch.ones(patches.shape[:-1], dtype=torch.long)
        hidden = self.model.qformer(
            query_embeds=self.model.query_tokens, encoder_hidden_states=patches, encoder_attention_mask=seen
        )[0][0]
        projected = self.model.vision_projection(hidden)
        return {
            "mean_norm": normalize(projected, dim=-1).mean(0),
            "mean_raw": projected.mean(0),
            "first": projected[0],
            "tokens": projected.flatten(),
            "hidden mean_raw": hidden.mean(0),
            "hidden first": hidden[0],
        }

    @torch.no_grad()
    def text(self, caption: str) -> dict[str, torch.Tensor]:
        tokens = self.tokens(caption)
        words = self.model.embeddings(input_ids=tokens["input_ids"])
        hidden = self.model.qformer(query_embeds=words, query_length=0, attention_mask=tokens["attention_mask"])[0]
        return {"projected": self.model.text_projection(hidden[0, 0]), "hidden": hidden[0, 0]}

    @torch.no_grad()
    def pair(self, data: bytes, caption: str) -> dict[str, torch.Tensor]:
        tokens, patches = self.tokens(caption), self.patches(data)
        hidden = self.model.qformer(
            query_embeds=self.model.embeddings(input_ids=tokens["input_ids"], query_embeds=self.model.query_tokens),
            query_length=QUERIES,
            attention_mask=torch.cat([torch.ones(1, QUERIES, dtype=torch.long), tokens["attention_mask"]], 1),
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:-1], dtype=torch.long),
        )[0][0, :QUERIES]
        match = self.model.itm_head(hidden).mean(0).softmax(-1)[1]
        return {"mean_raw": hidden.mean(0), "first": hidden[0], "match": match}


class HfBlip2Opt:
    """A model that writes, of which the queries alone are taken."""

    def __init__(self, folder: str) -> None:
        self.model: Any = transformers.Blip2Model.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")

    @torch.no_grad()
    def image(self, data: bytes) -> np.ndarray:
        inputs = self.processor(images=opened(data), return_tensors="pt")
        return self.model.get_qformer_features(**inputs)[0].mean(0).numpy()


class LavisReference(HfBlip2):
    """LAVIS's steps: its own vision tower and images; the Q-Former is transformers'."""

    def __init__(self, model: Lavis, vocabulary: str) -> None:
        self.lavis, self.model = model, model.rest
        self.pixels = OriginalReference(model, vocabulary, side=SIDE).pixels  # type: ignore[arg-type, method-assign]
        self.tokenizer = transformers.BertTokenizer(vocab=vocabulary)

    def patches(self, data: bytes) -> torch.Tensor:
        return self.lavis.patches(self.pixels(data))


def stacked(rows: list[dict[str, torch.Tensor]], key: str) -> np.ndarray:
    return np.stack([np.atleast_1d(row[key].numpy()) for row in rows])
