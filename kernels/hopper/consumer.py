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
    finite,
    gl,
    gluon,
    high,
    keep_sums,
    low,
    mask_scores,
    partial_sums,
    raised,
    rescale,
    warpgroup_mma,
    warpgroup_mma_wait,
)  # fmt: skip

# Row sums in this range are exact to rounding: nothing that counts was flushed to zero, and their
# inverse is a normal number.
SUM_FLOOR = gl.constexpr(2.0**-60)
SUM_LIMIT = gl.constexpr(2.0**120)


@gluon.jit
def first_maximum(scores, scale_log2, shift):
    """Row maximum of a tile's first block, scaled: the reference that its softmax starts from."""
    return gl.max(scores, 1) * scale_log2 + shift


@gluon.jit
def probabilities(scores, maximum, scale_log2, shift):
    """2^(scaled score - maximum), (M, N) float32."""
    return exp2(scores * scale_log2 - gl.expand_dims(finite(maximum) - shift, 1))


@gluon.jit
def finish(acc, total, maximum, queries, turn, tiles, entry, batch, count, PART: gl.constexpr):
    """Divide, stage the output where the queries were, and tell the store warp.

    With `fixed`, raise the flag unless every number is finite and the sums are in range. NaN fails
    the comparison too, and products with zero carry what is wrong with any element of `acc` there.
    """
    by_row: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    sums = gl.sum(total, 1)
    if tiles.VARIANT.fixed:
        check = gl.convert_layout(sums, by_row) + gl.sum(acc * 0.0, 1)
        wrong = gl.where((check < SUM_LIMIT) & (check > SUM_FLOOR), 0, 1)
        # Without any valid key the sums are zero, and that is right.
        if (gl.max(wrong, 0) > 0) & (low(count) > 0):
            gl.store(tiles.results.flag_ptr, 1)
    if tiles.VARIANT.lse:
        where = tiles.where(entry)
        length_q = tiles.sizes.length_q
        rows_of: gl.constexpr = maximum.type.layout
        row = low(where) * 128 + PART * 64 + gl.arange(0, 64, rows_of)
        lse = (finite(maximum) + gl.log2(gl.convert_layout(sums, rows_of))) * 0.6931471805599453
        base = gl.cast(batch * tiles.sizes.heads + high(where), gl.int64) * length_q
        gl.store(tiles.results.lse_ptr + base + row, lse, mask=row < length_q)
    inverse = 1.0 / gl.convert_layout(sums, by_row)
    if tiles.VARIANT.lengths:
        # A row without any valid key: zero, as SDPA gives.
        inverse = gl.where(gl.convert_layout(sums, by_row) == 0.0, 0.0, inverse)
    queries.stage(turn, PART, acc * gl.expand_dims(inverse, 1))


