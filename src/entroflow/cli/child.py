"""The command line of a run of a comparison, which stops and is saved when the comparison ends."""

from __future__ import annotations

from entroflow.cli.main import main
from entroflow.signals import stop_with_parent

if __name__ == "__main__":
    stop_with_parent()
    main()
