"""``python -m moecollab`` is the command line."""

from __future__ import annotations

from moecollab.cli.main import main

if __name__ == "__main__":
    main()
