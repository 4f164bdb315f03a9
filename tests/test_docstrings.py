"""The docstrings of the public verbs: their examples run, and every edge case is as they say."""

import doctest
import inspect
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import madjax
from madjax import (
    InputError,
    Knockoff,
    Recipe,
    defend,
    fit,
    gram,
    perturb,
    query_statistics,
    solve,
    steal,
    white_box,
)
from madjax.datasets import MNIST_FAMILY
from madjax.mad import extreme
from madjax.objectives import defined

VERBS = {
    verb.__name__: verb
    for verb in (gram, query_statistics, solve, perturb, defend, fit, steal, white_box)
}


def edge_cases(verb):
    """The left sides of the table of edge cases."""
    (section,) = re.findall(r"Edge cases:\n(.*?)\n\n", inspect.getdoc(verb), re.DOTALL)
    return re.findall(r"^    (\S[^:]*): .", section, re.MULTILINE)


@pytest.mark.parametrize("name", VERBS)
def test_the_example_runs_as_printed(name):
    (example,) = doctest.DocTestFinder(recurse=False).find(VERBS[name], name, globs={})
    assert len(example.examples) >= 4
    printed = []
    doctest.DocTestRunner().run(example, out=printed.append)
    assert not printed, "".join(printed)


@pytest.mark.parametrize("name", VERBS)
def test_every_argument_is_described(name):
    described = re.findall(r"^    (\w+): ", inspect.getdoc(VERBS[name]), re.MULTILINE)
    assert [each for each in inspect.signature(VERBS[name]).parameters if each in described] == [
        *inspect.signature(VERBS[name]).parameters
    ]


# --- what they are tried on -----------------------------------------------------------------------

X, W = jax.random.normal(jax.random.key(0), (2, 4, 4))
Y = jax.nn.softmax(3 * jax.random.normal(jax.random.key(1), (4, 4)))
G = jax.random.normal(jax.random.key(2), (4, 9))
M = G @ G.T


def linear(w, x):
    return x @ w


jacrev = partial(gram, method="jacrev")
poisoned = partial(perturb, linear, W, gram_method="jacrev")
behind = partial(defend, partial(linear, 2 * W), (linear, W), gram_method="jacrev")
VICTIM = jax.nn.softmax(X @ (2 * W))

NETWORK = madjax.Classifier(madjax.MLP(3, (4,)), lambda x: x / 255, (2, 2, 1))
IMAGES = jax.random.randint(jax.random.key(3), (10, 2, 2, 1), 0, 256).astype(jnp.uint8)
LABELS = jnp.arange(10) % 3
TEST = IMAGES, LABELS
KEY = jax.random.key(4)
trained = partial(fit, NETWORK, Recipe(epochs=3, batch_size=4), KEY)


def victim(numbers, x):
    return jax.nn.softmax(NETWORK.apply(NETWORK.init(KEY), x))


def stolen(attack, seed=0, respond=victim):
    return steal(attack, seed, respond, IMAGES, LABELS, NETWORK, MNIST_FAMILY, TEST)


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


# --- gram -----------------------------------------------------------------------------------------


def no_query_has_a_gram():
    assert jacrev(linear, W, X[:0]).shape == (0, 4, 4)
    dense = madjax.Classifier(madjax.MLP(3, (4,)), lambda x: x, (4,))
    for layers in ("all", "last", "identity"):
        assert gram(dense.module.apply, NETWORK.init(KEY), X[:0], layers=layers).shape == (0, 3, 3)


def one_class():
    np.testing.assert_array_equal(jacrev(linear, W[:, :1], X), np.zeros((4, 1, 1)))


def certain():
    m = np.asarray(jacrev(linear, 1000 * W, X))
    assert np.isfinite(m).all()
    np.testing.assert_array_equal(m[range(4), (X @ W).argmax(1)], np.zeros((4, 4)))
    assert (m.max(axis=(1, 2)) > 0.1).all()


def unread():
    m = jacrev(lambda params, x: x @ params["read"], {"read": W, "unread": W}, X)
    np.testing.assert_allclose(m, jacrev(linear, W, X), rtol=1e-6)


