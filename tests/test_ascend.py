"""The optimising solver beyond polytopes, against dense grids; constraints by their definitions."""

import itertools
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import madjax
from madjax import Ascend, InputError, LineSearch, angle, deviation, extreme_at_budget, solve, sweep
from madjax.ascend import EQUAL, overshoot
from madjax.batching import map_chunks
from madjax.constraints import (
    bound_confidence,
    bound_cost,
    bound_entropy,
    cap,
    entropy,
    keep_bin,
    keep_label,
    keep_top_k,
    kl,
    l1,
    l2,
    linf,
)
from madjax.objectives import norm, opposition, towards, unnormalised
from madjax.steps import reach


@partial(jax.jit, static_argnames="k")
def problem(key, k, sharp=3.0):
    """A posterior, and the Gram matrix of a network whose own posterior is p: M p = 0."""
    of_g, of_p, of_y = jax.random.split(key, 3)
    g = jax.random.normal(of_g, (k, 4 * k))
    p = jax.nn.softmax(0.3 * jax.random.normal(of_p, (k,)))
    g = g - (p[:, None] * g).sum(0, keepdims=True)
    return jax.nn.softmax(sharp * jax.random.normal(of_y, (k,))), jnp.matmul(
        g, g.T, precision="highest"
    )


@partial(jax.jit, static_argnums=(0, 1))
def problems(n, k, seed=0, sharp=3.0):
    return jax.vmap(partial(problem, k=k, sharp=sharp))(jax.random.split(jax.random.key(seed), n))


class Found(NamedTuple):
    """Answers, what a solver says of them, and the value of its objective."""

    y_tilde: np.ndarray
    info: madjax.mad.Info
    value: np.ndarray

    @property
    def feasible(self):
        return self.info.feasible


def reported(solver, y, gram, epsilon):
    y_tilde, info = solver.report(y, gram, epsilon)
    info = info._replace(bound=jnp.nan)  # half of what would be compiled; see test_polytope
    objective = getattr(solver, "objective", deviation)
    return Found(y_tilde, info, objective(y_tilde, y, gram))


@partial(jax.jit, static_argnums=0)
def _answered(solver, y, gram, epsilon):
    return jax.vmap(partial(reported, solver, epsilon=epsilon))(y, gram)


BLOCK = 50


def answered(y, gram, *, epsilon, solver=LineSearch(), block=BLOCK):  # noqa: B008, it is frozen
    """The report of one query or of a batch, in blocks of one size, compiled once for each kind."""
    if y.ndim == 1:
        return jax.tree.map(
            lambda a: a[0], answered(y[None], gram[None], epsilon=epsilon, solver=solver)
        )
    blocks = []
    for start in range(0, len(y), block):
        at = np.minimum(np.arange(start, start + block), len(y) - 1)
        blocks.append(_answered(solver, np.asarray(y)[at], np.asarray(gram)[at], epsilon))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(y)], *blocks)


def simplex_grid(k, n):
    """All points of the simplex with coordinates in multiples of 1 / n."""
    bars = np.array(list(itertools.combinations(range(n + k - 1), k - 1)))
    ends = np.full((len(bars), 1), n + k - 1)
    return np.diff(np.concatenate([-np.ones_like(ends), bars, ends], axis=1)) - 1.0


@partial(jax.jit, static_argnames=("objective", "distance"))
def best_of_grid(y, gram, grid, epsilon, objective=deviation, distance=l1):
    """The best value of each query, points outside of the ball brought to it on the way from y."""

    def best(query):
        y, gram = query
        points = jax.vmap(lambda v: madjax.steps.step(y, v, epsilon, distance))(grid)
        return jax.vmap(lambda v: objective(v, y, gram))(points).max()

    return jax.lax.map(best, (y, gram))


