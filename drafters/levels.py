"""A round of a network that runs a tree's nodes over pages, level by level: a small model or an EAGLE head."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.drafters.network import NetworkDrafter, NetworkRound
from specdec.int_tensor import int_tensor
from specdec.interfaces import Commit
from specdec.model import Segment
from specdec.sequence import Sequence


class Progress(Protocol):
    """How many entries of a sequence the network has run."""

    num_computed: int


@dataclass(frozen=True)
class Span:
    """Entries `start`..`end`-1 of batch row `row`."""

    row: int
    start: int
    end: int


class LevelDrafter(NetworkDrafter):
    """Base of the drafters that run a network over the target's pages.

    Tokens that no tree was asked behind wait until one is: reading them costs several per cent of what the target costs, for
    nothing where no draft pays. Only of more than `_MOST_UNREAD` the oldest are read, of a text `_BULK` at a time, so that what
    waits is bounded. If `_reads_prompts`, these are read along with the target, one of its chunks behind: so a prompt of a
    single chunk is read together with its root, and a step never has more of a long one to read than the target had in a step
    before; of `_SHAREABLE` tokens in any case, whether there are going to be drafts or not.
    """

    _MOST_UNREAD, _BULK, _SHAREABLE = 512, 64, 16

    @property
    def _reads_prompts(self) -> bool:
        """Whether what has not been read cannot be shared with requests that begin alike."""
        return True

    def _num_read(self, sequence_id: int) -> int:
        """How many entries of the sequence have been run."""
        raise NotImplementedError

    def _read_along(self, commits: Seq[Commit]) -> None:
        """Reads what came before these commits, where it is time to and trees are going to be asked for."""
        due, ends = [], []
        reads_prompts = self._reads_prompts
        for commit in commits:
            one = commit.sequence
            if one is None:
                continue
            num_read = self._num_read(one.id)
            num_unread = commit.start - num_read
            # By its place, not by its nodes: those are also missing where the drafter was not asked for this tree.
            in_prompt = commit.start < one.prompt_len or num_read < one.prompt_len >= self._SHAREABLE
            is_due = num_unread > 0 if in_prompt and reads_prompts else num_unread >= self._MOST_UNREAD
            # The token to come takes one of the places that are left.
            if is_due and min(one.max_draft_depth - 1, self._limit(one)) > 0:
                due.append(one)
                ends.append(commit.start if in_prompt else num_read + self._BULK)
        if due:
            draft = self._round(due, [0] * len(due))
            assert isinstance(draft, LevelRound)
            draft.read(ends)


class LevelRound(NetworkRound):
    """Catches the network up with the final tokens, then runs the tree's nodes level by level.

    The network has an entry per final token but the first `shift`: entry t has position t, reads token t + `shift` and lies in
    that token's slot, so that a page holds what its own tokens and those before them determine. The last entry stands for the
    root, drafted nodes lie behind it.
    """

    shift = 0
    _CHUNK = 512

    def __init__(
        self, drafter: NetworkDrafter, sequences: Seq[Sequence], limits: list[int], progress: Seq[Progress]
    ) -> None:
        super().__init__(drafter, sequences, limits)
        self._progress = progress
        self._num_entries = [len(one.token_ids) - self.shift for one in sequences]
        self.tables = [one.table.behind(self.shift) if self.shift else one.table for one in sequences]
        self._num_entries_B = int_tensor(self._num_entries, self.device)
        # Expanded nodes behind the root: who is an ancestor of whom (itself included), and at what depth.
        self._ancestors_BXX = torch.zeros(len(sequences), 0, 0, dtype=torch.bool, device=self.device)
        self._depths: list[int] = []

    def run_chunk(self, segments: list[Segment], spans: list[Span], rows_R: Tensor) -> Tensor:
        """Runs entries of final tokens; what the network gives [R, ...] at the packed rows `rows_R`."""
        raise NotImplementedError

    def read(self, ends: list[int]) -> None:
        """Runs the entries of final tokens up to `ends`, one per row, that have not been run."""
        starts = [one.num_computed for one in self._progress]
        spans = [Span(row, start, end) for row, (start, end) in enumerate(zip(starts, ends, strict=True))]
        self._run_spans(spans, [])

    def catch_up(self) -> Tensor:
        """Runs what the network has not seen, the root's entry last, in chunks; what it gives [B, ...] at the roots."""
        live = [row for row, limit in enumerate(self.limits) if limit > 0]
        at_root: dict[int, Tensor] = {}
        while len(at_root) < len(live):
            spans, ends, owners, packed = [], [], [], 0
            for row in live:
                if row in at_root:
                    continue
                total = self._num_entries[row]
                # The root is run again where a tree has been grown from it before: what it gives is wanted once more.
                start = min(self._progress[row].num_computed, total - 1)
                end = min(total, start + self._CHUNK)
                spans.append(Span(row, start, end))
                packed += end - start
                if end == total:
                    ends.append(packed - 1)
                    owners.append(row)
            at_root.update(zip(owners, self._run_spans(spans, ends), strict=True))
        return self.spread(torch.stack([at_root[row] for row in live]), live)

    def _run_spans(self, spans: list[Span], rows: list[int]) -> Tensor:
        segments = [self.segment(span) for span in spans]
        for span in spans:
            self._progress[span.row].num_computed = span.end
        return self.run_chunk(segments, spans, int_tensor(rows, self.device))

    def segment(self, span: Span) -> Segment:
        """Entries of final tokens."""
        tokens = self.sequences[span.row].token_ids[span.start + self.shift : span.end + self.shift]
        positions = torch.arange(span.start, span.end, device=self.device)
        return Segment(self.tables[span.row], span.start, int_tensor(tokens, self.device), positions)

    def level(self, tokens_BW: Tensor, parents_BW: Tensor, depth: int) -> tuple[list[Segment], list[int]]:
        """The next level's nodes as segments, and the batch rows that they belong to: those that may go deeper still."""
        batch, width = tokens_BW.shape
        old = self._ancestors_BXX.shape[1]
        # Column 0 stands for the root, which everybody sees as part of the context.
        inherited = pad(self._ancestors_BXX, (0, 0, 1, 0)).gather(1, parents_BW[..., None].expand(-1, -1, old))
        own = torch.eye(width, dtype=torch.bool, device=self.device).expand(batch, -1, -1)
        mask_BWM = torch.cat([inherited, own], 2)
        self._ancestors_BXX = torch.cat([pad(self._ancestors_BXX, (0, width)), mask_BWM], 1)
        self._depths += [depth] * width
        positions_BM = self._num_entries_B[:, None] - 1 + int_tensor(self._depths, self.device)
        # A row that may not go deeper than this has no use for the nodes, nor perhaps a position.
        live = [row for row, limit in enumerate(self.limits) if limit > depth]
        segments = [
            Segment(
                self.tables[row],
                self._num_entries[row],
                tokens_BW[row],
                positions_BM[row, old:],
                mask_BWM[row],
                positions_BM[row],
            )
            for row in live
        ]
        return segments, live

    def spread(self, values: Tensor, live: list[int]) -> Tensor:
        """Values of the rows that ran, at their places in the batch; zeros elsewhere."""
        if len(live) == len(self.sequences):
            return values
        out = values.new_zeros(len(self.sequences), *values.shape[1:])
        return out.index_copy_(0, int_tensor(live, self.device), values)
