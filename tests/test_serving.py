"""The defence in one function and in a file: the same answers, alone or in a batch, anywhere."""

import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import madjax
from madjax import InputError


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x.astype(jnp.float32) / 255))
        x = nn.BatchNorm(use_running_average=True)(x)
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def networks():
    x = jax.random.randint(jax.random.key(0), (6, 8, 8, 1), 0, 256).astype(jnp.uint8)
    victim, surrogate = (jax.jit(Small().init)(jax.random.key(i), x) for i in (1, 2))
    return partial(Small().apply, victim), (Small().apply, surrogate), x


@pytest.mark.parametrize("layers", ["all", "last"])
@pytest.mark.parametrize("oracle", [madjax.extreme, madjax.argmax_preserving])
def test_defend_is_softmax_then_perturb(networks, layers, oracle):
    victim, surrogate, x = networks
    solver = madjax.LineSearch(oracle)
    predict = madjax.defend(victim, surrogate, epsilon=0.4, layers=layers, solver=solver)
    y = jax.nn.softmax(victim(x))
    want = madjax.perturb(*surrogate, x, y, epsilon=0.4, layers=layers, solver=solver)
    got = jax.jit(predict)(x)
    np.testing.assert_allclose(got, want, atol=1e-6)
    # Label-preserving targets may lie within the budget.
    spent = np.asarray(abs(got - y).sum(axis=1))
    assert spent.max() <= 0.4 + 1e-5
    assert (spent if oracle is madjax.extreme else spent.max()) == pytest.approx(0.4, abs=1e-5)
    for i in (0, 5):
        np.testing.assert_allclose(jax.jit(predict)(x[i : i + 1])[0], want[i], atol=1e-5)


class Normed(nn.Module):
    """A network whose answers do not change with the scale of its queries."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.Dense(8, use_bias=False)(x)
        return nn.Dense(5)(nn.relu(hidden / abs(hidden).max(axis=1, keepdims=True)))


@pytest.mark.parametrize("saved", [False, True])
def test_no_query_switches_the_defence_off(saved, tmp_path):
    """One that takes the Gram matrix out of float32 has the answer of G = I, and others theirs."""
    x = jax.random.normal(jax.random.key(0), (4, 6))
    victim, surrogate = (Normed().init(jax.random.key(i), x) for i in (1, 2))
    victim = partial(Normed().apply, victim)
    predict = partial(madjax.defend, victim, (Normed().apply, surrogate), epsilon=0.5)
    defended = predict()
    if saved:
        madjax.export(defended, tmp_path / "it", shape=(6,), dtype=jnp.float32)
        defended = madjax.load(tmp_path / "it")
    large = x.at[1].multiply(1.3e19)
    y = jax.nn.softmax(victim(large))
    np.testing.assert_allclose(y, jax.nn.softmax(victim(x)), atol=1e-5)
    with pytest.raises(InputError, match="the Gram matrix is not finite"):
        predict()(large)
    got = np.asarray(defended(large) if saved else jax.jit(defended)(large))
    plain = np.asarray(predict(layers="identity")(large))
    np.testing.assert_allclose(got[1], plain[1], atol=1e-6)
    np.testing.assert_allclose(abs(got - y).sum(axis=1), 0.5, atol=1e-5)
    others = np.array([0, 2, 3])
    np.testing.assert_allclose(got[others], predict()(x[others]), atol=1e-5)
    assert abs(got - plain)[others].max() > 0.1


def test_parameters_may_be_plain_numbers():
    params = {"w": np.eye(3, dtype=np.float32), "scale": 2.0, "classes": 3}
    x = jax.random.normal(jax.random.key(0), (2, 3))

    def scaled(params, x):
        return x @ (params["w"] * params["scale"])

    told = partial(madjax.defend, jnp.sin, epsilon=0.3, gram_method="jacrev", layers="identity")
    got = jax.jit(told((scaled, params)))(x)
    np.testing.assert_allclose(got, told((scaled, params))(x), atol=1e-6)
    with pytest.raises(InputError, match=r"the parameter \['scale'\] holds NaN or inf"):
        jax.jit(told((scaled, params | {"scale": np.inf})))(x)


def test_a_broken_surrogate_is_refused_before_it_is_compiled(networks, tmp_path):
    victim, (apply, params), x = networks
    broken = jax.tree.map(lambda a: a.at[(0,) * a.ndim].set(jnp.nan), params)
    predict = madjax.defend(victim, (apply, broken), epsilon=0.4, layers="last")
    message = r"\['batch_stats'\]\['BatchNorm_0'\]\['mean'\] holds NaN"
    with pytest.raises(InputError, match=message):
        jax.jit(predict)(x)
    with pytest.raises(InputError, match=message):
        madjax.export(predict, tmp_path / "it", shape=x.shape[1:])
    assert not (tmp_path / "it").exists()


def test_a_file_answers_batches_of_any_size_without_the_models_code(networks, tmp_path):
    victim, surrogate, x = networks
    solver = madjax.LineSearch(madjax.argmax_preserving)
    predict = madjax.defend(victim, surrogate, epsilon=0.4, solver=solver)
    path = tmp_path / "predict.jaxexport"
    madjax.export(predict, path, shape=x.shape[1:])
    loaded = madjax.load(path)
    for n in (1, 6):
        np.testing.assert_allclose(loaded(x[:n]), predict(x[:n]), atol=1e-6)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "want.npy", predict(x))
    # Neither madjax nor Flax is needed, JAX alone runs it.
    code = """