# --- the optimum ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distance", [kl, *(pytest.param(d, marks=pytest.mark.slow) for d in (linf, l2))]
)
def test_other_balls_come_near_a_dense_grid(distance):
    epsilon = {linf: 0.4, l2: 0.5, kl: 0.3}[distance]
    y, gram = problems(60, 3, seed=7)
    best = best_of_grid(y, gram, simplex_grid(3, 200) / 200, epsilon, distance=distance)
    found = answered(y, gram, epsilon=epsilon, solver=Ascend(distance))
    assert np.mean(found.value - best > -2e-3) >= 0.98
    assert jax.vmap(distance)(found.y_tilde, y).max() <= epsilon + 1e-5


@jax.jit
def three_ways(y, gram, epsilon):
    solvers = {"line": LineSearch(), "budget": LineSearch(extreme_at_budget), "ascend": Ascend()}
    return {name: reported(solver, y, gram, epsilon) for name, solver in solvers.items()}


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    epsilon=st.sampled_from([0.0, 1e-3, 0.1, 0.5, 0.99, 1.5, 2.0]),
    sharp=st.sampled_from([0.1, 3.0, 30.0]),
    k=st.sampled_from([2, 12]),  # all vertices compared, and searched
)
def test_never_worse_than_the_line_search_and_always_within(seed, epsilon, sharp, k):
    y, gram = problem(jax.random.key(seed), k, sharp)
    value = partial(deviation, y=y, gram=gram)
    by = three_ways(y, gram, epsilon)
    assert by["line"].value <= by["budget"].value + 1e-5
    assert by["budget"].value <= by["ascend"].value / (1 - EQUAL) + 1e-5
    for found in by.values():
        v = found.y_tilde
        assert found.feasible
        assert jnp.isfinite(v).all()
        assert v.min() >= -1e-7
        np.testing.assert_allclose(v.sum(), 1, atol=2e-6)
        assert l1(v, y) <= epsilon + 2e-6
        np.testing.assert_allclose(found.value, value(v), atol=1e-6)
    if epsilon == 0:
        assert all((found.y_tilde == y).all() for found in by.values())


def test_one_answer_for_a_query_alone_in_a_batch_and_on_a_grid_of_budgets():
    y, gram = problems(4, 5)
    grid = jnp.array([0.2, 0.9])
    solver = partial(solve, solver=Ascend())
    batch = jax.jit(jax.vmap(partial(solver, epsilon=0.9)))(y, gram)
    many = jax.jit(jax.vmap(lambda e: jax.vmap(partial(solver, epsilon=e))(y, gram)))(grid)
    for i in range(4):
        alone = jax.jit(partial(solver, epsilon=0.9))(y[i], gram[i])
        values = [deviation(v, y[i], gram[i]) for v in (alone, batch[i], many[1, i])]
        np.testing.assert_allclose(values, values[0], atol=1e-4)


@pytest.mark.parametrize(
    "constraints", [(), pytest.param((partial(cap, most=1.0),), marks=pytest.mark.slow)]
)
def test_no_answer_lies_where_the_next_program_may_know_no_angle(constraints):
    """Budgets that end about the surrogate's own posterior: H is 4 beyond it, and 0 at it."""
    y, gram = problem(jax.random.split(jax.random.key(6), 100_000)[28061], 5)
    p = jnp.linalg.solve(gram + 1, jnp.ones(5))
    epsilons = l1(p / p.sum(), y) + jnp.linspace(-2e-3, 2e-3, 200)
    solver = Ascend(constraints=constraints)
    answers = jax.jit(jax.vmap(partial(solve, y, gram, solver=solver)))(epsilon=epsilons)
    assert (jax.vmap(partial(norm, gram=gram, margin=1.5))(answers) > 0).all()


@pytest.mark.parametrize("solver", [LineSearch, Ascend])
def test_renaming_the_classes_renames_the_answer(solver):
    y, gram = problem(jax.random.key(3), 5)
    turn = jnp.array([3, 1, 4, 0, 2])
    found = answered(y, gram, epsilon=0.7, solver=solver())
    turned = answered(y[turn], gram[turn][:, turn], epsilon=0.7, solver=solver())
    np.testing.assert_allclose(found.value, turned.value, atol=1e-4)


