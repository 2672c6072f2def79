"""The work list that the device writes, against a planner in Python; where it runs, see test_triton_attention.py."""

import random
from dataclasses import dataclass

import pytest
import torch

from paged_cache.kernels.triton import attention
from paged_cache.kernels.triton.plan import FIELDS, Plan, Shape

DEVICE = "cpu" if attention.INTERPRETED else "cuda"
pytestmark = [] if attention.INTERPRETED else [pytest.mark.gpu]

TILE = 16


@dataclass(frozen=True)
class Rows:
    """Lengths of a batch, and what else decides which keys are seen."""

    lens: tuple[int, ...]
    q_lens: tuple[int, ...]
    starts: tuple[int, ...] | None = None
    window: int | None = None
    chunk: int | None = None
    group: int = 4
    rows: int = 16
    fill: int = 1
    fixed: bool = False
    packed: bool = True

    @property
    def shape(self) -> Shape:
        """What the host knows; the block table has one spare block of 16."""
        capacity = max(self.lens) // 16 * 16 + 32
        sizes = sum(self.q_lens), max(self.q_lens), capacity, self.window, self.chunk
        return Shape(*sizes, self.group, self.rows, TILE, self.fill, self.fixed)

    def plan(self) -> Plan:
        """The device's plan."""
        cu = torch.tensor([0, *self.q_lens]).cumsum(0).int().to(DEVICE) if self.packed else None
        starts = torch.tensor(self.starts).int().to(DEVICE) if self.starts else None
        return self.shape.plan(torch.tensor(self.lens).int().to(DEVICE), cu, starts)

    def tiles(self) -> dict[tuple[int, int], range]:
        """The keys that each query tile of each row sees, one query at a time."""
        seen = {}
        for row, (length, q_len) in enumerate(zip(self.lens, self.q_lens, strict=True)):
            for tile in range(-(-q_len * self.group // self.rows)):
                tokens = {r // self.group for r in range(tile * self.rows, (tile + 1) * self.rows)} & set(range(q_len))
                keys = [key for token in tokens for key in self.keys(row, length - q_len + token)]
                seen[row, tile] = range(min(keys), max(keys) + 1) if keys else range(0)
        return seen

    def keys(self, row: int, pos: int) -> range:
        """The keys that a query at `pos` sees."""
        first = self.starts[row] if self.starts else 0
        if self.window is not None:
            first = max(first, pos - self.window + 1)
        if self.chunk is not None:
            first = max(first, pos // self.chunk * self.chunk)
        return range(first, pos + 1)


def check(rows: Rows) -> list[dict[str, int]]:
    """Each query tile has its splits once, they cover all it sees, and slots and items do not run over."""
    plan, tiles = rows.plan(), rows.tiles()
    columns = [dict(zip(FIELDS, column, strict=True)) for column in plan.work.T.tolist()]
    items = [item for item in columns if item["row"] >= 0]
    assert all(item["row"] == -1 for item in columns[len(items) :])
    assert len(columns) == plan.max_items
    slots = [item["slot"] + item["split"] for item in items if item["slot"] >= 0]
    assert sorted(slots) == list(range(len(slots)))
    assert len(slots) <= plan.max_slots
    by_tile = {tile: [item for item in items if (item["row"], item["tile"]) == tile] for tile in tiles}
    assert sum(map(len, by_tile.values())) == len(items)
    for tile, seen in tiles.items():
        parts = by_tile[tile]
        assert [item["split"] for item in parts] == list(range(parts[0]["num_splits"]))
        assert {item["slot"] >= 0 for item in parts} == {len(parts) > 1}
        if seen:
            begin = seen.start // TILE * TILE
            assert parts[0]["split_len"] % TILE == 0 or len(parts) == 1
            assert begin + len(parts) * parts[0]["split_len"] >= seen.stop
    return items


LENGTHS = {
    "equal": lambda n: (100,) * n,
    "ragged": lambda n: tuple(random.Random(n).randrange(1, 400) for _ in range(n)),
    "one long": lambda n: (1000, *(30 for _ in range(n - 1))),
    "zero": lambda n: (0,) * n,
    "some zero": lambda n: tuple(i % 3 * 50 for i in range(n)),
}


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 16, 33, 70])  # 64 rows are one step of the planner
def test_decoding(num_rows: int, kind: str) -> None:
    """One new token per row: every visible key has one item, and the GPU is filled but not flooded."""
    lens = LENGTHS[kind](num_rows)
    for fill in (1, 20, 200):
        rows = Rows(lens, (1,) * num_rows, fill=fill, packed=False)
        items = check(rows)
        if 2 * num_rows <= fill:
            assert len(items) <= fill
            longest = max(item["split_len"] for item in items)
            assert longest <= 2 * TILE + sum(lens) / (fill - num_rows)


@pytest.mark.parametrize("seed", range(24))
def test_random_batches(seed: int) -> None:
    """Packed rows of any length, with windows, chunks and padding, whatever the tiles."""
    dice = random.Random(seed)
    num_rows = dice.randrange(1, 34)
    lens = tuple(dice.choice((0, 1, 16, dice.randrange(300))) for _ in range(num_rows))
    q_lens = tuple(dice.choice((0, 1, 5, max(1, n // 2), n + 3)) for n in lens)
    if not any(q_lens):
        q_lens = (1, *q_lens[1:])
    check(
        Rows(
            lens,
            q_lens,
            starts=tuple(dice.randrange(n + 1) for n in lens) if dice.random() < 0.4 else None,
            window=dice.choice((None, None, 1, 17, 100)),
            chunk=dice.choice((None, None, 16, 50)),
            group=dice.choice((1, 3, 4, 71)),
            rows=dice.choice((16, 64)),
            fill=dice.choice((1, 10, 200)),
            fixed=dice.random() < 0.3,
        )
    )


def test_one_long_row_is_not_the_tail_of_a_batch() -> None:
    """1 x 32k and 63 x 1k on 50 programs per KV head: no item is longer than a third of what a program has to do."""
    lens = (1000,) * 31 + (32000,) + (1000,) * 32
    items = check(Rows(lens, (1,) * 64, fill=50))
    assert max(item["split_len"] for item in items) <= sum(lens) / 50 / 3


def test_a_window_is_all_that_is_split() -> None:
    """What the window hides is not counted."""
    hidden = check(Rows((32000,), (1,), window=1024, fill=8))
    short = check(Rows((1024,), (1,), fill=8))
    assert len(hidden) == len(short) == 8


def test_the_last_tokens_of_a_prompt_come_first() -> None:
    """They see most keys, and what takes longest is not started last."""
    items = check(Rows((256,), (256,), rows=64))
    assert [item["tile"] for item in items] == list(range(15, -1, -1))


def test_prompts_are_not_split_once_they_fill_the_gpu() -> None:
    """Their query tiles are work enough."""
    assert {item["num_splits"] for item in check(Rows((2000, 2000), (200, 200), rows=64, fill=20))} == {1}


@pytest.mark.parametrize("lens", [(1000,), (1000, 3, 700), (5000, 1000)], ids=str)
def test_fixed_splits_depend_on_the_row_alone(lens: tuple[int, ...]) -> None:
    """The row of 1000 tokens has the same two splits in any batch."""
    items = check(Rows(lens, (1,) * len(lens), fixed=True, fill=99))
    mine = [item for item in items if item["row"] == lens.index(1000)]
    assert [(item["num_splits"], item["split_len"]) for item in mine] == [(2, 512)] * 2


def test_the_keys_of_a_batch_may_be_more_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """2**32 + 16 keys and no items to spare: each row stays whole."""
    monkeypatch.setattr(Shape, "_budget", lambda *_: (0, TILE))
    lens = (2**30, 2**30, 2**30, 2**30, 16)
    work = Rows(lens, (1,) * 5, packed=False).plan().work
    assert work.T.tolist() == [[row, 0, 0, 1, length, -1] for row, length in enumerate(lens)]
