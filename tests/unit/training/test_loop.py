"""What a worker does, epoch by epoch, on the CPU and without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipelines.errors import VecmillError
from pipelines.storage import Store
from pipelines.training import loop, losses
from pipelines.training.batches import Pair
from pipelines.training.checkpoint import checkpoints
from pipelines.training.loop import Worker
from pipelines.training.retrieval import recalls
from pipelines.training.schedule import learning_rate
from tests.unit.training.runs import NORMED, config, examples, figures, trained, weights, worker

COSINE = {"schedule": "cosine", "warmup_epochs": 0.5, "frozen_epochs": 1, "finetune_lr": 0.001}


class KilledError(Exception):
    pass


def killed_at(step: int) -> Any:
    """An Observe that dies when so many steps are done, before a checkpoint of that step."""
    done = 0

    def observe(stage: str, **numbers: float) -> None:
        nonlocal done
        done += int(numbers.get("steps", 0))
        if "steps" in numbers and done == step:
            raise KilledError

    return observe


# -- killed and continued ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return trained(config(tmp_path_factory.mktemp("straight"), model=NORMED, optim=COSINE))


def test_metrics_tell_every_epoch_and_which_was_best(straight: Worker) -> None:
    assert [(told["epoch"], told["steps"], told["pairs"]) for told in straight.history] == [
        (epoch, 6, 48) for epoch in (1, 2, 3, 4)
    ]
    recall = [told["text_to_image"]["recall@1"] for told in straight.history]
    assert json.loads(straight.task.store.read("metrics.json")) == {
        "finished": True, "best_epoch": recall.index(max(recall)) + 1, "epochs": straight.history,
    }  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(tmp_path: Path, precision: str) -> None:
    ran = trained(config(tmp_path, model=NORMED, optim={"precision": precision}))
    assert ran.history[-1]["loss"] < ran.history[0]["loss"] - 1
    assert ran.history[-1]["matched_similarity"] > ran.history[-1]["unmatched_similarity"] + 0.05


# In the first epoch before and after its first checkpoint, within later ones, and at an epoch's end.
@pytest.mark.parametrize("step", [2, 6, 9, 12, 23])
def test_a_run_that_was_killed_midway_ends_as_one_that_was_not(straight: Worker, tmp_path: Path, step: int) -> None:
    settings = config(tmp_path, model=NORMED, optim=COSINE, checkpoint={"every_steps": 4})
    with pytest.raises(KilledError):
        trained(settings, killed_at(step))
    # Of six steps an epoch the fourth has a checkpoint, and each epoch's end; the last two are kept.
    done = [at for at in [(each // 6, each % 6) for each in range(1, step)] if at[1] in (0, 4)]
    assert checkpoints(straight.task.store) == [(3, 0), (4, 0)]
    continued = worker(settings)
    assert checkpoints(continued.task.store) == done[-2:] and continued.position == max(done, default=(0, 0))
    for _ in continued.run():
        pass
    assert figures(continued.history) == figures(straight.history)
    for name, value in weights(straight.network).items():
        assert torch.equal(continued.network.state_dict()[name], value), name
    folders = [Path(each.task.store.root, "model", "model.safetensors").read_bytes() for each in (continued, straight)]
    assert folders[0] == folders[1]


@pytest.mark.parametrize("put", ["save_model", "best"])
def test_what_an_epoch_left_unsaid_is_said_from_its_checkpoint(
    straight: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: str
) -> None:
    """It is not done again, which on some devices would end with other weights."""
    settings, real = config(tmp_path, model=NORMED, optim=COSINE), getattr(loop, put)

    def dying(*given: Any, **more: Any) -> Any:
        if (1, 0) in checkpoints(Store(str(tmp_path))):
            raise KilledError
        return real(*given, **more)

    monkeypatch.setattr(loop, put, dying)
    with pytest.raises(KilledError):
        trained(settings)
    assert not (tmp_path / "model" / "model.safetensors").exists() and not (tmp_path / "metrics.json").exists()
    monkeypatch.undo()
    continued = worker(settings)
    assert continued.position == (1, 0)
    kept = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in continued.evaluated.state_dict().items())
    assert json.loads((tmp_path / "metrics.json").read_text())["epochs"] == continued.history
    list(continued.run())
    assert figures(continued.history) == figures(straight.history)


def test_the_model_is_of_the_best_epoch_wherever_that_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recall = iter([0.1, 0.7, 0.7, 0.3])
    monkeypatch.setattr(loop, "validate", lambda *_: {"text_to_image": {"recall@1": next(recall)}})
    ran = worker(config(tmp_path, model=NORMED))
    by_epoch = [weights(ran.evaluated) for _ in ran.run()]
    kept = load_file(tmp_path / "model" / "model.safetensors")
    alike = [all(torch.equal(value, each[name]) for name, value in kept.items()) for each in by_epoch]
    assert alike == [False, True, False, False]
    assert json.loads((tmp_path / "metrics.json").read_text())["best_epoch"] == 2


def test_what_is_not_finite_is_in_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As gradients of a step that half precision overflows in; but a loss that is never finite ends the run."""
    ran = worker(config(tmp_path, optim={"epochs": 1}))
    step, spoilt = ran._step, iter([True, False, False, False, False, True])

    def overflowing(*given: Any) -> dict[str, torch.Tensor]:
        told = step(*given)
        return {**told, "gradient_norm": torch.tensor(torch.inf if next(spoilt) else 2.0)}

    monkeypatch.setattr(ran, "_step", overflowing)
    list(ran.run())
    assert json.loads((tmp_path / "metrics.json").read_text())["epochs"][0]["gradient_norm"] == 2.0
    lost = worker(config(tmp_path / "lost", optim={"epochs": 1}))
    monkeypatch.setattr(lost, "_step", lambda *_: {"loss": torch.tensor(torch.nan)})
    with pytest.raises(VecmillError, match="In epoch 1 no step had a finite loss"):
        list(lost.run())


