"""Serving configuration: it is read from YAML and back, and impossible values are refused with their key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anything.serve_config import ServeConfig
from base.config import dump, load, validate
from base.errors import ConfigError


def test_a_config_reads_back_from_its_own_yaml(tmp_path: Path) -> None:
    config = ServeConfig.model_validate({"port": 0, "timeout_s": 1.5, "engine": {"threads": 2, "device": "cpu"}})
    (tmp_path / "serve.yaml").write_text(dump(config))
    assert load(tmp_path / "serve.yaml", ServeConfig) == config != ServeConfig()


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({"port": 65536}, "port"),
        ({"port": -1}, "port"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"max_request_bytes": 0}, "max_request_bytes"),
        ({"cors_origins": ["https://a.example", "https://a.example/"]}, "cors_origins.1: must be * or an origin"),
        ({"cors_origins": ["a.example"]}, "cors_origins.0"),
        ({"engine": {"device": "tpu"}}, "engine.device"),
        ({"engine": {"cache_block": 8}}, "engine.cache_block: unknown key"),
        ({"engine": {"block_tokens": 64, "prefill_chunk_tokens": 63}}, "engine.prefill_chunk_tokens"),
    ],
)
def test_impossible_values_are_refused_with_their_key(raw: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(raw, ServeConfig, origin="serve.yaml")
    assert key in str(caught.value)
    assert "serve.yaml" in str(caught.value)


def test_a_prefill_chunk_of_one_block_is_enough() -> None:
    config = validate({"engine": {"block_tokens": 64, "prefill_chunk_tokens": 64}}, ServeConfig, origin="serve.yaml")
    assert config.engine.prefill_chunk_tokens == 64
