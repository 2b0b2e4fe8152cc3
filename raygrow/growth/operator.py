"""The growth operators that a plan or a command can name.

An operator is a frozen config with the methods `grow(config) -> Growth`, `shrink(target) -> config` and
`checks(source, target) -> list[Check]`; `grow(shrink(target))` has the Blocks of `target`.
"""

from raygrow.growth.gstack import Gstack

GrowthConfig = Gstack
"""Any operator's config. A union told apart by the `operator` tag as soon as there is a second one."""
