"""What we read of SGLang's objects: every attribute, once, with the releases that have it.

Each class below stands for one of SGLang's and names what we read of it, nothing else. Whoever
takes such an object says so with the class, so the type checker refuses an attribute that is not
here. `install.py` compares the list with the installed SGLang before the backend is built, and
``sglang-prefix doctor`` does.

Absence is never a default. An attribute that a release should have and has not

- ends the start with one message in the releases that were read for this list: somebody changed
  SGLang, and an answer that rests on a guess may be wrong;
- in a release newer than those leaves everything to the stock backend, under the reason
  ``unknown-attributes``, and the log names it: nobody knows yet what has become of it.

What only some releases have carries an :class:`Only`, which says what its absence means there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch

__all__ = [
    "HOMES",
    "AttentionLayer",
    "ForwardBatch",
    "ForwardMode",
    "KVPool",
    "LatentPool",
    "ModelConfig",
    "ModelRunner",
    "Only",
    "ParallelContext",
    "PathRecord",
    "ReplayView",
    "ReqToTokenPool",
    "Request",
    "ScheduleBatch",
    "ServerArgs",
    "TreeNode",
    "VerifyInput",
    "WrappingPool",
]


@dataclass(frozen=True, slots=True)
class Only:
    """Marks an attribute that some releases, or some objects of the kind, do not have.

    Attributes:
        releases: those that have it, as a version specifier; "" for all.
        absent: what it means where it is absent, and rightly so.
    """

    releases: str
    absent: str


class PhaseConfig(Protocol):
    """How one phase is captured."""

    backend: Any  # a string


class CudaGraphConfig(Protocol):
    """How decode and prefill are captured."""

    decode: PhaseConfig


class ServerArgs(Protocol):
    """Settings as SGLang resolved them: `stock_backend.resolved_args`.

    Before 0.5.19 the arguments themselves are resolved; since then they stay as they were typed.
    """

    _get_default_attn_backend: Annotated[
        Any, Only("<0.5.19", "a function of that name in `stock_backend` is asked")
    ]
    attention_backend: str | None
    attn_dp_size: Annotated[
        int, Only(">=0.5.22", "`enable_dp_attention` says whether it is more than one")
    ]
    cuda_graph_config: CudaGraphConfig | None  # None only where no model was named
    dcp_size: int
    decode_attention_backend: str | None
    disaggregation_mode: str
    elastic_ep_backend: str | None
    enable_deterministic_inference: bool
    enable_dp_attention: Annotated[
        bool, Only("<0.5.22", "resolved to False and soon removed; `attn_dp_size` is the width")
    ]
    enable_metrics: bool
    enable_metrics_for_all_schedulers: bool
    enable_pdmux: bool
    enable_torch_compile: bool
    enable_two_batch_overlap: bool
    ep_join_mode: str | None
    extra_metric_labels: dict[str, str] | None
    kv_cache_dtype: str
    prefill_attention_backend: str | None
    served_model_name: str
    speculative_adaptive: Annotated[bool, Only("", "such releases have a fixed number of drafts")]
    speculative_algorithm: str | None
    speculative_attention_mode: str
    speculative_draft_attention_backend: str | None
    speculative_eagle_topk: int | None  # with n-grams their breadth
    speculative_num_draft_tokens: int | None
    tp_size: int


class ParallelContext(Protocol):
    """Which rank this process is.

    No class of SGLang lists these, so they are looked for when they are read: where one is gone,
    our counters are not exported, and the log says so.
    """

    attn_tp_rank: int
    dp_rank: Annotated[int | None, Only(">=0.5.21", "metrics of replicas have no such label")]
    moe_ep_rank: int
    pp_rank: int
    tp_rank: int


class ModelConfig(Protocol):
    """What the checkpoint says."""

    context_len: int
    hf_config: Any  # transformers', of which we read the architectures
    is_encoder_decoder: bool


class KVPool(Protocol):
    """Keys and values of all layers. SGLang's plain pool has all of this."""

    dtype: torch.dtype
    is_quantized_kv_cache: Annotated[Any, Only("", "a pool without it holds plain values")]
    k_scale_buffer: Annotated[Any, Only("", "a pool without it has no scales per block")]
    kv_cache_layout: Annotated[str, Only("", "a pool without it is laid out as [slot, head, dim]")]

    def get_key_buffer(self, layer_id: int) -> torch.Tensor: ...
    def get_value_buffer(self, layer_id: int) -> torch.Tensor: ...
    def set_kv_buffer(self, layer: Any, location: Any, *tensors: Any) -> None: ...


