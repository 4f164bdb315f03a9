"""One quantity, several ways: structured == jacrev == G G' by hand; last layer == closed form."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from madjax import Classifier, InputError, LeNet, gram
from madjax.datasets import MNIST_FAMILY


class Mixed(nn.Module):
    """Strided, padded, dilated convolutions, a dense layer over positions, layers without bias."""

    classes: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(5, (3, 3), strides=2, padding="SAME")(x))
        x = nn.tanh(nn.Conv(6, (3, 2), padding=((1, 0), (0, 1)), use_bias=False)(x))
        x = nn.tanh(nn.Conv(6, (2, 2), kernel_dilation=2, padding="VALID")(x))
        x = nn.tanh(nn.Dense(7)(x.reshape(x.shape[0], -1, x.shape[-1])))
        x = x.mean(axis=1)
        x = nn.tanh(nn.Dense(8, use_bias=False)(x))
        return nn.Dense(self.classes)(x)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm()(nn.Dense(5)(x.reshape(x.shape[0], -1))))


class Tied(nn.Module):
    """One dense layer applied twice: its two gradients add before the product."""

    def setup(self):
        self.inner = nn.Dense(4)
        self.head = nn.Dense(3)

    def __call__(self, x):
        return self.head(nn.tanh(self.inner(nn.tanh(self.inner(x)))))


def by_hand(apply, params, x):
    """G G' from K separate gradients of one example, in float64."""
    gradient = jax.jit(jax.grad(lambda p, e, k: jax.nn.log_softmax(apply(p, e[None])[0])[k]))
    classes = jax.eval_shape(apply, params, x).shape[-1]
    grams = []
    for example in x:
        rows = []
        for k in range(classes):
            g = gradient(params, example, k)
            leaves = [np.asarray(v, np.float64).ravel() for v in jax.tree.leaves(g)]
            rows.append(np.concatenate(leaves))
        grams.append(np.stack(rows) @ np.stack(rows).T)
    return np.stack(grams)


def close(got, want, tolerance=1e-5):
    scale = np.abs(want).max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(got / scale, want / scale, atol=tolerance)


@pytest.fixture(scope="module")
def mixed():
    x = jax.random.normal(jax.random.key(0), (5, 9, 8, 2))
    return Mixed(), jax.jit(Mixed().init)(jax.random.key(1), x), x


@pytest.fixture(scope="module")
def lenet():
    classifier = Classifier(LeNet(10), MNIST_FAMILY.preprocess, (28, 28, 1))
    x = jax.random.randint(jax.random.key(0), (6, 28, 28, 1), 0, 256).astype(jnp.uint8)
    return classifier, jax.jit(classifier.init)(jax.random.key(1)), x


def test_structured_jacrev_and_explicit_gradients_agree(mixed):
    model, params, x = mixed
    want = by_hand(model.apply, params, x)
    close(gram(model.apply, params, x, method="structured"), want)
    close(gram(model.apply, params, x, method="jacrev"), want)


def test_lenet_structured_is_jacrev(lenet):
    classifier, params, x = lenet
    reference = gram(classifier.apply, params, x, method="jacrev")
    close(gram(classifier.apply, params, x, method="structured"), reference)


def test_gram_annihilates_the_surrogates_posterior(lenet):
    classifier, params, x = lenet
    p = classifier.posterior(params, x)
    for layers in ("all", "last"):
        m = gram(classifier.apply, params, x, layers=layers)
        assert m.dtype == jnp.float32
        assert m.shape == (6, 10, 10)
        relative = jnp.einsum("bkl,bl->bk", m, p) / jnp.abs(m).max()
        assert jnp.abs(relative).max() < 1e-6
        np.testing.assert_array_equal(m, m.mT)
        assert np.linalg.eigvalsh(np.asarray(m, np.float64)).min() > -1e-5 * m.max()


def test_last_layer_is_the_closed_form_and_its_jacobian(lenet):
    classifier, params, x = lenet
    got = gram(classifier.apply, params, x, layers="last")
    close(got, gram(classifier.apply, params, x, layers="last", method="jacrev"))
    # The features that LeNet's last dense layer sees, recomputed from its weights.
    logits, p = classifier.apply(params, x), classifier.posterior(params, x)
    head = params["params"]["Dense_1"]
    h = jnp.linalg.lstsq(head["kernel"].T, (logits - head["bias"][None]).T)[0].T
    assert jnp.all(jnp.square(h).sum(-1) <= jnp.trace(got, axis1=1, axis2=2))
    centred = np.eye(10) - np.asarray(p)[:, None, :]
    shape = centred @ centred.mT
    ratio = np.asarray(got) / shape
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-4)


def test_chunks_change_nothing(mixed):
    model, params, x = mixed
    whole = gram(model.apply, params, x)
    for chunk in (1, 2, 3, 100):
        close(gram(model.apply, params, x, chunk=chunk), np.asarray(whole), 1e-6)
        close(gram(model.apply, params, x, chunk=chunk, method="jacrev"), np.asarray(whole))


def test_runs_inside_jit_and_with_bare_params(mixed):
    model, params, x = mixed
    bare = jax.jit(lambda p, x: gram(lambda p, x: model.apply({"params": p}, x), p, x))
    close(bare(params["params"], x), np.asarray(gram(model.apply, params, x)), 1e-6)


def test_a_layer_it_cannot_tap_falls_back_and_says_which_parameter():
    x = jax.random.normal(jax.random.key(0), (3, 6))
    model = Normalised()
    params = model.init(jax.random.key(1), x)
    with pytest.warns(UserWarning, match=r"LayerNorm_0.*jacrev"):
        m = gram(model.apply, params, x)
    close(m, by_hand(model.apply, params, x))
    with pytest.raises(InputError, match="LayerNorm_0"):
        gram(model.apply, params, x, method="structured")


