"""The functions of SGLang's kernels that drafts need on a CPU, as the stand-in has them."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch


def stand_in(name: str = "") -> Any:
    """A module of the stand-in for them, also on a host with the real ones."""
    return importlib.import_module(f"prefix_patches.sgl_kernel_cpu.sgl_kernel{name}")


def random_trees(count: int, drafts: int) -> Any:
    """[count, drafts, drafts] bool: which draft attends to which."""
    mask = np.zeros((count, drafts, drafts), dtype=bool)
    for tree in mask:
        tree[0, 0] = True
        for i in range(1, drafts):
            tree[i] = tree[np.random.randint(i)]
            tree[i, i] = True
    return mask


def test_links_between_drafts_are_sglangs() -> None:
    from sglang.srt.speculative import ngram_worker

    count, drafts = 20, 7
    mask, lens = random_trees(count, drafts), torch.randint(1, 99, (count,))
    positions = torch.full((count * drafts,), -9)
    index, child, sibling = (torch.full((count, drafts), -9) for _ in range(3))
    stand_in(".speculative").reconstruct_indices_from_tree_mask(
        torch.from_numpy(mask).flatten(), lens, positions, index, child, sibling, count, drafts
    )
    depth = torch.from_numpy(mask.sum(-1) - 1)
    assert torch.equal(positions.view(count, drafts), depth + lens[:, None])
    assert torch.equal(index.flatten(), torch.arange(count * drafts))
    if hasattr(ngram_worker, "_derive_tree_links"):  # SGLang's own, of some releases
        expected = ngram_worker._derive_tree_links(mask.ravel(), count, drafts)
        assert torch.equal(child, expected[0])
        assert torch.equal(sibling, expected[1])
    for b in range(count):
        parents = [mask[b, i, :i].nonzero()[0].max(initial=-1) for i in range(drafts)]
        for i in range(drafts):
            seen, node = [], int(child[b, i])
            while node != -1:
                seen.append(node)
                node = int(sibling[b, node])
            assert seen == [k for k in range(drafts) if parents[k] == i]


def test_accepted_drafts_are_those_that_the_model_would_say() -> None:
    """Chains, with an answer known by comparing tokens one by one."""
    kernels, count, drafts = stand_in(), 30, 5
    tokens = torch.randint(0, 2, (count, drafts))
    said = torch.randint(0, 2, (count, drafts))
    index = torch.arange(count * drafts).view(count, drafts)
    child = (torch.arange(drafts) + 1).expand(count, drafts).clone()
    child[:, -1] = -1
    sibling = torch.full((count, drafts), -1)
    predicts = torch.full((count * drafts,), -1, dtype=torch.int32)
    accepted = torch.full((count, drafts), -1, dtype=torch.int32)
    number = torch.full((count,), -1, dtype=torch.int32)
    kernels.verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=accepted,
        accept_token_num=number,
        candidates=tokens,
        retrive_index=index,
        retrive_next_token=child,
        retrive_next_sibling=sibling,
        target_predict=said,
    )
    for b in range(count):
        right = 0
        while right + 1 < drafts and tokens[b, right + 1] == said[b, right]:
            right += 1
        path = index[b, : right + 1].tolist()
        assert number[b] == right
        assert accepted[b].tolist() == path + [-1] * (drafts - right - 1)
        assert predicts[path].tolist() == said[b, : right + 1].tolist()
    # Its slots, those before the others, and the KV in them.
    slots = torch.randperm(count * drafts)
    found = torch.zeros(count * drafts, dtype=torch.int64)
    kernels.fill_accept_out_cache_loc_cpu(accepted.flatten(), slots, found)
    taken = slots[accepted[accepted > -1].long()]
    assert torch.equal(found[: len(taken)], taken)
    assert not found[len(taken) :].any()


def test_slots_and_kv_are_moved() -> None:
    kernels = stand_in()
    rows, start, end = (torch.tensor(each) for each in ([2, 0], [1, 3], [4, 3 + 2]))
    table = torch.full((3, 6), -1, dtype=torch.int32)
    kernels.assign_req_to_token_pool_cpu(rows, table, start, end, torch.arange(5) + 10, 6)
    assert table.tolist() == [[-1, -1, -1, 13, 14, -1], [-1] * 6, [-1, 10, 11, 12, -1, -1]]
    read = torch.full((6,), -1)
    kernels.assign_extend_cache_locs_cpu(rows, table, start, end, read, 6)
    assert read.tolist() == [10, 11, 12, 13, 14, -1]
    caches = [torch.randn(8, 2, width) for width in (3, 5)]
    expected = [cache.clone() for cache in caches]
    target, source = torch.tensor([1, 2, 0, 5]), torch.tensor([2, 1, 0, 7])
    for cache in expected:
        cache[target] = cache[source]
    pointers = torch.tensor([cache.data_ptr() for cache in caches])
    row_bytes = torch.tensor([cache[0].nbytes for cache in caches])
    kernels.copy_all_layer_kv_cache_cpu(pointers, row_bytes, target, source)
    assert all(map(torch.equal, caches, expected))


def test_chains_of_a_models_drafts_are_linked_and_end_in_a_bonus() -> None:
    kernels, lens = stand_in(), torch.tensor([5, 9])
    mask = torch.ones(2 * 9, dtype=torch.bool)
    positions = torch.full((6,), -9)
    index, child, sibling = (torch.full((2, 3), -9) for _ in range(3))
    kernels.build_tree_kernel_efficient_cpu(
        None, None, lens, mask, positions, index, child, sibling, 1, 2, 3, 1
    )
    expected = [torch.full_like(each, -9) for each in (positions, index, child, sibling)]
    stand_in(".speculative").reconstruct_indices_from_tree_mask(mask, lens, *expected, 2, 3)
    assert torch.equal(mask.view(2, 3, 3), torch.ones(2, 3, 3, dtype=torch.bool).tril())
    assert all(map(torch.equal, (positions, index, child, sibling), expected))
    bonus = torch.zeros(2, dtype=torch.int32)
    kernels.fill_bonus_tokens_cpu(torch.arange(6).view(2, 3), torch.tensor([1, 3]), bonus, 3)
    assert bonus.tolist() == [0, 5]
    table, slots = torch.arange(40).view(2, 20).int(), torch.zeros(4, dtype=torch.int64)
    rows = torch.tensor([1, 0])
    kernels.assign_draft_cache_locs_contiguous_cpu(rows, table, lens, slots, 20, 1, 2)
    assert slots.tolist() == [25, 26, 9, 10]
