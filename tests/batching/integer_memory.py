"""Blocks as numbers: what the scheduler needs to know, without a pool."""

from dataclasses import dataclass

from paged_cache.batching.request import Request
from paged_cache.batching.scheduler import Prefix


@dataclass(eq=False)
class IntRow:
    """A sequence without tokens."""

    num_tokens: int
    num_computed: int = 0
    num_blocks: int = 0


class IntegerMemory:
    """Every row has blocks of its own; `prefixes` says how many tokens of a request are cached, in blocks nobody else uses."""

    def __init__(self, num_blocks, block_size=4, prefixes=None):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_free = num_blocks
        self.prefixes, self.coming, self.expected = prefixes or {}, set(), []

    def blocks_for(self, num_tokens):
        return -(-num_tokens // self.block_size)

    def growth(self, row, num_tokens):
        return max(0, self.blocks_for(row.num_computed + num_tokens) - row.num_blocks)

    def look(self, request):
        num_cached = min(self.prefixes.get(request.request_id, 0), request.rows[0].num_tokens - 1)
        return Prefix(num_cached, request.request_id in self.coming)

    def admit(self, request):
        for row in request.rows:
            assert row.num_blocks == row.num_computed == 0
            self.compute(row, min(self.prefixes.get(request.request_id, 0), row.num_tokens - 1))

    def expect(self, chunk):
        self.expected.append(chunk)

    def release(self, request):
        for row in request.rows:
            self.release_row(row)

    def release_row(self, row):
        self.num_free += row.num_blocks
        row.num_blocks = row.num_computed = 0

    def compute(self, row, num_tokens):
        """What a forward does: takes the blocks that the tokens need."""
        num_new = self.growth(row, num_tokens)
        assert num_new <= self.num_free, "the plan needs more blocks than there are"
        self.num_free -= num_new
        row.num_blocks += num_new
        row.num_computed += num_tokens


def make_request(name, num_prompt=4, num_new=4, **options):
    """A request with its first row."""
    request = Request(str(name), range(num_prompt), num_new, **options)
    request.rows = [IntRow(num_prompt)]
    return request
