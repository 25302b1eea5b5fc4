"""Few combinations of options in which every pair of values occurs that may occur at all.

rules = [Rule(("cores", "cluster"), lambda cores, cluster: cluster and cores == 1, "a cluster of one core")]
rows = covering({"cores": (1, 2), "cluster": (False, True), "color": ("red", "blue")}, rules, seed=0)
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Options = Mapping[str, Sequence[Any]]  # name → its values
Combination = dict[str, Any]  # name → value
Pair = tuple[tuple[str, Any], tuple[str, Any]]

TRIALS = 12  # combinations that the best is chosen from


@dataclasses.dataclass(frozen=True)
class Rule:
    """``refuses`` is given the values of ``options``, in order, and says whether they may not stand together."""

    options: tuple[str, ...]
    refuses: Callable[..., bool]
    reason: str

    def broken(self, combination: Mapping[str, Any]) -> bool:
        """Whether the combination, which may be a part of one, is refused for certain."""
        if any(name not in combination for name in self.options):
            return False
        return bool(self.refuses(*(combination[name] for name in self.options)))


def pairs(combination: Mapping[str, Any]) -> Iterator[Pair]:
    """Every two of its options with their values, names in order."""
    yield from itertools.combinations(sorted(combination.items()), 2)


def every_pair(options: Options) -> list[Pair]:
    names = itertools.combinations(sorted(options), 2)
    return [((a, x), (b, y)) for a, b in names for x, y in itertools.product(options[a], options[b])]


def complete(
    options: Options, rules: Sequence[Rule], part: Combination, rng: random.Random, wanted: set[Pair] | None = None
) -> Combination | None:
    """A combination that has ``part`` in it and breaks no rule, with values that make many of the ``wanted`` pairs
    (without: any); None where there is none: all are tried."""
    rules_of = {name: [rule for rule in rules if name in rule.options] for name in options}
    # Those that rules speak of first, so that a dead end is seen soon.
    free = sorted((name for name in options if name not in part), key=lambda name: (not rules_of[name], rng.random()))

    def gain(combination: Combination, name: str, value: Any) -> float:
        if wanted is None:
            return rng.random()
        new = (name, value)
        found = sum(tuple(sorted((new, other), key=lambda x: x[0])) in wanted for other in combination.items())
        return -found + rng.random() / 2

    def search(combination: Combination, rest: Sequence[str]) -> Combination | None:
        if not rest:
            return combination
        name = rest[0]
        for value in sorted(options[name], key=lambda value: gain(combination, name, value)):
            longer = {**combination, name: value}
            if any(rule.broken(longer) for rule in rules_of[name]):
                continue
            if (found := search(longer, rest[1:])) is not None:
                return found
        return None

    found = None if any(rule.broken(part) for rule in rules) else search(dict(part), free)
    return found and {name: found[name] for name in options}


def covering(options: Options, rules: Sequence[Rule], seed: int) -> list[Combination]:
    """Combinations that break no rule and have, together, every pair that any such combination has; always the same for
    a seed.  Greedy, as AETG (Cohen et al., IEEE Transactions on Software Engineering 23(7), 1997)."""
    rng, missing, combinations = random.Random(seed), set(every_pair(options)), []
    for pair in every_pair(options):
        if pair not in missing:
            continue
        trials = (complete(options, rules, dict(pair), rng, missing) for _ in range(TRIALS))
        whole = list(itertools.takewhile(lambda trial: trial is not None, trials))  # none where the pair cannot occur
        if whole:
            combinations.append(max(whole, key=lambda trial: sum(p in missing for p in pairs(trial))))
            missing.difference_update(pairs(combinations[-1]))
    return combinations
