"""The growth operators that a plan or a command can name.

An operator is a frozen config with the methods `grow(config) -> Growth` and `shrink(target) -> config`;
`grow(shrink(target)).config` is `target`, but perhaps for the grouping of its Blocks into Stacks. The table of rules in
a `Growth` says everything else: what each tensor must be, and how Adam's moments follow.
"""

from raygrow.growth.depth import Depth
from raygrow.growth.experts import Experts
from raygrow.growth.gstack import Gstack
from raygrow.growth.width import Width

GrowthConfig = Gstack | Depth | Width | Experts
"""Any operator's config, told apart by the `operator` tag."""