def test_another_seed_goes_otherwise(straight: Worker, tmp_path: Path) -> None:
    other = trained(config(tmp_path, model=NORMED, optim={**COSINE, "seed": 1}))
    assert other.history[0]["loss"] != straight.history[0]["loss"]


# -- stages, rates, gradients --------------------------------------------------------------------


def test_a_frozen_backbone_stays_as_it_is_and_then_learns(tmp_path: Path) -> None:
    ran = worker(config(tmp_path, model=NORMED, optim={"frozen_epochs": 2}))
    tower, epochs = ran.network.matcher.image_tower, ran.run()
    before, others = weights(tower), weights(ran.network.matcher.text_tower)
    for _ in range(2):
        next(epochs)
        # Statistics of its batch norms too.
        assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    assert not all(
        torch.equal(value, others[name]) for name, value in ran.network.matcher.text_tower.state_dict().items()
    )
    next(epochs)
    changed = {name for name, value in tower.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == before.keys()


def test_every_step_has_the_schedules_rate(tmp_path: Path) -> None:
    settings = config(tmp_path, optim=COSINE)
    ran, used = worker(settings), []
    ran.optimiser.register_step_pre_hook(lambda optimiser, *_: used.append({g["lr"] for g in optimiser.param_groups}))
    list(ran.run())
    expected = [learning_rate(epoch, step, 6, settings.optim) for epoch in range(4) for step in range(6)]
    assert used == [{rate} for rate in expected] and len(set(expected)) > 12


def test_gradients_are_clipped_together_and_their_norm_is_told_as_it_was(tmp_path: Path) -> None:
    steady: dict[str, Any] = {"model": {"dropout": 0}, "data": {"flip": False}}
    free, bound = (
        worker(config(tmp_path / name, optim={"clip_norm": norm}, **steady)) for name, norm in (("a", 0), ("b", 0.01))
    )
    stepped = [next(iter(each.feed.batches(0, 0))) for each in (free, bound)]
    told = [
        float(each._step(each.network, batch)["gradient_norm"])
        for each, batch in zip((free, bound), stepped, strict=True)
    ]
    assert told[0] == told[1] > 0.1
    kept = [[w.grad for w in each.network.parameters() if w.grad is not None] for each in (free, bound)]
    norms = [float(torch.cat([gradient.flatten() for gradient in gradients]).norm()) for gradients in kept]
    assert norms == pytest.approx([told[0], 0.01], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_leaves_the_weights_and_is_counted(tmp_path: Path, precision: str) -> None:
    ran = worker(config(tmp_path, optim={"precision": precision}))
    step, steps = ran._step, list[int]()

    def spoiled(parallel: nn.Module, batch: list[Pair]) -> dict[str, torch.Tensor]:
        steps.append(len(steps))
        if len(steps) != 21:
            return step(parallel, batch)
        before = weights(ran.network)
        hook = ran.network.matcher.text_head.register_forward_hook(lambda _, __, out: out * torch.inf)
        told = step(parallel, batch)
        hook.remove()
        after = weights(ran.network)
        assert all(torch.equal(before[name], after[name]) for name in before)
        return told

    ran._step = spoiled  # type: ignore[method-assign]
    list(ran.run())
    assert [told["steps_left_out"] for told in ran.history] == [0, 0, 0, pytest.approx(1 / 6)]
    kept = load_file(tmp_path / "model" / "model.safetensors")
    assert len(steps) == 24 and all(value.isfinite().all() for value in kept.values())


def test_weights_that_overflow_are_never_kept(tmp_path: Path) -> None:
    ran = worker(config(tmp_path))
    epochs = ran.run()
    next(epochs)
    # Drawn as it goes.
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with torch.no_grad():
        # Of a word that no caption has, so that losses stay finite.
        ran.network.matcher.text_tower.words.weight[1, 0] = torch.inf
    with pytest.raises(VecmillError, match="In epoch 2 some weights overflowed"):
        next(epochs)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_the_backbone_alone_decays(tmp_path: Path) -> None:
    ran = worker(config(tmp_path, optim={"weight_decay": 0.25}))
    backbone, others = ran.optimiser.param_groups
    assert (backbone["weight_decay"], others["weight_decay"]) == (0.25, 0)
    assert {id(weight) for weight in backbone["params"]} == {
        id(w) for w in ran.network.matcher.image_tower.parameters()
    }
    assert len(backbone["params"]) + len(others["params"]) == len(list(ran.network.parameters()))


# -- precision -----------------------------------------------------------------------------------


def test_in_bf16_the_towers_compute_in_it_and_losses_and_weights_stay_in_fp32(tmp_path: Path) -> None:
    ran = worker(config(tmp_path, optim={"precision": "bf16", "epochs": 1}, loss={"cmpm": 0.1}))
    seen: dict[str, torch.Tensor] = {}
    told: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]] = []
    for name, module in ran.network.matcher.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.LSTM):
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    ran.network.register_forward_hook(
        lambda _, given, out: told.append((dict(seen), out, given[3])) if torch.is_grad_enabled() else None
    )
    list(ran.run())
    outputs, found, identities = told[-1]
    single = {name: out for name, out in outputs.items() if torch.is_tensor(out)}
    assert {"image_head", "text_head", "image_tower.patch_embed.proj"} <= single.keys()
    assert {out.dtype for out in single.values()} == {torch.bfloat16}
    assert {value.dtype for value in found.values()} == {torch.float32}
    expected = losses.cmpm(outputs["image_head"].double(), outputs["text_head"].double(), identities)
    assert found["cmpm"].item() == pytest.approx(expected.item(), rel=1e-5)
    held = [*ran.network.parameters(), *(w.grad for w in ran.network.parameters() if w.grad is not None)]
    held += [value for state in ran.optimiser.state.values() for value in state.values()]
    assert {value.dtype for value in held} == {torch.float32}
    assert {value.dtype for value in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.float32}


