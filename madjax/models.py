"""Networks: Flax linen modules behind pure `init` and `apply`."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from madjax import backend
from madjax.batching import nested
from madjax.conv import WIDE, convolution, max_pool_2x2
from madjax.errors import InputError

Array = jax.Array
Params = Any

# PyTorch's default for weights, kaiming_uniform(a=sqrt(5)), is U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> Callable[..., Array]:
    """PyTorch's default for biases: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), fan_in of the weights."""
    limit = 1 / math.sqrt(fan_in)

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def torch_dense(features: int, x: Array) -> Array:
    """A dense layer with PyTorch's default initialisation, applied to x inside a compact method."""
    return nn.Dense(
        features, kernel_init=torch_kernel_init, bias_init=torch_bias_init(x.shape[-1])
    )(x)


# He et al.'s for convolutions: N(0, 2 / (h w features)).
kaiming_init = nn.initializers.variance_scaling(2, "fan_out", "normal")


def scaled(width: float, features: int) -> int:
    """A hidden size times a factor, rounded and at least 1."""
    return max(1, round(width * features))


def computed_in(dtype: Any) -> Any:
    """The type that a network computes in: that which is given, or what suits the platform.

    None is bfloat16 where the default backend is an accelerator, and float32 on a CPU, as the
    program is traced; else a type by its name, "float32". Parameters, the statistics of BatchNorm
    and logits are float32 in any case.
    """
    if dtype is not None:
        return dtype
    return jnp.float32 if backend.platform() == "cpu" else jnp.bfloat16


_TORCH_LENET = ("conv1", "conv2", "fc1", "fc2")


