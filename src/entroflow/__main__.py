"""The command line as `python -m entroflow`."""

from __future__ import annotations

from entroflow.cli.main import main

if __name__ == "__main__":
    main()
