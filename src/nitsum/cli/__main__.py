"""`python -m nitsum.cli` is the `nitsum` command."""

import sys

from nitsum.cli import main

sys.exit(main())
