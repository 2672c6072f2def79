"""Takes prefixes out of an index as plain lists, and puts such lists into another. Plain Python."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from .manager import BlockManager
from .prefix import PrefixNode, Tokens


@dataclass(frozen=True)
class Branch:
    """One block of tokens of a list in which parents come before their children.

    Attributes:
        root: Number of its root.
        parent: Number of the branch before it, -1 for the first one behind a root.
        tokens: `block_size` token ids.
    """

    root: int
    parent: int
    tokens: Tokens


Placing = list[tuple[int, int, int]]
"""(number of a branch, layer group, block) each."""


def collect(roots: Sequence[PrefixNode]) -> tuple[list[Branch], list[PrefixNode]]:
    """What there is behind `roots`, the shortest prefixes first, and the node of each branch."""
    branches: list[Branch] = []
    nodes: list[PrefixNode] = []
    level = [(number, -1, root) for number, root in enumerate(roots)]
    while level:
        behind = []
        for root, parent, node in level:
            for tokens in sorted(node.children):
                child = node.children[tokens]
                if _leads_to_blocks(child):
                    behind.append((root, len(branches), child))
                    branches.append(Branch(root, parent, tokens))
                    nodes.append(child)
        level = behind
    return branches, nodes


def _leads_to_blocks(node: PrefixNode) -> bool:
    """Whether the node or one behind it has a block, in the pool or in host memory."""
    todo = [node]
    while todo:
        node = todo.pop()
        if any(block is not None for block in (*node.blocks, *node.host_blocks)):
            return True
        todo += node.children.values()
    return False


def plant(
    manager: BlockManager,
    keys: Sequence[Hashable | None],
    branches: Sequence[Branch],
    holds: Sequence[Sequence[bool]],
    write: Callable[[Placing], None],
) -> tuple[int, int]:
    """Gives a manager cached blocks for all branches that it does not hold, the first ones where not all fit.

    Cached blocks of other prefixes give way, the least recently used first; nothing that is referenced does.

    Args:
        manager: Its lock is held meanwhile.
        keys: What each root stands for; None if nothing behind it is wanted.
        branches: Parents before their children.
        holds: Per branch whether it has a block in each group.
        write: Fills blocks before anybody can find them. If it raises, nothing was changed but evictions.

    Returns:
        How many branches got blocks, and how many there was no room for.
    """
    with manager.lock:
        try:
            return _Planting(manager, keys, branches, holds).run(write)
        except Exception:  # put right by `run`
            raise
        except BaseException:  # Ctrl-C at any point
            manager._repair()
            raise


class _Planting:
    def __init__(
        self,
        manager: BlockManager,
        keys: Sequence[Hashable | None],
        branches: Sequence[Branch],
        holds: Sequence[Sequence[bool]],
    ) -> None:
        self._manager, self._index, self._allocator = manager, manager.index, manager.allocator
        self._roots = [None if key is None else self._index.root(key) for key in keys]
        self._branches, self._holds = branches, holds
        self._nodes = self._known()

    def run(self, write: Callable[[Placing], None]) -> tuple[int, int]:
        known = [block for node in self._nodes if node is not None for block in node.held()]
        self._allocator.acquire(known)  # eviction must not take what the new branches go on from
        new: list[int] = []
        try:
            places, num_left_out = self._places(self._manager.num_free)
            new = self._allocator.allocate(len(places))
            placing = [(branch, group, block) for (branch, group), block in zip(places, new, strict=True)]
            write(placing)
            for branch, group, block in placing:
                self._index.put(self._node(branch), group, block)
                self._allocator.mark_indexed(block)
        finally:
            self._manager.on_free(self._allocator.release([*reversed(new), *reversed(known)]))
        return len({branch for branch, _ in places}), num_left_out

    def _known(self) -> list[PrefixNode | None]:
        nodes: list[PrefixNode | None] = []
        for branch in self._branches:
            parent = self._roots[branch.root] if branch.parent < 0 else nodes[branch.parent]
            nodes.append(parent.children.get(branch.tokens) if parent is not None else None)
        return nodes

    def _places(self, num_free: int) -> tuple[list[tuple[int, int]], int]:
        """(branch, group) of the blocks to be made, those of one group and root side by side; branches left out."""
        places: list[tuple[int, int]] = []
        num_left_out = 0
        for branch in range(len(self._branches)):
            missing = self._missing(branch)
            if num_left_out or len(places) + len(missing) > num_free:
                num_left_out += bool(missing)
            else:
                places += [(branch, group) for group in missing]
        places.sort(key=lambda place: (place[1], self._branches[place[0]].root, place[0]))
        return places, num_left_out

    def _missing(self, branch: int) -> list[int]:
        if self._roots[self._branches[branch].root] is None:
            return []
        node = self._nodes[branch]
        blocks = node.blocks if node is not None else [None] * self._index.num_groups
        return [group for group, held in enumerate(self._holds[branch]) if held and blocks[group] is None]

    def _node(self, branch: int) -> PrefixNode:
        """Where a branch is in the index, from now on; eviction may have taken away nodes that were known."""
        path = []
        while branch >= 0 and not self._is_there(branch):
            path.append(branch)
            branch = self._branches[branch].parent
        node = self._nodes[branch] if branch >= 0 else self._roots[self._branches[path[-1]].root]
        for number in reversed(path):
            assert node is not None
            node = self._nodes[number] = self._index.insert(node, self._branches[number].tokens)
        assert node is not None
        return node

    def _is_there(self, branch: int) -> bool:
        node = self._nodes[branch]
        return node is not None and node.attached
