"""White-box mode otherwise: other gradients, batches, optimisers, and surrogates that grow stale.

Claim: what the defence knows decides: between white-box and black-box lie surrogates refreshed
every 100 and every 1,000 steps; gradients of the last layer alone, batches of 16 and Adam each
take their part of the angle, and MAD-argmax turns gradients little.
Command: MADJAX_DATA=DIR madjax angle configs/mnist_angle_variants.py
Cost: about 30 minutes on 2 CPU cores.

Every attacker sends 5,000 queries; batches of 16 make 312 steps of 4,992 of them. The angle is over
all parameters whatever the defence's gradients are. See configs/mnist_angle.py.
"""

from dataclasses import replace

from madjax import MAD, Defended, LineSearch, Online, Recipe, Sweep, Task, argmax_preserving
from madjax.train import adam

STRENGTHS = (0.0, 0.99, 2.0)


def config() -> Sweep:
    """Three defences x six attackers x two epsilons and the clean path, one seed."""
    online = Online(budget=5_000, images=5_000, every=500, judged=500)
    batches = replace(online, budget=4_992, every=32, recipe=replace(online.recipe, batch_size=16))
    by_adam = replace(online, variant="Adam", recipe=replace(online.recipe, optimizer=adam))
    return Sweep(
        name="mnist_angle_variants",
        tasks=(
            Task(
                dataset="mnist",
                queryset="kassel_letters",
                query_splits=("train", "test"),
                victim=Recipe(epochs=15, weight_decay=5e-4, decay_epochs=10),
            ),
        ),
        defenses=(
            Defended(MAD(layers="all"), STRENGTHS),
            Defended(MAD(layers="last"), STRENGTHS),
            Defended(MAD(solver=LineSearch(argmax_preserving)), STRENGTHS),
        ),
        attacks=(
            online,
            replace(online, refresh=100),
            replace(online, refresh=1_000),
            replace(online, refresh=0),
            batches,
            by_adam,
        ),
    )