def test_the_surrogates_own_posterior_comes_back():
    _, gram = problem(jax.random.key(0), 5)
    p = jnp.linalg.solve(gram + 1, jnp.ones(5))
    p = p / p.sum()
    assert (answered(p, gram, epsilon=0.5, solver=Ascend()).y_tilde == p).all()


def test_beyond_the_surrogates_posterior_the_gradient_is_the_opposite():
    y, gram = problem(jax.random.key(1), 5)
    far = overshoot(y, gram)
    assert far.min() >= 0
    np.testing.assert_allclose(far.sum(), 1, atol=1e-6)
    np.testing.assert_allclose(far.min(), 0, atol=1e-6)  # as far as the simplex goes
    np.testing.assert_allclose(angle(far, y, gram), 180, atol=0.1)
    found = answered(y, gram, epsilon=float(l1(far, y)) + 1e-3, solver=Ascend())
    np.testing.assert_allclose(found.value, 4, atol=1e-3)


@pytest.mark.parametrize("gram", [jnp.zeros((5, 5)), jnp.eye(5), jnp.ones((5, 5))])
def test_a_gram_matrix_without_one_null_direction_does_no_harm(gram):
    y = jnp.array([0.6, 0.2, 0.1, 0.1, 0.0])
    found = answered(y, gram, epsilon=0.6, solver=Ascend())
    assert jnp.isfinite(found.y_tilde).all()
    assert found.value >= answered(y, gram, epsilon=0.6).value - 1e-6


def test_the_vertices_are_compared_where_the_budget_ends():
    """By hand: a plain loop over vertices, each stepped to the budget."""
    y, gram = problems(8, 6, seed=2)
    found = answered(y, gram, epsilon=0.4, solver=LineSearch(extreme_at_budget))
    for i in range(8):
        ends = [madjax.steps.step(y[i], e, 0.4, l1) for e in jnp.eye(6)]
        want = max(float(deviation(v, y[i], gram[i])) for v in ends)
        np.testing.assert_allclose(found.value[i], want, atol=1e-5)


def test_the_end_of_the_way_to_the_best_vertex_may_not_be_the_best_end():
    y, gram = problems(100, 6, seed=2)
    line, budget = (
        answered(y, gram, epsilon=0.4, solver=LineSearch(oracle)).value
        for oracle in (madjax.extreme, extreme_at_budget)
    )
    assert (budget >= line - 1e-6).all()
    assert jnp.mean(budget > line + 1e-3) > 0.2


# --- objectives -----------------------------------------------------------------------------------


def test_objectives_are_what_they_say_of_explicit_gradients():
    g = jax.random.normal(jax.random.key(0), (4, 9))
    y, v, t = jax.nn.softmax(jax.random.normal(jax.random.key(1), (3, 4)))
    gram = g @ g.T
    a, u, direction = (g.T @ w for w in (v, y, t))
    np.testing.assert_allclose(unnormalised(v, y, gram), jnp.sum((a - u) ** 2), rtol=1e-4)
    np.testing.assert_allclose(opposition(v, y, gram), -a @ u, rtol=1e-4, atol=1e-5)
    cosine = a @ direction / jnp.linalg.norm(a) / jnp.linalg.norm(direction)
    np.testing.assert_allclose(towards(v, y, gram, target=tuple(t.tolist())), cosine, atol=1e-5)
    assert towards(v, y, 0 * gram, target=(1.0, 0, 0, 0)) == 0


@pytest.mark.parametrize(
    "objective",
    [
        partial(towards, target=(0.0, 1.0, 0.0)),
        *(pytest.param(each, marks=pytest.mark.slow) for each in (unnormalised, opposition)),
    ],
)
def test_ascend_maximises_any_objective(objective):
    y, gram = problems(60, 3, seed=11)
    best = best_of_grid(y, gram, simplex_grid(3, 200) / 200, 0.6, objective=objective)
    found = answered(y, gram, epsilon=0.6, solver=Ascend(objective=objective))
    assert np.mean((found.value - best) / np.abs(best) > -1e-3) >= 0.95


