"""One quantity, several ways: structured == jacrev == G G' by hand; last layer == closed form."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

from madjax import Classifier, InputError, LeNet, coverage, defend, gram, perturb
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
    assert set(coverage(model.apply, params, x).values()) == {"structured"}


@pytest.mark.smoke
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
    close(gram(model.apply, params, x, chunk=2), np.asarray(whole), 1e-6)  # of five queries
    close(gram(model.apply, params, x, chunk=2, method="jacrev"), np.asarray(whole))


@pytest.mark.slow
def test_memory_is_bounded_by_classes_at_a_time(mixed):
    """The same answer whatever fits, and the compiled program holds no more than was asked for."""
    _, _, x = mixed
    model = Mixed(classes=40)
    params = jax.jit(model.init)(jax.random.key(1), x)
    apply = model.apply
    whole = np.asarray(gram(apply, params, x))

    def temporary(memory):
        program = jax.jit(partial(gram, apply, memory=memory))
        analysis = program.lower(params, x).compile().memory_analysis()
        close(program(params, x), whole)
        return analysis.temp_size_in_bytes

    with pytest.raises(InputError) as refusal:
        gram(apply, params, x, memory=1)
    least = int(str(refusal.value).split()[-1])
    for memory in (least, 2 * least, 8 * least):
        assert temporary(memory) <= memory
    # Without a bound it would hold more: the test can fail.
    assert temporary(None) > 2 * least


def test_runs_inside_jit_and_with_bare_params(mixed):
    model, params, x = mixed
    bare = jax.jit(lambda p, x: gram(lambda p, x: model.apply({"params": p}, x), p, x))
    close(bare(params["params"], x), np.asarray(gram(model.apply, params, x)), 1e-6)


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
        ({"memory": 100}, "memory is 100 bytes: one query of this model takes about"),
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


class Normalisations(nn.Module):
    """Every normalisation, scales and biases that are not their first values."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.tanh(nn.BatchNorm(use_running_average=True, bias_init=nn.initializers.ones)(x))
        x = nn.GroupNorm(2, scale_init=nn.initializers.normal(1))(x)
        x = nn.InstanceNorm(use_bias=False, scale_init=nn.initializers.normal(1))(x)
        x = nn.tanh(nn.Conv(6, (2, 2), use_bias=False)(x))
        x = nn.BatchNorm(use_scale=False)(x, True).mean((1, 2))
        x = nn.LayerNorm(scale_init=nn.initializers.zeros, bias_init=nn.initializers.normal(1))(x)
        return nn.Dense(3)(nn.RMSNorm()(nn.Dense(5)(x)))


class Groups(nn.Module):
    """Grouped, depthwise and one-dimensional convolutions."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(6, (3, 3), strides=2, feature_group_count=2)(x))
        x = nn.tanh(nn.Conv(12, (2, 2), feature_group_count=6, padding="VALID")(x))
        x = x.reshape(x.shape[0], -1, 12)
        x = nn.tanh(nn.Conv(4, (3,), padding=2, kernel_dilation=(2,))(x))
        return nn.Dense(3)(nn.tanh(nn.Conv(4, 2, strides=(2,))(x)).mean(axis=1))


class Transformer(nn.Module):
    """Tokens, places (a bare parameter), attention, a head that reads the first token."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 4)(tokens)
        x = x + self.param("places", nn.initializers.normal(1), (1, *x.shape[1:]))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        x = nn.DenseGeneral((2, 3))(x)
        return nn.Dense(3)(nn.tanh(nn.DenseGeneral(5, axis=(-2, -1), use_bias=False)(x))[:, 0])


class Tied(nn.Module):
    """One dense layer applied twice: its two gradients add before the product."""

    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(x.shape[-1])
        return nn.Dense(3)(nn.tanh(inner(nn.tanh(inner(x)))))


class TiedTokens(nn.Module):
    """Tokens are read out by the table that they came from."""

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(5, 4)
        return table.attend(nn.tanh(nn.Dense(4)(table(tokens).mean(axis=1))))


