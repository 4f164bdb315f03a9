"""Objective, oracle, step: closed forms, brute force, the authors' solver, properties."""

import itertools
from functools import partial
from pathlib import Path

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import madjax
from madjax import InputError, LineSearch, ablations, angle, deviation, extreme, solve, subsets
from madjax.objectives import defined
from madjax.steps import step

REFERENCE = np.load(Path(__file__).parent / "data" / "mad_reference.npz")
CASES = range(int(REFERENCE["cases"]))
ORACLES = (madjax.extreme, madjax.argmax_preserving)
DISTANCES = (madjax.l1, madjax.l2, madjax.linf, madjax.kl)


jit_solve = jax.jit(solve, static_argnames="solver")
jit_defined = jax.jit(defined)
jit_deviation = jax.jit(deviation)
jit_argmax_preserving = jax.jit(madjax.argmax_preserving)
jit_argmax_bound = jax.jit(madjax.argmax_bound)


def problem(seed, k=5, d=40):
    """A random posterior and a Jacobian with the score structure p'G = 0."""
    keys = jax.random.split(jax.random.key(seed), 3)
    y = jax.nn.softmax(2 * jax.random.normal(keys[0], (k,)))
    p = jax.nn.softmax(jax.random.normal(keys[1], (k,)))
    g = jax.random.normal(keys[2], (k, d))
    return y, g - (p @ g)[None]


def explicit_h(y_tilde, y, g):
    """Eq. 4 as printed, in float64 with G itself."""
    a, u = (np.asarray(g, np.float64).T @ np.asarray(v, np.float64) for v in (y_tilde, y))
    return np.square(a / np.linalg.norm(a) - u / np.linalg.norm(u)).sum()


def explicit_angle(y_tilde, y, g):
    a, u = (np.asarray(g, np.float64).T @ np.asarray(v, np.float64) for v in (y_tilde, y))
    return np.degrees(np.arccos(a @ u / np.linalg.norm(a) / np.linalg.norm(u)))


@pytest.mark.smoke
@pytest.mark.parametrize("seed", range(5))
def test_deviation_and_angle_are_those_of_the_gradients(seed):
    y, g = problem(seed)
    y_tilde = jax.nn.softmax(jax.random.normal(jax.random.key(seed + 99), y.shape))
    np.testing.assert_allclose(deviation(y_tilde, y, g @ g.T), explicit_h(y_tilde, y, g), rtol=1e-4)
    np.testing.assert_allclose(angle(y_tilde, y, g @ g.T), explicit_angle(y_tilde, y, g), atol=1e-3)


def test_small_angles_keep_their_digits():
    y, g = problem(0)
    near = y + 1e-4 * (jnp.eye(5)[2] - y)
    want = explicit_angle(near, y, g)
    assert want < 0.1
    np.testing.assert_allclose(angle(near, y, g @ g.T), want, rtol=1e-2)


@pytest.mark.smoke
def test_right_and_opposite_angles():
    # With G = [u; -u; v], u orthogonal to v, the angles between vertices are known.
    m = jnp.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 4.0]])
    one, two, three = jnp.eye(3)
    np.testing.assert_allclose([angle(two, one, m), angle(three, one, m)], [180, 90], atol=1e-3)
    np.testing.assert_allclose([deviation(two, one, m), deviation(three, one, m)], [4, 2])
    assert angle(one, one, m) == 0
    assert deviation(one, one, m) == 0


