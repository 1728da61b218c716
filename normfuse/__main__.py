"""``python -m normfuse``, and the command ``normfuse``."""

import os
import sys

from normfuse.signals import end_at_once


def main() -> None:
    """Entry point of the command."""
    end_at_once()
    from normfuse.cli import main as run

    run()


if __name__ == "__main__":
    # Python puts the working directory first on the search path for -m. What is imported must not be found in whatever
    # folder the command happens to run in: only --model looks there.
    if sys.path[0] in ("", os.getcwd()) and not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    main()
