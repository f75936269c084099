"""The rule that follows the target: draw the target's own token, keep the path as long as the tree foresaw it."""

from __future__ import annotations

from specdec.int_tensor import int_tensor
from specdec.interfaces import Acceptance, Noise, TargetLaws
from specdec.noise import PositionKey
from specdec.sampling import ModelLaws
from specdec.tree import TokenTree, TreeSpec
from specdec.verifiers import on_device


class Follow:
    """Exact for any tree, whatever drew it, and optimal for FIXED ones: at each node the target's token is drawn from the
    target's law and the path goes on where a child carries it.

    The draw is keyed by absolute position alone, as in plain decoding, so both emit the same tokens for the same seed.
    """

    name = "follow"
    lossless = True

    def accepts(self, spec: TreeSpec) -> str | None:
        return None

    def __call__(self, tree: TokenTree, laws: TargetLaws, noise: Noise) -> Acceptance:
        if (verdict := on_device.follow(tree, laws, noise)) is not None:
            return verdict
        # Laws that leave no choice are never written out.
        certain = laws if isinstance(laws, ModelLaws) and laws.sampling.is_argmax else None
        # Every token drawn is looked at on the host, so the trees are walked there. Padding has parent -1: nobody's child.
        parents, tokens = tree.parents_BN.tolist(), tree.tokens_BN.tolist()
        rows, paths, next_tokens = list(range(tree.batch_size)), [[0] for _ in parents], [0] * tree.batch_size
        for depth in range(tree.max_nodes):
            if certain is not None:
                drawn = certain.largest([paths[row][-1] for row in rows], rows)
            else:
                rows_R = int_tensor(rows, tree.device)
                laws_BV = laws.at(int_tensor([path[-1] for path in paths], tree.device))
                drawn = noise.categorical(laws_BV[rows_R], PositionKey(depth), rows_R).tolist()
            going = []
            for row, token in zip(rows, drawn, strict=True):
                next_tokens[row], node = token, paths[row][-1]
                child = _child(parents[row], tokens[row], node, token)
                if child is not None:
                    paths[row].append(child)
                    going.append(row)
            rows = going
            if not rows:
                break
        width = max(map(len, paths))
        return Acceptance(
            int_tensor([path + [-1] * (width - len(path)) for path in paths], tree.device),
            int_tensor([len(path) - 1 for path in paths], tree.device),
            int_tensor(next_tokens, tree.device),
        )


def _child(parents: list[int], tokens: list[int], node: int, token: int) -> int | None:
    """The child of `node` that carries `token`; siblings differ."""
    for child in range(node + 1, len(parents)):
        if parents[child] == node and tokens[child] == token:
            return child
    return None