# --- constraints ----------------------------------------------------------------------------------


def learned(y_tilde, y):
    """A small random network of both, which holds at y by construction."""

    def network(v):
        hidden = jnp.tanh(jnp.matmul(v, jnp.sin(jnp.arange(5 * v.size).reshape(v.size, 5) ** 2.0)))
        return jnp.sum(hidden * jnp.cos(jnp.arange(5.0)))

    return network(y_tilde) - network(y) - 0.05


COST = tuple(tuple(float((i - j) ** 2) for j in range(5)) for i in range(5))
EXAMPLES = {
    "keep_label": partial(keep_label, margin=0.02),
    "keep_top_k": partial(keep_top_k, k=2),
    "bound_confidence": partial(bound_confidence, most=0.2),
    "keep_bin": partial(keep_bin, bins=5),
    "bound_entropy above": partial(bound_entropy, most=1.2),
    "bound_entropy below": partial(bound_entropy, least=0.5),
    "bound_cost": partial(bound_cost, cost=COST, most=2.0),
    "cap": partial(cap, most=0.8),
    "learned": learned,
}


def test_constraints_by_hand():
    y = jnp.array([0.6, 0.3, 0.1, 0.0])
    v = jnp.array([0.4, 0.45, 0.0, 0.15])
    close = partial(np.testing.assert_allclose, atol=1e-6)
    close(keep_label(v, y, margin=0.1), [-1, 0.15, -0.3, -0.15])
    close(keep_top_k(v, y, k=2), 0.15 - 0.4)
    close(keep_top_k(v, y, k=3), 0.15 - 0.0)
    close(bound_confidence(v, y, most=0.05), 0.15)
    close(keep_bin(v, y, bins=4), [0.1, -0.35])
    close(keep_bin(v, jnp.array([1.0, 0, 0, 0]), bins=4), [0.35, -0.6])
    close(entropy(jnp.array([0.5, 0.25, 0.25, 0])), 1.5)
    half = jnp.array([0.5, 0.5, 0, 0])
    close(bound_entropy(half, y, least=0.25, most=2.0), [-0.75, -1])
    close(bound_entropy(half, y), [-1, -1])
    cost = ((0.0, 1, 1, 1), (2, 0, 0, 0), (0, 0, 0, 0), (9, 9, 9, 9))
    close(bound_cost(v, y, cost=cost, most=0.5), 0.6 * 0.6 + 0.3 * 2 * 0.4 - 0.5)
    close(cap(v, y, most=0.4), [0, 0.05, -0.4, -0.25])


def check_constraint(constraint, solver, y, gram, block=BLOCK):
    """The answers, after what has to hold of each."""
    epsilon = 0.8

    @jax.jit
    @jax.vmap
    def worst(v, y):
        return jnp.max(constraint(v, y))

    def by(solver):
        return answered(
            y, gram, epsilon=epsilon, solver=solver(constraints=(constraint,)), block=block
        )

    y, gram = np.asarray(y), np.asarray(gram)
    found, line = by(solver), by(LineSearch)
    far = np.abs(found.y_tilde - y).sum(axis=1)
    assert np.isfinite(found.y_tilde).all()
    assert np.asarray(worst(found.y_tilde, y))[found.feasible].max() <= 1e-5
    assert far.max() <= epsilon + 1e-5
    assert found.feasible[worst(y, y) <= 1e-6].all()
    assert (found.y_tilde == y)[~found.feasible].all()
    assert (found.value >= line.value - 1e-5).all()
    assert np.mean(far > 0.01) > 0.2  # it does something
    return found


FAST = ("learned",)  # of the longer programs; the others are among the slow


