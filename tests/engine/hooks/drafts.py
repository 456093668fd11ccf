"""Lets SGLang's ``torch_native`` check drafts, which it cannot: chains and trees, by their mask.

It takes a verify pass for an extend and looks for lengths that such a pass does not have (0.5.17 to
0.5.23). So that what our backend leaves to it has an answer, this does what others of SGLang's do.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from sglang_prefix.bench.hooks import patch_after_import


def verify_drafts(module: ModuleType) -> None:
    """Attention of drafts over what stands before them, and over each other as the mask says."""
    backend = module.TorchNativeAttnBackend
    extend = backend.forward_extend

    def forward_extend(
        self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True
    ) -> Any:
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        if not batch.forward_mode.is_target_verify():
            return extend(self, q, k, v, layer, batch, save_kv_cache)
        pool, drafts = self.token_to_kv_pool, batch.spec_info.draft_token_num
        if save_kv_cache:
            pool.set_kv_buffer(layer, module.KVWriteLoc(batch.out_cache_loc, None), k, v)
        caches = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        mask = batch.spec_info.custom_mask
        if mask.numel() != len(q) * drafts:  # a graph's, which nobody has filled: a chain's
            mask = torch.ones(len(q), drafts).view(-1, drafts, drafts).tril()
        trees = mask.view(-1, drafts, drafts).bool()
        queries = q.view(len(trees), drafts, layer.tp_q_head_num, -1).movedim(1, 2)
        rows = self.req_to_token_pool.req_to_token[batch.req_pool_indices]
        out = []
        for query, row, length, tree in zip(
            queries, rows, batch.seq_lens.tolist(), trees, strict=True
        ):
            slots = row[: length + drafts].long()
            keys, values = (cache[slots].movedim(0, 1)[None] for cache in caches)
            seen = torch.cat((tree.new_ones(drafts, length), tree), 1)
            found = scaled_dot_product_attention(
                query[None], keys, values, seen, enable_gqa=True, scale=layer.scaling
            )
            out.append(found[0].movedim(0, 1).reshape(drafts, -1))
        return torch.cat(out)

    backend.forward_extend = forward_extend


patch_after_import({"sglang.srt.layers.attention.torch_native_backend": verify_drafts})
