"""Examples of one network shared out over devices: the one thing that training says about them.

Which devices share a network is known to who sets the mesh (`madjax.sweep.mesh`); what is written
here holds on one device as on many.
"""

from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

SHARED = "data"
"""The axis of a mesh along which devices share the examples of one network."""


def shared_out(rows: Any) -> Any:
    """Arrays [B, ...] as they are, their rows laid out over the devices that share them.

    What is computed of them row by row is then computed where a row lies; means over the batch, so
    gradients and the statistics of BatchNorm, are taken over all of these devices and no others.
    Without a mesh that has more than one of them, or where that axis is not XLA's to partition, it
    does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get(SHARED) != AxisType.Auto or mesh.shape[SHARED] == 1:
        return rows
    layout = PartitionSpec(SHARED)
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, layout), rows)
