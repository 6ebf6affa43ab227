"""Do memory and open files stay flat over a long run?

    python benchmarks/soak.py [--iterations 3000] [--out FILE]

Trains the embedded model by quickstart with tiny settings, with evaluations, checkpoints and
pictures, and notes every 100 iterations what the process takes. Linux only. Raw results go to
docs/claims/soak.json, the sentence to docs/how-a-run-flows.md. About 15 minutes on one core.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np

import entroflow
from entroflow.version import package_version
from entroflow.writing import to_json, write_text

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "docs" / "claims" / "soak.json"
PAGE = ROOT / "docs" / "how-a-run-flows.md"
TINY = (
    "prompts.per_iteration=2", "allocation.group_size=4", "sampling.steps=4", "exploration.size=2",
    "run.checkpoint_every=20", "run.evaluate_every=50", "evaluation.images=1",
    "evaluation.test_images=1", "evaluation.steps=2", "evaluation.guidance_tried=[1.0]",
)  # fmt: skip
EVERY = 100
MIB = 2**20


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    """Files, sockets and pipes that are open."""
    return len(os.listdir("/proc/self/fd"))


def measured(iterations: int, every: int = EVERY) -> list[dict[str, int]]:
    """Memory and descriptors every so many iterations of one run."""
    found = []

    def watch(metrics, _evaluated) -> None:
        if metrics["iteration"] % every == 0 and metrics["iteration"]:
            gc.collect()
            found.append(
                {
                    "iteration": metrics["iteration"],
                    "bytes": resident(),
                    "descriptors": descriptors(),
                    "objects": len(gc.get_objects()),
                }
            )

    with tempfile.TemporaryDirectory() as folder:
        entroflow.train(
            "quickstart", [*TINY, f"run.iterations={iterations}"], run=Path(folder) / "run",
            watch=watch,
        )  # fmt: skip
    return found


def summary(found: list[dict[str, int]]) -> dict[str, float]:
    """Of the last two thirds, when all caches are full: MiB, their rise, and descriptors."""
    settled = found[len(found) // 3 :]
    x = np.array([each["iteration"] for each in settled])
    y = np.array([each["bytes"] for each in settled]) / MIB
    return {
        "mebibytes": round(statistics.median(y.tolist()), 1),
        "mebibytes_per_1000_iterations": round(float(np.polyfit(x, y, 1)[0]) * 1000, 2),
        "least_descriptors": min(each["descriptors"] for each in settled),
        "most_descriptors": max(each["descriptors"] for each in settled),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=CLAIMS)
    arguments = parser.parse_args()
    version = package_version()
    found = measured(arguments.iterations)
    content = {"version": version, "settings": TINY, **summary(found), "over": found}
    write_text(arguments.out, to_json(content, indent=1) + "\n")
    print(summary(found))


if __name__ == "__main__":
    main()