class OtherAxes(nn.Module):
    """Features that are not on the last axis, of the same size."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(feature_axes=1, scale_init=nn.initializers.normal(1))(x)
        x = nn.tanh(nn.BatchNorm(axis=1, use_running_average=True)(x))
        return nn.Dense(3)(nn.DenseGeneral(4, axis=1)(x).reshape(x.shape[0], -1))


class Uncommon(nn.Module):
    """Known layers in forms that have no terms."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3, 3), padding="CIRCULAR")(x))
        x = nn.tanh(nn.Conv(4, (2, 2), padding=1, input_dilation=2)(x))
        x = nn.GroupNorm(2)(x, mask=jnp.ones(x.shape, bool))
        return nn.Dense(3)(nn.ConvTranspose(2, (2, 2))(x).mean((1, 2)))


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


class Rematerialised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.remat(nn.Dense)(4)(x)))


class Repeated(nn.Module):
    """A layer whose parameters a loop closes over."""

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(x.shape[-1])
        if self.is_initializing():
            dense(x)
        return nn.Dense(3)(jax.lax.fori_loop(0, 2, lambda _, y: nn.tanh(dense(y)), x))


FLAT, SEQUENCE, IMAGES, TOKENS = (5,), (3, 5), (9, 8, 2), (4,)
DENSE = {"Dense_0/kernel", "Dense_0/bias"}
ZOO = [
    (Normalisations(), IMAGES, set()),
    (Groups(), IMAGES, set()),
    (Transformer(), TOKENS, {"places"}),
    (Tied(), FLAT, DENSE),
    (TiedTokens(), TOKENS, {"Embed_0/embedding"}),
    (
        OtherAxes(),
        (4, 4),
        {
            f"{name}_0/{part}"
            for name, part in [
                ("LayerNorm", "scale"),
                ("LayerNorm", "bias"),
                ("BatchNorm", "scale"),
                ("BatchNorm", "bias"),
                ("DenseGeneral", "kernel"),
                ("DenseGeneral", "bias"),
            ]
        },
    ),
    (
        Uncommon(),
        IMAGES,
        {
            f"{name}/{part}"
            for name in ("Conv_0", "Conv_1", "ConvTranspose_0")
            for part in ("kernel", "bias")
        }
        | {"GroupNorm_0/scale", "GroupNorm_0/bias"},
    ),
    (LowRank(), FLAT, {"kernel", "bias", "a", "b"}),
    (Decoder(), FLAT, DENSE),
    (OtherProduct(), FLAT, DENSE),
    (Folded(), SEQUENCE, DENSE),
    (TimeMajor(), SEQUENCE, DENSE),
    (Scanned(), FLAT, {"ScanBlock_0/Dense_0/kernel", "ScanBlock_0/Dense_0/bias"}),
    (Rematerialised(), FLAT, {"CheckpointDense_0/kernel", "CheckpointDense_0/bias"}),
    (Repeated(), FLAT, DENSE),
]


@pytest.mark.filterwarnings("ignore:gram. .* go by jacrev")
@pytest.mark.parametrize(
    ("model", "shape", "by_jacrev"),
    ZOO,
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_no_parameter_is_dropped_or_counted_twice(model, shape, by_jacrev):
    """Each goes by its layer or by jacrev, which it is is known, and the sum is right."""
    # A batch may look like positions, so one that is as long as a sequence is among them.
    batch = 3 if shape == SEQUENCE else 2
    x = jax.random.normal(jax.random.key(0), (batch, *shape))
    if shape == TOKENS:
        x = jax.random.randint(jax.random.key(0), (batch, *shape), 0, 5)
    variables = jax.jit(model.init)(jax.random.key(1), x)
    if "batch_stats" in variables:
        stats = jax.tree.map(lambda v: v + 0.5, variables["batch_stats"])
        variables = {**variables, "batch_stats": stats}
    how = coverage(model.apply, variables, x)
    names = jax.tree.leaves_with_path(variables["params"])
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in names}
    assert how.keys() == names
    assert {name for name, way in how.items() if way != "structured"} == by_jacrev

    want = by_hand(lambda p, x: model.apply({**variables, "params": p}, x), variables["params"], x)
    method = "auto" if by_jacrev else "structured"
    close(gram(model.apply, variables, x, method=method), want, 3e-5)
    if by_jacrev:
        with pytest.raises(InputError, match=f"parameter ({'|'.join(by_jacrev)}): "):
            gram(model.apply, variables, x, method="structured")


