"""The format that a configuration, or the GPU that serves, asks for, and the next milder one."""

import pytest

from base.errors import ConfigError
from model.numerics.formats import FORMATS, natural_format
from tasks.overrides import resolve
from tasks.records.quantized_format import chosen_format, closer_method, compared_formats, next_milder


def of(tmp_path, **values):
    return resolve("configs/tiny.yaml", {"runs_directory": str(tmp_path), "quantize": values})


def test_a_configured_format_is_taken_whatever_the_gpu(tmp_path):
    assert chosen_format(of(tmp_path, format="w4a16", gpu="A100")) == ("w4a16", "as quantize.format says")


@pytest.mark.parametrize(
    ("gpu", "name"), [("A100", "int8"), ("H100", "fp8"), ("H200", "fp8"), ("B200", "nvfp4"), ("laptop", "int8")]
)
def test_auto_takes_what_the_gpu_s_tensor_cores_multiply_and_says_so(tmp_path, gpu, name):
    chosen = chosen_format(of(tmp_path, format="auto", gpu=gpu))
    assert chosen.name == name
    assert f"quantize.gpu is {gpu}" in chosen.reason


def test_auto_takes_the_cluster_file_s_gpu(tmp_path):
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("gpu: H100\nnodes: 2\ngpus_per_node: 8\n")
    config = resolve(
        "configs/tiny.yaml",
        {"runs_directory": str(tmp_path), "quantize": {"format": "auto"}, "cluster": str(cluster)},
    )
    assert chosen_format(config).name == "fp8"
    assert f"the GPU of {cluster} is H100" in chosen_format(config).reason


OF_CAPABILITY = {(7, 0): "int8", (8, 0): "int8", (8, 6): "int8", (8, 9): "fp8_channel", (9, 0): "fp8", (12, 0): "nvfp4"}


@pytest.mark.parametrize(("capability", "name"), OF_CAPABILITY.items())
def test_a_gpu_between_two_generations_takes_the_older_one_s(capability, name):
    assert natural_format(capability) == name


def test_auto_takes_a_milder_one_where_the_model_s_sizes_do_not_fit(tmp_path):
    sizes = {"model": {"moe_intermediate_size": 72}, "quantize": {"format": "auto", "gpu": "B200"}}
    config = resolve("configs/tiny.yaml", {"runs_directory": str(tmp_path), **sizes})
    assert chosen_format(config).name == "fp8_block"


def test_a_format_that_the_sizes_do_not_fit_is_refused_before_anything_is_trained(tmp_path):
    sizes = {"model": {"moe_intermediate_size": 72}, "quantize": {"format": "w4a16"}}
    with pytest.raises(ConfigError, match=r"quantize\.format: needs .* multiples of 32, .* and 72\).*got 'w4a16'"):
        resolve("configs/tiny.yaml", {"runs_directory": str(tmp_path), **sizes})


def test_the_milder_formats_end_at_plain_weights(tmp_path):
    for name in FORMATS:
        seen = [name]
        while (milder := FORMATS[seen[-1]].milder) is not None:
            assert milder not in seen
            seen.append(milder)
        assert seen[-1] == "bf16"
    assert next_milder(of(tmp_path, format="w4a16")) == "fp8_block"
    assert next_milder(of(tmp_path, format="w4a16", fallback="int8")) == "int8"


def test_calibration_is_proposed_where_it_rounds_the_format_and_was_not_used(tmp_path):
    assert closer_method(of(tmp_path, format="w4a16")) == "gptq"
    assert closer_method(of(tmp_path, format="w4a16", method="awq")) is None
    assert closer_method(of(tmp_path, format="int8")) is None


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"format": "int3"}, "quantize.format"),
        ({"fallback": "auto"}, "quantize.fallback"),
        ({"compare": ["int3"]}, "quantize.compare.0"),
        ({"compare": ["fp8", "fp8"]}, "quantize.compare.1: must name each format once"),
        ({"gpu": "H101"}, "quantize.gpu: unknown hardware"),
    ],
)
def test_what_no_registry_has_is_refused(tmp_path, values, told):
    with pytest.raises(ConfigError, match=told):
        of(tmp_path, **values)


def test_compared_formats_are_those_that_fit_and_are_not_the_run_s_own(tmp_path):
    assert compared_formats(of(tmp_path, format="int8", compare=["int8", "w4a16", "fp8"])) == ["w4a16", "fp8"]
    sizes = {"model": {"moe_intermediate_size": 72}, "quantize": {"compare": ["w4a16", "fp8"]}}
    config = resolve("configs/tiny.yaml", {"runs_directory": str(tmp_path), **sizes})
    assert compared_formats(config) == ["fp8"]
