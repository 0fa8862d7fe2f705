import pytest

from model.calibration.method import Method, named
from model.calibration.names import CALIBRATED, METHODS, NEAREST, method_rule, misfit
from model.numerics.formats import AUTO, FORMATS


def test_every_calibrated_method_has_settings_of_its_own():
    found = {name: named(name, 64) for name in CALIBRATED}
    assert len(set(found.values())) == len(CALIBRATED)
    assert all(method.group == 64 and method.needs_inputs for method in found.values())
    assert found["gptq"] == Method(group=64)
    assert found["awq"].awq
    assert not found["search"].gptq


@pytest.mark.parametrize("format_name", [*FORMATS, AUTO])
def test_only_a_format_with_int4_groups_takes_a_calibrated_method(format_name):
    assert misfit(NEAREST, format_name) is None
    for method in CALIBRATED:
        rule = misfit(method, format_name)
        assert (rule is None) is (format_name == "w4a16")
        assert rule is None or f"format {format_name} has none: take the format w4a16, or the method nearest" in rule


def test_the_rule_lists_all_methods():
    assert all(name in method_rule() for name in METHODS)