def test_a_parameter_used_twice_is_not_mistaken_for_two():
    x = jax.random.normal(jax.random.key(0), (3, 4))
    model = Tied()
    params = model.init(jax.random.key(1), x)
    with pytest.warns(UserWarning, match=r"inner.*more than once"):
        m = gram(model.apply, params, x)
    close(m, by_hand(model.apply, params, x))


def test_state_beside_the_parameters_is_no_parameter():
    class WithState(nn.Module):
        @nn.compact
        def __call__(self, x):
            shift = self.variable("batch_stats", "shift", lambda: jnp.ones(4))
            return nn.Dense(3)(nn.tanh(nn.Dense(4)(x) + shift.value[None]))

    x = jax.random.normal(jax.random.key(0), (3, 4))
    model = WithState()
    variables = model.init(jax.random.key(1), x)
    want = by_hand(lambda p, x: model.apply({**variables, "params": p}, x), variables["params"], x)
    for collections in (variables, FrozenDict(variables)):
        for method in ("structured", "jacrev"):
            close(gram(model.apply, collections, x, method=method), want)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": "first"}, "layers is 'first'"),
        ({"method": "magic"}, "method is 'magic'"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_unknown_options_are_named(mixed, options, words):
    model, params, x = mixed
    with pytest.raises(InputError, match=words):
        gram(model.apply, params, x, **options)


def test_last_layer_needs_a_dense_head():
    def apply(params, x):
        return x @ params

    with pytest.raises(InputError, match="layers='last' needs"):
        gram(apply, jnp.ones((4, 3)), jnp.ones((2, 4)), layers="last")
    x = jnp.ones((2, 4))
    params = OtherProduct().init(jax.random.key(0), x)
    with pytest.raises(InputError, match="layers='last' needs"):
        gram(OtherProduct().apply, params, x, layers="last")


def test_any_function_has_a_gram_by_jacrev():
    w = jax.random.normal(jax.random.key(0), (4, 3))
    x = jax.random.normal(jax.random.key(1), (2, 4))
    apply = jnp.matmul
    m = gram(lambda w, x: apply(x, w), w, x, method="jacrev")
    p = jax.nn.softmax(x @ w)
    centred = np.eye(3) - np.asarray(p)[:, None, :]
    want = np.square(x).sum(-1)[:, None, None] * (centred @ centred.mT)
    close(m, np.asarray(want))


class LowRank(nn.Module):
    """A dense layer with more parameters in its own scope."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4)
        nn.share_scope(self, dense)
        a = self.param("a", nn.initializers.normal(), (x.shape[-1], 2))
        b = self.param("b", nn.initializers.normal(), (2, 4))
        return dense(x) + x @ a @ b


class Decoder(nn.Module):
    """A kernel that is read once by its layer, and once behind its back."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4)
        hidden = nn.tanh(dense(x))
        return nn.Dense(3)(hidden @ dense.variables["params"]["kernel"].T)


class OtherProduct(nn.Module):
    """A dense layer that is no product of inputs and kernel."""

    @nn.compact
    def __call__(self, x):
        def half(a, b, dims, **kwargs):
            return jax.lax.dot_general(a, b / 2, dims, **kwargs)

        return nn.Dense(3, dot_general=half)(x)


class Folded(nn.Module):
    """Positions folded into the batch."""

    @nn.compact
    def __call__(self, x):
        b, p, f = x.shape
        y = nn.tanh(nn.Dense(4)(x.reshape(b * p, f)))
        return nn.Dense(3)(y.reshape(b, p, 4).sum(axis=1))


class TimeMajor(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.tanh(nn.Dense(4)(x.transpose(1, 0, 2)))
        return nn.Dense(3)(y.sum(axis=0))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.tanh(nn.Dense(x.shape[-1])(x)), None

        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(3)(scan()(x, None)[0])


FLAT, SEQUENCE = (5,), (3, 5)


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (LowRank(), FLAT),
        (Decoder(), FLAT),
        (OtherProduct(), FLAT),
        (Folded(), SEQUENCE),
        (TimeMajor(), SEQUENCE),
        (Scanned(), FLAT),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_unusual_layers_fall_back_and_stay_right(model, shape, batch):
    x = jax.random.normal(jax.random.key(0), (batch, *shape))
    params = jax.jit(model.init)(jax.random.key(1), x)
    with pytest.warns(UserWarning, match="taking method='jacrev'"):
        m = gram(model.apply, params, x)
    close(m, by_hand(model.apply, params, x))


def test_ways_to_call_a_model_that_change_nothing(mixed):
    model, params, x = mixed
    want = np.asarray(gram(model.apply, params, x, method="structured"))
    close(gram(jax.jit(model.apply), params, x, method="structured"), want, 1e-6)
    close(gram(model.apply, FrozenDict(params), x, method="structured"), want, 1e-6)

    class ByName(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(inputs=x)

    x = jax.random.normal(jax.random.key(0), (3, 4))
    params = ByName().init(jax.random.key(1), x)
    close(gram(ByName().apply, params, x, method="structured"), by_hand(ByName().apply, params, x))


def test_one_dimensional_convolution_of_images_falls_back():
    model = nn.Sequential([nn.Conv(4, 3), lambda x: x.mean((1, 2)), nn.Dense(3)])
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 2))
    params = model.init(jax.random.key(1), x)
    with pytest.warns(UserWarning, match="jacrev"):
        m = gram(model.apply, params, x)
    close(m, by_hand(model.apply, params, x))


def test_no_queries_have_no_grams(mixed):
    model, params, x = mixed
    for layers in ("all", "last"):
        assert gram(model.apply, params, x[:0], layers=layers).shape == (0, 4, 4)
