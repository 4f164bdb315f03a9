"""Networks that several test files share."""

import flax.linen as nn


class Linear(nn.Module):
    """One dense layer: the cheapest network that all attacks can train."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))
