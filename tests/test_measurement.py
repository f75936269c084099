"""What a run costs: nothing that came before it may make it cheaper."""

from __future__ import annotations

from specdec import Engine, PagedModel, SamplingParams
from specdec.drafters import SmallModelDrafter, chain
from specdec.experiments.measurement import Measurement, decode, warm_up
from specdec.verifiers import Verifier


def test_the_warm_up_leaves_nothing_to_the_measured_prompt(tiny) -> None:  # type: ignore[no-untyped-def]
    target = PagedModel(tiny(0))
    prompt, params = list(range(3, 93)), SamplingParams(max_new_tokens=4)
    speculative = Engine(Verifier(target), SmallModelDrafter(PagedModel(tiny(0, noise=0.02))), chain(3), page_size=8)
    for engine in (speculative, Engine(Verifier(target), page_size=8)):
        warm_up(engine, prompt, chat=False)
        assert engine.metrics.num_prefill_tokens > 0 and engine.metrics.num_prefix_pages == 0
        engine.check()
        (result,) = decode(engine, [prompt], [params], False, Measurement())
        assert result.metrics.num_prefix_tokens == 0
        # Sharing itself goes on: the same prompt again is found.
        (again,) = decode(engine, [prompt], [params], False, Measurement())
        assert again.metrics.num_prefix_tokens > 0 and again.token_ids == result.token_ids