def test_in_fp32_nothing_is_in_less(straight: Worker) -> None:
    seen = []
    hook = straight.network.matcher.image_head.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    straight._step(straight.network, next(iter(straight.feed.batches(0, 0))))
    hook.remove()
    assert seen == [torch.float32]


# -- averaged weights ----------------------------------------------------------------------------


def test_averaged_weights_are_evaluated_and_kept(tmp_path: Path) -> None:
    ran = trained(config(tmp_path, model=NORMED, optim={"ema": 0.95}, stop={"k": 10}))
    assert ran.averaged is not None
    averaged, raw = ran.averaged.module.matcher, ran.network.matcher
    assert ran.evaluated is averaged
    found = {}
    for name, matcher in (("averaged", averaged), ("raw", raw)):
        matcher.eval()
        found[name] = recalled(ran, matcher)
    assert found["averaged"] == {key: ran.history[-1][key] for key in found["averaged"]} != found["raw"]
    assert averaged.training is False
    kept = load_file(tmp_path / "model" / "model.safetensors")
    at_best = json.loads((tmp_path / "metrics.json").read_text())["best_epoch"]
    if at_best == 4:
        assert all(torch.equal(kept[name], value) for name, value in averaged.state_dict().items())


def recalled(ran: Worker, matcher: torch.nn.Module) -> dict[str, dict[str, float]]:
    table = examples(16, seed=1)
    captions = [text for row in table["captions"].to_pylist() for text in row]
    identities = [hash(identity) for identity in table["identity"].to_pylist()]
    pixels = torch.frombuffer(bytearray(b"".join(table["pixels"].to_pylist())), dtype=torch.uint8).view(16, 32, 32, 3)
    with torch.no_grad():
        images = losses.unit(matcher.image(pixels.permute(0, 3, 1, 2) / 127.5 - 1)).numpy()
        texts = losses.unit(matcher.text(*ran.feed.tokens(captions))).numpy()
    return recalls(images, np.array(identities), texts, np.repeat(identities, 2))


def test_without_an_average_the_weights_themselves_are_kept(tmp_path: Path) -> None:
    ran = trained(config(tmp_path, optim={"ema": 0, "epochs": 1}))
    assert ran.averaged is None and ran.evaluated is ran.network.matcher
    kept = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in ran.network.matcher.state_dict().items())


# -- stopping ------------------------------------------------------------------------------------


def test_it_stops_when_evaluations_bring_nothing_better_and_keeps_the_best(tmp_path: Path) -> None:
    settings = config(tmp_path, optim={"lr": 1e-12, "epochs": 9}, stop={"patience": 2})
    ran = trained(settings)
    assert [told["epoch"] for told in ran.history] == [1, 2, 3]
    told = json.loads((tmp_path / "metrics.json").read_text())
    assert told["finished"] and told["best_epoch"] == 1
    assert list(worker(settings).run()) == []


def test_it_evaluates_every_few_epochs_and_after_the_last(tmp_path: Path) -> None:
    ran = trained(config(tmp_path, stop={"every": 3}))
    assert [told["epoch"] for told in ran.history if "text_to_image" in told] == [3, 4]