import sys, jax, numpy as np
sys.modules["madjax"] = sys.modules["flax"] = None
exported = jax.export.deserialize(bytearray(open("predict.jaxexport", "rb").read()))
assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
np.testing.assert_allclose(exported.call(np.load("x.npy")), np.load("want.npy"), atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def linear(w, x):
    return x @ w


def temporary(function, *shapes):
    """Bytes that a compiled function takes besides its arguments and results."""
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("solver", "k"),
    [
        pytest.param(madjax.LineSearch(madjax.argmax_preserving), 20, marks=pytest.mark.slow),
        (madjax.LineSearch(madjax.argmax_preserving), 60),
        pytest.param(madjax.Ascend(), 10, marks=pytest.mark.slow),
    ],
)
def test_memory_bounds_the_search(solver, k):
    x, y = jax.ShapeDtypeStruct((300, k), jnp.float32), jax.ShapeDtypeStruct((300, k), jnp.float32)
    grams = 4 * 300 * k * k
    options = {"solver": solver, "layers": "identity", "epsilon": 0.5}

    def perturbed(memory, x, y):
        return madjax.perturb(linear, jnp.eye(k), x, y, memory=memory, **options)

    asked = 2**24
    assert temporary(partial(perturbed, asked), x, y) < asked + 3 * grams
    assert temporary(partial(perturbed, None), x, y) > asked + 3 * grams


def test_memory_holds_in_a_file_whatever_the_batch(networks, tmp_path):
    victim, surrogate, x = networks
    took, path, memory = {}, tmp_path / "predict.jaxexport", 2**22
    for chunk in (None, 2000):
        bounds = {"memory": memory} if chunk is None else {"chunk": chunk}
        predict = madjax.defend(victim, surrogate, epsilon=0.4, **bounds)
        madjax.export(predict, path, shape=x.shape[1:], platforms=("cpu",))
        call = jax.export.deserialize(bytearray(path.read_bytes())).call
        took[chunk] = temporary(call, jax.ShapeDtypeStruct((2000, 8, 8, 1), jnp.uint8))
    fixed = 2000 * 4 * (3 * 5 * 5 + 64)  # Gram matrices and images
    assert took[None] < memory + fixed < took[2000]
    many = jnp.tile(x, (300, 1, 1, 1))[:1777]
    np.testing.assert_allclose(madjax.load(path)(many)[-6:], predict(many[-6:]), atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.4, np.array([0.1, 0.4, 0.7])])