class LatentPool(Protocol):
    """Keys of multi-head latent attention, whose first elements are the values."""

    kv_lora_rank: Annotated[int, Only("", "another pool, which holds K and V apart")]
    qk_rope_head_dim: int

    def set_mla_kv_buffer(self, layer: Any, location: Any, *tensors: Any) -> None: ...


class KVWriteLocation(Protocol):
    """SGLang's ``KVWriteLoc``: where the KV of a step goes."""

    for_layer: Annotated[Any, Only(">=0.5.22", "it is made of the slots alone")]


class WrappingPool(Protocol):
    """A pool of pools: one for full attention, one for sliding windows."""

    full_kv_pool: Annotated[KVPool, Only("", "a pool without it wraps none")]
    swa_kv_pool: Annotated[KVPool, Only("", "a pool without it wraps none")]


class ReqToTokenPool(Protocol):
    """Slots of each request."""

    req_to_token: torch.Tensor
    size: int


_NAMES_ON_RUNNERS = Only(">=0.5.18", "backends are built by the names in the arguments")


class ModelRunner(Protocol):
    """Model, pools and settings of one rank."""

    decode_attention_backend_str: Annotated[str, _NAMES_ON_RUNNERS]
    device: str
    dtype: torch.dtype
    is_draft_worker: bool
    model: torch.nn.Module
    model_config: ModelConfig
    page_size: int
    prefill_attention_backend_str: Annotated[str, _NAMES_ON_RUNNERS]
    req_to_token_pool: ReqToTokenPool
    server_args: Any  # read through `stock_backend.resolved_args`
    token_to_kv_pool: KVPool
    use_mla_backend: bool


class AttentionLayer(Protocol):
    """SGLang's ``RadixAttention``."""

    attn_type: Any  # an enumeration, or its value
    is_cross_attention: bool
    k_scale: torch.Tensor | None
    layer_id: int
    logit_cap: float | None
    logit_capping_method: str
    pos_encoding_mode: str
    qk_head_dim: int
    scaling: float
    sliding_window_size: int | None
    tp_k_head_num: int
    tp_q_head_num: int
    tp_v_head_num: int
    use_irope: bool
    v_head_dim: int
    v_scale: torch.Tensor | None
    xai_temperature_len: int


class ForwardMode(Protocol):
    """What a forward pass does."""

    name: str  # of the member of the enumeration

    def is_decode(self) -> bool: ...
    def is_idle(self) -> bool: ...
    def is_target_verify(self) -> bool: ...


class Backend(Protocol):
    """SGLang's base class of attention backends: what we override of it, and call of the stock's.

    If one of these had another name, SGLang would call the new one, and a graph would be replayed
    with another batch's plan.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...
    def forward_decode(self, *args: Any, **kwargs: Any) -> Any: ...
    def forward_extend(self, *args: Any, **kwargs: Any) -> Any: ...

    needs_cpu_seq_lens: bool

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None: ...
    def init_forward_metadata(self, forward_batch: Any) -> None: ...
    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None: ...
    def init_forward_metadata_out_graph(
        self, forward_batch: Any, in_capture: bool = False
    ) -> None: ...


class GraphRunner(Protocol):
    """What captures decode, and replays it."""

    capture_forward_mode: ForwardMode
    model_runner: ModelRunner


class _Rows(Protocol):
    """What a forward batch and the view of one have in common."""

    batch_size: int
    forward_mode: ForwardMode
    out_cache_loc: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    seq_lens_sum: int | None
    spec_info: Any


class ForwardBatch(_Rows, Protocol):
    """A batch as it comes to an eager step, and to a capture."""

    extend_prefix_lens_cpu: list[int] | None  # None in decode
    extend_seq_lens_cpu: list[int] | None
    tbo_children: Annotated[Any, Only("", "views have none; their server has no overlap either")]
    tbo_parent_token_range: Annotated[Any, Only("", "as `tbo_children`")]


class ReplayView(_Rows, Protocol):
    """What the graph runner hands over instead before it replays a graph."""

    actual_forward_mode: Annotated[ForwardMode, Only("", "a forward batch says it in its mode")]
    num_padding: Annotated[int, Only("", "a forward batch is not padded for a graph")]


class VerifyInput(Protocol):
    """What a verify pass of speculative decoding checks: SGLang's ``EagleVerifyInput``.

    That of n-grams has the first of these.
    """

    draft_token_num: Annotated[int, Only("", "an idle rank's pass checks nothing")]
    topk: int


class KVInfo(Protocol):
    """Where the KV of one request is."""

    cache_protected_len: Annotated[int, Only(">=0.5.19", "the request itself has it")]


class Request(Protocol):
    """SGLang's ``Req``."""

    cache_protected_len: Annotated[int, Only("<0.5.19", "`kv` has it")]
    kv: Any  # a `KVInfo`; None in 0.5.17 and 0.5.18 before the request has any
    last_node: Any  # an id where there is a tree core, else a `TreeNode`
    retraction_count: int


