"""White-box mode otherwise: other gradients, solvers, batches and optimisers.

Claim: gradients of the last layer alone turn the attacker's, of all parameters, about as far as
those of all; within 0.99 a batch is turned further than its queries, and MAD turns Adam's updates
about half as far as its gradients; MAD-argmax turns less far than MAD.
Command: MADJAX_DATA=DIR madjax angle configs/mnist_angle_variants.py
Cost: about 30 minutes on 2 CPU cores.

The angle is over all parameters whatever the defence's gradients are. Batches of 16 send 16 times
the queries. See configs/mnist_angle.py.
"""

from dataclasses import replace

from madjax import MAD, AngleStudy, LineSearch, Online, Recipe, Task, argmax_preserving
from madjax.recipe import adam


def config() -> AngleStudy:
    """Three defences x three attackers x two epsilons and the clean path x two seeds."""
    online = Online(every=500, judged=500)
    batches = replace(online, recipe=replace(online.recipe, batch_size=16))
    by_adam = replace(online, variant="Adam", recipe=replace(online.recipe, optimizer=adam))
    return AngleStudy(
        name="mnist_angle_variants",
        task=Task(
            dataset="mnist",
            queryset="kassel_letters",
            query_splits=("train", "test"),
            victim=Recipe(epochs=15, weight_decay=5e-4, decay_epochs=10),
        ),
        strengths=(0.0, 0.99, 2.0),
        seeds=(0, 1),
        steps=1_000,
        rules=(MAD(layers="all"), MAD(layers="last"), MAD(solver=LineSearch(argmax_preserving))),
        attackers=(online, batches, by_adam),
    )
