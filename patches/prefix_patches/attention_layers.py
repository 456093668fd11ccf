"""The attention layers of a model that SGLang runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefix_patches.patch import Touch

if TYPE_CHECKING:
    import torch
    from sglang.srt.layers.radix_attention import RadixAttention

__all__ = ["TOUCHED", "attention_layers", "attention_sinks"]

# What the modules around a layer call the sinks that they pass to it (``models/gpt_oss.py``,
# ``granite.py`` and ``granitemoe.py``; ``mimo_v2.py``), 0.5.17 to 0.5.23.
_SINK_NAMES = ("sinks", "attention_sink_bias")

TOUCHED = (
    Touch(
        "sglang.srt.layers.radix_attention:RadixAttention",
        why="the class of SGLang's attention layers, whose calls come to an attention backend",
        kind=type,
    ),
)


def attention_layers(model: Any) -> list[RadixAttention]:
    """All ``RadixAttention`` of a model, those included that are no modules of it.

    A model that SGLang runs through Transformers (``--model-impl transformers``) keeps its layers
    in the dict ``attention_instances`` beside its modules (``models/transformers.py``, 0.5.17 to
    0.5.23). Without that dict the layers of such a model are not found, and nothing is packed.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    found: list[Any] = list(model.modules())
    for module in tuple(found):
        instances = vars(module).get("attention_instances")
        found += instances.values() if isinstance(instances, dict) else ()
    # By identity: a layer may stand at both places.
    return list({id(m): m for m in found if isinstance(m, RadixAttention)}.values())


def attention_sinks(model: Any) -> dict[RadixAttention, torch.Tensor]:
    """The attention sinks [Hq] that a model will pass to its layers, where they can be found.

    They are parameters of the module that has the layer. A model that keeps them elsewhere is
    served all the same; its kernels with sinks are compiled when they are first needed.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    return {
        layer: parameter
        for module in model.modules()
        for layer in module.children()
        if isinstance(layer, RadixAttention)
        for name, parameter in module.named_parameters(recurse=False)
        if name in _SINK_NAMES
    }
