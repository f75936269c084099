"""Medusa and EAGLE heads as drafters: what they draft is what their networks say, and nothing they draft changes a text."""

from __future__ import annotations

import copy
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import pytest
import torch
from head_cases import dense_eagle, eagle_config, hidden_states, learn_eagle, learn_medusa
from torch import Tensor

from specdec import Engine, PagedModel, SamplingParams
from specdec.certificates.checks import TOLERANCE, generation_error, parameters_error
from specdec.certificates.mutants import Check, Mutant, mutated
from specdec.certificates.reference import processed_law
from specdec.certificates.worlds import ToyModel, World
from specdec.drafters import Coupled, EagleDrafter, MedusaDrafter, Mixed, Sampled, Static, TopK, chain
from specdec.drafters.heads import EagleHead, MedusaConfig, MedusaHeads
from specdec.experiments.replay import Replay
from specdec.interfaces import Drafter, TreePolicy
from specdec.noise import CounterNoise
from specdec.sequence import Sequence
from specdec.tree import DrawKind, TokenTree
from specdec.verifiers import RULES, Verifier

POLICIES: dict[str, TreePolicy] = {
    "chain": chain(4),
    "static": Static([[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0]]),
    "top_k": TopK(total=12, depth=4, k=3),
    "chain_iid": chain(4, "iid"),
    "sampled": Sampled([3, 2, 1]),
    "without_replacement": Sampled([3, 2], "without_replacement"),
    "mixed": Mixed([3, 2, 1]),
    "coupled": Coupled(total=10, depth=4, k=3),
}
SAMPLING = {
    "greedy": SamplingParams(max_new_tokens=40, stop_token_ids=(11,)),
    "everything": SamplingParams(
        temperature=0.9,
        top_k=30,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={7: 2.0, 2: -1.0},
        seed=7,
        max_new_tokens=30,
        stop_token_ids=(11, 12),
    ),
}
# Behind a single token there is no state to draft from yet.
PROMPTS = [[5, 6, 7, 8, 9, 5, 6, 7], [9, 10, 11], [3] * 23, [4, 5, 4, 5, 4], [8]]
HEADS = ["medusa", "eagle_1", "eagle_3"]


@pytest.fixture(scope="module")
def target(tiny) -> PagedModel:
    return PagedModel(tiny(0), name="target")


@pytest.fixture(scope="module")
def plain(target) -> dict[str, list[list[int]]]:
    return plain_texts(target, "follow")


def plain_texts(target: PagedModel, rule: str) -> dict[str, list[list[int]]]:
    engine = Engine(Verifier(target, RULES[rule]()), max_batch_size=1)
    return {name: [r.token_ids for r in engine.generate(PROMPTS, params)] for name, params in SAMPLING.items()}


@pytest.fixture(scope="module")
def drafters(target, plain) -> dict[str, Drafter]:
    texts = [prompt + output for outputs in plain.values() for prompt, output in zip(PROMPTS, outputs, strict=True)]
    texts = [text for text in texts if len(text) > 4]
    return {
        "medusa": MedusaDrafter(learn_medusa(target, texts)),
        "eagle_1": EagleDrafter(learn_eagle(target, eagle_config(target, 1), texts)),
        "eagle_3": EagleDrafter(learn_eagle(target, eagle_config(target, 3, draft_vocab_size=50), texts)),
    }