def test_slow_parameters_are_named_where_they_are_many():
    x = jax.random.normal(jax.random.key(0), (3, 4))
    params = Tied().init(jax.random.key(1), x)
    with pytest.warns(UserWarning, match=r"20 of 35 .* Dense_0/bias: it is used more than once"):
        gram(Tied().apply, params, x)


def test_two_networks_in_one_function_keep_their_layers_apart():
    first, second = nn.Dense(4), nn.Dense(3)
    x = jax.random.normal(jax.random.key(0), (3, 5))
    params = {"a": first.init(jax.random.key(1), x), "b": second.init(jax.random.key(2), x[:, :4])}

    def apply(params, x):
        return second.apply(params["b"], nn.tanh(first.apply(params["a"], x)))

    close(gram(apply, params, x, method="structured"), by_hand(apply, params, x))


def test_batch_statistics_of_the_queries_are_refused():
    class Training(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x)))

    x = jax.random.normal(jax.random.key(0), (3, 5))
    variables = Training().init(jax.random.key(1), x)

    def apply(variables, x):
        return Training().apply(variables, x, mutable=["batch_stats"])[0]

    for call in (gram, coverage):
        with pytest.raises(InputError, match="BatchNorm_0 is a BatchNorm in training mode"):
            call(apply, variables, x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_models_are_contracted_in_float32(dtype):
    """Against the contraction in float64 of the gradients that the half precision model has."""

    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.tanh(nn.Dense(512, dtype=dtype)(x))
            return nn.Dense(3, dtype=dtype)(x)

    x = jax.random.normal(jax.random.key(0), (2, 300))
    params = Half().init(jax.random.key(1), x)
    m = gram(Half().apply, params, x, method="structured")
    assert m.dtype == jnp.float32
    # The gradients themselves have the error of the model's own arithmetic; sums would add more.
    close(m, by_hand(Half().apply, params, x), 4 * float(jnp.finfo(dtype).eps))
    head = gram(Half().apply, params, x, layers="last")
    p = jax.nn.softmax(Half().apply(params, x).astype(jnp.float32))
    assert jnp.abs(jnp.einsum("bkl,bl->bk", head, p)).max() < 1e-5 * jnp.abs(head).max()


def test_a_confident_surrogate_keeps_its_digits():
    """The gradient of a class with p near 1 is the small difference of large ones."""

    class Sure(nn.Module):
        @nn.compact
        def __call__(self, x):
            return 40 * nn.Dense(4)(nn.tanh(nn.Dense(6)(x)))

    x = 3 * jax.random.normal(jax.random.key(0), (6, 5))
    params = Sure().init(jax.random.key(1), x)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda v: v.astype(jnp.float64), params)
        wide = lambda p, x: Sure().apply(p, x)  # noqa: E731
        want = by_hand(wide, exact, x.astype(jnp.float64))
        p = np.asarray(jax.nn.softmax(wide(exact, x.astype(jnp.float64))))
    assert p.max() > 1 - 1e-5
    got = np.asarray(gram(Sure().apply, params, x))
    scale = np.sqrt(np.einsum("bk,bl->bkl", *2 * [np.einsum("bkk->bk", want)]))
    np.testing.assert_allclose(got / scale, want / scale, atol=2e-4)


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


