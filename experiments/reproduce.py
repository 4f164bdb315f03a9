"""Every table and figure of the paper: all runs at one scale, and what is made of them.

Claim: one command makes all of them, at the paper's sizes, reduced, or within minutes.
Command: python experiments/reproduce.py --scale smoke
    MADJAX_DATA=DIR python experiments/reproduce.py --scale reduced [--limit MINUTES]
Cost: smoke 2 minutes on 2 CPU cores; reduced some 12 hours, on data in DIR; paper, the four VGG16
victims among them, weeks on one accelerator (experiments/plan_paper.py).

It goes on where it stopped. Each script of a table or figure makes its own alone.
"""

from importlib import import_module

from paper import main

SCRIPTS = ("table1", *(f"fig{i}" for i in (1, 3, 4, 5, 6, 7, 8, 9)))
SCRIPTS += tuple(f"figa{i}" for i in range(1, 7))

if __name__ == "__main__":
    raise SystemExit(main(*(import_module(name).EXHIBIT for name in SCRIPTS)))
