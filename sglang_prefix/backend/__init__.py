"""The SGLang attention backend ``prefix``."""
