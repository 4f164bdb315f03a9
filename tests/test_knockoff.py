"""The knockoff attack's draw: without replacement, by the key alone, within the budget."""

import jax
import numpy as np
import pytest

from madjax import InputError
from madjax.attacks.knockoff import draw, keys


def test_images_are_drawn_once_each_and_by_the_key_alone():
    drawn = np.asarray(draw(jax.random.key(0), 100, 60))
    assert len(set(drawn)) == 60
    assert set(drawn) <= set(range(100))
    np.testing.assert_array_equal(drawn, draw(jax.random.key(0), 100, 60))
    assert np.any(drawn != draw(jax.random.key(1), 100, 60))


def test_a_larger_budget_extends_a_smaller_one():
    key = jax.random.key(3)
    np.testing.assert_array_equal(draw(key, 50, 50)[:20], draw(key, 50, 20))
    assert sorted(draw(key, 50, 50).tolist()) == list(range(50))


@pytest.mark.parametrize("budget", [0, -1, 51])
def test_a_budget_that_cannot_be_served_is_named(budget):
    with pytest.raises(InputError, match=f"budget is {budget}: the query set holds 50"):
        draw(jax.random.key(0), 50, budget)


def test_keys_differ_by_use_and_seed():
    data = {
        (seed, use): tuple(jax.random.key_data(key).tolist())
        for seed in (0, 1)
        for use, key in keys(seed).items()
    }
    assert len(set(data.values())) == len(data) == 8