@pytest.mark.smoke
@pytest.mark.parametrize("k", [2, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_extreme_is_the_best_vertex(seed, k):
    y, g = problem(seed, k=k)
    g = g * jnp.geomspace(10, 0.1, k)[:, None]  # the length of a gradient does not change H
    values = [explicit_h(vertex, y, g) for vertex in np.eye(k)]
    np.testing.assert_array_equal(extreme(y, g @ g.T), np.eye(k)[np.argmax(values)])


def test_an_edge_can_beat_every_vertex():
    # The best angle passes 90 degrees here, where the vertices stop being the maximisers.
    g = jnp.array([[1.0, 0.0], [-0.2, 1.0], [-0.2, -1.0]])
    y, m = jnp.array([1.0, 0.0, 0.0]), g @ g.T
    middle = jnp.array([0.0, 0.5, 0.5])
    assert deviation(middle, y, m) > 1.5 * deviation(extreme(y, m), y, m)


@pytest.mark.parametrize("distance", ["l1", "l2", "kl"])
@pytest.mark.parametrize("case", CASES)
def test_extreme_is_the_authors_solver(case, distance):
    name = f"{case}/extreme/{distance}"
    if f"{name}/y_tilde" not in REFERENCE:
        pytest.skip("the authors' KL line search found no start")
    g, y = REFERENCE[f"{case}/G"], REFERENCE[f"{case}/y"]
    m = (g.astype(np.float64) @ g.T.astype(np.float64)).astype(np.float32)
    epsilon = float(REFERENCE[f"{case}/epsilon"])
    got = solve(y, m, epsilon=epsilon, solver=LineSearch(distance=getattr(madjax, distance)))
    # Fifteen bisections leave the authors' KL step 2^-15 short.
    tolerance = 1e-4 if distance == "kl" else 2e-6
    np.testing.assert_allclose(got, REFERENCE[f"{name}/y_tilde"], atol=tolerance)
    np.testing.assert_allclose(deviation(got, y, m), REFERENCE[f"{name}/H"], atol=1e-3)


@pytest.mark.parametrize("distance", ["l1", "l2", "kl"])
def test_unnormalised_objective_is_the_authors_default(distance):
    seen = 0
    for case in CASES:
        name = f"{case}/extreme_surr/{distance}"
        if f"{name}/y_tilde" not in REFERENCE:
            continue
        g, y = REFERENCE[f"{case}/G"], REFERENCE[f"{case}/y"]
        got = jit_solve(
            y,
            (g @ g.T).astype(np.float32),
            epsilon=float(REFERENCE[f"{case}/epsilon"]),
            solver=LineSearch(ablations.extreme_unnormalised, getattr(madjax, distance)),
        )
        np.testing.assert_allclose(got, REFERENCE[f"{name}/y_tilde"], atol=1e-4)
        seen += 1
    assert seen >= 20


@pytest.mark.parametrize("distance", ["l1", "l2", "kl"])
@pytest.mark.parametrize("case", CASES)
def test_argmax_preserving_is_the_authors_solver_or_better(case, distance):
    name = f"{case}/argmax/{distance}"
    if f"{name}/y_tilde" not in REFERENCE:
        pytest.skip("the authors' KL line search found no start")
    g, y = REFERENCE[f"{case}/G"], REFERENCE[f"{case}/y"]
    m = (g.astype(np.float64) @ g.T.astype(np.float64)).astype(np.float32)
    star = np.asarray(jit_argmax_preserving(y, m))
    assert star.argmax() == y.argmax()
    want = explicit_h(REFERENCE[f"{name}/y_star"], y, g)
    if y.size <= 10:
        np.testing.assert_allclose(star, REFERENCE[f"{name}/y_star"], atol=1e-4)
        got = jit_solve(
            y,
            m,
            epsilon=float(REFERENCE[f"{case}/epsilon"]),
            solver=LineSearch(madjax.argmax_preserving, getattr(madjax, distance)),
        )
        np.testing.assert_allclose(got, REFERENCE[f"{name}/y_tilde"], atol=1e-4)
    else:
        assert explicit_h(star, y, g) >= want - 1e-5


@pytest.mark.parametrize("k", [2, 3, 7, 11])
@pytest.mark.parametrize("seed", range(3))
def test_argmax_preserving_is_the_best_of_all_subsets(seed, k):
    y, g = problem(seed, k=k)
    top = int(y.argmax())
    best = -1.0
    for bits in range(2**k):
        members = np.array([(bits >> i) & 1 for i in range(k)], float)
        if members[top]:
            best = max(best, explicit_h(members / members.sum(), y, g))
    star = jit_argmax_preserving(y, g @ g.T)
    assert star.argmax() == top
    np.testing.assert_allclose(explicit_h(star, y, g), best, rtol=1e-4, atol=1e-5)


def last_layer_problem(seed, k, peak):
    """A posterior and the Gram matrix of the last layer of a surrogate."""
    keys = jax.random.split(jax.random.key(seed))
    y = jax.nn.softmax(peak * jax.random.normal(keys[0], (k,)))
    centred = jnp.eye(k) - jax.nn.softmax(jax.random.normal(keys[1], (k,)))[None]
    return y, centred @ centred.T


@pytest.mark.parametrize("kind", ["gradients of low rank", "last layer"])
def test_search_finds_what_comparing_all_finds(kind):
    exact, searched, sorted_only = [], [], []
    find_all, find = jax.jit(subsets.exhaustive), jax.jit(subsets.search)
    prefixes = jax.jit(subsets.sorted_prefixes)
    for seed in range(60):
        if kind == "last layer":
            y, m = last_layer_problem(seed, 12, 1 + seed % 4)
        else:
            y, g = problem(seed, k=12, d=20)
            m = g @ g.T
        # Class 0 stands for the top class, whatever y is.
        u = m @ y
        scale = 1 / jnp.sqrt(y @ u)
        exact.append(float(scale * find_all(m, u).cosine))
        searched.append(float(scale * find(m, u).cosine))
        sorted_only.append(float(scale * prefixes(m, u).cosine))
    exact, searched = np.array(exact), np.array(searched)
    assert np.all(searched >= exact - 1e-5)
    assert np.mean(searched <= exact + 1e-5) >= 0.95
    if kind == "last layer":
        # Sorting alone is exact up to the spacing of its directions where an angle passes 90.
        obtuse = exact < 0
        assert obtuse.sum() > 30
        assert np.max((np.array(sorted_only) - exact)[obtuse]) < 5e-3
        np.testing.assert_allclose(searched[obtuse], exact[obtuse], atol=1e-5)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_bound_is_the_best_label_preserving_answer(seed, k):
    """Against a dense grid of the polytope {v_0 >= v_j >= 0}, v_0 = 1."""
    y, g = problem(seed, k=k)
    order = np.argsort(-np.asarray(y))
    y, g = y[order], g[order]
    axis = np.linspace(0, 1, 401 if k == 2 else 101)
    grid = np.stack(np.meshgrid(np.ones(1), *[axis] * (k - 1), indexing="ij"), -1).reshape(-1, k)
    best = max(explicit_h(v / v.sum(), y, g) for v in grid)
    np.testing.assert_allclose(jit_argmax_bound(y, g @ g.T), max(best, 2), atol=2e-3)


def test_nothing_passes_the_bound():
    gaps = []
    for seed in range(40):
        y, g = problem(seed, k=9)
        m = g @ g.T
        gaps.append(
            float(jit_argmax_bound(y, m) - jit_deviation(jit_argmax_preserving(y, m), y, m))
        )
    assert min(gaps) > -1e-3
    # The best vertex is not the best answer, but sometimes it is.
    assert min(gaps) < 1e-3
    assert max(gaps) < 1.5


def test_ablations_by_hand():
    y, g = problem(0, k=4)
    m = g @ g.T
    one_hot = np.eye(4)
    np.testing.assert_array_equal(ablations.argmin(y, m), one_hot[int(y.argmin())])
    want = [np.square(np.asarray(g.T @ (v - y), np.float64)).sum() for v in one_hot]
    got = ablations.extreme_unnormalised(y, m)
    np.testing.assert_array_equal(got, one_hot[int(np.argmax(want))])
    # On the last layer the surrogate drops out of the un-normalised objective.
    for seed in range(10):
        y, m = last_layer_problem(seed, 6, 2)
        np.testing.assert_array_equal(ablations.extreme_unnormalised(y, m), ablations.argmin(y, m))


def test_random_vertices_are_uniform_and_equal_for_equal_posteriors():
    y = jax.nn.softmax(jax.random.normal(jax.random.key(0), (5000, 5)))
    drawn = jax.jit(jax.vmap(ablations.random_vertex, in_axes=(0, None)))(y, jnp.eye(5))
    again = jax.vmap(ablations.random_vertex, in_axes=(0, None))(y[:7], jnp.eye(5))
    np.testing.assert_array_equal(drawn[:7], again)
    counts = np.asarray(drawn.sum(0))
    assert np.square(counts - 1000).sum() / 1000 < 18.5  # chi-squared, 4 degrees, 0.1 %
    # Near posteriors, as of confident answers, are not drawn alike.
    near = np.float32([[1 - i * 1e-7, i * 1e-7, 0, 0, 0] for i in range(300)])
    drawn = jax.vmap(ablations.random_vertex, in_axes=(0, None))(near, jnp.eye(5))
    assert drawn.sum(0).min() > 30


def test_many_classes_cost_no_enumeration():
    y, g = problem(0, k=100, d=300)
    star = jit_argmax_preserving(y, g @ g.T)
    assert star.argmax() == y.argmax()
    assert explicit_h(star, y, g) > explicit_h(np.eye(100)[int(y.argmax())], y, g)


@st.composite
def posteriors(draw, k):
    """Points of the simplex: random, peaked, with exact zeros, vertices, uniform, ties."""
    weights = draw(hnp.arrays(np.float32, k, elements=st.sampled_from([0, 1e-6, 0.1, 0.5, 1, 9])))
    weights = weights if weights.sum() > 0 else np.ones(k, np.float32)
    return (weights / weights.sum(dtype=np.float64)).astype(np.float32)


@st.composite
def problems(draw):
    k = draw(st.integers(2, 6))
    y = draw(posteriors(k))
    g = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).normal(size=(k, 9))
    if draw(st.booleans()):
        # The surrogate's posterior may be y itself: the undefined angle.
        g -= draw(st.sampled_from([y, draw(posteriors(k))])).astype(np.float64) @ g
    return y, (g @ g.T).astype(np.float32)


WAYS = tuple(itertools.product(ORACLES, DISTANCES))


@jax.jit
def all_ways(y, m, epsilon):
    return jnp.stack([solve(y, m, epsilon=epsilon, solver=LineSearch(*way)) for way in WAYS])


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([0.0, 1e-6, 0.1, 0.99, 1.5, 2.0, 50.0]))
def test_answers_stay_on_the_simplex_and_in_the_ball(case, epsilon):
    y, m = case
    for (oracle, distance), got in zip(WAYS, np.asarray(all_ways(y, m, epsilon)), strict=True):
        assert np.all(np.isfinite(got))
        if oracle is madjax.argmax_preserving:
            assert got.argmax() == y.argmax()
        assert got.min() >= 0
        assert abs(got.sum(dtype=np.float64) - 1) < 1e-6
        assert in_float64(distance.__name__, got[None], y[None])[0] <= epsilon + 1e-6
        if epsilon == 0 or not jit_defined(y, m):
            np.testing.assert_array_equal(got, y)


