"""``python -m normfuse``: the same as the command ``normfuse``."""

import os
import sys

# Python puts the working directory first on the search path for -m. A checkpoint names the class that builds
# its
# model, and must not find it in whatever folder the command happens to run in: only --model looks there.
if sys.path[0] in ("", os.getcwd()) and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]

from normfuse.cli import main

main()
