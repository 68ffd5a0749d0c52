"""The block pool counts references and finds what is cached."""

import pytest

from engine.blocks import BlockPool, OutOfBlocks, chain_hash, root_hash


def keys(count: int) -> list[bytes]:
    """The hashes of that many blocks of one sequence."""
    chain = [root_hash("")]
    for number in range(count):
        chain.append(chain_hash(chain[-1], [number]))
    return chain[1:]


def cached(pool: BlockPool, count: int) -> tuple[list[int], list[bytes]]:
    """Blocks that hold a sequence and have been given back, and their hashes."""
    table, names = pool.take(count), keys(count)
    for block, name in zip(table, names, strict=True):
        pool.register(block, name)
    pool.release(table)
    return table, names


def test_a_block_is_free_again_when_its_last_reference_goes() -> None:
    pool = BlockPool(4, 16)
    table = pool.take(3)
    twin = pool.share(table[:2])

    pool.release(table)
    assert (pool.num_free, [pool.refs[block] for block in table]) == (2, [1, 1, 0])
    pool.release(twin)
    assert (pool.num_free, pool.refs) == (4, [0] * 4)


def test_asking_for_too_much_takes_nothing() -> None:
    pool = BlockPool(4, 16)
    pool.take(2)
    with pytest.raises(OutOfBlocks):
        pool.take(3)
    assert pool.num_free == 2
    assert len(pool.take(2)) == 2


@pytest.mark.parametrize(("num_tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_a_started_block_counts_whole(num_tokens: int, blocks: int) -> None:
    assert BlockPool(1, 16).blocks_for(num_tokens) == blocks


def test_the_longest_cached_beginning_is_found() -> None:
    pool = BlockPool(8, 16)
    table, names = cached(pool, 3)
    other = chain_hash(names[1], [99])

    assert pool.find(names) == table
    assert pool.find([*names[:2], other]) == table[:2]
    assert pool.find([other, *names]) == []


def test_a_found_block_comes_back_from_the_free_ones() -> None:
    pool = BlockPool(3, 16)
    table, names = cached(pool, 2)

    pool.share(pool.find(names[:1]))
    assert table[0] not in pool.free
    assert pool.num_free == 2
    assert pool.find(names) == table


def test_what_was_freed_first_is_taken_first_and_the_end_of_a_sequence_before_its_beginning() -> (
    None
):
    pool = BlockPool(6, 16)
    first, second = pool.take(3), pool.take(3)
    for block, name in zip(first + second, keys(6), strict=True):
        pool.register(block, name)
    pool.release(first)
    pool.release(second)
    assert pool.take(6) == first[::-1] + second[::-1]


def test_blocks_that_nobody_can_find_are_taken_before_others_and_the_last_freed_first() -> None:
    pool = BlockPool(5, 16)
    cached(pool, 2)
    unnamed = pool.take(3)
    pool.release(unnamed[:1])
    pool.release(unnamed[1:])
    assert pool.take(3) == [unnamed[1], unnamed[2], unnamed[0]]
    assert len(pool.by_hash) == 2


def test_a_taken_block_is_no_longer_found() -> None:
    pool = BlockPool(3, 16)
    table, names = cached(pool, 3)
    pool.take(1)
    assert pool.find(names) == table[:2]
    pool.take(2)
    assert pool.find(names) == []
    assert pool.by_hash == {}


def test_of_two_blocks_with_the_same_content_the_first_stays_known() -> None:
    pool = BlockPool(4, 16)
    (name,) = keys(1)
    first, second = pool.take(2)
    pool.register(first, name)
    pool.register(second, name)
    assert pool.find([name]) == [first]
    pool.release([second])
    pool.take(3)  # also the one that was freed
    assert pool.find([name]) == [first]


def test_discarded_blocks_are_not_found() -> None:
    pool = BlockPool(4, 16)
    table, names = cached(pool, 3)
    pool.discard([table[1], table[1]])
    assert pool.find(names) == table[:1]
    assert pool.num_free == 4


def test_a_hash_is_of_the_salt_and_of_everything_up_to_the_end_of_the_block() -> None:
    root = root_hash("")
    names = {
        chain_hash(root, [1, 2]),
        chain_hash(root, [2, 1]),
        chain_hash(root, [1, 2, 0]),
        chain_hash(root, [258]),
        chain_hash(root_hash("salt"), [1, 2]),
        chain_hash(chain_hash(root, [1, 2]), [1, 2]),
        chain_hash(chain_hash(root, [2, 1]), [1, 2]),
    }
    assert len(names) == 7
    assert {len(name) for name in names} == {16}
    assert chain_hash(root_hash(""), [1, 2]) in names
