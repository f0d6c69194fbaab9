"""What the partitions of the Hopper kernel hold in common, each as one argument with its methods.

An aggregate is a bundle of values that exists for the compiler alone: it costs nothing at run time.
"""

from __future__ import annotations

from typing import Any, TypeVar, dataclass_transform, get_type_hints

from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate, base_value

from calibatt_compiler.kernels.hopper.primitives import (
    drawn_count,
    fence_async_shared,
    gl,
    gluon,
    high,
    low,
    matrix,
    mbarrier,
    release,
)

# triton 3.9 renamed it; its arguments stayed.
start_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


Class = TypeVar("Class")


@dataclass_transform(kw_only_default=True)
def aggregate(cls: type[Class]) -> type[Class]:
    """Make a class a triton aggregate that is built from its fields by name.

    By name, because a constructor is no part of the key that Triton's cache finds a kernel by, but
    the place that calls it is.
    """
    cls.__annotations__ = fields = get_type_hints(cls)

    def init(self: Any, **values: Any) -> None:
        for name in fields:
            value = values.pop(name)
            setattr(self, name, value if isinstance(value, base_value) else gl.constexpr(value))
        assert not values, f"{cls.__name__} has no fields {list(values)}"

    init.__triton_builtin__ = True  # type: ignore[attr-defined]  # nothing in it to be hashed
    cls.__init__ = init  # type: ignore[method-assign]
    return _aggregate(cls)  # type: ignore[no-any-return]


@gluon.jit
def load_tile(desc, batch, head, row, full, tile):
    """Start the copy of one tile of rows; `full` completes when it has landed."""
    mbarrier.expect(full, desc.block_type.nbytes)
    start_load(desc, [batch, head, row, 0], full, tile)


