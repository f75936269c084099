"""The parts of a certificate that need a real model: the law of its texts, and what rounding does to them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specdec.certificates import real
from specdec.certificates.bias import bias
from specdec.certificates.referee import referee, upcast
from specdec.certificates.statistics import MIN_TOKENS
from specdec.config import CertifyConfig, EngineConfig, TargetConfig
from specdec.experiments.building import sampling_params
from specdec.experiments.contenders import PLAIN, system_config
from specdec.experiments.prompts import check_chat, read_prompts, uses_chat, wrap
from specdec.experiments.system import System, load_system, load_target, plain_system, rule_and_policy, target_labels
from specdec.model import PagedModel
from specdec.provenance import device_name
from specdec.request import encode
from specdec.sampling import SamplingParams
from specdec.verifiers import Follow


@dataclass(frozen=True)
class RealParts:
    """What the parts on a real model run on, checked before any model is loaded: texts of the prompts, sampling parameters,
    and the systems by the overrides that describe them."""

    config: CertifyConfig
    texts: list[str]
    params: SamplingParams
    names: list[str]

    @staticmethod
    def check(config: CertifyConfig, command: str) -> RealParts:
        """Raises ValueError for what can be seen to be wrong in the config."""
        for word in shlex.split(command):
            if word.startswith("sampling.temperature="):
                raise ValueError(f"{word}: this experiment goes through several; give temperatures=[...]")
        if config.prompt_file is None:
            raise ValueError(f"level={config.level} needs prompts: give prompt_file=FILE (.jsonl or .txt)")
        if config.num_tokens < MIN_TOKENS:
            raise ValueError(f"num_tokens={config.num_tokens}: the statistics need at least {MIN_TOKENS}")
        if not 0 < config.alpha < 1 or config.num_judged < 1:
            raise ValueError(f"alpha={config.alpha} must lie in (0, 1), num_judged={config.num_judged} be >= 1")
        if not config.temperatures or min(config.temperatures) <= 0:
            raise ValueError(f"temperatures={list(config.temperatures)} must name at least one, each > 0")
        if config.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype={config.dtype} is unknown; use float32, float16 or bfloat16")
        check_chat(config.chat)
        texts = wrap(read_prompts(config.prompt_file, config.prompt_field, config.limit), config.template)
        names = [*config.systems, *(config.draft_systems if config.draft is not None else [])]
        for name in names:
            rule_and_policy(system_config(name, config.target, config.draft))
        params = sampling_params(config.sampling)
        return RealParts(config, texts, replace(params, seed=params.with_seed()), names)

    def rows(self) -> list[dict[str, Any]]:
        """Texts against the target's laws: the tests of plain decoding and every lossless system, the bias of lossy ones."""
        config = self.config
        # What `numerics` asks for is judged by itself, in the target's own dtype.
        settings = replace(config.target, dtype=config.dtype, numerics="auto")
        systems = self._systems(settings)
        target = load_target(settings)
        prompts = self._prompts(target)
        params = [replace(self.params, temperature=temperature) for temperature in config.temperatures]
        lossless = subjects(target, systems, config.engine)
        lossy = subjects(target, systems, config.engine, lossless=False)
        rows = real.run(target, lossless, prompts, params, config.num_tokens, config.work_dir, alpha=config.alpha)
        common = self._labels(settings, target)
        found = [{"measured": "law", **common, **row} for row in rows]
        biased = bias(lossy, prompts, params, config.num_tokens, config.work_dir) if lossy else []
        return found + [{"measured": "bias", **common, **row} for row in biased]

    def numerics(self) -> dict[str, Any]:
        """Near-ties and true divergences of every lossless system: greedy, and with chance those that emit plain decoding's
        text then. The target is the one that users run, packed weights and all; the judge has its weights unpacked."""
        config = self.config
        systems = self._systems(config.target)
        target = load_target(config.target)
        labels = {"numerics": target.numerics}
        plainly = load_target(replace(config.target, packed=False, self_check=False, numerics="fast"))
        judge = upcast(plainly, torch.float64 if target.dtype == torch.float32 else torch.float32)
        del plainly
        engine = replace(config.engine, max_batch_size=1)
        plain, *drafted = subjects(target, systems, engine, labels=labels)
        following = [one for one in drafted if one.labels["rule"] == Follow.name]
        prompts = self._prompts(target)[: config.num_judged]
        rows = []
        for temperature, judged in ((0.0, drafted), (config.temperatures[0], following)):
            params = replace(self.params, temperature=temperature)
            rows += referee(target, judge, plain, judged, prompts, params, work_dir=config.work_dir)
        common = {**self._labels(config.target, target), "num_prompts": len(prompts)}
        return {**common, "rows": rows, "passed": all(row["passed"] for row in rows)}

    def _systems(self, target: TargetConfig) -> dict[str, System]:
        """Drafters are loaded for one target: they take its dtype and are bound to its pages."""
        return {name: load_system(system_config(name, target, self.config.draft)) for name in self.names}

    def _prompts(self, target: PagedModel) -> list[list[int]]:
        chat = uses_chat(self.config.chat, target.tokenizer)
        return [encode(target, text, chat) for text in self.texts]

    def _labels(self, settings: TargetConfig, target: PagedModel) -> dict[str, Any]:
        return {
            **target_labels(settings),
            "dtype": str(target.dtype).removeprefix("torch."),
            "device": device_name(target.device),
            "prompts": self.config.prompts or Path(self.config.prompt_file or "").stem,
            "template": self.config.template,
            "chat": uses_chat(self.config.chat, target.tokenizer),
            "max_new_tokens": self.params.max_new_tokens,
            "seed": self.params.seed,
        }


def subjects(
    target: PagedModel,
    systems: Mapping[str, System],
    engine: EngineConfig,
    *,
    lossless: bool = True,
    labels: Mapping[str, Any] | None = None,
) -> list[real.Subject]:
    """The systems that are lossless, plain decoding first, or those that are not; each with an engine of its own."""
    chosen = {PLAIN: plain_system(), **systems} if lossless else systems
    return [
        real.Subject(one.engine(target, engine), {"name": name, **(labels or {}), **one.labels})
        for name, one in chosen.items()
        if one.rule.lossless == lossless
    ]
