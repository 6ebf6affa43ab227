"""A seed gives the same run wherever it is run: locale, hash seed, folder, time zone, output.

What may change it is the number of threads: sums are then added up in another order.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import entroflow
from entroflow.runs.folder import RunFolder
from tiny_run import assert_same_run, final_tensors, lines

TINY = (
    "prompts.per_iteration=2", "allocation.group_size=4", "sampling.steps=3", "exploration.size=2",
    "run.iterations=2", "run.evaluate_every=2", "evaluation.images=1", "evaluation.test_images=1",
    "evaluation.steps=1", "evaluation.guidance_tried=[1.0]",
)  # fmt: skip

PLAIN_C = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The run in this process."""
    return entroflow.train("quickstart", TINY, run=tmp_path_factory.mktemp("here") / "run")


def elsewhere(folder, output=subprocess.DEVNULL, name="run", **environment):
    """The same run by the command line, in another working folder and environment."""
    folder.mkdir()
    subprocess.run(
        [sys.executable, "-m", "entroflow.cli.main", "train", "quickstart", *TINY, "--run", name],
        cwd=folder, env={**os.environ, **environment}, stdout=output, check=False, timeout=300,
    )  # fmt: skip
    return RunFolder.open(folder / name)


def test_a_run_is_the_same_under_everything_at_once(tmp_path, here):
    """Also where nothing that it says can be shown or written."""
    with open("/dev/full" if os.path.exists("/dev/full") else os.devnull, "wb") as full:
        other = elsewhere(
            tmp_path / "größe", full, "läufe", PYTHONHASHSEED="4711", TZ="Pacific/Kiritimati",
            PYTHONIOENCODING="ascii", COLUMNS="20", **PLAIN_C,
        )  # fmt: skip
    assert_same_run(here, other)
    assert "--resume 'läufe'" in (other.path / "report.html").read_text(encoding="utf-8").replace(
        "&#39;", "'"
    )
    assert (other.path / "evaluation.json").exists()


def has(locale):
    done = subprocess.run(["locale", "-a"], capture_output=True, check=False, timeout=60)
    return locale.lower().replace("-", "") in done.stdout.decode().lower().split()


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONHASHSEED": "0"},
        {"PYTHONHASHSEED": "99"},
        {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-16"},
        {"TZ": "America/St_Johns"},
        *({"LC_ALL": name} for name in ("de_DE.UTF-8", "tr_TR.UTF-8", "C.UTF-8")),
    ],
    ids=str,
)
def test_a_run_is_the_same_under_each(tmp_path, here, environment):
    if "LC_ALL" in environment and not has(environment["LC_ALL"]):
        pytest.skip("there is no such locale here")
    assert_same_run(here, elsewhere(tmp_path / "there", **environment))


@pytest.mark.slow
def test_a_user_s_own_locale_changes_nothing(tmp_path, here):
    """A reward may set the locale of the process, with commas in its numbers."""
    names = [name for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "C.UTF-8") if has(name)]
    if not names:
        pytest.skip("there is no other locale here")
    (tmp_path / "start.py").write_text(
        f"import locale\nlocale.setlocale(locale.LC_ALL, {names[0]!r})\n"
        "from entroflow.cli.main import main\nmain()\n",
        encoding="utf-8",
    )
    subprocess.run(
        [sys.executable, "start.py", "train", "quickstart", *TINY, "--run", "run"],
        cwd=tmp_path, check=True, stdout=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    assert_same_run(here, RunFolder.open(tmp_path / "run"))


@pytest.mark.slow
def test_the_number_of_threads_changes_rounding_alone(tmp_path, here):
    """Prompts, noise and what is counted are the same to the bit; weights nearly are."""
    other = elsewhere(tmp_path / "there", OMP_NUM_THREADS="2")
    for mine, theirs in zip(lines(here), lines(other), strict=True):
        assert mine.keys() == theirs.keys()
        counts = [{k: v for k, v in line.items() if k.startswith("ledger/")}
                  for line in (mine, theirs)]  # fmt: skip
        assert counts[0] == counts[1]
    first, second = final_tensors(here)["ema"], final_tensors(other)["ema"]
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-3)
