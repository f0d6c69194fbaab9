"""Which model a plan takes for its own: quantised, derived, of a later version; no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch

from calibatt_compiler.model import families as models
from calibatt_compiler.plan import Plan

OLD_PLAN = Path(__file__).parent / "plans" / "before_fixed_by.calibatt"


class Packed(torch.nn.Module):
    """A linear layer as bitsandbytes has it: a weight of half bytes in one column, and scales."""

    def __init__(self, of: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = of.in_features, of.out_features
        packed = torch.zeros(of.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.scales = torch.nn.Parameter(torch.ones(of.out_features))
        self.bias = of.bias


class Buffered(torch.nn.Module):
    """A linear layer whose weight is a buffer of int8, as torchao's and quanto's were."""

    def __init__(self, of: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = of.in_features, of.out_features
        self.register_buffer("weight", of.weight.to(torch.int8))
        self.register_buffer("scales", torch.ones(of.out_features))
        self.bias = of.bias


def plain() -> torch.nn.Module:
    first, last = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4, bias=False)
    return torch.nn.Sequential(first, torch.nn.LayerNorm(16), last)


@pytest.mark.parametrize("kind", [Packed, Buffered])
def test_quantised_layers_count_as_the_layers_that_they_stand_for(kind):
    model, quantised = plain(), plain()
    expected = models.identify(model)
    for index in (0, 2):
        quantised[index] = kind(quantised[index])
    assert models.identify(quantised) == expected
    assert models.is_model(expected, quantised)
    quantised[2].out_features = 5
    assert not models.is_model(expected, quantised)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_quantised_by_torch_itself_count_alike():
    model = plain()
    dynamic = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    assert any("quantized" in str(type(layer)) for layer in dynamic)
    assert models.is_model(models.identify(model), dynamic)


def test_parameters_are_listed_as_before():
    shared = plain()
    shared.append(shared[0])
    for model in (shared, torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.PReLU())):
        named = [[name, list(p.shape)] for name, p in model.named_parameters()]
        assert models._parameters(model) == named


def test_how_a_model_is_quantised_is_no_part_of_its_configuration():
    model = tiny_models.wan()
    expected = models.identify(model)
    model.register_to_config(quantization_config={"quant_method": "torchao"})
    assert models.identify(model) == expected
    assert models.is_model(expected, model)


def test_a_plan_of_a_version_before_knows_its_model():
    expected = Plan.load(OLD_PLAN).metadata.model
    assert not expected.entries
    model = tiny_models.wan()
    assert models.is_model(expected, model)
    model.register_to_config(quantization_config={"quant_method": "torchao"})
    assert models.is_model(expected, model)
    # Of a quantised model, the digests of those versions held how it was quantised.
    content = {k: v for k, v in model.config.items() if not k.startswith("_")}
    old = expected.model_copy(update={"config_digest": models._digest(content)})
    assert models.is_model(old, model)
    assert not models.is_model(expected, tiny_models.wan(num_layers=3))
    assert not models.is_model(expected, tiny_models.ltx())


def configured(defaults: dict[str, int], **given: int) -> torch.nn.Module:
    """A model of one class name whose version has these entries with their defaults."""
    arguments = ", ".join(f"{name}={value}" for name, value in defaults.items())
    scope: dict[str, object] = {"Module": torch.nn.Module}
    body = f"class M(Module):\n  def __init__(self, {arguments}):\n    super().__init__()\n"
    exec(body, scope)
    model = scope["M"]()
    model.config = defaults | given
    return model


def test_entries_of_a_later_version_must_have_their_defaults():
    expected = models.identify(configured({"layers": 2}))
    assert expected.entries == ("layers",)
    assert models.is_model(expected, configured({"layers": 2, "later": 5}))
    assert not models.is_model(expected, configured({"layers": 2, "later": 5}, later=6))
    assert not models.is_model(expected, configured({"layers": 2, "later": 5}, layers=3))
    # An entry at its default in calibration counts all the same: the default may change.
    assert not models.is_model(expected, configured({"layers": 3}))
    assert models.is_model(expected, configured({"layers": 3}, layers=2))


def test_a_derived_class_is_the_same_model_and_another_is_not():
    model = tiny_models.wan()
    expected = models.identify(model)
    model.__class__ = type("FSDPWanTransformer3DModel", (type(model),), {})
    assert models.is_model(expected, model)
    model.__class__ = type("Other", (torch.nn.Module,), {"config": model.config})
    assert not models.is_model(expected, model)