class LeNet(nn.Module):
    """LeNet of the authors' code: 431,080 parameters for 28x28x1 images and 10 classes.

    conv 5x5 20 - ReLU - pool 2 - conv 5x5 50 - ReLU - pool 2 - dense 500 - ReLU - dense K, no
    padding, no dropout, PyTorch's default initialisation. Images [B, H, W, C] -> logits [B, K].
    width: a factor of all hidden sizes (20, 50, 500), each rounded and at least 1.
    """

    num_classes: int
    width: float = 1.0
    convolution: Callable[..., Array] = convolution
    pool: Callable[[Array], Array] = max_pool_2x2

    def torch_names(self) -> dict[str, str]:
        """Its layers -> their names in PyTorch, see `from_torch`."""
        return dict(zip(("Conv_0", "Conv_1", "Dense_0", "Dense_1"), _TORCH_LENET, strict=True))

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        *convolutions, hidden = (scaled(self.width, n) for n in (20, 50, 500))
        for features in convolutions:
            x = nn.Conv(
                features,
                (5, 5),
                padding="VALID",
                kernel_init=torch_kernel_init,
                bias_init=torch_bias_init(25 * x.shape[-1]),
                conv_general_dilated=self.convolution,
            )(x)
            x = self.pool(nn.relu(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(torch_dense(hidden, x))
        return torch_dense(self.num_classes, x)


class MLP(nn.Module):
    """Dense layers with ReLU between them: images [B, H, W, C] -> logits [B, K].

    hidden: the sizes of the hidden layers. PyTorch's default initialisation.
    """

    num_classes: int
    hidden: tuple[int, ...] = (500, 500)

    @nn.compact
    def __call__(self, x: Array) -> Array:  # noqa: D102
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            x = nn.relu(torch_dense(features, x))
        return torch_dense(self.num_classes, x)


_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG16 with batch normalisation, for small images (CIFAR) or of ImageNet's size.

    Thirteen 3x3 convolutions with bias in five blocks, each followed by BatchNorm and ReLU, each
    block by 2x2 max pooling; then dense layers. `hidden=()` is the authors' CIFAR network, whose
    one dense layer reads 512 features of a 32x32 image: 14,728,266 parameters at K = 10.
    `hidden=(4096, 4096)` is the original, whose first dense layer reads 7x7x512 features of a
    224x224 image, with dropout after each hidden layer in training (Simonyan and Zisserman 2015).
    width: a factor of the features of all convolutions, each rounded and at least 1. batch_norm:
    without it, no BatchNorm follows the convolutions, as in the original. dtype: see `computed_in`.

    Images [B, H, W, C], H and W multiples of 32 -> logits [B, K]. train: whether BatchNorm takes
    the batch's statistics, which it then updates in the collection "batch_stats", and dropout
    drops, for which a key named "dropout" is needed. Kernels N(0, 2 / (9 features)) and a head
    N(0, 0.01^2) as in the authors' code.
    """

    num_classes: int
    hidden: tuple[int, ...] = ()
    convolution: Callable[..., Array] = convolution
    pool: Callable[[Array], Array] = max_pool_2x2
    width: float = 1.0
    batch_norm: bool = True
    dtype: Any = None

    def torch_names(self) -> dict[str, str]:
        """Its layers -> their names in PyTorch, see `from_torch`.

        Those of torchvision, or of the authors' CIFAR network where `hidden` is empty.
        """
        names, position = {}, 0
        for block in _VGG16:
            for _ in block:
                layer = len(names) // 2 if self.batch_norm else len(names)
                names[f"Conv_{layer}"] = f"features.{position}"
                if self.batch_norm:
                    names[f"BatchNorm_{layer}"] = f"features.{position + 1}"
                position += 3 if self.batch_norm else 2  # with ReLU
            position += 1  # pooling
        if not self.hidden:
            return names | {"Dense_0": "classifier"}
        # Between two dense layers are ReLU and dropout.
        dense = {f"Dense_{i}": f"classifier.{3 * i}" for i in range(len(self.hidden) + 1)}
        return names | dense

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:  # noqa: D102
        dtype = computed_in(self.dtype)
        for block in _VGG16:
            for features in block:
                x = nn.Conv(
                    scaled(self.width, features),
                    (3, 3),
                    padding=1,
                    dtype=dtype,
                    kernel_init=kaiming_init,
                    conv_general_dilated=self.convolution,
                )(x)
                if self.batch_norm:
                    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)(x)
                x = nn.relu(x)
            x = self.pool(x)
        x = x.reshape(x.shape[0], -1)
        head = nn.initializers.normal(0.01)
        for features in self.hidden:
            x = nn.relu(nn.Dense(features, kernel_init=head, dtype=dtype)(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=head)(x.astype(jnp.float32))


class ResNet18(nn.Module):
    """ResNet-18 for small images (CIFAR): 11,173,962 parameters for 3 channels and 10 classes.

    conv 3x3 64 - four stages of two basic blocks, 64, 128, 256 and 512 features - mean over
    positions - dense K (He et al. 2016). A block is ReLU(x + conv 3x3 - ReLU - conv 3x3); the first
    of every stage but the first halves the image. Where the shape changes, x goes through a 1x1
    convolution. BatchNorm follows every convolution, none of which has a bias. large_images: begin
    as the original does, with a 7x7 convolution and 3x3 max pooling that halve the image each.
    dtype: see `computed_in`.

    Images [B, H, W, C] -> logits [B, K]. train: whether BatchNorm takes the batch's statistics,
    which it then updates in the collection "batch_stats". Kernels N(0, 2 / (h w features)), the
    head PyTorch's default.
    """

    num_classes: int
    stages: tuple[int, ...] = (64, 128, 256, 512)
    """Features of each stage; the stem has those of the first."""
    blocks: int = 2
    """Blocks in each stage."""
    convolution: Callable[..., Array] = convolution
    large_images: bool = False
    dtype: Any = None

    def torch_names(self) -> dict[str, str]:
        """Its layers -> their names in torchvision, see `from_torch`."""
        pairs, features = [("conv1", "bn1")], self.stages[0]
        for stage, wide in enumerate(self.stages):
            for block in range(self.blocks):
                name = f"layer{stage + 1}.{block}"
                pairs += [(f"{name}.conv{i}", f"{name}.bn{i}") for i in (1, 2)]
                if wide != features or (stage and not block):
                    pairs.append((f"{name}.downsample.0", f"{name}.downsample.1"))
                features = wide
        names = {}
        for i, (conv, norm) in enumerate(pairs):
            names |= {f"Conv_{i}": conv, f"BatchNorm_{i}": norm}
        return names | {"Dense_0": "fc"}

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:  # noqa: D102
        dtype = computed_in(self.dtype)

        def conv(x: Array, features: int, size: int, stride: int) -> Array:
            x = nn.Conv(
                features,
                (size, size),
                strides=stride,
                padding=size // 2,
                use_bias=False,
                dtype=dtype,
                kernel_init=kaiming_init,
                conv_general_dilated=self.convolution,
            )(x)
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)(x)

        if self.large_images:
            x = nn.relu(conv(x, self.stages[0], 7, 2))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        else:
            x = nn.relu(conv(x, self.stages[0], 3, 1))
        for stage, features in enumerate(self.stages):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                y = nn.relu(conv(x, features, 3, stride))
                y = conv(y, features, 3, 1)
                if x.shape != y.shape:
                    x = conv(x, features, 1, stride)
                x = nn.relu(x + y)
        return torch_dense(self.num_classes, x.astype(jnp.float32).mean(axis=(1, 2)))


# An attacker's other choices of network (the paper's `arch-*`): smaller and larger than LeNet, and
# larger than VGG16 and ResNet18.
LeNetHalf = partial(LeNet, width=0.5)
LeNetDouble = partial(LeNet, width=2)
ResNet18Double = partial(ResNet18, stages=(128, 256, 512, 1024))


def _channels_read(equation: JaxprEqn) -> int:
    """How many channels a convolution's kernel reads; 0 for all else."""
    if equation.primitive.name != "conv_general_dilated":
        return 0
    return equation.invars[1].aval.shape[equation.params["dimension_numbers"].rhs_spec[1]]


_TRAINING = {"train": True, "training": True, "deterministic": False}


@dataclass(frozen=True)
class Classifier:
    """A network together with its preprocessing: uint8 images [B, H, W, C] -> logits [B, K].

    Hashable and free of arrays, so that `classifier.apply` can be a static argument of `jax.jit`.
    """

    module: nn.Module
    preprocess: Callable[[Array], Array]
    image_shape: tuple[int, int, int]

    def init(self, key: Array) -> Params:
        """Random variables, a function of the key alone: "params", and "batch_stats" if any."""
        blank = jnp.zeros((1, *self.image_shape), jnp.uint8)
        return self.module.init(key, self.preprocess(blank))

    def apply(self, params: Params, images: Array) -> Array:
        """Logits [B, K] of raw images [B, H, W, C] with values in [0, 255]."""
        return self.module.apply(params, self.preprocess(images))

    def learn(self, variables: Params, images: Array, key: Array) -> tuple[Array, Params]:
        """Logits [B, K] in training mode, and the variables that the forward pass has moved.

        A module whose `__call__` has an argument `train` or `training` is called with it true, one
        with `deterministic` with that false, and with the key for dropout; its collections but
        "params" are updated, which for BatchNorm are the running statistics. Any other module has
        the logits of `apply`, and its variables as they are.

        Raises:
            InputError: a module with the statistics of BatchNorm and none of these arguments: they
                would stay as they are at first; a module that pools images away.
        """
        self.check_learns(variables)
        flags = self._flags()
        if not flags:
            return self.apply(variables, images), variables
        logits, moved = self.module.apply(
            variables,
            self.preprocess(images),
            **flags,
            rngs={"dropout": key},
            mutable=[name for name in variables if name != "params"],
        )
        return logits, {**variables, **moved}

    @cached_property
    def is_wide(self) -> bool:
        """Whether it has XLA's own convolutions, of `madjax.conv.WIDE` channels or more."""
        blank = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.uint8)
        variables = jax.eval_shape(self.init, jax.random.key(0))
        program = jax.make_jaxpr(self.apply)(variables, blank).jaxpr
        return any(
            _channels_read(equation) >= WIDE for jaxpr in nested(program) for equation in jaxpr.eqns
        )

    def check_learns(self, variables: Params) -> None:
        """Refuse a module that `learn` cannot train; variables may be their shapes."""
        if "batch_stats" in variables and not self._flags():
            raise InputError(
                f"{type(self.module).__name__} has BatchNorm, and no way to say that it is being "
                "trained: give its __call__ an argument train, and BatchNorm "
                "use_running_average=not train"
            )
        for path, leaf in jax.tree.leaves_with_path(variables):
            if not leaf.size:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise InputError(
                    f"{type(self.module).__name__} leaves nothing of images of shape "
                    f"{self.image_shape}: its {name} is of shape {leaf.shape}, and its outputs are "
                    "the same for all images; give larger images (NAME@32) or another architecture"
                )

    def _flags(self) -> dict[str, bool]:
        """The arguments that put the module in training mode, by the names that it has for them."""
        known = inspect.signature(type(self.module).__call__).parameters
        return {name: value for name, value in _TRAINING.items() if name in known}

    def posterior(self, params: Params, images: Array) -> Array:
        """Posteriors y float32 [B, K] on the simplex, whatever the network's type."""
        return jax.nn.softmax(self.apply(params, images).astype(jnp.float32))