def test_one_class_has_no_gradient_and_two_have_one():
    x = jax.random.normal(jax.random.key(0), (3, 4))
    for classes in (1, 2):
        model = nn.Dense(classes)
        params = model.init(jax.random.key(1), x)
        for layers in ("all", "last"):
            m = gram(model.apply, params, x, layers=layers)
            assert m.shape == (3, classes, classes)
            assert (jnp.abs(m).max() > 0) == (classes > 1)
        np.testing.assert_array_equal(
            gram(model.apply, params, x, layers="identity"), np.stack(3 * [np.eye(classes)])
        )


# --- models as users have them --------------------------------------------------------------------


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(6)(x)))


@pytest.fixture(scope="module")
def two():
    x = jax.random.normal(jax.random.key(0), (3, 5))
    params = Two().init(jax.random.key(1), x)
    return params, x, by_hand(Two().apply, params, x)


def per_example(params, x):
    return jax.vmap(lambda one: Two().apply(params, one))(x)


def per_example_in_batches(params, x):
    return jax.lax.map(lambda one: Two().apply(params, one[None])[0], x)


@pytest.mark.parametrize("apply", [per_example, per_example_in_batches])
def test_layers_inside_a_transformation_go_by_jacrev(two, apply):
    params, x, want = two
    with pytest.warns(UserWarning, match="Dense_0/bias: its layer runs inside another"):
        close(gram(apply, params, x), want)
    assert set(coverage(apply, params, x).values()) == {
        "its layer runs inside another transformation"
    }
    with pytest.raises(InputError, match="runs inside another transformation"):
        gram(apply, params, x, method="structured")


@pytest.mark.filterwarnings("ignore:gram. .* go by jacrev")
@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell, nn.SimpleCell])
def test_recurrent_networks(cell):
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.RNN(cell(3))(x)[:, -1])

    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    params = Recurrent().init(jax.random.key(1), x)
    close(gram(Recurrent().apply, params, x), by_hand(Recurrent().apply, params, x))
    how = coverage(Recurrent().apply, params, x)
    assert {name for name, way in how.items() if way == "structured"} == DENSE
    h = nn.RNN(cell(3)).apply({"params": {"cell": params["params"][f"{cell.__name__}_0"]}}, x)
    p = jax.nn.softmax(Recurrent().apply(params, x))
    centred = np.eye(4) - np.asarray(p)[:, None, :]
    want = np.square(h[:, -1]).sum(-1)[:, None, None] * (centred @ centred.mT)
    close(gram(Recurrent().apply, params, x, layers="last"), np.asarray(want))


jitted = jax.jit(Two().apply)


def inner_jit(params, x):
    return jitted(params, x)


def inner_jit_of_a_half(params, x):
    return jax.jit(lambda p, x: jitted(p, x / 2))(params, x) * 2


@pytest.mark.parametrize("apply", [inner_jit, inner_jit_of_a_half])
@pytest.mark.parametrize("traced_before", [False, True])
def test_jit_inside_the_model_is_looked_through(two, apply, traced_before):
    params, x, _ = two
    if traced_before:  # from then on JAX does not run the Python of the model
        apply(params, x)
        jax.eval_shape(apply, params, x[:1])
    want = by_hand(apply, params, x)
    close(gram(apply, params, x, method="structured"), want)
    assert set(coverage(apply, params, x).values()) == {"structured"}
    last = gram(apply, params, x, layers="last", method="jacrev")
    close(gram(apply, params, x, layers="last"), np.asarray(last))


MASK = jnp.array([True, True, False, True])
TAILS = {
    "temperature": lambda z: z / 3,
    "log-softmax": jax.nn.log_softmax,
    "mask": lambda z: jnp.where(MASK[None], z, -1e9),
    "cast": lambda z: z.astype(jnp.float32),
    "centred": lambda z: z - z.mean(-1, keepdims=True),
    "capped": lambda z: 5 * jnp.tanh(z / 5),
    "jitted": jax.jit(lambda z: 2 * z),
}