def exchanged():
    turn = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(jacrev(linear, W, X[turn]), jacrev(linear, W, X)[turn], rtol=1e-6)


# --- solve ----------------------------------------------------------------------------------------


def no_budget():
    same(solve(Y[0], M, epsilon=0.0), Y[0])


def any_budget():
    for epsilon in (2.0, 50.0, np.inf):
        same(solve(Y[0], M, epsilon=epsilon), extreme(Y[0], M))


def own_posterior():
    g = G - (Y[0] @ G)[None]
    assert not defined(Y[0], g @ g.T)
    same(solve(Y[0], g @ g.T, epsilon=1.0), Y[0])


def no_gradient():
    same(solve(Y[0], 0 * M, epsilon=1.0), Y[0])


def unknown_gram():
    for unknown in (jnp.inf, jnp.nan):
        same(jax.jit(partial(solve, epsilon=0.6))(Y[0], M.at[0, 1].set(unknown)), Y[0])


def scaled():
    same(solve(Y[0], 16 * M, epsilon=0.7), solve(Y[0], M, epsilon=0.7))


def equal_vertices():
    m = jnp.array([[1.0, -1, -1], [-1, 1, 1], [-1, 1, 1]])
    same(solve(jnp.eye(3)[0], m, epsilon=2.0), jnp.eye(3)[1])


def contradiction():
    never = (lambda v, y: jnp.float32(1),)
    solver = madjax.LineSearch(constraints=never)
    same(solve(Y[0], M, epsilon=1.0, solver=solver), Y[0])
    assert not solver.report(Y[0], M, 1.0)[1].feasible


def other_types():
    half = Y[0].astype(jnp.bfloat16)
    same(solve(half, M, epsilon=0.7), solve(half.astype(jnp.float32), M, epsilon=0.7))
    same(solve(jnp.array([0, 1, 0, 0]), M, epsilon=0.7), solve(jnp.eye(4)[1], M, epsilon=0.7))


def no_posterior():
    for y in (jnp.log(Y[0]), 9 * Y[0] - 2, 100 * Y[0]):
        with pytest.raises(InputError, match="no posterior"):
            solve(y, M, epsilon=0.7)


# --- perturb --------------------------------------------------------------------------------------


def alone():
    batch = poisoned(X, Y, epsilon=0.6)
    for i in range(4):
        np.testing.assert_allclose(
            poisoned(X[i : i + 1], Y[i : i + 1], epsilon=0.6)[0], batch[i], atol=1e-6
        )


def out_of_range():
    large = X.at[1].multiply(1e20)
    got = jax.jit(partial(poisoned, epsilon=0.6))(large, Y)
    plain = poisoned(large, Y, epsilon=0.6, layers="identity")
    np.testing.assert_allclose(got[1], plain[1], atol=1e-6)
    others = np.array([0, 2, 3])
    np.testing.assert_allclose(got[others], poisoned(X[others], Y[others], epsilon=0.6), atol=1e-6)
    with pytest.raises(InputError, match="the Gram matrix is not finite"):
        poisoned(large, Y, epsilon=0.6)


def no_query_is_poisoned():
    assert poisoned(X[:0], Y[:0], epsilon=0.6).shape == (0, 4)


def no_budgets():
    assert poisoned(X, Y, epsilon=np.zeros(0)).shape == (0, 4, 4)


# --- defend ---------------------------------------------------------------------------------------


def half_precision():
    logits = (X @ (2 * W)).astype(jnp.bfloat16)
    predict = defend(lambda x: logits, (linear, W), epsilon=0.0, gram_method="jacrev")
    same(predict(X), jax.nn.softmax(logits.astype(jnp.float32)))


def unknown_logits():
    def failing(x):
        return (x @ (2 * W)).at[1].set(jnp.nan)

    predict = defend(failing, (linear, W), epsilon=0.5, gram_method="jacrev")
    got = jax.jit(predict)(X)
    assert jnp.isnan(got).all(axis=1).tolist() == [False, True, False, False]
    with pytest.raises(InputError, match="NaN or infinity in 1 of 4"):
        predict(X)