@aggregate
class Ring:
    """Stages in shared memory for blocks of keys, or of values, on their way.

    Block i of a program lies in stage i % STAGES, on its (i // STAGES)-th use. Each stage has two
    barriers: its block has landed; both consumers are done with it.

    Attributes:
        desc: descriptor of (B, H, S, D), loaded in tiles of a block.
        tiles: (STAGES, 1, 1, rows, D).
        full: (STAGES).
        empty: (STAGES).
        octaves: float32 (STAGES), of the keys in each stage, with zones only.
        STAGES: their number.
    """

    desc: base_value
    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    octaves: gl.shared_memory_descriptor | gl.constexpr
    STAGES: gl.constexpr

    @gluon.jit
    def acquire(self, number, pred=True):
        """Wait until the stage of block `number` is free, if `pred`."""
        parity = ((number // self.STAGES) & 1) ^ 1
        mbarrier.wait(self.empty.index(number % self.STAGES), parity, pred=pred)

    @gluon.jit
    def load(self, batch, head, row, number):
        """Start to load the tokens from `row` on as block `number`, whose stage is free."""
        stage = number % self.STAGES
        load_tile(self.desc, batch, head, row, self.full.index(stage), self.tiles.index(stage))

    @gluon.jit
    def wait(self, number, pred=True):
        """Wait until block `number` has landed, if `pred`."""
        parity = (number // self.STAGES) & 1
        mbarrier.wait(self.full.index(number % self.STAGES), parity, pred=pred)

    @gluon.jit
    def matrix(self, number):
        """Block `number`, (rows, D)."""
        return matrix(self.tiles, number % self.STAGES)

    @gluon.jit
    def release(self, number):
        """Give the stage of block `number` back, with every thread of a consumer."""
        release(self.empty.index(number % self.STAGES))


@gluon.jit
def make_ring(desc, octaves, STAGES: gl.constexpr):
    """Allocate a ring of as many stages for the blocks of `desc`."""
    shape: gl.constexpr = desc.block_type.shape
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(
        desc.dtype, [STAGES, 1, 1, shape[2], shape[3]], desc.layout
    )  # fmt: skip
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        # Every thread of both consumers releases a stage: see `release`.
        mbarrier.init(empty.index(stage), count=256)
    return Ring(desc=desc, tiles=tiles, full=full, empty=empty, octaves=octaves, STAGES=STAGES)


@aggregate
class Queries:
    """Two tiles of queries in two parts of 64 rows, one for each consumer.

    The next tile's are loaded while this one's are used, and its slots stage this one's output. The
    tile of turn i, the i-th of its program, lies in the slots of i % 2. Each slot has three
    barriers: its queries have landed; its output is staged; the output is stored.

    Attributes:
        tiles: (4, 1, 1, 64, D).
        full: (4).
        staged: (4).
        empty: (4).
    """

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    staged: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.jit
    def acquire(self, turn, part):
        """Wait until the slot is free."""
        mbarrier.wait(self.empty.index((turn % 2) * 2 + part), ((turn // 2) & 1) ^ 1)

    @gluon.jit
    def wait(self, turn, part):
        """Wait until the queries have landed."""
        mbarrier.wait(self.full.index((turn % 2) * 2 + part), (turn // 2) & 1)

    @gluon.jit
    def matrix(self, turn, part):
        """The queries, or the place of their output, (64, D)."""
        return matrix(self.tiles, (turn % 2) * 2 + part)

    @gluon.jit
    def stage(self, turn, part, output):
        """Put the output in the place of the queries, and tell the store warp."""
        place = self.matrix(turn, part)
        place.store(output.to(place.dtype))
        fence_async_shared()
        mbarrier.arrive(self.staged.index((turn % 2) * 2 + part), count=1)

    @gluon.jit
    def wait_staged(self, turn, part):
        """Wait until the output is there."""
        mbarrier.wait(self.staged.index((turn % 2) * 2 + part), (turn // 2) & 1)

    @gluon.jit
    def release(self, turn, part):
        """Give the slot back."""
        mbarrier.arrive(self.empty.index((turn % 2) * 2 + part), count=1)


@gluon.jit
def make_queries(desc):
    """Allocate the slots of the queries of `desc`."""
    shape: gl.constexpr = desc.block_type.shape
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(desc.dtype, [4, 1, 1, shape[2], shape[3]], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], layout)
    staged = gl.allocate_shared_memory(gl.int64, [4, 1], layout)
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], layout)
    for slot in gl.static_range(4):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(staged.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    return Queries(tiles=tiles, full=full, staged=staged, empty=empty)


@aggregate
class Tiles:
    """What a program has to do: its tiles, each once for every batch item.

    Attributes:
        tables: `launch.TileTables`.
        results: `launch.Results`.
        sizes: `launch.Sizes`.
        draw: `launch.Draw`.
        VARIANT: `launch.Variant`.
    """

    tables: gl.tuple
    results: gl.tuple
    sizes: gl.tuple
    draw: gl.tuple
    VARIANT: gl.constexpr

    @gluon.jit
    def to_do(self):
        """First tile entry of this program, the end of its entries, how often it works on one.

        With `repair` nothing is to be done unless the flag is set.
        """
        starts_ptr = self.tables.starts_ptr
        first = gl.load(starts_ptr + gl.program_id(0))
        end = gl.load(starts_ptr + gl.program_id(0) + 1)
        total = (end - first) * self.sizes.batches
        if self.VARIANT.repair:
            total = gl.where(gl.load(self.results.flag_ptr) != 0, total, 0)
        return first, end, total

    @gluon.jit
    def where(self, entry):
        """Head of a tile, 16 bits up, and query block."""
        return gl.load(self.tables.tiles_ptr + entry * 4)

    @gluon.jit
    def word(self, entry, batch):
        """Second word of a tile; with `lengths`, what `hopper_counts` has made of it."""
        if self.VARIANT.lengths:
            # One past the last batch item may be asked for, see `advance`: there is a spare row.
            return gl.load(self.tables.counts_ptr + batch * self.sizes.tiles + entry)
        return gl.load(self.tables.tiles_ptr + entry * 4 + 1)

    @gluon.jit
    def count(self, entry, batch):
        """Key blocks of a tile, and 16 bits up the position of the one to mask, plus one."""
        word = self.word(entry, batch)
        if self.VARIANT.zones:
            return drawn_count(word, self.draw.phase)
        return word

    @gluon.jit
    def last_keys(self, batch, count):
        """How many keys count in the block where they end; none where a row keeps no valid key."""
        if self.VARIANT.lengths:
            item = gl.minimum(batch, self.sizes.batches - 1)
            length = gl.load(self.tables.lengths_ptr + item)
            return gl.where(low(count) == 0, 0, length % self.VARIANT.block_n)
        return self.sizes.length_k % self.VARIANT.block_n

    @gluon.jit
    def first_code(self, entry):
        """Where the weights of a tile's blocks begin."""
        if self.VARIANT.weighted:
            return gl.load(self.tables.code_starts_ptr + entry)
        else:  # noqa: RET505  two return types: only one is compiled
            return 0

    @gluon.jit
    def shift(self, place):
        """What is added to a block's scores, in units of log2: its weight, coded in sixteenths."""
        if self.VARIANT.weighted:
            return gl.load(self.tables.codes_ptr + place) * 0.0625
        else:  # noqa: RET505  two return types: only one is compiled
            return 0.0

    @gluon.jit
    def sums_place(self, entry, batch, count):
        """Where the sums of a tile's blocks are kept, in elements; see `keep_sums`."""
        if self.VARIANT.energy:
            where = self.where(entry)
            row = gl.cast(batch, gl.int64) * self.sizes.heads + high(where)
            row = row * self.sizes.query_blocks + low(where)
            return row * (low(count) | 1) * 128
        else:  # noqa: RET505  two return types: only one is compiled
            return 0
