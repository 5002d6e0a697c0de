"""`python -m simplexfix`: the same as the `simplexfix` command."""

import sys

from .cli import main

sys.exit(main())
