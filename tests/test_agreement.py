"""Whatever divides or runs the training, one device or several, it does the same steps on the same batches."""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import agreement
import pytest
from conftest import require_backend

SMALL = {"images": 200, "epochs": 2, "batch": 50}
STEPS = SMALL["epochs"] * SMALL["images"] // SMALL["batch"]


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_two_devices_train_like_one(backend, small_cifar):
    require_backend(backend)
    child = partial(agreement.child, sys.executable, backend, seed=0, data=small_cifar, small=SMALL)
    with ThreadPoolExecutor() as both:
        one, two = both.map(child, (1, 2))
    assert (one["devices"], two["devices"]) == (1, 2)
    for stage in agreement.STAGES:
        assert one[stage]["steps"] == two[stage]["steps"] == STEPS
        assert two[stage]["loss"] == pytest.approx(one[stage]["loss"], rel=0.25)
    assert two["plain"]["loss"] == pytest.approx(one["plain"]["loss"], rel=0.02)


def run(loss, val_loss=1.0, steps=STEPS):
    """What one training of both stages may have returned."""
    return {
        stage: {"steps": steps, "loss": [2.0, loss], "val_loss": [2.0, val_loss]}
        for stage in agreement.STAGES
    }


def test_noise_is_no_disagreement():
    reference = [run(1.00), run(1.06), run(0.94)]
    assert agreement.disagreements(reference, [run(1.05), run(0.99), run(1.08)]) == []


def test_a_shifted_loss_is_a_disagreement():
    reference = [run(1.00), run(1.06), run(0.94)]
    found = agreement.disagreements(reference, [run(1.35), run(1.29), run(1.38)])
    assert [text.partition(" ")[0] for text in found] == ["plain:", "both:"]
    assert all(": loss 1.340 instead of 1.000" in text for text in found)


def test_other_steps_are_a_disagreement():
    found = agreement.disagreements([run(1.0), run(1.0)], [run(1.0, steps=2 * STEPS)] * 2)
    assert found == [f"plain: {STEPS} and {2 * STEPS} steps", f"both: {STEPS} and {2 * STEPS} steps"]
