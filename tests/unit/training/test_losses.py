"""Losses against their formulas in float64, gradients against finite differences, and the mistakes of ports."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pipelines.training import losses
from tests.unit.training import losses_reference as written_out

N, DIM, CLASSES, SCALE = 24, 16, 7, 14.0
RNG = np.random.default_rng(5)
IMAGES, TEXTS = 1.7 * RNG.standard_normal((N, DIM)), 0.9 * RNG.standard_normal((N, DIM))
CLASSIFIER = RNG.standard_normal((DIM, CLASSES))
# Some identities once, some many times; else the mistakes of ports do not show.
IDENTITIES = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5, 6, 6, 1, 2, 0, 0, 3, 3, 3, 3, 3])

LOSSES: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., float]]] = {
    "cmpm": (losses.cmpm, written_out.cmpm),
    "cmpc": (
        lambda x, z, y: losses.cmpc(x, z, y, torch.from_numpy(CLASSIFIER))[0],
        lambda x, z, y: written_out.cmpc(x, z, y, CLASSIFIER),
    ),
    "constraint": (
        lambda x, z, y: losses.constraint(x, y) + 2 * losses.constraint(z, y),
        lambda x, z, y: written_out.constraint(x, y) + 2 * written_out.constraint(z, y),
    ),
    "infonce": (
        lambda x, z, y: losses.infonce(x, z, y, torch.tensor(SCALE)),
        lambda x, z, y: written_out.infonce(x, z, y, SCALE),
    ),
}


def tensors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(IMAGES, dtype=dtype), torch.tensor(TEXTS, dtype=dtype), torch.from_numpy(IDENTITIES)


@pytest.mark.parametrize("name", LOSSES)
def test_values_are_those_of_the_formulas(name: str) -> None:
    ours, formula = LOSSES[name]
    expected = formula(IMAGES, TEXTS, IDENTITIES)
    assert float(ours(*tensors())) == pytest.approx(expected, rel=1e-12)
    assert float(ours(*tensors(torch.float32))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    ours, formula = LOSSES[name]
    images, texts, identities = tensors()
    images.requires_grad_(), texts.requires_grad_()
    ours(images, texts, identities).backward()
    for tensor, values in ((images, IMAGES), (texts, TEXTS)):
        for at in ((0, 0), (7, 3), (12, 9), (23, 15)):
            step = np.zeros_like(values)
            step[at] = 1e-5
            moved = [(values + s * step, TEXTS) if tensor is images else (IMAGES, values + s * step) for s in (1, -1)]
            slope = (formula(*moved[0], IDENTITIES) - formula(*moved[1], IDENTITIES)) / 2e-5
            assert float(tensor.grad[at]) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_the_classifier_and_the_scale_learn_too() -> None:
    classifier, scale = torch.tensor(CLASSIFIER, requires_grad=True), torch.tensor(SCALE, requires_grad=True)
    (losses.cmpc(*tensors(), classifier)[0] + losses.infonce(*tensors(), scale)).backward()
    step = np.zeros_like(CLASSIFIER)
    step[2, 3] = 1e-5
    up, down = (written_out.cmpc(IMAGES, TEXTS, IDENTITIES, CLASSIFIER + s * step) for s in (1, -1))
    assert float(classifier.grad[2, 3]) == pytest.approx((up - down) / 2e-5, rel=1e-5)
    up, down = (written_out.infonce(IMAGES, TEXTS, IDENTITIES, SCALE + s * 1e-3) for s in (1, -1))
    assert float(scale.grad) == pytest.approx((up - down) / 2e-3, rel=1e-4)


def test_the_mistakes_of_ports_would_show() -> None:
    ours = float(losses.cmpm(*tensors()))
    assert abs(written_out.cmpm_reversed(IMAGES, TEXTS, IDENTITIES) - ours) > 1
    assert abs(written_out.cmpm_on_the_wrong_axis(IMAGES, TEXTS, IDENTITIES) - ours) > 0.01
    # And the reference for them is the port's: it is right where all identities differ.
    every = np.arange(N)
    right = float(losses.cmpm(*tensors()[:2], torch.from_numpy(every)))
    assert written_out.cmpm_on_the_wrong_axis(IMAGES, TEXTS, every) == pytest.approx(right, rel=1e-9)


def test_of_identities_that_all_differ_infonce_is_the_usual_one() -> None:
    images, texts, _ = tensors()
    logits = SCALE * torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T
    diagonal = torch.arange(N)
    usual = torch.nn.functional.cross_entropy(logits, diagonal) + torch.nn.functional.cross_entropy(logits.T, diagonal)
    assert float(losses.infonce(images, texts, diagonal, torch.tensor(SCALE))) == pytest.approx(float(usual) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_they_are_computed_in_full(dtype: torch.dtype) -> None:
    """In half precision EPSILON is 0, and its logarithm infinite."""
    images, texts, identities = (each.to(dtype) if each.is_floating_point() else each for each in tensors())
    as_given = [each.to(torch.float64).numpy() for each in (images, texts)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, formula in LOSSES.values():
            value = ours(images, texts, identities)
            assert value.dtype in (torch.float32, torch.float64)
            assert float(value) == pytest.approx(formula(*as_given, IDENTITIES), rel=1e-5)


def test_equal_embeddings_of_an_identity_have_a_gradient() -> None:
    """One image comes with each of its captions: a distance of 0 has no slope, and must not give nan."""
    same = torch.ones(4, DIM, dtype=torch.float64, requires_grad=True)
    loss = losses.constraint(same, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(same.grad).all()
    assert losses.constraint(same, torch.arange(4)).item() == 0