@pytest.mark.parametrize(
    ("name", "solver"),
    [(name, LineSearch) for name in EXAMPLES] + [(name, Ascend) for name in FAST],
)
def test_an_answer_meets_its_constraint_or_is_y_and_says_so(name, solver):
    y, gram = problems(100, 5, seed=5)
    y = y.at[0].set(jnp.eye(5)[0]).at[1].set(0.2)
    check_constraint(EXAMPLES[name], solver, y, gram)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("solver", [LineSearch, Ascend])
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_hundred_thousand_answers_meet_each_constraint(name, solver, record_property):
    """For JAX_DISABLE_MOST_OPTIMIZATIONS=0: minutes each with XLA's optimisations."""
    y, gram = problems(100_000, 5, seed=6)
    found = check_constraint(EXAMPLES[name], solver, y, gram, block=1000)
    for said in ("feasible", "defended", "deviation"):
        record_property(said, float(np.mean(getattr(found.info, said))))


@partial(jax.jit, static_argnames="solver")
def _kept(y, gram, epsilon, margin, most, least, solver):
    constraints = (
        partial(keep_label, margin=margin),
        partial(cap, most=most),
        partial(bound_entropy, least=least),
    )
    return jax.vmap(partial(reported, solver(constraints=constraints), epsilon=epsilon))(y, gram)


def kept(y, gram, epsilon, *, margin=-1.0, most=1.0, least=0.0, solver=Ascend):
    """One program for all settings of three constraints, which as they stand exclude nothing."""
    return _kept(y, gram, epsilon, margin, most, least, solver)


def test_ascend_finds_points_that_no_segment_from_y_passes_at_its_start():
    """A capped answer to a confident posterior, and one with some entropy: y itself breaks both."""
    y, gram = problems(50, 5, seed=9, sharp=8.0)
    confident = y.max(axis=1) > 0.85
    assert confident.sum() > 25
    found = kept(y, gram, 0.9, most=0.75, least=0.6)
    assert found.feasible.all()
    assert found.y_tilde.max() <= 0.75 + 1e-5
    assert jax.vmap(entropy)(found.y_tilde).min() >= 0.6 - 1e-5


def nearness(v, y, gram):
    return -jnp.square(v - y).sum()


def test_a_constraint_that_y_breaks_is_met_though_y_has_the_best_value():
    y, gram = problems(50, 5, seed=9, sharp=8.0)
    assert (y.max(axis=1) > 0.8).sum() > 25
    solver = Ascend(constraints=(EXAMPLES["cap"],), objective=nearness)
    found = answered(y, gram, epsilon=0.9, solver=solver)
    assert found.feasible.all()
    assert found.y_tilde.max() <= 0.8 + 1e-5


@pytest.mark.parametrize("solver", [LineSearch, Ascend])
def test_contradictory_constraints_return_y_and_say_so(solver):
    y, gram = problems(50, 5)
    found = kept(y, gram, 0.8, most=0.3, margin=0.2, solver=solver)
    assert not found.feasible.any()
    assert (found.y_tilde == y).all()


def test_a_constraint_that_is_nan_never_holds():
    y, gram = problem(jax.random.key(0), 4)
    found = answered(y, gram, epsilon=0.8, solver=LineSearch(constraints=(lambda v, y: jnp.nan,)))
    assert not found.feasible
    assert (found.y_tilde == y).all()


def test_constraints_add_up():
    y, gram = problems(50, 5, seed=1, sharp=1.5)
    y, free = np.asarray(y), kept(y, gram, 1.2)
    found = jax.tree.map(np.asarray, kept(y, gram, 1.2, margin=0.05, most=0.6))
    first, second = np.sort(y)[:, :-3:-1].T
    hold = (first - second >= 0.05) & (first <= 0.6)
    assert hold.sum() > 10
    assert found.feasible[hold].all()
    answers = found.y_tilde[found.feasible]
    first, second = np.sort(answers)[:, :-3:-1].T
    assert (first - second).min() >= 0.05 - 1e-5
    assert first.max() <= 0.6 + 1e-5
    np.testing.assert_array_equal(answers.argmax(1), y[found.feasible].argmax(1))
    assert (found.value <= free.value + 1e-4).all()


