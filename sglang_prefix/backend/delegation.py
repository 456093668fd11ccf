"""An attention backend that is another one, but for what it defines itself."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

__all__ = ["DelegatingBackend"]


class DelegatingBackend(AttentionBackend):
    """Hands everything that its subclass does not define, methods and attributes, to ``stock``.

    That includes what SGLang's base class answers for every backend, so that a release's new hooks
    reach the stock backend without a change here.

    Args:
        stock: the other backend.
    """

    def __init__(self, stock: AttentionBackend) -> None:
        self.stock = stock

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = set(vars(cls)) | set(vars(DelegatingBackend))
        for name in set(vars(AttentionBackend)) - own:
            if not name.startswith(("__", "_abc")):
                setattr(cls, name, _StockAttribute(name))

    def __getattr__(self, name: str) -> Any:
        # Reached for names that neither we nor SGLang's base class define.
        if name.startswith("__") or "stock" not in vars(self):
            raise AttributeError(name)
        return getattr(self.stock, name)

    @property
    def forward_metadata(self) -> Any:
        """The stock backend's metadata; SGLang also assigns it."""
        return self.stock.forward_metadata

    @forward_metadata.setter
    def forward_metadata(self, value: Any) -> None:
        self.stock.forward_metadata = value


class _StockAttribute:
    """Hands an attribute of the base class over to the stock backend.

    Not a data descriptor: what SGLang assigns on our backend stays on our backend.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, backend: DelegatingBackend | None, owner: type) -> Any:
        return self if backend is None else getattr(backend.stock, self._name)
