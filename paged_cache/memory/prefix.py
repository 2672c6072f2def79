"""Finds blocks by the tokens they hold. Plain Python."""

from collections.abc import Hashable, Iterator, Sequence
from typing import TypeAlias
from weakref import WeakValueDictionary

from ..errors import PagedCacheError

Tokens: TypeAlias = tuple[int, ...]


def exact_salt(salt: Hashable) -> Hashable:
    """What stands for a salt in keys: 1, 1.0 and True are equal in Python, in tuples, too, but different salts."""
    return type(salt), tuple(map(exact_salt, salt)) if isinstance(salt, tuple) else salt


class PrefixNode:
    """One full block of tokens behind a known prefix: the prefix is the path from a root to this node.

    Attributes:
        parent: Node of the tokens before, None for a root.
        tokens: The `block_size` token ids of this block, () for a root.
        depth: Number of blocks from the root.
        blocks: Per layer group the block that holds K and V of these tokens, or None.
        host_blocks: Likewise the block in host memory; there may be both.
        children: Continuations by token ids. The lookup compares the ids themselves; a hash alone is never believed.
        attached: Whether the path from the root leads here; False after the node was pruned.
        key: What a root stands for, None below.
    """

    __slots__ = ("__weakref__", "attached", "blocks", "children", "depth", "host_blocks", "key", "parent", "tokens")

    def __init__(self, parent: "PrefixNode | None", tokens: Tokens, num_groups: int, key: Hashable = None) -> None:
        self.parent = parent
        self.tokens = tokens
        self.depth: int = parent.depth + 1 if parent else 0
        self.blocks: list[int | None] = [None] * num_groups
        self.host_blocks: list[int | None] = [None] * num_groups
        self.children: dict[Tokens, PrefixNode] = {}
        self.key = key
        self.attached = True

    def held(self) -> list[int]:
        """The blocks that there are."""
        return [block for block in self.blocks if block is not None]

    def is_empty(self) -> bool:
        """Whether the node holds no block and leads to none."""
        num_none = self.blocks.count(None) + self.host_blocks.count(None)
        return not self.children and num_none == 2 * len(self.blocks)


Place: TypeAlias = tuple[PrefixNode, int]
"""A block's place in the index: its node and layer group."""


class PrefixIndex:
    """A trie over blocks of token ids, with one root for everything else that K and V depend on (weights, salt, ...)."""

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        # a root lives as long as a sequence or a block behind it: those of old weights and gone tenants vanish
        self._roots: WeakValueDictionary[Hashable, PrefixNode] = WeakValueDictionary()
        self._places: dict[int, Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def blocks(self) -> Iterator[int]:
        """All blocks in the index."""
        return iter(list(self._places))

    def roots(self) -> list[PrefixNode]:
        """The starts of all prefixes there are."""
        return list(self._roots.values())

    def nodes(self) -> Iterator[PrefixNode]:
        """All nodes but the roots."""
        todo = [child for root in list(self._roots.values()) for child in root.children.values()]
        while todo:
            node = todo.pop()
            todo += node.children.values()
            yield node

    def place(self, block: int) -> Place:
        """What `block` stands for."""
        return self._places[block]

    def clear(self) -> None:
        """Knows nothing any more; whoever still has a node of before has to let go of it."""
        self._roots = WeakValueDictionary()
        self._places = {}

    def root(self, key: Hashable) -> PrefixNode:
        """The start of all prefixes under `key`; made on first use."""
        node = self._roots.get(key)
        if node is None:
            node = self._roots[key] = PrefixNode(None, (), self.num_groups, key)
        return node

    def insert(self, parent: PrefixNode, tokens: Tokens) -> PrefixNode:
        """The node of `tokens` behind `parent`; made if it is not there."""
        parent = self._attached(parent)
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = PrefixNode(parent, tokens, self.num_groups)
        return node

    def put(self, node: PrefixNode, group: int, block: int) -> None:
        """Lets `block` stand for `node` in `group`, where there was none."""
        if node.blocks[group] is not None or block in self._places:
            raise PagedCacheError(f"block {block} or its place in the prefix index is taken already")
        node.blocks[group] = block
        self._places[block] = (node, group)

    def remove(self, block: int) -> None:
        """Forgets `block`, and nodes that lead nowhere without it."""
        node, group = self._places.pop(block)
        node.blocks[group] = None
        self.prune(node)

    def match(self, root: PrefixNode, tokens: Sequence[int], block_size: int) -> list[PrefixNode]:
        """The nodes of the longest known path that spells the start of `tokens`, whatever blocks they still have."""
        nodes, node = [], root
        for start in range(0, len(tokens) - block_size + 1, block_size):
            child = node.children.get(tuple(tokens[start : start + block_size]))
            if child is None:
                break
            nodes.append(child)
            node = child
        return nodes

    def check(self, is_indexed: set[int]) -> None:
        """Raises `PagedCacheError` unless nodes and places agree with each other and with the allocator's marks."""
        if set(self._places) != is_indexed:
            raise PagedCacheError(f"indexed blocks differ: {sorted(set(self._places) ^ is_indexed)[:8]}")
        for block, (node, group) in self._places.items():
            if node.blocks[group] != block:
                raise PagedCacheError(f"block {block} is not where the prefix index says")
            if not self.is_reachable(node):
                raise PagedCacheError(f"block {block} cannot be found from its root")

    def is_reachable(self, node: PrefixNode) -> bool:
        """Whether `match` can find `node`."""
        while node.parent is not None:
            if not node.attached or node.parent.children.get(node.tokens) is not node:
                return False
            node = node.parent
        return self._roots.get(node.key) is node

    def _attached(self, node: PrefixNode) -> PrefixNode:
        """The node that stands for `node` in the trie; pruned ones are put back."""
        detached = []
        while node.parent is not None and not node.attached:
            detached.append(node)
            node = node.parent
        if node.parent is None:
            node = self._roots.setdefault(node.key, node)
        for child in reversed(detached):
            known = node.children.setdefault(child.tokens, child)
            if known is child:
                child.parent, child.attached = node, True
            node = known
        return node

    def prune(self, node: PrefixNode) -> None:
        """Takes `node` out if it is empty, and nodes before it that lead nowhere without it."""
        while node.parent is not None and node.attached and node.is_empty():
            del node.parent.children[node.tokens]
            node.attached = False
            node = node.parent