def budgets():
    many = behind(epsilon=np.array([0.3, 0.6]))(X)
    assert many.shape == (2, 4, 4)
    np.testing.assert_allclose(many[1], behind(epsilon=0.6)(X), atol=1e-6)


# --- fit ------------------------------------------------------------------------------------------


def labels():
    same(trained((IMAGES, LABELS), TEST), trained((IMAGES, jax.nn.one_hot(LABELS, 3)), TEST))


def few_images():
    few = (IMAGES[:3], LABELS[:3])
    plain = {"epochs": 2, "momentum": 0.0}
    small = fit(NETWORK, Recipe(batch_size=64, **plain), KEY, few, TEST)
    params = NETWORK.init(jax.random.split(KEY)[0])

    @jax.grad
    def slope(params):
        log_p = jax.nn.log_softmax(NETWORK.apply(params, few[0]))
        return -log_p[jnp.arange(3), few[1]].mean()

    for _ in range(2):
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, slope(params))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), small.params, params)


def finished():
    done = trained((IMAGES, LABELS), TEST)
    calls = []
    same(trained((IMAGES, LABELS), TEST, state=done, after_epoch=calls.append), done)
    assert not calls


def stopped():
    states = []
    done = trained((IMAGES, LABELS), TEST, after_epoch=states.append)
    assert len(states) == 3
    same(trained((IMAGES, LABELS), TEST, state=states[0]), done)


def diverged():
    state = fit(NETWORK, Recipe(epochs=3, learning_rate=1e38), KEY, (IMAGES, LABELS), TEST)
    assert np.isnan(state.accuracy[-1])


# --- steal ----------------------------------------------------------------------------------------

SHORT = Recipe(epochs=2, batch_size=4)


def one_query():
    transfer, _ = stolen(Knockoff(budget=1, recipe=SHORT))
    assert transfer.targets.shape == (1, 3)
    assert transfer.asked == 1


def same_seed():
    same(stolen(Knockoff(budget=5, recipe=SHORT)), stolen(Knockoff(budget=5, recipe=SHORT)))


def unanswered():
    with pytest.raises(InputError, match="answers NaN to the attack knockoff"):
        stolen(
            Knockoff(budget=5, recipe=SHORT), respond=lambda numbers, x: victim(numbers, x) * np.nan
        )


def too_many():
    with pytest.raises(InputError, match="budget is 11"):
        stolen(Knockoff(budget=11, recipe=SHORT))


def other_answers():
    for respond, says in (
        (lambda numbers, x: jnp.zeros(len(x), int), r"answers of shape \(2,\)"),
        (lambda numbers, x: jnp.full((len(x), 4), 0.25), r"answers of shape \(2, 4\)"),
        (lambda numbers, x: (victim(numbers, x), 1), "a tuple"),
    ):
        with pytest.raises(InputError, match=f"the victim gives {says} to 2 queries, .* 3 classes"):
            stolen(Knockoff(budget=5), respond=respond)


def small_pixels():
    for images in (IMAGES / 255, IMAGES.astype(jnp.float32), IMAGES.astype(jnp.int32)):
        with pytest.raises(InputError, match=f"own images are {images.dtype}: give pixels from 0"):
            steal(Knockoff(budget=5), 0, victim, images, LABELS, NETWORK, MNIST_FAMILY, TEST)
        test = images, LABELS
        with pytest.raises(InputError, match=f"test images are {images.dtype}"):
            steal(Knockoff(budget=5), 0, victim, IMAGES, LABELS, NETWORK, MNIST_FAMILY, test)


# --- white_box ------------------------------------------------------------------------------------

PARAMS, DENSE = NETWORK.init(KEY), NETWORK.module.apply
ANSWERS = Y[:, :3] / Y[:, :3].sum(axis=1, keepdims=True)
online = partial(white_box, DENSE, PARAMS)


def clean_path():
    _, trace = online(X, ANSWERS, epsilon=0.0)
    same(trace.y_tilde, ANSWERS)
    same(trace.angle, np.zeros(4, np.float32))