@pytest.mark.parametrize("name", TAILS)
def test_what_follows_the_last_layer_without_weights_is_looked_through(two, name):
    params, x, _ = two

    def apply(params, x):
        return TAILS[name](Two().apply(params, x))

    h = nn.relu(nn.Dense(6).apply({"params": params["params"]["Dense_1"]}, x))
    kernel, bias = (params["params"]["Dense_0"][part] for part in ("kernel", "bias"))

    def log_p(kernel, h):
        return jax.nn.log_softmax(TAILS[name]((h @ kernel + bias)[None])[0])

    g = jax.vmap(jax.jacrev(log_p), in_axes=(None, 0))(kernel, h).reshape(3, 4, -1)
    want = np.asarray(g) @ np.asarray(g).mT
    close(gram(apply, params, x, layers="last"), want)
    close(gram(apply, params, x, layers="last", method="jacrev"), want)


def test_a_half_precision_head_that_is_cast_is_the_closed_form():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, dtype=jnp.bfloat16)(x).astype(jnp.float32)

    x = jax.random.normal(jax.random.key(0), (3, 5)).astype(jnp.bfloat16)
    params = Half().init(jax.random.key(1), x)
    p = np.asarray(jax.nn.softmax(Half().apply(params, x)), np.float64)
    centred = np.eye(4) - p[:, None, :]
    want = np.square(np.asarray(x, float)).sum(-1)[:, None, None] * (centred @ centred.mT)
    close(gram(Half().apply, params, x, layers="last"), want)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x) + nn.Conv(4, (1,))(x[:, None])[:, 0]


class LearntTemperature(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x) * self.param("t", nn.initializers.ones, (1, 1))


class ConvolutionalHead(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(4, (1,))(nn.Dense(4)(x)[:, None])[:, 0]


class Pairs(nn.Module):
    """Logits are differences of more outputs than there are classes."""

    @nn.compact
    def __call__(self, x):
        z = nn.Dense(8)(x)
        return z[:, :4] - z[:, 4:]


@pytest.mark.parametrize("model", [Residual, LearntTemperature, ConvolutionalHead, Pairs])
def test_a_last_layer_that_is_not_the_last_is_refused(model):
    x = jax.random.normal(jax.random.key(0), (3, 5))
    params = model().init(jax.random.key(1), x)
    for method in ("auto", "jacrev"):
        with pytest.raises(InputError, match="layers='last' needs"):
            gram(model().apply, params, x, layers="last", method=method)


class Mixing(nn.Module):
    """Layers whose answers to a query depend on the batch."""

    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        if self.kind == "BatchNorm":
            x = nn.BatchNorm(use_running_average=False)(x)
        elif self.kind == "BatchNorm called so":
            x = nn.BatchNorm()(x, False)
        elif self.kind == "Dropout called so":
            x = nn.Dropout(0.5)(x, deterministic=False)
        else:
            x = nn.Dropout(0.5, deterministic=False)(x)
        return nn.Dense(3)(x)


@pytest.mark.parametrize(
    "kind", ["BatchNorm", "BatchNorm called so", "Dropout", "Dropout called so"]
)
def test_layers_that_mix_queries_are_refused_on_every_path(kind):
    x = jax.random.normal(jax.random.key(0), (3, 5))
    drawn = jax.random.split(jax.random.key(1))
    params = Mixing(kind).init({"params": drawn[0], "dropout": drawn[1]}, x)

    def apply(params, x):
        options = {"rngs": {"dropout": drawn[0]}, "mutable": ["batch_stats"]}
        return Mixing(kind).apply(params, x, **options)[0]

    inner = jax.jit(apply)
    inner(params, x[:1])  # traced before

    def each(params, x):
        return jax.vmap(lambda one: apply(params, one[None])[0])(x)

    for way in (apply, lambda p, x: inner(p, x), each):
        for options in ({}, {"method": "jacrev"}, {"layers": "last"}, {"layers": "identity"}):
            with pytest.raises(InputError, match=f"{kind.split()[0]}_0 is a {kind.split()[0]} "):
                gram(way, params, x, **options)
    calm = nn.Dropout(0.0, deterministic=False)
    assert gram(lambda p, x: calm.apply({}, x @ p), jnp.eye(5), x, method="jacrev").shape == (
        3,
        5,
        5,
    )


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (lambda z: (z, {}), "apply returns a tuple: give a function that returns the logits"),
        (lambda z: {"logits": z}, "apply returns a dict"),
        (lambda z: z[:, None], r"apply returns an array of shape \(1, 1, 4\) for 1 queries"),
        (lambda z: z.sum(-1), r"apply returns an array of shape \(1,\) for 1"),
        (lambda z: z.T, r"apply returns an array of shape \(4, 1\) for 1"),
    ],
)
def test_what_is_no_array_of_logits_is_named(two, output, words):
    params, x, _ = two

    def apply(params, x):
        return output(Two().apply(params, x))

    y = jnp.full((3, 4), 0.25)
    for call in (
        lambda: gram(apply, params, x),
        lambda: gram(apply, params, x, method="jacrev"),
        lambda: perturb(apply, params, x, y, epsilon=0.5),
        lambda: defend(lambda x: Two().apply(params, x), (apply, params), epsilon=0.5)(x),
    ):
        with pytest.raises(InputError, match=words):
            call()
    said = words.replace("(1,", "(3,").replace(", 1\\)", ", 3\\)").replace("for 1", "for 3")
    with pytest.raises(InputError, match=said):
        defend(lambda x: apply(params, x), (Two().apply, params), epsilon=0.5)(x)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


