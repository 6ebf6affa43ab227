"""What a recipe names and a run reads beside the policy."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from entroflow.places import paths_in
from entroflow.prompts import ListedSource
from entroflow.recipe.load import Recipe
from entroflow.recipe.registry import SECTIONS
from entroflow.rewards.combined import Rewards
from entroflow.runs.inputs import (
    Inputs,
    check_parts,
    code_of,
    digest_of_prompts,
    files_of,
    held_out_of,
)


class NamedFiles:
    """Files, prompts and code that the parts of a run name, by content."""

    def __init__(self, recipe: Recipe, reward: Rewards) -> None:
        self.recipe, self.reward = recipe, reward

    def check(self) -> None:
        """Let all parts of the recipe read what they will need; see `Component.check`.

        Raises:
            InputError: a file is missing or wrong.
        """
        for section in SECTIONS:
            if section == "reward":
                for part in self.reward.parts.values():
                    check_parts(part.reward, part.key)
            else:
                check_parts(getattr(self.recipe, section), section)

    @cached_property
    def inputs(self) -> Inputs:
        """What the recipe names and the run reads beside the policy, by content."""
        source = self.recipe.prompts
        found: dict[str, Mapping[str, str]] = {}
        for part in self.reward.parts.values():
            found |= files_of(part.reward, part.key)
        found |= held_out_of(self.recipe.evaluation)
        if isinstance(source, ListedSource):
            named = self.recipe.resolved["prompts"]
            of = named.get("path") or named.get("name") or named["type"]
            found["prompts"] = {"of": of, "digest": digest_of_prompts(source.listed())}
        return found

    @cached_property
    def code(self) -> Inputs:
        """The modules of the user's that the recipe names, by content."""
        return code_of(self.recipe.resolved)

    @cached_property
    def unverified(self) -> list[tuple[str, str]]:
        """Key and path of what the recipe names by path, where no digest tells what it holds.

        What a policy reads is part of the digest of its weights, and no cache changes a result.
        """
        verified = {"policy", *(key.partition(",")[0] for key in self.inputs)}
        return [
            (key, path)
            for key, path in paths_in(self.recipe.resolved)
            if not {key, key.partition(".")[0]} & verified and not key.endswith(".cache")
        ]
