"""What image and prompt became, kept for the next responses to them: only these run through the model then."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Hashable, Sequence

from mmrm_jax.data.batching import EncodedGroup
from mmrm_jax.eval.scorer import Branch, Read, Rewards, Scorer
from mmrm_jax.serve.kept import Kept


@dataclasses.dataclass(frozen=True)
class Asked:
    """A group that is to be scored, and the digest of its images' bytes."""

    group: EncodedGroup
    images: bytes = b""


class Prefixes:
    """Scores groups; keys and values of up to `capacity` bytes of prefixes are kept, by images, tokens and branch.

    An RL trainer asks about each of a prompt's rollouts by itself, one after another or at once. A batch whose prefixes
    would not fit runs as it would without: what is read of them is in memory at once, on the device, too.
    """

    def __init__(self, scorer: Scorer, capacity: int):
        self.scorer = scorer
        self.kept = Kept(capacity)
        self.on = capacity > 0 and scorer.reads_alone

    @property
    def tokens(self) -> int:
        """How many tokens of prefixes fit."""
        return self.kept.capacity // self.scorer.read_bytes if self.on else 0

    def key(self, asked: Asked, branch: Branch) -> Hashable:
        """What groups have in common that run together: all sizes but the length of rows of responses, which goes up
        to the next power of two, so that answers of several lengths are not scored one by one."""
        shape = self.scorer.ladder.shape(asked.group.shape)
        count, length = shape.rows
        return branch, tuple(shape.prefixes.items()), shape.tiles, count, max(32, 1 << (length - 1).bit_length())

    def rewards(self, asked: Sequence[Asked], branch: Branch) -> list[Rewards]:
        """Of one batch of groups of one key, at most `scorer.batch_size` of them."""
        groups = [each.group for each in asked]
        if sum(len(group.prefixes[branch].tokens) for group in groups) > self.tokens:
            return self.scorer.rewards(groups, branch)
        digests = [self._digest(each, branch) for each in asked]
        found = {digest: self.kept.get(digest) for digest in digests}
        unread = {d: group for d, group in zip(digests, groups, strict=True) if found[d] is None}
        read: dict[bytes, Read] = {digest: array for digest, array in found.items() if array is not None}
        if unread:
            read |= zip(unread, self.scorer.read(list(unread.values()), branch), strict=True)
            for digest in unread:
                self.kept.put(digest, read[digest])
        return self.scorer.answer([read[digest] for digest in digests], groups, branch)

    def _digest(self, asked: Asked, branch: Branch) -> bytes:
        prefix = asked.group.prefixes[branch]
        images = asked.images if self.scorer.views[branch] == "multimodal" else b""
        parts = (branch.encode(), images, prefix.tokens.tobytes(), prefix.visual.tobytes())
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
