"""Mistakes in drawing trees, and in what is remembered of it."""

from __future__ import annotations

from specdec.certificates.checks import in_one_round, in_recorded_laws
from specdec.certificates.mutants.mutant import Mutant
from specdec.drafters import Mixed, Sampled, chain
from specdec.verifiers import Rejection

DRAW = "specdec.drafters.sampled:Sampled._draw_level"

CHAIN = in_one_round(Rejection(), chain(2, "iid"))
IID = in_recorded_laws(Sampled([2, 2]))
WITHOUT = in_recorded_laws(Sampled([2, 2], "without_replacement"))
MIXED = in_recorded_laws(Mixed([2, 2]))

MUTANTS = [
    Mutant(
        "without replacement, not renormalised",
        DRAW,
        "remaining / total.clamp_min(torch.finfo(total.dtype).tiny)",
        "remaining",
        WITHOUT,
        "not a law",
    ),
    Mutant(
        "without replacement, yet put back",
        DRAW,
        "remaining.scatter(2, token[..., None], 0.0)",
        "remaining.clone()",
        WITHOUT,
        "construction",
    ),
    Mutant(
        "law recorded after the draws",
        DRAW,
        "slots.laws.append(laws)",
        "slots.laws.append(remaining)",
        WITHOUT,
        "construction",
    ),
    Mutant(
        "sampled child drawn from a law that holds its fixed siblings",
        DRAW,
        "laws_BWV.scatter(2, fixed_BWf, 0.0)",
        "laws_BWV.clone()",
        MIXED,
        "construction",
    ),
    Mutant(
        "recorded law holds the fixed siblings",
        DRAW,
        "slots.laws.append(laws)",
        "slots.laws.append(laws_BWV)",
        MIXED,
        "construction",
    ),
    Mutant(
        "duplicates lose their draws",
        "specdec.drafters.sampled:_Slots.add_level",
        "torch.where(exists,",
        "torch.where(exists & (reached == own % children),",
        IID,
    ),
    Mutant(
        "unlikely drafts dropped after they were seen",
        DRAW,
        "exists.append(can)",
        "exists.append(can & (laws.gather(2, token[..., None]).squeeze(2) > 0.3))",
        CHAIN,
    ),
    Mutant(
        "draws share a number",
        DRAW,
        'RoundKey("draft", slot)',
        'RoundKey("draft", 0)',
        CHAIN,
        "key reuse",
    ),
    Mutant(
        "the likelier of two samples kept",
        DRAW,
        "token = torch.zeros_like(live_BW",
        'again = noise.categorical(remaining[rows, nodes], RoundKey("draft", slot + 1000), rows)\n'
        "        q = remaining[rows, nodes]\n"
        "        is_likelier = q.gather(1, again[:, None]) > q.gather(1, drawn[:, None])\n"
        "        drawn = torch.where(is_likelier[:, 0], again, drawn)\n"
        "        token = torch.zeros_like(live_BW",
        CHAIN,
    ),
    Mutant(
        "drawn from the two likeliest, recorded with the whole law",
        DRAW,
        "remaining = laws\n",
        "remaining = laws * (laws >= laws.topk(2).values[..., 1:])\n"
        "    remaining = torch.nn.functional.normalize(remaining, p=1, dim=-1)\n",
        CHAIN,
    ),
]
