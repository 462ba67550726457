"""Training in half precision on a GPU: the towers compute in it, losses and weights stay in fp32, and it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.training.loop import Worker
from pipelines.training.place import Place
from tests.unit.training.runs import NORMED, config, examples, tables_of, task

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(folder: Path, precision: str) -> Worker:
    place = Place(0, 1, torch.device("cuda"), tables_of(examples(), examples(16, seed=1)))
    return Worker(task(config(folder, model=NORMED, optim={"precision": precision, "ema": 0.9})), place)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_it_learns_in_half_precision(tmp_path: Path, precision: str) -> None:
    ran, outputs, losses = on_gpu(tmp_path, precision), set(), set()
    ran.network.matcher.image_head.register_forward_hook(lambda _, __, out: outputs.add((out.requires_grad, out.dtype)))
    ran.network.register_forward_hook(lambda _, __, told: losses.update(value.dtype for value in told.values()))
    list(ran.run())
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert (True, half) in outputs and losses == {torch.float32}
    assert {weight.dtype for weight in ran.network.parameters()} == {torch.float32}
    assert ran.scaler.is_enabled() == (precision == "fp16")
    assert ran.history[-1]["loss"] < ran.history[0]["loss"] - 1


def test_gradients_that_overflow_move_no_weight_and_lower_the_scale(tmp_path: Path) -> None:
    ran = on_gpu(tmp_path, "fp16")
    ran.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    before = [weight.detach().clone() for weight in ran.network.parameters()]
    ran._step(ran.network, next(iter(ran.feed.batches(0, 0))))
    assert all(torch.equal(weight, old) for weight, old in zip(ran.network.parameters(), before, strict=True))
    assert ran.scaler.get_scale() < 2.0**40


def test_a_checkpoint_has_what_a_gpu_draws(tmp_path: Path) -> None:
    place = on_gpu(tmp_path, "fp32").place
    state = place.draws()
    drawn = torch.rand(8, device="cuda")
    place.set_draws(state.cuda())
    assert torch.equal(torch.rand(8, device="cuda"), drawn)