@settings(max_examples=100, deadline=None)
@given(problems(), st.floats(0, 2), st.randoms(use_true_random=False))
def test_scale_does_not_matter_and_classes_may_be_renamed(case, epsilon, random):
    y, m = case
    got = jit_solve(y, m, epsilon=epsilon)
    np.testing.assert_array_equal(jit_solve(y, 16 * m, epsilon=epsilon), got)
    order = np.array(random.sample(range(y.size), y.size))
    renamed = jit_solve(y[order], m[order][:, order], epsilon=epsilon)
    # Equal vertices may be told apart by their order alone; the objective is the same.
    h = [float(jit_deviation(v, y, m)) for v in (got, renamed[np.argsort(order)])]
    np.testing.assert_allclose(h[0], h[1], atol=2e-3)


def many_problems(rng, n, k):
    """Posteriors of every awkward kind, and Gram matrices of random surrogates or of y's own."""
    y = rng.dirichlet(np.full(k, 0.5), n)
    kind = rng.integers(0, 6, n)
    y[kind == 1] = np.eye(k)[rng.integers(0, k, (kind == 1).sum())]
    zeros = y * (rng.random((n, k)) < 0.5)
    zeros[zeros.sum(1) == 0, 0] = 1
    y = np.where((kind == 2)[:, None], zeros, y)
    y[kind == 3] = 1 / k
    ties = np.sort(y, axis=1)[:, ::-1].copy()
    ties[:, min(1, k - 1)] = ties[:, 0]
    y = np.where((kind == 4)[:, None], ties, y)
    y = (y / y.sum(1, keepdims=True)).astype(np.float32)
    p = np.where((kind == 5)[:, None], y, rng.dirichlet(np.ones(k), n))
    g = rng.normal(size=(n, k, k + 3))
    g -= np.einsum("bk,bkd->bd", p, g)[:, None]
    epsilon = rng.choice([0, 1e-6, 0.1, 0.99, 1.5, 2], n).astype(np.float32)
    return y, np.einsum("bkd,bld->bkl", g, g).astype(np.float32), epsilon


