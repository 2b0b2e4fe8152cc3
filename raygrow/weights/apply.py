"""Applying a rule table, one target tensor at a time."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from raygrow.weights.rules import Rule, Rules, Sliceable, Stacked


class Derived(Sliceable):
    """The targets of a rule table as a mapping that makes each tensor when it is asked for.

    Its source may be lazy too (a safetensors folder, another `Derived`), so renaming, growing and renaming back a
    model of any size is a chain of views. One expert is taken through the whole chain without making the others.
    """

    def __init__(self, rules: Rules, sources: Mapping[str, Tensor]) -> None:
        self._rules, self._sources = rules, sources

    def __getitem__(self, name: str) -> Tensor:
        return self._rules[name].apply(self._sources)

    def take(self, name: str, index: int) -> Tensor:
        """`self[name][index]`, made alone where the rule is stacked or has no fill."""
        rule = self._rules[name]
        if isinstance(rule, Stacked):
            return rule.rules[index].apply(self._sources)
        if rule.fill is None:
            return Rule(tuple(term.at(index) for term in rule.terms)).apply(self._sources)
        return self[name][index]

    def __contains__(self, name: object) -> bool:
        return name in self._rules  # Mapping's own would compute the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)


def apply_rules(rules: Rules, sources: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every target, in the order of the rules; each is made as the iterator reaches it."""
    return iter(Derived(rules, sources).items())