@gluon.jit
def consumer(  # noqa: PLR0915  one loop, read from top to bottom
    queries, keys, values, tiles, scale_log2, PART: gl.constexpr
):
    """Attend the query rows PART * 64 to PART * 64 + 64 of every tile of this program."""
    BLOCK_N: gl.constexpr = tiles.VARIANT.block_n
    HEAD_DIM: gl.constexpr = tiles.VARIANT.head_dim
    FIXED: gl.constexpr = tiles.VARIANT.fixed
    RAGGED: gl.constexpr = tiles.VARIANT.ragged
    ZONES: gl.constexpr = tiles.VARIANT.zones
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, out_layout)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = queries.tiles.dtype
    first, end, total = tiles.to_do()
    no_scores = gl.zeros([64, BLOCK_N], gl.float32, score_layout)
    # Blocks consumed so far, so the number of the next one in both rings.
    done = 0
    if total > 0:
        entry = first
        batch = 0
        count = tiles.count(entry, batch)
        valid = tiles.last_keys(batch, count)
        code = tiles.first_code(entry)
        queries.wait(0, PART)
        keys.wait(0)
        q = queries.matrix(0, PART)
        token = warpgroup_mma(
            q, keys.matrix(0).permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(0, deps=[token])
        keys.release(0)
        scores = mask_scores(scores, 1, high(count), valid, RAGGED)
        shift = tiles.shift(code)
        maximum = first_maximum(scores, scale_log2, shift)
        p = probabilities(scores, maximum, scale_log2, shift)
        sums = partial_sums(p)
        place = tiles.sums_place(entry, batch, count)
        keep_sums(tiles, place, 0, sums, maximum, PART)
        p = gl.convert_layout(p.to(dtype), p_layout)
        values.wait(0)
        done += 1
        for turn in range(total):
            q = queries.matrix(turn, PART)
            acc = gl.zeros([64, HEAD_DIM], gl.float32, out_layout)
            blocks = gl.maximum(low(count), 1)
            masked = high(count)
            # The next tile's entry is read now, so that its latency is hidden.
            next_entry, next_batch = advance(entry, batch, first, end)
            next_count = tiles.count(next_entry, next_batch)
            next_valid = tiles.last_keys(next_batch, next_count)
            next_code = tiles.first_code(next_entry)
            next_shift = tiles.shift(next_code)
            shift_ahead = tiles.shift(code + 1)
            next_place = tiles.sums_place(next_entry, next_batch, next_count)
            keys.wait(done, pred=blocks > 1)
            for position in range(1, blocks):
                # QK of this block and PV of the last one are issued together: the tensor cores
                # have work while this warpgroup computes exponentials.
                token = warpgroup_mma(
                    q, keys.matrix(done).permute((1, 0)), no_scores, use_acc=False, is_async=True
                )
                out_token = warpgroup_mma(p, values.matrix(done - 1), acc, is_async=True)
                if ZONES:
                    # The octave has arrived before its stage is given back.
                    octave = keys.octaves.index(done % keys.STAGES).load(one)
                    scores, octave = warpgroup_mma_wait(1, deps=[token, octave])
                else:
                    scores = warpgroup_mma_wait(1, deps=[token])
                keys.release(done)
                scores = mask_scores(scores, position + 1, masked, valid, RAGGED)
                # Read one block ahead; behind the last block of all lies a spare code.
                shift = shift_ahead
                if ZONES:
                    shift = gl.sum(octave, 0)
                shift_ahead = tiles.shift(code + position + 1)
                higher = maximum
                if not FIXED:
                    higher = raised(maximum, gl.max(scores, 1) * scale_log2 + shift, sums)
                # PV of the last block is nearly done here, since a warp can't run ahead of its own
                # products: wait for it before the exponentials, so that ptxas mixes rescaling into
                # them. The barrier wait in front keeps ptxas from hoisting the product's wait.
                values.wait(done)
                acc, higher = warpgroup_mma_wait(0, deps=[out_token, higher])
                values.release(done - 1)
                keys.wait(done + 1, pred=position + 1 < blocks)
                shrink = higher
                if not FIXED:
                    shrink = exp2(maximum - finite(higher))
                    maximum = higher
                p32 = probabilities(scores, maximum, scale_log2, shift)
                part = partial_sums(p32)
                keep_sums(tiles, place, position, part, maximum, PART)
                sums = add_sums(sums, part, shrink, FIXED)
                p = gl.convert_layout(p32.to(dtype), p_layout)
                if not FIXED:
                    acc = rescale(acc, gl.convert_layout(shrink, by_row))
                done += 1
            if turn + 1 < total:
                # The first QK of the next tile goes out together with this tile's last PV: no
                # bubble where tiles meet.
                queries.wait(turn + 1, PART)
                keys.wait(done)
                token = warpgroup_mma(
                    queries.matrix(turn + 1, PART), keys.matrix(done).permute((1, 0)), no_scores,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                out_token = warpgroup_mma(p, values.matrix(done - 1), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=[token])
                keys.release(done)
                scores = mask_scores(scores, 1, high(next_count), next_valid, RAGGED)
                next_maximum = first_maximum(scores, scale_log2, next_shift)
                acc, next_maximum = warpgroup_mma_wait(0, deps=[out_token, next_maximum])
                values.release(done - 1)
                p32 = probabilities(scores, next_maximum, scale_log2, next_shift)
                next_sums = partial_sums(p32)
                keep_sums(tiles, next_place, 0, next_sums, next_maximum, PART)
                p = gl.convert_layout(p32.to(dtype), p_layout)
                finish(acc, sums, maximum, queries, turn, tiles, entry, batch, count, PART)
                # After `finish`: the values of a one-block tile come only once the store warp has
                # freed the slot of the tile before.
                values.wait(done)
                sums = next_sums
                maximum = next_maximum
                done += 1
            else:
                acc = warpgroup_mma(p, values.matrix(done - 1), acc, is_async=False)
                values.release(done - 1)
                finish(acc, sums, maximum, queries, turn, tiles, entry, batch, count, PART)
            entry = next_entry
            batch = next_batch
            count = next_count
            valid = next_valid
            code = next_code
            place = next_place