def no_query_is_sent():
    params, trace = online(X[:0], ANSWERS[:0], epsilon=0.5)
    same(params, PARAMS)
    assert (trace.angle.shape, trace.y_tilde.shape) == ((0,), (0, 3))


def agrees_already():
    p = jax.nn.softmax(DENSE(PARAMS, X[:1]))
    _, trace = online(X[:1], p, epsilon=0.5)
    same(trace.y_tilde, p)
    assert trace.angle == 0


def diverges():
    _, trace = online(X, ANSWERS, epsilon=0.5, learning_rate=1e38)
    assert np.isfinite(trace.angle[0])
    assert np.isnan(trace.angle[2:]).all()


def never_called():
    _, trace = online(X, ANSWERS, epsilon=0.5, callback=lambda done, w: done, every=5)
    assert trace.called.shape == (0,)


def no_batch_norm():
    same(query_statistics(linear)(W, X), linear(W, X))


class Normed(nn.Module):
    """One BatchNorm over two positions."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(x.reshape(-1, 2, 2)).sum(1)


def alone_in_a_batch():
    apply, params = query_statistics(Normed().apply), Normed().init(jax.random.key(0), X)
    for i in range(4):
        np.testing.assert_allclose(apply(params, X)[i], apply(params, X[i : i + 1])[0], rtol=1e-6)


TRIED = {
    "gram": {
        "no query": no_query_has_a_gram,
        "one class": one_class,
        "a surrogate that is certain of a class": certain,
        "a parameter that no logit depends on": unread,
        "a query with its neighbours exchanged": exchanged,
    },
    "query_statistics": {
        "no flax.linen.BatchNorm": no_batch_norm,
        "a query alone": alone_in_a_batch,
    },
    "solve": {
        "epsilon = 0": no_budget,
        "a budget beyond the farthest answer": any_budget,
        "y is the surrogate's own posterior": own_posterior,
        "gram = 0": no_gradient,
        "a traced gram that is not finite": unknown_gram,
        "gram times a positive number": scaled,
        "two vertices with equal H": equal_vertices,
        "no answer found at which all constraints hold": contradiction,
        "y in half precision, or one-hot integers": other_types,
        "logits, log-probabilities or percent for y": no_posterior,
    },
    "perturb": {
        "epsilon = 0": lambda: same(poisoned(X, Y, epsilon=0.0), Y),
        "no query": no_query_is_poisoned,
        "a grid of no budgets": no_budgets,
        "a query alone": alone,
        "under jit, a query whose gradients leave float32": out_of_range,
    },
    "defend": {
        "epsilon = 0": lambda: same(behind(epsilon=0.0)(X), VICTIM),
        "a victim in half precision": half_precision,
        "a grid of budgets": budgets,
        "no query": lambda: same(behind(epsilon=0.5)(X[:0]), jnp.zeros((0, 4))),
        "a query that the victim gives logits of NaN": unknown_logits,
    },
    "fit": {
        "labels": labels,
        "fewer images than a batch": few_images,
        "a state that has done all epochs": finished,
        "a stop between two epochs": stopped,
        "a loss or a parameter that is not finite": diverged,
    },
    "steal": {
        "a budget of one": one_query,
        "the same seed": same_seed,
        "a victim that answers NaN": unanswered,
        "a victim that answers labels, or posteriors of other classes": other_answers,
        "more queries than images": too_many,
        "images in [0, 1], or of another type than uint8": small_pixels,
    },
    "white_box": {
        "epsilon = 0": clean_path,
        "no query": no_query_is_sent,
        "y is the attacker's own posterior": agrees_already,
        "training that diverges": diverges,
        "fewer steps than every": never_called,
    },
}
CASES = [(name, case) for name, verb in VERBS.items() for case in edge_cases(verb)]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_an_edge_case_is_as_the_docstring_says(name, case):
    TRIED[name][case]()


def test_every_edge_case_that_is_tried_is_in_a_docstring():
    assert [(name, case) for name, cases in TRIED.items() for case in cases] == CASES
