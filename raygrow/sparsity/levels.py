"""From a split of the sparsity to what is kept: one level of a plan, searched on a loaded model."""

from collections.abc import Mapping

from torch import Tensor

from raygrow.nn.config import ModelConfig
from raygrow.nn.rack import Rack
from raygrow.progress import Progress, silent
from raygrow.sparsity import allocate
from raygrow.sparsity.allocate import Split, SplitName
from raygrow.sparsity.apply import install
from raygrow.sparsity.histogram import Histogram
from raygrow.sparsity.inputs import Place, input_size
from raygrow.sparsity.linear import SparseRows
from raygrow.sparsity.methods import Choice, Method
from raygrow.sparsity.plan import Level, make_level
from raygrow.sparsity.policy import Divergence, Policy, policy_loss


class Levels:
    """Makes levels of a model, which it makes sparse in place.

    Args:
        model: On its device.
        method: Which entries are kept.
        magnitudes: Of every input, for thresholds.
        tokens_BT: The calibration text.
        batch_size: Sequences at a time.
    """

    def __init__(
        self,
        model: Rack,
        method: Method,
        magnitudes: Mapping[Place, Histogram],
        tokens_BT: Tensor,
        *,
        batch_size: int = 8,
    ) -> None:
        self.model, self.batch_size = model, batch_size
        self.method: Method = method
        self.config: ModelConfig = model.config
        self.rows = SparseRows()
        self.tokens = tokens_BT.numel()
        """That have gone through the model."""
        self.selectors = install(model, method, self.rows)
        self._magnitudes = magnitudes
        self._divergence = Divergence(model, tokens_BT, batch_size=batch_size)
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
        if split == "uniform":
            return make_level(self.config, self.choices(allocate.uniform(self.config, sparsity)))
        best, lowest = allocate.best_ratio(self.config, sparsity, self.cost)
        if split == "search":
            if self._costs is None:
                self._costs = allocate.probe(self.config, self.cost, progress=progress)
            found = allocate.cheapest(self.config, sparsity, self._costs)
            if self.cost(found) < lowest:
                best = found
        return make_level(self.config, self.choices(best))

    def zeros(self) -> Level:
        """The one level of method `relu`: the hidden units that are zero, of which there are as many as the calibration
        text says. Those of experts are read whole.
        """
        hidden = {
            (block, name): selector
            for (block, name), selector in self.selectors.items()
            if name == "down" and not self.config.has_experts(block)
        }
        self._set({place: Choice(selector.size, 0.0) for place, selector in hidden.items()})
        for selector in hidden.values():
            selector.seen = (0, 0)
        self._divergence.measure()
        choices = self.choices({})
        for place, selector in hidden.items():
            kept, total = selector.seen or (0, 0)
            selector.seen = None
            choices[place] = Choice(max(1, round(kept / total * selector.size)), 0.0)
        return make_level(self.config, choices, self.method)

    def choices(self, split: Split) -> dict[Place, Choice]:
        """What is kept under a split; everything of inputs that it does not name."""
        return {place: self._choice(place, split.get(place, 0.0)) for place in self.selectors}

    def cost(self, split: Split) -> float:
        """How far a split takes the model from the dense one on the calibration text, all tokens sparse."""
        self._set(self.choices(split))
        self.rows.start, self.rows.stop = 0, None
        self.tokens += self._divergence.tokens
        return self._divergence.measure()

    def measure(self, choices: Mapping[Place, Choice], batch: tuple[Tensor, Tensor], policy: Policy) -> float:
        """Nats per token on a text; `choices` of no input are the dense model."""
        self._set(choices)
        self.tokens += batch[0].numel()
        return policy_loss(self.model, self.rows, batch, policy, batch_size=self.batch_size)[0]

    def _set(self, choices: Mapping[Place, Choice]) -> None:
        for place, selector in self.selectors.items():
            selector.choice = choices.get(place, Choice(selector.size))

    def _choice(self, place: Place, share: float) -> Choice:
        size = input_size(self.config, *place)
        if share <= 0:
            return Choice(size)
        keep = min(size, max(1, round((1 - share) * size)))
        return Choice(keep, self._magnitudes[place].quantile(share) if self.method == "teal" else None)