def test_of_opposite_gradients_the_longest_is_taken_with_constraints_too():
    y, gram = problems(50, 5, seed=1)
    free, found = answered(y, gram, epsilon=1.5, solver=Ascend()), kept(y, gram, 1.5)
    opposite = (free.value > 3.999) & (found.value > 3.999)
    assert opposite.sum() > 25
    np.testing.assert_array_less(0.98, (found.info.length / free.info.length)[opposite])


@pytest.mark.slow  # test_polytope has the best of all
def test_a_label_kept_by_constraint_beats_the_vertices_of_mad_argmax():
    y, gram = problems(50, 5, seed=4)
    inside = (EXAMPLES["keep_label"],)
    constrained = answered(y, gram, epsilon=0.9, solver=Ascend(constraints=inside))
    vertices = answered(y, gram, epsilon=0.9, solver=LineSearch(madjax.argmax_preserving))
    moved = constrained.feasible
    label = np.asarray(y).argmax(1)
    np.testing.assert_array_equal(constrained.y_tilde.argmax(1)[moved], label[moved])
    assert constrained.value.mean() > vertices.value.mean() + 0.2


def test_reach_stops_where_the_constraint_does():
    start, end = jnp.array([1.0, 0, 0]), jnp.array([0.0, 1, 0])
    point = reach(start, end, start, (partial(bound_confidence, most=0.3),))
    np.testing.assert_allclose(point, [0.7, 0.3, 0], atol=1e-5)
    assert (reach(start, end, start, ()) == end).all()


# --- through the other doors ----------------------------------------------------------------------


def test_perturb_takes_a_solver():
    module = nn.Dense(5)
    x = jax.random.normal(jax.random.key(0), (6, 3))
    w = module.init(jax.random.key(1), x)
    y = jax.nn.softmax(3 * jax.random.normal(jax.random.key(2), (6, 5)))
    solver = LineSearch(extreme_at_budget, constraints=(EXAMPLES["keep_label"],))
    got = madjax.perturb(module.apply, w, x, y, epsilon=0.7, solver=solver)
    gram = madjax.gram(module.apply, w, x)
    want = answered(y, gram, epsilon=0.7, solver=solver)
    np.testing.assert_allclose(jax.vmap(deviation)(got, y, gram), want.value, atol=1e-3)
    moved = (got != y).any(axis=1)
    assert moved.any()
    np.testing.assert_array_equal(got.argmax(1)[moved], y.argmax(1)[moved])


def test_a_defence_with_constraints_says_so_in_rows():
    plain = madjax.MAD().describe()
    assert plain["defense_variant"] == ""
    solver = Ascend(
        constraints=(partial(cap, most=0.9), bound_entropy),
        objective=opposition,
    )
    other = madjax.MAD(solver=solver).describe()
    assert other["defense"] == "mad"
    assert other["defense_variant"] == "ascend, opposition, cap(most=0.9), bound_entropy"
    said = {field: other[field] for field in ("solver", "oracle", "distance", "objective")}
    assert said == {
        "solver": "ascend",
        "oracle": "none",
        "distance": "l1",
        "objective": "opposition",
    }
    assert other["constraints"] == "cap(most=0.9), bound_entropy"


def halfway(y, gram, epsilon):
    """A solver that is a plain function: towards the uniform answer."""
    del gram
    return madjax.steps.step(y, jnp.full_like(y, 1 / y.size), epsilon)


def test_any_function_is_a_solver():
    y, gram = problem(jax.random.key(0), 4)
    np.testing.assert_array_equal(
        solve(y, gram, epsilon=0.3, solver=halfway), halfway(y, gram, 0.3)
    )
    np.testing.assert_array_equal(solve(y, gram, epsilon=0.0, solver=lambda *_: 1 - y), y)
    described = madjax.MAD(solver=halfway).describe()
    assert described["defense_variant"] == described["solver"] == "halfway"
    assert (described["defense"], described["oracle"], described["distance"]) == (
        "mad",
        "none",
        "none",
    )
    changed = madjax.config.override(
        madjax.Sweep("s", (madjax.Task("a", "b"),), (madjax.Defended(madjax.MAD()),)),
        "defenses.rule.solver=madjax.ablations.argmin",
    )
    assert changed.defenses[0].rule.solver is madjax.ablations.argmin


