"""What released names tell: kinds of projections that a format can store differently, and layers. Needs no torch."""

from __future__ import annotations

import re
from enum import Enum

_LAYER = re.compile(r"\.layers\.(\d+)\.")


class Kind(Enum):
    """Kind of a projection; its value matches the released names of its modules, as a regular expression.

    What engines fuse into one weight (q_a_proj with kv_a_proj_with_mqa, gate_proj with up_proj) or into one module
    (all of a layer's routed experts) is of one kind. The gate, eh_proj, embeddings and the head are of none.
    """

    LATENT = r".*self_attn\.(q_a_proj|kv_a_proj_with_mqa)$"
    ATTENTION = r".*self_attn\.(q|q_b|kv_b|o)_proj$"
    DENSE = r".*mlp\.(gate|up|down)_proj$"
    SHARED = r".*mlp\.shared_experts\.(gate|up|down)_proj$"
    ROUTED = r".*mlp\.experts\.\d+\.(gate|up|down)_proj$"


def kind_of(hf_name: str) -> Kind | None:
    """Kind of a released weight, `None` for one that is no projection."""
    module, _, leaf = hf_name.rpartition(".")
    if leaf != "weight":
        return None
    return next((kind for kind in Kind if re.match(kind.value, module)), None)


def layer_of(hf_name: str) -> int | None:
    """Layer of a released weight, the MTP module's behind the last one; `None` outside of layers."""
    found = _LAYER.search(hf_name)
    return int(found[1]) if found else None
