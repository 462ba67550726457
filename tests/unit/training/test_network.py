"""What is trained: the loss of several workers is that of one, and each part of it is logged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from pipelines.encoders.matcher_folder import MatcherConfig
from pipelines.encoders.matcher_model import Matcher
from pipelines.training import losses
from pipelines.training.network import LARGEST_SCALE, Network, gathered
from pipelines.training.settings import LossConfig

ALL = LossConfig(cmpm=0.7, cmpc=1.3, infonce=0.5, constraint_images=0.2, constraint_texts=0.1)
WORKERS, EACH, CLASSES = 2, 6, 5
TOWER = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 16, "img_size": 32}


def network() -> Network:
    torch.manual_seed(3)
    config = MatcherConfig("vit_tiny_patch16_224", 8, 6, 5, 12, (32, 32), image_arguments=TOWER)
    return Network(Matcher(config, 20), CLASSES, ALL)


def batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    n = WORKERS * EACH
    ids = torch.randint(1, 20, (n, 7), generator=generator)
    mask = (torch.arange(7) < torch.randint(1, 8, (n, 1), generator=generator)).long()
    numbers = torch.randint(0, CLASSES, (n,), generator=generator)
    return torch.randn(n, 3, 32, 32, generator=generator), ids * mask, mask, numbers


def gradients(of: Network) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in of.named_parameters()}


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    told = network()(*batch())
    parts = ("cmpm", "cmpc", "infonce", "constraint_images", "constraint_texts")
    assert told["loss"].item() == pytest.approx(sum(getattr(ALL, name) * told[name].item() for name in parts))
    assert told.keys() >= {"image_precision", "text_precision", "matched_similarity", "unmatched_similarity"}
    without = LossConfig(cmpm=1, cmpc=0)
    assert Network(network().matcher, 0, without)(*batch()).keys() == {
        "loss", "cmpm", "matched_similarity", "unmatched_similarity",
    }  # fmt: skip


def test_precision_and_similarity_are_of_the_batch() -> None:
    model = network()
    pixels, ids, mask, numbers = batch()
    told = model(pixels, ids, mask, numbers)
    images, texts = model.matcher.image(pixels), model.matcher.text(ids, mask)
    _, image_logits, _ = losses.cmpc(images, texts, numbers, model.classifier)
    assert told["image_precision"].item() == pytest.approx((image_logits.argmax(1) == numbers).float().mean().item())
    pairs = [(i, j) for i in range(len(numbers)) for j in range(len(numbers))]
    cosine = torch.nn.functional.cosine_similarity
    for name, same in (("matched_similarity", True), ("unmatched_similarity", False)):
        found = [
            cosine(images[i], texts[j], dim=0).item() for i, j in pairs if (numbers[i] == numbers[j]).item() == same
        ]
        assert told[name].item() == pytest.approx(sum(found) / len(found), abs=1e-6)


def of_one_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORKERS)
    model = network()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    parallel(*(each[rank * EACH : (rank + 1) * EACH] for each in batch()))["loss"].backward()
    torch.save(gradients(model), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_workers_together_have_the_gradients_of_one_with_the_whole_batch(tmp_path: Path) -> None:
    multiprocessing.spawn(of_one_worker, (str(tmp_path),), WORKERS)
    whole = network()
    whole(*batch())["loss"].backward()
    for rank in range(WORKERS):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, gradient in gradients(whole).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_alone_nothing_is_gathered() -> None:
    tensor = torch.ones(2)
    assert gathered(tensor) is tensor


def test_a_scale_at_its_bound_comes_back() -> None:
    of = network()
    assert of.log_scale is not None
    of.log_scale.data.fill_(8)
    of.keep_in_bounds()
    assert of.log_scale.exp().item() == pytest.approx(LARGEST_SCALE)
    of(*batch())["infonce"].backward()
    assert of.log_scale.grad is not None and of.log_scale.grad.item() != 0
