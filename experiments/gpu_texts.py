"""Whether engines on a GPU say what they must: speculative text beside plain decoding's, with and without chance."""

from __future__ import annotations

from dataclasses import replace

import torch

from specdec.certificates.referee import referee, upcast
from specdec.config import EngineConfig, GpuCheckConfig
from specdec.experiments.certify_real import subjects
from specdec.experiments.contenders import system_config
from specdec.experiments.kernel_check import Check
from specdec.experiments.prompts import read_prompts, uses_chat, wrap
from specdec.experiments.system import System, load_system, load_target, plain_system
from specdec.model import PagedModel
from specdec.request import encode
from specdec.sampling import SamplingParams
from specdec.verifiers import Follow

PROMPTS = [
    "Write a Python function that returns the n-th Fibonacci number.",
    "Repeat after me, three times: the quick brown fox jumps over the lazy dog.",
    "A shop sells pens at 3 for 2 dollars. How much do 12 pens cost? Explain step by step.",
    "List the days of the week, then list them again in reverse.",
]


class Texts:
    """The prompts of a `gpu_check`, the engines that go on with them, and the checks of what they say."""

    def __init__(self, config: GpuCheckConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        texts = PROMPTS
        if config.prompt_file is not None:
            texts = wrap(read_prompts(config.prompt_file, config.prompt_field, config.limit), config.template)
        self._texts = texts[: config.limit]

    def prompts(self, target: PagedModel) -> list[list[int]]:
        chat = uses_chat(self.config.chat, target.tokenizer)
        return [encode(target, text, chat) for text in self._texts]

    def engine(self, target: PagedModel, batch: int, graphs: bool) -> EngineConfig:
        """Pages for all at once: a cache that grows lets go of its graphs."""
        config = replace(self.config.engine, max_batch_size=batch, share_prefixes=False, cuda_graphs=graphs)
        if self.device.type == "cuda" and config.num_pages is None:
            longest = max(len(one) for one in self.prompts(target)) + self.config.max_new_tokens + 512
            config = replace(config, num_pages=(batch + 1) * -(-longest // config.page_size))
        return config

    def check(self) -> list[Check]:
        """In float32: greedy text of every system is plain decoding's; at temperature 1 that of `follow` is too, but for
        near-ties, and that of other rules what the same system says without company and graphs."""
        settings = replace(self.config.target, dtype="float32", numerics="fast")
        target = load_target(settings)
        greedy = SamplingParams(max_new_tokens=self.config.max_new_tokens, seed=0)
        drawn = replace(greedy, temperature=1.0)
        wanted = self._say(plain_system(), target, greedy, 1, False)
        checks, followers = [], dict[str, System]()
        for name in (*self.config.systems, *self.config.checked_systems):
            system = load_system(system_config(name, settings, self.config.draft))
            for batch, graphs in self._ways():
                found = self._say(system, target, greedy, batch, graphs)
                what = f"text: {_way(name, batch, graphs)}"
                checks.append(_equal(what, found, wanted, "are plain decoding's", 0))
            if system.rule.name == Follow.name:
                followers[name] = system
                continue
            alone = self._say(system, target, drawn, 1, False)
            for batch, graphs in self._ways():
                found = self._say(system, target, drawn, batch, graphs)
                what = f"text at temperature 1: {_way(name, batch, graphs)}"
                # Of one text a random number may lie within rounding of a border. What is wrong moves more of them.
                checks.append(_equal(what, found, alone, "are what it says alone and without graphs", 1))
        judge = upcast(target, torch.float64)
        for batch, graphs in self._ways():
            checks += self._judged("text at temperature 1", target, judge, followers, drawn, batch, graphs)
        return checks

    def check_rounding(self) -> list[Check]:
        """In bfloat16 greedy texts part at near-ties alone, as a referee in float32 finds."""
        settings = replace(self.config.target, dtype="bfloat16", packed=False, numerics="fast")
        target = load_target(settings)
        systems = {name: load_system(system_config(name, settings, self.config.draft)) for name in self.config.systems}
        params = SamplingParams(max_new_tokens=self.config.max_new_tokens, seed=0)
        return self._judged("rounding", target, upcast(target), systems, params, 1, True)

    def _judged(
        self,
        what: str,
        target: PagedModel,
        judge: PagedModel,
        systems: dict[str, System],
        params: SamplingParams,
        batch: int,
        graphs: bool,
    ) -> list[Check]:
        """Whether texts part from plain decoding's at near-ties alone."""
        plain, *drafted = subjects(target, systems, self.engine(target, batch, graphs))
        checks = []
        for row in referee(target, judge, plain, drafted, self.prompts(target), params):
            detail = (
                f"{row['num_prompts_equal']} of {row['num_prompts']} texts equal; of {row['num_tokens']} tokens "
                f"{row['near_ties']} near-ties, {row['true_divergences']} true divergences"
            )
            checks.append(Check(f"{what}: {_way(row['name'], batch, graphs)}", row["passed"], detail))
        return checks

    def _ways(self) -> list[tuple[int, bool]]:
        """Numbers of sequences at once, each with and without graphs where there are any."""
        graphs = (False, True) if self.device.type == "cuda" else (True,)
        return [(batch, one) for batch in self.config.batch_sizes for one in graphs]

    def _say(
        self, system: System, target: PagedModel, params: SamplingParams, batch: int, graphs: bool
    ) -> list[list[int]]:
        engine = system.engine(target, self.engine(target, batch, graphs))
        return [one.token_ids for one in engine.generate(self.prompts(target), params)]


def _way(name: str, batch: int, graphs: bool) -> str:
    return f"{name}, batch {batch}, {'with' if graphs else 'without'} graphs"


def _equal(what: str, found: list[list[int]], wanted: list[list[int]], whose: str, most_others: int) -> Check:
    same = sum(one == other for one, other in zip(found, wanted, strict=True))
    # Where nothing is equal nothing is shown.
    return Check(what, same >= max(len(wanted) - most_others, 1), f"{same} of {len(wanted)} {whose}")