def in_float64(name, y_tilde, y):
    """The distance of batches, in float64."""
    if name == "kl":
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(y > 0, y * np.log(y / y_tilde), 0).sum(1)
    return np.linalg.norm(y_tilde - y, {"l1": 1, "l2": 2, "linf": np.inf}[name], axis=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("k", [2, 3, 10, 20])
def test_a_million_posteriors(k):
    """Every oracle and distance on 250,000 problems for each of four K."""
    rng = np.random.default_rng(k)
    oracles = (*ORACLES, ablations.extreme_unnormalised, ablations.random_vertex, ablations.argmin)
    targets = {oracle: jax.jit(jax.vmap(oracle)) for oracle in oracles}

    @partial(jax.jit, static_argnums=(0, 1))
    def solve_all(oracle, distance, y, m, epsilon):
        def answer(y, m, epsilon):
            return solve(y, m, epsilon=epsilon, solver=LineSearch(oracle, distance))

        return jax.vmap(answer)(y, m, epsilon)

    for _ in range(25):
        y, m, epsilon = many_problems(rng, 10_000, k)
        known = np.asarray(jax.vmap(defined)(y, m))
        for oracle, distance in itertools.product(oracles, DISTANCES):
            got = np.asarray(solve_all(oracle, distance, y, m, epsilon))
            wide = got.astype(np.float64)
            assert np.all(np.isfinite(got))
            assert got.min() >= 0
            assert abs(wide.sum(1) - 1).max() < 1e-6
            spent = in_float64(distance.__name__, wide, y.astype(np.float64))
            assert np.max(spent - epsilon) <= 1e-6
            np.testing.assert_array_equal(got[epsilon == 0], y[epsilon == 0])
            if distance is madjax.l1:
                star = np.asarray(targets[oracle](y, m))
                np.testing.assert_array_equal(got[epsilon == 2], star[epsilon == 2])
            if oracle in ORACLES:
                np.testing.assert_array_equal(got[~known], y[~known])
            if oracle is madjax.argmax_preserving:
                np.testing.assert_array_equal(got.argmax(1), y.argmax(1))


def test_the_surrogates_own_posterior_has_no_angle():
    y, g = problem(3)
    g = g - (y @ g)[None]
    m = g @ g.T
    assert not defined(y, m)
    np.testing.assert_array_equal(solve(y, m, epsilon=1.0), y)
    assert deviation(jnp.eye(5)[0], y, m) == 0
    assert angle(jnp.eye(5)[0], y, m) == 0


def test_the_budgets_ends_are_exact():
    y, g = problem(1)
    m = g @ g.T
    star = extreme(y, m)
    for distance in DISTANCES:
        solver = LineSearch(distance=distance)
        np.testing.assert_array_equal(solve(y, m, epsilon=0.0, solver=solver), y)
        far = distance(star, y)  # infinite for KL, and within an infinite budget
        np.testing.assert_array_equal(solve(y, m, epsilon=far, solver=solver), star)


@pytest.mark.parametrize("epsilon", [0.05, 0.4, 1.3])
def test_bisection_finds_the_closed_form(epsilon):
    y, g = problem(2)
    star = extreme(y, g @ g.T)

    def twice_removed(y_tilde, y):
        return madjax.l1(y_tilde, y)

    np.testing.assert_allclose(
        step(y, star, epsilon, twice_removed), step(y, star, epsilon, madjax.l1), atol=1e-6
    )


def test_budget_is_spent_to_the_last():
    y, g = problem(4)
    for distance in DISTANCES:
        got = solve(y, g @ g.T, epsilon=0.2, solver=LineSearch(distance=distance))
        np.testing.assert_allclose(distance(got, y), 0.2, rtol=1e-5)


def test_one_call_serves_a_grid_of_epsilons():
    y, g = problem(5)
    grid = jnp.linspace(0, 2, 9)
    together = jax.jit(jax.vmap(lambda e: solve(y, g @ g.T, epsilon=e)))(grid)
    alone = jnp.stack([solve(y, g @ g.T, epsilon=float(e)) for e in grid])
    np.testing.assert_allclose(together, alone, atol=1e-7)
    deviations = jax.vmap(lambda v: deviation(v, y, g @ g.T))(together)
    assert jnp.all(jnp.diff(deviations) >= -1e-6)


@pytest.mark.parametrize(
    ("name", "want"),
    [("l1", 0.6), ("l2", 0.3 * 2**0.5), ("linf", 0.3), ("kl", 0.5 * np.log(0.5 / 0.2))],
)
def test_distances_by_hand(name, want):
    y, y_tilde = jnp.array([0.5, 0.0, 0.5]), jnp.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(getattr(madjax, name)(y_tilde, y), want, rtol=1e-6)


def test_kl_to_an_answer_without_a_possible_class_is_infinite():
    assert madjax.kl(jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5])) == jnp.inf


