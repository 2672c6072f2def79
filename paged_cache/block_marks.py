"""How a block looks in a picture of a pool: one character and one colour.

Blocks of one row have its letter and colour, small where the block has room left. A number says how many tables share a
block. Colours repeat what the characters say, so that neither a terminal nor a reader needs them.
"""

from .pool_map import BlockState, PoolMap

FREE, CACHED, OTHERS = "·", "~", "?"
SHARED_COLOR, CACHED_COLOR, OTHERS_COLOR, FREE_COLOR, INK = "#f6c566", "#c3c9d2", "#8a8f98", "#f4f5f7", "#1f2430"
ROW_COLORS = (
    "#6fa8dc", "#7fbf7b", "#c39bd3", "#e58b88", "#5fc4c0", "#b39b7d", "#f2a3c7", "#a3c940", "#8f9be8", "#e0a070",
    "#62b58f", "#d4d06a", "#b5a3e0", "#9ab8c4",
)  # fmt: skip


def symbol(pool_map: PoolMap, block: BlockState) -> str:
    """One character for the terminal."""
    if block.kind != "referenced":
        return FREE if block.kind == "free" else CACHED
    if block.is_shared:
        return str(block.num_refs) if block.num_refs < 10 else "+"
    if not block.owners:
        return OTHERS
    letter = pool_map.owners[block.owners[0]].letter
    return letter if block.num_tokens == pool_map.block_size else letter.lower()


def color(block: BlockState) -> str:
    """Hex."""
    if block.kind != "referenced":
        return CACHED_COLOR if block.kind == "cached" else FREE_COLOR
    if block.is_shared:
        return SHARED_COLOR
    return row_color(block.owners[0]) if block.owners else OTHERS_COLOR


def row_color(index: int) -> str:
    """Hex, for the owner at `index`; colours repeat, as letters do, only later."""
    return ROW_COLORS[index % len(ROW_COLORS)]