class ScheduleBatch(Protocol):
    """The requests behind a forward pass."""

    decoding_reqs: Sequence[Request] | None
    forward_mode: ForwardMode
    inner_idle_batch: Any  # another one, which runs in its place; None where it runs itself
    out_cache_loc: torch.Tensor
    req_pool_indices: torch.Tensor
    req_pool_indices_cpu: torch.Tensor | None
    reqs: list[Request]
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    spec_info: Any
    tree_cache: Any  # read through `radix_paths.py`


class TreeNode(Protocol):
    """A node of the linked trees, up to 0.5.18, and of the Python tree core."""

    id: int
    key: Sequence[int]
    parent: Annotated[Any, Only("", "a streaming session's virtual node is in no tree")]


class PathRecord(Protocol):
    """What ``collect_path_info`` says of a node, SGLang's ``TreePathNodeInfo``.

    Releases before 0.5.22 do not have that class, so its attributes are looked for when they are
    read: where one is gone, planning fails, and the stock backend serves.
    """

    node_id: int
    num_children: Annotated[int, Only(">=0.5.23", "every new node makes us ask for all paths")]
    parent_id: int
    path_end: int


class TreeCache(Protocol):
    """SGLang's radix cache; with the radix cache off, another class that has no tree."""

    tree_core: Annotated[Any, Only("", "its nodes are linked, or it has none")]


class TreeCore(Protocol):
    """What knows the nodes of a :class:`TreeCache` by their ids."""

    collect_path_info: Annotated[Any, Only(">=0.5.22", "`node_by_id` is asked instead")]
    node_by_id: Annotated[Any, Only("", "the tree cannot be read: `no-radix-paths`")]
    root_node: Annotated[Any, Only("", "the tree cannot be read: `no-radix-paths`")]


# Where SGLang defines what each class stands for. A function is one that makes the object, from
# keyword arguments.
HOMES: dict[type, str] = {
    ServerArgs: "sglang.srt.server_args:ServerArgs",
    CudaGraphConfig: "sglang.srt.model_executor.cuda_graph_config:CudaGraphConfig",
    PhaseConfig: "sglang.srt.model_executor.cuda_graph_config:PhaseConfig",
    ModelConfig: "sglang.srt.configs.model_config:ModelConfig",
    KVPool: "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool",
    LatentPool: "sglang.srt.mem_cache.memory_pool:MLATokenToKVPool",
    KVWriteLocation: "sglang.srt.mem_cache.memory_pool:KVWriteLoc",
    WrappingPool: "sglang.srt.mem_cache.swa_memory_pool:SWAKVPool",
    ReqToTokenPool: "sglang.srt.mem_cache.memory_pool:ReqToTokenPool",
    ModelRunner: "sglang.srt.model_executor.model_runner:ModelRunner",
    AttentionLayer: "sglang.srt.layers.radix_attention:RadixAttention",
    Backend: "sglang.srt.layers.attention.base_attn_backend:AttentionBackend",
    GraphRunner: (
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner"
    ),
    ForwardMode: "sglang.srt.model_executor.forward_batch_info:ForwardMode",
    ForwardBatch: "sglang.srt.model_executor.forward_batch_info:ForwardBatch",
    ReplayView: ("sglang.srt.model_executor.runner.decode_cuda_graph_runner:build_replay_fb_view"),
    VerifyInput: "sglang.srt.speculative.eagle_info:EagleVerifyInput",
    KVInfo: "sglang.srt.managers.schedule_batch:ReqKvInfo",
    Request: "sglang.srt.managers.schedule_batch:Req",
    ScheduleBatch: "sglang.srt.managers.schedule_batch:ScheduleBatch",
    TreeNode: "sglang.srt.mem_cache.radix_cache:TreeNode",
    TreeCache: "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache",
    TreeCore: "sglang.srt.mem_cache.unified_cache.unified_tree_core:UnifiedTreeCore",
}