def test_l2_has_a_gradient_where_nothing_is_changed():
    y = jnp.array([0.3, 0.7])
    np.testing.assert_array_equal(jax.grad(madjax.l2)(y, y), [0, 0])


def test_perturb_is_gram_then_solve():
    w = jax.random.normal(jax.random.key(0), (6, 4))
    x = jax.random.normal(jax.random.key(1), (5, 6))
    y = jax.nn.softmax(jax.random.normal(jax.random.key(2), (5, 4)))

    def apply(w, x):
        return x @ w

    got = madjax.perturb(apply, w, x, y, epsilon=0.7, gram_method="jacrev")
    m = madjax.gram(apply, w, x, method="jacrev")
    want = [solve(y[i], m[i], epsilon=0.7) for i in range(5)]
    np.testing.assert_allclose(got, jnp.stack(want), atol=1e-7)
    alone = madjax.perturb(apply, w, x[3:4], y[3:4], epsilon=0.7, gram_method="jacrev")
    np.testing.assert_allclose(alone[0], got[3], atol=1e-6)


def test_perturb_answers_a_grid_of_budgets_in_one_call():
    keys = jax.random.split(jax.random.key(0), 3)
    w, x = jax.random.normal(keys[0], (6, 4)), jax.random.normal(keys[1], (5, 6))
    y = jax.nn.softmax(jax.random.normal(keys[2], (5, 4)))

    def answers(epsilon):
        return madjax.perturb(lambda w, x: x @ w, w, x, y, epsilon=epsilon, gram_method="jacrev")

    budgets = [0.0, 0.3, 1.2]
    got = answers(np.array(budgets))
    assert got.shape == (3, 5, 4)
    for at, epsilon in enumerate(budgets):
        np.testing.assert_allclose(got[at], answers(epsilon), atol=1e-7)
    assert answers(np.zeros(0)).shape == (0, 5, 4)
    with pytest.raises(InputError, match=r"epsilon has shape \(1, 2\): give one budget or a list"):
        answers(np.ones((1, 2)))