def engine_of(target: PagedModel, drafter: Drafter, policy: TreePolicy, rule: str = "follow") -> Engine:
    # A chunk shorter than the prompts mixes prompt chunks and trees in one forward; small pages break runs of slots.
    verifier = Verifier(target, RULES[rule]())
    return Engine(verifier, drafter, policy, max_batch_size=5, prefill_chunk=7, page_size=4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", HEADS)
def test_speculative_equals_plain(target, plain, drafters, name: str, policy: str) -> None:
    accepted = 0
    for sampling, params in SAMPLING.items():
        engine = engine_of(target, drafters[name], POLICIES[policy])
        results = engine.generate(PROMPTS, params)
        assert [r.token_ids for r in results] == plain[sampling], sampling
        engine.check()
        assert not drafters[name]._states
        accepted += sum(sum(r.metrics.accepted_by_depth) for r in results)
    # Without accepted drafts the equality would say nothing about commits.
    assert accepted > 80


@pytest.mark.parametrize("name", HEADS)
def test_coupled_speculation_equals_coupled_plain_decoding(target, drafters, name: str) -> None:
    plain = plain_texts(target, "coupled")
    for sampling, params in SAMPLING.items():
        results = engine_of(target, drafters[name], POLICIES["coupled"], "coupled").generate(PROMPTS, params)
        assert [r.token_ids for r in results] == plain[sampling], sampling


@dataclass
class Proposal:
    """What a drafter was asked and what it answered: tokens and prompt length per row, and the trees."""

    tokens: list[list[int]]
    prompt_lens: list[int]
    tree: TokenTree


def recorded(drafter: Drafter, monkeypatch: pytest.MonkeyPatch) -> list[Proposal]:
    proposals: list[Proposal] = []
    propose = drafter.propose

    def record(sequences: Seq[Sequence], policy: TreePolicy, noise: CounterNoise) -> TokenTree:
        tree = propose(sequences, policy, noise)
        tokens, lens = [list(one.token_ids) for one in sequences], [one.prompt_len for one in sequences]
        proposals.append(Proposal(tokens, lens, tree))
        return tree

    monkeypatch.setattr(drafter, "propose", record)
    return proposals


def dense_weights(drafter: Drafter, target: PagedModel, tokens: list[int], path: list[int]) -> Tensor:
    """e to the draft logits behind `path`, with everything run from the start, without pages and trees."""
    states = hidden_states(target, tokens[:-1])
    if isinstance(drafter, MedusaDrafter):
        return drafter.heads.logits(states[-1][-1:], target.lm_head)[len(path), 0].double().exp()
    assert isinstance(drafter, EagleDrafter)
    head, config = drafter.head, drafter.head.config
    features = head.fuse([states[layer] for layer in config.feature_layers])
    for depth in range(len(path) + 1):
        following = torch.tensor([*tokens, *path][1 : len(tokens) + depth])
        size = len(following)
        mask = torch.ones(size, size, dtype=torch.bool).tril()
        embed = target.embed if head.embed_tokens is None else head.embed_tokens
        hidden = dense_eagle(head, embed(following), features, torch.arange(size), mask)
        features = torch.cat([features, hidden[-1:]])
    logits = head.logits(features[-1:], target.lm_head)[0]
    ids = torch.arange(target.vocab_size) if head.draft_to_target_R is None else head.draft_to_target_R
    return torch.zeros(target.vocab_size).double().scatter(0, ids, logits.double().exp())


@torch.no_grad()
def law_error(drafter: Drafter, target: PagedModel, proposals: Seq[Proposal], params: SamplingParams) -> float:
    """The largest difference between a law that a tree reports and that of a dense forward over the node's own path."""
    errors = []
    for asked in proposals:
        tree = asked.tree
        for row, tokens in enumerate(asked.tokens):
            kinds = zip(tree.draws_BM[row].tolist(), tree.kinds_BM[row].tolist(), strict=True)
            draws = [(n, int(tree.parents_BN[row, n]), kind) for n, kind in kinds if n > 0]
            for node in sorted({parent for _, parent, _ in draws}):
                path = [int(tree.tokens_BN[row, n]) for n in tree.path(node, row)[1:]]
                weights = dense_weights(drafter, target, tokens, path).tolist()
                start = asked.prompt_lens[row]
                law = torch.tensor(processed_law(weights, params, tokens[:start], tokens[start:] + path))
                fixed = [n for n, parent, kind in draws if parent == node and kind == DrawKind.FIXED]
                law[tree.tokens_BN[row, fixed]] = 0
                found = tree.draft_laws_BNV[row, node]
                if float(found.sum()) > 0 or float(law.sum()) > 1e-6:
                    errors.append(float((found - law / law.sum()).abs().max()))
    assert len(errors) > 12
    return max(errors)


def drafted_error(drafter: Drafter, target: PagedModel, policy: str, rule: str, params: SamplingParams) -> float:
    """`law_error` over several rounds of ragged rows, every other proposal."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        proposals = recorded(drafter, monkeypatch)
        engine_of(target, drafter, POLICIES[policy], rule).generate(PROMPTS, params)
    return law_error(drafter, target, proposals[::2], params)


WARM = SamplingParams(temperature=0.8, seed=3, max_new_tokens=9)
PENALISED = replace(WARM, repetition_penalty=1.5, frequency_penalty=0.4, presence_penalty=0.2, top_k=20)


@pytest.mark.parametrize("params", [WARM, PENALISED], ids=["warm", "penalised"])
@pytest.mark.parametrize(("policy", "rule"), [("sampled", "traversal"), ("mixed", "recursive"), ("chain_iid", "block")])
@pytest.mark.parametrize("name", HEADS)
def test_laws_are_those_of_the_network(
    target, drafters, name: str, policy: str, rule: str, params: SamplingParams
) -> None:
    assert drafted_error(drafters[name], target, policy, rule, params) < 1e-4


def test_a_head_of_its_own_width_and_embedding(target) -> None:
    torch.manual_seed(1)
    config = eagle_config(
        target,
        3,
        hidden_size=40,
        num_heads=6,
        has_own_embedding=True,
        norm_before_residual=True,
        feature_layers=(0, 2),
        draft_vocab_size=30,
        max_positions=None,
    )
    head = EagleHead(config)
    assert head.draft_to_target_R is not None
    head.draft_to_target_R.copy_(torch.randperm(target.vocab_size)[:30])
    assert drafted_error(EagleDrafter(head), target, "sampled", "traversal", PENALISED) < 1e-4


@pytest.mark.parametrize("name", HEADS)
def test_led_along_a_text_it_drafts_as_in_the_engine(target, drafters, name: str) -> None:
    replay = Replay(target, drafters[name], page_size=4, prefill_chunk=7)
    policies = {policy: POLICIES[policy] for policy in ("sampled", "mixed")}
    text = PROMPTS[2] + PROMPTS[0]
    scenes = replay.scenes(text[:9], text[9:], [9, 10, 17, 24], PENALISED, 5, policies)
    proposals = [Proposal([text[: scene.root + 1]], [9], scene.tree) for scene in scenes]
    assert len(proposals) == 8 and law_error(drafters[name], target, proposals, PENALISED) < 1e-4


LEVEL, EAGLE = "specdec.drafters.levels:LevelRound", "specdec.drafters.eagle:EagleDrafter"
ROUND = "specdec.drafters.eagle:_EagleRound"
# No mistake here can change a text, so each is planted and the laws are looked at.
MISTAKES = {
    "heads off by one": ("medusa", "specdec.drafters.medusa:_MedusaRound.expand", "[depth]", "[depth - 1]"),
    "first state of a commit": ("medusa", "specdec.drafters.medusa:MedusaDrafter.observe", "[-1]", "[0]"),
    "penalties of the first node": (
        "medusa",
        "specdec.drafters.medusa:_MedusaNext.laws",
        "if self._draft.has_penalties",
        "if False",
    ),
    "the feature of the root for everybody": (
        "eagle_1",
        f"{ROUND}.expand",
        "parents_BW[..., None]",
        "(parents_BW * 0)[..., None]",
    ),
    "features of other tokens": ("eagle_1", "specdec.drafters.features:Features.fused", "start - self.first :", "0 :"),
    "features of the tokens beside": (
        "eagle_3",
        f"{EAGLE}.fuse",
        "states.chunk",
        "states.roll(1, 0).chunk",
    ),
    "drafts taken for computed": (
        "eagle_3",
        f"{LEVEL}._run_spans",
        "num_computed = span.end",
        "num_computed = span.end + 1",
    ),
    "positions of drafted nodes": (
        "eagle_1",
        f"{LEVEL}.level",
        "self._num_entries_B[:, None] - 1",
        "self._num_entries_B[:, None]",
    ),
    "nodes blind to their ancestors": (
        "eagle_3",
        f"{LEVEL}.level",
        "torch.cat([inherited, own], 2)",
        "torch.cat([inherited & False, own], 2)",
    ),
    "draft ids for target ids": ("eagle_3", f"{EAGLE}.answer", "self._ids_R", "torch.arange(50)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_drafter_that_misreads_is_seen_in_its_laws(target, drafters, mistake: str) -> None:
    name, function, old, new = MISTAKES[mistake]
    with mutated(Mutant(mistake, function, old, new, Check("law", float))):
        try:
            error = drafted_error(drafters[name], target, "sampled", "traversal", PENALISED)
        except (AssertionError, IndexError, RuntimeError):
            error = 1.0
    assert error > 1e-3
    drafters[name]._states.clear()


@pytest.mark.parametrize("name", HEADS)
def test_confidence_trees_hold_the_likeliest_tokens(target, drafters, monkeypatch, name: str) -> None:
    drafter = drafters[name]
    proposals = recorded(drafter, monkeypatch)
    engine_of(target, drafter, TopK(total=4, depth=1, k=3)).generate(PROMPTS, SamplingParams(max_new_tokens=6))
    checked = 0
    with torch.no_grad():
        for asked in proposals:
            for row, tokens in enumerate(asked.tokens):
                found = asked.tree.tokens_BN[row, 1 : int(asked.tree.num_nodes_B[row])].tolist()
                if found:
                    assert found == dense_weights(drafter, target, tokens, []).topk(3).indices.tolist()
                    checked += 1
    assert checked > 8


def test_an_eagle_head_runs_once_per_level(target, drafters, monkeypatch) -> None:
    drafter = drafters["eagle_3"]
    proposals, calls = recorded(drafter, monkeypatch), list[int]()
    run = drafter.run
    monkeypatch.setattr(
        drafter, "run", lambda segments, features, *rows: calls.append(len(features)) or run(segments, features, *rows)
    )
    engine_of(target, drafter, TopK(12, 4, 3)).generate(PROMPTS, SamplingParams(max_new_tokens=20, ignore_eos=True))
    depths = [int(asked.tree.depth_BN.max()) for asked in proposals]
    # A level may be run and its children then lose against others; a root alone runs nothing.
    assert sum(depths) <= len(calls) <= 4 * sum(depth > 0 for depth in depths) and 4 in depths


@pytest.mark.parametrize("name", HEADS)
def test_a_tree_asked_for_again_is_the_same(target, drafters, monkeypatch, name: str) -> None:
    drafter, propose = drafters[name], drafters[name].propose
    rounds = 0

    def twice(sequences: Seq[Sequence], policy: TreePolicy, noise: CounterNoise) -> TokenTree:
        nonlocal rounds
        first, other, again = (propose(sequences, one, noise) for one in (policy, Sampled([2, 2]), policy))
        assert torch.equal(first.tokens_BN, again.tokens_BN) and torch.equal(first.parents_BN, again.parents_BN)
        assert other.max_nodes <= 7
        rounds += 1
        return again

    monkeypatch.setattr(drafter, "propose", twice)
    engine_of(target, drafter, TopK(12, 4, 3)).generate(PROMPTS, SamplingParams(max_new_tokens=12))
    assert rounds > 4


def test_a_head_with_fewer_positions_than_the_target_stops_drafting(target, plain, drafters) -> None:
    head = drafters["eagle_1"].head
    short = EagleHead(replace(head.config, max_positions=20))
    short.load_state_dict(head.state_dict())
    for policy in (TopK(12, 4, 3), Sampled([2, 2, 1])):
        results = engine_of(target, EagleDrafter(short), policy).generate(PROMPTS, SAMPLING["greedy"])
        assert [r.token_ids for r in results] == plain["greedy"]


def test_a_reduced_vocabulary_drafts_its_own_tokens_alone(target, drafters, monkeypatch) -> None:
    drafter = drafters["eagle_3"]
    ids = set(drafter.head.draft_to_target_R.tolist())
    proposals = recorded(drafter, monkeypatch)
    banned = dict.fromkeys(ids, -torch.inf)
    each = [
        SamplingParams(temperature=1.0, seed=i, max_new_tokens=6, logit_bias=banned if i == 2 else {}) for i in range(5)
    ]
    engine_of(target, drafter, Sampled([3, 1]), "traversal").generate(PROMPTS, each)
    for asked in proposals:
        drafted = asked.tree.tokens_BN[:, 1:][asked.tree.is_node_BN[:, 1:]].tolist()
        assert set(drafted) <= ids
        for row, tokens in enumerate(asked.tokens):
            # Who may emit none of the head's tokens gets no drafts.
            assert tokens[0] != 3 or int(asked.tree.num_nodes_B[row]) == 1


def test_heads_are_served_in_the_targets_number_format(target, drafters) -> None:
    half = PagedModel(copy.deepcopy(target.model).bfloat16(), name="half")
    for drafter in drafters.values():
        network = drafter.heads if isinstance(drafter, MedusaDrafter) else drafter.head
        fresh = type(drafter)(network)
        Engine(Verifier(half), fresh, TopK(8, 3, 2)).generate(PROMPTS, SamplingParams(max_new_tokens=8))
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_heads_that_do_not_fit_are_refused(target) -> None:
    def bind(drafter: Drafter) -> None:
        Engine(Verifier(target), drafter, chain(2))

    with pytest.raises(ValueError, match=r"hidden states of size 16 .*target target, which has 32"):
        bind(MedusaDrafter(MedusaHeads(MedusaConfig(16, 97, 2))))
    with pytest.raises(ValueError, match="a vocabulary of 96 do not fit target target, which has 97"):
        bind(MedusaDrafter(MedusaHeads(MedusaConfig(32, 96, 2))))
    for message, changes in {
        "hidden states of size 16, not 32": {"hidden_size": 16, "target_hidden_size": 16},
        "a vocabulary of 96 tokens, not 97": {"vocab_size": 96, "draft_vocab_size": 96},
        "hidden state 3, and the last is 2": {"feature_layers": (3,)},
    }.items():
        with pytest.raises(ValueError, match=message):
            bind(EagleDrafter(EagleHead(eagle_config(target, 1, **changes))))
    head = EagleHead(eagle_config(target, 3, draft_vocab_size=5))
    head.draft_to_target_R[4] = 97
    with pytest.raises(ValueError, match="token 97, and the vocabulary has 97"):
        bind(EagleDrafter(head))


def toy_drafter(name: str) -> Drafter:
    """A random head for the toy model of three tokens."""
    torch.manual_seed(5)
    size, vocab = ToyModel.hidden_size, 3
    if name == "medusa":
        heads = MedusaHeads(MedusaConfig(size, vocab, num_heads=2)).double()
        return MedusaDrafter(heads)
    config = eagle_config(
        ToyModel(World.tree(vocab, 1), torch.ones(1, 1, vocab)),  # type: ignore[arg-type]
        int(name[-1]),
        draft_vocab_size=2 if name == "eagle_3" else vocab,
        feature_layers=(1,) if name == "eagle_1" else (0, 1),
    )
    head = EagleHead(config)
    if head.draft_to_target_R is not None:
        head.draft_to_target_R.copy_(torch.tensor([0, 2]))
    return EagleDrafter(head.double())


ENUMERATED: list[tuple[str, TreePolicy]] = [
    ("follow", TopK(5, 2, 2)),
    ("rejection", chain(2, "iid")),
    ("block", chain(2, "iid")),
    ("traversal", Sampled([2, 1])),
    ("recursive", Mixed([2, 1])),
    ("traversal", Sampled([2, 1], "without_replacement")),
    ("kseq", Sampled([2, 1])),
    ("coupled", Coupled(total=4, depth=2, k=2)),
]


@pytest.mark.parametrize(("rule", "policy"), ENUMERATED)
@pytest.mark.parametrize("name", HEADS)
def test_whole_generations_keep_the_law(name: str, rule: str, policy: TreePolicy) -> None:
    """Enumerated on the engine: several rounds, prompts of several chunks, stop token and limit inside accepted spans."""
    world = World.tree(3, 7).select("sharp", "independent", "zeros")
    assert generation_error(world, RULES[rule](), policy, 3, drafter=toy_drafter(name)) < TOLERANCE
    if rule in ("rejection", "traversal"):
        assert parameters_error(RULES[rule](), policy, drafter=toy_drafter(name)) < TOLERANCE
