"""Which hidden states of the target a checkpoint means by its layer ids: the conventions in use, told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specdec.drafters.heads.eagle import EagleConfig
from specdec.drafters.heads.formats.findings import Findings

KEY = "eagle_aux_hidden_state_layer_ids"
NESTED = "eagle_config"
# What is to be added to an id for transformers' index of hidden states, where 0 are the embeddings and i what leaves the
# i-th layer. Layers count from 0 in both conventions:
# - input: the state that enters layer i. EAGLE takes (2, L // 2, L - 3) before those layers run (modeling_llama_kv.py);
#   vLLM (`aux_hidden_state_layers` of its models) and speculators count the same way.
# - output: the state that leaves layer i. SpecForge writes (1, L // 2 - 1, L - 4) for the same states, and SGLang adds
#   the 1 (`set_eagle3_layers_to_capture`).
CONVENTIONS = {"input": 0, "output": 1}


def layer_ids(settings: Mapping[str, Any], findings: Findings) -> tuple[tuple[int, ...] | None, str]:
    """The ids that a config states, None where it states none, and the convention that they are in by where they stand.

    On the top level they are read by vLLM, so as inputs. Inside `eagle_config` they are read by SGLang, which takes them
    for outputs where the first one is 1 and otherwise for inputs (sgl-project/sglang pull request 25454).
    """
    nested = settings.get(NESTED)
    inner = nested.get(KEY) if isinstance(nested, Mapping) else None
    ids = settings.get(KEY) or inner
    if not ids:
        return None, "input"
    if not (isinstance(ids, Sequence) and all(type(one) is int for one in ids)):
        findings.problems.append(f"{KEY}={ids!r} is no list of layer ids")
        return None, "input"
    is_output = not settings.get(KEY) and ids[0] == 1
    return tuple(ids), "output" if is_output else "input"


def feature_layers(
    settings: Mapping[str, Any], version: int, num_layers: int | None, convention: str | None, findings: Findings
) -> tuple[int, ...]:
    """transformers' indices of the hidden states that a head reads.

    `num_layers` of the target is None where it is not known; `convention` overrules the one that the place of the ids
    implies. Where only the target can tell, the indices are zeros and `feature_layers` is noted as unknown.
    """
    ids, implied = (None, "input") if version == 1 else layer_ids(settings, findings)
    if ids is not None:
        chosen = convention or implied
        findings.notes.append(f"layer ids {[*ids]} are read as {chosen}s of those layers, counted from 0")
        layers = tuple(one + CONVENTIONS[chosen] for one in ids)
    elif num_layers is None:
        findings.unknown.append("feature_layers")
        return (0,) if version == 1 else (0, 0, 0)
    else:
        layers = EagleConfig.default_layers(version, num_layers)
    # Version 1 reads what lies behind the final norm; ids of version 3 mean states before it, and transformers hands out
    # none such of the last layer.
    last = num_layers if version == 1 or num_layers is None else num_layers - 1
    wrong = [one for one in layers if one < 0 or (last is not None and one > last)]
    if wrong:
        findings.problems.append(
            f"hidden states {wrong} cannot be had of a target with {num_layers} layers (0 to {last} can)"
        )
    return layers
