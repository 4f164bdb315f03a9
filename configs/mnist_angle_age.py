"""From white-box to black-box: the angle against the age of the surrogate.

Claim: at epsilon 2 the defence turns the gradient by the less the longer ago it saw the attacker's
parameters; at epsilon 0.99 that makes little difference. It is handed them every 1, 10, 100 and
1,000 steps, at the start alone (5,000), or never, which leaves it a random network of its own.
Command: MADJAX_DATA=DIR madjax angle configs/mnist_angle_age.py
Cost: about 25 minutes on 2 CPU cores.

See configs/mnist_angle.py; here N = 5,000.
"""

from dataclasses import replace

from madjax import AngleStudy, Online, Recipe, Task

AGES = (1, 10, 100, 1_000, 5_000, 0)


def config() -> AngleStudy:
    """Six surrogates x two epsilons and the clean path x two seeds."""
    online = Online(every=1_000, judged=500)
    return AngleStudy(
        name="mnist_angle_age",
        task=Task(
            dataset="mnist",
            queryset="kassel_letters",
            query_splits=("train", "test"),
            victim=Recipe(epochs=15, weight_decay=5e-4, decay_epochs=10),
        ),
        strengths=(0.0, 0.99, 2.0),
        seeds=(0, 1),
        steps=5_000,
        attackers=tuple(replace(online, refresh=age) for age in AGES),
    )
