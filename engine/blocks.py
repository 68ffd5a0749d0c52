"""The pool of KV-cache blocks: references, the prefix cache, eviction."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as Seq


class OutOfBlocks(Exception):
    """More blocks were asked for than are free; nothing was taken."""


class BlockPool:
    """Counts who uses each block and remembers what full blocks hold.

    Written by the scheduler only. A block is free when nothing references it; a free block that
    is registered under a hash can still be found by it, until it is taken for something else.
    `free` is in the order of eviction: first those that hold nothing worth finding, the one freed
    last before the others because its memory is warm; then the least recently freed.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.refs = [0] * num_blocks
        self.hashes: list[bytes | None] = [None] * num_blocks
        self.by_hash: dict[bytes, int] = {}
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self.free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """Reference `count` free blocks, forgetting what they held. Raises OutOfBlocks."""
        if count > len(self.free):
            raise OutOfBlocks
        blocks = [self.free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.refs[block] = 1
            self._forget(block)
        return blocks

    def share(self, blocks: Seq[int]) -> list[int]:
        """Reference blocks once more each, free ones included; returns them as a new table."""
        for block in blocks:
            if self.refs[block] == 0:
                del self.free[block]
            self.refs[block] += 1
        return list(blocks)

    def release(self, blocks: Seq[int]) -> None:
        """Give back one reference to each block, the last block first.

        So the end of a sequence is evicted before its beginning, which others may share.
        """
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                self.free[block] = None
                if self.hashes[block] is None:
                    self.free.move_to_end(block, last=False)

    def register(self, block: int, key: bytes) -> None:
        """Let a full block be found by the hash of everything up to its end."""
        if key not in self.by_hash and self.hashes[block] is None:
            self.hashes[block] = key
            self.by_hash[key] = block

    def find(self, keys: Seq[bytes]) -> list[int]:
        """The cached blocks of the longest prefix of `keys`, not referenced yet."""
        found: list[int] = []
        for key in keys:
            block = self.by_hash.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def discard(self, blocks: Seq[int]) -> None:
        """No longer find these blocks: what they hold is not to be trusted."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self.hashes[block]
        if key is not None:
            del self.by_hash[key]
            self.hashes[block] = None


def root_hash(salt: str) -> bytes:
    """What the first block of a sequence is chained to: requests of equal salt share blocks."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


def chain_hash(previous: bytes, token_ids: Seq[int]) -> bytes:
    """The 128-bit hash of a full block: its tokens, and through `previous` all before them."""
    return hashlib.blake2b(array("q", token_ids).tobytes(), key=previous, digest_size=16).digest()
