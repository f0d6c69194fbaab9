"""The two consumer warpgroups: products and softmax of 64 query rows each.

For each key block a warpgroup issues QK of this block and PV of the one before, and computes
exponentials while the tensor cores work on the other warpgroup's products. Probabilities go from
registers into the second product; they never see shared memory.
"""

from __future__ import annotations

from calibatt_compiler.kernels.hopper.primitives import (
    add_sums,
    advance,
    exp2,
    fence_async_shared,
    finite,
    gl,
    gluon,
    high,
    keep_sums,
    low,
    mask_scores,
    matrix,
    mbarrier,
    partial_sums,
    raised,
    release,
    rescale,
    tile_count,
    tiles_to_do,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip

# Row sums in this range are exact to rounding: nothing that counts was flushed to zero, and their
# inverse is a normal number.
SUM_FLOOR = gl.constexpr(2.0**-60)
SUM_LIMIT = gl.constexpr(2.0**120)


@gluon.jit
def first_code(code_starts_ptr, entry, WEIGHTED: gl.constexpr):
    """Where the weights of a tile's blocks begin."""
    if WEIGHTED:
        return gl.load(code_starts_ptr + entry)
    else:  # noqa: RET505  two return types: only one is compiled
        return 0


@gluon.jit
def shift_of(codes_ptr, place, WEIGHTED: gl.constexpr):
    """What is added to the scores of a block, in units of log2: its weight, coded in sixteenths."""
    if WEIGHTED:
        return gl.load(codes_ptr + place) * 0.0625
    else:  # noqa: RET505  two return types: only one is compiled
        return 0.0


@gluon.jit
def last_keys(
    lengths_ptr, length_k, batch, batches, count, BLOCK_N: gl.constexpr, LENGTHS: gl.constexpr
):
    """How many keys count in the block where they end; none where the row keeps no valid key."""
    if LENGTHS:
        length = gl.load(lengths_ptr + gl.minimum(batch, batches - 1))
        return gl.where(low(count) == 0, 0, length % BLOCK_N)
    return length_k % BLOCK_N


@gluon.jit
def first_maximum(scores, scale_log2, shift):
    """Row maximum of a tile's first block, scaled: the reference that its softmax starts from."""
    return gl.max(scores, 1) * scale_log2 + shift


@gluon.jit
def probabilities(scores, maximum, scale_log2, shift):
    """2^(scaled score - maximum), (M, N) float32."""
    return exp2(scores * scale_log2 - gl.expand_dims(finite(maximum) - shift, 1))


@gluon.jit
def sums_place(tiles_ptr, entry, batch, heads, query_blocks, count, ENERGY: gl.constexpr):
    """Where the sums of a tile's blocks are kept, in elements; see `keep_sums`."""
    if ENERGY:
        where = gl.load(tiles_ptr + entry * 4)
        row = (gl.cast(batch, gl.int64) * heads + high(where)) * query_blocks + low(where)
        return row * (low(count) | 1) * 128
    else:  # noqa: RET505  two return types: only one is compiled
        return 0


@gluon.jit
def finish(
    acc, total, maximum, q, staged, flag_ptr, lse_ptr, tiles_ptr, entry, batch, count,
    heads, length_q, PART: gl.constexpr, FIXED: gl.constexpr, LSE: gl.constexpr,
    LENGTHS: gl.constexpr,
):  # fmt: skip
    """Divide, stage the output where the queries were, and tell the store warp.

    With FIXED, raise the flag unless every number is finite and the sums are in range. NaN fails
    the comparison too, and products with zero carry what is wrong with any element of `acc` there.
    """
    by_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    sums = gl.sum(total, 1)
    if FIXED:
        check = gl.convert_layout(sums, by_row) + gl.sum(acc * 0.0, 1)
        wrong = gl.where((check < SUM_LIMIT) & (check > SUM_FLOOR), 0, 1)
        # Without any valid key the sums are zero, and that is right.
        if (gl.max(wrong, 0) > 0) & (low(count) > 0):
            gl.store(flag_ptr, 1)
    if LSE:
        where = gl.load(tiles_ptr + entry * 4)
        rows_of: gl.constexpr = maximum.type.layout
        row = low(where) * 128 + PART * 64 + gl.arange(0, 64, rows_of)
        lse = (finite(maximum) + gl.log2(gl.convert_layout(sums, rows_of))) * 0.6931471805599453
        base = gl.cast(batch * heads + high(where), gl.int64) * length_q
        gl.store(lse_ptr + base + row, lse, mask=row < length_q)
    inverse = 1.0 / gl.convert_layout(sums, by_row)
    if LENGTHS:
        # A row without any valid key: zero, as SDPA gives.
        inverse = gl.where(gl.convert_layout(sums, by_row) == 0.0, 0.0, inverse)
    acc = acc * gl.expand_dims(inverse, 1)
    q.store(acc.to(q.dtype))
    fence_async_shared()
    mbarrier.arrive(staged, count=1)


@gluon.jit
def consumer(  # noqa: PLR0915  one loop, read from top to bottom
    q_tiles, k_tiles, v_tiles, q_full, staged, k_full, k_empty, v_full, v_empty,
    tiles_ptr, starts_ptr, counts_ptr, lengths_ptr, codes_ptr, code_starts_ptr, lse_ptr, flag_ptr,
    sums_ptr, scale_log2, batches, heads, tiles, query_blocks, length_q, length_k, octaves,
    draw_phase,
    PART: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    FIXED: gl.constexpr, REPAIR: gl.constexpr, RAGGED: gl.constexpr, LENGTHS: gl.constexpr,
    WEIGHTED: gl.constexpr, LSE: gl.constexpr, ENERGY: gl.constexpr, ZONES: gl.constexpr,
):  # fmt: skip
    """Attend the query rows PART * 64 to PART * 64 + 64 of every tile of this program."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, out_layout)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = q_tiles.dtype
    first, end, total = tiles_to_do(starts_ptr, flag_ptr, batches, REPAIR)
    no_scores = gl.zeros([64, BLOCK_N], gl.float32, score_layout)
    V_STAGES: gl.constexpr = STAGES + 1
    # Blocks consumed so far: keys of block i lie in stage i % STAGES, on its (i // STAGES)-th use.
    done = 0
    if total > 0:
        entry = first
        batch = 0
        count = tile_count(
            tiles_ptr, counts_ptr, entry, batch, tiles, draw_phase, LENGTHS, ZONES
        )  # fmt: skip
        valid = last_keys(lengths_ptr, length_k, batch, batches, count, BLOCK_N, LENGTHS)
        code = first_code(code_starts_ptr, entry, WEIGHTED)
        mbarrier.wait(q_full.index(PART), 0)
        mbarrier.wait(k_full.index(0), 0)
        keys = matrix(k_tiles, 0).permute((1, 0))
        token = warpgroup_mma(matrix(q_tiles, PART), keys, no_scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[token])
        release(k_empty.index(0))
        scores = mask_scores(scores, 1, high(count), valid, RAGGED)
        shift = shift_of(codes_ptr, code, WEIGHTED)
        maximum = first_maximum(scores, scale_log2, shift)
        p = probabilities(scores, maximum, scale_log2, shift)
        sums = partial_sums(p)
        place = sums_place(tiles_ptr, entry, batch, heads, query_blocks, count, ENERGY)
        keep_sums(sums_ptr, place, 0, sums, maximum, PART, ENERGY)
        p = gl.convert_layout(p.to(dtype), p_layout)
        mbarrier.wait(v_full.index(0), 0)
        done += 1
        for turn in range(total):
            slot = (turn % 2) * 2 + PART
            q = matrix(q_tiles, slot)
            acc = gl.zeros([64, HEAD_DIM], gl.float32, out_layout)
            blocks = gl.maximum(low(count), 1)
            masked = high(count)
            # The next tile's entry is read now, so that its latency is hidden.
            next_entry, next_batch = advance(entry, batch, first, end)
            next_count = tile_count(
                tiles_ptr, counts_ptr, next_entry, next_batch, tiles, draw_phase, LENGTHS, ZONES
            )  # fmt: skip
            next_valid = last_keys(
                lengths_ptr, length_k, next_batch, batches, next_count, BLOCK_N, LENGTHS
            )  # fmt: skip
            next_code = first_code(code_starts_ptr, next_entry, WEIGHTED)
            next_shift = shift_of(codes_ptr, next_code, WEIGHTED)
            shift_ahead = shift_of(codes_ptr, code + 1, WEIGHTED)
            next_place = sums_place(
                tiles_ptr, next_entry, next_batch, heads, query_blocks, next_count, ENERGY
            )  # fmt: skip
            mbarrier.wait(k_full.index(done % STAGES), (done // STAGES) & 1, pred=blocks > 1)
            for position in range(1, blocks):
                stage = done % STAGES
                phase = (done // STAGES) & 1
                v_stage = done % V_STAGES
                before = (done - 1) % V_STAGES
                # QK of this block and PV of the last one are issued together: the tensor cores
                # have work while this warpgroup computes exponentials.
                keys = matrix(k_tiles, stage).permute((1, 0))
                token = warpgroup_mma(q, keys, no_scores, use_acc=False, is_async=True)
                out_token = warpgroup_mma(p, matrix(v_tiles, before), acc, is_async=True)
                if ZONES:
                    # The octave has arrived before its stage is given back.
                    octave = octaves.index(stage).load(one)
                    scores, octave = warpgroup_mma_wait(1, deps=[token, octave])
                else:
                    scores = warpgroup_mma_wait(1, deps=[token])
                release(k_empty.index(stage))
                scores = mask_scores(scores, position + 1, masked, valid, RAGGED)
                # Read one block ahead; behind the last block of all lies a spare code.
                shift = shift_ahead
                if ZONES:
                    shift = gl.sum(octave, 0)
                shift_ahead = shift_of(codes_ptr, code + position + 1, WEIGHTED)
                higher = maximum
                if not FIXED:
                    higher = raised(maximum, gl.max(scores, 1) * scale_log2 + shift, sums)
                # PV of the last block is nearly done here, since a warp can't run ahead of its own
                # products: wait for it before the exponentials, so that ptxas mixes rescaling into
                # them. The barrier wait in front keeps ptxas from hoisting the product's wait.
                mbarrier.wait(v_full.index(v_stage), (done // V_STAGES) & 1)
                acc, higher = warpgroup_mma_wait(0, deps=[out_token, higher])
                release(v_empty.index(before))
                following = done + 1
                mbarrier.wait(
                    k_full.index(following % STAGES),
                    (following // STAGES) & 1,
                    pred=position + 1 < blocks,
                )
                shrink = higher
                if not FIXED:
                    shrink = exp2(maximum - finite(higher))
                    maximum = higher
                p32 = probabilities(scores, maximum, scale_log2, shift)
                part = partial_sums(p32)
                keep_sums(sums_ptr, place, position, part, maximum, PART, ENERGY)
                sums = add_sums(sums, part, shrink, FIXED)
                p = gl.convert_layout(p32.to(dtype), p_layout)
                if not FIXED:
                    acc = rescale(acc, gl.convert_layout(shrink, by_row))
                done += 1
            before = (done - 1) % V_STAGES
            if turn + 1 < total:
                # The first QK of the next tile goes out together with this tile's last PV: no
                # bubble where tiles meet.
                next_slot = ((turn + 1) % 2) * 2 + PART
                stage = done % STAGES
                phase = (done // STAGES) & 1
                mbarrier.wait(q_full.index(next_slot), ((turn + 1) // 2) & 1)
                mbarrier.wait(k_full.index(stage), phase)
                keys = matrix(k_tiles, stage).permute((1, 0))
                token = warpgroup_mma(
                    matrix(q_tiles, next_slot), keys, no_scores, use_acc=False, is_async=True
                )  # fmt: skip
                out_token = warpgroup_mma(p, matrix(v_tiles, before), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=[token])
                release(k_empty.index(stage))
                scores = mask_scores(scores, 1, high(next_count), next_valid, RAGGED)
                next_maximum = first_maximum(scores, scale_log2, next_shift)
                acc, next_maximum = warpgroup_mma_wait(0, deps=[out_token, next_maximum])
                release(v_empty.index(before))
                p32 = probabilities(scores, next_maximum, scale_log2, next_shift)
                next_sums = partial_sums(p32)
                keep_sums(sums_ptr, next_place, 0, next_sums, next_maximum, PART, ENERGY)
                p = gl.convert_layout(p32.to(dtype), p_layout)
                finish(
                    acc, sums, maximum, q, staged.index(slot), flag_ptr, lse_ptr,
                    tiles_ptr, entry, batch, count, heads, length_q, PART, FIXED, LSE, LENGTHS,
                )  # fmt: skip
                # After `finish`: the values of a one-block tile come only once the store warp has
                # freed the slot of the tile before.
                mbarrier.wait(v_full.index(done % V_STAGES), (done // V_STAGES) & 1)
                sums = next_sums
                maximum = next_maximum
                done += 1
            else:
                acc = warpgroup_mma(p, matrix(v_tiles, before), acc, is_async=False)
                release(v_empty.index(before))
                finish(
                    acc, sums, maximum, q, staged.index(slot), flag_ptr, lse_ptr,
                    tiles_ptr, entry, batch, count, heads, length_q, PART, FIXED, LSE, LENGTHS,
                )  # fmt: skip
            entry = next_entry
            batch = next_batch
            count = next_count
            valid = next_valid
            code = next_code
            place = next_place
