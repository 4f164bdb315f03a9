"""Examples of one network shared out over devices: the one thing that training says about them.

Which devices share a network is known to who sets the mesh (`madjax.sweep.mesh`); what is written
here holds on one device as on many.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

SHARED = "data"
"""The axis of a mesh along which devices share the examples of one network."""


def shared_out(rows: Any) -> Any:
    """Arrays [B, ...] as they are, their rows laid out over the devices that share them.

    What is computed of them row by row is then computed where a row lies; means over the batch, so
    gradients and the statistics of BatchNorm, are taken over all of these devices and no others.
    Without a mesh that has more than one along `SHARED`, it does nothing.
    """
    if jax.sharding.get_abstract_mesh().shape.get(SHARED, 1) == 1:
        return rows
    layout = PartitionSpec(SHARED)
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, layout), rows)
