"""Write the weights of a run in the form that others load."""

from __future__ import annotations

from pathlib import Path

from entroflow.errors import InputError
from entroflow.policies.base import Exports
from entroflow.runs.open import open_policy
from entroflow.version import package_version
from entroflow.writing import (
    refuse_used,
    to_json,
    whole_folder,
    write_text,
)

ABOUT = "entroflow.json"


def export(
    run: Path | str,
    out: Path | str,
    *,
    weights: str = "ema",
    merged: bool = False,
    trust: bool = False,
) -> Path:
    """Write what a run has learnt into a new folder.

    For a policy over a diffusers pipeline that is the LoRA, as `pipe.load_lora_weights` reads it,
    or a whole pipeline, as `from_pretrained` reads it; for the embedded model a safetensors file
    for `policy.weights`. `entroflow.json` says where it comes from.

    Args:
        run: the run folder; its best checkpoint is taken.
        out: the folder, which must not exist or be empty.
        weights: `ema` or `live`.
        merged: a whole pipeline also where only a LoRA was trained.
        trust: import what the run names also from a folder that is not below the current one.

    Returns:
        The folder.

    Raises:
        InputError: no such run, a folder that is in use, or a policy that can't be exported.
    """
    run, out = Path(run), Path(out)
    refuse_used(out)
    opened = open_policy(run, weights, trust=trust)
    policy = opened.policy
    if not isinstance(policy, Exports):
        raise InputError(f"a {type(policy).__name__} can't be exported: it has no export().")
    base = opened.policy.weights.digest("reference")
    with whole_folder(out) as made:
        with opened.policy.weights("ema"):
            policy.export(made, merged=merged)
        about = {
            "run": run.name, "iteration": opened.iteration, "weights": weights,
            "base": base, "version": package_version(),
        }  # fmt: skip
        write_text(made / ABOUT, to_json(about, indent=1) + "\n")
    return out
