"""In which order a sampler asks for kernels, and how many of the next ones fit."""

from __future__ import annotations

from calibatt_compiler.runtime.prefetch import CallPredictor, select_resident


def predictor(sites: int = 3, steps: int = 4) -> CallPredictor:
    order = CallPredictor()
    for site in range(sites):
        order.add(f"s{site}", list(range(steps)))
    return order


def names(order: CallPredictor, count: int) -> str:
    """The next kernels, such as `s1@0 s2@0`."""
    return " ".join(f"{site}@{index}" for site, index, _ in list(order.next_uses())[:count])


def test_the_first_step_is_expected_before_any_call():
    assert names(predictor(), 99) == "s0@0 s1@0 s2@0"


def test_the_rest_of_the_pass_comes_first_then_the_next_step():
    order = predictor()
    assert order.call("s0", 0) == ("s0", 0, None)
    assert names(order, 5) == "s0@0 s1@0 s2@0 s0@1 s1@1"
    order.call("s1", 0)
    assert names(order, 5) == "s1@0 s2@0 s0@1 s1@1 s2@1"
    assert len(list(order.next_uses())) == 3 * 4, "all there are, each once"
    assert next(reversed(list(order.next_uses()))) == ("s0", 0, None)


def test_passes_repeat_as_often_as_in_the_last_step():
    order = predictor()
    for _ in range(2):
        for site in ("s0", "s1", "s2"):
            order.call(site, 0)
    assert names(order, 3) == "s2@0 s0@1 s1@1"
    order.call("s0", 1)
    order.call("s1", 1)  # a second pass of this step is to come: all of it is needed again
    assert names(order, 5) == "s1@1 s2@1 s0@1 s0@2 s1@2"
    for site in ("s2", "s0", "s1"):
        order.call(site, 1)
    assert names(order, 4) == "s1@1 s2@1 s0@2 s1@2"


def test_after_the_last_step_comes_the_first_of_another_video():
    order = predictor()
    order.call("s1", 3)
    assert names(order, 5) == "s1@3 s2@3 s0@0 s1@0 s2@0"


def test_steps_that_share_a_pattern_need_it_once_and_variants_are_kept_apart():
    order = CallPredictor()
    order.add("a", [0, 0, 1])
    order.add("b", [0, 1, 1])
    order.call("a", 0, 77)
    assert list(order.next_uses()) == [
        ("a", 0, 77), ("b", 0, None), ("b", 1, None), ("a", 1, 77),
    ]  # fmt: skip


def test_what_fits_is_a_beginning_and_never_empty():
    keys = [("s", index, None) for index in range(4)]
    sizes = {keys[0]: 5, keys[1]: 1}
    assert select_resident(keys, sizes, 3, 12) == (keys, True)
    assert select_resident(keys, sizes, 3, 9) == (keys[:3], False)
    assert select_resident(keys, sizes, 3, 8) == (keys[:2], False)
    assert select_resident(keys, sizes, 3, 1) == (keys[:1], False)
    assert select_resident([], sizes, 3, 1) == ([], True)