@pytest.mark.parametrize(
    ("solver", "keeps"),
    [
        (LineSearch(), False),
        (LineSearch(madjax.argmax_preserving), True),
        (LineSearch(constraints=(keep_label,)), True),
        (Ascend(constraints=(cap, partial(keep_label, margin=0.1))), True),
        (Ascend(constraints=(partial(keep_label, margin=-0.1),)), False),
        (Ascend(constraints=(partial(cap, most=0.5),)), False),
    ],
)
def test_a_defence_is_mad_argmax_where_every_label_is_kept(solver, keeps):
    assert solver.keeps_label is keeps
    assert madjax.MAD(solver=solver).name == ("mad_argmax" if keeps else "mad")


def top_k_set(v, k):
    return np.sort(np.asarray(jax.lax.top_k(v, k)[1]), axis=1)


def bin_of(v, y):
    return np.floor(10 * np.take_along_axis(v, y.argmax(axis=1)[:, None], axis=1))


@pytest.mark.parametrize(
    ("constraint", "kept", "solver"),
    [
        (keep_label, lambda v, y: v.argmax(axis=1), LineSearch),
        (keep_label, lambda v, y: v.argmax(axis=1), Ascend),
        (partial(keep_top_k, k=3), lambda v, y: top_k_set(v, 3), LineSearch),
        (keep_bin, bin_of, LineSearch),
    ],
    ids=["label", "label, ascend", "top k", "bin"],
)
def test_what_is_to_be_kept_is_kept_to_the_last_bit(constraint, kept, solver):
    """Where the constraint ends the way, which without it most answers go on."""
    y, gram = problems(200, 10, seed=11)
    free = answered(y, gram, epsilon=0.99)
    assert (kept(np.asarray(free.y_tilde), y) != kept(np.asarray(y), y)).any(axis=-1).mean() > 0.5
    found = answered(y, gram, epsilon=0.99, solver=solver(constraints=(constraint,)))
    np.testing.assert_array_equal(kept(found.y_tilde, y), kept(np.asarray(y), y))
    assert found.info.defended.all()


@pytest.mark.parametrize("solver", [LineSearch, Ascend])
def test_constraints_of_a_solver_are_several_functions(solver):
    assert solver(constraints=[keep_label]).constraints == (keep_label,)
    with pytest.raises(InputError, match="constraints is keep_label: give a tuple"):
        solver(constraints=keep_label)


@pytest.mark.parametrize("solver", ["ascend", None, Ascend])
def test_what_is_no_solver_is_named(solver):
    y, gram = problem(jax.random.key(0), 3)
    for call in (partial(solve, y, gram, epsilon=0.1), madjax.MAD):
        with pytest.raises(InputError, match=r"give madjax.LineSearch\(\), madjax.Ascend\(\)"):
            call(solver=solver)


def test_cells_that_ascend_run_on_several_devices():
    """LAPACK calls, as in `jnp.linalg.solve`, may never return there: nothing may need one."""
    y, gram = problems(100, 5)

    def cell(epsilon, shared):
        solver = jax.vmap(partial(solve, epsilon=epsilon, solver=Ascend()))
        return map_chunks(lambda query: solver(*query), shared, 50)

    run = sweep.over_cells(cell, mesh=sweep.make_mesh(), mapping=sweep.map_cells)
    answers = run(jnp.array([0.1, 0.5, 0.9, 1.5]), (y, gram))
    alone = answered(y[:50], gram[:50], epsilon=0.5, solver=Ascend())
    values = jax.vmap(deviation)(answers[1, :50], y[:50], gram[:50])
    np.testing.assert_allclose(values, alone.value, atol=1e-3)