def test_bad_input_is_named():
    y, g = problem(0)
    m = g @ g.T
    with pytest.raises(InputError, match=r"epsilon is -0\.1"):
        solve(y, m, epsilon=-0.1)
    with pytest.raises(InputError, match="epsilon is nan"):
        solve(y, m, epsilon=float("nan"))
    with pytest.raises(InputError, match=r"use jax\.vmap"):
        solve(y[None], m[None], epsilon=0.1)
    for grid in ([0.1] * y.size, [0.1, 0.2]):
        with pytest.raises(InputError, match=r"solve takes one budget; use jax\.vmap over"):
            solve(y, m, epsilon=grid)
    with pytest.raises(InputError, match="y is no posterior: NaN or infinity in 2 of 3"):
        madjax.mad.as_posterior(jnp.array([[0.5, 0.5], [jnp.nan, 1], [0, jnp.inf]]))
    w, x = jnp.ones((6, 4)), jnp.ones((5, 6))
    with pytest.raises(InputError, match="4 classes and the posteriors 3"):
        madjax.perturb(
            lambda w, x: x @ w, w, x, jnp.ones((5, 3)) / 3, epsilon=0.1, gram_method="jacrev"
        )
    with pytest.raises(InputError, match="5 queries"):
        madjax.perturb(
            lambda w, x: x @ w, w, x, jnp.ones((4, 4)) / 4, epsilon=0.1, gram_method="jacrev"
        )


@pytest.mark.parametrize(
    "target", [lambda y, m: 1.0, lambda y, m: y[:2], lambda y, m: m[None], lambda y, m: y[:0]]
)
def test_a_solver_or_an_oracle_that_gives_another_shape_is_named(target):
    y, g = problem(0)
    own = LineSearch(target)
    for solve_one in (partial(solve, solver=own), jax.jit(partial(solve, solver=own))):
        with pytest.raises(InputError, match=r"oracle <lambda> gives .* of shape \(.*\) for 5"):
            solve_one(y, g @ g.T, epsilon=0.1)
    with pytest.raises(InputError, match=r"solver <lambda> gives .* of shape \(.*\) for 5"):
        solve(y, g @ g.T, epsilon=0.1, solver=lambda y, m, epsilon: target(y, m))
