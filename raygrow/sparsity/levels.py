"""From a split of the sparsity to what is kept: one level of a plan, searched on a loaded model."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from raygrow.kernels.group_select import group_sizes
from raygrow.nn.config import ModelConfig
from raygrow.nn.rack import Rack
from raygrow.progress import Progress, silent
from raygrow.sparsity import allocate
from raygrow.sparsity.allocate import Split, SplitName
from raygrow.sparsity.apply import install
from raygrow.sparsity.inputs import Place, block_weights, input_size, input_weights
from raygrow.sparsity.linear import SparseRows
from raygrow.sparsity.methods import THRESHOLDED, Choice, Method
from raygrow.sparsity.plan import Level, make_level
from raygrow.sparsity.policy import Divergence, Policy, hidden, policy_loss
from raygrow.sparsity.scores import Histogram, RankedEnergy

TOLERANCE = 0.005
"""Of the share of weights that thresholds drop."""
FITS = 12
"""How many factors are tried for it."""
EXCEEDED = -1.0
"""A threshold that every score is above."""


class Levels:
    """Makes levels of a model, which it makes sparse in place.

    Args:
        model: On its device.
        method: Which entries are kept.
        tokens_BT: The calibration text, which thresholds and groups are made on.
        searched: How many of its sequences, the first, splits are tried out on; all when not given.
        batch_size: Sequences at a time.
    """

    def __init__(
        self,
        model: Rack,
        method: Method,
        tokens_BT: Tensor,
        *,
        searched: int | None = None,
        batch_size: int = 8,
    ) -> None:
        self.model, self.batch_size = model, batch_size
        self.method: Method = method
        self.config: ModelConfig = model.config
        self.rows = SparseRows()
        self.tokens = 0
        """That have gone through the model."""
        self.selectors = install(model, method, self.rows)
        self.taken: dict[float, SplitName] = {}
        """By sparsity, which kind of split its level has."""
        self._scores = self._scored(tokens_BT) if method in (*THRESHOLDED, "grouped") else {}
        self._divergence = Divergence(model, tokens_BT[:searched], batch_size=batch_size)
        self.tokens += self._divergence.tokens
        self._costs: dict[Place, list[float]] | None = None

    def level(self, sparsity: float, split: SplitName, *, progress: Progress = silent) -> Level:
        """The level of a sparsity.

        Args:
            sparsity: Share of the Blocks' weights that are dropped.
            split: How it is split between inputs, see `allocate`.
            progress: Told of every input probed.

        Raises:
            ValueError: If not enough weights can be dropped.
        """
        self.taken[sparsity] = split
        if split == "uniform":
            return self.made(allocate.uniform(self.config, sparsity), sparsity)
        best, lowest = allocate.best_ratio(self.config, sparsity, self.cost)
        if split == "search":
            if self._costs is None:
                self._costs = allocate.probe(self.config, self.cost, progress=progress)
            found = allocate.cheapest(self.config, sparsity, self._costs)
            if self.cost(found) < lowest:
                best = found
            else:
                self.taken[sparsity] = "ratio"
        return self.made(best, sparsity)

    def zeros(self) -> Level:
        """The one level of method `relu`: the hidden units that are zero, of which there are as many as the calibration
        text says. Those of experts are read whole.
        """
        hidden = {
            (block, name): Choice(selector.size, 0.0)
            for (block, name), selector in self.selectors.items()
            if name == "down" and not self.config.has_experts(block)
        }
        choices = {**self.choices({}), **hidden}
        return make_level(self.config, self._counted(choices, self._kept(choices)), self.method)

    def choices(self, split: Split) -> dict[Place, Choice]:
        """What is kept under a split; everything of inputs that it does not name."""
        return {place: self._choice(place, split.get(place, 0.0)) for place in self.selectors}

    def cost(self, split: Split) -> float:
        """How far a split takes the model from the dense one on the calibration text, all tokens sparse."""
        return self._diverges(self.choices(split))

    def use(self, choices: Mapping[Place, Choice]) -> None:
        """Makes the model keep what is chosen, and everything of inputs that are not named."""
        for place, selector in self.selectors.items():
            selector.choice = choices.get(place, Choice(selector.size))

    def measure(self, choices: Mapping[Place, Choice], batch: tuple[Tensor, Tensor], policy: Policy) -> float:
        """Nats per token on a text; `choices` of no input are the dense model."""
        self.use(choices)
        self.tokens += batch[0].numel()
        return policy_loss(self.model, self.rows, batch, policy, batch_size=self.batch_size)

    def made(self, split: Split, sparsity: float) -> Level:
        """The level of a split that drops that much; thresholds are fitted to it."""
        choices = self.choices(split)
        return make_level(self.config, self._fitted(choices, sparsity) if self.method in THRESHOLDED else choices)

    def _scored(self, tokens_BT: Tensor) -> dict[Place, Histogram | RankedEnergy]:
        """What the entries of every input score on a text while nothing is dropped."""
        found: dict[Place, Histogram | RankedEnergy] = {}
        for place, selector in self.selectors.items():
            if self.method == "grouped":
                selector.choice = Choice(selector.size, groups=group_sizes(selector.size))
                selector.scores = found[place] = RankedEnergy(selector.size)
            else:
                selector.choice = Choice(selector.size, EXCEEDED)
                selector.scores = found[place] = Histogram()
        self.rows.start, self.rows.stop = 0, None
        for batch_BT in tokens_BT.split(self.batch_size):
            hidden(self.model, batch_BT)
        for selector in self.selectors.values():
            selector.scores = None
        self.use({})
        self.tokens += tokens_BT.numel()
        return found

    def _fitted(self, choices: Mapping[Place, Choice], sparsity: float) -> dict[Place, Choice]:
        """Thresholds times the factor at which as much is dropped as is asked for.

        Those of the dense model drop more: where inputs have lost entries, what is made of them is smaller.
        """
        low, factor, high = 0.0, 1.0, 2.0
        for _ in range(FITS):
            scaled = {place: _scaled(choice, factor) for place, choice in choices.items()}
            kept = self._kept(scaled)
            dropped = sum(input_weights(self.config, *place) * (1 - share) for place, share in kept.items())
            over = dropped / block_weights(self.config) - sparsity
            if abs(over) <= TOLERANCE:
                break
            low, high = (low, factor) if over > 0 else (factor, high)
            factor = (low + high) / 2
        return self._counted(scaled, kept)

    def _kept(self, choices: Mapping[Place, Choice]) -> dict[Place, float]:
        """The share of entries that exceed each threshold on the calibration text, all tokens sparse."""
        counted = {place: self.selectors[place] for place, choice in choices.items() if choice.threshold is not None}
        for selector in counted.values():
            selector.seen = (0, 0)
        self._diverges(choices)
        kept = {place: selector.seen[0] / selector.seen[1] for place, selector in counted.items() if selector.seen}
        for selector in counted.values():
            selector.seen = None
        return kept

    def _counted(self, choices: Mapping[Place, Choice], kept: Mapping[Place, float]) -> dict[Place, Choice]:
        """Choices that say how many entries exceed their thresholds."""
        return {
            place: Choice(max(1, round(kept[place] * self.selectors[place].size)), choice.threshold)
            if place in kept
            else choice
            for place, choice in choices.items()
        }

    def _diverges(self, choices: Mapping[Place, Choice]) -> float:
        self.use(choices)
        self.rows.start, self.rows.stop = 0, None
        self.tokens += self._divergence.tokens
        return self._divergence.measure()

    def _choice(self, place: Place, share: float) -> Choice:
        size = input_size(self.config, *place)
        if share <= 0:
            return Choice(size)
        keep = min(size, max(1, round((1 - share) * size)))
        scores = self._scores.get(place)
        if isinstance(scores, RankedEnergy):
            return Choice(keep, groups=scores.groups(keep))
        return Choice(keep, scores.quantile(share) if scores else None)


def _scaled(choice: Choice, factor: float) -> Choice:
    return choice if choice.threshold is None else replace(choice, threshold=choice.threshold * factor)