@pytest.mark.filterwarnings("ignore:gram. .* go by jacrev")
def test_of_an_nnx_state_the_params_alone_are_weights(two):
    """Its statistics are floats, and its random keys no numbers at all."""
    _, x, _ = two
    model = NNX(nnx.Rngs(0))
    model.eval()
    structure, state = nnx.split(model)
    alone, params, rest = nnx.split(model, nnx.Param, ...)

    def with_rest(params, x):
        return nnx.merge(alone, params, rest)(x)

    def whole(state, x):
        return nnx.merge(structure, state)(x)

    want = by_hand(with_rest, params, x)
    close(gram(whole, state, x), want)
    close(gram(whole, state, x, method="jacrev"), want)
    assert set(coverage(whole, state, x)) == {
        f"{layer}/{part}/value"
        for layer, part in [
            *((layer, part) for layer in ("first", "last") for part in ("kernel", "bias")),
            *(("norm", part) for part in ("scale", "bias")),
        ]
    }


def test_parameters_that_are_no_floats_are_constants():
    class Chosen(nn.Module):
        @nn.compact
        def __call__(self, x):
            order = self.param("order", lambda key: jnp.array([3, 0, 1]))
            return nn.Dense(4)(x[:, order])

    x = jax.random.normal(jax.random.key(0), (3, 5))
    params = Chosen().init(jax.random.key(1), x)
    dense = {"params": params["params"]["Dense_0"]}
    want = by_hand(nn.Dense(4).apply, dense, x[:, jnp.array([3, 0, 1])])
    for method in ("structured", "jacrev"):
        close(gram(Chosen().apply, params, x, method=method), want)
    assert set(coverage(Chosen().apply, params, x)) == DENSE

    def keyed(held, x):
        noise = jax.random.normal(held["key"], x.shape[1:])
        return (x + noise[None]) @ held["w"]

    held = {"w": jax.random.normal(jax.random.key(2), (5, 4)), "key": jax.random.key(3)}
    noise = jax.random.normal(held["key"], (5,))
    want = by_hand(lambda w, x: (x + noise[None]) @ w, held["w"], x)
    close(gram(keyed, held, x, method="jacrev"), want)


def test_no_queries_have_no_grams(mixed):
    model, params, x = mixed
    for layers in ("all", "last"):
        assert gram(model.apply, params, x[:0], layers=layers).shape == (0, 4, 4)
