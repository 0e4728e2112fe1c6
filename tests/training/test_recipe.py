"""Tests of the learning rate schedule."""
import pytest

from faces.training.recipe import Recipe


def test_learning_rate_of_the_step_and_cosine_schedules():
    recipe = Recipe(batch_size=512, steps_per_epoch=966, steps=28_000, base_lr=0.1, warmup=0, schedule="step")
    rates = [recipe.learning_rate(step) for step in (0, 15_999, 16_000, 23_999, 24_000, 27_999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    cosine = Recipe(batch_size=128, steps_per_epoch=10, steps=110, base_lr=0.2, warmup=10, schedule="cosine")
    assert cosine.learning_rate(0) == pytest.approx(0.02) and cosine.learning_rate(10) == pytest.approx(0.2)
    assert cosine.learning_rate(60) == pytest.approx(0.1) and cosine.learning_rate(109) < 1e-4
