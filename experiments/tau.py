"""How far a head's drafts carry: tau by the real engine on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from specdec.config import EngineConfig
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.heads import EagleHead, MedusaHeads
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.training.records import RecordSet
from specdec.experiments.system import System
from specdec.interfaces import Drafter, TreePolicy
from specdec.model import PagedModel
from specdec.sampling import SamplingParams
from specdec.verifiers import Follow


def held_out_prompts(data: RecordSet, count: int, max_length: int = 256) -> list[list[int]]:
    """Prompts of `count` held-out records, spread over all of them so that every folder has its share: what comes before the
    tokens to be learnt, of plain text the first half."""
    if len(data) < count:
        raise ValueError(
            f"{data.name} holds out {len(data)} records, and eval_prompts={count}: make more data or lower eval_prompts"
        )
    prompts = []
    for i in range(count):
        record = data[i * len(data) // count]
        learnt = record.loss_mask_T.nonzero()
        first = int(learnt[0]) if len(learnt) else 0
        prompts.append(record.token_ids_T[: (first or len(record.token_ids_T) // 2)][:max_length].tolist())
    return prompts


def drafter_of(head: MedusaHeads | EagleHead) -> Drafter:
    """The drafter that serves a head."""
    return MedusaDrafter(head) if isinstance(head, MedusaHeads) else EagleDrafter(head)


def measure_tau(
    head: MedusaHeads | EagleHead,
    target: PagedModel,
    policy: TreePolicy,
    prompts: Seq[list[int]],
    params: SamplingParams,
    engine: EngineConfig,
) -> dict[str, float]:
    """`tau` over all prompts (tokens per target forward) and `accepted_k`: how often place k, where drafted, stayed."""
    results = System(drafter_of(head), policy, Follow(), {}).engine(target, engine).generate(prompts, params)
    metrics = [result.metrics for result in results]
    tau = sum(one.num_new_tokens for one in metrics) / sum(one.num_target_forwards for one in metrics)
    found = {"tau": tau}
    for depth in range(max(len(one.drafted_by_depth) for one in metrics)):
        drafted = sum(one.drafted_by_depth[depth] for one in metrics if depth < len(one.drafted_by_depth))
        accepted = sum(one.accepted_by_depth[depth] for one in metrics if depth < len(one.accepted_by_depth))
        found[f"accepted_{depth + 1}"] = accepted / drafted
    return found
