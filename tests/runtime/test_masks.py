"""Sites under masks: what is served sparse, what runs dense and is counted, and the operators."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from calibatt_compiler.kernels.common.padding import KeyPadding
from calibatt_compiler.kernels.request import KernelSettings
from calibatt_compiler.plan import BlockPattern, Plan, Sampler, SitePatterns
from calibatt_compiler.runtime import ops
from calibatt_compiler.runtime.invocation import Invocation, Sites, running
from calibatt_compiler.runtime.site import DENSE_MASKED, DENSE_POOLED, DenseSite, SparseSite

LENGTH = 40
VALID = torch.arange(LENGTH)[None] < torch.tensor([[9], [LENGTH]])


def make_site(*, pooled: int = 0) -> SparseSite:
    mask = torch.eye(3, dtype=torch.bool).expand(2, 3, 3).clone()
    mask[:, :, 0] = True
    pattern = BlockPattern.from_mask(
        mask, query_length=LENGTH, key_length=LENGTH, block=(16, 16), pooled=pooled
    )
    sites = {"a": SitePatterns.share([pattern])}
    plan = Plan.create(sites, grid=(1, 5, 8), sampler=Sampler(timesteps=(5.0,)))
    settings = KernelSettings(
        device=torch.device("cpu"), dtype=torch.float32, head_dim=8, padded="any"
    )
    return SparseSite(plan, "a", settings, monitor=1)


def operands():
    return [torch.randn(2, 2, LENGTH, 8) for _ in range(3)]


def test_what_a_mask_says_of_the_keys_is_served_sparse():
    site, (q, k, v) = make_site(), operands()
    out = site.attend(q, k, v, 5.0, 0.3, mask=KeyPadding.of(VALID))
    kept = torch.eye(3, dtype=torch.bool)
    kept[:, 0] = True
    pairs = kept.repeat_interleave(16, 0).repeat_interleave(16, 1)[:LENGTH, :LENGTH]
    want = scaled_dot_product_attention(q, k, v, pairs & VALID[:, None, None], scale=0.3)
    torch.testing.assert_close(out, want)
    assert site.calls == {"native-cpu": 1}
    # Sample 0 has keys in the first block alone, which every row keeps: nothing is lost there.
    (kept_mass,) = site.monitor.kept().values()
    assert 0.5 < kept_mass < 1


def test_other_masks_run_dense_and_are_counted():
    q, k, v = operands()
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    want = scaled_dot_product_attention(q, k, v, causal, scale=0.3)
    site = make_site()
    for each in (site, DenseSite()):
        torch.testing.assert_close(each.attend(q, k, v, 5.0, 0.3, mask=causal), want)
    assert site.calls == {DENSE_MASKED: 1}
    pooled = make_site(pooled=1)
    out = pooled.attend(q, k, v, 5.0, 0.3, mask=KeyPadding.of(VALID))
    want = scaled_dot_product_attention(q, k, v, VALID[:, None, None], scale=0.3)
    torch.testing.assert_close(out, want)
    assert pooled.calls == {DENSE_POOLED: 1}


@pytest.mark.parametrize("rows", [False, True])
def test_dense_gradients_under_a_mask(rows):
    q, k, v = operands()
    pairs = VALID[:, None, None] & (VALID[:, None, :, None] | (not rows))
    for mask in (KeyPadding.of(VALID, rows=rows), pairs):
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        out = scaled_dot_product_attention(*leaves, attn_mask=pairs, scale=0.3)
        grad = torch.randn_like(out)
        want = torch.autograd.grad(out, leaves, grad)
        doubles = [x.detach() for x in leaves]
        got = DenseSite().gradients(grad, *doubles, 5.0, 0.3, mask=mask)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other)


def test_operators_are_sound():
    mask = VALID[:, None, None]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.key_padding, (mask, False), test_utils=tests)
    torch.library.opcheck(ops.key_padding, (VALID.float(), True), test_utils=tests)
    torch.library.opcheck(ops.look_at_mask, (mask.expand(2, 2, 7, -1),), test_utils=tests)
    bias, bounds = ops.key_padding(mask, False)
    timestep = torch.tensor([5.0, 0.0], dtype=torch.float64)
    with running(Invocation(Sites({"a": make_site()}))):
        q, k, v = (x.requires_grad_() for x in operands())
        torch.library.opcheck(
            ops.attention, (q, k, v, timestep, "a", 0.3), {"bias": bias, "bounds": bounds}
        )