def test_a_file_answers_no_queries_with_no_answers(networks, tmp_path, epsilon):
    victim, surrogate, x = networks
    predict = madjax.defend(victim, surrogate, epsilon=epsilon, layers="last")
    madjax.export(predict, tmp_path / "a", shape=x.shape[1:], platforms=("cpu",))
    answers = madjax.load(tmp_path / "a")(x[:0])
    assert answers.shape == predict(x[:0]).shape
    assert answers.dtype == jnp.float32


def test_bad_files_and_queries_are_named(networks, tmp_path):
    victim, surrogate, x = networks
    predict = madjax.defend(victim, surrogate, epsilon=0.4, layers="last")
    with pytest.raises(InputError, match="platforms is 'cpu,abacus': choose among cpu"):
        madjax.export(predict, tmp_path / "a", shape=(8, 8, 1), platforms=("cpu", "abacus"))
    with pytest.raises(InputError, match="cannot be read"):
        madjax.load(tmp_path / "a")
    (tmp_path / "a").write_text("no export")
    with pytest.raises(InputError, match="is not an exported function"):
        madjax.load(tmp_path / "a")
    madjax.export(predict, tmp_path / "a", shape=(8, 8, 1), platforms=("cuda",))
    with pytest.raises(InputError, match="runs on cuda, not on cpu: export it again"):
        madjax.load(tmp_path / "a")
    madjax.export(predict, tmp_path / "a", shape=(8, 8, 1), platforms="cpu")
    loaded = madjax.load(tmp_path / "a")
    for wrong in (x[0], x.astype(jnp.float32), x[:, :4]):
        with pytest.raises(InputError, match=r"takes uint8 queries \[B, 8, 8, 1\], not"):
            loaded(wrong)


def test_a_file_takes_posteriors_of_a_victim_elsewhere(networks, tmp_path):
    """A victim in NumPy: the answers are those of perturb, for batches of any size."""
    victim, surrogate, x = networks
    path = tmp_path / "poison.jaxexport"
    poison = partial(madjax.perturb, *surrogate, epsilon=0.4)
    options = {"posteriors": True, "classes": 5, "platforms": ("cpu",)}
    madjax.export(poison, path, shape=x.shape[1:], **options)
    loaded = madjax.load(path)
    y = np.asarray(jax.nn.softmax(victim(x)), np.float64)
    for n in (1, 6):
        np.testing.assert_allclose(
            loaded(np.asarray(x[:n]), y[:n]), poison(x[:n], y[:n]), atol=1e-5
        )
    assert loaded(x[:0], y[:0]).shape == (0, 5)
    for given, words in (
        ((x,), r"takes posteriors \[B, 5\] too: for 6 queries it was given no others"),
        ((x, y[:3]), r"takes posteriors \[B, 5\] too: for 6 queries it was given \[\[3, 5\]\]"),
        ((x, y[:, :4] / y[:, :4].sum(1, keepdims=True)), r"given \[\[6, 4\]\]"),
        ((x, np.log(y)), "y is no posterior"),
    ):
        with pytest.raises(InputError, match=words):
            loaded(*given)


def test_a_file_that_takes_no_posteriors_says_so(networks, tmp_path):
    victim, surrogate, x = networks
    path = tmp_path / "predict.jaxexport"
    predict = madjax.defend(victim, surrogate, epsilon=0.4, layers="last")
    for options in ({"posteriors": True}, {"classes": 5}):
        with pytest.raises(InputError, match="needs posteriors=True and the number of classes"):
            madjax.export(predict, path, shape=x.shape[1:], **options)
    madjax.export(predict, path, shape=x.shape[1:], platforms=("cpu",))
    with pytest.raises(InputError, match=r"takes queries alone: for 6 .* given \[\[6, 5\]\]"):
        madjax.load(path)(x, jax.nn.softmax(victim(x)))
