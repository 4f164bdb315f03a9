"""`python -m madjax`: the command line."""

import sys

from madjax.cli import main

sys.exit(main())
