"""The requests of a load: which prompts, how long, behind which shared prefix, answered at what length."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path

from specdec.config import LengthConfig, LoadConfig, PromptsConfig, PromptSetConfig, StreamCheckConfig
from specdec.experiments.building import sampling_params
from specdec.experiments.prompts import check_chat, read_prompts, uses_chat, wrap
from specdec.experiments.resume import digest
from specdec.model import PagedModel
from specdec.request import encode
from specdec.sampling import SamplingParams

PURPOSES = ("set", "prompt", "length", "output", "prefix")


@dataclass(frozen=True)
class LoadRequest:
    """What one user sends. `source` names the prompt set, `num_shared` counts the first tokens of `prompt` that are the prefix
    all such requests share."""

    index: int
    source: str
    prompt: list[int]
    params: SamplingParams
    num_shared: int = 0


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens, `low` to `high`, each as likely as the others. Raises ValueError for an empty range."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"lengths from {self.low} to {self.high}: 1 <= low <= high must hold")

    @staticmethod
    def of(config: LengthConfig, name: str) -> Lengths | None:
        """None where the config leaves the length open. Raises ValueError naming the config's key."""
        if config.low is None and config.high is None:
            return None
        if config.low is None or config.high is None or not 1 <= config.low <= config.high:
            raise ValueError(f"{name}: low={config.low} and high={config.high} must both be given, 1 <= low <= high")
        return Lengths(config.low, config.high)

    def draw(self, chance: random.Random) -> int:
        return chance.randint(self.low, self.high)


@dataclass(frozen=True)
class Texts:
    """A prompt set before it is encoded: its wrapped texts, and whether they go through the chat template."""

    name: str
    texts: list[str]
    chat: str
    weight: float

    @staticmethod
    def read(config: PromptsConfig, name: str | None, weight: float = 1.0) -> Texts:
        """Raises ValueError for a file, template or weight that cannot be."""
        if config.prompt_file is None:
            raise ValueError("prompt_file is missing: give prompt_file=FILE (.jsonl or .txt), or a mixture of them")
        if not weight > 0:
            raise ValueError(f"mixture: weight={weight} of {config.prompt_file} must be > 0")
        texts = wrap(read_prompts(config.prompt_file, config.prompt_field, config.limit), config.template)
        return Texts(name or Path(config.prompt_file).stem, texts, check_chat(config.chat), weight)


def read_mixture(mixture: Seq[PromptSetConfig], single: PromptsConfig, name: str | None) -> list[Texts]:
    """The sets of a mixture or, where there is none, the single set. Raises ValueError for both, neither, or equal names."""
    if mixture and single.prompt_file is not None:
        raise ValueError("give either prompt_file=FILE or mixture=[{prompt_file: FILE, weight: 1}, ...], not both")
    if not mixture:
        return [Texts.read(single, name)]
    sets = [Texts.read(one, one.name, one.weight) for one in mixture]
    names = [one.name for one in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"mixture: two sets of one name in {', '.join(names)}: give each a name of its own")
    return sets


@dataclass(frozen=True)
class Workload:
    """Draws requests: a set by weight, its prompts in shuffled rounds, lengths, and for a share of the requests a prefix.

    `prompt_length` None: prompts as they are, chat template and all; else that many tokens of the set's prompts in a row,
    without a template. `output_length` None: until the model ends or `params.max_new_tokens`; else exactly so many tokens.
    All chance comes from `seed`; the first n requests are the same however many are drawn.
    """

    sets: Seq[Texts]
    params: SamplingParams
    seed: int = 0
    prompt_length: Lengths | None = None
    output_length: Lengths | None = None
    prefix_tokens: int = 0
    prefix_share: float = 0.0

    @staticmethod
    def read(config: LoadConfig | StreamCheckConfig, mixture: Seq[PromptSetConfig] = ()) -> Workload:
        """From a config's prompts, or a mixture of them; its seed is drawn where there is none."""
        params = sampling_params(config.sampling)
        return Workload(
            read_mixture(mixture, config, config.prompts),
            replace(params, seed=params.with_seed()),
            config.seed,
            Lengths.of(config.prompt_length, "prompt_length"),
            Lengths.of(config.output_length, "output_length"),
            config.prefix_tokens,
            config.prefix_share,
        )

    def __post_init__(self) -> None:
        if not 0 <= self.prefix_share <= 1 or self.prefix_tokens < 0:
            raise ValueError(
                f"prefix_share={self.prefix_share} must lie in [0, 1] and prefix_tokens={self.prefix_tokens} be >= 0"
            )
        if bool(self.prefix_share) != bool(self.prefix_tokens):
            raise ValueError(
                f"prefix_tokens={self.prefix_tokens} and prefix_share={self.prefix_share} go together: "
                f"give both, or neither"
            )
        if self.prompt_length is not None and any(one.chat == "true" for one in self.sets):
            raise ValueError(
                "chat=true and a prompt_length: a chat template cannot be cut to a length; give chat=false"
            )

    def requests(self, target: PagedModel, count: int) -> list[LoadRequest]:
        """The first `count` requests. Raises ValueError for one that outgrows the target's positions."""
        # One stream of chance per purpose: a change of one law leaves all other choices as they were.
        chance = {one: random.Random(digest(self.seed, one)) for one in PURPOSES}
        encoded = [self._encode(one, target) for one in self.sets]
        rounds = [_rounds(prompts, chance["prompt"]) for prompts in encoded]
        prefix = self._prefix(encoded)
        weights = [one.weight for one in self.sets]
        found = []
        for index in range(count):
            (number,) = chance["set"].choices(range(len(self.sets)), weights)
            if self.prompt_length is None:
                prompt = next(rounds[number])
            else:
                joined = itertools.chain.from_iterable(rounds[number])
                prompt = list(itertools.islice(joined, self.prompt_length.draw(chance["length"])))
            is_shared = chance["prefix"].random() < self.prefix_share
            own = prefix if is_shared else []
            request = LoadRequest(
                index, self.sets[number].name, own + prompt, self._params(index, chance["output"]), len(own)
            )
            _check_positions(request, target)
            found.append(request)
        return found

    def _encode(self, texts: Texts, target: PagedModel) -> list[list[int]]:
        chat = self.prompt_length is None and uses_chat(texts.chat, target.tokenizer)
        return [encode(target, text, chat) for text in texts.texts]

    def _prefix(self, encoded: Seq[list[list[int]]]) -> list[int]:
        prompts = [prompt for one in encoded for prompt in one]
        rounds = _rounds(prompts, random.Random(digest(self.seed, "prefix text")))
        return list(itertools.islice(itertools.chain.from_iterable(rounds), self.prefix_tokens))

    def _params(self, index: int, chance: random.Random) -> SamplingParams:
        params = replace(self.params, seed=int(digest(self.params.seed, "request", index), 16))
        if self.output_length is None:
            return params
        return replace(params, max_new_tokens=self.output_length.draw(chance), ignore_eos=True)


def _rounds(prompts: list[list[int]], chance: random.Random) -> Iterator[list[int]]:
    """All prompts in a random order, then all again in another."""
    while True:
        yield from chance.sample(prompts, len(prompts))


def _check_positions(request: LoadRequest, target: PagedModel) -> None:
    longest, limit = len(request.prompt) + request.params.max_new_tokens, target.max_positions
    if limit is not None and longest > limit:
        raise ValueError(
            f"request {request.index} of {request.source} may grow to {longest} tokens; {target.name} takes at most "
            f"{limit}: lower sampling.max_new_tokens, prefix_tokens or the lengths"
        )
