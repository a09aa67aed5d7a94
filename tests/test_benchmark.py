"""The benchmark's trainings are made of cells of the notebooks: each can be made, and trains."""

import benchmark
import pytest


@pytest.mark.parametrize("variant", ["host", "tf-data", "keras"])
def test_a_variant_trains(variant, monkeypatch):
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("on TensorFlow only: two of the variants are pipelines of it")

    def one_step(train, batch, seconds, most):
        train(1)
        return batch

    # As small as the schedule of a thousand images allows.
    monkeypatch.setattr(benchmark, "MODERN_BATCH", 125)
    monkeypatch.setattr(benchmark, "rate_of", one_step)
    policy = keras.config.dtype_policy()
    try:
        assert benchmark.measure(variant, seconds=0) == 125
    finally:
        keras.config.set_dtype_policy(policy)
