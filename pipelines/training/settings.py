"""A training run's settings: what `vecmill train RECIPE` reads, validated as those of `embed` are.

The defaults are the recipe of Zhang and Lu, ECCV 2018, for CUHK-PEDES with MobileNet, but for the weights that the
image tower starts from: theirs are ImageNet's (model.weights: timm), and the default is random ones.
"""

from __future__ import annotations

from math import ceil
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveInt, model_validator

from pipelines.config import (
    Auto,
    ClusterConfig,
    ImageDecodeConfig,
    Precision,
    ReadConfig,
    Section,
    one_or_more,
)
from pipelines.sources.split import SplitConfig

TOWERS = {"mobilenetv1": "mobilenetv1_100", "resnet50": "resnet50", "resnet152": "resnet152"}
"""Image towers by short names; any other name is timm's own."""

Weight = Annotated[float, Field(ge=0)]
Triple = tuple[float, float, float]
HALF: Triple = (0.5, 0.5, 0.5)


def _square(size: Any) -> Any:
    return (size, size) if isinstance(size, int) else size


class DataConfig(Section):
    identity: str = Field(
        "own",
        min_length=1,
        description="what matches: own (each image with its own captions), label (class folders), or a field of the "
        "samples' metadata that names an identity",
    )
    train: Annotated[list[str] | None, BeforeValidator(one_or_more)] = Field(
        None, description="samples to train on: those whose metadata has this `split`, or one of these"
    )
    val: str | None = Field(None, description="samples to evaluate on: those whose metadata has this `split`")
    val_input: Annotated[list[str] | None, BeforeValidator(one_or_more)] = Field(
        None, description="inputs to evaluate on, where they are others"
    )
    split: SplitConfig | None = Field(None, description="or a split by key hash, as `vecmill split` makes it")
    captions: Literal["each", "one"] = Field(
        "each", description="an epoch shows an image with each of its captions, or with one of them, in turn"
    )
    shuffle: int = Field(4_096, ge=1, description="pairs that the next is drawn from; 1 keeps the input's order")
    together: str | None = Field(
        None,
        description="`label`, or a field of the metadata: samples that follow one another and have the same are "
        "shuffled as one, so that hard negatives of each other come together; at most data.shuffle of them",
    )
    cache: bool = Field(
        False, description="keep decoded images in Ray's object store, which spills to disk; else decode every epoch"
    )
    flip: bool = Field(True, description="mirror half of the images")
    val_images: int = Field(5_000, ge=1, description="images evaluated on at most")


class ModelConfig(Section):
    image_tower: str = Field("mobilenetv1", description="mobilenetv1, resnet50, resnet152, or a timm name")
    image_arguments: dict[str, Any] = Field({}, description="arguments of timm's create_model")
    weights: str | None = Field(
        None,
        description="what the image tower starts from: timm (its own), or a local file that every node sees; random "
        "weights where unset",
    )
    embed_dim: int = Field(512, ge=1)
    lstm_hidden: int = Field(512, ge=1, description="units of each direction")
    word_dim: int = Field(512, ge=1)
    max_words: int = Field(100, ge=1)
    vocab_size: int = Field(12_000, ge=4, description="words, with padding, unknown, start and end; the most frequent")
    image_size: Annotated[tuple[int, int], BeforeValidator(_square)] = Field((224, 224), description="height and width")
    mean: Triple | None = Field(
        None,
        description="of the channels; unset: as timm's weights of the tower want it where it starts from weights, "
        "else one half",
    )
    std: Triple | None = None
    dropout: float = Field(0.3, ge=0, lt=1, description="of words and of the LSTM's outputs")
    dtype: Literal["float32", "float16"] = Field("float32", description="of the weights in the model's folder")

    @property
    def weights_file(self) -> str | None:
        return None if self.weights == "timm" else self.weights

    @property
    def tower(self) -> str:
        return TOWERS.get(self.image_tower, self.image_tower)


class LossConfig(Section):
    """Weights of the losses; 0 leaves one out."""

    cmpm: Weight = 1.0
    cmpc: Weight = 1.0
    infonce: Weight = 0.0
    constraint_images: Weight = Field(0.0, description="mean distance within an identity, of images")
    constraint_texts: Weight = Field(0.0, description="the same of captions")
    temperature: float = Field(0.07, gt=0, description="of InfoNCE at the start; it is learned")

    @model_validator(mode="after")
    def _some_loss(self) -> LossConfig:
        if not self.cmpm + self.cmpc + self.infonce:
            raise ValueError("one of cmpm, cmpc and infonce must have a weight above 0")
        return self


class OptimConfig(Section):
    epochs: int = Field(50, ge=1)
    batch_size: int = Field(16, ge=2, description="pairs of a step, over all workers")
    lr: float = Field(2e-4, gt=0)
    finetune_lr: float | None = Field(None, gt=0, description="from when the frozen backbone is let go; unset: lr")
    frozen_epochs: int = Field(0, ge=0, description="epochs in which the backbone stays as it is")
    weight_decay: NonNegativeFloat = Field(4e-5, description="of the backbone")
    schedule: Literal["constant", "cosine", "step"] = "constant"
    warmup_epochs: float = Field(0.0, ge=0, description="in which the rate rises from 0")
    step_epochs: float = Field(10.0, gt=0, description="after each of which schedule = step multiplies the rate")
    step_factor: float = Field(0.1, gt=0, le=1)
    clip_norm: NonNegativeFloat = Field(5.0, description="of all gradients together; 0 does not clip")
    ema: float = Field(0.9999, ge=0, lt=1, description="decay of the averaged weights that are evaluated; 0: none")
    precision: Precision | Auto = Field("auto", description="of the towers; auto: bf16 on GPUs, fp32 on CPU")
    seed: int = Field(0, ge=0)


class StopConfig(Section):
    every: int = Field(1, ge=1, description="epochs from one evaluation to the next")
    metric: Literal["text_to_image", "image_to_text"] = Field(
        "text_to_image", description="whose recall decides which epoch is the best"
    )
    k: Literal[1, 5, 10] = 1
    patience: PositiveInt | None = Field(None, description="evaluations without a better one before it stops")


class CheckpointConfig(Section):
    every_steps: PositiveInt | None = Field(
        None, description="steps from one checkpoint to the next within an epoch, at whose end there is one anyway"
    )


class WorkersConfig(Section):
    workers: PositiveInt | Auto = Field("auto", description="auto: one a GPU, one in all on CPU")
    gpus_per_worker: NonNegativeFloat | Auto = Field("auto", description="auto: 1 where the cluster has GPUs, else 0")
    cpus_per_worker: float = Field(1.0, gt=0)
    threads: PositiveInt | Auto = Field("auto", description="torch threads of a worker on CPU")
    failures: int = Field(3, ge=0, description="times that workers which died are started again")


class TrainConfig(Section):
    """Everything a `train` run is told."""

    input: Annotated[list[str], BeforeValidator(one_or_more)] = Field(min_length=1)
    output: str = Field(min_length=1)
    format: Literal["auto", "tar", "parquet", "folder", "manifest"] = "auto"
    read: ReadConfig = ReadConfig()
    decode: ImageDecodeConfig = ImageDecodeConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    stop: StopConfig = StopConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    workers: WorkersConfig = WorkersConfig()
    cluster: ClusterConfig = ClusterConfig()
    storage: dict[str, dict[str, Any]] = Field({}, description="file system options by protocol")

    @model_validator(mode="after")
    def _one_way_to_split(self) -> TrainConfig:
        ways = {"data.val": self.data.val, "data.val_input": self.data.val_input, "data.split": self.data.split}
        if len(given := [name for name, value in ways.items() if value]) > 1:
            raise ValueError(f"{' and '.join(given)} both say what is evaluated on: give one")
        if self.data.split and self.data.identity not in ("own", self.data.split.by):
            raise ValueError(
                f"data.split.by = {self.data.split.by} would put some {self.data.identity} both in what is trained on "
                f"and in what is evaluated on: set it to {self.data.identity}"
            )
        if self.data.val and not self.data.train:
            raise ValueError("data.val without data.train would train on what is evaluated on: give both")
        if self.stop.patience and not any(ways.values()):
            raise ValueError("stop.patience needs samples to evaluate on: data.val, data.val_input or data.split")
        return self

    @property
    def shuffled_mib(self) -> int:
        """Memory of a worker's images that the next pair is drawn from."""
        height, width = self.model.image_size
        return ceil(self.data.shuffle * height * width * 3 / 2**20)

    @property
    def evaluates(self) -> bool:
        return bool(self.data.val or self.data.val_input or self.data.split)
